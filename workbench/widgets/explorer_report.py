"""What the explorer ships to the page, once: names and specs in columns, and the folded tree as parallel arrays."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from workbench.checkpoint import Checkpoint
from workbench.errors import visible
from workbench.render import outline
from workbench.tables import format_cell
from workbench.widgets.base import finding_dicts

SECTION = "section:"  # how the rail names a section of the checkpoint
_MAX_FACTS = 200

_COLUMNS: list[dict[str, Any]] = [
    {"id": "name", "title": "name", "kind": "name", "width": "minmax(0, 1fr)"},
    {"id": "count", "title": "tensors", "kind": "count", "width": "48px", "right": True, "tree": True, "drop": 2},
    {"id": "shape", "title": "shape", "kind": "shape", "width": "", "right": True},
    {"id": "dtype", "title": "dtype", "kind": "text", "width": "56px", "drop": 1},
    {"id": "nbytes", "title": "size", "kind": "bytes", "width": "58px", "right": True},
    {"id": "share", "title": "share", "kind": "percent", "width": "44px", "bar": True, "drop": 3, "note": "part of all bytes"},
]
MEASURED = [
    {"id": "mean", "title": "mean", "kind": "number", "width": "76px", "right": True},
    {"id": "std", "title": "std", "kind": "number", "width": "76px", "right": True},
    {"id": "nan", "title": "NaN", "kind": "count", "width": "44px", "right": True},
]


def explorer_report(ckpt: Checkpoint, title: outline.Head, root: outline.Node) -> dict[str, Any]:
    """Everything the page draws, in columns: names and specs of each tensor, and the nodes of the folded tree in order."""
    tensors = list(ckpt.values())
    dtypes: dict[str, int] = {}
    shapes: dict[tuple[int, ...], int] = {}
    about = [*dict(ckpt.metadata).items(), *dict(ckpt.extras).items()]
    facts = [[visible(key), visible(value)[:500]] for key, value in about[:_MAX_FACTS]]
    if len(about) > _MAX_FACTS:
        facts.append(["…", f"{len(about) - _MAX_FACTS:,} more in ckpt.metadata and ckpt.extras"])
    rail = [{"id": "tensors", "label": "Tensors", "count": len(tensors)}]
    rail += [{"id": SECTION + s.name, "label": visible(s.name), "count": s.tensors, "note": visible(s.reason)} for s in title.sections]
    rail += [{"id": "metadata", "label": "Metadata", "count": len(about)}] if about else []
    return {
        "view": "explorer",
        "title": {"name": visible(title.name), "parts": [visible(part) for part in title.parts]},
        "findings": finding_dicts(title.findings),
        "rail": rail,
        "metadata": facts,
        "columns": [{**c, "width": _shape_width({tensor.shape for tensor in tensors})} if c["id"] == "shape" else c for c in _COLUMNS],
        "measured": MEASURED,
        "nbytes": root.nbytes,
        "data": {
            "name": [visible(name) for name in ckpt],
            "shape": [shapes.setdefault(tensor.shape, len(shapes)) for tensor in tensors],
            "dtype": [dtypes.setdefault(str(tensor.dtype), len(dtypes)) for tensor in tensors],
        },
        "tree": _tree(ckpt, root),
        "dtypes": list(dtypes),
        "shapes": list(shapes),
    }


def _shape_width(shapes: Iterable[tuple[int, ...]]) -> str:
    """Room for the longest shape, so that four dimensions fit; a longer one is whole on hover."""
    longest = max((len(format_cell("shape", shape)) for shape in shapes), default=0)
    return f"{min(max(76, round(7.4 * longest)), 140)}px"


def _tree(ckpt: Checkpoint, root: outline.Node) -> dict[str, list[Any]]:
    """The folded tree as parallel arrays in preorder; `row` is -1 for a group."""
    rows = {name: row for row, name in enumerate(ckpt)}
    nodes: dict[str, list[Any]] = {"label": [], "parent": [], "row": [], "count": [], "nbytes": [], "depth": []}
    pending = [(child, -1, 0) for child in reversed(root.children)]
    while pending:
        node, parent, depth = pending.pop()
        index = len(nodes["label"])
        values = (visible(node.label), parent, -1 if node.name is None else rows[node.name], node.count, node.nbytes, depth)
        for column, value in zip(nodes.values(), values, strict=True):
            column.append(value)
        pending += [(child, index, depth + 1) for child in reversed(node.children)]
    return nodes
