"""The exporter: a model of the notebook to every file asked for, each proved against it; the report, the figures, the graph, and which file to choose.

It exports nothing itself: `wb.export_model` is called once per target, in a thread, so that progress is told and cancel is seen between
two targets; `wb.parity` compares again, `wb.exporting.advise` says which file. A command carries the form that it means.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import traitlets as t

from workbench.errors import SelectionError, visible
from workbench.exporting import Exported, ExportReport, FormatAdvice, advise, export_model
from workbench.files import file_ref
from workbench.opening import open as open_checkpoint
from workbench.render import html, plots
from workbench.verification.comparison import ParityReport, parity
from workbench.widgets import exporter_report
from workbench.widgets.base import STYLES, View, script, table_dict, to_json
from workbench.widgets.exporter_report import TARGETS, Given
from workbench.widgets.jobs import Job, memory
from workbench.widgets.netron_report import shown_of, summarize

_FORM: dict[str, Any] = {"model": "", "inputs": "", "targets": ["onnx"], "folder": "exported", "dynamic": False, "opset": ""}
_RAIL = [["advice", "Which file"], ["export", "Export"], ["report", "Report"], ["parity", "Figures"], ["graph", "Graph"]]


class Exporter(View):
    """Export a model, watch each target made and proved, and see the report, the parity plots and the graph.

    Args:
        model: an nn.Module, the name of one in the notebook, or `module:function`, which is imported and called when Export is pressed.
        args: example inputs as `export_model` takes them (a dict: keyword arguments), the name of a variable, or shapes as text:
            `1x3x32x32`, `float32[1,3,32,32]`, `int64[2,16] < 100`; several with commas between, `name=…` for a keyword.
        targets, folder: as `to` and `folder` of `export_model`. dynamic: leave the batch axis free. opset: the ONNX opset asked for.
        namespace: where names are looked up; the notebook's own variables by default.

    Reads back: `exported` (the ExportReport, growing target by target), `files` ({path: bytes}), `compared` ({target: ParityReport} on
    made inputs), `advice` (a FormatAdvice) and `model` (the module that was exported last).
    """

    _esm = script("grid.js", "frame.js", "netron_page.js", "exporter.js")
    _css = STYLES + script("netron.css", "form.css", "exporter.css")
    commands: ClassVar[dict[str, str]] = {
        **View.commands, "look": "_look", "export": "_export", "compare": "_compare", "graph": "_show_graph", "choose": "_choose", "save": "_save",
    }  # fmt: skip

    offers = t.Dict().tag(sync=True)
    rows: Any = t.List().tag(sync=True)
    sections = t.Bytes(b"{}").tag(sync=True)
    figures = t.Dict().tag(sync=True)
    guide = t.Dict().tag(sync=True)
    graph = t.Dict().tag(sync=True)
    shown = t.Bytes(b"").tag(sync=True)
    exported = t.Instance(ExportReport, allow_none=True)

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *,
        targets: str | Sequence[str] = "onnx",
        folder: str = "exported",
        dynamic: bool = False,
        opset: int | None = None,
        namespace: Mapping[str, Any] | None = None,
    ) -> None:
        """Show the form; the class says what each argument is."""
        self._own, self._given = namespace, dict[str, Any]()
        self._status: dict[str, str] = {}
        self._made: tuple[Any, str, Given] | None = None
        self._of = ("", "")  # model and inputs, as the form named them when they were exported
        self.compared: dict[str, ParityReport] = {}
        asked = [targets] if isinstance(targets, str) else list(targets)
        form: dict[str, Any] = {"model": self._named(model, "model"), "inputs": self._named(args, "args"), "targets": asked}
        form |= {"folder": str(folder), "dynamic": dynamic, "opset": "" if opset is None else str(opset)}
        state = {**_FORM, **self._checked(form), "pane": "export", "target": "", "answers": []}
        super().__init__({}, state)
        self._look()
        self._ship()
        named = [part if part.isidentifier() else repr(part) for part in (state["model"], state["inputs"]) if part]
        options = [f"{key}={state[key]!r}" for key in ("targets", "folder", "dynamic") if state[key] != _FORM[key]]
        self._did(f"Exporter({', '.join([*named, *options, *([f'opset={opset}'] if opset is not None else [])])})")

    @property
    def files(self) -> dict[str, int]:
        """What was written, by path."""
        return {str(Path(one.path).with_name(name)): nbytes for one in self._exports.values() for name, nbytes in one.files.items()}

    @property
    def _exports(self) -> dict[str, Exported]:
        """What became of each target so far. A report that found a failure is false, so none is asked whether it is there."""
        return {} if self.exported is None else {one.target: one for one in self.exported.exports}

    @property
    def _finding(self) -> str:
        return "" if self.exported is None else exporter_report.finding(self.exported, self._status)

    @property
    def advice(self) -> FormatAdvice:
        """Which file to make, by the answers given."""
        return advise(**dict.fromkeys(self.state["answers"], True))

    @property
    def model(self) -> Any:
        """The module that was exported last; None before."""
        return self._made[0] if self._made else None

    def _named(self, value: Any, name: str) -> str:
        """The text that stands for a value: the notebook's own name of it, or one of ours."""
        if value is None or isinstance(value, str):
            return value or ""
        found = next((own for own, other in list(self._namespace().items()) if other is value and not own.startswith("_")), None)
        if found is None:
            self._given[name] = value
        return found or name

    def _namespace(self) -> dict[str, Any]:
        from IPython.core.getipython import get_ipython

        shell: Any = get_ipython() if self._own is None else None
        return {**(shell.user_ns if shell is not None else self._own or {}), **self._given}

    # what is shown

    def _ship(self) -> None:
        """Rows, panel and title, after anything changed."""
        exports = self._exports
        named = [target for target in TARGETS if target in self.state["targets"] or target in exports or target in self._status]
        self.rows = [
            exporter_report.row_of(target, self._status.get(target, exporter_report.ASKED), exports.get(target), self.compared.get(target))
            for target in named
        ]
        self._describe()
        namespace, name = self._namespace(), self.state["model"]
        parts = [exporter_report.of_model(namespace[name])] if name in dict(self.offers.get("models", [])) and name in namespace else []
        parts += [f"inputs {visible(self.state['inputs'])}"] if self.state["inputs"] else []
        counts = {
            "export": sum(one.ok for one in exports.values()) if exports else None,
            "parity": len(self.figures.get("images", ())) or None,
        }
        told = {
            "view": "exporter", "title": {"name": visible(name) or "export", "parts": parts}, "findings": [], "columns": exporter_report.COLUMNS,
            "rail": [{"id": pane, "label": label, "count": counts.get(pane)} for pane, label in _RAIL],
            "done": "" if self.exported is None else f"{visible(self._of[0])}: {self._finding}",
            "targets": [{"id": target, "use": kind.use, "lost": kind.lost} for target, kind in TARGETS.items()],
        }  # fmt: skip
        if (report := to_json(told)) != self.report:
            self.report = report

    def _describe(self) -> None:
        state, target = self.state, self.state["target"]
        if state["pane"] == "advice":
            self.detail = exporter_report.of_advice(self.advice)
        elif target in TARGETS:
            one, told = self._exports.get(target), self._status.get(target, exporter_report.ASKED)
            self.detail = exporter_report.of_target(target, told, one, self.compared.get(target), is_model=self._made is not None)
        else:
            chosen = (state["model"], state["inputs"])
            self.detail = exporter_report.overview(self.exported if chosen == self._of else None, self._finding, *chosen)

    @t.observe("state")
    def _set_from_page(self, change: Any) -> None:
        old, new = change["old"] or {}, change["new"]
        if not old:
            return
        if new["target"] and (new["model"], new["inputs"]) != (old["model"], old["inputs"]):
            self.state = {**new, "target": ""}  # the panel is of what is chosen now
        elif any(new[key] != old[key] for key in (*_FORM, "target", "pane")):
            self._ship()
        if new["pane"] == "advice" and (not self.guide or new["answers"] != old["answers"]):
            self._advise()
        if new["pane"] != old["pane"]:
            self._open_pane(new["pane"])

    def _open_pane(self, pane: str) -> None:
        """Draw what a pane shows when it is first looked at."""
        if pane == "graph" and not self.graph and (made := [target for target, one in self._exports.items() if one.ok]):
            with self._explained():
                self._load_graph(made[0])

    def _advise(self) -> None:
        with self._explained():
            advice = self.advice
            options = list(inspect.signature(advise).parameters)
            questions = [[option, question, yes] for option, (question, yes) in zip(options, advice.answers, strict=True)]
            self.guide = {"questions": questions, "headline": advice.headline, "tables": [table_dict(one) for one in advice.tables()[1:]]}
            self._describe()
            self._did(f"wb.exporting.advise({', '.join(f'{option}=True' for option in self.state['answers'])})")
            self._start("guide", "flowchart", lambda job: self._draw_guide(job, advice), shown=False)

    def _draw_guide(self, job: Job, advice: FormatAdvice) -> None:
        png = plots.to_png(advice.plot())
        if job.current:
            self.guide = {**self.guide, "source": plots.data_uri(png)}

    def _start_drawing(self) -> None:
        """The figures, beside whatever is looked at, so that they stand there when their pane is opened."""
        self.figures = {"note": "drawing …"}
        self._start("figures", "figures", self._draw, shown=False)

    def _draw(self, job: Job) -> None:
        """The report's own figures, then those of the comparisons on made inputs."""
        assert self.exported is not None
        drawn = [figure for report in (self.exported, *self.compared.values()) for figure in report.figures()]
        images = [{"source": plots.data_uri(plots.to_png(figure)), "alt": visible(plots.title_of(figure))} for figure in drawn]
        if job.current:
            self.figures = {"note": "" if images else "Nothing was made that could be compared.", "images": images}
            self._ship()

    # what the page asks for

    def _look(self) -> None:
        """Which models and inputs the notebook holds now."""
        self.offers = exporter_report.offered(self._namespace())

    def _checked(self, form: Mapping[str, Any]) -> dict[str, Any]:
        """The form as sent by the page, or given; anything that is no field of it is left out."""
        told = {key: type(default)(form[key]) for key, default in _FORM.items() if key in form}
        for target in told.get("targets", ()):
            if target not in TARGETS:
                raise SelectionError(f"there is no export target {target!r}", hint=f"there is {', '.join(TARGETS)}")
        return told

    def _free(self) -> None:
        if "export" in self._jobs:
            raise SelectionError("an export is running", hint="wait until it is done, or cancel it: it stops after the target at hand")

    def _export(self) -> None:
        """Export to every target chosen, one after the other."""
        self._free()
        self.state = state = {**self.state, **self._checked(self._asked), "target": ""}
        if not state["targets"]:
            raise SelectionError("no target is chosen", hint=f"tick {' or '.join(TARGETS)}")
        if state["opset"].strip() and not state["opset"].strip().isdecimal():
            raise SelectionError(f"{state['opset']!r} is no opset", hint="a whole number such as 18, or nothing for the exporter's own")
        namespace = self._namespace()
        if ":" not in state["model"]:
            exporter_report.model_of(state["model"], namespace)
        given = exporter_report.inputs_of(state["inputs"], namespace)
        self._status, self._of = dict.fromkeys(state["targets"], "waiting"), (state["model"], state["inputs"])
        self.exported, self.compared, self.figures, self.graph, self.sections = None, {}, {}, {}, b"{}"
        self._ship()
        self._start("export", "export", lambda job: self._export_all(job, state, namespace, given), shown=True)

    def _export_all(self, job: Job, state: Mapping[str, Any], namespace: Mapping[str, Any], given: Given) -> None:
        targets = [target for target in TARGETS if target in state["targets"]]
        try:
            model, line = exporter_report.model_of(state["model"], namespace)
            name = "model" if line else state["model"]
            options: dict[str, Any] = {"folder": state["folder"]}
            options |= {"dynamic_axes": exporter_report.batch_axes(model, given.call)} if state["dynamic"] else {}
            options |= {"opset_version": int(state["opset"])} if state["opset"].strip() else {}
            for step in (line, *given.lines):
                if step:
                    self._did(step)
            asked = ", ".join(f"{key}={value!r}" for key, value in {"to": tuple(targets), **options}.items())
            self._did(f"report = wb.export_model({name}, {given.arguments}, {asked})")
            self._made = (model, name, given)
            for number, target in enumerate(targets):
                if not job.current:
                    break
                self._status[target] = "exporting …"
                text = f"{target} · {number + 1} of {len(targets)}"
                self.job = {"label": "export", "text": text, "fraction": number / len(targets), "memory": memory()}
                self._ship()
                report = export_model(model, given.call.args, dict(given.call.kwargs), to=target, **options)
                self.exported = ExportReport(report.model, (*self._exports.values(), *report.exports))
                del self._status[target]
                self.sections = to_json(exporter_report.sections(self.exported, {}))
        finally:
            told = exporter_report.CANCELLED if not job.current else "not made"
            self._status = {target: "not made" if said == "exporting …" else told for target, said in self._status.items()}
            failed = next((target for target, one in self._exports.items() if not one.ok), "")
            self.state = {**self.state, "target": failed}
            self._ship()
        if self._exports:
            self._start_drawing()

    def cancel(self) -> None:
        """Stop after the target at hand: one call of an exporter cannot be cut short."""
        with self._lock:
            job = self._jobs.get("export")
            if job is None:
                super().cancel()
            elif job.current:
                job.cancel.set()
                self.job = {**self.job, "text": f"{self.job['text']} · stops after it"}

    def _target(self) -> str:
        """The target that a command means: one that was made."""
        target = str(self._asked.get("target"))
        if target not in self._exports or not self._exports[target].ok:
            raise SelectionError(f"{target} was not made", hint="export first, then select a target that was made")
        return target

    def _compare(self) -> None:
        """Compare a file with its model again, on made inputs."""
        self._free()
        target = self._target()
        self._start("export", f"comparing {target}", lambda job: self._compare_made(job, target), shown=True)

    def _compare_made(self, job: Job, target: str) -> None:
        assert self._made is not None
        model, name, given = self._made
        path = self._exports[target].path
        report = parity(model, path, given.call, vary=True)
        if job.current:
            self.compared = {**self.compared, target: report}
            self.sections = to_json(exporter_report.sections(self.exported, self.compared))
            self._did(f"wb.parity({name}, {path!r}, {given.inputs}, vary=True)")
            self._ship()
            self._start_drawing()

    def _show_graph(self) -> None:
        """Go to the graph of one file."""
        self._load_graph(self._target())
        self.state = {**self.state, "pane": "graph"}

    def _load_graph(self, target: str) -> None:
        path = self._exports[target].path
        file = file_ref(path)
        ckpt = open_checkpoint(path)
        given = shown_of(ckpt, file)
        tables = [table_dict(one) for one in summarize(ckpt, given).tables()]
        self.shown = given.data
        self.graph = {"file": visible(file.name), "note": given.note, "tables": tables}
        self._did(f"NetronView({path!r})")

    def _save(self) -> None:
        """The report on one page, beside the files."""
        if self.exported is None:
            raise SelectionError("nothing is exported yet, so there is no report to save")
        self._start("save", "report", lambda _job: self._save_page(self.exported), shown=False)

    def _save_page(self, exported: Any) -> None:
        path = exported.save_html(Path(exported.path).with_name("report.html"))
        self._did(f"report.save_html({str(path)!r})")

    def _choose(self) -> None:
        """Take the target that was advised, and go to the form."""
        target = next((name for name, kind in TARGETS.items() if kind is self.advice.kind), None)
        chosen = [*self.state["targets"], *([target] if target and target not in self.state["targets"] else [])]
        self.state = {**self.state, "targets": chosen, "pane": "export", "target": ""}

    def _static_html(self) -> str:
        plan = exporter_report.Plan(self.state["model"], self.state["inputs"], tuple(self.state["targets"]))
        return html.render_report(plan if self.exported is None else self.exported)
