"""What torch puts into its pickles: every element type, every kind of tensor, old spellings, Python 2's, and whole models."""

import contextlib
import copy
import io
import pickle
import struct
import time
import warnings
from collections import Counter, OrderedDict

import hostile_makers as h
import pytest
import torch
from strategies import TORCH_DTYPES, bits, same
from torch import nn
from torch.nn.utils import prune

import workbench as wb
from workbench.errors import CorruptFileError, FormatError
from workbench.formats.torch_objects import TorchObjects
from workbench.tree import Global, Inert, modules

pytestmark = pytest.mark.filterwarnings("ignore:torch.quantize_per:UserWarning", "ignore:Sparse:UserWarning", "ignore:.*quant.*:UserWarning",
                                        "ignore:The PyTorch API of nested tensors:UserWarning", "ignore:.*weight_norm:FutureWarning",
                                        "ignore:TypedStorage:UserWarning", "ignore:enable_nested_tensor:UserWarning")  # fmt: skip


def saved(tmp_path, value, name="x.pt"):
    torch.save(value, tmp_path / name)
    return wb.open(tmp_path / name)


def by_hand(tmp_path, value, storages=None):
    """A checkpoint of one entry, `w`, from its opcodes; and the path."""
    path = tmp_path / "hand.pt"
    h.torch_zip(path, h.PROTO + b"}" + h.text("w") + value + b"s.", storages)
    return path


# element types


@pytest.mark.parametrize("dtype", [*TORCH_DTYPES, torch.bits1x8, torch.bits2x4, torch.bits4x2], ids=str)
def test_every_element_type_is_read_bit_for_bit(dtype, tmp_path):
    data = torch.randint(0, 2 if dtype is torch.bool else 256, (48,), dtype=torch.uint8)
    tensor = torch.empty(0, dtype=dtype).set_(data.untyped_storage(), 0, (3, 1), (1, 1))
    ckpt = saved(tmp_path, {"w": tensor})
    official = torch.load(tmp_path / "x.pt", weights_only=True)["w"]
    assert ckpt["w"].dtype.name == str(dtype).removeprefix("torch.")
    assert same(ckpt["w"].load(), official)
    assert b"".join(bits(chunk) for _, chunk in ckpt["w"].chunks(1)) == bits(official)
    wb.save(ckpt, tmp_path / "again.pt")
    assert same(torch.load(tmp_path / "again.pt", weights_only=True)["w"], official)


@pytest.mark.parametrize("name", [f"{sign}int{n}" for sign in ("", "u") for n in range(1, 8)])
def test_a_type_narrower_than_a_byte_is_told_and_read_as_torch_reads_it(name, tmp_path):
    untyped = h.storage("0", 3).replace(b"ctorch\nFloatStorage", b"ctorch.storage\nUntypedStorage")
    value = (
        b"ctorch._utils\n_rebuild_tensor_v3\n(" + untyped + b"K\x00K\x03\x85K\x01\x85\x89" + h.HOOKS + f"ctorch\n{name}\n".encode() + b"tR"
    )
    path = by_hand(tmp_path, value, {"0": b"\x01\x02\x03"})
    official = torch.load(path, weights_only=True)["w"]
    ckpt = wb.open(path)
    assert ckpt["w"].dtype.name == name
    assert same(ckpt["w"].load(), official)
    assert [f.kind for f in ckpt.findings] == ["element type"]


def test_a_storage_by_itself_is_a_flat_tensor(tmp_path):
    ckpt = saved(tmp_path, {"typed": torch.arange(3.0).storage(), "bytes": torch.ones(2).untyped_storage()})
    assert ckpt["typed"].load().tolist() == [0, 1, 2]
    assert (ckpt["bytes"].dtype.name, ckpt["bytes"].shape) == ("uint8", (8,))
    assert not ckpt.extras


# kinds of tensor

