"""Inference: one artefact, called like the model it was made from.

An `.onnx` file runs in ONNX Runtime; TorchScript and `.pt2` files run in torch under the trust rule of `verification.programs`. Inputs are
checked against what the artefact says of itself before anything runs.
"""

from __future__ import annotations

import operator
import os
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from workbench.errors import SelectionError, UnsupportedError, WorkbenchError, visible
from workbench.files import file_ref
from workbench.report import Report
from workbench.tables import Column, Table, table
from workbench.verification.programs import load_program
from workbench.verification.runners import fed_names, onnx_session, to_numpy
from workbench.verification.values import Call, leaves, outputs_by_path

if TYPE_CHECKING:
    import torch

_PREFERRED = ("CUDAExecutionProvider", "CPUExecutionProvider")
_ELEMENTS = {"float": "float32", "double": "float64", "string": "str"}  # ONNX Runtime's words for what numpy calls otherwise


Provider = str | tuple[str, dict[str, Any]]
_WHOLE = "call the engine itself on a whole batch: engine(x)"
_ALIKE = "give items of one shape and one kind, without a batch axis"


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
        source: str | os.PathLike[str] | bytes | bytearray,
        providers: str | Sequence[Provider] | None = None,
        *,
        threads: int | None = None,
        trust: bool = False,
    ) -> None:
        """Load an artefact.

        Args:
            source: the path of an `.onnx`, TorchScript or `.pt2` file, or the bytes of an ONNX graph without external data.
            providers: ONNX Runtime's execution providers, best first, each a name or `(name, options)`; by default CUDA where there is one,
                then the CPU.
            threads: of one operator; None or 0 is the runtime's own choice.
            trust: run a program that this process did not write, once a scan finds nothing dangerous in it.
        Raises:
            SelectionError: none of the providers is installed, they were asked for a torch program, or an argument is of another type.
            UntrustedError: a program that is not trusted. UnsupportedError: the runtime cannot load the file.
        """
        self.notes: list[str] = []
        self.outputs: tuple[Port, ...] = ()
        self._follows = False  # whether every output was seen to go with the items of a batch
        given: Any = bytes(source) if isinstance(source, bytearray) else source
        if not isinstance(given, (str, os.PathLike, bytes)):
            hint = "pass the path of an .onnx, TorchScript or .pt2 file, or the bytes of an ONNX graph"
            raise SelectionError(f"a {type(given).__name__} is no artefact to run", hint=hint)
        self.name = "the graph" if isinstance(given, bytes) else Path(given).name
        if isinstance(given, bytes) or Path(given).suffix.lower() == ".onnx":
            self._run = self._open_graph(given, providers, None if threads is None else whole(threads, "threads", 0))
        else:
            if providers is not None or threads is not None:
                raise SelectionError("providers and threads belong to ONNX Runtime, and this is no .onnx file")
            program = load_program(given, trust=trust)
            self.provider, self.inputs = "torch (cpu)", _ports(program)
            self._run = lambda call: self._answer(program, call)

    def _open_graph(self, source: str | os.PathLike[str] | bytes, providers: str | Sequence[Provider] | None, threads: int | None) -> Any:
        import onnxruntime

        if not isinstance(source, bytes):
            file_ref(source)
        installed = onnxruntime.get_available_providers()
        asked = _named_providers(providers) or {name: name for name in _PREFERRED if name in installed}
        usable = {name: one for name, one in asked.items() if name in installed}
        if not usable:
            raise SelectionError(f"none of {', '.join(map(visible, asked))} is installed", hint=f"there is {', '.join(installed)}")
        self.notes += [f"{visible(name)} is not installed here." for name in asked if name not in usable]
        session: Any = onnx_session(source, threads, cast("Any", [*usable.values()]))
        self.provider = str(session.get_providers()[0])
        if self.provider != (first := next(iter(usable))):
            self.notes.append(f"{first} could not be started, so {self.provider} runs it.")
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
            SelectionError: too few or too many inputs, another element type, a shape that the artefact does not take, or a number, flag or
                text where the graph holds a constant.
        """
        import torch

        call = Call(_mapped(args, _tensor), _mapped(kwargs, _tensor))
        try:
            answer = self._run(call)
        except WorkbenchError:
            raise
        except Exception as error:  # a program raises whatever its operators raise
            lines = [line for line in str(error).splitlines() if line.strip()]
            told = f"{visible(self.name)} does not run on these inputs: {type(error).__name__}: {visible(lines[-1] if lines else '')}"
            raise SelectionError(told, hint=f"it takes {self._takes}") from error
        given = next((value for value in leaves((args, kwargs)) if hasattr(value, "shape")), None)
        return _mapped(answer, _tensor if isinstance(given, torch.Tensor) else _array)

    def predict(self, inputs: Any) -> Any:
        """As a call, on one value: a tensor or array, a tuple of them, or a dict by name."""
        if isinstance(inputs, Mapping):
            return self(**{str(name): value for name, value in inputs.items()})
        return self(*inputs) if isinstance(inputs, tuple) else self(inputs)

    def predict_batch(self, items: Iterable[Any], batch_size: int = 32) -> list[Any]:
        """One answer per item, in order.

        Args:
            items: single inputs without a batch axis: tensors or arrays, or tuples or dicts of them; any iterable, read as it goes.
            batch_size: items per run; a graph with a fixed batch axis is run at its own size, the last batch filled up by repeating.
        Returns:
            A list as long as the items.
        Raises:
            SelectionError: batch_size below one, items that do not stack, or an output that has no answer of each item along its first axis.
        Cost: one run per batch, and one more of the first that the engine sees, by which the outputs' axes are proved; a batch of inputs
            and all answers are held.
        """
        batch_size = whole(batch_size, "batch_size", 1)
        try:
            iterator = iter(items)
        except TypeError as error:  # of a tensor with no axis, too
            raise SelectionError(
                f"a {type(items).__name__} without items was given", hint="pass a list, a generator, or one tensor"
            ) from error
        fixed = next((port.shape[0] for port in self.inputs if port.shape and isinstance(port.shape[0], int)), None)
        size, answers = fixed or batch_size, list[Any]()
        while held := list(islice(iterator, size)):
            filled = held + held[-1:] * (size - len(held)) if fixed else held
            answer = self.predict(_stacked(filled))
            self._require_items(answer, filled)
            answers += [_mapped(answer, lambda value, i=i: value[i]) for i in range(len(held))]
        return answers

    def warm_up(self, inputs: Any, runs: int = 3) -> InferenceEngine:
        """Run a few times, so that the first real answer does not pay for what is prepared once; returns itself."""
        for _ in range(whole(runs, "runs", 0)):
            self.predict(inputs)
        return self

    def latency(self, inputs: Any, rounds: int = 50) -> LatencyReport:
        """How long a run takes, after a warm-up.

        Args:
            inputs: as for `predict`; at least 11 rounds.
        """
        rounds = whole(rounds, "rounds", 11)  # fewer are too few for a percentile
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

    @property
    def _takes(self) -> str:
        return "; ".join(map(str, self.inputs)) or "no inputs"

    def _require_items(self, answer: Any, items: list[Any]) -> None:
        """Raise unless the first axis of every output is the items': as long as they are many, and, seen once, following them.

        It follows where one item more makes it one longer, and nothing else; where another number does not run, where it turns as the
        items are turned.
        """
        found = self._outputs(answer)
        for name, value in found.items():
            if value.shape[:1] != (len(items),):
                raise self._no_item_axis(name, value, len(items))
        if self._follows:
            return
        try:
            more = self._outputs(self.predict(_stacked([*items, items[-1]])))
            follows = {name: name in more and more[name].shape == (len(items) + 1, *value.shape[1:]) for name, value in found.items()}
        except SelectionError:
            turned = self._outputs(self.predict(_stacked([items[-1], *items[:-1]])))
            follows = {name: name in turned and _is_turned(value, turned[name]) for name, value in found.items()}
        for name, is_theirs in follows.items():
            if not is_theirs:
                raise self._no_item_axis(name, found[name], len(items))
        self._follows = True

    def _outputs(self, answer: Any) -> dict[str, Any]:
        """Arrays and tensors by output name."""
        if not self.outputs:
            return outputs_by_path(answer, of=visible(self.name))
        values = answer if len(self.outputs) > 1 else (answer,)
        found = {port.name: value for port, value in zip(self.outputs, values, strict=True)}
        for name, value in found.items():
            if not hasattr(value, "shape"):
                raise SelectionError(f"output {visible(name)!r} is a {type(value).__name__}, not a tensor", hint=_WHOLE)
        return found

    def _no_item_axis(self, name: str, value: Any, count: int) -> SelectionError:
        told = f"the first axis of output {visible(name)!r} {list(value.shape)} is not that of the {count} items"
        return SelectionError(f"{told}, so it holds no answer of each", hint=_WHOLE)

    def _answer(self, program: torch.nn.Module, call: Call) -> Any:
        import torch

        if len(call.tensors()) == len(self.inputs):
            for port, tensor in self._placed(call):
                _require_fit(port, tensor)
        with torch.inference_mode():
            return program(*call.args, **call.kwargs)

    def _placed(self, call: Call) -> list[tuple[Port, torch.Tensor]]:
        """Each tensor with its input."""
        known = {port.name: port for port in self.inputs}
        return [(known[name], tensor) for name, tensor in zip(fed_names(call, [*known]), call.tensors().values(), strict=True)]

    def _feeds(self, call: Call) -> dict[str, Any]:
        """Arrays by input name, checked."""
        import torch

        for place, value in (*enumerate(call.args), *call.kwargs.items()):
            for leaf in leaves(value):
                if not isinstance(leaf, torch.Tensor):
                    told = f"{visible(self.name)} takes tensors ({self._takes}), and argument {place!r} is {visible(repr(leaf)[:60])}"
                    hint = "leave it out; for another value, export the model again with that value or with a tensor in its place"
                    raise SelectionError(f"{told}: what is no tensor is a constant of the graph", hint=hint)
        unknown = set(Call((), call.kwargs).tensors()) - {port.name for port in self.inputs}
        if len(call.tensors()) != len(self.inputs) or unknown:
            named = f", {', '.join(sorted(map(visible, unknown)))} among them" if unknown else ""
            raise SelectionError(f"{visible(self.name)} takes {self._takes}, and was given {len(call.tensors())} tensors{named}")
        return {port.name: _fitting(port, tensor) for port, tensor in self._placed(call)}


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
        hint, lacking = "see engine.inputs", len(port.shape or ()) - len(shape)
        if lacking == 1:
            hint = "one item needs a batch axis: x[None]"
        elif lacking == 0:
            axis = next(i for i, (w, g) in enumerate(zip(port.shape or (), shape, strict=True)) if isinstance(w, int) and w != g)
            hint = f"the program fixes axis {axis}: export it with dynamic_axes={{{port.name!r}: {{{axis}: 'n'}}}}, or give it that size"
        raise SelectionError(f"the input {port} was given {given} {shape}", hint=hint)


def _fitting(port: Port, tensor: torch.Tensor) -> Any:
    _require_fit(port, tensor)
    return to_numpy(tensor, port.name)


def _named_providers(providers: Any) -> dict[str, Provider]:
    """Providers by name, each as ONNX Runtime takes it."""
    if providers is None:
        return {}
    listed = [providers] if isinstance(providers, str) or not isinstance(providers, Iterable) else list(providers)
    found: dict[str, Provider] = {}
    for one in listed:
        match one:
            case str(name) | (str(name), dict()):
                found[name] = one
            case _:
                hint = "as in ['CPUExecutionProvider'] or [('CUDAExecutionProvider', {'device_id': 0})]"
                raise SelectionError(f"a provider is a name or (name, options), and {visible(repr(one)[:60])} is neither", hint=hint)
    return found


def whole(value: Any, name: str, least: int) -> int:
    """The value of the argument `name` as an int.

    Raises:
        SelectionError: no whole number, or below `least`.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if number < least:
        raise SelectionError(f"{name} is {visible(repr(value)[:60])}", hint=f"give a whole number, at least {least}")
    return number


