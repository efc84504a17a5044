"""Why it did not shrink: every cause that keeps a compressed checkpoint larger than it could be, with its bytes and its cure.

Owns the causes and when each is told. A cause is one function from the two sides to findings; a new one goes into `_CAUSES`.
Nothing is told that the bytes do not show: shares are taken of the file as it is, and values are read where names would only hint.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from workbench.analyses.sizes import ledger
from workbench.analyses.statistics import TensorStats, stats
from workbench.checkpoint import Checkpoint
from workbench.errors import UnknownFormatError, visible
from workbench.files import Span, file_ref
from workbench.opening import open as open_checkpoint
from workbench.report import Report
from workbench.stream import ProgressFunction
from workbench.tables import Column, Table, format_bytes, table
from workbench.tensors import LazyTensor, parts

_PACKED = {b"\x28\xb5\x2f\xfd": "zstd", b"\x1f\x8b": "gzip", b"\xfd7zXZ": "xz", b"BZh": "bzip2"}
_CODES = frozenset({"int8", "uint8", "int32", "qint8", "quint8", "float8_e4m3fn", "float8_e5m2"})
_QUANTIZED_OPS = frozenset({
    "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "ConvInteger", "QLinearConv", "QLinearMatMul", "MatMulNBits",
    "DynamicQuantizeMatMul", "DynamicQuantizeLSTM", "QAttention", "QGemm", "GatherBlockQuantized",
})  # fmt: skip


@dataclass(frozen=True)
class Cause:
    """One thing that takes bytes: how many, and the line that ends it."""

    kind: str
    nbytes: int
    message: str
    cure: str


@dataclass(frozen=True, repr=False)
class ShrinkageReport(Report):
    """What keeps the second file larger than it could be, largest first; true where nothing does."""

    before: int
    after: int
    causes: tuple[Cause, ...]

    @property
    def ok(self) -> bool:
        return not self.causes

    @property
    def headline(self) -> str:
        share = f"{100 * self.after / self.before:.3g} % of" if self.before else "beside"
        text = f"{format_bytes(self.after)}, {share} {format_bytes(self.before)}"
        if not self.causes:
            return f"{text}; nothing keeps it larger than it must be"
        more = f" (and {len(self.causes) - 1} more)" if len(self.causes) > 1 else ""
        return f"{text}: {self.causes[0].message}{more}"

    def tables(self) -> tuple[Table, ...]:
        columns = (Column("cause"), Column("bytes", "bytes", "what it takes, about"), Column("what"), Column("cure", "code"))
        return (table("causes", columns, [(c.kind, c.nbytes, c.message, c.cure) for c in self.causes], empty="no cause was found"),)


class _Side:
    """One of the two: its checkpoint, unless it lies in a packed file that nothing opens, and its bytes."""

    def __init__(self, source: Any, progress: ProgressFunction | None = None, cancel: threading.Event | None = None) -> None:
        self._how = {"progress": progress, "cancel": cancel}
        self.packed: str | None = None
        try:
            self.ckpt = open_checkpoint(source)
        except UnknownFormatError:
            file = file_ref(source) if isinstance(source, (str, os.PathLike)) else None
            head = Span(file, 0, min(file.size, 8)).read(0, min(file.size, 8)) if file is not None else b""
            self.packed = next((name for magic, name in _PACKED.items() if head.startswith(magic)), None)
            if self.packed is None or file is None:
                raise
            self.ckpt, self.nbytes = Checkpoint({}), file.size
            return
        self.nbytes = self.ledger.total

    @cached_property
    def ledger(self) -> Any:
        return ledger(self.ckpt)

    @cached_property
    def codes(self) -> dict[str, LazyTensor]:
        """Quantized values: torch's own kind, 8-bit floats, and integers with a scale in the same place."""
        homes = {_home(name) for name, t in self.ckpt.items() if "scale" in name.rpartition(".")[2] and t.dtype.is_floating}
        return {
            name: t
            for name, t in self.ckpt.items()
            if t.spec.quantizer is not None or (t.dtype.name in _CODES and not _is_scale(name) and _home(name) in homes)
        }

    @cached_property
    def stats(self) -> dict[str, TensorStats]:
        """Of dense floating matrices and of codes."""
        chosen = [n for n in self.ckpt if n in self.matrices or n in self.codes]
        return {row.name: row for row in stats(self.ckpt, chosen, histogram=False, **self._how).rows} if chosen else {}  # type: ignore[arg-type]

    @cached_property
    def matrices(self) -> dict[str, LazyTensor]:
        ties = self.ckpt.aliases
        return {
            name: t
            for name, t in self.ckpt.items()
            if t.ndim >= 2
            and t.dtype.is_floating
            and t.spec.layout == "strided"
            and name not in self.codes
            and not _is_scale(name)
            and name not in ties
        }

    @cached_property
    def operators(self) -> list[Any]:
        """The nodes of an ONNX graph."""
        if self.ckpt.format != "onnx" or self.ckpt.source is None:
            return []
        import onnx

        return list(onnx.load(self.ckpt.source.url, load_external_data=False).graph.node)

    def nbytes_of(self, names: Any) -> int:
        return sum(self.ckpt[name].nbytes for name in names)


