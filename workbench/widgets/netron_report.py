"""What the Netron view sends and says: a file without its weights, and a summary of its graph in plain tables.

An ONNX file is copied field by field in its wire format: what a tensor holds beyond a kilobyte, and where its external data would
lie, is left out; names, shapes and types stay. Peak memory is what is sent, whatever the size of the file; external data is never
looked at. Every other format is sent as it is or not at all. The message is known to be whole: `wb.open` has walked it before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from workbench.checkpoint import Checkpoint
from workbench.errors import UnsupportedError, visible
from workbench.files import FileRef, Span
from workbench.formats.protobuf_wire import BYTES, Wire
from workbench.formats.window import Window
from workbench.report import Report
from workbench.tables import DASH, Column, Table, format_bytes, table

MAX_SHOWN = 8_000_000  # bytes that cross to the page and are laid out there
_KEPT = 1024  # bytes of a tensor's values that stay, so that shapes, axes and scales can be read
_MAX_DEPTH = 100  # messages in messages, as protobuf's own readers
_SHOWN_NODES = 8  # at either end

# which fields of a message are messages that can hold a tensor; numbers as in formats/onnx_file.py
_CHILDREN: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {},
}
_VALUES = frozenset({4, 5, 6, 7, 9, 10, 11})  # of a TensorProto, typed and raw
_EXTERNAL_DATA, _DATA_LOCATION = 13, 14


@dataclass(frozen=True)
class Shown:
    """What is sent to Netron. `data` is empty where nothing can be, and `note` says why, or what was left out."""

    data: bytes
    note: str


def shown_of(ckpt: Checkpoint, file: FileRef) -> Shown:
    """The bytes that Netron is given: an ONNX graph without its weights, any other file whole where it is small."""
    if ckpt.format == "onnx":
        with file.open() as source:
            strip = _Strip(Wire(Window(source.pread, file.size)))
            try:
                data = strip.message(0, file.size, "model", 0)
            except UnsupportedError as error:
                return Shown(b"", f"Netron is not shown this file: {error.message}.")
        return Shown(data, strip.told(len(data), file.size))
    if file.size > MAX_SHOWN:
        size, most = format_bytes(file.size), format_bytes(MAX_SHOWN)
        return Shown(
            b"",
            f"Netron is not shown this file: it has {size}, and only an ONNX file of more than {most} can be shown without its weights.",
        )
    return Shown(Span(file, 0, file.size).read(), "")


class _Strip:
    """One copy of a model; `tensors` counts those whose values were left out, `external` those that lie in other files."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.room = MAX_SHOWN
        self.tensors = self.external = 0

    def told(self, sent: int, size: int) -> str:
        """What was left out, in a sentence or two."""
        if not self.tensors:
            return ""
        text = f"Shown without the values of {_many(self.tensors, 'tensor')}: {format_bytes(sent)} of {format_bytes(size)} are sent. "
        text += "Names, shapes and types are whole."
        return text + (f" {_many(self.external, 'tensor')} of them in other files, which a download leaves out." if self.external else "")

    def message(self, at: int, end: int, kind: str, depth: int) -> bytes:
        """The message between `at` and `end` without large values."""
        if depth > _MAX_DEPTH:
            raise UnsupportedError("its graphs lie too deep in each other")
        parts: list[bytes] = []
        left_out = self._left_out(at, end) if kind == "tensor" else frozenset()
        while at < end:
            key, start, stop, _ = self.wire.field(at, end)
            child = _CHILDREN[kind].get(key >> 3)
            if child is not None and key & 7 == BYTES:
                inner = self.message(start, stop, child, depth + 1)
                parts += (varint(key), varint(len(inner)), inner)
            elif key >> 3 not in left_out:
                self.room -= stop - at
                if self.room < 0:
                    raise UnsupportedError(f"more than {format_bytes(MAX_SHOWN)} are left without its weights")
                parts.append(self.wire.window.take(at, stop - at))
            at = stop
        return b"".join(parts)

    def _left_out(self, at: int, end: int) -> frozenset[int]:
        """The numbers of a tensor's fields that are not copied."""
        nbytes = external = 0
        while at < end:
            key, start, stop, _ = self.wire.field(at, end)
            nbytes += stop - start if key >> 3 in _VALUES else 0
            external += key >> 3 == _EXTERNAL_DATA
            at = stop
        gone = (_VALUES if nbytes > _KEPT else frozenset()) | ({_EXTERNAL_DATA, _DATA_LOCATION} if external else frozenset())
        self.tensors += bool(gone)
        self.external += external > 0
        return gone


def varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


