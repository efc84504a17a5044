"""Small models of every kind a comparison must serve, each with two batches of keyword arguments, and the ways to break them."""

from collections.abc import Callable, Iterator

import torch
from torch import nn
from torch.nn import functional


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(12, 24), nn.BatchNorm1d(24), nn.GELU(), nn.Dropout(0.2), nn.Linear(24, 24), nn.Linear(24, 7))

    def forward(self, x):
        return self.net(x)


class ResidualCnn(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8))
        self.head = nn.Linear(8, 6)

    def forward(self, x):
        y = self.stem(x)
        y = y + self.block(y)
        return self.head(y.mean((2, 3)))


class Autoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.Sequential(nn.Conv1d(4, 8, 4, 2, 1), nn.SiLU(), nn.Conv1d(8, 8, 3, padding=1, groups=8))
        self.up = nn.ConvTranspose1d(8, 4, 4, 2, 1)

    def forward(self, x):
        return self.up(self.down(x))


class Recurrent(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.rnn = kind(6, 10, batch_first=True, **options)
        self.head = nn.Linear(20 if options.get("bidirectional") else 10, 4)

    def forward(self, x):
        y, state = self.rnn(x)
        return self.head(y), state


class PaddedEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(30, 16)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2, enable_nested_tensor=False)

    def forward(self, ids, padding):
        return self.encoder(self.embed(ids), src_key_padding_mask=padding)


