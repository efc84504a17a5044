"""Tensors that have not been read: what they are (TensorSpec) and where they come from (a source).

    Stored    a view of stored bytes in a file
    Live      a tensor of this process, viewed and not copied
    Derived   one slot of a Block: the deferred result of a kernel over other tensors

A LazyTensor is read by flat logical range, so a tensor streams whatever its shape or strides. Kernels are module-level
functions named by string, so Blocks pickle. torch is imported only when values are read; specs, `raw` and `peek` need none.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from itertools import repeat
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from workbench import dtypes
from workbench.dtypes import DType
from workbench.errors import BudgetError, CorruptFileError, SpecMismatchError, located
from workbench.files import Span, Storage, read_span
from workbench.strided import View, boxes, is_row_major, load_view, read_flat, row_major

if TYPE_CHECKING:
    import torch

_MAX_DENSE = 2 << 30  # a sparse tensor is made dense up to this size
made: Any = tuple.__new__  # a NamedTuple of (class, values), in half of the time
HOT_NBYTES = 2 << 20  # a chunk that stays near its core, and large enough that Python's share of a step is small


@dataclass(frozen=True)
class TensorSpec:
    """Logical element type and shape. `layout` is torch's word; `quantizer` describes a torch-quantized tensor."""

    dtype: DType
    shape: tuple[int, ...]
    layout: str = "strided"
    quantizer: str | None = None

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


class Stored(NamedTuple):
    """A strided view of stored elements; `offset` and `strides` count elements."""

    storage: Storage
    offset: int
    strides: tuple[int, ...]
    byteorder: str = "little"


@dataclass(frozen=True, eq=False)
class Live:
    """A tensor of this process. Two of them are equal when they view the same memory in the same way."""

    tensor: torch.Tensor

    @property
    def storage_key(self) -> tuple[Any, ...]:
        storage, place = self.tensor.untyped_storage(), 0
        with suppress(RuntimeError):  # a subclass that wraps other tensors has no memory of its own
            place = storage.data_ptr()
        return (str(self.tensor.device), place or id(self.tensor), storage.nbytes())

    def _key(self) -> tuple[Any, ...]:
        if str(self.tensor.layout) != "torch.strided":
            return (id(self.tensor),)
        return (*self.storage_key, self.tensor.storage_offset(), self.tensor.stride())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Live) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())


Reads = Literal["elements", "rows", "scan", "full"]


@dataclass(frozen=True, eq=False)
class Block:
    """A deferred kernel call, with one declared result per slot.

    The kernel is ``(params, whole, blocks, at) -> sequence of torch.Tensor``:
        reads="elements": `blocks` are equal flat ranges of the rowed inputs, `at` their flat start; results are flat and as long.
        reads="rows": each rowed input in as many equal parts as `specs[0]` has rows, a part of which need be no row of its own: `blocks` are
            the same parts of each ([parts, …]), `at` the first; results are those rows. A tensor may give a slot another shape.
        reads="scan": `blocks` are iterators of (flat start, flat chunk); results are whole, and small.
        reads="full": `blocks` are whole tensors; refused where `peak` bytes pass the budget.
    `whole` inputs are always given entire. Identity is equality: one Block is one computation.
    """

    op: str
    params: dict[str, Any]
    rowed: tuple[LazyTensor, ...]
    specs: tuple[TensorSpec, ...]
    reads: Reads = "elements"
    whole: tuple[LazyTensor, ...] = ()
    peak: int = 0


@dataclass(frozen=True)
class Derived:
    block: Block
    slot: int


Source = Stored | Live | Derived


@dataclass
class Memo:
    """Results shared inside one pass: whole ones are kept, those of the current step are replaced by the next step's."""

    max_nbytes: int | None = None
    kept: dict[Block, tuple[torch.Tensor, ...]] = field(default_factory=dict)
    step: dict[tuple[Block, int, int], tuple[torch.Tensor, ...]] = field(default_factory=dict)


