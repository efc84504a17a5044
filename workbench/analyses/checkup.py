"""`wb.checkup`: one screen of what is wrong or could be better in a checkpoint, each with the line of Python that mends it.

Composed from scan, ledger and statistics; owns what none of them tells: how the file is kept (whole models, wrapper names, training
state, tensors that code computes anyway, its name and its container). Cures write a new file beside the old one.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from workbench.analyses.description import describe
from workbench.analyses.scanner import scan
from workbench.analyses.sizes import ledger
from workbench.analyses.statistics import stats
from workbench.checkpoint import Checkpoint, Severity
from workbench.dtypes import DTYPES, to_torch
from workbench.errors import BudgetError, FormatError
from workbench.names import WRAPPERS, match_names
from workbench.opening import open as open_checkpoint
from workbench.report import Report
from workbench.stream import ProgressFunction
from workbench.tables import Column, Table, format_bytes, table

_OLD = {"torch-legacy": "the container before torch 1.6", "torch-tar": "torch's oldest container", "pickle": "a plain pickle"}
_COMPUTED = re.compile(
    r"(^|[._])(inv_freq|position_ids|token_type_ids|(cos|sin)_cached?|rope_cache|freqs_cis|masked_bias|attn_mask|causal_mask|grad"
    r"|relative_position_index|relative_coords_table)$|(^|\.)(mask|tril)$"
)
_EMPTY_WORD = re.compile(
    r"models?|checkpoints?|ckpt|weights?|final|best|last|latest|new|old|te?mp|test|untitled|file|copy|saved?|state|dict|py|torch"
    r"|net|network|my|the|data|out|output|epoch|step|v|pth?|bin|tar"
)
_SHARED_NAMES = ("model", "net", "network", "backbone")
_MOST_NAMES = 50  # in one line of cure
_EXTENSIONS = re.compile(r"(\.(pt2?|pth|bin|ckpt|safetensors|tar|index|json|np[yz]|gguf|onnx))+$")
_STATE = ("optimizer", "schedule", "scaler", "random")


class Advice(NamedTuple):
    """One thing to mend: how bad it is, what it is, where, and the line that mends it (None where no line can)."""

    severity: Severity
    what: str
    where: str
    cure: str | None


@dataclass(frozen=True, repr=False)
class CheckupReport(Report):
    """What a checkpoint's keeper should know; false where something is dangerous or wrong, true with advice otherwise.

    Attributes:
        glance: the headline of each examination.
        advice: worst first. In a cure for live objects, `ckpt` stands for what was examined.
    """

    name: str
    glance: tuple[tuple[str, str], ...]
    advice: tuple[Advice, ...]

    @property
    def ok(self) -> bool:
        return not any(a.severity == "danger" for a in self.advice)

    @property
    def headline(self) -> str:
        wrong = [a.what for a in self.advice if a.severity == "danger"]
        rest = len(self.advice) - len(wrong)
        better = f"{rest} thing{'s' * (rest != 1)} could be better"
        if wrong:
            return f"{len(wrong)} thing{'s' * (len(wrong) != 1)} must be mended: {wrong[0]}" + (f"; {better}" if rest else "")
        return f"nothing is wrong; {better}: {self.advice[0].what}" if rest else "in good health"

    def tables(self) -> tuple[Table, ...]:
        columns = (Column("severity", "mark"), Column("what"), Column("where", "name"), Column("cure", "code"))
        return (
            table("at a glance", (Column("what"), Column("finding")), self.glance),
            table("advice", columns, self.advice, empty="nothing to mend"),
        )


def checkup(
    source: Any, *, values: bool = True, progress: ProgressFunction | None = None, cancel: threading.Event | None = None
) -> CheckupReport:
    """Examine a checkpoint and say what is wrong, what could be better, and how to mend each.

    Args:
        source: anything `wb.open` takes. Of live objects, nothing about a file is said.
        values: look for NaN and infinities, and for float32 that is exactly bfloat16 or float16.
    Raises:
        FormatError, MissingFileError: it cannot be opened; `wb.scan` says what is dangerous in such a file. CancelledError.
    Cost: two reads of the file, one for its checksums; with values=False, what `wb.scan` reads.
    """
    ckpt = open_checkpoint(source)
    report = scan(ckpt, crc=values) if ckpt.source is not None else None
    account = ledger(ckpt)
    case = _Case(ckpt, bool(ckpt.modules) or (report is not None and (not report.ok or bool(report.needs_allowing))))
    computed = {n for n, t in ckpt.items() if _COMPUTED.search(n) or _is_mask(n, t.shape)}
    advice = [*_about_safety(case, report), *_about_names(case, computed), *_about_file(case)]
    network = describe(ckpt)
    if not network.ok:
        advice.append(Advice("warning", network.headline, "config.json", f"wb.describe({case.opened})"))
    told = "not read"
    if values and (readable := [n for n, t in ckpt.items() if t.locked is None]):
        try:
            numbers = stats(ckpt, readable, histogram=False, progress=progress, cancel=cancel)
            told = numbers.headline
            advice += _about_values(case, [row.name for row in numbers.rows if (row.nan or row.inf) and row.name not in computed])
        except (FormatError, BudgetError) as error:
            told = f"cannot be read: {error.message}"
            advice.append(Advice("danger", f"the values {told}", str(error.where.get("tensor", ckpt.name)), None))
    if waste := sum(row.nbytes for row in account.rows if row.waste):
        what = f"{format_bytes(waste)} of storage lie behind views, and no tensor shows them"
        advice.append(Advice("warning", what, "storages", case.save(".weights" if ckpt.extras else "", "compact", ".safetensors")))
    advice.sort(key=lambda a: ("danger", "warning", "info").index(a.severity))
    sections = [f"{s.name or 'all of it'} ({s.kind}, {s.tensors:,} tensors, {format_bytes(s.nbytes)})" for s in ckpt.sections()[:4]]
    glance = [("safety", report.headline)] if report is not None else []
    glance += [("sections", ", ".join(sections) or "no state dict"), ("bytes", account.headline), ("values", told)]
    return CheckupReport(ckpt.name, tuple(glance), tuple(advice))


class _Case:
    """What the lines of cure need: how the checkpoint is opened, where a mended one goes, and what stands in the way."""

    def __init__(self, ckpt: Checkpoint, inert: bool) -> None:
        file = ckpt.source
        self.ckpt, self.file = ckpt, file if not ckpt.within else None
        self.opened = f"wb.open({file.url!r})" + f".section({ckpt.within!r})" * bool(ckpt.within) if file else "ckpt"
        url = file.folder.url if file and file.name == ".metadata" else file.url if file else "checkpoint"
        self.stem = _EXTENSIONS.sub("", os.path.basename(url) if file and file.address else url)
        self.extension = ".safetensors" if ckpt.format.endswith("safetensors") else ".pt"
        self.section = ckpt.weights_section.name
        self.options = ', unsafe="drop"' * inert
        self.locked = [name for name, tensor in ckpt.items() if tensor.locked is not None]
        near = file.folder if file and not file.address else ()
        self.published = "config.json" in ckpt.metadata or "config.json" in near  # a hub's files have set names

    def save(self, what: str, suffix: str, extension: str = "") -> str | None:
        """Save an expression, or what follows the opened checkpoint; None where values in doubt are refused."""
        what = self.opened + what if what[:1] in (".", "") else what
        return None if self.locked else f"wb.save({what}, {f'{self.stem}_{suffix}{extension or self.extension}'!r}{self.options})"

    def op(self, name: str, argument: str) -> str | None:
        """Apply an op to the weights; None for objects that stay inert, which another line frees first."""
        section = f", section={self.section!r}" * bool(self.section)
        return None if self.ckpt.modules else self.save(f"wb.ops.{name}({self.opened}, {argument}{section})", "clean")

    def without(self, names: list[str]) -> str | None:
        """Leave tensors out, by patterns where these select nothing else."""
        ends = sorted({"*." + ".".join(name.split(".")[-2:]) for name in names})
        chosen = ends if set(match_names(ends, self.ckpt)) == set(names) else names
        possible = not self.ckpt.modules and len(chosen) <= _MOST_NAMES and len(names) < len(self.ckpt)
        return self.save(f".drop({chosen!r})", "clean") if possible else None


def _about_safety(case: _Case, report: Any) -> Iterator[Advice]:
    rewrite = case.save("", "safe")
    if report is None:
        return
    if case.locked:
        what = f"{len(case.locked)} tensors have no values to trust: {case.ckpt[case.locked[0]].locked}"
        yield Advice("danger", what, case.locked[0], None)
    if not report.ok:
        yield Advice("danger", report.headline, case.ckpt.name, rewrite)
    if case.ckpt.modules:
        path, cls = case.ckpt.modules[0]
        yield Advice("warning", f"a whole model is pickled ({cls}): it opens only where its code is unchanged", path or "(root)", rewrite)
    elif report.ok and report.needs_allowing and case.ckpt.format in ("torch-zip", "torch-legacy"):
        more = f" and {len(report.needs_allowing) - 1} more are" if len(report.needs_allowing) > 1 else " is"
        yield Advice("warning", f"torch.load refuses it until {report.needs_allowing[0]}{more} allowed", case.ckpt.name, rewrite)
    for finding in report.findings:
        if finding.severity == "warning" or finding.kind in ("device storages", "big-endian"):
            where = finding.where.get("record") or finding.where.get("tensor") or case.ckpt.name
            yield Advice(finding.severity, finding.message, str(where), rewrite)


def _about_names(case: _Case, computed: set[str]) -> Iterator[Advice]:
    ckpt, where = case.ckpt, case.section or "(root)"
    names = list(ckpt.weights)
    wrappers = sorted({part for name in names for part in name.split(".")[:-1] if part in WRAPPERS})
    first = names[0].partition(".")[0] if names else ""
    if wrappers:
        bare = f'lambda name: ".".join(part for part in name.split(".") if part not in {wrappers!r})'
        yield Advice("warning", f"names carry {', '.join(wrappers)}, from {WRAPPERS[wrappers[0]]}", where, case.op("rename", bare))
    elif first in _SHARED_NAMES and not case.published and all(name.startswith(f"{first}.") for name in names):
        what = f"every name begins with '{first}.', as a trainer's wrapper writes it"
        yield Advice("info", what, where, case.op("strip_prefix", repr(f"{first}.")))
    if state := [s for s in ckpt.sections() if s.kind in _STATE]:
        what = f"{format_bytes(sum(s.nbytes for s in state))} of training state, which only resuming needs"
        yield Advice("info", what, state[0].name or "(root)", None if ckpt.modules else case.save(".weights", "weights"))
    if computed:
        what = f"{len(computed)} tensors that the model computes by itself ({format_bytes(sum(ckpt[n].nbytes for n in computed))})"
        yield Advice("info", what, min(computed), case.without([n for n in ckpt if n in computed]))


def _about_file(case: _Case) -> Iterator[Advice]:
    ckpt, file = case.ckpt, case.file
    if file is None:
        return
    if ckpt.format in _OLD:
        yield Advice("info", f"{_OLD[ckpt.format]}: torch cannot map it into memory", file.name, case.save("", "new"))
    plain = ckpt.format in (*_OLD, "torch-zip", "safetensors") and not case.published
    if plain and not ckpt.extras and not ckpt.metadata.keys() - {"format"}:
        new = f'wb.Checkpoint({{"model": {case.opened}.tree, "epoch": None, "version": "1.0", "config": {{}}}})'
        if ckpt.format == "safetensors":
            new = f'wb.Checkpoint({case.opened}.tree, metadata={{"version": "1.0", "config": ""}})'
        yield Advice("info", "nothing says what it is: no epoch, version or configuration", file.name, case.save(new, "told"))
    if plain and not file.address and all(map(_EMPTY_WORD.fullmatch, re.findall(r"[a-z]+", file.name.rpartition(".")[0].lower()))):
        folder, end = os.path.dirname(file.url), os.path.splitext(file.name)[1]
        epoch = next((f"epoch{v}" for k, v in ckpt.extras.items() if k.rpartition(".")[2] == "epoch" and type(v) is int), "")
        when = epoch or time.strftime("%Y-%m-%d", time.gmtime(file.identity[3] / 1e9))
        name = f"{os.path.basename(folder) or 'network'}_{sum(t.numel for t in ckpt.weights.values())}_parameters_{when}{end}"
        cure = f"import os; os.rename({file.url!r}, {os.path.join(folder, name)!r})"
        yield Advice("info", "its name does not say which model it is, nor from when", file.name, cure)


def _about_values(case: _Case, bad: list[str]) -> Iterator[Advice]:
    if bad:
        what = f"{len(bad)} tensors hold NaN or infinities: take an earlier checkpoint, or leave them out"
        yield Advice("danger", what, bad[0], case.without(bad))
        return
    wide = [t for t in case.ckpt.weights.values() if t.dtype.name == "float32" and t.locked is None and t.numel]
    for narrow in ("bfloat16", "float16"):
        if wide and all(_fits(tensor.chunks(1 << 16), narrow) for tensor in wide):  # mostly ends with the first block
            what = f"the float32 weights are exactly {narrow}: half of their bytes say nothing"
            yield Advice("info", what, case.section or "weights", case.op("cast", repr(narrow)))
            return


def _fits(chunks: Iterable[tuple[int, Any]], name: str) -> bool:
    import torch

    narrow = to_torch(DTYPES[name])
    return all(torch.equal(chunk.to(narrow).to(chunk.dtype), chunk) for _, chunk in chunks)


def _is_mask(name: str, shape: tuple[int, ...]) -> bool:
    """Whether it is a square of a causal mask, [1, 1, n, n], under one of the names that attention gives it."""
    return len(shape) > 2 and shape[-1] == shape[-2] > 1 and set(shape[:-2]) == {1} and name.endswith(("bias", "mask"))
