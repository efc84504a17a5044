"""The error tree, and the one place where a low-level failure becomes ours.

    WorkbenchError(Exception)              message · where {path, tensor, record, offset, op} · hint
    ├─ FormatError(ValueError)             .partial holds what could still be listed
    │  ├─ UnknownFormatError               no reader knows these bytes
    │  ├─ CorruptFileError                 the bytes contradict their own format
    │  ├─ UnsupportedError                 a valid thing this library does not read or write
    │  │  └─ RemoteError                   a server refused, failed or fell silent
    │  └─ FileChangedError                 the file is not the one that was opened
    ├─ UntrustedError                      a program or class was asked to run, or to be written, without trust
    ├─ MissingShardError(FileNotFoundError)
    ├─ MissingFileError(FileNotFoundError)
    ├─ MissingDependencyError(ImportError) names the pip extra
    ├─ TensorNotFoundError(KeyError)       hint = close matches
    ├─ SelectionError(ValueError)          the names, options or values cannot serve this operation
    ├─ SpecMismatchError(ValueError)       a result is not what was declared, or a tensor does not fit
    ├─ BudgetError                         would pass max_ram_mb; hint = the plan that fits
    ├─ CancelledError                      the caller's cancel was set; nothing was written
    ├─ WriteError(OSError)                 disk full, read-only or vanished folder; the old file is intact
    └─ ReportFailedError                   only from Report.check()

Every text says what was expected, what was found, where, and what to do next. Owns nothing else;
a new error goes under the nearest parent and into this tree.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def visible(text: object) -> str:
    """Text from a file, safe on one line of a terminal: what does not print becomes an escape such as ``\\x1b``."""
    text = str(text)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


class WorkbenchError(Exception):
    """Base of every error this library raises on purpose.

    Attributes:
        message: what was expected and what was found, one sentence.
        where: any of path, tensor, record, offset, op.
        hint: what to do next, or None.
    """

    def __init__(self, message: str, *, hint: str | None = None, **where: Any) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.where = {key: value for key, value in where.items() if value is not None}

    def __str__(self) -> str:
        place = ", ".join(f"{key} {visible(value)}" for key, value in self.where.items())
        text = visible(self.message) + (f" [{place}]" if place else "")
        return text + (f"\n  {visible(self.hint)}" if self.hint else "")

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.__dict__))


def _rebuild(cls: type[WorkbenchError], state: dict[str, Any]) -> WorkbenchError:
    error = cls(state["message"], hint=state["hint"])
    error.__dict__.update(state)
    return error


class FormatError(WorkbenchError, ValueError):
    """A file could not be read as a checkpoint; `partial` is a Checkpoint of what was listed, or None."""

    partial: Any = None
    short = False  # whether more bytes might have helped


class UnknownFormatError(FormatError):
    """No reader knows these bytes."""


class CorruptFileError(FormatError):
    """The bytes contradict their own format: cut, damaged or forged."""


class UnsupportedError(FormatError):
    """A valid thing that this library does not read or write."""


class RemoteError(UnsupportedError):
    """A server refused, failed or fell silent."""


class FileChangedError(FormatError):
    """The file is no longer the one that was opened; its bytes are refused."""


class UntrustedError(WorkbenchError):
    """A program or class was asked to run, or to be written, without trust."""


class MissingFileError(WorkbenchError, FileNotFoundError):
    """There is no such file or folder."""


class MissingShardError(WorkbenchError, FileNotFoundError):
    """An index names a shard that is not there."""


class MissingDependencyError(WorkbenchError, ImportError):
    """A library behind an extra is not installed; the hint is the pip line."""


class TensorNotFoundError(WorkbenchError, KeyError):
    """No tensor of that name; the hint lists close matches."""


class SelectionError(WorkbenchError, ValueError):
    """The names, options or values chosen cannot serve this operation."""


class SpecMismatchError(WorkbenchError, ValueError):
    """A tensor has another shape or dtype than was declared or is needed."""


class BudgetError(WorkbenchError):
    """The operation would pass max_ram_mb; the hint is the plan that fits."""


class CancelledError(WorkbenchError):
    """The caller cancelled; no file was changed."""


class WriteError(WorkbenchError, OSError):
    """The file system refused a write; what stood there before is intact."""


class ReportFailedError(WorkbenchError):
    """A report was checked and its finding is negative."""


_CORRUPT = (struct.error, ValueError, EOFError, RecursionError, OverflowError, MemoryError, zlib.error)
_PLACE_AWARE = (WorkbenchError,)


@contextmanager
def located(**where: Any) -> Iterator[None]:
    """Add the place to any error that passes, once, and turn low-level errors into CorruptFileError.

    A place already named by deeper code is kept. OSErrors become WriteError or MissingFileError only where they name
    a missing file; other OSErrors pass as they are, for they tell of the machine, not of the file.
    """
    try:
        yield
    except _PLACE_AWARE as error:
        for key, value in where.items():
            if value is not None:
                error.where.setdefault(key, value)
        raise
    except _CORRUPT as error:
        found = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise CorruptFileError(f"the file is damaged or forged: {found}", **where) from error
