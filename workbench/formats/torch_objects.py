"""What the torch family puts into a pickle: storages and tensors.

Owns the meaning of torch's persistent ids and rebuild functions. Everything else stays inert; known_globals says what of it is plain.

Source: torch 2.13 torch/_utils.py (rebuild functions), torch/serialization.py (persistent ids).
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import lru_cache
from itertools import repeat
from typing import Any, ClassVar, NamedTuple

from workbench.checkpoint import Checkpoint, Finding, Severity
from workbench.dtypes import DTYPES, SUB_BYTE, DType
from workbench.errors import CorruptFileError, FormatError, UnsupportedError
from workbench.files import FileRef, Storage
from workbench.formats.known_globals import ALL_STORAGE_DTYPES, PLAIN, STATEFUL, WRAPPER, Names, danger_findings, misuses
from workbench.formats.numpy_objects import numpy_number
from workbench.formats.pickle_vm import SET_STATE, Machine
from workbench.formats.python_objects import made_mapping, made_set, made_value
from workbench.formats.torch_states import Nowhere, old_parameter, old_tensor, parameter, set_state, with_attributes
from workbench.strided import extent, row_major
from workbench.tensors import Block, Derived, LazyTensor, Reads, Stored, TensorSpec
from workbench.tree import SUBCLASSES, Global, Inert, is_mapping, is_module, items_of, tensors_aside, walk, wrapped

Counts = tuple[int, ...]
_MAX_TROUBLES = 200
_MAX_COPIED = 1 << 28
_KERNELS = "workbench.formats.torch_kernels"
_NBYTES = operator.attrgetter("nbytes")


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


class Form(NamedTuple):
    """What tensors of one kind have in common, in a run of them."""

    spec: TensorSpec
    numel: int
    nbytes: int
    place: str
    strides: Counts
    requires_grad: bool


class Bare(LazyTensor):
    """A storage that stands by itself in a pickle: the flat tensor that it is, until a rebuild call takes it."""

    ref: StorageRef


class TorchObjects:
    """Turns the persistent ids and rebuild calls of one pickle into storages and tensors.

    `locate(key)` gives the bytes of one storage or raises FormatError; a storage is located once. `locate_all(keys)` does so
    for many that lie as torch lays them, and is None where one does not.
    """

    rebuilds: ClassVar[dict[str, Callable[[Any, Inert], Any]]]  # what is made of the calls of a function, by its dotted name

    def __init__(
        self,
        locate: Callable[[str], Storage],
        byteorder: str = "little",
        locate_all: Callable[[Iterable[str]], list[Storage] | None] | None = None,
    ) -> None:
        self._locate = locate
        self._locate_all = locate_all
        self._byteorder = byteorder
        self._storages: dict[str, StorageRef] = {}
        self._runs: list[tuple[list[str], Sequence[Form], list[Storage]]] = []  # the storages of runs, which are rarely asked for again
        self._run_keys: set[str] = set()
        self.places: Counter[str] = Counter()  # storages by where they were saved
        self.troubles: list[Finding] = []
        self._told: set[tuple[str, str]] = set()
        self.aside: list[Any] = []  # what objects hold beside what is listed of them
        self.encoded: dict[int, tuple[str, bytes]] = {}  # byte strings that were spelled as text, by the text's id
        self.read: list[Any] = []  # byte strings that were read as files
        self.unclear = False  # whether a text was encoded in a way that is not followed
        self._spent = 0
        self.strangers: list[Inert] = []  # what was made of classes and functions that are not plain

    @property
    def storages(self) -> dict[str, StorageRef]:
        """Every storage met, by its key."""
        for run in self._runs:
            for key, form, storage in zip(*run, strict=True):
                self._storages[key] = StorageRef(key, form.spec.dtype, form.numel, form.place, storage, None)
        self._runs.clear()
        return self._storages

    def persistent(self, pid: Any) -> Any:
        """What a persistent id stands for: a storage, or a class that has its source beside it.

        ("storage", class, key, place, numel[, view of it: (key, offset, numel) or None]) · ("module", class, file, source)
        """
        if isinstance(pid, tuple) and len(pid) == 4 and pid[0] == "module":
            self.strangers.append(Inert(pid[1], (), None, True, elements=[pid]))
            return pid[1]
        ref = self.ref(pid)
        spec, stored = TensorSpec(ref.dtype or DTYPES["uint8"], (ref.numel,)), ref.stored or Nowhere(ref.nbytes)
        bare = Bare(spec, Stored(stored, 0, (1,), self._byteorder), False, ref.trouble)
        bare.__dict__["ref"] = ref
        return bare

    def ref(self, pid: Any) -> StorageRef:
        if not (isinstance(pid, (tuple, list)) and len(pid) >= 5 and pid[0] == "storage" and isinstance(pid[1], Global)):
            raise CorruptFileError("a persistent id does not describe a storage")
        _, cls, key, place, numel = pid[:5]
        key = str(key) if type(key) is int else key
        known = self.storages.get(key) if isinstance(key, str) else None
        dtype = storage_dtype(cls)
        if known is not None and known.dtype == dtype and known.numel == numel:
            ref = known
        elif isinstance(key, str) and isinstance(place, str) and _is_count(numel):
            ref = self._storage(key, dtype, numel, place, known)
            self.storages.setdefault(key, ref)
        else:
            raise CorruptFileError("a persistent id does not describe a storage")
        return ref if len(pid) == 5 or pid[5] is None else _view(ref, pid[5])

    def template_tensor(
        self, cls: Global, place: str, key: str, numel: int, offset: int, shape: Counts, strides: Counts, requires_grad: bool
    ) -> LazyTensor:
        """`persistent` and `_rebuild_tensor_v2` at once, for the machine's fast path: a whole storage, met for the first time."""
        spec = _plain_spec(cls, numel, offset, shape, strides)
        if spec is None or key in self.storages:
            return self.tensor(self.ref(("storage", cls, key, place, numel)), offset, shape, strides, None, requires_grad)
        ref = self.storages[key] = self._storage(key, spec.dtype, numel, place, None)
        source = Stored(ref.stored or Nowhere(ref.nbytes), 0, strides, self._byteorder)
        return LazyTensor(spec, source, requires_grad, ref.trouble)

    def form(self, cls: Global, place: str, numel: int, offset: int, shape: Counts, strides: Counts, grad: bool) -> Form | None:
        """What a run's tensors of one kind share, where such a tensor is one whole storage."""
        spec = _plain_spec(cls, numel, offset, shape, strides)
        return None if spec is None else Form(spec, numel, numel * spec.dtype.itemsize, place, strides, grad)

    def run(self, keys: list[str], forms: Sequence[Form]) -> list[LazyTensor] | None:
        """The tensors of a run, each on a storage met for the first time; None where that is not so, or a storage is not as long as told."""
        storages = self._locate_all(keys) if self._locate_all is not None else None
        specs, _, nbytes, places, strides, grads = zip(*forms, strict=True)
        if storages is None or list(map(_NBYTES, storages)) != [*nbytes] or not self._run_keys.isdisjoint(keys):
            return None
        before = len(self._run_keys)
        self._run_keys.update(keys)
        if len(self._run_keys) != before + len(keys) or not self._storages.keys().isdisjoint(keys):
            return None
        self._runs.append((keys, forms, storages))
        self.places.update(places)
        sources = map(tuple.__new__, repeat(Stored), zip(storages, repeat(0), strides, repeat(self._byteorder)))
        return list(map(LazyTensor, specs, sources, grads))

    def _storage(self, key: str, dtype: DType | None, numel: int, place: str, known: StorageRef | None) -> StorageRef:
        trouble: str | None
        self.places[place] += known is None
        if known is not None:
            trouble = f"storage {key!r} is described twice, as {known.numel} × {known.dtype or 'byte'} and as {numel} × {dtype or 'byte'}"
            self._lock(trouble, key)
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
            self._lock(trouble, key)
        return StorageRef(key, dtype, numel, place, stored, trouble)

    def tell(self, kind: str, severity: Severity, message: str, where: dict[str, Any], hint: str | None = None) -> None:
        """Keep a finding; of very many, the first."""
        if len(self._told) < _MAX_TROUBLES and (kind, message) not in self._told:
            self._told.add((kind, message))
            many = len(self._told) == _MAX_TROUBLES
            self.troubles.append(
                Finding("more findings", severity, "there are more of these than are listed")
                if many
                else Finding(kind, severity, message, where, hint)
            )

    def _lock(self, trouble: str, key: str) -> None:
        self.tell("values locked", "danger", trouble, {"record": key}, "the tensors on it are listed; their values are refused")

    def spend(self, nbytes: int) -> None:
        """Pay for a copy of what a pickle may name any number of times."""
        self._spent += nbytes
        if self._spent > _MAX_COPIED:
            raise UnsupportedError("the pickle copies its containers and byte strings beyond all measure")

    def construct(self, node: Inert) -> Any:
        """The tensor that a rebuild call makes, or the call itself, inert; None where a state went into a tensor."""
        func = node.func
        if func is SET_STATE:
            return set_state(self, node)
        if type(func) is not Global:
            return node
        dotted = func.dotted
        if dotted not in PLAIN or dotted in STATEFUL:
            self.strangers.append(node)
        if node.kwargs or not isinstance(node.args, tuple):
            self.aside += [node.args, node.kwargs]
            return node
        build = self.rebuilds.get(dotted)
        try:
            return node if build is None else build(self, node)
        except FormatError:
            raise
        except ValueError as error:
            raise CorruptFileError(f"{dotted} is called with arguments of another kind") from error

    def tensor(
        self, storage: Any, offset: Any, shape: Any, strides: Any, dtype: DType | None = None, requires_grad: Any = False
    ) -> LazyTensor:
        """A strided view of a storage, checked against the storage's length.

        Raises:
            CorruptFileError: the arguments are not what torch writes.
        """
        shape, strides = sizes(shape), _checked_strides(strides)
        storage = storage.ref if isinstance(storage, Bare) else storage
        if not isinstance(storage, StorageRef) or len(shape) != len(strides) or type(offset) is not int or offset < 0:
            raise CorruptFileError("a tensor is rebuilt from something that is no storage, offset, size and stride")
        dtype = dtype or storage.dtype
        if dtype is None:
            raise CorruptFileError("a tensor on an untyped storage states no dtype")
        spec = TensorSpec(dtype, shape)
        trouble = storage.trouble
        span = extent(shape, strides)
        if trouble is None and span and (offset + span) * dtype.itemsize > storage.nbytes:
            trouble = f"the tensor reaches past the end of storage {storage.key!r} ({storage.nbytes} bytes)"
            self._lock(trouble, storage.key)
        nowhere = Nowhere(storage.nbytes) if storage.stored is None else storage.stored
        order = self._byteorder if storage.dtype else "little"  # torch swaps the bytes of typed storages only
        return LazyTensor(spec, Stored(nowhere, offset, strides, order), bool(requires_grad), trouble)


