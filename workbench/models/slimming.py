"""Slimming: a model with fewer channels and heads, for good, by torch-pruning; and a recipe that makes the original class as thin.

    slim = wb.models.slim(model, x, 0.5)                 # slim.model computes less and is a smaller file
    wb.models.save_slim(slim.model, "thin.safetensors")
    model = wb.models.load_slim(MyNet, "thin.safetensors")    # in another process, which needs neither the pruner nor the recipe's maker

The recipe is JSON in the file's metadata: for each parameter and dimension the indices that stayed, and the modules' attributes that
follow (out_channels, num_heads…). Nothing in it is executed; what does not fit the class is refused.
"""

from __future__ import annotations

import copy
import json
import math
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from workbench.checkpoint import Checkpoint
from workbench.errors import MissingDependencyError, SelectionError, SpecMismatchError, UnsupportedError, WorkbenchError
from workbench.formats import save
from workbench.formats.writing import SaveReport
from workbench.names import Patterns, require_names
from workbench.opening import open as open_checkpoint
from workbench.report import Report
from workbench.tables import Column, Table, format_bytes, table

_KEY = "workbench.slim"  # in the metadata of a file, and as an attribute of a thin model
_QKV = re.compile(r"(?:to_)?(?:q|k|v|query|key|value)(?:_proj|_lin)?")
_HEADS = ("num_attention_heads", "num_heads", "n_heads")
_HEAD_SIZES = ("head_dim", "attention_head_size")
_WIDTHS = ("all_head_size", "embed_dim", "inner_dim")  # of attention: heads times the size of one
Recipe = list[dict[str, Any]]  # one step for each slimming


@dataclass(frozen=True, repr=False)
class SlimReport(Report):
    """The thin model, and its tensors' shapes before and after. False where nothing could go."""

    rows: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    parameters: tuple[int, int]
    nbytes: tuple[int, int]
    attributes: tuple[tuple[str, Any, Any], ...]
    model: nn.Module = field(repr=False)

    @property
    def ok(self) -> bool:
        return self.parameters[1] < self.parameters[0]

    @property
    def headline(self) -> str:
        (before, after), (large, small) = self.parameters, self.nbytes
        text = f"{before:,} parameters became {after:,} ({format_bytes(large)} to {format_bytes(small)}, {100 * (1 - small / max(large, 1)):.3g} % less)"
        return (
            text + "; its accuracy is to be measured, and mostly to be trained back"
            if self.ok
            else f"nothing could go: {before:,} parameters"
        )

    def tables(self) -> tuple[Table, ...]:
        shapes = (Column("tensor", "name"), Column("before", "shape"), Column("after", "shape"))
        attributes = (Column("attribute", "name"), Column("before"), Column("after"))
        return table("shapes", shapes, self.rows), table("attributes", attributes, self.attributes, empty="none changed")


def slim(model: nn.Module, example: Any, amount: float, *, ignore: Patterns | None = None, norm: int = 2) -> SlimReport:
    """A copy of the model without the weakest channels, and without whole heads of attention; the model's outputs keep their shapes.

    Args:
        example: input that the model runs on: a tensor, a tuple of arguments, or a dict by their names.
        amount: fraction of each layer's channels to take, in [0, 1); of groups of layers that add up, all the same ones.
        ignore: globs over modules to leave whole.
        norm: order of the norm by which channels are weighed, summed over the group.
    Returns:
        SlimReport; its `model` is in eval mode and carries its recipe through training and copying, for `save_slim`.
    Raises:
        UnsupportedError: the pruner cannot follow the model, or the original class made thin does not compute the same bits.
        MissingDependencyError: torch-pruning is not installed.
    Cost: three copies of the model, one of them in float64, and some runs on the example.
    Source: Fang et al. 2023, arXiv:2301.12900.
    """
    if not isinstance(amount, float) or not 0 <= amount < 1:
        raise SelectionError(f"amount={amount!r}: it is a fraction in [0, 1)")
    every = dict(model.named_modules())
    ignored = require_names(ignore, every, what="module") if ignore is not None else []
    if lazy := [name for name, p in model.named_parameters() if nn.parameter.is_lazy(p)]:
        raise UnsupportedError("the model has a lazy parameter without a shape", tensor=lazy[0], hint="run the model once first")
    original = copy.deepcopy(model).eval()
    engine = _engine()
    try:
        with warnings.catch_warnings(action="ignore"), torch.enable_grad():
            pruned, history = _pruned(engine, _twin(original), example, amount, ignored, norm)
            places = _replayed(engine, _twin(original), example, history)
        step: dict[str, Any] = {"kept": _kept(original, places), "attributes": _changed(original, pruned)}
        thin = copy.deepcopy(original)
        _apply(thin, [step])
        _require_equal(original, pruned, thin, example)
    except WorkbenchError:
        raise
    except Exception as error:  # the pruner tells what it cannot follow in many ways
        text = f"torch-pruning cannot follow this model: {type(error).__name__}: {error}"
        raise UnsupportedError(text, hint="ignore= the part that it fails in, or prune with wb.models.prune") from error
    setattr(thin, _KEY, [*getattr(model, _KEY, []), step])
    before, after = _tensors(original), _tensors(thin)
    rows = tuple((name, tuple(before[name].shape), tuple(t.shape)) for name, t in after.items() if t.shape != before[name].shape)
    counts = tuple(sum(p.numel() for p in m.parameters()) for m in (original, thin))
    sizes = tuple(sum(t.nbytes for t in [*m.parameters(), *m.buffers()]) for m in (original, thin))
    told = [(f"{m}.{a}".lstrip("."), getattr(every[m], a), v) for m, own in step["attributes"].items() for a, v in own.items()]
    return SlimReport(rows, (counts[0], counts[1]), (sizes[0], sizes[1]), tuple(told), thin)


