"""Sections: what a training checkpoint keeps side by side, why each part is taken for what it is, and the `_metadata` beside weights.

A part is known by its structure first (an optimizer has `state` and `param_groups`), then by the words of the keys that lead to
it: `optimizer_states`, `model_ema`, `lr_scheduler`. Lists are looked into, and so are objects of the trainer's own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal, get_args

from workbench.names import join_path
from workbench.tensors import LazyTensor
from workbench.tree import Aside, Inert, children, is_mapping, is_module, is_tensor, items_of, plain

Path = tuple[Any, ...]
Kind = Literal["weights", "ema", "other", "optimizer", "schedule", "scaler", "random"]


@dataclass(frozen=True)
class Section:
    """One part of a training checkpoint, and why it is taken for what it is.

    `kind` is "weights" or "ema" (a moving average of weights) for what a model may load, "optimizer", "schedule", "scaler" or
    "random" for the state of a run, "other" for tensors too few to be a model beside the one that is there.
    """

    path: Path
    name: str
    kind: Kind
    tensors: int
    nbytes: int
    reason: str


_WEIGHTS = ("model_state_dict", "state_dict", "model", "model_state", "net", "network", "module", "weights", "params", "state")
_WEIGHT_WORDS = frozenset(["model", "models", "state", "dict", "net", "network", "module", "weight", "weights", "params", "parameters"])
_ROLES: tuple[tuple[Kind, str, frozenset[str]], ...] = (
    ("optimizer", "an optimizer", frozenset(["optim", "optims", "optimizer", "optimizers"])),
    ("schedule", "a schedule", frozenset(["sched", "scheduler", "schedulers"])),
    ("scaler", "a gradient scaler", frozenset(["scaler", "scalers"])),
    ("random", "a random generator", frozenset(["rng"])),
    ("ema", "a moving average", frozenset(["ema", "swa", "shadow", "averaged", "averaging", "polyak"])),
)
_MOMENTS = frozenset(
    ["exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "square_avg", "exp_inf", "acc_delta", "state1", "state2"]
)
_GENERATOR_STATES = frozenset({("uint8", (5056,)), ("uint8", (16,)), ("uint32", (624,)), ("uint64", (4,))})  # of torch, CUDA, NumPy
_RUN = ("optimizer", "schedule", "scaler", "random")
_MAX_DEPTH, _MAX_VISITS, _MAX_FOUND = 6, 20_000, 1_000
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")


def _words(key: Any) -> set[str]:
    return {word.lower() for word in _WORD.findall(key[:200])} if isinstance(key, str) else set()


def names_average(key: Any) -> bool:
    """Whether a key's words say that what it leads to is a moving average of weights."""
    return any(words & _words(key) for kind, _, words in _ROLES if kind == "ema")


def known_rank(section: Section) -> tuple[int, int]:
    """How far from what weights are usually called a section's path is; equal ranks are equal claims."""
    last = str(section.path[-1]) if section.path else ""
    strange = sum(not (isinstance(key, str) and _words(key) and _words(key) <= _WEIGHT_WORDS) for key in section.path)
    return strange, _WEIGHTS.index(last) if last in _WEIGHTS else len(_WEIGHTS)


def section_rank(section: Section) -> tuple[Any, ...]:
    return (get_args(Kind).index(section.kind), known_rank(section), -section.nbytes)


def find_sections(root: Any, below: Mapping[Path, list[LazyTensor]]) -> list[Section]:
    """The parts of a training checkpoint; `below` holds the tensors under each path, as the walk that named them found them."""
    found: list[Section] = []
    for visits, section in enumerate(_parts(root, below)):
        if section is not None:
            found.append(section)
        if visits > _MAX_VISITS or len(found) >= _MAX_FOUND:
            break
    largest = max((s.nbytes for s in found if s.kind in ("weights", "ema")), default=0)
    return [replace(s, kind="other") if s.kind == "weights" and known_rank(s)[0] and 20 * s.nbytes < largest else s for s in found]


