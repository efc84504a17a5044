"""load_into and load_model: coverage, leftovers, ties, dtypes, devices, the meta device, modes. Oracle: torch's load_state_dict."""

import json
import os

import pytest
import torch
from torch import nn

import workbench as wb
from workbench.errors import ReportFailedError, SelectionError, SpecMismatchError
from workbench.keymap import loading
from workbench.keymap.certificate import LoadCertificate
from workbench.keymap.maps import KeyMap, Pair, Part, Regroup, Unmatched


class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.Dropout(0.1))
        self.embed, self.head = nn.Embedding(5, width), nn.Linear(width, 5, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("inv_freq", torch.arange(1.0, 5.0) / 3, persistent=False)


def plain(names):
    return KeyMap(tuple(Pair.plain(name, name, "same name", "certain", "") for name in names))


def load(model, state, **options):
    own = {name: value.shape for name, value in model.state_dict().items()}
    same = [name for name in own if name in state and state[name].shape == own[name]]
    shapes = tuple(Unmatched(n, "another shape", n) for n in own if n in state and n not in same)
    return wb.load_into(model, state, KeyMap(plain(same).pairs, shapes), **options)


def values(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(model, state):
    assert all(torch.equal(value, state[name]) and value.dtype == state[name].dtype for name, value in model.state_dict().items())


def by_name(certificate):
    return {row.name: row for row in certificate.rows}


def said(certificate, kind):
    return " ".join(finding.message for finding in certificate.findings if finding.kind == kind)


def refuses(model, state):
    """Whether torch's own strict load refuses."""
    try:
        model.load_state_dict(state)
    except RuntimeError:
        return True
    return False


# the proof


@pytest.mark.parametrize("size", [1, 7, (1 << 18) - 1, 1 << 18, (1 << 18) + 1])  # floats: around one block
@pytest.mark.parametrize("half", [False, True])
def test_the_proof_sees_one_wrong_bit_anywhere(size, half, tmp_path, monkeypatch):
    torch.save({"w": torch.randn(size).half() if half else torch.randn(size)}, tmp_path / "w.pt")
    copy = loading.copy

    def flip(given, target, at):
        copy(given, target)
        target.view(-1).view(torch.int32)[at] ^= 1 << 13

    for at in {0, size // 2, size - 1}:
        model = nn.Module()
        model.w = nn.Parameter(torch.zeros(size))
        monkeypatch.setattr(loading, "copy", copy)
        assert wb.load_into(model, tmp_path / "w.pt", plain(["w"]))
        monkeypatch.setattr(loading, "copy", lambda given, target, at=at: flip(given, target.detach(), at))
        certificate = wb.load_into(model, tmp_path / "w.pt", plain(["w"]))
        assert by_name(certificate)["w"].state == "wrong"
        with pytest.raises(ReportFailedError, match="first w"):
            certificate.check()


def test_a_fused_and_a_transposed_target_are_proven_through_the_map(tmp_path, monkeypatch):
    q, k, conv = torch.randn(2, 3), torch.randn(4, 3), torch.randn(3, 5)
    torch.save({"q": q, "k": k, "conv": conv}, tmp_path / "f.pt")
    model = nn.ModuleDict({"qk": nn.Linear(3, 6, bias=False), "fc": nn.Linear(3, 5, bias=False)})
    keymap = KeyMap(
        (
            Pair("qk.weight", (Part("q"), Part("k")), "fused", "certain", ""),
            Pair("fc.weight", (Part("conv", Regroup((3, 5), (1, 0), (5, 3)), None, (3, 5)),), "transpose", "certain", ""),
        )
    )
    certificate = wb.load_into(model, tmp_path / "f.pt", keymap)
    assert certificate
    assert certificate.unused == ()
    assert by_name(certificate)["qk.weight"].source == "q + k"
    assert torch.equal(model["qk"].weight, torch.cat([q, k]))
    assert torch.equal(model["fc"].weight, conv.T)
    monkeypatch.setattr(loading, "copy", lambda given, target: None)
    model["fc"].weight.data.zero_()
    certificate = wb.load_into(model, tmp_path / "f.pt", keymap)
    assert {row.name: row.state for row in certificate.rows} == {"qk.weight": "loaded", "fc.weight": "wrong"}


def test_values_loaded_under_autograd_are_seen_by_it(tmp_path):
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "w.pt")
    for put in (
        lambda m: m.load_state_dict(torch.load(tmp_path / "w.pt")),
        lambda m: wb.load_into(m, tmp_path / "w.pt", plain(m.state_dict())),
    ):
        model = nn.Linear(2, 2)
        loss = (torch.ones(1, 2, requires_grad=True) @ model.weight).sum()
        put(model)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


# coverage and what stayed


def test_coverage_counts_tensors_parameters_and_bytes_and_ties_once():
    model, state = Net(), dict(Net().state_dict())
    del state["body.0.weight"]
    certificate = load(model, state, strict=False)
    assert certificate.covered == {"tensors": (7, 8), "parameters": (4 + 4 + 4 + 20, 48), "bytes": (4 * 32 + 4 * 8 + 8, 4 * 48 + 4 * 8 + 8)}
    assert by_name(certificate)["head.weight"].tied_to == "embed.weight"
    assert certificate.check(coverage=0.7)
    with pytest.raises(ReportFailedError, match=r"72\.4%"):
        certificate.check(coverage=0.9)


def test_what_stayed_is_told_by_the_highest_module_that_stayed_whole():
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "b": nn.Linear(2, 2)})
    certificate = load(model, {"b.weight": torch.ones(2, 2)}, strict=False)
    assert certificate.initial_modules == {"a": ["a.0.weight", "a.0.bias", "a.1.weight", "a.1.bias"], "b.bias": ["b.bias"]}
    assert "(a, b.bias)" in certificate.headline
    with pytest.raises(SpecMismatchError, match=r"a \(4 tensors\): not in the file; b.bias: not in the file"):
        load(model, {"b.weight": torch.ones(2, 2)})


