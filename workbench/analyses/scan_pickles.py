"""What one scan found so far, and how it judges the pickles among it: what they name and call, whether they break off.

Whatever walks files, folders and archives is built on this; a pickle's byte strings go back to it, for they may be files themselves.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable
from itertools import islice
from typing import Any, NamedTuple

from workbench.analyses.pickle_runs import FIRST_READ, Outcome, calls_of, is_bytes, is_run_over, repeated_marks, run_first
from workbench.analyses.scan_marks import is_marked
from workbench.analyses.scan_report import GlobalUse, PickleSeen, Place
from workbench.checkpoint import Finding, Severity
from workbench.errors import UnsupportedError, WorkbenchError
from workbench.files import Span
from workbench.formats.known_globals import NESTED, danger_findings, judge, misuses
from workbench.formats.pickle_blobs import Left, most_nested, payload_span
from workbench.formats.pickle_loop import MAX_BUILT, MAX_OPCODES, TOO_MUCH
from workbench.formats.torch_objects import Run
from workbench.formats.torch_tar import LONGEST, description
from workbench.formats.torchscript_file import is_plain
from workbench.tree import Global

_EACH = 60  # what each pickle of strangers counts for among the things that are built for one file
_MOST_PICKLES, _MOST_STRINGS, _MOST_NAMES, _MOST_TOLD = 1000, 2000, 1000, 100
_NAMING, _LAST = re.compile(rb"[ci\x82-\x84\x93]"), 1 << 20  # opcodes of globals, classes and extensions; what is read of the rest at once


class Piece(NamedTuple):
    """Bytes to look into: a file, a record of it, or a byte string of a pickle."""

    span: Span
    file: str
    record: str = ""
    depth: int = 0
    script: bool = False  # a record of a TorchScript archive, whose classes are its own
    lies: bool = True  # whether its bytes lie in the file as they are

    def inner(self, span: Span, name: str, script: bool = False) -> Piece:
        lies = self.lies and span.file == self.span.file
        return Piece(span, self.file, f"{self.record} › {name}" if self.record else name, self.depth + 1, script, lies)

    def part(self, start: int, nbytes: int) -> Piece:
        return self._replace(span=self.span.part(start, nbytes))

    def place(self, offset: int | None = None) -> Place:
        return Place(self.file, self.record, offset, self.span.start + (offset or 0) if self.lies else None)

    @property
    def name(self) -> str:
        return self.record or self.file


class PickleScan(ABC):
    """One scan: what it found so far."""

    @abstractmethod
    def content(self, piece: Piece, *, sure: bool = False) -> None:
        """Look into bytes that may be a file."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []
        self.is_spent = False  # a bound that was told
        self.also_found: list[Finding] = []  # by wb.open, of what is looked for here as well
        self.uses: list[GlobalUse] = []
        self.pickles: list[PickleSeen] = []
        self.formats: list[str] = []
        self.tensors = 0
        self.refused: set[tuple[str, str]] = set()
        self.known: dict[int | bytes, list[Run]] = defaultdict(list)  # by wb.open, by how many bytes they ran over; short ones by those
        self.read: set[int] = set()  # byte strings, by their ids, that wb.open read as files
        self.looked_into = 0  # byte strings of its pickles
        self.spent = {True: (0, 0), False: (0, 0)}  # opcodes run over sure pickles and others, and those that built something
        self.loads = True  # whether torch would load it, once the harmless classes are allowed
        self.element_types: set[str] = set()  # of NumPy

    def tell(self, kind: str, severity: Severity, message: str, here: Place, hint: str | None = None) -> None:
        self.findings.append(Finding(kind, severity, message, here.to_dict(), hint))

    def refuse(self, error: WorkbenchError, here: Place) -> None:
        """What cannot be read is a danger. Told once for each record."""
        here = here._replace(record=here.record or str(error.where.get("record", "")))
        if here[:2] not in self.refused:
            self.refused.add(here[:2])
            self.tell("unreadable", "danger", f"{here.name} cannot be read: {error.message}", here, error.hint)

    def told(self) -> tuple[Finding, ...]:
        """The findings, worst first, and no more of a kind than anybody reads."""
        order = {"danger": 0, "warning": 1, "info": 2}
        known = {(found.kind, found.where.get("global")) for found in self.findings}
        self.findings += [f for f in self.also_found if f.severity == "danger" and (f.kind, f.where.get("global")) not in known]
        counts: Counter[tuple[Severity, str]] = Counter()
        kept = []
        for finding in sorted(self.findings, key=lambda finding: (order[finding.severity], finding.kind == "unreadable")):
            counts[finding.severity, finding.kind] += 1
            kept += [finding] if counts[finding.severity, finding.kind] <= _MOST_TOLD else []
        more = ((severity, kind, count - _MOST_TOLD) for (severity, kind), count in counts.items() if count > _MOST_TOLD)
        return (*kept, *(Finding(kind, severity, f"{count} more of this kind, not told one by one") for severity, kind, count in more))

    # pickles

    def run_all(self, piece: Piece, *, sure: bool = False, gap: Callable[[Any, bytes], int] | None = None) -> None:
        """The pickle at the start and those that follow it; `gap` tells how many other bytes stand behind each but the first."""
        at = 0
        for count in range(_MOST_PICKLES if gap is None else 12 * _MOST_PICKLES):
            ended = None if gap is None else self.described(piece, at)
            ended = ended or self.run(piece, at, sure=sure and (count == 0 or gap is not None))
            if ended is None:
                return
            at = ended[0] + (gap(ended[1], piece.span.read(ended[0], ended[0] + 8)) if gap is not None and count else 0)
            if at >= piece.span.nbytes:
                return
        self.tell("not scanned", "danger", f"{piece.name} holds more pickles than were looked into", piece.place())

    def described(self, piece: Piece, at: int) -> tuple[int, Any] | None:
        """As `run`, of a pickle that old torch wrote of a storage or a tensor, which its bytes prove to do nothing else."""
        if (told := description(piece.span.read(at, at + LONGEST))) is None:
            return None
        self.pickles.append(PickleSeen(piece.place(at), 2, told.nbytes, "at its STOP"))
        verdict, why = judge(told.value[2])
        self.uses.append(GlobalUse(told.value[2].dotted, verdict, "imported", why, piece.place(at + told.offset)))
        return at + told.nbytes, told.value

    def run(self, piece: Piece, at: int, *, sure: bool) -> tuple[int, Any] | None:
        """One pickle: what it names and calls is noted. The byte after it and its value, or None where none ends."""
        if self.spent[sure][0] >= MAX_OPCODES or self.spent[sure][1] >= MAX_BUILT:
            if not self.is_spent:
                self.tell("not scanned", "danger", f"{piece.name}, and what follows it: its pickles ask for too much", piece.place(at))
            self.is_spent = True
            return None
        at += repeated_marks(piece.span.part(at, piece.span.nbytes - at))
        outcome = self.outcome(piece.span.part(at, piece.span.nbytes - at), sure)
        machine, made, root, error, misused, _ = outcome
        seen = len(self.findings)
        if error is None or machine.globals:
            self.strings(piece, at, outcome)
        nested = not any(finding.severity == "danger" for finding in self.findings[seen:])
        loads = calls_of(NESTED, machine, made)
        nested &= bool(loads) and all(isinstance(node.args, tuple) and [*map(is_bytes, node.args)] == [True] for node in loads)

        def also(found: Global) -> bool:
            return (piece.script and is_plain(found)) or (nested and found.dotted == NESTED)

        findings = danger_findings(machine, made, also, misused)
        acts = any(found.kind == "forbidden call" or found.where.get("global") in machine.calls for found in findings)
        if sure or acts or (error is None and (machine.proto or machine.globals)):
            self.note(outcome, piece, at, also)
            for found in findings:
                where = {**found.where, **piece.place(at + found.where.get("offset", 0)).to_dict()}
                self.findings.append(
                    Finding(found.kind, found.severity, found.message.replace("the pickle", piece.name, 1), where, found.hint)
                )
            if error is not None and sure and not machine.is_spent:
                self.refuse(error, piece.place(at))
        if isinstance(error, UnsupportedError) and (
            machine.is_spent or self.may_name(piece.span.part(at, piece.span.nbytes - at), machine.base + machine.began)
        ):
            self.refuse(error, piece.place(at))
        return None if error is not None else (at + machine.end, root)

    def may_name(self, span: Span, at: int) -> bool:
        """Whether an opcode that names something may stand there, where only this machine went no further, or follow."""
        reach = range(at, span.nbytes, _LAST)
        return any(_NAMING.search(span.read(at, min(at + _LAST, span.nbytes))) for at in reach)

    def outcome(self, span: Span, sure: bool) -> Outcome:
        """The run that wb.open made of the same bytes, or a new one. What is done for one file is bounded in all."""
        short = self.known.get(span.read(), ()) if span.nbytes <= FIRST_READ else ()
        for known in (*short, *self.known.get(span.nbytes, ())):
            if is_run_over(machine := known.machine, known.file, span):
                self.spent[sure] = (self.spent[sure][0] + machine.ran, self.spent[sure][1] + machine.built)
                error = None if machine.end else UnsupportedError(TOO_MUCH, offset=machine.place)
                self.read.update(map(id, known.read))
                return Outcome(machine, known.strangers, None, error, known.misused, known.texts)
        outcome = run_first(span, sure, self.spent[sure])
        odd = outcome.made or (sure and outcome.error is not None)  # tensors of a .distcp are many, and plain
        self.spent[sure] = (outcome.machine.ran, outcome.machine.built + (_EACH if odd else 0))
        return outcome._replace(misused=misuses(outcome.made, outcome.machine.globals, outcome.machine.states))

    def note(self, outcome: Outcome, piece: Piece, at: int, also: Callable[[Global], bool]) -> None:
        machine, made, _, error, misused, _ = outcome
        ends = "at its STOP" if error is None else f"broken: {error.message}"
        self.pickles.append(PickleSeen(piece.place(at), machine.proto, machine.end or machine.place, ends))
        built = {node.dotted for node in made if node.new} - {node.dotted for node in made if not node.new}
        for found, offset in islice(machine.globals.items(), _MOST_NAMES):
            verdict, why = judge(found, misused.get(found.dotted), also)
            use = "imported" if found.dotted not in machine.calls else "built" if found.dotted in built else "called"
            self.uses.append(GlobalUse(found.dotted, verdict, use, why, piece.place(at + offset)))
        self.loads = self.loads and machine.proto == 2 and not any(node.items or node.elements for node in made)
        types = (node.args[0] for node in calls_of("numpy.dtype", machine, made) if isinstance(node.args, tuple) and node.args)
        self.element_types |= {code for code in types if isinstance(code, str)}

    def strings(self, piece: Piece, at: int, outcome: Outcome) -> None:
        """Byte strings of a pickle: those that it hands to torch as files, those that look like files, and the first of all others."""
        given = {id(arg) for node in calls_of(NESTED, outcome.machine, outcome.made) if isinstance(node.args, tuple) for arg in node.args}
        for count, data in enumerate(outcome.texts):
            left, sure = isinstance(data, Left), id(data) in given
            if sure and id(data) in self.read and self.looked_into >= _MOST_TOLD:  # which told what it found
                continue
            if not (left or sure or count < _MOST_STRINGS or is_marked(data[:6])):
                continue
            found = piece.span.part(at + data.start, data.nbytes) if left else payload_span(piece.span.file, bytes(data))
            if found is None or (left and not sure and count >= _MOST_STRINGS and not is_marked(found.read(0, 6))):
                continue
            self.looked_into += 1
            if self.looked_into > _MOST_STRINGS + most_nested(piece.span.file):
                told = "it holds more byte strings that may be files than were looked into"
                self.tell("not scanned", "danger", f"{piece.name}: {told}", piece.place())
                return
            self.content(piece.inner(found, "byte string"), sure=sure)
