"""quantize and dequantize against a plain reference in torch, against compressed-tensors, and within their bounds."""

import json
import math

import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.compressors.pack_quantized import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationScheme
from hypothesis import assume, given
from hypothesis import strategies as st
from memory import peak_over_base

import workbench as wb
from workbench.errors import SelectionError
from workbench.ops.schemes import Scheme, fake_quantize

SCALED = [
    {"scheme": "int8"}, {"scheme": "int8", "per": "tensor"}, {"scheme": "int8", "group_size": 32}, {"scheme": "int8", "symmetric": False},
    {"scheme": "int8", "per": "tensor", "symmetric": False}, {"scheme": "int8", "group_size": 32, "symmetric": False},
    {"scheme": "int4", "group_size": 32}, {"scheme": "int4", "group_size": 32, "symmetric": False}, {"scheme": "int4", "group_size": 12, "symmetric": False},
    {"scheme": "int4", "per": "channel"}, {"scheme": "int4", "per": "channel", "symmetric": False}, {"scheme": "int4", "per": "tensor", "symmetric": False},
    {"scheme": "float8_e4m3fn"}, {"scheme": "float8_e4m3fn", "per": "tensor"}, {"scheme": "float8_e4m3fn", "group_size": 32},
    {"scheme": "float8_e5m2"}, {"scheme": "int4", "group_size": 32, "search": True}, {"scheme": "int8", "per": "tensor", "symmetric": False, "search": True},
]  # fmt: skip
SHAPES = [(16, 96), (13, 96), (1, 96), (5, 100), (3, 8, 96), (6, 4, 3, 3)]


def ids(value):
    return ", ".join(f"{v}" for v in value.values()) if isinstance(value, dict) else str(list(value))


