"""Targets: one call, one file per target.

Owns what is common to every target: the model's mode, the example call, where files go. A target is a function
`(Request, Path) -> Exported` and one entry in `_TARGETS`.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.errors import SelectionError, UnsupportedError, WriteError
from workbench.exporting.exported_program import export_program
from workbench.exporting.onnx_export import export_onnx
from workbench.exporting.report import Exported, ExportReport
from workbench.exporting.shapes import axes_by_name, shapes_by_argument
from workbench.exporting.torchscript import export_torchscript
from workbench.exporting.wrappers import input_names, method_of, output_names, rescued
from workbench.verification.runners import running
from workbench.verification.values import Call, calls_from

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Request:
    """What was asked, once for all targets. The fields mean what `export_model` says of them."""

    model: torch.nn.Module
    example: Call
    outputs: tuple[str, ...]
    input_names: tuple[str, ...] | None
    output_names: tuple[str, ...] | None
    dynamic_axes: Mapping[str, Any] | None
    dynamic_shapes: Any
    opset_version: int | None
    export_params: bool
    do_constant_folding: bool
    verbose: bool
    external_data: bool
    custom_translation_table: Mapping[Any, Any] | None
    check: bool
    rtol: float | None
    atol: float | None
    exporter: str | None = None
    methods: Mapping[str, Call] = field(default_factory=dict)


_TARGETS: dict[str, tuple[str, Callable[[Request, Path], Exported], tuple[str, ...]]] = {  # suffix, what makes it, exporters to choose from
    "onnx": (".onnx", export_onnx, ("dynamo", "classic")),
    "torchscript": (".torchscript.pt", export_torchscript, ("script", "trace")),
    "pt2": (".pt2", export_program, ()),
}
_ONE_FILE = 1_500_000_000  # protobuf ends at 2 GiB; the graph needs room beside the weights


def export_model(
    model: torch.nn.Module,
    args: Any,
    kwargs: Mapping[str, Any] | None = None,
    *,
    to: str | Sequence[str] = "onnx",
    path: str | os.PathLike[str] | None = None,
    folder: str | os.PathLike[str] | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic_axes: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    opset_version: int | None = None,
    export_params: bool = True,
    do_constant_folding: bool = True,
    verbose: bool = False,
    external_data: bool | None = None,
    custom_translation_table: Mapping[Any, Any] | None = None,
    exporter: str | None = None,
    methods: Mapping[str, Any] | None = None,
    check: bool = True,
    rtol: float | None = None,
    atol: float | None = None,
) -> ExportReport:
    """Export a model in eval mode, prove the file, and only then put it in place.

    Args:
        args: example inputs: a tensor, or a tuple of positional arguments.
        kwargs: example keyword arguments.
        to: the target, or several: `onnx`, `torchscript`, `pt2`.
        path: the file to write, for one target; ONNX and no other ends in `.onnx`. Otherwise `folder`, made where it is not there: files named after the model's class.
        input_names, output_names: names in the graph, in order; outputs are by default called as the model calls them.
        dynamic_axes: {input name: {axis: name} or [axis]}; or dynamic_shapes, as torch.export takes them, names and lists included. Each
            such axis is free in the file or fails it; what `Dim.AUTO` leaves to the exporter is told where it is fixed.
        opset_version: ONNX opset asked for; read back from the file, which is failed when it has another.
        export_params: False leaves the weights out of the file; they become inputs of the graph, under their own names.
        do_constant_folding: False leaves in the graph what weights alone decide.
        verbose: the exporter says more; what it says is kept in `report["onnx"].log`, never printed.
        external_data: weights in a `.data` file beside; None does so from 1.5 GB on.
        custom_translation_table: {torch operator: onnxscript function}, for operators ONNX has no translation of; the classic exporter
            takes what `torch.onnx.register_custom_op_symbolic` was given instead.
        exporter: only this one: `dynamo` or `classic` for onnx, `script` or `trace` for torchscript; None tries them in that order.
        methods: {method name: its example inputs} of further methods to export: in the same file for torchscript, one file each otherwise.
        check: run the format's checker, and compare what was written with the model, on the example, on other values of the same shape,
            and at other sizes. A file that fails is not put in place. False writes it unproved, and the report says so.
        rtol, atol: for that comparison; by default measured rounding (see `parity`).
    Returns:
        A report, false when a target failed: then with cause, cure, the model's own lines and the exporter's text, and no file is
        written or changed. Every option stands in it as asked and as honoured.
    Raises:
        SelectionError: the model does not run on the example, or options contradict each other.
        UnsupportedError: no such target.
        WriteError: the folder refuses.
    Cost: 1 to 10 s for a small model, most of it torch's exporter; about 3 × the model's memory while float64 rounding is measured.
    """
    import torch

    if not isinstance(model, torch.nn.Module):
        raise SelectionError(f"a {type(model).__name__} cannot be exported", hint="pass an nn.Module with its weights loaded")
    try:
        inspect.signature(model.forward)
    except ValueError as error:
        hint = "export the module that it was traced from"
        raise SelectionError(f"the forward of this {type(model).__name__} does not say which arguments it takes", hint=hint) from error
    paths = _paths(model, to, path, folder)
    for target in paths if exporter is not None else ():
        if exporter not in _TARGETS[target][2]:
            choices = "; ".join(f"{name} by {' or '.join(by)}" for name, (_, _, by) in _TARGETS.items() if by)
            raise SelectionError(f"{target} is not made by {exporter!r}", hint=f"there is {choices}; leave `exporter` out for the rest")
    if dynamic_axes is not None and dynamic_shapes is not None:
        raise SelectionError("dynamic_axes and dynamic_shapes say the same thing twice", hint="give one of them")
    _require(kwargs is None or isinstance(kwargs, Mapping), f"kwargs is a dict of keyword arguments; it is {kwargs!r}")
    _require(methods is None or isinstance(methods, Mapping), f"methods is {{method name: its example inputs}}; it is {methods!r}")
    whole = opset_version is None or (isinstance(opset_version, int) and not isinstance(opset_version, bool))
    _require(whole, f"opset_version is a whole number; it is {opset_version!r}")
    for name, bound in (("rtol", rtol), ("atol", atol)):
        known = bound is None or (isinstance(bound, (int, float)) and 0 <= bound < math.inf)
        _require(known, f"{name} is a number from 0 on, or None; it is {bound!r}")
    example, rescue = _example(args, kwargs), ""
    try:
        outputs = _outputs(model, example)
    except SelectionError as error:
        subject, example, rescue = rescued(model, example, error)
        outputs = _outputs(subject, example)
    else:
        subject = model
    calls = {name: _example(inputs, None) for name, inputs in (methods or {}).items()}
    for name in calls:
        if not callable(getattr(model, name, None)):
            raise SelectionError(f"{type(model).__name__} has no method {name!r}")
    large = sum(t.numel() * t.element_size() for t in model.state_dict().values() if isinstance(t, torch.Tensor)) >= _ONE_FILE
    request = Request(
        subject, example, outputs, _names(input_names, "input_names"), _names(output_names, "output_names"), dynamic_axes, dynamic_shapes,
        opset_version, export_params, do_constant_folding, verbose, large if external_data is None else external_data,
        custom_translation_table, check, rtol, atol, exporter, calls,
    )  # fmt: skip
    request = replace(request, dynamic_axes=axes_by_name(request), dynamic_shapes=shapes_by_argument(request))
    made = [one for target, goal in paths.items() for one in _exported(request, target, goal)]
    noted = tuple(replace(one, notes=(rescue, *one.notes)) if rescue else one for one in made)
    return ExportReport(type(model).__name__, noted)


def _require(held: bool, otherwise: str) -> None:
    if not held:
        raise SelectionError(otherwise)


def _exported(request: Request, target: str, goal: Path) -> Iterator[Exported]:
    """The target's file, and one for each further method where a file holds one graph."""
    suffix, export, _ = _TARGETS[target]
    theirs = {name for method in request.methods for name in inspect.signature(getattr(request.model, method)).parameters}
    others = theirs - {*input_names(request), *output_names(request)}
    yield export(replace(request, dynamic_axes=_without(request.dynamic_axes, others)), goal)
    for name, call in request.methods.items() if target != "torchscript" else ():
        model = method_of(request.model, name)
        others = {*(request.dynamic_axes or {})} - {*inspect.signature(model.forward).parameters}
        own = replace(
            request, model=model, example=call, outputs=_outputs(model, call), input_names=None, output_names=None,
            dynamic_axes=_without(request.dynamic_axes, others), dynamic_shapes=None, methods={},
        )  # fmt: skip
        stem = goal.name.removesuffix(suffix)
        yield replace(export(own, goal.with_name(f"{stem}.{name}{suffix}")), target=f"{target}:{name}")


