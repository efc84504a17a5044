"""Ops by example, against torch and against the layouts they promise."""

import pytest
import torch
from strategies import same

import workbench as wb
from workbench.errors import SelectionError


def mlp():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.BatchNorm1d(16), torch.nn.Linear(16, 4))


@pytest.fixture
def training(tmp_path):
    """A training checkpoint on disk: weights, optimizer, epoch."""
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(4, 8)).sum().backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}, tmp_path / "training.pt")
    return tmp_path / "training.pt"


def test_quantizing_touches_matrices_alone_and_gives_the_compressed_tensors_layout():
    state = mlp().state_dict()
    result = wb.ops.quantize(wb.open(state))
    assert {n for n in result if n not in state} == {"0.weight_scale", "2.weight_scale"}
    assert (result["0.weight"].dtype.name, result["0.weight_scale"].shape) == ("int8", (16, 1))
    for name in ("0.weight", "2.weight"):
        scale = state[name].abs().amax(1, keepdim=True) / 127
        assert torch.allclose(result[f"{name}_scale"].load(), scale)
        assert torch.equal(result[name].load(), torch.round(state[name] / result[f"{name}_scale"].load()).to(torch.int8))
    assert all(same(result[n].load(), state[n]) for n in state if n not in ("0.weight", "2.weight"))


