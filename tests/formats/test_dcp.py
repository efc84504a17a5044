"""torch.distributed.checkpoint folders against torch's own loader, and folders that lie."""

import contextlib
import dataclasses
import itertools
import os
import pickle
import random
import time
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conformance import FULL, FormatTests, listing, state, values
from hypothesis import given
from hypothesis import strategies as st
from strategies import bits, same
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter, SerializationFormat
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

import workbench as wb
from workbench.errors import CorruptFileError, MissingShardError, UnknownFormatError, UnsupportedError, WorkbenchError
from workbench.formats import dcp_folder, dcp_template
from workbench.formats.pickle_loop import MAX_BUILT


class Boxes(DefaultSavePlanner):
    """Saves tensors in boxes, as many ranks together would: name -> [(offsets, sizes)]."""

    def __init__(self, boxes):
        super().__init__()
        self.boxes = boxes

    def create_local_plan(self):
        plan = super().create_local_plan()
        items = [item for item in plan.items if item.index.fqn not in self.boxes]
        for name, parts in self.boxes.items():
            tensor = self.state_dict[name]
            for offsets, sizes in parts:
                chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
                data = TensorWriteData(chunk, TensorProperties.create_from_tensor(tensor), tensor.size())
                items.append(WriteItem(MetadataIndex(name, offsets), WriteItemType.SHARD, tensor_data=data))
        return dataclasses.replace(plan, items=items)

    def resolve_data(self, write_item):
        if write_item.index.fqn not in self.boxes:
            return super().resolve_data(write_item)
        chunk, tensor = write_item.tensor_data.chunk, self.state_dict[write_item.index.fqn]
        return tensor[tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))].detach()


