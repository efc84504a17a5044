"""Causes: why a candidate differs, as far as an experiment shows it.

Owns the experiments that run after a comparison has failed. Each changes one thing (the reference's mode, its weights' precision, the
candidate's weights, the graph's opset, the places or values looked at) and names its cause only when the difference goes away with it, or
for quantization and dtype has the size that they alone make. Nothing is guessed: where no experiment speaks, there is no cause.
The next cause is one function in `_EXPERIMENTS`.
"""

from __future__ import annotations

import copy
import itertools
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from workbench.verification.measures import peak
from workbench.verification.reordering import standing_by
from workbench.verification.runners import ModuleRunner, OnnxRunner, Runner, running
from workbench.verification.values import Call, kept, paired
from workbench.verification.variations import corners, variations

_LIKE = 10  # an error up to 10 times what 8 bits or half precision make by themselves is of their size
_MAX_GRAPH = 100_000_000
_MAX_COPY = 1 << 30
_OPSETS = (9, 11, 12, 13, 17, 18, 21)
_QUANTIZED = ("uantize", "MatMulInteger", "ConvInteger", "QLinear", "QGemm", "NBits")
_HALVES = (torch.float16, torch.bfloat16)

Answers = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Failure:
    """A comparison that failed, as `parity` saw it.

    Attributes:
        reference, candidate, trust, mask, by_position: as given to `parity`.
        batches: every batch that both sides answered, by what the report calls it.
        names: what the report calls reference and candidate.
        failing: {batch: calls on which it failed}.
        limits: {batch: {output: limit}}; 0 for whole numbers.
    """

    reference: Any
    candidate: Any
    trust: bool
    mask: Any
    names: tuple[str, str]
    by_position: bool
    batches: Mapping[str, Call]
    failing: Mapping[str, tuple[int, ...]]
    limits: Mapping[str, Mapping[str, float]]


def cause_of(failure: Failure) -> str:
    """The first cause that an experiment shows, in a sentence without its full stop, or "".

    Cost: two to thirty runs of each side on one failing batch; copies of the reference's weights, one at a time. Above 1 GiB of them, the
    experiments that copy are left out.
    """
    if not failure.failing:
        return ""
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        reference = stack.enter_context(running(failure.reference, trust=failure.trust))
        candidate = stack.enter_context(running(failure.candidate, trust=failure.trust))
        reference.name, candidate.name = failure.names
        try:
            lab = _Lab(failure, reference, candidate)
        except Exception:  # one side no longer answers: nothing can be tried
            return ""
        for experiment in _EXPERIMENTS:
            try:
                found = experiment(lab)
            except Exception:  # a stranger's model under changed conditions: what it does not survive shows nothing
                continue
            if found:
                return found
    return ""