def test_nothing_loaded_is_no_success():
    certificate = load(nn.Linear(2, 2), {"other": torch.ones(1)}, strict=False)
    assert not certificate
    assert "the whole model" in certificate.headline


def test_without_strict_another_shape_is_skipped_and_listed_where_torch_raises():
    model, state = Net(), dict(Net().state_dict())
    state["body.0.weight"] = torch.ones(3, 3)
    before = model.body[0].weight.clone()
    with pytest.raises(RuntimeError, match="size mismatch"):
        Net().load_state_dict(state, strict=False)
    certificate = load(model, state, strict=False)
    assert torch.equal(model.body[0].weight, before)
    row = by_name(certificate)["body.0.weight"]
    assert (row.state, row.note) == ("initial", "[3, 3] in the file and [4, 4] in the model")
    assert "finds another shape in body.0.weight" in certificate.verdict


# what is left over


HARMLESS = {
    "bn.num_batches_tracked": torch.tensor(3), "bert.embeddings.position_ids": torch.arange(6), "layers.0.rotary_emb.inv_freq": torch.ones(3),
    "h.0.attn.bias": torch.ones(1, 1, 4, 4), "h.0.attn.masked_bias": torch.tensor(-1e4), "n_averaged": torch.tensor(1),
    "layers.0.attn.relative_position_index": torch.ones(4, 4), "total_ops": torch.zeros(1),
}  # fmt: skip
HARMFUL = {
    "h.0.attn.bias": torch.ones(12), "position_embeddings.weight": torch.ones(4, 4), "bn.running_mean": torch.ones(4),
    "my_position_ids.weight": torch.ones(2), "head.weight": torch.ones(2, 2),
}  # fmt: skip


@pytest.mark.parametrize("name", HARMLESS)
def test_what_a_model_can_do_without_is_unused_and_fine_and_torch_is_quoted(name):
    state = {**nn.Linear(2, 2).state_dict(), name: HARMLESS[name]}
    assert refuses(nn.Linear(2, 2), state)
    certificate = load(nn.Linear(2, 2), state)
    assert certificate
    assert [(entry.name, entry.fine) for entry in certificate.unused] == [(name, True)]
    assert f"would refuse: it does not know {name}" == certificate.verdict
    assert "(" in certificate.unused[0].reason  # who says so


@pytest.mark.parametrize("name", HARMFUL)
def test_what_is_not_known_to_be_harmless_is_refused_and_called_unused_without_strict(name):
    state = {**nn.Linear(2, 2).state_dict(), name: HARMFUL[name]}
    with pytest.raises(SpecMismatchError, match="left over"):
        load(nn.Linear(2, 2), state)
    assert not load(nn.Linear(2, 2), state, strict=False).unused[0].fine


