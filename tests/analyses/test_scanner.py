"""wb.scan: exploits that C pickle, torch and numpy carry out are named and not carried out; what is harmless raises no alarm.

Each exploit is proved first: a process of its own loads the file as its victim would, and a marker file must appear.
"""

import argparse
import collections
import datetime
import decimal
import fractions
import gc
import importlib
import io
import json
import os
import pathlib
import pickle
import struct
import subprocess
import sys
import tarfile
import time
import types
import uuid
import warnings
import zipfile

import jsonschema
import numpy as np
import pytest
import torch
from hostile_makers import (
    ATTACKS,
    EXPLOITS,
    OS_SYSTEM,
    PROTO,
    REAL,
    Record,
    command,
    entry,
    good_records,
    laugh,
    nested,
    pickled,
    raw_zip,
    safetensors,
    stack_global,
    text,
    torch_zip,
    touch,
)

import workbench as wb
from workbench.analyses import scan_pickles, scanner
from workbench.analyses.scanner import scan
from workbench.errors import CorruptFileError, MissingFileError, ReportFailedError, SelectionError
from workbench.formats.known_globals import HARMLESS, PLAIN

LOADERS = {
    "pickle": "import pickle\nwith open(path, 'rb') as file: pickle.load(file, encoding='utf-8')",
    "loads": "import pickle\nwith open(path, 'rb') as file: pickle.loads(file.read(), encoding='utf-8')",
    "torch": "import torch; torch.load(path, weights_only=False)",
    "numpy": "import numpy; loaded = numpy.load(path, allow_pickle=True); [loaded[name] for name in getattr(loaded, 'files', ())]",
    "dcp": "from torch.distributed.checkpoint import FileSystemReader; FileSystemReader(path).read_metadata()",
    "export": "import torch; torch.export.load(path)",
    "jit": "import torch; torch.jit.load(path)",
    "zipfile": "import zipfile, pickle; [pickle.loads(zipfile.ZipFile(path).read(name)) for name in zipfile.ZipFile(path).namelist() if name.endswith('pkl')]",
}
VICTIM = """
import json, os, sys, time, warnings
warnings.simplefilter("ignore")
proved = []
for loader, path, marker in json.load(sys.stdin):
    try:
        exec(loader)
    except BaseException:
        pass
    for _ in range(40):
        if os.path.exists(marker):
            proved.append(path)
            break
        time.sleep(0.025)
print(json.dumps(proved))
"""


def carried_out(cases):
    """Those of (loader, path, marker) whose marker a victim's process leaves. The markers are gone afterwards."""
    asked = [[LOADERS[loader], str(path), str(marker)] for loader, path, marker in cases]
    done = subprocess.run([sys.executable, "-c", VICTIM], input=json.dumps(asked), capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    for _, _, marker in cases:
        pathlib.Path(marker).unlink(missing_ok=True)
    return {pathlib.Path(path) for path in json.loads(done.stdout.splitlines()[-1])}


def told(report):
    return "\n".join(finding.message for finding in report.dangers)


def is_named(report, dotted):
    assert not report.ok
    assert not report
    assert dotted in told(report), told(report)
    shown = str(report) + report._repr_html_() + report.to_markdown()
    assert all(c.isprintable() or c == "\n" for c in shown)
    json.dumps(report.to_dict())
    return True


# pickles as pickle.load runs them


@pytest.fixture(scope="module")
def exploits(tmp_path_factory):
    """name -> (path, marker, whether the victim carried it out)."""
    folder = tmp_path_factory.mktemp("exploits")
    made = {}
    for at, (name, (_, make)) in enumerate(EXPLOITS.items()):
        path, marker = folder / f"{at}.pkl", folder / f"marker{at}"
        path.write_bytes(make(marker))
        made[name] = path, marker
    proved = carried_out([("loads" if "FRAME" in name else "pickle", path, marker) for name, (path, marker) in made.items()])
    return {name: (path, marker, path in proved) for name, (path, marker) in made.items()}


@pytest.mark.parametrize("name", EXPLOITS)
def test_what_pickle_would_carry_out_is_named_and_not_carried_out(name, exploits):
    path, marker, proved = exploits[name]
    assert proved, "the exploit does not work, and the test says nothing"
    start = time.process_time()
    assert is_named(scan(path), EXPLOITS[name][0])
    assert time.process_time() - start < 2
    assert not marker.exists()


@pytest.mark.parametrize("name", EXPLOITS)
def test_the_same_pickle_is_named_wherever_it_lies(name, tmp_path):
    marker = tmp_path / "marker"
    dotted, data = EXPLOITS[name][0], EXPLOITS[name][1](marker)
    places = {
        "data.pkl": torch_zip(tmp_path / "a.pt", data),
        "deflated": torch_zip(tmp_path / "b.pt", data, method=zipfile.ZIP_DEFLATED),
        "further record": raw_zip(tmp_path / "c.pt", [*good_records(), Record("archive/notes.txt", data)]),
        "second pickle": tmp_path / "d.pkl",
        "byte string": torch_zip(
            tmp_path / "e.pt", pickled([*REAL, ("blob", b"ctorch.storage\n_load_from_bytes\n" + nested(data) + b"\x85R")])
        ),
    }
    places["second pickle"].write_bytes(b"\x80\x02N." + data)
    for path in places.values():
        assert is_named(scan(path), dotted)
    assert not marker.exists()


@pytest.mark.parametrize("attack", ATTACKS)
def test_spellings_that_name_a_stranger_are_dangers(attack, tmp_path):
    dotted, make = ATTACKS[attack]
    proto = PROTO if attack == "Python 2 name" else b"\x80\x04"
    path = torch_zip(tmp_path / "x.pt", proto + b"}(" + text("evil") + make(command(tmp_path / "marker")) + b"u.")
    assert is_named(scan(path), dotted)


# containers


def legacy(pickle_):
    head = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}."
    return head + pickle_ + b"\x80\x02]."


