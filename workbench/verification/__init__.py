"""Verification: does one thing answer as another does, and what does each variant cost?

    workbench.parity(model, "model.onnx", batch)                 every output, over two calls, within measured rounding
    workbench.parity(model, other, [batch1, batch2], rtol=1e-5)  several batches, a tolerance of your own beside it
    workbench.compare({"fp32": model, "onnx": "m.onnx"}, data)   size, accuracy, latency and parity in one table

`runners` makes anything callable on a batch, `values` names outputs by path, `measures` holds the arithmetic, `tolerance` gives the
limit its reason. The next kind of runner is one class in `runners`. Nothing here loads a program from a file.
"""
