"""quantize_int8: symmetric int8 per output channel, in the layout that compressed-tensors calls int-quantized, channel strategy.

    X.weight         int8     [out, in, …]    q = round(w / scale), in [-127, 127]
    X.weight_scale   float32  [out, 1]        scale = max |w| over the channel / 127; 1 where the channel is all zero

`w ≈ q * scale`, with |w - q * scale| <= scale / 2 (plus the rounding of the original type). A tensor with fewer than two dimensions is one channel: scale [1].
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from workbench import dtypes
from workbench.checkpoint import Checkpoint, Step
from workbench.dtypes import DTYPES
from workbench.errors import SelectionError
from workbench.names import Patterns
from workbench.ops.scope import floating, on_section, rounded
from workbench.sections import Path
from workbench.tensors import Block, Derived, LazyTensor, TensorSpec

if TYPE_CHECKING:
    import torch

_ROW_NBYTES = 4 << 20  # a channel up to this size is read once; a longer one twice, so that memory stays bounded
SCALE_SUFFIX = "_scale"


def quantize_int8(
    ckpt: Checkpoint, *, names: Patterns | None = None, section: str | Path | None = None, everything: bool = False
) -> Checkpoint:
    """Quantize floating weights to int8 per output channel (dimension 0).

    Args:
        names: glob over names; where absent, every floating tensor of two dimensions or more.
    Returns:
        Each chosen tensor as int8 under its own name, followed by its scales under name + "_scale". Others pass through.
    Raises:
        SelectionError: nothing floating is selected, or a scale's name is taken; when values are read, NaN or Inf.
    Cost: one read of each chosen tensor (two where one channel exceeds 4 MiB); peak is one block.
    """

    def entries(part: Checkpoint) -> Iterator[tuple[str, LazyTensor, str]]:
        chosen = floating(part, names)
        made: dict[object, tuple[LazyTensor, LazyTensor]] = {}
        for name, tensor in part.items():
            if name not in chosen:
                yield name, tensor, name
                continue
            if name + SCALE_SUFFIX in part:
                raise SelectionError(
                    f"the name for the scales, {name + SCALE_SUFFIX!r}, is taken", hint="this tensor may be quantized already"
                )
            key = (tensor.source, tensor.spec)
            if key not in made:
                made[key] = _quantized(tensor)
            yield name, made[key][0], name
            yield name + SCALE_SUFFIX, made[key][1], name

    step = Step("quantize_int8", {"names": names, "section": section, "everything": everything})
    return on_section(ckpt, section, everything, step, entries)


def _quantized(tensor: LazyTensor) -> tuple[LazyTensor, LazyTensor]:
    channels = tensor.shape[0] if tensor.ndim >= 2 else 1
    spec = TensorSpec(DTYPES["int8"], tensor.shape)
    scale_spec = TensorSpec(DTYPES["float32"], (channels, 1) if tensor.ndim >= 2 else (1,))
    if tensor.ndim >= 2 and tensor.nbytes <= _ROW_NBYTES * channels:
        block = Block("workbench.ops.quantize:int8_rows", {}, (tensor,), (spec, scale_spec), "rows")
        return LazyTensor(spec, Derived(block, 0), locked=tensor.locked), LazyTensor(scale_spec, Derived(block, 1), locked=tensor.locked)
    params = {"channel": tensor.numel // channels if channels else 0, "channels": channels}
    scan = Block("workbench.ops.quantize:channel_scales", {**params, "shape": list(scale_spec.shape)}, (tensor,), (scale_spec,), "scan")
    scale = LazyTensor(scale_spec, Derived(scan, 0), locked=tensor.locked)
    block = Block("workbench.ops.quantize:int8_elements", params, (tensor,), (spec,), "elements", (scale,))
    return LazyTensor(spec, Derived(block, 0), locked=tensor.locked), scale


def dequantize(ckpt: Checkpoint, dtype: str = "float32", *, section: str | Path | None = None, everything: bool = False) -> Checkpoint:
    """Turn int8 tensors with a `_scale` beside them back into floating ones.

    Returns:
        The names and shapes that quantize_int8 was given; the scales are gone.
    Raises:
        SelectionError: nothing here has int8 values with scales; when values are read, a product that does not fit `dtype`.
    """
    wanted = dtypes.dtype(dtype)

    def entries(part: Checkpoint) -> Iterator[tuple[str, LazyTensor, str]]:
        pairs = {n: n + SCALE_SUFFIX for n, t in part.items() if t.dtype.name == "int8" and n + SCALE_SUFFIX in part}
        if not pairs:
            raise SelectionError("no int8 tensor here has a '_scale' beside it", hint="this checkpoint was not quantized by quantize_int8")
        scales = set(pairs.values())
        made: dict[object, LazyTensor] = {}
        for name, tensor in part.items():
            if name in pairs:
                scale = part[pairs[name]]
                spec = TensorSpec(wanted, tensor.shape)
                params = {"channel": tensor.numel // max(scale.numel, 1), "dtype": wanted.name}
                key = (tensor.source, scale.source)
                if key not in made:
                    made[key] = LazyTensor(
                        spec,
                        Derived(Block("workbench.ops.quantize:dequantize_elements", params, (tensor,), (spec,), "elements", (scale,)), 0),
                        locked=tensor.locked or scale.locked,
                    )
                yield name, made[key], name
            elif name not in scales:
                yield name, tensor, name

    step = Step("dequantize", {"dtype": wanted.name, "section": section, "everything": everything})
    return on_section(ckpt, section, everything, step, entries)


def int8_rows(params: dict[str, Any], whole: Sequence[torch.Tensor], blocks: Sequence[torch.Tensor], at: int) -> list[torch.Tensor]:
    """Rows [r, …] -> their int8 values and their scales [r, 1]."""
    import torch

    rows = blocks[0].shape[0]
    if not blocks[0].numel():
        return [blocks[0].to(torch.int8), torch.ones(rows, 1)]
    values = _float(blocks[0].reshape(rows, -1))
    scale = _scale(torch.maximum(values.amax(1), -values.amin(1)))
    quantized = (values / scale[:, None]).round_().to(torch.int8)
    return [quantized.view(blocks[0].shape), scale.float()[:, None]]


def channel_scales(params: dict[str, Any], whole: Sequence[torch.Tensor], blocks: Sequence[Any], at: int) -> list[torch.Tensor]:
    """One pass over a tensor of long channels -> the scale of each."""
    import torch

    channel, peaks = params["channel"], torch.zeros(params["channels"])
    for start, chunk in blocks[0]:
        values = _float(chunk)
        for index, low, high in _pieces(start, values.numel(), channel):
            piece = values[low:high]
            peaks[index] = torch.maximum(peaks[index], torch.maximum(piece.amax(), -piece.amin()))
    return [_scale(peaks).reshape(params["shape"])]


def int8_elements(params: dict[str, Any], whole: Sequence[torch.Tensor], blocks: Sequence[torch.Tensor], at: int) -> list[torch.Tensor]:
    """A flat range -> its int8 values, by the scale of the channel each element lies in."""
    import torch

    values, scale = _float(blocks[0]), whole[0].reshape(-1)
    out = torch.empty(values.numel(), dtype=torch.int8)
    for index, low, high in _pieces(at, values.numel(), params["channel"]):
        out[low:high] = (values[low:high] / scale[index]).round_()
    return [out]


def dequantize_elements(
    params: dict[str, Any], whole: Sequence[torch.Tensor], blocks: Sequence[torch.Tensor], at: int
) -> list[torch.Tensor]:
    """A flat range of int8 values -> floating ones."""
    import torch

    scale, channel = whole[0].reshape(-1), max(params["channel"], 1)
    channels = torch.arange(at, at + blocks[0].numel()).div_(channel, rounding_mode="floor")
    return [rounded(blocks[0].to(scale.dtype) * scale[channels], dtypes.to_torch(DTYPES[params["dtype"]]))]


def _float(values: torch.Tensor) -> torch.Tensor:
    import torch

    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def _scale(peaks: torch.Tensor) -> torch.Tensor:
    """Scales of channels whose largest magnitudes are `peaks`; 1 for a channel of zeros."""
    import torch

    scale = (peaks / 127).float()
    if not math.isfinite(float(scale.sum(dtype=torch.float64))):
        held = "NaN or Inf" if not bool(torch.isfinite(peaks).all()) else "values beyond what a float32 scale expresses"
        raise SelectionError(f"the tensor holds {held}, which int8 cannot carry", hint="wb.stats tells where; leave it out with names=")
    tiny = torch.finfo(torch.float32).tiny  # below it a float32 scale loses its precision
    if float(scale.amin()) < tiny:
        scale = torch.where(peaks > 0, scale.clamp_min(tiny), torch.ones_like(scale))
    return scale


def _pieces(start: int, count: int, channel: int) -> Iterator[tuple[int, int, int]]:
    """Cut a flat range at channel borders: (channel index, low, high), relative to the range."""
    low = 0
    while low < count:
        index = (start + low) // channel
        high = min(count, (index + 1) * channel - start)
        yield index, low, high
        low = high
