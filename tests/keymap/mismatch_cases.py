"""Cases of torch itself: wrappers, sections, indices, fusions, parametrizations, ties, traps."""

from __future__ import annotations

import copy

import torch
from mismatch_kit import Case, agree, case, fill, floats, forward_case, ids, image, land, sd, trace_copy
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune


# ---------------------------------------------------------------- small models used by many cases
class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.fc2(torch.tanh(self.fc1(self.norm(x))))


class Net(nn.Module):
    """Embedding, blocks, head: enough structure for wrappers to stand anywhere."""

    def __init__(self, width: int = 8, depth: int = 2, classes: int = 5, vocab: int = 50) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.encoder = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        return self.head(self.norm(self.encoder(self.embed(x))))


class Conv(nn.Module):
    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(channels, 2 * channels, 3), nn.BatchNorm2d(2 * channels), nn.ReLU())
        self.fc = nn.Linear(2 * channels, 5)

    def forward(self, x):
        return self.fc(self.body(self.stem(x)).mean((2, 3)))


def run_net(model):
    return model(ids())


def run_conv(model):
    return model(image(12))


def named(model: nn.Module) -> dict[str, Tensor]:
    """What a script saves that lists parameters itself: no state-dict hook cleans the names."""
    state = dict(model.named_parameters())
    state.update(dict(model.named_buffers()))
    return {n: t.detach().clone() for n, t in state.items()}


# ---------------------------------------------------------------- wrappers
@case("dataparallel_to_plain", "wrapper")
def _():
    model = fill(Conv(), 1)
    return forward_case(model, Conv(), sd(model), run_conv, run_conv, source=sd(nn.DataParallel(model)))


@case("plain_to_dataparallel", "wrapper")
def _():
    model = fill(Conv(), 1)
    target = nn.DataParallel(Conv())
    return forward_case(model, target, sd(nn.DataParallel(model)), run_conv, lambda m: run_conv(m.module))


@case("ddp_in_training_checkpoint", "wrapper")
def _():
    import torch.distributed as dist

    model = fill(Conv(), 2)
    own = not dist.is_initialized()
    if own:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model)
        state = sd(wrapped)
    finally:
        if own:
            dist.destroy_process_group()
    optimizer = torch.optim.AdamW(model.parameters())
    run_conv(model).sum().backward()
    optimizer.step()
    source = {"epoch": 3, "arch": "conv", "state_dict": dict(state.items()), "optimizer": optimizer.state_dict()}
    return forward_case(
        model,
        Conv(),
        {k.removeprefix("module."): v for k, v in sd(wrapped).items()},
        run_conv,
        run_conv,
        source={**source, "state_dict": sd(wrapped)},
        note="Adam moments have the same shapes: never a source",
    )


@case("compiled_to_plain", "wrapper")
def _():
    model = fill(Net(), 3)
    return forward_case(model, Net(), sd(model), run_net, run_net, source=sd(torch.compile(model)))


@case("compiled_encoder_mid_name", "wrapper")
def _():
    model = fill(Net(), 3)
    clean = sd(model)
    wrapped = copy.deepcopy(model)
    wrapped.encoder = torch.compile(wrapped.encoder)
    assert any("encoder._orig_mod." in k for k in wrapped.state_dict())
    return forward_case(model, Net(), clean, run_net, run_net, source=sd(wrapped))


@case("compiled_blocks_inside_ddp_like", "wrapper")
def _():
    model = fill(Net(), 4)
    clean = sd(model)
    wrapped = copy.deepcopy(model)
    for i in range(len(wrapped.encoder)):
        wrapped.encoder[i] = torch.compile(wrapped.encoder[i])
    return forward_case(model, Net(), clean, run_net, run_net, source=sd(nn.DataParallel(torch.compile(wrapped))))


@case("activation_checkpoint_mid_name", "wrapper")
def _():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = fill(Net(), 5)
    clean = sd(model)
    wrapped = copy.deepcopy(model)
    for i in range(len(wrapped.encoder)):
        wrapped.encoder[i] = checkpoint_wrapper(wrapped.encoder[i])
    source = {}
    for name, module in nn.Module.named_modules(wrapped):  # the wrapper's own hooks hide the segment; scripts that walk modules see it
        for key, value in module._parameters.items():
            if value is not None:
                source[f"{name}.{key}" if name else key] = value.detach().clone()
    assert any("_checkpoint_wrapped_module" in k for k in source)
    return forward_case(model, Net(), clean, run_net, run_net, source=source)


@case("fsdp_names_mid_name", "wrapper")
def _():
    class FSDPLike(nn.Module):  # torch's FSDP needs an accelerator; the attribute name is torch.distributed.fsdp's FSDP_WRAPPED_MODULE
        def __init__(self, inner):
            super().__init__()
            from torch.distributed.fsdp._common_utils import FSDP_WRAPPED_MODULE

            self.add_module(FSDP_WRAPPED_MODULE, inner)

    model = fill(Net(), 6)
    clean = sd(model)
    wrapped = copy.deepcopy(model)
    for i in range(len(wrapped.encoder)):
        wrapped.encoder[i] = FSDPLike(wrapped.encoder[i])
    wrapped = FSDPLike(wrapped)
    assert "_fsdp_wrapped_module.encoder.0._fsdp_wrapped_module.fc1.weight" in wrapped.state_dict()
    return forward_case(model, Net(), clean, run_net, run_net, source=sd(wrapped))


@case("averaged_model_swa", "wrapper")
def _():
    model = fill(Net(), 7)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    return forward_case(model, Net(), sd(averaged.module), run_net, run_net, source=sd(averaged), note="n_averaged is left over")


