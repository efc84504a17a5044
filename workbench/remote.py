"""Remote files: https:// s3:// gs:// hf:// memory://, read by ranges through fsspec (the extra ``remote``).

Owns the requests, what may be shown of an address, and the process's one cache of blocks. A listing moves the blocks that
it touches; long reads pass the cache by. Every answer that brings bytes must tell the version and the size that the file
had when it was opened: http and S3 by the headers of that very answer, other stores by a look after it. Where a server tells
neither ETag nor time, only the size is compared. What is kept of one version is never served for another.

Refused: chains (zip::…) and kinds of address that run something or follow links; packed answers; a file larger than the cache
on a server that cannot send a part of it. User, password, query and storage options are never shown: messages name
scheme://host/path, and foreign errors are not chained. A pickled reference does carry them, for the process that is to read.
"""

from __future__ import annotations

import os
import re
import threading
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote, unquote

from workbench import errors
from workbench.errors import CorruptFileError, MissingFileError, UnsupportedError
from workbench.files import FileRef, Folder, Identity, place

_T = TypeVar("_T")
_BLOCK = 1 << 15
_WHOLE = 1 << 25  # bytes kept at most, and of a file that comes as a whole
_LONG = 1 << 19  # a read of so many bytes passes the cache by
_REQUEST = 1 << 23  # most bytes asked for at once
_SECONDS = 30.0  # for an answer to begin or go on; ten times that for the whole of it

# kind of address -> the library that it needs; stores of whole objects: none runs anything or has links that lead elsewhere
_KINDS = {
    "https": "aiohttp", "http": "aiohttp", "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub",
    "az": "adlfs", "abfs": "adlfs", "memory": "fsspec",
}  # fmt: skip
# what tells one version of a file from the next, the best first: in headers, and in what the stores record
_VERSIONS = ("generation", "ETag", "etag", "blob_id", "xet_hash", "Last-Modified", "LastModified", "mtime", "created")
_CREDENTIALS = "check the address, and the credentials and endpoint in storage_options"


def remote_place(address: str, storage_options: Mapping[str, Any]) -> FileRef | Folder:
    """The file or folder at an address.

    Args:
        storage_options: what fsspec's file system takes; and `timeout`, the seconds to wait for an answer to begin or go on.
    Raises:
        MissingFileError, MissingDependencyError, UnsupportedError, CorruptFileError (the server contradicts itself).
    """
    scheme, _, way = address.partition("://")
    kind = scheme.lower()
    if kind == "file" and way.startswith(("/", "localhost/")):
        return place(unquote(way.removeprefix("localhost")))
    if kind not in _KINDS:
        raise UnsupportedError(f"addresses that begin with {scheme}:// are not read", hint="these are: " + ", ".join(_KINDS))
    if kind in ("http", "https"):
        way = quote(way.partition("#")[0], safe="%/:?[]@!$&'()*+,;=~")
        if not re.fullmatch(r"(.*@)?([\w.%~-]+|\[[\da-fA-F:.]+\])(:\d+)?", re.split("[/?]", way)[0]):
            raise UnsupportedError("the address names no host", hint="inside a password, / and ? and # are written %2F %3F %23")
    seconds = storage_options.get("timeout", _SECONDS)
    if not isinstance(seconds, (int, float)) or not seconds > 0:
        raise errors.SelectionError("storage_options: timeout is a number of seconds")
    found = _Remote(kind, way, {key: value for key, value in storage_options.items() if key != "timeout"}, float(seconds))
    if found.web and found.url.endswith("/"):
        found.names()  # raises
    return Folder(found.url, found) if not found.web and found.look() is None else found.file()


class _Piece(NamedTuple):
    """Bytes `start` to `stop`, if the answer keeps its word, and what it tells of the whole file."""

    start: int
    stop: int
    data: bytes
    size: int
    version: str


