"""The panel on the right of the explorer: what is said of one tensor, of several, and of the whole checkpoint.

Plain functions from core values to what the page draws; every text from a file is made visible here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from workbench.analyses.statistics import TensorStats
from workbench.checkpoint import Checkpoint
from workbench.errors import visible
from workbench.render import plots
from workbench.render.outline import Head, origin
from workbench.tables import format_bytes, format_cell, format_number
from workbench.tensors import LazyTensor

AUTOMATIC_NBYTES = 16_000_000  # statistics of a tensor this small need no request
_PEEKED = 8

Detail = dict[str, Any]


def overview(ckpt: Checkpoint, head: Head) -> Detail:
    """What is said while nothing is selected."""
    if not len(ckpt):
        return {"heading": visible(ckpt.name), "note": "This checkpoint holds no tensors."}
    made = origin(ckpt)
    facts = [
        ["file", made] if made else ["format", ckpt.format],
        ["tensors", format_number(len(ckpt))],
        ["size", format_bytes(head.nbytes)],
    ]
    facts += [[section.name, f"{section.kind} · {section.reason}"] for section in head.sections]
    return {"heading": visible(ckpt.name), "facts": _visible(facts), "note": "Select a tensor to see its values."}


def summary(tensors: Sequence[LazyTensor]) -> Detail:
    """What is said of several tensors."""
    dtypes = ", ".join(sorted({str(tensor.dtype) for tensor in tensors}))
    numel, nbytes = sum(tensor.numel for tensor in tensors), sum(tensor.nbytes for tensor in tensors)
    facts = [["size", format_bytes(nbytes)], ["elements", format_number(numel)], ["dtype", dtypes]]
    return {"heading": f"{len(tensors):,} tensors selected", "facts": facts}


def described(ckpt: Checkpoint, name: str, aliases: Mapping[str, str]) -> Detail:
    """One tensor without its values: type, size, place, ties, and why it is locked if it is."""
    tensor = ckpt[name]
    tied = aliases.get(name) or next((alias for alias, kept in aliases.items() if kept == name), None)
    facts = [
        ["type", f"{tensor.dtype} {format_cell('shape', tensor.shape)}" + (f", stored as {tensor.packing}" if tensor.packing else "")],
        ["size", format_bytes(tensor.nbytes) + ("" if tensor.offset is None else f" at {tensor.offset:#x}")],
        ["storage", "own" if tied is None else f"shared with {tied}"],
    ]
    notes = [finding.message for finding in ckpt.findings if finding.where.get("tensor") == name]
    if tensor.locked is not None:
        notes = [f"Values are locked: {tensor.locked}"]
    detail: Detail = {"heading": visible(name), "facts": _visible(facts)}
    return {**detail, "note": "⚠ " + visible(" ".join(notes)), "locked": True} if notes else detail


def with_values(detail: Detail, tensor: LazyTensor) -> Detail:
    """The first values; a large tensor gets a button for its statistics. Reads a few bytes."""
    values = ", ".join(format_cell("number", value) for value in tensor.peek(_PEEKED))
    more = [["elements", format_number(tensor.numel)], ["values", values + (" …" if tensor.numel > _PEEKED else "")]]
    action = {"label": f"statistics (reads {format_bytes(tensor.nbytes)})", "command": "measure"}
    return {**detail, "more": more, "actions": [action] if tensor.nbytes > AUTOMATIC_NBYTES else []}


def with_statistics(detail: Detail, row: TensorStats) -> Detail:
    """Range, moments, counts, and the histogram under its finding."""
    numbers = {"mean": row.mean, "std": row.std, "min": row.min, "max": row.max, "zeros": row.zeros, "NaN": row.nan, "inf": row.inf}
    facts = [[label, format_cell("number", value)] for label, value in numbers.items()]
    detail = {**detail, "more": facts + detail["more"], "actions": []}
    if not row.counts:
        return detail
    figure = plots.histogram(row.edges, row.counts, f"{facts[0][1]} ± {facts[1][1]}", width=2.8)
    return {**detail, "image": plots.data_uri(plots.to_png(figure, dpi=180)), "alt": f"histogram of {detail['heading']}"}


def _visible(facts: list[list[str]]) -> list[list[str]]:
    return [[visible(label), visible(value)] for label, value in facts]
