"""What the cases are built with: the case record, its registry, filling modules with known noise, and proofs by forward outputs."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Case:
    """One key mismatch, with the answer.

    Attributes:
        source: what the file holds: name -> tensor, maybe nested, maybe with things that are no tensors.
        target: the nn.Module to fill, or name -> shape.
        expected: target name -> value, for every target name that has a right value in the source. Names that are not here
            have no source at all: a map that fills one of them is wrong.
        unprovable: target name -> why names and shapes cannot tell which source it is; must come out ambiguous or unmatched.
        either: target name -> why a careful map may fill it (with the expected value) or leave it: both are right.
        verified: "forward" (outputs of source and target model were equal), "library" (the real library's own conversion gave
            the expected values), "identity" (the same module under another name), "formula" (published layout, dequantised here).
        choice: the source holds more than one section that fits: the map must say which it took (rivals, findings, ambiguous).
        others: other answers that are as right as `expected`, each whole: a mixture of two is wrong.
        tol: largest allowed difference relative to the largest expected value; 0 for exact.
    """

    source: Any
    target: Any
    expected: dict[str, Tensor]
    verified: str
    unprovable: dict[str, str] = field(default_factory=dict)
    either: dict[str, str] = field(default_factory=dict)
    choice: bool = False
    others: list[dict[str, Tensor]] = field(default_factory=list)
    tol: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class Spec:
    name: str
    bullet: str
    libs: str
    build: Callable[[], Case]


BULLETS = {
    "wrapper": "wrappers at any depth and mid-name",
    "rename": "renamed modules and parameters, library to library",
    "index": "shifted indices, dropped or inserted layers",
    "fuse": "splits, merges and permutations",
    "layout": "transposes and row orders (Conv1D, Dense kernels, rope)",
    "param": "parametrizations (weight_norm, spectral_norm, prune)",
    "lora": "LoRA and PEFT",
    "quant": "dequantization of weight + scale",
    "tie": "ties and aliases",
    "head": "heads kept or left, shape surgery",
    "section": "which section to take",
    "negative": "traps: must be refused, ambiguous or left",
}
SPECS: list[Spec] = []


def case(name: str, bullet: str, libs: str = "torch") -> Callable[[Callable[..., Case]], Callable[..., Case]]:
    assert bullet in BULLETS, bullet

    def add(build: Callable[[], Case]) -> Callable[[], Case]:
        assert name not in {s.name for s in SPECS}, name
        SPECS.append(Spec(name, bullet, libs, build))
        return build

    return add


def add(name: str, bullet: str, libs: str, build: Callable[[], Case]) -> None:
    case(name, bullet, libs)(build)


@contextlib.contextmanager
def quiet():
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


@torch.no_grad()
def fill(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every floating parameter and persistent buffer gets noise of its own, scaled so that activations stay near 1; eval mode."""
    gen = torch.Generator().manual_seed(seed)
    kept = module.state_dict(keep_vars=True)
    done: set[int] = set()
    for name, value in kept.items():
        if not isinstance(value, Tensor) or id(value) in done or not value.is_floating_point():
            continue
        done.add(id(value))
        end = name.rsplit(".", 1)[-1]
        if end in {"inv_freq", "original_inv_freq"} or "mask" in end or value.dtype.itemsize < 2:
            continue
        noise = torch.randn(value.shape, generator=gen)
        if end == "running_var":
            noise = noise.abs() + 0.5
        elif value.dim() == 1 and (end.endswith("weight") or end in {"gamma", "scale"}):
            noise = 1 + 0.3 * noise
        elif value.dim() <= 1:
            noise = 0.3 * noise
        else:
            noise = noise / max(1.0, (value.numel() / value.shape[0]) ** 0.5)
        value.data.copy_(noise.to(value.dtype))
    for name, value in kept.items():
        if name.endswith("num_batches_tracked"):
            value.fill_(17 + seed % 5)
    return module.eval()


def sd(module: nn.Module) -> dict[str, Tensor]:
    return {n: t.detach().clone() for n, t in module.state_dict().items() if isinstance(t, Tensor)}


