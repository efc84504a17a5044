"""`wb.scan`: what loading a file would import and call, found without doing so.

Pickles are found by content, never by extension, flags, checksum or method: at the start of a file, one behind another, as any
record of any archive, as members of an old tar, behind the header of an object array, and inside byte strings of other
pickles. Whatever a format makes of a file, its first bytes are also run as a pickle, for that is what pickle.load would do.
A pickle that breaks off has made the calls before the break; a file that cannot be read is a danger and not a clean one.

Sources: torch 2.13 torch/serialization.py (_load, _legacy_load with the tar), PKWARE APPNOTE 6.3.10, POSIX ustar, NumPy NEP 1 (.npy).
"""

from __future__ import annotations

import os
import re
import struct
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import islice, pairwise
from typing import Any

from workbench.analyses.pickle_runs import FIRST_READ, acts_at_all
from workbench.analyses.scan_marks import MARKS, NUMBERS, Outline, alike_one, climbs, inflated, is_marked, is_numbers, is_raw
from workbench.analyses.scan_pickles import PickleScan, Piece
from workbench.analyses.scan_report import STRAY, Place, ScanReport, loading_lines
from workbench.checkpoint import Checkpoint, Finding
from workbench.errors import (
    CorruptFileError,
    FormatError,
    MissingFileError,
    SelectionError,
    UnknownFormatError,
    UnsupportedError,
    WorkbenchError,
    located,
)
from workbench.files import FileRef, Folder, Span, checksum, place, read_span
from workbench.formats import ARCHIVES, FILES, FOLDERS, collector_paused, dcp_indexes, is_tar, open_file, open_folder
from workbench.formats.dcp_folder import note_objects, watched_objects
from workbench.formats.numpy_file import says_objects
from workbench.formats.pickle_blobs import payload_span
from workbench.formats.torch_archive import pickle_roots
from workbench.formats.torch_objects import watched_runs
from workbench.formats.torch_tar import GAPS, walk
from workbench.formats.torchscript_file import open_archive as open_script
from workbench.formats.zip_index import ZipIndex, read_record, read_zip_index
from workbench.tensors import parts

_HEAD = 4096  # which is_tar wants to see
_MOST_READ = 128 << 20  # bytes of packed records
_FOLDER = 10  # as much as for one file is done for a folder, so many times
_EACH = 60  # what each pickle of strangers counts for among the things that are built for one file
_MOST_ENDS = 100_000  # marks of an archive's end that are looked at
_ARRAY_HEAD, _SPELLED, _MOST_RECORDS = (
    1024,
    1 << 20,
    3000,
)  # bytes of an array's header, at most; records of one archive that are no tensors
_MOST_UNLIKE = 2000  # archives behind each other, as in a .distcp, of which none is laid out as another
_MOST_OUTLINES, _MOST_CODE = (
    8,
    5 << 20,
)  # layouts of archives that others are compared with; bytes of code and pickles of programs that are no file's whole
_MOST_PICKLES, _MOST_STRINGS, _MOST_NAMES, _MOST_TOLD, _MOST_DEEP, _DEPTH = 1000, 2000, 1000, 100, 1000, 8

_SAFE_FORMATS = frozenset({"safetensors", "sharded-safetensors", "gguf", "onnx", "npy", "npz"})
_OWN_KINDS = frozenset({"forbidden global", "forbidden call", "data classes", "unreadable pickle"})  # findings of wb.open, made here

_CHECKPOINT = re.compile(
    r"\.(pt2?|pth|ptl|ckpt|bin|pkl|pickle|p|safetensors|gguf|onnx|np[yz]|tar|joblib|distcp)$|^(__\d+)?\.metadata$", re.I
)
_PICKLE = re.compile(r"\.(pkl|pickle|p|joblib|dill|debug_pkl)$", re.I)
_SCRIPT_PICKLES = re.compile(
    r"([^/]+/)?(data|constants|bytecode|attributes|mobile_debug_handles|traced_inputs)\.pkl|[^/]+/code/.*\.debug_pkl"
)
_CODE = re.compile(r"^[^/]+/code/.*\.(?:py|debug_pkl)$")  # two small records for each class of a program
_STORAGE = re.compile(r"[^/\\:.][^/\\:]*/data/\d+")  # such as are neither code nor climb
_NAMING, _LAST = re.compile(rb"[ci\x82-\x84\x93]"), 1 << 20  # opcodes of globals, classes and extensions; what is read of the rest at once
_FIRST = frozenset(b"(])}NIJKLMFGSTUVXBCPc\x80\x82\x83\x84\x88\x89\x8a\x8b\x8c\x8d\x8e\x8f\x95\x96")  # need no value before them
_PROGRAM = re.compile(r"\.(pyc?|pyd|so|dll|dylib|exe|com|sh|bat|cmd|ps1|js|vbs|jar|scr)$", re.I)
_PROGRAM_MARKS = (b"\x7fELF", b"MZ", b"#!", b"\xfe\xed\xfa", b"\xce\xfa\xed\xfe", b"\xcf\xfa\xed\xfe", b"\xca\xfe\xba\xbe")