def save_slim(model: nn.Module, path: str | os.PathLike[str]) -> SaveReport:
    """Save the weights of a model that `slim` made, trained further or not, with its recipe, as one safetensors file.

    Raises:
        SelectionError: the model carries no recipe.
    """
    recipe = getattr(model, _KEY, None)
    if recipe is None:
        raise SelectionError("this model carries no recipe", hint="give what wb.models.slim made, its .model")
    ckpt = open_checkpoint(dict(model.state_dict()))
    return save(
        replace(ckpt, metadata={**ckpt.metadata, _KEY: json.dumps(_packed(recipe), separators=(",", ":"))}), path, format="safetensors"
    )


def load_slim(factory: Callable[[], nn.Module], path: str | os.PathLike[str]) -> nn.Module:
    """The thin model of a file: `factory()` makes the original, the recipe makes it thin, and every weight is loaded.

    Returns:
        The model in eval mode, computing what was saved bit for bit.
    Raises:
        SelectionError: the file holds no recipe that can be read. SpecMismatchError: recipe or weights do not fit what the factory makes.
    """
    ckpt = open_checkpoint(path)
    recipe = _recipe_of(ckpt)
    model = factory()
    _apply(model, recipe)
    expected = model.state_dict()
    if wrong := sorted(expected.keys() ^ ckpt.keys()) or [n for n, t in expected.items() if tuple(t.shape) != ckpt[n].shape]:
        text = f"{len(wrong)} of the tensors are not those of the class made thin, first {wrong[0]!r}"
        raise SpecMismatchError(text, hint="the factory must build the class with the arguments of the model that was slimmed")
    if wrong := [n for n, t in expected.items() if str(t.dtype).removeprefix("torch.") != ckpt[n].dtype.name]:
        raise SpecMismatchError(f"the file holds {wrong[0]!r} as {ckpt[wrong[0]].dtype}, and the model as {expected[wrong[0]].dtype}")
    model.load_state_dict({name: tensor.load() for name, tensor in ckpt.items()})
    setattr(model, _KEY, recipe)
    return model.eval()


# the pruner


def _engine() -> Any:
    try:
        import torch_pruning
    except ImportError as error:
        raise MissingDependencyError("slimming needs torch-pruning", hint="pip install 'checkpoint-workbench[compress]'") from error
    return torch_pruning


def _twin(model: nn.Module) -> nn.Module:
    """A copy that the pruner can follow: it walks the graph of gradients, which frozen parameters are not in."""
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return twin


