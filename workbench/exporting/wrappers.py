"""Wrappers: a model as an exporter can call it, and the names that its tensors have in a graph."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

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


def output_names(request: Request) -> list[str]:
    """Names as the model's own paths, clear of inputs and weights."""
    if request.output_names:
        return list(request.output_names)
    taken = {*input_names(request), *request.model.state_dict()}
    names = [f"output_{path}" if path[0].isdigit() else path for path in (p or "output" for p in request.outputs)]
    return [f"{name}_out" if name in taken else name for name in names]
