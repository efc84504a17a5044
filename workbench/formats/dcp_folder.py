"""torch.distributed.checkpoint: a folder of chunks, and a pickle that says which tensor each chunk belongs to.

    .metadata              pickled Metadata:
        state_dict_metadata    name -> TensorStorageMetadata(properties, size, chunks of (offsets, sizes)) or BytesStorageMetadata
        storage_data           MetadataIndex(name, offsets) -> _StorageInfo(relative_path, offset, length, transform_descriptors)
        planner_data           name -> path of keys and list positions in the nested state dict
    __<rank>_<n>.distcp    a torch.save archive for each chunk and each object, end to end; in the safetensors serialization
                           the objects, then one safetensors file that holds all chunks
    __<rank>.metadata      what each rank writes for itself where they do not talk; torch reads it where `.metadata` fails

torch's own reader executes the metadata; here the symbolic machine reads it, and what is not spelled as torch spells it is refused. Listing opens no tensor's archive: a chunk's is
parsed when its values are first read. Objects are looked at when listed, as far as they are small.

Source: torch 2.13 torch/distributed/checkpoint/metadata.py, filesystem.py and _nested_dict.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

from workbench import dtypes
from workbench.checkpoint import Checkpoint, Finding, Severity
from workbench.dtypes import DType
from workbench.errors import CorruptFileError, FormatError, MissingFileError, MissingShardError, UnsupportedError, located
from workbench.files import FileRef, Folder, Span, Storage
from workbench.formats import torch_zip
from workbench.formats.dcp_template import ROOM, STRIDED, ChunkEntry, Counts, IndexEntry, PlaceEntry, TensorEntry, carry_out_entries
from workbench.formats.safetensors_file import read_header
from workbench.formats.torch_objects import TorchObjects, sizes, trailing_finding, unpickle
from workbench.formats.zip_index import read_zip_index
from workbench.strided import boxes, row_major
from workbench.tensors import LazyTensor, Stored, TensorSpec
from workbench.tree import NOTHING, Global, Inert, wrapped

_MAX_METADATA = 1 << 30
_MAX_OBJECTS, _LEAST = 4 << 20, 2 << 10  # bytes of objects that a listing looks at; what each counts for at least
_MAX_FILES = 1 << 15
_MAX_COMPARISONS = 500_000  # of chunks that lie in no grid
_MAX_STEPS, _STEPS = 100, frozenset((str, int))
_ATOMS = frozenset((bool, int, float, str, type(None)))
_made: Any = tuple.__new__
Place = Span | str  # bytes, or why they cannot be read
Troubles = dict[tuple[str, Severity, str, str], list[str]]  # (kind, severity, reason, hint) -> whose values are not read
_METADATA, _OBJECT = f"{ROOM}.Metadata", f"{ROOM}.BytesStorageMetadata"
_PLACE = "torch.distributed.checkpoint.filesystem._StorageInfo"
_TRANSFORMED = "the bytes were transformed when they were saved (stream.zstd, or the like), which is not undone here"
_WATCHED: ContextVar[list[Span] | None] = ContextVar("dcp objects", default=None)


@contextmanager
def watched_objects() -> Iterator[list[Span]]:
    """Where the folders listed inside say that objects lie: torch unpickles those bytes, whatever they are."""
    token = _WATCHED.set(spans := list[Span]())
    try:
        yield spans
    finally:
        _WATCHED.reset(token)


class _Budget:
    """What is still done for one folder: bytes of objects, coordinates of chunks (of which each takes bytes of metadata), comparisons."""

    def __init__(self, metadata: int) -> None:
        self.objects, self.coordinates, self.comparisons = _MAX_OBJECTS, 100_000 + metadata // 8, _MAX_COMPARISONS
        self.atoms: dict[bytes, Any] = {}  # archives that hold one immutable value, which they often share


class Chunk(NamedTuple):
    """A box of one tensor: where it lies in the tensor, and the bytes that hold its archive."""

    name: str
    dtype: DType
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    span: Span

    @property
    def nbytes(self) -> int:
        return math.prod(self.sizes) * self.dtype.itemsize

    def open(self) -> Any:
        """Its bytes as those of a tensor that it is the whole of."""
        return Tiles(self.dtype, self.sizes, (self,)).open()

    def values(self) -> LazyTensor:
        """The chunk as its archive lists it."""
        file, start = self.span.file, self.span.start
        with located(path=file.url, record=f"chunk {list(self.offsets)} of {self.name}", offset=start):
            if self.span.read(0, 2) == b"PK":
                found = wrapped(torch_zip.open_archive(read_zip_index(file, self.span)).tree)
            else:
                found = read_header(file, Span(file, start, file.size - start))[0].get(self.name)
            if not isinstance(found, LazyTensor) or (found.dtype, found.shape) != (self.dtype, self.sizes):
                other = found if isinstance(found, LazyTensor) else type(found).__name__
                raise CorruptFileError(f"the metadata says {self.dtype} {list(self.sizes)}, and the archive holds another thing: {other}")
            return found


class Tiles(NamedTuple):
    """The bytes of one tensor, row-major and little-endian, put together from the chunks that tile it."""

    dtype: DType
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @contextmanager
    def open(self) -> Iterator[_TileReader]:
        yield _TileReader(self)


class _TileReader:
    def __init__(self, tiles: Tiles) -> None:
        self._tiles = tiles
        self._values: dict[Chunk, LazyTensor] = {}

    def readinto(self, buffer: memoryview, start: int) -> None:
        shape, at = (*self._tiles.shape, self._tiles.dtype.itemsize), 0  # the bytes of an element are the last dimension
        for prefix, low, high in boxes(shape, start, start + buffer.nbytes):
            box = (high - low, *shape[len(prefix) + 1 :])
            part = buffer[at : at + math.prod(box)]
            for chunk in self._tiles.chunks:
                self._fill(part, chunk, prefix, low, box)
            at += part.nbytes

    def _fill(self, part: memoryview, chunk: Chunk, prefix: tuple[int, ...], low: int, box: tuple[int, ...]) -> None:
        """Copy what a chunk holds of ``tensor[prefix][low:low + box[0]]``, which is one run of the chunk's own bytes."""
        offsets, extents, depth = (*chunk.offsets, 0), (*chunk.sizes, chunk.dtype.itemsize), len(prefix)
        first, last = max(low, offsets[depth]), min(low + box[0], offsets[depth] + extents[depth])
        if first >= last or any(not o <= p < o + n for p, o, n in zip(prefix, offsets, extents, strict=False)):
            return
        values = self._values.get(chunk) or self._values.setdefault(chunk, chunk.values())
        start = sum((p - o) * step for p, o, step in zip((*prefix, first), offsets, row_major(extents), strict=False))
        counts, steps = (last - first, *extents[depth + 1 :]), row_major(box)
        at = sum(o * step for o, step in zip((first - low, *offsets[depth + 1 :]), steps, strict=True))
        whole = next(k for k in range(len(box)) if counts[k + 1 :] == box[k + 1 :])  # from here on, the chunk is as wide as the box
        if not whole:
            return _read(values, part[at : at + math.prod(counts)], start)
        held = memoryview(bytearray(math.prod(counts)))
        _read(values, held, start)
        rows, run, step = counts[whole - 1], counts[whole] * steps[whole], steps[whole - 1]
        for number, index in enumerate(itertools.product(*map(range, counts[: whole - 1]))):
            to, done = at + sum(i * step for i, step in zip(index, steps, strict=False)), number * rows * run
            for i in range(min(rows, run)):  # whole rows, or where those are narrow, one byte of each row at once
                if rows <= run:
                    part[to + i * step : to + i * step + run] = held[done + i * run : done + (i + 1) * run]
                else:
                    part[to + i : to + i + (rows - 1) * step + 1 : step] = held[done + i : done + rows * run : run]
        return None


