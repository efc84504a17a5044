"""Names, read: in which container a tensor lies, with which numbers, and what it does there in the words of rules.py.

A model has a hundred thousand names and few patterns of them: a pattern is read once, by way of a name whose numbers are masked.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Hashable, Iterable, Mapping
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

from workbench.keymap.conventions import UPWARD
from workbench.keymap.rules import dialect, normal, role_of, words_of
from workbench.names import WRAPPERS
from workbench.sections import names_average

Indices = tuple[int, ...]

_WRAPPED = re.compile("|".join(WRAPPERS))


def bare_name(name: str) -> str:
    """The name without the segments that wrappers add."""
    return ".".join([part for part in name.split(".") if part not in WRAPPERS]) if _WRAPPED.search(name) else name


def bare_names(names: Collection[str]) -> list[str]:
    """The same of many; a look at all of them together tells most often that there are no such segments."""
    text = "\n".join(names)
    return list(map(bare_name, names)) if any(part in text for part in WRAPPERS) else list(names)


def wrapper_rule(source: str, target: str, strange: Collection[str] = ()) -> tuple[str, str]:
    """What of the wrappers' segments goes and comes between two spellings of one name, and who writes them (or that nobody known does)."""
    old, new = source.split("."), target.split(".")
    words: dict[str, None] = {}
    parts: dict[str, None] = {}
    for verb, mine, other in (("strip", old, new), ("add", new, old)):
        here = {part for part in mine if part not in other and (part in WRAPPERS or part in strange)}
        words |= dict.fromkeys(f'{verb} "{".".join(run)}."' for gone, run in groupby(mine, here.__contains__) if gone)
        parts |= dict.fromkeys(part for part in mine if part in here)
    if not words:
        return "another spelling", "two published spellings of one name, or wrapper names that stand elsewhere"
    known = dict.fromkeys(WRAPPERS[part] for part in parts if part in WRAPPERS)
    unknown = ", ".join(repr(part) for part in parts if part not in WRAPPERS)
    told = [f"written by {'; '.join(known)}"] if known else []
    told += [f"{unknown} is in no name of the model, and without it the names are the model's"] if unknown else []
    return ", ".join(words), "; ".join(told)


def end_rule(source: str, target: str) -> str:
    """What becomes what where two names end alike, less the words of their modules that both end in."""
    one, other = ([*name.split(".")[:-1]] or [name] for name in (source, target))
    while one and other and one[-1] == other[-1]:
        one.pop()
        other.pop()
    if not one or not other:
        return f'strip "{".".join(one)}."' if one else f'add "{".".join(other)}."' if other else "same name"
    return f"{'.'.join(one)} becomes {'.'.join(other)}"


class Name(NamedTuple):
    """One name, read: the container it lies in, the numbers of the block, its role there, and how it is spelt without wrappers."""

    raw: str
    context: str
    indices: Indices
    role: str
    bare: str


_BLOCK_WORDS = "layers?|h|blocks?|blk|resblocks|stages?|experts|cells|trunk|res|denselayer|denseblock|transition|encoder\\.layer"

_CONTAINER = re.compile(rf"^(.*\.(?:{_BLOCK_WORDS})[.:]\d+(?:\.\d+)*)(\..*)$")

_INNER = re.compile(r"^(.*\.\d+|.*:\d+)\.layer:?\.?\d+$")

_ANY = re.compile(r"^(.*?\.\d+(?:\.\d+)*)(\..*)$")

_NUMBER = re.compile(r"(?<=[.:])\d+")


@lru_cache(maxsize=1 << 18)
def _split(text: str) -> tuple[str, Indices, str]:
    """A normal form as (container with # for its numbers, the numbers, what follows)."""
    found = _CONTAINER.match(text)
    while found is not None and (inner := _INNER.match(found[1])):  # `layer.0` of a block is a role in it
        found = re.match(rf"^({re.escape(inner[1])})(\..*)$", text)
    found = found or _ANY.match(text)
    moved = "@" in text and re.search(r"\.@(\d+)\.$", text)  # a number that stood behind a parameter's name: LSTM layers
    if moved:
        head = text[: moved.start()]
        cut = head.find(".weight.") if ".weight." in head else head.find(".bias.")
        return _NUMBER.sub("#", head[:cut]) + ".#", (*map(int, _NUMBER.findall(head[:cut])), int(moved[1])), head[cut:] + "."
    if found is None:
        return "", (), text
    return _NUMBER.sub("#", found[1]).replace(":#", ".#"), tuple(map(int, _NUMBER.findall(found[1]))), found[2]


