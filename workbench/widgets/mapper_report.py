"""What the key mapper ships to the page: both sides once, and after every change the rows by rule, the coverage and the panel.

Plain functions from core values to what is drawn; every text from a file is made visible here.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import takewhile
from typing import Any, NamedTuple

from workbench.checkpoint import Checkpoint, Finding
from workbench.dtypes import DType, dtype
from workbench.errors import visible
from workbench.keymap.maps import Ambiguous, KeyMap, Pair, Unmatched
from workbench.keymap.targets import read_target
from workbench.names import natural_key
from workbench.render import outline
from workbench.tables import DASH, format_bytes, format_cell
from workbench.widgets.base import finding_dicts

Detail = dict[str, Any]

KINDS = ("unmatched", "ambiguous", "likely", "certain", "unused")
_MARKS = ("⚠", "?", "~", "✓", "−")
_TITLES = {"unmatched": "without a source", "ambiguous": "ambiguous", "unused": "unused in the file"}
_NOTES = {
    "unmatched": "names of the model that nothing fills",
    "ambiguous": "several sources are as good; none was chosen",
    "likely": "a reading of the names: look at it",
    "certain": "proven, or settled by hand",
    "unused": "names of the file that fill nothing",
}
_FLEXIBLE = "minmax(0, 1fr)"
_COLUMNS: list[dict[str, Any]] = [
    {"id": "name", "title": "model", "kind": "name", "width": _FLEXIBLE},
    {"id": "kind", "title": "", "kind": "mark", "width": "14px", "lead": True},
    {"id": "source", "title": "file", "kind": "name", "width": _FLEXIBLE, "cut": True},
    {"id": "rule", "title": "rule", "kind": "text", "width": "112px", "drop": 3, "tree": True},
    {"id": "form", "title": "shape", "kind": "text", "width": "92px", "right": True, "drop": 1},
    {"id": "nbytes", "title": "size", "kind": "bytes", "width": "58px", "right": True, "drop": 2},
]
_OPEN_ROWS = 24  # a proven rule of so few keys starts open
_MAX_OFFERED = 200
_UNFIT = "not as it stands: set mapper.keymap"  # of a candidate that would have to be cut or turned


class Spec(NamedTuple):
    """What is known of one of the model's tensors."""

    dtype: DType | None
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize if self.dtype else 0


@dataclass(frozen=True)
class Sides:
    """The model's tensors and the file's; a name of the file has its row on the page after the model's last."""

    specs: dict[str, Spec]
    part: Checkpoint
    tied: Mapping[str, str]  # names of the model whose storage an earlier one has
    names: list[str]  # of both
    row: dict[str, int]
    file_row: dict[str, int]
    by_shape: dict[tuple[int, ...], list[str]]  # the file's names


class Group(NamedTuple):
    """Rows under one heading: all that are open in one way, those of one rule, or what is left over in the file."""

    kind: str
    rule: str
    rows: list[int]


@dataclass(frozen=True)
class Reading:
    """A key map as the page needs it: by target, by source (`fills`), and in groups with what is open first."""

    keymap: KeyMap
    sides: Sides
    pairs: dict[str, Pair]
    open: dict[str, Unmatched | Ambiguous]
    fills: dict[str, list[str]]
    kinds: dict[str, str]
    groups: dict[str, Group]


@outline.collector_paused()
def sides_of(target: Any, keymap: KeyMap, part: Checkpoint) -> Sides:
    """Both sides of a map. Where the target tells no dtype it keeps the source's."""
    told = read_target(target)
    dtypes = {pair.target: part[pair.source].dtype for pair in keymap.pairs if pair.source in part and not pair.formula}
    dtypes |= {name: dtype(known) for name, known in told.dtypes.items()}
    specs = {name: Spec(dtypes.get(name), shape) for name, shape in told.shapes.items()}
    by_shape: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for name, tensor in part.items():
        by_shape[tensor.shape].append(name)
    row = {name: i for i, name in enumerate(specs)}
    file_row = {name: len(row) + i for i, name in enumerate(part)}
    return Sides(specs, part, told.ties, [*row, *file_row], row, file_row, by_shape)


