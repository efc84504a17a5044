"""Wrappers: a model as an exporter can call it, and the names that its tensors have in a graph."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

from workbench.errors import visible
from workbench.verification.values import Call, leaves

if TYPE_CHECKING:
    import torch

    from workbench.exporting.targets import Request


def flat(model: torch.nn.Module, example: Call) -> torch.nn.Module:
    import torch

    class Flat(torch.nn.Module):
        """Takes tensors in order, returns a flat tuple: what tracing can follow."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            order = iter(tensors)
            call = example.map(lambda _: next(order))
            return tuple(torch.as_tensor(leaf) for leaf in leaves(self.model(*call.args, **call.kwargs)))

    return Flat().eval()


def input_names(request: Request) -> list[str]:
    """Names as forward calls its arguments: `x`, `batch.mask`."""
    if request.input_names:
        return list(request.input_names)
    positional = list(inspect.signature(request.model.forward).parameters)
    names = []
    for path in request.example.tensors():
        head, dot, rest = path.partition(".")
        called = positional[int(head)] if head.isdigit() and int(head) < len(positional) else head
        names.append(called + dot + rest)
    return names if len(set(names)) == len(names) else [f"input_{i}" for i in range(len(names))]


def constants(request: Request) -> list[str]:
    """A sentence for what a call holds beside tensors: a graph that takes tensors alone has it in it."""
    positional = list(inspect.signature(request.model.forward).parameters)
    named = [(positional[min(i, len(positional) - 1)], value) for i, value in enumerate(request.example.args)]
    told = [
        f"{name} = {visible(repr(leaf))[:40]}"
        for name, value in (*named, *request.example.kwargs.items())
        for leaf in leaves(value)
        if type(leaf).__module__ == "builtins"
    ]
    return [f"No input but a constant of the file: {', '.join(told)}. Other values need an export of their own."] if told else []


def output_names(request: Request) -> list[str]:
    """Names as the model's own paths, clear of inputs and weights."""
    if request.output_names:
        return list(request.output_names)
    taken = {*input_names(request), *request.model.state_dict()}
    names = [f"output_{path}" if path[0].isdigit() else path for path in (p or "output" for p in request.outputs)]
    return [f"{name}_out" if name in taken else name for name in names]


def method_of(model: torch.nn.Module, name: str) -> torch.nn.Module:
    """A module whose forward is a method of the model, with its signature: what an exporter of forward alone can take."""
    import torch

    class Method(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return getattr(self.model, name)(*args, **kwargs)

    Method.forward.__signature__ = inspect.signature(getattr(type(model), name))  # type: ignore[attr-defined]
    Method.__name__ = f"{type(model).__name__}_{name}"  # an identifier: the tracer makes a type of it
    return Method().train(model.training)


def rescued(model: torch.nn.Module, example: Call, error: Exception) -> tuple[torch.nn.Module, Call, str]:
    """A model that runs and returns an object no graph can hold (a cache), and its example, as they can be exported; and what was done.

    Raises:
        Exception: `error`, where nothing is known to help.
    """
    if "use_cache" in inspect.signature(model.forward).parameters and example.kwargs.get("use_cache") is not False:
        return model, Call(example.args, {**example.kwargs, "use_cache": False}), "The model's cache was switched off (use_cache=False)."
    if "holds no numbers" not in str(error):
        raise error
    return _tensors_only(model), example, "Outputs that hold no tensors (a cache, a string) were left out."


def _tensors_only(model: torch.nn.Module) -> torch.nn.Module:
    import torch

    def kept(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value
        if isinstance(value, Mapping):
            held = {key: kept(item) for key, item in value.items()}
            return {key: item for key, item in held.items() if item is not None} or None
        if isinstance(value, (tuple, list)):
            return tuple(item for item in map(kept, value) if item is not None) or None
        if is_dataclass(value) and not isinstance(value, type):
            return kept({f.name: getattr(value, f.name) for f in fields(value)})
        return None

    class TensorsOnly(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return kept(self.model(*args, **kwargs))

    TensorsOnly.forward.__signature__ = inspect.signature(type(model).forward)  # type: ignore[attr-defined]
    TensorsOnly.__name__ = type(model).__name__
    return TensorsOnly().train(model.training)
