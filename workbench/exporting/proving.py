"""Proving: what every target does before a file takes its place. Exported beside the target, tried on other inputs, compared.

Owns the course of an export, its temporary folder, the batches that an artefact is tried on, and the verdict. A file that was made by
tracing needs more than the example: another input at least, and another size of each axis that is said to be free.
"""

from __future__ import annotations

import errno
import hashlib
import math
import shutil
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.errors import UnsupportedError, WorkbenchError, WriteError
from workbench.exporting.advice import Advice, advise, chain_text
from workbench.exporting.decisions import THREAD, VALUE, values_that_leave
from workbench.exporting.evidence import Reason, value_decisions
from workbench.exporting.listening import Heard, listening
from workbench.exporting.report import Exported, Option
from workbench.exporting.shapes import asked_labels, left_open
from workbench.exporting.wrappers import input_names
from workbench.files import Span, atomic_write, file_ref
from workbench.verification.comparison import ParityReport, parity
from workbench.verification.runners import evaluating, running
from workbench.verification.values import Call
from workbench.verification.variations import resized, variations

if TYPE_CHECKING:
    import torch

    from workbench.exporting.targets import Request


_BLOCK = 1 << 20
_SIZES = ("batch + 1", "length + 1")  # what `vary` calls them
_MANY = 1 << 26
_FAR = 2048  # sizes beyond are not tried: what such a run takes cannot be told
_NEAR = 1000  # limits: no tolerance should be asked for a difference beyond
_ROOM = "make room on the disk, or choose another folder"
_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


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
        dtypes = tuple(str(tensor.dtype).removeprefix("torch.") for tensor in request.example.tensors().values())
        self.done = Exported(
            self.target, str(path), dtypes=dtypes, opset_asked=request.opset_version, options=ignored(request, self.target)
        )
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
            except WriteError:
                raise
            except Exception as error:  # a stranger's exporter and a stranger's model: one target's end is never the others'
                advice = Advice(error.message, error.hint or "") if isinstance(error, WorkbenchError) else advise(error)
                done = replace(self.done, files={}, sha256=None, cause=advice.cause, cure=advice.cure, error=chain_text(error))
        return replace(done, log=self.log, notes=tuple(self.notes), seconds=time.perf_counter() - started)

    def heard(self, export: Callable[[], Any]) -> Any:
        """The result of `export`; what it prints, logs and warns goes to the log. A full disk is a WriteError, never an exporter's failure."""
        heard = Heard()
        try:
            with listening(heard), evaluating(self.request.model):  # a trace may leave tensors in the model where numbers were
                return export()
        except OSError as error:
            if error.errno not in _FULL or isinstance(error, WriteError):
                raise
            raise WriteError(f"the write failed: {error.strerror}; nothing was changed", path=str(self.path), hint=_ROOM) from error
        finally:
            self.log = "\n".join(text for text in (self.log, heard.text) if text)

    def refuse(self, advice: Advice, reasons: Sequence[Reason] | None, error: str) -> Failed:
        """The end of this export, with the places in the model that stand against it."""
        self.done = replace(self.done, reasons=tuple(reasons or ()))
        first = next((f" ({reason.where}: {reason.code})" for reason in reasons or () if reason.where), "")
        told = [f"draft_export: {reason.told}" for reason in reasons or ()]
        return Failed(Advice(advice.cause + first, advice.cure), "\n\n".join(filter(None, [error, *told])))

    def refuse_decisions(self, request: Request) -> None:
        """Raise where a value of the inputs left the tensors while tracing, or a size that hangs on values decided something."""
        left = self.heard(lambda: values_that_leave(request))
        if not left:
            return
        values = [reason for reason in left if reason.kind == VALUE]
        found = self.heard(lambda: value_decisions(request))
        told = "\n".join(reason.told for reason in left)
        if found or values:
            cure = "Write the branch with `torch.where` or `torch.cond`, or make the model scriptable: type its arguments and keep to TorchScript's Python."
            placed = any(reason.where for reason in found or ()) or not values
            raise self.refuse(Advice("tracing baked a decision that hangs on values", cure), found if placed else values, told)
        if found is None:
            cause = "tracing met sizes that hang on values, or another thread, and torch.export could not say whether they decide anything"
            raise self.refuse(Advice(cause, "Keep to sizes that the inputs' sizes give, or script the model."), left, told)
        self.notes += [f"While tracing, {reason.told}: {reason.what}." for reason in left if reason.kind == THREAD]

    def prove(self, candidate: Any, free: Mapping[tuple[int, int], int], *, traced: bool, any_size: bool) -> None:
        """Compare what was made with the model, on the example and beyond it.

        Args:
            candidate: what `parity` takes.
            free, any_size, traced: see `trials` and `prove`.
        """
        tried = trials(self.request, free, self.notes)
        report = prove(self.request, candidate, self.path.name, tried, traced=traced, any_size=any_size)
        outputs = self.done.outputs or {output.name: output.shape for output in report.outputs}
        made = (trial.inputs for trial in report.tried if not trial.left_out)
        self.done = replace(self.done, parity=report, tried=(*tried, *made), outputs=outputs)
        if not report:
            raise Failed(differs(report, traced=traced))
        self.notes += [f"{note}: return what it writes as a further output, if you need it." for note in report.notes]
        example = self.request.example
        with running(self.request.model) as model, running(candidate) as runner:
            runs = [lambda one=one: one(example.fresh()) for one in (model, runner)]
            self.done = replace(self.done, latency=dict(zip(("model", "file"), paced(runs, 11), strict=True)))

    def prove_sizes(self, request: Request, candidate: Any, wanted: Iterable[Sizes], of: str = "") -> None:
        """Other sizes that the model takes: what was made answers alike, or refuses them, which is told."""
        large: list[str] = []
        for name, call in at_sizes(request, wanted, large).items():
            report = parity(request.model, candidate, [call], rtol=request.rtol, atol=request.atol, by_position=True)
            if report:
                self.done = replace(self.done, sizes=(*self.done.sizes, of + name))
            elif any("failed on" in problem for problem in report.problems):
                self.notes.append(f"The program refuses {of}{name}, which the model takes: that size was fixed by the exporter.")
            else:
                raise Failed(_size_baked(f"{of}{name}"))

        if large:
            told = "; ".join(f"{of}{name}" for name in dict.fromkeys(large))
            self.notes.append(f"Not tried, for they are too large: {told}. There the model may take another way than the file.")

    def require_free(self, inputs: Mapping[str, tuple[int | str, ...]], outputs: Mapping[str, Any]) -> None:
        """Raise where an axis that was asked to be dynamic is a number in the file, or is not there."""
        cure = "Name an input and an axis it has, and remove what pins that axis in the model's code."
        for name in self.request.dynamic_axes or {}:
            if name not in inputs and name not in outputs:
                told = f"{name!r} is neither an input ({', '.join(inputs)}) nor an output ({', '.join(outputs)})"
                raise Failed(Advice(f"an axis asked to be dynamic is not in the file: {told}", cure))
        names = input_names(self.request)
        asked = [(names[number], axis) for number, axis in asked_labels(self.request)]
        asked += [(name, axis) for name, axes in (self.request.dynamic_axes or {}).items() if name in inputs for axis in axes]
        for name, axis in asked:
            shape = inputs[name]
            if not 0 <= axis < len(shape) or isinstance(shape[axis], int):
                told = f"axis {axis} of {name!r}, which is {list(shape)}"
                raise Failed(Advice(f"an axis asked to be dynamic is not dynamic in the file: {told}", cure))

    def tell_fixed(self, inputs: Mapping[str, tuple[int | str, ...]]) -> None:
        """Tell which axes were left open, and are numbers in the file."""
        names = input_names(self.request)
        fixed = [f"axis {axis} of {names[n]}" for n, axis in left_open(self.request) if isinstance(inputs[names[n]][axis], int)]
        if fixed:
            self.notes.append(f"Left open by Dim.AUTO, and fixed in the file: {', '.join(fixed)}.")

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


