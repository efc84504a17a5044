"""Engines for an ONNX graph: ONNX Runtime's dynamic, static and 4-bit quantization, with the ways repaired in which they are known to fail.

They transpose a weight in place once for each node that shares it, believe old shapes of what they transpose, pass over Gemm in 4 bits, and
write signed 8-bit weights, whose products overflow in 16 bits on a processor without VNNI: there the answers go wrong by ten times
the error of 8 bits. The form of standalone quantized operators (QOperator) is not offered, for it runs 10 to 60 times slower than QDQ.

Source: onnxruntime 1.31, `onnxruntime.quantization`; the products of vpmaddubsw saturate, Intel SDM volume 2.
"""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from workbench.errors import SelectionError, UnsupportedError, WorkbenchError
from workbench.models.quantization_report import Made, Modules, Part, chooser
from workbench.models.torch_quantization import quiet, unlogged
from workbench.names import Patterns
from workbench.stream import Meter
from workbench.verification.runners import fed_names, onnx_session, to_numpy
from workbench.verification.values import Call
from workbench.verification.weighing import disk_nbytes

_LARGEST = 1_500_000_000  # a graph in one piece ends at 2 GiB, and the engines need room beside the weights
_KINDS: dict[str, tuple[type, ...]] = {
    "MatMul": (nn.Linear,), "Gemm": (nn.Linear,), "Conv": (nn.Conv1d, nn.Conv2d, nn.Conv3d), "Gather": (nn.Embedding,),
    "ConvTranspose": (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), "LSTM": (nn.LSTM,), "GRU": (nn.GRU,), "RNN": (nn.RNN,),
}  # fmt: skip
_TAKEN = {
    "onnx_dynamic": {"MatMul", "Gemm", "Conv", "Gather", "LSTM"},
    "onnx_static": {"MatMul", "Gemm", "Conv", "ConvTranspose", "Gather"},
    "onnx_4bit": {"MatMul", "Gemm"},
}
_UNSIGNED = "Weights are stored as unsigned 8-bit codes: products of signed ones overflow on a processor without VNNI."
_FLOATS = {1: "fp32", 10: "fp16", 11: "fp64", 16: "bf16"}  # onnx.TensorProto.DataType
_PASSING = ["Relu", "Clip", "MaxPool", "AveragePool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze"]


@dataclass(frozen=True)
class Task:
    """What an engine is asked: of the graph in `base`, the nodes named `chosen` into `out`. `made` gathers what is to be told."""

    base: Path
    out: Path
    bits: int
    per_channel: bool
    group_size: int
    calls: Sequence[Call]
    meter: Meter
    made: Made
    chosen: dict[str, str] = field(default_factory=dict)  # node: operator
    others: list[str] = field(default_factory=list)  # nodes of the same operators that are not chosen

    @property
    def kinds(self) -> list[str]:
        return sorted(set(self.chosen.values()))


def quantize_graph(source: Path, method: str, task: Task, modules: Modules, exclude: Patterns | None) -> Made:
    """Write `task.out`, the quantized graph of `source`, which is left as it was; where nothing is chosen, nothing is written.

    Raises:
        SelectionError: a chosen weight holds NaN or infinity, a glob selects nothing, or the data does not fit the graph.
        UnsupportedError: a graph past 1.5 GB, or one that the engine cannot quantize; in the engine's own words.
    """
    import onnx

    made = task.made
    if (disk_nbytes(None, source) or 0) > _LARGEST:
        told = "ONNX Runtime's quantizers take a graph of at most 1.5 GB in one piece"
        raise UnsupportedError(told, path=str(source), hint="wb.ops.quantize shrinks a checkpoint of any size")
    model = onnx.load(str(source))
    _prepare(model.graph, made, rewrite=method != "onnx_static")
    nodes = _named(_weighty(model.graph))
    sizes = Counter[int]()
    for _, weight in nodes.values():
        sizes[weight.data_type] += math.prod(weight.dims)
    made.source_dtype = _FLOATS[sizes.most_common(1)[0][0]] if sizes else "fp32"
    why_not = chooser(modules, exclude, nodes)
    reasons = {name: why_not(name, _KINDS[node.op_type]) or _untaken(node, weight, method) for name, (node, weight) in nodes.items()}
    for node, weight in (held for name, held in nodes.items() if not reasons[name]):
        if not np.isfinite(_array(weight)).all():
            told = f"{weight.name} holds NaN or infinity, and one such value makes its codes worthless"
            raise SelectionError(told, hint="exclude= leaves it as it is")
        task.chosen[node.name] = node.op_type
    task.others.extend(n.name for n in model.graph.node if n.op_type in task.kinds and n.name not in task.chosen)
    held = set()
    if task.chosen:
        onnx.save(model, str(task.base))
        _run(_ENGINES[method], task)
        onnx_session(task.out, None)  # what does not load is refused here
        held = {(node.name, name) for node in onnx.load(str(task.out)).graph.node for name in node.input}
    inputs = {"onnx_dynamic": ", inputs 8-bit as they come", "onnx_static": ", inputs 8-bit, calibrated"}
    how = f"{task.bits} bits" + inputs.get(method, f", {task.group_size} values share a scale")
    for name, (node, weight) in nodes.items():
        changed = node.name in task.chosen and (node.name, weight.name) not in held
        told = how if changed else reasons[name] or "the engine passed over it"
        (made.quantized if changed else made.left).append(Part(name, node.op_type, math.prod(weight.dims), told))
    return made


