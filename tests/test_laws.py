"""The laws, by Hypothesis. `WORKBENCH_TEST_PROFILE=full` runs them by the thousand. Oracles: torch, safetensors."""

import re

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from safetensors import safe_open
from strategies import FLOATS, SAFETENSORS_DTYPES, TORCH_DTYPES, bits, leaves, names, same, state_dicts, tensors, training_trees, views

import workbench as wb
from workbench.errors import SelectionError, UnsupportedError

finite = st.floats(-1e6, 1e6, width=32)


def by_path(ckpt):
    return {ckpt.paths[name]: tensor for name, tensor in ckpt.items()}


def equal(a, b):
    return list(a) == list(b) and all(same(a[n].load(), b[n].load()) for n in a)


# saving


@given(tensors=state_dicts())
def test_a_saved_state_dict_reads_back_bit_for_bit_here_and_in_torch(tensors, tmp_path):
    source = wb.open(dict(tensors))
    wb.save(source, tmp_path / "out.pt")
    again, official = wb.open(tmp_path / "out.pt"), torch.load(tmp_path / "out.pt", weights_only=True)
    assert list(again) == list(source)
    assert list(official) == list(tensors)
    for name, tensor in tensors.items():
        assert same(official[name], tensor)
        assert official[name].stride() == tensor.stride()
    assert all(same(again[name].load(), source[name].load()) for name in source)


def require_same_sharing(tensors, folder):
    def shared(loaded):
        held = [t for t in loaded.values() if t.numel()]
        return [[a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() for b in held] for a in held]

    torch.save(dict(tensors), folder / "a.pt")
    wb.save(wb.open(folder / "a.pt"), folder / "b.pt")
    wb.save(dict(tensors), folder / "c.pt")
    expected = shared(torch.load(folder / "a.pt", weights_only=True))
    assert shared(torch.load(folder / "b.pt", weights_only=True)) == expected
    assert shared(torch.load(folder / "c.pt", weights_only=True)) == expected


@given(tensors=state_dicts(min_size=1))
def test_sharing_is_what_it_was(tensors, tmp_path):
    require_same_sharing(tensors, tmp_path)


def test_views_of_one_storage_still_share_it(tmp_path):
    base = torch.randn(6, 4)
    require_same_sharing(
        {"base": base, "t": base.t(), "tail": base[2:], "stepped": base[:, ::2], "row": base[3], "other": base.clone(), "tied": base},
        tmp_path,
    )


@given(tree=training_trees())
@example(tree={"config": {-9, 7}})  # which iterate as they were put in
def test_a_saved_tree_keeps_every_tensor_and_every_other_value(tree, tmp_path):
    torch.save(tree, tmp_path / "a.pt")
    source = wb.open(tmp_path / "a.pt")
    wb.save(source, tmp_path / "b.pt")
    again = wb.open(tmp_path / "b.pt")
    before, after = (torch.load(tmp_path / f"{x}.pt", weights_only=True) for x in "ab")
    assert [path for path, _ in leaves(before)] == [path for path, _ in leaves(after)]
    assert all(same(x, y) for (_, x), (_, y) in zip(leaves(before), leaves(after), strict=True))
    assert repr(_without_tensors(before)) == repr(_without_tensors(after))
    assert repr(_without_tensors(dict(again.extras))) == repr(_without_tensors(dict(source.extras)))


def _without_tensors(node):
    if isinstance(node, (set, frozenset)):  # whose order is no part of it
        return type(node).__name__, sorted(map(repr, node))
    if isinstance(node, torch.Tensor):
        return "tensor"
    if isinstance(node, dict):
        return type(node)((key, _without_tensors(child)) for key, child in node.items())
    return type(node)(map(_without_tensors, node)) if type(node) in (list, tuple) else node


@given(tensors=state_dicts(SAFETENSORS_DTYPES))
def test_a_saved_safetensors_file_reads_back_bit_for_bit_here_and_officially(tensors, tmp_path):
    try:
        wb.save(wb.open(dict(tensors)), tmp_path / "out.safetensors")
    except UnsupportedError:
        assert any(t.dtype == torch.float4_e2m1fn_x2 and not t.ndim for t in tensors.values())
        return
    again = wb.open(tmp_path / "out.safetensors")
    assert set(again) == set(tensors)
    assert all(same(again[name].load(), tensor) for name, tensor in tensors.items())
    with safe_open(tmp_path / "out.safetensors", "pt") as official:
        stored = official.keys()
        assert set(tensors) - set(stored) <= set(again.aliases)
        assert all(same(official.get_tensor(name), tensors[name]) for name in stored)


