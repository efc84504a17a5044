"""Text and Markdown. A report shows its headline and its tables; a checkpoint shows its title, findings and folded tree."""

from __future__ import annotations

from itertools import pairwise, zip_longest
from textwrap import wrap
from typing import TYPE_CHECKING, Any
from unicodedata import combining, east_asian_width

from workbench.errors import visible
from workbench.render.outline import Line, fitting, head, lines, tree
from workbench.tables import Table, format_bytes, format_cell, shorten

if TYPE_CHECKING:
    from workbench.report import Report

MAX_ROWS = 60  # of a table or a tree; the line after them says how many more there are
NAME_WIDTH = 56
TEXT_WIDTH = 60  # sentences in a column are wrapped
SEVERITY = {"danger": "⚠", "warning": "⚠", "info": "·"}
_MARKDOWN = str.maketrans({c: "\\" + c for c in "\\`*_{}[]()#+-.!|~$"} | {"<": "&lt;", ">": "&gt;", "&": "&amp;"})


def render_report(report: Report) -> str:
    """The headline, then every table under its title."""
    mark = "✓" if report.ok else "✗"
    return "\n\n".join([f"{mark} {visible(report.headline)}", *(render_table(t) for t in report.tables())])


def render_table(table: Table) -> str:
    """A title, a heading line and aligned rows; numbers to the right, long names cut in the middle."""
    title = visible(table.title)
    if not table.rows:
        return f"{title}\n  {visible(table.empty)}"
    cells = [[c.title for c in table.columns]]
    for row in table.rows[:MAX_ROWS]:
        cells += map(list, zip_longest(*(_cell(c.kind, v) for c, v in zip(table.columns, row, strict=True)), fillvalue=""))
    body = _aligned(cells, [c.right_aligned for c in table.columns])
    more = [f"… {len(table.rows) - MAX_ROWS:,} more rows in tables()"] if len(table.rows) > MAX_ROWS else []
    return "\n  ".join([title, *body, *more])


def render_markdown(report: Report) -> str:
    """The same as GitHub-flavoured Markdown; nothing from a file can act as markup."""
    parts = [f"{'✓' if report.ok else '✗'} **{_plain(report.headline)}**"]
    for table in report.tables():
        parts.append(f"### {_plain(table.title)}")
        parts.append(_markdown_table(table) if table.rows else _plain(table.empty))
    return "\n\n".join(parts) + "\n"


def render_checkpoint(ckpt: Any) -> str:
    """One line of title, the findings, then the folded tree; at most about 60 rows."""
    title = head(ckpt)
    out = [" · ".join([visible(title.name), *(visible(part) for part in title.parts)])]
    out += [line for finding in title.findings for line in finding_lines(finding)]
    out += _tree_lines(lines(tree(ckpt, title.aliases)))
    extras = extras_line(ckpt)
    return "\n".join(out + ([extras] if extras else []))


def finding_lines(finding: Any) -> list[str]:
    """`⚠ what was found`, and its cure below it."""
    text = f"{SEVERITY.get(finding.severity, '·')} {visible(finding.message)}"
    return [text, f"    {visible(finding.hint)}"] if finding.hint else [text]


def extras_line(ckpt: Any) -> str:
    """What the file holds besides tensors: `also epoch = 12, lr = 0.001, … 9 more`."""
    extras = dict(getattr(ckpt, "extras", None) or {})
    if not extras:
        return ""
    shown = [f"{shorten(visible(path), 40)} = {shorten(visible(value), 40)}" for path, value in list(extras.items())[:6]]
    more = [f"… {len(extras) - 6:,} more in ckpt.extras"] if len(extras) > 6 else []
    return "also " + ", ".join(shown + more)


def _tree_lines(rows: list[Line]) -> list[str]:
    shown = fitting(rows, MAX_ROWS)
    open_rows = {id(a) for a, b in pairwise(shown) if b.depth > a.depth}
    cells = [[_label(row, id(row) in open_rows), *line_cells(row)] for row in shown]
    out = [f"  {row}" for row in _aligned(cells, [False, True, True, False, False])]
    if hidden := len(rows) - len(shown):
        top, depth = [row for row in rows if row.depth == 0], max(row.depth for row in shown)
        first = next(row for row in rows if row.depth > depth) if len(top) <= MAX_ROWS else top[MAX_ROWS]
        out.append(f"  … {hidden:,} more, ckpt.select({glob_beside(first.first)!r})")
    return out


def line_cells(row: Line) -> list[str]:
    """Count, bytes, shape and dtype of one row of the tree; `12 ×` where one row stands for twelve, `= wte.weight` where it is tied."""
    if row.group:
        return [f"{row.count:,}", format_bytes(row.nbytes), "", ""]
    times = f"{row.times:,} ×" if row.times > 1 else ""
    tied = f" = {shorten(visible(row.tied), NAME_WIDTH)}" if row.tied else ""
    return [times, format_bytes(row.nbytes), format_cell("shape", row.shape), row.dtype + tied]


def glob_beside(name: str) -> str:
    """A pattern that selects a tensor and its neighbours: `layers.*` for `layers.0.q.weight`."""
    return name.split(".", 1)[0] + ".*" if "." in name else name


def _label(row: Line, is_open: bool) -> str:
    mark = ("▾ " if is_open else "▸ ") if row.group else "  "
    return "  " * row.depth + mark + shorten(visible(row.label), NAME_WIDTH)


def _cell(kind: Any, value: Any) -> list[str]:
    """The lines that a cell takes: sentences are wrapped."""
    text = format_cell(kind, value)
    return wrap(text, TEXT_WIDTH) or [""] if kind == "text" else [shorten(text, NAME_WIDTH) if kind == "name" else text]


def _width(text: str) -> int:
    if text.isascii():
        return len(text)
    return sum(0 if combining(c) else 2 if east_asian_width(c) in "WF" else 1 for c in text)


def _aligned(rows: list[list[str]], right: list[bool]) -> list[str]:
    widths = [max(map(_width, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(_padded(c, w, r) for c, w, r in zip(row, widths, right, strict=True) if w).rstrip() for row in rows]


def _padded(text: str, width: int, right: bool) -> str:
    space = " " * (width - _width(text))
    return space + text if right else text + space


def _plain(text: object) -> str:
    return visible(text).translate(_MARKDOWN)


def _markdown_table(table: Table) -> str:
    rule = ["---:" if c.right_aligned else "---" for c in table.columns]
    rows = [[_plain(format_cell(c.kind, v)) for c, v in zip(table.columns, row, strict=True)] for row in table.rows[:MAX_ROWS]]
    out = ["| " + " | ".join(row) + " |" for row in ([_plain(c.title) for c in table.columns], rule, *rows)]
    if len(table.rows) > MAX_ROWS:
        out.append(f"\n… {len(table.rows) - MAX_ROWS:,} more rows")
    return "\n".join(out)
