"""The Netron view: a model's graph in the page, drawn by the installed netron, or told in plain tables where no server has it.

The page asks its Jupyter server for `wb-netron/` (see netron_server). Where that answers, netron's own page opens in the frame and is
handed the bytes in `shown`; where it does not (VS Code, Colab, Voila by itself), the summary stands there. Nothing is executed, and
nothing is asked of any other host.
"""

from __future__ import annotations

import os
from typing import Any, ClassVar

import traitlets as t

from workbench.errors import SelectionError, UnsupportedError, visible
from workbench.files import FileRef, Span
from workbench.opening import open as open_checkpoint
from workbench.render import html
from workbench.tables import format_bytes
from workbench.widgets.base import STYLES, View, finding_dicts, script, table_dict
from workbench.widgets.netron_report import shown_of, summarize

_MAX_DOWNLOAD = 512_000_000  # bytes that cross from the kernel to the page in one message
_SUFFIXES = {"onnx": ".onnx", "safetensors": ".safetensors", "gguf": ".gguf", "npy": ".npy", "npz": ".npz", "torch-export": ".pt2"}


class NetronView(View):
    """See the graph of a model file.

    Args:
        source: the path of one file (.onnx, .pt2, TorchScript, .pt, .safetensors, .gguf, …), or a Checkpoint opened from one.

    Reads back: `summary`, the same in tables; `checkpoint`, its tensors; `shown`, the bytes that Netron is given.

    Raises:
        SelectionError: it is no single file. FormatError: as `wb.open`.
    Cost: the graph; values are not read, and of an ONNX file none is sent. Another file is sent whole, up to 8 MB.
    """

    _esm = script("grid.js", "frame.js", "netron_page.js", "netron.js")
    _css = STYLES + script("netron.css")
    commands: ClassVar[dict[str, str]] = {**View.commands, "download": "_download"}

    shown = t.Bytes(b"").tag(sync=True)

    def __init__(self, source: Any) -> None:
        self.checkpoint = open_checkpoint(source)
        file = self.checkpoint.source
        if not isinstance(file, FileRef):
            raise SelectionError("Netron shows one file", hint="give the path of an .onnx, .pt2, .pt, .safetensors or .gguf file")
        self._file = file
        given = shown_of(self.checkpoint, file)
        self.summary = summarize(self.checkpoint, given)
        super().__init__(self._page_report(given.note, bool(given.data)), {"pane": "graph"})
        self.shown = given.data
        facts = [["format", self.checkpoint.format], ["size", format_bytes(file.size)], ["tensors", f"{len(self.checkpoint):,}"]]
        facts += [["nodes", f"{self.summary.nodes:,}"]] if self.summary.nodes else []
        button = {"label": f"download · {format_bytes(file.size)}", "command": "download"}
        self.detail = {"heading": visible(file.name), "note": given.note, "facts": facts, "actions": [button]}
        address = os.fspath(source) if isinstance(source, (str, os.PathLike)) else file.url
        self._line = f"NetronView({address!r})"
        self._did(self._line)

    def _page_report(self, note: str, is_shown: bool) -> dict[str, Any]:
        name = visible(self._file.name)
        suffix = _SUFFIXES.get(self.checkpoint.format, ".pt")
        return {
            "view": "netron",
            "title": {"name": name, "parts": [self.checkpoint.format, *self.summary.headline.split("; ")]},
            "findings": finding_dicts(self.checkpoint.findings),
            "rail": [{"id": "graph", "label": "Graph", "count": None}, {"id": "summary", "label": "Summary", "count": None}],
            "file": name if "." in name else name + suffix,
            "refused": "" if is_shown else note,
            "tables": [table_dict(table) for table in self.summary.tables()],
        }

    @t.observe("state")
    def _show_pane(self, change: Any) -> None:
        if change["old"] and change["new"].get("pane") != change["old"].get("pane"):
            self._did(self._line + (".summary" if change["new"].get("pane") == "summary" else ""))

    def _download(self) -> None:
        """Hand the file itself to the page, unchanged."""
        if self._file.size > _MAX_DOWNLOAD:
            most = format_bytes(_MAX_DOWNLOAD)
            raise UnsupportedError(f"a download through the page ends at {most}", hint=f"copy {self._file.url} from the server")
        self.send({"download": self._file.name}, buffers=[Span(self._file, 0, self._file.size).read()])
        self._did(f"open({self._file.url!r}, 'rb').read()")

    def _static_html(self) -> str:
        return html.render_report(self.summary)
