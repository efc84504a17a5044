"""ONNX: one protobuf message that holds a graph; weights lie in it, or in files beside it that it names.

    ModelProto    1 ir_version · 2 3 producer · 7 graph · 8 opset_import · 14 metadata_props · 20 training_info · 25 functions
    GraphProto    1 node · 5 initializer · 11 input · 12 output · 15 sparse_initializer
    NodeProto     2 output · 3 name · 4 op_type · 5 attribute · 7 domain
    Attribute     1 name · 2 3 7 8 numbers · 5 10 tensors · 6 11 graphs · 22 23 sparse tensors
    TensorProto   1 dims · 2 data_type · 4 5 6 7 10 11 typed data · 8 name · 9 raw_data · 13 external_data · 14 data_location

The message is walked in place (see protobuf_wire) and no value is read: a model of any size lists at the cost of its graph.
Initializers of the main graph keep their names, a Constant has its output's; what lies deeper is called by the path to it,
``node/attribute/name``, or ``domain.function/name``. Types of less than a byte are read as int8, uint8 or float32. External
data must lie in the model's own folder by real path; a tensor whose data is not there, or not as declared, is listed and
locked. Protobuf has no end mark: a file cut between two of its outermost fields is a whole shorter one.

Source: onnx 1.23 onnx.proto and docs/ExternalData.md.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from itertools import groupby, repeat
from typing import Any

from workbench.checkpoint import Checkpoint, Finding, Severity
from workbench.dtypes import DTYPES
from workbench.errors import CorruptFileError, FormatError, MissingFileError, UnsupportedError, WorkbenchError, located
from workbench.files import FileRef, Span
from workbench.formats.packed import Packed
from workbench.formats.protobuf_wire import BYTES, VARINT, Place, Wire, read_varint, schema
from workbench.formats.window import Window, require_shape
from workbench.names import unique_name
from workbench.strided import row_major
from workbench.tensors import LazyTensor, Stored, TensorSpec, made, stored_tensors

_MODEL = schema(
    "ir_version=1v producer_name=2b producer_version=3b domain=4b model_version=5v doc_string=6b graph=7b opset_import=8b* metadata_props=14b* "
    "training_info=20b* functions=25b* configuration=26b*"
)
_NODE = schema("output=2b* name=3b op_type=4b attribute=5b* domain=7b")
_FUNCTION = schema("name=1b node=7b* domain=10b attribute_proto=11b* overload=13b")
_ATTRIBUTE = schema("name=1b t=5b g=6b tensors=10b* graphs=11b* sparse_tensor=22b sparse_tensors=23b*")
_CONSTANT = _ATTRIBUTE | schema("f=2f i=3v s=4b floats=7f* ints=8v* strings=9b*")
_TENSOR = schema(
    "dims=1v* data_type=2v segment=3b float_data=4f* int32_data=5v* string_data=6b* int64_data=7v* name=8b raw_data=9b double_data=10d* "
    "uint64_data=11v* external_data=13b* data_location=14v"
)
_SPARSE, _TRAINING = schema("values=1b indices=2b dims=3v*"), schema("initialization=1b algorithm=2b")
_ENTRY, _OPSET = schema("key=1b value=2b"), schema("domain=1b version=2v")
_VALUE, _TYPE, _TENSOR_TYPE = schema("name=1b type=2b"), schema("tensor_type=1b"), schema("elem_type=1v shape=2b")
_SHAPE, _DIM = schema("dim=1b*"), schema("dim_value=1v dim_param=2b")
_GRAPH = schema(
    "node=1b* name=2b initializer=5b* doc_string=10b input=11b* output=12b* value_info=13b* quantization_annotation=14b* sparse_initializer=15b* "
    "metadata_props=16b*"
)

# data_type -> name, element type here, bits, and the typed field that may hold it
_TYPES = {
    1: ("FLOAT", "float32", 32, 4), 2: ("UINT8", "uint8", 8, 5), 3: ("INT8", "int8", 8, 5), 4: ("UINT16", "uint16", 16, 5), 5: ("INT16", "int16", 16, 5),
    6: ("INT32", "int32", 32, 5), 7: ("INT64", "int64", 64, 7), 9: ("BOOL", "bool", 8, 5), 10: ("FLOAT16", "float16", 16, 5),
    11: ("DOUBLE", "float64", 64, 10), 12: ("UINT32", "uint32", 32, 11), 13: ("UINT64", "uint64", 64, 11), 14: ("COMPLEX64", "complex64", 64, 4),
    15: ("COMPLEX128", "complex128", 128, 10), 16: ("BFLOAT16", "bfloat16", 16, 5), 17: ("FLOAT8E4M3FN", "float8_e4m3fn", 8, 5),
    18: ("FLOAT8E4M3FNUZ", "float8_e4m3fnuz", 8, 5), 19: ("FLOAT8E5M2", "float8_e5m2", 8, 5), 20: ("FLOAT8E5M2FNUZ", "float8_e5m2fnuz", 8, 5),
    21: ("UINT4", "uint8", 4, 5), 22: ("INT4", "int8", 4, 5), 23: ("FLOAT4E2M1", "float32", 4, 5), 24: ("FLOAT8E8M0", "float8_e8m0fnu", 8, 5),
    25: ("UINT2", "uint8", 2, 5), 26: ("INT2", "int8", 2, 5), 27: ("FLOAT6E2M3", "float32", 6, 5), 28: ("FLOAT6E3M2", "float32", 6, 5),
}  # fmt: skip
_FLOAT, _INT64, _STRING, _BOOL = 1, 7, 8, 9
_FIXED = (1, 11, 14, 15)  # no varints, even in their typed fields
_MANTISSA = {23: 1, 27: 3, 28: 2}  # bits, after a sign and an exponent
_DATA = {4: "float_data", 5: "int32_data", 6: "string_data", 7: "int64_data", 9: "raw_data", 10: "double_data", 11: "uint64_data"}
_DECODER = f"{__name__}:typed_values"
_MAX_DEPTH = 32  # graphs in graphs; protobuf's own readers stop at 100 messages, three a graph
_MAX_NAMES = 64 << 20  # characters of all names together
_MAX_LISTS = 64 << 20  # bytes of all lists of numbers of Constants
_MAX_FILES = 10_000  # of external data
_NODE_PRICE, _ADDED, _UNUSUAL = 2, 16, 40  # fields that could be walked while one is looked at: a node, a name, a tensor
_SHOWN = 100
_HEAD, _MAX_FORMS = 4096, 4096  # bytes of a tensor looked at, and dims and types of tensors that are kept at once
# a tensor as most are spelled: dims and type; then its name, and raw data or the entries of external data; or typed data and its name. A text
# may follow each. What lies between is told by the lengths, which are looked at afterwards.
_V = rb"[\x80-\xff]{0,8}[\0-\x7f]"
_OUTSIDE = rb"j.\n\x08location\x12..{0,100}?j.\n\x06offset\x12.\d{1,19}j.\n\x06length\x12.\d{1,19}p\x01"
_EXTERNAL = re.compile(re.sub(rb"(\.\{.*?\?|\\d\{.*?\}|\.)", rb"(\1)", _OUTSIDE), re.DOTALL)
_PLAIN = re.compile(
    rb"((?:\x08%b){0,64}\x10[\0-\x7f])(?:((?:B[\0-\x7f].*?)?)(?:J(%b).*|(%b))|([\x22\x2a\x3a\x52\x5a])(%b).*(B[\0-\x7f][^B]*))"
    % (_V, _V, _OUTSIDE, _V),
    re.DOTALL,
)
_LED, _RAW = re.compile(rb"((?:\x08%b){0,64}\x10[\0-\x7f])B[\0-\x7f]" % _V), 0x4A
_TOP = bytes(range(128, 256))
_Form = tuple[int, TensorSpec, tuple[int, ...], int, int, int]
_MODEL_GRAPH = 7


def claims(file: FileRef) -> bool:
    """Whether a ModelProto begins here: an ir_version, other known fields, a graph; a cut file is claimed once its graph has begun."""
    began = False
    with file.open() as source, suppress(CorruptFileError, StopIteration):
        wire, at = Wire(Window(source.pread, file.size)), 0
        for index in range(_SHOWN):
            if at >= file.size:
                break
            key, start, at, _ = wire.field(at, file.size, cut=True)
            if _MODEL.get(key >> 3, ("", None))[1] != key & 7 or (key >> 3 == 1) == bool(index):
                return False
            if began := key >> 3 == _MODEL_GRAPH:
                key, *_ = wire.field(start, min(at, file.size), cut=True)
                return _GRAPH.get(key >> 3, ("", None))[1] == key & 7
    return began


def open_file(file: FileRef) -> Checkpoint:
    """List an ONNX model.

    Raises:
        CorruptFileError: a field contradicts another, its message or the file; `.partial` holds the tensors met before.
        UnsupportedError: more than is walked.
    Cost: the graph is walked, in pieces of 4 KiB; tensors in it are skipped.
    """
    with located(path=file.url), file.open() as source:
        model = _Model(file, Wire(Window(source.pread, file.size)))
        try:
            metadata = model.read()
        except FormatError as error:
            error.partial = Checkpoint(model.tensors, name=file.name, format="onnx", findings=tuple(model.findings), source=file)
            raise
    return Checkpoint(model.tensors, name=file.name, format="onnx", metadata=metadata, findings=tuple(model.findings), source=file)


class _Model:
    """One walk over a model; `tensors` and `findings` are what it meets."""

    def __init__(self, file: FileRef, wire: Wire) -> None:
        self.file, self.wire = file, wire
        self.tensors: dict[str, Any] = {}
        self.findings: list[Finding] = []
        self._counts: dict[str, int] = {}
        self._room = _MAX_NAMES
        self._operators: Counter[str] = Counter()
        self._folder, self._lists = file.folder, _MAX_LISTS
        self._files: dict[str, FileRef | WorkbenchError] = {}  # by location, or why there is none
        self._forms: dict[bytes, _Form] = {}
        self._graphs: deque[tuple[Place, str, int]] = deque()  # still to be walked: where, prefix of names, depth
        self._ends: dict[str, list[str]] = {"input": [], "output": []}

    def read(self) -> dict[str, str]:
        """Walk everything that can hold a tensor; returns the metadata."""
        text, message = self.wire.text, self.wire.message
        model = message((0, self.file.size), _MODEL)
        if "graph" not in model:
            raise CorruptFileError("the model holds no graph: the file is cut")
        self._graph(model["graph"], "", 0)
        self.wire.charge(_NODE_PRICE * len(model.get("training_info", [])), 0)
        for index, place in enumerate(model.get("training_info", [])):
            self._graphs += [(graph, f"training_info[{index}]/{name}/", 1) for name, graph in message(place, _TRAINING).items()]
        for place in model.get("functions", []):
            self._function(message(place, _FUNCTION))
        while self._graphs:
            self._graph(*self._graphs.popleft())
        if not model.get("opset_import") and model.get("ir_version", 0) >= 3:
            self.findings.append(
                Finding("cut file", "warning", "the model imports no operator set, which its version requires: is it cut?")
            )
        opsets = [message(place, _OPSET) for place in model.get("opset_import", [])[:_SHOWN]]
        metadata = {
            "onnx.ir_version": str(model.get("ir_version", "")),
            "onnx.producer": f"{text(model.get('producer_name'))} {text(model.get('producer_version'))}".strip(),
            "onnx.opset_import": ", ".join(f"{text(opset.get('domain')) or 'ai.onnx'} {opset.get('version', 0)}" for opset in opsets),
            "onnx.inputs": ", ".join(self._ends["input"]),
            "onnx.outputs": ", ".join(self._ends["output"]),
            "onnx.operators": ", ".join(f"{name} {count}" for name, count in self._operators.most_common(_SHOWN)),
        }
        for entry in (message(place, _ENTRY) for place in model.get("metadata_props", [])[:_SHOWN]):
            metadata[unique_name(text(entry.get("key")), metadata, {})] = text(entry.get("value"))
        return metadata

    def _add(self, prefix: str, name: str, value: Any) -> None:
        unique = full = prefix + name
        if full in self.tensors:
            self.wire.charge(_ADDED, 0)
            unique = unique_name(full, self.tensors, self._counts)
            self._tell("name collision", "warning", f"{full!r} names two tensors; the later one is shown as {unique!r}")
        self._room -= len(unique)
        self.wire.charge(_ADDED, 0)
        if self._room < 0:
            raise UnsupportedError("the names of the tensors are too long to be listed")
        self.tensors[unique] = value

    def _tell(self, kind: str, severity: Severity, message: str) -> None:
        self.findings += [Finding(kind, severity, message)] if len(self.findings) < _SHOWN else []

    # graphs

    def _graph(self, place: Place, prefix: str, depth: int) -> None:
        if depth > _MAX_DEPTH:
            raise UnsupportedError(f"graphs nest more than {_MAX_DEPTH} deep", offset=place[0])
        held = self.wire.message(place, _GRAPH)
        self._initializers(held.get("initializer", []), prefix)
        for item in held.get("sparse_initializer", []):
            self._sparse(item, prefix, "")
        for key, told in self._ends.items() if not prefix else ():
            ends = [self._end(item) for item in held.get(key, [])[:_SHOWN]]
            told += [text for name, text in ends if name not in self.tensors]  # older files list weights among the inputs
        self._nodes(held.get("node", []), prefix, depth)

    def _initializers(self, items: list[Place], prefix: str) -> None:
        """Those of the main graph that are spelled as nearly all are (dims, type, short name, raw data) are made together, after the loop."""
        view, tensors, forms = self.wire.window.view, self.tensors, self._forms
        names: list[str] = []
        found: list[_Form] = []
        starts: list[int] = []
        try:
            for start, stop in items:
                count = stop - start if stop - start < _HEAD else _HEAD
                data, low = view(start, count)
                if not prefix and (head := _LED.match(data, low, low + count)) and (form := forms.get(lead := head[1]) or self._led(lead)):
                    at = head.end()
                    end = at + data[at - 1]  # of the name
                    size, body = data[end + 1] if end + 1 < low + count and data[end] == _RAW else -1, end + 2
                    if size >= 0x80 and body < low + count:
                        size, body = size - 0x80 + (data[body] << 7), body + 1
                    if size == form[3] and body + size == low + stop - start and data[body - 1] < 0x80 and self.wire.left > 0:
                        name = data[at:end].decode("utf-8", "replace")
                        if len(name) <= self._room and name not in tensors and "\ufffd" not in name:
                            self.wire.left -= 1
                            self._room -= len(name)
                            tensors[name] = None
                            names.append(name)
                            found.append(form)
                            starts.append(start + body - low)
                            continue
                name, value = self._plain(start, stop) or self._tensor((start, stop), prefix)
                if prefix or name in tensors or len(name) > self._room:
                    self._add(prefix, name, value)
                else:
                    self._room -= len(name)
                    tensors[name] = value
        finally:
            spans = map(made, repeat(Span), zip(repeat(self.file), starts, (form[3] for form in found), repeat(None)))
            made_here = stored_tensors([form[1] for form in found], spans, (form[2] for form in found))
            tensors.update(zip(names, made_here, strict=True))

    def _function(self, function: dict[str, Any]) -> None:
        self.wire.charge(2 * _NODE_PRICE, 0)
        names = [self.wire.text(function.get(part))[:_SHOWN] for part in ("domain", "name", "overload")]
        prefix = ".".join(name for name in names if name) + "/"
        for attribute in function.get("attribute_proto", []):
            self._attribute(attribute, prefix, "", "defaults", 1)
        self._nodes(function.get("node", []), prefix, 1)

    def _nodes(self, nodes: list[Place], prefix: str, depth: int) -> None:
        self.wire.charge(_NODE_PRICE * len(nodes), nodes[0][0] if nodes else 0)
        for index, place in enumerate(nodes):
            node = self.wire.message(place, _NODE)
            op, domain = self.wire.text(node.get("op_type")), self.wire.text(node.get("domain"))
            self._operators[op if domain in ("", "ai.onnx") else f"{domain}.{op}"] += 1
            if "attribute" not in node:
                continue
            output = self.wire.text(node["output"][0]) if "output" in node else ""
            label = self.wire.text(node.get("name")) or output or f"{op}[{index}]"
            constant = output if op == "Constant" and domain in ("", "ai.onnx") else ""
            for attribute in node["attribute"]:
                self._attribute(attribute, prefix, constant, label, depth)

    def _attribute(self, place: Place, prefix: str, constant: str, label: str, depth: int) -> None:
        """The tensors and graphs of one attribute; of a Constant, named by its output, the numbers too."""
        held = self.wire.message(place, _CONSTANT if constant else _ATTRIBUTE)
        if held.keys() <= {"name"}:
            return
        path = f"{prefix}{label[:_SHOWN]}/{self.wire.text(held.get('name'))[:_SHOWN]}"
        single = prefix + constant if constant else path
        for one, many in (("t", "tensors"), ("sparse_tensor", "sparse_tensors"), ("g", "graphs")):
            items = [(single, held[one])] if one in held else []
            for name, item in items + [(f"{path}[{index}]", item) for index, item in enumerate(held.get(many, []))]:
                if one == "t":
                    self._add(name, "", self._tensor(item, name)[1])
                elif one == "g":
                    self._graphs.append((item, name + "/", depth + 1))
                else:
                    self._sparse(item, "", name)
        for key, code, field in (("f", _FLOAT, 2), ("i", _INT64, 3), ("floats", _FLOAT, 7), ("ints", _INT64, 8)):
            if key in held:
                items = held[key] if len(key) > 1 else [held[key]]
                count = sum(b - a for a, b in items) // 4 if code == _FLOAT else self._count(items)
                self._add(single, "", self._typed(code, (count,) if len(key) > 1 else (), items, place, field))
        if "s" in held or "strings" in held:
            self._add(single, "", f"texts [{len(held.get('strings', '1'))}]")

    def _count(self, items: list[Any]) -> int:
        """How many numbers a repeated varint field holds: each has one byte without the top bit."""
        runs = [item for item in items if not isinstance(item, int)]
        self._lists -= sum(stop - start for start, stop in runs)
        if self._lists < 0:
            raise UnsupportedError(f"Constants with more than {_MAX_LISTS} bytes of numbers", offset=runs[0][0])
        return len(items) - len(runs) + sum(len(self.wire.window.take(a, b - a).translate(None, _TOP)) for a, b in runs)

    def _sparse(self, place: Place, prefix: str, name: str) -> None:
        """The two dense tensors of a SparseTensorProto, which its values name where nothing else does."""
        held = self.wire.message(place, _SPARSE)
        parts = {part: self._tensor(held.get(part, (0, 0)), prefix + name) for part in ("values", "indices")}
        name = name or parts["values"][0]
        shape = self.wire.numbers(held.get("dims", []), 64)
        self._tell("sparse tensor", "info", f"{prefix + name!r} is sparse, of shape {shape}; its parts are listed")
        for part, (_, tensor) in parts.items():
            self._add(prefix, f"{name}.{part}", tensor)

    # tensors

    def _tensor(self, place: Place, path: str) -> tuple[str, Any]:
        """(its own name, the tensor) of a TensorProto at `path` in the model; texts are told in a word."""
        told: str | None = path or None
        try:
            if plain := self._plain(*place):
                return plain
            self.wire.charge(_UNUSUAL, place[0])
            held = self.wire.message(place, _TENSOR)
            name = self.wire.text(held.get("name"))
            told = name or path
            return name, self._values(held, place)
        except Exception:  # a context of its own for each of very many would take a tenth of the time
            with located(tensor=told, offset=place[0]):
                raise

    def _plain(self, start: int, stop: int) -> tuple[str, LazyTensor] | None:
        """`_tensor` of one that is spelled as most are, by one regular expression; None for any other, and for whatever is wrong."""
        count = stop - start if stop - start < _HEAD else _HEAD
        data, low = self.wire.window.view(start, count)
        if not (found := _PLAIN.fullmatch(data, low, low + count)):
            return None
        lead, before, raw, outside, key, run, after = found.groups()
        if not (form := self._forms.get(lead) or self._led(lead)) or self.wire.left <= 0:
            return None
        code, spec, strides, needed, wanted, typed = form
        text, name, doc = before or after, b"", b""
        if text:
            name = text[2:]
            if (length := text[1]) != len(name):
                name, doc = name[:length], name[length:] or b"?"
        storage: Any = None
        if outside:
            storage = self._declared(outside, needed)
        else:
            size = raw or run
            length = size[0] if len(size) == 1 else read_varint(size, 0, 0)[0]
            at = start - low + found.end(3 if raw else 6)
            if raw and at + length != stop:
                doc += data[at + length - start + low : low + count] or b"?"
            elif run and (at + length != start - low + found.start(7) or key[0] != typed):
                return None
            if raw and at + length == stop:
                count = stop - start  # the rest of the message is known without being seen
            if length == needed and (raw or not wanted):
                storage = made(Span, (self.file, at, length, None))
            elif run and wanted <= length <= 10 * wanted:
                body, nbytes = made(Span, (self.file, start, stop - start, None)), spec.nbytes
                storage = made(Packed, (body, nbytes, _TYPES[code][0], stop - start, nbytes, _DECODER, (code, typed >> 3)))
        if storage is None or count < stop - start or (doc and not _is_doc(doc)):
            return None
        self.wire.left -= 1
        try:
            return name.decode(), LazyTensor(spec, made(Stored, (storage, 0, strides, "little")))
        except UnicodeDecodeError:
            return None

    def _led(self, lead: bytes) -> _Form | None:
        """What dims and type say: type, spec, strides, bytes, numbers in a typed field that is decoded, its key. None for what is unusual."""
        dims, at = lead[1:-2:2], 0  # where each has one byte
        shape = tuple(dims)
        if not lead.isascii():
            many: list[int] = []
            while lead[at] == 8:
                value, at = read_varint(lead, at + 1, 0)
                many.append(value)
            shape = tuple(many)
        numel = math.prod(shape)
        _, dtype, bits, field = _TYPES.get(lead[-1], ("", "", 0, 0))
        if bits < 8 or not numel or numel >> 63:
            return None
        if len(self._forms) >= _MAX_FORMS:
            self._forms.clear()
        spec, strides = TensorSpec(DTYPES[dtype], shape), _strides(shape[1:]) if shape else ()
        form = (lead[-1], spec, strides, numel * bits // 8, 0 if lead[-1] in _FIXED else numel, field << 3 | BYTES)
        self._forms[lead] = form
        return form

    def _declared(self, entries: bytes, needed: int) -> Span | None:
        """The span that entries of external data tell, where their lengths are right, the file is a known one, and the data lies in it."""
        first, one, location, second, two, offset, third, three, length = _EXTERNAL.fullmatch(entries).groups()  # type: ignore[union-attr]
        lengths = one[0] == len(location) == first[0] - 12 and two[0] == len(offset) == second[0] - 10
        file = self._files.get(location.decode("utf-8", "replace"))
        if not (lengths and three[0] == len(length) == third[0] - 10) or not isinstance(file, FileRef):
            return None
        return Span(file, int(offset), needed) if int(length) == needed and int(offset) + needed <= file.size else None

    def _values(self, held: dict[str, Any], place: Place) -> Any:
        shape = tuple(self.wire.numbers(held.get("dims", []), 64))
        code, external = held.get("data_type", 0), held.get("data_location", 0)
        require_shape(shape)
        if code == _STRING:
            return f"texts {list(shape)}"
        if code not in _TYPES or external > 1 or "segment" in held:
            raise CorruptFileError(f"element type {code}, data location {external}: no tensor that ONNX 1.23 reads")
        packing, _, _, field = _TYPES[code]
        data = [key for key in _DATA.values() if key in held] + ["external_data"] * external
        if len(data) > 1 or not set(data) <= {"raw_data", "external_data", _DATA[field]}:
            raise CorruptFileError(f"{packing} lies in raw_data or {_DATA[field]} or a file; found in {', '.join(data)}")
        needed = _form(code, shape)[2]
        if external:
            return self._external(code, shape, needed, held.get("external_data", []), place[0])
        if data != ["raw_data"]:
            return self._typed(code, shape, held.get(_DATA[field], []), place, field)
        start, stop = held["raw_data"]
        if stop - start != needed:
            raise CorruptFileError(f"{packing} {list(shape)} needs {needed} bytes and raw_data holds {stop - start}")
        return _stored(code, shape, Span(self.file, start, needed))

    def _typed(self, code: int, shape: tuple[int, ...], items: list[Any], place: Place, field: int) -> LazyTensor:
        """A tensor in a field of numbers: read where it lies if that is one run of fixed width, else decoded with its message."""
        packing, _, bits, _ = _TYPES[code]
        spec, strides, stored = _form(code, shape)
        runs = [item[1] - item[0] for item in items if not isinstance(item, int)]  # bytes; the others are single numbers
        single = len(items) - len(runs)
        if code in _FIXED:
            wanted, least, most = spec.nbytes, sum(runs), sum(runs)
        else:  # a varint has 1 to 10 bytes; elements of 2 and 4 bits share one
            wanted = stored if bits < 6 else spec.numel
            least, most = single + sum(-(-run // 10) for run in runs), single + sum(runs)
        if not least <= wanted <= most:
            raise CorruptFileError(f"{packing} {list(shape)} does not fit the numbers that its field {field} holds")
        if code in _FIXED and len(items) < 2:
            return _stored(code, shape, Span(self.file, items[0][0] if items else place[0], spec.nbytes))
        body = Span(self.file, place[0], place[1] - place[0])
        storage = Packed(body, spec.nbytes, packing, body.nbytes, max(spec.nbytes, 1), _DECODER, (code, field))
        return LazyTensor(spec, Stored(storage, 0, strides))

    def _external(self, code: int, shape: tuple[int, ...], needed: int, entries: list[Place], at: int) -> LazyTensor:
        """A tensor in a file beside the model; listed and locked where its data is not there or not as declared."""
        pairs = [self.wire.message(entry, _ENTRY) for entry in entries]
        told = [(self.wire.text(pair.get("key")), self.wire.text(pair.get("value"))) for pair in pairs]
        where = dict(told)
        location, offset, length = where.get("location", ""), where.get("offset", "0"), where.get("length", str(needed))
        try:
            file = self._beside(location)
            if len(where) < len(told) or not all(text.isascii() and text.isdecimal() and len(text) < 20 for text in (offset, length)):
                raise UnsupportedError("offset or length are no counts, or told twice")
            if int(length) != needed or int(offset) + needed > file.size:
                raise CorruptFileError(f"{needed} bytes are needed; {length} at {offset} are declared, and the file has {file.size}")
            return _stored(code, shape, Span(file, int(offset), needed))
        except (WorkbenchError, OSError) as error:
            why = f"external data {location!r}: {error.message if isinstance(error, WorkbenchError) else error.strerror}"
            self._tell("external data", "danger" if isinstance(error, UnsupportedError) else "warning", why)
            return replace(_stored(code, shape, Span(self.file, at, 0)), locked=why)

    def _beside(self, location: str) -> FileRef:
        """The file of external data, which is looked for once."""
        if (found := self._files.get(location)) is None:
            if len(self._files) == _MAX_FILES:
                raise UnsupportedError(f"the model names more than {_MAX_FILES} files")
            try:
                found = self._found(location)
            except WorkbenchError as error:
                found = error.with_traceback(None)
            self._files[location] = found
        if isinstance(found, WorkbenchError):
            raise found.with_traceback(None)
        return found

    def _found(self, location: str) -> FileRef:
        """The file in the model's own folder by real path and by no other name, as onnx demands."""
        parts = location.replace("\\", "/").split("/")
        if "\0" in location or ".." in parts or (len(parts) > 1 and (parts[0] or "C:")[1:] == ":"):
            raise UnsupportedError("the path leads out of the model's own folder")
        if self.file.address is None and len(parts) == 1 and not os.path.lexists(os.path.join(self._folder.url, location)):
            raise MissingFileError("there is no such file")  # as would be found next, much more slowly where very many are missing
        file = self._folder.file(location)
        if file.address is None and os.stat(file.url).st_nlink > 1:
            raise UnsupportedError("this is a hard link, and may be a file from elsewhere")
        return file

    def _end(self, place: Place) -> tuple[str, str]:
        """An input or output: its name, and the name with element type and shape."""
        text, message = self.wire.text, self.wire.message
        value = message(place, _VALUE)
        tensor = message(message(value.get("type", (0, 0)), _TYPE).get("tensor_type", (0, 0)), _TENSOR_TYPE)
        dims = [message(dim, _DIM) for dim in message(tensor.get("shape", (0, 0)), _SHAPE).get("dim", [])[:_SHOWN]]
        sizes = ", ".join(str(dim.get("dim_value") or text(dim.get("dim_param")) or "?") for dim in dims)
        return text(value.get("name")), f"{text(value.get('name'))}: {_TYPES.get(tensor.get('elem_type', 0), ('', '?'))[1]} [{sizes}]"


