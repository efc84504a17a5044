"""Kernels that rebuild torch's own tensor kinds from their stored parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from workbench.errors import CorruptFileError


def resolve(params: dict[str, Any], whole: Sequence[torch.Tensor], blocks: Sequence[torch.Tensor], at: int) -> list[torch.Tensor]:
    """A flat range with the conjugate and the minus sign carried out."""
    with _as_corrupt("a conjugated or negated tensor"):
        out = blocks[0].conj().resolve_conj() if params["conj"] else blocks[0]
        return [-out if params["neg"] else out]


def to_dtype(params: dict[str, Any], whole: Sequence[torch.Tensor], blocks: Sequence[torch.Tensor], at: int) -> list[torch.Tensor]:
    """A flat range as another element type."""
    return [blocks[0].to(getattr(torch, params["dtype"]))]


def sparse(params: dict[str, Any], whole: Sequence[torch.Tensor], blocks: Sequence[torch.Tensor], at: int) -> list[torch.Tensor]:
    """A sparse tensor of the stated layout from its index parts and values.

    Raises:
        CorruptFileError: the parts do not fit each other or the shape.
    """
    shape = params["shape"]
    with _as_corrupt(f"a {params['layout']} tensor"):
        if params["layout"] == "sparse_coo":
            coalesced = params.get("coalesced") or None
            return [torch.sparse_coo_tensor(blocks[0], blocks[1], shape, is_coalesced=coalesced, check_invariants=True)]
        layout = getattr(torch, params["layout"])
        return [torch.sparse_compressed_tensor(blocks[0], blocks[1], blocks[2], shape, layout=layout, check_invariants=True)]


def quantized(params: dict[str, Any], whole: Sequence[torch.Tensor], blocks: Sequence[torch.Tensor], at: int) -> list[torch.Tensor]:
    """A torch-quantized tensor from its stored integers and its quantizer: one scale and zero point, or one for each channel of an axis.

    Raises:
        CorruptFileError: torch has no such quantizer.
    """
    shape, dtype, numbers = params["shape"], getattr(torch, params["dtype"]), params["numbers"]
    with _as_corrupt("a quantized tensor"):
        if params["scheme"] == "per_tensor_affine":
            out = torch._empty_affine_quantized(shape, scale=float(numbers[0]), zero_point=numbers[1], dtype=dtype)
        else:
            *lists, axis = numbers
            kinds = (torch.double, torch.long) if params["scheme"] == "per_channel_affine" else (torch.float, torch.float)
            scales, zeros = blocks[1:] or [torch.tensor(n, dtype=kind) for n, kind in zip(lists, kinds, strict=True)]
            out = torch._empty_per_channel_affine_quantized(shape, scales=scales, zero_points=zeros, axis=axis, dtype=dtype)
    stored = blocks[0].contiguous().view(-1).view(torch.uint8)
    torch.empty(0, dtype=torch.uint8).set_(out.untyped_storage())[: stored.numel()] = stored
    return [out]


@contextmanager
def _as_corrupt(what: str) -> Iterator[None]:
    """torch's refusal of the parts of a tensor, said as ours."""
    try:
        yield
    except (RuntimeError, ValueError, TypeError, OverflowError) as error:
        raise CorruptFileError(f"{what} cannot be built from its parts: {str(error).splitlines()[0]}") from error
