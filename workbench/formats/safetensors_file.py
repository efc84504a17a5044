"""safetensors: a header that is an index, then raw bytes.

    0       8        n, length of the header in bytes, little-endian
    8       n        JSON: name -> {"dtype", "shape", "data_offsets": [begin, end]}, and "__metadata__": text -> text
    8 + n   …        the data; tensors tile it from 0 to its end, without holes or overlap

Everything is validated when opened and no data is read. Names that `save_model` recorded as aliases of a tied tensor are restored.

Source: safetensors 0.8 README (format) and safetensors/src/tensor.rs (validation).
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from workbench.checkpoint import Checkpoint
from workbench.dtypes import DTYPES
from workbench.errors import CorruptFileError, UnsupportedError, located
from workbench.files import FileRef, Span
from workbench.names import unique_pairs
from workbench.strided import row_major
from workbench.tensors import LazyTensor, Stored, TensorSpec

MAX_HEADER = 100_000_000
_MAX_NODES = 6_000_000  # three a tensor: two million tensors
CODES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32", "U64": "uint64", "I64": "int64",
    "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64", "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E8M0": "float8_e8m0fnu", "F4": "float4_e2m1fn_x2",
}  # fmt: skip
_KEYS, _MAX_COUNT = {"dtype", "shape", "data_offsets"}, 1 << 63
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
    if text.count(b"[") + text.count(b"{") > _MAX_NODES:
        raise UnsupportedError(f"the header holds more than {_MAX_NODES} lists and objects", path=file.url, offset=8)
    with located(path=file.url, offset=8):
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique_pairs)
    raw_metadata = header.pop("__metadata__", None) or {}
    if not isinstance(raw_metadata, dict) or not all(isinstance(v, str) for v in raw_metadata.values()):
        raise CorruptFileError("__metadata__ must map text to text", path=file.url)
    tensors, ends = {}, []
    for name, entry in header.items():
        try:
            tensors[name], begin, end = _entry(whole, 8 + length, entry)
        except Exception:  # entering a context for each of very many would take as long as reading it
            with located(path=file.url, tensor=name):
                raise
        ends.append((begin, end, name))
    _require_tiling(ends, whole.nbytes - 8 - length, file)
    return tensors, raw_metadata


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
    (spec, strides, needed), (begin, end) = _form(code, tuple(shape)), offsets
    if end - begin != needed:
        raise CorruptFileError(f"{code} {shape} needs {needed} bytes and its offsets hold {end - begin}", offset=data + begin)
    if data + end > whole.nbytes:
        raise CorruptFileError(
            f"the data ends at byte {whole.nbytes} and this tensor at {data + end}: the file is cut", offset=data + begin
        )
    return LazyTensor(spec, Stored(whole.part(data + begin, needed), 0, strides)), begin, end


@lru_cache(maxsize=4096)
def _form(code: str, shape: tuple[int, ...]) -> tuple[TensorSpec, tuple[int, ...], int]:
    """(spec, strides, bytes) of a tensor as the header tells it."""
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
