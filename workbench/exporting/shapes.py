"""Shapes: which axes are asked to be of any size, in each spelling that torch takes, brought to one.

Every target sees the structure of the call by argument name, with {axis: what was asked} for each tensor; what cannot be meant is refused
here, before any work.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workbench.errors import SelectionError
from workbench.exporting.wrappers import input_names

if TYPE_CHECKING:
    import torch

    from workbench.exporting.targets import Request
    from workbench.verification.values import Call


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the example, by its number in the call's order."""

    number: int
    shape: tuple[int, ...]


def _arguments(model: torch.nn.Module, example: Call) -> dict[str, Any]:
    """The call by forward's argument names, each tensor as its number and shape."""
    count = itertools.count()
    call = example.map(lambda tensor: _Tensor(next(count), tuple(tensor.shape)))  # type: ignore[arg-type, return-value]
    return inspect.signature(model.forward).bind(*call.args, **call.kwargs).arguments


def shapes_by_argument(request: Request) -> dict[str, Any] | None:
    """`dynamic_shapes` by argument name, with {axis: size} for each tensor; None where none is asked.

    Taken are a dict by argument name, a sequence in their order, or torch's ShapesCollection; for each tensor {axis: size}, a sequence
    with one size for each axis, or None. A size is a `Dim`, `Dim.AUTO`, `Dim.DYNAMIC`, `Dim.STATIC`, a name, the number it has, or None.

    Raises:
        SelectionError: it does not fit the example.
    """
    import torch

    model, example, asked = request.model, request.example, request.dynamic_shapes
    if asked is None:
        return None
    if isinstance(asked, torch.export.ShapesCollection):
        asked = asked.dynamic_shapes(model, example.args, dict(example.kwargs))  # type: ignore[no-untyped-call]
    arguments = _arguments(model, example)
    named = dict(zip(arguments, asked, strict=False)) if isinstance(asked, (tuple, list)) and len(asked) == len(arguments) else asked
    if not isinstance(named, Mapping):
        told = f"dynamic_shapes is a dict by argument name, or a tuple with an entry for each of {', '.join(arguments)}"
        raise SelectionError(f"{told}; it is a {_kind(asked)}", hint='such as {"x": {0: "batch"}}, with None for what stays as it is')
    unknown = [name for name, held in named.items() if name not in arguments and held is not None]
    if unknown:
        raise SelectionError(f"dynamic_shapes speaks of {unknown[0]!r}; the call has {', '.join(arguments)}")
    return {name: _fitted(value, named.get(name), f"dynamic_shapes of {name!r}") for name, value in arguments.items()}


