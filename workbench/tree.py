"""The tree of a checkpoint: containers, plain values, tensors, and objects that stay inert.

A tree is made of dict, list, tuple, set and plain Python values, of LazyTensor leaves, and of `Inert` nodes: what a file
says to import or to call, kept as a description and never carried out. Walks are iterative and bounded, for a stranger's
tree may be deep, shared or circular.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from workbench.errors import SelectionError, UnsupportedError
from workbench.tensors import LazyTensor

MAX_DEPTH = 500
_EXPANSION = 200_000  # nodes a walk may visit again because containers are shared


@dataclass(frozen=True)
class Global:
    """A module-level name that a file refers to. Never imported."""

    module: str
    name: str

    @property
    def dotted(self) -> str:
        return f"{self.module}.{self.name}"


class _Nothing:
    def __repr__(self) -> str:
        return "NOTHING"

    def __reduce__(self) -> str:
        return "NOTHING"


NOTHING = _Nothing()


@dataclass(eq=False)
class Inert:
    """A call that a file asks for: ``func(*args)``, then its state, dict items and list elements. Never made."""

    func: Any
    args: Any = ()
    kwargs: Any = None
    new: bool = False  # built by __new__ rather than by a call
    state: Any = NOTHING
    items: dict[Any, Any] = field(default_factory=dict)
    elements: list[Any] = field(default_factory=list)

    @property
    def dotted(self) -> str:
        return self.func.dotted if isinstance(self.func, Global) else "the result of a call"

    def __repr__(self) -> str:
        return f"<{self.dotted}>"


_MAPPINGS = frozenset({"collections.OrderedDict", "collections.defaultdict", "collections.Counter", "builtins.dict"})
_WRAPPERS = {
    "torch._utils._rebuild_parameter": 0,
    "torch._utils._rebuild_parameter_with_state": 0,
    "torch._tensor._rebuild_from_type_v2": 2,
    "torch.nn.parameter.Buffer": 0,
}


def wrapped(node: Any) -> Any:
    """What a tensor wrapper (Parameter, Buffer, tensor subclass) holds; any other node itself."""
    while isinstance(node, Inert) and isinstance(node.func, Global) and node.func.dotted in _WRAPPERS:
        at = _WRAPPERS[node.func.dotted]
        if not (isinstance(node.args, tuple) and len(node.args) > at):
            break
        node = node.args[at]
    return node


def is_mapping(node: Any) -> bool:
    return isinstance(node, dict) or (isinstance(node, Inert) and node.dotted in _MAPPINGS)


def items_of(node: Any) -> dict[Any, Any]:
    """The entries of a mapping node."""
    return node if isinstance(node, dict) else node.items


def is_module(node: Any) -> bool:
    """Whether an inert object has the state of an nn.Module."""
    return (
        isinstance(node, Inert)
        and isinstance(node.state, dict)
        and is_mapping(node.state.get("_parameters"))
        and is_mapping(node.state.get("_modules"))
    )


def children(node: Any) -> Iterator[tuple[Any, Any]] | None:
    """(key, child) of a container, or None for a leaf. A module's tensors have the names its state dict would give them."""
    if is_mapping(node):
        return iter(items_of(node).items())
    if isinstance(node, (list, tuple)):
        return enumerate(node)
    if isinstance(node, (set, frozenset)):
        return enumerate(node)
    if isinstance(node, Inert):
        return _inert_children(node)
    return None


def _inert_children(node: Inert) -> Iterator[tuple[Any, Any]]:
    if is_module(node):
        for part in ("_parameters", "_buffers", "_modules"):
            held = node.state.get(part)
            if is_mapping(held):
                yield from ((key, child) for key, child in items_of(held).items() if child is not None)
        return
    if isinstance(node.args, tuple):
        yield from enumerate(node.args)
    if is_mapping(node.state):
        yield from items_of(node.state).items()
    elif isinstance(node.state, (tuple, list)):
        yield from enumerate(node.state)
    yield from node.items.items()
    yield from enumerate(node.elements)


