"""Transfer learning: what trains and at which rate, features by layer, BatchNorm that stays still, an optimizer carried through a key repair,
and saving only what was trained.

These change the model's flags and nothing of its values. The optimizer stays the caller's: `param_groups` gives it named groups.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from workbench.checkpoint import Checkpoint, Finding, Step
from workbench.errors import SelectionError, SpecMismatchError, UnsupportedError, located
from workbench.formats import save
from workbench.formats.writing import SaveReport
from workbench.keymap.inference import match
from workbench.keymap.maps import KeyMap, Pair, inverted
from workbench.names import Patterns, match_names, require_names, suggest
from workbench.opening import open as open_checkpoint
from workbench.ops.scope import Entries, on_section, weights_of
from workbench.report import Report
from workbench.stream import bytes_of
from workbench.tables import Column, Table, table
from workbench.tensors import LazyTensor

# what trains


def freeze(model: nn.Module, names: Patterns = "*") -> tuple[str, ...]:
    """No gradient for the parameters that each glob of `names` selects; returns those that changed. BatchNorm moves: `keep_batchnorm`."""
    return _set_trainable(_selected(model, names), False)


def unfreeze(model: nn.Module, names: Patterns = "*") -> tuple[str, ...]:
    """Let the parameters that `names` selects train; returns those that changed. The optimizer must hold them: see `parameter_table`."""
    return _set_trainable(_selected(model, names), True)


def _selected(model: nn.Module, names: Patterns) -> dict[str, nn.Parameter]:
    """By its first name each parameter of which any name matches; a glob that matches none is refused."""
    every = dict(model.named_parameters(remove_duplicate=False))
    globs = [names] if isinstance(names, str) or not names else names
    chosen = {id(every[name]) for glob in globs for name in require_names(glob, every, what="parameter")}
    return {name: p for name, p in model.named_parameters() if id(p) in chosen}


def _set_trainable(parameters: Mapping[str, nn.Parameter], trainable: bool) -> tuple[str, ...]:
    chosen = {n: p for n, p in parameters.items() if p.requires_grad != trainable and (p.is_floating_point() or p.is_complex())}
    for p in chosen.values():
        p.requires_grad_(trainable)
    return tuple(chosen)


@dataclass(frozen=True)
class Unfreezing:
    """Gradual unfreezing: from which epoch on which parameters train, as ``Unfreezing({0: "head.*", 3: "blocks.{8-11}.*", 6: "*"})``.

    Source: Howard and Ruder 2018, arXiv:1801.06146.
    """

    stages: Mapping[int, Patterns]

    def at(self, epoch: int) -> tuple[str, ...]:
        """The globs that train in this epoch: those of every stage begun."""
        begun = [self.stages[start] for start in sorted(self.stages) if start <= epoch]
        return tuple(pattern for stage in begun for pattern in ([stage] if isinstance(stage, str) else stage))

    def apply(self, model: nn.Module, epoch: int) -> tuple[str, ...]:
        """Let exactly the parameters of this epoch train; returns those that newly do."""
        wanted = _selected(model, globs) if (globs := self.at(epoch)) else {}
        _set_trainable({name: p for name, p in model.named_parameters() if name not in wanted}, False)
        return _set_trainable(wanted, True)


@dataclass(frozen=True)
class ParameterRow:
    """One parameter: whether it trains, in which group of the optimizer, at which rate."""

    name: str
    shape: tuple[int, ...]
    numel: int
    trainable: bool
    tied: tuple[str, ...] = ()  # its other names
    group: str | None = None
    lr: float | None = None
    weight_decay: float | None = None


@dataclass(frozen=True, repr=False)
class ParameterReport(Report):
    """What trains. False when nothing does, or when the optimizer given leaves out a parameter that should."""

    rows: tuple[ParameterRow, ...]
    with_optimizer: bool

    @property
    def forgotten(self) -> tuple[str, ...]:
        """Parameters that get a gradient and are in no group of the optimizer."""
        return tuple(r.name for r in self.rows if self.with_optimizer and r.trainable and r.group is None)

    @property
    def ok(self) -> bool:
        return any(r.trainable for r in self.rows) and not self.forgotten

    @property
    def headline(self) -> str:
        trained, total = sum(r.numel for r in self.rows if r.trainable), sum(r.numel for r in self.rows)
        idle = sum(not r.trainable and r.group is not None for r in self.rows)
        text = f"{trained:,} of {total:,} parameters train ({100 * trained / max(total, 1):.3g} %)"
        text += f"; {len(self.forgotten)} trainable tensors are in no optimizer group, first {self.forgotten[0]}" if self.forgotten else ""
        return text + (f"; {idle} frozen tensors are in the optimizer, and wait there" if idle else "")

    def tables(self) -> tuple[Table, ...]:
        sums: dict[str, Counter[bool]] = {}
        for row in self.rows:
            sums.setdefault(row.name.rpartition(".")[0].split(".")[0] or "(root)", Counter())[row.trainable] += row.numel
        modules = [(module, c[True], c[False], c[True] / max(c.total(), 1)) for module, c in sums.items()]
        heads = (Column("module", "name"), Column("trainable", "count"), Column("frozen", "count"), Column("trains", "percent"))
        columns = (
            Column("", "mark"), Column("parameter", "name"), Column("shape", "shape"), Column("group", "name"),
            Column("lr", "number"), Column("weight decay", "number"),
        )  # fmt: skip
        rows = [("●" if r.trainable else "❄", " = ".join((r.name, *r.tied)), r.shape, r.group, r.lr, r.weight_decay) for r in self.rows]
        return table("by module", heads, modules), table("parameters", columns, rows)


def parameter_table(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> ParameterReport:
    """Every parameter of the model: trainable or frozen, and its group and rate in the optimizer."""
    held = {
        id(p): (str(group.get("name", i)), float(group["lr"]), group.get("weight_decay"))
        for i, group in enumerate(optimizer.param_groups if optimizer is not None else ())
        for p in group["params"]
    }
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    rows = [
        ParameterRow(name, tuple(p.shape), p.numel(), p.requires_grad, tuple(names[id(p)][1:]), *held.get(id(p), (None, None, None)))
        for name, p in _shaped(model).items()
    ]
    return ParameterReport(tuple(rows), optimizer is not None)


def _shaped(model: nn.Module) -> dict[str, nn.Parameter]:
    """Its parameters, refused where a lazy one has no shape yet."""
    own = dict(model.named_parameters())
    if lazy := [name for name, p in own.items() if nn.parameter.is_lazy(p)]:
        raise UnsupportedError("the model has a lazy parameter without a shape", tensor=lazy[0], hint="run the model once first")
    return own


def param_groups(
    model: nn.Module, lr: float, *, layer_decay: float = 1.0, weight_decay: float = 0.0, no_decay: Patterns | None = None
) -> list[dict[str, Any]]:
    """Groups for an optimizer, deepest layer last, with lr * layer_decay ** (layers above it).

    The layers are the numbered modules (ModuleList, Sequential) in the order in which the model registers them; what stands before them
    is the stem, what stands behind them the head, and vectors in between (a last normalisation) go with the layer before, as does a
    numbered module of vectors alone (the BatchNorm behind a convolution). A model without numbered modules has one layer for each child.

    Args:
        weight_decay: of matrices; vectors (biases, normalisations) get none.
        no_decay: glob over further parameters that get none, as ["pos_embed", "cls_token"].
    Returns:
        dicts of name, params (with their names, which torch keeps in the optimizer's state), lr and weight_decay; frozen parameters are left out.
    Raises:
        SelectionError, UnsupportedError: nothing trains, a glob of `no_decay` selects nothing, or a parameter is lazy.
    Source: Clark et al. 2020, arXiv:2003.10555; Bao et al. 2022, arXiv:2106.08254.
    """
    own = _shaped(model)
    layers = _layers(model)
    plain = _selected(model, no_decay) if no_decay is not None else {}
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for depth, (layer, names) in enumerate(layers):
        rate = lr * layer_decay ** (len(layers) - 1 - depth)
        for name in names:
            if own[name].requires_grad:
                decays = weight_decay > 0 and own[name].ndim > 1 and name not in plain
                told = layer if decays or not weight_decay else f"{layer}, no decay"
                made = {"name": told, "params": [], "lr": rate, "weight_decay": weight_decay if decays else 0.0}
                groups.setdefault((depth, decays), made)["params"].append((name, own[name]))
    if not groups:
        raise SelectionError("no parameter of the model trains", hint="wb.models.unfreeze(model, names)")
    return [groups[key] for key in sorted(groups)]


def _layers(model: nn.Module) -> list[tuple[str, list[str]]]:
    """(name, its parameters) of each layer, in depth order. One of vectors alone is the normalisation of the layer before it."""
    blocks = set(_blocks(model))
    own = dict(model.named_parameters())
    where = {n: next((".".join(p[:i]) for i in range(len(p)) if ".".join(p[:i]) in blocks), "") for n in own for p in [n.split(".")]}
    inside = [i for i, layer in enumerate(where.values()) if layer]
    solid = {layer for name, layer in where.items() if own[name].ndim > 1}
    found: dict[str, list[str]] = {}
    last = "stem"
    for i, (name, layer) in enumerate(where.items()):
        if not inside:
            last = name.partition(".")[0] if "." in name else "(root)"
        elif layer:
            last = layer if layer in solid else last
        elif i > inside[-1] and (own[name].ndim > 1 or last == "head"):
            last = "head"
        found.setdefault(last, []).append(name)
    return list(found.items())


def _blocks(module: nn.Module, prefix: str = "", inside: bool = False) -> Iterator[str]:
    """Paths of the modules that are layers: items of the outermost containers, or of the stages that those are."""
    is_list = isinstance(module, (nn.Sequential, nn.ModuleList)) and len(module) > 1 and (not inside or _is_stage(module))
    for name, child in module.named_children():
        if next(child.parameters(), None) is not None:
            deeper = list(_blocks(child, f"{prefix}{name}.", inside or is_list))
            yield from deeper or ([f"{prefix}{name}"] if is_list else [])


def _is_stage(module: nn.Module) -> bool:
    """Whether a container inside a layer runs like modules one after another, each with modules of its own: the blocks of a stage."""
    kinds = {type(child) for child in module.children()}
    return isinstance(module, nn.Sequential) and len(kinds) == 1 and all(next(c.children(), None) is not None for c in module.children())


# features


class _Reached(BaseException):  # not an Exception: a forward may swallow those
    pass


def features(model: nn.Module, layer: str, /, *args: Any, **kwargs: Any) -> Any:
    """What the module called `layer` gives when the model runs on the arguments; the model runs no further than that.

    Mode and gradients are the caller's: ``with torch.inference_mode(): wb.models.features(model.eval(), "layer4", x)``. A compiled
    model runs eagerly here, for its graph calls no hooks.

    Raises:
        SelectionError, UnsupportedError: no such module, the model did not run it, or it is TorchScript.
    """
    found: list[Any] = []

    def reached(module: nn.Module, inputs: Any, output: Any) -> None:
        found.append(output)
        raise _Reached

    modules = dict(model.named_modules())
    if layer not in modules:
        raise SelectionError(
            f"the model has no module {layer!r}", hint=f"some it has: {', '.join(suggest(layer, modules) or [*modules][1:4])}"
        )
    if isinstance(modules[layer], torch.jit.ScriptModule):
        raise UnsupportedError(f"{layer!r} is TorchScript, which takes no hooks", hint="take features of the model it was made of")
    handle = modules[layer].register_forward_hook(reached)
    try:
        with suppress(_Reached), torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext():
            model(*args, **kwargs)
    finally:
        handle.remove()
    if found:
        return found[0]
    raise SelectionError(f"the model ran without calling {layer!r}", hint="another module's output may be what you want")


# BatchNorm


@dataclass(frozen=True)
class BatchNormRow:
    """One normalisation with running statistics. `moves`: whether its statistics change in the next step after `model.train()`."""

    name: str
    kind: str
    frozen: bool
    moves: bool


@dataclass(frozen=True, repr=False)
class BatchNormReport(Report):
    """Normalisations with running statistics. False when one whose parameters are frozen would still move in training."""

    rows: tuple[BatchNormRow, ...]

    @property
    def moving(self) -> tuple[str, ...]:
        return tuple(r.name for r in self.rows if r.frozen and r.moves)

    @property
    def ok(self) -> bool:
        return not self.moving

    @property
    def headline(self) -> str:
        if self.moving:
            return f"{len(self.moving)} frozen BatchNorm layers still move under train(), first {self.moving[0]}: wb.models.keep_batchnorm(model)"
        return f"{sum(r.frozen for r in self.rows)} of {len(self.rows)} BatchNorm layers are frozen, and none of those moves under train()"

    def tables(self) -> tuple[Table, ...]:
        columns = (Column("", "mark"), Column("module", "name"), Column("class"), Column("parameters"), Column("under train()"))
        words = (("trainable", "frozen"), ("still", "moves"))
        rows = [("⚠" if r.frozen and r.moves else "✓", r.name, r.kind, words[0][r.frozen], words[1][r.moves]) for r in self.rows]
        return (table("BatchNorm", columns, rows, empty="no module keeps running statistics"),)


def frozen_batchnorm(model: nn.Module) -> BatchNormReport:
    """Which normalisations would still move although they are frozen: `train()` turns running statistics on, whatever has a gradient.

    A layer without parameters of its own counts as frozen when nothing beside it trains.
    """
    parents = {child: parent for parent in model.modules() for child in parent.children()}
    rows = []
    for name, module in model.named_modules():
        if isinstance(module, _NormBase) and module.running_mean is not None:
            judged = list(module.parameters()) or list(parents.get(module, module).parameters())
            frozen = bool(judged) and not any(p.requires_grad for p in judged)
            rows.append(BatchNormRow(name, type(module).__name__, frozen, not _hooks(module) and module.momentum != 0))
    return BatchNormReport(tuple(rows))


def keep_batchnorm(model: nn.Module, names: Patterns | None = None, *, keep: bool = True) -> tuple[str, ...]:
    """Hold normalisations in eval mode whatever `train()` says: a hook turns each back before it runs. The hook pickles and deep-copies.

    Args:
        names: glob over module names; where absent, those whose parameters are frozen.
        keep: False lets them go again.
    Returns:
        The names of the modules held, or let go.
    """
    known = {row.name: row.frozen or not keep for row in frozen_batchnorm(model).rows}
    chosen = [n for n, taken in known.items() if taken] if names is None else require_names(names, known, what="BatchNorm")
    for module in map(model.get_submodule, chosen):
        for key in _hooks(module):
            del module._forward_pre_hooks[key]
        if keep:
            module.register_forward_pre_hook(_stay)
            module.eval()
    return tuple(chosen)


def _stay(module: nn.Module, inputs: Any) -> None:
    module.eval()


def _hooks(module: nn.Module) -> list[int]:
    return [key for key, hook in module._forward_pre_hooks.items() if hook is _stay]


# the optimizer's state through a key repair


def carry_optimizer(
    state: Mapping[str, Any],
    keymap: KeyMap | None,
    old_names: Sequence[str] | None,
    new: Mapping[str, Any],
    *,
    drop: Patterns | None = None,
) -> dict[str, Any]:
    """An optimizer's state dict for the same training under a model's new names.

    Args:
        state: `optimizer.state_dict()` as it was saved.
        keymap: from the old model to the new one, as `wb.match` gives it; None where names stayed and only their order changed.
        old_names: the old parameters' names in the order the optimizer got them; None where its groups keep their names.
        new: the new optimizer's parameters by name, in its order: ``dict(model.named_parameters())``, or names to shapes.
        drop: glob over old names whose state may be lost, as those of a head that was swapped.
    Returns:
        A state dict for `load_state_dict` of the new optimizer. A new parameter without an old one begins without state.
    Raises:
        SelectionError: names and state do not fit, or state would be lost: no successor, a formula, another order (LBFGS).
        SpecMismatchError: a moment has another shape than its new parameter.
    Cost: splits, merges and transposes copy; everything else is passed on, as torch's own load_state_dict does: two optimizers that
    both go on from the state of a live one would share its moments, so give each a copy, or what was saved.
    """
    groups, order = state["param_groups"], list(new)
    flat = [(i, key) for i, group in enumerate(groups) for key in group["params"]]
    names = [name for group in groups for name in group.get("param_names", ())] if old_names is None else list(old_names)
    if len(names) != len(flat) or len(set(names)) != len(names):
        raise SelectionError(
            f"{len(names)} names for the optimizer's {len(flat)} parameters", hint="give old_names, each once and in its order"
        )
    group_of = {name: i for name, (i, _) in zip(names, flat, strict=True)}
    slots = {name: state["state"][key] for name, (_, key) in zip(names, flat, strict=True) if state["state"].get(key)}
    may_go = set(match_names(drop, names)) if drop is not None else set()
    given = keymap.pairs if keymap is not None else tuple(Pair.plain(name, name, "same name", "certain", "") for name in names)
    pairs = {p.target: p for p in given if p.target in new and may_go.isdisjoint(p.sources) and not group_of.keys().isdisjoint(p.sources)}
    if lost := [name for name in slots if name not in may_go and not any(name in p.sources for p in pairs.values())]:
        raise SelectionError(f"the state of {lost[0]!r} would be lost: nothing new is made of it", hint="name it with drop= if it may go")
    inverted(KeyMap(tuple(pairs.values())))  # refuses a formula, and a parameter of which only a part goes on
    in_a_row = any(isinstance(value, (list, tuple)) for own in slots.values() for value in own.values())
    if in_a_row and [pairs[name].source if name in pairs and pairs[name].is_plain else None for name in new] != names:
        raise SelectionError("the state is of all parameters in a row, as LBFGS keeps it, and it holds for that order alone")
    out: dict[int, dict[str, Any]] = {}
    members: list[list[int]] = [[] for _ in groups]
    for i, (name, value) in enumerate(new.items()):
        sources = pairs[name].sources if name in pairs else ()
        homes = {group_of[source] for source in sources if source in group_of} or set(range(len(groups)))
        if len(homes) > 1:
            raise SelectionError(f"{name!r} could go into several groups of the optimizer", hint="put its parameters into one group first")
        members[homes.pop()].append(i)
        if not slots.keys().isdisjoint(sources):
            with located(tensor=name):
                shape = tuple(getattr(value, "shape", value))
                out[i] = {**slots[names[i]]} if in_a_row else _carried(pairs[name], slots, shape)
    if [i for group in members for i in group] != list(range(len(order))):
        raise SelectionError("the new parameters do not stand in the order of the optimizer's groups", hint="order `new` by group")
    told = [{"param_names": [order[i] for i in own]} if "param_names" in group else {} for group, own in zip(groups, members, strict=True)]
    return {**state, "state": out, "param_groups": [{**groups[g], **told[g], "params": members[g]} for g in range(len(groups))]}


def _carried(pair: Pair, slots: Mapping[str, Mapping[str, Any]], shape: tuple[int, ...]) -> dict[str, Any]:
    """The slots of one new parameter, made of the old ones' as the parameter is; counters must agree."""
    held = [slots.get(source, {}) for source in pair.sources]
    if any(own.keys() != held[0].keys() for own in held):
        raise SelectionError("its parts do not have the same state")
    out: dict[str, Any] = {}
    for slot, first in held[0].items():
        values = {source: slots[source][slot] for source in pair.sources}
        copied = not pair.is_plain and isinstance(first, torch.Tensor)
        out[slot] = first.clone() if copied else first  # each optimizer counts up its own step in place
        if copied and first.ndim:
            out[slot] = KeyMap((pair,)).apply(open_checkpoint(values))[pair.target].load()
        elif any(bool(value != first) for value in values.values() if len(values) > 1):
            raise SelectionError(f"its parts differ in {slot!r}, and one value must serve all")
    sizes = {slot: tuple(value.shape) for slot, value in out.items() if isinstance(value, torch.Tensor) and value.ndim}
    alike = {slot: found for slot, found in sizes.items() if len(found) == len(shape)}  # others, as a table of codes, are of the whole
    wrong = [slot for slot, found in alike.items() if any(n not in (1, m) for n, m in zip(found, shape, strict=True))]
    if wrong or (sizes and tuple(map(max, zip(*alike.values(), strict=True))) != shape):  # factored moments span it together
        slot = (wrong or list(sizes))[0]
        raise SpecMismatchError(f"{slot} has the shape {list(sizes[slot])} and the parameter {list(shape)}")
    return out


# only what was trained

_BASE, _REMOVED, _KEYMAP = "workbench.delta.base", "workbench.delta.removed", "workbench.delta.keymap"


def save_delta(model: Any, base: Any, path: str | os.PathLike[str], *, keymap: KeyMap | None = None) -> SaveReport:
    """Save the tensors in which a model differs from its base, as they are, with the base's content hash: a head, an adapter, a few layers.

    Args:
        model, base: anything `wb.open` takes.
        path: a safetensors file.
        keymap: from the base's names to the model's, as ``wb.match(base, model)`` gives it, which is asked where no name is in both. What
            it says is written down too, so `with_delta` takes the base as it is. It cannot make the result wrong: each tensor is compared.
    Raises:
        SelectionError: nothing differs, no tensor of the base is in the model, the model holds more than tensors, or sections have an
            equal claim.
    Cost: two reads of the base and one of the model.
    """
    ours, theirs = weights_of(open_checkpoint(model)), weights_of(open_checkpoint(base))
    if ours.extras:
        raise SelectionError(f"a delta holds tensors alone, and the model has {next(iter(ours.extras))!r} besides", hint="save it whole")
    if keymap is None and ours.keys().isdisjoint(theirs):
        keymap = match(theirs, model)
    told = {_BASE: _content_hash(theirs)}
    if keymap is not None:
        keymap = _exact(keymap)
        told[_KEYMAP], theirs = json.dumps(keymap.to_dict()), keymap.apply(theirs)
    kept = {name: tensor for name, tensor in ours.items() if name not in theirs or not _same_bytes(tensor, theirs[name])}
    if len(kept) == len(ours) and keymap is not None:
        text = (
            f"nothing of {theirs.name} is in the model unchanged, under its own names or those of {len(keymap.pairs)} pairs that were found"
        )
        raise SelectionError(text, hint="give keymap=, as wb.match(base, model).edited(accept={…}) makes it, or save the model whole")
    removed = [name for name in theirs if name not in ours]
    if not kept and not removed:
        raise SelectionError("nothing differs from the base, so there is nothing to save")
    return save(Checkpoint(kept, name="delta", metadata={**told, _REMOVED: json.dumps(removed)}), path, format="safetensors")


def with_delta(base: Any, delta: Any) -> Checkpoint:
    """The base with the tensors of a delta in place of its own: bit for bit those that were saved. What is no tensor stays the base's.

    A base under other names than the model's gives its weights alone, under the model's.

    Raises:
        SelectionError: `delta` is none, or was made on another base.
    Cost: one read of the base, to prove that it is the one; the result is read when it is written or loaded.
    """
    whole, part = open_checkpoint(base), open_checkpoint(delta)
    if _BASE not in part.metadata:
        raise SelectionError("this is no delta: it does not say on which base it was made", hint="wb.models.save_delta writes one")
    if (found := _content_hash(weights_of(whole))) != part.metadata[_BASE]:
        raise SelectionError(f"the delta was made on another base: content {part.metadata[_BASE][:12]}, and this is {found[:12]}")
    if _KEYMAP in part.metadata:
        try:
            keymap = KeyMap.from_dict(json.loads(part.metadata[_KEYMAP]))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise SelectionError(f"the map from the base's names in {part.name} cannot be read: {error}") from error
        whole = _exact(keymap).apply(weights_of(whole))
    removed = set(json.loads(part.metadata[_REMOVED]))

    def entries(section: Checkpoint) -> Entries:
        anchor = next((n for n in section if n not in removed), next(iter(section)))  # what the base never had is put beside this
        added = [(name, tensor, anchor) for name, tensor in part.items() if name not in section]
        return [*((n, part.get(n, t), n) for n, t in section.items() if n not in removed), *added]

    out = on_section(whole, None, _KEYMAP in part.metadata, Step("with_delta", {"with": part.name, "base": part.metadata[_BASE]}), entries)
    text = f"{', '.join(list(out.weights.extras)[:3])}: no tensor, and so not of the delta, but the base's"
    return replace(out, findings=(*out.findings, *[Finding("kept from the base", "warning", text)] * bool(out.weights.extras)))


def _exact(keymap: KeyMap) -> KeyMap:
    """The pairs of a map that give the same bits on every machine, and no more of them than the base has."""
    pairs = [pair for pair in keymap.pairs if not pair.formula and all(part.source for part in pair.parts)]
    return KeyMap(tuple(replace(pair, rule="", reason="") for pair in pairs), section=keymap.section)


def _same_bytes(a: LazyTensor, b: LazyTensor) -> bool:
    if a.spec != b.spec or a.spec.quantizer or a.spec.layout != "strided":
        return False
    return all(bytes_of(chunk) == bytes_of(b.read(start, start + chunk.numel())) for start, chunk in a.chunks())


def _content_hash(ckpt: Checkpoint) -> str:
    """SHA-256 over names, types, shapes and bytes of all tensors, in the order of their names: the same in every file format."""
    digest = hashlib.sha256()
    for name in sorted(ckpt):
        tensor = ckpt[name]
        if tensor.spec.quantizer or tensor.spec.layout != "strided":
            raise UnsupportedError("a base of sparse or quantized tensors has no content hash here", tensor=name)
        digest.update(json.dumps([name, tensor.dtype.name, tensor.shape]).encode())
        for _, chunk in tensor.chunks():
            digest.update(bytes_of(chunk))
    return digest.hexdigest()
