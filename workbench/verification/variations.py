"""Variations: other inputs of the same kind, made from one batch, always the same ones.

They prove what one example cannot: that a branch was not baked in, that an axis really is dynamic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from workbench.verification.values import Call

if TYPE_CHECKING:
    import torch


def variations(call: Call) -> dict[str, Call]:
    """Batches of the same shapes and dtypes with other values: `negated`, `noisy` and `exchanged`.

    Floating values are negated, or moved by noise of their own standard deviation, or exchanged among themselves (so that a
    probability stays one). Whole numbers are only exchanged (indices stay in range), booleans inverted or exchanged.
    """
    return {"negated": call.map(_negated), "noisy": call.map(_noisier(1.0)), "exchanged": call.map(_reversed)}


def corners(call: Call) -> dict[str, Call]:
    """Batches of the same shapes and dtypes with made values: `random`, `zeros`, `ones`, `large` and `tiny`.

    `random` is uniform between the smallest and the largest value given (a standard normal where all given are the same). `large` and
    `tiny` are the given floating values times 1000 and 1e-6. Whole numbers never leave the range given, so zero and one become its
    nearest bound; `large` and `tiny` put its bounds everywhere. Booleans are drawn, False, True, True and False.
    """
    import torch

    return {
        "random": call.map(_drawn(torch.Generator().manual_seed(0))),
        "zeros": call.map(lambda t: _filled(t, 0)),
        "ones": call.map(lambda t: _filled(t, 1)),
        "large": call.map(lambda t: t * 1000 if _real(t) else _filled(t, torch.iinfo(torch.int64).max)),
        "tiny": call.map(lambda t: t * 1e-6 if _real(t) else _filled(t, 0 if t.dtype is torch.bool else torch.iinfo(torch.int64).min)),
    }


def sizes(call: Call) -> dict[str, Call]:
    """The batch with one item more (`batch + 1`) and one place longer (`length + 1`): axes 0 and 1 of the tensors that share the first's size."""
    found = {}
    for axis, name in ((0, "batch + 1"), (1, "length + 1")):
        shapes = [tuple(tensor.shape) for tensor in call.tensors().values()]
        size = next((shape[axis] for shape in shapes if len(shape) > axis), 0)
        alike = {(which, axis): size + 1 for which, shape in enumerate(shapes) if len(shape) > axis and shape[axis] == size}
        if size and (axis == 0 or len(shapes[0]) > 1):
            found[name] = resized(call, alike)
    return found


def nearby(call: Call, number: int) -> Call:
    """The batch with its floating values moved by a thousandth of their spread; `number` chooses which move."""
    return call.map(_noisier(1e-3, seed=number, whole=False))


def resized(call: Call, sizes: Mapping[tuple[int, int], int]) -> Call:
    """The batch with some axes longer or shorter, filled by repeating what is there.

    Args:
        sizes: {(which tensor in order, which axis): new size}.
    """
    import torch

    order = iter(range(len(call.tensors())))

    def resize(tensor: torch.Tensor) -> torch.Tensor:
        number = next(order)
        for (which, axis), size in sizes.items():
            if which == number:
                tensor = tensor.index_select(axis, torch.arange(size, device=tensor.device) % tensor.shape[axis])
        return tensor

    return call.map(resize)


def _real(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _drawn(generator: torch.Generator) -> Callable[[torch.Tensor], torch.Tensor]:
    import torch

    def draw(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_complex() or not tensor.numel():
            return tensor
        if tensor.dtype is torch.bool:
            return torch.randint(0, 2, tensor.shape, generator=generator).bool().to(tensor.device)
        if not tensor.is_floating_point():
            return torch.randint(int(tensor.min()), int(tensor.max()) + 1, tensor.shape, generator=generator).to(tensor)
        known = tensor.double()[tensor.isfinite()]
        low, high = (float(known.min()), float(known.max())) if known.numel() else (0.0, 0.0)
        if low == high:
            return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
        return (low + (high - low) * torch.rand(tensor.shape, generator=generator, dtype=torch.float64)).to(tensor)

    return draw


def _filled(tensor: torch.Tensor, value: int) -> torch.Tensor:
    """`value` everywhere, held within the range that whole numbers have."""
    import torch

    if not _real(tensor) and tensor.dtype is not torch.bool and tensor.numel():
        value = min(max(value, int(tensor.min())), int(tensor.max()))
    return torch.full_like(tensor, value if tensor.dtype is not torch.bool else bool(value))


def _negated(tensor: torch.Tensor) -> torch.Tensor:
    if _real(tensor):
        return -tensor
    return ~tensor if str(tensor.dtype) == "torch.bool" else _exchanged(tensor, 1)


def _noisier(amount: float, *, seed: int = 0, whole: bool = True) -> Callable[[torch.Tensor], torch.Tensor]:
    import torch

    generator = torch.Generator().manual_seed(seed)

    def change(tensor: torch.Tensor) -> torch.Tensor:
        if not _real(tensor):
            return _exchanged(tensor, max(1, tensor.numel() // 2)) if whole else tensor
        spread = float(tensor.double().std()) if tensor.is_floating_point() and tensor.numel() > 1 else 0.0
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.device)
        return (tensor + amount * (spread or 1.0) * noise).to(tensor.dtype)

    return change


def _reversed(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).flip(0).reshape(tensor.shape)


def _exchanged(tensor: torch.Tensor, by: int) -> torch.Tensor:
    return tensor.reshape(-1).roll(by).reshape(tensor.shape)
