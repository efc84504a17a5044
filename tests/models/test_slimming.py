"""Thin models: what the recipe rebuilds in another process is what was saved, bit for bit, or slimming is refused with the reason."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import workbench as wb
from workbench.errors import MissingDependencyError, SelectionError, SpecMismatchError, UnsupportedError


class Residual(nn.Module):
    """A residual block with BatchNorm, a depthwise and a grouped convolution."""

    def __init__(self):
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.wide, self.bn2 = nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.depthwise, self.grouped = nn.Conv2d(32, 32, 3, padding=1, groups=32), nn.Conv2d(32, 32, 1, groups=4)
        self.back, self.norm, self.head = nn.Conv2d(32, 16, 1), nn.GroupNorm(4, 16), nn.Linear(16, 10)

    def forward(self, x):
        x = torch.relu(self.bn(self.stem(x)))
        y = torch.relu(self.grouped(torch.relu(self.depthwise(torch.relu(self.bn2(self.wide(x)))))))
        return self.head(self.norm(x + self.back(y)).mean((2, 3)))


class Tied(nn.Module):
    """An embedding whose weight is the last layer's too."""

    def __init__(self):
        super().__init__()
        self.embed, self.up, self.down, self.out = nn.Embedding(20, 16), nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 20, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x):
        x = self.embed(x)
        return self.out(x + self.down(torch.relu(self.up(x))))


def mlp():
    return nn.Sequential(nn.Linear(12, 40), nn.BatchNorm1d(40), nn.ReLU(), nn.Linear(40, 24), nn.LayerNorm(24), nn.Linear(24, 5))


def encoder():
    return nn.Sequential(nn.Linear(6, 16), nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), nn.Linear(16, 3))


def bert(head=True):
    from transformers import BertConfig, BertForSequenceClassification, BertModel

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 50}
    config = BertConfig(**sizes, max_position_embeddings=16)
    return (BertForSequenceClassification if head else BertModel)(config)


def vit():
    from transformers import ViTConfig, ViTModel

    return ViTModel(
        ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=16, patch_size=4)
    )


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=50, max_position_embeddings=16, use_cache=False))


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=16, use_cache=False))


IDS = {"input_ids": torch.arange(16).view(2, 8)}
MODELS = {
    "residual": (Residual, torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))),
    "mlp": (mlp, torch.randn(4, 12, generator=torch.Generator().manual_seed(0))),
    "tied": (Tied, torch.arange(12).view(2, 6)),
    "encoder": (encoder, torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))),
    "bert": (bert, IDS),
    "vit": (vit, {"pixel_values": torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))}),
    "llama": (llama, IDS),
    "gpt2": (gpt2, IDS),
}


def made(name):
    torch.manual_seed(0)
    factory, example = MODELS[name]
    return factory().eval(), example


def run(model, example):
    with torch.no_grad():
        out = model(**example) if isinstance(example, dict) else model(example)
    return out if isinstance(out, torch.Tensor) else out[0]


REBUILD = """
import sys, torch
sys.modules["torch_pruning"] = None  # loading needs no pruner
torch.set_num_threads(1)  # as in the tests: threads add up in another order
sys.path.insert(0, sys.argv[1])
import workbench as wb
from test_slimming import MODELS, run
for name in sys.argv[3:]:
    torch.manual_seed(123)
    factory, example = MODELS[name]
    torch.save(run(wb.models.load_slim(factory, f"{sys.argv[2]}/{name}.safetensors"), example), f"{sys.argv[2]}/{name}.out.pt")
"""
NOTHING = {"gpt2"}  # its layers are transformers' Conv1D, which the pruner does not know


@pytest.fixture(scope="module")
def thinned(tmp_path_factory):
    """name -> its report; and the folder of what one other process computed with the saved models."""
    folder, reports = tmp_path_factory.mktemp("thin"), {}
    for name in MODELS:
        reports[name] = wb.models.slim(*made(name), 0.5)
        wb.models.save_slim(reports[name].model, folder / f"{name}.safetensors")
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", REBUILD, str(Path(__file__).parent), str(folder), *MODELS], check=True, timeout=300
    )
    return reports, folder


