"""Planning: the scheme of each tensor that keeps the error least within a budget of bytes, and the frontier of all budgets.

Owns the plan as a thing: what it chose, what it comes to, how good it can at best be, and its JSON. Errors are taken to add up over
tensors; what that leaves out is for `truth` to measure. The search itself is `allocation`.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workbench.compression.allocation import allocate, steps
from workbench.compression.sensitivity import SCHEMES, SensitivityReport, sensitivity
from workbench.errors import BudgetError, SelectionError
from workbench.names import Patterns, require_names
from workbench.ops.quantization import Told
from workbench.ops.schemes import Scheme
from workbench.report import Report, to_plain
from workbench.stream import ProgressFunction
from workbench.tables import Column, Table, format_bytes, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LEFT = "as it is"


@dataclass(frozen=True)
class Choice:
    """What becomes of one tensor.

    Attributes:
        names: its name, and those tied to it.
        scheme: None where it is left as it is.
        before, nbytes: bytes now and under the scheme, once for all names.
    """

    names: tuple[str, ...]
    scheme: Scheme | None
    before: int
    nbytes: int
    error: float
    sqnr: float | None = None


@dataclass(frozen=True, repr=False)
class CompressionPlan(Report):
    """A scheme for each tensor, within a budget: `wb.ops.quantize(ckpt, plan=plan.schemes)`.

    Attributes:
        budget: bytes that the tensors may take in all.
        fixed: bytes of the tensors that were not to be touched.
        bound: no plan within the budget has less error, as far as the errors of tensors add up.
        measure: what `error` is.
    """

    choices: tuple[Choice, ...]
    budget: int
    fixed: int
    bound: float
    measure: str

    @property
    def schemes(self) -> dict[str, Scheme]:
        """What `wb.ops.quantize` takes: by name, without the tensors that are left as they are."""
        return {name: choice.scheme for choice in self.choices if choice.scheme is not None for name in choice.names}

    @property
    def nbytes(self) -> int:
        """Of all tensors, as `quantize` makes them and `save` writes them: the data section of a safetensors file, to the byte."""
        return self.fixed + sum(choice.nbytes for choice in self.choices)

    @property
    def before(self) -> int:
        return self.fixed + sum(choice.before for choice in self.choices)

    @property
    def error(self) -> float:
        return math.fsum(choice.error for choice in self.choices)

    @property
    def gap(self) -> float:
        """By how much at most another plan could be better; 0.0 where this one is proved best."""
        return max(0.0, self.error - self.bound)

    @property
    def headline(self) -> str:
        share = f" ({100 * self.nbytes / self.before:.3g} %)" if self.before else ""
        best = "the least there can be" if not self.gap else f"at most {self.gap:.2g} above the least there can be"
        return f"{format_bytes(self.nbytes)} of {format_bytes(self.before)}{share}, budget {format_bytes(self.budget)}; {self.measure} {self.error:.4g}, {best}"

    def tables(self) -> tuple[Table, ...]:
        columns = (
            Column("tensor", "name"), Column("scheme"), Column("bytes now", "bytes"), Column("bytes then", "bytes"), Column("error", "number", self.measure),
            Column("SQNR dB", "number"),
        )  # fmt: skip
        rows = [(" = ".join(c.names), str(c.scheme or _LEFT), c.before, c.nbytes, c.error, c.sqnr) for c in self.choices]
        if self.fixed:
            rows.append(("(all others)", _LEFT, self.fixed, self.fixed, None, None))  # type: ignore[arg-type]
        return (table("plan", columns, rows),)

    def to_json(self) -> str:
        """The plan as text; `from_json` gives it back."""
        return json.dumps({**self.to_dict(), "schemes": {name: to_plain(scheme) for name, scheme in self.schemes.items()}}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> CompressionPlan:
        """Read what `to_json` wrote.

        Raises:
            SelectionError: this is no plan.
        """
        try:
            told = json.loads(text)
            choices = tuple(
                Choice(
                    tuple(map(str, c["names"])), None if c["scheme"] is None else Scheme.of(c["scheme"]), int(c["before"]), int(c["nbytes"]),
                    float(c["error"]), None if c["sqnr"] is None else float(c["sqnr"]),
                )
                for c in told["choices"]
            )  # fmt: skip
            return cls(choices, int(told["budget"]), int(told["fixed"]), float(told["bound"]), str(told["measure"]))
        except (KeyError, TypeError, ValueError) as error:
            raise SelectionError(f"this is no plan: {type(error).__name__}: {error}", hint="give from_json what to_json wrote") from error


@dataclass(frozen=True, repr=False)
class FrontierReport(Report):
    """The frontier of size and error.

    Attributes:
        points: (bytes of all tensors, error), from the smallest: each is the best there is at its size, and no plan lies below the lines
            between them. `plan_compression(report, budget_nbytes=point[0])` gives the plan of a point.
        uniform: (scheme, bytes, error) of one scheme for every tensor, of those that can take every one.
    """

    points: tuple[tuple[int, float], ...]
    uniform: tuple[tuple[str, int, float], ...]
    measure: str

    @property
    def headline(self) -> str:
        (small, most), (large, _) = self.points[0], self.points[-1]
        text = f"from {format_bytes(large)} down to {format_bytes(small)}, where the {self.measure} is {most:.3g}"
        reached = [(name, error, [e for size, e in self.points if size <= nbytes]) for name, nbytes, error in self.uniform]
        name, times = max(
            ((name, error / held[-1]) for name, error, held in reached if held and held[-1] > 0), key=lambda p: p[1], default=("", 1.0)
        )
        return text + (f"; within the bytes of {name} everywhere, a mixed plan has {times:.3g} × less" if times > 1.005 else "")

    def tables(self) -> tuple[Table, ...]:
        columns = (Column("plan"), Column("bytes", "bytes"), Column("error", "number", self.measure))
        rows = [("mixed", *point) for point in self.points] + [
            (f"{name} everywhere", nbytes, error) for name, nbytes, error in self.uniform
        ]
        return (table("frontier", columns, sorted(rows, key=lambda row: row[1])),)

    def plot(self) -> Figure:
        from workbench.render import plots

        return plots.by_size(self.points, self.uniform, self.measure, self.headline, "bytes of all tensors  (X: one scheme for all)")


def plan_compression(
    source: Any,
    *,
    budget_mb: float | None = None,
    budget_nbytes: int | None = None,
    schemes: Sequence[Told] | None = None,
    names: Patterns | None = None,
    exclude: Patterns | None = None,
    max_ram_mb: int = 256,
    progress: ProgressFunction | None = None,
    cancel: threading.Event | None = None,
) -> CompressionPlan:
    """Choose a scheme for each tensor such that all of them together fit a budget, with the least total error.

    Args:
        source: a SensitivityReport, or what `sensitivity` takes; then it is measured by its weights.
        budget_mb, budget_nbytes: for the bytes of all tensors, in MB (10**6) or bytes. What a container adds, `predict` tells.
        schemes: to choose from, besides leaving a tensor as it is; by default those of the report, or `sensitivity`'s.
        names, exclude: globs over tensors that may be changed; the others stay, and count.
    Returns:
        A plan, proved best where its `gap` is 0. Ties count once and get one scheme.
    Raises:
        BudgetError: nothing is that small; the message says what is smallest.
        SelectionError: not exactly one budget, or nothing to choose.
    Cost: what `sensitivity` costs, unless its report is given; then a second for a thousand tensors.
    """
    if (budget_mb is None) == (budget_nbytes is None):
        raise SelectionError("give the budget once: budget_mb= or budget_nbytes=", hint="plan_compression(ckpt, budget_mb=25)")
    budget = budget_nbytes if budget_nbytes is not None else int(float(budget_mb or 0) * 10**6)
    report = _report(source, schemes, names, exclude, max_ram_mb=max_ram_mb, progress=progress, cancel=cancel)
    groups = _groups(report)
    options = [[(choice.nbytes, choice.error) for choice in group] for group in groups]
    least = report.fixed + sum(min(nbytes for nbytes, _ in each) for each in options)
    if budget < least:
        text = f"the tensors cannot fit {format_bytes(budget)} ({budget} bytes): the smallest that these schemes can make of them is {least} bytes"
        raise BudgetError(text, hint=f"give budget_nbytes={least} or more, more schemes (smaller groups cost more), or exclude less")
    picked, bound = allocate(options, budget - report.fixed)
    choices = tuple(group[i] for group, i in zip(groups, picked, strict=True))
    return CompressionPlan(choices, budget, report.fixed, bound, report.measure)


def frontier(
    source: Any,
    *,
    schemes: Sequence[Told] | None = None,
    names: Patterns | None = None,
    exclude: Patterns | None = None,
    max_ram_mb: int = 256,
    progress: ProgressFunction | None = None,
    cancel: threading.Event | None = None,
) -> FrontierReport:
    """The best error at every size, and where one scheme for all would stand; the arguments are those of `plan_compression`."""
    report = _report(source, schemes, names, exclude, max_ram_mb=max_ram_mb, progress=progress, cancel=cancel)
    groups = _groups(report)
    first, taken = steps([[(choice.nbytes, choice.error) for choice in group] for group in groups])
    now = [group[i] for group, i in zip(groups, first, strict=True)]
    points = [_total(report, now)]
    for step in taken:
        now[step.group] = groups[step.group][step.option]
        points.append(_total(report, now))
    everywhere = {scheme: [c for group in groups for c in group if c.scheme == scheme] for scheme in report.schemes}
    uniform = [(str(scheme), *_total(report, choices)) for scheme, choices in everywhere.items() if len(choices) == len(groups)]
    return FrontierReport(tuple(points), tuple(uniform), report.measure)


def _total(report: SensitivityReport, choices: Sequence[Choice]) -> tuple[int, float]:
    return report.fixed + sum(c.nbytes for c in choices), math.fsum(c.error for c in choices)


def _report(source: Any, schemes: Sequence[Told] | None, names: Patterns | None, exclude: Patterns | None, **how: Any) -> SensitivityReport:
    """The measured report; of one that is given, the rows that are asked for."""
    if not isinstance(source, SensitivityReport):
        return sensitivity(source, schemes=SCHEMES if schemes is None else schemes, names=names, exclude=exclude, **how)
    wanted = set(source.schemes if schemes is None else map(Scheme.of, schemes))
    known = [*source.sizes, *source.ties]
    chosen = set(known if names is None else require_names(names, known)) - set(() if exclude is None else require_names(exclude, known))
    sizes = {name: size for name, size in source.sizes.items() if {name, *(a for a, n in source.ties.items() if n == name)} <= chosen}
    if not sizes or not wanted <= {*source.schemes, Scheme.of("float32")}:
        raise SelectionError("the report has no such tensors or schemes", hint=f"its schemes are {', '.join(map(str, source.schemes))}")
    rows = tuple(row for row in source.rows if row.name in sizes and row.scheme in wanted)
    ties = {alias: name for alias, name in source.ties.items() if name in sizes}
    fixed = source.fixed + sum(size for name, size in source.sizes.items() if name not in sizes)
    return SensitivityReport(rows, sizes, ties, fixed, source.left, source.measure)


def _groups(report: SensitivityReport) -> list[list[Choice]]:
    """Of each tensor: left as it is, and every scheme that can take it."""
    names = {name: (name, *(alias for alias, first in report.ties.items() if first == name)) for name in report.sizes}
    groups = {name: [Choice(names[name], None, size, size, 0.0)] for name, size in report.sizes.items()}
    for row in report.rows:
        groups[row.name].append(Choice(names[row.name], row.scheme, report.sizes[row.name], row.nbytes, row.error, row.sqnr))
    return list(groups.values())