@given(tensors=state_dicts(SAFETENSORS_DTYPES))
def test_conversion_there_and_back_keeps_the_bits(tensors, tmp_path):
    assume(not any(t.dtype == torch.float4_e2m1fn_x2 and not t.ndim for t in tensors.values()))
    torch.save(dict(tensors), tmp_path / "a.pt")
    wb.save(wb.open(tmp_path / "a.pt"), tmp_path / "b.safetensors")
    wb.save(wb.open(tmp_path / "b.safetensors"), tmp_path / "c.pt")
    official = torch.load(tmp_path / "c.pt", weights_only=True)
    assert all(same(official[name], tensor) for name, tensor in tensors.items())


# selection and names


@given(tensors=state_dicts(FLOATS, min_size=1), data=st.data())
def test_select_and_drop_partition(tensors, data):
    ckpt = wb.open(dict(tensors))
    chosen = data.draw(st.lists(st.sampled_from(list(ckpt)), min_size=1, unique=True))
    try:
        kept, rest = ckpt.select(chosen), ckpt.drop(chosen)
    except SelectionError:
        assert any(name.startswith("re:") or "{" in name for name in chosen)
        return
    assert set(kept) | set(rest) == set(ckpt)
    assert not set(kept) & set(rest)
    assert set(chosen) <= set(kept)
    assert all(same(part[name].load(), tensors[name]) for part in (kept, rest) for name in part)


@given(tensors=state_dicts(FLOATS, min_size=1), data=st.data())
def test_rename_and_its_inverse_are_the_identity(tensors, data, tmp_path):
    ckpt = wb.open(dict(tensors))
    fresh = data.draw(st.lists(names, min_size=len(ckpt), max_size=len(ckpt), unique=True))
    there = dict(zip(ckpt, fresh, strict=True))
    back = {new: old for old, new in there.items()}
    renamed = wb.ops.rename(ckpt, there.__getitem__)
    assert list(renamed) == fresh
    assert all(same(renamed[new].load(), tensors[old]) for old, new in there.items())
    assert equal(wb.ops.rename(renamed, back.__getitem__), ckpt)


@given(tree=training_trees())
def test_replacing_a_section_by_itself_changes_nothing(tree):
    ckpt = wb.open(tree)
    for section in ckpt.sections():
        again = ckpt.with_section(section.path, ckpt.section(section.path))
        assert by_path(again).keys() == by_path(ckpt).keys()
        assert all(same(tensor.load(), by_path(ckpt)[path].load()) for path, tensor in by_path(again).items())


@given(tree=training_trees())
def test_an_op_on_a_tree_leaves_all_but_the_weights_alone(tree):
    ckpt = wb.open(tree)
    assume(len(ckpt.weights) and ckpt.weights_section.path and ckpt.weights_section.kind == "weights")
    result = wb.ops.add_prefix(ckpt, "module.")
    here = ckpt.weights_section.path
    assert list(result.weights) == [f"module.{n}" for n in ckpt.weights]
    untouched = {path: t for path, t in by_path(ckpt).items() if path[: len(here)] != here}
    assert all(same(by_path(result)[path].load(), t.load()) for path, t in untouched.items())
    assert repr(dict(result.extras)) == repr(dict(ckpt.extras))


# ops


def declared(result):
    """Every result is what its spec says, whole and in chunks."""
    for name, tensor in result.items():
        loaded = tensor.load()
        assert (tuple(loaded.shape), str(loaded.dtype)) == (tensor.shape, f"torch.{tensor.dtype}"), name
        assert b"".join(bits(chunk) for _, chunk in tensor.chunks(32)) == bits(loaded), name
        assert bits(tensor.read(0, tensor.numel)) == bits(loaded), name


@given(tensors=state_dicts(FLOATS, min_size=1), dtype=st.sampled_from([*FLOATS, torch.float8_e4m3fn, torch.float8_e5m2]))
def test_cast_is_torch_to(tensors, dtype):
    result = wb.ops.cast(wb.open(dict(tensors)), dtype, overflow="allow")
    declared(result)
    for name, tensor in tensors.items():  # which bits a NaN keeps is not torch's own to say: its vector and scalar paths differ
        found, expected = (t if t.dtype == torch.float64 else t.float() for t in (result[name].load(), tensor.to(dtype)))
        nan = expected.isnan()
        assert torch.equal(found.isnan(), nan)
        assert same(found[~nan], expected[~nan])


@given(tensor=views(FLOATS), dtype=st.sampled_from([*FLOATS, torch.float8_e5m2]))
def test_cast_raises_exactly_when_a_finite_value_stops_being_finite(tensor, dtype):
    lazy = wb.ops.cast(wb.open({"x": tensor}), dtype)["x"]
    lost = torch.isfinite(tensor) & ~torch.isfinite(tensor.to(dtype).double())
    if lost.any():
        with pytest.raises(SelectionError, match="does not fit"):
            lazy.load()
    else:
        assert same(lazy.load(), tensor.to(dtype))


