"""A whole model under foreign names, by what its modules hold and the order in which they stand.

Asked where names have explained next to nothing, and for what is left of both sides where that is the same. Both are cut into modules:
what lies under one path, by parameter and shape. Where they hold the same modules, but for a head of another size, one that is the
only one of its shapes is paired with the only one on the other side; those that share their shapes go by their numbers, or by their
order where the whole order is one. Two that could be exchanged without a trace (queries and keys, two towers) are told by their numbers
or words, or left. `in_order` looks at the models as wholes, `inside` at each part of which something is known, `members` at one module,
and `last` at the last that are left.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Iterator, Mapping
from itertools import accumulate, pairwise, takewhile
from typing import TYPE_CHECKING, NamedTuple

from workbench.keymap.conventions import IN_OUT, SCALES
from workbench.keymap.layouts import POSITIONS, UNTOLD_ROWS
from workbench.keymap.leftovers import variants
from workbench.keymap.maps import Ambiguous
from workbench.keymap.naming import Name, alike_words, count_alike, in_runs, opposed, spaced, together
from workbench.keymap.rules import rotary_order

if TYPE_CHECKING:
    from workbench.keymap.inference import Search

Shape = tuple[int, ...]
Found = tuple["Module", "Module", str]  # of the file, of the model, and what tells that they are one: "" where nothing does
Sign = tuple[tuple[str, Shape], ...]

_FEW = 10  # per cent of the target's names, which others may have paired
_MOST = 50_000  # names of both sides
_OUTPUTS = frozenset(("fc", "linear", "lin", "head", "classifier", "last", "conv", "out", "output", "logits", "dense", "final", "proj", "projection", "score"))  # fmt: skip
_LEAST = 3  # modules: fewer are no model
_SPARE = 4  # at least so many modules of the file for each that the model has no use for
_ROWS = re.compile(r"qkv|query_key_value|c_attn|in_proj|kv_proj|gate_up|w12|ada_?ln|modulation", re.I)  # parts in an order that is not told
_PARAM = re.compile(r"(running\.mean|running\.var|num\.batches\.tracked|[^.]+?)(?::\d+)?\.$")
_COUNTERS = frozenset(("num.batches.tracked", "num_batches_tracked"))  # a norm may be without
_ALIKE = "the numbers of modules that hold the same shapes"
_ONLY = "the only one of its shapes, in two models that hold the same modules"
_WORDS = "the only ones of their shapes with a word in common"
_PLACE = "its place in the order of the modules, which hold the same shapes from first to last"
_EXCHANGEABLE = "several modules hold the same shapes, and neither numbers nor the order tell which is which"
_TOLD = re.compile(r"\.x?attn\.(?:q|k|v|o|qkv|kv)$|\.emb\.\w+$")  # roles that another would be wrong for
_TURNED = re.compile(r"(?:^|[._])w?(?:q|k|query|key|qk|qkv)(?:$|[._])")  # what rotary embeddings turn
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
        told, forms = _order_is_told(search), {module.sign for module in theirs}
        spare = [module for module in ours if module.sign not in forms]  # of forms that the model has none of
        found = list(_paired(ours, theirs, told)) or list(_paired(ours[:-1], theirs[:-1], told, 1 + _LEAST))  # which may have another head
        if not found and _SPARE * len(spare) < len(ours):
            found = list(_paired([module for module in ours if module.sign in forms], theirs, told, 1 + _LEAST))
    if any(_speaks_against(one, other) for one, other, why in found if why):
        return
    _take(search, found)
    for one, other in [(one, other) for one, other, why in found if not why]:
        for param, target in [(param, target) for param, target in other.names.items() if param in one.names]:
            alike = tuple(m.names[param] for m, its, _ in found if its.sign == other.sign and param in m.names)
            search.ambiguous[target] = Ambiguous(target, alike[:8], _EXCHANGEABLE)


def _take(search: Search, found: list[Found], known: str = "") -> None:
    """Take what is told and not yet known; not where the pair by itself is doubted, and not queries and keys that a rotary embedding may
    turn: the order of their rows is not told by a place."""
    turning = any(".gate" in role for role in search.roles) and not any(POSITIONS.search(role) for role in search.roles)
    orders = {rotary_order(names) for names in (search.tensors, search.wanted.shapes)}
    turning = turning and (len(orders) > 1 or "" in orders)
    for one, other, why in found:
        turned = turning and any(_TURNED.search(text) for module in (one, other) for text in (spaced(module.path), _unit(module)))
        for param, target in other.names.items() if why else ():
            source, told = one.names.get(param), search.ambiguous.get(target)
            if turned and source and target not in search.pairs:
                search.ambiguous[target] = Ambiguous(target, (source,), f"{UNTOLD_ROWS}, and the names do not tell")
            elif source and source not in search.used and not (told and told.candidates == (source,)):
                search.take(target, source, f"{one.path} becomes {other.path}", "likely", known + why)


def inside(search: Search) -> None:
    """A member follows its module: a part of the model, of which some matrices came from one part of the file that holds the same
    modules, is compared with that part as a model by itself. Nothing comes of it where that speaks against what is known."""
    if len(search.pairs) in (0, len(search.wanted.shapes)) or len(search.items) + len(search.wanted.shapes) > _MOST:
        return
    ours, theirs = _sides(search)
    parts, told = (_by_part(ours), _by_part(theirs)), _order_is_told(search)
    home = {name: module for module in ours for name in module.names.values()}
    came: dict[str, set[str]] = defaultdict(set)  # module of the model -> those of the file
    went: dict[str, set[str]] = defaultdict(set)
    for module in theirs:
        for pair in [search.pairs[name] for name in module.names.values() if name in search.pairs]:
            for its in [home[source] for source in pair.sources if source in home]:
                came[module.path].add(its.path)
                went[its.path].add(module.path)
    for path in sorted(parts[1], key=lambda path: -path.count(".")):  # the innermost first
        wanted = parts[1][path]
        known = [m for m in wanted if m.path in came]
        if len(known) == len(wanted) or not any(len(shape) > 1 for m in known for _, shape in m.sign):
            continue
        there = _common_path(set().union(*(came[m.path] for m in known)))
        for held in [parts[0][end] for end in _ancestors(there) if end in parts[0]]:
            if Counter(m.sign for m in held) == Counter(m.sign for m in wanted):
                found = list(_paired(held, wanted, told, 1))
                if _agrees(found, came, went):
                    _take(search, found, f"in {path!r}, of which the rest is known: ")
                break


def _by_part(modules: list[Module]) -> dict[str, list[Module]]:
    """The modules by each path that they lie under."""
    out: dict[str, list[Module]] = defaultdict(list)
    for module in modules:
        for path in _ancestors(module.path.rpartition(".")[0]):
            out[path].append(module)
    return out


def _ancestors(path: str) -> Iterator[str]:
    """A path and what it lies in, but for the root."""
    while path:
        yield path
        path = path.rpartition(".")[0]


def _common_path(paths: set[str]) -> str:
    """The innermost path that all of these lie under."""
    words = sorted(path.split(".")[:-1] for path in paths)
    first, last = words[0], words[-1]  # between which all others stand
    return ".".join(word for word, _ in takewhile(lambda both: both[0] == both[1], zip(first, last, strict=False)))


def _agrees(found: list[Found], came: Mapping[str, set[str]], went: Mapping[str, set[str]]) -> bool:
    """Whether what is known already says the same of each, and no word speaks against one."""
    return not any(
        why
        and (
            (came.get(other.path, {one.path}), went.get(one.path, {other.path})) != ({one.path}, {other.path})
            or _speaks_against(one, other)
        )
        for one, other, why in found
    )


def _sides(search: Search) -> list[list[Module]]:
    """The modules of both sides in the order of the names; a parameter with a name of its own (a token, a table) is one by itself."""
    sides = []
    for names, shapes in zip((search.source_names, search.target_names), search.shapes, strict=True):
        found: dict[str, dict[str, str]] = defaultdict(dict)
        for name in [name for name in names if name in shapes]:
            path, _, param = names[name].bare.rpartition(".")
            if not (param in ("weight", "bias") or param in SCALES or param.startswith(("running_", "num_batches_"))):
                path, param = names[name].bare, ""
            while param in found[path]:  # two of one name: wrappers, or adapters
                path += "'"
            found[path][param] = name
        made = [_module(path, held, shapes, names) for path, held in found.items()]
        sides.append([module for module in made if module.sign])
    return sides


def _module(path: str, held: dict[str, str], shapes: Mapping[str, Shape], names: Mapping[str, Name]) -> Module:
    sign = tuple(sorted((param, _turned(name, shapes[name])) for param, name in held.items() if param not in _COUNTERS))
    role = names[next(iter(held.values()))].role
    return Module(path, re.sub(r"\d+", "#", path), tuple(map(int, re.findall(r"\d+", path))), role, held, sign)


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
    """The last module that is left of the file goes where the last of its form is left of the model, when nearly all else is paired.

    That is evidence where the words of both are the same but for their order and endings, or where what is paired before and after them
    is one on both sides and nothing else is left; never where their kinds differ or more is left beside one of them, unless they have
    two words in common that no other has.
    """
    if not 3 * len(search.wanted.shapes) <= 4 * len(search.pairs) < 4 * len(search.wanted.shapes) or len(search.items) > _MOST:
        return
    sides, done = _sides(search), (search.used, search.pairs)
    open_ = [[m for m in side if not any(n in done[at] for n in m.names.values())] for at, side in enumerate(sides)]
    told = {name for a in search.ambiguous.values() for name in (a.target, *a.candidates)}
    found = [both for both in _only_ones(*open_) if told.isdisjoint([*both[0].names.values(), *both[1].names.values()])]
    left = [[m for m in side if m not in [both[at] for both in found]] for at, side in enumerate(open_)]
    more = any(m.names.keys() & SCALES and len(_largest(m)) > 1 and told.isdisjoint(m.names.values()) for side in left for m in side)
    turned = any(pair.rule.endswith(", transposed") for pair in search.pairs.values())
    for one, other in found:
        shape = _largest(one)
        if (turned or "" in one.names) and len(shape) == 2 and len(set(shape)) == 1:  # it would fit transposed
            continue
        shared = len(_common(one.path, other.path) - _GENERAL)
        rival = any(len(_common(its.path, m.path) - _GENERAL) >= shared for side, its in zip(left, (other, one), strict=True) for m in side)
        by_words = shared and not rival and (shared > 1 or (_same_words(one, other) and not _beside(left, one, other)))
        alone = not more and not _beside(left, one, other) and not _strangers(one, other)
        if by_words or (alone and _one_place(search, sides, one, other)):
            for param, target in other.names.items():
                if param in one.names:
                    why = "the last of the file that is left and the last of its shapes in the model"
                    search.take(target, one.names[param], f"{one.path} becomes {other.path}", "likely", why)


def _only_ones(ours: list[Module], theirs: list[Module]) -> list[tuple[Module, Module]]:
    """Those of both sides that are the only ones of their form, of a shape that as many have on both sides, and whose words allow it."""
    shapes = [Counter(tuple(sorted(_largest(m))) for m in side) for side in (ours, theirs)]
    often = [Counter(m.sign for m in side) for side in (ours, theirs)]
    return [
        (one, other)
        for other in theirs
        for one in ours
        if one.sign == other.sign and often[0][one.sign] == often[1][one.sign] == 1
        if shapes[0][(shape := tuple(sorted(_largest(one))))] == shapes[1][shape] and _one_kind(one, other)
    ]


def _largest(module: Module) -> Shape:
    """The shape of most axes in a module."""
    return max((shape for _, shape in module.sign), key=len)


def _same_words(one: Module, other: Module) -> bool:
    """Whether the last words of two modules are the same but for their order and endings."""
    words = [re.sub(r".*\.(?=[^.]*[a-zA-Z])", "", module.path) for module in (one, other)]
    return all(_common(a, b) == set(re.findall("[a-z]{3,}", a.lower())) for a, b in (words, words[::-1]))


def _beside(left: list[list[Module]], one: Module, other: Module) -> bool:
    """Whether another module with a weight is left in what one of the two lies in."""
    homes = [module.path.rpartition(".")[0] for module in (one, other)]
    return any(
        m.names.keys() & SCALES and "" != m.path.rpartition(".")[0] == home for side, home in zip(left, homes, strict=True) for m in side
    )


def _one_kind(one: Module, other: Module) -> bool:
    """Whether the words of two modules of one form allow that they are one; what has a bias is no table."""
    kinds = {_kind_of(one), _kind_of(other)} & {"norm", "output", "positions", "" if "bias" in one.names else "table"}
    if kinds == {"positions", "table"} and len(_common(one.path, other.path) - _GENERAL) > 1:  # the same table, said shorter
        kinds = set()
    tasks = [_TASKS & set(re.findall("[a-z]+", m.path.lower())) or {"lm"} & {m.role.strip(".")[:2]} for m in (one, other)]
    return len(kinds) < 2 and (not all(tasks) or bool(tasks[0] & tasks[1])) and not _speaks_against(one, other)


def _strangers(one: Module, other: Module) -> bool:
    """Whether both paths have words that say what a module is for, and none of them in common; that it is a table says no more."""
    words = [{w for w in re.findall("[a-z]{3,}", spaced(m.path)) if not w.startswith("emb")} - _GENERAL - _OUTPUTS for m in (one, other)]
    return all(words) and not _same_role(one, other) and not any(alike_words(a, b) for a in words[0] for b in words[1])


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
    counts = [sum(name in done for param, name in module.names.items() if param not in _COUNTERS) for module in modules]
    return [m for m, count in zip(modules, counts, strict=True) if not count], any(
        0 < count < len(m.sign) for m, count in zip(modules, counts, strict=True)
    )


def _all_that_is_left(search: Search, ours: list[Module], theirs: list[Module]) -> list[Found]:
    """Beside others that are paired: only where nothing else is left of the file but vectors, and one alone by general words on both sides."""
    if search.ambiguous.keys() - search.pairs.keys():  # what is left may be what another was meant for
        return []
    wanted = Counter(module.sign for module in theirs)
    shapes = search.shapes[0]
    ours = [module for module in ours if module.sign in wanted or any(len(shapes[name]) > 1 for name in module.names.values())]
    if Counter(module.sign for module in ours) != wanted:
        return []
    found = list(_paired(ours, theirs, _order_is_told(search), 1))
    several = len({(one.mask, other.mask, one.sign) for one, other, _ in found}) > 1
    alike = all(_kind_of(one) and _kind_of(one) == _kind_of(other) and not _strangers(one, other) for one, other, _ in found)
    return found if several or alike else []


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
        out.append(_module(path, held, shapes, names))
    return [module for module in out if module.sign]


def _turned(name: str, shape: Shape) -> Shape:
    """A shape without ones, and that of a matrix kept as [..., in, out] as torch keeps it."""
    turned = (shape[-1], shape[-2], *shape[:-2]) if name.endswith(IN_OUT) and len(shape) > 1 else shape
    return tuple(n for n in turned if n != 1)


def _paired(ours: list[Module], theirs: list[Module], told: bool, least: int = _LEAST) -> Iterator[Found]:
    """Modules of both sides, and what tells that they are one; nothing, where they are of one form and nothing tells it.

    `told`: the order of the names is that of the modules on both sides.
    """
    groups: tuple[dict[Sign, list[Module]], ...] = (defaultdict(list), defaultdict(list))
    for side, modules in zip(groups, (ours, theirs), strict=True):
        for module in modules:
            side[module.sign].append(module)
    counts = [{sign: len(held) for sign, held in side.items()} for side in groups]
    if counts[0] != counts[1] or len(theirs) < least:
        return
    one_order = [m.sign for m in ours] == [m.sign for m in theirs] and _ascend(ours) and _ascend(theirs) and (told or _is_run(ours))
    in_file_order = all(in_runs(m.path for m in side) for side in (ours, theirs))
    exchangeable = _exchangeable(ours) | _exchangeable(theirs)
    for sign, wanted in groups[1].items():
        held = groups[0][sign]
        if any(_ROWS.search(module.path) for module in (*held, *wanted)):
            yield from ((*both, "") for both in zip(held, wanted, strict=True))
        elif len(held) == 1:
            yield held[0], wanted[0], _ONLY
        elif _is_run(held) and _is_run(wanted):
            yield from _by_numbers(held, wanted, in_file_order, _ALIKE)
        elif near := _by_words(held, wanted, in_file_order):
            yield from near
        else:
            yield from _by_place(held, wanted, exchangeable) if one_order else ((*both, "") for both in zip(held, wanted, strict=True))


def _order_is_told(search: Search) -> bool:
    """Whether both sides keep the names of each module together, and neither is sorted by name: else the order is none of the modules."""
    return all(together(names) and names != sorted(names) for names in (list(search.tensors), list(search.wanted.shapes)))


def _is_run(modules: list[Module]) -> bool:
    """Whether they differ in nothing but their numbers."""
    return len({m.mask for m in modules}) == 1 and len({m.numbers for m in modules}) == len(modules)


def _by_numbers(held: list[Module], wanted: list[Module], in_file_order: bool, why: str) -> Iterator[Found]:
    told = count_alike([(m.mask, m.numbers) for m in held], [(m.mask, m.numbers) for m in wanted], in_file_order)
    both = list(zip(*(sorted(side, key=lambda m: m.numbers) for side in (held, wanted)), strict=True))
    depth = {len(m.numbers) for pair in both for m in pair}
    for at in range(1, max(depth)) if len(depth) == 1 else ():  # blocks are not mixed
        told = told and not _torn({(one.numbers[:at], other.numbers[:at]) for one, other in both})
    yield from ((*pair, why if told else "") for pair in both)


def _by_words(held: list[Module], wanted: list[Module], in_file_order: bool) -> list[Found]:
    """By the words that not all of one side have: where each such set of words is alike to exactly one on the other side, and what has
    the same words differs in its numbers alone. Nothing, if one has no other: two towers that no word tells apart stay apart."""
    sets = [_told_by_words(side) for side in (held, wanted)]
    near = [(mine, its) for mine in sets[0] for its in sets[1] if any(alike_words(a, b) for a in mine for b in its)]
    if not len(near) == len(sets[0]) == len(sets[1]) == len({mine for mine, _ in near}) == len({its for _, its in near}):
        return []
    both = [(sets[0][mine], sets[1][its]) for mine, its in near]
    if any(len(one) != len(other) or (len(one) > 1 and not (_is_run(one) and _is_run(other))) for one, other in both):
        return []
    return [found for one, other in both for found in _by_numbers(one, other, in_file_order, _WORDS)]


def _told_by_words(modules: list[Module]) -> dict[frozenset[str], list[Module]]:
    """The modules by those of their words that not all of them have."""
    words = [frozenset(re.findall("[a-z]+", spaced(module.path))) for module in modules]
    shared, out = frozenset.intersection(*words), defaultdict(list)
    for module, own in zip(modules, words, strict=True):
        out[own - shared].append(module)
    return out


def _by_place(held: list[Module], wanted: list[Module], exchangeable: set[str]) -> Iterator[Found]:
    """By their order, which is one on both sides: not what could be exchanged without a trace, unless its role tells it from the others;
    and nothing where a list would go to two, one of which others go to as well."""
    often = [Counter((m.numbers, _unit(m)) for m in side) for side in (held, wanted)]
    torn = _torn({(one.mask, other.mask) for one, other in zip(held, wanted, strict=True)})
    for one, other in zip(held, wanted, strict=True):
        free = one.path not in exchangeable and other.path not in exchangeable
        alone = all(count[m.numbers, _unit(m)] == 1 for count, m in zip(often, (one, other), strict=True))
        yield one, other, _PLACE if not torn and (free or (alone and _same_role(one, other))) else ""


def _torn(ways: set[tuple[Hashable, Hashable]]) -> bool:
    """Whether what goes to two places goes to one that gets more."""
    goes, comes = Counter(mine for mine, _ in ways), Counter(its for _, its in ways)
    return any(goes[mine] > 1 and comes[its] > 1 for mine, its in ways)


def _common(one: str, other: str) -> set[str]:
    """The words of one path that are words of the other, or the beginning of one, or begin with one."""
    mine, theirs = (set(re.findall("[a-z]{3,}", path.lower())) for path in (one, other))
    return {word for word in mine if any(word.startswith(its) or its.startswith(word) for its in theirs)}


def _exchangeable(modules: list[Module]) -> set[str]:
    """What may stand in any order, whatever the order of the names: two towers, or queries and keys.

    Modules of one form side by side; and the parts of one module that hold the same, told by words alone. A part of one module keeps
    its place where one that is the only one of its shapes stands between it and its like.
    """
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
            apart = len(inside[one]) == 1 and singles[inside[other][0]] > singles[inside[one][0] + 1]
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
