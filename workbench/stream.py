"""The one executor: moves tensors through their deferred kernels into a file, in blocks, under a memory budget.

A Block's results are written together, each shared Block runs once, and every result is checked against its spec. The unit
of work is (a group of targets, the output path) -> numbers, so a group can run inline, on a thread, or in a process of any
`concurrent.futures.Executor`: tensors never travel. What needs no kernel and no torch is copied as bytes.
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from isal import isal_zlib as zlib  # its CRC is three times as fast

from workbench import dtypes
from workbench.errors import BudgetError, CancelledError, SpecMismatchError, located
from workbench.files import Span, Storage
from workbench.tensors import HOT_NBYTES, Block, Derived, LazyTensor, Memo, Stored, strided_nbytes

MIN_RAM_MB = 16


@dataclass(frozen=True)
class Target:
    """Where one tensor's bytes go: `offset` in the output file. `name` is for messages."""

    name: str
    tensor: LazyTensor | Storage
    offset: int

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes


@dataclass(frozen=True)
class Written:
    """What was written for one target: bytes, and their CRC-32."""

    nbytes: int
    crc: int


@dataclass(frozen=True)
class Progress:
    """How far a long job is: `done` of `total` bytes after `seconds`."""

    label: str
    done: int
    total: int
    seconds: float


ProgressFunction = Callable[[Progress], None]


class Meter:
    """Counts bytes from any thread, tells `progress` at most ten times a second, and raises when cancelled."""

    def __init__(self, label: str, total: int, progress: ProgressFunction | None, cancel: threading.Event | None) -> None:
        self._label, self._total, self._progress, self._cancel = label, total, progress, cancel
        self._lock = threading.Lock()
        self._done = 0
        self._start = time.monotonic()
        self._told = 0.0

    def advance(self, nbytes: int) -> None:
        if self._cancel is not None and self._cancel.is_set():
            raise CancelledError("cancelled; nothing was changed")
        with self._lock:
            self._done += nbytes
            now = time.monotonic()
            due = self._progress is not None and (now - self._told > 0.1 or self._done >= self._total)
            self._told = now if due else self._told
            done = self._done
        if due and self._progress is not None:
            self._progress(Progress(self._label, done, self._total, now - self._start))


def stream(
    targets: Sequence[Target],
    path: str | os.PathLike[str],
    *,
    max_ram_mb: int = 256,
    threads: int = 1,
    executor: Executor | None = None,
    progress: ProgressFunction | None = None,
    cancel: threading.Event | None = None,
) -> list[Written]:
    """Write every target's bytes at its offset in the file at `path`, which exists already.

    Args:
        max_ram_mb: budget in MB (10**6 bytes) for everything held at once, over all threads; at least 16.
        executor: any concurrent.futures.Executor; its workers must reach the same files. Replaces `threads`.
        progress: called with Progress at most ten times a second. Not called from other processes.
        cancel: when set, the work stops at the next block with CancelledError.
    Returns:
        One Written per target, in order.
    Raises:
        BudgetError: a step needs more at once than the budget. SpecMismatchError: a kernel's result is not as declared.
    Cost: one read of each input and one write of each output; peak memory follows the block size, not the largest tensor.
    """
    if max_ram_mb < MIN_RAM_MB or threads < 1:
        raise BudgetError(f"max_ram_mb={max_ram_mb}, threads={threads}: at least {MIN_RAM_MB} MB and one thread are needed")
    groups = _groups(targets)
    budget = max_ram_mb * 10**6 // max(threads, 1)
    meter = Meter("writing", sum(t.nbytes for t in targets), progress, cancel)
    results: dict[int, Written] = {}
    if executor is None and threads == 1:
        for group in groups:
            results.update(zip(group, _run(tuple(targets[i] for i in group), os.fspath(path), budget, meter), strict=True))
    elif executor is None:
        with ThreadPoolExecutor(threads) as pool:
            results = _collect(pool, groups, targets, path, budget, meter)
    else:
        results = _collect(executor, groups, targets, path, budget, None)
        meter.advance(sum(t.nbytes for t in targets))
    return [results[i] for i in range(len(targets))]


def _collect(
    pool: Executor, groups: list[list[int]], targets: Sequence[Target], path: str | os.PathLike[str], budget: int, meter: Meter | None
) -> dict[int, Written]:
    pending: dict[Future[list[Written]], list[int]] = {
        pool.submit(_run, tuple(targets[i] for i in group), os.fspath(path), budget, meter): group for group in groups
    }
    results: dict[int, Written] = {}
    try:
        while pending:
            done, _ = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                results.update(zip(pending.pop(future), future.result(), strict=True))
    finally:
        for future in pending:
            future.cancel()
        wait(pending)
    return results


def _blocks(tensor: LazyTensor | Storage) -> Iterator[Block]:
    """The blocks that run in step with this tensor's own range."""
    stack = [tensor] if isinstance(tensor, LazyTensor) else []
    while stack:
        source = stack.pop().source
        if isinstance(source, Derived) and source.block.reads in ("elements", "rows"):
            yield source.block
            stack += source.block.rowed


