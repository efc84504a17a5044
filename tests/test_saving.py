"""Saving: whole or not at all, within its memory budget, the same bytes however it is run."""

import errno
import hashlib
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from memory import peak_over_base
from safetensors.torch import load_file, save_file

import workbench as wb
from workbench.errors import BudgetError, CancelledError, FileChangedError, SelectionError, WorkbenchError, WriteError
from workbench.files import file_ref

KILLS = int(os.environ.get("WORKBENCH_KILLS", "12"))
EXTENSIONS = ["pt", "safetensors"]


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load(path):
    return load_file(path) if str(path).endswith("safetensors") else torch.load(path, weights_only=True)


def visible(folder):
    return {name for name in os.listdir(folder) if not (name.startswith(".") and name.endswith(".tmp"))}


@pytest.fixture(params=EXTENSIONS)
def old(request, tmp_path):
    """A file that stands where the new one is to go."""
    path = tmp_path / f"model.{request.param}"
    (torch.save if request.param == "pt" else save_file)({"old": torch.arange(5.0)}, path)
    return path


def untouched(path):
    return load(path)["old"].tolist() == [0, 1, 2, 3, 4]


NEW = {"new": torch.ones(1000)}

# atomicity

WRITER = """
import sys, workbench as wb
source = wb.open(sys.argv[2])
print("ready", flush=True)
while True:
    wb.save(source, sys.argv[1])
"""


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_a_kill_at_any_moment_leaves_the_old_file_or_the_new_one(extension, tmp_path):
    """SIGKILL while a process saves over and over: what stands there is whole each time, and nothing visible is left beside it."""
    path, source, draw = tmp_path / f"model.{extension}", tmp_path / "source.pt", random.Random(5)
    torch.save({f"t{i}": torch.full((2_000_000,), float(i)) for i in range(4)}, source)
    torch.save({"old": torch.arange(5.0)}, path) if extension == "pt" else save_file({"old": torch.arange(5.0)}, path)
    old_file, outcomes = path.read_bytes(), set()
    for _ in range(KILLS):
        path.write_bytes(old_file)
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(source)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout.readline() == "ready\n"
        time.sleep(draw.uniform(0, 0.15))
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        found = load(path)
        outcomes.add(",".join(found))
        assert list(found) == ["old"] or {n: t.unique().tolist() for n, t in found.items()} == {f"t{i}": [i] for i in range(4)}
        assert visible(tmp_path) == {path.name, source.name}
    assert "old" in outcomes
    assert len(os.listdir(tmp_path)) <= 3  # the killed cannot clean up, but the next writer does
    wb.save(wb.open(source), path)
    assert sorted(os.listdir(tmp_path)) == sorted([path.name, source.name])


LIMITED = """
import resource, signal, sys, workbench as wb
from workbench.errors import WriteError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
big = wb.open(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    wb.save(big, sys.argv[1])
except WriteError as error:
    print(error)
"""


def test_a_full_disk_is_told_before_the_work_and_nothing_is_changed(old):
    (old.parent / "source").mkdir()
    torch.save({"t": torch.zeros(1_000_000)}, old.parent / "source" / "big.pt")
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(old), str(old.parent / "source" / "big.pt")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "nothing was changed" in done.stdout
    assert untouched(old)
    assert set(os.listdir(old.parent)) == {old.name, "source"}


