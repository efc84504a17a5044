"""Take the README's picture: run the tour in a real JupyterLab and photograph its explorer.

    python notebooks/screenshot.py [file.png]        # notebooks/workbench.png where no file is named

Needs the `test` extra and Debian's Chromium. The server is the browser tests' own; it is stopped at the end.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests" / "browser"))

from jupyter_lab import CHROMIUM, FLAGS, TOKEN, serving

TOUR = "00_tour.ipynb"
CELL, UNFOLDED, SELECTED = "ckpt = wb.open", "features", "3.weight"
BOOK = "window.jupyterapp.shell.currentWidget"


def run_tour(page: Page, url: str) -> None:
    page.goto(f"{url}lab/tree/{TOUR}?reset&token={TOKEN}")
    page.wait_for_function("window.jupyterapp?.shell.currentWidget?.sessionContext")
    page.evaluate(f"async () => {{ const s = {BOOK}.sessionContext; await s.ready; await s.session.kernel.info; }}")
    page.evaluate("async () => { await window.jupyterapp.commands.execute('application:toggle-left-area'); }")
    page.evaluate("async () => { await window.jupyterapp.commands.execute('notebook:run-all-cells'); }")


def show_explorer(page: Page) -> None:
    """The cell that opens the checkpoint at the top, one tensor selected, its histogram drawn by the kernel."""
    sources = page.evaluate(f"() => Array.from({BOOK}.content.model.cells).map(cell => cell.sharedModel.getSource())")
    index = next(i for i, source in enumerate(sources) if source.startswith(CELL))
    page.evaluate(f"async () => {{ {BOOK}.content.activeCellIndex = {index}; await {BOOK}.content.scrollToItem({index}, 'start'); }}")
    frame = page.locator(".wb-frame:visible").first
    frame.locator(f'.wb-grid-row [title="{UNFOLDED}"]').first.click()
    page.keyboard.press("ArrowRight")
    frame.locator(f'.wb-grid-row [title="{SELECTED}"]').first.click()
    frame.locator("img").wait_for()
    page.mouse.move(0, 0)
    page.wait_for_timeout(500)


def main() -> None:
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "workbench.png"
    with tempfile.TemporaryDirectory() as temporary, serving(Path(temporary)) as (url, books), sync_playwright() as playwright:
        shutil.copy(HERE / TOUR, books)
        browser = playwright.chromium.launch(executable_path=CHROMIUM, headless=True, args=[*FLAGS, "--hide-scrollbars"])
        page = browser.new_page(viewport={"width": 1280, "height": 860})
        run_tour(page, url)
        show_explorer(page)
        page.screenshot(path=target)
        page.evaluate(f"async () => {{ await {BOOK}.sessionContext.shutdown(); }}")
        browser.close()


if __name__ == "__main__":
    main()
