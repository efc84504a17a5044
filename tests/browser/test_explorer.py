"""The explorer with 50,000 tensors, by mouse and by keyboard; what the page does must reach the kernel and come back."""

from __future__ import annotations

from jupyter_lab import KEYSTROKE, Lab
from playwright.sync_api import Locator, Page, expect

BIG = """
import torch
pool = torch.zeros(50_000, 2, 3)
parts = ["attn.q.weight", "attn.k.weight", "mlp.up.weight", "mlp.down.weight", "norm.weight"]
names = [f"decoder.layers.{i}.experts.{j}.{part}" for i in range(100) for j in range(100) for part in parts]
tensors = dict(zip(names, pool))
tensors["head.weight"] = torch.arange(600.0).reshape(20, 30)
ckpt = wb.open(tensors)
"""
SHOW = """
view = Explorer(ckpt)
dump(view, "state.json", "filter", "selected", "mode", "state", "code")
view
"""
BUILD = """
import time
start = time.perf_counter()
view = Explorer(ckpt)
with open("built.json", "w") as out:
    json.dump(time.perf_counter() - start, out)
dump(view, "state.json", "filter", "selected", "mode")
"""
SMALL = """
import torch
ckpt = wb.open({
    "embed.weight": torch.arange(12.0).reshape(3, 4),
    **{f"layers.{i}.{part}.weight": torch.full((2, 2 + i), float(i)) for i in range(3) for part in ("q", "k")},
    "head.bias": torch.zeros(2, dtype=torch.int64),
})
"""
_PAINT = """async () => {
  const start = performance.now();
  const done = window.jupyterapp.commands.execute('notebook:run-cell');
  while (!document.querySelector('.wb-grid-row .wb-label')?.textContent) await new Promise(requestAnimationFrame);
  const painted = performance.now() - start;
  await done;
  return painted;
}"""


def rows(page: Page) -> Locator:
    return page.locator(".wb-frame .wb-grid-row:visible")


def names(page: Page) -> list[str]:
    return page.locator(".wb-frame .wb-grid-row:visible .wb-label").all_text_contents()


def row(page: Page, name: str) -> Locator:
    return rows(page).filter(has=page.locator(f'[title="{name}"]'))


def grid(page: Page) -> Locator:
    return page.locator(".wb-frame .wb-grid")


def test_fifty_thousand_rows(lab: Lab) -> None:
    page = lab.open(BIG, BUILD)
    page.evaluate("() => { const n = window.jupyterapp.shell.currentWidget.content; n.activeCellIndex = n.model.cells.length - 1; }")
    page.evaluate("async () => { await window.jupyterapp.commands.execute('notebook:insert-cell-below'); }")
    page.evaluate("(source) => window.jupyterapp.shell.currentWidget.content.activeCell.model.sharedModel.setSource(source)", "view")
    painted = page.evaluate(_PAINT)
    expect(grid(page)).to_have_attribute("role", "treegrid")
    expect(page.get_by_role("status").get_by_text("50,001 of 50,001")).to_be_visible()
    assert rows(page).count() < 80, "only the rows in sight are in the page"
    page.get_by_role("button", name="table", exact=True).click()
    expect(grid(page)).to_have_attribute("aria-rowcount", "50002")
    assert rows(page).count() < 80
    waits = [page.evaluate(KEYSTROKE, text) for text in ("4", "42.experts.7", "decoder.layers.42.experts.7.*.weight")]
    built = 1000 * lab.read("built.json", bool)
    print(
        f"\n50,001 tensors: view built in {built:.0f} ms, first paint {painted:.0f} ms, filter keystroke to repaint {', '.join(f'{wait:.0f}' for wait in waits)} ms (70 ms of it debounce)"
    )
    expect(page.get_by_text("5 of 50,001")).to_be_visible()
    row(page, "decoder.layers.42.experts.7.mlp.up.weight").click()
    state = lab.read("state.json", lambda state: state["selected"] and state["filter"])
    assert state["selected"] == ["decoder.layers.42.experts.7.mlp.up.weight"]
    assert state["filter"] == "decoder.layers.42.experts.7.*.weight"
    assert state["mode"] == "table"
    expect(page.locator(".wb-panel")).to_contain_text("[2, 3]")
    expect(page.locator(".wb-foot code")).to_contain_text("decoder.layers.42.experts.7.mlp.up.weight")


