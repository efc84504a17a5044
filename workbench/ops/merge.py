"""Merging out of core: averages, task arithmetic and low-rank adapters over checkpoints that are never in memory.

    average, ema, merge    y = sum of w_i x_i               element by element; where all x are equal and the w sum to 1, y is x bit for bit
    task_arithmetic        y = b + sum of s_i (x_i - b)     an element that did not move adds nothing, whatever it is
    extract_lora           x - b ~ B A                      by singular values: the best of its rank (Eckart and Young 1936)
    merge_lora             y = b + scale * B A              row by row

The first checkpoint gives names, order, dtypes and everything that is no tensor; the others must have its names and shapes. Sums are
taken in float32 (float64 for float64) and rounded once. Integers and other tensors that have no mean must be equal.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from workbench import dtypes
from workbench.adapter_config import config_beside, lora_scale
from workbench.checkpoint import Checkpoint, Step
from workbench.dtypes import DTYPES
from workbench.errors import SelectionError, SpecMismatchError
from workbench.names import Patterns, require_names
from workbench.opening import open as open_checkpoint
from workbench.ops.scope import Entries, floating, on_section, rounded, weights_of, wide
from workbench.sections import Path
from workbench.tensors import Block, Derived, LazyTensor, TensorSpec

if TYPE_CHECKING:
    import torch

Unequal = Literal["refuse", "first", "last"]


def average(
    ckpts: Sequence[Checkpoint], weights: Sequence[float] | None = None, *, unequal: Unequal = "refuse",
    section: str | Path | None = None, everything: bool = False,
) -> Checkpoint:  # fmt: skip
    """The mean of several checkpoints, or their weighted mean: a model soup, stochastic weight averaging.

    Args:
        ckpts: or anything `wb.open` takes.
        weights: one positive or zero number per checkpoint, divided by their sum; equal where absent.
        unequal: what becomes of integers that differ, as `num_batches_tracked`: "refuse", or take the "first" or "last".
    Returns:
        The first checkpoint with its floating tensors averaged. Running statistics are averaged like any tensor: for exact ones run
        torch.optim.swa_utils.update_bn on the loaded model.
    Raises:
        SelectionError: names differ, or weights are no weights; when values are read, integers differ or a result overflows.
        SpecMismatchError: shapes or kinds of element differ.
    Cost: one read of every input; peak is one block of each.
    Source: Wortsman et al. 2022, arXiv:2203.05482; Izmailov et al. 2018, arXiv:1803.05407.
    """
    ckpts = list(ckpts)
    given = [1.0] * len(ckpts) if weights is None else list(weights)
    if not given or min(given) < 0 or not 0 < sum(given) < math.inf:
        raise SelectionError(f"weights={given}: at least one checkpoint, and weights of at least 0 with a positive sum")
    return _combined("average", ckpts, [w / sum(given) for w in given], unequal, section, everything, mean=True)


def merge(
    ckpts: Sequence[Checkpoint], weights: Sequence[float], *, unequal: Unequal = "refuse", section: str | Path | None = None,
    everything: bool = False,
) -> Checkpoint:  # fmt: skip
    """The sum of w_i x_i with the weights as they are, negative ones too; otherwise as `average`."""
    return _combined("merge", list(ckpts), list(weights), unequal, section, everything)


def ema(
    ckpts: Sequence[Checkpoint], decay: float, *, unequal: Unequal = "refuse", section: str | Path | None = None, everything: bool = False
) -> Checkpoint:
    """The exponential moving average over checkpoints in time order: e_0 = x_0, e_t = decay e_(t-1) + (1 - decay) x_t; otherwise as `average`."""
    if not 0 <= decay < 1:
        raise SelectionError(f"decay={decay}: it is in [0, 1)")
    ckpts = list(ckpts)
    last = len(ckpts) - 1
    weights = [decay**last, *((1 - decay) * decay ** (last - i) for i in range(1, last + 1))]
    return _combined("ema", ckpts, weights, unequal, section, everything, mean=True)


def task_arithmetic(
    base: Checkpoint, tuned: Sequence[Checkpoint], scales: float | Sequence[float] = 1.0, *, unequal: Unequal = "refuse",
    section: str | Path | None = None, everything: bool = False,
) -> Checkpoint:  # fmt: skip
    """Add what fine-tuning changed: base + sum of s_i (tuned_i - base); a negative scale unlearns.

    Args:
        scales: one number for all, or one per checkpoint of `tuned`.
    Returns, Raises, Cost: as `average`, with the base as the first.
    Source: Ilharco et al. 2023, arXiv:2212.04089.
    """
    given = [float(scales)] * len(tuned) if isinstance(scales, (int, float)) else list(scales)
    return _combined("task_arithmetic", [base, *tuned], [1.0, *given], unequal, section, everything, around_first=True)


def _combined(
    op: str, ckpts: Sequence[Checkpoint], weights: list[float], unequal: Unequal, section: str | Path | None, everything: bool,
    *, mean: bool = False, around_first: bool = False,
) -> Checkpoint:  # fmt: skip
    if not ckpts or len(weights) != len(ckpts) or not all(map(math.isfinite, weights)) or unequal not in ("refuse", "first", "last"):
        raise SelectionError(
            f"{len(weights)} weights {weights} for {len(ckpts)} checkpoints, unequal={unequal!r}",
            hint='one finite number for each checkpoint; "refuse", "first" or "last"',
        )
    ckpts = [open_checkpoint(ckpt) for ckpt in ckpts]
    mean = mean or math.isclose(math.fsum(weights), 1, rel_tol=1e-15)
    params = {"weights": weights, "mean": mean, "around_first": around_first}

    def joined(name: str, inputs: tuple[LazyTensor, ...]) -> LazyTensor:
        spec, locked = inputs[0].spec, next((t.locked for t in inputs if t.locked), None)
        if name in dense:
            return LazyTensor(spec, Derived(Block(f"{__name__}:weighted", params, inputs, (spec,)), 0), inputs[0].requires_grad, locked)
        if unequal != "refuse" or len({(t.source, t.spec) for t in inputs}) == 1:
            return inputs[-1 if unequal == "last" else 0]
        if spec.layout != "strided" or spec.quantizer is not None:
            raise SelectionError(f"{name!r} is {spec.quantizer or spec.layout} and has no mean", hint='drop() it, or unequal="first"')
        return LazyTensor(spec, Derived(Block(f"{__name__}:all_equal", {}, inputs, (spec,)), 0), locked=locked)

    dense: set[str] = set()

    def entries(part: Checkpoint) -> Iterator[tuple[str, LazyTensor, str]]:
        dense.update(floating(part, "*", matrices_only=False))
        parts = [part, *(_part(ckpt, section, everything) for ckpt in ckpts[1:])]
        made: dict[object, LazyTensor] = {}
        for name, inputs in _aligned(parts):
            key = tuple((t.source, t.spec) for t in inputs)  # tied only where all of them tie it
            if key not in made:
                made[key] = joined(name, inputs)
            yield name, made[key], name

    told = {**params, "unequal": unequal, "with": _places(ckpts[1:]), "section": section, "everything": everything}
    return on_section(ckpts[0], section, everything, Step(op, told), entries)


def _part(ckpt: Checkpoint, section: str | Path | None, everything: bool) -> Checkpoint:
    return ckpt if everything else weights_of(ckpt) if section is None else ckpt.section(section)


def _places(ckpts: Sequence[Checkpoint]) -> list[str]:
    return [ckpt.source.url if ckpt.source is not None else ckpt.name for ckpt in ckpts]


def _aligned(parts: Sequence[Checkpoint]) -> Iterator[tuple[str, tuple[LazyTensor, ...]]]:
    """Each name of the first with its tensor in all, in the first's order."""
    first = parts[0]
    for i, other in enumerate(parts[1:], 2):
        if odd := next((name for name in (*first, *other) if name not in other or name not in first), None):
            holds, lacks = [f"the first ({first.name})", f"checkpoint {i} ({other.name})"][:: 1 if odd in first else -1]
            raise SelectionError(f"{odd!r} is in {holds} and not in {lacks}", hint="wb.match(a, b).apply(a) gives one the other's names")
    for name, tensor in first.items():
        for i, other in enumerate(parts[1:], 2):
            found = other[name].spec
            if found.shape != tensor.shape or found.dtype.kind != tensor.dtype.kind or found.layout != tensor.spec.layout:
                text = f"{tensor.dtype} {list(tensor.shape)} in the first, {found.dtype} {list(found.shape)} in checkpoint {i}"
                raise SpecMismatchError(text, tensor=name)
        yield name, tuple(part[name] for part in parts)