@pytest.mark.parametrize("name", MODELS)
def test_a_thin_model_comes_back_in_a_new_process_bit_for_bit(name, thinned):
    report, folder = thinned[0][name], thinned[1]
    model, example = made(name)
    thin = run(report.model, example)
    assert thin.shape == run(model, example).shape
    assert torch.equal(torch.load(folder / f"{name}.out.pt", weights_only=True), thin)
    assert bool(report) == (name not in NOTHING)
    if report:
        assert report.parameters[1] < 0.8 * report.parameters[0]
        assert (folder / f"{name}.safetensors").stat().st_size < sum(value.nbytes for value in model.state_dict().values())
        assert "trained back" in report.headline


def test_the_model_given_stays_as_it_is():
    model, example = made("residual")
    before = copy.deepcopy(model.state_dict())
    wb.models.slim(model.train(), example, 0.5)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_depthwise_and_grouped_layers_and_heads_say_so_in_their_attributes(thinned):
    model = thinned[0]["residual"].model
    assert (model.depthwise.groups, model.depthwise.out_channels, model.grouped.groups, model.bn.num_features) == (16, 16, 4, 8)
    attention = thinned[0]["bert"].model.bert.encoder.layer[0].attention.self
    assert (attention.num_attention_heads, attention.all_head_size, attention.attention_head_size) == (2, 16, 8)
    assert thinned[0]["tied"].model.out.weight is thinned[0]["tied"].model.embed.weight
    whole = thinned[0]["llama"].model.model.layers[0].self_attn
    assert (whole.q_proj.out_features, whole.k_proj.out_features) == (32, 16)  # queries that share keys are left whole


