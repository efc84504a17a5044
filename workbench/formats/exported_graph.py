"""What a graph of a .pt2 file tells people, and whether its texts are no more than torch.export writes.

torch runs texts of the JSON as Python: `expr_str` goes through sympy's eval, names of nodes and arguments into the source that torch.fx
generates and executes, `guards_code` likewise when the program is called, `target` is looked up below `torch`, `math` and `_operator`,
and the tree specs import modules. Each kind has a narrow form here, and anything else is a danger.

Source: torch 2.13 torch/_export/serde/schema.py and serialize.py, torch/export/_unlift.py, torch/fx/graph.py, torch/utils/_pytree.py.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Iterator
from functools import cache
from itertools import chain, islice
from typing import Any

from workbench.checkpoint import Finding
from workbench.errors import CorruptFileError
from workbench.formats.torchscript_file import OPERATORS
from workbench.names import unique_pairs

DTYPES_BY_CODE = {
    1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float16", 7: "float32", 8: "float64", 9: "complex32", 10: "complex64",
    11: "complex128", 12: "bool", 13: "bfloat16", 28: "uint16", 29: "float8_e4m3fn", 30: "float8_e5m2", 31: "float8_e4m3fnuz",
    32: "float8_e5m2fnuz", 33: "float8_e8m0fnu", 34: "uint32", 35: "uint64",
}  # fmt: skip
_SHOWN = 1000  # entries of a signature
_SYMBOL = re.compile(r"Symbol\('(\w+)'[^()]*\)")


def at(value: Any, *keys: Any) -> Any:
    """What lies at a path of keys; None where there is no such path."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def told(model: dict[str, Any]) -> dict[str, Any]:
    """What people ask of a graph: its versions, what goes in and what comes out."""
    values, signature = at(model, "graph_module", "graph", "tensor_values"), at(model, "graph_module", "signature")
    versions = {key: at(model, key) for key in ("torch_version", "schema_version", "opset_version")}
    groups: dict[str, dict[str, str]] = {}
    described = cache(lambda name: _described(at(values, name)))
    for side in ("input_specs", "output_specs"):
        specs = at(signature, side)
        pairs = (pair for spec in (specs if isinstance(specs, list) else ()) if isinstance(spec, dict) for pair in spec.items())
        for kind, body in islice(pairs, _SHOWN):
            arg = at(body, "arg")
            name = next((n for n in (at(arg, "as_tensor", "name"), at(arg, "name")) if isinstance(n, str)), None)
            target = next((text for key, text in body.items() if key.endswith("_name")), None) if isinstance(body, dict) else None
            group = groups.setdefault(kind, {})
            group[name or str(len(group))] = target or (described(name) if name else str(arg)[:200])
    return groups | versions  # a kind of argument that is called as a version is gives way to it


def _described(meta: Any) -> str:
    """A tensor of the graph as text: ``float32 [s0, 3]``."""
    code, sizes = at(meta, "dtype"), at(meta, "sizes")
    texts = [str(at(n, "as_expr", "expr_str") or at(n, "as_int"))[:200] for n in (sizes[:64] if isinstance(sizes, list) else ())]
    return f"{DTYPES_BY_CODE.get(code) if isinstance(code, int) else None} [{_SYMBOL.sub(lambda found: found[1], ', '.join(texts))}]"


# the texts that torch runs