def _home(name: str) -> str:
    """The module that a tensor serves, whatever its container calls the parts of one weight: `fc.weight.qdata`, `fc.weight_scale`."""
    head, _, last = name.rpartition(".")
    return head.removesuffix(".weight") if last in ("qdata", "scale", "zero_point") else head.removesuffix("._packed_params._packed_params")


def _is_scale(name: str) -> bool:
    last = name.rpartition(".")[2]
    return "scale" in last or "zero_point" in last


def explain_size(
    before: Any, after: Any, *, progress: ProgressFunction | None = None, cancel: threading.Event | None = None
) -> ShrinkageReport:
    """Say why a checkpoint did not shrink, or not as much as it could have.

    Args:
        before, after: what `wb.open` takes; `after` may also be a file packed by zstd, gzip, xz or bzip2.
    Returns:
        A report, false where there is a cause; each names its bytes and one line of cure.
    Cost: one read of the matrices of `after`.
    """
    old, new = _Side(before), _Side(after, progress, cancel)
    found = [cause for rule in _CAUSES for cause in rule(old, new)]
    if not found and new.packed is None:
        found += _nothing_changed(old, new)
    return ShrinkageReport(old.nbytes, new.nbytes, tuple(sorted(found, key=lambda cause: -cause.nbytes)))


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(map(visible, names[:3]))
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown


def _zeros(old: _Side, new: _Side) -> Iterator[Cause]:
    masks = {m for m in new.matrices if m.endswith("_mask") and f"{m[:-5]}_orig" in new.ckpt}
    held = {n: (r.zeros or 0) * new.ckpt[n].dtype.itemsize for n, r in new.stats.items() if n in new.matrices and n not in masks}
    sparse = {n: b for n, b in held.items() if b >= 0.3 * new.ckpt[n].nbytes and b}
    if sum(sparse.values()) >= 0.05 * new.nbytes > 0:
        share = sum(sparse.values()) / new.nbytes_of(sparse)
        text = f"{100 * share:.0f} % of {_some(list(sparse))} is zero, and a zero takes as many bytes as any other number"
        yield Cause(
            "pruned but dense",
            sum(sparse.values()),
            text,
            "wb.models.slim(model, …) takes rows out; wb.sparsity(ckpt) compares what packs zeros",
        )


def _masks(old: _Side, new: _Side) -> Iterator[Cause]:
    pairs = [n for n in new.ckpt if n.endswith("_mask") and f"{n[:-5]}_orig" in new.ckpt]
    if pairs:
        text = f"a mask lies beside each weight it prunes: {_some(pairs)}"
        yield Cause("masks kept", new.nbytes_of(pairs), text, "wb.ops.finish_pruning(ckpt)")