def scan(source: Any, *, crc: bool = False, storage_options: Mapping[str, Any] | None = None) -> ScanReport:
    """Find everything that loading a file would run, and everything in it that should not be there. Nothing is run.

    Args:
        source: a path or address of a file or folder (of a folder, the files in it and not those below), or a Checkpoint opened from one.
        crc: read every record of an archive too, and compare its checksum.
        storage_options: as for `wb.open`.
    Returns:
        A ScanReport, false where something is dangerous, unknown or not readable.
    Raises:
        MissingFileError: there is no such file. SelectionError: the checkpoint comes from no file.
    Cost: the pickles and every local header of an archive; no tensor data without `crc`.
    """
    ckpt = source if isinstance(source, Checkpoint) else None
    known: FileRef | Folder | None = ckpt.source if ckpt is not None else None
    if ckpt is not None and known is None:
        raise SelectionError("this checkpoint comes from no file", hint="save it first, or scan the file that it was made from")
    if isinstance(known, FileRef) and ckpt is not None and ckpt.format == "dcp":  # it is only the index
        known = known.folder
    address = known.url if known is not None else os.fsdecode(source)
    job = _Scan(crc)
    try:
        found = known or place(address, storage_options)
        with collector_paused():
            job.folder(found) if isinstance(found, Folder) else job.file(found, ckpt)
    except FormatError as error:
        job.refuse(error, Place(os.path.basename(address)))
    report = ScanReport(
        address, "/".join(dict.fromkeys(job.formats)) or "unknown", job.tensors, job.told(), tuple(job.uses), tuple(job.pickles)
    )
    if report.ok and job.loads and report.needs_allowing and "://" not in address:
        object.__setattr__(report, "snippet", loading_lines(address, report.needs_allowing, job.element_types))
    return report


