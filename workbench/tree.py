"""The tree of a checkpoint: containers, plain values, tensors, and objects that stay inert.

A tree is made of dict, list, tuple, set and plain Python values, of LazyTensor leaves, and of `Inert` nodes: what a file
says to import or to call, kept as a description and never carried out. Walks are iterative and bounded, for a stranger's
tree may be deep, shared or circular.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from workbench.errors import SelectionError, UnsupportedError
from workbench.tensors import LazyTensor

MAX_DEPTH = 500
_EXPANSION = 50_000  # nodes a walk may visit again because containers are shared
_CHARACTERS = 1 << 27  # in all paths of a walk: long keys may be shared too


@dataclass(frozen=True)
class Global:
    """A module-level name that a file refers to. Never imported."""

    module: str
    name: str

    @cached_property
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
        return self.func.dotted if type(self.func) is Global else "the result of a call"

    def __repr__(self) -> str:
        return f"<{self.dotted}>"


_PART_NAMES = {"torch._utils._rebuild_nested_tensor": ("values", "sizes", "strides", "offsets")}
_MAPPINGS = frozenset({"collections.OrderedDict", "collections.defaultdict", "collections.Counter", "builtins.dict"})
SUBCLASSES = frozenset(  # (function, class, its arguments, state)
    {"torch._tensor._rebuild_from_type_v2", "torch._tensor._rebuild_from_type", "torch.tensor._rebuild_from_type"}
)
_WRAPPERS = {
    "torch._utils._rebuild_parameter": 0,
    "torch._utils._rebuild_parameter_with_state": 0,
    "torch.nn.parameter.Parameter": 0,
    "torch.nn.parameter.Buffer": 0,
    "torch.Size": 0,
    **dict.fromkeys(SUBCLASSES, 2),
}


def wrapped(node: Any) -> Any:
    """What a tensor wrapper (Parameter, Buffer, tensor subclass) holds; any other node itself."""
    for _ in range(8):  # a stranger may close a circle of them
        if not (isinstance(node, Inert) and isinstance(node.func, Global) and node.func.dotted in _WRAPPERS):
            break
        at = _WRAPPERS[node.func.dotted]
        if not (isinstance(node.args, tuple) and len(node.args) > at):
            break
        held = node.args[at]
        if at == 2 and not isinstance(held, LazyTensor):
            held = attributes(node.args[-1]).get("_local_tensor")  # of a DTensor; the tensors of others are parts
            if held is None:
                break
        node = held
    return node


def attributes(state: Any) -> dict[Any, Any]:
    """The attributes in the state of an object: its `__dict__`, then its slots."""
    halves = state if isinstance(state, tuple) else (state,)
    return {key: value for half in halves if is_mapping(half) for key, value in items_of(half).items()}


def is_tensor(node: Any) -> bool:
    """Whether a node is a tensor, or a call that makes one out of parts that are listed."""
    held = wrapped(node)
    return isinstance(held, LazyTensor) or (isinstance(held, Inert) and (held.dotted in SUBCLASSES or held.dotted in _PART_NAMES))


def makes_tensor(node: Any) -> bool:
    """Whether a node is a tensor, or a call of what makes one, whatever its arguments."""
    return isinstance(node, LazyTensor) or (isinstance(node, Inert) and (node.dotted in _WRAPPERS or node.dotted in _PART_NAMES))


def is_mapping(node: Any) -> bool:
    return isinstance(node, dict) or (isinstance(node, Inert) and node.dotted in _MAPPINGS)


def items_of(node: Any) -> dict[Any, Any]:
    """The entries of a mapping node."""
    return node if isinstance(node, dict) else node.items


def module_state(node: Any) -> dict[Any, Any] | None:
    """The `__dict__` of an nn.Module among inert objects: its state, the first half of one, or what a GraphModule is rebuilt from."""
    if not isinstance(node, Inert):
        return None
    for held in (node.state, *(part[0] for part in (node.state, node.args) if isinstance(part, tuple) and part)):
        if isinstance(held, dict) and is_mapping(held.get("_parameters")) and is_mapping(held.get("_modules")):
            return held
    return None


def is_module(node: Any) -> bool:
    """Whether an inert object has the state of an nn.Module."""
    return module_state(node) is not None


def modules(root: Any) -> list[tuple[tuple[Any, ...], str]]:
    """(path, dotted class) of every module that a tree holds, outer ones first."""
    return [(path, node.dotted) for path, node in walk(root, objects=True) if is_module(node)]


def tensors_aside(module: Inert) -> list[str]:
    """Names of a module's tensors that its state dict leaves out: buffers not meant to be kept, and plain attributes."""
    state = module_state(module) or {}
    own = [str(key) for key, value in state.items() if str(key)[:1] != "_" and isinstance(wrapped(value), LazyTensor)]
    return [*map(str, _left_out(state)), *own]


