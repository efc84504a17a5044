"""Models: what needs a live nn.Module; transfer learning is `transfer`, int8 and less `quantization`, fewer weights `pruning`.

wb.models.freeze(model, "*"); wb.models.unfreeze(model, "head.*")       by glob over parameter names
optimizer = AdamW(wb.models.param_groups(model, 1e-3, layer_decay=0.75))
print(wb.models.parameter_table(model, optimizer))                      what trains, at which rate, and what was forgotten
print(wb.models.prune(model, 0.5))                                      half of each layer's smallest weights to zero
small = wb.models.quantize(model, example=x); small.model                int8, with bytes and error measured
"""

from workbench.models.pruning import PruneReport, finish_pruning, prune, prune_steps, sparsity_schedule
from workbench.models.quantization import quantize
from workbench.models.quantization_report import QuantizationReport
from workbench.models.slimming import SlimReport, load_slim, save_slim, slim
from workbench.models.transfer import (
    BatchNormReport,
    ParameterReport,
    Unfreezing,
    carry_optimizer,
    features,
    freeze,
    frozen_batchnorm,
    keep_batchnorm,
    param_groups,
    parameter_table,
    save_delta,
    unfreeze,
    with_delta,
)  # fmt: skip

__all__ = [
    "BatchNormReport", "ParameterReport", "PruneReport", "QuantizationReport", "SlimReport", "Unfreezing", "carry_optimizer", "features", "finish_pruning",
    "freeze", "frozen_batchnorm", "keep_batchnorm", "load_slim", "param_groups", "parameter_table", "prune", "prune_steps", "quantize", "save_delta",
    "save_slim", "slim", "sparsity_schedule", "unfreeze", "with_delta",
]  # fmt: skip