@case("wrapper_name_never_seen", "wrapper")
def _():
    class Zorgify(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self._zorg_inner = inner

    model = fill(Net(), 8)
    clean = sd(model)
    wrapped = copy.deepcopy(model)
    for i in range(2):
        wrapped.encoder[i] = Zorgify(wrapped.encoder[i])
    return forward_case(model, Net(), clean, run_net, run_net, source=sd(Zorgify(wrapped)), note="no list of wrapper names has this one")


@case("module_is_a_real_name", "wrapper")
def _():
    class Has(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(4, 6)
            self.out = nn.Linear(6, 3)

        def forward(self, x):
            return self.out(self.module(x))

    model = fill(Has(), 9)
    return forward_case(
        model,
        Has(),
        sd(model),
        lambda m: m(floats(2, 4)),
        lambda m: m(floats(2, 4)),
        source=sd(nn.DataParallel(model)),
        note="'module' is the model's own name too: only the first is a wrapper",
    )


@case("backbone_prefix_of_simclr", "wrapper")
def _():
    class SimCLR(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = Conv()
            self.backbone.fc = nn.Identity()
            self.projector = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))

    model = fill(SimCLR(), 11)
    target = Conv()
    expected = {k.removeprefix("backbone."): v for k, v in sd(model).items() if k.startswith("backbone.")}
    land(target, expected, but=("fc.weight", "fc.bias"))
    agree(lambda: model.backbone.body(model.backbone.stem(image(12))), lambda: target.body(target.stem(image(12))))
    return Case(sd(model), fill(target, 12), expected, "forward", note="fc has no source: the projector's layers are no classifier")


# ---------------------------------------------------------------- sections
@case("model_and_ema_both_fit", "section")
def _():
    model = fill(Net(), 20)
    ema = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    ema.update_parameters(model)
    fill(model, 21)
    ema.update_parameters(model)
    source = {"model": sd(model), "ema": sd(ema.module), "step": 5}
    return forward_case(model, Net(), sd(model), run_net, run_net, source=source, choice=True, others=[sd(ema.module)])


@case("optimizer_moments_are_no_model", "section")
def _():
    model = fill(Net(), 28)
    optimizer = torch.optim.Adam(model.parameters())
    run_net(model).sum().backward()
    optimizer.step()
    source = {"net": sd(model), "optim": optimizer.state_dict(), "scheduler": {"last_epoch": 1}, "args": {"lr": 0.1}}
    return forward_case(model, Net(), sd(model), run_net, run_net, source=source)


@case("gan_generator_by_shape", "section")
def _():
    class G(nn.Module):
        def __init__(self):
            super().__init__()
            self.main = nn.Sequential(nn.ConvTranspose2d(6, 8, 4), nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 3, 4))

        def forward(self, x):
            return self.main(x)

    class D(nn.Module):
        def __init__(self):
            super().__init__()
            self.main = nn.Sequential(nn.Conv2d(3, 8, 4), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 1, 4))

    g, d = fill(G(), 29), fill(D(), 30)
    return forward_case(
        g, G(), sd(g), lambda m: m(floats(2, 6, 1, 1)), lambda m: m(floats(2, 6, 1, 1)), source={"generator": sd(g), "discriminator": sd(d)}
    )


@case("gan_roots_in_one_dict", "section")
def _():
    class G(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 8), nn.Linear(8, 12)])

        def forward(self, x):
            return self.layers[1](self.layers[0](x))

    class Gan(nn.Module):
        def __init__(self):
            super().__init__()
            self.netG, self.netD = G(), nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(12, 8), nn.Linear(8, 1)])})

    gan = fill(Gan(), 31)
    return forward_case(gan.netG, G(), sd(gan.netG), lambda m: m(floats(2, 4)), lambda m: m(floats(2, 4)), source=sd(gan))


@case("cyclegan_two_generators", "negative")
def _():
    source = {"G_A": sd(fill(Conv(), 32)), "G_B": sd(fill(Conv(), 33))}
    why = dict.fromkeys(source["G_A"], "G_A and G_B fit alike: best ambiguous, at the least said aloud")
    return Case(source, Conv(), source["G_A"], "identity", either=why, others=[source["G_B"]], choice=True)


@case("siamese_two_towers", "negative")
def _():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = Conv(), Conv()

    return Case(
        sd(fill(Two(), 34)), Conv(), {}, "identity", unprovable=dict.fromkeys(sd(Conv()), "left.* and right.* fit alike"), choice=True
    )


@case("moco_query_and_key", "negative")
def _():
    class MoCo(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder_q, self.encoder_k = Conv(), Conv()
            self.register_buffer("queue", torch.zeros(5, 16))
            self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    model = fill(MoCo(), 35)
    expected = sd(model.encoder_q)
    why = dict.fromkeys(expected, "encoder_q and encoder_k fit alike; MoCo's own transfer script takes encoder_q")
    return Case(
        {"state_dict": sd(nn.DataParallel(model)), "arch": "conv"},
        Conv(),
        expected,
        "identity",
        either=why,
        others=[sd(model.encoder_k)],
        choice=True,
    )


@case("dino_student_and_teacher", "section")
def _():
    class Multi(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = Conv()
            self.backbone.fc = nn.Identity()
            self.head = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 6))

    student, teacher = fill(Multi(), 36), fill(Multi(), 37)
    target = Conv()
    expected = sd(teacher.backbone)
    why = dict.fromkeys(expected, "student and teacher fit alike; DINO's own evaluation takes the teacher")
    return Case(
        {"student": sd(nn.DataParallel(student)), "teacher": sd(teacher), "epoch": 3},
        target,
        expected,
        "identity",
        either=why,
        others=[sd(student.backbone)],
        choice=True,
    )


@case("deepspeed_module_key", "section")
def _():
    model = fill(Net(), 38)
    source = {"module": sd(model), "optimizer": None, "ds_version": "0.14", "global_steps": 3, "param_shapes": [], "dp_world_size": 1}
    return forward_case(model, Net(), sd(model), run_net, run_net, source=source)


# ---------------------------------------------------------------- indices
def chain(*modules):
    return nn.Sequential(*modules)


@case("sequential_dropout_inserted", "index")
def _():
    model = fill(chain(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 12), nn.ReLU(), nn.Linear(12, 4)), 40)
    target = chain(nn.Linear(6, 10), nn.ReLU(), nn.Dropout(), nn.Linear(10, 12), nn.ReLU(), nn.Dropout(), nn.Linear(12, 4))
    expected = {f"{b}.{k}": sd(model)[f"{a}.{k}"] for a, b in ((0, 0), (2, 3), (4, 6)) for k in ("weight", "bias")}
    return forward_case(model, target, expected, lambda m: m(floats(2, 6)), lambda m: m(floats(2, 6)))


@case("sequential_same_shapes_dropout_inserted", "index")
def _():
    model = fill(chain(*(m for _ in range(4) for m in (nn.Linear(8, 8), nn.Tanh()))), 41)
    target = chain(*(m for _ in range(4) for m in (nn.Linear(8, 8), nn.Tanh(), nn.Dropout())))
    expected = {f"{3 * i}.{k}": sd(model)[f"{2 * i}.{k}"] for i in range(4) for k in ("weight", "bias")}
    return forward_case(
        model,
        target,
        expected,
        lambda m: m(floats(2, 8)),
        lambda m: m(floats(2, 8)),
        note="same count, same order; target 6 is source 4 although source 6 exists: a same-name map is wrong",
    )


@case("vgg_features_with_batchnorm_removed_dropout", "index")
def _():
    def layers(drop):
        out, c = [], 3
        for n in (4, 4, 8, 8):
            out += [nn.Conv2d(c, n, 3, padding=1), nn.BatchNorm2d(n), nn.ReLU(), *([nn.Dropout2d()] if drop else [])]
            c = n
        return out

    class Vgg(nn.Module):
        def __init__(self, drop):
            super().__init__()
            self.features = chain(*layers(drop))

        def forward(self, x):
            return self.features(x)

    model, target = fill(Vgg(True), 42), Vgg(False)
    expected = trace_copy(model, target, run_conv, run_conv)
    return forward_case(model, target, expected, run_conv, run_conv)


