"""A checkpoint folded into a tree: what the text, the static HTML and the explorer all show.

Names are split at dots, chains of single children become one label, numbered siblings of equal structure fold into
`layers.{0-11}`, and a group of few tensors lists them flat. Values are never read; only names, specs and findings are.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from workbench.tables import format_bytes

_MAX_DEPTH = 24  # a name with more dots keeps the rest in its last label, so no name can exhaust the stack
_FLAT = 16  # a group of so few tensors lists them without inner groups


@dataclass(slots=True)
class Node:
    """A tensor (`name` is set) or a group of them."""

    label: str
    name: str | None = None
    dtype: str = ""
    shape: tuple[int, ...] = ()
    count: int = 0
    nbytes: int = 0
    run: int = 0  # how many numbered siblings of equal structure it stands for
    children: list[Node] = field(default_factory=list)
    signature: int = 0
    tied: str = ""  # the earlier name of the very same values, whose bytes a group does not count again

    def leaves(self) -> Iterator[Node]:
        if self.name is not None:
            yield self
        for child in self.children:
            yield from child.leaves()


@dataclass(frozen=True, slots=True)
class Line:
    """One printed row: a group, a tensor, or one tensor that stands for `times` of equal shape."""

    depth: int
    label: str
    group: bool
    count: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]
    times: int
    first: str  # the name of the first tensor under it
    tied: str


@dataclass(frozen=True, slots=True)
class Head:
    """What is open, in one line: `epoch_12.ckpt`, then `model`, `122 tensors`, `44.7 MB`, `float32`."""

    name: str
    parts: tuple[str, ...]
    findings: tuple[Any, ...]
    sections: tuple[Any, ...]
    aliases: Mapping[str, str]
    nbytes: int


def head(ckpt: Any) -> Head:
    """The title of a checkpoint; dtypes are named by their share of the bytes, largest first."""
    sizes: dict[str, int] = {}
    aliases = ckpt.aliases
    for name, tensor in ckpt.items():
        dtype = str(tensor.dtype)
        sizes[dtype] = sizes.get(dtype, 0) + (0 if name in aliases else tensor.nbytes)
    dtypes = sorted(sizes, key=lambda d: -sizes[d])
    sections = tuple(section for section in ckpt.sections() if section.name)
    count, nbytes = len(ckpt), sum(sizes.values())
    counted = f"{count:,} tensor{'' if count == 1 else 's'}"
    parts = (_list_of([section.name for section in sections]), counted, format_bytes(nbytes), _list_of(dtypes), origin(ckpt))
    rank = {"danger": 0, "warning": 1}
    findings = tuple(sorted(ckpt.findings, key=lambda finding: rank.get(finding.severity, 2)))
    return Head(ckpt.name or "unnamed checkpoint", tuple(filter(None, parts)), findings, sections, aliases, nbytes)


def origin(ckpt: Any) -> str:
    """`not saved · quantize` for what an op made; empty for what was opened."""
    history = getattr(ckpt, "history", ())
    return f"not saved · {history[-1].op}" if history and ckpt.source is None else ""


def _list_of(words: list[str]) -> str:
    return ", ".join(words[:3]) + (f" + {len(words) - 3} more" if len(words) > 3 else "")


@contextmanager
def collector_paused() -> Iterator[None]:
    """No search for garbage cycles while very many objects are made and none are dropped; it would take up to half of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@collector_paused()
def tree(tensors: Mapping[str, Any], aliases: Mapping[str, str]) -> Node:
    """The root of the folded tree over a mapping of names to tensors (anything with dtype, shape and nbytes)."""
    root = Node("")
    groups: dict[str, Node] = {}  # by dotted prefix
    for name, tensor in tensors.items():
        prefix, dot, label = name.rpartition(".")
        if name.count(".") > _MAX_DEPTH:
            parts = name.split(".", _MAX_DEPTH)
            prefix, label = ".".join(parts[:-1]), parts[-1]
        parent = root if not dot else groups.get(prefix) or _group(root, groups, prefix)
        packing = getattr(tensor, "packing", None)
        dtype, shape = f"{tensor.dtype} ({packing})" if packing else str(tensor.dtype), tuple(tensor.shape)
        tied = aliases.get(name, "")
        parent.children.append(Node(label, name, dtype, shape, 1, tensor.nbytes, 0, [], hash((dtype, shape, not tied)), tied))
    _finish(root)
    return root


