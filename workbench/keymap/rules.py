"""How the field spells the same thing: one table of roles, read on both sides of a match. The inference works without it on names it
has never seen; a row only tells that two spellings mean one role.

Names are compared in a normal form: wrapper segments taken out, lower case, words split at dots, slashes, underscores and capitals,
a number that ends a word set off by a colon (``conv1`` -> ``conv:1``, ``ln_1`` -> ``ln:1``), a number by itself kept as ``.3.``.
Each row is (role, spellings in the normal form as alternatives of a regular expression, who writes so).

The order of the rows matters: they are applied from the top, each on what the rows above it made. So a row that gives a word its one
form stands above the rows that rely on it (``.layernorm`` is ``.norm`` in the first of WORDS, and ``.norm.gamma`` is ``.norm.weight``
far below it), and a longer spelling above a shorter one that is a part of it (``.block.sparse.moe.input.linear.weight`` above
``.block.sparse.moe``; in BLOCK ``.encoder.attn.norm`` above ``.encoder.attn``, or it would become ``.xattn.norm``). A new row goes
below all whose outcome it reads and above all whose spellings are a part of its own; where nothing else decides, rows of one library
stand together. A row may ask only for whole words and for numbers of one or two digits: see `_by_pattern`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import cache, lru_cache, partial

WORDS: tuple[tuple[str, str, str], ...] = (
    (".norm", r"\.(?:layer\.norm|layernorm|layrnorm|ln|norm|batch\.norm|batchnorm|bn|normalization|rms\.norm|rmsnorm)", "torch.nn, Keras, CLIP"),
    (r".ffn.fc:1", r"\.ffn\.layers\.0\.0", "OpenMMLab"),
    (r".ffn.fc:2", r"\.ffn\.layers\.1", "OpenMMLab"),
    (".norm", r"\.n(?=:[123]\.)", "plain words"),
    (r"\1.weight", r"(\.(?:self|enc\.dec)\.attention\.[qkvo]|\.relative\.attention\.bias)(?=\.$)", "Mesh TensorFlow T5"),
    (r".stem.\1", r"\.downsample\.layers\.0\.([01])", "Facebook ConvNeXt"),
    (r".stages.\1.downsample.\2", r"\.downsample\.layers\.(\d)\.([01])", "Facebook ConvNeXt"),
    (".stem.0", r"\.convnext(?:v2)?\.embeddings\.patch\.embeddings", "transformers ConvNeXt"),
    (".stem.1", r"\.convnext(?:v2)?\.embeddings\.norm", "transformers ConvNeXt"),
    *((rf".neck.{word}", rf"\.neck\.{n}", "Segment Anything") for n, word in enumerate(("conv:1", "norm:1", "conv:2", "norm:2"))),
    (".norm.out", r"\.conv\.norm\.out", "diffusers"),
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
    *((rf"\1.\2:{n + 1}", rf"(\.layers\.\d+)\.layer\.{n}\.(conv|norm)", "transformers ResNet") for n in range(3)),
    (r"\1.\2:\3", r"(\.denselayer:\d+)\.(norm|conv)\.([12])", "first torchvision DenseNet"),
    (r".norm:\1", r"\.conv:(\d)\.norm", "detectron2"),
    (r"\1.weight", r"(\.norm(?:[.:]\w+)?)\.(?:gamma|scale)", "original BERT, OpenAI, flax, torchtune"),
    (r"\1.bias", r"(\.norm(?:[.:]\w+)?)\.(?:beta|offset)", "original BERT, OpenAI, flax"),
    (r".weight", r"\.kernel", "flax, Keras, Mesh TensorFlow"),
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
    ((".mlp.fc:11.", ".mlp.fc:12.", ".mlp.fc:2."), (), {".mlp.fc:11.": ".mlp.up.", ".mlp.fc:12.": ".mlp.gate."}, "nomic-bert"),
    ((".gamma.", ".running.mean."), (), {".gamma.": ".weight.", ".beta.": ".bias."}, "Keras"),
    ((".mlp.gate.", ".experts."), (), {".mlp.gate.": ".mlp.router."}, "transformers mixtures of experts"),
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
    ((".norm:1.", ".norm:2.", ".norm:3.", "multihead.attn"), (), {".norm:1.": ".norm.attn.", ".norm:2.": ".norm.cross.", ".norm:3.": ".norm.mlp."}, "torch.nn.TransformerDecoderLayer"),
    ((".norm:1.", ".norm:2.", "attn"), (".norm:3.",), {".norm:1.": ".norm.attn.", ".norm:2.": ".norm.mlp."}, "torch.nn.TransformerEncoderLayer, timm, GPT-2"),
    ((".norm:1.", ".norm:2.", "attention"), (".norm:3.",), {".norm:1.": ".norm.attn.", ".norm:2.": ".norm.mlp."}, "torchvision"),
)  # fmt: skip

# inside a repeated block
BLOCK: tuple[tuple[str, str, str], ...] = (
    (".norm.cross", r"\.(?:encoder\.attn|cross\.attn|cross\.attention|crossattention\.output)\.norm", "transformers BART, Whisper, OpenAI Whisper"),
    (".norm.attn", r"(?<!\.post)\.(?:attention\.output|self\.attn|self\.attention|attention|attn|sa|input|pre\.attention)\.norm|\.norm\.before", "BERT, BART, Meta Llama, DistilBERT, ViT"),
    (".norm.mlp", r"\.(?:ffn|mlp|feed\.forward|post\.attention|output|final|pre\.mlp|post\.mlp)\.norm|\.norm\.after", "BERT, BART, Llama, ViT"),
    (".xattn", r"\.(?:encoder\.attn|cross\.attn|cross\.attention|crossattention|multihead\.attn|encoder\.decoder\.attention|enc\.dec\.attention)", "BART, Whisper, torch.nn.TransformerDecoderLayer"),
    (".attn", r"\.(?:attention\.(?:self|attention)|self\.attn|self\.attention|attention|attn|mixer\.self\.attn)", "BERT, ViT, Llama, GPT"),
    (r".attn.q", r"^\.(?:q|query|to\.q|wq)(?=\.(?:weight|bias)\.$)", "attention without a word for it"),
    (r".attn.k", r"^\.(?:k|key|to\.k|wk)(?=\.(?:weight|bias)\.$)", "attention without a word for it"),
    (r".attn.v", r"^\.(?:v|value|to\.v|wv)(?=\.(?:weight|bias)\.$)", "attention without a word for it"),
    (r".attn.o", r"^\.(?:proj\.attn|to\.out\.0|to\.out)(?=\.(?:weight|bias)\.$)", "diffusers"),
    (r".attn.\1", r"^\.(q|k|v|o|out)\.proj|(?<!attn)\.(q|k|v)\.proj", "attention without a word for it"),
    (".attn.qkv", r"^\.(?:in\.proj|qkv|qkv\.proj|wqkv)|(?<!attn)\.(?:in\.proj(?=\.(?:weight|bias)\.$)|qkv|qkv\.proj)", "attention without a word for it"),
    (r"\1.kv", r"(\.x?attn)\.(?:kv|to\.kv|kv\.proj)", "PVT, Segformer"),
    (".attn.kv", r"(?<!attn)\.kv(?:\.proj)?", "attention without a word for it"),
    (r"\1.qkv.\2", r"(\.x?attn)\.in\.proj\.(weight|bias)", "torch.nn.MultiheadAttention"),
    (r"\1.qkv", r"(\.x?attn)\.(?:query\.key\.value|qkv\.proj|to\.qkv|w?qkv|c\.attn|in\.proj)", "timm, GPT-2, NeoX, BLOOM, Phi-3"),
    (r"\1.qkv", r"(\.x?attn)\.wqkv", "nomic, InternLM2"),
    (r"\1.q", r"(\.x?attn)\.(?:q\.proj|query\.proj|q\.lin|to\.q|wq|query|linear\.q|q)", "BERT, Llama, DistilBERT, diffusers"),
    (r"\1.k", r"(\.x?attn)\.(?:k\.proj|key\.proj|k\.lin|to\.k|wk|key|linear\.k|k)", "BERT, Llama, DistilBERT, diffusers"),
    (r"\1.v", r"(\.x?attn)\.(?:v\.proj|value\.proj|v\.lin|to\.v|wv|value|linear\.v|v)", "BERT, Llama, DistilBERT, diffusers"),
    (r"\1.o", r"(\.x?attn)\.(?:out\.proj|o\.proj|out\.lin|to\.out(?:\.0)?|output\.dense|output\.proj|output|proj\.attn|c\.proj|linear\.out|dense|proj|wo|out|o)", "BERT, Llama, GPT-2, diffusers"),
    (".mlp.up", r"\.intermediate\.dense", "BERT"),
    (".mlp.down", r"\.output\.dense", "BERT"),
    (".mlp", r"\.(?:feed\.forward|feedforward|ffn|ff|dense\.relu\.dense|mlp|block\.sparse\.moe)", "Llama, DistilBERT, T5"),
    (".mlp.up", r"(?:\.mlp)?\.(?:c\.fc|fc\.in|dense\.h\.to\.4h|lin:1|linear:1|fc:1|pwconv:1|layers\.0\.0|net\.0\.proj)|\.mlp\.(?:0|fc)", "GPT-2, timm, torch.nn, torchvision, OpenMMLab"),
    (".mlp.down", r"(?:\.mlp)?\.(?:fc\.out|dense\.4h\.to\.h|lin:2|linear:2|fc:2|pwconv:2|net\.2)|\.mlp\.(?:2|3|c\.proj|layers\.1|proj)", "GPT-2, timm, torch.nn, torchvision, OpenMMLab"),
    (".mlp.gateup", r"(?:\.mlp|^)\.(?:gate\.up\.proj|gate\.up|weights\.in|w:12)", "Phi-3, transformers experts"),
    (r"\1.gate", r"(\.mlp|\.experts\.\d+|^)\.(?:gate\.proj|w:1|wi:0)", "Llama, Mixtral, T5 v1.1"),
    (r"\1.up", r"(\.mlp|\.experts\.\d+|^)\.(?:up\.proj|w:3|wi:1|wi)", "Llama, Mixtral, T5"),
    (r"\1.down", r"(\.mlp|\.experts\.\d+|^)\.(?:down\.proj|weights\.out|w:2|wo)", "Llama, Mixtral, T5"),
    (r".mlp.\1", r"\.(?:w\.)?(up|down|gate)(?:\.proj)?(?=\.(?:weight|bias)\.$)", "plain words"),
    (r".experts.gateup", r"\.experts\.gate\.up\.proj", "transformers experts"),
    (r".experts.\1", r"\.experts\.(gate|up|down)\.proj", "transformers experts"),
    (r".ls:\1", r"\.(?:ls:([12])\.gamma|layer\.scale:([12])(?:\.lambda:1)?|gamma:([12])|lambda:([12]))", "DINOv2, BEiT"),
    (".ls", r"\.(?:layer\.scale(?:\.parameter)?|gamma)", "ConvNeXt"),
    (".shortcut.conv", r"\.downsample\.0|\.shortcut\.conv|\.shortcut(?=\.weight\.$)", "torchvision and transformers ResNet"),
    (r".shortcut.norm", r"\.downsample\.1|\.shortcut\.norm", "torchvision, transformers and detectron2 ResNet"),
    (".conv.dw", r"\.(?:dwconv|conv\.dw|depthwise\.conv)", "ConvNeXt"),
)  # fmt: skip

# outside of blocks
SINGLE: tuple[tuple[str, str, str], ...] = (
    (".emb.pos", r"\.(?:embeddings\.position\.embeddings?|position\.embeddings?|positional\.embedding|pos\.embedding|pos\.embed|embed\.positions|wpe|position\.embd)(?:\.weight)?", "BERT, GPT-2, ViT, CLIP"),
    (".emb.type", r"\.(?:embeddings\.)?(?:token\.type|segment)\.embeddings(?:\.weight)?", "BERT"),
    (".emb.norm", r"\.(?:embeddings|emb|embedding|word\.embeddings|embed)\.norm|\.norm\.embedding", "BERT, fairseq, BART"),
    (".emb.tok", r"\.(?:embeddings\.word\.embeddings|embedding\.word\.embeddings|word\.embeddings|token\.embeddings?|token\.embd|tok\.embeddings|embed\.tokens|embed\.in|embeddings\.token\.embedding|(?:embedder|embed)(?=\.weight\.$)|wte|shared(?:\.embedding)?)(?:\.weight)?", "BERT, GPT-2, Llama, T5"),
    (".cls", r"\.(?:embeddings\.)?(?:cls\.token|class\.token|class\.embedding)", "ViT, CLIP"),
    (".text.projection", r"\.text\.projection(?:\.weight)?", "CLIP"),
    (".visual.projection", r"\.visual\.proj(?:ection)?(?:\.weight)?", "CLIP"),
    (".mask.token", r"\.(?:embeddings\.)?mask\.token", "DINOv2"),
    (".patch", r"\.(?:patch\.embed\.proj(?:ection)?|embeddings\.patch\.embeddings?(?:\.projection)?|patch\.embedding|conv\.proj|visual\.conv:1)", "ViT, CLIP"),
    (r".\1:1", r"\.embedder\.embedder\.(conv|norm)|\.stem\.(conv|norm):1", "transformers and detectron2 ResNet"),
    (".norm.pre", r"\.(?:norm\.pre|pre\.norm)", "CLIP"),
    (".norm.last", r"\.(?:norm\.post|post\.norm|norm\.final|norm\.f|final\.norm|output\.norm|norm)(?=\.(?:weight|bias)\.$)", "GPT-2, Llama, CLIP, OpenMMLab"),
    (".lmhead", r"\.(?:lm\.head|output|embed\.out|decoder\.logits|logits)(?=\.(?:weight|bias)\.$)", "transformers, Meta Llama, GPT-NeoX, Mesh T5"),
    (".head", r"(?<!\.lm)\.(?:heads?\.head|head\.layers\.head|head\.fc|classifier(?:\.1)?|head|fc)(?=\.(?:weight|bias)\.$)", "torchvision, timm, transformers"),
)  # fmt: skip

_SPLITS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|[/_]")


def normal(name: str) -> str:
    """The normal form of a name, with a dot at both ends."""
    return f".{'.'.join(map(_normal_segment, name.replace('/', '.').split('.')))}."


@lru_cache(maxsize=1 << 14)
def _normal_segment(segment: str) -> str:
    if segment.isascii() and segment.isalpha() and segment.islower():
        return segment
    if segment.isascii() and segment.isdigit() and len(segment) < 10:
        return str(int(segment))
    words = re.sub(r"\.{2,}", ".", _SPLITS.sub(".", segment).lower().strip("."))
    return re.sub(r"(?<=[a-z])\.?0*([0-9]{1,9})(?=\.|$)", r":\1", words)


def words_of(text: str) -> str:
    """A normal form in the table's words, whatever stands around it."""
    return _by_pattern("words", text)


