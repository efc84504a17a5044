"""The ONNX target: torch's exporters, kept honest.

The dynamo exporter goes first, unless one is asked for. The classic one (tracing) steps in only where dynamo failed for another reason
than a data-dependent branch, or did not write the opset asked for; what it traced is asked for decisions on values, as TorchScript is. What
either wrote is repaired, read back, checked, and compared with the model in ONNX Runtime before it takes its place.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.errors import MissingDependencyError, WriteError
from workbench.exporting.advice import Advice, advise, chain_text
from workbench.exporting.evidence import evidence, exported, past_bounds
from workbench.exporting.onnx_file import Graph, add_unused_inputs, check_file, clashes, read_graph, strip_weight_shapes, weights_to_inputs
from workbench.exporting.proving import Export, Failed, Sizes
from workbench.exporting.report import Exported, Option
from workbench.exporting.shapes import asked_labels, for_torch_export, input_shapes
from workbench.exporting.wrappers import constants, flat, input_names, output_names
from workbench.verification.measures import same
from workbench.verification.runners import running

if TYPE_CHECKING:
    import torch

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
        if unused := add_unused_inputs(made, _declared(self.request)):
            self.notes.append(f"What the graph makes no use of is an input of it all the same: {', '.join(unused)}.")
        removed = strip_weight_shapes(made)
        if removed:
            self.notes.append(
                f"The shapes of {removed} weights stood twice in the file, which ONNX Runtime's quantizer cannot take; they stand there once."
            )
        self.done = replace(self.done, exporter=exporter)
        self.notes += constants(self.request)
        graph = self._read(made)
        self._judge_graph(made, graph)
        self._tell_state()
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

    def _read(self, made: Path) -> Graph:
        graph = read_graph(made)
        self.done = replace(self.done, opset=graph.opset, inputs=graph.inputs, outputs=graph.outputs)
        options = _options(self.request, graph, self.done.exporter or "", len(self.log.splitlines()))
        self.done = replace(self.done, options=tuple(options))
        return graph

    def _make(self, made: Path) -> str:
        """Write the graph by the exporter asked for, or the first that can; returns its name."""
        request, asked, why = self.request, self.request.opset_version, ""
        refusal: BaseException | None = None
        if request.exporter != "classic":
            try:
                self.heard(lambda: _dynamo(request, made))
                wrote = read_graph(made).opset
                if asked in (None, wrote) or request.exporter == "dynamo":
                    return "dynamo"
                why = f"wrote opset {wrote} where {asked} was asked"
            except WriteError:
                raise
            except Exception as error:  # torch's exporters raise everything under the sun, and run a stranger's forward
                refusal, why = error, f"failed ({advise(error).cause})"
                if advise(error).tracing_hides_it:
                    found = self.heard(lambda: evidence(request.model, request.example))
                    raise self.refuse(advise(error), found, chain_text(error)) from error
        if request.exporter == "dynamo" or not _classic_can(request):
            raise Failed(_without_classic(request, refusal), chain_text(refusal) if refusal else "")
        try:
            _empty(made.parent)
            self.heard(lambda: _classic(request, made))
        except WriteError:
            raise
        except Exception as error:  # as above
            texts = [f"dynamo: {chain_text(refusal)}"] if refusal else []
            raise Failed(advise(refusal or error), "\n\n".join([*texts, f"classic: {chain_text(error)}"])) from error
        if request.check:
            self.done = replace(self.done, exporter="classic")
            self.refuse_decisions(request)
        if why:
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
        self.require_free(graph.inputs, graph.outputs)
        self.tell_fixed(graph.inputs)

    def _prove(self, made: Path, graph: Graph, exporter: str) -> None:
        objection = check_file(made)
        self.done = replace(self.done, checked=not objection)
        if objection:
            raise Failed(Advice("ONNX's own checker refuses the file", "Try another `opset_version`."), objection)
        any_size = any(isinstance(size, str) for shape in graph.inputs.values() for size in shape)
        labels, tensors = _labels(graph, self.request), list(self.request.example.tensors().values())
        free = {(number, axis): tensors[number].shape[axis] + 1 for number, axis in labels}
        named = ((name, a, s) for name, shape in graph.inputs.items() for a, s in enumerate(shape) if isinstance(s, str))
        if untried := [f"axis {a} of {name} ({s})" for name, a, s in named if s not in labels.values()]:
            self.notes.append(f"Free in the file, and not tried at another size: {', '.join(untried)}.")
        self.prove(made, free, traced=exporter == "classic", any_size=any_size)
        if labels and (program := self.heard(lambda: exported(self.request, labels))) is not None:
            self.prove_sizes(self.request, made, (_together(told, labels) for told in past_bounds(program)))

    def _tell_state(self) -> None:
        """Tell which buffers forward changes: a graph keeps nothing."""
        model = self.request.model
        with running(model) as runner:
            before = {name: buffer.clone() for name, buffer in model.named_buffers()}
            runner(self.request.example.fresh())
            held = dict(model.named_buffers())
            moved = [name for name in before if name in held and not same({name: before[name]}, {name: held[name]})]
        if moved:
            self.notes.append(f"The model's forward changes its buffers {', '.join(moved)}; the file keeps nothing between calls.")

    def _leave_out_weights(self, made: Path) -> None:
        names = [*self.request.model.state_dict()]
        count = weights_to_inputs(made, {*names, *(f"model.{name}" for name in names)})  # the classic exporter sees them in a wrapper
        for other in made.parent.iterdir():
            if other != made:
                other.unlink()
        proved = "; what was compared with the model is the graph while it held them" if self.request.check else ""
        self.notes.append(f"{count} weights were left out, as asked: they are inputs of the graph under their own names{proved}.")
        kept = self._read(made).weights
        if kept:
            told = f"{', '.join(kept[:4])}{', …' * (len(kept) > 4)}"
            self.notes.append(f"What is no weight by name stays in the file as a constant: {told}.")
        objection = check_file(made) if self.request.check else ""
        if objection:
            raise Failed(Advice("ONNX's own checker refuses the file without its weights", "Leave the weights in."), objection)


def _dynamo(request: Request, made: Path) -> None:
    import torch

    example = request.example.fresh()
    torch.onnx.export(
        request.model, example.args, str(made), kwargs=dict(example.kwargs) or None, dynamo=True,
        input_names=input_names(request), output_names=output_names(request),
        dynamic_shapes=for_torch_export(request, named=True), opset_version=request.opset_version, export_params=True,
        optimize=request.do_constant_folding, verbose=request.verbose, external_data=request.external_data,
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


def _options(request: Request, graph: Graph, exporter: str, heard: int) -> Iterator[Option]:
    """Every option of an ONNX export as it was asked for and as the file, or the exporter that made it, has honoured it."""
    free = {
        name: {axis: size for axis, size in enumerate(shape) if isinstance(size, str)}
        for name, shape in (graph.inputs | graph.outputs).items()
    }
    dynamic = "; ".join(f"{name} {axes}" for name, axes in free.items() if axes) or "no axis is dynamic"
    known = {name: axes for name, axes in (request.dynamic_axes or {}).items() if name in free}
    kept = all(
        set(axes) <= set(free[name]) and (not isinstance(axes, Mapping) or axes.items() <= free[name].items())
        for name, axes in known.items()
    )
    yield Option("exporter", request.exporter, exporter, request.exporter in (None, exporter))
    for name, asked, found in (("input_names", request.input_names, graph.inputs), ("output_names", request.output_names, graph.outputs)):
        held = asked is None or tuple(found)[: len(asked)] == asked
        yield Option(name, ", ".join(asked) if asked else None, ", ".join(found), held)
    yield Option("dynamic_axes", str(request.dynamic_axes) if request.dynamic_axes else None, dynamic, kept)
    yield Option(
        "dynamic_shapes",
        str(request.dynamic_shapes) if request.dynamic_shapes else None,
        dynamic,
        not request.dynamic_shapes or any(free.values()),
    )
    yield Option("opset_version", request.opset_version, graph.opset, request.opset_version in (None, graph.opset))
    weights = f"weights and constants in the file: {len(graph.weights)}" if graph.weights else "no weights in the file"
    yield Option("export_params", request.export_params, weights, request.export_params or not graph.floats)  # floats: folded weights
    by = (
        ", by optimize=False: the exporter's other graph optimizations are off too"
        if exporter == "dynamo" and not request.do_constant_folding
        else ""
    )
    yield Option("do_constant_folding", request.do_constant_folding, f"{graph.foldable} nodes compute from weights alone{by}", True)
    where = f"weights in {', '.join(graph.beside)}" if graph.beside else "one file"
    why = ": the classic exporter has no such option" if exporter == "classic" else ": no weight is large enough to stand beside"
    yield Option(
        "external_data",
        request.external_data,
        where + why * (request.external_data and not graph.beside),
        request.external_data == bool(graph.beside) or not graph.weights,
    )
    if request.custom_translation_table:
        yield Option("custom_translation_table", ", ".join(map(str, request.custom_translation_table)), "given to the exporter", True)
    yield Option("verbose", request.verbose, f"{heard} lines in the report's log, none printed", True)


def _labels(graph: Graph, request: Request) -> dict[tuple[int, int], str]:
    """{(tensor, axis): its name in the file} for every axis that the file names by a word or as asked; the rest are sums of such."""
    asked = asked_labels(request)
    return {
        (number, axis): size
        for number, (name, tensor) in enumerate(zip(input_names(request), request.example.tensors().values(), strict=True))
        for axis, size in enumerate(graph.inputs[name])
        if isinstance(size, str) and (size.isidentifier() or (number, axis) in asked) and tensor.shape[axis]
    }


def _declared(request: Request) -> dict[str, tuple[torch.dtype, tuple[int | str, ...]]]:
    """What each tensor of the call is declared as: its dtype and shape."""
    shapes = input_shapes(request, asked_labels(request))
    return {name: (t.dtype, shapes[name]) for name, t in zip(input_names(request), request.example.tensors().values(), strict=True)}


def _together(sizes: Sizes, labels: Mapping[tuple[int, int], str]) -> Sizes:
    """The same sizes for all axes that the file calls alike."""
    named = {labels[place]: size for place, size in sizes.items()}
    return {place: named[label] for place, label in labels.items() if label in named}


def _classic_can(request: Request) -> bool:
    newer = request.dynamic_shapes is not None or request.custom_translation_table is not None
    return not newer and (request.opset_version or 0) <= _CLASSIC_NEWEST


def _without_classic(request: Request, refusal: BaseException | None) -> Advice:
    asked = request.opset_version
    if refusal is not None:
        return advise(refusal)
    if (asked or 0) > _CLASSIC_NEWEST:
        return Advice(f"opset {asked} was asked, and no exporter here writes it", "Leave `opset_version` out, or ask for 18 to 20.")
    told = "the classic exporter takes no dynamic_shapes and no translation table"
    if request.exporter != "classic":
        told = f"opset {asked} was asked, which the dynamo exporter does not write, and {told}"
    return Advice(told, "Give `dynamic_axes`, and `torch.onnx.register_custom_op_symbolic` for operators; or ask for opset 18 to 20.")


def _require_onnx() -> None:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependencyError(f"exporting to ONNX needs {', '.join(missing)}", hint=f"pip install {' '.join(missing)}")


def _empty(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