def weights(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.rand(shape[0], *[1] * (len(shape) - 1), generator=generator).square()


def reference(w, told):
    """(codes one a value, scales, zero points) as the module docstring of `schemes` states them, span by span."""
    scheme, size = told["scheme"], told.get("group_size")
    per = told.get("per", "group" if size else "channel")
    least, most = {"int8": (-127 if told.get("symmetric", True) else -128, 127), "int4": (-8, 7)}.get(scheme, (None, None))
    spans = w.reshape(1, -1) if per == "tensor" else w.reshape(w.shape[0], -1) if per == "channel" else w.reshape(-1, size)
    codes, scales, zeros = [], [], []
    for span in spans:
        low, high = min(span.min(), torch.tensor(0.0)), max(span.max(), torch.tensor(0.0))
        zero = 0
        if least is None:
            scale = span.abs().max() / torch.finfo(getattr(torch, scheme)).max
            codes.append((span / scale).to(getattr(torch, scheme)))
        else:
            scale = max(high / most, low / least) if told.get("symmetric", True) else high / (most - least) - low / (most - least)
            zero = 0 if told.get("symmetric", True) else least - torch.round(low / scale).item()
            codes.append((torch.round(span / scale) + zero).clamp(least, most).to(torch.int8))
        scales.append(scale)
        zeros.append(int(zero))
    return torch.stack(codes), torch.stack(scales), torch.tensor(zeros)


def stored(result, name="l.weight"):
    return {n.removeprefix("l."): t.load() for n, t in result.items() if n.startswith(name)}


def quantized(w, told):
    """The result of quantizing one named matrix, or None where the scheme does not take the shape, which is refused."""
    if Scheme.of(told).refusal(tuple(w.shape), wb.open({"w": w})["w"].dtype):
        with pytest.raises(SelectionError, match="cannot be stored"):
            wb.ops.quantize(wb.open({"l.weight": w}), told, names="l.weight")
        return None
    return wb.ops.quantize(wb.open({"l.weight": w, "l.bias": w[0, 0].reshape(-1)}), told)


@pytest.mark.parametrize("shape", SHAPES, ids=ids)
@pytest.mark.parametrize("told", SCALED, ids=ids)
def test_values_bytes_and_specs_are_those_of_the_reference(told, shape, tmp_path):
    w = weights(shape)
    result = quantized(w, told)
    if result is None:
        return
    wb.save(result, tmp_path / "q.safetensors")
    result, scheme = wb.open(tmp_path / "q.safetensors"), Scheme.of(told)
    assert sum(t.nbytes for n, t in result.items() if n != "l.bias") == scheme.nbytes(shape, wb.open({"w": w})["w"].dtype)
    values = wb.ops.dequantize(result)["l.weight"].load()
    assert torch.equal(values, fake_quantize(w, scheme))
    if scheme.search:
        plain = fake_quantize(w, Scheme.of({**told, "search": False}))
        assert (values - w).square().sum() < (plain - w).square().sum() * (1 if scheme.name == "int4" else 1.000001)
        return
    codes, scales, zeros = reference(w, told)
    assert torch.equal(values, ((codes.float() - zeros[:, None]) * scales[:, None]).reshape(shape))
    parts = stored(result)
    assert torch.equal(parts["weight_scale"].reshape(-1), scales)
    if scheme.name != "int4":
        assert torch.equal(parts["weight"].view(torch.uint8), codes.reshape(shape).view(torch.uint8))


@pytest.mark.parametrize("shape", [(16, 96), (13, 96), (5, 100)], ids=ids)
@pytest.mark.parametrize("told", [told for told in SCALED if told["scheme"] != "float8_e5m2"], ids=ids)
def test_compressed_tensors_reads_the_very_values_and_packs_the_very_bytes(told, shape):
    w = weights(shape)
    result = quantized(w, told)
    if result is None:
        return
    config = wb.ops.quantization_config(result)["config_groups"]["group_0"]
    scheme, library = QuantizationScheme(**config), BaseCompressor.get_value_from_registry(config["format"])
    parts = stored(result)
    assert torch.equal(library.decompress(parts, scheme)["weight"], wb.ops.dequantize(result)["l.weight"].load())
    given = {key: value for key, value in parts.items() if key in ("weight_scale", "weight_zero_point")} | {"weight": w}
    if told["scheme"] == "int4" and given.get("weight_zero_point", w).dtype == torch.int32:
        outer = (shape[0], parts["weight_scale"].shape[1])
        given["weight_zero_point"] = unpack_from_int32(parts["weight_zero_point"], 4, outer, packed_dim=0)
    packed = library.compress(given, scheme)
    assert {key: (value.dtype, value.shape) for key, value in packed.items()} == {key: (v.dtype, v.shape) for key, v in parts.items()}
    assert all(torch.equal(value, parts[key]) for key, value in packed.items())


def test_experts_in_three_dimensions_pack_as_compressed_tensors_packs_them():
    w, told = weights((3, 16, 96)), {"scheme": "int4", "group_size": 32, "symmetric": False}
    parts = stored(quantized(w, told))
    zeros = unpack_from_int32(parts["weight_zero_point"], 4, (3, 16, 3), packed_dim=0)
    codes = unpack_from_int32(parts["weight_packed"], 4, (3, 16, 96))
    assert torch.equal(pack_to_int32(zeros.contiguous(), 4, packed_dim=0), parts["weight_zero_point"])
    spans = (codes.view(3, 16, 3, 32).float() - zeros[..., None]) * parts["weight_scale"][..., None]
    assert torch.equal(spans.view(3, 16, 96), fake_quantize(w, Scheme.of(told)))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_words_that_compressed_tensors_packed_are_read(bits):
    codes = torch.randint(-(1 << bits - 1), 1 << bits - 1, (6, 50), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    scale = torch.rand(6, 5).bfloat16()
    state = {"weight_packed": pack_to_int32(codes, bits), "weight_scale": scale, "weight_shape": torch.tensor([6, 50])}
    expected = (codes.view(6, 5, 10).float() * scale.float()[..., None]).view(6, 50)
    assert torch.equal(wb.ops.dequantize(wb.open(state))["weight"].load(), expected)
    half = BaseCompressor.get_value_from_registry("pack-quantized").decompress(
        state, QuantizationScheme(targets=["x"], weights={"num_bits": bits, "group_size": 10, "strategy": "group"})
    )["weight"]
    assert torch.equal(wb.ops.dequantize(wb.open(state), "bfloat16")["weight"].load(), half)


LLAMA = [{"scheme": "int8"}, {"scheme": "int8", "per": "tensor"}, {"scheme": "int4", "group_size": 32}, {"scheme": "float8_e4m3fn"}]


@pytest.mark.parametrize("options", [*({"scheme": told} for told in LLAMA), {"plan": {"*_proj.weight": "int8", "*.down_proj.weight": LLAMA[2], "lm_head.weight": "float8_e4m3fn"}},
                                     {"scheme": {**LLAMA[2], "symmetric": False}}], ids=str)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_transformers_loads_what_was_saved_beside_its_config(options, tmp_path):
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        tie_word_embeddings=False, dtype="float32", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    exclude = "model.embed_tokens.weight" if "int4" in str(options.get("scheme")) else None  # transformers wants an embedding's `weight`
    result = wb.ops.quantize(wb.open(model), **options, exclude=exclude)
    wb.save(result, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps({**config.to_dict(), "quantization_config": wb.ops.quantization_config(wb.open(tmp_path / "model.safetensors"))})
    )
    # their compressed module lacks the packed zero points of a meta device, so that an asymmetric int4 file loads dequantized alone
    dense = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if "symmetric" in options.get("scheme", {}) else {}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **dense)
    model.load_state_dict({name: tensor.load() for name, tensor in wb.ops.dequantize(wb.open(tmp_path / "model.safetensors")).items()})
    tokens = torch.arange(12).view(2, 6)
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)