class _Scan(PickleScan):
    """One scan of files, folders and archives."""

    def __init__(self, crc: bool) -> None:
        super().__init__()
        self.crc = crc
        self.deep, self.refused_deep = 0, False  # files inside files inside the file; a bound that was told
        self.inflated = 0  # bytes of packed records that were read
        self.items: set[tuple[str, int, int]] = set()  # archives behind each other that were looked into: file, start and bytes
        self.ends = 0  # marks of an archive's end that ended none
        self.program: FileRef | None = None  # the file that open lists as one, and so judged its code
        self.code = 0  # bytes of programs inside of files
        self.before = {True: (0, 0), False: (0, 0)}  # what of that the files before this one of a folder count for

    # files and folders

    def folder(self, folder: Folder) -> None:
        names, here = folder.names(), Place(os.path.basename(folder.url))
        indexes = dcp_indexes(names)
        with watched_objects() as objects:
            if is_listed := any(form.claims(names) for form in FOLDERS):
                self.open(lambda: open_folder(folder), here)
            for name in indexes[is_listed:]:  # which torch reads where it fails to read the first
                try:
                    note_objects(folder, name)
                    self.formats.append("dcp")
                except WorkbenchError as error:
                    self.refuse(error, Place(name))
        is_safetensors = next(form for form in FILES if form.name == "safetensors")
        ends = dict(sorted((span.file.url, span.start + span.nbytes) for span in objects))  # of the last in each file
        parts = {name for name in names if name in indexes or (indexes and name.endswith(".distcp"))}
        for name in sorted(names, key=lambda name: (name not in parts, name not in indexes)):
            must = bool(_CHECKPOINT.search(name))
            try:
                file = folder.file(name)
            except (UnknownFormatError, MissingFileError):
                self.tell("not scanned", "info", f"{name} is no file, and what is below it was not looked into", Place(name))
            except FormatError as error:
                self.tell(STRAY, "danger" if must else "warning", f"{name} was not looked into: {error.message}", Place(name))
            else:
                if name in parts:
                    with file.kept_open():
                        whole = Piece(Span(file, 0, file.size), name)
                        end = ends.get(file.url, 0)
                        if end and is_safetensors.claims(whole.span.read(end, end + 16)):  # all chunks, behind the objects
                            self.content(whole.part(end, file.size - end))
                            whole = whole.part(0, end)
                        self.content(whole, sure=name in indexes)
                else:
                    self.file(file, None, must=must)
        self.objects(objects, here)
        if not self.formats:
            self.refuse(UnknownFormatError("no file in this folder is a checkpoint"), here)

    def objects(self, spans: list[Span], here: Place) -> None:
        """What the index of a folder calls objects, wherever it lies, but for the archives that were looked into already."""
        room = 2 * sum({span.file.url: span.file.size for span in spans}.values())
        left = (span for span in dict.fromkeys(spans) if (span.file.url, span.start, span.nbytes) not in self.items)
        for count, span in enumerate(left):
            room -= span.nbytes
            if count >= _MOST_UNLIKE or room < 0:
                self.tell("not scanned", "danger", "more objects, or larger ones, lie where the index says than were looked into", here)
                return
            self.content(Piece(span, span.file.name, f"object at byte {span.start:,}"), sure=True)

    def file(self, file: FileRef, ckpt: Checkpoint | None, *, must: bool = True) -> None:
        """One file; `must` says that it is a checkpoint by its name, and a danger where it is none."""
        here, seen = Place(file.name), len(self.pickles)
        for sure, part in ((True, _FOLDER), (False, 1)):
            pairs = zip(self.before[sure], self.spent[sure], strict=True)
            ran, built = (before + max(0, now - before) // part for before, now in pairs)
            self.before[sure] = self.spent[sure] = (ran, built)
        ckpt = self.open(lambda: ckpt or open_file(file), here, must)
        form = "" if ckpt is None else ckpt.format
        self.program = file if form == "torchscript" else None
        self.content(Piece(Span(file, 0, file.size), file.name), sure=must and form in ("", "pickle", "torch-legacy"))
        if form in _SAFE_FORMATS and any(not found.place.record for found in self.pickles[seen:]):
            self.tell("polyglot", "danger", f"{file.name} is {form} and a pickle as well: what it is depends on who reads it", here)
        if form and Span(file, 0, file.size).read(4, 8) == b"PTMF":  # where torch.jit.load looks, whatever stands before
            self.tell("polyglot", "danger", f"{file.name} is {form}, and a TorchScript program in flatbuffer form to torch.jit.load", here)
        if ckpt is not None and (form == "onnx" or ckpt.format.startswith("sharded")):  # their values lie in further files
            spans = (getattr(leaf.source, "storage", None) for tensor in ckpt.values() for leaf in parts(tensor))
            for other in {storage.file for storage in spans if isinstance(storage, Span)} - {file}:
                self.content(Piece(Span(other, 0, other.size), other.name))

    def open(self, opener: Callable[[], Checkpoint], here: Place, must: bool = True) -> Checkpoint | None:
        """List it as wb.open does, for what that finds besides pickles."""
        ckpt: Checkpoint | None = None
        listed: Checkpoint | None = None
        try:
            with located(), watched_runs() as runs:
                listed = ckpt = opener()
            self.formats.append(ckpt.format)
        except WorkbenchError as error:
            listed = getattr(error, "partial", None)
            if must or not isinstance(error, UnknownFormatError):
                self.refuse(error, here)
        if listed is not None:
            self.tensors += len(listed)
            for f in listed.findings:
                found = Finding(f.kind, f.severity, f.message, {**f.where, **here.to_dict()}, f.hint)
                (self.also_found if f.kind in _OWN_KINDS else self.findings).append(found)
        self.known, self.read = defaultdict(list), set()
        for run in runs:
            if run.machine.is_whole:
                size = run.machine.base + run.machine.size
                self.known[bytes(run.machine.data) if size == len(run.machine.data) <= FIRST_READ else size].append(run)
        self.loads &= ckpt is not None and ckpt.format in ("torch-zip", "torch-legacy")
        return ckpt

    # what holds pickles

    def content(self, piece: Piece, *, sure: bool = False) -> None:
        """The archives that end it, and what stands before them. `sure`: it is a pickle, and one that breaks off is told."""
        span = piece.span
        self.deep += piece.depth > 2
        if self.deep > _MOST_DEEP:
            if not self.refused_deep:
                self.tell("not scanned", "danger", f"more than {_MOST_DEEP} files lie inside files inside the file", piece.place())
            self.refused_deep = True
            return
        if piece.depth > _DEPTH:
            self.tell("not scanned", "danger", f"{piece.name} lies {_DEPTH} files deep and was not looked into", piece.place())
            return
        cuts, head, looked = [span.nbytes], span.read(0, _HEAD), self.ends
        may_end = span.nbytes > _HEAD or b"PK\x05\x06" in head
        most = 64 + span.nbytes // 1024  # of the many that a .distcp file holds, none is smaller
        while may_end and cuts[-1] and len(cuts) < most and (start := self.archive_start(span, cuts[-1])) is not None:
            cuts.append(start)
        if len(cuts) == most or looked < _MOST_ENDS <= self.ends:
            self.tell("not scanned", "danger", f"{piece.name} has more ends of zip archives than were looked into", piece.place())
        front = cuts[-1]
        if not front and len(cuts) > 1 and not head.startswith(b"PK\x03\x04"):  # its places count from the start of what stands before it
            front, what = span.nbytes, "a zip archive that stands behind something else: what it is depends on who reads it"
            self.tell("polyglot", "danger", f"{piece.name} is {what}", piece.place())
        elif (front and len(cuts) > 1) or (len(cuts) > 2 and not piece.file.endswith(".distcp")):
            what = f"{len(cuts) - 1} zip archives behind {front} bytes of something else: what it is depends on who reads it"
            self.tell("polyglot", "danger", f"{piece.name} is {what}", piece.place())
        outlines, plain, unlike = list[Outline](), set[tuple[bool, bytes]](), 0  # of archives without findings; pickles without any
        for start, end in pairwise(reversed(cuts)):
            part = piece.part(start, end - start)
            self.items.add((part.span.file.url, part.span.start, part.span.nbytes))
            told = len(self.findings)
            if (found := alike_one(part.span, outlines)) is not None:
                for held, is_pickle in found:
                    data = (is_pickle, held.read() if held.nbytes <= _HEAD else b"")
                    if not data[1] or data not in plain:
                        self.payload(
                            piece.inner(held, f"item at {start:,} › {'data.pkl' if is_pickle else 'values'}"), is_pickle, expected=is_pickle
                        )
                        plain |= {data} if len(self.findings) == told and len(plain) < _MOST_UNLIKE else set()
                continue
            if (unlike := unlike + 1) > _MOST_UNLIKE:
                what = f"{piece.name} holds more kinds of archives than were looked into"
                self.tell("not scanned", "danger", what, piece.place())
                break
            if start and part.span.read(0, 4) != b"PK\3\4":
                what = f"a zip archive at {start:,} that stands behind something else: what it is depends on who reads it"
                self.tell("polyglot", "danger", f"{piece.name} holds {what}", piece.place(start))
                self.run_all(part, sure=True)
            index = self.archive(part if len(cuts) == 2 else piece.inner(part.span, f"item at {start:,}"))
            if index is None or len(cuts) == 2 or len(self.findings) > told or len(outlines) == _MOST_OUTLINES or self.crc:
                continue
            outline = Outline.of(index, part.span)
            outlines += [outline] if outline is not None and outline not in outlines else []
        rest = piece.part(0, front)
        if len(cuts) == 1 and head.startswith(b"PK\x03\x04"):
            self.refuse(CorruptFileError("it begins as a zip archive and has no end record"), piece.place())
            self.carve(rest)
        elif front:
            if sure or head[0] in _FIRST:
                self.run_all(rest, sure=sure)
            if is_tar(head):
                self.tar(rest, head)
            elif head.startswith(b"\x93NUMPY"):  # 1 byte version, 1 byte, 2 bytes length (4 from version 2 on), the header, the values
                length = 10 + int.from_bytes(head[8:10], "little") if head[6:7] == b"\1" else 12 + int.from_bytes(head[8:12], "little")
                header = span.read(10 if head[6:7] == b"\1" else 12, min(length, _SPELLED)) if length <= front else b""
                if header and not NUMBERS.fullmatch(header):  # records of numbers may be a pickle by chance, and are told if they act
                    self.run_all(piece.inner(span.part(length, front - length), "objects"), sure=says_objects(header))

    def is_end(self, span: Span, tail: bytes, base: int, at: int) -> bool:
        """Whether some reader takes this mark for an archive's end: its comment ends there, or its directory lies where it is said to."""
        if at + 22 > len(tail):
            return False
        size, offset, comment = struct.unpack_from("<IIH", tail, at + 12)
        if at + 22 + comment == len(tail) or span.read(max(0, base + at - 20), base + at)[:4] == b"PK\x06\x07":  # a ZIP64 locator
            return True
        return any(place >= 0 and span.read(place, place + 4) == b"PK\x01\x02" for place in (base + at - size, offset) if size)

    def archive_start(self, span: Span, end: int) -> int | None:
        """Where the zip archive begins that ends at `end`; None where none does."""
        for reach in (22, 65_557):
            base = max(0, end - reach)
            tail = span.read(base, end)
            at = tail.rfind(b"PK\x05\x06")
            while at >= 0 and not self.is_end(span, tail, base, at):
                self.ends += 1
                at = tail.rfind(b"PK\x05\x06", 0, at) if self.ends < _MOST_ENDS else -1
            if at >= 0:
                size, offset, place = *struct.unpack_from("<II", tail, at + 12), base + at
                record = span.read(max(0, place - 76), place)
                if record[:4] == b"PK\x06\x06" and record[56:60] == b"PK\x06\x07":
                    (size, offset), place = struct.unpack_from("<QQ", record, 40), place - 76
                return max(0, place - size - offset) if size or offset else None
        return None

    def archive(self, piece: Piece) -> ZipIndex | None:
        """Its index, if it has a sound one."""
        try:
            index = read_zip_index(piece.span.file, piece.span)
        except FormatError as error:
            self.refuse(error, piece.place())
            self.carve(piece)
            return None
        names = [name for name in index.records if not name[-1:].isdigit()] or [*index.records]  # not the storages, which are many
        kind = next((form.name for form in ARCHIVES if form.claims(names)), "")
        if len(pickle_roots(names)) > 1:
            self.tell(STRAY, "danger", f"{piece.name} holds several data.pkl, and which one counts depends on who reads it", piece.place())
        if kind == "torchscript" and (piece.record or piece.span.file != self.program):
            self.code += sum(index.records[name].size for name in names if name.endswith((".py", ".pkl")))
            if self.code > _MOST_CODE:
                self.refuse(UnsupportedError(f"programs inside of files hold more than {_MOST_CODE:,} bytes of code in all"), piece.place())
                return None
            try:
                held = (found for found in open_script(index).findings if found.severity == "danger")
                self.findings += [replace(found, where={**found.where, **piece.place().to_dict()}) for found in held]
            except FormatError as error:
                self.refuse(error, piece.place())
        whole, looked = True, 0.0
        first = {"torch-export": _HEAD, "npz": _ARRAY_HEAD}.get(kind, 16)
        with piece.span.file.kept_open() as source:
            may_act = kind == "torch-export"  # torch may unpickle what a .pt2 holds, as its config says
            busy = {*MARKS, *(bytes([code]) for code in _FIRST if may_act)}
            heads = () if self.crc else index.first_bytes(source.pread)
            quiet = {
                name for name, first in heads if first not in busy and (_STORAGE.fullmatch(name) or (is_raw(name) and not climbs(name)))
            }
            for name in (name for name in index.records if name not in quiet):
                try:
                    record = index.records[name]
                    storage = index.storage(name)
                    payload = storage if isinstance(storage, Span) else storage.span
                    record.prove(source.pread, payload.start)
                    payload = payload._replace(check=None)  # once is enough
                    stored = isinstance(storage, Span)
                    head = source.pread(payload.start, min(first, record.size)) if stored else read_span(storage, 0, first)
                    if self.crc and record.crc and checksum(storage) != record.crc:  # torch writes 0 where it was told to count none
                        where = piece.inner(payload, name).place()
                        self.tell("checksum", "danger", f"{where.name} does not have the checksum that the archive states", where)
                    if kind == "npz" and is_numbers(head):
                        continue
                    if looked >= _MOST_RECORDS:
                        told = f"{piece.name} holds more records that are no tensors than were looked into"
                        self.tell("not scanned", "danger", told, piece.place())
                        break
                    may_run = is_marked(head) or (may_act and head[:1] in busy and acts_at_all(head))
                    looked += 0.25 if kind == "torchscript" and _CODE.search(name) else may_run or not is_raw(name)
                    if may_run or not is_raw(name) or climbs(name):
                        self.record(piece, index, name, head, kind, payload if stored else None)
                except FormatError as error:
                    self.refuse(error, piece.inner(piece.span, name).place()._replace(position=None))
                    whole = False
        if not whole:
            self.carve(piece)
        return index

    def record(self, piece: Piece, index: ZipIndex, name: str, head: bytes, kind: str, stored: Span | None) -> None:
        """One record, whose bytes are `stored` where they lie as they are."""
        is_script, has_values = kind == "torchscript", is_raw(name)
        self.inflated += 0 if stored else index.records[name].size
        found = stored or payload_span(index.file, read_record(index, name, max(0, 2 * _MOST_READ - self.inflated)))
        assert found is not None
        inner = piece.inner(found, name, is_script)
        if climbs(name):
            self.tell(STRAY, "danger", f"{inner.name} would be unpacked outside the archive's own folder", inner.place())
        is_code = is_script and name.partition("/")[2].startswith("code/")
        if not has_values and not is_code and (head.startswith(_PROGRAM_MARKS) or _PROGRAM.search(name)):
            is_text = is_script and name.partition("/")[2].startswith("extra/") and not head.startswith(_PROGRAM_MARKS)  # the author's own
            told = f"{inner.name} is a program or script, and no part of a checkpoint"
            self.tell(STRAY, "danger" if kind and not is_text else "warning", told, inner.place())
        expected = kind == "torch-export" or (name.endswith(".npy" if kind == "npz" else "data.pkl") and name.count("/") < 2)
        expected |= is_script and _SCRIPT_PICKLES.fullmatch(name) is not None
        self.payload(inner, not is_script and _PICKLE.search(name) is not None, has_values=has_values, expected=expected)

    def payload(self, inner: Piece, sure: bool, *, has_values: bool = True, expected: bool = False) -> None:
        """The bytes of a record, and whether a pickle stands among them unasked."""
        seen = len(self.pickles)
        self.content(inner, sure=sure)
        if len(self.pickles) > seen and not expected:
            told = f"{inner.name} holds a pickle that no part of the container refers to"
            self.tell(STRAY, "warning" if has_values else "danger", told, inner.place())

    def carve(self, piece: Piece) -> None:
        """The records of an archive without a sound index, by their local headers, so that what they would do is named."""
        data = piece.span.read(0, _MOST_READ // 4)
        starts = [found.start() for found in islice(re.finditer(rb"PK\x03\x04.{26}", data, re.DOTALL), _MOST_NAMES)]
        for at, end in pairwise([*starts, len(data)]):
            method, name_length, extra_length = struct.unpack_from("<H16xHH", data, at + 8)
            name = data[at + 30 : at + 30 + name_length].decode("utf-8", "replace")
            body = data[at + 30 + name_length + extra_length : end]
            body = inflated(body, _MOST_READ - self.inflated) if method == 8 else body
            self.inflated += len(body) if method == 8 else 0
            found = payload_span(piece.span.file, body)
            if found is not None and not is_raw(name):
                self.content(piece.inner(found, name), sure=name.endswith("data.pkl"))

    def tar(self, piece: Piece, head: bytes) -> None:
        """The members of an old torch file: `storages` and `tensors` are pickles with other bytes between."""
        if other := next((form.title for form in FILES if form.name != "torch-tar" and form.claims(head)), None):
            what = f"a tar archive to torch.load and begins as {other}: what it is depends on who reads it"
            self.tell("polyglot", "danger", f"{piece.name} is {what}", piece.place())
        try:
            for name, span in walk(piece.span):
                member = piece.inner(span, name)
                if name in GAPS:
                    with span.file.kept_open():
                        self.run_all(member, sure=True, gap=GAPS[name])
                else:
                    self.content(member, sure=name == "pickle")
                if name not in ("pickle", "storages", "tensors", "sys_info"):
                    self.tell(STRAY, "danger", f"{member.name} is no member of a torch file", member.place())
        except FormatError as error:
            self.refuse(error, piece.place())
