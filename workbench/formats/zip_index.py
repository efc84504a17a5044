"""An index of a ZIP archive, read from its end; ambiguity is an error, never a choice.

    end of central directory   50 4b 05 06 · +8 entries on this disk · +10 entries · +12 directory size · +16 directory offset · +20 comment length
    ZIP64 locator              50 4b 06 07 · +8 offset of the ZIP64 end record, which stands just before it
    ZIP64 end record           50 4b 06 06 · +4 its size · +24 +32 entries · +40 directory size · +48 directory offset
    central header  (46 bytes) 50 4b 01 02 · +8 flags · +10 method · +16 CRC · +20 packed · +24 size · +28 name · +30 extra · +32 comment · +42 local header
    local header    (30 bytes) 50 4b 03 04 · +6 flags · +8 method · +14 CRC · +18 packed · +22 size · +26 name · +28 extra · then the payload

Listing reads the end and the directory alone. A payload's place is predicted from the writer's alignment and proved by the
next record's; where that does not settle it, the local header is read. Each record's local header is read and compared
(name, method, flags, sizes) at its first read in any case.

Source: PKWARE APPNOTE 6.3.10; pytorch caffe2/serialize/inline_container.cc for alignment and data descriptors.
"""

from __future__ import annotations

import operator
import struct
import zlib
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, repeat
from typing import Any, NamedTuple

from workbench.errors import CorruptFileError, UnsupportedError
from workbench.files import FileRef, Reader, Span, Storage, read_span
from workbench.formats.window import Window

_END, _LOCATOR, _END64 = b"PK\x05\x06", b"PK\x06\x07", b"PK\x06\x06"
_MAX_DIRECTORY = 1 << 30
_ALIGNMENT = 64
_FULL = 0xFFFFFFFF  # stands where a 64-bit field tells the value
_CENTRAL, _BEHIND_MARK = struct.Struct("<4s4xHH4xIIIHHHH6xI"), struct.Struct("<4xHH8xIIHHHH6xI")


class Record(NamedTuple):
    """One file in the archive, as the central directory tells it."""

    name: str
    raw_name: bytes
    flags: int
    method: int
    crc: int
    packed: int
    size: int
    header: int  # offset of the local header

    def prove(self, pread: Callable[[int, int], bytes], start: int) -> None:
        """Raise unless the local header tells the directory's story and its payload begins at `start`."""
        if _payload_start(self, pread) != start:
            raise CorruptFileError("the payload does not lie where the archive's layout says", record=self.name)

    def alone(self, start: int) -> Record:
        return self


class Columns(NamedTuple):
    """What listing needs of many records, in directory order; each column has one item for each record."""

    names: list[str]
    entries: list[int]  # where its header lies in the directory
    lengths: list[int]  # of its raw name
    packed: list[int]
    headers: list[int]  # offsets of the local headers
    kinds: list[tuple[int, int]]  # flags and method


