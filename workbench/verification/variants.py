"""Variants: one table over several ways to ship a model.

Owns what is measured side by side: bytes on disk and in memory, accuracy on the caller's data, latency, and parity with the first
variant. What a variant cannot be measured on is a dash, and one that does not run fails the report. A new measure is one field of
`Variant` and one column.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.checkpoint import Checkpoint
from workbench.errors import SelectionError, UntrustedError, WorkbenchError, visible
from workbench.report import Report
from workbench.tables import Column, Table, format_bytes, format_seconds, table
from workbench.verification.comparison import ParityReport, agreement
from workbench.verification.measures import class_axis
from workbench.verification.programs import holds_program, load_program
from workbench.verification.runners import Runner, running
from workbench.verification.tolerance import NoiseFloor, noise_floor
from workbench.verification.values import Call, calls_from
from workbench.verification.weighing import disk_nbytes, ram_nbytes

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

_WARM_UP = 2
_SHRUNK = 0.95  # a file at more than this of the first one's bytes did not shrink

Metric = Callable[["torch.Tensor", "torch.Tensor"], float]


@dataclass(frozen=True)
class Variant:
    """One way to ship the model. None is not measured.

    Attributes:
        name: as the caller calls it.
        disk_nbytes: of its file, external data included; for a bare module, of its state dict as `torch.save` writes it.
        ram_nbytes: parameters, buffers and constants, shared storage once; for `.onnx`, its weights.
        accuracy: of the metric over all data.
        seconds: median latency by batch size.
        parity: its answers to all data against the first variant's, by the first one's own rounding.
        problem: why it did not run, or "".
        note: why a latency is missing although it ran, or "".
    """

    name: str
    disk_nbytes: int | None = None
    ram_nbytes: int | None = None
    accuracy: float | None = None
    seconds: Mapping[int, float] = field(default_factory=dict)
    parity: ParityReport | None = None
    problem: str = ""
    note: str = ""

    @property
    def seconds_one(self) -> float | None:
        """Median latency of one item."""
        return self.seconds.get(1)

    @property
    def max_abs(self) -> float | None:
        """Largest difference from the first variant's outputs."""
        return self.parity.max_abs if self.parity is not None else None

    @property
    def top1(self) -> float | None:
        """Items whose largest class in the first output is the first variant's."""
        figures = self.parity.outputs[0].figures if self.parity is not None and self.parity.outputs else None
        return figures.top1 if figures else None

    @property
    def verdict(self) -> str | None:
        """`within rounding` or `differs`, from the first variant."""
        return None if self.parity is None else "within rounding" if self.parity else "differs"


