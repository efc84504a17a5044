"""Static HTML: what a saved notebook keeps. No script, no ids; every piece of text passes through `escape`.

Theme colours come from JupyterLab's variables with fallbacks. Where a sanitizer strips the style block, what is left is a plain
table or a plain folding list.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from workbench.errors import visible
from workbench.render.outline import Head, Line, Node, head, lines, tree
from workbench.render.text import MAX_ROWS, SEVERITY, extras_line, glob_beside, line_cells
from workbench.tables import Column, Table, format_cell, shorten

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from workbench.report import Report

MAX_LINES = 400
_OPEN_ROWS = 40  # a tree this small starts unfolded

DARKENED = "filter:invert(.88) hue-rotate(180deg)"  # a white figure on a dark page: greys turn over, colours keep their hue
_STEPS = (360, 480, 600, 720, 840, 1000, 2000)  # pixels
_LONG = 24  # letters; a longer sentence is wrapped


def stacking(scope: str) -> str:
    """Where a table has less room than it needs, each row flows on as pairs of heading and value: nothing is cut, nothing lies outside."""
    return "\n".join(
        f"@container (max-width:{width - 1}px){{{at} thead{{display:none}}{at},{at} tbody{{display:block}}"
        f"{at} tr{{display:flex;flex-wrap:wrap;column-gap:16px;padding:2px 0}}{at} td,{at} td.wb-right{{display:block;min-width:0;padding:0;text-align:left;white-space:normal;overflow-wrap:anywhere}}"
        f"{at} td.wb-text,{at} td.wb-code{{flex:1 1 100%}}"
        f"{at} td[data-of]::before{{content:attr(data-of);margin-right:.5em;color:var(--jp-ui-font-color2,#555)}}}}"
        for width, at in ((width, f"{scope} .wb-needs-{width}") for width in _STEPS)
    )


STYLE = (
    """<style>
