"""The ONNX target: torch's exporters, kept honest.

The dynamo exporter goes first. The classic one (tracing) steps in only where dynamo failed for another reason than a data-dependent
branch, which tracing would bake in silently, or did not write the opset asked for. What either wrote is repaired, read back,
checked, and compared with the model in ONNX Runtime before it takes its place. Exporting happens in a temporary folder beside the target.
"""

from __future__ import annotations

import copy
import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.errors import MissingDependencyError
from workbench.exporting.advice import Advice, advise, chain_text
from workbench.exporting.onnx_file import Graph, check_file, clashes, read_graph, strip_weight_shapes, weights_to_inputs
from workbench.exporting.proving import Export, Failed
from workbench.exporting.report import Exported
from workbench.exporting.wrappers import flat, input_names, output_names
from workbench.verification.runners import fed_names
from workbench.verification.values import Call

if TYPE_CHECKING:
    from workbench.exporting.targets import Request


_CLASSIC_NEWEST = 20  # the newest opset that torch's classic exporter knows


def export_onnx(request: Request, path: Path) -> Exported:
    """One ONNX file from a request."""
    _require_onnx()
    return _OnnxExport(request, path).carry_out()


class _OnnxExport(Export):
    target = "onnx"

    def run(self, made: Path) -> Exported:
        exporter = self._make(made)
        removed = strip_weight_shapes(made)
        if removed:
            self.notes.append(f"{removed} shape entries that repeat weights were removed, for ONNX Runtime's quantizer trips over them.")
        graph = read_graph(made)
        self.done = replace(self.done, exporter=exporter, opset=graph.opset, inputs=graph.inputs, outputs=graph.outputs)
        self._judge_graph(made, graph)
        if self.request.check:
            self._prove(made, graph, exporter)
        else:
            self.notes.append("The file was not checked and not compared with the model, as asked.")
        if not self.request.export_params:
            self._leave_out_weights(made)
        done = self.finish(made)
        beside = self.path.with_name(self.path.name + ".data")
        if beside.name not in done.files and beside.exists():
            self.notes.append(f"{beside.name} stands beside it from an earlier export and does not belong to this file.")
        return done

    def _make(self, made: Path) -> str:
        """Write the graph by the first exporter that can; returns its name."""
        asked = self.request.opset_version
        refusal: BaseException | None = None
        try:
            self.heard(lambda: _dynamo(self.request, made))
            wrote = read_graph(made).opset
            if asked is None or wrote == asked:
                return "dynamo"
            why = f"wrote opset {wrote} where {asked} was asked"
        except Exception as error:  # torch's exporters raise everything under the sun, and run a stranger's forward
            refusal = error
            if advise(error).tracing_hides_it:
                raise Failed(advise(error), chain_text(error)) from error
            why = f"failed ({advise(error).cause})"
        if not _classic_can(self.request):
            raise Failed(_without_classic(refusal, asked), chain_text(refusal) if refusal else "")
        try:
            _empty(made.parent)
            self.heard(lambda: _classic(self.request, made))
        except Exception as error:  # as above
            advice = advise(refusal or error)
            texts = [f"dynamo: {chain_text(refusal)}"] if refusal else []
            raise Failed(advice, "\n\n".join([*texts, f"classic: {chain_text(error)}"])) from error
        self.notes.append(f"The dynamo exporter {why}, so the classic exporter made the file, by tracing.")
        return "classic"

    def _judge_graph(self, made: Path, graph: Graph) -> None:
        request = self.request
        if request.opset_version is not None and graph.opset != request.opset_version:
            cure = "Leave `opset_version` out, or ask for 18 to 20."
            raise Failed(Advice(f"opset {request.opset_version} was asked and {graph.opset} was written", cure))
        shared = clashes(made)
        if shared:
            cure = "Choose `input_names` and `output_names` that no parameter has."
            raise Failed(Advice(f"the graph calls a value {shared[0]!r} by the name of a weight", cure))
        fixed = _fixed_axes(request, graph)
        if fixed:
            cure = "Name an input and an axis it has, and remove what pins that axis in the model's code."
            raise Failed(Advice(f"an axis asked to be dynamic is not dynamic in the file: {fixed}", cure))

    def _prove(self, made: Path, graph: Graph, exporter: str) -> None:
        objection = check_file(made)
        self.done = replace(self.done, checked=not objection)
        if objection:
            raise Failed(Advice("ONNX's own checker refuses the file", "Try another `opset_version`."), objection)
        any_size = any(isinstance(size, str) for shape in graph.inputs.values() for size in shape)
        self.prove(made, _other_sizes(graph, self.request.example), traced=exporter == "classic", any_size=any_size)

    def _leave_out_weights(self, made: Path) -> None:
        count = weights_to_inputs(made)
        for other in made.parent.iterdir():
            if other != made:
                other.unlink()
        self.notes.append(f"{count} weights were left out, as asked: they are inputs of the graph under their own names.")
        self.done = replace(self.done, inputs=read_graph(made).inputs)
        objection = check_file(made) if self.request.check else ""
        if objection:
            raise Failed(Advice("ONNX's own checker refuses the file without its weights", "Leave the weights in."), objection)