@dataclass(frozen=True)
class _Remote:
    """A file or folder at an address; see `files.Address`."""

    kind: str
    way: str = field(repr=False)  # all that follows ://, credentials and query included
    options: Mapping[str, Any] = field(repr=False, compare=False)
    seconds: float = field(repr=False, compare=False)

    @property
    def web(self) -> bool:
        return self.kind in ("http", "https")

    @property
    def url(self) -> str:
        """The address as it may be shown."""
        host, slash, path = self.way.partition("?")[0].partition("/")
        return f"{self.kind}://{host.rpartition('@')[2]}{slash}{path}"

    def parent(self) -> _Remote:
        path, mark, query = self.way.partition("?")
        above = path.rstrip("/").rpartition("/")[0]
        return replace(self, way=above + mark + query if self.web else above)

    def below(self, name: str) -> _Remote:
        """The file called `name`, a stranger's text: it may lie in a folder below, but not outside."""
        plain = name
        while plain != (plain := unquote(plain)):
            pass
        strange = "\\" in plain or not plain.isprintable() or (not self.web and set(plain) & set("?#@"))
        if strange or {"", ".", ".."} & set(plain.split("/")):
            raise UnsupportedError("the name of a file leads out of the checkpoint's own folder, and is not followed", path=name)
        path, mark, query = self.way.partition("?")
        return replace(self, way=f"{path.rstrip('/')}/{quote(name) if self.web else name}{mark}{query}")

    def names(self) -> list[str]:
        if self.web:
            hint = "give the address of a file, such as …/model.safetensors.index.json"
            raise UnsupportedError("a web server does not list its folders", path=self.url, hint=hint)

        def listed() -> list[str]:
            system, path = self._system()
            found = [entry.strip("/") for entry in system.ls(path, detail=False)]
            return sorted({entry.rpartition("/")[2] for entry in found if entry != path.strip("/")})

        return self._asked(listed)

    def file(self) -> FileRef:
        if not self.web:
            seen = self.look()
            if seen is None:
                raise errors.UnknownFormatError("not a file: a folder", path=self.url)
            return FileRef(self.url, seen, self)
        first = self._asked(lambda: self._piece(0, _BLOCK))
        file = FileRef(self.url, (self.kind, first.version, first.size, 0), self)
        _keep(file, first)
        return file

    def look(self) -> Identity | None:
        """What the store's record of this file tells; None of a folder."""

        def looked() -> Identity | None:
            system, path = self._system()
            told = system.info(path)
            return None if told["type"] == "directory" else (self.kind, _version(told), int(told["size"]), 0)

        return self._asked(looked)

    @contextmanager
    def open(self, file: FileRef) -> Iterator[_Source]:
        yield _Source(self, file)

    def read(self, file: FileRef, start: int, stop: int) -> _Piece:
        """The bytes asked for, of the very file that was opened; all of it where the server sends no less."""
        try:
            piece = self._asked(lambda: self._piece(start, stop))
            same = (self.kind, piece.version, piece.size, 0) == file.identity
        except UnsupportedError:
            if self.web or self.look() == file.identity:
                raise
            same = False
        if not same:
            raise errors.FileChangedError("the file changed after it was opened", path=self.url, hint="open it again")
        if piece.stop < stop:
            raise CorruptFileError("the server says that nothing lies there", path=self.url, offset=start)
        return piece

    def _piece(self, start: int, stop: int) -> _Piece:
        system, path = self._system()
        if self.web or self.kind in ("s3", "s3a"):
            from fsspec.asyn import sync

            ask = _from_web if self.web else _from_s3
            piece: _Piece = sync(system.loop, ask, system, path, self, start, stop, timeout=10 * self.seconds)
        else:
            data = system.cat_file(path, start=start, end=stop, **({} if system.async_impl else {"cache_type": "none"}))
            _, version, size, _ = self.look() or ("", "", 0, 0)
            piece = _Piece(start, min(stop, size), data, size, version)
        if len(piece.data) != piece.stop - piece.start:
            raise CorruptFileError(f"the server promised {piece.stop - piece.start} bytes and sent {len(piece.data)}", path=self.url)
        return piece

    def _system(self) -> tuple[Any, str]:
        """The file system of this kind in this process and thread, with nothing listed before; and the path in it."""
        import fsspec

        address, kind = f"{self.kind}://{self.way}", fsspec.get_filesystem_class(self.kind)
        system, path = kind(**{**kind._get_kwargs_from_urls(address), **self.options}), kind._strip_protocol(address)
        if not self.web:
            system.invalidate_cache(path)
        return system, path

    def _asked(self, ask: Callable[[], _T]) -> _T:
        """What `ask` returns. A foreign failure becomes ours, raised outside of its handler: its text may show what is hidden."""
        try:
            return ask()
        except (errors.WorkbenchError, MemoryError):
            raise
        except FileNotFoundError:
            failure: errors.WorkbenchError = MissingFileError("there is no such file", path=self.url)
        except ImportError:
            hint = f'pip install "checkpoint-workbench[remote]" {_KINDS[self.kind]}'
            failure = errors.MissingDependencyError(f"{self.kind}:// cannot be read without {_KINDS[self.kind]}", hint=hint)
        except TimeoutError:
            hint = f'storage_options={{"timeout": {self.seconds:g}}}: a higher number waits longer'
            failure = errors.RemoteError("the server did not answer in time", path=self.url, hint=hint)
        except Exception as error:
            failure = errors.RemoteError(f"the address could not be read: {type(error).__name__}", path=self.url, hint=_CREDENTIALS)
        raise failure


