"""JupyterLab as the tests drive it: a server of its own, notebooks made of cells, and what the kernel wrote."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = os.environ.get("WORKBENCH_CHROMIUM", "/usr/bin/chromium")
TOKEN = "token"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]
# how many milliseconds pass from a text in the filter of a page's only frame to another count of rows
KEYSTROKE = """async (text) => {
  const input = document.querySelector('.wb-filter');
  const count = document.querySelector('.wb-shown');
  const before = count.textContent;
  const start = performance.now();
  input.value = text;
  input.dispatchEvent(new Event('input', { bubbles: true }));
  while (count.textContent === before) await new Promise(requestAnimationFrame);
  return performance.now() - start;
}"""
_FOLDERS = (
    "JUPYTER_CONFIG_DIR",
    "JUPYTER_DATA_DIR",
    "JUPYTER_RUNTIME_DIR",
    "IPYTHONDIR",
    "JUPYTERLAB_SETTINGS_DIR",
    "JUPYTERLAB_WORKSPACES_DIR",
)
_READY = "window.jupyterapp && window.jupyterapp.shell.currentWidget && window.jupyterapp.shell.currentWidget.sessionContext"
_KERNEL = "async () => { const s = window.jupyterapp.shell.currentWidget.sessionContext; await s.ready; await s.session.kernel.info; }"
_RUN_ALL = "async () => { await window.jupyterapp.commands.execute('notebook:run-all-cells'); }"
_ERRORS = """() => {
  const found = [];
  const cells = window.jupyterapp.shell.currentWidget.content.model.cells;
  for (let i = 0; i < cells.length; i += 1) {
    const cell = cells.get(i);
    if (cell.type !== 'code') continue;
    for (let j = 0; j < cell.outputs.length; j += 1) {
      const output = cell.outputs.get(j).toJSON();
      if (output.output_type === 'error') found.push([i, output.ename, output.evalue]);
    }
  }
  return found;
}"""
_PRELUDE = '''\
import json, os
import workbench as wb
from workbench.widgets import Differ, Explorer

def dump(view, path, *traits):
    """Write a view's traits to a file whenever one changes, whole or not at all."""
    def write(_change=None):
        with open(path + ".part", "w") as out:
            json.dump({name: getattr(view, name) for name in traits}, out)
        os.replace(path + ".part", path)
    view.observe(write, list(traits))
    write()
'''


class Lab:
    """A running JupyterLab and the folder it serves."""

    def __init__(self, url: str, folder: Path, browser: Browser) -> None:
        self.url, self.folder, self.browser = url, folder, browser
        self.pages: list[Page] = []

    def open(self, *cells: str, width: int = 1440) -> Page:
        """A page with a fresh notebook of the prelude and `cells`, run to the end without an error."""
        name = f"book_{time.time_ns()}.ipynb"
        book = {
            "cells": [
                {"cell_type": "code", "execution_count": None, "id": f"c{i}", "metadata": {}, "outputs": [], "source": source}
                for i, source in enumerate([_PRELUDE, *cells])
            ],
            "metadata": {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}},
            "nbformat": 4,
            "nbformat_minor": 5,
        }
        (self.folder / name).write_text(json.dumps(book))
        page = self.browser.new_page(viewport={"width": width, "height": 1000})
        self.pages.append(page)
        page.goto(f"{self.url}lab/workspaces/w{time.time_ns()}/tree/{name}?reset&token={TOKEN}")
        page.wait_for_function(_READY)
        page.evaluate(_KERNEL)
        page.evaluate(_RUN_ALL)
        assert page.evaluate(_ERRORS) == []
        return page

    def read(self, name: str, wanted: Callable[[Any], bool], seconds: float = 20.0) -> Any:
        """The file that the kernel dumped, as soon as it holds what is wanted."""
        path, value = self.folder / name, None
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            value = json.loads(path.read_text()) if path.exists() else None
            if value is not None and wanted(value):
                return value
            time.sleep(0.02)
        raise AssertionError(f"the kernel never said so; its last word was {value!r}")

    def close_pages(self) -> None:
        for page in self.pages:
            page.evaluate("async () => { const w = window.jupyterapp.shell.currentWidget; if (w) await w.sessionContext.shutdown(); }")
            page.close()
        self.pages.clear()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _environment(folder: Path) -> dict[str, str]:
    """Variables that keep the server apart from the user's own Jupyter, with the news pop-up off."""
    env = dict(os.environ)
    for key in _FOLDERS:
        own = folder / key.lower()
        own.mkdir()
        env[key] = str(own)
    settings = folder / "jupyterlab_settings_dir" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    text = json.dumps({"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True})
    (settings / "notification.jupyterlab-settings").write_text(text)
    env["PYTHONPATH"] = os.pathsep.join(part for part in (str(ROOT), env.get("PYTHONPATH", "")) if part)
    return env


def _await_server(url: str, process: subprocess.Popen[bytes], log: Path, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, f"JupyterLab stopped: {log.read_text()[-2000:]}"
        try:
            with urllib.request.urlopen(f"{url}api?token={TOKEN}", timeout=2):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.1)
    raise AssertionError(f"JupyterLab did not start: {log.read_text()[-2000:]}")


def enabled(*, netron: bool, folder: Path) -> str:
    """A folder of Jupyter's settings that turns the extension on or off, whatever is installed."""
    if netron:
        return str(ROOT / "workbench" / "widgets" / "jupyter")
    settings = folder / "jupyter_server_config.d"
    settings.mkdir(parents=True)
    text = (ROOT / "workbench/widgets/jupyter/jupyter_server_config.d/workbench.json").read_text()
    (settings / "workbench.json").write_text(text.replace("true", "false"))
    return str(folder)


@contextmanager
def serving(folder: Path) -> Iterator[tuple[str, Path]]:
    """A JupyterLab under a prefix, as on a hub: its address and the folder it serves."""
    (books := folder / "books").mkdir()
    port, base = _free_port(), "/user/somebody/"
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--allow-root"]
    command += [f"--ServerApp.root_dir={books}", f"--IdentityProvider.token={TOKEN}", f"--ServerApp.base_url={base}"]
    command += ["--ServerApp.port_retries=0", "--LabApp.expose_app_in_browser=True"]
    log = folder / "server.log"
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=_environment(folder), start_new_session=True, stdout=out, stderr=subprocess.STDOUT)
        url = f"http://127.0.0.1:{port}{base}"
        try:
            _await_server(url, process, log)
            yield url, books
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(timeout=90)
