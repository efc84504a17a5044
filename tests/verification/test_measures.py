"""The figures against numpy's own arithmetic, and the edges: NaN, infinity, whole numbers, zero."""

import math

import numpy as np
import pytest
import torch

from workbench.verification.measures import Meter, Sample, class_axis, ulp_distance


def figures(a, b, **options):
    meter = Meter(**options)
    meter.add(a, b)
    return meter.figures()


def test_figures_agree_with_numpy():
    torch.manual_seed(1)
    a = torch.randn(40, 10)
    b = a + 1e-3 * torch.randn(40, 10)
    f = figures(a, b)
    x, y = a.numpy().astype(np.float64), b.numpy().astype(np.float64)
    d = np.abs(y - x)
    assert f.max_abs == pytest.approx(d.max(), rel=1e-12)
    assert f.mean_abs == pytest.approx(d.mean(), rel=1e-12)
    assert f.relative == pytest.approx(np.linalg.norm(y - x) / np.linalg.norm(x), rel=1e-9)
    assert f.cosine == pytest.approx((x * y).sum() / np.linalg.norm(x) / np.linalg.norm(y), rel=1e-9)
    assert f.snr_db == pytest.approx(20 * math.log10(np.linalg.norm(x) / np.linalg.norm(y - x)), rel=1e-9)
    assert f.top1 == (x.argmax(1) == y.argmax(1)).mean()
    i, j = np.unravel_index(d.argmax(), d.shape)
    assert f.worst.startswith(f"[{i}, {j}]: ")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_ulp_is_the_number_of_steps_numpy_takes(dtype):
    one = torch.tensor([1.0, -1.0, 0.0], dtype=dtype).numpy()
    moved = one.copy()
    for _ in range(5):
        moved = np.nextafter(moved, np.array(np.inf, dtype=moved.dtype))
    assert ulp_distance(torch.from_numpy(one), torch.from_numpy(moved)) == 5


def test_ulp_across_zero_and_across_the_whole_line():
    tiny = torch.tensor([torch.finfo(torch.float32).smallest_normal / 2**23])
    assert ulp_distance(tiny, -tiny) == 2
    assert ulp_distance(torch.tensor([0.0]), torch.tensor([-0.0])) == 0
    far = torch.tensor([torch.finfo(torch.float64).max], dtype=torch.float64)
    assert ulp_distance(far, -far) == 2 * 0x7FEFFFFFFFFFFFFF


def test_nan_and_infinity_agree_only_with_their_like():
    nan, inf = math.nan, math.inf
    f = figures(torch.tensor([nan, inf, 1.0, 2.0]), torch.tensor([nan, inf, 1.0, nan]))
    assert (f.both_nan, f.one_sided, f.unequal, f.max_abs) == (1, 1, 1, 0.0)
    assert figures(torch.tensor([inf]), torch.tensor([-inf])).one_sided == 1


def test_the_worst_place_is_right_when_values_before_it_are_nan():
    a = torch.tensor([[math.nan, 0.0], [0.0, 0.0]])
    b = torch.tensor([[math.nan, 0.0], [0.0, 3.0]])
    assert figures(a, b).worst == "[1, 1]: 3 against 0"


def test_whole_numbers_are_told_apart_beyond_two_to_the_53():
    a = torch.tensor([2**60, 5])
    assert figures(a, a + torch.tensor([1, 0])).unequal == 1
    assert figures(a, a).unequal == 0


def test_complex_values_are_compared_by_their_parts():
    a = torch.tensor([1 + 1j, 2 + 2j])
    f = figures(a, a + torch.tensor([0, 0.5j]))
    assert f.max_abs == 0.5
    assert f.worst.startswith("[1]")


def test_zero_reference_has_no_ratio():
    f = figures(torch.zeros(3), torch.ones(3))
    assert (f.relative, f.cosine, f.snr_db, f.scale, f.max_abs) == (None, None, None, 0.0, 1.0)


def test_blocks_add_up(monkeypatch):
    torch.manual_seed(2)
    a, b = torch.randn(1000), torch.randn(1000)
    whole = figures(a, b, rtol=0.1, atol=0.0)
    monkeypatch.setattr("workbench.verification.measures._BLOCK", 7)
    parts = figures(a, b, rtol=0.1, atol=0.0)
    assert (parts.max_abs, parts.beyond, parts.worst, parts.max_ulp) == (whole.max_abs, whole.beyond, whole.worst, whole.max_ulp)
    assert parts.mean_abs == pytest.approx(whole.mean_abs)


def test_beyond_counts_what_torch_isclose_rejects():
    torch.manual_seed(3)
    a = torch.randn(500)
    b = a + 1e-4 * torch.randn(500)
    expected = (~torch.isclose(b.double(), a.double(), rtol=1e-4, atol=1e-5)).sum()
    assert 0 < expected < 500
    assert figures(a, b, rtol=1e-4, atol=1e-5).beyond == expected


@pytest.mark.parametrize(
    ("shape", "axis"), [((4, 3), 1), ((4, 7, 3), 2), ((4, 3, 8, 8), 1), ((4, 1), None), ((4,), None), ((), None), ((0, 3), None)]
)
def test_class_axis(shape, axis):
    assert class_axis(torch.zeros(shape)) == axis
    assert class_axis(torch.zeros(shape, dtype=torch.long)) is None


def test_sample_is_bounded_deterministic_and_keeps_the_worst():
    samples = [Sample(100), Sample(100)]
    for sample in samples:
        for part in range(50):
            x = torch.arange(1000, dtype=torch.float64)
            y = x.clone()
            y[777] += 1000 if part == 13 else 0
            sample.add(x, y, 777)
    assert samples[0].pairs.shape[1] <= 100
    assert torch.equal(samples[0].pairs, samples[1].pairs)
    assert float((samples[0].pairs[1] - samples[0].pairs[0]).max()) == 1000
