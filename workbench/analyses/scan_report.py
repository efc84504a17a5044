"""What a scan found, as tables, JSON and SARIF.

Source of the SARIF form: OASIS SARIF 2.1.0, sections 3.13 (log), 3.14 (run), 3.27 (result), 3.30.11 (byteOffset).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import quote

from workbench.checkpoint import Finding
from workbench.errors import visible
from workbench.formats.known_globals import Verdict
from workbench.report import Report
from workbench.tables import Column, Table, table

STRAY = "stray record"
_LEVELS = {"danger": "error", "warning": "warning", "info": "note"}
_WORST_FIRST: tuple[Verdict, ...] = ("dangerous", "unknown", "data class", "plain")
# where names of older files are found today; such names are spelled out in a snippet
_HOMES = {f"numpy.core.{module}": f"numpy._core.{module}" for module in ("multiarray", "numeric")}
_HOMES |= dict.fromkeys(("pathlib._local", "pathlib"), "pathlib")
_PROGRAMS = ("torchscript", "torch-export")


class Place(NamedTuple):
    """Where something stands: the file, the record in it (`inner.zip › data.pkl`) and the byte there; `position` is the byte in the file."""

    file: str
    record: str = ""
    offset: int | None = None
    position: int | None = None

    @property
    def name(self) -> str:
        return self.record or self.file

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in self._asdict().items() if value not in ("", None)}


@dataclass(frozen=True)
class GlobalUse:
    """One global in one pickle: what is thought of it and why, whether it is imported, built (made empty and filled) or called."""

    name: str
    verdict: Verdict
    use: str
    why: str
    place: Place


@dataclass(frozen=True)
class PickleSeen:
    """One pickle: where it starts, its protocol and length, and how it ends."""

    place: Place
    protocol: int
    nbytes: int
    ends: str


@dataclass(frozen=True, repr=False)
class ScanReport(Report):
    """What the pickles of a file would import and call, and what in it should not be there. False where loading it may do harm.

    Attributes:
        path, format, tensors: what was scanned, and how many tensors it lists.
        findings: dangers, warnings and remarks, worst first.
        globals, pickles: every one of them.
        snippet: lines that load the file with torch, where only known-harmless classes stand in the way; None elsewhere.
    """

    path: str
    format: str
    tensors: int
    findings: tuple[Finding, ...]
    globals: tuple[GlobalUse, ...]
    pickles: tuple[PickleSeen, ...]
    snippet: str | None = None

    @property
    def ok(self) -> bool:
        return not self.dangers

    @property
    def dangers(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.severity == "danger")

    @property
    def needs_allowing(self) -> tuple[str, ...]:
        """The known-harmless classes that torch refuses until they are allowed."""
        return tuple(sorted({use.name for use in self.globals if use.verdict == "data class"}))

    @property
    def headline(self) -> str:
        found, strangers = self.dangers, len(self.needs_allowing)
        if found:
            return f"{len(found)} danger{'s' * (len(found) > 1)}: {found[0].message}{'; …' * (len(found) > 1)}"
        what = f"of which {strangers} are harmless classes that torch.load refuses until they are allowed"
        safe = "no danger found, but it is a program, and running it runs its code" if self.format in _PROGRAMS else "safe"
        names = len({use.name for use in self.globals})
        return f"{safe}: {self.tensors:,} tensors, {names:,} globals, {what if strangers else 'all plain data'}"

    def tables(self) -> tuple[Table, ...]:
        what, where = (Column("severity", "mark"), Column("kind"), Column("what")), (Column("where", "name"), Column("byte", "count"))
        told = [
            (f.severity, f.kind, f.message, f.where.get("record") or f.where.get("file"), f.where.get("offset"), f.hint)
            for f in self.findings
        ]
        alike: dict[tuple[str, str, str, str], list[Place]] = {}
        for u in sorted(self.globals, key=lambda use: (_WORST_FIRST.index(use.verdict), use.name)):
            alike.setdefault((u.name, u.verdict, u.use, u.why), []).append(u.place)
        names = [
            (*use, at[0].name + (f" and {len(at) - 1:,} more" if len(at) > 1 else ""), at[0].offset, why)
            for (*use, why), at in alike.items()
        ]
        pickles = [(p.place.name, p.place.offset, p.protocol, p.nbytes, p.ends) for p in self.pickles]
        lines = [(line,) for line in (self.snippet or "").splitlines()]
        return (
            table("findings", (*what, *where, Column("what to do")), [row for row in told if row[1] != STRAY], empty="nothing found"),
            table("globals", (Column("global", "name"), Column("verdict"), Column("use"), *where, Column("why")), names, empty="none"),
            table("pickles", (*where, Column("protocol", "count"), Column("bytes", "bytes"), Column("ends")), pickles, empty="none"),
            table("records that should not be there", (*what, *where[:1]), [row[:4] for row in told if row[1] == STRAY], empty="none"),
            *([table("to load it with torch", (Column("line", "code"),), lines)] if lines else []),
        )

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "needs_allowing": list(self.needs_allowing)}

    def to_sarif(self) -> dict[str, Any]:
        """The findings as a SARIF 2.1.0 log, for code-scanning services."""
        return sarif([self])


def loading_lines(path: str, names: Sequence[str], element_types: Iterable[str]) -> str:
    """Lines that load a file with torch and allow `names` for that one call; `element_types` are those of its NumPy arrays."""
    imports, spelled = {"import torch"}, []
    for dotted in names:
        module, _, name = dotted.rpartition(".")
        home = _HOMES.get(module, module)
        imports |= {f"from {home} import {name}"} if home != "builtins" else set()
        spelled.append(f'({name}, "{dotted}")' if home in _HOMES.values() or name in ("Ellipsis", "NotImplemented") else name)
    for code in sorted(element_types):
        imports.add("import numpy")
        spelled.append(f"type(numpy.dtype({code!r}))")
    call = f"with torch.serialization.safe_globals([{', '.join(spelled)}]):\n    state = torch.load({path!r}, weights_only=True)"
    return "\n".join(sorted(imports)) + "\n\n" + call


def sarif(reports: Sequence[ScanReport]) -> dict[str, Any]:
    """One SARIF 2.1.0 log of several scans, one run each."""
    return {"$schema": "https://json.schemastore.org/sarif-2.1.0.json", "version": "2.1.0", "runs": [_run(report) for report in reports]}


def _run(report: ScanReport) -> dict[str, Any]:
    from workbench import __version__

    kinds = {finding.kind: _LEVELS[finding.severity] for finding in reversed(report.findings)}  # the worst of each kind, for it comes first
    rules = [
        {"id": _rule(kind), "shortDescription": {"text": f"{kind[:1].upper()}{kind[1:]}."}, "defaultConfiguration": {"level": level}}
        for kind, level in kinds.items()
    ]
    driver = {"name": "checkpoint-workbench", "version": __version__, "rules": rules}
    results = [_result(finding, list(kinds).index(finding.kind), report) for finding in report.findings]
    return {"tool": {"driver": driver}, "invocations": [{"executionSuccessful": True}], "results": results}


def _rule(kind: str) -> str:
    return "workbench/" + kind.replace(" ", "-")


def _result(finding: Finding, rule: int, report: ScanReport) -> dict[str, Any]:
    where = finding.where
    physical: dict[str, Any] = {"artifactLocation": {"uri": quote(where.get("file") or report.path.rpartition("/")[2], errors="replace")}}
    if "position" in where:
        physical["region"] = {"byteOffset": where["position"], "byteLength": 1}
    location: dict[str, Any] = {"physicalLocation": physical}
    if "record" in where:
        location["logicalLocations"] = [{"fullyQualifiedName": visible(where["record"]), "kind": "member"}]
    text = visible(finding.message) + (f" ({visible(finding.hint)})" if finding.hint else "")
    told = {"ruleId": _rule(finding.kind), "ruleIndex": rule, "level": _LEVELS[finding.severity]}
    return {**told, "message": {"text": text}, "locations": [location]}
