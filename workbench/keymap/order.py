"""A whole model under foreign names, by what its modules hold and the order in which they stand.

Asked where names have explained next to nothing, and for what is left of both sides where that is the same. Both are cut into modules:
what lies under one path, by parameter and shape. Where they hold the same modules, but for a head of another size, one that is the
only one of its shapes is paired with the only one on the other side; those that share their shapes go by their numbers, or by their
order where the whole order is one. Two that stand side by side, and could be exchanged without a trace (queries and keys), are told by
their numbers or words, or left.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, NamedTuple

from workbench.keymap.conventions import IN_OUT, SCALES
from workbench.keymap.leftovers import variants
from workbench.keymap.maps import Ambiguous
from workbench.keymap.naming import Name, count_alike, in_runs, opposed

if TYPE_CHECKING:
    from workbench.keymap.inference import Search

Shape = tuple[int, ...]
Sign = tuple[tuple[str, Shape], ...]

_FEW = 10  # per cent of the target's names, which others may have paired
_MOST = 50_000  # names of both sides
_OUTPUTS = frozenset(("fc", "linear", "lin", "head", "classifier", "last", "conv", "out", "output", "logits", "dense", "final", "proj", "projection", "score"))  # fmt: skip
_LEAST = 3  # modules: fewer are no model
_ROWS = re.compile(r"qkv|query_key_value|c_attn|in_proj|kv_proj|gate_up|w12|ada_?ln|modulation", re.I)  # parts in an order that is not told
_PARAM = re.compile(r"(running\.mean|running\.var|num\.batches\.tracked|[^.]+?)(?::\d+)?\.$")
_COUNTER = "num.batches.tracked"  # a norm may be without
_ALIKE = "the numbers of modules that hold the same shapes"
_ONLY = "the only one of its shapes, in two models that hold the same modules"
_PLACE = "its place in the order of the modules, which hold the same shapes from first to last"
_EXCHANGEABLE = "several modules hold the same shapes, and neither numbers nor the order tell which is which"
_TOLD = re.compile(r"\.x?attn\.(?:q|k|v|o|qkv|kv)$|\.emb\.\w+$")  # roles that another would be wrong for
_GENERAL = frozenset(
    ("encoder", "decoder", "layer", "layers", "block", "blocks", "model", "embeddings", "attention")
)  # words that tell no module
_TASKS = frozenset(("lm", "mlm", "qa", "ner", "score", "classifier", "cls", "box", "mask", "reward", "regression"))  # that a head is for
_APART = ({"gate", "up"}, {"source", "target"}, {"src", "tgt"}, {"key", "query"})


class Module(NamedTuple):
    """What lies under one path: the path with its numbers masked, those numbers, its role, and its tensors by parameter."""

    path: str
    mask: str
    numbers: tuple[int, ...]
    role: str
    names: dict[str, str]
    sign: Sign


def in_order(search: Search) -> None:
    """Pair the modules of two models that hold the same ones, or those that are all that is left of both."""
    search.ambiguous = {target: told for target, told in search.ambiguous.items() if told.reason != _EXCHANGEABLE}  # of an earlier look
    if len(search.pairs) == len(search.wanted.shapes) or len(search.items) + len(search.wanted.shapes) > _MOST:
        return
    held = {name: told for name, told in search.source_names.items() if name in search.items}
    ours = _modules(held, {name: item.shape for name, item in search.items.items()})
    theirs = _modules(search.target_names, search.wanted.shapes)
    ours, broken = _open(ours, search.used)
    theirs, parted = _open(theirs, search.pairs.keys())
    if broken or parted:  # of which a part went elsewhere: what is left of both is not the same
        return
    if 100 * len(search.pairs) > _FEW * len(search.wanted.shapes):
        found = _all_that_is_left(search, ours, theirs)
    else:
        found = list(_paired(ours, theirs)) or list(_paired(ours[:-1], theirs[:-1], 1 + _LEAST))  # which may have another head
    if any(_speaks_against(one, other) for one, other, why in found if why):
        return
    for one, other, why in found:
        for param, target in other.names.items():
            if (source := one.names.get(param)) is None:
                continue
            if why:
                search.take(target, source, f"{one.path} becomes {other.path}", "likely", why)
            else:
                alike = tuple(m.names[param] for m, its, _ in found if its.sign == other.sign and param in m.names)
                search.ambiguous[target] = Ambiguous(target, alike[:8], _EXCHANGEABLE)


def _sides(search: Search) -> list[list[Module]]:
    """The modules of both sides in the order of the names; a parameter with a name of its own (a token, a table) is one by itself."""
    sides = []
    for names, shapes in zip((search.source_names, search.target_names), search.shapes, strict=True):
        found: dict[str, dict[str, str]] = defaultdict(dict)
        for name in [name for name in names if name in shapes]:
            path, _, param = names[name].bare.rpartition(".")
            known = param in ("weight", "bias") or param in SCALES or param.startswith(("running_", "num_batches_"))
            found[path if known else names[name].bare][param if known else ""] = name
        signs = [tuple(sorted((p, _turned(n, shapes[n])) for p, n in held.items() if p[:4] != "num_")) for held in found.values()]
        sides.append(
            [
                Module(path, "", (), names[next(iter(held.values()))].role, held, sign)
                for (path, held), sign in zip(found.items(), signs, strict=True)
                if sign
            ]
        )
    return sides


def members(search: Search) -> None:
    """The scale of a norm goes where its shift went (`alpha` and `weight`, beside `bias`): all else of the two modules is one."""
    if len(search.pairs) == len(search.wanted.shapes) or len(search.items) > _MOST:
        return
    ours, theirs = _sides(search)
    of = {name: module for module in theirs for name in module.names.values()}
    went = {source: of[target] for target, pair in search.pairs.items() for source in pair.sources if target in of}
    ways = {(m.path, went[n].path): (m, went[n]) for m in ours for n in m.names.values() if n in went}
    often = Counter(end for way in ways for end in enumerate(way))
    for one, other in [both for way, both in ways.items() if often[0, way[0]] == often[1, way[1]] == 1 and "bias" in both[1].names]:
        left = [{p: n for p, n in m.names.items() if n not in done} for m, done in ((one, search.used), (other, search.pairs))]
        names = [next(iter(side.values())) for side in left if len(side) == 1 and side.keys() & SCALES]
        if len(names) == 2 and len(search.wanted.shapes[names[1]]) < 2 and names[1] not in search.ambiguous:
            search.take(names[1], names[0], f"{one.path} becomes {other.path}", "likely", "all else of the two modules is one")


def last(search: Search) -> None:
    """The last module that is left of the file goes where the last of its shapes is left of the model, when nearly all else is paired.

    That is evidence where the words of both are the same but for their order and endings, or where what is paired before and after them
    is one on both sides and nothing else is left; never where their kinds differ or more is left beside one of them.
    """
    if not 3 * len(search.wanted.shapes) <= 4 * len(search.pairs) < 4 * len(search.wanted.shapes) or len(search.items) > _MOST:
        return
    sides, done = _sides(search), (search.used, search.pairs)
    open_ = [[m for m in side if not any(n in done[at] for n in m.names.values())] for at, side in enumerate(sides)]
    main = {id(m): max((tuple(sorted(search.shapes[at][n])) for n in m.names.values()), key=len) for at in (0, 1) for m in open_[at]}
    often = [Counter(main[id(m)] for m in side) for side in open_]
    ones = [{main[id(m)]: m for m in side if often[0][main[id(m)]] == often[1][main[id(m)]] == 1} for side in open_]
    found = [(one, other) for shape, one in ones[0].items() if one.sign == (other := ones[1][shape]).sign and _one_kind(one, other)]
    told = {name for a in search.ambiguous.values() for name in (a.target, *a.candidates)}
    found = [both for both in found if told.isdisjoint([*both[0].names.values(), *both[1].names.values()])]
    left = [[m for m in side if m not in [both[at] for both in found]] for at, side in enumerate(open_)]
    more = any("weight" in m.names and len(main[id(m)]) > 1 and told.isdisjoint(m.names.values()) for side in left for m in side)
    turned = any(pair.rule.endswith(", transposed") for pair in search.pairs.values())
    for one, other in found:
        if (turned or "" in one.names) and len(main[id(one)]) == 2 and len(set(main[id(one)])) == 1:  # it would fit transposed
            continue
        homes = [module.path.rpartition(".")[0] for module in (one, other)]
        beside = [m for at in (0, 1) for m in left[at] if "weight" in m.names and "" != m.path.rpartition(".")[0] == homes[at]]
        shared = len(_common(one.path, other.path) - _GENERAL)
        rival = any(len(_common(its.path, m.path) - _GENERAL) >= shared for side, its in zip(left, (other, one), strict=True) for m in side)
        words = [re.sub(r".*\.(?=[^.]*[a-zA-Z])", "", module.path) for module in (one, other)]
        alike = all(_common(a, b) == set(re.findall("[a-z]{3,}", a.lower())) for a, b in (words, words[::-1])) or shared > 1
        if not beside and ((alike and shared and not rival) or (not more and _one_place(search, sides, one, other))):
            for param, target in other.names.items():
                if param in one.names:
                    why = "the last of the file that is left and the last of its shapes in the model"
                    search.take(target, one.names[param], f"{one.path} becomes {other.path}", "likely", why)


def _one_kind(one: Module, other: Module) -> bool:
    """Whether the words of two modules of one form allow that they are one; what has a bias is no table."""
    kinds = {_kind_of(one), _kind_of(other)} & {"norm", "output", "positions", "" if "bias" in one.names else "table"}
    tasks = [_TASKS & set(re.findall("[a-z]+", m.path.lower())) or {"lm"} & {m.role.strip(".")[:2]} for m in (one, other)]
    return len(kinds) < 2 and (not all(tasks) or bool(tasks[0] & tasks[1])) and not _speaks_against(one, other)


def _one_place(search: Search, sides: list[list[Module]], one: Module, other: Module) -> bool:
    """Whether what is paired next before and next after them is one."""
    sources = {name: {*pair.sources} for name, pair in search.pairs.items()}
    for step in (-1, 1):
        runs = [
            side[side.index(m) + step :: step] if side.index(m) + step >= 0 else [] for side, m in zip(sides, (one, other), strict=True)
        ]
        near = [
            next(({*m.names.values()} & done for m in run if not done.isdisjoint(m.names.values())), set())
            for run, done in zip(runs, (search.used, sources.keys()), strict=True)
        ]
        if near[0] != near[1] and not any(near[0] & sources[name] for name in near[1]):
            return False
    return True


def _open(modules: list[Module], done: Collection[str]) -> tuple[list[Module], bool]:
    """Those of which nothing is done, and whether there are some of which a part is."""
    counts = [sum(name in done for param, name in module.names.items() if param != _COUNTER) for module in modules]
    return [m for m, count in zip(modules, counts, strict=True) if not count], any(
        0 < count < len(m.sign) for m, count in zip(modules, counts, strict=True)
    )


def _all_that_is_left(search: Search, ours: list[Module], theirs: list[Module]) -> list[tuple[Module, Module, str]]:
    """Beside others that are paired: only where nothing else is left of the file but vectors, and one alone by general words on both sides."""
    if search.ambiguous.keys() - search.pairs.keys():  # what is left may be what another was meant for
        return []
    wanted = Counter(module.sign for module in theirs)
    ours = [module for module in ours if module.sign in wanted or any(len(shape) > 1 for _, shape in module.sign)]
    if Counter(module.sign for module in ours) != wanted:
        return []
    found = list(_paired(ours, theirs, 1))
    several = len({(one.mask, other.mask) for one, other, _ in found}) > 1
    return found if several or all(_kind_of(one) and _kind_of(one) == _kind_of(other) for one, other, _ in found) else []


def _kind_of(module: Module) -> str:
    """What the last word of a module's path says in general: an output layer, a table, one of positions, a norm; the word, if it says more."""
    last = next((part for part in reversed(module.path.lower().split(".")) if not part.isdigit()), "")
    words = re.findall("[a-z]+", last)
    tables = [word for word in words if word.startswith("emb") or word in ("wte", "wpe", "pos", "position", "positional")]
    if tables:
        return "positions" if any(word.startswith(("pos", "wpe")) for word in words) else "table"
    if any(word.startswith("norm") or word in ("ln", "bn") for word in words):
        return "norm"
    return "output" if words and _OUTPUTS.issuperset(words) else last


