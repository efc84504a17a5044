"""Each main failure says what was expected, what was found, where, and what to do next; never a raw control character."""

import json
import os
import pickle

import pytest
import torch
from hostile_makers import entry, pickled, safetensors, tensor, torch_zip

import workbench as wb
from workbench import errors


def missing(folder):
    wb.open(folder / "none.pt")


def unknown(folder):
    (folder / "x.pt").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(64))
    wb.open(folder / "x.pt")


def cut(folder):
    path = torch_zip(folder / "x.pt", pickled([("w", tensor())]))
    os.truncate(path, 300)
    wb.open(path)


def cut_safetensors(folder):
    path = safetensors(folder / "x.safetensors", {"layer.weight": entry(0, 40, (10,))}, bytes(8))
    wb.open(path)


def locked(folder):
    wb.open(torch_zip(folder / "x.pt", pickled([("w", tensor(numel=4, shape=(4,)))])))["w"].load()


def changed(folder):
    path = torch_zip(folder / "x.pt", pickled([("w", tensor())]))
    ckpt = wb.open(path)
    os.utime(path, ns=(1, 1))
    ckpt["w"].load()


def shard(folder):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "model-00001.safetensors"}}))
    wb.open(folder)


def mistyped(folder):
    wb.open({"layer.weight": torch.ones(1)})["layer.wieght"]


def nothing_selected(folder):
    wb.open({"layer.weight": torch.ones(1)}).select("layr.*")


def no_section(folder):
    wb.open({"model": {"w": torch.ones(1)}, "epoch": 3}).section("modle")


def unsafe(folder):
    wb.save(wb.open(torch_zip(folder / "x.pt", pickled([("w", tensor()), ("evil", b"cos\nsystem\n(tR")]))), folder / "y.pt")


def loses_values(folder):
    wb.save(wb.open({"model": {"w": torch.ones(1)}, "epoch": 3}), folder / "x.safetensors")


def no_such_type(folder):
    wb.save(wb.open({"w": torch.ones(1, dtype=torch.complex128)}), folder / "x.safetensors")


def unclear_format(folder):
    wb.save(wb.open({"w": torch.ones(1)}), folder / "x.weights")


def no_folder(folder):
    wb.save(wb.open({"w": torch.ones(1)}), folder / "none" / "x.pt")


def small_budget(folder):
    wb.save(wb.open({"w": torch.ones(1)}), folder / "x.pt", max_ram_mb=1)


def overflow(folder):
    wb.ops.cast(wb.open({"w": torch.tensor([1e6])}), "float16")["w"].load()


def not_floating(folder):
    wb.ops.cast(wb.open({"w": torch.ones(1)}), "int8")


def not_finite(folder):
    wb.save(wb.ops.quantize(wb.open({"w": torch.full((2, 2), float("nan"))})), folder / "x.pt")


def two_of_one_name(folder):
    wb.ops.rename(wb.open({"a": torch.ones(1), "b": torch.ones(1)}), {"a": "b"})


def no_container(folder):
    wb.open(3)


def remote(folder):
    wb.open("https://user:secret@127.0.0.1:9/x.pt?token=hidden")


def does_not_fit(folder):
    wb.load_into(torch.nn.Linear(2, 2), {"weight": torch.ones(3, 2), "bias": torch.ones(2)})


def failed_check(folder):
    wb.diff({"a": torch.ones(1)}, {"a": torch.zeros(1)}).check()


# (cause, class, words that must appear: what was found, where, what next)
CASES = [
    (missing, errors.MissingFileError, ["no such file", "none.pt", "check the path"]),
    (unknown, errors.UnknownFormatError, ["HDF5", "x.pt", "Keras"]),
    (cut, errors.CorruptFileError, ["cut", "x.pt"]),
    (cut_safetensors, errors.CorruptFileError, ["cut", "layer.weight", "x.safetensors"]),
    (locked, errors.CorruptFileError, ["locked", "16 bytes", "12", "in doubt"]),
    (changed, errors.FileChangedError, ["changed", "x.pt", "open it again"]),
    (shard, errors.MissingShardError, ["model-00001.safetensors", "1 of 1", "beside the others"]),
    (mistyped, errors.TensorNotFoundError, ["layer.wieght", "did you mean layer.weight?"]),
    (nothing_selected, errors.SelectionError, ["layr.*", "did you mean layer.weight?"]),
    (no_section, errors.SelectionError, ["modle", "model"]),
    (unsafe, errors.UntrustedError, ["os.system", 'unsafe="drop"']),
    (loses_values, errors.SelectionError, ["epoch", "ckpt.weights"]),
    (no_such_type, errors.UnsupportedError, ["complex128", "tensor w", ".pt"]),
    (unclear_format, errors.SelectionError, ["x.weights", ".safetensors"]),
    (no_folder, errors.WriteError, ["No such file", "none", "make the folder"]),
    (small_budget, errors.BudgetError, ["max_ram_mb=1", "16 MB"]),
    (overflow, errors.SelectionError, ["1e+06", "float16", "bfloat16"]),
    (not_floating, errors.SelectionError, ["int8", "quantize"]),
    (not_finite, errors.SelectionError, ["NaN", "exclude="]),
    (two_of_one_name, errors.SelectionError, ["'b'", "'a'"]),
    (no_container, errors.UnsupportedError, ["int", "nn.Module"]),
    (remote, errors.WorkbenchError, ["https"]),
    (does_not_fit, errors.SpecMismatchError, ["weight", "[3, 2]", "[2, 2]", "strict=False"]),
    (failed_check, errors.ReportFailedError, ["changed"]),
]