def _prepare(graph: Any, made: Made, *, rewrite: bool) -> None:
    """Repair the graph, in place, where the engines are known to fail on it."""
    lifted = [n for n in graph.node if n.op_type == "Constant" and n.attribute[0].name == "value" and len(n.attribute[0].t.dims) > 1]
    for node in lifted:
        node.attribute[0].t.name = node.output[0]
        graph.initializer.append(node.attribute[0].t)
        graph.node.remove(node)
    if lifted:
        made.repairs.append(
            f"{len(lifted)} weights stood in Constant nodes, which the engine passes over; they are weights of the graph now."
        )
    weights = {tensor.name: tensor for tensor in graph.initializer}
    known = len(graph.value_info)
    _refill(graph.value_info, [value for value in graph.value_info if value.name not in weights])
    if stale := known - len(graph.value_info):
        made.repairs.append(
            f"The shapes of {stale} weights were told apart from them; the engine believes that once it has transposed: dropped."
        )
    times = Counter(node.name for node in graph.node)
    for number, node in enumerate(graph.node):
        node.name = node.name if node.name and times[node.name] == 1 else f"{node.name or node.op_type}#{number}"
    gemms = [node for node in graph.node if rewrite and node.op_type == "Gemm" and _plain_gemm(node, weights)]
    if not gemms:
        return
    names = {node.name for node in gemms}
    shared = sorted(name for name, count in Counter(node.input[1] for node in gemms).items() if count > 1)
    _refill(graph.node, [new for node in graph.node for new in (_as_matmul(graph, node, weights) if node.name in names else [node])])
    used = {*_reads(graph), *(value.name for value in graph.output)}
    _refill(graph.initializer, [tensor for tensor in graph.initializer if tensor.name in used])
    made.repairs.append(
        f"{len(gemms)} Gemm nodes were written as MatMul and Add: 4 bits are for MatMul alone, and 8 bits transpose in place."
    )
    if shared:
        told = "shared by several Gemm nodes: the engine transposes it once for each, and so corrupts it; transposed once"
        made.repairs.append(f"{', '.join(shared)}: {told}.")


def _refill(repeated: Any, kept: list[Any]) -> None:
    held = [copy.deepcopy(item) for item in kept]  # emptying the field ends what was in it
    del repeated[:]
    repeated.extend(held)


def _reads(graph: Any) -> Iterator[str]:
    """What the nodes read, those in the branches and loops of a node too."""
    for node in graph.node:
        yield from node.input
        for entry in node.attribute:
            for inner in (entry.g, *entry.graphs):
                yield from _reads(inner)


def _plain_gemm(node: Any, weights: dict[str, Any]) -> bool:
    known = {entry.name: entry.f if entry.type == 1 else entry.i for entry in node.attribute}
    return node.input[1] in weights and not known.get("transA") and known.get("alpha", 1) == 1 and known.get("beta", 1) == 1


def _as_matmul(graph: Any, node: Any, weights: dict[str, Any]) -> list[Any]:
    """Gemm(x, W, b) as Add(MatMul(x, W or Wᵀ), b); Wᵀ is made once, however many share it."""
    import onnx

    weight = node.input[1]
    if any(entry.name == "transB" and entry.i for entry in node.attribute):
        weight = f"{weight}.T"
        if weight not in weights:
            weights[weight] = onnx.numpy_helper.from_array(np.ascontiguousarray(_array(weights[node.input[1]]).T), weight)
            graph.initializer.append(weights[weight])
    bias = node.input[2] if len(node.input) > 2 else ""
    product = f"{node.output[0]}_product" if bias else node.output[0]
    made = onnx.helper.make_node("MatMul", [node.input[0], weight], [product], name=node.name)
    made.metadata_props.extend(node.metadata_props)
    return [made, onnx.helper.make_node("Add", [product, bias], node.output, name=f"{node.name}_bias")] if bias else [made]


def _weighty(graph: Any) -> Iterator[tuple[Any, Any]]:
    """(node, its weight) of every node that multiplies by, or looks up in, a floating weight of the graph."""
    weights = {t.name: t for t in graph.initializer if len(t.dims) > 1 and t.data_type in _FLOATS}
    for node in graph.node:
        held = [weights[name] for name in node.input if name in weights] if node.op_type in _KINDS else []
        if held:
            yield node, max(held, key=lambda t: math.prod(t.dims))


