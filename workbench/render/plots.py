"""Figures, in one small style: the title says the finding, axes carry units, labels stand beside what they name.

Colours are Okabe and Ito's, chosen so that they differ in lightness too. Figures are plain `Figure` objects, safe in worker
threads; names are never parsed as mathematics. Every input is numbers that were computed elsewhere.
"""

from __future__ import annotations

import base64
import io
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from workbench.errors import SelectionError, visible
from workbench.names import natural_key
from workbench.tables import DASH, format_bytes, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREY, _INK, _FAINT = "#0072B2", "#E69F00", "#6B6B6B", "#222222", "#DDDDDD"
_MAX_POINTS = 20_000
_WIDTH = 6.0  # inches: beside a notebook's file list at 800 pixels the letters are still readable


def histogram(edges: Sequence[float], counts: Sequence[int], title: str, *, width: float = 6.0) -> Figure:
    """Counts per bin, `width` inches wide; the count axis turns logarithmic where counts span more than three decades."""
    figure, (axes,) = _figure(1, (width, max(1.7, 0.43 * width)))
    positive = [count for count in counts if count > 0]
    if len(positive) == 1 and edges[-1] - edges[0] <= 1e-5 * max(abs(edges[0]), 1e-6):
        _note(axes, "all values are equal")
    elif positive and len(edges) == len(counts) + 1:
        axes.stairs(counts, edges, fill=True, color=BLUE, baseline=0)
        if max(positive) > 1000 * min(positive):
            axes.set_yscale("log")
            axes.set_ylim(bottom=0.5)
        axes.locator_params(axis="x", nbins=max(3, int(width)))
    else:
        _note(axes, "no finite values")
    axes.set_title(shorten(visible(title), min(90, int(14 * width))), parse_math=False, fontsize=10, color=_INK, loc="left")
    _labelled(axes, "value", "elements")
    return figure


