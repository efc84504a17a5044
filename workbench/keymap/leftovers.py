"""What the words do not tell, by the place where it stands: modules that are left over in a pair of containers, and names beside them.

Each of the functions looks at one search of inference.py and adds pairs. A claim needs one candidate on both sides, the same in all
blocks; two roles that rules.py tells apart are never one.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Hashable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from workbench.keymap.fusions import relaid
from workbench.keymap.layouts import withdraw
from workbench.keymap.maps import Unmatched
from workbench.keymap.naming import Block, Indices, bare_names, opposed, outside
from workbench.keymap.rules import normal, role_of, words_of
from workbench.tensors import Derived

if TYPE_CHECKING:
    from workbench.keymap.containers import Pairing
    from workbench.keymap.inference import Search

Shape = tuple[int, ...]


class Unit(NamedTuple):
    """A module that is left over, in all blocks of its container: what it holds in each, and how its path in the block is spelt."""

    role: str
    names: dict[tuple[Indices, str], str]  # block and parameter -> name
    sign: frozenset[tuple[Indices, str, Shape]]
    place: str
    word: str


def rest(search: Search, p: Pairing) -> None:
    """Pair the modules left over in two containers: those of one last word, then those that are the only ones of their shapes.

    The only ones of their shapes need a word in common, or that all that is left on both sides is explained so.
    """
    theirs = search.by_context[1].get(p.target, {})
    wanted = _units(theirs, search.pairs, search.shapes[1], search.bare)
    ours = {index: search.by_context[0].get(p.source, {}).get(p.indices.get(index, ()), {}) for index in theirs} if wanted else {}
    held = _units(ours, search.used, search.shapes[0], search.bare)
    whole = Counter(unit.sign for unit in held) == Counter(unit.sign for unit in wanted)
    if not p.target and (not whole or len(wanted) < 2):  # beside blocks, one more that is left may be another head
        return
    named = [
        both
        for both in _only(held, wanted, lambda unit: (unit.word, unit.sign))
        if both[0].word and bool(both[0].place) == bool(both[1].place)
    ]
    ways = Counter(place for one, other in {(one.place, other.place) for one, other in named} for place in ((0, one), (1, other)))
    for one, other in named:
        if ways[0, one.place] == ways[1, other.place] == 1:
            _pair(search, p, one, other, f"the same word under {one.place!r} and {other.place!r}, in all blocks")
    for one, other in _only(_open(held, search.used), _open(wanted, search.pairs), lambda unit: unit.sign):
        vectors = all(len(shape) < 2 for *_, shape in one.sign)  # are many, and of one length
        alike = vectors and any(u is not one and u.sign & one.sign for u in held)  # in one of the blocks
        if (whole and not alike) or len(_words(one.role) & _words(other.role)) > vectors:
            _pair(search, p, one, other, "the only ones of their shapes that are left")


def _units(
    blocks: Mapping[Indices, Block], done: Container[str], shapes: Mapping[str, Shape], spelt: Mapping[str, str]
) -> list[Unit]:  # fmt: skip
    """The modules of which nothing is done in these blocks."""
    found: dict[str, dict[tuple[Indices, str], str]] = defaultdict(dict)
    for index, roles in blocks.items():
        for role, names in roles.items():
            if names[0] not in done and len(names) == 1:
                unit, _, param = role.strip(".").replace("num.batches.tracked", _COUNT).rpartition(".")
                found[unit][index, param] = names[0]
    out = []
    for role, held in found.items():
        sign = frozenset((*key, shapes[name]) for key, name in held.items() if key[1] != _COUNT)
        path = _NUMBERED.split(spelt.get(next(iter(held.values())), "").rpartition(".")[0])[-1]
        place, _, word = path.rpartition(".")
        out.append(Unit(role, held, sign, place, word))
    return out


_COUNT = "num_batches_tracked"  # a norm may be without
_NUMBERED = re.compile(r"(?:^|.*\.)[^.]*\d+(?:\.|$)")


def _open(units: Iterable[Unit], done: Container[str]) -> list[Unit]:
    return [unit for unit in units if not any(name in done for name in unit.names.values())]


def _only(held: Iterable[Unit], wanted: Iterable[Unit], key: Callable[[Unit], Hashable]) -> list[tuple[Unit, Unit]]:
    """Those of the source and of the target that are the only ones of one key."""
    sides: tuple[dict[Hashable, list[Unit]], ...] = (defaultdict(list), defaultdict(list))
    for side, units in zip(sides, (held, wanted), strict=True):
        for unit in units:
            side[key(unit)].append(unit)
    return [(ours[0], sides[1][told][0]) for told, ours in sides[0].items() if len(ours) == len(sides[1].get(told, ())) == 1]


def _pair(search: Search, p: Pairing, one: Unit, other: Unit, reason: str) -> None:
    if _apart(one, other):
        return
    rule = f"{one.role or p.source} becomes {other.role or p.target}"
    for key, target in other.names.items():
        source = one.names.get(key)
        if source is None or target in search.pairs or opposed(target, source):
            continue
        fused = "qkv" in _words(one.role) and "qkv" not in _words(other.role)
        if not fused or relaid(source, target, search.items, search.wanted) == (None, ""):
            search.take(target, source, rule, "likely", reason)


_SETTLED = re.compile(
    r"(?:x?attn\.(?:q|k|v|o|qkv|kv)|mlp\.(?:up|gate|down|gateup|upgate|router)|norm\.\w+|emb\.\w+|ls(?::\d)?|shortcut\.\w+|head|cls|patch)$"
)


def _apart(one: Unit, other: Unit) -> bool:
    """Whether rules.py knows two roles and tells them apart; a part of a role tells less than two words that both paths end in."""
    roles = one.role, other.role
    settled = [found[0] for text in roles if (found := _SETTLED.search(text))]
    if len(set(settled)) == 2 and tuple(settled) == roles:
        return True
    paths = (f"{unit.place}.{unit.word}".split(".")[::-1] for unit in (one, other))
    if any(variants(*words) for words in zip(*paths, strict=False)):
        return True
    if one.word == other.word and one.place and one.place.split(".")[-1] == other.place.split(".")[-1]:
        return False
    parts = [{_PARTS[word] for word in unit.word.lower().split("_") if word in _PARTS} for unit in (one, other)]
    if all(parts) and not parts[0] & parts[1]:
        return True
    families = [{"attn", "xattn", "mlp"} & _words(text) for text in roles]
    return len(set(settled)) == 2 or (all(families) and not families[0] & families[1])


_PARTS = {"query": "q", "key": "k", "value": "v", "out": "o", "output": "o"} | {letter: letter for letter in "qkvo"}  # of an attention


def variants(one: str, other: str) -> bool:
    """Whether two words tell kinds of one thing apart (`local_attn`, `global_attn`), and none of them is short for the other."""
    mine, theirs = (re.findall("[a-z]+", word.lower()) for word in (one, other))
    left, right = [w for w in mine if w not in theirs], [w for w in theirs if w not in mine]
    if not left or not right or len(left) == len(mine):
        return False
    short, long = sorted(("".join(left), "".join(right)), key=len)
    return not long.startswith(short) and short not in ("".join(w[0] for w in words) for words in (left, right))


def _words(role: str) -> set[str]:
    return {word for word in re.split(r"[.:]", role) if word.isalpha()}


_MOST_WAYS = 4  # that one prefix goes


def set_aside(search: Search, chosen: Iterable[Pairing]) -> None:
    """Read what lies in no repeated block as it is read outside of blocks: names with a number of their own, or one that blocks left over."""
    for side, names in enumerate((search.source_names, search.target_names)):
        paired = {p.target if side else p.source: p.indices.keys() if side else set(p.indices.values()) for p in chosen}
        for context, blocks in search.by_context[side].items():
            taken, often = paired.get(context, ()), Counter(role for roles in blocks.values() for role in roles) if context else {}
            for role, held in [each for index, roles in blocks.items() if context and index not in taken for each in roles.items()]:
                for name in held if taken or often[role] == 1 else ():
                    names[name] = outside(names[name])


def follow(search: Search, chosen: Iterable[Pairing]) -> None:
    """Names beside a container go where it went: with `a.b.layers.*` in the place of `c.layers.*`, `a.b.norm` is in that of `c.norm`."""
    ways: dict[tuple[str, ...], set[tuple[str, ...]]] = defaultdict(set)
    for old, new in filter(None, map(_way, chosen)):
        ways[old].add(new)
    theirs = {search.bare[name] for name in search.target_names} if ways else set()
    moved: dict[str, list[str]] = defaultdict(list)  # role in the target's place -> sources
    for source, told in search.source_names.items() if ways else ():
        if not told.context and source not in search.used and told.bare not in theirs:
            words = normal(told.bare).strip(".").split(".")
            for cut in range(len(words)):
                for new in there if len(there := ways.get(_tokens(".".join(words[:cut])), ())) <= _MOST_WAYS else ():
                    moved[role_of(words_of(f".{'.'.join((*new, *words[cut:]))}."), False).replace(":", ".")].append(source)
    fits: dict[str, list[str]] = {}
    for target, told in search.target_names.items() if moved else ():
        if not told.context and target not in search.pairs and target not in search.ambiguous:
            held = moved.get(told.role.replace(":", "."), ())
            fits[target] = [s for s in held if not opposed(s, target) and search.fits(s, target) and search.same_kind(target, s)]
    claims = Counter(source for held in fits.values() for source in held)
    for target, held in fits.items():
        if len(held) == 1 and claims[held[0]] == 1:
            search.take(target, held[0], "beside its blocks", "likely", "its place beside the blocks is the one that it had in the file")


def _way(p: Pairing) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """What stands before a container's own word on both sides, less what ends alike; nothing where that is one."""
    depth = min(p.source.count("#"), p.target.count("#"))
    paths = [_before(p.source, [*p.indices.values()], depth), _before(p.target, [*p.indices], depth)]
    while paths[0] and paths[1] and paths[0][-1] == paths[1][-1]:
        paths = [path[:-1] for path in paths]
    return None if paths[0] == paths[1] else (paths[0], paths[1])


