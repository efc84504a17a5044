"""Quantization of a model: one call over torch's dynamic quantization, torchao and ONNX Runtime, and a report that says what became of it.

The engines are in `torch_quantization` (a live module) and `onnx_quantization` (a graph). Here are the checks before, and the measures
after: bytes of files really written, and the answers against the original's. A further method is one line of `_METHODS` and its engine.
"""

from __future__ import annotations

import io
import os
import tempfile
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn

from workbench.errors import SelectionError, UnsupportedError
from workbench.exporting.engine import whole
from workbench.exporting.proving import put_in_place, workplace, write
from workbench.exporting.targets import export_model
from workbench.models.onnx_quantization import Task, quantize_graph
from workbench.models.quantization_report import Made, Modules, QuantizationReport, moved
from workbench.models.torch_quantization import quantized_copy, reload_lines
from workbench.names import Patterns
from workbench.stream import Meter, ProgressFunction
from workbench.verification.values import Call, calls_from
from workbench.verification.weighing import disk_nbytes

_METHODS = {  # the first dtype is the default
    "dynamic": ("int8",),
    "weight_only": ("int8", "int4", "float8_e4m3fn"),
    "dynamic_activation": ("int8", "int4"),
    "onnx_dynamic": ("int8",),
    "onnx_static": ("int8",),
    "onnx_4bit": ("int4", "int8"),
}
_SESSION = "import onnxruntime\nsession = onnxruntime.InferenceSession(path)"
_SHORT = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64"}


def quantize(
    model: nn.Module | str | os.PathLike[str],
    method: str = "dynamic",
    *,
    modules: Modules = None,
    exclude: Patterns | None = None,
    dtype: str | None = None,
    example: Any = None,
    data: Any = None,
    path: str | os.PathLike[str] | None = None,
    per_channel: bool = True,
    group_size: int | None = None,
    dynamic_axes: Mapping[str, Any] | None = None,
    progress: ProgressFunction | None = None,
    cancel: threading.Event | None = None,
) -> QuantizationReport:
    """Quantize a copy of a model, and measure what it costs and what it saves. The model itself is left as it was.

    Args:
        model: a module (every method), or the path of an `.onnx` file (the onnx methods).
        method: `dynamic` (torch: int8 weights and kernels; Linear and recurrent layers), `weight_only` and `dynamic_activation` (torchao;
            Linear), `onnx_dynamic` (ONNX Runtime; MatMul, Gemm, Conv, LSTM, Gather), `onnx_static` (QDQ, calibrated on `data`; the one for
            convolutions), `onnx_4bit` (MatMul).
        modules: what to quantize: types (nn.Linear), globs over names, or both; all that the method takes by default. A graph's nodes are
            called by their modules or weights as far as it tells; exclude: globs over the same names.
        dtype: int8 by default, int4 for onnx_4bit; also int4 and float8_e4m3fn for weight_only, int4 for dynamic_activation.
        example: a batch to measure the answers on, and to export a module with: as for `parity`. data: calibration batches; measured on
            where there is no example.
        path: the file to write: `.onnx` for the onnx methods, which need it; a state dict for the others.
        per_channel: of onnx_dynamic and onnx_static: a scale for each output channel.
        group_size: values of a row that share a scale, for int4; 32 for onnx_4bit and a whole row for the others by default.
        dynamic_axes: for the export of a module, as `export_model` takes them.
        progress, cancel: of the calibration, a step a batch.
    Returns:
        A report with `.model` or `.path`; false where nothing was quantized or the answers are lost.
    Raises:
        SelectionError: no such method or dtype, a glob that selects nothing, a weight with NaN or infinity, or a missing argument.
        UnsupportedError: an engine or the exporter refuses this model, in its own words, or the quantized model does not run.
        MissingDependencyError: torchao is not installed. WriteError: the folder refuses.
    Cost: a copy of the model, one run of each for every batch, and for the onnx methods an export.
    """
    if method not in _METHODS:
        raise SelectionError(f"there is no quantization method {method!r}", hint=f"there is {', '.join(_METHODS)}")
    dtype = dtype or _METHODS[method][0]
    if dtype not in _METHODS[method]:
        raise SelectionError(f"{method} makes no {dtype}", hint=f"it makes {', '.join(_METHODS[method])}")
    group_size = None if group_size is None else whole(group_size, "group_size", 1)
    if group_size is not None and dtype != "int4":
        raise SelectionError(f"{method} with {dtype} has no groups", hint="group_size is for int4")
    if method == "onnx_static" and data is None:
        raise SelectionError("onnx_static is calibrated on data", hint="pass data=, a list of some ten batches like those to come")
    batches = calls_from(data) if data is not None else ()
    calls = calls_from(example) if example is not None else batches
    if not method.startswith("onnx"):
        if not isinstance(model, nn.Module):
            raise SelectionError(f"{method} takes a module", hint="the onnx methods take the path of an .onnx file")
        return _module(model, method, dtype, modules, exclude, group_size, calls, path)
    if path is None or Path(path).suffix.lower() != ".onnx":
        raise SelectionError(f"{method} writes a file", hint='pass path="model.int8.onnx"')
    with ExitStack() as stack:
        source, told = _exported(model, calls, dynamic_axes, stack) if isinstance(model, nn.Module) else (Path(model), [])
        target = Path(os.path.realpath(path))
        work = stack.enter_context(workplace(target))
        (work / "made").mkdir()
        out, made, bits = work / "made" / target.name, Made(notes=told), 4 if dtype == "int4" else 8
        meter = Meter("calibrating", len(batches), progress, cancel)
        task = Task(work / "prepared.onnx", out, bits, per_channel, group_size or 32, batches, meter, made)
        quantize_graph(source, method, task, modules, exclude)
        now = out if made.quantized else source
        before, after = disk_nbytes(None, source) or 0, disk_nbytes(None, now) or 0
        outputs, problem = moved(source, now, calls)
        if made.quantized:
            put_in_place(out, target)
    put = target if made.quantized else None
    return QuantizationReport(method, dtype, before, after, outputs, _SESSION, put, problem, **made.told())


