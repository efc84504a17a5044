"""Kernels that rebuild torch's own tensor kinds from their stored parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def resolve(params: dict[str, Any], whole: Sequence[torch.Tensor], blocks: Sequence[torch.Tensor], at: int) -> list[torch.Tensor]:
    """A flat range with the conjugate and the minus sign carried out."""
    out = blocks[0].conj().resolve_conj() if params["conj"] else blocks[0]
    return [-out if params["neg"] else out]


def sparse(params: dict[str, Any], whole: Sequence[torch.Tensor], blocks: Sequence[torch.Tensor], at: int) -> list[torch.Tensor]:
    """A sparse tensor of the stated layout from its index parts and values."""
    shape = params["shape"]
    if params["layout"] == "sparse_coo":
        return [torch.sparse_coo_tensor(blocks[0], blocks[1], shape, is_coalesced=params.get("coalesced") or None, check_invariants=True)]
    layout = getattr(torch, params["layout"])
    return [torch.sparse_compressed_tensor(blocks[0], blocks[1], blocks[2], shape, layout=layout, check_invariants=True)]


def quantized(params: dict[str, Any], whole: Sequence[torch.Tensor], blocks: Sequence[torch.Tensor], at: int) -> list[torch.Tensor]:
    """A torch-quantized tensor from its stored integers and its quantizer."""
    integers = blocks[0].contiguous()
    if params["scheme"] == "per_tensor_affine":
        scale, zero_point = params["numbers"]
        return [torch._make_per_tensor_quantized_tensor(integers, float(scale), int(zero_point))]
    (axis,) = (n for n in params["numbers"] if isinstance(n, int))
    return [torch._make_per_channel_quantized_tensor(integers, blocks[1], blocks[2], axis)]
