"""Transfer learning, against torch: what moves under a real optimizer step is what the tables say."""

import copy
import io
import itertools

import pytest
import safetensors.torch
import torch
from strategies import same
from torch import nn

import workbench as wb
from workbench.errors import SelectionError, SpecMismatchError, UnsupportedError
from workbench.keymap.maps import KeyMap, Pair, Part


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x):
        return x + self.mlp(self.norm(x))


class Transformer(nn.Module):
    """Stem, three blocks, a last normalisation, a head: as a ViT is built."""

    def __init__(self, classes=5):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, 4, 8))
        self.patch_embed = nn.Linear(6, 8)
        self.blocks = nn.ModuleList([Block(8) for _ in range(3)])
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, classes)

    def forward(self, x):
        x = self.patch_embed(x) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.downsample = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x):
        return self.bn1(self.conv1(x)) + self.downsample(x)


class Network(nn.Module):
    """As a ResNet is built: stages of blocks."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.layer1, self.layer2 = (nn.Sequential(Residual(), Residual()) for _ in range(2))
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        return self.fc(self.layer2(self.layer1(self.bn1(self.conv1(x)))).mean((2, 3)))


def trained(model, optimizer, steps=1, shape=(3, 4, 6)):
    torch.manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(*shape)).square().mean().backward()
        optimizer.step()
    return model


# what trains


def test_only_what_is_unfrozen_moves():
    model = Transformer()
    assert len(wb.models.freeze(model)) == len(list(model.parameters()))
    assert wb.models.unfreeze(model, ["head.*", "blocks.2.norm.*"]) == (
        "blocks.2.norm.weight",
        "blocks.2.norm.bias",
        "head.weight",
        "head.bias",
    )
    assert wb.models.unfreeze(model, "head.*") == ()
    before = copy.deepcopy(model.state_dict())
    trained(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1))
    moved = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert moved == {n for n in before if n.startswith(("head.", "blocks.2.norm."))}
    for names in ("nope.*", ["head.*", "nope.*"], []):
        with pytest.raises(SelectionError):
            wb.models.freeze(model, names)


def test_a_tied_parameter_answers_to_each_of_its_names():
    model = nn.ModuleDict({"wte": nn.Embedding(4, 2), "head": nn.Linear(2, 4)})
    model["head"].weight = model["wte"].weight
    assert wb.models.Unfreezing({0: "head.*"}).apply(model, 0) == ()
    assert all(p.requires_grad for p in model.parameters())
    assert wb.models.freeze(model, "head.weight") == ("wte.weight",)
    assert "wte.weight = head.weight" in str(wb.models.parameter_table(model))


def test_a_lazy_parameter_is_refused_in_words():
    model = nn.Sequential(nn.LazyLinear(2), nn.Linear(2, 2))
    for make in (lambda: wb.models.param_groups(model, 1e-3), lambda: wb.models.parameter_table(model)):
        with pytest.raises(UnsupportedError, match="lazy"):
            make()


def test_unfreezing_goes_by_stages():
    plan = wb.models.Unfreezing({0: "head.*", 2: ["norm.*", "blocks.2.*"], 4: "*"})
    assert [plan.at(epoch) for epoch in (0, 1, 2, 4)] == [
        ("head.*",),
        ("head.*",),
        ("head.*", "norm.*", "blocks.2.*"),
        ("head.*", "norm.*", "blocks.2.*", "*"),
    ]
    model = Transformer()
    trains = lambda: [n for n, p in model.named_parameters() if p.requires_grad]  # noqa: E731
    assert plan.apply(model, 0) == ()  # everything trained before
    assert trains() == ["head.weight", "head.bias"]
    assert all(n.startswith(("norm.", "blocks.2.")) for n in plan.apply(model, 3))
    assert len(trains()) == 10
    plan.apply(model, 9)
    assert len(trains()) == len(list(model.parameters()))
    wb.models.Unfreezing({1: "*"}).apply(model, 0)
    assert trains() == []
    with pytest.raises(SelectionError):
        wb.models.Unfreezing({0: "typo.*"}).apply(model, 0)


def test_the_table_says_what_trains_at_which_rate_and_what_was_forgotten():
    model = Transformer()
    wb.models.freeze(model, "patch_embed.*")
    optimizer = torch.optim.AdamW(
        [{"params": model.blocks.parameters(), "lr": 0.5}, {"params": model.head.parameters(), "name": "the head"}],
        lr=0.1,
        weight_decay=0.2,
    )
    report = wb.models.parameter_table(model, optimizer)
    rows = {r.name: r for r in report.rows}
    assert (rows["blocks.0.norm.bias"].lr, rows["head.bias"].group, rows["head.bias"].lr, rows["head.bias"].weight_decay) == (
        0.5,
        "the head",
        0.1,
        0.2,
    )
    assert not report
    assert report.forgotten == ("pos_embed", "norm.weight", "norm.bias")
    assert "3 trainable tensors are in no optimizer group" in report.headline
    wb.models.freeze(model, ["pos_embed", "norm.*", "head.*"])
    assert "2 frozen tensors are in the optimizer" in wb.models.parameter_table(model, optimizer).check().headline
    by_module = {row[0]: row[1:3] for row in report.tables()[0].rows}
    assert by_module["head"] == (45, 0)
    assert by_module["patch_embed"] == (0, 56)
    assert "pos_embed" in str(report)
    wb.models.freeze(model)
    assert not wb.models.parameter_table(model)


def test_rates_fall_by_the_layer_and_every_parameter_is_in_one_group():
    model = Transformer()
    groups = wb.models.param_groups(model, 1e-2, layer_decay=0.5, weight_decay=0.1, no_decay="pos_embed")
    optimizer = torch.optim.AdamW(groups)
    found = {r.name: r for r in wb.models.parameter_table(model, optimizer).check().rows}
    depth = {"pos_embed": 0, "patch_embed": 0, "blocks.0": 1, "blocks.1": 2, "blocks.2": 3, "norm": 3, "head": 4}
    for name, p in model.named_parameters():
        layer = next(d for prefix, d in depth.items() if name.startswith(prefix))
        assert found[name].lr == pytest.approx(1e-2 * 0.5 ** (4 - layer)), name
        assert found[name].weight_decay == (0.1 if p.ndim > 1 and name != "pos_embed" else 0), name
    assert [g["name"] for g in groups][:4] == ["stem, no decay", "stem", "blocks.0, no decay", "blocks.0"]
    assert [g["lr"] for g in groups] == sorted(g["lr"] for g in groups)
    assert [n for g in optimizer.state_dict()["param_groups"] for n in g["param_names"]]  # torch keeps the names
    trained(model, optimizer)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Network(), ["stem", "layer1.0", "layer1.1", "layer2.0", "layer2.1", "head"]),
        (nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)), ["0", "2"]),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 2)), ["0", "3", "5"]),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(Residual(), Residual()), nn.Linear(4, 2)), ["0", "1.0", "1.1", "2"]),
        (nn.ModuleList([nn.ModuleDict({"conv": nn.Sequential(Block(2), Residual())}) for _ in range(2)]), ["0", "1"]),
        (nn.ModuleDict({"first": nn.Linear(2, 2), "second": nn.Linear(2, 2)}), ["first", "second"]),
        (nn.ModuleDict({"e": nn.ModuleList([Block(2), Block(2)]), "mid": nn.Linear(2, 2), "d": nn.ModuleList([Block(2), Block(2)])}), ["e.0", "e.1", "d.0", "d.1"]),
        (nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"experts": nn.ModuleList([Block(2), Block(2)])}) for _ in range(2)])}), ["layers.0", "layers.1"]),
    ],
    ids=["stages", "sequential", "a norm goes with its convolution", "nested stage", "unlike modules are no stage", "no containers", "encoder and decoder", "experts are no layers"],
)  # fmt: skip
def test_layers_are_read_off_the_module_tree(model, expected):
    groups = wb.models.param_groups(model, 1.0, layer_decay=0.5)
    assert [g["name"] for g in groups] == expected
    assert [g["lr"] for g in groups] == [0.5 ** (len(expected) - 1 - i) for i in range(len(expected))]
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


def test_frozen_parameters_are_in_no_group_and_nothing_to_train_is_refused():
    model = Transformer()
    wb.models.freeze(model, "blocks.*")
    names = [n for g in wb.models.param_groups(model, 1e-3) for n, _ in g["params"]]
    assert not any(n.startswith("blocks.") for n in names)
    wb.models.freeze(model)
    with pytest.raises(SelectionError):
        wb.models.param_groups(model, 1e-3)


# features


def test_features_are_those_of_the_layer_and_the_model_runs_no_further():
    model, x = Network().eval(), torch.randn(2, 3, 6, 6)
    ran = []
    model.fc.register_forward_hook(lambda *_: ran.append("fc"))
    with torch.inference_mode():
        expected = model.layer1(model.bn1(model.conv1(x)))
        assert torch.equal(wb.models.features(model, "layer1", x), expected)
    assert ran == []
    model(x)
    assert ran == ["fc"]  # the hook is gone
    for layer in ("layer9", "layer*"):
        with pytest.raises(SelectionError):
            wb.models.features(model, layer, x)
    model.unused = nn.Linear(1, 1)
    with pytest.raises(SelectionError, match="without calling"):
        wb.models.features(model, "unused", x)


class Careful(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(2, 2)

    def forward(self, x):
        try:
            return self.a(x)
        except Exception:
            return x


@pytest.mark.parametrize("caught", [Careful(), torch.compile(Careful(), backend="eager")], ids=["a forward that catches", "compiled"])
def test_features_come_where_a_hook_alone_would_not(caught):
    x = torch.ones(1, 2)
    plain = getattr(caught, "_orig_mod", caught)
    expected = caught(x)  # a graph that is made before knows no hook
    layer = next(name for name, module in caught.named_modules() if module is plain.a)
    assert torch.equal(wb.models.features(caught, layer, x), expected)
    assert torch.equal(caught(x), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_features_of_torchscript_are_refused_in_words():
    with pytest.raises(UnsupportedError, match="takes no hooks"):
        wb.models.features(torch.jit.script(nn.Sequential(nn.Linear(2, 2))), "0", torch.ones(1, 2))


# BatchNorm


def statistics(model):
    return {n: b.clone() for n, b in model.named_buffers()}


def test_a_frozen_batchnorm_moves_under_train_until_it_is_kept():
    model = Network()
    wb.models.freeze(model)
    wb.models.unfreeze(model, ["fc.*", "layer2.*"])
    report = wb.models.frozen_batchnorm(model)
    assert set(report.moving) == {"bn1", *(f"layer1.{i}.{n}" for i in (0, 1) for n in ("bn1", "downsample.1"))}
    before = statistics(model.train())
    model(torch.randn(2, 3, 6, 6))
    assert {n.rpartition(".")[0] for n, b in statistics(model).items() if not torch.equal(b, before[n])} == {
        r.name for r in report.rows if r.moves
    }
    assert set(wb.models.keep_batchnorm(model)) == set(report.moving)
    assert wb.models.frozen_batchnorm(model).check()
    for kept in (model, copy.deepcopy(model), torch.load(pickled(model), weights_only=False)):
        before = statistics(kept.train())
        kept(torch.randn(2, 3, 6, 6))
        assert {n.rpartition(".")[0] for n, b in statistics(kept).items() if not torch.equal(b, before[n])} == {
            r.name for r in report.rows if not r.frozen
        }
    assert set(wb.models.keep_batchnorm(model, keep=False)) >= set(report.moving)
    assert not wb.models.frozen_batchnorm(model)
    before = statistics(model.train())
    model(torch.randn(2, 3, 6, 6))
    assert not torch.equal(before["bn1.running_mean"], model.bn1.running_mean)
    assert "bn1" in str(wb.models.frozen_batchnorm(model))


def pickled(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return buffer


def test_batchnorm_without_parameters_is_judged_by_its_surroundings():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, affine=False), nn.LayerNorm(2))
    assert wb.models.frozen_batchnorm(model)
    wb.models.freeze(model)
    assert wb.models.frozen_batchnorm(model).moving == ("1",)
    assert wb.models.frozen_batchnorm(nn.Linear(1, 1))
    with pytest.raises(SelectionError):
        wb.models.keep_batchnorm(model, "0")


# the optimizer through a key repair


def renamed(names, rule="rename"):
    return KeyMap(tuple(Pair.plain(new, old, rule, "certain", "") for old, new in names.items()))


class Renamed(nn.Module):
    """The same network under other names, registered in another order."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(8, 2)
        self.inner = nn.Linear(4, 8)

    def forward(self, x):
        return self.out(self.inner(x).relu())


