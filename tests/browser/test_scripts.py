"""The page and Python say the same: formats of cells, and what a filter matches. No notebook is needed here."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page

from workbench.errors import SelectionError, visible
from workbench.names import match_names
from workbench.tables import format_cell
from workbench.widgets.base import script
from workbench.widgets.explorer import is_pattern

NUMBERS = [
    0.0,
    -0.0,
    1.0,
    -1.5,
    0.1,
    1 / 3,
    2 / 3,
    123.456,
    1234.5,
    1233.5,
    -1234.5,
    0.5,
    2.5,
    12345.6,
    99995.0,
    999950.0,
    1e-4,
    9.9996e-5,
    1.3e-6,
    1e22,
    -7e-300,
    0.00012345,
]
SIZES = [0, 1, 999, 1000, 1024, 9_995, 44_700_000, 999_499, 999_500, 999_999, 1_000_000, 123_456_789_012, 5 * 10**15]
NAMES = [
    "layers.0.attn.q.weight", "layers.10.attn.q.weight", "layers.1.attn.q.bias", "a$b_{$c", "a.b", "axb", "x[0]", "(y)", "c\\d", "{0-1}", "e^f|g+h-i/j", "line\nbreak", "",
]  # fmt: skip
FILTERS = [
    "*", "layers.*", "*.weight", "layers.{0-1}.*", "layers.{1-10}.*.weight", "{3-2}*", "?.b", "a.b", "q.weight", "x[0]", "[0]", "(y)*", "*\\*", "a$b_{$c", "a$*", "{0-1}", "e^f|g+h-i/?",
    "re:layers\\.[01]\\..*", "re:.*bias", "re:(", "re:", "", " ", "*line*", "layers.??.*",
]  # fmt: skip


@pytest.fixture(scope="module")
def page(browser: Browser) -> Iterator[Page]:
    page = browser.new_page()
    page.add_script_tag(content=script("grid.js", "frame.js"))
    yield page
    page.close()


@pytest.mark.parametrize("value", [*NUMBERS, math.nan, math.inf, -math.inf])
def test_numbers_read_the_same(page: Page, value: float) -> None:
    shown = page.evaluate("(value) => formatCell('number', value)", str(value) if not math.isfinite(value) else value)
    assert shown == format_cell("number", value)
    if math.isfinite(value):
        assert page.evaluate("(value) => formatCell('percent', value)", value) == format_cell("percent", value)


@pytest.mark.parametrize("value", SIZES)
def test_sizes_and_counts_read_the_same(page: Page, value: int) -> None:
    assert page.evaluate("(value) => formatCell('bytes', value)", value) == format_cell("bytes", value)
    assert page.evaluate("(value) => formatCell('count', value)", value) == format_cell("count", value)


@pytest.mark.parametrize("value", [[], [1], [10, 512, 3]])
def test_shapes_and_gaps_read_the_same(page: Page, value: list[int]) -> None:
    assert page.evaluate("(value) => formatCell('shape', value)", value) == format_cell("shape", value)
    assert page.evaluate("() => formatCell('number', null)") == format_cell("number", None)


@pytest.mark.parametrize("filter", FILTERS)
def test_filters_match_the_same_names(page: Page, filter: str) -> None:
    names = [visible(name) for name in NAMES]
    matched = page.evaluate(
        "([filter, names]) => { const p = compileFilter(filter); return p === undefined ? 'invalid' : names.filter((name) => !p || p.test(name)); }",
        [filter, names],
    )
    if is_pattern(filter):
        try:
            assert matched == match_names(filter, names)
        except SelectionError:
            assert matched == "invalid"
    else:
        assert matched == [name for name in names if filter in name]


@pytest.mark.parametrize("width", [3, 4, 10, 11, 60])
def test_long_names_lose_their_middle(page: Page, width: int) -> None:
    name = "encoder.layers.10.attention.self.query.weight"
    cut = page.evaluate("([name, width]) => cut(name, width)", [name, width])
    assert len(cut) == min(width, len(name))
    if "…" in cut:
        head, tail = cut.split("…")
        assert name.startswith(head)
        assert name.endswith(tail)
