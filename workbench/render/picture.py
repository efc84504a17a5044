"""A figure that shows itself at the end of a notebook cell, without pyplot and its global state."""

from __future__ import annotations

from matplotlib.figure import Figure


class Picture(Figure):
    """A matplotlib Figure with a PNG of its own, and where the page has a theme, as HTML that follows it."""

    def _repr_html_(self) -> str:
        from workbench.render.html import render_figure

        return render_figure(self)

    def _repr_png_(self) -> bytes:
        from workbench.render.plots import to_png

        return to_png(self)