class Texts:
    """The texts of a graph that torch makes code of, gathered while its JSON is read: `pairs` is the hook for that."""

    def __init__(self) -> None:
        self._seen: dict[str, set[str]] = {key: set() for key in _RULES}

    def pairs(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = unique_pairs(pairs)
        for key in out.keys() & _RULES.keys():
            value = out[key]
            self._seen[key].update(text for text in (value if type(value) is list else (value,)) if type(text) is str)
        return out

    def findings(self, record: str) -> Iterator[Finding]:
        """A danger for each text that is not as torch writes it; of very many, the first ones."""
        for key, texts in self._seen.items():
            what, plain = _RULES[key]
            left = _MOST_PARSED  # what is parsed costs a thousand times as much as what is matched
            for text in islice((text for text in sorted(texts) if (left := left - len(text)) < 0 or not plain(text)), 10):
                message = f"torch {what}, and this is not what torch.export writes there: {text[:200]!r}"
                yield Finding("code in the graph", "danger", message, {"record": record, "key": key})


_MOST_PARSED = 4 << 20  # characters of one kind
_LONGEST = 10_000
_ARITHMETIC = (
    *(ast.Expression, ast.BoolOp, ast.BinOp, ast.UnaryOp, ast.Compare, ast.IfExp, ast.Tuple, ast.Constant, ast.Name, ast.Call, ast.keyword),
    *(ast.boolop, ast.operator, ast.unaryop, ast.cmpop, ast.expr_context),
)
_BUILDS = re.compile(r"[A-Z]\w*|floor|ceiling|sqrt|exp|log|a?(?:sin|cos|tan)h?|sign")  # sympy's classes, and its functions of numbers
_NUMBER_OR_NAME = re.compile(r"[-+.\de]*|[^\W\d]\w*")
_FOREIGN = re.compile(r"[^ -~]|[\"#\\]")
_SIZES = {"size", "stride", "storage_offset", "dim"}
_COUNTS = {"abs", "float", "int", "max", "min", "not_", "round", "trunc"}
_QUIET = re.compile(r"[^\"'\\\x00-\x1f\x7f]*")  # cannot end the string that it stands in
_IDENTIFIER = re.compile(r"(?:[^\W\d]\w*)?")
_OPERATOR = re.compile(
    rf"torch\.ops\.(?!__)\w+\.(?!(?:{OPERATORS})\b)(?:[a-zA-Z]\w*|_[a-zA-Z]\w*|__i?(?:and|or|xor|[lr]shift)__)(?:\.(?!__)\w+)?"
    r"|torch\._?sym_\w+|torch\._functorch\.predispatch\.\w+|math\.[a-z]\w*|#[\w.]+:[\w.:]+"
    r"|_operator\.(?:eq|ne|[lg][et]|neg|pos|abs|not_|inv|index|getitem|(?:true|floor)div|mod|mul|add|sub|pow|and_|x?or_?|[lr]shift)"
)
_FACTORIES = {"list", "dict", "set", "tuple", "int", "float", "str", "bool", "OrderedDict", "defaultdict", "deque", "Counter"}


def _parsed(text: str) -> list[Any] | None:
    """The nodes of an expression; None where it is none, or where another reader, which drops its line breaks or quotes it anew, may see another."""
    if len(text) > _LONGEST or _FOREIGN.search(text):
        return None
    try:
        return list(ast.walk(ast.parse(text, mode="eval")))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _is_expression(text: str) -> bool:
    """``Max(Integer(1), Symbol('s0', integer=True))``: arithmetic, where what is called builds an expression and strings are names."""

    def plain(node: Any) -> bool:
        if isinstance(node, ast.Call):
            return isinstance(node.func, ast.Name) and _BUILDS.fullmatch(node.func.id) is not None
        if isinstance(node, ast.Name):
            return "__" not in node.id
        if isinstance(node, ast.Constant) and isinstance(node.value, (str, bytes)):
            return isinstance(node.value, str) and _NUMBER_OR_NAME.fullmatch(node.value) is not None and "__" not in node.value
        return isinstance(node, _ARITHMETIC)

    nodes = _parsed(text)
    return nodes is not None and all(map(plain, nodes))


def _is_guard(text: str) -> bool:
    """``L['x'].size()[0] % 2 == 0``: arithmetic over the sizes of the inputs."""

    def plain(node: Any) -> bool:
        if isinstance(node, ast.Call):
            func = node.func
            if isinstance(func, ast.Name):
                return func.id in _COUNTS
            of = func.value.id if isinstance(func, ast.Attribute) and isinstance(func.value, ast.Name) else None
            return isinstance(func, ast.Attribute) and (
                of == "math" or func.attr in _SIZES or (of == "torch" and func.attr.startswith("sym_"))
            )
        if isinstance(node, ast.Attribute):
            return not node.attr.startswith("_")
        if isinstance(node, ast.Constant) and isinstance(node.value, (str, bytes)):
            return isinstance(node.value, str) and _QUIET.fullmatch(node.value) is not None
        return isinstance(node, (*_ARITHMETIC, ast.Subscript)) and not (isinstance(node, ast.Name) and "__" in node.id)

    nodes = _parsed(text)
    return nodes is not None and all(map(plain, nodes))


def _leaves(text: str) -> Iterator[Any]:
    """What a JSON text holds: objects, and texts, keys among them; of a text that is JSON itself, what it holds too.

    Raises:
        ValueError, RecursionError: no JSON. CorruptFileError: a name stands twice in an object.
    """
    waiting = [json.loads(text, object_pairs_hook=unique_pairs)]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
            try:
                waiting.append(json.loads(value, object_pairs_hook=unique_pairs))
                continue
            except (json.JSONDecodeError, RecursionError):
                pass  # torch would not read it either
        if isinstance(value, dict):
            yield value
            waiting += chain(value, value.values())
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, str):
            yield value


def _is_tree(text: str) -> bool:
    """A tree spec of plain containers, or of types that somebody registered: one that imports nothing."""
    try:
        for value in _leaves(text):
            if isinstance(value, dict):
                module, name = value.get("default_factory_module", "builtins"), value.get("default_factory_name", "list")
                if "__enum__" in value or module not in ("builtins", "collections") or name not in _FACTORIES:
                    return False
    except (ValueError, RecursionError, CorruptFileError):
        return False
    return True


def _is_call(text: str) -> bool:
    """A tree spec of arguments: torch writes its keywords into the signature of a function, and its keys into texts of one."""
    if not _is_tree(text) or not all(_QUIET.fullmatch(leaf) for leaf in _leaves(text) if isinstance(leaf, str)):
        return False
    root = json.loads(text)
    children = at(root[1], "children_spec") if isinstance(root, list) and len(root) == 2 else None
    keywords = at(children[1], "context") if isinstance(children, list) and len(children) == 2 else None
    words = (leaf for leaf in _leaves(json.dumps(keywords)) if isinstance(leaf, str))
    return all(_IDENTIFIER.fullmatch(word) for word in words)


def _fits(form: re.Pattern[str]) -> Callable[[str], bool]:
    return lambda text: form.fullmatch(text) is not None


_NAME = ("writes the names of a graph into source that it runs", _fits(_IDENTIFIER))
_TARGET = ("writes the names of tensors and modules into source that it runs", _fits(_QUIET))
_CALLED = ("looks up what a node calls", _fits(_OPERATOR))
_RULES: dict[str, tuple[str, Callable[[str], bool]]] = {
    "expr_str": ("evaluates the sizes of a graph as Python", _is_expression),
    "guards_code": ("makes Python of the conditions on the inputs", _is_guard),
    **dict.fromkeys(("name", "as_name", "forward_arg_names"), _NAME),
    **dict.fromkeys(("parameter_name", "buffer_name", "tensor_constant_name", "custom_obj_name", "user_input_name", "fqn"), _TARGET),
    **dict.fromkeys(("target", "as_operator"), _CALLED),
    "in_spec": ("imports modules that a tree of arguments names, and writes its keywords into source that it runs", _is_call),
    "out_spec": ("imports modules that a tree of results names", _is_tree),
}
