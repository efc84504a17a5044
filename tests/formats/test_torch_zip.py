"""torch zip files, against torch.load(weights_only=True)."""

import io
import zipfile
from collections import OrderedDict

import pytest
import torch
from conformance import FormatTests, state
from hypothesis import given
from strategies import TORCH_DTYPES, bits, leaves, same, state_dicts, training_trees

import workbench as wb


class TestTorchZip(FormatTests):
    magic = 4

    def build(self, folder):
        base = torch.arange(12.0).view(3, 4)
        tensors = {
            **state(),
            "transposed": base.t(),
            "stepped": base[:, ::2],
            "expanded": base[:1].expand(2, 4),
            "tail": base[2],
            "big": torch.tensor([1 + 2j]),
        }
        torch.save(tensors, folder / "model.pt")
        return folder / "model.pt", [folder / "model.pt"]

    def official(self, path):
        return torch.load(path, weights_only=True)


class TestDeflatedTorchZip(TestTorchZip):
    """The same archive packed anew by Python's zipfile, as people do to make it smaller."""

    def build(self, folder):
        path, files = super().build(folder)
        with zipfile.ZipFile(path) as old:
            records = [(info.filename, old.read(info)) for info in old.infolist()]
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
            for name, data in records:
                new.writestr(name, data)
        return path, files

    def test_offset_is_where_the_bytes_lie(self, built):
        assert all(tensor.offset is None for tensor in wb.open(built[0]).values())


def saved(tree, path):
    torch.save(tree, path)
    return wb.open(path)


@given(tensors=state_dicts())
def test_any_state_dict_is_listed_and_loaded_as_torch_does(tensors, tmp_path):
    ckpt = saved(tensors, tmp_path / "any.pt")
    official = torch.load(tmp_path / "any.pt", weights_only=True)
    assert len(ckpt) == len(official)
    for (name, lazy), (key, tensor) in zip(ckpt.items(), official.items(), strict=True):
        assert name.partition("#")[0] == key.partition("#")[0] or key == ""
        assert same(lazy.load(), tensor)
        assert b"".join(bits(chunk) for _, chunk in lazy.chunks(64)) == bits(tensor)


@given(tree=training_trees())
def test_every_tensor_of_a_training_tree_keeps_its_path_and_values(tree, tmp_path):
    ckpt = saved(tree, tmp_path / "tree.pt")
    official = dict(leaves(torch.load(tmp_path / "tree.pt", weights_only=True)))
    assert {ckpt.paths[name] for name in ckpt} == set(official)
    for name, lazy in ckpt.items():
        assert same(lazy.load(), official[ckpt.paths[name]]), name


@pytest.mark.parametrize("dtype", TORCH_DTYPES, ids=str)
def test_each_dtype_keeps_its_bits_and_peeks_like_torch(dtype, tmp_path):
    width = torch.empty(0, dtype=dtype).element_size()
    data = torch.arange(8 * width, dtype=torch.uint8).view(dtype) if dtype != torch.bool else torch.tensor([True, False] * 4)
    lazy = saved({"x": data}, tmp_path / "x.pt")["x"]
    assert same(lazy.load(), data)
    if dtype not in (torch.float4_e2m1fn_x2, torch.bits8, torch.bits16):
        expected = data.to(torch.complex64).tolist() if dtype == torch.complex32 else data.tolist()
        assert repr(lazy.peek()) == repr(expected)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.float8_e4m3fnuz,
        torch.float8_e5m2fnuz,
        torch.float8_e8m0fnu,
        torch.float16,
        torch.bfloat16,
    ],
    ids=str,
)
def test_peek_decodes_every_code_of_the_small_floats_as_torch_does(dtype, tmp_path):
    width = torch.empty(0, dtype=dtype).element_size()
    codes = torch.arange(256**width).to({1: torch.uint8, 2: torch.int16}[width]).view(dtype)
    expected = codes.to(torch.float64)
    found = torch.tensor(
        saved({"x": codes}, tmp_path / "x.pt")["x"].peek(codes.numel())
        if width == 1
        else wb.dtypes.decode(wb.dtypes.dtype(dtype), bits(codes)),
        dtype=torch.float64,
    )
    assert torch.equal(expected.nan_to_num(nan=-7.5), found.nan_to_num(nan=-7.5))


def test_ties_and_views_are_told_as_torch_restores_them(tmp_path):
    w = torch.randn(4, 3)
    ckpt = saved({"embed": w, "head": w, "view": w[1:], "copy": w.clone()}, tmp_path / "tied.pt")
    assert ckpt.aliases == {"head": "embed"}
    assert ckpt["view"].source.storage == ckpt["embed"].source.storage != ckpt["copy"].source.storage
    assert ckpt.nbytes == w.nbytes * 2 + w[1:].nbytes


def test_parameters_are_tensors_that_require_grad(tmp_path):
    ckpt = saved({"p": torch.nn.Parameter(torch.ones(2)), "b": torch.ones(2)}, tmp_path / "p.pt")
    assert [t.requires_grad for t in ckpt.values()] == [t.requires_grad for t in torch.load(tmp_path / "p.pt", weights_only=True).values()]


