"""Values on their way into a model, and the proof that they arrived: copied and compared in blocks, as bytes where bytes will do."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from workbench import dtypes
from workbench.files import Storage
from workbench.tensors import LazyTensor, Memo, Stored

if TYPE_CHECKING:
    import torch


def _bytes(value: torch.Tensor) -> Any:
    """The bytes that a tensor holds, as a numpy array; a view where they lie on the host in logical order."""
    import torch

    return dtypes.flat(value.cpu().resolve_conj().resolve_neg()).view(torch.uint8).numpy()


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    import torch

    if a.is_meta or b.is_meta:
        return a.is_meta and b.is_meta
    if a.layout is not torch.strided or a.is_quantized:
        return _equal(a, b)
    return a.shape == b.shape and a.dtype == b.dtype and bytearray(_bytes(a)) == memoryview(_bytes(b))  # by memcmp


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """torch.equal, of sparse tensors too."""
    import torch

    if a.layout is torch.strided or a.layout is not b.layout or a.shape != b.shape:
        return a.layout is b.layout and torch.equal(a, b)
    names = {torch.sparse_coo: ("indices", "values"), torch.sparse_csr: ("crow_indices", "col_indices", "values")}
    names[torch.sparse_bsr], names[torch.sparse_csc] = names[torch.sparse_csr], ("ccol_indices", "row_indices", "values")
    a, b = (t.coalesce() if t.layout is torch.sparse_coo else t for t in (a, b))
    return all(torch.equal(getattr(a, part)(), getattr(b, part)()) for part in names.get(a.layout, names[torch.sparse_csc]))


def _as_stored(given: LazyTensor, value: torch.Tensor) -> tuple[Storage, int] | None:
    """Where the file has the very bytes that the model's tensor should hold: storage, first byte. None where they differ by more than place."""
    import torch

    at, plain_memory = given.source, value.layout is torch.strided and not (value.is_quantized or value.is_conj() or value.is_neg())
    if not isinstance(at, Stored) or not given.is_contiguous or at.byteorder != sys.byteorder or given.spec.quantizer:
        return None
    same = plain_memory and value.is_contiguous() and dtypes.from_torch(value.dtype) == given.dtype
    return (at.storage, at.offset * given.dtype.itemsize) if same else None


def copy(given: LazyTensor, target: torch.Tensor) -> None:
    import torch

    with torch.no_grad():
        direct = _as_stored(given, target) if target.device.type == "cpu" and target.numel() > 1 else None
        if direct is not None:
            with direct[0].open() as reader:
                reader.readinto(memoryview(_bytes(target)), direct[1])  # autograd knows: the module was asked with a copy onto itself
        elif not target.is_contiguous() or given.spec.quantizer or target.layout is not torch.strided:
            target.copy_(given.load())
        else:
            flat = target.view(-1)
            for start, chunk in given.chunks():
                flat[start : start + chunk.numel()].copy_(chunk)


def difference(given: LazyTensor, value: torch.Tensor, buffer: bytearray) -> str:
    """Empty when the model's tensor holds the file's values after the map and the cast, else what is wrong."""
    import torch

    other = "the model's values differ from the file's"
    if tuple(value.shape) != given.shape:
        return "the model's tensor has another shape now"
    if given.spec.quantizer or value.is_quantized or value.layout is not torch.strided:
        return "" if _equal(given.load().to(value.device), value) else other
    if (direct := _as_stored(given, value)) is not None:
        held, into = memoryview(_bytes(value)), memoryview(buffer)
        with direct[0].open() as reader:
            for start in range(0, len(held), len(buffer)):
                part = held[start : start + len(buffer)]
                reader.readinto(into[: len(part)], direct[1] + start)
                if (buffer if len(part) == len(buffer) else buffer[: len(part)]) != part:  # by memcmp: a bytearray, unlike a memoryview
                    return other
        return ""
    flat = value.detach().reshape(-1)
    for start, chunk in given.chunks():
        cast = chunk.to(value.dtype)
        if not same_bytes(cast, flat[start : start + chunk.numel()]):
            return other
        if cast.dtype != chunk.dtype and _loses_range(chunk, cast):
            return f"values of the file do not fit {dtypes.from_torch(value.dtype)}"
    return ""


def agree(a: LazyTensor, b: LazyTensor, dtype: torch.dtype) -> bool:
    """Whether two sources give the same values once cast."""
    memo = Memo()
    return (a.source, a.spec) == (b.source, b.spec) or all(
        same_bytes(x.to(dtype), b.read(start, start + len(x), memo).to(dtype)) for start, x in a.chunks()
    )


def near(stored: torch.Tensor, held: torch.Tensor) -> bool:
    """Whether a computed buffer holds what was stored, up to the rounding of the coarser dtype."""
    import torch

    rounding = max([torch.finfo(t.dtype).eps for t in (stored, held) if t.is_floating_point()], default=0)
    return torch.allclose(stored.double(), held.double(), rtol=8 * rounding, atol=0)


def _loses_range(chunk: torch.Tensor, cast: torch.Tensor) -> bool:
    """Whether a cast made another number of a whole one, or took a finite one out of range."""
    import torch

    if not cast.dtype.is_floating_point and not cast.is_complex():
        return not torch.equal(cast.to(torch.int64), chunk.to(torch.int64)) or not torch.equal(cast.to(chunk.dtype), chunk)
    if torch.finfo(cast.dtype).max >= torch.finfo(chunk.dtype).max:
        return False
    a, b = (torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in (chunk, cast))
    return bool(dtypes.out_of_range(a, b).any())
