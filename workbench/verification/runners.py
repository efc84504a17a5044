"""Runners: anything that answers a batch with outputs by path, under one protocol.

A runner is opened by `running(thing)` and lives inside its `with`. Modules run in eval mode without gradients and are put
back as they were; `.onnx` files run in ONNX Runtime on the CPU; programs stored in files (TorchScript, `.pt2`) run under the
trust rule of `programs`; any callable runs as it is. The next kind of runner is one class and one branch of `running`.

Modules run under `no_grad`, not `inference_mode`: tables that a model caches on its first call would otherwise be inference
tensors, and the next training step would fail on them.
"""

from __future__ import annotations

import copy
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from workbench.errors import MissingDependencyError, SelectionError, UnsupportedError, visible
from workbench.files import file_ref
from workbench.verification.programs import load_program
from workbench.verification.values import Call, outputs_by_path

if TYPE_CHECKING:
    import torch


class Runner(Protocol):
    """Answers a batch with plain CPU tensors by path.

    Attributes:
        name: how reports call it.
        ordered: its output names are its own (an ONNX graph's), so outputs may be matched by position.
    """

    name: str
    ordered: bool

    def __call__(self, call: Call) -> dict[str, torch.Tensor]: ...


@contextmanager
def running(thing: Any, *, name: str | None = None, threads: int | None = None, trust: bool = False) -> Iterator[Runner]:
    """A runner over `thing` for the length of the `with`.

    Args:
        thing: an nn.Module, an ExportedProgram, a runner, the path of an `.onnx`, TorchScript or `.pt2` file, or any callable.
        name: how reports call it; by default its class, file or function name.
        threads: threads of an ONNX Runtime session; None is its own choice.
        trust: run a stored program that this process did not write; see `programs.load_program`.
    Raises:
        SelectionError: not something that can be run.
        UntrustedError: the path of a stored program that is not trusted.
        UnsupportedError: ONNX Runtime or torch cannot load the file, or it holds weights alone.
    """
    import torch

    if isinstance(thing, (str, os.PathLike)) and Path(thing).suffix.lower() == ".onnx":
        yield OnnxRunner(Path(thing), name=name, threads=threads)
    elif isinstance(thing, (str, os.PathLike)):
        yield ModuleRunner(load_program(thing, trust=trust), name or Path(thing).name)
    elif isinstance(thing, CallableRunner):
        yield thing
    elif isinstance(thing, torch.export.ExportedProgram):
        yield CallableRunner(thing.module(), name or "ExportedProgram")
    elif isinstance(thing, torch.nn.Module):
        with evaluating(thing):
            yield ModuleRunner(thing, name or type(thing).__name__)
    elif callable(thing):
        yield CallableRunner(thing, name or str(getattr(thing, "__name__", type(thing).__name__)))
    else:
        raise SelectionError(f"a {type(thing).__name__} cannot be run", hint="pass a model, the path of an .onnx file, or a callable")


class CallableRunner:
    """Any callable on `(*args, **kwargs)`, without gradients."""

    ordered = False

    def __init__(self, function: Callable[..., Any], name: str) -> None:
        self.name = name
        self._function = function

    def __call__(self, call: Call) -> dict[str, torch.Tensor]:
        import torch

        with torch.no_grad():
            return outputs_by_path(self._function(*call.args, **call.kwargs), of=self.name)


class FlatRunner(CallableRunner):
    """A program that takes the tensors of a batch in order, and whose outputs come in order: what an exporter's wrapper makes."""

    ordered = True

    def __call__(self, call: Call) -> dict[str, torch.Tensor]:
        return super().__call__(Call((*call.tensors().values(),)))


class ModuleRunner(CallableRunner):
    """A module on its own device; `running` keeps it in eval mode around the calls."""

    def __init__(self, module: torch.nn.Module, name: str) -> None:
        super().__init__(module, name)
        self._device = next((p.device for p in module.parameters()), None)

    def __call__(self, call: Call) -> dict[str, torch.Tensor]:
        device = self._device
        return super().__call__(call.map(lambda t: t.to(device)) if device is not None else call)