def tar(path, **members):
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def numpy_objects(path, marker, header=b"{'descr': '|O', 'fortran_order': False, 'shape': (1,), }"):
    header = header.ljust(117) + b"\n"
    path.write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + touch(marker) + b".")


def zip_with(path, **records):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            archive.writestr(name.replace("__", "/"), data)


def evil_zip(marker):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("model/data.pkl", PROTO + OS_SYSTEM + command(marker) + b"\x85R.")
        archive.writestr("model/version", "3\n")
    return out.getvalue()


def exported(path, marker):
    """A real .pt2 with a pickle in the place of its sample inputs."""
    program = torch.export.export(torch.nn.Linear(2, 1), (torch.ones(1, 2),))
    torch.export.save(program, path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    inputs = next(name for name in records if "sample_inputs" in name)
    records[inputs] = evil_zip(marker)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, data)


def in_weights(path, marker, name="data/weights/weight_0"):
    """A real .pt2 whose config says of a weight without a magic number that it is a pickle."""
    exported(path, marker)
    records = {entry: zipfile.ZipFile(path).read(entry) for entry in zipfile.ZipFile(path).namelist()}
    root = next(iter(records)).partition("/")[0]
    kind = name.split("/")[1]
    records[f"{root}/data/sample_inputs/model.pt"] = b""
    config = f"{root}/data/{kind}/model_{kind}_config.json"
    entry_ = {"path_name": name.rpartition("/")[2], "is_param": False, "use_pickle": True, "tensor_meta": None}
    records[config] = json.dumps({"config": json.loads(records[config])["config"] | {"weight": entry_}}).encode()
    records[f"{root}/{name}"] = b"cos\nsystem\n(S'touch %s'\ntR." % str(marker).encode()
    zip_with(path, **records)


def base_256(path, marker):
    """An old tar whose first member's size is not in octal digits."""
    tar(path, sys_info=b"N.", storages=b"\x80\x02K\0.\x80\x02].", tensors=b"\x80\x02K\0.", pickle=touch(marker) + b".")
    data = bytearray(path.read_bytes())
    data[124:136] = b"\x80" + (2).to_bytes(11, "big")
    data[148:156] = b"%06o\0 " % (256 + sum(data[:148]) + sum(data[156:512]))
    path.write_bytes(data)


def seventeen(path, marker):
    """tarfile takes the last member of a name."""
    plain = {"storages": b"\x80\x02K\0.\x80\x02].", "tensors": b"\x80\x02K\0.", "Pickle": b"N."} | {f"f{i}": b"" for i in range(13)}
    tar(path, **plain, pickle=touch(marker) + b".")
    data = path.read_bytes()
    head = bytearray(data[2048:2560].replace(b"Pickle", b"pickle"))
    head[148:156] = b"%06o\0 " % (256 + sum(head[:148]) + sum(head[156:512]))
    path.write_bytes(data[:2048] + head + data[2560:])


def in_tar_header(path, marker):
    """A tar whose first member's name is a pickle: what runs depends on who reads it."""
    tar(path, **{touch(marker).decode() + ".": b"x"})


def in_safetensors(path, marker):
    """A header length whose first byte is the opcode V, a line end in the header, and opcodes in its data."""
    header = json.dumps({"w": {"dtype": "U8", "shape": [100], "data_offsets": [0, 100]}}).encode()
    header = header[:-1] + b" " * (0x56 - len(header) - 1) + b"\n}"
    path.write_bytes(struct.pack("<Q", 0x56) + header[:0x56] + (b"0" + touch(marker) + b".").ljust(100, b" "))


def in_onnx(path, marker):
    """A field of protobuf that readers skip: its tag is the opcode BININT, and its bytes are opcodes."""
    import onnx

    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["x"], ["y"])], "g", [value], [onnx.helper.make_tensor_value_info("y", 1, [1])]
    )
    code = b"\0\0\0" + touch(marker) + b"."
    path.write_bytes(b"J" + bytes([len(code)]) + code + onnx.helper.make_model(graph).SerializeToString())


