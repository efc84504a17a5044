"""Live objects as checkpoints: modules, optimizers, state dicts, nested dicts of tensors. Viewed, not copied."""

from __future__ import annotations

from collections import deque
from typing import Any

from workbench.checkpoint import Checkpoint
from workbench.dtypes import from_torch
from workbench.errors import UnsupportedError
from workbench.formats.torch_objects import sparse_tensor
from workbench.tensors import LazyTensor, Live, TensorSpec
from workbench.tree import Global, Inert


def open_object(value: Any, *, snapshot: bool = False) -> Checkpoint:
    """A checkpoint over a live object.

    Args:
        value: nn.Module, optimizer or anything with `state_dict()`, or a nested dict or list of tensors.
        snapshot: copy every tensor now, so that later training does not show through.
    Raises:
        UnsupportedError: nothing in it is a tensor container.
    """
    name = type(value).__name__
    if isinstance(value, type):
        raise UnsupportedError(f"{value.__name__} is a class, not an object", hint=f"make one: wb.open({value.__name__}(…))")
    if callable(getattr(value, "state_dict", None)):
        value = value.state_dict()
    if not isinstance(value, (dict, list, tuple)):
        raise UnsupportedError(
            f"a {name} is no path, module, optimizer or container of tensors",
            hint="give a path, an nn.Module, a state dict, or a nested dict of tensors",
        )
    try:
        tree = _to_tree(value, snapshot, {})
    except RecursionError as error:
        raise UnsupportedError("the object nests too deeply to be a checkpoint") from error
    return Checkpoint(tree, name=name if name not in ("dict", "OrderedDict", "list", "tuple") else "live tensors", format="memory")


def _to_tree(value: Any, snapshot: bool, memo: dict[int, Any]) -> Any:
    import torch

    if id(value) in memo:
        return memo[id(value)][0]
    made: Any
    if isinstance(value, torch.nn.Parameter) and not value.is_nested:
        tensor = lazy(value.detach().clone() if snapshot else value)
        hooks = Inert(Global("collections", "OrderedDict"))
        made = Inert(Global("torch._utils", "_rebuild_parameter"), (tensor, value.requires_grad, hooks))
    elif isinstance(value, torch.Tensor) and value.is_nested:  # its parts, in the call that torch saves it by
        func, args = value.__reduce_ex__(2)  # type: ignore[no-untyped-call]
        made = Inert(Global(func.__module__, func.__name__), _to_tree(args, snapshot, memo))
    elif isinstance(value, torch.Tensor):
        made = lazy(value.detach().clone() if snapshot else value)
    elif isinstance(value, dict):
        made = {} if type(value) is dict else Inert(_class_of(value))
        memo[id(value)] = (made, value)
        entries = made if isinstance(made, dict) else made.items
        entries.update({key: _to_tree(child, snapshot, memo) for key, child in value.items()})
        if isinstance(made, Inert) and hasattr(value, "_metadata"):
            made.state = {"_metadata": _to_tree(value._metadata, snapshot, memo)}
    elif type(value) is list:
        memo[id(value)] = (made := [], value)
        made += [_to_tree(child, snapshot, memo) for child in value]
    elif type(value) is tuple:
        made = tuple(_to_tree(child, snapshot, memo) for child in value)
    elif value is None or type(value) in (bool, int, float, str, bytes, bytearray, complex, set):
        made = value
    elif isinstance(value, (list, tuple, deque, frozenset)):  # other kinds of sequence keep their class, as a name
        children = tuple(_to_tree(child, snapshot, memo) for child in value)
        made = Inert(_class_of(value), (children,) if isinstance(value, torch.Size) else children)
    elif isinstance(value, torch.device):
        made = Inert(Global("torch", "device"), (value.type,) if value.index is None else (value.type, value.index))
    elif type(value).__module__ == "numpy" and hasattr(value, "item"):
        made = _from_numpy(value)
    elif isinstance(value, torch.dtype):
        made = Global("torch", str(value).removeprefix("torch."))
    elif callable(getattr(value, "state_dict", None)) and not isinstance(value, type):
        made = _to_tree(value.state_dict(), snapshot, memo)
    else:
        made = Inert(_class_of(value))
    memo[id(value)] = (made, value)  # holds the value, so that no id is used twice
    return made


def _class_of(value: Any) -> Global:
    return Global(type(value).__module__, type(value).__qualname__)


def _from_numpy(value: Any) -> Any:
    """A NumPy array as a tensor, a scalar as a number, anything torch has no element type for as an inert object."""
    import numpy as np
    import torch

    if not getattr(value, "shape", ()):
        return value.item()
    try:
        return lazy(torch.as_tensor(np.ascontiguousarray(value)))
    except TypeError:
        return Inert(_class_of(value))


def lazy(tensor: Any) -> LazyTensor:
    """A LazyTensor that views one live tensor; a sparse or quantized one keeps its kind."""
    from torch.nn.parameter import is_lazy

    if is_lazy(tensor):
        return LazyTensor(
            TensorSpec(from_torch(tensor.dtype), ()), Live(tensor), locked="a lazy parameter: it has no shape and no values yet"
        )
    tensor = tensor.resolve_conj().resolve_neg()  # torch may keep a conjugate or a minus sign beside the bytes
    layout = str(tensor.layout).removeprefix("torch.")
    quantizer = str(tensor.qscheme()).removeprefix("torch.") if tensor.is_quantized else None
    if tensor.device.type == "meta":
        return LazyTensor(TensorSpec(from_torch(tensor.dtype), tuple(tensor.shape)), Live(tensor), locked="a meta tensor: it has no values")
    spec = TensorSpec(from_torch(tensor.dtype), tuple(tensor.shape), layout, quantizer)
    if layout == "strided" and quantizer is None:
        return LazyTensor(spec, Live(tensor), bool(tensor.requires_grad))
    if layout != "strided":
        coalesced = tensor.is_coalesced() if layout == "sparse_coo" else None
        return sparse_tensor(layout, tuple(map(lazy, _sparse_parts(tensor, layout))), spec.shape, coalesced)
    return LazyTensor(spec, Live(tensor))


def _sparse_parts(tensor: Any, layout: str) -> tuple[Any, ...]:
    tensor = tensor.detach()
    if layout == "sparse_coo":
        return (tensor._indices(), tensor._values())
    if layout in ("sparse_csr", "sparse_bsr"):
        return (tensor.crow_indices(), tensor.col_indices(), tensor.values())
    if layout in ("sparse_csc", "sparse_bsc"):
        return (tensor.ccol_indices(), tensor.row_indices(), tensor.values())
    raise UnsupportedError(f"tensors of layout {layout} are not read yet")
