"""The command line: parse, call, print the report, exit.

    workbench inspect model.pt --json
    workbench scan downloads/*.pt --sarif > found.sarif
    python -m workbench inspect model.safetensors

Exit codes: 0 fine, 1 the finding is negative (a danger in the file), 2 the command or the file could not be read. To `scan`, a file
that cannot be read is a danger; only one that is not there is exit code 2.
"""

from __future__ import annotations

import argparse
import html
import io
import json
import sys
from collections.abc import Sequence
from typing import Any

from workbench.checkpoint import Checkpoint
from workbench.errors import WorkbenchError, visible
from workbench.files import atomic_write, discard
from workbench.opening import open as open_checkpoint


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="workbench", description="Look into PyTorch checkpoints without executing anything in them.")
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser(
        "inspect",
        help="list the tensors of a checkpoint",
        description="List tensors, tied names and dangers. No tensor data is read, nothing is executed.",
    )
    inspect.add_argument("file", help="a checkpoint of any format that README lists, a folder with one, or its address (https://…)")
    inspect.add_argument("--json", action="store_true", help="print one JSON object")
    inspect.set_defaults(run=lambda args: _inspect(args.file, args.json))
    scan = commands.add_parser(
        "scan",
        help="name everything that loading a file would run",
        description="Name everything that loading would import and call, and what should not be there. Nothing is executed.",
    )
    scan.add_argument("files", nargs="+", metavar="file", help="a file or folder; any format, any extension")
    scan.add_argument("--crc", action="store_true", help="read every record of an archive and compare its checksum")
    form = scan.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON object, or a list of them for several files")
    form.add_argument("--sarif", action="store_true", help="print a SARIF 2.1.0 log")
    form.add_argument("--html", metavar="OUT", help="write the reports as a page")
    scan.set_defaults(run=_scan)
    args = parser.parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that cannot show a character gets its escape
            stream.reconfigure(errors="backslashreplace")
    try:
        code: int = args.run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough, as head has
        discard(sys.stdout.fileno())
        return 0
    except OSError as error:
        print(f"workbench: the output cannot be written: {error.strerror}", file=sys.stderr)
        discard(sys.stdout.fileno())
        return 2
    return code


def _inspect(path: str, as_json: bool) -> int:
    ckpt: Checkpoint | None = None
    error: Exception | None = None
    try:
        ckpt = open_checkpoint(path)
    except (WorkbenchError, OSError) as failure:
        error = failure
        ckpt = getattr(failure, "partial", None)
    if as_json:
        print(to_json(_summary(ckpt, error)))
    else:
        if ckpt is not None:
            print(ckpt)
        if error is not None:
            print(f"workbench: {error}", file=sys.stderr)
    return 2 if error is not None else 1 if ckpt is not None and ckpt.dangers else 0


def _scan(args: argparse.Namespace) -> int:
    from workbench.analyses.scanner import scan

    reports, errors = [], []
    for path in args.files:
        try:
            reports.append(scan(path, crc=args.crc))
        except (WorkbenchError, OSError) as error:
            errors.append({"path": path, "error": _sentence(error)})
            print(f"workbench: {error}", file=sys.stderr)
    if args.json:
        told = [*(report.to_dict() for report in reports), *errors]
        print(to_json(told if len(args.files) > 1 else told[0]))
    elif args.sarif:
        from workbench.analyses.scan_report import sarif

        print(to_json(sarif(reports)))
    elif args.html:
        page = '<!doctype html><meta charset="utf-8"><title>workbench scan</title>' + "".join(
            f"<h3>{html.escape(visible(report.path))}</h3>{report._repr_html_()}" for report in reports
        )
        with atomic_write(args.html) as out:
            out.write(page.encode(), 0)
    else:
        print("\n\n".join(f"{visible(report.path)}\n{report}" for report in reports))
    return 1 if not all(reports) else 2 if errors else 0


def _summary(ckpt: Checkpoint | None, error: Exception | None) -> dict[str, Any]:
    if ckpt is None:
        return {"tensors": [], "aliases": {}, "dangers": [], "error": _sentence(error)}
    locked = next((f"{name}: {tensor.locked}" for name, tensor in ckpt.items() if tensor.locked is not None), None)
    return {
        "tensors": [{"name": n, "shape": list(t.shape), "dtype": t.dtype.name} for n, t in ckpt.items() if n not in ckpt.restored],
        "aliases": ckpt.aliases,
        "dangers": list(ckpt.dangers),
        "error": _sentence(error) if error is not None else locked,
    }


def _sentence(error: Exception | None) -> str | None:
    return None if error is None else str(error).splitlines()[0]


def to_json(value: Any) -> str:
    """JSON in which every control character is escaped, DEL too."""
    return json.dumps(value, ensure_ascii=True).replace("\x7f", "\\u007f")