@outline.collector_paused()
def read(keymap: KeyMap, sides: Sides) -> Reading:
    pairs = {pair.target: pair for pair in keymap.pairs}
    found: dict[str, Unmatched | Ambiguous] = {u.target: u for u in keymap.unmatched}
    found |= {a.target: a for a in keymap.ambiguous}
    fills: dict[str, list[str]] = defaultdict(list)
    for pair in keymap.pairs:
        for name in pair.sources:
            fills[name].append(pair.target)
    rows: dict[tuple[str, str], list[int]] = defaultdict(list)
    kinds: dict[str, str] = {}
    for name, row in sides.row.items():
        held = pairs.get(name)
        kinds[name] = held.confidence if held else "ambiguous" if isinstance(found.get(name), Ambiguous) else "unmatched"
        rows[kinds[name], held.rule if held else ""].append(row)
    if left := [row for name, row in sides.file_row.items() if name not in fills]:
        rows["unused", ""] = left
    groups: dict[str, Group] = {}
    for kind, rule in sorted(rows, key=lambda key: KINDS.index(key[0])):
        key = visible(f"{kind} {rule}")
        while key in groups:  # two rules that look the same
            key += "#"
        groups[key] = Group(kind, rule, rows[kind, rule])
    return Reading(keymap, sides, pairs, found, fills, kinds, groups)


def fixed_report(source: Checkpoint, target: Any, keymap: KeyMap, sides: Sides) -> dict[str, Any]:
    """What stays as it is whatever is accepted: both sides' names and shapes, and the model's tree."""
    named = target.name if isinstance(target, Checkpoint) else type(target).__name__ if hasattr(target, "state_dict") else "model"
    findings = list(keymap.findings)
    if keymap.rivals:
        rivals = ", ".join(map(repr, keymap.rivals))
        hint = f"look at the other with KeyMapper(source.section({keymap.rivals[0]!r}), target), and take one of them by name"
        findings.insert(0, Finding("rivals", "warning", f"The section {keymap.section!r} was taken, and {rivals} fits as well.", {}, hint))
    parts = [f"{len(sides.part):,} tensors in the file", f"{len(sides.specs):,} in the model"]
    parts += [f"section {keymap.section}"] if keymap.section else []
    held: list[Any] = [*sides.specs.values(), *sides.part.values()]
    return {
        "view": "key mapper",
        "title": {"name": visible(f"{source.name or 'file'} → {named or 'model'}"), "parts": [visible(part) for part in parts]},
        "findings": finding_dicts(findings),
        "rail": [{"id": "keys", "label": "Keys", "count": len(sides.specs)}, {"id": "code", "label": "Code", "count": None}],
        "kinds": [{"id": kind, "mark": mark, "note": _NOTES[kind]} for kind, mark in zip(KINDS, _MARKS, strict=True)],
        "columns": _COLUMNS,
        "name": [visible(name) for name in sides.names],
        "form": [format_cell("shape", each.shape) for each in held],
        "nbytes": [each.nbytes if each.dtype else None for each in held],
        "models": len(sides.specs),
    }


@outline.collector_paused()
def changing_report(read: Reading, past: int, nodes: dict[str, list[Any]]) -> dict[str, Any]:
    """What an edit may change, in columns by row, and by node of the tree where that is shown."""
    groups, of, counts = [], [0] * len(read.sides.names), dict.fromkeys(KINDS, 0)
    for index, (key, (kind, rule, rows)) in enumerate(read.groups.items()):
        counts[kind] += len(rows)
        for row in rows:
            of[row] = index
        is_open = kind != "unused" and (kind != "certain" or len(rows) <= _OPEN_ROWS)
        groups.append({"id": key, "kind": KINDS.index(kind), "label": visible(rule) or _TITLES[kind], "about": _about(read, kind, rows)})
        groups[-1] |= {"count": f"{len(rows):,} key{'' if len(rows) == 1 else 's'}", "open": is_open}
    return {
        "groups": groups,
        "group": of,
        "unused": [row for group in read.groups.values() if group.kind == "unused" for row in group.rows],
        "source": [_from(read, name) for name in read.sides.specs],
        "facing": _facing(read, nodes) if nodes else [],
        "counts": list(counts.values()),
        "coverage": _coverage(read),
        "ok": read.keymap.ok,
        "past": past,
    }


