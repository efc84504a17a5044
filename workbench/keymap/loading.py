"""load_into: put a checkpoint's values into a model, tensor by tensor, and prove that they are there.

The module's own load_state_dict is asked first (it may accept names that a plain comparison rejects, and may fill tensors
itself); only when it is content, or strict is False, is a single value copied. A model with loading code of its own is
loaded through that code, for it may change values. What counts is read from a new state_dict() afterwards.
"""

from __future__ import annotations

from collections import OrderedDict
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from workbench import dtypes
from workbench.checkpoint import Checkpoint, Step
from workbench.errors import SelectionError, SpecMismatchError, UnsupportedError, WorkbenchError, located
from workbench.keymap.certificate import LoadCertificate, LoadedTensor
from workbench.keymap.inference import bare_name, match
from workbench.keymap.rules import KeyMap, Pair
from workbench.opening import open as open_checkpoint
from workbench.sections import rename_modules
from workbench.tensors import LazyTensor, Live
from workbench.tree import Inert, is_mapping, items_of, live, plain, wrapped

if TYPE_CHECKING:
    import torch


def load_into(model: torch.nn.Module, ckpt: Any, keymap: KeyMap | None = None, strict: bool = True) -> LoadCertificate:
    """Load a checkpoint into a model and prove every value.

    Args:
        model: any nn.Module with real (not meta) tensors; its mode, devices and dtypes are kept.
        ckpt: anything `wb.open` takes; of a training checkpoint, its weights.
        keymap: from `wb.match`. Where absent, only the pairs that match finds certain are used.
        strict: refuse, before anything is copied, when the module would miss a tensor or a name of the file is left over.
            False skips what is missing, left over or of another shape, and lists each.
    Returns:
        LoadCertificate; falsy when a value in the model differs from the file.
    Raises:
        SpecMismatchError: strict, and names, shapes or kinds do not fit, or the module's own code refuses; the model is as it was.
        SelectionError: two sections of the file fit equally well, and none was chosen.
    Cost: two reads of each tensor (one to copy, one to prove); memory is one chunk. A model with loading code of its own (hooks,
    an override, state that is computed) is loaded through it instead, which holds the file's tensors in memory.
    """
    import torch

    if not isinstance(model, torch.nn.Module):
        raise SelectionError(
            f"a {type(model).__name__} is no nn.Module to load into", hint="wb.match(…).apply(ckpt) gives tensors under other names"
        )
    opened = open_checkpoint(ckpt)
    chosen = keymap if keymap is not None else _certain(match(opened, model))
    if keymap is None and chosen.rivals:
        sections = ", ".join(map(repr, (chosen.section, *chosen.rivals)))
        raise SelectionError(
            f"the sections {sections} fit the model equally well", hint="give one of them: wb.load_into(model, ckpt.section(…))"
        )
    own = _tensors(model)
    _require_real(own)
    part = _apart(chosen.part(opened), own)
    pairs, misfits = _fitting(chosen, part, own)
    through = _loads_itself(model, own)
    before = {name: value.clone() for name, value in own.items() if through or name not in pairs}
    ties = _ties(own, pairs)
    objects = _objects(part, model)
    within = {(key,) for key, _ in objects.values()}
    used = {pair.source for pair in pairs.values()}
    spare = [name for name in part if name not in used and part.paths[name][:1] not in within]
    missing, unexpected, verdict = _ask_module(model, own, pairs, part, chosen, spare, {n: v for n, (_, v) in objects.items()}, through)
    missing = [name for name in missing if name not in ties]
    if verdict.startswith(_REFUSED) or (strict and (missing or unexpected or misfits)):
        _restore(model, before)
        raise _refusal(missing, unexpected, misfits, chosen, part, verdict)
    if not through:
        _copy_all(part, pairs, own)
    held = _tensors(model)  # read anew: only now does it show whether what state_dict() computes was loaded
    rows = [_row(name, held[name], pairs.get(ties.get(name, name)), part, before, misfits, ties.get(name), through) for name in held]
    rows += [LoadedTensor(name, name, "set by the module", (), "object", 0) for name in objects]
    reasons = ("the module accepted it", "the module has no place for it")
    unused = tuple((name, reasons[name in unexpected]) for name in spare)
    return LoadCertificate(tuple(rows), unused, strict, chosen, verdict, _mode(model))