def _dynamo(request: Request, made: Path) -> None:
    import torch

    example = request.example.fresh()
    torch.onnx.export(
        request.model, example.args, str(made), kwargs=dict(example.kwargs) or None, dynamo=True,
        input_names=request.input_names, output_names=output_names(request), dynamic_axes=copy.deepcopy(request.dynamic_axes),
        dynamic_shapes=request.dynamic_shapes, opset_version=request.opset_version, export_params=True,
        do_constant_folding=request.do_constant_folding, verbose=request.verbose, external_data=request.external_data,
        custom_translation_table=dict(request.custom_translation_table) if request.custom_translation_table else None,
    )  # fmt: skip


def _classic(request: Request, made: Path) -> None:
    """By tracing, through a wrapper that takes the tensors in order and returns a flat tuple."""
    import torch

    torch.onnx.export(
        flat(request.model, request.example), tuple(request.example.fresh().tensors().values()), str(made), dynamo=False,
        input_names=input_names(request), output_names=output_names(request), dynamic_axes=copy.deepcopy(request.dynamic_axes),
        opset_version=request.opset_version, export_params=True, do_constant_folding=request.do_constant_folding, verbose=request.verbose,
    )  # fmt: skip


def _fixed_axes(request: Request, graph: Graph) -> str:
    """The first axis of an input that dynamic_axes asks for and the file does not have dynamic, in words; or ""."""
    for name, axes in (request.dynamic_axes or {}).items():
        if name not in graph.inputs:
            if name in graph.outputs:
                continue
            return f"{name!r} is neither an input ({', '.join(graph.inputs)}) nor an output ({', '.join(graph.outputs)})"
        for axis in axes:
            shape = graph.inputs[name]
            if axis >= len(shape) or isinstance(shape[axis], int):
                return f"axis {axis} of {name!r}, which is {list(shape)}"
    return ""


def _other_sizes(graph: Graph, example: Call) -> dict[tuple[int, int], int]:
    """{(tensor, axis): its size + 1} for every axis that the file names."""
    tensors = list(example.tensors().values())
    names = fed_names(example, list(graph.inputs))
    return {
        (number, axis): tensors[number].shape[axis] + 1
        for number, name in enumerate(names)
        for axis, size in enumerate(graph.inputs[name])
        if isinstance(size, str) and size.isidentifier() and tensors[number].shape[axis]
    }


def _classic_can(request: Request) -> bool:
    newer = request.dynamic_shapes is not None or request.custom_translation_table is not None
    return not newer and (request.opset_version or 0) <= _CLASSIC_NEWEST


def _without_classic(refusal: BaseException | None, asked: int | None) -> Advice:
    if refusal is not None:
        return advise(refusal)
    if (asked or 0) > _CLASSIC_NEWEST:
        return Advice(f"opset {asked} was asked, and no exporter here writes it", "Leave `opset_version` out, or ask for 18 to 20.")
    return Advice(
        f"opset {asked} was asked, and the exporter that takes dynamic_shapes and translation tables does not write it",
        "Leave `opset_version` out, ask for 18 to 20, or give `dynamic_axes` instead.",
    )


def _require_onnx() -> None:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(f"exporting to ONNX needs {', '.join(missing)}", hint=f"pip install {' '.join(missing)}")


def _empty(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