@pytest.mark.parametrize(("cause", "kind", "words"), CASES, ids=[cause.__name__ for cause, _, _ in CASES])
def test_the_message_says_what_where_and_what_next(cause, kind, words, tmp_path):
    with pytest.raises(kind) as caught:
        cause(tmp_path)
    shown = str(caught.value)
    assert [word for word in words if word not in shown] == [], shown
    assert all(c.isprintable() or c == "\n" for c in shown)
    assert "secret" not in shown
    assert "hidden" not in shown
    again = pickle.loads(pickle.dumps(caught.value))
    assert (type(again), str(again)) == (kind if type(caught.value) is kind else type(caught.value), shown)


def test_a_key_error_of_ours_reads_like_a_sentence():
    with pytest.raises(KeyError) as caught:
        mistyped(None)
    assert not str(caught.value).startswith("'")


EVIL = "\x1b[2J\x07\u202e\n\r\x00\x7f\x9b"


@pytest.mark.parametrize(
    "cause",
    [
        lambda folder: wb.open({"a": torch.ones(1)})[EVIL],
        lambda folder: wb.open({EVIL: torch.ones(1)}).select("nope"),
        lambda folder: wb.open(str(folder / EVIL.replace("\0", "")) + ".pt"),
        lambda folder: wb.open(safetensors(folder / "x.safetensors", {EVIL: entry(0, 40, (10,))}, bytes(8))),
        lambda folder: wb.open(safetensors(folder / "x.safetensors", {EVIL: entry(dtype=EVIL)}, bytes(4))),
        lambda folder: wb.save(wb.open(torch_zip(folder / "x.pt", pickled([("w", b"c\x1b[2J\nx\x07\n)R")]))), folder / "y.pt"),
        lambda folder: wb.open(torch_zip(folder / "x.pt", pickled([("w", tensor(EVIL))])))["w"].load(),
        lambda folder: wb.save(wb.open({EVIL: torch.ones(1, dtype=torch.complex128)}), folder / "x.safetensors"),
        lambda folder: wb.ops.rename(wb.open({EVIL: torch.ones(1), "b": torch.ones(1)}), {EVIL: "b"}),
        lambda folder: wb.load_into(torch.nn.Linear(1, 1), {EVIL: torch.ones(1)}),
        lambda folder: _sharded(folder, {EVIL: "gone" + EVIL.replace("\0", "") + ".safetensors"}),
    ],
    ids=["lookup", "select", "path", "safetensors name", "safetensors dtype", "global", "storage key", "save", "rename", "load", "shard"],
)
def test_no_control_character_of_a_file_reaches_a_message(cause, tmp_path):
    with pytest.raises(errors.WorkbenchError) as caught:
        cause(tmp_path)
    assert all(c.isprintable() or c == "\n" for c in str(caught.value)), ascii(str(caught.value))
    assert str(caught.value).count("\n") <= 1


def _sharded(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    wb.open(folder)


def test_every_error_is_in_the_tree_and_says_so_in_its_module():
    public = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    assert all(issubclass(error, errors.WorkbenchError) for error in public)
    assert all(error.__name__ in errors.__doc__ and error.__doc__ for error in public)


@pytest.mark.parametrize(
    ("ours", "builtin"),
    [
        ("FormatError", ValueError),
        ("MissingShardError", FileNotFoundError),
        ("MissingFileError", FileNotFoundError),
        ("MissingDependencyError", ImportError),
        ("TensorNotFoundError", KeyError),
        ("SelectionError", ValueError),
        ("SpecMismatchError", ValueError),
        ("WriteError", OSError),
    ],
)
def test_errors_are_also_what_python_calls_them(ours, builtin):
    assert issubclass(getattr(errors, ours), builtin)


@pytest.mark.parametrize(
    "low",
    [
        EOFError("x"),
        MemoryError(),
        RecursionError("x"),
        OverflowError("x"),
        ValueError("x"),
        json.JSONDecodeError("x", "y", 0),
        UnicodeDecodeError("utf-8", b"x", 0, 1, "y"),
    ],
    ids=lambda e: type(e).__name__,
)
def test_a_low_level_failure_becomes_ours_with_its_place(low):
    with pytest.raises(errors.CorruptFileError, match="path p, tensor t") as caught, errors.located(path="p", tensor="t"):
        raise low
    assert caught.value.__cause__ is low


def test_the_deepest_place_is_kept():
    with pytest.raises(errors.CorruptFileError) as caught, errors.located(path="outer", op="save"), errors.located(path="inner"):
        raise EOFError
    assert caught.value.where == {"path": "inner", "op": "save"}