def _parts(root: Any, below: Mapping[Path, list[LazyTensor]]) -> Iterator[Section | None]:
    pending: list[tuple[Path, Any, Kind, str]] = [((), root, "weights", "")]
    while pending:
        path, node, role, why = pending.pop()
        held, entries = below.get(path, []), _entries(node)
        yield None
        for kind, what, words in _ROLES if path else ():
            if words & _words(path[-1]):
                role, why = kind, f"{str(path[-1])!r} names {what}"
                break
        direct = {key: below.get((*path, key), []) for key, child in entries.items() if is_tensor(child)}
        if direct and any(isinstance(child, Aside) for child in entries.values()):
            held = [tensor for below_key in direct.values() for tensor in below_key]
        if is_module(node):
            yield _section(path, held, role, _joined(f"an object of class {node.dotted}", why))
        elif _is_optimizer(entries):
            yield _section(path, held, "optimizer", "it has `state` and `param_groups`")
        elif _holds_moments(entries):
            yield _section(path, held, "optimizer", "its tensors are an optimizer's moments")
        elif role in _RUN and is_mapping(node) and not any(_is_optimizer(_entries(child)) for child in entries.values()):
            if held or role != "optimizer":
                yield _section(path, held, role, _joined(why, _values(entries)))
        elif 2 * sum(map(len, direct.values())) >= len(held) > 0 and any(t.ndim for t in held):
            yield _state_dict(path, held, role, why, direct)
        elif held and role == "weights" and _is_nested_weights(path, entries):
            yield _section(path, held, "weights", f"{len(held)} tensors in dicts under {_where(path)}")
        elif len(path) < _MAX_DEPTH and (held or not path or role in _RUN):
            inner = (((*path, key), child, role, why) for key, child in entries.items() if isinstance(child, (dict, list, tuple, Inert)))
            pending += reversed(list(islice(inner, _MAX_VISITS)))


def _entries(node: Any) -> dict[Any, Any]:
    """What lies directly in a container, or in an object of the trainer's own."""
    if is_mapping(node):
        return items_of(node)
    if isinstance(node, (list, tuple)) or (isinstance(node, Inert) and not is_module(node) and not is_tensor(node)):
        return dict(children(node) or ())
    return {}


def _is_optimizer(entries: Mapping[Any, Any]) -> bool:
    return "param_groups" in entries and is_mapping(entries.get("state"))


def _holds_moments(entries: Mapping[Any, Any]) -> bool:
    """Whether the keys, or those of every entry, are what optimizers keep for each parameter."""
    some = list(islice(entries.items(), 100))
    if any(isinstance(key, str) and key.rpartition(".")[2] in _MOMENTS for key, _ in some):
        return True
    return bool(some) and all(is_mapping(child) and not _MOMENTS.isdisjoint(islice(items_of(child), 100)) for _, child in some)


def _is_nested_weights(path: Path, entries: Mapping[Any, Any]) -> bool:
    """Whether a dict of dicts is one model: it is called so, or has many parts, and none of them says that it is something else."""
    inner = [*entries, *(key for child in entries.values() for key in _entries(child))]
    words = set().union(*map(_words, inner[:1000]))
    if any(words & role for _, _, role in _ROLES) or any(_is_optimizer(_entries(child)) for child in entries.values()):
        return False
    if any(str(key) in _WEIGHTS or is_module(entries[key]) for key in entries):
        return False
    return (bool(path) and _words(path[-1]) <= _WEIGHT_WORDS) or sum(is_mapping(child) for child in entries.values()) > 4


def _state_dict(path: Path, held: list[LazyTensor], role: Kind, why: str, direct: Mapping[Any, Any]) -> Section:
    if "n_averaged" in direct and role == "weights":
        role, why = "ema", "it has `n_averaged`, as averaged models have"
    if all((t.dtype.name, t.shape) in _GENERATOR_STATES for t in held):
        role, why = "random", "its tensors are as long as the states of random generators"
    prefixes = {key.partition(".")[0] for key in direct if isinstance(key, str)}
    averages = list(filter(names_average, sorted(prefixes)))
    note = f"those under {', '.join(averages[:3])} are moving averages" if averages and role == "weights" else ""
    return _section(path, held, role, _joined(f"{len(direct)} tensors directly under {_where(path)}", why, note))


def _values(entries: Mapping[Any, Any]) -> str:
    """The first plain values of a part, for people: `last_epoch = 12, _last_lr = [0.001]`."""
    shown = ((key, plain(value, 2)) for key, value in entries.items() if isinstance(value, (bool, int, float, str, list)))
    return ", ".join(f"{str(key)[:30]} = {str(value)[:40]}" for key, value in islice(shown, 4))


def _joined(*parts: str) -> str:
    return "; ".join(part for part in parts if part)


def _where(path: Path) -> str:
    return repr(join_path(path)) if path else "the root"


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