@case("layers_from_one_and_from_zero", "index")
def _():
    class Ones(nn.Module):
        def __init__(self):
            super().__init__()
            for i in range(1, 5):
                self.add_module(f"block{i}", Block())

        def forward(self, x):
            for i in range(1, 5):
                x = self.get_submodule(f"block{i}")(x)
            return x

    class Zeros(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(4))

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    model, target = fill(Ones(), 43), Zeros()
    expected = trace_copy(model, target, lambda m: m(floats(2, 8)), lambda m: m(floats(2, 8)))
    return forward_case(model, target, expected, lambda m: m(floats(2, 8)), lambda m: m(floats(2, 8)))


@case("twelve_layers_natural_order", "index")
def _():
    class A(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.ModuleList(Block() for _ in range(12))

        def forward(self, x):
            for block in self.children().__next__():
                x = block(x)
            return x

    class B(A):
        def __init__(self):
            nn.Module.__init__(self)
            self.h = nn.ModuleList(Block() for _ in range(12))

    model, target = fill(A(), 44), B()
    expected = {k.replace("layer.", "h.", 1): v for k, v in sd(model).items()}

    def run(m):
        return m(floats(2, 8))

    state = sd(model)
    shuffled = {k: state[k] for k in sorted(state)}  # a file sorted by text: layer.10 stands before layer.2
    return forward_case(model, target, expected, run, run, source=shuffled)


@case("pipeline_stage_local_indices", "index")
def _():
    class Full(nn.Module):
        def __init__(self, n, first=0):
            super().__init__()
            self.layers = nn.ModuleDict({str(first + i): Block() for i in range(n)})

        def forward(self, x):
            for block in self.layers.values():
                x = block(x)
            return x

    stage, target = fill(Full(2, 2), 45), Full(2)
    expected = {k.replace("layers.2", "layers.0").replace("layers.3", "layers.1"): v for k, v in sd(stage).items()}

    def run(m):
        return m(floats(2, 8))

    return forward_case(stage, target, expected, run, run, note="the stage counts from 2, the target from 0: all layers shift alike")


@case("pipeline_stages_joined", "index")
def _():
    class Full(nn.Module):
        def __init__(self, n):
            super().__init__()
            self.layers = nn.ModuleList(Block() for _ in range(n))

        def forward(self, x):
            for block in self.layers:
                x = block(x)
            return x

    model = fill(Full(4), 46)
    state = sd(model)
    first = {k: v for k, v in state.items() if int(k.split(".")[1]) < 2}
    second = {k.replace("layers.2", "layers.0").replace("layers.3", "layers.1"): v for k, v in state.items() if int(k.split(".")[1]) >= 2}
    source = {"stage0": first, "stage1": second}
    why = dict.fromkeys(state, "two stages that each count from 0; only the order of the stages says it")
    return forward_case(model, Full(4), state, lambda m: m(floats(2, 8)), lambda m: m(floats(2, 8)), source=source, either=why)


@case("torch_pipeline_split_names", "index")
def _():
    model = fill(chain(Block(), Block(), Block(), Block()), 47)
    state = sd(model)
    source = {
        f"partitions.{int(k.split('.')[0]) // 2}.{k}": v for k, v in state.items()
    }  # torchgpipe, torch.distributed.pipeline.sync.Pipe

    def run(m):
        return m(floats(2, 8))

    return forward_case(model, chain(Block(), Block(), Block(), Block()), state, run, run, source=source)


@case("dropped_first_layer_is_unknown", "negative")
def _():
    model = fill(chain(*(Block() for _ in range(5))), 48)
    state = sd(model)
    source = {f"trunk.{k}": v for k, v in state.items()}
    target = {f"body.stack.{i}.{k}": tuple(v.shape) for i in range(4) for k, v in sd(Block()).items()}
    why = dict.fromkeys(target, "five alike in the file, four in the model: which was dropped is nowhere said")
    either_expected = {f"body.stack.{i}.{k}": state[f"{i}.{k}"] for i in range(4) for k in sd(Block())}
    return Case(source, target, either_expected, "identity", either=why, note="index i to index i is a reading, never certain")


@case("dropped_layers_same_names", "index")
def _():
    model, target = fill(Net(depth=4), 49), Net(depth=2)
    expected = {k: v for k, v in sd(model).items() if not k.startswith(("encoder.2", "encoder.3"))}
    land(target, expected)
    return Case(sd(model), target, expected, "identity", note="same names; encoder.2 and .3 are unused and must be said")


@case("inserted_layers_same_names", "index")
def _():
    model, target = fill(Net(depth=2), 50), Net(depth=3)
    return Case(sd(model), target, sd(model), "identity", note="encoder.2 has no source")


@case("inserted_layer_of_other_shape", "index")
def _():
    model = fill(chain(nn.Linear(6, 8), nn.Linear(8, 10), nn.Linear(10, 3)), 51)
    target = chain(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 10), nn.Linear(10, 3))
    expected = {f"{b}.{k}": sd(model)[f"{a}.{k}"] for a, b in ((0, 0), (1, 2), (2, 3)) for k in ("weight", "bias")}
    return Case(
        sd(model), target, expected, "identity", note="target 1 is new: '1.bias' [8] has no source; '2.bias' [10] is source '1.bias'"
    )


@case("nested_stages_flattened", "index")
def _():
    class Stages(nn.Module):
        def __init__(self):
            super().__init__()
            self.stages = nn.ModuleList(nn.ModuleList(Block(w) for _ in range(2)) for w in (4, 4))

        def forward(self, x):
            for stage in self.stages:
                for block in stage:
                    x = block(x)
            return x

    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Block(4) for _ in range(4))

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    model, target = fill(Stages(), 52), Flat()

    def run(m):
        return m(floats(2, 4))

    expected = trace_copy(model, target, run, run)
    return forward_case(model, target, expected, run, run, note="stages.1.0 is blocks.2; timm's group/block-chunked ViTs do this")