def _without(axes: Mapping[str, Any] | None, names: set[str]) -> Mapping[str, Any] | None:
    return {name: held for name, held in (axes or {}).items() if name not in names} or None


def _outputs(model: torch.nn.Module, example: Call) -> tuple[str, ...]:
    with running(model) as runner:
        try:
            return tuple(runner(example.fresh()))
        except SelectionError:
            raise
        except Exception as error:  # a stranger's forward: whatever it raises, this example cannot serve
            raise SelectionError(f"the model does not run on the example inputs: {type(error).__name__}: {error}") from error


def _example(args: Any, kwargs: Mapping[str, Any] | None) -> Call:
    positional = args if isinstance(args, tuple) else () if args is None else (args,)
    (call,) = calls_from(Call(positional, dict(kwargs or {})))
    return call


def _paths(model: Any, to: str | Sequence[str], path: Any, folder: Any) -> dict[str, Path]:
    _require(isinstance(to, (str, list, tuple)), f"to is the name of a target, or several; it is {to!r}")
    targets = [to] if isinstance(to, str) else list(to)
    for target in targets:
        if target not in _TARGETS:
            raise UnsupportedError(f"there is no export target {target!r}; there is {', '.join(_TARGETS)}")
    if not targets or (path is None) == (folder is None) or (path is not None and len(targets) > 1):
        raise SelectionError("it is not clear where the files go", hint="give path= for one target, or folder= for several")
    if path is not None and (targets == ["onnx"]) != (Path(path).suffix.lower() == ".onnx"):
        hint = "a file is known to hold ONNX by the suffix .onnx, and by no other; every reader here goes by it"
        raise SelectionError(f"{Path(path).name!r} is no name for a {targets[0]} file", hint=hint)
    if path is not None:
        return {targets[0]: Path(os.path.realpath(path))}
    stem = type(model).__name__.lower()
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise WriteError(f"the folder cannot be made: {error.strerror}", path=str(folder)) from error
    return {target: Path(os.path.realpath(folder)) / f"{stem}{_TARGETS[target][0]}" for target in targets}


def _names(names: Sequence[str] | None, option: str) -> tuple[str, ...] | None:
    if names is None:
        return None
    if isinstance(names, str) or not all(isinstance(name, str) and name for name in names):
        raise SelectionError(f"{option} is a list of names, none of them empty")
    if len(set(names)) != len(names):
        raise SelectionError(f"{option} names something twice", hint="every name in a graph is given once")
    return tuple(names)