@pytest.mark.parametrize("make", [lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), lambda p: torch.optim.Adafactor(p, lr=0.1)], ids=["AdamW", "SGD", "Adafactor"])  # fmt: skip
def test_training_goes_on_bit_for_bit_under_new_names(make):
    torch.manual_seed(0)
    old = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = make(old.parameters())
    trained(old, optimizer, 3, (5, 4))
    names = {"0.weight": "inner.weight", "0.bias": "inner.bias", "2.weight": "out.weight", "2.bias": "out.bias"}
    new = Renamed()
    new.load_state_dict({names[n]: t.clone() for n, t in old.state_dict().items()})
    carried = wb.models.carry_optimizer(
        optimizer.state_dict(), renamed(names), [n for n, _ in old.named_parameters()], dict(new.named_parameters())
    )
    after = make(new.parameters())
    after.load_state_dict(copy.deepcopy(carried))
    trained(old, optimizer, 2, (5, 4))
    trained(new, after, 2, (5, 4))
    assert all(same(new.state_dict()[names[n]], t) for n, t in old.state_dict().items())


def fused(rows):
    """q, k, v of [rows, 4] become one weight."""
    parts = tuple(Part(name) for name in "qkv")
    return KeyMap((Pair("qkv", parts, "merge", "certain", ""),)), rows


