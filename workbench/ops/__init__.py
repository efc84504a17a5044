"""Ops: pure functions from Checkpoint to Checkpoint; the result exists at once, its data is computed when written or read.

    wb.ops.quantize_int8(ckpt)                             # weights to int8 per output channel, with their scales
    wb.ops.prune_magnitude(ckpt, sparsity=0.5)             # smallest half of each weight to zero
    wb.ops.rename(ckpt, {"module.*": "*"})                 # keys and _metadata

On a training checkpoint an op acts on its weights and returns the whole tree; `section=` names another section,
`everything=True` takes all tensors.
"""

from workbench.ops.cast import cast
from workbench.ops.prune import prune_magnitude
from workbench.ops.quantize import dequantize, quantize_int8
from workbench.ops.rename import add_prefix, rename, strip_prefix

__all__ = ["add_prefix", "cast", "dequantize", "prune_magnitude", "quantize_int8", "rename", "strip_prefix"]
