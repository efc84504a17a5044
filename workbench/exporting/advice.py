"""Advice: an exporter's complaint as a cause and a cure in plain words.

One table, first match wins; a new complaint is one row. The exporter's own text stays in the report beside it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from workbench.errors import visible


@dataclass(frozen=True)
class Advice:
    """Why an export failed, what to change, and whether tracing would only hide it."""

    cause: str
    cure: str
    tracing_hides_it: bool = False


_ROWS: tuple[tuple[str, str, str, bool], ...] = (
    (
        r"Could not guard on data-dependent|GuardOnDataDependentSymNode|DataDependentOutputException|data-dependent control flow|Dynamic control flow is not supported",
        "the model chooses a branch or a size by the values of a tensor, and a graph has one path only",
        "Write the branch with `torch.where` or `torch.cond`, or move it out of the model.",
        True,
    ),
    (
        r"No ONNX function found for <OpOverload\(op='([^']+)'",
        "the operator {0} has no ONNX translation",
        "Pass `custom_translation_table={{torch.ops.<namespace>.<name>.default: an onnxscript function}}`, or register a symbolic for the "
        "classic exporter (`torch.onnx.register_custom_op_symbolic`).",
        False,
    ),
    (
        r"Exporting the operator '([^']+)'.*not supported",
        "the operator {0} has no ONNX translation at this opset",
        "Ask for a newer opset, or replace the operator.",
        False,
    ),
    (
        r"Can't serialize TreeSpec of namedtuple class <class '([^']+)'>",
        "a .pt2 file cannot name the class {0}, which the model takes or returns",
        "Call `torch.utils._pytree._register_namedtuple({0}, serialized_type_name='{0}')` first, or use a tuple or a dict in its place.",
        False,
    ),
    (
        r"is not a known type|Only tuples, lists and Variables are supported|unsupported output type|Unsupported output type",
        "the model takes or returns an object that is no tensor",
        "Wrap the model so that it takes tensors and returns a tuple of tensors; for a transformer, switch its cache off.",
        False,
    ),
    (
        r"conflicts? between user-specified ranges and inferred ranges|expected.*dynamic.*but.*size (?:0|1)",
        "an axis asked to be dynamic has a size of 1 or 0 in the example, or is pinned by the model's own code",
        "Give an example with two items or more along that axis: torch.export takes a size of 1 or 0 as fixed.",
        False,
    ),
    (
        r"Constraints violated|specialized it to be a constant|marked .* as dynamic",
        "an axis asked to be dynamic is fixed by the model's own code",
        "Leave that axis fixed, or remove what pins it (a reshape to a constant, an index).",
        False,
    ),
    (r"Unsupported onnx_opset_version", "no exporter writes that opset", "Leave `opset_version` out, or choose 18 to 20.", False),
    (
        r"out of memory|MemoryError|Cannot allocate",
        "there was not enough memory",
        "Export a smaller batch, or close other models first.",
        False,
    ),
)


def advise(error: BaseException) -> Advice:
    """Cause and cure for what an exporter raised."""
    text = chain_text(error)
    for pattern, cause, cure, hides in _ROWS:
        found = re.search(pattern, text, re.DOTALL)
        if found:
            groups = [visible(group) for group in found.groups()]
            return Advice(cause.format(*groups), cure.format(*groups), hides)
    innermost = error
    while innermost.__cause__ is not None:
        innermost = innermost.__cause__
    first = next((line.strip() for line in str(innermost).splitlines() if line.strip()), "")
    cure = "Read the report's `error` and `log`; a wrapper that takes tensors and returns a tuple of tensors rescues many models."
    return Advice(f"the exporter stopped with {type(innermost).__name__}: {first}", cure)


def chain_text(error: BaseException) -> str:
    """The texts of an exception and of all that caused it, without terminal colours."""
    texts, seen = [], set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        texts.append(f"{type(current).__name__}: {current}")
        current = current.__cause__ or current.__context__
    return re.sub(r"\x1b\[[0-9;]*m", "", "\ncaused by ".join(texts))
