"""Static HTML: what a saved notebook keeps. No script, no ids; every piece of text passes through `escape`.

Theme colours come from JupyterLab's variables with fallbacks. Where a sanitizer strips the style block, what is left is a plain
table or a plain folding list.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from workbench.errors import visible
from workbench.render.outline import Head, Line, Node, head, lines, tree
from workbench.render.text import MAX_ROWS, SEVERITY, extras_line, glob_beside, line_cells
from workbench.tables import Column, Table, format_cell, shorten

if TYPE_CHECKING:
    from workbench.report import Report

MAX_LINES = 400
_OPEN_ROWS = 40  # a tree this small starts unfolded

STYLE = """<style>
.wb-static{font:13px/1.5 var(--jp-ui-font-family,system-ui,sans-serif);color:var(--jp-ui-font-color1,#1f1f1f);max-width:1000px}
.wb-static .wb-name,.wb-static td,.wb-static summary,.wb-static .wb-leaf{font-family:var(--jp-code-font-family,monospace);
 font-size:12px;font-variant-numeric:tabular-nums;unicode-bidi:isolate}
.wb-static .wb-head{font-weight:600;border-bottom:1px solid var(--jp-border-color2,#ddd);padding:2px 0 4px;margin-bottom:4px}
.wb-static .wb-head span{font-weight:400;color:var(--jp-ui-font-color2,#555)}
.wb-static .wb-danger{border-left:3px solid #d55e00;padding-left:8px;margin:4px 0}
.wb-static .wb-warning{border-left:3px solid #e69f00;padding-left:8px;margin:4px 0}
.wb-static .wb-info,.wb-static .wb-quiet{color:var(--jp-ui-font-color2,#555)}
.wb-static table{border-collapse:collapse;margin:2px 0 10px}
.wb-static th{text-align:left;font-weight:600;border-bottom:1px solid var(--jp-border-color1,#bbb);padding:1px 12px 1px 0}
.wb-static td{text-align:left;padding:1px 12px 1px 0;white-space:nowrap;vertical-align:top}
.wb-static td.wb-text{white-space:normal;min-width:8em;max-width:24em}
.wb-static td.wb-code{white-space:pre-wrap;overflow-wrap:anywhere;min-width:20em;max-width:40em}
.wb-static .wb-right{text-align:right}
.wb-static h4{font-size:13px;margin:8px 0 2px}
.wb-static details>*:not(summary){margin-left:18px}
.wb-static .wb-row{display:inline-grid;grid-template-columns:minmax(160px,30em) 4em 6em 11em auto;column-gap:8px;vertical-align:top}
.wb-static .wb-leaf{padding-left:14px}
.wb-static .wb-row>*:nth-child(2),.wb-static .wb-row>*:nth-child(3){text-align:right}
</style>"""


_PAGE = (
    "<style>body{margin:24px;background:#fff}img{display:block;max-width:100%;width:760px;margin:12px 0}section{overflow-x:auto}</style>"
)


def escape(text: object) -> str:
    """The only way a value becomes HTML: unprintable characters made visible, then markup characters escaped."""
    return html.escape(visible(text), quote=True)


def render_report(report: Report, between: Sequence[str] = ()) -> str:
    """The headline, then every table under its title: the same sections as the text. `between`: HTML to stand before the tables."""
    mark = "✓" if report.ok else "✗"
    return _framed([f'<div class="wb-head">{mark} {escape(report.headline)}</div>', *between, *map(render_table, report.tables())])


def render_page(report: Report) -> str:
    """A whole page: `render_report` with the report's figures in it as pictures. Its own policy forbids it to run or load anything."""
    from workbench.render.plots import to_png

    pictures = [base64.b64encode(to_png(figure, dpi=150)).decode() for figure in report.figures()]
    shown = [f'<img src="data:image/png;base64,{data}" alt="figure {n}">' for n, data in enumerate(pictures, 1)]
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}"><title>{escape(type(report).__name__)}</title>'
    return f"<!DOCTYPE html><html><head>{head}{_PAGE}</head><body>{render_report(report, shown)}</body></html>\n"


def render_table(table: Table) -> str:
    """One table under its title; a long one says how many rows it leaves out."""
    title = f"<h4>{escape(table.title)}</h4>"
    if not table.rows:
        return f'<section>{title}<div class="wb-quiet">{escape(table.empty)}</div></section>'
    headings = "".join(f"<th{_aligned(c)}{_note(c)}>{escape(c.title)}</th>" for c in table.columns)
    rows = "".join(f"<tr>{_cells(table.columns, row)}</tr>" for row in table.rows[:MAX_ROWS])
    more = f'<div class="wb-quiet">… {len(table.rows) - MAX_ROWS:,} more rows in tables()</div>' if len(table.rows) > MAX_ROWS else ""
    return f"<section>{title}<table><thead><tr>{headings}</tr></thead><tbody>{rows}</tbody></table>{more}</section>"


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


def _cells(columns: Sequence[Column], row: Sequence[Any]) -> str:
    kinds = {"text": ' class="wb-text"', "code": ' class="wb-code"'}
    return "".join(f"<td{_aligned(c)}{kinds.get(c.kind, '')}>{_cell(c, value)}</td>" for c, value in zip(columns, row, strict=True))


def _cell(column: Column, value: Any) -> str:
    text = format_cell(column.kind, value)
    if column.kind == "name" and len(text) > 64:
        return f'<bdi title="{escape(text)}">{escape(shorten(text, 64))}</bdi>'
    return f"<bdi>{escape(text)}</bdi>" if column.kind in ("name", "text", "code") else escape(text)
