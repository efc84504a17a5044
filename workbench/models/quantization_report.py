"""What a quantization did: bytes before and after, which parts, how far the answers moved, what was repaired, and how to load it again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from workbench.errors import SelectionError, UnsupportedError, WorkbenchError, visible
from workbench.exporting.wrappers import rescued
from workbench.names import Patterns, match_names, require_names
from workbench.report import Report
from workbench.tables import Column, Table, format_bytes, table
from workbench.verification.measures import Figures, Meter
from workbench.verification.runners import running
from workbench.verification.values import Call, paired

Modules = type | str | Sequence[type | str] | None


@dataclass(frozen=True)
class Part:
    """One module or node with weights. `told`: how it is held now, or why it was left."""

    name: str
    kind: str
    numel: int
    told: str


@dataclass
class Made:
    """What an engine returns: the parts, and what has to be told."""

    quantized: list[Part] = field(default_factory=list)
    left: list[Part] = field(default_factory=list)
    repairs: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    log: str = ""
    source_dtype: str = "fp32"

    def told(self) -> dict[str, Any]:
        """As the report's own fields."""
        return {name: tuple(value) if isinstance(value, list) else value for name, value in vars(self).items()}


@dataclass(frozen=True, repr=False)
class QuantizationReport(Report):
    """A model before and after. False where nothing was quantized, or where the answers lost their shape, a finite value, or themselves.

    Attributes:
        model: the quantized module, of the torch methods; path: the file written, or None. `wb.compare` takes either.
        nbytes_before, nbytes_after: of files really written: state dicts by `torch.save`, or `.onnx`.
        quantized, left: every part with weights.
        outputs: the answers measured against the original's: {output: figures}; empty without an example.
        repairs: known failures of the engine that were in the way, and what was done.
        reload: Python that loads the saved weights or file in a new process, with `model` a new one of the same class and `path` the file.
        log: what the engine said.
    """

    method: str
    dtype: str
    nbytes_before: int
    nbytes_after: int
    outputs: dict[str, Figures]
    reload: str
    path: Path | None
    problem: str = ""
    model: nn.Module | None = field(default=None, repr=False)
    source_dtype: str = "fp32"
    quantized: tuple[Part, ...] = ()
    left: tuple[Part, ...] = ()
    repairs: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    log: str = field(default="", repr=False)

    @property
    def max_abs(self) -> float | None:
        """Largest difference over all outputs."""
        return max((f.max_abs for f in self.outputs.values() if f.max_abs is not None), default=None)

    @property
    def relative(self) -> float | None:
        """‖quantized − original‖ / ‖original‖ of the output that moved most."""
        return max((f.relative for f in self.outputs.values() if f.relative is not None), default=None)

    @property
    def snr_db(self) -> float | None:
        """Signal to noise of the output that moved most; None where nothing moved."""
        return min((f.snr_db for f in self.outputs.values() if f.snr_db is not None), default=None)

    @property
    def lost(self) -> str:
        """Why the answers are no use, or ""."""
        if self.relative is not None and self.relative >= 1:
            return f"the error is as large as the answers themselves ({100 * self.relative:.3g} %)"
        broken = [name for name, figures in self.outputs.items() if figures.one_sided]
        return self.problem or (f"`{broken[0]}` holds NaN or infinity where the original does not" if broken else "")

    @property
    def ok(self) -> bool:
        return bool(self.quantized) and not self.lost

    @property
    def headline(self) -> str:
        what = "nodes" if self.method.startswith("onnx") else "modules"
        before, after = format_bytes(self.nbytes_before), format_bytes(self.nbytes_after)
        if not self.quantized:
            why = (
                f": {visible(self.left[0].name)} ({self.left[0].kind}) {visible(self.left[0].told)}" if self.left else ": none has weights"
            )
            return f"0 {what} were quantized, {self.source_dtype} {before} stays {after}{why}."
        change = 100 * (self.nbytes_after / self.nbytes_before - 1)
        size = f"{self.source_dtype} {before}, {self.dtype} {after}, {'−' if change < 0 else '+'}{abs(change):.1f} %"
        count = f"{len(self.quantized)} of {len(self.quantized) + len(self.left)} {what} quantized"
        moved = (
            "its error was not measured: pass example=" if self.relative is None else f"its answers moved by {100 * self.relative:.2g} %"
        )
        return f"{size}; {count}, {moved}." if not self.lost else f"{size}; {count}, but {self.lost}."

    def tables(self) -> tuple[Table, ...]:
        columns = (Column("part", "name"), Column("kind"), Column("weights", "count"), Column("", "mark"), Column("told"))
        rows = [(p.name, p.kind, p.numel, mark, p.told) for mark, parts in (("✓", self.quantized), ("–", self.left)) for p in parts]
        figures = (
            Column("output", "name"), Column("max abs", "number"), Column("relative", "percent", "‖quantized − original‖ / ‖original‖"),
            Column("SNR dB", "number"), Column("top-1", "percent", "rows whose largest class is the original's"),
        )  # fmt: skip
        moved = [(name, f.max_abs, f.relative, f.snr_db, f.top1) for name, f in self.outputs.items()]
        sizes = [("before", self.source_dtype, self.nbytes_before), ("after", self.dtype, self.nbytes_after)]
        told = [("repaired", text) for text in self.repairs] + [("note", text) for text in self.notes]
        return (
            table("on disk", (Column("", "text"), Column("type"), Column("bytes", "bytes")), sizes),
            table("parts", columns, rows),
            table("answers against the original's", figures, moved, empty="not measured: pass example="),
            table("remarks", (Column("", "text"), Column("what", "text")), told),
            table("load it again", (Column("Python", "code"),), [(line,) for line in self.reload.splitlines()]),
        )