def _left_out(state: dict[Any, Any]) -> set[Any]:
    named = state.get("_non_persistent_buffers_set")
    buffers = state.get("_buffers")
    return {key for key in items_of(buffers) if key in named} if isinstance(named, set) and is_mapping(buffers) else set()


class Aside(dict[Any, Any]):
    """A mapping among the tensors of a state dict that is no part of it: a program's constants, its inputs, what it says of itself."""


def with_asides(state: Any, asides: dict[str, Any]) -> Any:
    """The state dict with each of `asides` beside its tensors, under a name that none of them has."""
    entries = dict(items_of(state))
    for name, node in asides.items():
        while name in entries:
            name += "#"
        if node:
            entries[name] = Aside(items_of(node) if is_mapping(node) else enumerate(node if isinstance(node, (list, tuple)) else [node]))
    return entries if isinstance(state, dict) else dataclasses.replace(state, items=entries)


def without_asides(state: Any) -> Any:
    if not is_mapping(state) or not any(isinstance(node, Aside) for node in items_of(state).values()):
        return state
    entries = {key: node for key, node in items_of(state).items() if not isinstance(node, Aside)}
    return entries if isinstance(state, dict) else dataclasses.replace(state, items=entries)


def children(node: Any) -> Iterator[tuple[Any, Any]] | None:
    """(key, child) of a container, or None for a leaf. A module's tensors have the names its state dict would give them."""
    if is_mapping(node):
        return iter(items_of(node).items())
    if isinstance(node, (list, tuple)):
        return enumerate(node)
    if isinstance(node, (set, frozenset)):
        return enumerate(sorted(node, key=_member))
    if isinstance(node, Inert):
        return _inert_children(node)
    return None


def _member(value: Any) -> tuple[str, Any]:
    """A place for each member of a set that does not hang on how the set was built, for numbers and text."""
    return type(value).__name__, value if isinstance(value, (int, float, str, bytes)) else 0


def _inert_children(node: Inert) -> Iterator[tuple[Any, Any]]:
    state = module_state(node)
    if state is not None:
        left_out = _left_out(state)
        for part in ("_parameters", "_buffers", "_modules"):
            for key, child in items_of(state[part]).items() if is_mapping(state.get(part)) else ():
                if child is not None and (part != "_buffers" or key not in left_out):
                    yield key, child
        yield from ((key, child) for key, child in state.items() if isinstance(child, Inert) and child.dotted == "torch.ScriptObject")
        return
    if node.dotted in _PART_NAMES and isinstance(node.args, tuple):
        yield from zip(_PART_NAMES[node.dotted], node.args, strict=False)
        return
    if node.dotted in SUBCLASSES and isinstance(node.args, tuple) and len(node.args) == 4:
        held = node.args[2]
        is_jagged = isinstance(held, tuple) and len(held) == 1 and is_mapping(held[0])
        yield from children(held[0] if is_jagged else attributes(node.args[3]) or node.args[3]) or ()
        return
    if node.dotted == "torch.ScriptObject" and isinstance(node.state, tuple) and node.state:
        yield from children(node.state[0]) or ()
        return
    if isinstance(node.args, tuple):
        yield from enumerate(node.args)
    if is_mapping(node.state):
        yield from items_of(node.state).items()
    elif isinstance(node.state, (tuple, list)):
        yield from enumerate(node.state)
    yield from node.items.items()
    yield from enumerate(node.elements)