def walk(root: Any) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every leaf with its path, depth first, in order. Cycles end where they close; deep and bomb-like trees are cut.

    A leaf whose value is `NOTHING` marks a place where the walk stopped.
    """
    iterators: list[tuple[tuple[Any, ...], Iterator[tuple[Any, Any]], int]] = []
    open_ids: set[int] = set()
    seen: dict[int, Any] = {}  # holds the nodes, so that no id is used twice
    visits = 0
    path: tuple[Any, ...] = ()
    node = root
    while True:
        value = wrapped(node)
        inner = None if isinstance(value, LazyTensor) else children(value)
        visits += 1
        if inner is None:
            yield path, value
        elif id(value) in open_ids:
            pass  # a cycle closes here; what it holds is being walked already
        elif len(path) >= MAX_DEPTH or (id(value) in seen and visits > _EXPANSION + 2 * len(seen)):
            yield path, NOTHING
        else:
            seen[id(value)] = value
            open_ids.add(id(value))
            iterators.append((path, inner, id(value)))
        while iterators:
            parent, iterator, own = iterators[-1]
            entry = next(iterator, None)
            if entry is not None:
                path, node = (*parent, entry[0]), entry[1]
                break
            iterators.pop()
            open_ids.discard(own)
        else:
            return


def replace(node: Any, at: dict[tuple[Any, ...], Callable[[Any, Any], list[tuple[Any, Any]]]], path: tuple[Any, ...] = ()) -> Any:
    """A copy of the tree in which each entry at a path of `at` became the entries that its function returns.

    The function gets (key, old node) and returns (key, node) pairs: none drops the entry. Untouched subtrees are shared.
    """
    prefixes = {p[:depth] for p in at for depth in range(len(p))}
    return _replace(node, at, prefixes, path)


def _replace(node: Any, at: dict[tuple[Any, ...], Any], prefixes: set[tuple[Any, ...]], path: tuple[Any, ...]) -> Any:
    if path not in prefixes:
        return node
    pairs: list[tuple[Any, Any]] = []
    for key, child in children(node) or ():
        here = (*path, key)
        pairs += at[here](key, child) if here in at else [(key, _replace(child, at, prefixes, here))]
    if not is_mapping(node):
        return type(node)(child for _, child in pairs)
    entries = unique_entries(pairs)
    return entries if isinstance(node, dict) else Inert(node.func, node.args, node.kwargs, node.new, node.state, entries, node.elements)


def unique_entries(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    """Pairs as a dict, refusing to let one entry replace another.

    Raises:
        SelectionError: two entries have one key.
    """
    entries: dict[Any, Any] = {}
    for key, child in pairs:
        if key in entries:
            raise SelectionError(f"two entries would be called {key!r}, and one of them would be lost", hint="choose another name")
        entries[key] = child
    return entries


def get(node: Any, path: tuple[Any, ...]) -> Any:
    """The node at `path`.

    Raises:
        KeyError: no such entry.
    """
    for key in path:
        for k, child in children(wrapped(node)) or ():
            if k == key:
                node = child
                break
        else:
            raise KeyError(key)
    return node


def live(value: Any) -> Any:
    """A node as the object it stands for.

    Raises:
        UnsupportedError: it holds an object that stays inert.
    """
    value = wrapped(value)
    if isinstance(value, LazyTensor):
        return value.load()
    if is_mapping(value):
        return {key: live(child) for key, child in items_of(value).items()}
    if type(value) in (list, tuple):
        return type(value)(live(child) for child in value)
    if isinstance(value, (Inert, Global)):
        raise UnsupportedError(f"an object of class {value.dotted} stays inert")
    return value


def plain(value: Any, depth: int = 6) -> Any:
    """A value as people and JSON see it: containers of plain values as they are, inert objects by their name."""
    value = wrapped(value)
    if isinstance(value, int) and value.bit_length() > 4096:
        return f"an integer of {value.bit_length()} bits"
    if value is None or isinstance(value, (bool, int, float, str, bytes, complex)):
        return value
    if isinstance(value, LazyTensor):
        return f"tensor {value.dtype} {list(value.shape)}"
    if depth == 0:
        return "…"
    if is_mapping(value):
        return {
            key if isinstance(key, (str, int)) else str(key): plain(child, depth - 1)
            for key, child in items_of(value).items()
            if key != "_metadata"
        }
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(child, depth - 1) for child in value]
    if isinstance(value, Global):
        return f"<{value.dotted}>"
    return repr(value) if isinstance(value, Inert) else str(value)
