"""NumPy's .npy, one array, and .npz, a zip archive of them (`numpy.savez` stores, `savez_compressed` deflates).

    0       6        93 4e 55 4d 50 59 (\\x93NUMPY)
    6       2        version: 1.0, 2.0 or 3.0
    8       2 or 4   n, length of the header, little-endian (4 bytes from version 2.0 on)
    10, 12  n        a Python literal: {'descr': element type, 'fortran_order': bool, 'shape': tuple of counts}, padded with spaces
    …       …        the elements, and nothing after them

The literal is parsed here by way of JSON and never evaluated. Arrays of what torch has no type for (text, records, dates, raw
bytes, long double) are told and not listed as tensors. An array of objects is a pickle: the symbolic machine looks at it, and
it stays inert.

Source: numpy 2 numpy/lib/_format_impl.py (the format and its versions).
"""

from __future__ import annotations

import json
import math
import re
import sys
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from typing import Any

from workbench.checkpoint import Checkpoint, Finding
from workbench.dtypes import DTYPES, NUMPY_CODES
from workbench.errors import CorruptFileError, FormatError, UnsupportedError, located
from workbench.files import FileRef, Span, Storage, read_span
from workbench.formats.pickle_blobs import charge, counted_together
from workbench.formats.torch_objects import TorchObjects, sizes, trailing_finding, unpickle
from workbench.formats.zip_index import Inflated, ZipIndex
from workbench.names import unique_pairs
from workbench.strided import row_major
from workbench.tensors import LazyTensor, Stored, TensorSpec
from workbench.tree import Global

_MAGIC = b"\x93NUMPY"
_HEAD = 512  # bytes that are read first
_MAX_HEADER = 1 << 18  # of one file, short ones aside; numpy itself stops at 10,000 characters unless it is told to trust the file
_MAX_TOLD = 1 << 14  # of one that is asked for objects alone
_MAX_PICKLE = 64 << 20
_MAX_RATIO = 1032  # deflate packs no tighter
_ELEMENT = re.compile(r"([<>|=]?)([a-zA-Z])(\d{1,9})?(\[[^\]]*\])?")
_TOKEN = re.compile(r"""\s*(?:(?P<text>'(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*")|(?P<number>\d+)L?|(?P<word>True|False|None)|,\s*(?=[)\]}])|(?P<mark>[][(){}:,]))""")  # fmt: skip
_IN_JSON = {"(": "[", ")": "]", "True": "true", "False": "false", "None": "null"}
_VOID_HINT = "bfloat16 and float8 arrays of ml_dtypes look like this; cast them to float32 before numpy saves them"


def open_file(file: FileRef) -> Checkpoint:
    """List a .npy file: one tensor, called ``tensor``.

    Raises:
        CorruptFileError: the header is damaged, or the data has another length than it states.
    Cost: one read.
    """
    listing = _Listing(file)
    whole = Span(file, 0, file.size)
    array = listing.array(whole, whole.read(0, _HEAD), None)
    return Checkpoint(array, name=file.name, format="npy", findings=(*listing.findings,), source=file)


def open_archive(index: ZipIndex) -> Checkpoint:
    """List a .npz archive: the name of each tensor is its record's without ``.npy``.

    Raises:
        CorruptFileError: a header is damaged, or an array has another length than it states.
    Cost: a local header and an array's header for each record.
    """
    arrays: dict[str, LazyTensor | Global] = {}
    listing, twice = _Listing(index.file), list[str]()
    with index.file.kept_open() as source, counted_together():
        for name in index.records:
            with located(record=name):
                storage = index.storage(name)
                if isinstance(storage, Inflated) and storage.nbytes > _MAX_RATIO * storage.span.nbytes + 64:
                    raise CorruptFileError(f"{storage.span.nbytes} packed bytes cannot hold the {storage.nbytes} that the archive states")
                short = name.removesuffix(".npy")
                is_taken = short != name and short in index.records  # NumPy reads that record by this name
                twice += [name] if is_taken else []
                arrays[name if is_taken else short] = listing.array(storage, _head(storage, source.pread), name)
    if twice:
        told = f"what {twice[0][:-4]!r} is depends on who reads it: there is a record of that name, and one with .npy behind it"
        listing.findings.append(Finding("ambiguous", "warning", told, {"record": twice[0]}, "the second is listed by its whole name"))
    return Checkpoint(arrays, name=index.file.name, format="npz", findings=(*listing.findings,), source=index.file)


