"""Compression with the truth told: what a scheme costs each tensor, the best plan for a budget, what it comes to, and why it did not shrink.

wb.compression.sensitivity(ckpt).plot()                                 from the file alone, or sensitivity(model, inputs) by its outputs
plan = wb.compression.plan_compression(ckpt, budget_mb=25)              then wb.ops.quantize(ckpt, plan=plan.schemes)
print(wb.compression.explain_size("before.pt", "after.pt"))             a cause and its cure a line
"""

from workbench.compression.planning import Choice, CompressionPlan, FrontierReport, frontier, plan_compression
from workbench.compression.sensitivity import Sensitivity, SensitivityReport, sensitivity
from workbench.compression.shrinkage import Cause, ShrinkageReport, explain_size
from workbench.compression.truth import Prediction, Truth, TruthReport, measure, predict

__all__ = [
    "Cause", "Choice", "CompressionPlan", "FrontierReport", "Prediction", "Sensitivity", "SensitivityReport", "ShrinkageReport", "Truth",
    "TruthReport", "explain_size", "frontier", "measure", "plan_compression", "predict", "sensitivity",
]  # fmt: skip