Sizes = Mapping[tuple[int, int], int]  # {(which tensor in order, axis): size}


def neighbours(request: Request) -> Iterator[Sizes]:
    """One longer and one shorter, of each group of axes of one size, and of each axis of such a group."""
    shapes = [tensor.shape for tensor in request.example.tensors().values()]
    groups: dict[int, list[tuple[int, int]]] = {}
    for number, shape in enumerate(shapes):
        for axis, size in enumerate(shape):
            if size:
                groups.setdefault(size, []).append((number, axis))
    leading = [(number, 0) for number, shape in enumerate(shapes) if shape]
    for axes in [leading, *groups.values(), *([axis] for held in groups.values() if len(held) > 1 for axis in held)]:
        for step in (1, -1):
            yield {(number, axis): shapes[number][axis] + step for number, axis in axes}


def at_sizes(request: Request, wanted: Iterable[Sizes], large: list[str]) -> dict[str, Call]:
    """The example at other sizes, by their names, as far as the model itself takes them; `large` gets the names of those that are too large."""
    found: dict[str, Call] = {}
    names, shapes = input_names(request), [list(tensor.shape) for tensor in request.example.tensors().values()]
    with running(request.model) as runner:
        for told in wanted:
            name = ", ".join(f"axis {axis} of {names[number]} at {size}" for (number, axis), size in told.items())
            grown = [[told.get((number, axis), size) for axis, size in enumerate(shape)] for number, shape in enumerate(shapes)]
            if min(told.values(), default=0) < 1 or name in found:
                continue
            if sum(map(math.prod, grown)) > _MANY or any(told[n, axis] > max(_FAR, shapes[n][axis] + 1) for n, axis in told):
                large.append(name)
                continue
            call = resized(request.example, told)
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
        report = parity(request.model, candidate, list(tried.values()), rtol=request.rtol, atol=request.atol, by_position=True, vary=traced)
    except UnsupportedError as error:
        cure = "Export a float32 copy (`model.float()`), or use `check=False` for a runtime that has what is missing."
        raise Failed(Advice(error.message, cure), str(error)) from error
    return replace(report, candidate=name)


