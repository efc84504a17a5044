"""Weighing: how many bytes a variant takes on disk and in memory.

Measured, not estimated, wherever there is something to measure. The next kind of thing to weigh is one branch in each function.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.checkpoint import Checkpoint
from workbench.files import file_ref

if TYPE_CHECKING:
    import torch


def disk_nbytes(runnable: Any, path: Any) -> int | None:
    """Bytes of the file at `path`, external data included; without one, those of the module's state dict as `torch.save` writes it.

    Args:
        runnable: what runs, or None.
        path: a file, a Checkpoint, or None.
    Returns:
        Bytes, or None where there is nothing on disk to weigh.
    Cost: a bare module is really written, to a temporary file.
    """
    import torch

    if isinstance(path, Checkpoint):
        return path.source.size if path.source is not None else None
    if path is not None:
        file = Path(path)
        return file_ref(file).size + (_external_nbytes(file) if file.suffix.lower() == ".onnx" else 0)
    if not isinstance(runnable, torch.nn.Module):
        return None
    with tempfile.TemporaryFile() as scratch:
        torch.save(runnable.state_dict(), scratch)
        return scratch.tell()


def ram_nbytes(runnable: Any, path: Any) -> int | None:
    """Bytes of the weights in memory: a module's, a Checkpoint's, or those of an ONNX graph; None for anything else."""
    import torch

    if isinstance(runnable, torch.nn.Module):
        return _module_nbytes(runnable)
    if isinstance(path, Checkpoint):
        return path.nbytes
    if path is not None and Path(path).suffix.lower() == ".onnx":
        return _weights_nbytes(Path(path))
    return None


def _module_nbytes(module: torch.nn.Module) -> int:
    """Bytes of parameters, buffers, tensor attributes, packed weights and a program's constants, each storage once.

    Quantized modules pack theirs in the state dict only; a frozen program has nothing but constants.
    """
    import torch

    held: dict[tuple[str, int], int] = {}

    def count(value: Any) -> None:
        if isinstance(value, (tuple, list)):
            for item in value:
                count(item)
        elif isinstance(value, torch.Tensor):
            inner = getattr(value, "__tensor_flatten__", None)
            if inner is not None:  # a wrapper such as torchao's: the tensors inside are what takes room
                count([getattr(value, name) for name in inner()[0]])
            elif value.layout is torch.strided:
                held[str(value.device), value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
            else:
                elements = value._nnz() if value.is_sparse else value.numel()  # oneDNN's own layout holds them all
                held[str(value.device), id(value)] = value.element_size() * elements

    constants = list(_constants(module)) if isinstance(module, torch.jit.ScriptModule) else []
    attributes = [value for part in module.modules() for value in vars(part).values() if isinstance(value, torch.Tensor)]
    count([*module.parameters(), *module.buffers(), *module.state_dict(keep_vars=True).values(), *attributes, constants])
    return sum(held.values())


def _constants(program: Any) -> Iterator[Any]:
    """The values that stand in a program's own code."""
    for name in program._c._method_names():
        graph = program._c._get_method(name).inlined_graph  # held: its nodes end with it
        yield from (node.output().toIValue() for node in graph.findAllNodes("prim::Constant"))


def _external_nbytes(path: Path) -> int:
    """Bytes of the external data files that an ONNX graph names, as far as they lie in its own folder."""
    names = {entry.value for tensor in _initializers(path) for entry in tensor.external_data if entry.key == "location"}
    return sum(file_ref(path.parent / name).size for name in names if Path(name).name == name)


def _weights_nbytes(path: Path) -> int:
    import onnx

    return sum(math.prod(t.dims) * onnx.helper.tensor_dtype_to_np_dtype(t.data_type).itemsize for t in _initializers(path))


def _initializers(path: Path) -> list[Any]:
    import onnx

    return list(onnx.load(str(path), load_external_data=False).graph.initializer)
