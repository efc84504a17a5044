"""The memory that a piece of code needs, in a process of its own."""

import subprocess
import sys
from pathlib import Path

_MEASURED = """
import sys, threading, torch, workbench as wb
torch.set_num_threads(1)

def held():
    told = dict(line.split(":") for line in open("/proc/self/status") if line.startswith(("RssAnon", "RssShmem")))
    return sum(int(value.split()[0]) for value in told.values()) / 1000

{before}
peak, done = [held()], threading.Event()
base = peak[0]

def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], held())

watcher = threading.Thread(target=watch, daemon=True)
watcher.start()
{code}
done.set()
watcher.join()
print(peak[0] - base)
"""


def peak_over_base(before: str, code: str, *args: object) -> float:
    """Megabytes that `code` holds at most, over what is held once `before` has run; `args` are its ``sys.argv[1:]``."""
    program = _MEASURED.format(before=before, code=code)
    found = subprocess.run(
        [sys.executable, "-c", program, *map(str, args)], capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1]
    )
    assert found.returncode == 0, found.stderr
    return float(found.stdout)