def _read(values: LazyTensor, view: memoryview, start: int) -> None:
    """The bytes of a chunk from byte `start` on, row-major and little-endian."""
    source, itemsize = values.source, values.dtype.itemsize
    if isinstance(source, Stored) and values.is_contiguous and values.locked is None and (source.byteorder == "little" or itemsize == 1):
        with source.storage.open() as reader:
            return reader.readinto(view, source.offset * itemsize + start)  # type: ignore[no-any-return]
    import torch

    first, last = start // itemsize, -(-(start + view.nbytes) // itemsize)
    data = dtypes.flat(values.read(first, last)).view(torch.uint8).numpy().data
    view[:] = data[start - first * itemsize :][: view.nbytes]
    return None


def open_folder(folder: Folder) -> Checkpoint:
    """List a distributed checkpoint, nested as it was before it was flattened; of one without `.metadata`, what the first rank wrote.

    Raises:
        CorruptFileError: the metadata is damaged, or a tensor's chunks do not tile it. MissingShardError: a file of chunks is
        not there (`.partial` lists everything, and reads what the others hold).
    Cost: the metadata, and up to 4 MB of objects; no tensor's archive.
    """
    try:
        file = folder.file(".metadata")
    except MissingFileError:
        file = folder.file("__0.metadata")
    root, findings = _unpickled(file)
    try:
        with located(path=file.url):
            return _listed(folder, file, _fields(root, _METADATA), findings)
    except FormatError as error:
        error.partial = Checkpoint({}, name=file.name, format="dcp", findings=tuple(findings), source=file)
        raise


