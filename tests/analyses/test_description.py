"""describe: what a network is, from modules of torch, from look-alikes of published ones, and from names nobody has used.

Oracles are the arguments the modules were built with, and the file's own arithmetic.
"""

import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import workbench as wb
from workbench.errors import CorruptFileError, MissingFileError


def meta(**shapes):
    return {name.replace("__", "."): torch.empty(shape, device="meta") for name, shape in shapes.items()}


def decoder(depth=3, width=64, kv=32, inner=96, vocabulary=100, block="layers", top="model", head=True, norms=None):
    """The names of Llama and its relatives; `norms` is the width of per-head norms."""
    out = {f"{top}.embed_tokens.weight": (vocabulary, width)}
    for i in range(depth):
        here = f"{top}.{block}.{i}"
        for name, rows in (("q", width), ("k", kv), ("v", kv)):
            out[f"{here}.self_attn.{name}_proj.weight"] = (rows, width)
            if norms and name != "v":
                out[f"{here}.self_attn.{name}_norm.weight"] = (norms,)
        out |= {f"{here}.self_attn.o_proj.weight": (width, width), f"{here}.mlp.gate_proj.weight": (inner, width)}
        out |= {f"{here}.mlp.up_proj.weight": (inner, width), f"{here}.mlp.down_proj.weight": (width, inner)}
        out |= {f"{here}.input_layernorm.weight": (width,), f"{here}.post_attention_layernorm.weight": (width,)}
    out[f"{top}.norm.weight"] = (width,)
    return tensors(out | ({"lm_head.weight": (vocabulary, width)} if head else {}))


def tensors(shapes):
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def values(report, part=None):
    return {fact.what: fact.value for fact in report.facts if part in (None, fact.part)}


def verdicts(report):
    return {c.field: c.agrees for c in report.comparisons}


# structure


def test_a_decoder_is_read_from_its_shapes():
    found = values(wb.describe(decoder(), config={}))
    expected = {
        "depth": 3,
        "width": 64,
        "query width": 64,
        "key width": 32,
        "queries per key": 2,
        "feed-forward width": 96,
        "feed-forward": "gated",
        "vocabulary": 100,
        "heads": None,
        "looks like": "Llama",
    }
    assert {what: found[what] for what in expected} == expected


def test_heads_are_never_guessed_but_told_where_a_tensor_has_one_entry_for_each():
    assert wb.describe(decoder(), config={}).value("heads") is None
    assert "not derivable" in str(wb.describe(decoder(), config={}))
    told = wb.describe(decoder(norms=16), config={})
    assert (told.value("heads"), told.value("head width")) == (4, 16)
    assert wb.describe(decoder(kv=64, norms=64), config={}).value("heads") is None  # a norm over all heads at once


def test_names_that_nobody_has_used_are_read_like_known_ones():
    shapes = {"entry.tokens.weight": (50, 24)}
    for i in range(5):
        here = f"tower.stage_{i}.mix"
        shapes |= {
            f"{here}.to_q.weight": (24, 24),
            f"{here}.to_k.weight": (8, 24),
            f"{here}.to_v.weight": (8, 24),
            f"{here}.back.weight": (24, 24),
        }
        shapes |= {
            f"tower.stage_{i}.wide.a.weight": (72, 24),
            f"tower.stage_{i}.wide.b.weight": (24, 72),
            f"tower.stage_{i}.scale.weight": (24,),
        }
    report = wb.describe(tensors(shapes), config={})
    found = values(report)
    assert (found["depth"], found["width"], found["queries per key"], found["vocabulary"]) == (5, 24, 3, 50)
    assert (found["feed-forward width"], found["feed-forward"]) == (72, "plain")
    assert "looks like" not in found


@pytest.mark.parametrize("layers", [1, 2, 7])
def test_torch_transformer_layers(layers):
    module = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 80, device="meta"), layers, enable_nested_tensor=False)
    found = values(wb.describe(module, config={}))
    assert (found["depth"], found["width"], found["feed-forward width"], found["query width"]) == (layers, 32, 80, 32)


