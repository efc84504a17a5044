"""The archive view: how a container lies on the disk. Its rows add up to the file, exactly.

Owns the layout alone: records, where their bytes begin, how they are packed and checked, what the container says of itself.
What the bytes are for is the ledger's story (analyses/sizes.py). A zip archive is shown from its directory, so one that
holds no readable checkpoint is shown too; of other formats, the storages that their index names.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from workbench.checkpoint import Checkpoint
from workbench.errors import FormatError, SelectionError
from workbench.files import FileRef, Span, checksum, place, read_span
from workbench.formats import recognise
from workbench.formats.pickle_vm import Machine
from workbench.formats.torch_tar import members
from workbench.formats.zip_index import ZipIndex
from workbench.opening import open as open_checkpoint
from workbench.report import Report
from workbench.stream import Meter, ProgressFunction
from workbench.tables import Column, Table, format_bytes, shorten, table
from workbench.tensors import Stored, parts, spans_of

_SAYINGS = ("version", ".format_version", ".storage_alignment", "byteorder", "serialization_id", "archive_format", "archive_version")
_LEGACY = ("magic number", "version of the protocol", "system", "the object", "keys of the storages")
_MAX_HEAD = 64 << 20
_PAGE = 4096


class ArchiveRow(NamedTuple):
    """One piece of a file: `nbytes` as they lie at `offset`, `size` once unpacked; the CRC-32 as the directory states it."""

    name: str
    offset: int | None
    nbytes: int
    size: int
    packing: str = ""
    crc: str = ""
    note: str = ""
    fault: str = ""

    @property
    def alignment(self) -> int | None:
        """The largest power of two, up to a page, that the offset is a multiple of."""
        return None if self.offset is None else min(self.offset & -self.offset, _PAGE) or _PAGE


@dataclass(frozen=True, repr=False)
class ArchiveReport(Report):
    """How a file is put together; false where a record contradicts the archive's own directory.

    Attributes:
        rows: the pieces in the container's own order; their `nbytes` add up to `total`.
        facts: what the container says of itself, and how its storages are aligned.
    """

    name: str
    container: str
    rows: tuple[ArchiveRow, ...]
    facts: tuple[tuple[str, str], ...]
    total: int

    @property
    def ok(self) -> bool:
        return not any(row.fault for row in self.rows)

    @property
    def headline(self) -> str:
        faults = [f"{row.name}: {row.fault}" for row in self.rows if row.fault]
        packed = sum(row.size != row.nbytes for row in self.rows)
        text = f"{self.container} of {format_bytes(self.total)} in {len(self.rows)} pieces, {packed or 'none'} of them packed"
        return text + (f"; {len(faults)} at fault, first {faults[0]}" if faults else "")

    def tables(self) -> tuple[Table, ...]:
        counts = (Column("offset", "count"), Column("aligned to", "count"), Column("bytes", "count"), Column("unpacked", "count"))
        columns = (Column("name", "name"), *counts, Column("packing"), Column("CRC-32", "code"), Column("note"))
        rows = [(*r[:2], r.alignment, *r[2:4], *(text or None for text in (r.packing, r.crc, r.fault or r.note))) for r in self.rows]
        return (table("what it says of itself", (Column("what"), Column("value")), self.facts), table("pieces", columns, rows))


def archive(
    source: Any, *, crc: bool = False, progress: ProgressFunction | None = None, cancel: threading.Event | None = None
) -> ArchiveReport:
    """Show what a file is made of: every record, storage and header, where it lies, and how it is packed.

    Args:
        source: a path, an address, or a Checkpoint opened from one. Of a folder or of shards, the files are the pieces.
        crc: prove the headers of each record of a zip archive and compare its CRC-32 with its bytes.
    Raises:
        SelectionError: the checkpoint lives in memory. FormatError, MissingFileError. CancelledError.
    Cost: the index, and two bytes of each pickle; with `crc`, one read of the file.
    """
    if not isinstance(source, (str, os.PathLike, Checkpoint)):
        source = open_checkpoint(source)
    file = source.source if isinstance(source, Checkpoint) else place(source)
    if file is None:
        raise SelectionError("a checkpoint that lives in memory has no container", hint="save it, or give the path of a file")
    form, index = recognise(file) if isinstance(file, FileRef) else (None, None)
    if isinstance(file, FileRef) and isinstance(index, ZipIndex):
        rows = list(_records(index, Meter("checksums", file.size, progress, cancel) if crc else None))
        return ArchiveReport(file.name, "a zip archive", tuple(rows), tuple(_zip_facts(index, rows)), file.size)
    ckpt = open_checkpoint(source)
    said = tuple((key, shorten(value, 80)) for key, value in ckpt.metadata.items())
    spans: dict[Span, list[str]] = {}
    for name, leaf in ((name, leaf) for name, tensor in ckpt.items() for leaf in parts(tensor)):
        for span in spans_of(leaf.source.storage) if isinstance(leaf.source, Stored) else ():
            spans.setdefault(span, []).append(name)
    files = list(dict.fromkeys([*([ckpt.source] if ckpt.source else []), *(span.file for span in spans)]))
    if len(files) != 1:
        rows = [ArchiveRow(f.name, None, f.size, f.size, note=f"{sum(s.file == f for s in spans)} storages") for f in files]
        return ArchiveReport(ckpt.name, "a set of files", tuple(rows), said, sum(f.size for f in files))
    pieces = [(names[0], span, f"on it: {len(names)} tensors" * (len(names) > 1)) for span, names in spans.items()]
    if ckpt.format == "torch-tar":
        pieces = [(name, span, "a member") for name, span in members(files[0]).items()]
    elif ckpt.format == "torch-legacy":
        pieces += _pickles(files[0], min((span.start for span in spans), default=files[0].size))
    rows = list(_covering(files[0], pieces))
    facts = (*_alignment([row for row in rows if row.name in ckpt]), *said)
    return ArchiveReport(ckpt.name, f"one file ({form.title if form else ckpt.format})", tuple(rows), facts, files[0].size)


# zip archives


def _records(index: ZipIndex, meter: Meter | None) -> Iterator[ArchiveRow]:
    stated = any(record.crc for record in index.records.values())
    for name, record in index.records.items():
        offset, note, fault = None, "", ""
        try:
            storage = index.storage(name)
            offset = (storage if isinstance(storage, Span) else storage.span).start
            if name.endswith(".pkl"):
                head = read_span(storage, 0, 2)
                note = f"pickle, protocol {head[1]}" if head[:1] == b"\x80" and len(head) > 1 else "pickle, protocol 0 or 1"
            if meter is not None:
                if (found := checksum(storage)) != record.crc and stated:
                    fault = f"its bytes have the CRC {found:08x}"
                meter.advance(record.packed)
        except FormatError as error:
            fault = error.message
        packing = {0: "stored", 8: "deflated"}.get(record.method, f"method {record.method}")
        yield ArchiveRow(name, offset, record.packed, record.size, packing, f"{record.crc:08x}" * stated, note, fault)
    between, rest = index.directory - sum(record.packed for record in index.records.values()), index.file.size - index.directory
    yield ArchiveRow("headers and padding before the records", None, between, between)
    yield ArchiveRow("directory and end record", index.directory, rest, rest)


def _zip_facts(index: ZipIndex, rows: list[ArchiveRow]) -> Iterator[tuple[str, str]]:
    folders = {name.partition("/")[0] for name in index.records if "/" in name}
    yield "root folder", folders.pop() if len(folders) == 1 else f"none, but {len(folders)} of them" if folders else "none"
    for name, record in index.records.items():
        if name.rpartition("/")[2] in _SAYINGS and record.size <= 64:
            try:
                yield name.partition("/")[2], read_span(index.storage(name)).decode("utf-8", "replace").strip()
            except FormatError as error:
                yield name, error.message
    yield from _alignment([row for row in rows if "/data/" in row.name])
    if not any(record.crc for record in index.records.values()):
        yield "CRC-32", "none is stated (torch writes none with compute_crc32 off)"


# every other container


def _pickles(file: FileRef, first: int) -> Iterator[tuple[str, Span, str]]:
    data, at = Span(file, 0, file.size).read(0, first if first <= _MAX_HEAD else 0), 0
    for name in _LEGACY if data else ():
        machine = Machine(data, persistent=lambda pid: pid, construct=lambda node: node, start=at)
        machine.run()
        yield name, Span(file, at, machine.end - at), f"pickle, protocol {machine.proto}"
        at = machine.end


def _covering(file: FileRef, pieces: Iterable[tuple[str, Span, str]]) -> Iterator[ArchiveRow]:
    """The pieces in the order of their bytes, with what nothing names; bytes that two of them share count for the first."""
    ordered = sorted(pieces, key=lambda piece: (piece[1].start, -piece[1].nbytes))
    at = between = 0
    for i, (name, span, note) in enumerate(ordered):
        gap = max(0, span.start - at)
        if gap and not i:
            yield ArchiveRow("header", 0, gap, gap)
        between += gap if i else 0
        own = max(0, span.start + span.nbytes - max(at, span.start))
        yield ArchiveRow(name, span.start, own, own, note=note)
        at = max(at, span.start + span.nbytes)
    if between:
        yield ArchiveRow("counts, framing and padding between them", None, between, between)
    if at < file.size:
        yield ArchiveRow("what follows" if ordered else "everything", at, file.size - at, file.size - at)


def _alignment(rows: list[ArchiveRow]) -> Iterator[tuple[str, str]]:
    if aligned := [row.alignment for row in rows if row.alignment and row.nbytes]:
        yield "storages begin at multiples of", str(min(aligned))