def test_a_channel_of_zeros_has_scale_one_and_stays_zero():
    result = wb.ops.quantize(wb.open({"w": torch.tensor([[0.0, 0.0], [1.0, -2.0]])}))
    assert result["w_scale"].load()[0] == 1
    assert result["w"].load().tolist() == [[0, 0], [64, -127]]
    assert wb.ops.dequantize(result)["w"].load()[0].tolist() == [0, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_int8_cannot_express_are_refused_when_read(bad):
    with pytest.raises(SelectionError, match="NaN or Inf"):
        wb.ops.quantize(wb.open({"w": torch.tensor([[1.0, bad]])}))["w"].load()


@pytest.mark.parametrize("values", [[[1e60, 1.0]], [[1e39, -1e39]], [[1e-300, 1.0]]], ids=str)
def test_doubles_beyond_a_float_scale_are_refused_or_kept_within_the_bound(values):
    w = torch.tensor(values, dtype=torch.float64)
    result = wb.ops.quantize(wb.open({"w": w}))
    try:
        q, s = result["w"].load().double(), result["w_scale"].load().double()
    except SelectionError:
        return
    assert torch.isfinite(s).all()
    assert ((w - q * s).abs() <= s * 0.5001).all()


@pytest.mark.parametrize("units", [1, 2, 63, 127, 190, 255, 1000])
def test_subnormal_channels_stay_within_the_bound(units):
    w = torch.tensor([[units * 2.0**-149, -(2.0**-149), 0.0]])
    result = wb.ops.quantize(wb.open({"w": w}))
    q, s = result["w"].load().double(), result["w_scale"].load().double()
    assert ((w.double() - q * s).abs() <= s / 2).all()


def test_quantizing_twice_is_refused():
    once = wb.ops.quantize(wb.open({"w": torch.ones(2, 2), "v": torch.ones(2, 2)}), names="w")
    with pytest.raises(SelectionError):
        wb.ops.quantize(once, names="w")
    with pytest.raises(SelectionError, match="taken"):
        wb.ops.quantize(wb.open({"w": torch.ones(2, 2), "w_scale": torch.ones(1)}))


def test_dequantizing_what_was_not_quantized_is_refused():
    with pytest.raises(SelectionError):
        wb.ops.dequantize(wb.open({"w": torch.ones(2, 2)}))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_double_beyond_the_new_range_raises(dtype):
    with pytest.raises(SelectionError, match=r"1e\+300"):
        wb.ops.cast(wb.open({"w": torch.tensor([1e300], dtype=torch.float64)}), dtype)["w"].load()


@pytest.mark.parametrize(
    ("dtype", "fits", "beyond"),
    [("float16", 65519, 65520), ("bfloat16", 3.39e38, 3.4e38), ("float8_e4m3fn", 463, 465), ("float8_e4m3fnuz", 247, 249), ("float8_e5m2", 61439, 61441),
     ("float8_e4m3fn", float("nan"), float("inf"))],
)  # fmt: skip
def test_a_value_that_a_cast_changes_beyond_rounding_is_refused(dtype, fits, beyond):
    held = wb.ops.cast(wb.open({"w": torch.tensor([fits, -3.0])}), dtype)["w"].load().float()
    largest = torch.finfo(getattr(torch, dtype)).max
    assert torch.equal(held.nan_to_num(), torch.tensor([fits, -3.0]).clamp(max=largest).nan_to_num())
    ckpt = wb.open({"w": torch.tensor([1.0, -beyond])})
    with pytest.raises(SelectionError, match=f"does not fit {dtype}"):
        wb.ops.cast(ckpt, dtype)["w"].load()
    assert wb.ops.cast(ckpt, dtype, overflow="allow")["w"].load()[0] == 1


def test_a_product_of_dequantizing_that_does_not_fit_is_refused():
    with pytest.raises(SelectionError, match="does not fit float16"):
        wb.ops.dequantize(wb.ops.quantize(wb.open({"w": torch.full((1, 2), 1e6)})), "float16")["w"].load()


def test_casting_nothing_floating_is_refused():
    with pytest.raises(SelectionError):
        wb.ops.cast(wb.open({"n": torch.arange(3)}), "float16")


@pytest.mark.parametrize(
    ("mapping", "expected"),
    [
        ({"module.*": "*"}, ["a.w", "b.w", "other"]),
        ({"module.a.*": "x.*", "module.*": "*"}, ["x.w", "b.w", "other"]),
        ({"*": "net.*"}, ["net.module.a.w", "net.module.b.w", "net.other"]),
        ({"other": "head"}, ["module.a.w", "module.b.w", "head"]),
        (lambda name: name.upper(), ["MODULE.A.W", "MODULE.B.W", "OTHER"]),
    ],
    ids=["strip", "first rule wins", "add", "one", "function"],
)
def test_renames_do_what_they_say(mapping, expected):
    ckpt = wb.open({"module.a.w": torch.ones(1), "module.b.w": torch.ones(2), "other": torch.ones(3)})
    result = wb.ops.rename(ckpt, mapping)
    assert list(result) == expected
    assert [t.shape for t in result.values()] == [(1,), (2,), (3,)]


@pytest.mark.parametrize("mapping", [{"nope.*": "*"}, {"a": "b"}, {"*.*.*": "*"}], ids=["matches nothing", "collides", "two stars"])
def test_a_rename_that_cannot_be_is_refused(mapping):
    with pytest.raises(SelectionError):
        wb.ops.rename(wb.open({"a": torch.ones(1), "b": torch.ones(1)}), mapping)


@pytest.mark.parametrize("new", [None, 3])
def test_a_name_that_is_no_text_is_refused_and_a_wrappers_name_alone_stays(new):
    with pytest.raises(SelectionError, match="is no name"):
        wb.ops.rename(wb.open({"a": torch.ones(1)}), lambda name: new)
    assert list(wb.ops.strip_wrappers(wb.open({"_orig_mod": torch.ones(1)}))) == ["_orig_mod"]


@pytest.mark.parametrize("everything", [False, True])
def test_a_rename_never_loses_a_tensor_or_another_value(everything):
    ckpt = wb.open({"w": torch.ones(3), "epoch": 3})
    with pytest.raises(SelectionError):
        wb.ops.rename(ckpt, {"w": "epoch"}, everything=everything)
    nested = wb.open({"model": {"w": torch.ones(3)}, "epoch": 3})
    with pytest.raises(SelectionError):
        wb.ops.rename(nested, {"model.w": "epoch"}, everything=True)


def test_metadata_is_renamed_along_and_torch_still_reads_it(tmp_path):
    model = mlp()
    torch.save(model.state_dict(), tmp_path / "m.pt")
    wb.save(wb.ops.add_prefix(wb.open(tmp_path / "m.pt"), "net."), tmp_path / "n.pt")
    loaded = torch.load(tmp_path / "n.pt", weights_only=True)
    assert loaded._metadata["net.1"] == {"version": 2}
    wrapper = torch.nn.ModuleDict({"net": mlp()})
    assert wrapper.load_state_dict(loaded)


def test_ops_on_a_training_checkpoint_keep_all_the_rest(training, tmp_path):
    result = wb.ops.cast(wb.open(training), "bfloat16")
    wb.save(result, tmp_path / "half.pt")
    before, after = torch.load(training, weights_only=True), torch.load(tmp_path / "half.pt", weights_only=True)
    assert after["epoch"] == 3
    assert after["optimizer"]["param_groups"] == before["optimizer"]["param_groups"]
    assert all(same(after["optimizer"]["state"][i][k], t) for i, held in before["optimizer"]["state"].items() for k, t in held.items())
    assert all(same(after["model"][n], t.bfloat16() if t.is_floating_point() else t) for n, t in before["model"].items())
    assert after["model"]._metadata == before["model"]._metadata


def test_another_section_or_everything_can_be_named(training):
    ckpt = wb.open(training)
    only = wb.ops.cast(ckpt, "float64", section="optimizer")
    assert {t.dtype.name for t in only.section("model").values()} == {"float32", "int64"}
    assert all(t.dtype.name == "float64" for t in only.section("optimizer").values())
    everything = wb.ops.cast(ckpt, "float64", everything=True)
    assert {t.dtype.name for t in everything.values()} == {"float64", "int64"}
    with pytest.raises(SelectionError):
        wb.ops.cast(ckpt, "float64", section="model", everything=True)


def test_history_tells_the_ops_in_order():
    result = wb.ops.cast(wb.ops.add_prefix(wb.open({"w": torch.ones(2, 2)}), "m."), "float16")
    assert [step.op for step in result.history] == ["rename", "cast"]


def test_an_op_reads_nothing_until_its_values_are_wanted(tmp_path):
    torch.save({"w": torch.ones(2, 2)}, tmp_path / "w.pt")
    ckpt = wb.ops.quantize(wb.ops.cast(wb.open(tmp_path / "w.pt"), "float64"))
    (tmp_path / "w.pt").unlink()
    assert {n: (t.dtype.name, t.shape) for n, t in ckpt.items()} == {"w": ("int8", (2, 2)), "w_scale": ("float32", (2, 1))}
    with pytest.raises(wb.errors.MissingFileError):
        ckpt["w"].load()


def test_a_model_runs_the_same_after_a_round_trip_through_ops(tmp_path):
    model = mlp().eval()
    x = torch.randn(5, 8)
    restored = wb.ops.dequantize(wb.ops.quantize(wb.open(model)))
    wb.save(restored, tmp_path / "r.pt")
    again = mlp().eval()
    again.load_state_dict(torch.load(tmp_path / "r.pt", weights_only=True))
    assert (again(x) - model(x)).abs().max() < 0.05