def test_moments_are_merged_and_split_as_their_parameters_are():
    params = {n: nn.Parameter(torch.randn(2, 4)) for n in "qkv"}
    optimizer = torch.optim.Adam(params.values())
    sum(p.square().sum() for p in params.values()).backward()
    optimizer.step()
    state = optimizer.state_dict()
    keymap, _ = fused(2)
    carried = wb.models.carry_optimizer(state, keymap, list("qkv"), {"qkv": (6, 4)})
    for slot in ("exp_avg", "exp_avg_sq"):
        assert same(carried["state"][0][slot], torch.cat([state["state"][i][slot] for i in range(3)]))
    assert carried["state"][0]["step"] == 1
    split = KeyMap(
        tuple(Pair(n, (Part("qkv", rows=(2 * i, 2 * i + 2), shape=(6, 4)),), "split", "certain", "") for i, n in enumerate("qkv"))
    )
    back = wb.models.carry_optimizer(carried, split, ["qkv"], dict.fromkeys("qkv", (2, 4)))
    assert all(same(back["state"][i][slot], state["state"][i][slot]) for i in range(3) for slot in ("exp_avg", "exp_avg_sq"))
    state["state"][1]["step"] = torch.tensor(7.0)
    with pytest.raises(SelectionError, match="step"):
        wb.models.carry_optimizer(state, keymap, list("qkv"), {"qkv": (6, 4)})


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.NAdam, torch.optim.ASGD], ids=lambda kind: kind.__name__)
def test_training_goes_on_through_a_split(make):
    torch.manual_seed(0)
    old = nn.ModuleDict({"qkv": nn.Linear(4, 6)})
    old.forward = lambda x: old["qkv"](x)
    optimizer = make(old.parameters(), lr=0.1)
    trained(old, optimizer, 3, (5, 4))
    parts = {
        f"{n}.{kind}": (f"qkv.{kind}", (2 * i, 2 * i + 2), shape)
        for i, n in enumerate("qkv")
        for kind, shape in (("weight", (6, 4)), ("bias", (6,)))
    }
    keymap = KeyMap(tuple(Pair(n, (Part(s, rows=rows, shape=shape),), "split", "certain", "") for n, (s, rows, shape) in parts.items()))
    new = nn.ModuleDict({n: nn.Linear(4, 2) for n in "qkv"})
    new.forward = lambda x: torch.cat([new[n](x) for n in "qkv"], -1)
    wb.load_into(new, copy.deepcopy(old.state_dict()), keymap).check()
    after = make(new.parameters(), lr=0.1)
    after.load_state_dict(
        wb.models.carry_optimizer(copy.deepcopy(optimizer.state_dict()), keymap, ["qkv.weight", "qkv.bias"], dict(new.named_parameters()))
    )
    trained(old, optimizer, 5, (5, 4))
    trained(new, after, 5, (5, 4))
    assert {float(own["step"]) for own in after.state.values()} == {8}
    assert torch.allclose(torch.cat([new[n].weight for n in "qkv"]), old["qkv"].weight, atol=1e-5)


