"""The Netron view without a browser: what is sent and what is left out, what the summary says, and what is read in netron's own page."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tomllib
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import workbench
from workbench.errors import SelectionError, UnsupportedError
from workbench.widgets import netron_server
from workbench.widgets.netron import NetronView

ROOT = Path(workbench.__file__).parents[1]
SHIPPED = ROOT / "workbench/widgets/jupyter/jupyter_server_config.d/workbench.json"


def weight(name: str, *shape: int) -> onnx.TensorProto:
    return numpy_helper.from_array(numpy.arange(numpy.prod(shape), dtype=numpy.float32).reshape(shape), name)


def model() -> onnx.ModelProto:
    """Large and small values in every place that can hold one."""
    end = [helper.make_tensor_value_info("then_out", TensorProto.FLOAT, [20, 20])]
    branch = helper.make_graph(
        [helper.make_node("Add", ["x", "inner"], ["then_out"], name="branch/add")], "then", [], end, [weight("inner", 20, 20)]
    )
    typed = helper.make_tensor("typed", TensorProto.INT64, [1000], list(range(1000)))
    indices = helper.make_tensor("at", TensorProto.INT64, [300], list(range(300)))
    sparse = helper.make_sparse_tensor(weight("sparse", 300), indices, [1000])
    nodes = [
        helper.make_node("Constant", [], ["c"], name="constant", value=weight("", 400)),
        helper.make_node("Constant", [], ["s"], name="small", value=weight("", 4)),
        helper.make_node("If", ["flag"], ["y"], name="if", then_branch=branch, else_branch=branch),
        helper.make_node("Own", ["y"], ["z"], name="own", domain="here"),
    ]
    value = helper.make_tensor_value_info
    inputs = [value("x", TensorProto.FLOAT, ["batch", 20]), value("flag", TensorProto.BOOL, [])]
    made = helper.make_graph(
        nodes,
        "g",
        inputs,
        [value("z", TensorProto.FLOAT, None)],
        [weight("big", 64, 64), typed, weight("axes", 2)],
        sparse_initializer=[sparse],
    )
    body = [helper.make_node("Constant", [], ["k"], value=weight("", 500)), helper.make_node("Mul", ["a", "k"], ["b"])]
    function = helper.make_function("here", "Own", ["a"], ["b"], body, [helper.make_opsetid("", 17)])
    return helper.make_model(
        made, functions=[function], opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("here", 1)], ir_version=8
    )


def tensors(proto: Any) -> Iterator[onnx.TensorProto]:
    """Every TensorProto anywhere in a message."""
    for field, value in proto.ListFields():
        if field.message_type is not None:
            for item in value if hasattr(value, "append") or hasattr(value, "add") else [value]:
                if isinstance(item, onnx.TensorProto):
                    yield item
                yield from tensors(item)


def without_values(path: Path) -> onnx.ModelProto:
    """What is to be shown, by onnx itself."""
    proto = onnx.load(path, load_external_data=False)
    fields = ("float_data", "int32_data", "string_data", "int64_data", "raw_data", "double_data", "uint64_data")
    for tensor in tensors(proto):
        if len(tensor.raw_data) > 1024 or len(tensor.int64_data) > 600:  # in the sample a number has two bytes at most
            for name in fields:
                tensor.ClearField(name)
        if tensor.external_data:
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
    return proto


def shown(view: NetronView) -> onnx.ModelProto:
    return onnx.load_model_from_string(view.shown)


def shipped(view: NetronView) -> Any:
    return json.loads(view.report)


def test_values_are_left_out_everywhere_and_nothing_else_is(tmp_path: Path) -> None:
    onnx.save(model(), path := tmp_path / "m.onnx")
    view = NetronView(path)
    wanted = without_values(path)
    kept = [len(tensor.raw_data) for tensor in tensors(wanted)]
    assert sum(count > 0 for count in kept) == 2  # the small constant and the axes: the rest of the sample is large
    assert shown(view).SerializeToString(deterministic=True) == wanted.SerializeToString(deterministic=True)
    assert view.detail["note"].startswith("Shown without the values of 7 tensors: ")
    assert len(view.shown) < path.stat().st_size / 5


def test_external_data_is_neither_read_nor_named(tmp_path: Path) -> None:
    onnx.save(model(), path := tmp_path / "m.onnx", save_as_external_data=True, location="weights.bin", size_threshold=1000)
    (tmp_path / "weights.bin").unlink()
    os.mkfifo(tmp_path / "weights.bin")  # reading it would hang
    view = NetronView(path)
    assert shown(view) == without_values(path)
    assert b"weights.bin" not in view.shown
    assert "in other files, which a download leaves out" in view.detail["note"]


def test_memory_follows_what_is_sent(tmp_path: Path) -> None:
    graph = helper.make_graph([helper.make_node("Relu", ["w"], ["y"])], "g", [], [], [weight("w", 16, 1_000_000)])
    onnx.save(helper.make_model(graph), path := tmp_path / "m.onnx")
    NetronView(path)  # what is imported and made once
    tracemalloc.start()
    view = NetronView(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(view.shown) < 200
    assert peak < 2_000_000


def test_a_graph_too_large_is_told_and_its_tensors_listed(tmp_path: Path) -> None:
    sample = model()
    sample.graph.doc_string = "x" * 8_000_001
    onnx.save(sample, path := tmp_path / "m.onnx")
    view = NetronView(path)
    assert view.shown == b""
    assert shipped(view)["refused"] == "Netron is not shown this file: more than 8 MB are left without its weights."
    assert [table.title for table in view.summary.tables()] == ["tensors"]
    assert "big" in str(view.summary)


def test_texts_that_are_no_utf8_are_shown_by_their_bytes(tmp_path: Path) -> None:
    sample = model()
    sample.graph.node[3].input[0] = "QQQQ"  # what a listing of tensors does not read
    (tmp_path / "m.onnx").write_bytes(sample.SerializeToString().replace(b"QQQQ", b"\xff\xfe\xff\xfe"))
    assert NetronView(tmp_path / "m.onnx").summary.tables()[2].rows[3] == ("own", "Own", r"\xff\xfe\xff\xfe", "z")


def test_a_graph_that_onnx_cannot_read_is_told_and_its_tensors_listed(tmp_path: Path) -> None:
    sample = model()
    sample.graph.value_info.add().name = "VVVV"
    (tmp_path / "m.onnx").write_bytes(sample.SerializeToString().replace(b"\x04VVVV", b"\x7fVVVV"))
    summary = NetronView(tmp_path / "m.onnx").summary
    assert "its graph cannot be read here" in summary.headline
    assert "big" in str(summary)


def test_the_summary_says_what_the_graph_is(tmp_path: Path) -> None:
    onnx.save(model(), path := tmp_path / "m.onnx")
    view = NetronView(path)
    assert view.summary.headline.startswith("8 nodes of 5 operators, 2 inputs and 1 output; opset 17, here 1; ")
    ends, operators, nodes = view.summary.tables()
    assert ends.rows == (("x", "input", "float", ("batch", 20)), ("flag", "input", "bool", ()), ("z", "output", "float", None))
    assert operators.rows[0] == ("Constant", "ai.onnx", 3)
    assert ("Own", "here", 1) in operators.rows
    assert [row[0] for row in nodes.rows] == ["constant", "small", "if", "own"]
    data, _ = view._repr_mimebundle_()
    for text in ("inputs and outputs", "[batch, 20]", "Constant", "own"):
        assert text in data["text/html"]
        assert text in str(view.summary)


def test_long_graphs_show_their_ends(tmp_path: Path) -> None:
    nodes = [helper.make_node("Relu", [f"t{i}"], [f"t{i + 1}"], name=f"n{i}") for i in range(40)]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [], [])), path := tmp_path / "m.onnx")
    rows = NetronView(path).summary.tables()[2].rows
    assert [row[0] for row in rows] == [*(f"n{i}" for i in range(8)), "…", *(f"n{i}" for i in range(32, 40))]
    assert rows[8][1] == "24 more"


def test_names_of_a_stranger_are_escaped(tmp_path: Path) -> None:
    bad = "<img src=x onerror=alert(1)>\x1b[31m"
    graph = helper.make_graph([helper.make_node(bad, [bad], [bad], name=bad)], "g", [], [])
    onnx.save(helper.make_model(graph), path := tmp_path / "m.onnx")
    view = NetronView(path)
    data, _ = view._repr_mimebundle_()
    assert "<img" not in data["text/html"]
    assert "\x1b" not in data["text/html"] + str(view.summary)
    assert b"\\u001b" not in view.report  # as JSON writes it


def test_another_format_is_sent_whole_or_told(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(4)}, small := tmp_path / "small.ckpt")
    torch.save({"w": torch.ones(2_000_001)}, large := tmp_path / "large.pt")
    view = NetronView(small)
    assert view.shown == small.read_bytes()
    assert shipped(view)["refused"] == ""
    view = NetronView(str(large))
    assert view.shown == b""
    assert (
        shipped(view)["refused"]
        == "Netron is not shown this file: it has 8 MB, and only an ONNX file of more than 8 MB can be shown without its weights."
    )
    assert view.code == [f"NetronView({str(large)!r})"]


def test_what_is_no_single_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SelectionError, match="Netron shows one file"):
        NetronView({"w": torch.ones(2)})


def test_the_download_is_the_file_or_says_why_not(tmp_path: Path) -> None:
    onnx.save(model(), path := tmp_path / "m.onnx")
    view = NetronView(path)
    sent: list[Any] = []
    view.send = lambda content, buffers=None: sent.append((content, buffers))  # type: ignore[method-assign]
    view._receive(view, {"command": "download"}, [])
    assert sent == [({"download": "m.onnx"}, [path.read_bytes()])]
    path.write_bytes(path.read_bytes() + b"x")
    view._receive(view, {"command": "download"}, [])
    assert "changed" in view.error["message"]
    assert len(sent) == 1


def test_dangerous_files_say_so_first(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "it_ran"),)

    torch.save({"w": torch.ones(2), "x": Payload()}, path := tmp_path / "m.pt")
    findings = shipped(NetronView(path))["findings"]
    assert findings[0]["severity"] == "danger"
    assert not (tmp_path / "it_ran").exists()


# the server extension


def test_the_installed_netron_is_the_one_that_is_understood() -> None:
    """Its start page decides about telemetry and age by two lines; its script by the version and one cookie. A new netron may change them."""
    folder = netron_server._folder()
    page = (folder / "index.html").read_text()
    assert len(netron_server._VERSION.findall(page)) == 1
    assert len(netron_server._DATE.findall(page)) == 1
    quiet = netron_server.patched(page)
    assert '<meta name="version" content="0.0.0">' in quiet
    assert 'name="date"' not in quiet
    assert "http://" not in quiet.replace("http://www.w3.org/", "")
    assert "https://" not in quiet
    script = (folder / "browser.js").read_text()
    assert "packaged: this._meta.version && this._meta.version[0] !== '0.0.0'" in script
    assert "if (this._environment.packaged) {" in script
    assert "if (this._getCookie('consent')" in script
    assert "'open-file-dialog'" in script


@pytest.mark.parametrize("old", ['<meta name="version"', '<meta name="date"'])
def test_another_start_page_is_refused(old: str) -> None:
    page = (netron_server._folder() / "index.html").read_text()
    for changed in (page.replace(old, "<meta name='other'"), page + page):
        with pytest.raises(UnsupportedError, match="its telemetry cannot be switched off") as caught:
            netron_server.patched(changed)
        assert caught.value.hint == "pip install netron==9.3.3"


def test_the_extension_is_found_by_a_server_once_installed() -> None:
    (module,) = json.loads(SHIPPED.read_text())["ServerApp"]["jpserver_extensions"]
    points = importlib.import_module(module)._jupyter_server_extension_points()
    assert points == [{"module": module}]
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]
    assert build["wheel"]["shared-data"] == {"workbench/widgets/jupyter": "etc/jupyter"}


def test_the_extension_costs_the_server_little() -> None:
    code = "import sys, workbench.widgets.netron_server; print([m for m in ('torch', 'numpy', 'onnx', 'matplotlib', 'netron') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