def save(tensors, folder, boxes=None, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(tensors, storage_writer=FileSystemWriter(folder, sync_files=False, **options), planner=Boxes(boxes or {}))
    return folder


def loaded(folder):
    """The whole state dict, by torch's own conversion."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp_to_torch_save(folder, f"{folder}.pt")
    return torch.load(f"{folder}.pt", weights_only=True)


def metadata(folder):
    return pickle.loads((folder / ".metadata").read_bytes())


def rewrite(folder, change):
    held = metadata(folder)
    change(held)
    (folder / ".metadata").write_bytes(pickle.dumps(held))


class TestDcp(FormatTests):
    def build(self, folder):
        tensors = {name: tensor for name, tensor in state().items() if name in ("layer.weight", "half", "step", "none")}
        boxes = {"layer.weight": [((0, 0), (2, 4)), ((2, 0), (1, 3)), ((2, 3), (1, 1))]}
        save({**tensors, "epoch": 3}, folder / "ckpt", boxes)
        return folder / "ckpt", [folder / "ckpt" / ".metadata", folder / "ckpt" / "__0_0.distcp"]

    def official(self, path):
        return {name: value for name, value in loaded(path).items() if isinstance(value, torch.Tensor)}

    def test_offset_is_where_the_bytes_lie(self, built):
        """A chunk's place is known when its archive is read, which listing does not do."""
        assert {tensor.offset for tensor in wb.open(built[0]).values()} == {None}

    def test_a_file_cut_at_any_byte_is_refused_or_whole(self, built):
        """Every byte of the metadata; the chunks are zip archives, whose every byte is another test's."""
        super().test_a_file_cut_at_any_byte_is_refused_or_whole((built[0], built[1][:1]))
        expected, file = (listing(wb.open(built[0])), values(wb.open(built[0]))), built[1][1]
        data = file.read_bytes()
        for cut in range(0, len(data), 1 if FULL else 67):
            file.write_bytes(data[:cut])
            ckpt = wb.open(built[0])
            assert listing(ckpt) == expected[0]
            with pytest.raises(CorruptFileError):
                values(ckpt)

    def test_a_flipped_byte_never_gives_a_foreign_exception_or_a_hang(self, built):
        super().test_a_flipped_byte_never_gives_a_foreign_exception_or_a_hang((built[0], built[1] if FULL else built[1][:1]))
        data = built[1][1].read_bytes()
        for at in range(0, len(data), 31):
            built[1][1].write_bytes(data[:at] + bytes([data[at] ^ 0x11]) + data[at + 1 :])
            for tensor in wb.open(built[0]).values():
                with contextlib.suppress(WorkbenchError):
                    tensor.load()


class TestDcpOfSafetensors(TestDcp):
    """torch writes this serialization and reads it in no way; a tensor cut into chunks keeps one of them only."""

    def build(self, folder):
        tensors = {name: tensor for name, tensor in state().items() if name in ("layer.weight", "half", "step")}
        save({**tensors, "epoch": 3}, folder / "ckpt", serialization_format=SerializationFormat.SAFETENSORS)
        return folder / "ckpt", [folder / "ckpt" / ".metadata", folder / "ckpt" / "__0_0.distcp"]

    def official(self, path):
        from safetensors.torch import load

        blob = max(info.offset for info in metadata(path).storage_data.values())
        held = load((path / "__0_0.distcp").read_bytes()[blob:])
        return {name: held[name] for name in metadata(path).state_dict_metadata if name in held}


# torch's own spelling of the metadata: the fast path of real folders, against the single opcodes


def entries_of_many_kinds(count):
    """Of many sizes and numbers of dimensions, and some in several chunks, one of them with a row on a rank that has none."""
    shapes = [(3, 4), (5,), (), (2, 3, 4), (1, 2, 1, 2), (300, 2), (0,), (70_000,)]
    tensors = {
        f"layers.{i}.weight": torch.empty(shapes[i % len(shapes)], dtype=[torch.float32, torch.bfloat16][i % 2]) for i in range(count)
    }
    halves = {name: [((0, 0), (2, 4)), ((2, 0), (1, 4)), ((3, 0), (0, 4))] for name, tensor in tensors.items() if tensor.shape == (3, 4)}
    return {"model": tensors, "step": 3, "grad": torch.ones(2, requires_grad=True)}, {
        f"model.{name}": boxes for name, boxes in halves.items()
    }


def require_agreement(folder, monkeypatch):
    """How many entries the fast path carried out, which gives what the single opcodes give: a listing, or a refusal."""
    carried, given = [], []

    def carry_out(vm, start):
        before = len(vm.stack)
        taken = fast(vm, start)
        carried.append(len(vm.stack) - before if taken else 0)
        return taken

    fast = dcp_folder.carry_out_entries
    for entries in (carry_out, None):
        with monkeypatch.context() as patch:
            patch.setattr(dcp_folder, "carry_out_entries", entries)
            try:
                ckpt = wb.open(folder)
                held = {name: tensor.source.storage for name, tensor in ckpt.items()}
                places = {
                    name: [(chunk.offsets, chunk.span) for chunk in getattr(tiles, "chunks", (tiles,))] for name, tiles in held.items()
                }
                given.append((listing(ckpt), places, [(found.kind, found.message) for found in ckpt.findings]))
            except WorkbenchError as error:
                given.append(type(error))
    assert given[0] == given[1]
    return sum(carried)


@pytest.mark.parametrize("count", [40, 2000])
def test_the_fast_path_gives_what_the_single_opcodes_give(count, tmp_path, monkeypatch):
    """Metadata of several frames too, each of which ends amid an entry."""
    tensors, boxes = entries_of_many_kinds(count)
    folder = save(tensors, tmp_path / "ckpt", boxes)
    assert require_agreement(folder, monkeypatch) > 4 * count  # of each tensor a name, an entry, an index and a place


def test_each_new_spelling_of_entries_counts_among_what_is_built(tmp_path, monkeypatch):
    """A pattern is made for each, which takes a millisecond or two; where that was done too often, the rest is run singly."""
    folder = save(entries_of_many_kinds(16)[0], tmp_path / "ckpt")
    expected, made, honest = listing(wb.open(folder)), [], dcp_template._many
    monkeypatch.setattr(dcp_template, "_LEARNED", MAX_BUILT)
    monkeypatch.setattr(dcp_template, "_many", lambda *args: made.append(args) or honest(*args))
    assert listing(wb.open(folder)) == expected
    assert len(made) == 1


def test_a_near_miss_of_the_fast_path_agrees(tmp_path, monkeypatch):
    folder = save(*entries_of_many_kinds(16)[:1], tmp_path / "ckpt", entries_of_many_kinds(16)[1])
    file, draw = folder / ".metadata", random.Random(2)
    data = file.read_bytes()
    for _ in range(5000 if FULL else 300):
        at = draw.randrange(400, len(data))
        byte = draw.choice([draw.randrange(256), draw.choice(data), data[at] ^ 1])
        file.write_bytes(data[:at] + bytes([byte]) + data[at + 1 :])
        require_agreement(folder, monkeypatch)


def test_a_memo_entry_that_the_fast_path_left_out_is_found_by_running_singly(tmp_path, monkeypatch):
    """Parts of entries are fetched at the end, in place of the version."""
    tensors, boxes = entries_of_many_kinds(16)
    file = save(tensors, tmp_path / "ckpt", boxes) / ".metadata"
    data = file.read_bytes()
    for index in range(60, 90):
        file.write_bytes(data.replace(b"\x8c\x051.0.0\x94", b"j" + bytes([index, 0, 0, 0]) + b"N0N0"))
        assert require_agreement(file.parent, monkeypatch)


def test_a_training_state_is_nested_as_it_was(tmp_path):
    training = {
        "model": {"a.b": torch.ones(2, 3), "c": torch.arange(4)},
        "optim": {
            "state": {"a.b": {"step": torch.tensor(3.0)}},
            "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99), "params": ["a.b", "c"]}],
        },
        "epoch": 7,
        "shards": [torch.zeros(1), torch.ones(1)],
    }
    ckpt = wb.open(save(training, tmp_path / "ckpt"))
    official = loaded(tmp_path / "ckpt")
    assert list(ckpt) == ["model.a.b", "model.c", "optim.state.a.b.step", "shards.0", "shards.1"]
    assert all(same(ckpt["model." + name].load(), tensor) for name, tensor in official["model"].items())
    assert same(ckpt["shards.1"].load(), official["shards"][1])
    assert ckpt.tree["optim"]["param_groups"] == official["optim"]["param_groups"] == training["optim"]["param_groups"]
    assert (ckpt.extras["epoch"], ckpt.findings, ckpt.weights_section.name) == (7, (), "model")
    assert (ckpt.format, ckpt.name, ckpt.metadata["version"]) == ("dcp", "ckpt", "1.0.0")


def test_listing_opens_no_tensors_archive(tmp_path, monkeypatch):
    from workbench.formats import dcp_folder

    save({f"w{i}": torch.ones(3) for i in range(5)}, tmp_path / "ckpt")
    monkeypatch.setattr(dcp_folder.Chunk, "values", None)
    assert len(wb.open(tmp_path / "ckpt")) == 5


def cuts(draw, low, high):
    inner = draw(st.lists(st.integers(low, high), max_size=2, unique=True))
    return sorted({low, *inner, high})


@st.composite
def tilings(draw):
    """A tensor and boxes that tile it: a grid, and one of its boxes cut again in another way."""
    shape = draw(st.lists(st.integers(1, 5), max_size=3))
    dtype = draw(st.sampled_from([torch.float32, torch.uint8, torch.bfloat16, torch.complex64]))
    tensor = torch.arange(int(torch.Size(shape).numel())).reshape(shape).to(dtype)
    parts = [((), ())]
    for n in shape:
        edges = cuts(draw, 0, n)
        parts = [((*o, a), (*s, b - a)) for o, s in parts for a, b in itertools.pairwise(edges)]
    if shape:
        offsets, sizes = parts.pop(draw(st.integers(0, len(parts) - 1)))
        axis = draw(st.integers(0, len(shape) - 1))
        edges = cuts(draw, offsets[axis], offsets[axis] + sizes[axis])
        for a, b in itertools.pairwise(edges):
            parts.append(((*offsets[:axis], a, *offsets[axis + 1 :]), (*sizes[:axis], b - a, *sizes[axis + 1 :])))
    return tensor, draw(st.permutations(parts))


@given(made=tilings(), start=st.integers(0, 60), count=st.integers(0, 60), step=st.integers(1, 40))
def test_a_tensor_is_put_together_from_any_tiling(made, start, count, step, tmp_path):
    tensor, parts = made
    save({"w": tensor}, tmp_path / "ckpt", {"w": parts})
    found = wb.open(tmp_path / "ckpt")["w"]
    assert same(found.load(), tensor)
    assert same(found.load(), loaded(tmp_path / "ckpt")["w"])
    assert found.raw(start, start + count) == bits(tensor)[start : start + count]
    assert b"".join(bits(chunk) for _, chunk in found.chunks(step)) == bits(tensor)


@pytest.mark.parametrize("shape", [(3, 4000), (4000, 3)])
def test_columns_are_put_together_whether_wide_or_narrow(shape, tmp_path):
    tensor = torch.randn(shape)
    half = shape[1] // 2
    boxes = [((0, 0), (shape[0], half)), ((0, half), (shape[0], shape[1] - half))]
    save({"w": tensor}, tmp_path / "ckpt", {"w": boxes})
    assert same(wb.open(tmp_path / "ckpt")["w"].load(), tensor)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(4, 6).t(),
        torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        torch.randn(3, 4)[:, 1:3],
        torch.randn(5)[::2],
    ],
)
def test_a_tensor_saved_with_strides_of_its_own_reads_in_logical_order(tensor, tmp_path):
    found = wb.open(save({"w": tensor}, tmp_path / "ckpt"))["w"]
    assert same(found.load(), tensor)
    assert (found.raw(5, 11), found.peek(3)) == (bits(tensor)[5:11], tensor.reshape(-1)[:3].tolist())