def _before(context: str, indices: list[Indices], depth: int) -> tuple[str, ...]:
    """The words before that of a block which is numbered `depth` times, inside of what is numbered besides."""
    pieces = context.split("#")[:-depth]
    return _tokens("".join(f"{piece}{n}" for piece, n in zip(pieces, (*indices[0][: len(pieces) - 1], ""), strict=True)))[:-1]


def _tokens(text: str) -> tuple[str, ...]:
    return tuple(word for word in re.split(r"[.:]", text) if word)


def doubt_shifted(search: Search) -> None:
    """Members of a list are not known by their numbers where the file has more of them and modules beside the model's list are left:
    with `layers.0`, `layers.1` for `proj_in`, `layers.0`, the same number is another layer."""
    free = {(place, shape): name for place, shape, name in _weights(search, 1, search.pairs)}
    spare = {(place, shape) for place, shape, _ in _weights(search, 0, search.used)} if free else set()
    for place, shape, name in _weights(search, 1, ()) if spare else ():
        other, module = free.get((_module(place), shape)), _module(search.bare[name])
        if (place, shape) in spare and other and module.rpartition(".")[2].isdigit():
            for target in (name, name.removesuffix("weight") + "bias"):
                if (pair := search.pairs.get(target)) and pair.is_plain and search.bare[target] == search.bare[pair.source]:
                    withdraw(search, pair, f"the file's list has more members than the model's, and one of them may be {other!r}")