class OnnxRunner:
    """An `.onnx` file in ONNX Runtime, on the CPU provider.

    Tensors of a batch are given to inputs by name where every keyword names an input, otherwise in order. Numbers and flags among
    the arguments are not fed: an exporter has made constants of them.
    """

    ordered = True

    def __init__(self, path: Path, *, name: str | None = None, threads: int | None = None) -> None:
        file_ref(path)  # a missing file or a folder is told in our own words
        self.name = name or path.name
        self._session = onnx_session(path, threads)
        self._inputs = [node.name for node in self._session.get_inputs()]
        self._shapes = {node.name: node.shape for node in self._session.get_inputs()}
        self._outputs = [node.name for node in self._session.get_outputs()]

    def __call__(self, call: Call) -> dict[str, torch.Tensor]:
        values = self._session.run(None, self._feeds(call))
        return outputs_by_path(dict(zip(self._outputs, values, strict=True)), of=self.name)

    def _feeds(self, call: Call) -> dict[str, Any]:
        names = fed_names(call, self._inputs)
        feeds = dict(zip(names, call.tensors().values(), strict=True))
        for name, tensor in feeds.items():
            _require_shape(name, self._shapes[name], tensor)
        return {name: to_numpy(tensor, name) for name, tensor in feeds.items()}


def fed_names(call: Call, inputs: list[str]) -> list[str]:
    """Which graph input each tensor of a batch goes to: by name where every keyword names an input, otherwise in order.

    Raises:
        SelectionError: the graph takes another number of tensors.
    """
    keywords = list(Call((), call.kwargs).tensors())
    given = len(call.tensors())
    if given != len(inputs):
        raise SelectionError(f"the graph takes {len(inputs)} tensors ({', '.join(map(visible, inputs))}) and was given {given}")
    if set(keywords) <= set(inputs):
        return [name for name in inputs if name not in keywords] + keywords
    return inputs


def _require_shape(name: str, declared: list[Any] | None, tensor: torch.Tensor) -> None:
    """Axes that the graph fixes must fit; named ones take any size."""
    given = list(tensor.shape)
    fits = declared is None or len(declared) == len(given)
    if declared and (not fits or any(isinstance(want, int) and want != size for want, size in zip(declared, given, strict=True))):
        raise SelectionError(
            f"the graph fixes input {name!r} at {declared} and was given {given}", hint="export it with dynamic_axes to take other sizes"
        )


def to_numpy(tensor: torch.Tensor, name: str) -> Any:
    """The tensor as ONNX Runtime takes it.

    Raises:
        UnsupportedError: numpy has no such dtype.
    """
    try:
        return tensor.detach().cpu().resolve_conj().resolve_neg().numpy()
    except TypeError as error:  # bfloat16 and the float8 family
        raise UnsupportedError(f"numpy has no {tensor.dtype}, so input {name!r} cannot be fed", hint="cast the input to float32") from error


