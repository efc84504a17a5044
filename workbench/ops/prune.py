"""prune_magnitude: the smallest elements of each tensor to zero, exactly as many as asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from workbench import dtypes
from workbench.checkpoint import Checkpoint, Step
from workbench.errors import SelectionError
from workbench.names import Patterns
from workbench.ops.scope import floating, mapped, on_section
from workbench.sections import Path
from workbench.tensors import Block, Derived, LazyTensor, TensorSpec

if TYPE_CHECKING:
    import torch


def prune_magnitude(
    ckpt: Checkpoint, *, sparsity: float, names: Patterns | None = None, section: str | Path | None = None, everything: bool = False
) -> Checkpoint:
    """Zero the smallest-magnitude elements of each matching tensor.

    Args:
        sparsity: fraction set to zero per tensor, in [0, 1); exactly floor(sparsity * numel + 0.5) elements.
        names: glob over names; where absent, every floating tensor of two dimensions or more.
    Returns:
        Same names, shapes, dtypes; unmatched tensors pass through. Among equal magnitudes the lower index is kept;
        NaN counts as largest. The file is as large as before: zeros take room until something packs them.
    Raises:
        SelectionError: sparsity out of range, or nothing floating matches.
    Cost: one read to choose per 16 bits of the type and one more, then one to write; peak is one block.
    Source: Han et al. 2015, arXiv:1506.02626.
    """
    if not 0 <= sparsity < 1:
        raise SelectionError(f"sparsity={sparsity}: it is a fraction in [0, 1)")

    def make(name: str, tensor: LazyTensor) -> LazyTensor:
        count = int(sparsity * tensor.numel + 0.5)
        if not count:
            return tensor
        spec, cut_spec = TensorSpec(dtypes.DTYPES["int64"], (3,)), TensorSpec(dtypes.DTYPES["int64"], (2,))
        scans: list[LazyTensor] = []
        for step in range(max(1, tensor.dtype.itemsize // 2)):  # each pass fixes 16 more bits of the threshold
            params = {"count": count, "step": step}
            scans.append(
                LazyTensor(spec, Derived(Block("workbench.ops.prune:narrow", params, (tensor,), (spec,), "scan", tuple(scans[-1:])), 0))
            )
        cut = LazyTensor(
            cut_spec,
            Derived(Block("workbench.ops.prune:last_kept", {"numel": tensor.numel}, (tensor,), (cut_spec,), "scan", (scans[-1],)), 0),
        )
        block = Block("workbench.ops.prune:zero_below", {}, (tensor,), (tensor.spec,), "elements", (cut,))
        return LazyTensor(tensor.spec, Derived(block, 0), tensor.requires_grad, tensor.locked)

    step = Step("prune_magnitude", {"sparsity": sparsity, "names": names, "section": section, "everything": everything})
    return on_section(ckpt, section, everything, step, lambda part: mapped(part, floating(part, names), make))


def magnitude_bits(values: torch.Tensor) -> torch.Tensor:
    """|x| as integers that sort alike: the bits of a float without its sign."""
    import torch

    bits = _as_integers(values)
    if str(values.dtype).endswith("fnuz"):  # these have one NaN, where others have minus zero
        codes = bits.to(torch.int16) & 0xFF
        return torch.where(codes == 0x80, codes, codes & 0x7F)
    return bits & ((1 << (8 * values.element_size() - 1)) - 1)


def _as_integers(values: torch.Tensor) -> torch.Tensor:
    import torch

    return dtypes.flat(values).view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()])


def narrow(params: dict[str, Any], whole: Sequence[torch.Tensor], blocks: Sequence[Any], at: int) -> list[torch.Tensor]:
    """One radix pass: (high bits of the threshold so far, how many elements with those bits are pruned, how many there are)."""
    import torch

    prefix, wanted = (int(whole[0][0]), int(whole[0][1])) if whole else (0, params["count"])
    counts = None
    for _, chunk in blocks[0]:
        bits, width = magnitude_bits(chunk), 8 * chunk.element_size()
        digit = min(16, width)
        counts = torch.zeros(1 << digit, dtype=torch.int64) if counts is None else counts
        high = bits >> (width - digit * (params["step"] + 1))
        if params["step"]:
            high = high[(high >> digit) == prefix]
        counts += torch.bincount((high & ((1 << digit) - 1)).long(), minlength=1 << digit)
    if counts is None:
        return [torch.zeros(3, dtype=torch.int64)]
    reached = counts.cumsum(0)
    code = int(torch.searchsorted(reached, wanted))
    below = int(reached[code - 1]) if code else 0
    digits = counts.numel().bit_length() - 1
    return [torch.tensor([(prefix << digits) | code, wanted - below, int(counts[code])])]


def last_kept(params: dict[str, Any], whole: Sequence[torch.Tensor], blocks: Sequence[Any], at: int) -> list[torch.Tensor]:
    """(threshold, flat index from which elements equal to it are pruned), so that exactly the wanted number goes."""
    import torch

    threshold, pruned, ties = (int(n) for n in whole[0])
    kept = ties - pruned
    for start, chunk in blocks[0]:
        equal = (magnitude_bits(chunk) == threshold).nonzero().view(-1)
        if kept < equal.numel():
            return [torch.tensor([threshold, start + int(equal[kept])])]
        kept -= equal.numel()
    return [torch.tensor([threshold, params["numel"]])]


def zero_below(params: dict[str, Any], whole: Sequence[torch.Tensor], blocks: Sequence[torch.Tensor], at: int) -> list[torch.Tensor]:
    """A flat range with its small elements zeroed."""
    import torch

    threshold, first = (int(n) for n in whole[0])
    bits = magnitude_bits(blocks[0])
    index = torch.arange(at, at + bits.numel())
    gone = (bits < threshold) | ((bits == threshold) & (index >= first))
    return [_as_integers(blocks[0]).masked_fill(gone, 0).view(blocks[0].dtype)]
