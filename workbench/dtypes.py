"""Element types: torch's names, what each format calls them, and how to read a few elements without torch.

Owns the one table of dtypes. Imports neither torch nor numpy until a tensor is really made. A new element type is
one row here; how a format spells it is one entry in that format's map.
"""

from __future__ import annotations

import math
import struct
import sys
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from workbench.errors import UnsupportedError

if TYPE_CHECKING:
    import torch

Kind = Literal["float", "int", "bool", "complex", "bits", "quantized"]


@dataclass(frozen=True)
class DType:
    """An element type.

    Attributes:
        name: torch's name without ``torch.``.
        itemsize: bytes of one stored element (packed types store several values in one element).
        kind: what family of values it holds.
        unit: width in bytes of what a byte order applies to (half of itemsize for complex numbers).
    """

    name: str
    itemsize: int
    kind: Kind

    @property
    def unit(self) -> int:
        return self.itemsize // 2 if self.kind == "complex" else self.itemsize

    @property
    def is_floating(self) -> bool:
        return self.kind == "float"

    def __str__(self) -> str:
        return self.name


_ROWS: tuple[tuple[str, int, Kind], ...] = (
    ("float64", 8, "float"), ("float32", 4, "float"), ("float16", 2, "float"), ("bfloat16", 2, "float"),
    ("float8_e4m3fn", 1, "float"), ("float8_e4m3fnuz", 1, "float"), ("float8_e5m2", 1, "float"),
    ("float8_e5m2fnuz", 1, "float"), ("float8_e8m0fnu", 1, "float"), ("float4_e2m1fn_x2", 1, "bits"),
    ("int64", 8, "int"), ("int32", 4, "int"), ("int16", 2, "int"), ("int8", 1, "int"),
    ("uint64", 8, "int"), ("uint32", 4, "int"), ("uint16", 2, "int"), ("uint8", 1, "int"), ("bool", 1, "bool"),
    ("complex128", 16, "complex"), ("complex64", 8, "complex"), ("complex32", 4, "complex"),
    ("bits8", 1, "bits"), ("bits16", 2, "bits"), ("bits1x8", 1, "bits"), ("bits2x4", 1, "bits"), ("bits4x2", 1, "bits"),
    ("qint8", 1, "quantized"), ("quint8", 1, "quantized"), ("qint32", 4, "quantized"),
    ("quint4x2", 1, "quantized"), ("quint2x4", 1, "quantized"),
)  # fmt: skip
DTYPES: dict[str, DType] = {name: DType(name, itemsize, kind) for name, itemsize, kind in _ROWS}
# torch can name these, and lays out one element in a byte; it neither saves them nor computes with them
SUB_BYTE: dict[str, DType] = {f"{sign}int{bits}": DType(f"{sign}int{bits}", 1, "bits") for sign in ("", "u") for bits in range(1, 8)}

_ALIASES = {"float": "float32", "double": "float64", "half": "float16", "long": "int64", "int": "int32", "short": "int16"}


# numpy's kind and size
NUMPY_CODES = {
    "b1": "bool", "i1": "int8", "i2": "int16", "i4": "int32", "i8": "int64", "u1": "uint8", "u2": "uint16", "u4": "uint32", "u8": "uint64",
    "f2": "float16", "f4": "float32", "f8": "float64", "c8": "complex64", "c16": "complex128",
}  # fmt: skip


def dtype(name: Any) -> DType:
    """The DType called `name`: a DType, torch's name with or without ``torch.``, its alias, or a torch.dtype.

    Raises:
        UnsupportedError: no such element type.
    """
    if isinstance(name, DType):
        return name
    text = str(name).removeprefix("torch.")
    found = DTYPES.get(_ALIASES.get(text, text))
    if found is None:
        raise UnsupportedError(f"{text!r} is no element type this library knows", hint="known: " + ", ".join(DTYPES))
    return found


def to_torch(dt: DType) -> torch.dtype:
    import torch

    return getattr(torch, dt.name)  # type: ignore[no-any-return]


def from_torch(torch_dtype: torch.dtype) -> DType:
    return dtype(torch_dtype)


