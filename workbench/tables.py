"""Tables: the one shape in which anything is shown.

A report declares tables; text, HTML, Markdown and the widgets all derive from them, so none can tell another story.
Cells are raw values (bytes as int, ratios as float); `format_cell` turns one into words by its column's kind.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from workbench.errors import visible

Kind = Literal["name", "text", "mark", "shape", "count", "bytes", "number", "percent", "ratio", "seconds", "code"]

_RIGHT_ALIGNED = frozenset({"count", "bytes", "number", "percent", "ratio", "seconds"})
DASH = "–"  # stands for "not measured"; never a zero


@dataclass(frozen=True)
class Column:
    """One column: its heading, the kind of value it holds, and what the heading means when hovered."""

    title: str
    kind: Kind = "text"
    note: str = ""

    @property
    def right_aligned(self) -> bool:
        return self.kind in _RIGHT_ALIGNED


@dataclass(frozen=True)
class Table:
    """Rows of raw values under typed columns. `empty` is the sentence shown when there are no rows."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Any, ...], ...]
    empty: str = "nothing to show"

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.columns) for row in self.rows), f"ragged rows in {self.title!r}"


def table(title: str, columns: Sequence[Column], rows: Iterable[Sequence[Any]], *, empty: str = "nothing to show") -> Table:
    return Table(title, tuple(columns), tuple(tuple(row) for row in rows), empty)


def format_bytes(nbytes: float) -> str:
    """Powers of ten, as file managers do: 44.7 MB."""
    if abs(nbytes) < 1000:
        return f"{int(nbytes)} B"
    for unit in ("kB", "MB", "GB", "TB"):
        nbytes /= 1000
        if abs(nbytes) < 999.5 or unit == "TB":
            break
    return f"{nbytes:.3g} {unit}" if abs(nbytes) < 999.5 else f"{nbytes:.0f} {unit}"


def format_number(value: float) -> str:
    """Four significant digits, without false precision; integers whole."""
    if isinstance(value, int):
        return f"{value:,}"
    if math.isnan(value) or math.isinf(value):
        return str(value)
    return f"{value:.4g}"


def format_seconds(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.3g} µs"
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def format_cell(kind: Kind, value: Any) -> str:
    """One cell in words. Text from files is made visible, never raw."""
    if value is None:
        return DASH
    if kind == "shape":
        return "[" + ", ".join(str(n) for n in value) + "]"
    if kind == "bytes":
        return format_bytes(value)
    if kind == "seconds":
        return format_seconds(value)
    if kind == "percent":
        return f"{100 * value:.3g} %"
    if kind == "ratio":
        return f"{value:.3g} ×"
    if kind in ("count", "number") and isinstance(value, (int, float)):
        return format_number(value)
    return visible(value)


def shorten(name: str, width: int) -> str:
    """A long name cut in the middle, never at the end where names differ."""
    if len(name) <= width:
        return name
    head = (width - 1) // 3
    return name[:head] + "…" + name[len(name) - (width - 1 - head) :]
