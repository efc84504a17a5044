"""The exporter without a browser: what is on offer, what a text means, what each press does, reads back and says."""

from __future__ import annotations

import inspect
import json
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

import workbench as wb
from workbench.errors import SelectionError
from workbench.exporting.guide import KINDS
from workbench.widgets import Exporter, exporter_report
from workbench.widgets.exporter_report import TARGETS, inputs_of, model_of, offered

EVIL = "<img src=x onerror=alert(1)>"


class Twice(torch.nn.Module):
    """Two inputs, one of them whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(10, 3)

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return self.embed(ids) * x[:, None, None]


class Branch(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.sum() > 0 else x - 1


X = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
NAMES = {
    "net": torch.nn.Sequential(torch.nn.Linear(3, 2)), "twice": Twice(), "branch": Branch(), "_hidden": torch.nn.Linear(1, 1), "x": X,
    "pair": (X[:, 0], torch.ones(4, 2, dtype=torch.long)), "named": {"x": X[:, 0], "ids": torch.ones(4, 2, dtype=torch.long)},
    "weights": {"0.weight": X}, "data": {"data": X, "DESCR": "what the data is"}, "number": 3, "words": ("a", "b"), "kind": torch.nn.Linear,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def sends(view: Exporter, command: str, **values: Any) -> None:
    view._receive(view, {"command": command, **values}, [])
    view.wait(120)


def page_sets(view: Exporter, **values: Any) -> None:
    view.state = {**view.state, **values}
    view.wait()


def rows(view: Exporter) -> dict[str, tuple[str, str]]:
    return {row["target"]: (row["mark"], row["state"]) for row in view.rows}


def test_public_models_and_inputs_are_on_offer() -> None:
    told = offered(NAMES)
    assert told["models"] == [["net", "Sequential · 32 B"], ["twice", "Twice · 120 B"], ["branch", "Branch · 0 B"]]
    assert told["inputs"] == [
        ["x", "float32 [4, 3]"], ["pair", "(float32 [4], int64 [4, 2])"], ["named", "x float32 [4], ids int64 [4, 2]"],
    ]  # fmt: skip


def test_new_variables_are_seen_when_the_form_is_entered() -> None:
    names: dict[str, Any] = {}
    view = Exporter(namespace=names)
    assert view.offers == {"models": [], "inputs": []}
    names["late"] = NAMES["net"]
    sends(view, "look")
    assert view.offers["models"] == [["late", "Sequential · 32 B"]]


@pytest.mark.parametrize(
    "text", ["1x3x4", "float32[1,3,4]", " float16 [2, 3]", "int64[2,16] < 100", "bool[4]", "x", "pair", "named", "x, int64 4x2 < 10", "x, ids=int64[4,2]<10", "float32[]"],
)  # fmt: skip
def test_a_text_means_what_its_lines_of_python_make(text: str) -> None:
    given = inputs_of(text, NAMES)
    made: dict[str, Any] = {**NAMES, "torch": torch, "wb": wb}
    for line in given.lines:
        exec(line, made)
    args, kwargs = eval(f"(lambda args, kwargs=None: (args, kwargs))({given.arguments})", made)
    by_line = (args if isinstance(args, tuple) else (args,)), kwargs or {}
    for call in (wb.verification.values.Call(*by_line), *wb.verification.values.calls_from(eval(given.inputs, made))):
        wanted, found = call.tensors(), given.call.tensors()
        assert list(wanted) == list(found)
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(wanted.values(), found.values(), strict=True))


def test_made_inputs_have_the_shape_type_and_bound_asked_for() -> None:
    call = inputs_of("float16[2,3], ids=int64[50] < 7, on=bool[64]", {}).call
    assert {name: (tuple(t.shape), t.dtype) for name, t in call.tensors().items()} == {
        "0": ((2, 3), torch.float16), "ids": ((50,), torch.int64), "on": ((64,), torch.bool),
    }  # fmt: skip
    assert set(call.kwargs["ids"].tolist()) <= set(range(7))


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("", "no example inputs are chosen", "choose them in the menu"),
        ("", "no example inputs are chosen", "1x3x32x32"),
        ("xx", "the notebook has no variable 'xx'", "there is x"),
        ("int64[2,6]", "int64[2,6]: whole numbers need a bound", "int64[2,16] < 100"),
        ("float32[2] < 3", "float32[2] < 3: a bound belongs to whole numbers", ""),
        ("float31[2]", "torch has no type 'float31'", ""),
        ("__import__('os')", "\"__import__('os')\" is no input", ""),
        ("x,", "'' is no input", ""),
        ("100000x100000", "100000x100000 would be 40 GB", "2 GB"),
        ("number", "batch 1 is a int, which no model takes", ""),
    ],
)
def test_a_text_that_means_nothing_is_refused_in_words(text: str, message: str, hint: str) -> None:
    with pytest.raises(SelectionError) as caught:
        inputs_of(text, NAMES)
    assert caught.value.message.startswith(message)
    assert hint in (caught.value.hint or "")


def test_a_function_of_a_module_is_called_only_when_export_is_pressed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "own_nets.py").write_text(
        "import torch\ncalls = []\ndef build():\n    calls.append(1)\n    return torch.nn.Linear(3, 2)\nready = torch.nn.Linear(3, 1)\n"
    )
    monkeypatch.syspath_prepend(folder)
    view = Exporter("own_nets:build", "2x3", targets=["torchscript"], namespace={})
    assert view.detail["note"] == "Export imports own_nets and calls build(): this runs that code, with your rights."
    assert view.detail["locked"]
    import own_nets  # type: ignore[import-not-found]

    assert own_nets.calls == []
    sends(view, "export", **view.state)
    assert own_nets.calls == [1]
    assert view.exported, view.error
    assert "import own_nets; model = own_nets.build()" in view.code
    assert model_of("own_nets:ready", {})[1] == "import own_nets; model = own_nets.ready"
    for text, message in [
        ("own_nets:nothing", "own_nets:nothing gives no model: AttributeError: "), ("no_such_module:f", "no_such_module:f gives no model: ModuleNotFoundError: "),
        ("own_nets:calls", "own_nets:calls gives a list, and a torch.nn.Module is expected"), ("nett", "the notebook has no model 'nett'"), ("", "no model is chosen"),
    ]:  # fmt: skip
        with pytest.raises(SelectionError, match=message.replace("(", r"\(")):
            model_of(text, {"net": NAMES["net"]})


def test_every_target_is_made_proved_and_reads_back(folder: Path) -> None:
    view = Exporter("net", "x", targets=["onnx", "torchscript", "pt2"], dynamic=True, opset=18, namespace=NAMES)
    seen: list[list[str]] = []
    view.observe(lambda change: seen.append([row["state"] for row in change["new"]]), "rows")
    sends(view, "export", **view.state)
    assert view.error == {}
    assert view.exported, view.error
    assert [one.target for one in view.exported.exports] == [*TARGETS]
    assert rows(view) == dict.fromkeys(TARGETS, ("✓", "made and proved"))
    assert seen[0] == ["waiting"] * 3
    assert ["made and proved", "exporting …", "waiting"] in seen
    assert {Path(path).name for path in view.files} == {"sequential.onnx", "sequential.torchscript.pt", "sequential.pt2"}
    assert {path: Path(path).stat().st_size for path in view.files} == view.files
    graph = onnx.load(view.exported["onnx"].path)
    assert graph.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    assert graph.opset_import[0].version == 18
    assert view.model is NAMES["net"]
    done = dict(NAMES)
    line = view.code[-1]
    assert line == (
        "report = wb.export_model(net, x, to=('onnx', 'torchscript', 'pt2'), folder='exported', dynamic_axes={'input': {0: 'batch'}}, opset_version=18)"
    )
    exec(line.replace("'exported'", "'again'").replace("('onnx', 'torchscript', 'pt2')", "'pt2'"), {**done, "wb": wb}, done)
    assert done["report"]
    assert view.detail["heading"] == "✓ 3 of 3 made and proved"
    assert len(view.figures["images"]) == 4  # drawn before anyone asks
    told = json.loads(view.sections)
    assert [table["title"] for table in told["tables"]] == [table.title for table in view.exported.tables()]
    assert [target for target, _ in told["usage"]] == [*TARGETS]


def test_what_fails_is_told_with_cause_and_cure_beside_what_was_made(folder: Path) -> None:
    view = Exporter("branch", "x", targets=["onnx", "torchscript"], namespace=NAMES)
    sends(view, "export", **view.state)
    assert not view.exported
    assert view.exported is not None
    assert rows(view)["torchscript"] == ("✓", "made and proved")
    assert rows(view)["onnx"] == ("⚠", view.exported["onnx"].cause)
    assert view.state["target"] == "onnx"
    assert (view.detail["heading"], view.detail["note"], view.detail["next"]) == (
        "⚠ onnx",
        view.exported["onnx"].cause,
        view.exported["onnx"].cure,
    )
    assert view.exported.headline == (
        f"Branch was written to branch.torchscript.pt ({view.exported['torchscript'].nbytes / 1000:.3g} kB); it answers as the model does, "
        f"without any difference. Branch was not exported to onnx: {view.exported['onnx'].cause}"
    )
    assert view.exported["onnx"].cause not in view.exported.tables()[-1].rows[0]  # said once
    assert view.detail["own"]
    assert view.detail["verbs"] == []
    assert [Path(path).name for path in view.files] == ["branch.torchscript.pt"]
    assert json.loads(view.report)["done"] == "branch: ⚠ 1 of 2 made and proved"
    sends(view, "graph", target="onnx")
    assert view.error["message"] == "onnx was not made"


def test_the_same_file_compared_on_made_inputs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    view = Exporter("net", "x", targets=["torchscript"], namespace=NAMES)
    sends(view, "export", **view.state)
    page_sets(view, target="torchscript")
    sends(view, "compare", target="torchscript")
    assert view.compared["torchscript"]
    assert len(view.compared["torchscript"].tried) > 3
    assert view.code[-1] == f"wb.parity(net, {view.exported['torchscript'].path!r}, x, vary=True)"
    assert view.detail["remarks"][-1].startswith("On made inputs: ")
    with torch.no_grad():
        NAMES["net"][0].weight[0, 0] += 1
    try:
        sends(view, "compare", target="torchscript")
    finally:
        with torch.no_grad():
            NAMES["net"][0].weight[0, 0] -= 1
    assert not view.compared["torchscript"]
    assert rows(view)["torchscript"] == ("⚠", "made; it differs on made inputs")
    assert " differ" in view.detail["remarks"][-1]


def test_cancel_stops_between_two_targets_and_a_second_export_waits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entered, leave = threading.Event(), threading.Event()
    real = wb.export_model

    def slow(*args: Any, **kwargs: Any) -> Any:
        entered.set()
        assert leave.wait(60)
        return real(*args, **kwargs)

    monkeypatch.setattr("workbench.widgets.exporter.export_model", slow)
    view = Exporter("net", "x", targets=["torchscript", "pt2"], namespace=NAMES)
    view._receive(view, {"command": "export", **view.state}, [])
    assert entered.wait(60)
    assert view.job["text"] == "torchscript · 1 of 2"
    view._receive(view, {"command": "export", **view.state}, [])
    assert view.error["message"] == "an export is running"
    view._receive(view, {"command": "cancel"}, [])
    assert view.job["text"] == "torchscript · 1 of 2 · stops after it"
    leave.set()
    view.wait()
    assert rows(view) == {"torchscript": ("✓", "made and proved"), "pt2": ("–", "cancelled before it began")}
    assert view.job == {}
    assert len(view.exported.exports) == 1
    assert json.loads(view.report)["done"] == "net: 1 of 2 made and proved, 1 cancelled"
    assert view.detail["heading"] == "1 of 2 made and proved, 1 cancelled"


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"targets": []}, "no target is chosen"),
        ({"model": "", "inputs": ""}, "no model is chosen"),
        ({"targets": ["coreml"]}, "there is no export target 'coreml'"),
        ({"opset": "new"}, "'new' is no opset"),
        ({"model": "nett"}, "the notebook has no model 'nett'"),
        ({"inputs": "pair"}, "the model does not run on the example inputs: "),
        ({"folder": "/proc/nowhere"}, "the folder cannot be made: "),
    ],
)
def test_a_press_that_cannot_work_says_why_and_the_view_stays_usable(form: dict[str, Any], message: str, folder: Path) -> None:
    view = Exporter("net", "x", targets=["torchscript"], namespace=NAMES)
    sends(view, "export", **{**view.state, **form})
    assert view.error["message"].startswith(message)
    assert view.files == {}
    assert view.job == {}
    sends(view, "export", model="net", inputs="x", targets=["torchscript"], folder="exported", opset="")
    assert view.error == {}
    assert view.exported, view.error


def test_the_graph_the_figures_and_the_page(folder: Path) -> None:
    view = Exporter("net", "x", namespace=NAMES)
    sends(view, "export", **view.state)
    sends(view, "graph", target="onnx")
    assert view.state["pane"] == "graph"
    assert onnx.load_model_from_string(view.shown).graph.node
    assert (view.graph["file"], view.code[-1]) == ("sequential.onnx", f"NetronView({view.exported['onnx'].path!r})")
    page_sets(view, pane="parity")
    images = view.figures["images"]
    assert len(images) == len(view.exported.figures())
    assert all(image["source"].startswith("data:image/png;base64,") and image["alt"] for image in images)
    sends(view, "save")
    assert "Sequential was written to" in (folder / "exported/report.html").read_text()


@pytest.mark.parametrize("option", ["resume", "mobile", "no_python", "other_hardware", "strangers", "no_class"])
def test_the_guide_asks_what_advise_asks(option: str) -> None:
    view = Exporter(namespace={})
    page_sets(view, pane="advice", answers=[option])
    wanted = wb.exporting.advise(**{option: True})
    assert view.advice == wanted
    assert [(name, yes) for name, _, yes in view.guide["questions"] if yes] == [(option, True)]
    assert view.guide["headline"] == wanted.headline
    assert view.guide["source"].startswith("data:image/png")
    assert view.detail["heading"] == wanted.kind.name
    assert dict(view.detail["facts"])["lost"] == wanted.kind.lost
    assert view.code[-1] == f"wb.exporting.advise({option}=True)"
    sends(view, "choose")
    target = {KINDS[4]: "onnx", KINDS[3]: "pt2"}.get(wanted.kind)
    assert view.state["targets"] == (["onnx"] if target in (None, "onnx") else ["onnx", "pt2"])


def test_the_guide_tells_the_wish_that_the_file_does_not_serve() -> None:
    view = Exporter(namespace={})
    page_sets(view, pane="advice", answers=["strangers", "resume"])
    facts = dict(view.detail["facts"])
    assert (view.detail["heading"], facts["does not serve"]) == (KINDS[0].name, "strangers")
    assert facts["beside it"] == KINDS[1].name


def test_a_model_and_inputs_without_a_name_get_one(folder: Path) -> None:
    view = Exporter(Twice(), NAMES["named"], targets=["torchscript"], namespace={})
    assert (view.state["model"], view.state["inputs"]) == ("model", "args")
    sends(view, "export", **view.state)
    assert view.exported, view.error
    assert view.code[-1] == "report = wb.export_model(model, (), args, to=('torchscript',), folder='exported')"
    assert Exporter(NAMES["net"], X, namespace=NAMES).state["model"] == "net"


def test_the_line_of_the_view_itself_makes_the_same_view() -> None:
    view = Exporter("net", "1x3", targets=["pt2"], folder="made", dynamic=True, opset=18, namespace=NAMES)
    assert view.code == ["Exporter(net, '1x3', targets=['pt2'], folder='made', dynamic=True, opset=18)"]
    again = eval(view.code[0], {"Exporter": partial(Exporter, namespace=NAMES), **NAMES})
    assert again.state == view.state
    assert Exporter("net", "x", namespace=NAMES).code == ["Exporter(net, x)"]


def test_help_tells_of_the_view() -> None:
    assert "the class says" in (inspect.getdoc(Exporter.__init__) or "")
    assert dict(inspect.getmembers(wb.widgets, inspect.isclass))["Exporter"] is Exporter


def test_the_static_form_tells_the_plan_and_then_the_report(folder: Path) -> None:
    view = Exporter("net", "x", targets=["torchscript"], namespace=NAMES)
    assert "Nothing is exported yet: net on x." in view._static_html()
    sends(view, "export", **view.state)
    assert "Sequential was written to" in view._static_html()
    evil = Exporter(EVIL + ":f", EVIL, namespace={})
    assert EVIL not in evil._static_html()
    assert exporter_report.overview(None, "", EVIL, "")["heading"] == "export"


@pytest.mark.parametrize("content", [{"command": "_export_all"}, {"command": "eval"}, None, {"command": ["export"]}])
def test_no_other_command_is_taken(content: Any) -> None:
    view = Exporter(namespace={})
    view._receive(view, content, [])
    assert "this view has no command" in view.error["message"]
