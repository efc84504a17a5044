"""The exporter in a real browser: chosen, exported, read, drawn and cancelled by mouse and by keyboard, and every name is text."""

from __future__ import annotations

from jupyter_lab import Lab
from playwright.sync_api import Locator, Page, expect

SAMPLE = """
import torch
from workbench.widgets import Exporter
class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 2, 3)
        self.fc = torch.nn.Linear(72, 3)
    def forward(self, image):
        return self.fc(torch.relu(self.conv(image)).flatten(1))
class Branch(torch.nn.Module):
    def forward(self, x):
        return x + 1 if x.sum() > 0 else x - 1
net, branch, images = Net(), Branch(), torch.randn(4, 1, 8, 8)
"""
SHOW = """
def show(view):
    def written(_=None):
        told = {"code": list(view.code), "files": view.files, "error": view.error, "pane": view.state["pane"], "target": view.state["target"]}
        told |= {"ok": None if view.exported is None else bool(view.exported), "compared": {k: bool(r) for k, r in view.compared.items()}}
        with open("export.json.part", "w") as out:
            json.dump(told, out)
        os.replace("export.json.part", "export.json")
    view.observe(written, ["code", "error", "state", "job", "rows"])
    written()
    return view
"""
PATIENCE = 90_000  # ms for an export on a busy machine


def opened(lab: Lab, view: str, *, sample: str = SAMPLE, width: int = 1440) -> Page:
    return lab.open(sample, SHOW, f"show({view})", width=width)


def row(page: Page, target: str) -> Locator:
    return page.locator(".wb-exporter .wb-grid-row:visible").filter(has=page.get_by_title(target, exact=True))


def panel(page: Page) -> Locator:
    return page.locator(".wb-exporter .wb-panel")


def rail(page: Page, pane: str) -> Locator:
    return page.locator(".wb-exporter .wb-rail").get_by_role("button", name=pane)


def export(page: Page) -> Locator:
    return page.locator(".wb-exporter .wb-form").get_by_role("button", name="Export")


def test_chosen_exported_and_looked_at_by_mouse(lab: Lab) -> None:
    page = opened(lab, "Exporter()")
    model, inputs = page.get_by_role("combobox", name="model"), page.get_by_role("combobox", name="inputs")
    expect(model.locator("option")).to_have_text(["choose a model", "net · Net · 956 B", "branch · Branch · 0 B", "module:function …"])
    model.select_option("net")
    inputs.select_option("images")
    targets = page.get_by_role("group", name="targets")
    expect(targets.get_by_role("checkbox", name="onnx")).to_be_checked()
    targets.get_by_role("checkbox", name="pt2").check()
    expect(row(page, "pt2")).to_contain_text("not made yet")
    page.get_by_role("checkbox", name="any batch size").check()
    export(page).click()
    expect(row(page, "pt2")).to_contain_text("made and proved", timeout=PATIENCE)
    expect(row(page, "onnx")).to_contain_text("made and proved")
    state = lab.read("export.json", lambda state: state["ok"])
    assert (
        state["code"][-1]
        == "report = wb.export_model(net, images, to=('onnx', 'pt2'), folder='exported', dynamic_axes={'image': {0: 'batch'}})"
    )
    expect(page.locator(".wb-foot code")).to_have_text(state["code"][-1])
    assert sorted(path.name for path in (lab.folder / "exported").iterdir()) == ["net.onnx", "net.pt2"]
    expect(page.locator(".wb-exporter .wb-status")).to_have_text("net: ✓ 2 of 2 made and proved")
    row(page, "onnx").click()
    expect(panel(page)).to_contain_text("image [batch, 1, 8, 8]")
    panel(page).get_by_role("button", name="compare on made inputs").click()
    expect(panel(page)).to_contain_text("On made inputs: ", timeout=PATIENCE)
    assert lab.read("export.json", lambda state: state["compared"])["compared"] == {"onnx": True}
    panel(page).get_by_role("button", name="show graph").click()
    expect(page.frame_locator(".wb-exporter iframe").get_by_text("Conv", exact=True)).to_be_visible(timeout=PATIENCE)
    rail(page, "Report").click()
    expect(page.locator(".wb-exporter .wb-table caption").first).to_have_text("targets")
    expect(page.locator(".wb-exporter .wb-about:visible").get_by_text("made and proved")).to_have_count(0)  # the panel tells it
    page.set_viewport_size({"width": 800, "height": 1000})
    expect(page.locator(".wb-exporter .wb-about:visible .wb-table td[data-of='max abs']").first).to_have_css("display", "block")
    assert page.locator(".wb-exporter .wb-about:visible").evaluate("(node) => node.scrollWidth <= node.clientWidth")
    rail(page, "Figures").click()
    expect(page.locator(".wb-exporter .wb-about:visible img")).to_have_count(4, timeout=PATIENCE)  # sizes, two targets, made inputs