def test_two_processes_that_share_their_tensors(tmp_path):
    torch.multiprocessing.spawn(_rank, (tmp_path,), nprocs=2)
    ckpt, official = wb.open(tmp_path / "ckpt"), loaded(tmp_path / "ckpt")
    assert list(ckpt) == [name for name, value in official.items() if isinstance(value, torch.Tensor)]
    assert all(same(ckpt[name].load(), official[name]) for name in ckpt)
    assert same(ckpt["columns"].load(), torch.arange(35.0).reshape(7, 5))


def _rank(rank, folder):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh, full = init_device_mesh("cpu", (2,)), torch.arange(35.0).reshape(7, 5)
    places = {"rows": Shard(0), "columns": Shard(1), "whole": Replicate()}
    tensors = {name: distribute_tensor(full, mesh, [place]) for name, place in places.items()}
    short = distribute_tensor(torch.ones(1, 3), mesh, [Shard(0)])  # the second rank holds nothing of it
    dcp.save({**tensors, "short": short, "epoch": 3}, checkpoint_id=f"{folder}/ckpt")
    dist.destroy_process_group()


def test_saving_as_pt_and_safetensors_writes_the_values(tmp_path):
    tensor = torch.randn(7, 5)
    ckpt = wb.open(save({"w": tensor, "t": torch.randn(3, 4).t()}, tmp_path / "ckpt", {"w": [((0, 0), (7, 2)), ((0, 2), (7, 3))]}))
    for name in ("x.pt", "x.safetensors"):
        wb.save(ckpt, tmp_path / name)
        assert same(wb.open(tmp_path / name)["w"].load(), tensor)


