"""The conventions of keymap/conventions.py, each from the family that writes so to all others: one block's tensors under every spelling.

A spelling is a line of words in the order of the roles; a word with a fused matrix says which roles it holds (``qkv=attn.qkv``).
"""

import itertools
import types

import pytest
import torch

import workbench as wb
from workbench.keymap.values import formula_code

WIDTH, INNER = 8, 12
ENCODERS = {
    "BERT": ("layer", "attention.self.query attention.self.key attention.self.value attention.output.dense intermediate.dense output.dense attention.output.LayerNorm output.LayerNorm"),
    "BART": ("layers", "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.out_proj fc1 fc2 self_attn_layer_norm final_layer_norm"),
    "wav2vec 2.0": ("layers", "attention.q_proj attention.k_proj attention.v_proj attention.out_proj feed_forward.intermediate_dense feed_forward.output_dense layer_norm final_layer_norm"),
    "ESPnet": ("encoders", "self_attn.linear_q self_attn.linear_k self_attn.linear_v self_attn.linear_out feed_forward.w_1 feed_forward.w_2 norm1 norm2"),
    "WeNet": ("encoders", "self_attn.linear_q self_attn.linear_k self_attn.linear_v self_attn.linear_out feed_forward.w_1 feed_forward.w_2 norm_mha norm_ff"),
    "Annotated Transformer": ("layers", "self_attn.linears.0 self_attn.linears.1 self_attn.linears.2 self_attn.linears.3 feed_forward.w_1 feed_forward.w_2 sublayer.0.norm sublayer.1.norm"),
    "attention-is-all-you-need": ("layer_stack", "slf_attn.w_qs slf_attn.w_ks slf_attn.w_vs slf_attn.fc pos_ffn.w_1 pos_ffn.w_2 slf_attn.layer_norm pos_ffn.layer_norm"),
    "ALBERT": ("albert_layers", "attention.query attention.key attention.value attention.dense ffn ffn_output attention.LayerNorm full_layer_layer_norm"),
    "GPT-J": ("h", "attn.q_proj attn.k_proj attn.v_proj attn.out_proj mlp.fc_in mlp.fc_out ln_1 ln_2"),
    "llama.cpp": ("blk", "attn_q attn_k attn_v attn_output ffn_up ffn_down attn_norm ffn_norm"),
    "Bark": ("layers", "attn.q_proj attn.k_proj attn.v_proj attn.out_proj mlp.in_proj mlp.out_proj layernorm_1 layernorm_2"),
    "plain": ("blocks", "mha.W_q mha.W_k mha.W_v mha.W_o ff.0 ff.2 pre_attn_norm pre_mlp_norm"),
    "timm": ("blocks", "qkv=attn.qkv attn.proj mlp.fc1 mlp.fc2 norm1 norm2"),
    "flash-attn": ("layers", "qkv=mixer.Wqkv mixer.out_proj mlp.fc1 mlp.fc2 norm1 norm2"),
    "vit-pytorch": ("layers", "qkv=attn.to_qkv attn.to_out net.1 net.4 attn.norm net.0"),
    "Transformer-XL": ("layers", "qkv=dec_attn.qkv_net dec_attn.o_net pos_ff.CoreNet.0 pos_ff.CoreNet.3 dec_attn.layer_norm pos_ff.layer_norm"),
}  # fmt: skip
DECODERS = {
    "BART": ("layers", "self_attn.q_proj self_attn.k_proj self_attn.out_proj encoder_attn.q_proj encoder_attn.k_proj encoder_attn.out_proj fc1 fc2 self_attn_layer_norm encoder_attn_layer_norm final_layer_norm"),
    "BERT": ("layer", "attention.self.query attention.self.key attention.output.dense crossattention.self.query crossattention.self.key crossattention.output.dense intermediate.dense output.dense attention.output.LayerNorm crossattention.output.LayerNorm output.LayerNorm"),
    "ESPnet": ("decoders", "self_attn.linear_q self_attn.linear_k self_attn.linear_out src_attn.linear_q src_attn.linear_k src_attn.linear_out feed_forward.w_1 feed_forward.w_2 norm1 norm2 norm3"),
    "ParlAI": ("layers", "self_attention.q_lin self_attention.k_lin self_attention.out_lin encoder_attention.q_lin encoder_attention.k_lin encoder_attention.out_lin ffn.lin1 ffn.lin2 norm1 norm2 norm3"),
    "T5": ("block", "layer.0.SelfAttention.q layer.0.SelfAttention.k layer.0.SelfAttention.o layer.1.EncDecAttention.q layer.1.EncDecAttention.k layer.1.EncDecAttention.o layer.2.DenseReluDense.wi layer.2.DenseReluDense.wo layer.0.layer_norm layer.1.layer_norm layer.2.layer_norm"),
    "T5X": ("layers", "self_attention.query self_attention.key self_attention.out encoder_decoder_attention.query encoder_decoder_attention.key encoder_decoder_attention.out mlp.wi mlp.wo pre_self_attention_layer_norm pre_cross_attention_layer_norm pre_mlp_layer_norm"),
    "Megatron": ("layers", "self_attention.query self_attention.key self_attention.dense inter_attention.query inter_attention.key inter_attention.dense mlp.dense_h_to_4h mlp.dense_4h_to_h input_layernorm post_attention_layernorm post_inter_attention_layernorm"),
    "plain": ("blocks", "self_attn.to_q self_attn.to_k self_attn.to_out cross_attn.to_q cross_attn.to_k cross_attn.to_out ff.0 ff.2 norm_self_attn norm_cross_attn norm_ff"),
}  # fmt: skip
GATED = {
    "transformers": ("layers", "mlp.gate_proj mlp.up_proj mlp.down_proj"),
    "Phi-3": ("layers", "gate+up=mlp.gate_up_proj mlp.down_proj"),
    "GTE": ("layer", "up+gate=mlp.up_gate_proj mlp.down_proj"),
    "OLMo": ("blocks", "up+gate=ff_proj ff_out"),
    "EXAONE": ("h", "mlp.c_fc_0 mlp.c_fc_1 mlp.c_proj"),
    "lit-llama": ("h", "mlp.c_fc1 mlp.c_fc2 mlp.c_proj"),
    "timm": ("blocks", "mlp.fc1_g mlp.fc1_x mlp.fc2"),
    "DINOv2": ("blocks", "gate+up=mlp.w12 mlp.w3"),
}  # fmt: skip
ROLES = {
    "encoders": ["q", "k", "v", "o", "up", "down", "norm.attn", "norm.mlp"],
    "decoders": ["q", "k", "o", "xq", "xk", "xo", "up", "down", "norm.attn", "norm.cross", "norm.mlp"],
    "gated": ["gate", "up", "down"],
}
FAMILIES = {"encoders": ENCODERS, "decoders": DECODERS, "gated": GATED}


