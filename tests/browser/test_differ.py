"""The differ: kinds as filters, most changed first, and the way back to the kernel."""

from __future__ import annotations

from jupyter_lab import Lab
from playwright.sync_api import expect

BOOKS = """
import torch
base = {f"layers.{i}.{part}.weight": torch.full((4, 4), 1.0 + i) for i in range(4) for part in ("q", "k")}
a = wb.open({**base, "gone.weight": torch.ones(2), "head.weight": torch.ones(3, 2)})
changed = {**base, "new.weight": torch.ones(2), "head.weight": torch.ones(5, 2)}
changed["layers.1.q.weight"] = changed["layers.1.q.weight"] * 1.1
changed["layers.3.k.weight"] = changed["layers.3.k.weight"] * 3
b = wb.open(changed)
view = Differ(wb.diff(a, b))
dump(view, "diff.json", "kinds", "selected", "filter", "state")
view
"""


def test_kinds_are_filters_and_the_most_changed_come_first(lab: Lab) -> None:
    page = lab.open(BOOKS)
    labels = page.locator(".wb-grid-row:visible .wb-label")
    chip = page.locator(".wb-chips")
    expect(chip.get_by_role("button", name="1 added")).to_have_text("+1")
    expect(chip.get_by_role("button", name="1 removed")).to_have_text("−1")
    expect(chip.get_by_role("button", name="2 changed")).to_have_text("~2")
    expect(chip.get_by_role("button", name="6 equal")).to_have_text("=6")
    shown = labels.all_text_contents()
    assert shown[0] == "head.weight"
    assert set(shown[1:3]) == {"gone.weight", "new.weight"}
    assert shown[3:] == ["layers.3.k.weight", "layers.1.q.weight"]
    chip.get_by_role("button", name="6 equal").click()
    expect(labels).to_have_count(11)
    chip.get_by_role("button", name="2 changed").click()
    expect(labels).to_have_count(9)
    state = lab.read("diff.json", lambda state: "equal" in state["kinds"])
    assert "changed" not in lab.read("diff.json", lambda state: "changed" not in state["kinds"])["kinds"]
    assert state["selected"] == []
    page.get_by_role("searchbox", name="filter").fill("head")
    expect(labels).to_have_count(1)
    labels.first.click()
    lab.read("diff.json", lambda state: state["selected"] == ["head.weight"])
    expect(page.locator(".wb-panel")).to_contain_text("[3, 2] → [5, 2]")
    expect(page.locator(".wb-foot code")).to_have_text("wb.diff(a, b, names='head.weight')")


def test_layers_as_a_heat_map(lab: Lab) -> None:
    page = lab.open(BOOKS)
    page.get_by_role("button", name="By layer").click()
    expect(page.get_by_role("img", name="relative change by layer")).to_be_visible()
    page.wait_for_function("() => document.querySelector('.wb-about img').naturalWidth > 300")
    expect(page.locator(".wb-grid")).to_be_hidden()
    page.locator(".wb-rail").get_by_role("button", name="Rows").click()
    expect(page.locator(".wb-grid")).to_be_visible()


def test_nothing_differs_is_a_finding_in_a_low_frame(lab: Lab) -> None:
    page = lab.open("import torch\na = wb.open({f'w{i}': torch.ones(i) for i in range(18)})", "Differ(wb.diff(a, a))")
    expect(page.get_by_text("Nothing differs: 18 tensors are equal")).to_be_visible()
    middle = page.locator(".wb-middle")
    low = middle.bounding_box()
    page.get_by_role("button", name="show =18").click()
    expect(page.get_by_text("18 of 18")).to_be_visible()
    expect(page.get_by_role("button", name="18 equal")).to_have_attribute("aria-pressed", "true")
    high = middle.bounding_box()
    assert low
    assert high
    assert low["height"] < 0.5 * high["height"] <= 220
