"""Parity: does a candidate answer as its reference does, output by output?

Owns the pairing of outputs, the verdict, and its report. A difference is a falsy report; only inputs that cannot
serve, and a reference that does not run, are errors. Masks for padded positions are the next thing to go here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from workbench.errors import SelectionError, visible
from workbench.report import Report
from workbench.tables import Column, Table, table
from workbench.verification.measures import Figures, Meter, Sample
from workbench.verification.runners import Runner, running
from workbench.verification.tolerance import NoiseFloor, noise_floor
from workbench.verification.values import Call, calls_from

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

_TINY = 1e-8


@dataclass(frozen=True)
class OutputParity:
    """One output of both runners.

    Attributes:
        name: its path in the reference's outputs.
        shape, dtype: the reference's, in the first batch.
        figures: the distances; None where nothing could be compared.
        limit: largest |difference| that rounding explains; 0.0 for whole numbers, None where nothing was compared.
        reason: where the limit comes from.
        within_noise: verdict by the limit.
        within_given: verdict by the caller's rtol and atol; None when neither was given.
        problem: why it fails, in words, or "".
        note: what qualifies it, or "".
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    figures: Figures | None
    limit: float | None
    reason: str
    within_noise: bool
    within_given: bool | None
    problem: str = ""
    note: str = ""

    @property
    def ok(self) -> bool:
        return not self.problem and (self.within_noise if self.within_given is None else self.within_given)


@dataclass(frozen=True, repr=False)
class ParityReport(Report):
    """Whether two runners agree. `bool(report)` is the answer: by rtol and atol where they were given, otherwise by measured rounding.

    Attributes:
        reference, candidate: their names.
        outputs: one entry per output of the reference, and per output that only the candidate has.
        batches, calls: how many batches, and how often each was run in a row on both.
        rtol, atol: as given.
        problems: what stopped a comparison (the candidate raised, the answers keep state), in words.
        sample: pairs (reference, candidate) of at most 20,000 values as float64 [2, n], the worst among them; or None.
    """

    reference: str
    candidate: str
    outputs: tuple[OutputParity, ...]
    batches: int
    calls: int
    rtol: float | None = None
    atol: float | None = None
    problems: tuple[str, ...] = ()
    sample: Any = field(default=None, repr=False, compare=False)

    @property
    def ok(self) -> bool:
        return bool(self.outputs) and all(o.ok for o in self.outputs) and not self.problems

    @property
    def max_abs(self) -> float | None:
        """Largest difference over all outputs; None when no finite pair was compared."""
        return max((o.figures.max_abs for o in self.outputs if o.figures and o.figures.max_abs is not None), default=None)

    @property
    def headline(self) -> str:
        pair = f"{visible(self.candidate)} and {visible(self.reference)}"
        runs = f"{_counted(len(self.outputs), 'output')}, {_counted(self.batches, 'batch', 'batches')}, {_counted(self.calls, 'call')} each"
        if self.ok:
            by = (
                "within rounding" if self.rtol is None and self.atol is None else f"within rtol {self.rtol or 0:g}, atol {self.atol or 0:g}"
            )
            largest = "nothing differs" if not self.max_abs else f"the largest difference is {self.max_abs:.2g}"
            return f"{pair} agree {by}: {largest} ({runs})."
        failing = [o for o in self.outputs if not o.ok]
        first = f"`{visible(failing[0].name)}` {_failure(failing[0])}" if failing else ""
        causes = [*(visible(p) for p in self.problems[:1]), *([first] if first else [])]
        return f"{pair} differ: {'; '.join(causes) or 'nothing was compared'} ({len(failing)} of {runs})."

    def tables(self) -> tuple[Table, ...]:
        tables = [
            table("outputs", _COLUMNS, (_row(o) for o in self.outputs)),
            table("tolerance", _LIMIT_COLUMNS, _limit_rows(self.outputs)),
        ]
        remarks = [*self.problems, *(f"`{o.name}` {text}" for o in self.outputs for text in (o.problem, o.note) if text)]
        if remarks:
            tables.append(table("remarks", [Column("what", "text")], [(text,) for text in remarks]))
        return tuple(tables)

    def plot(self) -> Figure:
        """Candidate against reference, and the spread of the differences, over a sample of at most 20,000 values."""
        from workbench.render import plots

        if self.sample is None:
            raise SelectionError("no pair of finite values was compared, so there is nothing to draw", hint="its tables() say why")
        return plots.parity_scatter(self.sample[0], self.sample[1], self.headline)


