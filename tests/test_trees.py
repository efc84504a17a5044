"""Ops, analyses and saves on trees that hold more than a state dict: nothing is lost, flattened or miscounted in silence."""

import os

import pytest
import torch
from torch import nn

import workbench as wb
from workbench import tree
from workbench.errors import SelectionError, WriteError


class Shadow:
    """An object of the trainer's own, with a tensor inside."""

    def __init__(self):
        self.shadow = {"w": torch.ones(2, 2)}


@pytest.fixture
def trained(tmp_path):
    path = tmp_path / "trained.pt"
    torch.save({"model": nn.Linear(2, 2).state_dict(), "epoch": 3, "ema": Shadow()}, path)
    return wb.open(path)


def test_dropping_an_objects_tensors_drops_the_object_and_nothing_else(trained):
    rest = trained.drop("ema*")
    assert list(rest) == ["model.weight", "model.bias"]
    assert rest.extras == {"epoch": 3}


def test_an_op_leaves_inert_objects_alone_and_refuses_to_change_their_tensors(trained):
    assert wb.ops.cast(trained, "float16")["ema.shadow.w"].dtype.name == "float32"
    with pytest.raises(SelectionError, match="inert"):
        wb.ops.cast(trained, "float16", everything=True)


def test_tensors_of_a_dropped_object_are_kept_and_the_object_listed(trained, tmp_path):
    report = wb.save(trained, tmp_path / "safe.pt", unsafe="drop")
    assert len(report.left_behind) == 1
    saved = torch.load(tmp_path / "safe.pt", weights_only=True)
    assert torch.equal(saved["ema"]["shadow.w"], torch.ones(2, 2))
    assert saved["epoch"] == 3


def test_an_item_of_a_list_is_not_dropped_for_the_others_would_change_names():
    with pytest.raises(SelectionError, match="list"):
        wb.open({"params": [torch.ones(1), torch.ones(2)]}).drop("params.0")


def test_a_name_taken_by_something_else_is_not_overwritten():
    with pytest.raises(SelectionError, match="epoch"):
        wb.ops.rename(wb.open({"w": torch.ones(3), "epoch": 3}), {"w": "epoch"})


@pytest.mark.parametrize("make", [lambda x: x, lambda x: x.imag], ids=["conjugate", "negative"])
def test_bits_that_torch_keeps_beside_the_bytes_are_carried_out(make, tmp_path):
    tensor = make(torch.tensor([1 + 2j, 3 - 1j]).conj())
    torch.save({"x": tensor}, tmp_path / "lazy.pt")
    for source in (tmp_path / "lazy.pt", {"x": tensor}):
        ckpt = wb.open(source)
        assert torch.equal(ckpt["x"].load(), tensor.resolve_conj().resolve_neg())
        wb.save(ckpt, tmp_path / "plain.pt")
        assert torch.equal(torch.load(tmp_path / "plain.pt", weights_only=True)["x"], tensor)


def test_live_values_of_allowed_classes_are_saved_as_they_are(tmp_path):
    held = {"b": bytearray(b"xy"), "d": torch.device("cpu"), "s": torch.Size([2, 3]), "p": nn.Parameter(torch.ones(2))}
    wb.save(held, tmp_path / "held.pt")
    saved = torch.load(tmp_path / "held.pt", weights_only=True)
    assert {k: v for k, v in saved.items() if k != "p"} == {k: v for k, v in held.items() if k != "p"}
    assert isinstance(saved["p"], nn.Parameter)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_quantized_tensors_differ_where_their_numbers_do():
    integers = torch.tensor([1, 2], dtype=torch.int8)
    a, b = (torch._make_per_tensor_quantized_tensor(integers, scale, 0) for scale in (0.5, 2.0))
    assert not wb.diff({"q": a}, {"q": b})
    assert wb.diff({"q": a}, {"q": a.clone()})


def test_a_nan_in_one_half_of_a_complex_number_does_not_hide_the_other():
    nan = float("nan")
    assert not wb.diff({"x": torch.tensor([complex(1, nan)])}, {"x": torch.tensor([complex(2, nan)])})


@pytest.mark.parametrize(
    "tree", [{"s": torch.eye(1000).to_sparse()}, {"a": torch.ones(100)[:10], "b": nn.Linear(3, 3).state_dict()}], ids=["sparse", "view"]
)
def test_the_ledger_adds_up_to_the_file(tree, tmp_path):
    path = tmp_path / "file.pt"
    torch.save(tree, path)
    report = wb.ledger(path)
    assert sum(row.nbytes for row in report.rows) == report.total == os.path.getsize(path)
    assert all(row.nbytes >= 0 for row in report.rows)


def test_the_ledger_of_a_section_counts_the_section(tmp_path):
    path = tmp_path / "file.pt"
    torch.save({"model": nn.Linear(3, 3).state_dict(), "optimizer": {"state": {0: {"m": torch.ones(1000)}}, "param_groups": []}}, path)
    assert wb.ledger(wb.open(path).weights).total == 48


def test_what_is_no_regular_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe.pt")
    with pytest.raises(WriteError, match="regular"):
        wb.save({"w": torch.ones(1)}, tmp_path / "pipe.pt")


def test_what_a_killed_writer_left_is_swept_away(tmp_path):
    left = tmp_path / ".w.pt.0123456789ab.tmp"
    left.write_bytes(b"half a file")
    wb.save({"w": torch.ones(1)}, tmp_path / "w.pt")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["w.pt"]


def test_a_file_that_is_one_tensor_goes_through_an_op(tmp_path):
    torch.save(torch.ones(3, 3), tmp_path / "one.pt")
    wb.save(wb.ops.cast(wb.open(tmp_path / "one.pt"), "float16"), tmp_path / "half.pt")
    assert torch.equal(torch.load(tmp_path / "half.pt", weights_only=True), torch.ones(3, 3, dtype=torch.float16))


def test_a_shared_record_is_looked_into_once(monkeypatch):
    looked = []
    monkeypatch.setattr(tree, "_is_record", lambda node, own=tree._is_record: looked.append(node) or own(node))
    record = (None,) * 64
    assert list(tree.walk({"a": [record] * 1000, "b": [record] * 1000}, values=False)) == []
    assert sum(node is record for node in looked) == 1
