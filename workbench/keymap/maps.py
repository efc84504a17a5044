"""KeyMap: the answer of `match`, as a value that can be read, edited, inverted, saved and applied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from workbench.checkpoint import Checkpoint, Step
from workbench.errors import SelectionError, visible
from workbench.report import Report
from workbench.tables import Column, Table, table

Confidence = Literal["certain", "likely"]


@dataclass(frozen=True)
class Pair:
    """One target name and the source name whose values it takes."""

    target: str
    source: str
    rule: str
    confidence: Confidence
    reason: str


@dataclass(frozen=True)
class Unmatched:
    """A target name without a source, and why. `source` is the name that would fit but for its shape."""

    target: str
    reason: str
    source: str | None = None


@dataclass(frozen=True)
class Ambiguous:
    """A target name that several sources could fill; none was chosen."""

    target: str
    candidates: tuple[str, ...]
    reason: str


@dataclass(frozen=True, repr=False)
class KeyMap(Report):
    """Which source fills which target. True when every target has exactly one.

    Attributes:
        pairs: in the target's order.
        unused: source names that fill nothing.
        section: the section of the source that was taken, and `section_reason` why.
        rivals: other sections with the same names and shapes and as good a claim.
    """

    pairs: tuple[Pair, ...]
    unmatched: tuple[Unmatched, ...] = ()
    ambiguous: tuple[Ambiguous, ...] = ()
    unused: tuple[str, ...] = ()
    section: str = ""
    section_reason: str = ""
    rivals: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.unmatched and not self.ambiguous and not self.rivals

    @property
    def mapping(self) -> dict[str, str]:
        """source name -> target name, as `wb.ops.rename` takes it."""
        return {pair.source: pair.target for pair in self.pairs}

    @property
    def rules(self) -> dict[str, int]:
        """Each rule and how many keys it explains."""
        counts: dict[str, int] = {}
        for pair in self.pairs:
            counts[pair.rule] = counts.get(pair.rule, 0) + 1
        return counts

    @property
    def headline(self) -> str:
        total = len(self.pairs) + len(self.unmatched) + len(self.ambiguous)
        rules = ", ".join(f"{rule} ({count})" for rule, count in self.rules.items())
        text = f"{len(self.pairs)} of {total} keys matched" + (f": {rules}" if rules else "")
        parts = [f"{len(self.unmatched)} have no source"] * bool(self.unmatched) + [f"{len(self.ambiguous)} are ambiguous"] * bool(
            self.ambiguous
        )
        parts += [f"{len(self.unused)} names of the file are unused"] * bool(self.unused)
        parts += [f"taken from {self.section!r}, but {', '.join(map(repr, self.rivals))} fits as well"] * bool(self.rivals)
        return visible("; ".join([text, *parts]))

    def tables(self) -> tuple[Table, ...]:
        rules: dict[tuple[str, str, str], int] = {}
        for pair in self.pairs:
            key = (pair.rule, pair.confidence, pair.reason)
            rules[key] = rules.get(key, 0) + 1
        tables = [
            table(
                "rules",
                (Column("rule", "code"), Column("keys", "count"), Column("confidence"), Column("reason")),
                [(r, n, c, why) for (r, c, why), n in rules.items()],
            )
        ]
        if self.ambiguous:
            tables.append(
                table(
                    "ambiguous",
                    (Column("model's name", "name"), Column("candidates"), Column("reason")),
                    [(a.target, ", ".join(a.candidates), a.reason) for a in self.ambiguous],
                )
            )
        if self.unmatched:
            tables.append(
                table(
                    "without a source", (Column("model's name", "name"), Column("reason")), [(u.target, u.reason) for u in self.unmatched]
                )
            )
        if self.unused:
            tables.append(table("unused in the file", (Column("file's name", "name"),), [(name,) for name in self.unused]))
        return tuple(tables)

    def apply(self, ckpt: Checkpoint) -> Checkpoint:
        """The matched tensors under their target names, and nothing else; values stay unread.

        Raises:
            SelectionError: the checkpoint lacks a source that the map names.
        """
        part = self.part(ckpt)
        if missing := [p.source for p in self.pairs if p.source not in part]:
            raise SelectionError(f"{len(missing)} names of the map are not in the checkpoint, first {missing[0]!r}")
        return part.rewrite([(p.target, part[p.source], p.source) for p in self.pairs], Step("apply_keymap", {"mapping": self.mapping}))

    def part(self, ckpt: Checkpoint) -> Checkpoint:
        """The section that the map was made for, or the weights where `ckpt` is that section already."""
        other = self.section != ckpt.weights_section.name and self.section in {s.name for s in ckpt.sections()}
        return ckpt.section(self.section) if other else ckpt.weights

    def inverse(self) -> KeyMap:
        """The map the other way round."""
        pairs = tuple(replace(p, target=p.source, source=p.target, rule=f"inverse of {p.rule}") for p in self.pairs)
        unused = tuple(u.target for u in self.unmatched) + tuple(a.target for a in self.ambiguous)
        return KeyMap(pairs, tuple(Unmatched(name, "unused by the map that was inverted") for name in self.unused), (), unused)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> KeyMap:
        """The map that `to_dict` wrote."""
        return cls(
            tuple(Pair(**p) for p in data["pairs"]),
            tuple(Unmatched(**u) for u in data["unmatched"]),
            tuple(Ambiguous(a["target"], tuple(a["candidates"]), a["reason"]) for a in data["ambiguous"]),
            tuple(data["unused"]),
            data["section"],
            data["section_reason"],
            tuple(data["rivals"]),
        )

    def code(self) -> str:
        """Python that does the same to what torch.load gives, without this library: the matched tensors under their target names."""
        path = "".join(f"[{part!r}]" for part in self.section.split(".")) if self.section else ""
        lines = [f"source = checkpoint{path}", "sources = {", *(f"    {p.target!r}: {p.source!r}," for p in self.pairs), "}"]
        return "\n".join([*lines, "state_dict = {target: source[name] for target, name in sources.items()}"])
