from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from render_samples import HOSTILE

from workbench.errors import SelectionError, visible
from workbench.render import plots
from workbench.tables import format_bytes


def changed(**relative: float | None) -> list[Any]:
    return [SimpleNamespace(name=name.replace("__", "."), relative=value) for name, value in relative.items()]


PNG = b"\x89PNG\r\n"


@pytest.mark.parametrize("name", [*HOSTILE, "$$", r"w^$\frac$", "$"])
def test_any_name_can_be_drawn(name: str) -> None:
    figures = [
        plots.histogram([0.0, 1.0, 2.0], [3, 4], name),
        plots.parity_scatter([0.0, 1.0], [0.0, 1.1], name),
        plots.side_by_side([name, "b"], {name: ([10**6, None], str)}, name),
        plots.layer_errors([(name, 1e-3, 1e-6, False), ("b", 0.0, 0.0, True), ("c", None, 1e-6, False)], name),
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


def test_bars_carry_their_values_and_a_dash_for_what_was_not_measured() -> None:
    measures = {"size": ([None, 22_600], format_bytes), "accuracy": ([0.97, 1.0], "{:.0%}".format)}
    left, right = plots.side_by_side(["torch", "onnx"], measures, "t").axes
    assert [text.get_text() for text in left.texts] == ["–", "22.6 kB"]
    assert [text.get_text() for text in right.texts] == ["97%", "100%"]
    assert [label.get_text() for label in left.get_yticklabels()] == ["torch", "onnx"]
    assert max(right.get_xticks()) <= 1.0
    assert len({bar.get_facecolor() for axes in (left, right) for bar in axes.patches}) == 1  # a colour would mean something


def test_a_figure_is_never_wider_than_its_letters_can_be_read_and_follows_the_theme() -> None:
    figure = plots.side_by_side(["a", "b"], {str(n): ([1.0, 2.0], str) for n in range(5)}, "five measures")
    assert figure.get_figwidth() <= 6.0
    assert [bool(axes.get_yticklabels()) for axes in figure.axes] == [True, False, False, True, False]
    shown = figure._repr_html_()  # type: ignore[attr-defined]
    assert 'body[data-jp-theme-light="false"] .wb-picture' in shown
    assert 'alt="five measures"' in shown


def test_many_layers_are_not_all_named_and_the_first_past_its_limit_is() -> None:
    rows = [(f"layer.{i}", 1e-3 if i > 321 else 1e-9, 1e-6, i <= 321) for i in range(600)]
    (axes,) = plots.layer_errors(rows, "t").axes
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert len(labels) <= 52
    assert "layer.322" in labels


def test_nothing_to_draw_is_refused() -> None:
    with pytest.raises(SelectionError, match="nothing to draw"):
        plots.side_by_side([], {}, "t")


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
    assert title.get_text().count("\n") == (length > 78)
