"""Models: what needs a live nn.Module; transfer learning is `transfer`.

wb.models.freeze(model, "*"); wb.models.unfreeze(model, "head.*")       by glob over parameter names
optimizer = AdamW(wb.models.param_groups(model, 1e-3, layer_decay=0.75))
print(wb.models.parameter_table(model, optimizer))                      what trains, at which rate, and what was forgotten
"""

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
    "BatchNormReport", "ParameterReport", "Unfreezing", "carry_optimizer", "features", "freeze", "frozen_batchnorm", "keep_batchnorm",
    "param_groups", "parameter_table", "save_delta", "unfreeze", "with_delta",
]  # fmt: skip
