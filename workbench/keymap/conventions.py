"""How the field spells the same thing: one table of roles, read on both sides of a match (rules.py). The inference works without it on
names it has never seen; a row only tells that two spellings mean one role. A word that means another thing beside other words stands in
DIALECTS, with those words; how a fused matrix lays its rows in LAYOUTS, and where nothing tells that, its order is unknown.

Names are compared in a normal form: wrapper segments taken out, lower case, words split at dots, slashes, underscores and capitals,
a number that ends a word set off by a colon (``conv1`` -> ``conv:1``, ``ln_1`` -> ``ln:1``), a number by itself kept as ``.3.``.
Each row is (role, spellings in the normal form as alternatives of a regular expression, who writes so).

The order of the rows matters: they are applied from the top, each on what the rows above it made. So a row that gives a word its one
form stands above the rows that rely on it (``.layernorm`` is ``.norm`` in the first of WORDS, and ``.norm.gamma`` is ``.norm.weight``
far below it), and a longer spelling above a shorter one that is a part of it (``.block.sparse.moe.input.linear.weight`` above
``.block.sparse.moe``; in BLOCK ``.encoder.attn.norm`` above ``.encoder.attn``, or it would become ``.xattn.norm``). A new row goes
below all whose outcome it reads and above all whose spellings are a part of its own; where nothing else decides, rows of one library
stand together. A row may ask only for whole words and for numbers of one or two digits: see `rules._by_pattern`.
"""

from __future__ import annotations

import re