def test_state_of_all_parameters_in_a_row_holds_for_their_order_alone():
    torch.manual_seed(0)
    old, new = nn.Linear(3, 2), nn.Linear(3, 2)
    new.load_state_dict(old.state_dict())
    first, second = (torch.optim.LBFGS(model.parameters(), max_iter=2) for model in (old, new))

    def go(model, optimizer):
        def closure():
            optimizer.zero_grad()
            loss = model(torch.ones(1, 3)).sub(1).square().sum() + sum(p.pow(4).sum() for p in model.parameters())
            loss.backward()
            return loss

        optimizer.step(closure)

    go(old, first)
    go(new, second)
    keymap = renamed({"weight": "w", "bias": "b"})
    state, own = copy.deepcopy(second.state_dict()), {"w": new.weight, "b": new.bias}
    with pytest.raises(SelectionError, match="order"):
        wb.models.carry_optimizer(state, keymap, ["weight", "bias"], {"b": new.bias, "w": new.weight})
    second = torch.optim.LBFGS(own.values(), max_iter=2)
    second.load_state_dict(wb.models.carry_optimizer(state, keymap, ["weight", "bias"], own))
    go(old, first)
    go(new, second)
    assert same(old.weight, new.weight)


@pytest.mark.parametrize(("old", "new"), [((4,), (2, 2)), ((1,), (5,)), ((5, 7), (5, 1)), ((2, 2), (4,)), ((2, 1), (2, 3))])
@pytest.mark.parametrize("make", [torch.optim.Adam, torch.optim.Adafactor], ids=lambda kind: kind.__name__)
def test_a_moment_of_another_shape_is_refused_whatever_it_broadcasts_to(make, old, new):
    p = nn.Parameter(torch.randn(old))
    optimizer = make([p])
    p.square().sum().backward()
    optimizer.step()
    with pytest.raises(SpecMismatchError, match="has the shape"):
        wb.models.carry_optimizer(optimizer.state_dict(), None, ["w"], {"w": new})
    assert wb.models.carry_optimizer(optimizer.state_dict(), None, ["w"], {"w": old})["state"]


