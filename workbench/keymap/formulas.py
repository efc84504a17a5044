"""The formulas of `values.FORMULAS`, each under its name there: ``(params, *sources) -> tensor``. Imported when values are computed.

Quantized values are computed in float32 and cast once, at the end, by whoever asked; the rest stays in the element type of its sources.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from workbench.errors import CorruptFileError

Params = Mapping[str, Any]
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
_AWQ_SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)  # the nibble of column 0, 1, 2 ... in a word


def weight_norm(p: Params, g: Tensor, v: Tensor) -> Tensor:
    return v * (g / norm(p, v))


def norm(p: Params, v: Tensor) -> Tensor:
    out: Tensor = torch.linalg.vector_norm(v, dim=p["over"], keepdim=p["over"] is not None)
    return out


def spectral_norm(p: Params, original: Tensor, u: Tensor, v: Tensor) -> Tensor:
    return original / u.dot(original.movedim(p["dim"], 0).flatten(1).mv(v))


def product(p: Params, original: Tensor, mask: Tensor) -> Tensor:
    return original * mask.to(original.dtype)


def shifted(p: Params, weight: Tensor) -> Tensor:
    out: Tensor = weight.float() + p["by"]
    return out


def lora(p: Params, base: Tensor, a: Tensor, b: Tensor) -> Tensor:
    delta: Tensor = p["scale"] * (b.float().flatten(1) @ a.float().flatten(1))
    return base + delta.reshape(base.shape)


def lora_transposed(p: Params, base: Tensor, a: Tensor, b: Tensor) -> Tensor:
    delta: Tensor = p["scale"] * (b.float() @ a.float()).T
    return base + delta


def scale(p: Params, codes: Tensor, scales: Tensor) -> Tensor:
    return codes.float() * _spread(p, scales.float())


def scale_exponent(p: Params, codes: Tensor, scales: Tensor) -> Tensor:
    return codes.float() * _spread(p, torch.exp2(scales.float() - 127))


def scale_shift(p: Params, codes: Tensor, scales: Tensor, zeros: Tensor) -> Tensor:
    return (codes.float() - _spread(p, zeros.float())) * _spread(p, scales.float())


def scale_packed(p: Params, words: Tensor, scales: Tensor) -> Tensor:
    codes: Tensor = _unpacked(words, p["bits"])[..., : p["shape"][-1]] - (1 << p["bits"] - 1)
    return codes.float() * _spread(p, scales.float())


def int8_scb(p: Params, codes: Tensor, absmax: Tensor) -> Tensor:
    return codes.float() * absmax.float()[:, None] / 127


def fp4(p: Params, codes: Tensor, exponents: Tensor) -> Tensor:
    values = _e2m1(codes).reshape(*exponents.shape, -1) * torch.exp2(exponents.view(torch.uint8).float() - 127)[..., None]
    return values.flatten(-2)


def fp4_transposed(p: Params, codes: Tensor, exponents: Tensor) -> Tensor:
    values = _e2m1(codes).reshape(*exponents.shape, -1) * torch.exp2(exponents.view(torch.uint8).float() - 127)[..., None]
    return values.flatten(-2).mT


def nvfp4(p: Params, codes: Tensor, scales: Tensor, factor: Tensor) -> Tensor:
    return (_e2m1(codes).reshape(*scales.shape, -1) * (scales.float() * factor.float())[..., None]).flatten(-2)


def nvfp4_divided(p: Params, codes: Tensor, scales: Tensor, divisor: Tensor) -> Tensor:
    return (_e2m1(codes).reshape(*scales.shape, -1) * (scales.float() / divisor.float())[..., None]).flatten(-2)


def bnb_4bit(p: Params, codes: Tensor, absmax: Tensor, table: Tensor) -> Tensor:
    values = table.float()[torch.stack([codes >> 4, codes & 15], -1).flatten().long()][: absmax.numel() * p["blocksize"]]
    return (values * absmax.float().repeat_interleave(p["blocksize"])[: values.numel()])[: _count(p)].reshape(p["shape"])


def bnb_4bit_nested(p: Params, codes: Tensor, absmax: Tensor, table: Tensor, outer: Tensor, outer_table: Tensor) -> Tensor:
    spread = outer.float().repeat_interleave(p["nested_blocksize"])[: absmax.numel()]
    return bnb_4bit(p, codes, outer_table.float()[absmax.flatten().long()] * spread + p["offset"], table)


def gptq(p: Params, words: Tensor, zeros: Tensor, scales: Tensor, group: Tensor) -> Tensor:
    held, codes, rows = _unpacked(zeros, p["bits"]), _unpacked(words.T, p["bits"]).T, group.long()
    if p["shift"] and bool((held == (1 << p["bits"]) - 1).any()):  # writers borrow and readers wrap there, each in its own way
        raise CorruptFileError("a zero point of this GPTQ v1 tensor is at the end of its range, and readers do not agree on its meaning")
    held = held + int(p["shift"])
    return ((codes - held[rows]).float() * scales.float()[rows]).T


def gptq_in_order(p: Params, words: Tensor, zeros: Tensor, scales: Tensor) -> Tensor:
    return gptq(p, words, zeros, scales, torch.arange(p["shape"][1]) // p["group"])


def awq(p: Params, words: Tensor, zeros: Tensor, scales: Tensor) -> Tensor:
    shifts = torch.tensor(_AWQ_SHIFTS, dtype=torch.int32)
    codes, held = (((packed[..., None] >> shifts) & 15).flatten(1) for packed in (words, zeros))
    return ((codes - held.repeat_interleave(p["group"], 0)).float() * scales.float().repeat_interleave(p["group"], 0)).T


def _count(p: Params) -> int:
    return int(torch.Size(p["shape"]).numel())


def _spread(p: Params, scales: Tensor) -> Tensor:
    """One scale for each element: each is repeated over its block, and the last block may be cut short."""
    return torch.kron(scales.reshape(p["grid"]), torch.ones(p["block"]))[tuple(map(slice, p["shape"]))]


def _unpacked(words: Tensor, bits: int) -> Tensor:
    """Unsigned numbers of `bits` bits from the 32-bit words of the last axis, the lowest bits first."""
    return ((words[..., None] >> torch.arange(0, 32, bits, dtype=torch.int32)) & ((1 << bits) - 1)).flatten(-2)


def _e2m1(codes: Tensor) -> Tensor:
    """Two 4-bit floats in a byte, the low half first."""
    held = codes.view(torch.uint8)
    return torch.tensor(_E2M1)[torch.stack([held & 15, held >> 4], -1).flatten(-2).long()]