def _about(read: Reading, kind: str, rows: Sequence[int]) -> str:
    if kind not in ("likely", "certain"):
        return _NOTES[kind]
    reasons = dict.fromkeys(read.pairs[read.sides.names[row]].reason for row in rows)
    return visible(f"{kind} · {next(iter(reasons))}" + (f" (and {len(reasons) - 1} other reasons)" if len(reasons) > 1 else ""))


def _from(read: Reading, name: str) -> int | str:
    """The row of the one source of a target, or words where it is not one source as it stands."""
    if pair := read.pairs.get(name):
        return read.sides.file_row[pair.source] if pair.is_plain else visible(_sum(pair))
    found = read.open[name]
    if isinstance(found, Ambiguous):
        return f"{len(found.candidates)} candidates"
    return DASH if found.source is None else "only in another shape"


def _sum(pair: Pair) -> str:
    """Sources in few words: `layers.0.{q + k + v}.weight`, `in_proj_weight[0:64]`, `lora_merge(…)`."""
    names = list(pair.sources)
    before = _common(names)
    after = _common(names, reverse=True) if len(names) > 1 else ""
    bodies = [name[len(before) : len(name) - len(after)].strip(".") for name in names]
    text = names[0] if len(names) == 1 else f"{before}.{{{' + '.join(bodies)}}}.{after}".strip(".")
    rows = pair.parts[0].rows
    text += f"[{rows[0]}:{rows[1]}]" if len(pair.parts) == 1 and rows else ""
    moved = pair.regroup is not None or any(part.regroup is not None for part in pair.parts)
    return f"{pair.formula}({text})" if pair.formula else text + " reordered" * moved


def _common(names: Iterable[str], *, reverse: bool = False) -> str:
    """The whole segments that all names begin with, or end with."""
    step = -1 if reverse else 1

    def both(a: list[str], b: list[str]) -> list[str]:
        return a if a == b else [x for x, _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=False))]

    return ".".join(reduce(both, (name.split(".")[::step] for name in names))[::step])


def _facing(read: Reading, tree: dict[str, list[Any]]) -> list[list[Any]]:
    """For each group of the tree: what its sources begin with, how many of its tensors are filled, its gravest kind, if it starts open."""
    names, count = read.sides.names, len(tree["row"])
    begins: list[str | None] = [None] * count
    filled, worst = [0] * count, [len(KINDS)] * count
    for node in reversed(range(count)):
        row, parent = tree["row"][node], tree["parent"][node]
        if row >= 0:
            worst[node] = KINDS.index(read.kinds[names[row]])
            if pair := read.pairs.get(names[row]):
                heads = {part.source.rpartition(".")[0] for part in pair.parts if part.source}
                begins[node], filled[node] = heads.pop() if len(heads) == 1 else _common(heads), 1
        if parent >= 0:
            held, above = begins[node], begins[parent]
            if held is not None:
                begins[parent] = held if above is None else above if f"{held}.".startswith(f"{above}.") else _common((above, held))
            filled[parent] += filled[node]
            worst[parent] = min(worst[parent], worst[node])
    few = len(read.open) <= _MAX_OFFERED
    return [
        [f"{visible(head)}.*" if head else "", f"{full:,} of {all_:,}", kind, all_ <= _OPEN_ROWS or (few and full < all_)]
        if row < 0
        else []
        for row, head, full, all_, kind in zip(tree["row"], begins, filled, tree["count"], worst, strict=True)
    ]


