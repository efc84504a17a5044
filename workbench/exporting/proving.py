"""Proving: what every target does before a file takes its place. Exported beside the target, tried on other inputs, compared.

Owns the temporary folder, the batches that an artefact is tried on, and the verdict. A file that was made by tracing needs more than the
example: another input at least, and another size of each axis that is said to be free.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.errors import UnsupportedError, WriteError
from workbench.exporting.advice import Advice
from workbench.verification.comparison import ParityReport, parity
from workbench.verification.runners import running
from workbench.verification.values import Call
from workbench.verification.variations import resized, variations

if TYPE_CHECKING:
    import torch

    from workbench.exporting.targets import Request


class Failed(Exception):
    """This export ends here, for a reason in plain words. Never leaves this room."""

    def __init__(self, advice: Advice, error: str = "") -> None:
        super().__init__(advice.cause)
        self.advice, self.error = advice, error


def trials(request: Request, free: Mapping[tuple[int, int], int], notes: list[str]) -> dict[str, Call]:
    """The example, other values of its shape, and another size of each free axis, as far as the model itself takes them.

    Args:
        free: {(which tensor in order, which axis): another size}, of the axes that the file takes at any size.
        notes: gets a sentence for each that the model does not take.
    """
    example = request.example
    wanted = dict(variations(example))
    if free:
        wanted["resized"] = resized(example, free)
    usable = {"example": example}
    with running(request.model) as runner:
        finite = _finite(runner(example.fresh()))
        for name, call in wanted.items():
            if not _differ(call, example):
                continue
            try:
                outputs = runner(call.fresh())
            except Exception as error:  # the model itself refuses this input: it proves nothing about the file
                why = f"{type(error).__name__}: {''.join(str(error).splitlines()[:1])}"
                notes.append(f"The model does not take the {name} inputs ({why}), so they were not tried.")
                continue
            if finite and not _finite(outputs):
                notes.append(f"The model gives NaN or infinity on the {name} inputs, so they were not tried.")
                continue
            usable[name] = call
    return usable


def prove(request: Request, candidate: Any, name: str, tried: Mapping[str, Call], *, traced: bool, any_size: bool) -> ParityReport:
    """Compare what was made with the model on every batch.

    Args:
        candidate: what `parity` takes; `name`: what the report calls it.
        traced: made by running the model once, which proves nothing about other inputs; `any_size`: an axis is said to be free.
    Raises:
        Failed: it could not be tried enough. A report that is false is returned, and is the caller's to judge.
    """
    if traced and len(tried) < 2:
        cause = "the file was made by tracing and could not be tried on a second, different input"
        raise Failed(Advice(cause, "Give example inputs whose values may be changed, or make the model exportable by torch.export."))
    if traced and any_size and "resized" not in tried:
        cause = "the file was made by tracing, and the model itself does not take another size of the axis asked to be dynamic"
        raise Failed(Advice(cause, "Leave that axis fixed, or remove what pins it in the model's code."))
    try:
        report = parity(request.model, candidate, list(tried.values()), rtol=request.rtol, atol=request.atol)
    except UnsupportedError as error:
        cure = "Export a float32 copy (`model.float()`), or use `check=False` for a runtime that has what is missing."
        raise Failed(Advice(error.message, cure), str(error)) from error
    return replace(report, candidate=name)


def differs(report: ParityReport, *, traced: bool) -> Advice:
    cause = f"the file does not answer as the model does: {report.headline}"
    if any("keeps state" in problem for problem in report.problems):
        return Advice(cause, "Make the state an argument and an output of `forward`; a graph keeps nothing between calls.")
    if traced:
        return Advice(cause, "Tracing bakes branches and sizes in: write them with `torch.where` or `torch.cond`.")
    return Advice(cause, "If a difference of that size is acceptable, say so with `rtol` and `atol`.")


@contextmanager
def workplace(path: Path) -> Iterator[Path]:
    """A folder beside the target for work in progress: the same disk, the same rights, and nothing left of it afterwards."""
    if path.is_dir():
        raise WriteError("a folder of that name stands here", path=str(path))
    try:
        folder = Path(tempfile.mkdtemp(prefix=".export.", dir=path.parent))
    except OSError as error:
        hint = "choose a folder that exists and that you may write to"
        raise WriteError(f"cannot write here: {error.strerror}", path=str(path), hint=hint) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def _finite(outputs: dict[str, torch.Tensor]) -> bool:
    return all(bool(value.isfinite().all()) for value in outputs.values() if value.is_floating_point() or value.is_complex())


def _differ(call: Call, example: Call) -> bool:
    import torch

    pairs = zip(call.tensors().values(), example.tensors().values(), strict=True)
    return any(a.shape != b.shape or not torch.equal(a, b) for a, b in pairs)