# ---------------------------------------------------------------- fusions of torch.nn
class SplitAttention(nn.Module):
    def __init__(self, width=8, heads=2, names=("q_proj", "k_proj", "v_proj", "out_proj")):
        super().__init__()
        self.heads, self.names = heads, names
        for name in names:
            self.add_module(name, nn.Linear(width, width))

    def forward(self, x):
        q, k, v = (self.get_submodule(n)(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for n in self.names[:3])
        return self.get_submodule(self.names[3])(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def run_mha(m):
    x = floats(2, 5, 8)
    return m(x, x, x, need_weights=False)[0]


@case("mha_in_proj_to_qkv", "fuse")
def _():
    model, target = fill(nn.MultiheadAttention(8, 2, batch_first=True), 60), SplitAttention()
    state = sd(model)
    expected = {}
    for i, n in enumerate("qkv"):
        expected[f"{n}_proj.weight"], expected[f"{n}_proj.bias"] = state["in_proj_weight"].chunk(3)[i], state["in_proj_bias"].chunk(3)[i]
    expected |= {"out_proj.weight": state["out_proj.weight"], "out_proj.bias": state["out_proj.bias"]}
    return forward_case(model, target, expected, run_mha, lambda m: m(floats(2, 5, 8)))


@case("qkv_to_mha_in_proj", "fuse")
def _():
    model, target = fill(SplitAttention(), 61), nn.MultiheadAttention(8, 2, batch_first=True)
    s = sd(model)
    expected = {f"in_proj_{k}": torch.cat([s[f"{n}_proj.{k}"] for n in "qkv"]) for k in ("weight", "bias")}
    expected |= {f"out_proj.{k}": s[f"out_proj.{k}"] for k in ("weight", "bias")}
    return forward_case(model, target, expected, lambda m: m(floats(2, 5, 8)), run_mha)


@case("mha_own_kdim_to_linears", "fuse")
def _():
    model = fill(nn.MultiheadAttention(8, 2, kdim=6, vdim=10, batch_first=True), 62)

    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj, self.out_proj = nn.Linear(8, 8), nn.Linear(6, 8), nn.Linear(10, 8), nn.Linear(8, 8)

        def forward(self, x, k, v):
            q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (self.q_proj(x), self.k_proj(k), self.v_proj(v)))
            return self.out_proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    s = sd(model)
    expected = {f"{n}_proj.weight": s[f"{n}_proj_weight"] for n in "qkv"}
    expected |= {f"{n}_proj.bias": s["in_proj_bias"].chunk(3)[i] for i, n in enumerate("qkv")}
    expected |= {f"out_proj.{k}": s[f"out_proj.{k}"] for k in ("weight", "bias")}
    a = (floats(2, 5, 8), floats(2, 4, 6), floats(2, 4, 10))
    return forward_case(model, Cross(), expected, lambda m: m(*a, need_weights=False)[0], lambda m: m(*a))


@case("transformer_layer_to_split_names", "fuse")
def _():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = SplitAttention(8, 2, ("query", "key", "value", "output"))
            self.attention_norm, self.ffn_norm = nn.LayerNorm(8), nn.LayerNorm(8)
            self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

        def forward(self, x):
            x = self.attention_norm(x + self.attention(x))
            return self.ffn_norm(x + self.down(torch.relu(self.up(x))))

    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Layer() for _ in range(3))

        def forward(self, x):
            for b in self.blocks:
                x = b(x)
            return x

    model = fill(nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 32, batch_first=True), 3, enable_nested_tensor=False), 63)
    s, expected = sd(model), {}
    for i in range(3):
        a, b = f"layers.{i}.", f"blocks.{i}."
        for k in ("weight", "bias"):
            for j, n in enumerate(("query", "key", "value")):
                expected[f"{b}attention.{n}.{k}"] = s[f"{a}self_attn.in_proj_{k}"].chunk(3)[j]
            expected[f"{b}attention.output.{k}"] = s[f"{a}self_attn.out_proj.{k}"]
            for x, y in (("norm1", "attention_norm"), ("norm2", "ffn_norm"), ("linear1", "up"), ("linear2", "down")):
                expected[f"{b}{y}.{k}"] = s[f"{a}{x}.{k}"]

    def run(m):
        return m(floats(2, 5, 8))

    return forward_case(model, Stack(), expected, run, run)