def note_objects(folder: Folder, name: str) -> None:
    """What `watched_objects` gives, of the metadata of that name."""
    file = folder.file(name)
    with located(path=file.url):
        _spans(_fields(_unpickled(file)[0], _METADATA).get("storage_data"), folder)


def _unpickled(file: FileRef) -> tuple[Any, list[Finding]]:
    if file.size > _MAX_METADATA:
        raise UnsupportedError(f"the metadata has {file.size} bytes; at most {_MAX_METADATA} are read", path=file.url)
    data, objects = Span(file, 0, file.size).read(), TorchObjects(dict[str, Storage]().__getitem__)  # it has no storages
    root, machine, told = unpickle(data, objects, file=file, format="dcp", record=file.name, entries=carry_out_entries)
    findings = [finding for finding in told if finding.kind != "data classes"]  # its own records
    if machine.end != len(data):
        findings.append(trailing_finding(len(data) - machine.end, file.name))
    return root, findings  # and not the machine, whose memo is as large as what is listed


def _listed(folder: Folder, file: FileRef, metadata: dict[str, Any], findings: list[Finding]) -> Checkpoint:
    entries = metadata.get("state_dict_metadata")
    if type(entries) is not dict or not all(isinstance(name, str) for name in entries):
        raise CorruptFileError("the metadata holds no table of tensors by name")
    spans, files = _spans(metadata.get("storage_data"), folder)
    troubles: Troubles = {}
    budget = _Budget(file.size)
    leaves: dict[str, Any] = {}
    wholes: dict[int, Any] = {}  # by the ids of entries, of which alike ones are one
    for name, entry in entries.items():
        try:
            if (whole := wholes.get(id(entry), ...)) is ...:
                whole = wholes[id(entry)] = _whole(entry)
            if whole is not None:
                spec, strides, offsets, nbytes, grad = whole
                place = spans.get((name, offsets))
                if type(place) is Span and place.nbytes >= nbytes:
                    chunk = _made(Chunk, (name, spec.dtype, offsets, spec.shape, place))
                    leaves[name] = LazyTensor(spec, _made(Stored, (chunk, 0, strides, "little")), grad)
                    continue
            if isinstance(entry, Inert) and entry.dotted == _OBJECT:
                _fields(entry, _OBJECT)
                leaves[name] = _object(name, spans, budget, troubles, findings)
            else:
                leaves[name] = _tensor(name, _tensor_entry(entry), spans, budget, troubles)
        except Exception:  # entering a context for each of very many would take a tenth of the time
            with located(tensor=name):
                raise
    for (kind, severity, reason, hint), names in troubles.items():
        more = f", and {len(names) - 1} more" if len(names) > 1 else ""
        findings.append(Finding(kind, severity, f"{names[0]!r}{more}: {reason}", {"names": names[:100]}, hint))
    meta = metadata.get("storage_meta")
    about = {**({} if meta is None else _fields(meta, f"{ROOM}.StorageMeta")), "version": metadata.get("version")}
    about = {key: value for key, value in about.items() if isinstance(value, str)}
    tree, name = _nested(leaves, metadata.get("planner_data")), folder.url.rstrip("/").rpartition("/")[2]
    ckpt = Checkpoint(tree, name=name, format="dcp", metadata=about, findings=tuple(findings), source=file)
    missing = [path for path, found in files.items() if found is None]
    if missing:
        told = f"{len(missing)} of {len(files)} files of chunks are not there: {', '.join(missing[:3])}"
        hint = "copy them into the folder; everything is listed in .partial, and what the others hold is read there"
        error = MissingShardError(told, path=folder.url, hint=hint)
        error.partial = ckpt  # type: ignore[attr-defined]
        raise error
    return ckpt


