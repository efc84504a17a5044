"""Variants side by side: sizes against the file system and torch, accuracy against plain torch, honesty about the rest."""

import io
import os
import warnings

import pytest
import torch
from onnx import TensorProto, helper, save
from torch import nn

from workbench.errors import SelectionError
from workbench.verification import causes
from workbench.verification.variants import compare
from workbench.verification.weighing import disk_nbytes, ram_nbytes


def model(width=32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 4))


@pytest.fixture
def data():
    torch.manual_seed(5)
    x = torch.randn(70, 16)
    return x, (model()(x).argmax(1) + (torch.arange(70) < 7).long()) % 4  # the model is right on 63 of 70


def test_one_row_per_variant_with_real_numbers(data):
    wrong = model()
    with torch.no_grad():
        wrong[2].bias += torch.tensor([100.0, 0, 0, 0])
    report = compare({"fp32": model(), "wrong": wrong, "call": model()}, data)
    assert report
    first, second, third = report.variants
    assert first.accuracy == pytest.approx(63 / 70)
    assert second.accuracy == pytest.approx(float((data[1] == 0).double().mean()))
    assert (first.max_abs, first.top1) == (None, None)
    assert second.max_abs == pytest.approx(100, rel=1e-3)
    assert third.max_abs == 0
    assert third.top1 == 1.0
    buffer = io.BytesIO()
    torch.save(model().state_dict(), buffer)
    assert first.disk_nbytes == len(buffer.getvalue())
    assert first.ram_nbytes == sum(4 * p.numel() for p in model().parameters())
    assert first.seconds_one > 0
    assert first.seconds[max(report.batches)] > 0
    assert report.rounds == 11
    assert report.threads == torch.get_num_threads()


def test_half_precision_runs_in_its_own_dtype_and_is_smaller(data):
    report = compare({"fp32": model(256), "bf16": model(256).to(torch.bfloat16)}, data)
    assert report
    assert report.variants[1].ram_nbytes * 2 == report.variants[0].ram_nbytes
    assert "bf16 has accuracy" in report.headline
    assert report.not_smaller == ()


def test_what_did_not_shrink_is_said(data):
    report = compare({"fp32": model(), "again": model()}, data)
    assert report.not_smaller[0].startswith("again did not shrink: ")
    assert "again did not shrink" in str(report)


def test_a_variant_that_does_not_run_is_a_falsy_row_of_dashes(data):
    report = compare({"fp32": model(), "other": nn.Linear(3, 4)}, data)
    assert not report
    assert "other did not run: RuntimeError" in report.headline
    assert report.variants[0].accuracy is not None
    assert report.variants[1].accuracy is None
    assert report.variants[1].disk_nbytes
    assert not compare({"fp32": model(), "gone": "no/such.onnx"}, data)


def test_a_variant_that_fails_on_the_last_few_items_does_not_pass(data):
    def whole_batches_only(x):
        if len(x) == 6:  # 70 items in batches of 32
            raise ValueError("not a whole batch")
        return model()(x)

    report = compare({"fp32": model(), "picky": whole_batches_only}, data)
    assert not report
    assert "picky did not run: ValueError: not a whole batch" in report.headline


def test_a_batch_size_that_a_variant_does_not_take_is_a_dash_with_its_reason(data):
    def never_alone(x):
        if len(x) == 1:
            raise ValueError("never alone")
        return model()(x)

    report = compare({"fp32": model(), "pair": never_alone}, data)
    assert report
    assert report.variants[1].seconds_one is None
    assert report.variants[1].seconds.keys() == {max(report.batches)}
    assert report.variants[1].accuracy == report.variants[0].accuracy
    assert "never alone" in " ".join(str(report).split())


def test_onnx_bytes_include_external_data_and_paths_are_weighed(tmp_path, data):
    w = model()[0].weight.detach()
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", "w"], ["y"], transB=1)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 32])],
        [helper.make_tensor("w", TensorProto.FLOAT, w.shape, w.numpy().tobytes(), raw=True)],
    )
    path = str(tmp_path / "m.onnx")
    save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10),
        path,
        save_as_external_data=True,
        location="m.onnx.data",
        size_threshold=0,
    )
    weights = tmp_path / "w.pt"
    torch.save(model().state_dict(), weights)
    report = compare({"onnx": path, "file": weights, "pair": (model(), weights)}, (data[0], None))
    assert report
    onnx_row, file_row, pair_row = report.variants
    assert onnx_row.disk_nbytes == os.path.getsize(path) + os.path.getsize(tmp_path / "m.onnx.data")
    assert onnx_row.ram_nbytes == w.nbytes
    assert file_row.disk_nbytes == pair_row.disk_nbytes == weights.stat().st_size
    assert (file_row.seconds_one, file_row.accuracy, file_row.ram_nbytes) == (None, None, None)
    assert pair_row.accuracy is None
    assert pair_row.seconds_one is not None