def test_a_missing_file_is_named_and_the_rest_is_read(tmp_path):
    folder = save({"a": torch.ones(2), "b": torch.zeros(3)}, tmp_path / "ckpt", single_file_per_rank=False)
    os.remove(folder / metadata(folder).storage_data[MetadataIndex("b", (0,))].relative_path)
    with pytest.raises(MissingShardError, match=r"1 of 2 files of chunks are not there: __0_\d\.distcp") as caught:
        wb.open(folder)
    partial = caught.value.partial
    assert listing(partial) == [("a", (2,), "float32"), ("b", (3,), "float32")]
    assert partial["a"].load().tolist() == [1, 1]
    with pytest.raises(CorruptFileError, match="locked"):
        partial["b"].load()


def test_a_cut_file_locks_only_what_it_lacks(tmp_path):
    folder = save({"a": torch.ones(2), "b": torch.zeros(3)}, tmp_path / "ckpt")
    os.truncate(folder / "__0_0.distcp", (folder / "__0_0.distcp").stat().st_size - 1)
    ckpt = wb.open(folder)
    (finding,) = ckpt.findings
    assert (finding.kind, finding.severity, finding.where) == ("values locked", "danger", {"names": ["b"]})
    assert ckpt["a"].load().tolist() == [1, 1]


class Evil:
    def __reduce__(self):
        return os.system, ("echo executed > /tmp/never",)


def spoilt(held, **parts):
    """One more place, its index then made of other types."""
    index = MetadataIndex("more", (0, 0))
    held.storage_data[index] = held.storage_data[MetadataIndex("w", (0, 0))]
    for part, value in parts.items():
        object.__setattr__(index, part, value)


