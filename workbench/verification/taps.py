"""Taps: what every layer takes and gives, in a module by hooks and in an ONNX graph by extra outputs.

Owns the names of layers and the pairing of a graph's values with them. A layer is named as its module, later calls of one module
`act#2`; its further output tensors `lstm[1.0]`, its inputs `lstm<0`. The whole model is called by the name of its class.
The next way to tell a node's module is one more entry of `_WAYS`.

Source: torch 2.13 torch/onnx/_internal/exporter/_core.py (pkg.torch.onnx.name_scopes) and torch/onnx/utils.py (scopes in node names).
"""

from __future__ import annotations

import ast
import contextlib
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch

from workbench.errors import UnsupportedError
from workbench.verification.runners import OnnxRunner
from workbench.verification.values import Call, outputs_by_path

_KINDRED = {"Linear": ("Gemm", "MatMul"), "Embedding": ("Gather",)}  # where neither name begins like the other
Scopes = list[tuple[str, str]]  # of one node: (module, what tells its calls apart), outermost first


@dataclass(frozen=True)
class Tap:
    """One tensor that a layer takes or gives: the call and the name of the module, its class, and the tensor's shape and dtype."""

    layer: str
    module: str
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_input: bool
    is_leaf: bool


class TappedModule(torch.nn.Module):
    """A module that returns what the layers of another take and give: {key: copy on the CPU}, in the order in which they end.

    Hooks are there only while it runs. What is wanted and not met is not in the answer.

    Attributes:
        taps: all that the latest run met, by key. values: what a run that failed had reached.
    """

    def __init__(self, module: torch.nn.Module, wanted: Iterable[str], root: str) -> None:
        super().__init__()
        self.module, self._wanted, self._root = module, frozenset(wanted), root
        self.training = module.training
        self._met = SimpleNamespace(taps={}, values={})  # no dict of its own: `running` would put that back

    @property
    def taps(self) -> dict[str, Tap]:
        return cast("dict[str, Tap]", self._met.taps)

    @property
    def values(self) -> dict[str, torch.Tensor]:
        return cast("dict[str, torch.Tensor]", self._met.values)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        self.taps.clear()
        self.values.clear()
        calls: Counter[tuple[str, bool]] = Counter()
        with contextlib.ExitStack() as stack:
            for full, layer in self.module.named_modules():
                name = re.sub(r"@\d+", "", full)  # how torch.export calls the further calls of one module
                stack.callback(layer.register_forward_pre_hook(partial(self._take, name, calls), with_kwargs=True).remove)
                stack.callback(layer.register_forward_hook(partial(self._give, name, calls)).remove)
            self.module(*args, **kwargs)
        found = dict(self.values)
        self.values.clear()
        return found

    def _take(self, name: str, calls: Counter[tuple[str, bool]], module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        self._note(name, calls, module, Call(args, kwargs).tensors(), is_input=True)

    def _give(self, name: str, calls: Counter[tuple[str, bool]], module: torch.nn.Module, args: Any, output: Any) -> None:
        self._note(name, calls, module, Call((output,)).tensors(), is_input=False)

    def _note(self, name: str, calls: Any, module: torch.nn.Module, tensors: dict[str, torch.Tensor], *, is_input: bool) -> None:
        calls[name, is_input] += 1
        count = calls[name, is_input]
        layer = (name or self._root) + (f"#{count}" if count > 1 else "")
        for number, (path, tensor) in enumerate(tensors.items()):
            key = f"{layer}<{path}" if is_input else f"{layer}[{path.removeprefix('0.')}]" if number else layer
            plain = tensor.dequantize() if tensor.is_quantized else tensor
            if not plain.numel() or plain.is_meta or plain.layout is not torch.strided:
                continue
            leaf = next(module.children(), None) is None
            self.taps[key] = Tap(layer, name, type(module).__name__, tuple(plain.shape), plain.dtype, is_input, leaf)
            if key in self._wanted:
                self.values[key] = plain.detach().cpu().clone()  # a copy: layers that work in place would change it


class TappedGraph(OnnxRunner):
    """An `.onnx` file that also answers with values from inside its graph.

    Called, it runs as it would be deployed. `values` runs a copy of the graph, made in memory, with ONNX Runtime's graph optimizations
    off: fusion would compute a tapped value by another kernel, or not at all.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        import onnx

        self._folder = str(path.absolute().parent)
        self._model = onnx.load(str(path), load_external_data=False)
        if not self._model.graph.value_info:
            with contextlib.suppress(Exception):  # shapes only help the pairing: whatever inference raises, it goes on without them
                self._model = onnx.shape_inference.infer_shapes(self._model)
        graph = self._model.graph
        self.outputs = list(self._outputs)
        self._nodes = list(graph.node)
        self._producer = {value: number for number, node in enumerate(self._nodes) for value in node.output if value}
        self._types = {info.name: info.type.tensor_type for info in (*graph.value_info, *graph.output)}

    def values(self, call: Call, names: Collection[str]) -> dict[str, torch.Tensor]:
        """The values of these names, as plain tensors.

        Cost: a session of its own, and one run; external data is read from beside the file.
        """
        import onnx
        import onnxruntime

        graph = self._model.graph
        del graph.output[:]
        graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", self._folder)
        try:
            session = onnxruntime.InferenceSession(self._model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions share no base of their own
            raise UnsupportedError(f"ONNX Runtime cannot load the graph with taps: {error}", path=self.name) from error
        return outputs_by_path(dict(zip(names, session.run(None, self._feeds(call)), strict=True)), of=self.name)

    def pair(self, modules: Collection[str], taps: Mapping[str, Tap]) -> tuple[dict[str, str], str]:
        """Which value of the graph each layer gives, and how that was told.

        Args:
            modules: names of the reference's modules. taps: its outputs, in order, by key.
        Returns:
            {key: value}, without the layers that have no value of their own (fused, folded, or doing nothing); and the way in words.
        """
        for words, scopes_of in _WAYS:
            told = [scopes_of(node) for node in self._nodes]
            found = self._by_scope([dict(_resolved(scopes, modules)) for scopes in told if scopes is not None], taps, told)
            if found:
                return found, words
        return self._by_kind(taps), "by kind, shape and order, for the graph does not tell which module a node came from"

    def _by_scope(self, chains: list[dict[str, str]], taps: Mapping[str, Tap], told: list[Scopes | None]) -> dict[str, str]:
        """The last value of fitting shape in the scope of each call."""
        numbers = [number for number, scopes in enumerate(told) if scopes is not None]
        calls: dict[str, list[str]] = {}
        for key, tap in taps.items():
            calls.setdefault(tap.module, []).append(key)
        found = {}
        for module, keys in calls.items():
            inside = [(place, chain[module]) for place, chain in enumerate(chains) if module in chain]
            for key, places in zip(keys, _calls(inside, len(keys)), strict=False):
                values = (v for place in reversed(places) for v in reversed(self._nodes[numbers[place]].output))
                value = next((v for v in values if v and self._fits(v, taps[key])), None)
                if value is not None:
                    found[key] = value
        return found

    def _by_kind(self, taps: Mapping[str, Tap]) -> dict[str, str]:
        found, at = {}, 0
        for key, tap in taps.items():
            for number in range(at, len(self._nodes)) if tap.is_leaf else ():
                node, after = self._nodes[number], self._nodes[min(number + 1, len(self._nodes) - 1)]
                if _kindred(tap.kind, node.op_type) and self._fits(node.output[0], tap):
                    biased = node.op_type == "MatMul" and after.op_type == "Add" and node.output[0] in after.input
                    found[key], at = (after if biased else node).output[0], number + 1
                    break
        return found

    def _fits(self, value: str, tap: Tap) -> bool:
        """Whether a value may be the tensor, as far as the graph declares its type."""
        import onnx

        kind = self._types.get(value)
        if kind is None or not kind.HasField("shape"):
            return True
        floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE, onnx.TensorProto.BFLOAT16)
        dims = [d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim]
        same = len(dims) == len(tap.shape) and all(d in (None, n) for d, n in zip(dims, tap.shape, strict=True))
        return same and (kind.elem_type in floats) == tap.dtype.is_floating_point

    def between(self, value: str, stops: Collection[str]) -> tuple[set[str], tuple[str, ...]]:
        """The nearest of `stops` that a value is computed from, and the nodes from there to it, in order."""
        met, nodes, pending = set(), set(), [value]
        while pending:
            number = self._producer.get(pending.pop())
            if number is None or number in nodes:
                continue
            nodes.add(number)
            for name in self._nodes[number].input:
                if name in stops and name != value:
                    met.add(name)
                else:
                    pending.append(name)
        return met, tuple(f"{self._nodes[n].op_type} {self._nodes[n].name}" for n in sorted(nodes))


def _told_by_metadata(node: Any) -> Scopes | None:
    """(module, operation) by torch's metadata: `['', 'layers', 'layers.0', 'relu']`, the last of which is the operation."""
    text = next((entry.value for entry in node.metadata_props if entry.key == "pkg.torch.onnx.name_scopes"), "")
    try:
        scopes = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return [(str(scope), str(scopes[-1])) for scope in scopes[:-1]] if isinstance(scopes, list) else None


def _told_by_name(node: Any) -> Scopes | None:
    """(module, scope): `/layers/layers.0/act_1/Relu` lies in `layers`, `layers.0` and the second call of `layers.0.act`."""
    if not node.name.startswith("/"):
        return None
    parts = node.name.split("/")[1:-1]
    stack: list[str] = []
    found = []
    for depth, part in enumerate(parts, 1):
        if stack and part.startswith((stack[-1] + ".", _uncounted(stack[-1]) + ".")):  # containers repeat their own name
            stack.pop()
        stack.append(part)
        found.append((".".join(stack), "/".join(parts[:depth])))
    return found


_WAYS = (
    ("by the scopes that the exporter wrote beside each node", _told_by_metadata),
    ("by the names of the nodes, which hold the names of their modules", _told_by_name),
)


def _resolved(scopes: Scopes, modules: Collection[str]) -> Scopes:
    """Scopes under the reference's own names: without the number of a call, and without the names of a wrapper around the model."""
    found = []
    for name, mark in scopes:
        parts = name.split(".")
        tries = [".".join(parts[start:]) for start in range(len(parts))]
        module = next((t for each in tries for t in (each, _uncounted(each)) if t and t in modules), None)
        if module is not None:
            found.append((module, mark))
    return found


def _uncounted(name: str) -> str:
    return re.sub(r"_\d+(?=\.|$)", "", name)


def _calls(inside: list[tuple[int, str]], count: int) -> list[list[int]]:
    """Places of a module's nodes, (place, mark) in order, by call: where others lie between, else in equal shares of their marks."""
    if count == 1:
        return [[place for place, _ in inside]]
    runs: list[list[int]] = []
    for place, _ in inside:
        if runs and runs[-1][-1] == place - 1:
            runs[-1].append(place)
        else:
            runs.append([place])
    marks = list(dict.fromkeys(mark for _, mark in inside))
    if len(runs) == count or not marks or len(marks) % count:
        return runs if len(runs) == count else []
    share = len(marks) // count
    return [[place for place, mark in inside if marks.index(mark) // share == turn] for turn in range(count)]


def _kindred(kind: str, op_type: str) -> bool:
    return op_type in _KINDRED.get(kind, ()) or kind.lower()[:4] == op_type.lower()[:4]