def shape_of(role):
    return {"up": (INNER, WIDTH), "gate": (INNER, WIDTH), "down": (WIDTH, INNER)}.get(role, (WIDTH,) if "norm" in role else (WIDTH, WIDTH))


def tensors(roles):
    torch.manual_seed(0)
    return [{r: {"weight": torch.randn(shape_of(r)), "bias": torch.randn(shape_of(r)[0])} for r in roles} for _ in range(2)]


def spelt(spelling, blocks):
    container, words = spelling
    out = {}
    for number, block in enumerate(blocks):
        left = iter(block)
        for word in words.split():
            told, _, path = word.rpartition("=")
            parts = {"": 1, "qkv": 3}.get(told, 2)
            roles = list(itertools.islice(left, parts))
            for end in ("weight", "bias"):
                values = [block[role][end] for role in (reversed(roles) if told.startswith("up") else roles)]
                out[f"{container}.{number}.{path}.{end}"] = torch.cat(values)
    return out


def filled(source, wanted):
    keymap = wb.match(source, {name: tuple(value.shape) for name, value in wanted.items()})
    return {name: tensor.load() for name, tensor in keymap.apply(source).items()}


@pytest.mark.parametrize(("kind", "family"), [(kind, family) for kind in FAMILIES for family in FAMILIES[kind]])
def test_a_family_is_read_into_and_out_of_all_others(kind, family):
    blocks = tensors(ROLES[kind])
    source = spelt(FAMILIES[kind][family], blocks)
    for other, spelling in FAMILIES[kind].items():
        wanted = spelt(spelling, blocks)
        values = filled(source, wanted)
        assert not [name for name in values if not torch.equal(values[name], wanted[name])], other
        orders = {word.partition("=")[0] for word in (FAMILIES[kind][family][1] + " " + spelling[1]).split() if "+" in word}
        assert values.keys() == wanted.keys() or len(orders) == 2, other  # [up; gate] and [gate; up] are not said to be one