def _view(ref: StorageRef, view: Any) -> StorageRef:
    """A part of a storage, as files of the first torch versions name it: (key, offset, numel) in elements."""
    if not (isinstance(view, tuple) and len(view) == 3 and _is_count(view[1]) and _is_count(view[2]) and view[1] + view[2] <= ref.numel):
        raise CorruptFileError("a persistent id does not describe a part of its storage")
    itemsize = ref.dtype.itemsize if ref.dtype else 1
    stored: Any = ref.stored
    return ref._replace(numel=view[2], stored=stored and stored.part(view[1] * itemsize, view[2] * itemsize))


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def sizes(value: Any) -> Counts:
    """A size as a tuple of counts, checked."""
    value = _checked_strides(value)
    return _checked_sizes(value) if value else value


def _checked_strides(value: Any) -> Counts:
    if isinstance(value, Inert) and value.dotted == "torch.Size" and len(value.args) == 1:
        value = value.args[0]
    if not (isinstance(value, (tuple, list)) and len(value) <= 64 and all(map(_is_count, value))):
        raise CorruptFileError("a tensor's size or stride is not a tuple of counts")
    return value if type(value) is tuple else tuple(value)


@lru_cache(maxsize=4096)
def _checked_sizes(value: Counts) -> Counts:
    if math.prod(value) >= 1 << 63:
        raise CorruptFileError("a tensor is said to have more elements than torch can count")
    return value


