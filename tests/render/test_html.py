from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from render_samples import HOSTILE, XSS, Sample, SampleReport, finding, transformer

from workbench.errors import WriteError, visible
from workbench.render import html, plots, text
from workbench.tables import Column, format_cell, table

_VOID = {"img", "br", "hr", "input"}
_ALLOWED = {"style", "div", "span", "bdi", "details", "summary", "section", "h4", "table", "thead", "tbody", "tr", "th", "td", "code"}


class Page(HTMLParser):
    """Reads a page back: every tag must be one of ours and closed in order; texts are gathered by tag."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in _ALLOWED, f"<{tag}> is not ours"
        assert {name for name, _ in attrs} <= {"class", "title", "open", "style", "data-of"}
        assert dict(attrs).get("style") in (None, "text-align:left")
        self.attributes += [(tag, name, value) for name, value in attrs]
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert tag not in _VOID
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.texts.append((self.open[-1], data))

    @property
    def text(self) -> str:
        return "".join(data for _, data in self.texts)


@pytest.mark.parametrize("name", ["fc.weight", *HOSTILE])
@pytest.mark.parametrize("extra", [0, 200])
def test_text_and_html_show_the_same_sections(name: str, extra: int) -> None:
    report = SampleReport(name, rows=tuple((f"row {i}", "=", (i,), i, 0.5, 0.5, 0.5) for i in range(extra)))
    shown, page = text.render_report(report), Page(html.render_report(report))
    titles = [visible(t.title) for t in report.tables()]
    assert [data for tag, data in page.texts if tag == "h4"] == titles
    assert [block.splitlines()[0] for block in shown.split("\n\n")[1:]] == titles
    assert visible(report.headline) in page.text
    assert visible(report.headline) in shown
    for one in report.tables():
        for row in one.rows[: text.MAX_ROWS]:
            for column, value in zip(one.columns, row, strict=True):
                cell = format_cell(column.kind, value)
                assert cell in page.text
                assert cell in shown
    left_out = f"… {len(report.tables()[0].rows) - text.MAX_ROWS:,} more rows in tables()"
    assert (left_out in shown) == (left_out in page.text) == (extra > 0)


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_text_and_nothing_else(name: str) -> None:
    ckpt = Sample(
        {name: (1,), f"deep.{name}.x": (3,), "x.y": (2,)},
        name=name or "x",
        extras={name: name},
        findings=[finding(name, hint=name)],
        sections=[name],
    )
    source = html.render_checkpoint(ckpt)
    page = Page(source)
    assert visible(name) in page.text
    assert all(c.isprintable() or c == "\n" for c in source)


def test_title_attributes_are_escaped() -> None:
    name = XSS + "x" * 100
    page = Page(html.render_checkpoint(Sample({name: (1,)})))
    assert ("bdi", "title", name) in page.attributes


def test_dangerous_findings_come_before_the_tensors() -> None:
    findings = [finding("a warning", "warning"), finding("it calls os.system", hint="do not load it")]
    page = Page(html.render_checkpoint(Sample(transformer(), findings=findings))).text
    assert page.index("it calls os.system") < page.index("a warning") < page.index("embed.weight")
    assert page.index("do not load it") < page.index("a warning")


def test_same_checkpoint_gives_the_same_bytes() -> None:
    assert html.render_checkpoint(Sample(transformer())) == html.render_checkpoint(Sample(transformer()))


def test_the_tree_nests_like_the_text() -> None:
    source = html.render_checkpoint(Sample(transformer()))
    assert source.count("<details open>") == 1
    assert "model.layers.{0-11}" in source
    assert source.index("<details open>") > source.index("embed.weight")


def test_a_huge_checkpoint_stays_small() -> None:
    ckpt = Sample({f"m{i}.w": (i + 1,) for i in range(5000)})
    source = html.render_checkpoint(ckpt)
    assert len(source) < 200_000
    assert "… 4,600 more" in source


def test_words_are_left_and_numbers_right_whatever_the_page_says() -> None:
    source = html.render_report(SampleReport())
    assert '<td style="text-align:left"><bdi>fc.weight</bdi></td>' in source
    assert '<td style="text-align:left" data-of="shape">[10, 512]</td>' in source
    assert '<td class="wb-right" data-of="bytes">44.7 MB</td>' in source


def test_a_wide_table_says_how_much_room_it_needs_and_a_narrow_one_nothing() -> None:
    def widest(columns: int, text: str) -> int:
        return html.room_for(table("t", [Column(f"c{n}") for n in range(columns)], [[text] * columns]))

    assert [widest(columns, "0.0005693") for columns in (2, 4, 8, 16)] == [0, 360, 720, 2000]
    assert widest(3, "a sentence of many words that is wrapped " * 9) == 600
    assert html.room_for(table("t", [Column(f"a long heading {n}") for n in range(9)], [])) == 600
    source = html.render_table(table("t", [Column(f"c{n}") for n in range(16)], [["0.0005693"] * 16]))
    assert '<table class="wb-needs-2000">' in source
    assert "@container (max-width:1999px){.wb-static .wb-needs-2000 thead{display:none}" in html.STYLE
    assert "data-of" not in html.render_table(table("t", [Column("a"), Column("b")], [["1", "2"]]))


def test_a_page_stands_alone_and_holds_the_figures(tmp_path: Path) -> None:
    class Drawn(SampleReport):
        def plot(self) -> Any:
            return plots.parity_scatter([0.0, 1.0], [0.0, 1.1], self.headline)

    report = Drawn(XSS)
    path = report.save_html(tmp_path / "page.html")
    source = path.read_text(encoding="utf-8")
    assert source.startswith("<!DOCTYPE html>")
    assert "default-src 'none'" in source
    assert source.count('src="data:image/png;base64,iVBOR') == 1
    assert "<title>Drawn</title>" in source
    assert "<h1>Drawn</h1>" in source
    assert "@media (prefers-color-scheme:dark)" in source
    assert 'alt="&lt;img src=x onerror=&quot;window.__xss=1&quot;&gt; is as it should be"' in source
    assert not re.search(r"<script|<link|<[^>]*\son\w+=|https?:|@import|url\(", re.sub(' alt="[^"]*"', "", source))
    assert all(f"<h4>{html.escape(one.title)}</h4>" in source for one in report.tables())
    assert SampleReport().save_html(tmp_path / "plain.html").read_text(encoding="utf-8").count("<img") == 0
    with pytest.raises(WriteError):
        report.save_html(tmp_path / "none" / "page.html")


def test_no_line_ends_within_a_number() -> None:
    assert html.render_report(SampleReport("at most 1.5e-07 apart,")).count('at most <bdi class="wb-number">1.5e-07</bdi> apart,') == 1
