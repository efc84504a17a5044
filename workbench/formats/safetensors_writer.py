"""Writes safetensors. Tied tensors are stored once, and the other names recorded as aliases as `save_model` does.

Header entries stand in the checkpoint's order; the data is laid out by falling element size, so that every tensor is aligned.
"""

from __future__ import annotations

import json
from typing import Any

from workbench.checkpoint import Checkpoint
from workbench.errors import SelectionError, UnsupportedError
from workbench.formats import safetensors_file
from workbench.formats.safetensors_file import CODES, MAX_HEADER
from workbench.formats.writing import Job, Layout, SaveReport, require_only_tensors, require_unlocked, write_layout
from workbench.stream import Target
from workbench.tensors import LazyTensor

_CODES = {name: code for code, name in CODES.items()}


def write(ckpt: Checkpoint, path: str, job: Job) -> SaveReport:
    """Write the tensors of `ckpt` as one safetensors file.

    Raises:
        SelectionError: it holds more than tensors, or a name or tie the format cannot record.
        UnsupportedError: an element type or layout the format does not have.
    Cost: one read of each distinct tensor.
    """
    require_unlocked(ckpt)
    require_only_tensors(ckpt, "safetensors")
    kept, aliases = _distinct(ckpt)
    metadata = {**{k: v for k, v in ckpt.metadata.items() if k not in ckpt.restored}, **aliases}
    if clash := next((a for a in aliases if a in ckpt.metadata and ckpt.metadata[a] != aliases[a]), None):
        raise SelectionError(
            f"the metadata already uses the name {clash!r}, which would have to record a tied tensor", hint="rename the tensor"
        )
    offsets, at = {}, 0
    for name in sorted(kept, key=lambda n: -kept[n].dtype.itemsize):
        offsets[name] = at
        at += kept[name].nbytes
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    for name, tensor in kept.items():
        header[name] = {
            "dtype": _CODES[tensor.dtype.name],
            "shape": _stated_shape(tensor),
            "data_offsets": [offsets[name], offsets[name] + tensor.nbytes],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise SelectionError(f"the header would have {len(text)} bytes; the format allows {MAX_HEADER}", hint="split the checkpoint")
    start = 8 + len(text)
    targets = [Target(name, tensor, start + offsets[name]) for name, tensor in kept.items()]
    layout = Layout(start + at, [(0, len(text).to_bytes(8, "little") + text)], targets)
    seconds, verify_seconds = write_layout(path, layout, {n: t.spec for n, t in ckpt.items()}, safetensors_file.open_file, job)
    notes = tuple(f"{alias} is stored as an alias of {name}" for alias, name in list(aliases.items())[:20])
    return SaveReport(path, "safetensors", len(ckpt), layout.nbytes, seconds, verify_seconds, notes, layout=layout if job.dry_run else None)


def _distinct(ckpt: Checkpoint) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    kept: dict[str, LazyTensor] = {}
    aliases = ckpt.aliases
    for name, tensor in ckpt.items():
        if name == "__metadata__":
            raise SelectionError("the format reserves the name '__metadata__'", hint="rename the tensor")
        if tensor.spec.layout != "strided" or tensor.spec.quantizer or tensor.dtype.name not in _CODES:
            what = tensor.spec.layout if tensor.spec.layout != "strided" else f"{tensor.dtype}"
            raise UnsupportedError(f"safetensors has no {what} tensors", tensor=name, hint="save as .pt, or leave it out with ckpt.drop()")
        if name.encode("utf-8", "replace").decode("utf-8") != name:
            raise SelectionError("the name is no valid Unicode text, which the format requires", tensor=name, hint="rename the tensor")
        if name not in aliases:
            kept[name] = tensor
    return kept, {alias: first for alias, first in aliases.items() if alias not in kept}


def _stated_shape(tensor: LazyTensor) -> list[int]:
    if tensor.dtype.name != "float4_e2m1fn_x2":
        return list(tensor.shape)
    if not tensor.shape:
        raise UnsupportedError("a 4-bit tensor needs at least one dimension in safetensors")
    return [*tensor.shape[:-1], tensor.shape[-1] * 2]
