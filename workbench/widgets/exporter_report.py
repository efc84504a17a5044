"""What the exporter reads from its form and ships to the page: models and inputs on offer, inputs from a text, one row per target, the panel.

Plain functions; every text that is not the library's own is made visible here.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from workbench.errors import SelectionError, visible
from workbench.exporting import Exported, ExportReport, FormatAdvice
from workbench.exporting.guide import KINDS
from workbench.exporting.wrappers import input_names
from workbench.names import suggest
from workbench.report import Report
from workbench.tables import DASH, Column, Table, format_bytes, format_cell, format_seconds, table
from workbench.verification.comparison import ParityReport
from workbench.verification.values import Call, calls_from
from workbench.widgets.base import table_dict

if TYPE_CHECKING:
    import torch

Detail = dict[str, Any]

_NAMED = {"onnx": "ONNX (.onnx)", "torchscript": "TorchScript (.pt)", "pt2": "torch.export (.pt2)"}
TARGETS = {target: next(kind for kind in KINDS if kind.name == name) for target, name in _NAMED.items()}
ASKED, CANCELLED = "not made yet", "cancelled before it began"
_MARKS = {ASKED: "·", "waiting": "·", "exporting …": "▸"}
_MAX_OFFERED, _MAX_PARTS, _MAX_TEXT = 200, 16, 4000
_MAX_MADE = 2_000_000_000  # bytes of one input made from a shape
_MADE = re.compile(r"(?P<dtype>[a-z]+\d*)?\s*(?:\[(?P<sizes>[\d,\s]*)\]|(?P<by>\d+(?:\s*[x×]\s*\d+)*))\s*(?:<\s*(?P<below>\d+))?")
_SPELLED = "write a variable's name, 1x3x32x32, float32[1,3,32,32] or int64[2,16] < 100; several with commas between, name=… for a keyword"


# what is on offer


def offered(namespace: Mapping[str, Any]) -> dict[str, list[list[str]]]:
    """The public names that hold a model, and those that hold example inputs, each with what it is."""
    import torch

    public = [(name, value) for name, value in list(namespace.items()) if name.isidentifier() and not name.startswith("_")]
    models = [[name, of_model(value)] for name, value in public if isinstance(value, torch.nn.Module)]
    inputs = [[name, _of_inputs(value)] for name, value in public if _is_example(value)]
    return {"models": models[-_MAX_OFFERED:], "inputs": inputs[-_MAX_OFFERED:]}


def of_model(model: torch.nn.Module) -> str:
    """A model's class and the size of its parameters."""
    from torch.nn.parameter import is_lazy

    nbytes = sum(p.numel() * p.element_size() for p in model.parameters() if not is_lazy(p))
    return f"{visible(type(model).__name__)} · {format_bytes(nbytes)}"


def _is_example(value: Any) -> bool:
    """A tensor or array, a tuple with one in it, or a dict of keyword arguments with one in it and no text."""
    import torch

    if isinstance(value, (tuple, dict)) and len(value) > _MAX_PARTS:
        return False
    if isinstance(value, dict):
        named = all(isinstance(key, str) and key.isidentifier() for key in value)
        return named and any(map(_is_array, value.values())) and not any(isinstance(item, str) for item in value.values())
    return any(map(_is_array, value)) if isinstance(value, tuple) else _is_array(value) and not isinstance(value, torch.nn.Parameter)


def _is_array(value: Any) -> bool:
    return all(hasattr(type(value), name) for name in ("shape", "dtype", "__array__"))


def _of_inputs(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_of_inputs(item)}" for key, item in value.items())
    if isinstance(value, tuple):
        return "(" + ", ".join(map(_of_inputs, value)) + ")"
    if not _is_array(value):
        return visible(type(value).__name__)
    return f"{visible(value.dtype).removeprefix('torch.')} {format_cell('shape', value.shape)}"


# what was chosen


