"""match: infer how the tensors of one model are made from another's. What names and shapes cannot prove is ambiguous and is said.

Each name is read as (context, indices, role): the container of a repeated block, its numbers, and what the tensor does in it, in
the words of rules.py where they are known. Contexts are paired by how many of their roles and shapes agree; inside a pair of
contexts, roles are joined, then fused and split (fusions.py), then what is left is paired where it is the only one of its shapes.
The result is a KeyMap; loading is loading.py's.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, NamedTuple

from workbench.checkpoint import Checkpoint, Finding
from workbench.errors import SelectionError
from workbench.formats import collector_paused
from workbench.keymap.composites import canonical, composites, locked_raw
from workbench.keymap.fusions import FUSIONS, Item, fused_from, fused_pairs, relaid
from workbench.keymap.layouts import orient, stack, turn, unstack
from workbench.keymap.maps import Ambiguous, KeyMap, Pair, Part, Regroup, Unmatched
from workbench.keymap.naming import (
    Indices,
    bare_name,
    domain,
    grouped,
    opposed,
    read_names,
    shown,
    strange_wrappers,
    tokens_of,
    words_in,
    wrapper_rule,
)
from workbench.keymap.rules import is_known_role, is_single_role
from workbench.keymap.targets import Target, read_target
from workbench.keymap.values import starts_alike
from workbench.opening import open as open_checkpoint
from workbench.tensors import LazyTensor

Shape = tuple[int, ...]


@collector_paused()
def match(source: Any, target: Any) -> KeyMap:
    """Find which tensors of `source` make each tensor of `target`, and how.

    Args:
        source: anything `wb.open` takes; of a training checkpoint, its weights.
        target: an nn.Module (also on the meta device), anything `wb.open` takes, or a mapping from name to shape, (dtype, shape),
            TensorSpec or tensor.
    Returns:
        A KeyMap. What has several equally good readings is listed as ambiguous and not chosen.
    Raises:
        SelectionError: the target names no tensors.
    Cost: names and shapes only; no tensor is read.
    """
    ckpt = open_checkpoint(source)
    wanted = read_target(target)
    if not wanted.shapes:
        raise SelectionError("the target names no tensors")
    section = ckpt.weights_section
    sources = ckpt.weights
    found = Search(dict(sources.items()), wanted).run()
    used = {name for pair in found.pairs.values() for name in pair.sources}
    order = [name for name in wanted.shapes if name in found.pairs]
    ambiguous = {t: a for t, a in found.ambiguous.items() if t not in found.pairs}
    free = Counter(tensor.shape for name, tensor in sources.items() if name not in used)
    bare = {bare_name(name): name for name in sources}
    unmatched = [
        _unmatched(t, wanted.shapes[t], sources, used, free, bare) for t in wanted.shapes if t not in found.pairs and t not in ambiguous
    ]
    alike = [s for s in ckpt.sections() if s.kind in ("weights", "ema") and s.path != section.path]
    needed = {bare_name(name): sources[name].shape for name in used}
    same = [s for s in alike if needed and needed.items() <= {bare_name(n): t.shape for n, t in ckpt.section(s.path).items()}.items()]
    rivals = tuple(s.name for s in same if s in ckpt.rival_sections)
    if same and len(found.pairs) < len(wanted.shapes):  # stages that each count from 0: which of them comes first is not told
        why = f"{', '.join(repr(s.name) for s in (section, *same))} hold the same names, and none fills the whole model"
        ambiguous |= {t: Ambiguous(t, pair.sources, why) for t, pair in found.pairs.items()}
        order, used = [], set()
    message = "{!r} has the same names and shapes as {!r}, which was taken: {}"
    others = [
        Finding("another section", "info", message.format(s.name, section.name, section.reason)) for s in same if s.name not in rivals
    ]
    return KeyMap(
        tuple(found.pairs[t] for t in order), tuple(unmatched), tuple(ambiguous.values()), tuple(n for n in sources if n not in used),
        section.name, section.reason, rivals, tuple(others),
    )  # fmt: skip


class _Fit(NamedTuple):
    """How a shape becomes another: nothing, a reshape, or a transpose."""

    kind: str
    regroup: Regroup | None


_SAME = _Fit("", None)
_MOST_SHARING, _MOST_CONTAINERS = 64, 4096  # names with one end; pairs of containers
_MOST_WORDS = 40  # of the end of a name
_TOWERS = frozenset({"vision", "text", "audio"})


# kept as [in, out] by flax, Keras, CLIP and Mesh TensorFlow
_IN_OUT = ("kernel", "text_projection", "visual.proj", "Attention/q", "Attention/k", "Attention/v", "Attention/o")


@lru_cache(maxsize=1 << 14)
def _fit(source: Shape, target: Shape, turned: bool = False) -> _Fit | None:
    if turned and len(source) == len(target) > 1:
        axes = (len(source) - 1, len(source) - 2, *range(len(source) - 2))
        moved = tuple(source[axis] for axis in axes)
        return _Fit("transposed", Regroup(source, axes, target)) if moved == target else None
    if source == target:
        return _SAME
    bare = tuple(n for n in source if n != 1)
    if bare == tuple(n for n in target if n != 1):
        return _Fit("reshaped", Regroup(source, tuple(range(len(source))), target))
    if len(bare) == 2 and bare[::-1] == target:
        return _Fit("transposed", Regroup(bare, (1, 0), target))
    return None


class Pairing(NamedTuple):
    """A container of the source in the place of one of the target, and which numbers stand for which."""

    source: str
    target: str
    indices: dict[Indices, Indices]  # target's -> source's
    reading: str
    filled: int


class Search:
    """One search: what was found so far."""

    def __init__(self, tensors: dict[str, LazyTensor], wanted: Target) -> None:
        self.wanted, self.tensors = wanted, tensors
        self.items = {name: Item(name, t.shape, t.dtype.name, (Part(name),)) for name, t in tensors.items()}
        self.refused: dict[str, str] = {}
        self._compose(tensors)
        self.pairs: dict[str, Pair] = {}
        self.ambiguous: dict[str, Ambiguous] = {}
        self.used: set[str] = set()
        told = canonical(wanted.shapes)
        mine = canonical(self.items, [told[name].name if name in told else name for name in wanted.shapes])
        roles = {spelling.role for spelling in mine.values()}
        self.spelt = {name: mine[name].name if name in mine else name for name in self.items}
        wants = {
            name: told[name].also[0]
            if name in told and told[name].also and told[name].role not in roles
            else told[name].name
            if name in told
            else name
            for name in wanted.shapes
        }
        for extra in strange_wrappers(self.spelt.values(), wants.values()):
            self.spelt = {name: ".".join(part for part in spelt.split(".") if part != extra) for name, spelt in self.spelt.items()}
        self.source_names, self.target_names = read_names(self.spelt), read_names(wants)
        self.bare = {name: bare_name(spelt) for name, spelt in (self.spelt | wants).items()}
        stack(self)
        self.by_context: tuple[dict[str, dict[Indices, dict[str, list[str]]]], ...] = tuple(
            map(grouped, (self.source_names, self.target_names))
        )
        self.running = {
            told.context for names in (self.source_names, self.target_names) for told in names.values() if ".running." in told.role
        }

    def _compose(self, tensors: dict[str, LazyTensor]) -> None:
        """Put what parts make in the place of the parts, unless the target wants the parts; take out codes that no cast may read."""
        found = composites(tensors)
        told, mine = canonical(self.wanted.shapes), canonical(tensors)
        own = {bare_name(told[name].name if name in told else name) for name in self.wanted.shapes}
        for made in found:
            spelt = {bare_name(mine[part].name if part in mine else part) for part in made.parts}
            if any(
                part in own or any(name.endswith(f".{part}") or part.endswith(f".{name}") for name in own)
                for part in spelt
                if part != bare_name(made.name)
            ):
                continue
            for part in made.parts:
                self.items.pop(part, None)
            if made.doubt:
                self.refused[made.name] = made.doubt
                self.items.pop(made.name, None)
            else:
                parts = tuple(Part(part) for part in made.parts)
                self.items[made.name] = Item(made.name, made.shape, made.dtype, parts, made.formula, made.params, made.rule)
        for name, why in locked_raw(tensors, found).items():
            held = self.items.get(name)
            wanted = next((self.wanted.dtypes.get(t) for t in self.wanted.shapes if bare_name(t) == bare_name(name)), None)
            if held is not None and not held.formula and held.parts == (Part(name),) and held.dtype != wanted:
                del self.items[name]
                self.refused[name] = why

    def run(self) -> Search:
        chosen = self._pairings()
        for step in (self._join, self._join_fused, partial(unstack, self), partial(orient, self), partial(turn, self)):
            for pairing in chosen:
                step(pairing)
        self._singles()
        self._join_single_fusions()
        for pairing in chosen:
            self._rest(pairing.target, pairing.source, pairing.indices)
        if not self.pairs:  # beside other pairs, what is left may be another head
            self._rest("", "", None)
        self._doubt_lonely()
        self._ties()
        self._name_candidates()
        for name, why in self.refused.items():
            for target in self.wanted.shapes:
                if target not in self.pairs and bare_name(target) == bare_name(name):
                    self.ambiguous.setdefault(target, Ambiguous(target, (name,), why))
        return self

    # containers

    def _pairings(self) -> list[Pairing]:
        """One container of the source for each of the target, where exactly one explains most of it."""
        sources, targets = self.by_context
        options: dict[str, list[tuple[tuple[int, ...], Pairing]]] = {}
        many = len(sources) * len(targets) > _MOST_CONTAINERS  # no model: only equal ones are compared
        for target, held in targets.items():
            if target:
                whole = sum(len(roles) for roles in held.values())
                read = [
                    p
                    for source in ([target] if many else sources)
                    if source and source in sources and (source == target or not opposed(source, target))
                    for p in self._readings(source, target)
                ]
                scored = [(self._score(p), p) for p in read if p.source == target or p.filled >= whole]
                options[target] = sorted((entry for entry in scored if entry[1].filled), key=lambda entry: entry[0], reverse=True)
        chosen: list[Pairing] = []
        for target, scored in sorted(options.items(), key=lambda entry: entry[1][0][0] if entry[1] else (0,), reverse=True):
            taken = {p.source for p in chosen}
            free = [entry for entry in scored if entry[1].source not in taken]
            if not free:
                continue
            best = free[0]
            rivals = [p for score, p in free[1:] if score == best[0]]
            if best[1].source != target and not domain(target) & _TOWERS:  # a word that both towers share tells nothing
                own = domain(best[1].source) & _TOWERS
                rivals += [p for score, p in free[1:] if score[0] == best[0][0] and domain(p.source) & _TOWERS != own and p not in rivals]
            rivals += [
                p
                for other, entries in options.items()
                if other != target and other not in {c.target for c in chosen}
                for score, p in entries[:1]
                if p.source == best[1].source and score == best[0]
            ]
            if rivals:
                self._doubt(target, [best[1], *rivals])
                continue
            chosen.append(best[1])
        return chosen

    def _doubt(self, context: str, readings: list[Pairing]) -> None:
        names = ", ".join(sorted({shown(p.source) for p in readings}))
        held = self.by_context[1][context]
        for indices, roles in held.items():
            for role, targets in roles.items():
                for target in targets:
                    candidates = [
                        s for p in readings for s in self.by_context[0][p.source].get(p.indices.get(indices, ()), {}).get(role, [])
                    ]
                    if candidates:
                        self.ambiguous[target] = Ambiguous(target, tuple(dict.fromkeys(candidates))[:8], f"{names} fit equally well")

    def _score(self, p: Pairing) -> tuple[int, ...]:
        same = p.source == p.target
        return (p.filled, same, len(words_in(p.source) & words_in(p.target)), -len(self.by_context[0][p.source]))

    def _readings(self, source: str, target: str) -> list[Pairing]:
        """The ways in which the numbers of one container may stand for those of another."""
        ours, theirs = self.by_context[0][source], self.by_context[1][target]
        numbered: list[tuple[dict[Indices, Indices], str]] = []
        depth = {len(i) for i in ours} | {len(i) for i in theirs}
        if len(depth) == 1:
            if theirs.keys() & ours.keys():
                numbered.append(({i: i for i in theirs if i in ours}, "the same numbers"))
            low = [tuple(min(column) for column in zip(*held, strict=True)) for held in (ours, theirs)]
            shift = tuple(a - b for a, b in zip(*low, strict=True))
            moved = {i: tuple(n + d for n, d in zip(i, shift, strict=True)) for i in theirs}
            if any(shift) and all(i in ours for i in moved.values()):
                numbered.append((moved, f"numbers moved by {', '.join(map(str, shift))}"))
        if len(ours) == len(theirs) and set(ours) != set(theirs):
            numbered.append((dict(zip(sorted(theirs), sorted(ours), strict=True)), "one after the other"))
        read = [Pairing(source, target, indices, told, self._filled(ours, theirs, indices)) for indices, told in numbered]
        return [max(read, key=lambda p: p.filled)] if read else []  # of equals the first, which is the simplest

    def _filled(
        self, ours: dict[Indices, dict[str, list[str]]], theirs: dict[Indices, dict[str, list[str]]], indices: dict[Indices, Indices]
    ) -> int:
        """How many tensors agree in role and shape; in shape alone where no role is shared. A role of another shape speaks against it."""
        count = 0
        for index, roles in theirs.items():
            held = ours.get(indices.get(index, ()))
            if held is None:
                continue
            for role, targets in roles.items():
                if role in held:
                    fit = self._fits(held[role][0], targets[0])
                    count += 2 if fit is _SAME else 1 if fit else -2
                elif (fused := fused_from(role)) and fused & held.keys():
                    count += 1
            if not held.keys() & roles.keys():
                mine = Counter((role.rpartition(".")[0].rpartition(".")[2], self.items[names[0]].shape) for role, names in held.items())
                other = Counter((role.rpartition(".")[0].rpartition(".")[2], self.wanted.shapes[names[0]]) for role, names in roles.items())
                count += 2 * len(roles) * (mine == other)
        return max(count, 0)

    # tensors in a pair of containers

    def _join(self, p: Pairing) -> None:
        ours, theirs = self.by_context[0][p.source], self.by_context[1][p.target]
        rule, confidence = self._rule(p)
        for index, roles in theirs.items():
            held = ours.get(p.indices.get(index, ()), {})
            for role, targets in roles.items():
                if role in held and len(targets) == len(held[role]) == 1 and self._same_kind(targets[0], held[role][0]):
                    self._take(targets[0], held[role][0], rule, confidence, f"{p.reading}; the role and the shape agree")
                elif role not in held and p.source == p.target:
                    same = [
                        n for names in held.values() for n in names if self._same_name(targets[0], n) and self._fits(n, targets[0]) is _SAME
                    ]
                    if len(same) == 1:
                        self._take(targets[0], same[0], rule, confidence, p.reading)

    def _same_kind(self, target: str, source: str) -> bool:
        """Whether the modules of two names may be of one kind: what fits beside them fits, and both or neither keep running statistics."""
        ours, theirs = self.by_context[0], self.by_context[1]
        told, other = self.target_names[target], self.source_names[source]
        if (told.role.endswith(".weight.") and not {told.context, other.context} & self.running) or not told.role or not other.role:
            return True
        roles, held = theirs[told.context][told.indices], ours[other.context][other.indices]
        if not told.context or not other.context:
            return True
        unit = told.role.rstrip(".").rpartition(".")[0]
        mine = other.role.rstrip(".").rpartition(".")[0]
        if (f"{unit}.running.mean." in roles) != (f"{mine}.running.mean." in held):
            return False
        return self._unit_fits(
            told.role, roles, {f"{unit}{role[len(mine) :]}" if role.startswith(f"{mine}.") else role: names for role, names in held.items()}
        )

    def _same_name(self, target: str, source: str) -> bool:
        return self.bare[target] == self.bare.get(source)

    def _bias_fits(self, target: str, source: str) -> bool:
        """Whether the biases beside two matrices, where both have one, are of one length: a layer that is turned keeps its outputs."""
        one, other = (name.removesuffix("weight") + "bias" for name in (source, target))
        return one not in self.items or other not in self.wanted.shapes or self.items[one].shape == self.wanted.shapes[other]

    def _unit_fits(self, role: str, roles: dict[str, list[str]], held: dict[str, list[str]]) -> bool:
        """Whether the matrix beside a vector fits as well: vectors of one length are many."""
        matrix = f"{role.rstrip('.').rpartition('.')[0]}.weight."
        if matrix == role or matrix not in roles or matrix not in held:
            return True
        if self._same_name(roles[role][0], held[role][0]):  # other widths are another matter; a vector is no matrix
            return len(self.wanted.shapes[roles[matrix][0]]) == len(self.items[held[matrix][0]].shape)
        return self._fits(held[matrix][0], roles[matrix][0]) is not None

    def _rule(self, p: Pairing) -> tuple[str, str]:
        if p.source == p.target and p.reading == "the same numbers":
            return "same block", "certain"
        return f"{shown(p.source)} becomes {shown(p.target)}", "likely"

    def _fits(self, source: str, target: str) -> _Fit | None:
        turned = source.endswith(_IN_OUT) != target.endswith(_IN_OUT)
        return _fit(self.items[source].shape, self.wanted.shapes[target], turned)

    def _take(self, target: str, source: str, rule: str, confidence: Any, reason: str) -> bool:
        item = self.items[source]
        fit = self._fits(source, target)
        if ".qkv." in self.target_names[target].role and fit is not None and not item.formula:
            regroup, why = relaid(source, target, self.items, self.wanted)
            if why:
                self.ambiguous[target] = Ambiguous(target, (source,), why)
                return False
            fit = _Fit("rows regrouped", regroup) if regroup is not None else fit
        if fit is not None and fit.kind == "transposed" and not self._bias_fits(target, source):
            return False
        if fit is None or target in self.pairs or source in self.used:
            return False
        if self._same_name(target, source) and fit is _SAME and not item.after:
            confidence = "certain"
            rule, reason = ("same name", "name and shape agree") if target == source else wrapper_rule(source, target)
        parts, regroup = item.parts, fit.regroup
        if item.after is not None:
            if regroup is not None:
                return False
            regroup, rule = item.after, f"{rule}; {item.note}"
        elif item.formula:
            rule = f"{item.note}" if rule == "same name" else f"{rule}; {item.note}"
        elif regroup is not None:
            parts, regroup = (item.parts[0]._replace(regroup=regroup, shape=item.shape),), None
            rule = f"{rule}, {fit.kind}"
        self.pairs[target] = Pair(target, parts, rule, confidence, reason, regroup, item.formula, item.params)
        self.used.update((source, *self.pairs[target].sources))
        return True

    def _join_fused(self, p: Pairing) -> None:
        ours, theirs = self.by_context[0][p.source], self.by_context[1][p.target]
        for index, roles in theirs.items():
            held = ours.get(p.indices.get(index, ()), {})
            free = {role: names[0] for role, names in held.items() if len(names) == 1 and names[0] not in self.used}
            open_ = {role: names[0] for role, names in roles.items() if len(names) == 1 and names[0] not in self.pairs}
            self._fuse(free, open_)

    def _join_single_fusions(self) -> None:
        """Fusions of modules that lie in no block: of one path, or the only ones."""
        groups: list[dict[str, dict[str, str]]] = []
        for names, done in ((self.source_names, self.used), (self.target_names, self.pairs)):
            found: dict[str, dict[str, str]] = defaultdict(dict)
            for name, told in names.items():
                if told.context or name in done:
                    continue
                cut = min((at for at in (told.role.find(word) for word in (".attn.", ".xattn.", ".mlp.")) if at >= 0), default=-1)
                if cut >= 0:
                    found[told.role[:cut]][told.role[cut:]] = name
            groups.append(found)
        for path, wanted in groups[1].items():
            held = groups[0].get(path) or (next(iter(groups[0].values())) if len(groups[0]) == len(groups[1]) == 1 else {})
            self._fuse(held, wanted)

    def _fuse(self, held: dict[str, str], wanted: dict[str, str]) -> None:
        for fusion in FUSIONS:
            for pair in fused_pairs(fusion, held, wanted, self.items, self.wanted):
                if isinstance(pair, Ambiguous):
                    self.ambiguous[pair.target] = pair
                else:
                    self.pairs[pair.target] = pair
                    self.used.update(pair.sources)
                    self.ambiguous.pop(pair.target, None)

    # what lies in no container

    def _singles(self) -> None:
        sources = [n for n in self.source_names if n not in self.used]
        targets = [n for n in self.target_names if n not in self.pairs and n not in self.ambiguous]
        ends: dict[str, list[str]] = defaultdict(list)
        for name in sources:
            tokens = tokens_of(self.source_names[name])
            for cut in range(max(0, len(tokens) - _MOST_WORDS), len(tokens)):
                ends[".".join(tokens[cut:])].append(name)
        best: dict[str, tuple[int, list[str]]] = {}
        for name in targets:
            tokens = tokens_of(self.target_names[name])
            for cut in range(max(0, len(tokens) - _MOST_WORDS), len(tokens)):
                end = ".".join(tokens[cut:])
                sharing = ends.get(end, ())
                fits = [
                    s
                    for s in sharing
                    if len(sharing) <= _MOST_SHARING and self._fits(s, name) and self._may_end(name, s, end, len(tokens) - cut)
                ]
                if fits:
                    best[name] = (len(tokens) - cut, fits)
                    break
        claims: dict[str, list[tuple[int, str]]] = defaultdict(list)
        for name, (length, fits) in best.items():
            for source in fits:
                claims[source].append((length, name))
        for name, (length, fits) in sorted(best.items(), key=lambda entry: -entry[1][0]):
            free = [s for s in fits if s not in self.used and max(claims[s])[0] <= length]
            free = [s for s in free if self._same_name(name, s)] or [s for s in free if domain(name) and domain(s) == domain(name)] or free
            wanting = [n for other, n in claims[free[0]] if other == length and n not in self.pairs] if len(free) == 1 else []
            wanting = (
                [n for n in wanting if bare_name(n) == bare_name(free[0])]
                or [n for n in wanting if domain(n) == domain(free[0])]
                or wanting
            )
            if wanting == [name]:
                self._take(name, free[0], "the end of the name", "likely", "the longest end of the name and the shape agree")
            elif free and name not in self.pairs:
                self.ambiguous[name] = Ambiguous(
                    name, tuple(free)[:8], "the end of the name and the shape agree, and so they do for others"
                )

    def _may_end(self, target: str, source: str, end: str, length: int) -> bool:
        """Whether two names that end alike may be one: one of them is that end, or the end is a known role outside of blocks."""
        told, other = self.target_names[target], self.source_names[source]
        if not self._same_kind(target, source):
            return False
        if length in (len(tokens_of(told)), len(tokens_of(other))):
            return length > 1 or is_single_role(end) or len(tokens_of(told)) == len(tokens_of(other)) == 1
        joined = any(
            f"{before}_" in raw.lower()
            for raw, names in ((target, told), (source, other))
            for before in tokens_of(names)[-length - 1 : -length]
        )
        return not told.context and not other.context and is_single_role(end) and not joined and not opposed(target, source)

    def _rest(self, context: str, source_context: str, indices: dict[Indices, Indices] | None) -> None:
        """Modules left over on both sides that are the only ones of their shapes; only where they explain each other wholly."""
        ours, theirs = self.by_context[0].get(source_context, {}), self.by_context[1].get(context, {})
        units: list[dict[str, set[Any]]] = []
        for held, done, shapes in (
            (ours, self.used, {n: i.shape for n, i in self.items.items()}),
            (theirs, self.pairs, self.wanted.shapes),
        ):
            found: dict[str, set[Any]] = defaultdict(set)
            for roles in held.values():
                own: dict[str, set[Any]] = defaultdict(set)
                for role, names in roles.items():
                    if names[0] not in done and len(names) == 1 and not role.endswith(".num.batches.tracked."):
                        unit, _, param = role.strip(".").rpartition(".")
                        own[unit].add((param, shapes[names[0]]))
                for unit, held_by in own.items():
                    found[unit].add(frozenset(held_by))
            units.append(found)
        signs = [Counter(frozenset(signs) for signs in found.values()) for found in units]
        if not signs[1] or signs[0] != signs[1] or max(signs[1].values()) > 1 or (not context and len(units[1]) < 2):
            return
        of = {frozenset(signs_): unit for unit, signs_ in units[0].items()}
        for unit, sign in units[1].items():
            source_unit = of[frozenset(sign)]
            if is_known_role(unit) and is_known_role(source_unit):
                continue
            for index, roles in theirs.items():
                there = ours.get(indices.get(index, ()) if indices is not None else index, {})
                for role, names in roles.items():
                    end, _, param = role.strip(".").rpartition(".")
                    other = f".{source_unit}.{param}." if source_unit else f".{param}."
                    if (
                        end == unit
                        and names[0] not in self.pairs
                        and len(there.get(other, ())) == 1
                        and not opposed(names[0], there[other][0])
                    ):
                        self._take(
                            names[0],
                            there[other][0],
                            f"{source_unit or source_context} becomes {unit or context}",
                            "likely",
                            "the only ones of their shapes that are left",
                        )

    def _doubt_lonely(self) -> None:
        """A transposed shape by itself proves nothing: it counts where a word or a layer kind says so, or where several agree."""
        turned = [
            p
            for p in self.pairs.values()
            if p.rule.endswith(", transposed") and not p.source.endswith(_IN_OUT) and not p.target.endswith(_IN_OUT)
        ]
        if len({self.target_names[p.target].role for p in turned}) < 2:
            for pair in turned:
                if self.wanted.kinds.get(pair.target) != "Conv1D":
                    del self.pairs[pair.target]
                    self.used.difference_update(pair.sources)
                    why = f"{list(self.items[pair.source].shape)} in the file and {list(self.wanted.shapes[pair.target])} in the model: only a transposed shape"
                    self.ambiguous[pair.target] = Ambiguous(pair.target, pair.sources, why)

    def _name_candidates(self) -> None:
        """What could fill the names that are left, by the last word and the shape alone; none of it is chosen."""
        free: dict[tuple[str, Shape], list[str]] = defaultdict(list)
        for name, item in self.items.items():
            if name not in self.used and not item.after:
                free[name.rpartition(".")[2], item.shape].append(name)
        for name, shape in self.wanted.shapes.items():
            found = free.get((name.rpartition(".")[2], shape))
            if found and name not in self.pairs and name not in self.ambiguous:
                self.ambiguous[name] = Ambiguous(name, tuple(found[:8]), "only the end of the name and the shape agree")

    def _ties(self) -> None:
        for name, kept in self.wanted.ties.items():
            if name in self.pairs and kept in self.pairs and not self._agree(self.pairs[name], self.pairs[kept]):
                for one, other in ((name, kept), (kept, name)):
                    why = f"one tensor with {other!r} in the model, and the file has two of different values"
                    self.ambiguous[one] = Ambiguous(one, (*self.pairs[one].sources, *self.pairs[other].sources), why)
                del self.pairs[name], self.pairs[kept]
            elif name not in self.pairs and kept in self.pairs:
                self.pairs[name] = replace(self.pairs[kept], target=name, rule="tied", reason=f"one tensor with {kept!r} in the model")
                self.ambiguous.pop(name, None)
            elif kept not in self.pairs and name in self.pairs:
                self.pairs[kept] = replace(self.pairs[name], target=kept, rule="tied", reason=f"one tensor with {name!r} in the model")

    def _agree(self, a: Pair, b: Pair) -> bool:
        """Whether two sources may be one tensor: stored once, or beginning with the same values."""
        if not (a.is_plain and b.is_plain):
            return a.parts == b.parts
        one, other = self.tensors[a.source], self.tensors[b.source]
        return one.source == other.source or (one.locked is None and other.locked is None and starts_alike(one, other))


def _unmatched(target: str, shape: Shape, sources: Checkpoint, used: set[str], free: Counter[Shape], bare: dict[str, str]) -> Unmatched:
    near = target if target in sources else bare.get(bare_name(target))
    if near is not None and near not in used and sources[near].shape != shape:
        return Unmatched(target, f"{list(sources[near].shape)} in the file and {list(shape)} in the model", near)
    count = free[shape]
    return Unmatched(
        target, f"no name like it; {count} unused tensors have its shape" if count else "nothing in the file has this name or shape"
    )
