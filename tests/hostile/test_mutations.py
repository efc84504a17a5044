"""Damaged files of every format: opened, shown, read and scanned. Each ends in one of our errors or in a valid listing, soon, and runs nothing.

The subjects are what the formats' own conformance classes build. 100,000 mutants in the full profile, a fixed few thousand otherwise.
"""

import importlib.util
import os
import random
import resource
import sys
import time
import warnings
from pathlib import Path

import pytest
from conformance import SECONDS, FormatTests

import workbench as wb
from workbench.errors import WorkbenchError

MUTANTS = 100_000 if os.environ.get("WORKBENCH_TEST_PROFILE") == "full" else 2_600
ROOM_MB = 512  # what one file may make a reader hold, over what the process held before
FORBIDDEN = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pickle.find_class", "socket.connect", "shutil.")  # fmt: skip


def subjects():
    """Every FormatTests class of tests/formats."""
    out = []
    for path in sorted((Path(__file__).parents[1] / "formats").glob("test_*.py")):
        spec = importlib.util.spec_from_file_location(f"subject_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        out += [
            cls
            for name, cls in vars(module).items()
            if isinstance(cls, type) and issubclass(cls, FormatTests) and name.startswith("Test") and cls.__module__ == module.__name__
        ]
    return out


SUBJECTS = subjects()


class Witness:
    """Sees, through Python's audit events, what a reader must never do."""

    def __init__(self):
        self.armed, self.seen = False, []
        sys.addaudithook(self.hook)

    def hook(self, event, args):
        if not self.armed:
            return
        writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
        if writes or event.startswith(FORBIDDEN):
            self.seen.append((event, repr(args)[:200]))


@pytest.fixture(scope="session")
def witness():
    return Witness()


def mutant(data, draw):
    """A few bytes changed, cut, repeated, moved or exchanged for numbers that parsers trip over."""
    data = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        at, kind = draw.randrange(len(data) + 1), draw.randrange(7)
        other, length = draw.randrange(len(data) + 1), draw.choice((1, 2, 4, 8, 64))
        if kind == 0 and at < len(data):
            data[at] ^= 1 << draw.randrange(8)
        elif kind == 1 and at < len(data):
            data[at] = draw.randrange(256)
        elif kind == 2:
            data[at : at + length] = draw.choice((b"\xff" * length, bytes(length), b"\x7f" + b"\xff" * (length - 1)))
        elif kind == 3:
            del data[at : at + length]
        elif kind == 4:
            data[at:at] = data[other : other + length]
        elif kind == 5:
            data[at : at + length] = data[other : other + length]
        elif draw.random() < 0.3:
            del data[at:]
    return bytes(data)


def exercise(path):
    """All that a person does with a stranger's file."""
    ckpt = wb.open(path)
    str(ckpt)
    ckpt.sections()
    for tensor in ckpt.values():
        if tensor.nbytes < 1 << 20:
            try:
                tensor.peek()
                tensor.load()
            except WorkbenchError:
                continue


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda cls: cls.__name__)
def test_a_damaged_file_ends_in_our_error_or_a_listing_and_runs_nothing(subject, tmp_path, witness):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what makes the file, torch.jit for one
        path, files = subject().build(tmp_path)
    originals = [file.read_bytes() for file in files]
    exercise(path)  # imports what reading needs
    assert wb.scan(path) is not None
    draw = random.Random(f"{subject.__name__} 20261122")
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    failures = []
    for index in range(MUTANTS // len(SUBJECTS) + 1):
        which = draw.randrange(len(files))
        data = mutant(originals[which], draw)
        files[which].write_bytes(data)
        started = time.monotonic()
        witness.seen, witness.armed = [], True
        try:
            exercise(path)
        except WorkbenchError:
            pass
        except Exception as error:
            failures.append((index, f"{type(error).__name__}: {error}"))
        try:
            if index % 4 == 0:
                str(wb.scan(path))
        except Exception as error:
            failures.append((index, f"scan: {type(error).__name__}: {error}"))
        witness.armed = False
        seconds = time.monotonic() - started
        if witness.seen:
            failures.append((index, f"did {witness.seen[:3]}"))
        if seconds > 2 * SECONDS:
            failures.append((index, f"took {seconds:.1f} s"))
        files[which].write_bytes(originals[which])
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held) / 1024
    assert not failures, f"{len(failures)} of {index + 1}: " + "\n".join(f"mutant {i}: {what}" for i, what in failures[:8])
    assert grown < ROOM_MB
