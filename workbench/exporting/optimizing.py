"""A TorchScript file made faster: frozen, optimized for inference, proved equal, and timed before and after."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.errors import SelectionError, UnsupportedError, visible
from workbench.exporting.engine import InferenceEngine, whole
from workbench.exporting.listening import Heard, listening
from workbench.exporting.proving import digest_of, paced, put_in_place, workplace, write
from workbench.report import Report
from workbench.tables import Column, Table, table
from workbench.verification.comparison import ParityReport, parity
from workbench.verification.programs import load_program, remember

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure


_ALIKE = 0.05  # times nearer than that are told as no difference


@dataclass(frozen=True, repr=False)
class OptimizeReport(Report):
    """A TorchScript file before and after: bytes, seconds of the fastest run, parity, and what was not done. False where they differ."""

    path: str
    out: str
    nbytes_before: int
    nbytes_after: int | None
    seconds_before: float
    seconds_after: float
    parity: ParityReport
    note: str = ""

    @property
    def ok(self) -> bool:
        return self.parity.ok

    @property
    def headline(self) -> str:
        if not self.ok:
            return f"{visible(Path(self.path).name)} was not optimized: {self.parity.headline}"
        times = self.seconds_before / self.seconds_after
        pace = f"{times:.3g} times as fast" if times > 1 + _ALIKE else f"slower, {1 / times:.3g} times as long a run"
        pace = "no faster" if abs(times - 1) <= _ALIKE else pace
        return f"{visible(Path(self.out).name)} answers as {visible(Path(self.path).name)} does and is {pace}."

    def tables(self) -> tuple[Table, ...]:
        columns = [Column("", "text"), Column("file", "name"), Column("bytes", "bytes"), Column("seconds", "seconds", "the fastest run")]
        rows = [("before", self.path, self.nbytes_before, self.seconds_before), ("after", self.out, self.nbytes_after, self.seconds_after)]
        remarks = (table("remarks", [Column("what", "text")], [(self.note,)]),) if self.note else ()
        return (table("files", columns, rows), *remarks, *self.parity.tables()[:1])

    def plot(self) -> Figure:
        return self.parity.plot()


def optimize_torchscript(
    path: str | os.PathLike[str], out: str | os.PathLike[str], inputs: Any, *, trust: bool = False, rounds: int = 50
) -> OptimizeReport:
    """Freeze a TorchScript file and optimize it for inference on this machine.

    Args:
        path: a TorchScript file in eval mode; out: where the faster one goes, written only if it answers alike.
        inputs: what it is called with, as for `parity`; several batches are all compared, the first is timed.
        trust: run a program that this process did not write, once a scan finds nothing dangerous in it.
        rounds: timed runs of each.
    Returns:
        A report with speed, size and parity before and after. Folded batch norms and fused operators move results by rounding.
    Raises:
        UntrustedError: see `trust`. UnsupportedError: no TorchScript, or it cannot be frozen. SelectionError: it is in train mode.
    Source: torch.jit.freeze and torch.jit.optimize_for_inference, torch 2.13. The result is fixed to this kind of machine.
    """
    import torch

    rounds = whole(rounds, "rounds", 1)
    program, target = load_program(path, trust=trust), Path(os.path.realpath(out))
    if not isinstance(program, torch.jit.ScriptModule):
        raise UnsupportedError("only TorchScript is optimized this way", path=str(path), hint="a .pt2 runs through torch.compile instead")
    if getattr(program, "training", False):  # a frozen program has no mode
        raise SelectionError(
            "the program was saved in train mode", path=str(path), hint="export the model again: export_model uses eval mode"
        )
    batches = inputs if isinstance(inputs, list) else [inputs]
    with workplace(target) as folder:
        made = folder / target.name
        faster, note = _faster(program, made, str(path))
        report = parity(program, faster, inputs)
        engines = [InferenceEngine(path, trust=trust), InferenceEngine(made)]
        before, after = paced([lambda engine=engine: engine.predict(batches[0]) for engine in engines], rounds)  # type: ignore[misc]
        sizes = put_in_place(made, target)[0] if report else {}
    return OptimizeReport(str(path), str(target), Path(path).stat().st_size, sizes.get(target.name), before, after, report, note)


def _faster(program: torch.jit.ScriptModule, made: Path, path: str) -> tuple[torch.nn.Module, str]:
    """The program frozen and optimized, written to `made` and loaded back; frozen alone where torch cannot load the other. And remarks."""
    import torch

    was_frozen = not hasattr(program, "training")
    left_out = [] if was_frozen else [name for name in program._c._method_names() if name != "forward"]
    remarks = ["It was frozen already."] if was_frozen else []
    remarks += [f"Only forward is in it: {visible(', '.join(left_out))} is left out."] if left_out else []
    with listening(Heard()):
        try:
            frozen = (program if was_frozen else torch.jit.freeze(program)).save_to_buffer()
        except RuntimeError as error:
            raise UnsupportedError(f"torch cannot freeze it: {next(iter(str(error).splitlines()), '')}", path=path) from error
        try:
            copy: Any = _stored(made, frozen)  # what is frozen is optimized in place, and `program` is what it is compared with
            return _stored(made, torch.jit.optimize_for_inference(copy).save_to_buffer()), " ".join(remarks)
        except (RuntimeError, UnsupportedError) as error:
            told = error.message if isinstance(error, UnsupportedError) else next(iter(str(error).splitlines()), "")
    remarks.append(f"What optimize_for_inference makes of it cannot be stored here ({told}).")
    remarks.append("It is frozen only; call torch.jit.optimize_for_inference on it after loading.")
    return _stored(made, frozen), " ".join(remarks)


def _stored(made: Path, data: bytes) -> torch.nn.Module:
    write(made, data)
    remember(digest_of(made))
    return load_program(made)