def chunk(held, number=0):
    return held.state_dict_metadata["w"].chunks[number]


LIES = {
    "a chunk is missing": lambda m: m.state_dict_metadata["w"].chunks.pop(),
    "a chunk lies twice": lambda m: m.state_dict_metadata["w"].chunks.append(chunk(m)),
    "chunks overlap and leave a hole": lambda m: setattr(chunk(m, 1), "offsets", torch.Size((1, 0))),
    "a chunk lies outside": lambda m: setattr(chunk(m, 1), "offsets", torch.Size((3, 0))),
    "a chunk of another rank": lambda m: setattr(chunk(m), "sizes", torch.Size((8,))),
    "a size is negative": lambda m: setattr(m.state_dict_metadata["w"], "size", (-4, -4)),
    "a size is no size": lambda m: setattr(m.state_dict_metadata["w"], "size", "4, 4"),
    "the tensor is larger than its chunks": lambda m: setattr(m.state_dict_metadata["w"], "size", torch.Size((2**40, 4))),
    "chunks are no list": lambda m: setattr(m.state_dict_metadata["w"], "chunks", 3),
    "no table of tensors": lambda m: setattr(m, "state_dict_metadata", [1]),
    "an entry is no entry": lambda m: m.state_dict_metadata.update(w=3),
    "a negative offset": lambda m: setattr(m.storage_data[MetadataIndex("w", (0, 0))], "offset", -1),
    "a place that is a number": lambda m: setattr(m.storage_data[MetadataIndex("w", (0, 0))], "relative_path", 3),
    "a place of a list": lambda m: spoilt(m, fqn=[1], offset={}),
    "a place at a list": lambda m: spoilt(m, offset="ab"),
    "a name of a number": lambda m: m.state_dict_metadata.update({3: m.state_dict_metadata["w"]}),
    "no path": lambda m: m.planner_data.update(w=()),
    "a path of objects": lambda m: m.planner_data.update(w=(None,)),
    "an endless path": lambda m: m.planner_data.update(w=("x",) * 5000),
    "two tensors at one path": lambda m: m.planner_data.update(w=("v",)),
    "a path through a tensor": lambda m: m.planner_data.update(w=("v", "deeper")),
}


@pytest.fixture
def folder(tmp_path):
    return save({"w": torch.randn(4, 4), "v": torch.ones(2)}, tmp_path / "ckpt", {"w": [((0, 0), (2, 4)), ((2, 0), (2, 4))]})


@pytest.mark.parametrize("what", LIES)
def test_metadata_that_contradicts_itself_is_refused(what, folder):
    rewrite(folder, LIES[what])
    with pytest.raises(CorruptFileError):
        wb.open(folder)


def test_a_position_far_away_makes_no_endless_list(folder):
    rewrite(folder, lambda m: m.planner_data.update(w=("x", 10**12)))
    assert list(wb.open(folder)) == ["v", "x.1000000000000"]


@pytest.mark.parametrize("path", ["../outside.distcp", "/etc/passwd", "link.distcp", "."])
def test_a_chunk_outside_of_the_folder_is_never_read(path, folder):
    (folder.parent / "outside.distcp").write_bytes((folder / "__0_0.distcp").read_bytes())
    os.symlink(folder.parent / "outside.distcp", folder / "link.distcp")
    rewrite(folder, lambda m: [setattr(info, "relative_path", path) for info in m.storage_data.values()])
    with pytest.raises((UnsupportedError, UnknownFormatError)):
        wb.open(folder)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda m: [setattr(info, "offset", info.offset + 1) for info in m.storage_data.values()], "end record|cut|damaged|header"),
        (lambda m: [setattr(info, "length", info.length - 1) for info in m.storage_data.values()], "end record|cut|damaged"),
        (lambda m: m.storage_data.pop(MetadataIndex("w", (0, 0))), "does not say where"),
        (lambda m: setattr(m, "storage_data", None), "does not say where"),
        (lambda m: setattr(m.state_dict_metadata["w"].properties, "dtype", torch.int32), "the metadata says int32"),
        (lambda m: [setattr(info, "length", 5) for info in m.storage_data.values()], "cannot hold"),
        (lambda m: [setattr(info, "transform_descriptors", ["stream.zstd/1"]) for info in m.storage_data.values()], "stream.zstd"),
    ],
)
def test_bytes_that_are_not_what_the_metadata_says_give_no_values(change, told, folder):
    rewrite(folder, change)
    ckpt = wb.open(folder)
    assert list(ckpt) == ["v", "w"]
    with pytest.raises(CorruptFileError, match=told):
        ckpt["w"].load()


