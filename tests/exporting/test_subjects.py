"""Export subjects: tiny configurations of real families, and what torch.nn offers. Oracle: ONNX Runtime's own session against the model.

Each subject says whether an ONNX file is possible. Where it is, one must be made and must answer as the model does on inputs that the
exporter never saw; where it is not, the refusal must say why.
"""

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from workbench.exporting import export_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x):
        y = torch.relu(self.first(x))
        return self.head((y + self.norm(self.second(y))).mean((2, 3)))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.image, self.table = nn.Linear(6, 4), nn.Linear(3, 4)

    def forward(self, image, table, *, scale):
        return {"sum": (self.image(image) + self.table(table)) * scale, "parts": (self.image(image), self.table(table))}


class Selected(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 8)

    def forward(self, ids, keep):
        return self.embed(ids) * keep[..., None], ids.argmax(-1), keep.any(-1)


class Remembering(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("total", torch.zeros(4))

    def forward(self, x):
        self.total = self.total + x.sum(0)
        return x + self.total


class Branch(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x - 1


class Padded(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1, enable_nested_tensor=False)

    def forward(self, ids, padding):
        return self.encoder(self.embed(ids), src_key_padding_mask=padding)


def ids(batch=2, length=7, top=50):
    return torch.randint(2, top, (batch, length))


TORCH = {
    "residual cnn": (Residual, lambda: {"x": torch.randn(2, 3, 8, 8)}),
    "mlp": (lambda: nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 2)), lambda: {"input": torch.randn(3, 4)}),
    "lstm": (lambda: nn.LSTM(4, 6, 2, batch_first=True, bidirectional=True), lambda: {"input": torch.randn(2, 5, 4)}),
    "gru": (lambda: nn.GRU(4, 6, batch_first=True), lambda: {"input": torch.randn(2, 5, 4)}),
    "rnn": (lambda: nn.RNN(4, 6, nonlinearity="relu"), lambda: {"input": torch.randn(5, 2, 4)}),
    "transformer": (lambda: nn.Transformer(16, 2, 1, 1, 32, batch_first=True), lambda: {"src": torch.randn(2, 5, 16), "tgt": torch.randn(2, 4, 16)}),
    "two inputs": (TwoInputs, lambda: {"image": torch.randn(2, 6), "table": torch.randn(2, 3), "scale": torch.rand(1)}),
    "whole numbers and flags": (Selected, lambda: {"ids": ids(top=20), "keep": torch.rand(2, 7) > 0.4}),
    "padded": (Padded, lambda: {"ids": ids(top=20), "padding": torch.arange(7)[None] >= torch.tensor([[7], [5]])}),
    "convolution transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(3, 4, 3, 2), nn.Upsample(scale_factor=2)), lambda: {"input": torch.randn(1, 3, 5, 5)}),
    "stateful": (Remembering, lambda: {"x": torch.randn(2, 4)}),
    "data-dependent branch": (Branch, lambda: {"x": torch.randn(2, 4)}),
}  # fmt: skip
REFUSED = {"stateful", "data-dependent branch"}


def tiny(name, **config):
    import transformers

    small = {
        "vocab_size": 60,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 64,
    }
    made = getattr(transformers, f"{name}Config")(**{**small, **config})
    return made


def family(name, model="Model", inputs=None, **config):
    def build():
        import transformers

        torch.manual_seed(0)
        return getattr(transformers, f"{name}{model}")(tiny(name, **config))

    return build, inputs or (lambda: {"input_ids": ids(), "attention_mask": torch.ones(2, 7, dtype=torch.int64)})


def pixels():
    return {"pixel_values": torch.randn(2, 3, 16, 16)}


KV = {"num_key_value_heads": 1, "head_dim": 8}
FAMILIES = {
    "bert": family("Bert"),
    "roberta": family("Roberta", "ForSequenceClassification"),
    "distilbert": family("DistilBert", dim=16, n_layers=2, n_heads=2, hidden_dim=32),
    "albert": family("Albert", embedding_size=8),
    "electra": family("Electra", embedding_size=8),
    "deberta": family("DebertaV2"),
    "gpt2": family("GPT2", "LMHeadModel", n_embd=16, n_layer=2, n_head=2, n_positions=64),
    "gptneox": family("GPTNeoX", "ForCausalLM"),
    "opt": family("OPT", "ForCausalLM", ffn_dim=32, word_embed_proj_dim=16),
    "llama": family("Llama", "ForCausalLM", **KV),
    "mistral": family("Mistral", "ForCausalLM", **KV),
    "qwen2": family("Qwen2", "ForCausalLM", num_key_value_heads=1),
    "gemma": family("Gemma", "ForCausalLM", **KV),
    "t5": family(
        "T5", "ForConditionalGeneration", lambda: {"input_ids": ids(), "decoder_input_ids": ids(2, 4)}, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2
    ),
    "bart": family(
        "Bart", "Model", lambda: {"input_ids": ids(), "decoder_input_ids": ids(2, 4)}, d_model=16, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
    ),
    "vit": family("ViT", "ForImageClassification", pixels, image_size=16, patch_size=4),
    "swin": family("Swin", "Model", pixels, image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_attention_heads=[2, 2], window_size=4),
    "convnext": family("ConvNext", "Model", lambda: {"pixel_values": torch.randn(2, 3, 32, 32)}, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1]),
    "clip text": family("CLIPText", "Model"),
    "wav2vec2": family(
        "Wav2Vec2", "Model", lambda: {"input_values": torch.randn(2, 400)}, conv_dim=[8, 8], conv_stride=[5, 2], conv_kernel=[10, 3],
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, num_feat_extract_layers=2,
    ),
}  # fmt: skip


def answers(path, inputs):
    """What ONNX Runtime says, with inputs by name where the graph has them."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    feeds = {name: inputs[name].numpy() if name in inputs else list(inputs.values())[names.index(name)].numpy() for name in names}
    return session.run(None, feeds)


def flattened(value):
    if isinstance(value, torch.Tensor):
        return [value.detach().numpy()]
    if isinstance(value, dict) or hasattr(value, "items"):
        value = value.values()
    return (
        [leaf for item in value if item is not None for leaf in flattened(item)]
        if isinstance(value, (tuple, list)) or hasattr(value, "__iter__")
        else []
    )


@pytest.mark.parametrize("name", [*TORCH, *FAMILIES])
def test_a_correct_file_is_made_or_the_refusal_says_why(name, tmp_path):
    if name in FAMILIES:
        pytest.importorskip("transformers")
    build, inputs = (TORCH | FAMILIES)[name]
    torch.manual_seed(0)
    model = build().eval()
    one = export_model(model, (), inputs(), path=tmp_path / "m.onnx")["onnx"]
    if name in REFUSED:
        assert not one.ok
        assert one.cause
        assert one.cure
        return
    assert one.ok, (one.cause, one.error[:2000])
    torch.manual_seed(1)
    fresh = inputs()
    options = {"use_cache": False} if any("use_cache" in note for note in one.notes) else {}
    with torch.no_grad():
        expected = flattened(model(**fresh, **options))
    found = answers(tmp_path / "m.onnx", fresh)
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert np.allclose(a, b, rtol=1e-3, atol=1e-4), np.abs(a.astype(float) - b.astype(float)).max()
