from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from render_samples import HOSTILE

from workbench.errors import SelectionError, visible
from workbench.render import plots


def changed(**relative: float | None) -> list[Any]:
    return [SimpleNamespace(name=name.replace("__", "."), relative=value) for name, value in relative.items()]


PNG = b"\x89PNG\r\n"


@pytest.mark.parametrize("name", [*HOSTILE, "$$", r"w^$\frac$", "$"])
def test_any_name_can_be_drawn(name: str) -> None:
    figures = [
        plots.histogram([0.0, 1.0, 2.0], [3, 4], name),
        plots.parity_scatter([0.0, 1.0], [0.0, 1.1], name),
        plots.size_accuracy([plots.Variant(name, 10**6, 0.9, 0.01), plots.Variant("b", 10**6, 0.9)], name),
        plots.diff_heat([SimpleNamespace(name=f"layers.0.{name}", relative=0.5)], name),
    ]
    for figure in figures:
        assert plots.to_png(figure).startswith(PNG)


def test_the_title_is_the_name_as_it_is() -> None:
    figure = plots.histogram([0.0, 1.0], [1], "a$b_{$c\x1b")
    assert figure.axes[0].get_title(loc="left") == visible("a$b_{$c\x1b")


@pytest.mark.parametrize("counts", [[], [0, 0], [1, 10**9]])
def test_odd_histograms(counts: list[int]) -> None:
    edges = [float(i) for i in range(len(counts) + 1)]
    figure = plots.histogram(edges, counts, "t")
    assert plots.to_png(figure).startswith(PNG)
    assert (figure.axes[0].get_yscale() == "log") == (counts == [1, 10**9])


def test_equal_values_are_told_and_not_drawn() -> None:
    figure = plots.histogram([0.999999, 1.0, 1.000001], [0, 6], "t")
    assert figure.axes[0].texts[0].get_text() == "all values are equal"


def test_values_that_are_not_finite_are_left_out() -> None:
    figure = plots.parity_scatter([float("nan"), 1.0, 2.0], [1.0, float("inf"), 2.5], "t")
    assert len(figure.axes[0].collections[0].get_offsets()) == 1


def test_labels_of_variants_do_not_overlap() -> None:
    variants = [plots.Variant(f"variant {i}", 22_000_000 + i * 100_000, 0.99 - i * 0.0004, 0.01) for i in range(4)]
    variants += [plots.Variant("float32", 44_000_000, 0.991, 0.02), plots.Variant("int8", 11_000_000, 0.98, 0.01)]
    figure = plots.size_accuracy(variants, "t")
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    boxes = [label.get_window_extent(renderer) for label in figure.axes[0].texts]
    assert len(boxes) == len(variants)
    assert not [(i, j) for i, a in enumerate(boxes) for j, b in enumerate(boxes) if i < j and a.overlaps(b)]


def test_no_variant_is_refused() -> None:
    with pytest.raises(SelectionError, match="no variant"):
        plots.size_accuracy([], "t")


def test_missing_cells_are_dashes_and_an_empty_map_says_so() -> None:
    figure = plots.diff_heat(changed(l__0__w=0.5, l__1__b=0.1, l__1__w=0.2, l__2__w=None, l__10__w=float("inf")), "t")
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["l.0", "l.1"]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["b", "w"]
    assert [text.get_text() for text in figure.axes[0].texts] == ["–", "0.5", "0.1", "0.2"]
    assert plots.diff_heat([], "t").axes[0].texts[0].get_text() == "no tensor was measured"


def test_the_same_numbers_give_the_same_bytes() -> None:
    assert plots.to_png(plots.histogram([0.0, 1.0], [1], "t")) == plots.to_png(plots.histogram([0.0, 1.0], [1], "t"))


@pytest.mark.parametrize("length", [20, 120, 170, 400])
def test_a_long_title_stays_inside_the_figure(length: int) -> None:
    figure = plots.parity_scatter([0.0, 1.0], [0.0, 1.1], ("the largest difference is 3.4e-03 " * 20)[:length])
    title = figure.texts[0]
    box = title.get_window_extent(figure.canvas.get_renderer())  # type: ignore[attr-defined]
    assert box.x1 <= figure.bbox.x1
    assert title.get_text().count("\n") == (length > 93)
