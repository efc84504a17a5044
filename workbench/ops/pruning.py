"""prune: the weakest or random elements, slices, or all but N of every M, to zero; finish_pruning: masks that torch.nn.utils.prune left.

Zeros take as much room as other numbers until something packs them: `wb.sparsity` compares what would.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal

from workbench import dtypes
from workbench.checkpoint import Checkpoint, Finding, Step
from workbench.errors import SelectionError
from workbench.names import Patterns, require_names
from workbench.ops.scope import floating, mapped, on_section
from workbench.sections import Path
from workbench.tensors import Block, Derived, LazyTensor, Live, Reads, TensorSpec

if TYPE_CHECKING:
    import torch

_RANDOM_STEP = 1 << 18


def prune(
    ckpt: Checkpoint,
    amount: float | None = None,
    *,
    method: str = "l1",
    scope: Literal["tensor", "global"] = "tensor",
    n: float = 2,
    dim: int = 0,
    seed: int = 0,
    names: Patterns | None = None,
    exclude: Patterns | None = None,
    section: str | Path | None = None,
    everything: bool = False,
) -> Checkpoint:
    """Zero a part of each matching tensor, exactly as much as asked; counts as torch.nn.utils.prune does.

    Args:
        amount: a fraction in [0, 1), of which round(amount * numel) go, or a count (an int). Not with N:M, which says it.
        method: "l1", the elements of smallest magnitude; "random" ones; "ln", whole slices along `dim` of smallest `n`-norm, `amount`
            being of slices; or "2:4" and its like, the two largest of every four along the input axis (dimension 1) staying.
        scope: "tensor" prunes each alone, "global" all chosen together (l1 and random), tied ones counted once.
        n: order of the norm for "ln": a number, inf or -inf. Norms are summed in float64.
        seed: of "random"; a tensor's elements follow from it and the tensor's name, so the same seed prunes alike everywhere.
        names, exclude: globs; where `names` is absent, every floating tensor of two dimensions or more.
    Returns:
        Same names, shapes, dtypes; tied tensors stay tied. Of equal magnitudes, norms or random keys the lower index is kept; NaN counts
        as largest. A tensor that N:M does not fit is left and told in a finding, or refused where it was named.
    Raises:
        SelectionError: an argument out of range, a tensor too small for the count, or nothing floating matches.
    Cost: one read to choose per 16 bits of the type and one more (l1; at once where "global"), one (ln) or none (random, N:M), then one to
    write; peak is one block, and 40 bytes for each slice (ln).
    Source: Han et al. 2015, arXiv:1506.02626; Mishra et al. 2021, arXiv:2104.08378 (2:4).
    """
    ratio = kept_of(method)
    if ratio is None and method not in ("l1", "random", "ln"):
        raise SelectionError(f'method={method!r}: it can be "l1", "random", "ln", or N:M as "2:4"')
    if scope not in ("tensor", "global") or (scope == "global" and method not in ("l1", "random")):
        raise SelectionError(f'scope={scope!r} with {method!r}: "tensor", or with "l1" and "random" also "global"')
    if (ratio is None) == (amount is None):
        raise SelectionError(f"amount={amount!r} with {method!r}: N:M says how much goes by itself, any other method needs an amount")
    if ratio is None:
        count_of(amount, math.inf)  # refused before a tensor is looked at
    left: list[str] = []

    def entries(part: Checkpoint) -> Iterator[tuple[str, LazyTensor, str]]:
        chosen = floating(part, names) - set(require_names(exclude, part) if exclude is not None else ())
        if not chosen:
            raise SelectionError(f"exclude={exclude!r} leaves nothing to prune")
        if scope == "global":
            first = {(part[name].source, part[name].spec): part[name] for name in part if name in chosen}
            starts = dict(zip(first, accumulate((t.numel for t in first.values()), initial=0)))  # noqa: B905, the last is the end
            told = {"seed": _seed(seed, "")} if method == "random" else {"dtype": _common(first.values())}
            found = _cut(tuple(first.values()), count_of(amount, sum(t.numel for t in first.values())), told)
            cut = LazyTensor(found.spec, Live(found.load()))  # at once: every tensor's result needs it, wherever that is computed

        def make(name: str, tensor: LazyTensor) -> LazyTensor:
            if scope == "global":
                return _zeroed("zero_weakest", {**told, "start": starts[tensor.source, tensor.spec]}, tensor, cut)
            if ratio is not None:
                made = _n_of_m(tensor, *ratio)
                if made is None and names is not None:
                    raise SelectionError(f"{method} needs a dimension 1 that {ratio[1]} divides: {list(tensor.shape)}", tensor=name)
                left.extend([name] * (made is None))
                return made or tensor
            if method == "ln":
                return _without_slices(name, tensor, amount, n, dim)
            count = count_of(amount, tensor.numel, name)
            own = {"seed": _seed(seed, name)} if method == "random" else {"dtype": tensor.dtype.name}
            return _zeroed("zero_weakest", {**own, "start": 0}, tensor, _cut((tensor,), count, own)) if count else tensor

        yield from mapped(part, chosen, make)

    params = {"amount": amount, "method": method, "scope": scope, "n": n, "dim": dim, "seed": seed}
    step = Step("prune", {**params, "names": names, "exclude": exclude, "section": section, "everything": everything})
    result = on_section(ckpt, section, everything, step, entries)
    notes = [Finding("not pruned", "info", f"{name!r} was left: {method} does not fit its shape", {"tensor": name}) for name in left]
    return replace(result, findings=(*result.findings, *notes)) if notes else result


def kept_of(method: str) -> tuple[int, int] | None:
    """(N, M) of a method that keeps N of every M, else None."""
    found = re.fullmatch(r"(\d+):(\d+)", method)
    return (int(found[1]), int(found[2])) if found and 0 < int(found[1]) < int(found[2]) else None


def count_of(amount: float | int | None, size: float, name: str | None = None) -> int:
    """How many of `size` an amount is: a float below 1 is a fraction, an int a count."""
    valid = isinstance(amount, int) and not isinstance(amount, bool) and amount >= 0
    if not valid and not (isinstance(amount, float) and 0 <= amount < 1):
        raise SelectionError(f"amount={amount!r}: it is a fraction in [0, 1), or a count as an int")
    count = amount if isinstance(amount, int) else round(float(amount or 0) * size) if size < math.inf else 0
    if count > size:
        raise SelectionError(f"amount={amount}: there are {size} to prune", tensor=name)
    return count


def finish_pruning(ckpt: Checkpoint, *, section: str | Path | None = None, everything: bool = False) -> Checkpoint:
    """Make `X` of each `X_orig` and `X_mask` that torch.nn.utils.prune left, as its `remove` does: orig * mask, -0.0 where that gives it.

    Returns:
        The names a plain model has; the masks are gone, which are half of such a file.
    Raises:
        SelectionError: no such pair is here.
    Cost: one read; peak is one block.
    """

    def entries(part: Checkpoint) -> Iterator[tuple[str, LazyTensor, str]]:
        pairs = {name: name.removesuffix("_orig") for name in part if name.endswith("_orig")}
        pairs = {orig: plain for orig, plain in pairs.items() if plain not in part and _is_mask(part.get(f"{plain}_mask"), part[orig])}
        if not pairs:
            raise SelectionError("nothing here has an '_orig' with its '_mask' beside it", hint="no pruning is unfinished in it")
        masks = {f"{plain}_mask" for plain in pairs.values()}
        made: dict[object, LazyTensor] = {}
        for name, tensor in part.items():
            if name in pairs:
                mask = part[f"{pairs[name]}_mask"]
                block = Block("workbench.ops.pruning:masked", {}, (tensor, mask), (tensor.spec,))
                new = LazyTensor(tensor.spec, Derived(block, 0), tensor.requires_grad, tensor.locked or mask.locked)
                yield pairs[name], made.setdefault((tensor.source, mask.source), new), name
            elif name not in masks:
                yield name, tensor, name

    return on_section(ckpt, section, everything, Step("finish_pruning", {"section": section, "everything": everything}), entries)


def _is_mask(mask: LazyTensor | None, orig: LazyTensor) -> bool:
    return mask is not None and mask.shape == orig.shape and mask.spec.layout == orig.spec.layout == "strided"


def masked(params: dict[str, Any], whole: Sequence[torch.Tensor], blocks: Sequence[torch.Tensor], at: int) -> list[torch.Tensor]:
    """Originals and masks -> their products, in the originals' type."""
    return [blocks[0] * blocks[1].to(blocks[0].dtype)]


