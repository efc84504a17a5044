"""Layers: where do two forms of one model first part, and by how much at each layer?

Owns the order of the search, the verdict per layer, and its report. Taps come from `taps`, limits from `tolerance`: each layer is held
against its own rounding, measured in float64 at that layer. A difference is a falsy report. Another kind of candidate is one class
like `_GraphSearch`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from workbench.errors import BudgetError, SelectionError, visible
from workbench.formats import save as save_file
from workbench.report import Report
from workbench.tables import Column, Table, format_bytes, table
from workbench.verification.measures import Figures, Meter, Spread, spread
from workbench.verification.programs import load_program
from workbench.verification.runners import running
from workbench.verification.taps import TappedGraph, TappedModule
from workbench.verification.tolerance import NoiseFloor, noise_floor
from workbench.verification.values import Call, calls_from

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BLOCK = 1 << 20  # elements that a Meter holds at once, in some ten float64 copies
_SAMPLE = 20_000  # pairs that a Meter keeps


@dataclass(frozen=True)
class Layer:
    """One tensor of one layer, on both sides.

    Attributes:
        name: its module; later calls `act#2`, further tensors `lstm[1.0]`.
        kind: class of the module.
        max_abs: largest |candidate - reference| over finite pairs; None where there is none.
        relative: ‖candidate - reference‖₂ / ‖reference‖₂; None where the reference is zero.
        limit, reason: largest difference that rounding explains at this layer, and where it comes from.
        ok: within it.
        value: where the candidate holds it: a value of the graph, or "".
        note: what qualifies the verdict, or "".
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    max_abs: float | None
    relative: float | None
    limit: float
    reason: str
    ok: bool
    value: str = ""
    note: str = ""


@dataclass(frozen=True, repr=False)
class LayersReport(Report):
    """Where a candidate first parts from its reference. `bool(report)`: no layer lies past its limit.

    Attributes:
        reference, candidate: their names.
        layers: in the order in which the reference's layers end, so that a block follows its parts.
        first: the first layer past its limit though what it is computed from is within; or None.
        between: for a graph, the nodes from the nearest agreeing values to that layer's: the difference arises in one of them.
        pairing: how layers were paired.
        unpaired: layers that the candidate has no value for.
        problems: what stopped the comparison, in words.
        saved: the file with that layer's inputs and both outputs, or None.
    """

    reference: str
    candidate: str
    layers: tuple[Layer, ...]
    first: str | None
    pairing: str
    between: tuple[str, ...] = ()
    unpaired: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    saved: str | None = None

    @property
    def ok(self) -> bool:
        return bool(self.layers) and all(layer.ok for layer in self.layers) and not self.problems

    @property
    def headline(self) -> str:
        pair, count = f"{visible(self.candidate)} and {visible(self.reference)}", len(self.layers)
        unseen = [visible(layer.name) for layer in self.layers if layer.note]
        but = f"; {unseen[0]} differs, and nothing computed from it does ({len(unseen)} such)" if unseen else ""
        if self.ok:
            return f"{pair} agree within rounding at {count - len(unseen)} of {count} layer outputs{but}."
        past = [layer for layer in self.layers if not layer.ok]
        found = next((layer for layer in past if layer.name.partition("[")[0] == self.first), None)
        causes = [visible(problem) for problem in self.problems[:1]]
        if found is not None:
            apart = "values that are NaN or infinite on one side" if found.max_abs is None else f"{found.max_abs:.2g}"
            causes.append(f"by {apart} where rounding explains {found.limit:.2g} ({len(past)} of {count} layer outputs are past theirs)")
            return f"{pair} first part at {visible(found.name)} ({found.kind}): {'; '.join(causes)}."
        return f"{pair} differ: {'; '.join(causes)}."

    def tables(self) -> tuple[Table, ...]:
        tables = [table("layers", _COLUMNS, (self._row(layer) for layer in self.layers))]
        remarks = [*self.problems, f"Layers are paired {self.pairing}."]
        if self.between:
            remarks.append(f"It arises in one of these nodes: {', '.join(self.between)}.")
        if self.unpaired:
            remarks.append(f"The candidate has no value of its own for {', '.join(self.unpaired)}: fused into what follows, or left out.")
        if self.saved:
            remarks.append(f"The layer's inputs and both outputs are in {self.saved}.")
        tables.append(table("remarks", [Column("what", "text")], [(text,) for text in remarks]))
        return tuple(tables)

    def plot(self) -> Figure:
        """The error of each layer beside what rounding explains there."""
        from workbench.render import plots

        if not self.layers:
            raise SelectionError("no layer was compared, so there is nothing to draw", hint="its tables() say why")
        return plots.layer_errors([(layer.name, layer.max_abs, layer.limit, layer.ok) for layer in self.layers], self.headline)

    def _row(self, layer: Layer) -> tuple[object, ...]:
        mark = "⚠" if not layer.ok else "?" if layer.note else "✓"
        note = "first" if layer.name.partition("[")[0] == self.first and not layer.ok else layer.note or None
        return (layer.name, mark, layer.kind, layer.shape, layer.max_abs, layer.relative, layer.limit, note)


