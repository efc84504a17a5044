"""LoadCertificate: what a model holds after loading, tensor by tensor, and whether that is what the file holds.

Owns the report and the table of leftovers that harm nothing; loading.py gathers and proves what stands in it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple, Self

from workbench.checkpoint import Finding
from workbench.errors import ReportFailedError, visible
from workbench.keymap.maps import KeyMap
from workbench.report import Report
from workbench.tables import Column, Table, format_bytes, table

# what files hold and models may do without: the end of the name, how many axes it has where that matters, why, who says so
HARMLESS: tuple[tuple[str, int | None, str, str], ...] = (
    (r"num_batches_tracked", 0, "a counter of training steps; no output depends on it in eval mode", "torch.nn.BatchNorm*"),
    (r"n_averaged", 0, "how many models were averaged", "torch.optim.swa_utils.AveragedModel"),
    (r"position_ids", None, "0, 1, 2 …: the model counts itself", "transformers, _keys_to_ignore_on_load_unexpected of BERT, CLIP and others"),
    (r"token_type_ids", None, "zeros: the model makes them itself", "transformers, a buffer of BertEmbeddings"),
    (r"inv_freq|(cos|sin)_cached|freqs_cis", None, "rotary angles, computed from the config", "transformers, _keys_to_ignore_on_load_unexpected of Llama"),
    (r"attn\.(masked_)?bias", 4, "a causal mask, rebuilt by the model", "transformers, _keys_to_ignore_on_load_unexpected of GPT-2"),
    (r"attn\.masked_bias", 0, "what a causal mask writes", "transformers, _keys_to_ignore_on_load_unexpected of GPT-2"),
    (r"relative_position_index|relative_coords_table", None, "computed from the window's size", "timm, checkpoint_filter_fn of Swin"),
    (r"attn_mask", None, "a mask computed from the input's size", "timm, checkpoint_filter_fn of Swin"),
    (r"total_ops|total_params", 1, "counted by a profiler", "thop.profile registers them as buffers"),
)  # fmt: skip
_HARMLESS = tuple((re.compile(rf"(?:^|.*[._])(?:{end})"), ndim, f"{why} ({source})") for end, ndim, why, source in HARMLESS)


def harmless(name: str, shape: tuple[int, ...]) -> str | None:
    """Why a model may do without the file's tensor of this name, or None."""
    return next((why for end, ndim, why in _HARMLESS if end.fullmatch(name) and ndim in (None, len(shape))), None)


def by_module(chosen: Iterable[str], others: Iterable[str]) -> dict[str, list[str]]:
    """Names gathered under the highest modules that hold none of the others; a name whose module holds both stays alone."""
    mixed = {name[:cut] for name in others for cut in [0, *(i for i, c in enumerate(name) if c == ".")]}
    out: dict[str, list[str]] = defaultdict(list)
    for name in chosen:
        cuts = [0, *(i for i, c in enumerate(name) if c == "."), len(name)]
        out[next((name[:cut] for cut in cuts if name[:cut] not in mixed), name)].append(name)
    return dict(out)


_MARKS = {"loaded": "✓", "wrong": "⚠", "empty": "⚠", "set by the module": "~", "initial": "−"}


@dataclass(frozen=True)
class LoadedTensor:
    """One tensor of the model after loading.

    Attributes:
        source: its name in the file, several joined by " + ", or None where the file gave nothing.
        state: "loaded" (proven equal to the file's bytes, after the map and the cast), "wrong", "set by the module", "initial" or
            "empty" (on the meta device, without values).
        kind: "parameter", "buffer" or "object".
        tied_to: an earlier name of the same memory, which counts for both.
    """

    name: str
    source: str | None
    state: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    note: str = ""
    kind: str = "parameter"
    tied_to: str | None = None


class Unused(NamedTuple):
    """A tensor of the file that fills nothing, and why that is or is not fine."""

    name: str
    fine: bool
    reason: str