def _coverage(read: Reading) -> dict[str, Any]:
    """How much of the model is filled, in words, and as parts of its parameters; tied values count once."""
    numel, nbytes = dict.fromkeys(("certain", "likely", "ambiguous", "unmatched"), 0), 0
    own = {name: spec for name, spec in read.sides.specs.items() if name not in read.sides.tied}
    for name, spec in own.items():
        numel[read.kinds[name]] += spec.numel
        nbytes += spec.nbytes if name in read.pairs else 0
    total, size = sum(numel.values()), sum(spec.nbytes for spec in own.values())
    texts = [f"{len(read.pairs):,} of {len(read.sides.specs):,} tensors"]
    texts += [f"{_percent(numel['certain'] + numel['likely'], total)} of {total:,} parameters"]
    texts += [f"{_percent(nbytes, size)} of {format_bytes(size)}" if all(spec.dtype for spec in own.values()) else f"bytes {DASH}"]
    return {"text": " · ".join(texts), "parts": [[kind, count / total if total else 0] for kind, count in numel.items()]}


def _percent(part: int, whole: int) -> str:
    """Rounded down: nothing short of everything reads as 100 %."""
    return "100 %" if part == whole else f"{math.floor(1000 * part / whole) / 10:g} %"


@outline.collector_paused()
def nodes_of(sides: Sides) -> dict[str, list[Any]]:
    """The model's tree, folded, as parallel arrays in preorder; `row` is -1 for a group."""
    nodes: dict[str, list[Any]] = {"label": [], "parent": [], "row": [], "count": [], "nbytes": [], "depth": []}
    pending = [(child, -1, 0) for child in reversed(outline.tree(sides.specs, sides.tied).children)]
    while pending:
        node, parent, depth = pending.pop()
        index = len(nodes["label"])
        values = (visible(node.label), parent, -1 if node.name is None else sides.row[node.name], node.count, node.nbytes, depth)
        for column, value in zip(nodes.values(), values, strict=True):
            column.append(value)
        pending += [(child, index, depth + 1) for child in reversed(node.children)]
    return nodes


# the panel


def overview(read: Reading) -> Detail:
    """What is said while nothing is selected: the finding, and what one would do next."""
    keymap = read.keymap
    likely = sum(pair.confidence == "likely" for pair in keymap.pairs)
    step = "Every name has a source. Next: wb.load_into(model, source, mapper.keymap)"
    if likely:
        step = (
            f"{likely} of them are likely, not certain: look at these (~) first. " + step.replace("Next: ", "") + " takes them as they are."
        )
    if not keymap.ok:
        step = "Select a row that is open to see what fits it." if read.open else "Take one of the sections by name."
    facts = [["section", f"{keymap.section} · {keymap.section_reason}"]] if keymap.section else []
    return {
        "heading": "✓ all matched" if keymap.ok else "key map",
        "note": visible(keymap.headline),
        "facts": _visible(facts),
        "next": step,
    }


def of_group(read: Reading, group: Group) -> Detail:
    """One rule, or all that is open in one way."""
    kind, rule, rows = group
    reasons = dict.fromkeys(read.pairs[read.sides.names[row]].reason for row in rows) if kind in ("likely", "certain") else {}
    facts = [["keys", f"{len(rows):,}"], ["is", kind], *(["because", reason] for reason in list(reasons)[:5])]
    verbs = [["accept all", "accept"]] if kind == "likely" else []
    verbs += [["reject all", "reject"]] if kind in ("ambiguous", "likely", "certain") else []
    return {"heading": visible(rule) or _TITLES[kind], "note": _NOTES[kind], "facts": _visible(facts), "verbs": verbs}


