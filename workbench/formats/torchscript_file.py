"""TorchScript archives (torch.jit.save, mobile .ptl): programs, whose tensors and code are listed and which are never run.

    <root>/data.pkl              the root module, pickle protocol 2 as torch's C++ pickler spells it; its classes are globals __torch__.…
    <root>/data/<key>            the storages of data.pkl
    <root>/constants.pkl         the tuple that the code calls CONSTANTS.c0, CONSTANTS.c1 …
    <root>/constants/<key>       the storages of constants.pkl
    <root>/code/<path>.py        the classes: `__parameters__ = […]` and `__buffers__ = […]` name what state_dict() holds
    <root>/code/….debug_pkl · bytecode.pkl, mobile_debug_handles.pkl (mobile) · traced_inputs.pkl (shapes) · extra/<name> (the author's)
    <root>/byteorder · version · .data/…

The checkpoint holds what state_dict() gives, in its order, and beside it `attributes` (what else the modules hold), `CONSTANTS` and
`program`; `.weights` is without these. Code is looked at as text; nothing is refused for what it does, and what it could do is said.

Source: torch 2.13 torch/csrc/jit/serialization (pickler, unpickler, export_module, import, import_source, python_print .cpp).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain, islice, pairwise
from typing import Any

from workbench.checkpoint import Checkpoint, Finding
from workbench.errors import CorruptFileError, FormatError, UnsupportedError
from workbench.formats.known_globals import ALL_STORAGE_DTYPES
from workbench.formats.pickle_vm import Machine
from workbench.formats.torch_archive import pickle_root, read_byteorder
from workbench.formats.torch_objects import TorchObjects, trailing_finding, unpickle
from workbench.formats.zip_index import ZipIndex, read_record, read_zip_index
from workbench.names import join_path, unique_name
from workbench.tensors import LazyTensor
from workbench.tree import NOTHING, Global, Inert, walk, with_asides

_MAX_PICKLE = 1 << 30
_MAX_CODE = 5 << 20
_MAX_NAMES = 8 << 20  # characters of the names of classes
_CLASS_COST = 64  # of each, beside the letters of its name
_ASIDE = ("bytecode.pkl", "mobile_debug_handles.pkl", "traced_inputs.pkl")
_FLAGS = ("training", "_is_full_backward_hook")  # every module has them
_TYPED = ("restore_type_tag", "build_intlist", "build_tensorlist", "build_doublelist", "build_boollist")
_TAGS = {f"torch.jit._pickle.{name}" for name in _TYPED}
_HINT = "torch.jit.load runs it: use that only if you trust its author"

# texts as torch's lexer ends them (isString in lexer.h), and its comments, of which `# type:` is none
_TEXT = r'"(?:[^"\\\n]++|\\[\s\S])*+"|' + r"'(?:[^'\\\n]++|\\[\s\S])*+'"
_LONG = r'"""(?:[^"\\]++|\\[\s\S]|"(?!""))*+"""|' + r"\'\'\'(?:[^'\\]++|\\[\s\S]|'(?!''))*+\'\'\'"
_QUOTED = re.compile(_LONG + "|" + _TEXT + r"|(?:\\[\s\S])++|#(?! type:)[^\n]*")
_PRINTED = re.compile(r'"(?:[^"\\\n]++|\\[^\n])*+"|((?:\\[^\n])++)')  # a text as torch itself writes every one
_UNPRINTED = re.compile(r'"""|\'\'\'|\\\n')  # what carries a text over to the next line, which torch never writes
_CLASS = re.compile(r"^class\s++(\w++)\s*+(?:\(\s*+(\w++)\s*+\)\s*+)?:", re.MULTILINE)
_MARK = re.compile("__(?:parameters|buffers)__")
_NAMED = re.compile(r"\w+::(_?[a-z]\w*)(?:\..*)?")  # an operator that the code calls by its name, and not by a sign of the language
_WORD = re.compile(r"\w++")
_TENSORS = re.compile(rf"__(parameters|buffers)__\s*+=\s*+\[((?:[\s,]|{_TEXT})*+)\]")
# operators that touch files or the network, or compile a text; `autograd`, by which torch's compiler comes back to all operators and which
# its printer never writes; then `torch` and `ops` as values, through which any operator can be had
OPERATORS = r"(?:from|read|write)_file|save|load_tensor|rpc_\w+|inline_asm\w*"
# torch's C++ classes whose states are numbers, texts and tensors; aten.OpaqueObject unpickles its own, and another library's may do anything
_CLASSES = r"(?:quantized|rnn|sparse|mkldnn|mkldnn_prepacked|xnnpack|vulkan|metal|_nnapi|backendutils)"
_STRANGE = re.compile(rf"__torch__\.torch\.classes\b(?!\.{_CLASSES}\.)")
_OPERATOR = re.compile(rf"(?:::|torch\.(?=classes\.(?!{_CLASSES}\.)))({OPERATORS}|classes\.[\w.]+)".encode())  # as bytecode names one
_REACHES = re.compile(
    rf"(?:torch(?<![\w.]torch)|ops(?<![\w.]ops)\s*+\.\s*+\w++)\s*+\.\s*+({OPERATORS}|autograd)\b"
    r"|(torch(?<![\w.]torch)\b(?!\s*[.:])|ops(?<![\w.]ops)\b(?!\s*:|\s*\.\s*\w+\s*\.)"
    rf"|\btorch\s*+\.\s*+classes\b(?!\s*+\.\s*+{_CLASSES}\s*+\.))"
)
Tensors = dict[str, set[str]]  # of a module's class: the names of its "parameters" and "buffers"


