"""torch's oldest container (0.1 and before): a tar archive of four members, listed without unpacking it.

    sys_info    a pickled dict; never used
    pickle      the object, a pickle; its persistent ids are the object ids, as text, of tensors and storages,
                or (class, file, source text)
    tensors     a pickled count; for each, pickled (id, id of its storage or None, class) · int32 dimensions · 4 bytes unused ·
                int64 sizes · int64 strides · int64 offset
    storages    a pickled count; for each, pickled (id, place, class) · int64 elements · the elements;
                then a pickled list of parts: (id, id of the storage it is a part of, offset, elements)

    tar header  512 bytes: 0 name · 124 size, octal or base-256 · 148 checksum · 156 kind; the data follow, padded to 512

Numbers and elements are little-endian. What a header says is decided by Python's tarfile, with which torch reads them. Only regular
members and extended headers that change nothing but dates and owners are read; two members of one name are ambiguous, links are
refused, and so is a file that begins as another format too, and an archive of more headers than torch ever wrote.

Source: torch 2.13 torch/serialization.py (_legacy_load.legacy_load); Python 3.11 Lib/tarfile.py (TarInfo.frombuf, nti, calc_chksums);
POSIX.1-2008 pax, "ustar Interchange Format".
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from workbench.checkpoint import Checkpoint, Finding
from workbench.dtypes import DTYPES
from workbench.errors import CorruptFileError, FormatError, UnknownFormatError, UnsupportedError
from workbench.files import FileRef, Span
from workbench.formats import FILES
from workbench.formats.known_globals import ALL_STORAGE_DTYPES, danger_findings, judge
from workbench.formats.pickle_blobs import MAX_OPCODES, Pages, PayloadMachine, kept
from workbench.formats.torch_objects import Bare, TorchObjects, storage_dtype, trailing_finding, unpickle
from workbench.formats.torch_template import number
from workbench.tree import Global, Inert

if TYPE_CHECKING:
    from tarfile import TarInfo

_MEMBERS = ("pickle", "storages", "tensors")
_MOST_HEADERS = 32  # four members have eight at most
_MOST = 20_000  # storages, or tensors: torch wrote such files in 2016 and 2017
_BLOCK, _HEAD = 512, 4096
_REGULAR, _SPECIAL = (b"0", b"\0"), b"1234567LKSxgX"  # kinds of members: plain files, and what tarfile treats otherwise
_RENAMES = re.compile(rb"(?m)(?:^|[0-9] )(?:path|size|linkpath|GNU\.sparse[^=]*)=")


def open_file(file: FileRef) -> Checkpoint:
    """List an old torch tar.

    Raises:
        UnknownFormatError: an archive of something else. CorruptFileError: cut, damaged or ambiguous.
    Cost: the headers, and the three members without the elements.
    """
    head = Span(file, 0, file.size).read(0, _HEAD)
    if other := next((form.title for form in FILES if form.name != "torch-tar" and form.claims(head)), None):
        what = f"the file is a tar archive to torch.load and begins as {other}: what it holds depends on who reads it"
        raise CorruptFileError(what, path=file.url, hint="do not load it: no program writes such a file by accident")
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
    """The members of a tar archive, by name; raises as `walk` does, and CorruptFileError where two have one name."""
    found: dict[str, Span] = {}
    for name, span in walk(Span(file, 0, file.size)):
        if name in found:  # tarfile takes the last
            raise CorruptFileError("two members have the same name, and which one counts is ambiguous", path=file.url, record=name)
        found[name] = span
    return found


def walk(archive: Span) -> Iterator[tuple[str, Span]]:
    """Name and bytes of each member in order, whatever its name.

    Raises, behind those that are sound:
        CorruptFileError: a header is damaged, or a member no regular file. UnknownFormatError: there are more than in any checkpoint.
    """
    at, url = 0, archive.file.url
    for _ in range(_MOST_HEADERS):
        head = archive.read(at, at + _BLOCK)
        if not head.strip(b"\0"):
            return
        info = header(head)
        if info is None:
            what = "no member begins where the one before ends: the archive is cut or damaged"
            raise CorruptFileError(what, path=url, offset=archive.start + at)
        start, at = at + _BLOCK, at + _BLOCK + -(-info.size // _BLOCK) * _BLOCK
        if info.size < 0:
            trouble = f"the member has a size of {info.size} bytes"
        elif start + info.size > archive.nbytes:
            trouble = f"the member ends at byte {start + info.size} and the file at {archive.nbytes}: the file is cut"
        elif info.type in _REGULAR:
            yield info.name, archive.part(start, info.size)
            continue
        elif info.type == b"x" and info.size <= MAX_OPCODES and not _RENAMES.search(archive.read(start, start + info.size)):
            continue
        else:
            trouble = "the member is a link, no regular file, or renamed by an extended header, and is not followed"
        raise CorruptFileError(trouble, path=url, record=info.name)
    hint = "unpack it and open what it holds"
    raise UnknownFormatError(f"this is a tar archive of more than {_MOST_HEADERS} headers, which no checkpoint has", path=url, hint=hint)


def header(block: bytes) -> TarInfo | None:
    """What tarfile makes of a header: numbers in octal or base-256, either of two checksums. None where it takes it for none."""
    import tarfile

    try:
        return tarfile.TarInfo.frombuf(block[:_BLOCK], "utf-8", "backslashreplace")
    except tarfile.TarError:
        return None


def is_tar(head: bytes) -> bool:
    """Whether tarfile finds in a file with these first bytes (4,096, or the whole file) what torch would read.

    A checksum left blank is that of some arrays of numbers by chance: a header needs the magic or a torch name, or is followed by another.
    """
    info = header(head)
    if info is None:
        return False
    after = _BLOCK + -(-info.size // _BLOCK) * _BLOCK
    sure = head[257:262] == b"ustar" or info.name in _MEMBERS or info.type in _SPECIAL
    is_beyond = after + _BLOCK > len(head) >= _HEAD
    return sure or is_beyond or header(head[max(after, 0) :]) is not None


_NUMBER = rb"K.|M..|J....|\x8a(?:\x01.|\x02..|\x03...|\x04.{4}|\x05.{5}|\x06.{6}|\x07.{7}|\x08.{8})|I-?[1-9][0-9]{0,18}\n"
_THING = rb"(%b|N|(?:X....|U.)(?:-?[0-9]{1,20}|cpu|cuda:[0-9]{1,3}))(?:q.)?" % _NUMBER
_DESCRIPTION = re.compile(rb"\x80\x02(\()?%b%bc(torch(?:\.cuda)?)\n(\w{1,32})\n(?:q.)?([t\x87])(?:q.)?\." % (_THING, _THING), re.DOTALL)
LONGEST = 160  # bytes of a description


class Description(NamedTuple):
    """What a pickle holds that is spelled as those of storages and tensors are: two numbers or texts, and a plain class of torch's."""

    value: tuple[Any, Any, Global]
    nbytes: int
    offset: int  # behind the name of the class