def _narrow_codes(old: _Side, new: _Side) -> Iterator[Cause]:
    wide = []
    for name, tensor in new.codes.items():
        row = new.stats[name]
        if (
            tensor.dtype.itemsize == 1
            and not tensor.dtype.is_floating
            and row.count >= 256
            and row.min is not None
            and row.max is not None
            and row.max - row.min <= 15
        ):
            wide.append(name)
    if wide:
        text = f"the values of {_some(wide)} need 4 bits and each takes 8"
        yield Cause("int4 kept in int8", new.nbytes_of(wide) // 2, text, 'wb.ops.quantize(ckpt, "int4") packs two in a byte')


def _scales(old: _Side, new: _Side) -> Iterator[Cause]:
    homes = {_home(name) for name in new.codes}
    scales = [name for name in new.ckpt if _is_scale(name) and _home(name) in homes]
    codes, taken = new.nbytes_of(new.codes), new.nbytes_of(scales)
    if taken > 0.3 * codes and taken > 0.05 * new.nbytes:
        text = f"scales and zero points take {100 * taken / codes:.0f} % of what the codes take: each serves few values"
        yield Cause("small groups", taken, text, 'wb.ops.quantize(ckpt, {"scheme": "int4", "group_size": 128}), or symmetric=True')


def _not_quantized(old: _Side, new: _Side) -> Iterator[Cause]:
    if not new.codes:
        return
    wide = sorted((n for n, t in new.matrices.items() if t.dtype.itemsize >= 2), key=lambda n: -new.ckpt[n].nbytes)
    taken = new.nbytes_of(wide)
    if taken >= 0.5 * new.nbytes:
        text = f"{100 * taken / new.nbytes:.0f} % of the bytes were not quantized: {_some(wide)}"
        yield Cause("most was left out", taken, text, f"wb.ops.quantize(ckpt, names=[{wide[0]!r}, …]), or a bfloat16 plan for them")


def _training_state(old: _Side, new: _Side) -> Iterator[Cause]:
    own = {"weights": "weights", "ema": "averaged weights"}.get(new.ckpt.weights_section.kind)
    for what, kind in (("optimizer state", "optimizer state kept"), ("averaged weights", "averaged weights kept")):
        rows = [row for row in new.ledger.rows if row.what == what and what != own]
        if rows:
            text = f"{what} of {_some(list(dict.fromkeys(row.section or '(root)' for row in rows)))} lies in the file"
            yield Cause(kind, sum(row.nbytes for row in rows), text, 'wb.save(ckpt.weights, "weights.safetensors")')


def _master_copies(old: _Side, new: _Side) -> Iterator[Cause]:
    wide = {n: t for n, t in new.matrices.items() if t.dtype.name == "float32"}
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for name, tensor in wide.items():
        by_shape.setdefault(tensor.shape, []).append(name)
    copies: dict[str, str] = {}
    for name, tensor in new.matrices.items():
        if tensor.dtype.itemsize != 2:
            continue
        for other in by_shape.get(tensor.shape, ()):
            if other not in copies and all(
                math.isclose(a, b, rel_tol=2**-7, abs_tol=1e-7) for a, b in zip(tensor.peek(16), wide[other].peek(16), strict=True)
            ):
                copies[other] = name
                break
    for name in new.codes:
        plain = name.removesuffix("_packed").removesuffix(".qdata")
        if plain != name and plain in wide:
            copies[plain] = name
    if copies:
        first, narrow = next(iter(copies.items()))
        text = f"{len(copies)} float32 copies lie beside the smaller tensors, such as {visible(first)} beside {visible(narrow)}"
        yield Cause(
            "float32 copies kept", new.nbytes_of(copies), text, f"wb.save(ckpt.drop({first!r}), …), or ckpt.section(…) of the smaller ones"
        )


def _broken_ties(old: _Side, new: _Side) -> Iterator[Cause]:
    ties = new.ckpt.aliases
    broken = []
    for name, first in old.ckpt.aliases.items():
        now = [next((n for n in (each, f"{each}_packed", f"{each}.qdata") if n in new.ckpt), None) for each in (name, first)]
        if None not in now and ties.get(str(now[0]), now[0]) != ties.get(str(now[1]), now[1]):
            broken.append(str(now[0]))
    if broken:
        text = f"{_some(broken)} shared its values with another tensor, and is stored again"
        yield Cause(
            "ties broken",
            new.nbytes_of(broken),
            text,
            "tie them again in the model before saving: wb.open(model) keeps ties, wb.ops do too",
        )


def _entropy(old: _Side, new: _Side) -> Iterator[Cause]:
    stored = [s for t in new.ckpt.values() for leaf in parts(t) if (s := getattr(leaf.source, "storage", None)) is not None]
    deflated = {s: s.span.nbytes for s in stored if type(s).__name__ == "Inflated"}
    packed, plain = sum(deflated.values()), sum(s.nbytes for s in deflated)
    if new.packed is not None:
        packed, plain = new.nbytes, old.nbytes
    if plain and packed > 0.8 * plain:
        text = f"{new.packed or 'deflate'} takes {100 * packed / plain:.0f} %: the low bits of trained floats are random, and nothing packs those"
        yield Cause(
            "packing does not help",
            packed,
            text,
            "quantize first: wb.ops.quantize(ckpt); packing pays after pruning, or on exponents alone",
        )


def _sparse(old: _Side, new: _Side) -> Iterator[Cause]:
    larger: list[str] = []
    taken = dense = 0
    for name, tensor in new.ckpt.items():
        held = sum(leaf.nbytes for leaf in parts(tensor)) if tensor.spec.layout.startswith("sparse") else 0
        if held > tensor.nbytes:
            larger, taken, dense = [*larger, name], taken + held, dense + tensor.nbytes
    if larger:
        text = f"as sparse tensors {_some(larger)} take {format_bytes(taken)}, and dense ones would take {format_bytes(dense)}: each index takes 4 or 8 bytes"
        yield Cause(
            "sparse is larger than dense",
            taken - dense,
            text,
            "keep them dense (tensor.to_dense()), or prune past 67 % (int32 indices 50 %)",
        )


def _untouched_gemms(old: _Side, new: _Side) -> Iterator[Cause]:
    kinds = {node.op_type for node in new.operators}
    shrunk = bool(kinds & (_QUANTIZED_OPS - {"MatMulNBits"}))
    names = [name for node in new.operators if node.op_type == "Gemm" for name in node.input if name in new.matrices]
    taken = new.nbytes_of(set(names))
    if not shrunk and taken >= 0.2 * new.nbytes and ("MatMulNBits" in kinds or new.nbytes >= 0.95 * old.nbytes):
        text = f"{len(names)} Gemm nodes keep their weights in floats: 4-bit quantization takes MatMul alone"
        yield Cause("Gemm untouched", taken, text, 'wb.models.quantize(model, "onnx_4bit") makes MatMul of Gemm first')


def _container(old: _Side, new: _Side) -> Iterator[Cause]:
    held = sum(row.nbytes for row in new.ledger.rows if row.what.startswith("container")) if new.packed is None else 0
    if held > 0.3 * new.nbytes:
        what = "the graph" if new.operators else "the container (index, headers, padding)"
        text = f"{what} takes {100 * held / new.nbytes:.0f} % of this small file, and no fewer bits in the weights make it less"
        yield Cause(
            "mostly container",
            held,
            text,
            "nothing to gain here; safetensors has the smallest container: wb.save(ckpt, 'small.safetensors')",
        )


def _dragged(old: _Side, new: _Side) -> Iterator[Cause]:
    waste = sum(row.nbytes for row in new.ledger.rows if row.waste) if new.packed is None else 0
    if waste > 0.01 * new.nbytes:
        text = "tensors are views into larger storages, which are saved whole"
        yield Cause(
            "views drag storages", waste, text, "wb.save(ckpt, 'x.safetensors') writes what is seen; in torch, tensor.clone() before saving"
        )


def _nothing_changed(old: _Side, new: _Side) -> Iterator[Cause]:
    """Where nothing else explains it and the tensors take what they took."""
    taken = new.ckpt.nbytes
    if (
        taken >= 0.95 * old.ckpt.nbytes > 0
        and new.nbytes > 0.9 * old.nbytes
        and not new.codes
        and not {node.op_type for node in new.operators} & _QUANTIZED_OPS
    ):
        types = _some(sorted({t.dtype.name for t in new.matrices.values()}) or ["no matrix"])
        text = f"0 of {len(new.matrices)} weights were quantized: all are {types}, as before"
        yield Cause(
            "0 ops quantized", taken, text, "wb.ops.quantize(ckpt); for a model, wb.models.quantize tells which modules it can take"
        )


_CAUSES = (
    _zeros, _masks, _narrow_codes, _scales, _not_quantized, _training_state, _master_copies, _broken_ties, _entropy, _sparse, _untouched_gemms,
    _container, _dragged,
)  # fmt: skip