def model_of(text: str, namespace: Mapping[str, Any]) -> tuple[torch.nn.Module, str]:
    """The model of that name, or what `module:function` gives: that one is imported and called here. And the line that does the same.

    Raises:
        SelectionError: there is no such variable, module or function, or it gives no model.
    """
    import torch

    if ":" not in text:
        models = [name for name, value in namespace.items() if isinstance(value, torch.nn.Module)]
        if text not in models:
            if not text:
                raise SelectionError("no model is chosen", hint="choose one in the menu, or its last entry and write module:function")
            raise SelectionError(f"the notebook has no model {text!r}", hint=_close(text, models))
        return namespace[text], ""
    module, _, path = text.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
        is_made = callable(found) and not isinstance(found, torch.nn.Module)
        model = found() if is_made else found
    except Exception as error:  # a stranger's module and function: whatever they raise, there is no model
        raise SelectionError(
            f"{text} gives no model: {type(error).__name__}: {error}", hint="module:function, called without arguments"
        ) from error
    if not isinstance(model, torch.nn.Module):
        raise SelectionError(f"{text} gives a {type(model).__name__}, and a torch.nn.Module is expected")
    return model, f"import {module}; model = {module}.{path}{'()' if is_made else ''}"


@dataclass(frozen=True)
class Given:
    """Example inputs: the call, the lines that make it, and how it is written as arguments of `export_model` and `parity`."""

    call: Call
    lines: tuple[str, ...]
    arguments: str
    inputs: str


def inputs_of(text: str, namespace: Mapping[str, Any]) -> Given:
    """Example inputs from names of variables and shapes; made values are drawn from a normal distribution, or below the bound given.

    Raises:
        SelectionError: no such variable, or a text that is neither a name nor a shape.
    """
    if not text.strip():
        raise SelectionError("no example inputs are chosen", hint=f"choose them in the menu, or its last entry and {_SPELLED}")
    if text in namespace:
        value = namespace[text]
        (call,) = calls_from(value)
        return Given(call, (), f"(), {text}" if call.kwargs else text, text)
    args: list[tuple[Any, str]] = []
    kwargs: dict[str, tuple[Any, str]] = {}
    for number, part in enumerate(re.split(r",(?![^\[]*\])", text)):
        name, _, value = part.rpartition("=")
        one = _one_input(value.strip(), namespace, number)
        if name.strip():
            kwargs[name.strip()] = one
        else:
            args.append(one)
    (call,) = calls_from(Call(tuple(value for value, _ in args), {name: value for name, (value, _) in kwargs.items()}))
    sources = ", ".join(source for _, source in args)
    lines = [f"args = ({sources}{',' if len(args) == 1 else ''})"] if args else []
    if kwargs:
        lines.append("kwargs = {" + ", ".join(f"{name!r}: {source}" for name, (_, source) in kwargs.items()) + "}")
    both = f"{'args' if args else '()'}, kwargs"
    inputs = f"wb.verification.values.Call({both})" if args and kwargs else "kwargs" if kwargs else "args"
    return Given(call, tuple(lines), both if kwargs else "args", inputs)


def _one_input(text: str, namespace: Mapping[str, Any], seed: int) -> tuple[Any, str]:
    """A variable's value or a made tensor, and the Python that gives it."""
    import torch

    found = _MADE.fullmatch(text)
    if not found:
        if text in namespace:
            return namespace[text], text
        hint = _close(text, [name for name, value in namespace.items() if _is_example(value)]) if text.isidentifier() else None
        raise SelectionError(
            f"the notebook has no variable {text!r}" if text.isidentifier() else f"{text!r} is no input", hint=hint or _SPELLED
        )
    sizes = tuple(int(size) for size in re.findall(r"\d+", found["sizes"] if found["by"] is None else found["by"]))
    word, below = found["dtype"] or "float32", found["below"]
    dtype = getattr(torch, word, None)
    if not isinstance(dtype, torch.dtype):
        raise SelectionError(f"torch has no type {word!r}", hint=_SPELLED)
    nbytes = dtype.itemsize
    for size in sizes:
        nbytes *= size
    if nbytes > _MAX_MADE:
        raise SelectionError(f"{text} would be {format_bytes(nbytes)}", hint=f"an example of at most {format_bytes(_MAX_MADE)} is made")
    random = torch.Generator().manual_seed(seed)
    drawn = f"dtype={dtype}, generator=torch.Generator().manual_seed({seed}))"
    if dtype.is_floating_point or dtype.is_complex:
        if below:
            raise SelectionError(f"{text}: a bound belongs to whole numbers", hint=_SPELLED)
        return torch.randn(sizes, dtype=dtype, generator=random), f"torch.randn({sizes}, {drawn}"
    limit = 2 if dtype == torch.bool else int(below or 0)
    if not limit:
        raise SelectionError(f"{text}: whole numbers need a bound", hint=f"{word}[2,16] < 100 draws from 0 to 99, such as ids of words")
    return torch.randint(0, limit, sizes, dtype=dtype, generator=random), f"torch.randint(0, {limit}, {sizes}, {drawn}"


