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


def _negated(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_floating_point() or tensor.is_complex():
        return -tensor
    return ~tensor if str(tensor.dtype) == "torch.bool" else _exchanged(tensor, 1)


def _noisier(amount: float, *, seed: int = 0, whole: bool = True) -> Callable[[torch.Tensor], torch.Tensor]:
    import torch

    generator = torch.Generator().manual_seed(seed)

    def change(tensor: torch.Tensor) -> torch.Tensor:
        if not (tensor.is_floating_point() or tensor.is_complex()):
            return _exchanged(tensor, max(1, tensor.numel() // 2)) if whole else tensor
        spread = float(tensor.double().std()) if tensor.is_floating_point() and tensor.numel() > 1 else 0.0
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.device)
        return (tensor + amount * (spread or 1.0) * noise).to(tensor.dtype)

    return change


def _reversed(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).flip(0).reshape(tensor.shape)


def _exchanged(tensor: torch.Tensor, by: int) -> torch.Tensor:
    return tensor.reshape(-1).roll(by).reshape(tensor.shape)