# bounds


@st.composite
def matrices(draw):
    rows, groups = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    values = draw(st.lists(st.one_of(st.sampled_from([0.0, -0.0, 1.0]), st.floats(-1e4, 1e4, width=32)), min_size=1, max_size=40))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    numel = rows * groups * 16
    return torch.tensor((values * numel)[:numel]).reshape(rows, -1).to(dtype) * draw(st.sampled_from([1.0, 1e-3, 2**-10]))


@given(w=matrices(), per=st.sampled_from(["tensor", "channel", "group"]), symmetric=st.booleans(), name=st.sampled_from(["int8", "int4"]))
def test_integers_stay_within_half_a_scale(w, per, symmetric, name):
    assume(torch.isfinite(w).all() and (name == "int8" or w.shape[1] > 8))
    result = wb.ops.quantize(wb.open({"w": w}), name, per=per, group_size=16 if per == "group" else None, symmetric=symmetric)
    scale = result["w_scale"].load().double().reshape(-1, 1)
    lost = (wb.ops.dequantize(result, "float64")["w"].load().reshape(len(scale), -1) - w.double().reshape(len(scale), -1)).abs()
    assert (lost <= scale / 2 + scale * 256 * 2.0**-23).all()


@given(w=matrices(), per=st.sampled_from(["tensor", "channel", "group"]), name=st.sampled_from(["float8_e4m3fn", "float8_e5m2"]))
def test_floats_stay_within_half_a_step(w, per, name):
    assume(torch.isfinite(w).all())
    result = wb.ops.quantize(wb.open({"w": w}), name, per=per, group_size=16 if per == "group" else None)
    scale, info = result["w_scale"].load().double().reshape(-1, 1), torch.finfo(getattr(torch, name))
    spans = w.double().reshape(len(scale), -1)
    lost = (wb.ops.dequantize(result)["w"].load().double().reshape(len(scale), -1) - spans).abs()
    smallest = info.smallest_normal * info.eps
    assert (lost <= torch.maximum(spans.abs() * info.eps / 2, scale * smallest / 2) + spans.abs() * 2.0**-22 + 1e-45).all()


