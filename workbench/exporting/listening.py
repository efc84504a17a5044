"""Listening: what a noisy library prints, logs and warns becomes text, and nothing reaches the screen.

The exporters of torch write progress with emoji to stdout, log through handlers of their own, print graphs from C++ past
Python's streams, and warn of deprecations the caller cannot help. All of it is kept, kind by kind. What other threads print through
`sys.stdout` goes where it went; warnings, and what they write to file descriptors 1 and 2, belong to the process and are heard too.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TextIO

_LOGGERS = ("torch", "onnxscript", "onnx_ir", "onnx")


@dataclass
class Heard:
    """What was said inside `listening`; complete once the `with` is left."""

    text: str = ""


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.extend(f"{record.levelname.lower()}: {record.getMessage()}".splitlines())


class _OwnThread(io.StringIO):
    """Holds what the thread that made it writes, and passes on to the stream before what any other does."""

    def __init__(self, before: TextIO) -> None:
        super().__init__()
        self._before, self._owner = before, threading.get_ident()

    def write(self, text: str, /) -> int:
        return super().write(text) if threading.get_ident() == self._owner else self._before.write(text)


@contextlib.contextmanager
def listening(heard: Heard) -> Iterator[None]:
    """Collect stdout, stderr, logs and warnings of the block in `heard`, whether it raises or not. Repeated lines are kept once."""
    out, err, collector, native = _OwnThread(sys.stdout), _OwnThread(sys.stderr), _Collector(), list[str]()
    with warnings.catch_warnings(record=True) as caught, _logs_to(collector):
        warnings.simplefilter("always")
        try:
            with _native_output(native), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                yield
        finally:
            warned = [f"{w.category.__name__}: {w.message}" for w in caught]
            lines = [*out.getvalue().splitlines(), *err.getvalue().splitlines(), *native, *collector.lines, *warned]
            heard.text = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(dict.fromkeys(lines)))


@contextlib.contextmanager
def _native_output(lines: list[str]) -> Iterator[None]:
    """What C++ code writes to file descriptors 1 and 2."""
    saved = [(fd, os.dup(fd)) for fd in (1, 2)]
    with tempfile.TemporaryFile() as file:
        try:
            for fd, _ in saved:
                os.dup2(file.fileno(), fd)
            yield
        finally:
            for fd, copy in saved:
                os.dup2(copy, fd)
                os.close(copy)
            file.seek(0)
            lines.extend(file.read().decode("utf-8", "replace").splitlines())


@contextlib.contextmanager
def _logs_to(collector: logging.Handler) -> Iterator[None]:
    """Every logger of the exporters that has handlers, or heads a family, speaks to `collector` alone."""
    known = [name for name in logging.root.manager.loggerDict if name.split(".")[0] in _LOGGERS]
    loggers = [logging.getLogger(name) for name in {*known, *_LOGGERS}]
    before = [(log, log.handlers[:], log.propagate) for log in loggers if log.handlers or log.name in _LOGGERS]
    try:
        for log, _, _ in before:
            log.handlers[:], log.propagate = [collector], False
        yield
    finally:
        for log, handlers, propagate in before:
            log.handlers[:], log.propagate = handlers, propagate
