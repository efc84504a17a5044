"""Files: identity, byte ranges, folders, and atomic writing.

Owns every `open` of stored bytes and every file written. No handle outlives a call: a `Span` is a value that pickles
and threads, and each read repeats the identity check, so a file that changed underneath raises FileChangedError and
never yields other bytes. Only regular files are read (a FIFO or a device is refused before its first byte).
Addresses such as https:// and s3:// are `workbench.remote`'s, reached through the same FileRef and Folder.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, Protocol

from workbench.errors import CorruptFileError, FileChangedError, MissingFileError, UnknownFormatError, UnsupportedError, WriteError

Identity = tuple[Any, Any, int, int]  # (dev, ino, size, mtime_ns) of a local file; (scheme, version, size, 0) of a remote one
_CHUNK = 1 << 20
_MAX_STEPS, _MAX_FOLDERS = 16, 1000  # of a path that an index names, each of which is asked for; where such files may lie


class Source(Protocol):
    """An open file, valid inside its `with`."""

    def pread(self, start: int, count: int) -> bytes:
        """Up to `count` bytes at `start`; fewer only where the file ends."""

    def readinto(self, buffer: memoryview, start: int) -> int:
        """Fill the beginning of `buffer` from byte `start`; returns how many bytes were read, 0 at the end of the file."""


class Address(Protocol):
    """A remote file or folder, as `workbench.remote` reaches it. Holds what must not be shown: query and credentials."""

    def open(self, file: FileRef) -> AbstractContextManager[Source]: ...
    def file(self) -> FileRef: ...
    def names(self) -> list[str]: ...
    def below(self, name: str) -> Address: ...
    def parent(self) -> Address: ...
    @property
    def url(self) -> str: ...


@dataclass(frozen=True)
class FileRef:
    """One file as it was when opened.

    Attributes:
        url: absolute local path, or an address without credentials and query.
        identity: (device, inode, size in bytes, modification time in ns), or what a server tells; checked at every read.
        address: how a remote file is reached; None for a local one.
    """

    url: str
    identity: Identity = field(repr=False)
    address: Address | None = field(default=None, repr=False)

    @property
    def size(self) -> int:
        return self.identity[2]

    @property
    def name(self) -> str:
        return os.path.basename(self.url)

    @property
    def folder(self) -> Folder:
        return Folder(os.path.dirname(self.url)) if self.address is None else Folder(self.address.parent().url, self.address.parent())

    @contextmanager
    def open(self) -> Iterator[Source]:
        """The file, proved to be the one that was opened before.

        Raises:
            FileChangedError: it is another one now.
        """
        kept = _KEPT.get()
        if kept is not None and (kept[0] is self or kept[0] == self):
            yield kept[1]
            return
        if self.address is not None:
            with self.address.open(self) as source:
                yield source
            return
        with _opened(self.url) as fd:
            if _identity(fd) != self.identity:
                raise FileChangedError("the file changed after it was opened", path=self.url, hint="open it again")
            yield _LocalSource(fd)

    @contextmanager
    def kept_open(self) -> Iterator[Source]:
        """`open` once for all that this thread opens of it meanwhile: a listing that looks into each of very many records.

        Not for a generator, out of which it would leak.
        """
        with self.open() as source:
            token = _KEPT.set((self, source))
            try:
                yield source
            finally:
                _KEPT.reset(token)


_KEPT: ContextVar[tuple[FileRef, Source] | None] = ContextVar("_KEPT", default=None)


@dataclass(frozen=True)
class Folder:
    """A folder of files that belong to one checkpoint; `url` as a FileRef's."""

    url: str
    address: Address | None = field(default=None, repr=False)

    def names(self) -> list[str]:
        """What lies in it, sorted; folders in it included."""
        if self.address is not None:
            return self.address.names()
        try:
            return sorted(os.listdir(self.url))
        except PermissionError as error:
            raise UnsupportedError("this folder may not be read by this user", path=self.url) from error

    def file(self, name: str) -> FileRef:
        """The file called `name`, which may lie in a folder below but not outside.

        Raises:
            MissingFileError: it is not there. UnsupportedError: the name leads out of the folder.
        """
        if self.address is not None:
            return self.address.below(name).file()
        if "\0" in name:
            raise CorruptFileError(f"{name!r} is no file's name", path=self.url)
        (head, tail), path, (heads, links) = os.path.split(name), os.path.join(self.url, name), self._real
        if head not in heads:
            if head.count("/") >= _MAX_STEPS or len(heads) == _MAX_FOLDERS:
                raise UnsupportedError(f"a path of {head.count('/') + 2} steps, or into one folder more of {len(heads)}", path=path)
            heads[head] = os.path.realpath(os.path.join(self.url, head))
        real = os.path.join(heads[head], tail)
        if tail in ("", ".", "..") or os.path.islink(real):
            real = links[real] if real in links else links.setdefault(real, os.path.realpath(real))
        _require_inside(real, heads[""], path)
        return replace(file_ref(real), url=os.path.abspath(path))  # a hub cache's links keep their names

    @cached_property
    def _real(self) -> tuple[dict[str, str], dict[str, str]]:
        """The real paths of this folder, of those below and of links, each looked for once: that costs a question for each step."""
        return {"": os.path.realpath(self.url)}, {}

    def __contains__(self, name: str) -> bool:
        return name in self.names()


