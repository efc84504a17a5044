"""Notebook 06 runs from top to bottom: its silent failure is one, its repairs are proved, and its accuracies say what its prose says."""

from __future__ import annotations

from statistics import mean
from typing import Any

import pytest

_FACTS = """
    "results": results,
    "curves": curves,
    "moved": moved,
    "probes": probes,
    "theirs": their_accuracy,
    "certificate": [bool(certificate), certificate.coverage, certificate.named("initial")],
    "rules": [[pair.rule, pair.confidence] for pair in keymap.pairs],
    "losses": losses,
    "same": same,
    "deltas": {name: sorted(wb.open(work / f"{name}.safetensors")) for name in ("head", "drifted")},
    "put_back": [100 * samples.accuracy(m, few(0)) for m in (back, again)],
    "soup": 100 * samples.accuracy(soup, few(0)),
    "positions": [samples.accuracy(model, larger) for model in (skipped, resized)],
    "channels": float(difference),
    "adapted": [samples.accuracy(model, task) for model in (adapted, tuned, started)],
"""


@pytest.fixture(scope="module")
def book(run_notebook: Any) -> Any:
    return run_notebook("06_transfer_learning.ipynb", _FACTS)


def test_nothing_fails_and_nothing_is_said_on_stderr(book: Any) -> None:
    assert book.complaints() == []


def test_the_load_that_loads_nothing_is_from_scratch_to_the_last_digit(book: Any) -> None:
    results = book.facts["results"]
    assert len(results["from scratch"]) == 5
    assert results["strict=False"] == results["from scratch"]


def test_the_certificate_says_that_the_head_alone_stayed_at_initialisation(book: Any) -> None:
    ok, coverage, initial = book.facts["certificate"]
    assert ok
    assert 0.95 < coverage < 1
    assert initial == ["head.weight", "head.bias"]


@pytest.mark.parametrize("recipe", ["all layers", "head only", "in stages", "falling rates"])
def test_the_trunk_is_worth_more_than_chance_where_labels_are_few(book: Any, recipe: str) -> None:
    assert book.facts["theirs"] > 0.9
    scratch, found = book.facts["results"]["from scratch"], book.facts["results"][recipe]
    gains = [a - b for a, b in zip(found, scratch, strict=True)]
    assert mean(gains) > 2
    assert sum(gain > 0 for gain in gains) >= 4


def test_two_labels_with_the_trunk_come_near_to_five_without(book: Any) -> None:
    scratch, tuned = ([mean(found) for found in book.facts["curves"][recipe]] for recipe in ("from scratch", "all layers"))
    assert all(b > a for a, b in zip(scratch, tuned, strict=True))
    assert tuned[1] - scratch[1] > abs(scratch[2] - tuned[1])


def test_a_head_saved_alone_is_the_measured_model_only_where_batchnorm_was_held(book: Any) -> None:
    results, moved, theirs = book.facts["results"], book.facts["moved"], 100 * book.facts["theirs"]
    alone, old = zip(*moved["head only"], strict=True)
    assert mean(results["head only"]) - mean(alone) > 10
    assert theirs - mean(old) > 2
    alone, old = zip(*moved["head only, held"], strict=True)
    assert list(alone) == pytest.approx(results["head only, held"])
    assert list(old) == pytest.approx([theirs] * 5)


def test_the_pixels_are_a_baseline_and_the_middle_serves_better_than_the_end(book: Any) -> None:
    probes = {name: mean(found) for name, found in book.facts["probes"].items()}
    assert max(probes, key=probes.__getitem__) in ("blocks.0", "blocks.1", "blocks.2")
    assert probes["the pixels"] > probes["pool"]


def test_the_head_under_another_name_is_likely_and_never_certain(book: Any) -> None:
    rules = book.facts["rules"]
    assert len(rules) == 26
    assert [confidence for _, confidence in rules].count("likely") == 2


def test_the_carried_optimizer_goes_on_bit_for_bit(book: Any) -> None:
    losses = book.facts["losses"]
    assert losses["resumed"] == losses["their run"]
    assert losses["new optimizer"] != losses["their run"]
    assert book.facts["same"] is True


def test_a_delta_holds_what_moved_and_gives_the_measured_model_back(book: Any) -> None:
    deltas, results = book.facts["deltas"], book.facts["results"]
    assert deltas["head"] == ["head.bias", "head.weight"]
    assert sum("running" in name for name in deltas["drifted"]) == 8
    assert book.facts["put_back"] == pytest.approx([results["head only, held"][0], results["head only"][0]])


def test_the_average_of_five_is_better_than_one_of_them(book: Any) -> None:
    assert book.facts["soup"] > mean(book.facts["results"]["all layers"])


def test_other_shapes_keep_what_was_learned(book: Any) -> None:
    drawn, interpolated = book.facts["positions"]
    assert interpolated > drawn + 0.2
    assert book.facts["channels"] < 1e-4
    adapted, tuned, started = book.facts["adapted"]
    assert started < adapted
    assert adapted > tuned - 0.15


def test_the_key_mapper_is_shown_once_and_keeps_a_static_form(book: Any) -> None:
    (output,) = book.outputs("mapper = KeyMapper(")
    assert {"application/vnd.jupyter.widget-view+json", "text/html"} <= set(output.data)


def test_the_figure_is_drawn(book: Any) -> None:
    (output,) = book.outputs("plt.show()")
    assert "image/png" in output.data


def test_it_fits_on_a_small_machine(book: Any) -> None:
    assert book.peak_mb < 800
