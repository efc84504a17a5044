"""Sensitivity: what each scheme would cost each tensor, in bytes and in error.

Owns the measuring. A tensor is tried by the ops themselves, so that error and bytes are those of what `quantize` writes: on a file
by its values, streamed; on a model by its outputs, with one tensor replaced at a time. Choosing among the schemes is `planning`.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from workbench.checkpoint import Checkpoint
from workbench.errors import SelectionError, located
from workbench.names import Patterns, require_names
from workbench.opening import open as open_checkpoint
from workbench.ops.quantization import Told, dequantize, quantize
from workbench.ops.schemes import Scheme
from workbench.ops.scope import floating, weights_of
from workbench.report import Report
from workbench.stream import Meter, ProgressFunction
from workbench.tables import Column, Table, table
from workbench.tensors import LazyTensor, Memo
from workbench.verification.runners import Runner, running
from workbench.verification.values import Call, calls_from

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCHEMES: tuple[Told, ...] = (
    "float16", "int8", {"scheme": "int8", "per": "tensor"}, {"scheme": "int8", "group_size": 32}, "int4", {"scheme": "int4", "group_size": 32},
)  # fmt: skip
_DRAWN = 40
Metric = Callable[[torch.Tensor, torch.Tensor], float]


@dataclass(frozen=True)
class Sensitivity:
    """One tensor under one scheme.

    Attributes:
        nbytes: of all that takes its place: codes, scales, zero points, shapes.
        error: what the report's `measure` says.
        sqnr: 10 log10 of the sum of squares over that of the errors, in dB: infinite where nothing changes, None with a metric of one's own.
    """

    name: str
    scheme: Scheme
    nbytes: int
    error: float
    sqnr: float | None


@dataclass(frozen=True, repr=False)
class SensitivityReport(Report):
    """Error and bytes of every tensor under every scheme that can take it.

    Attributes:
        sizes: present bytes of each tensor that was tried.
        ties: other name -> the name under which the same values were tried.
        fixed: bytes of all other tensors, tied ones once.
        left: (tensor, scheme) -> why the scheme cannot take it.
        measure: what `error` is.
    """

    rows: tuple[Sensitivity, ...]
    sizes: Mapping[str, int]
    ties: Mapping[str, str]
    fixed: int
    left: Mapping[tuple[str, str], str]
    measure: str

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        return tuple(sorted({row.scheme for row in self.rows}, key=lambda s: (-s.bits, s.per or "", s.group_size or 0, str(s))))

    @property
    def headline(self) -> str:
        if not self.rows:
            return f"none of {len(self.sizes)} tensors can be taken by any of the schemes"
        told = max(
            ([row for row in self.rows if row.scheme == s] for s in self.schemes), key=lambda rows: (len(rows), -rows[0].scheme.bits)
        )
        worst = max(told, key=lambda row: row.error)
        total = math.fsum(row.error for row in told)
        share = f"{100 * worst.error / total:.0f} % of what {worst.scheme} costs lies in" if total > 0 else f"{worst.scheme} spares"
        return f"{share} {worst.name}, which has {100 * self.sizes[worst.name] / sum(self.sizes.values()):.0f} % of the bytes"

    def tables(self) -> tuple[Table, ...]:
        schemes = self.schemes
        found = {(row.name, row.scheme): row for row in self.rows}

        def lines(cell: Callable[[Sensitivity], Any]) -> Iterator[tuple[Any, ...]]:
            for name, size in self.sizes.items():
                yield name, size, *(cell(found[name, s]) if (name, s) in found else None for s in schemes)

        first = (Column("tensor", "name"), Column("bytes now", "bytes"))
        decibels = all(row.sqnr is not None for row in self.rows)
        what = f"SQNR in dB ({self.measure})" if decibels else self.measure
        tables = [
            table(what, (*first, *(Column(str(s), "number") for s in schemes)), lines(lambda r: r.sqnr if decibels else r.error)),
            table("bytes", (*first, *(Column(str(s), "bytes") for s in schemes)), lines(lambda r: r.nbytes)),
        ]
        if self.left:
            columns = (Column("tensor", "name"), Column("scheme"), Column("why"))
            tables.append(table("left as they are", columns, [(*key, why) for key, why in self.left.items()]))
        return tuple(tables)

    def plot(self) -> Figure:
        """Layer by scheme, in dB; of a metric of one's own, its values. Of many layers, those that suffer most."""
        from workbench.render import plots

        found = {(row.name, row.scheme): row.error if row.sqnr is None else row.sqnr for row in self.rows}
        worst = sorted(self.rows, key=lambda row: -row.error if row.sqnr is None else row.sqnr)
        drawn = set(list(dict.fromkeys(row.name for row in worst))[:_DRAWN])
        lines = [name for name in self.sizes if name in drawn]
        grid = [[found.get((name, scheme), math.nan) for scheme in self.schemes] for name in lines]
        quantity = "SQNR in dB" if all(row.sqnr is not None for row in self.rows) else self.measure
        return plots.heat_map(lines, [str(s) for s in self.schemes], grid, quantity, self.headline)