def _tensor(value: Any) -> Any:
    import numpy as np
    import torch

    if isinstance(value, torch.Tensor):
        return value
    try:
        return torch.from_numpy(np.array(value))  # a copy: read-only arrays and views are common
    except (TypeError, ValueError) as error:
        raise SelectionError(f"torch cannot hold an array of element type {value.dtype}", hint="give numbers or booleans") from error


def _array(value: Any) -> Any:
    import numpy as np

    if isinstance(value, np.ndarray):
        return value
    try:
        return to_numpy(value, "")
    except UnsupportedError as error:
        raise UnsupportedError(f"numpy has no {value.dtype}, the type of an output", hint="give tensors, and tensors come back") from error


def _is_turned(before: Any, after: Any) -> bool:
    """Whether `after` is `before` with its last item first, but for rounding."""
    import numpy as np
    import torch

    before, after = (_array(v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v) for v in (before, after))
    before = np.roll(before, 1, 0)
    if before.shape != after.shape or before.dtype.kind not in "fc":
        return np.array_equal(before, after)
    scale = np.abs(before[np.isfinite(before)]).max(initial=0)
    return bool(np.allclose(before, after, rtol=1e-3, atol=1e-5 * scale, equal_nan=True))


def _mapped(value: Any, change: Any) -> Any:
    """`value` with every array and tensor in its tuples, lists and dicts changed."""
    import numpy as np
    import torch

    if isinstance(value, (np.ndarray, torch.Tensor)):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_mapped(item, change) for item in value))
    if isinstance(value, (tuple, list)):
        return type(value)(_mapped(item, change) for item in value)
    if isinstance(value, dict):
        return {key: _mapped(item, change) for key, item in value.items()}
    return value


def _stacked(items: list[Any]) -> Any:
    import numpy as np
    import torch

    first = items[0]
    if any(_parts(item) != _parts(first) for item in items):
        raise SelectionError("the items do not stack into a batch: they have unlike parts", hint=_ALIKE)
    if isinstance(first, dict):
        return {key: _stacked([item[key] for item in items]) for key in first}
    if isinstance(first, tuple):
        return tuple(_stacked(list(column)) for column in zip(*items, strict=True))
    try:
        return torch.stack(items) if isinstance(first, torch.Tensor) else np.stack(items)
    except (RuntimeError, ValueError, TypeError) as error:
        raise SelectionError(f"the items do not stack into a batch: {error}", hint=_ALIKE) from error


def _parts(item: Any) -> Any:
    return item.keys() if isinstance(item, dict) else range(len(item)) if isinstance(item, tuple) else None


def _percentile(values: list[float], percent: int) -> float:
    return sorted(values)[min(len(values) - 1, round(percent / 100 * (len(values) - 1)))]