class Records(Mapping[str, Record]):
    """The records of one archive by name, in directory order; read from the directory when asked for, since an archive may have very many."""

    def __init__(self, directory: bytes, base: int, columns: Columns) -> None:
        self.directory, self._base, self.columns = directory, base, columns
        self.places = dict(zip(columns.names, range(len(columns.names)), strict=True))

    def __getitem__(self, name: str) -> Record:
        return self.at(self.places[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def __contains__(self, name: object) -> bool:
        return name in self.places

    def at(self, place: int) -> Record:
        return _central_record(self.directory, self.columns.entries[place], self._base)[0]


@dataclass(frozen=True)
class ZipIndex:
    """The records of one archive, and where it lies."""

    file: FileRef
    records: Records = field(compare=False, repr=False)
    directory: int  # where the records end
    base: int = 0  # where the archive begins in the file

    def storage(self, name: str) -> Span | Inflated:
        """The bytes of one record, seen through inflate where it is packed.

        Raises:
            CorruptFileError: no such record, or its headers disagree. UnsupportedError: encrypted, or packed by another method.
        """
        place = self.records.places.get(name)
        if place is None:
            raise CorruptFileError("the archive has no such record", record=name, path=self.file.url)
        _, _, flags, method, _, packed, size, header = record = self.records.at(place)
        if (plain := self._plain[place]) is not None:
            return Span(self.file, plain, packed, self)
        if flags & 0x2041:
            raise UnsupportedError("the record is encrypted", record=name, path=self.file.url)
        if method not in (0, 8):
            raise UnsupportedError(
                f"the record is packed by method {method}; stored and deflated ones are read", record=name, path=self.file.url
            )
        with self.file.open() as source:
            start = _payload_start(record, source.pread)
        if start + packed > self._next[header]:
            raise CorruptFileError("the record runs into what follows it", record=name, path=self.file.url)
        span = Span(self.file, start, packed, record)
        return span if method == 0 else Inflated(span, size, name)

    def plain_storages(self, names: Iterable[str]) -> list[Storage] | None:
        """The bytes of many records that lie as torch lays them; None where one does not."""
        places: list[Any] = list(map(self.records.places.get, names))
        starts = None if None in places else list(map(self._plain.__getitem__, places))
        if starts is None or None in starts:
            return None
        packed = map(self.records.columns.packed.__getitem__, places)
        return list(map(tuple.__new__, repeat(Span), zip(repeat(self.file), starts, packed, repeat(self))))

    def prove(self, pread: Callable[[int, int], bytes], start: int) -> None:
        """Raise unless the local header of the record whose payload begins at `start` tells the directory's story; see `files.Check`."""
        self.alone(start).prove(pread, start)

    def alone(self, start: int) -> Record:
        headers = self.records.columns.headers
        return self.records.at(self._in_order[bisect_left(self._in_order, start, key=headers.__getitem__) - 1])

    @cached_property
    def stored(self) -> dict[str, Span]:
        """The bytes of all stored records, but for those of which `storage` has to tell something.

        Cost: where they do not lie as torch lays them, a pass over the local headers.
        """
        names, packed, starts = self.records.columns.names, self.records.columns.packed, dict(enumerate(self._plain))
        with self.file.open() as source:
            starts.update((place, start) for place, start, _ in self._agreeing(source.pread, [at for at in starts if starts[at] is None]))
        return {names[at]: Span(self.file, start, packed[at], self) for at, start in starts.items() if start is not None}

    def first_bytes(self, pread: Callable[[int, int], bytes]) -> Iterator[tuple[str, bytes]]:
        """Name and first byte of each stored record whose local header repeats what the directory says."""
        names, packed = self.records.columns.names, self.records.columns.packed
        return ((names[at], first if packed[at] else b"") for at, _, first in self._agreeing(pread, range(len(names))))

    def _agreeing(self, pread: Callable[[int, int], bytes], places: Iterable[int]) -> Iterator[tuple[int, int, bytes]]:
        """Of those records that are stored and whose local header repeats what the directory says: where the payload starts, and its first byte."""
        (_, entries, lengths, sizes, headers, kinds), told = self.records.columns, self.records.directory
        take, plain = Window(pread, self.file.size).take, self._plain
        allowed = {kind for kind in set(kinds) if not (kind[1] or kind[0] & 0x2041)}
        for place in places:
            if kinds[place] not in allowed:
                continue
            entry, header, behind = entries[place], headers[place], 30 + lengths[place]
            start = plain[place]
            head = take(header, behind + 1 if start is None else start + 1 - header)
            begins = behind + int.from_bytes(head[28:30], "little")
            if start is None:  # its payload is not where torch lays it
                start = header + begins
                if start + sizes[place] > self._next[header]:
                    continue
                head = head if begins == behind else take(header, begins + 1)
            agrees = head[4:28] == told[entry + 6 : entry + 30] or (
                head[6:10] == told[entry + 8 : entry + 12]
                and (head[14:26] == told[entry + 16 : entry + 28] or (kinds[place][0] & 8 and not any(head[14:26])))
                and head[26:28] == told[entry + 28 : entry + 30]
            )
            if agrees and head[:4] == b"PK\3\4" and head[30:behind] == told[entry + 46 : entry + 16 + behind] and header + begins == start:
                yield place, start, head[-1:]

    @cached_property
    def _in_order(self) -> list[int]:
        """The records' places, as their headers lie in the file."""
        return sorted(range(len(self.records)), key=self.records.columns.headers.__getitem__)

    @cached_property
    def _plain(self) -> list[int | None]:
        """Where each payload starts that lies as torch lays it: stored, aligned, and with at most a data descriptor before what follows."""
        _, _, lengths, packed, headers, kinds = self.records.columns
        base = self.base - 34  # where the alignment is counted from, but for the header before the payload
        starts = [34 + base - (base - header - length) // _ALIGNMENT * _ALIGNMENT for header, length in zip(headers, lengths, strict=True)]
        ends = [*headers[1:], self.directory] if all(map(operator.lt, headers, headers[1:])) else map(self._next.__getitem__, headers)
        gaps = map(operator.sub, map(operator.sub, ends, starts), packed)
        allowed = {kind: () if kind[1] or kind[0] & 0x2041 else (16, 24) if kind[0] & 8 else (0,) for kind in set(kinds)}
        return [start if gap in allowed[kind] else None for start, gap, kind in zip(starts, gaps, kinds, strict=True)]

    @cached_property
    def _next(self) -> dict[int, int]:
        starts = [self.records.columns.headers[place] for place in self._in_order]
        return dict(zip(starts, [*starts[1:], self.directory], strict=True))


def _payload_start(record: Record, pread: Callable[[int, int], bytes]) -> int:
    """Where the payload starts, after comparing the local header with the central one."""
    head = pread(record.header, 30 + len(record.raw_name))
    if len(head) < 30 or head[:4] != b"PK\x03\x04":
        raise CorruptFileError("there is no local header where the directory says", record=record.name, offset=record.header)
    flags, method, crc, packed, size, name_length, extra_length = struct.unpack("<6xHH4xIIIHH", head[:30])
    if head[30:] != record.raw_name or name_length != len(record.raw_name):
        raise CorruptFileError("local and central headers name different records", record=record.name, offset=record.header)
    if method != record.method or flags != record.flags:
        raise CorruptFileError("local and central headers disagree on method or flags", record=record.name, offset=record.header)
    streamed = bool(flags & 8)
    zip64 = packed == 0xFFFFFFFF or size == 0xFFFFFFFF
    sizes_agree = (packed, size) == (record.packed, record.size) or zip64 or (streamed and (packed, size) == (0, 0))
    if not sizes_agree or not (crc == record.crc or (streamed and crc == 0)):
        raise CorruptFileError("local and central headers disagree on size or checksum", record=record.name, offset=record.header)
    return record.header + 30 + int(name_length) + int(extra_length)


@dataclass(frozen=True)
class Inflated:
    """A deflated record, or a part of one, seen as its plain bytes. Reading forward is one pass; going back starts again."""

    span: Span
    nbytes: int
    record: str
    skipped: int = 0  # plain bytes before the part
    total: int | None = None  # plain bytes of the whole record, where this is a part

    def part(self, start: int, nbytes: int) -> Inflated:
        """`nbytes` plain bytes from byte `start` of this one."""
        return Inflated(self.span, nbytes, self.record, self.skipped + start, self.nbytes if self.total is None else self.total)

    @contextmanager
    def open(self) -> Iterator[_Inflater]:
        with self.span.open() as reader:
            yield _Inflater(self, reader)


class _Inflater:
    def __init__(self, storage: Inflated, reader: Reader) -> None:
        self._storage = storage
        self._reader = reader
        self._restart()

    def _restart(self) -> None:
        self._engine = zlib.decompressobj(-15)
        self._read = 0
        self._at = 0
        self._pending = b""

    def _next(self, limit: int) -> bytes:
        """Up to `limit` further plain bytes."""
        while True:
            if not self._pending and self._read < self._storage.span.nbytes:
                self._pending = self._packed()
            out = self._inflate(limit)
            if out:
                self._at += len(out)
                return out
            if self._engine.eof or (not self._pending and self._read >= self._storage.span.nbytes):
                raise CorruptFileError("the packed bytes end before the size that the archive states", record=self._storage.record)

    def _packed(self) -> bytes:
        buffer = bytearray(min(1 << 16, self._storage.span.nbytes - self._read))
        self._reader.readinto(memoryview(buffer), self._read)
        self._read += len(buffer)
        return bytes(buffer)

    def _require_end(self) -> None:
        """Prove that the stream ends where the archive says, once its last stated byte was read."""
        while not self._engine.eof:
            if not self._pending and self._read >= self._storage.span.nbytes:
                raise CorruptFileError("the packed bytes end without their end mark", record=self._storage.record)
            self._pending = self._pending or self._packed()
            if self._inflate(1):
                raise CorruptFileError("the packed bytes go on past the size that the archive states", record=self._storage.record)

    def _inflate(self, limit: int) -> bytes:
        try:
            out = self._engine.decompress(self._pending, limit)
        except zlib.error as error:
            raise CorruptFileError(f"the packed bytes are damaged: {error}", record=self._storage.record) from error
        self._pending = self._engine.unconsumed_tail
        return out

    def readinto(self, buffer: memoryview, start: int) -> None:
        start += self._storage.skipped
        if start < self._at:
            self._restart()
        while self._at < start:
            self._next(min(1 << 20, start - self._at))
        done = 0
        while done < buffer.nbytes:
            piece = self._next(min(1 << 20, buffer.nbytes - done))
            buffer[done : done + len(piece)] = piece
            done += len(piece)
        if self._at == (self._storage.total or self._storage.nbytes):
            self._require_end()


def read_zip_index(file: FileRef, area: Span | None = None) -> ZipIndex:
    """The index of the archive that fills `file`, or a part of it.

    Raises:
        CorruptFileError: no end record, or records that overlap, repeat or contradict each other.
    Cost: two reads, of the file's last 64 KiB and of the directory.
    """
    whole = area or Span(file, 0, file.size)
    count, directory_size, directory, end = _find_end(whole)
    if directory_size > _MAX_DIRECTORY or directory + directory_size != end:
        raise CorruptFileError(
            f"the directory is said to lie at {directory} with {directory_size} bytes, and the end record at {end} contradicts it",
            path=file.url,
        )
    if count * 46 > directory_size:
        raise CorruptFileError(f"{count} records cannot fit a directory of {directory_size} bytes", path=file.url)
    data = whole.read(directory, directory + directory_size)
    columns: list[list[Any]] = [[] for _ in Columns._fields]
    at = odd = singly = 0  # records to be read one by one, for their neighbours were not plain
    reach = _BLOCK  # so that what is looked at in vain is never much more than what was found
    while len(columns[0]) < count:
        alike: Sequence[Sequence[Any]] = []
        if singly:
            singly -= 1
        else:
            alike, behind = _alike_records(data, at, whole.start, count - len(columns[0]), reach)
            if not alike:
                alike, behind = _plain_records(data, at, whole.start, count - len(columns[0]), reach)
            singly = 0 if alike else 8 * _RUN
            reach, at = min(_BLOCK, max(_LEAST, 2 * (behind - at))), behind
        if not alike:
            if (odd := odd + 1) > _MOST_ODD:
                told = f"more than {_MOST_ODD:,} of its {count:,} records have names or fields that neither torch nor NumPy writes"
                raise UnsupportedError(told, path=file.url)
            record, behind = _central_record(data, at, whole.start)
            kind = (record.flags, record.method)
            alike, at = ((record.name,), (at,), (len(record.raw_name),), (record.packed,), (record.header,), (kind,)), behind
        for column, more in zip(columns, alike, strict=True):
            column += more
    records = Records(data, whole.start, Columns._make(columns))
    if len(records) != count:
        name = next(name for name, times in Counter(columns[0]).items() if times > 1)
        raise CorruptFileError("two records have the same name", record=name, path=file.url)
    if at != len(data):
        raise CorruptFileError("the directory holds more than its records", path=file.url)
    _require_apart(records.columns, whole.start + directory, file)
    return ZipIndex(file, records, whole.start + directory, whole.start)


def _find_end(whole: Span) -> tuple[int, int, int, int]:
    """(records, directory size, directory offset, where the directory must end)."""
    tail_start = max(0, whole.nbytes - 65_557)
    tail = whole.read(max(0, whole.nbytes - 1024))  # nearly every archive ends without a comment
    base = max(0, whole.nbytes - 1024)
    if _END not in tail:
        tail, base = whole.read(tail_start), tail_start
    places = [i for i in _finditer(tail, _END) if i + 22 <= len(tail) and i + 22 + struct.unpack_from("<H", tail, i + 20)[0] == len(tail)]
    if len(places) != 1 or tail.rfind(_END) != places[0]:  # other readers take the last mark, whatever length it states
        raise CorruptFileError(
            "the archive has no end record: the file is cut" if not places else "the archive has two end records", path=whole.file.url
        )
    at = places[0]
    disk, start_disk, here, count, size, offset = struct.unpack_from("<HHHHII", tail, at + 4)
    end = base + at
    locator = tail[at - 20 : at] if at >= 20 else whole.read(max(0, end - 20), end)
    if locator[:4] == _LOCATOR:
        _, where, disks = struct.unpack("<IQI", locator[4:])
        record = whole.read(where, where + 56)
        plain = len(record) == 56 and where + 56 == end - 20 and struct.unpack_from("<Q", record, 4) == (44,)
        if record[:4] != _END64 or not plain or disks != 1:  # with more in it, other readers look for it elsewhere
            raise CorruptFileError("the ZIP64 end record is not where its locator says", path=whole.file.url)
        disk64, start64, here64, count64, size64, offset64 = struct.unpack_from("<IIQQQQ", record, 16)
        pairs = ((here, here64, 0xFFFF), (count, count64, 0xFFFF), (size, size64, 0xFFFFFFFF), (offset, offset64, 0xFFFFFFFF))
        if any(small not in (big, cap) for small, big, cap in pairs) or disk64 or start64:
            raise CorruptFileError("the two end records contradict each other", path=whole.file.url)
        here, count, size, offset, end = here64, count64, size64, offset64, where
    if disk or start_disk or here != count:
        raise CorruptFileError("the archive is split over several disks, or its counts disagree", path=whole.file.url)
    return count, size, offset, end


def _finditer(data: bytes, mark: bytes) -> Iterator[int]:
    at = data.find(mark)
    while at >= 0:
        yield at
        at = data.find(mark, at + 1)


_RUN = 16  # fewer records than these in a row are found faster one by one
_LEAST, _BLOCK = 1 << 12, 1 << 18  # bytes of the directory that are looked at at once
_MOST_ODD = 100_000  # records that are read one by one


def _alike_records(data: bytes, at: int, base: int, count: int, reach: int) -> tuple[Sequence[Sequence[Any]], int]:
    """The next records in columns, where all within `reach` bytes are plain, stored and of one length: the storages of a torch file."""
    head = data[at : at + 46]
    length = int.from_bytes(head[28:30], "little")
    step = 46 + length
    count = min(count, (min(len(data), at + reach) - at) // step)
    if count < _RUN or head[:4] != b"PK\x01\x02" or any(head[10:12]) or any(head[30:36]):
        return [], at
    end = at + count * step
    fields = [data[at + byte : end : step] for byte in range(step)]
    told = bytearray(count * (length + 1))  # the names, each with a NUL behind it
    for byte, column in enumerate(fields[46:]):
        told[byte :: length + 1] = column
    same = all(fields[byte] == head[byte : byte + 1] * count for byte in (0, 1, 2, 3, 8, 9, 10, 11, *range(28, 36)))
    if not same or fields[20:24] != fields[24:28] or not told.isascii() or told.count(b"\0") != count:
        return [], at
    packed, headers = _counts(fields[20:24]), _counts(fields[42:46])
    if _FULL in packed or _FULL in headers:
        return [], at
    headers = tuple(base + header for header in headers) if base else headers
    kind = (int.from_bytes(head[8:10], "little"), 0)
    return (told.decode("ascii").split("\0")[:-1], range(at, end, step), [length] * count, packed, headers, [kind] * count), end


def _counts(fields: Sequence[bytes]) -> tuple[int, ...]:
    """Numbers, of whose bytes each column holds one, the lowest first."""
    spelled = bytearray(4 * len(fields[0]))
    for byte, column in enumerate(fields):
        spelled[byte::4] = column
    return struct.unpack(f"<{len(fields[0])}I", spelled)


def _plain_records(data: bytes, at: int, base: int, count: int, reach: int) -> tuple[Sequence[Sequence[Any]], int]:
    """The next records in columns, as far as nothing about them is unusual, within `reach` bytes: most of a torch file."""
    first, *found = data[at : at + reach].split(b"PK\x01\x02")
    found = found[: min(count, len(found) - (at + reach < len(data)))]  # the last may go on
    count = 0 if first else next((place for place, record in enumerate(found) if len(record) < 42), len(found))
    while count >= _RUN:
        found = found[:count]
        flags, methods, packed, sizes, lengths, more, comments, disks, headers = zip(*map(_BEHIND_MARK.unpack_from, found), strict=True)
        names: list[Any] = list(map(operator.getitem, found, repeat(slice(42, None))))
        told = b"\0".join(names)
        unusual = any(more) or any(comments) or any(disks) or _FULL in packed or _FULL in sizes or _FULL in headers
        if unusual or tuple(map(len, names)) != lengths or not told.isascii() or told.count(b"\0") >= count:
            count //= 2  # the first of them may be plain
        elif not all(map(operator.or_, map(operator.eq, packed, sizes), methods)):
            count //= 2
        else:
            kinds = {kind: kind for kind in zip(flags, methods, strict=True)}
            *entries, end = accumulate((46 + length for length in lengths), initial=at)
            headers = tuple(base + header for header in headers) if base else headers
            return (
                told.decode("ascii").split("\0"),
                entries,
                lengths,
                packed,
                headers,
                [*map(kinds.get, zip(flags, methods, strict=True))],
            ), end
    return [], at


def _central_record(data: bytes, at: int, base: int) -> tuple[Record, int]:
    if at + 46 > len(data):
        raise CorruptFileError("the directory is damaged", offset=at)
    mark, flags, method, crc, packed, size, n, e, c, disk, header = _CENTRAL.unpack_from(data, at)
    end = at + 46 + n + e + c
    if mark != b"PK\x01\x02" or end > len(data):
        raise CorruptFileError("the directory is damaged, or an entry runs past it", offset=at)
    raw_name = data[at + 46 : at + 46 + n]
    if packed == _FULL or size == _FULL or header == _FULL:
        size, packed, header = _zip64(data[at + 46 + n : at + 46 + n + e], size, packed, header)
    if disk not in (0, 0xFFFF):
        raise CorruptFileError("a record lies on another disk", offset=at)
    try:
        name = raw_name.decode("utf-8")
    except UnicodeDecodeError:
        name = raw_name.decode("cp437")
    if "\0" in name:
        raise CorruptFileError("a record's name holds a NUL", record=name, offset=at)
    if method == 0 and packed != size:
        raise CorruptFileError(f"a stored record states {packed} packed bytes and {size} plain ones", record=name, offset=at)
    return Record(name, raw_name, flags, method, crc, packed, size, base + header), end


def _zip64(extra: bytes, size: int, packed: int, header: int) -> tuple[int, int, int]:
    """The 64-bit fields, in the order that APPNOTE 4.5.3 fixes, for those that did not fit."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        body = extra[at + 4 : at + 4 + length]
        if kind == 1:
            values = list(struct.unpack(f"<{len(body) // 8}Q", body[: len(body) // 8 * 8]))
            wanted = [v == 0xFFFFFFFF for v in (size, packed, header)]
            if len(values) < sum(wanted):
                break
            out = [values.pop(0) if w else v for w, v in zip(wanted, (size, packed, header), strict=True)]
            return out[0], out[1], out[2]
        at += 4 + length
    raise CorruptFileError("a record's 64-bit sizes are missing")


def _require_apart(columns: Columns, directory: int, file: FileRef) -> None:
    names, _, lengths, packed, headers, _ = columns
    ends = list(map(operator.add, map(operator.add, headers, lengths), packed))  # less the 30 bytes of a header
    if min(map(operator.sub, [*headers[1:], directory], ends), default=30) >= 30:
        return
    end, before = 0, ""
    for header, name, behind in sorted(zip(headers, names, ends, strict=True), key=operator.itemgetter(0)):
        if header < end:
            raise CorruptFileError(f"the record overlaps {before!r}", record=name, path=file.url)
        end, before = behind + 30, name
    if end > directory:
        raise CorruptFileError("the last record runs into the directory", record=before, path=file.url)


def read_record(index: ZipIndex, name: str, limit: int) -> bytes:
    """A whole record of at most `limit` bytes, packed no tighter than data of its kind packs.

    Raises:
        UnsupportedError: larger than that: a decompression bomb, or a file too large to list.
    """
    storage = index.storage(name)
    if isinstance(storage, Inflated):
        limit = min(limit, 64 * storage.span.nbytes + (1 << 20))
    if storage.nbytes > limit:
        raise UnsupportedError(f"the record has {storage.nbytes} bytes; at most {limit} are read at once", record=name, path=index.file.url)
    return read_span(storage)
