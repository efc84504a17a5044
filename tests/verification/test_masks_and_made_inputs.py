"""Padded positions stay out of a comparison, and inputs are made beyond those given."""

import copy
import math

import pytest
import torch
from torch import nn

from workbench.errors import SelectionError
from workbench.verification.comparison import parity
from workbench.verification.measures import Meter
from workbench.verification.tolerance import noise_floor
from workbench.verification.values import Call
from workbench.verification.variations import corners, sizes


class Padded(nn.Module):
    """Fills padded positions with `filler`; the rest is the same whatever it is."""

    def __init__(self, filler):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.filler = nn.Linear(6, 9), filler

    def forward(self, x, attention_mask):
        y = self.fc(x).masked_fill(attention_mask[..., None] == 0, self.filler)
        return {"logits": y, "pooled": (y * attention_mask[..., None]).nan_to_num().sum(1)}


@pytest.fixture
def padded():
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    return {"x": torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(1)), "attention_mask": mask}


@pytest.mark.parametrize("filler", [3.0, math.nan])
@pytest.mark.parametrize("how", ["name", "tensor", "function", "by output"])
def test_padding_is_left_out_and_told(padded, filler, how):
    mask = {
        "name": "attention_mask",
        "tensor": padded["attention_mask"].bool(),
        "function": lambda x, attention_mask: attention_mask,
        "by output": {"logits": "attention_mask"},
    }[how]
    plain = parity(Padded(0.0), Padded(filler), padded)
    assert not plain
    report = parity(Padded(0.0), Padded(filler), padded, mask=mask)
    assert report
    logits, pooled = report.outputs
    assert logits.figures.masked == 72  # 4 positions × 9 classes × 2 calls
    assert "36 padded values of 72" in logits.note
    assert pooled.figures.masked == 0
    assert logits.figures.max_abs == 0


def test_a_mask_hides_nothing_that_counts(padded):
    wrong = Padded(5.0)
    with torch.no_grad():
        wrong.fc.bias[3] += 1e-3
    report = parity(Padded(0.0), wrong, padded, mask="attention_mask")
    assert not report
    assert report.outputs[0].figures.max_abs == pytest.approx(1e-3, rel=1e-2)
    assert ", 3]: " in report.outputs[0].figures.worst


def test_padding_does_not_loosen_the_limit(padded):
    class Loud(Padded):
        def forward(self, x, attention_mask):
            return self.fc(x) * torch.where(attention_mask[..., None] == 0, 1e6, 1.0)

    wrong = Loud(0.0)
    with torch.no_grad():
        wrong.fc.bias[3] += 1e-4
    assert not parity(Loud(0.0), wrong, padded, mask="attention_mask")


def test_the_worst_place_is_named_in_the_whole_output():
    a = torch.zeros(2, 3, 2)
    b = a.clone()
    b[1, 2, 1] = 4.0
    b[0, 0, 0] = 9.0
    keep = torch.ones(2, 3, 2, dtype=torch.bool)
    keep[0, 0] = False
    meter = Meter()
    meter.add(a, b, keep=keep)
    f = meter.figures()
    assert (f.worst, f.count, f.masked, f.unequal, f.max_abs) == ("[1, 2, 1]: 4 against 0", 10, 2, 1, 4.0)
    wide = Meter()
    wide.add(torch.complex(a, a), torch.complex(b, a), keep=keep)
    assert (wide.figures().worst, wide.figures().masked) == ("[1, 2, 1]: 4 against 0", 2)


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        ("padding", "no input 'padding'"),
        ({"scores": "attention_mask"}, "no output 'scores'"),
        (torch.ones(5, 5), "no output begins with that shape"),
        ({"pooled": torch.ones(2, 4)}, "that output is \\[2, 9\\]"),
        (torch.tensor([[0.0, -1e9], [1.0, 0.0]]), "True or 1 where an output counts"),
    ],
)
def test_a_mask_that_fits_nothing_is_refused(padded, mask, words):
    with pytest.raises(SelectionError, match=words):
        parity(Padded(0.0), Padded(0.0), padded, mask=mask)


