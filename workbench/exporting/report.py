"""What an export says: one row per target, made, checked and compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import TYPE_CHECKING

from workbench.errors import SelectionError, visible
from workbench.exporting.evidence import Reason
from workbench.exporting.usage import cpp_program, python_lines
from workbench.report import Report
from workbench.tables import Column, Table, format_bytes, format_seconds, table
from workbench.verification.comparison import ParityReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Option:
    """One option of an export: as asked (None: left to the exporter), as the file shows it or the exporter took it, and whether the two agree."""

    name: str
    asked: object
    honoured: object
    kept: bool


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
        dtypes: of the example's tensors, in the order of the inputs.
        checked: whether the format's own checker passed; None when it was not asked.
        parity: the comparison with the model, or None when there was none.
        tried: names of the batches compared: `example`, `negated`, `noisy`, `exchanged`, `resized`.
        sizes: other sizes at which it answered alike too.
        options: each option as asked and as honoured; for other targets than onnx, those that they have no use for.
        reasons: what in the model stands against the export, by torch.export's own evidence, the gravest first.
        latency: seconds of the fastest run on the example, of the `model` and of the `file`.
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
    dtypes: tuple[str, ...] = ()
    checked: bool | None = None
    parity: ParityReport | None = None
    tried: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ()
    options: tuple[Option, ...] = ()
    reasons: tuple[Reason, ...] = ()
    latency: dict[str, float] = field(default_factory=dict)
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
    def made_by(self) -> str | None:
        """The exporter as it is asked for: torch.export's two ways by its own option."""
        return {"strict": "strict=True", "not strict": "strict=False"}.get(self.exporter or "", self.exporter)

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
        made, causes = [e for e in self.exports if e.ok], dict[str, list[str]]()
        for e in self.exports:
            if not e.ok:
                causes.setdefault(e.cause, []).append(e.target)
        failed = "; ".join(f"{visible(self.model)} was not exported to {_listed(names)}: {visible(why)}" for why, names in causes.items())
        told = _sentence(self.model, made[0]) if len(made) == len(self.exports) == 1 else _summary(self.model, made) if made else ""
        return " ".join(filter(None, [told, failed]))

    def tables(self) -> tuple[Table, ...]:
        rows = [_row(e) for e in self.exports]
        tables = [table("targets", _COLUMNS, rows)]
        if files := [(e.target, e.path, e.sha256[:16]) for e in self.exports if e.sha256]:
            tables.append(table("files", [Column("target"), Column("file", "name"), Column("sha256", "code")], files))
        remarks = [(e.target, text) for e in self.exports for text in (*filter(None, [e.cure]), *e.notes, *_sizes(e))]
        if remarks:
            tables.append(table("remarks", [Column("target"), Column("what")], remarks))
        for e in self.exports:
            if e.reasons:
                reasons = ((n, r.what, r.where or None, r.code or None, r.cure) for n, r in enumerate(e.reasons, 1))
                tables.append(table(f"what stands against {e.target}", _REASON_COLUMNS, reasons))
            if e.options:
                options = ((o.name, _word(o.asked), "✓" if o.kept else "⚠", _word(o.honoured)) for o in e.options)
                tables.append(table(f"{e.target} options", _OPTION_COLUMNS, options))
            if e.inputs or e.outputs:
                graph = [(way, n, shape) for way, names in (("input", e.inputs), ("output", e.outputs)) for n, shape in names.items()]
                tables.append(table(f"{e.target} graph", [Column(""), Column("name", "name"), Column("shape", "shape")], graph))
            if e.parity is not None:
                tables.append(replace(e.parity.tables()[0], title=f"{e.target} outputs"))
        return tuple(tables)

    def figures(self) -> tuple[Figure, ...]:
        """Size and latency of the files beside the model, then each comparison: candidate against reference, and the errors' histogram."""
        from workbench.render import plots

        compared = tuple(e.parity.plot() for e in self.exports if e.parity is not None and e.parity.sample is not None)
        made = [e for e in self.exports if e.files]
        if not made:
            return compared
        latency = next((e.latency["model"] for e in made if e.latency), None)
        measures: dict[str, tuple[list[float | None], Callable[[float], str]]] = {
            "size on disk": ([None, *(e.nbytes for e in made)], format_bytes),
            "latency": ([latency, *(e.latency.get("file") for e in made)], format_seconds),
        }
        least = min(made, key=lambda e: e.nbytes or 0)
        title = f"{least.target} takes {format_bytes(least.nbytes or 0)}, the least of {len(made)}"
        return (plots.side_by_side(["the model in torch", *(e.target for e in made)], measures, title), *compared)

    def plot(self) -> Figure:
        """The first comparison's scatter."""
        for e in self.exports:
            if e.parity is not None:
                return e.parity.plot()
        raise SelectionError("nothing was compared, so there is nothing to draw", hint="its tables() say why")