@pytest.mark.parametrize(("scale", "fine"), [(1.0, True), (10.0, False)])
def test_rotary_angles_that_the_model_computes_otherwise_are_not_harmless(scale, fine):
    model, state = Net(), {**Net().state_dict(), "inv_freq": (scale * torch.arange(1.0, 5.0) / 3).bfloat16()}
    certificate = load(model, state, strict=False)
    assert certificate.unused[0].fine is fine
    if fine:
        assert load(Net(), state)
    else:
        with pytest.raises(SpecMismatchError, match="other values"):
            load(Net(), state)


def test_no_wolf_is_cried_where_torch_accepts():
    model, state = nn.BatchNorm1d(3), dict(nn.BatchNorm1d(3).state_dict())  # a plain dict: as written before versions
    del state["num_batches_tracked"]
    assert not refuses(nn.BatchNorm1d(3), state)
    certificate = load(model, state)
    assert certificate
    assert certificate.verdict == "accepts the names as they are"
    assert by_name(certificate)["num_batches_tracked"].state == "initial"


def test_a_pair_that_the_map_leaves_out_is_left_over():
    with pytest.raises(SpecMismatchError, match="the map leaves it out"):
        wb.load_into(nn.Linear(2, 2), nn.Linear(2, 2), plain(["weight"]))


# ties


@pytest.mark.parametrize("strict", [True, False])
def test_two_values_for_one_tied_tensor_are_refused(strict):
    model, state = Net(), dict(Net().state_dict())
    state["head.weight"] = state["embed.weight"] + 1
    before = values(model)
    with pytest.raises(SpecMismatchError, match=r"ties 'embed.weight' and 'head.weight'"):
        load(model, state, strict=strict)
    assert_same(model, before)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("hooked", [False, True])
def test_a_tie_stored_twice_loads_and_stays_one_tensor(assign, hooked, tmp_path):
    state = {name: value.clone() for name, value in Net().state_dict().items()}
    torch.save(state, tmp_path / "twice.pt")
    model = Net()
    if hooked:
        model.register_load_state_dict_post_hook(lambda module, keys: None)
    certificate = wb.load_into(model, tmp_path / "twice.pt", plain(state), assign=assign)
    assert certificate
    assert model.head.weight is model.embed.weight
    assert_same(model, state)


@pytest.mark.parametrize("stored", ["embed.weight", "head.weight"])
def test_a_tied_name_that_the_file_leaves_out_is_filled_through_the_other_and_torch_is_quoted(stored):
    model, state = Net(), dict(Net().state_dict())
    left_out = {"embed.weight": "head.weight", "head.weight": "embed.weight"}[stored]
    del state[left_out]
    assert refuses(Net(), state)
    certificate = load(model, state)
    assert certificate.check(coverage=1)
    assert certificate.verdict == f"would refuse: it misses {left_out}"
    assert certificate.covered["tensors"] == (8, 8)
    assert torch.equal(model.head.weight, state[stored])


def test_a_tie_that_the_models_own_code_tears_is_a_danger():
    def tear(module, keys):
        module.head.weight = nn.Parameter(module.head.weight.detach().clone())

    model = Net()
    model.register_load_state_dict_post_hook(tear)
    certificate = load(model, Net().state_dict())
    assert not certificate
    assert "embed.weight and head.weight were tied" in certificate.headline


# dtypes, the meta device, devices


@pytest.mark.parametrize("dtype", [None, "file", "model"])
@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("hooked", [False, True])
def test_assign_is_torchs_assign_and_the_dtype_policy_is_told(dtype, meta, hooked, tmp_path):
    state = {name: value.half() if value.is_floating_point() else value for name, value in nn.BatchNorm1d(3).state_dict().items()}
    torch.save(state, tmp_path / "half.pt")
    oracle, model = nn.BatchNorm1d(3, device="meta"), nn.BatchNorm1d(3, device="meta" if meta else None)
    model.weight.requires_grad_(False)
    if hooked:
        model.register_load_state_dict_post_hook(lambda module, keys: None)
    oracle.load_state_dict(state, assign=True)
    certificate = wb.load_into(model, tmp_path / "half.pt", plain(state), assign=True, dtype=dtype)
    assert certificate
    cast = dtype == "model"
    assert_same(model, {n: v.to(torch.float32) if cast and v.is_floating_point() else v for n, v in oracle.state_dict().items()})
    assert said(certificate, "dtype") == ("4 tensors: float16 in the file, float32 in the model" if cast else "")
    assert not model.weight.requires_grad
    assert model.bias.requires_grad


