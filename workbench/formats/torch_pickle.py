"""Writes the pickle of a torch checkpoint, protocol 2, without torch: what VM and torch_objects read, said again.

Refuses every global outside the allow-list; `drop_unsafe` takes such objects out first and lists them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from workbench.dtypes import DType
from workbench.errors import UnsupportedError, UntrustedError
from workbench.formats.known_globals import HARMLESS, PLAIN, STORAGE_DTYPES
from workbench.names import join_path, unique_name
from workbench.tensors import Block, Derived, LazyTensor
from workbench.tree import NOTHING, SUBCLASSES, Global, Inert, walk, wrapped

KERNELS = "workbench.formats.torch_kernels"
_STORAGE_CLASSES = {dtype: cls for cls, dtype in STORAGE_DTYPES.items()}


class StorageSlot:
    """Where the writer put one tensor: storage key, element offset and strides, and the storage's length in elements."""

    def __init__(self, key: str, offset: int, strides: tuple[int, ...], numel: int, dtype: DType) -> None:
        self.key, self.offset, self.strides, self.numel, self.dtype = key, offset, strides, numel, dtype


class PickleWriter:
    """One pickle. `place(tensor)` gives the StorageSlot of each strided tensor as it is met."""

    def __init__(self, place: Callable[[LazyTensor], StorageSlot]) -> None:
        self._place = place
        self._out: list[bytes] = [b"\x80\x02"]
        self._memo: dict[Any, int] = {}
        self._kept: list[Any] = []  # holds what is memoised, so that no id is used twice

    def dump(self, root: Any) -> bytes:
        self._save(root)
        return b"".join([*self._out, b"."])

    def _emit(self, data: bytes) -> None:
        self._out.append(data)

    def _put(self, key: Any) -> None:
        index = self._memo[key] = len(self._memo)
        self._emit(b"q" + bytes([index]) if index < 256 else b"r" + struct.pack("<I", index))

    def _known(self, key: Any) -> bool:
        index = self._memo.get(key)
        if index is None:
            return False
        self._emit(b"h" + bytes([index]) if index < 256 else b"j" + struct.pack("<I", index))
        return True

    def _save(self, value: Any) -> None:
        if value is None or isinstance(value, bool):
            self._emit({None: b"N", True: b"\x88", False: b"\x89"}[value])
        elif isinstance(value, int):
            self._int(value)
        elif isinstance(value, float):
            self._emit(b"G" + struct.pack(">d", value))
        elif isinstance(value, str):
            self._text(value)
        elif isinstance(value, Global):
            self._global(value.module, value.name)
        elif not isinstance(value, (tuple, list, dict, set, bytes, bytearray, complex, frozenset, LazyTensor, Inert)):
            raise UnsupportedError(f"a {type(value).__name__} has no spelling in a weights-only pickle")
        elif not self._known(id(value)):
            self._kept.append(value)
            self._container(value)

    def _int(self, value: int) -> None:
        if 0 <= value < 256:
            self._emit(b"K" + bytes([value]))
        elif 0 <= value < 65536:
            self._emit(b"M" + struct.pack("<H", value))
        elif -(1 << 31) <= value < 1 << 31:
            self._emit(b"J" + struct.pack("<i", value))
        else:
            data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            self._emit((b"\x8a" + bytes([len(data)]) if len(data) < 256 else b"\x8b" + struct.pack("<i", len(data))) + data)

    def _text(self, value: str) -> None:
        if not self._known(("str", value)):
            data = value.encode("utf-8", "surrogatepass")
            self._emit(b"X" + struct.pack("<I", len(data)) + data)
            self._put(("str", value))

    def _global(self, module: str, name: str) -> None:
        if f"{module}.{name}" not in PLAIN:
            raise UntrustedError(
                f"the checkpoint refers to {module}.{name}, which is not plain data",
                hint='save with unsafe="drop" to leave such objects behind; the report lists them',
            )
        if not self._known(("global", module, name)):
            self._emit(f"c{module}\n{name}\n".encode())
            self._put(("global", module, name))

    def _tuple(self, items: tuple[Any, ...]) -> None:
        if len(items) > 3:
            self._emit(b"(")
        for item in items:
            self._save(item)
        self._emit((b")", b"\x85", b"\x86", b"\x87")[len(items)] if len(items) <= 3 else b"t")

    def _reduce(self, module: str, name: str, *args: Any) -> None:
        self._global(module, name)
        self._tuple(args)
        self._emit(b"R")

    def _container(self, value: Any) -> None:
        if isinstance(value, tuple):
            self._tuple(value)
            if value:
                self._put(id(value))
            return
        if isinstance(value, Inert):
            self._inert(value)
            return
        if isinstance(value, LazyTensor):
            self._tensor(value)
        elif isinstance(value, dict):
            self._emit(b"}")
            self._put(id(value))
            self._items(value)
            return
        elif isinstance(value, list):
            self._emit(b"]")
            self._put(id(value))
            self._elements(value)
            return
        elif isinstance(value, (set, frozenset)):
            self._reduce("builtins", "set" if isinstance(value, set) else "frozenset", list(value))
        elif isinstance(value, complex):
            self._reduce("builtins", "complex", value.real, value.imag)
        else:
            self._bytes(value)
        self._put(id(value))

    def _bytes(self, value: bytes | bytearray) -> None:
        if isinstance(value, bytearray):
            self._reduce("builtins", "bytearray", bytes(value))
        else:
            self._reduce("_codecs", "encode", value.decode("latin-1"), "latin1")

    def _items(self, items: dict[Any, Any]) -> None:
        if items:
            self._emit(b"(")
            for key, child in items.items():
                self._save(key)
                self._save(child)
            self._emit(b"u")

    def _elements(self, items: list[Any]) -> None:
        if items:
            self._emit(b"(")
            for child in items:
                self._save(child)
            self._emit(b"e")

    def _inert(self, node: Inert) -> None:
        self._save(node.func)
        if node.dotted in SUBCLASSES and len(node.args) == 4 and isinstance(node.args[2], LazyTensor):
            _, cls, tensor, state = node.args
            self._emit(b"(")
            self._function(tensor)
            self._save(cls)
            self._arguments(tensor)
            self._save(state)
            self._emit(b"t")
        else:
            self._save(node.args)
        if node.kwargs is not None:
            self._save(node.kwargs)
        self._emit((b"\x92" if node.kwargs is not None else b"\x81") if node.new else b"R")
        self._put(id(node))
        self._items(node.items)
        self._elements(node.elements)
        if node.state is not NOTHING:
            self._save(node.state)
            self._emit(b"b")

    def _tensor(self, tensor: LazyTensor) -> None:
        self._function(tensor)
        self._arguments(tensor)
        self._emit(b"R")

    def _function(self, tensor: LazyTensor) -> None:
        """What rebuilds a tensor of its kind."""
        block = _rebuilt(tensor)
        name = "tensor_v2" if tensor.dtype.name in _STORAGE_CLASSES else "tensor_v3"
        if block is not None:
            name = "sparse_tensor" if block.op.endswith(":sparse") else "qtensor"
        self._global("torch._utils", f"_rebuild_{name}")

    def _arguments(self, tensor: LazyTensor) -> None:
        """What that function takes; of a sparse or torch-quantized tensor, the parts that its block keeps."""
        block = _rebuilt(tensor)
        self._emit(b"(")
        if block is not None and block.op.endswith(":sparse"):
            self._reduce("torch.serialization", "_get_layout", f"torch.{block.params['layout']}")
            coalesced = (block.params["coalesced"],) if "coalesced" in block.params else ()
            self._tuple((*block.rowed, tensor.shape, *coalesced))
        else:
            stored, *parts = (tensor,) if block is None else block.rowed
            slot = self._place(stored)
            self._storage(slot)
            self._int(slot.offset)
            self._tuple(tensor.shape)
            self._tuple(tuple((block.params["strides"] if block is not None else None) or slot.strides))
            if block is not None:
                self._tuple((Global("torch", block.params["scheme"]), *parts, *block.params["numbers"]))
            self._save(tensor.requires_grad)
            self._reduce("collections", "OrderedDict")
            if tensor.dtype.name not in _STORAGE_CLASSES:
                self._global("torch", tensor.dtype.name)
        self._emit(b"t")

    def _storage(self, slot: StorageSlot) -> None:
        cls = _STORAGE_CLASSES.get(slot.dtype.name)
        self._emit(b"(")
        self._text("storage")
        self._global(*(("torch", cls) if cls else ("torch.storage", "UntypedStorage")))
        self._text(slot.key)
        self._text("cpu")
        self._int(slot.numel if cls else slot.numel * slot.dtype.itemsize)
        self._emit(b"tQ")


