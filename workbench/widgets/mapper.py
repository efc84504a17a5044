"""The key mapper: the model's names and the file's face to face, what is open first; each row and rule accepted, rejected or edited.

It infers nothing: the map comes from `wb.match` or the caller, and every change is `KeyMap.edited` or a `dataclasses.replace` whose
line of Python is shown. A command carries the rows that it means, so that no answer lands on another row.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, ClassVar, cast

import traitlets as t

from workbench.checkpoint import Checkpoint
from workbench.errors import SelectionError, SpecMismatchError, TensorNotFoundError, visible
from workbench.keymap.maps import KeyMap, Pair
from workbench.names import suggest
from workbench.opening import open as open_checkpoint
from workbench.render import html
from workbench.widgets import mapper_report
from workbench.widgets.base import View, script, to_json
from workbench.widgets.mapper_report import KINDS, Group

_MAX_LISTED = 20  # names spelt out in a line of Python
_MAX_LISTING = 300_000  # characters of code that the page shows
_MAX_PAST = 50
_BY_HAND = "; accepted by hand"
_IN_THE_VIEW = "keymap = mapper.keymap"


class KeyMapper(View):
    """See which tensor of a file fills which tensor of a model, settle what is open, and read the map back.

    Args:
        source, target: as `wb.match` takes them.
        keymap: what `wb.match` gives where absent; or one for the same two, made or edited before.

    Reads back: `keymap` as edited (setting it changes the view), `checkpoint` (the source under the model's names), `selected` (the
    model's names) and `filter`.
    """

    _esm = script("grid.js", "frame.js", "mapper.js")
    _css = script("workbench.css", "mapper.css")
    commands: ClassVar[dict[str, str]] = {**View.commands, "accept": "_accept", "reject": "_reject", "undo": "undo", "apply": "_apply"}

    rows = t.Bytes(b"{}").tag(sync=True)
    tree = t.Bytes(b"{}").tag(sync=True)
    listing = t.Dict().tag(sync=True)
    keymap = t.Instance(KeyMap)
    selected = t.Tuple()
    filter = t.Unicode("")

    def __init__(self, source: Any, target: Any, keymap: KeyMap | None = None) -> None:
        from workbench.keymap.inference import match

        self.source = open_checkpoint(source)
        given = match(self.source, target) if keymap is None else keymap
        part = given.part(self.source)
        self._sides = mapper_report.sides_of(target, given, part)
        self._past: list[tuple[KeyMap, list[str]]] = []
        self._nodes: dict[str, list[Any]] = {}
        state = {"filter": "", "kinds": list(KINDS), "mode": "rules", "sort": [], "selected": [], "group": "", "open": {}, "pane": "keys"}
        super().__init__(mapper_report.fixed_report(self.source, target, given, self._sides), state)
        self._did("keymap = wb.match(source, target)" if keymap is None else "KeyMapper(source, target, keymap)")
        self.keymap = given

    @property
    def checkpoint(self) -> Checkpoint:
        """The source's tensors under the model's names, as far as they are matched; values stay unread."""
        return self.keymap.apply(self.source)

    @t.validate("keymap")
    def _made_for_these(self, proposal: Any) -> KeyMap:
        keymap: KeyMap = proposal["value"]
        told = {p.target for p in keymap.pairs} | {u.target for u in keymap.unmatched} | {a.target for a in keymap.ambiguous}
        if strange := next(iter(told ^ self._sides.specs.keys()), None):
            raise SelectionError(f"the map was made for another model: {strange!r} is in only one of the two")
        if lost := next((name for pair in keymap.pairs for name in pair.sources if name not in self._sides.file_row), None):
            raise SelectionError(f"the map was made for another file: this one has no tensor {lost!r}")
        return keymap

    @t.validate("selected")
    def _known_names(self, proposal: Any) -> tuple[str, ...]:
        for name in proposal["value"]:
            self._row(name, self._sides.row, "the model")
        return tuple(proposal["value"])

    @t.observe("keymap")
    def _show_keymap(self, _change: Any) -> None:
        self._read = mapper_report.read(self.keymap, self._sides)
        self._ship()
        if self.state["group"] not in self._read.groups:
            self.state = {**self.state, "group": ""}
        self._describe()
        self._list()

    def _ship(self) -> None:
        """The rows to the page, and the tree where it is shown."""
        is_tree = self.state["mode"] == "tree"
        if is_tree and not self._nodes:
            self._nodes = mapper_report.nodes_of(self._sides)
            self.tree = to_json(self._nodes)
        self.rows = to_json(mapper_report.changing_report(self._read, len(self._past), self._nodes if is_tree else {}))

    @t.observe("filter", "selected")
    def _set_from_python(self, _change: Any) -> None:
        if self.state:
            files = [row for row in self.state["selected"] if row >= len(self._sides.specs)]
            rows = [self._sides.row[name] for name in self.selected]
            self.state = {**self.state, "filter": self.filter, "selected": [*rows, *files]}

    @t.observe("state")
    def _set_from_page(self, change: Any) -> None:
        old, new = change["old"] or {}, change["new"]
        if not old:
            return
        names, _files = self._names_of(new["selected"])
        with self._explained(), self.hold_trait_notifications():
            self.filter, self.selected = new["filter"], tuple(names)
        if (new["selected"], new["group"]) != (old["selected"], old["group"]):
            self._describe()
        if (new["pane"], new["mode"]) != (old["pane"], old["mode"]):
            self._list()
            self._ship()

    def _names_of(self, rows: Sequence[int]) -> tuple[list[str], list[str]]:
        """The model's names and the file's at rows of the page."""
        names, count = self._sides.names, len(self._sides.specs)
        return [names[row] for row in rows if 0 <= row < count], [names[row] for row in rows if count <= row < len(names)]

    def _describe(self) -> None:
        names, files = self._names_of(self.state["selected"])
        if group := self._read.groups.get(self.state["group"]):
            self.detail = mapper_report.of_group(self._read, group)
        elif len(names) == 1 and not files:
            self.detail = mapper_report.of_target(self._read, names[0])
        elif names or files:
            self.detail = mapper_report.of_rows(self._read, names, files)
        else:
            self.detail = mapper_report.overview(self._read)

    def _list(self) -> None:
        """The code without this library, written only where the page shows it."""
        if self.state["pane"] == "code":
            text = self.keymap.code()
            cut = f"The first {_MAX_LISTING:,} of {len(text):,} characters; mapper.keymap.code() has all."
            self.listing = {"text": text[:_MAX_LISTING], "more": cut if len(text) > _MAX_LISTING else ""}

    # what the page asks for

    def _meant(self) -> tuple[Group | None, list[str], list[str]]:
        """The group, the model's names and the file's that a command means."""
        group, told = self._read.groups.get(str(self._asked.get("group"))), self._asked.get("selected")
        rows = group.rows if group else told if isinstance(told, list) else []
        names, files = self._names_of([row for row in rows if isinstance(row, int)])
        if not names and not files:
            raise SelectionError("nothing is selected", hint="select a row or a rule first")
        return group, names, files

    def _accept(self) -> None:
        """Put the one selected name where it was said to go, or settle what is likely among the selected."""
        group, names, files = self._meant()
        choice = self._asked.get("choice")
        if choice is not None:
            if group or len(names) + len(files) != 1:
                raise SelectionError("a source is chosen for one name", hint="select one row")
            self._choose(*((names[0], self._named(choice, True)) if names else (self._named(choice, False), files[0])))
            return
        chosen = {name for name in names if self._read.kinds[name] == "likely"}
        if not chosen:
            hint = "choose a source of a row that is open" if any(name in self._read.open for name in names) else "it is certain already"
            raise SelectionError("nothing that is selected is likely, and only that waits for a yes", hint=hint)
        pairs = tuple(_accepted(pair) if pair.target in chosen else pair for pair in self.keymap.pairs)
        what = f'replace(p, confidence="certain", reason=p.reason + {_BY_HAND!r}) if {_test(group, chosen)} else p'
        line = f"keymap = replace(keymap, pairs=tuple({what} for p in keymap.pairs))"
        self._edit(replace(self.keymap, pairs=pairs), line if group or len(chosen) <= _MAX_LISTED else _IN_THE_VIEW)

    def _named(self, choice: Any, is_file: bool) -> str:
        """The name that was pressed (a row) or typed (its text, as the page shows it)."""
        rows, where = (self._sides.file_row, "the file") if is_file else (self._sides.row, "the model")
        if isinstance(choice, int):
            found = self._names_of([choice])[is_file]
            if not found:
                raise SelectionError(f"that is no name of {where}")
            return found[0]
        typed = str(choice)
        return typed if typed in rows else next((name for name in rows if visible(name) == typed), None) or self._row(typed, rows, where)

    def _row(self, name: str, rows: dict[str, int], where: str) -> str:
        if name not in rows:
            close = " or ".join(map(repr, suggest(name, rows)))
            raise TensorNotFoundError(f"{where} has no tensor {name!r}", hint=f"did you mean {close}" if close else None)
        return name

    def _choose(self, target: str, source: str) -> None:
        wanted, held = self._sides.specs[target].shape, self._sides.part[source].shape
        if wanted != held:
            raise SpecMismatchError(
                f"{source!r} is {list(held)} in the file and {target!r} is {list(wanted)} in the model",
                hint="fit it first with an op, or leave it out and load the rest with strict=False",
            )
        was_open, rows = target in self._read.open, self._sides.row
        following = [name for name in self._read.open if rows[name] > rows[target] and self._read.kinds[name] == self._read.kinds[target]]
        self._edit(self.keymap.edited(accept={target: source}), f"keymap = keymap.edited(accept={{{target!r}: {source!r}}})")
        if was_open and following and self._asked.get("group") == "" and self._asked.get("selected") == [rows[target]]:
            self.state = {**self.state, "selected": [min(rows[name] for name in following)]}

    def _reject(self) -> None:
        """Take back what fills the selected names; those that have nothing stay as they are."""
        group, names, _files = self._meant()
        rejected = [name for name in names if self._read.kinds[name] != "unmatched"]
        if not rejected:
            raise SelectionError("what is selected has no source that could be rejected")
        listed = f"tuple(p.target for p in keymap.pairs if {_test(group, ())})" if group else f"({', '.join(map(repr, rejected))},)"
        listed = "tuple(a.target for a in keymap.ambiguous)" if group and group.kind == "ambiguous" else listed
        line = f"keymap = keymap.edited(reject={listed})"
        edited = self.keymap.edited(reject=cast("tuple[str, ...]", dict.fromkeys(rejected)))  # a dict, because each pair is looked up in it
        self._edit(edited, line if group or len(rejected) <= _MAX_LISTED else _IN_THE_VIEW)

    def _edit(self, keymap: KeyMap, line: str) -> None:
        with self._lock:
            self._past = [*self._past[-_MAX_PAST:], (self.keymap, list(self.code))]
            self._did(line)
            self.keymap = keymap

    def undo(self) -> None:
        """Take back the last change, and its line of Python."""
        with self._lock:
            if not self._past:
                raise SelectionError("nothing was changed that could be undone")
            before, code = self._past.pop()
            self.code = code
            self.keymap = before

    def _apply(self) -> None:
        """Check that the map is whole and applies; the result is `checkpoint`."""
        self.keymap.check()
        count = len(self.checkpoint)
        self._did("fixed = keymap.apply(source)")
        self.detail = {**self.detail, "next": f"mapper.checkpoint holds {count:,} tensors under the model's names; values stay unread."}

    def _static_html(self) -> str:
        return html.render_report(self.keymap)


def _test(group: Group | None, chosen: Collection[str]) -> str:
    """The condition on a pair `p` that holds for a rule, or for some names of the model."""
    return f"(p.rule, p.confidence) == {(group.rule, group.kind)!r}" if group and group.rule else f"p.target in {sorted(chosen)!r}"


def _accepted(pair: Pair) -> Pair:
    return replace(pair, confidence="certain", reason=pair.reason + _BY_HAND)
