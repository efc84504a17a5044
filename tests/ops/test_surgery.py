"""Shape surgery and wrapper names, against torch."""

import pytest
import torch
from strategies import same
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import workbench as wb
from workbench.errors import BudgetError, SelectionError


def model(classes=5):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.Flatten(), torch.nn.Linear(16, classes))


def test_what_fits_is_selected_and_the_rest_is_named():
    kept = wb.ops.select_fitting(wb.open(model(5)), model(7))
    assert list(kept) == [name for name in model().state_dict() if not name.startswith("3.")]
    assert kept.history[-1].params["left_out"] == ["3.weight", "3.bias"]
    assert model(7).load_state_dict({n: t.load() for n, t in kept.items()}, strict=False).missing_keys == ["3.weight", "3.bias"]
    rivals = {"teacher": model(7).state_dict(), "student": model(7).state_dict()}
    for ckpt, target in (({"w": torch.ones(2)}, {"w": torch.ones(3)}), (model(5), rivals)):
        with pytest.raises(SelectionError):
            wb.ops.select_fitting(wb.open(ckpt), target)


def test_a_training_checkpoint_keeps_its_epoch_when_its_weights_are_selected(tmp_path):
    torch.save({"model": model(5).state_dict(), "epoch": 3}, tmp_path / "t.pt")
    kept = wb.ops.select_fitting(wb.open(tmp_path / "t.pt"), model(7))
    assert kept.extras["epoch"] == 3
    assert "model.3.weight" not in kept