@lru_cache(maxsize=4096)
def _plain_spec(cls: Global, numel: int, offset: int, shape: Counts, strides: Counts) -> TensorSpec | None:
    """The spec of a tensor that lies at the start of its typed storage and inside it; None where it is less plain than that."""
    dtype = storage_dtype(cls)
    if dtype is None or offset or numel < 0 or len(shape) != len(strides) or extent(sizes(shape), _checked_strides(strides)) > numel:
        return None
    return TensorSpec(dtype, shape)


@lru_cache(maxsize=64)
def storage_dtype(cls: Global) -> DType | None:
    if cls.dotted in ("torch.storage.UntypedStorage", "torch.UntypedStorage"):
        return None
    name = ALL_STORAGE_DTYPES.get(cls.name)
    if name is None:
        raise CorruptFileError(f"{cls.dotted} is no kind of storage that torch writes")
    return DTYPES[name]


def _dtype(value: Any) -> DType:
    found = DTYPES.get(value.name) or SUB_BYTE.get(value.name) if isinstance(value, Global) and value.module == "torch" else None
    if found is not None:
        return found
    what = value.dotted if isinstance(value, Global) else f"a {type(value).__name__}"
    raise CorruptFileError(f"{what} is no element type that torch stores")


def _v2(objects: TorchObjects, node: Inert) -> LazyTensor:
    storage, offset, shape, strides, *rest = node.args
    stored = objects.tensor(storage, offset, shape, strides, requires_grad=rest[0] if rest else False)
    return _resolved(stored, rest[2] if len(rest) > 2 else None)