_TWICE = re.compile(r"\.([a-z]+)\.\1(?=\.)")
_MASK = 10**9  # no name's own: numbers that are read have nine digits at most
_LONGEST = 500
_COUNTED = frozenset({"layers", "experts", "blocks", "h", "resblocks", "stages"})
_NUMBERS = re.compile(r"\.([0-9]{1,9})(?![^.])")


def _placed(name: str) -> tuple[str, Indices, str]:
    """`_split` of a name, by way of one that differs from it in a block's numbers alone."""
    if len(name) > _LONGEST:  # nobody's convention
        return "", (), f".{name}."
    pieces = _NUMBERS.split(name)  # text, number, text, …
    masked, told = _counted(tuple(pieces[::2]))
    if told is not None:  # each number is an index
        return told[0], tuple(map(int, pieces[1::2])), told[1]
    if masked:
        numbers = iter([int(pieces[at]) for at in masked])
        for at in masked:
            pieces[at] = str(_MASK)
        context, indices, rest = _split_masked(tuple(pieces))
        if indices.count(_MASK) == len(masked):
            return context, tuple([next(numbers) if n == _MASK else n for n in indices]), rest
    return _split(words_of(normal(name)))


@lru_cache(maxsize=1 << 14)
def _counted(texts: tuple[str, ...]) -> tuple[tuple[int, ...], tuple[str, str] | None]:
    """Which pieces of a name with these texts around its numbers are numbers behind a word for blocks; if all are, and are indices, the
    container and what follows."""
    words = [text.rpartition(".")[2] in _COUNTED and not text.endswith(("ff.layers", "ffn.layers")) for text in texts[:-1]]
    if all(words) and words:
        context, indices, rest = _split_masked(tuple([piece for text in texts for piece in (text, str(_MASK))][:-1]))
        if indices == (_MASK,) * len(words):
            return (), (context, rest)
    return tuple([2 * at + 1 for at, counts in enumerate(words) if counts]), None


@lru_cache(maxsize=1 << 14)
def _split_masked(pieces: tuple[str, ...]) -> tuple[str, Indices, str]:
    name = pieces[0] + "".join(f".{number}{text}" for number, text in zip(pieces[1::2], pieces[2::2], strict=True))
    return _split(words_of(normal(name)))


def read_names(names: Mapping[str, str]) -> dict[str, Name]:
    """Every name, read as it is spelt in `names`. A block's words may change the meaning of others in it."""
    bares = bare_names(names.values())
    placed = list(map(_placed, bares))
    inside: dict[str, set[str]] = defaultdict(set)
    beside: dict[str, set[str]] = defaultdict(set)  # what stands in containers of their own below
    for context, _, rest in placed:
        inside[context].add(rest)
    for context in [context for context in inside if context.endswith(".experts.#")]:
        for outer in {context[: at.end()] for at in re.finditer("#", context[:-1])} & inside.keys():
            beside[outer].add(".experts.")
    roles = {context: _roles(context, rests, beside[context]) for context, rests in inside.items()}
    keys = [(context, indices, roles[context][rest]) for context, indices, rest in placed]
    taken = {key for key, count in Counter(keys).items() if count > 1} if len(set(keys)) < len(keys) else ()
    if not taken:
        return {name: Name(name, *key, bare) for name, key, bare in zip(names, keys, bares, strict=True)}
    return {  # two words of one role in one block: what they mean is not known, and they stay as they are
        name: Name(name, *key, bare) if key not in taken else Name(name, *place, bare)
        for name, key, place, bare in zip(names, keys, placed, bares, strict=True)
    }


