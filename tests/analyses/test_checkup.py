"""checkup: each ailment is found, its line of cure runs, and the mended file no longer has it. The cures are run as they stand."""

import io
import os
import re
import zipfile
from pathlib import Path

import pytest
import torch

import workbench as wb
from workbench.errors import CorruptFileError, ReportFailedError

GENERATOR = torch.Generator().manual_seed(5)


class Evil:
    def __reduce__(self):
        return (os.system, ("touch /tmp/executed",))


class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 4)


def weights(*, prefix=""):
    return {f"{prefix}layer.{i}.weight": torch.randn(4, 4, generator=GENERATOR) for i in range(3)}


def told(**more):
    """A file that says what it is: a tree of weights and an epoch."""
    return {"model": weights(), "epoch": 3, **more}


@pytest.fixture
def folder(tmp_path):
    """A folder with a name that says something."""
    made = tmp_path / "digits_small"
    made.mkdir()
    return made


def save(folder, value, name="digits_small_epoch3.pt", **options):
    torch.save(value, folder / name, **options)
    return folder / name


def run(cure):
    """Run one line of cure as it stands; returns the path it wrote."""
    assert "\n" not in cure
    made = {}
    exec(compile(cure, "<cure>", "exec"), {"wb": wb}, made)  # a line that our own code wrote
    return Path(eval(re.findall(r"'[^']*'|\"[^\"]*\"", cure.replace(', unsafe="drop"', ""))[-1]))


def about(report, word):
    return [advice for advice in report.advice if re.search(word, advice.what)]


AILMENTS = {
    "wrapper": (told(model=weights(prefix="module.")), "names carry module"),
    "wrapper in the middle": (
        told(model={**weights(), "block._orig_mod.weight": torch.ones(2) / 3, "block._fsdp_wrapped_module.bias": torch.ones(2) / 3}),
        "names carry _fsdp",
    ),
    "nested wrappers": (told(model=weights(prefix="module._orig_mod.")), "names carry _orig_mod, module"),
    "trainer's prefix": (told(model=weights(prefix="model.")), "every name begins"),
    "optimizer": (
        told(optimizer={"state": {0: {"exp_avg": torch.ones(4) / 3}}, "param_groups": [{"lr": 0.1, "params": [0]}]}),
        "training state",
    ),
    "rotary table": (told(model={**weights(), "attn.inv_freq": torch.ones(8) / 3}), "computes by itself"),
    "causal masks": (
        told(
            model={
                **weights(),
                **{f"h.{i}.attn.bias": torch.ones(1, 1, 6, 6).tril().bool() for i in range(3)},
                "h.0.mlp.bias": torch.ones(4) / 3,
            }
        ),
        "computes by itself",
    ),
    "gradient": (told(model={**weights(), "layer.0.weight.grad": torch.ones(4, 4) / 3}), "computes by itself"),
    "NaN": (told(model={**weights(), "bad.weight": torch.tensor([1.0, float("nan")])}), "NaN or infinities"),
    "infinity": (told(model={**weights(), "bad.weight": torch.tensor([1.0, float("inf")])}), "NaN or infinities"),
    "views": ({"a": torch.randn(1000, generator=GENERATOR)[:10], "b": torch.ones(3) / 3}, "no tensor shows"),
    "bfloat16 in disguise": (told(model={k: v.to(torch.bfloat16).float() for k, v in weights().items()}), "exactly bfloat16"),
    "float16 in disguise": (told(model={"w": torch.arange(1, 2000).half().float()}), "exactly float16"),
    "nothing told": (weights(), "nothing says what it is"),
    "whole model": (Tiny(), "whole model"),
    "code": ({**told(), "hook": Evil()}, "danger"),
}


@pytest.mark.parametrize("what", AILMENTS)
def test_each_cure_runs_and_mends(what, folder):
    value, word = AILMENTS[what]
    path = save(folder, value)
    report = wb.checkup(path)
    (advice,) = about(report, word)
    assert advice.cure is not None
    made = run(advice.cure)
    assert made != path
    assert made.exists()
    after = wb.checkup(made)
    assert not about(after, word), after
    torch.load(made, weights_only=True) if made.suffix == ".pt" else wb.open(made)
    assert not os.path.exists("/tmp/executed")


def test_the_kept_tensors_are_untouched_by_a_cure(folder):
    path = save(folder, told(model={**weights(), "attn.inv_freq": torch.ones(8) / 3}))
    made = run(about(wb.checkup(path), "computes by itself")[0].cure)
    before, after = torch.load(path), torch.load(made)
    assert list(after["model"]) == [name for name in before["model"] if name != "attn.inv_freq"]
    assert all(torch.equal(tensor, before["model"][name]) for name, tensor in after["model"].items())
    assert after["epoch"] == 3


def test_an_old_container_is_mended(folder):
    path = save(folder, told(), _use_new_zipfile_serialization=False)
    (advice,) = about(wb.checkup(path), "container before")
    made = run(advice.cure)
    assert wb.open(made).format == "torch-zip"
    assert not about(wb.checkup(made), "container")