@dataclass(frozen=True, init=False)
class LazyTensor:
    """A tensor by description; its values are read on request.

    Attributes:
        locked: why the values may not be read (their own bytes are in doubt), or None.
        requires_grad: as the file recorded it.
    """

    spec: TensorSpec
    source: Source
    requires_grad: bool = False
    locked: str | None = None

    def __init__(self, spec: TensorSpec, source: Source, requires_grad: bool = False, locked: str | None = None) -> None:
        # three times as fast as what a frozen dataclass would do itself; a file has a hundred thousand of these
        own = self.__dict__
        own["spec"], own["source"], own["requires_grad"], own["locked"] = spec, source, requires_grad, locked

    @property
    def dtype(self) -> DType:
        return self.spec.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spec.shape

    @property
    def ndim(self) -> int:
        return len(self.spec.shape)

    @property
    def numel(self) -> int:
        return self.spec.numel

    @property
    def nbytes(self) -> int:
        return self.spec.nbytes

    @property
    def packing(self) -> str | None:
        """What the file calls its way of storing these values in fewer bits (Q4_K, INT4), or None."""
        return getattr(self.source.storage, "packing", None) if isinstance(self.source, Stored) else None

    @property
    def is_contiguous(self) -> bool:
        """Whether reading in logical order walks memory in order, without gaps."""
        if isinstance(self.source, Stored):
            return is_row_major(self.shape, self.source.strides)
        if isinstance(self.source, Live):
            return self.spec.layout != "strided" or self.source.tensor.is_contiguous()
        return all(tensor.is_contiguous for tensor in self.source.block.rowed)

    @property
    def offset(self) -> int | None:
        """Byte offset of the first element in its file, where the bytes lie there as they are."""
        source = self.source
        if isinstance(source, Stored) and isinstance(source.storage, Span):
            return source.storage.start + source.offset * self.dtype.itemsize
        return None

    def load(self) -> torch.Tensor:
        """The whole tensor, with the strides it was stored with where that wastes no memory.

        Raises:
            CorruptFileError: the values are locked. FileChangedError: the file is no longer the one opened.
        """
        self._require_unlocked()
        if isinstance(self.source, Live):
            return self.source.tensor.detach()
        if isinstance(self.source, Stored):
            return load_view(self.source.storage, self._view(self.source))
        memo = Memo()
        if self.source.block.reads in ("scan", "full"):
            return _whole(self.source, memo)
        import torch

        out = torch.empty(self.shape, dtype=dtypes.to_torch(self.dtype))
        flat = out.view(-1)
        for start, chunk in self.chunks():
            flat[start : start + chunk.numel()] = chunk
        return out

    def read(self, start: int, stop: int, memo: Memo | None = None) -> torch.Tensor:
        """Logical elements `start` to `stop`, flat. Quantized tensors give their stored integers."""
        self._require_unlocked()
        if isinstance(self.source, Stored):
            with self.source.storage.open() as reader:
                return read_flat(reader, self._view(self.source), start, stop)
        if isinstance(self.source, Live):
            return _read_live(self.source.tensor, start, stop)
        return _read_derived(self, self.source, start, stop, memo or Memo())

    def chunks(self, max_nbytes: int = HOT_NBYTES, memo: Memo | None = None) -> Iterator[tuple[int, torch.Tensor]]:
        """Every element once, in logical order, as (flat start, flat tensor of at most max(max_nbytes, one row) bytes)."""
        memo = memo or Memo()
        step = max(1, max_nbytes * self.numel // max(_read_nbytes(self), 1))
        if (row := _row_numel(self)) > 1:
            step = max(row, step // row * row)
        self._require_unlocked()
        with ExitStack() as stack:
            source = self.source
            reader = stack.enter_context(source.storage.open()) if isinstance(source, Stored) and self.numel else None
            for start in range(0, self.numel, step):
                stop = min(start + step, self.numel)
                if reader is not None and isinstance(source, Stored):
                    yield start, read_flat(reader, self._view(source), start, stop)
                else:
                    memo.step.clear()
                    yield start, self.read(start, stop, memo)

    def raw(self, start: int = 0, stop: int | None = None) -> bytes:
        """Stored bytes of a contiguous tensor, as they lie in the file; no torch.

        Raises:
            SpecMismatchError: the tensor is not contiguous in a file.
        """
        self._require_unlocked()
        if not (isinstance(self.source, Stored) and self.is_contiguous):
            raise SpecMismatchError("raw bytes exist only for tensors stored contiguously", hint="use load()")
        first = self.source.offset * self.dtype.itemsize
        return read_span(self.source.storage, first + start, first + (self.nbytes if stop is None else min(stop, self.nbytes)))

    def peek(self, count: int = 8) -> list[Any]:
        """The first elements as Python numbers; needs no torch for tensors that lie in a file."""
        self._require_unlocked()
        count = min(count, self.numel)
        if not isinstance(self.source, Stored):
            values: list[Any] = self.read(0, count).tolist() if count else []
            return values
        source, itemsize, out = self.source, self.dtype.itemsize, []
        if not count:
            return []
        with located(), source.storage.open() as reader:
            for index in range(count):
                buffer = bytearray(itemsize)
                steps = zip(self.shape, source.strides, row_major(self.shape), strict=True)
                at = source.offset + sum(index // inner % n * stride for n, stride, inner in steps)
                reader.readinto(memoryview(buffer), at * itemsize)
                out += dtypes.decode(self.dtype, bytes(buffer), source.byteorder)
        return out

    def _view(self, source: Stored) -> View:
        return View(self.dtype, self.shape, source.strides, source.offset, source.byteorder)

    def _require_unlocked(self) -> None:
        if self.locked is not None:
            raise CorruptFileError(
                f"the values are locked: {self.locked}", hint="shape and dtype are as the file says; the bytes behind them are in doubt"
            )

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        """For numpy: the values, read now."""
        values = self.load().numpy()
        return values if dtype is None else values.astype(dtype)

    def __repr__(self) -> str:
        return f"LazyTensor({self.dtype} {list(self.shape)}; not read: load() gives the tensor, peek() its first values)"


def stored_tensors(
    specs: Sequence[TensorSpec],
    storages: Iterable[Storage],
    strides: Iterable[tuple[int, ...]],
    byteorders: Iterable[str] = repeat("little"),
    locked: Iterable[str | None] = repeat(None),
) -> list[LazyTensor]:
    """Row-major tensors, each alone in its storage, column by column."""
    sources = map(made, repeat(Stored), zip(storages, repeat(0), strides, byteorders))
    return list(map(LazyTensor, specs, sources, repeat(False), locked))


def parts(tensor: LazyTensor) -> list[LazyTensor]:
    """The stored or live tensors that a derived one is computed from; any other tensor itself."""
    if not isinstance(tensor.source, Derived):
        return [tensor]
    block = tensor.source.block
    return [leaf for part in (*block.rowed, *block.whole) for leaf in parts(part)]


def spans_of(storage: Any) -> list[Span]:
    """The bytes of files behind a storage of any kind: itself, what it inflates or decodes, or the chunks it is put together from."""
    if isinstance(storage, Span):
        return [storage]
    return [
        span
        for inner in (getattr(storage, "span", None), getattr(storage, "whole", None), *getattr(storage, "chunks", ()))
        if inner is not None
        for span in spans_of(inner)
    ]


def _read_live(tensor: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    import torch

    tensor = _plain_values(tensor.detach())
    if tensor.is_contiguous():
        return tensor.view(-1)[start:stop].cpu()
    pieces = [tensor[prefix][low:high].cpu().reshape(-1) for prefix, low, high in boxes(tuple(tensor.shape), start, stop)]
    return torch.cat(pieces) if pieces else tensor.new_empty(0).cpu()


def kernel(op: str) -> Callable[..., Sequence[torch.Tensor]]:
    """The module-level kernel that ``module:function`` names, inside this package only."""
    module, _, name = op.partition(":")
    if not module.startswith("workbench."):
        raise SpecMismatchError(f"{op!r} names no kernel of this library")
    return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]


def _row_numel(tensor: LazyTensor) -> int:
    """Elements that must be read together: the longest row of any block in the chain above the stored bytes."""
    if not isinstance(tensor.source, Derived) or tensor.source.block.reads not in ("elements", "rows"):
        return 1
    block = tensor.source.block
    return _per_row(tensor, block) if block.reads == "rows" else max([1, *(_row_numel(t) for t in block.rowed)])


def _per_row(tensor: LazyTensor, block: Block) -> int:
    """Elements of an input or a result of `block` for each of its rows."""
    return max(1, tensor.numel // max(1, block.specs[0].shape[0]))


def _read_nbytes(tensor: LazyTensor) -> int:
    """Bytes of the largest tensor that is read in step with this one: a column of scales takes the whole matrix."""
    if not isinstance(tensor.source, Derived) or tensor.source.block.reads not in ("elements", "rows"):
        return tensor.nbytes
    return max([tensor.nbytes, *(_read_nbytes(t) for t in tensor.source.block.rowed)])


def _read_derived(tensor: LazyTensor, source: Derived, start: int, stop: int, memo: Memo) -> torch.Tensor:
    block = source.block
    if block.reads in ("scan", "full"):
        return _plain_values(_whole(source, memo)).reshape(-1)[start:stop]
    if block.reads == "elements":
        return _results(block, start, stop, memo)[source.slot]
    row = _per_row(tensor, block)
    first, last = start // row, -(-stop // row)
    return _results(block, first, last, memo)[source.slot].reshape(-1)[start - first * row : stop - first * row]


def _plain_values(tensor: torch.Tensor) -> torch.Tensor:
    """The numbers of a tensor of any kind: a sparse one densified, a quantized one as its stored integers."""
    import torch

    if tensor.layout is not torch.strided:
        if tensor.numel() * tensor.element_size() > _MAX_DENSE:
            raise BudgetError(
                f"as a dense tensor it would have {tensor.numel() * tensor.element_size() / 1e9:.3g} GB",
                hint="load() keeps it sparse; its parts are tensors of their own",
            )
        return tensor.to_dense()
    if tensor.dtype in (torch.quint4x2, torch.quint2x4):  # several values in a byte, the first in its lowest bits
        width = 4 if tensor.dtype == torch.quint4x2 else 2
        packed = tensor.int_repr().view(-1, 1)
        return ((packed >> torch.arange(0, 8, width)) & ((1 << width) - 1)).view(-1)[: tensor.numel()].to(torch.uint8)
    return tensor.int_repr() if tensor.is_quantized else tensor


def _whole(source: Derived, memo: Memo) -> torch.Tensor:
    block = source.block
    if block not in memo.kept:
        if memo.max_nbytes is not None and block.peak > memo.max_nbytes:
            raise BudgetError(
                f"this step needs {block.peak / 1e6:.0f} MB at once and the budget is {memo.max_nbytes / 1e6:.0f} MB",
                op=block.op,
                hint=f"give max_ram_mb={-(-block.peak // 10**6) + 64}",
            )
        if block.reads == "full":
            inputs: list[Any] = [t.load() for t in block.rowed]
        else:
            nbytes = HOT_NBYTES if all(t.is_contiguous for t in block.rowed) else strided_nbytes(memo.max_nbytes)
            inputs = [t.chunks(nbytes, Memo(memo.max_nbytes, memo.kept)) for t in block.rowed]
        memo.kept[block] = _checked(
            block, kernel(block.op)(block.params, [_entire(t, memo) for t in block.whole], inputs, 0), [s.shape for s in block.specs]
        )
    return memo.kept[block][source.slot]


def strided_nbytes(max_nbytes: int | None) -> int:
    """Bytes to read at once from a tensor whose memory order is not its logical order: many runs a read, and room in the budget for copies."""
    return max(HOT_NBYTES, min(max_nbytes or 256 << 20, 256 << 20) // 8)


def _entire(tensor: LazyTensor, memo: Memo) -> torch.Tensor:
    return tensor.read(0, tensor.numel, memo).reshape(tensor.shape)


def _results(block: Block, first: int, last: int, memo: Memo) -> tuple[torch.Tensor, ...]:
    key = (block, first, last)
    if key not in memo.step:
        inputs = []
        for t in block.rowed:
            row = _per_row(t, block) if block.reads == "rows" else 1
            data = t.read(first * row, last * row, memo)
            part = t.shape[1:] if t.shape[:1] == block.specs[0].shape[:1] else (row,)
            inputs.append(data.reshape(last - first, *part) if block.reads == "rows" else data)
        shapes = [(last - first, *(s.shape[1:] if block.reads == "rows" else ())) for s in block.specs]
        results = kernel(block.op)(block.params, [_entire(t, memo) for t in block.whole], inputs, first)
        memo.step[key] = _checked(block, results, shapes)
    return memo.step[key]


def _checked(block: Block, results: Sequence[torch.Tensor], shapes: Sequence[tuple[int, ...]]) -> tuple[torch.Tensor, ...]:
    if len(results) != len(shapes):
        raise SpecMismatchError(f"the kernel gave {len(results)} results for {len(shapes)} slots", op=block.op)
    for result, spec, shape in zip(results, block.specs, shapes, strict=True):
        if tuple(result.shape) != tuple(shape) or dtypes.from_torch(result.dtype) != spec.dtype:
            raise SpecMismatchError(f"declared {spec.dtype} {list(shape)}, computed {result.dtype} {list(result.shape)}", op=block.op)
    return tuple(results)