WORDS: tuple[tuple[str, str, str], ...] = (
    (".norm", r"\.(?:layer\.norm|layernorm|layrnorm|ln|norm|batch\.norm|batchnorm|bn|group\.norm|groupnorm|gn|normalization|(?:layer|batch|group)\.normalization|rms\.norm|rmsnorm)", "torch.nn, Keras, CLIP"),
    (r".ffn.fc:1", r"\.ffn\.layers\.0\.0", "OpenMMLab"),
    (r".ffn.fc:2", r"\.ffn\.layers\.1", "OpenMMLab"),
    *((f".ff.fc:{n + 1}", rf"\.ff\.layers\.{2 * n}", "LLMs from scratch") for n in range(2)),
    (".norm", r"\.n(?=:[123]\.)", "plain words"),
    (r"\1.weight", r"(\.(?:self|enc\.dec)\.attention\.[qkvo]|\.relative\.attention\.bias)(?=\.$)", "Mesh TensorFlow T5"),
    (r".stem.\1", r"\.downsample\.layers\.0\.([01])", "Facebook ConvNeXt"),
    (r".stages.\1.downsample.\2", r"\.downsample\.layers\.(\d)\.([01])", "Facebook ConvNeXt"),
    (".stem.0", r"\.convnext(?:v:2)?\.embeddings\.patch\.embeddings", "transformers ConvNeXt"),
    (".stem.1", r"\.convnext(?:v:2)?\.embeddings\.norm", "transformers ConvNeXt"),
    (r".albert.layer.groups.\1.albert.layers.\2", r"\.group:(\d)\.inner\.group:(\d)", "Google ALBERT"),
    (r".attention.\1", r"\.attention:1\.(self|output)", "Google ALBERT"),
    (r".\1.dense", r"\.ffn:1\.intermediate\.(output)\.dense|\.ffn:1\.(intermediate)\.dense", "Google ALBERT"),
    (".encoder.block", r"\.encoderblock", "Google ViT"),
    (".self.attention", r"\.multi\.head\.dot\.product\.attention(?::\d)?", "flax"),
    (".mlp.fc:1", r"\.mlp\.block:\d\.dense:0", "Google ViT"),
    (".mlp.fc:2", r"\.mlp\.block:\d\.dense:1", "Google ViT"),
    (r"\1.conv", r"(\.conv\.layers\.\d)\.0", "fairseq wav2vec 2.0"),
    (r"\1.norm", r"(\.conv\.layers\.\d)\.2(?:\.1)?", "fairseq wav2vec 2.0"),
    (".pos.conv.embed.conv", r"\.pos\.conv\.0", "fairseq wav2vec 2.0"),
    (".feature.projection.projection", r"\.post\.extract\.proj", "fairseq wav2vec 2.0"),
    (r".time.mix.\1", r"\.time\.mix\.(k)ey|\.time\.mix\.(v)alue|\.time\.mix\.(r)eceptance", "transformers RWKV"),
    (".conv:1", r"\.in\.layers\.2", "guided diffusion, LDM"),
    (".norm:1", r"\.in\.layers\.0", "guided diffusion, LDM"),
    (".conv:2", r"\.out\.layers\.3", "guided diffusion, LDM"),
    (".norm:2", r"\.out\.layers\.0", "guided diffusion, LDM"),
    (".time.emb.proj", r"\.emb\.layers\.1", "guided diffusion, LDM"),
    (".conv.shortcut", r"\.skip\.connection|\.nin\.shortcut", "guided diffusion, LDM"),
    (r".expand.\1", r"\.expansion\.expand\.(conv|norm)", "transformers EfficientNet"),
    (r".depthwise.\1", r"\.depthwise\.conv\.depthwise\.(conv|norm)", "transformers EfficientNet"),
    (r".project.\1", r"\.projection\.project\.(conv|norm)", "transformers EfficientNet"),
    (r".stem.\1", r"\.efficientnet\.embeddings\.(convolution|norm)|\.(conv)\.stem", "transformers EfficientNet, timm"),
    (r".top.\1", r"\.encoder\.top\.(conv|norm)|\.(conv)\.head", "transformers EfficientNet, timm"),
    (".sr", r"\.sequence\.reduction\.sequence\.reduction", "transformers SegFormer"),
    (".sr.norm", r"\.sequence\.reduction\.norm", "transformers SegFormer"),
    (".se", r"\.squeeze\.excite", "transformers EfficientNet"),
    (r".se.\1", r"\.se\.conv\.(reduce|expand)", "timm EfficientNet"),
    *((rf".{long}.attn.\1.{word}", rf"\.{short}\.(q){word}|\.{short}\.(k){word}", "Conditional DETR") for short, long in (("sa", "self"), ("ca", "cross")) for word in ("content", "pos")),
    *((rf".{long}.attn.\1", rf"\.{short}\.(v\.proj|out\.proj)", "Conditional DETR") for short, long in (("sa", "self"), ("ca", "cross"))),
    *((rf".classifier.{word}", rf"\.mlp\.head\.{n}", "AST, vit-pytorch") for n, word in enumerate(("norm", "dense"))),
    *((rf".multi.modal.projector.linear:{n + 1}", rf"\.mm\.projector\.{2 * n}", "LLaVA") for n in range(2)),
    (".stem.0", r"\.regnet\.embedder\.embedder\.convolution", "transformers RegNet"),
    (".stem.1", r"\.regnet\.embedder\.embedder\.norm", "transformers RegNet"),
    *((rf".mask.embed.{word}", rf"\.mask\.downscaling\.{n}", "Segment Anything") for n, word in ((0, "conv:1"), (1, "norm:1"), (3, "conv:2"), (4, "norm:2"), (6, "conv:3"))),
    *((rf".upscale.{word}", rf"\.output\.upscaling\.{n}", "Segment Anything") for n, word in ((0, "conv:1"), (1, "norm"), (3, "conv:2"))),
    (".shared.embedding.positional.embedding", r"\.pe\.layer\.positional\.encoding\.gaussian\.matrix", "Segment Anything"),
    *((rf".neck.{word}", rf"\.neck\.{n}", "Segment Anything") for n, word in enumerate(("conv:1", "norm:1", "conv:2", "norm:2"))),
    (".norm.out", r"\.conv\.norm\.out", "diffusers"),
    (r".\1.blocks.\2.resnets.\3", r"\.(down|up)\.(\d)\.block\.(\d)", "LDM, taming transformers"),
    (r".\1.blocks.\2.\1samplers.0", r"\.(down|up)\.(\d)\.(?:down|up)sample", "LDM, taming transformers"),
    (r"\1.to.out.0", r"(\.mid\.attn:1|\.(?:down|up)\.\d\.attn\.\d)\.proj\.out", "LDM, taming transformers"),
    (r".\1.blocks.\2.attentions.\3", r"\.(down|up)\.(\d)\.attn\.(\d)", "LDM, taming transformers"),
    (".mid.block.attentions.0", r"\.mid\.attn:1", "LDM, taming transformers"),
    (r"\1.bias", r"(\.cls\.(?:predictions|seq\.relationship))\.output\.bias", "original BERT"),
    (r"\1.weight", r"(\.cls\.seq\.relationship)\.output\.weights", "original BERT"),
    (".rpn.head.conv", r"\.rpn\.head\.conv\.0\.0", "torchvision"),
    (r".stem.\1", r"\.stem:([01])(?=\.(?:weight|bias)\.)", "timm's features_only"),
    (".fc.norm", r"\.pooler\.(?:norm|layernorm)(?=\.(?:weight|bias)\.)", "transformers BEiT"),
    (r".ffn.experts.\1", r"\.ffn\.(gate|up|down)\.exps\.weight", "llama.cpp"),
    (r"\1.layer.\2", r"(\.block[:.]\d+)\.layer:(\d)", "Mesh TensorFlow T5"),
    (".mlp.experts.gateup", r"\.block\.sparse\.moe\.input\.linear\.weight", "GraniteMoE"),
    (".mlp.experts.down", r"\.block\.sparse\.moe\.output\.linear\.weight", "GraniteMoE"),
    (".mlp.router", r"\.block\.sparse\.moe\.(?:gate|router\.layer|router)", "Mixtral, GraniteMoE"),
    (".downsample", r"\.downsampling\.layer", "transformers ConvNeXt"),
    (r".\1.weight", r"\.(c\.attn|c\.proj|c\.fc)\.w", "OpenAI GPT-2"),
    (r".\1.bias", r"\.(c\.attn|c\.proj|c\.fc)\.b", "OpenAI GPT-2"),
    (r".\1.\2.@0", r"\.(weight|bias)\.(ih|hh)(?=\.$)", "torch.nn.LSTMCell, GRUCell, RNNCell"),
    (".classifier", r"\.classifier\.1(?=\.(?:weight|bias)\.$)", "transformers ResNet"),
    (".relative.position", r"\.relative\.position\.bias\.relative\.position", "transformers Swin"),
    (".conv", r"\.(?:convolution|conv\.2d)", "transformers ResNet"),
    *((rf".neck.fusion.stage.layers.{4 - n}", rf"\.(?:depth\.head\.)?scratch\.refinenet:{n}", "MiDaS, DPT, Depth Anything: the last is first") for n in (1, 2, 3, 4)),
    (r"\1.residual.layer:\2", r"(\.fusion\.stage\.layers\.\d)\.res\.conf\.unit:([12])", "MiDaS, DPT, Depth Anything"),
    (r"\1.projection", r"(\.fusion\.stage\.layers\.\d)\.out\.conv", "MiDaS, DPT, Depth Anything"),
    (r".conv.proj.\1", r"\.conv\.projection\.(q)uery\.conv\.projection|\.conv\.projection\.(k)ey\.conv\.projection|\.conv\.projection\.(v)alue\.conv\.projection", "transformers CvT"),
    *((rf"\1.\2:{min(n + 1, 3)}", rf"(\.layers\.\d+)\.layer\.{n}\.(conv|norm)", "transformers ResNet, RegNet") for n in range(4)),
    *((rf"\1.se.fc:{n // 2 + 1}", rf"(\.layers\.\d+)\.layer\.2\.attention\.{n}", "transformers RegNet") for n in (0, 2)),
    (r".stages.\1.layers.\2", r"\.s:([1-4])\.b:(\d+)", "timm RegNet"),
    (r".conv:\1", r"\.conv:([1-3])\.conv", "timm RegNet"),
    (r"\1.\2:\3", r"(\.denselayer:\d+)\.(norm|conv)\.([12])", "first torchvision DenseNet"),
    (r".norm:\1", r"\.conv:(\d)\.norm", "detectron2"),
    (r"\1.weight", r"(\.norm(?:[.:]\w+)?)\.(?:gamma|scale)", "original BERT, OpenAI, flax, torchtune"),
    (r"\1.bias", r"(\.norm(?:[.:]\w+)?)\.(?:beta|offset|shift)", "original BERT, OpenAI, flax, LLMs from scratch"),
    (r"\1.weight", r"(\.norm(?:[.:]\w+)?)\.a:2", "Annotated Transformer"),
    (r"\1.bias", r"(\.norm(?:[.:]\w+)?)\.b:2", "Annotated Transformer"),
    (r".weight", r"\.kernel", "flax, Keras, Mesh TensorFlow"),
    (r"\1.weight", r"(\.(?:(?:word|position|token\.type)\.embeddings|wte|wpe|shared|embed\.tokens|embed\.positions|(?:token|position)\.embedding|relative\.attention\.bias))\.embedding(?=\.$)", "flax of transformers"),
    (r".running.mean", r"\.moving\.mean", "Keras, TensorFlow"),
    (r".running.var", r"\.moving\.var(?:iance)?", "Keras, TensorFlow"),
    (r".weight.ih\2.@\1", r"\.weight\.ih\.l:(\d+)(\.reverse)?", "torch.nn.LSTM, GRU, RNN"),
    (r".weight.hh\2.@\1", r"\.weight\.hh\.l:(\d+)(\.reverse)?", "torch.nn.LSTM, GRU, RNN"),
    (r".bias.ih\2.@\1", r"\.bias\.ih\.l:(\d+)(\.reverse)?", "torch.nn.LSTM, GRU, RNN"),
    (r".bias.hh\2.@\1", r"\.bias\.hh\.l:(\d+)(\.reverse)?", "torch.nn.LSTM, GRU, RNN"),
)  # fmt: skip

