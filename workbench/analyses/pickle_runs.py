"""How scan runs a pickle: the first one of some bytes, symbolically, or the run that a reader made over the very same.

No tensors are made; every call of a stranger and every byte string is kept, whatever becomes of it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

from workbench.errors import FormatError, UnsupportedError
from workbench.files import FileRef, Span
from workbench.formats.dcp_template import carry_out_entries
from workbench.formats.known_globals import PLAIN, STATEFUL
from workbench.formats.pickle_blobs import Left, Pages, PayloadMachine
from workbench.formats.pickle_vm import Machine
from workbench.tree import Global, Inert

FIRST_READ, _SURE_READ, _LAST_READ = 1 << 16, 1 << 20, 32 << 20  # of one pickle; a longer one is followed, its payloads stepped over
_REPEATED = re.compile(rb"(?:\x80[\0-\5])*+")
_ENCODINGS = frozenset({"latin1", "latin-1", "utf-8", "utf8", "ascii"})
_LEAF = Inert(Global("torch", "Tensor"))
_LEAVES = SimpleNamespace(form=lambda *_: _LEAF, template_tensor=lambda *_: _LEAF, run=lambda _, forms: forms)  # no tensors are made here


def acts_at_all(head: bytes) -> bool:
    """Whether a pickle that begins with these bytes names something, ends, or goes on behind them; raw numbers break off at once."""
    machine = _Sequential(head, persistent=lambda _: _LEAF, construct=lambda node: node)
    try:
        machine.run()
    except UnsupportedError:  # where C would go on
        return True
    except FormatError:
        return bool(machine.short or machine.globals or machine.calls)
    return True


class Outcome(NamedTuple):
    """A machine after its run, the calls of strangers, the value (what stood on the stack, where it broke), what broke it, and what
    is wrong with the calls; and the byte strings.
    """

    machine: Machine
    made: list[Inert]
    root: Any
    error: FormatError | None
    misused: Mapping[str, str]
    texts: list[Any]


def is_run_over(machine: Machine, file: FileRef, span: Span) -> bool:
    """Whether a reader ran this machine over just these bytes, and to its end; and noted all that is noted here."""
    if not (machine.end or machine.is_spent):
        return False
    if type(machine) is PayloadMachine:
        return (span.file, span.start, span.nbytes) == (file, 0, file.size)
    return type(machine) is Machine and len(machine.data) == span.nbytes and span.read() == machine.data


def run_first(piece: Span, sure: bool, spent: tuple[int, int]) -> Outcome:
    """Run a machine over the first pickle there; what was `spent` before on the same file counts."""
    made: list[Inert] = []
    encoded: list[bytes] = []

    def persistent(pid: Any) -> Any:
        """What torch's own functions make of it: the class that it carries along with its source, or a storage."""
        held = pid if isinstance(pid, tuple) else ()
        found = next((item for item in held[:2] if isinstance(item, (Global, Inert))), None) if held[:1] != ("storage",) else None
        if found is None:
            return _LEAF
        made.append(Inert(found, (), None, True, elements=[pid]))  # noted as an object that torch does not fill, for it refuses such ids
        return found

    def construct(node: Inert) -> Any:
        args, dotted = node.args, node.dotted
        if dotted == "_codecs.encode" and isinstance(args, tuple) and list(map(type, args)) == [str, str] and args[1] in _ENCODINGS:
            encoded.append(args[0].encode(args[1], "replace"))
            return encoded[-1]
        if dotted not in PLAIN or dotted in STATEFUL:
            made.append(node)
        return node

    def run(kind: type[Machine], data: Any, **how: Any) -> Outcome:
        made.clear()
        encoded.clear()
        machine = kind(data, persistent=persistent, construct=construct, **how)
        machine.ran, machine.built = spent
        root, broken = None, None
        try:
            root = machine.run()
        except FormatError as error:
            root, broken = machine.stack, error
        return Outcome(machine, made, root, broken, {}, machine.texts + encoded)

    most = min(piece.nbytes, _LAST_READ)
    data = piece.read(0, min(most, _SURE_READ if sure else FIRST_READ))
    growing = {"size": most, "more": lambda count: piece.read(0, min(most, 8 * count))}
    outcome = run(Machine, data, torch=_LEAVES, entries=carry_out_entries, **growing)
    if outcome.error is not None and outcome.machine.short and most < piece.nbytes:
        return run(PayloadMachine, Pages(lambda at, size: piece.read(at, at + size), piece.nbytes))
    if outcome.machine.crossed:
        return run(_Sequential, outcome.machine.data, **growing)._replace(error=outcome.error)
    return outcome


def repeated_marks(span: Span) -> int:
    """How many bytes of marks of a protocol stand before the last of them, which alone counts; a tensor may hold nothing else."""
    head, at = span.read(0, 4), 0
    while _REPEATED.fullmatch(head) and len(head) == 4:
        data = span.read(at, at + _SURE_READ)
        found = len(data) if data == head[:2] * (len(data) // 2) else _REPEATED.match(data).end()  # type: ignore[union-attr]
        at += found
        if found < _SURE_READ:
            break
    return max(0, at - 2)


def calls_of(dotted: str, machine: Machine, made: list[Inert]) -> list[Inert]:
    return [node for node in made if node.dotted == dotted] if dotted in machine.calls else []


def is_bytes(value: object) -> bool:
    return isinstance(value, bytes) or (isinstance(value, Left) and value.spelling == "bytes")


class _Sequential(Machine):
    """Reads on across the end of a frame, as C does over bytes and the other machine refuses to."""

    frame_end = property(lambda _: 0, lambda _, end: None)
