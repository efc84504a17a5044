"""match: infer the key map from names and shapes. What they cannot prove is ambiguous and is said.

In order: the same name; the same name once wrapper segments are taken out, wherever they stand; then one prefix in place of
another, chosen by how many keys it explains, and only where no other choice explains as many. Owns inference alone; the
result is a KeyMap, loading is loading.py's.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

from workbench.checkpoint import Checkpoint
from workbench.errors import SelectionError
from workbench.keymap.rules import Ambiguous, KeyMap, Pair, Unmatched
from workbench.names import WRAPPERS
from workbench.opening import open as open_checkpoint
from workbench.tensors import TensorSpec

Shapes = dict[str, tuple[int, ...]]
_MAX_FITS = 16  # targets that one source is tried on
_MAX_ROUNDS = 64  # different prefixes in one file; past that, names are too unlike to be read this way


def match(source: Any, target: Any) -> KeyMap:
    """Find which tensor of `source` fills which tensor of `target`.

    Args:
        source: anything `wb.open` takes; of a training checkpoint, its weights.
        target: an nn.Module, anything `wb.open` takes, or a mapping from name to shape, TensorSpec or tensor.
    Returns:
        A KeyMap. Two names are paired only when their shapes are equal; several equally good candidates are all listed and none is chosen.
    Raises:
        SelectionError: the target names no tensors.
    Cost: names and shapes only; no tensor is read.
    """
    ckpt = open_checkpoint(source)
    section = ckpt.weights_section
    sources = {name: tensor.shape for name, tensor in ckpt.weights.items()}
    targets = target_shapes(target)
    if not targets:
        raise SelectionError("the target names no tensors")
    found: dict[str, Pair] = {}
    ambiguous: dict[str, Ambiguous] = {}
    for step in (_same_name, _without_wrappers, _prefixes):
        left_targets = {t: shape for t, shape in targets.items() if t not in found and t not in ambiguous}
        used = {pair.source for pair in found.values()}
        left_sources = {s: shape for s, shape in sources.items() if s not in used}
        if not left_targets or not left_sources:
            break
        pairs, unclear = step(left_sources, left_targets, bool(found))
        found.update({pair.target: pair for pair in pairs})
        ambiguous.update({a.target: a for a in unclear})
    used = {pair.source for pair in found.values()}
    like = {bare_name(s): s for s in sources}
    free = Counter(shape for s, shape in sources.items() if s not in used)
    unmatched = tuple(_unmatched(t, targets[t], sources, used, like, free) for t in targets if t not in found and t not in ambiguous)
    unused = tuple(s for s in sources if s not in used)
    rivals = tuple(s.name for s in ckpt.rival_sections if {n: t.shape for n, t in ckpt.section(s.path).items()} == sources)
    found_in_order = tuple(found[t] for t in targets if t in found)
    return KeyMap(found_in_order, unmatched, tuple(ambiguous.values()), unused, section.name, section.reason, rivals)


def target_shapes(target: Any) -> Shapes:
    """name -> shape of anything that can be a target."""
    if (
        isinstance(target, Mapping)
        and not isinstance(target, Checkpoint)
        and all(isinstance(v, (TensorSpec, tuple, list)) for v in target.values())
    ):
        return {name: v.shape if isinstance(v, TensorSpec) else _shape(name, v) for name, v in target.items()}
    return {name: tensor.shape for name, tensor in open_checkpoint(target).weights.items()}


def _shape(name: str, value: Any) -> tuple[int, ...]:
    if len(value) == 2 and isinstance(value[1], (tuple, list)):  # (dtype, shape)
        value = value[1]
    if not all(isinstance(n, int) for n in value):
        raise SelectionError(f"the target's {name!r} is no shape", hint="map names to shapes, (dtype, shape), TensorSpec or tensors")
    return tuple(value)


Found = tuple[list[Pair], list[Ambiguous]]


def _same_name(sources: Shapes, targets: Shapes, partly: bool) -> Found:
    return [Pair(t, t, "same name", "certain", "name and shape agree") for t, shape in targets.items() if sources.get(t) == shape], []


def bare_name(name: str) -> str:
    """The name without the segments that wrappers add."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def _without_wrappers(sources: Shapes, targets: Shapes, partly: bool) -> Found:
    by_bare: dict[str, list[str]] = defaultdict(list)
    for name in sources:
        by_bare[bare_name(name)].append(name)
    rivals = Counter(bare_name(name) for name in targets)
    pairs, unclear = [], []
    for target, shape in targets.items():
        candidates = [s for s in by_bare.get(bare_name(target), []) if sources[s] == shape]
        if len(candidates) == 1 and rivals[bare_name(target)] == 1:
            rule, reason = _wrapper_rule(candidates[0], target)
            pairs.append(Pair(target, candidates[0], rule, "certain", reason))
        elif candidates:
            unclear.append(Ambiguous(target, tuple(candidates), "several names are the same once wrapper names are taken out"))
    return pairs, unclear