@case("lstm_cells_to_lstm", "fuse")
def _():
    class Cells(nn.Module):
        def __init__(self):
            super().__init__()
            self.cells = nn.ModuleList([nn.LSTMCell(4, 6), nn.LSTMCell(6, 6)])
            self.out = nn.Linear(6, 3)

        def forward(self, x):
            for cell in self.cells:
                h = c = x.new_zeros(x.shape[0], 6)
                steps = []
                for t in range(x.shape[1]):
                    h, c = cell(x[:, t], (h, c))
                    steps.append(h)
                x = torch.stack(steps, 1)
            return self.out(x)

    class Lstm(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.out = nn.LSTM(4, 6, num_layers=2, batch_first=True), nn.Linear(6, 3)

        def forward(self, x):
            return self.out(self.lstm(x)[0])

    model = fill(Cells(), 64)
    s = sd(model)
    expected = {f"lstm.{k}_l{i}": s[f"cells.{i}.{k}"] for i in range(2) for k in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
    expected |= {f"out.{k}": s[f"out.{k}"] for k in ("weight", "bias")}

    def run(m):
        return m(floats(2, 5, 4))

    return forward_case(model, Lstm(), expected, run, run)


@case("lstm_to_lstm_cells", "fuse")
def _():
    class Cell(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.LSTMCell(4, 6)

        def forward(self, x):
            h = c = x.new_zeros(x.shape[0], 6)
            steps = []
            for t in range(x.shape[1]):
                h, c = self.cell(x[:, t], (h, c))
                steps.append(h)
            return torch.stack(steps, 1)

    class L(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(4, 6, batch_first=True)

        def forward(self, x):
            return self.rnn(x)[0]

    model = fill(L(), 65)
    expected = {k.replace("rnn.", "cell.").removesuffix("_l0"): v for k, v in sd(model).items()}

    def run(m):
        return m(floats(2, 5, 4))

    return forward_case(model, Cell(), expected, run, run)


@case("gru_cell_to_gru", "fuse")
def _():
    class C(nn.Module):
        def __init__(self):
            super().__init__()
            self.step = nn.GRUCell(4, 6)

        def forward(self, x):
            h, out = x.new_zeros(x.shape[0], 6), []
            for t in range(x.shape[1]):
                h = self.step(x[:, t], h)
                out.append(h)
            return torch.stack(out, 1)

    class G(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru = nn.GRU(4, 6, batch_first=True)

        def forward(self, x):
            return self.gru(x)[0]

    model = fill(C(), 66)
    expected = {f"gru.{k.removeprefix('step.')}_l0": v for k, v in sd(model).items()}

    def run(m):
        return m(floats(2, 5, 4))

    return forward_case(model, G(), expected, run, run)


@case("two_lstms_to_bidirectional", "fuse")
def _():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.forward_lstm, self.backward_lstm = nn.LSTM(4, 6, batch_first=True), nn.LSTM(4, 6, batch_first=True)

        def forward(self, x):
            return torch.cat([self.forward_lstm(x)[0], self.backward_lstm(x.flip(1))[0].flip(1)], -1)

    class Bi(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(4, 6, batch_first=True, bidirectional=True)

        def forward(self, x):
            return self.lstm(x)[0]

    model = fill(Two(), 67)
    s = sd(model)
    expected = {f"lstm.{k}": s[f"forward_lstm.{k}"] for k in sd(nn.LSTM(4, 6))} | {
        f"lstm.{k}_reverse": s[f"backward_lstm.{k}"] for k in sd(nn.LSTM(4, 6))
    }

    def run(m):
        return m(floats(2, 5, 4))

    why = dict.fromkeys(expected, "forward and backward are words: no shape tells the two apart")
    return forward_case(model, Bi(), expected, run, run, either=why)


class Mlp(nn.Module):
    def __init__(self, fused, width=6, hidden=10, names=("gate_proj", "up_proj", "down_proj"), order=(0, 1)):
        super().__init__()
        self.fused, self.names, self.order = fused, names, order
        if fused:
            self.gate_up_proj, self.down_proj = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)
        else:
            for n, (i, o) in zip(names, ((width, hidden), (width, hidden), (hidden, width)), strict=False):
                self.add_module(n, nn.Linear(i, o))

    def forward(self, x):
        if self.fused:
            gate, up = self.gate_up_proj(x).chunk(2, -1)
            return self.down_proj(nn.functional.silu(gate) * up)
        gate, up, down = map(self.get_submodule, self.names)
        return down(nn.functional.silu(gate(x)) * up(x))


@case("gate_and_up_to_gate_up", "fuse")
def _():
    model, target = fill(Mlp(False), 68), Mlp(True)
    s = sd(model)
    expected = {f"gate_up_proj.{k}": torch.cat([s[f"gate_proj.{k}"], s[f"up_proj.{k}"]]) for k in ("weight", "bias")}
    expected |= {f"down_proj.{k}": s[f"down_proj.{k}"] for k in ("weight", "bias")}

    def run(m):
        return m(floats(3, 6))

    return forward_case(model, target, expected, run, run)


@case("gate_up_to_gate_and_up", "fuse")
def _():
    model, target = fill(Mlp(True), 69), Mlp(False)
    s = sd(model)
    expected = {f"{n}.{k}": s[f"gate_up_proj.{k}"].chunk(2)[i] for i, n in enumerate(("gate_proj", "up_proj")) for k in ("weight", "bias")}
    expected |= {f"down_proj.{k}": s[f"down_proj.{k}"] for k in ("weight", "bias")}

    def run(m):
        return m(floats(3, 6))

    return forward_case(model, target, expected, run, run)


@case("gate_up_to_nameless_halves", "negative")
def _():
    model = fill(Mlp(True), 70)
    s = sd(model)
    target = {
        f"ff.{n}.{k}": v
        for n, w in (("alpha", (10, 6)), ("beta2", (10, 6)), ("omega", (6, 10)))
        for k, v in (("weight", w), ("bias", (w[0],)))
    }
    expected = {f"ff.omega.{k}": s[f"down_proj.{k}"] for k in ("weight", "bias")}
    why = {f"ff.{n}.{k}": "which half is which no name says" for n in ("alpha", "beta2") for k in ("weight", "bias")}
    return Case(s, target, expected, "identity", unprovable=why, either={})


@case("qkv_to_nameless_thirds", "negative")
def _():
    model = fill(nn.MultiheadAttention(8, 2), 71)
    s = sd(model)
    target = {f"att.{n}.{k}": v for n in ("a", "b", "c") for k, v in (("weight", (8, 8)), ("bias", (8,)))}
    source = {"att.fused.weight": s["in_proj_weight"], "att.fused.bias": s["in_proj_bias"]}
    return Case(source, target, {}, "identity", unprovable=dict.fromkeys(target, "thirds of one matrix to names that say nothing"))


@case("grouped_query_fused_by_sizes", "fuse")
def _():
    class Gqa(nn.Module):
        def __init__(self, fused):
            super().__init__()
            self.fused = fused
            if fused:
                self.qkv_proj = nn.Linear(8, 8 + 4 + 4)
            else:
                self.q_proj, self.k_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4)
            self.o_proj = nn.Linear(8, 8)

        def forward(self, x):
            q, k, v = self.qkv_proj(x).split((8, 4, 4), -1) if self.fused else (self.q_proj(x), self.k_proj(x), self.v_proj(x))
            q, k, v = (t.unflatten(-1, (-1, 2)).transpose(1, 2) for t in (q, k, v))
            k, v = (t.repeat_interleave(2, 1) for t in (k, v))
            return self.o_proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    model, target = fill(Gqa(True), 72), Gqa(False)
    s = sd(model)
    expected = {f"{n}_proj.{k}": s[f"qkv_proj.{k}"].split((8, 4, 4))[i] for i, n in enumerate("qkv") for k in ("weight", "bias")}
    expected |= {f"o_proj.{k}": s[f"o_proj.{k}"] for k in ("weight", "bias")}

    def run(m):
        return m(floats(2, 5, 8))

    return forward_case(model, target, expected, run, run)


@case("kv_fused_to_k_and_v", "fuse")
def _():
    class Cross(nn.Module):
        def __init__(self, fused):
            super().__init__()
            self.fused = fused
            self.q = nn.Linear(8, 8)
            if fused:
                self.kv = nn.Linear(6, 16)
            else:
                self.k, self.v = nn.Linear(6, 8), nn.Linear(6, 8)
            self.proj = nn.Linear(8, 8)

        def forward(self, x, c):
            k, v = self.kv(c).chunk(2, -1) if self.fused else (self.k(c), self.v(c))
            q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in (self.q(x), k, v))
            return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    model, target = fill(Cross(True), 73), Cross(False)
    s = sd(model)
    expected = {f"{n}.{k}": s[f"kv.{k}"].chunk(2)[i] for i, n in enumerate("kv") for k in ("weight", "bias")}
    expected |= {k: s[k] for k in s if not k.startswith("kv.")}

    def run(m):
        return m(floats(2, 5, 8), floats(2, 4, 6))

    return forward_case(model, target, expected, run, run)


@case("conv1x1_to_linear", "layout")
def _():
    class A(nn.Module):
        def __init__(self, conv):
            super().__init__()
            make = (lambda i, o: nn.Conv2d(i, o, 1)) if conv else nn.Linear
            self.norm = nn.LayerNorm(8)
            self.proj_in, self.proj_out = make(8, 12), make(12, 8)

        def forward(self, x):
            x = self.norm(x)
            if isinstance(self.proj_in, nn.Conv2d):
                return self.proj_out(self.proj_in(x.permute(0, 2, 1)[..., None]))[..., 0].permute(0, 2, 1)
            return self.proj_out(self.proj_in(x))

    model, target = fill(A(True), 74), A(False)
    expected = {k: v.flatten(1) if v.dim() == 4 else v for k, v in sd(model).items()}

    def run(m):
        return m(floats(2, 5, 8))

    return forward_case(model, target, expected, run, run, note="[o, i, 1, 1] is [o, i]: diffusers does it for proj_in")


@case("linear_transposed_by_shape", "layout")
def _():
    class Mine(nn.Module):
        def __init__(self):
            super().__init__()
            self.w1, self.w2 = nn.Parameter(torch.zeros(6, 10)), nn.Parameter(torch.zeros(10, 4))

        def forward(self, x):
            return torch.tanh(x @ self.w1) @ self.w2

    class Theirs(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(6, 10, bias=False), nn.Linear(10, 4, bias=False)

        def forward(self, x):
            return self.fc2(torch.tanh(self.fc1(x)))

    model, target = fill(Mine(), 75), Theirs()
    expected = {"fc1.weight": sd(model)["w1"].T, "fc2.weight": sd(model)["w2"].T}

    def run(m):
        return m(floats(3, 6))

    why = dict.fromkeys(expected, "a transposed shape is all there is to go by")
    return forward_case(model, target, expected, run, run, either=why)


@case("flax_dense_kernels", "layout", "flax names")
def _():
    model = fill(chain(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 12), nn.LayerNorm(12)), 76)
    s = sd(model)
    source = {
        "params": {
            "Dense_0": {"kernel": s["0.weight"].T.contiguous(), "bias": s["0.bias"]},
            "Dense_1": {"kernel": s["2.weight"].T.contiguous(), "bias": s["2.bias"]},
            "LayerNorm_0": {"scale": s["3.weight"], "bias": s["3.bias"]},
        }
    }

    class T(nn.Module):
        def __init__(self):
            super().__init__()
            self.dense_0, self.dense_1, self.norm_0 = nn.Linear(8, 8), nn.Linear(8, 12), nn.LayerNorm(12)

        def forward(self, x):
            return self.norm_0(self.dense_1(torch.tanh(self.dense_0(x))))

    expected = {f"{b}.{k}": s[f"{a}.{k}"] for a, b in (("0", "dense_0"), ("2", "dense_1"), ("3", "norm_0")) for k in ("weight", "bias")}

    def run(m):
        return m(floats(2, 8))

    return forward_case(
        model, T(), expected, run, run, source=source, note="'kernel' is [in, out] in flax and keras: the square one too, by convention"
    )


@case("flax_conv_kernels", "layout", "flax names")
def _():
    model = fill(Conv(), 77)
    s = sd(model)
    source = {
        "params": {
            "stem": {
                "conv": {"kernel": s["stem.0.weight"].permute(2, 3, 1, 0).contiguous(), "bias": s["stem.0.bias"]},
                "bn": {"scale": s["stem.1.weight"], "bias": s["stem.1.bias"]},
            },
            "body": {
                "conv": {"kernel": s["body.0.weight"].permute(2, 3, 1, 0).contiguous(), "bias": s["body.0.bias"]},
                "bn": {"scale": s["body.1.weight"], "bias": s["body.1.bias"]},
            },
            "fc": {"kernel": s["fc.weight"].T.contiguous(), "bias": s["fc.bias"]},
        },
        "batch_stats": {
            "stem": {"bn": {"mean": s["stem.1.running_mean"], "var": s["stem.1.running_var"]}},
            "body": {"bn": {"mean": s["body.1.running_mean"], "var": s["body.1.running_var"]}},
        },
    }

    class T(nn.Module):
        def __init__(self):
            super().__init__()
            for n, i, o in (("stem", 3, 4), ("body", 4, 8)):
                part = nn.Module()
                part.conv, part.bn = nn.Conv2d(i, o, 3), nn.BatchNorm2d(o)
                self.add_module(n, part)
            self.fc = nn.Linear(8, 5)

        def forward(self, x):
            for p in (self.stem, self.body):
                x = torch.relu(p.bn(p.conv(x)))
            return self.fc(x.mean((2, 3)))

    expected = {k.replace(".0.", ".conv.").replace(".1.", ".bn."): v for k, v in s.items() if not k.endswith("num_batches_tracked")}
    counters = [k for k in sd(T()) if k.endswith("num_batches_tracked")]
    return forward_case(
        model,
        T(),
        expected,
        run_conv,
        run_conv,
        source=source,
        but=counters,
        note="[h, w, in, out] with names; num_batches_tracked has no source; all values stand in two collections",
    )


@case("square_matrix_of_no_kind", "negative")
def _():
    source = {"A": floats(8, 8), "b": floats(8)}
    target = {"proj.weight": (8, 8), "proj.bias": (8,)}
    why = {"proj.weight": "a raw square matrix: no name and no kind says whether it is [in, out]"}
    return Case(
        source,
        target,
        {"proj.weight": source["A"], "proj.bias": source["b"]},
        "identity",
        unprovable=why,
        either={"proj.bias": "the only [8], the only bias"},
    )


@case("batchnorm_counters_missing", "rename")
def _():
    model, target = fill(Conv(), 78), Conv()
    s = {k: v for k, v in sd(model).items() if not k.endswith("num_batches_tracked")}
    return forward_case(
        model,
        target,
        s,
        run_conv,
        run_conv,
        source=s,
        but=[k for k in sd(target) if k.endswith("num_batches_tracked")],
        note="files before torch 0.4.1 have no counters",
    )


@case("batchnorm_counters_left_over", "rename")
def _():
    from torch import nn as n

    class Frozen(nn.Module):
        def __init__(self, c):
            super().__init__()
            for k in ("weight", "bias", "running_mean", "running_var"):
                self.register_buffer(k, torch.zeros(c))

        def forward(self, x):
            return n.functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)

    model, target = fill(Conv(), 79), Conv()
    target.stem[1], target.body[1] = Frozen(4), Frozen(8)
    expected = {k: v for k, v in sd(model).items() if not k.endswith("num_batches_tracked")}
    return forward_case(model, target, expected, run_conv, run_conv)


# ---------------------------------------------------------------- parametrizations
class Pair(nn.Module):
    def __init__(self, wrap=None):
        super().__init__()
        self.conv, self.up, self.lin = nn.Conv1d(4, 6, 3), nn.ConvTranspose1d(6, 5, 3), nn.Linear(5, 3)
        if wrap:
            for m in (self.conv, self.up, self.lin):
                wrap(m)

    def forward(self, x):
        return self.lin(torch.tanh(self.up(torch.tanh(self.conv(x)))).transpose(1, 2))


def run_pair(m):
    return m(floats(2, 4, 9))


def settle(model, seed, warm=0):
    fill(model, seed)
    if warm:
        model.train()
        for _ in range(warm):
            run_pair(model)
        model.eval()
    return model


def old_wn(m):
    return torch.nn.utils.weight_norm(m)


def plain_of(model, wrap, remove):
    """The same values in a second module, unwrapped there by torch itself (deepcopy refuses wrapped modules)."""
    plain = Pair(wrap)
    plain.load_state_dict(model.state_dict())
    for m in (plain.conv, plain.up, plain.lin):
        remove(m)
    return plain


@case("weight_norm_old_to_plain", "param")
def _():
    model = settle(Pair(old_wn), 80)
    expected = sd(plain_of(model, old_wn, torch.nn.utils.remove_weight_norm))
    return forward_case(model, Pair(), expected, run_pair, run_pair, tol=1e-6)


@case("weight_norm_new_to_plain", "param")
def _():
    model = settle(Pair(parametrizations.weight_norm), 81)
    expected = sd(plain_of(model, parametrizations.weight_norm, lambda m: parametrize.remove_parametrizations(m, "weight")))
    return forward_case(model, Pair(), expected, run_pair, run_pair, tol=1e-6)


@case("weight_norm_old_to_new", "param")
def _():
    model, target = settle(Pair(old_wn), 82), Pair(parametrizations.weight_norm)
    s = sd(model)
    target.load_state_dict(s)  # torch's own compatibility hook
    return forward_case(
        model,
        target,
        sd(target),
        run_pair,
        run_pair,
        note="torch's own hook accepts this state dict: strict is happy where a key diff is not",
    )


@case("weight_norm_new_to_old", "param")
def _():
    model, target = settle(Pair(parametrizations.weight_norm), 83), Pair(old_wn)
    s = sd(model)
    expected = {
        k.replace("parametrizations.weight.original0", "weight_g").replace("parametrizations.weight.original1", "weight_v"): v
        for k, v in s.items()
    }
    return forward_case(model, target, expected, run_pair, run_pair)


@case("plain_to_weight_norm", "param")
def _():
    model = settle(Pair(), 84)
    wrapped = copy.deepcopy(model)
    for m in (wrapped.conv, wrapped.up, wrapped.lin):
        old_wn(m)
    expected = sd(wrapped)
    why = {k: "the norm must be computed: a map may offer it instead" for k in expected if k.endswith(("weight_g", "weight_v"))}
    return forward_case(model, Pair(old_wn), expected, run_pair, run_pair, either=why, tol=1e-6)


@case("weight_norm_dim_none_to_plain", "param")
def _():
    def wrap(m):
        return torch.nn.utils.weight_norm(m, dim=None)

    model = settle(Pair(wrap), 85)
    expected = sd(plain_of(model, wrap, torch.nn.utils.remove_weight_norm))
    return forward_case(model, Pair(), expected, run_pair, run_pair, tol=1e-6, note="weight_g is 0-d: one norm for all")


@case("weight_norm_plain_shapes_only", "param")
def _():
    model = settle(Pair(old_wn), 86)
    expected = sd(plain_of(model, old_wn, torch.nn.utils.remove_weight_norm))
    return forward_case(
        model, Pair(), expected, run_pair, run_pair, tol=1e-6, as_shapes=True, source={f"module.net.{k}": v for k, v in sd(model).items()}
    )


@case("spectral_norm_old_to_plain", "param")
def _():
    model = settle(Pair(torch.nn.utils.spectral_norm), 87, warm=3)
    expected = {}
    for name in ("conv", "up", "lin"):
        m = getattr(model, name)
        hook = next(h for h in m._forward_pre_hooks.values())
        expected[f"{name}.weight"] = hook.compute_weight(m, do_power_iteration=False).detach()
        expected[f"{name}.bias"] = m.bias.detach().clone()
    return forward_case(model, Pair(), expected, run_pair, run_pair, tol=1e-5, note="ConvTranspose takes its rows from dim 1")


@case("spectral_norm_new_to_plain", "param")
def _():
    model = settle(Pair(parametrizations.spectral_norm), 88, warm=3)
    expected = {f"{n}.{k}": getattr(getattr(model, n), k).detach().clone() for n in ("conv", "up", "lin") for k in ("weight", "bias")}
    return forward_case(model, Pair(), expected, run_pair, run_pair, tol=1e-5)


@case("spectral_norm_old_to_new", "param")
def _():
    model, target = settle(Pair(torch.nn.utils.spectral_norm), 89, warm=3), Pair(parametrizations.spectral_norm)
    s, expected = sd(model), {}
    for n in ("conv", "up", "lin"):
        p = f"{n}.parametrizations.weight"
        expected |= {
            f"{n}.bias": s[f"{n}.bias"],
            f"{p}.original": s[f"{n}.weight_orig"],
            f"{p}.0._u": s[f"{n}.weight_u"],
            f"{p}.0._v": s[f"{n}.weight_v"],
        }
    return forward_case(
        model,
        target,
        expected,
        run_pair,
        run_pair,
        note="'weight_v' is weight_norm's direction elsewhere: here it is a vector beside weight_u",
    )


@case("pruned_to_plain", "param")
def _():
    def wrap(m):
        prune.l1_unstructured(m, "weight", 0.5)
        prune.random_unstructured(m, "bias", 0.3)

    model = settle(Pair(wrap), 90)
    expected = sd(plain_of(model, wrap, lambda m: (prune.remove(m, "weight"), prune.remove(m, "bias"))))
    return forward_case(model, Pair(), expected, run_pair, run_pair, tol=1e-7)


@case("plain_to_pruned_target", "param")
def _():
    model = settle(Pair(), 91)
    target = Pair(lambda m: prune.identity(m, "weight"))
    s = sd(model)
    expected = {k.replace(".weight", ".weight_orig"): v for k, v in s.items()}
    masks = [k for k in sd(target) if k.endswith("_mask")]
    land(target, expected, but=masks)
    run = run_pair
    agree(lambda: run(model), lambda: run(target))
    return Case(s, target, expected, "forward", unprovable={}, note="the masks have no source and keep what the target holds")


@case("partly_pruned_to_plain", "param")
def _():
    model = settle(Pair(), 92)
    prune.ln_structured(model.conv, "weight", 0.5, n=2, dim=0)
    run_pair(model)
    expected = {
        **{k: v for k, v in sd(model).items() if not k.startswith("conv.weight")},
        "conv.weight": model.conv.weight.detach().clone(),
    }
    return forward_case(model, Pair(), expected, run_pair, run_pair, tol=1e-7)


@case("orthogonal_parametrization_refused", "negative")
def _():
    model = nn.Sequential(parametrizations.orthogonal(nn.Linear(6, 6)), nn.Linear(6, 3))
    s = dict(sd(model).items())
    expected = {"0.weight": model[0].weight.detach().clone(), "0.bias": s["0.bias"], "1.weight": s["1.weight"], "1.bias": s["1.bias"]}
    why = {"0.weight": "a matrix exponential or Householder product of the stored value; only the module knows which"}
    return Case(s, nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3)), expected, "library", unprovable=why)


