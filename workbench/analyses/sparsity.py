"""Sparsity: how much of each tensor is zero, whether it is 2:4, and what storing the zeros in each known way would come to."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from workbench.errors import MissingDependencyError, SelectionError, located
from workbench.names import Patterns, require_names
from workbench.opening import open as open_checkpoint
from workbench.report import Report
from workbench.stream import Meter, ProgressFunction, bytes_of
from workbench.tables import Column, Table, format_bytes, table
from workbench.tensors import HOT_NBYTES, LazyTensor, Memo, strided_nbytes

if TYPE_CHECKING:
    import torch

_MAX_GROUP_NBYTES = 64 << 20  # a group of four spans its tensor's inner dimensions, and is looked at whole
# form -> who opens it. CSR is torch's own layout, which safetensors and load_state_dict refuse.
FORMS = {
    "dense": "every reader of .pt and .safetensors",
    "CSR int32": "torch.load of a .pt; to_dense() before load_state_dict",
    "CSR int64": "torch.load of a .pt; to_dense() before load_state_dict",
    "bitmask + values": "no common reader",
    "zstd": "must be unpacked first",
}
_PLAIN = ("dense", "CSR int32", "CSR int64")


@dataclass(frozen=True)
class SparsityRow:
    """One tensor: its zeros, whether at most two of each four along the input axis are not zero (None: no such groups), bytes by form."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    numel: int
    zeros: int | None
    two_of_four: bool | None
    nbytes: dict[str, int]
    tied_to: str | None = None

    @property
    def best(self) -> str:
        """The smallest form that torch.load opens as it is; dense where nothing is smaller."""
        return min(_PLAIN, key=lambda form: self.nbytes.get(form, math.inf))


@dataclass(frozen=True, repr=False)
class SparsityReport(Report):
    """Zeros and what they could save. Containers' own bytes are not counted; tied tensors count once."""

    rows: tuple[SparsityRow, ...]

    @property
    def totals(self) -> dict[str, int]:
        """Bytes by form over all tensors; one that a form does not take stays dense in it."""
        rows = [row for row in self.rows if row.tied_to is None]
        forms = [form for form in FORMS if any(form in row.nbytes for row in rows)]
        return {form: sum(row.nbytes.get(form, row.nbytes["dense"]) for row in rows) for form in forms}

    @property
    def recommended(self) -> str:
        """The smallest way to store this that torch.load opens as it is, in words."""
        own = [row for row in self.rows if row.tied_to is None]
        sparse = [row for row in own if row.best != "dense"]
        total = sum(row.nbytes[row.best] for row in own)
        if not sparse:
            return f"dense ({format_bytes(total)})"
        forms = " and ".join(dict.fromkeys(row.best for row in sparse))
        rest = ", the rest dense" if len(sparse) < len(own) else ""
        return f"{forms} for {len(sparse)} of {len(own)} tensors{rest} ({format_bytes(total)} in a .pt; to_dense() before load_state_dict)"

    @property
    def headline(self) -> str:
        counted = [row for row in self.rows if row.tied_to is None and row.zeros is not None]
        if not counted:
            return "no tensor whose zeros can be counted"
        zeros, numel = sum(row.zeros or 0 for row in counted), sum(row.numel for row in counted)
        fit = sum(bool(row.two_of_four) for row in counted)
        text = f"{100 * zeros / max(numel, 1):.3g} % of {numel:,} values are zero; smallest that opens as it is: {self.recommended}"
        text += f"; zstd {format_bytes(self.totals['zstd'])}, which must be unpacked first" if "zstd" in self.totals else ""
        return text + (f"; {fit} tensors are 2:4" if fit else "")

    def tables(self) -> tuple[Table, ...]:
        totals = self.totals
        heads = (Column("form"), Column("bytes", "bytes"), Column("of dense", "percent"), Column("opened by"))
        forms = [(form, nbytes, nbytes / totals["dense"] if totals["dense"] else None, FORMS[form]) for form, nbytes in totals.items()]
        columns = (
            Column("name", "name"), Column("shape", "shape"), Column("dtype"), Column("zeros", "percent"), Column("2:4"),
            *(Column(form, "bytes") for form in totals), Column("smallest that opens"),
        )  # fmt: skip
        words = {None: None, True: "yes", False: "no"}
        rows = [
            (
                row.name if row.tied_to is None else f"{row.name} = {row.tied_to}", row.shape, row.dtype,
                row.zeros / row.numel if row.zeros is not None and row.numel else None, words[row.two_of_four],
                *(row.nbytes.get(form) for form in totals), row.best,
            )
            for row in self.rows
        ]  # fmt: skip
        return table("storage forms", heads, forms), table("tensors", columns, rows)


