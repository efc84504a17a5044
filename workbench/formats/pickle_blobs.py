"""Pickles that hold their data in themselves: payloads are left where they lie in the file and become the storages of tensors.

Owns the machine that follows a file and steps over payloads, and numpy's arrays:

    numpy.core.multiarray._reconstruct(ndarray, (0,), b'b')       then the state ([1,] shape, dtype, is_fortran, payload)
    numpy.core.numeric._frombuffer(payload, dtype, shape, order[, axis_order])                                (protocol 5)
    numpy.dtype(code, align, copy)                                then the state (3, byte order, subarray, names, fields, …)
    numpy.core.multiarray.scalar(dtype, payload)                  numpy.core is numpy._core since 2.0

A payload is bytes or a bytearray; a string where Python 2 wrote it; `_codecs.encode(text, 'latin1')` where Python 3 wrote
protocol 2, which has no bytes. Arrays of objects, text, dates and structures stay inert; numbers become Python's.

Source: numpy 2.4 numpy/_core/src/multiarray/methods.c (array_reduce, array_setstate), descriptor.c, numpy/_core/numeric.py.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from workbench.checkpoint import Finding
from workbench.errors import CorruptFileError, UnsupportedError
from workbench.files import FileRef, Reader, Span, Storage
from workbench.formats.numpy_objects import numpy_element
from workbench.formats.pickle_loop import TOO_MUCH
from workbench.formats.pickle_vm import Machine
from workbench.formats.python_objects import made_value
from workbench.formats.torch_objects import COUNTED, TorchObjects, counted, sizes
from workbench.formats.zip_index import ZipIndex, read_zip_index
from workbench.strided import row_major
from workbench.tensors import LazyTensor, Stored, TensorSpec
from workbench.tree import NOTHING, Global, Inert

MAX_OPCODES = 128 << 20  # bytes of opcodes, payloads aside
_PAGE, _LONG, _HELD = 1 << 10, 1 << 16, 32 << 20  # a payload longer than _LONG stays in the file; past _HELD in all, one longer than _PAGE
_EACH = 60  # what a file inside the file counts for among the things that are built
_PAYLOADS, _TEXTS = b"BC\x8e\x96TUX\x8d", b"X\x8d"


class Pages(NamedTuple):
    """What a PayloadMachine runs over: a file, up to byte `stop`."""

    pread: Callable[[int, int], bytes]
    stop: int


class Placed(bytes):
    """A short payload that knows where it lies."""

    start = 0


@dataclass(frozen=True)
class Left:
    """A long payload that was left in the file: raw bytes, text, or bytes spelled as text."""

    start: int
    nbytes: int
    spelling: str = "bytes"

    def __str__(self) -> str:
        return f"<{self.nbytes} bytes, left in the file>"


class _SteppedOver(Exception):
    """A long payload was pushed, and the window moved behind it."""


class PayloadMachine(Machine):
    """A machine over a window of a file, which follows it and grows while its parts adjoin. It steps over long payloads."""

    def __init__(self, pages: Pages, *, start: int = 0, **how: Any) -> None:
        super().__init__(b"", size=pages.stop - start, **how)
        self.base, self._pages, self._whole = start, pages, start == 0
        self._step, self._read, self._held = _PAGE, 0, 0
        self.torch = None  # its template looks ahead

    @property
    def is_whole(self) -> bool:
        return self._whole

    def _read_more(self) -> None:
        rest = self.data[self.pos :]
        count = min(max(self._step, len(rest)), self.size - len(self.data))
        self._step, self._read = min(2 * self._step, _LONG), self._read + count
        if self._read > MAX_OPCODES:
            raise UnsupportedError(f"more than {MAX_OPCODES >> 20} MiB of pickle, payloads aside, are not read")
        self._move()
        self.data = rest + self._pages.pread(self.base + len(rest), count)

    def _move(self) -> None:
        """Let the window begin where the machine is."""
        self.base, self.size, self.frame_end = self.base + self.pos, self.size - self.pos, self.frame_end - self.pos
        self.pos, self.data = 0, b""

    def _run_on(self) -> Any:
        while True:
            try:
                return super()._run_on()
            except _SteppedOver:
                continue

    def _sized(self, width: int, signed: bool = False) -> bytes:
        op = self.data[self.pos - 1]
        count = int.from_bytes(self._take(width), "little", signed=signed)
        if (_LONG if self._held < _HELD else _PAGE) < count <= self.size - self.pos:
            if op not in _PAYLOADS:
                raise UnsupportedError(f"a number of {count:,} bytes", offset=self.place)
            if self.pos < self.frame_end < self.pos + count:
                self.cross()
            payload = Left(self.place, count, "text" if op in _TEXTS else "bytes")
            self.stack.append(payload)
            self.texts += [payload] if payload.spelling == "bytes" else []
            self.pos += count
            self._move()
            self._step = _PAGE
            raise _SteppedOver
        data = Placed(self._take(count))
        data.start = self.place - len(data)
        self._held += len(data)
        return data


def kept(made: list[Inert]) -> Callable[[Inert], Inert]:
    """What constructs nothing: calls stay as they are, and are kept in `made`."""

    def construct(node: Inert) -> Inert:
        made.append(node)
        return node

    return construct


# payloads as files inside the file


def most_nested(file: FileRef) -> int:
    """How many byte strings of a pickle are read as files: each of them takes some hundred microseconds."""
    return 2000 + (file.size >> 14)


def counted_together() -> AbstractContextManager[None]:
    """A reading of one file, whose pickles and files are bounded together."""
    return counted(Machine(b"", persistent=id, construct=id))


def charge(files: int = 0, packed: int = 0) -> None:
    """Count files inside the file, for what they take beside their opcodes, and `packed` bytes that are to be inflated.

    Raises:
        UnsupportedError: as much was done before as is done for one file.
    """
    if (held := COUNTED.get()) is not None:
        held[0].built += files * _EACH + (packed >> 10)
        if held[0].is_spent:
            raise UnsupportedError(TOO_MUCH)


def inner_archive(span: Span) -> ZipIndex:
    """A torch archive inside the file, what it takes to read its pickle counted.

    Raises:
        UnsupportedError: as much was done as is done for one file.
    """
    index = read_zip_index(span.file, span)
    for name in index.records:
        if name.endswith("data.pkl") and (record := index.records[name]).method:
            charge(0, record.size)
    return index


def payload_span(file: FileRef, payload: Any, nbytes: int | None = None) -> Span | None:
    """The bytes of a payload: of `file` itself where they lie in it as they are, of a file inside it otherwise; None if it is no payload.

    Cost: nothing, but a pass over bytes spelled as long text whose length `nbytes` is not known.
    """
    if isinstance(payload, Placed):
        return Span(file, payload.start, len(payload))
    if isinstance(payload, (bytes, bytearray, str)):
        data = payload.encode("utf-8", "surrogatepass") if isinstance(payload, str) else bytes(payload)
        return _inner(file, _Held(file, data), len(data))
    if not isinstance(payload, Left) or payload.spelling == "text":
        return None
    span = Span(file, payload.start, payload.nbytes)
    if payload.spelling == "bytes":
        return span
    if nbytes is None or not nbytes <= payload.nbytes <= 2 * nbytes:
        with span.open() as reader:
            nbytes = sum(map(len, _recoded(span, reader)))
    return _inner(file, _Recoded(span, nbytes), nbytes)


def _inner(file: FileRef, address: Any, nbytes: int) -> Span:
    return Span(FileRef(f"{file.url} (decoded)", (*file.identity[:2], nbytes, file.identity[3]), address), 0, nbytes)


@dataclass(frozen=True, eq=False)
class _Held:
    """The address of a payload that was read with the index. Two of them are never one, whatever they hold."""

    file: FileRef
    data: bytes

    @contextmanager
    def open(self, _: FileRef) -> Iterator[_Held]:
        with self.file.open():  # proves that the file is still the one that was listed
            yield self

    def pread(self, start: int, count: int) -> bytes:
        return self.data[start : start + count]

    def readinto(self, buffer: memoryview, start: int) -> int:
        data = self.pread(start, buffer.nbytes)
        buffer[: len(data)] = data
        return len(data)


def _recoded(span: Span, reader: Reader) -> Iterator[bytes]:
    """What a text stands for, block by block."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    for at in range(0, span.nbytes, _LONG):
        raw = bytearray(min(_LONG, span.nbytes - at))
        reader.readinto(memoryview(raw), at)
        try:
            yield decoder.decode(raw, at + len(raw) == span.nbytes).encode("latin-1")
        except UnicodeError as error:
            raise CorruptFileError("the text that stands for bytes holds other characters", offset=span.start) from error


