"""KeyMap: the answer of `match`, as a value that can be read, edited, composed, inverted, saved and applied.

A Pair says how one target tensor is made: parts of source tensors, joined along dim 0. A part may be regrouped first (view,
permute, reshape: transposes, rows of heads) and cut to a range of rows; the whole may be regrouped again. What cannot be said so
(weight normalisation, LoRA, dequantization) is a formula by name; values.py holds them all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from workbench.checkpoint import Checkpoint, Finding, Step
from workbench.errors import SelectionError, visible
from workbench.keymap.plain_code import Origin, plain_code
from workbench.keymap.values import made
from workbench.report import Report
from workbench.sections import rename_modules
from workbench.tables import Column, Table, table
from workbench.tree import is_mapping

Confidence = Literal["certain", "likely"]
Counts = tuple[int, ...]


class Regroup(NamedTuple):
    """``tensor.view(view).permute(axes).reshape(shape)``: the same elements in another order."""

    view: Counts
    axes: Counts
    shape: Counts

    def inverse(self, before: Counts) -> Regroup:
        """What undoes it; `before` is the shape that it was applied to."""
        moved = tuple(self.view[axis] for axis in self.axes)
        return Regroup(moved, tuple(self.axes.index(i) for i in range(len(self.axes))), before)


class Part(NamedTuple):
    """A source tensor, regrouped where that is said, and rows `start` to `stop` of it. Without a source: that many zeros."""

    source: str
    regroup: Regroup | None = None
    rows: tuple[int, int] | None = None
    shape: Counts = ()  # of the source tensor, where it is regrouped or cut


@dataclass(frozen=True)
class Pair:
    """One target name and how its values are made.

    Attributes:
        parts: joined along dim 0, or the arguments of `formula`.
        regroup: of the joined whole.
        formula, params: a name in `values.FORMULAS` and its numbers, where the parts are not simply joined.
    """

    target: str
    parts: tuple[Part, ...]
    rule: str
    confidence: Confidence
    reason: str
    regroup: Regroup | None = None
    formula: str = ""
    params: Mapping[str, Any] = field(default_factory=dict)

    def __init__(
        self, target: str, parts: tuple[Part, ...], rule: str, confidence: Confidence, reason: str,
        regroup: Regroup | None = None, formula: str = "", params: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        own = self.__dict__  # twice as fast as what a frozen dataclass would do itself; a map has a hundred thousand of these
        own["target"], own["parts"], own["rule"], own["confidence"], own["reason"] = target, parts, rule, confidence, reason
        own["regroup"], own["formula"], own["params"] = regroup, formula, {} if params is None else params

    @property
    def source(self) -> str:
        """The first source, which is the only one of most pairs."""
        return self.parts[0].source

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(part.source for part in self.parts if part.source))

    @property
    def is_plain(self) -> bool:
        """Whether the target is one source tensor as it is."""
        return not self.formula and self.regroup is None and len(self.parts) == 1 and self.parts[0] == Part(self.source)

    @classmethod
    def plain(cls, target: str, source: str, rule: str, confidence: Confidence, reason: str) -> Pair:
        return cls(target, (Part(source),), rule, confidence, reason)


@dataclass(frozen=True)
class Unmatched:
    """A target name without a source, and why. `source` is the name that would fit but for its shape."""

    target: str
    reason: str
    source: str | None = None


@dataclass(frozen=True)
class Ambiguous:
    """A target name that several sources could fill, or one source in several ways; none was chosen."""

    target: str
    candidates: tuple[str, ...]
    reason: str


@dataclass(frozen=True, repr=False)
class KeyMap(Report):
    """Which source fills which target, and how. True when every target is filled and nothing was chosen in silence.

    Attributes:
        pairs: in the target's order.
        unused: source names that fill nothing.
        section: the section of the source that was taken, and `section_reason` why.
        rivals: other sections with the same names and shapes and as good a claim.
        findings: what a reader should know besides.
        origin: where the source's tensors lie in its file.
    """

    pairs: tuple[Pair, ...]
    unmatched: tuple[Unmatched, ...] = ()
    ambiguous: tuple[Ambiguous, ...] = ()
    unused: tuple[str, ...] = ()
    section: str = ""
    section_reason: str = ""
    rivals: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()
    origin: Origin = field(default_factory=Origin)

    @property
    def ok(self) -> bool:
        return not self.unmatched and not self.ambiguous and not self.rivals

    @property
    def mapping(self) -> dict[str, str]:
        """source name -> target name of the plain pairs, as `wb.ops.rename` takes it."""
        return {pair.source: pair.target for pair in self.pairs if pair.is_plain}

    @property
    def rules(self) -> dict[str, int]:
        """Each rule and how many keys it explains."""
        counts: dict[str, int] = defaultdict(int)
        for pair in self.pairs:
            counts[pair.rule] += 1
        return dict(counts)

    @property
    def headline(self) -> str:
        total = len(self.pairs) + len(self.unmatched) + len(self.ambiguous)
        rules = ", ".join(f"{rule} ({count})" for rule, count in self.rules.items())
        text = f"{len(self.pairs)} of {total} keys matched" + (f": {rules}" if rules else "")
        parts = [f"{len(self.unmatched)} have no source"] if self.unmatched else []
        parts += [f"{len(self.ambiguous)} are ambiguous"] if self.ambiguous else []
        parts += [f"{len(self.unused)} names of the file are unused"] if self.unused else []
        parts += [f"taken from {self.section!r}, but {', '.join(map(repr, self.rivals))} fits as well"] if self.rivals else []
        return visible("; ".join([text, *parts]))

    def tables(self) -> tuple[Table, ...]:
        counts: dict[tuple[str, str, str], int] = defaultdict(int)
        for pair in self.pairs:
            counts[pair.rule, pair.confidence, pair.reason] += 1
        rule_columns = (Column("rule", "code"), Column("keys", "count"), Column("confidence"), Column("reason"))
        rows = [(rule, count, confidence, reason) for (rule, confidence, reason), count in counts.items()]
        tables = [table("rules", rule_columns, rows)]
        if self.ambiguous:
            columns = (Column("model's name", "name"), Column("candidates"), Column("reason"))
            tables.append(table("ambiguous", columns, [(a.target, ", ".join(a.candidates), a.reason) for a in self.ambiguous]))
        if self.unmatched:
            two = (Column("model's name", "name"), Column("reason"))
            tables.append(table("without a source", two, [(u.target, u.reason) for u in self.unmatched]))
        if self.unused:
            tables.append(table("unused in the file", (Column("file's name", "name"),), [(name,) for name in self.unused]))
        if self.findings:
            tables.append(table("findings", (Column("finding"), Column("what")), [(f.kind, f.message) for f in self.findings]))
        return tuple(tables)

    # use

    def apply(self, ckpt: Any) -> Checkpoint:
        """The matched tensors under their target names, and nothing else; values stay unread.

        Args:
            ckpt: anything `wb.open` takes, with the names that the map was made for.
        Raises:
            SelectionError: the checkpoint lacks a source that the map names.
        """
        from workbench.opening import open as open_checkpoint

        part = self.part(open_checkpoint(ckpt))
        if missing := [name for p in self.pairs for name in p.sources if name not in part]:
            raise SelectionError(f"{len(missing)} names of the map are not in the checkpoint, first {missing[0]!r}")
        step = Step("apply_keymap", {"keymap": self.to_dict()})
        values = {pair.target: made(pair, part) for pair in self.pairs}
        if all(pair.is_plain for pair in self.pairs) and _one_to_one(self.pairs) and not _in_lists(part):
            return part.rewrite([(p.target, values[p.target], p.source) for p in self.pairs], step)
        return Checkpoint(values, name=part.name, history=(*part.history, step))

    def part(self, ckpt: Checkpoint) -> Checkpoint:
        """The section that the map was made for, or the weights where `ckpt` is that section already."""
        other = self.section != ckpt.weights_section.name and self.section in {s.name for s in ckpt.sections()}
        return ckpt.section(self.section) if other else ckpt.weights

    def __call__(self, module: Any, state_dict: dict[str, Any], prefix: str = "", *_: Any) -> None:
        """A hook for ``model.register_load_state_dict_pre_hook(keymap)``: the state dict gets the model's names before it is loaded.

        A state dict that lacks a source of the map is left as it is. What the map does not know stays, so that torch tells it; the
        versions in `_metadata` are told under the new names as well, of the modules below this one.
        """
        sources = {name for pair in self.pairs for name in pair.sources}
        if sources and all(prefix + name in state_dict for name in sources):
            values = self.apply(Checkpoint(_opened({name: state_dict[prefix + name] for name in sources})))
            for name in sources:
                del state_dict[prefix + name]
            state_dict.update({prefix + name: tensor.load() for name, tensor in values.items()})
            metadata = getattr(state_dict, "_metadata", None) or {}
            told = {name.removeprefix(prefix): value for name, value in metadata.items() if name.startswith(prefix)}
            for name, value in rename_modules(told, self.mapping).items():
                metadata.setdefault(prefix + name, value)

    def code(self) -> str:
        """Python that makes the same state dict with torch and safetensors alone and loads it; `checkpoint` is what they read,
        `model` what is loaded.

        Raises:
            SelectionError: neither reads such a file, or a tensor lies inside an object of it.
        """
        return plain_code(self)

    # change

    def edited(self, accept: Mapping[str, str] | None = None, reject: tuple[str, ...] = ()) -> KeyMap:
        """The map with pairs put in (target -> source, as it is) and taken out (target names).

        Raises:
            SelectionError: a target that the map does not know.
        """
        accept, refused = dict(accept or {}), set(reject)
        known = {*(p.target for p in self.pairs), *(u.target for u in self.unmatched), *(a.target for a in self.ambiguous)}
        if strange := [name for name in (*accept, *reject) if name not in known]:
            raise SelectionError(f"the map has no target {strange[0]!r}")
        kept = [p for p in self.pairs if p.target not in accept and p.target not in refused]
        kept += [Pair.plain(target, source, "by hand", "certain", "chosen by hand") for target, source in accept.items()]
        used = {name for pair in kept for name in pair.sources}
        freed = {name for pair in self.pairs for name in pair.sources} - used
        return replace(
            self,
            pairs=tuple(kept),
            unmatched=(
                *(u for u in self.unmatched if u.target not in accept and u.target not in refused),
                *(Unmatched(target, "rejected by hand") for target in reject if target not in accept),
            ),
            ambiguous=tuple(a for a in self.ambiguous if a.target not in accept and a.target not in refused),
            unused=(*(name for name in self.unused if name not in used), *sorted(freed)),
        )  # fmt: skip

    def inverse(self) -> KeyMap:
        """The map the other way round.

        Raises:
            SelectionError: a value of the source is lost: by a formula, or because only a part of it was used. Or a map made by
                hand does not tell the shapes of parts that it joins.
        """
        for pair in self.pairs:
            if (len(pair.parts) > 1 or pair.regroup is not None) and any(part.rows is None and not _shape(part) for part in pair.parts):
                told = f"the map does not say how high the parts of {pair.target!r} are"
                raise SelectionError(f"{told}, and it cannot be taken apart again", hint="wb.match tells them; by hand, Part(…, shape=…)")
        return inverted(self)

    def then(self, other: KeyMap) -> KeyMap:
        """This map, and then `other` on its result, as one map from this one's source to the other's target.

        Raises:
            SelectionError: a target would need two transformations in a row.
        """
        inner = {pair.target: pair for pair in self.pairs}
        pairs, unmatched = [], list(other.unmatched)
        for pair in other.pairs:
            steps = [inner.get(name) for name in pair.sources]
            if None in steps:
                unmatched.append(Unmatched(pair.target, "its source in the second map has none in the first"))
            elif pair.is_plain and steps[0] is not None:
                pairs.append(
                    replace(
                        steps[0] if steps[0].confidence == "likely" else replace(steps[0], confidence=pair.confidence), target=pair.target
                    )
                )
            elif all(step is not None and step.is_plain for step in steps):
                parts = tuple(part._replace(source=inner[part.source].source) if part.source else part for part in pair.parts)
                sure = {inner[name].confidence for name in pair.sources} == {"certain"}
                pairs.append(replace(pair, parts=parts, confidence=pair.confidence if sure else "likely"))
            else:
                raise SelectionError(f"{pair.target!r} would be made by two transformations in a row", hint="apply one map after the other")
        used = {name for pair in pairs for name in pair.sources}
        sources = (*(name for pair in self.pairs for name in pair.sources), *self.unused)
        return replace(
            self, pairs=tuple(pairs), unmatched=tuple(unmatched), ambiguous=other.ambiguous, unused=tuple(dict.fromkeys(n for n in sources if n not in used)),
            findings=(*self.findings, *other.findings), rivals=(*self.rivals, *other.rivals),
        )  # fmt: skip

    def diff(self, other: KeyMap) -> dict[str, tuple[Pair | None, Pair | None]]:
        """target -> (this map's pair, the other's) wherever the two make it otherwise."""
        ours, theirs = ({p.target: p for p in keymap.pairs} for keymap in (self, other))
        names = dict.fromkeys([*ours, *theirs])
        return {name: (ours.get(name), theirs.get(name)) for name in names if _values_of(ours.get(name)) != _values_of(theirs.get(name))}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> KeyMap:
        """The map that `to_dict` wrote."""

        def regroup(told: Any) -> Regroup | None:
            return None if told is None else Regroup(*map(tuple, told))

        def part(told: Any) -> Part:
            return Part(told[0], regroup(told[1]), None if told[2] is None else (told[2][0], told[2][1]), tuple(told[3]))

        return cls(
            tuple(Pair(**{**p, "parts": tuple(map(part, p["parts"])), "regroup": regroup(p["regroup"])}) for p in data["pairs"]),
            tuple(Unmatched(**u) for u in data["unmatched"]),
            tuple(Ambiguous(a["target"], tuple(a["candidates"]), a["reason"]) for a in data["ambiguous"]),
            tuple(data["unused"]), data["section"], data["section_reason"], tuple(data["rivals"]),
            tuple(Finding(**f) for f in data["findings"]), Origin.from_list(data.get("origin", Origin())),
        )  # fmt: skip


def inverted(keymap: KeyMap) -> KeyMap:
    """`KeyMap.inverse`, with parts of no height where the map does not tell it; enough to know that nothing is lost."""
    pieces: dict[str, list[tuple[Part, Part]]] = defaultdict(list)  # source -> (its part, where that lies in a target)
    rules: dict[str, Pair] = {}
    for pair in keymap.pairs:
        if pair.formula:
            raise SelectionError(f"{pair.target!r} is made by {pair.formula}, which cannot be undone")
        rules.update(dict.fromkeys(pair.sources, pair))
        at = 0
        for part in pair.parts:
            if not part.source:
                raise SelectionError(f"{pair.target!r} holds zeros that are in no source, and they would be lost")
            count = _rows(part)
            back = None if pair.regroup is None else pair.regroup.inverse(_joined_shape(pair))
            whole = len(pair.parts) == 1
            shape = pair.regroup.shape if pair.regroup is not None else _joined_shape(pair)
            pieces[part.source].append((part, Part(pair.target, back, None if whole else (at, at + count), shape)))
            at += count
    pairs = []
    for source, held in pieces.items():
        held.sort(key=lambda entry: entry[0].rows or (0, 0))
        ends = [part.rows for part, _ in held if part.rows is not None]
        first = held[0][0]
        height = (_shape(first) or (0,))[0]
        gaps = ends and [0, *(stop for _, stop in ends)] != [*(start for start, _ in ends), height]
        if gaps or (len(held) > 1 and len(ends) < len(held)) or any(part.regroup != first.regroup for part, _ in held):
            raise SelectionError(f"not all of {source!r} is used once, and it cannot be put together again")
        regroup = None if first.regroup is None else first.regroup.inverse(first.shape)
        old, parts = rules[source], tuple(piece for _, piece in held)
        if len(parts) == 1 and regroup is None and parts[0].regroup is None and parts[0].rows is None:
            parts = (Part(parts[0].source),)
        pairs.append(Pair(source, parts, f"inverse of {old.rule}", old.confidence, old.reason, regroup))
    unused = tuple(u.target for u in keymap.unmatched) + tuple(a.target for a in keymap.ambiguous)
    return KeyMap(tuple(pairs), tuple(Unmatched(name, "unused by the map that was inverted") for name in keymap.unused), (), unused)


def _one_to_one(pairs: tuple[Pair, ...]) -> bool:
    return len({pair.source for pair in pairs}) == len(pairs)


def _in_lists(part: Checkpoint) -> bool:
    return not is_mapping(part.tree) or any(isinstance(key, int) for path in part.paths.values() for key in path)


def _opened(held: dict[str, Any]) -> Any:
    from workbench.opening import open as open_checkpoint

    return open_checkpoint(held).tree


def _shape(part: Part) -> Counts:
    """The shape of a part before rows are cut from it; () where it is not known, or has no dimension."""
    return part.regroup.shape if part.regroup is not None else part.shape


def _rows(part: Part) -> int:
    """How many rows a part gives; 0 where it is a whole tensor of unknown shape."""
    return part.rows[1] - part.rows[0] if part.rows is not None else (_shape(part) or (0,))[0]


def _joined_shape(pair: Pair) -> Counts:
    shape = _shape(pair.parts[0])
    return (sum(map(_rows, pair.parts)), *shape[1:]) if shape else ()


def _values_of(pair: Pair | None) -> Any:
    return None if pair is None else (pair.parts, pair.regroup, pair.formula, dict(pair.params))
