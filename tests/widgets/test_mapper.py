"""The key mapper without a browser: what it shows, what each command does to the map, and that its lines of Python do the same."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

import workbench as wb
from workbench.errors import SelectionError, TensorNotFoundError
from workbench.keymap.maps import Ambiguous, KeyMap, Pair, Part, Unmatched
from workbench.widgets import KeyMapper

FILE = {
    "module.a.weight": torch.full((4, 4), 1.0),
    "module.b.weight": torch.full((4, 4), 2.0),
    "module.x.q": torch.full((2, 4), 3.0),
    "module.x.k": torch.full((2, 4), 4.0),
    "module.fc.weight": torch.full((9, 4), 5.0),
    "module.n.gamma": torch.full((4,), 6.0),
    "module.n.beta": torch.full((4,), 7.0),
    "spare": torch.full((4,), 8.0),
}
MODEL = {
    "a.weight": ("float32", (4, 4)),
    "x.qk": ("float32", (4, 4)),
    "fc.weight": ("float32", (3, 4)),
    "b.weight": ("float32", (4, 4)),
    "n.weight": ("float32", (4,)),
    "n.bias": ("float32", (4,)),
    "new.bias": ("float32", (4,)),
}
STRIP = 'strip "module."'


def keymap() -> KeyMap:
    names = "gamma becomes weight"
    return KeyMap(
        pairs=(
            Pair.plain("a.weight", "module.a.weight", STRIP, "certain", "written by DataParallel"),
            Pair("x.qk", (Part("module.x.q"), Part("module.x.k")), "join q, k", "likely", "rows of q, then of k"),
            Pair.plain("n.weight", "module.n.gamma", names, "likely", "TensorFlow's words"),
            Pair.plain("n.bias", "module.n.beta", names, "likely", "TensorFlow's words"),
        ),
        unmatched=(Unmatched("fc.weight", "[9, 4] in the file and [3, 4] in the model", "module.fc.weight"), Unmatched("new.bias", "nothing is like it")),
        ambiguous=(Ambiguous("b.weight", ("module.b.weight", "module.a.weight"), "two of one shape"),),
        unused=("module.b.weight", "module.fc.weight", "spare"),
    )  # fmt: skip


@pytest.fixture
def mapper() -> KeyMapper:
    return KeyMapper(FILE, MODEL, keymap())


def page_sets(view: Any, **values: Any) -> None:
    view.state = {**view.state, **values}


def asks(view: Any, command: str, *names: str, group: str = "", choice: Any = None) -> None:
    """What the page sends: a command with the rows, or the group, that it means."""
    sides = view._sides
    content = {"command": command, "group": group, "selected": [sides.row.get(name, sides.file_row.get(name)) for name in names]}
    view._receive(view, content if choice is None else {**content, "choice": choice}, [])


def rows(view: Any) -> Any:
    return json.loads(view.rows)


def groups(view: Any) -> list[tuple[str, str]]:
    return [(group["id"], group["count"]) for group in rows(view)["groups"]]


def test_what_is_open_comes_first_then_each_rule(mapper: KeyMapper) -> None:
    assert groups(mapper) == [
        ("unmatched ", "2 keys"), ("ambiguous ", "1 key"), ("likely join q, k", "1 key"), ("likely gamma becomes weight", "2 keys"),
        (f"certain {STRIP}", "1 key"), ("unused ", "3 keys"),
    ]  # fmt: skip
    shown = rows(mapper)
    names = json.loads(mapper.report)["name"]
    told = [source if isinstance(source, str) else names[source] for source in shown["source"]]
    assert told == [
        "module.a.weight", "module.x.{q + k}", "only in another shape", "2 candidates", "module.n.gamma", "module.n.beta", "–"
    ]  # fmt: skip
    assert shown["counts"] == [2, 1, 3, 1, 3]
    assert not shown["ok"]


def test_coverage_in_tensors_parameters_and_bytes(mapper: KeyMapper) -> None:
    # filled: 16 + 16 + 4 + 4 of 72 parameters; a share is rounded down
    assert rows(mapper)["coverage"]["text"] == "4 of 7 tensors · 55.5 % of 72 parameters · 55.5 % of 288 B"
    assert dict(rows(mapper)["coverage"]["parts"]) == {"certain": 16 / 72, "likely": 24 / 72, "ambiguous": 16 / 72, "unmatched": 16 / 72}
    asks(mapper, "accept", "b.weight", choice="module.b.weight")
    assert rows(mapper)["coverage"]["text"].startswith("5 of 7 tensors · 77.7 %")
    shapes = KeyMapper(FILE, {name: shape for name, (_, shape) in MODEL.items()}, keymap())
    assert rows(shapes)["coverage"]["text"] == "4 of 7 tensors · 55.5 % of 72 parameters · bytes –"
    nothing = KeyMapper(FILE, {"z": (0, 3)}, KeyMap((), (Unmatched("z", "nothing"),)))
    assert rows(nothing)["coverage"]["text"] == "0 of 1 tensors · 100 % of 0 parameters · bytes –"


def test_a_candidate_is_chosen_and_the_map_reads_back(mapper: KeyMapper) -> None:
    seen: list[Any] = []
    mapper.observe(lambda change: seen.append(change["new"]), "keymap")
    asks(mapper, "accept", "b.weight", choice=mapper._sides.file_row["module.b.weight"])
    assert mapper.error == {}
    assert mapper.keymap == keymap().edited(accept={"b.weight": "module.b.weight"}) == seen[0]
    assert mapper.code[-1] == "keymap = keymap.edited(accept={'b.weight': 'module.b.weight'})"
    assert torch.equal(mapper.checkpoint["b.weight"].load(), FILE["module.b.weight"])
    assert torch.equal(mapper.checkpoint["x.qk"].load(), torch.cat([FILE["module.x.q"], FILE["module.x.k"]]))
    assert rows(mapper)["past"] == 1


def test_a_source_is_typed_for_a_name_without_one(mapper: KeyMapper) -> None:
    page_sets(mapper, selected=[mapper._sides.row["new.bias"]])
    offered = [name for _, name, _ in mapper.detail["picker"]["rows"]]
    assert offered == ["spare", "module.n.beta", "module.n.gamma"]  # those of its shape, unused first
    asks(mapper, "accept", "new.bias", choice="spare")
    assert mapper.keymap.mapping["spare"] == "new.bias"
    asks(mapper, "accept", "fc.weight", choice="module.fc.weight")
    assert mapper.error["message"].startswith("'module.fc.weight' is [9, 4] in the file and 'fc.weight' is [3, 4] in the model")
    asks(mapper, "accept", "fc.weight", choice="module.fc.wieght")
    assert mapper.error == {"message": "the file has no tensor 'module.fc.wieght'", "hint": mapper.error["hint"]}
    assert "module.fc.weight" in mapper.error["hint"]
    assert rows(mapper)["past"] == 1


def test_a_name_of_the_file_is_given_to_an_open_name(mapper: KeyMapper) -> None:
    page_sets(mapper, selected=[mapper._sides.file_row["spare"]])
    assert [name for _, name, _ in mapper.detail["picker"]["rows"]] == ["new.bias"]
    asks(mapper, "accept", "spare", choice=mapper._sides.row["new.bias"])
    assert mapper.keymap.mapping["spare"] == "new.bias"


def test_after_a_choice_the_next_open_name_is_selected() -> None:
    two = replace(
        keymap(), pairs=keymap().pairs[:2], unmatched=tuple(Unmatched(n, "none") for n in ("fc.weight", "n.weight", "n.bias", "new.bias"))
    )
    view = KeyMapper(FILE, MODEL, two)
    page_sets(view, selected=[view._sides.row["n.weight"]])
    asks(view, "accept", "n.weight", choice="spare")
    assert view.selected == ("n.bias",)
    assert view.detail["heading"] == "n.bias"


def test_a_rule_is_accepted_and_rejected_whole(mapper: KeyMapper) -> None:
    asks(mapper, "accept", group="likely gamma becomes weight")
    pairs = {pair.target: pair for pair in mapper.keymap.pairs}
    assert {pairs[name].confidence for name in ("n.weight", "n.bias")} == {"certain"}
    assert pairs["n.bias"].reason == "TensorFlow's words; accepted by hand"
    assert pairs["x.qk"].confidence == "likely"
    asks(mapper, "reject", group=f"certain {STRIP}")
    assert mapper.keymap.unmatched[-1] == Unmatched("a.weight", "rejected by hand")
    assert "module.a.weight" in mapper.keymap.unused
    asks(mapper, "reject", group="ambiguous ")
    assert not mapper.keymap.ambiguous
    assert mapper.error == {}


def test_the_lines_of_python_do_the_same(mapper: KeyMapper) -> None:
    asks(mapper, "accept", group="likely gamma becomes weight")
    asks(mapper, "accept", "b.weight", choice="module.b.weight")
    asks(mapper, "accept", "x.qk")
    asks(mapper, "reject", "n.bias", "a.weight")
    asks(mapper, "accept", "n.bias", choice="spare")
    asks(mapper, "reject", group="certain gamma becomes weight")
    known = {"keymap": keymap(), "replace": replace, "wb": wb, "KeyMapper": KeyMapper, "source": FILE, "target": MODEL}
    for line in mapper.code:
        exec(line, known)
    assert mapper.error == {}
    assert len(mapper.code) == 7
    assert known["keymap"] == mapper.keymap


def test_undo_takes_back_the_change_and_its_line(mapper: KeyMapper) -> None:
    asks(mapper, "reject", "n.weight", "n.bias")
    asks(mapper, "accept", "b.weight", choice="module.a.weight")
    asks(mapper, "undo")
    asks(mapper, "undo")
    assert mapper.keymap == keymap()
    assert mapper.code == ["KeyMapper(source, target, keymap)"]
    asks(mapper, "undo")
    assert "nothing was changed" in mapper.error["message"]


def test_refusals_leave_the_map_as_it_is(mapper: KeyMapper) -> None:
    for command, names, choice, told in [
        ("accept", (), None, "nothing is selected"),
        ("accept", ("a.weight",), None, "nothing that is selected is likely"),
        ("accept", ("b.weight",), None, "nothing that is selected is likely"),
        ("accept", ("a.weight", "b.weight"), "spare", "a source is chosen for one name"),
        ("accept", ("b.weight",), 10_000, "that is no name of the file"),
        ("accept", ("b.weight",), ["x"], "the file has no tensor"),
        ("reject", ("new.bias",), None, "has no source that could be rejected"),
        ("apply", (), None, "4 of 7 keys matched"),
        ("eval", (), None, "this view has no command 'eval'"),
    ]:
        asks(mapper, command, *names, choice=choice)
        assert told in mapper.error["message"]
        assert mapper.keymap == keymap()
    mapper._receive(mapper, {"command": "reject", "selected": "all", "group": ["x"]}, [])
    assert "nothing is selected" in mapper.error["message"]


def test_setting_the_map_and_the_selection_from_python(mapper: KeyMapper) -> None:
    mapper.keymap = keymap().edited(accept={"new.bias": "spare"})
    assert rows(mapper)["counts"][0] == 1
    mapper.selected, mapper.filter = ("n.bias",), "n.*"
    assert (mapper.state["selected"], mapper.state["filter"]) == ([5], "n.*")
    assert dict(mapper.detail["facts"])["name in the file"] == "module.n.beta"
    with pytest.raises(TensorNotFoundError, match="the model has no tensor"):
        mapper.selected = ("n.bais",)
    with pytest.raises(SelectionError, match="another model"):
        mapper.keymap = KeyMap((), (Unmatched("a.weight", "alone"),))
    with pytest.raises(SelectionError, match="another file"):
        mapper.keymap = keymap().edited(accept={"new.bias": "not there"})
    with pytest.raises(TypeError, match="unexpected keyword"):
        KeyMapper(FILE, MODEL, keymap(), filtr="x")  # type: ignore[call-arg]


def test_code_is_written_where_it_is_shown(mapper: KeyMapper) -> None:
    assert mapper.listing == {}
    page_sets(mapper, pane="code")
    assert mapper.listing == {"text": mapper.keymap.code(), "more": ""}
    asks(mapper, "reject", "x.qk")
    assert "torch.cat" not in mapper.listing["text"]
    scope: dict[str, Any] = {"checkpoint": FILE}
    exec(mapper.listing["text"], scope)
    assert set(scope["state_dict"]) == set(mapper.checkpoint)


def test_a_whole_map_applies_and_says_what_comes_next() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    source = {f"module.{name}": value.clone() for name, value in model.state_dict().items()}
    view = KeyMapper(source, model)
    assert view.keymap.ok
    assert "wb.load_into(model, source, mapper.keymap)" in view.detail["next"]
    assert rows(view)["coverage"]["text"].startswith("7 of 7 tensors · 100 %")
    asks(view, "apply")
    assert view.code == ["keymap = wb.match(source, target)", "fixed = keymap.apply(source)"]
    assert "7 tensors" in view.detail["next"]
    assert set(view.checkpoint) == set(model.state_dict())
    assert wb.load_into(model, source, view.keymap)


def test_rivals_are_a_finding_and_keep_apply_off() -> None:
    source = wb.open({"model": FILE, "ema": FILE})
    one = KeyMap(
        (Pair.plain("a.weight", "module.a.weight", STRIP, "certain", "x"),), section="model", section_reason="named so", rivals=("ema",)
    )
    view = KeyMapper(source, {"a.weight": (4, 4)}, one)
    report = json.loads(view.report)
    assert "'ema' fits as well" in report["findings"][0]["message"]
    assert not rows(view)["ok"]
    assert "Take one of the sections by name" in view.detail["next"]


def test_strangers_names_are_made_visible() -> None:
    name, rule = "a\u202eb\x1b", "strip \x07"
    view = KeyMapper(
        {name: torch.ones(2)}, {"w": (2,), "v": (2,)}, KeyMap((Pair.plain("w", name, rule, "likely", name),), (Unmatched("v", name),))
    )
    shipped = view.report.decode() + view.rows.decode() + json.dumps(view.detail)
    assert all(ord(c) >= 32 for c in shipped)
    assert "\\u202e" not in shipped.replace("\\\\u202e", "")
    asks(view, "accept", "v", choice="a\\u202eb\\x1b")  # typed as the page shows it
    assert view.keymap.pairs[-1].source == name
    assert "<b>" not in KeyMapper({"<b>": torch.ones(1)}, {"<b>": (1,)})._repr_mimebundle_()[0]["text/html"]


def test_a_saved_notebook_keeps_the_table(mapper: KeyMapper) -> None:
    data, _ = mapper._repr_mimebundle_()
    for text in ("without a source", "new.bias", "ambiguous", "gamma becomes weight"):
        assert text in data["text/html"]
    assert "application/vnd.jupyter.widget-view+json" in data


def test_ties_count_once() -> None:
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 3, bias=False), "b": torch.nn.Linear(3, 3, bias=False)})
    model["b"].weight = model["a"].weight
    view = KeyMapper({"a.weight": torch.ones(3, 3), "b.weight": torch.ones(3, 3)}, model)
    assert rows(view)["coverage"]["text"] == "2 of 2 tensors · 100 % of 9 parameters · 100 % of 36 B"


def test_candidates_that_do_not_fit_as_they_stand_cannot_be_pressed() -> None:
    candidates = ("fused", "square", "square.T")
    view = KeyMapper(
        {"fused": torch.ones(6, 2), "square": torch.ones(2, 2)}, {"w": (2, 2)}, KeyMap((), (), (Ambiguous("w", candidates, "?"),))
    )
    page_sets(view, selected=[0])
    assert [row for row, _, _ in view.detail["picker"]["rows"]] == [-1, 2, -1]
    asks(view, "accept", "w", choice="fused")
    assert "is [6, 2] in the file" in view.error["message"]