def _groups(targets: Sequence[Target]) -> list[list[int]]:
    """Targets that share a block and can be walked in the same steps, by union-find."""
    parent = list(range(len(targets)))

    def find(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    owner: dict[Block, int] = {}
    for i, target in enumerate(targets):
        for block in _blocks(target.tensor):
            parent[find(i)] = find(owner.setdefault(block, i))
    groups: dict[int, list[int]] = {}
    for i in range(len(targets)):
        groups.setdefault(find(i), []).append(i)
    return list(groups.values())


def _run(group: tuple[Target, ...], path: str, budget: int, meter: Meter | None) -> list[Written]:
    """Write one group; runs anywhere that reaches the files."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        if len(group) == 1 and (storage := _as_bytes(group[0].tensor)) is not None:
            with located(tensor=group[0].name):
                return [_copy(storage, fd, group[0].offset, meter)]
        return _compute(group, fd, budget, meter)
    finally:
        os.close(fd)


def _as_bytes(tensor: LazyTensor | Storage) -> Storage | None:
    """The stored bytes that are already what is to be written, if they are."""
    if not isinstance(tensor, LazyTensor):
        return tensor
    source = tensor.source
    tensor._require_unlocked()
    plain = isinstance(source, Stored) and tensor.is_contiguous and (source.byteorder == "little" or tensor.dtype.unit == 1)
    if not plain or not isinstance(source, Stored) or not isinstance(source.storage, Span):
        return None
    start = source.offset * tensor.dtype.itemsize
    if start + tensor.nbytes > source.storage.nbytes:
        return None
    return source.storage.part(start, tensor.nbytes)


def _copy(storage: Storage, fd: int, offset: int, meter: Meter | None) -> Written:
    crc, buffer = 0, bytearray(min(HOT_NBYTES, storage.nbytes))
    if storage.nbytes:
        with storage.open() as reader:
            for start in range(0, storage.nbytes, HOT_NBYTES):
                view = memoryview(buffer)[: min(HOT_NBYTES, storage.nbytes - start)]
                reader.readinto(view, start)
                crc = zlib.crc32(view, crc)
                _pwrite(fd, view, offset + start)
                if meter:
                    meter.advance(view.nbytes)
    return Written(storage.nbytes, crc)


def _pwrite(fd: int, view: memoryview, offset: int) -> None:
    while view.nbytes:
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done


def _compute(group: tuple[Target, ...], fd: int, budget: int, meter: Meter | None) -> list[Written]:
    tensors = [t.tensor for t in group if isinstance(t.tensor, LazyTensor)]
    if len(tensors) != len(group):
        raise SpecMismatchError("stored bytes cannot share a block with a computed tensor")
    _keep_freed_blocks()
    memo = Memo(budget)
    crcs = [0] * len(group)
    units, step = _steps(tensors, budget)
    for first in range(0, units, step):
        last = min(first + step, units)
        memo.step.clear()
        for i, (target, tensor) in enumerate(zip(group, tensors, strict=True)):
            per_unit = tensor.numel // units
            with located(tensor=target.name):
                values = tensor.read(first * per_unit, last * per_unit, memo)
            view = bytes_of(values)
            crcs[i] = zlib.crc32(view, crcs[i])
            _pwrite(fd, view, target.offset + first * per_unit * tensor.dtype.itemsize)
            if meter:
                meter.advance(view.nbytes)
    return [Written(t.nbytes, crc) for t, crc in zip(tensors, crcs, strict=True)]


def _keep_freed_blocks() -> None:
    """Let the C allocator keep what each step frees for the next one, instead of handing it back and faulting it in again.

    glibc raises the size from which it maps blocks singly to that of the largest such block freed; the block is never touched.
    """
    import torch

    torch.empty(16 << 20, dtype=torch.uint8)


def _steps(tensors: Sequence[LazyTensor], budget: int) -> tuple[int, int]:
    """(units, units per step): rows where any block of the group works by rows (where theirs differ, parts that are whole rows of each)."""
    blocks = [block for tensor in tensors for block in _blocks(tensor)]
    rows = {block.specs[0].shape[0] for block in blocks if block.reads == "rows"}
    counts = {math.gcd(*rows)} if rows else {tensor.numel for tensor in tensors}
    if len(counts) > 1:
        raise SpecMismatchError(f"tensors that share a block do not have the same number of elements: {sorted(counts)}")
    units = counts.pop()
    if not units:
        return 0, 1
    inputs = [t for block in blocks for t in block.rowed] or list(tensors)
    widest = max(t.nbytes for t in [*inputs, *tensors]) / units
    nbytes = HOT_NBYTES if all(t.is_contiguous for t in inputs) else strided_nbytes(budget)
    if widest * 4 > budget:
        raise BudgetError(
            f"one row of {widest / 1e6:.0f} MB does not fit the budget of {budget / 1e6:.0f} MB four times",
            hint=f"give max_ram_mb={int(widest * 5e-6) + 1} or more",
        )
    return units, max(1, int(nbytes // max(widest, 1)))


def bytes_of(values: Any) -> memoryview:
    """The bytes of a flat torch tensor of any dtype."""
    import torch

    return dtypes.flat(values).view(torch.uint8).numpy().data.cast("B") if values.numel() else memoryview(b"")