# words that mean another thing beside certain others in one block: (all of these there, none of these, what becomes what, who writes so)
DIALECTS: tuple[tuple[tuple[str, ...], tuple[str, ...], dict[str, str], str], ...] = (
    ((".mlp.c.proj.", ".mlp.w:1.", ".mlp.w:2."), (".mlp.w:3.",), {".mlp.w:1.": ".mlp.up.", ".mlp.w:2.": ".mlp.gate."}, "Qwen 1"),
    ((".mlp.fc:1.", ".mlp.fc:2.", ".mlp.proj."), (), {".mlp.fc:1.": ".mlp.gate.", ".mlp.fc:2.": ".mlp.up."}, "litgpt"),
    ((".expert.#", ".fc:1.", ".fc:2.", ".proj."), (), {".fc:1.": ".gate.", ".fc:2.": ".up.", ".proj.": ".down."}, "litgpt"),
    *(((f".attn:{n}.to.q.",), (), {f".attn:{n}.": f".{word}.attn."}, "diffusers") for n, word in ((1, "self"), (2, "cross"))),
    *(((f".mlp.c.fc:{n}.", f".mlp.c.fc:{n + 1}.", ".mlp.c.proj."), (), {f".mlp.c.fc:{n}.": ".mlp.gate.", f".mlp.c.fc:{n + 1}.": ".mlp.up."}, who) for n, who in ((0, "EXAONE"), (1, "lit-llama"))),
    ((".self.attention.query.key.value.bias.", ".mlp.dense.h.to.4h."), (".self.attention.dense.bias.", ".mlp.dense.h.to.4h.bias."), {".mlp.dense.h.to.4h.": ".mlp.gate.up."}, "ChatGLM 2"),
    ((".fc:1.", ".fc:2.", ".fc:3.", ".w.query."), (), {f".fc:{n}.": f".mlp.{word}." for n, word in ((1, "gate"), (2, "up"), (3, "down"))}, "LLMs from scratch"),
    ((".sr.", ".attn.norm."), (), {".attn.norm.": ".attn.sr.norm."}, "NVIDIA SegFormer, PVT"),
    ((".sr.", ".attention.self.norm."), (), {".attention.self.norm.": ".attention.self.sr.norm."}, "transformers SegFormer"),
    ((".stem.conv.", ".top.conv.", ".norm:0.", ".norm:1."), (), {".norm:0.": ".stem.norm.", ".norm:1.": ".top.norm."}, "EfficientNet-PyTorch"),
    ((".stem.conv.", ".top.conv.", ".norm:1.", ".norm:2."), (".norm:0.",), {".norm:1.": ".stem.norm.", ".norm:2.": ".top.norm."}, "timm EfficientNet"),
    ((".mlp.fc:11.", ".mlp.fc:12.", ".mlp.fc:2."), (), {".mlp.fc:11.": ".mlp.up.", ".mlp.fc:12.": ".mlp.gate."}, "nomic-bert"),
    ((".gamma.", ".running.mean."), (".layer.scale",), {".gamma.": ".weight.", ".beta.": ".bias."}, "Keras"),
    *(((f".{word}.gate.", ".experts."), (), {f".{word}.gate.": ".mlp.router."}, "Mixtral, DeepSeek") for word in ("mlp", "feed.forward", "block.sparse.moe", "moe", "ffn")),
    ((".mlp.w:3.", ".mlp.w:2.", ".mlp.ffn.norm."), (), {".mlp.w:1.": ".mlp.gate.", ".mlp.w:2.": ".mlp.up.", ".mlp.w:3.": ".mlp.down."}, "EVA-02"),
    ((".w:12.", ".w:3."), (), {".w:3.": ".down."}, "xformers, DINOv2"),
    ((".w:1.weight.", ".w:2.weight."), (".w:3.", ".c.proj.", ".gate", ".v:1.", ".mlp.v.", ".ffn.v.", ".ff.v.", ".feed.forward.v.", ".w.g."), {".w:1.": ".up.", ".w:2.": ".down."}, "Annotated Transformer, ESPnet"),
    ((".net.0.", ".net.1.", ".net.4."), (), {".net.0.": ".norm.after.", ".net.1.": ".up.", ".net.4.": ".down."}, "vit-pytorch"),
    ((".net.0.", ".net.3."), (".net.1.", ".net.0.proj."), {".net.0.": ".up.", ".net.3.": ".down."}, "vit-pytorch"),
    ((".linears.0.", ".linears.1.", ".linears.2.", ".linears.3."), (), {f".linears.{n}.": f".{word}." for n, word in enumerate("qkvo")}, "Annotated Transformer"),
    ((".sublayer.0.", ".sublayer.1."), (".sublayer.2.",), {".sublayer.0.norm.": ".norm.attn.", ".sublayer.1.norm.": ".norm.mlp."}, "Annotated Transformer"),
    ((".sublayer.0.", ".sublayer.1.", ".sublayer.2."), (), {".sublayer.0.norm.": ".norm.attn.", ".sublayer.1.norm.": ".norm.cross.", ".sublayer.2.norm.": ".norm.mlp."}, "Annotated Transformer"),
    ((".layer.0.self.attention.", ".layer.1.enc.dec.attention."), (), {".layer.0.norm.": ".norm.attn.", ".layer.1.norm.": ".norm.cross.", ".layer.2.norm.": ".norm.mlp."}, "T5"),
    ((".layer.0.self.attention.", ".layer.1.dense.relu.dense."), (), {".layer.0.norm.": ".norm.attn.", ".layer.1.norm.": ".norm.mlp."}, "T5"),
    ((".inter.attention.", ".post.inter.attention.norm."), (), {".post.inter.attention.norm.": ".norm.mlp.", ".post.attention.norm.": ".norm.cross.", ".inter.attention.": ".cross.attention."}, "Megatron"),
    ((".encoder.attention.", ".self.attention."), (), {".encoder.attention.": ".cross.attention."}, "ParlAI"),
    ((".mixer.wqkv.", ".mixer.out.proj."), (".mixer.in.proj.",), {".mixer.": ".attn."}, "flash-attn, Phi, Jina"),
    ((".post.self.attn.norm.", ".post.mlp.norm.", ".post.attention.norm."), (), {".post.self.attn.norm.": ".norm.attn.post.", ".post.mlp.norm.": ".norm.mlp.post."}, "GLM-4"),
    ((".post.attention.norm.", ".post.ffw.norm."), (".ffn.norm.", ".attn.norm."), {".post.attention.norm.": ".norm.attn.", ".post.ffw.norm.": ".norm.mlp."}, "llama.cpp of OLMo 2"),
    ((".attn.output.norm.", ".layer.output.norm."), (), {".attn.output.norm.": ".norm.attn.", ".layer.output.norm.": ".norm.mlp."}, "llama.cpp of BERT"),
    ((".post.attention.norm.", ".ffn.norm."), (), {".post.attention.norm.": ".norm.attn.post.", ".post.ffw.norm.": ".norm.mlp.post."}, "llama.cpp"),
    ((".final.norm.", ".feed.forward.intermediate.dense."), (".adapter",), {".final.norm.": ".norm.after.", ".norm.weight.": ".norm.before.weight.", ".norm.bias.": ".norm.before.bias."}, "transformers wav2vec 2.0"),
    ((".norm:0.", ".norm:2.", ".self.attention."), (".norm:1.",), {".norm:0.": ".norm.attn.", ".norm:2.": ".norm.mlp."}, "Google ViT"),
    ((".norm.", ".norm:1.", ".intermediate.dense.", ".attention.output.dense."), (".attention.output.norm.",), {".norm:1.": ".norm.after.", ".norm.weight.": ".norm.before.weight.", ".norm.bias.": ".norm.before.bias."}, "Google ALBERT"),
    ((".depthwise.conv.", ".project.conv.", ".norm:0.", ".norm:1.", ".norm:2."), (".norm:3.",), {".norm:0.": ".expand.norm.", ".norm:1.": ".depthwise.norm.", ".norm:2.": ".project.norm."}, "EfficientNet-PyTorch"),
    ((".f.a.0.", ".f.c.0."), (), {".f.a.0.": ".conv:1.", ".f.a.1.": ".norm:1.", ".f.b.0.": ".conv:2.", ".f.b.1.": ".norm:2.", ".f.se.fc:1.": ".se.fc:1.", ".f.se.fc:2.": ".se.fc:2.", ".f.c.0.": ".conv:3.", ".f.c.1.": ".norm:3.", ".proj.0.": ".shortcut.conv.", ".proj.1.": ".shortcut.norm."}, "torchvision RegNet"),
    ((".conv:1.", ".downsample.conv.", ".downsample.norm."), (), {".downsample.conv.": ".shortcut.conv.", ".downsample.norm.": ".shortcut.norm."}, "timm RegNet"),
    ((".sa.norm.", ".sa.scale.", ".mlp.norm.", ".mlp.scale."), (), {".sa.scale.scale.": ".norm.attn.post.weight.", ".mlp.norm.": ".mlp.norm.or.scale."}, "torchtune Gemma 2, whose converter and forward disagree on which of the MLP's norms is the first"),
    ((".g.", ".b."), (), {".g.": ".weight.", ".b.": ".bias."}, "OpenAI GPT-2"),
    (
        (".post.attention.norm.", ".post.feedforward.norm.", ".pre.feedforward.norm."),
        (),
        {".post.attention.norm.": ".norm.attn.post.", ".pre.feedforward.norm.": ".norm.mlp.", ".post.feedforward.norm.": ".norm.mlp.post."},
        "Gemma 2",
    ),
    (
        (".post.attention.norm.", ".post.feedforward.norm."),
        (".pre.feedforward.norm.", ".input.norm."),
        {".post.attention.norm.": ".norm.attn.", ".post.feedforward.norm.": ".norm.mlp."},
        "OLMo 2",
    ),
    ((".post.attention.norm.", ".post.mlp.norm."), (), {".post.attention.norm.": ".norm.attn."}, "transformers NomicBERT"),
    ((".pos.embed.", ".norm:1."), (".conv:1.",), {".norm:1.": ".norm."}, "OpenMMLab"),
    ((".norm:1.", ".norm:2.", ".norm:3.", ".cross.attn.sampling.offsets."), (), {".norm:1.": ".norm.cross.", ".norm:2.": ".norm.attn.", ".norm:3.": ".norm.mlp."}, "Deformable DETR"),
    *(((".norm:1.", ".norm:2.", ".norm:3.", word), (), {".norm:1.": ".norm.attn.", ".norm:2.": ".norm.cross.", ".norm:3.": ".norm.mlp."}, who) for word, who in (("multihead.attn", "torch.nn.TransformerDecoderLayer"), (".encoder.attention.q.lin.", "ParlAI"), (".src.attn.linear.q.", "ESPnet"))),
    *(((".norm:1.", ".norm:2.", word), (".norm:3.", ".conv:1."), {".norm:1.": ".norm.attn.", ".norm:2.": ".norm.mlp."}, "torch.nn.TransformerEncoderLayer, timm, GPT-2, RWKV, flash-attn") for word in ("att", ".mha.", ".mixer.wqkv.", ".qkv.", ".w.q.")),
)  # fmt: skip

