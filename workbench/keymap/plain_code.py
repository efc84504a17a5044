"""A KeyMap as plain Python: lines that read the file with torch or safetensors, and one expression for each of the model's tensors.

What a tensor is called here is for people; the code goes by its path in the file, for keys hold dots, and there are numbers and lists.
A file that neither library reads, and a tensor inside an object, are refused in words.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from workbench.checkpoint import Checkpoint
from workbench.errors import SelectionError
from workbench.formats.sharded import PART
from workbench.keymap.values import formula_code, regroup_code
from workbench.sections import Path
from workbench.tensors import LazyTensor
from workbench.tree import SUBCLASSES, Inert, is_mapping, items_of

if TYPE_CHECKING:
    from workbench.keymap.maps import KeyMap, Pair


class Origin(NamedTuple):
    """Where the source of a map lies, for plain Python.

    Attributes:
        url, format: of the file; "" and "memory" for what is none.
        path: of the section in it.
        paths: of the tensors in that section, less those whose name is their one key; None where no keys lead to a tensor.
    """

    url: str = ""
    format: str = "memory"
    path: Path | None = ()
    paths: Mapping[str, Path | None] = {}

    @classmethod
    def of(cls, ckpt: Checkpoint, section: Path, part: Checkpoint) -> Origin:
        node, paths = _below(ckpt.tree, section), dict[str, Path | None]()
        known: dict[Path, Any] = {(): part.tree}
        leaves = items_of(part.tree) if is_mapping(part.tree) else {}
        is_flat = leaves.keys() == part.keys() and not part.restored and set(map(type, leaves.values())) <= {LazyTensor}  # as most are
        for name, path in () if is_flat else part.paths.items():
            if name in part.restored:
                paths[name] = (part.restored[name],)  # the file tells of it and stores one of the two
                continue
            if path[:-1] not in known:
                known[path[:-1]] = _below(part.tree, path[:-1])
            leaf = _child(known[path[:-1]], path[-1]) if path else part.tree
            if type(leaf) is not LazyTensor and not (isinstance(leaf, Inert) and leaf.dotted not in SUBCLASSES):
                paths[name] = None
            elif path != (name,):
                paths[name] = path
        root = None if node is _NOWHERE else (*ckpt.within, *section)
        return cls(ckpt.source.url, ckpt.format, root, paths) if ckpt.source is not None else cls("", "memory", root, paths)

    @classmethod
    def from_list(cls, told: Any) -> Origin:
        url, form, path, paths = told
        return cls(url, form, None if path is None else tuple(path), {n: None if p is None else tuple(p) for n, p in paths.items()})


_NOWHERE = object()


def _child(node: Any, key: Any) -> Any:
    """What lies under a key of a plain container, where the key can be written down and read back from JSON."""
    if type(key) is not str and not (type(key) in (int, bool) and abs(key) < 1 << 53):
        return _NOWHERE
    if is_mapping(node):
        return items_of(node).get(key, _NOWHERE)
    return node[key] if type(node) in (list, tuple) and type(key) is int and key < len(node) else _NOWHERE


def _below(node: Any, path: Path) -> Any:
    for key in path:
        node = _child(node, key)
    return node


def plain_code(keymap: KeyMap) -> str:
    """`KeyMap.code`."""
    origin = keymap.origin
    if origin.path is None:
        raise SelectionError(f"the section {keymap.section!r} lies inside an object, where no keys lead", hint=_SAVE_IT)

    def at(name: str) -> str:
        path = origin.paths.get(name, (name,))
        if path is None:
            raise SelectionError(f"{name!r} lies inside an object, or under a key that is no text or number", hint=_SAVE_IT)
        return "source" + _keys(path)

    held = [f"    {pair.target!r}: {_expression(pair, at)}," for pair in keymap.pairs]
    imports, reading = _reading(origin)
    if any("torch." in line for line in (*held, *reading)):
        imports = ["import torch", *imports]
    section = origin.path or tuple(filter(None, keymap.section.split(".")))  # of a map made by hand
    reading += [f"source = checkpoint{_keys(section)}", "state_dict = {"]
    return "\n".join([*sorted(imports), *[""] * bool(imports), *reading, *held, "}", *_loading(keymap)])


_MOST_NAMED = 8


def _loading(keymap: KeyMap) -> list[str]:
    """The lines that load it, and what they leave as it is; none of a map made by hand, which knows no model."""
    if not keymap.section_reason:
        return []
    left = [*(repr(each.target) for each in keymap.unmatched), *(repr(each.target) for each in keymap.ambiguous)]
    more = f" and {len(left) - _MOST_NAMED} more" if len(left) > _MOST_NAMED else ""
    told = f"# nothing of the file fills these, and they stay as the model has them: {', '.join(left[:_MOST_NAMED])}{more}"
    return [told] * bool(left) + [f"model.load_state_dict(state_dict{', strict=False' * bool(left)})"]


_SAVE_IT = 'wb.save(keymap.apply(ckpt), "model.safetensors") writes what the code would make'


def _keys(path: Path) -> str:
    return "".join(f"[{key!r}]" for key in path)


_READERS = {"torch-zip": "torch.load({}, map_location='cpu', weights_only=True)", "safetensors": "load_file({})"}
_READERS["torch-legacy"] = _READERS["torch-zip"]


def _reading(origin: Origin) -> tuple[list[str], list[str]]:
    """Imports, and the lines that make `checkpoint`."""
    if origin.format == "memory":
        return [], ["# checkpoint: the state dict, or what torch.load or safetensors.torch.load_file gives of its file"]
    form = origin.format.removeprefix("sharded-")
    if form not in _READERS or "://" in origin.url:
        what = "a remote file" if form in _READERS else f"{origin.format} files"
        hint = "wb.save(wb.open(path), 'copy.safetensors') makes a file that they read: match that"
        raise SelectionError(f"neither torch nor safetensors reads {what}, and plain Python cannot begin", hint=hint)
    imports, read = ["from safetensors.torch import load_file"] * (form == "safetensors"), _READERS[form]
    if form == origin.format:
        return imports, [f"checkpoint = {read.format(repr(origin.url))}"]
    if part := PART.fullmatch(os.path.basename(origin.url)):
        stem = os.path.join(os.path.dirname(origin.url), part[1])
        shards = f"[{stem!r} + f'-{{i:05}}-of-{part[3]}{part[4]}' for i in range(1, {int(part[3])} + 1)]"
        return imports, [f"checkpoint = {{name: tensor for shard in {shards} for name, tensor in {read.format('shard')}.items()}}"]
    return ["import json", "from pathlib import Path", *imports], [
        f"index = Path({origin.url!r})",
        "weight_map = json.loads(index.read_text())['weight_map']",
        f"shards = {{shard: {read.format('index.parent / shard')} for shard in set(weight_map.values())}}",
        "checkpoint = {name: shards[shard][name] for name, shard in weight_map.items()}",
    ]


def _expression(pair: Pair, at: Any) -> str:
    if pair.formula:
        return formula_code(pair, at)
    pieces = []
    for part in pair.parts:
        if not part.source:
            pieces.append(f"torch.zeros({(part.rows or (0, 0))[1]}, dtype={at(pair.sources[0])}.dtype)")
            continue
        whole = part.rows is None or (part.shape and part.regroup is None and part.rows == (0, part.shape[0]))
        rows = "" if whole or part.rows is None else f"[{part.rows[0]}:{part.rows[1]}]"
        pieces.append(at(part.source) + regroup_code(part.regroup, part.shape) + rows)
    joined = pieces[0] if len(pieces) == 1 else f"torch.cat([{', '.join(pieces)}])"
    return joined + regroup_code(pair.regroup)
