"""Usage: the lines that load an exported file where it will run, in Python and, for TorchScript, in C++ against LibTorch."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from workbench.exporting.report import Exported

_PYTHON = {
    "onnx": "import numpy\nimport onnxruntime\nsession = onnxruntime.InferenceSession({path})\noutputs = session.run(None, {{{feeds}}})",
    "torchscript": "import torch\nprogram = torch.jit.load({path})\noutputs = program({names})",
    "pt2": "import torch\nprogram = torch.export.load({path}).module()\noutputs = program({names})",
}
_CPP = """#include <torch/script.h>
#include <iostream>

int main() {{
  torch::InferenceMode guard;
  torch::jit::Module program = torch::jit::load({path});
  std::vector<torch::jit::IValue> inputs{{{inputs}}};
  torch::jit::IValue output = program.forward(inputs);
  if (output.isTensor()) std::cout << output.toTensor() << std::endl;
  else std::cout << output << std::endl;
}}
"""
_KINDS = {  # LibTorch's names of what is not float32
    "float64": "kDouble", "float16": "kHalf", "bfloat16": "kBFloat16", "int64": "kLong", "int32": "kInt", "int16": "kShort", "int8": "kChar",
    "uint8": "kByte", "bool": "kBool", "complex64": "kComplexFloat", "complex128": "kComplexDouble",
}  # fmt: skip


def python_lines(exported: Exported) -> str:
    """Lines of Python, without the workbench, that load the file and call it."""
    names = list(exported.inputs)
    calls = [name if name.isidentifier() else f"x{i}" for i, name in enumerate(names)]
    feeds = ", ".join(f"{json.dumps(name)}: numpy.asarray({call})" for name, call in zip(names, calls, strict=True))
    return _PYTHON[exported.target.partition(":")[0]].format(path=json.dumps(exported.path), feeds=feeds, names=", ".join(calls))


def cpp_program(exported: Exported) -> str:
    """A whole C++ program that loads a TorchScript file with LibTorch, calls it with ones and prints what it answers; "" for other targets.

    Build it with CMake's `find_package(Torch)`, or `g++ -std=c++17` with the include and library folders of `torch.utils.cpp_extension`.
    """
    if exported.target != "torchscript":
        return ""
    shapes = [[size if isinstance(size, int) else 2 for size in shape] for shape in exported.inputs.values()]  # a free axis takes any size
    kinds = [f", torch::{_KINDS[dtype]}" if dtype in _KINDS else "" for dtype in exported.dtypes]
    ones = zip((", ".join(map(str, shape)) for shape in shapes), kinds, strict=True)
    inputs = ", ".join(f"torch::ones({{{shape}}}{kind})" for shape, kind in ones)
    return _CPP.format(path=json.dumps(exported.path), inputs=inputs)
