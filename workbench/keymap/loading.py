"""load_into: put a checkpoint's values into a model, tensor by tensor, and prove that they are there.

The module's own loading code is asked first (its hooks may accept names that a plain comparison rejects, and may fill
tensors itself); only when it is content, or strict is False, is a single value copied. Memory: the model and one chunk.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from workbench import dtypes
from workbench.checkpoint import Checkpoint
from workbench.errors import SpecMismatchError, UnsupportedError, located, visible
from workbench.keymap.inference import match
from workbench.keymap.rules import KeyMap, Pair
from workbench.opening import open as open_checkpoint
from workbench.report import Report
from workbench.tables import Column, Table, format_bytes, table
from workbench.tensors import LazyTensor
from workbench.tree import Inert, is_mapping, items_of, plain

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LoadedTensor:
    """One tensor of the model after loading.

    Attributes:
        source: its name in the file, or None where the file gave nothing.
        state: "loaded" (proven equal to the file's bytes, after the cast), "wrong", "set by the module" or "initial".
    """

    name: str
    source: str | None
    state: str
    shape: tuple[int, ...]
    dtype: str
    source_dtype: str | None
    nbytes: int
    note: str = ""


@dataclass(frozen=True, repr=False)
class LoadCertificate(Report):
    """What the model holds after loading, tensor by tensor. True when every value that was to be loaded is proven equal.

    Attributes:
        strict: whether nothing was allowed to be missing or left over.
        unused: names of the file that filled nothing, each with what the module said of it.
        verdict: what the module's own load_state_dict said.
    """

    rows: tuple[LoadedTensor, ...]
    unused: tuple[tuple[str, str], ...]
    strict: bool
    keymap: KeyMap
    verdict: str
    mode: str

    @property
    def ok(self) -> bool:
        return all(row.state != "wrong" for row in self.rows) and any(row.state == "loaded" for row in self.rows)

    @property
    def coverage(self) -> float:
        """Fraction of the model's bytes that hold the file's values."""
        total = sum(row.nbytes for row in self.rows)
        return sum(row.nbytes for row in self.rows if row.state == "loaded") / total if total else 0.0

    @property
    def headline(self) -> str:
        by_state = {state: [r for r in self.rows if r.state == state] for state in ("loaded", "wrong", "set by the module", "initial")}
        loaded = len(by_state["loaded"])
        text = (
            f"All {loaded} tensors hold the file's values"
            if loaded == len(self.rows)
            else f"{loaded} of {len(self.rows)} tensors hold the file's values"
        )
        if by_state["wrong"]:
            text += f"; {len(by_state['wrong'])} differ from the file, first {visible(by_state['wrong'][0].name)}"
        if by_state["set by the module"]:
            text += f"; {len(by_state['set by the module'])} were set by the module's own loading code"
        if by_state["initial"]:
            text += f"; {len(by_state['initial'])} stayed at initialisation"
        return text + (f"; {len(self.unused)} names of the file are unused" if self.unused else "")

    def tables(self) -> tuple[Table, ...]:
        marks = {"loaded": "✓", "wrong": "⚠", "set by the module": "~", "initial": "−"}
        columns = (
            Column("", "mark"),
            Column("model's name", "name"),
            Column("file's name", "name"),
            Column("state"),
            Column("shape", "shape"),
            Column("dtype"),
            Column("bytes", "bytes"),
            Column("note"),
        )
        rows = [
            (marks[r.state], r.name, r.source, r.state, r.shape, r.dtype, r.nbytes, r.note or None)
            for r in sorted(self.rows, key=lambda r: r.state == "loaded")
        ]
        total = sum(r.nbytes for r in self.rows)
        facts = [
            ("coverage", f"{100 * self.coverage:.4g} % of {format_bytes(total)}"),
            ("the module's verdict", self.verdict),
            ("mode", self.mode),
        ]
        facts += (
            [("section of the file", f"{self.keymap.section or '(root)'}: {self.keymap.section_reason}")]
            if self.keymap.section_reason
            else []
        )
        tables = [table("certificate", (Column("what"), Column("value")), facts), table("tensors", columns, rows)]
        if self.unused:
            tables.append(table("unused in the file", (Column("file's name", "name"), Column("why")), self.unused))
        return tuple(tables)


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
        SpecMismatchError: strict, and names, shapes or kinds do not fit; the model is as it was.
    Cost: two reads of each tensor (one to copy, one to prove); memory is one chunk.
    """
    opened = open_checkpoint(ckpt)
    chosen = keymap if keymap is not None else _certain(match(opened, model))
    part = opened.section(chosen.section) if chosen.section else opened.weights
    own = {name: value for name, value in model.state_dict().items() if _is_tensor(value)}
    _require_real(own)
    pairs, misfits = _fitting(chosen, part, own)
    before = {name: own[name].clone() for name in own if name not in pairs}
    missing, unexpected, verdict = _ask_module(model, own, pairs, part, chosen)
    ties = _ties(own, pairs)
    missing = [name for name in missing if name not in ties]
    if strict and (missing or unexpected or misfits):
        _restore(own, before)
        raise _refusal(missing, unexpected, misfits, chosen, part)
    for name, pair in pairs.items():
        with located(tensor=pair.source):
            _copy(part[pair.source], own[name])
    rows = tuple(_row(name, own[name], pairs.get(ties.get(name, name)), part, before, misfits, ties.get(name)) for name in own)
    used = {pair.source for pair in pairs.values()}
    unused = tuple(
        (name, "the module accepted it" if name not in unexpected else "the module has no place for it")
        for name in part
        if name not in used
    )
    return LoadCertificate(rows, unused, strict, chosen, verdict, _mode(model))


def _ties(own: dict[str, torch.Tensor], pairs: dict[str, Pair]) -> dict[str, str]:
    """Names without a source of their own that share their memory with a name that has one."""
    held = {(own[name].data_ptr(), own[name].shape, own[name].stride()): name for name in pairs if own[name].numel()}
    found = {name: held.get((value.data_ptr(), value.shape, value.stride())) for name, value in own.items() if name not in pairs}
    return {name: first for name, first in found.items() if first is not None}


def _certain(keymap: KeyMap) -> KeyMap:
    return replace(keymap, pairs=tuple(pair for pair in keymap.pairs if pair.confidence == "certain"))


def _is_tensor(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def _require_real(own: dict[str, torch.Tensor]) -> None:
    meta = [name for name, value in own.items() if value.device.type == "meta"]
    if meta:
        raise UnsupportedError(
            f"{len(meta)} tensors of the model are on the meta device and hold no values",
            tensor=meta[0],
            hint='give it memory first: model.to_empty(device="cpu")',
        )


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
    model: torch.nn.Module, own: dict[str, torch.Tensor], pairs: dict[str, Pair], part: Checkpoint, keymap: KeyMap
) -> tuple[list[str], list[str], str]:
    """(missing, unexpected, verdict) by the module's own load_state_dict, given its own tensors for what fits.

    What fits is copied onto itself, so only the module's hooks can change anything: they see the file's left-over tensors.
    """
    used = {pair.source for pair in pairs.values()}
    state: OrderedDict[str, Any] = OrderedDict((name, own[name]) for name in pairs)
    state.update({name: tensor.load() for name, tensor in part.items() if name not in used and name not in own and tensor.locked is None})
    extra = {name: value for name, value in model.state_dict().items() if name not in own}
    state.update(extra)
    if (metadata := _metadata(part)) is not None and all(pair.source == pair.target for pair in pairs.values()):
        state._metadata = metadata  # type: ignore[attr-defined]
    try:
        result = model.load_state_dict(state, strict=False)
    except RuntimeError as error:
        missing = [name for name in own if name not in pairs]
        return missing, [name for name in part if name not in used], f"it refused: {str(error).splitlines()[-1].strip()}"
    missing, unexpected = list(result.missing_keys), list(result.unexpected_keys)
    words = (
        "accepts the names as they are"
        if not missing and not unexpected
        else f"misses {len(missing)} names, does not know {len(unexpected)}"
    )
    return missing, unexpected, f"load_state_dict {words}"


def _metadata(part: Checkpoint) -> Any:
    if isinstance(part.tree, Inert) and isinstance(part.tree.state, dict) and is_mapping(part.tree.state.get("_metadata")):
        return OrderedDict((key, plain(value)) for key, value in items_of(part.tree.state["_metadata"]).items())
    return None


def _restore(own: dict[str, torch.Tensor], before: dict[str, torch.Tensor]) -> None:
    import torch

    with torch.no_grad():
        for name, value in before.items():
            own[name].copy_(value)


def _refusal(missing: list[str], unexpected: list[str], misfits: dict[str, str], keymap: KeyMap, part: Checkpoint) -> SpecMismatchError:
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
) -> LoadedTensor:
    shape, nbytes = tuple(value.shape), value.numel() * value.element_size()
    dtype = dtypes.from_torch(value.dtype).name
    if pair is None:
        untouched = name in before and bool(_same_bytes(before[name], value))
        return LoadedTensor(name, None, "initial" if untouched else "set by the module", shape, dtype, None, nbytes, misfits.get(name, ""))
    source = part[pair.source]
    wrong = _difference(source, value)
    notes = [f"tied to {tied_to}"] * bool(tied_to) + [f"{source.dtype} became {dtype}"] * (source.dtype.name != dtype)
    note = wrong or "; ".join(notes)
    return LoadedTensor(name, pair.source, "wrong" if wrong else "loaded", shape, dtype, source.dtype.name, nbytes, note)


def _difference(source: LazyTensor, value: torch.Tensor) -> str:
    """Empty when the model's tensor holds the file's values after the cast, else what is wrong."""
    import torch

    if source.spec.quantizer or value.layout is not torch.strided:
        return "" if torch.equal(source.load().to(value.device), value) else "the model's values differ from the file's"
    flat = value.detach().reshape(-1)
    for start, chunk in source.chunks():
        held = flat[start : start + chunk.numel()].cpu()
        cast = chunk.to(value.dtype)
        if not _same_bytes(cast, held):
            return "the model's values differ from the file's"
        if cast.dtype != chunk.dtype and bool((torch.isfinite(chunk.double()) & ~torch.isfinite(cast.double())).any()):
            return f"values of the file overflow {dtypes.from_torch(value.dtype)}"
    return ""


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
