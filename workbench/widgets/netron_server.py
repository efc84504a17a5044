"""A Jupyter server extension: the installed netron's own page and scripts under `{base_url}wb-netron/`, changed so that it stays quiet.

Netron's page asks for consent to cookies, reports to Google Analytics, asks ipinfo.io for the country, and half a year after its
release refuses to start. All of that hangs on two lines of its index.html and on one cookie: the version is set to 0.0.0, the date is
dropped, the cookie is set for this path alone, and links leave for nowhere. A Content-Security-Policy forbids any other host, whatever
the scripts say. Nothing is written; the installed files stay as they are. Where the two lines are not found as expected the page is
refused with the reason, and the view shows its plain summary.

Served to those who are logged in; file names without folders, of five kinds, so no path leads out. No model passes through here.

    etc/jupyter/jupyter_server_config.d/workbench.json      turns it on when the package is installed
    jupyter server extension disable workbench.widgets.netron_server    turns it off
"""

from __future__ import annotations

import gzip
import importlib.metadata
import importlib.util
import mimetypes
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from jupyter_server.base.handlers import JupyterHandler
from jupyter_server.utils import url_path_join
from tornado import web

from workbench.errors import MissingDependencyError, UnsupportedError, WorkbenchError

_POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "worker-src 'self'",
        "connect-src 'self'",
        "img-src 'self' data: blob:",
        "style-src 'self' 'unsafe-inline'",
        "base-uri 'none'",
        "form-action 'none'",
    ]
)
_ASSET = r"([A-Za-z0-9_-]+\.(?:js|json|css|png|ico))"
_VERSION = re.compile(r'<meta name="version" content="[^"]*">')
_DATE = re.compile(r'<meta name="date" content="[^"]*">')
_LINK = re.compile(r'href="https?://[^"]*"')
_SHOWS = "X-Workbench-Netron"  # by this header the page knows this answer from a login page or a proxy's


def patched(page: str) -> str:
    """Netron's index.html without telemetry, age limit and links.

    Raises:
        UnsupportedError: the lines that decide about them are not where they were.
    """
    page, versions = _VERSION.subn('<meta name="version" content="0.0.0">', page)
    page, dates = _DATE.subn("", page)
    if (versions, dates) != (1, 1):
        raise UnsupportedError(
            f"netron {_version()} has another start page, in which its telemetry cannot be switched off; it is not served",
            hint="pip install netron==9.3.3",
        )
    return _LINK.sub('href="#"', page)


def _version() -> str:
    try:
        return importlib.metadata.version("netron")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _folder() -> Path:
    spec = importlib.util.find_spec("netron")
    if spec is None or spec.origin is None:
        raise MissingDependencyError("netron is not installed", hint="pip install netron")
    return Path(spec.origin).parent


@lru_cache(maxsize=64)
def _zipped(path: Path, _changed: int) -> bytes:
    """One file as it travels; some are 9 MB of text and a tenth of that zipped."""
    return gzip.compress(path.read_bytes(), compresslevel=6, mtime=0)


class _Handler(JupyterHandler):
    @property
    def content_security_policy(self) -> str:
        return f"{_POLICY}; {super().content_security_policy}"  # of two alike the first counts

    def set_default_headers(self) -> None:
        super().set_default_headers()
        self.set_header("Referrer-Policy", "same-origin")

    def _answer(self, path: Path) -> None:
        kind, _ = mimetypes.guess_type(path.name)
        self.set_header("Content-Type", "text/javascript" if path.suffix == ".js" else kind or "application/octet-stream")
        self.set_header("Cache-Control", "private, no-cache")
        self.set_header("Vary", "Accept-Encoding")
        if "gzip" in self.request.headers.get("Accept-Encoding", ""):
            self.set_header("Content-Encoding", "gzip")
            self.finish(_zipped(path, path.stat().st_mtime_ns))
        else:
            self.finish(path.read_bytes())


class _Page(_Handler):
    @web.authenticated
    def get(self) -> None:
        try:
            page = patched((_folder() / "index.html").read_text(encoding="utf-8"))
        except WorkbenchError as error:
            self.set_status(503)
            self.set_header("X-Workbench-Reason", error.message)
            self.set_header("Content-Type", "text/plain; charset=utf-8")
            self.finish(str(error))
            return
        self.set_header(_SHOWS, _version())
        self.set_header("Cache-Control", "private, no-cache")
        self.set_cookie("consent", "1", path=self.request.path, samesite="Strict")
        self.finish(page)

    head = get


class _Asset(_Handler):
    @web.authenticated
    def get(self, name: str) -> None:
        path = _folder() / name
        if not path.is_file():
            raise web.HTTPError(404)
        self._answer(path)

    head = get


def _jupyter_server_extension_points() -> list[dict[str, str]]:
    return [{"module": __name__}]


def _load_jupyter_server_extension(app: Any) -> None:
    base = url_path_join(app.web_app.settings["base_url"], "wb-netron/")
    app.web_app.add_handlers(".*$", [(re.escape(base), _Page), (re.escape(base) + _ASSET, _Asset)])
    app.log.info("workbench: netron %s at %s", _version(), base)