CONTAINERS = {
    "torch zip": ("torch", lambda p, m: torch_zip(p, PROTO + OS_SYSTEM + command(m) + b"\x85R.")),
    "torch zip, deflated": ("torch", lambda p, m: torch_zip(p, PROTO + OS_SYSTEM + command(m) + b"\x85R.", method=8)),
    "torch zip called .txt": ("torch", lambda p, m: p.write_bytes(evil_zip(m))),
    "torch zip with encryption flags that torch ignores": ("torch", lambda p, m: raw_zip(p, [Record("a/data.pkl", PROTO + OS_SYSTEM + command(m) + b"\x85R.", local_flags=1), Record("a/version", b"3\n")])),
    "torch zip with a wrong checksum": ("zipfile", lambda p, m: raw_zip(p, [Record("a/data.pkl", PROTO + OS_SYSTEM + command(m) + b"\x85R."), Record("a/version", b"3\n")])),
    "legacy file": ("torch", lambda p, m: p.write_bytes(legacy(PROTO + OS_SYSTEM + command(m) + b"\x85R."))),
    "legacy file, in the place of its magic number": ("torch", lambda p, m: p.write_bytes(touch(m) + b"." + legacy(b"\x80\x02N."))),
    "legacy file, in the system's description": ("torch", lambda p, m: p.write_bytes(legacy(b"\x80\x02N.").replace(b"\x80\x02}.", touch(m) + b"."))),
    "legacy file, in the list of storages": ("torch", lambda p, m: p.write_bytes(legacy(b"\x80\x02N.")[:-4] + touch(m) + b".")),
    "legacy file, by a persistent id that is a class": ("torch", lambda p, m: p.write_bytes(legacy(PROTO + b"(" + text("module") + OS_SYSTEM + b"NNtQ" + command(m) + b"\x85R."))),
    "old tar, in pickle": ("torch", lambda p, m: tar(p, storages=b"\x80\x02K\0.\x80\x02].", tensors=b"\x80\x02K\0.", pickle=touch(m) + b".")),
    "old tar, in storages": ("torch", lambda p, m: tar(p, storages=touch(m) + b".", tensors=b"\x80\x02K\0.", pickle=b"N.")),
    "old tar, behind a storage": ("torch", lambda p, m: tar(p, storages=b"\x80\x02K\1." + PROTO + b"(K\7" + text("cpu") + b"ctorch\nFloatStorage\nt." + struct.pack("<qf", 1, 1) + touch(m) + b".", tensors=b"\x80\x02K\0.", pickle=b"N.")),
    "old tar, its sizes in base-256": ("torch", base_256),
    "old tar, its seventeenth member": ("torch", seventeen),
    "weight of a .pt2, protocol 0": ("export", in_weights),
    "opaque object of a .pt2, protocol 0": ("export", lambda p, m: in_weights(p, m, "data/constants/opaque_obj_0")),
    "object array": ("numpy", numpy_objects),
    "object array in a .npz": ("numpy", lambda p, m: (numpy_objects(p, m), zip_with(p, **{"a.npy": p.read_bytes()}))),
    "sample inputs of a .pt2": ("export", exported),
    "tar whose first name is a pickle": ("pickle", in_tar_header),
    "safetensors whose first bytes are a pickle": ("pickle", in_safetensors),
    "ONNX whose first bytes are a pickle": ("pickle", in_onnx),
    "pickle before an archive": ("pickle", lambda p, m: p.write_bytes(touch(m) + b"." + torch_zip(p, pickled(REAL)).read_bytes())),
    "archive in a byte string": ("torch", lambda p, m: torch_zip(p, pickled([("t", b"ctorch.storage\n_load_from_bytes\nc_codecs\nencode\n" + text(evil_zip(m).decode("latin1")) + text("latin1") + b"\x86R\x85R")]))),
    "further pickle in an archive": ("zipfile", lambda p, m: zip_with(p, a__data__pkl=pickled([]), **{"b.pkl": touch(m) + b"."})),
}  # fmt: skip


@pytest.fixture(scope="module")
def containers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("containers")
    made = {}
    for at, (name, (loader, make)) in enumerate(CONTAINERS.items()):
        path, marker = folder / f"{at}.{'npz' if 'npz' in name else 'txt' if 'called' in name else 'pt'}", folder / f"m{at}"
        make(path, marker)
        if "checksum" in name:
            data = bytearray(path.read_bytes())
            data[14] ^= 1
            data[data.index(b"PK\x01\x02") + 16] ^= 1
            path.write_bytes(data)
            loader = "torch"
        made[name] = loader, path, marker
    dcp = folder / "dcp"
    dcp.mkdir()
    (dcp / ".metadata").write_bytes(touch(folder / "mdcp") + b".")
    made["DCP folder"] = "dcp", dcp, folder / "mdcp"
    proved = carried_out(list(made.values()))
    return {name: (path, marker, path in proved) for name, (_, path, marker) in made.items()}


@pytest.mark.parametrize("name", [*CONTAINERS, "DCP folder"])
def test_every_pickle_of_every_container_is_run_symbolically(name, containers):
    path, marker, proved = containers[name]
    assert proved, "the exploit does not work, and the test says nothing"
    start = time.process_time()
    report = scan(path)
    assert is_named(report, "os.system")
    assert time.process_time() - start < 3
    assert not marker.exists()
    if name.startswith(("tar whose", "safetensors whose", "pickle before")):
        assert {"polyglot", "unreadable"} & {finding.kind for finding in report.dangers}


def array_pickle(protocol):
    return pickle.dumps({"a": np.arange(3.0), "text": "é", "seed": np.random.RandomState(1).get_state()}, protocol)


SHARED = {
    **{f"pickle {name}": make for name, (_, make) in EXPLOITS.items()},
    **{f"arrays, protocol {protocol}": lambda _, protocol=protocol: array_pickle(protocol) for protocol in range(2, 6)},
    "tensors in a pickle": lambda _: pickle.dumps({"w": torch.ones(3), "v": torch.ones(2)}),
    "a call of its loader": lambda _: pickle.dumps(torch.ones(3))[:-1] + b"0ctorch.storage\n_load_from_bytes\n)R.",
    "too many calls": lambda _: PROTO + b"cos\nsystem\nq\x00" + b"h\x00)R0" * 400_000 + b"N.",
}


