"""Values in and out of a model: batches as `Call`s, nested outputs as tensors by path.

Owns how nesting is walked. Refuses what holds no numbers (strings, caches, meta tensors) by naming the place. A new container
is one branch of `_children`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any

from workbench.errors import SelectionError

if TYPE_CHECKING:
    import torch

_MAX_DEPTH = 64


@dataclass(frozen=True, eq=False)
class Call:
    """One batch: what a model is called with."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Call:
        """The same structure with each tensor changed."""
        return Call(map_tensors(self.args, change), map_tensors(dict(self.kwargs), change))

    def fresh(self) -> Call:
        """Its own copy of every tensor and object, so that a model which writes into its input harms nobody.

        Raises:
            SelectionError: an object among the arguments cannot be copied.
        """
        return Call(*(map_tensors(part, lambda t: t.detach().clone(), _copied) for part in (self.args, dict(self.kwargs))))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Tensors by path, positional ones first: `0`, `0.mask`, `ids`."""
        import torch

        found = {**_named(_walk(self.args)), **_named(_walk(self.kwargs))}
        return {path: leaf for path, leaf in found.items() if isinstance(leaf, torch.Tensor)}


def written(before: Call, after: Call) -> dict[str, torch.Tensor]:
    """What a run left in the tensors it was given: {path: as it is now}, of those that are not as `before` holds them."""
    now = after.tensors()
    return {
        path: now[path]
        for path, old in before.tensors().items()
        if path in now
        and (old.shape != now[path].shape or not bool(((old == now[path]) | ((old != old) & (now[path] != now[path]))).all()))
    }


def calls_from(inputs: Any) -> tuple[Call, ...]:
    """Batches from what a person passes.

    Args:
        inputs: a tensor or array (one batch, one argument), a tuple (one batch, positional arguments), a mapping (one batch, keyword
            arguments), a Call, or a list of those (several batches).
    Raises:
        SelectionError: nothing to compute with: no batch, no tensor in one, or only empty tensors.
    """
    batches = inputs if isinstance(inputs, list) else [inputs]
    if not batches:
        raise SelectionError("there are no inputs: the list of batches is empty", hint="pass at least one batch")
    return tuple(_call(batch, number) for number, batch in enumerate(batches, 1))


def _call(batch: Any, number: int) -> Call:
    if isinstance(batch, Call):
        call = batch
    elif isinstance(batch, Mapping):
        call = Call((), dict(batch))
    elif isinstance(batch, tuple):
        call = Call(batch)
    elif _is_array(batch):
        call = Call((batch,))
    else:
        raise SelectionError(
            f"batch {number} is a {type(batch).__name__}, which no model takes",
            hint="pass a tensor, a tuple of arguments, a dict of keyword arguments, or a list of those",
        )
    call = Call(_arrays_to_tensors(call.args), _arrays_to_tensors(dict(call.kwargs)))
    if not any(t.numel() for t in call.tensors().values()):
        what = "its tensors are empty" if call.tensors() else "there is no tensor in it"
        raise SelectionError(f"batch {number} holds no values to compute from: {what}", hint="pass tensors with at least one element")
    return call


def _copied(leaf: Any) -> Any:
    try:
        return copy.deepcopy(leaf)
    except Exception as error:  # a lock, a generator, a cache of tensors inside a graph of gradients
        told = f"a {type(leaf).__name__} among the arguments cannot be copied, and every run would change it: {error}"
        raise SelectionError(told, hint="pass its tensors, or leave it out") from error


def outputs_by_path(value: Any, *, of: str) -> dict[str, torch.Tensor]:
    """Outputs as plain CPU tensors by path: `output` for a lone tensor, `0`, `logits`, `aux.0` in nests; None is no output.

    Args:
        value: what a model returned: tensors, arrays and numbers in tuples, lists, mappings and dataclasses.
        of: who returned it, for the message.
    Raises:
        SelectionError: no output at all, or something that holds no numbers.
    """
    found = {path: _plain(leaf, path, of) for path, leaf in _named(_walk(value)).items()}
    if not found:
        raise SelectionError(f"{of} returned no output to compare", hint="return tensors, or a tuple or dict of tensors")
    return found


def paired(
    expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor], *, ordered: bool, by_position: bool = False
) -> dict[str, tuple[torch.Tensor | None, torch.Tensor | None]]:
    """Outputs by path; `by_position` by their order, as where a graph has other names of its own (`ordered`) and as many outputs."""
    if (by_position or (ordered and set(expected) != set(found))) and len(expected) == len(found):
        return {name: (a, b) for (name, a), b in zip(expected.items(), found.values(), strict=True)}
    return {name: (expected.get(name), found.get(name)) for name in [*expected, *(n for n in found if n not in expected)]}


def kept(mask: Any, call: Call, outputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Which places of each output count.

    Args:
        mask: bool or 0-1 over an output's leading axes, 1 where it counts: a tensor, the name of the input that holds it, a function
            called with the model's own arguments, or {output: one of those}. One alone serves every output whose leading axes are its
            shape. None keeps all.
        call: the inputs that gave `outputs`.
    Returns:
        {output: bool of its shape} for those that the mask speaks of.
    Raises:
        SelectionError: no such input or output, other values than 0 and 1, or a shape that no output begins with.
    """
    if mask is None:
        return {}
    if not isinstance(mask, Mapping):
        keep = _mask(mask, call)
        fitting = {name: value for name, value in outputs.items() if value.shape[: keep.ndim] == keep.shape}
        if not fitting:
            shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in outputs.items())
            raise SelectionError(f"the mask is {list(keep.shape)}, and no output begins with that shape: {shapes}", hint=_MASK_HINT)
        return {name: _spread(keep, value) for name, value in fitting.items()}
    found = {}
    for name, one in mask.items():
        if name not in outputs:
            raise SelectionError(f"there is no output {name!r} to mask", hint=f"the outputs are {', '.join(outputs)}")
        keep = _mask(one, call)
        if outputs[name].shape[: keep.ndim] != keep.shape:
            raise SelectionError(
                f"the mask of {name!r} is {list(keep.shape)}, and that output is {list(outputs[name].shape)}", hint=_MASK_HINT
            )
        found[name] = _spread(keep, outputs[name])
    return found


