"""What the torch family puts into a pickle: storages, tensors, and the globals that count as plain data.

Owns the exact allow-list and the meaning of torch's rebuild functions. Everything else stays inert and is told as a finding.

Source: torch 2.13 torch/_utils.py (rebuild functions), torch/serialization.py (persistent ids), torch/_weights_only_unpickler.py (what is plain).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

from workbench.checkpoint import Finding
from workbench.dtypes import DTYPES, DType
from workbench.errors import CorruptFileError, UnsupportedError
from workbench.files import Storage
from workbench.formats.pickle_vm import Machine
from workbench.strided import extent
from workbench.tensors import Block, Derived, LazyTensor, Stored, TensorSpec
from workbench.tree import Global, Inert, is_mapping, items_of

STORAGE_DTYPES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16", "LongStorage": "int64",
    "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8", "ByteStorage": "uint8", "BoolStorage": "bool",
    "ComplexDoubleStorage": "complex128", "ComplexFloatStorage": "complex64", "QInt8Storage": "qint8", "QUInt8Storage": "quint8",
    "QInt32Storage": "qint32", "QUInt4x2Storage": "quint4x2", "QUInt2x4Storage": "quint2x4",
}  # fmt: skip
_TENSOR_TYPES = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")

PLAIN = frozenset(
    ["_codecs.encode", "builtins.bytearray", "builtins.complex", "builtins.set", "collections.Counter", "collections.OrderedDict"]
    + ["torch.Size", "torch.Tensor", "torch.device", "torch.nn.parameter.Parameter", "torch.serialization._get_layout"]
    + ["torch.storage.TypedStorage", "torch.storage.UntypedStorage", "torch._tensor._rebuild_from_type_v2"]
    + [
        f"torch._utils._rebuild_{what}"
        for what in ("device_tensor_from_cpu_tensor", "device_tensor_from_numpy", "meta_tensor_no_storage", "nested_tensor")
    ]
    + [f"torch._utils._rebuild_{what}" for what in ("parameter", "parameter_with_state", "qtensor", "sparse_tensor", "wrapper_subclass")]
    + [f"torch._utils._rebuild_tensor{version}" for version in ("", "_v2", "_v3")]
    + [
        f"torch.{qscheme}"
        for qscheme in (
            "per_channel_affine",
            "per_channel_affine_float_qparams",
            "per_channel_symmetric",
            "per_tensor_affine",
            "per_tensor_symmetric",
        )
    ]
    + [f"torch.{name}" for name in DTYPES]
    + [f"torch.{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8)]
    + [f"torch.{name}" for name in STORAGE_DTYPES]
    + [f"torch.cuda.{name}" for name in STORAGE_DTYPES if not name.startswith("Q")]
    + [f"torch{where}.{kind}Tensor" for where in ("", ".cuda") for kind in _TENSOR_TYPES]
    + [f"torch{where}.sparse.{kind}Tensor" for where in ("", ".cuda") for kind in _TENSOR_TYPES if kind != "Bool"]
)


class StorageRef(NamedTuple):
    """A storage as a persistent id names it; `stored` is None where its bytes are in doubt, with the reason in `trouble`."""

    key: str
    dtype: DType | None  # None: untyped, counted in bytes
    numel: int
    place: str
    stored: Storage | None
    trouble: str | None

    @property
    def nbytes(self) -> int:
        return self.numel * (self.dtype.itemsize if self.dtype else 1)


class TorchObjects:
    """Turns the persistent ids and rebuild calls of one pickle into storages and tensors.

    `locate(key)` gives the bytes of one storage or raises FormatError; a storage is located once.
    """

    def __init__(self, locate: Callable[[str], Storage], byteorder: str = "little") -> None:
        self._locate = locate
        self._byteorder = byteorder
        self.storages: dict[str, StorageRef] = {}
        self.troubles: list[Finding] = []

    def persistent(self, pid: Any) -> Any:
        if not (isinstance(pid, (tuple, list)) and len(pid) >= 5 and pid[0] == "storage" and isinstance(pid[1], Global)):
            raise CorruptFileError("a persistent id does not describe a storage")
        _, cls, key, place, numel = pid[:5]
        known = self.storages.get(key) if isinstance(key, str) else None
        dtype = _storage_dtype(cls)
        if known is not None and known.dtype == dtype and known.numel == numel:
            return known
        if not (isinstance(key, str) and isinstance(place, str) and isinstance(numel, int) and not isinstance(numel, bool) and numel >= 0):
            raise CorruptFileError("a persistent id does not describe a storage")
        ref = self._storage(key, dtype, numel, place, known)
        self.storages.setdefault(key, ref)
        return ref

    def template_tensor(
        self,
        cls: Global,
        place: str,
        key: str,
        numel: int,
        offset: int,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        requires_grad: bool,
    ) -> LazyTensor:
        """`persistent` and `_rebuild_tensor_v2` at once, for the machine's fast path: a whole storage, met for the first time."""
        spec = _plain_spec(cls, numel, offset, shape, strides)
        if spec is None or key in self.storages:
            return self.tensor(self.persistent(("storage", cls, key, place, numel)), offset, shape, strides, None, requires_grad)
        ref = self.storages[key] = self._storage(key, spec.dtype, numel, place, None)
        source = Stored(ref.stored or _Nowhere(ref.nbytes), 0, strides, self._byteorder)
        return LazyTensor(spec, source, requires_grad, ref.trouble)

    def _storage(self, key: str, dtype: DType | None, numel: int, place: str, known: StorageRef | None) -> StorageRef:
        trouble: str | None
        if known is not None:
            trouble = f"storage {key!r} is described twice, as {known.numel} × {known.dtype or 'byte'} and as {numel} × {dtype or 'byte'}"
            self._tell(trouble, key)
            return StorageRef(key, dtype, numel, place, None, trouble)
        try:
            stored: Storage | None = self._locate(key)
            trouble = None
        except (CorruptFileError, UnsupportedError) as error:
            stored, trouble = None, f"{error.message} (record {error.where.get('record', key)!r})"
        needed = numel * (dtype.itemsize if dtype else 1)
        if stored is not None and stored.nbytes != needed:
            trouble = f"storage {key!r} should have {needed} bytes and its record has {stored.nbytes}"
            stored = None
        if trouble:
            self._tell(trouble, key)
        return StorageRef(key, dtype, numel, place, stored, trouble)

    def _tell(self, trouble: str, key: str) -> None:
        self.troubles.append(
            Finding("values locked", "danger", trouble, {"record": key}, "the tensors on it are listed; their values are refused")
        )

    def construct(self, node: Inert) -> Any:
        """The tensor that a rebuild call makes, or the call itself, inert."""
        if not isinstance(node.func, Global) or not isinstance(node.args, tuple):
            return node
        build = _REBUILDS.get(node.func.dotted)
        return node if build is None else build(self, node)

    def tensor(self, storage: Any, offset: Any, shape: Any, strides: Any, dtype: DType | None, requires_grad: Any = False) -> LazyTensor:
        """A strided view of a storage, checked against the storage's length.

        Raises:
            CorruptFileError: the arguments are not what torch writes.
        """
        shape, strides = sizes(shape), sizes(strides)
        if not isinstance(storage, StorageRef) or len(shape) != len(strides) or not _is_count(offset):
            raise CorruptFileError("a tensor is rebuilt from something that is no storage, offset, size and stride")
        dtype = dtype or storage.dtype
        if dtype is None:
            raise CorruptFileError("a tensor on an untyped storage states no dtype")
        spec = TensorSpec(dtype, shape)
        trouble = storage.trouble
        span = extent(shape, strides)
        if trouble is None and span and (offset + span) * dtype.itemsize > storage.nbytes:
            trouble = f"the tensor reaches past the end of storage {storage.key!r} ({storage.nbytes} bytes)"
            self._tell(trouble, storage.key)
        nowhere = _Nowhere(storage.nbytes) if storage.stored is None else storage.stored
        return LazyTensor(spec, Stored(nowhere, offset, strides, self._byteorder), bool(requires_grad), trouble)


