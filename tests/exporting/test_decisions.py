"""What a trace cannot keep is heard where it leaves the tensors, warned of or not; what is the same at every call is not held against it."""

import threading
import warnings

import pytest
import torch
from torch import nn

from workbench.exporting import export_model

pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning"), pytest.mark.filterwarnings("ignore::FutureWarning")]


class Equal(nn.Module):
    def forward(self, x, **options):
        return x + 100 if torch.equal(x, torch.zeros_like(x)) else x * 2


class Close(nn.Module):
    def forward(self, x, **options):
        return x + 100 if torch.allclose(x, torch.full_like(x, 7)) else x * 2


class Silenced(nn.Module):
    def forward(self, x, **options):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return x.clamp(-50, 50) if x.abs().max() > 5e7 else x * 2


class Number(nn.Module):
    """torch.export sees no decision in it, and a trace has the number in it all the same."""

    def forward(self, x, **options):
        return x + (x.abs() > 1e9).sum().item()


class Array(nn.Module):
    def forward(self, x, **options):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return x * 2 if x.detach().numpy().max() < 1e9 else x


class Size(nn.Module):
    def forward(self, x, **options):
        return x * 2 if x[x > 1e9].numel() == 0 else x


class Thread(nn.Module):
    def forward(self, x, **options):
        taken = []
        other = threading.Thread(target=lambda: taken.append(bool(x.abs().max() > 5e7)))
        other.start()
        other.join()
        return x * 3 if taken[0] else x * 2


@pytest.mark.parametrize("model", [Equal(), Close(), Silenced(), Number(), Array(), Size(), Thread()], ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("target", [{"to": "onnx", "exporter": "classic"}, {"to": "torchscript", "exporter": "trace"}], ids=["onnx", "ts"])
def test_a_value_that_leaves_the_tensors_is_refused(model, target, tmp_path):
    (one,) = export_model(model, torch.randn(4, 8), folder=tmp_path, **target).exports
    assert not one.ok
    assert "tracing" in one.cause
    assert one.reasons
    assert "test_decisions.py" in one.error or isinstance(model, Thread)
    assert list(tmp_path.iterdir()) == []


def test_a_decision_that_dynamo_cannot_take_is_no_case_for_tracing(tmp_path):
    one = export_model(Equal(), torch.randn(4, 8), folder=tmp_path)["onnx"]
    assert not one.ok
    assert "by the values of a tensor" in one.cause


def branching(x):
    return x * 2 if bool(x.sum() > 0) else x * 3


class Constant(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("gain", torch.ones(3))

    def forward(self, x, **options):
        return x * 2 if self.gain.sum() > 1 else x


class Shaped(nn.Module):
    def forward(self, x, **options):
        return x + 1 if torch.zeros_like(x).sum() == 0 and x.shape[0] > 2 else x


class Kept(nn.Module):
    """The tracer keeps a size that torch itself reads from a tensor."""

    def forward(self, x, **options):
        return x[: (x > 1e9).sum() + 2] * torch.ones((x > 1e9).sum() + 2, 1)


class Hybrid(nn.Module):
    def __init__(self):
        super().__init__()
        self.scripted = torch.jit.script(branching)

    def forward(self, x, **options):
        return self.scripted(x) + 1


@pytest.mark.parametrize("model", [Constant, Shaped, Kept, Hybrid])
def test_what_is_the_same_at_every_call_or_kept_in_the_graph_is_no_decision(model, tmp_path):
    one = export_model(model(), torch.randn(4, 8), to="torchscript", exporter="trace", folder=tmp_path)["torchscript"]
    assert one.ok, one.cause


class Packed(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.LSTM(3, 4, batch_first=True)

    def forward(self, x, n):
        packed = nn.utils.rnn.pack_padded_sequence(x, n, batch_first=True, enforce_sorted=False)
        return nn.utils.rnn.pad_packed_sequence(self.cell(packed)[0], batch_first=True)[0]


def test_a_length_that_no_exchange_of_the_example_changes_is_tried_too(tmp_path):
    one = export_model(Packed(), (torch.randn(3, 6, 3), torch.tensor([6, 4, 2])), folder=tmp_path, exporter="classic")["onnx"]
    assert not one.ok
