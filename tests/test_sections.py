"""Which part of a training checkpoint is taken for the weights, and what the other parts are, on the trees that trainers save."""

import argparse
import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import workbench as wb
from workbench.errors import SelectionError, TensorNotFoundError
from workbench.tree import Global, Inert


def trained(model):
    """A model's optimizer, schedule and gradient scaler after two real steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    for _ in range(2):
        model(torch.ones(2, 8)).sum().backward()
        optimizer.step()
        schedule.step()
    return optimizer.state_dict(), schedule.state_dict(), torch.amp.GradScaler("cpu").state_dict()


def net(width=16):
    return nn.Sequential(OrderedDict(conv=nn.Linear(8, width), norm=nn.BatchNorm1d(width), head=nn.Linear(width, 8)))


MODEL = net()
SD = MODEL.state_dict()
OPTIMIZER, SCHEDULE, SCALER = trained(MODEL)


class ModelEMA:
    """A trainer's own class, as many keep their averages in one."""

    def __init__(self):
        self.updates, self.ema = 3, copy.deepcopy(MODEL).half()


def averaged():
    model = AveragedModel(net())
    model.update_parameters(net())
    return model.state_dict()


def latent_diffusion():
    shadow = {"model_ema." + key.replace(".", ""): value.clone() for key, value in SD.items()}
    ema = {"model_ema.decay": torch.tensor(0.99), "model_ema.num_updates": torch.tensor(3), **shadow}
    return {"epoch": 1, "state_dict": {**{f"model.{k}": v for k, v in SD.items()}, **ema}, "optimizer_states": [OPTIMIZER]}


