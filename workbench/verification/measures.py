"""Measures: how far one tensor lies from another, gathered block by block over many batches.

Owns the arithmetic of a comparison and nothing of its verdict. Differences are taken in float64. Integers and booleans are compared
exactly. Where both sides hold NaN, or the same infinity, they agree and are counted; only pairs of finite values enter the figures.
What a mask leaves out enters nothing but `masked`.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

_BLOCK = 1 << 20  # elements compared at once: float64 copies stay under 32 MB
_GROUPS, _SLICE = 4096, 64  # along an axis of more indices, slices of fewer values are not told apart: 24 bytes each
_SAMPLE = 20_000
_K = 5


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
        top1: fraction of rows whose largest class agrees; None without a class axis (see `class_axis`).
        top5: how many of the reference's 5 largest classes are among the candidate's, over all rows; None with fewer than 6 classes.
        kl: mean over rows of KL(reference || candidate) in nats, of the rows themselves where they are probabilities, otherwise of their
            softmax; None without a class axis. Rows that hold NaN or +infinity stay out of all three.
        scale: largest finite |reference|.
        beyond: pairs with |difference| > atol + rtol |reference|; None when neither was given.
        worst: where the largest difference lies and what stood there.
        masked: values that a mask left out; they enter no other figure.
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
    top5: float | None
    kl: float | None
    scale: float
    beyond: int | None
    worst: str
    masked: int = 0


class Meter:
    """Gathers one output's figures. Call `add` once per batch and call; the shapes must agree."""

    def __init__(self, *, rtol: float | None = None, atol: float | None = None) -> None:
        self._given = None if rtol is None and atol is None else (rtol or 0.0, atol or 0.0)
        self.count = self.unequal = self.one_sided = self.both_nan = self.finite = self.beyond = 0
        self.sum_abs = self.sum_diff2 = self.sum_reference2 = self.sum_candidate2 = self.dot = self.scale = 0.0
        self.max_abs = -1.0
        self.max_ulp: int | None = 0
        self.worst = ""
        self._rows = _Rows()
        self.masked = 0
        self.sample = Sample()

    def add(self, reference: torch.Tensor, candidate: torch.Tensor, *, where: str = "", keep: torch.Tensor | None = None) -> None:
        """Compare two tensors of one shape.

        Args:
            reference, candidate: CPU tensors, any dtypes, same shape.
            where: said beside the worst place, such as `batch 1, call 2`.
            keep: bool, of that shape: False leaves the place out. None keeps all.
        Cost: one pass, and one over the rows of classes; float64 copies of a block of 1 Mi elements; with `keep`, a copy of what is kept.
        """
        import torch

        if reference.dtype != candidate.dtype or not reference.is_floating_point():
            self.max_ulp = None
        self._rows.add(reference, candidate, keep)
        shape = tuple(reference.shape)
        if reference.is_complex() or candidate.is_complex():
            reference, candidate = (torch.view_as_real(t.to(torch.complex128)) for t in (reference, candidate))
        a, b = reference.reshape(-1), candidate.reshape(-1)
        width = 2 if len(shape) < reference.ndim else 1
        places = None
        if keep is not None:
            self.masked += keep.numel() - int(keep.sum())
            places = keep.reshape(-1).repeat_interleave(width).nonzero().reshape(-1)
            a, b = a[places], b[places]
        for start in range(0, a.numel(), _BLOCK):

            def name(place: int, start: int = start) -> tuple[int, tuple[int, ...], str]:
                flat = start + place if places is None else int(places[start + place])
                return flat // width, shape, where

            self._add_block(a[start : start + _BLOCK], b[start : start + _BLOCK], name)

    def _add_block(self, a: torch.Tensor, b: torch.Tensor, name: Callable[[int], tuple[int, tuple[int, ...], str]]) -> None:
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
            self.worst = _worst(*name(at if index is None else int(index[at])), float(x[at]), float(y[at]))
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
            top1=self._rows.mean("top1"),
            top5=self._rows.mean("top5"),
            kl=self._rows.mean("kl"),
            scale=self.scale,
            beyond=self.beyond if self._given is not None else None,
            worst=self.worst,
            masked=self.masked,
        )