@pytest.mark.parametrize("init", ["zeros", "mean", "normal"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_head_gets_fresh_rows_and_loads(init, dtype, tmp_path):
    old = model(5).to(dtype).state_dict()
    result = wb.ops.swap_head(wb.open(old), "3.*", 9, init=init, std=0.1, seed=4)
    wb.save(result, tmp_path / "new.pt")
    new = torch.load(tmp_path / "new.pt", weights_only=True)
    model(9).to(dtype).load_state_dict(new)
    if init == "zeros":
        assert not new["3.weight"].any()
        assert not new["3.bias"].any()
    elif init == "mean":
        for name in ("3.weight", "3.bias"):
            mean = (old[name] if dtype is torch.float64 else old[name].float()).mean(0).to(dtype)
            assert all(torch.allclose(row, mean) for row in new[name])
    else:
        assert 0.05 < float(new["3.weight"].float().std()) < 0.15
        assert not new["3.bias"].any()
        assert same(new["3.weight"], wb.ops.swap_head(wb.open(old), "3.*", 9, init=init, std=0.1, seed=4)["3.weight"].load())
        assert not torch.equal(new["3.weight"], wb.ops.swap_head(wb.open(old), "3.*", 9, init=init, std=0.1, seed=5)["3.weight"].load())
    assert all(same(new[n], old[n]) for n in old if not n.startswith("3."))


def test_history_says_what_a_head_was():
    step = wb.ops.swap_head(wb.open(model(5)), "3.*", 9).history[-1]
    assert (step.op, step.params["was"], step.params["num_classes"]) == ("swap_head", {"3.weight": [5, 16], "3.bias": [5]}, 9)


def test_vocabulary_rows_are_kept_added_and_cut_and_ties_stay(tmp_path):
    table = torch.randn(10, 4).half()
    torch.save({"wte": table, "head": table, "other": torch.ones(10)}, tmp_path / "v.pt")
    for rows in (13, 10, 6):
        result = wb.ops.resize_rows(wb.open(tmp_path / "v.pt"), ["wte", "head"], rows)
        assert result.aliases == {"head": "wte"}
        new = result["wte"].load()
        kept = min(rows, 10)
        assert same(new[:kept], table[:kept])
        assert all(torch.allclose(row, table.float().mean(0).half(), atol=1e-3) for row in new[kept:])
        assert result["other"].shape == (10,)
        wb.save(result, tmp_path / "out.pt")
        assert same(torch.load(tmp_path / "out.pt", weights_only=True)["head"], new)


def test_a_vocabulary_too_large_to_hold_is_refused_within_its_budget_and_cut_in_blocks(tmp_path):
    torch.save({"wte": torch.ones(3000, 2000)}, tmp_path / "v.pt")  # 24 MB
    wb.save(wb.ops.resize_rows(wb.open(tmp_path / "v.pt"), "wte", 2999), tmp_path / "cut.pt", max_ram_mb=16)
    with pytest.raises(BudgetError):
        wb.save(wb.ops.resize_rows(wb.open(tmp_path / "v.pt"), "wte", 3001), tmp_path / "grown.pt", max_ram_mb=16)


@pytest.mark.parametrize(
    ("names", "rows", "init"), [("*", 4, "zeros"), ("3.*", 0, "zeros"), ("3.*", 4, "ones"), ("nope", 4, "zeros"), ("*batches*", 4, "zeros")]
)
def test_rows_that_cannot_be_are_refused(names, rows, init):
    with pytest.raises(SelectionError):
        wb.ops.swap_head(wb.open(model()), names, rows, init=init)


@pytest.mark.parametrize(
    "make",
    [
        lambda: wb.ops.swap_head(wb.open({"w": torch.ones(0, 2)}), "w", 2, init="mean"),
        lambda: wb.ops.swap_head(wb.open(model()), "3.*", 10.0),
        lambda: wb.ops.adapt_input_channels(wb.open(model()), "0.weight", 4.0),
        lambda: wb.ops.resize_position_embedding(wb.open({"p": torch.ones(1, 16, 2)}), "p", 4.0, prefix_tokens=0),
        lambda: wb.ops.resize_position_embedding(wb.open({"p": torch.ones(1, 16, 0)}), "p", 4, prefix_tokens=0),
    ],
    ids=["a mean of no rows", "10.0 rows", "4.0 channels", "4.0 positions", "positions of no width"],
)
def test_sizes_that_are_none_are_refused_at_once(make):
    with pytest.raises(SelectionError):
        make()


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda w: wb.ops.adapt_input_channels(w, "w", 1), (1, 3, 1, 1)),
        (lambda w: wb.ops.adapt_input_channels(w, "w", 2), (1, 3, 1, 1)),
        (lambda w: wb.ops.resize_position_embedding(w, "w", (7, 7), prefix_tokens=0), (1, 4, 2)),
        (lambda w: wb.ops.swap_head(w, "w", 2, init="normal", std=1e6), (3, 2)),
    ],
    ids=["channels summed", "channels rescaled", "positions", "normal rows"],
)
def test_a_sum_that_does_not_fit_is_refused_and_an_infinity_stays(make, shape):
    values = torch.full(shape, 65504.0).half()
    if values.ndim == 3:  # bicubic shoots over an edge
        values[:, 1:3] = 0
    with pytest.raises(SelectionError, match="does not fit float16"):
        make(wb.open({"w": values}))["w"].load()
    if values.ndim == 4:
        values[:] = float("inf")
        assert make(wb.open({"w": values}))["w"].load().isinf().all()


def test_an_optimizer_beside_changed_shapes_and_ended_ties_are_told():
    net = torch.nn.Linear(2, 4)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    tree = wb.open({"model": net.state_dict(), "optimizer": optimizer.state_dict()})
    (finding,) = wb.ops.resize_rows(tree, ["weight", "bias"], 6).findings
    assert (finding.kind, finding.where["tensor"]) == ("moments left", "weight")
    assert not wb.ops.cast(tree, "float64").findings
    assert not wb.ops.resize_rows(wb.open(net), ["weight", "bias"], 6).findings
    shared = torch.ones(4, 2)
    tied = wb.open({"wte": shared, "head": shared})
    assert not wb.ops.resize_rows(tied, ["wte", "head"], 5).findings
    assert [(f.kind, f.where["tensor"]) for f in wb.ops.swap_head(tied, "head", 5).findings] == [("tie ended", "head")]


