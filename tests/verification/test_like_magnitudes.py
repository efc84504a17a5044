"""The noise floor holds among values of like magnitude: what stands beside them, however large, excuses nothing."""

import copy
import sys

import pytest
import torch
from torch import nn

from workbench.verification.comparison import parity
from workbench.verification.layers import first_divergence
from workbench.verification.measures import spread

LOWEST = torch.finfo(torch.float32).min


class Head(nn.Module):
    """Logits of which some are ruled out, boxes beside scores, or one item far larger than the others; wrong by a factor."""

    def __init__(self, kind, fill=-1e9):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.kind, self.fill, self.wrong = nn.Linear(8, 5), kind, fill, 1.0

    def forward(self, x, keep):
        y = self.fc(x)
        if self.kind == "boxes":
            return torch.cat([y[:, :4] * 640, y[:, 4:].sigmoid() * self.wrong], 1)
        if self.kind == "item":
            return torch.cat([y[:1], y[1:] * self.wrong])
        y = y * self.wrong
        return y + ~keep * self.fill if self.kind == "added" else y.masked_fill(~keep, self.fill)


def inputs(kind, items=4):
    made = torch.Generator().manual_seed(3)
    x = torch.randn(items, 8, generator=made)
    if kind == "item":
        x[0] *= 1e6
    return x, torch.rand(items, 5, generator=made) > 0.3


@pytest.mark.parametrize(
    ("kind", "fill", "wrong"),
    [("filled", -1e9, 1e-4), ("filled", LOWEST, 1e-4), ("added", -1e9, 1e-4), ("boxes", 0.0, 1e-4), ("item", 0.0, 1e-2)],
)
@pytest.mark.parametrize("items", [4, 80])
def test_an_error_beside_far_larger_values_is_seen(kind, fill, wrong, items):
    model = Head(kind, fill)
    other, batch = copy.deepcopy(model), inputs(kind, items)
    assert parity(model, other, batch)
    other.wrong += wrong
    report = parity(model, other, batch)
    assert not report
    assert "in the values" in report.headline
    assert "says nothing of them" in report.outputs[0].reason
    assert parity(model, other, batch, atol=1.0, rtol=0.1)  # who asks for less gets it


def test_a_layer_beside_a_mask_is_at_fault():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.last = Head("filled"), nn.Softmax(-1)

        def forward(self, x, keep):
            return self.last(self.head(x, keep))

    model = Two()
    other = copy.deepcopy(model)
    other.head.wrong = 1.001
    assert first_divergence(model, other, inputs("filled")).first == "head"


class Mixed(nn.Module):
    """Outputs whose values lie many magnitudes apart although all come from the same sums: noise there is no error."""

    def __init__(self, kind, width):
        super().__init__()
        self.a, self.b, self.norm, self.kind = nn.Linear(width, width), nn.Linear(width, width), nn.LayerNorm(width), kind
        self.scales = 10 ** (torch.rand(width) * 8 - 4)

    def forward(self, x):
        y = self.b(torch.relu(self.a(self.norm(x))))
        if self.kind == "columns":
            return y * self.scales.to(y)
        if self.kind == "cancelling":  # small values that are differences of large ones
            return torch.cat([y * 1e6, y * 1e6 - (y * 1e6).mean(-1, keepdim=True), (y * 1e6 + 1) - y * 1e6 - 1], -1)
        if self.kind == "saturated":
            return torch.cat([y * 1e5, torch.sigmoid(y * 10 - 15), torch.relu(y * 1e3)], -1)
        if self.kind == "one draw":  # a whole item is off by the same factor
            return y / y.mean(-1, keepdim=True)
        return y @ y.transpose(-1, -2) * 1e4 + torch.eye(y.shape[0], dtype=y.dtype) * 1e7


@pytest.mark.parametrize("kind", ["columns", "cancelling", "saturated", "one draw", "products"])
def test_a_correct_variant_is_never_failed_for_its_small_values(kind):
    for seed in range(6):
        torch.manual_seed(seed)
        model = Mixed(kind, 4 + 5 * seed).eval()
        wide = copy.deepcopy(model).double()
        batch = torch.randn(1 + 6 * seed, 4 + 5 * seed) * 10 ** (torch.rand(1 + 6 * seed, 1) * 4 - 2)
        assert (report := parity(model, lambda x, wide=wide: wide(x.double()).float(), batch)), f"{seed}: {report}"


@pytest.mark.parametrize("shape", [(), (7,), (0, 3), (4, 5), (3, 700, 700), (5000, 2)])
def test_a_spread_is_what_numpy_finds_group_by_group(shape):
    a = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 1e3
    b = a + torch.randn(shape, generator=torch.Generator().manual_seed(2))
    if a.ndim and a.numel():
        a.view(-1)[3], b.view(-1)[5] = float("inf"), float("nan")
    found = spread(a, b)
    x, far = a.double().numpy(), (b.double() - a.double()).abs().numpy()
    known = a.isfinite().numpy() & b.isfinite().numpy()
    assert int(found.count[0]) == known.sum() == int(found.count[found.binades].sum())
    assert float(found.far[0]) == max([*far[known].ravel(), 0.0])
    assert float(found.scale[0]) == max([*abs(x[known]).ravel(), 0.0])
    assert [places.stop - places.start for places in found.axes] == [length if length <= 4096 else 0 for length in shape]
    for axis, places in enumerate(found.axes):
        for index in range(0, places.stop - places.start, 97):
            taken = (slice(None),) * axis + (index,)
            assert float(found.far[places][index]) == max([*far[taken][known[taken]].ravel(), 0.0])


def test_zeros_and_the_smallest_doubles_have_a_binade():
    x = torch.tensor([0.0, sys.float_info.min, 1.0, -1e9, sys.float_info.max], dtype=torch.float64)
    assert [int(i) - 256 for i in spread(x, x).count[1:513].nonzero()] == [-256, 0, 29, 255]
