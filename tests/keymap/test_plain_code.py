"""KeyMap.code: run by a process that knows torch and safetensors alone, it makes what `apply` makes, value by value, of every file."""

import json
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import safetensors.torch
import torch
from strategies import same

import workbench as wb
from workbench.errors import SelectionError
from workbench.keymap.maps import KeyMap, Pair


def state():
    return {f"layers.{i}.self_attn.{word}_proj.weight": torch.randn(4, 4) for i in range(2) for word in "qkv"} | {"head": torch.ones(3)}


def nested(tree):
    out = {}
    for name, tensor in tree.items():
        *path, last = name.split(".")
        node = out
        for key in path:
            node = node.setdefault(int(key) if key.isdecimal() else key, {})
        node[last] = tensor
    return out


def sharded(folder, write, ending):
    parts = [dict(list(state().items())[:3]), dict(list(state().items())[3:])]
    for i, part in enumerate(parts, 1):
        write(part, folder / f"model-{i:05}-of-00002.{ending}")
    return {name: f"model-{i:05}-of-00002.{ending}" for i, part in enumerate(parts, 1) for name in part}


def indexed(folder, write, ending):
    weight_map = sharded(folder, write, ending)
    write({"head": torch.zeros(3), "more": torch.zeros(1)}, folder / "model-00003-of-00003.safetensors")  # an older shard beside them
    index = folder / f"model.{ending}.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return index


def written(write, ending, what):
    def build(folder):
        write(what(), folder / f"a 'file'.{ending}")
        return folder / f"a 'file'.{ending}"

    return build


def in_list():
    return {"stages": [nested(state())["layers"], (torch.ones(2),)], "head": torch.ones(3)}


def shadow():
    return {"ema": {"decay": 0.9, "shadow_params": [torch.ones(2), torch.ones(2, 3), torch.zeros(3)]}}


def clash():
    return {"a.b": torch.zeros(2), "a": {"b": torch.ones(2)}}


def legacy(tree, path):
    torch.save(tree, path, _use_new_zipfile_serialization=False)


def tied(tree, path):
    safetensors.torch.save_model(torch.nn.ModuleDict({"a": (one := torch.nn.Linear(2, 2)), "b": one}), path)


FILES = {
    "flat": written(torch.save, "pt", state),
    "parameters": written(torch.save, "pt", torch.nn.Linear(2, 2).state_dict),
    "Lightning": written(torch.save, "ckpt", lambda: {"epoch": 1, "state_dict": state(), "optimizer_states": [{"state": {}}]}),
    "nested section": written(torch.save, "pt", lambda: {"model": {"net": state(), "lr": 1}, "step": 3}),
    "nested tensors": written(torch.save, "pt", lambda: {"model": nested(state())}),
    "dots in a key": written(torch.save, "pt", lambda: {"ema.module": state(), "a.b": 1}),
    "numbers for keys": written(torch.save, "pt", lambda: {0: state(), 1: 2}),
    "a list": written(torch.save, "pt", in_list),
    "a list of tensors": written(torch.save, "pt", shadow),
    "two alike": written(torch.save, "pt", clash),
    "one tensor": written(torch.save, "pt", lambda: torch.ones(3)),
    "legacy": written(legacy, "pth", lambda: {"state_dict": state()}),
    "safetensors": written(safetensors.torch.save_file, "safetensors", state),
    "a tie": written(tied, "safetensors", state),
    "index": lambda folder: indexed(folder, safetensors.torch.save_file, "safetensors"),
    "index of bin": lambda folder: indexed(folder, torch.save, "bin"),
    "no index": lambda folder: sharded(folder, safetensors.torch.save_file, "safetensors") and folder,
}


def mapped(path):
    """Every tensor under another name; those of attention in one."""
    weights = wb.open(path).weights
    if any("self_attn" in name for name in weights):
        prefix = next(name for name in weights if "self_attn" in name).partition("0.self_attn")[0]
        return wb.match(path, {f"{prefix}{i}.attn.qkv.weight": (12, 4) for i in range(2)} | ({"head": (3,)} if "head" in weights else {}))
    return wb.match(path, {f"module.{name}": tensor.shape for name, tensor in weights.items()})