def resampled(positions, old, new, prefix, mode, antialias):
    """As timm.layers.resample_abs_pos_embed does it."""
    kept, grid = positions[:, :prefix], positions[:, prefix:].float()
    grid = grid.reshape(1, *old, -1).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, size=new, mode=mode, antialias=antialias)
    return torch.cat([kept, grid.permute(0, 2, 3, 1).reshape(1, new[0] * new[1], -1).to(positions.dtype)], 1)


@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize(("old", "new", "prefix"), [((4, 4), (6, 6), 1), ((4, 4), (3, 5), 0), ((2, 8), (4, 4), 2)])
def test_position_embeddings_are_interpolated_on_their_grid(old, new, prefix, mode, antialias, tmp_path):
    positions = torch.randn(1, prefix + old[0] * old[1], 6).to(torch.bfloat16)
    options = {"prefix_tokens": prefix, "old_grid": None if old[0] == old[1] else old, "mode": mode, "antialias": antialias}
    expected = resampled(positions, old, new, prefix, mode, antialias)
    wb.save(wb.ops.resize_position_embedding(wb.open({"pos_embed": positions}), "pos_embed", new, **options), tmp_path / "p.pt")
    assert same(torch.load(tmp_path / "p.pt", weights_only=True)["pos_embed"], expected)
    flat = wb.ops.resize_position_embedding(wb.open({"e.weight": positions[0]}), "e.weight", new, **options)
    assert same(flat["e.weight"].load(), expected[0])


def test_a_line_of_positions_is_interpolated_along_itself():
    line = torch.arange(8.0)[:, None].expand(8, 3).contiguous()
    longer = wb.ops.resize_position_embedding(wb.open({"wpe": line}), "wpe", 16, prefix_tokens=0, mode="bilinear", antialias=False)[
        "wpe"
    ].load()
    assert torch.allclose(longer, torch.nn.functional.interpolate(line.T[None], size=16, mode="linear")[0].T, atol=1e-6)


def test_an_interpolation_that_needs_more_than_the_budget_is_refused(tmp_path):
    ckpt = wb.ops.resize_position_embedding(wb.open({"p": torch.zeros(1, 64 * 64, 512)}), "p", (8, 8), prefix_tokens=0)
    with pytest.raises(BudgetError):
        wb.save(ckpt, tmp_path / "p.pt", max_ram_mb=16)


@pytest.mark.parametrize(
    ("shape", "size", "options"),
    [((1, 17, 4), (6, 6), {"prefix_tokens": 0}), ((2, 17, 4), (6, 6), {}), ((17,), (6, 6), {}), ((1, 17, 4), (0, 6), {}), ((1, 17, 4), (6, 6), {"old_grid": (2, 7)}),
     ((1, 17, 4), (6, 6), {"mode": "nearest"}), ((1, 1, 4), (6, 6), {})],
)  # fmt: skip
def test_positions_that_are_no_grid_are_refused(shape, size, options):
    with pytest.raises(SelectionError):
        wb.ops.resize_position_embedding(wb.open({"p": torch.ones(shape)}), "p", size, **options)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6, 7])
@pytest.mark.parametrize("shape", [(5, 3, 3, 3), (5, 3, 7), (2, 3, 2, 2, 2)], ids=str)
def test_input_channels_are_summed_or_repeated_and_rescaled(channels, shape):
    weight = torch.randn(shape).half()
    result = wb.ops.adapt_input_channels(wb.open({"conv.weight": weight, "b": torch.ones(3)}), "conv.weight", channels)[
        "conv.weight"
    ].load()
    wide = weight.float()
    expected = wide.sum(1, keepdim=True) if channels == 1 else torch.stack([wide[:, c % 3] for c in range(channels)], 1) * (3 / channels)
    assert same(result, weight if channels == 3 else expected.half())