class _Rows:
    """Means over the rows of classes of `top1`, `top5` and `kl`."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[float, int]] = {}

    def add(self, reference: torch.Tensor, candidate: torch.Tensor, keep: torch.Tensor | None) -> None:
        axis = class_axis(reference)
        if axis is None or not candidate.is_floating_point():
            return
        classes = reference.shape[axis]
        a, b = (t.movedim(axis, -1).reshape(-1, classes) for t in (reference, candidate))
        if keep is not None:
            whole = keep.movedim(axis, -1).reshape(-1, classes).all(1)
            a, b = a[whole], b[whole]
        step = max(1, _BLOCK // classes)
        for start in range(0, a.shape[0], step):
            x, y = a[start : start + step].double(), b[start : start + step].double()
            sound = ((x < math.inf) & (y < math.inf)).all(1)  # false for NaN; -infinity is a class ruled out
            self._add_block(x[sound], y[sound])

    def _add_block(self, x: torch.Tensor, y: torch.Tensor) -> None:
        import torch

        self._note("top1", x.argmax(1) == y.argmax(1))
        if x.shape[1] > _K:
            best, found = x.topk(_K).indices, torch.zeros_like(x, dtype=torch.bool).scatter_(1, y.topk(_K).indices, True)
            self._note("top5", found.gather(1, best).double().mean(1))
        p, q = _log_probabilities(x), _log_probabilities(y)
        self._note("kl", torch.where(p.isneginf(), 0.0, p.exp() * (p - q)).sum(1).clamp_min(0))

    def _note(self, figure: str, rows: torch.Tensor) -> None:
        total, count = self._sums.get(figure, (0.0, 0))
        rows = rows.double()[~rows.isnan()]  # every class ruled out: no distribution
        self._sums[figure] = (total + float(rows.sum()), count + rows.numel())

    def mean(self, figure: str) -> float | None:
        total, count = self._sums.get(figure, (0.0, 0))
        return total / count if count else None


def _log_probabilities(rows: torch.Tensor) -> torch.Tensor:
    """float64 [n, classes] -> the same: the logarithm of what are probabilities already, log-softmax of anything else."""
    if rows.numel() and bool((rows >= 0).all()) and bool(((rows.sum(1) - 1).abs() < 1e-3).all()):
        return rows.log()
    return rows.log_softmax(1)


class Spread:
    """How far two tensors of one shape lie apart, by places of like kind: all of them, those of one binade of |reference|, and those of one
    index along an axis. Only pairs of finite values enter.

    Attributes:
        far, scale, count: float64 [groups]: largest |other - reference|, largest |reference|, how many pairs. Group 0 is the whole, then come
            512 binades (2**-256 and below first), then each index of each axis.
        axes: where those of each axis lie; none of a long axis whose slices hold few values.
    """

    binades = slice(1, 513)

    def __init__(self, shape: tuple[int, ...]) -> None:
        import torch

        self.shape = shape
        self.axes: list[slice] = []
        size = self.binades.stop
        for length in shape:
            apart = length if length <= _GROUPS or length * _SLICE <= math.prod(shape) else 0
            self.axes.append(slice(size, size + apart))
            size += apart
        self.far, self.scale, self.count = (torch.zeros(size, dtype=torch.float64) for _ in range(3))

    def join(self, other: Spread) -> None:
        """Take another sample of the same places in; of another shape, its whole and its binades alone."""
        size = self.far.numel() if self.shape == other.shape else self.binades.stop
        for own, more in ((self.far, other.far), (self.scale, other.scale)):
            own[:size] = own[:size].maximum(more[:size])
        self.count[:size] += other.count[:size]

    def add(self, x: torch.Tensor, y: torch.Tensor, keep: torch.Tensor | None, at: tuple[int, ...]) -> None:
        """Enter a block of both tensors that begins at `at`."""
        import torch

        known = x.isfinite() & y.isfinite()
        if keep is not None:
            known &= keep
        far, size = ((y - x).abs_().masked_fill_(~known, 0.0), x.abs().masked_fill_(~known, 0.0))
        binade = ((size.view(torch.int64) >> 52) - 767).clamp_(0, 511).reshape(-1)  # the exponent's bits, which are biased by 1023
        for total, values in ((self.far, far), (self.scale, size)):
            total[self.binades].scatter_reduce_(0, binade, values.reshape(-1), "amax")
        self.count[self.binades] += torch.bincount(binade, known.reshape(-1).double(), 512)
        for axis, start in enumerate(at):
            if self.axes[axis].start == self.axes[axis].stop:
                continue
            rest = [other for other in range(x.ndim) if other != axis]
            held = slice(self.axes[axis].start + start, self.axes[axis].start + start + x.shape[axis])
            for total, values in ((self.far, far), (self.scale, size)):
                total[held] = total[held].maximum(values.amax(rest) if rest else values)
            self.count[held] += known.sum(rest) if rest else known

    def whole(self) -> Spread:
        """Itself, with its first group told from the binades."""
        self.far[0], self.scale[0], self.count[0] = (
            self.far[self.binades].max(),
            self.scale[self.binades].max(),
            self.count[self.binades].sum(),
        )
        return self


def spread(reference: torch.Tensor, other: torch.Tensor, keep: torch.Tensor | None = None) -> Spread:
    """How far `other` lies from `reference`, two CPU tensors of one shape; `keep` as in `Meter.add`.

    Cost: one pass; float64 copies of a block of 1 Mi elements, which are given back to the system.
    """
    import torch

    if reference.is_complex() or other.is_complex():
        reference, other = (torch.view_as_real(t.to(torch.complex128)) for t in (reference, other))
        keep = keep if keep is None else keep[..., None].expand(reference.shape)
    found = Spread(tuple(reference.shape))
    for at in _blocks(found.shape):
        x, y = reference[at].double(), other[at].double()
        found.add(x, y, None if keep is None else keep[at], tuple(part.start for part in at))
    if reference.numel() >= _BLOCK:
        _trim()
    return found.whole()


def _trim() -> None:
    """Give freed memory back: glibc keeps blocks of under 32 MB, and the gaps between them would add half as much to what is held."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
    if trim is not None:
        trim(0)