@pytest.mark.parametrize("moment", ["reserve", "write", "sync", "rename"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_an_error_of_the_disk_at_any_moment_leaves_everything_as_it_was(moment, code, old, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, {"reserve": "posix_fallocate", "write": "pwrite", "sync": "fsync", "rename": "replace"}[moment], fail)
    with pytest.raises(WriteError, match="nothing was changed"):
        wb.save(NEW, old)
    monkeypatch.undo()
    assert untouched(old)
    assert os.listdir(old.parent) == [old.name]


def test_bytes_that_rot_between_write_and_rename_are_noticed(old, monkeypatch):
    real = os.fsync

    def rot(fd):
        if os.path.isfile(f"/proc/self/fd/{fd}") and os.fstat(fd).st_size > 3000:
            os.pwrite(fd, b"\xff\xff\xff\xff", 2000)
        real(fd)

    monkeypatch.setattr(os, "fsync", rot)
    with pytest.raises(WorkbenchError, match="read back"):
        wb.save(NEW, old)
    monkeypatch.undo()
    assert untouched(old)
    assert os.listdir(old.parent) == [old.name]


@pytest.mark.parametrize("target", ["none/x.pt", "file/x.pt", "folder.pt", "/proc/x.pt", "x" * 300 + ".pt", "nul\0.pt"])
def test_a_place_that_cannot_be_written_is_an_error_of_ours(target, tmp_path):
    (tmp_path / "folder.pt").mkdir()
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(WorkbenchError):
        wb.save(NEW, os.path.join(tmp_path, target))
    assert set(os.listdir(tmp_path)) == {"folder.pt", "file"}


def test_a_read_only_file_is_not_replaced(old, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # permission bits do not bind root, which may run these tests
    with pytest.raises(WriteError, match="read-only"):
        wb.save(NEW, old)
    monkeypatch.undo()
    assert untouched(old)


def test_mode_and_link_of_what_stood_there_are_kept(old):
    os.chmod(old, 0o640)
    os.symlink(old.name, old.parent / f"link{old.suffix}")
    wb.save(NEW, old.parent / f"link{old.suffix}")
    assert (old.parent / f"link{old.suffix}").is_symlink()
    assert os.stat(old).st_mode & 0o777 == 0o640
    assert list(load(old)) == ["new"]


def test_saving_over_a_file_that_torch_has_mapped_is_safe(tmp_path):
    path = tmp_path / "mapped.pt"
    torch.save({"w": torch.arange(100_000.0)}, path)
    mapped = torch.load(path, mmap=True, weights_only=True)
    wb.save(wb.ops.cast(wb.open(path), "float16", overflow="allow"), path)
    assert mapped["w"].sum().item() == torch.arange(100_000.0).sum().item()
    wb.save(mapped, path)
    assert load(path)["w"].dtype == torch.float32


def test_saving_over_its_own_source_is_safe_and_old_handles_are_refused(old):
    ckpt = wb.open(old)
    wb.save(ckpt, old)
    assert untouched(old)
    with pytest.raises(FileChangedError):
        ckpt["old"].load()


# stopping


@pytest.mark.parametrize("threads", [1, 2])
def test_a_cancelled_save_leaves_everything_as_it_was(threads, old):
    cancel, big = threading.Event(), {f"t{i}": torch.ones(1_000_000) for i in range(4)}
    with pytest.raises(CancelledError):
        wb.save(wb.ops.cast(wb.open(big), "float64"), old, cancel=cancel, threads=threads, progress=lambda p: cancel.set())
    assert untouched(old)
    assert os.listdir(old.parent) == [old.name]


def test_progress_grows_to_its_end(tmp_path):
    seen = []
    wb.save({f"t{i}": torch.ones(500_000) for i in range(4)}, tmp_path / "p.pt", progress=seen.append)
    assert [p.done for p in seen] == sorted(p.done for p in seen)
    assert seen[-1].done == seen[-1].total == 8_000_000


def test_an_error_in_a_kernel_leaves_everything_as_it_was(old):
    with pytest.raises(SelectionError):
        wb.save(wb.ops.cast(wb.open({"a": torch.ones(10), "x": torch.tensor([1e30])}), "float16"), old)
    assert untouched(old)
    assert os.listdir(old.parent) == [old.name]


@pytest.mark.parametrize("options", [{"max_ram_mb": 15}, {"max_ram_mb": 0}, {"threads": 0}, {"max_ram_mb": -1}])
def test_a_budget_that_cannot_be_kept_is_refused(options, old):
    with pytest.raises(BudgetError):
        wb.save(NEW, old, **options)
    assert untouched(old)


def test_a_row_wider_than_the_budget_is_refused_with_the_budget_that_fits(tmp_path):
    ckpt = wb.ops.quantize(wb.open({"w": torch.ones(4, 1_000_000)}))
    try:
        wb.save(ckpt, tmp_path / "wide.pt", max_ram_mb=16)
    except BudgetError as error:
        wb.save(ckpt, tmp_path / "wide.pt", max_ram_mb=int(str(error).split("max_ram_mb=")[1].split()[0]))
    assert load(tmp_path / "wide.pt")["w"].unique().tolist() == [127]


# however it is run


def pipeline(source):
    return wb.ops.prune(wb.ops.quantize(source, names="q*"), 0.3, names="p*")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "source.pt"
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(300, 700, generator=generator)
    torch.save(
        {
            "q1": base,
            "q2": base.t(),
            "p1": torch.randn(2**18, generator=generator),
            "tied": base,
            "p2": torch.randn(3, 4, 5, generator=generator),
            "n": torch.arange(9),
        },
        path,
    )
    return path


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_threads_processes_and_budgets_give_the_same_bytes(extension, source, tmp_path):
    ckpt = pipeline(wb.open(source))
    path = tmp_path / f"same.{extension}"

    def saved(**options):
        wb.save(ckpt, path, **options)
        return digest(path)

    first = saved()
    assert saved(threads=2) == first
    assert saved(max_ram_mb=16) == first
    if extension == "pt":
        with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
            assert saved(executor=pool) == first


def test_a_report_of_the_save_tells_the_file(source, tmp_path):
    report = wb.save(wb.open(source), tmp_path / "r.pt")
    assert report
    assert (report.tensors, report.nbytes) == (6, os.path.getsize(tmp_path / "r.pt"))


def test_what_is_saved_depends_on_the_tensors_and_not_on_the_clock(source, tmp_path):
    for i in (1, 2):
        (tmp_path / str(i)).mkdir()
        wb.save(wb.open(source), tmp_path / str(i) / "same.pt")
        time.sleep(0.01)
    assert digest(tmp_path / "1" / "same.pt") == digest(tmp_path / "2" / "same.pt")


# memory

SMALL = """
path, out, budget = sys.argv[1], sys.argv[2], int(sys.argv[3])
wb.save(wb.ops.quantize(wb.open({"w": torch.ones(64, 64), "v": torch.ones(100)}), names="*"), out)
"""
QUANTIZED = 'wb.save(wb.ops.quantize(wb.open(path), names="w"), out, max_ram_mb=budget)'


@pytest.fixture(scope="module")
def big_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("big")
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("shape", ["[n]", "[1, n]", "square", "transposed"])
def test_quantizing_256_mb_stays_within_64_mb(shape, big_folder):
    n = 2**26
    base = torch.arange(n, dtype=torch.int32).view(torch.float32)
    base = (base.view(torch.int32) % 997).float()
    tensor = {"[n]": base, "[1, n]": base[None], "square": base.view(2**13, 2**13), "transposed": base.view(2**13, 2**13).t()}[shape]
    torch.save({"w": tensor}, big_folder / "big.pt")
    del base
    assert peak_over_base(SMALL, QUANTIZED, big_folder / "big.pt", big_folder / "out.pt", 64) <= 64
    result = torch.load(big_folder / "out.pt", weights_only=True, mmap=True)
    rows = slice(0, 2**20) if tensor.ndim == 1 else (slice(0, 4), slice(0, 2**20))
    scale = result["w_scale"] if tensor.ndim == 1 else result["w_scale"][:4]
    assert ((tensor[rows] - result["w"][rows] * scale).abs() <= scale * 0.5001).all()


def test_a_file_kept_open_is_opened_once_and_proved_again_afterwards(tmp_path, monkeypatch):
    path, opened, real = tmp_path / "a.pt", [], os.open
    torch.save({"w": torch.ones(4)}, path)
    tensor = wb.open(path)["w"]
    monkeypatch.setattr(os, "open", lambda name, *rest: opened.append(name) or real(name, *rest))
    with file_ref(path).kept_open():
        assert tensor.load().tolist() == wb.open(path)["w"].load().tolist() == [1, 1, 1, 1]
    assert opened.count(str(path)) == 3  # file_ref, kept_open and what wb.open proves, but nothing that was read
    torch.save({"w": torch.ones(5)}, path)
    with pytest.raises(FileChangedError):
        tensor.load()