DENSE = torch.tensor([[0, 2.0, 0, 0], [3, 0, 4, 0]])
SPARSE = {}
with warnings.catch_warnings(action="ignore"):
    SPARSE |= {
        "coo": DENSE.to_sparse(),
        "uncoalesced": torch.sparse_coo_tensor([[0, 0, 1], [1, 1, 2]], [1.0, 2, 3], (2, 3)),
        "hybrid": torch.sparse_coo_tensor([[0, 1], [1, 2]], torch.ones(2, 4), (2, 3, 4)),
        "empty": torch.sparse_coo_tensor(torch.empty(2, 0, dtype=torch.long), torch.empty(0), (2, 3)),
        "csr": DENSE.to_sparse_csr(),
        "csc": DENSE.to_sparse_csc(),
        "bsr": DENSE.to_sparse_bsr((2, 2)),
        "bsc": DENSE.to_sparse_bsc((2, 2)),
        "batched": torch.stack([DENSE, DENSE]).to_sparse_csr(),
        "int32": torch.sparse_csr_tensor(torch.tensor([0, 1, 3], dtype=torch.int32), torch.tensor([1, 0, 2], dtype=torch.int32), torch.ones(3), (2, 3)),
        "parameter": nn.Parameter(DENSE.to_sparse()),
    }  # fmt: skip


@pytest.mark.parametrize("kind", SPARSE)
def test_a_sparse_tensor_keeps_its_layout(kind, tmp_path):
    ckpt, expected = saved(tmp_path, {"w": SPARSE[kind]}), SPARSE[kind]
    wb.save(ckpt, tmp_path / "again.pt")
    for tensor in (ckpt["w"].load(), wb.open({"w": expected})["w"].load(), torch.load(tmp_path / "again.pt", weights_only=True)["w"]):
        assert tensor.layout == expected.layout
        assert torch.equal(tensor.to_dense(), expected.to_dense())
        assert expected.layout != torch.sparse_coo or tensor.is_coalesced() == expected.is_coalesced()
    assert ckpt["w"].spec.layout == str(expected.layout).removeprefix("torch.")
    assert ckpt["w"].shape == tuple(expected.shape)


def quantized():
    values, scales = torch.linspace(-1, 1, 24).reshape(4, 6), torch.linspace(0.1, 0.2, 4)
    per_tensor = torch.quantize_per_tensor(values, 0.1, 3, torch.quint8)
    return {
        "quint8": per_tensor,
        "qint8": torch.quantize_per_tensor(values, 0.1, 3, torch.qint8),
        "qint32": torch.quantize_per_tensor(values, 0.1, 3, torch.qint32),
        "transposed": per_tensor.t(),
        "sliced": per_tensor[1:, ::2],
        "channels": torch.quantize_per_channel(values, scales, torch.zeros(4, dtype=torch.long), 0, torch.qint8),
        "last channels": torch.quantize_per_channel(values.t().contiguous(), scales, torch.zeros(4, dtype=torch.long), 1, torch.qint8),
        "float zero points": torch.quantize_per_channel(values, scales, torch.rand(4), 0, torch.quint8),
        "quint4x2": torch.quantize_per_channel(values, scales, torch.rand(4), 0, torch.quint4x2),
        "quint4x2, odd": torch.quantize_per_channel(values[:3, :5].contiguous(), scales[:3], torch.rand(3), 0, torch.quint4x2),
        "quint2x4": torch.quantize_per_channel(values, scales, torch.rand(4), 0, torch.quint2x4),
        "quint4x2, one scale": torch.quantize_per_tensor(values, 0.1, 3, torch.quint4x2),
        "empty": torch.quantize_per_tensor(torch.empty(0, 3), 0.1, 3, torch.quint8),
    }


QUANTIZED = [
    "quint8",
    "qint8",
    "qint32",
    "transposed",
    "sliced",
    "channels",
    "last channels",
    "float zero points",
    "quint4x2",
    "quint4x2, odd",
    "quint2x4",
    "quint4x2, one scale",
    "empty",
]