def _v3(objects: TorchObjects, node: Inert) -> LazyTensor:
    storage, offset, shape, strides, requires_grad, _, named, *bits = node.args
    dtype = _dtype(named)
    if dtype.name in SUB_BYTE:
        message = f"tensors of {dtype} hold one element in each byte; torch can name this type, and neither saves it nor computes with it"
        objects.tell("element type", "info", message, {"dtype": dtype.name})
    return _resolved(objects.tensor(storage, offset, shape, strides, dtype, requires_grad), bits[0] if bits else None)


def _resolved(stored: LazyTensor, bits: Any) -> LazyTensor:
    """The tensor with the conjugate and minus sign that torch may keep beside the bytes (the last argument of a rebuild call)."""
    marks = items_of(bits) if is_mapping(bits) else {}
    params = {name: name in marks for name in ("conj", "neg")}  # torch looks for the names and not at their values
    if not any(params.values()):
        return stored
    return _derived("resolve", params, (stored,), stored.spec, requires_grad=stored.requires_grad, locked=stored.locked)


def _derived(kernel: str, params: dict[str, Any], parts: tuple[LazyTensor, ...], spec: TensorSpec, **flags: Any) -> LazyTensor:
    reads: Reads = "elements" if kernel in ("resolve", "to_dtype") else "full"
    peak = 3 * sum(part.nbytes for part in parts)
    parts = tuple(map(replace, parts))  # a state that a part is given later is not this tensor's
    return LazyTensor(spec, Derived(Block(f"{_KERNELS}:{kernel}", params, parts, (spec,), reads, peak=peak), 0), **flags)


def _subclass(objects: TorchObjects, node: Inert) -> Any:
    """`_rebuild_from_type_v2(func, class, args, state)`: the tensor that `func` makes; the call as it is, where its tensors lie in the state."""
    if len(node.args) != 4 or not isinstance(node.args[0], Global) or not isinstance(node.args[2], tuple):
        return node
    func, cls, args, state = node.args
    inner = wrapped(objects.construct(Inert(func, args)))
    if isinstance(inner, LazyTensor):
        return Inert(node.func, (func, cls, *with_attributes(objects, inner, state, node.dotted == WRAPPER)))
    if not (len(args) == 1 and is_mapping(args[0])):  # of a jagged tensor, whose parts are listed
        objects.aside.append(args)
    if isinstance(cls, Global) and cls.name in ("DTensor", "ShardedTensor"):
        message = f"{cls.name}s are listed as the part that this process held; the rest is in the files of the other ranks"
        objects.tell("one rank's part", "warning", message, {"class": cls.dotted})
    return node


