"""What is left over goes where what stands around it went, or it is told; and what other classes lay otherwise is not certain."""

import pytest
import torch
import transformers
from torch import nn

import workbench as wb


def stacked(*blocks, make=lambda: nn.Linear(8, 8)):
    """A list of blocks: each has `fc`, and what is named for it."""
    model = nn.Module()
    model.layers = nn.ModuleList(nn.ModuleDict({"fc": make()} | {name: make() for name in held}) for held in blocks)
    return model


def left(keymap):
    return {each.target: each.reason for each in (*keymap.ambiguous, *keymap.unmatched)}


def wrong(keymap):
    return [(pair.source, pair.target) for pair in keymap.pairs if pair.source != pair.target]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(["n", ""], ["", "n"]), (["n", "n", "", ""], ["", "", "n", "n"]), (["n", "", "n", ""], ["", "n", "", "n"])],
    ids=["one", "the first two and the last two", "by turns"],
)  # fmt: skip
def test_what_one_block_has_is_not_given_to_another(ours, theirs):
    source, target = stacked(*ours), stacked(*theirs)
    keymap = wb.match(source.state_dict(), target)
    assert not wrong(keymap)
    assert len(keymap.pairs) == 2 * len(ours)
    assert all("what else lies in 'layers." in reason for reason in left(keymap).values())
    with pytest.raises(wb.errors.SpecMismatchError):
        wb.load_into(target, source.state_dict(), keymap)


def test_a_word_that_both_sides_have_is_no_other_word_that_both_have():
    """Two kinds of layers in another order: each kind's output matrix has the same word and shape."""
    kinds = {"a": ("conv", ("in_proj", 24), ("out_proj", 8)), "b": ("self_attn", ("q_norm", 8), ("out_proj", 8))}

    def hybrid(order):
        return {f"layers.{i}.mlp.weight": (8, 8) for i in range(3)} | {
            f"layers.{i}.{kinds[kind][0]}.{word}.weight": (n, 8) for i, kind in enumerate(order) for word, n in kinds[kind][1:]
        }

    keymap = wb.match({name: torch.randn(shape) for name, shape in hybrid("baa").items()}, hybrid("aab"))
    assert not wrong(keymap)
    assert {"layers.0.conv.out_proj.weight", "layers.2.self_attn.out_proj.weight"} <= left(keymap).keys()


def test_numbers_do_not_mix_what_two_blocks_hold():
    """Both have seven branches in two blocks, the file four in the first and the model four in the second."""
    source = {f"stages.0.{b}.conv_kxk.{n}.weight": torch.randn(4, 4, 3, 3) for b, count in ((0, 4), (1, 3)) for n in range(count)}
    wanted = {f"stages.0.{b}.hulri.{n}.weight": (4, 4, 3, 3) for b, count in ((0, 3), (1, 4)) for n in range(count)}
    keymap = wb.match(source, wanted)
    assert not [pair for pair in keymap.pairs if pair.source.split(".")[2] != pair.target.split(".")[2]]


@pytest.mark.parametrize(
    ("ours", "theirs", "open_"),
    [
        (("wi", "wo"), ("wi_0", "wi_1", "wo"), "wi_1"),
        (("wi_0", "wi_1", "wo"), ("wi", "wo"), "wi"),
        (("w1", "w2"), ("gate", "up", "down"), "up"),
    ],
    ids=["T5 into T5 1.1", "T5 1.1 into T5", "two into three"],
)  # fmt: skip
def test_the_matrix_of_a_plain_mlp_is_none_of_a_gated_one(ours, theirs, open_):
    shapes = [
        {f"layers.{i}.ff.{word}.weight": (8, 16) if word in ("wo", "w2", "down") else (16, 8) for i in range(2) for word in words}
        for words in (ours, theirs)
    ]
    keymap = wb.match({name: torch.randn(shape) for name, shape in shapes[0].items()}, shapes[1])
    assert {pair.target.split(".")[3] for pair in keymap.pairs} == {theirs[-1]}
    assert "has a gate" in left(keymap)[f"layers.0.ff.{open_}.weight"]


class GPTBigCodeAttention(nn.Module):
    """By its class alone: transformers lays `c_attn` of it by heads where it has as many keys as queries."""

    def __init__(self):
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(8, 24), nn.Linear(8, 8)


class CausalSelfAttention(GPTBigCodeAttention):
    """nanoGPT's."""


@pytest.mark.parametrize("attention", [GPTBigCodeAttention, CausalSelfAttention])
def test_a_fused_matrix_that_is_transposed_for_another_class_is_not_certain(attention):
    source = {"wte.weight": (10, 8), "h.0.attn.c_attn.weight": (8, 24), "h.0.attn.c_attn.bias": (24,)}
    source |= {"h.0.attn.c_proj.weight": (8, 8), "h.0.attn.c_proj.bias": (8,)}
    target = nn.ModuleDict({"wte": nn.Embedding(10, 8), "h": nn.ModuleList([nn.ModuleDict({"attn": attention()})])})
    keymap = wb.match({name: torch.randn(shape) for name, shape in source.items()}, target)
    told = {pair.target: pair.confidence for pair in keymap.pairs if "c_attn" in pair.target}
    if attention is GPTBigCodeAttention:
        assert not told
        assert "by heads" in left(keymap)["h.0.attn.c_attn.bias"]
    else:
        assert set(told.values()) == {"likely"}
        assert "order of rows" in keymap.findings[0].kind