DICT = b"ccollections\nOrderedDict\n)R"
LOADER = b"ctorch.storage\n_load_from_bytes\n"
META = b"ctorch._utils\n_rebuild_meta_tensor_no_storage\n(ctorch\nfloat32\n(K\x02t(K\x01t\x89tR"
PLANTED = {
    "append of a dict": lambda payload: DICT + b"}" + text("append") + LOADER + b"sb" + payload + b"a.",
    "add of a dict": lambda payload: DICT + b"}" + text("add") + LOADER + b"sb(" + payload + b"\x90.",
    "__setstate__ of a dict": lambda payload: DICT + b"}" + text("__setstate__") + LOADER + b"sb" + payload + b"b.",
    "append of a Counter": lambda payload: b"ccollections\nCounter\n)R}" + text("append") + LOADER + b"sb" + payload + b"a.",
    "append in slots": lambda payload: DICT + b"N}" + text("append") + LOADER + b"s\x86b" + payload + b"a.",
    "a state that is a dict object": lambda payload: b"ctypes\nSimpleNamespace\n)R" + DICT + text("append") + LOADER + b"sb" + payload + b"a.",
    "append of a parameter": lambda payload: (
        b"ctorch._utils\n_rebuild_parameter_with_state\n(" + META + b"\x89" + DICT + b"}" + text("append") + LOADER + b"stR" + payload + b"a."
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_a_loader_that_is_planted_where_pickle_calls_it_is_a_danger(name, tmp_path):
    """The payload, a torch file that runs a command, is spelled in numbers, so that no byte string of the file is one."""
    path, marker = tmp_path / "planted.pkl", tmp_path / "marker"
    legacy = b"".join(pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {})) + touch(marker) + b"."
    payload = b"cbuiltins\nbytes\n(" + b"".join(b"K" + bytes([byte]) for byte in legacy) + b"t\x85R"
    path.write_bytes(PROTO + PLANTED[name](payload))
    assert carried_out([("pickle", path, marker)]), "the exploit does not work, and the test says nothing"
    assert is_named(scan(path), "torch.storage._load_from_bytes")
    assert any(f.where.get("global") == "torch.storage._load_from_bytes" for f in wb.open(path).findings if f.severity == "danger")


@pytest.mark.parametrize("nbytes", [70_000, 200_000])
def test_a_long_text_across_the_end_of_a_frame_is_refused(nbytes, tmp_path):
    """C reads the text's end from the file and what follows from the frame."""
    inside = b"X" + struct.pack("<I", nbytes) + b"a" * 10
    path = tmp_path / "frame.pkl"
    path.write_bytes(b"\x80\x04\x95" + struct.pack("<Q", len(inside)) + inside + b"a" * (nbytes - 10) + b".")
    with pytest.raises(CorruptFileError, match="frame ends inside"):
        wb.open(path)
    assert not scan(path).ok


@pytest.mark.parametrize("as_zip", [False, True])
@pytest.mark.parametrize("name", SHARED)
def test_a_run_that_the_reader_made_says_what_a_run_of_its_own_says(name, as_zip, tmp_path, monkeypatch):
    path, ran = tmp_path / "file.pt", []
    program = SHARED[name](tmp_path / "marker")
    torch_zip(path, program) if as_zip else path.write_bytes(program)
    monkeypatch.setattr(scan_pickles, "run_first", lambda *given, own=scan_pickles.run_first: ran.append(given) or own(*given))
    shared, own_runs = scan(path).to_dict(), len(ran)
    monkeypatch.setattr(scan_pickles, "is_run_over", lambda *_: False)
    alone = scan(path).to_dict()
    assert own_runs < len(ran) - own_runs or "FRAME" in name or wb.scan(path).format == "unknown"
    for report in (shared, alone) if name == "too many calls" else ():  # the bound is looked at from time to time
        report["pickles"][0].pop("nbytes")
    assert shared == alone


def test_a_tensor_file_inside_a_pickle_is_looked_into_and_no_alarm(tmp_path):
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps({"w": torch.ones(3)}))
    report = scan(tmp_path / "plain.pkl")
    assert report.ok, told(report)
    assert len(report.pickles) >= 6  # the plain one and the five of the legacy file in it


# what should not be there

STRAYS = {
    "a library": Record("archive/x.so", b"\x7fELF" + bytes(60)),
    "a library by another name": Record("archive/notes", b"\x7fELF" + bytes(60)),
    "a script": Record("archive/setup.py", b"print(1)"),
    "a shell script": Record("archive/run", b"#!/bin/sh\n"),
    "a name that climbs out": Record("../../evil", b"x"),
    "an absolute name": Record("/etc/evil", b"x"),
    "a name of another system": Record("C:\\evil", b"x"),
    "a plain pickle": Record("archive/more.pkl", b"\x80\x02N."),
    "a pickle by another name": Record("archive/notes.md", b"\x80\x02}."),
    "a second data.pkl": Record("other/data.pkl", pickled([])),
    "an encrypted record": Record("archive/secret", b"x", flags=1),
    "a record packed by another method": Record("archive/odd", b"x", method=14),
    "local and central names that differ": Record("archive/safe.txt", b"x", local_name=b"archive/evil.pkl"),
}


@pytest.mark.parametrize("case", STRAYS)
def test_records_that_should_not_be_there_are_dangers(case, tmp_path):
    assert scan(raw_zip(tmp_path / "good.pt", good_records())).ok
    report = scan(raw_zip(tmp_path / "stray.pt", [*good_records(), STRAYS[case]]))
    assert not report.ok
    assert any(f.kind in ("stray record", "unreadable") for f in report.dangers), told(report)


