"""Pruning of a file, against torch.nn.utils.prune."""

import itertools
import math

import pytest
import torch
from strategies import same
from torch.nn.utils import prune as oracle

import workbench as wb
from workbench.errors import BudgetError, SelectionError

SHAPES = [(7, 13), (4, 3, 3, 3), (31, 70)]


def module_of(values):
    module = torch.nn.Module()
    module.register_parameter("w", torch.nn.Parameter(values.clone()))
    return module


def pruned(values, *args, **options):
    return wb.ops.prune(wb.open({"w": values}), *args, names="w", **options)["w"].load()


def random(shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("amount", [0, 0.0, 0.37, 0.5, 3, 0.99])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_l1_is_what_torch_prunes(shape, amount):
    values = random(shape)
    assert torch.equal(pruned(values, amount), oracle.l1_unstructured(module_of(values), "w", amount).w)


@pytest.mark.parametrize("n", [0, 1, 2, 3, 0.5, -1, math.inf, -math.inf])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_slices_are_what_torch_prunes(shape, n):
    values = random(shape)
    for dim, amount in itertools.product(range(-1, values.ndim), (0.5, 1)):
        if n == 0:  # all norms alike: the last slices go
            expected = values.movedim(dim, 0).clone()
            expected[len(expected) - (amount if amount == 1 else round(amount * len(expected))) :] = 0
            expected = expected.movedim(0, dim)
        else:
            expected = oracle.ln_structured(module_of(values), "w", amount, n, dim).w
        assert torch.equal(pruned(values, amount, method="ln", n=n, dim=dim), expected), (dim, amount)


@pytest.mark.parametrize("amount", [0.3, 100, 0.95])
@pytest.mark.parametrize("dtypes", [[torch.float32] * 3, [torch.float32, torch.bfloat16, torch.float64]], ids=["one type", "several types"])
def test_global_is_what_torch_prunes(amount, dtypes):
    tensors = {name: random(shape, i, dtype) for i, (name, shape, dtype) in enumerate(zip("abc", SHAPES, dtypes, strict=True))}
    modules = [(module_of(values.double()), "w") for values in tensors.values()]
    oracle.global_unstructured(modules, oracle.L1Unstructured, amount=amount)
    result = wb.ops.prune(wb.open(tensors), amount, scope="global")
    for (module, _), (name, values) in zip(modules, tensors.items(), strict=True):
        assert torch.equal(result[name].load(), module.w.to(values.dtype))


def test_of_equal_magnitudes_the_first_tensors_and_the_lower_indices_are_kept():
    result = wb.ops.prune(wb.open({"a": torch.ones(2, 2), "b": -torch.ones(2, 2)}), 3, scope="global")
    assert result["a"].load().tolist() == [[1, 1], [1, 1]]
    assert result["b"].load().tolist() == [[-1, 0], [0, 0]]


def test_tied_tensors_count_once_and_stay_tied():
    shared = random((4, 4))
    result = wb.ops.prune(wb.open({"a": shared, "b": shared, "c": random((4, 4), 1)}), 0.5, scope="global")
    assert result.aliases == {"b": "a"}
    assert sum(int((result[name].load() == 0).sum()) for name in "ac") == 16


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_random_is_exact_repeatable_and_of_its_seed(scope, tmp_path):
    tensors = {"a": random((300, 70)), "b": random((300, 70), 1)}
    ckpt = wb.open(tensors)
    once, again, other = (wb.ops.prune(ckpt, 0.3, method="random", scope=scope, seed=seed) for seed in (5, 5, 6))
    gone = {name: once[name].load() == 0 for name in "ab"}
    assert sum(int(g.sum()) for g in gone.values()) == round(0.3 * 42_000)
    assert abs(int(gone["a"].sum()) - 6300) <= (0 if scope == "tensor" else 300)
    assert (gone["a"] & gone["b"]).sum() == pytest.approx(0.09 * 21_000, rel=0.1)  # neither the same places nor each other's
    assert gone["a"].float().mean(1).std() < 0.1
    assert all(same(once[name].load(), again[name].load()) for name in "ab")
    assert not same(once["a"].load(), other["a"].load())
    assert once.history[-1].params["seed"] == 5
    wb.save(once, tmp_path / "random.safetensors")
    assert same(wb.open(tmp_path / "random.safetensors")["b"].load(), once["b"].load())


@pytest.mark.parametrize("shape", [(6, 8), (1, 4096), (3, 16, 3, 3), (16, 4, 1, 2)], ids=str)
@pytest.mark.parametrize(("kept", "group"), [(2, 4), (1, 4), (1, 2), (3, 4)])
def test_n_of_m_keeps_the_largest_of_each_group_along_the_input(shape, kept, group):
    values = random(shape)
    groups = values.movedim(1, -1).reshape(-1, group)
    expected = torch.zeros_like(groups).scatter(1, top := groups.abs().topk(kept).indices, groups.gather(1, top))
    rest = values.movedim(1, -1).shape
    assert torch.equal(pruned(values, method=f"{kept}:{group}"), expected.reshape(rest).movedim(-1, 1))


def test_n_of_m_keeps_the_lower_index_of_equal_ones_and_nan():
    values = torch.tensor([[1.0, -1, 1, -1, 0, math.nan, 9, math.inf]])
    assert pruned(values, method="2:4").nan_to_num(7).tolist() == [[1, -1, 0, 0, 0, 7, 0, torch.finfo(torch.float32).max]]


def test_n_of_m_tells_what_it_left_and_refuses_it_where_it_was_named():
    ckpt = wb.open({"fits": torch.ones(2, 8), "odd": torch.ones(2, 6)})
    result = wb.ops.prune(ckpt, method="2:4")
    assert [f.where for f in result.findings if f.kind == "not pruned"] == [{"tensor": "odd"}]
    assert (result["odd"].load() == 1).all()
    with pytest.raises(SelectionError, match="4 divides"):
        wb.ops.prune(ckpt, method="2:4", names="*")


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float16, torch.bfloat16, torch.float64], ids=str
)
def test_pruning_takes_nan_for_the_largest_in_every_type(dtype):
    values = torch.tensor([float("nan"), 1.0, -2.0, 4.0]).to(dtype)
    result = pruned(values, 0.5).float()
    assert result.isnan().tolist() == [True, False, False, False]
    assert result.nan_to_num(9).tolist() == [9, 0, 0, 4]