@dataclass(frozen=True, repr=False)
class CompareReport(Report):
    """Variants side by side, the first one as the measure. True when every variant that can run did; that one differs is told, and no fault.

    Attributes:
        metric: what `accuracy` holds: the metric's name.
        batches, rounds, threads: sizes that were timed, timings of each per variant (the median is shown), and threads used.
        items: how many items of data.
    """

    variants: tuple[Variant, ...]
    metric: str
    items: int
    batches: tuple[int, ...]
    rounds: int
    threads: int

    @property
    def ok(self) -> bool:
        return not any(v.problem for v in self.variants)

    @property
    def headline(self) -> str:
        failed = [v for v in self.variants if v.problem]
        if failed:
            return f"{visible(failed[0].name)} did not run: {visible(failed[0].problem)}."
        first = self.variants[0]
        sized = [v for v in self.variants if v.disk_nbytes is not None]
        if len(self.variants) == 1 or len(sized) < 2 or not first.disk_nbytes:
            return f"{len(self.variants)} variants were measured on {self.items} items."
        small = min(sized, key=lambda v: v.disk_nbytes or 0)
        if small is first:
            return f"{visible(first.name)}, the first, is the smallest: {format_bytes(first.disk_nbytes)} on disk."
        share = f"{100 * (small.disk_nbytes or 0) / first.disk_nbytes:.3g} % of {visible(first.name)}'s bytes"
        if small.accuracy is None or first.accuracy is None:
            return f"{visible(small.name)} is the smallest, at {share}."
        return f"{visible(small.name)} has {self.metric} {_score(self, small.accuracy)} (was {_score(self, first.accuracy)}) at {share}."

    @property
    def not_smaller(self) -> tuple[str, ...]:
        """One sentence per variant that takes as much room on disk as the first."""
        first = self.variants[0]
        return tuple(
            f"{v.name} did not shrink: {format_bytes(v.disk_nbytes)} on disk beside {format_bytes(first.disk_nbytes)}."
            for v in self.variants[1:]
            if v.disk_nbytes and first.disk_nbytes and v.disk_nbytes > _SHRUNK * first.disk_nbytes
        )

    def tables(self) -> tuple[Table, ...]:
        columns = (
            Column("variant", "name"),
            Column("disk", "bytes"),
            Column("RAM", "bytes", "parameters, buffers and constants"),
            Column(self.metric, "percent" if self.metric == "accuracy" else "number", f"over {self.items} items"),
            *(Column(f"batch {size}", "seconds", f"median of {self.rounds}, {self.threads} threads") for size in self.batches),
            Column("parity", "text", f"with {self.variants[0].name}, by its own rounding"),
            Column("max abs", "number", f"largest difference from {self.variants[0].name}"),
            Column("top-1", "percent", f"same largest class as {self.variants[0].name}"),
        )
        rows = [
            (v.name, v.disk_nbytes, v.ram_nbytes, v.accuracy, *map(v.seconds.get, self.batches), v.verdict, v.max_abs, v.top1)
            for v in self.variants
        ]
        remarks = [
            *(f"{v.name} did not run: {v.problem}" for v in self.variants if v.problem),
            *(v.note for v in self.variants if v.note),
            *self.not_smaller,
        ]
        found = [table("variants", columns, rows)]
        if remarks:
            found.append(table("remarks", [Column("what")], [(text,) for text in remarks]))
        return tuple(found)

    def plot(self) -> Figure:
        """Disk, RAM, latency, difference and score of every variant, side by side; what none was measured on is left out."""
        from workbench.render import plots

        measures: dict[str, tuple[list[float | None], Callable[[float], str]]] = {
            "size on disk": ([v.disk_nbytes for v in self.variants], format_bytes),
            "RAM": ([v.ram_nbytes for v in self.variants], format_bytes),
            "latency of one item": ([v.seconds_one for v in self.variants], format_seconds),
            f"difference from {self.variants[0].name}": ([v.max_abs for v in self.variants], "{:.2g}".format),
            self.metric: ([v.accuracy for v in self.variants], lambda value: _score(self, value)),
        }
        known = {label: held for label, held in measures.items() if any(value is not None for value in held[0])}
        return plots.side_by_side([v.name for v in self.variants], known, self.headline)


def _score(report: CompareReport, value: float) -> str:
    return f"{100 * value:.3g} %" if report.metric == "accuracy" else f"{value:.4g}"


def compare(
    variants: Mapping[str, Any],
    data: Any = None,
    *,
    metric: str | Metric = "accuracy",
    batch: int | Sequence[int] = 32,
    rounds: int = 11,
    threads: int | None = None,
    trust: bool = False,
) -> CompareReport:
    """Measure several variants of one model on the same data.

    Args:
        variants: {name: a module, a callable, the path of an `.onnx`, TorchScript or `.pt2` file, (module, path of its file), a
            Checkpoint, or the path of any other file}. The first is what the others are held against. Checkpoints and other files are
            only weighed.
        data: (inputs, labels). Inputs as one batch: a tensor [n, …], or a tuple or dict of tensors [n, …]. Labels [n], or None. Without
            data the variants are only weighed.
        metric: `accuracy` (the first output's largest class against labels), or a function (outputs [n, …], labels [n]) -> float.
        batch: items per run, timed beside a batch of 1; fewer where there is less data. Several sizes: all are timed, the largest runs the data.
        rounds: timings per variant and batch size, interleaved between variants so that a busy machine troubles all alike; at least 11.
        threads: threads for torch and ONNX Runtime alike; by default torch's present number.
        trust: run stored programs that this process did not write, once a scan finds nothing dangerous in them.
    Returns:
        A report, false when a variant did not run. Whether one differs from the first by more than the first one's own rounding is told
        and makes nothing false: a quantized one should.
    Raises:
        SelectionError: no variants, no items, inputs and labels of unlike length, or a metric there is not.
    Cost: every variant runs over all data once, the first three times, and `rounds + 2` times per batch size for latency; the outputs of two are
        held at once.
    """
    import torch

    if not variants:
        raise SelectionError("there are no variants to compare", hint='pass {"fp32": model, "onnx": "model.onnx"}')
    if rounds < 11:
        raise SelectionError(f"{rounds} rounds are too few for a median", hint="use at least 11")
    score, metric_name = _metric(metric)
    call, labels, items = _data(data) if data is not None else (Call(), None, 0)
    sizes = sorted({1, *(max(1, min(one, items)) for one in ([batch] if isinstance(batch, int) else batch))}) if items else []
    used = threads or torch.get_num_threads()
    with _torch_threads(used), ExitStack() as stack:
        entries = [_Entry(name, thing, stack, used, trust=trust) for name, thing in variants.items()]
        if items:
            _answer(entries, call, labels, items, sizes[-1], score)
        for size in sizes:
            _time(entries, _slice(call, 0, size), rounds, size)
    return CompareReport(tuple(e.variant for e in entries), metric_name, items, tuple(sizes), rounds, used)


