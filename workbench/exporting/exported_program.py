"""The `.pt2` target: torch.export, not strict first and strict where that fails, saved without the example inputs.

What torch.export refuses is explained by its own evidence: `draft_export` names the lines that decide by values, the operators without
a meta kernel, and the constraints that do not hold.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.exporting.advice import Advice, advise, chain_text
from workbench.exporting.proving import Export, Failed, digest_of
from workbench.exporting.report import Exported
from workbench.exporting.wrappers import input_names
from workbench.verification.programs import load_program, remember

if TYPE_CHECKING:
    from workbench.exporting.targets import Request


def export_program(request: Request, path: Path) -> Exported:
    """One `.pt2` file from a request."""
    return _ProgramExport(request, path).carry_out()


class _ProgramExport(Export):
    target = "pt2"

    def run(self, made: Path) -> Exported:
        import torch

        program, how = self._make()
        program.example_inputs = None  # torch would embed them: a stranger's data in a file that is passed on
        self.heard(lambda: torch.export.save(program, str(made)))
        free = _free_axes(program, self.request)
        names = input_names(self.request)
        shapes: dict[str, tuple[int | str, ...]] = {
            name: tuple(f"s{axis}" if (number, axis) in free else size for axis, size in enumerate(t.shape))
            for number, (name, t) in enumerate(zip(names, self.request.example.tensors().values(), strict=True))
        }
        self.done = replace(self.done, exporter=how, inputs=shapes)
        if fixed := _fixed(self.request, names, free):
            cure = "Name an input and an axis it has, and remove what pins that axis in the model's code."
            raise Failed(Advice(f"an axis asked to be dynamic is not dynamic in the program: {fixed}", cure))
        if self.request.check:
            remember(digest_of(made))
            self.prove(load_program(made), free, traced=False, any_size=bool(free))
        else:
            self.notes.append("The file was not compared with the model, as asked.")
        return self.finish(made)

    def _make(self) -> tuple[Any, str]:
        import torch

        request, example = self.request, self.request.example.fresh()
        shapes = request.dynamic_shapes if request.dynamic_shapes is not None else _dynamic_shapes(request)
        refusals: list[BaseException] = []
        for strict in (False, True):
            try:
                export = lambda strict=strict: torch.export.export(  # noqa: E731
                    request.model, example.args, dict(example.kwargs), dynamic_shapes=shapes, strict=strict
                )
                return self.heard(export), "strict" if strict else "not strict"
            except Exception as error:  # torch's exporters raise everything under the sun, and run a stranger's forward
                refusals.append(error)
        texts = [f"{'strict' if n else 'not strict'}: {chain_text(error)}" for n, error in enumerate(refusals)]
        raise Failed(advise(refusals[0]), "\n\n".join(texts)) from refusals[0]


def _dynamic_shapes(request: Request) -> Any:
    """`dynamic_axes` in torch.export's terms: the structure of the call, with {axis: Dim} for tensors; None where nothing is asked."""
    import torch

    if not request.dynamic_axes:
        return None
    names = iter(input_names(request))
    dims: dict[str, Any] = {}

    def asked(name: str) -> dict[int, Any] | None:
        axes = (request.dynamic_axes or {}).get(name)
        if axes is None:
            return None
        called = axes if isinstance(axes, dict) else {axis: f"{name}_{axis}" for axis in axes}
        return {axis: dims.setdefault(str(label), torch.export.Dim.DYNAMIC) for axis, label in called.items()}

    def spec(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return asked(next(names))
        if isinstance(value, dict):
            return {key: spec(item) for key, item in value.items()}
        if isinstance(value, (tuple, list)):
            return type(value)(map(spec, value)) if not hasattr(value, "_fields") else tuple(map(spec, value))
        return None

    bound = inspect.signature(request.model.forward).bind(*request.example.args, **request.example.kwargs)
    return {name: spec(value) for name, value in bound.arguments.items()}


def _free_axes(program: Any, request: Request) -> dict[tuple[int, int], int]:
    """{(tensor, axis): another size} of the axes that the program takes at any size, as its placeholders say."""
    import torch

    users = [spec.arg.name for spec in program.graph_signature.input_specs if spec.kind.name == "USER_INPUT"]
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    tensors = [values[name] for name in users if isinstance(values.get(name), torch.Tensor)]
    sizes = [t.shape for t in request.example.tensors().values()]
    return {
        (number, axis): sizes[number][axis] + 1
        for number, value in enumerate(tensors)
        for axis, size in enumerate(value.shape)
        if not isinstance(size, int)
    }


def _fixed(request: Request, names: list[str], free: dict[tuple[int, int], int]) -> str:
    """The first axis of an input that dynamic_axes asks for and the program fixes, in words; or ""."""
    for name, axes in (request.dynamic_axes or {}).items():
        if name not in names:
            if name in (request.output_names or request.outputs):
                continue
            return f"{name!r} is no input ({', '.join(names)})"
        for axis in axes:
            if (names.index(name), axis) not in free:
                return f"axis {axis} of {name!r}"
    return ""