def _pruned(tp: Any, model: nn.Module, example: Any, amount: float, ignored: list[str], norm: int) -> tuple[nn.Module, Any]:
    """The model after torch-pruning, and what it did: (module, out channels or in, indices that went)."""
    attention, whole = _attention(model)
    pruner = tp.pruner.BasePruner(
        model, example, importance=tp.importance.GroupMagnitudeImportance(p=norm), pruning_ratio=amount, head_pruning_ratio=amount,
        num_heads={layer: count for _, _, layers, count in attention for layer in layers}, prune_num_heads=True, prune_head_dims=False,
        in_channel_groups={}, out_channel_groups={},  # fresh ones: its own defaults are shared by all pruners of a process
        ignored_layers=[*whole, *map(model.get_submodule, ignored)],
        output_transform=lambda out: [leaf * 1 for leaf in _leaves(out) if leaf.is_floating_point()],  # a last node of its own for each
    )  # fmt: skip
    sizes = [layers[0].out_features // count for _, _, layers, count in attention]
    for group in pruner.step(interactive=True):
        if all(link.target.outputs or not pruner.DG.is_out_channel_pruning_fn(link.handler) for link, _ in group):  # not an output
            group.prune()
    for (module, attribute, layers, count), size in zip(attention, sizes, strict=True):
        for name in [attribute] * bool(attribute) + [n for n in _WIDTHS if vars(module).get(n) == count * size]:
            setattr(module, name, layers[0].out_features // (size if name == attribute else 1))
    return model, pruner.pruning_history()


def _attention(model: nn.Module) -> tuple[list[tuple[nn.Module, str, list[nn.Linear], int]], list[nn.Module]]:
    """(module, attribute that holds the number of heads, query, key and value, that number); and what must stay whole, whose heads are unclear."""
    found: list[tuple[nn.Module, str, list[nn.Linear], int]] = []
    whole: list[nn.Module] = []
    layers = {m: [c for n, c in m.named_children() if isinstance(c, nn.Linear) and _QKV.fullmatch(n)] for m in model.modules()}
    for module, qkv in layers.items():
        attribute = next((name for name in _HEADS if isinstance(vars(module).get(name), int)), "")
        size = next((vars(module)[name] for name in _HEAD_SIZES if isinstance(vars(module).get(name), int)), 0)
        count = vars(module)[attribute] if attribute else qkv[0].out_features // size if qkv and size else 0
        if len(qkv) == 3 and count and len({layer.out_features for layer in qkv}) == 1 and qkv[0].out_features % count == 0:
            found.append((module, attribute, qkv, count))
        elif qkv or (attribute and not any(layers[inner] for inner in module.modules())):
            whole += qkv or list(module.modules())
    return found, whole


def _replayed(tp: Any, model: nn.Module, example: Any, history: Any) -> dict[str, torch.Tensor]:
    """For every tensor of the pruned model, where each of its elements stood in the original: its flat index there."""
    graph = tp.DependencyGraph().build_dependency(model, example)
    with torch.no_grad():
        for tensor in _tensors(model).values():
            tensor.data = torch.arange(tensor.numel(), dtype=torch.float64, device=tensor.device).view(tensor.shape)
        graph.load_pruning_history(history)
    return {name: tensor.detach() for name, tensor in _tensors(model).items()}


def _kept(original: nn.Module, places: dict[str, torch.Tensor]) -> dict[str, dict[int, list[int]]]:
    """For each tensor and dimension that lost something the indices that stayed. Tied tensors stand there once, under their first name."""
    first = {id(t): name for name, t in reversed(_tensors(original).items())}
    kept: dict[str, dict[int, list[int]]] = {}
    for name, place in places.items():
        old = _tensors(original)[name]
        own: dict[int, list[int]] = {}
        grid = torch.zeros((), dtype=torch.float64, device=place.device)
        for dim in range(old.ndim if place.ndim == old.ndim and place.numel() else 0):
            stride = math.prod(old.shape[dim + 1 :])
            line = place.movedim(dim, 0).reshape(place.shape[dim], -1)[:, 0]
            index = line.div(stride, rounding_mode="floor").remainder(old.shape[dim])
            grid = grid + (index * stride).view(-1, *[1] * (old.ndim - dim - 1))
            if len(index) != old.shape[dim]:
                own[dim] = [int(i) for i in index]
        if not torch.equal(grid.expand(place.shape), place):
            raise UnsupportedError("what stayed is not made of whole slices of the original", tensor=name)
        if kept.setdefault(first[id(old)], own) != own:
            raise UnsupportedError(f"it is tied to {first[id(old)]!r} and lost other slices", tensor=name, hint="ignore= one of the two")
    return {name: own for name, own in kept.items() if own}


def _changed(original: nn.Module, pruned: nn.Module) -> dict[str, dict[str, Any]]:
    """Module -> attribute -> its new value, of the numbers and tuples of numbers that the pruner changed."""
    after = dict(pruned.named_modules())
    out = {}
    for path, module in original.named_modules():
        new = vars(after[path])
        if own := {
            k: new[k] for k, v in vars(module).items() if _is_size(v) and not k.startswith("_") and _is_size(new.get(k)) and new[k] != v
        }:
            out[path] = own
    return out


def _is_size(value: Any) -> bool:
    return type(value) is int or (isinstance(value, (tuple, list)) and bool(value) and all(type(n) is int for n in value))


def _require_equal(original: nn.Module, pruned: nn.Module, thin: nn.Module, example: Any) -> None:
    """Refuse where the recipe does not make what the pruner made, or the outputs took another shape."""
    was, wanted, got = (_outputs(model, example) for model in (original, pruned, thin))
    if changed := [(a.shape, b.shape) for a, b in zip(was, wanted, strict=True) if a.shape != b.shape]:
        raise UnsupportedError(
            f"an output would change its shape from {list(changed[0][0])} to {list(changed[0][1])}", hint="ignore= what makes it"
        )
    states = pruned.state_dict(), thin.state_dict()
    same = states[0].keys() == states[1].keys() and all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    if not same or not all(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True) for a, b in zip(wanted, got, strict=True)):
        raise UnsupportedError("the original class made thin by the recipe does not compute the bits that the pruned model does")


def _outputs(model: nn.Module, example: Any) -> list[torch.Tensor]:
    with torch.no_grad():
        out = model(**example) if isinstance(example, dict) else model(*example) if isinstance(example, (tuple, list)) else model(example)
    return _leaves(out)


def _leaves(out: Any) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(out) if isinstance(leaf, torch.Tensor)]


