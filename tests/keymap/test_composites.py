"""Composites: every formula against torch's own modules or against loops over single elements; what cannot be known is doubted.

peft, bitsandbytes, AutoGPTQ, AutoAWQ and compressed-tensors are not needed here: their layouts are packed below, element by element.
"""

import json
import math
import subprocess
import sys
from random import Random

import numpy as np
import pytest
import torch
from torch.nn.utils import parametrizations, parametrize, prune, remove_weight_norm, spectral_norm, weight_norm

import workbench as wb
from workbench.keymap.composites import composites, decomposed, locked_raw
from workbench.keymap.maps import KeyMap, Pair, Part
from workbench.keymap.spellings import canonical
from workbench.keymap.values import FORMULAS, formula_code, made

SEEN = set()


def found(tensors, config=None):
    return {made.name: made for made in composites(dict(wb.open(tensors).weights.items()), config)}


def value(composite, tensors):
    """The composite's value as the library computes it; its code, run as people would, must give the same."""
    SEEN.add(composite.formula)
    pair = Pair(
        composite.name, tuple(map(Part, composite.parts)), composite.rule, composite.confidence, composite.reason,
        formula=composite.formula, params=json.loads(json.dumps(composite.params)),
    )  # fmt: skip
    out = made(pair, wb.open(tensors).weights).load()
    assert out.shape == composite.shape
    assert str(out.dtype) == f"torch.{composite.dtype}"
    scope = {"source": tensors, "torch": torch}
    assert torch.equal(eval(formula_code(pair, "source[{!r}]".format), {"torch": torch}, scope).nan_to_num(), out.nan_to_num())
    assert KeyMap((pair,)).apply(tensors)[composite.name].load().nan_to_num().equal(out.nan_to_num())
    return out


def holds(tensors, name, expected, formula, config=None, tol=1e-6):
    composite = found(tensors, config)[name]
    assert (composite.doubt, composite.formula) == ("", formula)
    out = value(composite, tensors)
    expected = torch.as_tensor(expected)
    assert torch.allclose(out.double(), expected.double(), rtol=tol, atol=tol * float(expected.abs().max()))
    assert composite.reason
    return composite


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def integers(low, high, *shape, dtype=torch.int64, seed=0):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# ---- parametrizations of torch

LAYERS = {
    "linear": lambda: torch.nn.Linear(5, 3),
    "one output": lambda: torch.nn.Linear(5, 1),
    "convolution": lambda: torch.nn.Conv1d(4, 6, 3),
    "transposed": lambda: torch.nn.ConvTranspose2d(4, 6, 3),
    "embedding": lambda: torch.nn.Embedding(7, 4),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("new", [False, True])
def test_weight_norm_is_removed_as_torch_removes_it(layer, dim, new):
    module = (parametrizations.weight_norm if new else weight_norm)(LAYERS[layer](), dim=dim)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter))
    tensors = {f"net.{name}": tensor.clone() for name, tensor in module.state_dict().items()}
    _ = parametrize.remove_parametrizations(module, "weight") if new else remove_weight_norm(module)
    assert holds(tensors, "net.weight", module.weight.detach(), "weight_norm").confidence == "certain"


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("new", [False, True])
def test_spectral_norm_gives_the_weight_of_eval_mode(layer, new):
    torch.manual_seed(3)
    module = (parametrizations.spectral_norm if new else spectral_norm)(LAYERS[layer]())
    size = {"linear": (2, 5), "one output": (2, 5), "convolution": (2, 4, 9), "transposed": (2, 4, 5, 5), "embedding": None}[layer]
    x = torch.randn(*size) if size else torch.tensor([1, 2])
    module(x)
    module.eval()(x)
    holds(module.state_dict(), "weight", module.weight.detach(), "spectral_norm")


def test_a_square_convolution_under_spectral_norm_waits_for_its_kind():
    module = spectral_norm(torch.nn.ConvTranspose1d(4, 4, 3))
    module.eval()(torch.ones(1, 4, 5))
    composite = found(module.state_dict())["weight"]
    assert composite.settled_by == "layer kind"
    assert "transposed" in composite.doubt
    settled = composite._replace(params={**composite.params, "dim": 1})
    assert torch.equal(value(settled, module.state_dict()), module.weight.detach())