def small_state(names=("a", "b"), shape=(3,)):
    return {
        "state": {i: {"exp_avg": torch.ones(shape)} for i in range(len(names))},
        "param_groups": [{"lr": 1, "params": list(range(len(names)))}],
    }


def test_state_that_would_be_lost_is_refused_unless_it_may_go():
    state, keymap = small_state(), renamed({"a": "x"})
    with pytest.raises(SelectionError, match="'b'"):
        wb.models.carry_optimizer(state, keymap, ["a", "b"], {"x": (3,), "head": (9,)})
    carried = wb.models.carry_optimizer(state, keymap, ["a", "b"], {"x": (3,), "head": (9,)}, drop="b")
    assert list(carried["state"]) == [0]
    assert list(wb.models.carry_optimizer(state, None, ["a", "b"], {"a": (3,), "b": (9,)}, drop="b")["state"]) == [0]
    assert carried["param_groups"] == [{"lr": 1, "params": [0, 1]}]
    with pytest.raises(SpecMismatchError, match="exp_avg"):
        wb.models.carry_optimizer(state, renamed({"a": "x", "b": "y"}), ["a", "b"], {"x": (3,), "y": (4,)})
    with pytest.raises(SelectionError, match="names"):
        wb.models.carry_optimizer(state, keymap, ["a"], {"x": (3,)})
    part = KeyMap((Pair("x", (Part("a", rows=(0, 2), shape=(3,)),), "cut", "certain", ""), *renamed({"b": "y"}).pairs))
    with pytest.raises(SelectionError, match="not all of 'a'"):
        wb.models.carry_optimizer(state, part, ["a", "b"], {"x": (2,), "y": (3,)})
    made = KeyMap((Pair("x", (Part("a"), Part("b")), "weight norm", "certain", "", formula="weight_norm"),))
    with pytest.raises(SelectionError, match="weight_norm"):
        wb.models.carry_optimizer(state, made, ["a", "b"], {"x": (3,)})


