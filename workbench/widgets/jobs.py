"""Work in a thread, and the line that tells of it."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workbench.stream import Progress
from workbench.tables import format_bytes, format_seconds


@dataclass
class Job:
    """One piece of work in a thread. `cancel` is what core functions watch; `current` tells whether its result is still wanted."""

    label: str
    shown: bool
    cancel: threading.Event = field(default_factory=threading.Event)
    thread: threading.Thread | None = None

    @property
    def current(self) -> bool:
        return not self.cancel.is_set()


def job_line(label: str, progress: Progress) -> dict[str, Any]:
    """Progress as the page shows it: how far, how fast, how long still."""
    fraction = progress.done / progress.total if progress.total else None
    parts = [label if fraction is None else f"{label} {100 * fraction:.0f} %"]
    if progress.seconds > 0 and progress.done:
        parts.append(f"{format_bytes(progress.done / progress.seconds)}/s")
        parts.append(f"{format_seconds((progress.total - progress.done) * progress.seconds / progress.done)} left")
    return {"label": label, "text": " · ".join(parts), "fraction": fraction, "memory": memory()}


def memory() -> str:
    """Resident memory of this process, where the system tells it."""
    status = Path("/proc/self/statm")
    if not status.exists():
        return ""
    return f"memory {format_bytes(int(status.read_text().split()[1]) * os.sysconf('SC_PAGE_SIZE'))}"