@dataclass(frozen=True)
class _Recoded:
    """The address of bytes spelled as UTF-8 text in which each byte is one character."""

    span: Span
    nbytes: int

    @contextmanager
    def open(self, _: FileRef) -> Iterator[_Recoder]:
        with self.span.open() as reader:
            yield _Recoder(self, reader)


class _Recoder:
    """Reading forward is one pass; going back starts again."""

    def __init__(self, text: _Recoded, reader: Reader) -> None:
        self._text, self._reader = text, reader
        self._at, self._block, self._blocks = 0, b"", _recoded(text.span, reader)

    def _next(self) -> bytes:
        self._at, self._block = self._at + len(self._block), next(self._blocks, b"")
        return self._block

    def readinto(self, buffer: memoryview, start: int) -> int:
        if start < self._at:
            self._at, self._block, self._blocks = 0, b"", _recoded(self._text.span, self._reader)
        while start >= self._at + len(self._block):
            if not self._next():
                return 0
        piece = self._block[start - self._at :][: buffer.nbytes]
        buffer[: len(piece)] = piece
        if start + len(piece) == self._text.nbytes and (self._at + len(self._block) > self._text.nbytes or self._next()):
            raise CorruptFileError("the payload is longer than its array", offset=self._text.span.start)
        return len(piece)

    def pread(self, start: int, count: int) -> bytes:
        buffer, done = memoryview(bytearray(count)), 0
        while got := self.readinto(buffer[done:], start + done) if done < count else 0:
            done += got
        return bytes(buffer[:done])