def test_values_of_a_device_are_told_and_mended(folder):
    path = save(folder, told())
    data = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(data, "w") as new:
        for record in old.infolist():
            new.writestr(record.filename, old.read(record).replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0"))
    path.write_bytes(data.getvalue())
    (advice,) = about(wb.checkup(path), "cuda:0")
    assert advice.severity == "info"
    assert not about(wb.checkup(run(advice.cure)), "cuda")


@pytest.mark.parametrize("name", ["model.pt", "checkpoint.pth", "weights_final2.pt", "best_model.ckpt", "epoch_3.pt", "new-new.pt", "1.pt"])
def test_a_meaningless_name_is_told_and_mended(name, folder):
    path = save(folder, told(), name)
    (advice,) = about(wb.checkup(path), "its name")
    exec(advice.cure, {})  # a line that our own code wrote
    (made,) = folder.iterdir()
    assert made.name == "digits_small_48_parameters_epoch3" + path.suffix
    assert not about(wb.checkup(made), "its name")


@pytest.mark.parametrize("name", ["resnet18_epoch12.pt", "digits.pt", "llama-7b.safetensors"])
def test_a_name_that_says_something_is_left_alone(name, folder):
    (folder / name).write_bytes(save(folder, told()).read_bytes())
    assert not about(wb.checkup(folder / name), "its name")


def test_a_folder_of_a_hub_has_set_names(folder):
    (folder / "config.json").write_text('{"hidden_size": 4}')
    wb.save(weights(prefix="model."), folder / "model.safetensors")
    report = wb.checkup(folder / "model.safetensors")
    assert not report.advice


def test_a_sound_file_needs_nothing(folder):
    report = wb.checkup(save(folder, told()))
    assert report
    assert report.advice == ()
    assert report.headline == "in good health"
    assert "nothing to mend" in str(report)


def test_a_safetensors_file_without_a_word_is_told_and_mended(folder):
    wb.save(weights(), folder / "digits.safetensors")
    (advice,) = wb.checkup(folder / "digits.safetensors").advice
    made = run(advice.cure)
    assert made.suffix == ".safetensors"
    assert wb.open(made).metadata["version"] == "1.0"
    assert not wb.checkup(made).advice


def test_a_hidden_mask_may_hold_infinities(folder):
    mask = torch.full((1, 1, 4, 4), float("-inf")).triu(1)
    report = wb.checkup(save(folder, told(model={**weights(), "attn.mask": mask})))
    assert report
    assert not about(report, "NaN")


@pytest.mark.parametrize("name", ["layer.weight_mask", "attn.bias", "rel_pos.weight", "mask_token", "gradient_scale"])
def test_learnt_tensors_are_not_called_computed(name, folder):
    shape = (4,) if name == "attn.bias" else (1, 1, 5)
    report = wb.checkup(save(folder, told(model={**weights(), name: torch.randn(shape, generator=GENERATOR)})))
    assert not about(report, "computes")


def test_values_are_not_read_unless_asked_for(folder):
    path = save(folder, told(model={"w": torch.tensor([float("nan"), 1 / 3])}))
    report = wb.checkup(path, values=False)
    assert report
    assert dict(report.glance)["values"] == "not read"
    with pytest.raises(ReportFailedError):
        wb.checkup(path).check()


def test_locked_values_are_a_danger_without_a_cure(folder):
    path = save(folder, told())
    with zipfile.ZipFile(path) as old:
        records = {record.filename: old.read(record) for record in old.infolist()}
    with zipfile.ZipFile(path, "w") as new:
        for name, data in records.items():
            new.writestr(name, data[:-4] if name.endswith("/data/1") else data)
    report = wb.checkup(path)
    assert not report
    assert about(report, "no values to trust")[0].cure is None
    assert not any(advice.cure and "wb.save" in advice.cure for advice in report.advice)  # they would refuse those values


def test_values_that_cannot_be_read_are_a_danger(folder):
    path = save(folder, told())
    data = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as new:
        for record in old.infolist():
            new.writestr(record.filename, old.read(record))
    row = next(row for row in wb.archive(save_bytes(path, data)).rows if row.name.endswith("data/1"))
    broken = bytearray(data.getvalue())
    broken[row.offset : row.offset + 4] = b"\xff" * 4
    path.write_bytes(broken)
    report = wb.checkup(path)
    assert not report
    assert "cannot be read" in dict(report.glance)["values"]


def save_bytes(path, data):
    path.write_bytes(data.getvalue())
    return path


@pytest.mark.filterwarnings("ignore:torch.distributed")
def test_a_folder_of_pickled_shards_is_not_renamed(tmp_path):
    import torch.distributed.checkpoint as dcp

    dcp.save({"model": {"w": torch.ones(3) / 3}}, checkpoint_id=str(tmp_path / "d"), no_dist=True)
    assert not about(wb.checkup(tmp_path / "d"), "its name")


def test_a_broken_file_is_refused_as_open_refuses_it(folder):
    path = save(folder, told())
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(CorruptFileError):
        wb.checkup(path)


def test_live_objects_are_examined_without_a_file():
    model = torch.nn.DataParallel(Tiny())
    report = wb.checkup(model)
    (advice,) = about(report, "names carry module")
    assert advice.cure.startswith("wb.save(wb.ops.rename(ckpt, ")
    assert "safety" not in dict(report.glance)


def test_text_and_page_show_the_same_advice(folder):
    path = save(folder, weights(prefix="<b>."), "model.pt")
    report = wb.checkup(path)
    assert len(report.advice) == 2
    page = report._repr_html_()
    assert "<b>." not in page
    for advice in report.advice:
        assert advice.what in str(report)
        assert advice.what.replace("'", "&#x27;") in page


def test_a_hostile_name_stays_text_in_the_cure(folder):
    name = "a'\"); import os; os.system('touch /tmp/executed') #\n.inv_freq"
    path = save(folder, told(model={**weights(), name: torch.ones(2) / 3}))
    (advice,) = about(wb.checkup(path), "computes")
    run(advice.cure)
    assert not os.path.exists("/tmp/executed")
