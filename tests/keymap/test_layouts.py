"""What fits in two ways by its shape: which of them, the rest of the same file tells, or nobody does and it is left and told."""

from itertools import pairwise

import pytest
import torch
from torch import nn

import workbench as wb


def module(**parts):
    made = nn.Module()
    for name, part in parts.items():
        made.add_module(name, part)
    return made


def right(source, target, expected):
    """Whether every value that is given is the expected one; the names that are left, with the reason."""
    keymap = wb.match(source, target)
    for name, tensor in keymap.apply(source).items():
        assert torch.equal(tensor.load().double(), expected[name].double()), name
    left = {each.target: each.reason for each in (*keymap.ambiguous, *keymap.unmatched)}
    assert left.keys() | {pair.target for pair in keymap.pairs} == expected.keys()
    return left


def shapes(state):
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def turned(state, straight=()):
    return {name: t.T.contiguous() if t.dim() == 2 and name not in straight else t for name, t in state.items()}


def mlp(*widths):
    return module(**{f"fc{n}": nn.Linear(*both) for n, both in enumerate(pairwise(widths))})


def test_square_matrices_lie_as_all_oblong_ones_of_the_file_do():
    """Paddle keeps the matrices of linear layers as [in, out]."""
    several, one = mlp(6, 8, 8, 5), mlp(8, 8, 5)
    assert not right(turned(several.state_dict()), several, several.state_dict())
    assert right(turned(one.state_dict()), one, one.state_dict()).keys() == {"fc0.weight", "fc1.weight"}
    assert right(turned(several.state_dict()), shapes(several.state_dict()), several.state_dict()).keys() == {"fc1.weight"}


def test_most_oblong_matrices_outweigh_a_head_that_is_tied_in_the_file_alone():
    model = module(fc0=nn.Linear(8, 8), fc1=nn.Linear(8, 12), fc2=nn.Linear(12, 8), emb=nn.Embedding(20, 8), lm_head=nn.Linear(8, 20))
    source = turned(model.state_dict(), ("emb.weight", "lm_head.weight"))
    assert right(source, model, model.state_dict()).keys() == {"fc0.weight"}
    assert right(turned(model.state_dict(), list(model.state_dict())), model, model.state_dict()) == {}


def test_tables_and_recurrent_matrices_lie_in_one_way_everywhere():
    model = module(emb=nn.Embedding(8, 8), rnn=nn.LSTM(8, 2), **dict(mlp(8, 6, 4).named_children()))
    straight = [name for name in model.state_dict() if "fc" not in name]
    assert not right(turned(model.state_dict(), straight), model, model.state_dict())


@pytest.mark.parametrize("known", [True, False])
def test_square_matrices_that_are_put_together_are_transposed_too(known):
    torch.manual_seed(0)
    target = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 12), 2, enable_nested_tensor=False)
    expected, source = target.state_dict(), {}
    for name, tensor in expected.items():
        parts = tensor.chunk(3) if "in_proj" in name else [tensor]
        for word, part in zip("qkv" if "in_proj" in name else " ", parts, strict=True):
            source["encoder." + name.replace("in_proj_", f"{word}_proj.")] = part.T.contiguous() if part.dim() == 2 else part.clone()
    left = right(source, target if known else shapes(expected), expected)
    assert not left if known else all("attn" in name for name in left)


def channels_last(state, transposed=()):
    moved = {name: t.movedim(0 if name in transposed else 1, -1).contiguous() for name, t in state.items() if t.dim() > 2}
    return {**state, **moved}


CONVOLUTIONS = {
    "an RGB one of 3 x 3": lambda: module(a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(8, 16, 3), c=nn.Linear(16, 5)),
    "of one dimension": lambda: module(a=nn.Conv1d(3, 8, 3), b=nn.Conv1d(8, 16, 3), c=nn.Conv1d(16, 4, 5)),
    "depthwise and 1 x 1": lambda: module(
        a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(8, 8, 3, groups=8), c=nn.Conv2d(8, 16, 1), n=nn.BatchNorm2d(16)
    ),
}


