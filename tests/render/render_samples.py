"""Small stand-ins with the attributes that rendering reads; hostile where a file could be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from workbench.report import Report
from workbench.tables import Column, Table, table

XSS = '<img src=x onerror="window.__xss=1">'
HOSTILE = [XSS, "a$b_{$c", "bad\x1b[31mred", "right\u202eleft", "a|b`c`*d*[e](f)", "</details></div><script>1</script>", "line\nbreak", ""]


@dataclass
class Tensor:
    shape: tuple[int, ...]
    dtype: str = "float32"

    @property
    def nbytes(self) -> int:
        return 4 * math.prod(self.shape)


class Sample(dict[str, Any]):
    """A mapping of names to shapes that looks like a checkpoint."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], **values: Any) -> None:
        super().__init__({name: Tensor(shape) for name, shape in shapes.items()})
        self.name = values.get("name", "small.pt")
        self.findings = values.get("findings", ())
        self.extras = values.get("extras", {})
        self.aliases = values.get("aliases", {})
        self._sections = values.get("sections", ())

    def sections(self) -> tuple[Any, ...]:
        return tuple(SimpleNamespace(name=name) for name in self._sections)


def finding(message: str, severity: str = "danger", hint: str | None = None) -> Any:
    return SimpleNamespace(kind="test", severity=severity, message=message, where={}, hint=hint)


def transformer(layers: int = 12) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (100, 8)}
    for i in range(layers):
        for name, shape in {"attn.q.weight": (8, 8), "attn.q.bias": (8,), "norm.weight": (8,)}.items():
            shapes[f"model.layers.{i}.{name}"] = shape
    return shapes


@dataclass(frozen=True, repr=False)
class SampleReport(Report):
    """A report with every kind of cell, an empty table, and text that a stranger chose."""

    name: str = "fc.weight"
    clean: bool = True
    rows: tuple[tuple[Any, ...], ...] = field(default=())

    @property
    def ok(self) -> bool:
        return self.clean

    @property
    def headline(self) -> str:
        return f"{self.name} is as it should be"

    def tables(self) -> tuple[Table, ...]:
        columns = [Column("name", "name"), Column("mark", "mark"), Column("shape", "shape"), Column("bytes", "bytes", "on disk")]
        columns += [Column("error", "number"), Column("kept", "percent"), Column("time", "seconds")]
        own = (self.name, "~", (10, 512), 44_700_000, 1.3e-6, 0.991, 0.0123)
        return (
            table(f"Rows of {self.name}", columns, [own, (self.name, "+", None, None, None, None, None), *self.rows]),
            table("Nothing here", [Column("name", "name")], [], empty=f"no row for {self.name}"),
        )