BROKEN = {
    "cut archive": lambda good: good[: len(good) // 2],
    "cut in the directory": lambda good: good[:-30],
    "bytes after the end": lambda good: good + b"x",
    "two end records": lambda good: good + b"PK\x05\x06" + bytes(18),
    "nothing": lambda good: b"",
    "text": lambda good: b"just words\n",
    "a pickle of no known opcode": lambda good: b"\x80\x04\xff",
    "deep": lambda good: b"\x80\x02" + b"]" * 150_000,
    "laughs": lambda good: PROTO + laugh(60) + b".",
    "a huge length": lambda good: b"\x80\x04\x8e" + b"\xff" * 8,
}


@pytest.mark.parametrize("case", BROKEN)
def test_unreadable_means_dangerous_and_is_told_in_time(case, tmp_path):
    good = raw_zip(tmp_path / "x.pt", good_records()).read_bytes()
    (tmp_path / "x.pt").write_bytes(BROKEN[case](good))
    start = time.process_time()
    report = scan(tmp_path / "x.pt")
    assert time.process_time() - start < 3  # one on an idle machine
    assert report.ok == (case == "laughs")
    assert case == "laughs" or "cannot be read" in told(report)


def test_damage_after_the_danger_still_names_it_in_an_archive_without_an_index(tmp_path):
    path = torch_zip(tmp_path / "x.pt", PROTO + OS_SYSTEM + command(tmp_path / "m") + b"\x85R.", method=zipfile.ZIP_DEFLATED)
    path.write_bytes(path.read_bytes()[:-40])
    assert is_named(scan(path), "os.system")


def test_what_is_no_file_is_refused_without_reading_it(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "no regular file" in told(scan(tmp_path / "pipe")) or "not a regular file" in told(scan(tmp_path / "pipe"))
    with pytest.raises(MissingFileError):
        scan(tmp_path / "nothing.pt")
    with pytest.raises(SelectionError):
        scan(wb.open({"a": torch.ones(1)}))


def test_checksums_are_compared_on_request(tmp_path):
    path = raw_zip(tmp_path / "x.pt", good_records())
    data = bytearray(path.read_bytes())
    data[data.index(struct.pack("<3f", 1, 2, 3))] ^= 1
    path.write_bytes(data)
    assert not any(f.kind == "checksum" for f in scan(path).findings)
    assert [f.where["record"] for f in scan(path, crc=True).findings if f.kind == "checksum"] == ["archive/data/0"]


# harmless strangers


class Custom:
    """A class that no table knows."""


HARMLESS_VALUES = {
    "argparse.Namespace": argparse.Namespace(a=1, b=[2]),
    "types.SimpleNamespace": types.SimpleNamespace(a=1),
    "path": pathlib.Path("a/b"),
    "pure path": pathlib.PureWindowsPath("a/b"),
    "datetime": datetime.datetime(2020, 1, 2, tzinfo=datetime.timezone(datetime.timedelta(hours=1))),
    "date and time": (datetime.date(2020, 1, 2), datetime.time(3), datetime.timedelta(4)),
    "decimal": decimal.Decimal("1.5"),
    "fraction": fractions.Fraction(1, 3),
    "uuid": uuid.UUID(int=5),
    "frozenset, slice, range": (frozenset({1}), slice(1, 2), range(3)),
    "Ellipsis": ...,
    "types": [int, float, list, dict],
    "numpy array": np.arange(6.0).reshape(2, 3),
    "numpy arrays of several types": [np.ones(2, dtype) for dtype in ("f4", "i8", "u1", "?", "M8[s]")],
    "numpy objects": np.array([1, "a"], dtype=object),
    "numpy structure": np.zeros(2, [("a", "f4"), ("b", "i2")]),
    "numpy scalars": [np.float64(1), np.int32(2), np.bool_(True)],
    "numpy random state": np.random.RandomState(3).get_state(),
    "empty defaultdict": collections.defaultdict(list),
    "defaultdict": collections.defaultdict(dict, {1: {}}),
    "deque": collections.deque([1, 2], 5),
    "module": torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2), torch.nn.GELU(), torch.nn.LSTM(2, 2)),
    "transformer layer": torch.nn.TransformerEncoderLayer(4, 2, 4),
    "optimizer": torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1),
}  # fmt: skip
NOT_LOADED = {"defaultdict", "deque"}  # torch fills dicts and lists alone


@pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", HARMLESS_VALUES)
def test_harmless_strangers_are_no_alarm_and_the_snippet_loads_them(name, as_zip, tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"w": torch.ones(2), "it": HARMLESS_VALUES[name]}, path, _use_new_zipfile_serialization=as_zip)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    report = scan(path)
    assert report.ok, told(report)
    assert report.needs_allowing
    assert {use.verdict for use in report.globals} == {"plain", "data class"}
    assert wb.open(path).dangers == ()
    assert any(finding.kind == "data classes" and finding.severity == "info" for finding in wb.open(path).findings)
    if name in NOT_LOADED or (not as_zip and name in ("module", "transformer layer")):  # there, persistent ids carry the modules' source
        assert report.snippet is None
        return
    namespace = {}
    exec(report.snippet, namespace)
    assert namespace["state"]["w"].tolist() == [1, 1]
    assert type(namespace["state"]["it"]) is type(HARMLESS_VALUES[name])
    assert not torch.serialization.get_safe_globals() or "it" in namespace["state"]  # scoped


def test_plain_data_needs_nothing(tmp_path):
    torch.save({"w": torch.ones(2), "n": [1, 2.5, None, "x", b"y", 2j, {3}, 10**30]}, tmp_path / "x.pt")
    report = scan(tmp_path / "x.pt")
    assert report.ok
    assert report.headline.startswith("safe: 1 tensors")
    assert report.headline.endswith("all plain data")
    assert (report.needs_allowing, report.snippet) == ((), None)
    report.check()