def _head(whole: Span | Inflated, pread: Callable[[int, int], bytes]) -> bytes:
    """The first bytes of a record; of a deflated one at one go from the open archive, where nothing is odd about them."""
    if isinstance(whole, Inflated) and whole.span.check is not None:
        whole.span.check.prove(pread, whole.span.start)
        with suppress(zlib.error):
            engine = zlib.decompressobj(-15)
            head = engine.decompress(pread(whole.span.start, min(whole.span.nbytes, 2 * _HEAD)), _HEAD + 1)
            if len(head) == min(whole.nbytes, _HEAD + 1) and (engine.eof or whole.nbytes > _HEAD):
                return head[:_HEAD]
    return read_span(whole, 0, _HEAD)


class _Listing:
    """The arrays of one file: what was found, and how many bytes of long headers may still be parsed, at a second a megabyte."""

    def __init__(self, file: FileRef) -> None:
        self.file, self.room = file, _MAX_HEADER
        self.findings: list[Finding] = []

    def array(self, whole: Span | Inflated, head: bytes, record: str | None) -> LazyTensor | Global:
        """One array as a tensor, or its element type and shape by name where it is none."""
        file, findings = self.file, self.findings
        first = 10 if head[6:7] == b"\1" else 12
        start = first + int.from_bytes(head[8:first], "little")
        with located(path=file.url):
            if head[:6] != _MAGIC or len(head) < 12 or start > whole.nbytes:
                raise CorruptFileError(f"an array's header is said to end at byte {start} of {whole.nbytes}: the file is cut or damaged")
            self.room -= start if start > _HEAD else 0
            if head[6:8] not in (b"\1\0", b"\2\0", b"\3\0") or self.room < 0:
                raise UnsupportedError(f"an array of NPY version {head[6]}.{head[7]} with a header of {start} bytes is not read here")
            text = head[first:start] if start <= len(head) else read_span(whole, first, start)
            descr, shape, strides, (itemsize, dtype, byteorder) = _header(text.decode("utf-8" if head[6] == 3 else "latin-1"))
        data = whole.part(start, whole.nbytes - start)
        what = descr if isinstance(descr, str) else json.dumps(descr)[:200]
        where = {"record": record} if record else {}
        if itemsize is None:
            findings += _objects(data, file, record, where)
        elif data.nbytes != math.prod(shape) * itemsize:
            needed = f"{math.prod(shape)} elements of {what} need {math.prod(shape) * itemsize} bytes"
            raise CorruptFileError(f"{needed} and {data.nbytes} are there: the file is cut, or has bytes that nothing names", path=file.url)
        elif dtype is not None:
            return LazyTensor(TensorSpec(DTYPES[dtype], shape), Stored(data, 0, strides, byteorder))
        else:
            told = f"an array of {what} {list(shape)} is listed and not read: torch has no such element type"
            findings.append(Finding("not a tensor", "warning", told, where, _VOID_HINT if re.fullmatch(r"[|<]V[12]", what) else None))
        return Global("numpy", f"ndarray({what}, {list(shape)})")


def says_objects(header: bytes) -> bool:
    """Whether an array's header tells of objects; not where it cannot be read, which listing the file tells."""
    with suppress(FormatError, json.JSONDecodeError, RecursionError):
        return len(header) <= _MAX_TOLD and _header(header.decode("latin-1"))[3][0] is None
    return False