def test_the_files_dtype_needs_assign():
    for bad in ({"dtype": "file"}, {"dtype": "float16"}):
        with pytest.raises(SelectionError, match="dtype"):
            load(nn.Linear(2, 2), nn.Linear(2, 2).state_dict(), **bad)


@pytest.mark.parametrize("options", [{"assign": True}, {"device": "cpu"}])
def test_a_meta_model_gets_values_and_what_gets_none_is_never_called_loaded(options):
    with torch.device("meta"):
        model = Net()
    state = Net().state_dict()
    certificate = load(model, state, **options)
    assert not certificate  # inv_freq is in no state dict, and a model built on the meta device has none
    assert [row.name for row in certificate.rows if row.state == "empty"] == ["inv_freq"]
    assert model.inv_freq.is_meta
    assert_same(model, state)
    assert model.head.weight is model.embed.weight
    assert "went from meta to cpu" in said(certificate, "device")
    model.register_buffer("inv_freq", torch.ones(4), persistent=False)
    assert load(model, state)


def test_a_meta_model_that_is_filled_in_part_is_empty_in_the_rest():
    model = nn.Linear(2, 2, device="meta")
    certificate = load(model, {"weight": torch.ones(2, 2)}, strict=False, assign=True)
    assert not certificate
    assert {row.name: row.state for row in certificate.rows} == {"weight": "loaded", "bias": "empty"}


@pytest.mark.parametrize("options", [{"assign": True}, {"device": "cpu"}])
@pytest.mark.parametrize("versioned", [False, True])
def test_a_counter_that_a_meta_models_file_lacks_is_what_torch_makes_it(versioned, options):
    def model():
        return nn.Sequential(tied := nn.Linear(4, 4), nn.BatchNorm1d(4), tied)

    full = model().state_dict()
    state = type(full)((name, value) for name, value in full.items() if "num_batches" not in name)
    if versioned:  # by a torch that saves the counter: this file lost it
        state._metadata = full._metadata
    with torch.device("meta"):
        target, other, oracle = model(), model(), model()
    if versioned:
        with pytest.raises(RuntimeError, match="num_batches_tracked"):
            oracle.load_state_dict(state, assign=True)
        with pytest.raises(SpecMismatchError, match="num_batches_tracked"):
            load(target, state, **options)
        certificate = load(other, state, strict=False, **options)
        assert not certificate
        assert certificate.named("empty") == ["1.num_batches_tracked"]
        return
    oracle.load_state_dict(state, assign=True)
    certificate = load(target, state, **options)
    assert certificate
    assert_same(target, oracle.state_dict())
    assert target[0].weight is target[2].weight
    assert target[0].weight.requires_grad
    (row,) = [row for row in certificate.rows if row.name == "1.num_batches_tracked"]
    assert (row.state, row.tied_to) == ("set by the module", None)
    assert "counter" in row.note


def machine(monkeypatch, cuda, mps):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize(
    ("asked", "cuda", "mps", "taken", "aloud"),
    [
        ("auto", 0, False, "cpu", False), ("auto", 1, False, "cuda", False), ("auto", 0, True, "mps", False), ("auto", 2, True, "cuda", False),
        ("cuda", 1, False, "cuda", False), ("cuda:1", 2, False, "cuda:1", False), ("cuda:1", 1, False, "cuda", True), ("cuda", 0, False, "cpu", True),
        ("cuda:0", 0, True, "mps", True), ("mps", 0, False, "cpu", True), ("mps", 1, False, "cuda", True), ("xpu", 0, False, "cpu", True),
        ("cpu", 2, True, "cpu", False), (torch.device("cuda", 0), 1, False, "cuda:0", False), (torch.device("cuda", 3), 1, False, "cuda", True),
    ],
)  # fmt: skip
def test_a_device_that_does_not_exist_falls_back_aloud(asked, cuda, mps, taken, aloud, monkeypatch):
    machine(monkeypatch, cuda, mps)
    device, told = loading._device(asked)
    assert str(device) == taken
    assert [finding.severity for finding in told] == ["warning"] * aloud
    assert not aloud or (str(asked) in told[0].message and str(device) in told[0].message)