def test_a_class_that_nobody_knows_is_no_harmless_one(tmp_path):
    torch.save({"w": torch.ones(2), "it": Custom()}, tmp_path / "x.pt")
    report = scan(tmp_path / "x.pt")
    use = next(use for use in report.globals if use.verdict == "unknown")
    assert (use.name, use.use) == (f"{__name__}.Custom", "built")
    assert f"importing {__name__} runs its code" in use.why
    assert not report.ok
    assert report.snippet is None
    with pytest.raises(ReportFailedError, match="Custom"):
        report.check()


MISUSES = {
    "a layer that is called": b"ctorch.nn.modules.linear\nLinear\nK\x03K\x04\x86R",
    "a function that is called": b"ctorch.nn.functional\nrelu\nN\x85R",
    "an object by the rules of another class": b"ccopyreg\n_reconstructor\ncargparse\nNamespace\ncpathlib\nPosixPath\nN\x87R",
    "a defaultdict that calls something": b"ccollections\ndefaultdict\ncargparse\nNamespace\n\x85R",
    "a NumPy type with the flags of objects": b"cnumpy\ndtype\n" + text("V8") + b"\x89\x88\x87R(K\x03" + text("|") + b"NNNK\x08K\x01K\x01tb",
    "a NumPy type whose objects have no flags": b"cnumpy\ndtype\n" + text("V8") + b"\x89\x88\x87R(K\x03" + text("|") + b"N" + text("a") + b"\x85}" + text("a") + b"cnumpy\ndtype\n" + text("O8") + b"\x89\x88\x87RK\0\x86sK\x08K\x01K\x10tb",
    "a change to a plain class": b"ctorch\nTensor\nN}" + text("__len__") + b"cbuiltins\nset\ns\x86b",
    "a call of what a call gave": b"cargparse\nNamespace\n)R)R",
}  # fmt: skip


@pytest.mark.parametrize("case", MISUSES)
def test_a_harmless_name_used_to_do_harm_is_a_danger(case, tmp_path):
    path = torch_zip(tmp_path / "x.pt", pickled([*REAL, ("it", MISUSES[case])]))
    assert not scan(path).ok
    assert any(finding.severity == "danger" for finding in wb.open(path).findings)


def test_the_plain_names_are_torch_s_own():
    assert set(torch._weights_only_unpickler._get_allowed_globals()) == PLAIN


def test_every_harmless_name_of_torch_numpy_and_python_exists():
    absent = {"pathlib._local"} if sys.version_info < (3, 13) else set()
    for dotted, (rule, why) in HARMLESS.items():
        module, _, name = dotted.rpartition(".")
        if module.partition(".")[0] in ("transformers", "accelerate", "omegaconf", "lightning", "lightning_fabric", "pytorch_lightning"):
            continue
        if module in absent or module.startswith("numpy.core"):
            continue
        found = getattr(importlib.import_module(module), name)
        assert rule != "new" or isinstance(found, type), dotted
        assert why
    layers = {
        f"{cls.__module__}.{cls.__qualname__}"
        for cls in vars(torch.nn).values()
        if isinstance(cls, type) and issubclass(cls, torch.nn.Module)
    }
    assert {name for name in HARMLESS if name.startswith("torch.nn.modules")} <= layers | {
        "torch.nn.modules.linear.NonDynamicallyQuantizableLinear"
    }


# good files


