"""match and load_into: rules with reasons, nothing guessed, and a certificate that can fail. Oracle: load_state_dict."""

import json

import pytest
import torch
from strategies import same
from torch import nn

import workbench as wb
from workbench.errors import SelectionError, SpecMismatchError, UnsupportedError
from workbench.keymap.maps import KeyMap, Pair, Part, Regroup


class Net(torch.nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.stem = torch.nn.Linear(4, width)
        self.body = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.BatchNorm1d(width), torch.nn.Linear(width, width))
        self.head = torch.nn.Linear(width, 3)


def net(seed, width=8):
    torch.manual_seed(seed)
    return Net(width)


def holds(model, state):
    return all(same(value, state[name]) for name, value in model.state_dict().items())


WRAPPINGS = {
    "as it is": lambda s: s,
    "DataParallel": lambda s: {f"module.{n}": t for n, t in s.items()},
    "torch.compile": lambda s: {f"_orig_mod.{n}": t for n, t in s.items()},
    "both": lambda s: {f"module._orig_mod.{n}": t for n, t in s.items()},
    "compiled inside": lambda s: {n.replace("body.", "body._orig_mod."): t for n, t in s.items()},
    "inside a trainer": lambda s: {f"backbone.{n}": t for n, t in s.items()},
    "a training checkpoint": lambda s: {"state_dict": {f"model.{n}": t for n, t in s.items()}, "epoch": 1},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_common_wrappings_load_and_are_proven(wrapping, tmp_path):
    source, target = net(1), net(2)
    torch.save(WRAPPINGS[wrapping](source.state_dict()), tmp_path / "w.pt")
    certificate = wb.load_into(target, tmp_path / "w.pt")
    assert certificate
    assert certificate.coverage == 1
    assert holds(target, source.state_dict())


def test_the_reverse_direction_strips_from_the_model():
    source, target = net(1), torch.nn.ModuleDict({"module": net(2)})
    assert wb.load_into(target, source)
    assert holds(target["module"], source.state_dict())


def test_two_layers_that_fit_alike_are_ambiguous_and_none_is_chosen():
    keymap = wb.match({"a.weight": torch.ones(2, 2), "b.weight": torch.ones(2, 2)}, {"x.weight": (2, 2)})
    assert not keymap
    assert keymap.pairs == ()
    assert set(keymap.ambiguous[0].candidates) == {"a.weight", "b.weight"}


def test_a_pair_of_one_name_and_another_shape_is_no_pair():
    keymap = wb.match({"w": torch.ones(2, 3)}, {"w": (3, 2)})
    assert keymap.pairs == ()
    assert "[2, 3]" in keymap.ambiguous[0].reason
    assert "[3, 2]" in keymap.ambiguous[0].reason


def test_no_source_is_used_twice_and_no_target_is_filled_twice():
    source = {f"{p}.{n}": t for p in ("student", "teacher") for n, t in net(1).state_dict().items()}
    keymap = wb.match(source, net(2))
    assert len({p.source for p in keymap.pairs}) == len(keymap.pairs) == len({p.target for p in keymap.pairs})
    assert not [p for p in keymap.pairs if p.confidence == "certain"]


def test_a_keymap_goes_through_json_applies_and_inverts():
    source, target = WRAPPINGS["inside a trainer"](net(1).state_dict()), net(2)
    keymap = wb.match(source, target)
    again = KeyMap.from_dict(json.loads(json.dumps(keymap.to_dict())))
    assert again == keymap
    fixed = again.apply(wb.open(source))
    assert set(fixed) == set(target.state_dict())
    back = keymap.inverse().apply(fixed)
    assert {n: t.shape for n, t in back.items()} == {n: tuple(t.shape) for n, t in source.items()}
    scope = {"checkpoint": source, "model": target}
    exec(keymap.code(), scope)
    assert set(scope["state_dict"]) == set(target.state_dict())
    assert all(torch.equal(value, fixed[name].load()) for name, value in target.state_dict().items())


def test_a_target_without_tensors_is_refused():
    with pytest.raises(SelectionError):
        wb.match({"w": torch.ones(1)}, torch.nn.ReLU())


# loading


@pytest.mark.parametrize("fault", ["missing", "left over", "shape", "kind"])
def test_strict_refuses_before_a_single_value_is_copied(fault):
    target = net(2)
    before = {n: t.clone() for n, t in target.state_dict().items()}
    state = dict(net(1).state_dict())
    if fault == "missing":
        state.pop("head.bias")
    elif fault == "left over":
        state["extra.weight"] = torch.ones(3)
    elif fault == "shape":
        state["head.weight"] = torch.ones(5, 8)
    else:
        state["head.bias"] = torch.ones(3, dtype=torch.int64)
    with pytest.raises(SpecMismatchError, match="nothing was loaded"):
        wb.load_into(target, state)
    assert holds(target, before)


def test_not_strict_loads_the_rest_and_lists_what_stayed():
    target, source = net(2), net(1)
    state = dict(source.state_dict())
    state.pop("head.bias")
    state["head.weight"] = torch.ones(5, 8)
    before = target.head.weight.detach().clone()
    certificate = wb.load_into(target, state, strict=False)
    assert {row.name for row in certificate.rows if row.state == "initial"} == {"head.bias", "head.weight"}
    assert same(target.head.weight, before)
    assert same(target.stem.weight, source.stem.weight)


def test_what_strict_load_state_dict_accepts_is_accepted():
    source, target = net(1), net(2)
    assert wb.load_into(target, source.state_dict())
    oracle = net(3)
    oracle.load_state_dict(source.state_dict())
    assert holds(target, oracle.state_dict())


def test_a_cast_is_the_cast_that_load_state_dict_makes(tmp_path):
    source = net(1)
    torch.save({n: t.half() if t.is_floating_point() else t for n, t in source.state_dict().items()}, tmp_path / "h.pt")
    target, oracle = net(2), net(3)
    assert wb.load_into(target, tmp_path / "h.pt")
    oracle.load_state_dict(torch.load(tmp_path / "h.pt", weights_only=True))
    assert holds(target, oracle.state_dict())


def test_values_that_overflow_the_model_make_the_certificate_false():
    target = torch.nn.Linear(2, 2).half()
    certificate = wb.load_into(target, {"weight": torch.full((2, 2), 1e6), "bias": torch.zeros(2)})
    assert not certificate
    with pytest.raises(wb.errors.ReportFailedError):
        certificate.check()


def test_old_weight_norm_names_load_as_the_module_allows():
    new = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(3, 2))
    state = {"weight_g": torch.full((2, 1), 2.0), "weight_v": torch.ones(2, 3), "bias": torch.zeros(2)}
    oracle = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(3, 2))
    oracle.load_state_dict(dict(state))
    wb.load_into(new, state)
    assert holds(new, oracle.state_dict())