def test_shared_and_packed_weights_are_weighed_once_and_at_all():
    tied = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    tied[1].weight = tied[0].weight
    assert ram_nbytes(tied, None) == 8 * 8 * 4

    class Packed(nn.Module):
        def get_extra_state(self):
            return (torch.zeros(100, dtype=torch.int8), None)

        def set_extra_state(self, state):
            del state

    assert ram_nbytes(Packed(), None) == 100
    assert disk_nbytes(lambda x: x, None) is None


def test_a_metric_of_ones_own_and_inputs_by_name(data):
    class Named(nn.Module):
        def forward(self, ids, scale):
            return {"y": ids * scale}

    def worst(outputs, labels):
        return float((outputs[:, 0] - labels).abs().max())

    x = torch.arange(12.0).reshape(6, 2)
    report = compare({"a": Named()}, ({"ids": x, "scale": torch.full((6, 1), 2.0)}, 2 * x[:, 0] + 3), metric=worst, batch=4)
    assert report.variants[0].accuracy == 3.0
    assert report.metric == "worst"
    assert report.batches == (1, 4)
    assert [axes.get_xlabel() for axes in report.plot().axes] == ["size on disk", "RAM", "latency of one item", "worst"]


def test_threads_and_training_mode_are_put_back(data):
    before, trained = torch.get_num_threads(), model().train()
    assert compare({"m": trained}, data, threads=1).threads == 1
    assert torch.get_num_threads() == before
    assert trained.training


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"variants": {}}, "no variants"),
        ({"rounds": 3}, "too few"),
        ({"metric": "f1"}, "no metric"),
        ({"data": torch.zeros(3)}, "pair"),
        ({"data": (torch.zeros(3, 16), torch.zeros(4))}, "3 inputs and"),
        ({"data": ((torch.zeros(3), torch.zeros(4)), None)}, "same first axis"),
        ({"data": (torch.zeros(0, 16), torch.zeros(0))}, "no values"),
    ],
)
def test_what_cannot_be_compared_is_refused(data, change, words):
    options = {"variants": {"m": model()}, "data": data, **change}
    with pytest.raises(SelectionError, match=words):
        compare(**options)


def test_one_figure_shows_all_five_and_needs_no_labels(data):
    report = compare({"fp32": model(), "bf16": model().to(torch.bfloat16)}, data)
    names = ["size on disk", "RAM", "latency of one item", "difference from fp32", "accuracy"]
    assert [axes.get_xlabel() for axes in report.plot().axes] == names
    assert max(report.plot().axes[-1].get_xticks()) <= 1.0
    bare = compare({"fp32": model(), "bf16": model().to(torch.bfloat16)}, (data[0], None))
    assert [axes.get_xlabel() for axes in bare.plot().axes] == names[:-1]


def test_stored_programs_run_under_the_trust_rule_and_are_weighed(tmp_path, data):
    net = model().eval()
    script, frozen, program = tmp_path / "m.pt", tmp_path / "frozen.pt", tmp_path / "m.pt2"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(net, data[0][:2])
        traced.save(script)
        torch.jit.freeze(traced).save(frozen)
    torch.export.save(torch.export.export(net, (data[0],), dynamic_shapes={"input": {0: torch.export.Dim.DYNAMIC}}), program)
    variants = {"fp32": net, "script": script, "frozen": frozen, "pt2": program}
    refused = compare(variants, data)
    assert not refused
    assert "did not write is not run" in refused.headline
    assert "trust=True" in refused.headline
    assert [v.disk_nbytes for v in refused.variants[1:]] == [path.stat().st_size for path in (script, frozen, program)]
    report = compare({**variants, "weights": _saved(net, tmp_path)}, data, trust=True)
    assert report, report.headline
    assert len({v.accuracy for v in report.variants[:4]}) == 1
    assert {v.ram_nbytes for v in report.variants[:4]} == {sum(4 * p.numel() for p in net.parameters())}
    assert [v.verdict for v in report.variants] == [None, "within rounding", "within rounding", "within rounding", None]
    assert all(v.seconds_one for v in report.variants[:4])


def _saved(net, folder):
    torch.save(net.state_dict(), folder / "w.pt")
    return folder / "w.pt"


def test_each_variant_is_judged_by_the_first_ones_rounding_without_a_search_for_causes(data, monkeypatch):
    monkeypatch.setattr(causes, "cause_of", None)
    moved = model()
    with torch.no_grad():
        moved[2].bias += 1e-4
    report = compare(
        {"fp32": model(), "again": lambda x: model()(x), "double": lambda x: model().double()(x.double()).float(), "moved": moved}, data
    )
    assert report
    assert [v.verdict for v in report.variants] == [None, "within rounding", "within rounding", "differs"]
    judged = report.variants[3].parity.outputs[0]
    assert judged.figures.max_abs == pytest.approx(1e-4, rel=0.01)
    assert judged.limit < 1e-5
    assert judged.figures.count == 70 * 4
    assert "differs" in str(report)