_COLUMNS = (
    Column("layer", "name", "in the order in which the layers end"),
    Column("", "mark"),
    Column("kind"),
    Column("shape", "shape"),
    Column("max abs", "number", "largest |candidate − reference|"),
    Column("relative", "number", "‖candidate − reference‖ / ‖reference‖"),
    Column("limit", "number", "largest difference that rounding explains here"),
    Column("note"),
)


def first_divergence(
    reference: torch.nn.Module,
    candidate: torch.nn.Module | str | os.PathLike[str],
    inputs: object,
    *,
    max_ram_mb: int = 512,
    save: str | os.PathLike[str] | None = None,
    trust: bool = False,
) -> LayersReport:
    """Find the first layer whose output differs by more than rounding, although its inputs do not.

    Args:
        reference: a module; run in eval mode and given back as it was, like the candidate.
        candidate: a module whose layers have the same names (a quantized or a damaged copy), or the path of an `.onnx` or `.pt2` file
            exported from the reference.
        inputs: one batch: a tensor, a tuple of arguments or a dict of keyword arguments.
        max_ram_mb: MB for what is held of layers at once, on both sides and in float64; beside the models and what their runs take.
        save: write the layer's inputs (`input.0`, …) and both outputs (`reference`, `candidate`) there: .safetensors or .pt.
        trust: run a `.pt2` that this process did not write, once a scan finds nothing dangerous in it.
    Returns:
        A report that is true when no layer is past its limit: 8 × its own rounding, see `tolerance`. In a graph, a layer that
        differs while all that is computed from it agrees is marked `?` and fails nothing: its scope ends in another value.
    Raises:
        SelectionError: the inputs cannot serve, the reference does not run, or no layer pairs.
        BudgetError: one layer alone takes more than max_ram_mb.
        UnsupportedError: ONNX Runtime or torch cannot load the file. UntrustedError: see `trust`.
    Cost: one run to learn the shapes; then, for each chunk of layers that fits, a run of reference, its float64 copy (up to 1 GiB) and
        candidate, a session for a graph, and up to 16 runs more where a layer has under 256 values. Modules run as often again for
        the inputs of layers past their limit, until one agrees.
    """
    if not isinstance(reference, torch.nn.Module) or isinstance(reference, torch.jit.ScriptModule):
        raise SelectionError(f"the reference is a {type(reference).__name__}; layers are tapped in an nn.Module")
    (call, *more) = calls_from(inputs)
    if more:
        raise SelectionError(f"{1 + len(more)} batches were given", hint="pass the one on which parity fails")
    if isinstance(candidate, (str, os.PathLike)) and Path(candidate).suffix.lower() == ".onnx":
        return _GraphSearch(reference, TappedGraph(Path(candidate)), call, max_ram_mb * 10**6).report(save)
    name = type(candidate).__name__
    if isinstance(candidate, (str, os.PathLike)):
        name, candidate = Path(candidate).name, load_program(candidate, trust=trust, layers=True)
    if not isinstance(candidate, torch.nn.Module) or isinstance(candidate, torch.jit.ScriptModule):
        told = "TorchScript runs its layers out of reach" if isinstance(candidate, torch.nn.Module) else "it is no module"
        raise SelectionError(f"the candidate has no layers to tap: {told}", hint="pass an nn.Module, or the path of an .onnx or .pt2 file")
    return _ModuleSearch(reference, candidate, call, max_ram_mb * 10**6, (type(reference).__name__, name)).report(save)


