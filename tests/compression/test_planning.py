"""Sensitivity against plain arithmetic, plans against brute force, and both against files that were written."""

import copy
import itertools
import json
import math
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

import workbench as wb
from workbench.compression import CompressionPlan, frontier, plan_compression, sensitivity
from workbench.compression.allocation import allocate, steps
from workbench.compression.sensitivity import SCHEMES
from workbench.errors import BudgetError, CancelledError, SelectionError
from workbench.ops.schemes import Scheme, fake_quantize
from workbench.teaching.samples import accuracy


def data_section(path):
    """Bytes of tensors in a safetensors file, by its own header."""
    raw = path.read_bytes()
    return len(raw) - 8 - int.from_bytes(raw[:8], "little")


@pytest.fixture
def ckpt():
    torch.manual_seed(1)
    tied = torch.randn(64, 32) * torch.logspace(-2, 0, 64)[:, None]
    return wb.open(
        {
            "embed.weight": tied,
            "head.weight": tied,
            "fc.weight": torch.randn(32, 128),
            "odd.weight": torch.randn(7, 33),
            "bias": torch.randn(32),
        }
    )


# the search


options = st.lists(
    st.tuples(st.integers(1, 40), st.one_of(st.integers(0, 9), st.floats(0, 9, allow_subnormal=False))), min_size=1, max_size=4
)


@given(groups=st.lists(options, min_size=1, max_size=6), share=st.floats(0, 1), width=st.sampled_from([1, 3, 4000]))
def test_the_choice_is_the_best_there_is_and_the_bound_is_below_it(groups, share, width):
    least, most = (sum(f(size for size, _ in group) for group in groups) for f in (min, max))
    budget = least + int(share * (most - least))
    picked, bound = allocate(groups, budget, width)
    error = sum(group[i][1] for group, i in zip(groups, picked, strict=True))
    best = min(sum(e for _, e in choice) for choice in itertools.product(*groups) if sum(size for size, _ in choice) <= budget)
    assert sum(group[i][0] for group, i in zip(groups, picked, strict=True)) <= budget
    assert bound <= best + 1e-9
    assert error >= best - 1e-9
    if width == 4000:
        assert error == pytest.approx(best, abs=1e-9)
        assert bound == pytest.approx(best, abs=1e-9)


@given(groups=st.lists(options, min_size=1, max_size=5))
def test_every_point_of_the_frontier_is_the_best_at_its_size(groups):
    first, taken = steps(groups)
    now = list(first)
    for step in [None, *taken]:
        if step is not None:
            now[step.group] = step.option
        size, error = (sum(group[i][part] for group, i in zip(groups, now, strict=True)) for part in (0, 1))
        best = min(sum(e for _, e in choice) for choice in itertools.product(*groups) if sum(s for s, _ in choice) <= size)
        assert error == pytest.approx(best, abs=1e-9)


