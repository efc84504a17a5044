"""Sharded safetensors: an index.json whose `weight_map` says which file beside it holds each tensor.

    {"metadata": {"total_size": …}, "weight_map": {name: "model-00001-of-00002.safetensors", …}}

Every shard must lie under the index's own folder (or the hub cache that the folder belongs to) by real path. The union of
the shards must be what the index says: a tensor that its shard lacks is an error, one that the index forgets is a finding.

Source: Hugging Face transformers, the layout that `save_pretrained` writes.
"""

from __future__ import annotations

import json
import os
from typing import Any

from workbench.checkpoint import Checkpoint, Finding
from workbench.errors import CorruptFileError, MissingFileError, MissingShardError, UnsupportedError, located
from workbench.files import FileRef, Span, contained, file_ref
from workbench.formats.safetensors_file import read_header, restored_aliases
from workbench.formats.safetensors_file import sniff as is_safetensors
from workbench.tensors import LazyTensor

_MAX_INDEX = 256 << 20


def sniff(head: bytes) -> bool:
    return (head.lstrip()[:1] == b"{" and b'"weight_map"' in head) or (head.lstrip()[:1] == b"{" and b'"metadata"' in head)


def open_file(file: FileRef) -> Checkpoint:
    """List all shards that an index names, in the index's order.

    Raises:
        CorruptFileError: the index is no index, or a shard lacks a tensor. MissingShardError: a shard is not there
        (`.partial` on the error lists the others). UnsupportedError: a shard outside the folder, or not safetensors.
    Cost: the index and each shard's header.
    """
    weight_map = _read_index(file)
    folder = os.path.dirname(file.url)
    shards: dict[str, dict[str, LazyTensor]] = {}
    metadata: dict[str, str] = {}
    missing: list[str] = []
    for shard in dict.fromkeys(weight_map.values()):
        with located(path=os.path.join(folder, shard)):
            try:
                ref = file_ref(contained(os.path.join(folder, shard), folder))
            except MissingFileError:
                missing.append(shard)
                continue
            head = Span(ref, 0, ref.size).read(0, 64)
            if len(head) > 8 and not is_safetensors(head):
                raise UnsupportedError("the shard is not a safetensors file", path=ref.url)
            shards[shard], shard_metadata = read_header(ref)
            metadata.update(shard_metadata)
    tensors: dict[str, LazyTensor] = {}
    for name, shard in weight_map.items():
        if shard in shards and name not in shards[shard]:
            raise CorruptFileError(f"the index puts this tensor into {shard}, which does not have it", path=file.url, tensor=name)
        if shard in shards:
            tensors[name] = shards[shard][name]
    found = [
        Finding("unindexed tensor", "warning", f"{shard} holds a tensor that the index does not name; it is not listed", {"tensor": name})
        for shard, held in shards.items()
        for name in held
        if weight_map.get(name) != shard
    ]
    restored = restored_aliases(tensors, metadata)
    tree: dict[str, Any] = {**tensors, **{a: tensors[k] for a, k in restored.items()}}
    ckpt = Checkpoint(
        tree, name=file.name, format="sharded-safetensors", metadata=metadata, restored=restored, findings=tuple(found), source=file
    )
    if missing:
        error = MissingShardError(
            f"{len(missing)} of {len(missing) + len(shards)} shards are not there: {', '.join(missing[:3])}",
            path=folder,
            hint="copy them beside the index; what the others hold is listed in .partial",
        )
        error.partial = ckpt  # type: ignore[attr-defined]
        raise error
    return ckpt


def _read_index(file: FileRef) -> dict[str, str]:
    if file.size > _MAX_INDEX:
        raise UnsupportedError(f"the index has {file.size} bytes; at most {_MAX_INDEX} are read", path=file.url)
    with located(path=file.url):
        index = json.loads(Span(file, 0, file.size).read())
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) and v for v in weight_map.values()):
        raise CorruptFileError("an index must map each tensor's name to a file name under weight_map", path=file.url)
    return weight_map
