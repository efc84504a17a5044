"""What each name and shape allows by itself and all of them together speak against: such pairs are withdrawn, and it is told why.

Each of the functions looks at one search of inference.py when all pairs are made.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from workbench.checkpoint import Finding
from workbench.dtypes import DTYPES
from workbench.keymap.conventions import BY_HEADS, EITHER_WAY, IN_OUT, MERGED
from workbench.keymap.layouts import withdraw
from workbench.keymap.maps import Regroup
from workbench.keymap.naming import Name
from workbench.keymap.places import COUNTED

if TYPE_CHECKING:
    from workbench.keymap.inference import Search

BY_END = "the longest end of the name and the shape agree"
_RUNNING = re.compile(r"(?:^|\.)running\.(?:mean|var)\.$")
_AFFINE = re.compile(r"(?:^|\.)(weight|bias)\.$")


def doubt(search: Search) -> None:
    for step in (gates, fused_rows, equal_names, split_norms, flattened, merged, either_way, other_roots, moved_norms, other_kinds):
        step(search)


def other_kinds(search: Search) -> None:
    """Numbers that a load would refuse to cast: complex ones into real ones, floats into integers."""
    for target, pair in [*search.pairs.items()] if search.wanted.dtypes else ():
        wanted, held = DTYPES.get(search.wanted.dtypes.get(target, "")), search.items.get(pair.source)
        if wanted and held and not pair.formula and (found := DTYPES[held.dtype]).kind != wanted.kind:
            withdraw(search, pair, f"{found} in the file and {wanted} in the model")


def _module(name: str) -> str:
    return re.split(r"[./][^./]*$", name)[0]


def equal_names(search: Search) -> None:
    """What has one name and one shape on both sides is not taken for another by what words mean: one of the two may be misread."""
    bare, shapes = search.bare, search.wanted.shapes
    moved = [pair for pair in search.pairs.values() if len(pair.parts) == 1 and not pair.formula and pair.source in search.items]
    moved = [pair for pair in moved if bare.get(pair.source, bare[pair.target]) != bare[pair.target]]
    ours = {(bare.get(name, name), item.shape): name for name, item in search.items.items()} if moved else {}
    theirs = {(bare[name], shape): name for name, shape in shapes.items()} if moved else {}
    for pair in moved:
        target, mine = pair.target, pair.source
        own, other = ours.get((bare[target], shapes[target])), theirs.get((bare[mine], search.items[mine].shape))
        if (own or other) and COUNTED.sub("#", bare[mine]) != COUNTED.sub("#", bare[target]):  # else it is counted otherwise
            told = f"the file has {own!r} under the name of the target" if own else f"the model has {other!r} under the name of the source"
            withdraw(search, pair, f"the words around it and the shape agree, but {told}, and of the same shape")
            search.ambiguous[target] = replace(search.ambiguous[target], candidates=(mine, own) if own else (mine,))


def split_norms(search: Search) -> None:
    """The statistics of a norm and its weight belong together: they come from one module of the file, or not at all."""
    if not search.running:
        return
    modules: dict[str, list[str]] = defaultdict(list)
    for target, told in search.target_names.items():
        modules[_module(told.bare)].append(target)
    affine: dict[str, set[str]] = defaultdict(set)  # module of the file -> weight and bias that it has
    for told in search.source_names.values():
        if found := _AFFINE.search(told.role):
            affine[_module(told.bare)].add(found[1])
    for names in modules.values():
        pairs = [pair for name in names if (pair := search.pairs.get(name)) and pair.is_plain and pair.source in search.source_names]
        if not any(_RUNNING.search(search.target_names[pair.target].role) for pair in pairs):
            continue
        places = {_module(search.source_names[pair.source].bare) for pair in pairs}
        left = {found[1] for n in names if n not in search.pairs and (found := _AFFINE.search(search.target_names[n].role))}
        if len(places) > 1 or any(left & affine[place] for place in places):
            for pair in pairs:
                withdraw(search, pair, "the weight and the statistics of one norm would not come from one norm of the file")


def flattened(search: Search) -> None:
    """A dense layer that reads a flattened convolution: where channels stand last on one side alone, its inputs stand in another order."""
    channels = 0  # of the convolution that the next dense layer reads
    for target, shape in search.wanted.shapes.items() if max(map(len, search.wanted.shapes.values())) > 2 else ():
        if len(shape) < 2 or not target.endswith(("weight", *IN_OUT)):
            continue
        turned, pair = target.endswith(IN_OUT), search.pairs.get(target)
        if len(shape) > 2:
            channels = shape[-1] if turned else shape[0]
            continue
        inputs = shape[0] if turned else shape[1]
        if (
            pair
            and len(pair.parts) == 1
            and (pair.source.endswith(IN_OUT) != turned or search.channels_last)
            and channels
            and inputs > channels
            and not inputs % channels
        ):
            why = "its rows are in the order height, width, channels on one side and channels, height, width on the other: the size is not known"
            withdraw(search, pair, why)
        channels = 0


def merged(search: Search) -> None:
    """A patch merging reads its inputs in an order that a name of its side tells: regrouped where it is another, left where none tells it."""
    shapes = search.wanted.shapes
    folds = {_module(_module(n)): s[1] for n, s in shapes.items() if n.endswith("reduction.weight") and len(s) == 2 and s[1] == 2 * s[0]}
    held = [pair for n, pair in search.pairs.items() if folds and shapes[n] and folds.get(_module(_module(n))) == shapes[n][-1]]
    ours, theirs = (
        next((o for o, word, _ in MERGED if any(word in n for n in names)), "") for names in (search.shapes if held else ("", ""))
    )
    for pair in held:
        shape, word = shapes[pair.target], "the order in which a patch merging reads the channels (c), rows and columns of four patches"
        if ours == theirs and (ours or search.bare[pair.target] == search.bare.get(pair.source)):
            continue
        if not ours or not theirs or not pair.is_plain:
            withdraw(search, pair, f"{word} is not told")
            continue
        view, axes = (shape[-1] // 4 if axis == "c" else 2 for axis in ours), (len(shape) - 1 + ours.index(axis) for axis in theirs)
        regroup = Regroup((*shape[:-1], *view), (*range(len(shape) - 1), *axes), shape)
        parts, rule = (pair.parts[0]._replace(regroup=regroup, shape=shape),), f"{pair.rule}, inputs regrouped"
        search.pairs[pair.target] = replace(pair, parts=parts, rule=rule, confidence="likely", reason=f"{word}: {ours} and {theirs}")


def either_way(search: Search) -> None:
    """A square matrix under a word that some keep as [in, out] and others as [out, in], where no oblong one under such a word tells which."""
    for side in [side for side, names in enumerate(search.shapes) if any(f"{word}." in "\n".join(names) for word in EITHER_WAY)]:
        held = [p for p in search.pairs.values() if _module((p.parts[0].source, p.target)[side]).endswith(EITHER_WAY)]
        matrices = [(p, search.wanted.shapes[p.target]) for p in held if len(search.wanted.shapes[p.target]) == 2]
        for pair in [p for p, _ in matrices if p.is_plain and all(rows == columns for _, (rows, columns) in matrices)]:
            known = side and search.wanted.kinds.get(pair.target) not in (None, "Conv1D")
            if not known and not _module((pair.target, pair.source)[side]).endswith(EITHER_WAY):
                withdraw(search, pair, "such a matrix is kept as [in, out] by some and [out, in] by others, and no oblong one tells which")


def other_roots(search: Search) -> None:
    """One lone module of another root of the file is not known by the end of its name where most come from a root that has more such."""
    ends = [pair for pair in search.pairs.values() if pair.reason == BY_END and pair.is_plain]
    if not ends:
        return
    roots = {name: told.bare.split(".")[0] for name, told in search.source_names.items()}
    held: dict[str, set[str]] = defaultdict(set)  # root -> modules that are used
    often: Counter[str] = Counter()
    for pair in search.pairs.values():
        for source in [source for source in pair.sources if source in roots]:
            held[roots[source]].add(_module(search.source_names[source].bare))
            often[roots[source]] += 1
    most, count = often.most_common(1)[0] if len(often) > 1 else ("", 0)
    if 2 * count <= often.total():
        return
    spare = {
        (n.rpartition(".")[2], search.items[n].shape) for n in roots if roots[n] == most and n in search.items and n not in search.used
    }
    for pair in ends:
        root, bare = roots[pair.source], search.source_names[pair.source].bare
        own, alone = search.target_names[pair.target].bare.split("."), len(held[root]) == 1 and bare.count(".") > 1
        if root not in (most, *own) and alone and (bare.rpartition(".")[2], search.items[pair.source].shape) in spare:
            withdraw(search, pair, f"nothing else comes from {root!r}, and {most!r}, which most come from, has others of that shape")


def moved_norms(search: Search) -> None:
    """Norms that stand before what they norm are none that stand after it: one side ends its blocks with a norm, and the other begins with one."""
    sides = [_ends_and_begins(names.values()) for names in (search.source_names, search.target_names)]
    if sides[0] == sides[1] or any(ends == begins for ends, begins in sides):
        return
    for target, told in search.target_names.items():
        pair = search.pairs.get(target)
        if pair and re.match(r"\.?norm\." if told.context else r"(?:.*\.)?(?:emb\.norm|norm\.last)\.", told.role):
            withdraw(search, pair, "norms stand before attention and MLP on one side and after them on the other")


def _ends_and_begins(names: Iterable[Name]) -> tuple[bool, bool]:
    """Whether a norm stands beside the blocks, and whether one stands at the embeddings."""
    names = list(names)
    lists = {told.context: told for told in names if told.context and told.indices}.values()
    places = {told.bare.split(f".{told.indices[0]}.")[0].rpartition(".")[0] for told in lists}
    norms = [told for told in names if not told.context and told.role.endswith("weight.")]
    begins = any(re.search(r"(?:^|\.)emb\.norm\.", told.role) for told in norms)
    return any(re.search(r"(?:^|\.)norm\.last\.", t.role) and _module(_module(t.bare)) in places for t in norms), begins


def gates(search: Search) -> None:
    """The inner matrix of an MLP without a gate is none of the two of one with a gate: they compute another function."""
    inner = {role: role[: role.index("up.")] for role in search.roles if ".up." in role}
    for target, pair in [(t, pair) for t, pair in search.pairs.items() if search.target_names[t].role in inner] if inner else ():
        told, other = search.target_names[target], search.source_names.get(pair.source)
        if other is None or other.role not in inner or told.bare == other.bare or not pair.is_plain:
            continue
        ours, theirs = search.by_context[0][other.context][other.indices], search.by_context[1][told.context][told.indices]
        if f"{inner[other.role]}gate.weight." in ours and f"{inner[told.role]}gate.weight." in theirs:
            continue
        gated = [
            any("gate" in role for role in block if role.startswith(unit))
            for block, unit in ((ours, inner[other.role]), (theirs, inner[told.role]))
        ]
        if gated[0] != gated[1]:
            side = "file" if gated[0] else "model"
            withdraw(search, pair, f"the MLP of the {side} has a gate and the other has none: neither of the two matrices is the one")


def fused_rows(search: Search) -> None:
    """A fused matrix that has to be transposed for another class, under a word whose rows that class may lay otherwise, is not certain."""
    fused = {role for role in search.roles if ".qkv.weight." in role}
    for target, pair in [(t, pair) for t, pair in search.pairs.items() if search.target_names[t].role in fused] if fused else ():
        sides = _module(target), _module(pair.source)
        if not pair.rule.endswith(", transposed") or not all(side.endswith(EITHER_WAY) for side in sides):
            continue
        bias = search.pairs.get(f"{sides[0]}.bias")
        for each in (pair, bias) if bias else (pair,):
            if search.wanted.kinds.get(_module(sides[0])) in BY_HEADS:
                why = "its rows lie by heads in the model's class, and in blocks of queries, keys and values in what is kept as [in, out]"
                withdraw(search, each, why)
            else:
                search.pairs[each.target] = replace(each, confidence="likely", reason=f"{each.reason}; {_ROWS}")
                search.findings["rows"] = Finding("the order of rows", "warning", f"{_ROWS}: {target!r} and its like")


_ROWS = "rows taken as blocks of queries, keys and values, as in GPT-2 and nanoGPT; GPTBigCode with multi_query=False lays them by heads under the same names"