class Translator(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Transformer(16, 2, 1, 1, 32, batch_first=True)
        self.head = nn.Linear(16, 11)

    def forward(self, source, target):
        return self.head(self.net(source, target))


class Causal(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(40, 16), nn.LayerNorm(16)
        self.qkv, self.out, self.head = nn.Linear(16, 48), nn.Linear(16, 16), nn.Linear(16, 40, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        x = x + self.out(functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return {"logits": self.head(x), "next": self.head(x)[:, -1].argmax(-1)}


class ManyInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.gate = nn.Linear(5, 8), nn.Linear(3, 8), nn.Bilinear(8, 8, 6)

    def forward(self, left, right, use):
        y = self.gate(torch.tanh(self.a(left)), torch.sigmoid(self.b(right)))
        return {"scores": y, "parts": (torch.where(use, y, -y), y > 0), "best": y.argmax(-1)}


class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(25, 12, mode="mean"), nn.Linear(12, 3)

    def forward(self, ids):
        return functional.log_softmax(self.head(self.bag(ids)), -1)


class Remembering(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.GRUCell(5, 9)
        self.register_buffer("hidden", torch.zeros(1, 9))

    def forward(self, x):
        self.hidden = self.cell(x, self.hidden.expand(x.shape[0], 9)).mean(0, keepdim=True)
        return self.hidden.expand(x.shape[0], 9) + 0


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x):
        return self.up(x) if x.mean() > 0 else self.down(x)


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens, self.channels, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x):
        x = x + self.tokens(self.norm(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channels(self.norm(x)), torch.fft.rfft(x).abs()


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 3, dropout=0.1, batch_first=True)
        self.gate = nn.Linear(12, 24)

    def forward(self, x):
        y, weights = self.attention(x, x, x)
        return functional.glu(self.gate(y)), weights


def _floats(**shapes):
    return [{name: torch.randn(shape) for name, shape in shapes.items()} for _ in range(2)]


def _padding():
    return [{"ids": torch.randint(0, 30, (2, 5)), "padding": torch.tensor([[False] * 5, [False] * n + [True] * (5 - n)])} for n in (3, 2)]


def _gated():
    return [{**batch, "use": torch.rand(4, 6) > 0.5} for batch in _floats(left=(4, 5), right=(4, 3))]


SUBJECTS: dict[str, tuple[Callable[[], nn.Module], Callable[[], list]]] = {
    "mlp": (Mlp, lambda: _floats(x=(9, 12))),
    "residual cnn": (ResidualCnn, lambda: _floats(x=(2, 3, 9, 9))),
    "autoencoder": (Autoencoder, lambda: _floats(x=(2, 4, 16))),
    "lstm": (lambda: Recurrent(nn.LSTM, num_layers=2, dropout=0.1), lambda: _floats(x=(3, 5, 6))),
    "gru": (lambda: Recurrent(nn.GRU, bidirectional=True), lambda: _floats(x=(3, 5, 6))),
    "rnn": (lambda: Recurrent(nn.RNN), lambda: _floats(x=(3, 5, 6))),
    "padded encoder": (PaddedEncoder, _padding),
    "transformer": (Translator, lambda: _floats(source=(2, 5, 16), target=(2, 4, 16))),
    "causal": (Causal, lambda: [{"ids": torch.randint(0, 40, (2, 6))} for _ in range(2)]),
    "many inputs": (ManyInputs, _gated),
    "bag": (Bag, lambda: [{"ids": torch.randint(0, 25, (4, 7))} for _ in range(2)]),
    "remembering": (Remembering, lambda: _floats(x=(3, 5))),
    "branching": (Branching, lambda: [{"x": torch.rand(5, 6)}, {"x": -torch.rand(5, 6)}]),
    "mixer": (Mixer, lambda: _floats(x=(2, 8, 8))),
    "attention": (Attention, lambda: _floats(x=(2, 6, 12))),
}

FAMILIES: dict[str, dict] = {  # transformers configurations, all of one tiny size
    "bert": {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48},
    "distilbert": {"n_layers": 2, "dim": 32, "n_heads": 4, "hidden_dim": 48},
    "roberta": {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48},
    "albert": {"num_hidden_layers": 2, "hidden_size": 32, "embedding_size": 16, "num_attention_heads": 4, "intermediate_size": 48},
    "electra": {"num_hidden_layers": 2, "hidden_size": 32, "embedding_size": 16, "num_attention_heads": 4, "intermediate_size": 48},
    "mpnet": {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48},
    "gpt2": {"n_layer": 2, "n_embd": 32, "n_head": 4},
    "gpt_neo": {"num_layers": 2, "hidden_size": 32, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "gpt_neox": {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48},
    "opt": {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {"n_layer": 2, "hidden_size": 32, "n_head": 4},
    "llama": {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48},
    "mistral": {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48},
    "qwen2": {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48},
}


class Family(nn.Module):
    """A transformers model that answers with its last hidden state alone."""

    def __init__(self, name):
        super().__init__()
        import transformers

        config = transformers.AutoConfig.for_model(name, vocab_size=99, max_position_embeddings=64, pad_token_id=0, **FAMILIES[name])
        self.net = transformers.AutoModel.from_config(config, attn_implementation="eager")
        self.cached = {"use_cache": False} if hasattr(config, "use_cache") else {}

    def forward(self, input_ids, attention_mask):
        return self.net(input_ids=input_ids, attention_mask=attention_mask, **self.cached).last_hidden_state


def family_batches():
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3])
    return [{"input_ids": torch.randint(1, 99, (2, 7)), "attention_mask": mask} for _ in range(2)]


def mutants(model: nn.Module, seed: int) -> Iterator[tuple[str, Callable[[nn.Module], None]]]:
    """(what is broken, how to break a copy of `model`), in an order that `seed` shuffles."""
    draw = torch.Generator().manual_seed(seed)
    layers = [name for name, module in model.named_modules() if name and not list(module.children())]
    weights = [name for name, _ in model.named_parameters()]
    ways: list[tuple[str, Callable[[nn.Module], None]]] = []
    for name in weights:
        for size in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6):
            ways.append((f"{name} nudged by {size:g}", _nudge(name, size, int(torch.randint(1 << 30, (), generator=draw)))))
        ways.append((f"{name} turned", _turn(name)))
    for name in layers:
        ways.append((f"{name} skipped", _hook(name, lambda args, out: args[0] if args and _like(args[0], out) else out)))
        ways.append((f"{name} transposed", _hook(name, lambda args, out: _swapped(out))))
        for p in (0.5, 0.05):
            ways.append((f"dropout {p} after {name}", _hook(name, lambda args, out, p=p: _map(out, lambda t: functional.dropout(t, p)))))
        for size in (1e-1, 1e-3, 1e-5):
            ways.append((f"state {size:g} kept after {name}", _keep(name, size)))
    return (ways[i] for i in torch.randperm(len(ways), generator=draw).tolist())


def _nudge(name, size, seed):
    def change(model):
        parameter = model.get_parameter(name)
        with torch.no_grad():
            flat = parameter.view(-1)
            at = seed % flat.numel()
            flat[at] += size * (float(parameter.std()) if flat.numel() > 1 else 0) or size

    return change


def _turn(name):
    def change(model):
        parameter = model.get_parameter(name)
        with torch.no_grad():
            square = parameter.ndim > 1 and parameter.shape[0] == parameter.shape[1]
            parameter.copy_(parameter.transpose(0, 1).clone() if square else parameter.flip(0).clone())

    return change


def _hook(name, answer):
    return lambda model: model.get_submodule(name).register_forward_hook(lambda module, args, out: answer(args, out))


def _keep(name, size):
    def change(model):
        held = []

        def add(module, args, out):
            def mix(t):
                last = held.pop() if held else None
                held.append(t.detach())
                return t + size * last.to(t.dtype) if last is not None and last.shape == t.shape else t

            return mix(out) if isinstance(out, torch.Tensor) and out.is_floating_point() else out

        model.get_submodule(name).register_forward_hook(add)

    return change


def _like(a, b):
    return isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.shape == b.shape and a.dtype == b.dtype


def _map(out, change):
    return change(out) if isinstance(out, torch.Tensor) and out.is_floating_point() else out


def _swapped(out):
    if not isinstance(out, torch.Tensor) or out.ndim < 2:
        return out
    pairs = [(i, j) for i in range(out.ndim) for j in range(i) if out.shape[i] == out.shape[j] > 1]
    return out.transpose(*pairs[0]) if pairs else out.flip(-1)