def test_by_keyboard_what_fails_opens_to_cause_and_cure(lab: Lab) -> None:
    page = opened(lab, "Exporter(targets=('torchscript', 'pt2'))")
    page.locator(".wb-exporter .wb-title").click()  # Lab gives the keys to the cell that is active
    page.get_by_role("combobox", name="model").press_sequentially("branch")
    expect(page.locator(".wb-exporter .wb-title")).to_contain_text("branch")
    page.keyboard.press("Tab")
    page.keyboard.type("shapes")
    page.keyboard.press("Tab")
    expect(page.get_by_role("textbox", name="inputs: shapes, or several")).to_be_focused()
    page.keyboard.type("4y4")
    export(page).focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("'4y4' is no input")
    expect(page.get_by_role("alert")).to_contain_text("write a variable's name, 1x3x32x32")
    page.get_by_role("textbox", name="inputs: shapes, or several").fill("4x4")
    export(page).focus()
    page.keyboard.press("Space")
    expect(page.locator(".wb-heading")).to_have_text("⚠ pt2", timeout=PATIENCE)  # the first that failed
    expect(page.get_by_role("alert")).to_have_count(0)
    expect(panel(page)).to_contain_text("the model chooses a branch or a size by the values of a tensor")
    expect(panel(page)).to_contain_text("torch.where")
    grid = page.get_by_role("grid", name="targets")
    grid.focus()
    grid.press("Home")
    grid.press("Enter")
    expect(page.locator(".wb-heading")).to_have_text("✓ torchscript")
    grid.press("c")
    state = lab.read("export.json", lambda state: state["compared"])
    assert state["code"][-4:-1][-2].startswith("args = (torch.randn((4, 4)")
    grid.press("g")
    lab.read("export.json", lambda state: state["pane"] == "graph")
    expect(page.locator(".wb-exporter iframe")).to_be_visible()


def test_cancelled_between_two_targets_while_the_kernel_answers(lab: Lab) -> None:
    slow = """
import workbench.widgets.exporter as module
real = module.export_model
os.mkfifo("go")
def slow(*args, **kwargs):
    open("go").close()  # until the test opens it too
    return real(*args, **kwargs)
module.export_model = slow
"""
    page = opened(lab, "Exporter('net', 'images', targets=('torchscript', 'pt2'))", sample=SAMPLE + slow)
    export(page).click()
    expect(page.locator(".wb-job")).to_contain_text("torchscript · 1 of 2")
    expect(export(page)).to_be_disabled()
    rail(page, "Which file").click()
    page.get_by_role("checkbox", name="Must it run without Python?").check()
    expect(page.locator(".wb-heading")).to_have_text("ONNX (.onnx)")
    expect(page.get_by_role("img", name="Choose ONNX")).to_be_visible(timeout=PATIENCE)
    page.locator(".wb-job").get_by_role("button", name="cancel").click()
    expect(page.locator(".wb-job")).to_contain_text("stops after it")
    (lab.folder / "go").write_bytes(b"")
    expect(page.locator(".wb-job")).to_have_count(0, timeout=PATIENCE)
    panel(page).get_by_role("button", name="choose onnx").click()
    expect(page.locator(".wb-exporter .wb-status")).to_have_text("net: 1 of 2 made and proved, 1 cancelled")
    expect(row(page, "torchscript")).to_contain_text("made and proved")
    expect(row(page, "pt2")).to_contain_text("cancelled before it began")
    expect(row(page, "onnx")).to_contain_text("not made yet")
    expect(export(page)).to_be_enabled()


def test_names_are_text(lab: Lab) -> None:
    evil = '<img src=x onerror="window.__xss=1">'
    sample = f"""
evil = {evil!r}
def forward(self, x):
    raise ValueError(evil)
Bad = type(evil, (torch.nn.Module,), {{"forward": forward}})
bad, good = Bad(), type(evil, (torch.nn.Module,), {{"forward": lambda self, x: x + 1}})()
x = torch.ones(2)
"""
    page = opened(lab, "Exporter('bad', 'x', targets=('pt2',))", sample=SAMPLE + sample)
    expect(page.locator(".wb-exporter .wb-title")).to_contain_text("onerror")
    export(page).click()
    expect(page.get_by_role("alert")).to_contain_text("the model does not run on the example inputs: ValueError: <img", timeout=PATIENCE)
    page.get_by_role("combobox", name="model").select_option(label="module:function …")
    page.get_by_role("textbox", name="model: module:function").fill(evil + ":f")
    expect(panel(page)).to_contain_text("Export imports <img")
    export(page).click()
    expect(page.get_by_role("alert")).to_contain_text("gives no model")
    assert page.evaluate("window.__xss") is None
    assert page.locator(".wb-exporter img").count() == 0


def test_narrow(lab: Lab) -> None:
    page = opened(lab, "Exporter('net', 'images', targets='torchscript')", width=800)
    expect(row(page, "torchscript").get_by_role("gridcell")).to_have_text(["torchscript", "·", "not made yet", "–"])  # none is cut
    middle, below = page.locator(".wb-exporter .wb-middle").bounding_box(), panel(page).bounding_box()
    assert middle
    assert below
    assert below["y"] >= middle["y"] + middle["height"] - 1
    assert page.locator(".wb-exporter").evaluate("(node) => node.scrollWidth <= node.clientWidth + 1")
    assert page.locator(".wb-exporter .wb-grid").evaluate("(node) => node.clientHeight") > 60
    expect(page.locator(".wb-exporter .wb-grid-scroll")).to_have_css("overflow-y", "auto")  # no dead scroll bar beside one row
