"""Notebook 05 runs from top to bottom: what a trace bakes in is shown by accuracies, refused by the workbench, and right by the other ways."""

from __future__ import annotations

import re
from typing import Any

import pytest

_FACTS = """
    "exports": {one.target: [one.exporter, bool(one.parity)] for one in export.exports},
    "coders": [one.target for one in coders.exports if one.ok],
    "causes": [baked["torchscript"].cause, refused["pt2"].cause, made.cause],
    "files": sorted(path.name for path in work.iterdir()),
    "samples": [[name for name in wb.open(path) if name.startswith("sample")] for path in (work / "digits_plain.pt2", export["pt2"].path)],
    "variants": {v.name: [v.accuracy, v.problem] for v in comparison.variants},
    "right": [check_1({"by_values", "by_shape", "over_rows"}), check_2(lambda image: image / image.max().clamp(min=1e-9)),
              check_2(lambda image: torch.where(image.max() > 0, image / image.max(), image)),
              check_3(dict(zip(answer_3, ("ONNX", "training checkpoint", "state dict (.safetensors)", "ExecuTorch", "torch.export"))))],
    "not_yet": [check_1({"by_values"}), check_1({"by_values", "by_shape", "over_rows", "by_where"}), check_1(set()), check_2(stretched),
                check_2(lambda image: image), check_2(lambda image: image / image.max()),
                check_3(dict(zip(answer_3, ("ONNX", "state dict", "state dict", "ExecuTorch", "torch.export")))),
                check_3(dict.fromkeys(answer_3, "ONNX")), check_3(dict.fromkeys(answer_3, 1)),
                check_3(dict(zip(answer_3, ("ONNX", "training", "state dict (.pt)", "ExecuTorch", "torch.export"))))],
"""


@pytest.fixture(scope="module")
def book(run_notebook: Any) -> Any:
    return run_notebook("05_torchscript_and_export.ipynb", _FACTS)


def printed(book: Any, cell: str) -> str:
    return "".join(output.get("text", "") for output in book.outputs(cell))


def accuracies(book: Any, cell: str) -> dict[str, float]:
    return {what.strip(): float(right) for what, right in re.findall(r"^(.+?)\s+([\d.]+) % right$", printed(book, cell), re.M)}


def test_nothing_fails_and_nothing_is_said_on_stderr(book: Any) -> None:
    assert book.complaints() == []


def test_three_targets_are_made_by_the_best_exporter_and_proved(book: Any) -> None:
    assert book.facts["exports"] == {"torchscript": ["script", True], "pt2": ["not strict", True], "onnx": ["dynamo", True]}


def test_the_traced_branch_is_silently_wrong_and_the_script_is_right(book: Any) -> None:
    found = accuracies(book, "any_paper = AnyPaper(model).eval()")
    assert found["light paper, PyTorch"] == found["light paper, scripted"] == found["dark  paper, traced"] > 95
    assert found["light paper, traced"] < 20


def test_the_traced_loop_stops_at_eight_rows(book: Any) -> None:
    found = accuracies(book, "reader = RowReader()")
    assert found["8 rows, traced"] == found["8 rows, PyTorch"] > 85
    assert found["10 rows, scripted"] == found["10 rows, PyTorch"] > 85
    assert found["10 rows, traced"] < found["10 rows, PyTorch"] - 20
    assert "(1, 10) scores from PyTorch, (6, 10) from the trace" in printed(book, "reader = RowReader()")


def test_the_workbench_refuses_what_was_baked_in_and_says_why(book: Any) -> None:
    branch, exported, rows = book.facts["causes"]
    assert "a decision that hangs on values" in branch
    assert "branch" in exported
    assert "is fixed by the model's own code" in rows
    assert "baked a size or a loop count in" in printed(book, 'path=work / "reader.pt", exporter="trace"')
    assert "a branch is baked in" in printed(book, "wb.parity(any_paper, traced, images, vary=True)")


def test_both_ways_to_write_a_branch_are_right_on_both_papers(book: Any) -> None:
    text = printed(book, "class AnyPaperByCond(AnyPaper)")
    assert len(re.findall(r"torch\.cond: 9[5-9]\.\d % right", text)) == 2
    assert "any_paper.pt2 and AnyPaper agree" in text


def test_each_method_has_its_program(book: Any) -> None:
    assert book.facts["coders"] == ["torchscript", "pt2", "pt2:encode", "pt2:decode"]
    kept = re.search(r"keep (\d+) %", printed(book, "class Coder(nn.Module)"))
    assert kept
    assert int(kept[1]) > 60


def test_a_strangers_program_is_refused_and_examples_are_not_passed_on(book: Any) -> None:
    assert "a program that this process did not write is not run" in printed(book, "except wb.errors.UntrustedError as error")
    assert book.facts["samples"] == [["sample_inputs.0.0"], []]


def test_all_variants_answer_alike(book: Any) -> None:
    variants = book.facts["variants"]
    assert all(problem == "" for _, problem in variants.values())
    assert len({accuracy for accuracy, _ in variants.values()}) == 1


def test_the_exercises_know_right_from_wrong_and_give_a_hint(book: Any) -> None:
    assert all(said.endswith("right.") for said in book.facts["right"])
    assert all("Hint:" in said for said in book.facts["not_yet"])
    for cell in ("def check_1", "def check_2", "def check_3"):
        assert "not answered yet" in printed(book, cell)


@pytest.mark.parametrize("cell", ["comparison.plot()", "advice.plot()"])
def test_the_figures_are_drawn(book: Any, cell: str) -> None:
    assert any("image/png" in output.get("data", {}) for output in book.outputs(cell))


def test_it_fits_on_a_small_machine(book: Any) -> None:
    assert book.peak_mb < 1000