def _version(told: Mapping[str, Any]) -> str:
    """The best that tells this version of the file; a weak ETag, which may outlive a change of bytes, together with all the rest."""
    tags = [str(told[key]) for key in _VERSIONS if told.get(key)]
    return " ".join(tags) if tags and tags[0].startswith("W/") else "".join(tags[:1])


async def _from_web(system: Any, path: str, remote: _Remote, start: int, stop: int) -> _Piece:
    import aiohttp
    from yarl import URL

    url, seconds, session = remote.url, remote.seconds, await system.set_session()
    headers = {**system.kwargs.get("headers", {}), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    limits = aiohttp.ClientTimeout(total=None, sock_connect=seconds, sock_read=seconds)
    async with session.get(URL(path, encoded=True), **{**system.kwargs, "headers": headers, "timeout": limits}) as answer:
        told, status, length = answer.headers, answer.status, answer.content_length or 0
        if status in (404, 410):
            raise MissingFileError("there is no such file", path=url)
        beyond = re.fullmatch(r"bytes \*/(\d{1,19})", told.get("Content-Range", ""))
        if status == 416 and beyond:  # an empty file, or one that shrank
            return _Piece(start, start, b"", int(beyond[1]), _version(told))
        if status not in (200, 206):
            raise errors.RemoteError(f"the server answered with status {status}", path=url, hint=_CREDENTIALS)
        if told.get("Content-Encoding", "identity").lower() != "identity":
            raise UnsupportedError("the server packs what it sends (Content-Encoding), and bytes cannot be told by place", path=url)
        if status == 206:
            size, stop = _told_range(told.get("Content-Range"), start, stop, url)
            return _Piece(start, stop, await _body(answer.content.read, stop - start), size, _version(told))
        data = await _body(answer.content.read, _WHOLE) if length <= _WHOLE else b""
        if max(length, len(data)) > _WHOLE:
            what = f"the server cannot send a part of a file, and this one has more than {_WHOLE} bytes"
            raise UnsupportedError(what, path=url, hint="download it first")
        return _Piece(0, length or len(data), data, len(data), _version(told))


async def _from_s3(system: Any, path: str, remote: _Remote, start: int, stop: int) -> _Piece:
    bucket, key, number = system.split_path(path)
    asked = {"Bucket": bucket, "Key": key, "Range": f"bytes={start}-{stop - 1}", **({"VersionId": number} if number else {})}
    told = await system._call_s3("get_object", **asked)
    try:
        size, stop = _told_range(told.get("ContentRange"), start, stop, remote.url)
        return _Piece(start, stop, await _body(told["Body"].read, stop - start), size, _version(told))
    finally:
        told["Body"].close()


def _told_range(told: str | None, start: int, stop: int, url: str) -> tuple[int, int]:
    """(size of the whole file, where this answer ends), after comparing what is sent with what was asked for."""
    match = re.fullmatch(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})", told or "")
    if match is None:
        raise errors.RemoteError("the server does not tell which bytes of how many it sends", path=url)
    first, last, size = map(int, match.groups())
    if first != start or last + 1 != min(stop, size):
        what = f"bytes {start} to {stop} were asked for, and the server sends {first} to {last + 1} of {size}"
        raise CorruptFileError(what, path=url, offset=start)
    return size, last + 1


