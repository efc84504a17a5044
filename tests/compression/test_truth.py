"""Predictions against files that were written, and what is measured against what torch, onnxruntime and zstandard say."""

import os

import pytest
import torch
import zstandard
from torch import nn

import workbench as wb
from workbench.compression import Prediction, measure, predict
from workbench.errors import SelectionError


def packed(path, level):
    return len(zstandard.ZstdCompressor(level=level).compress(path.read_bytes()))


@pytest.fixture(scope="module")
def ckpt():
    torch.manual_seed(0)
    tied = torch.randn(256, 128)
    return wb.open(
        {
            "embed.weight": tied,
            "head.weight": tied,
            "conv.weight": torch.randn(32, 16, 3, 3),
            "fc.weight": torch.randn(64, 256),
            "norm": torch.ones(64),
        }
    )


OPS = {
    "as it is": lambda c: c,
    "int8": wb.ops.quantize,
    "int4": lambda c: wb.ops.quantize(c, "int4", group_size=16, symmetric=False),
    "float8": lambda c: wb.ops.quantize(c, "float8_e5m2", per="tensor"),
    "bfloat16": lambda c: wb.ops.cast(c, "bfloat16"),
    "pruned": lambda c: wb.ops.prune(c, 0.5),
}


FILES = ("a.safetensors", "a longer name than usual.pt", "a.gguf")


@pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op in OPS for name in FILES[: 2 if op in ("float8", "int4") else 3]]
)  # no GGUF types
def test_files_of_our_own_are_predicted_to_the_byte(ckpt, tmp_path, op, name):
    made = OPS[op](ckpt)
    found = predict(made, tmp_path / name)
    assert not (tmp_path / name).exists()
    wb.save(made, tmp_path / name)
    assert found.exact
    assert found.nbytes == (tmp_path / name).stat().st_size
    assert found.nbytes == found.tensors + found.container
    if name.endswith("safetensors"):
        assert found.tensors == made.nbytes


def test_a_dry_run_says_what_would_be_written(ckpt, tmp_path):
    report = wb.save(ckpt, tmp_path / "x.pt", dry_run=True)
    assert "would be written" in report.headline
    assert not list(tmp_path.iterdir())
    assert wb.save(ckpt, tmp_path / "x.pt").nbytes == report.nbytes
    assert predict(ckpt, "safetensors", scheme="int8").nbytes == predict(wb.ops.quantize(ckpt)).nbytes
    assert predict(wb.ops.quantize(ckpt, "int8"), "torch-zip").exact


LARGE = {
    "trained": lambda: torch.randn(2000, 1500) * 0.02,
    "half": lambda: torch.randn(2500, 2500).half(),
    "pruned": lambda: torch.where(torch.rand(2000, 1500) < 0.8, 0.0, torch.randn(2000, 1500)),
    "blocks of zeros": lambda: torch.randn(2000, 1500) * (torch.arange(2000) % 500 < 250)[:, None],
    "few levels": lambda: torch.randn(2000, 1500).mul(3).round() / 3,
}


@pytest.mark.parametrize("kind", LARGE)
@pytest.mark.parametrize(("suffix", "level"), [("safetensors", 3), ("pt", 9)])
def test_packing_is_predicted_by_samples(tmp_path, kind, suffix, level):
    torch.manual_seed(1)
    path = tmp_path / f"m.{suffix}"
    value = wb.open({"a.weight": LARGE[kind](), "b.bias": torch.randn(100)})
    made = wb.ops.quantize(value, names=["a.weight"]) if kind == "pruned" else value
    found = predict(made, path, zstd=level)
    wb.save(made, path)
    assert found.zstd == pytest.approx(packed(path, level), rel=0.05)
    assert "packed by zstd" in found.headline


def test_the_weights_of_a_torch_quantization_are_predicted(tmp_path):
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10)).eval()
    for method in ("dynamic", "weight_only"):
        report = wb.models.quantize(model, method)
        assert abs(predict(model, "m.pt", scheme="int8").nbytes - report.nbytes_after) <= max(4096, 0.02 * report.nbytes_after), method