def test_flax_kernels_turn_before_they_are_put_together():
    torch.manual_seed(0)
    source = {f"layers_{i}/attention/{word}/kernel": torch.randn(WIDTH, WIDTH) for i in range(2) for word in ("query", "key", "value")}
    wanted = {
        f"blocks.{i}.attn.qkv.weight": torch.cat([source[f"layers_{i}/attention/{w}/kernel"].T for w in ("query", "key", "value")])
        for i in range(2)
    }
    values = filled(source, wanted)
    assert all(torch.equal(values[name], wanted[name]) for name in wanted)


def test_one_scale_and_shift_become_weight_and_bias_beside_another_gamma():
    source = {f"stages.{i}.{n}": torch.randn(WIDTH) for i in range(2) for n in ("grn.gamma", "grn.beta", "gamma")}
    words = {"grn.gamma": "grn.weight", "grn.beta": "grn.bias", "gamma": "layer_scale"}
    wanted = {f"stages.{i}.{words[n]}": source[f"stages.{i}.{n}"] for i in range(2) for n in words}
    values = filled(source, wanted)
    assert all(torch.equal(values[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    ("block", "word", "known"),
    [
        ("decoder.layers.{}.", "self_attn.qkv_proj fc1 self_attn_layer_norm", False),  # metaseq: k, v, q
        ("transformer.h.{}.", "attn.qkv_proj mlp.fc_in ln_1", False),  # CodeGen: shards
        ("transformer.layers.{}.", "attention.query_key_value mlp.dense_h_to_4h input_layernorm", False),  # GLM, ChatGLM
        ("model.layers.{}.", "self_attn.qkv_proj mlp.gate_up_proj input_layernorm", True),
        ("model.layers.{}.", "self_attn.W_pack mlp.gate_proj input_layernorm", True),
    ],
)
def test_a_fused_matrix_is_taken_apart_only_where_its_order_is_told(block, word, known):
    fused, inner, norm = word.split()
    source = {}
    for i in range(2):
        place = block.format(i)
        source |= {f"{place}{fused}.weight": torch.randn(3 * WIDTH, WIDTH), f"{place}{inner}.weight": torch.randn(INNER, WIDTH)}
        source[f"{place}{norm}.weight"] = torch.randn(WIDTH)
    wanted = {f"layers.{i}.self_attn.{w}_proj.weight": (WIDTH, WIDTH) for i in range(2) for w in "qkv"}
    keymap = wb.match(source, wanted | {f"layers.{i}.{norm}.weight": (WIDTH,) for i in range(2)})
    claimed = {pair.target for pair in keymap.pairs} & wanted.keys()
    assert claimed == (wanted.keys() if known else set())
    assert known or {a.target for a in keymap.ambiguous} >= wanted.keys()


@pytest.mark.parametrize("piece", ["ia3_l.default", "hada_w1_a.default", "boft_R.default", "oft_R.default.weight", "delta"])
def test_what_stands_beside_a_base_layer_makes_weight_and_bias_doubtful(piece):
    source = {}
    for i in range(2):
        place = f"base_model.model.l.{i}.key."
        source |= {f"{place}base_layer.weight": torch.randn(WIDTH, WIDTH), f"{place}base_layer.bias": torch.randn(WIDTH)}
        source |= {f"{place}{piece}": torch.randn(WIDTH, 1), f"base_model.model.l.{i}.value.weight": torch.randn(WIDTH, INNER)}
    wanted = {f"l.{i}.key.{end}": shape for i in range(2) for end, shape in (("weight", (WIDTH, WIDTH)), ("bias", (WIDTH,)))}
    keymap = wb.match(source, wanted | {f"l.{i}.value.weight": (WIDTH, INNER) for i in range(2)})
    assert {pair.target for pair in keymap.pairs} == {f"l.{i}.value.weight" for i in range(2)}
    assert {a.target for a in keymap.ambiguous} == wanted.keys()
    assert wb.match(source, {name: tuple(value.shape) for name, value in source.items()})
    plain = {f"l.{i}.key.{end}": torch.randn(shape) for i in range(2) for end, shape in (("weight", (WIDTH, WIDTH)), ("bias", (WIDTH,)))}
    back = wb.match(plain, {name: tuple(value.shape) for name, value in source.items()})
    assert {pair.target for pair in back.pairs} == {name for name in source if "base_layer" in name}


def test_an_adapter_file_leaves_the_adapters_name_out():
    pieces = ("ia3_l", "hada_w1_a", "lora_E", "oft_R.weight", "vera_lambda_b")
    source = {f"base_model.model.l.{i}.m{n}.{piece}": torch.randn(WIDTH, n + 1) for i in range(2) for n, piece in enumerate(pieces)}
    source |= {"prompt_embeddings": torch.randn(4, WIDTH), "base_model.model.score.weight": torch.randn(3, WIDTH)}
    named = {}
    for name, value in source.items():
        module, _, piece = name.partition(".oft_R") if ".oft_R" in name else (*name.rpartition(".")[:1], "", name.rpartition(".")[2])
        if name.startswith("base_model.model.l."):
            named[f"{module}.oft_R.style.weight" if ".oft_R" in name else f"{module}.{piece}.style"] = value
            named[f"{module}.base_layer.weight"] = torch.randn(INNER, INNER)
    named |= {"prompt_encoder.style.embedding.weight": source["prompt_embeddings"]}
    named |= {"base_model.model.score.modules_to_save.style.weight": source["base_model.model.score.weight"]}
    values = filled(source, named)
    assert {name for name in named if "base_layer" not in name} == values.keys()
    assert all(torch.equal(value, named[name]) for name, value in values.items())


@pytest.mark.parametrize("known", [True, False])
def test_a_gated_mlp_named_by_numbers_gives_no_up_for_a_gate(known):
    """fc1, fc2 and fc3 beside W_query are gate, up and down (LLMs from scratch); by themselves, fc1 and fc2 may be either."""
    source, target = {}, {}
    for n in range(2):
        for word, name, shape in (("gate_proj", "fc1", (24, 16)), ("up_proj", "fc2", (24, 16)), ("down_proj", "fc3", (16, 24))):
            source[f"model.layers.{n}.mlp.{word}.weight"] = target[f"blocks.{n}.ff.{name}.weight"] = torch.randn(shape)
        if known:
            source[f"model.layers.{n}.self_attn.o_proj.weight"] = torch.randn(16, 16)
            target[f"blocks.{n}.att.out_proj.weight"] = source[f"model.layers.{n}.self_attn.o_proj.weight"]
            source[f"model.layers.{n}.self_attn.v_proj.weight"] = torch.randn(8, 16)
            target[f"blocks.{n}.att.W_value.weight"] = source[f"model.layers.{n}.self_attn.v_proj.weight"]
            source[f"model.layers.{n}.self_attn.q_proj.weight"] = torch.randn(16, 16)
            target[f"blocks.{n}.att.W_query.weight"] = source[f"model.layers.{n}.self_attn.q_proj.weight"]
    applied = wb.match(source, target).apply(source)
    assert all(torch.equal(tensor.load(), target[name]) for name, tensor in applied.items())
    assert {name.split(".")[-2] for name in applied} >= ({"fc1", "fc2", "fc3", "W_query"} if known else {"fc3"})
    assert known or {name.split(".")[-2] for name in applied} == {"fc3"}


def test_a_part_of_a_word_is_no_role():
    """`hada_w1_a` of peft's LoHa holds no `w1` of a Llama, whose MLP stands in the model alone."""
    pieces = {f"l.{n}.q_proj.hada_w{at}_{end}": (n + 2, at) for n in range(2) for at in (1, 2) for end in "ab"}
    wanted = {f"{name}.default": shape for name, shape in pieces.items()} | {f"l.{n}.mlp.gate_proj.weight": (5, 7) for n in range(2)}
    wanted |= {f"l.{n}.q_proj.base_layer.weight": (9, 9) for n in range(2)}
    keymap = wb.match({name: torch.randn(shape) for name, shape in pieces.items()}, wanted)
    assert {pair.target: pair.source for pair in keymap.pairs} == {f"{name}.default": name for name in pieces}


def test_the_two_norms_of_a_post_norm_block_under_llama_cpps_names():
    words = (("post_attention_norm", "post_attention_layernorm"), ("post_ffw_norm", "post_feedforward_layernorm"))
    source, target = {}, {}
    for n in range(2):
        for gguf, name in words:
            source[f"blk.{n}.{gguf}.weight"] = target[f"model.layers.{n}.{name}.weight"] = torch.randn(16)
        source[f"blk.{n}.ffn_up.weight"] = target[f"model.layers.{n}.mlp.up_proj.weight"] = torch.randn(24, 16)
    applied = wb.match(source, target).apply(source)
    assert all(torch.equal(tensor.load(), target[name]) for name, tensor in applied.items())
    assert len(applied) == 6


def llama(words, biased=False):
    """Two blocks' matrices under these words for q, k, v, o, gate, up and down."""
    shapes = [(16, 16), (8, 16), (8, 16), (16, 16), (24, 16), (24, 16), (16, 24)]
    shapes = {word.format(n): shape for n in range(2) for word, shape in zip(words.split(), shapes, strict=True)}
    biases = (
        {name.replace("weight", "bias"): shape[:1] for name, shape in list(shapes.items())[:3] + list(shapes.items())[7:10]}
        if biased
        else {}
    )
    return shapes | biases


def with_heads(shapes, kinds=()):
    """A model of these shapes, with four heads of queries and two of keys, and norms of these classes."""
    model = torch.nn.Module()
    model.config = types.SimpleNamespace(num_attention_heads=4, num_key_value_heads=2)
    for name, shape in shapes.items():
        *path, leaf = name.split(".")
        at = model
        for word in path:
            if word not in at._modules:
                at.add_module(word, type(dict(kinds).get(word, "Module"), (torch.nn.Module,), {})())
            at = at._modules[word]
        at.register_parameter(leaf, torch.nn.Parameter(torch.zeros(shape)))
    return model


TORCHTUNE = " ".join(
    f"layers.{{}}.{word}.weight" for word in ["attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.output_proj", "mlp.w1", "mlp.w3", "mlp.w2"]
)
META = " ".join(
    f"layers.{{}}.{word}.weight"
    for word in ["attention.wq", "attention.wk", "attention.wv", "attention.wo", "feed_forward.w1", "feed_forward.w3", "feed_forward.w2"]
)
TRANSFORMERS = " ".join(
    f"model.layers.{{}}.{word}.weight"
    for word in [
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ]
)


def halves(matrix, heads):
    """As transformers' convert_llama_weights_to_hf.py."""
    return matrix.view(heads, matrix.shape[0] // heads // 2, 2, -1).transpose(1, 2).reshape(matrix.shape)


@pytest.mark.parametrize("biased", [True, False])
def test_torchtune_turns_no_rows_of_queries_with_biases_or_norms(biased):
    source = {name: torch.randn(shape) for name, shape in llama(TORCHTUNE, biased).items()}
    wanted = dict(zip(llama(TRANSFORMERS, biased), source.values(), strict=True))
    for n, word in itertools.product(range(2), () if biased else "qk"):  # Qwen 3
        source[f"layers.{n}.attn.{word}_norm.scale"] = wanted[f"model.layers.{n}.self_attn.{word}_norm.weight"] = torch.randn(4)
    values = {n: t.load() for n, t in wb.match(source, with_heads({n: v.shape for n, v in wanted.items()})).apply(source).items()}
    assert values.keys() == wanted.keys()
    assert all(torch.equal(values[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("heads", [True, False])
def test_rows_are_turned_before_they_are_put_together(heads):
    source = {name: torch.randn(shape) for name, shape in llama(META).items()}
    wanted = {}
    for n in range(2):
        q, k, v = (source[f"layers.{n}.attention.w{word}.weight"] for word in "qkv")
        wanted[f"transformer.h.{n}.attn.qkv.weight"] = torch.cat([halves(q, 4), halves(k, 2), v])
        for word, name in (("fc_1", "w1"), ("fc_2", "w3"), ("proj", "w2")):
            wanted[f"transformer.h.{n}.mlp.{word}.weight"] = source[f"layers.{n}.feed_forward.{name}.weight"]
    shapes = {name: tuple(value.shape) for name, value in wanted.items()}
    keymap = wb.match(source, with_heads(shapes) if heads else shapes)
    values = {name: tensor.load() for name, tensor in keymap.apply(source).items()}
    assert all(torch.equal(value, wanted[name]) for name, value in values.items())
    fused = {name for name in wanted if ".qkv." in name}
    assert values.keys() == (wanted.keys() if heads else wanted.keys() - fused)
    assert heads or {a.target for a in keymap.ambiguous} == fused


def test_torchtune_does_not_tell_the_rows_of_what_others_keep_in_one():
    """Its Llama is in pairs and its Phi 3 in halves, under the same names."""
    source = {name: torch.randn(shape) for name, shape in llama(TORCHTUNE).items()}
    words = {"self_attn.qkv_proj": (32, 16), "self_attn.o_proj": (16, 16), "mlp.gate_up_proj": (48, 16), "mlp.down_proj": (16, 24)}
    shapes = {f"model.layers.{n}.{word}.weight": shape for n in range(2) for word, shape in words.items()}
    keymap = wb.match(source, with_heads(shapes))
    assert {a.target for a in keymap.ambiguous} == {name for name in shapes if "qkv" in name}
    assert len(keymap.pairs) == 6


def test_experts_that_llama_cpp_merged():
    source, wanted = {"output_norm.weight": torch.randn(16)}, {}
    wanted["model.norm.weight"] = source["output_norm.weight"]
    for n in range(2):
        gate, up, down = torch.randn(3, 24, 16), torch.randn(3, 24, 16), torch.randn(3, 16, 24)
        source |= {f"blk.{n}.ffn_{word}_exps.weight": value for word, value in (("gate", gate), ("up", up), ("down", down))}
        source[f"blk.{n}.ffn_gate_inp.weight"] = wanted[f"model.layers.{n}.mlp.gate.weight"] = torch.randn(3, 16)
        wanted |= {f"model.layers.{n}.mlp.experts.gate_up_proj": torch.cat([gate, up], 1), f"model.layers.{n}.mlp.experts.down_proj": down}
    values = filled(source, wanted)
    assert values.keys() == wanted.keys()
    assert all(torch.equal(values[name], wanted[name]) for name in wanted)
    square = {name: torch.randn(3, 16, 16) for name in source if "exps" in name}  # those of gpt-oss are [in, out]
    assert not wb.match(square, {name: (3, 16, 16) for name in wanted if "down_proj" in name}).pairs


@pytest.mark.parametrize(("kind", "more"), [("Gemma3RMSNorm", 1), ("RMSNorm", 0), ("", 1)])
def test_norms_of_which_llama_cpp_stores_one_more(kind, more):
    words = {
        "attn_norm": "input",
        "post_attention_norm": "post_attention",
        "ffn_norm": "pre_feedforward",
        "post_ffw_norm": "post_feedforward",
    }
    source, wanted = {}, {}
    for n in range(2):
        for word, name in words.items():
            source[f"blk.{n}.{word}.weight"] = torch.randn(16)
            wanted[f"model.layers.{n}.{name}_layernorm.weight"] = source[f"blk.{n}.{word}.weight"] - more
        source[f"blk.{n}.ffn_up.weight"] = wanted[f"model.layers.{n}.mlp.up_proj.weight"] = torch.randn(24, 16)
    shapes = {name: tuple(value.shape) for name, value in wanted.items()}
    keymap = wb.match(source, with_heads(shapes, dict.fromkeys([f"{word}_layernorm" for word in words.values()], kind)) if kind else shapes)
    values = {name: tensor.load() for name, tensor in keymap.apply(source).items()}
    assert values.keys() == wanted.keys()
    assert all(torch.allclose(values[name], wanted[name]) for name in wanted)
    code = {
        pair.target: eval(formula_code(pair, "source[{!r}]".format), {"torch": torch, "source": source})
        for pair in keymap.pairs
        if pair.formula
    }
    assert len(code) == 8 * more
    assert all(torch.equal(value, values[name]) for name, value in code.items())


def test_the_norm_of_the_embeddings_is_not_the_last_one():
    trunk = {"embed.weight": (30, 8)} | {f"layers.{n}.linear{m}.weight": (8, 8) for n in range(3) for m in (1, 2)}
    source = {name: torch.randn(shape) for name, shape in {**trunk, "embed_norm.weight": (8,), "embed_norm.bias": (8,)}.items()}
    keymap = wb.match(source, trunk | {"final_norm.weight": (8,), "final_norm.bias": (8,)})
    assert {pair.target: pair.source for pair in keymap.pairs} == {name: name for name in trunk}