# name -> (tree, path of the weights or None, {path: kind} of the parts that must be told)
TRAINERS = {
    "plain": (SD, "", {"": "weights"}),
    "reference scripts": (
        {"model": SD, "optimizer": OPTIMIZER, "lr_scheduler": SCHEDULE, "epoch": 4, "args": argparse.Namespace(lr=1), "model_ema": averaged(), "scaler": SCALER},
        "model",
        {"optimizer": "optimizer", "lr_scheduler": "schedule", "model_ema": "ema", "scaler": "scaler"},
    ),
    "Lightning": (
        {
            "epoch": 1, "global_step": 20, "pytorch-lightning_version": "2.5.0", "state_dict": {f"model.{k}": v for k, v in SD.items()},
            "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 1}}}},
            "callbacks": {"EMACallback": {"ema_weights": SD, "decay": 0.9}, "ModelCheckpoint{'monitor': 'loss'}": {"best_model_score": torch.tensor(0.5)}},
            "optimizer_states": [OPTIMIZER, OPTIMIZER], "lr_schedulers": [SCHEDULE], "MixedPrecision": SCALER, "hyper_parameters": {"optimizer": {"lr": 1}},
        },
        "state_dict",
        {"optimizer_states.0": "optimizer", "optimizer_states.1": "optimizer", "lr_schedulers.0": "schedule", "callbacks.EMACallback.ema_weights": "ema"},
    ),
    "timm": (
        {"epoch": 3, "arch": "resnet", "state_dict": SD, "optimizer": OPTIMIZER, "version": 2, "args": argparse.Namespace(), "amp_scaler": SCALER, "state_dict_ema": SD, "metric": 71.2},
        "state_dict",
        {"state_dict_ema": "ema", "amp_scaler": "scaler", "optimizer": "optimizer"},
    ),
    "DeepSpeed, model states": (
        {"module": SD, "buffer_names": ["norm.running_mean"], "optimizer": None, "param_shapes": [OrderedDict((k, v.shape) for k, v in SD.items())],
         "lr_scheduler": SCHEDULE, "ds_config": {"zero_optimization": {"stage": 2}, "optimizer": {"type": "Adam"}}, "ds_version": "0.14", "global_steps": 3},
        "module",
        {"lr_scheduler": "schedule"},
    ),
    "DeepSpeed, a shard of the optimizer": (
        {"optimizer_state_dict": {"loss_scaler": None, "zero_stage": 2, "partition_count": [1], "single_partition_of_fp32_groups": [torch.ones(64)],
                                  "base_optimizer_state": [{"exp_avg": torch.ones(64), "exp_avg_sq": torch.ones(64)}], "fp32_flat_groups": [torch.ones(64)]}, "ds_version": "0.14"},
        None,
        {"optimizer_state_dict": "optimizer"},
    ),
    "Hugging Face optimizer.pt": (OPTIMIZER, None, {"": "optimizer"}),
    "Hugging Face rng_state.pth": ({"python": (3, tuple(range(625)), None), "cpu": torch.get_rng_state()}, None, {"": "random"}),
    "OpenMMLab": (
        {"meta": {"epoch": 2, "config": "model = dict()"}, "state_dict": SD, "optimizer": OPTIMIZER, "ema_state_dict": {f"module.{k}": v for k, v in SD.items()}, "param_schedulers": [SCHEDULE]},
        "state_dict",
        {"ema_state_dict": "ema", "param_schedulers.0": "schedule"},
    ),
    "detectron": ({"model": SD, "optimizer": OPTIMIZER, "scheduler": SCHEDULE, "iteration": 90}, "model", {"scheduler": "schedule"}),
    "fairseq": (
        {"args": None, "cfg": {"model": {"_name": "transformer"}}, "model": SD, "criterion": {"queue": torch.ones(4)}, "optimizer_history": [{"optimizer_name": "adam"}],
         "task_state": {}, "extra_state": {"metrics": []}, "last_optimizer_state": OPTIMIZER},
        "model",
        {"last_optimizer_state": "optimizer", "criterion": "other"},
    ),
    "ultralytics while training": ({"epoch": 3, "model": None, "ema": copy.deepcopy(MODEL).half(), "updates": 9, "optimizer": OPTIMIZER}, "ema", {"ema": "ema"}),
    "ultralytics v5": ({"epoch": 3, "model": copy.deepcopy(MODEL), "ema": copy.deepcopy(MODEL).half(), "optimizer": None}, "model", {"ema": "ema"}),
    "an EMA object": ({"model": SD, "ema": ModelEMA(), "optimizer": OPTIMIZER}, "model", {"ema.ema": "ema"}),
    "latent diffusion": (latent_diffusion(), "state_dict", {"optimizer_states.0": "optimizer"}),
    "Real-ESRGAN": ({"params": SD, "params_ema": SD}, "params", {"params_ema": "ema"}),
    "only the averages": ({"params_ema": SD}, "params_ema", {"params_ema": "ema"}),
    "StyleGAN": (
        {"g": SD, "d": net(4).state_dict(), "g_ema": SD, "g_optim": OPTIMIZER, "d_optim": OPTIMIZER, "latent_avg": torch.zeros(8)},
        "g",
        {"g_ema": "ema", "g_optim": "optimizer", "d": "weights"},
    ),
    "a slash in the key": ({"model/state_dict": SD, "optimizer/state_dict": OPTIMIZER, "step": 3}, "model/state_dict", {"optimizer/state_dict": "optimizer"}),
    "two levels": ({"state": {"model": SD, "optimizer": OPTIMIZER}, "config": {"model": "x"}}, "state.model", {"state.optimizer": "optimizer"}),
    "Megatron": (
        {"model": {"language_model": {"embedding": {"word_embeddings": {"weight": torch.ones(8, 4)}}, "encoder": {f"layers.{i}.weight": torch.ones(4, 4) for i in range(8)}}},
         "optimizer": {"optimizer": OPTIMIZER, "grad_scaler": {"scale": torch.ones(1)}}, "opt_param_scheduler": {"lr": 0.1, "num_steps": 5},
         "rng_state": [{"torch_rng_state": torch.get_rng_state(), "rng_tracker_states": {}}], "iteration": 7},
        "model",
        {"optimizer.optimizer": "optimizer", "opt_param_scheduler": "schedule", "rng_state.0": "random"},
    ),
    "torch_ema": ({"model": SD, "ema": {"decay": 0.9, "num_updates": 4, "shadow_params": list(SD.values()), "collected_params": None}}, "model", {"ema.shadow_params": "ema"}),
    "flat optimizer state": ({"model": SD, "adam": {f"{k}.exp_avg": v.clone() for k, v in SD.items()}}, "model", {"adam": "optimizer"}),
    "state by parameter": ({"model": SD, "moments": {k: {"step": 3, "momentum_buffer": v.clone()} for k, v in SD.items()}}, "model", {"moments": "optimizer"}),
    "two optimizers by name": ({"model": SD, "optimizers": {"g": OPTIMIZER, "d": OPTIMIZER}}, "model", {"optimizers.g": "optimizer", "optimizers.d": "optimizer"}),
    "a dict of dicts": ({f"layer{i}": {"kernel": torch.ones(3, 3), "bias": torch.ones(3)} for i in range(6)}, "", {"": "weights"}),
    "a tokenizer beside it": ({"model_state_dict": SD, "dims": {"n_mels": 80}, "vocab": ["a", "b"]}, "model_state_dict", {}),
    "whole optimizer": ({"model": SD, "opt": torch.optim.SGD(MODEL.parameters(), lr=0.1, momentum=0.9)}, "model", {"opt": "optimizer"}),
}  # fmt: skip


