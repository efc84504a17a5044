"""First divergence: honest exports agree at every layer, and one damaged layer is the one that is named."""

import contextlib
import copy
import io
import logging
import warnings

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
from memory import peak_over_base
from onnx import numpy_helper
from torch import nn

from workbench.errors import BudgetError, SelectionError, UntrustedError
from workbench.verification.layers import first_divergence

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's exporters and quantizer warn of their own future


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.conv2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(x + self.conv2(self.act(self.bn1(self.conv1(x)))))


class CNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.layers = nn.Conv2d(3, 8, 3, padding=1), nn.Sequential(Block(), Block())
        self.pool, self.drop, self.fc = nn.AdaptiveAvgPool2d(1), nn.Dropout(0.3), nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(self.drop(self.pool(self.layers(self.stem(x))).flatten(1)))


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.lstm, self.head = nn.Embedding(20, 8), nn.LSTM(8, 16, 2, batch_first=True, bidirectional=True), nn.Linear(32, 3)

    def forward(self, ids):
        return self.head(self.lstm(self.emb(ids))[0][:, -1])


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.head = nn.Embedding(20, 16), nn.Linear(16, 3)
        self.enc = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2)

    def forward(self, ids):
        return self.head(self.enc(self.emb(ids)).mean(1))


class Twice(nn.Module):
    """One Linear and one Tanh called in a row, and the Tanh a third time elsewhere."""

    def __init__(self):
        super().__init__()
        self.fc, self.act, self.head = nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)

    def forward(self, x):
        return self.head(self.act(self.act(self.fc(self.fc(x))))) + self.act(x)


def batch_for(model):
    generator = torch.Generator().manual_seed(1)
    if isinstance(model, CNN):
        return torch.randn(2, 3, 8, 8, generator=generator)
    return torch.randn(2, 4, generator=generator) if isinstance(model, Twice) else torch.randint(0, 20, (2, 7), generator=generator)


def made(kind):
    torch.manual_seed(0)
    model = kind()
    with torch.no_grad():
        for parameter in model.parameters():  # no two alike: exporters keep one of equal weights
            parameter += 0.02 * torch.randn_like(parameter)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # as a trained one: folding it into a convolution changes that one's output
            nn.init.uniform_(module.weight, 0.5, 2.0)
            nn.init.normal_(module.running_mean)
    return model.eval()


def exported(model, batch, path, exporter="dynamo", **options):
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        if exporter == "classic":
            torch.onnx.export(model, (batch,), str(path), dynamo=False)
        else:
            torch.onnx.export(model, (batch,), str(path), dynamo=True, verbose=False, **{"external_data": False, **options})
    return path


def nudged(path, initializer, *, evenly=False):
    """The file with one weight moved, by the onnx library."""
    model = onnx.load(str(path))
    (tensor,) = [t for t in model.graph.initializer if t.name == initializer]
    value = numpy_helper.to_array(tensor)
    by = 0.05 if evenly else np.linspace(-0.05, 0.05, value.size, dtype=np.float32).reshape(value.shape)
    tensor.CopyFrom(numpy_helper.from_array((value + by).astype(np.float32), initializer))
    out = path.with_name("nudged.onnx")
    onnx.save(model, str(out))
    return out


KINDS = [CNN, Tagger, Encoder, Twice]


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports")
    made_ones = {}
    for kind in KINDS:
        for exporter in ("dynamo", "classic"):
            model = made(kind)
            batch = batch_for(model)
            made_ones[kind, exporter] = model, batch, exported(model, batch, folder / f"{kind.__name__}_{exporter}.onnx", exporter)
    return made_ones


