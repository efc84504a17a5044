"""The format guide: which file to make for which use, why, and what is lost. Two tables of facts, the kinds of file with the wishes that
each serves, and the wishes; the advice is read off them.

Sources: torch 2.13 documentation (saving, torch.export, the deprecation of torch.jit, ExecuTorch), ONNX Runtime's documentation (ORT
format, execution providers), safetensors' README.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from workbench.errors import SelectionError, visible
from workbench.report import Report
from workbench.tables import Column, Table, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class FileKind:
    """One kind of file. `make`: the line that makes it; `serves`: options of `advise`; `lazy`: opened without reading all; `lost`: what is not in it."""

    name: str
    make: str
    use: str
    serves: frozenset[str]
    lazy: bool
    lost: str


def _wishes(words: str) -> frozenset[str]:
    return frozenset(words.split())


_ANYWHERE = _wishes("no_python other_hardware strangers no_class mobile")

KINDS = (
    FileKind("training checkpoint (.pt)", "torch.save({'epoch': …, 'model_state_dict': …, 'optimizer_state_dict': …}, path)",
             "resume training", _wishes("resume"), True, "the code: class and optimizer are built again first"),
    FileKind("state dict (.safetensors)", "wb.save(model, 'model.safetensors')",
             "share weights, load them anywhere", _wishes("strangers"), True, "the architecture, the optimizer; ties are kept as names"),
    FileKind("state dict (.pt)", "wb.save(model, 'model.pt')",
             "keep weights within PyTorch", _wishes(""), True, "the architecture, the optimizer"),
    FileKind("torch.export (.pt2)", "wb.export_model(model, x, to='pt2', path='model.pt2')",
             "run in PyTorch without the class; AOTInductor, ExecuTorch", _wishes("other_hardware no_class"), True, "Python's control flow, training, sizes that were not asked to be free"),
    FileKind("ONNX (.onnx)", "wb.export_model(model, x, path='model.onnx')",
             "run without Python and PyTorch: ONNX Runtime, TensorRT, OpenVINO, browsers", _ANYWHERE, True, "training, the optimizer, Python's control flow"),
    FileKind("TorchScript (.pt)", "wb.export_model(model, x, to='torchscript', path='model.torchscript.pt')",
             "LibTorch in C++ where it is in place already", _wishes("no_python no_class"), True, "a future: torch.jit is deprecated"),
    FileKind("ExecuTorch (.pte)", "executorch.exir.to_edge(torch.export.load('model.pt2')).to_executorch()",
             "phones and small devices", _ANYWHERE, False, "operators without a portable kernel; training"),
    FileKind("ORT format (.ort)", "python -m onnxruntime.tools.convert_onnx_models_to_ort model.onnx",
             "phones with ONNX Runtime Mobile", _ANYWHERE, False, "other runtimes than ONNX Runtime; training"),
)  # fmt: skip

# question, the option of `advise`, the wish in words, the kind made for it, and why; earlier wishes weigh more
_QUESTIONS = (
    ("Will training go on from it?", "resume", "training goes on", 0, "only a training checkpoint holds the optimizer, the schedule and the epoch"),
    ("Does it run on a phone or small device?", "mobile", "phone", 6, "torch's own mobile runtime is retired; ExecuTorch takes a .pt2, ONNX Runtime Mobile an .ort"),
    ("Must it run without Python?", "no_python", "without Python", 4, "ONNX runs in C, C++, C#, Java and browsers; nothing of PyTorch is needed there"),
    ("Is other hardware or another runtime meant?", "other_hardware", "other hardware", 4, "TensorRT, OpenVINO, CoreML's and most NPUs' tools read ONNX"),
    ("Will strangers open it?", "strangers", "strangers", 1, "it is safe by construction: there is nothing in it that could run"),
    ("Is the model's class missing where it is loaded?", "no_class", "without the class", 3, "an exported program brings its own graph"),
)  # fmt: skip
_BESIDE = {0: 1, 6: 4, 4: 1, 3: 1}  # what to keep as well, where every wish is served


@dataclass(frozen=True, repr=False)
class FormatAdvice(Report):
    """What to make, why, what is lost, and what to keep beside it; `tables()` compare all kinds, `plot()` draws the questions.

    Attributes:
        missed: the wishes that no kind serves together with the weightier ones; `beside` is what serves them.
    """

    kind: FileKind
    why: str
    beside: FileKind | None
    answers: tuple[tuple[str, bool], ...]
    missed: tuple[str, ...] = ()

    @property
    def headline(self) -> str:
        extra = f" Beside it: {self.beside.name}." if self.beside else ""
        if self.beside and self.missed:
            extra = f" It does not serve: {', '.join(self.missed)}. Make as well what does: {self.beside.name}."
        return f"Choose {self.kind.name}: {self.why}. Lost: {self.kind.lost}.{extra}"

    def tables(self) -> tuple[Table, ...]:
        made = [kind for kind in (self.kind, self.beside) if kind]
        rows = [
            (k.name, k.use, *("yes" if option in k.serves else "no" for _, option, *_ in _QUESTIONS), "yes" if k.lazy else "no", k.lost)
            for k in KINDS
        ]
        titles = ("file", "for", *(wish for _, _, wish, *_ in _QUESTIONS), "opens lazily", "lost")
        return (
            table("make", [Column("file", "text"), Column("line", "code")], [(kind.name, kind.make) for kind in made]),
            table("all kinds", [Column(title, "text") for title in titles], rows),
        )

    def plot(self) -> Figure:
        """The questions from top to bottom with the answers given, the kind made for each alone, and the one for all answers."""
        from workbench.render import plots

        steps = [(question, KINDS[kind].name) for question, _, _, kind, _ in _QUESTIONS]
        made = " and ".join(kind.name for kind in (self.kind, self.beside if self.missed else None) if kind)
        return plots.flowchart(steps, [yes for _, yes in self.answers], made, self.headline.partition(":")[0])


def advise(
    *,
    resume: bool = False,
    mobile: bool = False,
    no_python: bool = False,
    other_hardware: bool = False,
    strangers: bool = False,
    no_class: bool = False,
) -> FormatAdvice:
    """Which file to make.

    Args:
        resume: training will go on from it. mobile: it runs on a phone or small device. no_python: there is no Python where it runs.
        other_hardware: another runtime or accelerator than PyTorch's runs it. strangers: people who do not know you open it.
        no_class: the model's class is not at hand where it is loaded.
    Returns:
        The kind that serves all of these that are true; where none does, the one for the earliest, and beside it what serves the others.
        Weights in safetensors where none is true.
    Raises:
        SelectionError: an answer that is neither True nor False.
    """
    given = {
        "resume": resume, "mobile": mobile, "no_python": no_python, "other_hardware": other_hardware, "strangers": strangers, "no_class": no_class,
    }  # fmt: skip
    for option, yes in given.items():
        if not isinstance(yes, bool):
            raise SelectionError(f"{option} is {visible(repr(yes)[:60])}, and the question is one of yes or no", hint="give True or False")
    answers = tuple((question, given[option]) for question, option, *_ in _QUESTIONS)
    asked = [option for _, option, *_ in _QUESTIONS if given[option]]
    if not asked:
        return FormatAdvice(KINDS[1], "weights that load anywhere, lazily and safely, are what outlives code", KINDS[4], answers)
    kind = _best(asked)
    reasons = [why for _, option, _, number, why in _QUESTIONS if given[option] and KINDS[number] is kind]
    missed = [option for option in asked if option not in kind.serves]
    if len(asked) - len(missed) > len(reasons):
        named = [wish for _, option, wish, *_ in _QUESTIONS if given[option] and option in kind.serves]
        reasons.append(f"it serves all of this: {', '.join(named)}")
    number = _BESIDE.get(KINDS.index(kind))
    beside = _best(missed) if missed else None if number is None else KINDS[number]
    words = tuple(wish for _, option, wish, *_ in _QUESTIONS if option in missed)
    return FormatAdvice(kind, "; ".join(reasons), beside, answers, words)


def _best(asked: list[str]) -> FileKind:
    """The kind that serves the most of what is asked, the earliest weighing most; among equals one that is made for a wish."""
    made_for = [KINDS[kind] for _, option, _, kind, _ in _QUESTIONS if option in asked]
    return min([*made_for, *KINDS], key=lambda kind: [option not in kind.serves for option in asked])
