"""Where an op acts, and on which tensors: shared by every op."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from workbench import dtypes
from workbench.checkpoint import Checkpoint, Finding, Step
from workbench.errors import SelectionError
from workbench.names import Patterns, require_names
from workbench.sections import Path
from workbench.tensors import LazyTensor

if TYPE_CHECKING:
    import torch

Entries = Iterable[tuple[str, LazyTensor, str]]


def on_section(
    ckpt: Checkpoint, section: str | Path | None, everything: bool, step: Step, op: Callable[[Checkpoint], Entries]
) -> Checkpoint:
    """Apply `op` to the weights of `ckpt` (or another section, or everything) and return the whole tree.

    Findings tell of ties that ended, and of an optimizer in the tree whose moments have an old shape now.

    Raises:
        SelectionError: both were given, or several sections have an equal claim to be the weights and neither was.
    """
    if everything and section is not None:
        raise SelectionError("give section= or everything=True, not both")
    if not everything and section is None:
        weights_of(ckpt)
    path = () if everything else ckpt.weights_section.path if section is None else section
    part = ckpt.section(path)
    result = part.rewrite(op(part), step)
    whole = result if part is ckpt else ckpt.with_section(path, result)
    told = [*_ties_ended(part, result), *_moments_left(part, result, whole)]
    return replace(whole, findings=(*whole.findings, *told)) if told else whole


def weights_of(ckpt: Checkpoint) -> Checkpoint:
    """The weights of `ckpt`, refused where several sections have an equal claim to be them."""
    if ckpt.rival_sections:
        rivals = [s.name for s in (ckpt.weights_section, *ckpt.rival_sections)]
        text = f"the sections {', '.join(map(repr, rivals))} of {ckpt.name} have an equal claim to be the weights"
        raise SelectionError(text, hint=f"choose one: ckpt.section({rivals[0]!r}), or section= or everything=True where an op takes them")
    return ckpt.weights


def _ties_ended(before: Checkpoint, after: Checkpoint) -> Iterator[Finding]:
    for name, first in before.aliases.items():
        if name in after and first in after and after[name].source != after[first].source:
            text = f"{first!r} and {name!r} were one tensor and are two now; a model that ties them takes one of the two"
            yield Finding("tie ended", "warning", text, {"tensor": name})


def _moments_left(before: Checkpoint, after: Checkpoint, whole: Checkpoint) -> Iterator[Finding]:
    changed = {name: t.shape for name, t in before.items() if name in after and after[name].shape != t.shape}
    for section in whole.sections() if changed else ():
        held = {t.shape for t in whole.section(section.path).values()} if section.kind == "optimizer" else ()
        if left := [name for name, shape in changed.items() if shape in held]:
            text = f"{left[0]!r} has another shape now, and {section.name!r} still holds moments of the old one: a step with them fails"
            yield Finding("moments left", "warning", text, {"tensor": left[0]}, "begin with a new optimizer, or carry_optimizer(…, drop=…)")


def floating(ckpt: Checkpoint, names: Patterns | None, *, matrices_only: bool = True) -> set[str]:
    """The floating, dense tensors that an op takes: those of `names`, else all (with two dimensions or more).

    Raises:
        SelectionError: nothing floating is selected.
    """
    chosen = require_names(names, ckpt) if names is not None else list(ckpt)
    found = {name for name in chosen if _holds_weights(ckpt[name]) and (names is not None or not matrices_only or ckpt[name].ndim >= 2)}
    if not found:
        what = f"that {names!r} selects is floating" if names is not None else "here is a floating matrix"
        raise SelectionError(f"no tensor {what}", hint="name tensors with names=; floating ones can be chosen")
    return found


def _holds_weights(tensor: LazyTensor) -> bool:
    exponents_only = tensor.dtype.name == "float8_e8m0fnu"  # block scales: no sign and no zero
    return tensor.dtype.is_floating and not exponents_only and tensor.spec.layout == "strided" and tensor.spec.quantizer is None


def mapped(ckpt: Checkpoint, chosen: set[str], make: Callable[[str, LazyTensor], LazyTensor]) -> Iterator[tuple[str, LazyTensor, str]]:
    """Entries in which each chosen tensor became what `make` gives; tied tensors are made once and stay tied."""
    made: dict[object, LazyTensor] = {}
    for name, tensor in ckpt.items():
        if name in chosen:
            key = (tensor.source, tensor.spec)
            if key not in made:
                made[key] = make(name, tensor)
            yield name, made[key], name
        else:
            yield name, tensor, name


def wide(values: torch.Tensor) -> torch.Tensor:
    """The values in the type that sums are taken in: float64 as it is, any other floating type as float32."""
    import torch

    return values if values.dtype == torch.float64 else values.float()


def rounded(values: torch.Tensor, dtype: torch.dtype, finite: torch.Tensor | Literal[True] = True) -> torch.Tensor:
    """Sums in another type; refused where one made of finite values (`finite`) does not fit it, or did not fit the type of the sum."""
    import torch

    out = values.to(dtype)
    lost = ~torch.isfinite(values) & finite
    if out.dtype != values.dtype:
        lost |= dtypes.out_of_range(values, out)
    if bool(lost.any()):
        raise SelectionError(f"a sum does not fit {dtypes.from_torch(dtype)}", hint="cast to a wider type first, or lower the weights")
    return out
