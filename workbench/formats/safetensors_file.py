"""safetensors: a header that is an index, then raw bytes.

    0       8        n, length of the header in bytes, little-endian
    8       n        JSON: name -> {"dtype", "shape", "data_offsets": [begin, end]}, and "__metadata__": text -> text
    8 + n   …        the data; tensors tile it from 0 to its end, without holes or overlap

Everything is validated when opened and no data is read. Names that `save_model` recorded as aliases of a tied tensor are restored.

Source: safetensors 0.8 README (format) and safetensors/src/tensor.rs (validation).
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from itertools import permutations, repeat
from operator import add, sub
from typing import Any

from workbench.checkpoint import Checkpoint
from workbench.dtypes import DTYPES
from workbench.errors import CorruptFileError, UnsupportedError, located
from workbench.files import FileRef, Span
from workbench.names import unique_pairs
from workbench.strided import row_major
from workbench.tensors import LazyTensor, Stored, TensorSpec, made, stored_tensors

MAX_HEADER = 100_000_000
_MAX_TENSORS = 1_000_000
_MAX_WIDE = 160 << 20  # bytes of a header as Python holds text, one to four for each character
_MAX_ODD, _MAX_VALUES = 16 << 20, 1_000_000  # bytes and values of a header that is JSON, and no table as writers lay it out
_MAX_ESCAPES = 4_000_000
_MAX_ENTRY = 1 << 16  # bytes of a tensor's entry
_PIECE, _MOST_PIECES = 1 << 18, 1000  # bytes of entries looked at together; pieces, which are short where entries are laid out in turns
_MOST_SIZES, _DIMENSIONS = 100_000, 8  # of all shapes, and besides for each tensor
CODES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32", "U64": "uint64", "I64": "int64",
    "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64", "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E8M0": "float8_e8m0fnu", "F4": "float4_e2m1fn_x2",
}  # fmt: skip
_KEYS, _MAX_COUNT = {"dtype", "shape", "data_offsets"}, 1 << 63
_FIELDS = (  # in these, a space stands for any white space, ~N for a number and ~T for a text
    rb'"dtype" : "(?P<dtype>[A-Z0-9_]++)"',
    rb'"shape" : \[ (?P<shape>(?:~N (?:, ~N ){0,63}+)?+)\]',
    rb'"data_offsets" : \[ (?P<begin>~N) , (?P<end>~N) \]',
)
_SPELLED = ((b" ", rb"[ \t\n\r]*+"), (b"~N", rb"(?:0|[1-9][0-9]{0,18}+)"), (b"~T", rb'"(?:[^"\\\x00-\x1f]++|\\.)*+"'))


def _spelled(text: bytes) -> re.Pattern[bytes]:
    for sign, spelled in _SPELLED:
        text = text.replace(sign, spelled)
    return re.compile(text + _SPELLED[0][1] + rb"(?P<next>[,}])")


_METADATA = _spelled(rb' "__metadata__" : (\{ (?:~T : ~T (?:, ~T : ~T ){0,500000}+)?+\})')
_ROWS = [_spelled(rb" (?P<name>~T) : \{ " + rb" , ".join(fields) + rb" \}") for fields in permutations(_FIELDS)]
_TABLES = {row: re.compile(row.pattern + rb"|(?P<odd>[\s\S]++)") for row in _ROWS}
_BITS = {"F6_E2M3": 6, "F6_E3M2": 6}  # in the specification; torch has no such type


def open_file(file: FileRef) -> Checkpoint:
    """List a safetensors file.

    Raises:
        CorruptFileError: the header is damaged, or the tensors do not tile the data exactly.
    Cost: two reads, of 8 bytes and of the header.
    """
    tensors, metadata = read_header(file)
    restored = restored_aliases(tensors, metadata)
    tensors.update({alias: tensors[kept] for alias, kept in restored.items()})
    return Checkpoint(tensors, name=file.name, format="safetensors", metadata=metadata, restored=restored, source=file)


def restored_aliases(tensors: dict[str, LazyTensor], metadata: dict[str, str]) -> dict[str, str]:
    """alias -> kept, for metadata entries whose key is no tensor and whose value is one; `format` is the container's own key."""
    return {alias: kept for alias, kept in metadata.items() if alias != "format" and alias not in tensors and kept in tensors}


