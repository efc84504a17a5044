"""Exporting: from a live model to a file that another runtime runs, proved before it is put in place.

    report = workbench.export_model(model, batch, to=("onnx", "pt2", "torchscript"), folder="out")    made, run, compared
    engine = workbench.InferenceEngine("out/model.onnx")                                              called like the model
    workbench.exporting.advise(no_python=True)                                                        which file, why, what is lost

`targets` is the door and its table of targets; one file per target (`onnx_export` with `onnx_file`, `torchscript`, `exported_program`);
`proving` is what all targets share, `wrappers` how an exporter calls a model, `advice` turns an exporter's complaint into cause and cure,
`evidence` asks torch.export which lines of the model stand against it and at which sizes it takes another way, `decisions` hears where a trace
loses a value of the inputs, `shapes` brings what is asked of axes to one spelling,
`engine` runs what was made, `optimizing` makes TorchScript faster, `guide` says which file to make. The next target is one file and one line in `targets`.
"""

from workbench.exporting.engine import InferenceEngine
from workbench.exporting.guide import FormatAdvice, advise
from workbench.exporting.optimizing import optimize_torchscript
from workbench.exporting.report import Exported, ExportReport
from workbench.exporting.targets import export_model

__all__ = ["ExportReport", "Exported", "FormatAdvice", "InferenceEngine", "advise", "export_model", "optimize_torchscript"]
