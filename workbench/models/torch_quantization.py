"""Engines for a live module: torch's dynamic quantization, and torchao's configurations that work on a CPU.

Every engine works on a copy, and what it really replaced is read off the copy afterwards: engines pass over what they do not know.

Sources: torch.ao.quantization of torch 2.13; torchao 0.18, `quantize_`.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import is_parametrized

from workbench.errors import MissingDependencyError, SelectionError, UnsupportedError
from workbench.exporting.listening import Heard, listening
from workbench.models.quantization_report import Made, Modules, Part, chooser
from workbench.names import Patterns

_DYNAMIC = (nn.Linear, nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell, nn.RNNCell)
_SLOW = "torchao on a CPU computes in floats: the weights are smaller, and a run is seldom faster; wb.compare measures it."
_DEPRECATED = "torch calls torch.ao.quantization deprecated, in favour of torchao: a later torch may not load what it made."


@contextmanager
def unlogged() -> Iterator[None]:
    """Libraries that set up logging for the whole process find it set up; handlers of the caller's own still hear all."""
    idle = logging.NullHandler()
    logging.getLogger().addHandler(idle)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(idle)


@contextmanager
def quiet(made: Made) -> Iterator[None]:
    """What the block prints, logs and warns goes to the log."""
    heard = Heard()
    try:
        with unlogged(), listening(heard):
            yield
    finally:
        made.log = "\n".join(filter(None, (made.log, heard.text)))


def quantized_copy(
    model: nn.Module, method: str, dtype: str, modules: Modules, exclude: Patterns | None, group_size: int | None
) -> tuple[nn.Module, Made]:
    """The model in eval mode with the chosen modules quantized; the model given is left as it was.

    Raises:
        SelectionError: a chosen weight holds NaN or infinity, or a glob selects nothing.
        UnsupportedError: the model cannot be copied. MissingDependencyError: torchao is not there.
    """
    made = Made()
    try:
        twin = copy.deepcopy(model).eval()
    except Exception as error:  # tensors inside a graph of gradients, locks, open files
        hint = "finish a pruning with torch.nn.utils.prune.remove, or detach what the modules hold"
        raise UnsupportedError(f"the model cannot be copied: {next(iter(str(error).splitlines()), '')}", hint=hint) from error
    with quiet(made):
        config = None if method == "dynamic" else _config(method, dtype, group_size)
    holders = {name: m for name, m in twin.named_modules() if is_parametrized(m) or any(p.ndim > 1 for p in m.parameters(recurse=False))}
    why_not = chooser(modules, exclude, holders)
    reasons = {name: why_not(name, type(m)) or _untaken(m, method, dtype, group_size) for name, m in holders.items()}
    chosen = {name: holders[name] for name, why in reasons.items() if not why}
    _require_finite(chosen)
    shared = _shared(twin)
    try:
        with quiet(made):
            twin = _dynamic(twin, chosen, made) if config is None else _by_torchao(twin, chosen, config, shared)
    except Exception as error:  # the engines raise whatever a module drives them to
        told = f"{method} cannot quantize this model: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        raise UnsupportedError(told, hint="exclude= leaves a module as it is") from error
    after = dict(twin.named_modules(remove_duplicate=False))
    for name, module in holders.items():
        changed = name in chosen and _is_quantized(after[name])
        why = f"{dtype}, {_held(method, group_size)}" if changed else reasons[name] or "the engine passed over it"
        numel = sum(p.numel() for p in module.parameters())
        (made.quantized if changed else made.left).append(Part(name or "(root)", type(module).__name__, numel, why))
    made.notes += [_DEPRECATED] if config is None else [_SLOW]
    if dtype == "int4":
        made.notes.append("torchao on a CPU keeps 4-bit values in 8 bits each: the error is that of int4, the file that of int8.")
    _tell_ties(made, shared, merged=config is not None)
    return twin, made


def reload_lines(made: Made, method: str, model: nn.Module) -> str:
    """Python that loads the saved state dict into `model`, a new module of the same class, in a process that has made nothing."""
    if method != "dynamic":
        head = "import torch, torchao.quantization  # torch.load knows torchao's tensors once it is imported"
        return f"{head}\nmodel.eval().load_state_dict(torch.load(path, weights_only=True), assign=True)"
    names = sorted(part.name for part in made.quantized)
    code = ["import torch"]
    if any(isinstance(m, nn.TransformerEncoderLayer) for m in model.modules()):
        code.append("torch.backends.mha.set_fastpath_enabled(False)  # it reads weights past the quantized modules")
    if {part.kind for part in made.quantized} != {"Linear"}:
        code.append("torch.serialization.add_safe_globals([torch.ScriptObject])  # a recurrent layer's weights are packed in one")
    if names == ["(root)"]:
        code.append('model = torch.ao.quantization.quantize_dynamic(torch.nn.ModuleDict({"m": model.eval()}), {"m"})["m"]')
    else:
        code.append(f"model = torch.ao.quantization.quantize_dynamic(model.eval(), {{{', '.join(map(repr, names))}}})")
    return "\n".join([*code, "model.load_state_dict(torch.load(path, weights_only=True))"])


