"""Netron in the page, in a real JupyterLab under a prefix: its graph is there, no request leaves the server, and without the extension the summary stands in."""

from __future__ import annotations

import contextlib
import http.client
import importlib.metadata
import os
import urllib.parse
from pathlib import Path

import pytest
from jupyter_lab import TOKEN, Lab, enabled, serving
from playwright.sync_api import Browser, FrameLocator, Page, expect

MODEL = """
import numpy, onnx
from onnx import TensorProto, helper, numpy_helper
from workbench.widgets.netron import NetronView

def make(path, middle="MatMul", name="layer/one", width=1500):
    weight = numpy_helper.from_array(numpy.ones((width, width), numpy.float32), "weight")
    nodes = [helper.make_node(middle, ["input", "weight"], ["hidden"], name=name), helper.make_node("Softplus", ["hidden"], ["output"], name="layer/two")]
    value = lambda name: helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", width])
    graph = helper.make_graph(nodes, "graph", [value("input")], [value("output")], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
make("model.onnx")
"""
PATIENCE = 30_000  # ms until netron has started, on a busy machine
SHOW = "view = NetronView('model.onnx')\nview"


def netron(page: Page) -> FrameLocator:
    return page.frame_locator(".wb-netron iframe")


def saved(page: Page, folder: Path) -> bytes:
    with page.expect_download() as download:
        page.locator(".wb-netron .wb-panel").get_by_role("button", name="download").click()
    assert download.value.suggested_filename == "model.onnx"
    download.value.save_as(folder / "saved.onnx")
    return (folder / "saved.onnx").read_bytes()


def test_the_graph_is_shown_and_no_request_leaves_the_server(lab: Lab, tmp_path: Path) -> None:
    asked: list[str] = []
    received: list[int] = []
    lab.browser = watched(lab.browser, asked, received)
    page = lab.open(MODEL, SHOW)
    frame = netron(page)
    expect(frame.get_by_text("Softplus", exact=True)).to_be_visible(timeout=PATIENCE)
    expect(frame.get_by_text("MatMul", exact=True)).to_be_visible()
    for text in ("cookies", "Accept", "Please update"):
        expect(frame.get_by_text(text)).to_have_count(0)
    expect(page.locator(".wb-netron .wb-title")).to_contain_text("2 nodes of 2 operators, 1 input and 1 output")
    expect(page.locator(".wb-netron .wb-panel")).to_contain_text("Shown without the values of 1 tensor")
    expect(page.locator(".wb-netron .wb-foot code")).to_have_text("NetronView('model.onnx')")
    expect(page.locator(".wb-netron .wb-about")).to_be_hidden()
    page.get_by_role("button", name="Summary").click()
    expect(page.locator(".wb-netron .wb-about")).to_contain_text("Softplus")
    expect(page.locator(".wb-netron iframe")).to_be_hidden()
    page.get_by_role("button", name="Graph").click()
    expect(frame.get_by_text("Softplus", exact=True)).to_be_visible()
    assert max(received) < 200_000  # nine megabytes of weights have not crossed
    assert saved(page, tmp_path) == (lab.folder / "model.onnx").read_bytes()
    host = urllib.parse.urlsplit(lab.url).netloc
    assert {urllib.parse.urlsplit(url).netloc for url in asked if not url.startswith(("data:", "blob:"))} == {host}
    base = f"{lab.url}wb-netron/"
    assert {url[len(base) :].split("?")[0] for url in asked if url.startswith(base)} >= {"", "view.js", "onnx.js", "onnx-metadata.json"}


def watched(browser: Browser, asked: list[str], received: list[int]) -> Browser:
    """The browser, whose pages note every address that they or anything in them asks for, and the size of what comes by WebSocket."""

    class Watched:
        def new_page(self, **options: object) -> Page:
            page = browser.new_page(**options)  # type: ignore[arg-type]
            page.context.on("request", lambda request: asked.append(request.url))
            page.on(
                "websocket", lambda socket: (asked.append(socket.url), socket.on("framereceived", lambda data: received.append(len(data))))
            )
            return page

    return Watched()  # type: ignore[return-value]


OFF = "this server runs without the extension workbench.widgets.netron_server"
CHANGED = "Netron is not shown: netron 9.3.3 has another start page, in which its telemetry cannot be switched off"


@pytest.mark.parametrize("why", [OFF, CHANGED], ids=["no extension", "another netron"])
def test_where_netron_is_not_served_the_summary_and_the_download(why: str, browser: Browser, tmp_path: Path) -> None:
    other = tmp_path / "other" / "netron"
    other.mkdir(parents=True)
    (other / "__init__.py").touch()
    (other / "index.html").write_text('<meta name="version" content="99.0.0"><script src="view.js"></script>')
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_CONFIG_PATH", enabled(netron=why is CHANGED, folder=tmp_path / "off"))
        if why is CHANGED:
            patch.setenv("PYTHONPATH", str(other.parent))
        with serving(tmp_path) as address:
            lab = Lab(*address, browser)
            page = lab.open(MODEL, SHOW)
            expect(page.locator(".wb-netron .wb-why")).to_contain_text(why.replace("9.3.3", importlib.metadata.version("netron")))
            for text in ("inputs and outputs", "[batch, 1500]", "operators", "Softplus", "layer/two"):
                expect(page.locator(".wb-netron .wb-about")).to_contain_text(text)
            expect(page.locator(".wb-netron iframe")).to_have_count(0)
            assert saved(page, tmp_path) == (lab.folder / "model.onnx").read_bytes()
            lab.close_pages()