def sensitivity(
    source: Any,
    inputs: Any = None,
    *,
    schemes: Sequence[Told] = SCHEMES,
    names: Patterns | None = None,
    exclude: Patterns | None = None,
    metric: Metric | None = None,
    max_ram_mb: int = 256,
    progress: ProgressFunction | None = None,
    cancel: threading.Event | None = None,
) -> SensitivityReport:
    """Try every scheme on every weight: from a file by the values themselves, or on a model by what becomes of its outputs.

    Args:
        source: a checkpoint or anything `wb.open` takes, of which the weights are tried; with `inputs`, an nn.Module.
        inputs: batches for the model, as `wb.parity` takes them. Its weights are replaced in place one at a time, and put back.
        schemes: what `wb.ops.quantize` takes: "int8", {"scheme": "int4", "group_size": 64}, Scheme.
        names, exclude: globs over tensors; by default every floating matrix, and nothing.
        metric: with `inputs`, (first output over all batches, the same of the model as it is) -> float, larger where worse; by default the
            squared error over all outputs.
    Returns:
        A report; ties are tried once. A scheme that cannot take a tensor (rows that no group divides, NaN) is told under `left`.
    Raises:
        SelectionError: nothing to try, or a metric without inputs. BudgetError. CancelledError.
    Cost: per scheme two reads of each tensor, in blocks; with a model, one pass over the inputs per tensor and scheme.
    """
    if inputs is not None and not isinstance(source, torch.nn.Module):
        raise SelectionError(f"inputs need a model to go into, and this is a {type(source).__name__}", hint="pass the nn.Module first")
    if metric is not None and inputs is None:
        raise SelectionError("a metric needs outputs", hint="pass a model and its inputs: sensitivity(model, inputs, metric=…)")
    wanted = tuple(dict.fromkeys(s for s in map(Scheme.of, schemes) if s.name != "float32"))
    part = weights_of(open_checkpoint(source))
    exact = () if names is None else (names,) if isinstance(names, str) else names
    gone = {*(require_names(exclude, part) if exclude is not None else ()), *_quantized(part)}
    chosen = {name for name in floating(part, names) - gone if part[name].ndim >= 2 or name in exact}  # as quantize chooses
    if not chosen or not wanted:
        raise SelectionError("there is nothing to try: no scheme, or every tensor is excluded", hint="widen names= or narrow exclude=")
    ties = {alias: name for alias, name in part.aliases.items() if alias in chosen and name in chosen}
    tried = {name: tensor for name, tensor in part.items() if name in chosen and name not in ties}
    meter = Meter("sensitivity", sum(t.nbytes for t in tried.values()) * len(wanted), progress, cancel)
    budget = max_ram_mb * 10**6
    if inputs is None:
        found = _try_all(tried, wanted, lambda tensor, back: _differences(tensor, back, budget, meter))
        measure = "squared error of the weights"
    else:
        with running(source) as runner:
            measured = _Outputs(runner, calls_from(inputs), metric, meter)
            found = _try_all(tried, wanted, measured.differences)
        measure = "squared error of the outputs" if metric is None else str(getattr(metric, "__name__", "metric"))
    rows = [row for row in found if isinstance(row, Sensitivity)]
    left = {(name, str(scheme)): why for name, scheme, why in (row for row in found if isinstance(row, tuple))}
    sizes = {name: tensor.nbytes for name, tensor in tried.items()}
    return SensitivityReport(tuple(rows), sizes, ties, part.nbytes - sum(sizes.values()), left, measure)


