"""Whole models under foreign names: what their modules hold, and the order in which they stand, fills them, or is told not to do so.

The oracle is the model's output: both modules are written by hand and compute the same, each under names of its own.
"""

import itertools
import random

import pytest
import torch
from torch import nn

import workbench as wb


def numbered(*modules):
    return nn.Sequential(*modules)


def named(**modules):
    return nn.ModuleDict(modules)


def run(model, x):
    for module in model.values() if isinstance(model, nn.ModuleDict) else model:
        x = run(module, x) if isinstance(module, (nn.ModuleDict, nn.Sequential)) else module(x)
    return x


def lenet(make):
    conv = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(384, 16), nn.ReLU(), nn.Linear(16, 5)]
    return make(conv, ["conv1", "r1", "conv2", "r2", "flat", "fc1", "r3", "out"]), (2, 1, 12, 12)


def mlp(make):
    layers = [m for width in (6, 8, 8) for m in (nn.Linear(width, 8), nn.BatchNorm1d(8), nn.ReLU())]
    return make([*layers, nn.Linear(8, 3)], ["fc1", "bn1", "r1", "fc2", "bn2", "r2", "fc3", "bn3", "r3", "head"]), (4, 6)


def separable(make):
    layers = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    for width in (8, 12, 16):
        layers += [nn.Conv2d(width, width, 3, groups=width, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        layers += [nn.Conv2d(width, width + 4, 1, bias=False), nn.BatchNorm2d(width + 4), nn.ReLU()]
    words = [f"{kind}_{at}" for at in "abcdefg" for kind in ("mix", "scale", "act")]
    return make(layers, words), (2, 3, 12, 12)


MODELS = {"lenet": lenet, "mlp": mlp, "separable": separable}


def pair_of(model, seed=0):
    """The model with numbers, trained a little, and the same one with words, which is empty."""
    torch.manual_seed(seed)
    source, shape = model(lambda layers, words: numbered(*layers))
    for layer in source:
        if hasattr(layer, "running_mean"):
            nn.init.uniform_(layer.running_mean)
            nn.init.uniform_(layer.running_var, 0.5, 2)
    target, _ = model(lambda layers, words: named(**dict(zip(words, layers, strict=True))))
    return source.eval(), target.eval(), torch.rand(shape)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("backwards", [False, True], ids=["numbers to words", "words to numbers"])
def test_a_model_of_the_same_modules_is_filled_and_computes_the_same(model, backwards):
    source, target, x = pair_of(model)
    if backwards:
        source, target = target, source
    keymap = wb.match(source.state_dict(), target)
    assert not keymap.unmatched
    assert not keymap.ambiguous
    assert {pair.confidence for pair in keymap.pairs} == {"likely"}
    wb.load_into(target, source.state_dict(), keymap=keymap)
    torch.testing.assert_close(run(target, x), run(source, x))


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_a_shuffled_file_fills_what_shapes_and_numbers_tell_and_no_more(model):
    source, target, _ = pair_of(model)
    right = dict(zip(target.state_dict(), source.state_dict().values(), strict=True))
    for seed in range(20):
        names = list(source.state_dict())
        random.Random(seed).shuffle(names)
        keymap = wb.match({name: source.state_dict()[name] for name in names}, target)
        for name, tensor in keymap.apply({name: source.state_dict()[name] for name in names}).items():
            assert torch.equal(tensor.load(), right[name]), name
        assert {t.target for t in (*keymap.pairs, *keymap.ambiguous, *keymap.unmatched)} == set(right)


def test_another_head_is_left_and_told():
    source, target, _ = pair_of(mlp)
    target["head"] = nn.Linear(8, 7)
    keymap = wb.match(source.state_dict(), target)
    assert {told.target for told in keymap.unmatched} == {"head.weight", "head.bias"}
    assert len(keymap.pairs) == len(target.state_dict()) - 2


def test_matrices_kept_as_in_and_out_are_turned():
    source, target, _ = pair_of(lenet)
    file = {}
    for name, at in (("conv1", 0), ("conv2", 2)):
        file |= {f"conv2d_{name[-1]}/kernel:0": source[at].weight.permute(2, 3, 1, 0), f"conv2d_{name[-1]}/bias:0": source[at].bias}
    for name, at in (("dense_1", 5), ("dense_2", 7)):
        file |= {f"{name}/kernel:0": source[at].weight.t(), f"{name}/bias:0": source[at].bias}
    file = {name: tensor.detach().contiguous() for name, tensor in file.items()}
    made = dict(wb.match(file, target).apply(file).items())
    right = dict(zip(target.state_dict(), source.state_dict().values(), strict=True))
    assert right.keys() - made.keys() <= {"fc1.weight"}  # its rows may stand in the order of a flattened image
    assert all(torch.equal(tensor.load(), right[name]) for name, tensor in made.items())


def square(*names, width=8):
    return {f"{name}.{param}": shape for name in names for param, shape in (("weight", (width, width)), ("bias", (width,)))}


REFUSED = {
    "queries and keys for numbers": (square("k_proj", "q_proj", "v_proj"), square("0", "1", "2")),
    "words that nobody knows, side by side": (square("red", "green", "blue"), square("x", "y", "z")),
    "two towers that nobody's words tell apart": (
        {f"{tower}.{n}.weight": shape for tower in ("left", "right") for n, shape in enumerate([(8, 4), (6, 8)])},
        {f"{tower}.{n}.weight": shape for tower in ("one", "two") for n, shape in enumerate([(8, 4), (6, 8)])},
    ),
    "an actor for a critic": ({"actor.0.weight": (8, 4), "actor.2.weight": (3, 8)}, {"critic.0.weight": (8, 4), "critic.2.weight": (3, 8)}),
    "one module alone": ({"one.weight": (8, 4)}, {"other.weight": (8, 4)}),
    "another module among them": (
        {"a.weight": (8, 4), "b.weight": (9, 8), "c.weight": (3, 8)},
        {"x.weight": (8, 4), "y.weight": (3, 8)},
    ),
    "a file sorted by name": (
        {f"block{i}{part}": shape for i in sorted(map(str, range(12))) for part, shape in ((".m.weight", (8, 8)), (".n.weight", (8,)))},
        {f"{word}{part}": shape for word in "abcdefghijkl" for part, shape in (("x.weight", (8, 8)), ("y.weight", (8,)))},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("source", "target"), REFUSED.values(), ids=REFUSED)
def test_what_could_be_exchanged_is_left_and_told(source, target):
    keymap = wb.match({name: torch.rand(shape) for name, shape in source.items()}, target)
    assert not keymap.pairs
    assert {told.target for told in itertools.chain(keymap.ambiguous, keymap.unmatched)} == set(target)


def test_numbers_tell_which_of_several_is_which():
    names = [f"hidden{i}" for i in range(12)]
    source = {name: torch.rand(shape) for name, shape in sorted(square(*names).items())}  # 1, 10, 11, 2, …
    keymap = wb.match(source, square(*(f"stack.{2 * i}" for i in range(12))))
    assert {pair.target: pair.source for pair in keymap.pairs} == {
        f"stack.{2 * i}.{param}": f"hidden{i}.{param}" for i in range(12) for param in ("weight", "bias")
    }


REST = {f"layers.{i}.{name}": shape for i in range(4) for name, shape in (("weight", (8, 8)), ("bias", (8,)), ("norm.weight", (8,)))}
LEFT = {
    "an output layer by another general word": ({"fc.1.weight": (3, 8), "fc.1.bias": (3,)}, {"head.weight": (3, 8), "head.bias": (3,)}, True),
    "a table by another word": ({"embed.weight": (30, 8)}, {"word_embedding.weight": (30, 8)}, True),
    "two that differ": ({"encoder.weight": (30, 8), "last.weight": (9, 8)}, {"table.weight": (30, 8), "outer.weight": (9, 8)}, True),
    "the head of a task that is told": ({"classifier.weight": (2, 8)}, {"qa_outputs.weight": (2, 8)}, False),
    "a table of positions for one of words": ({"pos_embed.weight": (30, 8)}, {"word_embedding.weight": (30, 8)}, False),
    "another matrix is left in the file": (
        {"last.weight": (3, 8), "mid.weight": (9, 8), "aux.weight": (5, 8)},
        {"outer.weight": (3, 8), "inner.weight": (9, 8)},
        False,
    ),
    "one of two adapters": (
        {f"{part}.{name}.weight": shape for name in ("first", "second") for part, shape in (("lora_A", (2, 8)), ("lora_B", (8, 2)))},
        {"lora_A.default.weight": (2, 8), "lora_B.default.weight": (8, 2)},
        False,
    ),
    "an actor's for a critic's": ({"actor.0.weight": (9, 8), "actor.2.weight": (3, 9)}, {"critic.a.weight": (9, 8), "critic.b.weight": (3, 9)}, False),
}  # fmt: skip


@pytest.mark.parametrize(("source", "target", "taken"), LEFT.values(), ids=LEFT)
def test_all_that_is_left_of_both_is_taken_by_general_words_alone(source, target, taken):
    keymap = wb.match({name: torch.rand(shape) for name, shape in {**REST, **source}.items()}, {**REST, **target})
    pairs = {pair.target: pair.source for pair in keymap.pairs}
    assert REST.keys() <= pairs.keys()
    assert {name: pairs.get(name) for name in target} == dict(zip(target, source if taken else [None] * len(target), strict=False))
    assert {told.target for told in itertools.chain(keymap.ambiguous, keymap.unmatched)} == (set() if taken else set(target))


def filled_by(source, wanted):
    """Which name of the file fills each of the model's, by names and shapes alone."""
    return {pair.target: pair.source for pair in wb.match({name: torch.randn(shape) for name, shape in source.items()}, wanted).pairs}


def test_a_norm_goes_where_the_module_beside_it_went():
    """`bn1` behind `conv1` into `1` behind `0`, though every norm of the model is of one width."""
    source, wanted = {}, {}
    for n in range(2):
        for at, (place, number) in enumerate((("conv", 0), ("conv", 3))):
            source[f"layer{n}.{place}{at + 1}.weight"] = wanted[f"body.{n}.residual.{number}.weight"] = (8, 8 + 8 * at * (n + 1), 3, 3)
            for end in ("weight", "bias", "running_mean", "running_var"):
                source[f"layer{n}.bn{at + 1}.{end}"] = wanted[f"body.{n}.residual.{number + 1}.{end}"] = (8,)
    taken = filled_by(source, wanted)
    assert taken.keys() == wanted.keys()
    assert all(int(name.split(".")[1]) == int(other[5]) for name, other in taken.items())
    assert all(("1" if name.split(".")[3] in "01" else "2") == other.split(".")[1][-1] for name, other in taken.items())


def test_the_only_norm_left_in_a_parent_that_is_known():
    source, wanted = {}, {}
    for n in range(2):
        for words, names in (("embed.proj", "patch.proj"), ("embed.norm", "patch.layer_norm"), ("norm", "last_norm")):
            for side, word in ((source, words), (wanted, names)):
                side |= {
                    f"stage{n}.{word}.weight": (4 + n, 3) if "proj" in word else (4,),
                    f"stage{n}.{word}.bias": (4 + n,) if "proj" in word else (4,),
                }
    taken = filled_by(source, wanted)
    assert all(taken[f"stage{n}.patch.layer_norm.weight"] == f"stage{n}.embed.norm.weight" for n in range(2))


def test_one_root_of_the_file_holds_the_models_own_names():
    """A tower of SigLIP: the blocks of both towers are alike, and what stands beside them is in one alone."""
    blocks = {f"encoder.layers.{n}.fc{at}.weight": (8, 8) for n in range(2) for at in (1, 2)}
    wanted = blocks | {"embeddings.patch.weight": (8, 3, 4, 4), "post_norm.weight": (8,)}
    source = {f"text_model.{name}": shape for name, shape in blocks.items()} | {
        f"vision_model.{name}": shape for name, shape in wanted.items()
    }
    assert filled_by(source, wanted) == {name: f"vision_model.{name}" for name in wanted}
    assert not filled_by(source | {f"text_model.{name}": shape for name, shape in wanted.items()}, wanted)


def test_the_one_list_of_blocks_of_either_side():
    """An own GPT with a fused `qkv` into words that agree in less than half."""
    source, wanted = {}, {}
    for n in range(2):
        ours = {"qkv": (48, 16), "out": (16, 16), "mlp.0": (40, 16), "mlp.2": (16, 40)}
        theirs = {f"attention.{word}": (16, 16) for word in ("query", "key", "value", "proj")}
        theirs |= {"feed_forward.expand": (40, 16), "feed_forward.contract": (16, 40)}
        for side, place, words, norms in (
            (source, "blocks", ours, ("ln_1", "ln_2")),
            (wanted, "layers", theirs, ("attention_norm", "ffn_norm")),
        ):
            for word, shape in words.items():
                side |= {f"{place}.{n}.{word}.weight": shape, f"{place}.{n}.{word}.bias": shape[:1]}
            side |= {f"{place}.{n}.{word}.{end}": (16,) for word in norms for end in ("weight", "bias")}
    taken = filled_by(source, wanted)
    assert taken.keys() == wanted.keys()
    assert taken["layers.1.attention.key.bias"] == "blocks.1.qkv.bias"
    assert taken["layers.0.feed_forward.expand.weight"] == "blocks.0.mlp.0.weight"
    assert taken["layers.0.ffn_norm.weight"] == "blocks.0.ln_2.weight"


def test_parts_of_stages_that_count_first():
    """Segformer of transformers 4 into 5, beside a head whose lists have modules of the same words."""
    source, wanted = {}, {}
    for n in range(3):
        wanted |= {f"head.a.{n}.proj.weight": (5, n + 9), f"head.b.{n}.norm.weight": (5,)}
        for at in range(2):
            source[f"enc.block.{n}.{at}.mlp.dense1.weight"] = wanted[f"stages.{n}.blocks.{at}.mlp.dense1.weight"] = (n + 20, n + 4)
        source[f"enc.layer_norm.{n}.weight"] = wanted[f"stages.{n}.layer_norm.weight"] = (8,)
        for word, shape in (("proj", (8, 8, 3, 3)), ("norm", (8,))):
            source[f"enc.embeds.{n}.{word}.weight"] = wanted[f"stages.{n}.embeds.{word}.weight"] = shape
    taken = filled_by(source, wanted)
    assert taken["stages.1.embeds.norm.weight"] == "enc.embeds.1.norm.weight"
    assert taken["stages.2.embeds.proj.weight"] == "enc.embeds.2.proj.weight"


@pytest.mark.parametrize(
    "names",
    [
        ("up4", "up3", "up2"),
        ("up.4", "up.3", "up.2"),
        ("refinenet1", "refinenet2", "refinenet3"),
        ("decode1", "decode2", "decode3"),
        ("uplayer1", "uplayer2", "uplayer3"),
        ("decoder_stage2", "decoder_stage1", "decoder_stage3"),
    ],
)
def test_numbers_under_other_words_do_not_decide_against_the_order_or_on_a_way_up(names: tuple[str, ...]) -> None:
    source = {f"net.{name}.conv.weight": torch.zeros(8, 8, 3, 3) for name in names}
    km = wb.match(source, {f"net.stage.layers.{n}.conv.weight": (8, 8, 3, 3) for n in range(3)})
    assert not km.pairs
    assert len(km.ambiguous) == 3


def test_the_last_refinenet_of_midas_is_the_first_layer() -> None:
    source = {f"scratch.refinenet{n}.out_conv.weight": torch.zeros(8, 8, 1, 1) for n in (1, 2, 3, 4)}
    km = wb.match(source, {f"neck.fusion_stage.layers.{n}.projection.weight": (8, 8, 1, 1) for n in range(4)})
    assert [pair.source for pair in km.pairs] == [f"scratch.refinenet{n}.out_conv.weight" for n in (4, 3, 2, 1)]


def _encoder(head: str, size: tuple[int, ...] = (5, 8), **more: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    blocks = {f"layers.{n}.fc{m}.weight": (16, 8) if m == 1 else (8, 16) for n in range(3) for m in (1, 2)}
    return {"embed.weight": (30, 8), **blocks, **more, f"{head}.weight": size}


def _found(source: dict[str, tuple[int, ...]], target: dict[str, tuple[int, ...]], name: str) -> str:
    km = wb.match({n: torch.zeros(s) for n, s in source.items()}, target)
    return next((pair.source for pair in km.pairs if pair.target == name), "")


def test_the_last_one_left_is_taken_where_its_place_agrees() -> None:
    assert _found(_encoder("dense"), _encoder("forecast"), "forecast.weight") == "dense.weight"


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (_encoder("lm_head"), _encoder("score")),  # another task
        (_encoder("dense"), _encoder("forecast", more=(3, 3))),
        (_encoder("image_tower"), _encoder("text_tower")),
        (dict(reversed(_encoder("dense").items())), _encoder("forecast")),  # another place
        (_encoder("dense", (5, 8), **{"other.weight": (3, 8)}), _encoder("forecast")),  # more is left
        ({**_encoder("dense"), "rival.weight": (5, 8)}, _encoder("forecast")),
    ],
)
def test_the_last_one_left_is_left_where_more_speaks_against_it(
    source: dict[str, tuple[int, ...]], target: dict[str, tuple[int, ...]]
) -> None:
    if "more" in target:
        target = {**target, "more.weight": target.pop("more")}
    name = next(n for n in target if n.startswith(("score", "forecast", "text_tower")))
    assert not _found(source, target, name)


def test_a_scale_goes_where_its_shift_went() -> None:
    source = {f"layers.{n}.norm_{m}.{p}": (8,) for n in range(2) for m in (1, 2) for p in ("alpha", "bias")}
    more = {
        f"layers.{n}.{w}.weight": s for n in range(2) for w, s in (("attn.q", (8, 8)), ("ff.linear_1", (16, 8)), ("ff.linear_2", (8, 16)))
    }
    target = {n.replace("alpha", "weight"): s for n, s in source.items()}
    km = wb.match({n: torch.zeros(s) for n, s in (source | more).items()}, target | more)
    assert all(pair.source.replace("alpha", "weight") == pair.target for pair in km.pairs)
    assert len(km.pairs) == len(target | more)


def test_modules_of_one_form_are_told_by_the_word_that_they_share() -> None:
    rest = {"features.weight": (32, 4), "value_stream.2.weight": (1, 20), "advantage_stream.2.weight": (6, 20)}
    source = {**rest, "advantage_stream.0.weight": (20, 32), "value_stream.0.weight": (20, 32)}
    target = {
        "features.weight": (32, 4),
        "value_fc.weight": (20, 32),
        "value_out.weight": (1, 20),
        "adv_fc.weight": (20, 32),
        "adv_out.weight": (6, 20),
    }
    assert _found(source, target, "value_fc.weight") == "value_stream.0.weight"


def test_attn1_and_attn2_of_diffusers_are_self_and_cross_attention() -> None:
    source = {f"blocks.{n}.{a}_attn.{w}.weight": (8, 8) for n in range(2) for a in ("self", "cross") for w in "qkvo"}
    words = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0"}
    target = {f"blocks.{n}.attn{a}.{w}.weight": (8, 8) for n in range(2) for a in (1, 2) for w in words.values()}
    for number, word in ((1, "self"), (2, "cross")):
        assert _found(source, target, f"blocks.1.attn{number}.to_q.weight") == f"blocks.1.{word}_attn.q.weight"


def test_stacked_experts_are_taken_apart_for_litgpt() -> None:
    source = {
        f"model.layers.{n}.mlp.experts.{w}": s for n in range(2) for w, s in (("gate_up_proj", (3, 48, 16)), ("down_proj", (3, 16, 24)))
    }
    words = {"fc_1": (24, 16), "fc_2": (24, 16), "proj": (16, 24)}
    target = {f"transformer.h.{n}.mlp.experts.{e}.{w}.weight": s for n in range(2) for e in range(3) for w, s in words.items()}
    source |= {f"model.layers.{n}.self_attn.o_proj.weight": (16, 16) for n in range(2)}
    target |= {f"transformer.h.{n}.attn.proj.weight": (16, 16) for n in range(2)}
    km = wb.match({n: torch.zeros(s) for n, s in source.items()}, target)
    assert {p.target: p.parts[0].rows for p in km.pairs}["transformer.h.1.mlp.experts.2.fc_2.weight"] == (2 * 48 + 24, 2 * 48 + 48)
    assert len(km.pairs) == len(target)


def test_a_layer_scale_may_keep_its_vector_as_gamma() -> None:
    shapes = {
        f"blocks.{n}.{w}": s
        for n in range(2)
        for w, s in (("conv.weight", (8, 8, 3, 3)), ("norm.weight", (8,)), ("norm.running_mean", (8,)))
    }
    source = shapes | {f"blocks.{n}.layer_scale_{m}": (8, 1, 1) for n in range(2) for m in (1, 2)}
    target = shapes | {f"blocks.{n}.layer_scale_{m}.gamma": (8, 1, 1) for n in range(2) for m in (1, 2)}
    assert _found(source, target, "blocks.1.layer_scale_2.gamma") == "blocks.1.layer_scale_2"


def test_a_bias_goes_where_the_weight_of_its_module_went_and_convolutions_of_several_sizes_by_those() -> None:
    source = linear("attn", 8, 4) | linear("x.embed", 5, 8) | linear("y", 5, 7)
    target = linear("attn", 8, 4) | linear("z.embed", 5, 8) | linear("w.out", 5, 7)
    pairs = {p.target: p.source for p in wb.match(source, {n: tuple(t.shape) for n, t in target.items()}).pairs}
    assert pairs["z.embed.weight"] == "x.embed.weight"
    assert pairs["z.embed.bias"] == "x.embed.bias"  # though 'y' has one of its length
    taken = wb.match({**source, "x.embed.bias": torch.ones(6)}, {n: tuple(t.shape) for n, t in target.items()})
    assert "z.embed.bias" not in {p.target for p in taken.pairs}
    sizes = {"embedding.weight": torch.ones(40, 12)} | {f"convs.{i}.{p}": t for i in range(3) for p, t in conv(12, 10, i + 2).items()}
    wanted = {"embed.weight": (40, 12)} | {f"conv_{i + 2}.{p}": tuple(t.shape) for i in range(3) for p, t in conv(12, 10, i + 2).items()}
    assert {p.target: p.source for p in wb.match(sizes, wanted).pairs if "conv" in p.target} == {
        f"conv_{i + 2}.{p}": f"convs.{i}.{p}" for i in range(3) for p in ("weight", "bias")
    }


def linear(name: str, outputs: int, inputs: int) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": torch.randn(outputs, inputs), f"{name}.bias": torch.randn(outputs)}


def conv(inputs: int, outputs: int, size: int) -> dict[str, torch.Tensor]:
    return {"weight": torch.randn(outputs, inputs, size), "bias": torch.randn(outputs)}


def _towers(*paths: str, depth: int = 2) -> dict[str, tuple[int, ...]]:
    parts = (("norm.weight", (8,)), ("norm.bias", (8,)), ("fc.weight", (8, 8)), ("fc.bias", (8,)))
    return {f"{path}.layers.{n}.{part}": shape for path in paths for n in range(depth) for part, shape in parts}


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (("passage_model", "query_model"), ("question_encoder", "ctx_encoder")),
        (("prior", "posterior"), ("q_net", "p_net")),
        (("net.drug.body", "net.protein.body"), ("left.stack", "right.stack")),
        (("red", "green", "blue"), ("one", "two", "three")),
        (("towers.0", "towers.1"), ("query", "context")),
    ],
)
@pytest.mark.parametrize("more", [{}, {f"known.{n}.weight": (n + 3, 9) for n in range(9)}], ids=["alone", "beside others"])
def test_towers_that_hold_the_same_are_not_told_apart_by_their_order(
    ours: tuple[str, ...], theirs: tuple[str, ...], more: dict[str, tuple[int, ...]]
) -> None:
    assert filled_by(_towers(*ours) | more, _towers(*theirs) | more).keys() == more.keys()


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (("src_encoder", "tgt_encoder"), ("source_enc", "target_enc")),
        (("decoder", "encoder"), ("dec", "enc")),
        (("right_eye", "left_eye"), ("view_r", "view_l")),
        (("rnn_f", "rnn_b"), ("forward_rnn", "backward_rnn")),
        (("rnnFwd", "rnnBwd"), ("cell_f", "cell_b")),
    ],
)
def test_towers_are_told_apart_by_words_that_mean_the_same(ours: tuple[str, str], theirs: tuple[str, str]) -> None:
    taken = filled_by(_towers(*ours), _towers(*reversed(theirs)))
    assert taken == dict(zip(_towers(*theirs), _towers(*ours), strict=True))


