"""cast: floating tensors to another floating type."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from workbench import dtypes
from workbench.checkpoint import Checkpoint, Step
from workbench.dtypes import DType
from workbench.errors import SelectionError
from workbench.names import Patterns
from workbench.ops.scope import floating, mapped, on_section
from workbench.sections import Path
from workbench.tensors import Block, Derived, LazyTensor

if TYPE_CHECKING:
    import torch


def cast(
    ckpt: Checkpoint,
    dtype: str | DType | torch.dtype,
    *,
    names: Patterns | None = None,
    overflow: Literal["raise", "allow"] = "raise",
    section: str | Path | None = None,
    everything: bool = False,
) -> Checkpoint:
    """Convert floating tensors to another floating type, rounding to nearest even.

    Args:
        dtype: a floating type: "bfloat16", "float16", "float32", "float64" or an 8-bit one.
        names: glob over names; all floating tensors where absent.
        overflow: "raise" when a value would change beyond rounding in the new type (become infinite, NaN or its largest), or "allow" it.
    Returns:
        Same names and shapes. Tied tensors stay tied.
    Raises:
        SelectionError: not a floating type, or nothing floating is selected; when values are read, an overflow.
    Cost: one read of each tensor; peak is one block.
    """
    wanted = dtypes.dtype(dtype)
    if not wanted.is_floating or wanted.name == "float8_e8m0fnu":
        raise SelectionError(f"{wanted} is not a floating type that holds weights", hint="for int8 use wb.ops.quantize")
    if overflow not in ("raise", "allow"):
        raise SelectionError(f'overflow={overflow!r}: it can be "raise" or "allow"')
    params = {"dtype": wanted.name, "overflow": overflow}

    def make(name: str, tensor: LazyTensor) -> LazyTensor:
        if tensor.dtype == wanted:
            return tensor
        spec = replace(tensor.spec, dtype=wanted)
        block = Block("workbench.ops.cast:cast_kernel", params, (tensor,), (spec,))
        return LazyTensor(spec, Derived(block, 0), tensor.requires_grad, tensor.locked)

    step = Step("cast", {**params, "names": names, "section": section, "everything": everything})
    return on_section(ckpt, section, everything, step, lambda part: mapped(part, floating(part, names, matrices_only=False), make))


def cast_kernel(params: dict[str, Any], whole: Sequence[torch.Tensor], blocks: Sequence[torch.Tensor], at: int) -> list[torch.Tensor]:
    """Elements of the first block in another type."""
    out = blocks[0].to(dtypes.to_torch(dtypes.DTYPES[params["dtype"]]))
    if params["overflow"] == "raise" and out.numel():
        lost = dtypes.out_of_range(blocks[0], out)
        if bool(lost.any()):
            worst = float(blocks[0][lost].double().abs().max())
            raise SelectionError(
                f"a value of magnitude {worst:.3g} does not fit {params['dtype']}",
                hint='choose bfloat16, which has the range of float32, leave the tensor out, or allow it with overflow="allow"',
            )
    return [out]