def shapes(module: nn.Module | Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    state = module.state_dict() if isinstance(module, nn.Module) else module
    return {n: tuple(t.shape) for n, t in state.items() if isinstance(t, Tensor)}


def land(target: nn.Module, expected: Mapping[str, Tensor], but: Any = ()) -> nn.Module:
    """Load what is expected; nothing may be left over, and nothing missing but `but`."""
    result = target.load_state_dict(dict(expected), strict=False)
    assert not result.unexpected_keys, result.unexpected_keys[:5]
    missing = [k for k in result.missing_keys if k not in but]
    assert not missing, missing[:5]
    return target.eval()


@torch.no_grad()
def agree(left: Any, right: Any, tol: float = 2e-4) -> None:
    """The two outputs are equal but for rounding, and are not trivially so."""
    left, right = left().float(), right().float()
    assert left.shape == right.shape, (left.shape, right.shape)
    assert left.isfinite().all()
    assert left.std() > 1e-4, "the outputs say nothing"
    worst = (left - right).abs().max() / left.abs().max()
    assert worst <= tol, f"outputs differ by {worst:.2e}"


def forward_case(
    source_model: nn.Module, target: nn.Module, expected: dict[str, Tensor], run_source: Any, run_target: Any, **more: Any
) -> Case:
    """A case whose expected values make the target's outputs equal the source's."""
    source = more.pop("source", None)
    but = more.pop("but", ())
    as_shapes = more.pop("as_shapes", False)
    tol = more.pop("out_tol", 2e-4)
    land(target, expected, but)
    agree(lambda: run_source(source_model), lambda: run_target(target), tol)
    if os.environ.get("CASES4_SENSITIVITY"):
        UNSEEN.update(unseen(target, expected, run_target))
    fill(target, 9001)
    return Case(sd(source_model) if source is None else source, shapes(target) if as_shapes else target, expected, "forward", **more)


UNSEEN: dict[str, str] = {}


@torch.no_grad()
def unseen(target: nn.Module, expected: dict[str, Tensor], run_target: Any) -> dict[str, str]:
    """The expected names that the outputs cannot see: changing them changes nothing, so equal outputs prove nothing of them."""
    before, out = run_target(target).float(), {}
    own = target.state_dict(keep_vars=True)
    for name, value in expected.items():
        held = own[name]
        if not value.is_floating_point():
            out[name] = "no float"
            continue
        kept = held.detach().clone()
        held.data.mul_(1.5).add_(0.1)
        if held.dim() == 1:
            held.data.mul_(torch.linspace(0.5, 1.5, len(held)))
        after = run_target(target).float()
        held.data.copy_(kept)
        if (after - before).abs().max() <= 1e-5 * before.abs().max():
            out[name] = "outputs do not change"
    return out


@torch.no_grad()
def trace_copy(source: nn.Module, target: nn.Module, run_source: Any, run_target: Any) -> dict[str, Tensor]:
    """target name -> value, by the order in which modules run: an oracle that never looks at a module's name.

    A module with one parameter of its own (a layer scale) pairs with the other's one; sizes must agree, axes of 1 may differ.
    The outputs must be equal afterwards, which forward_case proves.
    """

    def order(model: nn.Module, run: Any) -> list[tuple[str, dict[str, Tensor]]]:
        seen: dict[str, nn.Module] = {}
        hooks = []
        for name, module in model.named_modules():
            own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            if own:
                hooks.append(module.register_forward_pre_hook(lambda m, a, name=name: (seen.setdefault(name, m), None)[1]))
        run(model)
        for hook in hooks:
            hook.remove()
        out = []
        for name, module in seen.items():
            inner = {id(t) for child in module.children() for t in child.state_dict(keep_vars=True).values()}
            own = {k: v.detach().clone() for k, v in module.state_dict(keep_vars=True).items() if "." not in k and id(v) not in inner}
            if own:
                out.append((name, own))
        return out

    left, right = order(source, run_source), order(target, run_target)
    assert len(left) == len(right), (len(left), len(right), [n for n, _ in left][:40], [n for n, _ in right][:40])
    out: dict[str, Tensor] = {}
    for (other, values), (name, wanted) in zip(left, right, strict=True):
        for key, want in wanted.items():
            value = values[key] if key in values else next(iter(values.values())) if len(values) == len(wanted) == 1 else None
            assert value is not None, (other, name, key)
            assert value.numel() == want.numel(), (other, list(values), name, key)
            out[f"{name}.{key}" if name else key] = value.reshape(want.shape)
    return out


def ids(size: int = 7, vocab: int = 50, batch: int = 2) -> Tensor:
    return torch.randint(0, vocab, (batch, size), generator=torch.Generator().manual_seed(5))


def image(size: int = 32, channels: int = 3) -> Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(6))


def floats(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


__all__ = [name for name in dir() if not name.startswith("_")]


def equal(value, want, tol):
    """Whether a value is the one wanted: bit for bit, or within `tol` of the largest."""
    if value.shape != want.shape:
        return False
    if tol == 0 or not want.is_floating_point():
        return torch.equal(value.to(want.dtype), want)
    return torch.allclose(value.double(), want.double(), rtol=0, atol=tol * float(want.double().abs().max().clamp_min(1e-12)))