def _fitted(value: Any, asked: Any, of: str) -> Any:
    if isinstance(value, _Tensor):
        return _axes(value.shape, asked, of)
    if asked is None:
        return None
    if isinstance(value, Mapping):
        if not isinstance(asked, Mapping) or set(asked) - set(value):
            raise SelectionError(f"{of} is a dict with keys among {', '.join(map(str, value))}, as the argument is; it is {asked!r}")
        return {key: _fitted(item, asked.get(key), f"{of}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        if not isinstance(asked, (tuple, list)) or len(asked) != len(value):
            raise SelectionError(f"{of} has one entry for each of the argument's {len(value)} items; it is {asked!r}")
        found = [_fitted(item, one, f"{of}[{i}]") for i, (item, one) in enumerate(zip(value, asked, strict=True))]
        return found if isinstance(value, list) else tuple(found)
    return asked


def _axes(shape: tuple[int, ...], asked: Any, of: str) -> dict[int, Any]:
    import torch

    if isinstance(asked, (tuple, list)) and len(asked) == len(shape):
        asked = dict(enumerate(asked))
    if asked is not None and not isinstance(asked, Mapping):
        raise SelectionError(f"{of} is {{axis: size}}, a size for each of {len(shape)} axes, or None; it is {asked!r}")
    found = {}
    for axis, size in (asked or {}).items():
        if not isinstance(axis, int) or not -len(shape) <= axis < len(shape):
            raise SelectionError(f"{of} speaks of axis {axis!r}; that tensor is {list(shape)}, its axes 0 to {len(shape) - 1}")
        known = (int, str, torch.export.Dim, type(torch.export.Dim.AUTO))
        if size is not None and not isinstance(size, known):
            raise SelectionError(f"{of}, axis {axis}, is a Dim, Dim.AUTO, DYNAMIC or STATIC, a name, a number or None; it is {size!r}")
        if isinstance(size, int) and size != shape[axis]:
            raise SelectionError(f"{of} fixes axis {axis} at {size}, and the example is {list(shape)}")
        found[axis % len(shape)] = size
    return {axis: size for axis, size in found.items() if size is not None}


def axes_by_name(request: Request) -> dict[str, Any] | None:
    """`dynamic_axes` with axes counted from the front, for the inputs that there are.

    Raises:
        SelectionError: it is not {name: {axis: name} or [axis]}.
    """
    asked: Any = request.dynamic_axes
    if asked is None:
        return None
    hint = 'such as {"x": {0: "batch"}}, or {"x": [0]}'
    if not isinstance(asked, Mapping) or not all(isinstance(name, str) for name in asked):
        raise SelectionError(f"dynamic_axes is a dict by input name; it is {asked!r}", hint=hint)
    ranks = {name: tensor.ndim for name, tensor in zip(input_names(request), request.example.tensors().values(), strict=False)}
    found: dict[str, Any] = {}
    for name, axes in asked.items():
        labels = list(axes.values()) if isinstance(axes, Mapping) else []
        if not isinstance(axes, (Mapping, list, tuple)) or not all(isinstance(a, int) for a in axes) or not all(map(_named, labels)):
            raise SelectionError(f"dynamic_axes of {name!r} is {{axis: name}} or [axis]; it is {axes!r}", hint=hint)
        rank = ranks.get(name, 0)
        front = [axis + rank if -rank <= axis < 0 else axis for axis in axes]
        found[name] = dict(zip(front, labels, strict=True)) if labels else front
    return found


def _named(label: object) -> bool:
    return isinstance(label, str) and bool(label)


def _kind(asked: Any) -> str:
    return f"{type(asked).__name__} of {len(asked)}" if isinstance(asked, (tuple, list)) else type(asked).__name__


def asked_sizes(request: Request) -> dict[tuple[int, int], Any]:
    """{(which tensor in order, axis): what was asked of it}, by `dynamic_axes` (the label, or None in a list) or `dynamic_shapes`."""
    if request.dynamic_shapes is not None:
        arguments = _arguments(request.model, request.example)
        return dict(_places(list(arguments.values()), list(request.dynamic_shapes.values())))
    names, tensors = input_names(request), list(request.example.tensors().values())
    asked = {names.index(name): axes for name, axes in (request.dynamic_axes or {}).items() if name in names}
    return {
        (number, axis): axes[axis] if isinstance(axes, Mapping) else None
        for number, axes in asked.items()
        for axis in axes
        if 0 <= axis < tensors[number].ndim
    }


def _places(value: Any, asked: Any) -> Iterator[tuple[tuple[int, int], Any]]:
    if isinstance(value, _Tensor):
        yield from (((value.number, axis), size) for axis, size in asked.items())
    elif isinstance(value, Mapping) and asked:
        yield from (place for key in value for place in _places(value[key], asked[key]))
    elif isinstance(value, (tuple, list)) and asked:
        yield from (place for pair in zip(value, asked, strict=True) for place in _places(*pair))


def asked_labels(request: Request) -> dict[tuple[int, int], str]:
    """{(which tensor in order, axis): its name} of the axes that must be of any size; a nameless one is called `x_0`."""
    import torch

    names, found = input_names(request), {}
    for (number, axis), size in asked_sizes(request).items():
        if not isinstance(size, int) and not (_hint(size) and size.type != torch.export.Dim.DYNAMIC.type):
            found[number, axis] = size if isinstance(size, str) else str(getattr(size, "__name__", f"{names[number]}_{axis}"))
    return found


def left_open(request: Request) -> list[tuple[int, int]]:
    """The axes that are left to the exporter, free or fixed, by `Dim.AUTO`."""
    import torch

    return [place for place, size in asked_sizes(request).items() if _hint(size) and size.type == torch.export.Dim.AUTO.type]


def _hint(size: Any) -> bool:
    import torch

    return isinstance(size, type(torch.export.Dim.AUTO))


def for_torch_export(request: Request, *, named: bool) -> dict[str, Any] | None:
    """What was asked, by argument name, as torch.export takes it; `named`: with names in it, which torch.onnx takes; None for nothing."""
    import torch

    asked = asked_sizes(request)
    if not asked and request.dynamic_shapes is None:
        return None

    def spec(value: Any, given: Any) -> Any:
        if isinstance(value, _Tensor):
            sizes = {axis: size for (number, axis), size in asked.items() if number == value.number}
            return {a: torch.export.Dim.DYNAMIC if s is None or (isinstance(s, str) and not named) else s for a, s in sizes.items()}
        if isinstance(value, Mapping):
            return {key: spec(item, (given or {}).get(key)) for key, item in value.items()}
        if isinstance(value, (tuple, list)):
            found = [spec(*pair) for pair in zip(value, given or itertools.repeat(None), strict=False)]
            return found if isinstance(value, list) else tuple(found)
        return given

    arguments = _arguments(request.model, request.example)
    return {name: spec(value, (request.dynamic_shapes or {}).get(name)) for name, value in arguments.items()}


def input_shapes(request: Request, labels: Mapping[tuple[int, int], str]) -> dict[str, tuple[int | str, ...]]:
    """The example's shapes by input name, labelled axes by their label."""
    pairs = zip(input_names(request), request.example.tensors().values(), strict=True)
    return {name: tuple(labels.get((number, axis), size) for axis, size in enumerate(t.shape)) for number, (name, t) in enumerate(pairs)}