def _spans(storage_data: Any, folder: Folder) -> tuple[dict[Any, Place], dict[str, FileRef | None]]:
    """(name, offsets) -> the bytes of a chunk or object, or the reason why they cannot be read; and the files that hold them."""
    spans: dict[Any, Place] = {}
    files: dict[str, FileRef | None] = {}
    watched = _WATCHED.get()
    for index, node in _table(storage_data, "of where the bytes lie").items():
        key = (*index,) if type(index) is IndexEntry else _index(index)
        told = None if type(node) is PlaceEntry else _fields(node, _PLACE)
        path, start, nbytes = node if told is None else map(told.get, PlaceEntry._fields)
        if not (isinstance(key[0], str) and isinstance(path, str) and type(start) is type(nbytes) is int and start >= 0 <= nbytes):
            raise CorruptFileError("the metadata names bytes without saying whose they are or where they lie")
        if key in spans:
            raise CorruptFileError("the metadata says twice where the bytes lie", tensor=key[0])
        if path not in files:
            if len(files) == _MAX_FILES:
                raise UnsupportedError(f"the metadata names more than {_MAX_FILES} files")
            try:
                files[path] = folder.file(path)
            except MissingFileError:
                files[path] = None
        file = files[path]
        transforms = None if told is None else told.get("transform_descriptors")
        if not (transforms is None or (type(transforms) in (list, tuple) and {str}.issuperset(map(type, transforms)))):
            raise CorruptFileError("the metadata does not say plainly how the bytes were transformed", tensor=key[0])
        if key[1] is None and file is not None and watched is not None:
            watched.append(Span(file, min(start, file.size), max(0, min(nbytes, file.size - start))))
        if file is None:
            spans[key] = f"{path} is not there"
        elif transforms:
            spans[key] = _TRANSFORMED
        else:
            cut = start + nbytes > file.identity[2]
            spans[key] = f"{path} is cut: the bytes end behind its end" if cut else _made(Span, (file, start, nbytes, None))
    return spans, files


def _index(node: Any) -> tuple[Any, Counts | None]:
    told = _fields(node, f"{ROOM}.MetadataIndex")
    return told.get("fqn"), None if told.get("offset") is None else _size(told["offset"])


def _tensor_entry(node: Any) -> TensorEntry:
    if type(node) is TensorEntry:
        return node
    told = _fields(node, f"{ROOM}.TensorStorageMetadata")
    properties, chunks = told.get("properties"), told.get("chunks")
    marks = properties.state if isinstance(properties, Inert) and isinstance(properties.state, tuple) and _is_filled(properties) else ()
    if len(marks) < 3 or not isinstance(marks[0], Global) or marks[0].module != "torch" or not isinstance(marks[1], Inert):
        raise CorruptFileError("the metadata does not say a tensor's element type and layout")
    if marks[1].args != STRIDED:
        raise UnsupportedError("a chunked tensor of another layout than torch.strided is not read")
    if type(chunks) is not list:
        raise CorruptFileError("the metadata does not list the chunks of a tensor")
    return TensorEntry(marks[0], marks[2] is True, _size(told.get("size")), chunks)


def _chunk_entry(node: Any) -> ChunkEntry:
    if type(node) is ChunkEntry:
        return node
    told = _fields(node, f"{ROOM}.ChunkStorageMetadata")
    return ChunkEntry(_size(told.get("offsets")), _size(told.get("sizes")))


def _size(node: Any) -> Counts:
    """A torch.Size of a tuple, as torch writes it: what a list holds may change after it was read."""
    if type(node.args[0] if isinstance(node, Inert) and isinstance(node.args, tuple) and node.args else node) is not tuple:
        raise CorruptFileError("a size in the metadata is not a tuple of counts")
    return sizes(node)


