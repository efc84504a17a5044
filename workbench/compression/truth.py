"""The ledger of truth: what a file will weigh before it is written, and what it weighs, costs and answers once it is.

Owns predictions, and the sentences that explain where one missed. Files that this library writes are laid out before their first byte,
so their prediction is exact; what another engine writes is estimated from the types it will use; packing is sampled. Everything that
is measured on a model is `wb.compare`'s.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from workbench.analyses.sizes import LedgerRow, ledger
from workbench.checkpoint import Checkpoint
from workbench.errors import FormatError, MissingDependencyError, SelectionError
from workbench.files import Span, Storage, file_ref, read_span
from workbench.formats import save
from workbench.opening import open as open_checkpoint
from workbench.ops.quantization import Told, quantize
from workbench.report import Report
from workbench.stream import Meter, ProgressFunction, bytes_of
from workbench.tables import Column, Table, format_bytes, format_seconds, table
from workbench.tensors import LazyTensor, Memo
from workbench.verification.variants import CompareReport, Metric, Variant, compare

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BLOCK, _BLOCKS = 512 << 10, 8  # what is packed of a large tensor to judge the rest
_SLOWER = 1.2
_ONNX = {  # by method of wb.models.quantize: the nodes it takes, bits a weight, and about how many bytes of graph it puts in place of each
    "onnx_dynamic": ({"MatMul", "Gemm", "Conv", "Gather"}, 8, 1600),
    "onnx_static": ({"MatMul", "Gemm", "Conv", "Gather"}, 8, 3300),
    "onnx_4bit": ({"MatMul", "Gemm"}, 4, 450),
}
_ONNX_GROUP = 32


@dataclass(frozen=True, repr=False)
class Prediction(Report):
    """What a file will weigh.

    Attributes:
        tensors, container: bytes of values, and of all else: index, headers, padding, graph.
        zstd: bytes once packed, or None where it was not asked for.
        exact: whether the file was laid out to the byte, or estimated.
    """

    target: str
    tensors: int
    container: int
    zstd: int | None = None
    exact: bool = True

    @property
    def nbytes(self) -> int:
        return self.tensors + self.container

    @property
    def headline(self) -> str:
        packed = f"; packed by zstd about {format_bytes(self.zstd)}" if self.zstd is not None else ""
        return f"{self.target} will have {'' if self.exact else 'about '}{format_bytes(self.nbytes)} ({self.nbytes} bytes){packed}"

    def tables(self) -> tuple[Table, ...]:
        rows = [("values", self.tensors), ("container", self.container), ("file", self.nbytes), ("packed by zstd", self.zstd)]
        return (table("prediction", (Column("what"), Column("bytes", "bytes")), rows),)


def predict(
    source: Any,
    target: str | os.PathLike[str] = "model.safetensors",
    *,
    scheme: Told | None = None,
    method: str | None = None,
    zstd: int | None = None,
    max_ram_mb: int = 256,
    progress: ProgressFunction | None = None,
    cancel: threading.Event | None = None,
    **options: Any,
) -> Prediction:
    """Say what a file will weigh, and write nothing.

    Args:
        source: the result of an op, or anything `wb.open` takes; with a `.onnx` target, the path of the graph as it is.
        target: the path it would get (a .pt names its records after it), or a format: "safetensors", "torch-zip", "gguf".
        scheme: predict what `wb.ops.quantize` will make of the source; torch's own int8 comes to about as much.
        method: of a graph, predict what `wb.models.quantize` will make of it: "onnx_dynamic", "onnx_static" or "onnx_4bit" in groups of 32.
        zstd: also the bytes after zstd at this level, by packing samples of every large tensor.
        options: what else `wb.save` would be given for such a file.
    Returns:
        Exact for what `wb.save` writes; an estimate where ONNX Runtime writes, within 2 % or 4 kB, and for zstd, within 5 %.
    Raises:
        SelectionError: the format would lose something, as in `wb.save`. MissingDependencyError: zstd without zstandard.
    Cost: the index; with zstd, up to 3 MB of each tensor.
    """
    target = os.fspath(target)
    if target.lower().endswith(".onnx"):
        return _onnx(Path(source), target, method)
    ckpt = open_checkpoint(source)
    if scheme is not None:
        ckpt = quantize(ckpt, scheme)
    formats = {"torch-zip": "model.pt", "safetensors": "model.safetensors", "gguf": "model.gguf"}
    layout = save(ckpt, formats.get(target, target), dry_run=True, **options).layout
    assert layout is not None
    values = sum(target.nbytes for target in layout.targets)
    packed = None
    if zstd is not None:
        meter = Meter("sampling", sum(min(t.nbytes, _BLOCK * _BLOCKS) for t in layout.targets), progress, cancel)
        pieces = sorted([*layout.fixed, *((t.offset, t.tensor) for t in layout.targets)], key=lambda piece: piece[0])
        packed = _packed([piece for _, piece in pieces], zstd, max_ram_mb * 10**6, meter)
    return Prediction(os.path.basename(target), values, layout.nbytes - values, packed)


def _onnx(path: Path, target: str, method: str | None) -> Prediction:
    """A graph whose float weights get fewer bits, and each of their nodes the nodes that a quantizer puts in its place."""
    import onnx

    graph, opened = onnx.load(str(path), load_external_data=False).graph, open_checkpoint(path)
    if method not in (None, *_ONNX):
        raise SelectionError(f"{method!r} is no method for a graph", hint=f"there are {', '.join(_ONNX)}")
    kinds, bits, node_nbytes = _ONNX.get(method or "", (set(), 32, 0))
    named = {name for node in graph.node if node.op_type in kinds for name in node.input[:2] if name in opened}
    taken = {name for name in named if opened[name].ndim >= 2 and opened[name].dtype.name == "float32"}
    values = after = sum(tensor.nbytes for tensor in opened.values())
    for tensor in (opened[name] for name in taken):
        scales = 5 * tensor.shape[0] if bits == 8 else 4 * (tensor.numel // _ONNX_GROUP)
        after += tensor.numel * bits // 8 + scales - tensor.nbytes
    container = ledger(opened).total - values
    if taken:  # shapes of inner values are dropped
        container += sum(node_nbytes - node.ByteSize() for node in graph.node if taken & set(node.input)) - sum(
            v.ByteSize() + 4 for v in graph.value_info
        )
    return Prediction(os.path.basename(target), after, container, exact=not taken)


class _Packer:
    """Counts what zstd makes of bytes that come in pieces."""

    def __init__(self, level: int) -> None:
        try:
            import zstandard
        except ImportError as error:
            raise MissingDependencyError("zstandard is not installed", hint='pip install "checkpoint-workbench[compress]"') from error
        self._engine, self.nbytes = zstandard.ZstdCompressor(level=level).compressobj(), 0

    def add(self, data: Any) -> None:
        self.nbytes += len(self._engine.compress(data))

    def finish(self) -> int:
        return self.nbytes + len(self._engine.flush())


def _packed(pieces: Sequence[Any], level: int, budget: int, meter: Meter) -> int:
    """What zstd makes of the pieces of a file one after another; of a large one, of blocks at even distances."""
    small, large = _Packer(level), 0.0
    for piece in pieces:
        if isinstance(piece, bytes):
            small.add(piece)
            continue
        sampled = piece.nbytes > _BLOCK * _BLOCKS
        own = _Packer(level) if sampled else small
        taken = 0
        for data in _blocks(piece, budget, sampled):
            own.add(data)
            taken += data.nbytes
            meter.advance(data.nbytes)
        large += own.finish() * piece.nbytes / taken if sampled else 0
    return small.finish() + int(large)


def _blocks(piece: LazyTensor | Storage, budget: int, sampled: bool) -> Iterator[memoryview]:
    unit = piece.dtype.itemsize if isinstance(piece, LazyTensor) else 8
    memo, total = Memo(budget), piece.nbytes // unit
    block = _BLOCK // unit
    starts = [i * (total - block) // (_BLOCKS - 1) for i in range(_BLOCKS)] if sampled else range(0, total, block)
    for start in starts:
        stop = min(start + block, total)
        memo.step.clear()
        if isinstance(piece, LazyTensor):
            yield bytes_of(piece.read(start, stop, memo))
        else:
            yield memoryview(read_span(piece, start * unit, piece.nbytes if stop == total and not sampled else stop * unit))


@dataclass(frozen=True)
class Truth:
    """One variant: what was predicted, what was measured, and why they differ. None is not measured."""

    variant: Variant
    predicted: int | None = None
    zstd: int | None = None
    words: tuple[str, ...] = ()


@dataclass(frozen=True, repr=False)
class TruthReport(Report):
    """Predicted and measured, side by side; true when every variant that can run did."""

    rows: tuple[Truth, ...]
    compared: CompareReport = field(repr=False)

    @property
    def ok(self) -> bool:
        return self.compared.ok

    @property
    def headline(self) -> str:
        return self.compared.headline

    def tables(self) -> tuple[Table, ...]:
        (main, *_), sizes = self.compared.tables(), ("predicted", "disk", "zstd")
        columns = (main.columns[0], *(Column(title, "bytes") for title in sizes), *main.columns[2:])
        rows = [(v[0], row.predicted, v[1], row.zstd, *v[2:]) for row, v in zip(self.rows, main.rows, strict=True)]
        told = [(row.variant.name, text) for row in self.rows for text in row.words]
        return table("truth", columns, rows), table("why", (Column("variant", "name"), Column("what")), told)

    def plot(self) -> Figure:
        """Predicted beside measured bytes, and the score."""
        from workbench.render import plots

        found: dict[str, Any] = {
            "predicted": [row.predicted for row in self.rows], "on disk": [row.variant.disk_nbytes for row in self.rows],
            "packed by zstd": [row.zstd for row in self.rows], "RAM": [row.variant.ram_nbytes for row in self.rows],
        }  # fmt: skip
        measures: dict[str, Any] = {name: (values, format_bytes) for name, values in found.items() if any(v is not None for v in values)}
        scores = [row.variant.accuracy for row in self.rows]
        if any(score is not None for score in scores):
            measures[self.compared.metric] = (scores, "{:.4g}".format)
        return plots.side_by_side([row.variant.name for row in self.rows], measures, self.headline)

    def figures(self) -> tuple[Figure, ...]:
        """And the score by size, where both were measured."""
        from workbench.render import plots

        known = [(v.name, v.disk_nbytes, v.accuracy) for v in (r.variant for r in self.rows) if v.disk_nbytes and v.accuracy is not None]
        return (
            self.plot(),
            *([plots.by_size([], known, self.compared.metric, self.headline, "bytes on disk", log=False)] if known else []),
        )


def measure(
    variants: Mapping[str, Any],
    data: Any = None,
    *,
    predicted: Mapping[str, int | Prediction] | None = None,
    metric: str | Metric = "accuracy",
    batches: Sequence[int] = (1, 32),
    zstd: int | None = 3,
    rounds: int = 11,
    threads: int | None = None,
    trust: bool = False,
) -> TruthReport:
    """Measure what compression came to: bytes predicted, on disk, packed and in RAM; latency, output error and score; and why they differ.

    Args:
        variants, data, metric, rounds, threads, trust: as `wb.compare` takes them; the first variant is what the others are held against.
            Without data they are only weighed.
        predicted: {name: bytes or a Prediction}; files that `wb.save` could have written are predicted anew where it says nothing.
        batches: sizes to time: warm, median of `rounds`.
        zstd: level at which each file is packed as a whole, or None.
    Raises:
        SelectionError: as `wb.compare`. MissingDependencyError: zstd without zstandard.
    Cost: that of `wb.compare`, and one read of each file.
    """
    compared = compare(variants, data, metric=metric, batch=list(batches), rounds=rounds, threads=threads, trust=trust)
    rows: list[Truth] = []
    for variant in compared.variants:
        thing = variants[variant.name]
        path = _path(thing)
        told = (predicted or {}).get(variant.name) or _foreseen(thing, path)
        packed = _file_packed(path, zstd) if path is not None and zstd is not None else None
        nbytes = told.nbytes if isinstance(told, Prediction) else told
        foreseen = told if isinstance(told, Prediction) else None
        words = [*_size_words(variant, nbytes, foreseen, packed, path), *_time_words(variant, compared.variants[0])]
        rows.append(Truth(variant, nbytes, packed, tuple(words)))
    return TruthReport(tuple(rows), compared)


def _path(thing: Any) -> Path | None:
    thing = thing[1] if isinstance(thing, tuple) and len(thing) == 2 else thing
    if isinstance(thing, Checkpoint):
        thing = thing.source.url if thing.source is not None and not thing.within else None
    return Path(thing) if isinstance(thing, (str, os.PathLike)) and Path(thing).is_file() else None


def _foreseen(thing: Any, path: Path | None) -> Prediction | None:
    """What `wb.save` would make of it, where it writes such files."""
    try:
        if path is not None:
            return predict(path, path)
        return (
            predict(thing, "model.pt") if isinstance(thing, torch.nn.Module) else predict(thing) if isinstance(thing, Checkpoint) else None
        )
    except (FormatError, SelectionError):
        return None


def _file_packed(path: Path, level: int) -> int:
    file = file_ref(path)
    packer = _Packer(level)
    for start in range(0, file.size, 1 << 20):
        packer.add(Span(file, 0, file.size).read(start, min(start + (1 << 20), file.size)))
    return packer.finish()


def _size_words(
    variant: Variant, predicted: int | None, foreseen: Prediction | None, packed: int | None, path: Path | None
) -> Iterator[str]:
    """Every gap between sizes in a sentence."""
    disk, ram = variant.disk_nbytes, variant.ram_nbytes
    rows = _rows(path)
    carried = ", ".join(f"{format_bytes(row.nbytes)} {row.what}" for row in rows if row.what != "weights")
    if predicted is not None and disk is not None and disk != predicted:
        why = f"beside the weights it holds {carried}" if path is not None else "torch.save has an index of its own"
        if foreseen is not None and rows:
            container = sum(row.nbytes for row in rows if row.what.startswith("container"))
            values = disk - container - foreseen.tensors
            why = f"{values:+d} bytes are values, {container - foreseen.container:+d} index, headers and padding"
        more = f"{abs(disk - predicted)} bytes {'more' if disk > predicted else 'less'}"
        yield f"the file has {more} than predicted ({100 * (disk / max(predicted, 1) - 1):+.2g} %): {why}"
    elif predicted is not None:
        yield "the file has the bytes that were predicted" if disk else "it was never written: the prediction stands for its file"
    if disk and ram and abs(ram - disk) > 0.05 * disk:
        why = "it computes in wider types than the file stores" if ram > disk else f"the file also holds {carried}"
        yield f"in RAM it takes {ram / disk:.2g} × the file: {why}"
    if disk and packed is not None:
        low = ": what is left looks random, and nothing packs that" if packed > 0.85 * disk else ""
        yield f"zstd takes it to {100 * packed / disk:.0f} %{low}"


def _time_words(variant: Variant, first: Variant) -> Iterator[str]:
    size = max(variant.seconds.keys() & first.seconds.keys(), default=0)
    if size and variant is not first and (times := variant.seconds[size] / first.seconds[size]) > _SLOWER:
        took = f"{format_seconds(variant.seconds[size])} for a batch of {size}"
        yield f"it is {times:.2g} × slower ({took}): fewer bits save time only where a kernel computes in them"


def _rows(path: Path | None) -> Sequence[LedgerRow]:
    try:
        return ledger(path).rows if path is not None else ()
    except FormatError:
        return ()
