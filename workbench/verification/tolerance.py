"""Tolerance: how far two honest computations of one model may differ, and why.

The limit is measured where it can be: the reference runs again in float64, and again with its sums in reverse order, on the same calls.
The larger of what float64 moves and half of what the other order moves (two roundings, not one) is the rounding of the reference itself, its
noise floor. Where float64 is impossible the limit is a formula, and the reason says so. A limit is absolute, per output and batch, and
below it per group of places whose values are far smaller than the largest (`NoiseFloor.judge`): rounding follows the values that were summed,
so what stands beside a mask of -1e9 or an item a million times as large says nothing of the others.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from workbench.tables import format_bytes
from workbench.verification.measures import Spread, spread
from workbench.verification.runners import Runner, running
from workbench.verification.values import Call
from workbench.verification.variations import nearby

if TYPE_CHECKING:
    import torch

_FACTOR = 8  # two roundings of like size, drawn from few samples: their difference stays well below 8 floors
_STEPS = 4  # never asks for better than 4 eps of the largest value
_FORMULA = 32  # covers sums over about 1000 terms per layer
_FEW = 256  # below so many values a floor is luck: nearby inputs are measured too
_MAX_DOUBLE = 1 << 30  # bytes of a float64 copy
_UNKNOWN_DEPTH = 100
_APART = 16  # a slice whose values stay below a sixteenth of the largest is judged by its own noise as well
_GAP = 10  # binades without a value that part two populations
_CHANCE = math.log(1e-6)  # so unlikely must it be that values which only happen to cancel lie so far below the others
_ALL: Mapping[str, torch.Tensor] = MappingProxyType({})  # keeps every place


@dataclass(frozen=True)
class Limit:
    """The largest difference that rounding explains for one output. `floor` is None where it was not measured.

    `places` says where it holds when it is not the whole output, and `far` how far the candidate lies there, where one was judged.
    """

    value: float
    floor: float | None
    reason: str
    amplified: bool = False
    places: str = ""
    far: float = 0.0

    @property
    def ratio(self) -> float:
        return self.far / self.value if self.value else math.inf if self.far else 0.0


@dataclass
class _Seen:
    """What one output showed on one batch, over its calls: how far float64 and reversed sums moved it."""

    exact: Spread | None = None
    reordered: Spread | None = None

    @property
    def moved(self) -> Spread | None:
        """By the larger of the two, reversed sums halved."""
        if self.exact is None or self.reordered is None or self.exact.shape != self.reordered.shape:
            return self.exact or self.reordered
        both = copy.copy(self.exact)
        both.far = self.exact.far.maximum(self.reordered.far / 2)
        return both


class NoiseFloor:
    """The reference's own rounding, gathered beside a comparison.

    Attributes:
        refusal: why float64 is impossible, or None.
    """

    def __init__(self, exact: Runner | None, refusal: str | None, depth: int | None, reordered: Runner | None = None) -> None:
        self._exact, self._reordered, self.refusal, self._depth = exact, reordered, refusal, depth
        self._given: dict[str, dict[str, _Seen]] = {}
        self._made: dict[str, dict[str, _Seen]] = {}

    def add(
        self,
        call: Call,
        outputs: Mapping[str, torch.Tensor],
        keep: Mapping[str, torch.Tensor] = _ALL,
        batch: str = "",
        *,
        made: bool = False,
    ) -> dict[str, torch.Tensor]:
        """Run both twins on the call that gave `outputs`. A twin that fails ends its measuring; float64's failure is the refusal.

        Args:
            keep: places that count, by output; see `values.kept`.
            batch: which one, for `limit`. What is `made` raises no limit but its own.
        Returns:
            {output: places of whole numbers and booleans on which the twins decide otherwise, and on made inputs those of which a twin
            makes NaN or infinity alone}, where there are any.
        """
        undecided: dict[str, torch.Tensor] = {}
        for how, twin in (("exact", self._exact), ("reordered", self._reordered)):
            if twin is None:
                continue
            try:
                found = self._answers(how, twin, call)
            except Exception as error:  # the twin runs a stranger's forward: whatever it raises is the reason
                if made:
                    continue
                setattr(self, f"_{how}", None)
                if how == "exact":
                    first = next(iter(str(error).splitlines()), "")
                    self.refusal = f"the model does not run in float64 ({type(error).__name__}: {first})"
                continue
            for name, value in outputs.items():
                other = found.get(name)
                if other is None or other.shape != value.shape:
                    continue
                if value.is_floating_point() or value.is_complex():
                    held = (self._made if made else self._given).setdefault(name, {}).setdefault(batch, _Seen())
                    moved, before = spread(value, other, keep.get(name)), getattr(held, how)
                    if before is None:
                        setattr(held, how, moved)
                    else:
                        before.join(moved)
                    odd = value.isfinite() & ~other.isfinite()  # a row that is masked whole: which number it gets hangs on the dtype
                    if made and bool(odd.any()):
                        undecided[name] = undecided.get(name, False) | odd
                elif bool((other != value).any()):
                    undecided[name] = undecided.get(name, False) | (other != value)
        return undecided

    def _answers(self, how: str, twin: Runner, call: Call) -> dict[str, torch.Tensor]:
        from workbench.verification.reordering import reversed_sums

        if how == "exact":
            return twin(call.fresh().map(lambda t: t.double() if t.is_floating_point() else t))
        with reversed_sums():
            return twin(call.fresh())

    def add_nearby(
        self, reference: Runner, call: Call, keep: Mapping[str, torch.Tensor] = _ALL, batch: str = "", *, made: bool = False
    ) -> None:
        """Up to 8 more samples on slightly moved inputs, when an output is too small to judge by."""
        seen = [held[batch] for held in (self._made if made else self._given).values() if batch in held]
        if not any(held.exact is None or held.exact.count[0] < _FEW for held in seen):
            return
        for number in range(8):
            moved = nearby(call, number)
            try:
                outputs = reference(moved.fresh())
            except Exception:  # a model that takes only what was given (a strict probability, a known key) gives no more samples
                return
            fitting = {name: k for name, k in keep.items() if name in outputs and outputs[name].shape == k.shape}
            self.add(moved, outputs, fitting, batch, made=made)

    def measured(self, reference: Runner, batches: Mapping[str, tuple[Call, Mapping[str, torch.Tensor]]]) -> NoiseFloor:
        """This floor with these batches added, which takes no more: for several comparisons with one reference.

        Args:
            batches: {label: (call, what the reference answered)}.
        """
        told = {label: self.add(call, outputs, batch=label) for label, (call, outputs) in batches.items()}
        for label, (call, _) in batches.items():
            self.add_nearby(reference, call, batch=label)
        return _Measured(self, told)

    def limit(self, name: str, dtype: torch.dtype, scale: float, batch: str = "") -> Limit:
        """The limit for one output of `dtype` whose largest value on that batch is `scale`.

        The floor is the batch's own, or the one of all given batches in proportion to their largest value, whichever is larger.
        """
        import torch

        eps = torch.finfo(dtype).eps
        widest = dtype in (torch.float64, torch.complex128)
        own = self._made.get(name, {}).get(batch) or self._given.get(name, {}).get(batch)
        reordered, exact = (self._floor(name, how, scale, own) for how in ("reordered", "exact"))
        reordered = (reordered or 0.0) / 2
        floor, how = max((reordered, "summing in reverse order, halved,"), (exact or 0.0, "float64"))
        if widest or exact is None or self._exact is None:
            depth = self._depth or _UNKNOWN_DEPTH
            layers = f"{depth} with weights" if self._depth else f"its depth is unknown and taken as {depth}"
            why = self.refusal or ("the output is float64 already" if widest else "float64 gave no such output")
            value = min(_FORMULA * eps * math.sqrt(depth), math.sqrt(eps)) * scale
            if reordered and min(_FACTOR * reordered, math.sqrt(eps) * scale) > value:
                value = min(_FACTOR * reordered, math.sqrt(eps) * scale)
                return Limit(
                    value,
                    reordered,
                    f"{_FACTOR} × the {reordered:.2g} by which summing in reverse order, halved, moves the reference: {why}",
                )
            return Limit(value, None, f"by formula, {_FORMULA} eps √depth, at most √eps, × largest value (layers: {layers}): {why}")
        least, most = _STEPS * eps * scale, math.sqrt(eps) * scale
        value = max(_FACTOR * floor, least)
        if value > most > 0:
            why = f"held at √eps of the largest value: {how} moves the reference by {floor:.2g}, so it amplifies rounding"
            return Limit(most, floor, why, amplified=True)
        if value == least:
            return Limit(value, floor, f"{_STEPS} eps of the largest value: {how} moves the reference by only {floor:.2g}")
        return Limit(value, floor, f"{_FACTOR} × the {floor:.2g} by which {how} moves the reference")

    def _floor(self, name: str, how: str, scale: float, own: _Seen | None) -> float | None:
        given = [moved for held in self._given.get(name, {}).values() if (moved := getattr(held, how)) is not None]
        mine = getattr(own, how) if own else None
        if not given and mine is None:
            return None
        largest = max((float(moved.scale[0]) for moved in given), default=0.0)
        shared = max(float(moved.far[0]) for moved in given) / largest * scale if largest else 0.0
        return max(shared, float(mine.far[0]) if mine is not None else 0.0)

    def judge(self, name: str, dtype: torch.dtype, found: Spread, batch: str = "") -> Limit:
        """The limit that the candidate's distances on that batch reach or break by the largest factor: of the whole, or of a group.

        A group is a slice along an axis, or a population of values with a gap of 10 binades to the next larger, whose own values stay under
        a sixteenth of the largest. Its floor is what moves it or its likes; 4 eps are taken of 1 at least, for what saturates there is
        rounded there. With few samples the formula stands beside the floor, and the group must be too large to be small by chance.
        """
        whole = self.limit(name, dtype, float(found.scale[0]), batch)
        worst = replace(whole, far=float(found.far[0]))
        own = self._made.get(name, {}).get(batch) or self._given.get(name, {}).get(batch)
        mine = own.moved if own else None
        every = [moved for held in self._given.get(name, {}).values() if (moved := held.moved) is not None]
        every += [mine] if mine is not None and not any(held is own for held in self._given.get(name, {}).values()) else []
        if not float(found.far[0]) or not float(found.scale[0]):
            return worst
        for group in (*_populations(found, every), *(_slices(found, mine, every) if mine is not None else ())):
            limit = self._of_group(group, found, dtype, whole, measured=own is not None and own.exact is not None)
            if limit is not None and limit.ratio > max(worst.ratio, 1):
                worst = limit
        return worst

    def _of_group(self, group: _Group, found: Spread, dtype: torch.dtype, whole: Limit, *, measured: bool) -> Limit | None:
        import torch

        eps, largest = torch.finfo(dtype).eps, float(found.scale[0])
        enough = measured and group.samples >= _FEW and dtype not in (torch.float64, torch.complex128)
        if not enough and group.chance > _CHANCE:
            return None
        steps = _STEPS if enough else min(_FORMULA * math.sqrt(self._depth or _UNKNOWN_DEPTH), 1 / math.sqrt(eps))
        size = max(group.scale, min(1.0, largest))
        least = steps * eps * size
        value = min(max(_FACTOR * group.floor, least), whole.value)
        why = (
            f"{_FACTOR} × the {group.floor:.2g} by which float64 or reversed sums move"
            if value > least
            else f"{steps:.3g} eps of {size:.2g} for"
        )
        reason = f"{why} {group.places}, at most {group.scale:.2g}: the largest value, {largest:.2g}, says nothing of them"
        return Limit(value, group.floor, reason, whole.amplified, group.places, group.far)


@dataclass(frozen=True)
class _Group:
    """Places of one output: the candidate's distance, the largest value, the floor of their likes, the samples that gave it, and the
    logarithm of the chance that their values are so small only because they cancel."""

    places: str
    far: float
    scale: float
    floor: float
    samples: float
    chance: float


def _populations(found: Spread, every: Sequence[Spread]) -> Iterator[_Group]:
    """Values far below the next larger ones. Zeros count to the smallest that are none."""
    counts = found.count[found.binades]
    held = [0, *(int(i) for i in counts[1:].nonzero().reshape(-1) + 1)]
    start = 0
    for below, above in pairwise(held):
        if not below or above - below <= _GAP:
            continue
        part, part_of = slice(start, above), slice(found.binades.start + start, found.binades.start + above)
        some, more = float(counts[part].sum() - counts[0] * (start == 0)), float(counts[above:].sum())
        scale, start = float(found.scale[part_of].max()), above
        floor = max((float(moved.far[part_of].max()) for moved in every), default=0.0)
        samples = sum(float(moved.count[part_of].sum()) for moved in every)
        chance = some * (math.log(more) - (above - below - 1) * math.log(2))
        yield _Group(f"the values up to {scale:.2g}", float(found.far[part_of].max()), scale, floor, samples, chance)


def _slices(found: Spread, mine: Spread, every: Sequence[Spread]) -> Iterator[_Group]:
    """Slices along each axis whose values stay far below the largest and whose distance no floor of their own explains by itself.

    The floor of a slice is in proportion the largest of those half to 64 times as large, for one item's rounding may be one draw.
    """
    import torch

    for axis, places in enumerate(found.axes):
        if found.shape[axis] < 2 or math.prod(found.shape) == found.shape[axis] or mine.shape != found.shape or places.start == places.stop:
            continue
        far, scale = found.far[places], found.scale[places]
        best = torch.zeros(2200, dtype=torch.float64)
        for moved in every:
            if len(moved.shape) == len(found.shape):
                size = moved.scale[moved.axes[axis]]
                best.scatter_reduce_(0, size.frexp()[1].long() + 1100, (moved.far[moved.axes[axis]] / size).nan_to_num(0.0, 0.0), "amax")
        near = best.unfold(0, 8, 1).amax(1)
        floor = torch.maximum(mine.far[places], near[scale.frexp()[1].long() + 1099] * scale)
        small = (scale > 0) & (scale < float(found.scale[0]) / _APART) & (far > floor)
        for index in small.nonzero().reshape(-1).tolist():
            at = f"[{', '.join(str(index) if other == axis else ':' for other in range(len(found.shape)))}]"
            count, largest = float(found.count[places][index]), float(scale[index])
            chance = count * math.log(largest / float(found.scale[0])) + math.log(found.shape[axis])
            yield _Group(f"the values at {at}", float(far[index]), largest, float(floor[index]), float(mine.count[places][index]), chance)


class _Measured(NoiseFloor):
    def __init__(self, floor: NoiseFloor, told: Mapping[str, dict[str, torch.Tensor]]) -> None:
        self.__dict__.update(vars(floor))
        self._told = told

    def add(self, call: Call, outputs: Any, keep: Any = _ALL, batch: str = "", *, made: bool = False) -> dict[str, torch.Tensor]:
        return self._told[batch]

    def add_nearby(self, reference: Runner, call: Call, keep: Any = _ALL, batch: str = "", *, made: bool = False) -> None:
        return


@contextmanager
def noise_floor(reference: Any) -> Iterator[NoiseFloor]:
    """Opens the reference's twins beside it: one in float64, and one whose sums are reversed.

    Cost: a float64 copy of the model (at most 1 GiB, otherwise the formula serves), a copy of its buffers, and two more runs per call.
    """
    import torch

    if not isinstance(reference, torch.nn.Module):
        yield NoiseFloor(None, "only a module can be run again in float64", None)
        return
    exact, refusal = _twin(reference)
    shared = {id(p): p for p in reference.parameters()}
    with ExitStack() as stack:
        doubled, reordered = (
            stack.enter_context(running(twin)) if twin is not None else None for twin in (exact, _copied(reference, shared)[0])
        )
        yield NoiseFloor(doubled, refusal, _depth(reference), reordered)


def _depth(model: torch.nn.Module) -> int:
    return max(1, sum(1 for m in model.modules() if next(m.parameters(recurse=False), None) is not None))


def _twin(reference: torch.nn.Module) -> tuple[torch.nn.Module | None, str | None]:
    nbytes = sum(8 * t.numel() for t in (*reference.parameters(), *reference.buffers()))
    if nbytes > _MAX_DOUBLE:
        return None, f"a float64 copy would take {format_bytes(nbytes)}"
    return _copied(reference, {}, double=True)


def _copied(reference: torch.nn.Module, shared: dict[int, Any], *, double: bool = False) -> tuple[torch.nn.Module | None, str | None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # copies of a scripted module's parameters are no leaves, and torch says so
            twin = copy.deepcopy(reference, shared)
            return (twin.cpu().double() if double else twin), None
    except Exception as error:  # masks of torch's pruning, locks, handles: whatever forbids a copy is the reason
        first = next(iter(str(error).splitlines()), "")
        return None, f"the model cannot be copied ({type(error).__name__}: {first})"