def _modules(names: Mapping[str, Name], shapes: Mapping[str, Shape]) -> list[Module]:
    """In the order of the names, but for what a path holds further on."""
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for name, told in names.items():
        param = _PARAM.search(told.role or ".")
        path, word = "".join(re.split(r"([./])", told.bare)[:-2]), param[1] if param else ""
        while word in found[path]:  # two of one name: wrappers, or adapters
            path += "'"
        found[path][word] = name
    out = []
    for path, held in found.items():
        lone = len(held) == 1 and "bias" not in held  # tables and scales have many names
        held = dict.fromkeys(("",), *held.values()) if lone else held
        sign = tuple(sorted((param, _turned(name, shapes[name])) for param, name in held.items() if param != _COUNTER))
        role = names[next(iter(held.values()))].role
        out.append(Module(path, re.sub(r"\d+", "#", path), tuple(map(int, re.findall(r"\d+", path))), role, held, sign))
    return [module for module in out if module.sign]


def _turned(name: str, shape: Shape) -> Shape:
    """A shape without ones, and that of a matrix kept as [..., in, out] as torch keeps it."""
    turned = (shape[-1], shape[-2], *shape[:-2]) if name.endswith(IN_OUT) and len(shape) > 1 else shape
    return tuple(n for n in turned if n != 1)