def open_archive(index: ZipIndex) -> Checkpoint:
    """List a TorchScript archive.

    Raises:
        CorruptFileError: cut, damaged or contradictory.
    Cost: the directory, the pickles and the code; no tensor data.
    """
    root = pickle_root(index)
    byteorder, findings = read_byteorder(index, root)
    module, found = _unpickled(index, f"{root}data.pkl", f"{root}data/", byteorder)
    constants, also_found = _unpickled(index, f"{root}constants.pkl", f"{root}constants/", byteorder)
    findings += found + also_found
    if not isinstance(module, Inert) or not isinstance(constants, tuple):
        raise CorruptFileError("data.pkl must hold an object and constants.pkl a tuple", path=index.file.url, record=f"{root}data.pkl")
    findings.append(Finding("program", "info", "this is a program: its tensors are listed and it is not run", hint=_HINT))
    with index.file.kept_open():
        modules = _modules(index, root, findings)
    state, attributes = _split(module, modules, findings)
    program = {"class": module.dotted, "code": _sizes(index, f"{root}code/", ".py"), "extra": _sizes(index, f"{root}extra/")}
    named = {f"c{at}": value for at, value in enumerate(constants)}
    tree = with_asides(_flat(state, findings), {"attributes": attributes, "CONSTANTS": named, "program": program})
    asides = {f"{root}{aside}".lower() for aside in _ASIDE}
    for record in [name for name in index.records if name.lower() in asides]:  # torch finds them whatever the case of their letters
        findings += _scanned(index, root, record)
    return Checkpoint(tree, name=index.file.name, format="torchscript", findings=tuple(findings), source=index.file)


def code_listing(ckpt: Checkpoint, *, max_nbytes: int = _MAX_CODE) -> dict[str, str]:
    """The source text of a TorchScript archive, by path.

    Raises:
        UnsupportedError: no archive, or more than `max_nbytes` of code. CorruptFileError: it is damaged.
    """
    if ckpt.source is None:
        raise UnsupportedError("this checkpoint does not come from a file", hint="open the TorchScript archive with wb.open")
    index = read_zip_index(ckpt.source)
    return dict(_sources(index, pickle_root(index), max_nbytes))


def _sources(index: ZipIndex, root: str, max_nbytes: int) -> Iterator[tuple[str, str]]:
    for path, size in _sizes(index, f"{root}code/", ".py").items():
        max_nbytes -= size
        if max_nbytes < 0:
            raise UnsupportedError("the archive holds more code than is read at once", record=path, path=index.file.url)
        yield path, read_record(index, f"{root}code/{path}", size).decode("utf-8", "backslashreplace")


def _sizes(index: ZipIndex, prefix: str, suffix: str = "") -> dict[str, int]:
    records = index.records
    return {name[len(prefix) :]: records[name].size for name in records if name.startswith(prefix) and name.endswith(suffix)}