def _weights(search: Search, side: int, done: Container[str]) -> Iterator[tuple[str, Shape, str]]:
    """What the modules lie in of which the weight is not done, and that."""
    for name, told in (search.source_names, search.target_names)[side].items():
        if name not in done and told.bare.endswith(".weight"):
            yield _module(_module(told.bare)), search.shapes[side][name], name


def stem(search: Search) -> None:
    """The one convolution of either side that takes an image, and the norm beside it, whatever they are called, where half is known."""
    sides: list[list[dict[str, str]]] = []  # the convolution and what is left beside it: parameter -> name
    inside = True
    for side, (names, done) in enumerate(((search.source_names, search.used), (search.target_names, search.pairs))):
        shapes = search.shapes[side]
        first = [name for name in names if len(shapes[name]) == 4 and shapes[name][1] == 3]
        if len(first) != 1 or first[0] in done or 2 * len(search.pairs) < len(search.wanted.shapes):
            return
        held: dict[str, dict[str, str]] = {(own := _module(names[first[0]].bare)): {}}
        for name, told in names.items():
            module, _, param = told.bare.rpartition(".")
            if name not in done and _module(module) == _module(own) and (module == own or shapes[name] in ((), shapes[first[0]][:1])):
                held.setdefault(module, {})[param] = name
        sides.append(list(held.values()))
        inside = inside and "." in own  # what stands there belongs to the stem
    (one, *norms), (other, *others) = sides
    if one.keys() != other.keys() or not search.fits(one["weight"], other["weight"]):
        return
    params = [norm.keys() - {_COUNT} for norm in (*norms, *others)]
    known = len(norms) == len(others) == 1 and params[0] == params[1] and (inside or "running_mean" in params[0])
    for ours, theirs in ((one, other), *(zip(norms, others, strict=True) if known else ())):
        for param in [param for param in theirs if param in ours and not opposed(ours[param], theirs[param])]:
            why = "the only convolution that takes an image, or the norm beside it"
            search.take(theirs[param], ours[param], "the stem", "likely", why)


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def with_weight(search: Search) -> None:
    """A vector goes where the weight of its module went: under the same word on both sides, and where that weight is one tensor."""
    left: dict[str, list[str]] = defaultdict(list)  # module of the target -> vectors of which nothing is done
    for name, shape in search.wanted.shapes.items() if len(search.pairs) < len(search.wanted.shapes) else ():
        if name not in search.pairs and len(shape) == 1:
            left[_module(name)].append(name)
    for module in left:
        pair = search.pairs.get(f"{module}.weight")
        if pair is None or pair.formula or len(pair.parts) > 1 or pair.parts[0].rows is not None or not pair.source.endswith(".weight"):
            continue
        for name in left[module]:
            source = _module(pair.source) + name.removeprefix(module)
            if source in search.items and source not in search.used and search.fits(source, name) and not opposed(name, source):
                search.take(name, source, "beside its weight", "likely", f"the weight of its module came from {pair.source!r}")