def role_of(words: str, block: bool) -> str:
    """The role that those words mean in a repeated block, or outside of one."""
    return _by_pattern("in a block" if block else "outside", words).replace(".mlp.mlp.", ".mlp.")


_TABLES = {"words": (WORDS, "[.:]"), "in a block": (BLOCK, r"\."), "outside": ((*SINGLE, *BLOCK), r"\.")}  # and what ends a match
_SPELLED = "\n".join(spelled for rows, _ in _TABLES.values() for _, spelled, _ in rows)
_WITH, _WITHOUT = re.sub(r"[?:()]", "", _SPELLED), re.sub(r"\(\?:[^()|]*\)\?|[a-z]\?", "", _SPELLED)  # what may stand there or not
_MENTIONED = frozenset(re.findall(r"[a-z]+", f"{_WITH}\n{_WITHOUT}"))
_RUNS = re.compile(r"[a-z]{2,}|[0-9]{3,}")
_MASKED = re.compile("zz|999")


def _by_pattern(table: str, text: str) -> str:
    """The text after a table's rows, by way of one with others in the place of words and long numbers that no row mentions."""
    strange: list[str] = []

    def masked(found: re.Match[str]) -> str:
        word = found[0]
        if word in _MENTIONED or word.endswith("attn"):  # some rows look behind for that
            return word
        strange.append(word)
        return "999" if word.isdigit() else "zz"

    told = _applied(table, _RUNS.sub(masked, text))
    if not strange:
        return told
    words = iter(strange)
    return _MASKED.sub(lambda _: next(words), told) if len(_MASKED.findall(told)) == len(strange) else _applied(table, text)


