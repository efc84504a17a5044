"""What torch's zip archives share (checkpoints, TorchScript, .pt2): where the pickle lies, and in which byte order values are stored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from workbench.checkpoint import Finding
from workbench.errors import CorruptFileError
from workbench.formats.zip_index import ZipIndex, read_record


def pickle_roots(records: Iterable[str]) -> list[str]:
    """The folders, at most one deep and with their slash, in which an archive holds a data.pkl."""
    return [name[:-8] for name in records if name[-8:] == "data.pkl" and (name[-9:-8], name.count("/")) in (("", 0), ("/", 1))]


def pickle_root(index: ZipIndex) -> str:
    """The one of them.

    Raises:
        CorruptFileError: there is none, or there are several.
    """
    roots = pickle_roots(index.records)
    if len(roots) != 1:
        what = "several data.pkl records, and which one counts is ambiguous" if roots else "no data.pkl"
        raise CorruptFileError(f"the archive holds {what}", path=index.file.url)
    return roots[0]


def read_byteorder(index: ZipIndex, root: str) -> tuple[str, list[Finding]]:
    """How multi-byte values are stored, and what to say of it. Little where the archive does not tell.

    Raises:
        CorruptFileError: two records differ by the case of their letters alone, for torch would take either for the other.
    """
    names = "\0".join(index.records)
    if names != names.lower() and len(folded := Counter(record.raw_name.lower() for record in index.records.values())) != len(
        index.records
    ):
        twice = next(name for name, times in folded.items() if times > 1).decode("utf-8", "replace")
        raise CorruptFileError("two records have the same name but for the case of its letters", record=twice, path=index.file.url)
    wanted = f"{root}byteorder"
    name = wanted if wanted in index.records else next((name for name in index.records if name.lower() == wanted.lower()), None)
    if name is None:
        return "little", []
    order = read_record(index, name, 64)
    if order not in (b"little", b"big"):
        raise CorruptFileError(f"the byte order is said to be {order!r}; it can be little or big", record=name, path=index.file.url)
    text = order.decode()
    return text, [] if text == "little" else [Finding("big-endian", "info", "the values are stored big-endian and are swapped when read")]
