"""States and calls that change a tensor or a container after it was made: what torch reads from them is what is listed, or it is refused."""

import contextlib
import struct
import time
import warnings

import hostile_makers as h
import pytest
import torch
from strategies import same

import workbench as wb
from workbench.errors import CorruptFileError, UnsupportedError

AT = b"K\x00K\x03\x85K\x01\x85"  # offset, size and stride of three elements
W, OTHER = h.tensor("0"), h.tensor("1")
ORDERED, COUNTER = b"ccollections\nOrderedDict\n", b"ccollections\nCounter\n"
PARAMETER = b"ctorch.nn.parameter\nParameter\n"
STATEFUL = b"ctorch._utils\n_rebuild_parameter_with_state\n("


def state(*parts):
    return b"(" + b"".join(parts) + b"tb"


def of_class(function, args, held=b"}", cls=b"ctorch\nTensor\n"):
    return b"ctorch._tensor\n_rebuild_from_type_v2\n(" + function + cls + args + held + b"tR"


def attribute(name, value):
    return b"}" + h.text(name) + value + b"s"


def by_hand(tmp_path, value):
    path = tmp_path / "hand.pt"
    h.torch_zip(path, h.PROTO + b"}" + h.text("w") + value + b"s.")
    return path


def leaves(node, path=()):
    """(name, tensor) of an object that torch loaded."""
    if isinstance(node, torch.Tensor):
        return [(".".join(map(str, path)), node.detach().resolve_conj().resolve_neg())]
    pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, (list, tuple)) else ()
    return [found for key, value in pairs for found in leaves(value, (*path, key))]