def test_scrolling_to_the_end_paints_the_last_rows(lab: Lab) -> None:
    page = lab.open(BIG, SHOW)
    page.get_by_role("button", name="table", exact=True).click()
    page.locator(".wb-grid-scroll").evaluate("(scroller) => { scroller.scrollTop = scroller.scrollHeight; }")
    expect(row(page, "head.weight")).to_be_visible()
    page.locator(".wb-grid-scroll").evaluate("(scroller) => { scroller.scrollTop = 0; }")
    expect(row(page, "head.weight")).to_have_count(0)
    grid(page).focus()
    page.keyboard.press("End")
    expect(row(page, "head.weight")).to_be_visible()
    expect(row(page, "head.weight")).to_have_attribute("aria-rowindex", "50002")


def test_keyboard_alone(lab: Lab) -> None:
    page = lab.open(SMALL, SHOW)
    assert names(page) == [
        "embed.weight",
        "layers.0.q.weight",
        "layers.0.k.weight",
        "layers.1.q.weight",
        "layers.1.k.weight",
        "layers.2.q.weight",
        "layers.2.k.weight",
        "head.bias",
    ]
    grid(page).focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    lab.read("state.json", lambda state: state["selected"] == ["layers.0.q.weight"])
    page.keyboard.press("End")
    page.keyboard.press("Space")
    lab.read("state.json", lambda state: state["selected"] == ["layers.0.q.weight", "head.bias"])
    page.keyboard.press("Home")
    page.keyboard.press("Shift+ArrowDown")
    page.keyboard.press("/")
    expect(page.get_by_role("searchbox", name="filter")).to_be_focused()
    page.keyboard.type("k.weight")
    lab.read("state.json", lambda state: state["filter"] == "k.weight")
    expect(page.get_by_text("3 of 8")).to_be_visible()
    page.keyboard.press("ArrowDown")
    expect(grid(page)).to_be_focused()
    page.keyboard.press("Home")
    active = grid(page).get_attribute("aria-activedescendant")
    expect(page.locator(f"#{active}")).to_contain_text("layers.0.k.weight")
    page.keyboard.press("Enter")
    lab.read("state.json", lambda state: state["selected"] == ["layers.0.k.weight"])


def test_tree_opens_and_closes(lab: Lab) -> None:
    page = lab.open(BIG, SHOW)
    group = rows(page).first
    expect(group).to_contain_text("decoder.layers.{0-99}")
    expect(group).to_have_attribute("aria-expanded", "false")
    grid(page).focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    expect(group).to_have_attribute("aria-expanded", "true")
    expect(rows(page).nth(1)).to_have_attribute("aria-level", "2")
    lab.read("state.json", lambda state: bool(state["state"]["expanded"]))
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    expect(group).to_have_attribute("aria-expanded", "false")
    group.click()
    expect(group).to_have_attribute("aria-expanded", "true")


def test_sorting(lab: Lab) -> None:
    page = lab.open(SMALL, SHOW)
    page.get_by_role("button", name="table", exact=True).click()
    size = page.get_by_role("columnheader", name="size")
    size.get_by_role("button").click()
    expect(size).to_have_attribute("aria-sort", "descending")
    assert names(page)[0] == "embed.weight"
    size.get_by_role("button").click()
    expect(size).to_have_attribute("aria-sort", "ascending")
    expect(rows(page).first).to_contain_text(" B")
    assert names(page)[-1] == "embed.weight"
    lab.read("state.json", lambda state: state["state"]["sort"] == ["nbytes", 1])
    page.get_by_role("columnheader", name="name").get_by_role("button").click()
    expect(rows(page).first).to_contain_text("embed.weight")
    assert names(page)[1] == "head.bias"