def test_a_mask_that_leaves_nothing_proves_nothing(padded):
    report = parity(Padded(0.0), Padded(0.0), padded, mask={"logits": torch.zeros(2, 4)})
    assert not report
    assert "the mask leaves none" in report.headline


def test_corners_keep_shape_dtype_and_range():
    call = Call((torch.randn(2, 3), torch.tensor([5, 7, 4])), {"flag": torch.tensor([True, False]), "n": 4})
    made = corners(call)
    assert list(made) == ["random", "zeros", "ones", "large", "tiny"]
    for other in made.values():
        for path, tensor in other.tensors().items():
            assert (tensor.shape, tensor.dtype) == (call.tensors()[path].shape, call.tensors()[path].dtype)
        assert 4 <= int(other.args[1].min()) <= int(other.args[1].max()) <= 7
        assert other.kwargs["n"] == 4
    assert made["zeros"].args[0].abs().max() == 0
    assert made["ones"].args[0].unique().tolist() == [1.0]
    assert made["large"].args[0].abs().max() == pytest.approx(1000 * float(call.args[0].abs().max()))
    assert torch.equal(made["random"].args[0], corners(call)["random"].args[0])


def test_sizes_follow_the_axes_that_are_shared():
    call = Call((torch.zeros(2, 5, 3), torch.zeros(2, 5)), {"bias": torch.zeros(7)})
    found = {name: [tuple(t.shape) for t in other.tensors().values()] for name, other in sizes(call).items()}
    assert found == {"batch + 1": [(3, 5, 3), (3, 5), (7,)], "length + 1": [(2, 6, 3), (2, 6), (7,)]}


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(6, 9)

    def forward(self, x):
        return self.fc(x) if x.sum() > 0 else self.fc(x).relu()


def test_made_inputs_find_what_the_given_ones_hide():
    x = torch.rand(3, 6) + 0.1
    baked = Branching().fc
    assert parity(Branching(), baked, x)
    report = parity(Branching(), baked, x, vary=True)
    assert not report
    assert [t.inputs for t in report.tried if not t.ok] == ["zeros"]
    assert "on zeros inputs `output` differs" in report.headline
    assert parity(Branching(), Branching(), x, vary=True)
    assert "made inputs" in [t.title for t in report.tables()]


def test_sizes_that_a_candidate_does_not_take_are_told_and_not_judged():
    x, fc = torch.randn(3, 6), Branching().fc

    def fixed(x):
        if x.shape[0] != 3 or not bool(x.abs().max() > 0):
            raise ValueError("three rows, not all zero")
        return fc(x)

    report = parity(Branching().fc, fixed, x, vary=True)
    assert not report
    assert "failed on zeros inputs (ValueError" in report.headline
    report = parity(Branching().fc, lambda x: fixed(x + 1e-30), x, vary=True)
    assert report
    left_out = {t.inputs: t.left_out for t in report.tried if t.left_out}
    assert list(left_out) == ["batch + 1", "length + 1"]
    assert "three rows" in left_out["batch + 1"]


def test_made_inputs_on_which_the_reference_breaks_prove_nothing():
    class Root(nn.Module):
        def forward(self, x):
            if float(x.max()) > 100:
                raise ValueError("too large")
            return 1 / x

    report = parity(Root(), lambda x: 1 / x, torch.rand(2, 3) + 1, vary=True)
    assert report
    left_out = {t.inputs: t.left_out for t in report.tried if t.left_out}
    assert "NaN or infinity" in left_out["zeros"]
    assert "too large" in left_out["large"]


def test_each_batch_is_judged_by_its_own_size():
    """A large batch beside a small one does not hide what the small one shows."""
    x = torch.randn(40, 6)
    model = Branching().fc
    wrong = copy.deepcopy(model)
    with torch.no_grad():
        wrong.bias[0] += 1e-3
    assert not parity(model, wrong, [x, 1e6 * x])


class Reduced(nn.Module):
    """Its float64 twin answers as it does; only another order of its sum moves it."""

    def forward(self, x):
        return x.float().sum(1).to(x.dtype)