_PLAIN = frozenset({str, int, float, bool, bytes, type(None)})
_LEAVES = _PLAIN | {LazyTensor}  # those that a walk meets most
_FEW = 64


def walk(root: Any, *, objects: bool = False, values: bool = True) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every leaf with its path (and every inert object, where asked), depth first, in order. Cycles end where they close; deep and
    bomb-like trees are cut. Without `values`, text and numbers are passed over.

    A leaf whose value is `NOTHING` marks a place where the walk stopped.
    """
    iterators: list[tuple[tuple[Any, ...], Iterator[tuple[Any, Any]], int, int]] = []
    open_ids: set[int] = set()
    seen: dict[int, Any] = {}  # holds the nodes, so that no id is used twice
    records: dict[int, Any] = {}
    visits = spent = 0
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
        elif (
            len(path) >= MAX_DEPTH
            or (id(value) in seen and visits > _EXPANSION + 2 * len(seen))
            or (spent := spent + _characters(value, prefix := iterators[-1][3] + _width(path[-1]) + 1 if path else 0)) > _CHARACTERS
        ):
            yield path, NOTHING
        else:
            if objects and isinstance(value, Inert):
                yield path, value
            seen[id(value)] = value
            open_ids.add(id(value))
            iterators.append((path, inner, id(value), prefix))
        while iterators:
            parent, iterator, own, _ = iterators[-1]
            for key, node in iterator:
                if type(node) not in _LEAVES and (values or id(node) not in records):
                    if values or not _is_record(node):
                        path = (*parent, key)
                        break
                    records[id(node)] = node
                visits += 1
                if values or type(node) is LazyTensor:
                    yield (*parent, key), node
            else:
                iterators.pop()
                open_ids.discard(own)
                continue
            break
        else:
            return


def _is_record(node: Any) -> bool:
    """Whether this is a small container of text and numbers alone, as the lines of a log are, or the pairs of a vocabulary."""
    if type(node) is dict:
        return len(node) <= _FEW and _PLAIN.issuperset(map(type, node.values()))
    return type(node) in (tuple, list) and len(node) <= _FEW and _PLAIN.issuperset(map(type, node))


def _characters(container: Any, prefix: int) -> int:
    """About how many characters the names in a container have, of which `prefix` lead to it."""
    if type(container) in (list, tuple):
        return (prefix + 6) * len(container)
    keys = container if type(container) is dict else [key for key, _ in children(container) or ()]
    try:
        own = len("".join(keys))
    except TypeError:
        own = sum(map(_width, keys))
    return own + prefix * len(keys)


def _width(key: Any) -> int:
    if isinstance(key, (tuple, frozenset)):
        return sum(map(_width, key)) + 2
    return len(key) if isinstance(key, (str, bytes)) else key.bit_length() // 3 if isinstance(key, int) else 16


def replace(node: Any, at: dict[tuple[Any, ...], Callable[[Any, Any], list[tuple[Any, Any]]]], path: tuple[Any, ...] = ()) -> Any:
    """A copy of the tree in which each entry at a path of `at` became the entries that its function returns.

    The function gets (key, old node) and returns (key, node) pairs: none drops the entry. Untouched subtrees are shared.
    """
    prefixes = {p[:depth] for p in at for depth in range(len(p))}
    return _replace(node, at, prefixes, path)


def _replace(node: Any, at: dict[tuple[Any, ...], Any], prefixes: set[tuple[Any, ...]], path: tuple[Any, ...]) -> Any:
    if path not in prefixes:
        return node
    if isinstance(node, Inert) and not is_mapping(node):
        raise SelectionError(
            f"{plain(node)} is an object that stays inert, and nothing in it is replaced", hint="save the section by itself"
        )
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
