"""Inference: one artefact, called like the model it was made from.

An `.onnx` file runs in ONNX Runtime; TorchScript and `.pt2` files run in torch under the trust rule of `verification.programs`. Inputs are
checked against what the artefact says of itself before anything runs.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.errors import SelectionError, visible
from workbench.files import file_ref
from workbench.report import Report
from workbench.tables import Column, Table, table
from workbench.verification.programs import load_program
from workbench.verification.runners import onnx_session, to_numpy
from workbench.verification.values import Call, calls_from, map_tensors

if TYPE_CHECKING:
    import torch

_PREFERRED = ("CUDAExecutionProvider", "CPUExecutionProvider")
_ELEMENTS = {"float": "float32", "double": "float64", "string": "str"}  # ONNX Runtime's words for what numpy calls otherwise


@dataclass(frozen=True)
class Port:
    """An input or output: its name, element type as numpy spells it, and shape; a text axis takes any size. None: it does not say."""

    name: str
    dtype: str | None
    shape: tuple[int | str, ...] | None

    def __str__(self) -> str:
        shape = "" if self.shape is None else f" [{', '.join(map(str, self.shape))}]"
        return f"{visible(self.name)}: {self.dtype or 'any type'}{shape}"


class InferenceEngine:
    """Runs an exported model.

        engine = workbench.InferenceEngine("model.onnx")
        engine(x)                                      tensors in, tensors out; arrays in, arrays out
        engine.predict_batch(images, batch_size=32)    one answer per item, in order

    Attributes:
        inputs, outputs: what the artefact takes and gives, as `Port`s.
        provider: the execution provider really used, or `torch` and its device.
        notes: what was asked and could not be had, in sentences.
    """

    def __init__(
        self,
        source: str | os.PathLike[str] | bytes,
        providers: Sequence[str] | None = None,
        *,
        threads: int | None = None,
        trust: bool = False,
    ) -> None:
        """Load an artefact.

        Args:
            source: the path of an `.onnx`, TorchScript or `.pt2` file, or the bytes of an ONNX graph without external data.
            providers: ONNX Runtime's execution providers, best first; by default CUDA where there is one, then the CPU.
            threads: of one operator; None is the runtime's own choice.
            trust: run a program that this process did not write, once a scan finds nothing dangerous in it.
        Raises:
            SelectionError: none of the providers is installed, or they were asked for a torch program.
            UntrustedError: a program that is not trusted. UnsupportedError: the runtime cannot load the file.
        """
        self.notes: list[str] = []
        self.outputs: tuple[Port, ...] = ()
        self.name = "the graph" if isinstance(source, bytes) else Path(source).name
        if isinstance(source, bytes) or Path(source).suffix.lower() == ".onnx":
            self._run = self._open_graph(source, providers, threads)
        else:
            if providers is not None or threads is not None:
                raise SelectionError("providers and threads belong to ONNX Runtime, and this is no .onnx file")
            program = load_program(source, trust=trust)
            self.provider, self.inputs = "torch (cpu)", _ports(program)
            self._run = lambda call: self._answer(program, call)

    def _open_graph(self, source: str | os.PathLike[str] | bytes, providers: Sequence[str] | None, threads: int | None) -> Any:
        import onnxruntime

        if not isinstance(source, bytes):
            file_ref(source)
        installed = onnxruntime.get_available_providers()
        asked = list(providers or [name for name in _PREFERRED if name in installed])
        usable = [name for name in asked if name in installed]
        if not usable:
            raise SelectionError(f"none of {', '.join(asked)} is installed", hint=f"there is {', '.join(installed)}")
        self.notes += [f"{name} is not installed here." for name in asked if name not in usable]
        session = onnx_session(source, threads, usable)
        self.provider = str(session.get_providers()[0])
        if self.provider != usable[0]:
            self.notes.append(f"{usable[0]} could not be started, so {self.provider} runs it.")
        self.inputs, self.outputs = tuple(map(_port, session.get_inputs())), tuple(map(_port, session.get_outputs()))
        names = [port.name for port in self.outputs]

        def run(call: Call) -> Any:
            answers = session.run(names, self._feeds(call))
            return answers[0] if len(answers) == 1 else tuple(answers)

        return run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The artefact's answer, as the model would give it.

        Args:
            args, kwargs: tensors or arrays, in order or by the names of `inputs`.
        Returns:
            One output, or a tuple of them in order; torch tensors where the first input was one, otherwise numpy arrays.
        Raises:
            SelectionError: too few or too many inputs, another element type, or a shape that the artefact does not take.
        """
        import torch

        (call,) = calls_from(Call(args, kwargs))
        answer = self._run(call)
        given = next((value for value in (*args, *kwargs.values()) if hasattr(value, "shape")), None)
        if isinstance(given, torch.Tensor):
            return _mapped(answer, lambda value: value if isinstance(value, torch.Tensor) else torch.from_numpy(value))
        return _mapped(answer, lambda value: value.numpy() if isinstance(value, torch.Tensor) else value)

    def predict(self, inputs: Any) -> Any:
        """As a call, on one value: a tensor or array, a tuple of them, or a dict by name."""
        if isinstance(inputs, dict):
            return self(**inputs)
        return self(*inputs) if isinstance(inputs, tuple) else self(inputs)

    def predict_batch(self, items: Iterable[Any], batch_size: int = 32) -> list[Any]:
        """One answer per item, in order.

        Args:
            items: single inputs without a batch axis: tensors or arrays, or tuples or dicts of them; any iterable, read as it goes.
            batch_size: items per run; a graph with a fixed batch axis is run at its own size, the last batch filled up by repeating.
        Returns:
            A list as long as the items.
        Raises:
            SelectionError: batch_size below one, or items that do not stack.
        Cost: one run per batch; a batch of inputs and all answers are held.
        """
        if batch_size < 1:
            raise SelectionError(f"batch_size is {batch_size}; at least one item is run at a time")
        fixed = next((port.shape[0] for port in self.inputs if port.shape and isinstance(port.shape[0], int)), None)
        size, answers = fixed or batch_size, list[Any]()
        iterator = iter(items)
        while held := list(islice(iterator, size)):
            filled = held + held[-1:] * (size - len(held)) if fixed else held
            answer = self.predict(_stacked(filled))
            answers += [_mapped(answer, lambda value, i=i: value[i]) for i in range(len(held))]
        return answers

    def warm_up(self, inputs: Any, runs: int = 3) -> InferenceEngine:
        """Run a few times, so that the first real answer does not pay for what is prepared once; returns itself."""
        for _ in range(runs):
            self.predict(inputs)
        return self

    def latency(self, inputs: Any, rounds: int = 50) -> LatencyReport:
        """How long a run takes, after a warm-up.

        Args:
            inputs: as for `predict`; at least 11 rounds.
        """
        if rounds < 11:
            raise SelectionError(f"{rounds} rounds are too few for a percentile", hint="use at least 11")
        self.warm_up(inputs)
        taken = []
        for _ in range(rounds):
            started = time.perf_counter()
            self.predict(inputs)
            taken.append(time.perf_counter() - started)
        median, p90, p99 = (_percentile(taken, percent) for percent in (50, 90, 99))
        return LatencyReport(self.name, self.provider, rounds, median, p90, p99, statistics.fmean(taken))

    def __repr__(self) -> str:
        lines = [f"InferenceEngine over {visible(self.name)}, run by {self.provider}"]
        lines += [f"  {way} {port}" for way, ports in (("takes", self.inputs), ("gives", self.outputs)) for port in ports]
        return "\n".join([*lines, *self.notes])

    def _answer(self, program: torch.nn.Module, call: Call) -> Any:
        import torch

        if len(call.tensors()) == len(self.inputs):
            for port, tensor in zip(self.inputs, call.tensors().values(), strict=True):
                _require_fit(port, tensor)
        try:
            with torch.inference_mode():
                return program(*call.args, **call.kwargs)
        except Exception as error:  # a program raises whatever its operators raise
            lines = [line for line in str(error).splitlines() if line.strip()]
            told = f"{visible(self.name)} does not run on these inputs: {type(error).__name__}: {visible(lines[-1] if lines else '')}"
            raise SelectionError(told, hint=f"it takes {'; '.join(map(str, self.inputs))}") from error

    def _feeds(self, call: Call) -> dict[str, Any]:
        """Arrays by input name, checked."""
        known = {port.name: port for port in self.inputs}
        named = Call((), call.kwargs).tensors()
        rest = [name for name in known if name not in named]
        tensors = [*zip(rest, Call(call.args).tensors().values(), strict=False), *named.items()]
        if len(call.tensors()) != len(known) or set(named) - set(known):
            takes = "; ".join(map(str, self.inputs))
            raise SelectionError(f"{visible(self.name)} takes {takes}, and was given {len(call.tensors())} tensors")
        return {name: _fitting(known[name], tensor) for name, tensor in tensors}


