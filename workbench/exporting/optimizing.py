"""A TorchScript file made faster: frozen, optimized for inference, proved equal, and timed before and after."""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.errors import SelectionError, UnsupportedError, visible
from workbench.exporting.engine import InferenceEngine
from workbench.exporting.listening import Heard, listening
from workbench.exporting.proving import digest_of, put_in_place, workplace
from workbench.report import Report
from workbench.tables import Column, Table, table
from workbench.verification.comparison import ParityReport, parity
from workbench.verification.programs import load_program, remember

if TYPE_CHECKING:
    import torch
    from matplotlib.figure import Figure


@dataclass(frozen=True, repr=False)
class OptimizeReport(Report):
    """A TorchScript file before and after: bytes, median seconds of one run, parity, and what was not done. False where they differ."""

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
            return f"{visible(self.path)} was not optimized: {self.parity.headline}"
        times = self.seconds_before / self.seconds_after
        pace = f"{times:.2g} times as fast" if times >= 1 else f"slower, {1 / times:.2g} times as long a run"
        return f"{visible(self.out)} answers as {visible(self.path)} does and is {pace}."

    def tables(self) -> tuple[Table, ...]:
        columns = [Column("", "text"), Column("file", "name"), Column("bytes", "bytes"), Column("seconds", "seconds", "median of one run")]
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

    program, target = load_program(path, trust=trust), Path(os.path.realpath(out))
    if not isinstance(program, torch.jit.ScriptModule):
        raise UnsupportedError("only TorchScript is optimized this way", path=str(path), hint="a .pt2 runs through torch.compile instead")
    if program.training:
        raise SelectionError(
            "the program was saved in train mode", path=str(path), hint="export the model again: export_model uses eval mode"
        )
    batches = inputs if isinstance(inputs, list) else [inputs]
    with workplace(target) as folder:
        made = folder / target.name
        faster, note = _faster(program, made, str(path))
        report = parity(program, faster, inputs)
        before, after = _paced([InferenceEngine(path, trust=trust), InferenceEngine(made)], batches[0], rounds)
        sizes = put_in_place(made, target)[0] if report else {}
    return OptimizeReport(str(path), str(target), Path(path).stat().st_size, sizes.get(target.name), before, after, report, note)


def _paced(engines: list[InferenceEngine], batch: Any, rounds: int) -> list[float]:
    """Median seconds of one run of each, turn about, so that a busy machine troubles both alike."""
    taken: list[list[float]] = [[] for _ in engines]
    for engine in engines:
        engine.warm_up(batch)
    for _ in range(rounds):
        for engine, seconds in zip(engines, taken, strict=True):
            started = time.perf_counter()
            engine.predict(batch)
            seconds.append(time.perf_counter() - started)
    return [statistics.median(seconds) for seconds in taken]


def _faster(program: torch.jit.ScriptModule, made: Path, path: str) -> tuple[torch.nn.Module, str]:
    """The program frozen and optimized, written to `made` and loaded back; frozen alone, and why, where torch cannot load the other."""
    import torch

    with listening(Heard()):
        try:
            frozen = torch.jit.freeze(program)
        except RuntimeError as error:
            raise UnsupportedError(f"torch cannot freeze it: {next(iter(str(error).splitlines()), '')}", path=path) from error
        try:
            torch.jit.optimize_for_inference(program).save(str(made))
            remember(digest_of(made))
            return load_program(made), ""
        except (RuntimeError, UnsupportedError) as error:
            told = error.message if isinstance(error, UnsupportedError) else next(iter(str(error).splitlines()), "")
            frozen.save(str(made))
    remember(digest_of(made))
    kept = "It is frozen only; call torch.jit.optimize_for_inference on it after loading."
    return load_program(made), f"What optimize_for_inference makes of it cannot be stored here ({told}). {kept}"
