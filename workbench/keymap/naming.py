"""Names, read: in which container a tensor lies, with which numbers, and what it does there in the words of rules.py."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import NamedTuple

from workbench.keymap.rules import dialect, normal, role_of, words_of
from workbench.names import WRAPPERS

Indices = tuple[int, ...]

_WRAPPED = re.compile("|".join(WRAPPERS))


def bare_name(name: str) -> str:
    """The name without the segments that wrappers add."""
    return ".".join([part for part in name.split(".") if part not in WRAPPERS]) if _WRAPPED.search(name) else name


def wrapper_rule(source: str, target: str) -> tuple[str, str]:
    """What of the wrappers' segments goes and comes between two spellings of one name, and who writes them."""
    old, new = source.split("."), target.split(".")
    stripped, added = ([p for p in mine if p in WRAPPERS and p not in other] for mine, other in ((old, new), (new, old)))
    words = [f'strip "{part}."' for part in dict.fromkeys(stripped)] + [f'add "{part}."' for part in dict.fromkeys(added)]
    owners = dict.fromkeys(WRAPPERS[part] for part in (*stripped, *added))
    if not words:
        return "another spelling", "two published spellings of one name, or wrapper names that stand elsewhere"
    return ", ".join(words), f"written by {'; '.join(owners)}"


class Name(NamedTuple):
    """One name, read: the container it lies in, the numbers of the block, and its role there."""

    raw: str
    context: str
    indices: Indices
    role: str


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
    moved = re.search(r"\.@(\d+)\.$", text)  # a number that stood behind a parameter's name: LSTM layers
    if moved:
        head = text[: moved.start()]
        cut = head.find(".weight.") if ".weight." in head else head.find(".bias.")
        return _NUMBER.sub("#", head[:cut]) + ".#", (*map(int, _NUMBER.findall(head[:cut])), int(moved[1])), head[cut:] + "."
    if found is None:
        return "", (), text
    return _NUMBER.sub("#", found[1]).replace(":#", ".#"), tuple(map(int, _NUMBER.findall(found[1]))), found[2]


_MASK = 10**9
_LONGEST = 500
_COUNTED = frozenset({"layers", "experts", "blocks", "h", "resblocks", "stages"})


def _placed(name: str) -> tuple[str, Indices, str]:
    """`_split` of a name, by way of one that differs from it in a block's numbers alone: a model has few of those."""
    if len(name) > _LONGEST:  # nobody's convention
        return "", (), f".{name}."
    parts, before, numbers = name.split("."), "", []
    for at, part in enumerate(parts):
        if before in _COUNTED and part.isascii() and part.isdecimal() and len(part) < 10:
            numbers.append(int(part))
            parts[at] = str(_MASK)
        before = part
    context, indices, rest = _split_masked(".".join(parts)) if numbers else ("", (), "")
    if indices.count(_MASK) != len(numbers) or not numbers:  # none, or one that is no block's
        return _split(words_of(normal(name)))
    told = iter(numbers)
    return context, tuple([next(told) if n == _MASK else n for n in indices]), rest


@lru_cache(maxsize=1 << 14)
def _split_masked(name: str) -> tuple[str, Indices, str]:
    return _split(words_of(normal(name)))


def read_names(names: Mapping[str, str]) -> dict[str, Name]:
    """Every name, read as it is spelt in `names`. A block's words may change the meaning of others in it."""
    split = {name: _placed(bare_name(spelt)) for name, spelt in names.items()}
    inside: dict[str, set[str]] = defaultdict(set)
    for context, _, rest in split.values():
        inside[context].add(rest)
    dialects = {context: dialect(rests) for context, rests in inside.items()}
    roles: dict[tuple[str, str], str] = {}
    for context, rests in inside.items():
        for rest in rests:
            told = rest
            for old, new in dialects.get(context, {}).items():
                told = told.replace(old, new)
            roles[context, rest] = role_of(told, bool(context))
    taken = Counter((context, indices, roles[context, rest]) for context, indices, rest in split.values())
    return {  # two words of one role in one block: what they mean is not known, and they stay as they are
        name: Name(name, context, indices, role if taken[context, indices, role := roles[context, rest]] == 1 else rest)
        for name, (context, indices, rest) in split.items()
    }


def strange_wrappers(sources: Collection[str], targets: Collection[str]) -> list[str]:
    """Segments that no target has and without which most targets are there: wrappers that no table knows."""
    some, wanted = list(sources)[:: max(1, len(sources) // 200)], {bare_name(name) for name in targets}
    often = Counter(part for name in some for part in set(name.split(".")))
    out = []
    for part, count in often.most_common(12):
        if 10 * count < 7 * len(some) or 10 * sum(_without(name, part) in wanted for name in some) < 7 * len(some):
            continue
        bare = {_without(name, part) for name in sources}
        if len(sources) == len(bare) and 10 * len(bare & wanted) >= 9 * len(wanted) > 10 * len(wanted & {bare_name(n) for n in sources}):
            out.append(part)
    return out


def _without(name: str, part: str) -> str:
    return bare_name(".".join(p for p in name.split(".") if p != part))


_DOMAINS = {
    "encoder": "encoder",
    "decoder": "decoder",
    "visual": "vision",
    "vision": "vision",
    "image": "vision",
    "text": "text",
    "language": "text",
    "audio": "audio",
    "speech": "audio",
}


@lru_cache(maxsize=1 << 16)
def domain(name: str) -> frozenset[str]:
    return frozenset(_DOMAINS[word] for word in re.split(r"[._/#]", name.lower()) if word in _DOMAINS)


def opposed(a: str, b: str) -> bool:
    return any(
        pair <= domain(a) | domain(b) and not pair & domain(a) & domain(b) and (pair & domain(a)) and (pair & domain(b))
        for pair in ({"encoder", "decoder"}, {"vision", "text"}, {"audio", "text"}, {"audio", "vision"})
    )


def words_in(context: str) -> set[str]:
    return {word for word in re.split(r"[.:#]", context) if word}


def tokens_of(name: Name) -> list[str]:
    text = name.context
    for number in name.indices:
        text = text.replace("#", str(number), 1)
    return [word for word in f"{text}{name.role}".split(".") if word]


def shown(context: str) -> str:
    return context.strip(".").replace("#", "*")


def grouped(names: dict[str, Name]) -> dict[str, dict[Indices, dict[str, list[str]]]]:
    out: dict[str, dict[Indices, dict[str, list[str]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for name in names.values():
        out[name.context][name.indices][name.role].append(name.raw)
    return {context: {i: dict(roles) for i, roles in held.items()} for context, held in out.items()}