@dataclass(frozen=True, repr=False)
class LoadCertificate(Report):
    """What the model holds after loading, tensor by tensor. True when every value that was to be loaded is proven equal.

    Attributes:
        strict: whether nothing was allowed to be missing or left over.
        verdict: what the module's own load_state_dict(strict=True) says of the same names.
        mode: eval or train, and the layers that are live.
        findings: changes of dtype and device, ties, devices that do not exist; a danger makes the certificate false.
        model, source: the model's class and the file.
    """

    rows: tuple[LoadedTensor, ...]
    unused: tuple[Unused, ...]
    strict: bool
    keymap: KeyMap
    verdict: str
    mode: str
    findings: tuple[Finding, ...] = ()
    model: str = ""
    source: str = ""

    @property
    def ok(self) -> bool:
        states = {row.state for row in self.rows}
        return not states & {"wrong", "empty"} and bool(states & {"loaded", "set by the module"}) and not self._told("danger")

    def _told(self, *severities: str) -> list[str]:
        return [finding.message for finding in self.findings if finding.severity in severities]

    def named(self, state: str) -> list[str]:
        """The model's names in one state."""
        return [row.name for row in self.rows if row.state == state]

    @property
    def initial_modules(self) -> dict[str, list[str]]:
        """What stayed at initialisation: module -> its tensors; "" is the whole model."""
        return by_module(self.named("initial"), [row.name for row in self.rows if row.state != "initial"])

    @property
    def covered(self) -> dict[str, tuple[int, int]]:
        """How much of the model holds the file's values, and of how much: tensors, elements of parameters, bytes. Tied ones count once."""
        own = [row for row in self.rows if row.tied_to is None and row.kind != "object"]
        sizes = {"tensors": [1] * len(own), "parameters": [prod(row.shape) * (row.kind == "parameter") for row in own]}
        sizes["bytes"] = [row.nbytes for row in own]
        return {what: (sum(n for n, row in zip(ns, own, strict=True) if row.state == "loaded"), sum(ns)) for what, ns in sizes.items()}

    @property
    def coverage(self) -> float:
        """Fraction of the model's bytes that hold the file's values."""
        loaded, total = self.covered["bytes"]
        return loaded / total if total else 0.0

    def check(self, coverage: float = 0.0) -> Self:
        """Return self, or raise ReportFailedError: a value is not proven, or less than `coverage` of the bytes is the file's."""
        if self.coverage < coverage:
            raise ReportFailedError(f"{self.coverage:.1%} of the model's bytes are the file's, not {coverage:.1%}: {self.headline}")
        return super().check()

    @property
    def headline(self) -> str:
        count = {state: len(self.named(state)) for state in _MARKS}
        total, modules, fine = len(self.rows), list(self.initial_modules), sum(entry.fine for entry in self.unused)
        first = {state: self.named(state)[0] for state in _MARKS if count[state]}
        places = ", ".join(name or "the whole model" for name in modules[:3]) + ", …" * (len(modules) > 3)
        parts = [
            (True, f"{'All' if count['loaded'] == total else str(count['loaded']) + ' of'} {total} tensors hold the file's values"),
            (count["wrong"], f"{count['wrong']} not as in the file, first {first.get('wrong')}"),
            (count["empty"], f"{count['empty']} on the meta device without values, first {first.get('empty')}"),
            (count["set by the module"], f"{count['set by the module']} set by the module's own loading code"),
            (modules, f"{count['initial']} stayed at initialisation ({places})"),
            (self.unused, f"{len(self.unused)} names of the file unused" + f", {fine} of them harmless" * bool(fine)),
        ]
        return visible("; ".join([text for there, text in parts if there] + self._told("danger", "warning")))

    def tables(self) -> tuple[Table, ...]:
        shares = ", ".join(f"{n:,} of {total:,} {what}" for what, (n, total) in self.covered.items() if what != "bytes")
        facts = [("coverage", f"{shares}, {100 * self.coverage:.4g} % of {format_bytes(self.covered['bytes'][1])}")]
        facts += [("torch's strict load_state_dict", self.verdict), ("mode", self.mode), *((f.kind, f.message) for f in self.findings)]
        if self.keymap.section_reason:
            facts.append(("section of the file", f"{self.keymap.section or '(root)'}: {self.keymap.section_reason}"))
        tables = [table("certificate", (Column("what"), Column("value")), facts)]
        held, rows = {row.name: row for row in self.rows}, []
        for module, names in self.initial_modules.items():
            rows.append((module or "(all)", len(names), sum(prod(held[n].shape) for n in names), sum(held[n].nbytes for n in names)))
        if rows:
            columns = (Column("module", "name"), Column("tensors", "count"), Column("elements", "count"), Column("bytes", "bytes"))
            tables.append(table("stayed at initialisation", columns, rows))
        if self.unused:
            unused = [("✓" if u.fine else "⚠", u.name, u.reason) for u in sorted(self.unused, key=lambda u: u.fine)]
            tables.append(table("unused in the file", (Column("", "mark"), Column("file's name", "name"), Column("why")), unused))
        heads = (Column("", "mark"), Column("model's name", "name"), Column("file's name", "name"), Column("state"))
        sizes = (Column("shape", "shape"), Column("dtype"), Column("bytes", "bytes"), Column("note"))
        ordered = sorted(self.rows, key=lambda r: r.state == "loaded")
        shown = [(_MARKS[r.state], r.name, r.source, r.state, r.shape, r.dtype, r.nbytes, r.note or None) for r in ordered]
        return (*tables, table("tensors", (*heads, *sizes), shown))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LoadCertificate:
        """The certificate that `to_dict` wrote."""
        return cls(
            tuple(LoadedTensor(**{**row, "shape": tuple(row["shape"])}) for row in data["rows"]),
            tuple(Unused(*entry) for entry in data["unused"]),
            data["strict"], KeyMap.from_dict(data["keymap"]), data["verdict"], data["mode"],
            tuple(Finding(**finding) for finding in data["findings"]), data["model"], data["source"],
        )  # fmt: skip
