"""Statistics per tensor, streamed: two passes at most, one chunk held at a time."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workbench import dtypes
from workbench.errors import located
from workbench.names import Patterns, require_names
from workbench.opening import open as open_checkpoint
from workbench.report import Report
from workbench.stream import Meter, ProgressFunction
from workbench.tables import Column, Table, table
from workbench.tensors import LazyTensor

if TYPE_CHECKING:
    import torch

BINS = 64


@dataclass(frozen=True)
class TensorStats:
    """The numbers of one tensor. Moments and range are over finite values; of complex values, over magnitudes.

    Attributes:
        zeros, nan, inf: how many elements are zero, NaN, infinite.
        std: population standard deviation (divides by count).
        edges, counts: histogram of finite values; counts has one entry fewer. Empty where not asked for.
        locked: why there are no numbers, or None.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    count: int
    min: float | None = None
    max: float | None = None
    mean: float | None = None
    std: float | None = None
    zeros: int | None = None
    nan: int | None = None
    inf: int | None = None
    edges: tuple[float, ...] = ()
    counts: tuple[int, ...] = ()
    locked: str | None = None


@dataclass(frozen=True, repr=False)
class StatsReport(Report):
    """Statistics of the chosen tensors; false where any holds NaN or Inf, or could not be read."""

    rows: tuple[TensorStats, ...]

    @property
    def ok(self) -> bool:
        return not any(row.nan or row.inf or row.locked for row in self.rows)

    @property
    def headline(self) -> str:
        if not self.rows:
            return "no tensors"
        bad = [row.name for row in self.rows if row.nan or row.inf]
        locked = [row.name for row in self.rows if row.locked]
        text = (
            f"{len(self.rows)} tensors, all finite"
            if not bad
            else f"{len(bad)} of {len(self.rows)} tensors hold NaN or Inf, first {bad[0]!r}"
        )
        return text + (f"; {len(locked)} could not be read" if locked else "")

    def tables(self) -> tuple[Table, ...]:
        columns = (
            Column("name", "name"), Column("shape", "shape"), Column("dtype"), Column("min", "number"), Column("max", "number"), Column("mean", "number"),
            Column("std", "number"), Column("zeros", "percent"), Column("NaN", "count"), Column("Inf", "count"),
        )  # fmt: skip
        rows = [
            (
                r.name,
                r.shape,
                r.dtype,
                r.min,
                r.max,
                r.mean,
                r.std,
                r.zeros / r.count if r.zeros is not None and r.count else None,
                r.nan,
                r.inf,
            )
            for r in self.rows
        ]
        return (table("statistics", columns, rows),)


def stats(
    ckpt: Any,
    names: Patterns = "*",
    *,
    histogram: bool = True,
    progress: ProgressFunction | None = None,
    cancel: threading.Event | None = None,
) -> StatsReport:
    """Count, range, mean, spread, zeros, NaN and Inf of each selected tensor, with a histogram of 64 bins.

    `ckpt` is anything `wb.open` takes. Tied names are computed once. Torch-quantized tensors give their stored integers. A locked tensor gives a row without numbers.

    Raises:
        SelectionError: nothing matches. CancelledError.
    Cost: one read of each tensor, two with the histogram; memory is one chunk.
    """
    ckpt = open_checkpoint(ckpt)
    chosen = require_names(names, ckpt)
    meter = Meter("statistics", sum(ckpt[n].nbytes for n in chosen) * (2 if histogram else 1), progress, cancel)
    seen: dict[Any, TensorStats] = {}
    rows = []
    for name in chosen:
        tensor = ckpt[name]
        key = (tensor.source, tensor.spec)
        if key not in seen:
            with located(tensor=name):
                seen[key] = _tensor_stats(name, tensor, histogram, meter)
        found = seen[key]
        rows.append(found if found.name == name else TensorStats(**{**vars(found), "name": name}))
    return StatsReport(tuple(rows))


def _tensor_stats(name: str, tensor: LazyTensor, histogram: bool, meter: Meter) -> TensorStats:
    import torch

    if tensor.locked is not None:
        return TensorStats(name, tensor.dtype.name, tensor.shape, tensor.numel, locked=tensor.locked)
    count, mean, m2, zeros, nan, inf = 0, 0.0, 0.0, 0, 0, 0
    low, high = math.inf, -math.inf
    for _, chunk in tensor.chunks():
        values = as_float64(chunk)
        finite = values if bool(torch.isfinite(values.sum())) else values[torch.isfinite(values)]
        if finite.numel() != values.numel():
            nan += int(values.isnan().sum())
            inf += int(values.isinf().sum())
        n = finite.numel()
        zeros += n - int(torch.count_nonzero(finite))
        if n:
            low, high = min(low, float(finite.amin())), max(high, float(finite.amax()))
            chunk_mean = float(finite.mean())
            delta = chunk_mean - mean  # Chan's update: exact for chunks of any size
            m2 += float(((finite - chunk_mean) ** 2).sum()) + delta * delta * count * n / (count + n)
            mean += delta * n / (count + n)
            count += n
        meter.advance(chunk.numel() * tensor.dtype.itemsize)
    if not count:
        return TensorStats(name, tensor.dtype.name, tensor.shape, tensor.numel, zeros=zeros, nan=nan, inf=inf)
    edges, counts = _histogram(tensor, low, high, meter) if histogram else ((), ())
    return TensorStats(
        name, tensor.dtype.name, tensor.shape, tensor.numel, low, high, mean, math.sqrt(m2 / count), zeros, nan, inf, edges, counts
    )


def _histogram(tensor: LazyTensor, low: float, high: float, meter: Meter) -> tuple[tuple[float, ...], tuple[int, ...]]:
    import torch

    if high - low <= 0 or not math.isfinite(high - low):
        pad = max(abs(low) * 1e-6, 1e-12)
        low, high = (low - pad, high + pad) if high == low else (low / 2, high / 2)
    total = torch.zeros(BINS, dtype=torch.float64)
    edges = torch.linspace(low, high, BINS + 1, dtype=torch.float64)
    for _, chunk in tensor.chunks():
        values = as_float64(chunk)
        values = values[torch.isfinite(values)].clamp_(low, high)
        total += torch.histogram(values, bins=edges).hist
        meter.advance(chunk.numel() * tensor.dtype.itemsize)
    return tuple(edges.tolist()), tuple(int(n) for n in total.tolist())


def as_float64(chunk: torch.Tensor) -> torch.Tensor:
    """Any flat chunk as float64; complex values by magnitude, packed ones by their stored bytes."""
    import torch

    if chunk.is_complex():
        return chunk.to(torch.complex128).abs()
    packed = chunk.dtype in (
        getattr(torch, "float4_e2m1fn_x2", None),
        torch.bits8,
        torch.bits16,
        torch.bits1x8,
        torch.bits2x4,
        torch.bits4x2,
    )
    return (dtypes.flat(chunk).view(torch.uint8) if packed else chunk).to(torch.float64)
