"""Which container of the source stands in the place of each of the target's, and which of its numbers stand for which.

A container is a repeated block by its path (`.layers.#`). Two are compared by how many roles and shapes agree in their blocks; blocks
of one form are compared once, and so are containers that hold the same blocks. What fits equally well is left open and said.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from workbench.keymap.fusions import fused_from
from workbench.keymap.layouts import IN_OUT, SAME, fit
from workbench.keymap.maps import Ambiguous
from workbench.keymap.naming import Block, Indices, domain, opposed, shown, words_in

if TYPE_CHECKING:
    from workbench.keymap.inference import Search

Shape = tuple[int, ...]
Form = tuple[tuple[str, Shape, bool], ...]  # of a block: role, shape, kept as [in, out]
Layout = dict[Indices, Form]  # of a container


class Pairing(NamedTuple):
    """A container of the source in the place of one of the target, and which numbers stand for which."""

    source: str
    target: str
    indices: dict[Indices, Indices]  # target's -> source's
    reading: str
    filled: int


_MOST_CONTAINERS = 4096  # pairs of them
_TOWERS = frozenset({"vision", "text", "audio"})


def pairings(search: Search) -> list[Pairing]:
    """One container of the source for each of the target, where exactly one explains most of it."""
    options = _options(search)
    best_of: dict[tuple[str, tuple[int, ...]], list[Pairing]] = defaultdict(list)  # (source, score) -> those that it is the best for
    for scored in options.values():
        for score, p in scored[:1]:
            best_of[p.source, score].append(p)
    chosen: dict[str, Pairing] = {}  # by the source's container
    done: set[str] = set()
    for target, scored in sorted(options.items(), key=lambda entry: entry[1][0][0] if entry[1] else (0,), reverse=True):
        free = [entry for entry in scored if entry[1].source not in chosen]
        if not free:
            continue
        top, best = free[0]
        rivals = [p for score, p in free[1:] if score == top]
        if best.source != target and not domain(target) & _TOWERS:  # a word that both towers share tells nothing
            own = domain(best.source) & _TOWERS
            rivals += [p for score, p in free[1:] if score[0] == top[0] and domain(p.source) & _TOWERS != own and p not in rivals]
        rivals += [p for p in best_of[best.source, top] if p.target != target and p.target not in done]
        if rivals:
            _doubt(search, target, [best, *rivals])
            continue
        chosen[best.source] = best
        done.add(target)
    return list(chosen.values())


def _options(search: Search) -> dict[str, list[tuple[tuple[int, ...], Pairing]]]:
    """Every container of the target, and what may stand in its place: (score, pairing), the best first."""
    sources, targets = search.by_context
    known: dict[Hashable, Layout] = {}
    ours, theirs = (_layouts(blocks, shapes, known) for blocks, shapes in zip(search.by_context, search.shapes, strict=True))
    compared: dict[tuple[int, int], tuple[dict[Indices, Indices], str, int] | None] = {}
    options: dict[str, list[tuple[tuple[int, ...], Pairing]]] = {}
    many = len(sources) * len(targets) > _MOST_CONTAINERS  # no model: only equal ones are compared
    for target, held in targets.items():
        scored, whole = [], sum(map(len, held.values()))
        for source in [target] if many else sources:
            if source and source in sources and (source == target or (target and not opposed(source, target))):
                key = id(ours[source]), id(theirs[target])
                if key not in compared:
                    compared[key] = _compared(ours[source], theirs[target])
                p = Pairing(source, target, *read) if (read := compared[key]) else None
                if p is not None and p.filled and (source == target or p.filled >= whole):
                    shared = len(words_in(source) & words_in(target))
                    scored.append(((p.filled, source == target, shared, -len(sources[source])), p))
        options[target] = sorted(scored, key=lambda entry: entry[0], reverse=True)
    return options


def _doubt(search: Search, context: str, readings: list[Pairing]) -> None:
    names = ", ".join(sorted({shown(p.source) for p in readings}))
    for indices, roles in search.by_context[1][context].items():
        held = [search.by_context[0][p.source].get(p.indices.get(indices, ()), {}) for p in readings]
        for role, targets in roles.items():
            candidates = tuple(islice(dict.fromkeys(s for block in held for s in block.get(role, ())), 8))
            if candidates:
                for target in targets:
                    search.ambiguous[target] = Ambiguous(target, candidates, f"{names} fit equally well")


def _layouts(
    containers: Mapping[str, dict[Indices, Block]], shapes: Mapping[str, Shape], known: dict[Hashable, Layout]
) -> dict[str, Layout]:
    """Each container's layout; equal ones are one object."""
    forms: dict[Form, Form] = {}
    out = {}
    for context, blocks in containers.items():
        layout = {}
        for indices, roles in blocks.items() if context else ():
            form = tuple([(role, shapes[names[0]], names[0].endswith(IN_OUT)) for role, names in roles.items()])
            layout[indices] = forms.setdefault(form, form)
        out[context] = known.setdefault(tuple(layout.items()), layout)
    return out


def _compared(ours: Layout, theirs: Layout) -> tuple[dict[Indices, Indices], str, int] | None:
    """How the numbers of one may stand for those of the other, and how many tensors agree then."""
    numbered: list[tuple[dict[Indices, Indices], str]] = []
    depth = {len(i) for i in ours} | {len(i) for i in theirs}
    if len(depth) == 1:
        if theirs.keys() & ours.keys():
            numbered.append(({i: i for i in theirs if i in ours}, "the same numbers"))
        low = [tuple(min(column) for column in zip(*held, strict=True)) for held in (ours, theirs)]
        shift = tuple(a - b for a, b in zip(*low, strict=True))
        moved = {i: tuple(n + d for n, d in zip(i, shift, strict=True)) for i in theirs} if any(shift) else {}
        if moved and all(i in ours for i in moved.values()):
            numbered.append((moved, f"numbers moved by {', '.join(map(str, shift))}"))
    if len(ours) == len(theirs) and ours.keys() != theirs.keys():
        numbered.append((dict(zip(sorted(theirs), sorted(ours), strict=True)), "one after the other"))
    read = [
        (indices, told, max(0, sum(_agreement(ours[mine], theirs[i]) for i, mine in indices.items() if mine in ours)))
        for indices, told in numbered
    ]
    return max(read, key=lambda entry: entry[2]) if read else None  # of equals the first, which is the simplest


@lru_cache(maxsize=1 << 14)
def _agreement(ours: Form, theirs: Form) -> int:
    """How many tensors agree in role and shape; in shape alone where no role is shared. A role of another shape speaks against it."""
    held = {role: (shape, in_out) for role, shape, in_out in ours}
    count = shared = 0
    for role, wanted, in_out in theirs:
        if role in held:
            shape, other = held[role]
            how = fit(shape, wanted, other != in_out)
            count += 2 if how is SAME else 1 if how else -2
            shared += 1
        elif fused_from(role) & held.keys():
            count += 1
    if not shared:
        mine, others = (Counter((role.rpartition(".")[0].rpartition(".")[2], shape) for role, shape, _ in form) for form in (ours, theirs))
        count += 2 * len(theirs) * (mine == others)
    return count