def test_pruned_weights_and_biases():
    module = torch.nn.Linear(6, 4)
    prune.l1_unstructured(module, "weight", 0.5)
    prune.random_unstructured(module, "bias", 0.3)
    tensors = dict(module.state_dict())
    prune.remove(module, "weight")
    prune.remove(module, "bias")
    holds(tensors, "weight", module.weight.detach(), "product", tol=0)
    holds(tensors, "bias", module.bias.detach(), "product", tol=0)


def test_a_parametrization_of_another_kind_is_nothing_that_can_be_computed():
    tensors = parametrizations.orthogonal(torch.nn.Linear(6, 6)).state_dict()
    assert not found(tensors)
    assert all(spelling.role for spelling in canonical(tensors).values())
    stacked = parametrizations.spectral_norm(parametrizations.weight_norm(torch.nn.Linear(5, 3))).state_dict()
    assert not found(stacked)


def test_a_vector_beside_u_is_no_direction_of_weight_norm():
    assert found({"weight_orig": noise(3, 5), "weight_u": noise(3), "weight_v": noise(5)})["weight"].formula == "spectral_norm"
    assert not found({"weight_g": noise(3, 5), "weight_v": noise(3, 5)})
    assert found({"weight_g": noise(3, 1), "weight_v": noise(3, 5), "weight": noise(3, 5)})["weight"].doubt


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("new", [False, True])
def test_a_plain_weight_is_put_under_weight_norm_as_torch_puts_it(dim, new):
    layer = torch.nn.ConvTranspose1d(3, 4, 2)
    plain = {"weight": layer.weight.detach().clone()}
    target = {
        name: tensor.detach()
        for name, tensor in (parametrizations.weight_norm if new else weight_norm)(layer, dim=dim).state_dict().items()
    }
    made = decomposed({name: tuple(tensor.shape) for name, tensor in target.items()})
    assert len(made) == 2
    for composite in made:
        assert composite.parts == ("weight",)
        out = value(composite, plain) if composite.formula else plain["weight"]
        assert torch.allclose(out, target[composite.name], rtol=1e-6)


# ---- LoRA


def wrapped(adapter=".default", base="base_layer.", rank=2, zero=False):
    return {
        f"m.{base}weight": noise(6, 4), f"m.lora_A{adapter}.weight": noise(rank, 4, seed=1),
        f"m.lora_B{adapter}.weight": noise(6, rank, seed=2) * (not zero),
    }  # fmt: skip


def config(**options):
    return {"adapter_config.json": {"peft_type": "LORA", "r": 2, "lora_alpha": 3, **options}}


@pytest.mark.parametrize(
    "tensors", [wrapped(), wrapped(""), wrapped(".style"), wrapped(base="")], ids=["wrapped", "unnamed", "named", "old"]
)
def test_without_its_scale_an_adapter_is_doubted_and_with_it_merged(tensors):
    assert "lora_alpha" in found(tensors)["m.weight"].doubt
    base, a, b = (tensor.double() for tensor in tensors.values())
    holds(tensors, "m.weight", base + 1.5 * (b @ a), "lora", config())
    holds(tensors, "m.weight", base + 3 / math.sqrt(2) * (b @ a), "lora", config(use_rslora=True))
    holds(tensors, "m.weight", base + 5 * (b @ a), "lora", config(alpha_pattern={"m": 10}))


def test_adapters_of_convolutions_embeddings_and_turned_layers():
    a, b = noise(2, 4, 3, 3, seed=1), noise(6, 2, 1, 1, seed=2)
    tensors = {"c.base_layer.weight": noise(6, 4, 3, 3), "c.lora_A.x.weight": a, "c.lora_B.x.weight": b}
    delta = torch.einsum("or,rihw->oihw", b[..., 0, 0], a)
    holds(tensors, "c.weight", tensors["c.base_layer.weight"] + 1.5 * delta, "lora", config(), tol=1e-5)
    tensors = {"e.base_layer.weight": noise(9, 5), "e.lora_embedding_A.x": noise(2, 9, seed=1), "e.lora_embedding_B.x": noise(5, 2, seed=2)}
    base, a, b = tensors.values()
    holds(tensors, "e.weight", base + 1.5 * (b @ a).T, "lora_transposed", config())
    turned = {"m.base_layer.weight": noise(4, 4), "m.lora_A.weight": noise(2, 4, seed=1), "m.lora_B.weight": noise(4, 2, seed=2)}
    base, a, b = turned.values()
    holds(turned, "m.weight", base + 1.5 * (b @ a).T, "lora_transposed", config(fan_in_fan_out=True))


