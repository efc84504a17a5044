"""The ONNX file itself: read back what an exporter wrote, repair it, and check it.

The graph is read without its external data, so a file of any size costs only its graph. Layout: one protobuf `ModelProto`
(onnx.proto, IR version 10), with tensors past the size limit in a file beside it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.exporting.proving import write

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Graph:
    """What a file says of itself.

    Attributes:
        opset: of the default domain. inputs, outputs: shapes by name. weights: their names. floats: of these, those of floating values.
        beside: files that hold weights of it.
        foldable: how many nodes compute from weights and constants alone.
    """

    opset: int | None
    inputs: dict[str, tuple[int | str, ...]]
    outputs: dict[str, tuple[int | str, ...]]
    weights: tuple[str, ...]
    floats: tuple[str, ...]
    beside: tuple[str, ...]
    foldable: int


def read_graph(path: Path) -> Graph:
    """The graph as it stands in the file. Weights listed among the inputs are not inputs."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    weights = {tensor.name for tensor in model.graph.initializer}
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), None)
    inputs = {value.name: _shape(value) for value in model.graph.input if value.name not in weights}
    outputs = {value.name: _shape(value) for value in model.graph.output}
    beside = {entry.value for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"}
    known, foldable = set(weights), 0
    for node in model.graph.node:
        fixed = node.op_type == "Constant" or (bool(node.input) and known.issuperset(filter(None, node.input)))
        foldable += fixed and node.op_type != "Constant"
        known.update(node.output if fixed else ())
    floats = sorted(
        t.name for t in model.graph.initializer if t.dims and onnx.helper.tensor_dtype_to_np_dtype(t.data_type).kind not in "iub"
    )
    return Graph(opset, inputs, outputs, tuple(sorted(weights)), tuple(floats), tuple(sorted(beside)), foldable)


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
        write(path, model.SerializeToString())
    return removed


def add_unused_inputs(path: Path, declared: Mapping[str, tuple[torch.dtype, tuple[int | str, ...]]]) -> list[str]:
    """Declare, in place and in that order, the inputs that the classic exporter left out because nothing reads them; returns their names."""
    import onnx
    from torch.onnx import JitScalarType  # type: ignore[attr-defined]

    model = onnx.load(str(path), load_external_data=False)
    there = {value.name: value for value in model.graph.input}
    added = [name for name in declared if name not in there]
    if added:
        kinds = {name: JitScalarType.from_dtype(dtype).onnx_type().value for name, (dtype, _) in declared.items()}
        made = {name: onnx.helper.make_tensor_value_info(name, kinds[name], declared[name][1]) for name in added}
        rest = [value for name, value in there.items() if name not in declared]
        del model.graph.input[:]
        model.graph.input.extend([*(there.get(name) or made[name] for name in declared), *rest])
        write(path, model.SerializeToString())
    return added


def weights_to_inputs(path: Path, names: Collection[str]) -> int:
    """Turn every weight of those names into a graph input of the same name, so that the file holds the computation alone; returns how many.

    Constants stay: nobody could know what to feed them.
    """
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    weights = [tensor for tensor in model.graph.initializer if tensor.name in names]
    constants = [tensor for tensor in model.graph.initializer if tensor.name not in names]
    listed = {value.name for value in model.graph.input}
    moved = [onnx.helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in weights]
    model.graph.input.extend(value for value in moved if value.name not in listed)
    del model.graph.initializer[:]
    kept = onnx.ModelProto(graph=onnx.GraphProto(initializer=constants))
    onnx.external_data_helper.load_external_data_for_model(kept, str(path.parent))  # what stays must not name a file that goes
    model.graph.initializer.extend(kept.graph.initializer)
    write(path, model.SerializeToString())
    return len(weights)


def check_file(path: Path) -> str:
    """ONNX's own checker over the file, its external data included; returns what it objects to, or ""."""
    import onnx

    try:
        onnx.checker.check_model(str(path))
    except (onnx.checker.ValidationError, ValueError) as error:
        return str(error)
    return ""


def _shape(value: Any) -> tuple[int | str, ...]:
    if not value.type.HasField("tensor_type"):
        return ()
    return tuple(d.dim_param or d.dim_value if d.WhichOneof("value") else "?" for d in value.type.tensor_type.shape.dim)