def test_a_thousand_tensors_are_planned_in_seconds_with_a_proof():
    generator = torch.Generator().manual_seed(0)
    groups = []
    for _ in range(1000):
        size, spread = int(torch.randint(1000, 10**7, (1,), generator=generator)), float(torch.rand(1, generator=generator))
        groups.append(
            [
                (4 * size, 0.0),
                (2 * size, 1e-5 * spread * size),
                (size + 4096, 1e-4 * spread * size),
                (size // 2 + size // 32, 3e-2 * spread * size),
            ]
        )
    budget = int(1.2 * sum(min(s for s, _ in group) for group in groups))
    picked, bound = allocate(groups, budget)
    error = sum(group[i][1] for group, i in zip(groups, picked, strict=True))
    assert error <= bound * (1 + 1e-3)


# sensitivity


def test_errors_and_bytes_are_those_of_the_plain_reference(ckpt):
    report = sensitivity(ckpt, schemes=SCHEMES)
    assert {row.name for row in report.rows} == {"embed.weight", "fc.weight", "odd.weight"}
    for row in report.rows:
        values = ckpt[row.name].load()
        lost = (fake_quantize(values, row.scheme).double() - values.double()).square().sum()
        assert row.error == pytest.approx(float(lost), rel=1e-6)
        assert row.sqnr == pytest.approx(float(10 * torch.log10(values.double().square().sum() / lost)), abs=1e-6)
        made = wb.ops.quantize(ckpt.select([row.name]), row.scheme, names=[row.name])
        assert row.nbytes == sum(tensor.nbytes for tensor in made.values())
    assert report.left["odd.weight", "int4 per group of 32"] == "groups of 32 do not divide its rows"
    assert (report.ties, report.fixed) == ({"head.weight": "embed.weight"}, 32 * 4)
    assert "SQNR" in str(report)
    assert report.to_dict()["sizes"]["fc.weight"] == 32 * 128 * 4


def test_a_large_tensor_streams_and_can_be_cancelled():
    told, stop = [], threading.Event()
    tensor = {"w": torch.randn(1 << 22).view(4, -1)}
    assert sensitivity(tensor, schemes=["int8"], max_ram_mb=64, progress=told.append).rows[0].sqnr > 30
    assert told[-1].done == told[-1].total == 4 << 22
    stop.set()
    with pytest.raises(CancelledError):
        sensitivity(tensor, schemes=["int8"], cancel=stop)


def test_what_cannot_be_tried_is_told_and_what_is_quantized_already_is_left(ckpt):
    broken = wb.open({"nan.weight": torch.full((4, 32), math.nan), "fine.weight": torch.randn(4, 32)})
    assert "NaN" in sensitivity(broken, schemes=["int8"]).left["nan.weight", "int8 per channel"]
    half = wb.ops.quantize(ckpt, "int8", names=["fc.weight"])
    assert set(sensitivity(half, schemes=["int8"]).sizes) == {"embed.weight", "odd.weight"}
    with pytest.raises(SelectionError, match="nothing to try"):
        sensitivity(ckpt, exclude="*")
    with pytest.raises(SelectionError, match="no tensor matches"):
        sensitivity(ckpt, exclude="hed.weight")
    with pytest.raises(SelectionError, match="a model to go into"):
        sensitivity(ckpt, torch.ones(1, 3))
    with pytest.raises(SelectionError, match="needs outputs"):
        sensitivity(ckpt, metric=lambda a, b: 0.0)


def test_a_layer_costs_what_the_outputs_lose_and_the_model_is_put_back(net, data):
    inputs, before = data.test_images[:64], copy.deepcopy(net.state_dict())
    report = sensitivity(net, [inputs[:32], inputs[32:]], schemes=["int8", {"scheme": "int4", "group_size": 32}])
    assert all(torch.equal(now, then) for now, then in zip(net.state_dict().values(), before.values(), strict=True))
    assert not net.training
    for row in report.rows:
        other = copy.deepcopy(net)
        with torch.no_grad():
            other.get_parameter(row.name).copy_(fake_quantize(net.get_parameter(row.name), row.scheme))
            lost = (other(inputs) - net(inputs)).double().square().sum()
        assert row.error == pytest.approx(float(lost), rel=1e-3)
    own = sensitivity(net, inputs, schemes=["int8"], metric=lambda found, expected: float((found - expected).abs().max()))
    assert own.measure == "<lambda>"
    assert all(0 < row.error < 1 and row.sqnr is None for row in own.rows)
    assert next(axes.get_title(loc="left") for axes in report.plot().axes)


# plans


def test_a_plan_has_the_bytes_that_are_written(ckpt, tmp_path):
    report = sensitivity(ckpt, schemes=SCHEMES)
    smallest = frontier(report).points[0][0]
    for budget in range(smallest, ckpt.nbytes + 700, 700):
        plan = plan_compression(report, budget_nbytes=budget)
        assert plan.nbytes <= budget
        assert plan.bound <= plan.error
        assert plan.gap == 0
        if plan.schemes:
            made = wb.ops.quantize(ckpt, plan=plan.schemes)
            wb.save(made, tmp_path / "small.safetensors")
            assert data_section(tmp_path / "small.safetensors") == plan.nbytes
            with safe_open(tmp_path / "small.safetensors", "pt") as file:
                assert sum(file.get_tensor(name).nbytes for name in file.keys()) == plan.nbytes  # noqa: SIM118
            if "embed.weight" in plan.schemes:
                assert plan.schemes["embed.weight"] == plan.schemes["head.weight"]


def test_a_plan_keeps_what_is_excluded_and_replays_from_json(ckpt):
    plan = plan_compression(ckpt, budget_mb=0.02, exclude="fc.*")
    assert "fc.weight" not in plan.schemes
    again = CompressionPlan.from_json(plan.to_json())
    assert again == plan
    assert json.loads(plan.to_json())["schemes"]["embed.weight"] == plan.schemes["embed.weight"].to_dict()
    report = sensitivity(ckpt)
    assert plan_compression(report, budget_mb=0.02, exclude="fc.*").choices == plan.choices
    assert plan_compression(report, budget_mb=0.02, exclude="head.weight").schemes.keys().isdisjoint({"embed.weight", "head.weight"})
    with pytest.raises(SelectionError, match="this is no plan"):
        CompressionPlan.from_json("{}")
    assert "budget 20 kB" in plan.headline
    assert "the least there can be" in str(plan)


def test_an_impossible_budget_says_the_smallest_possible(ckpt):
    report = sensitivity(ckpt, schemes=SCHEMES)
    smallest = frontier(report).points[0][0]
    with pytest.raises(BudgetError, match=f"is {smallest} bytes"):
        plan_compression(report, budget_nbytes=smallest - 1)
    assert plan_compression(report, budget_nbytes=smallest).nbytes == smallest
    with pytest.raises(SelectionError, match="once"):
        plan_compression(report)


def test_a_plan_of_a_training_checkpoint_is_for_its_weights(tmp_path):
    model = torch.nn.Linear(64, 64)
    torch.save({"model": model.state_dict(), "epoch": 3}, tmp_path / "t.pt")
    plan = plan_compression(tmp_path / "t.pt", budget_nbytes=10_000)
    assert set(plan.schemes) == {"weight"}
    assert wb.ops.quantize(wb.open(tmp_path / "t.pt"), plan=plan.schemes).weights.nbytes == plan.nbytes


# on a network that learned something


def measured(net, data, made):
    """(squared error of the outputs, accuracy) over images that no plan has seen."""
    other = copy.deepcopy(net)
    back = wb.ops.dequantize(made) if any("scale" in name for name in made) else made
    other.load_state_dict({name: tensor.load() for name, tensor in back.items()})
    with torch.no_grad():
        return float((other(data.test_images) - net(data.test_images)).double().square().sum()), accuracy(other, data)


@pytest.fixture(scope="module")
def learned(net, data):
    return sensitivity(net, data.train_images[:256], schemes=[*SCHEMES, {"scheme": "int4", "per": "channel"}])


@pytest.mark.parametrize("uniform", ["int8", {"scheme": "int4", "group_size": 32}, {"scheme": "int4", "per": "channel"}], ids=str)
def test_a_plan_beats_one_scheme_for_all_at_equal_bytes(net, data, learned, uniform):
    same = wb.ops.quantize(wb.open(net), uniform)
    plan = plan_compression(learned, budget_nbytes=same.nbytes)
    mixed = wb.ops.quantize(wb.open(net), plan=plan.schemes)
    assert mixed.nbytes == plan.nbytes <= same.nbytes
    (error, right), (uniform_error, uniform_right) = measured(net, data, mixed), measured(net, data, same)
    assert error < (0.85 if uniform == "int8" else 0.5) * uniform_error
    assert right >= uniform_right - 0.003
    assert right >= accuracy(net, data) - 0.006


def test_the_frontier_falls_and_lies_below_one_scheme_for_all(learned):
    found = frontier(learned)
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in itertools.pairwise(found.points))
    for name, nbytes, error in found.uniform:
        assert plan_compression(learned, budget_nbytes=nbytes).error <= error, name
    for point in found.points[:: max(1, len(found.points) // 5)]:
        plan = plan_compression(learned, budget_nbytes=point[0])
        assert (plan.nbytes, plan.error) == (point[0], pytest.approx(point[1]))
    (axes,) = found.plot().axes
    assert axes.get_yscale() == "log"
    assert {text.get_text() for text in axes.texts} == {name for name, _, _ in found.uniform}
    assert Scheme.of("int8") in learned.schemes
