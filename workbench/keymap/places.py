"""A module goes where what stands around it went: what the leftover steps of a search add is held against what was known before.

A place is a part of a model, by the path that its modules lie under, or what has one name in all of its blocks, by that name without
the numbers of the blocks. Where the rest of a place of the file went is known, and where the rest of a place of the model came from:
a pair is not taken whose places both are known, and are not each other's.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING

from workbench.keymap.layouts import withdraw

if TYPE_CHECKING:
    from workbench.keymap.inference import Search

_NUMBER = re.compile(r"\d+")
COUNTED = re.compile(r"(?<![^.])\d+(?![^.])")  # a number by itself: `norm2` is a name


class Places:
    """Where the modules of both sides lie, and which pairs are known."""

    def __init__(self, search: Search) -> None:
        self.search = search
        self.partners: tuple[dict[str, set[str]], dict[str, set[str]]] = (defaultdict(set), defaultdict(set))  # module -> the other's
        self.known: set[str] = set()  # targets
        self.modules: tuple[list[str], ...] = ()  # of both sides, sorted
        self.masked: tuple[dict[str, list[str]], ...] = ()
        self.names: dict[str, list[str]] = defaultdict(list)  # of each module of the model
        self.ends: tuple[dict[str, set[str]], ...] = (defaultdict(set), defaultdict(set))  # name in all blocks -> the other's

    def guard(self, step: Callable[[Search], None]) -> None:
        """One step, less what of it is out of place."""
        search, before = self.search, len(self.search.pairs)
        step(search)
        added = [*islice(reversed(search.pairs), max(0, len(search.pairs) - before))]
        if added:
            self._learn(search.pairs.keys() - set(added))
        for target in added:
            pair = search.pairs[target]
            if len(pair.sources) == 1 and (why := self._speaks(_module(self._bare(pair.source)), _module(self._bare(target)))):
                withdraw(search, pair, why)

    def _bare(self, name: str) -> str:
        return self.search.bare.get(name, name)

    def _learn(self, targets: set[str]) -> None:
        if not self.modules:
            self.modules = tuple(
                sorted({_module(told.bare) for told in names.values()}) for names in (self.search.source_names, self.search.target_names)
            )
            for name, told in self.search.target_names.items():
                self.names[_module(told.bare)].append(name)
            self.masked = (defaultdict(list), defaultdict(list))
            for modules, masked in zip(self.modules, self.masked, strict=True):
                for module in modules:
                    masked[_mask(module)].append(module)
        for target in targets if not self.known else targets - self.known:
            other = _module(self._bare(target))
            for source in self.search.pairs[target].sources:
                self.partners[0][_module(self._bare(source))].add(other)
                self.partners[1][other].add(_module(self._bare(source)))
                mine, its = _counted(_module(self._bare(source))), _counted(other)
                self.ends[0][mine].add(its)
                self.ends[1][its].add(mine)
        self.known |= targets

    def _speaks(self, source: str, target: str) -> str:
        """Why a module of the file is none of that place of the model; nothing where it may be."""
        words = _mask(source), _mask(target)
        if words[0] != words[1] and all(text in side for text, side in zip(words, reversed(self.masked), strict=True)):
            return f"both the file and the model have {words[0]!r} and {words[1]!r}, and one is not the other"
        held = {name: len(self.search.wanted.shapes[name]) for name in self.names[target]}
        norm = max(held.values()) < 2 and any(name.endswith(".weight") for name in held)
        names = _counted(source), _counted(target)
        for side, own, other in ((1, names[1], names[0]), (0, names[0], names[1])) if norm else ():  # it has one name in all blocks
            ends = self.ends[side].get(own, set())
            if len(ends) == 1 and other not in ends:
                return f"{own!r} of the other blocks is {min(ends)!r} on the other side, and not {other!r}"
        for mine, its in self._views(source, target):
            went, came = self._rest(0, *mine, source), self._rest(1, *its, target)
            if (
                (went or _mask(mine[0]) == _mask(its[0]))
                and came
                and not any(_within(its, each) for each in went)
                and not any(_within(mine, each) for each in came)
            ):
                return f"what else lies in {its[0]!r} of the model is {min(came)!r} in the file, and not in {mine[0]!r}"
        return ""

    def _views(self, source: str, target: str) -> Iterator[tuple[tuple[str, int], tuple[str, int]]]:
        """Places of both sides that a pair would make one: a path, or one name in all blocks, without some of their numbers."""
        theirs = [*_ancestors(target)]
        yield from (((mine, 0), (its, 0)) for mine in _ancestors(source) for its in theirs)
        counts = [len(_NUMBER.findall(_module(name))) for name in (source, target)]
        for depth in range(1, min(counts) + 1):
            mine, its = _mask(source, depth), _mask(target, depth)
            if mine != its:
                yield (mine, depth), (its, depth)

    def _rest(self, side: int, place: str, depth: int, own: str) -> set[str]:
        """Where the other modules of a place have their partners."""
        if depth:
            held = [m for m in self.masked[side][_mask(own)] if _mask(m, depth) == place]
        else:
            modules, start = self.modules[side], f"{place}."
            held = modules[bisect_left(modules, start) : bisect_left(modules, f"{place}/")]
        return {other for module in held if module != own for other in self.partners[side].get(module, ())}


def _module(name: str) -> str:
    return name.rpartition(".")[0]


@lru_cache(maxsize=1 << 14)
def _counted(name: str) -> str:
    return COUNTED.sub("#", name)


def _mask(name: str, depth: int = 0) -> str:
    """A name without its outermost numbers, or any."""
    return _NUMBER.sub("#", name, count=depth)


def _ancestors(module: str) -> Iterator[str]:
    """What a module lies in, where a number tells it from its like."""
    while module := _module(module):
        if re.search(r"\d", module.rpartition(".")[2]):
            yield module


def _within(place: tuple[str, int], module: str) -> bool:
    path, depth = place
    return _mask(module, depth) == path if depth else module.startswith(f"{path}.") or module == path