def test_pruning_leaves_vectors_alone_unless_named():
    state = {"w": torch.randn(4, 4), "b": torch.randn(4)}
    result = wb.ops.prune(wb.open(state), 0.5)
    assert (result["w"].load() == 0).sum() == 8
    assert same(result["b"].load(), state["b"])


@pytest.mark.parametrize("amount", [-0.1, 1.0, 1.5, math.nan, -1, None])
def test_an_amount_out_of_range_is_refused(amount):
    with pytest.raises(SelectionError):
        wb.ops.prune(wb.open({"w": torch.ones(2, 2)}), amount)


def test_exclude_leaves_tensors_out():
    result = wb.ops.prune(wb.open({"a": torch.ones(2, 2), "b": torch.ones(2, 2)}), 0.5, exclude="b")
    assert [int(t.load().sum()) for t in result.values()] == [2, 4]
    with pytest.raises(SelectionError, match="leaves nothing"):
        wb.ops.prune(wb.open({"a": torch.ones(2, 2)}), 0.5, exclude="a")


@pytest.mark.parametrize(
    ("args", "options"),
    [((), {}), ((0.5,), {"method": "2:4"}), ((), {"method": "4:4"}), ((0.5,), {"method": "l2"}), ((0.5,), {"method": "ln", "scope": "global"}),
     ((0.5,), {"scope": "model"}), ((5,), {}), ((0.5,), {"method": "ln", "dim": 2}), ((True,), {}), ((0.5,), {"exclude": "nothing"})],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_is_refused(args, options):
    with pytest.raises(SelectionError):
        wb.ops.prune(wb.open({"w": torch.ones(2, 2)}), *args, **options)


@pytest.mark.parametrize(
    "options",
    [{"amount": 0.5}, {"amount": 0.5, "scope": "global"}, {"amount": 0.5, "method": "ln"}, {"amount": 0.5, "method": "ln", "dim": 1, "names": "across"},
     {"amount": 0.5, "method": "random"}, {"method": "2:4"}],
    ids=str,
)  # fmt: skip
def test_a_row_larger_than_the_budget_streams(options, tmp_path):
    state = {"long": random((2, 5_000_000)), "across": random((3000, 8), 1).t()}
    torch.save(state, tmp_path / "long.pt")
    result = wb.ops.prune(wb.open(tmp_path / "long.pt"), **options)
    wb.save(result, tmp_path / "pruned.safetensors", max_ram_mb=16)
    whole = wb.ops.prune(wb.open(state), **options)
    written = wb.open(tmp_path / "pruned.safetensors")
    assert all(torch.equal(written[name].load(), whole[name].load()) for name in state)


def test_more_slices_than_the_budget_holds_are_refused(tmp_path):
    result = wb.ops.prune(wb.open({"w": torch.ones(2, 1_000_000)}), 0.5, method="ln", dim=1)
    with pytest.raises(BudgetError, match="40 MB"):
        wb.save(result, tmp_path / "w.pt", max_ram_mb=16)
    wb.save(result, tmp_path / "w.pt", max_ram_mb=64)


# finishing


def masked_model():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 4))
    oracle.l1_unstructured(model[0], "weight", 0.5)
    oracle.random_unstructured(model[0], "bias", 2)
    oracle.ln_structured(model[2], "weight", 0.5, n=2, dim=0)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_finishing_gives_what_remove_gives(dtype, tmp_path):
    model = masked_model().to(dtype)
    torch.save(model.state_dict(), tmp_path / "masked.pt")
    result = wb.ops.finish_pruning(wb.open(tmp_path / "masked.pt"))
    for module, name in ((model[0], "weight"), (model[0], "bias"), (model[2], "weight")):
        oracle.remove(module, name)
    expected = model.state_dict()
    assert set(result) == set(expected)
    assert all(same(result[name].load(), expected[name]) for name in expected)
    wb.save(result, tmp_path / "finished.pt")
    plain = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.BatchNorm1d(5), torch.nn.Linear(5, 4)).to(dtype)
    plain.load_state_dict(torch.load(tmp_path / "finished.pt", weights_only=True))


@pytest.mark.parametrize(
    "state",
    [{"w": torch.ones(2)}, {"w_orig": torch.ones(2)}, {"w_orig": torch.ones(2), "w_mask": torch.ones(3)},
     {"w_orig": torch.ones(2), "w_mask": torch.ones(2), "w": torch.ones(2)}],
    ids=["none", "no mask", "another shape", "taken"],
)  # fmt: skip
def test_what_is_no_unfinished_pruning_is_refused(state):
    with pytest.raises(SelectionError, match="_mask"):
        wb.ops.finish_pruning(wb.open(state))
