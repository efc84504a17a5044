"""Cases of real libraries, made at test time from random models of a few kilobytes: transformers, peft, torch.nn, and the published
names of what transformers' models were converted from (fairseq, timm, torchvision, JAX and TensorFlow checkpoints, and others).

The answers come from the library's own conversion (what `save_pretrained` writes, what `set_peft_model_state_dict` loads), from
modules whose outputs were seen to be equal, or from one model's tensors laid out under another project's published names. The cases
keep a list of their own, so that `mismatch_cases` and this file do not mix. Nothing here needs a network.
"""

from __future__ import annotations

import functools
import glob
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from mismatch_kit import BULLETS, Case, Spec, agree, fill, floats, forward_case, ids, land, quiet, sd, shapes
from torch import Tensor, nn

LIBRARY: list[Spec] = []
State = dict[str, Tensor]
Row = tuple[Any, ...]  # (pattern, new name) or (pattern, new name, what becomes of the value)


def case(name: str, bullet: str, libs: str = "transformers") -> Callable[[Callable[[], Case]], Callable[[], Case]]:
    assert bullet in BULLETS, bullet

    def add(build: Callable[[], Case]) -> Callable[[], Case]:
        assert name not in {spec.name for spec in LIBRARY}, name
        LIBRARY.append(Spec(name, bullet, libs, build))
        return build

    return add


@functools.cache
def transformers() -> Any:
    with quiet():
        import transformers

    transformers.logging.set_verbosity_error()
    return transformers


def tiny(cls: str, seed: int = 1, **options: Any) -> nn.Module:
    made = getattr(transformers(), cls)
    with quiet():
        return fill(made(made.config_class(**options)), seed)


def published(state: Mapping[str, Tensor], *rows: Row) -> State:
    """The same tensors under other names: the rows are applied in order, a value changes where its row's pattern is found."""
    out: State = {}
    for name, value in state.items():
        for pattern, new, *change in rows:
            renamed, found = re.subn(pattern, new, name)
            value = change[0](value) if change and found else value
            name = renamed
        assert name not in out, name
        out[name] = value.contiguous()
    return out


def fused(state: Mapping[str, Tensor], whole: str, parts: Sequence[str]) -> State:
    """`parts`, as words in a name, put together along the first axis under the word `whole`."""
    out = dict(state)
    for name in state:
        if parts[0] in name:
            out[name.replace(parts[0], whole)] = torch.cat([out.pop(name.replace(parts[0], part)) for part in parts])
    return out


def without(state: Mapping[str, Tensor], *patterns: str) -> State:
    return {name: value for name, value in state.items() if not any(re.search(pattern, name) for pattern in patterns)}


def shifted(by: int) -> Callable[[re.Match[str]], str]:
    return lambda found: f"{found[1]}{int(found[2]) + by}{found[3]}"


def transpose(value: Tensor) -> Tensor:
    return value.T


def from_published(
    name: str, bullet: str, libs: str, make: Callable[[int], nn.Module], publish: Callable[[State], Any], **more: Any
) -> None:
    """A file under a project's published names into the library's module; what `publish` leaves out of the file has no source."""

    @case(name, bullet, libs)
    def _() -> Case:
        own = more | {}
        model = make(len(LIBRARY) + 100)
        state = sd(model)
        lost = own.pop("lost", ())
        expected = without(state, *lost) if lost else state
        unsure = {n: why for pattern, why in own.pop("unsure", {}).items() for n in expected if re.search(pattern, n)}
        either = {n: why for pattern, why in own.pop("maybe", {}).items() for n in expected if re.search(pattern, n)}
        return Case(publish(state), make(1), expected, "formula", unprovable=unsure, either=either, **own)


def to_published(name: str, bullet: str, libs: str, make: Callable[[int], nn.Module], publish: Callable[[State], Any], **more: Any) -> None:
    """The library's module into a project's published names, which are all that is known of the target."""

    @case(name, bullet, libs)
    def _() -> Case:
        state = sd(make(len(LIBRARY) + 300))
        target = publish(state)
        return Case(state, shapes(target), target, "formula", **more)


