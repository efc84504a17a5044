"""Runs a notebook in a kernel of its own, and tells at the end what each took: measured, not judged."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[2]
_MEASURED: dict[str, str] = {}
# VmHWM, not ru_maxrss: that one is inherited from the process that started the kernel
_PEAK = """
import json, re
from pathlib import Path
print(json.dumps({"facts": {%s}, "peak_mb": int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) * 1.024e-3}))
"""


@dataclass
class Run:
    """The executed cells, what the last one told, and the folder it ran in."""

    cells: list[Any]
    facts: dict[str, Any]
    peak_mb: float
    folder: Path

    def outputs(self, start: str) -> list[Any]:
        """What the one cell whose source holds `start` put out."""
        (cell,) = [c for c in self.cells if c.cell_type == "code" and start in c.source]
        return list(cell.outputs)

    def complaints(self) -> list[Any]:
        """Errors, and whatever was said on stderr."""
        said = [
            (o.output_type, o.get("name"), o.get("text") or o.get("evalue")) for c in self.cells if c.cell_type == "code" for o in c.outputs
        ]
        return [entry for entry in said if entry[0] == "error" or entry[1] == "stderr"]


@pytest.fixture(scope="session")
def run_notebook(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Run]:
    """`(name, facts)` runs that notebook; `facts` are entries of a dict, evaluated in its kernel at the end."""

    def run(name: str, facts: str) -> Run:
        folder = tmp_path_factory.mktemp(Path(name).stem)
        shutil.copy(ROOT / "notebooks" / name, folder)
        book = nbformat.read(folder / name, as_version=4)
        book.cells.append(nbformat.v4.new_code_cell(_PEAK % facts))
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH", "")) if p)}
        env |= {"IPYTHONDIR": str(folder / "ipython"), "JUPYTER_CONFIG_DIR": str(folder / "jupyter")}
        started = time.perf_counter()
        NotebookClient(book, timeout=300, resources={"metadata": {"path": str(folder)}}).execute(env=env)
        seconds = time.perf_counter() - started
        *cells, last = book.cells
        told = json.loads("".join(o.text for o in last.outputs))
        _MEASURED[f"notebooks/{name}"] = f"{seconds:.0f} s, {told['peak_mb']:.0f} MB at most"
        return Run(cells, told["facts"], told["peak_mb"], folder)

    return run


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for name, text in _MEASURED.items():
        terminalreporter.write_line(f"{name}: {text}")
