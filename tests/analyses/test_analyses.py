"""Statistics against torch and numpy; the ledger against the file's own size; diff by example."""

import math
import os
from fractions import Fraction

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import workbench as wb
from workbench.errors import SelectionError


@pytest.fixture
def file(tmp_path):
    base = torch.randn(1000, 8, generator=torch.Generator().manual_seed(1))
    torch.save(
        {
            "model": {"w": base, "tied": base, "row": base[5], "half": base.half()},
            "optimizer": {"state": {0: {"exp_avg": base.clone()}}, "param_groups": []},
            "view": torch.zeros(5000)[:10],
        },
        tmp_path / "f.pt",
    )
    return tmp_path / "f.pt"


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.uint8, torch.bool],
    ids=str,
)
def test_statistics_are_those_of_numpy(dtype):
    values = (torch.randn(5000, generator=torch.Generator().manual_seed(2)) * 3).to(dtype)
    row = wb.stats({"x": values}).rows[0]
    exact = values.double().numpy()
    assert (row.count, row.min, row.max, row.zeros) == (5000, exact.min(), exact.max(), int((exact == 0).sum()))
    assert row.mean == pytest.approx(exact.mean(), abs=1e-12)
    assert row.std == pytest.approx(exact.std(), rel=1e-10)
    counts, _ = np.histogram(exact, bins=np.array(row.edges))
    assert list(row.counts) == counts.tolist()


@pytest.mark.parametrize("values", [[1e16, 1.0, -1e16, 1.0], [1e8 + i for i in range(4)], [3.0], [5e-324, 0.0]], ids=str)
def test_the_mean_and_spread_survive_cancellation(values):
    row = wb.stats({"x": torch.tensor(values, dtype=torch.float64)}).rows[0]
    exact = sum(map(Fraction, values)) / len(values)
    spread = math.sqrt(sum((Fraction(v) - exact) ** 2 for v in values) / len(values))
    assert row.mean == pytest.approx(float(exact), rel=1e-12, abs=1.0 if max(values) > 1e15 else 1e-300)
    assert row.std == pytest.approx(spread, rel=1e-9, abs=1e-300)


def test_nan_and_infinities_are_counted_and_left_out_of_the_numbers():
    report = wb.stats({"x": torch.tensor([1.0, float("nan"), float("inf"), -float("inf"), 3.0]), "all": torch.full((3,), float("nan"))})
    first, second = report.rows
    assert not report
    assert (first.nan, first.inf, first.min, first.max, first.mean) == (1, 2, 1, 3, 2)
    assert (second.nan, second.min, second.mean) == (3, None, None)


def test_the_largest_finite_values_make_a_histogram():
    big = torch.tensor([-1.7e308, 0.0, 1.7e308], dtype=torch.float64)
    row = wb.stats({"x": big}).rows[0]
    assert (row.min, row.max) == (-1.7e308, 1.7e308)
    assert sum(row.counts) == 3


def test_empty_and_scalar_tensors_have_rows():
    rows = wb.stats({"e": torch.empty(0, 3), "s": torch.tensor(2.5)}).rows
    assert (rows[0].count, rows[0].min) == (0, None)
    assert (rows[1].count, rows[1].mean, rows[1].std) == (1, 2.5, 0)


def test_a_selection_that_matches_nothing_is_refused():
    with pytest.raises(SelectionError):
        wb.stats({"x": torch.ones(1)}, names="y*")


def test_statistics_do_not_depend_on_memory_order():
    base = torch.randn(700, 900, generator=torch.Generator().manual_seed(3))
    rows = wb.stats({"a": base, "b": base.t(), "c": base.t().contiguous()}).rows
    assert (rows[1].min, rows[1].max, rows[1].counts) == (rows[2].min, rows[2].max, rows[2].counts)
    assert rows[0].mean == pytest.approx(rows[1].mean, rel=1e-9, abs=1e-15)


# ledger


def test_the_ledger_adds_up_to_the_file_exactly(file):
    report = wb.ledger(wb.open(file))
    assert sum(row.nbytes for row in report.rows) == report.total == os.path.getsize(file)


def test_the_ledger_of_safetensors_adds_up_too(tmp_path):
    save_file({"a": torch.ones(100), "b": torch.ones(3, 3, dtype=torch.bfloat16)}, tmp_path / "l.safetensors")
    report = wb.ledger(tmp_path / "l.safetensors")
    assert sum(row.nbytes for row in report.rows) == os.path.getsize(tmp_path / "l.safetensors")
    assert report


