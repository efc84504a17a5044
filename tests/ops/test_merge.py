"""Merging against torch's own arithmetic, and its memory in a fresh process."""

import copy
import json
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from memory import peak_over_base
from strategies import same
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import workbench as wb
from workbench.errors import CorruptFileError, SelectionError, SpecMismatchError


def models(count, dtype=torch.float32):
    out = []
    for seed in range(count):
        torch.manual_seed(seed)
        out.append(torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.BatchNorm1d(16), torch.nn.Linear(16, 4)).to(dtype))
    return out


def loaded(ckpt, path):
    wb.save(ckpt, path)
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_the_average_is_that_of_averaged_model(dtype, tmp_path):
    all_models = models(3)
    oracle = AveragedModel(all_models[0], use_buffers=True)
    for model in all_models:
        oracle.update_parameters(model.double())
    given = [{n: t.to(dtype) if t.is_floating_point() else t for n, t in m.state_dict().items()} for m in all_models]
    result = loaded(wb.ops.average([wb.open(g) for g in given]), tmp_path / "mean.pt")
    for name, value in result.items():
        assert value.dtype == given[0][name].dtype
        assert torch.allclose(value.double(), oracle.module.state_dict()[name].double(), rtol=0, atol={torch.float64: 1e-6, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype])  # fmt: skip


def test_sums_are_taken_in_float32_and_rounded_once():
    xs = [torch.randn(1000).bfloat16() for _ in range(4)]
    result = wb.ops.average([wb.open({"w": x}) for x in xs])["w"].load()
    exact = torch.stack([x.double() for x in xs]).mean(0)
    assert torch.equal(result, exact.bfloat16())
    assert not torch.equal(sum(xs[1:], xs[0]) / 4, exact.bfloat16())
    weighted = wb.ops.merge([wb.open({"w": x}) for x in xs], [0.3, 0.1, -0.7, 1.1])["w"].load()
    assert same(weighted, sum(x.float() * w for x, w in zip(xs, [0.3, 0.1, -0.7, 1.1], strict=True)).bfloat16())


@given(st.lists(st.floats(0, 8, width=32), min_size=1, max_size=4).filter(lambda w: sum(w) > 0.01))
def test_a_weighted_mean_divides_by_the_sum_and_keeps_what_is_equal_to_the_bit(weights):
    frozen = torch.tensor([0.1, float("-inf"), 3e38, float("inf"), -0.0, 1e-45])
    xs = [torch.randn(7, dtype=torch.float64) for _ in weights]
    result = wb.ops.average([wb.open({"w": x, "frozen": frozen}) for x in xs], weights)
    expected = sum(x * w for x, w in zip(xs, weights, strict=True)) / sum(weights)
    assert torch.allclose(result["w"].load(), expected, atol=1e-12)
    assert same(result["frozen"].load(), frozen)


@pytest.mark.parametrize("weights", [[0.1] * 10, [1.5, -0.5], [0.3, 0.3, 0.4]], ids=str)
def test_what_is_equal_stays_to_the_bit_where_the_weights_of_merge_sum_to_one(weights):
    x = torch.cat([torch.randn(1000), torch.tensor([float("inf"), 3e38, 1e-45])])
    assert same(wb.ops.merge([wb.open({"w": x})] * len(weights), weights)["w"].load(), x)


def test_anything_that_can_be_opened_is_averaged():
    assert wb.ops.average(wb.open({"w": torch.tensor([n])}) for n in (1.0, 3.0))["w"].load() == 2
    assert wb.ops.average([{"w": torch.tensor([1.0])}, {"w": torch.tensor([3.0])}])["w"].load() == 2