class _Entry:
    """A variant being measured: what is known, and its runner while it can run."""

    def __init__(self, name: str, thing: Any, stack: ExitStack, threads: int, *, trust: bool) -> None:
        self.thing: Any = None
        self.runner: Runner | None = None
        self.dtype: torch.dtype | None = None
        self.variant = Variant(name)
        try:
            runnable, path = _parts(thing)
            if path is not None and runnable is None and not isinstance(path, Checkpoint) and holds_program(path):
                self.variant = Variant(name, disk_nbytes(None, path))
                runnable = load_program(path, trust=trust)
            self.thing = runnable
            disk, ram = disk_nbytes(runnable, path), ram_nbytes(runnable, path)
            self.variant = Variant(name, disk, ram)
            if runnable is not None:
                self.dtype = _floating(runnable)
                self.runner = stack.enter_context(running(runnable, name=name, threads=threads))
        except WorkbenchError as error:
            self.fail(error)

    def fail(self, error: BaseException) -> None:
        self.runner, self.variant = None, replace(self.variant, problem=_words(error))

    def answer(self, call: Call) -> dict[str, torch.Tensor]:
        """Run on a copy of the call, floating inputs in the module's own dtype, as a half-precision module needs them."""
        assert self.runner is not None
        return self.runner(self.prepared(call))

    def prepared(self, call: Call) -> Call:
        dtype = self.dtype
        return call.fresh() if dtype is None else call.fresh().map(lambda t: t.to(dtype) if t.is_floating_point() else t)

    def note(self, **found: Any) -> None:
        self.variant = replace(self.variant, **found)


def _words(error: BaseException) -> str:
    if isinstance(error, UntrustedError):
        return f"{error.message}; {error.hint}"
    return error.message if isinstance(error, WorkbenchError) else f"{type(error).__name__}: {''.join(str(error).splitlines()[:1])}"


def _answer(entries: list[_Entry], call: Call, labels: Any, items: int, size: int, score: Metric) -> None:
    """Run every variant over all data; note accuracy, and parity with the first variant."""
    import torch

    batches = {f"batch {n}": _slice(call, i, min(i + size, items)) for n, i in enumerate(range(0, items, size), 1)}
    first: list[dict[str, torch.Tensor]] = []
    with ExitStack() as stack:
        floor: NoiseFloor | None = None
        for number, entry in enumerate(entries):
            if entry.runner is None:
                continue
            try:
                answers = [entry.answer(batch) for batch in batches.values()]
                parts = [next(iter(answer.values())) for answer in answers]
                outputs = torch.cat([part if part.ndim else part.reshape(1) for part in parts])
                if labels is not None:
                    entry.note(accuracy=float(score(outputs, labels)))
            except Exception as error:  # a variant that cannot answer is a finding, whatever it raised
                entry.fail(error)
                continue
            if number == 0:
                first = answers
            elif first:
                if floor is None:
                    floor = _floor(entries[0], batches, first, stack)
                replayed = (_Replay(entries[0].runner, first), _Replay(entry.runner, answers))
                entry.note(parity=agreement(*replayed, tuple(batches.values()), floor))