def test_the_floor_is_the_larger_of_float64_and_reversed_sums():
    torch.manual_seed(0)
    x = 100 * torch.randn(300, 1000)
    output = parity(Reduced(), Reduced(), x).outputs[0]
    assert "by which summing in reverse order, halved, moves the reference" in output.reason
    moved = float((x.sum(1) - x.flip(1).sum(1)).abs().max())
    assert output.limit == pytest.approx(4 * moved, rel=0.5)
    assert parity(Reduced(), lambda x: x.flip(1).sum(1), x)


def test_reversing_gives_settings_back():
    layer = nn.TransformerEncoderLayer(8, 2, batch_first=True)
    with noise_floor(layer) as floor, torch.no_grad():
        call = Call((torch.randn(2, 3, 8),))
        floor.add(call, {"output": layer.eval()(*call.args)})
        seen = floor._given["output"][""]
    assert seen.reordered.far[0] > 0
    assert torch._C._get_mkldnn_enabled()
    assert torch.backends.mha.get_fastpath_enabled()


def test_whole_numbers_that_rounding_decides_are_left_out_and_told():
    class Threshold(nn.Module):
        def forward(self, x):
            return x[:, 0] + x[:, 1] + x[:, 2] > 0

    x = torch.tensor([[1e8, 1.0, -1e8], [1.0, 1.0, 1.0], [0.0, -1.0, 0.0]])  # the first is 0 in float32, 1 in float64
    report = parity(Threshold(), lambda x: x[:, 0] + x[:, 2] + x[:, 1] > 0, x)
    assert report
    assert report.outputs[0].note == "leaves out 1 value that the reference's own rounding decides"
    assert not parity(Threshold(), lambda x: x[:, 2] > 5, x)


def test_class_figures_against_torch():
    torch.manual_seed(0)
    a = torch.randn(30, 12)
    b = a + 0.5 * torch.randn(30, 12)
    meter = Meter()
    meter.add(a[:10], b[:10])
    meter.add(a[10:], b[10:])
    f = meter.figures()
    kl = nn.functional.kl_div(b.double().log_softmax(1), a.double().log_softmax(1), log_target=True, reduction="batchmean")
    assert f.kl == pytest.approx(float(kl), rel=1e-9)
    overlap = [len(set(p.topk(5).indices.tolist()) & set(q.topk(5).indices.tolist())) / 5 for p, q in zip(a, b, strict=True)]
    assert f.top5 == pytest.approx(sum(overlap) / 30)
    probabilities = Meter()
    probabilities.add(a.softmax(1), b.softmax(1))
    assert probabilities.figures().kl == pytest.approx(float(kl), rel=1e-4)
    few = Meter()
    few.add(a[:, :3], b[:, :3])
    assert few.figures().top5 is None
    assert few.figures().kl > 0


def test_class_figures_leave_padded_rows_out():
    a = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    b = a.clone()
    b[1, 2] = -a[1, 2]
    keep = torch.ones(2, 3, 8, dtype=torch.bool)
    for rows, agree in ((keep, 5 / 6), (keep.index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(False)), 1.0)):
        meter = Meter()
        meter.add(a, b, keep=rows)
        assert meter.figures().top1 == pytest.approx(agree)


def test_class_figures_where_classes_are_ruled_out_or_rows_are_not_numbers():
    a = torch.tensor([[0.0, 1.0, -math.inf], [math.nan, 0.0, 0.0], [-math.inf] * 3])
    meter = Meter()
    meter.add(a, a.clone())
    assert meter.figures().kl == 0
    assert meter.figures().top1 == 1


def test_figures_of_classes_are_shown():
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    report = parity(lambda x: x, lambda x: x + 0.1 * x.flip(1), x)
    (outputs, *_) = report.tables()
    row = dict(zip([c.title for c in outputs.columns], outputs.rows[0], strict=True))
    assert 0 < row["KL"] < 1
    assert 0 < row["top-5"] <= 1


def test_a_made_batch_of_which_the_mask_leaves_nothing_is_told_and_not_judged():
    model = nn.Linear(4, 3)
    report = parity(model, copy.deepcopy(model), torch.ones(5, 4), mask=lambda x: x.sum(1) > 0, vary=True)
    assert report
    assert {trial.inputs: trial.left_out for trial in report.tried}["zeros"] == "the mask leaves nothing of them"
