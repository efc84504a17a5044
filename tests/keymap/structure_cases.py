"""Cases of what only the place of a name tells: numbers, neighbours, prefixes, the only one left. Names and shapes alone."""

import torch
from mismatch_kit import Case, add

D, F = 16, 24


def told(pairs, spare=None, unprovable=()):
    """A case of (source name, target name, shape); `spare` is in the file besides, `unprovable` must be left or told."""

    def build():
        gen = torch.Generator().manual_seed(11)
        made = {source: torch.randn(shape, generator=gen) for source, _, shape in pairs if source}
        made |= {name: torch.randn(shape, generator=gen) for name, shape in (spare or {}).items()}
        expected = {target: made[source] for source, target, _ in pairs if source and target not in unprovable}
        shapes = {target: shape for _, target, shape in pairs if target}
        return Case(made, shapes, expected, "identity", unprovable=dict.fromkeys(unprovable, "only shapes speak for it"))

    return build


def blocks(source, target, words, count=2, shift=0):
    return [
        (f"{source.format(i + shift)}.{one}.weight", f"{target.format(i)}.{other}.weight", shape)
        for i in range(count)
        for one, other, shape in words
    ]


ATTENTION = [("attn.qkv", "attn.qkv", (3 * D, D)), ("norm1", "norm1", (D,)), ("norm2", "norm2", (D,))]
MLP = [("mlp.fc1", "mlp.fc1", (F, D)), ("mlp.fc2", "mlp.fc2", (D, F))]

add(
    "only_ones_left_share_a_word", "rename", "",
    told(blocks("layers.{}", "layers.{}", [*ATTENTION, ("mlp.ff0", "mlp.fc1", (F, D)), ("mlp.ff1", "mlp.fc2", (D, F))])),
)  # fmt: skip
add(
    "one_more_left_of_another_shape", "rename", "",
    told(blocks("layers.{}", "layers.{}", [*MLP, ("attn.proj", "attn.projection", (D, D))]), {f"layers.{i}.extra.weight": (5, D) for i in range(2)}),
)  # fmt: skip
add(
    "private_word_for_a_submodule", "rename", "",
    told(blocks("stack.{}", "layers.{}", [("mixing.query", "attention.query", (D, D)), ("mixing.out.dense", "attention.out.dense", (D, D)), *MLP])),
)  # fmt: skip
add(
    "vectors_left_without_a_common_word", "negative", "",
    told(
        [*blocks("layers.{}", "layers.{}", [*ATTENTION, *MLP]), *((None, f"layers.{i}.scale_b.weight", (D,)) for i in range(2))],
        {**{f"layers.{i}.scale_a.weight": (D,) for i in range(2)}, **{f"layers.{i}.extra.weight": (5, D) for i in range(2)}},
    ),
)  # fmt: skip
add(
    "embedding_and_head_counted_among_blocks", "index", "",
    told(
        [
            ("sequential.0.word_embeddings.weight", "model.embed_tokens.weight", (50, D)),
            *blocks("sequential.{}", "model.layers.{}", [*ATTENTION, *MLP], shift=2),
            ("sequential.5.norm.weight", "model.norm.weight", (D,)),
        ]
    ),
)  # fmt: skip
add(
    "shifted_blocks_of_which_little_is_known", "index", "",
    told(
        [
            *blocks("layers.{}", "model.layers.{}", MLP, shift=1),
            *((None, f"model.layers.{i}.mixer.{word}.weight", (D, D)) for i in range(2) for word in "ab"),
        ],
        {**{f"layers.{i}.other.weight": (3 * D, D) for i in (1, 2)}, "layers.0.wte.weight": (50, D), "layers.3.linear.weight": (50, D)},
    ),
)  # fmt: skip
add(
    "names_beside_a_moved_container", "wrapper", "",
    told(
        [
            ("backbone.conv_encoder.model.stem.conv.weight", "backbone.model.stem.conv.weight", (8, 3, 7, 7)),
            *blocks("backbone.conv_encoder.model.stages.{}", "backbone.model.stages.{}", [("conv", "conv", (8, 8, 3, 3))]),
        ]
    ),
)  # fmt: skip
add(
    "numbered_wrapper_of_a_model", "wrapper", "",
    told(
        [
            ("0.auto_model.embeddings.tokens.weight", "embeddings.tokens.weight", (50, D)),
            *blocks("0.auto_model.encoder.layer.{}", "encoder.layer.{}", [("attn.q", "attn.q", (D, D)), *MLP]),
        ],
        {"2.linear.weight": (D, D)},
    ),
)  # fmt: skip
add(
    "number_before_and_behind_the_word", "index", "",
    told(
        [
            *((f"encoder.patch_embeddings.{i}.proj.weight", f"stages.{i}.patch_embeddings.proj.weight", (8 * i + 8, 3, 3, 3)) for i in range(2)),
            *((f"encoder.patch_embeddings.{i}.layer_norm.weight", f"stages.{i}.patch_embeddings.layer_norm.weight", (8 * i + 8,)) for i in range(2)),
            *((f"encoder.layer_norm.{i}.weight", f"stages.{i}.layer_norm.weight", (8 * i + 8,)) for i in range(2)),
        ]
    ),
)  # fmt: skip
add(
    "doubled_word_under_weight_norm", "param", "",
    told(
        [
            (f"encoder.model.{i}.conv.conv.{one}", f"encoder.layers.{i}.conv.{other}", (4 + i, *rest))
            for i in (0, 3, 6)
            for one, other, rest in (
                ("weight_g", "parametrizations.weight.original0", (1, 1)),
                ("weight_v", "parametrizations.weight.original1", (2, 7)),
                ("bias", "bias", ()),
            )
        ]
    ),
)  # fmt: skip
add(
    "norm_of_the_body_and_norm_in_a_head", "negative", "",
    told(
        [
            ("v.norm.weight", "body.layernorm.weight", (D,)),
            ("v.cls_token", "body.embeddings.cls_token", (1, 1, D)),
            ("mlp_head.0.weight", "classifier.layernorm.weight", (D,)),
            ("mlp_head.1.weight", "classifier.dense.weight", (2, D)),
        ]
    ),
)  # fmt: skip
add(
    "inner_parts_count_otherwise_too", "index", "",
    told(
        [
            (f"net.layer.{i + 1}.layer.{j + 1}.{word}.weight", f"layer.{i}.layer.{j}.{word}.weight", (D, D))
            for i in range(2)
            for j in range(2)
            for word in ("reduce", "expand")
        ]
    ),
)  # fmt: skip