_MASK_HINT = "its axes are the output's first ones; with batches of several sizes, name the input that holds it"


def _mask(mask: Any, call: Call) -> torch.Tensor:
    import torch

    if isinstance(mask, str):
        inputs = call.tensors()
        if mask not in inputs:
            raise SelectionError(f"there is no input {mask!r} to mask with", hint=f"the inputs are {', '.join(inputs)}")
        mask = inputs[mask]
    elif callable(mask):
        try:
            mask = mask(*call.args, **call.kwargs)
        except Exception as error:  # a stranger's function
            raise SelectionError(f"the mask function fails ({type(error).__name__}: {error})", hint=_MASK_HINT) from error
    keep = torch.as_tensor(mask).detach().cpu()
    if not keep.ndim or not bool(((keep == 0) | (keep == 1)).all()):
        raise SelectionError("a mask holds True or 1 where an output counts, False or 0 where it is padding", hint=_MASK_HINT)
    return keep == 1


def _spread(keep: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    return keep.reshape(*keep.shape, *[1] * (output.ndim - keep.ndim)).expand(output.shape)


def leaves(value: Any) -> Iterator[Any]:
    """What stands at the ends of a nest, in order, as it is; None is nothing."""
    return (leaf for _, leaf in _walk(value))


def map_tensors(value: Any, change: Callable[[torch.Tensor], torch.Tensor], other: Callable[[Any], Any] = lambda leaf: leaf) -> Any:
    """`value` rebuilt with every tensor in its tuples, lists and mappings changed, and every other leaf as `other` gives it."""
    import torch

    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: map_tensors(item, change, other) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(item, change, other) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(item, change, other) for item in value)
    return other(value)


def _is_array(value: Any) -> bool:
    import numpy as np
    import torch

    return isinstance(value, (torch.Tensor, np.ndarray))


def _arrays_to_tensors(value: Any) -> Any:
    import numpy as np

    if isinstance(value, np.ndarray):
        return _from_numpy(value, "the inputs", "")
    if isinstance(value, Mapping):
        return {key: _arrays_to_tensors(item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_arrays_to_tensors(item) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_arrays_to_tensors(item) for item in value)
    return value


def _from_numpy(array: Any, of: str, path: str) -> torch.Tensor:
    import numpy as np
    import torch

    try:
        return torch.from_numpy(np.array(array))  # a copy: read-only arrays and views are common
    except TypeError as error:
        raise SelectionError(f"{of}: {path or 'an array'} has element type {array.dtype}, which torch cannot hold") from error


def _children(value: Any) -> list[tuple[str, Any]] | None:
    if isinstance(value, Mapping):
        return [(str(key), item) for key, item in value.items()]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return list(zip(value._fields, value, strict=True))
    if isinstance(value, (tuple, list)):
        return [(str(i), item) for i, item in enumerate(value)]
    if is_dataclass(value) and not isinstance(value, type):
        return [(f.name, getattr(value, f.name)) for f in fields(value)]
    return None


def _walk(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if value is None:
        return
    if len(path) > _MAX_DEPTH:
        raise SelectionError(f"values are nested more than {_MAX_DEPTH} deep", hint="return tensors in one or two levels")
    children = _children(value)
    if children is None:
        yield path, value
        return
    for label, item in children:
        yield from _walk(item, (*path, label))


def _named(found: Iterator[tuple[tuple[str, ...], Any]]) -> dict[str, Any]:
    """Leaves under flat names; where two paths flatten alike, later ones get `#2`, `#3`: nothing vanishes."""
    named: dict[str, Any] = {}
    for path, leaf in found:
        base = name = ".".join(path) or "output"
        count = 1
        while name in named:
            count += 1
            name = f"{base}#{count}"
        named[name] = leaf
    return named


def _plain(leaf: Any, path: str, of: str) -> torch.Tensor:
    import numpy as np
    import torch

    if isinstance(leaf, (np.ndarray, np.generic)):
        return _from_numpy(leaf, of, path)
    if isinstance(leaf, (bool, int, float, complex)):
        return torch.tensor(leaf)
    if not isinstance(leaf, torch.Tensor):
        raise SelectionError(
            f"{of} returned a {type(leaf).__name__} at {path!r}, which holds no numbers to compare",
            hint="wrap the model so that it returns tensors only",
        )
    if leaf.is_nested:
        raise SelectionError(
            f"{of} returned a nested tensor at {path!r}", hint="return `to_padded_tensor(0)` of it, or its values and offsets"
        )
    if leaf.is_meta:
        raise SelectionError(f"{of} returned a meta tensor at {path!r}: it has a shape and no values")
    tensor = leaf.detach()
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    return tensor.cpu().resolve_conj().resolve_neg()