_OPTION_COLUMNS = (
    Column("option", "name"),
    Column("asked", "text"),
    Column("", "mark"),
    Column("honoured", "text", "as the file shows it"),
)
_REASON_COLUMNS = (
    Column("", "count"),
    Column("what", "text"),
    Column("where", "name"),
    Column("line", "code"),
    Column("what to change", "text"),
)
_COLUMNS = (
    Column("target"),
    Column("", "mark"),
    Column("bytes", "bytes"),
    Column("exporter"),
    Column("opset", "count"),
    Column("checked", "mark"),
    Column("max abs", "number", "largest difference from the model over every batch tried"),
    Column("latency", "seconds", "the fastest run on the example"),
    Column("made in", "seconds", "checks included"),
)


def _row(e: Exported) -> tuple[object, ...]:
    checked = None if e.checked is None else "✓" if e.checked else "⚠"
    difference = e.parity.max_abs if e.parity is not None else None
    return (e.target, "✓" if e.ok else "⚠", e.nbytes, e.made_by, e.opset, checked, difference, e.latency.get("file"), e.seconds)


def _word(value: object) -> str | None:
    return "yes" if value is True else "no" if value is False else None if value is None else str(value)


def _sizes(e: Exported) -> tuple[str, ...]:
    return (f"It answers alike at other sizes: {'; '.join(e.sizes)}.",) if e.sizes else ()


def _listed(words: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([*([", ".join(words[:-1])] if words[1:] else []), words[-1]])


def _summary(model: str, made: Sequence[Exported]) -> str:
    """One sentence for several targets: the files, and how far the farthest is from the model."""
    compared = [e.parity.max_abs or 0.0 for e in made if e.parity is not None]
    apart = f"at most {max(compared):.2g} apart" if any(compared) else "without any difference"
    untold = [visible(PurePath(e.path).name) for e in made if e.parity is None]
    which = "those compared answer" if untold else "all answer" if made[1:] else "it answers"
    proved = f"{which} as the model does, {apart}" if compared else ""
    plain = f"{_listed(untold)} {'were' if untold[1:] else 'was'} not compared with the model" if untold else ""
    return f"{visible(model)} was written to {'; '.join(filter(None, [_listed(list(map(_size, made))), proved, plain]))}."


def _size(e: Exported) -> str:
    opset = "" if e.opset is None else f", opset {e.opset}"
    return f"{visible(PurePath(e.path).name)} ({format_bytes(e.nbytes or 0)}{opset})"


def _sentence(model: str, e: Exported) -> str:
    size = _size(e)
    if e.parity is None:
        return f"{visible(model)} was written to {size} and was not compared with the model."
    apart = f"at most {e.parity.max_abs:.2g} apart" if e.parity.max_abs else "without any difference"
    sizes = f" and at {len(e.sizes)} other size{'s'[: len(e.sizes) > 1]}" if e.sizes else ""
    return f"{visible(model)} was written to {size} and answers as the model does: {apart} on {', '.join(e.tried)} inputs{sizes}."