@pytest.mark.slow
def test_graphs_are_predicted_within_four_kilobytes_or_two_percent(tmp_path, net):
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), 2).eval()
    mlp = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)).eval()
    for model, inputs in ((net, torch.rand(2, 1, 8, 8)), (encoder, torch.rand(2, 5, 64)), (mlp, torch.rand(2, 64))):
        wb.export_model(model, inputs, path=tmp_path / "m.onnx")
        for method in ("onnx_dynamic", "onnx_static", "onnx_4bit"):
            found = predict(tmp_path / "m.onnx", "q.onnx", method=method)
            wb.models.quantize(tmp_path / "m.onnx", method, data=[inputs], path=tmp_path / "q.onnx")
            real = os.path.getsize(tmp_path / "q.onnx")
            assert abs(found.nbytes - real) <= max(4096, 0.02 * real), (type(model), method, found.nbytes, real)
            assert not found.exact
    assert predict(tmp_path / "m.onnx", "same.onnx").nbytes == os.path.getsize(tmp_path / "m.onnx")
    with pytest.raises(SelectionError, match="no method"):
        predict(tmp_path / "m.onnx", "same.onnx", method="int3")


def test_what_was_predicted_stands_beside_what_was_measured(tmp_path, net, data):
    torch.save(net.state_dict(), tmp_path / "fp32.pt")
    small = wb.ops.quantize(wb.open(tmp_path / "fp32.pt"))
    wb.save(small, tmp_path / "int8.safetensors")
    noisy = lambda images: net(images) + 0.01  # noqa: E731
    variants = {"fp32": (net, tmp_path / "fp32.pt"), "int8": tmp_path / "int8.safetensors", "planned": small, "noisy": noisy}
    report = measure(variants, (data.test_images[:64], data.test_labels[:64]), batches=(1, 8, 16), predicted={"noisy": 7})
    fp32, int8, planned, noisy_row = report.rows
    assert int8.predicted == int8.variant.disk_nbytes == (tmp_path / "int8.safetensors").stat().st_size == planned.predicted
    assert int8.words[0] == "the file has the bytes that were predicted"
    assert int8.zstd == pytest.approx(packed(tmp_path / "int8.safetensors", 3), abs=64)
    assert fp32.predicted == predict(net, tmp_path / "fp32.pt").nbytes
    gap = fp32.variant.disk_nbytes - fp32.predicted
    assert f"{gap} bytes more than predicted" in fp32.words[0]
    assert f"+0 bytes are values, {gap:+d} index" in fp32.words[0]
    assert "never written" in planned.words[0]
    assert fp32.variant.seconds.keys() == {1, 8, 16}
    assert fp32.variant.accuracy > 0.9
    assert noisy_row.variant.max_abs == pytest.approx(0.01, rel=1e-3)
    assert noisy_row.predicted == 7
    assert "predicted" in str(report)
    bars, scores = report.figures()
    assert "predicted" in {axes.get_xlabel() for axes in bars.axes}
    assert scores.axes[0].get_yscale() == "linear"


def test_without_data_everything_is_weighed(tmp_path, ckpt):
    wb.save(ckpt, tmp_path / "a.pt")
    report = measure({"a": tmp_path / "a.pt"}, zstd=None)
    assert (report.rows[0].zstd, report.rows[0].predicted) == (None, (tmp_path / "a.pt").stat().st_size)
    assert report.rows[0].variant.seconds == {}
    told = measure({"a": tmp_path / "a.pt"}, predicted={"a": Prediction("a", 5, 5)})
    assert f"{(tmp_path / 'a.pt').stat().st_size - 10} bytes more than predicted" in told.rows[0].words[0]
    dragging = wb.open({"w": torch.randn(1000, 10)[:10]})
    wb.save(dragging, tmp_path / "view.pt")
    told = measure({"view": tmp_path / "view.pt"}, predicted={"view": predict(dragging, "view.safetensors")}).rows[0]
    assert "+39600 bytes are values" in told.words[0]
