"""Verification: does one thing answer as another does, and what does each variant cost?

    workbench.parity(model, "model.onnx", batch)                 every output, over two calls, within measured rounding
    workbench.parity(model, "m.onnx", batch, mask="attention_mask", vary=True)         padded places aside; other values and sizes
    workbench.verification.first_divergence(model, "m.onnx", batch)                    the first layer past its own rounding
    workbench.compare({"fp32": model, "onnx": "m.onnx"}, data)   size, accuracy, latency and parity in one table

`runners` makes anything callable on a batch, `values` names outputs by path, `measures` holds the arithmetic, `tolerance` gives the
limit its reason, `causes` finds why a comparison fails, `layers` where. Stored programs run under the rule of `programs`. The next kind of
runner is one class in `runners`.
"""

from workbench.verification.comparison import ParityReport, parity
from workbench.verification.layers import LayersReport, first_divergence
from workbench.verification.variants import CompareReport, compare

__all__ = ["CompareReport", "LayersReport", "ParityReport", "compare", "first_divergence", "parity"]