def test_no_list_is_torn_between_two_others() -> None:
    def lists(*names: str) -> dict[str, tuple[int, ...]]:
        return {f"{name}.{part}": s for name in names for part, s in (("c.weight", (8, 8)), ("n.weight", (8,)), ("n.bias", (8,)))}

    assert not filled_by(lists("a1", "a2", "a3", "b1", "b2"), lists("x1", "x2", "y1", "y2", "y3"))


def test_an_ordinary_list_counts_from_its_first() -> None:
    taken = filled_by({f"layers.{n}.fc.weight": (8, 8) for n in range(1, 13)}, {f"blocks.{n}.fc.weight": (8, 8) for n in range(12)})
    assert taken == {f"blocks.{n}.fc.weight": f"layers.{n + 1}.fc.weight" for n in range(12)}


def _double_conv(path: str, words: tuple[str, ...], wide: int) -> dict[str, tuple[int, ...]]:
    """Two convolutions of which the first has a shape of its own in the model, and a norm behind each."""
    shapes = {"conv": (8, wide, 3, 3), "norm": (8,), "other": (8, 8, 3, 3), "last": (8,)}
    return {
        f"{path}.{word}.{end}": shape
        for word, shape in zip(words, shapes.values(), strict=True)
        for end in (("weight",) if len(shape) > 1 else ("weight", "bias", "running_mean", "running_var"))
    }