# the recipe


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers under every name they have; scalars have no channels."""
    own = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tensor for name, tensor in own if tensor.ndim}


def _apply(model: nn.Module, recipe: Recipe) -> None:
    """Make the model thin, in place; tied tensors stay tied, for each is one object that changes."""
    for step in recipe:
        tensors, modules = _tensors(model), dict(model.named_modules())
        for name, dims in step["kept"].items():
            if name not in tensors:
                raise SpecMismatchError(f"the recipe speaks of {name!r}, which the class does not have")
            tensor = tensors[name]
            for dim, index in dims.items():
                size = tensor.shape[dim] if 0 <= dim < tensor.ndim else 0
                if not _is_size(index) or len(set(index)) != len(index) or not 0 <= min(index) <= max(index) < size:
                    raise SpecMismatchError(f"the recipe keeps what dimension {dim} of {list(tensor.shape)} does not have", tensor=name)
                tensor.data = tensor.data.index_select(dim, torch.tensor(index, device=tensor.device))
            tensor.grad = None
        for path, own in step["attributes"].items():
            for key, value in own.items():
                held = vars(modules[path]).get(key) if path in modules else None
                if key.startswith("_") or not (_is_size(held) and _is_size(value)) or isinstance(held, int) != isinstance(value, int):
                    raise SpecMismatchError(f"the recipe sets {path}.{key}, which is no size in the class")
                setattr(modules[path], key, tuple(value) if isinstance(held, tuple) else value)


def _packed(recipe: Recipe) -> dict[str, Any]:
    """As JSON: each list of indices once, for the tensors of a group share theirs."""
    lists: dict[tuple[int, ...], int] = {}
    steps = [
        {
            "kept": {
                n: {dim: lists.setdefault(tuple(index), len(lists)) for dim, index in dims.items()} for n, dims in step["kept"].items()
            },
            "attributes": step["attributes"],
        }
        for step in recipe
    ]
    return {"format": 1, "indices": list(lists), "steps": steps}


def _recipe_of(ckpt: Checkpoint) -> Recipe:
    if _KEY not in ckpt.metadata:
        raise SelectionError(f"{ckpt.name} holds no recipe", hint="wb.models.save_slim writes one; wb.load_into loads other files")
    try:
        told = json.loads(ckpt.metadata[_KEY])
        if told["format"] != 1:
            raise ValueError(f"its format is {told['format']!r}, and 1 is known")
        lists = told["indices"]
        return [
            {
                "kept": {name: {int(dim): lists[i] for dim, i in dims.items()} for name, dims in step["kept"].items()},
                "attributes": {path: dict(own.items()) for path, own in step["attributes"].items()},
            }
            for step in told["steps"]
        ]
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise SelectionError(f"the recipe in {ckpt.name} cannot be read: {error}") from error
