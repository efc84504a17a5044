"""The differ: what changed between two checkpoints, the most changed first, each kind a filter."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import traitlets as t

from workbench.differ import MARKS, DiffReport, DiffRow
from workbench.errors import SelectionError, TensorNotFoundError, visible
from workbench.names import natural_key
from workbench.render import html, plots
from workbench.tables import format_cell
from workbench.widgets.base import View, finite, script
from workbench.widgets.jobs import Job

KINDS = ("changed", "reshaped", "retyped", "unreadable", "added", "removed", "equal")
_ALWAYS = ("changed", "added", "removed", "equal")  # the kinds that show even at zero
_UNITS = {"reshaped": " shape", "retyped": " dtype"}  # what tells the three kinds of ~ apart
_NOTES = {
    "changed": "same name, shape and dtype; other values",
    "reshaped": "same name, another shape",
    "retyped": "same name and shape, another dtype",
    "unreadable": "values that could not be read on one side",
    "added": "only in the second",
    "removed": "only in the first",
    "equal": "the same values",
}
_COLUMNS = [
    {"id": "name", "title": "name", "kind": "name", "width": "minmax(0, 1fr)"},
    {"id": "kind", "title": "", "kind": "mark", "width": "14px", "lead": True},
    {"id": "form", "title": "shape · dtype", "kind": "text", "width": "134px", "right": True, "drop": 2},
    {"id": "max_abs", "title": "max |Δ|", "kind": "number", "width": "76px", "right": True, "note": "largest absolute change"},
    {
        "id": "relative",
        "title": "relative",
        "kind": "number",
        "width": "76px",
        "right": True,
        "note": "size of the change over size of the first",
    },
    {
        "id": "cosine",
        "title": "cosine",
        "kind": "number",
        "width": "64px",
        "right": True,
        "drop": 1,
        "note": "cosine of the angle between the two",
    },
]


class Differ(View):
    """Look through the rows of a DiffReport.

    Reads back: `diff`, `filter`, `kinds` (those shown) and `selected` (names). Setting them changes the view.
    """

    _esm = script("grid.js", "frame.js", "differ.js")

    figure = t.Dict().tag(sync=True)
    filter = t.Unicode("")
    kinds = t.Tuple()
    selected = t.Tuple()

    def __init__(self, diff: DiffReport, *, filter: str = "", kinds: Iterable[str] = KINDS[:-1], selected: Iterable[str] = ()) -> None:
        self.diff = diff
        self._ordered = sorted(diff.rows, key=_most_changed)
        self._rows = {row.name: i for i, row in enumerate(self._ordered)}
        self._drawn = False
        state = {"filter": "", "kinds": [], "selected": [], "sort": [], "pane": "rows"}
        super().__init__(_report(diff, self._ordered), state)
        self.detail = {"heading": "difference", "note": visible(diff.headline)}
        self._did("wb.diff(a, b)")
        self.filter, self.kinds, self.selected = filter, tuple(kinds), tuple(selected)

    @t.validate("selected")
    def _known_names(self, proposal: Any) -> tuple[str, ...]:
        for name in proposal["value"]:
            if name not in self._rows:
                raise TensorNotFoundError(f"neither checkpoint has a tensor {name!r}")
        return tuple(proposal["value"])

    @t.validate("kinds")
    def _known_kinds(self, proposal: Any) -> tuple[str, ...]:
        for kind in proposal["value"]:
            if kind not in KINDS:
                raise SelectionError(f"{kind!r} is no kind of difference", hint="the kinds are " + ", ".join(KINDS))
        return tuple(proposal["value"])

    @t.observe("filter", "kinds", "selected")
    def _set_from_python(self, _change: Any) -> None:
        if self.state:
            selected = [self._rows[name] for name in self.selected]
            self.state = {**self.state, "filter": self.filter, "kinds": list(self.kinds), "selected": selected}

    @t.observe("state")
    def _set_from_page(self, change: Any) -> None:
        old, new = change["old"] or {}, change["new"]
        if not old:
            return
        names = tuple(self._ordered[row].name for row in new["selected"] if 0 <= row < len(self._ordered))
        with self._explained(), self.hold_trait_notifications():
            self.filter, self.kinds, self.selected = new["filter"], tuple(new["kinds"]), names
        if new["selected"] != old["selected"]:
            self._describe()
        if new["pane"] == "layers" and not self._drawn:
            self._drawn = True
            self._start("figure", "heat map", self._draw, shown=False)

    def _describe(self) -> None:
        if len(self.selected) != 1:
            many = f"{len(self.selected):,} rows selected"
            self.detail = {"heading": many} if self.selected else {"heading": "difference", "note": visible(self.diff.headline)}
            return
        row = self._ordered[self._rows[self.selected[0]]]
        facts = [["kind", row.status], ["was", visible(row.was or row.name)], ["shape", _shape(row)], ["dtype", _dtype(row)]]
        numbers = [
            ("max |Δ|", row.max_abs),
            ("mean |Δ|", row.mean_abs),
            ("‖Δ‖", row.l2),
            ("relative", row.relative),
            ("cosine", row.cosine),
        ]
        facts += [[label, format_cell("number", value)] for label, value in numbers]
        facts += [["differing", format_cell("percent", row.changed)], ["non-finite", format_cell("count", row.nonfinite)]]
        note = _NOTES[row.status] + (f"; {visible(row.note)}" if row.note else "")
        self.detail = {"heading": visible(row.name), "facts": facts if row.was else [facts[0], *facts[2:]], "note": note}
        self._did(f"wb.diff(a, b, names={row.name!r})")

    def _draw(self, job: Job) -> None:
        png = plots.to_png(self.diff.plot())
        if job.current:
            self.figure = {"source": plots.data_uri(png), "alt": f"relative change by layer and kind; {visible(self.diff.headline)}"}

    def _static_html(self) -> str:
        return html.render_report(self.diff)


def _most_changed(row: DiffRow) -> tuple[int, float, list[Any]]:
    """Order of rows: structure first, then by size of the change, equal ones last."""
    rank = {"unreadable": 0, "reshaped": 1, "retyped": 2, "removed": 3, "added": 3, "changed": 4}.get(row.status, 5)
    size = math.inf if row.relative is not None and math.isnan(row.relative) else row.relative or 0.0
    return rank, -size, natural_key(row.name)


def _arrow(first: str | None, second: str | None) -> str:
    if first is None or second is None or first == second:
        return first or second or ""
    return f"{first} → {second}"


def _shape(row: DiffRow) -> str:
    return _arrow(*(None if shape is None else format_cell("shape", shape) for shape in (row.shape_a, row.shape_b)))


def _dtype(row: DiffRow) -> str:
    return _arrow(*(None if dtype is None else str(dtype) for dtype in (row.dtype_a, row.dtype_b)))


def _kind(kind: str, count: int) -> dict[str, Any]:
    return {"id": kind, "mark": MARKS[kind], "count": count, "unit": _UNITS.get(kind, ""), "note": _NOTES[kind]}


def _nothing(diff: DiffReport) -> str:
    """What the table says while it has no row of the chosen kinds."""
    if any(row.status != "equal" for row in diff.rows):
        return "No row is of the chosen kinds"
    equal = f"{len(diff.rows):,} tensors are equal" if len(diff.rows) != 1 else "1 tensor is equal"
    if not diff.rows:
        equal = "neither side holds a tensor"
    renamed = sum(row.was is not None for row in diff.rows)
    others = [f"{renamed:,} renamed"] if renamed else []
    others += [f"{len(diff.values):,} other values differ"] if diff.values else []
    return "; ".join([equal[0].upper() + equal[1:], *others]) if others else f"Nothing differs: {equal}"


def _report(diff: DiffReport, rows: Sequence[DiffRow]) -> dict[str, Any]:
    """Everything the page draws, in columns."""
    present = [kind for kind in KINDS if kind in _ALWAYS or diff.counts.get(kind)]
    return {
        "view": "differ",
        "title": {"name": visible(f"{diff.a} → {diff.b}"), "parts": [visible(diff.headline.removeprefix(f"{diff.a} → {diff.b}: "))]},
        "findings": [],
        "rail": [{"id": "rows", "label": "Rows", "count": len(rows)}, {"id": "layers", "label": "By layer", "count": None}],
        "kinds": [_kind(kind, diff.counts.get(kind, 0)) for kind in present],
        "nothing": _nothing(diff),
        "columns": _COLUMNS,
        "data": {
            "name": [visible(row.name) for row in rows],
            "kind": [present.index(row.status) for row in rows],
            "form": [_dtype(row) if row.status == "retyped" else _shape(row) for row in rows],
            **{key: [finite(getattr(row, key)) for row in rows] for key in ("max_abs", "relative", "cosine")},
        },
    }
