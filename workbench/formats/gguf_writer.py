"""Writes GGUF, laid out as gguf_file tells. How values are packed is a matter of this container, so blocks are encoded here.

A tensor that lies in a GGUF in the blocks that are wanted keeps its very bytes, as each pair of metadata does: nothing is
rounded twice unasked. Others are encoded by the gguf library, piece by piece. A tied tensor is stored for each of its names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from workbench import dtypes
from workbench.checkpoint import Checkpoint
from workbench.dtypes import DTYPES
from workbench.errors import SelectionError, UnsupportedError
from workbench.files import Span
from workbench.formats import gguf_file
from workbench.formats.gguf_file import ARRAY, BLOCKS, DECODER, PLAIN, TEXT, U32, Value, library
from workbench.formats.packed import Packed
from workbench.formats.writing import Job, Layout, SaveReport, require_only_tensors, require_unlocked, struct_pack, write_layout
from workbench.names import require_names
from workbench.stream import Target
from workbench.tensors import Block, Derived, LazyTensor, Reads, Stored, TensorSpec

if TYPE_CHECKING:
    import torch


class _Type(NamedTuple):
    """A type of ggml: its name and code, elements and bytes of a block, and the element type of its values."""

    name: str
    code: int
    elements: int
    nbytes: int
    values: str


Piece = bytes | Span | LazyTensor
Pairs = dict[str, tuple[int, bytes | Span]]  # key -> type of the value, and the value as files have it

_OWN = {  # by torch's name
    name: _Type(name.replace("bfloat", "BF").replace("float", "F").replace("int", "I"), code, 1, DTYPES[name].itemsize, name)
    for code, name in PLAIN.items()
}
_FLOATS = {kind.name: kind for kind in _OWN.values() if DTYPES[kind.values].is_floating}
_PACKED = {name: _Type(name, code, elements, nbytes, "float32") for code, (name, elements, nbytes) in BLOCKS.items()}
_MAX_NAME, _MAX_DIMENSIONS = 63, 4  # of ggml
_STEP = 1 << 16  # values encoded at once: what the library makes of them on its way stays small
_LARGE = 65504  # of float16, which scales are: none passes the largest value of its block
_TOLD = 20  # ties that are told one by one


def write(ckpt: Checkpoint, path: str, job: Job, types: str | Mapping[str, str] | None = None) -> SaveReport:
    """Write the tensors of `ckpt` as one GGUF file; `types` is told at `formats.save`.

    Raises:
        SelectionError: it holds more than tensors, or a name, type or value that cannot be stored.
        UnsupportedError: an element type or shape GGUF does not have. MissingDependencyError: blocks need the gguf library.
    Cost: one read of each tensor; the library encodes a GB of float32 in about 2 s of CPU, but MXFP4 in 20 s.
    """
    require_unlocked(ckpt)
    require_only_tensors(ckpt, "GGUF")
    rules = dict(types) if isinstance(types, Mapping) else {} if types is None else {"*": types}
    wanted = {name: kind for glob, told in rules.items() for kind in [_encodable(told)] for name in require_names(glob, ckpt)}
    chosen = {name: _chosen(name, tensor, wanted.get(name), name in rules) for name, tensor in ckpt.items()}
    pairs, alignment, notes = _pairs(ckpt, bool(types or ckpt.history), any(kind.elements > 1 for kind, _ in chosen.values()))
    layout = _layout(ckpt, {name: kind for name, (kind, _) in chosen.items()}, pairs, alignment)
    specs = {name: TensorSpec(DTYPES[kind.values], ckpt[name].shape) for name, (kind, _) in chosen.items()}
    seconds, verify_seconds = write_layout(path, layout, specs, gguf_file.open_file, job)
    kinds = [f"{count} × {told}" for told, count in Counter(told for _, told in chosen.values()).items()]
    ties = [f"{alias} is stored again, for GGUF has no aliases: it is tied to {first}" for alias, first in ckpt.aliases.items()]
    told = (*kinds, *notes, *ties[:_TOLD])
    return SaveReport(path, "gguf", len(ckpt), layout.nbytes, seconds, verify_seconds, told, layout=layout if job.dry_run else None)


def _layout(ckpt: Checkpoint, kinds: dict[str, _Type], pairs: Pairs, alignment: int) -> Layout:
    head: list[tuple[str, Piece]] = [("", struct_pack("4sIQQ", b"GGUF", 3, len(kinds), len(pairs)))]
    for key, (code, value) in pairs.items():
        head += [(key, _text(key) + struct_pack("I", code)), (key, value)]
    infos, offset = bytearray(), 0
    made: dict[Any, Piece] = {}  # tied tensors are computed once
    data: list[tuple[str, Piece]] = []
    for name, kind in kinds.items():
        tensor = ckpt[name]
        data.append((name, made.setdefault((tensor.source, tensor.spec, kind), _stored(tensor, kind))))
        infos += _text(name) + struct_pack(f"I{tensor.ndim}QIQ", tensor.ndim, *tensor.shape[::-1], kind.code, offset)
        offset += -(-tensor.numel // kind.elements * kind.nbytes // alignment) * alignment
    fixed: list[tuple[int, bytes]] = []
    targets: list[Target] = []
    at = 0
    for step, pieces in ((1, [*head, ("", bytes(infos))]), (alignment, [*data, ("", b"")])):
        for name, piece in pieces:
            at += -at % step
            if isinstance(piece, bytes):
                fixed.append((at, piece))
            else:  # a vocabulary that lies in a file may be as large as a tensor, and is copied as one
                targets.append(Target(name, piece, at))
            at += len(piece) if isinstance(piece, bytes) else piece.nbytes
    return Layout(at, fixed, targets)


def _text(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct_pack("Q", len(data)) + data


def _pairs(ckpt: Checkpoint, changed: bool, packed: bool) -> tuple[Pairs, int, list[str]]:
    """The metadata, the alignment it states, and notes on what of the checkpoint's own is left out."""
    pairs: Pairs = {"general.architecture": (TEXT, _text("unknown"))}
    stale = [key for key in ckpt.metadata if key.startswith("split.") or (changed and key == "general.file_type")]  # true of the old file
    if not isinstance(alignment := ckpt.metadata.get("general.alignment", ""), Value):
        stale += ["general.alignment"] * bool(alignment)
        alignment = "32"
    for key, value in ckpt.metadata.items():
        if key in stale or key in ckpt.restored:
            continue
        if not isinstance(value, Value):
            pairs[key] = TEXT, _text(value)
        elif value.order == "<":
            pairs[key] = value.kind, value.span
        elif value.kind == ARRAY:
            stale.append(key)
        else:
            raw = value.span.read()
            pairs[key] = value.kind, _text(raw[8:]) if value.kind == TEXT else raw[::-1]
    if packed:
        pairs.setdefault("general.quantization_version", (U32, struct_pack("I", 2)))
    notes = [f"left out of the metadata: {', '.join(stale)}"] if stale else []
    if "general.architecture" not in ckpt.metadata:
        notes.append("general.architecture is 'unknown': the checkpoint's metadata names none")
    return pairs, int(alignment), notes


