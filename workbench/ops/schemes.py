"""Schemes of quantization: what becomes of a tensor in fewer bits, how many bytes it takes, and the arithmetic itself.

    int8             q = round(w / scale), in [-127, 127]; asymmetric: round(w / scale) + zero point, in [-128, 127]
    int4             the same in [-8, 7], eight values in an int32 word, the first in its lowest bits
    float8_e4m3fn    q = w / scale as an 8-bit float, the largest magnitude at 448 (float8_e5m2: at 57344)
    bfloat16, float16    a cast; float32: left as it is

One float32 scale serves the tensor, a channel (dimension 0) or a group (consecutive values of the last dimension; where that has no whole
number of groups, as in convolutions, of all dimensions but the first). No value is clipped, so |w - dequantized| <= scale / 2 for
integers and |w - dequantized| <= max(|w| * 2**-(mantissa bits + 1), scale * smallest / 2) for floats, plus the rounding of float32;
`search` gives that bound up for a smaller squared error.

Names and layouts are those of compressed-tensors: see workbench.ops.quantization. Nothing here needs a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from workbench.dtypes import DTYPES, DType, flat, to_torch
from workbench.errors import SelectionError
from workbench.names import suggest
from workbench.ops.scope import wide

if TYPE_CHECKING:
    import torch

Per = Literal["tensor", "channel", "group"]
BITS = {"int8": 8, "int4": 4, "float8_e4m3fn": 8, "float8_e5m2": 8, "bfloat16": 16, "float16": 16, "float32": 32}
GRID = tuple(1 - step / 32 for step in range(21))  # parts of the full range that a search tries: all of it first
_GROUP = 128
_WORD = 8  # int4 values in a word


@dataclass(frozen=True)
class Scheme:
    """One way of storing a tensor in fewer bits.

    Attributes:
        name: "int8", "int4", "float8_e4m3fn", "float8_e5m2", "bfloat16", "float16", or "float32" (left as it is).
        per: what one scale serves; where absent, a group for int4 or where `group_size` is given, else a channel.
        group_size: values in a group; 128 where absent.
        symmetric: False stores a zero point beside each scale; integers only.
        search: take the scale of the least squared error over a grid of clipped ranges; the full range is one of them.
    """

    name: str
    per: Per | None = None
    group_size: int | None = None
    symmetric: bool = True
    search: bool = False

    def __post_init__(self) -> None:
        if self.name not in BITS:
            raise SelectionError(f"{self.name!r} is no scheme of quantization", hint="there are " + ", ".join(BITS))
        per = self.per or ("group" if self.group_size is not None or self.name == "int4" else "channel")
        if per not in ("tensor", "channel", "group"):
            raise SelectionError(f'per={per!r}: it can be "tensor", "channel" or "group"')
        size = self.group_size if self.group_size is not None or per != "group" else _GROUP
        if (size is not None and per != "group") or (size is not None and (not isinstance(size, int) or size < 1)):
            raise SelectionError(f"group_size={size!r} with per={per!r}: it is a whole number of values, and goes with per='group'")
        plain = per == "channel" and self.symmetric and not self.search
        if not self.scaled and not plain:
            raise SelectionError(f"{self.name} is a cast and has no scales to choose", hint="give it no other option")
        if not self.symmetric and not self.is_integer:
            raise SelectionError(f"{self.name} has a sign of its own and no zero point", hint="symmetric=False is for int8 and int4")
        object.__setattr__(self, "per", per)
        object.__setattr__(self, "group_size", size)

    @classmethod
    def of(cls, told: str | Mapping[str, Any] | Scheme) -> Scheme:
        """The scheme that a name, a mapping such as {"scheme": "int4", "group_size": 64}, or a Scheme stands for.

        Raises:
            SelectionError: no such scheme, an unknown option, or options that do not go together.
        """
        if isinstance(told, Scheme):
            return told
        if isinstance(told, str):
            return cls(told)
        options = dict(told) if isinstance(told, Mapping) else {}
        known = {"scheme", *(field.name for field in fields(cls))} - {"name"}
        if "scheme" not in options or (strange := sorted(map(str, options.keys() - known))):
            what = f"{told!r} names no scheme" if "scheme" not in options else f"a scheme has no option {strange[0]!r}"
            close = suggest(strange[0], known) if "scheme" in options else []
            raise SelectionError(what, hint=f"did you mean {close[0]}?" if close else 'such as {"scheme": "int4", "group_size": 64}')
        return cls(options.pop("scheme"), **options)

    def to_dict(self) -> dict[str, Any]:
        """What `of` takes, as JSON; defaults are left out."""
        default = Scheme(self.name)
        keys = ("per", "group_size", "symmetric", "search")
        told = {key: value for key in keys if (value := getattr(self, key)) not in (None, getattr(default, key))}
        if "group_size" in told:
            told.pop("per", None)
        return {"scheme": self.name, **told}

    def __str__(self) -> str:
        size = f" of {self.group_size}" if self.per == "group" else ""
        marks = "".join(text for text, told in ((", asymmetric", not self.symmetric), (", searched", self.search)) if told)
        return f"{self.name} per {self.per}{size}{marks}" if self.scaled else self.name

    @property
    def bits(self) -> float:
        """Bits a value, scales left out."""
        return BITS[self.name]

    @property
    def is_integer(self) -> bool:
        return self.name.startswith("int")

    @property
    def scaled(self) -> bool:
        """Whether there are scales, or only a cast."""
        return self.bits <= 8

    def refusal(self, shape: tuple[int, ...], dtype: DType) -> str | None:
        """Why `quantize` leaves such a tensor as it is, or None."""
        row = math.prod(shape[1:]) if len(shape) > 1 else 0
        if not dtype.is_floating:
            return f"{dtype} is no floating type"
        if self.bits >= 8 * dtype.itemsize or self.name == "float32":
            return f"{dtype} is as small already" if self.name != "float32" else "it is to stay"
        if not math.prod(shape):
            return "it holds no values"
        if self.per == "group" and (not row or row % (self.group_size or 1)):
            return f"groups of {self.group_size} do not divide its rows"
        if self.name == "int4" and row <= _WORD:
            return f"int4 packs rows of more than {_WORD} values"
        return None

    def layout(self, shape: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...]]]:
        """What `quantize` stores for a tensor that it takes: suffix of the name -> (dtype, shape)."""
        if not self.scaled:
            return {"": (self.name, shape)}
        rows = self.rows(shape)
        scales: tuple[int, ...] = (1,)
        if self.per == "group":
            scales = (*rows[:-1], rows[-1] // self.span(shape))
        elif self.per == "channel" and len(shape) > 1:
            scales = (shape[0], *[1] * (len(rows) - 1))
        out: dict[str, tuple[str, tuple[int, ...]]] = {"": (self.name, shape)}
        zeros: tuple[str, tuple[int, ...]] = ("int8", scales)
        if self.name == "int4":
            out = {"_packed": ("int32", (*rows[:-1], -(-rows[-1] // _WORD)))}
            if self.per != "tensor":
                zeros = ("int32", (*scales[:-2], -(-scales[-2] // _WORD), scales[-1]))
        out["_scale"] = ("float32", scales)
        if not self.symmetric:
            out["_zero_point"] = zeros
        return {**out, "_shape": ("int64", (len(shape),))} if self.name == "int4" else out

    def nbytes(self, shape: tuple[int, ...], dtype: DType) -> int:
        """Bytes of what `quantize` makes of such a tensor where it is named: codes, scales, zero points and shape."""
        if self.refusal(shape, dtype) is not None:
            return math.prod(shape) * dtype.itemsize
        return sum(DTYPES[name].itemsize * math.prod(part) for name, part in self.layout(shape).values())

    def span(self, shape: tuple[int, ...]) -> int:
        """Consecutive values that one scale serves."""
        if self.per == "group":
            return self.group_size or 1
        return math.prod(shape[1:] if self.per == "channel" and len(shape) > 1 else shape)

    def rows(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that codes are packed and grouped in: the tensor's own, or all dimensions but the first as one row."""
        whole = math.lcm(self.group_size or 1, _WORD if self.name == "int4" else 1)
        return shape if len(shape) < 3 or shape[-1] % whole == 0 else (shape[0], math.prod(shape[1:]))


