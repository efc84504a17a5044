"""Each cause of a file that did not shrink, on a case built for it; and none where all is well."""

import gzip
import io
import zipfile

import pytest
import torch
import zstandard
from torch import nn
from torch.nn.utils import prune

import workbench as wb
from workbench.compression import explain_size

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.ao.quantization is deprecated", "ignore:Sparse CSR tensor support", "ignore:torch.quantize"
)


def kinds(before, after):
    report = explain_size(before, after)
    assert all(cause.nbytes > 0 and cause.message and cause.cure for cause in report.causes)
    assert all(cause.kind in str(report) for cause in report.causes)
    assert bool(report) == (not report.causes)
    return [cause.kind for cause in report.causes]


def saved(value, path):
    torch.save(value, path)
    return path


@pytest.fixture
def state():
    torch.manual_seed(0)
    return {
        "embed.weight": torch.randn(400, 128),
        "fc.weight": torch.randn(128, 512),
        "head.weight": torch.randn(64, 128),
        "head.bias": torch.randn(64),
    }


@pytest.fixture
def before(state, tmp_path):
    return saved(state, tmp_path / "before.pt")


@pytest.mark.parametrize(
    "scheme",
    ["int8", "int4", "float8_e4m3fn", "bfloat16", {"scheme": "int8", "symmetric": False}, {"scheme": "int4", "group_size": 64}],
    ids=str,
)
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_nothing_is_told_of_a_file_that_shrank(before, tmp_path, scheme, suffix):
    wb.save(wb.ops.quantize(wb.open(before), scheme), tmp_path / f"after.{suffix}")
    assert kinds(before, tmp_path / f"after.{suffix}") == []


def test_nothing_is_told_of_a_slimmer_model_or_of_torch_quantization(before, state, tmp_path):
    thin = {name: t[: len(t) // 2].clone() for name, t in state.items()}
    assert kinds(before, saved(thin, tmp_path / "thin.pt")) == []
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 64))
    small = torch.ao.quantization.quantize_dynamic(model)
    assert kinds(saved(model.state_dict(), tmp_path / "a.pt"), saved(small.state_dict(), tmp_path / "b.pt")) == []


def test_zeros_take_the_room_of_numbers(before, tmp_path):
    wb.save(wb.ops.prune(wb.open(before), 0.8), tmp_path / "after.pt")
    assert kinds(before, tmp_path / "after.pt") == ["pruned but dense"]
    (cause,) = explain_size(before, tmp_path / "after.pt").causes
    assert cause.nbytes == pytest.approx(0.8 * 4 * (400 * 128 + 128 * 512 + 64 * 128), rel=1e-3)


def test_masks_lie_beside_their_weights(tmp_path):
    model = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 64))
    before = saved(model.state_dict(), tmp_path / "before.pt")
    for layer in model:
        prune.l1_unstructured(layer, "weight", amount=0.5)
    after = saved(model.state_dict(), tmp_path / "after.pt")
    assert kinds(before, after) == ["masks kept"]
    assert explain_size(before, after).causes[0].nbytes == 4 * (256 * 256 + 256 * 64)


def test_four_bits_in_a_byte(before, state, tmp_path):
    codes = {}
    for name in ("embed.weight", "fc.weight", "head.weight"):
        scale = state[name].abs().amax(1, keepdim=True) / 7
        codes |= {name: (state[name] / scale).round().to(torch.int8), f"{name}_scale": scale}
    assert kinds(before, saved(codes, tmp_path / "after.pt")) == ["int4 kept in int8"]


def test_scales_of_tiny_groups(before, tmp_path):
    wb.save(wb.ops.quantize(wb.open(before), {"scheme": "int4", "group_size": 8}), tmp_path / "after.pt")
    assert kinds(before, tmp_path / "after.pt") == ["small groups"]


def test_most_of_it_was_left_out(before, tmp_path):
    wb.save(wb.ops.quantize(wb.open(before), "int4", names=["head.weight", "fc.weight"]), tmp_path / "after.pt")
    assert kinds(before, tmp_path / "after.pt") == ["most was left out"]
    assert "embed.weight" in explain_size(before, tmp_path / "after.pt").headline


def test_training_state_lies_in_the_file(tmp_path):
    model = nn.Linear(256, 256)
    before = saved(model.state_dict(), tmp_path / "before.pt")
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(2, 256)).sum().backward()
    optimizer.step()
    small = {"model": {n: t.half() for n, t in model.state_dict().items()}, "optimizer": optimizer.state_dict()}
    assert kinds(before, saved(small, tmp_path / "after.pt")) == ["optimizer state kept"]
    averaged = {
        "model": {n: t.half() for n, t in model.state_dict().items()},
        "ema": {n: t.half() * 0.9 for n, t in model.state_dict().items()},
    }
    assert kinds(before, saved(averaged, tmp_path / "ema.pt")) == ["averaged weights kept"]
    assert kinds(before, saved({"ema": averaged["ema"]}, tmp_path / "only.pt")) == []