@pytest.mark.parametrize("name", TRAINERS)
def test_the_weights_and_the_other_parts_are_told_apart(name, tmp_path):
    tree, weights, kinds = TRAINERS[name]
    torch.save(tree, tmp_path / "x.pt")
    ckpt = wb.open(tmp_path / "x.pt")
    found = {section.name: section.kind for section in ckpt.sections()}
    assert {path: found.get(path) for path in kinds} == kinds, found
    taken = ckpt.weights_section
    if weights is None:
        assert not any(kind in ("weights", "ema") for kind in found.values())
        assert taken.path == ()
    else:
        assert taken.name == weights, [(s.name, s.kind, s.reason) for s in ckpt.sections()]
        assert taken.reason
        assert all(section.reason for section in ckpt.sections())
    assert ckpt.section(taken.path).nbytes == taken.nbytes or not taken.path
    for section in ckpt.sections():
        assert len(ckpt.section(section.path)) == section.tensors


@pytest.mark.parametrize(
    ("tree", "taken", "rivals"),
    [
        ({"student": SD, "teacher": SD, "dino_loss": {"center": torch.ones(1, 4)}, "optimizer": OPTIMIZER}, "student", {"teacher"}),
        ({"netG": SD, "netD": net(4).state_dict()}, "netG", {"netD"}),
        ({"generator": {"state_dict": SD}, "discriminator": {"state_dict": SD}}, "generator.state_dict", {"discriminator.state_dict"}),
        ({"model": SD, "teacher": SD}, "model", set()),
        ({"model": {"state_dict": SD}, "discriminator": {"state_dict": SD}}, "model.state_dict", set()),
        ([SD, SD], "0", {"1"}),
        ({"model": SD, "queue": {"queue": torch.ones(3)}}, "model", set()),
    ],
)
def test_parts_with_an_equal_claim_are_rivals_and_small_ones_are_not(tree, taken, rivals):
    ckpt = wb.open(tree)
    assert ckpt.weights_section.name == taken
    assert {section.name for section in ckpt.rival_sections} == rivals


def test_weights_taken_of_several_say_so_and_a_section_asked_as_a_tensor_is_named():
    ckpt = wb.open({"G": SD, "D": SD, "epoch": 3})
    (told,) = ckpt.weights.findings
    assert told.severity == "warning"
    assert "'G', 'D' have an equal claim to be the weights, and this is 'G'" in told.message
    assert not ckpt.section("D").findings
    assert not wb.open({"model": SD, "epoch": 3}).weights.findings
    with pytest.raises(TensorNotFoundError, match=r"ckpt\.section\('D'\)"):
        ckpt["D"]


def test_the_reason_says_what_else_lies_in_the_weights():
    assert "model_ema are moving averages" in wb.open(latent_diffusion()).weights_section.reason


def test_a_schedule_tells_where_it_stands():
    (schedule,) = [s for s in wb.open(TRAINERS["detectron"][0]).sections() if s.kind == "schedule"]
    assert "last_epoch = 2" in schedule.reason


def test_a_checkpoint_of_torchao_like_subclasses_is_one_section():
    def subclass(value):
        inner = Inert(Global("torch._utils", "_rebuild_wrapper_subclass"), ())
        return Inert(
            Global("torch._tensor", "_rebuild_from_type_v2"),
            (inner.func, Global("q", "Int8"), (), {"qdata": value, "scale": value, "zero": value}),
        )

    lazy = wb.open({"w": torch.ones(3)})["w"]
    ckpt = wb.checkpoint.Checkpoint({"model": {f"w{i}": subclass(lazy) for i in range(3)}, "epoch": 3})
    assert [(s.name, s.tensors) for s in ckpt.sections()] == [("model", 9)]
    assert "model.w0.qdata" in ckpt


def test_a_section_inside_an_object_is_read_and_not_replaced(tmp_path):
    torch.save({"model": SD, "ema": ModelEMA()}, tmp_path / "x.pt")
    ckpt = wb.open(tmp_path / "x.pt")
    assert torch.equal(ckpt.section("ema.ema")["head.bias"].load(), SD["head.bias"].half())
    assert ckpt.section("ema.ema")["head.bias"].dtype.name == "float16"
    with pytest.raises(SelectionError, match="inert"):
        wb.ops.cast(ckpt, "float32", section="ema.ema")


def test_hostile_trees_are_searched_in_bounded_time():
    wide = {"a": [{"w": torch.ones(2)} for _ in range(30_000)]}
    assert len(wb.open(wide).sections()) <= 1_000
