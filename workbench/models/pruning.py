"""Pruning of a model, over torch.nn.utils.prune: at once, in steps with fine-tuning between, and finishing what was left masked.

Zeros alone make nothing smaller or faster: every report says so. `slim` removes channels for good.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.nn.utils import prune as _engine

from workbench.errors import SelectionError
from workbench.names import Patterns, require_names
from workbench.ops.pruning import count_of, kept_of, largest_of_groups
from workbench.report import Report
from workbench.tables import Column, Table, table

engine: Any = _engine  # untyped
_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
Modules = Patterns | type[nn.Module] | Sequence[type[nn.Module]]
_Chosen = dict[str, tuple[nn.Module, nn.Parameter, str | None]]  # name -> module, parameter, the earlier name of a shared one


@dataclass(frozen=True)
class PrunedLayer:
    """One parameter: what was asked of it (a fraction, count or N:M; None where the scope is global), and its zeros."""

    name: str
    kind: str
    shape: tuple[int, ...]
    asked: float | str | None
    zeros: int
    numel: int
    tied_to: str | None = None


@dataclass(frozen=True)
class PruningStep:
    """One step of a schedule: the sparsity asked and reached over all chosen parameters, and the score after fine-tuning."""

    asked: float
    reached: float
    score: float | None = None


@dataclass(frozen=True, repr=False)
class PruneReport(Report):
    """Asked and reached, by layer; false where nothing is zero."""

    rows: tuple[PrunedLayer, ...]
    masked: bool
    steps: tuple[PruningStep, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def sparsity(self) -> float:
        own = [row for row in self.rows if row.tied_to is None]
        return sum(row.zeros for row in own) / max(sum(row.numel for row in own), 1)

    @property
    def ok(self) -> bool:
        return self.sparsity > 0

    @property
    def headline(self) -> str:
        text = f"{100 * self.sparsity:.3g} % of the values in {len(self.rows)} layers are zero; "
        if self.masked:
            return text + "masks beside the originals make the file twice as large until wb.models.finish_pruning(model)"
        return text + "file size and speed do not change by that: wb.sparsity says what packing would give, wb.models.slim removes channels"

    def tables(self) -> tuple[Table, ...]:
        columns = (Column("parameter", "name"), Column("class"), Column("shape", "shape"), Column("asked"), Column("zeros", "percent"))
        rows = [
            (r.name if r.tied_to is None else f"{r.name} = {r.tied_to}", r.kind, r.shape, r.asked, r.zeros / max(r.numel, 1))
            for r in self.rows
        ]
        steps = (Column("step", "count"), Column("asked", "percent"), Column("reached", "percent"), Column("score", "number"))
        run = [(i, step.asked, step.reached, step.score) for i, step in enumerate(self.steps, 1)]
        notes = [table("notes", (Column("note"),), [(note,) for note in self.notes])] if self.notes else []
        return (table("layers", columns, rows), *([table("steps", steps, run)] if run else []), *notes)


def prune(
    model: nn.Module,
    amount: float | None = None,
    *,
    method: str = "l1",
    modules: Modules = _KINDS,
    name: str = "weight",
    scope: Literal["layer", "global"] = "layer",
    n: float = 2,
    dim: int = 0,
    seed: int = 0,
    make_permanent: bool = True,
) -> PruneReport:
    """Zero a part of the model's parameters, in place.

    Args:
        amount: a fraction in [0, 1) or a count (an int) of each parameter, or of all together with scope="global". What an earlier mask
            took counts, so it is the sparsity reached and not one more cut.
        method: "l1", "random" or "ln" (whole slices along `dim` by their `n`-norm; `amount` is of slices), or N:M along dimension 1 as "2:4".
        modules: classes, or globs over module names.
        name: which parameter of these: "weight", "bias".
        make_permanent: False leaves `weight_orig` and `weight_mask`, which hold the zeros through training; such a model cannot be
            deep-copied. `finish_pruning` ends that.
    Returns:
        PruneReport. A parameter that several modules share is pruned once, with one mask.
    Raises:
        SelectionError: an argument out of range, no such parameter, or one that the method does not fit.
    """
    chosen = _chosen(model, modules, name)
    if scope not in ("layer", "global") or (scope == "global" and method not in ("l1", "random")):
        raise SelectionError(f'scope={scope!r} with {method!r}: "layer", or with "l1" and "random" also "global"')
    devices = {p.device.index for _, p, _ in chosen.values() if p.is_cuda}
    with torch.random.fork_rng(devices), torch.no_grad():
        torch.manual_seed(seed)
        _mask(chosen, name, amount, method, scope == "global", {"n": n, "dim": dim})
    if make_permanent:
        finish_pruning(*(module for module, *_ in chosen.values()))
    return _report(model, chosen, name, method if amount is None else amount if scope == "layer" else None)


def finish_pruning(*models: nn.Module) -> tuple[str, ...]:
    """End every pruning of torch.nn.utils.prune in the models, in place: masks become zeros. Returns the names of the parameters."""
    held = [
        (module, hook._tensor_name, f"{path}.{hook._tensor_name}".lstrip("."))
        for model in models
        for path, module in model.named_modules()
        for hook in [*module._forward_pre_hooks.values()]
        if isinstance(hook, engine.BasePruningMethod)
    ]
    for module, name, _ in held:
        with _in_the_place_of(module, f"{name}_orig", name):
            engine.remove(module, name)
    return tuple(full for _, _, full in held)


def sparsity_schedule(final: float, steps: int, kind: Literal["cubic", "linear"] = "cubic", *, start: float = 0.0) -> tuple[float, ...]:
    """The sparsity to reach at each of `steps` steps: "cubic" prunes much at first and little at the end, "linear" evenly.

    Source: Zhu and Gupta 2017, arXiv:1710.01878: final + (start - final) * (1 - t) ** 3.
    """
    if kind not in ("cubic", "linear") or steps < 1 or not 0 <= start < final < 1:
        raise SelectionError(
            f'{kind!r} from {start} to {final} in {steps} steps: "cubic" or "linear", rising within [0, 1), one step or more'
        )
    return tuple(final + (start - final) * (1 - i / steps) ** (3 if kind == "cubic" else 1) for i in range(1, steps + 1))


def prune_steps(
    model: nn.Module,
    schedule: Sequence[float],
    fine_tune: Callable[[nn.Module, int], object],
    *,
    evaluate: Callable[[nn.Module], float] | None = None,
    method: str = "l1",
    modules: Modules = _KINDS,
    name: str = "weight",
    scope: Literal["layer", "global"] = "global",
    n: float = 2,
    dim: int = 0,
    seed: int = 0,
    make_permanent: bool = True,
) -> PruneReport:
    """Prune in steps, in place: to each sparsity of `schedule`, then fine_tune(model, step). Masks hold the zeros meanwhile.

    An optimizer made before stays good: the parameters are the same objects throughout.

    Args:
        schedule: fractions that rise, as ``sparsity_schedule(0.9, 5)``.
        evaluate: any number to record after each fine-tuning, as accuracy on held-out data; given the model in eval mode.
    Other arguments as for `prune`.
    Returns:
        PruneReport with its steps.
    """
    told = list(schedule)
    if not told or told != sorted(told) or not all(isinstance(amount, float) and 0 <= amount < 1 for amount in told):
        raise SelectionError(f"schedule={told!r}: fractions in [0, 1) that rise", hint="wb.models.sparsity_schedule(0.9, 5)")
    steps: list[PruningStep] = []
    for step, amount in enumerate(told):
        options = {"method": method, "modules": modules, "name": name, "scope": scope, "n": n, "dim": dim, "seed": seed + step}
        report = prune(model, amount, make_permanent=False, **options)  # type: ignore[arg-type]
        fine_tune(model, step)
        score = None
        if evaluate is not None:
            training = model.training
            with torch.no_grad():
                score = float(evaluate(model.eval()))
            model.train(training)
        steps.append(PruningStep(amount, report.sparsity, score))
    chosen = _chosen(model, modules, name)
    if make_permanent:
        finish_pruning(*(module for module, *_ in chosen.values()))
    return _report(model, chosen, name, told[-1] if scope == "layer" else None, tuple(steps))


def _chosen(model: nn.Module, modules: Modules, name: str) -> _Chosen:
    """The parameters called `name`, the originals of those that are masked."""
    every = dict(model.named_modules())
    kinds = tuple(kind for kind in ([modules] if isinstance(modules, (str, type)) else modules) if isinstance(kind, type))
    paths = [p for p, m in every.items() if isinstance(m, kinds)] if kinds else require_names(cast(Patterns, modules), every, what="module")
    found: _Chosen = {}
    first: dict[int, str] = {}
    for path in paths:
        own = every[path]._parameters
        parameter = own.get(f"{name}_orig", own.get(name))
        if parameter is not None:
            if nn.parameter.is_lazy(parameter) or not parameter.is_floating_point():
                raise SelectionError(f"{name!r} is no floating tensor", tensor=path, hint="run a lazy model once, prune before quantizing")
            full = f"{path}.{name}".lstrip(".")
            held_by = first.setdefault(id(parameter), full)
            found[full] = (every[path], parameter, held_by if held_by != full else None)
    if not found:
        raise SelectionError(f"no module chosen has a parameter {name!r}", hint="modules= takes classes, or globs over module names")
    return found


def _mask(chosen: _Chosen, name: str, amount: float | None, method: str, whole: bool, ln: dict[str, Any]) -> None:
    """Put masks on all chosen, tied ones alike; computed from the originals, for what a module shows is one optimizer step behind."""
    own = {full: (module, parameter) for full, (module, parameter, tied) in chosen.items() if tied is None}
    masks = {full: getattr(module, f"{name}_mask", torch.ones_like(p)).clone() for full, (module, p) in own.items()}
    scores = {full: parameter.detach() for full, (_, parameter) in own.items()}
    if whole:
        values, held = (torch.cat([t.reshape(-1) for t in tensors.values()]) for tensors in (scores, masks))
        parts = torch.split(_masked_further(values, held, amount, method, ln), [s.numel() for s in scores.values()])
        masks = {full: part.view(scores[full].shape) for full, part in zip(masks, parts, strict=True)}
    else:
        masks = {full: _masked_further(scores[full], masks[full], amount, method, ln, full) for full in own}
    for full, (module, parameter, tied) in chosen.items():
        mask = masks[tied or full]
        if hasattr(module, f"{name}_mask"):
            getattr(module, f"{name}_mask").copy_(mask)
            setattr(module, name, mask.to(parameter.dtype) * parameter)  # as the hook does before each forward
        else:
            with _in_the_place_of(module, name, f"{name}_orig"):
                engine.custom_from_mask(module, name, mask)


@contextmanager
def _in_the_place_of(module: nn.Module, old: str, new: str) -> Iterator[None]:
    """The engine puts what it renames last, and the state of an optimizer is saved by the order of the parameters: keep that."""
    order = [new if key == old else key for key in module._parameters]
    yield
    held = {key: module._parameters[key] for key in order}
    module._parameters.clear()
    module._parameters.update(held)


def _masked_further(
    values: torch.Tensor, mask: torch.Tensor, amount: float | None, method: str, ln: dict[str, Any], name: str | None = None
) -> torch.Tensor:
    """The mask with so much more taken that `amount` of the tensor is gone; never less than before."""
    if (ratio := kept_of(method)) is not None:
        kept, group = ratio
        if amount is not None or values.ndim < 2 or values.shape[1] % group:
            raise SelectionError(f"{method} takes no amount, and a dimension 1 that {group} divides: {list(values.shape)}", tensor=name)
        groups = (values * mask).movedim(1, -1)
        largest = largest_of_groups(groups.reshape(-1, group), kept).view(groups.shape)
        return mask * largest.movedim(-1, 1).to(mask)
    if method == "ln" and (values.ndim < 2 or not -values.ndim <= ln["dim"] < values.ndim):
        raise SelectionError(f"the shape {list(values.shape)} has no slices along dim={ln['dim']}", tensor=name)
    if method == "ln":
        alive = mask.movedim(ln["dim"], 0).flatten(1).sum(1)
        size, gone = alive.numel(), int((alive == 0).sum())
    else:
        size, gone = mask.numel(), int((mask == 0).sum())
    count = max(count_of(amount, size, name) - gone, 0)
    kinds: dict[str, Callable[[], Any]] = {
        "l1": lambda: engine.L1Unstructured(count), "random": lambda: engine.RandomUnstructured(count), "ln": lambda: engine.LnStructured(count, **ln),
    }  # fmt: skip
    if method not in kinds:
        raise SelectionError(f'method={method!r}: it can be "l1", "random", "ln", or N:M as "2:4"')
    if not count:
        return mask
    container, step = engine.PruningContainer(), kinds[method]()
    container._tensor_name = step._tensor_name = "weight"
    container.add_pruning_method(step)
    return container.compute_mask(values, mask)  # type: ignore[no-any-return]


def _report(model: nn.Module, chosen: _Chosen, name: str, asked: float | str | None, steps: tuple[PruningStep, ...] = ()) -> PruneReport:
    rows, notes = [], []
    every = [(full, p) for full, p in model.named_parameters(remove_duplicate=False)]
    masked = False
    for full, (module, parameter, tied) in chosen.items():
        values = getattr(module, name)
        rows.append(PrunedLayer(full, type(module).__name__, tuple(values.shape), asked, int((values == 0).sum()), values.numel(), tied))
        masked |= hasattr(module, f"{name}_mask")
        outside = [other for other, p in every if p is parameter and other.removesuffix("_orig") not in chosen]
        if outside and tied is None:
            word = "is not masked there until finish_pruning" if hasattr(module, f"{name}_mask") else "has the zeros too"
            notes.append(f"{full} is also {', '.join(outside)}, and {word}")
    return PruneReport(tuple(rows), masked, steps, tuple(notes))