def test_the_code_makes_what_apply_makes_in_a_process_without_this_library(tmp_path):
    maps, codes = {}, tmp_path / "codes"
    codes.mkdir()
    for name, build in FILES.items():
        folder = tmp_path / name
        folder.mkdir()
        path = build(folder)
        maps[name] = path, mapped(path)
        assert maps[name][1], (name, maps[name][1])
        code = KeyMap.from_dict(json.loads(json.dumps(maps[name][1].to_dict()))).code()
        assert "workbench" not in code.replace(str(tmp_path), "")
        (codes / f"{name}.py").write_text(code)
    run = "import sys, torch, pathlib, unittest.mock\nfor code in pathlib.Path(sys.argv[1]).glob('*.py'):\n    room = {'model': unittest.mock.Mock()}\n    exec(code.read_text(), room)\n    torch.save(room['state_dict'], code.with_suffix('.made'))\nassert 'workbench' not in sys.modules"
    subprocess.run([sys.executable, "-c", run, str(codes)], check=True, timeout=120, cwd=tmp_path)
    for name, (path, keymap) in maps.items():
        made, wanted = torch.load(codes / f"{name}.made", weights_only=True), keymap.apply(path)
        assert made.keys() == wanted.keys()
        assert all(same(made[target], tensor.load()) for target, tensor in wanted.items()), name


def test_a_section_and_what_ops_made_are_told_from_the_root():
    tree = {"a": {"b.c": {"w": torch.ones(2)}}}
    keymap = wb.match(wb.open(tree).section(("a", "b.c")), {"module.w": (2,)})
    room = {"checkpoint": tree, "model": Mock()}
    exec(keymap.code(), room)
    assert torch.equal(room["state_dict"]["module.w"], torch.ones(2))
    assert "checkpoint['p']['q']" in KeyMap((Pair.plain("w", "w", "", "certain", ""),), section="p.q").code()


def test_the_code_loads_the_model_and_names_what_stays_as_it_is():
    source, model = torch.nn.Linear(3, 4), torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 5))
    keymap = wb.match(under_net(source), model)
    *_, comment, last = keymap.code().splitlines()
    assert "'1.weight', '1.bias'" in comment
    assert last == "model.load_state_dict(state_dict, strict=False)"
    exec(keymap.code(), {"checkpoint": under_net(source), "model": model})
    assert torch.equal(model[0].weight, source.weight)
    whole = wb.match(under_net(source), model[:1])
    assert whole.code().splitlines()[-1] == "model.load_state_dict(state_dict)"


def under_net(module):
    return {f"net.0.{name}": value for name, value in module.state_dict().items()}


def whole_module(path):
    torch.save(torch.nn.Linear(2, 2), path)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda path: np.savez(path, w=np.ones(2)), "neither torch nor safetensors reads npz"),
        (whole_module, "inside an object"),
        (lambda path: torch.save({"net": torch.nn.Linear(2, 2)}, path), "inside an object"),
        (lambda path: torch.save({"net": {(1, 2): torch.ones(2)}}, path), "no text or number"),
        (lambda path: torch.save({"net": {1 << 80: torch.ones(2)}}, path), "no text or number"),
    ],
    ids=["npz", "a module", "a module in a dict", "a key that JSON cannot hold", "a number that JSON would round"],
)  # fmt: skip
def test_a_file_that_plain_python_cannot_read_is_refused(make, why, tmp_path):
    path = Path(tmp_path / "file.npz")
    make(path)
    names = {name: tensor.shape for name, tensor in wb.open(path).weights.items()}
    with pytest.raises(SelectionError, match=why) as error:
        wb.match(path, names).code()
    assert "wb.save" in error.value.hint