def variants(one, other):
    """Two kinds of one thing, of one shape: the file has one and the model the other."""
    missing = [(None, f"layers.{i}.{other}.proj.weight", (D, D)) for i in range(2)]
    return told([*blocks("layers.{}", "layers.{}", MLP), *missing], {f"layers.{i}.{one}.proj.weight": (D, D) for i in range(2)})


for one, other in (("local_attn", "global_attn"), ("img_attn", "txt_attn"), ("self_att", "src_att"), ("fwd", "bwd")):
    add(f"variants_of_one_module_{one}", "negative", "", variants(one, other))


def norm(source, target, width):
    ends = {"weight": (width,), "bias": (width,), "running_mean": (width,), "running_var": (width,)}
    return [(f"{source}.{end}", f"{target}.{end}", shape) for end, shape in ends.items()]


RESNET = [("conv1", "conv1", (8, 8, 3, 3)), ("conv2", "conv2", (8, 8, 3, 3))]
add(
    "numbered_words_beside_a_moved_container", "wrapper", "",
    told(
        [
            ("model.backbone.conv1.weight", "encoder.conv1.weight", (8, 3, 7, 7)),
            *norm("model.backbone.bn1", "encoder.bn1", 8),
            *blocks("model.backbone.layer1.{}", "encoder.layer1.{}", RESNET),
        ]
    ),
)  # fmt: skip
add(
    "container_of_another_word_moves_what_is_beside_it", "wrapper", "",
    told([("image_encoder.neck.0.weight", "vision_encoder.neck.conv1.weight", (4, D, 1, 1)), *blocks("image_encoder.blocks.{}", "vision_encoder.layers.{}", MLP)]),
)  # fmt: skip
add(
    "the_one_convolution_over_the_image", "rename", "",
    told(
        [
            ("features.0.0.weight", "patch_embed.proj.weight", (8, 3, 4, 4)),
            *((f"features.0.2.{end}", f"patch_embed.norm.{end}", (8,)) for end in ("weight", "bias")),
            *blocks("layers.{}", "layers.{}", [*ATTENTION, *MLP]),
        ]
    ),
)  # fmt: skip
add(
    "list_whose_ends_have_words", "index", "",
    told(
        [
            ("mask.mlps.0.layers.0.weight", "mask.mlps.0.proj_in.weight", (D, D)),
            *((f"mask.mlps.0.layers.{i + 1}.weight", f"mask.mlps.0.layers.{i}.weight", (D, D)) for i in range(2)),
            ("mask.mlps.0.layers.3.weight", "mask.mlps.0.proj_out.weight", (4, D)),
        ]
    ),
)  # fmt: skip
add(
    "list_of_which_the_file_has_one_more", "negative", "",
    told(
        [
            *((f"head.layers.{i}.weight", f"head.layers.{i}.weight", (D, D)) for i in range(2)),
            (None, "head.first.weight", (D, D)),
            ("norm.weight", "norm.weight", (D,)),
        ],
        {"head.layers.2.weight": (D, D)},
        ("head.layers.0.weight", "head.layers.1.weight", "head.first.weight"),
    ),
)  # fmt: skip
add(
    "decoder_counted_from_its_output", "index", "",
    told([(f"decoder.up.{i}.block.{j}.norm1.weight", f"decoder.up_blocks.{2 - i}.resnets.{j}.norm1.weight", (D,)) for i in range(3) for j in range(2)]),
)  # fmt: skip