def test_good_files_of_other_kinds_are_safe(tmp_path):
    class Program(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(2, 2)
            self.sizes = [1, 2]

        def forward(self, x):
            return self.inner(x) if x.sum() > 0 else x

    good = [safetensors(tmp_path / "a.safetensors", {"w": entry()}, b"\0" * 4)]
    np.savez(tmp_path / "b.npz", a=np.ones(3))
    np.save(tmp_path / "c.npy", np.ones(3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(Program()).save(tmp_path / "d.pt")
    torch.export.save(torch.export.export(torch.nn.Linear(2, 1), (torch.ones(1, 2),)), tmp_path / "e.pt2")
    torch.save(torch.ones(100_000), tmp_path / "f.pt", _use_new_zipfile_serialization=False)
    torch.save({"a": torch.ones(3), "b": torch.arange(4).to(torch.float8_e4m3fn)}, tmp_path / "g.pt")
    (tmp_path / "h.pkl").write_bytes(pickle.dumps({"a": np.ones(3), "b": [1, 2]}, 5))
    good += [tmp_path / name for name in ("b.npz", "c.npy", "d.pt", "e.pt2", "f.pt", "g.pt", "h.pkl")]
    for path in good:
        assert scan(path).ok, (path.name, told(scan(path)))


def test_a_folder_is_scanned_file_by_file(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "README.md").write_text("# a model\n")
    (tmp_path / "below").mkdir()
    report = scan(tmp_path)
    assert report.ok, told(report)
    assert report.tensors == 1
    (tmp_path / "training_args.bin").write_bytes(touch(tmp_path / "m") + b".")
    report = scan(tmp_path)
    assert is_named(report, "os.system")
    assert report.dangers[0].where["file"] == "training_args.bin"


def test_a_dcp_folder_is_safe_and_its_entries_are_scanned(tmp_path):
    import torch.distributed.checkpoint as dcp

    with pytest.warns(UserWarning, match="single process"):
        dcp.save({"w": torch.ones(2), "epoch": 3}, checkpoint_id=tmp_path / "good")
    report = scan(tmp_path / "good")
    assert report.ok, told(report)
    assert any(p.place.file.endswith(".distcp") for p in report.pickles)
    entry = next((tmp_path / "good").glob("*.distcp"))
    entry.write_bytes(entry.read_bytes() + evil_zip(tmp_path / "m"))
    assert is_named(scan(tmp_path / "good"), "os.system")


EVIL = b"cos\nsystem\nX\4\0\0\0true\x85R."


@pytest.mark.parametrize(
    "spelled",
    ["'<f4', 'descr': 'obj' 'ect'", "'T'", "'object_'", "'O,i4'", "'i4,O'", "'(2,)O'", "'1O'", "'?,O'", "u'O'", "[('a','i4'),('b','|O')]"],
)
@pytest.mark.parametrize("as_npz", [False, True])
def test_an_array_of_objects_is_one_however_its_type_is_spelled(spelled, as_npz, tmp_path):
    header = f"{{'descr': {spelled}, 'fortran_order': False, 'shape': (1,), }}\n".encode()
    data = b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + b"\x80\2" + EVIL
    path = tmp_path / ("a.npz" if as_npz else "a.npy")
    if as_npz:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.npy", data)
    else:
        path.write_bytes(data)
    assert "os.system" in {found.where.get("global") for found in scan(path).dangers}


def distcp(folder, count, change=None):
    """A folder as torch.distributed.checkpoint writes it; `change` gets the archive of one tensor and returns another as long."""
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({f"layer.{i}.weight": torch.full((3,), 1.5 + i) for i in range(count)}, checkpoint_id=folder)
    path = folder / "__0_0.distcp"
    data = path.read_bytes()
    if change is not None:
        length = data.index(b"PK\5\6") + 22
        assert len(data) == count * length
        path.write_bytes(data[: 3 * length] + change(data[3 * length : 4 * length]) + data[4 * length :])
    return folder


def test_alike_parts_of_a_dcp_folder_are_looked_into_once(tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(scanner, "read_zip_index", lambda *a, own=scanner.read_zip_index: opened.append(a) or own(*a))
    assert scan(distcp(tmp_path / "d", 40))
    assert len(opened) == 1


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda part: part.replace(b"_rebuild_tensor_v2", b"_rebuild_sensor_v2"), "torch._utils._rebuild_sensor_v2"),
        (lambda part: part.replace(b"OrderedDict", b"OrderedEvil"), "collections.OrderedEvil"),
        (lambda part: part.replace(struct.pack("<3f", 4.5, 4.5, 4.5), b"\x80\2cos\nfork\n."), "os.fork"),
        (lambda part: part.replace(b"little", b"LITTLE"), None),
    ],
    ids=["a name", "another name", "a pickle as the payload", "another record"],
)
def test_a_part_that_is_not_quite_alike_is_looked_into(change, told, tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(scanner, "read_zip_index", lambda *a, own=scanner.read_zip_index: opened.append(a) or own(*a))
    report = scan(distcp(tmp_path / "d", 10, change))
    assert is_named(report, told) if told else len(opened) == 2


def test_the_classes_of_a_large_program_are_no_stray_records(tmp_path, monkeypatch):
    monkeypatch.setattr(scanner, "_MOST_RECORDS", 60)
    model = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(1, 1)) for _ in range(30)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(model, torch.ones(1, 1)).save(tmp_path / "traced.pt")
    with zipfile.ZipFile(tmp_path / "traced.pt") as archive:
        assert len([name for name in archive.namelist() if "/code/" in name]) > 100
    assert scan(tmp_path / "traced.pt")


def test_junk_in_a_folder_is_run_within_the_bounds_of_one_file(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(scan_pickles, "run_first", lambda *a, own=scan_pickles.run_first: ran.append(own(*a)) or ran[-1])
    for number in range(120):
        (tmp_path / f"f{number}").write_bytes(b"(N" * 32768 + b"zz")
    assert not scan(tmp_path)
    assert sum(outcome.machine.ran for outcome in ran[-1:]) < 3_200_000
    assert len(ran) < 120


def test_a_checkpoint_is_scanned_where_it_came_from(tmp_path):
    torch.save({"w": torch.ones(2), "it": Custom()}, tmp_path / "x.pt")
    assert is_named(scan(wb.open(tmp_path / "x.pt")), "Custom")


def test_many_records_take_little_time(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("a/data.pkl", pickled([]))
        for i in range(20_000):
            archive.writestr(f"a/data/{i}", b"\0\0\x80?")
    start = time.process_time()
    assert scan(tmp_path / "x.pt").ok
    assert time.process_time() - start < 4


def test_many_raw_weights_of_a_program_take_little_time(tmp_path):
    values = np.random.default_rng(0).standard_normal(2000).astype("f4").tobytes()
    with zipfile.ZipFile(tmp_path / "x.pt2", "w") as archive:
        archive.writestr("m/archive_format", "pt2")
        archive.writestr("m/archive_version", "0")
        for i in range(5000):
            archive.writestr(f"m/data/weights/weight_{i}", values[i % 500 :])
    start = time.process_time()
    assert scan(tmp_path / "x.pt2").ok
    assert time.process_time() - start < 4


@pytest.mark.parametrize("count", [300_000])
def test_many_dangers_are_counted_and_not_told_one_by_one(count, tmp_path):
    data = PROTO + b"".join(b"cm\nn%d\n0" % i for i in range(count)) + b"N."
    gc.collect()
    start = time.process_time()
    report = scan(torch_zip(tmp_path / "x.pt", data))
    assert time.process_time() - start < 8
    assert 50 < len(report.findings) < 400
    assert "not told one by one" in told(report)


# JSON, SARIF


SARIF = {  # what OASIS SARIF 2.1.0 requires of the parts that are used
    "type": "object",
    "required": ["version", "runs"],
    "additionalProperties": False,
    "properties": {
        "$schema": {"type": "string", "format": "uri"},
        "version": {"enum": ["2.1.0"]},
        "runs": {"type": "array", "items": {
            "type": "object", "required": ["tool"], "additionalProperties": False,
            "properties": {
                "tool": {"type": "object", "required": ["driver"], "properties": {"driver": {
                    "type": "object", "required": ["name"], "additionalProperties": False,
                    "properties": {"name": {"type": "string"}, "version": {"type": "string"}, "semanticVersion": {"type": "string"}, "rules": {
                        "type": "array", "uniqueItems": True, "items": {
                            "type": "object", "required": ["id"], "additionalProperties": False,
                            "properties": {"id": {"type": "string"}, "name": {"type": "string"},
                                           "shortDescription": {"type": "object", "required": ["text"]},
                                           "defaultConfiguration": {"type": "object", "properties": {"level": {"enum": ["none", "note", "warning", "error"]}}}}}}}}}},
                "invocations": {"type": "array", "items": {"type": "object", "required": ["executionSuccessful"]}},
                "results": {"type": "array", "items": {
                    "type": "object", "required": ["message"], "additionalProperties": False,
                    "properties": {
                        "ruleId": {"type": "string"}, "ruleIndex": {"type": "integer", "minimum": 0},
                        "level": {"enum": ["none", "note", "warning", "error"]},
                        "message": {"type": "object", "required": ["text"], "properties": {"text": {"type": "string", "minLength": 1}}},
                        "locations": {"type": "array", "items": {"type": "object", "additionalProperties": False, "properties": {
                            "physicalLocation": {"type": "object", "required": ["artifactLocation"], "additionalProperties": False, "properties": {
                                "artifactLocation": {"type": "object", "properties": {"uri": {"type": "string", "pattern": r"^[^/\s:][^\s:]*$"}}},
                                "region": {"type": "object", "properties": {"byteOffset": {"type": "integer", "minimum": 0}, "byteLength": {"type": "integer", "minimum": 0}}}}},
                            "logicalLocations": {"type": "array", "items": {"type": "object", "properties": {"fullyQualifiedName": {"type": "string"}, "kind": {"type": "string"}}}}}}},
                    }}}}}}}}  # fmt: skip


@pytest.mark.parametrize("name", ["GLOBAL REDUCE", "dotted through torch", "named and not called"])
def test_sarif_has_the_form_that_the_standard_requires(name, tmp_path):
    path = torch_zip(tmp_path / "a b\u202e#.pt", pickled([*REAL, ("evil", ATTACKS[name][1](command(tmp_path / "m")))]))
    report = scan(path)
    log = report.to_sarif()
    jsonschema.validate(log, SARIF)
    run = log["runs"][0]
    assert len(run["results"]) == len(report.findings)
    first = run["results"][0]
    assert first["level"] == "error"
    assert run["tool"]["driver"]["rules"][first["ruleIndex"]]["id"] == first["ruleId"]
    at = first["locations"][0]["physicalLocation"]["region"]["byteOffset"]
    assert path.read_bytes()[:at].endswith((b"system\n", b"\x93"))
    assert "archive/data.pkl" in first["locations"][0]["logicalLocations"][0]["fullyQualifiedName"]


def test_the_report_tells_where_and_how_each_global_is_used(tmp_path):
    data = (
        PROTO
        + b"}("
        + text("ns")
        + b"cargparse\nNamespace\n)\x81"
        + text("f")
        + b"ctorch\nfloat32\n"
        + text("od")
        + b"ccollections\nOrderedDict\n)Ru."
    )
    report = scan(torch_zip(tmp_path / "x.pt", data))
    assert {use.name: use.use for use in report.globals} == {
        "argparse.Namespace": "built",
        "torch.float32": "imported",
        "collections.OrderedDict": "called",
    }
    raw = (tmp_path / "x.pt").read_bytes()
    for use in report.globals:
        assert data[: use.place.offset].endswith(use.name.rpartition(".")[2].encode() + b"\n")
        assert raw[: use.place.position].endswith(use.name.rpartition(".")[2].encode() + b"\n")
    assert [(p.protocol, p.nbytes, p.ends) for p in report.pickles] == [(2, len(data), "at its STOP")]
    assert [t.title for t in report.tables()] == [
        "findings",
        "globals",
        "pickles",
        "records that should not be there",
        "to load it with torch",
    ]


def test_names_of_a_stranger_are_shown_harmlessly(tmp_path):
    odd = "<img src=x onerror=alert(1)>\x1b[31m"
    path = raw_zip(tmp_path / "x.pt", [*good_records(), Record(f"archive/{odd}.so", b"\x7fELF")])
    report = scan(path)
    shown = str(report) + report.to_markdown() + report._repr_html_()
    assert "<img" not in report._repr_html_()
    assert "\x1b" not in shown


def test_an_extension_code_is_named(tmp_path):
    assert is_named(scan(torch_zip(tmp_path / "x.pt", PROTO + b"\x82\x07)R.")), "copyreg.extension 7")


def test_a_name_by_stack_global_is_whole(tmp_path):
    report = scan(torch_zip(tmp_path / "x.pt", b"\x80\x04" + stack_global("torch", "storage.os.system") + b"."))
    assert "reaches through torch to something else" in next(use.why for use in report.globals)