def _encodable(told: str) -> _Type:
    """The type of this name, if floating values can be stored as it: in blocks, what the installed library takes when it is tried."""
    name, able = str(told).upper(), dict(_FLOATS)
    if name not in able:
        gguf = library("blocks")
        import numpy as np

        for kind in _PACKED.values():
            with suppress(KeyError, NotImplementedError):
                gguf.quants.quantize(np.zeros((1, kind.elements), np.float32), gguf.GGMLQuantizationType[kind.name])
                able[kind.name] = kind
    if name not in able:
        raise SelectionError(f"floating values cannot be stored as {told!r}", hint="types: " + ", ".join(able))
    return able[name]


def _chosen(name: str, tensor: LazyTensor, wanted: _Type | None, named: bool) -> tuple[_Type, str]:
    """The type a tensor is stored as, and a word on it. What is unfit for the wanted type keeps its own, and is refused if it was named."""
    spec, (was, _), unfit = tensor.spec, _kept(tensor), ""
    if wanted and not spec.dtype.is_floating:
        unfit = "not floating"
    elif wanted and len(spec.shape) < (1 if named else 2):
        unfit = "a vector"
    elif wanted and spec.shape[-1] % wanted.elements:
        unfit = f"rows that fill no blocks of {wanted.elements}"
    if wanted and unfit and named:
        raise SelectionError(f"it cannot be stored as {wanted.name}: {unfit}", tensor=name)
    kind = was if unfit else wanted or was
    if spec.dtype.is_floating and spec.dtype.itemsize < 4 and (unfit == "a vector" or not spec.shape):
        kind = _FLOATS["F32"]  # by which ggml adds and scales; and the gguf library reads no scalar of BF16
    if kind is None or spec.layout != "strided" or spec.quantizer or len(spec.shape) > _MAX_DIMENSIONS or not spec.numel:
        what = spec.layout if spec.layout != "strided" else f"{spec.dtype}" if kind is None or spec.quantizer else f"{list(spec.shape)}"
        raise UnsupportedError(f"GGUF has no {what} tensors", tensor=name, hint="save as .pt, or leave it out with ckpt.drop()")
    raw = name.encode("utf-8", "replace")
    if raw.decode() != name or len(raw) > _MAX_NAME:
        raise SelectionError(f"GGUF requires names of Unicode text, in {_MAX_NAME} bytes", tensor=name, hint="rename the tensor")
    told = kind.name if kind == was else f"{was.name if was else spec.dtype} → {kind.name}"
    again = ", rounded again" if was and was.elements > 1 and kind.name not in (was.name, "F32", "F64") else ""
    return kind, told + again + (f", not {wanted.name}: {unfit}" if wanted and unfit and kind != wanted else "")


