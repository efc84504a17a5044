"""Names in the words of conventions.py: their normal form, the role that its words mean, and what other words beside them change.

A row of the table is a regular expression; names are many and patterns of them few, so words that no row mentions are masked.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import cache, lru_cache, partial

from workbench.keymap.conventions import BLOCK, DIALECTS, ROTARY, SINGLE, WORDS

_SPLITS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|[/_-]")


def normal(name: str) -> str:
    """The normal form of a name, with a dot at both ends."""
    return f".{'.'.join(map(_normal_segment, name.replace('/', '.').split('.')))}."


@lru_cache(maxsize=1 << 14)
def _normal_segment(segment: str) -> str:
    if segment.isascii() and segment.isalpha() and segment.islower():
        return segment
    if segment.isascii() and segment.isdigit() and len(segment) < 10:
        return str(int(segment))
    words = re.sub(r"\.{2,}", ".", _SPLITS.sub(".", segment).lower().strip("."))
    return re.sub(r"(?<=[a-z])\.?0*([0-9]{1,9})(?=\.|$)", r":\1", words)


def words_of(text: str) -> str:
    """A normal form in the table's words, whatever stands around it."""
    return _by_pattern("words", text)


def role_of(words: str, block: bool) -> str:
    """The role that those words mean in a repeated block, or outside of one."""
    return re.sub(r"(?:\.mlp)+(?=\.)", ".mlp", _by_pattern("in a block" if block else "outside", words))


_TABLES = {"words": (WORDS, "[.:]"), "in a block": (BLOCK, r"\."), "outside": ((*SINGLE, *BLOCK), r"\.")}  # and what ends a match
_SPELLED = "\n".join(spelled for rows, _ in _TABLES.values() for _, spelled, _ in rows)
_WITH, _WITHOUT = re.sub(r"[?:()]", "", _SPELLED), re.sub(r"\(\?:[^()|]*\)\?|[a-z]\?", "", _SPELLED)  # what may stand there or not
_MENTIONED = frozenset(re.findall(r"[a-z]+", f"{_WITH}\n{_WITHOUT}"))
_RUNS = re.compile(r"[a-z]{2,}|[0-9]{3,}")
_MASKED = re.compile("zz|999")


def _by_pattern(table: str, text: str) -> str:
    """The text after a table's rows, by way of one with others in the place of words and long numbers that no row mentions."""
    strange: list[str] = []

    def masked(found: re.Match[str]) -> str:
        word = found[0]
        if word in _MENTIONED or word.endswith("attn"):  # some rows look behind for that
            return word
        strange.append(word)
        return "999" if word.isdigit() else "zz"

    told = _applied(table, _RUNS.sub(masked, text))
    if not strange:
        return told
    words = iter(strange)
    return _MASKED.sub(lambda _: next(words), told) if len(_MASKED.findall(told)) == len(strange) else _applied(table, text)


@lru_cache(maxsize=1 << 14)
def _applied(table: str, text: str) -> str:
    for fill, pattern in _compiled(table):
        text = pattern.sub(fill, text)
    return text


@cache
def _compiled(table: str) -> list[tuple[Callable[[re.Match[str]], str], re.Pattern[str]]]:
    rows, before = _TABLES[table]
    return [(partial(_filled, role), re.compile(f"(?:{spelled})(?={before})")) for role, spelled, _ in rows]


def _filled(role: str, found: re.Match[str]) -> str:
    for number, group in enumerate((group for group in found.groups() if group is not None), 1):
        role = role.replace(f"\\{number}", group)
    return re.sub(r"\\\d", "", role)


_KNOWN_SINGLE = re.compile(
    r"^(?:emb\.\w+|norm\.(?:last|pre)|(?:lm)?head|cls|dist|patch|mask\.token|text\.projection|visual\.projection|feature\.projection)(?:\.|$)"
)


def is_single_role(text: str) -> bool:
    return _KNOWN_SINGLE.match(text) is not None


def rotary_order(names: Iterable[str]) -> str:
    """The order of a side's rows by its names, or "" where they do not tell."""
    told = "\n".join(names)
    return next((order for order, words, _ in ROTARY if all(word in told for word in words)), "")


def dialect(words: set[str]) -> dict[str, str]:
    """What becomes what in a block that holds these words."""
    told = "".join(words)
    out: dict[str, str] = {}
    for present, absent, change, _ in DIALECTS:
        if all(word in told for word in present) and not any(word in told for word in absent):
            out |= {old: new for old, new in change.items() if old not in out}
    for word in words:  # a scale beside a shift, whatever they belong to
        if word.endswith(".gamma.") and f"{word[:-7]}.beta." in words:
            unit = f".{word[:-7].rpartition('.')[2]}".rstrip(".")
            out |= {f"{unit}.gamma.": f"{unit}.weight.", f"{unit}.beta.": f"{unit}.bias."}
    return out
