"""The `.pt2` target: torch.export, not strict first and strict where that fails, saved without the example inputs.

What torch.export refuses is explained by its own evidence: `draft_export` names the lines that decide by values, the operators without
a meta kernel, and the constraints that do not hold.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.exporting.advice import advise, chain_text
from workbench.exporting.evidence import evidence, fixed_in_all, free_axes
from workbench.exporting.proving import Export, digest_of, write
from workbench.exporting.report import Exported
from workbench.exporting.shapes import asked_labels, for_torch_export, input_shapes
from workbench.exporting.wrappers import constants, output_names
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
        stored = io.BytesIO()
        self.heard(lambda: torch.export.save(program, stored))
        write(made, stored.getvalue())
        self.notes += constants(self.request)
        names = asked_labels(self.request)
        free = {place: str(size) for place, size in free_axes(program).items()}
        symbols = {symbol: names[place] for place, symbol in free.items() if names.get(place)}
        inputs = input_shapes(self.request, {place: symbols.get(symbol, symbol) for place, symbol in free.items()})
        self.done = replace(self.done, exporter=how, inputs=inputs, outputs=_outputs(program, self.request, symbols))
        self.require_free(inputs, dict.fromkeys(output_names(self.request)))
        self.tell_fixed(inputs)
        remember(digest_of(made))
        if self.request.check:
            tensors = list(self.request.example.tensors().values())
            sizes = {(number, axis): tensors[number].shape[axis] + 1 for number, axis in free}
            self.prove(load_program(made), sizes, traced=False, any_size=bool(free))
        else:
            self.notes.append("The file was not compared with the model, as asked.")
        return self.finish(made)

    def _make(self) -> tuple[Any, str]:
        import torch

        request, example = self.request, self.request.example.fresh()
        shapes = for_torch_export(request, named=False)
        refusals: list[BaseException] = []
        for strict in (False, True):
            try:
                export = lambda strict=strict: torch.export.export(  # noqa: E731
                    request.model, example.args, dict(example.kwargs), dynamic_shapes=shapes, strict=strict
                )
                return self.heard(export), "strict" if strict else "not strict"
            except Exception as error:  # torch's exporters raise everything under the sun, and run a stranger's forward
                refusals.append(error)
        texts = [chain_text(error) for error in refusals]
        reasons = fixed_in_all(self.heard(lambda: evidence(request.model, request.example, shapes)) or (), texts)
        raise self.refuse(advise(refusals[0]), reasons, f"not strict: {texts[0]}\n\nstrict: {texts[1]}") from refusals[0]


def _outputs(program: Any, request: Request, symbols: Mapping[str, str]) -> dict[str, tuple[int | str, ...]]:
    """Shapes of the outputs as the program declares them, free axes by the names asked for; {} where it gives others than the model."""
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    shapes = [values[name].shape for name in program.graph_signature.user_outputs if hasattr(values.get(name), "shape")]
    if len(shapes) != len(request.outputs):
        return {}

    def size(value: Any) -> int | str:
        return value if isinstance(value, int) else re.sub(r"\b[su]\d+\b", lambda found: symbols.get(found[0], found[0]), str(value))

    return {name: tuple(map(size, shape)) for name, shape in zip(request.outputs, shapes, strict=True)}
