"""The TorchScript target: scripted where the model's code allows it, traced where it does not, and never with a decision baked in.

Scripting keeps branches and loops. Tracing keeps what one call did, so a traced program is asked three more things: does
torch.export see a decision that hangs on values (`draft_export`), does it answer other values as the model does, and does it answer
other sizes so? A decision on values, or another answer at another size, fails the export; a size that is only refused is told, or
fails it where that axis was asked to be dynamic. Every method is asked the same.

torch.jit is deprecated since torch 2.9 in favour of torch.export; the report says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.errors import WriteError
from workbench.exporting.advice import Advice, chain_text
from workbench.exporting.evidence import exported, past_bounds
from workbench.exporting.proving import Export, Failed, Sizes, at_sizes, digest_of, neighbours, write
from workbench.exporting.report import Exported
from workbench.exporting.shapes import asked_labels, input_shapes
from workbench.exporting.wrappers import constants, flat, method_of, output_names
from workbench.verification.comparison import parity
from workbench.verification.programs import load_program, remember
from workbench.verification.runners import FlatRunner, running
from workbench.verification.values import Call
from workbench.verification.variations import variations

if TYPE_CHECKING:
    import torch

    from workbench.exporting.targets import Request

_DEPRECATED = "torch.jit is deprecated: it still runs everywhere LibTorch does; for new work export to .pt2 or .onnx."


def export_torchscript(request: Request, path: Path) -> Exported:
    """One TorchScript file from a request."""
    return _ScriptExport(request, path).carry_out()


class _ScriptExport(Export):
    target = "torchscript"

    def run(self, made: Path) -> Exported:
        self.done = replace(self.done, inputs=input_shapes(self.request, asked_labels(self.request)))
        self.require_free(self.done.inputs, dict.fromkeys(output_names(self.request)))
        texts: list[str] = []
        last: Failed | None = None
        for how, flattened, make in self._ways():
            self.log, self.done = "", replace(self.done, exporter=how, parity=None, tried=(), sizes=(), reasons=())
            notes = len(self.notes)
            try:
                program = self.heard(make)
                self.heard(lambda program=program: write(made, program.save_to_buffer()))  # type: ignore[misc]
                remember(digest_of(made))
                if self.request.check:
                    loaded = load_program(made)
                    self._prove(FlatRunner(loaded, self.path.name) if flattened else loaded, traced=how == "trace")
                    self._prove_methods(loaded, traced=how == "trace")
            except WriteError:
                raise
            except Failed as failure:
                last = failure
            except Exception as error:  # the compiler and the tracer raise whatever they do not understand, and run a stranger's forward
                last = Failed(_not_followed(how, error), chain_text(error))
            else:
                self._note(how, flattened, texts)
                return self.finish(made)
            del self.notes[notes:]
            texts.append(f"{how}: {last.advice.cause}\n{last.error}")
        assert last is not None
        raise Failed(last.advice, "\n\n".join(texts))

    def _ways(self) -> Iterator[tuple[str, bool, Callable[[], Any]]]:
        """(script or trace, whether the program takes tensors in order, what makes it), the best first."""
        import torch

        request = self.request
        if request.exporter in (None, "script"):
            yield "script", False, lambda: _scripted(request.model, request.methods)
        if request.exporter in (None, "trace"):
            if not request.example.kwargs and all(isinstance(value, torch.Tensor) for value in request.example.args):
                yield "trace", False, lambda: _traced(request.model, request.example, request.methods)
            if not request.methods:
                inputs = Call((*request.example.tensors().values(),))
                yield "trace", True, lambda: _traced(flat(request.model, request.example), inputs, {})

    def _note(self, how: str, flattened: bool, failures: list[str]) -> None:
        self.notes.append(_DEPRECATED)
        if how == "trace" and failures and failures[0].startswith("script"):
            self.notes.append(f"Scripting did not serve ({failures[0].splitlines()[0].removeprefix('script: ')}), so the model was traced.")
        if flattened:
            self.notes += constants(self.request)
            self.notes.append("The program takes its tensors in order and returns a tuple: its call is not one that tracing can keep.")
        if not self.request.check:
            self.notes.append("The file was not compared with the model, as asked.")

    def _prove(self, candidate: Any, *, traced: bool) -> None:
        if traced:
            self.refuse_decisions(self.request)
        tensors = list(self.request.example.tensors().values())
        free = {(number, axis): tensors[number].shape[axis] + 1 for number, axis in asked_labels(self.request)}
        self.prove(candidate, free, traced=traced, any_size=bool(free))
        self.done = replace(self.done, outputs=self._free_outputs(self.done.outputs))
        self.prove_sizes(self.request, candidate, self._wanted(self.request, traced=traced))

    def _free_outputs(self, shapes: Mapping[str, tuple[int | str, ...]]) -> dict[str, tuple[int | str, ...]]:
        """The outputs' shapes; an axis that grows with one asked to be dynamic is called like it, or "?" where it is not of its size."""
        found = {name: list(shape) for name, shape in shapes.items()}
        places: dict[str, dict[tuple[int, int], int]] = {}
        tensors = list(self.request.example.tensors().values())
        for place, label in asked_labels(self.request).items():
            places.setdefault(label, {})[place] = tensors[place[0]].shape[place[1]]
        for label, sizes in places.items():
            grown = at_sizes(self.request, [{place: size + 1 for place, size in sizes.items()}], [])
            with running(self.request.model) as model:
                answers = [model(call.fresh()) for call in grown.values()]
            for name, value in (item for answer in answers for item in answer.items() if len(found.get(item[0], ())) == item[1].ndim):
                for axis, size in enumerate(value.shape):
                    if size != shapes[name][axis]:
                        found[name][axis] = label if size - 1 == shapes[name][axis] in sizes.values() else "?"
        return {name: tuple(shape) for name, shape in found.items()}

    def _wanted(self, request: Request, *, traced: bool) -> list[Sizes]:
        """Sizes to try a program at: beside the example's, and for a traced one where the model's code takes another way."""
        places = [(n, axis) for n, tensor in enumerate(request.example.tensors().values()) for axis in range(tensor.ndim)]
        program = self.heard(lambda: exported(request, places)) if traced else None
        return [*neighbours(request), *(past_bounds(program) if program is not None else ())]

    def _prove_methods(self, loaded: Any, *, traced: bool) -> None:
        for name, call in self.request.methods.items():
            own = replace(self.request, model=method_of(self.request.model, name), example=call, methods={})
            if traced:
                self.refuse_decisions(own)
            method = getattr(loaded, name)
            report = parity(own.model, method, [call, *variations(call).values()], rtol=own.rtol, atol=own.atol, by_position=True)
            if not report:
                cause = f"the method {name} does not answer as the model's does: {report.headline}"
                raise Failed(Advice(cause, "Script the method, or type its arguments."))
            self.prove_sizes(own, method, self._wanted(own, traced=traced), f"{name}'s ")


