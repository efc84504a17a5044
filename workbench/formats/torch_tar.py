"""torch's oldest container (0.1 and before): a tar archive of four members, listed without unpacking it.

    sys_info    a pickled dict; never used
    pickle      the object, a pickle; its persistent ids are the object ids, as text, of tensors and storages,
                or (class, file, source text)
    tensors     a pickled count; for each, pickled (id, id of its storage or None, class) · int32 dimensions · 4 bytes unused ·
                int64 sizes · int64 strides · int64 offset
    storages    a pickled count; for each, pickled (id, place, class) · int64 elements · the elements;
                then a pickled list of parts: (id, id of the storage it is a part of, offset, elements)

    tar header  512 bytes: 0 name · 124 size, octal or base-256 · 148 checksum · 156 kind; the data follow, padded to 512

Numbers and elements are little-endian. Only regular members and extended headers that change nothing but dates and owners
are read; two members of one name are ambiguous, and links are refused.

Source: torch 2.13 torch/serialization.py (_legacy_load.legacy_load); POSIX.1-2008 pax, "ustar Interchange Format".
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import Any

from workbench.checkpoint import Checkpoint, Finding
from workbench.errors import CorruptFileError, FormatError, UnknownFormatError
from workbench.files import FileRef, Span
from workbench.formats.known_globals import danger_findings
from workbench.formats.pickle_blobs import MAX_OPCODES, Pages, kept
from workbench.formats.pickle_vm import Machine
from workbench.formats.torch_objects import Bare, TorchObjects, storage_dtype, trailing_finding, unpickle
from workbench.tree import Global, Inert

_MEMBERS = ("pickle", "storages", "tensors")
_MOST_MEMBERS = 16
_BLOCK = 512
_OCTAL = re.compile(rb"[0-7]+")
_RENAMES = re.compile(rb"(?m)(?:^|[0-9] )(?:path|size|linkpath|GNU\.sparse[^=]*)=")


def open_file(file: FileRef) -> Checkpoint:
    """List an old torch tar.

    Raises:
        UnknownFormatError: an archive of something else. CorruptFileError: cut, damaged or ambiguous.
    Cost: the headers, and the three members without the elements.
    """
    found = members(file)
    if not found.keys() & {"sys_info", *_MEMBERS}:
        raise UnknownFormatError("this is a tar archive without a checkpoint in it", path=file.url, hint="unpack it and open what it holds")
    if missing := [name for name in _MEMBERS if name not in found]:
        raise CorruptFileError(f"the archive lacks its member {missing[0]!r}: it is cut, or no checkpoint", path=file.url)
    if found["pickle"].nbytes > MAX_OPCODES:
        raise CorruptFileError(f"a pickle of {found['pickle'].nbytes} bytes", path=file.url, record="pickle")
    objects = _TarObjects()
    with file.open() as source:
        objects.read_storages(_Stream(source.pread, found["storages"], "storages"))
        objects.read_tensors(_Stream(source.pread, found["tensors"], "tensors"))
    data = found["pickle"].read()
    tree, machine, findings = unpickle(data, objects, file=file, format="torch-tar", record="pickle")
    if machine.end != len(data):
        findings = (*findings, trailing_finding(len(data) - machine.end, "pickle"))
    return Checkpoint(tree, name=file.name, format="torch-tar", findings=findings, source=file)


def members(file: FileRef) -> dict[str, Span]:
    """The first members of a tar archive, by name.

    Raises:
        CorruptFileError: a header is damaged, two members have one name, or one is no regular file.
    """
    found: dict[str, Span] = {}
    at = 0
    with file.open() as source:
        while len(found) < _MOST_MEMBERS and (head := source.pread(at, _BLOCK)).strip(b"\0"):
            name, size, kind = _header(head, at, file)
            span = Span(file, at + _BLOCK, size)
            at = span.start + -(-size // _BLOCK) * _BLOCK
            if span.start + size > file.size:
                trouble = f"the member ends at byte {span.start + size} and the file at {file.size}: the file is cut"
            elif kind == b"x" and size <= MAX_OPCODES and not _RENAMES.search(source.pread(span.start, size)):
                continue
            elif kind not in (b"0", b"\0"):
                trouble = "the member is a link, no regular file, or renamed by an extended header, and is not followed"
            elif name in found:
                trouble = "two members have the same name, and which one counts is ambiguous"
            else:
                found[name] = span
                continue
            raise CorruptFileError(trouble, path=file.url, record=name)
    return found


def _header(head: bytes, at: int, file: FileRef) -> tuple[str, int, bytes]:
    """Name, size and kind of the member whose header stands at byte `at`."""
    told = head[148:156].strip(b" \0")
    size = head[124:136].strip(b" \0")
    if len(head) < _BLOCK or not _OCTAL.fullmatch(told) or int(told, 8) != sum(head[:148]) + 8 * 32 + sum(head[156:]):
        raise CorruptFileError("no member begins where the one before ends: the archive is cut or damaged", path=file.url, offset=at)
    if head[124] != 0x80 and not _OCTAL.fullmatch(size):
        raise CorruptFileError("a member's size is no number", path=file.url, offset=at + 124)
    nbytes = int.from_bytes(head[125:136], "big") if head[124] == 0x80 else int(size, 8)
    prefix = head[345:500].partition(b"\0")[0] + b"/" if head[257:262] == b"ustar" and head[345] else b""
    return (prefix + head[:100].partition(b"\0")[0]).decode("utf-8", "backslashreplace"), nbytes, head[156:157]


class _Stream:
    """One member, read in order: pickles, numbers, and elements that are stepped over."""

    def __init__(self, pread: Callable[[int, int], bytes], span: Span, name: str) -> None:
        self._pages: Any = Pages(pread, span.start + span.nbytes)
        self._span, self._name, self._at = span, name, span.start
        self.findings: list[Finding] = []

    def pickle(self) -> Any:
        made: list[Inert] = []
        machine = Machine(self._pages, persistent=lambda pid: pid, construct=kept(made), start=self._at)
        try:
            value = machine.run()
        except FormatError as error:
            error.where["record"] = self._name
            raise
        finally:
            self.findings += danger_findings(machine, made)
        self._at = machine.end
        return value

    def count(self) -> int:
        """How many things follow; each takes a pickle at least."""
        value = self.pickle()
        if type(value) is not int or not 0 <= value <= (self._span.start + self._span.nbytes - self._at) // 4:
            raise CorruptFileError(f"no count, or one of more {self._name} than fit the member", record=self._name, offset=self._at)
        return value

    def three(self) -> tuple[Any, Any, Any]:
        value = self.pickle()
        if type(value) is not tuple or len(value) != 3:
            raise CorruptFileError(f"three things should describe each of the {self._name}", record=self._name, offset=self._at)
        return value

    def numbers(self, layout: str) -> tuple[int, ...]:
        return struct.unpack(layout, self.skip(struct.calcsize(layout), self._pages))

    def skip(self, nbytes: int, pages: Any = None) -> Any:
        """The next bytes as a span, or what they are where `pages` is given."""
        start, end = self._at, self._span.start + self._span.nbytes
        if not 0 <= nbytes <= end - start:
            raise CorruptFileError(f"{nbytes} bytes are said to follow and {end - start} are left", record=self._name, offset=start)
        self._at += nbytes
        return Span(self._span.file, start, nbytes) if pages is None else pages[start : start + nbytes]

    def finish(self) -> list[Finding]:
        """What is to be said of the member once it was read."""
        rest = self._span.start + self._span.nbytes - self._at
        return [*self.findings, trailing_finding(rest, self._name)] if rest else self.findings


class _TarObjects(TorchObjects):
    """The tensors and storages of a tar, by their object ids."""

    def __init__(self) -> None:
        self._spans: dict[str, Span] = {}
        super().__init__(self._spans.__getitem__)
        self._pids: dict[int, tuple[Any, ...]] = {}
        self._known: dict[int, Any] = {}

    def persistent(self, pid: Any) -> Any:
        if type(pid) is tuple and len(pid) == 3:
            return pid[0]  # a class, with its source
        if type(pid) is not str or not re.fullmatch("-?[0-9]{1,20}", pid) or int(pid) not in self._known:
            raise CorruptFileError("a persistent id is not that of a tensor or storage of this archive")
        return self._known[int(pid)]

    def _learn(self, key: Any, value: Any) -> None:
        if type(key) is not int or key in self._known:
            raise CorruptFileError(f"the object id {key!r} is no number, or is given twice")
        self._known[key] = value

    def read_storages(self, stream: _Stream) -> None:
        for _ in range(stream.count()):
            key, place, cls = stream.three()
            (numel,) = stream.numbers("<q")
            dtype = storage_dtype(cls) if isinstance(cls, Global) else None
            self._spans[str(key)] = stream.skip(numel * (dtype.itemsize if dtype else 1))
            pid = ("storage", cls, str(key), place, numel)
            self._learn(key, super().persistent(pid))
            self._pids[key] = pid
        views = stream.pickle()
        for view in views if isinstance(views, list) else ():
            if type(view) is not tuple or len(view) != 4 or type(view[1]) is not int or view[1] not in self._pids:
                raise CorruptFileError("a part of a storage is not told by two ids, an offset and a length", record="storages")
            self._learn(view[0], super().persistent((*self._pids[view[1]], (view[0], *view[2:]))))
        self.troubles += stream.finish()

    def read_tensors(self, stream: _Stream) -> None:
        for _ in range(stream.count()):
            key, storage, cls = stream.three()
            (ndim,) = stream.numbers("<i4x")
            if not 0 <= ndim <= 64:
                raise CorruptFileError(f"a tensor of {ndim} dimensions; torch has 64 at most", record="tensors")
            *lengths, offset = stream.numbers(f"<{2 * ndim + 1}q")
            if storage is None and isinstance(cls, Global):  # never given room: an empty tensor
                self._spans[f"of {key}"] = stream.skip(0)
                bare = super().persistent(("storage", Global("torch", cls.name.replace("Tensor", "Storage")), f"of {key}", "cpu", 0))
            elif type(storage) is int and isinstance(self._known.get(storage), Bare):
                bare = self._known[storage]
            else:
                raise CorruptFileError("a tensor lies on a storage that the archive does not hold", record="tensors")
            self._learn(key, self.tensor(bare, offset, tuple(lengths[:ndim]), tuple(lengths[ndim:]), None))
        self.troubles += stream.finish()