def test_encoder_and_decoder_are_two_parts():
    module = nn.Transformer(32, 4, 3, 2, 48, batch_first=True, device="meta")
    report = wb.describe(module, config={"encoder_layers": 3, "decoder_layers": 2, "d_model": 32})
    assert (report.value("depth", "encoder.layers.*"), report.value("depth", "decoder.layers.*")) == (3, 2)
    assert report
    swapped = wb.describe(module, config={"encoder_layers": 2, "decoder_layers": 3})
    assert verdicts(swapped) == {"encoder_layers": False, "decoder_layers": False}


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (nn.LSTM(10, 20, 3, device="meta"), "LSTM"),
        (nn.GRU(10, 20, 3, device="meta"), "GRU"),
        (nn.RNN(10, 20, 3, device="meta"), "RNN"),
        (nn.LSTM(10, 20, 3, bidirectional=True, device="meta"), "bidirectional LSTM"),
    ],
)
def test_recurrent_layers(module, kind):
    found = values(wb.describe(module, config={}))
    assert (found["recurrent"], found["depth"], found["width"]) == (kind, 3, 20)


def test_a_projected_lstm_is_as_wide_as_its_hidden_state():
    found = values(wb.describe(nn.LSTM(10, 20, proj_size=5, device="meta"), config={}))
    assert (found["recurrent"], found["width"]) == ("LSTM", 20)


def test_fused_projections_in_either_orientation():
    linear, conv1d, grouped = {}, {}, {}
    for i in range(3):
        common = {
            f"h.{i}.attn.out_proj.weight": (16, 16),
            f"h.{i}.ln_1.weight": (16,),
            f"h.{i}.mlp.a.weight": (64, 16),
            f"h.{i}.mlp.b.weight": (16, 64),
        }
        linear |= {f"h.{i}.attn.qkv.weight": (48, 16), **common}
        conv1d |= {f"h.{i}.attn.c_attn.weight": (16, 48), **common}
        grouped |= {f"h.{i}.attn.query_key_value.weight": (16 + 2 * 4, 16), **common}
    for shapes, ratio in ((linear, 1), (conv1d, 1), (grouped, 4)):
        found = values(wb.describe(tensors(shapes), config={}))
        assert (found["width"], found["query width"], found["queries per key"], found["feed-forward width"]) == (16, 16, ratio, 64)


def test_a_gate_joined_to_the_way_up_is_seen():
    shapes = {}
    for i in range(3):
        shapes |= {f"l.{i}.mlp.gate_up_proj.weight": (2 * 40, 16), f"l.{i}.mlp.down_proj.weight": (16, 40), f"l.{i}.norm.weight": (16,)}
    found = values(wb.describe(tensors(shapes), config={}))
    assert (found["feed-forward width"], found["feed-forward"]) == (40, "gated")


@pytest.mark.parametrize("layout", ["numbered", "stacked"])
def test_experts(layout):
    model = {name: shape for name, shape in decoder(depth=4).items() if ".mlp." not in name or ".0." in name}
    for i in range(1, 4):
        here = f"model.layers.{i}.mlp"
        model[f"{here}.gate.weight"] = torch.empty(8, 64, device="meta")
        if layout == "stacked":
            model |= tensors({f"{here}.experts.gate_up_proj": (8, 2 * 24, 64), f"{here}.experts.down_proj": (8, 64, 24)})
        for j in range(8) if layout == "numbered" else ():
            model |= tensors({f"{here}.experts.{j}.{w}.weight": s for w, s in (("w1", (24, 64)), ("w2", (64, 24)), ("w3", (24, 64)))})
    report = wb.describe(model, config={"num_experts": 8, "moe_intermediate_size": 24, "intermediate_size": 96, "num_hidden_layers": 4})
    found = values(report)
    assert (found["depth"], found["experts"], found["expert width"], found["feed-forward width"]) == (4, 8, 24, 96)
    assert all(verdicts(report).values())