def outside(told: Name) -> Name:
    """The name as it is read outside of blocks, whatever number it has."""
    return Name(told.raw, "", (), role_of(words_of(normal(told.bare)), False), told.bare)


def _roles(context: str, rests: set[str], beside: set[str]) -> dict[str, str]:
    """What each of the words in a block means there. A word that is said twice tells no more than once, unless both are there."""
    changes, out = dialect(rests | beside | ({".expert.#"} if context.endswith(".experts.#") else set())), {}
    for rest in rests:
        told = rest
        for old, new in changes.items():
            told = told.replace(old, new)
        out[rest] = role_of(told, bool(context))
    once = {rest: _TWICE.sub(r".\1", role) for rest, role in out.items()}
    often = Counter(once.values())
    return {rest: once[rest] if often[once[rest]] == 1 else role for rest, role in out.items()}


def strange_wrappers(sources: Collection[str], targets: Collection[str]) -> list[str]:
    """Segments that no target has and without which most targets are there: wrappers that no table knows."""
    some, wanted = list(sources)[:: max(1, len(sources) // 200)], set(bare_names(targets))
    often = Counter(part for name in some for part in set(name.split(".")))
    out = []
    for part, count in often.most_common(12):
        if 10 * count < 7 * len(some) or 10 * sum(_without(name, part) in wanted for name in some) < 7 * len(some):
            continue
        bare = {_without(name, part) for name in sources}
        if len(sources) == len(bare) and 10 * len(bare & wanted) >= 9 * len(wanted) > 10 * len(wanted & set(bare_names(sources))):
            out.append(part)
    return out


def _without(name: str, part: str) -> str:
    return bare_name(".".join(p for p in name.split(".") if p != part))


def fullest_root(sources: Mapping[str, Hashable], targets: Mapping[str, Hashable]) -> tuple[str, list[str]]:
    """The root under which the file has the model's own names, where other roots have some of them too, and none that this has not; and
    those that have them all as well, and whose words say that they are its moving averages."""
    names = list(targets)
    ends = tuple(f".{names[at]}" for at in sorted({0, len(names) // 2, len(names) - 1}))
    roots = {name[: -len(end)] for name in sources if name.endswith(ends) for end in ends if name.endswith(end)}
    if not 2 <= len(roots) <= 8 or not sources.keys().isdisjoint(targets):
        return "", []
    held = {root: {name for name, shape in targets.items() if sources.get(f"{root}.{name}") == shape} for root in roots}
    most = max(held, key=lambda root: (len(held[root]), not names_average(root)))
    averages = [root for root in held if root != most and held[root] == held[most] and names_average(root) and not names_average(most)]
    alone = all(held[root] < held[most] for root in roots - {most, *averages})
    return (most, sorted(averages)) if alone and 10 * len(held[most]) >= 9 * len(targets) else ("", [])


_DOMAINS = {
    "encoder": "encoder",
    "decoder": "decoder",
    "visual": "vision",
    "vision": "vision",
    "image": "vision",
    "img": "vision",
    "text": "text",
    "txt": "text",
    "language": "text",
    "audio": "audio",
    "speech": "audio",
    "fwd": "forward",
    "bwd": "backward",
}


_SHORT = {"src": "source", "tgt": "target", "l": "left", "r": "right", "f": "forward", "b": "backward"}  # beside those of _DOMAINS


@lru_cache(maxsize=1 << 16)
def domain(name: str) -> frozenset[str]:
    return frozenset(_DOMAINS[word] for word in re.split(r"[._/#]", name.lower()) if word in _DOMAINS)


_HEADS = frozenset({"head", "heads", "classifier", "predictions"})


@lru_cache(maxsize=1 << 14)
def in_head(name: str) -> bool:
    """Whether a tensor's module stands in a head of the model; one that is the head itself does not."""
    return not _HEADS.isdisjoint(re.split(r"[._]", ".".join(name.lower().split(".")[:-2])))


_OPPOSED = ({"encoder", "decoder"}, {"forward", "backward"}, {"vision", "text"}, {"audio", "text"}, {"audio", "vision"})


_RIVALS = ({"actor", "critic"}, {"policy", "value"}, {"student", "teacher"}, {"generator", "discriminator"})


@lru_cache(maxsize=1 << 14)
def _rivals(name: str) -> frozenset[str]:
    return frozenset().union(*_RIVALS) & set(re.split(r"[._/#]", name.lower()))


def opposed(a: str, b: str) -> bool:
    """Whether the words of two names, or containers, tell that one is no part of what the other is a part of."""
    return _clash(_rivals(a), _rivals(b), _RIVALS) or _clash(domain(a), domain(b), _OPPOSED)


def _clash(one: frozenset[str], other: frozenset[str], pairs: Iterable[set[str]]) -> bool:
    if not one or not other:
        return False
    return any(pair <= one | other and not pair & one & other and pair & one and pair & other for pair in pairs)


def spaced(path: str) -> str:
    """A path in small letters, its words apart where a capital began one."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", path).lower()


def alike_words(one: str, other: str) -> bool:
    """Whether two words of modules mean the same: one is short for the other, or its beginning, of three letters or more."""
    short, long = sorted((_DOMAINS.get(word) or _SHORT.get(word, word) for word in (one, other)), key=len)
    return short == long or (len(short) > 2 and long.startswith(short))


def words_in(context: str) -> set[str]:
    return {word for word in re.split(r"[.:#]", context) if word}


def tokens_of(name: Name) -> list[str]:
    text = name.context
    for number in name.indices:
        text = text.replace("#", str(number), 1)
    return [word for word in f"{text}{name.role}".split(".") if word]


def shown(context: str) -> str:
    return context.strip(".").replace("#", "*")


def together(names: Iterable[str]) -> bool:
    """Whether the names of each module stand together: in a file that is shuffled they do not."""
    runs = [module for module, _ in groupby(name.rpartition(".")[0] for name in names)]
    return len(runs) == len(set(runs))


def in_runs(names: Iterable[str]) -> bool:
    """Whether what is numbered alike rises or falls from first to last: a file that is shuffled tells no order."""
    runs: dict[str, list[Indices]] = defaultdict(list)
    for name in names:
        runs[re.sub(r"\d+", "#", name)].append(tuple(map(int, re.findall(r"\d+", name))))
    return all(run in (sorted(run), sorted(run, reverse=True)) for run in runs.values())


def count_alike(ours: list[tuple[str, Indices]], theirs: list[tuple[str, Indices]], ordered: bool) -> bool:
    """Whether the numbers of two runs, each under its path and in its own order, tell which is which: under other words not where one
    falls and the other does not, or where others stand behind a word of a way up, which some number from its end."""
    if ours[0][0] == theirs[0][0]:
        return True
    falls = [ordered and side == sorted(side, reverse=True) for side in (ours, theirs)]
    upward = {n for _, n in ours} != {n for _, n in theirs} and any(UPWARD.search(side[0][0]) for side in (ours, theirs))
    return falls[0] == falls[1] and not upward


_PART = re.compile(r"(.*?[.:])(\d+)(?=\.)")


@lru_cache(maxsize=1 << 10)
def moved_parts(ours: frozenset[str], theirs: frozenset[str]) -> frozenset[str]:
    """The roles in two blocks' numbered parts that count otherwise: as many parts, with other numbers."""
    parts: tuple[dict[str, set[str]], ...] = (defaultdict(set), defaultdict(set))
    found = [(side, role, part) for side, roles in enumerate((ours, theirs)) for role in roles if (part := _PART.match(role))]
    for side, _, part in found:
        parts[side][part[1]].add(part[2])
    moved = {word for word, numbers in parts[1].items() if numbers != parts[0][word] and len(numbers) == len(parts[0][word])}
    return frozenset(role for side, role, part in found if side and part[1] in moved)


Block = dict[str, list[str]]  # role -> names


def grouped(names: dict[str, Name]) -> dict[str, dict[Indices, Block]]:
    """context -> indices -> role -> names."""
    out: dict[str, dict[Indices, Block]] = {}
    for raw, context, indices, role, _ in names.values():
        held = out.setdefault(context, {})
        if (block := held.get(indices)) is None:
            block = held[indices] = {}
        block.setdefault(role, []).append(raw)
    return out