def test_a_grey_picture_gets_the_answer_of_three_equal_channels():
    conv = torch.nn.Conv2d(3, 4, 3)
    grey = torch.randn(2, 1, 8, 8)
    adapted = torch.nn.Conv2d(1, 4, 3)
    adapted.load_state_dict({n: t.load() for n, t in wb.ops.adapt_input_channels(wb.open(conv), "weight", 1).items()})
    assert torch.allclose(adapted(grey), conv(grey.expand(2, 3, 8, 8)), atol=1e-5)


@pytest.mark.parametrize(("names", "channels"), [("3.weight", 1), ("0.weight", 0), ("0.bias", 4)])
def test_channels_that_cannot_be_are_refused(names, channels):
    with pytest.raises(SelectionError):
        wb.ops.adapt_input_channels(wb.open(model()), names, channels)


# wrapper names


def wrapped(kind, inner):
    return {"plain": lambda m: m, "DataParallel": torch.nn.DataParallel, "compile": torch.compile, "DDP of compile": lambda m: torch.nn.DataParallel(torch.compile(m))}[kind](inner)  # fmt: skip


KINDS = {"plain": [], "DataParallel": ["DDP"], "compile": ["compile"], "DDP of compile": ["compile", "DataParallel"]}


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("target", KINDS)
@pytest.mark.parametrize("source", KINDS)
def test_a_checkpoint_moves_between_any_two_wrappers(source, target, tmp_path):
    torch.save(wrapped(source, model()).state_dict(), tmp_path / "s.pt")
    ckpt = wb.ops.strip_wrappers(wb.open(tmp_path / "s.pt"))
    assert list(ckpt) == list(model().state_dict())
    for kind in KINDS[target]:
        ckpt = wb.ops.add_wrapper(ckpt, kind)
    wb.save(ckpt, tmp_path / "t.pt")
    moved, other = torch.load(tmp_path / "t.pt", weights_only=True), wrapped(target, model())
    assert other.load_state_dict(moved)
    own = other.state_dict()._metadata
    assert moved._metadata
    assert {name: own[name] for name in moved._metadata} == moved._metadata


def test_inner_wrappers_are_put_on_and_taken_off():
    blocks = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([torch.nn.Linear(2, 2) for _ in range(3)]), "head": torch.nn.Linear(2, 2)})
    plain = wb.open(blocks)
    put = wb.ops.add_wrapper(plain, "checkpoint", "blocks.{0-1}")
    for i in (0, 1):
        blocks["blocks"][i] = checkpoint_wrapper(blocks["blocks"][i])
    assert list(put) == [name for name, _ in blocks.named_parameters()]
    assert list(wb.ops.strip_wrappers(put)) == list(plain)
    assert list(wb.ops.strip_wrappers(wb.ops.add_wrapper(plain, "_fsdp_wrapped_module", "head"))) == list(plain)


def test_a_module_of_the_models_own_called_module_stays():
    inside = {"net.module.w": torch.ones(1), "head.w": torch.ones(1)}
    assert list(wb.ops.strip_wrappers(wb.open(inside))) == list(inside)
    partly = {"module.w": torch.ones(1), "head.w": torch.ones(1)}
    assert list(wb.ops.strip_wrappers(wb.open(partly))) == list(partly)
    averaged = torch.optim.swa_utils.AveragedModel(torch.nn.Linear(2, 2))
    assert list(wb.ops.strip_wrappers(wb.open(averaged))) == ["n_averaged", "weight", "bias"]


def test_a_wrapper_nobody_knows_is_refused():
    for kind, modules in (("Horovod", None), ("DDP", "blocks.*")):
        with pytest.raises(SelectionError):
            wb.ops.add_wrapper(wb.open(model()), kind, modules)