_STRUCT_CODES = {
    "float64": "d", "float32": "f", "float16": "e", "int64": "q", "int32": "i", "int16": "h", "int8": "b", "uint64": "Q",
    "uint32": "I", "uint16": "H", "uint8": "B", "bool": "?", "complex128": "dd", "complex64": "ff", "complex32": "ee",
    "bfloat16": "H", "qint8": "b", "quint8": "B", "qint32": "i", "bits16": "H",
}  # fmt: skip

# bits of exponent, bits of mantissa, bias; finite-only types spend their top codes on numbers, "uz" types have one zero and one NaN
_FLOAT8 = {"float8_e4m3fn": (4, 3, 7), "float8_e5m2": (5, 2, 15), "float8_e4m3fnuz": (4, 3, 8), "float8_e5m2fnuz": (5, 2, 16)}


def decode(dt: DType, data: bytes, byteorder: str = "little") -> list[Any]:
    """Elements of `data` as Python numbers, without torch. Packed types give their raw byte values.

    Cost: a Python loop; meant for a peek, not for a tensor.
    """
    if dt.name in _FLOAT8 or dt.name == "float8_e8m0fnu":
        values = _float8_values(dt.name)
        return [values[code] for code in data]
    code = _STRUCT_CODES.get(dt.name, "B")
    count = len(data) // dt.itemsize
    order = "<" if byteorder == "little" else ">"
    flat = struct.unpack(f"{order}{code * count}" if len(code) > 1 else f"{order}{count}{code}", data[: count * dt.itemsize])
    if dt.kind == "complex":
        return [complex(flat[i], flat[i + 1]) for i in range(0, len(flat), 2)]
    if dt.name == "bfloat16":
        return list(struct.unpack(f"<{count}f", struct.pack(f"<{count}I", *(v << 16 for v in flat))))
    return list(flat)


@lru_cache(maxsize=8)
def _float8_values(name: str) -> tuple[float, ...]:
    if name == "float8_e8m0fnu":  # OCP MX: an exponent alone, 2**(code - 127); 0xff is NaN
        return (*(math.ldexp(1.0, code - 127) for code in range(255)), math.nan)
    return tuple(_float8_value(name, code) for code in range(256))


def _float8_value(name: str, code: int) -> float:
    exponent_bits, mantissa_bits, bias = _FLOAT8[name]
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = (code & 0x7F) >> mantissa_bits, code & ((1 << mantissa_bits) - 1)
    if name.endswith("uz"):
        if code == 0x80:
            return math.nan
    elif name == "float8_e4m3fn":
        if code & 0x7F == 0x7F:
            return math.nan
    elif exponent == (1 << exponent_bits) - 1:
        return math.nan if mantissa else sign * math.inf
    if exponent == 0:
        return sign * math.ldexp(mantissa, 1 - bias - mantissa_bits)
    return sign * math.ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits)


def out_of_range(given: torch.Tensor, cast: torch.Tensor) -> torch.Tensor:
    """Where a cast to a floating type changed real values beyond rounding: to inf or NaN, or (float8_e4m3fn has no inf) to its largest."""
    import torch

    info, values = torch.finfo(cast.dtype), given if given.dtype == torch.float64 else given.float()
    limit = info.max + math.ldexp(info.eps, math.frexp(info.max)[1] - 2)  # half a step above the largest still rounds to it
    finite = torch.isfinite(values)
    return (finite != torch.isfinite(cast if cast.dtype == torch.float64 else cast.float())) | (finite & (values.abs() > limit))


def flat(values: torch.Tensor) -> torch.Tensor:
    """The elements in logical order, one after another in memory; a view where they lie so already.

    torch calls a tensor of one element contiguous whatever its stride, and then refuses to view it as another type.
    """
    import torch

    values = values.detach().reshape(-1)
    return values if values.stride(0) == 1 else values.clone(memory_format=torch.contiguous_format)


def view_as(buffer: torch.Tensor, dt: DType, byteorder: str = "little") -> torch.Tensor:
    """A flat uint8 tensor as elements of `dt`, in this machine's byte order. Swaps in place where the file's order differs."""
    if byteorder != sys.byteorder and dt.unit > 1:
        swapped = buffer.view(-1, dt.unit).flip(1)
        buffer = swapped.contiguous().view(-1)
    if dt.kind == "quantized":  # torch has no view onto quantized types: the stored integers are what is there
        return buffer.view(to_torch(DTYPES[{"qint8": "int8", "qint32": "int32"}.get(dt.name, "uint8")]))
    return buffer.view(to_torch(dt))