def weighted(params: dict[str, Any], whole: Sequence[torch.Tensor], blocks: Sequence[torch.Tensor], at: int) -> list[torch.Tensor]:
    """One flat range of every input -> its weighted sum."""
    import torch

    first = wide(blocks[0])
    out, still = torch.zeros_like(first), torch.full(first.shape, params["mean"])
    finite = torch.ones_like(still)
    for i, (block, weight) in enumerate(zip(blocks, params["weights"], strict=True)):
        finite &= torch.isfinite(wide(block))
        values = wide(block).to(first.dtype)
        still &= values == first
        if weight and i and params["around_first"]:
            out += torch.where(values == first, 0.0, values - first) * weight
        elif weight:  # zero times infinity would be NaN
            out += values * weight
    return [rounded(torch.where(still, first, out), blocks[0].dtype, finite)]


def all_equal(params: dict[str, Any], whole: Sequence[torch.Tensor], blocks: Sequence[torch.Tensor], at: int) -> list[torch.Tensor]:
    """The first block, where every other holds the same bytes."""
    import torch

    held = [dtypes.flat(block).view(torch.uint8) for block in blocks]
    if any(block.dtype != blocks[0].dtype or not torch.equal(held[0], other) for block, other in zip(blocks, held, strict=True)):
        text = f"the checkpoints hold different {dtypes.from_torch(blocks[0].dtype)} values, which have no mean"
        raise SelectionError(text, hint='take one: unequal="first" or "last"')
    return [blocks[0]]