def sparsity(
    ckpt: Any,
    names: Patterns = "*",
    *,
    dim: int = 1,
    zstd: int | None = 3,
    progress: ProgressFunction | None = None,
    cancel: threading.Event | None = None,
) -> SparsityReport:
    """Count zeros, judge 2:4, and compare the storage forms in bytes: dense, CSR with either index, bitmask + values, zstd.

    Args:
        ckpt: anything `wb.open` takes, an ONNX file too. Torch-quantized tensors are counted by their stored integers.
        dim: the input axis, along which 2:4 groups lie: 1 of torch's weights, 0 of what an ONNX MatMul multiplies with.
        zstd: compression level at which each tensor is really compressed, None to leave that out. The other forms follow from counts:
            CSR, of matrices alone, nnz * (item + index) + (rows + 1) * index; a bitmask numel / 8, rounded up, + nnz * item.
    Raises:
        SelectionError: nothing matches. MissingDependencyError: zstandard is not installed. CancelledError.
    Cost: one read of each tensor; memory is a few chunks.
    """
    ckpt = open_checkpoint(ckpt)
    chosen = require_names(names, ckpt)
    if zstd is not None:
        _compressor(zstd)  # refused before anything is read
    meter = Meter("sparsity", sum(ckpt[name].nbytes for name in chosen), progress, cancel)
    seen: dict[Any, SparsityRow] = {}
    rows = []
    for name in chosen:
        key = (ckpt[name].source, ckpt[name].spec)
        if key in seen:
            rows.append(replace(seen[key], name=name, tied_to=seen[key].name))
            continue
        with located(tensor=name):
            rows.append(seen.setdefault(key, _row(name, ckpt[name], dim, zstd, meter)))
    return SparsityReport(tuple(rows))


def _compressor(level: int) -> Any:
    try:
        import zstandard
    except ImportError as error:
        text = "compressing with zstd needs zstandard"
        raise MissingDependencyError(text, hint="pip install 'checkpoint-workbench[compress]', or give zstd=None") from error
    if not 1 <= level <= zstandard.MAX_COMPRESSION_LEVEL:
        raise SelectionError(f"zstd={level}: levels go from 1 to {zstandard.MAX_COMPRESSION_LEVEL}")
    return zstandard.ZstdCompressor(level).compressobj()


def _row(name: str, tensor: LazyTensor, dim: int, zstd: int | None, meter: Meter) -> SparsityRow:
    if tensor.locked is not None or tensor.dtype.kind in ("bits", "quantized"):
        return SparsityRow(name, tensor.dtype.name, tensor.shape, tensor.numel, None, None, {"dense": tensor.nbytes})
    inner = math.prod(tensor.shape[dim % tensor.ndim + 1 :]) if -tensor.ndim <= dim < tensor.ndim else 0
    grouped = tensor.ndim > 1 and 0 < 4 * inner * tensor.dtype.itemsize <= _MAX_GROUP_NBYTES and tensor.shape[dim] % 4 == 0
    span = 4 * inner if grouped else 1
    step = max(1, (HOT_NBYTES if tensor.is_contiguous else strided_nbytes(None)) // (tensor.dtype.itemsize * span)) * span
    memo, squeezed, packed, kept, fits = Memo(), _compressor(zstd) if zstd is not None else None, 0, 0, grouped
    for start in range(0, tensor.numel, step):
        memo.step.clear()
        values = tensor.read(start, min(start + step, tensor.numel), memo)
        present = _present(values)
        kept += int(present.sum())
        fits = fits and bool((present.view(-1, 4, inner).sum(1) <= 2).all())
        if squeezed is not None:
            packed += len(squeezed.compress(bytes_of(values)))
        meter.advance(values.numel() * tensor.dtype.itemsize)
    item = tensor.dtype.itemsize
    nbytes = {"dense": tensor.nbytes, "bitmask + values": -(-tensor.numel // 8) + kept * item}
    if tensor.ndim == 2:
        nbytes |= {
            f"CSR int{8 * wide}": kept * (item + wide) + (tensor.shape[0] + 1) * wide for wide in (4, 8) if kept < 1 << (8 * wide - 1)
        }
    if squeezed is not None:
        nbytes["zstd"] = packed + len(squeezed.flush())
    judged = fits if grouped and tensor.numel else None
    return SparsityRow(name, tensor.dtype.name, tensor.shape, tensor.numel, tensor.numel - kept, judged, nbytes)


def _present(values: torch.Tensor) -> torch.Tensor:
    """Which elements are not zero, of any type; NaN is not."""
    import torch

    if values.is_complex():
        return torch.view_as_real(values).ne(0).any(-1)
    if values.is_floating_point():
        return values.float().ne(0) if values.element_size() == 1 else values.ne(0)
    return values.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]).ne(0)