def test_stages_of_a_convolutional_network_are_counted_each():
    shapes = {"conv1.weight": (64, 3, 7, 7), "bn1.running_mean": (64,)}
    for stage, (depth, width) in enumerate(zip((3, 4, 6, 3), (64, 128, 256, 512), strict=True), 1):
        for i in range(depth):
            for j in (1, 2):
                shapes |= {f"layer{stage}.{i}.conv{j}.weight": (width, width, 3, 3), f"layer{stage}.{i}.bn{j}.weight": (width,)}
    shapes |= {"fc.weight": (1000, 512), "fc.bias": (1000,)}
    report = wb.describe(tensors(shapes), config={"depths": [3, 4, 6, 3], "num_classes": 1000, "in_chans": 3})
    found = values(report)
    assert (found["depth"], found["channels"], found["looks like"]) == ((3, 4, 6, 3), (64, 128, 256, 512), "ResNet")
    assert (found["input channels"], found["outputs"]) == (3, 1000)
    assert report
    assert not wb.describe(tensors(shapes), config={"num_classes": 10})


def test_a_vision_transformer():
    shapes = {"cls_token": (1, 1, 48), "pos_embed": (1, 197, 48), "patch_embed.proj.weight": (48, 3, 16, 16), "head.weight": (7, 48)}
    for i in range(4):
        shapes |= {f"blocks.{i}.attn.qkv.weight": (144, 48), f"blocks.{i}.attn.proj.weight": (48, 48), f"blocks.{i}.norm1.weight": (48,)}
        shapes |= {f"blocks.{i}.mlp.fc1.weight": (192, 48), f"blocks.{i}.mlp.fc2.weight": (48, 192), f"blocks.{i}.norm2.weight": (48,)}
    report = wb.describe(tensors(shapes), config={"patch_size": 16, "depth": 4, "embed_dim": 48, "in_chans": 3})
    found = values(report)
    assert (found["positions"], found["patch size"], found["input channels"], found["looks like"]) == (197, 16, 3, "ViT")
    assert all(verdicts(report).values())


def test_lora_pairs():
    shapes = {}
    for i in range(3):
        for p in ("q_proj", "v_proj"):
            shapes |= {f"base.layers.{i}.{p}.lora_A.default.weight": (8, 64), f"base.layers.{i}.{p}.lora_B.default.weight": (64, 8)}
    assert wb.describe(tensors(shapes), config={}).value("LoRA rank") == 8


def test_plain_layers_are_no_blocks():
    module = nn.Sequential(nn.Linear(8, 16, device="meta"), nn.ReLU(), nn.Linear(16, 4, device="meta"))
    found = values(wb.describe(module, config={}))
    assert found == {"outputs": 4, "widths": (8, 16, 4), "dtype": "float32"}


def test_a_wrapper_prefix_changes_nothing():
    plain = wb.describe(decoder(), config={})
    wrapped = wb.describe({f"module.{name}": tensor for name, tensor in decoder().items()}, config={})
    assert [(f.what, f.value) for f in plain.facts] == [(f.what, f.value) for f in wrapped.facts]


def test_only_the_weights_of_a_training_checkpoint_are_described(tmp_path):
    model = nn.LSTM(3, 4)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(2, 3))[0].sum().backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "t.pt")
    report = wb.describe(tmp_path / "t.pt")
    assert report.elements == sum(p.numel() for p in model.parameters())
    assert report.value("recurrent") == "LSTM"


def test_a_projection_that_carries_more_than_queries_proves_no_heads():
    model = decoder(norms=16)
    for i in range(3):
        model |= tensors({f"model.layers.{i}.self_attn.q_proj.weight": (2 * 64, 64)})  # queries and their gate, as wide as the way out
    found = values(wb.describe(model, config={}))
    assert found["heads"] is None
    assert not found.keys() & {"query width", "queries per key", "head width"}
    assert found["key width"] == 32