def _tensor(name: str, entry: TensorEntry, spans: dict[Any, Place], budget: _Budget, troubles: Troubles) -> LazyTensor:
    spec, strides, whole = _form(entry.dtype.name, entry.size)
    trouble, chunks = None, []
    for offsets, extents in whole if entry.chunks == whole else _tiling(spec.shape, entry.chunks, budget):
        nbytes = math.prod(extents) * spec.dtype.itemsize
        place = spans.get((name, offsets), "the metadata does not say where its bytes lie") if nbytes else ""
        if type(place) is Span and place.nbytes >= nbytes:
            chunks.append(Chunk(name, spec.dtype, offsets, extents, place))
        elif nbytes:  # a rank that has no part of the tensor records an empty chunk
            trouble = place if isinstance(place, str) else "the bytes cannot hold a chunk of that size"
    if trouble:
        troubles.setdefault(("values locked", "danger", trouble, "what is locked is listed; its values are refused"), []).append(name)
    return LazyTensor(spec, Stored(Tiles(spec.dtype, spec.shape, tuple(chunks)), 0, strides), entry.requires_grad, trouble)


def _whole(entry: Any) -> tuple[TensorSpec, Counts, Counts, int, bool] | None:
    """Of a tensor in one chunk, as most are: spec, strides, where the chunk lies, its bytes, and whether it requires grad."""
    if type(entry) is not TensorEntry:
        return None
    spec, strides, whole = _form(entry.dtype.name, entry.size)
    return (spec, strides, whole[0].offsets, spec.nbytes, entry.requires_grad) if entry.chunks == whole and spec.nbytes else None


@lru_cache(maxsize=4096)
def _form(dtype: str, shape: Counts) -> tuple[TensorSpec, Counts, list[ChunkEntry]]:
    """What all tensors of one kind share: spec, strides, and the chunk that is the whole of it."""
    spec = TensorSpec(dtypes.DTYPES.get(dtype) or dtypes.dtype(dtype), sizes(shape))
    return spec, row_major(shape), [ChunkEntry((0,) * len(shape), shape)]


def _tiling(shape: Counts, nodes: list[Any], budget: _Budget) -> list[ChunkEntry]:
    """The chunks that hold something, which cover the shape once; raises where they do not."""
    budget.coordinates -= len(nodes) * (1 + len(shape))
    if budget.coordinates < 0:
        raise UnsupportedError("the metadata tells of more chunks than it has room for: they are one another's copies")
    chunks = list(map(_chunk_entry, nodes))
    for offsets, extents in chunks:
        if not len(offsets) == len(extents) == len(shape) or any(o + n > m for o, n, m in zip(offsets, extents, shape, strict=True)):
            raise CorruptFileError(f"the chunk at {list(offsets)} of size {list(extents)} lies outside of {list(shape)}")
    tiles = [chunk for chunk in chunks if math.prod(chunk.sizes)]
    covered, numel = sum(math.prod(chunk.sizes) for chunk in tiles), math.prod(shape)
    if covered != numel:
        raise CorruptFileError(f"the chunks hold {covered} elements and the tensor has {numel}: they overlap or leave a hole")
    cuts = [sorted({chunk.offsets[axis] for chunk in tiles}) for axis in range(len(shape))]
    steps = [dict(zip(starts, [*starts[1:], size], strict=False)) for starts, size in zip(cuts, shape, strict=True)]
    is_grid = all(step[o] == o + n for offsets, extents in tiles for step, o, n in zip(steps, offsets, extents, strict=True))
    if is_grid and len({chunk.offsets for chunk in tiles}) == len(tiles):
        return tiles  # whole cells of a grid, each once, and as many elements as there are
    axis = max(range(len(shape)), key=lambda i: len(cuts[i]), default=0)
    begun: list[ChunkEntry] = []
    for chunk in sorted(tiles, key=lambda tile: tile.offsets[axis : axis + 1]):
        offsets, extents = chunk
        begun = [other for other in begun if other[0][axis] + other[1][axis] > offsets[axis]]
        budget.comparisons -= len(begun)
        if budget.comparisons < 0:
            raise UnsupportedError(f"{len(tiles)} chunks lie in a pattern too intricate to be proved")
        if any(all(o < p + m and p < o + n for o, n, p, m in zip(offsets, extents, *other, strict=True)) for other in begun):
            raise CorruptFileError(f"the chunk at {list(offsets)} overlaps another")
        begun.append(chunk)
    return tiles


