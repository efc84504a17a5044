"""Parity: does a candidate answer as its reference does, output by output?

Owns the pairing of outputs, the verdict, and its report. A difference is a falsy report; only inputs that cannot
serve, and a reference that does not run, are errors. `causes` looks for the reason of a failure.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from workbench.errors import SelectionError, visible
from workbench.report import Report
from workbench.tables import Column, Table, table
from workbench.verification.measures import Figures, Meter, Sample, Spread, finite, peak, same, spread
from workbench.verification.runners import OnnxRunner, Runner, running
from workbench.verification.tolerance import Limit, NoiseFloor, noise_floor
from workbench.verification.values import Call, calls_from, kept, paired, written
from workbench.verification.variations import corners, sizes

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure

_TINY = 1e-8
_Pair = tuple[dict[str, "torch.Tensor"], dict[str, "torch.Tensor"]] | None  # answers of both sides


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
        amplified: the reference amplifies rounding so far that the limit is held at √eps of the largest value.
        where: what breaks the limit, where that is not the largest difference but one in smaller values, or "".
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
    amplified: bool = False
    where: str = ""

    @property
    def ok(self) -> bool:
        return not self.problem and (self.within_noise if self.within_given is None else self.within_given)


@dataclass(frozen=True)
class Trial:
    """One made batch beside those given.

    Attributes:
        inputs: which: `random`, `zeros`, `ones`, `large`, `tiny`, `batch + 1` or `length + 1`.
        outputs: as in the report, over this batch alone; empty where nothing is judged.
        left_out: why it is not judged, or "".
    """

    inputs: str
    outputs: tuple[OutputParity, ...]
    left_out: str = ""

    @property
    def ok(self) -> bool:
        return all(o.ok for o in self.outputs)

    @property
    def worst(self) -> OutputParity | None:
        """The first output that fails, or the one that differs most."""
        failing = [o for o in self.outputs if not o.ok]
        differing = [o for o in self.outputs if o.figures and o.figures.max_abs is not None]
        return failing[0] if failing else max(differing, key=lambda o: o.figures.max_abs if o.figures else 0.0, default=None)  # type: ignore[arg-type, return-value]


@dataclass(frozen=True, repr=False)
class ParityReport(Report):
    """Whether two runners agree. `bool(report)` is the answer: by rtol and atol where they were given, otherwise by measured rounding.

    Attributes:
        reference, candidate: their names.
        outputs: one entry per output of the reference, and per output that only the candidate has.
        batches, calls: how many batches, and how often each was run in a row on both.
        rtol, atol: as given.
        problems: what stopped a comparison (the candidate raised, the answers keep state), in words.
        tried: the made batches, where `vary` was asked for.
        cause: why a failing report fails, as far as an experiment shows it (see `causes`), or "".
        sample: pairs (reference, candidate) of at most 20,000 values as float64 [2, n], the worst among them; or None.
        notes: what an ONNX graph cannot do and the other side does, in words: writing into an input.
    """

    reference: str
    candidate: str
    outputs: tuple[OutputParity, ...]
    batches: int
    calls: int
    rtol: float | None = None
    atol: float | None = None
    problems: tuple[str, ...] = ()
    tried: tuple[Trial, ...] = ()
    cause: str = ""
    sample: Any = field(default=None, repr=False, compare=False)
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return bool(self.outputs) and all(o.ok for o in self.outputs) and all(t.ok for t in self.tried) and not self.problems

    @property
    def max_abs(self) -> float | None:
        """Largest difference over all outputs; None when no finite pair was compared."""
        return max((o.figures.max_abs for o in self.outputs if o.figures and o.figures.max_abs is not None), default=None)

    @property
    def headline(self) -> str:
        pair = f"{visible(self.candidate)} and {visible(self.reference)}"
        beyond = [t for t in self.tried if not t.left_out]
        made = f", {_counted(len(beyond), 'made batch', 'made batches')}" if self.tried else ""
        runs = f"{_counted(len(self.outputs), 'output')}, {_counted(self.batches, 'batch', 'batches')}, {_counted(self.calls, 'call')} each{made}"
        if self.ok:
            by = (
                "within rounding" if self.rtol is None and self.atol is None else f"within rtol {self.rtol or 0:g}, atol {self.atol or 0:g}"
            )
            largest = "nothing differs" if not self.max_abs else f"the largest difference is {self.max_abs:.2g}"
            return f"{pair} agree {by}: {largest} ({runs})."
        failing = [o for o in self.outputs if not o.ok]
        first = f"`{visible(failing[0].name)}` {_failure(failing[0])}" if failing else ""
        causes = [*(visible(p) for p in self.problems[:1]), *([first] if first else [])]
        worst = next(((t, t.worst) for t in beyond if not t.ok), None)
        if worst and worst[1] and not causes:
            causes = [f"on {worst[0].inputs} inputs `{visible(worst[1].name)}` {_failure(worst[1])}"]
        why = f" Cause: {visible(self.cause)}." if self.cause else ""
        return f"{pair} differ: {'; '.join(causes) or 'nothing was compared'} ({len(failing)} of {runs}).{why}"

    def tables(self) -> tuple[Table, ...]:
        tables = [
            table("outputs", _COLUMNS, (_row(o) for o in self.outputs)),
            table("tolerance", _LIMIT_COLUMNS, _limit_rows(self.outputs)),
        ]
        if self.tried:
            tables.append(table("made inputs", _TRIAL_COLUMNS, (_trial_row(t) for t in self.tried)))
        cause = [f"Cause: {self.cause}"] if self.cause else []
        told = (f"`{o.name}` {text}" for o in self.outputs for text in (o.problem, o.note) if text)
        remarks = [*cause, *self.problems, *self.notes, *told]
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
    Column("top-5", "percent", "of the reference's five largest classes, how many are among the candidate's"),
    Column("KL", "number", "mean KL(reference || candidate) over rows of classes, in nats"),
    Column("unequal", "count", "values that are not the same, over all batches and calls"),
    Column("worst at", "text", "candidate against reference"),
)
_LIMIT_COLUMNS = (
    Column("output", "name"),
    Column("limit", "number"),
    Column("within rounding", "mark"),
    Column("within rtol, atol", "mark"),
    Column("reason", "text"),
)

_TRIAL_COLUMNS = (
    Column("inputs", "name"),
    Column("", "mark"),
    Column("output", "name", "the one that fails, or differs most"),
    Column("max abs", "number"),
    Column("limit", "number"),
    Column("not judged", "text"),
)


def _trial_row(t: Trial) -> tuple[Any, ...]:
    o = t.worst
    figures = (o.name, o.figures.max_abs if o.figures else None, o.limit) if o else (None, None, None)
    return (t.inputs, None if t.left_out else "✓" if t.ok else "⚠", *figures, t.left_out or None)


def _row(o: OutputParity) -> tuple[Any, ...]:
    f = o.figures
    mark = "✓" if o.ok else "⚠"
    if f is None:
        return (o.name, mark, o.shape, o.dtype, *[None] * 11)
    snr = "exact" if f.unequal == 0 else f.snr_db
    classes = (f.top1, f.top5, f.kl)
    return (
        o.name,
        mark,
        o.shape,
        o.dtype,
        f.max_abs,
        f.mean_abs,
        f.relative,
        f.max_ulp,
        f.cosine,
        snr,
        *classes,
        f.unequal,
        f.worst or None,
    )


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
    if o.where and o.within_given is None:
        return f"{o.where}; {beyond}"
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
    mask: Any = None,
    vary: bool = False,
    calls: int = 2,
    by_position: bool = False,
    trust: bool = False,
) -> ParityReport:
    """Compare what two runners answer to the same inputs.

    Args:
        reference, candidate: an nn.Module (run in eval mode, then given back as it was), the path of an `.onnx` file (run in ONNX
            Runtime), of a TorchScript or `.pt2` file, an ExportedProgram, or any callable.
        inputs: a tensor, a tuple of arguments, a dict of keyword arguments, or a list of those (several batches).
        rtol, atol: |candidate - reference| <= atol + rtol |reference|, element by element; when one is given, the other is 0. When both
            are None the limit is 8 × the reference's own rounding, the larger of what float64 moves it by and half of what sums in
            reverse order do, between 4 eps and √eps of the largest value; far smaller values beside it are held to their own.
        mask: which places count, 1 or True, over the outputs' leading axes (`[n, t]` for `[n, t, classes]`): the name of the input that
            holds it ("attention_mask"), a tensor, a function of the model's arguments (`lambda ids, pad: ~pad`), or {output: one of
            those}. Places left out enter no figure and no verdict, and are counted.
        vary: also compare on made inputs like the first batch (random, zeros, ones, large, tiny, one item more, one place longer), each
            judged alone. Those that the reference does not answer, sizes that the candidate does not take, and those on which the
            reference amplifies rounding are told and not judged.
        calls: runs of each batch in a row; the second finds state that one side keeps and the other does not.
        by_position: pair outputs by their order even where both sides use the same names: a file's names are its exporter's.
        trust: run a stored program that this process did not write, once a scan finds nothing dangerous in it.
    Returns:
        A report that is true when every output agrees; where it does not, `cause` says what an experiment shows to be the reason.
        Outputs pair by path; an ONNX graph whose names are its own pairs by position. Whole numbers and booleans must be equal, but
        where the reference's own rounding decides them; shapes and dtypes must match; NaN agrees only with NaN. What one side writes into
        its inputs, the other must write too.
    Raises:
        SelectionError: inputs hold nothing or cannot be copied, the reference does not run on them, there is no output, or the mask fits none.
    Cost: per batch `calls` runs of the candidate and three times as many of the reference, one third in float64 (a copy of a module
        up to 1 GiB); 24 more of the reference for outputs under 256 values; `vary` adds up to seven batches; a failure, see `causes`.
    """
    batches = calls_from(inputs)
    if not isinstance(calls, int) or calls < 1:
        raise SelectionError(f"calls is {calls}; at least one run is needed")
    tolerances: dict[str, Any] = {"rtol": rtol, "atol": atol}
    for name, value in tolerances.items():
        if value is not None and not (isinstance(value, (int, float)) and 0 <= value < math.inf):
            raise SelectionError(f"{name} is {value!r}; rtol and atol are zero or more")
    with running(reference, trust=trust) as first, running(candidate, trust=trust) as second, noise_floor(reference) as floor:
        if first.name == second.name:
            first.name, second.name = f"{first.name} (reference)", f"{second.name} (candidate)"
        comparison = _Comparison(first, second, floor, rtol, atol, mask)
        comparison.by_position = by_position
        report = comparison.run(batches, calls, vary=vary)
    if report:
        return report
    from workbench.verification.causes import Failure, cause_of

    names = (report.reference, report.candidate)
    failure = Failure(reference, candidate, trust, mask, names, comparison.by_position, comparison.answered, *comparison.failures())
    return replace(report, cause=cause_of(failure))


def agreement(reference: Runner, candidate: Runner, batches: tuple[Call, ...], floor: NoiseFloor) -> ParityReport:
    """`parity` over one call of each batch by a floor that is known already, without a search for the cause where it fails."""
    return _Comparison(reference, candidate, floor, None, None, None).run(batches, 1, vary=False)


class _Gathered:
    """What one set of batches showed: all given ones together, or one made batch."""

    def __init__(self) -> None:
        self.meters: dict[str, Meter] = {}
        self.specs: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        self.faults: dict[str, str] = {}
        self.undecided: dict[str, int] = {}
        self.apart: dict[str, dict[tuple[str, int], tuple[bool, Spread]]] = {}  # output: (batch, call): never to be equal, distances


class _Comparison:
    """One comparison in progress."""

    def __init__(self, reference: Runner, candidate: Runner, floor: NoiseFloor, rtol: float | None, atol: float | None, mask: Any) -> None:
        self.reference, self.candidate, self.floor, self.by_position = reference, candidate, floor, False
        self.rtol, self.atol, self.mask = rtol, atol, mask
        self.given, self.made = _Gathered(), dict[str, _Gathered]()
        self.answered: dict[str, Call] = {}
        self.keeps: dict[str, dict[str, torch.Tensor]] = {}
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.moves, self.finite = False, True

    def run(self, batches: tuple[Call, ...], calls: int, *, vary: bool) -> ParityReport:
        for number, batch in enumerate(batches, 1):
            before: _Pair = None
            for turn in range(1, calls + 1):
                pair = self._answers(batch, f"batch {number}", turn)
                if pair is None:
                    break
                self._watch_state(before, pair)
                before = pair
            if self.problems:
                break
        tried = list(self._vary(batches[0])) if vary and not self.problems else []
        for label, batch in self.answered.items():
            if label == "batch 1" or label in self.made:
                self.floor.add_nearby(self.reference, batch, self.keeps[label], label, made=label in self.made)
        outputs = tuple(self._judge(self.given, name) for name in self.given.specs)
        if not any(o.problem or (o.figures and o.figures.count) for o in outputs):
            self.problems.append("no output holds values in any batch, so nothing was compared")
        trials = tuple(trial if trial.left_out else self._tried(trial.inputs) for trial in tried)
        sample = Sample()
        for meter in self.given.meters.values():
            if meter.sample.pairs is not None:
                sample.merge(meter.sample.pairs)
        pairs = None if sample.pairs is None else sample.pairs.numpy()
        names = (self.reference.name, self.candidate.name)
        problems, notes = tuple(self.problems), tuple(self.notes)
        return ParityReport(*names, outputs, len(batches), calls, self.rtol, self.atol, problems, trials, sample=pairs, notes=notes)

    def failures(self) -> tuple[dict[str, tuple[int, ...]], dict[str, dict[str, float]]]:
        """({batch: calls on which it failed}, {batch: {output: limit}}), by rounding alone, of what was judged."""
        failing: dict[str, tuple[int, ...]] = {}
        limits: dict[str, dict[str, float]] = {}
        for to in (self.given, *self.made.values()):
            for name, calls in to.apart.items():
                for (batch, turn), found in calls.items():
                    limit = self._limit(name, to.specs[name][1], *found, batch)
                    limits.setdefault(batch, {})[name] = limit.value
                    if (limit.ratio > 1 or name in to.faults) and turn not in failing.get(batch, ()):
                        failing[batch] = (*failing.get(batch, ()), turn)
        return failing, limits

    def _answers(self, batch: Call, label: str, turn: int) -> _Pair:
        """Run both on one given batch and measure; None when the candidate raised, which is a finding."""
        where, ours, theirs = f"{label}, call {turn}", batch.fresh(), batch.fresh()
        expected = _run_reference(self.reference, ours, where)
        self.finite = self.finite and _finite(expected)
        try:
            found = self.candidate(theirs)
        except Exception as error:  # a candidate that cannot answer is the finding, whatever it raised
            self.problems.append(f"{self.candidate.name} failed on {where} ({_raised(error)})")
            for name, value in expected.items():
                self.given.specs.setdefault(name, (tuple(value.shape), value.dtype))
                self.given.faults.setdefault(name, "was not answered")
            return None
        self._watch_inputs(batch, ours, theirs)
        return self._measure_all(self.given, batch, label, turn, expected, found)

    def _vary(self, batch: Call) -> Iterator[Trial]:
        """Run both on each made batch, for `_tried` to judge. What is skipped moves state on one side only, and so ends it."""
        other_sizes = sizes(batch)
        for label, call in (corners(batch) | other_sizes).items():
            ours, theirs = call.fresh(), call.fresh()
            try:
                expected = self.reference(ours)
                keep = kept(self.mask, call, expected)
            except Exception as error:  # a stranger's forward: what it does not take proves nothing
                why = f"{self.reference.name} does not take them ({_raised(error)})"
            else:
                why = f"{self.reference.name} gives NaN or infinity" if self.finite and not _finite(expected) else ""
                why = "the mask leaves nothing of them" if not why and any(not bool(places.any()) for places in keep.values()) else why
            if not why:
                try:
                    found = self.candidate(theirs)
                except Exception as error:  # likewise
                    why = f"{self.candidate.name} does not take them ({_raised(error)})"
                    if label not in other_sizes:
                        self.problems.append(f"{self.candidate.name} failed on {label} inputs ({_raised(error)})")
                else:
                    self._watch_inputs(call, ours, theirs)
                    self._measure_all(self.made.setdefault(label, _Gathered()), call, label, 1, expected, found)
            yield Trial(label, (), why)
            if why and self.moves:
                return

    def _tried(self, label: str) -> Trial:
        to = self.made[label]
        outputs = tuple(self._judge(to, name) for name in to.specs)
        empty = [o for o in outputs if o.figures is not None and not o.figures.count and to.undecided.get(o.name)]
        if empty:
            del self.made[label], self.answered[label]
            return Trial(label, (), f"the reference's own rounding decides all of `{empty[0].name}` there")
        shaky = [o for o in outputs if not o.ok and o.amplified]
        if shaky:
            del self.made[label], self.answered[label]
            return Trial(label, (), f"`{shaky[0].name}` amplifies rounding there: {shaky[0].reason}")
        return Trial(label, outputs)

    def _measure_all(
        self, to: _Gathered, batch: Call, label: str, turn: int, expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]
    ) -> _Pair:
        """Measure every output; the answers come back with what was left out set to zero."""
        keep = kept(self.mask, batch, expected)
        undecided = self.floor.add(batch, expected, keep, label, made=to is not self.given)
        self.answered[label], self.keeps[label] = batch, dict(keep)
        for name, places in undecided.items():
            places = places & keep[name] if name in keep else places
            to.undecided[name] = to.undecided.get(name, 0) + int(places.sum())
            keep[name] = ~places & keep[name] if name in keep else ~places
        shown: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]] = ({}, {})
        ordered = self.candidate.ordered or self.reference.ordered
        for name, pair in paired(expected, found, ordered=ordered, by_position=self.by_position).items():
            self._measure(to, name, *pair, label, turn, keep.get(name))
            for side, value in zip(shown, pair, strict=True):
                if value is not None:
                    side[name] = value.masked_fill(~keep[name], 0) if name in keep and keep[name].shape == value.shape else value
        return shown

    def _measure(
        self, to: _Gathered, name: str, a: torch.Tensor | None, b: torch.Tensor | None, label: str, turn: int, keep: torch.Tensor | None
    ) -> None:
        known = a if a is not None else b
        assert known is not None
        to.specs.setdefault(name, (tuple(known.shape), known.dtype))
        where = label if to is not self.given else f"{label}, call {turn}"
        if a is None or b is None:
            fault = f"is missing in {self.candidate.name if b is None else self.reference.name}"
        elif a.shape != b.shape:
            fault = f"has shape {list(a.shape)} in {self.reference.name} and {list(b.shape)} in {self.candidate.name}"
        else:
            if a.dtype != b.dtype:
                to.faults.setdefault(name, f"is {_short(a.dtype)} in {self.reference.name} and {_short(b.dtype)} in {self.candidate.name}")
            meter = to.meters.setdefault(name, Meter(rtol=self.rtol, atol=self.atol))
            before = meter.one_sided + (0 if _real(a.dtype) else meter.unequal)
            meter.add(a, b, where=where, keep=keep)
            odd = meter.one_sided + (0 if _real(a.dtype) else meter.unequal) > before
            to.apart.setdefault(name, {})[label, turn] = (odd, spread(a, b, keep))
            return
        to.faults.setdefault(name, f"{fault} ({where})")

    def _watch_inputs(self, batch: Call, ours: Call, theirs: Call) -> None:
        """What one side writes into its inputs, the other must write too, but for a graph, which never does."""
        import torch

        one, two = written(batch, ours), written(batch, theirs)
        for path in {**one, **two}:
            writer, other = (self.reference, self.candidate) if path in one else (self.candidate, self.reference)
            told, to = f"{writer.name} writes into its input {path!r} and {other.name} does not", self.problems
            if isinstance(other, OnnxRunner):
                to = self.notes
            if path in one and path in two:
                a, b = one[path], two[path]
                (far, scale), real = peak(a, b) if a.shape == b.shape else (math.inf, 0.0), _real(a.dtype)
                limit = max(
                    self.floor.limit(f"written {path}", a.dtype, scale).value if real else 0.0, (self.atol or 0) + (self.rtol or 0) * scale
                )
                if far <= limit and (not real or torch.equal(finite(a), finite(b))):
                    continue
                told = f"{writer.name} and {other.name} write other values into the input {path!r}: they differ by {far:.2g}"
            if told not in to:
                to.append(told)

    def _watch_state(self, before: _Pair, pair: tuple[dict[str, torch.Tensor], ...]) -> None:
        if not before:
            return
        moved = [not same(old, new) for old, new in zip(before, pair, strict=True)]
        self.moves = self.moves or any(moved)
        if moved[0] != moved[1]:
            mover, other = (self.reference, self.candidate) if moved[0] else (self.candidate, self.reference)
            cause = "it keeps state or draws at random"
            self.problems.append(f"{mover.name} answers the same input differently on the next call and {other.name} does not: {cause}")

    def _limit(self, name: str, dtype: torch.dtype, odd: bool, found: Spread, batch: str) -> Limit:
        if not _real(dtype):
            return Limit(0.0, None, "whole numbers and booleans must be equal", far=math.inf if odd else 0.0)
        limit = self.floor.judge(name, dtype, found, batch)
        return replace(limit, far=math.inf, places="") if odd else limit

    def _judge(self, to: _Gathered, name: str) -> OutputParity:
        shape, dtype = to.specs[name]
        meter, fault = to.meters.get(name), to.faults.get(name, "")
        if meter is None:
            return OutputParity(name, shape, _short(dtype), None, None, "", False, None, problem=fault)
        f = meter.figures()
        judged = [self._limit(name, dtype, *found, batch) for (batch, _), found in to.apart[name].items()]
        limit = max(judged, key=lambda one: (one.ratio, one.value))
        within = limit.ratio <= 1 and not f.one_sided
        given = None if f.beyond is None else within if not _real(dtype) else f.beyond == 0 and not f.one_sided
        notes = [_note(f, whole=not _real(dtype), undecided=to.undecided.get(name, 0), calls=max(turn for _, turn in to.apart[name]))]
        notes += ["comes from a model that amplifies rounding"] if limit.amplified else []
        problem = fault or _problem(f, exact=not _real(dtype))
        note = "; ".join(text for text in notes if text)
        where = f"differs by {limit.far:.2g} in {limit.places}" if limit.places else ""
        return OutputParity(name, shape, _short(dtype), f, limit.value, limit.reason, within, given, problem, note, limit.amplified, where)


def _run_reference(runner: Runner, batch: Call, where: str) -> dict[str, torch.Tensor]:
    try:
        return runner(batch)
    except SelectionError:
        raise
    except Exception as error:  # a stranger's forward: whatever it raises, these inputs cannot serve
        hint = "call it yourself with these inputs and see that it answers"
        raise SelectionError(f"the reference {runner.name} does not run on {where}: {type(error).__name__}: {error}", hint=hint) from error


def _finite(outputs: dict[str, torch.Tensor]) -> bool:
    return all(bool(finite(value).all()) for value in outputs.values() if _real(value.dtype))


def _raised(error: BaseException) -> str:
    return f"{type(error).__name__}: {next((line for line in str(error).splitlines() if line.strip()), '')}"


def _real(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def _problem(f: Figures, *, exact: bool) -> str:
    if f.count == 0 and f.masked:
        return "holds no values in any batch, so nothing was compared, for the mask leaves none"
    if f.both_nan == f.count > 0:
        return "is NaN everywhere on both sides, which proves nothing"
    if f.one_sided:
        return f"has {_counted(f.one_sided, 'value')} that are NaN or infinite on one side only"
    if exact and f.unequal:
        return f"differs in {f.unequal} of {_counted(f.count, 'value')}, the most at {f.worst}"
    return ""


def _note(f: Figures, *, whole: bool, undecided: int, calls: int) -> str:
    """What qualifies the figures. They hold every call; places are counted once."""
    notes = [] if f.count or f.masked else ["is empty in every batch, so its shape and dtype alone were compared"]
    if f.masked > undecided:
        notes.append(f"leaves out {_counted((f.masked - undecided) // calls, 'padded value')} of {(f.count + f.masked) // calls}")
    if undecided:
        notes.append(f"leaves out {_counted(math.ceil(undecided / calls), 'value')} that the reference's own rounding decides")
    if f.both_nan:
        notes.append(f"is NaN on both sides at {f.both_nan // calls} of {f.count // calls} places")
    if not whole and f.scale == 0 and f.max_abs is not None:
        notes.append("is zero everywhere in the reference, which says little")
    elif not whole and 0 < f.scale < _TINY:
        notes.append(f"is tiny in the reference (at most {f.scale:.2g}), which says little")
    return "; ".join(notes)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