def _nested(objects: TorchObjects, node: Inert) -> Inert:
    message = "a nested tensor is listed as its parts: values one after another, then the sizes, strides and offsets of the tensors in it"
    objects.tell("nested tensor", "info", message, {})
    return node


def _meta(objects: TorchObjects, node: Inert) -> LazyTensor:
    dtype, shape, _, *grad = node.args
    spec, why = TensorSpec(_dtype(dtype), sizes(shape)), "a meta tensor: it was saved without values"
    return LazyTensor(spec, Stored(Nowhere(0), 0, row_major(spec.shape)), bool(grad and grad[0]), why)


def _lazy(objects: TorchObjects, node: Inert) -> LazyTensor:
    why = "a lazy parameter: it has no shape and no values yet"
    return LazyTensor(TensorSpec(DTYPES["float32"], ()), Stored(Nowhere(0), 0, ()), bool(node.args and node.args[0]), why)


def _from_device(objects: TorchObjects, node: Inert) -> Any:
    """`_rebuild_device_tensor_from_…(data, dtype, device, requires_grad)`: values that were brought to main memory to be saved."""
    if len(node.args) != 4 or type(data := node.args[0]) is not LazyTensor:
        return node
    spec = TensorSpec(_dtype(node.args[1]), data.shape)
    made = data if spec == data.spec else _derived("to_dtype", {"dtype": spec.dtype.name}, (data,), spec, locked=data.locked)
    return replace(made, requires_grad=bool(node.args[3]))


_LAYOUT_PARTS = {"sparse_coo": 2, "sparse_csr": 3, "sparse_csc": 3, "sparse_bsr": 3, "sparse_bsc": 3}


def _sparse(objects: TorchObjects, node: Inert) -> Any:
    """`_rebuild_sparse_tensor(layout, (indices…, values, size[, coalesced]))` or `torch.sparse.FloatTensor(indices, values, size)`."""
    layout, data = (Global("torch", "sparse_coo"), node.args) if ".sparse." in node.dotted else node.args
    name = layout.args[0] if isinstance(layout, Inert) and layout.args else layout.name if isinstance(layout, Global) else ""
    name = str(name).removeprefix("torch.")
    count = _LAYOUT_PARTS.get(name, 99)
    if not isinstance(data, tuple) or len(data) <= count or not all(isinstance(part, LazyTensor) for part in data[:count]):
        return node
    return sparse_tensor(name, data[:count], sizes(data[count]), *data[count + 1 : count + 2])


def sparse_tensor(layout: str, parts: tuple[LazyTensor, ...], shape: Counts, coalesced: Any = None) -> LazyTensor:
    """A tensor of a sparse layout from its index parts and values, densified only when elements are read."""
    params = {"layout": layout, "shape": list(shape), **({} if coalesced is None else {"coalesced": bool(coalesced)})}
    locked = next((part.locked for part in parts if part.locked), None)
    return _derived("sparse", params, parts, TensorSpec(parts[-1].dtype, shape, layout), locked=locked)


_PACKED = {"quint4x2": 2, "quint2x4": 4}  # values in one byte


