"""Pruning of a model, against torch.nn.utils.prune and the data it must not lose."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as oracle

import workbench as wb
from workbench.errors import SelectionError


def cnn():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 12), nn.ReLU(), nn.Linear(12, 4))


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def zeros(model, names=("0", "3", "5")):
    return [int((model.get_submodule(name).weight == 0).sum()) for name in names]


@pytest.mark.parametrize("amount", [0.5, 0.33, 20])
def test_l1_is_torchs_own(amount):
    ours, theirs = cnn(), cnn()
    report = wb.models.prune(ours, amount)
    order = [name for name, _ in ours.named_parameters()]
    assert order == [name for name, _ in cnn().named_parameters()]
    for index in (0, 3, 5):
        oracle.remove(oracle.l1_unstructured(theirs[index], "weight", amount), "weight")
    expected = theirs.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in weights(ours).items())
    assert [row.zeros for row in report.rows] == zeros(theirs)
    assert list(ours.state_dict()) == list(cnn().state_dict())  # torch's own remove puts the weight behind the bias
    assert "do not change" in report.headline


def test_slices_global_random_and_biases_are_torchs_own():
    ours, theirs = cnn(), cnn()
    wb.models.prune(ours, 0.5, method="ln", n=1, dim=0, modules="0")
    oracle.ln_structured(theirs[0], "weight", 0.5, n=1, dim=0)
    assert torch.equal(ours[0].weight, theirs[0].weight)
    ours, theirs = cnn(), cnn()
    report = wb.models.prune(ours, 0.4, scope="global")
    oracle.global_unstructured([(theirs[i], "weight") for i in (0, 3, 5)], oracle.L1Unstructured, amount=0.4)
    assert all(torch.equal(ours[i].weight, theirs[i].weight) for i in (0, 3, 5))
    assert report.sparsity == pytest.approx(0.4, abs=1e-3)
    state = torch.random.get_rng_state()
    wb.models.prune(ours, 6, method="random", modules="3", name="bias", seed=4)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(4)
    assert torch.equal(ours[3].bias == 0, oracle.random_unstructured(theirs[3], "bias", 6).bias_mask == 0)


def test_two_of_four_is_what_the_file_op_makes():
    model = cnn()
    expected = wb.ops.prune(wb.open(weights(model)), method="2:4", names=["3.weight", "5.weight"])
    wb.models.prune(model, method="2:4", modules=nn.Linear)
    assert all(torch.equal(model.state_dict()[name], expected[name].load()) for name in expected)
    with pytest.raises(SelectionError, match="4 divides"):
        wb.models.prune(model, method="2:4")  # three input channels


def test_masks_that_stay_are_finished_in_the_model_and_in_the_file(tmp_path):
    model = cnn()
    report = wb.models.prune(model, 0.5, make_permanent=False)
    assert "twice as large" in report.headline
    torch.save(model.state_dict(), tmp_path / "masked.pt")
    assert wb.models.finish_pruning(model) == ("0.weight", "3.weight", "5.weight")
    assert wb.models.finish_pruning(model) == ()
    plain = cnn()
    wb.load_into(plain, wb.ops.finish_pruning(wb.open(tmp_path / "masked.pt"))).check()
    assert all(torch.equal(a, b) for a, b in zip(weights(model).values(), weights(plain).values(), strict=True))
    copy.deepcopy(model)


def test_an_earlier_mask_counts():
    model = cnn()
    wb.models.prune(model, 0.3, make_permanent=False)
    first = model[3].weight_mask.clone()
    report = wb.models.prune(model, 0.5, make_permanent=False)
    assert not ((model[3].weight_mask == 1) & (first == 0)).any()
    assert [row.zeros for row in report.rows] == [round(0.5 * row.numel) for row in report.rows]
    wb.models.prune(model, 0.2, make_permanent=False)
    assert zeros(model) == [row.zeros for row in report.rows]
    model = cnn()
    for amount in (0.25, 0.5):
        wb.models.prune(model, amount, method="ln", make_permanent=False)
    assert [int((model[i].weight.flatten(1) == 0).all(1).sum()) for i in (0, 3, 5)] == [4, 6, 2]


def test_tied_weights_are_pruned_once_and_alike():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.up, self.down = nn.Embedding(9, 6), nn.Linear(6, 9), nn.Linear(6, 9)
            self.up.weight = self.down.weight = self.embed.weight

        def forward(self, x):
            return self.up(self.embed(x)) + self.down(self.embed(x))

    for method in ("l1", "random"):
        model = Tied()
        report = wb.models.prune(model, 0.5, method=method)
        assert model.up.weight is model.down.weight is model.embed.weight
        assert int((model.embed.weight == 0).sum()) == 27
        assert [row.tied_to for row in report.rows] == [None, "up.weight"]
        assert report.sparsity == 0.5
        assert "embed.weight, and has the zeros too" in report.notes[0]
    report = wb.models.prune(Tied(), 0.5, make_permanent=False)
    assert "not masked there" in report.notes[0]


@pytest.mark.parametrize(
    "options",
    [{}, {"amount": 1.0}, {"amount": 10_000}, {"amount": 0.5, "modules": "x*"}, {"amount": 0.5, "modules": nn.LSTM}, {"amount": 0.5, "name": "w"},
     {"amount": 0.5, "scope": "global", "method": "ln"}, {"amount": 0.5, "method": "l3"}, {"amount": 0.5, "method": "ln", "modules": nn.Linear, "dim": 3},
     {"amount": 0.5, "method": "2:4"}],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_is_refused_and_nothing_has_changed(options):
    model = cnn()
    with pytest.raises(SelectionError):
        wb.models.prune(model, **options)
    assert all(torch.equal(a, b) for a, b in zip(weights(model).values(), weights(cnn()).values(), strict=True))


def test_a_schedule_is_what_it_says():
    assert wb.models.sparsity_schedule(0.9, 3, "linear") == pytest.approx((0.3, 0.6, 0.9))
    assert wb.models.sparsity_schedule(0.8, 4) == pytest.approx([0.8 - 0.8 * (1 - t) ** 3 for t in (0.25, 0.5, 0.75, 1)])
    for bad in ((1.0, 3), (0.5, 0), (0.5, 2, "square")):
        with pytest.raises(SelectionError):
            wb.models.sparsity_schedule(*bad)


@pytest.mark.parametrize("method", ["l1", "random"])
def test_steps_hold_their_zeros_while_the_optimizer_goes_on(method):
    model, x = cnn(), torch.randn(16, 3, 8, 8)
    target = torch.randn(16, 4)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    seen = []

    def train(model, step):
        masks = {name: m.weight_mask.clone() for name, m in model.named_modules() if hasattr(m, "weight_mask")}
        if seen:  # what went stays gone
            assert all(not ((masks[n] == 1) & (seen[-1][n] == 0)).any() for n in masks)
        seen.append(masks)
        for _ in range(8):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x), target).backward()
            optimizer.step()

    def score(model):
        assert not model.training
        return -float(nn.functional.mse_loss(model(x), target).detach())

    schedule = wb.models.sparsity_schedule(0.8, 3)
    before = score(model.eval())
    report = wb.models.prune_steps(model.train(), schedule, train, evaluate=score, method=method)
    assert [step.reached for step in report.steps] == pytest.approx(schedule, abs=1e-3)
    assert report.steps[-1].score > before
    assert model.training
    assert sum(zeros(model)) / sum(row.numel for row in report.rows) == pytest.approx(0.8, abs=1e-3)
    assert list(model.state_dict()) == list(cnn().state_dict())
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == {id(p) for p in model.parameters()}
    assert "steps" in str(report)


def test_steps_judge_what_the_optimizer_left_and_not_the_value_before_its_last_step():
    model = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))

    def swap(model, step):
        model(torch.ones(1, 4))  # the hook computes the shown weight here
        model.weight_orig.data[:] = torch.tensor([[9.0, 8.0, 0.1, 4.0]])

    wb.models.prune_steps(model, [0.25, 0.5], swap)
    assert (model.weight[0] != 0).tolist() == [False, True, False, True]


@pytest.mark.parametrize("schedule", [[], [0.5, 0.3], [1], [0.5, 1.0]])
def test_a_schedule_that_does_not_rise_is_refused(schedule):
    with pytest.raises(SelectionError, match="rise"):
        wb.models.prune_steps(cnn(), schedule, lambda model, step: None)