def test_python_changes_the_page(lab: Lab) -> None:
    page = lab.open(
        SMALL,
        SHOW,
        "view.filter = 'layers.*.q.weight'\nview.selected = ['layers.1.q.weight']\nassert len(view.matching) == 3\nassert list(view.selection) == ['layers.1.q.weight']",
    )
    expect(page.get_by_text("3 of 8")).to_be_visible()
    expect(row(page, "layers.1.q.weight")).to_have_attribute("aria-selected", "true")
    expect(page.locator(".wb-panel")).to_contain_text("layers.1.q.weight")


def test_panel_shows_values_statistics_and_histogram(lab: Lab) -> None:
    page = lab.open(SMALL, SHOW)
    row(page, "embed.weight").click()
    panel = page.locator(".wb-panel")
    expect(panel.get_by_role("img", name="histogram of embed.weight")).to_be_visible()
    for fact in ("float32", "[3, 4]", "48 B", "0, 1, 2, 3, 4, 5, 6, 7 …", "5.5", "11"):
        expect(panel).to_contain_text(fact)
    assert panel.locator("img").evaluate("(image) => image.naturalWidth") > 300
    expect(page.locator(".wb-foot code")).to_have_text("wb.stats(ckpt, names='embed.weight')")
    page.get_by_role("button", name="statistics", exact=True).click()
    expect(page.get_by_role("columnheader", name="mean")).to_be_visible()
    headings = page.locator(".wb-grid-head .wb-sort").all_text_contents()
    expect(row(page, "layers.2.q.weight").get_by_role("gridcell").nth(headings.index("mean"))).to_have_text("2")


def test_checkpoint_at_the_end_of_a_cell_is_live(lab: Lab) -> None:
    page = lab.open(SMALL, "from workbench.widgets import register\nassert register()\nckpt")
    expect(grid(page)).to_be_visible()
    row(page, "embed.weight").click()
    expect(page.locator(".wb-panel")).to_contain_text("[3, 4]")


def test_saved_notebook_keeps_a_static_table(lab: Lab) -> None:
    page = lab.open(SMALL, SHOW)
    expect(grid(page)).to_be_visible()
    output = page.evaluate("() => window.jupyterapp.shell.currentWidget.content.model.cells.get(2).outputs.get(0).toJSON()")
    assert {"application/vnd.jupyter.widget-view+json", "text/html"} <= set(output["data"])
    assert "embed.weight" in "".join(output["data"]["text/html"])


def test_narrow_page_puts_the_panel_below(lab: Lab) -> None:
    page = lab.open(SMALL, SHOW, width=900)
    middle, panel, rail = (page.locator(f".wb-{part}").bounding_box() for part in ("middle", "panel", "rail"))
    assert middle
    assert panel
    assert rail
    assert panel["y"] >= middle["y"] + middle["height"] - 1
    assert rail["y"] + rail["height"] <= middle["y"] + 1
    assert page.locator(".wb-frame").evaluate("(frame) => frame.scrollWidth <= frame.clientWidth + 1")


def test_long_labels_of_the_rail_lose_their_middle(lab: Lab) -> None:
    section = "a_rather_long_name_of_a_state_dict"
    page = lab.open(
        f"import torch\nckpt = wb.open({{'{section}': {{'w': torch.ones(2)}}, 'model': {{'w': torch.ones(2)}}}})", "Explorer(ckpt)"
    )
    label = page.locator(f".wb-rail-label[title^='{section}']")
    expect(label).to_contain_text("…")
    shown = label.text_content() or ""
    assert section.startswith(shown.split("…")[0])
    assert section.endswith(shown.split("…")[1])
    assert label.evaluate("(node) => node.scrollWidth <= node.clientWidth")
    expect(page.locator(".wb-rail-label", has_text="model")).to_have_text("model")