@pytest.mark.parametrize("norms", [24, 64, 128])
def test_norms_that_no_head_can_have_prove_no_heads(norms):
    assert wb.describe(decoder(norms=norms, kv=64), config={}).value("heads") is None


def test_blocks_may_differ_in_a_tensor_and_a_table_has_a_column_per_head():
    shapes = {"shared.weight": (100, 48)}
    for i in range(2):
        here = f"encoder.block.{i}.layer"
        shapes |= {f"{here}.0.SelfAttention.{r}.weight": (32, 48) for r in "qkv"} | {f"{here}.0.SelfAttention.o.weight": (48, 32)}
        shapes |= {f"{here}.1.DenseReluDense.wi.weight": (96, 48), f"{here}.1.DenseReluDense.wo.weight": (48, 96)}
        shapes |= {f"{here}.0.layer_norm.weight": (48,), f"{here}.1.layer_norm.weight": (48,)}
    shapes["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (32, 4)
    found = values(wb.describe(tensors(shapes), config={}), "encoder.block.*")
    assert (found["depth"], found["width"], found["heads"], found["feed-forward width"]) == (2, 48, 4, 96)


def test_state_space_blocks_are_as_wide_as_their_embedding_and_keep_nothing_for_a_token():
    shapes = {"embeddings.weight": (100, 48), "norm_f.weight": (48,)}
    for i in range(3):
        here = f"layers.{i}"
        shapes |= {
            f"{here}.mixer.A_log": (96, 16),
            f"{here}.mixer.D": (96,),
            f"{here}.mixer.conv1d.weight": (96, 1, 4),
            f"{here}.norm.weight": (48,),
        }
        shapes |= {
            f"{here}.mixer.in_proj.weight": (192, 48),
            f"{here}.mixer.x_proj.weight": (35, 96),
            f"{here}.mixer.out_proj.weight": (48, 96),
        }
        shapes |= {f"{here}.linear.A_log": (8,), f"{here}.linear.qkv.weight": (144, 48), f"{here}.linear.out.weight": (48, 48)}
    report = wb.describe(tensors(shapes), config={})
    found = values(report)
    assert (found["width"], found["state size"], found["state-space heads"]) == (48, 16, 8)
    assert not any("per token" in need.what for need in report.memory)


def test_pairs_of_one_role_are_no_blocks():
    shapes = {}
    for i in range(4):
        for j in (1, 2):
            shapes |= {f"blocks.{i}.ghost{j}.a.weight": (8, 8, 1, 1), f"blocks.{i}.ghost{j}.b.weight": (8, 1, 3, 3)}
    assert values(wb.describe(tensors(shapes), config={}))["depth"] == 4


def test_the_input_is_found_wherever_it_stands_in_the_file():
    grouped = {f"a.{i}.{c}.weight": (16, 4, 3, 3) for i in range(3) for c in ("x", "y")}
    report = wb.describe(
        tensors(grouped | {f"b.{i}.{c}.weight": (16, 1, 3, 3) for i in range(3) for c in "xy"} | {"stem.weight": (16, 3, 3, 3)}), config={}
    )
    assert report.value("input channels") == 3


# configuration

CONFIG = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 96,
    "vocab_size": 100,
    "max_position_embeddings": 2048,
    "torch_dtype": "float32",
    "tie_word_embeddings": False,
}


def test_every_field_that_shapes_can_check_is_checked():
    report = wb.describe(decoder(), config=CONFIG)
    assert verdicts(report) == {
        **dict.fromkeys(
            ("hidden_size", "num_hidden_layers", "num_key_value_heads", "intermediate_size", "vocab_size", "torch_dtype"), True
        ),
        **dict.fromkeys(("num_attention_heads", "max_position_embeddings", "tie_word_embeddings")),
    }
    assert report


