"""Tensors that are made empty and filled by a state, and tensors that a state changes: parameters, subclasses, old spellings.

Source: torch 2.13 torch/_tensor.py (`__setstate__`), torch/_utils.py (`_set_obj_state`), torch/_weights_only_unpickler.py (BUILD).
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from workbench.dtypes import DTYPES, DType
from workbench.errors import CorruptFileError, UnsupportedError
from workbench.formats.known_globals import ALL_STORAGE_DTYPES
from workbench.tensors import LazyTensor, Stored, TensorSpec
from workbench.tree import SUBCLASSES, Inert, attributes, is_mapping, is_tensor, wrapped

if TYPE_CHECKING:
    from workbench.formats.torch_objects import TorchObjects


@dataclass(frozen=True)
class Nowhere:
    nbytes: int

    def open(self) -> Any:
        raise CorruptFileError("the bytes of this storage are in doubt and are not read")


class _Empty(Nowhere):
    def open(self) -> Any:
        return nullcontext()  # no byte of it is ever asked for


def _is_storage(node: Any) -> bool:
    """Whether a node is a storage by itself, which is a kind of tensor here."""
    return isinstance(node, LazyTensor) and type(node) is not LazyTensor


def with_attributes(objects: TorchObjects, made: LazyTensor, state: Any, assigned: bool = True) -> tuple[LazyTensor, Any]:
    """A tensor and its state, once the state's entries are (assigned or written into its `__dict__` as) its attributes.

    Raises:
        UnsupportedError: assigning them changes elements that other tensors may share.
    """
    held = attributes(state)
    objects.spend(64 * len(held))
    if assigned and not held.keys().isdisjoint(("real", "imag")):
        raise UnsupportedError("the state of a tensor writes into its real or imaginary part")
    if assigned and "data" in held:
        data = held.pop("data")
        made, state = _moved(objects, made, data if type(data := wrapped(data)) is LazyTensor else None), held
    if assigned and isinstance(grad := held.get("requires_grad"), bool):
        made = replace(made, requires_grad=grad)
    names = [str(key) for key, value in held.items() if is_tensor(value)]
    objects.aside.extend(value for value in held.values() if isinstance(value, (dict, list, tuple, Inert)) and not is_tensor(value))
    if names:
        message = f"some tensors carry other tensors as attributes, which are not listed: {', '.join(names[:4])}"
        objects.tell("attributes of a tensor", "info", message, {"names": names[:100]})
    return made, state


def _moved(objects: TorchObjects, held: LazyTensor, data: LazyTensor | None, requires_grad: bool | None = None) -> LazyTensor:
    """The tensor `held` with the elements of another; with none that can be read, where it is not clear whose."""
    grad = held.requires_grad if requires_grad is None else requires_grad
    if data is not None and data.spec.layout == held.spec.layout:
        return replace(data, requires_grad=grad)
    trouble = "the state of a tensor puts other elements in the place of its own, in a way that is not followed"
    objects.tell("values locked", "danger", trouble, {"shape": list(held.shape)})
    return replace(held, requires_grad=grad, locked=held.locked or trouble)


def set_state(objects: TorchObjects, node: Inert) -> Any:
    """BUILD on a tensor changes it in place, for whoever holds it already.

    (storage, offset, size, stride): it lies there from now on. (requires_grad, volatile, hooks) and
    (data, creator, hooks, requires_grad, volatile): the variables of torch 0.1 to 0.3.
    """
    target, state = node.args
    if _is_storage(target):
        raise UnsupportedError("a storage is given a state after it was made, and every tensor on it may change")
    if isinstance(target, Inert) and is_mapping(target):
        objects.aside.append(state)
        return node
    held: Any = target
    if isinstance(target, Inert):
        held = target.args[2 if target.dotted in SUBCLASSES else 0] if isinstance(target.args, tuple) and len(target.args) > 2 else None
    made: LazyTensor | None = None
    grad: bool | None = None
    match state:
        case _ if held is not target and not target.dotted.startswith("torch._utils._rebuild_parameter"):
            pass
        case (storage, offset, size, stride) if _is_storage(storage) and isinstance(held, LazyTensor) and isinstance(held.source, Stored):
            if storage.dtype == held.dtype and not held.locked:
                made = objects.tensor(storage, offset, size, stride, held.dtype)
        case (LazyTensor() as data, _, _, flag, _) if type(data) is LazyTensor:
            made, grad = data, bool(flag)
        case (bool() as flag, _, _):
            made, grad = held, flag
    if isinstance(held, LazyTensor):
        held.__dict__.update(_moved(objects, held, made, grad).__dict__)
        return None
    objects.tell("state of a tensor", "danger", f"a tensor that {target.dotted} makes is given a state, which is not followed", {})
    return node


def old_tensor(objects: TorchObjects, node: Inert) -> Any:
    """`FloatTensor()`, empty until its state comes, the spelling of torch 0.1; or `Tensor(tensor or storage)`, which lies there too."""
    kind = node.dotted.rpartition(".")[2].removesuffix("Tensor")
    empty = _empty(DTYPES[ALL_STORAGE_DTYPES[f"{kind or 'Float'}Storage"]])
    held = node.args[0] if len(node.args) == 1 else None
    if isinstance(held, LazyTensor) and (held.dtype == empty.dtype or not (kind or _is_storage(held))):
        return LazyTensor(held.spec, held.source, False, held.locked)
    if not node.args:
        return empty
    objects.tell("tensor made by a call", "warning", f"a tensor that {node.dotted} makes of numbers is not listed", {"class": node.dotted})
    return node


def _empty(dtype: DType) -> LazyTensor:
    return LazyTensor(TensorSpec(dtype, (0,)), Stored(_Empty(0), 0, (1,)))


def old_parameter(objects: TorchObjects, node: Inert) -> Any:
    """`Parameter([data[, requires_grad]])`; the state that says the rest may follow."""
    data, *flag = node.args or (_empty(DTYPES["float32"]),)
    grad = bool(flag[0]) if flag else node.dotted.endswith("Parameter")
    return replace(data, requires_grad=grad) if type(data) is LazyTensor else node


def parameter(objects: TorchObjects, node: Inert) -> Inert:
    """`_rebuild_parameter(data, requires_grad, hooks[, state])`: the flag belongs to the tensor that people see."""
    data, grad, *rest = node.args if len(node.args) >= 2 else (None, None)
    if isinstance(data, LazyTensor):
        made = LazyTensor(data.spec, data.source, bool(grad), data.locked)
        if len(rest) == 2:
            made, rest[1] = with_attributes(objects, made, rest[1])
        node.args = (made, grad, *rest)
    elif len(rest) == 2 and not attributes(rest[1]).keys().isdisjoint(("data", "real", "imag")):
        raise UnsupportedError("the state of a parameter of another class puts other elements in the place of its own")
    return node
