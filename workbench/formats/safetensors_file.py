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
from collections.abc import Iterator
from functools import lru_cache
from itertools import permutations
from typing import Any

from workbench.checkpoint import Checkpoint
from workbench.dtypes import DTYPES
from workbench.errors import CorruptFileError, UnsupportedError, located
from workbench.files import FileRef, Span
from workbench.names import unique_pairs
from workbench.strided import row_major
from workbench.tensors import LazyTensor, Stored, TensorSpec

MAX_HEADER = 100_000_000
_MAX_TENSORS = 1_000_000
_MAX_WIDE = 160 << 20  # bytes of a header as Python holds text, one to four for each character
_MAX_ODD, _MAX_VALUES = 16 << 20, 1_000_000  # bytes and values of a header that is JSON, and no table as writers lay it out
_MAX_ESCAPES = 4_000_000
_MAX_ENTRY = 1 << 16  # bytes of a tensor's entry
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
    return re.compile(text + rb" (?P<next>[,}])|(?P<odd>[\s\S])".replace(b" ", _SPELLED[0][1]))


_METADATA = _spelled(rb' "__metadata__" : (\{ (?:~T : ~T (?:, ~T : ~T ){0,500000}+)?+\})')
_ROWS = [_spelled(rb" (?P<name>~T) : \{ " + rb" , ".join(fields) + rb" \}") for fields in permutations(_FIELDS)]
_BITS = {"F6_E2M3": 6, "F6_E3M2": 6}  # in the specification; torch has no such type


def open_file(file: FileRef) -> Checkpoint:
    """List a safetensors file.

    Raises:
        CorruptFileError: the header is damaged, or the tensors do not tile the data exactly.
    Cost: two reads, of 8 bytes and of the header.
    """
    tensors, metadata = read_header(file)
    restored = restored_aliases(tensors, metadata)
    named = {**tensors, **{a: tensors[k] for a, k in restored.items()}}
    return Checkpoint(named, name=file.name, format="safetensors", metadata=metadata, restored=restored, source=file)


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
        tensors, ends, metadata = _table(whole, 8 + length, text) or _from_json(whole, 8 + length, text)
    _require_tiling(ends, whole.nbytes - 8 - length, file)
    return tensors, metadata


Listed = tuple[dict[str, LazyTensor], list[tuple[int, int, str]], dict[str, str]]


def _table(whole: Span, data: int, text: bytes) -> Listed | None:
    """The tensors, where each lies, and the metadata of a header that is laid out as writers do; None where it is not."""
    tensors: dict[str, LazyTensor] = {}
    metadata: dict[str, str] | None = None
    ends = []
    for found in _rows(text):
        if found is None:
            return None
        if found.re is _METADATA:
            start, stop = found.span(1)
            if metadata is not None:
                raise CorruptFileError("the name '__metadata__' stands there twice")
            metadata = json.loads(str(memoryview(text)[start:stop], "utf-8"), object_pairs_hook=unique_pairs)
            continue
        raw, code, shape, first, last = found.group("name", "dtype", "shape", "begin", "end")
        name = json.loads(raw.decode()) if b"\\" in raw else raw[1:-1].decode()
        if name in tensors or name == "__metadata__" or len(tensors) == _MAX_TENSORS:
            return None
        begin, end = int(first), int(last)
        try:
            tensors[name] = _placed(whole, data, _form_of(code, shape), begin, end)
        except Exception:  # entering a context for each of very many would take as long as reading it
            with located(tensor=name):
                raise
        ends.append((begin, end, name))
    return tensors, ends, metadata or {}


def _rows(text: bytes) -> Iterator[re.Match[bytes] | None]:
    """The entries one behind another; None where something else comes."""
    at, is_last = text.index(b"{") + 1, False
    while not is_last:
        started, held = at, _METADATA.match(text, at)
        if held is None or held.lastgroup != "next":
            row = next((row for row in _ROWS if (first := row.match(text, at, at + _MAX_ENTRY)) and first.lastgroup == "next"), None)
        for found in [held] if held and held.lastgroup == "next" else row.finditer(text, at) if row else ():
            if is_last or found.lastgroup != "next":
                break
            yield found
            at, is_last = found.end(), found["next"] == b"}"
        if at == started:
            break
    if not is_last or text[at:].strip(b" \t\n\r"):
        yield None


def _from_json(whole: Span, data: int, text: bytes) -> Listed:
    """The same of any header; most of those that come here are damaged, and their errors say how."""
    if len(text) > _MAX_ODD or sum(map(text.count, (b",", b"[", b"{"))) > _MAX_VALUES:
        raise UnsupportedError(f"the header of {len(text)} bytes is no table of at most {_MAX_TENSORS} tensors as writers lay it out")
    header = json.loads(text.decode("utf-8"), object_pairs_hook=unique_pairs)
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CorruptFileError("__metadata__ must map text to text")
    tensors, ends = {}, []
    for name, entry in header.items():
        with located(tensor=name):
            tensors[name], begin, end = _entry(whole, data, entry)
        ends.append((begin, end, name))
    return tensors, ends, metadata


def _entry(whole: Span, data: int, entry: Any) -> tuple[LazyTensor, int, int]:
    if not isinstance(entry, dict) or entry.keys() != _KEYS:
        raise CorruptFileError("an entry must have exactly dtype, shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not (_counts(shape) and _counts(offsets) and len(offsets) == 2 and offsets[0] <= offsets[1]):
        raise CorruptFileError("shape and data_offsets must be lists of counts")
    if len(shape) > 64:
        raise CorruptFileError(f"a shape of {len(shape)} dimensions; torch has 64 at most")
    if not isinstance(code, str):
        raise CorruptFileError("the element type is no text")
    begin, end = offsets
    return _placed(whole, data, _form(code, tuple(shape)), begin, end), begin, end


Form = tuple[TensorSpec, tuple[int, ...], int]  # the spec, strides and bytes of a tensor as the header tells it


def _placed(whole: Span, data: int, form: Form, begin: int, end: int) -> LazyTensor:
    spec, strides, needed = form
    if end - begin != needed:
        what = f"{spec.dtype} {list(spec.shape)} needs {needed} bytes and its offsets hold {end - begin}"
        raise CorruptFileError(what, offset=data + begin)
    if data + end > whole.nbytes:
        raise CorruptFileError(
            f"the data ends at byte {whole.nbytes} and this tensor at {data + end}: the file is cut", offset=data + begin
        )
    return LazyTensor(spec, Stored(whole.part(data + begin, needed), 0, strides))


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


def _require_tiling(ends: list[tuple[int, int, str]], total: int, file: FileRef) -> None:
    at = 0
    for begin, end, name in sorted(ends):
        if begin != at:
            what = "overlaps the one before it" if begin < at else f"leaves a hole of {begin - at} bytes before it"
            raise CorruptFileError(f"the tensor {what}", path=file.url, tensor=name)
        at = end
    if at != total:
        raise CorruptFileError(f"the tensors cover {at} bytes of {total}: the file is cut, or has bytes that nothing names", path=file.url)
