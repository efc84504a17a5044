"""Live views for notebooks. Everything they show comes from the core; delete this package and every step has its line of Python.

    from workbench.widgets import Explorer, Differ, KeyMapper, Compressor, Exporter, NetronView
    Explorer(ckpt)                        # the same view that ckpt shows at the end of a cell
    Differ(wb.diff(a, b))
    KeyMapper(ckpt, model)                # settle what wb.match leaves open; KeyMapper(…).keymap reads it back
    Compressor(ckpt)                      # how small it shall be, what that costs each tensor; Compressor(…).plan reads it back
    Exporter(model, x)                    # every file asked for, proved; Exporter(…).exported is the report
    NetronView("model.onnx")              # the graph, in the page: offline, without its weights

This is the only room that imports anywidget, traitlets and IPython.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from workbench.widgets.differ import Differ
from workbench.widgets.explorer import Explorer
from workbench.widgets.mapper import KeyMapper
from workbench.widgets.netron import NetronView

if TYPE_CHECKING:
    from workbench.widgets.compressor import Compressor
    from workbench.widgets.exporter import Exporter

__all__ = ["Compressor", "Differ", "Explorer", "Exporter", "KeyMapper", "NetronView", "register"]

_VIEWS = {("workbench.checkpoint", "Checkpoint"): Explorer, ("workbench.differ", "DiffReport"): Differ}


_LATER = {"Compressor": "compressor", "Exporter": "exporter"}


def __getattr__(name: str) -> Any:
    """Some views come when they are asked for: they need torch, and looking through a file does not."""
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"workbench.widgets.{_LATER[name]}"), name)


def __dir__() -> list[str]:
    """What `help` and completion list: those too, before they are asked for."""
    return [*globals(), *_LATER]


def register() -> bool:
    """Show checkpoints and differences as live views from now on, in this notebook; True where that is so.

    In a terminal, in a script and in IPython without a kernel nothing changes and the text is shown. Calling it again is harmless.
    """
    from IPython.core.getipython import get_ipython

    shell: Any = get_ipython()
    if shell is None or getattr(shell, "kernel", None) is None:
        return False
    formatter: Any = shell.display_formatter.mimebundle_formatter
    for (module, name), view in _VIEWS.items():
        formatter.for_type_by_name(module, name, _shower(view))
    return True


def _shower(view: Any) -> Any:
    """A formatter that builds the view when its subject is shown; the plain text stays the subject's own."""

    def show(subject: Any, include: Any = None, exclude: Any = None) -> Any:
        data, metadata = view(subject)._repr_mimebundle_(include=include, exclude=exclude)
        return {**data, "text/plain": str(subject)}, metadata

    return show
