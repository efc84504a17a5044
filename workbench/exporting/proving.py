"""Proving: what every target does before a file takes its place. Exported beside the target, tried on other inputs, compared.

Owns the course of an export, its temporary folder, the batches that an artefact is tried on, and the verdict. A file that was made by
tracing needs more than the example: another input at least, and another size of each axis that is said to be free.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.errors import UnsupportedError, WriteError
from workbench.exporting.advice import Advice
from workbench.exporting.listening import Heard, listening
from workbench.exporting.report import Exported
from workbench.files import Span, atomic_write, file_ref
from workbench.verification.comparison import ParityReport, parity
from workbench.verification.runners import evaluating, running
from workbench.verification.values import Call
from workbench.verification.variations import resized, variations

if TYPE_CHECKING:
    import torch

    from workbench.exporting.targets import Request


_BLOCK = 1 << 20


class Failed(Exception):
    """This export ends here, for a reason in plain words. Never leaves this room."""

    def __init__(self, advice: Advice, error: str = "") -> None:
        super().__init__(advice.cause)
        self.advice, self.error = advice, error


class Export(ABC):
    """One export in progress: the request, what is known of the result, and what was heard and noticed.

    A target subclasses it with `run(made)`, which writes `made` in a folder of its own, proves it, and ends in `finish`.
    """

    target = ""

    def __init__(self, request: Request, path: Path) -> None:
        self.request, self.path = request, path
        self.done = Exported(self.target, str(path), opset_asked=request.opset_version)
        self.notes: list[str] = []
        self.log = ""

    @abstractmethod
    def run(self, made: Path) -> Exported:
        """Write `made`, prove it, and end in `finish`; raises Failed."""

    def carry_out(self) -> Exported:
        """A failure is a value with its cause, and leaves what stood at the path as it was."""
        started = time.perf_counter()
        with workplace(self.path) as folder, evaluating(self.request.model):
            try:
                done = self.run(folder / self.path.name)
            except Failed as failure:
                advice = failure.advice
                done = replace(self.done, files={}, sha256=None, cause=advice.cause, cure=advice.cure, error=failure.error)
        return replace(done, log=self.log, notes=tuple(self.notes), seconds=time.perf_counter() - started)

    def heard(self, export: Callable[[], Any]) -> Any:
        """The result of `export`; what it prints, logs and warns goes to the log."""
        heard = Heard()
        try:
            with listening(heard):
                return export()
        finally:
            self.log = "\n".join(text for text in (self.log, heard.text) if text)

    def prove(self, candidate: Any, free: Mapping[tuple[int, int], int], *, traced: bool, any_size: bool) -> None:
        """Compare what was made with the model, on the example and beyond it.

        Args:
            candidate: what `parity` takes.
            free, any_size, traced: see `trials` and `prove`.
        """
        tried = trials(self.request, free, self.notes)
        report = prove(self.request, candidate, self.path.name, tried, traced=traced, any_size=any_size)
        outputs = self.done.outputs or {output.name: output.shape for output in report.outputs}
        self.done = replace(self.done, parity=report, tried=tuple(tried), outputs=outputs)
        if not report:
            raise Failed(differs(report, traced=traced))

    def finish(self, made: Path) -> Exported:
        sizes, digest = put_in_place(made, self.path)
        return replace(self.done, files=sizes, sha256=digest)


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


def other_sizes(request: Request) -> dict[str, Call]:
    """The example with other sizes that the model itself takes: each group of axes of one size, one longer and one shorter."""
    example = request.example
    groups: dict[int, list[tuple[int, int]]] = {}
    for number, tensor in enumerate(example.tensors().values()):
        for axis, size in enumerate(tensor.shape):
            if size:
                groups.setdefault(size, []).append((number, axis))
    leading = [(number, 0) for number, tensor in enumerate(example.tensors().values()) if tensor.ndim]
    found: dict[str, Call] = {}
    with running(request.model) as runner:
        for axes in [leading, *groups.values(), *([axis] for held in groups.values() if len(held) > 1 for axis in held)]:
            sizes = [example.tensors()[name].shape for name in example.tensors()]
            for step in (1, -1):
                told = {axis: sizes[axis[0]][axis[1]] + step for axis in axes}
                name = ", ".join(f"axis {axis} of input {number} at {size}" for (number, axis), size in told.items())
                if min(told.values(), default=0) < 1 or name in found:
                    continue
                call = resized(example, told)
                try:
                    runner(call.fresh())
                except Exception:  # a size that the model itself does not take says nothing
                    continue
                found[name] = call
    return found


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


def put_in_place(made: Path, target: Path) -> tuple[dict[str, int], str]:
    """Copy a finished file, and its external data first, over the target; each file whole or not at all.

    Returns:
        ({file name: bytes}, SHA-256 of the graph file).
    Raises:
        WriteError: the folder refuses; the file that stood there is intact.
    """
    sizes: dict[str, int] = {}
    digest = ""
    sources = sorted(made.parent.iterdir(), key=lambda file: file.name == made.name)  # the graph last: it never names absent data
    for source in sources:
        goal = target if source.name == made.name else target.parent / source.name
        sizes[goal.name], digest = _copy(source, goal)
    return sizes, digest


def digest_of(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _copy(source: Path, goal: Path) -> tuple[int, str]:
    ref = file_ref(source)
    digest, done = hashlib.sha256(), 0
    with atomic_write(goal) as out, Span(ref, 0, ref.size).open() as reader:
        while done < ref.size:
            buffer = memoryview(bytearray(min(_BLOCK, ref.size - done)))
            reader.readinto(buffer, done)
            digest.update(buffer)
            out.write(buffer, done)
            done += buffer.nbytes
    return ref.size, digest.hexdigest()
