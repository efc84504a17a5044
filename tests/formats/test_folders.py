"""Folders: the one checkpoint in them is opened, several are listed, and what small JSON files beside the weights say is kept."""

import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import workbench as wb
from workbench import formats
from workbench.errors import CorruptFileError, UnknownFormatError

W = {"w": torch.ones(3)}


def fill(folder, *names):
    """Files that hold W, or text where the name says so."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".safetensors"):
            save_file(W, path)
        elif name.endswith((".pt", ".bin", ".pth", ".ckpt")):
            torch.save(W, path)
        elif name.endswith(".npz"):
            np.savez(path, w=np.ones(3))
        elif name.endswith(".index.json"):
            path.write_text(json.dumps({"metadata": {}, "weight_map": {"w": "model-00001-of-00001.safetensors"}}))
        elif name.endswith(".json"):
            path.write_text(json.dumps({"about": name, "metadata": {}}))
        else:
            path.write_text("text")
    return folder


def refusal(folder):
    with pytest.raises(UnknownFormatError) as caught:
        wb.open(folder)
    return str(caught.value)


@pytest.mark.parametrize(
    ("names", "chosen", "others"),
    [
        (["weights.pt", "config.json", "metrics.json", "README.md"], "weights.pt", []),
        (["model.safetensors", "config.json", "tokenizer.json"], "model.safetensors", []),
        (
            ["model.safetensors", "pytorch_model.bin", "tf_model.h5", "config.json"],
            "model.safetensors",
            ["pytorch_model.bin", "tf_model.h5"],
        ),
        (["pytorch_model.bin", "training_args.bin"], "pytorch_model.bin", ["training_args.bin"]),
        (["model-00001-of-00001.safetensors", "model.safetensors.index.json"], "model.safetensors.index.json", []),
        (["model-00001-of-00001.safetensors"], "model.safetensors", []),
        (["adapter_model.safetensors", "adapter_config.json"], "adapter_model.safetensors", []),
        (["diffusion_pytorch_model.safetensors", "config.json"], "diffusion_pytorch_model.safetensors", []),
        (["consolidated.00.pth", "params.json"], "consolidated.00.pth", []),
        (["arrays.npz", "notebook.json", "notes.txt"], "arrays.npz", []),
        (
            ["model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json"],
            "model.safetensors",
            ["optimizer.pt", "scheduler.pt"],
        ),
    ],
)
def test_the_customary_or_only_checkpoint_is_opened_and_the_others_are_named(names, chosen, others, tmp_path):
    ckpt = wb.open(fill(tmp_path, *names))
    assert (ckpt.name, list(ckpt)) == (chosen, ["w"])
    assert ckpt["w"].load().tolist() == [1, 1, 1]
    assert [f.where["names"] for f in ckpt.findings if f.kind == "other files"] == ([others] if others else [])


def test_small_json_files_beside_the_weights_are_readable(tmp_path):
    fill(tmp_path, "weights.pt", "config.json", "metrics.json", "tokenizer.json")
    (tmp_path / "params.json").write_text("x" * (1 << 21))
    metadata = wb.open(tmp_path).metadata
    assert {name: json.loads(text)["about"] for name, text in metadata.items()} == {
        "config.json": "config.json",
        "metrics.json": "metrics.json",
    }


def test_a_folder_of_a_split_gguf_file_is_one_model(tmp_path):
    import gguf
    import numpy

    for number in range(2):
        writer = gguf.GGUFWriter(tmp_path / f"m-{number + 1:05}-of-00002.gguf", "llama")
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", 2)
        writer.add_tensor(f"w{number}", numpy.zeros(8, "f4"))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    assert list(wb.open(tmp_path)) == ["w0", "w1"]
    (tmp_path / "x.index.json").write_text(json.dumps({"weight_map": {f"w{n}": f"m-{n + 1:05}-of-00002.gguf" for n in range(2)}}))
    with pytest.raises(wb.errors.CorruptFileError, match="may be split itself"):  # each shard would be the whole model
        wb.open(tmp_path / "x.index.json")


def test_several_checkpoints_are_listed_with_format_and_size_and_none_is_chosen(tmp_path):
    text = refusal(fill(tmp_path, "a.pt", "b.safetensors", "c.npz", "notes.txt"))
    titles = {form.name: form.title for form in (*formats.FILES, *formats.ARCHIVES)}
    assert "3 checkpoints" in text
    assert f"a.pt ({titles['torch-zip']}, " in text
    assert f"b.safetensors ({titles['safetensors']}, 76 B); c.npz ({titles['npz']}, " in text
    assert "/a.pt')" in text
    assert "notes" not in text


def test_a_model_beside_its_adapter_is_ambiguous(tmp_path):
    text = refusal(fill(tmp_path, "model.safetensors", "adapter_model.safetensors"))
    assert "2 checkpoints" in text
    assert "adapter_model.safetensors (76 B)" in text


@pytest.mark.parametrize(
    ("names", "listed"),
    [
        (
            ["checkpoint-500/model.safetensors", "checkpoint-1000/model.safetensors", "logs/events.txt"],
            ["checkpoint-1000/", "checkpoint-500/"],
        ),
        (
            [
                "model_index.json",
                "unet/diffusion_pytorch_model.safetensors",
                "vae/diffusion_pytorch_model.bin",
                "scheduler/scheduler_config.json",
            ],
            ["unet/", "vae/"],
        ),
    ],
)
def test_folders_of_models_are_listed(names, listed, tmp_path):
    text = refusal(fill(tmp_path, *names))
    assert all(f"{name} (a folder)" in text for name in listed)
    assert "2 checkpoints" in text
    assert list(wb.open(tmp_path / listed[0])) == ["w"]


def test_one_folder_of_a_model_is_opened_and_a_file_comes_before_it(tmp_path):
    assert list(wb.open(fill(tmp_path, "checkpoint-500/model.safetensors", "config.json"))) == ["w"]
    fill(tmp_path, "weights.ckpt")
    assert wb.open(tmp_path).name == "weights.ckpt"


def test_a_hub_cache_with_one_snapshot_is_opened_and_with_two_is_listed(tmp_path):
    root = fill(tmp_path / "models--org--name", "snapshots/aaa/model.safetensors", "snapshots/aaa/config.json", "blobs/x", "refs/main")
    ckpt = wb.open(root)
    assert (list(ckpt), list(ckpt.metadata)) == (["w"], ["config.json"])
    fill(root, "snapshots/bbb/model.safetensors")
    assert "snapshots/aaa/ (a folder); snapshots/bbb/ (a folder)" in refusal(root)


def test_a_broken_file_alone_is_told_as_broken(tmp_path):
    fill(tmp_path, "weights.pt", "README.md")
    (tmp_path / "weights.pt").write_bytes((tmp_path / "weights.pt").read_bytes()[:-30])
    with pytest.raises(CorruptFileError):
        wb.open(tmp_path)


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["saved_model.pb", "variables/variables.index", "fingerprint.pb"], "a TensorFlow SavedModel"),
        (["checkpoint", "ckpt-1.index", "ckpt-1.data-00000-of-00001"], "a folder of TensorFlow checkpoints"),
        (["Manifest.json", "Data/com.apple.CoreML/model.mlmodel"], "a Core ML package"),
        (["_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt", "d/x"], "an Orbax checkpoint"),
        (["config.json", "metadata.json", "model.weights.h5"], "an unpacked Keras archive"),
        (["latest", "zero_to_fp32.py", "global_step5/mp_rank_00_model_states.pt"], "a DeepSpeed checkpoint"),
        (["__0_0.distcp", "__0.metadata", "__1.metadata"], "a distributed checkpoint that each rank wrote for itself"),
        (["shard-00001-model-00001-of-00001.safetensors"], "a distributed checkpoint in safetensors shards"),
        (["README.md", "notes.txt"], "this folder holds no checkpoint"),
        ([], "this folder holds no checkpoint"),
    ],
)
def test_a_folder_that_is_not_read_is_told_for_what_it_is(names, told, tmp_path):
    assert told in refusal(fill(tmp_path, *names))


def test_links_pipes_and_folders_that_lead_nowhere_or_away_are_passed_by(tmp_path):
    fill(tmp_path / "outside", "model.safetensors")
    folder = fill(tmp_path / "model", "weights.pt")
    os.symlink("nowhere", folder / "dangling.pt")
    os.symlink("loop.pt", folder / "loop.pt")
    os.symlink(tmp_path / "outside", folder / "outside")
    os.symlink(tmp_path / "outside" / "model.safetensors", folder / "stolen.pt")
    os.mkfifo(folder / "pipe.pt")
    assert wb.open(folder).name == "weights.pt"
    os.remove(folder / "weights.pt")
    assert "no checkpoint" in refusal(folder)


def test_a_link_to_a_file_outside_is_refused_under_its_customary_name_too(tmp_path):
    fill(tmp_path, "outside/model.safetensors", "outside/config.json", "model/notes.txt")
    for name in ("model.safetensors", "config.json"):
        os.symlink(tmp_path / "outside" / name, tmp_path / "model" / name)
    with pytest.raises(wb.errors.UnsupportedError, match="outside"):
        wb.open(tmp_path / "model")


def test_a_crowd_of_files_is_not_read_through(tmp_path):
    for i in range(5000):
        (tmp_path / f"{i:05}.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    save_file(W, tmp_path / "model.safetensors")
    assert list(wb.open(tmp_path)) == ["w"]