_COLUMNS = (
    Column("output", "name"),
    Column("", "mark"),
    Column("shape", "shape"),
    Column("dtype"),
    Column("max abs", "number", "largest |candidate − reference|"),
    Column("mean abs", "number"),
    Column("relative", "number", "‖candidate − reference‖ / ‖reference‖"),
    Column("max ULP", "count", "largest distance in representable values; large near zero"),
    Column("cosine", "number"),
    Column("SNR dB", "number", "power of the reference over power of the difference"),
    Column("top-1", "percent", "rows whose largest class agrees"),
    Column("unequal", "count", "values that are not the same"),
    Column("worst at", "text", "candidate against reference"),
)
_LIMIT_COLUMNS = (
    Column("output", "name"),
    Column("limit", "number"),
    Column("within rounding", "mark"),
    Column("within rtol, atol", "mark"),
    Column("reason", "text"),
)


def _row(o: OutputParity) -> tuple[Any, ...]:
    f = o.figures
    mark = "✓" if o.ok else "⚠"
    if f is None:
        return (o.name, mark, o.shape, o.dtype, *[None] * 9)
    snr = "exact" if f.unequal == 0 else f.snr_db
    return (o.name, mark, o.shape, o.dtype, f.max_abs, f.mean_abs, f.relative, f.max_ulp, f.cosine, snr, f.top1, f.unequal, f.worst or None)


def _limit_rows(outputs: tuple[OutputParity, ...]) -> Iterator[tuple[Any, ...]]:
    marks = {True: "✓", False: "⚠", None: None}
    for o in outputs:
        yield (o.name, o.limit, marks[o.within_noise] if o.figures else None, marks[o.within_given], o.reason or None)


def _failure(o: OutputParity) -> str:
    if o.problem:
        return o.problem
    assert o.figures is not None
    assert o.figures.max_abs is not None
    beyond = f"{o.figures.beyond} values lie beyond rtol and atol" if o.within_given is False else f"the limit is {o.limit:.2g}"
    return f"differs by {o.figures.max_abs:.2g} at {o.figures.worst}; {beyond}"


def _counted(n: int, one: str, many: str | None = None) -> str:
    return f"{n} {one if n == 1 else many or one + 's'}"


def parity(
    reference: Any,
    candidate: Any,
    inputs: Any,
    *,
    rtol: float | None = None,
    atol: float | None = None,
    calls: int = 2,
    trust: bool = False,
) -> ParityReport:
    """Compare what two runners answer to the same inputs.

    Args:
        reference, candidate: an nn.Module (run in eval mode, then given back as it was), the path of an `.onnx` file (run in ONNX
            Runtime), of a TorchScript or `.pt2` file, an ExportedProgram, or any callable.
        inputs: a tensor, a tuple of arguments, a dict of keyword arguments, or a list of those (several batches).
        rtol, atol: |candidate - reference| <= atol + rtol |reference|, element by element; when one is given, the other is 0. When both
            are None the limit is 8 × the reference's own rounding, measured in float64, between 4 eps and √eps of the largest value.
        calls: runs of each batch in a row; the second finds state that one side keeps and the other does not.
        trust: run a stored program that this process did not write, once a scan finds nothing dangerous in it.
    Returns:
        A report that is true when every output agrees. Outputs pair by path; an ONNX graph whose names are its own pairs by position.
        Whole numbers and booleans must be equal; shapes and dtypes must match; NaN agrees only with NaN.
    Raises:
        SelectionError: inputs hold nothing, the reference does not run on them, or there is no output.
    Cost: `calls` runs per batch on each side and in float64 (a float64 copy of a module up to 1 GiB); plus 10 runs for small outputs.
    """
    batches = calls_from(inputs)
    if calls < 1:
        raise SelectionError(f"calls is {calls}; at least one run is needed")
    if (rtol or 0) < 0 or (atol or 0) < 0:
        raise SelectionError("rtol and atol are zero or more")
    with running(reference, trust=trust) as first, running(candidate, trust=trust) as second, noise_floor(reference) as floor:
        if first.name == second.name:
            first.name, second.name = f"{first.name} (reference)", f"{second.name} (candidate)"
        return _Comparison(first, second, floor, rtol, atol).run(batches, calls)