# low-rank adapters, under the names that peft saves: base_model.model.<module>.lora_A.weight [r, in] and lora_B.weight [out, r]

_LORA = re.compile(r"(.+)\.lora_((?:embedding_)?[AB])(?:\.(?!weight$)\w+)?(?:\.weight)?")
_PEFT_ROOT = "base_model.model."


def extract_lora(base: Checkpoint, tuned: Checkpoint, rank: int, *, names: Patterns | None = None, errors: bool = False) -> Checkpoint:
    """The change of each weight matrix as a product of two thin ones: tuned - base ~ B A with A [rank, in] and B [out, rank].

    Args:
        names: matrices ``<module>.weight`` that peft adapts as Linear; where absent, every floating one [out, in] whose bytes are not
            shared by both. Leave embeddings out by naming the rest.
        errors: also give ``<module>.lora_error``, the part of the change that was lost: |tuned - base - B A| / |tuned - base|.
    Returns:
        The adapter under peft's names, for lora_alpha = rank (scale 1; its metadata says so, which safetensors keeps), in float32
        (float64 for float64). What else was tuned is not in it: ``wb.diff(tuned, wb.ops.merge_lora(base, adapter))`` tells everything that is lost.
    Raises:
        SelectionError, SpecMismatchError: rank below 1, no such matrix, or the two differ in names or shapes.
    Cost: one read of both and a singular value decomposition per matrix, held whole: about five times the matrix in float32.
    Source: Hu et al. 2021, arXiv:2106.09685.
    """
    if rank < 1:
        raise SelectionError(f"rank={rank}: at least one")
    first, second = weights_of(base), weights_of(tuned)
    chosen = floating(first, names if names is not None else "*.weight")
    out: dict[str, LazyTensor] = {}
    made: dict[object, Block] = {}  # of a tied pair one, so that merge_lora can keep the tie
    for name, (old, new) in _aligned([first, second]):
        is_matrix = old.ndim == 2 and old.numel > 0 and name.endswith(".weight")
        if name not in chosen or (names is None and (not is_matrix or (old.source, old.spec) == (new.source, new.spec))):
            continue
        if not is_matrix:
            raise SelectionError(f"{name!r} {list(old.shape)} is no matrix <module>.weight, and peft has no name for its factors")
        dtype = DTYPES["float64" if old.dtype.name == "float64" else "float32"]
        specs = (TensorSpec(dtype, (rank, old.shape[1])), TensorSpec(dtype, (old.shape[0], rank)), TensorSpec(dtype, ()))
        peak = old.nbytes + new.nbytes + 5 * dtype.itemsize * old.numel
        block = Block(f"{__name__}:low_rank", {"rank": rank, "shape": list(old.shape)}, (old, new), specs, "scan", peak=peak)
        block = made.setdefault((old.source, old.spec, new.source, new.spec), block)
        module = _PEFT_ROOT + name.removesuffix(".weight")
        for slot, suffix in enumerate(["lora_A.weight", "lora_B.weight", *["lora_error"] * errors]):
            out[f"{module}.{suffix}"] = LazyTensor(specs[slot], Derived(block, slot), locked=old.locked or new.locked)
    if not out:
        raise SelectionError("no matrix here was tuned", hint="name them with names=")
    told = {"rank": rank, "names": names, "errors": errors, "with": _places([tuned])}
    config = {"adapter_config.json": json.dumps({"peft_type": "LORA", "r": rank, "lora_alpha": rank})}
    return Checkpoint(out, name=f"{tuned.name}, rank {rank}", metadata=config, history=(*base.history, Step("extract_lora", told)))