def _paired(ours: list[Module], theirs: list[Module], least: int = _LEAST) -> Iterator[tuple[Module, Module, str]]:
    """Modules of both sides, and what tells that they are one; nothing, where they are of one form and nothing tells it."""
    groups: tuple[dict[Sign, list[Module]], ...] = (defaultdict(list), defaultdict(list))
    for side, modules in zip(groups, (ours, theirs), strict=True):
        for module in modules:
            side[module.sign].append(module)
    counts = [{sign: len(held) for sign, held in side.items()} for side in groups]
    if counts[0] != counts[1] or len(theirs) < least:
        return
    one_order = [m.sign for m in ours] == [m.sign for m in theirs] and _ascend(ours) and _ascend(theirs)
    ordered = all(in_runs(m.path for m in side) for side in (ours, theirs))
    exchangeable = _exchangeable(ours) | _exchangeable(theirs)
    for sign, wanted in groups[1].items():
        held = groups[0][sign]
        numbered = all(len({m.mask for m in side}) == 1 and len({m.numbers for m in side}) == len(side) for side in (held, wanted))
        if any(_ROWS.search(module.path) for module in (*held, *wanted)):
            yield from ((*both, "") for both in zip(held, wanted, strict=True))
        elif len(held) == 1:
            yield held[0], wanted[0], _ONLY
        elif numbered:
            told = _ALIKE if count_alike([(m.mask, m.numbers) for m in held], [(m.mask, m.numbers) for m in wanted], ordered) else ""
            yield from ((*both, told) for both in zip(*(sorted(side, key=lambda m: m.numbers) for side in (held, wanted)), strict=True))
        elif near := _by_words(held, wanted):
            yield from ((*both, "the only one of its shapes with a word in common") for both in near)
        else:
            for one, other in zip(held, wanted, strict=True):
                free = one.path not in exchangeable and other.path not in exchangeable
                yield one, other, _PLACE if one_order and (free or _same_role(one, other)) else ""


