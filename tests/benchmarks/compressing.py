"""Figures of quantizing files, side by side with plain torch and safetensors in one run; prints a table and writes JSON.

    python tests/benchmarks/compressing.py --gib 1 --folder SCRATCH --json figures.json

The source is a float32 safetensors file of 4096-column matrices. The peer loads it, takes each tensor's range with aminmax, divides, rounds,
and saves with the same duties as ours: temporary file, fsync, rename, read-back. CPU seconds of the process, medians of interleaved
rounds, one torch thread on both sides; each of our saves runs under max_ram_mb=256. Memory is the peak of anonymous plus shared
resident memory over its value after imports and one warm-up op, in a fresh process. Nothing here passes or fails.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from foundation import side_by_side
from memory import peak_over_base

SCHEMES: dict[str, dict[str, object]] = {
    "int8 per channel": {"scheme": "int8"},
    "int8 per group of 128, asymmetric": {"scheme": "int8", "group_size": 128, "symmetric": False},
    "int4 per group of 128": {"scheme": "int4"},
    "float8_e4m3fn per channel": {"scheme": "float8_e4m3fn"},
}
SHAPES = ("(1, n)", "(n,)", "(int(n**0.5), int(n**0.5))")
WARM = 'wb.save(wb.ops.quantize(wb.open({"w": torch.ones(64, 256)}), told), target)'
SAVE = 'wb.save(wb.ops.quantize(wb.open(source), told, names="w"), target, max_ram_mb=256)'


def make_file(path: Path, gib: float) -> None:
    """Matrices of [4096, 4096], 64 MiB each."""
    import torch

    import workbench as wb

    base = torch.randn(4096, 4096, generator=torch.Generator().manual_seed(0))
    wb.save({f"layers.{i}.weight": base + i / 1000 for i in range(max(1, round(gib * 16)))}, path)


def naive(source: Path, target: Path, scheme: str) -> None:
    """What people write by hand, made as safe as ours."""
    import torch
    from safetensors.torch import load_file, save_file

    out: dict[str, torch.Tensor] = {}
    for name, weight in load_file(source).items():
        rows = weight.view(-1, 128 if "group" in scheme else weight.shape[1])
        low, high = torch.aminmax(rows, dim=1, keepdim=True)
        if "asymmetric" in scheme:
            low, high = low.clamp(max=0), high.clamp(min=0)
            scale = (high - low) / 255
            zero = -128 - (low / scale).round()
            codes = ((rows / scale).round() + zero).clamp(-128, 127).to(torch.int8)
            out[f"{name}_zero_point"] = zero.view(weight.shape[0], -1).to(torch.int8)
        elif "int4" in scheme:
            scale = torch.maximum(-low, high) / 7
            nibbles = (rows / scale).round().to(torch.int32).view(-1, 8) + 8
            codes = (nibbles << torch.arange(0, 32, 4, dtype=torch.int32)).sum(1, dtype=torch.int32)
        elif "float8" in scheme:
            scale = torch.maximum(-low, high) / 448
            codes = (rows / scale).to(torch.float8_e4m3fn)
        else:
            scale = torch.maximum(-low, high) / 127
            codes = (rows / scale).round().to(torch.int8)
        out[f"{name}_packed" if "int4" in scheme else name] = codes.view(weight.shape[0], -1)
        out[f"{name}_scale"] = scale.view(weight.shape[0], -1)
    temporary = target.with_suffix(".tmp")
    save_file(out, temporary)
    fd = os.open(temporary, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    back = load_file(temporary)
    assert all(torch.equal(back[name].view(torch.uint8), value.view(torch.uint8)) for name, value in out.items())
    os.replace(temporary, target)


def ours(source: Path, target: Path, scheme: str) -> None:
    import workbench as wb

    wb.save(wb.ops.quantize(wb.open(source), SCHEMES[scheme]), target, max_ram_mb=256)


def peaks(folder: Path, gib: float, schemes: list[str]) -> dict[str, float]:
    """MB over the base while one tensor of each shape is quantized and saved."""
    import torch
    from safetensors.torch import save_file

    n, out = int((gib * 2**28) ** 0.5) // 128 * 128, {}
    for shape in SHAPES:
        save_file({"w": torch.randn(eval(shape, {"n": n * n}))}, folder / "one.safetensors")
        for scheme in schemes:
            if not ("group" in scheme and shape == "(n,)"):
                told = f"import json, sys; source, target, told = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]); {WARM}"
                out[f"{scheme}, {shape}"] = peak_over_base(
                    told, SAVE, folder / "one.safetensors", folder / "peak.safetensors", json.dumps(SCHEMES[scheme])
                )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="kept between runs; a temporary folder where absent")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--schemes", nargs="*", default=list(SCHEMES), choices=list(SCHEMES))
    args = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        source = folder / f"source_{args.gib:g}.safetensors"
        if not source.exists():
            make_file(source, args.gib)
        make_file(folder / "warm.safetensors", 0.06)
        figures: dict[str, dict[str, float]] = {}
        for scheme in args.schemes:
            for path in (folder / "warm.safetensors", source):
                found = side_by_side(
                    partial(naive, path, folder / "peer.safetensors", scheme), partial(ours, path, folder / "ours.safetensors", scheme),
                    args.rounds if path == source else 1,
                )  # fmt: skip
            figures[scheme] = found
        figures["peak MB over the base, max_ram_mb=256"] = peaks(folder, min(args.gib, 1.0), args.schemes)
    for title, numbers in figures.items():
        print(title)
        for key, value in numbers.items():
            print(f"  {key:60} {value:.4g}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
