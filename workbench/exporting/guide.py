"""The format guide: which file to make for which use, why, and what is lost. Two tables of facts; the advice is read off them.

Sources: torch 2.13 documentation (saving, torch.export, the deprecation of torch.jit, ExecuTorch), ONNX Runtime's documentation (ORT
format, execution providers), safetensors' README.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from workbench.report import Report
from workbench.tables import Column, Table, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class FileKind:
    """One kind of file. `make`: the line that makes it; `lost`: what is not in it."""

    name: str
    make: str
    use: str
    needs_class: bool
    needs_python: bool
    other_hardware: bool
    lazy: bool
    safe: bool
    lost: str


KINDS = (
    FileKind("training checkpoint (.pt)", "torch.save({'epoch': …, 'model_state_dict': …, 'optimizer_state_dict': …}, path)",
             "resume training", True, True, False, True, False, "the code: class and optimizer are built again first"),
    FileKind("state dict (.safetensors)", "wb.save(model, 'model.safetensors')",
             "share weights, load them anywhere", True, True, False, True, True, "the architecture, the optimizer; ties are kept as names"),
    FileKind("state dict (.pt)", "wb.save(model, 'model.pt')",
             "keep weights within PyTorch", True, True, False, True, False, "the architecture, the optimizer"),
    FileKind("torch.export (.pt2)", "wb.export_model(model, x, to='pt2', path='model.pt2')",
             "run in PyTorch without the class; AOTInductor, ExecuTorch", False, True, True, True, False, "Python's control flow, training, sizes that were not asked to be free"),
    FileKind("ONNX (.onnx)", "wb.export_model(model, x, path='model.onnx')",
             "run without Python and PyTorch: ONNX Runtime, TensorRT, OpenVINO, browsers", False, False, True, True, True, "training, the optimizer, Python's control flow"),
    FileKind("TorchScript (.pt)", "wb.export_model(model, x, to='torchscript', path='model.torchscript.pt')",
             "LibTorch in C++ where it is in place already", False, False, False, True, False, "a future: torch.jit is deprecated"),
    FileKind("ExecuTorch (.pte)", "executorch.exir.to_edge(torch.export.load('model.pt2')).to_executorch()",
             "phones and small devices", False, False, True, False, True, "operators without a portable kernel; training"),
    FileKind("ORT format (.ort)", "python -m onnxruntime.tools.convert_onnx_models_to_ort model.onnx",
             "phones with ONNX Runtime Mobile", False, False, True, False, True, "other runtimes than ONNX Runtime; training"),
)  # fmt: skip

# question, the option of `advise`, what is made of a yes, and why; the first yes decides
_QUESTIONS = (
    ("Will training go on from it?", "resume", 0, "only a training checkpoint holds the optimizer, the schedule and the epoch"),
    ("Does it run on a phone or small device?", "mobile", 6, "torch's own mobile runtime is retired; ExecuTorch takes a .pt2, ONNX Runtime Mobile an .ort"),
    ("Must it run without Python?", "no_python", 4, "ONNX runs in C, C++, C#, Java and browsers; nothing of PyTorch is needed there"),
    ("Is other hardware or another runtime meant?", "other_hardware", 4, "TensorRT, OpenVINO, CoreML's and most NPUs' tools read ONNX"),
    ("Will strangers open it?", "strangers", 1, "it is safe by construction: there is nothing in it that could run"),
    ("Is the model's class missing where it is loaded?", "no_class", 3, "an exported program brings its own graph"),
)  # fmt: skip
_BESIDE = {0: 1, 6: 4, 4: 1, 3: 1}  # what to keep as well


@dataclass(frozen=True, repr=False)
class FormatAdvice(Report):
    """What to make, why, what is lost, and what to keep beside it; `tables()` compare all kinds, `plot()` draws the questions."""

    kind: FileKind
    why: str
    beside: FileKind | None
    answers: tuple[tuple[str, bool], ...]

    @property
    def headline(self) -> str:
        extra = f" Beside it: {self.beside.name}." if self.beside else ""
        return f"Choose {self.kind.name}: {self.why}. Lost: {self.kind.lost}.{extra}"

    def tables(self) -> tuple[Table, ...]:
        made = [kind for kind in (self.kind, self.beside) if kind]
        mark = {True: "yes", False: "no"}
        rows = [
            (k.name, k.use, mark[k.needs_class], mark[k.needs_python], mark[k.other_hardware], mark[k.lazy], mark[k.safe], k.lost)
            for k in KINDS
        ]
        return (
            table("make", [Column("file", "text"), Column("line", "code")], [(kind.name, kind.make) for kind in made]),
            table("all kinds", [Column(title, "text") for title in _TITLES], rows),
        )

    def plot(self) -> Figure:
        """The questions from top to bottom, the answers given, and where each yes leads."""
        from workbench.render import plots

        steps = [(question, KINDS[kind].name) for question, _, kind, _ in _QUESTIONS]
        return plots.flowchart(steps, [yes for _, yes in self.answers], KINDS[1].name, self.headline.partition(":")[0])


_TITLES = ("file", "for", "needs the class", "needs Python", "other hardware", "opens lazily", "safe to open", "lost")


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
        Advice by the first of these that is true, in this order; weights in safetensors where none is.
    """
    given = {
        "resume": resume, "mobile": mobile, "no_python": no_python, "other_hardware": other_hardware, "strangers": strangers, "no_class": no_class,
    }  # fmt: skip
    answers = tuple((question, given[option]) for question, option, _, _ in _QUESTIONS)
    for _, option, kind, why in _QUESTIONS:
        if given[option]:
            beside = _BESIDE.get(kind)
            return FormatAdvice(KINDS[kind], why, None if beside is None else KINDS[beside], answers)
    return FormatAdvice(KINDS[1], "weights that load anywhere, lazily and safely, are what outlives code", KINDS[4], answers)
