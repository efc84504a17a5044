"""What names and shapes allow one by one and speak against together: it is left and told, and what is beside it is taken."""

import pytest
import torch

import workbench as wb


def told(source, wanted):
    """What is taken, and what is left with the reason for it."""
    keymap = wb.match({name: torch.randn(shape) for name, shape in source.items()}, wanted)
    return {pair.target: pair.source for pair in keymap.pairs}, {each.target: each.reason for each in keymap.ambiguous}


def under(place, width):
    return {f"{place}.{end}": (width,) for end in ("weight", "bias", "running_mean", "running_var")}


def test_the_statistics_of_a_norm_come_with_its_weight():
    """EfficientNet-PyTorch into timm: `_bn1` is `bn1` only in the block without an expansion."""
    source, wanted = {}, {}
    for n, (given, inner, out) in enumerate(((8, 8, 6), (6, 12, 10), (10, 20, 10))):
        expand = [("_expand_conv", "conv_pw", (inner, given, 1, 1), inner)] if n else []
        project = ("_project_conv", "conv_pwl" if n else "conv_pw", (out, inner, 1, 1), out)
        for at, (one, other, shape, width) in enumerate([*expand, ("_depthwise_conv", "conv_dw", (inner, 1, 3, 3), inner), project]):
            places = f"_blocks.{n}", f"blocks.{min(n, 1)}.{max(n - 1, 0)}"
            source |= {f"{places[0]}.{one}.weight": shape} | under(f"{places[0]}._bn{at if n else at + 1}", width)
            wanted |= {f"{places[1]}.{other}.weight": shape} | under(f"{places[1]}.bn{at + 1}", width)
    taken, left = told(source, wanted)
    norms = {name: other for name, other in taken.items() if ".bn" in name}
    assert all(other.split(".")[2] == f"_bn{int(name.split('.')[3][2:]) - name.startswith('blocks.1')}" for name, other in norms.items())
    assert {name for name in wanted if ".bn" in name} == norms.keys() | {name for name in left if ".bn" in name}


@pytest.mark.parametrize(("inputs", "known"), [(32, False), (8, True)])
@pytest.mark.parametrize("back", [False, True])
def test_a_dense_layer_that_reads_a_flattened_convolution(inputs, known, back):
    keras = {"conv2d/kernel": (3, 3, 3, 8), "conv2d/bias": (8,), "dense/kernel": (inputs, 24), "dense/bias": (24,)}
    keras |= {"dense_1/kernel": (24, 5), "dense_1/bias": (5,)}  # and 24 is no reading of the convolution
    plain = {
        "conv.weight": (8, 3, 3, 3),
        "conv.bias": (8,),
        "fc1.weight": (24, inputs),
        "fc1.bias": (24,),
        "fc2.weight": (5, 24),
        "fc2.bias": (5,),
    }
    taken, left = told(*((plain, keras) if back else (keras, plain)))
    first = "dense/kernel" if back else "fc1.weight"
    assert {"dense/bias", "dense_1/kernel"} <= taken.keys() if back else {"fc1.bias", "fc2.weight"} <= taken.keys()
    assert (first in taken) == known
    assert known or "height, width, channels" in left[first]


def test_a_lone_module_of_another_root_is_not_known_by_its_end():
    source = {"cond.text.final_layer_norm.weight": (8,), "unet.between.inner.norm_a.weight": (8,)}
    source |= {f"unet.{word}.weight": (n + 2, 8) for n, word in enumerate(("first", "second", "third"))}
    wanted = {"mid.attentions.norm.weight": (8,)} | {f"{word}.weight": (n + 2, 8) for n, word in enumerate(("first", "second", "third"))}
    taken, left = told(source, wanted)
    assert taken.keys() == wanted.keys() - {"mid.attentions.norm.weight"}
    assert "mid.attentions.norm.weight" in left


@pytest.mark.parametrize("back", [False, True])
def test_norms_before_a_layer_are_none_that_stand_after_it(back):
    """Megatron's BERT and BERT."""
    words = {"attention.ln": "attention.output.LayerNorm", "ln": "output.LayerNorm"}
    before, after = {"encoder.ln.weight": (8,)}, {"embeddings.LayerNorm.weight": (8,)}
    for n in range(2):
        for word, shape in (("attention.output.dense", (8, 8)), ("intermediate.dense", (12, 8)), ("output.dense", (8, 12))):
            before[f"encoder.layer.{n}.{word}.weight"] = after[f"encoder.layer.{n}.{word}.weight"] = shape
        for word, other in words.items():
            before[f"encoder.layer.{n}.{word}.weight"] = after[f"encoder.layer.{n}.{other}.weight"] = (8,)
    source, wanted = (after, before) if back else (before, after)
    taken, left = told(source, wanted)
    norms = {name for name, shape in wanted.items() if shape == (8,)}
    assert taken.keys() == wanted.keys() - norms
    assert left.keys() == norms