# inside a repeated block
BLOCK: tuple[tuple[str, str, str], ...] = (
    (r".\1", r"\.layer\.\d\.(self\.attention|enc\.dec\.attention|dense\.relu\.dense)", "transformers T5"),
    (".attn.qkv", r"(?:\.attn|\.attention|^)\.att\.proj", "AI2 OLMo, transformers Bark"),
    (".mlp.upgate", r"^\.ff\.proj|\.mlp\.up\.gate\.proj", "AI2 OLMo, GTE"),
    (r".attn.\1.norm", r"\.(?:self\.attn|self\.attention|attention|attn)\.(?:norm\.(q)|norm\.(k)|norm\.(q)uery\.norm|norm\.(k)ey\.norm|(q)uery\.norm|(k)ey\.norm)", "diffusers, FLUX"),
    (".norm.cross", r"\.(?:encoder\.attn|encoder\.attention|enc\.attn|src\.attn|cross\.attn|cross\.attention|crossattention\.output|pre\.cross\.attention|ca)\.norm|\.norm\.(?:cross\.attn|cross\.attention|cross)", "transformers BART, Whisper, OpenAI Whisper, T5X"),
    (".norm.attn", r"(?<!\.post)\.(?:attention\.output|self\.attn|self\.attention|slf\.attn|dec\.attn|attention|attn|att|sa|input|pre\.attention|pre\.attn|pre\.self\.attention|pre\.self\.attn|self\.attention\.linear\.qkv)\.norm|\.norm\.(?:before|mha|self\.attn)", "BERT, BART, Meta Llama, DistilBERT, ViT, T5X, ESPnet, Megatron Core"),
    (".norm.mlp", r"\.(?:ffn|pos\.ffn|pos\.ff|ff|mlp|feed\.forward|feedforward|post\.attention|output|final|full\.layer|pre\.mlp|pre\.ffn|pre\.feedforward|pre\.feed\.forward|post\.mlp|mlp\.linear\.fc:1)\.norm|\.norm\.(?:after|ffn|ff)", "BERT, BART, Llama, ViT, T5X, ESPnet, Megatron Core"),
    (".xattn", r"\.(?:encoder\.attn|enc\.attn|src\.attn|cross\.attn|cross\.attention|crossattention\.self|crossattention|multihead\.attn|encoder\.decoder\.attention|enc\.dec\.attention)", "BART, Whisper, torch.nn.TransformerDecoderLayer, ESPnet"),
    (".attn", r"\.(?:attention\.(?:self|attention)|self\.attn|slf\.attn|dec\.attn|self\.attention|attention|attn|att|mha|multi\.head\.attention|multihead\.attention|mixer\.self\.attn)", "BERT, ViT, Llama, GPT, RWKV"),
    (r".attn.q", r"^\.(?:q|query|to\.q|w\.?q)(?=\.(?:weight|bias)\.$)", "attention without a word for it"),
    (r".attn.k", r"^\.(?:k|key|to\.k|w\.?k)(?=\.(?:weight|bias)\.$)", "attention without a word for it"),
    (r".attn.v", r"^\.(?:v|value|to\.v|w\.?v)(?=\.(?:weight|bias)\.$)", "attention without a word for it"),
    (r".attn.o", r"^\.(?:proj\.attn|to\.out\.0|to\.out|w\.o)(?=\.(?:weight|bias)\.$)", "diffusers"),
    (r".attn.\1", r"^\.(q|k|v|o|out)\.proj|(?<!attn)\.(q|k|v)\.proj", "attention without a word for it"),
    (r"\1.qkv", r"(\.x?attn)\.(?:query\.key\.value|qkv\.proj|qkv\.net|to\.qkv|linear\.qkv|c\.qkv|w?qkv|c\.attn|in\.proj|w\.pack)", "torch.nn.MultiheadAttention, timm, GPT-2, NeoX, BLOOM, Phi-3, Baichuan, Transformer-XL, Megatron Core"),
    (".attn.qkv", r"^\.(?:in\.proj|qkv\.proj|qkv|wqkv)|(?<!attn)(?<!mlp)\.(?:in\.proj(?=\.(?:weight|bias)\.$)|qkv\.proj|qkv)", "attention without a word for it"),
    (r"\1.kv", r"(\.x?attn)\.(?:kv\.proj|to\.kv|kv)", "PVT, Segformer"),
    (".attn.kv", r"(?<!attn)\.kv(?:\.proj)?", "attention without a word for it"),
    (r"\1.q", r"(\.x?attn)\.(?:q\.proj|query\.proj|query\.projection|projection\.query|q\.lin|q\.linear|to\.q|wq|w\.q|w\.qs|fc\.q|proj\.q|linear\.q|linear\.querys?|querys?|q\.net|w\.query|q)", "BERT, Llama, DistilBERT, diffusers, OpenNMT, Transformer-XL"),
    (r"\1.k", r"(\.x?attn)\.(?:k\.proj|key\.proj|key\.projection|projection\.key|k\.lin|k\.linear|to\.k|wk|w\.k|w\.ks|fc\.k|proj\.k|linear\.k|linear\.keys?|keys?|k\.net|w\.key|k)", "BERT, Llama, DistilBERT, diffusers, OpenNMT, Transformer-XL"),
    (r"\1.v", r"(\.x?attn)\.(?:v\.proj|value\.proj|value\.projection|projection\.value|v\.lin|v\.linear|to\.v|wv|w\.v|w\.vs|fc\.v|proj\.v|linear\.v|linear\.values?|values?|v\.net|w\.value|v)", "BERT, Llama, DistilBERT, diffusers, OpenNMT, Transformer-XL"),
    (r"\1.o", r"(\.x?attn)\.(?:out\.proj|o\.proj|out\.lin|to\.out(?:\.0)?|output\.dense|output\.proj|output\.linear|output|proj\.attn|c\.proj|linear\.out|linear\.proj|final\.linear|out\.linear|proj\.out|out\.projection|projection|o\.net|w\.o|fc\.o|proj\.o|dense|proj|fc|wo|out|o)", "BERT, Llama, GPT-2, diffusers, OpenNMT, ESPnet, BLIP, Megatron Core"),
    *((f".mlp.{word}", rf"^\.ff:{n}(?=\.(?:weight|bias)\.$)", "plain words") for n, word in ((1, "up"), (2, "down"))),
    (".mlp.up", r"\.intermediate\.dense", "BERT"),
    (".mlp.down", r"\.output\.dense", "BERT"),
    (".mlp.down", r"^\.ffn\.output(?=\.(?:weight|bias)\.$)", "ALBERT"),
    (".mlp.up", r"^\.ffn(?=\.(?:weight|bias)\.$)", "ALBERT"),
    (".mlp", r"\.(?:feed\.forward|feedforward|pos\.ffn|pos\.ff\.core\.net|ffn|ff|dense\.relu\.dense|mlp|block\.sparse\.moe)", "Llama, DistilBERT, T5"),
    (r".mlp.\1", r"\.mlp\.fc\.(gate|up|down)", "plain words"),
    (".mlp.gate", r"\.mlp\.fc:1\.g", "timm"),
    (".mlp.up", r"\.mlp\.fc:1\.x", "timm"),
    (".mlp.up", r"(?:\.mlp)?\.(?:c\.fc|linear\.fc:1|fc\.in|dense\.h\.to\.4h|lin:1|linear:1|fc:1|pwconv:1|net\.0\.proj)|\.mlp\.(?:0|fc(?=\.(?:weight|bias)\.$)|in\.proj|proj\.in|dense\.in|linear\.in)", "GPT-2, timm, torch.nn, torchvision, Bark, Megatron Core"),
    (".mlp.down", r"(?:\.mlp)?\.(?:fc\.out|linear\.fc:2|dense\.4h\.to\.h|lin:2|linear:2|fc:2|pwconv:2|net\.2)|\.mlp\.(?:2|3|c\.proj|out\.proj|proj\.out|dense\.out|linear\.out|proj|out)", "GPT-2, timm, torch.nn, torchvision, Bark, Megatron Core"),
    (".mlp.gateup", r"(?:\.mlp|^)\.(?:gate\.up\.proj|gate\.up|weights\.in|w:12)", "Phi-3, transformers experts"),
    (r"\1.gate", r"(\.mlp|\.experts\.\d+|^)\.(?:gate\.proj|w:1|wi:0)", "Llama, Mixtral, T5 v1.1"),
    (r"\1.up", r"(\.mlp|\.experts\.\d+|^)\.(?:up\.proj|w:3|wi:1|wi)", "Llama, Mixtral, T5"),
    (r"\1.down", r"(\.mlp|\.experts\.\d+|^)\.(?:down\.proj|weights\.out|w:2|wo)", "Llama, Mixtral, T5"),
    (r".mlp.\1", r"\.(?:w\.)?(up|down|gate)(?:\.proj)?(?=\.(?:weight|bias)\.$)", "plain words"),
    (r".experts.gateup", r"\.experts\.gate\.up\.proj", "transformers experts"),
    (r".experts.\1", r"\.experts\.(gate|up|down)\.proj", "transformers experts"),
    (r".ls:\1", r"\.(?:ls:([12])\.gamma|layer\.scale:([12])(?:\.lambda:1|\.gamma)?|gamma:([12])|lambda:([12]))", "DINOv2, BEiT"),
    (".ls", r"\.(?:layer\.scale(?:\.parameter|\.gamma)?|gamma)", "ConvNeXt"),
    (".shortcut.conv", r"\.(?:downsample|skip)\.0|\.(?:shortcut|skip)\.conv|\.shortcut\.0|\.conv\.shortcut|\.(?:shortcut|skip)(?=\.weight\.$)", "torchvision and transformers ResNet, plain words"),
    (r".shortcut.norm", r"\.(?:downsample|shortcut|skip)\.1|\.(?:shortcut|skip)\.norm", "torchvision, transformers and detectron2 ResNet, plain words"),
    (".conv.dw", r"\.(?:dwconv|conv\.dw|depthwise\.conv)", "ConvNeXt"),
)  # fmt: skip