def test_an_adapter_at_zero_leaves_the_base():
    composite = found(wrapped(zero=True))["m.weight"]
    assert (composite.doubt, composite.formula, composite.parts) == ("", "", ("m.base_layer.weight",))


@pytest.mark.parametrize(
    ("extra", "options"),
    [
        ({"m.lora_magnitude_vector.default.weight": noise(6)}, {}),
        ({"m.lora_A.other.weight": noise(2, 4), "m.lora_B.other.weight": noise(6, 2)}, {}),
        ({}, {"use_dora": True}),
        ({"m.lora_B.default.weight": noise(6, 3)}, {}),
        ({}, {"r": 4}),
        ({}, {"rank_pattern": {"m": 4}}),
        ({}, {"peft_type": "ADALORA"}),
        ({}, {"use_qalora": True}),
        ({}, {"an_option_of_tomorrow": [1]}),
        ({}, {"init_lora_weights": "pissa_niter_4"}),
        ({}, {"lora_alpha": "3"}),
        ({}, {"lora_alpha": 10**400}),
        ({}, {"alpha_pattern": {"(m|m)*": 5}}),
        ({}, {"alpha_pattern": {"^m": 5}}),
        ({}, {"alpha_pattern": {"(": 5}}),
        ({}, {"alpha_pattern": ["m"]}),
    ],
    ids=[
        "DoRA", "two adapters", "DoRA by config", "ranks that differ", "another rank in the config", "and in its pattern", "another method",
        "another product", "an option that is not known", "a base that was changed", "a text", "no float", "a pattern that takes long",
        "a pattern from a root that is not there", "no pattern", "no patterns",
    ],
)  # fmt: skip
def test_adapters_that_no_formula_here_merges(extra, options):
    assert found({**wrapped(), **extra}, config(**options))["m.weight"].doubt


def test_of_a_square_matrix_the_others_tell_whether_the_one_flag_is_true():
    square = {"s.base_layer.weight": noise(4, 4), "s.lora_A.weight": noise(2, 4, seed=1), "s.lora_B.weight": noise(4, 2, seed=2)}
    turned = {"t.base_layer.weight": noise(4, 6), "t.lora_A.weight": noise(2, 4, seed=1), "t.lora_B.weight": noise(6, 2, seed=2)}
    base, a, b = square.values()
    holds({**square, **wrapped()}, "s.weight", base + 1.5 * (b @ a), "lora", config())
    holds({**square, **turned}, "s.weight", base + 1.5 * (b @ a).T, "lora_transposed", config(fan_in_fan_out=True))
    for beside, flag in ((turned, False), (wrapped(), True), ({**wrapped(), **turned}, False)):
        assert "square" in found({**square, **beside}, config(fan_in_fan_out=flag))["s.weight"].doubt


def test_the_config_beside_a_file_is_read_and_the_pair_says_so(tmp_path):
    model, tensors = torch.nn.ModuleDict({"m": torch.nn.Linear(4, 6, bias=False)}), wrapped()
    for path in (tmp_path, tmp_path / "adapter_model.safetensors", tmp_path / "weights.pt"):
        told = path != tmp_path / "weights.pt"
        torch.save(tensors, tmp_path / "weights.pt") if not told else wb.save(wb.open(tensors), tmp_path / "adapter_model.safetensors")
        (tmp_path / "adapter_config.json").write_text(json.dumps(config()["adapter_config.json"]) if told else "{no JSON")
        keymap = wb.match(path, model)
        if not told:
            assert "adapter_config.json" in keymap.ambiguous[0].reason
            continue
        (pair,) = keymap.pairs
        assert (pair.rule, pair.confidence) == ("LoRA merge", "likely")
        assert "lora_alpha 3 / 2 of adapter_config.json" in pair.reason
        base, a, b = tensors.values()
        assert torch.allclose(keymap.apply(path)["m.weight"].load(), base + 1.5 * b @ a)


def test_an_adapter_alone_makes_nothing():
    assert not found({name: tensor for name, tensor in wrapped().items() if "lora" in name})


# ---- codes and scales


def fp8(*shape, seed=0):
    return (noise(*shape, seed=seed) * 50).to(torch.float8_e4m3fn)