def place(address: str | os.PathLike[str], storage_options: Mapping[str, Any] | None = None) -> FileRef | Folder:
    """The file or folder at a path or an address (https:// s3:// gs:// hf:// memory:// …, which need the extra ``remote``).

    Args:
        storage_options: what fsspec's file system takes: credentials, endpoints.
    Raises:
        MissingFileError, UnknownFormatError (no regular file), MissingDependencyError.
    """
    text = os.fsdecode(address)
    if not text:
        raise MissingFileError("the path is empty")
    if "://" in text:
        from workbench.remote import remote_place

        found: FileRef | Folder = remote_place(text, storage_options or {})
        return found
    text = os.path.expanduser(text)
    return Folder(os.path.abspath(text)) if os.path.isdir(text) else file_ref(text)


class _LocalSource:
    def __init__(self, fd: int) -> None:
        self._fd = fd

    def pread(self, start: int, count: int) -> bytes:
        return os.pread(self._fd, count, start)

    def readinto(self, buffer: memoryview, start: int) -> int:
        return os.preadv(self._fd, [buffer[:_CHUNK]], start)


def file_ref(path: str | os.PathLike[str]) -> FileRef:
    """The file at `path`, after proving that it is a regular one.

    Raises:
        MissingFileError: nothing there, or a link that leads nowhere.
        UnknownFormatError: a folder, FIFO, socket or device.
    """
    text = os.path.abspath(os.fspath(path))
    with _opened(text) as fd:
        return FileRef(text, _identity(fd))


def _identity(fd: int) -> Identity:
    info = os.fstat(fd)
    return (info.st_dev, info.st_ino, info.st_size, info.st_mtime_ns)


@contextmanager
def _opened(path: str) -> Iterator[int]:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise MissingFileError(
            "there is no such file", path=path, hint="check the path; relative ones start at the working directory"
        ) from error
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.ENAMETOOLONG):
            raise MissingFileError("there is no such file", path=path) from error
        if error.errno == errno.ELOOP:
            raise MissingFileError("the link leads back to itself", path=path) from error
        if error.errno in (errno.ENXIO, errno.ENODEV, errno.EISDIR):
            raise UnknownFormatError("not a regular file", path=path) from error
        if error.errno in (errno.EACCES, errno.EPERM):
            raise UnsupportedError("this file may not be read by this user", path=path) from error
        raise
    except ValueError as error:  # a NUL byte in the path
        raise MissingFileError("there is no such file", path=path) from error
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise UnknownFormatError("not a regular file: a checkpoint is a file or a folder of files", path=path)
        yield fd
    finally:
        os.close(fd)


class Reader(Protocol):
    """Random access to the bytes of one span, valid inside its `with`."""

    def readinto(self, buffer: memoryview, start: int) -> None:
        """Fill `buffer` from byte `start` of the span."""


class Check(Protocol):
    """A proof that bytes lie where an index says, made before the first of them is read."""

    def prove(self, pread: Callable[[int, int], bytes], start: int) -> None:
        """Raise where they do not; `pread(start, count)` reads the file, `start` is where the span begins."""

    def alone(self, start: int) -> Check:
        """What proves the span that begins at `start` and no other: all that a pickled span carries along."""