async def _body(read: Callable[[int], Awaitable[bytes]], most: int) -> bytes:
    """What an answer brings, or little more than `most` bytes of it."""
    from aiohttp import ClientPayloadError

    data = bytearray()
    with suppress(ClientPayloadError):  # an end too soon shows in the count
        while len(data) <= most and (part := await read(1 << 18)):
            data += part
    return bytes(data)


class _Source:
    """See `files.Source`."""

    def __init__(self, remote: _Remote, file: FileRef) -> None:
        self._remote, self._file = remote, file

    def pread(self, start: int, count: int) -> bytes:
        buffer = bytearray(max(0, min(count, self._file.size - start)))
        view, done = memoryview(buffer), 0
        while done < len(buffer):
            done += self.readinto(view[done:], start + done)
        return bytes(buffer)

    def readinto(self, buffer: memoryview, start: int) -> int:
        file, count, first = self._file, min(buffer.nbytes, self._file.size - start), start // _BLOCK
        if count <= 0:
            return 0
        if (block := _kept(file, first)) is not None:
            piece = _Piece(first * _BLOCK, 0, block, 0, "")
        elif count >= _LONG:
            piece = self._remote.read(file, start, start + min(count, _REQUEST))
        else:
            stop = _missing(file, first, (start + count - 1) // _BLOCK)
            piece = self._remote.read(file, first * _BLOCK, min(file.size, stop * _BLOCK))
            _keep(file, piece)
        part = piece.data[start - piece.start : start - piece.start + count]
        buffer[: len(part)] = part
        return len(part)


_blocks: OrderedDict[tuple[FileRef, int], bytes] = OrderedDict()  # by file, as it was when opened, and number
_lock = threading.Lock()
os.register_at_fork(after_in_child=_lock._at_fork_reinit)  # type: ignore[attr-defined]  # a thread of the parent may have held it


def _kept(file: FileRef, number: int) -> bytes | None:
    with _lock:
        if (file, number) in _blocks:
            _blocks.move_to_end((file, number))
        return _blocks.get((file, number))


def _keep(file: FileRef, piece: _Piece) -> None:
    with _lock:
        for at in range(0, len(piece.data), _BLOCK):
            _blocks[file, (piece.start + at) // _BLOCK] = piece.data[at : at + _BLOCK]
        while len(_blocks) > _WHOLE // _BLOCK:
            _blocks.popitem(last=False)


def _missing(file: FileRef, first: int, last: int) -> int:
    """Where a request for `first` to `last` ends: before a block that is kept; and later, the more is kept just before `first`."""
    with _lock:
        before, stop = 0, first + 1
        while before < _LONG // _BLOCK and (file, first - before - 1) in _blocks:
            before += 1
        while stop <= max(last, first + before - 1) and (file, stop) not in _blocks:
            stop += 1
        return stop
