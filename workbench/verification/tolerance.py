"""Tolerance: how far two honest computations of one model may differ, and why.

The limit is measured where it can be: the reference runs again in float64, and again with its sums in reverse order, on the same calls.
The larger of what float64 moves and half of what the other order moves (two roundings, not one) is the rounding of the reference itself, its
noise floor. Where float64 is impossible the limit is a formula, and the reason says so. A limit is absolute, per output and batch.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from workbench.tables import format_bytes
from workbench.verification.measures import peak
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
_ALL: Mapping[str, torch.Tensor] = MappingProxyType({})  # keeps every place


@dataclass(frozen=True)
class Limit:
    """The largest difference that rounding explains for one output. `floor` is None where it was not measured."""

    value: float
    floor: float | None
    reason: str
    amplified: bool = False


@dataclass
class _Seen:
    """What one output showed on one batch, over its calls: how far float64 and reversed sums moved it, its largest value, pairs per twin."""

    exact: float | None = None
    reordered: float | None = None
    scale: float = 0.0
    count: int = 0


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
                    moved, scale, count = peak(value, other, keep.get(name))
                    setattr(held, how, max(getattr(held, how) or 0.0, moved))
                    held.scale, held.count = max(held.scale, scale), held.count + (count if how == "exact" else 0)
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
        if not any(held.count < _FEW for held in seen):
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
            value = _FORMULA * eps * math.sqrt(depth) * scale
            if reordered and min(_FACTOR * reordered, math.sqrt(eps) * scale) > value:
                value = min(_FACTOR * reordered, math.sqrt(eps) * scale)
                return Limit(
                    value,
                    reordered,
                    f"{_FACTOR} × the {reordered:.2g} by which summing in reverse order, halved, moves the reference: {why}",
                )
            return Limit(value, None, f"by formula, {_FORMULA} eps √depth × largest value (layers: {layers}): {why}")
        least, most = _STEPS * eps * scale, math.sqrt(eps) * scale
        value = max(_FACTOR * floor, least)
        if value > most > 0:
            why = f"held at √eps of the largest value: {how} moves the reference by {floor:.2g}, so it amplifies rounding"
            return Limit(most, floor, why, amplified=True)
        if value == least:
            return Limit(value, floor, f"{_STEPS} eps of the largest value: {how} moves the reference by only {floor:.2g}")
        return Limit(value, floor, f"{_FACTOR} × the {floor:.2g} by which {how} moves the reference")

    def _floor(self, name: str, how: str, scale: float, own: _Seen | None) -> float | None:
        given = [held for held in self._given.get(name, {}).values() if getattr(held, how) is not None]
        mine = getattr(own, how) if own else None
        if not given and mine is None:
            return None
        largest = max((held.scale for held in given), default=0.0)
        shared = max(getattr(held, how) for held in given) / largest * scale if largest else 0.0
        return max(shared, mine or 0.0)


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