@dataclass(frozen=True, repr=False)
class LatencyReport(Report):
    """Wall time of one run: percentiles and mean, in seconds."""

    name: str
    provider: str
    rounds: int
    seconds_median: float
    seconds_p90: float
    seconds_p99: float
    seconds_mean: float

    @property
    def headline(self) -> str:
        fast = f"{1000 * self.seconds_median:.3g} ms at the median, {1000 * self.seconds_p99:.3g} ms at the 99th percentile"
        return f"{visible(self.name)} answers in {fast} ({self.rounds} runs, {self.provider})."

    def tables(self) -> tuple[Table, ...]:
        columns = [Column("", "text"), Column("seconds", "seconds")]
        rows = [
            ("median", self.seconds_median),
            ("90th percentile", self.seconds_p90),
            ("99th percentile", self.seconds_p99),
            ("mean", self.seconds_mean),
        ]
        return (table("latency", columns, rows),)


def _port(node: Any) -> Port:
    kind = node.type.removeprefix("tensor(").removesuffix(")")
    shape = tuple(size if isinstance(size, int) else str(size or "?") for size in node.shape)
    return Port(node.name, _ELEMENTS.get(kind, kind), shape)


def _ports(program: torch.nn.Module) -> tuple[Port, ...]:
    """What a torch program says of its inputs: names, and for an exported one the example's types and shapes."""
    import torch

    if isinstance(program, torch.jit.ScriptModule):
        schema: Any = program.forward
        return tuple(Port(arg.name, None, None) for arg in schema.schema.arguments[1:])
    nodes = [node for node in getattr(program, "graph").nodes if node.op == "placeholder"]  # noqa: B009 (a GraphModule has one, a Module not)
    values = [(node.name, node.meta.get("val")) for node in nodes]
    return tuple(
        Port(name, str(value.dtype).removeprefix("torch."), tuple(size if isinstance(size, int) else str(size) for size in value.shape))
        for name, value in values
        if isinstance(value, torch.Tensor)
    )