def _modules(index: ZipIndex, root: str, findings: list[Finding]) -> dict[str, Tensors]:
    """The classes of modules by qualified name; what in their code is out of the ordinary goes to `findings`."""
    modules: dict[str, Tensors] = {}
    restoring, room = [], _MAX_NAMES
    folded = f"{root}code/".lower()
    odd = [
        name
        for name in index.records
        if name.lower().startswith(folded)
        and not (name.startswith(f"{root}code/") and name.endswith(".py") == name.lower().endswith(".py"))
    ]
    if odd:
        what = f"torch finds {odd[0]} whatever the case of its letters, and it was not looked at as code"
        findings.append(Finding("code in doubt", "danger", what, {"record": odd[0]}))
    try:
        for path, text in _sources(index, root, _MAX_CODE):
            where = {"record": f"{root}code/{path}"}
            bare = _QUOTED.sub(lambda found: " " if found[0][0] in "#\\" else "''", text)  # a comment always ends with its line
            printed = (
                text if _UNPRINTED.search(text) else _PRINTED.sub(lambda found: found[1] or "''", text)
            )  # believes no reading of odd texts, not even ours
            text = text.replace("\\\n", " ")
            names = sorted({f"torch.{found[1]}" if found[1] else found[2] for found in _REACHES.finditer(bare)})
            findings += [_operator("code", name, where) for name in names]
            if not names and (found := _REACHES.search(printed)):
                what = f"{found[0]!r} stands in a text or comment of a kind that torch does not write: it may be code to another reader"
                findings.append(Finding("code in doubt", "danger", what, where, _HINT))
            if any(text.count(word) != bare.count(word) for word in ("\nclass", "__parameters__", "__buffers__")):
                findings.append(Finding("code in doubt", "danger", "quoted text in the code looks like classes; none is believed", where))
                continue
            for head, following in pairwise(chain(_CLASS.finditer(text), (None,))):
                assert head is not None
                name, body = f"{path[:-3].replace('/', '.')}.{head[1]}", text[head.end() : following and following.start()]
                if (room := room - len(name) - _CLASS_COST) < 0:
                    raise UnsupportedError("it has more classes, or longer names, than are read")
                if "__setstate__" in body:
                    restoring.append(name)
                if head[2] == "Module":
                    tensors = modules[name] = {"parameters": set(), "buffers": set()}
                    for mark in islice(_MARK.finditer(body), 2):  # torch writes one of each
                        if found := _TENSORS.match(body, mark.start()):
                            tensors[found[1]].update(quoted[1:-1] for quoted in re.findall(_TEXT, found[2]))
    except UnsupportedError as error:
        findings.append(Finding("code in doubt", "danger", f"the code was not read: {error.message}", dict(error.where)))
    if restoring:
        what = f"loading alone runs code: torch.jit.load calls __setstate__ of {', '.join(restoring[:5])}; it was not called here"
        findings.append(Finding("code runs at load", "warning", what, {"classes": restoring[:100]}, _HINT))
    return modules


def _operator(where: str, name: str, place: dict[str, Any]) -> Finding:
    what = f"the {where} uses {name}, by which a program reaches files or the network; it was not run"
    return Finding("operator", "danger", what, {"global": name, **place}, _HINT)


def _bytecode(index: ZipIndex, root: str, record: str, tree: Any) -> list[Finding]:
    """What a mobile runtime would run, which may be another program than the code beside it."""
    data, place = read_record(index, record, _MAX_PICKLE), {"record": record}
    reaching = sorted({found[1].decode() for found in _OPERATOR.finditer(data)})
    texts = (leaf for _, leaf in walk(tree) if isinstance(leaf, str))
    names = {found[1] for found in map(_NAMED.fullmatch, texts) if found}
    names |= {"__setstate__"} if b".__setstate__" in data else set()
    with suppress(UnsupportedError):  # which was told where the code was looked at
        for _, text in _sources(index, root, _MAX_CODE):
            names.difference_update(found[0] for found in _WORD.finditer(text) if found[0] in names)
    findings = [_operator("bytecode", f"torch.{name}", place) for name in reaching]
    if names:
        what = (
            f"the bytecode uses {', '.join(sorted(names)[:5])}, and the code does not: a mobile runtime runs another program than is shown"
        )
        findings.append(Finding("two programs", "warning", what, {"operators": sorted(names)[:100], **place}, _HINT))
    return findings


# pickles