def _named(nodes: Iterator[tuple[Any, Any]]) -> dict[str, tuple[Any, Any]]:
    """By the module that the exporter made the node of, or the weight's name, or the node's; a second of one name gets its node's beside it."""
    found: dict[str, tuple[Any, Any]] = {}
    for node, weight in nodes:
        scopes = [re.findall(r"'([^']*)'", entry.value) for entry in node.metadata_props if entry.key.endswith("name_scopes")]
        plain = weight.name.removesuffix(".T")
        if node.name.startswith("/"):  # the classic exporter's
            name = node.name.strip("/").rpartition("/")[0].replace("/", ".") or node.name
        elif plain.endswith(".weight"):
            name = plain.removesuffix(".weight")
        else:
            name = (scopes[0][-2] if scopes and len(scopes[0]) > 1 else "") or node.name
        found[f"{name} ({node.name})" if name in found else name] = (node, weight)
    return found


def _untaken(node: Any, weight: Any, method: str) -> str:
    if node.op_type not in _TAKEN[method]:
        if node.op_type in ("GRU", "RNN"):
            return f"ONNX Runtime quantizes no {node.op_type}"
        return "4 bits are for MatMul alone" if method == "onnx_4bit" else f"{method} takes no {node.op_type}"
    if weight.data_type != 1:
        return "its weights are not float32, which the engine takes"
    if node.op_type == "Gemm" and method != "onnx_static":
        return "a Gemm that scales or transposes its input has no MatMul in its place"
    second = len(node.input) > 1 and node.input[1] == weight.name
    if node.op_type == "MatMul" and not second:
        return "its weight stands on the left"
    return "4 bits are for matrices" if method == "onnx_4bit" and len(weight.dims) > 2 else ""


def _array(tensor: Any) -> Any:
    import onnx

    return onnx.numpy_helper.to_array(tensor)


def _run(engine: Callable[[Task], None], task: Task) -> None:
    """What the engine raises is told in its own words. What a caller's progress function prints is left to pass."""
    try:
        with unlogged(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            engine(task)
    except WorkbenchError:
        raise
    except Exception as error:  # the engines raise whatever a graph drives them to
        told = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise UnsupportedError(f"ONNX Runtime cannot quantize this graph: {type(error).__name__}: {told}") from error


def _dynamic(task: Task) -> None:
    with quiet(task.made):
        from onnxruntime.quantization import QuantType, quantize_dynamic

    lstm = [name for name, kind in task.chosen.items() if kind == "LSTM"]
    rest = [name for name in task.chosen if name not in lstm]
    if lstm:  # its kernel knows signed weights alone, and 7 bits of them cannot overflow
        goal = task.base if rest else task.out
        quantize_dynamic(task.base, goal, ["LSTM"], task.per_channel, reduce_range=True, nodes_to_quantize=lstm)
        task.made.repairs.append("An LSTM's signed 8-bit products overflow on a processor without VNNI; its weights keep 7 bits.")
    if rest:
        quantize_dynamic(task.base, task.out, task.kinds, task.per_channel, weight_type=QuantType.QUInt8, nodes_to_quantize=rest)
        task.made.repairs.append(_UNSIGNED)
    if "Conv" in task.kinds:
        task.made.notes.append("A convolution runs as ConvInteger here, slower than in floats: onnx_static is the method for convolutions.")


def _static(task: Task) -> None:
    with quiet(task.made):
        from onnxruntime.quantization import QuantType, quantize_static
    inputs = [node.name for node in onnx_session(task.base, None).get_inputs()]

    def feeds() -> Iterator[dict[str, Any]]:
        for call in task.calls:
            yield {name: to_numpy(t, name) for name, t in zip(fed_names(call, inputs), call.tensors().values(), strict=True)}
            task.meter.advance(1)

    class Batches:
        def __init__(self) -> None:
            self._feeds = feeds()

        def get_next(self) -> dict[str, Any] | None:
            return next(self._feeds, None)

    quantize_static(
        task.base, task.out, Batches(), op_types_to_quantize=[*task.kinds, *_PASSING], per_channel=task.per_channel,
        nodes_to_exclude=task.others, activation_type=QuantType.QUInt8, weight_type=QuantType.QUInt8,
    )  # fmt: skip
    task.made.repairs.append(_UNSIGNED)
    task.made.notes.append(f"Ranges of activations are those of {len(task.calls)} batches; values beyond them are clipped.")
    if "MatMul" in task.kinds:
        task.made.notes.append("Products of two activations, as in attention, stay in floats: in 8 bits they lose most and shrink nothing.")


def _nbits(task: Task) -> None:
    import onnx

    with quiet(task.made):
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
    model = onnx.load(str(task.base))
    engine = MatMulNBitsQuantizer(model, task.bits, task.group_size, is_symmetric=True, nodes_to_exclude=task.others)
    engine.process()
    graph = engine.model.model.graph
    _refill(graph.initializer, [*{tensor.name: tensor for tensor in graph.initializer}.values()])  # one that two share is there twice
    engine.model.save_model_to_file(str(task.out), False)


_ENGINES = {"onnx_dynamic": _dynamic, "onnx_static": _static, "onnx_4bit": _nbits}
