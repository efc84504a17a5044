"""Evidence: what in a model torch.export cannot take, by its own account (`draft_export`): ranked, with the line and what to change there.

`draft_export` goes on where `export` stops, so it names every such place at once. One row of `_KINDS` per kind, the gravest first.

Source: torch 2.13 torch/export/_draft_export.py (FailureType, FailureReport).
"""

from __future__ import annotations

import linecache
import logging
import os
import re
import tempfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workbench.exporting.wrappers import flat

if TYPE_CHECKING:
    import torch

    from workbench.exporting.targets import Request
    from workbench.verification.values import Call


_SIZES = (*range(1, 257), *(size for power in range(9, 31) for size in (2**power - 1, 2**power, 2**power + 1)))  # what guards are asked at


@dataclass(frozen=True)
class Reason:
    """One thing in the model that stops an export.

    Attributes:
        kind: torch's own name of it.
        what: in words.
        where, code: `model.py:12 in forward` and the line that stands there, in the model and not in torch; "" where torch does not say.
        cure: what to change there.
        told: draft_export's own words.
    """

    kind: str
    what: str
    where: str
    code: str
    cure: str
    told: str


_KINDS = {
    "DATA_DEPENDENT_ERROR": (
        "it decides by the values of a tensor: {expr}",
        "Write the branch with `torch.where` or `torch.cond`; a fact that always holds is stated with `torch._check(…)` before this line.",
    ),
    "MISSING_FAKE_KERNEL": ("the operator {op} does not say which shape it returns", "Give it one with `torch.library.register_fake`."),
    "MISMATCHED_FAKE_KERNEL": ("the operator {op} does not return the shape it says: {reason}", "Mend its `torch.library.register_fake`."),
    "GUARD_ADDED": (
        "it holds only where {expr}",
        "Take the size from the tensor (`x.shape[0]`, `-1`) instead of a number there, or leave that axis fixed.",
    ),
}


def evidence(model: torch.nn.Module, call: Call, dynamic_shapes: Any = None) -> list[Reason] | None:
    """What torch.export finds wrong with a model, the gravest first; None where it cannot follow the model at all.

    Cost: an export.
    """
    import torch
    from torch._logging.structured import INTERN_TABLE

    call = call.fresh()
    try:
        with _trace_removed():
            program: Any = torch.export.draft_export(model, call.args, dict(call.kwargs), dynamic_shapes=dynamic_shapes)
    except Exception:  # every exporter failure means the same here: nothing is known
        return None
    failures = [one for one in program._report.failures if one.failure_type.name in _KINDS]
    asserted = [one for one in failures if one.failure_type.name == "GUARD_ADDED" and not one.data.get("symbol_to_sources")]
    files = {number: name for name, number in INTERN_TABLE.items()}  # the report names those alone that no earlier export had met
    found = [
        _reason(failure, files) for failure in failures if failure not in asserted
    ]  # what is asserted of a value is told by its decision
    return sorted(dict.fromkeys(found), key=lambda reason: [*_KINDS].index(reason.kind))


@contextmanager
def _trace_removed() -> Iterator[None]:
    """draft_export writes the model's lines to a log in the temporary folder, and leaves it there, open. Here it goes with the `with`."""
    from torch._logging._internal import DTRACE_ENV_VAR

    before = os.environ.get(DTRACE_ENV_VAR)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[DTRACE_ENV_VAR] = folder
        try:
            yield
        finally:
            os.environ.pop(DTRACE_ENV_VAR)
            os.environ.update({} if before is None else {DTRACE_ENV_VAR: before})
            for handler in [reference() for reference in logging._handlerList]:  # type: ignore[attr-defined]
                if getattr(handler, "root_dir", None) == folder:
                    handler.close()


def value_decisions(request: Request) -> list[Reason] | None:
    """Where the model decides by the values of a tensor; None where torch.export cannot follow it."""
    from workbench.verification.values import Call

    inputs = Call((*request.example.tensors().values(),))
    found = evidence(flat(request.model, request.example), inputs)
    return None if found is None else [reason for reason in found if reason.kind == "DATA_DEPENDENT_ERROR"]


def exported(request: Request, axes: Collection[tuple[int, int]]) -> Any:
    """The model by torch.export, those axes (which tensor in order, axis) at any size that its code takes; None where it cannot follow it."""
    import torch

    tensors = tuple(request.example.fresh().tensors().values())
    shapes = {"tensors": tuple({a: torch.export.Dim.AUTO for n, a in axes if n == number} for number in range(len(tensors)))}
    try:
        return torch.export.export(flat(request.model, request.example), tensors, dynamic_shapes=shapes)
    except Exception:  # every exporter failure means the same here: nothing is known
        return None