def _require_fit(port: Port, tensor: torch.Tensor) -> None:
    given = str(tensor.dtype).removeprefix("torch.")
    shape = list(tensor.shape)
    if port.dtype is not None and given != port.dtype:
        hint = f"convert it: x.astype({port.dtype!r}) or x.to(torch.{port.dtype})"
        raise SelectionError(f"the input {port} was given {given} {shape}", hint=hint)
    fits = port.shape is None or (len(port.shape) == len(shape) and all(w in (g, str(w)) for w, g in zip(port.shape, shape, strict=True)))
    if not fits:
        hint = "one item needs a batch axis: x[None]" if port.shape and len(port.shape) == len(shape) + 1 else "see engine.inputs"
        raise SelectionError(f"the input {port} was given {given} {shape}", hint=hint)


def _fitting(port: Port, tensor: torch.Tensor) -> Any:
    _require_fit(port, tensor)
    return to_numpy(tensor, port.name)


def _mapped(value: Any, change: Any) -> Any:
    import numpy as np

    if isinstance(value, np.ndarray):
        return change(value)
    if isinstance(value, (tuple, list)):
        return type(value)(_mapped(item, change) for item in value)
    if isinstance(value, dict):
        return {key: _mapped(item, change) for key, item in value.items()}
    return map_tensors(value, change)


def _stacked(items: list[Any]) -> Any:
    import numpy as np
    import torch

    first = items[0]
    if isinstance(first, dict):
        return {key: _stacked([item[key] for item in items]) for key in first}
    if isinstance(first, tuple):
        return tuple(_stacked(list(column)) for column in zip(*items, strict=True))
    try:
        return torch.stack(items) if isinstance(first, torch.Tensor) else np.stack(items)
    except (RuntimeError, ValueError, TypeError) as error:
        raise SelectionError(
            f"the items do not stack into a batch: {error}", hint="give items of one shape, without a batch axis"
        ) from error


def _percentile(values: list[float], percent: int) -> float:
    return sorted(values)[min(len(values) - 1, round(percent / 100 * (len(values) - 1)))]
