"""How a shape becomes another, and how blocks and whole files are laid out: matrices kept as [in, out], convolutions with their channels
last, rows in rotary order, experts stacked or one by one.

Each of the functions on blocks and files looks at one search of inference.py and mends or withdraws what it has paired.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from workbench.keymap.conventions import IN_OUT
from workbench.keymap.fusions import Item
from workbench.keymap.maps import Ambiguous, Pair, Part, Regroup
from workbench.keymap.naming import Indices, Name
from workbench.keymap.rules import role_of, rotary_order, words_of

if TYPE_CHECKING:
    from workbench.keymap.containers import Pairing
    from workbench.keymap.inference import Search

Shape = tuple[int, ...]


class Fit(NamedTuple):
    """How a shape becomes another: nothing, a reshape, or a transpose."""

    kind: str
    regroup: Regroup | None


SAME = Fit("", None)


@lru_cache(maxsize=1 << 14)
def fit(source: Shape, target: Shape, turned: bool = False) -> Fit | None:
    if turned and len(source) == len(target) > 1:
        axes = (len(source) - 1, len(source) - 2, *range(len(source) - 2))
        moved = tuple(source[axis] for axis in axes)
        return Fit("transposed", Regroup(source, axes, target)) if moved == target else None
    if source == target:
        return SAME
    bare = tuple(n for n in source if n != 1)
    if bare == tuple(n for n in target if n != 1):
        return Fit("reshaped", Regroup(source, tuple(range(len(source))), target))
    if len(bare) == 2 and bare[::-1] == target:
        return Fit("transposed", Regroup(bare, (1, 0), target))
    return None


def in_out(name: str) -> bool:
    """Whether a matrix of this name is kept as [in, out]."""
    return name.endswith(IN_OUT) or name == "proj"  # of a CLIP tower by itself


_LAST = "channels last"


def channels_last(search: Search) -> bool:
    """Whether one of the two sides keeps its convolutions as [out, height, width, in]: some fit only so, and none as it is. The file's are
    then read as the target wants them."""
    kinds, shapes = search.wanted.kinds, search.wanted.shapes
    wanted = {s for n, s in shapes.items() if len(s) > 2 and n.endswith("weight") and "Conv" in kinds.get(n, "Conv")}
    held = [item for name, item in search.items.items() if wanted and len(item.shape) > 2 and name.endswith("weight")]
    for axes in ((0, -1, *range(1, 9)), (0, *range(2, 9), 1)):  # the channels of the file stand last, or those of the target
        moved = {item.name: _moved(item.shape, axes) for item in held if item.parts == (Part(item.name),) and not item.formula}
        fits = {(regroup.view in wanted, regroup.shape in wanted) for regroup in moved.values()}
        if (False, True) in fits and (True, False) not in fits:
            for name, regroup in moved.items():
                if regroup.shape in wanted:
                    part = Part(name, shape=regroup.view)
                    search.items[name] = search.items[name]._replace(shape=regroup.shape, parts=(part,), note=_LAST, after=regroup)
            return True
    return False


def _moved(shape: Shape, axes: tuple[int, ...]) -> Regroup:
    order = tuple(dict.fromkeys(axis % len(shape) for axis in axes if axis < len(shape)))
    return Regroup(shape, order, tuple(shape[axis] for axis in order))


def stack(search: Search) -> bool:
    """Experts that the source lists one by one, as the one tensor that the target may want of them; whether there are such."""
    if not any(".experts." in told.role for told in search.target_names.values()):
        return False
    lists: dict[tuple[str, Indices, str], dict[int, str]] = defaultdict(dict)
    for name, told in search.source_names.items():
        if told.context.endswith(".experts.#"):
            lists[told.context, told.indices[:-1], told.role][told.indices[-1]] = name
    stacks: dict[tuple[str, Indices], dict[str, list[str]]] = defaultdict(dict)
    for (context, outer, role), held in lists.items():
        names = [held[i] for i in sorted(held)]
        if sorted(held) == list(range(len(held))) and search.items[names[0]].shape and len({search.items[n].shape for n in names}) == 1:
            stacks[context, outer][role.strip(".").removesuffix(".weight").removeprefix("mlp.")] = names
    for (context, outer), found in stacks.items():
        whole = context.removesuffix(".#")
        cut = whole.rfind("#") + 1
        inner = role_of(words_of(f"{whole[cut:]}."), True).rstrip(".")
        if {"gate", "up"} <= found.keys():
            found["gateup"] = [name for pair in zip(found["gate"], found["up"], strict=True) for name in pair]
        for word, names in found.items():
            shape = search.items[names[0]].shape
            count = len(names) // (2 if word == "gateup" else 1)
            full = (count, shape[0] * len(names) // count, *shape[1:])
            name = f"{whole}{outer} {word}"
            parts = tuple(Part(n, None, (0, shape[0]), shape) for n in names)
            joined = (shape[0] * len(names), *shape[1:])
            after = Regroup(joined, tuple(range(len(joined))), full)
            search.items[name] = Item(name, full, search.items[names[0]].dtype, parts, note=f"{count} experts stacked", after=after)
            search.shapes[0][name] = full
            search.source_names[name] = Name(name, whole[:cut], outer, f"{inner}.{word}.", name)
    return bool(stacks)


_NUMBERED = re.compile(r"\.([a-z]+_?\d+)\.[^.]+$", re.I)


def renumber(search: Search) -> bool:
    """Read `w1`, `w2`, `w3` (`fc1` …) as bare words where their shapes refute what they mean by convention, or a third stands beside two
    that have a meaning; whether there are such."""
    found = False
    for names, contexts, shapes in zip((search.source_names, search.target_names), search.by_context, search.shapes, strict=True):
        for roles in [roles for context, blocks in contexts.items() if context for roles in blocks.values()]:
            for unit in [role[:-12] for role in roles if role.endswith("down.weight.")]:
                gate, up, down = (shapes[held[0]] if (held := roles.get(f"{unit}{w}.weight.")) else () for w in ("gate", "up", "down"))
                words = ("fc", "w", "lin", "linear")
                known = gate == up if gate and up else not any(f"{unit}{word}:3.weight." in roles for word in words)
                if known and (not up or down[:1] == up[1:2] or down[1:2] == up[:1]):
                    continue
                for role in [f"{unit}{word}.{param}." for word in ("gate", "up", "down") for param in ("weight", "bias")]:
                    for name, told in [(name, _NUMBERED.search(names[name].bare)) for name in roles.get(role, ())]:
                        if told:
                            names[name] = names[name]._replace(role=f"{unit}{told[1].lower()}.{role.split('.')[-2]}.")
                            found = True
    return found


def unstack(search: Search, p: Pairing) -> None:
    """Experts that the target lists one by one, cut out of the one tensor that the source has of them."""
    for context in search.experts_in.get(p.target, ()):
        held = search.by_context[1][context]
        inner = role_of(words_of(f"{context.removesuffix('.#')[len(p.target) :]}."), True).rstrip(".")
        if not any(role.startswith(f"{inner}.") for block in search.by_context[0][p.source].values() for role in block):
            continue
        totals = Counter(indices[:-1] for indices in held)
        for indices, roles in held.items():
            ours, total = search.by_context[0][p.source].get(p.indices.get(indices[:-1], ()), {}), totals[indices[:-1]]
            for role, targets in roles.items():
                word = role.strip(".").removesuffix(".weight").removeprefix("mlp.")
                for stored, half in ((word, 0), ("gateup", 0 if word == "gate" else 1)):
                    source = next(iter(ours.get(f"{inner}.{stored}.", ())), None)
                    if source is None or targets[0] in search.pairs or (stored == "gateup" and word not in ("gate", "up")):
                        continue
                    shape, wanted = search.items[source].shape, search.wanted.shapes[targets[0]]
                    times = 2 if stored == "gateup" else 1
                    if shape != (total, times * wanted[0], *wanted[1:]):
                        continue
                    flat = (shape[0] * shape[1], *shape[2:])
                    at = indices[-1] * shape[1] + half * wanted[0]
                    part = Part(source, Regroup(shape, tuple(range(len(shape))), flat), (at, at + wanted[0]), shape)
                    search.pairs[targets[0]] = Pair(
                        targets[0], (part,), "experts taken apart", "likely", f"expert {indices[-1]} of {source!r}"
                    )
                    search.used.add(source)


def orient(search: Search, p: Pairing, names: list[str]) -> None:
    """What the matrices of a container tell of each other: a square one is transposed like the oblong ones, and those are so all or none."""
    mine = [pair for name in names if not (pair := search.pairs[name]).formula]
    shapes, kinds = search.wanted.shapes, search.wanted.kinds
    turned = {
        pair.target
        for pair in mine
        if (1, 0) in [told.axes for told in (pair.regroup, *[part.regroup for part in pair.parts]) if told is not None]
    }
    square = {pair.target for pair in mine if _is_square(search, pair)}
    straight = {t for pair in mine if len(shapes[t := pair.target]) == 2 and shapes[t][0] != shapes[t][1] and t not in turned | square}
    for pair in [pair for pair in mine if straight and pair.rule.endswith(", transposed")]:
        if not pair.source.endswith(IN_OUT) and not pair.target.endswith(IN_OUT) and kinds.get(pair.target) != "Conv1D":
            withdraw(search, pair, "only transposed it would fit, and other matrices of the block fit as they are")
            turned.discard(pair.target)
    classes, others = {kinds.get(name) for name in turned}, {kinds.get(name) for name in straight}
    for pair in [pair for pair in mine if turned and pair.target in (search.pairs.keys() & square) - turned]:
        kind = kinds.get(pair.target)
        if pair.regroup is not None or any(part.regroup is not None for part in pair.parts):
            continue
        if kind is not None and (kind in classes or not straight):
            _transpose(search, pair, "layer kind" if kind in classes else "block")
        elif kind is None or kind not in others:
            withdraw(search, pair, "other matrices of the block are transposed, and nothing tells whether this square one is")


class _Lies(NamedTuple):
    """The roles of oblong matrices of one layer kind that fit transposed, and of those that fit as they are."""

    turned: set[str]
    straight: set[str]


def agreed(search: Search) -> None:
    """What is transposed or has its channels last proves nothing by itself: it counts where a word or a layer kind says so, or where
    several agree. Where they do, what fits both ways is no exception."""
    kinds = search.wanted.kinds
    if all(pair.regroup is None and pair.parts[0].regroup is None for pair in search.pairs.values()):
        return
    lies: dict[str | None, _Lies] = defaultdict(lambda: _Lies(set(), set()))
    for target, pair in search.pairs.items():
        for turned in () if pair.formula or not _is_linear(search, target) else _lie(search, pair):
            lies[kinds.get(target)][not turned].add(search.target_names[target].role)
    lonely = [p for p in search.pairs.values() if p.rule.endswith(", transposed") and not in_out(p.source) and not in_out(p.target)]
    alone = len({search.target_names[p.target].role for p in lonely}) < 2
    for pair in lonely if alone else ():
        if kinds.get(pair.target) != "Conv1D":
            withdraw(search, pair, f"{_both(search, pair)}: only a transposed shape")
    if any(lie.turned for lie in lies.values()):
        _squares(search, lies, alone)
    if search.channels_last:
        _convolutions(search)


def _convolutions(search: Search) -> None:
    """Those whose channels are moved: a kernel's height and width, which stand together, prove it, and several lengths do."""
    moved = [pair for pair in search.pairs.values() if pair.rule.endswith(_LAST) and pair.regroup]
    only = {pair.regroup.view for pair in moved if pair.regroup and pair.regroup.view != pair.regroup.shape}
    for pair in moved:
        shape = search.wanted.shapes[pair.target]
        if len(only) < 2 and not any(len(view) > 3 for view in only):
            withdraw(search, pair, f"{_both(search, pair)}: one may have its channels last, and nothing else tells")
        elif shape[0] == shape[1] and "Transpose" in search.wanted.kinds.get(pair.target, "Transpose"):
            withdraw(search, pair, "one side keeps its channels last, and of a transposed convolution nothing tells which are the outputs")
        else:
            told = "the convolutions fit only so: one side keeps their channels last"
            search.pairs[pair.target] = replace(pair, confidence="likely", reason=told)


