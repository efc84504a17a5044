"""How torch spells the metadata of a distributed checkpoint, as regular expressions over pickle opcodes: the machine's fast path for it.

    name ^ TensorStorageMetadata{ properties: TensorProperties(dtype layout grad memory_format pin)  size: S  chunks: [a ChunkStorageMetadata] }
    ChunkStorageMetadata{ offsets: S  sizes: S or a reference to one }      (alone, where a tensor has several)
    name: G  path: (G, ...) ^
    MetadataIndex{ fqn: G  index: N or I  offset: S } _StorageInfo{ relative_path: G  offset: I  length: I }

G is a reference to the memo (h, j), ^ a memo write (MEMOIZE), I a count, S a torch.Size (`G counts ^ \\x85 ^ R ^`), and an object
is `G ) \\x81 ^ } ^ ( key value ... u b`. Each entry becomes one small tuple, where the opcodes run singly make up to eight inert objects.
"""

from __future__ import annotations

import operator
import re
import struct
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from itertools import accumulate, chain, repeat
from typing import TYPE_CHECKING, Any, NamedTuple

from workbench.formats.torch_template import GET, INTEGER, REFS, memo_index, memo_indices, number, numbers
from workbench.tree import Global, Inert

if TYPE_CHECKING:
    from workbench.formats.pickle_vm import Machine

Counts = tuple[int, ...]
Columns = Sequence[Any]
ROOM = "torch.distributed.checkpoint.metadata"
STRIDED = ("torch.strided",)
_MOST = 1 << 17  # bytes of one run
_LEARNED = 5000  # what one more spelling counts for among the things that are built: its pattern takes a millisecond or two
_made: Any = tuple.__new__


class ChunkEntry(NamedTuple):
    """A ChunkStorageMetadata."""

    offsets: Counts
    sizes: Counts


class TensorEntry(NamedTuple):
    """A TensorStorageMetadata; `chunks` are ChunkEntries, or inert where they were spelled otherwise."""

    dtype: Global
    requires_grad: bool
    size: Counts
    chunks: list[Any]


class IndexEntry(NamedTuple):
    """A MetadataIndex. It equals no other, so that what is told twice is seen."""

    fqn: str
    offset: Counts | None


IndexEntry.__eq__, IndexEntry.__hash__ = object.__eq__, object.__hash__  # type: ignore[method-assign]


class PlaceEntry(NamedTuple):
    """A _StorageInfo of bytes that were not transformed."""

    relative_path: str
    offset: int
    length: int


ENTRIES = (TensorEntry, ChunkEntry, IndexEntry, PlaceEntry)


def carry_out_entries(vm: Machine, start: int) -> bool:
    """Carry out the entries of one kind that begin at `start`, as far as they are spelled as torch does and lie in one frame.

    Not tried where the pickle has chosen memo places itself, for then they do not count on, nor again in a run that was refused.
    """
    first = len(vm.memo) + vm.unwritten
    if start < vm.singly or first != vm.highest + 1:
        return False
    end = min(vm.frame_end if vm.frame_end > start else len(vm.data), start + _MOST)
    for parts, form, entries in _KINDS[:1] if vm.data[start] == 0x8C else _KINDS[1:]:
        if (found := _one(parts).match(vm.data, start, end)) is None:
            continue
        fixed = tuple(found.groupdict().values())
        if fixed not in vm.forms:
            if vm.is_spent:
                return False
            vm.built += _LEARNED
            classes: Any = form(*(vm.memo.get(memo_index(ref)) for ref in REFS.findall(b"".join(fixed))))
            vm.forms[fixed] = None if classes is False else _many(parts, fixed)
            for cls in classes or ():
                vm.called(cls.dotted)
        if (many := vm.forms[fixed]) is None:
            return False
        rows = many.findall(vm.data, start, end)
        behind = rows.pop()[-1] if rows[-1][-1] else b""
        vm.singly = end - len(behind)
        made = entries(vm, first, *zip(*rows, strict=True)) if rows else None
        if made is not None:
            vm.stack += made[0]
            vm.highest, vm.unwritten, vm.pos = made[1] - 1, made[1] - len(vm.memo), vm.singly
        return made is not None
    return False