def test_names_of_a_stranger_are_text_in_both(lab: Lab) -> None:
    bad = "<img src=x onerror=__xss=1>"
    page = lab.open(MODEL, f"make('bad.onnx', middle={bad!r}, name={bad!r}, width=4)\nNetronView('bad.onnx')")
    expect(netron(page).get_by_text("Softplus", exact=True)).to_be_visible(timeout=PATIENCE)
    expect(netron(page).get_by_text("<img src=x…r=__xss=1>")).to_be_visible()
    page.get_by_role("button", name="Summary").click()
    expect(page.locator(f".wb-netron [title='{bad}']").first).to_be_visible()
    assert page.locator(".wb-netron img").count() == 0
    assert page.evaluate("[window.__xss, document.querySelector('.wb-netron iframe').contentWindow.__xss]") == [None, None]


def test_other_formats_whole_where_small_and_told_where_large(lab: Lab) -> None:
    page = lab.open(
        MODEL,
        "import torch\ntorch.save(torch.nn.Sequential(torch.nn.Linear(3, 2)).state_dict(), 'small.pt')\nNetronView('small.pt')",
        "torch.save({'w': torch.zeros(3_000_000)}, 'large.pt')\nNetronView('large.pt')",
    )
    expect(netron(page).get_by_text("weight", exact=True).first).to_be_visible(timeout=PATIENCE)
    second = page.locator(".wb-netron").nth(1)
    expect(second.locator(".wb-why")).to_contain_text(
        "it has 12 MB, and only an ONNX file of more than 8 MB can be shown without its weights"
    )
    expect(second.locator(".wb-about")).to_contain_text("[3000000]")
    expect(second.get_by_role("button", name="download · 12 MB")).to_be_visible()


def answer(url: str, path: str, *, token: bool = True, method: str = "GET") -> tuple[int, http.client.HTTPMessage, str]:
    """Status, headers and body for a path sent as it is, unlike a browser, which would tidy it first."""
    address = urllib.parse.urlsplit(url)
    with contextlib.closing(http.client.HTTPConnection(address.netloc, timeout=10)) as connection:
        connection.request(method, address.path + path, headers={"Authorization": f"token {TOKEN}"} if token else {})
        response = connection.getresponse()
        return response.status, response.headers, response.read().decode()


def test_what_the_server_gives_and_to_whom(server: tuple[str, Path]) -> None:
    url, _ = server
    status, headers, body = answer(url, "wb-netron/")
    assert status == 200
    assert '<meta name="version" content="0.0.0">' in body
    assert 'name="date"' not in body
    assert 'href="http' not in body
    assert headers["X-Workbench-Netron"]
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; worker-src 'self'; connect-src 'self'; ")
    assert "frame-ancestors 'self'" in policy
    assert "consent=1; Path=/user/somebody/wb-netron/" in " ".join(headers.get_all("Set-Cookie"))
    assert answer(url, "wb-netron/", method="HEAD")[1]["X-Workbench-Netron"]
    status, headers, _ = answer(url, "wb-netron/view.js")
    assert (status, headers["Content-Type"], headers["X-Content-Type-Options"]) == (200, "text/javascript", "nosniff")
    for path in ("wb-netron/", "wb-netron/view.js"):
        status, headers, body = answer(url, path, token=False)
        assert status in (302, 403)
        assert "X-Workbench-Netron" not in headers
        assert "etron" not in body


@pytest.mark.parametrize(
    "path",
    [
        "server.py", "__init__.py", "index.html", "nothing.js", ".js", "../view.js", "%2e%2e/view.js", "..%2fview.js", "a/../view.js", "/etc/passwd", "%2fetc%2fpasswd", "..%2f__init__.py", "view.js/",
        "view.js%00.css", "__pycache__/", "..\\view.js", "view.js%2f..%2fserver.py",
    ],
)  # fmt: skip
def test_no_other_path_is_served(server: tuple[str, Path], path: str) -> None:
    status, headers, body = answer(server[0], f"wb-netron/{path}")
    assert status in (302, 400, 404), body[:100]
    if status == 302:  # the server's own habit: a path that ends with a stroke is asked for again without
        assert headers["Location"].endswith(path.rstrip("/"))


def test_in_voila_on_the_same_server(server: tuple[str, Path], lab: Lab) -> None:
    page = lab.open(MODEL, SHOW)
    book = max(lab.folder.glob("*.ipynb"), key=os.path.getmtime).name
    voila = lab.browser.new_page(viewport={"width": 1280, "height": 900})
    voila.goto(f"{lab.url}voila/render/{book}?token={TOKEN}")
    expect(netron(voila).get_by_text("Softplus", exact=True)).to_be_visible(timeout=PATIENCE)
    voila.close()
    assert page