def free_axes(program: Any) -> dict[tuple[int, int], Any]:
    """{(which tensor in order, axis): its symbol} of the axes that an exported program takes at any size, as its placeholders say."""
    import torch

    users = [spec.arg.name for spec in program.graph_signature.input_specs if spec.kind.name == "USER_INPUT"]
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    tensors = [values[name] for name in users if isinstance(values.get(name), torch.Tensor)]
    sizes = {(n, axis): size for n, value in enumerate(tensors) for axis, size in enumerate(value.shape) if not isinstance(size, int)}
    return {place: size for place, size in sizes.items() if size.node.expr.free_symbols}  # a fixed 4 may be written as a symbol's value


def past_bounds(program: Any) -> Iterator[dict[tuple[int, int], int]]:
    """Sizes of the free axes at which the model's own code ends or takes another way: just past each bound, and the first to break a guard."""
    alike: dict[Any, list[tuple[int, int]]] = {}
    sizes = free_axes(program)
    for place, size in sizes.items():
        alike.setdefault(size.node.expr, []).append(place)
    hints = {size.node.expr: size.node.hint for size in sizes.values()}
    guards = [guard.expr for guard in next(iter(sizes.values())).node.shape_env.guards] if sizes else []
    for symbol, places in alike.items():
        held = program.range_constraints.get(symbol)
        bounds = ((held.lower, -1), (held.upper, 1)) if held is not None else ()
        found = [int(bound) + step for bound, step in bounds if getattr(bound, "is_Integer", False)]
        for guard in guards:
            ours = guard.subs({other: hint for other, hint in hints.items() if other != symbol})
            near = [int(number) + step for number in ours.atoms() if getattr(number, "is_Integer", False) for step in (-1, 0, 1)]
            sizes_asked = sorted({*_SIZES, *(size for size in near if size > 0)})
            found += [size for size in sizes_asked if _breaks(ours, symbol, size)][:1]
        yield from (dict.fromkeys(places, size) for size in found if size > 0)


def _breaks(guard: Any, symbol: Any, size: int) -> bool:
    """Whether a guard does not hold at a size; where it cannot be computed there (a division by zero), the model has no such size."""
    try:
        return bool(guard.subs(symbol, size) == False)  # noqa: E712 (sympy's own false)
    except ZeroDivisionError:
        return False


def _reason(failure: Any, files: dict[int, str]) -> Reason:
    kind, data = failure.failure_type.name, dict(failure.data)
    what, cure = _KINDS[kind]
    for symbol, source in (data.get("symbol_to_sources") or {}).items():
        data["expr"] = re.sub(rf"\b{symbol}\b", _axis(str(source)), str(data["expr"]))
    data["expr"] = re.sub(r"^Eq\((.+), (.+)\)$", r"\1 = \2", str(data.get("expr")))
    frames = [f for f in data.get("user_stack") or () if f["filename"] in files and in_the_model(files[f["filename"]])]
    where = code = ""
    if frames:
        file, line = files[frames[-1]["filename"]], frames[-1]["line"]
        where = line_of(file, line, frames[-1]["name"])
        code = str(frames[-1].get("loc") or linecache.getline(file, line).strip())
    return Reason(kind, what.format_map(data), where, code, cure, re.sub(r"\n\s*\n", "\n", failure.print(files)).strip())


def in_the_model(file: str) -> bool:
    """Whether a line of code is a model's, not torch's and not ours."""
    import torch

    return not file.startswith((os.path.dirname(torch.__file__), os.path.dirname(__file__)))


def line_of(file: str, line: int, function: str) -> str:
    """`model.py:12 in forward`."""
    typed = linecache.cache.get(file, (0, 0.0))  # what was typed in a cell is there without a time
    place = f"this notebook's cell, line {line}" if typed[1:2] == (None,) else f"{os.path.basename(file)}:{line}"
    return f"{place} in {function}"


def _axis(source: str) -> str:
    """`image.shape[2]` of torch's `L['image'].size()[2]`."""
    return re.sub(r"L\['(\w+)'\](.*?)\.size\(\)\[(\d+)\]", r"\1\2.shape[\3]", source)


def fixed_in_all(reasons: Iterable[Reason], refusals: Iterable[str]) -> list[Reason]:
    """The reasons, without guards on axes that not every refusal speaks of: another way to export passes that line."""
    named = [{_axis(source) for source in re.findall(r"You marked (\S+) as dynamic", text)} for text in refusals]
    axes = set.intersection(*named)
    return [one for one in reasons if not axes or one.kind != "GUARD_ADDED" or any(axis in one.what for axis in axes)]