@given(
    w=matrices(),
    told=st.sampled_from(
        [{"scheme": "int4", "group_size": 16}, {"scheme": "int8", "symmetric": False}, {"scheme": "float8_e4m3fn", "per": "tensor"}]
    ),
)
def test_a_search_is_never_worse_than_the_full_range(w, told):
    assume(torch.isfinite(w).all())
    lost = [(fake_quantize(w, Scheme.of({**told, "search": search})).double() - w.double()).square().sum() for search in (False, True)]
    assert lost[1] <= lost[0] * (1 + 1e-6)


# long spans, layouts of others


@pytest.mark.parametrize("told", [*SCALED[:2], SCALED[4], SCALED[9], SCALED[10], SCALED[11], SCALED[12], SCALED[17]], ids=ids)
def test_spans_that_are_read_in_pieces_give_the_same(told, tmp_path, monkeypatch):
    w = weights((3, 40))
    first, values = stored(quantized(w, told)), wb.ops.dequantize(quantized(w, told))["l.weight"].load()
    monkeypatch.setattr("workbench.ops.quantization._SPAN_NUMEL", 8)
    monkeypatch.setattr("workbench.tensors.HOT_NBYTES", 128)
    again = quantized(w, told)
    assert all(torch.equal(value.view(torch.uint8), first[key].view(torch.uint8)) for key, value in stored(again).items())
    assert torch.equal(wb.ops.dequantize(again)["l.weight"].load(), values)


WARM = 'told = {"scheme": "int4", "group_size": 32, "symmetric": False}; wb.save(wb.ops.quantize(wb.open({"w": torch.randn(64, 64)}), told), sys.argv[2])'
SAVE = 'wb.save(wb.ops.quantize(wb.open(sys.argv[1]), {told}, names="w"), sys.argv[2], max_ram_mb=64); wb.save(wb.ops.dequantize(wb.open(sys.argv[2])), sys.argv[3], max_ram_mb=64)'


@pytest.mark.parametrize(
    ("told", "shape"),
    [(SCALED[7], (1, 2**25)), (SCALED[7], (2**12, 2**13)), (SCALED[10], (1, 2**25)), ({"scheme": "float8_e4m3fn"}, (2**25,))],
    ids=ids,
)
def test_quantizing_and_back_stays_within_the_budget_whatever_the_shape(told, shape, tmp_path):
    wb.save(wb.open({"w": torch.arange(2**25, dtype=torch.float32).remainder_(997).view(shape)}), tmp_path / "w.safetensors")
    paths = tmp_path / "w.safetensors", tmp_path / "q.safetensors", tmp_path / "d.safetensors"
    assert peak_over_base(WARM, SAVE.replace("{told}", repr(told)), *paths) <= 64


def test_scales_read_alone_take_no_more_than_a_block_of_the_matrix():
    told = 'q = wb.ops.quantize(wb.open({"w": torch.ones(2**12, 2**12)}))'
    assert peak_over_base(told, 'sum(float(chunk.sum()) for _, chunk in q["w_scale"].chunks())') < 24


FOREIGN = {
    "act order": {"w_packed": torch.zeros(4, 4, dtype=torch.int32), "w_scale": torch.ones(4, 1), "w_shape": torch.tensor([4, 32]), "w_g_idx": torch.arange(32)},
    "blocks": {"w": torch.ones(256, 256).to(torch.float8_e4m3fn), "w_scale": torch.ones(2, 2)},
    "one axis of a square": {"w": torch.ones(4, 4, dtype=torch.int8), "w_scale": torch.ones(4)},
    "columns": {"w": torch.ones(4, 6, dtype=torch.int8), "w_scale": torch.ones(6)},
    "a lying shape": {"w_packed": torch.zeros(4, 4, dtype=torch.int32), "w_scale": torch.ones(4, 1), "w_shape": torch.tensor([4, 2**62])},
    "a negative shape": {"w_packed": torch.zeros(4, 4, dtype=torch.int32), "w_scale": torch.ones(4, 1), "w_shape": torch.tensor([4, -32])},
    "no shape": {"w_packed": torch.zeros(4, 4, dtype=torch.int32), "w_scale": torch.ones(4, 1)},
    "4-bit floats": {"w_packed": torch.zeros(4, 16, dtype=torch.uint8), "w_scale": torch.ones(4, 2), "w_global_scale": torch.ones(1)},
    "zero points of another shape": {"w": torch.ones(4, 6, dtype=torch.int8), "w_scale": torch.ones(4, 1), "w_zero_point": torch.zeros(2, 1, dtype=torch.int8)},
    "rows that may be of 2, 4 or 8 bits": {"w_packed": torch.zeros(4, 1, dtype=torch.int32), "w_scale": torch.ones(4, 1), "w_shape": torch.tensor([4, 3])},
}  # fmt: skip


