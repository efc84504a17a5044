"""The ledger: what every byte of a file is for. Its rows add up to the file, exactly."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from workbench.checkpoint import Checkpoint
from workbench.files import FileRef
from workbench.opening import open as open_checkpoint
from workbench.report import Report
from workbench.sections import Path
from workbench.strided import extent
from workbench.tables import Column, Table, format_bytes, table
from workbench.tensors import LazyTensor, Live, Stored, parts, spans_of
from workbench.tree import Aside, is_mapping, items_of


@dataclass(frozen=True)
class LedgerRow:
    """One use of bytes: `what` it is, in which section and element type, how many tensors, and whether it is waste."""

    what: str
    section: str
    dtype: str
    tensors: int
    nbytes: int
    waste: bool = False


@dataclass(frozen=True, repr=False)
class LedgerReport(Report):
    """Where the bytes go; false where some are waste. `total` is the size on disk, or in memory for live objects."""

    rows: tuple[LedgerRow, ...]
    total: int
    logical: int

    @property
    def ok(self) -> bool:
        return not any(row.waste for row in self.rows)

    @property
    def headline(self) -> str:
        waste = sum(row.nbytes for row in self.rows if row.waste)
        largest = max(self.rows, key=lambda row: row.nbytes, default=None)
        text = f"{format_bytes(self.total)} in all"
        if largest is not None and self.total:
            text += f"; {100 * largest.nbytes / self.total:.0f} % is {largest.what}" + (f" of {largest.section}" if largest.section else "")
        return text + (f"; {format_bytes(waste)} is carried along and no tensor shows it" if waste else "")

    def tables(self) -> tuple[Table, ...]:
        columns = (
            Column("what"),
            Column("section", "name"),
            Column("dtype"),
            Column("tensors", "count"),
            Column("bytes", "bytes"),
            Column("share", "percent"),
        )
        rows = [
            (r.what, r.section or "(root)", r.dtype or None, r.tensors or None, r.nbytes, r.nbytes / self.total if self.total else None)
            for r in self.rows
        ]
        return (table("ledger", columns, rows),)


def ledger(ckpt: Any) -> LedgerReport:
    """Account for every byte: tensors by section and element type, storage that no tensor shows, and the container itself.

    `ckpt` is anything `wb.open` takes; of a section, only its own storages are counted. A storage that several tensors view is
    counted once, for the first of them. Results of ops that were never written count their logical bytes.

    Cost: nothing is read but the index, which is open already.
    """
    ckpt = open_checkpoint(ckpt)
    sections = [(s.path, s.name, s.kind) for s in ckpt.sections()]
    sums: dict[tuple[str, str, str], list[int]] = {}
    dragged: dict[str, int] = {}
    files: set[FileRef] = set()
    counted: set[str] = set()
    stored = 0
    beside = {key for key, node in items_of(ckpt.tree).items() if isinstance(node, Aside)} if is_mapping(ckpt.tree) else set()
    for tensors in _by_storage(ckpt):
        name, first = tensors[0]
        path = ckpt.paths[name]
        section, kind = _section_of(path, sections) if path[:1] == () or path[0] not in beside else (str(path[0]), "other")
        what = {"weights": "weights", "ema": "averaged weights", "optimizer": "optimizer state"}.get(kind, "other tensors")
        size, shown = _storage_sizes([t for _, t in tensors])
        row = sums.setdefault((what, section, first.dtype.name), [0, 0])
        row[0] += len({n for n, _ in tensors} - counted)
        counted.update(n for n, _ in tensors)
        row[1] += shown
        if size > shown:
            dragged[section] = dragged.get(section, 0) + size - shown
        stored += size
        if isinstance(first.source, Stored):
            files.update(span.file for span in spans_of(first.source.storage))
    if ckpt.source is not None:
        files.add(ckpt.source)
    rows = [LedgerRow(what, section, dtype, count, nbytes) for (what, section, dtype), (count, nbytes) in sums.items()]
    rows += [
        LedgerRow("storage behind views, shown by no tensor", section, "", 0, nbytes, waste=True) for section, nbytes in dragged.items()
    ]
    total = stored
    if ckpt.source is not None and not ckpt.within:
        total = sum(file.size for file in files)
        rows.append(LedgerRow("container: index, pickle, headers, padding", "", "", 0, total - stored))
    rows.sort(key=lambda row: -row.nbytes)
    return LedgerReport(tuple(rows), total, ckpt.nbytes)


def _by_storage(ckpt: Checkpoint) -> Iterable[list[tuple[str, LazyTensor]]]:
    """(name, tensor) by the storage that holds the bytes; a sparse or quantized tensor of a file by the storages of its parts."""
    groups: dict[Any, list[tuple[str, LazyTensor]]] = {}
    for name, tensor in ckpt.items():
        for leaf in parts(tensor) if ckpt.source is not None else [tensor]:
            source = leaf.source
            key: Any = source
            if isinstance(source, Stored):
                key = source.storage
            elif isinstance(source, Live) and leaf.spec.layout == "strided":
                key = source.storage_key
            groups.setdefault(key, []).append((name, leaf))
    return groups.values()


def _storage_sizes(tensors: list[LazyTensor]) -> tuple[int, int]:
    """(bytes of the storage as it lies, bytes of it that any tensor shows)."""
    first = tensors[0]
    if isinstance(first.source, Stored):
        storage = first.source.storage
        packed = getattr(storage, "span", None)
        if packed is not None:
            return packed.nbytes, packed.nbytes
        views = [(t.source.offset, t.source.strides, t) for t in tensors if isinstance(t.source, Stored)]
        total = storage.nbytes
    elif isinstance(first.source, Live) and first.spec.layout == "strided":
        views = [(int(t.source.tensor.storage_offset()), t.source.tensor.stride(), t) for t in tensors if isinstance(t.source, Live)]
        total = first.source.tensor.untyped_storage().nbytes()
    else:
        return first.nbytes, first.nbytes
    shown, end = 0, 0
    for low, high in sorted(
        (offset * t.dtype.itemsize, (offset + extent(t.shape, strides)) * t.dtype.itemsize) for offset, strides, t in views
    ):
        shown += max(0, high - max(low, end))
        end = max(end, high)
    return total, min(shown, total)


def _section_of(path: Path, sections: list[tuple[Path, str, str]]) -> tuple[str, str]:
    held = [(p, name, kind) for p, name, kind in sections if path[: len(p)] == p]
    if not held:
        return "", "other"
    _, name, kind = max(held, key=lambda entry: len(entry[0]))
    return name, kind
