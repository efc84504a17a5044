"""What the notebooks took, told at the end of the run: measured, not judged."""

from __future__ import annotations

from typing import Any

import pytest

_MEASURED: dict[str, str] = {}


@pytest.fixture(scope="session")
def measured() -> dict[str, str]:
    """Notebook -> what running it took, in words."""
    return _MEASURED


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for name, text in _MEASURED.items():
        terminalreporter.write_line(f"{name}: {text}")