@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_quantized_tensor_keeps_its_quantizer(kind, tmp_path):
    expected = quantized()[kind]
    ckpt = saved(tmp_path, {"w": expected})
    official = torch.load(tmp_path / "x.pt", weights_only=True)["w"]
    wb.save(ckpt, tmp_path / "again.pt")
    for tensor in (ckpt["w"].load(), torch.load(tmp_path / "again.pt", weights_only=True)["w"]):
        assert (tensor.dtype, tensor.shape, tensor.qscheme()) == (official.dtype, official.shape, official.qscheme())
        assert torch.equal(tensor.dequantize(), official.dequantize())
    assert ckpt["w"].spec.quantizer
    assert not ckpt["w"].locked


@pytest.mark.parametrize(
    "quantizer",
    [b"ctorch\nper_tensor_affine\nG" + struct.pack(">d", 0.1) + b"\x86", b"ctorch\nper_channel_affine\n" + h.tensor("0") + h.tensor("0") + b"K\x00t",
     b"ctorch\nper_channel_affine\n" + h.tensor("0") + h.tensor("0") + b"K\x07t", b"ctorch\nper_channel_affine\n]]K\x00t", b"ctorch\nfloat32\nK\x00K\x00t"],
    ids=["no zero point", "too few scales", "no such axis", "empty lists", "no scheme"],
)  # fmt: skip
def test_scales_that_do_not_fit_are_told_and_never_reach_torch(quantizer, tmp_path):
    integers = h.storage("1", 12, "QUInt8Storage")
    mark = b"" if quantizer.endswith(b"\x86") else b"("
    value = (
        b"ctorch._utils\n_rebuild_qtensor\n("
        + integers
        + b"K\x00K\x06K\x02\x86K\x02K\x01\x86"
        + mark
        + quantizer
        + b"\x89"
        + h.HOOKS
        + b"tR"
    )
    ckpt = wb.open(by_hand(tmp_path, value, {"0": bytes(12), "1": bytes(12)}))
    assert ckpt["w"].shape == (6, 2)
    assert any(f.kind == "values locked" and f.severity == "danger" for f in ckpt.findings)
    with pytest.raises(CorruptFileError):
        ckpt["w"].load()


def test_sparse_parts_that_do_not_fit_are_refused_in_our_words(tmp_path):
    layout = b"ctorch.serialization\n_get_layout\n" + h.text("torch.sparse_coo") + b"\x85R"
    indices = h.tensor("0", 2, (1, 2), (2, 1), cls="LongStorage")
    value = b"ctorch._utils\n_rebuild_sparse_tensor\n" + layout + b"(" + indices + h.tensor("1", 2, (2,)) + b"K\x03\x85t\x86R"
    ckpt = wb.open(by_hand(tmp_path, value, {"0": struct.pack("<2q", 0, 99), "1": bytes(8)}))
    assert ckpt["w"].spec.layout == "sparse_coo"
    with pytest.raises(CorruptFileError, match="sparse_coo"):
        ckpt["w"].load()


@pytest.mark.parametrize("live", [False, True])
def test_a_nested_tensor_is_its_parts(live, tmp_path):
    inner = [torch.ones(2, 3), 2 * torch.ones(4, 5)]
    tree = {
        "w": torch.nested.nested_tensor(inner),
        "j": torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)], layout=torch.jagged),
    }
    ckpt = wb.open(tree) if live else saved(tmp_path, tree)
    assert [name for name in ckpt if name.startswith("w")] == ["w.values", "w.sizes", "w.strides", "w.offsets"]
    parts = [ckpt[f"w.{part}"].load() for part in ("values", "sizes", "strides", "offsets")]
    assert all(map(torch.equal, torch._nested_view_from_buffer(*parts).unbind(), inner))
    assert torch.equal(ckpt["j.values"].load(), tree["j"].values())
    assert torch.equal(ckpt["j.offsets"].load(), tree["j"].offsets())
    assert live or "nested tensor" in {f.kind for f in ckpt.findings}