def test_sections_that_nothing_separates_are_a_finding():
    state = nn.Linear(3, 4).state_dict()
    keymap = wb.match({"mean": state, "sq_mean": {name: value**2 for name, value in state.items()}}, nn.Linear(3, 4))
    assert keymap.rivals == ("sq_mean",)
    assert not keymap
    assert [("sq_mean" in each.message, each.severity) for each in keymap.findings] == [(True, "warning")]


@pytest.mark.parametrize("unused", ["rgb_mean", "zz.weight"])
def test_what_the_model_has_no_use_for_does_not_hide_its_order(unused):
    def conv(name, i, o):
        return {f"{name}.weight": torch.randn(o, i, 3, 3), f"{name}.bias": torch.randn(o)}

    source = conv("head.0", 3, 8) | conv("body.0.body.0", 8, 8) | conv("body.0.body.2", 8, 8) | conv("body.1.body.0", 8, 8)
    source |= conv("body.1.body.2", 8, 8) | conv("tail.0", 8, 3)
    wanted = {}
    for name, i, o in (("conv_first", 3, 8), *((f"body.{n}.conv{k}", 8, 8) for n in range(2) for k in (1, 2)), ("conv_last", 8, 3)):
        wanted |= {each: tuple(tensor.shape) for each, tensor in conv(name, i, o).items()}
    keymap = wb.match(source | {unused: torch.randn(1, 3, 1, 1)}, wanted)
    assert [pair.source for pair in keymap.pairs] == list(source)
    assert keymap.unused == (unused,)


def test_an_adapter_is_told_where_its_scale_or_its_base_is_missing():
    source = {"q.base_layer.weight": (8, 8), "q.lora_A.default.weight": (2, 8), "q.lora_B.default.weight": (8, 2)}
    wrapped = {f"base_model.model.layers.{i}.{name}": torch.randn(shape) for i in range(2) for name, shape in source.items()}
    wanted = {f"layers.{i}.q.weight": (8, 8) for i in range(2)}
    assert all("a LoRA layer: put adapter_config.json" in reason for reason in left(wb.match(wrapped, wanted)).values())
    alone = {name.replace(".default", ""): value for name, value in wrapped.items() if "lora" in name}
    assert all("wb.ops.merge_lora" in reason for reason in left(wb.match(alone, wanted)).values())


def test_a_head_of_the_same_name_and_another_size_is_offered_a_swap():
    keymap = wb.match(
        {"module.conv.weight": torch.ones(4, 3), "module.fc.weight": torch.ones(5, 4)}, {"conv.weight": (4, 3), "fc.weight": (9, 4)}
    )
    assert "wb.ops.swap_head(ckpt, 'module.fc.*', 9)" in left(keymap)["fc.weight"]


def test_a_pair_by_the_end_of_its_name_says_what_becomes_what():
    shapes = {"norm.weight": (4,), "norm.bias": (4,), "conv.weight": (4, 3, 3, 3)}
    source = {f"stem.{name}": torch.ones(shape) for name, shape in shapes.items()}
    keymap = wb.match(source, {name.replace("norm", "bn"): shape for name, shape in shapes.items()})
    assert keymap.rules == {"stem.norm becomes bn": 2, 'strip "stem."': 1}


def _left_out(state, *parts):
    return {name: value for name, value in state.items() if not any(part in name for part in parts)}


def _drawn(module):
    return {name: torch.randn(value.shape) for name, value in module.state_dict().items()}


BERT = transformers.BertConfig(
    vocab_size=20, hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=12, max_position_embeddings=9
)
GPT2 = transformers.GPT2Config(vocab_size=20, n_embd=8, n_layer=3, n_head=2, n_positions=9)


@pytest.mark.parametrize(
    ("config", "lost", "absent"),
    [
        (BERT, ["layer.2.output.dense"], ["layer.0."]),  # the file has all numbers of the model: none has moved
        (GPT2, ["h.1.ln_2"], ["ln_f"]),  # in the other blocks it is called as in the file
        (GPT2, ["h.0.mlp"], ["h.1."]),  # the rest of block 0 is in block 0
    ],
)
def test_what_the_file_lost_is_not_made_of_what_the_model_lacks(config, lost, absent):
    state = _drawn(transformers.AutoModel.from_config(config))
    assert wrong(wb.match(_left_out(state, *lost), _left_out(state, *absent))) == []


def test_a_list_of_one_name_on_both_sides_goes_nowhere_else():
    blocks = {f"decoder.layers.{i}.{part}.weight": torch.randn(8, 8) for i in range(2) for part in ("fc1", "fc2")}
    encoder = {name.replace("decoder", "encoder_stack"): torch.randn(8, 8) for name in blocks}
    assert wrong(wb.match(blocks, encoder | _left_out(blocks, "1.fc2"))) == []


def test_keys_get_zeros_for_a_bias_only_where_the_file_has_keys():
    shapes = {"weight": (8, 8), "bias": (8,)}
    parts = {f"{i}.attn.{part}_proj.{end}": torch.randn(shape) for i in range(2) for part in "qkv" for end, shape in shapes.items()}
    target = {f"{i}.attn.in_proj_{end}": (24, *shape[1:]) for i in range(2) for end, shape in shapes.items()}
    lost = wb.match(_left_out(parts, "1.attn.k_proj"), target)
    assert not [pair for pair in lost.pairs if pair.target.startswith("1.")]
    without = wb.match(_left_out(parts, "k_proj.bias"), target)
    assert {pair.target for pair in without.pairs} == target.keys()


def test_one_number_fills_a_tensor_without_axes():
    keymap = wb.match({"logit_scale": torch.tensor([2.5])}, {"logit_scale": ()})
    assert keymap.apply({"logit_scale": torch.tensor([2.5])})["logit_scale"].load() == torch.tensor(2.5)