@pytest.mark.parametrize("what", FOREIGN)
def test_what_is_not_known_beyond_doubt_is_refused_alone_and_told_beside_others(what):
    with pytest.raises(SelectionError, match="cannot be dequantized"):
        wb.ops.dequantize(wb.open(FOREIGN[what]))
    both = wb.ops.dequantize(wb.open({**FOREIGN[what], "v": torch.ones(2, 3, dtype=torch.int8), "v_scale": torch.ones(2, 1)}))
    assert {"v", *FOREIGN[what]} == set(both)
    assert [f.kind for f in both.findings] == ["left quantized"]


# which tensors


def test_a_plan_mixes_schemes_and_its_last_entry_counts():
    state = {name: weights((8, 64)) for name in ("a.weight", "b.weight", "lm_head.weight")} | {"a.bias": torch.ones(8)}
    plan = {"*.weight": "int8", "b.weight": Scheme("float16"), "lm_head.*": {"scheme": "int4", "group_size": 32}}
    result = wb.ops.quantize(wb.open(state), plan=plan, exclude="a.*")
    assert list(result) == ["a.weight", "b.weight", "lm_head.weight_packed", "lm_head.weight_scale", "lm_head.weight_shape", "a.bias"]
    assert [result[n].dtype.name for n in ("a.weight", "b.weight")] == ["float32", "float16"]
    step = result.history[-1]
    again = wb.ops.quantize(wb.open(state), **json.loads(json.dumps(step.params)))
    assert {n: t.spec for n, t in again.items()} == {n: t.spec for n, t in result.items()}


def test_what_a_scheme_cannot_take_is_told_or_refused_where_it_is_named():
    state = {"a": weights((8, 64)), "b": weights((8, 60)), "norm": torch.ones(64), "n": torch.arange(3)}
    result = wb.ops.quantize(wb.open(state), "int4", group_size=32, names="*")
    assert set(result) == {"a_packed", "a_scale", "a_shape", "b", "norm", "n"}
    assert {tuple(f.where["tensors"]) for f in result.findings} == {("b",), ("norm",)}
    for name in ("b", "norm"):
        with pytest.raises(SelectionError, match=name):
            wb.ops.quantize(wb.open(state), "int4", group_size=32, names=["a", name])


REFUSED = [
    {"scheme": "int3"}, {"scheme": {"schema": "int8"}}, {"scheme": {"scheme": "int8", "grup_size": 4}}, {"per": "row"}, {"group_size": 0}, {"per": "channel", "group_size": 8},
    {"scheme": "bfloat16", "per": "tensor"}, {"scheme": "float8_e4m3fn", "symmetric": False}, {"scheme": Scheme("int8"), "search": True}, {"plan": {"w": "int8"}, "names": "w"},
    {"plan": {"nothing": "int8"}}, {"exclude": "nothing"}, {"exclude": "*"}, {"names": "w", "group_size": 7}, {"scheme": "int8", "names": "n"},
]  # fmt: skip


@pytest.mark.parametrize("options", REFUSED, ids=str)
def test_options_that_cannot_be_are_refused(options):
    with pytest.raises(SelectionError):
        wb.ops.quantize(wb.open({"w": torch.ones(4, 16), "n": torch.arange(3)}), **options)


