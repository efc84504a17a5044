"""Views without a browser: what they read back, what they refuse, what they say."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

import workbench as wb
from workbench.errors import SelectionError, TensorNotFoundError
from workbench.widgets import Differ, Explorer
from workbench.widgets.base import STATIC
from workbench.widgets.jobs import Job


def small() -> dict[str, torch.Tensor]:
    layers = {f"layers.{i}.{part}.weight": torch.full((2, 2 + i), float(i)) for i in range(3) for part in ("q", "k")}
    return {"embed.weight": torch.arange(12.0).reshape(3, 4), **layers}


def page_sets(view: Any, **values: Any) -> None:
    """What a change in the page does: the whole state, with some values new."""
    view.state = {**view.state, **values}


def page_sends(view: Any, content: Any) -> None:
    view._receive(view, content, [])


def shipped(view: Any) -> Any:
    return json.loads(view.report)


@pytest.fixture
def explorer() -> Explorer:
    return Explorer(wb.open(small()))


@pytest.fixture
def differ() -> Differ:
    other = {**small(), "layers.1.q.weight": torch.full((2, 3), 2.0), "new": torch.ones(1)}
    other.pop("embed.weight")
    return Differ(wb.diff(wb.open(small()), wb.open(other)))


def test_the_page_selects_and_python_reads(explorer: Explorer) -> None:
    seen: list[Any] = []
    explorer.observe(lambda change: seen.append(change["new"]), "selected")
    page_sets(explorer, selected=[1, 3])
    assert explorer.selected == ("layers.0.q.weight", "layers.1.q.weight")
    assert seen == [explorer.selected]
    assert list(explorer.selection) == list(explorer.selected)
    assert explorer.code[-1] == "ckpt.select(['layers.0.q.weight', 'layers.1.q.weight'])"


def test_python_selects_and_the_page_sees(explorer: Explorer) -> None:
    explorer.selected = ["embed.weight"]
    explorer.filter = "layers.{0-1}.*"
    explorer.mode = "table"
    assert (explorer.state["selected"], explorer.state["filter"], explorer.state["mode"]) == ([0], "layers.{0-1}.*", "table")
    assert explorer.code[-1] == "ckpt.select('layers.{0-1}.*')"


@pytest.mark.parametrize(
    ("filter", "count"),
    [("", 7), ("q.weight", 3), ("*.k.*", 3), ("layers.{0-1}.*", 4), ("re:embed.+", 1), ("?mbed.weight", 1), ("[", 0), ("weight*", 0)],
)
def test_matching(explorer: Explorer, filter: str, count: int) -> None:
    explorer.filter = filter
    assert len(explorer.matching) == count


def test_constructor_arguments_set_the_state() -> None:
    view = Explorer(wb.open(small()), filter="embed", mode="table", selected=["embed.weight"])
    assert (view.state["filter"], view.state["mode"], view.state["selected"]) == ("embed", "table", [0])
    view.wait()


@pytest.mark.parametrize("make", [lambda: Explorer(wb.open(small()), filtr="x"), lambda: Explorer(wb.open(small()), layout=None)])
def test_unknown_keywords_are_refused(make: Callable[[], Any]) -> None:
    with pytest.raises(TypeError, match="unexpected keyword"):
        make()


def test_unknown_names_and_kinds_are_refused(explorer: Explorer, differ: Differ) -> None:
    with pytest.raises(TensorNotFoundError, match="no tensor is called") as caught:
        explorer.selected = ["embed.wieght"]
    assert "embed.weight" in (caught.value.hint or "")
    with pytest.raises(SelectionError, match="no kind of difference"):
        differ.kinds = ["altered"]
    with pytest.raises(TensorNotFoundError):
        differ.selected = ["nothing"]
    with pytest.raises(SelectionError, match="nothing is selected"):
        _ = explorer.selection


@pytest.mark.parametrize(
    "content", [{"command": "eval"}, {"command": "__init__"}, {"command": "_receive"}, {}, "measure", None, {"command": ["measure"]}]
)
def test_the_page_can_send_only_known_commands(explorer: Explorer, content: Any) -> None:
    page_sends(explorer, content)
    assert "this view has no command" in explorer.error["message"]


def test_a_selection_out_of_range_selects_nothing(explorer: Explorer) -> None:
    page_sets(explorer, selected=[99, -1])
    assert explorer.selected == ()


def test_panel_of_one_tensor(explorer: Explorer) -> None:
    page_sets(explorer, selected=[0])
    explorer.wait()
    detail = explorer.detail
    assert detail["heading"] == "embed.weight"
    assert dict(detail["facts"])["type"] == "float32 [3, 4]"
    more = dict(detail["more"])
    assert (more["mean"], more["max"], more["NaN"], more["elements"]) == ("5.5", "11", "0", "12")
    assert more["values"] == "0, 1, 2, 3, 4, 5, 6, 7 …"
    assert detail["image"].startswith("data:image/png;base64,")
    assert explorer.code[-1] == "wb.stats(ckpt, names='embed.weight')"
    assert explorer.error == {}
    assert explorer.job == {}


def test_a_replaced_selection_shows_no_stale_numbers(explorer: Explorer) -> None:
    stale = Job("values", shown=False)
    explorer.detail = {"heading": "embed.weight"}
    stale.cancel.set()
    assert explorer._show(stale, {"heading": "embed.weight", "facts": []}) is False
    assert explorer._show(Job("values", shown=False), {"heading": "another", "facts": []}) is False
    assert explorer.detail == {"heading": "embed.weight"}


def test_statistics_of_what_the_filter_leaves(explorer: Explorer) -> None:
    explorer.filter = "layers.2.*"
    page_sends(explorer, {"command": "statistics"})
    explorer.wait()
    assert explorer.statistics["mean"] == [None, None, None, None, None, 2.0, 2.0]
    assert len(explorer.measured.rows) == 2
    assert explorer.code[-1] == "wb.stats(ckpt, names='layers.2.*')"
    explorer.filter = "no such name"
    page_sends(explorer, {"command": "statistics"})
    explorer.wait()
    assert "no tensor matches" in explorer.error["message"]
    assert explorer.job == {}


def test_statistics_of_a_section() -> None:
    ckpt = wb.open({"model": small(), "ema": small(), "epoch": 3})
    view = Explorer(ckpt)
    assert [item["id"] for item in shipped(view)["rail"]] == ["tensors", "section:model", "section:ema", "metadata"]
    page_sets(view, pane="section:ema", filter="embed*")
    assert view.matching == ("ema.embed.weight",)
    page_sends(view, {"command": "statistics"})
    view.wait()
    assert [mean for mean in view.statistics["mean"] if mean is not None] == [5.5]
    assert view.code[-1] == "wb.stats(ckpt.section('ema'), names='embed*')"


def test_not_a_number_reaches_the_page_as_text() -> None:
    view = Explorer(wb.open({"a": torch.tensor([float("nan")]), "b": torch.tensor([float("inf"), 1.0])}))
    page_sends(view, {"command": "statistics"})
    page_sets(view, selected=[0])
    view.wait()
    json.dumps([view.statistics, view.detail], allow_nan=False)
    assert view.statistics["nan"] == [1, 0]
    assert dict(view.detail["more"])["NaN"] == "1"


def test_locked_values_say_why(tmp_path: Any) -> None:
    from dataclasses import replace

    ckpt = wb.open(small())
    locked = replace(ckpt["embed.weight"], locked="its record is shorter than its shape needs")
    view = Explorer(replace(ckpt, tree={**ckpt.tree, "embed.weight": locked}))
    page_sets(view, selected=[0])
    view.wait()
    assert view.detail["note"] == "⚠ Values are locked: its record is shorter than its shape needs"
    assert view.detail["locked"]
    assert "image" not in view.detail
    assert view.error == {}


def test_an_error_keeps_what_the_view_knew(explorer: Explorer) -> None:
    before = dict(explorer.detail)
    page_sends(explorer, {"command": "measure"})
    assert explorer.error == {"message": "statistics with a histogram are of one tensor", "hint": "select one row"}
    assert explorer.detail == before


def test_cancel_stops_the_job(explorer: Explorer) -> None:
    import threading

    started, stopped = threading.Event(), threading.Event()

    def work(job: Job) -> None:
        started.set()
        assert job.cancel.wait(10)
        stopped.set()

    explorer._start("job", "statistics", work, shown=True)
    assert started.wait(10)
    assert explorer.job["label"] == "statistics"
    page_sends(explorer, {"command": "cancel"})
    assert stopped.wait(10)
    assert explorer.job == {}


def test_saved_notebooks_keep_static_html(explorer: Explorer, differ: Differ) -> None:
    data, _ = explorer._repr_mimebundle_()
    assert "embed.weight" in data["text/html"]
    assert "application/vnd.jupyter.widget-view+json" in data
    data, _ = differ._repr_mimebundle_()
    assert "layers.1.q.weight" in data["text/html"]
    assert "<script" not in data["text/html"]


def test_empty_checkpoints_and_equal_ones_have_views() -> None:
    assert "holds no tensors" in Explorer(wb.open({})).detail["note"]
    view = Differ(wb.diff(wb.open(small()), wb.open(small())))
    assert [kind["count"] for kind in shipped(view)["kinds"]] == [0, 0, 0, 7]
    assert shipped(view)["nothing"] == "Nothing differs: 7 tensors are equal"
    assert shipped(Differ(wb.diff(wb.open({}), wb.open({}))))["nothing"] == "Nothing differs: neither side holds a tensor"


def test_the_result_of_an_op_says_that_it_is_not_saved(tmp_path: Any) -> None:
    torch.save(small(), tmp_path / "a.pt")
    ckpt = wb.open(tmp_path / "a.pt")
    assert dict(Explorer(ckpt).detail["facts"])["format"] == "torch-zip"
    made = Explorer(wb.ops.rename(ckpt, {"embed.weight": "stem.weight"}))
    facts = dict(made.detail["facts"])
    assert facts["file"] == "not saved · rename"
    assert "format" not in facts
    assert shipped(made)["title"]["parts"][-1] == "not saved · rename"
    assert "not saved" not in repr(ckpt)


def test_the_shape_column_has_room_for_four_dimensions() -> None:
    def width(*shape: int) -> int:
        columns = shipped(Explorer(wb.open({"w": torch.zeros(shape)})))["columns"]
        return int(next(column["width"] for column in columns if column["id"] == "shape").removesuffix("px"))

    assert width(2) < width(64, 32, 3, 3) < width(1024, 4, 3, 3) < width(*[1] * 30) == 140


def test_differ_reads_back(differ: Differ) -> None:
    names = shipped(differ)["data"]["name"]
    assert set(names[:2]) == {"embed.weight", "new"}
    assert names[2] == "layers.1.q.weight"
    page_sets(differ, selected=[2], kinds=["changed"], filter="q")
    assert (differ.selected, differ.kinds, differ.filter) == (("layers.1.q.weight",), ("changed",), "q")
    assert dict(differ.detail["facts"])["max |Δ|"] == "1"
    page_sets(differ, pane="layers")
    differ.wait()
    assert differ.figure["source"].startswith("data:image/png")


def test_the_tree_that_is_shipped_holds_every_tensor_once(explorer: Explorer) -> None:
    report = shipped(explorer)
    tree = report["tree"]
    assert sorted(row for row in tree["row"] if row >= 0) == list(range(7))
    assert all(parent < node for node, parent in enumerate(tree["parent"]))
    assert all(tree["depth"][node] == tree["depth"][parent] + 1 for node, parent in enumerate(tree["parent"]) if parent >= 0)


def test_scripts_write_text_only() -> None:
    for path in STATIC.glob("*.js"):
        source = path.read_text(encoding="utf-8")
        assert not any(word in source for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("))


def test_outside_a_kernel_nothing_is_registered() -> None:
    from workbench.widgets import register

    assert register() is False
