"""Notebook 08 runs from top to bottom: what shrinks and what does not, a plan that keeps its promise to the byte, and exercises that check."""

from __future__ import annotations

from typing import Any

import pytest

_FACTS = """
    "sizes": {name: (work / name).stat().st_size for name in ("digits.pt", "dynamic.pt", "masked.pt", "pruned.pt", "int8.safetensors", "mixed.safetensors", "slim.safetensors")},
    "predicted": [predicted.nbytes, plan.nbytes, wb.open(work / "mixed.safetensors").nbytes],
    "scores": {"model": score(model), "int8": score(again), "mixed": score(through(mixed)), "stepwise": score(stepwise), "at once": score(at_once), "slim": score(loaded)},
    "half scale": float((off / scale).max()),
    "reports": {name: [bool(report), len(report.quantized)] for name, report in made.items()},
    "variants": {v.name: [v.disk_nbytes, v.accuracy, v.problem] for v in truth.variants},
    "same": torch.equal(loaded(data.test_images), slim.model(data.test_images)),
    "right": [check_1(wb.ops.quantize(ckpt, "int4", group_size=32).nbytes / ckpt.nbytes), check_2(max((r for r in bears.rows if r.scheme.name == "int4"), key=lambda r: r.error).name), check_3(0.5)],
    "not_yet": [check_1(0.125), check_1(0.25), check_1("a sixth"), check_2("features.0.bias"), check_2(min((r for r in bears.rows if r.scheme.name == "int4"), key=lambda r: r.error).name),
                check_2(3), check_3(2 / 3), check_3(0.9), check_3("half")],
"""


@pytest.fixture(scope="module")
def book(run_notebook: Any) -> Any:
    return run_notebook("08_quantize_and_prune.ipynb", _FACTS)


def test_nothing_fails_and_nothing_is_said_on_stderr(book: Any) -> None:
    assert book.complaints() == []


def test_zeros_take_room_and_integers_do_not(book: Any) -> None:
    sizes = book.facts["sizes"]
    assert sizes["masked.pt"] > 1.5 * sizes["digits.pt"]
    assert sizes["pruned.pt"] == pytest.approx(sizes["digits.pt"], rel=0.01)
    assert sizes["dynamic.pt"] < 0.5 * sizes["digits.pt"]
    assert sizes["slim.safetensors"] < 0.4 * sizes["digits.pt"]


def test_what_was_predicted_is_what_was_written(book: Any) -> None:
    file, planned, found = book.facts["predicted"]
    assert file == book.facts["sizes"]["int8.safetensors"]
    assert planned == found
    assert book.facts["half scale"] <= 0.5001


def test_accuracies_are_kept_or_lost_as_the_text_says(book: Any) -> None:
    scores = book.facts["scores"]
    assert scores["model"] > 0.97
    for name in ("int8", "mixed", "stepwise", "slim"):
        assert scores[name] > scores["model"] - 0.02
    assert scores["at once"] < scores["stepwise"] - 0.02
    assert book.facts["same"]


def test_every_engine_quantized_something_and_ran(book: Any) -> None:
    assert all(ok and count for ok, count in book.facts["reports"].values())
    fp32, *others = book.facts["variants"].values()
    assert all(problem == "" for _, _, problem in (fp32, *others))
    assert all(size < 0.5 * fp32[0] for size, _, _ in others)


def test_the_exercises_know_right_from_wrong_and_give_a_hint(book: Any) -> None:
    assert all("right." in said for said in book.facts["right"])
    assert all("not yet" in said for said in book.facts["not_yet"])