class _ScriptMachine(Machine):
    """The pickle machine as torch's C++ reader has it: the value of an enum is an argument without its tuple."""

    def _made(self, func: Any, args: Any, kwargs: Any = None, new: bool = False) -> None:
        super()._made(func, args if isinstance(args, (tuple, Inert)) else (args,), kwargs, new)


class _ScriptObjects(TorchObjects):
    """What torch's C++ pickler writes otherwise than torch.save: typed lists and dicts, and sparse tensors."""

    def construct(self, node: Inert) -> Any:
        args = node.args
        if node.dotted in _TAGS and isinstance(args, tuple) and args:
            return args[0]
        if node.dotted == "torch._utils._rebuild_sparse_tensor" and isinstance(args, tuple) and len(args) > 4 and args[0] in (1, 2):
            layout, size, _, *parts = args  # c10::Layout, in front of what Python's call has last
            node.args = (Global("torch", ("sparse_coo", "sparse_csr")[layout - 1]), (*parts[: layout + 1], size))
        return super().construct(node)


def is_plain(found: Global) -> bool:
    """Whether a global of an archive's pickles is a type that torch's C++ reader fills with plain data."""
    is_storage = found.module == "torch" and found.name in ALL_STORAGE_DTYPES
    return is_storage or found.dotted in _TAGS or (f"{found.module}.".startswith("__torch__.") and _STRANGE.match(found.dotted) is None)


def _unpickled(index: ZipIndex, record: str, folder: str, byteorder: str = "little") -> tuple[Any, list[Finding]]:
    data = read_record(index, record, _MAX_PICKLE)
    objects = _ScriptObjects(lambda key: index.storage(folder + key), byteorder)
    tree, machine, found = unpickle(
        data, objects, file=index.file, format="torchscript", record=record, machine=_ScriptMachine, plain=is_plain
    )
    trailing = [trailing_finding(len(data) - machine.end, record)] if machine.end != len(data) else []
    return tree, [*found, *trailing]


def _scanned(index: ZipIndex, root: str, record: str) -> list[Finding]:
    """What is wrong with a pickle that holds no weights."""
    try:
        tree, found = _unpickled(index, record, record)
        unread = _bytecode(index, root, record, tree) if record.lower() == f"{root}bytecode.pkl".lower() else []
    except FormatError as error:
        unread = [Finding("unreadable pickle", "danger", f"the pickle cannot be read: {error.message}", {"record": record})]
        found = list(error.partial.findings) if error.partial is not None else []
    return [*unread, *(finding for finding in found if finding.kind.startswith("forbidden"))]


# modules


def _is_module(node: Any, modules: dict[str, Tensors]) -> bool:
    return isinstance(node, Inert) and node.dotted in modules and isinstance(node.state, dict)


def _split(root: Inert, modules: dict[str, Tensors], findings: list[Finding]) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """What state_dict() names, in its order, and all else that the modules hold: both nested as the modules are."""
    if not _is_module(root, modules):
        what = f"the code does not tell which attributes of {root.dotted} are parameters and buffers; all are listed as attributes"
        findings.append(Finding("names unknown", "warning", what, {"class": root.dotted}))
        return {}, {"self": root.state}
    made: dict[int, tuple[dict[Any, Any], dict[Any, Any]]] = {id(root): ({}, {})}
    pending = [root]
    while pending:
        node = pending.pop()
        state, rest = made[id(node)]
        tensors, buffers, inner = modules[node.dotted], dict[Any, Any](), dict[Any, Any]()
        for name, value in node.state.items():
            held = next((kind for kind in ("parameters", "buffers") if name in tensors[kind]), "")
            if _is_module(value, modules):
                if id(value) not in made:
                    made[id(value)] = ({}, {})
                    pending.append(value)
                inner[name], rest[name] = made[id(value)]
            elif held and (value is None or isinstance(value, LazyTensor)):
                (state if held == "parameters" else buffers)[name] = value
            elif name not in _FLAGS:
                rest[name] = value
        state |= buffers | inner
    return made[id(root)]


def _flat(state: dict[Any, Any], findings: list[Finding]) -> dict[str, LazyTensor]:
    flat: dict[str, LazyTensor] = {}
    counts: dict[str, int] = {}
    for path, value in walk(state):
        if value is NOTHING:
            findings.append(Finding("tree cut", "warning", "modules nest too deep or repeat too often, and not all of them are listed"))
        elif value is not None:
            flat[unique_name(join_path(path), flat, counts)] = value
    return flat