def batch_axes(model: torch.nn.Module, call: Call) -> dict[str, dict[int, str]]:
    """`dynamic_axes` that leave the first axis free wherever it has the first input's size."""
    asked: Any = SimpleNamespace(model=model, example=call, input_names=None)
    named = list(zip(input_names(asked), call.tensors().values(), strict=True))
    size = next((tensor.shape[0] for _, tensor in named if tensor.ndim), None)
    return {name: {0: "batch"} for name, tensor in named if tensor.ndim and tensor.shape[0] == size}


def _close(name: str, names: Sequence[str]) -> str | None:
    close = " or ".join(suggest(name, names)) or ", ".join(names[-5:])
    return f"there is {close}" if close else None


# what is shown


@dataclass(frozen=True, repr=False)
class Plan(Report):
    """What stands in a saved notebook before anything is exported."""

    model: str
    inputs: str
    targets: tuple[str, ...]

    @property
    def headline(self) -> str:
        return f"Nothing is exported yet: {visible(self.model) or 'no model'} on {visible(self.inputs) or 'no inputs'}."

    def tables(self) -> tuple[Table, ...]:
        rows = [(target, TARGETS[target].use, TARGETS[target].lost) for target in self.targets]
        return (table("targets", [Column("target"), Column("for"), Column("lost")], rows, empty="no target is chosen"),)


COLUMNS = [
    {"id": "target", "title": "target", "kind": "name", "width": "88px", "least": 88},
    {"id": "mark", "title": "", "kind": "mark", "width": "14px", "lead": True},
    {"id": "state", "title": "state", "kind": "text", "width": "minmax(0, 1fr)", "least": 116},
    {"id": "checked", "title": "checked", "kind": "mark", "width": "52px", "right": True, "drop": 3, "note": "the format's own checker"},
    {"id": "apart", "title": "max |Δ|", "kind": "text", "width": "76px", "right": True, "note": "largest difference from the model over every batch tried"},
    {"id": "size", "title": "size", "kind": "text", "width": "60px", "right": True, "drop": 1},
    {"id": "latency", "title": "latency", "kind": "text", "width": "58px", "right": True, "drop": 2, "note": "the fastest run on the example"},
    {"id": "seconds", "title": "took", "kind": "text", "width": "50px", "right": True, "drop": 2, "note": "exporting, checking and comparing"},
    {"id": "opset", "title": "opset", "kind": "text", "width": "40px", "right": True, "drop": 4},
]  # fmt: skip


def row_of(target: str, state: str, exported: Exported | None, compared: ParityReport | None) -> dict[str, str]:
    """One target: asked, under way, made or failed; and whether it differs on made inputs."""
    if exported is None:
        return {"target": target, "state": state, "mark": _MARKS.get(state, DASH)}
    checked = None if exported.checked is None else "✓" if exported.checked else "⚠"
    words = {
        "checked": format_cell("mark", checked), "apart": format_cell("number", _apart(exported)), "size": format_cell("bytes", exported.nbytes),
        "latency": format_cell("seconds", exported.latency.get("file")), "seconds": format_seconds(exported.seconds),
        "opset": format_cell("count", exported.opset),
    }  # fmt: skip
    is_ok = exported.ok and (compared is None or compared.ok)
    made = "made and proved" if is_ok else "made; it differs on made inputs"
    return {"target": target, "mark": "✓" if is_ok else "⚠", "state": made if exported.ok else visible(exported.cause), **words}


def _apart(exported: Exported) -> float | None:
    return None if exported.parity is None else exported.parity.max_abs


def overview(exported: ExportReport | None, found: str, model: str, inputs: str) -> Detail:
    """While no target is selected: what this answers and how it starts, or the finding."""
    if exported is not None:
        return {
            "heading": found,
            "note": exported.headline,
            "next": "Select a target for its numbers. This view's .exported is the report.",
        }
    detail: Detail = {
        "heading": "export",
        "note": "Makes every file that can be made, runs it, and compares its answers with the model's. What differs is not put in place.",
        "facts": [["model", visible(model) or DASH], ["inputs", visible(inputs) or DASH]],
    }
    if ":" in model:
        module, _, function = model.partition(":")
        call = f"Export imports {visible(module)} and calls {visible(function)}(): this runs that code, with your rights."
        return {**detail, "note": call, "locked": True}
    return detail


