"""The TorchScript target: scripted where the model's code allows it, traced where it does not, and never with a decision baked in.

Scripting keeps branches and loops. Tracing keeps what one call did, so a traced program is asked three more things: does
torch.export see a decision that hangs on values (`draft_export`), does it answer other values as the model does, and does it answer
other sizes so? A decision on values, or another answer at another size, fails the export; a size that is only refused is told.

torch.jit is deprecated since torch 2.9 in favour of torch.export; the report says so.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.exporting.advice import Advice, chain_text
from workbench.exporting.proving import Export, Failed, digest_of, other_sizes
from workbench.exporting.report import Exported
from workbench.exporting.wrappers import flat, input_names, method_of
from workbench.verification.comparison import parity
from workbench.verification.programs import load_program, remember
from workbench.verification.runners import FlatRunner
from workbench.verification.values import Call
from workbench.verification.variations import variations

if TYPE_CHECKING:
    import torch

    from workbench.exporting.targets import Request

_DECISION = re.compile(r"TracerWarning: (?:Converting a tensor to|Using len|Iterating over a tensor)[^\n]*")
_DEPRECATED = "torch.jit is deprecated: it still runs everywhere LibTorch does; for new work export to .pt2 or .onnx."


def export_torchscript(request: Request, path: Path) -> Exported:
    """One TorchScript file from a request."""
    return _ScriptExport(request, path).carry_out()


class _ScriptExport(Export):
    target = "torchscript"

    def run(self, made: Path) -> Exported:
        names, tensors = input_names(self.request), self.request.example.tensors().values()
        shapes: dict[str, tuple[int | str, ...]] = {name: tuple(t.shape) for name, t in zip(names, tensors, strict=True)}
        self.done = replace(self.done, inputs=shapes)
        texts: list[str] = []
        last: Failed | None = None
        for how, flattened, make in self._ways():
            self.log, self.done = "", replace(self.done, exporter=how, parity=None, tried=())
            notes = len(self.notes)
            try:
                program = self.heard(make)
                self.heard(lambda program=program: program.save(str(made)))  # type: ignore[misc]
                if self.request.check:
                    remember(digest_of(made))
                    loaded = load_program(made)
                    self._prove(FlatRunner(loaded, self.path.name) if flattened else loaded, traced=how == "trace")
                    self._prove_methods(loaded)
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
            self.notes.append("The program takes its tensors in order and returns a tuple: its call is not one that tracing can keep.")
        if not self.request.check:
            self.notes.append("The file was not compared with the model, as asked.")

    def _prove(self, candidate: Any, *, traced: bool) -> None:
        if traced and (decisions := sorted(set(_DECISION.findall(self.log)))):
            self._require_no_decision(decisions)
        self.prove(candidate, {}, traced=traced, any_size=False)
        for name, call in other_sizes(self.request).items():
            report = parity(self.request.model, candidate, [call], rtol=self.request.rtol, atol=self.request.atol)
            if report:
                self.done = replace(self.done, tried=(*self.done.tried, name))
            elif any("failed on" in problem for problem in report.problems):
                self.notes.append(f"The program refuses {name}, which the model takes: that size was fixed by tracing.")
            else:
                cause = f"tracing baked a size or a loop count in: with {name} the program answers otherwise than the model"
                raise Failed(Advice(cause, "Script the part that loops or branches, or export to .pt2 with that axis dynamic."))

    def _prove_methods(self, loaded: Any) -> None:
        for name, call in self.request.methods.items():
            batches = [call, *variations(call).values()]
            report = parity(
                method_of(self.request.model, name), getattr(loaded, name), batches, rtol=self.request.rtol, atol=self.request.atol
            )
            if not report:
                raise Failed(
                    Advice(
                        f"the method {name} does not answer as the model's does: {report.headline}",
                        "Script the method, or type its arguments.",
                    )
                )

    def _require_no_decision(self, decisions: list[str]) -> None:
        """Raise unless torch.export proves that no decision of the traced code hangs on values."""
        found = self.heard(lambda: value_decisions(self.request))
        if found:
            cause = f"tracing baked a decision that hangs on values: {found[0]}"
            cure = "Write the branch with `torch.where` or `torch.cond`, or make the model scriptable: type its arguments and keep to TorchScript's Python."
            raise Failed(Advice(cause, cure), "\n".join(decisions))
        if found is None:
            cause = "tracing took decisions, and torch.export could not say whether they hang on values"
            raise Failed(
                Advice(cause, "See `error` for the lines; write them with `torch.where`, or script the model."), "\n".join(decisions)
            )


def value_decisions(request: Request) -> list[str] | None:
    """Where the model decides by the values of a tensor, in torch.export's own words; None where it cannot follow the model."""
    import torch

    try:
        program: Any = torch.export.draft_export(flat(request.model, request.example), (*request.example.fresh().tensors().values(),))
    except Exception:  # every exporter failure means the same here: nothing is known
        return None
    kinds = [failure for failure in program._report.failures if failure.failure_type.name == "DATA_DEPENDENT_ERROR"]
    return [str(failure.data.get("expr", "a data-dependent expression")) for failure in kinds]


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