# outside of blocks
SINGLE: tuple[tuple[str, str, str], ...] = (
    (".emb.pos", r"\.(?:embeddings\.position\.embeddings?|position\.embeddings?|positional\.embedding|posembed\.input\.pos\.embedding|pos\.embeddings?|pos\.embed|pos\.emb(?:\.emb)?|(?:positional\.encoding|pos)\.(?:pos\.embedding|pe)|position\.embeds\.layer|embed\.positions|wpe|position\.embd)(?:\.weight)?", "BERT, GPT-2, ViT, CLIP"),
    (".emb.type", r"\.(?:embeddings\.)?(?:token\.type|segment)\.embeddings(?:\.weight)?|\.(?:token\.type|segment|seg)\.emb(?:\.weight)?|\.token\.types\.weight", "BERT"),
    (".emb.mid", r"\.(?:mid\.pos\.embed|(?:encoder\.)?mid\.position\.embeddings)", "YOLOS"),
    (".det", r"\.(?:embeddings\.)?(?:det\.token|detection\.tokens)", "YOLOS"),
    (".emb.norm", r"\.(?:token\.embd|embeddings|emb|embedding|word\.embeddings|embed)\.norm|\.norm\.embeddings?", "BERT, fairseq, BART"),
    (r".\1.emb.tok", r"\.(src|tgt)\.(?:tok\.emb\.embedding|embed)(?=\.weight\.$)(?:\.weight)?", "PyTorch's translation tutorial"),
    (".emb.tok", r"\.(?:embeddings\.word\.embeddings|embedding\.word\.embeddings|word\.embeddings|token\.embeddings?|token\.embd|tok\.embeddings|embed\.tokens|embed\.in|embeddings\.token\.embedding|(?:embedder|embed)(?=\.weight\.$)|wte|shared(?:\.embedding)?|token\.embedder\.embedding|token\.emb(?:\.emb)?|tok\.embedding|tok\.emb|word\.emb|word\.embeds|input\.embeds\.layer)(?:\.weight)?", "BERT, GPT-2, Llama, T5"),
    (r"\1.emb.tok", r"^(\.(?:backbone|rwkv|model|transformer|encoder|decoder))?\.(?:embeddings?|emb)(?=\.weight\.$)(?:\.weight)?", "Mamba, RWKV"),
    (".dist", r"\.(?:embeddings\.)?(?:dist\.token|distillation\.token)", "DeiT"),
    (".head.dist", r"\.(?:head\.dist|distillation\.classifier)", "DeiT"),
    (".cls", r"\.(?:embeddings\.)?(?:cls\.token|class\.token|class\.embedding)", "ViT, CLIP"),
    (".text.projection", r"\.text\.projection(?:\.weight)?", "CLIP"),
    (".visual.projection", r"\.visual\.proj(?:ection)?(?:\.weight)?|^\.proj(?=\.$)", "CLIP"),
    (".mask.token", r"\.(?:embeddings\.)?(?:mask\.token|mask\.emb|masked\.spec\.embed)", "DINOv2, wav2vec 2.0"),
    (".patch", r"\.(?:patch\.embed\.proj(?:ection)?|patch\.embeddings?\.proj(?:ection)?|embeddings\.patch\.embeddings?(?:\.projection)?|patch\.embedding|conv\.proj|visual\.conv:1)", "ViT, CLIP"),
    (r".\1:1", r"\.embedder\.embedder\.(conv|norm)|\.stem\.(conv|norm):1", "transformers and detectron2 ResNet"),
    (".norm.pre", r"\.(?:norm\.pre|pre\.norm)", "CLIP"),
    (".norm.last", r"\.(?:norm\.post|post\.norm|norm\.final|norm\.f|norm\.out|out\.norm|after\.norm|final\.norm|output\.norm|norm)(?=\.(?:weight|bias)\.$)", "GPT-2, Llama, CLIP, OpenMMLab"),
    (".lmhead", r"(?:\.(?:lm\.head|output|embed\.out|decoder\.logits|logits|decoder\.logits\.dense|output\.layer|out\.head|decoder\.output\.projection|generator|w2v\.encoder\.proj|transformer\.ff\.out)|^\.fc\.out|(?<=\d)\.final\.linear)(?=\.(?:weight|bias)\.$)", "transformers, Meta Llama, GPT-NeoX, Mesh T5, T5X, ChatGLM, fairseq"),
    (".head", r"^(?:\.model|\.module)?\.(?:out|last\.linear)(?=\.(?:weight|bias)\.$)", "Cadene, plain words"),
    (".head", r"(?<!\.lm)\.(?:heads?\.head|head\.layers\.head|head\.fc|cls\.classifier|classifier(?:\.1)?|hidden2tag|head|fc)(?=\.(?:weight|bias)\.$)", "torchvision, timm, transformers"),
)  # fmt: skip