@pytest.mark.parametrize("told", ["int8", "int4", "float16", {"scheme": "int4", "group_size": 32, "symmetric": False}], ids=str)
def test_tied_tensors_stay_tied_and_a_tie_that_ends_is_told(told, tmp_path):
    w = weights((8, 128))
    ckpt = wb.open({"embed.weight": w, "other.weight": weights((8, 128), 1), "head.weight": w})
    result = wb.ops.quantize(ckpt, told)
    assert all(first == alias.replace("head", "embed") for alias, first in result.aliases.items())
    assert len(result.aliases) == sum(name.startswith("head") for name in result)
    wb.save(result, tmp_path / "t.safetensors")
    assert (
        torch.equal(wb.ops.dequantize(wb.open(tmp_path / "t.safetensors"))["head.weight"].load(), fake_quantize(w, Scheme.of(told)))
        if told != "float16"
        else True
    )
    ended = wb.ops.quantize(ckpt, told, exclude="head.*")
    assert [f.kind for f in ended.findings] == ["tie ended"]


def test_what_is_quantized_already_is_left_alone():
    once = wb.ops.quantize(wb.open({"a.weight": weights((8, 64)), "b.weight": weights((8, 64))}), names="a.weight")
    assert wb.ops.quantize(once, "int4", group_size=32)["a.weight_scale"] == once["a.weight_scale"]
    fp8 = wb.ops.quantize(wb.open({"a.weight": weights((8, 64)), "b.weight": weights((8, 64))}), "float8_e4m3fn", names="a.weight")
    with pytest.raises(SelectionError, match="already"):
        wb.ops.quantize(fp8, "int4", group_size=32, names="a.weight")


@pytest.mark.parametrize("told", [SCALED[0], SCALED[7], SCALED[10]], ids=ids)
def test_ops_follow_each_other_whatever_their_rows(told, tmp_path):
    w = weights((13, 96))
    chain = wb.ops.quantize(wb.ops.dequantize(wb.ops.quantize(wb.open({"w": w}), "int4", group_size=24)), told)
    wb.save(chain, tmp_path / "c.safetensors")
    expected = fake_quantize(fake_quantize(w, Scheme("int4", group_size=24)), Scheme.of(told))
    assert torch.equal(wb.ops.dequantize(wb.open(tmp_path / "c.safetensors"))["w"].load(), expected)


@pytest.mark.parametrize("told", ["int8", "int4", "float8_e5m2", {"scheme": "int4", "symmetric": False}], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_no_scale_reaches_are_refused_with_the_tensors_name(told, bad, tmp_path):
    w = torch.ones(2, 128)
    w[1, 3] = bad
    with pytest.raises(SelectionError, match=r"NaN or Inf(?s:.*)x\.weight"):
        wb.save(wb.ops.quantize(wb.open({"x.weight": w}), told), tmp_path / "x.safetensors")


@pytest.mark.parametrize("told", [*SCALED, {"scheme": "int4"}, {"scheme": "int8", "group_size": 128}, {"scheme": "float32"}], ids=ids)
def test_a_scheme_survives_json(told):
    scheme = Scheme.of(told)
    assert Scheme.of(json.loads(json.dumps(scheme.to_dict()))) == scheme == Scheme.of(scheme)
    assert scheme.to_dict() == told


@pytest.mark.parametrize(
    "state",
    [{"w": torch.ones(2, 8)}, {"a.weight": torch.ones(4, 2, 3, 3)}, {"bare": torch.ones(4, 16)}],
    ids=["none", "convolution", "no weight"],
)
def test_a_config_is_refused_where_compressed_tensors_would_not_load_it(state):
    ckpt = wb.open(state)
    with pytest.raises(SelectionError, match=r"no tensor|no way"):
        wb.ops.quantization_config(ckpt if "w" in state else wb.ops.quantize(ckpt))
    with pytest.raises(SelectionError, match="e5m2"):
        wb.ops.quantization_config(wb.ops.quantize(wb.open({"a.weight": torch.ones(4, 16)}), "float8_e5m2"))