@pytest.mark.parametrize("asked", ["nonsense", "meta", "cuda:-2", 3.5])
def test_what_is_no_device_is_refused(asked):
    with pytest.raises(SelectionError, match="device"):
        load(nn.Linear(2, 2), nn.Linear(2, 2).state_dict(), device=asked)


# modes, JSON, load_model


def test_live_layers_are_named_and_those_that_do_nothing_are_not():
    model = Net()
    assert load(model, model.state_dict()).mode == "train: 1 BatchNorm1d, 1 Dropout live until model.eval(), first body.1"
    model.eval()
    assert load(model, model.state_dict()).mode == "eval"
    model.body[1].train()
    assert load(model, model.state_dict()).mode == "eval: 1 BatchNorm1d live until model.eval(), first body.1"
    assert load(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0)), {"0.weight": torch.ones(2, 2), "0.bias": torch.ones(2)}).mode == "train"


def test_a_certificate_goes_through_json():
    state = {**Net().state_dict(), "position_ids": torch.arange(3), "other": torch.ones(1)}
    certificate = load(Net(), state, strict=False, device="cpu")
    assert LoadCertificate.from_dict(json.loads(json.dumps(certificate.to_dict()))) == certificate


def test_load_model_builds_loads_places_and_proves(tmp_path, monkeypatch):
    machine(monkeypatch, 0, False)
    torch.save(Net(3).state_dict(), tmp_path / "w.pt")
    oracle = Net(3)
    oracle.load_state_dict(torch.load(tmp_path / "w.pt"))
    model, certificate = wb.load_model(Net, tmp_path / "w.pt", device="cuda:1", keymap=plain(oracle.state_dict()), width=3)
    assert_same(model, oracle.state_dict())
    assert not any(module.training for module in model.modules())
    assert certificate.check(coverage=1)
    assert certificate.mode == "eval"
    assert (certificate.model, certificate.source) == ("Net", str(tmp_path / "w.pt"))
    assert "cuda:1 was asked for" in certificate.headline
    with pytest.raises(SelectionError, match=r"nn\.Module"):
        wb.load_model(dict, tmp_path / "w.pt")
    with pytest.raises(SpecMismatchError, match="nothing was loaded"):
        wb.load_model(Net, tmp_path / "w.pt", keymap=plain(oracle.state_dict()), width=5)


def test_a_refusal_by_a_model_with_code_of_its_own_leaves_it_as_it_was():
    model = Net()
    model.register_load_state_dict_post_hook(lambda module, keys: None)
    before, objects = values(model), dict(model.named_parameters())
    state = {**Net().state_dict(), "other": torch.ones(1)}
    for assign in (False, True):
        with pytest.raises(SpecMismatchError):
            load(model, state, assign=assign)
        assert_same(model, before)
        assert all(objects[name] is parameter for name, parameter in model.named_parameters())


# what an attack found


def test_a_source_computed_from_the_model_is_copied_before_the_model_changes():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    first, second = model[0].weight.detach().clone(), model[1].weight.detach().clone()
    swapped = wb.ops.rename(wb.ops.cast(wb.open(model), "float64"), lambda name: str(1 - int(name[0])) + name[1:])
    assert wb.load_into(model, swapped)
    assert torch.equal(model[0].weight, second)
    assert torch.equal(model[1].weight, first)


@pytest.mark.parametrize("name", ["_extra_state", "epoch"])
def test_an_entry_that_is_no_tensor_and_nobody_takes_is_left_over(name):
    state = {**nn.Linear(2, 2).state_dict(), name: 7}
    with pytest.raises(RuntimeError, match=name):
        nn.Linear(2, 2).load_state_dict(state)
    with pytest.raises(SpecMismatchError, match=f"{name}: in the file, no tensor"):
        wb.load_into(nn.Linear(2, 2), state)
    certificate = wb.load_into(nn.Linear(2, 2), state, strict=False)
    assert [(entry.name, entry.fine) for entry in certificate.unused] == [(name, False)]
    assert name in certificate.verdict


