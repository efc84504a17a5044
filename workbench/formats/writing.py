"""What every writer shares: a layout of targets, written atomically, streamed, and read back before the old file goes."""

from __future__ import annotations

import os
import struct
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field

from workbench.checkpoint import Checkpoint
from workbench.errors import CorruptFileError, SelectionError, visible
from workbench.files import FileRef, Output, Span, atomic_write, checksum, file_ref
from workbench.report import Report
from workbench.stream import ProgressFunction, Target, Written, stream
from workbench.tables import Column, Table, format_bytes, table
from workbench.tensors import TensorSpec


@dataclass(frozen=True)
class Job:
    """How to run a save: the executor's options, passed through as they are."""

    max_ram_mb: int = 256
    threads: int = 1
    executor: Executor | None = None
    progress: ProgressFunction | None = None
    cancel: threading.Event | None = None
    dry_run: bool = False


@dataclass(frozen=True)
class Layout:
    """A file to be: its size, fixed pieces at their offsets, streamed targets, and what must be patched in once CRCs are known."""

    nbytes: int
    fixed: Sequence[tuple[int, bytes]]
    targets: Sequence[Target]
    finish: Callable[[Sequence[Written]], Sequence[tuple[int, bytes]]] = lambda written: ()


@dataclass(frozen=True, repr=False)
class SaveReport(Report):
    """What was written, and that it was read back equal; or, of a dry run, what would be, and its `layout`."""

    path: str
    format: str
    tensors: int
    nbytes: int
    seconds: float
    verify_seconds: float
    notes: tuple[str, ...] = ()
    left_behind: tuple[str, ...] = field(default=())
    layout: Layout | None = field(default=None, repr=False)

    @property
    def headline(self) -> str:
        left = f"; left behind: {len(self.left_behind)}" if self.left_behind else ""
        done = "would be written to" if self.layout else "written to"
        proof = "" if self.layout else " and read back equal"
        return f"{self.tensors} tensors, {format_bytes(self.nbytes)}, {done} {visible(os.path.basename(self.path))}{proof}{left}"

    def tables(self) -> tuple[Table, ...]:
        facts: list[tuple[str, str]] = [
            ("file", self.path),
            ("format", self.format),
            ("written in", f"{self.seconds:.3g} s"),
            ("read back in", f"{self.verify_seconds:.3g} s"),
        ]
        facts += [("note", note) for note in self.notes] + [("left behind", left) for left in self.left_behind]
        return (table("saved", (Column("what"), Column("value")), facts),)


def write_layout(
    path: str, layout: Layout, specs: dict[str, TensorSpec], reader: Callable[[FileRef], Checkpoint], job: Job
) -> tuple[float, float]:
    """Write the layout as the file at `path`, or leave everything as it was; a dry run does no more.

    Returns: (seconds to write, seconds to read back).
    Raises:
        CorruptFileError: the file read back differs from what was meant; the old file is untouched.
    """
    if job.dry_run:
        return 0.0, 0.0
    timing = [time.monotonic(), 0.0]
    written: list[Written] = []

    def verify(temporary: str) -> None:
        start = time.monotonic()
        file = file_ref(temporary)
        found = {name: tensor.spec for name, tensor in reader(file).items()}
        if found != specs:
            wrong = next((n for n in specs if found.get(n) != specs[n]), next(iter(found.keys() - specs.keys()), "?"))
            raise CorruptFileError("the file read back lists another tensor than was meant; the old file is untouched", tensor=wrong)
        for target, result in zip(layout.targets, written, strict=True):
            if checksum(Span(file, target.offset, target.nbytes)) != result.crc:
                raise CorruptFileError("the bytes read back differ from those written; the old file is untouched", tensor=target.name)
        timing[1] = time.monotonic() - start

    with atomic_write(path, verify=verify) as output:
        output.reserve(layout.nbytes)
        _write_all(output, layout.fixed)
        written += stream(
            layout.targets,
            output.path,
            max_ram_mb=job.max_ram_mb,
            threads=job.threads,
            executor=job.executor,
            progress=job.progress,
            cancel=job.cancel,
        )
        _write_all(output, layout.finish(written))
    return time.monotonic() - timing[0] - timing[1], timing[1]


def _write_all(output: Output, pieces: Sequence[tuple[int, bytes]]) -> None:
    for offset, data in pieces:
        output.write(data, offset)


def require_unlocked(ckpt: Checkpoint) -> None:
    """Refuse to write values that are in doubt, naming the first such tensor."""
    for name, tensor in ckpt.items():
        if tensor.locked is not None:
            raise CorruptFileError(f"the values are locked: {tensor.locked}", tensor=name, hint=f"leave it out: ckpt.drop({name!r})")


def require_only_tensors(ckpt: Checkpoint, container: str) -> None:
    """Refuse a container that would lose what is no tensor."""
    if ckpt.extras:
        sections = [s.name for s in ckpt.sections() if s.path]
        hint = (
            f"save ckpt.weights (section {ckpt.weights_section.name!r}), or save the whole as .pt"
            if sections
            else "save it as .pt, or pass only its tensors: wb.open(dict(ckpt))"
        )
        first = ", ".join(list(ckpt.extras)[:4])
        raise SelectionError(
            f"{container} holds only tensors, and this checkpoint also has {len(ckpt.extras)} other values ({first}…)", hint=hint
        )


def struct_pack(spelling: str, *values: int | bytes) -> bytes:
    return struct.pack("<" + spelling, *values)