def _kept(tensor: LazyTensor) -> tuple[_Type | None, Span | LazyTensor]:
    """The type a tensor has if nothing is asked for, and what holds it: bytes of a GGUF where they are whole blocks of it, or itself."""
    source, row = tensor.source, (*tensor.shape, 1)[max(0, tensor.ndim - 1)]
    if isinstance(source, Stored) and isinstance(source.storage, Packed) and source.storage.decoder == DECODER and tensor.is_contiguous:
        kind = _PACKED[source.storage.packing]
        if row % kind.elements == source.offset % kind.elements == 0:
            first, count = source.offset // kind.elements, tensor.numel // kind.elements
            return kind, source.storage.span.part(first * kind.nbytes, count * kind.nbytes)
    return _OWN.get(tensor.dtype.name), tensor


def _stored(tensor: LazyTensor, kind: _Type) -> Span | LazyTensor:
    """What is written for a tensor: what holds it, or its values as another type."""
    was, source = _kept(tensor)
    if kind == was:
        return source
    reads: Reads = "rows" if kind.elements > 1 else "elements"
    spec = TensorSpec(DTYPES[kind.values], tensor.shape)
    if reads == "rows":
        spec = TensorSpec(DTYPES["uint8"], (tensor.numel // kind.elements, kind.nbytes))
    params = {"type": kind.name, "dtype": kind.values, "nbytes": kind.nbytes}
    return LazyTensor(spec, Derived(Block(f"{__name__}:encode", params, (tensor,), (spec,), reads), 0))


def encode(params: dict[str, Any], whole: Sequence[torch.Tensor], blocks: Sequence[torch.Tensor], at: int) -> list[torch.Tensor]:
    """A flat range as another floating type, or the values of a block in each row as the library packs them."""
    import torch

    kind, hint = params["type"], "leave the tensor out of `types`, or choose F32"
    cast = blocks[0].to(getattr(torch, params["dtype"]))
    if cast is not blocks[0] and not torch.isfinite(cast).all() and dtypes.out_of_range(blocks[0], cast).any():
        raise SelectionError(f"a value is too large for {kind}", hint=hint)
    if kind in _FLOATS:
        return [cast]
    gguf = library(f"blocks of {kind}")
    import numpy as np

    code, rows = gguf.GGMLQuantizationType[kind], cast.numpy().reshape(len(cast), -1)
    out, step = np.empty((len(rows), params["nbytes"]), np.uint8), _STEP // rows.shape[1]
    for first in range(0, len(rows), step):
        values = rows[first : first + step].reshape(1, -1)  # the library goes through one long row faster
        largest = float(np.abs(values).max())
        with np.errstate(all="ignore"):  # some values are so small that their scale is 0
            packed = gguf.quants.quantize(values, code) if largest < np.inf else None
            if packed is None or (largest > _LARGE and not np.isfinite(gguf.quants.dequantize(packed, code)).all()):
                raise SelectionError(f"blocks of {kind} hold no value like {largest:.3g}", hint=hint)
        out[first : first + step] = packed.reshape(-1, params["nbytes"])
    return [torch.from_numpy(out)]