def test_sections_of_equal_claim_are_refused_in_every_input():
    plain, other = models(2)
    rivals = wb.open({"teacher": plain.state_dict(), "student": other.state_dict()})
    for make in (
        lambda: wb.ops.average([rivals, wb.open(plain)]),
        lambda: wb.ops.average([wb.open(plain), rivals]),
        lambda: wb.ops.extract_lora(wb.open(plain), rivals, 2),
        lambda: wb.ops.extract_lora(rivals, wb.open(plain), 2),
        lambda: wb.ops.merge_lora(wb.open(plain), rivals),
    ):
        with pytest.raises(SelectionError, match=r"'teacher', 'student'.*equal claim"):
            make()
    assert wb.ops.average([wb.open(plain), rivals.section("student")])["0.weight"].shape == (16, 8)


def test_weights_are_taken_as_they_are_by_merge():
    a, b = torch.randn(9), torch.randn(9)
    assert torch.allclose(wb.ops.merge([wb.open({"w": a}), wb.open({"w": b})], [2, -0.5])["w"].load(), 2 * a - 0.5 * b)


def test_ema_is_that_of_averaged_model():
    steps = models(4)
    oracle = AveragedModel(steps[0], multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for model in steps:
        oracle.update_parameters(model)
    result = wb.ops.ema([wb.open(m) for m in steps], 0.9)
    for name, value in oracle.module.named_parameters():
        assert torch.allclose(result[name].load(), value, atol=1e-6)


def test_task_vectors_are_added_and_what_did_not_move_stays_to_the_bit():
    base = torch.randn(50)
    base[:3] = torch.tensor([float("inf"), float("-inf"), 3e38])
    moved = [base.clone(), base.clone()]
    moved[0][10:20] += 1.5
    moved[1][15:30] -= 0.25
    result = wb.ops.task_arithmetic(wb.open({"w": base}), [wb.open({"w": m}) for m in moved], [0.3, -2.0])["w"].load()
    expected = base[10:30] + 0.3 * (moved[0] - base)[10:30] - 2 * (moved[1] - base)[10:30]
    assert torch.allclose(result[10:30], expected)
    assert same(result[:10], base[:10])
    assert same(result[30:], base[30:])
    moved[0][5] = float("inf")
    assert same(wb.ops.task_arithmetic(wb.open({"w": base}), [wb.open({"w": moved[0]})], 0.0)["w"].load(), base)
    cast = wb.ops.cast(wb.open({"w": base[5:]}), "float64")  # computed once for both sides
    assert same(wb.ops.task_arithmetic(cast, [cast], 0.5)["w"].load(), base[5:].double())


def test_integers_are_kept_where_equal_and_refused_or_chosen_where_not(tmp_path):
    state = lambda n, mask=True: wb.open({"w": torch.ones(3), "n": torch.tensor(n), "mask": torch.tensor([mask, False])})  # noqa: E731
    assert wb.ops.average([state(4), state(4)])["n"].load() == 4
    for ckpts in ([state(4), state(5)], [state(4), state(4, False)]):
        with pytest.raises(SelectionError, match=r"(?s)different.*unequal"):
            wb.save(wb.ops.average(ckpts), tmp_path / "refused.pt")
    assert wb.ops.average([state(4), state(5)], unequal="first")["n"].load() == 4
    assert wb.ops.average([state(4), state(5)], unequal="last")["n"].load() == 5


@pytest.mark.parametrize(
    ("other", "error", "says"),
    [
        ({"a.w": torch.ones(3)}, SelectionError, "b.w"),
        ({"a.w": torch.ones(3), "b.w": torch.ones(2), "c.w": torch.ones(1)}, SelectionError, "c.w"),
        ({"a.w": torch.ones(3), "b.w": torch.ones(2, 1)}, SpecMismatchError, "b.w"),
        ({"a.w": torch.ones(3), "b.w": torch.ones(2).int()}, SpecMismatchError, "b.w"),
    ],
    ids=["lacks a name", "has one more", "shape", "kind"],
)
def test_checkpoints_that_do_not_agree_are_refused_by_their_first_name(other, error, says):
    with pytest.raises(error) as caught:
        wb.ops.average([wb.open({"a.w": torch.ones(3), "b.w": torch.ones(2)}), wb.open(other)])
    assert says in str(caught.value)
    assert "first" in str(caught.value)
    assert "checkpoint 2" in str(caught.value)


@pytest.mark.parametrize("weights", [[1], [1, -1], [0, 0], [float("nan"), 1], [1, float("inf")]])
def test_weights_that_are_none_are_refused(weights):
    ckpts = [wb.open({"w": torch.ones(1)})] * 2
    with pytest.raises(SelectionError):
        wb.ops.average(ckpts, weights)
    for make in (lambda: wb.ops.average([]), lambda: wb.ops.ema(ckpts, 1.0), lambda: wb.ops.task_arithmetic(ckpts[0], ckpts, [1.0]), lambda: wb.ops.merge(ckpts, [1])):  # fmt: skip
        with pytest.raises(SelectionError):
            make()


@pytest.mark.parametrize(
    ("dtype", "value"), [("float16", 60000.0), ("float8_e4m3fn", 448.0), ("float8_e5m2", 57344.0), ("float32", 3e38), ("float64", 1e308)]
)
def test_a_result_that_overflows_is_refused_and_an_infinity_stays(dtype, value):
    big, thin = (wb.open({"w.weight": torch.full((2, 2), x, dtype=torch.float64).to(getattr(torch, dtype))}) for x in (value, 0.0))
    a = torch.full((1, 2), 1.0, dtype=torch.float64)
    for make in (lambda: wb.ops.merge([big, big], [1, 1]), lambda: wb.ops.merge_lora(big, wb.open({"w.lora_A.weight": a, "w.lora_B.weight": a.T}), value)):  # fmt: skip
        with pytest.raises(SelectionError, match=f"does not fit {dtype}"):
            make()["w.weight"].load()
    assert same(wb.ops.merge([big, thin], [1, 1])["w.weight"].load(), big["w.weight"].load())
    infinite = wb.open({"w.weight": torch.full((2, 2), float("inf"))})
    assert wb.ops.average([infinite, wb.open({"w.weight": torch.ones(2, 2)})])["w.weight"].load().isinf().all()


def test_a_double_beyond_the_type_of_the_sum_is_refused():
    with pytest.raises(SelectionError, match="does not fit float32"):
        wb.ops.average([wb.open({"w": torch.zeros(1)}), wb.open({"w": torch.tensor([1e300], dtype=torch.float64)})])["w"].load()


def test_ties_stay_where_all_inputs_have_them_and_end_where_one_has_not():
    shared, others = torch.ones(2), {"a": torch.ones(2), "b": torch.zeros(2)}
    tied = wb.open({"a": shared, "b": shared})
    assert wb.ops.average([tied, tied]).aliases == {"b": "a"}
    mixed = wb.ops.average([tied, wb.open(others)])
    assert not mixed.aliases
    assert mixed["b"].load().tolist() == [0.5, 0.5]


def test_training_checkpoints_are_merged_in_their_weights_and_keep_the_rest(tmp_path):
    for i, model in enumerate(models(2)):
        torch.save({"model": model.state_dict(), "epoch": i + 3}, tmp_path / f"{i}.pt")
    result = loaded(wb.ops.average([wb.open(tmp_path / "0.pt"), wb.open(tmp_path / "1.pt")]), tmp_path / "mean.pt")
    assert result["epoch"] == 3
    assert result["model"]._metadata == models(1)[0].state_dict()._metadata
    assert torch.allclose(result["model"]["0.weight"], (models(2)[0][0].weight + models(2)[1][0].weight) / 2)
    step = wb.ops.average([wb.open(tmp_path / "0.pt"), wb.open(tmp_path / "1.pt")]).history[-1]
    assert step.params["with"] == [str(tmp_path / "1.pt")]


def test_a_locked_tensor_locks_its_mean():
    meta = wb.open({"w": torch.ones(2, device="meta")})
    mean = wb.ops.average([wb.open({"w": torch.ones(2)}), meta])["w"]
    assert "meta" in mean.locked
    with pytest.raises(CorruptFileError):
        mean.load()


# low rank


def tuned_by(rank, dtype=torch.float32):
    base = {
        "a.weight": torch.randn(12, 8, dtype=dtype),
        "a.bias": torch.randn(12, dtype=dtype),
        "b.weight": torch.randn(6, 10, dtype=dtype),
    }
    change = {n: (torch.randn(t.shape[0], rank) @ torch.randn(rank, t.shape[1])).to(dtype) for n, t in base.items() if t.ndim == 2}
    return base, {n: t + change[n] if n in change else t for n, t in base.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_change_of_low_rank_is_found_and_put_back(dtype, tmp_path):
    base, tuned = tuned_by(2, dtype)
    adapter = wb.ops.extract_lora(wb.open(base), wb.open(tuned), 3, errors=True)
    wb.save(adapter, tmp_path / "adapter.safetensors")
    adapter = wb.open(tmp_path / "adapter.safetensors")
    assert adapter["base_model.model.a.lora_A.weight"].shape == (3, 8)
    assert adapter["base_model.model.a.lora_B.weight"].shape == (12, 3)
    back = loaded(wb.ops.merge_lora(wb.open(base), adapter), tmp_path / "back.pt")
    tolerance = 0.1 if dtype is torch.bfloat16 else 1e-5
    assert float(adapter["base_model.model.a.lora_error"].load()) < tolerance
    for name in base:
        assert torch.allclose(back[name].double(), tuned[name].double(), atol=tolerance, rtol=tolerance)
    assert same(back["a.bias"], base["a.bias"])


def test_the_error_of_a_cut_rank_is_that_of_eckart_and_young():
    base, tuned = tuned_by(5, torch.float64)
    adapter = wb.ops.extract_lora(wb.open(base), wb.open(tuned), 2, errors=True)
    values = torch.linalg.svdvals(tuned["a.weight"] - base["a.weight"])
    expected = float(values[2:].norm() / values.norm())
    assert float(adapter["base_model.model.a.lora_error"].load()) == pytest.approx(expected)
    merged = wb.ops.merge_lora(wb.open(base), adapter)["a.weight"].load()
    assert float((merged - tuned["a.weight"]).norm() / (tuned["a.weight"] - base["a.weight"]).norm()) == pytest.approx(expected)


def test_matrices_that_both_share_are_left_out_and_no_change_is_no_error():
    shared, w = torch.ones(4, 4), torch.ones(4, 4)
    same_values = wb.ops.extract_lora(
        wb.open({"s.weight": shared, "w.weight": w}), wb.open({"s.weight": shared, "w.weight": w.clone()}), 1, errors=True
    )
    assert [n for n in same_values if "s." in n] == []
    assert float(same_values["base_model.model.w.lora_error"].load()) == 0
    with pytest.raises(SelectionError):
        wb.ops.extract_lora(wb.open({"s.weight": shared}), wb.open({"s.weight": shared}), 1)
    with pytest.raises(SelectionError):
        wb.ops.extract_lora(wb.open({"s.weight": shared}), wb.open({"s.weight": shared}), 0)


@pytest.mark.parametrize(("shape", "name"), [((4, 0), "a.weight"), ((4, 4), "a.w"), ((4, 4), "weight")])
def test_a_matrix_that_has_no_adapter_is_refused_at_once(shape, name):
    with pytest.raises(SelectionError, match="is no matrix"):
        wb.ops.extract_lora(wb.open({name: torch.ones(shape)}), wb.open({name: torch.zeros(shape)}), 2, names=name)


def test_a_tie_ends_in_words_where_one_name_is_adapted_and_stays_where_both_are():
    shared, tuned = torch.randn(4, 4), torch.randn(4, 4)
    base, one = (
        wb.open({"emb.weight": shared, "head.weight": shared}),
        {"head.lora_A.weight": torch.ones(1, 4), "head.lora_B.weight": torch.ones(4, 1)},
    )
    merged = wb.ops.merge_lora(base, wb.open(one), 1.0)
    assert same(merged["emb.weight"].load(), shared)
    assert [f.kind for f in merged.findings] == ["tie ended"]
    both = wb.ops.merge_lora(base, wb.ops.extract_lora(base, wb.open({"emb.weight": tuned, "head.weight": tuned}), 4))
    assert (both.aliases, both.findings) == ({"head.weight": "emb.weight"}, ())
    assert torch.allclose(both["head.weight"].load(), tuned, atol=1e-5)


def test_the_scale_is_that_of_adapter_config_and_is_never_assumed(tmp_path):
    base = wb.open({"q.weight": torch.zeros(4, 4), "k.weight": torch.zeros(4, 4)})
    a, b = torch.randn(2, 4), torch.randn(4, 2)
    wb.save(wb.open({f"base_model.model.{n}.lora_{k}.weight": t for n in "qk" for k, t in (("A", a), ("B", b))}), tmp_path / "adapter_model.safetensors")  # fmt: skip
    with pytest.raises(SelectionError, match="lora_alpha / r"):
        wb.ops.merge_lora(base, wb.open(tmp_path / "adapter_model.safetensors"))
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "alpha_pattern": {"k": 8}, "fan_in_fan_out": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    for source in (tmp_path, tmp_path / "adapter_model.safetensors"):
        merged = wb.ops.merge_lora(base, wb.open(source))
        assert torch.allclose(merged["q.weight"].load(), 1.5 * (b @ a).T)
        assert torch.allclose(merged["k.weight"].load(), 4.0 * (b @ a).T)


def test_modules_with_a_scale_of_their_own_get_it():
    base = {f"{n}.weight": torch.zeros(2, 3) for n in ("q", "k", "v")}
    factors = lambda ranks: wb.open({f"{n}.lora_{k}.weight": torch.ones(s) for n, r in zip("qkv", ranks, strict=True) for k, s in (("A", (r, 3)), ("B", (2, r)))})  # noqa: E731  # fmt: skip
    merged = wb.ops.merge_lora(wb.open(base), factors((1, 2, 2)), {"q.*": 8, "*": 3, "k.*": 0})
    assert [float(t.load().max()) for t in merged.values()] == [8, 6, 6]  # the first that matches
    for ranks, scale, says in (
        ((1, 2, 2), 4.0, "ranks 1, 2"),
        ((1, 1, 1), {"q.*": 8}, "none for 'k.weight'"),
        ((1, 1, 1), {"*": 1, "z.*": 2}, "matches"),
    ):
        with pytest.raises(SelectionError, match=says):
            wb.ops.merge_lora(wb.open(base), factors(ranks), scale)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_adapters_of_every_kind_of_layer_are_merged(scale):
    a, b = torch.randn(2, 3, 3, 3), torch.randn(5, 2, 1, 1)
    conv = torch.randn(5, 3, 3, 3)
    merged = wb.ops.merge_lora(wb.open({"c.weight": conv}), wb.open({"c.lora_A.weight": a, "c.lora_B.weight": b}), scale)["c.weight"].load()
    x = torch.randn(1, 3, 6, 6)
    f = torch.nn.functional.conv2d
    assert torch.allclose(f(x, merged), f(x, conv) + scale * f(f(x, a), b), atol=1e-4)
    table, ea, eb = torch.randn(20, 4), torch.randn(2, 20), torch.randn(4, 2)
    merged = wb.ops.merge_lora(wb.open({"e.weight": table}), wb.open({"e.lora_embedding_A": ea, "e.lora_embedding_B": eb}), scale)[
        "e.weight"
    ].load()
    assert torch.allclose(merged, table + scale * (eb @ ea).T, atol=1e-5)
    w, la, lb = torch.randn(4, 4), torch.randn(2, 4), torch.randn(4, 2)
    adapter = {"base_model.model.h.lora_A.default.weight": la, "base_model.model.h.lora_B.default.weight": lb}
    merged = wb.ops.merge_lora(wb.open({"h.weight": w}), wb.open(adapter), scale, fan_in_fan_out=True)["h.weight"].load()
    assert torch.allclose(merged, w + scale * (lb @ la).T, atol=1e-5)


@pytest.mark.parametrize(
    ("adapter", "error"),
    [
        ({"w.lora_A.weight": torch.ones(1, 3)}, SelectionError),
        ({"w.lora_A.weight": torch.ones(1, 3), "w.lora_B.weight": torch.ones(3, 1)}, SpecMismatchError),
        ({"w.lora_A.weight": torch.ones(2, 3), "w.lora_B.weight": torch.ones(2, 1)}, SpecMismatchError),
        ({"v.lora_A.weight": torch.ones(1, 3), "v.lora_B.weight": torch.ones(2, 1)}, SelectionError),
        (
            {"w.lora_A.weight": torch.ones(1, 3), "w.lora_B.weight": torch.ones(2, 1), "w.lora_magnitude_vector": torch.ones(2)},
            SelectionError,
        ),
        ({"w.bias": torch.ones(2)}, SelectionError),
        ({"w.lora_A.weight": torch.ones(1, 3), "w.lora_B.weight": torch.ones(2, 1), "w.bias": torch.ones(3)}, SelectionError),
        ({f"w.lora_{k}.{n}.weight": torch.ones(s) for k, s in (("A", (1, 3)), ("B", (2, 1))) for n in ("one", "two")}, SelectionError),
    ],
    ids=["half", "shape", "ranks", "no such module", "DoRA", "no factors", "another bias", "two adapters"],
)
def test_an_adapter_that_does_not_fit_is_refused(adapter, error):
    with pytest.raises(error):
        wb.ops.merge_lora(wb.open({"w.weight": torch.ones(2, 3), "w.bias": torch.zeros(2)}), wb.open(adapter), 1.0)


def test_trained_biases_in_an_adapter_replace_those_of_the_base():
    adapter = {"w.lora_A.weight": torch.ones(1, 3), "w.lora_B.weight": torch.ones(2, 1), "base_model.model.w.bias": torch.full((2,), 7.0)}
    merged = wb.ops.merge_lora(wb.open({"w.weight": torch.ones(2, 3), "w.bias": torch.zeros(2)}), wb.open(adapter), 2.0)
    assert merged["w.weight"].load().tolist() == [[3.0] * 3] * 2
    assert merged["w.bias"].load().tolist() == [7, 7]


# memory

SMALL = """
folder = sys.argv[1]
wb.save(wb.ops.average([wb.open({"w": torch.ones(64, 64)}), wb.open({"w": torch.zeros(64, 64)})]), folder + "/out.safetensors")
"""
MERGED = """
a, b = (wb.open(f"{folder}/{n}.pt") for n in "ab")
adapter = {"v.lora_A.weight": torch.ones(4, 2**12), "v.lora_B.weight": torch.arange(2.0**12)[:, None].expand(-1, 4)}
wb.save(wb.ops.merge_lora(wb.ops.average([a, b]), wb.open(adapter), 1.0), folder + "/out.safetensors")
"""


def test_merging_two_files_of_256_mib_holds_a_block_of_each(tmp_path):
    n = 2**25 + 2**24
    for name in "ab":
        state = {
            "w": torch.full((n,), float(ord(name))),
            "v.weight": torch.zeros(2**12, 2**12),
            "t": torch.arange(2**10.0).view(32, 32).t(),
        }
        torch.save(state, tmp_path / f"{name}.pt")
    del state
    try:
        assert peak_over_base(SMALL, MERGED, tmp_path) <= 64
        result = wb.open(tmp_path / "out.safetensors")
        assert result["w"].read(n - 5, n).tolist() == [97.5] * 5
        assert result["v.weight"].load()[:, 7].tolist() == [4.0 * row for row in range(2**12)]
    finally:
        shutil.rmtree(tmp_path)


def test_inputs_are_not_changed():
    a, b = models(2)
    before = copy.deepcopy(a.state_dict())
    wb.ops.average([wb.open(a), wb.open(b)])["0.weight"].load()
    wb.ops.task_arithmetic(wb.open(a), [wb.open(b)])["0.weight"].load()
    assert all(same(t, before[n]) for n, t in a.state_dict().items())