# ---------------------------------------------------------------- ties
@case("tied_target_source_has_one", "tie")
def _():
    class Tied(nn.Module):
        def __init__(self, tie=True):
            super().__init__()
            self.wte, self.lm_head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
            self.mid = nn.Linear(8, 8)
            if tie:
                self.lm_head.weight = self.wte.weight

        def forward(self, x):
            return self.lm_head(self.mid(self.wte(x)))

    model, target = fill(Tied(), 95), Tied()
    s = sd(model)
    source = {k: v for k, v in s.items() if k != "lm_head.weight"}
    return forward_case(model, target, s, lambda m: m(ids(5, 20)), lambda m: m(ids(5, 20)), source=source)


@case("tied_target_source_disagrees", "negative")
def _():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.wte, self.lm_head, self.mid = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False), nn.Linear(8, 8)

    model, target = fill(Tied(), 96), Tied()
    target.lm_head.weight = target.wte.weight
    s = sd(model)
    expected = {k: s[k] for k in ("mid.weight", "mid.bias")}
    why = dict.fromkeys(("wte.weight", "lm_head.weight"), "one storage in the model, two different values in the file")
    return Case(
        s,
        target,
        expected,
        "identity",
        unprovable=why,
        note="values are needed to see it; a finding is the least: judged only for silence",
        either={},
    )