@pytest.mark.parametrize("make", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_convolutions_of_a_file_with_channels_last(make):
    """MLX keeps them as [out, height, width, in]."""
    model = make()
    keymap = wb.match(channels_last(model.state_dict()), model)
    assert not right(channels_last(model.state_dict()), model, model.state_dict())
    assert not right(model.state_dict(), shapes(channels_last(model.state_dict())), channels_last(model.state_dict()))
    back = keymap.inverse().apply(model.state_dict())
    assert all(torch.equal(back[name].load(), tensor) for name, tensor in channels_last(model.state_dict()).items())
    assert {pair.confidence for pair in keymap.pairs if model.state_dict()[pair.target].dim() > 2} == {"likely"}
    assert all(pair.confidence == "certain" for pair in wb.match(model.state_dict(), model).pairs)


def test_channels_last_that_nothing_else_proves():
    model = module(a=nn.Conv1d(3, 8, 3), b=nn.Conv1d(8, 16, 3))
    assert right(channels_last(model.state_dict()), model, model.state_dict()).keys() == {"a.weight", "b.weight"}
    model = module(a=nn.Conv2d(8, 16, 3), up=nn.ConvTranspose2d(8, 8, 2), fc=nn.Linear(16 * 4, 5))
    left = right(channels_last(model.state_dict(), {"up.weight"}), model, model.state_dict())
    assert left.keys() == {"up.weight", "fc.weight"}  # which are its outputs; in which order the flattened image stands
    left = right(channels_last(model.state_dict(), {"up.weight"}), shapes(model.state_dict()), model.state_dict())
    assert left.keys() == {"up.weight", "fc.weight"}


FP8 = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
SCALED = {
    "in another section": {"model": {"fc.weight": FP8}, "scales": {"fc.weight": torch.tensor(0.1)}},
    "a number in another section": {"model": {"fc.weight": FP8}, "scales": {"fc.weight": 0.1}},
    "by the module": {"model": {"fc.weight": FP8}, "quant": {"fc": {"scale": torch.ones(4, 1)}}},
    "of another weight": {"model": {"fc.weight": FP8, "b.weight": FP8}, "scales": {"b.weight": torch.tensor(0.1)}},
    "in a quantizer": {"fc.weight": FP8, "fc.weight_quantizer._scale": torch.tensor(0.1)},
    "below the weight": {"fc.weight": FP8, "fc.weight.scale": torch.tensor(0.1)},
}


@pytest.mark.parametrize("source", SCALED.values(), ids=SCALED)
def test_fp8_numbers_whose_scale_lies_elsewhere(source):
    assert "fp8" in right(source, {"fc.weight": ("float32", (4, 8))}, {"fc.weight": FP8})["fc.weight"]


def test_a_plain_cast_to_fp8_is_what_it_is():
    run = {"optimizer": {"state": {"fc.weight": {"step": torch.tensor(5.0), "exp_avg": torch.ones(4, 8)}}}, "lr": 0.1}
    source = {"model": {"fc.weight": FP8, "norm.scale": torch.ones(8)}, **run}
    assert not right(source, {"fc.weight": ("float32", (4, 8)), "norm.scale": (8,)}, {**source["model"]})


@pytest.mark.parametrize(("axis", "left"), [(0, set()), (1, {"a.weight", "b.weight"}), (None, {"a.weight"})])
def test_scales_of_a_square_matrix_go_as_those_of_an_oblong_one(axis, left):
    codes = {name: torch.randint(-9, 9, shape, dtype=torch.int8) for name, shape in (("a.weight", (8, 8)), ("b.weight", (4, 8)))}
    codes = codes if axis is not None else {"a.weight": codes["a.weight"]}
    scales = {f"{name}_scale": torch.rand(t.shape[axis or 0]) for name, t in codes.items()}
    expected = {name: t * scales[f"{name}_scale"][:, None] if axis != 1 else t for name, t in codes.items()}
    assert right(codes | scales, {name: ("float32", tuple(t.shape)) for name, t in codes.items()}, expected).keys() == left


def test_numbers_that_a_load_would_not_cast_are_no_pair():
    source = {"a.weight": torch.ones(4, 4, dtype=torch.complex64), "b.weight": torch.ones(4, dtype=torch.int64), "c.weight": torch.ones(4)}
    target = {"a.weight": ("float32", (4, 4)), "b.weight": ("int32", (4,)), "c.weight": ("float16", (4,))}
    assert right(source, target, source) == {"a.weight": "complex64 in the file and float32 in the model"}
    with pytest.raises(wb.errors.SpecMismatchError, match="complex64 in the file and float32 in the model"):
        wb.load_into(module(a=nn.Linear(4, 4, bias=False)), {"a.weight": source["a.weight"]})


BESIDE = {
    "lora_down and lora_up": {"fc.lora_down.weight": (2, 8), "fc.lora_up.weight": (4, 2)},
    "lora.down and lora.up": {"fc.lora.down.weight": (2, 8), "fc.lora.up.weight": (4, 2)},
    "a mask": {"fc.weight_mask": (4, 8)},
    "a difference": {"fc.delta_weight": (4, 8)},
    "a gain": {"fc.weight_g": (4, 1)},
}


@pytest.mark.parametrize("beside", BESIDE.values(), ids=BESIDE)
def test_what_may_change_a_weight_that_stands_beside_it(beside):
    source = {name: torch.randn(shape) for name, shape in {"fc.weight": (4, 8), **beside}.items()}
    assert right(source, {"fc.weight": (4, 8)}, {"fc.weight": source["fc.weight"]}).keys() == {"fc.weight"}
    assert not right({f"net.{name}": t for name, t in source.items()}, shapes(source), source)