# what goes: the elements whose key is below a threshold, found exactly by radix passes over the keys' bits


def _common(tensors: Any) -> str:
    """The type in which magnitudes of several types compare exactly."""
    found = {tensor.dtype.name for tensor in tensors}
    return found.pop() if len(found) == 1 else "float64" if "float64" in found else "float32"


def _seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}:{name}".encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _derived(
    op: str,
    params: dict[str, Any],
    rowed: tuple[LazyTensor, ...],
    spec: TensorSpec,
    reads: Reads,
    whole: tuple[LazyTensor, ...] = (),
    peak: int = 0,
) -> LazyTensor:
    return LazyTensor(spec, Derived(Block(f"workbench.ops.pruning:{op}", params, rowed, (spec,), reads, whole, peak), 0))


def _zeroed(op: str, params: dict[str, Any], tensor: LazyTensor, *whole: LazyTensor) -> LazyTensor:
    made = _derived(op, params, (tensor,), tensor.spec, "elements", whole)
    return LazyTensor(made.spec, made.source, tensor.requires_grad, tensor.locked)


def _cut(tensors: tuple[LazyTensor, ...], count: int, keys: dict[str, Any]) -> LazyTensor:
    """(threshold, index from which elements equal to it go) over the tensors laid end to end, deferred."""
    numels = [tensor.numel for tensor in tensors]
    params, rowed = {**keys, "count": count, "numels": numels}, () if "seed" in keys else tensors
    width = 4 if "seed" in keys else dtypes.DTYPES[keys["dtype"]].itemsize
    found: tuple[LazyTensor, ...] = ()
    for step in range(max(1, width // 2)):  # each pass fixes 16 more bits of the threshold
        found = (_derived("narrow", {**params, "step": step}, rowed, TensorSpec(dtypes.DTYPES["int64"], (3,)), "scan", found),)
    return _derived("last_kept", params, rowed, TensorSpec(dtypes.DTYPES["int64"], (2,)), "scan", found)


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


def random_keys(seed: int, start: int, count: int) -> torch.Tensor:
    """31 random bits for each index, the same in whatever ranges they are asked for (splitmix64 of seed and index)."""
    import numpy as np
    import torch

    z = np.arange(start + 1, start + count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return torch.from_numpy(((z ^ (z >> np.uint64(31))) >> np.uint64(33)).astype(np.int32))


def _keys(params: dict[str, Any], start: int, values: torch.Tensor) -> torch.Tensor:
    if "seed" in params:
        return random_keys(params["seed"], start, values.numel())
    return magnitude_bits(values.to(dtypes.to_torch(dtypes.DTYPES[params["dtype"]])))


def _all_keys(params: dict[str, Any], blocks: Sequence[Any]) -> Iterator[tuple[int, torch.Tensor]]:
    """(index, keys) over the tensors laid end to end."""
    if "seed" in params:
        total = sum(params["numels"])
        for start in range(0, total, _RANDOM_STEP):
            yield start, random_keys(params["seed"], start, min(_RANDOM_STEP, total - start))
        return
    first = 0
    for numel, block in zip(params["numels"], blocks, strict=True):
        for start, chunk in block:
            yield first + start, _keys(params, first + start, chunk)
        first += numel


def narrow(params: dict[str, Any], whole: Sequence[torch.Tensor], blocks: Sequence[Any], at: int) -> list[torch.Tensor]:
    """One radix pass: (high bits of the threshold so far, how many elements with those bits are pruned, how many there are)."""
    import torch

    prefix, wanted = (int(whole[0][0]), int(whole[0][1])) if whole else (0, params["count"])
    counts = None
    for _, bits in _all_keys(params, blocks):
        width = 8 * (bits.element_size() if "seed" in params else dtypes.DTYPES[params["dtype"]].itemsize)
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
    """(threshold, index from which elements equal to it are pruned), so that exactly the wanted number goes."""
    import torch

    threshold, pruned, ties = (int(n) for n in whole[0])
    kept = ties - pruned
    for start, keys in _all_keys(params, blocks):
        equal = (keys == threshold).nonzero().view(-1)
        if kept < equal.numel():
            return [torch.tensor([threshold, start + int(equal[kept])])]
        kept -= equal.numel()
    return [torch.tensor([threshold, sum(params["numels"])])]


def zero_weakest(params: dict[str, Any], whole: Sequence[torch.Tensor], blocks: Sequence[torch.Tensor], at: int) -> list[torch.Tensor]:
    """A flat range without the elements whose keys are below the threshold."""
    import torch

    threshold, first = (int(n) for n in whole[0])
    start = params["start"] + at
    keys = _keys(params, start, blocks[0])
    gone = (keys < threshold) | ((keys == threshold) & (torch.arange(start, start + keys.numel()) >= first))
    return [_as_integers(blocks[0]).masked_fill(gone, 0).view(blocks[0].dtype)]


# slices


def _without_slices(name: str, tensor: LazyTensor, amount: float | None, n: float, dim: int) -> LazyTensor:
    if tensor.ndim < 2 or not -tensor.ndim <= dim < tensor.ndim:
        raise SelectionError(f"the shape {list(tensor.shape)} has no slices along dim={dim} to choose from", tensor=name)
    dim %= tensor.ndim
    params = {"size": tensor.shape[dim], "inner": math.prod(tensor.shape[dim + 1 :])}
    count = count_of(amount, params["size"], name)
    spec = TensorSpec(dtypes.DTYPES["bool"], (params["size"],))
    weak = _derived("weak_slices", {**params, "n": float(n), "count": count}, (tensor,), spec, "scan", peak=40 * params["size"])
    return _zeroed("zero_slices", params, tensor, weak) if count else tensor


def _slice_of(params: dict[str, Any], start: int, count: int) -> torch.Tensor:
    import torch

    return torch.arange(start, start + count).div_(params["inner"], rounding_mode="floor").remainder_(params["size"])


def weak_slices(params: dict[str, Any], whole: Sequence[torch.Tensor], blocks: Sequence[Any], at: int) -> list[torch.Tensor]:
    """Which slices have the smallest norms: one pass, sums in float64."""
    import torch

    n, size = params["n"], params["size"]
    scores = torch.full((size,), math.inf if n == -math.inf else 0.0, dtype=torch.float64)
    for start, chunk in blocks[0]:
        values, index = chunk.double().abs_(), _slice_of(params, start, chunk.numel())
        if math.isinf(n):
            scores.scatter_reduce_(0, index, values, "amax" if n > 0 else "amin")
        else:
            powers = values.ne(0).double() if n == 0 else values.pow_(n)
            scores.index_add_(0, index, powers)
    if not math.isinf(n) and n:
        scores = scores.pow(1 / n)
    order = scores.flip(0).argsort(stable=True)[: params["count"]]  # from behind, so that the lower of equal ones is kept
    weak = torch.zeros(size, dtype=torch.bool)
    weak[size - 1 - order] = True
    return [weak]


def zero_slices(params: dict[str, Any], whole: Sequence[torch.Tensor], blocks: Sequence[torch.Tensor], at: int) -> list[torch.Tensor]:
    """A flat range without the slices that `whole` marks."""
    gone = whole[0][_slice_of(params, at, blocks[0].numel())]
    return [_as_integers(blocks[0]).masked_fill(gone, 0).view(blocks[0].dtype)]


# N of every M


def _n_of_m(tensor: LazyTensor, kept: int, group: int) -> LazyTensor | None:
    """The tensor pruned in groups along dimension 1, which a group's rows walk whatever the length of a row; None where none fit."""
    if tensor.ndim < 2 or tensor.shape[1] % group or not tensor.numel:
        return None
    shape = (tensor.shape[0] * tensor.shape[1] // group, group, math.prod(tensor.shape[2:]))
    groups = _derived("reshaped", {}, (tensor,), replace(tensor.spec, shape=shape), "elements")
    made = _derived("reshaped", {}, (_derived("zero_all_but", {"kept": kept}, (groups,), groups.spec, "rows"),), tensor.spec, "elements")
    return LazyTensor(made.spec, made.source, tensor.requires_grad, tensor.locked)


def reshaped(params: dict[str, Any], whole: Sequence[torch.Tensor], blocks: Sequence[torch.Tensor], at: int) -> list[torch.Tensor]:
    """The same elements under another shape."""
    return [blocks[0]]


def zero_all_but(params: dict[str, Any], whole: Sequence[torch.Tensor], blocks: Sequence[torch.Tensor], at: int) -> list[torch.Tensor]:
    """Groups [r, m, …] with all but their `kept` largest zeroed."""
    gone = ~largest_of_groups(blocks[0], params["kept"])
    return [_as_integers(blocks[0]).view(gone.shape).masked_fill(gone, 0).view(blocks[0].dtype)]


def largest_of_groups(values: torch.Tensor, kept: int) -> torch.Tensor:
    """Which of the elements [r, m, …] are among the `kept` of largest magnitude of their m; of equal ones the lower index."""
    import torch

    order = magnitude_bits(values).view(values.shape).sort(dim=1, descending=True, stable=True).indices
    return torch.zeros(values.shape, dtype=torch.bool, device=values.device).scatter_(1, order[:, :kept], True)