@pytest.mark.parametrize("exporter", ["dynamo", "classic"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_correct_export_agrees_at_every_layer(kind, exporter, exports):
    model, batch, path = exports[kind, exporter]
    report = first_divergence(model, path, batch)
    assert report, report.headline
    assert report.first is None
    assert ("scopes" if exporter == "dynamo" else "names of the nodes") in report.pairing
    assert [layer.name for layer in report.layers][-1] == kind.__name__
    unpaired = {CNN: {"layers.0.conv1", "layers.0.bn1", "layers.1.conv1", "layers.1.bn1", "drop"}}.get(kind, set())
    assert {name for name in report.unpaired if "drop" not in name} <= unpaired
    if exporter == "dynamo":
        assert not [layer for layer in report.layers if layer.note]


@pytest.mark.parametrize("kind", KINDS)
def test_a_graph_that_tells_no_modules_is_paired_by_kind_shape_and_order(kind, exports, tmp_path):
    model, batch, path = exports[kind, "dynamo"]
    graph = onnx.load(str(path))
    for node in graph.graph.node:
        node.name = ""
        del node.metadata_props[:]
    bare = tmp_path / "bare.onnx"
    onnx.save(graph, str(bare))
    report = first_divergence(model, bare, batch)
    assert report, report.headline
    assert "shape and order" in report.pairing
    found = {layer.name for layer in report.layers}
    assert {CNN: {"stem", "fc"}, Tagger: {"emb", "head"}, Encoder: {"head", "enc.layers.1.norm1"}, Twice: {"fc#2", "act#3"}}[kind] <= found


@pytest.mark.parametrize(
    ("kind", "exporter", "initializer", "layer"),
    [
        (CNN, "dynamo", "stem.weight", "stem"),
        (CNN, "dynamo", "layers.0.conv2.weight", "layers.0.conv2"),
        (CNN, "dynamo", "layers.1.conv1.weight", "layers.1.bn1"),  # folded: the pair has one value
        (CNN, "dynamo", "fc.bias", "fc"),
        (CNN, "classic", "layers.1.conv2.weight", "layers.1.conv2"),
        (Tagger, "dynamo", "emb.weight", "emb"),
        (Tagger, "dynamo", "head.weight", "head"),
        (Encoder, "dynamo", "enc.layers.0.self_attn.out_proj.weight", "enc.layers.0.self_attn"),
        (Encoder, "dynamo", "enc.layers.1.norm1.weight", "enc.layers.1.norm1"),
        (Encoder, "classic", "enc.layers.1.linear1.bias", "enc.layers.1.linear1"),
        (Twice, "dynamo", "head.weight", "head"),
        (Twice, "dynamo", "fc.weight", "fc"),
    ],
)
def test_the_layer_whose_weight_was_moved_in_the_file_is_named(kind, exporter, initializer, layer, exports):
    model, batch, path = exports[kind, exporter]
    report = first_divergence(model, nudged(path, initializer), batch)
    assert not report
    assert report.first == layer
    assert report.between
    assert f"first part at {layer} (" in report.headline


def test_a_difference_that_nothing_downstream_sees_is_told_and_fails_nothing(exports):
    """Every output of the projection moves by the same amount, which the LayerNorm after it takes away again."""
    model, batch, path = exports[Encoder, "dynamo"]
    report = first_divergence(model, nudged(path, "enc.layers.0.self_attn.out_proj.bias", evenly=True), batch)
    assert report
    (layer,) = [layer for layer in report.layers if layer.note]
    assert layer.name == "enc.layers.0.self_attn"
    assert layer.max_abs > 100 * layer.limit
    assert "enc.layers.0.self_attn differs" in report.headline


def test_whatever_lies_between_two_layers_is_named_by_its_nodes(exports, tmp_path):
    model, batch, path = exports[CNN, "dynamo"]
    graph = onnx.load(str(path))
    (add, *_) = [node for node in graph.graph.node if node.op_type == "Add"]
    add.op_type = "Sub"
    onnx.save(graph, str(tmp_path / "sub.onnx"))
    report = first_divergence(model, tmp_path / "sub.onnx", batch)
    assert report.first == "layers.0.act#2"
    assert [node.split()[0] for node in report.between] == ["Sub", "Relu"]


@pytest.mark.parametrize("name", ["stem", "layers.0.conv1", "layers.1.bn1", "layers.1.conv2", "fc"])
def test_the_layer_damaged_in_a_copy_is_named(name):
    model = made(CNN)
    damaged = copy.deepcopy(model)
    with torch.no_grad():
        damaged.get_submodule(name).weight.add_(0.01)
    report = first_divergence(model, damaged, batch_for(model))
    assert report.first == name
    assert first_divergence(model, copy.deepcopy(model), batch_for(model))


def test_a_fault_in_a_blocks_own_code_is_the_blocks():
    class Shifted(Block):
        def forward(self, x):
            return self.act(x + self.conv2(self.act(self.bn1(self.conv1(x)))) * 1.01)

    model = made(CNN)
    other = copy.deepcopy(model)
    other.layers[1].__class__ = Shifted
    report = first_divergence(model, other, batch_for(model))
    assert report.first == "layers.1"  # act#2 is past its limit too, and what it was given as well
    assert next(layer.name for layer in report.layers if not layer.ok) == "layers.1.act#2"


def test_a_dynamically_quantized_copy_parts_at_its_first_linear():
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    report = first_divergence(model, quantized, torch.randn(8, 16))
    assert report.first == "1"
    assert [layer.ok for layer in report.layers][:2] == [True, False]
    assert report.unpaired == ()


def test_a_tiny_bert(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, max_position_embeddings=32
    )
    model = transformers.BertModel(config).eval()
    ids = torch.randint(0, 50, (2, 7))
    path = exported(model, ids, tmp_path / "bert.onnx")
    report = first_divergence(model, path, ids)
    assert report, report.headline
    assert {"encoder.layer.0.attention.self.query", "encoder.layer.1", "pooler.activation"} <= {layer.name for layer in report.layers}
    graph = onnx.load(str(path))
    dense = next(n for n in graph.graph.node if "encoder.layer.1.intermediate.dense" in str(n.metadata_props) and n.op_type == "MatMul")
    assert first_divergence(model, nudged(path, dense.input[1]), ids).first == "encoder.layer.1.intermediate.dense"


def test_external_data_beside_the_file_is_read(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)).eval()
    path = exported(model, torch.randn(2, 64), tmp_path / "m.onnx", external_data=True)
    assert path.with_name("m.onnx.data").stat().st_size > 50_000
    monkeypatch.chdir("/")
    before = path.read_bytes()
    assert first_divergence(model, path, torch.randn(2, 64))
    assert path.read_bytes() == before


def test_everything_is_given_back_as_it_was():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.register_buffer("seen", torch.zeros(1))

        def forward(self, x):
            self.seen += 1
            self.latest = self.fc(x) + self.seen
            if self.seen > 1:
                raise RuntimeError("kept state")
            return self.latest

    for model in (Odd().train(), made(CNN).train()):
        batch = torch.randn(2, 4) if isinstance(model, Odd) else batch_for(model)
        kept, keys = batch.clone(), {key: value.clone() for key, value in model.state_dict().items()}
        assert first_divergence(model, copy.deepcopy(model), batch)
        with pytest.raises(SelectionError, match="does not run"):
            first_divergence(model, copy.deepcopy(model), torch.randn(3))
        assert all(module.training for module in model.modules())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        assert not hasattr(model, "latest")
        assert all(torch.equal(value, keys[key]) for key, value in model.state_dict().items())
        assert torch.equal(batch, kept)


def test_a_candidate_that_fails_is_a_finding_and_what_it_reached_is_compared():
    class Breaks(nn.ReLU):
        def forward(self, x):
            raise ValueError("no kernel")

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    broken = nn.Sequential(copy.deepcopy(model[0]), Breaks(), copy.deepcopy(model[2]))
    report = first_divergence(model, broken, torch.randn(2, 4))
    assert not report
    assert [(layer.name, layer.ok) for layer in report.layers] == [("0", True)]
    assert "no kernel" in report.headline
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in broken.modules())


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_the_saved_inputs_reproduce_the_difference(ending, tmp_path):
    model = made(CNN)
    damaged = copy.deepcopy(model)
    with torch.no_grad():
        damaged.layers[1].conv1.weight.mul_(1.01)
    report = first_divergence(model, damaged, batch_for(model), save=tmp_path / f"bug.{ending}")
    assert report.saved == str(tmp_path / f"bug.{ending}")
    held = torch.load(report.saved, weights_only=True) if ending == "pt" else safetensors.torch.load_file(report.saved)
    assert sorted(held) == ["candidate", "input.0", "reference"]
    with torch.no_grad():
        ours, theirs = model.layers[1].conv1(held["input.0"]), damaged.layers[1].conv1(held["input.0"])
    assert torch.equal(ours, held["reference"])
    row = next(layer for layer in report.layers if layer.name == report.first == "layers.1.conv1")
    assert (held["candidate"].double() - held["reference"].double()).abs().max() == pytest.approx(row.max_abs)
    torch.testing.assert_close(theirs, held["candidate"], rtol=1e-6, atol=1e-6)