def _unet(paths: list[str], words: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    return {name: shape for n, path in enumerate(paths) for name, shape in _double_conv(path, words, n + 3).items()}


SOURCE, WANTED = ["inc", "down.conv", "up1.conv"], ["encoder.0", "encoder.1", "decoder.0"]


@pytest.mark.parametrize("words", [("0", "1", "3", "4"), ("conv1", "bn1", "conv2", "bn2"), ("first", "scale", "second", "shift")])
def test_a_member_follows_its_module(words: tuple[str, ...]) -> None:
    wanted = _unet(WANTED, ("conv_a", "norm_a", "conv_b", "norm_b"))
    source = _unet(SOURCE, words)
    assert filled_by(source, wanted) == dict(zip(wanted, source, strict=True))
    by_name = dict(sorted(source.items()))  # as safetensors writes
    right = dict(zip(wanted, source, strict=True))
    assert all(right[name] == other for name, other in filled_by(by_name, wanted).items())


def test_a_file_sorted_by_name_tells_no_order() -> None:
    """`after` stands before `fc1` by its letter alone."""
    ours, theirs = ("after", "fc1", "fc2", "then"), ("norm_in", "up", "down", "norm_out")
    shapes = ((8,), (20, 8), (8, 20), (8,))
    source, wanted = (
        {f"{path}.{n}.{w}.weight": s for n in range(2) for w, s in zip(words, shapes, strict=True)}
        for path, words in (("blocks", ours), ("layers", theirs))
    )
    assert not {name for name in filled_by(source, wanted) if "norm" in name}


def test_queries_and_keys_of_a_rotary_model_do_not_follow_their_module() -> None:
    words = {"q": (8, 8), "k": (8, 8), "v": (8, 8), "o": (8, 8), "gate": (20, 8), "up": (20, 8), "down": (8, 20)}
    source = {f"net.layers.{n}.{'mix' if len(w) < 2 else 'ffn'}.{w}.weight": s for n in range(2) for w, s in words.items()}
    wanted = {f"model.layers.{n}.{'self_attn' if len(w) < 2 else 'mlp'}.{w}_proj.weight": s for n in range(2) for w, s in words.items()}
    source |= {"net.emb.weight": (30, 8)}
    wanted |= {"model.embed_tokens.weight": (30, 8)}
    taken = filled_by(source, wanted)
    assert taken["model.layers.1.mlp.up_proj.weight"] == "net.layers.1.ffn.up.weight"
    assert not {name for name in taken if ".q_proj." in name or ".k_proj." in name}


def test_heads_kept_one_by_one_under_another_word() -> None:
    def block(path: str, attn: str) -> dict[str, tuple[int, ...]]:
        heads = {f"{path}.{attn}.heads.{h}.{w}.weight": (4, 8) for h in range(2) for w in ("key", "query", "value")}
        return heads | {f"{path}.{attn}.proj.weight": (8, 8), f"{path}.{attn}.proj.bias": (8,)}

    source = {n: s for at in range(2) for n, s in block(f"blocks.{at}", "sa").items()}
    wanted = {n: s for at in range(2) for n, s in block(f"layers.{at}", "attn").items()}
    assert filled_by(source, wanted) == dict(zip(wanted, source, strict=True))


def test_two_words_that_no_other_shares_tell_the_last_of_a_form() -> None:
    boxes = {f"boxes.{n}.weight": (n + 40, 8) for n in range(12)}
    source = (
        _encoder("input_proj", (9, 7, 1, 1))
        | boxes
        | {"query_embed.weight": (6, 8), "class_embed.weight": (6, 8), "class_embed.bias": (6,)}
    )
    target = {f"model.{n}": s for n, s in _encoder("input_projection", (9, 7, 1, 1)).items()} | boxes
    target |= {
        "model.query_position_embeddings.weight": (6, 8),
        "class_labels_classifier.weight": (6, 8),
        "class_labels_classifier.bias": (6,),
    }
    assert _found(source, target, "model.input_projection.weight") == "input_proj.weight"
    assert _found(source, target, "model.query_position_embeddings.weight") == "query_embed.weight"


@pytest.mark.parametrize(("roots", "taken"), [(("online_model", "ema_model"), "online_model"), (("net_a", "net_b"), None)])
def test_of_two_roots_with_the_models_names_the_moving_average_is_left_and_told(roots: tuple[str, str], taken: str | None) -> None:
    wanted = {"0.weight": (8, 3), "0.bias": (8,), "2.weight": (5, 8), "2.bias": (5,)}
    km = wb.match({f"{root}.{n}": torch.zeros(s) for root in roots for n, s in wanted.items()}, wanted)
    assert {pair.target: pair.source for pair in km.pairs} == ({n: f"{taken}.{n}" for n in wanted} if taken else {})
    assert any("'ema_model'" in str(finding) for finding in km.findings) == bool(taken)


def test_a_head_that_the_file_has_not_is_offered_the_table_of_its_shape() -> None:
    blocks = {f"layers.{n}.mlp.fc{m}.weight": (16, 8) if m == 1 else (8, 16) for n in range(2) for m in (1, 2)}
    source = {"embed_tokens.weight": (30, 8), **blocks}
    km = wb.match({n: torch.zeros(s) for n, s in source.items()}, {**source, "lm_head.weight": (30, 8)})
    (told,) = km.unmatched
    assert "keymap.edited({'lm_head.weight': 'embed_tokens.weight'})" in told.reason
    assert km.edited({"lm_head.weight": "embed_tokens.weight"}).ok


def _trunk(width: int = 8, **more: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    blocks = {f"layers.{n}.mlp.fc{m}.weight": (20, width) if m == 1 else (width, 20) for n in range(4) for m in (1, 2)}
    return blocks | {f"{name.replace('__', '.')}.weight": shape for name, shape in more.items()}


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("value", "cost", False),
        ("projector", "neck", False),
        ("pooler__dense", "key_proj", False),
        ("enc_to_dec", "visual_projection", False),
        ("features_proj", "feature_projection", True),
    ],
)
def test_the_last_that_is_left_needs_a_word_in_common(one: str, other: str, same: bool) -> None:
    target = _trunk(**{other: (8, 8) if same else (7, 8)})
    name = list(target)[-1]
    assert _found(_trunk(**{one: target[name]}), target, name) == (f"{one.replace('__', '.')}.weight" if same else "")