def test_a_saved_nested_tensor_loads_as_one(tmp_path):
    inner = [torch.ones(2, 3), torch.ones(4, 5)]
    wb.save({"w": torch.nested.nested_tensor(inner)}, tmp_path / "n.pt")
    assert all(map(torch.equal, torch.load(tmp_path / "n.pt", weights_only=True)["w"].unbind(), inner))


class Marked(torch.Tensor):
    pass


class Wrapping(torch.Tensor):
    """A tensor whose values are computed from two others, as quantized weights of torchao are."""

    @staticmethod
    def __new__(cls, qdata, scale):
        return torch.Tensor._make_wrapper_subclass(cls, qdata.shape, dtype=scale.dtype)

    def __init__(self, qdata, scale):
        self.qdata, self.scale, self.block = qdata, scale, [1, 3]

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError


def test_a_tensor_subclass_is_what_it_wraps(tmp_path):
    marked = torch.ones(2).as_subclass(Marked)
    marked.scale = torch.full((2,), 3.0)
    tree = {"a": marked, "w": Wrapping(torch.ones(2, 3, dtype=torch.int8), torch.ones(2)), "sparse": DENSE.to_sparse()}
    tree["sparse"].note = "kept"
    ckpt = saved(tmp_path, tree)
    assert [(name, tensor.dtype.name) for name, tensor in ckpt.items()] == [
        ("a", "float32"),
        ("w.qdata", "int8"),
        ("w.scale", "float32"),
        ("sparse", "float32"),
    ]
    assert any("scale" in f.message for f in ckpt.findings if f.kind == "attributes of a tensor")
    left = wb.save(ckpt, tmp_path / "safe.pt", unsafe="drop").left_behind
    assert [text.partition(":")[0] for text in left] == ["a", "w"]
    again = torch.load(tmp_path / "safe.pt", weights_only=True)
    assert torch.equal(again["a"], torch.ones(2))
    assert again["sparse"].note == "kept"
    assert torch.equal(again["w"]["qdata"], torch.ones(2, 3, dtype=torch.int8))


