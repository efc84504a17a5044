"""Where an op acts, and on which tensors: shared by every op."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from workbench.checkpoint import Checkpoint, Step
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

    Raises:
        SelectionError: both were given, or several sections have an equal claim to be the weights and neither was.
    """
    if everything and section is not None:
        raise SelectionError("give section= or everything=True, not both")
    if not everything and section is None and ckpt.rival_sections:
        names = ", ".join(repr(s.name) for s in (ckpt.weights_section, *ckpt.rival_sections))
        raise SelectionError(
            f"the sections {names} have an equal claim to be the weights", hint="give section= one of them, or everything=True"
        )
    path = () if everything else ckpt.weights_section.path if section is None else section
    part = ckpt.section(path)
    result = part.rewrite(op(part), step)
    return result if part is ckpt else ckpt.with_section(path, result)


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