def _quantized(objects: TorchObjects, node: Inert) -> LazyTensor:
    """`_rebuild_qtensor(storage, offset, size, stride, (qscheme, …), requires_grad, hooks)` as one quantized tensor."""
    storage, offset, shape, strides, (scheme, *rest), *grad = node.args
    if not isinstance(scheme, Global):
        raise CorruptFileError("a quantized tensor is rebuilt without a scheme")
    shape, packed = sizes(shape), _PACKED.get(storage.dtype.name) if isinstance(storage, Bare) else None
    lies = ((-(-math.prod(shape) // packed),), (1,)) if packed else (shape, strides)
    stored = objects.tensor(storage, offset, *lies)
    params = {
        "scheme": scheme.name, "numbers": [part for part in rest if isinstance(part, (int, float, list))], "shape": list(shape),
        "strides": list(_checked_strides(strides)) if packed else None, "dtype": stored.dtype.name,
    }  # fmt: skip
    parts = (stored, *(part for part in rest if isinstance(part, LazyTensor)))
    doubt = None if _is_quantizer(scheme.name, rest, shape) else "the scales and zero points of a quantized tensor do not fit its shape"
    if doubt:
        objects.tell("values locked", "danger", doubt, {"shape": list(shape)})
    spec, grads = TensorSpec(stored.dtype, shape, quantizer=scheme.name), bool(grad and grad[0])
    return _derived("quantized", params, parts, spec, requires_grad=grads, locked=stored.locked or doubt)


def _is_quantizer(scheme: str, parts: list[Any], shape: Counts) -> bool:
    """Whether a scale and zero point are of the right kind, and one for each channel where there are channels; torch does not check it."""
    if scheme == "per_tensor_affine":
        return len(parts) == 2 and type(parts[0]) in (int, float) and type(parts[1]) is int
    if len(parts) != 3 or scheme not in ("per_channel_affine", "per_channel_affine_float_qparams") or not _is_count(parts[2]):
        return False
    lengths = [part.shape if isinstance(part, LazyTensor) else (len(part),) if isinstance(part, list) else None for part in parts[:2]]
    return parts[2] < len(shape) and lengths == [(shape[parts[2]],)] * 2


def _named(names: str, build: Callable[[TorchObjects, Inert], Any]) -> dict[str, Callable[[TorchObjects, Inert], Any]]:
    return dict.fromkeys(names.split(), build)


_KINDS = ("", "Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
TorchObjects.rebuilds = {
    **{f"numpy.{core}.multiarray.scalar": lambda _, node: numpy_number(node) for core in ("core", "_core")},
    **{f"torch{where}.{kind}Tensor": old_tensor for where in ("", ".cuda") for kind in _KINDS},
    **{f"torch{where}.sparse.{kind}Tensor": _sparse for where in ("", ".cuda") for kind in _KINDS},
    **{
        f"torch._utils._rebuild_{name}": build
        for name, build in {
            **_named("tensor tensor_v2", _v2), "tensor_v3": _v3, "meta_tensor_no_storage": _meta, "nested_tensor": _nested, "sparse_tensor": _sparse,
            "qtensor": _quantized, **_named("parameter parameter_with_state", parameter),
            **_named("device_tensor_from_numpy device_tensor_from_cpu_tensor xla_tensor", _from_device),
        }.items()
    },
    **dict.fromkeys(SUBCLASSES, _subclass),
    **_named("torch.nn.parameter.Parameter torch.autograd.variable.Variable torch.autograd.Variable", old_parameter),
    **_named("torch.nn.parameter.UninitializedParameter torch.nn.parameter.UninitializedBuffer", _lazy),
    **_named("builtins.complex builtins.bytes builtins.bytearray _codecs.encode", made_value),
    **_named("collections.Counter collections.OrderedDict collections.defaultdict builtins.dict", made_mapping),
    "builtins.set": made_set,
}  # fmt: skip


class Run(NamedTuple):
    """One run of a machine, for whoever asks the same of the same bytes."""

    file: FileRef
    machine: Machine
    strangers: list[Inert]
    misused: dict[str, str]
    texts: list[Any]  # byte strings
    read: list[Any]  # those that were read as files of their own, and what was found in them told


_WATCHED: ContextVar[list[Run] | None] = ContextVar("watched", default=None)
COUNTED: ContextVar[tuple[Machine, list[int]] | None] = ContextVar("counted", default=None)  # what runs, and the counts of what is inside


@contextmanager
def watched_runs() -> Iterator[list[Run]]:
    """The runs of `unpickle` inside, as they come."""
    runs = list[Run]()
    token = _WATCHED.set(runs)
    try:
        yield runs
    finally:
        _WATCHED.reset(token)


@contextmanager
def counted(run: Machine) -> Iterator[None]:
    """Bound what runs inside together, however files and pickles nest: each begins with all that was done before, and ends with its own."""
    outer, inner = COUNTED.get(), [0, 0]
    ran, built = run.ran, run.built = (outer[0].ran, outer[0].built) if outer else (0, 0)
    token = COUNTED.set((run, inner))
    try:
        yield
    finally:
        COUNTED.reset(token)
        if outer is not None:
            outer[0].ran, outer[0].built = run.ran, run.built
            outer[1][:] = outer[1][0] + run.ran - ran, outer[1][1] + run.built - built
        if not run.is_spent:
            run.ran, run.built = run.ran - ran - inner[0], run.built - built - inner[1]


class Unpickled(NamedTuple):
    """What one pickle holds, the machine that read it, and what a reader should know of it."""

    tree: Any
    machine: Machine
    findings: tuple[Finding, ...]


def unpickle(
    data: bytes,
    objects: TorchObjects,
    *,
    file: FileRef,
    format: str,
    record: str | None = None,
    start: int = 0,
    plain: Names = (),
    machine: type[Machine] = Machine,
    entries: Callable[[Machine, int], bool] | None = None,
) -> Unpickled:
    """Read one pickle of a torch file symbolically.

    Args:
        record: its name in the container, for messages.
        plain: globals that are plain in this container, besides those that always are.
        machine: what runs it, where a container spells opcodes in its own way.
        entries: carries out at once what a container holds very many of.
    Raises:
        FormatError: the C unpickler would refuse it; `.partial` holds what was listed until there.
    """
    run = machine(data, persistent=objects.persistent, construct=objects.construct, torch=objects, entries=entries, start=start)

    def told() -> list[Finding]:
        misused = misuses(objects.strangers, run.globals, run.states)
        if (watched := _WATCHED.get()) is not None and not objects.unclear:
            texts = [*run.texts, *(data for _, data in objects.encoded.values())]
            watched.append(Run(file, run, objects.strangers, misused, texts, objects.read))
        return danger_findings(run, objects.strangers, plain, misused) + objects.troubles

    try:
        with counted(run):
            tree = run.run()
    except FormatError as error:
        if record is not None:
            error.where.setdefault("record", record)
        error.partial = Checkpoint(run.partial(), name=file.name, format=format, findings=tuple(told()), source=file)
        error.short = run.short
        raise
    found = (*told(), *device_finding(objects.places), *_model_finding(objects.strangers), *_aside_finding(objects.aside))
    return Unpickled(tree, run, found)


def _aside_finding(aside: list[Any]) -> list[Finding]:
    """What a pickle says of tensors that lie where no name leads: in attributes of containers and tensors, or in calls not followed."""
    count = sum(isinstance(leaf, LazyTensor) for _, leaf in walk(aside))
    message = f"{count} tensors are not listed: they lie in attributes of containers and tensors, or in calls that are not followed"
    return [Finding("tensors not listed", "warning", message, {"count": count})] if count else []


def _model_finding(made: Iterable[Inert]) -> list[Finding]:
    """What a pickle says of the modules in it: how many of which class, and the tensors that no state dict of theirs would hold."""
    modules = [node for node in made if is_module(node)]
    if not modules:
        return []
    classes = Counter(node.dotted for node in modules)
    shown = [f"{count} × {cls.rpartition('.')[2]}" for cls, count in classes.most_common(6)] + ["…"] * (len(classes) > 6)
    message = f"a model is pickled whole: {', '.join(shown)}"
    aside = [f"{node.dotted.rpartition('.')[2]}.{name}" for node in modules for name in tensors_aside(node)]
    if aside:
        message += f"; left out, as its state dict leaves them out: {', '.join(aside[:4] + ['…'] * (len(aside) > 4))}"
    hint = "its tensors have the names of its state dict; ckpt.modules lists the class of each module"
    return [Finding("whole model", "info", message, {"classes": dict(classes.most_common(100)), "left out": aside[:100]}, hint)]


def trailing_finding(nbytes: int, record: str) -> Finding:
    return Finding("bytes after the pickle", "warning", f"{nbytes} bytes follow the end of {record}'s object", {"record": record})


def device_finding(places: Mapping[str, int]) -> list[Finding]:
    hint = 'plain torch.load needs map_location="cpu" where that device is missing'
    told = [(place, f"{count} storages were saved on {place!r}; they are read into main memory") for place, count in places.items()]
    return [Finding("device storages", "info", text, {"device": place}, hint) for place, text in told if not place.startswith("cpu")]