def _rebuilt(tensor: LazyTensor) -> Block | None:
    """What torch rebuilds a sparse or quantized tensor from; any other is written as the numbers that it has."""
    block = tensor.source.block if isinstance(tensor.source, Derived) else None
    return block if block is not None and block.op in (f"{KERNELS}:sparse", f"{KERNELS}:quantized") else None


def drop_unsafe(root: Any) -> tuple[Any, list[str]]:
    """The tree without what is not plain data, and the dotted path and class of each thing left behind.

    An object that holds tensors becomes a dict of them, under the names they are listed by.
    """
    left: list[str] = []
    return _without(root, (), left, {}), left


def _is_plain(node: Any) -> bool:
    if isinstance(node, Global):
        return node.dotted in PLAIN
    if isinstance(node, Inert) and node.dotted in SUBCLASSES and len(node.args) == 4 and not _is_plain(node.args[1]):
        return False
    return not isinstance(node, Inert) or (isinstance(node.func, Global) and node.func.dotted in PLAIN)


def _without(node: Any, path: tuple[Any, ...], left: list[str], memo: dict[int, Any]) -> Any:
    if id(node) in memo:
        return memo[id(node)][0]
    if not _is_plain(node):
        what = f"{join_path(path) or '(root)'}: {(node.args[1] if isinstance(node, Inert) and node.dotted in SUBCLASSES else node).dotted}"
        if isinstance(tensor := wrapped(node), LazyTensor):
            left.append(f"{what}; the tensor in it is kept")
            return tensor
        if isinstance(node, Inert) and node.dotted in HARMLESS and isinstance(node.state, dict) and not (node.items or node.elements):
            left.append(f"{what}; its values are kept in a dict")
            return _without(node.state, path, left, memo)
        tensors: dict[str, Any] = {}
        for inner, value in walk(node):
            if isinstance(value, LazyTensor):
                tensors[unique_name(join_path(inner), tensors, {})] = value
        left.append(what + (f"; its {len(tensors)} tensors are kept" if tensors else ""))
        return tensors or NOTHING
    made: Any = node
    if isinstance(node, dict):
        memo[id(node)] = (made := {}, node)
        made.update(_kept_items(node, path, left, memo))
    elif isinstance(node, list):
        memo[id(node)] = (made := [], node)
        made += [_or_none(_without(child, (*path, i), left, memo)) for i, child in enumerate(node)]
    elif isinstance(node, tuple):
        made = tuple(_or_none(_without(child, (*path, i), left, memo)) for i, child in enumerate(node))
    elif isinstance(node, Inert):
        made = Inert(node.func, (), node.kwargs, node.new)
        memo[id(node)] = (made, node)
        made.args = _without(node.args, path, left, memo)
        made.items.update(_kept_items(node.items, path, left, memo))
        made.elements = [_or_none(_without(child, (*path, i), left, memo)) for i, child in enumerate(node.elements)]
        made.state = _without(node.state, path, left, memo)
    memo[id(node)] = (made, node)
    return made


def _kept_items(items: dict[Any, Any], path: tuple[Any, ...], left: list[str], memo: dict[int, Any]) -> dict[Any, Any]:
    pairs = ((key, _without(child, (*path, key), left, memo)) for key, child in items.items() if _is_plain(key))
    return {key: child for key, child in pairs if child is not NOTHING}


def _or_none(value: Any) -> Any:
    return None if value is NOTHING else value