def _wrapper_rule(source: str, target: str) -> tuple[str, str]:
    stripped = [part for part in source.split(".") if part in WRAPPERS and part not in target.split(".")]
    added = [part for part in target.split(".") if part in WRAPPERS and part not in source.split(".")]
    words = [f'strip "{part}."' for part in dict.fromkeys(stripped)] + [f'add "{part}."' for part in dict.fromkeys(added)]
    owners = dict.fromkeys(WRAPPERS[part] for part in (*stripped, *added))
    return ", ".join(words) or "move wrapper names", "written by " + "; ".join(owners) if owners else "wrapper names stand elsewhere"


def _prefixes(sources: Shapes, targets: Shapes, partly: bool) -> Found:
    """One prefix in place of another, best explained first, until nothing more is explained.

    `partly` tells that other names were paired already: then no prefix explains everything, and none is certain.
    """
    sources, targets = dict(sources), dict(targets)
    alone = (len(sources), len(targets)) if not partly else (-1, -1)
    pairs: list[Pair] = []
    unclear: list[Ambiguous] = []
    rounds = 0
    while sources and targets:
        ranked = sorted(_explained(sources, targets).items(), key=lambda entry: -len(entry[1]))
        if not ranked:
            break
        (old, new), explained = ranked[0]
        if len(explained) == 1 or rounds > _MAX_ROUNDS:
            unclear += _single(ranked, targets)
            break
        rounds += 1
        rivals = [(rule, held) for rule, held in ranked[1:] if len(held) == len(explained) and _conflict(held, explained)]
        if rivals:
            choices = [explained, *(held for _, held in rivals)]
            for target in {t for held in choices for t in held}:
                candidates = tuple(dict.fromkeys(held[target] for held in choices if target in held))
                unclear.append(Ambiguous(target, candidates, f"{len(choices)} prefixes explain {len(explained)} keys each"))
                targets.pop(target)
            continue
        structural = min(t[len(new) :].count(".") for t in explained) > 0 or len({t[len(new) :] for t in explained}) > 4
        # One prefix taken off or put on that explains everything is proven; any other change of names is a reading of them.
        whole = (not old and len(explained) == alone[0]) or (not new and len(explained) == alone[1])
        rule = f'strip "{old}"' if not new else f'add "{new}"' if not old else f'"{old}" becomes "{new}"'
        reason = f"explains {len(explained)} of {len(targets)} names left in the model and {len(sources)} in the file; shapes agree"
        for target, source in explained.items():
            pairs.append(Pair(target, source, rule, "certain" if structural and whole else "likely", reason))
            targets.pop(target)
            sources.pop(source)
    return pairs, unclear


def _single(ranked: list[tuple[tuple[str, str], dict[str, str]]], targets: Shapes) -> list[Ambiguous]:
    """What is left when no prefix explains two names: candidates, each by the end of its name and its shape."""
    candidates: dict[str, list[str]] = defaultdict(list)
    for _, held in ranked:
        for target, source in held.items():
            candidates[target].append(source)
    reason = "only the end of the name and the shape agree"
    return [Ambiguous(target, tuple(dict.fromkeys(found))[:8], reason) for target, found in candidates.items() if target in targets]


def _explained(sources: Shapes, targets: Shapes) -> dict[tuple[str, str], dict[str, str]]:
    """(old prefix, new prefix) -> target -> source, for every pair of prefixes whose change makes names and shapes agree."""
    by_suffix: dict[tuple[str, tuple[int, ...]], list[str]] = defaultdict(list)
    for target, shape in targets.items():
        for suffix in _suffixes(target):
            by_suffix[suffix, shape].append(target)
    out: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for source, shape in sources.items():
        for suffix in _suffixes(source):  # longest first
            fits = by_suffix.get((suffix, shape), ())
            if fits:
                for target in fits[:_MAX_FITS]:
                    out[source[: len(source) - len(suffix)], target[: len(target) - len(suffix)]][target] = source
                break
    return out


def _suffixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def _conflict(a: dict[str, str], b: dict[str, str]) -> bool:
    """Whether two explanations cannot both hold."""
    taken = {source: target for target, source in a.items()}
    return any((t in a and a[t] != s) or (s in taken and taken[s] != t) for t, s in b.items())


def _unmatched(
    target: str, shape: tuple[int, ...], sources: Shapes, used: set[str], like: dict[str, str], free: Counter[tuple[int, ...]]
) -> Unmatched:
    same = target if target in sources else like.get(bare_name(target))
    if same is not None and same not in used and sources[same] != shape:
        return Unmatched(target, f"{list(sources[same])} in the file and {list(shape)} in the model", same)
    if same is not None:
        return Unmatched(target, f"{same!r} fills another name")
    return Unmatched(target, f"no name in the file is like it; {free[shape]} unused tensors have its shape")
