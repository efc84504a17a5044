"""load_into where the model has a say of its own: hooks, overrides, computed state, extra state, ties, shared memory.

The oracle is always what torch's own load_state_dict makes of the same file.
"""

import warnings

import pytest
import torch
from torch import nn

import workbench as wb
from workbench.errors import SelectionError, SpecMismatchError, UnsupportedError
from workbench.keymap.maps import KeyMap, Pair


class Transposing(nn.Linear):
    """Stores its weight the other way round than it saves it."""

    def _load_from_state_dict(self, state_dict, prefix, *args):
        state_dict[prefix + "weight"] = state_dict[prefix + "weight"].t().contiguous()
        super()._load_from_state_dict(state_dict, prefix, *args)


class Versioned(nn.Linear):
    """Transposes files of before version 2, as torch's own layers convert old formats."""

    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, metadata, *args):
        if metadata.get("version") is None or metadata["version"] < 2:
            state_dict[prefix + "weight"] = state_dict[prefix + "weight"].t().contiguous()
        super()._load_from_state_dict(state_dict, prefix, metadata, *args)


class Copying(nn.Linear):
    """Its state dict holds copies, never the live tensors."""

    def state_dict(self, *args, **kwargs):
        return {name: value.clone() for name, value in super().state_dict(*args, **kwargs).items()}


class Extra(nn.Linear):
    """Keeps something beside its tensors."""

    extra = None

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


def as_torch_loads(model, path):
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.state_dict()


def test_values_changed_by_the_models_own_code_stay_changed_and_are_not_called_proven(tmp_path):
    torch.save(nn.Linear(3, 3).state_dict(), tmp_path / "plain.pt")
    model = Transposing(3, 3)
    certificate = wb.load_into(model, tmp_path / "plain.pt")
    assert torch.equal(model.weight, as_torch_loads(Transposing(3, 3), tmp_path / "plain.pt")["weight"])
    assert not certificate


def test_version_conversions_see_the_files_versions_under_a_prefix(tmp_path):
    saved = nn.Sequential(Versioned(3, 3))
    torch.save(nn.DataParallel(saved).state_dict(), tmp_path / "wrapped.pt")
    model = nn.Sequential(Versioned(3, 3))
    assert wb.load_into(model, tmp_path / "wrapped.pt")
    assert torch.equal(model[0].weight, saved[0].weight)


def test_a_state_dict_of_copies_is_loaded_for_real():
    saved, model = nn.Linear(2, 2), Copying(2, 2)
    assert wb.load_into(model, saved)
    assert torch.equal(model.weight, saved.weight)


def test_a_method_patched_onto_one_object_is_seen():
    saved, model = nn.Linear(2, 2), nn.Linear(2, 2)
    inherited = model._load_from_state_dict

    def doubling(state_dict, prefix, *args):
        state_dict[prefix + "weight"] = 2 * state_dict[prefix + "weight"]
        inherited(state_dict, prefix, *args)

    model._load_from_state_dict = doubling
    assert not wb.load_into(model, saved)
    assert torch.equal(model.weight, 2 * saved.weight)


def test_an_overflow_is_found_behind_a_hook_too():
    saved, model = nn.Linear(2, 2), nn.Linear(2, 2).half()
    saved.weight.data[0, 0] = 1e6
    model.register_load_state_dict_post_hook(lambda module, keys: None)
    certificate = wb.load_into(model, saved)
    assert torch.isinf(model.weight[0, 0])
    assert not certificate


@pytest.mark.parametrize(
    ("stored", "held"), [(torch.tensor([2**40 + 5, 3]), torch.int32), (torch.tensor([200], dtype=torch.uint8), torch.int8)]
)
def test_whole_numbers_that_wrap_are_not_called_equal(stored, held):
    model = nn.Module()
    model.register_buffer("count", torch.zeros(stored.shape, dtype=held))
    keymap = KeyMap((Pair.plain("count", "count", "same name", "certain", ""),))
    assert not wb.load_into(model, {"count": stored}, keymap)


@pytest.mark.parametrize("extra", [{"v": 7}, {1: {"a": [1, (2, 3)]}, "s": {1, 2}, "d": {(1, 2): 3}}])
@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel])
def test_extra_state_arrives_as_it_was(extra, wrap, tmp_path):
    saved, model = Extra(2, 2), Extra(2, 2)
    saved.extra = extra
    torch.save(wrap(saved).state_dict(), tmp_path / "extra.pt")
    assert wb.load_into(model, tmp_path / "extra.pt")
    assert model.extra == extra


def test_extra_state_of_a_strange_class_is_missed_and_not_made_up():
    saved = Extra(2, 2)
    saved.extra = nn.ReLU
    with pytest.raises(SpecMismatchError, match="_extra_state"):
        wb.load_into(Extra(2, 2), saved)


def test_old_weight_norm_names_are_converted_by_torch_itself():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        old = nn.utils.weight_norm(nn.Linear(3, 3))
    model = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    assert wb.load_into(model, old)
    assert torch.allclose(model.weight, old.weight)


def test_sources_that_view_the_model_do_not_change_under_the_copy():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    first, second = model[0].weight.clone(), model[1].weight.clone()
    swapped = {"0.weight": model[1].weight, "0.bias": model[1].bias, "1.weight": model[0].weight, "1.bias": model[0].bias}
    assert wb.load_into(model, swapped)
    assert torch.equal(model[0].weight, second)
    assert torch.equal(model[1].weight, first)


def test_a_tied_name_that_the_file_leaves_out_counts_as_loaded():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    certificate = wb.load_into(model, {"embed.weight": torch.ones(5, 4)})
    assert certificate
    assert certificate.coverage == 1


@pytest.mark.parametrize("make", [lambda: nn.LazyLinear(2), lambda: nn.Linear(2, 2, device="meta")])
def test_a_model_without_values_is_refused(make):
    with pytest.raises(UnsupportedError):
        wb.load_into(make(), nn.Linear(2, 2))


def test_an_expanded_parameter_is_refused_before_anything_is_copied():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = nn.Parameter(torch.ones(1, 3).expand(3, 3))
    before = model[0].weight.clone()
    with pytest.raises(UnsupportedError, match="expanded"):
        wb.load_into(model, nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))
    assert torch.equal(model[0].weight, before)


def test_two_sections_that_fit_equally_are_not_chosen_between():
    both = {"teacher": nn.Linear(2, 2).state_dict(), "student": nn.Linear(2, 2).state_dict()}
    with pytest.raises(SelectionError, match="student"):
        wb.load_into(nn.Linear(2, 2), both)
    with pytest.raises(SelectionError, match="student"):
        wb.ops.cast(wb.open(both), "float16")
    assert wb.load_into(nn.Linear(2, 2), wb.open(both).section("student"))
    assert not wb.match(both, nn.Linear(2, 2))


def test_a_change_of_names_that_is_only_a_reading_is_never_certain():
    def block():
        return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))

    source = nn.ModuleDict({"encoder": block(), "momentum_encoder": block()})
    target = nn.ModuleDict({"encoder": block(), "decoder": block()})
    assert not [p for p in wb.match(source, target).pairs if p.confidence == "certain" and p.source != p.target]
    shifted = wb.match({f"layers.{i}.weight": torch.ones(2) for i in range(3)}, {f"layers.{i}.weight": (2,) for i in (1, 2, 3)})
    assert not [p for p in shifted.pairs if p.confidence == "certain" and p.source != p.target]