@lru_cache(maxsize=1 << 14)
def _applied(table: str, text: str) -> str:
    for fill, pattern in _compiled(table):
        text = pattern.sub(fill, text)
    return text


@cache
def _compiled(table: str) -> list[tuple[Callable[[re.Match[str]], str], re.Pattern[str]]]:
    rows, before = _TABLES[table]
    return [(partial(_filled, role), re.compile(f"(?:{spelled})(?={before})")) for role, spelled, _ in rows]


def _filled(role: str, found: re.Match[str]) -> str:
    for number, group in enumerate((group for group in found.groups() if group is not None), 1):
        role = role.replace(f"\\{number}", group)
    return re.sub(r"\\\d", "", role)


_KNOWN = re.compile(r"(?:^|\.)(?:x?attn|mlp|norm\.(?:attn|mlp|cross|last|pre)|emb\.\w+|ls(?::\d)?|shortcut|head|cls|patch)(?:\.|$)")
_KNOWN_SINGLE = re.compile(
    r"^(?:emb\.\w+|norm\.(?:last|pre)|(?:lm)?head|cls|patch|mask\.token|text\.projection|visual\.projection)(?:\.|$)"
)


def is_known_role(text: str) -> bool:
    """Whether a role is one of the table's, and not just what the name says."""
    return _KNOWN.search(text) is not None


def is_single_role(text: str) -> bool:
    return _KNOWN_SINGLE.match(text) is not None


# which rows of a head a rotary embedding turns together: neighbours ("pairs") or the two halves
ROTARY: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("pairs", (".attention.wq.",), "Meta Llama"),
    ("pairs", (".attn.q_proj.", ".mlp.w1."), "torchtune"),
    ("halves", (".self_attn.q_proj.",), "transformers"),
    ("halves", (".self_attn.qkv_proj.",), "transformers"),
    ("halves", (".attn.qkv.",), "litgpt"),
    ("halves", (".attn.c_attn.",), "Qwen 1"),
    ("halves", (".attn.Wqkv.",), "nomic"),
)


def rotary_order(names: Iterable[str]) -> str:
    """The order of a side's rows by its names, or "" where they do not tell."""
    told = "\n".join(names)
    return next((order for order, words, _ in ROTARY if all(word in told for word in words)), "")


def dialect(words: set[str]) -> dict[str, str]:
    """What becomes what in a block that holds these words."""
    told = "".join(words)
    out: dict[str, str] = {}
    for present, absent, change, _ in DIALECTS:
        if all(word in told for word in present) and not any(word in told for word in absent):
            out |= {old: new for old, new in change.items() if old not in out}
    return out
