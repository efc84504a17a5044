"""The compressor: measured, moved along its frontier, narrowed, scored and saved by hand; what the page shows is what the library says."""

from __future__ import annotations

from jupyter_lab import Lab
from playwright.sync_api import expect

import workbench as wb

BOOK = """
import torch
from torch import nn
from workbench.widgets import Compressor
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))
x = torch.randn(200, 64)
y = model(x).argmax(1)
def accuracy(model):
    return float((model(x).argmax(1) == y).float().mean())
view = Compressor(model.state_dict(), model, accuracy)
dump(view, "compress.json", "state", "sizes", "code", "error")
view
"""


def test_from_measure_to_a_file_that_is_as_small_as_predicted(lab: Lab) -> None:
    page = lab.open(BOOK)
    expect(page.get_by_text("Measure reads")).to_be_visible()
    page.get_by_role("button", name="Measure").click()
    rows = page.locator(".wb-grid-row:visible .wb-label")
    expect(rows).to_have_count(3)
    handle = page.get_by_role("slider", name="budget")
    start = lab.read("compress.json", lambda told: told["sizes"])
    handle.focus()
    page.keyboard.press("End")
    whole = lab.read("compress.json", lambda told: told["sizes"]["bars"][1][1] == told["sizes"]["bars"][0][1])
    expect(page.locator(".wb-budget")).to_contain_text("100 %")
    assert start["sizes"]["bars"][1][1] < whole["sizes"]["bars"][1][1]
    page.keyboard.press("Home")
    small = lab.read("compress.json", lambda told: told["state"]["point"] == 0)
    assert small["sizes"]["bars"][1][1] < start["sizes"]["bars"][1][1]

    page.get_by_role("button", name="Score before and after").click()
    lab.read("compress.json", lambda told: told["sizes"]["scores"])
    expect(page.locator(".wb-scores")).to_contain_text("score 1 →")
    page.get_by_role("textbox", name="path").fill("small.safetensors")
    page.get_by_role("button", name="Save", exact=True).click()
    saved = lab.read("compress.json", lambda told: told["sizes"]["bars"][2][1] is not None)
    predicted, real = (saved["sizes"]["bars"][i][1] for i in (1, 2))
    assert predicted == real == wb.open(lab.folder / "small.safetensors").nbytes
    assert saved["error"] == {}
    assert saved["code"][-1].startswith("wb.save(wb.ops.quantize(ckpt, plan=plan.schemes)")


def test_what_is_selected_can_stay_as_it_is_and_a_refusal_is_told(lab: Lab) -> None:
    page = lab.open(BOOK)
    page.get_by_role("button", name="Measure").click()
    rows = page.locator(".wb-grid-row:visible .wb-label")
    rows.filter(has_text="4.weight").click()
    expect(page.locator(".wb-panel")).to_contain_text("int8 g32")
    page.get_by_role("button", name="leave as it is").click()
    expect(rows).to_have_count(2)
    assert lab.read("compress.json", lambda told: told["state"]["exclude"])["state"]["exclude"] == "4.weight"
    page.get_by_role("textbox", name="exclude").fill("*")
    page.get_by_role("button", name="Measure").click()
    expect(page.get_by_role("alert")).to_contain_text("there is nothing to try")
    expect(rows).to_have_count(2)