def test_groups_are_kept_and_names_in_the_state_are_used():
    model = Transformer()
    optimizer = torch.optim.AdamW(wb.models.param_groups(model, 1e-2, layer_decay=0.5, weight_decay=0.1))
    trained(model, optimizer)
    state = optimizer.state_dict()
    order = list(itertools.chain.from_iterable(g["param_names"] for g in state["param_groups"]))
    own = dict(model.named_parameters())
    carried = wb.models.carry_optimizer(state, renamed({n: f"net.{n}" for n in order}), None, {f"net.{n}": own[n] for n in order})
    assert [g["lr"] for g in carried["param_groups"]] == [g["lr"] for g in state["param_groups"]]
    assert carried["param_groups"][0]["param_names"] == [f"net.{n}" for n in state["param_groups"][0]["param_names"]]
    assert all(same(carried["state"][i]["exp_avg"], state["state"][i]["exp_avg"]) for i in state["state"])
    with pytest.raises(SelectionError, match="order"):
        wb.models.carry_optimizer(state, None, None, {n: own[n] for n in reversed(order)})


# only what was trained


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_a_delta_on_its_base_is_the_model_again(suffix, tmp_path):
    model = Network()
    wb.save(model, tmp_path / f"base.{suffix}")
    wb.models.freeze(model)
    model.fc = nn.Linear(4, 7)
    model.extra = nn.Linear(2, 2)
    del model.layer2[1].downsample
    trained_names = {"fc.weight", "fc.bias", "extra.weight", "extra.bias"}
    with torch.no_grad():
        model.bn1.running_mean += 1
    report = wb.models.save_delta(model, tmp_path / f"base.{suffix}", tmp_path / "delta.safetensors")
    assert report.tensors == 5
    assert set(wb.open(tmp_path / "delta.safetensors")) == {*trained_names, "bn1.running_mean"}
    back = wb.models.with_delta(tmp_path / f"base.{suffix}", tmp_path / "delta.safetensors")
    wb.save(back, tmp_path / "back.pt")
    loaded, own = torch.load(tmp_path / "back.pt", weights_only=True), model.state_dict()
    assert set(loaded) == set(own)
    assert all(same(loaded[n], own[n]) for n in own)


def test_a_delta_knows_its_base_in_any_format_and_refuses_another(tmp_path):
    model = Transformer()
    torch.save({"model": model.state_dict(), "epoch": 2}, tmp_path / "base.pt")
    wb.save(model, tmp_path / "base.safetensors")
    with torch.no_grad():
        model.head.bias += 1
    wb.models.save_delta(model, tmp_path / "base.pt", tmp_path / "delta.safetensors")
    whole = wb.models.with_delta(tmp_path / "base.pt", tmp_path / "delta.safetensors")
    assert whole.extras["epoch"] == 2
    assert same(whole["model.head.bias"].load(), model.head.bias)
    assert same(wb.models.with_delta(tmp_path / "base.safetensors", tmp_path / "delta.safetensors")["head.bias"].load(), model.head.bias)
    other = Transformer()
    with pytest.raises(SelectionError, match="another base"):
        wb.models.with_delta(other, tmp_path / "delta.safetensors")
    with pytest.raises(SelectionError, match="no delta"):
        wb.models.with_delta(other, tmp_path / "base.safetensors")
    with pytest.raises(SelectionError, match="nothing differs"):
        wb.models.save_delta(other, other, tmp_path / "none.safetensors")


def test_a_base_that_could_not_give_the_model_back_is_refused_or_told(tmp_path):
    path, state = tmp_path / "d.safetensors", {"w": torch.zeros(2), "b": torch.ones(2)}
    with pytest.raises(SelectionError, match="in the model unchanged") as error:
        wb.models.save_delta({"x": torch.ones(2, 3), "y": torch.ones(2, 3)}, state, path)
    assert "keymap=" in error.value.hint
    rivals = {"teacher": state, "student": {n: t + 1 for n, t in state.items()}}
    for model, base in ((rivals, state), (state, rivals)):
        with pytest.raises(SelectionError, match="equal claim"):
            wb.models.save_delta(model, base, path)
    wb.models.save_delta({"w": torch.ones(2), "b": state["b"]}, {**state, "_extra_state": 1}, path)
    (finding,) = wb.models.with_delta({**state, "_extra_state": 1}, path).findings
    assert "_extra_state" in finding.message
    assert not wb.models.with_delta(state, path).findings


