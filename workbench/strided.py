"""Strided reading: any flat logical range of a strided tensor, from storage that is read by position.

Reads runs and skips wide gaps, so that a transposed or sliced tensor is read in blocks of bounded size. Shapes, strides and
offsets count elements.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from workbench import dtypes
from workbench.dtypes import DType
from workbench.files import Reader, Storage

if TYPE_CHECKING:
    import torch

_EXTENT_NBYTES = 8 << 20  # gaps are read through while a strided box spans no more than this
_RUN_NBYTES = 512  # shorter runs are not worth a read of their own


class View(NamedTuple):
    """A strided view of stored elements."""

    dtype: DType
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    byteorder: str


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides, in elements, of a contiguous tensor."""
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= max(n, 1)
    return tuple(reversed(strides))


def is_row_major(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether logical order is memory order, without gaps."""
    if 0 in shape:
        return True
    return all(n == 1 or s == e for n, s, e in zip(shape, strides, row_major(shape), strict=True))


def extent(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Elements from the first to the last that a strided view touches, both included."""
    if 0 in shape:
        return 0
    total = 1
    for n, s in zip(shape, strides, strict=True):
        total += (n - 1) * s
    return total


def load_view(storage: Storage, view: View) -> torch.Tensor:
    """The whole view, with its own strides unless they would hold more than twice its elements."""
    dtype, shape, strides, offset, byteorder = view
    span, numel, itemsize = extent(shape, strides), math.prod(shape), dtype.itemsize
    with storage.open() as reader:
        if numel and span > max(2 * numel, _EXTENT_NBYTES // itemsize):
            return read_flat(reader, view, 0, numel).view(shape)
        buffer, into = _new_buffer(span * itemsize)
        if span:
            reader.readinto(into, offset * itemsize)
    return dtypes.view_as(buffer, dtype, byteorder).as_strided(shape, strides)


def read_flat(reader: Reader, view: View, start: int, stop: int) -> torch.Tensor:
    """Logical elements `start` to `stop` of the view, flat and contiguous."""
    import torch

    dtype, shape, strides, offset, byteorder = view
    if is_row_major(shape, strides):
        buffer, into = _new_buffer((stop - start) * dtype.itemsize)
        if stop > start:
            reader.readinto(into, (offset + start) * dtype.itemsize)
        return dtypes.view_as(buffer, dtype, byteorder)
    pieces = []
    for prefix, low, high in boxes(shape, start, stop):
        depth = len(prefix)
        at = offset + sum(i * s for i, s in zip(prefix, strides, strict=False)) + low * strides[depth]
        box = (high - low, *shape[depth + 1 :])
        pieces.append(_read_box(reader, dtype, byteorder, box, strides[depth:], at).reshape(-1))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], int, int]]:
    """Cut a flat logical range into boxes ``tensor[prefix][low:high]``, in order."""
    if start >= stop:
        return
    if len(shape) <= 1:
        yield (), start, stop
        return
    inner = math.prod(shape[1:])
    first, last = -(-start // inner), stop // inner
    if first > last:  # inside one row
        yield from (((last, *p), a, b) for p, a, b in boxes(shape[1:], start - last * inner, stop - last * inner))
        return
    if start < first * inner:
        yield from (((first - 1, *p), a, b) for p, a, b in boxes(shape[1:], start - (first - 1) * inner, inner))
    if first < last:
        yield (), first, last
    if last * inner < stop:
        yield from (((last, *p), a, b) for p, a, b in boxes(shape[1:], 0, stop - last * inner))


def _read_box(reader: Reader, dt: DType, byteorder: str, shape: Sequence[int], strides: Sequence[int], at: int) -> torch.Tensor:
    """A strided box as a tensor of that shape, reading runs and skipping wide gaps.

    Memory: at most twice the box, or 8 MiB.
    """
    import torch

    strides = [0 if n == 1 else s for n, s in zip(shape, strides, strict=True)]
    itemsize = dt.itemsize
    span = extent(shape, strides)
    if span * itemsize <= max(_EXTENT_NBYTES, 2 * math.prod(shape) * itemsize):
        buffer, view = _new_buffer(span * itemsize)
        reader.readinto(view, at * itemsize)
        return dtypes.view_as(buffer, dt, byteorder).as_strided(tuple(shape), tuple(strides))
    order = sorted(range(len(shape)), key=lambda i: strides[i])
    count = 0
    while count < len(order) and _dense(shape, strides, order[: count + 1]):
        count += 1
    inner, outer = order[:count], order[count:]
    run = extent([shape[i] for i in inner], [strides[i] for i in inner])
    if run * itemsize >= _RUN_NBYTES:
        rows = math.prod(shape[i] for i in outer)
        buffer, view = _new_buffer(rows * run * itemsize)
        steps = (range(0, shape[i] * strides[i], strides[i]) if strides[i] else [0] * shape[i] for i in outer)
        for row, offsets in enumerate(itertools.product(*steps)):
            reader.readinto(view[row * run * itemsize : (row + 1) * run * itemsize], (at + sum(offsets)) * itemsize)
        new_strides = list(strides)
        for i, stride in zip(outer, row_major([shape[i] for i in outer]), strict=True):
            new_strides[i] = stride * run
        return dtypes.view_as(buffer, dt, byteorder).as_strided(tuple(shape), tuple(new_strides))
    widest = order[-1]
    half = shape[widest] // 2
    parts = [(0, half), (half, shape[widest])]
    boxes = [
        _read_box(
            reader, dt, byteorder, [*shape[:widest], high - low, *shape[widest + 1 :]], strides, at + low * strides[widest]
        ).contiguous()
        for low, high in parts
    ]
    return torch.cat(boxes, dim=widest)


def _dense(shape: Sequence[int], strides: Sequence[int], dims: Sequence[int]) -> bool:
    sizes = [shape[i] for i in dims]
    return extent(sizes, [strides[i] for i in dims]) <= 2 * math.prod(sizes)


def _new_buffer(nbytes: int) -> tuple[torch.Tensor, memoryview]:
    import torch

    buffer = torch.empty(nbytes, dtype=torch.uint8)
    return buffer, buffer.numpy().data.cast("B")