@pytest.mark.parametrize("back", [False, True])
def test_a_patch_merging_of_openmmlab_reads_its_patches_in_another_order(back):
    """nn.Unfold puts channels outside; Swin's own code puts four shifted pictures one after another."""
    words = {"attn.w_msa.qkv": "attn.qkv", "ffn.layers.0.0": "mlp.fc1", "ffn.layers.1": "mlp.fc2"}
    shapes = ((24, 8), (32, 8), (8, 32))
    ours = {f"stages.0.blocks.0.{word}.weight": torch.randn(shape) for word, shape in zip(words, shapes, strict=True)}
    theirs = {f"layers.0.blocks.0.{words[word]}.weight": ours[f"stages.0.blocks.0.{word}.weight"] for word in words}
    ours["stages.0.blocks.0.attn.w_msa.relative_position_bias_table"] = table = torch.randn(49, 2)
    theirs["layers.0.blocks.0.attn.relative_position_bias_table"] = table
    merging = {"reduction.weight": torch.randn(16, 32), "norm.weight": torch.randn(32), "norm.bias": torch.randn(32)}
    for end, value in merging.items():
        ours[f"stages.0.downsample.{end}"] = value
        rows = value.reshape(*value.shape[:-1], 8, 4).transpose(-1, -2)[..., [0, 2, 1, 3], :]  # mmsegmentation's swin2mmseg.py, back
        theirs[f"layers.1.downsample.{end}"] = rows.reshape(value.shape)
    source, wanted = (theirs, ours) if back else (ours, theirs)
    applied = {name: tensor.load() for name, tensor in wb.match(source, wanted).apply(source).items()}
    assert applied.keys() == wanted.keys()
    assert all(torch.equal(value, wanted[name]) for name, value in applied.items())


def test_a_patch_merging_of_an_unknown_order_is_left():
    merging = {"reduction.weight": (16, 32), "norm.weight": (32,), "norm.bias": (32,)}
    blocks = {f"layers.{n}.attn.{word}.weight": (8, n + 3) for n in range(2) for word in ("q_proj", "k_proj", "v_proj")}
    source = blocks | {f"layers.0.merge.{end}": shape for end, shape in merging.items()}
    taken, left = told(source, blocks | {f"layers.0.downsample.{end}": shape for end, shape in merging.items()})
    assert taken.keys() == blocks.keys()
    assert "layers.0.downsample.reduction.weight" in left
    assert told(source, source)[0].keys() == source.keys()


NUMBERED = {"down last": ((40, 16), (40, 16), (16, 40)), "down first": ((16, 40), (40, 16), (40, 16))}


@pytest.mark.parametrize("word", ["w", "fc"])
@pytest.mark.parametrize("shapes", NUMBERED.values(), ids=NUMBERED)
def test_numbers_are_no_roles_that_the_shapes_refute(word, shapes):
    """w1, w2 and w3 are gate, down and up in Llama, where w2 is the way down."""
    source = {f"blocks.{n}.ff.{word}{at + 1}.weight": shape for n in range(2) for at, shape in enumerate(shapes)}
    wanted = {f"blocks.{n}.ff.{end}_proj.weight": (40, 16) for n in range(2) for end in ("gate", "up")}
    down = {f"blocks.{n}.ff.down_proj.weight": (16, 40) for n in range(2)}
    taken, left = told(source, wanted | down)
    assert taken == {name: f"blocks.{name[7]}.ff.{word}{shapes.index((16, 40)) + 1}.weight" for name in down}
    assert left.keys() == wanted.keys()


@pytest.mark.parametrize("known", [False, True])
def test_a_square_matrix_that_may_be_kept_either_way(known):
    """`c_proj` is a Conv1D in GPT-2 and a Linear in nanoGPT, whose `c_fc` is [out, in]."""
    source = {"h.0.attn.c_proj.weight": (8, 8)} | ({"h.0.mlp.c_fc.weight": (32, 8)} if known else {})
    wanted = {"layers.0.attn.out.weight": (8, 8)} | ({"layers.0.mlp.fc1.weight": (32, 8)} if known else {})
    taken, left = told(source, wanted)
    assert (taken if known else left).keys() == wanted.keys()


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("input post_attention pre_feedforward post_feedforward", "post_attention post_feedforward"),  # Gemma 2 into OLMo 2
        ("post_attention post_feedforward", "input post_attention"),  # OLMo 2 into Llama
        ("input post_attention", "post_attention post_feedforward"),
    ],
)
def test_what_both_sides_have_under_one_name_is_not_taken_for_another(ours, theirs):
    sides = []
    for words in (ours, theirs):
        names = {f"model.layers.{n}.{word}_layernorm.weight": (8,) for n in range(2) for word in words.split()}
        names |= {f"model.layers.{n}.self_attn.{p}_proj.weight": (8, 8) for n in range(2) for p in "qkvo"}
        names |= {f"model.layers.{n}.mlp.{p}_proj.weight": shape for n in range(2) for p, shape in (("up", (9, 8)), ("down", (8, 9)))}
        sides.append(names)
    taken, left = told(*sides)
    assert all(target == source for target, source in taken.items())
    assert {name for name in sides[1] if "_proj" in name} <= taken.keys()
    assert all("under the name of the" in why for name, why in left.items() if "post_attention" in name)