def low_rank(params: dict[str, Any], whole: Sequence[torch.Tensor], blocks: Sequence[Any], at: int) -> list[torch.Tensor]:
    """[out, in] twice -> A, B, and the relative error of their product. Each factor carries the root of the singular values."""
    import torch

    old, new = (torch.cat([wide(chunk) for _, chunk in chunks]).reshape(params["shape"]) for chunks in blocks)
    left, values, right = torch.linalg.svd(new.to(old.dtype) - old, full_matrices=False)
    kept = min(params["rank"], len(values))
    thin, flat = old.new_zeros(params["rank"], old.shape[1]), old.new_zeros(old.shape[0], params["rank"])
    root = values[:kept].sqrt()
    thin[:kept], flat[:, :kept] = root[:, None] * right[:kept], left[:, :kept] * root
    return [thin, flat, torch.linalg.vector_norm(values[kept:]) / torch.linalg.vector_norm(values).clamp_min(torch.finfo(old.dtype).tiny)]


def merge_lora(
    base: Checkpoint, adapter: Checkpoint, scale: float | Mapping[str, float] | None = None, *, fan_in_fan_out: bool | None = None,
    section: str | Path | None = None,
) -> Checkpoint:  # fmt: skip
    """Put a low-rank adapter into its base: W + scale * B A; peft's embedding adapters and those of ungrouped convolutions too.

    Args:
        adapter: lora_A and lora_B as peft saves them. Other tensors in it (biases, modules_to_save) replace those of the base.
        scale: lora_alpha / r (/ sqrt(r) for rsLoRA). None reads it from adapter_config.json, module by module: open the adapter's folder,
            or leave that file beside it. The weights alone do not say it. Or a dict of globs over the base's names to scales, the first
            that matches counting: ``{"*.q_proj.weight": 32 / 8, "*": 16 / 8}``.
        fan_in_fan_out: the base keeps its weights as [in, out], as transformers' Conv1D does; None is what adapter_config.json says.
    Returns:
        The base with its own names, shapes and dtypes. Where the adapter changes one of two tied tensors they are two now, as they
        were in training, and a finding says so (peft's merge_and_unload changes both).
    Raises:
        SelectionError: a tensor of the adapter has no place in the base (DoRA's magnitudes, a renamed module), one factor is missing,
            no scale is told, one scale for factors of several ranks, or a dict of scales that leaves one out; when values are read, a result overflows.
        SpecMismatchError: B A has another shape than the weight.
    Cost: one read; peak is one block of rows and the two factors.
    """
    config = config_beside(adapter)
    turned = bool(config["adapter_config.json"].get("fan_in_fan_out")) if fan_in_fan_out is None else fan_in_fan_out

    def entries(part: Checkpoint) -> Entries:
        made: dict[str, LazyTensor] = {}
        modules: dict[str, str] = {}
        factors: dict[str, dict[str, LazyTensor]] = {}
        for name, tensor in ((n, t) for n, t in weights_of(adapter).items() if not n.endswith(".lora_error")):
            inner = name.removeprefix(_PEFT_ROOT)
            found = _LORA.fullmatch(inner)
            names = (f"{found[1]}.weight", f"{found[1]}.base_layer.weight") if found else (inner, inner.replace(".base_layer.", "."))
            inner = next((n for n in names if n in part), name)
            held, key = (factors.setdefault(inner, {}), found[2]) if found else (made, inner)
            if inner not in part or key in held or (not found and part[inner].spec != tensor.spec):
                hint = "give the base its names with wb.match; drop() what it cannot take, and all but one of several adapters"
                raise SelectionError(f"{name!r} of the adapter has no place in {part.name}", hint=hint)
            held[key] = tensor
            modules[inner] = name.rpartition(".lora_")[0]
        if not factors:
            raise SelectionError("the adapter holds no lora_A and lora_B")
        scales = _told_scales(factors, modules, config) if scale is None else _scales(factors, scale)
        merged: dict[object, LazyTensor] = {}
        for name, pair in factors.items():
            tensor = made.get(name, part[name])
            key = (tensor.source, tensor.spec, scales[name], *((k, t.source, t.spec) for k, t in sorted(pair.items())))
            made[name] = merged.setdefault(key, _with_product(name, tensor, pair, scales[name], turned))
        return [(name, made.get(name, tensor), name) for name, tensor in part.items()]

    step = Step("merge_lora", {"scale": scale, "fan_in_fan_out": turned, "with": _places([adapter]), "section": section})
    return on_section(base, section, False, step, entries)


