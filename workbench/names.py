"""Names: how paths become dotted names, and how people select, order and mistype them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from workbench.errors import CorruptFileError, SelectionError

Patterns = str | Sequence[str]

# Name segments that wrappers put before a module's own names, and who does it.
WRAPPERS: Mapping[str, str] = {
    "module": "torch.nn.DataParallel and DistributedDataParallel, torch.optim.swa_utils.AveragedModel, DeepSpeed",
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "torch.distributed.fsdp",
    "_checkpoint_wrapped_module": "torch activation checkpointing",
    "_forward_module": "Lightning Fabric",
}


def join_path(path: tuple[Any, ...]) -> str:
    """The flat dotted name of a path of keys and list positions: ``("state", 0, "exp_avg")`` -> ``state.0.exp_avg``."""
    try:
        return ".".join(path)
    except TypeError:
        return ".".join(f"{key:#x}" if isinstance(key, int) and key.bit_length() > 4096 else str(key) for key in path)


def unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The pairs of a JSON object as a dict, for `object_pairs_hook`; JSON's own reader lets a later name replace an earlier one.

    Raises:
        CorruptFileError: a name stands there twice.
    """
    out = dict(pairs)
    if len(out) != len(pairs):
        name = next(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
        raise CorruptFileError(f"the name {name!r} stands there twice", hint="which of the two counts is ambiguous")
    return out


def natural_key(name: str) -> list[tuple[int, Any]]:
    """Sort key that puts ``layers.2`` before ``layers.10``."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", name) if part]


@lru_cache(maxsize=256)
def _compile(pattern: str) -> re.Pattern[str]:
    if pattern.startswith("re:"):
        try:
            return re.compile(pattern[3:])
        except re.error as error:
            raise SelectionError(f"{pattern!r} is no regular expression: {error}") from error
    out, i = [], 0
    while i < len(pattern):
        if folded := re.match(r"\{(\d+)-(\d+)\}", pattern[i:]):
            low, high = int(folded[1]), int(folded[2])
            if high - low > 100_000:
                raise SelectionError(f"{pattern!r} folds more than 100,000 numbers")
            out.append("(?:" + "|".join(str(n) for n in range(low, high + 1)) + ")")
            i += folded.end()
            continue
        out.append({"*": ".*", "?": "."}.get(pattern[i], re.escape(pattern[i])))
        i += 1
    return re.compile("".join(out), re.DOTALL)


def match_names(patterns: Patterns, names: Iterable[str]) -> list[str]:
    """The names that any of `patterns` selects, in their own order.

    ``*`` is everything. A pattern is a name (which then stands for itself alone), a glob (``*`` any run of characters, dots too; ``?`` one), a
    folded range as the tree shows it (``layers.{0-11}.*``), or a regular expression that must match whole, after ``re:``.
    """
    known = list(names)
    exact = {patterns} if isinstance(patterns, str) else set(patterns)
    if "*" in exact:
        return known
    compiled = [_compile(pattern) for pattern in exact.difference(known)]
    return [name for name in known if name in exact or any(c.fullmatch(name) for c in compiled)]


def require_names(patterns: Patterns, names: Iterable[str], *, what: str = "tensor") -> list[str]:
    """`match_names`, refusing a selection that is empty.

    Raises:
        SelectionError: nothing matches; the hint lists close names.
    """
    known = list(names)
    found = match_names(patterns, known)
    if not known and "*" in ({patterns} if isinstance(patterns, str) else patterns):
        return []
    if not found:
        shown = patterns if isinstance(patterns, str) else ", ".join(patterns)
        close = suggest(shown, known)
        raise SelectionError(
            f"no {what} matches {shown!r}",
            hint="did you mean " + ", ".join(close) + "?" if close else f"there are {len(known)} names to choose from",
        )
    return found


def suggest(name: str, names: Iterable[str], count: int = 3) -> list[str]:
    """Names close to a mistyped one, best first."""
    import difflib

    return difflib.get_close_matches(name, list(names)[:20_000], n=count, cutoff=0.5)


def unique_name(name: str, taken: Any, counts: dict[str, int]) -> str:
    """`name`, or `name#2`, `name#3`… where it is taken already; `counts` remembers how far each name has come."""
    if name not in taken:
        return name
    count = counts.get(name, 1) + 1
    while f"{name}#{count}" in taken:
        count += 1
    counts[name] = count
    return f"{name}#{count}"