def read_header(file: FileRef, area: Span | None = None) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """Tensors in the header's order, and the text metadata, of a file or of a part of one."""
    whole = area or Span(file, 0, file.size)
    head = whole.read(0, 8)
    length = int.from_bytes(head, "little")
    if len(head) < 8 or length > MAX_HEADER or 8 + length > whole.nbytes:
        raise CorruptFileError(
            f"the header is said to have {length} bytes in {whole.nbytes}: the file is cut or damaged", path=file.url, offset=whole.start
        )
    text = whole.read(8, 8 + length)
    if text.lstrip(b" ")[:1] != b"{":
        raise CorruptFileError("the header does not start with '{'", path=file.url, offset=8)
    if text.count(b'"dtype"') > _MAX_TENSORS:
        raise UnsupportedError(f"the header lists more than {_MAX_TENSORS} tensors", path=file.url, offset=8)
    if text.count(b"\\") > _MAX_ESCAPES or (4 * length > _MAX_WIDE and not (text.isascii() and b"\\u" not in text)):
        raise UnsupportedError(
            f"a header of {length} bytes with so many escapes, or other characters than ASCII, is not read", path=file.url, offset=8
        )
    with located(path=file.url, offset=8):
        listed = _table(whole, 8 + length, text) or _from_json(whole, 8 + length, text)
    _require_tiling(listed, whole.nbytes - 8 - length, file)
    return listed.tensors, listed.metadata or {}


Form = tuple[TensorSpec, tuple[int, ...], int]  # the spec, strides and bytes of a tensor as the header tells it
Column = list[bytes]


class _Listed:
    """What the entries of a header say: the tensors, and column by column where each lies."""

    def __init__(self, whole: Span, data: int) -> None:
        self.whole, self.data = whole, data
        self.tensors: dict[str, LazyTensor] = {}
        self.sizes = 0
        self.begins: list[int] = []
        self.ends: list[int] = []
        self.metadata: dict[str, str] | None = None

    def add(self, name: str, form: Form, begin: int, end: int) -> None:
        spec, strides, needed = form
        if end - begin != needed:
            what = f"{spec.dtype} {list(spec.shape)} needs {needed} bytes and its offsets hold {end - begin}"
            raise CorruptFileError(what, offset=self.data + begin)
        if self.data + end > self.whole.nbytes:
            raise CorruptFileError(
                f"the data ends at byte {self.whole.nbytes} and this tensor at {self.data + end}: the file is cut", offset=self.data + begin
            )
        self.tensors[name] = LazyTensor(spec, Stored(self.whole.part(self.data + begin, needed), 0, strides))
        self.begins.append(begin)
        self.ends.append(end)

    def add_rows(self, name: Column, dtype: Column, shape: Column, begin: Column, end: Column) -> bool:
        """Tensors as a table spells them; False where one cannot stand in it. Each is looked at alone only where something is wrong."""
        if self._add_columns(name, dtype, shape, begin, end):
            return True
        for raw, code, sizes, first, last in zip(name, dtype, shape, begin, end, strict=True):
            unquoted = json.loads(raw.decode()) if b"\\" in raw else raw[1:-1].decode()
            if unquoted in self.tensors or unquoted == "__metadata__" or len(self.tensors) == _MAX_TENSORS:
                return False
            with located(tensor=unquoted):
                self.add(unquoted, _form_of(code, sizes), int(first), int(last))
        return True

    def _add_columns(self, raw: Column, codes: Column, shapes: Column, firsts: Column, lasts: Column) -> bool:
        """All rows at once, many times as fast; False where any is wrong."""
        text, count = b"".join(raw), len(self.tensors) + len(raw)
        self.sizes += b"".join(shapes).count(b",")
        if self.sizes > _MOST_SIZES + _DIMENSIONS * count:
            raise UnsupportedError(f"shapes of more than {_DIMENSIONS} dimensions on the average are not read")
        try:
            names = [json.loads(name.decode()) for name in raw] if b"\\" in text else text.decode()[1:-1].split('""')
            specs, strides, needed = zip(*map(_form_of, codes, shapes), strict=True)
        except ValueError:
            return False
        begins, ends = list(map(int, firsts)), list(map(int, lasts))
        if tuple(map(sub, ends, begins)) != needed or self.data + max(ends) > self.whole.nbytes or count > _MAX_TENSORS:
            return False
        part = self.whole.part(self.data, 0)
        spans = map(made, repeat(Span), zip(repeat(part.file), map(add, begins, repeat(part.start)), needed, repeat(part.check)))
        self.tensors.update(zip(names, stored_tensors(specs, spans, strides), strict=True))
        self.begins += begins
        self.ends += ends
        return len(self.tensors) == count and "__metadata__" not in self.tensors