def test_storage_that_no_tensor_shows_is_waste(file):
    report = wb.ledger(wb.open(file))
    assert not report
    assert sum(row.nbytes for row in report.rows if row.waste) == (5000 - 10) * 4


def test_the_ledger_tells_weights_from_optimizer(file):
    kinds = {row.what: row.nbytes for row in wb.ledger(wb.open(file)).rows}
    assert kinds["optimizer state"] == 1000 * 8 * 4


# diff


def test_each_kind_of_difference_has_its_status():
    a = {"same": torch.ones(3), "changed": torch.ones(3), "reshaped": torch.ones(3), "retyped": torch.ones(3), "removed": torch.arange(7.0)}
    b = {
        "same": torch.ones(3),
        "changed": torch.tensor([1.0, 1.0, 2.0]),
        "reshaped": torch.ones(4),
        "retyped": torch.ones(3).half(),
        "added": torch.zeros(2, 2),
    }
    report = wb.diff(a, b)
    assert {row.name: row.status for row in report.rows} == {
        "same": "equal",
        "changed": "changed",
        "reshaped": "reshaped",
        "retyped": "retyped",
        "removed": "removed",
        "added": "added",
    }
    assert not report
    changed = next(row for row in report.rows if row.name == "changed")
    assert (changed.max_abs, changed.l2, changed.changed) == (1.0, 1.0, pytest.approx(1 / 3))
    assert changed.mean_abs == pytest.approx(1 / 3)
    assert changed.relative == pytest.approx(1 / math.sqrt(3))
    assert changed.cosine == pytest.approx(4 / math.sqrt(3 * 6))


@pytest.mark.parametrize(("rtol", "atol", "equal"), [(0, 0, False), (0, 0.01, True), (0.01, 0, True), (0.0001, 0, False)])
def test_tolerances_are_those_of_allclose(rtol, atol, equal):
    a, b = torch.tensor([1.0, -2.0]), torch.tensor([1.005, -2.005])
    assert bool(wb.diff({"x": a}, {"x": b}, rtol=rtol, atol=atol)) is equal is torch.allclose(b, a, rtol=rtol, atol=atol)


@pytest.mark.parametrize(
    ("x", "y", "equal"),
    [("nan", "nan", True), ("nan", "1", False), ("inf", "inf", True), ("inf", "-inf", False), ("1", "inf", False), ("0", "-0", True)],
)
def test_values_that_are_not_finite_differ_only_where_they_do(x, y, equal):
    report = wb.diff({"x": torch.tensor([float(x), 2.0])}, {"x": torch.tensor([float(y), 2.0])}, atol=1e9 if "nan" in (x, y) else 0)
    assert bool(report) is equal


def test_a_wrapper_prefix_is_a_rename_and_hides_no_change():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)).state_dict()
    wrapped = {f"module.{name}": tensor.clone() for name, tensor in model.items()}
    wrapped["module.1.bias"] += 1
    report = wb.diff(model, wrapped)
    assert report.counts["changed"] == 1
    assert report.counts["added"] == report.counts["removed"] == 0
    assert all(row.was == row.name.removeprefix("module.") for row in report.rows)


def test_other_values_that_differ_are_told():
    report = wb.diff({"model": {"w": torch.ones(2)}, "epoch": 3}, {"model": {"w": torch.ones(2)}, "epoch": 4})
    assert not report
    assert report.values == (("epoch", "3", "4"),)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.bool, torch.int64, torch.float8_e4m3fn, torch.uint64], ids=str)
def test_every_kind_of_number_can_be_compared(dtype):
    a = torch.tensor([0, 1, 1, 0]).to(dtype)
    b = torch.tensor([0, 1, 0, 0]).to(dtype)
    assert wb.diff({"x": a}, {"x": a.clone()})
    report = wb.diff({"x": a}, {"x": b})
    assert (report.rows[0].status, report.rows[0].max_abs) == ("changed", 1)


def test_large_integers_that_differ_by_one_differ():
    report = wb.diff({"x": torch.tensor([2**62])}, {"x": torch.tensor([2**62 + 1])})
    assert not report


def test_a_locked_tensor_is_told_as_unreadable(tmp_path):
    from hostile_makers import pickled, tensor, torch_zip

    ckpt = wb.open(torch_zip(tmp_path / "l.pt", pickled([("w", tensor(numel=4, shape=(4,)))])))
    assert wb.diff(ckpt, ckpt).counts["unreadable"] == 1
    assert wb.stats(ckpt).rows[0].locked
