"""Notebook 01 runs from top to bottom: every textbook recipe does what its prose says, and nothing in the stranger's file ran."""

from __future__ import annotations

from typing import Any

import pytest

_FACTS = """
    "ran": (work / "it_ran").exists(),
    "dangerous": [bool(wb.scan(work / "stranger.pt")), bool(wb.scan(work / "stranger_safe.pt"))],
    "snippet": scan.snippet,
    "formats": [wb.open(work / "digits_old.pt").format, wb.open(work / "digits_whole.pt").format],
    "devices": [f.kind for f in wb.open(work / "digits_gpu.pt").findings],
"""


@pytest.fixture(scope="module")
def book(run_notebook: Any) -> Any:
    return run_notebook("01_basic_save_load.ipynb", _FACTS)


def test_nothing_fails_and_nothing_is_said_on_stderr(book: Any) -> None:
    assert book.complaints() == []


def test_the_strangers_file_is_named_and_mended_and_never_run(book: Any) -> None:
    assert book.facts["ran"] is False
    assert book.facts["dangerous"] == [False, True]


def test_the_false_alarm_is_told_with_the_lines_that_allow_it(book: Any) -> None:
    assert "safe_globals" in book.facts["snippet"]


def test_every_old_line_still_fails_as_the_table_says(book: Any) -> None:
    (output,) = book.outputs("for line, run in gone.items()")
    lines = output.text.splitlines()
    assert len(lines) == 7
    assert not [line for line in lines if line.endswith("works")]


def test_the_containers_are_told_apart(book: Any) -> None:
    assert book.facts["formats"] == ["torch-legacy", "torch-zip"]
    assert book.facts["devices"] == ["device storages"]


def test_it_fits_on_a_small_machine(book: Any) -> None:
    assert book.peak_mb < 1200
