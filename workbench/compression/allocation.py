"""The optimizer behind plans: one option of each group, least total error within a budget of bytes (the multiple-choice knapsack).

Two relaxations share one table. Per group only the lower convex hull of (bytes, error) matters to the linear relaxation; taking
the hulls' steps by falling gain per byte gives its optimum at every budget at once: a lower bound on the error of any choice, the
upper bound that the taken steps reach, and the frontier. Between the two lies an exact search over partial choices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

Options = Sequence[tuple[int, float]]  # (bytes, error) of each option of one group
_WIDTH = 4_000  # partial choices that are kept at once


@dataclass(frozen=True)
class Step:
    """One step along the hull of a group: from the option taken before to `option`."""

    group: int
    option: int
    nbytes: int
    error: float


def hull(options: Options) -> list[int]:
    """The options on the lower convex hull, from the smallest to the one with the least error."""
    kept: list[int] = []
    for i in sorted(range(len(options)), key=lambda i: (options[i][0], options[i][1])):
        if kept and options[i][1] >= options[kept[-1]][1]:
            continue
        while len(kept) > 1 and _slope(options[kept[-2]], options[kept[-1]]) >= _slope(options[kept[-2]], options[i]):
            kept.pop()
        kept.append(i)
    return kept


def _slope(a: tuple[int, float], b: tuple[int, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


def steps(groups: Sequence[Options]) -> tuple[list[int], list[Step]]:
    """(the smallest option of each group, the steps up from there by falling gain per byte): every prefix is optimal at its own size."""
    hulls = [hull(options) for options in groups]
    found = [
        Step(g, b, groups[g][b][0] - groups[g][a][0], groups[g][b][1] - groups[g][a][1])
        for g, on in enumerate(hulls)
        for a, b in pairwise(on)
    ]
    return [on[0] for on in hulls], sorted(found, key=lambda step: step.error / step.nbytes)


class _Rest:
    """The groups not yet decided, relaxed: what they cost at least, and what their steps reach."""

    def __init__(self, groups: Sequence[Options], first: Sequence[int], taken: Sequence[Step], members: set[int]) -> None:
        self.steps = [step for step in taken if step.group in members]
        self.nbytes = sum(groups[g][first[g]][0] for g in members)
        self.error = sum(groups[g][first[g]][1] for g in members)
        self.sizes = np.cumsum([0.0, *(step.nbytes for step in self.steps)])
        self.errors = np.cumsum([0.0, *(step.error for step in self.steps)])

    def lower(self, room: Any) -> Any:
        return self.error + np.interp(room, self.sizes, self.errors)

    def reached(self, room: Any) -> tuple[Any, Any]:
        """(how many steps fit, the error then)."""
        count = np.searchsorted(self.sizes, room, "right") - 1
        return count, self.error + self.errors[count]


def allocate(groups: Sequence[Options], budget: int, width: int = _WIDTH) -> tuple[list[int], float]:
    """The option of each group, and a lower bound on the total error of any choice within `budget` bytes.

    Partial choices that another one beats in both bytes and error, or whose lower bound reaches the best whole choice, are given up.
    Where more than `width` remain, those of the highest lower bound are too, and the bound returned is the lowest among them: so the
    answer is exact whenever the bound is its error.

    Precondition: the smallest options fit.
    """
    first, taken = steps(groups)
    spread = [max(size for size, _ in options) - min(size for size, _ in options) for options in groups]
    order = sorted(range(len(groups)), key=lambda g: -spread[g])
    left = set(order)
    sizes, errors, dropped = np.zeros(1), np.zeros(1), np.inf
    stages: list[tuple[Any, Any]] = []
    best, chosen = np.inf, list(first)
    for depth in range(len(order) + 1):
        rest = _Rest(groups, first, taken, left)
        if depth:
            options = np.array(groups[order[depth - 1]], dtype=float)
            sizes, errors = (sizes[:, None] + options[:, 0]).ravel(), (errors[:, None] + options[:, 1]).ravel()
        room = budget - sizes - rest.nbytes
        fits = np.flatnonzero(room >= 0)
        fits = fits[np.lexsort((errors[fits], sizes[fits]))]
        least = np.minimum.accumulate(np.concatenate([[np.inf], errors[fits]]))[:-1]
        fits = fits[errors[fits] < least]
        count, upper = rest.reached(room[fits])
        upper = upper + errors[fits]
        at = int(np.argmin(upper))
        if upper[at] < best:
            best, chosen = float(upper[at]), _whole(first, order[:depth], stages, len(options) if depth else 1, int(fits[at]))
            for step in rest.steps[: int(count[at])]:
                chosen[step.group] = step.option
        low = errors[fits] + rest.lower(room[fits])
        kept = np.flatnonzero(low < best - 1e-12 * abs(best))
        if len(kept) > width:
            by_bound = kept[np.argsort(low[kept], kind="stable")]
            dropped = min(dropped, float(low[by_bound[width]]))
            kept = np.sort(by_bound[:width])
        if not len(kept) or not left:
            break
        places = fits[kept]
        if depth:
            stages.append((places // len(options), places % len(options)))
        sizes, errors = sizes[places], errors[places]
        left = left - {order[depth]}
    return chosen, min(math.fsum(groups[g][i][1] for g, i in enumerate(chosen)), dropped)


def _whole(first: Sequence[int], order: Sequence[int], stages: Sequence[tuple[Any, Any]], options: int, place: int) -> list[int]:
    """Follow a partial choice back to its beginning; undecided groups stay at their smallest option."""
    out = list(first)
    if order:
        out[order[-1]], place = place % options, place // options
    for (parents, picked), group in zip(reversed(stages), reversed(order[:-1]), strict=True):
        out[group], place = int(picked[place]), int(parents[place])
    return out