@case("untied_target_source_has_one", "tie")
def _():
    class M(nn.Module):
        def __init__(self):
            super().__init__()
            self.wte, self.lm_head, self.mid = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False), nn.Linear(8, 8)

    s = sd(fill(M(), 97))
    source = {k: v for k, v in s.items() if k != "lm_head.weight"}
    expected = {**source, "lm_head.weight": s["wte.weight"]}
    why = {"lm_head.weight": "the file may come from a tied model or have lost its head: names do not say"}
    return Case(source, M(), expected, "identity", either=why)


@case("shared_layers_albert_like", "tie")
def _():
    class Shared(nn.Module):
        def __init__(self, tie):
            super().__init__()
            block = Block()
            self.layers = nn.ModuleList([block] * 3 if tie else [Block() for _ in range(3)])

        def forward(self, x):
            for b in self.layers:
                x = b(x)
            return x

    model, target = fill(Shared(True), 98), Shared(False)

    def run(m):
        return m(floats(2, 8))

    return forward_case(model, target, sd(model), run, run, note="three names of one storage to three tensors")


# ---------------------------------------------------------------- heads and traps
@case("classifier_of_other_size", "head")
def _():
    model, target = fill(Net(classes=7), 100), Net(classes=5)
    expected = {k: v for k, v in sd(model).items() if not k.startswith("head.")}
    return Case(sd(nn.DataParallel(model)), target, expected, "identity", note="head offered, never filled")