def test_one_bit_of_a_base_is_enough_to_refuse_it(tmp_path):
    base = {"w": torch.zeros(3), "v": torch.ones(2)}
    wb.models.save_delta({"w": torch.ones(3), "v": torch.ones(2)}, base, tmp_path / "d.safetensors")
    for other in ({"w": -torch.zeros(3), "v": torch.ones(2)}, {"w": torch.zeros(3, 1), "v": torch.ones(2)}, {"v": torch.zeros(3), "w": torch.ones(2)}, {"x": torch.zeros(3), "v": torch.ones(2)}, {**base, "x": torch.ones(1)}, {"w": torch.zeros(3)}):  # fmt: skip
        with pytest.raises(SelectionError, match="another base"):
            wb.models.with_delta(other, tmp_path / "d.safetensors")


def test_a_delta_that_replaces_the_first_layer_leaves_the_other_modules_versions(tmp_path):
    base = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    torch.save(base.state_dict(), tmp_path / "base.pt")
    tuned = nn.ModuleDict({"stem": nn.Linear(4, 3), "1": base[1]})
    wb.models.save_delta(tuned, tmp_path / "base.pt", tmp_path / "d.safetensors")
    wb.save(wb.models.with_delta(tmp_path / "base.pt", tmp_path / "d.safetensors"), tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert back._metadata == base.state_dict()._metadata
    assert tuned.load_state_dict(back)


def separate(state):
    """Under other names, queries, keys and values apart."""
    out = {f"net.{name}": value for name, value in state.items() if "in_proj" not in name}
    for name in [name for name in state if "in_proj" in name]:
        for word, piece in zip("qkv", state[name].chunk(3), strict=True):
            out["net." + name.replace("in_proj_", f"{word}_proj.")] = piece.clone()
    return out


@pytest.mark.parametrize("save", [torch.save, safetensors.torch.save_file])
@pytest.mark.parametrize("renamed", [lambda s: {f"module.{n}": t for n, t in s.items()}, separate], ids=["wrapped", "apart"])
def test_a_base_under_other_names_is_taken_through_a_map(renamed, save, tmp_path):
    model = nn.ModuleDict(
        {"encoder": nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False), "head": nn.Linear(8, 3)}
    )
    save(renamed(model.state_dict()), tmp_path / "base")
    model["head"] = nn.Linear(8, 5)
    with torch.no_grad():
        model["encoder"].layers[1].norm1.bias += 1
    report = wb.models.save_delta(model, tmp_path / "base", tmp_path / "d.safetensors")
    assert report.tensors == 3
    back, own = wb.models.with_delta(tmp_path / "base", tmp_path / "d.safetensors"), model.state_dict()
    assert set(back) == set(own)
    assert all(same(tensor.load(), own[name]) for name, tensor in back.items())
    torch.save(renamed(nn.ModuleDict({"encoder": model["encoder"]}).state_dict()), tmp_path / "other")
    with pytest.raises(SelectionError, match="another base"):
        wb.models.with_delta(tmp_path / "other", tmp_path / "d.safetensors")


def test_a_map_by_hand_says_where_a_base_lies_and_a_wrong_one_does_no_harm(tmp_path):
    base, path = {"p": torch.zeros(2), "q": torch.ones(2), "z": torch.ones(3)}, tmp_path / "d.safetensors"
    model = {"a": torch.ones(2), "b": torch.full((2,), 2.0), "z": torch.ones(3)}
    for source, kept in (("q", {"b"}), ("p", {"a", "b"})):
        keymap = KeyMap((Pair.plain("a", source, "", "certain", ""), Pair.plain("z", "z", "", "certain", "")))
        wb.models.save_delta(model, base, path, keymap=keymap)
        assert set(wb.open(path)) == kept
        back = wb.models.with_delta(base, path)
        assert back.keys() == model.keys()
        assert all(same(tensor.load(), model[name]) for name, tensor in back.items())
    told = wb.open(path).metadata
    for spoilt in ("[]", "{", '{"pairs": [1]}'):
        safetensors.torch.save_file({"a": torch.ones(2)}, path, {**told, "workbench.delta.keymap": spoilt})
        with pytest.raises(SelectionError, match="cannot be read"):
            wb.models.with_delta(base, path)