@dataclass(frozen=True)
class _Nowhere:
    nbytes: int

    def open(self) -> Any:
        raise CorruptFileError("the bytes of this storage are in doubt and are not read")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def sizes(value: Any) -> tuple[int, ...]:
    """A size or stride as a tuple of counts, checked."""
    if type(value) is tuple and all(type(n) is int for n in value):
        return _checked_sizes(value)
    if isinstance(value, Inert) and value.dotted == "torch.Size" and len(value.args) == 1:
        value = value.args[0]
    if not (isinstance(value, (tuple, list)) and all(map(_is_count, value))):
        raise CorruptFileError("a tensor's size or stride is not a tuple of counts")
    return _checked_sizes(tuple(value))


@lru_cache(maxsize=4096)
def _checked_sizes(value: tuple[int, ...]) -> tuple[int, ...]:
    if len(value) > 64 or any(n < 0 for n in value):
        raise CorruptFileError("a tensor's size or stride is not a tuple of counts")
    if math.prod(value) >= 1 << 63:
        raise CorruptFileError("a tensor is said to have more elements than torch can count")
    return value


@lru_cache(maxsize=4096)
def _plain_spec(cls: Global, numel: int, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> TensorSpec | None:
    """The spec of a tensor that lies at the start of its typed storage and inside it; None where it is less plain than that."""
    dtype = _storage_dtype(cls)
    if dtype is None or offset or numel < 0 or len(shape) != len(strides) or extent(sizes(shape), sizes(strides)) > numel:
        return None
    return TensorSpec(dtype, shape)


@lru_cache(maxsize=64)
def _storage_dtype(cls: Global) -> DType | None:
    if cls.dotted in ("torch.storage.UntypedStorage", "torch.UntypedStorage"):
        return None
    name = STORAGE_DTYPES.get(cls.name)
    if name is None or cls.module not in ("torch", "torch.cuda", "torch.storage"):
        raise CorruptFileError(f"{cls.dotted} is no kind of storage that torch writes")
    return DTYPES[name]


def _dtype(value: Any) -> DType:
    if isinstance(value, Global) and value.module == "torch" and value.name in DTYPES:
        return DTYPES[value.name]
    what = value.dotted if isinstance(value, Global) else f"a {type(value).__name__}"
    raise CorruptFileError(f"{what} is no element type that torch stores")


def _v2(objects: TorchObjects, node: Inert) -> LazyTensor:
    if len(node.args) < 4:
        raise CorruptFileError("a tensor is rebuilt from too few arguments")
    storage, offset, shape, strides = node.args[:4]
    stored = objects.tensor(storage, offset, shape, strides, None, node.args[4] if len(node.args) > 4 else False)
    return _resolved(stored, node.args[6] if len(node.args) > 6 else None)


def _v3(objects: TorchObjects, node: Inert) -> LazyTensor:
    if len(node.args) < 7:
        raise CorruptFileError("a tensor is rebuilt from too few arguments")
    storage, offset, shape, strides, requires_grad = node.args[:5]
    stored = objects.tensor(storage, offset, shape, strides, _dtype(node.args[6]), requires_grad)
    return _resolved(stored, node.args[7] if len(node.args) > 7 else None)


def _resolved(stored: LazyTensor, bits: Any) -> LazyTensor:
    """The tensor with the conjugate and minus sign that torch may keep beside the bytes (the last argument of a rebuild call)."""
    marks = items_of(bits) if is_mapping(bits) else {}
    if not (marks.get("conj") or marks.get("neg")):
        return stored
    params = {"conj": bool(marks.get("conj")), "neg": bool(marks.get("neg"))}
    block = Block("workbench.formats.torch_kernels:resolve", params, (stored,), (stored.spec,))
    return replace(stored, source=Derived(block, 0))


def _subclass(objects: TorchObjects, node: Inert) -> Any:
    """`_rebuild_from_type_v2(func, class, args, state)`: the tensor it wraps, inside the inert call."""
    if len(node.args) == 4 and isinstance(node.args[0], Global) and isinstance(node.args[2], tuple):
        inner = objects.construct(Inert(node.args[0], node.args[2]))
        return Inert(node.func, (node.args[0], node.args[1], inner, node.args[3]))
    return node


def _meta(objects: TorchObjects, node: Inert) -> LazyTensor:
    dtype, shape, strides = node.args[:3]
    spec = TensorSpec(_dtype(dtype), sizes(shape))
    return LazyTensor(spec, Stored(_Nowhere(0), 0, sizes(strides)), False, "a meta tensor: it was saved without values")


def _parameter(objects: TorchObjects, node: Inert) -> Inert:
    """`_rebuild_parameter(data, requires_grad, hooks)`: the flag belongs to the tensor that people see."""
    if len(node.args) >= 2 and isinstance(node.args[0], LazyTensor):
        node.args = (replace(node.args[0], requires_grad=bool(node.args[1])), *node.args[1:])
    return node


_LAYOUT_PARTS = {"sparse_coo": 2, "sparse_csr": 3, "sparse_csc": 3, "sparse_bsr": 3, "sparse_bsc": 3}


def _sparse(objects: TorchObjects, node: Inert) -> Any:
    """`_rebuild_sparse_tensor(layout, (indices…, values, size, coalesced))` as one tensor of that layout, densified only when loaded."""
    layout = node.args[0]
    name = layout.args[0] if isinstance(layout, Inert) and layout.args else layout.name if isinstance(layout, Global) else ""
    name = str(name).removeprefix("torch.")
    data = node.args[1] if len(node.args) == 2 else None
    count = _LAYOUT_PARTS.get(name)
    if (
        count is None
        or not isinstance(data, tuple)
        or len(data) < count + 1
        or not all(isinstance(part, LazyTensor) for part in data[:count])
    ):
        return node
    parts, spec = data[:count], TensorSpec(data[count - 1].dtype, sizes(data[count]), layout=name)
    peak = 2 * sum(part.nbytes for part in parts)
    params: dict[str, Any] = {"layout": name, "shape": list(spec.shape)}
    if len(data) > count + 1:
        params["coalesced"] = bool(data[count + 1])
    return LazyTensor(spec, Derived(Block("workbench.formats.torch_kernels:sparse", params, tuple(parts), (spec,), "full", peak=peak), 0))


def _quantized(objects: TorchObjects, node: Inert) -> Any:
    """`_rebuild_qtensor(storage, offset, size, stride, (qscheme, …), requires_grad, hooks)` as one quantized tensor."""
    if len(node.args) < 5 or not isinstance(node.args[4], tuple) or not node.args[4] or not isinstance(node.args[4][0], Global):
        raise CorruptFileError("a quantized tensor is rebuilt from too few arguments")
    storage, offset, shape, strides = node.args[:4]
    stored = objects.tensor(storage, offset, shape, strides, None)
    scheme, *rest = node.args[4]
    tensors = tuple(part for part in rest if isinstance(part, LazyTensor))
    params = {"scheme": scheme.name, "numbers": [part for part in rest if isinstance(part, (int, float))], "shape": list(stored.shape)}
    spec = TensorSpec(stored.dtype, stored.shape, quantizer=scheme.name)
    block = Block(
        "workbench.formats.torch_kernels:quantized",
        {**params, "dtype": stored.dtype.name},
        (stored, *tensors),
        (spec,),
        "full",
        peak=3 * stored.nbytes,
    )
    return LazyTensor(spec, Derived(block, 0), locked=stored.locked)


def _set(objects: TorchObjects, node: Inert) -> Any:
    return set(node.args[0]) if len(node.args) == 1 and isinstance(node.args[0], list) else node


def _ordered(objects: TorchObjects, node: Inert) -> Any:
    """`OrderedDict([[key, value], …])`, the spelling of Python 2, as items."""
    if (
        len(node.args) == 1
        and isinstance(node.args[0], (list, tuple))
        and all(isinstance(p, (list, tuple)) and len(p) == 2 for p in node.args[0])
    ):
        node.items.update(dict(node.args[0]))
        node.args = ()
    return node


_REBUILDS: dict[str, Callable[[TorchObjects, Inert], Any]] = {
    "torch._utils._rebuild_tensor": _v2,
    "torch._utils._rebuild_tensor_v2": _v2,
    "torch._utils._rebuild_tensor_v3": _v3,
    "torch._utils._rebuild_meta_tensor_no_storage": _meta,
    "torch._utils._rebuild_sparse_tensor": _sparse,
    "torch._utils._rebuild_qtensor": _quantized,
    "torch._tensor._rebuild_from_type_v2": _subclass,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "builtins.set": _set,
    "collections.OrderedDict": _ordered,
}


def danger_findings(machine: Machine) -> list[Finding]:
    """One finding for each global that is not plain data: named, with where it stands and whether it would be called."""
    out = []
    for found, offset in machine.globals.items():
        if found.dotted not in PLAIN:
            called = "would call" if found.dotted in machine.calls else "refers to"
            message = f"the pickle {called} {found.dotted}, which is not plain data; it was not imported"
            out.append(
                Finding(
                    "forbidden global",
                    "danger",
                    message,
                    {"global": found.dotted, "offset": offset},
                    "values stay readable here; plain torch.load would need this name allowed",
                )
            )
    for dotted, offset in machine.calls.items():
        if dotted == "the result of a call":
            out.append(
                Finding("forbidden call", "danger", "the pickle calls the result of another call; it was not made", {"offset": offset})
            )
    return out


def device_finding(storages: Iterable[StorageRef]) -> list[Finding]:
    places: dict[str, int] = {}
    for storage in storages:
        if not storage.place.startswith("cpu"):
            places[storage.place] = places.get(storage.place, 0) + 1
    return [
        Finding(
            "device storages",
            "info",
            f"{count} storages were saved on {place!r}; they are read into main memory",
            {"device": place},
            'plain torch.load needs map_location="cpu" where that device is missing',
        )
        for place, count in places.items()
    ]
