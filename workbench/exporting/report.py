"""What an export says: one row per target, made, checked and compared."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from workbench.errors import SelectionError, visible
from workbench.exporting.usage import cpp_program, python_lines
from workbench.report import Report
from workbench.tables import Column, Table, format_bytes, table
from workbench.verification.comparison import ParityReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Exported:
    """One target.

    Attributes:
        target: its name, such as `onnx`; `onnx:encode` for a method's own graph.
        path: the file asked for.
        exporter: which exporter made it (`dynamo`, `classic`, `script`, `trace`, `strict`, `not strict`), or None.
        files: what was written: {file name: bytes}; empty when nothing was.
        sha256: of the file at `path`, or None.
        opset, opset_asked: as read back from the file, and as asked.
        inputs, outputs: the graph's names with shapes; a text dimension is dynamic.
        checked: whether the format's own checker passed; None when it was not asked.
        parity: the comparison with the model, or None when there was none.
        tried: names of the batches compared: `example`, `negated`, `noisy`, `exchanged`, `resized`.
        notes: what was repaired or fell short, in sentences.
        cause, cure: why it failed and what to change, or "".
        error: the exception's own text, or "".
        log: all that the exporter said, on stdout, in logs and in warnings.
        seconds: wall time, checks included.
    """

    target: str
    path: str
    exporter: str | None = None
    files: dict[str, int] = field(default_factory=dict)
    sha256: str | None = None
    opset: int | None = None
    opset_asked: int | None = None
    inputs: dict[str, tuple[int | str, ...]] = field(default_factory=dict)
    outputs: dict[str, tuple[int | str, ...]] = field(default_factory=dict)
    checked: bool | None = None
    parity: ParityReport | None = None
    tried: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    cause: str = ""
    cure: str = ""
    error: str = ""
    log: str = ""
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return not self.cause

    @property
    def usage(self) -> str:
        """Lines of Python that load the file and call it, without the workbench."""
        return python_lines(self) if self.ok else ""

    @property
    def cpp(self) -> str:
        """A C++ program that does so with LibTorch; "" where the target is not TorchScript."""
        return cpp_program(self) if self.ok else ""

    @property
    def nbytes(self) -> int | None:
        """Bytes on disk, external data included; None when nothing was written."""
        return sum(self.files.values()) or None


@dataclass(frozen=True, repr=False)
class ExportReport(Report):
    """What became of each target. `report["onnx"]` is one of them; `bool(report)` says that all were made and proved."""

    model: str
    exports: tuple[Exported, ...]

    def __getitem__(self, target: str) -> Exported:
        for one in self.exports:
            if one.target == target:
                return one
        raise SelectionError(f"no target {target!r} was asked for", hint="asked: " + ", ".join(e.target for e in self.exports))

    @property
    def ok(self) -> bool:
        return all(e.ok for e in self.exports)

    @property
    def path(self) -> str:
        """The first target's file."""
        return self.exports[0].path

    @property
    def headline(self) -> str:
        failed = [e for e in self.exports if not e.ok]
        if failed:
            return f"{visible(self.model)} was not exported to {failed[0].target}: {visible(failed[0].cause)}"
        return " ".join(_sentence(self.model, e) for e in self.exports)

    def tables(self) -> tuple[Table, ...]:
        rows = [_row(e) for e in self.exports]
        tables = [table("targets", _COLUMNS, rows)]
        remarks = [(e.target, text) for e in self.exports for text in (*_failure(e), *e.notes)]
        if remarks:
            tables.append(table("remarks", [Column("target"), Column("what")], remarks))
        for e in self.exports:
            if e.inputs or e.outputs:
                graph = [(way, n, shape) for way, names in (("input", e.inputs), ("output", e.outputs)) for n, shape in names.items()]
                tables.append(table(f"{e.target} graph", [Column(""), Column("name", "name"), Column("shape", "shape")], graph))
            if e.parity is not None:
                tables.extend(e.parity.tables()[:1])
        return tuple(tables)

    def plot(self) -> Figure:
        """The first comparison's scatter."""
        for e in self.exports:
            if e.parity is not None:
                return e.parity.plot()
        raise SelectionError("nothing was compared, so there is nothing to draw", hint="its tables() say why")


_COLUMNS = (
    Column("target"),
    Column("", "mark"),
    Column("file", "name"),
    Column("bytes", "bytes"),
    Column("exporter"),
    Column("opset", "count"),
    Column("checked", "mark"),
    Column("max abs", "number", "largest difference from the model over every batch tried"),
    Column("seconds", "seconds"),
    Column("sha256", "code"),
)


def _row(e: Exported) -> tuple[object, ...]:
    checked = None if e.checked is None else "✓" if e.checked else "⚠"
    difference = e.parity.max_abs if e.parity else None
    digest = e.sha256[:16] if e.sha256 else None
    return (e.target, "✓" if e.ok else "⚠", e.path, e.nbytes, e.exporter, e.opset, checked, difference, e.seconds, digest)


def _failure(e: Exported) -> tuple[str, ...]:
    return tuple(text for text in (e.cause, e.cure) if text)


def _sentence(model: str, e: Exported) -> str:
    opset = "" if e.opset is None else f", opset {e.opset}"
    size = f"{visible(e.path)} ({format_bytes(e.nbytes or 0)}{opset})"
    if e.parity is None:
        return f"{visible(model)} was written to {size} and was not compared with the model."
    apart = f"at most {e.parity.max_abs:.2g} apart" if e.parity.max_abs else "without any difference"
    inputs = ", ".join(e.tried)
    return f"{visible(model)} was written to {size} and answers as the model does: {apart} on {inputs} inputs."
