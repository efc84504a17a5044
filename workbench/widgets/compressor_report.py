"""What the compressor ships to its page: columns, a row per tensor, the bars of bytes, the panel. Plain functions; no number is computed twice."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from workbench.checkpoint import Checkpoint
from workbench.compression import CompressionPlan, FrontierReport, SensitivityReport
from workbench.errors import visible
from workbench.ops.schemes import Scheme
from workbench.report import Report
from workbench.tables import Table, format_bytes, format_cell
from workbench.widgets.base import finding_dicts, finite

Detail = dict[str, Any]

_COLUMNS = [
    {"id": "name", "title": "name", "kind": "name", "width": "minmax(0, 1fr)"},
    {"id": "scheme", "title": "scheme", "kind": "text", "width": "112px"},
    {"id": "error", "title": "error", "kind": "bar", "bar": True, "width": "90px", "note": "share of the plan's whole error", "drop": 3},
    {
        "id": "sqnr",
        "title": "SQNR",
        "kind": "number",
        "width": "62px",
        "right": True,
        "note": "signal over quantization noise, in dB",
        "drop": 1,
    },
    {"id": "before", "title": "now", "kind": "bytes", "width": "70px", "right": True, "drop": 2, "note": "bytes as they are"},
    {"id": "then", "title": "then", "kind": "bytes", "width": "70px", "right": True, "note": "bytes under the plan, predicted"},
    {"id": "real", "title": "in the file", "kind": "bytes", "width": "76px", "right": True, "note": "bytes in the file that was saved"},
]
_SUFFIXES = ("_packed", "_scale", "_zero_point", "_shape")  # what stands beside or in the place of a tensor


@dataclass(frozen=True, repr=False)
class Waiting(Report):
    """What a saved notebook keeps of a compressor that measured nothing."""

    name: str

    @property
    def headline(self) -> str:
        return f"{visible(self.name)}: nothing was measured yet"

    def tables(self) -> tuple[Table, ...]:
        return ()


def fixed_report(source: Checkpoint, offered: Sequence[str], *, can_score: bool) -> dict[str, Any]:
    """What does not change while the view lives."""
    weights = source.weights
    return {
        "view": "compressor",
        "title": {"name": visible(source.name), "parts": [f"{len(weights):,} tensors", format_bytes(weights.nbytes)]},
        "findings": finding_dicts(source.findings),
        "columns": _COLUMNS,
        "schemes": list(offered),
        "score": can_score,
    }


def start(frontier: FrontierReport) -> int:
    """Where the handle stands first: the point nearest to a quarter of the bytes, which is what int8 comes to."""
    whole = frontier.points[-1][0]
    return min(range(len(frontier.points)), key=lambda i: abs(frontier.points[i][0] - whole / 4))


def parts_of(saved: Checkpoint) -> dict[str, int]:
    """Bytes in a saved file by the name of the tensor that they stand for."""
    out: dict[str, int] = {}
    for name, tensor in saved.weights.items():
        base = next((name.removesuffix(suffix) for suffix in _SUFFIXES if name.endswith(suffix)), name)
        out[base] = out.get(base, 0) + tensor.nbytes
    return out


def rows_of(plan: CompressionPlan | None, parts: Mapping[str, int]) -> dict[str, Any]:
    """A row per tensor, in columns."""
    choices = plan.choices if plan is not None else ()
    total = plan.error if plan is not None else 0.0
    return {
        "name": [visible(" = ".join(c.names)) for c in choices],
        "scheme": [label(c.scheme) for c in choices],
        "error": [c.error / total if total > 0 else 0.0 for c in choices],
        "sqnr": [None if c.sqnr is None or c.scheme is None else finite(c.sqnr) for c in choices],
        "before": [c.before for c in choices],
        "then": [c.nbytes for c in choices],
        "real": [parts.get(c.names[0]) for c in choices],
    }


def sizes_of(plan: CompressionPlan | None, saved: Mapping[str, Any], scores: tuple[float, float] | None) -> dict[str, Any]:
    """The bars: [what, bytes, words], and the scores as text."""
    if plan is None:
        return {}
    real = sum(saved["parts"].values()) if saved else None
    bars = [["now", plan.before], ["predicted", plan.nbytes], ["in the file", real]]
    told = [[what, n, format_cell("bytes", n)] for what, n in bars]
    return {"bars": told, "scores": [] if scores is None else [f"{scores[0]:.4g}", f"{scores[1]:.4g}"]}


def label(scheme: Scheme | None) -> str:
    """A scheme in a few letters: `int8`, `int4 g32`."""
    return "as it is" if scheme is None else str(scheme).replace(" per group of ", " g").replace(" per channel", "")


def empty(source: Checkpoint) -> Detail:
    return {
        "heading": "compress",
        "note": f"Measure reads {visible(source.name)} once for each scheme and tells what it costs each tensor. Then the handle chooses how small it shall be.",
    }


def overview(plan: CompressionPlan, saved: Mapping[str, Any], scores: tuple[float, float] | None, selected: int) -> Detail:
    """The finding, then the numbers, then what to do next."""
    counts: dict[str, int] = {}
    for choice in plan.choices:
        counts[label(choice.scheme)] = counts.get(label(choice.scheme), 0) + 1
    facts = [[name, f"{count:,} tensors"] for name, count in sorted(counts.items(), key=lambda item: -item[1])]
    facts += [["not touched", format_bytes(plan.fixed)]] if plan.fixed else []
    facts += [["score", f"{scores[0]:.4g} → {scores[1]:.4g}"]] if scores else []
    if saved:
        facts += [["file", f"{format_bytes(saved['nbytes'])}, read back equal"]]
    return {"heading": f"{selected:,} rows selected" if selected else "the plan", "note": visible(plan.headline), "facts": facts}


def of_tensor(report: SensitivityReport, plan: CompressionPlan, name: str) -> Detail:
    """What each scheme would make of one tensor."""
    choice = next(choice for choice in plan.choices if choice.names[0] == name)
    facts = [["chosen", label(choice.scheme)], ["now", format_bytes(choice.before)], ["then", format_bytes(choice.nbytes)]]
    more = [
        [
            label(row.scheme),
            f"{format_bytes(row.nbytes)}, "
            + ("exact" if row.sqnr == math.inf else f"{row.sqnr:.3g} dB" if row.sqnr is not None else f"{row.error:.3g}"),
        ]
        for row in report.rows
        if row.name == name
    ]
    more += [[scheme, why] for (left, scheme), why in report.left.items() if left == name]
    return {"heading": visible(" = ".join(choice.names)), "facts": facts, "more": more}