def _blocks(shape: tuple[int, ...], at: tuple[slice, ...] = ()) -> Iterator[tuple[slice, ...]]:
    """Slices of at most 1 Mi elements that together are the whole; none where it is empty."""
    at = at or tuple(slice(0, length) for length in shape)
    lengths = [part.stop - part.start for part in at]
    if math.prod(lengths) <= _BLOCK:
        if math.prod(lengths):
            yield at
        return
    longest = lengths.index(max(lengths))
    start, stop = at[longest].start, at[longest].stop
    for half in (slice(start, (start + stop) // 2), slice((start + stop) // 2, stop)):
        yield from _blocks(shape, (*at[:longest], half, *at[longest + 1 :]))


def peak(reference: torch.Tensor, other: torch.Tensor) -> tuple[float, float]:
    """(largest |other - reference|, largest |reference|) over the finite pairs of two CPU tensors of one shape."""
    found = spread(reference, other)
    return float(found.far[0]), float(found.scale[0])


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """The same answer twice, but for the rounding of sums that threads add up in another order."""
    import torch

    def close(x: torch.Tensor, y: torch.Tensor) -> bool:
        if not (x.is_floating_point() or x.is_complex()):
            return torch.equal(x, y)
        eps = torch.finfo(x.dtype).eps
        x, y = (t.float() if t.dtype.itemsize == 1 else t for t in (x, y))
        known = x.isfinite()
        slack = 16 * eps * float(x[known].abs().max()) if bool(known.any()) else 0.0
        return torch.allclose(x, y, rtol=0.0, atol=slack, equal_nan=True)

    if a.keys() != b.keys():
        return False
    return all(x.shape == y.shape and x.dtype == y.dtype and close(x, y) for x, y in ((a[name], b[name]) for name in a))


def finite(value: torch.Tensor) -> torch.Tensor:
    """Where a floating tensor is finite; torch cannot tell for 8-bit floats."""
    return (value.float() if value.dtype.itemsize == 1 else value).isfinite()


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


def _worst(flat: int, shape: tuple[int, ...], where: str, reference: float, candidate: float) -> str:
    index = []
    for size in reversed(shape):
        index.append(flat % size)
        flat //= size
    place = f"[{', '.join(str(i) for i in reversed(index))}]"
    return f"{place}: {candidate:.6g} against {reference:.6g}" + (f" ({where})" if where else "")