_COUNTS = rb"\)|%b\x85\x94|%b{2}\x86\x94|%b{3}\x87\x94|\(%b{4,}t\x94" % ((INTEGER,) * 4)
_OBJECT = rb"%b\)\x81\x94\}\x94\(" % GET
_SIZED = rb"\x85\x94R\x94"
# parts in turn that entries have in common, and that are of each
_CHUNK = (
    _OBJECT + GET * 2, b"(%b)" % _COUNTS,
    _SIZED + GET, rb"(%b)(?:(%b)%b)?ub" % (GET, _COUNTS, _SIZED),
)  # fmt: skip
_TENSOR = (
    b"", rb"\x8c(.)([^\x94]{0,255})\x94",
    _OBJECT + GET * 2 + rb"\)\x81\x94\(", b"(%b)" % GET,
    GET, rb"([\x88\x89])",
    GET, rb"[\x88\x89]",
    rb"t\x94b%b%b" % (GET, GET), b"(%b)" % _COUNTS,
    rb"%b%b\]\x94" % (_SIZED, GET) + _CHUNK[0], _CHUNK[1],
    _CHUNK[2], _CHUNK[3] + b"aub",
)  # fmt: skip
_PLACE = (
    _OBJECT + GET, b"(%b)" % GET,
    GET, b"(?:N|%b)" % INTEGER,
    GET + GET, b"(%b)" % _COUNTS,
    rb"%bub%b%b" % (_SIZED, _OBJECT, GET), b"(%b)" % GET,
    GET, b"(%b)" % INTEGER,
    GET, b"(%b)ub" % INTEGER,
)  # fmt: skip
_PATH = (b"", rb"(%b)(%b)(%b)?(%b)?([\x85-\x87])\x94" % ((GET,) * 4))


@cache
def _one(parts: tuple[bytes, ...]) -> re.Pattern[bytes]:
    """An entry, in which each fixed part is a group with a name."""
    fixed = (b"(?P<f%d>%b)" % (at, part) for at, part in enumerate(parts[::2]))
    return re.compile(b"".join(chain.from_iterable(zip(fixed, parts[1::2], strict=True))), re.DOTALL)


@lru_cache(maxsize=64)
def _many(parts: tuple[bytes, ...], fixed: tuple[bytes, ...]) -> re.Pattern[bytes]:
    """Entries as they follow each other, whose fixed parts are these; the last group is what stands behind them."""
    return re.compile(b"".join(chain.from_iterable(zip(map(re.escape, fixed), parts[1::2], strict=True))) + b"|(.+)", re.DOTALL)


_Made = tuple[list[Any], int] | None  # what a run leaves on the stack, and the memo place behind those that it writes


def _tensors(vm: Machine, first: int, lengths: Columns, names: Columns, *columns: Columns) -> _Made:
    """The memo takes of each: name, object, state, properties, their state, [counts], their tuple, the size; the list, the chunk."""
    *kinds, refs, own, _ = columns
    forms = _forms(vm, list(zip(*kinds, strict=True)))
    if forms is None or bytes(map(len, names)) != b"".join(lengths):
        return None
    try:
        told = [name.decode("utf-8", "surrogatepass") for name in names]
    except UnicodeDecodeError:  # told at its own byte, when the opcodes are run singly
        return None
    entries, befores, widths = zip(*forms, strict=True)
    *places, end = accumulate(map(operator.add, widths, map(_own_width, own)), initial=first)
    at = list(map(operator.add, places, befores))
    if any(own) or memo_indices(refs) != at:  # a chunk's sizes are not the size of its tensor
        known = {place: entry.size for place, entry in zip(at, entries, strict=True)}
        extents = _extents(vm, known, refs, own)
        if extents is None:
            return None
        pairs = zip(entries, extents, strict=True)
        entries = tuple(entry._replace(chunks=[ChunkEntry(entry.chunks[0].offsets, size)]) for entry, size in pairs)
    vm.memo.update(zip(places, told, strict=True))
    return [*chain.from_iterable(zip(told, entries, strict=True))], end


def _forms(vm: Machine, kinds: list[Any]) -> list[Any] | None:
    """Of each kind of tensor the entry, where the memo holds its size, counted from its name, and how many places it takes."""
    for kind in set(kinds).difference(vm.forms):
        dtype, grad, counts, offsets = vm.memo.get(memo_index(kind[0])), kind[1] == b"\x88", _size(kind[2]), _size(kind[3])
        if not (isinstance(dtype, Global) and dtype.module == "torch") or counts is None or offsets is None:
            return None
        before = 7 if counts else 6
        vm.forms[kind] = TensorEntry(dtype, grad, counts, [ChunkEntry(offsets, counts)]), before, before + 6 + bool(offsets)
    return list(map(vm.forms.__getitem__, kinds))


def _chunks(vm: Machine, first: int, counts: Columns, refs: Columns, own: Columns, _: Columns) -> _Made:
    """The memo takes of each: object, state, [counts], their tuple, the offsets; and [counts], tuple and size of sizes of its own."""
    offsets, extents = _sizes(counts), _extents(vm, {}, refs, own)
    if offsets is None or extents is None:
        return None
    width = sum(4 + bool(at) for at in offsets) + sum(map(_own_width, own))
    return [ChunkEntry(*box) for box in zip(offsets, extents, strict=True)], first + width


def _own_width(spelled: bytes) -> int:
    return 2 + (spelled != b")") if spelled else 0