def onnx_session(source: str | os.PathLike[str] | bytes, threads: int | None, providers: Sequence[str] = ("CPUExecutionProvider",)) -> Any:
    """A session of ONNX Runtime that says nothing by itself.

    Raises:
        MissingDependencyError: it is not installed. UnsupportedError: it cannot load the graph.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError("running .onnx files needs onnxruntime", hint="pip install onnxruntime") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # its C++ side writes to stderr by itself, errors too, which it raises as well
    if threads is not None:
        options.intra_op_num_threads = threads
    where = {} if isinstance(source, bytes) else {"path": str(source)}
    try:
        return onnxruntime.InferenceSession(source if isinstance(source, bytes) else str(source), options, providers=list(providers))
    except Exception as error:  # its exceptions share no base of their own
        raise UnsupportedError(f"ONNX Runtime cannot load the file: {_first_line(error)}", **where) from error


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """The module in eval mode inside the `with`, and as it was after: training flags of every submodule, buffers, attributes.

    What forward rebinds (`self.hidden = …`), writes into buffers, tensor attributes, lists, dicts, sets and deques (and those in them), hooks,
    or lazily adds is undone. Other objects changed in place are not. The modules' own `eval()` and `train()` are called, for adapters merge their weights there.

    Cost: one copy of the buffers and of the tensors in attributes.
    """
    import torch

    states = [_ModuleState(module) for module in model.modules()]
    was_training = getattr(model, "training", None)  # None: a frozen program, whose mode was fixed when it was made
    try:
        _set_mode(model, None if was_training is None else False)
        with torch.random.fork_rng(devices=[]):
            yield model
    finally:
        _set_mode(model, was_training)
        for state in states:
            state.restore()


def _set_mode(model: torch.nn.Module, training: bool | None) -> None:
    try:
        if training is not None:
            model.train(training)
    except NotImplementedError:  # an exported graph: its mode was fixed when it was made
        return


class _ModuleState:
    """What one module, without its children, must be given back."""

    def __init__(self, module: torch.nn.Module) -> None:
        import torch

        self.module = module
        self.training = getattr(module, "training", None)
        self.plain = not isinstance(module, torch.jit.ScriptModule)
        self.attributes = {key: value for key, value in (module.__dict__ if self.plain else _stored(module)).items() if not _internal(key)}
        self.buffers = dict(module.named_buffers(recurse=False, remove_duplicate=False))
        self.containers: dict[int, tuple[Any, Any]] = {}
        hooks = {key: value for key, value in module.__dict__.items() if key.endswith("_hooks")} if self.plain else {}
        found = (*self.buffers.values(), *self._contents([self.attributes, hooks]))
        held = [t for t in found if isinstance(t, torch.Tensor) and not t.is_meta and not isinstance(t, torch.nn.Parameter)]
        self.copies = [(t, t.detach().clone()) for t in held]

    def _contents(self, things: Iterable[Any]) -> Iterator[Any]:
        """What lies in lists, dicts, sets, deques and tuples, which are noted with a copy of themselves."""
        for thing in things:
            if isinstance(thing, (list, dict, set, deque)) and id(thing) not in self.containers:
                self.containers[id(thing)] = (thing, copy.copy(thing))
                yield from self._contents(thing.values() if isinstance(thing, dict) else thing)
            elif isinstance(thing, tuple):
                yield from self._contents(thing)
            else:
                yield thing

    def restore(self) -> None:
        import torch

        for container, contents in self.containers.values():
            if _ids(container) != _ids(contents):
                container.clear()
                container.extend(contents) if isinstance(container, (list, deque)) else container.update(contents)

        module = self.module
        if self.plain:
            for key in [key for key in module.__dict__ if not _internal(key) and key not in self.attributes]:
                del module.__dict__[key]
            module.__dict__.update(self.attributes)
            module._buffers.clear()
            module._buffers.update(self.buffers)
        for key, value in self.attributes.items() if not self.plain else ():
            cast("Any", module)._c.setattr(key, value)
        if self.training is not None:
            module.training = self.training
        for tensor, before in self.copies:
            with torch.no_grad():
                if not torch.equal(tensor, before):
                    tensor.copy_(before)


def _ids(container: Any) -> list[int]:
    return [id(item) for item in (*container, *(container.values() if isinstance(container, dict) else ()))]


def _stored(module: torch.nn.Module) -> dict[str, Any]:
    """Attributes and buffers of a TorchScript module, which live outside Python."""
    import torch

    held = cast("Any", module)._c
    kind: Any = torch._C.ConcreteModuleType.from_jit_type(held._type())
    return {key: held.getattr(key) for key in kind.get_attributes()}


def _internal(key: str) -> bool:
    return key in ("_parameters", "_buffers", "_modules", "training") or key.endswith("_hooks")
