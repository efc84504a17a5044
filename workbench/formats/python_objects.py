"""What pickles say of Python's own containers, numbers and byte strings by way of calls, made plain where nothing is lost by it.

What a call holds and its value does not show goes to `objects.aside`, whose tensors are told; copies are paid for by `objects.spend`.
"""

from __future__ import annotations

from typing import Any

from workbench.tree import Global, Inert, is_mapping, items_of


def _is_key(value: Any) -> bool:
    """Whether a value can be hashed without harm: tuples that share their parts take forever."""
    plain = (str, bytes, int, float, Global, type(None))
    return isinstance(value, plain) or (type(value) is tuple and len(value) <= 8 and all(isinstance(part, plain) for part in value))


def made_set(objects: Any, node: Inert) -> Any:
    held = node.args[0] if len(node.args) == 1 else None
    if node.new or not isinstance(held, list):
        return set() if node.new else node
    objects.spend(64 * len(held))
    return set(held) if all(map(_is_key, held)) else node


def made_mapping(objects: Any, node: Inert) -> Any:
    """`OrderedDict([[key, value], …])`, the spelling of Python 2, and `Counter({key: value, …})`, as items; `__new__` takes none of them."""
    held = node.args[1:] if node.dotted == "collections.defaultdict" else node.args
    if node.new or not held:
        return node
    entries = items_of(held[0]) if is_mapping(held[0]) else held[0]
    if len(held) == 1 and isinstance(entries, (dict, list, tuple)):
        objects.spend(64 * len(entries))
        pairs = isinstance(entries, dict) or all(isinstance(p, (list, tuple)) and len(p) == 2 and _is_key(p[0]) for p in entries)
        if pairs and (node.dotted != "collections.Counter" or is_mapping(held[0])):  # a Counter counts what a list holds
            node.items.update(entries)
            node.args = node.args[: -len(held)]
            return node
    objects.aside.append(held)
    return node


def made_value(objects: Any, node: Inert) -> Any:
    """Numbers and byte strings that protocols below 3 spell as calls: complex(re, im), bytearray(bytes), encode(text, 'latin1'), bytes()."""
    called: tuple[Any, ...] = (node.dotted, *node.args)
    match called:
        case ("builtins.complex", float(real), float(imag)):
            return complex(real, imag)
        case ("builtins.bytes",):
            return b""
        case ("builtins.bytearray", *data) if all(type(part) is bytes for part in data[:1]) and len(data) < 2:
            objects.spend(sum(map(len, data)))
            return bytearray() if node.new else bytearray(*data)
        case ("_codecs.encode", str(text), "latin1" | "latin-1"):
            known = objects.encoded.get(id(text))  # one text may be named often
            if known is None:
                known = objects.encoded[id(text)] = (text, text.encode("latin-1"))
            return known[1]
        case ("_codecs.encode", *_):
            objects.unclear = True
    return node
