"""What is to be filled: names, shapes, and what a module tells besides (layer kinds, heads, ties)."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from workbench.checkpoint import Checkpoint
from workbench.errors import SelectionError
from workbench.opening import open as open_checkpoint
from workbench.tensors import LazyTensor, TensorSpec


@dataclass(frozen=True)
class Target:
    """`dtypes` where they are known, `kinds` the class of a module and of what holds a tensor, by its name, `ties` name -> earlier name of one storage."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    ties: dict[str, str] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)  # heads and the like, by the words of configurations

    def heads(self, word: str = "q") -> int:
        """How many heads the queries have, or the keys and values ("k"); 0 where that is not known."""
        names = ("num_attention_heads", "n_head", "n_heads", "num_heads", "nhead")
        few = ("num_key_value_heads", "n_kv_heads", "n_query_groups", "num_kv_heads") if word == "k" else ()
        return next((self.numbers[key] for key in (*few, *names) if key in self.numbers), 0)


def read_target(target: Any) -> Target:
    """Anything that can be a target.

    Raises:
        SelectionError: a value of a mapping is no shape.
    """
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(target, torch.nn.Module):
        return _of_module(target)
    plain = (TensorSpec, tuple, list)
    if isinstance(target, Mapping) and not isinstance(target, Checkpoint) and all(isinstance(v, plain) for v in target.values()):
        told = {name: _told(name, value) for name, value in target.items()}
        return Target({name: shape for name, (_, shape) in told.items()}, {name: dtype for name, (dtype, _) in told.items() if dtype})
    tensors = dict(open_checkpoint(target).weights.items())
    return Target({n: t.shape for n, t in tensors.items()}, {n: t.dtype.name for n, t in tensors.items()}, ties=_ties(tensors))


def _told(name: str, value: Any) -> tuple[str, tuple[int, ...]]:
    if isinstance(value, TensorSpec):
        return value.dtype.name, value.shape
    dtype, shape = value if len(value) == 2 and isinstance(value[1], (tuple, list)) else ("", value)
    if not all(isinstance(n, int) for n in shape):
        raise SelectionError(f"the target's {name!r} is no shape", hint="map names to shapes, (dtype, shape), TensorSpec or tensors")
    return str(dtype).removeprefix("torch."), tuple(shape)


def _ties(tensors: dict[str, LazyTensor]) -> dict[str, str]:
    first: dict[Any, str] = {}
    return {name: kept for name, t in tensors.items() if t.numel and (kept := first.setdefault((t.source, t.spec), name)) != name}


def _of_module(model: Any) -> Target:
    import torch

    from workbench import dtypes

    state = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    first: dict[int, str] = {}
    ties = {name: kept for name in state if name in own and (kept := first.setdefault(id(own[name]), name)) != name}
    kinds = {}
    for path, module in model.named_modules():
        kinds[path] = type(module).__name__
        for name, _ in (*module._parameters.items(), *module._buffers.items()):  # of a scripted module too
            kinds[f"{path}.{name}" if path else name] = type(module).__name__
    config = getattr(model, "config", None) or getattr(model, "cfg", None)
    told: dict[str, Any] = config.to_dict() if config is not None and hasattr(config, "to_dict") else getattr(config, "__dict__", {})
    numbers = {key: value for key, value in told.items() if type(value) is int}
    for module in model.modules():
        for key, value in vars(module).items():
            if type(value) is int and "head" in key:
                numbers.setdefault(key, value)
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    return Target(shapes, {name: dtypes.from_torch(value.dtype).name for name, value in state.items()}, kinds, ties, numbers)