@pytest.mark.parametrize(
    ("field", "wrong"),
    [
        ("hidden_size", 128),
        ("num_hidden_layers", 4),
        ("num_attention_heads", 7),
        ("num_key_value_heads", 8),
        ("intermediate_size", 64),
        ("vocab_size", 101),
        ("torch_dtype", "bfloat16"),
    ],
)
def test_a_contradiction_is_told(field, wrong):
    report = wb.describe(decoder(), config={**CONFIG, field: wrong})
    assert not report
    related = {"num_attention_heads": {"num_key_value_heads"}}  # seven heads cannot share four key heads either
    assert {name for name, agrees in verdicts(report).items() if agrees is False} == {field, *related.get(field, ())}
    assert field in report.headline


def test_heads_are_checked_by_their_width():
    assert verdicts(wb.describe(decoder(), config={**CONFIG, "head_dim": 8}))["num_attention_heads"] is True
    assert verdicts(wb.describe(decoder(), config={**CONFIG, "head_dim": 16}))["num_attention_heads"] is False


def test_tied_embeddings_are_seen(tmp_path):
    model = {name: torch.zeros(tensor.shape) for name, tensor in decoder().items()}
    model["lm_head.weight"] = model["model.embed_tokens.weight"]
    torch.save(model, tmp_path / "tied.pt")
    assert wb.describe(tmp_path / "tied.pt", config={"tie_word_embeddings": True})
    assert not wb.describe(tmp_path / "tied.pt", config={"tie_word_embeddings": False})


def test_a_shared_block_may_be_used_many_times():
    report = wb.describe(decoder(depth=1), config={"num_hidden_layers": 12})
    assert verdicts(report) == {"num_hidden_layers": None}


def test_a_table_of_positions_may_keep_two_rows_for_padding():
    model = {**decoder(), **tensors({"model.embed_positions.weight": (2050, 64)})}
    assert verdicts(wb.describe(model, config={"max_position_embeddings": 2048}))["max_position_embeddings"] is True
    assert verdicts(wb.describe(model, config={"max_position_embeddings": 2047}))["max_position_embeddings"] is False


def test_blocks_that_predict_further_tokens_are_counted_apart():
    assert wb.describe(decoder(depth=5), config={"num_hidden_layers": 4, "num_nextn_predict_layers": 1})
    assert not wb.describe(decoder(depth=5), config={"num_hidden_layers": 4})


def test_nested_configurations_speak_of_their_own_part():
    both = {
        **decoder(depth=3, width=64, top="language_model"),
        **decoder(depth=2, width=32, kv=32, inner=48, top="vision_model", head=False),
    }
    config = {"text_config": {"num_hidden_layers": 3, "hidden_size": 64}, "vision_config": {"num_hidden_layers": 2, "hidden_size": 32}}
    assert all(verdicts(wb.describe(both, config=config)).values())
    config["vision_config"]["hidden_size"] = 64
    assert verdicts(wb.describe(both, config=config))["vision_config.hidden_size"] is False


@pytest.mark.parametrize("way", ["beside", "folder", "path", "dict"])
def test_the_configuration_is_found(way, tmp_path):
    wb.save({name: torch.zeros(tensor.shape) for name, tensor in decoder().items()}, tmp_path / "model.safetensors")
    (tmp_path / ("other.json" if way == "path" else "config.json")).write_text(json.dumps({**CONFIG, "vocab_size": 7}))
    where = tmp_path if way == "folder" else tmp_path / "model.safetensors"
    report = wb.describe(where, **{"path": {"config": tmp_path / "other.json"}, "dict": {"config": {"vocab_size": 7}}}.get(way, {}))
    assert verdicts(report)["vocab_size"] is False
    assert not wb.describe(where, config={}).comparisons