def _table(whole: Span, data: int, text: bytes) -> _Listed | None:
    """What a header says that is laid out as writers do; None where it is not."""
    listed = _Listed(whole, data)
    at, is_last, length = text.index(b"{") + 1, False, 0
    for _ in range(_MOST_PIECES):
        if is_last:
            break
        if held := _METADATA.match(text, at):
            if listed.metadata is not None:
                raise CorruptFileError("the name '__metadata__' stands there twice")
            start, stop = held.span(1)
            listed.metadata = json.loads(str(memoryview(text)[start:stop], "utf-8"), object_pairs_hook=unique_pairs)
            at, is_last = held.end(), held["next"] == b"}"
            continue
        if (first := next(filter(None, (row.match(text, at, at + _MAX_ENTRY) for row in _ROWS)), None)) is None:
            return None
        piece = text[at : max(first.end(), at + min(2 * length, _PIECE))]  # soon long, and short where entries are laid out in turns
        table = _TABLES[first.re]
        cells = table.split(piece)
        columns = {name: cells[group :: table.groups + 1] for name, group in table.groupindex.items()}
        odd = columns.pop("odd")[-1]
        if odd is not None:
            columns = {name: column[:-1] for name, column in columns.items()}
        follow = columns.pop("next")
        if b"}" in follow[:-1] or not listed.add_rows(**columns):
            return None
        length = len(piece) - len(odd or b"")
        at, is_last = at + length, follow[-1] == b"}"
    return listed if is_last and not text[at:].strip(b" \t\n\r") else None


def _from_json(whole: Span, data: int, text: bytes) -> _Listed:
    """The same of any header; most of those that come here are damaged, and their errors say how."""
    if len(text) > _MAX_ODD or sum(map(text.count, (b",", b"[", b"{"))) > _MAX_VALUES:
        raise UnsupportedError(f"the header of {len(text)} bytes is no table of at most {_MAX_TENSORS} tensors as writers lay it out")
    header = json.loads(text.decode("utf-8"), object_pairs_hook=unique_pairs)
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CorruptFileError("__metadata__ must map text to text")
    listed = _Listed(whole, data)
    listed.metadata = metadata
    for name, entry in header.items():
        with located(tensor=name):
            listed.add(name, *_entry(entry))
    return listed


def _entry(entry: Any) -> tuple[Form, int, int]:
    if not isinstance(entry, dict) or entry.keys() != _KEYS:
        raise CorruptFileError("an entry must have exactly dtype, shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not (_counts(shape) and _counts(offsets) and len(offsets) == 2 and offsets[0] <= offsets[1]):
        raise CorruptFileError("shape and data_offsets must be lists of counts")
    if len(shape) > 64:
        raise CorruptFileError(f"a shape of {len(shape)} dimensions; torch has 64 at most")
    if not isinstance(code, str):
        raise CorruptFileError("the element type is no text")
    return _form(code, tuple(shape)), *offsets


@lru_cache(maxsize=4096)
def _form_of(code: bytes, shape: bytes) -> Form:
    counts = tuple(map(int, shape.split(b","))) if shape.strip() else ()
    if not _counts(list(counts)):
        raise CorruptFileError("shape and data_offsets must be lists of counts")
    return _form(code.decode(), counts)


@lru_cache(maxsize=4096)
def _form(code: str, shape: tuple[int, ...]) -> Form:
    if code in _BITS:
        raise UnsupportedError(f"the element type {code} has no counterpart in torch")
    if code not in CODES:
        raise CorruptFileError(f"{code!r} is no element type of the format")
    spec = TensorSpec(DTYPES[CODES[code]], shape)
    if spec.dtype.name == "float4_e2m1fn_x2":
        if not shape or shape[-1] % 2:  # the file counts 4-bit values; torch counts bytes of two
            raise CorruptFileError("a 4-bit tensor must have an even last dimension")
        spec = TensorSpec(spec.dtype, (*shape[:-1], shape[-1] // 2))
    return spec, row_major(spec.shape), spec.nbytes


def _counts(value: Any) -> bool:
    return isinstance(value, list) and not [n for n in value if type(n) is not int or n < 0 or n >= _MAX_COUNT]


def _require_tiling(listed: _Listed, total: int, file: FileRef) -> None:
    at, begins, ends = 0, listed.begins, listed.ends
    if begins == [0, *ends[:-1]]:  # in order, as most are
        at = ends[-1]
    else:
        for begin, end, name in sorted(zip(begins, ends, listed.tensors, strict=True)):
            if begin != at:
                what = "overlaps the one before it" if begin < at else f"leaves a hole of {begin - at} bytes before it"
                raise CorruptFileError(f"the tensor {what}", path=file.url, tensor=name)
            at = end
    if at != total:
        raise CorruptFileError(f"the tensors cover {at} bytes of {total}: the file is cut, or has bytes that nothing names", path=file.url)