def says_numbers(header: bytes) -> bool:
    """Whether an array's header can be read, and tells of no objects."""
    with suppress(FormatError, json.JSONDecodeError, RecursionError):
        return len(header) <= _MAX_TOLD and _header(header.decode("latin-1"))[3][0] is not None
    return False


@lru_cache(maxsize=256)
def _header(text: str) -> tuple[Any, tuple[int, ...], tuple[int, ...], tuple[int | None, str | None, str]]:
    """What an array's header says: element type as spelled, shape, strides, and the element type as `_element` reads it."""
    header = _literal(text)
    if not isinstance(header, dict) or header.keys() != {"descr", "fortran_order", "shape"} or type(header["fortran_order"]) is not bool:
        raise CorruptFileError("an array's header must say descr, fortran_order and shape")
    shape = sizes(header["shape"])
    return header["descr"], shape, row_major(shape[::-1])[::-1] if header["fortran_order"] else row_major(shape), _element(header["descr"])


def _literal(text: str) -> Any:
    """A Python literal as NPY headers hold it, with lists for tuples. Escapes in text stay as they are spelled."""
    out, at, text = [], 0, text.rstrip()
    while at < len(text):
        token = _TOKEN.match(text, at)
        if token is None:
            raise CorruptFileError("an array's header is no Python literal")
        at, kind, found = token.end(), token.lastgroup, token[token.lastgroup or 0]
        out.append("" if kind is None else json.dumps(found[1:-1]) if kind == "text" else _IN_JSON.get(found, found))
    return json.loads("".join(out), object_pairs_hook=unique_pairs)


def _element(descr: Any) -> tuple[int | None, str | None, str]:
    """(bytes of one element, its torch type if there is one, its byte order); None bytes for what holds objects."""
    if isinstance(descr, list):  # a record: fields of name (or [title, name]), element type, and perhaps shape
        if not all(isinstance(field, list) and len(field) in (2, 3) for field in descr):
            raise CorruptFileError("a record's field must be a name, an element type, and a shape where it has one")
        fields = [(_element(field[1])[0], math.prod(sizes(*field[2:] or [[]]))) for field in descr]
        return None if any(n is None for n, _ in fields) else sum((n or 0) * times for n, times in fields), None, "little"
    found = _ELEMENT.fullmatch(descr) if isinstance(descr, str) else None
    if found is None:
        raise CorruptFileError(f"{descr!r} is no element type of the format")
    order, kind, count, unit = found.groups()
    if kind not in "biufcSaUVmMO" or (unit and kind not in "mM"):
        raise UnsupportedError(f"the element type {descr!r} is not known")
    nbytes = None if kind == "O" else int(count or 0) * (4 if kind == "U" else 1)
    return nbytes, NUMPY_CODES.get(f"{kind}{count}"), {"<": "little", ">": "big"}.get(order, sys.byteorder)


def _objects(data: Span | Inflated, file: FileRef, record: str | None, where: dict[str, Any]) -> list[Finding]:
    """What the pickle of an object array would do."""
    try:
        if data.nbytes > _MAX_PICKLE:
            raise UnsupportedError(f"the pickle has {data.nbytes} bytes; at most {_MAX_PICKLE} are looked at")
        charge(1, 0 if isinstance(data, Span) else data.nbytes)
        objects = TorchObjects(dict[str, Storage]().__getitem__)  # it has no storages
        _, machine, found = unpickle(read_span(data), objects, file=file, format="npy", record=record)
    except FormatError as error:
        told = f"the pickle of an object array is not readable, and may hide anything: {error.message}"
        return [Finding("unreadable pickle", "danger", told, where)]
    after = data.nbytes - machine.end
    told = "an array of Python objects is a pickle; it is listed and not read"
    mine = Finding("not a tensor", "warning", told, where, "save such values as JSON or text beside the arrays")
    return [mine, *found, *([trailing_finding(after, record or "the array")] if after else [])]
