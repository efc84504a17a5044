"""Ops: pure functions from Checkpoint to Checkpoint; the result exists at once, its data is computed when written or read.

    wb.ops.quantize(ckpt, "int8")                          # weights to int8 per output channel, with their scales
    wb.ops.prune(ckpt, 0.5)                                # smallest half of each weight to zero
    wb.ops.rename(ckpt, {"module.*": "*"})                 # keys and _metadata

On a training checkpoint an op acts on its weights and returns the whole tree; `section=` names another section,
`everything=True` takes all tensors.
"""

from workbench.ops.cast import cast
from workbench.ops.merge import average, ema, extract_lora, merge, merge_lora, task_arithmetic
from workbench.ops.pruning import finish_pruning, prune
from workbench.ops.quantization import dequantize, quantization_config, quantize
from workbench.ops.rename import add_prefix, add_wrapper, rename, strip_prefix, strip_wrappers
from workbench.ops.surgery import adapt_input_channels, resize_position_embedding, resize_rows, select_fitting, swap_head

__all__ = [
    "adapt_input_channels", "add_prefix", "add_wrapper", "average", "cast", "dequantize", "ema", "extract_lora", "finish_pruning", "merge",
    "merge_lora", "prune", "quantization_config", "quantize", "rename", "resize_position_embedding", "resize_rows", "select_fitting", "strip_prefix",
    "strip_wrappers", "swap_head", "task_arithmetic",
]  # fmt: skip