@dataclass(frozen=True, repr=False)
class GraphReport(Report):
    """A model's graph in tables: inputs and outputs, operators with their counts, the first and the last nodes; or the tensors of a
    file that has no graph."""

    text: str
    nodes: int
    sections: tuple[Table, ...]

    @property
    def headline(self) -> str:
        return self.text

    def tables(self) -> tuple[Table, ...]:
        return self.sections


def summarize(ckpt: Checkpoint, shown: Shown) -> GraphReport:
    """What can be said of the file without Netron: its graph where it is ONNX, else its tensors."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    if ckpt.format == "onnx" and shown.data:
        with suppress(DecodeError):
            return _graph_report(ckpt, shown.data)
    rows = [(name, t.shape, str(t.dtype), t.nbytes) for name, t in ckpt.items()]
    columns = (Column("tensor", "name"), Column("shape", "shape"), Column("dtype"), Column("size", "bytes"))
    why = "its graph cannot be read here" if ckpt.format == "onnx" else "it has no graph that can be read without running it"
    text = f"{len(ckpt):,} tensors of {format_bytes(sum(t.nbytes for t in ckpt.values()))}; {why}"
    return GraphReport(text, 0, (table("tensors", columns, rows, empty="it holds no tensor"),))


def _graph_report(ckpt: Checkpoint, data: bytes) -> GraphReport:
    import onnx

    model = onnx.load_model_from_string(data)
    graph = model.graph
    weights = {tensor.name for tensor in graph.initializer} | {sparse.values.name for sparse in graph.sparse_initializer}
    ends = [("input", value) for value in graph.input if value.name not in weights] + [("output", value) for value in graph.output]
    counts = Counter((_text(node.op_type), _text(node.domain) or "ai.onnx") for node in _nodes(model))
    total = sum(counts.values())
    opsets = ", ".join(f"{visible(_text(entry.domain))} {entry.version}".strip() for entry in model.opset_import)
    inputs = len(ends) - len(graph.output)
    text = f"{_many(total, 'node')} of {_many(len(counts), 'operator')}, {_many(inputs, 'input')} and {_many(len(ends) - inputs, 'output')}"
    text += f"; opset {opsets}; {_many(len(ckpt), 'tensor')} of {format_bytes(sum(t.nbytes for t in ckpt.values()))}"
    ends_at = len(graph.node) if len(graph.node) <= 3 * _SHOWN_NODES else _SHOWN_NODES
    first, last = list(graph.node[:ends_at]), list(graph.node[ends_at:][-_SHOWN_NODES:])
    between = len(graph.node) - len(first) - len(last)
    rows = [_node_row(node) for node in first]
    rows += [("…", f"{between:,} more", "", "")] if between else []
    rows += [_node_row(node) for node in last]
    end_columns = (Column("name", "name"), Column("end"), Column("type"), Column("shape", "shape"))
    node_columns = (Column("node", "name"), Column("operator", "name"), Column("from"), Column("to"))
    return GraphReport(
        text,
        total,
        (
            table("inputs and outputs", end_columns, [(_text(value.name), role, *_type(value)) for role, value in ends]),
            table("operators", (Column("operator", "name"), Column("domain"), Column("nodes", "count")), _ranked(counts)),
            table("first and last nodes" if between else "nodes", node_columns, rows, empty="the graph has no node"),
        ),
    )


def _nodes(model: Any) -> Iterator[Any]:
    """Every node of the graph, of the graphs in its attributes, and of its functions."""
    pending: list[Any] = [model.graph, *model.functions]
    while pending:
        for node in pending.pop().node:
            yield node
            for attribute in node.attribute:
                pending += [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _ranked(counts: Counter[tuple[str, str]]) -> list[tuple[str, str, int]]:
    return [(*operator, count) for operator, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))]


def _node_row(node: Any) -> tuple[str, str, str, str]:
    return _text(node.name) or DASH, _text(node.op_type), _listed(node.input), _listed(node.output)


def _text(value: str | bytes) -> str:
    """A text of the model; what is no UTF-8 comes from protobuf as bytes."""
    return value if isinstance(value, str) else value.decode("utf-8", "backslashreplace")


def _listed(names: Sequence[str | bytes]) -> str:
    return ", ".join(map(_text, names[:_SHOWN_NODES])) + (f", … {len(names) - _SHOWN_NODES:,} more" if len(names) > _SHOWN_NODES else "")


def _type(value: Any) -> tuple[str | None, tuple[Any, ...] | None]:
    import onnx

    kind = value.type.WhichOneof("value")
    if kind != "tensor_type":
        return kind, None
    tensor = value.type.tensor_type
    names = {number: name.lower() for name, number in onnx.TensorProto.DataType.items()}
    shape = tuple(visible(_text(d.dim_param)) or "?" if not d.HasField("dim_value") else d.dim_value for d in tensor.shape.dim)
    return names.get(tensor.elem_type, str(tensor.elem_type)), shape if tensor.HasField("shape") else None