class _Comparison:
    """One comparison in progress: meters by output, and what was noticed on the way."""

    def __init__(self, reference: Runner, candidate: Runner, floor: NoiseFloor, rtol: float | None, atol: float | None) -> None:
        self.reference, self.candidate, self.floor = reference, candidate, floor
        self.rtol, self.atol = rtol, atol
        self.meters: dict[str, Meter] = {}
        self.specs: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        self.faults: dict[str, str] = {}
        self.problems: list[str] = []

    def run(self, batches: tuple[Call, ...], calls: int) -> ParityReport:
        for number, batch in enumerate(batches, 1):
            before: list[dict[str, torch.Tensor]] = []
            for turn in range(1, calls + 1):
                pair = self._answers(batch, f"batch {number}, call {turn}")
                if pair is None:
                    break
                self._watch_state(before, pair)
                before = list(pair)
            if self.problems:
                break
        self.floor.add_nearby(self.reference, batches[0])
        outputs = tuple(self._judge(name) for name in self.specs)
        sample = Sample()
        for meter in self.meters.values():
            if meter.sample.pairs is not None:
                sample.merge(meter.sample.pairs)
        pairs = None if sample.pairs is None else sample.pairs.numpy()
        names = (self.reference.name, self.candidate.name)
        return ParityReport(*names, outputs, len(batches), calls, self.rtol, self.atol, tuple(self.problems), pairs)

    def _answers(self, batch: Call, where: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]] | None:
        """Run both on one batch and measure; None when the candidate raised, which is a finding."""
        expected = _run_reference(self.reference, batch, where)
        self.floor.add(batch, expected)
        try:
            found = self.candidate(batch.fresh())
        except Exception as error:  # a candidate that cannot answer is the finding, whatever it raised
            first = next((line for line in str(error).splitlines() if line.strip()), "")
            self.problems.append(f"{self.candidate.name} failed on {where} ({type(error).__name__}: {first})")
            for name, value in expected.items():
                self.specs.setdefault(name, (tuple(value.shape), value.dtype))
                self.faults.setdefault(name, "was not answered")
            return None
        paired = _pair(expected, found, by_position=self.candidate.ordered or self.reference.ordered)
        for name, (a, b) in paired.items():
            self._measure(name, a, b, where)
        return expected, found

    def _measure(self, name: str, a: torch.Tensor | None, b: torch.Tensor | None, where: str) -> None:
        known = a if a is not None else b
        assert known is not None
        self.specs.setdefault(name, (tuple(known.shape), known.dtype))
        if a is None or b is None:
            fault = f"is missing in {self.candidate.name if b is None else self.reference.name}"
        elif a.shape != b.shape:
            fault = f"has shape {list(a.shape)} in {self.reference.name} and {list(b.shape)} in {self.candidate.name}"
        else:
            if a.dtype != b.dtype:
                self.faults.setdefault(
                    name, f"is {_short(a.dtype)} in {self.reference.name} and {_short(b.dtype)} in {self.candidate.name}"
                )
            self.meters.setdefault(name, Meter(rtol=self.rtol, atol=self.atol)).add(a, b, where=where)
            return
        self.faults.setdefault(name, f"{fault} ({where})")

    def _watch_state(self, before: list[dict[str, torch.Tensor]], pair: tuple[dict[str, torch.Tensor], ...]) -> None:
        if not before:
            return
        moved = [not _same(old, new) for old, new in zip(before, pair, strict=True)]
        if moved[0] != moved[1]:
            mover, other = (self.reference, self.candidate) if moved[0] else (self.candidate, self.reference)
            cause = "it keeps state or draws at random"
            self.problems.append(f"{mover.name} answers the same input differently on the next call and {other.name} does not: {cause}")

    def _judge(self, name: str) -> OutputParity:
        shape, dtype = self.specs[name]
        meter, fault = self.meters.get(name), self.faults.get(name, "")
        if meter is None:
            return OutputParity(name, shape, _short(dtype), None, None, "", False, None, problem=fault)
        f = meter.figures()
        given = None if f.beyond is None else f.beyond == 0 and not f.one_sided
        if dtype.is_floating_point or dtype.is_complex:
            limit = self.floor.limit(name, dtype, f.scale)
            within, bound, reason = f.max_abs is None or f.max_abs <= limit.value, limit.value, limit.reason
            note = "; ".join(text for text in (_note(f), "comes from a model that amplifies rounding" if limit.amplified else "") if text)
        else:
            within, bound, reason, note = f.unequal == 0, 0.0, "whole numbers and booleans must be equal", _note(f, whole=True)
            given = None if given is None else within
        problem = fault or _problem(f, exact=not (dtype.is_floating_point or dtype.is_complex))
        return OutputParity(name, shape, _short(dtype), f, bound, reason, within and not f.one_sided, given, problem, note)