def test_a_layer_of_a_graph_is_saved_too(exports, tmp_path):
    model, batch, path = exports[Encoder, "dynamo"]
    report = first_divergence(model, nudged(path, "enc.layers.1.norm1.weight"), batch, save=tmp_path / "bug.pt")
    held = torch.load(tmp_path / "bug.pt", weights_only=True)
    norm = copy.deepcopy(model.enc.layers[1].norm1)
    with torch.no_grad():
        assert torch.equal(norm(held["input.0"]), held["reference"])
        norm.weight += torch.linspace(-0.05, 0.05, 16)
        torch.testing.assert_close(norm(held["input.0"]), held["candidate"], rtol=1e-5, atol=1e-5)
    assert report.saved


class Parts(nn.Module):
    def __init__(self):
        super().__init__()
        self.act, self.parts = nn.GELU(), nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))

    def forward(self, x):
        return self.act(self.parts(self.act(x)))


def test_a_pt2_is_searched_under_the_trust_rule_alone(tmp_path):
    torch.manual_seed(0)
    model, x, path = Parts().eval(), torch.randn(3, 4), tmp_path / "m.pt2"
    torch.export.save(torch.export.export(model, (x,)), path)
    with pytest.raises(UntrustedError, match="did not write"):
        first_divergence(model, path, x)
    report = first_divergence(model, path, x, trust=True)
    assert report
    assert [layer.name for layer in report.layers] == ["act", "parts.0", "parts.1", "parts", "act#2", "Parts"]
    bad = copy.deepcopy(model)
    with torch.no_grad():
        bad.parts[1].weight[0] += 0.01
    torch.export.save(torch.export.export(bad, (x,)), path)
    report = first_divergence(model, path, x, trust=True, save=tmp_path / "bug.pt")
    assert (report.first, report.candidate) == ("parts.1", "m.pt2")
    assert torch.equal(torch.load(tmp_path / "bug.pt", weights_only=True)["input.0"], model.parts[0](model.act(x)))