def test_one_ranks_part_of_a_distributed_tensor_is_told(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    try:
        local = torch.arange(6.0).reshape(2, 3)
        torch.save({"w": DTensor.from_local(local, init_device_mesh("cpu", (2,)), [Shard(0)])}, tmp_path / "d.pt")
    finally:
        torch.distributed.destroy_process_group()
    ckpt = wb.open(tmp_path / "d.pt")
    assert torch.equal(ckpt["w"].load(), local)
    assert any(f.kind == "one rank's part" for f in ckpt.findings)


def test_parameters_and_tensors_without_values(tmp_path):
    tree = {"p": nn.Parameter(torch.ones(2), requires_grad=False), "q": nn.Parameter(torch.ones(2)), "b": nn.Buffer(torch.ones(2)), "m": torch.ones(2, 3, device="meta"), "u": nn.UninitializedParameter()}  # fmt: skip
    ckpt = saved(tmp_path, tree)
    assert {name: tensor.requires_grad for name, tensor in ckpt.items()} == {"p": False, "q": True, "b": False, "m": False, "u": True}
    assert ckpt["m"].shape == (2, 3)
    assert [name for name, tensor in ckpt.items() if tensor.locked] == ["m", "u"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values_of_a_device_without_storages_are_read(dtype, tmp_path):
    value = (
        b"ctorch._utils\n_rebuild_device_tensor_from_cpu_tensor\n("
        + h.tensor("0")
        + f"ctorch\n{dtype}\n".encode()
        + h.text("cpu")
        + b"\x88tR"
    )
    path = by_hand(tmp_path, value)
    official = torch.load(path, weights_only=True)["w"]
    assert same(wb.open(path)["w"].load(), official)
    assert wb.open(path)["w"].requires_grad


# old spellings; torch still reads them all

AT = b"K\x00K\x03\x85K\x01\x85"  # offset, size and stride of three elements
OLD = {
    "rebuild of torch 0.2": b"ctorch._utils\n_rebuild_tensor\n(" + h.storage("0") + AT + b"tR",
    "tensor of torch 0.1": b"ctorch\nFloatTensor\n)R(" + h.storage("0") + AT + b"tb",
    "made anew": b"ctorch\nFloatTensor\n)\x81(" + h.storage("0") + AT + b"tb",
    "parameter of torch 0.3": b"ctorch.nn.parameter\nParameter\n" + h.tensor("0") + b"\x85\x81\x89\x89" + h.HOOKS + b"\x87b",
    "parameter of torch 0.1": b"ctorch.nn.parameter\nParameter\n)\x81(" + h.tensor("0") + b"N" + h.HOOKS + b"\x88\x89tb",
    "parameter": b"ctorch._utils\n_rebuild_parameter\n" + h.tensor("0") + b"\x88" + h.HOOKS + b"\x87R",
    "hooks": b"ctorch._utils\n_rebuild_parameter\n" + h.tensor("0") + b"\x88" + h.HOOKS[:-1] + b"R}" + h.text("1") + b"Nsb\x87R",
    "sparse of torch 0.4": b"ctorch._utils\n_rebuild_sparse_tensor\nctorch.serialization\n_get_layout\n" + h.text("torch.sparse_coo") + b"\x85R("
    + h.tensor("2", 3, (1, 3), (3, 1), cls="LongStorage") + h.tensor("0") + b"ctorch\nSize\nK\x05\x85\x85Rt\x86R",
    "strided subclass": b"ctorch._tensor\n_rebuild_from_type_v2\n(ctorch._utils\n_rebuild_tensor\nctorch\nTensor\n(" + h.storage("0") + AT + b"t}tR",
    "a list for a size": b"ctorch._utils\n_rebuild_tensor_v2\n(" + h.storage("0") + b"K\x00](K\x03e](K\x01e\x89" + h.HOOKS + b"tR",
}  # fmt: skip


@pytest.mark.parametrize("spelling", OLD)
def test_old_spellings_give_what_torch_reads_from_them(spelling, tmp_path):
    path = by_hand(tmp_path, OLD[spelling], {**h.REAL_DATA, "2": struct.pack("<3q", 0, 1, 4)})
    official = torch.load(path, weights_only=True)["w"]
    tensor = wb.open(path)["w"]
    assert torch.equal(tensor.load().to_dense(), official.detach().to_dense())
    assert tensor.requires_grad == official.requires_grad
    assert not tensor.locked
    assert pickle.loads(pickle.dumps(wb.open(path)))["w"].shape == tensor.shape


def test_an_old_tensor_met_again_is_the_same_tensor(tmp_path):
    value = b"ctorch\nFloatTensor\n)Rq\x01(" + h.storage("0") + AT + b"tb0](h\x01h\x01e"
    ckpt = wb.open(by_hand(tmp_path, value))
    assert ckpt.aliases == {"w.1": "w.0"}


def legacy(value, storages):
    """A stream of torch.save before 1.6: four pickles, the keys, and each storage behind its length."""

    def dump(value):
        return pickle.dumps(value, 2)

    head = (
        dump(0x1950A86A20F9469CFC6C)
        + dump(1001)
        + dump({"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}})
    )
    tail = dump(sorted(storages)) + b"".join(struct.pack("<q", len(data) // 4) + data for data in storages.values())
    return head + h.PROTO + value + b"." + tail


def legacy_storage(view):
    return b"(" + h.text("storage") + b"ctorch\nFloatStorage\n" + h.text("7") + h.text("cpu") + b"K\x08" + view + b"tQ"


@pytest.mark.parametrize("view", [b"N", b"(" + h.text("8") + b"K\x03K\x04t"], ids=["whole", "a part"])
def test_a_view_of_a_storage_is_the_part_that_it_names(view, tmp_path):
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + legacy_storage(view) + b"K\x01K\x03\x85K\x01\x85\x89" + h.HOOKS + b"tR"
    (tmp_path / "old.pt").write_bytes(legacy(b"}" + h.text("w") + tensor + b"s", {"7": struct.pack("<8f", *range(8))}))
    official = torch.load(tmp_path / "old.pt", weights_only=True)["w"]
    assert same(wb.open(tmp_path / "old.pt")["w"].load(), official)


def test_ids_may_be_numbers_and_classes_may_carry_their_source():
    asked = []
    objects = TorchObjects(lambda key: asked.append(key) or (_ for _ in ()).throw(CorruptFileError("none")))
    cls = Global("torch", "FloatStorage")
    assert objects.persistent(("storage", cls, 94_000_123, "cpu", 3)).shape == (3,)
    assert asked == ["94000123"]
    assert objects.persistent(("module", Global("m", "Net"), "net.py", "class Net: …")) == Global("m", "Net")
    for bad in (
        (),
        "94000123",
        ("storage", cls, "0", "cpu"),
        ("storage", cls, "0", "cpu", -1),
        ("storage", cls, "0", "cpu", 3, ("k", 2, 2)),
        ("storage", "torch.FloatStorage", "0", "cpu", 3),
    ):
        with pytest.raises(CorruptFileError):
            objects.persistent(bad)


# Python 2


def text2(value):
    return b"U" + bytes([len(value)]) + value


def test_a_checkpoint_of_python_2_reads_as_torch_reads_it(tmp_path):
    """As Python 2 spells it: names in bytes, an OrderedDict as a list of pairs, numbers in text."""
    storage = b"(" + text2(b"storage") + b"ctorch\nFloatStorage\n" + text2(b"0") + text2(b"cpu") + b"K\x03tQ"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + AT + b"\x89ccollections\nOrderedDict\n]\x85RtR"
    state = b"ccollections\nOrderedDict\n](](" + text2(b"fc.weight") + tensor + b"e](" + text2("größe".encode()) + tensor + b"ee\x85R"
    value = b"}(" + text2(b"net") + state + text2(b"epoch") + b"K\x05" + text2(b"seen") + b"c__builtin__\nset\n](K\x01K\x02e\x85Ru"
    path = tmp_path / "py2.pt"
    h.torch_zip(path, h.PROTO + value + b".")
    official = torch.load(path, weights_only=True)
    ckpt = wb.open(path)
    assert list(ckpt) == [f"net.{name}" for name in official["net"]]
    assert torch.equal(ckpt["net.fc.weight"].load(), official["net"]["fc.weight"])
    assert ckpt.extras["epoch"] == 5
    assert ckpt.tree["seen"] == official["seen"]
    assert not ckpt.dangers


@pytest.mark.parametrize(("spelled", "value"), [(b"I1398\n", 1398), (b"I01\n", True), (b"I-3\n", -3), (b"L42L\n", 42), (b"F1.5\n", 1.5), (b"S'abc'\n", "abc"), (b"T\x03\x00\x00\x00abc", "abc"), (b"U\x02\xff\xfe", b"\xff\xfe")])  # fmt: skip
def test_numbers_and_text_as_python_2_wrote_them(spelled, value, tmp_path):
    ckpt = wb.open(by_hand(tmp_path, spelled))
    assert repr(ckpt.extras["w"]) == repr(value)
    expected = pickle.loads(h.PROTO + spelled + b".", encoding="latin-1" if isinstance(value, bytes) else "utf-8")
    assert value == (expected.encode("latin-1") if isinstance(value, bytes) else expected)


def test_a_key_that_is_no_text_stays_bytes(tmp_path):
    path = tmp_path / "x.pt"
    h.torch_zip(path, h.PROTO + b"}" + text2(b"\xff\xfe") + h.tensor("0") + b"s.")
    (name,) = wb.open(path)
    assert wb.open(path).paths[name] == (b"\xff\xfe",)


# values that protocol 2 spells as calls


def test_plain_values_are_values(tmp_path):
    tree = {
        "c": 1 + 2j,
        "b": b"ab\xff",
        "e": b"",
        "a": bytearray(b"xy"),
        "n": Counter("aab"),
        "s": {1, "x"},
        "z": torch.Size([2, 3]),
        "o": OrderedDict(k=1),
    }
    ckpt = saved(tmp_path, tree)
    assert {key: ckpt.tree[key] for key in "cbeas"} == {key: tree[key] for key in "cbeas"}
    assert ckpt.extras["n.a"] == 2
    assert [ckpt.extras[f"z.{i}"] for i in (0, 1)] == [2, 3]


@pytest.mark.parametrize(
    "call",
    [b"c__builtin__\nset\n]" + b"h\x01a\x85R", b"ccollections\nOrderedDict\n]](h\x01K\x01ea\x85R", b"ctorch._utils\n_rebuild_tensor_v2\n(h\x01h\x01h\x01h\x01\x89}tR"],
    ids=["set", "OrderedDict", "sizes"],
)  # fmt: skip
def test_tuples_that_share_their_parts_are_never_hashed(call, tmp_path):
    bomb = b")" + b"q\x01h\x01\x86" * 60 + b"q\x010"
    start = time.process_time()
    with contextlib.suppress(FormatError):
        wb.open(by_hand(tmp_path, bomb + call))
    assert time.process_time() - start < 2


@pytest.mark.parametrize("huge", ["size", "stride", "rank"])
def test_counts_beyond_all_bounds_are_refused_at_once(huge, tmp_path):
    count = b"\x8b" + struct.pack("<i", 1 << 18) + b"\x01" * (1 << 18)
    counts = {
        "size": (count * 3 + b"\x87", b"K\x01K\x01K\x01\x87"),
        "stride": (b"K\x01K\x01K\x01\x87", count * 3 + b"\x87"),
        "rank": (b"(" + b"K\x01" * 65 + b"t",) * 2,
    }
    value = b"ctorch._utils\n_rebuild_tensor_v2\n(" + h.storage("0") + b"K\x00" + b"".join(counts[huge]) + b"\x89" + h.HOOKS + b"tR"
    start = time.process_time()
    with pytest.raises(CorruptFileError, match="size"):
        wb.open(by_hand(tmp_path, value))
    assert time.process_time() - start < 2


def test_very_many_doubts_are_counted_and_not_all_told(tmp_path):
    value = b"](" + b"".join(h.tensor(str(i), shape=(4,)) for i in range(2_000)) + b"e"
    ckpt = wb.open(by_hand(tmp_path, value))
    assert len(ckpt) == 2_000
    assert 100 < len(ckpt.findings) < 300


@pytest.mark.parametrize("arguments", [b")", b"K\x01\x85", b"(NNNNNNNt", b"(((((tttttt", b"}\x85"])
@pytest.mark.parametrize("name", ["tensor", "tensor_v2", "tensor_v3", "qtensor", "sparse_tensor", "nested_tensor", "parameter", "meta_tensor_no_storage", "device_tensor_from_numpy", "wrapper_subclass"])  # fmt: skip
def test_arguments_of_another_kind_are_refused_or_stay_inert(name, arguments, tmp_path):
    path = by_hand(tmp_path, f"ctorch._utils\n_rebuild_{name}\n".encode() + arguments + b"R")
    try:
        ckpt = wb.open(path)
    except CorruptFileError:
        return
    assert not any(isinstance(value, FormatError) for value in ckpt.extras.values())


# whole models


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.second, self.first = nn.Linear(2, 2), nn.Linear(2, 2)
        self.shared = self.second
        self.register_buffer("mask", torch.ones(2), persistent=False)
        self.register_buffer("mean", torch.ones(3))
        self.register_buffer("nothing", None)
        self.register_parameter("no_bias", None)
        self.weight = nn.Parameter(torch.ones(1))
        self.hidden = [nn.Linear(2, 2)]
        self.grid = torch.ones(5)


class SplitState(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(2, 2)

    def __getstate__(self):
        return self.__dict__.copy(), {"slot": 1}


def tied():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    return model


def pruned():
    model = nn.Linear(4, 4)
    prune.l1_unstructured(model, "weight", 0.5)
    return model


MODELS = {
    "own class": lambda: nn.Sequential(Net(), nn.Sequential(Net())),
    "split state": SplitState,
    "recurrent": lambda: nn.LSTM(2, 3, 2, bidirectional=True),
    "transformer": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8), 2),
    "data parallel": lambda: nn.DataParallel(nn.Linear(2, 2)),
    "containers": lambda: nn.ModuleDict({"e": nn.Embedding(3, 2), "p": nn.ParameterList([nn.Parameter(torch.ones(2))]), "d": nn.ParameterDict({"x": nn.Parameter(torch.ones(2))})}),
    "weight norm": lambda: nn.Sequential(nn.utils.weight_norm(nn.Linear(2, 2))),
    "pruned": pruned,
    "tied": tied,
    "lazy": lambda: nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d()),
    "averaged": lambda: torch.optim.swa_utils.AveragedModel(nn.Linear(2, 2)),
    "graph": lambda: torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU())),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_whole_model_has_the_names_and_order_of_its_state_dict(name, tmp_path):
    model = MODELS[name]()
    ckpt = saved(tmp_path, model)
    state = model.state_dict()
    assert list(ckpt) == list(state)
    for key, tensor in state.items():
        if not nn.parameter.is_lazy(tensor):
            assert same(ckpt[key].load(), tensor), key
    assert [section.kind for section in ckpt.sections()] == ["weights"]


def test_a_whole_model_tells_its_classes_and_what_it_leaves_out(tmp_path):
    ckpt = saved(tmp_path, {"net": Net(), "epoch": 3})
    assert ckpt.modules == (
        ("net", f"{__name__}.Net"),
        *((f"net.{name}", "torch.nn.modules.linear.Linear") for name in ("second", "first", "shared")),
    )
    (told,) = [f for f in ckpt.findings if f.kind == "whole model"]
    assert told.where["classes"] == {"torch.nn.modules.linear.Linear": 3, f"{__name__}.Net": 1}
    assert told.where["left out"] == ["Net.mask", "Net.grid"]
    assert modules({"a": 3}) == []


def test_packed_weights_of_a_quantized_model_are_listed(tmp_path):
    with pytest.warns(DeprecationWarning, match="torch.ao"):
        model = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4)), {nn.Linear}, dtype=torch.qint8)
    ckpt = saved(tmp_path, model)
    weight, bias = model.state_dict()["0._packed_params._packed_params"]
    assert torch.equal(ckpt["0._packed_params._packed_params.0"].load().dequantize(), weight.dequantize())
    assert torch.equal(ckpt["0._packed_params._packed_params.1"].load(), bias)


def test_a_graph_module_is_named_as_code(tmp_path):
    ckpt = saved(tmp_path, MODELS["graph"]())
    assert "torch.fx.graph_module.reduce_graph_module" in ckpt.dangers


def test_a_circle_of_wrappers_ends(tmp_path):
    circle = Inert(Global("torch._utils", "_rebuild_parameter"), ())
    circle.args = (circle, True)
    ckpt = wb.checkpoint.Checkpoint({"w": circle})
    assert list(ckpt) == []


def test_the_copies_that_a_model_makes_of_itself_are_read(tmp_path):
    model = Net()
    buffer = io.BytesIO()
    torch.save(copy.deepcopy(model), buffer)
    (tmp_path / "m.pt").write_bytes(buffer.getvalue())
    assert list(wb.open(tmp_path / "m.pt")) == list(model.state_dict())