def _module(
    model: nn.Module, method: str, dtype: str, modules: Modules, exclude: Patterns | None, group_size: int | None, calls: tuple[Call, ...],
    path: Any,
) -> QuantizationReport:  # fmt: skip
    quantized, made = quantized_copy(model, method, dtype, modules, exclude, group_size)
    outputs, problem = moved(model, quantized, calls)
    largest = max(model.parameters(), key=torch.Tensor.numel, default=None)
    made.source_dtype = "fp32" if largest is None else _SHORT.get(largest.dtype, str(largest.dtype).removeprefix("torch."))
    target = None if path is None or not made.quantized else Path(os.path.realpath(path))
    if target is not None:
        buffer = io.BytesIO()
        torch.save(quantized.state_dict(), buffer)
        write(target, buffer.getvalue())
    before, after = disk_nbytes(model, None) or 0, disk_nbytes(quantized, target) or 0
    reload = reload_lines(made, method, model) if made.quantized else ""
    return QuantizationReport(method, dtype, before, after, outputs, reload, target, problem, quantized, **made.told())


def _exported(
    model: nn.Module, calls: tuple[Call, ...], dynamic_axes: Mapping[str, Any] | None, stack: ExitStack
) -> tuple[Path, list[str]]:
    """The module as a proved `.onnx` file for the length of the `with`, and what to tell of it."""
    if not calls:
        raise SelectionError("a module is exported with an example", hint="pass example=, or the path of an .onnx file")
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    call = calls[0]
    done = export_model(model, call.args, dict(call.kwargs), path=Path(folder) / "fp32.onnx", dynamic_axes=dynamic_axes)["onnx"]
    if not done.ok:
        raise UnsupportedError(f"the model cannot be exported to ONNX: {done.cause}", hint=done.cure)
    told = "Bytes and answers are held against the module's own export to ONNX, which was proved equal to it."
    return Path(folder) / "fp32.onnx", [told, *done.notes]
