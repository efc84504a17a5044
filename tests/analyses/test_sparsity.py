"""Zeros and storage forms, against torch's own layouts and zstandard."""

import io
import math

import pytest
import torch
import zstandard
from hypothesis import given
from strategies import TORCH_DTYPES, tensors
from torch.nn.utils import prune

import workbench as wb
from workbench.errors import MissingDependencyError, SelectionError

pytestmark = [pytest.mark.filterwarnings("ignore:Sparse")]  # torch announces that its CSR is in beta


def pruned(shape, amount, seed=0):
    module = torch.nn.Module()
    module.register_parameter("w", torch.nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed))))
    return prune.l1_unstructured(module, "w", amount).w.detach()


def of(values, **options):
    return wb.sparsity({"w": values}, **options).rows[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("amount", [0.0, 0.5, 0.9])
def test_the_forms_have_the_bytes_that_torch_and_zstandard_need(amount, dtype):
    values = pruned((64, 96), amount).to(dtype)
    row = of(values, zstd=5)
    assert row.zeros == int((values == 0).sum())
    csr = values.to_sparse_csr()
    for form, index in (("CSR int32", torch.int32), ("CSR int64", torch.int64)):
        parts = [csr.crow_indices().to(index), csr.col_indices().to(index), csr.values()]
        assert row.nbytes[form] == sum(part.numel() * part.element_size() for part in parts)
    assert row.nbytes["bitmask + values"] == 64 * 96 // 8 + int((values != 0).sum()) * values.element_size()
    stream = io.BytesIO()
    with zstandard.ZstdCompressor(5).stream_writer(stream, closefd=False) as out:
        out.write(values.view(torch.uint8).numpy().tobytes())
    assert row.nbytes["zstd"] == pytest.approx(len(stream.getvalue()), abs=32)
    assert row.nbytes["dense"] == values.nbytes


def test_the_smallest_form_that_torch_load_opens_is_recommended(tmp_path):
    state = {"thin": pruned((200, 200), 0.95), "thick": pruned((200, 200), 0.4, 1), "bias": torch.zeros(50)}
    report = wb.sparsity(state)
    assert [row.best for row in report.rows] == ["CSR int32", "dense", "dense"]
    csr = state["thin"].to_sparse_csr()
    csr = torch.sparse_csr_tensor(csr.crow_indices().int(), csr.col_indices().int(), csr.values(), csr.shape)
    torch.save({**state, "thin": csr}, tmp_path / "sparse.pt")
    assert torch.equal(torch.load(tmp_path / "sparse.pt", weights_only=True)["thin"].to_dense(), state["thin"])
    assert "CSR int32 for 1 of 3 tensors" in report.recommended
    assert "zstd" in report.headline
    assert "unpacked" in report.headline
    assert wb.sparsity({"w": state["thick"]}).recommended.startswith("dense")


def test_half_of_zeros_makes_csr_larger_than_dense():
    row = of(pruned((1024, 1024), 0.5), zstd=None)
    assert row.nbytes["CSR int64"] / row.nbytes["dense"] == pytest.approx(1.5, abs=0.01)
    assert "zstd" not in row.nbytes
    assert row.best == "dense"


@pytest.mark.parametrize("shape", [(6, 8), (1, 2_000_000), (5, 16, 3, 3)], ids=str)
def test_two_of_four_is_judged_along_the_input(shape):
    values = wb.ops.prune(wb.open({"w": torch.ones(shape)}), method="2:4")["w"].load()
    assert of(values, zstd=None).two_of_four is True
    for where in ((0, 2), (-1, -1)):  # a third of the first group, and of the last
        broken = values.clone()
        broken[where] = 1.0
        assert of(broken, zstd=None).two_of_four is False


def test_two_of_four_along_another_axis_and_where_there_are_no_groups():
    values = wb.ops.prune(wb.open({"w": torch.ones(6, 8)}), method="2:4")["w"].load()
    assert of(values.t(), zstd=None).two_of_four is None  # 6 along dim 1
    assert of(values.t(), zstd=None, dim=0).two_of_four is True
    assert of(torch.zeros(8), zstd=None).two_of_four is None
    assert of(torch.zeros(()), zstd=None).zeros == 1


@given(tensor=tensors(TORCH_DTYPES))
def test_every_type_is_counted_or_left_out(tensor):
    row = of(tensor, zstd=None)
    if row.zeros is None:
        assert tensor.dtype in (torch.float4_e2m1fn_x2, torch.bits8, torch.bits16)
    else:
        wide = tensor.to(torch.complex128) if tensor.is_complex() else tensor.double() if tensor.is_floating_point() else tensor
        assert row.zeros == wide.reshape(-1).tolist().count(0)


def test_tied_tensors_count_once():
    shared = torch.zeros(4, 4)
    report = wb.sparsity({"a": shared, "b": shared})
    assert report.totals["dense"] == 64
    assert [row.tied_to for row in report.rows] == [None, "a"]


def test_initializers_of_an_onnx_file_are_judged(tmp_path):
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weight = wb.ops.prune(wb.open({"w": torch.randn(6, 8)}), method="2:4")["w"].load().t().contiguous()  # MatMul multiplies with [in, out]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8])], [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 6])],
        [numpy_helper.from_array(weight.numpy(), "w")],
    )  # fmt: skip
    onnx.save(helper.make_model(graph), tmp_path / "m.onnx")
    row = wb.sparsity(tmp_path / "m.onnx", dim=0).rows[0]
    assert (row.name, row.zeros, row.two_of_four) == ("w", 24, True)


def test_a_result_that_was_never_written_is_judged_too():
    ckpt = wb.open({"w": torch.randn(30, 40)})
    assert wb.sparsity(wb.ops.prune(ckpt, 0.25)).rows[0].zeros == 300
    assert wb.sparsity(wb.ops.prune(ckpt, 0.25, scope="global"), "w").rows[0].zeros == 300


def test_without_zstandard_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    with pytest.raises(MissingDependencyError, match=r"checkpoint-workbench\[compress\]"):
        wb.sparsity({"w": torch.ones(2)})
    assert wb.sparsity({"w": torch.ones(2)}, zstd=None)
    monkeypatch.undo()
    with pytest.raises(SelectionError, match="levels"):
        wb.sparsity({"w": torch.ones(2)}, zstd=40)


def test_it_shows_itself():
    text = str(wb.sparsity({"w": torch.eye(8), "n": torch.tensor(math.nan)}))
    for said in ("CSR int64", "bitmask + values", "must be unpacked first", "87.5 %"):
        assert said in text
