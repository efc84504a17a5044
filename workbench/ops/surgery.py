"""Shape surgery: a checkpoint's tensors cut or grown to fit another model. Nothing here is done unasked, and history tells what was.

    head          every row anew                     W'[c] = init
    vocabulary    rows kept, then added or cut       W'[v] = W[v] for v < min(old, new), else init
    positions     a grid of vectors, interpolated    P'[prefix:] = interpolate(P[prefix:] as [d, h, w], (h', w'));  P'[:prefix] = P[:prefix]
    channels      repeated and rescaled, or summed   W'[:, c] = W[:, c mod n] * n / n';  for one channel W'[:, 0] = sum over c of W[:, c]

`init` of a row: "zeros"; "mean", the mean of the old rows; "normal", N(0, std²) by `seed` for matrices and zeros for vectors. Sums are
taken in float32 (float64 for float64) and rounded back to the tensor's own type; one that does not fit it is refused when it is read.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from workbench import dtypes
from workbench.checkpoint import Checkpoint, Step
from workbench.dtypes import DTYPES
from workbench.errors import SelectionError
from workbench.names import Patterns
from workbench.opening import open as open_checkpoint
from workbench.ops.scope import floating, mapped, on_section, rounded, weights_of, wide
from workbench.sections import Path
from workbench.tensors import Block, Derived, LazyTensor, Reads

if TYPE_CHECKING:
    import torch

Init = Literal["zeros", "mean", "normal"]


def select_fitting(ckpt: Checkpoint, target: Any, *, section: str | Path | None = None, everything: bool = False) -> Checkpoint:
    """The tensors whose name and shape the target has too: what partial loading can take.

    Args:
        target: an nn.Module, or anything else `wb.open` takes; of a training checkpoint, its weights.
    Returns:
        Those tensors; what was left out stands in the last step of `history`, under "left_out".
    Raises:
        SelectionError: none fits, or several sections of the target have an equal claim to be its weights.
    Cost: nothing is read. To fit other names as well, see `wb.match`.
    """
    shapes = {name: tensor.shape for name, tensor in weights_of(open_checkpoint(target)).items()}
    step = Step("select_fitting", {"left_out": [], "section": section, "everything": everything})

    def entries(part: Checkpoint) -> list[tuple[str, LazyTensor, str]]:
        kept = [(name, tensor, name) for name, tensor in part.items() if shapes.get(name) == tensor.shape]
        step.params["left_out"] += [name for name, tensor in part.items() if shapes.get(name) != tensor.shape]
        if not kept:
            raise SelectionError("no tensor has a name and shape of the target", hint="wb.match(ckpt, model) finds other names")
        return kept

    return on_section(ckpt, section, everything, step, entries)


def swap_head(
    ckpt: Checkpoint, names: Patterns, num_classes: int, *, init: Init = "zeros", std: float = 0.02, seed: int = 0,
    section: str | Path | None = None, everything: bool = False,
) -> Checkpoint:  # fmt: skip
    """A new head for another number of classes: each tensor that `names` selects gets `num_classes` fresh rows.

    Args:
        names: the head's tensors, as "fc.*": weight [classes, in] and bias [classes].
        init: what the rows hold, see above. With "zeros" every class starts equal, and only the head's own gradient is not zero.
    Returns:
        The same names and dtypes; of the old head nothing is kept. History records the old shapes.
    Raises:
        SelectionError: nothing floating is selected, or the tensors do not have one number of rows.
    Cost: nothing is read, but for "mean" the old head; the new head is held whole when it is written.
    """
    step = Step("swap_head", {"num_classes": num_classes, "section": section, "everything": everything})
    return _with_rows(ckpt, names, num_classes, step, False, init, std, seed)


def resize_rows(
    ckpt: Checkpoint, names: Patterns, rows: int, *, init: Init = "mean", std: float = 0.02, seed: int = 0,
    section: str | Path | None = None, everything: bool = False,
) -> Checkpoint:  # fmt: skip
    """Give embeddings and output layers another vocabulary: the first rows stay, and rows are added or cut at the end.

    Args:
        names: every tensor with a row per token, as ["wte.weight", "lm_head.weight"]; tied ones stay tied.
        init: what added rows hold, see above; "mean" gives a new token the average logit of the old ones.
    Returns:
        The same names and dtypes. History records the old shapes.
    Raises:
        SelectionError: nothing floating is selected, or the tensors do not have one number of rows.
    Cost: cutting streams in blocks; growing holds the new tensor whole.
    """
    step = Step("resize_rows", {"rows": rows, "section": section, "everything": everything})
    return _with_rows(ckpt, names, rows, step, True, init, std, seed)


def _with_rows(ckpt: Checkpoint, names: Patterns, rows: int, step: Step, keep: bool, init: Init, std: float, seed: int) -> Checkpoint:
    if not isinstance(rows, int) or rows < 1 or init not in ("zeros", "mean", "normal"):
        raise SelectionError(f'{rows} rows, init={init!r}: at least one row, a whole number, and "zeros", "mean" or "normal"')
    heights: dict[str, int] = {}

    def make(name: str, tensor: LazyTensor) -> LazyTensor:
        heights[name] = tensor.shape[0] if tensor.ndim else 0
        if heights[name] != (first := next(iter(heights.values()))) or not tensor.ndim:
            text = f"{name!r} has {heights[name]} rows and {next(iter(heights))!r} has {first}"
            raise SelectionError(text, hint="name the tensors of one head or vocabulary")
        if init == "mean" and not first:
            raise SelectionError(f"{name!r} has no rows to take the mean of", hint='init="zeros" or "normal"')
        if keep and rows == first:
            return tensor
        shape = (rows, *tensor.shape[1:])
        if keep and rows < first:
            return _changed(tensor, shape, "first_rows", {}, "elements")
        told = {"shape": list(shape), "dtype": tensor.dtype.name, "kept": first if keep else 0, "old_rows": first}
        params = {**told, "init": init, "std": std, "seed": seed ^ zlib.crc32(name.encode())}
        return _changed(tensor, shape, "new_rows", params, "scan", reads_old=keep or init == "mean")

    step.params.update({"names": names, "init": init, "std": std, "seed": seed})
    return _on_named(ckpt, names, step, make)


def resize_position_embedding(
    ckpt: Checkpoint, names: Patterns, size: int | tuple[int, int], *, prefix_tokens: int = 1, old_grid: tuple[int, int] | None = None,
    mode: Literal["bicubic", "bilinear"] = "bicubic", antialias: bool = True,
    section: str | Path | None = None, everything: bool = False,
) -> Checkpoint:  # fmt: skip
    """Interpolate learned position embeddings to another grid of patches, or to another length of text.

    Args:
        names: tensors [1, n, d] or [n, d] with n = prefix_tokens + h * w.
        size: (h', w') of the new grid, or the new length where positions form a line.
        prefix_tokens: leading vectors without a place in the grid (class and register tokens), kept as they are.
        old_grid: (h, w); a square where absent.
        antialias: as timm does; torch's own default and transformers' ViT do not.
    Returns:
        [1, n', d] or [n', d] under the same names.
    Raises:
        SelectionError: nothing floating is selected, or n - prefix_tokens is no grid.
    Cost: one read; tensor and result are held whole.
    Source: timm.layers.resample_abs_pos_embed; Dosovitskiy et al. 2021, arXiv:2010.11929, section 3.2.
    """
    grid = tuple(size) if isinstance(size, Sequence) else (1, size)
    whole = all(isinstance(n, int) for n in (*grid, prefix_tokens))
    if not whole or len(grid) != 2 or min(grid) < 1 or prefix_tokens < 0 or mode not in ("bicubic", "bilinear"):
        raise SelectionError(f"size={size!r}, prefix_tokens={prefix_tokens}, mode={mode!r}: (h, w) or a length, and bicubic or bilinear")

    def make(name: str, tensor: LazyTensor) -> LazyTensor:
        is_table = tensor.ndim == 2 or (tensor.ndim == 3 and tensor.shape[0] == 1)
        count = max(tensor.shape[-2] - prefix_tokens, 0) if is_table else 0
        old = (1, count) if isinstance(size, int) else old_grid or (math.isqrt(count),) * 2
        if count < 1 or old[0] * old[1] != count or not tensor.numel:
            raise SelectionError(
                f"{name!r} {list(tensor.shape)} is no grid of {' by '.join(map(str, old))} after {prefix_tokens} prefix tokens",
                hint="give old_grid=(h, w) and prefix_tokens=; a line of positions takes a length as its size",
            )
        shape = (*tensor.shape[:-2], prefix_tokens + grid[0] * grid[1], tensor.shape[-1])
        params = {"prefix": prefix_tokens, "old": list(old), "new": list(grid), "mode": mode, "antialias": antialias}
        return tensor if old == grid else _changed(tensor, shape, "interpolated", {**params, "shape": list(tensor.shape)}, "scan")

    told = {"names": names, "size": size, "prefix_tokens": prefix_tokens, "old_grid": old_grid, "mode": mode, "antialias": antialias}
    return _on_named(ckpt, names, Step("resize_position_embedding", {**told, "section": section, "everything": everything}), make)


def adapt_input_channels(
    ckpt: Checkpoint, names: Patterns, channels: int, *, section: str | Path | None = None, everything: bool = False
) -> Checkpoint:
    """Let the first convolution take another number of input channels.

    One channel gets the answer that the old ones got when all were equal to it; repeated channels share the weight of the old ones.

    Args:
        names: convolution weights [out, in, k, …], as "conv1.weight".
    Returns:
        [out, channels, k, …] under the same names.
    Raises:
        SelectionError: nothing floating is selected, or not a convolution.
    Cost: one read; peak is one block of rows.
    Source: timm.models.adapt_input_conv.
    """
    if not isinstance(channels, int) or channels < 1:
        raise SelectionError(f"channels={channels}: a whole number, at least one")

    def make(name: str, tensor: LazyTensor) -> LazyTensor:
        if tensor.ndim < 3 or not tensor.shape[1]:
            raise SelectionError(f"{name!r} {list(tensor.shape)} is no convolution weight [out, in, k, …]")
        shape = (tensor.shape[0], channels, *tensor.shape[2:])
        return tensor if shape == tensor.shape else _changed(tensor, shape, "other_channels", {"channels": channels}, "rows")

    step = Step("adapt_input_channels", {"names": names, "channels": channels, "section": section, "everything": everything})
    return _on_named(ckpt, names, step, make)


def _on_named(ckpt: Checkpoint, names: Patterns, step: Step, make: Callable[[str, LazyTensor], LazyTensor]) -> Checkpoint:
    def entries(part: Checkpoint) -> Any:
        chosen = floating(part, names)
        step.params["was"] = {name: list(part[name].shape) for name in part if name in chosen}
        return mapped(part, chosen, make)

    return on_section(ckpt, step.params["section"], step.params["everything"], step, entries)


def _changed(
    tensor: LazyTensor, shape: tuple[int, ...], kernel: str, params: dict[str, Any], reads: Reads, reads_old: bool = True
) -> LazyTensor:
    spec = replace(tensor.spec, shape=shape)
    peak = 12 * (spec.numel + tensor.numel) if kernel == "interpolated" else spec.nbytes + 4 * spec.numel if reads == "scan" else 0
    block = Block(f"{__name__}:{kernel}", params, (tensor,) if reads_old else (), (spec,), reads, peak=peak)
    return LazyTensor(spec, Derived(block, 0), tensor.requires_grad, tensor.locked if reads_old else None)


def first_rows(params: dict[str, Any], whole: Sequence[torch.Tensor], blocks: Sequence[torch.Tensor], at: int) -> list[torch.Tensor]:
    """A flat range that both shapes have."""
    return [blocks[0]]


def new_rows(params: dict[str, Any], whole: Sequence[torch.Tensor], blocks: Sequence[Any], at: int) -> list[torch.Tensor]:
    """The old rows where they are kept, and new ones behind them."""
    import torch

    out = torch.zeros(params["shape"], dtype=dtypes.to_torch(DTYPES[params["dtype"]]))
    flat, row, kept = out.view(-1), out[0].numel(), params["kept"]
    total = torch.zeros(row, dtype=torch.float64)
    for start, chunk in blocks[0] if blocks else ():
        if kept:
            flat[start : start + chunk.numel()] = chunk
        if params["init"] == "mean":
            total.index_add_(0, torch.arange(start, start + chunk.numel()) % row, chunk.double())
    if params["init"] == "mean":
        out[kept:] = rounded((total / params["old_rows"]).reshape(out.shape[1:]), out.dtype, total.isfinite().reshape(out.shape[1:]))
    elif params["init"] == "normal" and out.ndim > 1:
        generator = torch.Generator().manual_seed(params["seed"])
        out[kept:] = rounded(torch.randn(out[kept:].shape, generator=generator).mul_(params["std"]), out.dtype)
    return [out]


def interpolated(params: dict[str, Any], whole: Sequence[torch.Tensor], blocks: Sequence[Any], at: int) -> list[torch.Tensor]:
    """[…, prefix + h * w, d] -> […, prefix + h' * w', d]."""
    import torch

    vectors = torch.cat([chunk for _, chunk in blocks[0]]).reshape(params["shape"][-2:])
    old = wide(vectors[params["prefix"] :]).reshape(1, *params["old"], -1).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(old, size=params["new"], mode=params["mode"], align_corners=False, antialias=params["antialias"])
    finite = torch.isfinite(old).all(3).all(2).all(0)  # [d]
    out = torch.cat([vectors[: params["prefix"]], rounded(grid.flatten(2)[0].T, vectors.dtype, finite)])
    return [out.reshape(*params["shape"][:-2], *out.shape)]


def other_channels(params: dict[str, Any], whole: Sequence[torch.Tensor], blocks: Sequence[torch.Tensor], at: int) -> list[torch.Tensor]:
    """Rows [r, in, …] -> [r, channels, …]."""
    import torch

    values, count = wide(blocks[0]), params["channels"]
    source = torch.arange(count) % values.shape[1]
    out = values.sum(1, keepdim=True) if count == 1 else values[:, source] * (values.shape[1] / count)
    return [rounded(out, blocks[0].dtype, torch.isfinite(values).all(1, keepdim=True))]