def _run_reference(runner: Runner, batch: Call, where: str) -> dict[str, torch.Tensor]:
    try:
        return runner(batch.fresh())
    except SelectionError:
        raise
    except Exception as error:  # a stranger's forward: whatever it raises, these inputs cannot serve
        hint = "call it yourself with these inputs and see that it answers"
        raise SelectionError(f"the reference {runner.name} does not run on {where}: {type(error).__name__}: {error}", hint=hint) from error


def _pair(
    expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor], *, by_position: bool
) -> dict[str, tuple[torch.Tensor | None, torch.Tensor | None]]:
    """Outputs by path; by position where a graph has names of its own and as many outputs."""
    if by_position and set(expected) != set(found) and len(expected) == len(found):
        return {name: (a, b) for (name, a), b in zip(expected.items(), found.values(), strict=True)}
    return {name: (expected.get(name), found.get(name)) for name in [*expected, *(n for n in found if n not in expected)]}


def _same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """The same answer twice, but for the rounding of sums that threads add up in another order."""
    import torch

    def close(x: torch.Tensor, y: torch.Tensor) -> bool:
        if not (x.is_floating_point() or x.is_complex()):
            return torch.equal(x, y)
        known = x.isfinite()
        slack = 16 * torch.finfo(x.dtype).eps * float(x[known].abs().max()) if bool(known.any()) else 0.0
        return torch.allclose(x, y, rtol=0.0, atol=slack, equal_nan=True)

    if a.keys() != b.keys():
        return False
    return all(x.shape == y.shape and x.dtype == y.dtype and close(x, y) for x, y in ((a[name], b[name]) for name in a))


def _problem(f: Figures, *, exact: bool) -> str:
    if f.count == 0:
        return "holds no values in any batch, so nothing was compared"
    if f.both_nan == f.count:
        return "is NaN everywhere on both sides, which proves nothing"
    if f.one_sided:
        return f"has {_counted(f.one_sided, 'value')} that are NaN or infinite on one side only"
    if exact and f.unequal:
        return f"differs in {f.unequal} of {_counted(f.count, 'value')}, the most at {f.worst}"
    return ""


def _note(f: Figures, *, whole: bool = False) -> str:
    notes = []
    if f.both_nan:
        notes.append(f"is NaN on both sides at {f.both_nan} of {f.count} places")
    if not whole and f.scale == 0 and f.max_abs is not None:
        notes.append("is zero everywhere in the reference, which says little")
    elif not whole and 0 < f.scale < _TINY:
        notes.append(f"is tiny in the reference (at most {f.scale:.2g}), which says little")
    return "; ".join(notes)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
