"""Tolerance: how far two honest computations of one model may differ, and why.

The limit is measured where it can be: the reference runs again in float64 on the same calls, and what that moves is the rounding of the
reference itself (its noise floor). Where float64 is impossible the limit is a formula, and the reason says so. A limit is
absolute, per output.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workbench.tables import format_bytes
from workbench.verification.measures import Meter
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


@dataclass(frozen=True)
class Limit:
    """The largest difference that rounding explains for one output. `floor` is None where it was not measured."""

    value: float
    floor: float | None
    reason: str
    amplified: bool = False


class NoiseFloor:
    """The reference's own rounding, gathered beside a comparison.

    Attributes:
        refusal: why float64 is impossible, or None.
    """

    def __init__(self, runner: Runner | None, refusal: str | None, depth: int | None) -> None:
        self._runner, self.refusal, self._depth = runner, refusal, depth
        self._meters: dict[str, Meter] = {}

    def add(self, call: Call, outputs: dict[str, torch.Tensor]) -> None:
        """Run the float64 twin on the call that gave `outputs`. A twin that fails ends the measuring, and is the refusal."""
        import torch

        if self._runner is None:
            return
        try:
            exact = self._runner(call.map(lambda t: t.detach().clone().double() if t.is_floating_point() else t.detach().clone()))
        except Exception as error:  # the twin runs a stranger's forward: whatever it raises is the reason
            self._runner, self._meters = None, {}
            first = next(iter(str(error).splitlines()), "")
            self.refusal = f"the model does not run in float64 ({type(error).__name__}: {first})"
            return
        for name, value in outputs.items():
            twin = exact.get(name)
            if twin is not None and twin.shape == value.shape and (value.is_floating_point() or value.is_complex()):
                wide = value.to(torch.complex128) if value.is_complex() else value.double()
                self._meters.setdefault(name, Meter()).add(twin, wide)

    def add_nearby(self, reference: Runner, call: Call) -> None:
        """Up to 8 more samples on slightly moved inputs, when an output is too small to judge by."""
        if not any(meter.count < _FEW for meter in self._meters.values()):
            return
        for number in range(8):
            moved = nearby(call, number)
            try:
                outputs = reference(moved.fresh())
            except Exception:  # a model that takes only what was given (a strict probability, a known key) gives no more samples
                return
            self.add(moved, outputs)

    def limit(self, name: str, dtype: torch.dtype, scale: float) -> Limit:
        """The limit for one output of `dtype` whose largest value is `scale`."""
        import torch

        eps = torch.finfo(dtype).eps
        widest = dtype in (torch.float64, torch.complex128)
        meter = None if widest else self._meters.get(name)
        if meter is None or not meter.finite:
            depth = self._depth or _UNKNOWN_DEPTH
            layers = f"{depth} with weights" if self._depth else f"its depth is unknown and taken as {depth}"
            why = self.refusal or ("the output is float64 already" if widest else "float64 gave no such output")
            return Limit(
                _FORMULA * eps * math.sqrt(depth) * scale,
                None,
                f"by formula, {_FORMULA} eps √depth × largest value (layers: {layers}): {why}",
            )
        floor = meter.max_abs
        least, most = _STEPS * eps * scale, math.sqrt(eps) * scale
        value = max(_FACTOR * floor, least)
        if value > most > 0:
            why = f"held at √eps of the largest value: in float64 the reference moves by {floor:.2g}, so it amplifies rounding"
            return Limit(most, floor, why, amplified=True)
        if value == least:
            return Limit(value, floor, f"{_STEPS} eps of the largest value: in float64 the reference moves by only {floor:.2g}")
        return Limit(value, floor, f"{_FACTOR} × the {floor:.2g} by which float64 moves the reference")


@contextmanager
def noise_floor(reference: Any) -> Iterator[NoiseFloor]:
    """Opens the reference's float64 twin beside it.

    Cost: a float64 copy of the model (at most 1 GiB, otherwise the formula serves) and one more run per call.
    """
    import torch

    depth = _depth(reference) if isinstance(reference, torch.nn.Module) else None
    twin, refusal = _twin(reference)
    with ExitStack() as stack:
        runner = stack.enter_context(running(twin)) if twin is not None else None
        yield NoiseFloor(runner, refusal, depth)


def _depth(model: torch.nn.Module) -> int:
    return max(1, sum(1 for m in model.modules() if next(m.parameters(recurse=False), None) is not None))


def _twin(reference: Any) -> tuple[Any, str | None]:
    import torch

    if not isinstance(reference, torch.nn.Module):
        return None, "only a module can be run again in float64"
    nbytes = sum(8 * t.numel() for t in (*reference.parameters(), *reference.buffers()))
    if nbytes > _MAX_DOUBLE:
        return None, f"a float64 copy would take {format_bytes(nbytes)}"
    try:
        return copy.deepcopy(reference).cpu().double(), None
    except Exception as error:  # masks of torch's pruning, locks, handles: whatever forbids a copy is the reason
        first = next(iter(str(error).splitlines()), "")
        return None, f"the model cannot be copied ({type(error).__name__}: {first})"
