"""Notebook 04 runs from top to bottom: what the textbook's call does today, a limit with a reason, wrong files found, and exercises that check."""

from __future__ import annotations

from typing import Any

import pytest

_FACTS = """
    "opsets": {name: onnx.load(work / name, load_external_data=False).opset_import[0].version for name in (
        "textbook.onnx", "textbook_classic.onnx", "plain.onnx", "digits_opset13.onnx", "digits.onnx")},
    "files": sorted(path.name for path in work.iterdir()),
    "by_hand": [verify(work / "plain.onnx", model, pictures)[1] for pictures in (images, 16 * data.test_images)],
    "parity": [bool(parity), strict.outputs[0].within_noise, strict.outputs[0].within_given],
    "engine": [engine.provider, engine.notes, len(answers), float(right), samples.accuracy(model, data)],
    "layers": [layers.first, bool(layers), sorted(wb.open(work / "layer.safetensors"))],
    "light": [float(one) for one in accuracies],
    "causes": [found.cause, refused["onnx"].cause, unknown.cause, wrong["onnx"].cause],
    "variants": {v.name: [v.disk_nbytes, v.accuracy, v.problem] for v in comparison.variants},
    "advice": advice.kind.name,
    "right": [check_1(({1, 8, 32}, {8})), check_2((1e-3, False)), check_3("features.3"), check_3("features.4")],
    "not_yet": [check_1(({8}, {8})), check_1(({1, 8, 32}, {1, 8, 32})), check_1((set(), {8})), check_1({1, 8}), check_2((1e-4, False)), check_2((1e-2, False)),
                check_2((1e-3, True)), check_3("classifier.1"), check_3("features.0"), check_3(3)],
"""


@pytest.fixture(scope="module")
def book(run_notebook: Any) -> Any:
    return run_notebook("04_onnx_export.ipynb", _FACTS)


def test_nothing_fails_and_nothing_is_said_on_stderr(book: Any) -> None:
    assert book.complaints() == []


def test_the_textbooks_opset_is_honoured_by_the_workbench_alone_of_the_two_calls(book: Any) -> None:
    opsets = book.facts["opsets"]
    assert opsets["textbook.onnx"] != 13
    assert opsets["textbook_classic.onnx"] == opsets["digits_opset13.onnx"] == 13
    assert opsets["plain.onnx"] == opsets["digits.onnx"] == 20


def test_todays_exporter_writes_two_files_unless_told_otherwise(book: Any) -> None:
    assert {"textbook.onnx", "textbook.onnx.data", "plain.onnx", "digits.onnx", "digits_report.html"} <= set(book.facts["files"])
    assert not {"plain.onnx.data", "digits.onnx.data"} & set(book.facts["files"])


def test_the_tutorials_limit_fails_a_right_file_and_the_measured_one_does_not(book: Any) -> None:
    assert book.facts["by_hand"] == [True, False]
    assert book.facts["parity"] == [True, True, False]


def test_the_engine_answers_every_image_as_the_model_does(book: Any) -> None:
    provider, notes, answered, right, accuracy = book.facts["engine"]
    assert provider.endswith("ExecutionProvider")
    assert (provider == "CPUExecutionProvider") == bool(notes)
    assert (answered, right) == (359, pytest.approx(accuracy))
    assert accuracy > 0.95


def test_the_rounded_layer_is_found_and_saved(book: Any) -> None:
    assert book.facts["layers"] == ["classifier.1", False, ["candidate", "input.0", "reference"]]


def test_the_traced_branch_is_wrong_and_its_cause_is_named(book: Any) -> None:
    torch, file = book.facts["light"]
    assert torch > 95
    assert file < 20
    baked, refused, unknown, wrong = book.facts["causes"]
    assert baked.startswith("a branch is baked in")
    assert "branch" in refused
    assert "digits.squash" in unknown
    assert wrong.startswith("the file does not answer as the model does")


def test_what_was_refused_was_not_written(book: Any) -> None:
    assert not {"any_paper_refused.onnx", "tanh.onnx"} & set(book.facts["files"])


def test_int8_shrinks_and_rounding_alone_does_not(book: Any) -> None:
    variants = book.facts["variants"]
    assert all(problem == "" for _, _, problem in variants.values())
    assert variants["ONNX, int8"][0] < 0.5 * variants["ONNX"][0]
    assert variants["ONNX, rounded"][0] == pytest.approx(variants["ONNX"][0], rel=0.01)
    assert variants["ONNX, int8"][1] > variants["PyTorch"][1] - 0.02
    assert book.facts["advice"] == "ONNX (.onnx)"


def test_the_exercises_know_right_from_wrong_and_give_a_hint(book: Any) -> None:
    assert all("right." in said for said in book.facts["right"])
    assert all("not yet" in said or "compare it" in said for said in book.facts["not_yet"])
    for cell in ("def check_1", "def check_2", "def check_3"):
        (output,) = book.outputs(cell)
        assert "not answered yet" in output.text


def test_netron_is_shown_with_a_static_form(book: Any) -> None:
    (output,) = book.outputs("NetronView(work")
    assert {"application/vnd.jupyter.widget-view+json", "text/html"} <= set(output.data)


def test_the_exporter_is_shown_with_a_static_form_and_exports_nothing_by_itself(book: Any) -> None:
    (output,) = book.outputs("Exporter(model, images")
    assert {"application/vnd.jupyter.widget-view+json", "text/html"} <= set(output.data)
    assert "exported" not in book.facts["files"]


@pytest.mark.parametrize("cell", ["layers.plot()", "parity.plot()", "comparison.plot()", "advice.plot()"])
def test_the_figures_are_drawn(book: Any, cell: str) -> None:
    assert any("image/png" in output.get("data", {}) for output in book.outputs(cell))


def test_it_fits_on_a_small_machine(book: Any) -> None:
    assert book.peak_mb < 1000