def _both(search: Search, pair: Pair) -> str:
    return f"{list(search.tensors[pair.source].shape)} in the file and {list(search.wanted.shapes[pair.target])} in the model"


def _is_linear(search: Search, target: str) -> bool:
    """Whether it may be the matrix of a linear layer: no table that rows are looked up in, and not tied to one."""
    ties = search.wanted.ties
    alike = {target, ties.get(target, target)} | ({name for name, kept in ties.items() if kept == target} if ties else set())
    table = any("emb" in (search.wanted.kinds.get(n) or f"{n}{search.target_names[n].role}").lower() for n in alike)
    return target.endswith("weight") and len(search.wanted.shapes[target]) == 2 and not table and not in_out(target)


def _lie(search: Search, pair: Pair) -> list[bool]:
    """For each oblong matrix that a pair takes, whether it is transposed."""
    held = [(part, search.items[part.source].shape) for part in pair.parts if part.source in search.items and not in_out(part.source)]
    return [
        (1, 0) in [told.axes for told in (pair.regroup, part.regroup) if told is not None]
        for part, shape in held
        if len(shape) == 2 and shape[0] != shape[1]
    ]


def _squares(search: Search, lies: Mapping[str | None, _Lies], alone: bool) -> None:
    """A square matrix fits both ways: where most of the oblong ones of its layer kind, or of the file, are transposed, it may be so too."""
    whole = _Lies(set().union(*[lie.turned for lie in lies.values()]), set().union(*[lie.straight for lie in lies.values()]))
    for pair in [pair for pair in search.pairs.values() if not pair.formula and _is_linear(search, pair.target)]:
        kind = search.wanted.kinds.get(pair.target)
        lie = lies.get(kind, whole)
        square = _is_square(search, pair) and not any(in_out(part.source) for part in pair.parts)
        turned = any(told is not None and told.axes == (1, 0) for told in (pair.regroup, *[part.regroup for part in pair.parts]))
        if not square or turned or len(lie.turned) <= len(lie.straight):
            continue
        if kind is None or kind not in lies or lie.straight or alone or pair.regroup or any(part.regroup for part in pair.parts):
            withdraw(search, pair, "other matrices of the file are transposed, and nothing tells whether this square one is")
        else:
            _transpose(search, pair, "layer kind")