def of_rows(read: Reading, names: Sequence[str], files: Sequence[str]) -> Detail:
    """Several names at once, or one name of the file."""
    if len(files) == 1 and not names:
        tensor = read.sides.part[files[0]]
        fits = [name for name in read.open if read.sides.specs[name].shape == tensor.shape]
        facts = [["file", f"{tensor.dtype} {format_cell('shape', tensor.shape)}"], ["size", format_bytes(tensor.nbytes)]]
        offered = [(read.sides.row[name], name, "") for name in _likest(files[0], fits, {})]
        picker = _picker("open names of this shape", "a name of the model", offered, len(fits))
        return {"heading": visible(files[0]), "note": "It fills nothing in the model.", "facts": facts, "picker": picker}
    kinds = [read.kinds[name] for name in names]
    facts = [["no source" if kind == "unmatched" else kind, f"{kinds.count(kind):,}"] for kind in KINDS if kind in kinds] + (
        [["unused", f"{len(files):,}"]] if files else []
    )
    verbs = [["accept", "accept"]] if "likely" in kinds else []
    verbs += [["reject", "reject"]] if set(kinds) - {"unmatched"} else []
    return {"heading": f"{len(names) + len(files):,} names selected", "facts": facts, "verbs": verbs}


def of_target(read: Reading, name: str) -> Detail:
    """One name of the model: how it is filled and why, and what else would fit."""
    spec, pair, found, part = read.sides.specs[name], read.pairs.get(name), read.open.get(name), read.sides.part
    kind = read.kinds[name]
    facts = [["model", f"{spec.dtype or DASH} {format_cell('shape', spec.shape)}"]]
    candidates: tuple[str, ...] = ()
    if pair:
        types = dict.fromkeys(f"{part[source].dtype} {format_cell('shape', part[source].shape)}" for source in pair.sources)
        shared = [other for source in pair.sources for other in read.fills[source] if other != name]
        code = KeyMap((pair,)).code().splitlines()[-2].strip().removeprefix(f"{name!r}: ").rstrip(",")
        facts += [["file", ", ".join(types)], ["rule", pair.rule], ["is", kind]]
        facts += [["name in the file", pair.source] if pair.is_plain else ["how it is made", code]]
        facts += [["fills besides", ", ".join(shared[:4]) + (" …" if len(shared) > 4 else "")]] if shared and pair.is_plain else []
    elif isinstance(found, Ambiguous):
        candidates = found.candidates
        facts += [["is", kind]]
    elif found:
        facts += [["is", _TITLES[kind]]] + ([["nearest in the file", found.source]] if found.source else [])
    verbs = [["accept", "accept"]] if kind == "likely" else []
    verbs += [["none of these" if kind == "ambiguous" else "reject", "reject"]] if kind != "unmatched" else []
    fits = {source: None for source in read.sides.by_shape.get(spec.shape, ()) if not pair or source not in pair.sources}
    names = candidates or _likest(name, fits, read.fills)
    label = "candidates" if candidates else "other sources of this shape" if pair else "sources of this shape"
    offered = [(read.sides.file_row[s] if s in fits else -1, s, _note(read, s) if s in fits else _UNFIT) for s in names]
    picker = _picker(label, "a name of the file", offered, len(candidates) or len(fits))
    reason = pair.reason if pair else found.reason if found else ""
    detail = {"heading": visible(name), "note": visible(reason), "facts": _visible(facts), "verbs": verbs}
    if offered:
        return {**detail, "picker": picker}
    return {**detail, "next": f"No {'other ' if pair else ''}tensor of the file has this shape."}


def _note(read: Reading, source: str) -> str:
    filled = read.fills.get(source)
    return visible(f"fills {filled[0]}" + (f" and {len(filled) - 1} more" if len(filled) > 1 else "")) if filled else ""


def _likest(name: str, others: Iterable[str], fills: Mapping[str, Any]) -> list[str]:
    """In the order in which a person would try them: unused first, then by how much of the name's end agrees."""

    def order(other: str) -> tuple[bool, int, list[Any]]:
        return other in fills, -len(_common((name, other), reverse=True).split(".")), natural_key(other)

    return sorted(others, key=order)[:_MAX_OFFERED]


def _picker(label: str, what: str, rows: Sequence[tuple[int, str, str]], total: int) -> Detail:
    told = f"{label} · {total:,}" + (f", {len(rows):,} shown; type any other" if total > len(rows) else "")
    return {"label": told, "what": what, "rows": [[row, visible(name), note] for row, name, note in rows]}


def _visible(facts: Sequence[Sequence[str]]) -> list[list[str]]:
    return [[label, visible(value)] for label, value in facts]