def test_tied_weights_load_and_stay_tied():
    def tied(seed):
        torch.manual_seed(seed)
        model = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 3), "b": torch.nn.Linear(3, 3)})
        model["b"].weight = model["a"].weight
        return model

    source, target = tied(1), tied(2)
    assert wb.load_into(target, source)
    assert target["a"].weight is target["b"].weight
    assert holds(target, source.state_dict())


def test_training_mode_gradients_and_identity_are_kept():
    target = net(2)
    target.stem.weight.requires_grad_(False)
    parameters = dict(target.named_parameters())
    wb.load_into(target, net(1))
    assert target.training
    assert not target.stem.weight.requires_grad
    assert target.head.weight.requires_grad
    assert all(parameters[n] is p for n, p in target.named_parameters())


def test_a_model_without_memory_is_refused():
    with torch.device("meta"):
        target = Net()
    with pytest.raises(UnsupportedError, match="meta"):
        wb.load_into(target, net(1))


def test_a_strided_or_transposed_parameter_takes_the_values():
    target = torch.nn.Linear(4, 4, bias=False)
    target.weight = torch.nn.Parameter(torch.empty(4, 4).t())
    source = torch.randn(4, 4)
    assert wb.load_into(target, {"weight": source})
    assert torch.equal(target.weight, source)


# what an attack found


def joined(*shapes):
    """q, k, v put together, by a map that tells their shapes or does not."""
    parts = tuple(Part(name, None, None, shape) for name, shape in zip("qkv", shapes, strict=True))
    return KeyMap((Pair("qkv", parts, "by hand", "certain", ""),))


def test_the_inverse_of_an_inverse_is_the_map_itself():
    source = {name: torch.randn(rows, 3) for name, rows in zip("qkv", (4, 2, 2), strict=True)}
    keymap = joined((4, 3), (2, 3), (2, 3))
    again = keymap.inverse().inverse()
    assert torch.equal(again.apply(source)["qkv"].load(), keymap.apply(source)["qkv"].load())
    back = again.inverse().apply(again.apply(source))
    assert all(torch.equal(back[name].load(), source[name]) for name in "qkv")
    with pytest.raises(SelectionError, match="how high"):
        joined((), (), ()).inverse()


def test_a_chain_of_maps_is_no_surer_than_its_links():
    likely = KeyMap((Pair.plain("b", "a", "a guess", "likely", ""),), rivals=("ema",))
    certain = KeyMap((Pair.plain("c", "b", "a rename", "certain", ""),))
    for chain in (likely.then(certain), KeyMap((Pair.plain("a", "x", "", "certain", ""),)).then(likely)):
        assert [pair.confidence for pair in chain.pairs] == ["likely"]
        assert chain.rivals == ("ema",)


def test_the_code_is_the_map_where_shapes_are_odd():
    source = {"a": torch.randn(3, 4, 1), "b": torch.randn(2).bfloat16()}
    keymap = KeyMap(
        (
            Pair("x", (Part("a", Regroup((3, 4), (1, 0), (4, 3))),), "", "certain", ""),
            Pair("y", (Part("b"), Part("", None, (0, 3))), "", "certain", ""),
        )
    )
    room = {"checkpoint": source}
    exec(keymap.code(), room)
    for name, tensor in keymap.apply(source).items():
        assert same(room["state_dict"][name], tensor.load())


def test_a_hook_leaves_what_the_map_does_not_know_and_tells_versions_under_the_new_names():
    class Versioned(nn.Linear):
        _version = 2

        def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest):
            if local_metadata.get("version", 1) < 2:
                state_dict[prefix + "weight"] = state_dict[prefix + "weight"].t()
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    def model():
        return nn.Sequential(Versioned(3, 3))

    saved = nn.DataParallel(model()).state_dict()
    keymap = wb.match(saved, model())
    loaded = model()
    loaded.register_load_state_dict_pre_hook(keymap)
    loaded.load_state_dict(saved)
    assert torch.equal(loaded[0].weight, saved["module.0.weight"])
    with pytest.raises(RuntimeError, match=r"other\.weight"):
        loaded.load_state_dict({**saved, "other.weight": torch.ones(1)})
