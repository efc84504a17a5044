"""View: the one frame that every widget sits in. A view holds no logic; it maps commands from the page to core functions.

Synced traits:
    report   what is shown, shipped once, as JSON bytes in columns
    state    what the person has set: filter, selection, order, where they are
    detail   the panel on the right
    job      what is running, or empty
    code     the lines of Python that did what was done, the last one current
    error    the last failure in the library's own words, or empty

The page may send only the commands named in `commands`; anything else is refused and shown. Long work runs in a thread, so the
notebook stays usable and cancel is seen at once.
"""

from __future__ import annotations

import contextvars
import json
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import anywidget
import traitlets as t

from workbench.errors import CancelledError, SelectionError, WorkbenchError, visible
from workbench.render.html import room_for, stacking
from workbench.render.text import MAX_ROWS
from workbench.tables import Table, format_cell
from workbench.widgets.jobs import Job, job_line, memory

STATIC = Path(__file__).parent / "static"
_TICK_SECONDS = 0.1
_MAX_CODE_LINES = 200
_log = logging.getLogger(__name__)


def script(*names: str) -> str:
    """Plain files joined into the one module that the page loads, whose last one exports `render`, or into its one sheet of styles."""
    return "\n".join((STATIC / name).read_text(encoding="utf-8") for name in names)


STYLES = script("workbench.css") + stacking(".wb-frame")


def to_json(value: Any) -> bytes:
    """Compact JSON; the caller has passed what may not be finite through `finite`."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def finite(value: Any) -> Any:
    """A number that JSON can hold: NaN and infinities become their text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def finding_dicts(findings: Any) -> list[dict[str, Any]]:
    """Findings as the page shows them, with unprintable characters made visible."""
    return [
        {
            "severity": f.severity,
            "message": visible(f.message),
            "hint": visible(f.hint) if f.hint else None,
            "tensor": f.where.get("tensor"),
        }
        for f in findings
    ]


def table_dict(table: Table) -> dict[str, Any]:
    """A table as the page draws it, every cell in the words of `format_cell`."""
    columns = [{"title": c.title, "right": c.right_aligned, "wraps": c.kind in ("text", "code"), "note": c.note} for c in table.columns]
    rows = [[format_cell(c.kind, cell) for c, cell in zip(table.columns, row, strict=True)] for row in table.rows[:MAX_ROWS]]
    told = {"title": visible(table.title), "columns": columns, "rows": rows, "needs": room_for(table)}
    return {**told, "empty": table.empty, "more": len(table.rows) - len(rows)}


class View(anywidget.AnyWidget):
    """Base of every view; a subclass sets `_esm`, `commands`, and fills `report`."""

    _css = STYLES
    commands: ClassVar[dict[str, str]] = {"cancel": "cancel"}

    report = t.Bytes(b"{}").tag(sync=True)
    state = t.Dict().tag(sync=True)
    detail = t.Dict().tag(sync=True)
    job = t.Dict().tag(sync=True)
    code = t.List(t.Unicode()).tag(sync=True)
    error = t.Dict().tag(sync=True)

    def __init__(self, report: dict[str, Any], state: dict[str, Any]) -> None:
        self._jobs: dict[str, Job] = {}
        self._asked: dict[str, Any] = {}
        self._lock = threading.RLock()
        super().__init__(report=to_json(report), state=state)
        self.on_msg(self._receive)

    def _static_html(self) -> str:
        raise TypeError(f"{type(self).__name__} defines no static form")

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        """The live view, and beside it the static table that a saved notebook keeps."""
        bundle = super()._repr_mimebundle_(**kwargs)
        data, metadata = bundle if isinstance(bundle, tuple) else (bundle or {}, {})
        return {**data, "text/html": self._static_html()}, metadata

    def _receive(self, _view: Any, content: Any, _buffers: Any) -> None:
        self._asked, self.error = content if isinstance(content, dict) else {}, {}
        name = str(self._asked.get("command", "nothing"))
        with self._explained():
            if name not in self.commands:
                known = ", ".join(sorted(self.commands))
                raise SelectionError(f"this view has no command {name!r}", hint=f"it has {known}")
            getattr(self, self.commands[name])()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Show a failure where it was caused; the rest of the view keeps what it knew."""
        try:
            yield
        except WorkbenchError as error:
            place = ", ".join(f"{key} {visible(value)}" for key, value in error.where.items())
            self.error = {"message": visible(error.message) + (f" [{place}]" if place else ""), "hint": visible(error.hint or "")}
        except Exception as error:
            _log.exception("a view met an unexpected error")
            self.error = {
                "message": f"{type(error).__name__}: {visible(error)}",
                "hint": "this is a bug in the view; its log has the trace",
            }

    def _did(self, line: str) -> None:
        """Record the one line of Python that does what was just done."""
        with self._lock:
            if not self.code or self.code[-1] != line:
                self.code = [*self.code[-_MAX_CODE_LINES:], line]

    def _start(self, slot: str, label: str, work: Callable[[Job], None], *, shown: bool) -> None:
        """Run `work` in a thread; the job that held the slot is cancelled first. A shown job has a line with progress and cancel."""
        with self._lock:
            self._stop(slot)
            job = self._jobs[slot] = Job(label, shown)
        self.error = {}
        if shown:
            self.job = {"label": label, "text": label, "fraction": None, "memory": memory()}
        context = contextvars.copy_context()
        job.thread = threading.Thread(target=context.run, args=(self._run, slot, job, work), name=f"workbench {label}", daemon=True)
        job.thread.start()

    def _run(self, slot: str, job: Job, work: Callable[[Job], None]) -> None:
        try:
            with self._explained():
                try:
                    work(job)
                except CancelledError:
                    _log.debug("%s was cancelled", job.label)
        finally:
            with self._lock:
                if self._jobs.get(slot) is job:
                    del self._jobs[slot]
                    if job.shown:
                        self.job = {}

    def _stop(self, slot: str) -> None:
        if job := self._jobs.pop(slot, None):
            job.cancel.set()

    def cancel(self) -> None:
        """Stop what runs, between two blocks; numbers that were complete before stay."""
        with self._lock:
            for slot in list(self._jobs):
                self._stop(slot)
            self.job = {}

    def wait(self, seconds: float = 60.0) -> None:
        """Wait until nothing runs, nor what that has started; for scripts and tests."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            threads = [job.thread for job in list(self._jobs.values()) if job.thread not in (None, threading.current_thread())]
            if not threads:
                return
            threads[0].join(left)

    def _ticker(self, job: Job) -> Callable[[Any], None]:
        """A `progress=` callable that updates the page about ten times a second."""
        last = 0.0

        def tick(progress: Any) -> None:
            nonlocal last
            now = time.monotonic()
            if job.shown and job.current and now - last >= _TICK_SECONDS:
                last = now
                self.job = job_line(job.label, progress)

        return tick