def test_whole_heads_go_and_not_parts_of_them(thinned):
    kept = thinned[0]["vit"].model.__dict__["workbench.slim"][0]["kept"]
    for index in (dims[0] for name, dims in kept.items() if "q_proj.weight" in name):
        heads = sorted({i // 8 for i in index})
        assert index == [i for head in heads for i in range(8 * head, 8 * head + 8)]
        assert len(heads) == 2


def test_the_weakest_channels_go():
    model, x = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).eval(), torch.randn(3, 4)
    with torch.no_grad():
        model[0].weight[[1, 3, 4]] *= 1e-3
        model[2].weight[:, [1, 3, 4]] *= 1e-3
    thin = wb.models.slim(model, x, 0.5).model
    assert torch.equal(thin[0].weight, model[0].weight[[0, 2, 5]])
    assert torch.equal(thin[2].weight, model[2].weight[:, [0, 2, 5]])


def test_slimming_again_and_training_between_is_saved_too(tmp_path):
    model, x = made("residual")
    thin = wb.models.slim(model, x, 0.25).model.train()
    optimizer = torch.optim.SGD(thin.parameters(), 0.1)
    thin(x).square().sum().backward()
    optimizer.step()
    thinner = wb.models.slim(thin, x, 0.25).model
    wb.models.save_slim(thinner, tmp_path / "twice.safetensors")
    back = wb.models.load_slim(Residual, tmp_path / "twice.safetensors")
    assert torch.equal(run(back, x), run(thinner, x))
    assert back.wide.out_channels < 24
    wb.models.save_slim(copy.deepcopy(back), tmp_path / "again.safetensors")
    assert torch.equal(run(wb.models.load_slim(Residual, tmp_path / "again.safetensors"), x), run(thinner, x))


def test_the_recipe_of_a_model_slimmed_twice_leads_back_to_the_original_channels():
    model, x = made("residual")
    thinner = wb.models.slim(wb.models.slim(model, x, 0.25).model, x, 0.25).model
    first, second = (step["kept"]["stem.weight"][0] for step in thinner.__dict__["workbench.slim"])
    assert torch.equal(thinner.stem.weight, model.stem.weight[[first[i] for i in second]])


def test_ignored_modules_and_frozen_ones():
    model, x = made("mlp")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    report = wb.models.slim(model, x, 0.5, ignore="0")
    assert (report.model[0].out_features, report.model[3].out_features) == (40, 12)
    assert not any(p.requires_grad for p in report.model.parameters())


class FixedView(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.b(self.a(x).view(len(x), 8))


def test_a_model_that_cannot_be_followed_is_refused_with_the_reason():
    with pytest.raises(UnsupportedError, match="cannot follow"):
        wb.models.slim(FixedView(), torch.randn(2, 4), 0.5)
    with pytest.raises(UnsupportedError, match="lazy"):
        wb.models.slim(nn.Sequential(nn.LazyLinear(4)), torch.randn(2, 4), 0.5)
    with pytest.raises(SelectionError, match="fraction"):
        wb.models.slim(mlp(), torch.randn(2, 12), 3)


def test_without_the_pruner_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(MissingDependencyError, match=r"checkpoint-workbench\[compress\]"):
        wb.models.slim(mlp(), torch.randn(2, 12), 0.5)


# files


def changed(path, change):
    """The file with another recipe."""
    ckpt = wb.open(path)
    told = json.loads(ckpt.metadata["workbench.slim"])
    change(told)
    from safetensors.torch import load_file, save_file

    save_file(load_file(path), path, {**ckpt.metadata, "workbench.slim": json.dumps(told)})
    return path


def first(told):
    return next(iter(told["steps"][0]["kept"].items()))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.update(format=2), "format"),
        (lambda t: t.pop("indices"), "indices"),
        (lambda t: first(t)[1].update({"0": 99}), "cannot be read"),
        (lambda t: t["indices"].__setitem__(first(t)[1]["0"], [0, 10**6]), "does not have"),
        (lambda t: t["indices"].__setitem__(first(t)[1]["0"], ["0", 1]), "does not have"),
        (lambda t: t["indices"].__setitem__(first(t)[1]["0"], [1, 1]), "does not have"),
        (lambda t: t["indices"].__setitem__(first(t)[1]["0"], [-1, 0]), "does not have"),
        (lambda t: t["steps"][0]["kept"].update({"x": {}}), "the class does not have"),
        (lambda t: t["steps"][0]["kept"].update({first(t)[0]: {}}), "not those of the class"),
        (lambda t: t["steps"][0]["attributes"]["0"].update(forward=1), "no size in the class"),
        (lambda t: t["steps"][0]["attributes"]["0"].update(training=1), "no size in the class"),
        (lambda t: t["steps"][0]["attributes"]["0"].update(out_features="x"), "no size in the class"),
        (lambda t: t["steps"][0]["attributes"]["0"].update(out_features=[3]), "no size in the class"),
        (lambda t: t["steps"][0]["attributes"].update({"0.weight": {"x": 1}}), "no size in the class"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused(change, said, tmp_path):
    model, x = made("mlp")
    wb.models.save_slim(wb.models.slim(model, x, 0.5).model, tmp_path / "thin.safetensors")
    with pytest.raises((SelectionError, SpecMismatchError), match=said):
        wb.models.load_slim(mlp, changed(tmp_path / "thin.safetensors", change))


def test_another_class_another_dtype_and_a_file_without_a_recipe_are_refused(tmp_path):
    model, x = made("mlp")
    wb.models.save_slim(wb.models.slim(model, x, 0.5).model, tmp_path / "thin.safetensors")
    with pytest.raises(SpecMismatchError):
        wb.models.load_slim(Residual, tmp_path / "thin.safetensors")
    with pytest.raises(SpecMismatchError, match="float32"):
        wb.models.load_slim(lambda: mlp().half(), tmp_path / "thin.safetensors")
    with pytest.raises(SelectionError, match="no recipe"):
        wb.models.save_slim(model, tmp_path / "fat.safetensors")
    wb.save(model, tmp_path / "fat.safetensors")
    with pytest.raises(SelectionError, match="no recipe"):
        wb.models.load_slim(mlp, tmp_path / "fat.safetensors")
