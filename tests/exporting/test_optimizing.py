"""TorchScript made faster, against torch's own answers."""

import pytest
import torch
from torch import nn

from workbench.errors import SelectionError
from workbench.exporting import optimize_torchscript

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Coder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x)

    @torch.jit.export
    def encode(self, x):
        return self.layer(x) * 2


def test_a_frozen_file_is_told_and_still_answers_alike(tmp_path):
    model, x, path = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU()).eval(), torch.randn(2, 1, 8, 8), tmp_path / "m.pt"
    torch.jit.save(torch.jit.freeze(torch.jit.trace(model, x)), path)
    for _ in range(2):  # the second time on what the first has made
        report = optimize_torchscript(path, path, x, trust=True, rounds=2).check()
        assert "frozen already" in report.note
    assert torch.allclose(torch.jit.load(path)(x), model(x), atol=1e-6)


def test_methods_that_freezing_drops_are_told(tmp_path):
    torch.jit.save(torch.jit.script(Coder().eval()), tmp_path / "coder.pt")
    report = optimize_torchscript(tmp_path / "coder.pt", tmp_path / "fast.pt", torch.randn(2, 4), trust=True, rounds=2).check()
    assert hasattr(torch.jit.load(tmp_path / "fast.pt"), "encode") == ("encode" not in report.note)


def test_rounds_are_a_whole_number(tmp_path):
    with pytest.raises(SelectionError, match="rounds is '3'"):
        optimize_torchscript(tmp_path / "m.pt", tmp_path / "fast.pt", torch.ones(1), rounds="3")