def fake_quantize(values: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """What `dequantize` gives back of `values` [rows, …] after `quantize`, as float32; whole rows of a tensor give those rows of the result.

    Raises:
        SelectionError: NaN, Inf, or a shape that the scheme does not take.
    """

    if not scheme.scaled or scheme.name == "float32":
        return values.to(to_torch(DTYPES[scheme.name])).float()
    if reason := scheme.refusal(tuple(values.shape), DTYPES["float64"]):
        raise SelectionError(f"{scheme} does not take a tensor of shape {list(values.shape)}: {reason}")
    spans = wide(values).reshape(-1, scheme.span(tuple(values.shape)))
    scale, zero = fit(spans, scheme)
    return decode(encode(spans, scale, zero, scheme), scale, zero).view(values.shape)


def limits(scheme: Scheme) -> tuple[float, float]:
    """The least and the largest code."""
    import torch

    if not scheme.is_integer:
        info = torch.finfo(to_torch(DTYPES[scheme.name]))
        return info.min, info.max
    return (-8, 7) if scheme.name == "int4" else (-127 if scheme.symmetric else -128, 127)


def scales(low: torch.Tensor, high: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(float32 scales, int8 zero points or None) of spans whose values reach from `low` to `high`; scale 1 where all is zero.

    Raises:
        SelectionError: NaN or Inf, or values that no float32 scale reaches.
    """
    import torch

    least, most = limits(scheme)
    if scheme.symmetric:
        scale = torch.maximum(high / most, low / least)
    else:
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = high / (most - least) - low / (most - least)
    peaks, scale = scale, scale.float()
    if not math.isfinite(float(scale.sum(dtype=torch.float64))):
        held = "NaN or Inf" if not bool(torch.isfinite(peaks).all()) else "values beyond what a float32 scale expresses"
        raise SelectionError(
            f"the tensor holds {held}, which {scheme.name} cannot carry", hint="wb.stats tells where; leave it out with exclude="
        )
    tiny = torch.finfo(torch.float32).tiny  # below it a float32 scale loses its precision
    if scale.numel() and float(scale.amin()) < tiny:
        scale = torch.where(peaks > 0, scale.clamp_min(tiny), torch.ones_like(scale))
    return scale, None if scheme.symmetric else (least - (low / scale).round()).to(torch.int8)


def fit(values: torch.Tensor, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(scales, zero points or None) of `values` [spans, values in a span], searched for where the scheme says so."""
    import torch

    low, high = values.amin(1), values.amax(1)
    scale, zero = scales(low, high, scheme)
    if scheme.search:
        best = error(values, scale, zero, scheme)
        for ratio in GRID[1:]:
            tried = scales(low * ratio, high * ratio, scheme)
            lost = error(values, *tried, scheme)
            better = lost < best
            best, scale = torch.where(better, lost, best), torch.where(better, tried[0], scale)
            zero = None if zero is None or tried[1] is None else torch.where(better, tried[1], zero)
    return scale, zero


def error(values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, scheme: Scheme) -> torch.Tensor:
    """Squared error of each span, summed in float64."""
    import torch

    lost = decode(encode(values, scale, zero, scheme), scale, zero).sub_(values)
    return lost.mul_(lost).sum(1, dtype=torch.float64)


def encode(values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, scheme: Scheme) -> torch.Tensor:
    """Codes of `values` [spans, values in a span]: int8 for integers (one a value, int4 too), else the 8-bit float."""
    import torch

    codes = values / scale[:, None]
    if scheme.is_integer:
        codes.round_()
    if zero is not None:
        codes += zero[:, None]
    if zero is not None or scheme.search:  # else the scale leaves nothing outside
        codes.clamp_(*limits(scheme))
    return codes.to(torch.int8 if scheme.is_integer else to_torch(DTYPES[scheme.name]))


def decode(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
    """(codes - zero points) * scales of [spans, codes in a span], in the type of float32 or wider scales."""
    import torch

    out = codes.to(torch.float64 if scale.dtype == torch.float64 else torch.float32)
    if zero is not None:
        out -= zero[:, None].to(out.dtype)
    return out.mul_(scale[:, None])


def pack(codes: torch.Tensor) -> torch.Tensor:
    """int8 codes in [-8, 7] of [rows, columns] -> int32 words [rows, ceil(columns / 8)], the first code in the lowest bits."""
    import torch

    codes = flat(codes).view(torch.uint8).add(8).view(codes.shape)
    if short := -codes.shape[1] % _WORD:
        codes = torch.nn.functional.pad(codes, (0, short))
    pairs = codes.view(torch.int16)  # little-endian: the first of two codes in the low byte
    return (pairs & 15).bitwise_or_((pairs >> 4) & 240).to(torch.uint8).view(torch.int32)


def unpack(words: torch.Tensor, columns: int, bits: int = 4) -> torch.Tensor:
    """int32 words of [rows, words in a row] -> int8 codes [rows, columns], 2, 4 or 8 bits each."""
    import torch

    stored = flat(words).view(torch.uint8)
    codes = torch.stack([stored >> shift for shift in range(0, 8, bits)], -1).view(len(words), -1)[:, :columns]
    return (codes & ((1 << bits) - 1)).sub_(1 << (bits - 1)).view(torch.int8)