@case("input_channels_differ", "head")
def _():
    model, target = fill(Conv(), 101), Conv()
    target.stem[0] = nn.Conv2d(1, 4, 3)
    expected = {k: v for k, v in sd(model).items() if k != "stem.0.weight"}
    return Case(sd(model), target, expected, "identity")


@case("vocabulary_resized", "head")
def _():
    model, target = fill(Net(vocab=50), 102), Net(vocab=56)
    expected = {k: v for k, v in sd(model).items() if k != "embed.weight"}
    return Case(sd(model), target, expected, "identity")


@case("permuted_names_same_shapes", "negative")
def _():
    class A(nn.Module):
        def __init__(self, names):
            super().__init__()
            for n in names:
                self.add_module(n, nn.Linear(8, 8))

    model, target = fill(A(("apple", "berry", "cherry")), 103), A(("zinc", "gold", "lead"))
    return Case(
        sd(model),
        target,
        {},
        "identity",
        unprovable=dict.fromkeys(sd(target), "three alike, names that say nothing: the order of lines is no proof"),
    )


@case("other_model_of_like_shapes", "negative")
def _():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.tok = nn.Embedding(50, 8)
            self.decoder = nn.ModuleList(
                [
                    nn.ModuleDict({"ln": nn.LayerNorm(8), "wi": nn.Linear(8, 16), "wo": nn.Linear(16, 8), "gate": nn.Linear(8, 8)})
                    for _ in range(2)
                ]
            )
            self.out = nn.Linear(8, 9)

    source = sd(
        fill(
            nn.ModuleDict(
                {"unet": nn.Sequential(nn.Conv1d(8, 8, 3), nn.Linear(8, 16), nn.GroupNorm(2, 8), nn.Linear(16, 8)), "time": nn.Linear(8, 8)}
            ),
            104,
        )
    )
    target = Other()
    return Case(source, target, {}, "identity", unprovable=dict.fromkeys(sd(target), "another model altogether"))


@case("resnet_into_mlp", "negative")
def _():
    source = sd(fill(Conv(8), 105))
    target = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 5))
    return Case(
        source,
        target,
        {},
        "identity",
        unprovable=dict.fromkeys(sd(target), "a convolutional net's vectors happen to have the length"),
        note="BatchNorm [8] vectors and LayerNorm [8]",
    )


@case("same_name_other_place", "negative")
def _():
    source = {
        "encoder.proj.weight": floats(8, 8),
        "decoder.proj.weight": floats(8, 8) * 2,
        "encoder.proj.bias": floats(8),
        "decoder.proj.bias": floats(8) * 2,
    }
    target = {"bridge.proj.weight": (8, 8), "bridge.proj.bias": (8,)}
    return Case(source, target, {}, "identity", unprovable=dict.fromkeys(target, "encoder.proj and decoder.proj fit alike"))


@case("swapped_submodules_encoder_decoder", "negative")
def _():
    class Auto(nn.Module):
        def __init__(self, a, b):
            super().__init__()
            self.add_module(a, nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)))
            self.add_module(b, nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)))

    model, target = fill(Auto("enc", "dec"), 106), Auto("decoder", "encoder")  # the target declares its decoder first
    s = sd(model)
    expected = {k.replace("enc.", "encoder.").replace("dec.", "decoder."): v for k, v in s.items()}
    return Case(
        s,
        target,
        expected,
        "identity",
        either=dict.fromkeys(expected, "enc is encoder only by the word: order of declaration says the opposite"),
        note="filling by order is wrong in silence",
    )


@case("decoy_copy_under_debug", "negative")
def _():
    model = fill(Net(), 107)
    source = {**{f"model.{k}": v for k, v in sd(model).items()}, **{f"debug.grads.{k}": torch.randn_like(v) for k, v in sd(model).items()}}
    return forward_case(
        model,
        Net(),
        sd(model),
        run_net,
        run_net,
        source=source,
        choice=True,
        either=dict.fromkeys(sd(model), "model.* and debug.grads.* have the same shapes"),
    )


@case("deepcopied_teacher_inside", "negative")
def _():
    class Distill(nn.Module):
        def __init__(self):
            super().__init__()
            self.student, self.teacher = Net(), Net(depth=3)

    model, target = fill(Distill(), 108), Net(depth=3)
    return forward_case(
        model.teacher,
        target,
        sd(model.teacher),
        run_net,
        run_net,
        source=sd(model),
        note="only the teacher has three layers: the student fits in part and must not be mixed in",
    )


@case("two_prefixes_disjoint_parts", "wrapper")
def _():
    model = fill(Net(), 109)
    s = sd(model)
    source = {(f"model.trunk.{k}" if k.startswith(("embed", "encoder")) else f"model.top.{k}"): v for k, v in s.items()}
    return forward_case(model, Net(), s, run_net, run_net, source=source)


@case("plain_to_meta_target", "wrapper")
def _():
    model = fill(Net(), 110)
    with torch.device("meta"):
        target = Net()
    s = sd(model)
    return Case(sd(nn.DataParallel(model)), target, s, "identity", note="a target on the meta device has no values")


@case("half_precision_file", "wrapper")
def _():
    model = fill(Net(), 111).to(torch.bfloat16)
    s = sd(model)
    return Case(
        {f"_orig_mod.{k}": v for k, v in s.items()},
        Net(),
        {k: v.float() for k, v in s.items()},
        "identity",
        note="bf16 in the file, f32 in the model: compared after the cast",
    )