def _told_scales(
    factors: Mapping[str, Mapping[str, LazyTensor]], modules: Mapping[str, str], config: Mapping[str, Any]
) -> dict[str, float]:
    """The scale of each product as adapter_config.json tells it."""
    found: dict[str, float] = {}
    for name, pair in factors.items():
        rank = next((tensor.shape[0] for key, tensor in pair.items() if key.endswith("A") and tensor.ndim), 0)
        told, reason = lora_scale(config, modules[name], rank)
        if told is None:
            raise SelectionError(f"{name!r}: {reason}", hint="say it: scale=lora_alpha / r, or {glob: scale}")
        found[name] = told
    return found


def _scales(factors: Mapping[str, Mapping[str, LazyTensor]], scale: float | Mapping[str, float]) -> dict[str, float]:
    """The scale of each product, by the name of the base's tensor."""
    if not isinstance(scale, Mapping):
        ranks = sorted({tensor.shape[0] for pair in factors.values() for key, tensor in pair.items() if key.endswith("A") and tensor.ndim})
        if len(ranks) > 1:
            text = f"the adapter's factors have the ranks {', '.join(map(str, ranks))}, and one scale = lora_alpha / r is not that of all"
            raise SelectionError(text, hint='give scale={glob over the base\'s names: scale}, or {"*": scale} if it is one indeed')
        return dict.fromkeys(factors, scale)
    found = {name: value for glob, value in reversed(list(scale.items())) for name in require_names(glob, factors, what="adapted tensor")}
    if left := [name for name in factors if name not in found]:
        raise SelectionError(f"scale= has none for {left[0]!r}", hint='{…, "*": scale} is for all others')
    return found


def _with_product(name: str, tensor: LazyTensor, pair: dict[str, LazyTensor], scale: float, fan_in_fan_out: bool) -> LazyTensor:
    if set(pair) not in ({"A", "B"}, {"embedding_A", "embedding_B"}):
        raise SelectionError(f"for {name!r} the adapter holds {', '.join(sorted(pair))} and not one A and one B")
    a, b = (pair[key] for key in sorted(pair))
    transposed = fan_in_fan_out or "A" not in pair
    made = (b.shape[:1], a.shape[1:]) if a.ndim > 1 and b.ndim > 1 and b.numel == b.shape[0] * a.shape[0] else ((), ())
    sizes = tuple(map(math.prod, made[::-1] if transposed else made))
    if sizes != (tensor.shape[0], math.prod(tensor.shape[1:])) or not made[0] or not tensor.dtype.is_floating:
        raise SpecMismatchError(
            f"B {list(b.shape)} times A {list(a.shape)} does not fit {tensor.dtype} {list(tensor.shape)}", tensor=name,
            hint="fan_in_fan_out=True is for bases that keep [in, out]; an adapter of a quantized base needs it dequantized",
        )  # fmt: skip
    block = Block(f"{__name__}:plus_product", {"scale": scale, "transposed": transposed}, (tensor,), (tensor.spec,), "rows", (a, b))
    return LazyTensor(tensor.spec, Derived(block, 0), tensor.requires_grad, tensor.locked or a.locked or b.locked)


def plus_product(params: dict[str, Any], whole: Sequence[torch.Tensor], blocks: Sequence[torch.Tensor], at: int) -> list[torch.Tensor]:
    """Rows of W + scale * B A, or of W + scale * (B A)^T."""
    import torch

    values = wide(blocks[0])
    a, b = (wide(t).to(values.dtype).flatten(1) for t in whole)
    rows = slice(at, at + values.shape[0])
    product = (b @ a[:, rows]).T if params["transposed"] else b[rows] @ a
    return [rounded(values + params["scale"] * product.reshape(values.shape), blocks[0].dtype, torch.isfinite(values))]
