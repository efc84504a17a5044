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
