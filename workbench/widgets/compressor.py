"""The compressor: how small a checkpoint shall be, which tensor takes which scheme for it, what that costs, and the file that comes of it.

It measures and chooses nothing itself: `wb.compression.sensitivity` reads the weights once, `plan_compression` takes a budget on its
frontier, `wb.ops.quantize` and `wb.save` write the plan, and `wb.load_into` carries it back into a model for its accuracy.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import traitlets as t

from workbench.checkpoint import Checkpoint
from workbench.compression import CompressionPlan, FrontierReport, SensitivityReport, frontier, plan_compression, sensitivity
from workbench.compression.sensitivity import SCHEMES
from workbench.errors import SelectionError, TensorNotFoundError, visible
from workbench.formats import save
from workbench.keymap.loading import load_into
from workbench.opening import open as open_checkpoint
from workbench.ops import dequantize, quantize
from workbench.ops.schemes import Scheme
from workbench.render import html
from workbench.tables import format_bytes
from workbench.widgets import compressor_report
from workbench.widgets.base import STYLES, View, script, to_json
from workbench.widgets.compressor_report import label
from workbench.widgets.jobs import Job

_OFFERED = tuple(dict.fromkeys(map(Scheme.of, (*SCHEMES, "bfloat16", "float8_e4m3fn", "int4"))))
_FORM: dict[str, Any] = {"schemes": [label(Scheme.of(told)) for told in SCHEMES], "names": "", "exclude": ""}


class Compressor(View):
    """Move along the frontier of size and error, leave out what must stay, and save the plan.

    Args:
        source: anything `wb.open` takes; its weights are compressed.
        model: an nn.Module that the weights fit, and
        evaluate: `evaluate(model) -> float`, such as an accuracy in [0, 1]: asked of the model with the weights as they are, and under the plan.
        schemes, names, exclude: as `wb.compression.plan_compression` takes them.

    Reads back: `measured` (a SensitivityReport), `plan`, `checkpoint` (the source under the plan, not yet computed), `scores` (before,
    after) and `selected` (names). `cancel()` stops what runs.
    """

    _esm = script("grid.js", "frame.js", "compressor.js")
    _css = STYLES + script("form.css", "compressor.css")
    commands: ClassVar[dict[str, str]] = {
        **View.commands,
        "measure": "measure",
        "leave": "_leave",
        "evaluate": "_evaluate",
        "save": "_save",
    }

    rows = t.Bytes(b"{}").tag(sync=True)
    curve = t.Dict().tag(sync=True)
    sizes = t.Dict().tag(sync=True)
    plan = t.Instance(CompressionPlan, allow_none=True)
    selected = t.Tuple()

    def __init__(
        self,
        source: Any,
        model: Any = None,
        evaluate: Callable[[Any], float] | None = None,
        *,
        schemes: Sequence[str | Mapping[str, Any] | Scheme] = SCHEMES,
        names: str = "",
        exclude: str | Sequence[str] = "",
    ) -> None:
        """Show the form; nothing is read before Measure is pressed or `measure` is called."""
        if (model is None) != (evaluate is None):
            raise SelectionError(
                "model and evaluate go together", hint="Compressor(ckpt, model, evaluate) measures accuracy before and after"
            )
        self.source = open_checkpoint(source)
        self._model, self._evaluated = model, evaluate
        self.measured: SensitivityReport | None = None
        self._frontier: FrontierReport | None = None
        self.scores: tuple[float, float] | None = None
        self._saved: dict[str, Any] = {}
        self._names: list[str] = []
        chosen = [Scheme.of(told) for told in schemes]
        self._offered = {label(scheme): scheme for scheme in (*_OFFERED, *chosen)}
        form = {
            "schemes": [label(scheme) for scheme in chosen],
            "names": names,
            "exclude": exclude if isinstance(exclude, str) else " ".join(exclude),
        }
        state = {**_FORM, **form, "filter": "", "selected": [], "sort": [], "pane": "plan", "point": 0, "path": "smaller.safetensors"}
        super().__init__(compressor_report.fixed_report(self.source, [*self._offered], can_score=evaluate is not None), state)
        self._show()
        self._did("Compressor(ckpt)")

    @property
    def checkpoint(self) -> Checkpoint:
        """The source under the plan; its values are computed when they are read or saved."""
        if self.plan is None:
            raise SelectionError("there is no plan yet", hint="press Measure, or call measure() and wait()")
        return quantize(self.source, plan=self.plan.schemes) if self.plan.schemes else self.source

    @t.validate("selected")
    def _known_names(self, proposal: Any) -> tuple[str, ...]:
        for name in proposal["value"]:
            if name not in self._names:
                raise TensorNotFoundError(f"the plan has no tensor {name!r}")
        return tuple(proposal["value"])

    @t.observe("selected")
    def _set_from_python(self, _change: Any) -> None:
        if self.state:
            self.state = {**self.state, "selected": [self._names.index(name) for name in self.selected]}

    @t.observe("state")
    def _set_from_page(self, change: Any) -> None:
        old, new = change["old"] or {}, change["new"]
        if not old:
            return
        with self._explained():
            self.selected = tuple(self._names[row] for row in new["selected"] if 0 <= row < len(self._names))
        if new["point"] != old["point"]:
            self._choose()
        elif new["selected"] != old["selected"]:
            self._describe()

    # what is measured and chosen

    def measure(self) -> None:
        """Try every scheme on every weight, in a thread; the plan follows."""
        told = self._asked if self._asked.get("command") == "measure" else {}
        form = {key: type(default)(told[key]) for key, default in _FORM.items() if key in told}
        schemes = form.get("schemes", self.state["schemes"])
        if not schemes or not self._offered.keys() >= set(schemes):
            raise SelectionError(
                "no scheme is chosen" if not schemes else "there is no such scheme", hint=f"tick one of {', '.join(self._offered)}"
            )
        self.state = {**self.state, **form}
        self._start("work", "measuring", lambda job: self._measure(job, self._options()), shown=True)

    def _options(self) -> dict[str, Any]:
        state = self.state
        globs = {key: state[key].split() for key in ("names", "exclude") if state[key].split()}
        told = [self._offered[name].to_dict() for name in state["schemes"]]
        return {"schemes": [one["scheme"] if len(one) == 1 else one for one in told], **globs}

    def _measure(self, job: Job, options: dict[str, Any]) -> None:
        report = sensitivity(self.source, **options, progress=self._ticker(job), cancel=job.cancel)
        found = frontier(report)
        if not job.current:
            return
        self.measured, self._frontier, self.scores, self._saved = report, found, None, {}
        self._did(f"report = wb.compression.sensitivity(ckpt, {', '.join(f'{key}={value!r}' for key, value in options.items())})")
        point = compressor_report.start(found)
        self._names = []  # rows of another plan
        self.state = {**self.state, "point": point, "selected": []}
        self._choose()

    def _choose(self) -> None:
        """The plan at the chosen point of the frontier."""
        if self.measured is None or self._frontier is None:
            return
        point = max(0, min(int(self.state["point"]), len(self._frontier.points) - 1))
        budget = self._frontier.points[point][0]
        with self._explained():
            self.plan = plan_compression(self.measured, budget_nbytes=budget)
            self.scores, self._saved = None, {}
            self._names = [choice.names[0] for choice in self.plan.choices]
            self._did(f"plan = wb.compression.plan_compression(report, budget_nbytes={budget})")
            self._show()

    def _leave(self) -> None:
        """Leave the selected tensors as they are, and measure what is left to choose."""
        if not self.selected:
            raise SelectionError("nothing is selected", hint="select the rows that are to stay as they are")
        self.state = {**self.state, "exclude": " ".join([*self.state["exclude"].split(), *self.selected]), "selected": []}
        self.measure()

    # what comes of it

    def _evaluate(self) -> None:
        """The score of the model with the weights as they are, and under the plan."""
        if self._model is None:
            raise SelectionError("there is no model to score", hint="Compressor(ckpt, model, evaluate)")
        made, model, evaluate = self.checkpoint, self._model, self._evaluated
        self._start("work", "scoring", lambda job: self._score(job, made, model, evaluate), shown=True)

    def _score(self, job: Job, made: Checkpoint, model: Any, evaluate: Any) -> None:
        scores = []
        for ckpt in (self.source, made):
            bare = dequantize(ckpt) if ckpt is made and any(s.scaled for s in (self.plan.schemes.values() if self.plan else ())) else ckpt
            tried = copy.deepcopy(model).eval()
            load_into(tried, bare).check()
            scores.append(float(evaluate(tried)))
            if not job.current:
                return
        self.scores = (scores[0], scores[1])
        self._did("wb.load_into(model, wb.ops.dequantize(wb.ops.quantize(ckpt, plan=plan.schemes))).check(); evaluate(model)")
        self._show()

    def _save(self) -> None:
        """Write the plan's file, read it back, and put its bytes beside those predicted."""
        path = str(self._asked.get("path") or self.state["path"])
        made = self.checkpoint
        self.state = {**self.state, "path": path}
        self._start("work", "saving", lambda job: self._write(job, made, path), shown=True)

    def _write(self, job: Job, made: Checkpoint, path: str) -> None:
        report = save(made, path, progress=self._ticker(job), cancel=job.cancel)
        self._saved = {"path": report.path, "nbytes": report.nbytes, "parts": compressor_report.parts_of(open_checkpoint(report.path))}
        self._did(f"wb.save(wb.ops.quantize(ckpt, plan=plan.schemes), {path!r})")
        self._show()

    # what is shown

    def _show(self) -> None:
        self.rows = to_json(compressor_report.rows_of(self.plan, self._saved.get("parts", {})))
        points = self._frontier.points if self._frontier else ()
        marks = self._frontier.uniform if self._frontier else ()
        finite = [(size, error) for size, error in points if math.isfinite(error)]
        self.curve = {
            "points": [[size, error, format_bytes(size)] for size, error in finite],
            "marks": [[visible(name), size, error] for name, size, error in marks],
            "measure": self._frontier.measure if self._frontier else "",
        }
        self.sizes = compressor_report.sizes_of(self.plan, self._saved, self.scores)
        self._describe()

    def _describe(self) -> None:
        report, plan = self.measured, self.plan
        if report is None or plan is None:
            self.detail = compressor_report.empty(self.source)
        elif len(self.selected) == 1:
            self.detail = compressor_report.of_tensor(report, plan, self.selected[0])
        else:
            self.detail = compressor_report.overview(plan, self._saved, self.scores, len(self.selected))

    def _static_html(self) -> str:
        return html.render_report(self.plan) if self.plan is not None else html.render_report(compressor_report.Waiting(self.source.name))