@pytest.mark.parametrize("content", ["[1]", "{", "", '{"a": 1', "\xff"])
def test_a_broken_configuration_is_refused_by_name(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    wb.save({"w": torch.ones(2)}, tmp_path / "w.safetensors")
    with pytest.raises(CorruptFileError, match=r"config\.json"):
        wb.describe(tmp_path / "w.safetensors")
    assert wb.describe(tmp_path / "w.safetensors", config={})


def test_a_configuration_that_is_not_there_is_told(tmp_path):
    with pytest.raises(MissingFileError):
        wb.describe(decoder(), config=tmp_path / "none.json")


@pytest.mark.parametrize("odd", [None, -1, 0, 1.5, "64", [], {}, [64, "a"], True, 1 << 200, {"a": {"b": 1}}])
@pytest.mark.parametrize(
    "field",
    [
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "id2label",
        "torch_dtype",
        "depths",
        "vision_config",
        "head_dim",
        "tie_word_embeddings",
    ],
)
def test_odd_values_of_a_field_never_break_the_report(field, odd):
    report = wb.describe(decoder(), config={**CONFIG, field: odd, "num_nextn_predict_layers": odd})
    assert str(report)
    json.dumps(report.to_dict())


# memory


def test_memory_is_exact_arithmetic():
    report = wb.describe(decoder(), config={})
    elements = sum(t.numel() for t in decoder().values())
    needs = {need.what: need.value for need in report.memory}
    assert report.elements == elements
    assert needs["to load"] == needs["to load as float32"] == 4 * elements
    assert needs["to load as bfloat16"] == 2 * elements
    assert needs["largest tensor"] == 100 * 64 * 4
    assert needs["to train with Adam, float32"] == needs["to train with Adam, mixed precision"] == 16 * elements
    assert needs["to train with Adam, bfloat16"] == 8 * elements
    assert needs["to run, per token kept"] == 2 * 3 * 32 * 2


def test_tied_tensors_and_running_statistics_count_as_they_should(tmp_path):
    norm = nn.BatchNorm1d(8).state_dict()
    torch.save({**norm, "a": (shared := torch.ones(5)), "b": shared}, tmp_path / "m.pt")
    needs = {need.what: need.value for need in wb.describe(tmp_path / "m.pt").memory}
    assert needs["to load"] == 4 * (4 * 8 + 5) + 8  # num_batches_tracked is one int64
    assert needs["to train with Adam, float32"] == 16 * (2 * 8 + 5)


def test_blocks_without_attention_keep_nothing_for_a_token():
    mixed = {name: tensor for name, tensor in decoder(depth=4).items() if ".self_attn." not in name or ".1." in name}
    for i in (0, 2, 3):
        mixed |= tensors({f"model.layers.{i}.mixer.in_proj.weight": (128, 64), f"model.layers.{i}.mixer.out_proj.weight": (64, 64)})
    needs = {need.what: need.value for need in wb.describe(mixed, config={}).memory}
    assert needs["to run, per token kept"] == 2 * 1 * 32 * 2


# any names


WORDS = """model layers 0 1 2 attn self_attn q_proj k_proj v_proj qkv in_proj_weight weight bias experts mlp gate A_log weight_hh_l0 weight_ih_l0
weight_hr_l0 lora_A lora_B default embed_tokens wte pos_embed patch_embed proj norm q_norm k_norm relative_attention_bias sinks conv1 head"""
PARTS = st.sampled_from(WORDS.split())
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 8, 16, 24]), max_size=5)


@given(st.dictionaries(st.lists(PARTS, min_size=1, max_size=6).map(".".join), SHAPES, max_size=30))
def test_any_names_and_shapes_give_a_report(shapes):
    report = wb.describe(tensors(shapes), config=CONFIG)
    assert str(report)
    assert report._repr_html_()


def test_nothing_heavy_is_imported(tmp_path):
    torch.save(nn.LSTM(3, 4).state_dict(), tmp_path / "m.pt")
    code = "import sys, workbench as wb; str(wb.describe(sys.argv[1])); print([m for m in ('torch', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "m.pt")], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip() == "[]", done.stderr