def _is_doc(field: bytes) -> bool:
    """Whether this is one doc_string."""
    try:
        size, at = read_varint(field, 1, 0)
    except CorruptFileError:
        return False
    return field[:1] == b"b" and at + size == len(field)


@lru_cache(maxsize=4096)
def _strides(inner: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of any shape that is `inner` but for its first size."""
    return row_major((1, *inner))


@lru_cache(maxsize=4096)
def _form(code: int, shape: tuple[int, ...]) -> tuple[TensorSpec, tuple[int, ...], int]:
    """(spec, strides, bytes in the file) of a tensor."""
    _, dtype, bits, _ = _TYPES[code]
    spec = TensorSpec(DTYPES[dtype], shape)
    return spec, row_major(shape), -(-spec.numel * bits // 8)


def _stored(code: int, shape: tuple[int, ...], span: Span) -> LazyTensor:
    """A tensor whose bytes lie in `span`, little-endian; packed where its elements are less than a byte."""
    (packing, _, bits, _), (spec, strides, _) = _TYPES[code], _form(code, shape)
    if bits >= 8:
        return LazyTensor(spec, Stored(span, 0, strides))
    narrow = 3 if bits == 6 else 1
    wide = narrow * 8 // bits * spec.dtype.itemsize
    storage = Packed(span, spec.nbytes, packing, narrow, wide, f"{__name__}:unpacked_bits", (code,))
    return LazyTensor(spec, Stored(storage, 0, strides))


# decoders


def unpacked_bits(stored: bytes, code: int) -> Any:
    """Elements of 2, 4 or 6 bits, lowest bits first."""
    import numpy as np

    width = _TYPES[code][2]
    bits = np.unpackbits(np.frombuffer(stored, np.uint8), bitorder="little")
    return _widened(code)[bits[: len(bits) // width * width].reshape(-1, width) @ (1 << np.arange(width, dtype=np.uint8))].data


def _widened(code: int) -> Any:
    """What each bit pattern of a type of less than a byte stands for."""
    import numpy as np

    _, dtype, width, _ = _TYPES[code]
    half = 1 << width - 1
    if code not in _MANTISSA:
        return np.array([n - 2 * half if n >= half and dtype == "int8" else n for n in range(2 * half)], dtype)
    one = 1 << _MANTISSA[code]  # of the mantissa; the exponent's bias is half its range
    sizes = [math.ldexp(n % one + (one if n >= one else 0), max(n // one, 1) - half // one // 2 + 1) / one for n in range(half)]
    return np.array([*sizes, *(-size for size in sizes)], "<f4")


def typed_values(stored: bytes, code: int, field: int) -> Any:
    """The numbers that field `field` of one message holds, packed or not, in as many runs as there are."""
    import numpy as np

    wire = Wire(Window(lambda at, count: stored[at : at + count], len(stored)))
    own = (5 if _TYPES[code][3] == 4 else 1) if code in _FIXED else VARINT
    items = wire.message((0, len(stored)), {field: ("values", own, True)}).get("values", [])
    if code in _FIXED:
        return b"".join(stored[start:stop] for start, stop in items)
    runs: list[Any] = [np.empty(0, np.uint64)]
    for kind, group in groupby(items, type):
        if kind is int:
            runs.append(np.array([*group], np.uint64))
        else:
            runs += _varints(np.frombuffer(b"".join(stored[start:stop] for start, stop in group), np.uint8))
    values = np.concatenate(runs)
    bits = _TYPES[code][2]
    if bits == 6:
        return _widened(code)[values & np.uint64(63)].data
    low = values.astype(f"<u{max(1, bits // 8)}")
    return unpacked_bits(low.tobytes(), code) if bits < 8 else (low != 0 if code == _BOOL else low).data


def _varints(raw: Any) -> Iterator[Any]:
    """The numbers of one run, a megabyte at a time."""
    import numpy as np

    while len(raw):
        ends = np.flatnonzero(raw[: 1 << 20] < 0x80) + 1
        lengths = np.diff(ends, prepend=0)
        if not len(ends) or lengths.max() > 10:
            raise CorruptFileError("a packed number does not end")
        values = np.zeros(len(ends), np.uint64)
        for step in range(lengths.max()):
            longer = lengths > step
            values[longer] |= (raw[(ends - lengths)[longer] + step] & 0x7F).astype(np.uint64) << np.uint64(7 * step)
        yield values
        raw = raw[ends[-1] :]
