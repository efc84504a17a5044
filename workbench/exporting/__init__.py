"""Exporting: from a live model to a file that another runtime runs, proved before it is put in place.

    report = workbench.export_model(model, batch, path="model.onnx")                      checked, run, compared
    workbench.export_model(model, batch, path="m.onnx", dynamic_axes={"x": {0: "batch"}}) also proved at another batch size
    report["onnx"].log                                                                    what the exporter had to say

`targets` is the door and its table of targets; one file per target (`onnx_export`, with `onnx_file` for what is done to the file itself);
`advice` turns an exporter's complaint into cause and cure. The next target is one file and one line in `targets`.
"""

from workbench.exporting.report import Exported, ExportReport
from workbench.exporting.targets import export_model

__all__ = ["ExportReport", "Exported", "export_model"]