class _Search:
    """One search in progress: what there is to tap, and how it is measured under the cap. A subclass knows its candidate."""

    def __init__(self, reference: torch.nn.Module, call: Call, budget: int, names: tuple[str, str]) -> None:
        self.reference, self.call, self.budget = reference, call, budget
        self.names = names if names[0] != names[1] else (f"{names[0]} (reference)", f"{names[1]} (candidate)")
        self.root, self.problem = type(reference).__name__, ""
        plan = TappedModule(reference, [self.root], self.root)
        with running(plan) as runner:
            try:
                runner(call.fresh())
            except Exception as error:  # a stranger's forward: whatever it raises, these inputs cannot serve
                raise SelectionError(f"{names[0]} does not run on these inputs: {type(error).__name__}: {error}") from error
        self.taps = plan.taps
        self.outputs = [key for key, tap in self.taps.items() if not tap.is_input]
        self.paired, self.pairing = self.pair()

    def pair(self) -> tuple[dict[str, str], str]:
        """{output: where the candidate holds it}, and how that was told."""
        raise NotImplementedError

    def answers(self, keys: list[str]) -> dict[str, torch.Tensor]:
        """The candidate's values, for those it has."""
        raise NotImplementedError

    def blame(self, rows: list[Layer]) -> tuple[list[Layer], str | None, tuple[str, ...]]:
        """The rows as judged beside each other, the first layer at fault, and the nodes it lies in."""
        raise NotImplementedError

    def inputs(self, layer: str) -> list[str]:
        return [key for key, tap in self.taps.items() if tap.layer == layer and tap.is_input]

    def report(self, save: str | os.PathLike[str] | None) -> LayersReport:
        rows = list(self.measure([key for key in self.outputs if key in self.paired]))
        if not rows and not self.problem:
            raise SelectionError(f"no layer of {self.names[0]} pairs with one of {self.names[1]}", hint="compare the two with parity")
        rows, first, between = self.blame(rows)
        saved = self._save(first, save) if first is not None and save is not None else None
        met = {self.taps[row.name].layer for row in rows}
        unpaired = dict.fromkeys(layer for layer in (self.taps[key].layer for key in self.outputs) if layer not in met)
        problems = (self.problem,) if self.problem else ()
        return LayersReport(*self.names, tuple(rows), first, self.pairing, between, tuple(unpaired), problems, saved)

    def measure(self, keys: list[str]) -> Iterator[Layer]:
        """Each tap compared, in order; what is held at once stays under the cap."""
        for chunk in self._chunks(keys):
            tapped = TappedModule(self.reference, chunk, self.root)
            with running(tapped) as reference, noise_floor(tapped) as floor:
                expected = reference(self.call.fresh())
                undecided = floor.add(self.call, expected, {}, "1")
                found, meters, apart = self.answers(chunk), dict[str, Meter](), dict[str, Spread]()
                for key in [key for key in chunk if key in found]:
                    ours, theirs = expected.pop(key), found.pop(key)
                    if ours.shape != theirs.shape or ours.is_floating_point() != theirs.is_floating_point():
                        continue  # another value than the layer's, such as a quantized one
                    if key in undecided:  # whole numbers that the reference's own rounding decides
                        theirs = theirs.where(~undecided[key], ours.to(theirs.dtype))
                    meters[key] = Meter()
                    meters[key].add(ours, theirs)
                    apart[key] = spread(ours, theirs)
                floor.add_nearby(reference, self.call, {}, "1")
            yield from (self._judge(key, meter.figures(), apart[key], floor) for key, meter in meters.items())

    def _judge(self, key: str, f: Figures, apart: Spread, floor: NoiseFloor) -> Layer:
        tap = self.taps[key]
        if tap.dtype.is_floating_point or tap.dtype.is_complex:
            limit = floor.judge(key, tap.dtype, apart, "1")
            bound, reason, within = limit.value, limit.reason, limit.ratio <= 1
        else:
            bound, reason, within = 0.0, "whole numbers and booleans must be equal", not f.unequal
        ok, value = within and not f.one_sided, self.paired.get(key, "")
        return Layer(key, tap.kind, tap.shape, f.max_abs, f.relative, bound, reason, ok, value)

    def _chunks(self, keys: list[str]) -> Iterator[list[str]]:
        chunk: list[str] = []
        held = working = 0
        for key in keys:
            own, work = self._needs(key)
            if own + work > self.budget:
                told = f"{key} alone takes {format_bytes(own + work)}, more than max_ram_mb={self.budget // 10**6}"
                raise BudgetError(told, hint=f"use max_ram_mb={(own + work) // 10**6 + 1}, or a smaller batch")
            if chunk and held + own + max(working, work) > self.budget:
                yield chunk
                chunk, held, working = [], 0, 0
            chunk.append(key)
            held, working = held + own, max(working, work)
        if chunk:
            yield chunk

    def _needs(self, key: str) -> tuple[int, int]:
        """Bytes that a tap holds through a chunk, on top of that while it is measured; both as measured in fresh processes.

        Held at once are the reference, and it in float64 and with its sums reordered, or twice the candidate; as much again is lost in
        gaps, for the C library keeps freed blocks of under 32 MB.
        """
        tap, wide = self.taps[key], 16 if self.taps[key].dtype.is_complex else 8
        count = math.prod(tap.shape)
        held = count * (2 * tap.dtype.itemsize + max(wide, tap.dtype.itemsize)) * 2 + 16 * min(count, _SAMPLE)
        return held, 6 * wide * count + 10 * wide * min(count, _BLOCK)

    def _save(self, layer: str, path: str | os.PathLike[str]) -> str:
        """Write the layer's inputs and both outputs."""
        outputs = [key for key in self.outputs if self.taps[key].layer == layer and key in self.paired]
        inputs = self.inputs(layer)
        with running(TappedModule(self.reference, [*inputs, *outputs], self.root)) as reference:
            ours = reference(self.call.fresh())
        theirs = self.answers(outputs)
        held = {f"input.{key.removeprefix(layer + '<')}": ours[key] for key in inputs}
        for side, values in (("reference", ours), ("candidate", theirs)):
            held |= {side + key.removeprefix(layer): values[key] for key in outputs if key in values}
        save_file(held, path)
        return str(path)


