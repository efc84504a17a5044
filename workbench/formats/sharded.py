"""Sharded checkpoints: files that hold a state dict together, with an index.json whose `weight_map` says which holds what, or without.

    {"metadata": {"total_size": …}, "weight_map": {name: "model-00001-of-00002.safetensors", …}}

Every shard must lie under the index's own folder (or the hub cache that the folder belongs to) by real path, and is opened as
what it is: safetensors, a torch archive, a legacy pickle. The union of the shards must be what the index says: a tensor that
its shard lacks is an error, one that the index forgets is a finding. Without an index the names `…-00001-of-00002…` tell how
many there are.

Source: Hugging Face transformers and diffusers, the layouts that `save_pretrained` writes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

from workbench.checkpoint import Checkpoint, Finding
from workbench.errors import CorruptFileError, MissingFileError, MissingShardError, UnsupportedError, located
from workbench.files import FileRef, Folder, Span
from workbench.formats import open_file as open_any
from workbench.formats import recognise
from workbench.formats.safetensors_file import restored_aliases
from workbench.names import unique_pairs
from workbench.tensors import LazyTensor

_MAX_INDEX = 24 << 20
_MAX_SHARDS = 10_000
_GATHERED = ("sharded", "gguf_file")  # modules that look for further parts themselves
_MAX_NODES = 10_000  # lists and objects in an index, which has two
PART = re.compile(r"(.+)-(\d{5})-of-(?!0{5})(\d{5})(\.[a-z]+)")


def claims(file: FileRef) -> bool:
    """Whether a file is an index: JSON with a weight map in its first megabyte."""
    head = Span(file, 0, file.size).read(0, 1 << 20)
    return head.lstrip()[:1] == b"{" and b'"weight_map"' in head


def open_file(file: FileRef) -> Checkpoint:
    """List all shards that an index names, in the index's order.

    Raises:
        CorruptFileError: the index is no index, or a shard lacks a tensor. MissingShardError: a shard is not there
        (`.partial` on the error lists the others). UnsupportedError: a shard outside the folder.
    Cost: the index and each shard's own.
    """
    weight_map = _read_index(file)
    shards, missing = _opened(file.folder, weight_map.values())
    for name, shard in weight_map.items():
        if shard in shards and name not in shards[shard]:
            raise CorruptFileError(f"the index puts this tensor into {shard}, which does not have it", path=file.url, tensor=name)
    found = []
    for shard, held in shards.items():
        if forgotten := [name for name in held if weight_map.get(name) != shard and name not in held.restored]:
            told = f"{shard} holds {len(forgotten)} tensors that the index does not name, such as {forgotten[0]!r}; they are not listed"
            found.append(Finding("unindexed tensors", "warning", told, {"record": shard, "tensors": forgotten[:100]}))
    tensors = {name: shards[shard][name] for name, shard in weight_map.items() if shard in shards}
    return _union(file.name, file, tensors, shards, missing, found)


def open_parts(folder: Folder, part: str) -> Checkpoint:
    """List the shards that `part` is one of, where no index is beside them, or what it lists as its other parts itself.

    Raises:
        CorruptFileError: two shards hold a tensor of one name. MissingShardError: as `open_file`.
    """
    form, opened = recognise(folder.file(part))
    if form is not None and form.module in _GATHERED:
        return form.reader.open_file(opened)  # type: ignore[no-any-return]
    stem, _, total, extension = PART.fullmatch(part).groups()  # type: ignore[union-attr]
    wanted, there = [f"{stem}-{i + 1:05}-of-{total}{extension}" for i in range(int(total))], set(folder.names())
    shards, _ = _opened(folder, [name for name in wanted if name in there])
    tensors: dict[str, LazyTensor] = {}
    for shard, held in shards.items():
        own = {name: tensor for name, tensor in held.items() if name not in held.restored}
        if twice := next((name for name in own if name in tensors), None):
            raise CorruptFileError(f"{shard} holds a tensor that another shard holds too", path=folder.url, tensor=twice)
        tensors.update(own)
    told = f"{total.lstrip('0')} shards were put together by their names: there is no index that says what they should hold"
    missing = [name for name in wanted if name not in shards]
    return _union(f"{stem}{extension}", folder.file(part), tensors, shards, missing, [Finding("no index", "info", told)])


def _opened(folder: Folder, names: Iterable[str]) -> tuple[dict[str, Checkpoint], list[str]]:
    """Each shard's own listing, and the names of those that are not there."""
    shards: dict[str, Checkpoint] = {}
    missing = []
    for name in dict.fromkeys(names):
        with located(path=f"{folder.url}/{name}"):
            try:
                file = folder.file(name)
            except MissingFileError:
                missing.append(name)
                continue
            if (form := recognise(file)[0]) is not None and form.module in _GATHERED:
                raise CorruptFileError("the index names an index as a shard, or a file that may be split itself")
            shards[name] = open_any(file)
    return shards, missing


def _union(
    name: str, source: FileRef, tensors: dict[str, LazyTensor], shards: dict[str, Checkpoint], missing: list[str], found: list[Finding]
) -> Checkpoint:
    metadata = {key: value for held in shards.values() for key, value in held.metadata.items()}
    restored = restored_aliases(tensors, metadata)
    tree = tensors | {alias: tensors[kept] for alias, kept in restored.items()}
    form = "sharded-" + "+".join(sorted({held.format for held in shards.values()} or {"safetensors"}))
    findings = (*found, *(finding for held in shards.values() for finding in held.findings))
    ckpt = Checkpoint(tree, name=name, format=form, metadata=metadata, restored=restored, findings=findings, source=source)
    if missing:
        told = f"{len(missing)} of {len(missing) + len(shards)} shards are not there: {', '.join(missing[:3])}"
        hint = "copy them beside the others; what those hold is listed in .partial"
        error = MissingShardError(told, path=source.folder.url, hint=hint)
        error.partial = ckpt  # type: ignore[attr-defined]
        raise error
    return ckpt


def _read_index(file: FileRef) -> dict[str, str]:
    if file.size > _MAX_INDEX:
        raise UnsupportedError(f"the index has {file.size} bytes; at most {_MAX_INDEX} are read", path=file.url)
    text = Span(file, 0, file.size).read()
    if text.count(b"[") + text.count(b"{") > _MAX_NODES:
        raise CorruptFileError(f"the index holds more than {_MAX_NODES} lists and objects", path=file.url)
    with located(path=file.url):
        index = json.loads(text, object_pairs_hook=unique_pairs)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) and v for v in weight_map.values()):
        raise CorruptFileError("an index must map each tensor's name to a file name under weight_map", path=file.url)
    if len(set(weight_map.values())) > _MAX_SHARDS:
        raise UnsupportedError(f"the index names more than {_MAX_SHARDS} shards", path=file.url)
    return weight_map