def _by_words(held: list[Module], wanted: list[Module]) -> list[tuple[Module, Module]]:
    """Each with the only one on the other side that has a word in common with it, or the beginning of one; nothing, if one has none."""
    near = [(one, other) for other in wanted for one in held if _common(one.path, other.path)]
    return near if len(near) == len(held) == len({m.path for m, _ in near}) == len({m.path for _, m in near}) else []


def _common(one: str, other: str) -> set[str]:
    """The words of one path that are words of the other, or the beginning of one, or begin with one."""
    mine, theirs = (set(re.findall("[a-z]{3,}", path.lower())) for path in (one, other))
    return {word for word in mine if any(word.startswith(its) or its.startswith(word) for its in theirs)}


def _exchangeable(modules: list[Module]) -> set[str]:
    """Modules that stand side by side in one form, and those in two parts of one module that hold the same, told by words alone, with
    nothing between them that is the only one of its shapes: two towers, or queries and keys, may stand in any order."""
    often = Counter(module.sign for module in modules)
    singles = [0, *accumulate(often[module.sign] == 1 for module in modules)]
    parts: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))  # path -> part -> where its modules stand
    for at, module in enumerate(modules):
        words = module.path.split(".")
        for depth, word in enumerate(words):
            parts[".".join(words[:depth])][word].append(at)
    out = {one.path for a, b in pairwise(modules) if a.sign == b.sign and a.mask != b.mask for one in (a, b)}
    for inside in parts.values():
        alike: dict[tuple[Sign, ...], list[str]] = defaultdict(list)
        for word, places in inside.items():
            alike[tuple(modules[at].sign for at in places)].append(word)
        for one, other in (both for same in alike.values() for both in pairwise(same)):
            apart = singles[inside[other][0]] > singles[inside[one][-1] + 1]
            if re.sub(r"\d+", "#", one) != re.sub(r"\d+", "#", other) and not apart:
                out.update(modules[at].path for word in (one, other) for at in inside[word])
    return out


