"""Which container of the source stands in the place of each of the target's, and which of its numbers stand for which.

A container is a repeated block by its path (`.layers.#`). Two are compared by how many roles and shapes agree in their blocks; blocks
of one form are compared once, and so are containers that hold the same blocks. What fits equally well is left open and said.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping
from functools import lru_cache
from itertools import islice, pairwise
from typing import TYPE_CHECKING, NamedTuple

from workbench.keymap.conventions import IN_OUT
from workbench.keymap.fusions import fused_from
from workbench.keymap.layouts import SAME, fit
from workbench.keymap.maps import Ambiguous
from workbench.keymap.naming import Block, Indices, count_alike, domain, in_runs, opposed, shown, together, words_in
from workbench.keymap.rules import role_of

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


SAME_NUMBERS = "the same numbers"
_MOST_CONTAINERS = 4096  # pairs of them
_TOWERS = frozenset({"vision", "text", "audio"})


def number_first(search: Search) -> bool:
    """Read `patch_embeddings.0.proj` and `norm.0` as parts of a block 0, where the other side has `stages.0.patch_embeddings.proj`.

    Returns whether any name is read so.
    """
    found = False
    many = sum(map(len, search.by_context)) > _MOST_CONTAINERS  # no model
    for side, names in enumerate((search.source_names, search.target_names)):
        theirs = search.by_context[1 - side]
        holding: dict[str, list[str]] = defaultdict(list)  # role -> containers of the other side
        for context, blocks in theirs.items() if not many else ():
            for role in next(iter(blocks.values())) if context else ():
                holding[role].append(context)
        for context, blocks in search.by_context[side].items() if holding else ():
            roles, words = next(iter(blocks.values())), context.split(".")[1:-1]
            if context in theirs or not context.endswith(".#") or set.intersection(*(set(holding.get(role, ())) for role in roles)):
                continue
            for cut in range(len(words)):
                inner, outer = "".join(f".{word}" for word in words[cut:]), "".join(f".{word}" for word in words[:cut])
                there = holding.get(role_of(f"{inner}{next(iter(roles))}", True), ())
                if sum(_inside(blocks, theirs[other], inner, search.shapes[side], search.shapes[1 - side]) for other in there) == 1:
                    for role, name in [(role, name) for block in blocks.values() for role, held in block.items() for name in held]:
                        names[name] = names[name]._replace(context=f"{outer}.#", role=role_of(f"{inner}{role}", True))
                    found = True
                    break
    return found


def _inside(
    ours: dict[Indices, Block], theirs: dict[Indices, Block], inner: str, shapes: Mapping[str, Shape], wanted: Mapping[str, Shape]
) -> bool:
    """Whether each block of one is a part of the other's, one after the other, with these words before its roles."""
    if len(ours) != len(theirs) or len(ours) < 2:
        return False
    for mine, other in zip(sorted(ours), sorted(theirs), strict=True):
        for role, names in ours[mine].items():
            there = theirs[other].get(role_of(f"{inner}{role}", True), ())
            if len(there) != 1 or wanted[there[0]] != shapes[names[0]]:
                return False
    return True


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
    compared: dict[tuple[int, int, bool], tuple[dict[Indices, Indices], str, int] | None] = {}
    options: dict[str, list[tuple[tuple[int, ...], Pairing]]] = {}
    many = len(sources) * len(targets) > _MOST_CONTAINERS  # no model: only equal ones are compared
    lists = [[len(blocks) for context, blocks in side.items() if context] for side in (sources, targets)]
    only = lists[0] == lists[1] and len(lists[0]) == 1 < lists[0][0]  # the one list of both sides, of as many blocks
    for target, held in targets.items():
        scored, whole = [], sum(map(len, held.values()))
        for source in [target] if many else sources:
            if source and source in sources and (source == target or (target and not opposed(source, target))):
                key = id(ours[source]), id(theirs[target]), source == target
                if key not in compared:
                    compared[key] = _compared(ours[source], theirs[target], one_name=source == target)
                p = Pairing(source, target, *read) if (read := compared[key]) else None
                forms = {*ours[source].values(), *theirs[target].values()} if p and p.reading != SAME_NUMBERS else ()
                if forms and len(set(map(frozenset, forms))) < 3:  # no shape tells it
                    p = p if _count_alike(search, source, target) else None
                if p is not None and p.filled and (only or source == target or 2 * p.filled >= whole):
                    shared = len(words_in(source) & words_in(target))
                    scored.append(((p.filled, source == target, shared, -len(sources[source])), p))
        options[target] = sorted(scored, key=lambda entry: entry[0], reverse=True)
    own = {
        t for t, scored in options.items() if any(p.source == t and 2 * p.filled >= sum(map(len, targets[t].values())) for _, p in scored)
    }
    for target in options:  # what stands under one name on both sides goes nowhere else
        options[target] = [(score, p) for score, p in options[target] if p.source == target or p.source not in own]
    often = Counter(p.source for scored in options.values() for _, p in scored)
    for target, held in targets.items():
        whole, alone = sum(map(len, held.values())), len(options[target]) == 1
        options[target] = [
            (score, p) for score, p in options[target] if only or _explains(p, whole, len(held), alone and often[p.source] == 1)
        ]
    return options