def description(data: bytes) -> Description | None:
    """The pickle that `data` begins with, read as a whole; None where it is spelled otherwise, or names what is not plain."""
    found = _DESCRIPTION.match(data)
    if found is None or (found[1] is None) != (found[6] == b"\x87"):
        return None
    cls = _plain_class(found[4].decode(), found[5].decode())
    things = [_thing(found[2]), _thing(found[3])]
    return None if cls is None or ... in things else Description((things[0], things[1], cls), found.end(), found.end(5) + 1)


def _thing(spelled: bytes) -> Any:
    if at := {b"X": 5, b"U": 2}.get(spelled[:1]):
        return spelled[at:].decode() if int.from_bytes(spelled[1:at], "little") == len(spelled) - at else ...
    return None if spelled == b"N" else int(spelled[1:-1]) if spelled[:1] == b"I" else number(spelled)


@lru_cache(maxsize=256)
def _plain_class(module: str, name: str) -> Global | None:
    found = Global(module, name)
    return found if judge(found)[0] == "plain" else None


class _Stream:
    """One member, read in order: pickles, numbers, and elements that are stepped over."""

    def __init__(self, pread: Callable[[int, int], bytes], span: Span, name: str) -> None:
        self._file, self._name, self._at, self._end = span.file, name, span.start, span.start + span.nbytes
        self._pages = Pages(pread, self._end)
        self._spent = (0, 0)
        self._findings: list[Finding] = []

    def pickle(self) -> Any:
        if told := description(self._pages.pread(self._at, min(LONGEST, self._end - self._at))):
            self._at += told.nbytes
            return told.value
        made: list[Inert] = []
        machine = PayloadMachine(self._pages, persistent=lambda pid: pid, construct=kept(made), start=self._at)
        machine.ran, machine.built = self._spent
        try:
            value = machine.run()
        except FormatError as error:
            error.where["record"] = self._name
            raise
        finally:
            self._findings += danger_findings(machine, made)
        self._at, self._spent = machine.end, (machine.ran, machine.built)
        return value

    def count(self) -> int:
        """How many things follow; each takes a pickle at least."""
        value = self.pickle()
        if type(value) is not int or not 0 <= value <= (self._end - self._at) // 4:
            raise CorruptFileError(f"no count, or one of more {self._name} than fit the member", record=self._name, offset=self._at)
        if value > _MOST:
            raise UnsupportedError(f"{value:,} {self._name} in a file of this age; at most {_MOST:,} are read", record=self._name)
        return value

    def three(self) -> tuple[Any, Any, Any]:
        value = self.pickle()
        if type(value) is not tuple or len(value) != 3:
            raise CorruptFileError(f"three things should describe each of the {self._name}", record=self._name, offset=self._at)
        return value

    def numbers(self, layout: str) -> tuple[int, ...]:
        start = self.skip(struct.calcsize(layout)).start
        return struct.unpack(layout, self._pages.pread(start, self._at - start))

    def skip(self, nbytes: int) -> Span:
        start, left = self._at, self._end - self._at
        if not 0 <= nbytes <= left:
            raise CorruptFileError(f"{nbytes} bytes are said to follow and {left} are left", record=self._name, offset=start)
        self._at += nbytes
        return Span(self._file, start, nbytes)

    def finish(self) -> list[Finding]:
        """What is to be said of the member once it was read."""
        rest = self._end - self._at
        return [*self._findings, trailing_finding(rest, self._name)] if rest else self._findings


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

    def _new(self, key: Any) -> int:
        if type(key) is not int or key in self._known or abs(key) >> 64:
            raise CorruptFileError("an object id is no number of 64 bits, or is given twice")
        return key

    def read_storages(self, stream: _Stream) -> None:
        for _ in range(stream.count()):
            key, place, cls = stream.three()
            self._new(key)
            (numel,) = stream.numbers("<q")
            dtype = storage_dtype(cls) if isinstance(cls, Global) else None
            self._spans[str(key)] = stream.skip(numel * (dtype.itemsize if dtype else 1))
            pid = ("storage", cls, str(key), place, numel)
            self._known[key] = super().persistent(pid)
            self._pids[key] = pid
        views = stream.pickle()
        for view in views if isinstance(views, list) else ():
            if type(view) is not tuple or len(view) != 4 or type(view[1]) is not int or view[1] not in self._pids:
                raise CorruptFileError("a part of a storage is not told by two ids, an offset and a length", record="storages")
            self._known[self._new(view[0])] = super().persistent((*self._pids[view[1]], (view[0], *view[2:])))
        self.troubles += stream.finish()

    def read_tensors(self, stream: _Stream) -> None:
        for _ in range(stream.count()):
            key, storage, cls = stream.three()
            self._new(key)
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
            self._known[key] = self.tensor(bare, offset, tuple(lengths[:ndim]), tuple(lengths[ndim:]), None)
        self.troubles += stream.finish()


def _storage_gap(value: Any, head: bytes) -> int:
    """A storage: 8 bytes count, then the elements; none behind the list of views, which comes last."""
    if not (isinstance(value, tuple) and len(value) == 3 and isinstance(value[2], Global)):
        return 0
    return 8 + int.from_bytes(head, "little") * DTYPES[ALL_STORAGE_DTYPES.get(value[2].name, "uint8")].itemsize


# a tensor: 4 bytes dimensions, 4 unused, then sizes, strides and offset, 8 bytes each
GAPS: dict[str, Callable[[Any, bytes], int]] = {
    "storages": _storage_gap,
    "tensors": lambda _, head: 16 + 16 * int.from_bytes(head[:4], "little"),
}