TEXT = {
    "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
BERT = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 20,
}
VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40, "image_size": 16, "patch_size": 8}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 12}
SEQ = {
    "vocab_size": 50, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 20, "pad_token_id": 0,
}  # fmt: skip
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 8, 8, 16], "depths": [1, 1, 1, 1], "layer_type": "basic", "out_features": ["stage4"]}
SPEECH = {
    "vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "conv_dim": (8, 8),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3), "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip


# ---------------------------------------------------------------- what save_pretrained writes, and the module it is read into
def hub_names(model: nn.Module) -> State:
    """The names of the published files, by transformers' own conversion of what it holds; read back to be sure."""
    from safetensors.torch import load_file

    out: State = {}
    with tempfile.TemporaryDirectory() as folder, quiet():
        model.save_pretrained(folder)
        for path in sorted(glob.glob(f"{folder}/*.safetensors")):
            out |= load_file(path)
        again = sd(type(model).from_pretrained(folder))
    assert all(torch.equal(value, again[name]) for name, value in sd(model).items())
    return out


def detr(**more: Any) -> dict[str, Any]:
    return dict(
        d_model=16, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24,
        decoder_ffn_dim=24, num_queries=5, use_timm_backbone=False, use_pretrained_backbone=False,
        backbone_config=transformers().ResNetConfig(**RESNET), **more,
    )  # fmt: skip


def llava_parts(vision: str = "CLIPVisionConfig", text: str = "LlamaConfig", **more: Any) -> dict[str, Any]:
    T = transformers()
    wider = dict(VIT, hidden_size=24)  # else the two layers of the projector would have one shape
    return dict(vision_config=getattr(T, vision)(**wider), text_config=getattr(T, text)(**TEXT), image_token_index=49, **more)


HUB: tuple[tuple[str, str, str, Callable[[], dict[str, Any]]], ...] = (
    ("qwen3_moe", "fuse", "Qwen3MoeForCausalLM", lambda: dict(TEXT, **MOE, num_experts=3, head_dim=8)),
    ("olmoe", "fuse", "OlmoeForCausalLM", lambda: dict(TEXT, num_experts=3, num_experts_per_tok=2)),
    ("glm4_moe", "fuse", "Glm4MoeForCausalLM", lambda: dict(TEXT, **MOE, n_routed_experts=4, n_shared_experts=1, n_group=1, topk_group=1,
    first_k_dense_replace=1, head_dim=4)),
    ("ernie4_5_moe", "fuse", "Ernie4_5_MoeForCausalLM", lambda: dict(TEXT, moe_intermediate_size=12, moe_num_experts=3, moe_k=2,
    moe_num_shared_experts=1, moe_layer_start_index=1)),
    ("minimax_m2", "fuse", "MiniMaxM2ForCausalLM", lambda: dict(TEXT, num_local_experts=3, head_dim=4)),
    ("hunyuan_moe", "fuse", "HunYuanMoEV1ForCausalLM", lambda: dict(TEXT, num_experts=3, moe_topk=2, head_dim=4)),
    ("lfm2_moe", "fuse", "Lfm2MoeForCausalLM", lambda: dict(TEXT, moe_intermediate_size=12, num_experts=3, num_experts_per_tok=2,
    num_dense_layers=1, layer_types=["conv", "full_attention"])),
    ("qwen3_next", "fuse", "Qwen3NextForCausalLM", lambda: dict(TEXT, **MOE, num_experts=3, shared_expert_intermediate_size=8, head_dim=8,
    layer_types=["linear_attention", "full_attention"], linear_key_head_dim=4, linear_value_head_dim=4, linear_num_key_heads=2,
    linear_num_value_heads=4)),
    ("olmo_hybrid", "fuse", "OlmoHybridForCausalLM", lambda: dict(TEXT, layer_types=["linear_attention", "full_attention"],
    linear_key_head_dim=4, linear_value_head_dim=4, linear_num_key_heads=4, linear_num_value_heads=4)),
    ("granitemoehybrid", "rename", "GraniteMoeHybridForCausalLM", lambda: dict(TEXT, num_local_experts=3, shared_intermediate_size=20,
    layer_types=["attention", "attention"], mamba_n_heads=4, mamba_expand=2)),
    ("deit", "rename", "DeiTModel", lambda: VIT),
    ("ast", "rename", "ASTModel", lambda: dict(VIT, patch_size=4, max_length=16, num_mel_bins=8, frequency_stride=4, time_stride=4)),
    ("vivit", "rename", "VivitModel", lambda: dict(VIT, num_frames=2, tubelet_size=[1, 8, 8])),
    ("videomae", "rename", "VideoMAEModel", lambda: dict(VIT, num_frames=2)),
    ("dinov2_registers", "rename", "Dinov2WithRegistersModel", lambda: VIT),
    ("beit_segmentation", "rename", "BeitForSemanticSegmentation", lambda: dict(VIT, num_hidden_layers=4, out_indices=[1, 2, 3, 4],
    num_labels=5, vocab_size=20)),
    ("detr", "rename", "DetrForObjectDetection", lambda: detr(num_labels=4)),
    ("conditional_detr", "rename", "ConditionalDetrModel", detr),
    ("altclip", "rename", "AltCLIPModel", lambda: {"text_config": dict(BERT, project_dim=16, hidden_act="gelu"), "vision_config": VIT,
    "projection_dim": 16}),
    ("llava_next", "rename", "LlavaNextForConditionalGeneration", llava_parts),
    ("qwen2_vl", "rename", "Qwen2VLForConditionalGeneration", lambda: {"text_config": dict(TEXT,
    rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 1e4}),
    "vision_config": {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 8}}),
    ("paligemma", "rename", "PaliGemmaForConditionalGeneration", lambda: {"text_config": dict(TEXT, model_type="gemma", head_dim=4),
    "vision_config": dict(VIT, model_type="siglip_vision_model"), "projection_dim": 16}),
    ("mimi", "param", "MimiModel", lambda: {"hidden_size": 16, "num_filters": 4, "upsampling_ratios": [4, 2], "codebook_size": 16,
    "codebook_dim": 8, "num_quantizers": 3, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
    "intermediate_size": 24, "vector_quantization_hidden_dimension": 8, "upsample_groups": 16}),
    ("jina_embeddings", "fuse", "JinaEmbeddingsV3Model", lambda: BERT),
    ("gte", "fuse", "GteModel", lambda: BERT),
    ("timesfm2_5", "rename", "TimesFm2_5Model", lambda: {"patch_length": 4, "context_length": 16, "horizon_length": 8, "hidden_size": 16,
    "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 4}),
)  # fmt: skip


def _hub(name: str, bullet: str, cls: str, options: Callable[[], dict[str, Any]], seed: int, back: bool) -> None:
    @case(f"{name}_{'to' if back else 'from'}_hub", bullet)
    def _() -> Case:
        model = tiny(cls, seed, **options())
        hub = hub_names(model)
        if back:
            return Case(sd(model), shapes(hub), hub, "library")
        assert hub.keys() != sd(model).keys() or any(hub[n].shape != v.shape for n, v in sd(model).items()), "nothing to convert"
        return Case(hub, tiny(cls, **options()), sd(model), "library")


for _number, _row in enumerate(HUB):
    _hub(*_row, seed=400 + _number, back=False)
for _number, _row in enumerate(row for row in HUB if row[0] in {"qwen3_moe", "conditional_detr", "videomae", "minimax_m2"}):
    _hub(*_row, seed=450 + _number, back=True)


# ---------------------------------------------------------------- text models under their first names
QKV = [f".self_attn.{word}_proj." for word in "qkv"]
META = (
    (r"^model\.", ""), ("embed_tokens", "tok_embeddings"), ("lm_head", "output"), ("self_attn", "attention"),
    ("input_layernorm", "attention_norm"),
    ("post_attention_layernorm", "ffn_norm"), (r"([qkvo])_proj", r"w\1"),
)  # fmt: skip


def opt(seed: int) -> nn.Module:
    return tiny(
        "OPTForCausalLM",
        seed,
        vocab_size=50,
        hidden_size=16,
        ffn_dim=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=20,
        word_embed_proj_dim=16,
    )


from_published(
    "opt_from_metaseq", "negative", "transformers, metaseq names", opt,
    lambda s: published(
        fused(without(s, "lm_head"), ".self_attn.qkv_proj.", [QKV[1], QKV[2], QKV[0]]),
        ("model.decoder.final_layer_norm", "decoder.layer_norm"), (r"^model\.", ""),
    ),
    unsure={r"self_attn\.[qkv]_proj": "metaseq lays keys, values, queries under qkv_proj, others queries, keys, values"},
)  # fmt: skip


@case("codegen_fused_into_gptj", "negative")
def _():
    size = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 20, "rotary_dim": 4}
    model, target = tiny("CodeGenForCausalLM", 500, **size), tiny("GPTJForCausalLM", **size)
    expected = without(sd(model), "qkv_proj")
    for i in range(2):
        rows = sd(model)[f"transformer.h.{i}.attn.qkv_proj.weight"].view(4, 3, 4, 16)  # four shards, each of queries, values, keys
        for n, word in enumerate("qvk"):
            expected[f"transformer.h.{i}.attn.{word}_proj.weight"] = rows[:, n].reshape(16, 16)
    why = {
        n: "CodeGen keeps four shards, each of queries, values, keys: only its code says so"
        for n in expected
        if re.search(r"[qkv]_proj", n)
    }
    return forward_case(model, target, expected, lambda m: m(ids()).logits, lambda m: m(ids()).logits, unprovable=why)


def phi_names(state: State) -> State:
    return published(
        fused(state, ".mixer.Wqkv.", QKV), ("model.embed_tokens", "layers.0.wte"), (r"^model\.(layers\.)(\d+)(\.)", shifted(1)),
        ("self_attn.dense", "mixer.out_proj"), ("input_layernorm", "ln"), ("model.final_layernorm", "layers.3.ln"),
        ("lm_head", "layers.3.linear"),
    )  # fmt: skip


from_published(
    "phi_from_mixformer",
    "index",
    "transformers, Phi-1.5's first names",
    lambda seed: tiny("PhiForCausalLM", seed, **dict(TEXT, num_key_value_heads=4)),
    phi_names,
)
from_published(
    "gpt_neox_from_pipeline", "index", "transformers, GPT-NeoX pipeline names",
    lambda seed: tiny("GPTNeoXForCausalLM", seed, **{k: v for k, v in TEXT.items() if k != "num_key_value_heads"}),
    lambda s: published(
        s, ("gpt_neox.embed_in", "sequential.0.word_embeddings"),
        (r"^gpt_neox\.()layers\.(\d+)(\.)", lambda f: f"sequential.{int(f[2]) + 2}."),
        ("gpt_neox.final_layer_norm", "sequential.5.norm"), ("lm_head", "sequential.6.final_linear"),
    ),
)  # fmt: skip
from_published(
    "llama_from_baichuan_w_pack", "fuse", "transformers, Baichuan names",
    lambda seed: tiny("LlamaForCausalLM", seed, **dict(TEXT, num_key_value_heads=4)),
    lambda s: fused(s, ".self_attn.W_pack.", QKV),
)  # fmt: skip
from_published(
    "glm_from_chatglm_names", "fuse", "transformers, THUDM GLM-4 names",
    lambda seed: tiny("GlmForCausalLM", seed, **dict(TEXT, head_dim=4, attention_bias=True)),
    lambda s: published(
        fused(s, ".self_attention.query_key_value.", QKV), ("model.embed_tokens", "transformer.embedding.word_embeddings"),
        (r"^model\.layers", "transformer.encoder.layers"), ("model.norm", "transformer.encoder.final_layernorm"),
        ("lm_head", "transformer.output_layer"),
        ("self_attn.o_proj", "self_attention.dense"), ("mlp.gate_up_proj", "mlp.dense_h_to_4h"), ("mlp.down_proj", "mlp.dense_4h_to_h"),
    ),
    maybe={r"self_attn\.[qkv]_proj": "query_key_value lies in blocks here; Falcon and Megatron lay it by groups under the same word"},
)  # fmt: skip


def pairs(heads: int) -> Callable[[Tensor], Tensor]:
    """Rows of a head from two halves to neighbours, as Meta's rotary embedding wants them."""
    return lambda w: w.view(heads, 2, w.shape[0] // heads // 2, w.shape[1]).transpose(1, 2).reshape(w.shape)


def mixtral(seed: int) -> nn.Module:
    return tiny("MixtralForCausalLM", seed, **TEXT, num_local_experts=3)


def mixtral_names(state: State) -> State:
    out = {}
    for name, value in state.items():
        if name.endswith("experts.gate_up_proj"):
            for n, expert in enumerate(value):
                out |= {
                    name.replace("gate_up_proj", f"{n}.{word}.weight"): half.clone()
                    for word, half in zip(("w1", "w3"), expert.chunk(2), strict=True)
                }
        elif name.endswith("experts.down_proj"):
            out |= {name.replace("down_proj", f"{n}.w2.weight"): expert.clone() for n, expert in enumerate(value)}
        else:
            out[name] = value
    return published(out, ("mlp", "feed_forward"), ("q_proj", "q_proj", pairs(4)), ("k_proj", "k_proj", pairs(2)), *META)


from_published("mixtral_from_consolidated", "layout", "transformers, Mistral names", mixtral, mixtral_names)
from_published(
    "blenderbot_from_parlai", "rename", "transformers, ParlAI names", lambda seed: tiny("BlenderbotModel", seed, **SEQ),
    lambda s: published(
        without(s, r"^shared"), (r"(encoder|decoder)\.layer_norm", r"\1.norm_embeddings"), ("embed_tokens", "embeddings"),
        ("embed_positions", "position_embeddings"),
        (r"encoder(\.layers\.\d+\.)self_attn\.", r"encoder\1attention."), ("self_attn_layer_norm", "norm1"),
        (r"encoder(\.layers\.\d+\.)final_layer_norm", r"encoder\1norm2"),
        ("encoder_attn_layer_norm", "norm2"), ("final_layer_norm", "norm3"), ("self_attn", "self_attention"),
        ("encoder_attn", "encoder_attention"),
        (r"([qkv]|out)_proj", r"\1_lin"), (r"fc([12])", r"ffn.lin\1"),
    ),
)  # fmt: skip
from_published(
    "marian_npz_names", "layout", "transformers, Marian names", lambda seed: tiny("MarianModel", seed, **SEQ),
    lambda s: published(
        without(s, r"coder\.embed_tokens", "embed_positions"), ("shared.weight", "Wemb"),
        (r"(encoder|decoder)\.(layers\.)(\d+)\.", lambda f: f"{f[1]}_l{int(f[3]) + 1}_"),
        ("self_attn_layer_norm.weight", "self_Wo_ln_scale"), ("self_attn_layer_norm.bias", "self_Wo_ln_bias"),
        ("encoder_attn_layer_norm.weight", "context_Wo_ln_scale"),
        ("encoder_attn_layer_norm.bias", "context_Wo_ln_bias"), ("final_layer_norm.weight", "ffn_ffn_ln_scale"),
        ("final_layer_norm.bias", "ffn_ffn_ln_bias"),
        ("self_attn.out_proj", "self_attn.o_proj"), ("encoder_attn.out_proj", "encoder_attn.o_proj"),
        (r"self_attn\.([qkvo])_proj\.weight", r"self_W\1", transpose),
        (r"encoder_attn\.([qkvo])_proj\.weight", r"context_W\1", transpose),
        (r"self_attn\.([qkvo])_proj\.bias", r"self_b\1", lambda b: b[None]),
        (r"encoder_attn\.([qkvo])_proj\.bias", r"context_b\1", lambda b: b[None]), (r"fc([12])\.weight", r"ffn_W\1", transpose),
        (r"fc([12])\.bias", r"ffn_b\1", lambda b: b[None]),
        (r"(_ln_(?:scale|bias))", r"\1", lambda v: v[None]),
    ),
    lost=("embed_positions",), maybe={r"coder\.embed_tokens": "tied to shared"},
)  # fmt: skip
from_published(
    "t5_from_t5x", "layout", "transformers, T5X names",
    lambda seed: tiny("T5ForConditionalGeneration", seed, vocab_size=50, d_model=16,
    d_kv=6, d_ff=24, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    lambda s: published(
        without(s, r"coder\.embed_tokens"), ("shared.weight", "token_embedder/embedding"),
        (r"(en|de)coder\.final_layer_norm\.weight", r"\1coder/\1coder_norm/scale"),
        ("lm_head.weight", "decoder/logits_dense/kernel", transpose),
        (r"(en|de)coder\.block\.0\.layer\.0\.SelfAttention\.relative_attention_bias\.weight", r"\1coder/relpos_bias/rel_embedding",
        transpose),
        (r"(en|de)coder\.block\.(\d+)\.", r"\1coder/layers_\2/"),
        (r"(encoder/.*)layer\.0\.layer_norm\.weight",
        r"\1pre_attention_layer_norm/scale"), (r"(encoder/.*)layer\.1\.layer_norm\.weight", r"\1pre_mlp_layer_norm/scale"),
        (r"(decoder/.*)layer\.0\.layer_norm\.weight", r"\1pre_self_attention_layer_norm/scale"),
        (r"(decoder/.*)layer\.1\.layer_norm\.weight", r"\1pre_cross_attention_layer_norm/scale"),
        (r"(decoder/.*)layer\.2\.layer_norm\.weight", r"\1pre_mlp_layer_norm/scale"),
        (r"(encoder/.*)layer\.0\.SelfAttention", r"\1attention"), (r"layer\.0\.SelfAttention", "self_attention"),
        (r"layer\.1\.EncDecAttention", "encoder_decoder_attention"), (r"attention\.q\.weight", "attention/query/kernel", transpose),
        (r"attention\.k\.weight", "attention/key/kernel", transpose),
        (r"attention\.v\.weight", "attention/value/kernel", transpose), (r"attention\.o\.weight", "attention/out/kernel", transpose),
        (r"layer\.\d\.DenseReluDense\.(w\w+)\.weight", r"mlp/\1/kernel", transpose),
    ),
    maybe={r"coder\.embed_tokens": "tied to shared"},
)  # fmt: skip


def bert_tf(state: State) -> State:
    return published(
        state, (r"LayerNorm\.weight", "LayerNorm.gamma"), (r"LayerNorm\.bias", "LayerNorm.beta"), (r"embeddings\.weight", "embeddings"),
        (r"\.weight$", ".kernel", transpose), (r"layer\.(\d+)", r"layer_\1"), (r"\.", "/"), ("^", "bert/"),
    )  # fmt: skip


from_published("bert_from_tensorflow", "layout", "transformers, Google BERT names", lambda seed: tiny("BertModel", seed, **BERT), bert_tf)
from_published(
    "albert_from_tensorflow", "layout", "transformers, Google ALBERT names",
    lambda seed: tiny("AlbertModel", seed, embedding_size=8, **BERT),
    lambda s: published(
        s, (r"(full_layer_layer_norm|LayerNorm)\.weight", r"\1.gamma"), (r"(full_layer_layer_norm|LayerNorm)\.bias", r"\1.beta"),
        (r"embeddings\.weight", "embeddings"), (r"\.weight$", ".kernel", transpose),
        ("albert_layer_groups.0.albert_layers.0", "transformer.group_0.inner_group_0"),
        (r"attention\.(query|key|value)", r"attention_1.self.\1"), ("attention.dense", "attention_1.output.dense"),
        ("attention.LayerNorm", "LayerNorm"), ("full_layer_layer_norm", "LayerNorm_1"), ("ffn_output", "ffn_1.intermediate.output.dense"),
        (r"ffn\.", "ffn_1.intermediate.dense."), ("pooler", "pooler.dense"),
        (r"\.", "/"), ("^", "bert/"),
    ),
)  # fmt: skip
from_published(
    "rwkv_from_blinkdl", "rename", "transformers, RWKV-4 names",
    lambda seed: tiny("RwkvForCausalLM", seed, vocab_size=50, hidden_size=16,
    num_hidden_layers=2, intermediate_size=24, attention_hidden_size=16, context_length=20),
    lambda s: published(
        s, ("rwkv.embeddings", "emb"), (r"^rwkv\.", ""), ("pre_ln", "ln0"), ("attention", "att"), ("feed_forward", "ffn"),
        ("time_mix_key", "time_mix_k"), ("time_mix_value", "time_mix_v"), ("time_mix_receptance", "time_mix_r"),
    ),
)  # fmt: skip
from_published(
    "llava_from_first_names", "rename", "transformers, LLaVA names",
    lambda seed: tiny("LlavaForConditionalGeneration", seed, **llava_parts()),
    lambda s: published(s, ("model.language_model", "model"), ("model.vision_tower", "model.vision_tower.vision_tower.vision_model"),
    ("model.multi_modal_projector.linear_1", "model.mm_projector.0"), ("model.multi_modal_projector.linear_2", "model.mm_projector.2")),
)  # fmt: skip


@case("roberta_into_longformer", "rename")
def _():
    model = tiny("RobertaModel", 520, **dict(BERT, max_position_embeddings=30))
    target = tiny("LongformerModel", attention_window=4, **dict(BERT, max_position_embeddings=30))
    expected = sd(model)
    again = {n: expected[n.replace("_global", "")] for n in sd(target) if "_global" in n}  # what transformers' conversion fills in
    return Case(expected, target, expected | again, "formula", either=dict.fromkeys(again, "copies of the local projections"))


# ---------------------------------------------------------------- vision models under their first names
BLOCK = (
    (r"layernorm_before|layer_norm1|before_norm", "norm1"), (r"layernorm_after|layer_norm2|after_norm", "norm2"),
    (r"attention\.qkv|self_attn\.qkv", "attn.qkv"),
    (r"attention\.o_proj|self_attn\.(?:out_proj|projection)|attention\.output\.dense", "attn.proj"), (r"intermediate\.dense", "mlp.fc1"),
    (r"(?<!attention\.)output\.dense", "mlp.fc2"),
)  # fmt: skip
STEM = (
    (r"^(?:vit|deit|audio_spectrogram_transformer)\.", ""), (r"^(?:encoder\.)?layers?\.", "blocks."),
    (r"embeddings\.(?:cls_token|class_embedding)", "cls_token"), (r"embeddings\.distillation_token", "dist_token"),
    (r"embeddings\.position_embeddings?(?:\.weight)?$", "pos_embed"),
    (r"embeddings\.patch_embeddings?(?:\.projection)?", "patch_embed.proj"), (r"^(?:post_)?layernorm", "norm"),
)  # fmt: skip


def split_of(prefix: str, words: Sequence[str] = ("q_proj", "k_proj", "v_proj")) -> list[str]:
    return [f"{prefix}.{word}." for word in words]


def vit(seed: int) -> nn.Module:
    return tiny("ViTForImageClassification", seed, **VIT)


def jax_heads(value: Tensor) -> Tensor:
    return value.T.reshape(16, 2, 8) if value.dim() == 2 else value.view(2, 8)


from_published(
    "deit_distilled_from_timm", "fuse", "transformers, timm names", lambda seed: tiny("DeiTForImageClassificationWithTeacher", seed, **VIT),
    lambda s: published(fused(s, "attention.qkv.", split_of("attention")), *STEM, *BLOCK, ("cls_classifier", "head"),
    ("distillation_classifier", "head_dist")),
)  # fmt: skip
to_published(
    "deit_distilled_to_timm", "fuse", "transformers, timm names", lambda seed: tiny("DeiTForImageClassificationWithTeacher", seed, **VIT),
    lambda s: published(fused(s, "attention.qkv.", split_of("attention")), *STEM, *BLOCK, ("cls_classifier", "head"),
    ("distillation_classifier", "head_dist")),
)  # fmt: skip
from_published(
    "vit_from_torchvision", "fuse", "transformers, torchvision names", vit,
    lambda s: published(
        fused(s, "attention.in_proj_", [f"attention.{w}_proj." for w in "qkv"]), (r"vit\.layers\.", "encoder.layers.encoder_layer_"),
        (r"attention\.(in_proj|o_proj)", r"self_attention.\1"), ("o_proj", "out_proj"), ("layernorm_before", "ln_1"),
        ("layernorm_after", "ln_2"), (r"mlp\.fc1", "mlp.0"), (r"mlp\.fc2", "mlp.3"), ("vit.embeddings.cls_token", "class_token"),
        ("vit.embeddings.position_embeddings", "encoder.pos_embedding"),
        (r"vit\.embeddings\.patch_embeddings\.projection", "conv_proj"), ("vit.layernorm", "encoder.ln"), ("classifier", "heads.head"),
    ),
)  # fmt: skip
from_published(
    "vit_from_jax", "layout", "transformers, Google ViT names", vit,
    lambda s: published(
        s, (r"patch_embeddings\.projection\.weight", "patch_embeddings.kernel", lambda w: w.permute(2, 3, 1, 0)),
        ("vit.embeddings.patch_embeddings.projection.bias", "embedding/bias"),
        ("vit.embeddings.patch_embeddings.kernel", "embedding/kernel"),
        ("vit.embeddings.cls_token", "cls"), ("vit.embeddings.position_embeddings", "Transformer/posembed_input/pos_embedding"),
        (r"vit\.layers\.(\d+)\.", r"Transformer/encoderblock_\1/"), (r"layernorm_before\.weight", "LayerNorm_0/scale"),
        (r"layernorm_before\.bias", "LayerNorm_0/bias"), (r"layernorm_after\.weight", "LayerNorm_2/scale"),
        (r"layernorm_after\.bias", "LayerNorm_2/bias"), (r"attention\.([qkv])_proj\.(weight|bias)", r"MHA/\1/\2", jax_heads),
        (r"attention\.o_proj\.weight", "MHA/out/kernel", lambda w: w.T.reshape(2, 8, 16)), (r"attention\.o_proj\.bias", "MHA/out/bias"),
        ("MHA/q", "MHA/query"), ("MHA/k/", "MHA/key/"), ("MHA/v", "MHA/value"), ("MHA", "MultiHeadDotProductAttention_1"),
        (r"mlp\.fc1\.weight", "MlpBlock_3/Dense_0/kernel", transpose), (r"mlp\.fc2\.weight", "MlpBlock_3/Dense_1/kernel", transpose),
        (r"mlp\.fc1\.bias", "MlpBlock_3/Dense_0/bias"), (r"mlp\.fc2\.bias", "MlpBlock_3/Dense_1/bias"),
        (r"vit\.layernorm\.weight", "Transformer/encoder_norm/scale"), (r"vit\.layernorm\.bias", "Transformer/encoder_norm/bias"),
        (r"classifier\.weight", "head/kernel", transpose), (r"classifier\.bias", "head/bias"), (r"weight$", "kernel"),
    ),
)  # fmt: skip


def swin(seed: int) -> nn.Module:
    return tiny(
        "SwinForImageClassification", seed, image_size=32, patch_size=4, embed_dim=8, depths=[2, 2], num_heads=[2, 4], window_size=4
    )


from_published(
    "swin_from_torchvision", "fuse", "transformers, torchvision names", swin,
    lambda s: published(
        fused(s, "attn.qkv.", split_of("attention")), (r"swin\.embeddings\.patch_embeddings\.projection", "features.0.0"),
        ("swin.embeddings.norm", "features.0.2"), ("swin.layernorm", "norm"), ("classifier", "head"),
        (r"swin\.encoder\.layers\.(\d+)\.blocks\.", lambda f: f"features.{2 * int(f[1]) + 1}."),
        (r"swin\.encoder\.layers\.(\d+)\.downsample\.", lambda f: f"features.{2 * int(f[1]) + 2}."), *BLOCK,
        (r"attention\.relative_position_bias\.", "attn."), (r"mlp\.fc1", "mlp.0"), (r"mlp\.fc2", "mlp.3"),
    ),
)  # fmt: skip
from_published(
    "swinv2_from_microsoft", "fuse", "transformers, Microsoft Swin names",
    lambda seed: tiny("Swinv2ForImageClassification", seed,
    image_size=32, patch_size=4, embed_dim=8, depths=[2, 2], num_heads=[2, 4], window_size=4),
    lambda s: published(
        fused(published(s, (r"self\.query\.bias", "q_bias"), (r"self\.value\.bias", "v_bias")), "attn.qkv.",
        split_of("attention.self", ("query", "key", "value"))), (r"swinv2\.embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
        ("swinv2.embeddings.norm", "patch_embed.norm"), ("swinv2.layernorm", "norm"), (r"swinv2\.encoder\.", ""), ("classifier", "head"),
        *BLOCK, (r"attention\.(?:self\.)?", "attn."), ("continuous_position_bias_mlp", "cpb_mlp"),
    ),
)  # fmt: skip
from_published(
    "regnet_from_torchvision", "rename", "transformers, torchvision names",
    lambda seed: tiny("RegNetForImageClassification", seed,
    embedding_size=8, hidden_sizes=[8, 16, 16, 16], depths=[1, 2, 1, 1], groups_width=8),
    lambda s: published(
        s, (r"regnet\.embedder\.embedder", "stem"),
        (r"regnet\.encoder\.stages\.(\d+)\.layers\.(\d+)",
        lambda f: f"trunk_output.block{int(f[1]) + 1}.block{int(f[1]) + 1}-{f[2]}"), ("shortcut", "proj"), (r"layer\.0", "f.a"),
        (r"layer\.1", "f.b"), (r"layer\.2\.attention\.0", "f.se.fc1"), (r"layer\.2\.attention\.2", "f.se.fc2"), (r"layer\.3", "f.c"),
        (r"\.convolution", ".0"), (r"\.normalization", ".1"), (r"classifier\.1", "fc"),
    ),
)  # fmt: skip


def mobilenet_names(state: State) -> State:
    return published(
        state, (r"mobilenet_v2\.conv_stem\.first_conv\.", "features.0."), (r"mobilenet_v2\.conv_stem\.conv_3x3\.", "features.1.conv.0."),
        (r"mobilenet_v2\.conv_stem\.reduce_1x1\.convolution", "features.1.conv.1"),
        (r"mobilenet_v2\.conv_stem\.reduce_1x1\.normalization", "features.1.conv.2"),
        (r"mobilenet_v2\.layer\.(\d+)\.", lambda f: f"features.{int(f[1]) + 2}.conv."), (r"expand_1x1", "0"), (r"conv_3x3", "1"),
        (r"reduce_1x1\.convolution", "2"), (r"reduce_1x1\.normalization", "3"), (r"mobilenet_v2\.conv_1x1", "features.18"),
        (r"\.convolution", ".0"), (r"\.normalization", ".1"), ("classifier", "classifier.1"),
    )  # fmt: skip


from_published(
    "mobilenet_v2_from_torchvision",
    "rename",
    "transformers, torchvision names",
    lambda seed: tiny("MobileNetV2ForImageClassification", seed, depth_multiplier=0.25, image_size=32),
    mobilenet_names,
)
from_published(
    "efficientnet_from_lukemelas", "rename", "transformers, efficientnet-pytorch names",
    lambda seed: tiny("EfficientNetForImageClassification", seed, width_coefficient=0.2, depth_coefficient=0.2, hidden_dim=256,
    image_size=32),
    lambda s: published(
        s, (r"efficientnet\.embeddings\.convolution", "_conv_stem"), (r"efficientnet\.embeddings\.batchnorm", "_bn0"),
        (r"efficientnet\.encoder\.top_conv", "_conv_head"), (r"efficientnet\.encoder\.top_bn", "_bn1"),
        (r"efficientnet\.encoder\.blocks", "_blocks"),
        (r"expansion\.expand_conv", "_expand_conv"), (r"expansion\.expand_bn", "_bn0"),
        (r"depthwise_conv\.depthwise_conv", "_depthwise_conv"), (r"depthwise_conv\.depthwise_norm", "_bn1"), (r"squeeze_excite\.", "_se_"),
        (r"projection\.project_conv", "_project_conv"),
        (r"projection\.project_bn", "_bn2"), ("classifier", "_fc"),
    ),
)  # fmt: skip
from_published(
    "convnextv2_from_facebook", "rename", "transformers, Facebook names",
    lambda seed: tiny("ConvNextV2ForImageClassification", seed, hidden_sizes=[8, 12], depths=[2, 1], num_stages=2),
    lambda s: published(
        s, (r"convnextv2\.embeddings\.patch_embeddings", "downsample_layers.0.0"),
        (r"convnextv2\.embeddings\.layernorm",
        "downsample_layers.0.1"), (r"convnextv2\.encoder\.stages\.(\d+)\.downsampling_layer", r"downsample_layers.\1"),
        (r"convnextv2\.encoder\.stages\.(\d+)\.layers", r"stages.\1"), ("convnextv2.layernorm", "norm"), ("layernorm", "norm"),
        (r"grn\.weight", "grn.gamma"), (r"grn\.bias", "grn.beta"), ("classifier", "head"),
    ),
)  # fmt: skip
from_published(
    "poolformer_from_sail", "rename", "transformers, PoolFormer names",
    lambda seed: tiny("PoolFormerForImageClassification", seed,
    hidden_sizes=[8, 12], depths=[2, 1], num_encoder_blocks=2, patch_sizes=[7, 3], strides=[4, 2], padding=[2, 1]),
    lambda s: published(
        s, (r"poolformer\.encoder\.patch_embeddings\.0\.projection", "patch_embed.proj"),
        (r"poolformer\.encoder\.patch_embeddings\.1\.projection", "network.1.proj"),
        (r"poolformer\.encoder\.block\.(\d)", lambda f: f"network.{2 * int(f[1])}"),
        *BLOCK, (r"output\.conv([12])", r"mlp.fc\1"), ("classifier", "head"),
    ),
)  # fmt: skip
SEGFORMER = {
    "num_encoder_blocks": 2,
    "depths": [1, 2],
    "sr_ratios": [2, 1],
    "hidden_sizes": [8, 16],
    "patch_sizes": [7, 3],
    "strides": [4, 2],
    "num_attention_heads": [1, 2],
    "mlp_ratios": [2, 2],
}


def mit_names(state: State) -> State:
    return published(
        fused(state, "attention.kv.", split_of("attention", ("k_proj", "v_proj"))),
        (r"stages\.(\d)\.patch_embeddings\.proj",
        lambda f: f"patch_embed{int(f[1]) + 1}.proj"), (r"stages\.(\d)\.patch_embeddings\.layer_norm",
        lambda f: f"patch_embed{int(f[1]) + 1}.norm"),
        (r"stages\.(\d)\.blocks", lambda f: f"block{int(f[1]) + 1}"), (r"stages\.(\d)\.layer_norm", lambda f: f"norm{int(f[1]) + 1}"),
        (r"attention\.sequence_reduction\.sequence_reduction", "attn.sr"), (r"attention\.sequence_reduction\.layer_norm", "attn.norm"),
        *BLOCK,
        (r"attention\.q_proj", "attn.q"), (r"attention\.", "attn."),
    )  # fmt: skip


from_published(
    "segformer_from_nvidia", "fuse", "transformers, NVIDIA names", lambda seed: tiny("SegformerModel", seed, **SEGFORMER), mit_names
)
from_published(
    "siglip_from_timm", "fuse", "transformers, timm names", lambda seed: tiny("SiglipVisionModel", seed, **VIT),
    lambda s: published(
        {n: v for name, value in fused(s, "self_attn.qkv.", split_of("self_attn")).items() for n, v in (
            [(name.replace("in_proj_", "q."), value[:16]), (name.replace("in_proj_", "kv."),
            value[16:])] if "head.attention.in_proj" in name else [(name, value)])},
        (r"head\.probe", "attn_pool.latent"), (r"head\.attention\.(q|kv)\.", r"attn_pool.\1."),
        (r"head\.attention\.out_proj", "attn_pool.proj"), (r"head\.layernorm", "attn_pool.norm"), (r"head\.mlp", "attn_pool.mlp"), *BLOCK,
        *STEM,
        (r"^(pos_embed)$", r"\1", lambda v: v[None]),
    ),
)  # fmt: skip
from_published(
    "blip_vision_from_salesforce", "rename", "transformers, BLIP names", lambda seed: tiny("BlipVisionModel", seed, **VIT),
    lambda s: published(s, *BLOCK, *STEM, ("^", "visual_encoder.")),
)  # fmt: skip
from_published(
    "vilt_from_first_names", "fuse", "transformers, ViLT names",
    lambda seed: tiny("ViltModel", seed, vocab_size=50, **dict(VIT, max_position_embeddings=20)),
    lambda s: published(
        fused(s, "attention.qkv.", split_of("attention.attention", ("query", "key", "value"))),
        (r"^embeddings\.(text_embeddings|token_type_embeddings)", r"\1"),
        *[(a.replace("embeddings\\.position", "^embeddings\\.position"), b) for a, b in STEM if "layernorm" not in a], *BLOCK,
        (r"^layernorm", "norm"), (r"^(blocks|norm|cls_token|pos_embed|patch_embed)", r"transformer.\1"),
    ),
)  # fmt: skip
from_published(
    "focalnet_from_microsoft", "rename", "transformers, FocalNet names",
    lambda seed: tiny("FocalNetForImageClassification", seed,
    image_size=32, embed_dim=8, depths=[1, 1], focal_levels=[2, 2], focal_windows=[3, 3]),
    lambda s: published(
        s, (r"focalnet\.embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
        (r"focalnet\.embeddings\.norm",
        "patch_embed.norm"), (r"focalnet\.layernorm", "norm"), (r"focalnet\.encoder\.stages\.(\d)\.layers", r"layers.\1.blocks"),
        (r"focalnet\.encoder\.stages\.(\d)\.downsample\.projection", r"layers.\1.downsample.proj"),
        (r"focalnet\.encoder\.stages", "layers"), ("projection_in", "f"), ("projection_context", "h"), ("projection_out", "proj"),
        ("classifier", "head"),
    ),
)  # fmt: skip
CVT = {
    "embed_dim": [8, 16], "num_heads": [1, 2], "depth": [1, 2], "patch_sizes": [7, 3], "patch_stride": [4, 2], "patch_padding": [2, 1],
    "mlp_ratio": [2.0, 2.0], "attention_drop_rate": [0.0, 0.0], "drop_rate": [0.0, 0.0], "drop_path_rate": [0.0, 0.0],
    "qkv_bias": [True, True], "cls_token": [False, True], "qkv_projection_method": ["dw_bn", "dw_bn"], "kernel_qkv": [3, 3],
    "padding_kv": [1, 1], "stride_kv": [2, 2], "padding_q": [1, 1], "stride_q": [1, 1],
}  # fmt: skip
from_published(
    "cvt_from_microsoft", "rename", "transformers, CvT names", lambda seed: tiny("CvtModel", seed, **CVT),
    lambda s: published(
        s, (r"encoder\.stages\.(\d)\.embedding\.convolution_embeddings\.projection", r"stage\1.patch_embed.proj"),
        (r"encoder\.stages\.(\d)\.embedding\.convolution_embeddings\.normalization", r"stage\1.patch_embed.norm"),
        (r"encoder\.stages\.(\d)\.layers", r"stage\1.blocks"),
        (r"encoder\.stages\.(\d)\.cls_token", r"stage\1.cls_token"),
        (r"attention\.attention\.convolution_projection_(\w)\w+\.convolution_projection\.convolution", r"attn.conv_proj_\1.conv"),
        (r"attention\.attention\.convolution_projection_(\w)\w+\.convolution_projection\.normalization", r"attn.conv_proj_\1.bn"),
        (r"attention\.attention\.projection_(\w)\w+", r"attn.proj_\1"), *BLOCK,
    ),
)  # fmt: skip


# ---------------------------------------------------------------- speech and music under their first names
def fairseq_speech(state: State, inner: str) -> State:
    return published(
        state, ("masked_spec_embed", "mask_emb"), (r"conv_layers\.(\d+)\.conv", r"conv_layers.\1.0"),
        (r"conv_layers\.(\d+)\.layer_norm", r"conv_layers.\1.2"), (r"feature_projection\.projection", "post_extract_proj"),
        (r"feature_projection\.layer_norm", "layer_norm"),
        (r"pos_conv_embed\.conv\.parametrizations\.weight\.original0",
        "pos_conv.0.weight_g"), (r"pos_conv_embed\.conv\.parametrizations\.weight\.original1", "pos_conv.0.weight_v"),
        (r"pos_conv_embed\.conv", "pos_conv.0"), (r"(layers\.\d+)\.layer_norm", r"\1.self_attn_layer_norm"),
        (r"(layers\.\d+)\.attention", r"\1.self_attn"), (r"feed_forward\.intermediate_dense", "fc1"),
        (r"feed_forward\.output_dense", "fc2"),
        (rf"^{inner}\.", "w2v_encoder.w2v_model."), ("lm_head", "w2v_encoder.proj"),
    )  # fmt: skip


from_published(
    "wav2vec2_from_fairseq",
    "param",
    "transformers, fairseq names",
    lambda seed: tiny("Wav2Vec2ForCTC", seed, **SPEECH),
    lambda s: {"args": None, "model": fairseq_speech(s, "wav2vec2")},
)
from_published(
    "hubert_from_fairseq", "param", "transformers, fairseq names", lambda seed: tiny("HubertModel", seed, **SPEECH),
    lambda s: {"cfg": {}, "model": fairseq_speech(s, "hubert") | {"label_embs_concat": floats(20, 8), "final_proj.weight": floats(8, 16),
    "final_proj.bias": floats(8)}},
)  # fmt: skip
from_published(
    "ast_from_mit", "fuse", "transformers, AST names",
    lambda seed: tiny("ASTForAudioClassification", seed,
    **dict(VIT, patch_size=4, max_length=16, num_mel_bins=8, frequency_stride=4, time_stride=4)),
    lambda s: published(fused(s, "attention.qkv.", split_of("attention")), (r"classifier\.layernorm", "mlp_head.0"),
    (r"classifier\.dense", "mlp_head.1"), *STEM, *BLOCK, ("^(?!mlp_head)", "v."), ("^", "module.")),
)  # fmt: skip
from_published(
    "encodec_from_facebook", "param", "transformers, EnCodec names",
    lambda seed: tiny("EncodecModel", seed, num_filters=4, hidden_size=16,
    num_residual_layers=1, upsampling_ratios=[4, 2], codebook_size=16, num_lstm_layers=1),
    lambda s: published(
        s, (r"(encoder|decoder)\.layers", r"\1.model"), (r"parametrizations\.weight\.original0", "weight_g"),
        (r"parametrizations\.weight\.original1", "weight_v"), (r"decoder\.model\.([36])\.conv\.", r"decoder.model.\1.convtr.convtr."),
        (r"(?<!convtr)\.conv\.", ".conv.conv."), (r"quantizer\.layers\.(\d+)\.codebook", r"quantizer.vq.layers.\1._codebook"),
    ),
)  # fmt: skip


@case("hifigan_weight_norm_into_plain", "param", "transformers, HiFi-GAN names")
def _():
    size = {
        "model_in_dim": 8,
        "upsample_initial_channel": 16,
        "upsample_rates": [4, 2],
        "upsample_kernel_sizes": [8, 4],
        "resblock_kernel_sizes": [3, 7],
        "resblock_dilation_sizes": [[1, 3], [1, 3]],
    }
    model, target = tiny("SpeechT5HifiGan", 540, **size), tiny("SpeechT5HifiGan", **size)
    plain = without(sd(model), "^mean$", "^scale$")
    with quiet():
        model.apply_weight_norm()
    source = {n: v for n, v in sd(model).items() if n not in {"mean", "scale"}}
    rows = (
        ("upsampler", "ups"),
        (r"parametrizations\.weight\.original0", "weight_g"),
        (r"parametrizations\.weight\.original1", "weight_v"),
    )
    return Case({"generator": published(source, *rows)}, target, plain, "library", tol=1e-5, note="mean and scale are SpeechT5's own")


from_published(
    "bark_from_suno", "rename", "transformers, Bark names",
    lambda seed: tiny("BarkSemanticModel", seed, hidden_size=16, num_layers=2,
    num_heads=2, block_size=20, input_vocab_size=50, output_vocab_size=50),
    lambda s: {"model": published(
        s, (r"^layers", "transformer.h"), ("input_embeds_layer", "transformer.wte"), ("position_embeds_layer", "transformer.wpe"),
        ("layernorm_final", "transformer.ln_f"), (r"layernorm_([12])", r"ln_\1"), ("att_proj", "c_attn"),
        (r"attn\.out_proj", "attn.c_proj"),
        (r"mlp\.in_proj", "mlp.c_fc"), (r"mlp\.out_proj", "mlp.c_proj"), ("^", "_orig_mod."),
    ), "best_val_loss": 1.0},
    note="GPT-2's words over plain Linear layers: nothing is transposed, as the oblong ones show",
)  # fmt: skip
from_published(
    "musicgen_from_audiocraft", "fuse", "transformers, audiocraft names",
    lambda seed: tiny("MusicgenForCausalLM", seed, vocab_size=50,
    hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2, num_codebooks=2),
    lambda s: {"best_state": published(
        fused(fused(without(s, "embed_positions"), "self_attn.in_proj_", split_of("self_attn")), "cross_attention.in_proj_",
        split_of("encoder_attn")), (r"model\.decoder\.embed_tokens", "emb"), (r"model\.decoder\.layers", "transformer.layers"),
        (r"model\.decoder\.layer_norm", "out_norm"), ("lm_heads", "linears"),
        ("self_attn_layer_norm", "norm1"), ("encoder_attn_layer_norm", "norm_cross"), ("final_layer_norm", "norm2"),
        (r"encoder_attn\.", "cross_attention."), (r"fc([12])", r"linear\1"),
    ), "version": "1.0"},
    lost=("embed_positions",),
)  # fmt: skip


# ---------------------------------------------------------------- torch.nn's own transformers beside transformers' models
def encoder_layers(norm_first: bool, activation: Any, norm: nn.Module | None = None, width: int = 24) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(16, 2, width, activation=activation, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 2, norm, enable_nested_tensor=False).eval()


def attention_of(state: Mapping[str, Tensor], old: str, new: str, words: Sequence[str], out: str) -> State:
    """One attention's tensors as torch.nn.MultiheadAttention keeps them."""
    made: State = {}
    for end in ("weight", "bias"):
        made[f"{new}in_proj_{end}"] = torch.cat([state[f"{old}{word}.{end}"] for word in words])
        made[f"{new}out_proj.{end}"] = state[f"{old}{out}.{end}"]
    return made


def both_ends(state: Mapping[str, Tensor], names: Mapping[str, str]) -> State:
    return {f"{new}.{end}": state[f"{old}.{end}"] for old, new in names.items() for end in ("weight", "bias")}


def seq_to_torch(state: Mapping[str, Tensor]) -> State:
    """BART's layers under nn.Transformer's names."""
    out: State = {}
    for side in ("encoder", "decoder"):
        for i in range(2):
            a = f"{side}.layers.{i}."
            out |= attention_of(state, f"{a}self_attn.", f"{a}self_attn.", ("q_proj", "k_proj", "v_proj"), "out_proj")
            last = "norm2" if side == "encoder" else "norm3"
            out |= both_ends(
                state,
                {
                    f"{a}self_attn_layer_norm": f"{a}norm1",
                    f"{a}fc1": f"{a}linear1",
                    f"{a}fc2": f"{a}linear2",
                    f"{a}final_layer_norm": f"{a}{last}",
                },
            )
            if side == "decoder":
                out |= attention_of(state, f"{a}encoder_attn.", f"{a}multihead_attn.", ("q_proj", "k_proj", "v_proj"), "out_proj")
                out |= both_ends(state, {f"{a}encoder_attn_layer_norm": f"{a}norm2"})
    return out


def torch_seq() -> nn.Transformer:
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, 24, activation="gelu", batch_first=True), 2)
    return nn.Transformer(16, 2, custom_encoder=encoder_layers(False, "gelu"), custom_decoder=decoder, batch_first=True).eval()


def bart(seed: int, cls: str = "BartModel", **more: Any) -> nn.Module:
    return tiny(cls, seed, bos_token_id=1, eos_token_id=2, **SEQ, **more)


@case("bart_layers_into_torch_transformer", "fuse", "transformers, torch")
def _():
    model, target = bart(550), torch_seq()
    expected = seq_to_torch(sd(model))
    land(target, expected)
    x = floats(2, 5, 16)

    def run(m):
        for layer in m.encoder.layers[:1]:
            out = layer(x, None)
        return out[0] if isinstance(out, tuple) else out

    agree(lambda: run(model), lambda: target.encoder.layers[0](x))
    return Case(sd(model), fill(target, 2), expected, "forward", note="embeddings are left over")


@case("torch_transformer_into_bart_layers", "fuse", "transformers, torch")
def _():
    model = bart(551)
    expected = {n: v for n, v in sd(model).items() if ".layers." in n}
    return Case(seq_to_torch(sd(model)), fill(model, 2), expected, "formula", note="embeddings have no source")


@case("vit_into_torch_encoder", "fuse", "transformers, torch")
def _():
    model = tiny("ViTModel", 552, **VIT)
    target = encoder_layers(True, "gelu", nn.LayerNorm(16, model.config.layer_norm_eps), 40)
    s, expected = sd(model), both_ends(sd(model), {"layernorm": "norm"})
    for i in range(2):
        a = f"layers.{i}."
        expected |= attention_of(s, f"{a}attention.", f"{a}self_attn.", ("q_proj", "k_proj", "v_proj"), "o_proj")
        expected |= both_ends(
            s,
            {
                f"{a}layernorm_before": f"{a}norm1",
                f"{a}layernorm_after": f"{a}norm2",
                f"{a}mlp.fc1": f"{a}linear1",
                f"{a}mlp.fc2": f"{a}linear2",
            },
        )
    for layer in target.layers:
        layer.norm1.eps = layer.norm2.eps = model.config.layer_norm_eps
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(6))
    start = model.embeddings(x)
    return forward_case(model, target, expected, lambda m: m(x).last_hidden_state, lambda m: m(start.detach()))


def gpt2(seed: int, cls: str = "GPT2LMHeadModel", **more: Any) -> nn.Module:
    return tiny(cls, seed, vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=20, **more)


@case("gpt2_into_torch_encoder", "layout", "transformers, torch")
def _():
    model = gpt2(553, "GPT2Model", n_inner=24)
    gelu = functools.partial(nn.functional.gelu, approximate="tanh")
    target = encoder_layers(True, gelu, nn.LayerNorm(16))
    s, expected = sd(model), both_ends(sd(model), {"ln_f": "norm"})
    turned = {n: v.T.contiguous() if re.search(r"(c_attn|c_proj|c_fc)\.weight", n) else v for n, v in s.items()}
    for i in range(2):
        a, b = f"h.{i}.", f"layers.{i}."
        expected |= {f"{b}self_attn.in_proj_{end}": turned[f"{a}attn.c_attn.{end}"] for end in ("weight", "bias")}
        expected |= both_ends(
            turned,
            {
                f"{a}attn.c_proj": f"{b}self_attn.out_proj",
                f"{a}ln_1": f"{b}norm1",
                f"{a}ln_2": f"{b}norm2",
                f"{a}mlp.c_fc": f"{b}linear1",
                f"{a}mlp.c_proj": f"{b}linear2",
            },
        )
    x, mask = floats(2, 5, 16), nn.Transformer.generate_square_subsequent_mask(5)
    start = x + s["wpe.weight"][:5]
    return forward_case(
        model,
        target,
        expected,
        lambda m: m(inputs_embeds=x).last_hidden_state,
        lambda m: m(start, mask=mask),
        note="c_attn is Conv1D's [in, out] and in_proj_weight [out, in]: the square out_proj turns with its family",
    )


@case("albert_layer_into_torch_layer", "fuse", "transformers, torch")
def _():
    model = tiny("AlbertModel", 554, embedding_size=8, hidden_act="gelu", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **BERT)
    target = nn.TransformerEncoderLayer(16, 4, 24, activation="gelu", batch_first=True, layer_norm_eps=model.config.layer_norm_eps).eval()
    a = "encoder.albert_layer_groups.0.albert_layers.0."
    s = sd(model)
    expected = attention_of(s, f"{a}attention.", "self_attn.", ("query", "key", "value"), "dense")
    expected |= both_ends(
        s, {f"{a}attention.LayerNorm": "norm1", f"{a}full_layer_layer_norm": "norm2", f"{a}ffn": "linear1", f"{a}ffn_output": "linear2"}
    )
    return Case(s, target, expected, "formula")


# ---------------------------------------------------------------- another head on the same body
def other_head(name: str, source: str, target: str, options: Mapping[str, Any], more: Mapping[str, Any] = {}, only: str = "",
    strip: str = "", note: str = "") -> None:  # fmt: skip
    """The body is the body; a head of another task has no source, whatever its shapes."""

    @case(name, "head")
    def _() -> Case:
        model, wanted = tiny(source, 560 + len(LIBRARY), **options), tiny(target, **options, **more)
        state, own = sd(model), sd(wanted)
        expected = {n.removeprefix(strip): v for n, v in state.items() if re.search(only, n) and n.removeprefix(strip) in own}
        return Case(state, wanted, expected, "library", note=note)


other_head(
    "distilbert_mlm_into_classifier",
    "DistilBertForMaskedLM",
    "DistilBertForSequenceClassification",
    {"vocab_size": 50, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 40, "max_position_embeddings": 20},
    note="vocab_transform is no pre_classifier",
)
other_head(
    "electra_discriminator_into_classifier",
    "ElectraForPreTraining",
    "ElectraForSequenceClassification",
    dict(BERT, embedding_size=8),
    note="discriminator_predictions.dense is no classifier.dense",
)
other_head(
    "roberta_mlm_into_classifier",
    "RobertaForMaskedLM",
    "RobertaForSequenceClassification",
    BERT,
    note="lm_head.dense is no classifier.dense",
)
other_head(
    "xlm_roberta_mlm_into_base", "XLMRobertaForMaskedLM", "XLMRobertaModel", BERT, strip="roberta.", note="lm_head.dense is no pooler"
)
other_head(
    "wav2vec2_pretraining_into_ctc",
    "Wav2Vec2ForPreTraining",
    "Wav2Vec2ForCTC",
    dict(SPEECH, codevector_dim=16, proj_codevector_dim=16, num_codevectors_per_group=10, final_dropout=0.0),
)
other_head("llama_lm_into_classifier", "LlamaForCausalLM", "LlamaForSequenceClassification", TEXT, {"num_labels": 3})
other_head(
    "llama_lm_into_classifier_as_wide_as_the_vocabulary",
    "LlamaForCausalLM",
    "LlamaForSequenceClassification",
    TEXT,
    {"num_labels": 50},
    note="lm_head [50, 16] is no score [50, 16]",
)
other_head(
    "t5_into_encoder_alone",
    "T5ForConditionalGeneration",
    "T5EncoderModel",
    {"vocab_size": 50, "d_model": 16, "d_kv": 6, "d_ff": 24, "num_layers": 2, "num_heads": 2},
)
other_head(
    "bert_pretraining_into_qa",
    "BertForPreTraining",
    "BertForQuestionAnswering",
    BERT,
    note="seq_relationship [2, 16] is no qa_outputs [2, 16]",
)
other_head(
    "whisper_into_audio_classifier",
    "WhisperForConditionalGeneration",
    "WhisperForAudioClassification",
    {
        "vocab_size": 50,
        "num_mel_bins": 8,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_layers": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 24,
        "decoder_ffn_dim": 24,
        "d_model": 16,
        "max_source_positions": 10,
        "max_target_positions": 12,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 1,
    },
    strip="model.",
)
other_head(
    "gpt2_into_token_classifier",
    "GPT2LMHeadModel",
    "GPT2ForTokenClassification",
    {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 20},
    {"num_labels": 3},
)
other_head(
    "segformer_classes_differ",
    "SegformerForImageClassification",
    "SegformerForSemanticSegmentation",
    SEGFORMER,
    {"decoder_hidden_size": 12, "num_labels": 5},
    only="segformer",
)


@case("clip_into_text_tower_with_projection", "head")
def _():
    tower = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
    text, vision = dict(tower, vocab_size=50, max_position_embeddings=12), dict(tower, image_size=16, patch_size=8)
    model = tiny("CLIPModel", 575, text_config=text, vision_config=vision, projection_dim=16)
    target = tiny("CLIPTextModelWithProjection", projection_dim=16, **text)
    state, own = sd(model), sd(target)
    expected = {n: state[n] if n in state else state[f"text_model.{n}"] for n in own}
    return Case(state, target, expected, "library", note="the vision tower has the same layers")


@case("dpr_two_encoders_into_question_encoder", "negative", "transformers, DPR names")
def _():
    target = tiny("DPRQuestionEncoder", projection_dim=0, **BERT)
    rows = (r"^question_encoder\.bert_model\.", "question_model."), (r"^question_encoder\.bert_model\.", "ctx_model.")
    models = [sd(tiny("DPRQuestionEncoder", seed, projection_dim=0, **BERT)) for seed in (576, 577)]
    source = published(models[0], rows[0]) | published(models[1], rows[1])
    return Case(
        {"model_dict": source, "epoch": 3},
        target,
        models[0],
        "formula",
        either=dict.fromkeys(models[0], "two encoders fit; the word 'question' may be taken for proof"),
    )


# ---------------------------------------------------------------- peft
def peft() -> Any:
    transformers()
    with quiet():
        import peft

    return peft


def adapted(kind: str, seed: int, base: Callable[[int], nn.Module], adapter: str = "default", **options: Any) -> nn.Module:
    """A model in peft's wrapper, the adapter filled as well, so that it does something."""
    with quiet():
        return fill(peft().get_peft_model(base(7), getattr(peft(), kind)(**options), adapter_name=adapter), seed)


def bert_classifier(seed: int) -> nn.Module:
    return tiny("BertForSequenceClassification", seed, num_labels=3, **BERT)


QV = {"target_modules": ["query", "value"]}
ADAPTERS: dict[str, tuple[str, Callable[[int], nn.Module], dict[str, Any]]] = {
    "lora_bert_classifier": ("LoraConfig", bert_classifier, dict(QV, r=2, lora_alpha=8, task_type="SEQ_CLS")),
    "lora_gpt2_conv1d": ("LoraConfig", gpt2, {"target_modules": ["c_attn", "c_fc"], "r": 2, "lora_alpha": 8, "fan_in_fan_out": True}),
    "dora_and_embeddings": ("LoraConfig", bert_classifier, {"target_modules": ["query", "word_embeddings"], "r": 2, "lora_alpha": 8,
    "use_dora": True}),
    "ia3": ("IA3Config", bert_classifier, {"target_modules": ["key", "value", "output.dense"], "feedforward_modules": ["output.dense"]}),
    "loha": ("LoHaConfig", bert_classifier, dict(QV, r=2, alpha=8)),
    "adalora": ("AdaLoraConfig", bert_classifier, dict(QV, init_r=3, target_r=2, total_step=10)),
    "vera": ("VeraConfig", bert_classifier, dict(QV, r=4)),
    "prompt_tuning": ("PromptTuningConfig", bert_classifier, {"num_virtual_tokens": 4, "task_type": "SEQ_CLS"}),
    "oft": ("OFTConfig", bert_classifier, dict(QV, oft_block_size=4)),
    "boft": ("BOFTConfig", bert_classifier, dict(QV, boft_block_size=4)),
}  # fmt: skip


def _adapter_file(name: str, kind: str, base: Callable[[int], nn.Module], options: dict[str, Any], seed: int) -> None:
    @case(f"peft_{name}_file_into_wrapped", "lora", "peft, transformers")
    def _() -> Case:
        model, target = adapted(kind, seed, base, **options), adapted(kind, 3, base, "style", **options)
        with quiet():
            source = {n: v.detach().clone() for n, v in peft().get_peft_model_state_dict(model, save_embedding_layers=False).items()}
            before = sd(target)
            peft().set_peft_model_state_dict(target, source, adapter_name="style")
        expected = {n: v for n, v in sd(target).items() if not torch.equal(v, before[n])}
        return Case(source, fill(target, 4), expected, "library", note="the file leaves the adapter's name out")


for _number, (_name, _made) in enumerate(ADAPTERS.items()):
    if _name not in {"lora_gpt2_conv1d", "boft"}:
        _adapter_file(_name, *_made, seed=600 + _number)


def _wrapped_into_plain(name: str, kind: str, base: Callable[[int], nn.Module], options: dict[str, Any], seed: int) -> None:
    @case(f"peft_{name}_into_plain", "negative", "peft, transformers")
    def _() -> Case:
        model = adapted(kind, seed, base, **options)
        source = sd(model)
        with quiet():
            expected = sd(model.merge_and_unload())
        plain = {
            re.sub(r"^base_model\.model\.|\.(?:base_layer|modules_to_save\.default)(?=\.)", "", n) for n in source if "base_layer" in n
        }
        why = dict.fromkeys((n for n in expected if n in plain), "how the adapter changes it stands in adapter_config.json and peft's code")
        same = {n: why[n] for n in why if any(torch.equal(expected[n], v) for v in source.values())}
        either = same | {n: "modules_to_save stands beside original_module" for n in expected if n.startswith("classifier")}
        return Case(source, base(1), expected, "library", unprovable={n: why[n] for n in why if n not in same}, either=either, tol=1e-5)


for _number, _name in enumerate(("lora_bert_classifier", "lora_gpt2_conv1d", "ia3", "loha", "adalora", "boft")):
    _wrapped_into_plain(_name, *ADAPTERS[_name], seed=630 + _number)


@case("peft_plain_bert_into_wrapped", "lora", "peft, transformers")
def _():
    kind, base, options = ADAPTERS["lora_bert_classifier"]
    model, target = base(640), adapted(kind, 3, base, **options)
    state = sd(model)
    expected = {}
    for name in sd(target):
        plain = re.sub(r"^base_model\.model\.|\.(?:base_layer|original_module|modules_to_save\.default)(?=\.)", "", name)
        if ("lora_" not in name and "modules_to_save" not in name) or "modules_to_save" in name:
            expected[name] = state[plain]
    either = {n: "peft starts the trained copy from the plain one" for n in expected if "classifier" in n}
    return Case(state, target, expected, "library", either=either)


@case("peft_merged_file_under_ddp", "wrapper", "peft, transformers, torch")
def _():
    kind, base, options = ADAPTERS["lora_gpt2_conv1d"]
    with quiet():
        merged = adapted(kind, 641, base, **options).merge_and_unload()
    return Case({"model": sd(nn.DataParallel(merged)), "step": 3}, base(1), sd(merged), "library")


@case("peft_wrapped_under_ddp_and_compile", "wrapper", "peft, transformers, torch")
def _():
    kind, base, options = ADAPTERS["lora_bert_classifier"]
    model, target = adapted(kind, 642, base, **options), adapted(kind, 3, base, **options)
    return Case({"state_dict": sd(nn.DataParallel(torch.compile(model)))}, target, sd(model), "identity")


# ---------------------------------------------------------------- wrappers around transformers' models
def wrapped(name: str, bullet: str, libs: str, make: Callable[[int], nn.Module], wrap: Callable[[nn.Module], Any], **more: Any) -> None:
    @case(name, bullet, libs)
    def _() -> Case:
        model = make(660 + len(LIBRARY))
        clean = sd(model)
        return Case(wrap(model), make(1), clean, "identity", **more)


def compiled_layers(model: nn.Module) -> State:
    for i, layer in enumerate(model.bert.encoder.layer):
        model.bert.encoder.layer[i] = torch.compile(layer)
    return sd(nn.DataParallel(model))


def under_fsdp(model: nn.Module) -> State:
    return published(
        sd(model), (r"(layers\.\d+)\.", r"\1._fsdp_wrapped_module._checkpoint_wrapped_module."), ("^", "_fsdp_wrapped_module.")
    )


def lightning(model: nn.Module) -> dict[str, Any]:
    state = {f"model.net.{n}": v for n, v in sd(model).items()} | {
        "loss.weight": floats(3),
        "train_acc.confmat": torch.zeros(3, 3, dtype=torch.long),
    }
    return {
        "epoch": 3,
        "pytorch-lightning_version": "2.6.0",
        "state_dict": state,
        "callbacks": {},
        "loops": {},
        "hyper_parameters": {"lr": 0.1},
    }


def averaged(model: nn.Module) -> State:
    ema = torch.optim.swa_utils.AveragedModel(model)
    ema.update_parameters(model)
    return sd(ema)


wrapped("bert_layers_compiled_under_ddp", "wrapper", "transformers, torch", bert_classifier, compiled_layers)
wrapped(
    "llama_under_fsdp_and_checkpointing",
    "wrapper",
    "transformers, torch names",
    lambda seed: tiny("LlamaForCausalLM", seed, **TEXT),
    under_fsdp,
)
wrapped("bert_in_a_lightning_checkpoint", "wrapper", "transformers, lightning names", bert_classifier, lightning)
wrapped("gpt2_averaged", "wrapper", "transformers, torch", gpt2, averaged)
wrapped(
    "bert_of_sentence_transformers",
    "wrapper",
    "transformers, sentence-transformers names",
    lambda seed: tiny("BertModel", seed, **BERT),
    lambda m: {f"0.auto_model.{n}": v for n, v in sd(m).items()} | {"2.linear.weight": floats(16, 16), "2.linear.bias": floats(16)},
)
wrapped(
    "gpt2_with_a_value_head",
    "wrapper",
    "transformers, TRL names",
    gpt2,
    lambda m: (
        {f"pretrained_model.{n}": v for n, v in sd(m).items()} | {"v_head.summary.weight": floats(1, 16), "v_head.summary.bias": floats(1)}
    ),
)
wrapped(
    "wav2vec2_of_a_deepspeed_run",
    "wrapper",
    "transformers, DeepSpeed names",
    lambda seed: tiny("Wav2Vec2Model", seed, **SPEECH),
    lambda m: {"module": sd(nn.DataParallel(m)), "ds_version": "0.16", "optimizer": None},
)
wrapped(
    "vit_as_a_backbone_in_bfloat16",
    "wrapper",
    "transformers",
    lambda seed: tiny("ViTModel", seed, **VIT).bfloat16(),
    lambda m: {f"vision_encoder.backbone.{n}": v for n, v in sd(m).items()} | {"vision_encoder.neck.0.weight": floats(8, 16, 1, 1)},
)


# ---------------------------------------------------------------- families that match was written with, for the everyday's sake
HUB_KNOWN: tuple[tuple[str, str, str, Callable[[], dict[str, Any]]], ...] = (
    ("vit", "rename", "ViTModel", lambda: VIT),
    ("dinov2_swiglu", "fuse", "Dinov2Model", lambda: dict(VIT, use_swiglu_ffn=True)),
    ("swin", "rename", "SwinModel", lambda: {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4],
    "window_size": 4}),
    ("segformer", "rename", "SegformerModel", lambda: SEGFORMER),
    ("beit", "rename", "BeitModel", lambda: dict(VIT, vocab_size=20)),
    ("mixtral", "fuse", "MixtralForCausalLM", lambda: dict(TEXT, num_local_experts=3)),
    ("qwen2_moe", "fuse", "Qwen2MoeForCausalLM", lambda: dict(TEXT, **MOE, num_experts=3, shared_expert_intermediate_size=20)),
    ("phimoe", "fuse", "PhimoeForCausalLM", lambda: dict(TEXT, num_local_experts=3)),
    ("nomic_bert", "fuse", "NomicBertModel", lambda: BERT),
    ("esm", "rename", "EsmModel", lambda: dict(BERT, position_embedding_type="rotary", pad_token_id=0, mask_token_id=3)),
    ("llava", "rename", "LlavaForConditionalGeneration", llava_parts),
    ("t5", "tie", "T5ForConditionalGeneration", lambda: {"vocab_size": 50, "d_model": 16, "d_kv": 6, "d_ff": 24, "num_layers": 2,
    "num_heads": 2}),
)  # fmt: skip
for _number, _row in enumerate(HUB_KNOWN):
    _hub(*_row, seed=700 + _number, back=False)
_hub(*HUB_KNOWN[5], seed=720, back=True)


def clip(seed: int) -> nn.Module:
    tower = {"num_hidden_layers": 2, "num_attention_heads": 2}
    text = dict(tower, hidden_size=16, intermediate_size=40, vocab_size=50, max_position_embeddings=12)
    vision = dict(tower, hidden_size=24, intermediate_size=48, image_size=16, patch_size=8)
    return tiny("CLIPModel", seed, text_config=text, vision_config=vision, projection_dim=16)


def openai_clip(state: State) -> State:
    return published(
        fused(state, ".attn.in_proj_", split_of(".self_attn")), (r"vision_model\.encoder\.layers", "visual.transformer.resblocks"),
        (r"text_model\.encoder\.layers", "transformer.resblocks"), (r"self_attn\.out_proj", "attn.out_proj"),
        (r"layer_norm([12])", r"ln_\1"),
        (r"mlp\.fc1", "mlp.c_fc"), (r"mlp\.fc2", "mlp.c_proj"), ("vision_model.pre_layrnorm", "visual.ln_pre"),
        ("vision_model.post_layernorm", "visual.ln_post"), ("text_model.final_layer_norm", "ln_final"),
        (r"vision_model\.embeddings\.patch_embedding", "visual.conv1"),
        (r"vision_model\.embeddings\.position_embedding\.weight", "visual.positional_embedding"),
        (r"vision_model\.embeddings\.class_embedding", "visual.class_embedding"),
        (r"text_model\.embeddings\.token_embedding",
        "token_embedding"), (r"text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
        (r"visual_projection\.weight", "visual.proj", transpose), (r"text_projection\.weight", "text_projection", transpose),
        (r"^logit_scale$", "logit_scale"),
    )  # fmt: skip


from_published("clip_from_openai", "fuse", "transformers, OpenAI names", clip, openai_clip)
to_published("clip_to_openai", "fuse", "transformers, OpenAI names", clip, openai_clip)


def whisper(seed: int) -> nn.Module:
    return tiny(
        "WhisperForConditionalGeneration",
        seed,
        **{k: v for k, v in SEQ.items() if k != "max_position_embeddings"}
        | {
            "num_mel_bins": 8,
            "max_source_positions": 10,
            "max_target_positions": 12,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
        },
    )


def openai_whisper(state: State) -> State:
    return published(
        without(state, "proj_out"), (r"^model\.", ""), ("layers", "blocks"), (r"self_attn\.q_proj", "attn.query"),
        (r"self_attn\.k_proj", "attn.key"), (r"self_attn\.v_proj", "attn.value"), (r"self_attn\.out_proj", "attn.out"),
        ("self_attn_layer_norm", "attn_ln"),
        (r"encoder_attn\.q_proj", "cross_attn.query"), (r"encoder_attn\.k_proj", "cross_attn.key"),
        (r"encoder_attn\.v_proj", "cross_attn.value"), (r"encoder_attn\.out_proj", "cross_attn.out"),
        ("encoder_attn_layer_norm", "cross_attn_ln"), ("fc1", "mlp.0"), ("fc2", "mlp.2"),
        ("final_layer_norm", "mlp_ln"), (r"encoder\.layer_norm", "encoder.ln_post"), (r"decoder\.layer_norm", "decoder.ln"),
        (r"embed_tokens", "token_embedding"), (r"embed_positions\.weight", "positional_embedding"),
    )  # fmt: skip


from_published(
    "whisper_from_openai",
    "rename",
    "transformers, OpenAI names",
    whisper,
    lambda s: {"dims": {"n_mels": 8}, "model_state_dict": openai_whisper(s)},
)
to_published("whisper_to_openai", "rename", "transformers, OpenAI names", whisper, openai_whisper)
from_published(
    "bert_from_gamma_and_beta", "rename", "transformers, first BERT names", lambda seed: tiny("BertModel", seed, **BERT),
    lambda s: published(s, (r"LayerNorm\.weight", "LayerNorm.gamma"), (r"LayerNorm\.bias", "LayerNorm.beta"),
    ("^", "bert.")) | {"cls.predictions.bias": floats(50), "bert.embeddings.position_ids": torch.arange(20)[None]},
)  # fmt: skip
from_published(
    "roberta_from_fairseq", "rename", "transformers, fairseq names", lambda seed: tiny("RobertaModel", seed, **BERT),
    lambda s: published(
        without(s, "token_type", "pooler"), (r"embeddings\.word_embeddings", "embed_tokens"),
        (r"embeddings\.position_embeddings", "embed_positions"), (r"embeddings\.LayerNorm", "emb_layer_norm"),
        (r"encoder\.layer", "layers"), (r"attention\.self\.query", "self_attn.q_proj"),
        (r"attention\.self\.key", "self_attn.k_proj"), (r"attention\.self\.value", "self_attn.v_proj"),
        (r"attention\.output\.dense", "self_attn.out_proj"), (r"attention\.output\.LayerNorm", "self_attn_layer_norm"),
        (r"intermediate\.dense", "fc1"), (r"output\.dense", "fc2"),
        (r"output\.LayerNorm", "final_layer_norm"), ("^", "decoder.sentence_encoder."),
    ),
    lost=("token_type", "pooler"),
)  # fmt: skip


def llama(seed: int, **more: Any) -> nn.Module:
    return tiny("LlamaForCausalLM", seed, **dict(TEXT, **more))


def meta_llama(state: State) -> State:
    return published(
        state,
        ("q_proj", "q_proj", pairs(4)),
        ("k_proj", "k_proj", pairs(2)),
        (r"mlp\.gate_proj", "feed_forward.w1"),
        (r"mlp\.up_proj", "feed_forward.w3"),
        (r"mlp\.down_proj", "feed_forward.w2"),
        *META,
    )


from_published("llama_from_meta", "layout", "transformers, Meta names", llama, meta_llama)
from_published(
    "llama_from_fused_projections", "fuse", "transformers, vLLM names", llama,
    lambda s: fused(fused(s, ".self_attn.qkv_proj.", split_of(".self_attn")), ".mlp.gate_up_proj.",
    split_of(".mlp", ("gate_proj", "up_proj"))),
)  # fmt: skip


@case("llama_into_phi3", "fuse")
def _():
    state = sd(llama(730))
    expected = fused(
        fused(state, ".self_attn.qkv_proj.", split_of(".self_attn")), ".mlp.gate_up_proj.", split_of(".mlp", ("gate_proj", "up_proj"))
    )
    return Case(state, tiny("Phi3ForCausalLM", **TEXT), expected, "formula")


from_published(
    "vit_from_timm",
    "fuse",
    "transformers, timm names",
    vit,
    lambda s: published(fused(s, "attention.qkv.", split_of("attention")), *STEM, *BLOCK, ("classifier", "head")),
)
to_published(
    "vit_to_timm",
    "fuse",
    "transformers, timm names",
    vit,
    lambda s: published(fused(s, "attention.qkv.", split_of("attention")), *STEM, *BLOCK, ("classifier", "head")),
)
from_published(
    "swin_from_timm", "fuse", "transformers, timm names", swin,
    lambda s: published(
        fused(s, "attn.qkv.", split_of("attention")), (r"swin\.embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
        ("swin.embeddings.norm", "patch_embed.norm"), ("swin.layernorm", "norm"), ("classifier", "head.fc"),
        (r"swin\.encoder\.layers\.(\d+)\.downsample", lambda f: f"layers.{int(f[1]) + 1}.downsample"), (r"swin\.encoder\.", ""), *BLOCK,
        (r"attention\.relative_position_bias\.", "attn."),
    ),
)  # fmt: skip


def resnet(seed: int) -> nn.Module:
    return tiny(
        "ResNetForImageClassification", seed, embedding_size=8, hidden_sizes=[16, 16, 24, 24], depths=[2, 1, 1, 1], layer_type="bottleneck"
    )


def torchvision_resnet(state: State) -> State:
    return published(
        state, (r"resnet\.embedder\.embedder\.convolution", "conv1"), (r"resnet\.embedder\.embedder\.normalization", "bn1"),
        (r"resnet\.encoder\.stages\.(\d)\.layers", lambda f: f"layer{int(f[1]) + 1}"),
        (r"layer\.(\d)\.convolution", lambda f: f"conv{int(f[1]) + 1}"),
        (r"layer\.(\d)\.normalization", lambda f: f"bn{int(f[1]) + 1}"), (r"shortcut\.convolution", "downsample.0"),
        (r"shortcut\.normalization", "downsample.1"), (r"classifier\.1", "fc"),
    )  # fmt: skip


from_published("resnet_from_torchvision", "rename", "transformers, torchvision names", resnet, torchvision_resnet)
to_published("resnet_to_torchvision", "rename", "transformers, torchvision names", resnet, torchvision_resnet)
from_published(
    "convnext_from_facebook", "rename", "transformers, Facebook names",
    lambda seed: tiny("ConvNextForImageClassification", seed, hidden_sizes=[8, 12], depths=[2, 1], num_stages=2),
    lambda s: published(
        s, (r"convnext\.embeddings\.patch_embeddings", "downsample_layers.0.0"),
        (r"convnext\.embeddings\.layernorm",
        "downsample_layers.0.1"), (r"convnext\.encoder\.stages\.(\d+)\.downsampling_layer", r"downsample_layers.\1"),
        (r"convnext\.encoder\.stages\.(\d+)\.layers", r"stages.\1"),
        ("convnext.layernorm", "norm"), ("layernorm", "norm"), ("layer_scale_parameter", "gamma"), ("classifier", "head"),
    ),
)  # fmt: skip
from_published(
    "wav2vec2_from_weight_g_and_v", "param", "transformers, older names", lambda seed: tiny("Wav2Vec2Model", seed, **SPEECH),
    lambda s: published(s, (r"parametrizations\.weight\.original0", "weight_g"), (r"parametrizations\.weight\.original1", "weight_v"),
    ("^", "wav2vec2.")),
)  # fmt: skip


@case("gpt2_into_nanogpt", "layout", "transformers, nanoGPT names")
def _():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ln_1, self.ln_2 = nn.LayerNorm(16), nn.LayerNorm(16)
            self.attn = nn.ModuleDict({"c_attn": nn.Linear(16, 48), "c_proj": nn.Linear(16, 16)})
            self.mlp = nn.ModuleDict({"c_fc": nn.Linear(16, 64), "c_proj": nn.Linear(64, 16)})

    body = nn.ModuleDict(
        {"wte": nn.Embedding(50, 16), "wpe": nn.Embedding(20, 16), "h": nn.ModuleList(Block() for _ in range(2)), "ln_f": nn.LayerNorm(16)}
    )
    target = nn.ModuleDict({"transformer": body, "lm_head": nn.Linear(16, 50, bias=False)})
    target["lm_head"].weight = body["wte"].weight
    state = sd(gpt2(740))
    expected = {n: v.T.contiguous() if re.search(r"(c_attn|c_proj|c_fc)\.weight", n) else v for n, v in state.items()}
    land(target, expected)
    return Case(state, fill(target, 2), expected, "formula", note="equal names, four matrices of a block transposed, one of them square")


@case("bert_into_torch_encoder", "fuse", "transformers, torch")
def _():
    s, expected = sd(tiny("BertModel", 741, **BERT)), {}
    for i in range(2):
        a, b = f"encoder.layer.{i}.", f"layers.{i}."
        expected |= attention_of(
            {n.replace("attention.output", "attention.self.output"): v for n, v in s.items()},
            f"{a}attention.self.",
            f"{b}self_attn.",
            ("query", "key", "value"),
            "output.dense",
        )
        expected |= both_ends(
            s,
            {
                f"{a}attention.output.LayerNorm": f"{b}norm1",
                f"{a}output.LayerNorm": f"{b}norm2",
                f"{a}intermediate.dense": f"{b}linear1",
                f"{a}output.dense": f"{b}linear2",
            },
        )
    return Case(s, encoder_layers(False, "gelu"), expected, "formula", note="embeddings and pooler are left over")


@case("bert_into_distilbert", "rename")
def _():
    s = sd(tiny("BertModel", 742, **BERT))
    target = tiny("DistilBertModel", vocab_size=50, dim=16, n_layers=2, n_heads=4, hidden_dim=24, max_position_embeddings=20)
    rows = (
        (r"encoder\.layer", "transformer.layer"), (r"attention\.self\.query", "attention.q_lin"),
        (r"attention\.self\.key", "attention.k_lin"), (r"attention\.self\.value", "attention.v_lin"),
        (r"attention\.output\.dense", "attention.out_lin"),
        (r"attention\.output\.LayerNorm", "sa_layer_norm"), (r"intermediate\.dense", "ffn.lin1"), (r"output\.dense", "ffn.lin2"),
        (r"output\.LayerNorm", "output_layer_norm"),
    )  # fmt: skip
    return Case(s, target, published(without(s, "token_type", "pooler"), *rows), "formula", note="token types and pooler are left over")


other_head("bert_mlm_into_base", "BertForMaskedLM", "BertModel", BERT, strip="bert.", note="cls.predictions.transform.dense is no pooler")
other_head("bert_base_into_classifier", "BertForPreTraining", "BertForSequenceClassification", BERT, {"num_labels": 3})
