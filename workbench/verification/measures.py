"""Measures: how far one tensor lies from another, gathered block by block over many batches.

Owns the arithmetic of a comparison and nothing of its verdict. Differences are taken in float64. Integers and booleans are compared
exactly. Where both sides hold NaN, or the same infinity, they agree and are counted; only pairs of finite values enter the figures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_BLOCK = 1 << 20  # elements compared at once: float64 copies stay under 32 MB
_SAMPLE = 20_000


@dataclass(frozen=True)
class Figures:
    """One output compared, over all batches and calls.

    Attributes:
        count: pairs compared.
        unequal: pairs that are not the same value (both-NaN pairs are the same).
        one_sided: pairs of which only one side is NaN or infinite, or which are infinite with unlike signs.
        both_nan: pairs that are NaN on both sides.
        max_abs, mean_abs: of |candidate - reference| over finite pairs.
        relative: ||candidate - reference||₂ / ||reference||₂; None where the reference is zero.
        max_ulp: largest distance in representable steps of the common dtype; None between unlike dtypes and for whole numbers.
        cosine: of the two as flat vectors; None where either is zero.
        snr_db: 10 log10(||reference||² / ||candidate - reference||²); None where either is zero.
        top1: fraction of rows whose largest class agrees; None without a class axis.
        scale: largest finite |reference|.
        beyond: pairs with |difference| > atol + rtol |reference|; None when neither was given.
        worst: where the largest difference lies and what stood there.
    """

    count: int
    unequal: int
    one_sided: int
    both_nan: int
    max_abs: float | None
    mean_abs: float | None
    relative: float | None
    max_ulp: int | None
    cosine: float | None
    snr_db: float | None
    top1: float | None
    scale: float
    beyond: int | None
    worst: str


class Meter:
    """Gathers one output's figures. Call `add` once per batch and call; the shapes must agree."""

    def __init__(self, *, rtol: float | None = None, atol: float | None = None) -> None:
        self._given = None if rtol is None and atol is None else (rtol or 0.0, atol or 0.0)
        self.count = self.unequal = self.one_sided = self.both_nan = self.finite = self.beyond = 0
        self.sum_abs = self.sum_diff2 = self.sum_reference2 = self.sum_candidate2 = self.dot = self.scale = 0.0
        self.max_abs = -1.0
        self.max_ulp: int | None = 0
        self.worst = ""
        self._same_rows = self._rows = 0
        self.sample = Sample()

    def add(self, reference: torch.Tensor, candidate: torch.Tensor, *, where: str = "") -> None:
        """Compare two tensors of one shape.

        Args:
            reference, candidate: CPU tensors, any dtypes, same shape.
            where: said beside the worst place, such as `batch 1, call 2`.
        Cost: one pass; float64 copies of a block of 1 Mi elements.
        """
        import torch

        if reference.dtype != candidate.dtype or not reference.is_floating_point():
            self.max_ulp = None
        self._add_top1(reference, candidate)
        shape = tuple(reference.shape)
        if reference.is_complex() or candidate.is_complex():
            reference, candidate = (torch.view_as_real(t.to(torch.complex128)) for t in (reference, candidate))
        a, b = reference.reshape(-1), candidate.reshape(-1)
        width = 2 if len(shape) < reference.ndim else 1
        for start in range(0, a.numel(), _BLOCK):
            self._add_block(a[start : start + _BLOCK], b[start : start + _BLOCK], start, shape, width, where)

    def _add_block(self, a: torch.Tensor, b: torch.Tensor, start: int, shape: tuple[int, ...], width: int, where: str) -> None:
        x, y = a.double(), b.double()
        both_nan = x.isnan() & y.isnan()
        same = both_nan | ((a == b) if a.dtype == b.dtype else (x == y))  # whole numbers beyond 2**53 are still told apart
        finite = x.isfinite() & y.isfinite()
        self.count += a.numel()
        self.unequal += int((~same).sum())
        self.both_nan += int(both_nan.sum())
        self.one_sided += int((~finite & ~same).sum())
        if bool(finite.all()):
            index = None
        else:
            index = finite.nonzero().reshape(-1)
            x, y, a, b = x[index], y[index], a[index], b[index]
        if not x.numel():
            return
        difference = (y - x).abs()
        self._add_sums(x, y, difference)
        if self.max_ulp is not None:
            steps = ulp_distance(a, b)
            self.max_ulp = None if steps is None else max(self.max_ulp, steps)
        top, at = float(difference.max()), int(difference.argmax())
        if top > self.max_abs:
            self.max_abs = top
            place = start + (at if index is None else int(index[at]))
            self.worst = _worst(place // width, shape, float(x[at]), float(y[at]), where)
        self.sample.add(x, y, at)

    def _add_sums(self, x: torch.Tensor, y: torch.Tensor, difference: torch.Tensor) -> None:
        self.finite += x.numel()
        self.sum_abs += float(difference.sum())
        self.sum_diff2 += float(difference.square().sum())
        self.sum_reference2 += float(x.square().sum())
        self.sum_candidate2 += float(y.square().sum())
        self.dot += float((x * y).sum())
        self.scale = max(self.scale, float(x.abs().max()))
        if self._given is not None:
            rtol, atol = self._given
            self.beyond += int((difference > atol + rtol * x.abs()).sum())

    def _add_top1(self, reference: torch.Tensor, candidate: torch.Tensor) -> None:
        axis = class_axis(reference)
        if axis is not None and candidate.is_floating_point():
            agree = reference.argmax(axis) == candidate.argmax(axis)
            self._same_rows += int(agree.sum())
            self._rows += agree.numel()

    def figures(self) -> Figures:
        some, moved = self.finite > 0, self.sum_diff2 > 0
        norms = math.sqrt(self.sum_reference2) * math.sqrt(self.sum_candidate2)
        return Figures(
            count=self.count,
            unequal=self.unequal,
            one_sided=self.one_sided,
            both_nan=self.both_nan,
            max_abs=self.max_abs if some else None,
            mean_abs=self.sum_abs / self.finite if some else None,
            relative=math.sqrt(self.sum_diff2 / self.sum_reference2) if self.sum_reference2 else None,
            max_ulp=self.max_ulp if some else None,
            cosine=max(-1.0, min(1.0, self.dot / norms)) if norms else None,
            snr_db=10 * math.log10(self.sum_reference2 / self.sum_diff2) if moved and self.sum_reference2 else None,
            top1=self._same_rows / self._rows if self._rows else None,
            scale=self.scale,
            beyond=self.beyond if self._given is not None else None,
            worst=self.worst,
        )


class Sample:
    """A bounded, deterministic sample of value pairs that always holds the pair furthest apart."""

    def __init__(self, limit: int = _SAMPLE) -> None:
        self._limit = limit
        self.pairs: Any = None  # float64 [2, n]

    def add(self, x: torch.Tensor, y: torch.Tensor, worst: int) -> None:
        """Take evenly spaced pairs and the one at `worst`."""
        import torch

        step = max(1, math.ceil(x.numel() / (self._limit - 1)))
        taken = torch.stack([torch.cat([x[::step], x[worst : worst + 1]]), torch.cat([y[::step], y[worst : worst + 1]])])
        self.merge(taken)

    def merge(self, pairs: torch.Tensor) -> None:
        """Add pairs [2, n]; past the limit, evenly spaced ones stay, and the worst."""
        import torch

        held = pairs if self.pairs is None else torch.cat([self.pairs, pairs], dim=1)
        if held.shape[1] > self._limit:
            step = math.ceil(held.shape[1] / (self._limit - 1))
            worst = int((held[1] - held[0]).abs().argmax())
            held = torch.cat([held[:, ::step], held[:, worst : worst + 1]], dim=1)
        self.pairs = held


def class_axis(tensor: torch.Tensor) -> int | None:
    """The axis of classes: the last of `[n, classes]` and `[n, t, classes]`, the second of `[n, classes, h, w, …]`; None without ≥ 2."""
    if not tensor.is_floating_point() or tensor.ndim < 2 or not tensor.numel():
        return None
    axis = 1 if tensor.ndim > 3 else tensor.ndim - 1
    return axis if tensor.shape[axis] >= 2 else None


def ulp_distance(a: torch.Tensor, b: torch.Tensor) -> int | None:
    """Largest number of representable steps between finite elements of one float dtype; None for 8-bit floats.

    The bits of an IEEE float, read as a sign and a magnitude, count the representable values in order; -0 and +0 coincide.
    """
    import torch

    widths = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}
    if a.dtype not in widths:
        return None
    if bool((a == b).all()):
        return 0
    ranks = []
    for t in (a, b):
        bits = t.contiguous().view(widths[t.dtype]).long()
        magnitude = bits & torch.iinfo(widths[t.dtype]).max
        ranks.append(torch.where(bits < 0, -magnitude, magnitude))
    steps = (ranks[1] - ranks[0]).abs()
    if a.dtype is torch.float64:  # unlike signs can lie more than 2**63 steps apart
        apart = (ranks[0] < 0) != (ranks[1] < 0)
        if bool(apart.any()):
            return max(abs(int(p) - int(q)) for p, q in zip(ranks[0][apart].tolist(), ranks[1][apart].tolist(), strict=True))
    return int(steps.max())


def _worst(flat: int, shape: tuple[int, ...], reference: float, candidate: float, where: str) -> str:
    index = []
    for size in reversed(shape):
        index.append(flat % size)
        flat //= size
    place = f"[{', '.join(str(i) for i in reversed(index))}]"
    return f"{place}: {candidate:.6g} against {reference:.6g}" + (f" ({where})" if where else "")