def _group(root: Node, groups: dict[str, Node], prefix: str) -> Node:
    above, dot, label = prefix.rpartition(".")
    parent = root if not dot else groups.get(above) or _group(root, groups, above)
    node = groups[prefix] = Node(label)
    parent.children.append(node)
    return node


def _finish(node: Node) -> bool:
    """Count, fold and shorten a finished group, inner groups first; True where it holds a run."""
    inner = [child for child in node.children if child.name is None]
    has_run = True in [_finish(child) for child in inner]
    node.count = sum([child.count for child in node.children])
    node.nbytes = sum([child.nbytes for child in node.children if not child.tied])
    node.signature = hash(tuple([(child.label, child.signature) for child in node.children]))
    if any(_is_number(child.label) for child in node.children):
        node.children = _runs(node.children)
        has_run = has_run or any(child.run for child in node.children)
    if inner and node.count <= _FLAT and not has_run:
        node.children = list(_flat(node))
    elif inner:
        node.children = [_merged(child) for child in node.children]
    return has_run


def _flat(node: Node, prefix: str = "") -> Iterator[Node]:
    for child in node.children:
        child.label = prefix + child.label
        yield from [child] if child.name is not None else _flat(child, child.label + ".")


def _merged(node: Node) -> Node:
    """A group with one child takes that child's place; their labels join."""
    while node.name is None and len(node.children) == 1 and not node.run:
        child = node.children[0]
        child.label = f"{node.label}.{child.label}"
        node = child
    return node


def _is_number(label: str) -> bool:
    return label.isdigit() and label.isascii() and len(label) < 10


def _runs(children: list[Node]) -> list[Node]:
    """Numbered siblings in counting order; consecutive ones of equal structure become one run."""
    numbers = iter(sorted((c for c in children if _is_number(c.label)), key=lambda c: int(c.label)))
    children = [next(numbers) if _is_number(child.label) else child for child in children]
    out: list[Node] = []
    start = 0
    while start < len(children):
        end = start + 1
        while end < len(children) and _continues(children[end - 1], children[end]):
            end += 1
        out.append(children[start] if end == start + 1 else _run(children[start:end]))
        start = end
    return out


def _continues(previous: Node, node: Node) -> bool:
    numbered = _is_number(previous.label) and _is_number(node.label)
    return numbered and int(node.label) == int(previous.label) + 1 and node.signature == previous.signature


def _run(nodes: list[Node]) -> Node:
    count, nbytes = sum(node.count for node in nodes), sum(node.nbytes for node in nodes if not node.tied)
    return Node(f"{{{nodes[0].label}-{nodes[-1].label}}}", count=count, nbytes=nbytes, run=len(nodes), children=nodes)


def lines(root: Node) -> list[Line]:
    """The folded tree row by row; a run shows its first member for all."""
    return list(_lines(root, 0, 1))


def _lines(node: Node, depth: int, times: int) -> Iterator[Line]:
    for child in node.children:
        inner, each = (child.children[0], times * child.run) if child.run else (child, times)
        first = next(child.leaves()).name or ""
        if inner.name is not None:
            yield Line(depth, child.label, False, each, inner.nbytes, inner.dtype, inner.shape, each, first, inner.tied)
        else:
            yield Line(depth, child.label, True, child.count * times, child.nbytes * times, "", (), times, first, "")
            yield from _lines(inner, depth + 1, each)


def fitting(rows: list[Line], limit: int) -> list[Line]:
    """The rows down to the greatest depth at which at most `limit` are shown; deeper ones stay folded."""
    shown = [row for row in rows if row.depth == 0][:limit]
    for depth in range(1, _MAX_DEPTH + 2):
        deeper = [row for row in rows if row.depth <= depth]
        if len(deeper) > limit:
            return shown
        shown = deeper
    return shown