# the ends of names that are kept as [in, out] by flax, Keras, CLIP and Mesh TensorFlow
IN_OUT = ("kernel", "kernel:0", "text_projection", "visual.proj", "Attention/q", "Attention/k", "Attention/v", "Attention/o")

# words of matrices that are [in, out] in the GPT-2 of OpenAI and transformers, and [out, in] in nanoGPT and CLIP
EITHER_WAY = ("c_attn", "c_proj", "c_fc")

# classes of modules whose `c_attn` lays its rows by heads, and not in blocks
BY_HEADS = ("GPTBigCodeAttention",)

# in which order a patch merging reads the channels, rows and columns (c, r, w) of four patches, by a name of its side
MERGED = (
    ("crw", ".w_msa.", "OpenMMLab: nn.Unfold"),
    *(
        ("wrc", word, "Microsoft, timm, torchvision, transformers: four shifted pictures")
        for word in ("relative_position", "position_bias_mlp", ".cpb_mlp.")
    ),
)

# what a norm's scale is called
SCALES = frozenset({"weight", "gamma", "scale", "alpha", "g", "a_2"})

# words of a way up, by how they begin: their numbers may count from its end, as in MiDaS (refinenet4 is first) and most U-Nets (up4, up3)
UPWARD = re.compile(
    r"(?:^|[._])(?:up|dec|refine|fusion|fuse|lateral|fpn|expan)[a-z]*(?:[._](?:blocks?|layers?|levels?|stages?))?[._:]*[\d#]", re.I
)

