"""match: infer how the tensors of one model are made from another's. What names and shapes cannot prove is ambiguous and is said.

Each name is read (naming.py) as (context, indices, role): the container of a repeated block, its numbers, and what the tensor does in
it, in the words of rules.py where they are known. Contexts are paired (containers.py) by how many of their roles and shapes agree;
inside a pair of contexts, roles are joined, then fused and split (fusions.py) and mended (layouts.py). What lies in no container is
paired by the end of its name, and what is left where it is the only one of its shapes, or by the order of two models that hold the
same modules (order.py). `Search.run` is that order. The result is a KeyMap; loading is loading.py's. Whatever is decided here for each
of a hundred thousand names has to be cheap: what is the same for a container, a block or an end is decided once for it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Container, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from workbench.adapter_config import config_beside
from workbench.checkpoint import Checkpoint, Finding
from workbench.errors import SelectionError
from workbench.formats import collector_paused
from workbench.keymap.composites import MODIFIED, Outside, composites, locked_raw
from workbench.keymap.containers import SAME_NUMBERS, Pairing, number_first, pairings
from workbench.keymap.doubts import BY_END, doubt
from workbench.keymap.fusions import FUSIONS, Item, fused_pairs, relaid
from workbench.keymap.layouts import SAME, Fit, agreed, channels_last, fit, in_out, orient, renumber, stack, turn, unstack
from workbench.keymap.leftovers import beside, doubt_shifted, follow, nearest, rest, set_aside, settle_swapped, stem, with_weight
from workbench.keymap.maps import Ambiguous, Confidence, KeyMap, Pair, Part
from workbench.keymap.naming import (
    Block,
    Name,
    bare_name,
    bare_names,
    domain,
    end_rule,
    fullest_root,
    grouped,
    in_head,
    moved_parts,
    opposed,
    read_names,
    shown,
    strange_wrappers,
    tokens_of,
    wrapper_rule,
)
from workbench.keymap.order import in_order, inside, last, members
from workbench.keymap.places import Places
from workbench.keymap.plain_code import Origin
from workbench.keymap.published import counted, one_more
from workbench.keymap.rules import is_single_role
from workbench.keymap.spellings import Spelling, canonical
from workbench.keymap.targets import Target, read_target
from workbench.keymap.values import starts_alike
from workbench.opening import open as open_checkpoint
from workbench.sections import Path
from workbench.tensors import LazyTensor

Shape = tuple[int, ...]
Words = dict[str, list[str]]  # name -> its words


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
    weights = ckpt.weights
    tensors = dict(weights.items())
    outside = partial(_outside, ckpt, section.path)
    found = Search(tensors, wanted, ckpt.metadata.get("general.architecture", ""), config_beside(ckpt), outside).run()
    used = {part.source for pair in found.pairs.values() for part in pair.parts}
    order = [name for name in wanted.shapes if name in found.pairs]
    ambiguous = {t: a for t, a in found.ambiguous.items() if t not in found.pairs}
    unmatched = nearest(found, [t for t in wanted.shapes if t not in found.pairs and t not in ambiguous], used)
    alike = [s for s in ckpt.sections() if s.kind in ("weights", "ema") and s.path != section.path]
    needed = {bare_name(name): tensors[name].shape for name in used if name} if alike else {}
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
    others += [Finding("another section", "info", message.format(*both, "no moving average")) for both in found.averages]
    why = "as the first of the file, and nothing tells which of the two is meant: ckpt.section(name) takes the other"
    others += [Finding("another section", "warning", message.format(name, section.name, why)) for name in rivals]
    others += found.findings.values()
    return KeyMap(
        tuple(found.pairs[t] for t in order), unmatched, tuple(ambiguous.values()), tuple(n for n in tensors if n not in used),
        section.name, section.reason, rivals, tuple(others), Origin.of(ckpt, section.path, weights),
    )  # fmt: skip


def _outside(ckpt: Checkpoint, section: Path) -> dict[str, Shape]:
    """The tensors and the numbers of a file that are neither in its section nor in the state of a run."""
    others = [s.path for s in ckpt.sections() if s.kind not in ("weights", "ema", "other")]
    out = {name: ckpt[name].shape for name, path in ckpt.paths.items() if not _below(path, [section, *others])}
    numbers = (name for name, value in ckpt.extras.items() if isinstance(value, float))
    return out | dict.fromkeys(numbers, ())


def _below(path: Path, places: list[Path]) -> bool:
    return any(path[: len(place)] == place for place in places)


_MOST_SHARING = 64  # names with one end
_MOST_WORDS = 40  # of the end of a name


class Search:
    """One search: what was found so far."""

    def __init__(
        self, tensors: dict[str, LazyTensor], wanted: Target, architecture: str, config: dict[str, Any], outside: Outside
    ) -> None:  # fmt: skip
        self.wanted, self.tensors, self.config = wanted, tensors, config
        self.items = {name: Item(name, t.spec.shape, t.spec.dtype.name, (Part(name),)) for name, t in tensors.items()}
        self.refused: dict[str, str] = {}
        self.pairs: dict[str, Pair] = {}
        self.ambiguous: dict[str, Ambiguous] = {}
        self.used: set[str] = set()
        self.findings: dict[str, Finding] = {}  # by what they are about
        self.averages: list[tuple[str, str]] = []  # roots of the file that were not taken, and the one that was
        self.sides: set[tuple[bool, str, Shape]] = set()  # in a head or not, last word, shape: what is free outside of blocks
        told = canonical(wanted.shapes)
        self._compose(told, outside)
        self.items |= {item.name: item for item in one_more(self.items.values(), wanted, architecture)}
        spelt, wants = self._spelt(told)
        self.source_names, self.target_names = read_names(spelt), read_names(wants)
        self.bare = {name: read.bare for names in (self.source_names, self.target_names) for name, read in names.items()}
        self.channels_last = channels_last(self)
        self.shapes = {name: item.shape for name, item in self.items.items()}, wanted.shapes
        self.by_context = grouped(self.source_names), grouped(self.target_names)
        if number_first(self) | renumber(self) | stack(self):
            self.by_context = grouped(self.source_names), grouped(self.target_names)
        self.experts_in: dict[str, list[str]] = defaultdict(list)  # container of the target -> those of experts in it
        for context in self.by_context[1]:
            for dot in re.finditer(r"\.", context) if context.endswith(".experts.#") else ():
                self.experts_in[context[: dot.start()]].append(context)
        self.roles = {told.role for names in (self.source_names, self.target_names) for told in names.values()}
        running = {role for role in self.roles if ".running." in role}
        both = (self.source_names, self.target_names) if running else ()
        self.running = {told.context for names in both for told in names.values() if told.role in running}

    def _compose(self, told: dict[str, Spelling], outside: Outside) -> None:
        """Put what parts make in the place of the parts, unless the target wants the parts; take out codes that no cast may read."""
        found = composites(self.tensors, self.config)
        mine = canonical(self.tensors) if found else {}
        spelt = [{bare_name(mine[p].name if p in mine else p) for p in made.parts} - {bare_name(made.name)} for made in found]
        wants = {bare_name(told[t].name if t in told else t) for t in (self.wanted.shapes if found else ())}
        asked = _asked(set().union(*spelt), wants)
        leaves = {name.rpartition(".")[2] for name in wants}
        pieces = {(spelling.role, self.wanted.shapes[t]) for t, spelling in told.items()}
        for made, own in zip(found, spelt, strict=True):
            kept = all(p in mine and (mine[p].role, self.tensors[p].shape) in pieces for p in made.parts)
            if own & asked or kept or (made.rule == MODIFIED and made.parts[1].rpartition(".")[2] in leaves):
                continue
            for part in made.parts:
                self.items.pop(part, None)
            if made.doubt:
                self.refused[made.name] = made.doubt
                self.items.pop(made.name, None)
            else:
                parts = tuple(Part(part) for part in made.parts)
                why = made.reason if made.confidence == "likely" else ""
                self.items[made.name] = Item(
                    made.name, made.shape, made.dtype, parts, made.formula, made.params, made.rule, reason=why
                )  # fmt: skip
        locked = locked_raw(self.tensors, found, outside)
        shapes = reversed(self.wanted.shapes) if locked else ()
        wanted = {bare_name(t): self.wanted.dtypes.get(t) for t in shapes}  # of several the first
        for name, why in locked.items():
            held = self.items.get(name)
            if held is not None and not held.formula and held.parts == (Part(name),) and held.dtype != wanted.get(bare_name(name)):
                del self.items[name]
                self.refused[name] = why

    def _spelt(self, told: dict[str, Spelling]) -> tuple[dict[str, str], dict[str, str]]:
        """How the names of both sides are to be read: in one spelling of what is published under several."""
        shapes = self.wanted.shapes
        mine = canonical(self.items, [told[name].name if name in told else name for name in shapes])
        roles = {spelling.role for spelling in mine.values()}
        spelt = {name: mine[name].name if name in mine else name for name in self.items}
        wants = {name: name for name in shapes}
        for name, spelling in told.items():
            wants[name] = spelling.also[0] if spelling.also and spelling.role not in roles else spelling.name
        ours, theirs = counted(spelt.values(), wants.values()), counted(wants.values(), spelt.values())
        spelt = {name: ours.get(text, text) for name, text in spelt.items()} if ours else spelt
        wants = {name: theirs.get(text, text) for name, text in wants.items()} if theirs else wants
        self.strange = strange_wrappers(spelt.values(), wants.values())
        for extra in self.strange:
            spelt = {name: ".".join(part for part in text.split(".") if part != extra) for name, text in spelt.items()}
        held = {text: self.items[name].shape for name, text in spelt.items()}
        root, averages = fullest_root(held, {text: shapes[name] for name, text in wants.items()})
        if root:
            self.averages = [(average, root) for average in averages]
            self.strange += root.split(".")
            spelt = {name: text.removeprefix(f"{root}.") for name, text in spelt.items()}
        return spelt, wants

    def run(self) -> Search:
        chosen = pairings(self)
        for step in (self._join, self._join_fused, partial(unstack, self)):
            for pairing in chosen:
                step(pairing)
        known = Places(self)
        for pairing in chosen:
            known.guard(partial(rest, p=pairing))
        for mend in (orient, turn):
            paired: dict[str, list[str]] = defaultdict(list)  # container -> names
            for name in self.pairs:
                paired[self.target_names[name].context].append(name)
            for pairing in chosen:
                mend(self, pairing, paired[pairing.target])
        set_aside(self, chosen)
        known.guard(partial(follow, chosen=chosen))
        moved = {p.target for p in chosen if p.reading != SAME_NUMBERS}
        known.guard(lambda search: search._singles(moved))
        self._join_single_fusions()
        near = (stem, beside, in_order)  # the more is paired, the more tells where the rest goes
        for place in (with_weight, beside, in_order, *near, inside, *near, members, last, with_weight):
            known.guard(place)
        if not self.pairs:  # beside other pairs, what is left may be another head
            rest(self, Pairing("", "", {(): ()}, "", 0))
        agreed(self)
        doubt_shifted(self)
        doubt(self)
        self._ties()
        settle_swapped(self)
        self._name_candidates()
        targets: dict[str, list[str]] = defaultdict(list)  # name without wrappers, or an end of it
        for target in self.wanted.shapes if self.refused else ():
            spelt = bare_name(target)
            for end in (spelt, *_ends(spelt)):
                targets[end].append(target)
        adapted = self.refused and not self.config.get("adapter_config.json")
        lora = {n.partition(".lora_")[0] for n in self.tensors if ".lora_" in n} if adapted else ()
        for name, why in self.refused.items():
            if name.rpartition(".")[0] in lora:
                why = f"a LoRA layer: put adapter_config.json, which tells its scale, beside the file, or wb.ops.merge_lora(base, adapter); {why}"
            told = bare_name(name)
            for target in targets.get(told) or next((targets[end] for end in _ends(told) if end in targets), []):
                if target not in self.pairs:
                    self.ambiguous.setdefault(target, Ambiguous(target, (name,), why))
        return self

    # tensors in a pair of containers

    def _join(self, p: Pairing) -> None:
        ours, theirs = self.by_context[0][p.source], self.by_context[1][p.target]
        rule, confidence = self._rule(p)
        reason = f"{p.reading}; the role and the shape agree"
        for index, roles in theirs.items():
            held = ours.get(p.indices.get(index, ()), {})
            spelt: dict[str, list[str]] | None = None
            moved = () if held.keys() == roles.keys() else moved_parts(frozenset(held), frozenset(roles))
            for role, targets in roles.items():
                if role in moved:
                    continue
                if role in held:
                    if len(targets) == len(held[role]) == 1 and self.same_kind(targets[0], held[role][0]):
                        self.take(targets[0], held[role][0], rule, confidence, reason)
                elif p.source == p.target:
                    spelt = self._by_spelling(held) if spelt is None else spelt
                    same = [n for n in spelt.get(self.bare[targets[0]], ()) if self.fits(n, targets[0]) is SAME]
                    if len(same) == 1:
                        self.take(targets[0], same[0], rule, confidence, p.reading)

    def _by_spelling(self, held: Block) -> dict[str, list[str]]:
        out: dict[str, list[str]] = defaultdict(list)
        for names in held.values():
            for name in names:
                out[self.bare.get(name, "")].append(name)
        return out

    def same_kind(self, target: str, source: str) -> bool:
        """Whether the modules of two names may be of one kind: what fits beside them fits, and both or neither keep running statistics."""
        told, other = self.target_names[target], self.source_names[source]
        if told.role.endswith(".weight.") and told.context not in self.running and other.context not in self.running:
            return True
        if not told.role or not other.role or not told.context or not other.context:
            one, matrix = (name.removesuffix("bias") + "weight" if name.endswith("bias") else "" for name in (source, target))
            beside = one in self.items and matrix in self.wanted.shapes and not self._same_name(target, source)
            return not beside or self.fits(one, matrix) is not None
        held, roles = self.by_context[0][other.context][other.indices], self.by_context[1][told.context][told.indices]
        unit, mine = (role.rstrip(".").rpartition(".")[0] for role in (told.role, other.role))
        if (f"{unit}.running.mean." in roles) != (f"{mine}.running.mean." in held):
            return False
        matrix = f"{unit}.weight."
        if matrix == told.role or matrix not in roles or not (own := held.get(f"{mine}.weight.") or held.get(matrix)):
            return True
        if self._same_name(target, source):  # other widths are another matter; a vector is no matrix
            return len(self.wanted.shapes[roles[matrix][0]]) == len(self.items[own[0]].shape)
        return self.fits(own[0], roles[matrix][0]) is not None  # vectors of one length are many

    def _same_name(self, target: str, source: str) -> bool:
        return self.bare[target] == self.bare.get(source)

    def _bias_fits(self, target: str, source: str) -> bool:
        """Whether the biases beside two matrices, where both have one, are of one length: a layer that is turned keeps its outputs."""
        one, other = (name.removesuffix("weight") + "bias" for name in (source, target))
        return one not in self.items or other not in self.wanted.shapes or self.items[one].shape == self.wanted.shapes[other]

    def _rule(self, p: Pairing) -> tuple[str, Confidence]:
        if p.source == p.target and p.reading == SAME_NUMBERS:
            return "same block", "certain"
        return f"{shown(p.source)} becomes {shown(p.target)}", "likely"

    def fits(self, source: str, target: str) -> Fit | None:
        if source.endswith("_exps.weight") and self.shapes[0][source][-2] == self.shapes[0][source][-1]:
            return None  # experts of llama.cpp are [out, in], and those of gpt-oss and Llama 4 [in, out]
        return fit(self.shapes[0][source], self.shapes[1][target], in_out(source) != in_out(target))

    def take(self, target: str, source: str, rule: str, confidence: Confidence, reason: str) -> None:
        item, how = self.items[source], self.fits(source, target)
        if ".qkv." in self.target_names[target].role and how is not None and not item.formula:
            regroup, why = relaid(source, target, self.items, self.wanted)
            if why:
                self.ambiguous[target] = Ambiguous(target, (source,), why)
                return
            how = Fit("rows regrouped", regroup) if regroup is not None else how
        if how is None or target in self.pairs or source in self.used:
            return
        if how.kind == "transposed" and not self._bias_fits(target, source):
            return
        if how is SAME and self._same_name(target, source) and not item.after:
            confidence = "certain"
            rule, reason = ("same name", "name and shape agree") if target == source else wrapper_rule(source, target, self.strange)
        parts, regroup = item.parts, how.regroup
        if item.after is not None:
            if regroup is not None:
                return
            regroup, rule = item.after, f"{rule}; {item.note}"
        elif item.formula:
            rule = f"{item.note}" if rule == "same name" else f"{rule}; {item.note}"
            confidence, reason = ("likely", f"{reason}; {item.reason}") if item.reason else (confidence, reason)
        elif regroup is not None:
            parts, regroup = (item.parts[0]._replace(regroup=regroup, shape=item.shape),), None
            rule = f"{rule}, {how.kind}"
        self.pairs[target] = Pair(target, parts, rule, confidence, reason, regroup, item.formula, item.params)
        self.used.add(source)
        if len(parts) > 1 or parts[0].source != source:
            self.used.update(self.pairs[target].sources)

    def _join_fused(self, p: Pairing) -> None:
        ours, theirs = self.by_context[0][p.source], self.by_context[1][p.target]
        for index, roles in theirs.items():
            held = ours.get(p.indices.get(index, ()), {})
            free = {role: names[0] for role, names in held.items() if len(names) == 1 and names[0] not in self.used}
            open_ = {role: names[0] for role, names in roles.items() if len(names) == 1 and names[0] not in self.pairs}
            if free and open_:
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

    def _singles(self, moved: Container[str]) -> None:
        """Names outside of blocks, by how they end. Those in a block only where the whole name is one, and its numbers are not `moved`."""
        sources = {n: tokens_of(told) for n, told in self.source_names.items() if n not in self.used}
        targets = {n: tokens_of(told) for n, told in self.target_names.items() if n not in self.pairs and n not in self.ambiguous}
        alike = {self.bare.get(n) for n in sources} & {self.bare[n] for n in targets if self.target_names[n].context not in moved}
        for words, names in ((sources, self.source_names), (targets, self.target_names)):
            for name in [n for n in words if names[n].context and self.bare.get(n) not in alike]:
                del words[name]
        self.sides = {(in_head(self.bare.get(n, "")), n.rpartition(".")[2], self.items[n].shape) for n in sources}
        found: dict[str, tuple[int, list[str]]] = {}  # target -> words of the longest end that sources share and fit, and those
        for length, ours, theirs in _shared_ends(sources, targets, 0, list(sources), list(targets)):
            if len(ours) <= _MOST_SHARING:
                here = {n: targets[n] for n in theirs if n not in found}
                found |= {name: (length, fits) for name, fits in self._sharing(length, {n: sources[n] for n in ours}, here) if fits}
        best = {name: found[name] for name in targets if name in found}
        longest: dict[str, int] = defaultdict(int)
        claims: dict[tuple[str, int], tuple[set[str], ...]] = defaultdict(lambda: (set(), set(), set()))
        bare = {name: spelt for names in (sources, targets) for name, spelt in zip(names, bare_names(names), strict=True)}

        def claiming(name: str, source: str, length: int) -> set[str]:
            near = 0 if bare[name] == bare[source] else 1 if domain(name) == domain(source) else 2
            return claims[source, length][near]

        for name, (length, fits) in best.items():
            for source in fits:
                claiming(name, source, length).add(name)
                longest[source] = max(longest[source], length)
        for name, (length, fits) in sorted(best.items(), key=lambda entry: -entry[1][0]):
            free = [s for s in fits if s not in self.used and longest[s] <= length]
            free = [s for s in free if self._same_name(name, s)] or [s for s in free if domain(name) and domain(s) == domain(name)] or free
            if len(free) == 1 and next(filter(None, claims[free[0], length])) == {name}:  # the nearest of those that want it
                self.take(name, free[0], end_rule(bare[free[0]], bare[name]), "likely", BY_END)
                for source in fits if name in self.pairs else ():
                    claiming(name, source, length).discard(name)
            elif free:
                why = "the end of the name and the shape agree, and so they do for others"
                self.ambiguous[name] = Ambiguous(name, tuple(free[:8]), why)

    def _sharing(self, length: int, sources: Words, targets: Words) -> Iterator[tuple[str, list[str]]]:
        """The sources that may be one with each target, of names that end in the same words: one of the two is that end, or the end is
        a known role outside of blocks."""
        single = is_single_role(".".join(next(iter(sources.values()))[-length:]))
        wholes = [s for s, words in sources.items() if len(words) == length]
        apart = {s for s in sources if single and self._stands_apart(s, self.source_names[s], sources[s], length)}
        for name, words in targets.items():
            if len(words) == length:
                near = [s for s in sources if not single or len(sources[s]) == length or s in apart or self.source_names[s].context]
                near = near if length > 1 or single else wholes
            elif single and self._stands_apart(name, self.target_names[name], words, length):
                near = [s for s in sources if len(sources[s]) == length or (s in apart and not opposed(name, s))]
            else:
                near = wholes if length > 1 or single else []
            yield name, [s for s in near if self.fits(s, name) and self.same_kind(name, s) and not self._crosses(s, name)]

    def _crosses(self, source: str, target: str) -> bool:
        """Whether just one of two modules is a part of a head, while the file has another that may be the right one."""
        inside = in_head(self.bare[target])
        return (
            inside != in_head(self.bare.get(source, "")) and (inside, target.rpartition(".")[2], self.wanted.shapes[target]) in self.sides
        )

    def _stands_apart(self, raw: str, told: Name, words: list[str], length: int) -> bool:
        """Whether the end of a longer name is no part of a block, and not of a word that an underscore joins."""
        return not told.context and not any(re.search(rf"{re.escape(w)}[a-z]*_", raw.lower()) for w in words[-length - 1 : -length])

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
        for name, kept in sorted(self.wanted.ties.items(), key=lambda tie: tie[0] not in self.pairs):  # to `kept` first, then from it
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


def _asked(parts: set[str], wanted: set[str]) -> set[str]:
    """Those of the parts that are wanted by themselves, with more or fewer words before them."""
    longest = max(map(len, parts), default=0)
    ends = {end for name in wanted for end in _ends(name[-longest - 1 :]) if end in parts}
    return {part for part in parts if part in wanted or part in ends or any(end in wanted for end in _ends(part))}


def _ends(name: str) -> Iterator[str]:
    return (name[dot.end() :] for dot in re.finditer(r"\.", name))


def _shared_ends(
    sources: Words, targets: Words, length: int, ours: list[str], theirs: list[str]
) -> Iterator[tuple[int, list[str], list[str]]]:
    """The ends that names of both sides have, a longer one before those that it ends in: its number of words, and the names."""
    longer: tuple[dict[str, list[str]], dict[str, list[str]]] = (defaultdict(list), defaultdict(list))  # by the word before
    for held, words, names in ((longer[0], sources, ours), (longer[1], targets, theirs)) if length < _MOST_WORDS else ():
        for name in names:
            if len(words[name]) > length:
                held[words[name][-length - 1]].append(name)
    for word in longer[1]:
        if word in longer[0]:
            yield from _shared_ends(sources, targets, length + 1, longer[0][word], longer[1][word])
    if length:
        yield length, ours, theirs
