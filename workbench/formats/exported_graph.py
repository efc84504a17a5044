"""What a graph of a .pt2 file tells people, and whether its texts are no more than torch.export writes.

torch runs texts of the JSON as Python: `expr_str` goes through sympy's eval, names of nodes and arguments into the source that torch.fx
generates and executes, `guards_code`, texts among the inputs and the keys of the sample inputs likewise when the program is called, `target`
is looked up below `torch`, `math` and `_operator`, and the tree specs import modules. Each kind has a narrow form here, and anything else
is a danger.

Source: torch 2.13 torch/_export/serde/schema.py and serialize.py, torch/export/_unlift.py, torch/fx/graph.py, torch/utils/_pytree.py.
"""

from __future__ import annotations

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
            told = (text.values() if type(text) is dict else (text,) for text in (value if type(value) is list else (value,)))
            self._seen[key].update(text for text in chain.from_iterable(told) if type(text) is str)
        return out

    def findings(self, record: str) -> Iterator[Finding]:
        """A danger for each text that is not as torch writes it; of very many, the first ones."""
        left = _MOST_READ
        for key, texts in self._seen.items():
            (what, plain), each = _RULES[key], _TREE if key.endswith("_spec") else 0
            for text in islice((text for text in sorted(texts) if (left := left - len(text) - each) < 0 or not plain(text)), 10):
                message = f"torch {what}, and this is not what torch.export writes there: {text[:200]!r}"
                yield Finding("code in the graph", "danger", message, {"record": record, "key": key})


_MOST_READ, _TREE = 3 << 20, 200  # characters; what each tree counts for beside its own
# what stands in an expression besides; no bracket opens behind a name, a text or a bracket, for that would call or index it
_SIGNS = r"\d+(?:\.\d*)?(?:[eE][-+]?\d+)?|(?:[<>=!]=|[-+*/%,<>&|^~])+ *\(*|(?<![\w)\]' ])\(+|[ )]"
_WORDS = r"(?<![\w.])(?:(?:and|or|not|if|else)\b *\(*|(?!\w*__)[^\W\d]\w*+(?![('\"]))"
_SYMPY = (
    r"Add|Mul|Pow|Integer|Rational|Max|Min|Abs|And|Xor|Or|Not|Eq|Ne|[LG][te]|(?:Une|E)quality|(?:Strict)?(?:Less|Greater)Than|Piecewise"
    r"|ExprCondPair|floor|ceiling|sqrt|exp|log|sign|a?(?:sin|cos|tan)h?|(?:Negative)?(?:Int)?Infinity"
    r"|FloorDiv|ModularIndexing|Where|(?:Python)?Mod|CleanDiv|CeilDiv|[LR]Shift|PowByNatural|FloatPow|(?:Float|Int)TrueDiv|Identity"
    r"|(?:Ceil|Floor|Trunc|Round)ToInt|(?:TruncTo|To)Float|RoundDecimal|IsNonOverlappingAndDenseIndicator|(?:OpaqueUnary|Bitwise)Fn_\w+"
)
_EXPRESSION = re.compile(  # Max(Integer(1), Symbol('s0', integer=True)): classes that compute on numbers, of numbers and symbols
    rf"(?:(?<![\w.])(?:{_SYMPY})\(|\bSymbol\('[^\W\d]\w*'(?:, \w+=(?:True|False))*\)|\bFloat\('[-+.\w]*', precision=\d+\)"
    rf"|{_WORDS}|{_SIGNS})*+",
    re.ASCII,
)
_GUARD = re.compile(  # L['x'].size()[0] % 2 == 0: arithmetic over the sizes of the inputs
    r"(?:(?<![\w.])(?:abs|float|int|max|min|not_|round|trunc|math\.[a-z]\w*|torch\._?sym_\w+|IsNonOverlappingAndDenseIndicator)\("
    rf"|\.(?:size|stride|storage_offset|dim)\(|(?<=[\w)\]])\.(?!_)[^\W\d]\w*+(?![('\"])|(?<![\w'])'[ !$-&(-\[\]-~]*'(?![\w'(])|[][]|{_WORDS}|{_SIGNS})*+",
    re.ASCII,
)
_QUIET = re.compile(r"[^\"'\\\x00-\x1f\x7f]*")  # cannot end the string that it stands in
_IDENTIFIER = re.compile(r"(?:[^\W\d]\w*)?")
_OPERATOR = re.compile(
    rf"torch\.ops\.(?!__)\w+\.(?!(?:{OPERATORS})\b)(?:[a-zA-Z]\w*|_[a-zA-Z]\w*|__i?(?:and|or|xor|[lr]shift)__)(?:\.(?!__)\w+)?"
    r"|torch\._?sym_\w+|torch\._functorch\.predispatch\.\w+|math\.[a-z]\w*|#[\w.]+:[\w.:]+"
    r"|_operator\.(?:eq|ne|[lg][et]|neg|pos|abs|not_|inv|index|getitem|(?:true|floor)div|mod|mul|add|sub|pow|and_|x?or_?|[lr]shift)"
)
_FACTORIES = {"list", "dict", "set", "tuple", "int", "float", "str", "bool", "OrderedDict", "defaultdict", "deque", "Counter"}


def is_quiet(key: Any) -> bool:
    """Whether a key, or a text, can be written into a string of source as it is."""
    return type(key) in (int, bool, float) or (type(key) is str and _QUIET.fullmatch(key) is not None)


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
    "expr_str": ("evaluates the sizes of a graph as Python", _fits(_EXPRESSION)),
    "guards_code": ("makes Python of the conditions on the inputs", _fits(_GUARD)),
    "inputs": ("writes the texts that a program was exported with into source that it runs", _fits(_QUIET)),
    **dict.fromkeys(("name", "as_name", "forward_arg_names"), _NAME),
    **dict.fromkeys(("parameter_name", "buffer_name", "tensor_constant_name", "custom_obj_name", "user_input_name", "fqn"), _TARGET),
    **dict.fromkeys(("target", "as_operator"), _CALLED),
    "in_spec": ("imports modules that a tree of arguments names, and writes its keywords into source that it runs", _is_call),
    "out_spec": ("imports modules that a tree of results names", _is_tree),
}