# layer kinds that multiply by 1 + weight, and of which llama.cpp's files hold that sum
ONE_MORE = frozenset({"GemmaRMSNorm", "Gemma2RMSNorm", "Gemma3RMSNorm", "RecurrentGemmaRMSNorm", "Qwen3NextRMSNorm", "NemotronLayerNorm1P"})

# which rows of a head a rotary embedding turns together: neighbours ("pairs") or the two halves; "apart" are
# pairs where the other side keeps queries and keys apart too, and unknown where it has them in one
ROTARY: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("pairs", (".attention.wq.",), "Meta Llama"),
    ("halves", (".attn.q_proj.bias", ".mlp.w1."), "torchtune Qwen 2"),
    ("halves", (".attn.q_proj.", ".attn.q_norm.scale", ".mlp.w1."), "torchtune Qwen 3"),
    ("apart", (".attn.q_proj.", ".mlp.w1."), "torchtune: pairs, but for Phi 3, whose names are the same and which others keep fused"),
    ("halves", (".self_attn.q_proj.",), "transformers"),
    ("halves", (".self_attn.qkv_proj.",), "transformers"),
    ("halves", (".attn.qkv.",), "litgpt"),
    ("pairs", (".attn.c_attn.", ".mlp.c_fc1."), "lit-llama"),
    ("halves", (".attn.c_attn.",), "Qwen 1"),
    ("halves", (".attn.Wqkv.",), "nomic"),
    ("halves", (".self_attn.W_pack.",), "Baichuan"),
    ("halves", (".mlp.c_fc_0.",), "EXAONE"),
    ("halves", (".att.W_query.", ".ff.fc3."), "LLMs from scratch"),
    ("halves", (".att_proj.", ".ff_proj."), "AI2 OLMo"),
    ("halves", (".attention.qkv_proj.", ".up_gate_proj."), "GTE"),
    ("halves", (".self_attention.linear_qkv.",), "Megatron Core"),
)