def beside(search: Search) -> None:
    """A norm goes where the module beside it went: the only one that is left in its parent, or the one that its number puts behind a
    paired module (`conv1`, `bn1`; `0`, `1`)."""
    if len(search.pairs) in (0, len(search.wanted.shapes)):
        return
    went: tuple[dict[str, set[str]], ...] = (defaultdict(set), defaultdict(set))  # module, or what it lies in -> that of the other side
    for pair in search.pairs.values():
        for one, other in [(_module(search.bare.get(source, source)), _module(search.bare[pair.target])) for source in pair.sources]:
            for mine, its in {(one, other), (_module(one), _module(other))}:
                went[0][mine].add(its)
                went[1][its].add(mine)
    ours, theirs = _norms(search, 0), _norms(search, 1)
    for (place, count), norms in theirs.items():
        if len(went[1][place]) != 1:  # not known, which is not the root
            continue
        there = next(iter(went[1][place]))
        held = ours.get((there, count), ()) if len(went[0][there]) == 1 else ()
        if len(norms) == len(held) == 1 and held[0].sign == norms[0].sign and not _apart(held[0], norms[0]):
            for param, target in norms[0].names.items():
                if (source := held[0].names.get(param, "")) and not opposed(target, source):
                    search.take(target, source, "beside its neighbour", "likely", f"what stands beside it came from {there!r}")


def _norms(search: Search, side: int) -> dict[tuple[str, int], list[Unit]]:
    """The norms of which nothing is done: by what they lie in, and how many norms that holds; by the module that their number puts them
    behind, and -1: the one before in a sequence that no norm begins, or that of the same number."""
    names, done, shapes = (search.source_names, search.target_names)[side], (search.used, search.pairs)[side], search.shapes[side]
    held: dict[str, dict[tuple[Indices, str], str]] = defaultdict(dict)
    numbered: dict[tuple[str, str], list[str]] = defaultdict(list)  # of one parent and number, in the order of the names
    for name, told in names.items():
        module, _, param = told.bare.rpartition(".")
        if module not in held:
            numbered[_module(module), re.findall(r"\d*$", module)[0]].append(module)
        held[module][(), param] = name
    vectors = {
        m for m, found in held.items() if {((), "weight"), ((), "bias")} <= found.keys() and all(len(shapes[n]) < 2 for n in found.values())
    }
    often, out = Counter(map(_module, vectors)), defaultdict(list)
    for norm in [norm for norm in held if norm in vectors and not any(name in done for name in held[norm].values())]:
        place, number = _module(norm), re.findall(r"\d*$", norm)[0]
        sign = frozenset((*key, shapes[name]) for key, name in held[norm].items() if key[1] != _COUNT)
        role = names[held[norm][(), "weight"]].role.strip(".").removesuffix(".weight")
        unit = Unit(role, held[norm], sign, place, norm.rpartition(".")[2])
        before, others = norm.removesuffix(number), numbered[place, number]
        if number and unit.word == number:
            others = [f"{before}{int(number) - 1}", norm] if f"{before}0" not in vectors else []
        if number and len(others) == 2 and others[1] == norm:
            out[others[0], -1].append(unit)
        out[place, often[place]].append(unit)
    return out