class _Lab:
    """What the experiments share: both runners, one failing batch, and how far apart two sets of answers are in limits."""

    def __init__(self, failure: Failure, reference: Runner, candidate: Runner) -> None:
        self.failure, self.reference, self.candidate = failure, reference, candidate
        self.label = next(iter(failure.failing))
        self.batch = failure.batches[self.label]
        module = failure.reference if isinstance(failure.reference, torch.nn.Module) else None
        self.module = module if module is not None and sum(p.nbytes for p in module.parameters()) <= _MAX_COPY else None
        path = failure.candidate
        self.graph = Path(path) if isinstance(path, (str, os.PathLike)) and Path(path).suffix.lower() == ".onnx" else None
        self.plain = self.apart(self.seeded(reference), self.seeded(candidate))

    def seeded(self, runner: Runner, batch: Call | None = None, seed: int = 0) -> Answers:
        torch.manual_seed(seed)
        return runner((batch or self.batch).fresh())

    def apart(
        self, expected: Answers, found: Answers, *, only: Mapping[str, torch.Tensor] | None = None, batch: Call | None = None
    ) -> float:
        """The largest difference in limits: at most 1 where everything agrees, infinite where shapes or finiteness differ."""
        keep = kept(self.failure.mask, batch or self.batch, expected) if only is None else only
        worst = 0.0
        for name, (a, b) in paired(
            expected, found, ordered=self.candidate.ordered or self.reference.ordered, by_position=self.failure.by_position
        ).items():
            if a is None or b is None or a.shape != b.shape:
                return math.inf
            a, b = (a[keep[name]], b[keep[name]]) if name in keep else (a, b)
            limit = self.failure.limits[self.label].get(name, 0.0)
            if not torch.equal(a.isnan(), b.isnan()) or not torch.equal(a.isinf(), b.isinf()):
                return math.inf
            moved = peak(a, b)[0]
            worst = max(worst, moved / limit if limit else math.inf if moved else 0.0)
        return worst

    def explains(self, reference: Runner | None = None, candidate: Runner | None = None) -> bool:
        """Whether the difference goes away with this reference or candidate."""
        apart = self.apart(self.seeded(reference or self.reference), self.seeded(candidate or self.candidate))
        return apart <= 2 and apart < self.plain / 4

    def like(self, runner: Runner) -> bool:
        """Whether this changed reference moves as far as the candidate lies away, within a factor."""
        return 0 < self.plain < _LIKE * self.apart(self.seeded(self.reference), self.seeded(runner)) < math.inf

    def changed(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Runner:
        """The reference with every floating parameter changed."""
        assert self.module is not None
        twin = copy.deepcopy(self.module).eval()
        with torch.no_grad():
            for parameter in twin.parameters():
                if parameter.is_floating_point():
                    parameter.copy_(change(parameter))
        return ModuleRunner(twin, "changed")

    def nodes(self) -> list[Any]:
        import onnx

        return [] if self.graph is None else list(onnx.load(str(self.graph), load_external_data=False).graph.node)


def _train_mode(lab: _Lab) -> str:
    if lab.module is None:
        return ""
    normed = torch.nn.modules.batchnorm._BatchNorm
    for cause, norm, rest in (
        ("batch norm is in train mode", True, False),
        ("dropout is left on", False, True),
        ("the candidate is in train mode: dropout is left on and batch norm takes each batch's own statistics", True, True),
    ):
        twin = copy.deepcopy(lab.module).eval()
        for module in twin.modules():
            module.training = norm if isinstance(module, normed) else rest
        if lab.explains(reference=ModuleRunner(twin, "train")):
            return f"{cause}: the reference in that mode, with the same random seed, answers as {lab.candidate.name} does"
    return ""


def _randomness(lab: _Lab) -> str:
    for runner in (lab.candidate, lab.reference):
        answers = [lab.seeded(runner, seed=seed) for seed in (1, 2, 1)]
        if lab.apart(answers[0], answers[1]) <= 1:
            continue
        drops = sum(node.op_type == "Dropout" for node in lab.nodes()) if runner is lab.candidate else 0
        if drops:
            return f"dropout is left on: the graph holds {drops} Dropout nodes, and two runs on the same input differ"
        if lab.apart(answers[0], answers[2]) <= 1:
            return f"{runner.name} draws at random: its answers follow the random seed"
    return ""


def _state(lab: _Lab) -> str:
    for calls in lab.failure.failing.values():
        if 1 not in calls:
            return f"state: the first call agrees and call {calls[0]} does not, so one side keeps what an earlier call left"
    return ""


def _opset(lab: _Lab) -> str:
    import onnx

    if lab.graph is None or lab.graph.stat().st_size > _MAX_GRAPH:
        return ""
    model = onnx.load(str(lab.graph))
    (own,) = (entry for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    said = own.version
    with tempfile.TemporaryDirectory() as folder:
        for own.version in (version for version in _OPSETS if version != said):
            onnx.save(model, f"{folder}/m.onnx")
            try:
                if lab.explains(candidate=OnnxRunner(Path(folder, "m.onnx"))):
                    return f"opset semantics: the file says opset {said}, and read as opset {own.version} the same nodes agree"
            except Exception:  # most graphs are valid in few opsets
                continue
    return ""


def _quantization(lab: _Lab) -> str:
    count = sum(any(part in node.op_type for part in _QUANTIZED) for node in lab.nodes())
    thing = lab.failure.candidate
    if isinstance(thing, torch.nn.Module):
        count = sum("quantized" in type(m).__module__ for m in thing.modules() if not list(m.children()))
        count += sum(type(p).__module__.startswith("torchao") for p in thing.parameters())
    if not count or lab.module is None or not lab.like(lab.changed(_eight_bits)):
        return ""
    return f"quantization: {lab.candidate.name} holds {count} quantized parts, and 8-bit weights move the reference by as much"


def _eight_bits(weight: torch.Tensor) -> torch.Tensor:
    if weight.ndim < 2:
        return weight
    scale = weight.abs().amax(tuple(range(1, weight.ndim)), keepdim=True).clamp_min(1e-12) / 127
    return (weight / scale).round() * scale


def _dtype(lab: _Lab) -> str:
    if lab.plain <= 1:
        answers = paired(
            lab.seeded(lab.reference), lab.seeded(lab.candidate), ordered=lab.candidate.ordered, by_position=lab.failure.by_position
        )
        if any(a is not None and b is not None and a.dtype != b.dtype for a, b in answers.values()):
            return "dtype: the values agree and only their element type differs"
    if lab.module is None:
        return ""
    for half in _HALVES:
        word = str(half).removeprefix("torch.")
        if lab.explains(reference=lab.changed(lambda p, half=half: p.to(half).to(p.dtype))):  # type: ignore[misc]
            return f"dtype: with its weights rounded to {word} the reference answers as {lab.candidate.name} does"
    for half in _held(lab):
        word = str(half).removeprefix("torch.")
        twin = copy.deepcopy(lab.module).eval().to(half)
        runner = ModuleRunner(_Cast(twin, half), word)
        if lab.like(runner):
            return f"dtype: {lab.candidate.name} holds {word}, and computing in {word} moves the reference by as much"
    return ""


def _held(lab: _Lab) -> Iterator[torch.dtype]:
    """Half-precision types that the candidate holds or computes in."""
    thing = lab.failure.candidate
    found: set[torch.dtype] = {p.dtype for p in thing.parameters()} if isinstance(thing, torch.nn.Module) else set()
    if lab.graph is not None:
        import onnx

        graph = onnx.load(str(lab.graph), load_external_data=False).graph
        kinds = {t.data_type for t in graph.initializer} | {a.i for node in graph.node if node.op_type == "Cast" for a in node.attribute}
        found = {half for half, kind in zip(_HALVES, (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16), strict=True) if kind in kinds}
    found |= {b.dtype for b in lab.seeded(lab.candidate).values()}
    return (half for half in _HALVES if half in found)


class _Cast(torch.nn.Module):
    def __init__(self, model: torch.nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = Call(args, kwargs).map(lambda t: t.to(self.dtype) if t.is_floating_point() else t)
        return self.model(*call.args, **call.kwargs)


def _weights(lab: _Lab) -> str:
    thing = lab.failure.candidate
    if lab.module is None or not isinstance(thing, torch.nn.Module):
        return ""
    own, other = lab.module.state_dict(), thing.state_dict()
    if own.keys() != other.keys() or any(own[name].shape != other[name].shape for name in own):
        return ""
    moved = {name: peak(own[name].cpu(), other[name].cpu())[0] for name in own}
    moved = {name: far for name, far in moved.items() if far}
    twin = copy.deepcopy(thing).eval()
    twin.load_state_dict(own)
    if not moved or not lab.explains(candidate=ModuleRunner(twin, "with the reference's weights")):
        return ""
    most = max(moved, key=lambda name: moved[name])
    told = f"{len(moved)} of {len(own)} tensors differ, `{most}` by up to {moved[most]:.2g}"
    return f"weights: {told}; with the reference's own, {lab.candidate.name} agrees"


def _padding(lab: _Lab) -> str:
    if lab.failure.mask is not None:
        return ""
    expected, found = lab.seeded(lab.reference), lab.seeded(lab.candidate)
    for path, tensor in lab.batch.tensors().items():
        for padded in (0, 1):
            if not tensor.ndim or not bool(((tensor == 0) | (tensor == 1)).all()) or not bool((tensor == padded).any()):
                continue
            keep = kept(tensor == 1 - padded, lab.batch, expected)
            if bool((tensor == 1 - padded).any()) and lab.apart(expected, found, only=keep) <= 1 < lab.plain:
                cure = f"pass mask={path!r}" if padded == 0 else "pass its opposite as the mask"
                return f"padding: it differs only where `{path}` is {padded}; {cure} if those places do not count"
    return ""


def _baked_branch(lab: _Lab) -> str:
    """Values of one shape on which the candidate agrees, and the reference runs other operations than on the failing batch."""
    shapes = [t.shape for t in lab.batch.tensors().values()]
    passed = {label: call for label, call in lab.failure.batches.items() if label not in lab.failure.failing}
    taken = _operations(lab, lab.batch)
    for label, call in itertools.chain(passed.items(), variations(lab.batch).items(), corners(lab.batch).items()):
        if [t.shape for t in call.tensors().values()] != shapes:
            continue
        try:
            other = _operations(lab, call)
            agrees = other != taken and lab.apart(lab.seeded(lab.reference, call), lab.seeded(lab.candidate, call), batch=call) <= 1
        except Exception:  # values that one side does not take
            continue
        if agrees:
            return (
                f"a branch is baked in: on {lab.label} the reference runs other operations than on {label} inputs of the same shapes, "
                f"and {lab.candidate.name} agrees on the latter only"
            )
    return ""


def _operations(lab: _Lab, call: Call) -> list[str]:
    """The operations that torch runs, with their plain arguments: another path through the code is another list."""
    seen: list[str] = []

    def note(func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        seen.append(f"{func}{[a for a in args if isinstance(a, (bool, int, float))]}")
        return args

    with standing_by(note):
        lab.seeded(lab.reference, call)
    return seen


_EXPERIMENTS: tuple[Callable[[_Lab], str], ...] = (
    _train_mode,
    _randomness,
    _state,
    _opset,
    _weights,
    _quantization,
    _dtype,
    _padding,
    _baked_branch,
)
