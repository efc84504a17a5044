"""The explorer: what a checkpoint holds, as a tree or a table, and everything about the one tensor that is selected."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, ClassVar

import traitlets as t

from workbench.checkpoint import Checkpoint
from workbench.errors import SelectionError, TensorNotFoundError, visible
from workbench.names import match_names, suggest
from workbench.render import html, outline, text
from workbench.widgets import tensor_panel
from workbench.widgets.base import View, finite, script
from workbench.widgets.explorer_report import MEASURED, SECTION, explorer_report
from workbench.widgets.jobs import Job

_MAX_LISTED = 20  # names spelt out in a line of Python


class Explorer(View):
    """Browse, filter, sort and select the tensors of a checkpoint.

    Reads back: `checkpoint`, `filter`, `mode` ("tree" or "table"), `selected` (names), `matching` (names the filter leaves) and
    `selection` (a Checkpoint of what is selected). Setting `filter`, `mode` or `selected` changes the view.
    """

    _esm = script("grid.js", "frame.js", "explorer.js")
    commands: ClassVar[dict[str, str]] = {**View.commands, "statistics": "measure", "measure": "measure_selected"}

    statistics = t.Dict().tag(sync=True)
    filter = t.Unicode("")
    mode = t.Enum(["tree", "table"], default_value="tree")
    selected = t.Tuple()

    def __init__(self, checkpoint: Checkpoint, *, filter: str = "", mode: str = "tree", selected: Iterable[str] = ()) -> None:
        self.checkpoint = checkpoint
        self.measured: Any = None
        self._names = list(checkpoint)
        self._rows = {name: row for row, name in enumerate(self._names)}
        state: dict[str, Any] = {
            "filter": "",
            "mode": "tree",
            "sort": [],
            "selected": [],
            "expanded": None,
            "closed": [],
            "pane": "tensors",
        }
        self._head = outline.head(checkpoint)
        self._tree = outline.tree(checkpoint, self._head.aliases)
        super().__init__(explorer_report(checkpoint, self._head, self._tree), state)
        self.detail = tensor_panel.overview(checkpoint, self._head)
        self._did(self._open_line())
        self.filter, self.mode, self.selected = filter, mode, tuple(selected)

    @property
    def matching(self) -> tuple[str, ...]:
        """The names that the filter and the chosen section leave."""
        pane = self.state["pane"]
        prefix = pane.removeprefix(SECTION) + "." if pane.startswith(SECTION) else ""
        names = [name.removeprefix(prefix) for name in self._names if name.startswith(prefix)]
        if is_pattern(self.filter):
            names = match_names(self.filter, names)
        elif self.filter:
            names = [name for name in names if self.filter in visible(name)]
        return tuple(prefix + name for name in names)

    @property
    def selection(self) -> Checkpoint:
        """A Checkpoint of the selected tensors.

        Raises:
            SelectionError: nothing is selected.
        """
        if not self.selected:
            raise SelectionError("nothing is selected", hint="click a row, or set explorer.selected")
        return self.checkpoint.select(list(self.selected))

    @t.validate("selected")
    def _known_names(self, proposal: Any) -> tuple[str, ...]:
        for name in proposal["value"]:
            if name not in self._rows:
                close = suggest(str(name), self._names)
                raise TensorNotFoundError(f"no tensor is called {name!r}", hint="did you mean " + ", ".join(close) + "?" if close else None)
        return tuple(proposal["value"])

    @t.observe("filter", "mode", "selected")
    def _set_from_python(self, _change: Any) -> None:
        if self.state:
            self.state = {**self.state, "filter": self.filter, "mode": self.mode, "selected": [self._rows[name] for name in self.selected]}

    @t.observe("state")
    def _set_from_page(self, change: Any) -> None:
        old, new = change["old"] or {}, change["new"]
        if not old:
            return
        names = tuple(self._names[row] for row in new["selected"] if 0 <= row < len(self._names))
        with self._explained(), self.hold_trait_notifications():
            self.filter, self.mode, self.selected = new["filter"], new["mode"], names
        if new["selected"] != old["selected"]:
            self._describe()
        if (new["filter"], new["pane"]) != (old["filter"], old["pane"]):
            self._did(self._filter_line())

    # the panel on the right

    def _describe(self) -> None:
        self._stop("detail")
        if len(self.selected) != 1:
            chosen = [self.checkpoint[name] for name in self.selected]
            self.detail = tensor_panel.summary(chosen) if chosen else tensor_panel.overview(self.checkpoint, self._head)
            if self.selected:
                listed = repr(list(self.selected)) if len(self.selected) <= _MAX_LISTED else "explorer.selected"
                self._did(f"ckpt.select({listed})")
            return
        name = self.selected[0]
        self._did(f"ckpt[{name!r}]")
        self.detail = tensor_panel.described(self.checkpoint, name, self._head.aliases)
        tensor = self.checkpoint[name]
        if tensor.locked is None and tensor.numel:
            self._start("detail", "values", lambda job: self._read_values(job, name), shown=False)

    def _read_values(self, job: Job, name: str) -> None:
        tensor = self.checkpoint[name]
        detail = tensor_panel.with_values(tensor_panel.described(self.checkpoint, name, self._head.aliases), tensor)
        self._show(job, detail)
        if tensor.nbytes <= tensor_panel.AUTOMATIC_NBYTES:
            self._measure_one(job, name, detail)

    def measure_selected(self) -> None:
        """Statistics and histogram of the one selected tensor, whatever its size."""
        if len(self.selected) != 1:
            raise SelectionError("statistics with a histogram are of one tensor", hint="select one row")
        name, detail = self.selected[0], {**self.detail, "actions": []}
        self._start("job", "statistics", lambda job: self._measure_one(job, name, detail), shown=True)

    def _measure_one(self, job: Job, name: str, detail: dict[str, Any]) -> None:
        from workbench.analyses.statistics import stats

        report = stats(self.checkpoint, names=[name], histogram=True, progress=self._ticker(job), cancel=job.cancel)
        detail = tensor_panel.with_statistics(detail, next(row for row in report.rows if row.name == name))
        if self._show(job, detail):
            self._did(f"wb.stats(ckpt, names={name!r})")

    def _show(self, job: Job, detail: dict[str, Any]) -> bool:
        """Show a result unless another selection has replaced the one it belongs to."""
        with self._lock:
            if job.current and self.detail.get("heading") == detail["heading"]:
                self.detail = detail
                return True
            return False

    # statistics of everything that the filter leaves

    def measure(self) -> None:
        """Mean, spread and NaN of every tensor that the filter shows, as columns of the table."""
        pane, pattern = self.state["pane"], _pattern(self.filter) if self.filter else "*"
        section = pane.removeprefix(SECTION) if pane.startswith(SECTION) else ""
        ckpt = self.checkpoint.section(section) if section else self.checkpoint
        line = f"wb.stats({self._subject()}{self._names_argument()})"
        self._start(
            "job", "statistics", lambda job: self._measure_all(job, ckpt, section + "." if section else "", pattern, line), shown=True
        )

    def _measure_all(self, job: Job, ckpt: Checkpoint, prefix: str, pattern: str, line: str) -> None:
        from workbench.analyses.statistics import stats

        report = stats(ckpt, pattern, histogram=False, progress=self._ticker(job), cancel=job.cancel)
        columns: dict[str, list[Any]] = {column["id"]: [None] * len(self._names) for column in MEASURED}  # type: ignore[misc]
        for row in report.rows:
            for column, values in columns.items():
                values[self._rows[prefix + row.name]] = finite(getattr(row, column))
        with self._lock:
            if job.current:
                self.measured, self.statistics = report, columns
                self._did(line)

    # the lines of Python

    def _open_line(self) -> str:
        source = self.checkpoint.source
        return (
            f"ckpt = wb.open({str(source.url)!r})" if source is not None and getattr(source, "url", None) else "wb.widgets.Explorer(ckpt)"
        )

    def _subject(self) -> str:
        pane = self.state["pane"]
        return f"ckpt.section({pane.removeprefix(SECTION)!r})" if pane.startswith(SECTION) else "ckpt"

    def _names_argument(self) -> str:
        return f", names={_pattern(self.filter)!r}" if self.filter else ""

    def _filter_line(self) -> str:
        return f"{self._subject()}.select({_pattern(self.filter)!r})" if self.filter else self._subject()

    def _static_html(self) -> str:
        return html.render_outline(self._head, self._tree, text.extras_line(self.checkpoint))


def is_pattern(filter: str) -> bool:
    """Whether a filter is one of the core's patterns; otherwise it is a part of a name."""
    return filter.startswith("re:") or re.search(r"[*?]|\{\d+-\d+\}", filter) is not None


def _pattern(filter: str) -> str:
    return filter if is_pattern(filter) else f"*{filter}*"
