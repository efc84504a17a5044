"""Subjects of quantization, and the other process that loads what was saved.

Run as a program it answers requests, one JSON object a line: each is done in a fork of its own, which has made nothing and imported only what
builds the model. It calls no quantization of the library: what a report says of loading has to be enough.
"""

import json
import os
import sys

import torch
from torch import nn


def digits():
    from workbench.teaching.samples import DigitsNet

    return DigitsNet()


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(16), nn.Linear(16, 5)

    def forward(self, x):
        y = torch.relu(self.first(x))
        return self.head((y + self.norm(self.second(y))).mean((2, 3)))


class Tied(nn.Module):
    """Two Linear layers that share one weight."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 8)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.out(self.b(torch.relu(self.a(x))))


class Tagger(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.embed, self.rnn, self.head = nn.Embedding(50, 32), kind(32, 32, 2, batch_first=True, bidirectional=True), nn.Linear(64, 9)

    def forward(self, ids):
        return self.head(self.rnn(self.embed(ids))[0])


def encoder():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64, batch_first=True), 2)


SMALL = {
    "vocab_size": 60,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
}


def family(name, model, **config):
    def build():
        import transformers

        return getattr(transformers, name + model)(getattr(transformers, f"{name}Config")(**config))

    return build


def ids(length=7):
    return torch.randint(2, 50, (2, length))


def words():
    return {"input_ids": ids(), "attention_mask": torch.ones(2, 7, dtype=torch.int64)}


TORCH = {
    "mlp": (lambda: nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32)), lambda: {"input": torch.randn(4, 64)}),
    "digits": (digits, lambda: {"image": torch.rand(4, 1, 8, 8)}),
    "residual": (Residual, lambda: {"x": torch.randn(4, 3, 8, 8)}),
    "root lstm": (lambda: nn.LSTM(32, 32, 2, batch_first=True, bidirectional=True), lambda: {"input": torch.randn(4, 5, 32)}),
    "root gru": (lambda: nn.GRU(32, 32, batch_first=True), lambda: {"input": torch.randn(4, 5, 32)}),
    "lstm": (lambda: Tagger(nn.LSTM), lambda: {"ids": ids()}),
    "gru": (lambda: Tagger(nn.GRU), lambda: {"ids": ids()}),
    "encoder": (encoder, lambda: {"src": torch.randn(4, 5, 32)}),
    "tied": (Tied, lambda: {"x": torch.randn(4, 64)}),
}
FAMILIES = {
    "bert": (family("Bert", "Model", **SMALL), words),
    "gpt2": (family("GPT2", "LMHeadModel", vocab_size=60, n_embd=64, n_layer=2, n_head=2, n_positions=64), words),
    "llama": (family("Llama", "ForCausalLM", **SMALL, num_key_value_heads=1, head_dim=32), words),
    "vit": (family("ViT", "ForImageClassification", **{k: v for k, v in SMALL.items() if k.startswith(("hid", "num", "int"))}, image_size=16, patch_size=4), lambda: {"pixel_values": torch.randn(2, 3, 16, 16)}),
    "t5": (family("T5", "ForConditionalGeneration", vocab_size=60, d_model=64, d_kv=32, d_ff=128, num_layers=2, num_heads=2), lambda: {"input_ids": ids(), "decoder_input_ids": ids(4)}),
    "whisper": (
        family("Whisper", "ForConditionalGeneration", vocab_size=60, d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
               encoder_ffn_dim=128, decoder_ffn_dim=128, num_mel_bins=16, max_source_positions=20, max_target_positions=20, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1),
        lambda: {"input_features": torch.randn(2, 16, 40), "decoder_input_ids": ids(4)},
    ),
}  # fmt: skip


def build(name):
    torch.manual_seed(0)
    return (TORCH | FAMILIES)[name][0]().eval()


def inputs(name):
    torch.manual_seed(1)
    return (TORCH | FAMILIES)[name][1]()


def leaves(value):
    """Floating tensors of an output, in order, but for caches."""
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if hasattr(value, "values") else value if isinstance(value, (tuple, list)) else ()
    return [leaf for item in items for leaf in leaves(item)]


def answer(model, given, uncached):
    with torch.no_grad():
        return leaves(model(**given, **({"use_cache": False} if uncached else {})))


def far(before, after):
    """(largest difference, largest ‖difference‖ / ‖before‖) over all outputs, in double precision."""
    assert len(before) == len(after)
    pairs = [(a.double(), b.double()) for a, b in zip(before, after, strict=True)]
    assert all(a.shape == b.shape for a, b in pairs)
    return max(float((b - a).abs().max()) for a, b in pairs), max(float((b - a).norm() / a.norm()) for a, b in pairs)


def serve(request):
    """Load what the request names, as its report says, and measure it against the original."""
    name, path = request["subject"], request["path"]
    if path.endswith(".onnx"):
        import onnxruntime

        def run(file):
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3
            session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
            given = inputs(name)
            order = [node.name for node in session.get_inputs()]
            feeds = {n: (given[n] if n in given else list(given.values())[order.index(n)]).numpy() for n in order}
            return [torch.from_numpy(value) for value in session.run(None, feeds)]

        return far(run(request["original"]), run(path))
    model = build(name)
    before = answer(model, inputs(name), request["uncached"])
    known = {"model": build(name), "path": path}
    exec(request["reload"], known)
    return far(before, answer(known["model"], inputs(name), request["uncached"]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        read, write = os.pipe()
        if not os.fork():
            try:
                told = {"far": serve(json.loads(line))}
            except BaseException as error:
                told = {"error": f"{type(error).__name__}: {error}"}
            os.write(write, json.dumps(told).encode())
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as pipe:
            print(pipe.read(), flush=True)
        os.wait()