def test_the_figure_names_each_layer_and_marks_those_past_their_limit():
    torch.manual_seed(0)
    model, bad = Parts().eval(), Parts().eval()
    bad.load_state_dict(model.state_dict())
    with torch.no_grad():
        bad.parts[1].weight[0] += 0.01
    report = first_divergence(model, bad, torch.randn(3, 4))
    (axes,) = report.plot().axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [layer.name for layer in report.layers]
    assert [line.get_marker() for line in axes.lines if line.get_marker() in "oX"] == [
        "X" if not layer.ok else "o" for layer in report.layers
    ]
    assert axes.get_xscale() == "log"


def test_what_cannot_be_tapped_is_refused(tmp_path):
    model = nn.Linear(4, 4)
    torch.jit.script(model).save(tmp_path / "m.pt")
    with pytest.raises(UntrustedError):
        first_divergence(model, tmp_path / "m.pt", torch.randn(2, 4))
    for candidate in (torch.jit.script(model), tmp_path / "m.pt", lambda x: x):
        with pytest.raises(SelectionError, match="no layers to tap"):
            first_divergence(model, candidate, torch.randn(2, 4), trust=True)
    with pytest.raises(SelectionError, match="2 batches"):
        first_divergence(model, model, [torch.randn(2, 4), torch.randn(2, 4)])
    with pytest.raises(SelectionError, match="pairs with"):
        first_divergence(model, nn.Linear(4, 3), torch.randn(2, 4))
    with pytest.raises(BudgetError, match="alone takes") as refused:
        first_divergence(model, model, torch.randn(50_000, 4), max_ram_mb=1)
    assert "max_ram_mb=" in refused.value.hint


_BEFORE = """
import copy
from torch import nn
from workbench.verification.layers import first_divergence
class Add(nn.Module):
    def __init__(self, by): super().__init__(); self.by = nn.Parameter(torch.tensor(by))
    def forward(self, x): return x + self.by
model = nn.Sequential(*[Add(0.1 * i) for i in range(16)])
first_divergence(model[0], model[0], torch.randn(2**20))
x = torch.randn(2**20)
if len(sys.argv) > 2:
    import logging, warnings; warnings.simplefilter("ignore"); logging.disable(50)
    torch.onnx.export(nn.Sequential(model[0]), (x,), sys.argv[2], dynamo=False)
    first_divergence(nn.Sequential(model[0]), sys.argv[2], x)
    torch.onnx.export(model, (x,), sys.argv[2], dynamo=False)
"""
_CODE = "assert first_divergence(model, {candidate}, x, max_ram_mb=int(sys.argv[1]))"


@pytest.mark.parametrize("cap", [250])
@pytest.mark.parametrize("candidate", ["copy.deepcopy(model)", "sys.argv[2]"])
def test_what_is_held_at_once_stays_under_the_cap(candidate, cap, tmp_path):
    """16 layers of 4 MB: in float64, reordered and as they are they would hold 270 MB, and with work space 450."""
    onnx_file = [tmp_path / "m.onnx"] if "argv" in candidate else []
    assert peak_over_base(_BEFORE, _CODE.format(candidate=candidate), cap, *onnx_file) <= cap