def parity_scatter(reference: Sequence[float], candidate: Sequence[float], title: str) -> Figure:
    """Candidate against reference, and how their differences are spread."""
    figure, (left, right) = _figure(2, (_WIDTH, 3.2))
    step = max(1, len(reference) // _MAX_POINTS)
    x, y = [float(v) for v in reference[::step]], [float(v) for v in candidate[::step]]
    pairs = [(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(a) and math.isfinite(b)]
    if not pairs:
        for axes in (left, right):
            _note(axes, "no finite values")
    else:
        low, high = min(map(min, pairs)), max(map(max, pairs))
        left.plot([low, high], [low, high], color=GREY, linewidth=1, zorder=1)
        left.scatter([a for a, _ in pairs], [b for _, b in pairs], s=8, color=BLUE, alpha=0.6, linewidths=0, zorder=2)
        left.annotate("on the line: equal", (0.98, 0.04), xycoords="axes fraction", ha="right", color=GREY, fontsize=9)
        errors = [b - a for a, b in pairs]
        right.hist(errors, bins=min(60, max(10, len(errors) // 20)), color=ORANGE)
        right.locator_params(axis="x", nbins=5)
        right.margins(y=0.2)
        right.axvline(0, color=GREY, linewidth=1)
        worst = max(errors, key=abs)
        right.annotate(f"largest {worst:+.2g}", (0.98, 0.95), xycoords="axes fraction", ha="right", va="top", fontsize=9, color=_INK)
    _labelled(left, "reference output", "candidate output")
    _labelled(right, "candidate − reference", "elements")
    _headed(figure, title)
    return figure


def side_by_side(names: Sequence[str], measures: Mapping[str, tuple[Sequence[float | None], Callable[[float], str]]], title: str) -> Figure:
    """One row of bars per name and one panel per measure.

    Args:
        measures: {what stands below the panel: (one value per name, its words)}; None is drawn as a dash.
    """
    if not names:
        raise SelectionError("there is nothing to draw", hint="measure at least one")
    lines = -(-len(measures) // 3)
    figure, panels = _figure(len(measures), (_WIDTH, 0.5 + lines * (0.6 + 0.3 * len(names))), lines)
    for number, (panel, (label, (values, words))) in enumerate(zip(panels, measures.items(), strict=True)):
        _bars(panel, values, words, shorten(visible(label), 32))
        told = [] if number % -(-len(measures) // lines) else [shorten(visible(name), 24) for name in names]
        panel.set_yticks(range(len(told)), told, parse_math=False)
    _headed(figure, title)
    return figure


def layer_errors(rows: Sequence[tuple[str, float | None, float, bool]], title: str) -> Figure:
    """Error and limit per layer, from (name, largest difference, limit, within it), from top to bottom; at most some 50 are named.

    A layer without a difference stands at the left edge, one whose difference has no number (NaN or infinity on one side) at the right.
    """
    drawn = [value for _, error, limit, _ in rows for value in (error, limit) if value and math.isfinite(value)]
    low, high = (min(drawn) / 3, max(drawn) * 3) if drawn else (0.1, 1.0)
    figure, (axes,) = _figure(1, (_WIDTH, min(10.0, 1.3 + 0.2 * len(rows))))
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0e}")
    axes.xaxis.set_minor_formatter(lambda value, _: "")
    for i, (_, error, limit, within) in enumerate(rows):
        place = high if error is None else max(error, low)
        axes.plot([low, place], [i, i], color=_FAINT if within else ORANGE, linewidth=1, zorder=1)
        axes.plot(
            place, i, "o" if within else "X", color=BLUE if within else ORANGE, markersize=5 if within else 8, clip_on=False, zorder=3
        )
        axes.plot(max(limit, low), i, "|", color=_INK, markersize=9, zorder=2)
    step = max(1, len(rows) // 50)
    past = next((i for i, row in enumerate(rows) if not row[3]), None)
    named = sorted({*range(0, len(rows), step)} | ({past} if past is not None else set()))
    axes.set_yticks(named, [shorten(visible(rows[i][0]), 32) for i in named], parse_math=False)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    _labelled(axes, "largest difference  (|: what rounding explains,  X: past it)", "")
    _headed(figure, title)
    return figure


def diff_heat(rows: Sequence[Any], title: str) -> Figure:
    """Relative change by layer and kind of tensor, from rows with a `name` and a `relative`; a dash where there is none."""
    layers, kinds, grid = roll_up(rows)
    return heat_map(layers, kinds, grid, "relative change", title)


def heat_map(lines: Sequence[str], columns: Sequence[str], grid: list[list[float]], quantity: str, title: str) -> Figure:
    """A number for each line and column, by colour and where there is room in figures; NaN is a dash."""
    figure, (axes,) = _figure(1, (max(4.6, 1.6 + 0.9 * len(columns)), 1.1 + 0.24 * max(len(lines), 2)))
    if not lines:
        _note(axes, "no tensor was measured")
    else:
        known = [value for row in grid for value in row if math.isfinite(value)]
        low, top = min([0.0, *known]), max(known, default=0.0) or 1.0
        image = axes.imshow(grid, aspect="auto", cmap="viridis", vmin=low, vmax=top)
        axes.set_yticks(range(len(lines)), [shorten(visible(line), 32) for line in lines], parse_math=False)
        axes.set_xticks(range(len(columns)), [textwrap.fill(shorten(visible(column), 28), 14) for column in columns], parse_math=False)
        if len(lines) * len(columns) <= 200:
            _write_cells(axes, grid, top)
        bar = figure.colorbar(image, ax=axes, fraction=0.05)
        bar.set_label(quantity, fontsize=9, color=_INK, parse_math=False)
        bar.ax.tick_params(labelsize=9)
    axes.set_title(_wrapped(title, int(11 * figure.get_figwidth())), parse_math=False, fontsize=10, color=_INK, loc="left")
    axes.grid(False)
    return figure


def by_size(
    points: Sequence[tuple[int, float]],
    marks: Sequence[tuple[str, int, float]],
    quantity: str,
    title: str,
    across: str,
    *,
    log: bool = True,
) -> Figure:
    """A quantity by bytes: a line through `points`, and `marks` (name, bytes, quantity); where `log`, what is not above zero is left out."""
    figure, (axes,) = _figure(1, (_WIDTH, 3.4))
    drawn = [(size, value) for size, value in points if value > 0 or not log]
    axes.set_yscale("log" if log else "linear")
    axes.plot([size for size, _ in drawn], [value for _, value in drawn], "o-", color=BLUE, markersize=3, linewidth=1.4)
    for i, (name, size, value) in enumerate(marks):
        if value > 0 or not log:
            axes.plot(size, value, "X", color=ORANGE, markersize=8)
            text = shorten(visible(name), 24)
            axes.annotate(
                text, (size, value), xytext=(7, -12 if i % 2 else 5), textcoords="offset points", fontsize=9, color=_INK, parse_math=False
            )
    axes.margins(x=0.12, y=0.15)
    axes.locator_params(axis="x", nbins=6)
    axes.xaxis.set_major_formatter(lambda value, _: format_bytes(value))
    _labelled(axes, across, quantity)
    _headed(figure, title)
    return figure


def roll_up(rows: Sequence[Any]) -> tuple[list[str], list[str], list[list[float]]]:
    """The largest relative change by layer (the name up to its last number) and by kind (the rest of the name).

    Where something changed, layers and kinds in which nothing did are left out.
    At most 40 layers and 8 kinds, those that changed most; their order is that of names. A cell without a value is NaN.
    """
    cells: dict[tuple[str, str], float] = {}
    for row in rows:
        if row.relative is not None and math.isfinite(row.relative):
            key = _layer_and_kind(row.name)
            cells[key] = max(cells.get(key, 0.0), row.relative)
    some = any(cells.values())
    largest_first = sorted(((value, key) for key, value in cells.items() if value or not some), reverse=True)
    layers, kinds = _first([key[0] for _, key in largest_first], 40), _first([key[1] for _, key in largest_first], 8)
    return layers, kinds, [[cells.get((layer, kind), math.nan) for kind in kinds] for layer in layers]


def _layer_and_kind(name: str) -> tuple[str, str]:
    parts = name.split(".")
    last = max((i for i, part in enumerate(parts) if part.isdecimal()), default=-1)
    if last < 0:
        return ".".join(parts[:-1]) or name, parts[-1]
    return ".".join(parts[: last + 1]), ".".join(parts[last + 1 :]) or "value"


def _first(labels: list[str], count: int) -> list[str]:
    return sorted(list(dict.fromkeys(labels))[:count], key=natural_key)


def to_png(figure: Figure, *, dpi: int = 110) -> bytes:
    """The figure as PNG bytes, the same bytes for the same numbers."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=dpi, metadata={"Software": None})
    return out.getvalue()


def data_uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def title_of(figure: Figure) -> str:
    """What a figure says of itself, for those who do not see it."""
    titles = [figure.get_suptitle(), *(axes.get_title(loc=place) for axes in figure.axes for place in ("left", "center"))]
    return " · ".join(" ".join(title.split()) for title in titles if title)


def _figure(panels: int, size: tuple[float, float], lines: int = 1) -> tuple[Figure, list[Axes]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    from workbench.render.picture import Picture

    figure = Picture(figsize=size, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(lines, -(-panels // lines), i + 1) for i in range(panels)]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(GREY)
        ax.tick_params(labelsize=9, colors=_INK)
        ax.grid(axis="y", color=_FAINT, linewidth=0.6)
        ax.set_axisbelow(True)
    return figure, axes


def _labelled(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x, fontsize=9, color=_INK, parse_math=False)
    axes.set_ylabel(y, fontsize=9, color=_INK, parse_math=False)


def _headed(figure: Figure, title: str) -> None:
    """A title over all panels, wrapped at the width of the figure."""
    figure.suptitle(_wrapped(title, int(13 * figure.get_figwidth())), parse_math=False, fontsize=10, color=_INK, x=0.01, ha="left")


def _wrapped(title: str, width: int) -> str:
    """A title on at most two lines, cut in the middle where two do not hold it."""
    return "\n".join(textwrap.wrap(shorten(visible(title), 2 * width - 8), width)) or " "


def _note(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=GREY, fontsize=9)


def _bars(axes: Axes, values: Sequence[float | None], words: Callable[[float], str], label: str) -> None:
    """A bar for each value, its words beside it; a dash where there is none."""
    longest = max((value or 0.0 for value in values), default=0.0) or 1.0
    for i, value in enumerate(values):
        axes.barh(i, value or 0.0, color=BLUE, height=0.6)
        axes.text((value or 0.0) + 0.02 * longest, i, DASH if value is None else words(value), va="center", fontsize=9, color=_INK)
    axes.set_ylim(len(values) - 0.4, -0.6)
    axes.set_xlim(0, 1.3 * longest)
    axes.locator_params(axis="x", nbins=3)
    axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= longest])  # none past the longest bar: no share is over 100 %
    axes.xaxis.set_major_formatter(lambda value, _: words(value) if value else "0")
    axes.grid(False)
    _labelled(axes, label, "")


def _write_cells(axes: Axes, grid: list[list[float]], top: float) -> None:
    for i, row in enumerate(grid):
        for j, value in enumerate(row):
            text = f"{value:.2g}" if math.isfinite(value) else "∞" if value == math.inf else DASH
            dark = math.isfinite(value) and value < 0.6 * top
            axes.text(j, i, text, ha="center", va="center", fontsize=7, color="white" if dark else _INK)


def flowchart(steps: Sequence[tuple[str, str]], answers: Sequence[bool], result: str, title: str) -> Figure:
    """Questions from top to bottom with what a yes alone leads to; the answers given and their common result are drawn in colour.

    Args:
        steps: (question, where a yes leads). answers: one for each step. result: where all the answers together lead.
    """
    figure, (axes,) = _figure(1, (_WIDTH, 0.62 * len(steps) + 1.2))
    axes.set_axis_off()
    for n, ((question, leads), yes) in enumerate(zip(steps, answers, strict=True)):
        _box(axes, 0, -n, question, BLUE, strong=True)
        _box(axes, 6.7, -n, leads, ORANGE if yes else _FAINT, strong=yes)
        _arrow(axes, (3.1, -n), (4.9, -n), "yes", yes)
        _arrow(axes, (0, -n - 0.3), (0, -n - 0.7), "" if yes else "no", True)
    _box(axes, 0, -len(steps), result, ORANGE, strong=True)
    axes.set_xlim(-3.1, 8.5)
    axes.set_ylim(-len(steps) - 0.5, 0.5)
    _headed(figure, title)
    return figure


def _box(axes: Axes, x: float, y: float, text: str, colour: str, *, strong: bool) -> None:
    style = {"boxstyle": "round,pad=0.35", "facecolor": "white", "edgecolor": colour, "linewidth": 1.4 if strong else 0.8}
    axes.text(x, y, text, ha="center", va="center", fontsize=9, color=_INK if strong else GREY, bbox=style, parse_math=False)


def _arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], label: str, strong: bool) -> None:
    colour = _INK if strong else _FAINT
    axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": colour, "linewidth": 1.2 if strong else 0.8})
    middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2)
    axes.annotate(
        label, middle, xytext=(0, 5) if start[1] == end[1] else (8, -2), textcoords="offset points", fontsize=7, color=GREY, ha="center"
    )
