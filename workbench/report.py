"""Reports: frozen numbers that know how to show themselves.

A subclass is a frozen dataclass that defines `ok`, `headline` and `tables()`; everything shown derives from those.
A negative finding (a difference, a failed parity, an unsafe scan) is a falsy report, never an exception;
`check()` turns it into one on demand.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from workbench.errors import ReportFailedError, SelectionError
from workbench.files import atomic_write
from workbench.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Report:
    """Base of every report.

    Subclasses are frozen dataclasses that define:
        ok: bool, whether the finding is clean.
        headline: one sentence, the finding first.
        tables(): the numbers, as a sequence of Table.
    """

    @property
    def ok(self) -> bool:
        return True

    @property
    def headline(self) -> str:
        raise TypeError(f"{type(self).__name__} defines no headline")

    def tables(self) -> tuple[Table, ...]:
        raise TypeError(f"{type(self).__name__} defines no tables")

    def plot(self) -> Figure:
        """A matplotlib Figure of the finding, for the reports that have one."""
        raise SelectionError(f"{type(self).__name__} has no figure", hint="its tables() hold every number")

    def figures(self) -> tuple[Figure, ...]:
        """Every figure there is; what `save_html` draws."""
        try:
            return (self.plot(),)
        except SelectionError:  # no figure of this kind of report, or nothing to draw in this one
            return ()

    def save_html(self, path: str | os.PathLike[str]) -> Path:
        """Write one page with the headline, every figure and every table: it stands alone, and holds no script and no link.

        Raises:
            WriteError: the folder refuses.
        """
        from workbench.render.html import render_page

        with atomic_write(path) as out:
            out.write(render_page(self).encode(), 0)
        return Path(path)

    def __bool__(self) -> bool:
        return self.ok

    def check(self) -> Self:
        """Return self, or raise ReportFailedError with the headline when the finding is negative."""
        if not self.ok:
            raise ReportFailedError(self.headline)
        return self

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: `kind`, `ok`, `headline`, and every field."""
        own = {f.name: to_plain(getattr(self, f.name)) for f in fields(self) if f.repr}  # type: ignore[arg-type]
        return {"kind": type(self).__name__, "ok": self.ok, "headline": self.headline, **own}

    def __str__(self) -> str:
        from workbench.render.text import render_report

        return render_report(self)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        from workbench.render.html import render_report

        return render_report(self)

    def to_markdown(self) -> str:
        from workbench.render.text import render_markdown

        return render_markdown(self)


def to_plain(value: Any) -> Any:
    """A value as JSON can hold it; an object that knows `to_dict` speaks for itself, NaN, infinities and anything else by their text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [to_plain(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in fields(value) if f.repr}
    return value.as_posix() if isinstance(value, Path) else str(value)