def _scripted(model: torch.nn.Module, methods: Mapping[str, Call]) -> Any:
    """The model compiled, with its methods: marked for the compiler as `torch.jit.export` would, and unmarked again."""
    import torch

    functions = [getattr(type(model), name) for name in methods]
    marked = [function for function in functions if not hasattr(function, "_torchscript_modifier")]
    try:
        for function in marked:
            torch.jit.export(function)
        return torch.jit.script(model)
    finally:
        for function in marked:
            del function._torchscript_modifier


def _traced(model: torch.nn.Module, example: Call, methods: Mapping[str, Call]) -> Any:
    import torch

    if not methods:
        return torch.jit.trace(model, example.fresh().args, check_trace=False)  # type: ignore[no-untyped-call]
    inputs = {"forward": example.fresh().args, **{name: call.fresh().args for name, call in methods.items()}}
    return torch.jit.trace_module(model, inputs, check_trace=False)  # type: ignore[no-untyped-call]


def _not_followed(how: str, error: BaseException) -> Advice:
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if how == "script":
        return Advice(f"the script compiler does not take the model: {first}", "Type the arguments of forward, or leave `exporter` out.")
    cure = "Return tensors from forward, or export to .pt2, which follows more of Python."
    return Advice(f"neither scripting nor tracing follows the model: {first}", cure)