# how a fused matrix lays its rows, by its word and those beside it in the block, of which one is enough; without a row: blocks
UNKNOWN, EQUAL = "an unknown order", "an unknown order where there are as many keys as queries"  # and blocks where they are fewer
LAYOUTS: tuple[tuple[str, tuple[str, ...], str, str], ...] = (
    (r"qkv_proj", ("mlp.gate_up_proj", "mlp.gate_proj", "mlp.up_gate_proj"), "blocks", "Phi-3, vLLM, Gemma, GTE"),
    (r"qkv_proj", (), EQUAL, "metaseq: [k; v; q]; CodeGen: four shards of [q; v; k]"),
    (r"(?:^|\.)transformer\.layers\.\d+\.attention\.query_key_value", (), UNKNOWN, "ChatGLM, Megatron: by heads; GLM of SwissArmyTransformer: blocks"),
    (r"query_key_value", (), "per head", "GPT-NeoX, BLOOM, Megatron"),
    (r"linear_qkv", (), "per group", "Megatron Core, NeMo"),
    (r"(?:^|\.)model\.layers\..*\bwqkv\.", (), "per group", "InternLM2"),
    (r"(?:^|\.)wqkv\.", (), UNKNOWN, "gpt-fast: blocks; InternLM2: by groups"),
    (r"gate_up_proj_blocks", (), "interleaved", "gpt-oss"),
)  # fmt: skip
