"""Sections: the state dicts inside a training checkpoint, why each is taken for what it is, and the `_metadata` beside them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from workbench.names import join_path
from workbench.tensors import LazyTensor
from workbench.tree import Inert, is_mapping, is_module, items_of, wrapped

Path = tuple[Any, ...]
Kind = Literal["weights", "ema", "optimizer"]


@dataclass(frozen=True)
class Section:
    """One state dict inside a training checkpoint, and why it is taken for what it is."""

    path: Path
    name: str
    kind: Kind
    tensors: int
    nbytes: int
    reason: str


_KNOWN_WEIGHTS = ("model_state_dict", "state_dict", "model", "model_state", "net", "network", "module", "weights", "params", "state")


def known_rank(section: Section) -> int:
    last = str(section.path[-1]) if section.path else ""
    return _KNOWN_WEIGHTS.index(last) if last in _KNOWN_WEIGHTS else len(_KNOWN_WEIGHTS)


def section_rank(section: Section) -> tuple[Any, ...]:
    kinds = ("weights", "ema", "optimizer")
    return (kinds.index(section.kind), known_rank(section), -section.nbytes)


_AVERAGED = re.compile(r"(?<![a-z])(ema|swa|shadow|averaged)(?![a-z])")


def find_sections(root: Any, below: Mapping[Path, list[LazyTensor]]) -> Iterator[Section]:
    """State dicts and optimizers; `below` holds the tensors under each path, as the walk that named them found them."""
    pending: list[tuple[Path, Any]] = [((), root)]
    while pending:
        path, node = pending.pop()
        held = below.get(path, [])
        if is_module(node):
            yield _section(path, held, "weights", f"an object of class {node.dotted}")
        elif is_mapping(node) and is_mapping(items_of(node).get("state")) and "param_groups" in items_of(node):
            yield _section(path, held, "optimizer", "it has `state` and `param_groups`")
        elif is_mapping(node) and held:
            direct = sum(isinstance(wrapped(child), LazyTensor) for child in items_of(node).values())
            if direct and 2 * direct >= len(held):
                last = str(path[-1]).lower() if path else ""
                kind: Kind = "ema" if _AVERAGED.search(last) else "weights"
                yield _section(path, held, kind, f"{direct} tensors directly under {'the root' if not path else repr(join_path(path))}")
            elif len(path) <= 5:
                pending += [
                    ((*path, key), child) for key, child in reversed(list(items_of(node).items())) if not path or (*path, key) in below
                ]


def _section(path: Path, held: list[LazyTensor], kind: Kind, reason: str) -> Section:
    return Section(path, join_path(path), kind, len(held), sum(t.nbytes for t in held), reason)


def with_renamed_metadata(node: Any, moved: dict[str, str]) -> Any:
    if not (isinstance(node, Inert) and isinstance(node.state, dict) and is_mapping(node.state.get("_metadata"))):
        return node
    if all(old == new for old, new in moved.items()):
        return node
    old_metadata = node.state["_metadata"]
    renamed = rename_modules(items_of(old_metadata), moved)
    new_metadata = renamed if isinstance(old_metadata, dict) else replace(old_metadata, items=renamed)
    return replace(node, state={**node.state, "_metadata": new_metadata})


def rename_modules(modules: Mapping[Any, Any], moved: Mapping[str, str]) -> dict[Any, Any]:
    """Module names renamed as their tensors were, from the evidence of each tensor below them.

    A module with no tensor of its own follows its nearest ancestor. One whose tensors moved apart keeps its name if any of them
    did, and is dropped otherwise.
    """
    homes: dict[str, set[str]] = {}
    for old, new in moved.items():
        for cut in [-1, *(i for i, c in enumerate(old) if c == ".")]:
            module, rest = old[: max(cut, 0)], old[cut + 1 :]
            found = homes.setdefault(module, set())
            if new == rest or new.endswith("." + rest):
                found.add(new[: len(new) - len(rest)].removesuffix("."))
    known = {module: module if module in found else next(iter(found)) if len(found) == 1 else None for module, found in homes.items()}
    out: dict[Any, Any] = {}
    for module, value in modules.items():
        ancestor = str(module)
        while ancestor not in known and ancestor:
            ancestor = ancestor.rpartition(".")[0]
        home = known.get(ancestor)
        if home is not None:
            rest = str(module)[len(ancestor) :].removeprefix(".")
            out[".".join(part for part in (home, rest) if part)] = value
    return out