V2 = b"ctorch._utils\n_rebuild_tensor_v2\n"
PLACE = b"(" + h.storage("0") + AT + b"\x89" + h.HOOKS
PAIR = h.text("k") + W + b"\x86a"
EXACT = {
    "put on another storage": W + state(h.storage("1"), AT),
    "put there by a list": W + b"](" + h.storage("1") + AT + b"eb",
    "put there for whoever holds it": b"](" + W + b"q\x05h\x05" + state(h.storage("1"), AT) + b"h\x05e",
    "parameter put there": b"ctorch._utils\n_rebuild_parameter\n" + W + b"\x89" + h.HOOKS + b"\x87R" + state(h.storage("1"), AT),
    "tensor that a parameter was made of": b"](" + W + b"q\x05" + PARAMETER + b"h\x05\x89\x86\x81h\x05" + state(h.storage("1"), AT) + b"e",
    "parameter with the data of another": PARAMETER + W + b"\x85\x81" + state(OTHER, b"N", h.HOOKS, b"\x89\x89"),
    "parameter and a flag": PARAMETER + W + b"\x89\x86\x81",
    "parameter without a flag": PARAMETER + W + b"\x85\x81",
    "never filled": b"ctorch\nFloatTensor\n)R",
    "never filled, doubles": b"ctorch\nDoubleTensor\n)\x81",
    "tensor of a tensor": b"ctorch\nTensor\n" + W + b"\x85R",
    "tensor of a storage": b"ctorch\nFloatTensor\n" + h.storage("0") + b"\x85R",
    "data in the state of a class": of_class(V2, PLACE + b"t", attribute("data", OTHER)),
    "data in the slots of a class": of_class(V2, PLACE + b"t", b"N" + attribute("data", OTHER) + b"\x86"),
    "data of a parameter": STATEFUL + W + b"\x89" + h.HOOKS + attribute("data", OTHER) + b"tR",
    "flag of a parameter": STATEFUL + W + b"\x89" + h.HOOKS + attribute("requires_grad", b"\x88") + b"tR",
    "class of a parameter": of_class(b"ctorch._utils\n_rebuild_parameter\n", W + b"\x89" + h.HOOKS + b"\x87", cls=PARAMETER),
    "class of a class": of_class(b"ctorch._tensor\n_rebuild_from_type_v2\n", b"(" + V2 + b"ctorch\nTensor\n" + PLACE + b"t}t"),
    "negative, by presence": V2 + PLACE + attribute("neg", b"\x89") + b"tR",
    "ordered of ordered": ORDERED + ORDERED + b"]" + PAIR + b"\x85R\x85R",
    "keys that are tuples": ORDERED + b"]K\x01K\x02\x86" + W + b"\x86a\x85R",
    "counter of ordered": COUNTER + ORDERED + b"]" + PAIR + b"\x85R\x85R",
    "ordered, new": ORDERED + attribute("k", W) + b"\x85\x81",
    "counter, new": COUNTER + attribute("k", W) + b"\x85\x81",
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*Tensor:UserWarning")
@pytest.mark.parametrize("spelling", EXACT)
def test_what_torch_makes_of_it_is_listed(spelling, tmp_path):
    path = by_hand(tmp_path, EXACT[spelling])
    with warnings.catch_warnings(action="ignore"):
        expected = leaves(torch.load(path, weights_only=True))
    ckpt = wb.open(path)
    assert [name.replace(" ", "") for name in ckpt] == [name.replace(" ", "") for name, _ in expected]
    assert all(same(ckpt[name].load(), tensor) for name, (_, tensor) in zip(ckpt, expected, strict=True))
    assert not ckpt.dangers
    official = torch.load(path, weights_only=True)["w"]
    if isinstance(official, torch.Tensor):
        assert ckpt["w"].requires_grad == official.requires_grad


def test_the_state_that_moved_a_tensor_is_not_saved_to_move_it_again(tmp_path):
    ckpt = wb.open(by_hand(tmp_path, EXACT["data of a parameter"]))
    wb.save(wb.ops.cast(ckpt, "float64"), tmp_path / "again.pt")
    assert same(torch.load(tmp_path / "again.pt", weights_only=True)["w"].detach(), torch.tensor([4.0, 5, 6], dtype=torch.float64))


LOCKED = {
    "a storage alone": W + state(h.storage("1")),
    "no stride": W + state(h.storage("1"), b"K\x00K\x02\x85"),
    "another tensor": W + state(OTHER),
    "nothing": W + b")b",
    "part of another tensor": W + state(OTHER, AT),
    "parameter and a storage": b"ctorch._utils\n_rebuild_parameter\n" + W + b"\x89" + h.HOOKS + b"\x87R" + state(h.storage("1"), b"K\x00K\x02\x85"),
    "class and a storage": of_class(V2, PLACE + b"t") + state(h.storage("1"), AT),
}  # fmt: skip


@pytest.mark.parametrize("given", LOCKED)
def test_other_states_lock_the_tensor(given, tmp_path):
    ckpt = wb.open(by_hand(tmp_path, LOCKED[given]))
    assert [(f.kind, f.severity) for f in ckpt.findings] == [("values locked", "danger")]
    with pytest.raises(CorruptFileError, match="state of a tensor"):
        ckpt["w"].load()


@pytest.mark.parametrize("value", [h.storage("0") + b"}b", of_class(V2, PLACE + b"t", attribute("real", OTHER)), STATEFUL + W + b"\x89" + h.HOOKS + attribute("imag", W) + b"tR"])  # fmt: skip
def test_states_that_change_what_others_share_are_refused(value, tmp_path):
    with pytest.raises(UnsupportedError):
        wb.open(by_hand(tmp_path, value))


ASIDE = {
    "attribute of a mapping": ORDERED + b")R" + attribute("a", W) + b"b",
    "deep in one": ORDERED + b")R" + attribute("a", b"]" + W + b"a") + b"b",
    "deep in an attribute": of_class(V2, PLACE + b"t", attribute("a", b"]" + OTHER + b"a")),
    "pairs with tensors for keys": ORDERED + b"]" + W + b"K\x01\x86a\x85R",
    "counted": COUNTER + b"]" + W + b"a\x85R",
    "class of what is no tensor": of_class(b"ctorch._utils\n_rebuild_nested_tensor\n", b"(" + W + W + W + W + b"t"),
}


@pytest.mark.parametrize("where", ASIDE)
def test_tensors_where_no_name_leads_are_told(where, tmp_path):
    assert "tensors not listed" in [f.kind for f in wb.open(by_hand(tmp_path, ASIDE[where])).findings]


def test_a_tensor_made_of_numbers_is_told(tmp_path):
    path = by_hand(tmp_path, b"ctorch\nFloatTensor\n](K\x01K\x02e\x85R")
    assert torch.load(path, weights_only=True)["w"].tolist() == [1, 2]
    ckpt = wb.open(path)
    assert list(ckpt) == []
    assert [(f.kind, f.severity) for f in ckpt.findings] == [("tensor made by a call", "warning")]


MANY = b"](" + b"K\x01K\x02\x86" * 20_000 + b"e"
LARGE = b"}(" + b"".join(b"M" + struct.pack("<H", i) + b"N" for i in range(60_000)) + b"u"


@pytest.mark.parametrize(
    "value",
    [
        ORDERED + b"q\x01" + MANY + b"\x85q\x020](" + b"h\x01h\x02R" * 20_000 + b"e",
        b"c_codecs\nencode\nq\x010" + h.text("x" * 500_000) + h.text("latin1") + b"\x86q\x020](" + b"h\x01h\x02R" * 20_000 + b"e",
        LARGE + b"q\x010cx\ny\n)\x81" + b"h\x01b" * 20_000,
        LARGE + b"q\x010](" + (of_class(V2, PLACE + b"t", b"h\x01")) * 2_000 + b"e",
    ],
    ids=["pairs", "bytes", "states", "attributes"],
)
def test_copies_of_what_is_named_often_are_bounded(value, tmp_path):
    start = time.process_time()
    with contextlib.suppress(CorruptFileError, UnsupportedError):
        wb.open(by_hand(tmp_path, value))
    assert time.process_time() - start < 4