def _is_square(search: Search, pair: Pair) -> bool:
    """Whether all that it is made of are square matrices, which fit transposed as they do straight."""
    shapes = [search.shapes[0].get(part.source, ()) for part in pair.parts]
    return all(len(shape) == 2 and shape[0] == shape[1] for shape in shapes)


def _transpose(search: Search, pair: Pair, like: str) -> None:
    shapes = [search.shapes[0][part.source] for part in pair.parts]
    parts = tuple(part._replace(regroup=Regroup(s, (1, 0), s), shape=s) for part, s in zip(pair.parts, shapes, strict=True))
    told = f"the other matrices of its {like} are transposed, and a square one is too"
    search.pairs[pair.target] = replace(pair, parts=parts, rule=f"{p_rule(pair)}, transposed", confidence="likely", reason=told)


def withdraw(search: Search, pair: Pair, why: str) -> None:
    del search.pairs[pair.target]
    search.used.difference_update(pair.sources)
    search.ambiguous[pair.target] = Ambiguous(pair.target, pair.sources, why)


UNTOLD_ROWS = "its rows may be in the order of Meta's rotary embeddings or of transformers'"
POSITIONS = re.compile(r"\.emb\.pos\.|\.relative\.|\.relpos\.")  # of a model that turns no rows


def turn(search: Search, p: Pairing, names: list[str]) -> None:
    """The row order of rotary embeddings: regrouped where both sides' conventions and the heads are known, left open where not."""
    roles = {name: search.target_names[name].role for name in names}
    names = [n for n in names if re.match(r"\.attn\.[qk]\.", roles[n]) or (".attn.qkv." in roles[n] and len(search.pairs[n].parts) == 3)]
    sides = [search.by_context[0][p.source].values(), search.by_context[1][p.target].values()]
    gated = bool(names) and any(".gate" in role for blocks in sides for block in blocks for role in block)
    if not gated or any(POSITIONS.search(role) for role in search.roles):
        return
    orders = [rotary_order(name for block in blocks for names in block.values() for name in names) for blocks in sides]
    fused = any(".attn.qkv." in role for blocks in sides for block in blocks for role in block)
    orders = [("" if fused else "pairs") if order == "apart" else order for order in orders]
    for name in names if not orders[0] == orders[1] != "" else ():
        pair, word = search.pairs[name], roles[name].split(".")[2]
        if pair.confidence == "certain":
            continue
        shape, counts = search.wanted.shapes[name], [search.wanted.heads(each) for each in word if each != "v"]
        turned = [(*both, both[0].shape or shape) for both in zip(pair.parts, counts, strict=False)]  # of a fused matrix without the values
        known = pair.is_plain or (len(pair.parts) == 3 and not any(part.regroup for part in pair.parts))
        if "" in orders or not known or any(not heads or rows[0] % (2 * heads) for part, heads, rows in turned if part.source):
            why = "the names do not tell" if "" in orders else "the number of heads is not known"
            withdraw(search, pair, f"{UNTOLD_ROWS}, and {why}")
            continue
        parts = tuple(p._replace(regroup=_halves(orders[0], n, rows), shape=rows) if p.source else p for p, n, rows in turned)
        search.pairs[name] = replace(
            pair,
            parts=parts + pair.parts[len(parts) :],
            rule=f"{pair.rule}, rotary rows regrouped",
            confidence="likely",
            reason=f"{orders[0]} in the file, {orders[1]} in the model; {counts[0]} heads",
        )


def _halves(order: str, heads: int, shape: Shape) -> Regroup:
    half, rest = shape[0] // heads // 2, shape[1:]
    view = (heads, half, 2, *rest) if order == "pairs" else (heads, 2, half, *rest)
    return Regroup(view, (0, 2, 1, *range(3, 3 + len(rest))), shape)


def p_rule(pair: Pair) -> str:
    return "same block" if pair.confidence == "certain" else pair.rule
