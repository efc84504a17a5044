"""Figures of opening: a legacy file, a hundred thousand tensors against torch, and what a remote listing moves. Printed, never judged.

python tests/benchmarks/opening.py [folder]      # makes about 1.2 GB of files there
"""

import functools
import gc
import http.server
import os
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

import workbench as wb


def read_bytes():
    with open("/proc/self/io") as told:
        return int(next(line for line in told if line.startswith("rchar")).split()[1])


def legacy(folder):
    path = folder / "legacy.pt"
    torch.save({f"layer.{i}.weight": torch.zeros((1 << 30) // 4 // 300) for i in range(300)}, path, _use_new_zipfile_serialization=False)
    wb.open(path)
    before, seconds = read_bytes(), []
    for _ in range(21):
        start = time.perf_counter()
        wb.open(path)
        seconds.append(time.perf_counter() - start)
    moved = (read_bytes() - before) / 21
    print(f"legacy .pt of 1 GiB, 300 tensors: {1e3 * statistics.median(seconds):.1f} ms, {moved / 1e6:.3f} MB read")


def many(folder):
    path = folder / "many.pt"
    torch.save({f"model.layers.{i // 10}.block.{i % 10}.weight": torch.zeros(8) for i in range(100_000)}, path)
    ratios = []
    for _ in range(5):
        times = []
        for load in (wb.open, functools.partial(torch.load, map_location="meta")):
            gc.collect()
            start = time.process_time()
            held = load(path)
            times.append(time.process_time() - start)
            del held
        ratios.append(times[1] / times[0])
        print(f"100,000 tensors: {times[0]:.2f} CPU-s, torch meta {times[1]:.2f} CPU-s")
    print(f"100,000 tensors: 1/{statistics.median(ratios):.1f} of torch's time")


class Ranged(http.server.SimpleHTTPRequestHandler):
    """A server with Range that counts what it sends."""

    sent = 0

    def do_GET(self):
        path = Path(self.directory) / self.path.strip("/")
        first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        with open(path, "rb") as file:
            file.seek(first)
            data = file.read(last - first + 1)
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{first + len(data) - 1}/{path.stat().st_size}")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
        self.end_headers()
        self.wfile.write(data)
        type(self).sent += len(data)

    def log_message(self, *args):
        pass


def remote(folder):
    path = folder / "remote.pt"
    with torch.serialization.skip_data():
        torch.save({f"layer.{i}.weight": torch.empty((1 << 30) // 4 // 300) for i in range(300)}, path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Ranged, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        ckpt = wb.open(f"http://127.0.0.1:{server.server_port}/remote.pt")
        print(f"remote .pt of {os.path.getsize(path) / 2**30:.2f} GiB, {len(ckpt)} tensors: {Ranged.sent / 1e3:.0f} kB moved")
        server.shutdown()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(sys.argv[1] if len(sys.argv) > 1 else scratch)
        for figure in (legacy, many, remote):
            figure(place)
