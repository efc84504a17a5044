"""Figures of the foundation, side by side with plain torch in one run; prints a table and writes JSON.

    python tests/benchmarks/foundation.py --gib 1 --folder SCRATCH --json figures.json

The peer has the same duties: temporary file, fsync, rename, read-back. Ratios are by CPU time, medians of interleaved runs;
torch runs on one thread on both sides. Memory is the peak of anonymous plus shared resident memory over its value after
imports and one warm-up op, sampled every 2 ms in a fresh process. Nothing here passes or fails.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

LISTING = """
import sys, time, statistics
import workbench as wb
wb.open
def read():
    return next(int(line.split()[1]) for line in open("/proc/self/io") if line.startswith("rchar"))
before, seconds = read(), []
for _ in range(21):
    start = time.perf_counter(); tensors = len(wb.open(sys.argv[1])); seconds.append(time.perf_counter() - start)
heavy = [m for m in ("torch", "numpy", "ipywidgets", "matplotlib") if m in sys.modules]
print(tensors, statistics.median(seconds), (read() - before) / 21, heavy)
"""


def resident_mb() -> float:
    """RssAnon + RssShmem of this process, in MB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return sum(int(lines[key].split()[0]) for key in ("RssAnon", "RssShmem")) * 1024 / 1e6


def make_files(folder: Path, gib: float) -> None:
    """One file of 300 tensors, and one of a single tensor in each of four shapes."""
    import torch

    torch.manual_seed(0)
    rows = int(gib * 2**30 / 4 / 300 / 1024)
    if not (folder / "many.pt").exists():
        torch.save({f"layers.{i // 4}.{'qkvo'[i % 4]}.weight": torch.randn(rows, 1024) for i in range(300)}, folder / "many.pt")
    side = int((gib * 2**28) ** 0.5)
    flat = torch.randn(side * side)
    for name, tensor in (
        ("flat", flat),
        ("row", flat.view(1, -1)),
        ("square", flat.view(side, side)),
        ("transposed", flat.view(side, side).t()),
    ):
        if not (folder / f"{name}.pt").exists():
            torch.save({"weight": tensor}, folder / f"{name}.pt")


def listing(folder: Path) -> dict[str, object]:
    """Time and bytes to list the file of 300 tensors, in process and as a whole process."""
    path = str(folder / "many.pt")
    tensors, seconds, nbytes, heavy = subprocess.run(
        [sys.executable, "-c", LISTING, path], capture_output=True, text=True, check=True
    ).stdout.split(maxsplit=3)
    whole = []
    for _ in range(11):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "workbench", "inspect", path, "--json"], capture_output=True, check=True)
        whole.append(time.perf_counter() - start)
    return {
        "tensors": int(tensors),
        "list ms (median of 21)": 1e3 * float(seconds),
        "bytes read": float(nbytes),
        "heavy modules": heavy.strip(),
        "whole process s (median of 11)": statistics.median(whole),
    }


def naive_int8(source: Path, target: Path) -> None:
    """load, abs, amax, round, save: what people write by hand, made as safe as ours."""
    import torch

    weight = torch.load(source)["weight"]
    scale = weight.abs().amax(1, keepdim=True) / 127
    quantized = (weight / scale).round().to(torch.int8)
    temporary = target.with_suffix(".tmp")
    torch.save({"weight": quantized, "weight_scale": scale}, temporary)
    fd = os.open(temporary, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    assert torch.equal(torch.load(temporary)["weight"], quantized)
    os.replace(temporary, target)


def our_int8(source: Path, target: Path) -> None:
    import workbench as wb

    wb.save(wb.ops.quantize(wb.open(source)), target)


def side_by_side(peer: Callable[[], None], ours: Callable[[], None], rounds: int) -> dict[str, float]:
    """CPU and wall seconds of both, interleaved."""
    times: dict[str, list[tuple[float, float]]] = {"peer": [], "ours": []}
    for _ in range(rounds):
        for name, run in (("peer", peer), ("ours", ours)):
            cpu, wall = time.process_time(), time.perf_counter()
            run()
            times[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    out = {
        f"{name} {what} s": statistics.median(t[i] for t in held) for name, held in times.items() for i, what in enumerate(("cpu", "wall"))
    }
    return {
        **out,
        "times faster by cpu": out["peer cpu s"] / out["ours cpu s"],
        "times faster by wall": out["peer wall s"] / out["ours wall s"],
    }


def int8(folder: Path, rounds: int) -> dict[str, float]:
    import torch

    torch.set_num_threads(1)
    source = folder / "square.pt"
    return side_by_side(lambda: naive_int8(source, folder / "peer.pt"), lambda: our_int8(source, folder / "ours.pt"), rounds)


def peak(folder: Path, name: str, max_ram_mb: int) -> dict[str, float]:
    """Peak memory of quantizing and saving one tensor; runs in its own process."""
    import torch

    import workbench as wb

    torch.set_num_threads(1)
    wb.save(wb.ops.quantize(wb.open({"weight": torch.randn(64, 64)})), folder / "warm.pt")
    base, highest, stop = resident_mb(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not stop.wait(0.002):
            highest = max(highest, resident_mb())

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    wb.save(wb.ops.quantize(wb.open(folder / f"{name}.pt"), names="weight"), folder / "peak.pt", max_ram_mb=max_ram_mb)
    seconds = time.perf_counter() - start
    stop.set()
    watcher.join()
    return {"budget MB": max_ram_mb, "peak MB": max(0.0, highest - base), "wall s": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="kept between runs; a temporary folder where absent")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--peak", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        print(json.dumps(peak(args.folder, args.peak, 256)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            [
                sys.executable,
                "-c",
                f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import foundation, pathlib; foundation.make_files(pathlib.Path({str(folder)!r}), {args.gib})",
            ],
            check=True,
        )
        figures: dict[str, object] = {
            "listing": listing(folder),
            "int8 per channel against load-abs-amax-round-save": int8(folder, args.rounds),
        }
        for name in ("flat", "row", "square", "transposed"):
            done = subprocess.run(
                [sys.executable, __file__, "--peak", name, "--folder", str(folder)], capture_output=True, text=True, check=True
            )
            figures[f"memory, {name}"] = json.loads(done.stdout)
    for title, numbers in figures.items():
        print(title)
        assert isinstance(numbers, dict)
        for key, value in numbers.items():
            print(f"  {key:32} {value:.4g}" if isinstance(value, float) else f"  {key:32} {value}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