_HEADS = ("head.weight.", "head.bias.")
_TABLE = re.compile(r"\bemb\.tok\.(?:weight\.)?$")


def settle_swapped(search: Search) -> None:
    """A head that `swap_head` put in was meant for the model: where only one fits, no more than that is to be known."""
    for name, pair in search.pairs.items():
        if pair.confidence == "likely" and search.target_names[name].role.endswith(_HEADS) and pair.is_plain:
            source = search.tensors[pair.source].source
            if isinstance(source, Derived) and source.block.op.endswith(":new_rows"):
                search.pairs[name] = replace(
                    pair, confidence="certain", reason="the head that swap_head put in, and the only one that fits"
                )


def nearest(search: Search, names: list[str], used: Container[str]) -> tuple[Unmatched, ...]:
    """Why nothing fills these names, and what in the file comes nearest."""
    sources, shapes = search.tensors, search.wanted.shapes
    free = {name: tensor.shape for name, tensor in sources.items() if name not in used} if names else {}
    bare, often = dict(zip(bare_names(sources), sources, strict=True)) if names else {}, Counter(free.values())
    heads = [name for name in free if name in search.source_names and search.source_names[name].role.endswith(_HEADS)]
    tables = {shapes[t]: pair for t, pair in search.pairs.items() if names and pair.is_plain and _TABLE.search(search.target_names[t].role)}
    adapted = set(_adapted(free))
    out = []
    for name, spelt in zip(names, bare_names(names), strict=True):
        near, shape = name if name in sources else bare.get(spelt, ""), shapes[name]
        head = name in search.target_names and search.target_names[name].role.endswith(_HEADS)
        mine = heads if head else []
        other = [s for s in mine if s.rpartition(".")[2] == name.rpartition(".")[2] and free[s][1:] == shape[1:] and free[s] != shape]
        if near in free and free[near] != shape:
            told = f"{list(free[near])} in the file and {list(shape)} in the model"
            told += f"; a head for other classes: {_swap(near, shape)}" if head and shape and free[near][1:] == shape[1:] else ""
            out.append(Unmatched(name, told, near))
        elif len(other) == 1 and shape:
            told = f"the file's head may be {_module(other[0])} {list(free[other[0]])}: {_swap(other[0], shape)}"
            out.append(Unmatched(name, told, other[0]))
        elif _module(spelt) in adapted:
            out.append(
                Unmatched(name, "the file has a LoRA adapter for its module, and not what it adapts: wb.ops.merge_lora(base, adapter)")
            )
        else:
            count = often[shape]
            why = (
                f"no name like it; {count} unused tensors have its shape"
                if count
                else "nothing that is left of the file has this name or shape"
            )
            if table := tables.get(shape) if head and not count else None:
                why = (
                    f"the file has no head, and {table.source!r}, which fills {table.target!r}, has its shape: if the model ties the two, "
                    f"keymap.edited({{{name!r}: {table.source!r}}})"
                )
            out.append(Unmatched(name, why))
    return tuple(out)


def _swap(name: str, shape: Shape) -> str:
    return f"wb.ops.swap_head(ckpt, {f'{_module(name)}.*'!r}, {shape[0]})"


def _adapted(names: Iterable[str]) -> Iterator[str]:
    """The modules that a LoRA lies in, with more or fewer words before them."""
    for module in {name.partition(".lora_")[0] for name in names if ".lora_" in name}:
        yield module
        for dot in re.finditer(r"\.", module):
            yield module[dot.end() :]