_REFUSED = "it refused: "


def _tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    import torch

    return {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}


def _objects(part: Checkpoint, model: torch.nn.Module) -> dict[str, tuple[Any, Any]]:
    """What the model's state dict holds beside tensors (extra state, packed parameters): name -> the file's key of the same bare name, value.

    An entry that holds an object which stays inert is left out; the module then misses it, and says so.
    """
    entries = items_of(part.tree) if is_mapping(part.tree) else {}
    keys = {bare_name(key): key for key in entries if isinstance(key, str)}
    out = {}
    for name, value in model.state_dict().items():
        key = keys.get(bare_name(name))
        if key is not None and not hasattr(value, "data_ptr") and not isinstance(wrapped(entries[key]), LazyTensor):
            with suppress(UnsupportedError):
                out[name] = (key, live(entries[key]))
    return out


def _apart(part: Checkpoint, own: dict[str, torch.Tensor]) -> Checkpoint:
    """The source, with copies of those live tensors that share memory with the model: copying must not change what is copied."""
    held = {Live(value).storage_key for value in own.values() if value.layout == _strided()}
    shared = {name for name, t in part.items() if isinstance(t.source, Live) and t.source.storage_key in held}
    if not shared:
        return part
    return part.rewrite(
        [(n, replace(t, source=Live(t.load().clone())) if n in shared else t, n) for n, t in part.items()], Step("copy", {})
    )


def _strided() -> Any:
    import torch

    return torch.strided


def _copy_all(part: Checkpoint, pairs: dict[str, Pair], own: dict[str, torch.Tensor]) -> None:
    for done, (name, pair) in enumerate(pairs.items()):
        try:
            with located(tensor=pair.source):
                _copy(part[pair.source], own[name])
        except WorkbenchError as error:
            if done:
                error.hint = f"{done} of {len(pairs)} tensors of the model were overwritten before this: build it anew" + (
                    f"; {error.hint}" if error.hint else ""
                )
            raise


def _loads_itself(model: torch.nn.Module, own: dict[str, torch.Tensor]) -> bool:
    """Whether the model has loading code that may change values: hooks, an override outside torch.nn, or state computed at each look."""
    import torch

    again = _tensors(model)
    if any(value.data_ptr() != again[name].data_ptr() or value.is_quantized for name, value in own.items()):
        return True
    if type(model).load_state_dict is not torch.nn.Module.load_state_dict:
        return True
    for module in model.modules():
        override = type(module)._load_from_state_dict
        patched = "_load_from_state_dict" in vars(module) or not override.__module__.startswith("torch.nn.modules.")
        if patched or module._load_state_dict_pre_hooks or module._load_state_dict_post_hooks:
            return True
    return False


def _ties(own: dict[str, torch.Tensor], pairs: dict[str, Pair]) -> dict[str, str]:
    """Names without a source of their own that share their memory with a name that has one."""
    held = {(own[name].data_ptr(), own[name].shape, own[name].stride()): name for name in pairs if own[name].numel()}
    found = {name: held.get((value.data_ptr(), value.shape, value.stride())) for name, value in own.items() if name not in pairs}
    return {name: first for name, first in found.items() if first is not None}


def _certain(keymap: KeyMap) -> KeyMap:
    return replace(keymap, pairs=tuple(pair for pair in keymap.pairs if pair.confidence == "certain"))


def _require_real(own: dict[str, torch.Tensor]) -> None:
    import torch

    for name, value in own.items():
        if torch.nn.parameter.is_lazy(value):
            raise UnsupportedError(
                "the model has a lazy parameter without a shape", tensor=name, hint="run the model once on an example first"
            )
        if value.device.type == "meta":
            raise UnsupportedError(
                "the model is on the meta device and holds no values",
                tensor=name,
                hint='give it memory first: model.to_empty(device="cpu")',
            )
        if any(stride == 0 and size > 1 for stride, size in zip(value.stride(), value.shape, strict=True)):
            raise UnsupportedError("the model's tensor is expanded: its elements share memory and cannot each take a value", tensor=name)