def _quantized(part: Checkpoint) -> set[str]:
    """Names that belong to tensors which are quantized already."""
    try:
        plain = dequantize(part, everything=True)
    except SelectionError:  # there are none
        return set()
    return {name for name, tensor in part.items() if name not in plain or plain[name].source != tensor.source}


Measured = Callable[[LazyTensor, LazyTensor], tuple[float, float | None]]  # (error, sum of squares)


def _try_all(tried: Mapping[str, LazyTensor], schemes: Sequence[Scheme], measure: Measured) -> list[Sensitivity | tuple[str, Scheme, str]]:
    found: list[Sensitivity | tuple[str, Scheme, str]] = []
    for name, tensor in tried.items():
        for scheme in schemes:
            with located(tensor=name):
                if why := scheme.refusal(tensor.shape, tensor.dtype):
                    found.append((name, scheme, why))
                    continue
                try:
                    made = quantize(Checkpoint({name: tensor}), scheme, names=[name], everything=True)
                    back = dequantize(made, everything=True)[name] if scheme.scaled else made[name]
                    error, squares = measure(tensor, back)
                except SelectionError as refused:
                    found.append((name, scheme, refused.message))
                    continue
            sqnr = None if squares is None else 10 * math.log10(squares / error) if squares and error else math.inf
            found.append(Sensitivity(name, scheme, made.nbytes, error, sqnr))
    return found


def _differences(tensor: LazyTensor, back: LazyTensor, budget: int, meter: Meter) -> tuple[float, float]:
    error = squares = 0.0
    for start, chunk in back.chunks(memo=Memo(budget)):
        values = tensor.read(start, start + chunk.numel()).double()
        squares += float(values.square().sum())
        error += float((values - chunk.double()).square().sum())
        meter.advance(chunk.numel() * tensor.dtype.itemsize)
    return error, squares


class _Outputs:
    """The outputs of a model as it is, and how far they move when one tensor is replaced."""

    def __init__(self, runner: Runner, calls: Sequence[Call], metric: Metric | None, meter: Meter) -> None:
        self._runner, self._calls, self._metric, self._meter = runner, calls, metric, meter
        self._expected = self._answers()

    def _answers(self) -> list[dict[str, torch.Tensor]]:
        return [{k: v for k, v in self._runner(call.fresh()).items() if v.is_floating_point()} for call in self._calls]

    def differences(self, tensor: LazyTensor, back: LazyTensor) -> tuple[float, float | None]:
        live = tensor.load()
        before = live.clone()
        live.copy_(back.load().reshape(live.shape))
        try:
            answers = self._answers()
        finally:
            live.copy_(before)
        self._meter.advance(tensor.nbytes)
        if self._metric is not None:
            found, expected = (torch.cat([next(iter(answer.values())) for answer in all_of]) for all_of in (answers, self._expected))
            return float(self._metric(found, expected)), None
        pairs = [
            (found[k].double(), v.double()) for found, expected in zip(answers, self._expected, strict=True) for k, v in expected.items()
        ]
        return sum(float((a - b).square().sum()) for a, b in pairs), sum(float(b.square().sum()) for _, b in pairs)
