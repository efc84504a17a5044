"""How torch spells the metadata of a distributed checkpoint, as regular expressions over pickle opcodes: the machine's fast path for it.

    name ^ TensorStorageMetadata{ properties: TensorProperties(dtype layout grad memory_format pin)  size: S  chunks: [a ChunkStorageMetadata] }
    ChunkStorageMetadata{ offsets: S  sizes: S or a reference to one }      (alone, where a tensor has several)
    name: G  path: (G, ...) ^
    MetadataIndex{ fqn: G  index: N or I  offset: S } _StorageInfo{ relative_path: G  offset: I  length: I }

G is a reference to the memo (h, j), ^ a memo write (MEMOIZE), I a count, S a torch.Size (`G counts ^ \\x85 ^ R ^`), and an object
is `G ) \\x81 ^ } ^ ( key value ... u b`. Each entry becomes one small tuple, where the opcodes run singly make up to eight inert objects.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from itertools import chain
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


class IndexEntry:
    """A MetadataIndex. It equals no other, so that what is told twice is seen."""

    __slots__ = ("fqn", "offset")

    def __init__(self, fqn: str, offset: Counts | None) -> None:
        self.fqn, self.offset = fqn, offset


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
    for spelling, entries in _KINDS[:1] if vm.data[start] == 0x8C else _KINDS[1:]:
        one, many = _patterns(spelling)
        if one.match(vm.data, start, end):
            rows = many.findall(vm.data, start, end)
            behind = rows.pop()[-1] if rows[-1][-1] else b""
            vm.singly = end - len(behind)
            made = entries(vm, first, *zip(*rows, strict=True))
            if made is not None:
                vm.stack += made[0]
                vm.highest, vm.unwritten, vm.pos = made[1] - 1, made[1] - len(vm.memo), vm.singly
            return made is not None
    return False


_COUNTS = rb"\)|%b\x85\x94|%b{2}\x86\x94|%b{3}\x87\x94|\(%b{4,}t\x94" % ((INTEGER,) * 4)
_OBJECT = rb"%b\)\x81\x94\}\x94\(" % GET
_SIZED = rb"\x85\x94R\x94"
_CHUNK = rb"(%b%b%b)(%b)(%b%b)(%b)(?:(%b)%b)?ub" % (_OBJECT, GET, GET, _COUNTS, _SIZED, GET, GET, _COUNTS, _SIZED)
_TENSOR = rb"\x8c(.)([^\x94]{0,255})(\x94%b%b%b\)\x81\x94\(%b%b)([\x88\x89])(%b[\x88\x89]t\x94b%b%b)(%b)(%b%b\]\x94)%baub" % (
    (_OBJECT, *(GET,) * 7, _COUNTS, _SIZED, GET, _CHUNK)
)  # fmt: skip
_PLACE = rb"(%b%b)(%b)(%b)(?:N|%b)(%b%b)(%b)(%bub%b%b)(%b)(%b)(%b)(%b)(%b)ub" % (
    (_OBJECT, GET, GET, GET, INTEGER, GET, GET, _COUNTS, _SIZED, _OBJECT, GET, GET, GET, INTEGER, GET, INTEGER)
)  # fmt: skip
_PATH = rb"(%b)(%b)(%b)?(%b)?([\x85-\x87])\x94" % ((GET,) * 4)


@cache
def _patterns(spelling: bytes) -> tuple[re.Pattern[bytes], re.Pattern[bytes]]:
    """An entry, and entries as they follow each other; the last group is what stands behind them."""
    return re.compile(spelling, re.DOTALL), re.compile(spelling + rb"|(.+)", re.DOTALL)


_Made = tuple[list[Any], int] | None  # what a run leaves on the stack, and the memo place behind those that it writes


def _tensors(
    vm: Machine, first: int, lengths: Columns, names: Columns, heads: Columns, grads: Columns, tails: Columns, counts: Columns, lists: Columns,
    *chunk: Columns,
) -> _Made:  # fmt: skip
    """The memo takes of each: name, object, state, properties, their state, [counts], their tuple, the size; the list, the chunk."""
    dtypes, sizes, widths = _forms(vm, _properties, heads, tails, lists), _sizes(counts), _chunk_widths(*chunk)
    if dtypes is None or sizes is None or bytes(map(len, names)) != b"".join(lengths):
        return None
    try:
        told = [name.decode("utf-8", "surrogatepass") for name in names]
    except UnicodeDecodeError:  # told at its own byte, when the opcodes are run singly
        return None
    place, places, known = first, [], {}
    for size, width in zip(sizes, widths, strict=True):
        places.append(place)
        place += 7 if size else 6
        known[place] = size
        place += 2 + width
    chunks = _chunk_entries(vm, known, *chunk)
    if chunks is None:
        return None
    vm.memo.update(zip(places, told, strict=True))
    rows = zip(dtypes, grads, sizes, chunks, strict=True)
    return [
        *chain.from_iterable(zip(told, [TensorEntry(dtype, g == b"\x88", size, [c]) for dtype, g, size, c in rows], strict=True))
    ], place


def _chunks(vm: Machine, first: int, *chunk: Columns) -> _Made:
    entries = _chunk_entries(vm, {}, *chunk)
    return None if entries is None else (entries, first + sum(_chunk_widths(*chunk)))


def _chunk_widths(heads: Columns, offsets: Columns, middles: Columns, refs: Columns, own: Columns, _: Columns) -> list[int]:
    """The memo takes of each: object, state, [counts], their tuple, the offsets; and [counts], tuple and size of sizes of its own."""
    return [4 + (at != b")") + (2 + (size != b")") if size else 0) for at, size in zip(offsets, own, strict=True)]


def _chunk_entries(
    vm: Machine, sizes: dict[int, Any], heads: Columns, offsets: Columns, middles: Columns, refs: Columns, own: Columns, _: Columns
) -> list[ChunkEntry] | None:
    """The chunks of a run; `sizes` are those that its tensors write to the memo, by place."""
    memo, places, starts = vm.memo, memo_indices(refs), _sizes(offsets)
    extents: list[Any] = [
        (_size(spelled) if memo.get(place) == _SIZE else None) if spelled else sizes[place] if place in sizes else _size_of(memo.get(place))
        for place, spelled in zip(places, own, strict=True)
    ]
    if starts is None or None in extents or _forms(vm, _chunk_form, heads, middles) is None:
        return None
    return [ChunkEntry(*box) for box in zip(starts, extents, strict=True)]


def _places(vm: Machine, first: int, *columns: Columns) -> _Made:
    """The memo takes of each: object, state, [counts], their tuple, the offset; object, state."""
    heads, names, index_keys, offset_keys, counts, places, paths, start_keys, starts, length_keys, lengths, _ = columns
    plain = _forms(vm, _place_form, heads, index_keys, offset_keys, places, start_keys, length_keys) is not None
    fqns: list[Any] = list(map(vm.memo.get, memo_indices(names)))
    files: list[Any] = list(map(vm.memo.get, memo_indices(paths)))
    offsets = _sizes(counts)
    if not plain or offsets is None or {*map(type, fqns), *map(type, files)} != {str}:
        return None
    indices = (IndexEntry(*told) for told in zip(fqns, offsets, strict=True))
    bytes_at = (PlaceEntry(*told) for told in zip(files, map(number, starts), map(number, lengths), strict=True))
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


def _forms(vm: Machine, form: Callable[..., Any], *spelled: Columns) -> list[Any] | None:
    """What all entries of one spelling have in common; None where a reference is not what torch means by it."""
    heads = list(zip(*spelled, strict=True))
    for head in set(heads).difference(vm.forms):
        found = form(*(vm.memo.get(memo_index(ref)) for ref in REFS.findall(b"".join(head))))
        if not found:
            return None
        vm.forms[head], classes = found
        for cls in classes:
            vm.called(cls.dotted)
    return [vm.forms[head] for head in heads]


_SIZE, _LAYOUT = Global("torch", "Size"), Global("torch.serialization", "_get_layout")
_TENSOR_CLASSES = (Global(ROOM, "TensorStorageMetadata"), Global(ROOM, "TensorProperties"), _SIZE)
_CHUNK_CLASSES = (Global(ROOM, "ChunkStorageMetadata"), _SIZE)
_PLACE_CLASSES = (Global(ROOM, "MetadataIndex"), _SIZE, Global("torch.distributed.checkpoint.filesystem", "_StorageInfo"))


def _properties(own: Any, told: Any, properties: Any, dtype: Any, layout: Any, _: Any, size: Any, cls: Any, chunks: Any) -> Any:
    strided = isinstance(layout, Inert) and layout.func == _LAYOUT and layout.args == STRIDED
    plain = strided and (own, properties, cls) == _TENSOR_CLASSES and (told, size, chunks) == ("properties", "size", "chunks")
    return plain and isinstance(dtype, Global) and dtype.module == "torch" and (dtype, _TENSOR_CLASSES)


def _chunk_form(own: Any, offsets: Any, size: Any, sizes: Any) -> Any:
    return (own, size) == _CHUNK_CLASSES and (offsets, sizes) == ("offsets", "sizes") and (True, _CHUNK_CLASSES)


def _place_form(index: Any, fqn: Any, hint: Any, offset: Any, size: Any, place: Any, path: Any, start: Any, length: Any) -> Any:
    keys = (fqn, hint, offset, path, start, length) == ("fqn", "index", "offset", "relative_path", "offset", "length")
    return keys and (index, size, place) == _PLACE_CLASSES and (True, _PLACE_CLASSES)


def _sizes(spelled: Columns) -> list[Counts] | None:
    """Sizes, or None where one of them is no size."""
    found = list(map(_size, spelled))
    return None if None in found else found  # type: ignore[return-value]


@lru_cache(maxsize=4096)
def _size(spelled: bytes) -> Counts | None:
    """The counts of a size; None where one is negative."""
    counts = numbers(spelled)
    return None if counts and min(counts) < 0 else counts


def _size_of(node: Any) -> Counts | None:
    counts = (
        node.args[0] if isinstance(node, Inert) and node.func == _SIZE and isinstance(node.args, tuple) and len(node.args) == 1 else None
    )
    return counts if type(counts) is tuple and all(type(n) is int and n >= 0 for n in counts) else None


_KINDS = ((_TENSOR, _tensors), (_PLACE, _places), (_CHUNK, _chunks), (_PATH, _paths))