def _floor(first: _Entry, batches: Mapping[str, Call], answers: list[dict[str, torch.Tensor]], stack: ExitStack) -> NoiseFloor:
    floor = stack.enter_context(noise_floor(first.thing))
    calls = {label: (first.prepared(batch), answer) for (label, batch), answer in zip(batches.items(), answers, strict=True)}
    assert first.runner is not None
    return floor.measured(first.runner, calls)


class _Replay:
    """A runner that gives again what another has answered, in that order."""

    def __init__(self, runner: Runner | None, answers: list[dict[str, torch.Tensor]]) -> None:
        assert runner is not None
        self.name, self.ordered, self._answers = runner.name, runner.ordered, iter(answers)

    def __call__(self, call: Call) -> dict[str, torch.Tensor]:
        return next(self._answers)


def _time(entries: list[_Entry], call: Call, rounds: int, size: int) -> None:
    """Median seconds per variant; each round runs every variant once."""
    taken: dict[int, list[float]] = {id(entry): [] for entry in entries if entry.runner is not None}
    for turn in range(-_WARM_UP, rounds):
        for entry in entries:
            if entry.runner is None or id(entry) not in taken:
                continue
            fresh = entry.prepared(call)
            started = time.perf_counter()
            try:
                entry.runner(fresh)
            except Exception as error:  # it ran over the data: a size that it does not take is a dash with its reason
                del taken[id(entry)]
                entry.note(note=f"{entry.variant.name} has no latency for one batch size: {_words(error)}")
                continue
            if turn >= 0:
                taken[id(entry)].append(time.perf_counter() - started)
    for entry in entries:
        if id(entry) in taken:
            entry.note(seconds={**entry.variant.seconds, size: statistics.median(taken[id(entry)])})


def _metric(metric: str | Metric) -> tuple[Metric, str]:
    if callable(metric):
        return metric, str(getattr(metric, "__name__", "metric"))
    if metric != "accuracy":
        raise SelectionError(f"there is no metric {metric!r}", hint="use 'accuracy', or pass a function (outputs, labels) -> float")
    return _accuracy, "accuracy"


def _accuracy(outputs: torch.Tensor, labels: torch.Tensor) -> float:
    axis = class_axis(outputs)
    if axis is None:
        raise SelectionError(f"the first output is {list(outputs.shape)}, which has no axis of classes", hint="pass a metric of your own")
    return float((outputs.argmax(axis) == labels).double().mean())


def _data(data: Any) -> tuple[Call, Any, int]:
    import torch

    if not isinstance(data, tuple) or len(data) != 2:
        raise SelectionError("data is a pair (inputs, labels)", hint="pass (inputs, None) when there are no labels")
    inputs, labels = data
    (call,) = calls_from([inputs])
    lengths = {t.shape[0] if t.ndim else None for t in call.tensors().values()}
    if len(lengths) != 1 or None in lengths:
        raise SelectionError("the inputs do not all have the same first axis, so they cannot be cut into batches")
    items = int(lengths.pop() or 0)
    if labels is not None:
        labels = torch.as_tensor(labels)
        if labels.ndim == 0 or labels.shape[0] != items:
            raise SelectionError(f"there are {items} inputs and {list(labels.shape)} labels")
    return call, labels, items


def _floating(runnable: Any) -> torch.dtype | None:
    import torch

    if not isinstance(runnable, torch.nn.Module):
        return None
    return next((p.dtype for p in runnable.parameters() if p.is_floating_point() and p.dtype.itemsize > 1), None)


def _slice(call: Call, start: int, stop: int) -> Call:
    return call.map(lambda t: t[start:stop])


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _parts(thing: Any) -> tuple[Any, Any]:
    """(what runs or None, what is weighed or None)."""
    if isinstance(thing, tuple) and len(thing) == 2:
        return thing
    if isinstance(thing, Checkpoint):
        return None, thing
    if isinstance(thing, (str, os.PathLike)):
        return (thing if Path(thing).suffix.lower() == ".onnx" else None), thing
    return thing, None