def _config(method: str, dtype: str, group_size: int | None) -> Any:
    try:
        import torchao.quantization as ao
        from torchao.quantization.granularity import PerAxis, PerGroup
    except ImportError as error:
        raise MissingDependencyError(f"{method!r} needs torchao", hint='pip install "checkpoint-workbench[compress]"') from error
    per = PerGroup(group_size) if group_size else PerAxis(0)
    if method == "weight_only":
        return {
            "int8": lambda: ao.Int8WeightOnlyConfig(),
            "int4": lambda: ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=per),  # type: ignore[attr-defined]
            "float8_e4m3fn": lambda: ao.Float8WeightOnlyConfig(),
        }[dtype]()
    if dtype == "int8":
        return ao.Int8DynamicActivationInt8WeightConfig()
    return ao.Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=per)  # type: ignore[attr-defined]


def _untaken(module: nn.Module, method: str, dtype: str, group_size: int | None) -> str:
    """Why the engine does not take this module, or ""."""
    kinds = _DYNAMIC if method == "dynamic" else (nn.Linear,)
    if is_parametrized(module):
        return "its weight is computed anew in every run: torch.nn.utils.parametrize.remove_parametrizations first"
    if isinstance(module, (nn.MultiheadAttention, NonDynamicallyQuantizableLinear)):
        return "attention of torch.nn reads its weights itself; the ONNX methods take it"
    if type(module) not in kinds:
        taken = ", ".join(kind.__name__ for kind in kinds)
        return f"{method} takes {taken}" + ("; the ONNX methods take it" if type(module).__name__.startswith("Conv") else "")
    weight = next(module.parameters())
    if getattr(module, "proj_size", 0):
        return "the engine's LSTM computes no projection (proj_size)"
    if weight.dtype is not torch.float32 and (method == "dynamic" or weight.dtype not in (torch.float16, torch.bfloat16)):
        return f"its weights are {str(weight.dtype).removeprefix('torch.')}, and the engine takes float32"
    if dtype.startswith("float8") and not bool(weight.any(1).all()):
        return "a row of zeros gets the scale 0 from the engine, and NaN from that"
    if group_size and weight.shape[-1] % group_size:
        return f"its rows of {weight.shape[-1]} do not divide into groups of {group_size}"
    return ""


def _held(method: str, group_size: int | None) -> str:
    scales = "a scale a tensor" if method == "dynamic" else f"a scale a group of {group_size}" if group_size else "a scale a row"
    return scales if method == "weight_only" else f"{scales}, inputs int8 as they come"


def _require_finite(chosen: dict[str, nn.Module]) -> None:
    for name, module in chosen.items():
        for own, p in module.named_parameters():
            if not bool(p.isfinite().all()):
                told = f"{name}.{own}".lstrip(".") + " holds NaN or infinity, and one such value makes a whole row of codes worthless"
                raise SelectionError(told, hint="wb.checkup(model) tells where; exclude= leaves the module as it is")


def _shared(model: nn.Module) -> list[list[str]]:
    """Names of parameters that are one and the same tensor, group by group."""
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def _dynamic(twin: nn.Module, chosen: dict[str, nn.Module], made: Made) -> nn.Module:
    from torch.ao.quantization import quantize_dynamic

    layers = [m for m in twin.modules() if isinstance(m, (nn.TransformerEncoderLayer, nn.TransformerEncoder))]
    if not chosen:
        return twin
    holder = nn.ModuleDict({"m": twin})  # the engine replaces children, and passes over the root in silence
    names = {f"m.{name}".rstrip(".") for name in chosen}
    quantized: nn.Module = quantize_dynamic(holder, names, dtype=torch.qint8, inplace=True)["m"]  # type: ignore[no-untyped-call]
    if "" in chosen:
        made.repairs.append("The engine passes over a model that is itself the layer; it was quantized inside a holder and taken out.")
    encoders = [m for m in layers if isinstance(m, nn.TransformerEncoderLayer) and (_is_quantized(m.linear1) or _is_quantized(m.linear2))]
    if encoders:
        for layer in layers:
            layer.activation_relu_or_gelu, layer.use_nested_tensor = 0, False  # either keeps torch off its fast path
        told = "torch's fast path reads the weights of nn.TransformerEncoderLayer past the quantized modules, and fails"
        made.repairs.append(f"{told}; {len(encoders)} layers were kept off it. Padded places hold values now, where it has zeros.")
    return quantized


def _by_torchao(twin: nn.Module, chosen: dict[str, nn.Module], config: Any, shared: list[list[str]]) -> nn.Module:
    from torchao.quantization import quantize_

    quantize_(twin, config, filter_fn=lambda module, name: any(module is one for one in chosen.values()))
    for group in shared:  # the engine makes a copy for each name; one is enough, for the codes are the same
        owners = [chosen[name.rpartition(".")[0]] for name in group if name.rpartition(".")[0] in chosen]
        for other in owners[1:]:
            other.weight = owners[0].weight
    return twin


def _is_quantized(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.ao.nn.quantized") or hasattr(getattr(module, "weight", None), "__tensor_flatten__")


def _tell_ties(made: Made, shared: list[list[str]], *, merged: bool) -> None:
    done = Counter(part.name for part in made.quantized)
    for group in shared:
        apart = [name for name in group if name.rpartition(".")[0] in done]
        rest = [name for name in group if name not in apart]
        if apart and rest:
            made.notes.append(f"{', '.join(apart)} was one tensor with {', '.join(rest)}, which stays as it was: both are in the file now.")
        elif len(apart) > 1:
            told = (
                "were one tensor and still are"
                if merged
                else "were one tensor; the engine packs each by itself, so the codes stand there twice"
            )
            made.notes.append(f"{' and '.join(apart)} {told}.")