.wb-static{container-type:inline-size;font:13px/1.5 var(--jp-ui-font-family,system-ui,sans-serif);color:var(--jp-ui-font-color1,#1f1f1f);max-width:1000px}
.wb-static .wb-name,.wb-static td,.wb-static summary,.wb-static .wb-leaf{font-family:var(--jp-code-font-family,monospace);
 font-size:12px;font-variant-numeric:tabular-nums;unicode-bidi:isolate}
.wb-static .wb-head{font-weight:600;border-bottom:1px solid var(--jp-border-color2,#ddd);padding:2px 0 4px;margin-bottom:4px}
.wb-static .wb-head span{font-weight:400;color:var(--jp-ui-font-color2,#555)}
.wb-static .wb-number{white-space:nowrap}
.wb-static .wb-danger{border-left:3px solid #d55e00;padding-left:8px;margin:4px 0}
.wb-static .wb-warning{border-left:3px solid #e69f00;padding-left:8px;margin:4px 0}
.wb-static .wb-info,.wb-static .wb-quiet{color:var(--jp-ui-font-color2,#555)}
.wb-static table{border-collapse:collapse;margin:2px 0 10px}
.wb-static th{text-align:left;font-weight:600;border-bottom:1px solid var(--jp-border-color1,#bbb);padding:1px 12px 1px 0}
.wb-static td{text-align:left;padding:1px 12px 1px 0;white-space:nowrap;vertical-align:top}
.wb-static td.wb-text{white-space:normal;min-width:16em}
.wb-static td.wb-code{white-space:pre-wrap;overflow-wrap:anywhere;min-width:16em}
.wb-static section{overflow-x:auto}
.wb-static .wb-right{text-align:right}
.wb-static h4{font-size:13px;font-weight:600;margin:8px 0 2px}
.wb-static details>*:not(summary){margin-left:18px}
.wb-static .wb-row{display:inline-grid;grid-template-columns:minmax(160px,30em) 4em 6em 11em auto;column-gap:8px;vertical-align:top}
.wb-static .wb-leaf{padding-left:14px}
.wb-static .wb-row>*:nth-child(2),.wb-static .wb-row>*:nth-child(3){text-align:right}
"""
    + stacking(".wb-static")
    + "</style>"
)
_PICTURE = f"""<style>.wb-picture{{display:block;max-width:100%}}
body[data-jp-theme-light="false"] .wb-picture,body.vscode-dark .wb-picture{{{DARKENED}}}</style>"""
_PAGE = f"""<style>:root{{color-scheme:light dark}}body{{margin:24px;background:#fff}}img{{display:block;max-width:100%;margin:12px 0}}
h1{{font:600 20px/1.4 system-ui,sans-serif;margin:0 0 8px}}@media (prefers-color-scheme:dark){{body{{background:#1b1b1b;color:#e4e4e4;
--jp-ui-font-color1:#e4e4e4;--jp-ui-font-color2:#adadad;--jp-border-color1:#6a6a6a;--jp-border-color2:#4a4a4a}}img{{{DARKENED}}}}}</style>"""


def escape(text: object) -> str:
    """The only way a value becomes HTML: unprintable characters made visible, then markup characters escaped."""
    return html.escape(visible(text), quote=True)


def _prose(text: object) -> str:
    """A sentence in which no line ends within a number: browsers would break 1.5e-07 after its minus."""
    return re.sub(r"[\d.]+e-\d+", r'<bdi class="wb-number">\g<0></bdi>', escape(text))


def render_report(report: Report, between: Sequence[str] = ()) -> str:
    """The headline, then every table under its title: the same sections as the text. `between`: HTML to stand before the tables."""
    mark = "✓" if report.ok else "✗"
    return _framed([f'<div class="wb-head">{mark} {_prose(report.headline)}</div>', *between, *map(render_table, report.tables())])


def render_page(report: Report) -> str:
    """A whole page: `render_report` with the report's figures in it as pictures. Its own policy forbids it to run or load anything."""
    title = escape(" ".join(re.findall("[A-Z][^A-Z]*|.+", type(report).__name__)).capitalize())  # ExportReport: Export report
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}"><title>{title}</title>'
    shown = render_report(report, [_image(figure, dpi=200) for figure in report.figures()])
    return f"<!DOCTYPE html><html><head>{head}{_PAGE}</head><body><h1>{title}</h1>{shown}</body></html>\n"


def render_figure(figure: Figure) -> str:
    """A figure at the end of a cell, on the theme's ground: in a dark one its white is turned."""
    return _PICTURE + _image(figure)


def _image(figure: Figure, *, dpi: int = 110) -> str:
    from workbench.render.plots import data_uri, title_of, to_png

    width = round(110 * figure.get_figwidth())
    return f'<img class="wb-picture" src="{data_uri(to_png(figure, dpi=dpi))}" alt="{escape(title_of(figure))}" width="{width}">'


def render_table(table: Table) -> str:
    """One table under its title; a long one says how many rows it leaves out."""
    title = f"<h4>{escape(table.title)}</h4>"
    if not table.rows:
        return f'<section>{title}<div class="wb-quiet">{escape(table.empty)}</div></section>'
    headings = "".join(f"<th{_aligned(c)}{_note(c)}>{escape(c.title)}</th>" for c in table.columns)
    room = room_for(table)
    needs = f' class="wb-needs-{room}"' if room else ""
    rows = "".join(f"<tr>{_cells(table.columns, row, headed=bool(room))}</tr>" for row in table.rows[:MAX_ROWS])
    more = f'<div class="wb-quiet">… {len(table.rows) - MAX_ROWS:,} more rows in tables()</div>' if len(table.rows) > MAX_ROWS else ""
    return f"<section>{title}<table{needs}><thead><tr>{headings}</tr></thead><tbody>{rows}</tbody></table>{more}</section>"


def room_for(table: Table) -> int:
    """About the width in pixels, one of a few steps, below which a row does not stand beside its headings; 0 where any will do."""
    if len(table.columns) < 3:
        return 0
    texts = [[max(c.title.split(), key=len, default="") for c in table.columns]]
    texts += [
        [format_cell(c.kind, v)[: _LONG if _wraps(c, v) else 64] for c, v in zip(table.columns, row, strict=True)]
        for row in table.rows[:MAX_ROWS]
    ]
    letters = [max(map(len, column)) for column in zip(*texts, strict=True)]
    width = sum(12 + 7.3 * count for count in letters)
    return next((step for step in _STEPS if width <= step), _STEPS[-1]) if width > 300 else 0


def render_checkpoint(ckpt: Any) -> str:
    """The title, the findings, then the folded tree."""
    title = head(ckpt)
    return render_outline(title, tree(ckpt, title.aliases), extras_line(ckpt))


def render_outline(title: Head, root: Node, extras: str = "") -> str:
    """`render_checkpoint` for a caller that has the outline already."""
    parts = [f'<div class="wb-head"><bdi>{escape(title.name)}</bdi> <span>{escape(" · ".join(title.parts))}</span></div>']
    parts += [_finding(finding) for finding in title.findings]
    rows = lines(root)
    parts += _tree(rows[:MAX_LINES], is_open=len(rows) <= _OPEN_ROWS)
    if len(rows) > MAX_LINES:
        call = f"ckpt.select({glob_beside(rows[MAX_LINES].first)!r})"
        parts.append(f'<div class="wb-quiet">… {len(rows) - MAX_LINES:,} more, <code>{escape(call)}</code></div>')
    if extras:
        parts.append(f'<div class="wb-quiet">{escape(extras)}</div>')
    return _framed(parts)


def _framed(parts: Sequence[str]) -> str:
    # the two further classes keep JupyterLab from typesetting what stands between two dollar signs in a stranger's name
    return f'{STYLE}<div class="wb-static tex2jax_ignore mathjax_ignore">{"".join(parts)}</div>'


def _finding(finding: Any) -> str:
    severity = finding.severity if finding.severity in SEVERITY else "info"
    hint = f'<div class="wb-quiet">{escape(finding.hint)}</div>' if finding.hint else ""
    return f'<div class="wb-{severity}">{SEVERITY[severity]} {escape(finding.message)}{hint}</div>'


def _tree(rows: Sequence[Line], *, is_open: bool) -> Iterator[str]:
    """Rows nested in <details>; depth only ever grows by one, so each step down closes what it leaves."""
    depth = 0
    for row in rows:
        yield "</details>" * (depth - row.depth)
        depth = row.depth
        depth += row.group
        yield f"<details{' open' * is_open}><summary>{_row(row)}</summary>" if row.group else f'<div class="wb-leaf">{_row(row)}</div>'
    yield "</details>" * depth


def _row(row: Line) -> str:
    whole = f' title="{escape(row.label)}"' if len(row.label) > 48 else ""
    cells = "".join(f"<span>{escape(cell)}</span> " for cell in line_cells(row))
    return f'<span class="wb-row"><bdi{whole}>{escape(shorten(visible(row.label), 48))}</bdi> {cells}</span>'


def _aligned(column: Column) -> str:
    """Numbers to the right; the rest to the left in the tag itself, because JupyterLab's own rule for tables outweighs a style block."""
    return ' class="wb-right"' if column.right_aligned else ' style="text-align:left"'


def _note(column: Column) -> str:
    return f' title="{escape(column.note)}"' if column.note else ""


def _cells(columns: Sequence[Column], row: Sequence[Any], *, headed: bool) -> str:
    cells = enumerate(zip(columns, row, strict=True))
    return "".join(f"<td{_aligned(c)}{_headed(c) if headed and n else ''}{_wraps(c, v)}>{_cell(c, v)}</td>" for n, (c, v) in cells)


def _headed(column: Column) -> str:
    """What stands before the value where headings have no room; the first column speaks for itself."""
    return f' data-of="{escape(column.title)}"' if column.title else ""


def _wraps(column: Column, value: Any) -> str:
    return f' class="wb-{column.kind}"' if column.kind in ("text", "code") and len(format_cell(column.kind, value)) > _LONG else ""


def _cell(column: Column, value: Any) -> str:
    text = format_cell(column.kind, value)
    if column.kind == "name" and len(text) > 64:
        return f'<bdi title="{escape(text)}">{escape(shorten(text, 64))}</bdi>'
    return (
        f"<bdi>{_prose(text) if column.kind == 'text' else escape(text)}</bdi>" if column.kind in ("name", "text", "code") else escape(text)
    )