def test_a_layout_that_is_not_strided_is_unsupported(folder):
    rewrite(folder, lambda m: setattr(m.state_dict_metadata["w"].properties, "layout", torch.sparse_coo))
    with pytest.raises(UnsupportedError, match="strided"):
        wb.open(folder)


def test_what_the_metadata_would_execute_is_named_and_the_tensors_are_listed(folder):
    rewrite(folder, lambda m: m.planner_data.update(evil=Evil()))
    ckpt = wb.open(folder)
    assert (list(ckpt), ckpt.dangers) == (["v", "w"], ("posix.system",))
    (folder / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CorruptFileError) as caught:
        wb.open(folder)
    assert caught.value.partial.dangers == ("posix.system",)


def test_what_an_object_would_execute_is_named(tmp_path):
    ckpt = wb.open(save({"w": torch.ones(2), "evil": Evil()}, tmp_path / "ckpt"))
    assert (list(ckpt), ckpt.dangers) == (["w"], ("posix.system",))
    assert ckpt.findings[0].where["record"] == "evil"


def test_an_object_that_is_not_readable_is_a_danger(tmp_path):
    folder = save({"w": torch.ones(2), "epoch": 3}, tmp_path / "ckpt")
    rewrite(folder, lambda m: setattr(m.storage_data[MetadataIndex("epoch")], "length", 40))
    assert [(f.kind, f.severity) for f in wb.open(folder).findings] == [("unreadable pickle", "danger")]


def test_large_objects_are_told_and_not_looked_at(tmp_path):
    folder = save({"w": torch.ones(2), "log": "x" * (9 << 20), "blob": b"y" * (9 << 20), "epoch": 3}, tmp_path / "ckpt")
    ckpt = wb.open(folder)
    assert [(f.kind, f.where["names"]) for f in ckpt.findings] == [("object not read", ["log", "blob"])]
    assert ckpt.extras["epoch"] == 3


def laughs(depth=60):
    """Few lists that a text would spell out 2 ** depth times."""
    value = ["ha"]
    for _ in range(depth):
        value = [value, value]
    return value


@pytest.mark.parametrize(
    "change",
    [
        lambda m: setattr(m.storage_data[MetadataIndex("w", (0, 0))], "transform_descriptors", laughs()),
        lambda m: setattr(m.storage_data[MetadataIndex("w", (0, 0))], "relative_path", laughs()),
        lambda m: setattr(m.state_dict_metadata["w"], "size", laughs()),
        lambda m: setattr(m.state_dict_metadata["w"], "properties", laughs()),
        lambda m: setattr(m, "version", laughs()),
        lambda m: m.planner_data.update(w=(laughs(),)),
        lambda m: spoilt(m, fqn=laughs()),
        lambda m: spoilt(m, offset=laughs()),
    ],
)
def test_parts_that_would_never_end_in_a_message_are_not_spelled_out(change, folder):
    rewrite(folder, change)
    start = time.process_time()
    with contextlib.suppress(WorkbenchError):
        str(wb.open(folder))
    assert time.process_time() - start < 2


def test_an_archive_that_holds_something_else_is_told_and_not_spelled_out(folder):
    torch.save({"w": laughs()}, folder / "other.distcp")
    nbytes = (folder / "other.distcp").stat().st_size
    rewrite(
        folder,
        lambda m: m.storage_data.update(
            {MetadataIndex("v", (0,)): type(m.storage_data[MetadataIndex("v", (0,))])("other.distcp", 0, nbytes)}
        ),
    )
    with pytest.raises(CorruptFileError, match="the metadata says float32"):
        wb.open(folder)["v"].load()


