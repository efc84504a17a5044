"""Checkpoint Workbench: open, compare, repair, shrink, export and prove PyTorch checkpoints.

    import workbench as wb
    ckpt = wb.open("epoch_12.ckpt")            # listed, not loaded; nothing in the file is executed
    wb.load_into(model, ckpt).check()          # loaded with a certificate
    wb.save(wb.ops.quantize(ckpt), "small.pt")

Three promises: nothing in a file is ever executed; nothing is silently wrong; memory stays under its budget.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_FACE = {
    "open": "workbench.opening:open",
    "save": "workbench.formats:save",
    "scan": "workbench.analyses.scanner:scan",
    "checkup": "workbench.analyses.checkup:checkup",
    "describe": "workbench.analyses.description:describe",
    "archive": "workbench.analyses.archive:archive",
    "stats": "workbench.analyses.statistics:stats",
    "ledger": "workbench.analyses.sizes:ledger",
    "sparsity": "workbench.analyses.sparsity:sparsity",
    "diff": "workbench.differ:diff",
    "match": "workbench.keymap.inference:match",
    "load_into": "workbench.keymap.loading:load_into",
    "load_model": "workbench.keymap.loading:load_model",
    "compare": "workbench.verification.variants:compare",
    "parity": "workbench.verification.comparison:parity",
    "export_model": "workbench.exporting:export_model",
    "InferenceEngine": "workbench.exporting:InferenceEngine",
    "Checkpoint": "workbench.checkpoint:Checkpoint",
}
_ROOMS = ("ops", "models", "compression", "verification", "exporting", "errors", "widgets")

__all__ = [
    "Checkpoint",
    "InferenceEngine",
    "archive",
    "checkup",
    "compare",
    "compression",
    "describe",
    "diff",
    "errors",
    "export_model",
    "exporting",
    "ledger",
    "load_into",
    "load_model",
    "match",
    "models",
    "open",
    "ops",
    "parity",
    "save",
    "scan",
    "sparsity",
    "stats",
    "verification",
    "widgets",
]

if TYPE_CHECKING:
    from workbench import compression, errors, exporting, models, ops, verification, widgets
    from workbench.analyses.archive import archive
    from workbench.analyses.checkup import checkup
    from workbench.analyses.description import describe
    from workbench.analyses.scanner import scan
    from workbench.analyses.sizes import ledger
    from workbench.analyses.sparsity import sparsity
    from workbench.analyses.statistics import stats
    from workbench.checkpoint import Checkpoint
    from workbench.differ import diff
    from workbench.exporting import InferenceEngine, export_model
    from workbench.formats import save
    from workbench.keymap.inference import match
    from workbench.keymap.loading import load_into, load_model
    from workbench.opening import open
    from workbench.verification.comparison import parity
    from workbench.verification.variants import compare


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"workbench.{name}")
    if name not in _FACE:
        raise AttributeError(f"module 'workbench' has no attribute {name!r}")
    module, _, attribute = _FACE[name].partition(":")
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