def by_element(codes, scale_of, shape):
    out = np.zeros(shape)
    for index in np.ndindex(*shape):
        out[index] = float(codes[index]) * float(scale_of(*index))
    return out


@pytest.mark.parametrize(
    ("shape", "scales", "scale_of"),
    [
        ((256, 128), (2, 1), lambda s, i, j: s[i // 128, j // 128]),
        ((199, 131), (2, 2), lambda s, i, j: s[i // 128, j // 128]),
        ((64, 32), (1,), lambda s, i, j: s[0]),
        ((64, 32), (), lambda s, i, j: s),
        ((64, 32), (64, 1), lambda s, i, j: s[i, 0]),
        ((64, 32), (64, 4), lambda s, i, j: s[i, j // 8]),
        ((64, 32), (64,), lambda s, i, j: s[i]),
        ((3, 8, 16), (3, 1, 16), lambda s, e, i, j: s[e, 0, j]),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_scales_for_all_rows_groups_and_blocks(shape, scales, scale_of, kind):
    codes = fp8(*shape) if kind == "fp8" else integers(-127, 128, *shape, dtype=torch.int8)
    tensors = {"m.weight": codes, "m.weight_scale": noise(*scales, seed=1).abs() + 0.1, "m.bias": noise(4), "m.input_scale": noise(1)}
    if kind == "fp8":
        tensors["m.weight_scale_inv"] = tensors.pop("m.weight_scale")
    scale = tensors.get("m.weight_scale", tensors.get("m.weight_scale_inv"))
    holds(tensors, "m.weight", by_element(codes, lambda *at: scale_of(scale, *at), shape), "scale")
    assert "m.weight" in locked_raw(wb.open(tensors).weights, found(tensors).values())


def test_a_zero_point_is_taken_off_before_the_scale():
    codes, zeros, scale = integers(-128, 128, 8, 6, dtype=torch.int8), integers(-9, 9, 8, 1, dtype=torch.int8, seed=1), noise(8, 1).abs()
    tensors = {"m.weight": codes, "m.weight_scale": scale, "m.weight_zero_point": zeros}
    holds(tensors, "m.weight", (codes.double() - zeros.double()) * scale.double(), "scale_shift")


def test_half_precision_scales_give_half_precision_weights():
    tensors = {"m.weight": integers(-127, 128, 8, 6, dtype=torch.int8), "m.weight_scale": noise(8, 1).to(torch.bfloat16)}
    composite = found(tensors)["m.weight"]
    assert composite.dtype == "bfloat16"
    assert torch.equal(value(composite, tensors), tensors["m.weight"].to(torch.bfloat16) * tensors["m.weight_scale"])


def test_exponents_as_scales():
    codes, exponents = fp8(4, 64), torch.tensor([[20, 30], [240, 127], [90, 160], [60, 239]], dtype=torch.uint8)
    expected = by_element(codes, lambda i, j: 2.0 ** (int(exponents[i, j // 32]) - 127), (4, 64))
    holds({"m.weight": codes, "m.weight_scale": exponents}, "m.weight", expected, "scale_exponent", tol=0)
    holds({"m.weight": codes, "m.weight_scale_inv": exponents.view(torch.float8_e8m0fnu)}, "m.weight", expected, "scale", tol=0)


E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]


def half_byte(codes, row, column):
    byte = int(codes[row, column // 2]) & 255
    return E2M1[byte >> 4 if column % 2 else byte & 15]


def test_four_bit_floats_two_in_a_byte():
    codes, exponents = integers(0, 256, 4, 32, dtype=torch.uint8), integers(100, 140, 4, 2, dtype=torch.uint8)
    expected = np.array([[half_byte(codes, i, j) * 2.0 ** (int(exponents[i, j // 32]) - 127) for j in range(64)] for i in range(4)])
    holds(
        {"m.weight": codes.view(torch.int8), "m.weight_scale_inv": exponents.view(torch.float8_e8m0fnu)}, "m.weight", expected, "fp4", tol=0
    )
    holds({"m.weight_packed": codes, "m.weight_scale": exponents}, "m.weight", expected, "fp4", tol=0)
    blocks = codes.reshape(2, 2, 2, 16)
    stacked = torch.as_tensor(expected).reshape(2, 2, 64)
    holds({"b.mlp1_weight.blocks": blocks, "b.mlp1_weight.scales": exponents.reshape(2, 2, 2)}, "b.mlp1_weight", stacked, "fp4", tol=0)
    holds({"b.up_proj_blocks": blocks, "b.up_proj_scales": exponents.reshape(2, 2, 2)}, "b.up_proj", stacked.mT, "fp4_transposed", tol=0)


def test_four_bit_floats_with_two_scales():
    codes, scales, factor = integers(0, 256, 4, 32, dtype=torch.uint8), noise(4, 4).abs().to(torch.float8_e4m3fn), torch.tensor([0.25])
    plain = np.array([[half_byte(codes, i, j) * float(scales[i, j // 16]) for j in range(64)] for i in range(4)])
    holds({"m.weight": codes, "m.weight_scale": scales, "m.weight_scale_2": factor}, "m.weight", plain / 4, "nvfp4", tol=0.01)
    holds(
        {"m.weight_packed": codes, "m.weight_scale": scales, "m.weight_global_scale": factor},
        "m.weight",
        plain * 4,
        "nvfp4_divided",
        tol=0.01,
    )


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(8, 24), (5, 7)])
def test_bitsandbytes_four_bit(nested, shape):
    count, block = math.prod(shape), 16
    index, table = integers(0, 16, count), noise(16).sort().values
    padded = [*index.tolist(), 0][: count + count % 2]
    packed = torch.tensor([[padded[i] << 4 | padded[i + 1]] for i in range(0, len(padded), 2)], dtype=torch.uint8)
    absmax, state = noise(-(-count // block), seed=4).abs(), {"quant_type": "nf4", "blocksize": block, "dtype": "bfloat16", "shape": shape}
    tensors = {"m.weight": packed, "m.weight.quant_map": table}
    if nested:
        codes, outer_table, outer = (
            integers(0, 256, len(absmax), dtype=torch.uint8),
            noise(256, seed=7),
            noise(-(-len(absmax) // 4), seed=8),
        )
        absmax = torch.tensor([float(outer_table[int(code)]) * float(outer[i // 4]) + 0.5 for i, code in enumerate(codes)])
        tensors |= {"m.weight.absmax": codes, "m.weight.nested_absmax": outer, "m.weight.nested_quant_map": outer_table}
        state |= {"nested_blocksize": 4, "nested_offset": 0.5, "nested_dtype": "float32"}
    else:
        tensors["m.weight.absmax"] = absmax
    tensors["m.weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    expected = torch.tensor([float(table[i]) * float(absmax[at // block]) for at, i in enumerate(index.tolist())]).reshape(shape)
    composite = holds(tensors, "m.weight", expected, "bnb_4bit_nested" if nested else "bnb_4bit", tol=0.01)
    assert composite.dtype == "bfloat16"
    tensors["m.weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(b'{"shape": [3]}'), dtype=torch.uint8)
    assert found(tensors)["m.weight"].doubt


def test_bitsandbytes_int8():
    codes, scb = integers(-127, 128, 6, 4, dtype=torch.int8), noise(6).abs()
    tensors = {"m.weight": codes, "m.SCB": scb, "m.weight_format": torch.tensor(0, dtype=torch.uint8)}
    holds(tensors, "m.weight", by_element(codes, lambda i, j: scb[i] / 127, (6, 4)), "int8_scb")
    assert found({**tensors, "m.weight_format": torch.tensor(2, dtype=torch.uint8)})["m.weight"].doubt


def words(numbers, bits, order=None):
    """Rows of small numbers -> rows of int32 words, the first number in the lowest bits."""
    per = 32 // bits
    out = []
    for row in numbers.tolist():
        row = row + [0] * (-len(row) % per)
        packed = [sum(row[at + (order[k] if order else k)] << bits * k for k in range(per)) for at in range(0, len(row), per)]
        out.append([word - (1 << 32) * (word >> 31) for word in packed])
    return torch.tensor(out, dtype=torch.int32)


def gptq(bits, shift, symmetric=False, act_order=True, columns=64, rows=32, groups=4):
    codes, scales = integers(0, 1 << bits, columns, rows), noise(groups, rows, seed=1).abs()
    zeros = integers(1, 1 << bits, groups, rows, seed=2) if not symmetric else torch.full((groups, rows), 1 << bits - 1)
    group = torch.arange(columns) // (columns // groups)
    if act_order:
        group = group[torch.randperm(columns, generator=torch.Generator().manual_seed(3))]
    tensors = {"m.qweight": words(codes.T, bits).T.contiguous(), "m.qzeros": words(zeros - shift, bits), "m.scales": scales.half()}
    if act_order:
        tensors["m.g_idx"] = group.int()
    expected = np.zeros((rows, columns))
    for i, j in np.ndindex(columns, rows):
        expected[j, i] = (int(codes[i, j]) - int(zeros[group[i], j])) * float(scales[group[i], j].half())
    return tensors, expected


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(("shift", "told"), [(1, "gptq"), (0, "gptq_v2")])
def test_gptq_of_both_versions(bits, act_order, shift, told):
    formula = "gptq" if act_order else "gptq_in_order"
    tensors, expected = gptq(bits, shift, act_order=act_order)
    assert "v1" in found(tensors)["m.weight"].doubt  # from its tensors alone, nobody can tell
    holds(tensors, "m.weight", expected, formula, {"quantization_config": {"checkpoint_format": told}}, tol=1e-3)
    tensors, expected = gptq(bits, shift, symmetric=True, act_order=act_order)
    holds(tensors, "m.weight", expected, formula, tol=1e-3)  # zeros at half the range tell
    wrong = {"quantization_config": {"checkpoint_format": "gptq_v2" if shift else "gptq"}}
    assert found(tensors, wrong)["m.weight"].doubt


def test_a_gptq_zero_that_its_readers_do_not_agree_on_is_refused():
    tensors, _ = gptq(4, 1)
    tensors["m.qzeros"] = torch.full_like(tensors["m.qzeros"], -1)
    composite = found(tensors, {"checkpoint_format": "gptq"})["m.weight"]
    with pytest.raises(wb.errors.CorruptFileError, match="zero point"):
        value(composite, tensors)


@pytest.mark.parametrize("bits", [3, 5])
def test_gptq_codes_that_straddle_words_are_refused(bits):
    tensors = {
        "m.qweight": torch.zeros(64 * bits // 32, 32, dtype=torch.int32),
        "m.qzeros": torch.zeros(4, bits, dtype=torch.int32),
        "m.scales": noise(4, 32),
    }
    assert found(tensors)["m.weight"].doubt
    assert locked_raw(wb.open(tensors).weights, composites(wb.open(tensors).weights)).keys() == {"m.qweight", "m.qzeros"}


@pytest.mark.parametrize("rows", [32, 64])
def test_awq(rows):
    order, columns, groups = [0, 2, 4, 6, 1, 3, 5, 7], 64, 4
    codes, zeros, scales = integers(0, 16, columns, rows), integers(0, 16, groups, rows, seed=2), noise(groups, rows, seed=1).half()
    tensors = {"m.qweight": words(codes, 4, order), "m.qzeros": words(zeros, 4, order), "m.scales": scales}
    expected = [[(int(codes[i, j]) - int(zeros[i // 16, j])) * float(scales[i // 16, j]) for i in range(columns)] for j in range(rows)]
    holds(tensors, "m.weight", torch.tensor(expected), "awq", tol=1e-3)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [64, 60])
def test_compressed_tensors_packed_integers(bits, columns):
    half = 1 << bits - 1
    codes, scales = integers(-half, half, 8, columns), noise(8, 4).abs()
    tensors = {"m.weight_packed": words(codes + half, bits), "m.weight_scale": scales, "m.weight_shape": torch.tensor([8, columns])}
    expected = by_element(codes, lambda i, j: scales[i, j // (columns // 4)], (8, columns))
    holds(tensors, "m.weight", expected, "scale_packed")
    assert found({**tensors, "m.weight_zero_point": torch.zeros(1, 4, dtype=torch.int32)})["m.weight"].doubt


# ---- refusals

REFUSED = {
    "int8 alone": {"m.weight": integers(-9, 9, 4, 4, dtype=torch.int8), "m.bias": noise(4)},
    "another module's scale": {"m.weight": integers(-9, 9, 4, 4, dtype=torch.int8), "n.weight_scale": noise(4, 1)},
    "fp8 beside an unknown factor": {"m.weight": fp8(4, 4), "m.zq_factor": noise(4, 1)},
    "fp8 whose scale is in another file": {"m.weight": fp8(4, 4), "n.weight": fp8(4, 4), "n.weight_scale_inv": noise(1, 1)},
    "a scale of no shape that fits": {"m.weight": fp8(12, 12), "m.weight_scale": noise(5, 1)},
    "two scales": {"m.weight": fp8(12, 12), "m.weight_scale": noise(12, 1), "m.weight_scale_inv": noise(1, 1)},
    "blocks of 128 or of 96": {"m.weight": fp8(192, 4), "m.weight_scale_inv": noise(2, 1)},
    "a scale and a stranger": {"m.weight": fp8(4, 4), "m.weight_scale": noise(4, 1), "m.comfy_quant": integers(0, 9, 5, dtype=torch.uint8)},
    "EETQ": {"m.weight": integers(-9, 9, 4, 8, dtype=torch.int8), "m.weight_scales": noise(8)},
    "nibbles": {"m.weight": integers(0, 9, 4, 4, dtype=torch.uint8), "m.weight_scale": noise(4, 1)},
    "GEMV order": {"m.qweight": torch.zeros(32, 8, dtype=torch.int32), "m.qzeros": torch.zeros(32, 1, dtype=torch.int32), "m.scales": noise(32, 8)},
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_codes_without_a_published_way_to_numbers_are_locked(case):
    weights = wb.open(REFUSED[case]).weights
    made = composites(weights)
    assert all(m.doubt for m in made if m.name == "m.weight")
    locked = locked_raw(weights, made)
    assert {"m.weight", "m.qweight"} & locked.keys()
    assert all(locked.values())


def test_blocks_that_a_config_gives_are_beyond_doubt():
    tensors = {"m.weight": fp8(192, 4), "m.weight_scale_inv": noise(2, 1).abs()}
    expected = by_element(tensors["m.weight"], lambda i, j: tensors["m.weight_scale_inv"][i // 128, 0], (192, 4))
    holds(tensors, "m.weight", expected, "scale", {"quantization_config": {"weight_block_size": [128, 128]}})


def test_fp8_numbers_that_were_only_cast_are_numbers():
    tensors = {"m.weight": fp8(4, 4), "m.bias": noise(4), "m.norm.weight": noise(4), "ids": torch.arange(4)}
    assert not locked_raw(wb.open(tensors).weights)
    assert not found(tensors)


def test_no_names_shapes_and_types_make_it_stumble():
    leaves = ["weight", "weight_g", "weight_v", "weight_u", "weight_orig", "weight_mask", "parametrizations.weight.original", "lora_A.x.weight", "lora_B.x.weight", "lora_embedding_A", "lora_embedding_B", "weight_scale", "weight_scale_inv", "scale", "SCB", "weight_format", "weight_zero_point", "weight_packed", "weight_shape", "weight_scale_2", "p_blocks", "p_scales", "weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4", "qweight", "qzeros", "scales", "g_idx"]  # fmt: skip
    kinds = [torch.float32, torch.float8_e4m3fn, torch.float8_e8m0fnu, torch.int8, torch.uint8, torch.int32, torch.bool]
    shapes, random = [(), (0,), (1,), (4,), (4, 4), (4, 1), (1, 1), (32, 4), (4, 0), (2, 8, 2, 16), (2, 8, 2)], Random(0)
    configs = [
        None,
        config(),
        config(fan_in_fan_out=True, r=4),
        {"checkpoint_format": "gptq"},
        {"weight_block_size": [0, "x"]},
        {"quantization_config": {}},
    ]
    for _ in range(1000):
        names = random.sample(leaves, random.randint(1, 6))
        weights = wb.open({f"m.{name}": torch.ones(random.choice(shapes)).to(random.choice(kinds)) for name in names}).weights
        made = composites(weights, random.choice(configs))
        locked_raw(weights, made)
        canonical(weights)
        decomposed({name: tensor.shape for name, tensor in weights.items()})


# ---- spellings


def same(left, right):
    """Names of two sides that are the same stored tensor, both ways."""
    a, b = canonical(left), canonical(right, [s.name for s in canonical(left).values()])
    sides = [{(c[n].name, c[n].role) if n in c else (n, ""): n for n in names} for c, names in ((a, left), (b, right))]
    return {sides[0][key]: sides[1][key] for key in sides[0].keys() & sides[1].keys()}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize(("old", "new"), [(weight_norm, parametrizations.weight_norm), (spectral_norm, parametrizations.spectral_norm)])
def test_old_and_new_parametrizations_are_one(old, new):
    torch.manual_seed(0)
    before, after = ({f"net.{n}": t for n, t in wrap(torch.nn.Linear(5, 3)).state_dict().items()} for wrap in (old, new))
    joined = same(before, after)
    assert len(joined) == len(before) == len(after)
    assert all(before[a].shape == after[b].shape for a, b in joined.items())


PLAIN = ["e.fc.weight", "e.fc.bias", "head.weight"]
ADAPTED = ["base_model.model.e.fc.base_layer.weight", "base_model.model.e.fc.base_layer.bias", "base_model.model.e.fc.lora_A.default.weight", "base_model.model.e.fc.lora_B.default.weight", "base_model.model.head.original_module.weight", "base_model.model.head.modules_to_save.default.weight"]  # fmt: skip
FILE = ["base_model.model.e.fc.lora_A.weight", "base_model.model.e.fc.lora_B.weight", "base_model.model.head.weight"]


def test_peft_names_with_and_without_the_adapter():
    assert same(FILE, ADAPTED) == {FILE[0]: ADAPTED[2], FILE[1]: ADAPTED[3], FILE[2]: ADAPTED[5]}
    named = [name.replace(".default.", ".style.") for name in ADAPTED]
    assert same(ADAPTED, named) == dict(zip(ADAPTED, named, strict=True))


def test_the_base_of_an_adapter_is_no_plain_weight_but_a_plain_weight_is_a_base():
    assert same(ADAPTED, PLAIN) == {ADAPTED[1]: PLAIN[1], ADAPTED[5]: PLAIN[2]}
    assert canonical(ADAPTED)[ADAPTED[0]].also == (PLAIN[0],)
    beside = canonical(["e.fc.weight", "e.fc.lora_A", "e.fc.lora_B"])  # loralib
    assert beside["e.fc.weight"].role == "base of an adapter"


@pytest.mark.parametrize(
    ("other", "peft"),
    [
        ("lora_unet_e_0_fc.lora_down.weight", "e.0.fc.lora_A.weight"),
        ("lora_te1_e_0_fc.lora_up.weight", "e.0.fc.lora_B.weight"),
        ("e.attn1.processor.to_q_lora.down.weight", "e.attn1.to_q.lora_A.weight"),
        ("e.attn1.processor.to_out_lora.up.weight", "e.attn1.to_out.0.lora_B.weight"),
        ("e.to_v.lora_linear_layer.up.weight", "e.to_v.lora_B.weight"),
        ("e.to_v.lora.down.weight", "e.to_v.lora_A.weight"),
        ("e.lora_embedding_A.default", "e.lora_embedding_A"),
        ("e.lora_magnitude_vector.default.weight", "e.lora_magnitude_vector"),
        ("e.lora_B.default.bias", "e.lora_B.bias"),
    ],
)
def test_other_spellings_of_adapters(other, peft):
    held = ["e.0.fc.lora_A.weight", peft]
    spelling = canonical([other], held).get(other)
    assert spelling.name == peft
    assert spelling.role


def test_kohya_names_that_two_modules_fit_stay_as_they_are():
    name = "lora_unet_a_b_c.lora_down.weight"
    assert canonical([name], ["a.b_c.lora_A.weight", "a_b.c.lora_A.weight"])[name].name == "lora_unet_a_b_c.lora_A.weight"


def test_a_target_that_was_pruned_takes_a_plain_weight():
    assert canonical(["m.weight_orig", "m.weight_mask"])["m.weight_orig"].also == ("m.weight",)
    assert not canonical(["m.weight", "attn_mask", "x_g", "base_layer.weight", "k.original_module.weight"][:3])


def test_names_are_read_without_torch(tmp_path):
    wb.save(
        wb.open({"m.weight": fp8(4, 4), "m.weight_scale": noise(4, 1), "n.weight_g": noise(3, 1), "n.weight_v": noise(3, 5)}),
        tmp_path / "x.safetensors",
    )
    code = "import sys, workbench as wb\nfrom workbench.keymap.composites import *\nfrom workbench.keymap.spellings import canonical\nw = wb.open(sys.argv[1]).weights\nassert len(composites(w)) == 2 and locked_raw(w) and canonical(w)\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "x.safetensors")], check=True, timeout=60)


def test_every_formula_was_held_against_an_oracle():
    assert FORMULAS.keys() <= SEEN | {"shifted"}  # and that in test_conventions.py