def _size_baked(at: str) -> Advice:
    cause = f"the exporter baked a size or a loop count in: with {at} the file answers otherwise than the model"
    return Advice(cause, "Move what loops or branches by size out of the model or script it; or leave that axis fixed.")


def differs(report: ParityReport, *, traced: bool) -> Advice:
    apart = [trial.inputs for trial in report.tried if not trial.ok]
    if apart and apart[0] in _SIZES and not report.problems and all(output.ok for output in report.outputs):
        return _size_baked(apart[0])
    cause = f"the file does not answer as the model does: {report.headline}"
    if any("writes into its input" in problem for problem in report.problems):
        return Advice(cause, "Return what it writes as a further output, or write into a copy (`cache = cache.clone()`).")
    if "at random" in report.cause or "dropout is left on" in report.cause:
        return Advice(cause, "Draw only while the model trains (`F.dropout(x, p, self.training)`), or take what is drawn as an input.")
    if any("keeps state" in problem for problem in report.problems):
        return Advice(cause, "Make the state an argument and an output of `forward`; a graph keeps nothing between calls.")
    if traced:
        return Advice(cause, "Tracing bakes branches and sizes in: write them with `torch.where` or `torch.cond`.")
    if all(o.problem or (o.figures and o.limit and (o.figures.max_abs or 0.0) <= _NEAR * o.limit) for o in report.outputs if not o.ok):
        return Advice(cause, "If a difference of that size is acceptable, say so with `rtol` and `atol`.")
    return Advice(cause, "Write it with `check=False` and ask `first_divergence(model, its path, inputs)` for the layer that goes wrong.")


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


def ignored(request: Request, target: str) -> tuple[Option, ...]:
    """The options asked for that a target has no use for: ONNX alone gives every tensor a name of its own and a graph to be folded."""
    if target == "onnx":
        return ()
    names = ("input_names", "output_names", "opset_version", "custom_translation_table")
    asked = {name: getattr(request, name) for name in names} | {
        "dynamic_shapes": request.dynamic_shapes if target == "torchscript" else None
    }
    kept = {"export_params": request.export_params, "do_constant_folding": request.do_constant_folding}
    asked |= {name: value for name, value in kept.items() if not value}
    return tuple(
        Option(name, value if value is False else str(value), f"{target} has no such option", False)
        for name, value in asked.items()
        if value is not None
    )


def paced(runs: Sequence[Callable[[], Any]], rounds: int) -> list[float]:
    """Seconds of each one's fastest run, after a warm-up, turn about, so that a busy machine troubles all alike; fewer rounds past 2 s."""
    for run in [*runs, *runs, *runs]:  # TorchScript compiles in its second run
        run()
    taken: list[list[float]] = [[] for _ in runs]
    ends = time.perf_counter() + 2
    for _ in range(rounds):
        for run, seconds in zip(runs, taken, strict=True):
            started = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - started)
        if time.perf_counter() > ends:
            break
    return [min(seconds) for seconds in taken]


def write(made: Path, data: bytes) -> None:
    """A program's bytes to the disk, by us: torch's own writer ends the whole process where the disk is full."""
    with atomic_write(made) as out:
        out.write(data, 0)


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