def test_a_float32_master_copy_lies_beside(before, state, tmp_path):
    both = {"model": {n: t.bfloat16() for n, t in state.items()}, "master": state}
    assert "float32 copies kept" in kinds(before, saved(both, tmp_path / "after.pt"))
    packed = {**{n: t.load() for n, t in wb.ops.quantize(wb.open(state), "int4").items()}, "fc.weight": state["fc.weight"]}
    assert "float32 copies kept" in kinds(before, saved(packed, tmp_path / "packed.pt"))


def test_a_tie_was_broken(tmp_path):
    weight = torch.randn(256, 128)
    before = saved({"embed.weight": weight, "head.weight": weight}, tmp_path / "before.pt")
    after = saved({"embed.weight": weight.half(), "head.weight": weight.half()}, tmp_path / "after.pt")
    assert kinds(before, after) == ["ties broken"]
    wb.save(wb.ops.quantize(wb.open(before), "int4"), tmp_path / "tied.pt")
    assert kinds(before, tmp_path / "tied.pt") == []


@pytest.mark.parametrize("pack", [lambda b: zstandard.ZstdCompressor().compress(b), gzip.compress], ids=["zstd", "gzip"])
def test_packing_does_not_help_floats(before, tmp_path, pack):
    (tmp_path / "after.pt.packed").write_bytes(pack(before.read_bytes()))
    assert kinds(before, tmp_path / "after.pt.packed") == ["packing does not help"]
    zeros = saved({"w": torch.zeros(512, 512)}, tmp_path / "zeros.pt")
    (tmp_path / "zeros.packed").write_bytes(pack(zeros.read_bytes()))
    assert kinds(zeros, tmp_path / "zeros.packed") == []


def test_a_deflated_archive_does_not_help_either(before, tmp_path):
    with zipfile.ZipFile(before) as source, zipfile.ZipFile(tmp_path / "after.pt", "w", zipfile.ZIP_DEFLATED) as out:
        for name in source.namelist():
            out.writestr(name, source.read(name))
    assert kinds(before, tmp_path / "after.pt") == ["packing does not help"]


def test_sparse_tensors_of_half_zeros_are_larger(tmp_path):
    weight = torch.randn(256, 256)
    weight[torch.rand(256, 256) < 0.5] = 0
    before = saved({"fc.weight": weight}, tmp_path / "before.pt")
    buffer = io.BytesIO()
    torch.save({"fc.weight": weight.to_sparse_csr()}, buffer)
    (tmp_path / "after.pt").write_bytes(buffer.getvalue())
    assert "sparse is larger than dense" in kinds(before, tmp_path / "after.pt")
    csr = (weight * (torch.rand(256, 256) < 0.05)).to_sparse_csr()
    few = torch.sparse_csr_tensor(
        csr.crow_indices().int(), csr.col_indices().to(torch.int32), csr.values().clone(), (256, 256), check_invariants=True
    )
    assert kinds(before, saved({"fc.weight": few}, tmp_path / "few.pt")) == []


def test_small_files_are_container(tmp_path):
    before = saved({f"layer{i}.weight": torch.randn(4, 4) for i in range(20)}, tmp_path / "before.pt")
    wb.save(wb.ops.quantize(wb.open(before)), tmp_path / "after.pt")
    assert kinds(before, tmp_path / "after.pt")[0] == "mostly container"


def test_nothing_was_quantized(before, tmp_path):
    wb.save(wb.open(before), tmp_path / "after.pt")
    assert kinds(before, tmp_path / "after.pt") == ["0 ops quantized"]
    recurrent = nn.GRU(64, 64)
    untouched = torch.ao.quantization.quantize_dynamic(recurrent)
    assert kinds(saved(recurrent.state_dict(), tmp_path / "a.pt"), saved(untouched.state_dict(), tmp_path / "b.pt")) == ["0 ops quantized"]


def test_views_drag_their_storage(before, state, tmp_path):
    whole = torch.randn(4096, 128)
    after = saved({"embed.weight": whole[:100].half(), "head.weight": whole[:10]}, tmp_path / "after.pt")
    assert "views drag storages" in kinds(before, after)


def test_gemms_are_left_by_four_bits(tmp_path):
    onnx = pytest.importorskip("onnx")
    weight = torch.randn(256, 256)
    nodes = [onnx.helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)]
    value = [onnx.helper.make_tensor_value_info(n, 1, [None, 256]) for n in "xy"]
    graph = onnx.helper.make_graph(nodes, "g", value[:1], value[1:], [onnx.numpy_helper.from_array(weight.numpy(), "w")])
    before = tmp_path / "before.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10), before)
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(onnx.load(before), block_size=32, is_symmetric=True)
    quantizer.process()
    quantizer.model.save_model_to_file(str(tmp_path / "after.onnx"))
    assert kinds(before, tmp_path / "after.onnx") == ["Gemm untouched"]
    for method in ("onnx_dynamic", "onnx_4bit"):
        wb.models.quantize(before, method, path=tmp_path / "good.onnx")
        assert kinds(before, tmp_path / "good.onnx") == []
