"""The ONNX file itself: read back what an exporter wrote, repair it, and check it.

The graph is read without its external data, so a file of any size costs only its graph. Layout: one protobuf `ModelProto`
(onnx.proto, IR version 10), with tensors past the size limit in a file beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbench.files import atomic_write


@dataclass(frozen=True)
class Graph:
    """What a file says of itself: opset of the default domain, and the shapes of inputs and outputs by name."""

    opset: int | None
    inputs: dict[str, tuple[int | str, ...]]
    outputs: dict[str, tuple[int | str, ...]]
    weights: tuple[str, ...]


def read_graph(path: Path) -> Graph:
    """Opset, inputs, outputs and names of weights, as they stand in the file. Weights listed among the inputs are not inputs."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    weights = {tensor.name for tensor in model.graph.initializer}
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), None)
    inputs = {value.name: _shape(value) for value in model.graph.input if value.name not in weights}
    return Graph(opset, inputs, {value.name: _shape(value) for value in model.graph.output}, tuple(sorted(weights)))


def clashes(path: Path) -> list[str]:
    """Names that an input or another value shares with a weight: the graph would read one for the other."""
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer}
    made = {value.name for value in graph.input} | {name for node in graph.node for name in node.output}
    return sorted(weights & made)


def strip_weight_shapes(path: Path) -> int:
    """Remove `value_info` entries named like weights, in place; returns how many.

    The dynamo exporter writes them, and ONNX Runtime's quantizer then fails on "inferred shape and existing shape differ", for it
    transposes the weight and believes the old entry.
    """
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    weights = {tensor.name for tensor in model.graph.initializer}
    kept = [value for value in model.graph.value_info if value.name not in weights]
    removed = len(model.graph.value_info) - len(kept)
    if removed:
        del model.graph.value_info[:]
        model.graph.value_info.extend(kept)
        _rewrite(path, model)
    return removed


def weights_to_inputs(path: Path) -> int:
    """Turn every weight into a graph input of the same name, so that the file holds the computation alone; returns how many."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    moved = [onnx.helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in model.graph.initializer]
    listed = {value.name for value in model.graph.input}
    model.graph.input.extend(value for value in moved if value.name not in listed)
    del model.graph.initializer[:]
    _rewrite(path, model)
    return len(moved)


def check_file(path: Path) -> str:
    """ONNX's own checker over the file, its external data included; returns what it objects to, or ""."""
    import onnx

    try:
        onnx.checker.check_model(str(path))
    except (onnx.checker.ValidationError, ValueError) as error:
        return str(error)
    return ""


def _rewrite(path: Path, model: Any) -> None:
    with atomic_write(path) as out:
        out.write(model.SerializeToString(), 0)


def _shape(value: Any) -> tuple[int | str, ...]:
    if not value.type.HasField("tensor_type"):
        return ()
    return tuple(d.dim_param or d.dim_value if d.WhichOneof("value") else "?" for d in value.type.tensor_type.shape.dim)
