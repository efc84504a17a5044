"""What a certificate costs, beside memcmp over the same bytes. Printed, never judged.

    python tests/benchmarks/loading.py [folder]      # makes a file of 1 GiB there

The proving pass reads the file's bytes and compares them with the model's memory; so does its peer, as bare as Python allows:
preadv into one buffer of 1 MiB and the C library's memcmp. A second peer has the whole file in memory before its clock starts.
One thread, warm page cache, medians of interleaved runs.
"""

import ctypes
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

import workbench as wb
from workbench.keymap import loading
from workbench.keymap.maps import KeyMap, Pair

RUNS, LAYERS = 9, 64


def build():
    return torch.nn.Sequential(*(torch.nn.Linear(1024, 4096, bias=False) for _ in range(LAYERS)))


def memcmp(path, places, in_memory):
    """Seconds of the processor and of the clock to compare each tensor's bytes with the model's."""
    compare = ctypes.CDLL(None).memcmp
    compare.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    block = max(n for _, n, _ in places) if in_memory else 1 << 20
    buffer = torch.empty(block, dtype=torch.uint8)
    view, held = memoryview(buffer.numpy()), [tensor.clone() for _, _, tensor in places] if in_memory else []
    fd, start = os.open(path, os.O_RDONLY), (time.process_time(), time.perf_counter())
    for index, (offset, nbytes, tensor) in enumerate(places):
        for at in range(0, nbytes, block):
            count = min(block, nbytes - at)
            source = held[index].data_ptr() if in_memory else buffer.data_ptr()
            assert in_memory or os.preadv(fd, [view[:count]], offset + at) == count
            assert compare(source, tensor.data_ptr() + at, count) == 0
    os.close(fd)
    return time.process_time() - start[0], time.perf_counter() - start[1]


def proof(ckpt, model):
    """The same of the certificate's proving pass."""
    held, buffer = model.state_dict(), bytearray(loading._BLOCK_NBYTES)
    start = time.process_time(), time.perf_counter()
    assert not any(loading.difference(ckpt[name], value, buffer) for name, value in held.items())
    return time.process_time() - start[0], time.perf_counter() - start[1]


def timed(call):
    start = time.process_time(), time.perf_counter()
    call()
    return time.process_time() - start[0], time.perf_counter() - start[1]


def main(folder):
    torch.set_num_threads(1)
    path = folder / "one_gib.pt"
    if not path.exists():
        torch.save(build().state_dict(), path)
    model, ckpt = build(), wb.open(path)
    keymap = KeyMap(tuple(Pair.plain(name, name, "same name", "certain", "") for name in ckpt))
    wb.load_into(model, ckpt, keymap).check()
    places = [(ckpt[name].offset, ckpt[name].nbytes, value) for name, value in model.state_dict().items()]
    calls = {
        "preadv + memcmp": lambda: memcmp(path, places, False),
        "memcmp in memory": lambda: memcmp(path, places, True),
        "proving pass": lambda: proof(ckpt, model),
        "load_into, whole": lambda: timed(lambda: wb.load_into(model, path, keymap)),
        "torch.load + load_state_dict": lambda: timed(lambda: model.load_state_dict(torch.load(path, weights_only=True))),
    }
    times = {name: [] for name in calls}
    for _ in range(RUNS):
        for name, call in calls.items():
            times[name].append(call())
    peer = [statistics.median(column) for column in zip(*times["preadv + memcmp"], strict=True)]
    print(f"{path.stat().st_size / 2**30:.2f} GiB in {len(ckpt)} tensors")
    for name, told in times.items():
        cpu, wall = (statistics.median(column) for column in zip(*told, strict=True))
        print(f"{name:30} {cpu:.3f} s CPU, {wall:.3f} s; {cpu / peer[0]:.2f} x and {wall / peer[1]:.2f} x preadv + memcmp")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            main(Path(scratch))