# numpy


class Unfinished(Inert):
    """An object that becomes a tensor when its state comes; whoever holds it already holds the tensor then."""

    def __init__(self, node: Inert, finish: Callable[[Any], LazyTensor | None]) -> None:
        self.__dict__.update(node.__dict__, finish=finish)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "state" and value is not NOTHING:
            made = self.__dict__.pop("finish")(value)
            if made is not None:
                self.__dict__ = made.__dict__
            self.__class__ = Inert if made is None else LazyTensor  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        return (Inert, (self.func, self.args, self.kwargs, self.new, self.state, self.items, self.elements))


class PayloadObjects(TorchObjects):
    """Turns numpy's rebuild calls into tensors, and payloads spelled as text into bytes."""

    def __init__(self, file: FileRef, locate: Callable[[str], Storage]) -> None:
        super().__init__(locate)
        self.file = file

    def _text(self, node: Inert) -> Any:
        """`_codecs.encode(text, 'latin1')`, its text left in the file."""
        args = node.args
        if len(args) != 2 or not isinstance(args[0], Left):
            return made_value(self, node)
        self.unclear = True
        latin = args[1] in ("latin1", "latin-1") and args[0].spelling == "text"
        return Left(args[0].start, args[0].nbytes, "latin-1") if latin else node

    def _array(self, node: Inert) -> Any:
        if node.args[:1] != (Global("numpy", "ndarray"),):
            return node
        return Unfinished(node, lambda state: self.array(*state[-4:]) if isinstance(state, tuple) and len(state) in (4, 5) else None)

    def _buffer(self, node: Inert) -> Any:
        args = node.args
        return (self.array(args[2], args[1], args[3], args[0], *args[4:]) if len(args) in (4, 5) else None) or node

    def array(self, shape: Any, dtype: Any, order: Any, payload: Any, axes: Any = None) -> LazyTensor | None:
        """An array as a tensor over its payload; None where torch has no such elements, or the parts are not numpy's."""
        element = numpy_element(dtype)
        if element is None or not isinstance(payload, (bytes, bytearray, str, Left)):
            return None
        shape = sizes(shape)
        strides = tuple(reversed(row_major(shape[::-1]))) if order in (True, "F") else row_major(shape)
        if order == "K" and isinstance(axes, tuple):
            if sorted(axes) != list(range(len(shape))):
                raise CorruptFileError("an array's axes are not in any order")
            shape, strides = tuple(shape[i] for i in axes), tuple(strides[i] for i in axes)
        spec, trouble = TensorSpec(element[0], shape), None
        storage = payload_span(self.file, payload, spec.nbytes)
        if storage is None:
            return None
        if storage.nbytes != spec.nbytes:
            trouble = f"an array should have {spec.nbytes} bytes and has {storage.nbytes}"
            self.troubles.append(Finding("values locked", "danger", trouble, {}, "the array is listed; its values are refused"))
        return LazyTensor(spec, Stored(storage, 0, strides, element[1]), False, trouble)


_CORES = ("numpy.core", "numpy._core")
PayloadObjects.rebuilds = {
    **TorchObjects.rebuilds,
    "_codecs.encode": PayloadObjects._text,
    **{f"{core}.multiarray._reconstruct": PayloadObjects._array for core in _CORES},
    **{f"{core}.numeric._frombuffer": PayloadObjects._buffer for core in _CORES},
}