class Storage(Protocol):
    """Bytes that can be read by position: a Span, or a Span seen through a decompressor."""

    @property
    def nbytes(self) -> int: ...

    def open(self) -> Any:
        """A context manager that yields a Reader."""


class Span(NamedTuple):
    """`nbytes` bytes at `start` of one file; the only thing that reads stored bytes.

    `check` is proved at each open, before the first byte: an archive's local header, read late so that listing stays cheap.
    """

    file: FileRef
    start: int
    nbytes: int
    check: Check | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return Span, (*self[:3], None if self.check is None else self.check.alone(self.start))

    @contextmanager
    def open(self) -> Iterator[_SpanReader]:
        with self.file.open() as source:
            if self.check is not None:
                self.check.prove(source.pread, self.start)
            yield _SpanReader(source, self)

    def part(self, start: int, nbytes: int) -> Span:
        """`nbytes` bytes from byte `start` of this span, proved as this one is."""
        return Span(self.file, self.start + start, nbytes, None if self.check is None else _Whole(self.check, self.start))

    def read(self, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes `start` to `stop` of the span."""
        return read_span(self, start, stop)


@dataclass(frozen=True)
class _Whole:
    """The proof of a part: that of the whole span, which begins at `start`."""

    check: Check
    start: int

    def prove(self, pread: Callable[[int, int], bytes], start: int) -> None:
        self.check.prove(pread, self.start)

    def alone(self, start: int) -> _Whole:
        return _Whole(self.check.alone(self.start), self.start)


def read_span(storage: Storage, start: int = 0, stop: int | None = None) -> bytes:
    stop = storage.nbytes if stop is None else min(stop, storage.nbytes)
    if isinstance(storage, Span) and 0 <= start < stop <= start + _CHUNK:  # as below, in a third of the time
        with storage.file.open() as source:
            if storage.check is not None:
                storage.check.prove(source.pread, storage.start)
            data = source.pread(storage.start + start, stop - start)
        if len(data) == stop - start:
            return data
    buffer = bytearray(max(0, stop - start))
    if buffer:
        with storage.open() as reader:
            reader.readinto(memoryview(buffer), start)
    return bytes(buffer)


class _SpanReader:
    def __init__(self, source: Source, span: Span) -> None:
        self._source = source
        self._span = span

    def readinto(self, buffer: memoryview, start: int) -> None:
        span, done, total = self._span, 0, buffer.nbytes
        if start < 0 or start + total > span.nbytes:
            raise CorruptFileError(f"bytes {start} to {start + total} of a range of {span.nbytes}", path=span.file.url, offset=span.start)
        while done < total:
            got = self._source.readinto(buffer[done:], span.start + start + done)
            if got == 0:
                raise CorruptFileError("the file ends before its own index says", path=span.file.url, offset=span.start + start + done)
            done += got


def checksum(storage: Storage) -> int:
    """CRC-32 of all bytes, in blocks of 1 MiB."""
    from isal.isal_zlib import crc32  # three times as fast as zlib's

    crc, buffer = 0, bytearray(min(_CHUNK, storage.nbytes))
    with storage.open() as reader:
        for start in range(0, storage.nbytes, _CHUNK):
            view = memoryview(buffer)[: min(_CHUNK, storage.nbytes - start)]
            reader.readinto(view, start)
            crc = crc32(view, crc)
    return crc


def contained(path: str | os.PathLike[str], folder: str | os.PathLike[str]) -> str:
    """The real path of `path`, proved to lie under `folder` or under the model cache that `folder` belongs to.

    Hub caches keep `snapshots/<revision>/name` as links to `blobs/<hash>` two levels up; those stay inside the model's own root.

    Raises:
        UnsupportedError: the path leaves the folder.
    """
    real = os.path.realpath(path)
    _require_inside(real, os.path.realpath(folder), path)
    return real


def _require_inside(real: str, folder: str, path: str | os.PathLike[str]) -> None:
    roots, parent = [folder], os.path.dirname(folder)
    if os.path.basename(parent) == "snapshots":
        roots.append(os.path.join(os.path.dirname(parent), "blobs"))
    if all(os.path.commonpath([root, real]) != root for root in roots):
        raise UnsupportedError(
            "the file named lies outside the checkpoint's own folder, and is not read", path=os.fspath(path), hint=f"it leads to {real}"
        )


class Output:
    """A temporary file being written at chosen offsets; threads may write disjoint ranges at once."""

    def __init__(self, fd: int, path: str) -> None:
        self._fd = fd
        self.path = path

    def write(self, data: Any, offset: int) -> None:
        view = memoryview(data).cast("B")
        while view.nbytes:
            done = os.pwrite(self._fd, view, offset)
            view, offset = view[done:], offset + done

    def reserve(self, nbytes: int) -> None:
        """Claim the room now, so that a full disk is told before the work and not after it."""
        if nbytes:
            try:
                os.posix_fallocate(self._fd, 0, nbytes)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
                os.ftruncate(self._fd, nbytes)


@contextmanager
def atomic_write(path: str | os.PathLike[str], *, verify: Callable[[str], None] | None = None) -> Iterator[Output]:
    """Write `path` as a whole or not at all.

    A temporary file beside the target is written, flushed to the disk, read back by `verify` (from the disk where the
    system lets go of its cached copy), and only then renamed over the target. A link is followed; the mode of a file that
    stood there is kept. On any error the temporary file is removed and what stood there is untouched, so saving over a
    file that is still open or mapped is safe.

    Raises:
        WriteError: no such folder, no permission, disk full.
    """
    if "\0" in os.fspath(path):
        raise WriteError("a path cannot hold a NUL", path=path)
    target = os.path.realpath(path)
    folder, name = os.path.split(target)
    prefix = f".{name[:100]}."
    try:
        if os.path.isdir(target):
            raise WriteError("a folder of that name stands here", path=target)
        if os.path.lexists(target) and not os.path.isfile(target):
            raise WriteError("what stands here is no regular file, and is not replaced", path=target)
        mode = stat.S_IMODE(os.stat(target).st_mode) if os.path.exists(target) else None
        if mode is not None and not os.access(target, os.W_OK):
            raise WriteError("the file that stands here is read-only", path=target)
        _sweep(folder, prefix)
        fd, temporary = _create_locked(folder, prefix)
    except OSError as error:
        if isinstance(error, WriteError):
            raise
        raise WriteError(f"cannot write here: {error.strerror}", path=target, hint=_write_hint(error)) from error
    try:
        try:
            if mode is not None:
                os.fchmod(fd, mode)
            yield Output(fd, temporary)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
        if verify is not None:
            verify(temporary)
        os.replace(temporary, target)
        _sync_folder(folder)
    except BaseException as error:
        if os.path.exists(temporary):
            os.unlink(temporary)
        if isinstance(error, OSError) and not isinstance(error, WriteError) and error.errno is not None:
            raise WriteError(f"the write failed: {error.strerror}; nothing was changed", path=target, hint=_write_hint(error)) from error
        raise


def _create_locked(folder: str, prefix: str) -> tuple[int, str]:
    """A new temporary file, locked for as long as its writer lives."""
    while True:
        path = os.path.join(folder, f"{prefix}{os.urandom(6).hex()}.tmp")
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        fcntl.flock(fd, fcntl.LOCK_EX)
        if os.fstat(fd).st_nlink:  # else another writer swept it away before it was locked
            return fd, path
        os.close(fd)


def _sweep(folder: str, prefix: str) -> None:
    """Remove what killed writers of the same file left: temporary files that nobody holds locked."""
    for entry in os.listdir(folder):
        if not (entry.startswith(prefix) and entry.endswith(".tmp") and len(entry) == len(prefix) + 16):
            continue
        path = os.path.join(folder, entry)
        try:
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            continue  # gone meanwhile, or not ours to touch
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(path)
        except OSError:
            continue  # its writer lives
        finally:
            os.close(fd)


def discard(fd: int) -> None:
    """Let whatever is still written to `fd` go nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, fd)
    os.close(nowhere)


def _sync_folder(folder: str) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_hint(error: OSError) -> str | None:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free some room or choose another disk"
    if error.errno == errno.ENOENT:
        return "make the folder first"
    return "choose a folder you may write to" if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) else None
