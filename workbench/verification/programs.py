"""Stored programs: TorchScript and `.pt2` files are code, and run only under the trust rule.

A program runs when this process wrote just these bytes, or when the caller says `trust=True` and `workbench.scan` finds nothing dangerous
in it. A `.pt2` whose weights or constants are pickles never runs: torch unpickles those without any check. What is run is what was
looked at: the bytes are read once, hashed, and loaded from memory.

Source: torch 2.13 torch/export/pt2_archive/_package.py (use_pickle), torch/jit/_serialization.py.
"""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from typing import TYPE_CHECKING

from workbench.analyses.scanner import scan
from workbench.errors import UnknownFormatError, UnsupportedError, UntrustedError
from workbench.files import Span, file_ref
from workbench.opening import open as open_checkpoint

if TYPE_CHECKING:
    import torch

_PROGRAMS = ("torchscript", "torch-export")
_WRITTEN: set[str] = set()  # SHA-256 of programs that this process wrote
_HINT = "pass trust=True if you know who made it; it is scanned first"


def remember(digest: str) -> None:
    """Let the program with this SHA-256 run: this process wrote it."""
    _WRITTEN.add(digest)


def holds_program(path: str | os.PathLike[str]) -> bool:
    """Whether the file is TorchScript or a `.pt2`, and so may run under the rule."""
    try:
        return open_checkpoint(path).format in _PROGRAMS
    except UnknownFormatError:
        return False


def load_program(path: str | os.PathLike[str], *, trust: bool = False, layers: bool = False) -> torch.nn.Module:
    """A TorchScript or `.pt2` file as something to call, under the trust rule.

    Args:
        trust: run it although this process did not write it, once a scan finds nothing dangerous.
        layers: give a `.pt2` the submodules of the model it was made from, instead of one flat graph.
    Returns:
        A ScriptModule, or the module of an ExportedProgram, on the CPU and as it was saved.
    Raises:
        UntrustedError: the rule forbids it. UnsupportedError: it is no program, or torch cannot load it.
    Cost: the file is held in memory while it is loaded.
    """
    import torch

    file = file_ref(path)
    data = Span(file, 0, file.size).read()
    form = open_checkpoint(path).format
    if form not in _PROGRAMS:
        raise UnsupportedError(f"the file is {form} and holds no program", path=str(path), hint="load weights with workbench.load_into")
    digest = hashlib.sha256(data).hexdigest()
    if digest not in _WRITTEN:
        _require_trust(path, trust)
    module: torch.nn.Module
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that torch.jit is deprecated, and how a .pt2 was traced, is not the caller's to mend
            if form == "torchscript":
                module = torch.jit.load(io.BytesIO(data), map_location="cpu")  # type: ignore[no-untyped-call]
            else:
                program = torch.export.load(io.BytesIO(data))
                module = torch.export.unflatten(program) if layers else program.module()
        return module
    except Exception as error:  # torch's readers raise whatever an operator or a schema raises
        first = next(iter(str(error).splitlines()), "")
        raise UnsupportedError(f"torch cannot load the program: {type(error).__name__}: {first}", path=str(path)) from error


def _require_trust(path: str | os.PathLike[str], trust: bool) -> None:
    if not trust:
        raise UntrustedError("a program that this process did not write is not run", path=str(path), hint=_HINT)
    report = scan(path)
    if not report:
        raise UntrustedError(
            f"the scan finds danger, and it is not run: {report.headline}", path=str(path), hint="read workbench.scan(path)"
        )
    pickled = [
        seen.place.record for seen in report.pickles if "/data/weights/" in seen.place.record or "/data/constants/" in seen.place.record
    ]
    if pickled:
        told = f"torch would unpickle {pickled[0]} without any check, so the program is not run even when trusted"
        raise UntrustedError(told, path=str(path), hint="have it saved again by a newer torch, or export the model anew")