@st.composite
def weights(draw):
    """Finite floating tensors of one to three dimensions, ties and zeros among the values, in any memory order."""
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    values = draw(st.lists(st.one_of(st.sampled_from([0.0, -0.0, 1.0, -1.0]), finite), min_size=1, max_size=12))
    numel = torch.Size(shape).numel()
    tensor = torch.tensor((values * numel)[:numel], dtype=draw(st.sampled_from(FLOATS))).reshape(shape)
    tensor = tensor.transpose(0, -1) if draw(st.booleans()) else tensor
    assume(torch.isfinite(tensor).all())
    return tensor


@given(tensor=weights(), scale=st.sampled_from([1.0, 1e-38, 1e-44, 1e30]))
def test_quantize_stays_within_its_bound(tensor, scale):
    """|x - q * scale| <= scale / 2, and a hair for the rounding of the quotient and of the scale itself."""
    tensor = tensor * scale
    assume(torch.isfinite(tensor).all())
    result = wb.ops.quantize(wb.open({"w": tensor}), names="w")
    declared(result)
    q, s = result["w"].load().double(), result["w_scale"].load().double()
    assert result["w"].dtype.name == "int8"
    assert q.abs().max() <= 127
    assert torch.isfinite(s).all()
    per_element = s.reshape(-1, *[1] * (tensor.ndim - 1)) if tensor.ndim >= 2 else s
    assert ((tensor.double() - q * per_element).abs() <= per_element / 2 + per_element * 127 * 2.0**-23).all()
    restored = wb.ops.dequantize(result)
    assert list(restored) == ["w"]
    assert torch.allclose(restored["w"].load().double(), q * per_element, rtol=1e-6, atol=0)


@given(tensor=weights(), amount=st.floats(0, 1, exclude_max=True))
def test_pruning_zeroes_exactly_the_smallest_and_keeps_the_lower_index_of_ties(tensor, amount):
    result = wb.ops.prune(wb.open({"w": tensor}), amount, names="*")
    declared(result)
    flat, pruned = tensor.reshape(-1), result["w"].load().reshape(-1)
    count = round(amount * flat.numel())
    order = sorted(range(flat.numel()), key=lambda i: (abs(flat[i].item()), -i))
    expected = flat.clone()
    expected[order[:count]] = 0
    assert bits(pruned) == bits(expected)


@given(tensors=state_dicts(FLOATS, min_size=1))
def test_ops_keep_ties_tied(tensors, tmp_path):
    ckpt = wb.open(dict(tensors))
    result = wb.ops.cast(ckpt, "float64", overflow="allow")
    assert result.aliases == ckpt.aliases
    wb.save(result, tmp_path / "tied.pt")
    assert wb.open(tmp_path / "tied.pt").aliases == ckpt.aliases


# reports


@given(tensors=state_dicts(TORCH_DTYPES))
def test_a_checkpoint_does_not_differ_from_itself(tensors, tmp_path):
    torch.save(dict(tensors), tmp_path / "a.pt")
    report = wb.diff(wb.open(tmp_path / "a.pt"), wb.open(tmp_path / "a.pt"))
    assert report
    assert report.counts["equal"] == len(tensors)
    assert wb.diff(wb.open(dict(tensors)), wb.open(tmp_path / "a.pt"))


@given(tensor=views(FLOATS).filter(lambda t: t.numel() > 0), data=st.data())
def test_one_changed_element_is_found(tensor, data):
    at = data.draw(st.integers(0, tensor.numel() - 1))
    changed = tensor.clone(memory_format=torch.contiguous_format).reshape(-1)
    changed[at] = 1.0 if changed[at] != 1.0 else 2.0
    report = wb.diff({"x": tensor}, {"x": changed.reshape(tensor.shape)})
    assert not report
    assert report.rows[0].status == "changed"
    assert report.rows[0].changed * tensor.numel() == pytest.approx(1)


@given(tensors=state_dicts(FLOATS, min_size=1))
def test_text_and_html_of_a_report_show_the_same_tables(tensors):
    ckpt = wb.open(dict(tensors))
    for report in (wb.stats(ckpt), wb.ledger(ckpt), wb.diff(ckpt, ckpt)):
        text, html = str(report), report._repr_html_()
        for table in report.tables():
            assert table.title in text
            assert table.title in re.sub(r"<[^>]*>", "", html)


@given(tensor=tensors(FLOATS))
def test_stats_count_every_element_once(tensor):
    row = wb.stats({"x": tensor}).rows[0]
    values = tensor.double()
    finite_values = values[torch.isfinite(values)]
    assert (row.nan, row.inf, row.zeros) == (int(values.isnan().sum()), int(values.isinf().sum()), int((values == 0).sum()))
    assert sum(row.counts) == (finite_values.numel() if row.counts else 0)
    if finite_values.numel():
        assert (row.min, row.max) == (finite_values.min().item(), finite_values.max().item())
        if finite_values.abs().max() < 1e150:
            assert row.mean == pytest.approx(finite_values.mean().item(), rel=1e-9, abs=1e-300)
            assert row.std == pytest.approx(finite_values.std(correction=0).item(), rel=1e-6, abs=1e-150)
