"""GGUF: a header, typed key-value pairs, tensor infos, then the tensors' bytes at aligned places.

    0    4   "GGUF"
    4    4   version: 2 or 3, in the byte order of the whole file
    8    8   n, number of tensors
    16   8   m, number of pairs
    24   …   m pairs: key (text), 4-byte type, value; an array is its 4-byte element type, its 8-byte length, its elements
    …    …   n infos: name (text), 4-byte number of dimensions, 8 bytes a dimension (fastest first), 4-byte element type, 8-byte offset
    …    …   padding to a multiple of `general.alignment` (32 where no pair says); offsets count from here, and are multiples of it too

Text is an 8-byte length and UTF-8 bytes. Every count is compared with the bytes that remain before it is followed. Long arrays
(vocabularies) are walked and summed up in a word. Chat templates are text; nothing renders them. Quantized tensors are listed
without the gguf library and read as float32 through its dequantizer, block by block. The parts of a split file are listed together.

Source: ggml docs/gguf.md (version 3); element types and block sizes: gguf 0.19 constants.py, after ggml.h.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable
from functools import lru_cache, reduce
from itertools import repeat
from operator import add, or_
from typing import Any

from workbench.checkpoint import Checkpoint, Finding
from workbench.dtypes import DTYPES
from workbench.errors import CorruptFileError, FormatError, MissingDependencyError, MissingFileError, UnsupportedError, located
from workbench.files import FileRef, Span
from workbench.formats.packed import Packed
from workbench.formats.window import Window, require_shape
from workbench.strided import row_major
from workbench.tensors import LazyTensor, Stored, TensorSpec, made, stored_tensors

PLAIN = {0: "float32", 1: "float16", 24: "int8", 25: "int16", 26: "int32", 27: "int64", 28: "float64", 30: "bfloat16"}
# type -> name, elements a block, bytes a block
BLOCKS = {
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 29: ("IQ1_M", 256, 56), 31: ("Q4_0_4_4", 32, 18), 32: ("Q4_0_4_8", 32, 18), 33: ("Q4_0_8_8", 32, 18),
    34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 36: ("IQ4_NL_4_4", 32, 18), 37: ("IQ4_NL_4_8", 32, 18), 38: ("IQ4_NL_8_8", 32, 18),
    39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}  # fmt: skip
# gguf decodes none of these
_OPAQUE = {"Q8_1", "Q8_K", "Q1_0", "Q4_0_4_4", "Q4_0_4_8", "Q4_0_8_8", "IQ4_NL_4_4", "IQ4_NL_4_8", "IQ4_NL_8_8"}
_KINDS = (
    ("u8", "B"), ("i8", "b"), ("u16", "H"), ("i16", "h"), ("u32", "I"), ("i32", "i"), ("f32", "f"), ("bool", "B"), ("text", ""), ("array", ""),
    ("u64", "Q"), ("i64", "q"), ("f64", "d"),
)  # fmt: skip
U32, _BOOL, TEXT, ARRAY = 4, 7, 8, 9
_MAX_PAIRS, _MAX_TENSORS, _MAX_NAMES = 1 << 14, 1 << 19, 64 << 20  # bytes of all names
_MAX_ITEMS, _DEAR = 4_000_000, 32  # texts in arrays; what an array in an array, and each element that is told, count for
_MAX_TEXT, _MAX_ALL_TEXT = 1 << 16, 16 << 20  # bytes that are shown
_HEAD, _MAX_KNOWN = 256, 4096  # bytes, most infos are shorter; dimensions and types of tensors that are kept at once
_SHOWN, _MAX_PARTS = 16, 1000  # elements of an array, or missing parts, that are named one by one

DECODER = f"{__name__}:dequantize"

Tensors = dict[str, LazyTensor]
Kind = tuple[tuple[int, ...], int]  # dimensions as stored, and element type


class Value(str):
    """The value of a pair, in words, and how the file has it: its type, its bytes and their order."""

    kind: int
    span: Span
    order: str


def open_file(file: FileRef) -> Checkpoint:
    """List a GGUF file, with the other parts where it is one of a split.

    Raises:
        CorruptFileError: the index contradicts itself or the file's size; `.partial` holds the tensors before the one that does.
        UnsupportedError: another version, or a type ggml has removed.
    Cost: the index is read, in pieces of 4 KiB.
    """
    tensors, metadata, findings = _read_part(file)
    if _natural(metadata, "split.count") > 1:
        tensors, found = _all_parts(file, tensors, metadata)
        findings += found
    return Checkpoint(tensors, name=file.name, format="gguf", metadata=metadata, findings=tuple(findings), source=file)


def _natural(metadata: dict[str, str], key: str) -> int:
    text = metadata.get(key, "")
    return int(text) if text.isdecimal() and len(text) < 20 else 0


def _all_parts(file: FileRef, own: Tensors, metadata: dict[str, str]) -> tuple[Tensors, list[Finding]]:
    """The tensors of this part and of every part beside it, in order, and what is missing."""
    total, number = _natural(metadata, "split.count"), _natural(metadata, "split.no") + 1
    named = re.fullmatch(r"(.*-)(\d{5})-of-(\d{5})\.gguf", file.name, re.DOTALL)
    if named is None or (int(named[2]), int(named[3])) != (number, total) or total > _MAX_PARTS:
        return own, [Finding("split file", "warning", f"this is part {number} of {total}, and its name does not say where the others are")]
    tensors: Tensors = {}
    findings: list[Finding] = []
    missing: list[str] = []
    for other in range(1, total + 1):
        name, part = f"{named[1]}{other:05d}-of-{named[3]}.gguf", own
        if other != number:
            try:
                part, told, found = _read_part(file.folder.file(name))
            except MissingFileError:
                missing.append(name)
                continue
            findings += found
            if (_natural(told, "split.no") + 1, _natural(told, "split.count")) != (other, total):
                raise CorruptFileError(f"{name} does not say that it is part {other} of {total}", path=file.folder.url)
        if twice := tensors.keys() & part.keys():
            raise CorruptFileError("two parts of the split hold a tensor of this name", path=file.url, tensor=min(twice))
        tensors.update(part)
    if missing:
        findings.append(Finding("missing part", "warning", f"{len(missing)} of {total} parts are not there: {', '.join(missing[:_SHOWN])}"))
    return tensors, findings


def _read_part(file: FileRef) -> tuple[Tensors, dict[str, str], list[Finding]]:
    with located(path=file.url), file.open() as source:
        index = _Index(Window(source.pread, file.size), file)
        if index.take(4) != b"GGUF":
            raise CorruptFileError("a GGUF file starts with 'GGUF'", offset=0)
        version = index.number("I")
        if version and not version & 0xFFFF:  # the other byte order moves a small number to the top
            index.order, version = ">", int.from_bytes(version.to_bytes(4, "little"), "big")
        if version not in (2, 3):
            raise UnsupportedError(f"GGUF version {version}; 2 and 3 are read", offset=4)
        count, pairs = index.count(24), index.count(13)
        metadata = index.metadata(pairs)
        alignment = int(metadata.get("general.alignment", "32"))
        if alignment < 8 or alignment & (alignment - 1):
            raise CorruptFileError(f"general.alignment is {alignment}; it must be a power of two, 8 or more")
        infos = index.infos(count)
    data = -(-index.at // alignment) * alignment
    byteorder = "little" if index.order == "<" else "big"
    starts = [data + offset for offset in infos.values()]
    tensors: Tensors = {}
    try:
        stops = _all_tensors(file, tensors, infos, index.kinds, starts, alignment, byteorder) or []
        for name, start, (dims, code) in zip(infos, starts, index.kinds, strict=True) if not stops else ():
            try:
                if (start - data) % alignment:
                    raise CorruptFileError(f"the offset {start - data} is no multiple of the alignment, {alignment}")
                tensors[name], nbytes = _tensor(file, dims, code, start, byteorder)
                stops.append(start + nbytes)
            except Exception:  # entering a context for each of very many would take longer than reading it
                with located(path=file.url, tensor=name, offset=start):
                    raise
        return tensors, metadata, _unclaimed(file, starts, stops, tensors, data, alignment)
    except FormatError as error:
        error.partial = Checkpoint(tensors, name=file.name, format="gguf", metadata=metadata, source=file)
        raise


def _all_tensors(
    file: FileRef, tensors: Tensors, names: Iterable[str], kinds: list[Kind], starts: list[int], alignment: int, byteorder: str
) -> list[int] | None:
    """Fill `tensors`, all at once, and tell where each ends; None, and nothing is filled, where one is wrong or there are none."""
    try:
        forms = {kind: _form(*kind, byteorder) for kind in set(kinds)}
        specs, strides, sizes, packed, orders, locked = zip(*map(forms.__getitem__, kinds), strict=True)
    except ValueError:
        return None
    stops = list(map(add, starts, sizes))
    if max(stops) > file.size or reduce(or_, starts) % alignment:
        return None
    spans = map(made, repeat(Span), zip(repeat(file), starts, sizes, repeat(None)))
    storages = (made(Packed, (span, *how)) if how else span for span, how in zip(spans, packed, strict=True))
    tensors.update(zip(names, stored_tensors(specs, storages, strides, orders, locked), strict=True))
    return stops


def _unclaimed(file: FileRef, starts: list[int], stops: list[int], names: Iterable[str], at: int, alignment: int) -> list[Finding]:
    """What the tensors leave over from byte `at` on, as a finding; a byte that two of them claim is an error."""
    spare, ends = 0, [stop + alignment - 1 & -alignment for stop in stops]
    if starts == [at, *ends[:-1]]:  # one behind another, as most are
        at = ends[-1]
    else:
        for start, stop, name in sorted(zip(starts, stops, names, strict=True)):
            if start < at and stop > start:
                raise CorruptFileError("its bytes overlap those of another tensor", path=file.url, tensor=name, offset=start)
            spare += max(0, start - at)
            at = max(at, -(-stop // alignment) * alignment)
    spare += max(0, file.size - at)
    return [Finding("unclaimed bytes", "warning", f"{spare} bytes of the data belong to no tensor")] if spare >= alignment else []


def _tensor(file: FileRef, dims: tuple[int, ...], code: int, start: int, byteorder: str) -> tuple[LazyTensor, int]:
    """The tensor whose bytes begin at `start`, and how many they are."""
    spec, strides, nbytes, packed, order, locked = _form(dims, code, byteorder)
    if start + nbytes > file.size:
        raise CorruptFileError(f"its bytes end at {start + nbytes} and the file at {file.size}: the file is cut")
    span = Span(file, start, nbytes)
    return LazyTensor(spec, Stored(Packed(span, *packed) if packed else span, 0, strides, order), False, locked), nbytes


@lru_cache(maxsize=4096)
def _form(dims: tuple[int, ...], code: int, byteorder: str) -> tuple[TensorSpec, tuple[int, ...], int, tuple[Any, ...], str, str | None]:
    """What tensors of one type and shape share: spec, strides, bytes in the file, how these are packed, byte order, and why locked."""
    shape, row = dims[::-1], dims[0] if dims else 1  # the file's first dimension moves fastest
    numel, locked = require_shape(shape), None
    if code not in PLAIN and code not in BLOCKS:
        raise UnsupportedError(f"element type {code} is not read; 4 and 5 were Q4_2 and Q4_3, which ggml has removed")
    dtype = DTYPES[PLAIN.get(code, "float32")]
    packing, elements, narrow = BLOCKS.get(code, ("", 1, dtype.itemsize))
    if row % elements:
        raise CorruptFileError(f"rows of {row} elements do not fill {packing} blocks of {elements}")
    if packing and (byteorder == "big" or packing in _OPAQUE):
        locked = f"{byteorder}-endian {packing} is not decoded by the gguf library"
    packed = (4 * numel, packing, narrow, 4 * elements, DECODER, (packing,)) if packing else ()
    return TensorSpec(dtype, shape), row_major(shape), numel // elements * narrow, packed, "little" if packing else byteorder, locked


def library(what: str) -> Any:
    """The gguf package, which `what` needs."""
    try:
        import gguf
    except ImportError as error:
        raise MissingDependencyError(f"{what} need the gguf library", hint="pip install 'checkpoint-workbench[gguf]'") from error
    return gguf


def dequantize(stored: bytearray, packing: str) -> Any:
    """Whole blocks as little-endian float32."""
    gguf = library(f"values of {packing}")
    import numpy as np

    try:
        with np.errstate(all="ignore"):  # a stranger's scale may be infinite
            values = gguf.quants.dequantize(np.frombuffer(stored, np.uint8), gguf.GGMLQuantizationType[packing])
    except (KeyError, NotImplementedError) as error:
        raise UnsupportedError(f"the gguf library installed here does not decode {packing}", hint="pip install --upgrade gguf") from error
    return np.ascontiguousarray(values, "<f4").data


class _Index:
    """A cursor over the index; `order` is struct's word for the byte order."""

    def __init__(self, window: Window, file: FileRef) -> None:
        self.window, self.file, self.at, self.order = window, file, 0, "<"
        self.kinds: list[Kind] = []
        self._items, self._room, self._names = _MAX_ITEMS, _MAX_ALL_TEXT, _MAX_NAMES

    def take(self, count: int) -> bytes:
        data = self.window.take(self.at, count)
        self.at += count
        return data

    def number(self, code: str) -> Any:
        return struct.unpack(self.order + code, self.take(struct.calcsize("=" + code)))[0]

    def count(self, least: int) -> int:
        """A count of things of at least that many bytes each, which the rest of the file can hold."""
        found: int = self.number("Q")
        left = self.window.size - self.at
        if found * least > left:
            raise CorruptFileError(f"{found} entries follow, and {left} bytes are left: the file is cut or forged", offset=self.at - 8)
        return found

    def name(self) -> str:
        length = self.count(1)
        self._names -= length
        if length > _MAX_TEXT or self._names < 0:
            raise UnsupportedError(f"a name of {length} bytes; at most {_MAX_TEXT} are read, and {_MAX_NAMES} of all", offset=self.at)
        return self.take(length).decode("utf-8")

    def metadata(self, pairs: int) -> dict[str, str]:
        if pairs > _MAX_PAIRS:
            raise UnsupportedError(f"{pairs} pairs; at most {_MAX_PAIRS} are read", offset=16)
        out: dict[str, str] = {}
        for _ in range(pairs):
            start, key, kind, at = self.at, self.name(), self.number("I"), self.at
            if key in out:
                raise CorruptFileError(f"the key {key!r} stands twice: which of the two counts is ambiguous", offset=start)
            if key == "general.alignment" and kind != U32:
                raise CorruptFileError(f"general.alignment must be u32, and is of type {kind}", offset=start)
            out[key] = value = Value(self.value(kind))
            value.kind, value.span, value.order = kind, Span(self.file, at, self.at - at), self.order
        return out

    def value(self, kind: int) -> str:
        """A value in words, cut where it is long."""
        if kind == ARRAY:
            return self.array()
        if kind == TEXT:
            length = self.count(1)
            shown = min(length, _MAX_TEXT, self._room)
            self._room -= shown
            text = self.take(shown).decode("utf-8", "replace") + (f"… ({length} bytes)" if shown < length else "")
            self.at += length - shown
            return text
        number = self.number(self.kind(kind)[1])
        if kind == _BOOL and number > 1:
            raise CorruptFileError(f"a truth value of {number}; 0 and 1 are allowed", offset=self.at - 1)
        return str(bool(number) if kind == _BOOL else number)

    def kind(self, kind: int) -> tuple[str, str]:
        """(name, struct's code) of a value's type; texts and arrays have no code."""
        if kind >= len(_KINDS):
            raise CorruptFileError(f"{kind} is no type of a value", offset=self.at - 4)
        return _KINDS[kind]

    def array(self) -> str:
        """An array in words: its elements where they are few and flat."""
        kind, length = self.header()
        if kind != ARRAY and length <= _SHOWN:
            self._charge(_DEAR * length)
            return "[" + ", ".join(self.value(kind) for _ in range(length)) + "]"
        pending = [(kind, length)]
        while pending:
            inner, left = pending.pop()
            if inner == TEXT:
                self._pass_texts(left)
            elif inner != ARRAY:
                self.at += left * struct.calcsize("=" + _KINDS[inner][1])
            elif left:
                self._charge(_DEAR)
                pending += [(ARRAY, left - 1), self.header()]
        return f"array of {length:,} × {_KINDS[kind][0]}"

    def _charge(self, items: int) -> None:
        self._items -= items
        if self._items < 0:
            raise UnsupportedError(f"more than {_MAX_ITEMS} texts in arrays, or {_MAX_ITEMS // _DEAR} arrays and values", offset=self.at)

    def _pass_texts(self, left: int) -> None:
        self._charge(left)
        length_of = struct.Struct(self.order + "Q").unpack_from
        while left:
            data, low = self.window.view(self.at, 8)
            start, last = low, len(data) - 8
            while left and low <= last:
                low += 8 + length_of(data, low)[0]
                left -= 1
            self.at += low - start
        self.window.take(self.at, 0)  # the last text ends inside the file, too

    def header(self) -> tuple[int, int]:
        """(element type, length) of an array."""
        kind = self.number("I")
        return kind, self.count(struct.calcsize("=" + self.kind(kind)[1]) or (8 if kind == TEXT else 12))

    def infos(self, count: int) -> dict[str, int]:
        """name -> offset; `kinds` has the dimensions as stored and the element type of each."""
        if count > _MAX_TENSORS:
            raise UnsupportedError(f"{count} tensors; at most {_MAX_TENSORS} are listed", offset=8)
        out: dict[str, int] = {}
        number, long = struct.Struct(self.order + "I").unpack_from, struct.Struct(self.order + "Q").unpack_from
        known: dict[bytes, Kind] = {}
        kinds = self.kinds
        while len(out) < count:
            data, low = self.window.view(self.at, min(_HEAD, self.window.size - self.at))
            base, first, last = self.at - low, low, len(data) - _HEAD
            while low <= last and len(out) < count:  # where a name is short and dimensions are as few as ggml has, read where it lies
                (length,) = long(data, low)
                if length > _HEAD // 2:
                    break
                at = low + 8 + length
                (dimensions,) = number(data, at)
                if dimensions > 4:
                    break
                name, at, head = data[low + 8 : at].decode("utf-8"), at + 8 + 8 * dimensions, data[at : at + 8 + 8 * dimensions]
                if head not in known:
                    if len(known) == _MAX_KNOWN:
                        known.clear()
                    _, *dims, code = struct.unpack(f"{self.order}I{dimensions}QI", head)
                    known[head] = tuple(dims), code
                if name in out:
                    raise CorruptFileError("two tensors have this name", tensor=name, offset=base + low)
                (out[name],) = long(data, at)
                kinds.append(known[head])
                low = at + 8
            self.at = base + low
            if low == first:
                name, kind, offset = self._info()
                if name in out:
                    raise CorruptFileError("two tensors have this name", tensor=name, offset=base + low)
                out[name] = offset
                kinds.append(kind)
        return out

    def _info(self) -> tuple[str, Kind, int]:
        name, dimensions = self.name(), self.number("I")
        if dimensions > 64:
            raise CorruptFileError(f"{dimensions} dimensions; ggml has 4", tensor=name, offset=self.at - 4)
        return name, (tuple(self.number("Q") for _ in range(dimensions)), self.number("I")), self.number("Q")