def _extents(vm: Machine, known: dict[int, Any], refs: Columns, own: Columns) -> list[Any] | None:
    """The sizes of chunks, spelled or fetched; `known` are those that their run writes to the memo, by place."""
    memo = vm.memo
    found = [
        (_size(spelled) if memo.get(place) == _SIZE else None) if spelled else known[place] if place in known else _size_of(memo.get(place))
        for place, spelled in zip(memo_indices(refs), own, strict=True)
    ]
    return None if None in found else found


def _places(
    vm: Machine, first: int, names: Columns, counts: Columns, paths: Columns, starts: Columns, lengths: Columns, _: Columns
) -> _Made:
    """The memo takes of each: object, state, [counts], their tuple, the offset; object, state."""
    fqns: list[Any] = list(map(vm.memo.get, memo_indices(names)))
    files: list[Any] = list(map(vm.memo.get, memo_indices(paths)))
    offsets = _sizes(counts)
    if offsets is None or {*map(type, fqns), *map(type, files)} != {str}:
        return None
    indices = map(_made, repeat(IndexEntry), zip(fqns, offsets, strict=True))
    bytes_at = map(_made, repeat(PlaceEntry), zip(files, _numbers(starts), _numbers(lengths), strict=True))
    return [*chain.from_iterable(zip(indices, bytes_at, strict=True))], first + 7 * len(counts) - offsets.count(())


def _paths(vm: Machine, first: int, names: Columns, *steps: Columns) -> _Made:
    *parts, sizes, _ = steps
    parts = [part for part in parts if any(part)]
    if any(b"" in part for part in parts) or set(sizes) != {bytes([0x84 + len(parts)])}:
        return None
    told, *paths = (list(map(vm.memo.get, memo_indices(refs))) for refs in (names, *parts))
    if {*map(type, chain(told, *paths))} != {str}:
        return None
    return [*chain.from_iterable(zip(told, zip(*paths, strict=True), strict=True))], first + len(told)


_SIZE, _LAYOUT = Global("torch", "Size"), Global("torch.serialization", "_get_layout")
_TENSOR_CLASSES = (Global(ROOM, "TensorStorageMetadata"), Global(ROOM, "TensorProperties"), _SIZE)
_CHUNK_CLASSES = (Global(ROOM, "ChunkStorageMetadata"), _SIZE)
_PLACE_CLASSES = (Global(ROOM, "MetadataIndex"), _SIZE, Global("torch.distributed.checkpoint.filesystem", "_StorageInfo"))


def _tensor_form(own: Any, told: Any, properties: Any, layout: Any, _: Any, size: Any, cls: Any, chunks: Any, *chunk: Any) -> Any:
    strided = isinstance(layout, Inert) and layout.func == _LAYOUT and layout.args == STRIDED
    plain = strided and (own, properties, cls) == _TENSOR_CLASSES and (told, size, chunks) == ("properties", "size", "chunks")
    return plain and _chunk_form(*chunk) and (*_TENSOR_CLASSES, *_CHUNK_CLASSES)


def _chunk_form(own: Any, offsets: Any, size: Any, sizes: Any) -> Any:
    return (own, size) == _CHUNK_CLASSES and (offsets, sizes) == ("offsets", "sizes") and _CHUNK_CLASSES


def _place_form(index: Any, fqn: Any, hint: Any, offset: Any, size: Any, place: Any, path: Any, start: Any, length: Any) -> Any:
    keys = (fqn, hint, offset, path, start, length) == ("fqn", "index", "offset", "relative_path", "offset", "length")
    return keys and (index, size, place) == _PLACE_CLASSES and _PLACE_CLASSES


def _sizes(spelled: Columns) -> list[Counts] | None:
    """Sizes, or None where one of them is no size."""
    found = list(map(_size, spelled))
    return None if None in found else found  # type: ignore[return-value]


@lru_cache(maxsize=4096)
def _size(spelled: bytes) -> Counts | None:
    """The counts of a size; None where one is negative."""
    counts = numbers(spelled)
    return None if counts and min(counts) < 0 else counts


def _numbers(spelled: Columns) -> list[int]:
    """Counts; those of four bytes, as most are that tell where something starts, at once."""
    joined = b"".join(spelled)
    if len(joined) == 5 * len(spelled) and joined[::5].count(b"J") == len(spelled):
        return [count for (count,) in struct.iter_unpack("<xi", joined)]
    return list(map(_number, spelled))


_number = lru_cache(maxsize=4096)(number)


def _size_of(node: Any) -> Counts | None:
    counts = (
        node.args[0] if isinstance(node, Inert) and node.func == _SIZE and isinstance(node.args, tuple) and len(node.args) == 1 else None
    )
    return counts if type(counts) is tuple and all(type(n) is int and n >= 0 for n in counts) else None


_KINDS: tuple[tuple[tuple[bytes, ...], Any, Callable[..., _Made]], ...] = (
    (_TENSOR, _tensor_form, _tensors),
    (_PLACE, _place_form, _places),
    (_CHUNK, _chunk_form, _chunks),
    (_PATH, lambda: (), _paths),
)