def _ascend(modules: list[Module]) -> bool:
    """Whether what is numbered alike stands in the order of its numbers: a file that is sorted or shuffled tells no order."""
    last: dict[str, tuple[int, ...]] = {}
    for module in modules:
        if module.numbers < last.get(module.mask, ()):
            return False
        last[module.mask] = module.numbers
    return True


def _unit(module: Module) -> str:
    return _PARAM.sub("", module.role).rstrip(".")


def _same_role(one: Module, other: Module) -> bool:
    return bool(_unit(one)) and _unit(one) == _unit(other)


def _speaks_against(one: Module, other: Module) -> bool:
    """Whether the words of two modules tell that they are not one."""
    roles = [found[0] if (found := _TOLD.search(_unit(module))) else "" for module in (one, other)]
    words = [set(re.findall("[a-z]+", module.path.lower())) for module in (one, other)]
    apart = any(pair & words[0] and pair & words[1] and not pair & words[0] & words[1] for pair in _APART)
    parts = zip(*(module.path.split(".")[::-1] for module in (one, other)), strict=False)
    return (all(roles) and roles[0] != roles[1]) or apart or opposed(one.path, other.path) or any(_are_variants(*both) for both in parts)


def _are_variants(one: str, other: str) -> bool:
    """Whether two words are of one kind, which stands last, and tell two of it apart."""
    kinds = [re.findall("[a-z]+", word.lower())[-1:] for word in (one, other)]
    return kinds[0] == kinds[1] and variants(one, other)