@pytest.mark.parametrize(
    "more",
    [
        {"discriminator_predictions.dense": (8, 8), "discriminator_predictions.dense_prediction": (1, 8)},
        {"cls.predictions.transform.dense": (8, 8), "cls.predictions.transform.LayerNorm.gamma": (8,), "cls.predictions.decoder": (30, 8)},
    ],
)
def test_a_pooler_is_no_head_for_another_task(more: dict[str, tuple[int, ...]]) -> None:
    """ELECTRA's head, of one row, is no vector; and a scale called gamma is a module beside."""
    source = _trunk(embed_tokens=(30, 8)) | {n if n.endswith("gamma") else f"{n}.weight": shape for n, shape in more.items()}
    source |= {f"{n}.bias": shape[:1] for n, shape in more.items() if not n.endswith("gamma")}
    target = _trunk(embed_tokens=(30, 8)) | {"pooler.dense.weight": (8, 8), "pooler.dense.bias": (8,)}
    assert _found(source, target, "pooler.dense.weight") == ""


def test_a_place_that_is_not_known_is_not_the_root() -> None:
    """PointNet: the norms of two parts, one of which lies in the root of the file."""
    shapes = {"one": (10, 20), "norm": (10,), "two": (6, 10), "norm2": (6,), "three": (9, 6), "out": (4, 10)}
    ours = "feat.stn.fc1:one feat.stn.fc2:two feat.stn.fc3:three feat.stn.bn4:norm feat.stn.bn5:norm2 fc1:one fc2:out bn1:norm"
    theirs = "tnet.dense.0.0:one tnet.dense.0.1:norm tnet.dense.1.0:two tnet.dense.1.1:norm2 tnet.dense.2:three head.0.0:one head.0.1:norm head.1:out"
    sides = []
    for side in (ours, theirs):
        modules = [module.split(":") for module in side.split()]
        sides.append({f"{at}.{p}": shapes[kind][: None if p == "weight" else 1] for at, kind in modules for p in ("weight", "bias")})
    assert _found(*sides, "tnet.dense.0.1.weight") in ("feat.stn.bn4.weight", "")
    assert _found(*sides, "head.0.1.weight") in ("bn1.weight", "")
