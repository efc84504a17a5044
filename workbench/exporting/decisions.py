"""Decisions: where values of the inputs leave the tensors while a model is traced, heard at the operator that lets them out.

A trace keeps what tensors compute. What Python is told of a value (a number, a truth, an array) is a constant of it, and so is every branch
that was taken by it. torch says so in warnings, which a model may silence and which some operators do not give; here the operators
themselves are heard, and only for what comes from the inputs: what a buffer or a size says is the same at every call.

Source: torch 2.13, the tags `data_dependent_output` and `dynamic_output_shape` of aten/src/ATen/native/native_functions.yaml.
"""

from __future__ import annotations

import inspect
import linecache
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from workbench.exporting.evidence import Reason, in_the_model, line_of
from workbench.exporting.wrappers import flat

if TYPE_CHECKING:
    from workbench.exporting.targets import Request

VALUE, SIZE, THREAD = "VALUE_LEFT", "SIZE_BY_VALUES", "THREAD_STARTED"
_WHAT = {
    VALUE: "Python is told a value of the inputs here",
    SIZE: "the size of this answer hangs on the values of the inputs",
    THREAD: "it starts a thread of its own, and no tracer hears what is decided there",
}
_CURE = "Write the branch with `torch.where` or `torch.cond`, and keep what is computed from the inputs in tensors."


def values_that_leave(request: Request) -> list[Reason]:
    """Each line that lets a value of the inputs out, takes a size from one, or starts a thread, in one more trace of the model.

    Cost: a trace.
    """
    import torch
    from torch.multiprocessing.reductions import StorageWeakRef
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    tensors = tuple(request.example.fresh().tensors().values())
    heard: dict[Reason, None] = {}
    known: set[Any] = set()
    arrays = {getattr(torch.Tensor, name) for name in ("numpy", "tolist", "__array__", "__dlpack__")}
    numbers = {
        getattr(torch.Tensor, name) for name in ("item", "__bool__", "__int__", "__float__", "__index__", "__complex__", "is_nonzero")
    }
    calling: list[Any] = []  # the function of torch that Python called last, which may be part of another

    def place(tensor: torch.Tensor) -> Any:
        if tensor.layout is not torch.strided:
            return None  # it has no storage to go by
        return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]

    def held(value: Any) -> list[torch.Tensor]:
        return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]

    class Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            result = func(*args, **kwargs)
            given = held((args, kwargs))
            name = str(func.name())
            shape_alone = name.partition(".")[0].endswith("_like") or "::new_" in name
            if shape_alone or not any(place(tensor) in known for tensor in given):
                return result
            written = [
                value for value, spec in zip(args, func._schema.arguments, strict=False) if spec.alias_info and spec.alias_info.is_write
            ]
            known.update(map(place, held((result, written))))
            by = calling[-1] if calling else None
            size = name == "aten::_local_scalar_dense" and by not in {*numbers, torch.is_nonzero, None} and not inspect.isfunction(by)
            # `size`: torch.zeros(n), x[:n] read a tensor by themselves, and the tracer keeps it; no tracing state: scripted code, kept too
            if torch.Tag.data_dependent_output in func.tags and not size and torch._C._get_tracing_state() is not None:
                heard[_reason(VALUE, name)] = None
            by_whole_numbers = name.startswith("aten::index.") and not any(t.dtype in (torch.bool, torch.uint8) for t in given[1:])
            if torch.Tag.dynamic_output_shape in func.tags and not by_whole_numbers:
                heard[_reason(SIZE, name)] = None
            return result

    class Functions(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in arrays and place(args[0]) in known:
                heard[_reason(VALUE, f"Tensor.{func.__name__}")] = None
            calling.append(func)
            try:
                return func(*args, **(kwargs or {}))
            finally:
                calling.pop()

    known.update({None, *map(place, tensors)})
    with _threads() as started, torch.no_grad(), Operators(), Functions():  # type: ignore[no-untyped-call]
        torch.jit.trace(flat(request.model, request.example), tensors, check_trace=False)  # type: ignore[no-untyped-call]
    return [*heard, *(Reason(THREAD, _WHAT[THREAD], "", "", _CURE, f"{name} was started while tracing") for name in started)]


def _reason(kind: str, operator: str) -> Reason:
    import torch

    frame: Any = sys._getframe(2)
    while frame.f_code.co_filename.startswith((os.path.dirname(torch.__file__), __file__)):
        frame = frame.f_back
    if not in_the_model(frame.f_code.co_filename):
        return Reason(kind, _WHAT[kind], "", "", _CURE, operator)
    file, line = frame.f_code.co_filename, frame.f_lineno
    where, code = line_of(file, line, frame.f_code.co_name), linecache.getline(file, line).strip()
    return Reason(kind, _WHAT[kind], where, code, _CURE, f"{operator} at {where}: {code}")


@contextmanager
def _threads() -> Iterator[list[str]]:
    """Names of the threads that start within the `with`."""
    started: list[str] = []
    before = threading.getprofile()

    def first_call(*_event: Any) -> None:
        sys.setprofile(before)
        started.append(threading.current_thread().name)

    threading.setprofile(first_call)
    try:
        yield started
    finally:
        threading.setprofile(before)
