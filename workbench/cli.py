"""The command line: parse, call, print the report, exit.

    workbench inspect model.pt --json
    python -m workbench inspect model.safetensors

Exit codes: 0 fine, 1 the finding is negative (a danger in the file), 2 the command or the file could not be read.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Sequence
from typing import Any

from workbench.checkpoint import Checkpoint
from workbench.errors import WorkbenchError
from workbench.files import discard
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
    inspect.add_argument("file", help="a .pt, .pth, .bin, .ckpt or .safetensors file, an index.json, or a folder with one of them")
    inspect.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that cannot show a character gets its escape
            stream.reconfigure(errors="backslashreplace")
    try:
        code = _inspect(args.file, args.json)
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