def test_parameters_that_a_hook_leaves_out_of_the_state_dict_are_counted_and_loaded():
    def leave_out(module, state, *_):
        for name in [name for name in state if name.startswith("a.")]:
            del state[name]

    def partial():
        model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
        model.register_state_dict_post_hook(leave_out)
        return model

    certificate = wb.load_into(partial(), partial(), strict=False)
    assert certificate.initial_modules == {"a": ["a.weight", "a.bias"]}
    assert certificate.coverage == 0.5
    whole, model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}), partial()
    assert wb.load_into(model, whole).coverage == 1
    assert torch.equal(model["a"].weight, whole["a"].weight)


def test_a_refused_load_puts_extra_state_back():
    class Counts(nn.Linear):
        v = 1

        def get_extra_state(self):
            return self.v

        def set_extra_state(self, state):
            self.v = state

    saved, model = Counts(2, 2), Counts(2, 2)
    saved.v = 7
    with pytest.raises(SpecMismatchError):
        wb.load_into(model, {**saved.state_dict(), "left": torch.ones(2)})
    assert model.v == 1


def test_a_load_state_dict_of_the_instance_is_asked():
    model = nn.Linear(2, 2)
    model.load_state_dict = lambda state, **_: nn.Linear.load_state_dict(model, {n: 2 * t for n, t in state.items()}, strict=False)
    saved = nn.Linear(2, 2)
    certificate = wb.load_into(model, saved)
    assert torch.equal(model.weight, 2 * saved.weight)
    assert not certificate  # the values are others than the file's, and it says so


def test_a_value_beyond_float8_is_no_loaded_value():
    """float8_e4m3fn has no infinity: torch makes its largest number of 1000."""
    model = nn.Module()
    model.register_buffer("w", torch.zeros(3, dtype=torch.float8_e4m3fn))
    assert wb.load_into(model, {"w": torch.tensor([448.0, 460, -2])})  # rounded, as any number is
    assert not wb.load_into(model, {"w": torch.tensor([1000.0, 1, 1])})


def test_parts_that_do_not_fit_together_are_refused_before_anything_is_copied():
    for q, k in ((torch.ones(2, 2), torch.ones(2, 3)), (torch.ones(2, 2), torch.ones(2, 2).half())):
        model = nn.ModuleDict({"a": nn.Linear(2, 2), "qkv": nn.Linear(2, 4, bias=False)})
        before = {name: value.clone() for name, value in model.state_dict().items()}
        pairs = [Pair.plain(n, n, "by hand", "certain", "") for n in ("a.weight", "a.bias")]
        pairs.append(Pair("qkv.weight", (Part("q"), Part("k")), "by hand", "certain", ""))
        with pytest.raises(SpecMismatchError, match="put together"):
            wb.load_into(model, {**nn.ModuleDict({"a": nn.Linear(2, 2)}).state_dict(), "q": q, "k": k}, KeyMap(tuple(pairs)))
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_views_of_one_memory_that_assign_takes_apart_are_told():
    model = nn.ParameterDict({"a": nn.Parameter(torch.ones(2, 3))})
    model.b = nn.Parameter(model["a"].detach().t())
    certificate = wb.load_into(model, {"a": torch.ones(2, 3), "b": torch.ones(3, 2)}, assign=True)
    assert [finding.kind for finding in certificate.findings if finding.severity == "warning"] == ["memory"]


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_sparse_and_conjugate_buffers_load():
    for value in (torch.eye(3).to_sparse(), torch.eye(3).to_sparse_csr(), torch.tensor([1 + 2j, 3j]).conj()):
        model, saved = nn.Module(), nn.Module()
        model.register_buffer("w", torch.zeros_like(value) if value.layout is torch.strided else value * 0)
        saved.register_buffer("w", value)
        assert wb.load_into(model, saved), value


def test_a_certificate_tells_that_its_file_runs_code(tmp_path):
    class Program:
        def __reduce__(self):
            return os.system, ("true",)

    model = nn.Linear(2, 2)
    torch.save({"model": model.state_dict(), "more": Program()}, tmp_path / "m.pt")
    certificate = wb.load_into(nn.Linear(2, 2), tmp_path / "m.pt")
    assert certificate
    assert "may run code" in certificate.headline
    torch.save({"model": model.state_dict()}, tmp_path / "plain.pt")
    assert "may run code" not in wb.load_into(nn.Linear(2, 2), tmp_path / "plain.pt").headline