class _ModuleSearch(_Search):
    def __init__(self, reference: torch.nn.Module, candidate: torch.nn.Module, call: Call, budget: int, names: tuple[str, str]) -> None:
        self.candidate = candidate
        super().__init__(reference, call, budget, names)

    def pair(self) -> tuple[dict[str, str], str]:
        return dict.fromkeys(self.outputs, ""), "by the names of their modules"

    def answers(self, keys: list[str]) -> dict[str, torch.Tensor]:
        tapped = TappedModule(self.candidate, keys, self.root)
        with running(tapped) as runner:
            try:
                return runner(self.call.fresh())
            except SelectionError:  # none of these layers was met
                return {}
            except Exception as error:  # a stranger's forward: that it fails is the finding, and what it reached is compared
                first = next(iter(str(error).splitlines()), "")
                self.problem = f"{self.names[1]} failed ({type(error).__name__}: {first})"
        return tapped.values

    def blame(self, rows: list[Layer]) -> tuple[list[Layer], str | None, tuple[str, ...]]:
        """The first layer past its limit whose inputs are within theirs: they are tapped on both sides and measured like outputs."""
        past = list(dict.fromkeys(self.taps[row.name].layer for row in rows if not row.ok))
        bare = next((i for i, layer in enumerate(past) if not self.inputs(layer)), len(past))
        keys = [key for layer in past[:bare] for key in self.inputs(layer)]
        for layer, taken in groupby(self.measure(keys), key=lambda row: self.taps[row.name].layer):
            if all(row.ok for row in taken):
                return rows, layer, ()
        return rows, next(iter([*past[bare:], *past]), None), ()


class _GraphSearch(_Search):
    def __init__(self, reference: torch.nn.Module, graph: TappedGraph, call: Call, budget: int) -> None:
        self.graph = graph
        super().__init__(reference, call, budget, (type(reference).__name__, graph.name))

    def pair(self) -> tuple[dict[str, str], str]:
        firsts = {key: self.taps[key] for key in self.outputs if self.taps[key].module and key == self.taps[key].layer}
        found, how = self.graph.pair(dict(self.reference.named_modules()), firsts)
        whole = [key for key in self.outputs if not self.taps[key].module]
        self.whole = dict(zip(whole, self.graph.outputs, strict=True)) if len(whole) == len(self.graph.outputs) else {}
        return found | self.whole, how

    def answers(self, keys: list[str]) -> dict[str, torch.Tensor]:
        """Inner values from the graph as it stands; the whole model's outputs as it is deployed, optimized."""
        inner = {key: self.paired[key] for key in keys if key not in self.whole}
        found = self.graph.values(self.call, list(dict.fromkeys(inner.values()))) if inner else {}
        answered = self.graph(self.call) if len(inner) < len(keys) else {}
        return {key: found[inner[key]] if key in inner else answered[self.whole[key]] for key in keys}

    def blame(self, rows: list[Layer]) -> tuple[list[Layer], str | None, tuple[str, ...]]:
        """The first layer past its limit, but for those whose difference goes no further, by the edges of the graph."""
        values = {row.value for row in rows}
        edges = {value: self.graph.between(value, values) for value in values}
        within = values - {row.value for row in rows if not row.ok}
        for row in reversed(rows):  # from the outputs: a difference that nothing downstream sees is no layer's fault
            users = {value for value, (sources, _) in edges.items() if row.value in sources}
            if users and users <= within and row.name not in self.whole:
                within.add(row.value)
        word = "all that is computed from it agrees: it cancels, or the graph holds another value here"
        judged = [row if row.ok or row.value not in within else replace(row, ok=True, note=word) for row in rows]
        first = next((row for row in judged if not row.ok), None)  # all that it is computed from ended before it, and is within
        return judged, self.taps[first.name].layer if first else None, edges[first.value][1] if first else ()