@pytest.mark.filterwarnings("ignore:.*Sparse.*:UserWarning", "ignore:.*sparse.*:UserWarning")
@pytest.mark.parametrize("layout", ["coo", "csr", "csc", "bsr", "bsc"])
def test_sparse_tensors_load_as_torch_loads_them(layout, tmp_path):
    dense = torch.tensor([[0.0, 1, 0, 0], [2, 0, 0, 3]])
    tensor = {
        "coo": lambda: dense.to_sparse(),
        "csr": dense.to_sparse_csr,
        "csc": dense.to_sparse_csc,
        "bsr": lambda: dense.to_sparse_bsr((1, 2)),
        "bsc": lambda: dense.to_sparse_bsc((1, 2)),
    }[layout]()
    lazy = saved({"x": tensor}, tmp_path / "s.pt")["x"]
    loaded = lazy.load()
    assert (lazy.spec.layout, loaded.layout) == (f"sparse_{layout}", tensor.layout)
    assert torch.equal(loaded.to_dense(), dense)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("scheme", ["tensor", "channel"])
def test_quantized_tensors_load_as_torch_loads_them(scheme, tmp_path):
    x = torch.randn(3, 4)
    made = (
        torch.quantize_per_tensor(x, 0.1, 2, torch.qint8)
        if scheme == "tensor"
        else torch.quantize_per_channel(x, torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0, 1, 2]), 0, torch.quint8)
    )
    lazy = saved({"q": made}, tmp_path / "q.pt")["q"]
    official = torch.load(tmp_path / "q.pt", weights_only=True)["q"]
    loaded = lazy.load()
    assert torch.equal(loaded.int_repr(), official.int_repr())
    assert torch.equal(loaded.dequantize(), official.dequantize())


def test_a_module_keeps_its_metadata_out_of_the_listing(tmp_path):
    module = torch.nn.Sequential(torch.nn.BatchNorm1d(2))
    ckpt = saved(module.state_dict(), tmp_path / "m.pt")
    assert list(ckpt) == list(module.state_dict())
    assert ckpt.tree.state["_metadata"].items.keys() == module.state_dict()._metadata.keys()
    assert not ckpt.extras


def test_a_buffer_saved_under_any_root_name_opens(tmp_path):
    buffer = io.BytesIO()
    torch.save({"w": torch.ones(2)}, buffer)
    (tmp_path / "renamed.ckpt").write_bytes(buffer.getvalue())
    assert list(wb.open(tmp_path / "renamed.ckpt")) == ["w"]


def test_a_big_endian_file_gives_the_same_numbers(tmp_path):
    torch.save(
        {"w": torch.tensor([1.5, -2.0]), "n": torch.tensor([1, 258], dtype=torch.int16), "z": torch.tensor([1 + 2j])}, tmp_path / "le.pt"
    )
    with zipfile.ZipFile(tmp_path / "le.pt") as old, zipfile.ZipFile(tmp_path / "be.pt", "w") as new:
        for info in old.infolist():
            data = old.read(info)
            if info.filename.endswith("byteorder"):
                data = b"big"
            elif "/data/" in info.filename:
                width = {"0": 4, "1": 2, "2": 4}[info.filename[-1]]
                data = b"".join(data[i : i + width][::-1] for i in range(0, len(data), width))
            new.writestr(info.filename, data)
    ckpt, official = wb.open(tmp_path / "be.pt"), torch.load(tmp_path / "be.pt", weights_only=True)
    assert any(f.kind == "big-endian" for f in ckpt.findings)
    for name, tensor in official.items():
        assert same(ckpt[name].load(), tensor)
        assert ckpt[name].peek() == tensor.tolist()


@pytest.mark.parametrize("alignment", [64, 4096])
def test_payloads_are_found_at_any_alignment(alignment, tmp_path):
    with torch.utils.serialization.config.patch("save.storage_alignment", alignment):
        torch.save({f"t{i}": torch.full((i,), i) for i in range(20)}, tmp_path / "aligned.pt")
    ckpt = wb.open(tmp_path / "aligned.pt")
    assert all(ckpt[f"t{i}"].load().tolist() == [i] * i for i in range(20))


def test_a_checkpoint_without_checksums_opens(tmp_path):
    with torch.utils.serialization.config.patch("save.compute_crc32", False):
        torch.save({"w": torch.ones(3)}, tmp_path / "nocrc.pt")
    assert wb.open(tmp_path / "nocrc.pt")["w"].load().tolist() == [1, 1, 1]


def test_a_format_is_told_by_its_content_whatever_the_file_is_called(tmp_path):
    path = tmp_path / "other.pt"
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(path))
    assert wb.open(path).format == "torchscript"
    torch.export.save(torch.export.export(torch.nn.Linear(2, 2), (torch.ones(1, 2),)), str(path))
    assert wb.open(path).format == "torch-export"
    torch.save({"w": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    assert wb.open(path).format == "torch-legacy"
    path.write_bytes(b"")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", b"x")
    with pytest.raises(wb.errors.UnknownFormatError):
        wb.open(path)


def test_a_whole_model_pickle_is_listed_under_its_state_dict_names(tmp_path):
    model = torch.nn.Sequential(OrderedDict(fc=torch.nn.Linear(2, 3), norm=torch.nn.BatchNorm1d(3)))
    torch.save(model, tmp_path / "whole.pt")
    ckpt = wb.open(tmp_path / "whole.pt")
    assert set(ckpt) == set(model.state_dict())
    assert all(same(ckpt[name].load(), tensor) for name, tensor in model.state_dict().items())
    assert "torch.nn.modules.container.Sequential" not in ckpt.dangers  # harmless, and told as such
    assert any(f.kind == "data classes" and "torch.nn.modules.container.Sequential" in f.where["globals"] for f in ckpt.findings)