def _fitting(keymap: KeyMap, part: Checkpoint, own: dict[str, torch.Tensor]) -> tuple[dict[str, Pair], dict[str, str]]:
    """The pairs whose shapes and kinds agree, by target, and why the others do not."""
    pairs: dict[str, Pair] = {}
    misfits: dict[str, str] = {}
    wanted = {pair.target: pair for pair in keymap.pairs}
    reshaped = {u.target: u for u in keymap.unmatched if u.source is not None}
    for name, value in own.items():
        pair = wanted.get(name)
        source = name if pair is None and name in part else pair.source if pair is not None else None
        if source is None:
            if (near := reshaped.get(name)) is not None:
                misfits[name] = near.reason
            continue
        tensor = part[source]
        kind, target_dtype = tensor.dtype.kind, dtypes.from_torch(value.dtype)
        if tuple(value.shape) != tensor.shape:
            misfits[name] = f"{list(tensor.shape)} in the file and {list(value.shape)} in the model"
        elif kind != target_dtype.kind and tensor.dtype != target_dtype:
            misfits[name] = f"{tensor.dtype} in the file and {target_dtype} in the model"
        elif pair is not None:
            pairs[name] = pair
    return pairs, misfits


def _ask_module(
    model: torch.nn.Module,
    own: dict[str, torch.Tensor],
    pairs: dict[str, Pair],
    part: Checkpoint,
    keymap: KeyMap,
    spare: list[str],
    objects: dict[str, Any],
    through: bool,
) -> tuple[list[str], list[str], str]:
    """(missing, unexpected, verdict) by the module's own load_state_dict.

    Given the file's tensors where the model has loading code of its own. Otherwise what fits is copied onto itself, and the
    module sees only the file's spare tensors.
    """
    state: OrderedDict[str, Any] = OrderedDict((name, part[pair.source].load() if through else own[name]) for name, pair in pairs.items())
    state.update({name: part[name].load() for name in spare if name not in own and part[name].locked is None})
    state.update(objects)
    if (metadata := _metadata(part, keymap)) is not None:
        state._metadata = metadata  # type: ignore[attr-defined]
    try:
        result = model.load_state_dict(state, strict=False)
    except Exception as error:  # the model's own code may raise anything
        return [name for name in own if name not in pairs], [], _REFUSED + f"{type(error).__name__}: {error}".splitlines()[-1].strip()
    missing, unexpected = list(result.missing_keys), list(result.unexpected_keys)
    if missing or unexpected:
        return missing, unexpected, f"load_state_dict misses {len(missing)} names, does not know {len(unexpected)}"
    return missing, unexpected, "load_state_dict accepts the names as they are"


def _metadata(part: Checkpoint, keymap: KeyMap) -> Any:
    """The file's `_metadata` under the model's module names, which loading code asks for versions."""
    if isinstance(part.tree, Inert) and isinstance(part.tree.state, dict) and is_mapping(part.tree.state.get("_metadata")):
        return OrderedDict(
            rename_modules({key: plain(value) for key, value in items_of(part.tree.state["_metadata"]).items()}, keymap.mapping)
        )
    return None


def _restore(model: torch.nn.Module, before: dict[str, torch.Tensor]) -> None:
    """Put back what the module's loading code may have touched."""
    import torch

    with torch.no_grad():
        for name, value in _tensors(model).items():
            if name in before and not value.is_quantized and not _same_bytes(before[name], value):
                value.copy_(before[name])


def _refusal(
    missing: list[str], unexpected: list[str], misfits: dict[str, str], keymap: KeyMap, part: Checkpoint, verdict: str
) -> SpecMismatchError:
    if verdict.startswith(_REFUSED):
        return SpecMismatchError(
            f"the module's own loading code refused, and nothing was loaded: {verdict.removeprefix(_REFUSED)}",
            hint="model.load_state_dict shows its whole message",
        )
    lines = [f"{name}: {why}" for name, why in misfits.items()]
    reshaped = {u.source for u in keymap.unmatched if u.source is not None}
    unexpected = [name for name in unexpected if name not in misfits and name not in reshaped]
    missing = [name for name in missing if name not in misfits]
    lines += [f"{name}: not in the file" for name in missing] + [f"{name}: in the file, not in the model" for name in unexpected]
    counts = [
        f"{n} {what}"
        for n, what in ((len(misfits), "of another shape or kind"), (len(missing), "missing"), (len(unexpected), "left over"))
        if n
    ]
    shown = "; ".join(lines[:6]) + (f"; and {len(lines) - 6} more" if len(lines) > 6 else "")
    if any(part[name].dtype.name == "int8" and f"{name}_scale" in part for name in part):
        hint = "the file is quantized: load wb.ops.dequantize(ckpt)"
    elif keymap.ambiguous or any(True for name in missing if name not in {u.target for u in keymap.unmatched}):
        hint = "wb.match(ckpt, model) shows likely and ambiguous pairs; give keymap= to accept them, or strict=False to load the rest"
    else:
        hint = "strict=False loads the rest and lists what stays at initialisation"
    return SpecMismatchError(f"the file and the model do not fit ({', '.join(counts)}), and nothing was loaded: {shown}", hint=hint)