def _object(name: str, spans: dict[Any, Place], budget: _Budget, troubles: Troubles, findings: list[Finding]) -> Any:
    """What a pickled object is."""
    place, told = spans.get((name, None), "the metadata does not say where it lies"), ("object not read", "warning")
    told = ("unreadable pickle", "danger") if isinstance(place, str) else told
    reason = place if isinstance(place, str) else f"only {_MAX_OBJECTS} bytes of objects are looked at when a folder is listed"
    try:
        if isinstance(place, Span):
            with place.file.kept_open():
                data, cost = place.read() if place.nbytes <= _LEAST else b"", max(place.nbytes, _LEAST)
                if data in budget.atoms:
                    return budget.atoms[data]
                if cost <= budget.objects:
                    budget.objects -= cost
                    index = read_zip_index(place.file, place)
                    if place.read(0, 4) != b"PK\3\4" or any(record.endswith("/constants.pkl") for record in index.records):
                        raise UnsupportedError("it is no archive as torch.save writes them")
                    swollen = max((record.size for record in index.records.values()), default=0) - cost
                    if swollen <= budget.objects:
                        budget.objects -= max(0, swollen)
                        held = torch_zip.open_archive(index)
                        findings += [replace(finding, where={**finding.where, "record": name}) for finding in held.findings]
                        if (
                            data
                            and not held.findings
                            and all(type(x) in _ATOMS for x in (held.tree if type(held.tree) is tuple else (held.tree,)))
                        ):
                            budget.atoms[data] = held.tree
                        return held.tree
    except FormatError as error:
        told, reason = ("unreadable pickle", "danger"), f"it may hide anything: {error.message}"
    troubles.setdefault((*told, reason, "wb.scan looks into each"), []).append(name)  # type: ignore[arg-type]
    return Global(ROOM, "BytesStorageMetadata")


def _nested(leaves: dict[str, Any], paths: Any) -> Any:
    """The leaves at the paths that the planner recorded; a flat dict where it recorded none."""
    branches: dict[tuple[Any, ...], dict[Any, Any]] = {(): {}}
    told = _table(paths, "of paths")
    above: list[Any] = []
    parent: dict[Any, Any] | None = branches[()]
    for name, leaf in leaves.items():
        path = told.get(name, (name,))
        if not (isinstance(path, tuple) and 0 < len(path) <= _MAX_STEPS and _STEPS.issuperset(map(type, path))):
            raise CorruptFileError("the metadata gives it no path of keys and positions", tensor=name)
        *before, last = path
        if before != above:
            above, parent = before, branches.get(path[:-1])
        if parent is None:
            parent = branches[()]
            for depth in range(1, len(path)):
                here = path[:depth]
                if here not in branches and here[-1] in parent:
                    raise CorruptFileError(f"the path {path!r} is taken by something else", tensor=name)
                parent = parent.setdefault(here[-1], branches.setdefault(here, {}))
        if last in parent:
            raise CorruptFileError(f"the path {path!r} is taken by something else", tensor=name)
        parent[last] = leaf
    for here in sorted(branches, key=len, reverse=True):
        if here and branches[here].keys() == set(range(len(branches[here]))):  # positions, and so a list
            branches[here[:-1]][here[-1]] = [branches[here][i] for i in range(len(branches[here]))]
    return branches[()]


def _table(node: Any, what: str) -> dict[Any, Any]:
    """A plain dict, as torch writes it, or none at all."""
    if not (node is None or type(node) is dict):
        raise CorruptFileError(f"the metadata holds something else where a table {what} must be")
    return node or {}


def _fields(node: Any, dotted: str) -> dict[str, Any]:
    """What an object of the metadata says: one of this class, made empty and then given its state, as pickle makes a dataclass."""
    if isinstance(node, Inert) and node.dotted == dotted and _is_filled(node) and (type(node.state) is dict or node.state is NOTHING):
        return node.state if type(node.state) is dict else {}
    raise CorruptFileError(
        f"the metadata holds something else where a {dotted.rpartition('.')[2]} must be, or one that was not made plainly"
    )


def _is_filled(node: Inert) -> bool:
    return node.new and node.args == () and not (node.kwargs or node.items or node.elements)