def _count_alike(search: Search, source: str, target: str) -> bool:
    """Whether the numbers of two containers that hold one thing many times count the same way: under one word they do."""
    if source.split(".")[-2] == target.split(".")[-2]:
        return True
    runs = [[(context, i) for i in side[context]] for context, side in zip((source, target), search.by_context, strict=True)]
    names = [[told.bare for told in side.values()] for side in (search.source_names, search.target_names)]
    return count_alike(runs[0], runs[1], all(together(side) and in_runs(side) for side in names))


def _explains(p: Pairing, whole: int, blocks: int, alone: bool) -> bool:
    """Whether half of the tensors agree; less is enough, in all blocks, for two of one word that agree with no other container at all."""
    alike = alone and p.source.split(".")[-2] == p.target.split(".")[-2] and len(p.indices) == blocks > 1
    return p.source == p.target or p.filled >= whole or alike


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


def _compared(ours: Layout, theirs: Layout, *, one_name: bool) -> tuple[dict[Indices, Indices], str, int] | None:
    """How the numbers of one may stand for those of the other, and how many tensors agree then; under one name, the same numbers where
    the file has all of them and no shape speaks against it."""
    numbered: list[tuple[dict[Indices, Indices], str]] = []
    as_named = one_name and theirs.keys() <= ours.keys() and not any(_clashes(ours[i], form) for i, form in theirs.items())
    depth = {len(i) for i in ours} | {len(i) for i in theirs}
    if len(depth) == 1 and theirs.keys() & ours.keys():
        numbered.append(({i: i for i in theirs if i in ours}, SAME_NUMBERS))
    if len(depth) == 1 and not as_named:
        low = [tuple(min(column) for column in zip(*held, strict=True)) for held in (ours, theirs)]
        shift = tuple(a - b for a, b in zip(*low, strict=True))
        moved = {i: tuple(n + d for n, d in zip(i, shift, strict=True)) for i in theirs} if any(shift) else {}
        if moved and all(i in ours for i in moved.values()):
            numbered.append((moved, f"numbers moved by {', '.join(map(str, shift))}"))
    if ours.keys() != theirs.keys() and not as_named:
        alike = sorted(ours) if len(ours) == len(theirs) else _alike(ours, theirs)
        numbered += [(dict(zip(sorted(theirs), alike, strict=True)), "one after the other")] if len(alike) == len(theirs) else []
    read = [
        (indices, told, max(0, sum(_agreement(ours[mine], theirs[i]) for i, mine in indices.items() if mine in ours)))
        for indices, told in numbered
    ]
    return max(read, key=lambda entry: entry[2]) if read else None  # of equals the first, which is the simplest


def _alike(ours: Layout, theirs: Layout) -> list[Indices]:
    """The numbers that hold what the other's blocks hold, in order: an embedding and a head may be counted among the blocks."""
    forms = set(theirs.values())
    fits = {form for form in set(ours.values()) if any(_agreement(form, other) > 0 for other in forms)}
    found = sorted(index for index, form in ours.items() if form in fits)
    gaps = any(len(one) == 1 and one[0] + 1 != other[0] for one, other in pairwise(found))  # layers of two kinds: which go is not told
    return [] if gaps else found


@lru_cache(maxsize=1 << 14)
def _clashes(ours: Form, theirs: Form) -> bool:
    """Whether a role of both has shapes that do not fit."""
    held = {role: (shape, in_out) for role, shape, in_out in ours}
    return any(role in held and fit(held[role][0], shape, held[role][1] != in_out) is None for role, shape, in_out in theirs)


@lru_cache(maxsize=1 << 14)
def _agreement(ours: Form, theirs: Form) -> int:
    """How many tensors agree in role and shape, and in shape alone where no other role is shared; one of another shape speaks against it."""
    held = {role: (shape, in_out) for role, shape, in_out in ours}
    count = shared = 0
    wanted_roles = {role for role, _, _ in theirs}
    for role, wanted, in_out in theirs:
        if role in held:
            shape, other = held[role]
            how = fit(shape, wanted, other != in_out)
            count += 2 if how is SAME else 1 if how else -2
            shared += 1
        elif fused_from(role) & held.keys():
            count += 1
    if count >= 0 and shared < len(theirs):  # what is left may be one with the other's under its own words
        rest = [[(role, shape) for role, shape, _ in form if role not in known] for form, known in ((ours, wanted_roles), (theirs, held))]
        mine, others = (Counter((role.rpartition(".")[0].rpartition(".")[2], shape) for role, shape in form) for form in rest)
        count += (1 if shared else 2) * len(rest[1]) * (mine == others)
    return count