def finding(exported: ExportReport, unmade: Mapping[str, str]) -> str:
    """How many of the targets asked for were made, and what became of the rest; a tick where that is all."""
    made, cancelled = sum(one.ok for one in exported.exports), sum(said == CANCELLED for said in unmade.values())
    told = f"{made} of {len(exported.exports) + len(unmade)} made and proved" + (f", {cancelled} cancelled" if cancelled else "")
    return told if exported and unmade else f"{'✓' if exported else '⚠'} {told}"


def of_target(target: str, state: str, exported: Exported | None, compared: ParityReport | None, *, is_model: bool) -> Detail:
    """One target: what it is for; once it is exported, what was made and proved, or the cause and the cure."""
    kind = TARGETS[target]
    if exported is None:
        return {"heading": target, "note": state, "facts": [["for", kind.use], ["lost", kind.lost], ["made by", kind.make]]}
    opset = None if exported.opset is None else str(exported.opset)
    if exported.opset_asked is not None and opset is not None:
        opset += f", asked {exported.opset_asked}"
    facts: list[Sequence[str | None]] = [
        ["file", os.path.relpath(exported.path)], ["size", format_cell("bytes", exported.nbytes)], ["exporter", exported.made_by], ["opset", opset],
        *[["input", f"{name} {format_cell('shape', shape)}"] for name, shape in exported.inputs.items()],
        *[["output", f"{name} {format_cell('shape', shape)}"] for name, shape in exported.outputs.items()],
        ["tried on", ", ".join((*exported.tried, *exported.sizes))], ["max |Δ|", format_cell("number", _apart(exported))],
        ["latency", ", ".join(f"{who} {format_seconds(seconds)}" for who, seconds in exported.latency.items())],
        ["took", format_seconds(exported.seconds)], ["sha256", exported.sha256[:16] if exported.sha256 else None],
    ]  # fmt: skip
    shown = [[label, visible(value)] for label, value in facts if value and value != DASH]
    verbs = [["show graph", "graph"], *([["compare on made inputs", "compare"]] if is_model else [])] if exported.ok else []
    untold = [one for one in exported.reasons if not one.where or f"{one.where}: {one.code}" not in exported.cause]
    reasons = [f"{f'{one.where}, {one.code}: ' if one.where else ''}{one.what}. {one.cure}" for one in untold]
    remarks = [*reasons, *exported.notes, *([f"On made inputs: {compared.headline}"] if compared is not None else [])]
    own = exported.error or ("" if exported.ok else exported.log)
    return {
        "heading": f"{'✓' if exported.ok else '⚠'} {target}",
        "note": "The file answers as the model does." if exported.ok else visible(exported.cause),
        "next": "" if exported.ok else visible(exported.cure),
        "facts": shown,
        "verbs": verbs,
        "remarks": [visible(remark) for remark in remarks],
        "own": "\n".join(map(visible, own[:_MAX_TEXT].splitlines())),
    }


def of_advice(advice: FormatAdvice) -> Detail:
    """The file to make, why, and what is lost."""
    made = [advice.kind, advice.beside] if advice.beside else [advice.kind]
    facts = [
        *([["does not serve", ", ".join(advice.missed)]] if advice.missed else []),
        ["lost", advice.kind.lost],
        *([["beside it", advice.beside.name]] if advice.beside else []),
        *[["line", kind.make] for kind in made],
    ]
    target = next((name for name, kind in TARGETS.items() if kind is advice.kind), None)
    verbs = [[f"choose {target}", "choose"]] if target else []
    return {"heading": advice.kind.name, "note": advice.why, "facts": facts, "verbs": verbs}


def sections(exported: ExportReport | None, compared: Mapping[str, ParityReport]) -> dict[str, Any]:
    """The report as the page draws it, with the lines that run each file."""
    if exported is None:
        return {}
    tables = [table_dict(one) for one in exported.tables()]
    for target, report in compared.items():
        for one in report.tables():
            shown = table_dict(one)
            tables.append({**shown, "title": f"{target} on made inputs: {shown['title']}"})
    usage = [[one.target, one.usage] for one in exported.exports if one.usage]
    return {"tables": tables, "usage": usage}
