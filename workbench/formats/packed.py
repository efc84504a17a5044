"""Packed: elements stored in fewer bits than any torch type has, seen as elements of a wider one.

A packed tensor is a row of blocks: `narrow` stored bytes stand for `wide` bytes of values, and the last block may be short.
Any range is read by decoding the blocks it touches, a megabyte of values at a time, so a tensor streams whatever its shape.
A decoder is a module-level function ``(stored bytes, *params) -> values``, named by string so that tensors pickle.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from workbench.errors import CorruptFileError, UnsupportedError
from workbench.files import Reader, Span
from workbench.tensors import kernel

_STEP = 1 << 20  # bytes of values decoded at once
_MAX_BLOCK = 64 << 20  # what cannot be decoded piece by piece is held whole, up to here


class Packed(NamedTuple):
    """`span` seen as `nbytes` bytes of values. `packing` is what the file calls this way of storing (Q4_K, INT4)."""

    span: Span
    nbytes: int
    packing: str
    narrow: int
    wide: int
    decoder: str
    params: tuple[Any, ...] = ()

    @contextmanager
    def open(self) -> Iterator[_Unpacker]:
        with self.span.open() as reader:
            yield _Unpacker(self, reader)

    def decode(self, reader: Reader, start: int, stop: int) -> tuple[int, memoryview]:
        """(first byte, values) from the block that holds byte `start` on, up to `stop` or a step."""
        if max(self.narrow, self.wide) > _MAX_BLOCK:
            raise UnsupportedError(f"{self.narrow} bytes of {self.packing} can only be decoded together; at most {_MAX_BLOCK} are")
        first = start // self.wide
        count = min(-(-stop // self.wide) - first, max(1, _STEP // self.wide))
        stored = bytearray(min(count * self.narrow, self.span.nbytes - first * self.narrow))
        reader.readinto(memoryview(stored), first * self.narrow)
        decoder: Any = kernel(self.decoder)
        values = memoryview(decoder(stored, *self.params)).cast("B")
        expected = min(count * self.wide, self.nbytes - first * self.wide)
        if len(values) < expected:
            raise CorruptFileError(f"{len(stored)} bytes of {self.packing} hold {len(values)} bytes of values; {expected} are declared")
        return first * self.wide, values[:expected]


class _Unpacker:
    def __init__(self, storage: Packed, reader: Reader) -> None:
        self._storage, self._reader = storage, reader
        self._start, self._values = 0, memoryview(b"")  # the piece decoded last

    def readinto(self, buffer: memoryview, start: int) -> None:
        stop = start + buffer.nbytes
        if start < 0 or stop > self._storage.nbytes:
            raise CorruptFileError(f"bytes {start} to {stop} of {self._storage.nbytes} bytes of values")
        at = start
        while at < stop:
            if not 0 <= at - self._start < len(self._values):
                self._start, self._values = self._storage.decode(self._reader, at, stop)
            piece = self._values[at - self._start :][: stop - at]
            buffer[at - start : at - start + len(piece)] = piece
            at += len(piece)
