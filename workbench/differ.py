"""diff: two checkpoints -> what was added, removed, renamed, reshaped, retyped and changed, and by how much.

Tensors whose bytes are equal are settled by comparing bytes; only differing ones are measured. Names are aligned through
`match` first, so a wrapper prefix on one side is told as a rename and does not hide what changed.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from workbench import dtypes
from workbench.analyses.statistics import as_float64
from workbench.checkpoint import Checkpoint
from workbench.errors import located, visible
from workbench.keymap.inference import match
from workbench.names import Patterns, match_names, require_names
from workbench.opening import open as open_checkpoint
from workbench.report import Report
from workbench.stream import Meter, ProgressFunction
from workbench.tables import Column, Table, table
from workbench.tensors import LazyTensor, Memo

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Status = Literal["added", "removed", "changed", "reshaped", "retyped", "equal", "unreadable"]
_STEP = 1 << 18  # elements of both sides held at once
MARKS: dict[str, str] = {"added": "+", "removed": "−", "changed": "~", "reshaped": "~", "retyped": "~", "equal": "=", "unreadable": "⚠"}


@dataclass(frozen=True)
class DiffRow:
    """One tensor in both, or in one of them. `b - a` is measured over elements finite on both sides.

    Attributes:
        name: its name in b (in a where it was removed); was: its name in a, where that is another.
        max_abs, mean_abs, l2: of b - a. relative: l2 / ||a||. cosine: of a and b. changed: fraction of elements that differ.
        nonfinite: elements NaN or infinite on one side only, or with another sign.
    """

    name: str
    status: Status
    was: str | None = None
    shape_a: tuple[int, ...] | None = None
    shape_b: tuple[int, ...] | None = None
    dtype_a: str | None = None
    dtype_b: str | None = None
    max_abs: float | None = None
    mean_abs: float | None = None
    l2: float | None = None
    relative: float | None = None
    cosine: float | None = None
    changed: float | None = None
    nonfinite: int | None = None
    note: str = ""


@dataclass(frozen=True, repr=False)
class DiffReport(Report):
    """Every tensor of both sides, and the other values that differ. True when nothing differs (a rename alone does not count)."""

    a: str
    b: str
    rows: tuple[DiffRow, ...]
    values: tuple[tuple[str, str, str], ...]
    compared: str

    @property
    def ok(self) -> bool:
        return all(row.status == "equal" for row in self.rows) and not self.values

    @property
    def counts(self) -> dict[str, int]:
        """How many tensors have each status."""
        counts = dict.fromkeys(("added", "removed", "changed", "reshaped", "retyped", "equal", "unreadable"), 0)
        for row in self.rows:
            counts[row.status] += 1
        return counts

    @property
    def headline(self) -> str:
        renamed = sum(row.was is not None for row in self.rows)
        told = ", ".join(f"{count} {status}" for status, count in self.counts.items() if count)
        text = told or "no tensors on either side"
        text += f"; {renamed} renamed" if renamed else ""
        text += f"; {len(self.values)} other values differ" if self.values else ""
        return f"{visible(self.a)} → {visible(self.b)}: {text}"

    def tables(self) -> tuple[Table, ...]:
        columns = (
            Column("", "mark"), Column("name", "name"), Column("status"), Column("shape", "shape"), Column("dtype"), Column("max |Δ|", "number"), Column("mean |Δ|", "number"),
            Column("‖Δ‖", "number"), Column("relative", "number"), Column("cosine", "number"), Column("elements", "percent", "fraction of elements that differ"), Column("note"),
        )  # fmt: skip
        ranked = sorted(
            self.rows,
            key=lambda r: (r.status == "equal", -(r.relative if r.relative is not None and not math.isnan(r.relative) else math.inf)),
        )
        tables = [table("tensors", columns, [_cells(r) for r in ranked], empty="no tensors")]
        if self.values:
            tables.append(table("other values", (Column("name", "name"), Column("before"), Column("after")), self.values))
        return tuple(tables)

    def plot(self) -> Figure:
        """The largest relative changes, layer by layer."""
        from workbench.render import plots

        return plots.diff_heat(self.rows, self.headline)


def _cells(row: DiffRow) -> tuple[Any, ...]:
    shape = row.shape_b if row.shape_b is not None else row.shape_a
    dtype = row.dtype_a if row.dtype_b in (None, row.dtype_a) else row.dtype_b if row.dtype_a is None else f"{row.dtype_a} → {row.dtype_b}"
    notes = [f"was {row.was}"] * (row.was is not None) + [row.note] * bool(row.note)
    return (
        MARKS[row.status],
        row.name,
        row.status,
        shape,
        dtype,
        row.max_abs,
        row.mean_abs,
        row.l2,
        row.relative,
        row.cosine,
        row.changed,
        "; ".join(notes) or None,
    )


def diff(
    a: Any,
    b: Any,
    *,
    names: Patterns = "*",
    rtol: float = 0.0,
    atol: float = 0.0,
    align: bool = True,
    progress: ProgressFunction | None = None,
    cancel: threading.Event | None = None,
) -> DiffReport:
    """Compare two checkpoints, state dicts or live models, tensor by tensor.

    Args:
        a, b: anything `wb.open` takes. Two training checkpoints with the same sections are compared whole; otherwise the weights of each.
        names: glob over the names of b (and the names only a has).
        rtol, atol: an element is equal where |b - a| <= atol + rtol * |a|.
        align: pair names that `match` finds certain, so that a wrapper prefix is told as a rename.
    Returns:
        DiffReport; truthy when nothing differs.
    Raises:
        SelectionError: no name matches. CancelledError.
    Cost: one read of both sides to compare bytes, one more of the tensors that differ; memory is a few chunks.
    """
    left, right, compared = _comparable(open_checkpoint(a), open_checkpoint(b))
    other = {name: name for name in right if name in left}
    if align and len(other) < len(right) and len(left) and len(right):
        taken = set(other.values())
        other |= {
            p.target: p.source
            for p in match(left, right).pairs
            if p.confidence == "certain" and p.target in right and p.source in left and p.target not in other and p.source not in taken
        }
    paired = set(other.values())
    removed = [name for name in left if name not in paired]
    chosen = set(require_names(names, [*right, *removed])) if left or right else set()
    meter = Meter("diff", sum(right[n].nbytes + left[other[n]].nbytes for n in right if n in chosen and n in other), progress, cancel)
    rows = []
    for name, tensor in right.items():
        if name in chosen:
            with located(tensor=name):
                rows.append(_row(name, left, other.get(name), tensor, rtol, atol, meter))
    rows += [DiffRow(n, "removed", shape_a=left[n].shape, dtype_a=left[n].dtype.name) for n in removed if n in chosen]
    values = _values(left, right) if match_names(names, ["*"]) else ()
    return DiffReport(left.name, right.name, tuple(rows), values, compared)


def _comparable(a: Checkpoint, b: Checkpoint) -> tuple[Checkpoint, Checkpoint, str]:
    sections = [{s.name for s in c.sections()} for c in (a, b)]
    if sections[0] == sections[1]:
        return a, b, "everything in both"
    return a.weights, b.weights, f"the weights of each: {a.weights_section.name or '(root)'} and {b.weights_section.name or '(root)'}"


def _row(name: str, left: Checkpoint, old: str | None, b: LazyTensor, rtol: float, atol: float, meter: Meter) -> DiffRow:
    if old is None:
        return DiffRow(name, "added", shape_b=b.shape, dtype_b=b.dtype.name)
    a = left[old]
    facts: dict[str, Any] = {
        "was": old if old != name else None,
        "shape_a": a.shape,
        "shape_b": b.shape,
        "dtype_a": a.dtype.name,
        "dtype_b": b.dtype.name,
    }
    if a.locked or b.locked:
        return DiffRow(name, "unreadable", note=str(a.locked or b.locked), **facts)
    if a.shape != b.shape:
        return DiffRow(name, "reshaped", **facts)
    if a.spec == b.spec and (a.source == b.source or _equal_bytes(a, b)):
        meter.advance(a.nbytes + b.nbytes)
        return DiffRow(name, "equal", **facts, **_ZERO)
    numbers, equal = _measure(a, b, rtol, atol, meter)
    status: Status = "retyped" if a.dtype != b.dtype else "equal" if equal else "changed"
    return DiffRow(name, status, **facts, **numbers)


_ZERO: dict[str, Any] = {"max_abs": 0.0, "mean_abs": 0.0, "l2": 0.0, "relative": 0.0, "cosine": 1.0, "changed": 0.0, "nonfinite": 0}


def _equal_bytes(a: LazyTensor, b: LazyTensor) -> bool:
    import torch

    for x, y in zip(_chunks(a), _chunks(b), strict=True):
        if not torch.equal(dtypes.flat(x).view(torch.uint8), dtypes.flat(y).view(torch.uint8)):
            return False
    return True


def _chunks(tensor: LazyTensor) -> Iterator[Any]:
    """Flat chunks of a fixed number of elements, whatever the element type, so that two sides walk in step.

    A torch-quantized tensor gives the numbers it stands for, held whole.
    """
    values = tensor.load().dequantize().reshape(-1) if tensor.spec.quantizer else None
    memo = Memo()
    for start in range(0, tensor.numel, _STEP):
        stop = min(start + _STEP, tensor.numel)
        memo.step.clear()
        yield tensor.read(start, stop, memo) if values is None else values[start:stop]


def _measure(a: LazyTensor, b: LazyTensor, rtol: float, atol: float, meter: Meter) -> tuple[dict[str, Any], bool]:
    """The numbers of b - a, and whether every element is equal within the tolerances."""
    import torch

    largest = total = squares = aa = bb = ab = 0.0
    differing = beyond = nonfinite = 0
    for raw_a, raw_b in zip(_chunks(a), _chunks(b), strict=True):
        x, y = _values64(raw_a), _values64(raw_b)
        finite = torch.isfinite(x) & torch.isfinite(y)
        if not bool(finite.all()):
            parts = [(x.real, y.real), (x.imag, y.imag)] if x.is_complex() and y.is_complex() else [(x, y)]
            same = torch.stack([(p == q) | (torch.isnan(p) & torch.isnan(q)) for p, q in parts]).all(0)
            nonfinite += int((~finite & ~same).sum())
            x, y = x[finite], y[finite]
        delta = (y - x).abs()
        if a.dtype.kind == b.dtype.kind == "int":  # integers beyond 2**53 are told apart though float64 cannot
            delta = torch.where((raw_a.to(torch.int64) != raw_b.to(torch.int64)) & (delta == 0), torch.ones_like(delta), delta)
        if delta.numel():
            largest = max(largest, float(delta.amax()))
            total += float(delta.sum())
            squares += float((delta * delta).sum())
            differing += int(torch.count_nonzero(delta))
            beyond += int((delta > atol + rtol * x.abs()).sum())
            aa, bb, ab = aa + float((x.abs() ** 2).sum()), bb + float((y.abs() ** 2).sum()), ab + float((x * y.conj()).real.sum())
        meter.advance(raw_a.numel() * a.dtype.itemsize + raw_b.numel() * b.dtype.itemsize)
    count = max(a.numel, 1)
    norms = math.sqrt(aa) * math.sqrt(bb)
    numbers = {
        "max_abs": largest, "mean_abs": total / count, "l2": math.sqrt(squares), "relative": math.sqrt(squares) / math.sqrt(aa) if aa else (math.inf if squares else 0.0),
        "cosine": ab / norms if norms else (1.0 if aa == bb else 0.0), "changed": (differing + nonfinite) / count, "nonfinite": nonfinite,
    }  # fmt: skip
    return numbers, not beyond and not nonfinite


def _values64(chunk: Any) -> Any:
    return chunk.to(_complex128()) if chunk.is_complex() else as_float64(chunk)


def _complex128() -> Any:
    import torch

    return torch.complex128


def _values(a: Checkpoint, b: Checkpoint) -> tuple[tuple[str, str, str], ...]:
    """Everything that is no tensor and differs: epochs, learning rates, configurations."""
    left, right = a.extras, b.extras
    names = [*right, *(name for name in left if name not in right)]
    absent = "(absent)"
    shown = ((n, repr(left[n]) if n in left else absent, repr(right[n]) if n in right else absent) for n in names)
    return tuple((n, before, after) for n, before, after in shown if before != after)