def _copy(source: LazyTensor, target: torch.Tensor) -> None:
    import torch

    with torch.no_grad():
        if not target.is_contiguous() or source.spec.quantizer or target.layout is not torch.strided:
            target.copy_(source.load())
            return
        flat = target.view(-1)
        for start, chunk in source.chunks():
            flat[start : start + chunk.numel()].copy_(chunk)


def _row(
    name: str,
    value: torch.Tensor,
    pair: Pair | None,
    part: Checkpoint,
    before: dict[str, torch.Tensor],
    misfits: dict[str, str],
    tied_to: str | None,
    through: bool,
) -> LoadedTensor:
    shape, nbytes = tuple(value.shape), value.numel() * value.element_size()
    dtype = dtypes.from_torch(value.dtype).name
    if pair is None:
        untouched = name in before and bool(_same_bytes(before[name], value))
        return LoadedTensor(name, None, "initial" if untouched else "set by the module", shape, dtype, nbytes, misfits.get(name, ""))
    source = part[pair.source]
    wrong = _difference(source, value)
    if wrong and through:
        wrong += "; the model's own loading code ran, and whether it meant this cannot be proven"
    notes = [f"tied to {tied_to}"] * bool(tied_to) + [f"{source.dtype} became {dtype}"] * (source.dtype.name != dtype)
    return LoadedTensor(name, pair.source, "wrong" if wrong else "loaded", shape, dtype, nbytes, wrong or "; ".join(notes))


def _difference(source: LazyTensor, value: torch.Tensor) -> str:
    """Empty when the model's tensor holds the file's values after the cast, else what is wrong."""
    import torch

    if tuple(value.shape) != source.shape:
        return "the model's tensor has another shape now"
    if source.spec.quantizer or value.is_quantized or value.layout is not torch.strided:
        return "" if torch.equal(source.load().to(value.device), value) else "the model's values differ from the file's"
    flat = value.detach().reshape(-1)
    for start, chunk in source.chunks():
        held = flat[start : start + chunk.numel()].cpu()
        cast = chunk.to(value.dtype)
        if not _same_bytes(cast, held):
            return "the model's values differ from the file's"
        if cast.dtype != chunk.dtype and _loses_range(chunk, cast):
            return f"values of the file do not fit {dtypes.from_torch(value.dtype)}"
    return ""


def _loses_range(chunk: torch.Tensor, cast: torch.Tensor) -> bool:
    """Whether a cast made another number of a whole one, or a finite one infinite."""
    import torch

    if not cast.dtype.is_floating_point and not cast.is_complex():
        return not torch.equal(cast.to(torch.int64), chunk.to(torch.int64)) or not torch.equal(cast.to(chunk.dtype), chunk)
    wide = torch.complex128 if cast.is_complex() else torch.float64
    return bool((torch.isfinite(chunk.to(wide)) & ~torch.isfinite(cast.to(wide))).any())


def _same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    import torch

    if a.layout is not torch.strided or a.is_quantized:
        return torch.equal(a, b)
    return a.shape == b.shape and torch.equal(dtypes.flat(a).view(torch.uint8), dtypes.flat(b).view(torch.uint8))


def _mode(model: torch.nn.Module) -> str:
    if not model.training:
        return "eval"
    live = {type(m).__name__ for m in model.modules() if type(m).__name__.startswith(("Dropout", "BatchNorm"))}
    return "train" + (f": {', '.join(sorted(live))} behave differently until model.eval()" if live else "")