def test_a_thousand_chunks_that_all_overlap_are_refused_at_once(folder):
    """Boxes of the right volume in total, on top of each other."""

    def crowd(held):
        held.state_dict_metadata["w"].size = torch.Size((4000, 4))
        held.state_dict_metadata["w"].chunks[:] = [ChunkStorageMetadata(torch.Size((i % 2, 0)), torch.Size((2, 4))) for i in range(2000)]
        held.storage_data[MetadataIndex("w", (1, 0))] = held.storage_data[MetadataIndex("w", (0, 0))]

    rewrite(folder, crowd)
    start = time.process_time()
    with pytest.raises(CorruptFileError, match="overlaps"):
        wb.open(folder)
    assert time.process_time() - start < 2


def boxed(tensors, shape, corners, size):
    """A change that makes tensors of one list of chunks, which lie nowhere."""
    chunks = [ChunkStorageMetadata(torch.Size(corner), torch.Size(size)) for corner in corners]

    def change(held):
        held.state_dict_metadata["w"].size, held.state_dict_metadata["w"].chunks = torch.Size(shape), chunks
        for number in range(tensors):
            held.state_dict_metadata[f"w{number}"] = held.state_dict_metadata["w"]
            held.planner_data[f"w{number}"] = (f"w{number}",)

    return change


def test_a_grid_is_proved_without_comparing_its_chunks(folder, monkeypatch):
    monkeypatch.setattr(dcp_folder, "_MAX_COMPARISONS", 0)
    rewrite(folder, boxed(0, (2,) * 8, itertools.product((0, 1), repeat=8), (1,) * 8))
    assert wb.open(folder)["w"].shape == (2,) * 8


def test_chunks_in_no_grid_are_compared_within_one_bound_for_the_folder(folder, monkeypatch):
    corners = [(i % 2, j) for i in range(2) for j in range(20)]

    def bricks(held):
        boxed(0, (30, 40), [], ())(held)
        held.state_dict_metadata["w"].chunks = [
            ChunkStorageMetadata(torch.Size((20 * i - 10 * (j % 2) if i else 0, 2 * j)), torch.Size((20 if i == j % 2 else 10, 2)))
            for i, j in corners
        ]

    rewrite(folder, bricks)
    assert wb.open(folder)["w"].shape == (30, 40)
    monkeypatch.setattr(dcp_folder, "_MAX_COMPARISONS", 10)
    with pytest.raises(UnsupportedError, match="too intricate"):
        wb.open(folder)


def test_tensors_that_share_one_long_list_of_chunks_are_not_each_gone_through(folder, monkeypatch):
    asked = []
    honest = dcp_folder._chunk_entry
    monkeypatch.setattr(dcp_folder, "_chunk_entry", lambda node: asked.append(node) or honest(node))
    rewrite(folder, boxed(300, (1000,), [(i,) for i in range(1000)], (1,)))
    with pytest.raises(UnsupportedError, match="copies"):
        wb.open(folder)
    assert len(asked) < 70_000


@pytest.mark.parametrize(("value", "opened"), [(0.001, 1), ((0.9, 0.999), 1), ([0.9], 40)])
def test_objects_of_the_same_bytes_are_opened_once_where_they_may_be_shared(value, opened, tmp_path, monkeypatch):
    calls = []
    honest = dcp_folder.read_zip_index
    monkeypatch.setattr(dcp_folder, "read_zip_index", lambda *args: calls.append(args) or honest(*args))
    save({f"lr{number}": value for number in range(40)}, tmp_path / "ckpt")
    assert wb.open(tmp_path / "ckpt").tree == {f"lr{number}": value for number in range(40)}
    assert len(calls) == opened


def test_very_many_objects_over_one_archive_are_not_each_opened(tmp_path, monkeypatch):
    calls = []
    honest = dcp_folder.read_zip_index
    monkeypatch.setattr(dcp_folder, "read_zip_index", lambda *args: calls.append(args) or honest(*args))
    monkeypatch.setattr(dcp_folder, "_MAX_OBJECTS", 64 << 10)
    save({f"o{number}": [number] for number in range(100)}, tmp_path / "ckpt")
    (found,) = wb.open(tmp_path / "ckpt").findings
    assert (found.kind, len(calls)) == ("object not read", 32)


def test_values_read_in_another_process_and_on_many_threads(folder):
    from concurrent.futures import ThreadPoolExecutor

    ckpt = pickle.loads(pickle.dumps(wb.open(folder)))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: values(ckpt), range(8)))
    assert all(each == values(wb.open(folder)) for each in found)