def chooser(modules: Modules, exclude: Patterns | None, names: Iterable[str]) -> Callable[[str, Any], str]:
    """A function (name, kinds) -> why a part was not asked for, or "". `kinds`: a type, or the types that an ONNX operator stands for.

    Raises:
        SelectionError: a glob that selects no part.
    """
    every = list(names)
    asked = [modules] if isinstance(modules, (str, type)) else None if modules is None else list(modules)
    types = tuple(one for one in asked or () if isinstance(one, type))
    named = {name for one in asked or () if isinstance(one, str) for name in require_names(one, every, what="module or node with weights")}
    if exclude is not None:
        require_names(exclude, every, what="module or node with weights")
    out = set(match_names(exclude, every)) if exclude is not None else set()

    def why_not(name: str, kinds: Any) -> str:
        if name in out:
            return "left out by exclude"
        kinds = kinds if isinstance(kinds, tuple) else (kinds,)
        chosen = asked is None or name in named or any(issubclass(kind, types) for kind in kinds if types)
        return "" if chosen else "not among the modules asked for"

    return why_not


def answers(thing: Any, call: Call) -> dict[str, Any]:
    """What a model or a file says to a batch; a cache among a model's outputs is switched off or left out."""
    try:
        with running(thing) as runner:
            return runner(call.fresh())
    except SelectionError as error:
        if not isinstance(thing, nn.Module):
            raise
        subject, call, _ = rescued(thing, call, error)
        with running(subject) as runner:
            return runner(call.fresh())


def moved(original: Any, quantized: Any, calls: Sequence[Call]) -> tuple[dict[str, Figures], str]:
    """How far every output moved, over all batches, and what outputs no longer pair.

    Raises:
        SelectionError: the original does not run. UnsupportedError: the quantized one does not.
    """
    meters: dict[str, Meter] = {}
    problem = ""
    for call in calls:
        try:
            before = answers(original, call)
        except WorkbenchError:
            raise
        except Exception as error:  # a stranger's forward
            raise SelectionError(f"the model does not run on the example: {type(error).__name__}: {error}") from error
        try:
            after = answers(quantized, call)
        except Exception as error:  # an engine's kernel meets a shape or a type that it does not take
            told = next(iter(str(error).splitlines()), "")
            hint = "leave the module in question out by exclude=, or take another method"
            raise UnsupportedError(f"after quantization the model no longer runs: {type(error).__name__}: {told}", hint=hint) from error
        for name, (a, b) in paired(before, after, ordered=True).items():
            if a is None or b is None or a.shape != b.shape:
                problem = problem or f"output `{name}` has another shape than the original's, or is missing"
            else:
                meters.setdefault(name, Meter()).add(a, b)
    return {name: meter.figures() for name, meter in meters.items()}, problem
