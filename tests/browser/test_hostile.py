"""Names that a stranger chose are text everywhere: in the explorer, its panel, the differ and the static HTML. Dangerous files say so first."""

from __future__ import annotations

import re

from jupyter_lab import Lab
from playwright.sync_api import expect

NAMES = [
    '<img src=x onerror="window.__xss=1">',
    "a$b_{$c",
    "bell\x07escape\x1b[31mred",
    "right\u202eleft",
    "</script><script>window.__xss=1</script>",
]
OPEN = f"""
import torch
names = {NAMES!r}
ckpt = wb.open({{name: torch.arange(4.0) for name in names}})
other = wb.open({{name: torch.arange(4.0) + 1 for name in names}})
"""
DANGER = """
import collections, pickle, torch, zipfile
class Payload:
    def __reduce__(self):
        return (eval, ("__import__('pathlib').Path('it_ran').touch()",))
torch.save({"model": {"fc.weight": torch.ones(2, 3)}, "extra": Payload()}, "danger.pt")
ckpt = wb.open("danger.pt")
view = Explorer(ckpt)
view
"""


def visible(name: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def test_hostile_names_are_text(lab: Lab) -> None:
    page = lab.open(
        OPEN,
        "view = Explorer(ckpt, mode='table')\nview",
        "from IPython.display import HTML\nHTML(ckpt._repr_html_())",
        "Differ(wb.diff(ckpt, other))",
    )
    outputs = page.locator(".jp-OutputArea-output")
    explorer, static, differ = (outputs.nth(i) for i in range(3))
    for name in NAMES:
        for place in (explorer.locator(f'[title="{css(visible(name))}"]').first, differ.locator(f'[title="{css(visible(name))}"]').first):
            expect(place).to_be_attached()
        expect(static).to_contain_text(visible(name))
    for i in range(len(NAMES)):
        explorer.locator(".wb-grid-row:visible").nth(i).click()
        expect(explorer.locator(".wb-panel img")).to_have_attribute("alt", "histogram of " + visible(NAMES[i]))
        expect(explorer.locator(".wb-heading")).to_have_text(visible(NAMES[i]))
        differ.locator(".wb-grid-row:visible").nth(i).click()
        expect(differ.locator(".wb-heading")).to_have_text(re.compile(".+"))
    assert page.evaluate("window.__xss") is None
    assert page.locator(".jp-OutputArea-output img:not(.wb-figure)").count() == 0


def css(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


def test_dangerous_file_shows_findings_first(lab: Lab) -> None:
    page = lab.open(DANGER)
    findings = page.locator(".wb-findings")
    expect(findings).to_be_visible()
    expect(findings.locator(".wb-danger").first).to_contain_text("eval")
    tensors = page.locator(".wb-grid-row").first
    expect(tensors).to_be_visible()
    above, below = findings.bounding_box(), tensors.bounding_box()
    assert above
    assert below
    assert above["y"] < below["y"]
    flag = page.get_by_role("button", name=re.compile("finding"))
    flag.click()
    expect(findings).to_be_hidden()
    expect(flag).to_have_attribute("aria-expanded", "false")
    assert not (lab.folder / "it_ran").exists()
