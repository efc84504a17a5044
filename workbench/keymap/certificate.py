"""LoadCertificate: what a model holds after loading, tensor by tensor, and whether that is what the file holds."""

from __future__ import annotations

from dataclasses import dataclass

from workbench.errors import visible
from workbench.keymap.rules import KeyMap
from workbench.report import Report
from workbench.tables import Column, Table, format_bytes, table


@dataclass(frozen=True)
class LoadedTensor:
    """One tensor of the model after loading.

    Attributes:
        source: its name in the file, or None where the file gave nothing.
        state: "loaded" (proven equal to the file's bytes, after the cast), "wrong", "set by the module" or "initial".
    """

    name: str
    source: str | None
    state: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    note: str = ""


@dataclass(frozen=True, repr=False)
class LoadCertificate(Report):
    """What the model holds after loading, tensor by tensor. True when every value that was to be loaded is proven equal.

    Attributes:
        strict: whether nothing was allowed to be missing or left over.
        unused: names of the file that filled nothing, each with what the module said of it.
        verdict: what the module's own load_state_dict said.
    """

    rows: tuple[LoadedTensor, ...]
    unused: tuple[tuple[str, str], ...]
    strict: bool
    keymap: KeyMap
    verdict: str
    mode: str

    @property
    def ok(self) -> bool:
        return all(row.state != "wrong" for row in self.rows) and any(row.state in ("loaded", "set by the module") for row in self.rows)

    @property
    def coverage(self) -> float:
        """Fraction of the model's bytes that hold the file's values."""
        total = sum(row.nbytes for row in self.rows)
        return sum(row.nbytes for row in self.rows if row.state == "loaded") / total if total else 0.0

    @property
    def headline(self) -> str:
        by_state = {state: [r for r in self.rows if r.state == state] for state in ("loaded", "wrong", "set by the module", "initial")}
        loaded = len(by_state["loaded"])
        text = (
            f"All {loaded} tensors hold the file's values"
            if loaded == len(self.rows)
            else f"{loaded} of {len(self.rows)} tensors hold the file's values"
        )
        if by_state["wrong"]:
            text += f"; {len(by_state['wrong'])} differ from the file, first {visible(by_state['wrong'][0].name)}"
        if by_state["set by the module"]:
            text += f"; {len(by_state['set by the module'])} were set by the module's own loading code"
        if by_state["initial"]:
            text += f"; {len(by_state['initial'])} stayed at initialisation"
        return text + (f"; {len(self.unused)} names of the file are unused" if self.unused else "")

    def tables(self) -> tuple[Table, ...]:
        marks = {"loaded": "✓", "wrong": "⚠", "set by the module": "~", "initial": "−"}
        columns = (
            Column("", "mark"),
            Column("model's name", "name"),
            Column("file's name", "name"),
            Column("state"),
            Column("shape", "shape"),
            Column("dtype"),
            Column("bytes", "bytes"),
            Column("note"),
        )
        rows = [
            (marks[r.state], r.name, r.source, r.state, r.shape, r.dtype, r.nbytes, r.note or None)
            for r in sorted(self.rows, key=lambda r: r.state == "loaded")
        ]
        total = sum(r.nbytes for r in self.rows)
        facts = [
            ("coverage", f"{100 * self.coverage:.4g} % of {format_bytes(total)}"),
            ("the module's verdict", self.verdict),
            ("mode", self.mode),
        ]
        facts += (
            [("section of the file", f"{self.keymap.section or '(root)'}: {self.keymap.section_reason}")]
            if self.keymap.section_reason
            else []
        )
        tables = [table("certificate", (Column("what"), Column("value")), facts), table("tensors", columns, rows)]
        if self.unused:
            tables.append(table("unused in the file", (Column("file's name", "name"), Column("why")), self.unused))
        return tuple(tables)
