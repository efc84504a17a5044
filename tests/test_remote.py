"""Remote files, read from real servers on loopback: HTTP with Range (honest and not), S3 by moto, a Hub by a stub, memory://."""

import asyncio
import json
import logging
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
import time
import traceback
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import fsspec
import pytest
import torch
from conformance import state
from safetensors.torch import save_file
from strategies import same

import workbench as wb
from workbench import remote
from workbench.errors import (
    CorruptFileError,
    FileChangedError,
    MissingFileError,
    MissingShardError,
    SelectionError,
    UnknownFormatError,
    UnsupportedError,
    WorkbenchError,
)
from workbench.files import Folder, place

SECRETS = ("s3cret", "hidden", "tok3n")
KEY = {"headers": {"X-Key": SECRETS[2]}}


@pytest.fixture(autouse=True)
def _nothing_kept():
    remote._blocks.clear()


# servers


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def setup(self):
        super().setup()
        write = self.wfile.write

        def counted(data):
            with self.server.lock:
                self.server.moved += len(data)
            return write(data)

        self.wfile.write = counted

    def log_message(self, *args):
        pass

    def do_GET(self):
        name = unquote(urlsplit(self.path).path).lstrip("/")
        with self.server.lock:
            self.server.asked.append((name, self.headers.get("Range")))
            self.server.headers.append(dict(self.headers))
        try:
            self.server.twists.get(name, Handler.part)(self)
        except (BrokenPipeError, ConnectionResetError):  # the client had heard enough
            self.close_connection = True

    do_POST = do_GET

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for key, value in {"Content_Length": len(body), **headers}.items():
            if value is not None:
                self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    @property
    def data(self):
        return self.server.files[unquote(urlsplit(self.path).path).lstrip("/")]

    def span(self):
        start, stop = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        return start, min(stop + 1, len(self.data))

    def part(self, **headers):
        """What an honest server does."""
        if unquote(urlsplit(self.path).path).lstrip("/") not in self.server.files:
            return self.answer(404, b"no such file")
        (start, stop), size = self.span(), len(self.data)
        if start >= size:
            return self.answer(416, Content_Range=f"bytes */{size}")
        body = self.data[start:stop]
        return self.answer(206, body, **{"Content_Range": f"bytes {start}-{stop - 1}/{size}", "ETag": self.server.tag, **headers})


class Sparse:
    """A file far larger than what is written of it; zeros elsewhere."""

    def __init__(self, path):
        self.path = path

    def __len__(self):
        return os.path.getsize(self.path)

    def __getitem__(self, span):
        with open(self.path, "rb") as file:
            file.seek(span.start)
            return file.read(span.stop - span.start)


class Web(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock, self.files, self.twists = threading.Lock(), {}, {}
        self.asked, self.headers, self.moved, self.tag = [], [], 0, '"v1"'
        self.base = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), (ConnectionError, ValueError)):
            super().handle_error(request, client_address)

    @contextmanager
    def count(self):
        """The requests and bytes of the block, headers included."""
        asked, moved, spent = len(self.asked), self.moved, {}
        yield spent
        spent.update(requests=len(self.asked) - asked, bytes=self.moved - moved)


@pytest.fixture
def web():
    server = Web()
    yield server
    server.shutdown()
    server.server_close()


class CountedApp:
    """A WSGI application that counts what it answers."""

    def __init__(self, app):
        self.app, self.asked, self.moved = app, [], 0

    def __call__(self, environ, start_response):
        self.asked.append((environ["REQUEST_METHOD"], environ["PATH_INFO"], environ.get("HTTP_RANGE")))
        for part in self.app(environ, start_response):
            self.moved += len(part)
            yield part


@pytest.fixture(scope="module")
def s3():
    """(options for storage_options, a boto-like client, the counting application) of an S3 server in this process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    app = CountedApp(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, app, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    options = {
        "key": "tok3n",
        "secret": "s3cret",
        "endpoint_url": f"http://127.0.0.1:{server.port}",
        "client_kwargs": {"region_name": "us-east-1"},
    }
    system = fsspec.filesystem("s3", **options)
    system.call_s3("create_bucket", Bucket="models")
    yield options, system, app
    server.shutdown()


# files


def zip_of_a_gibibyte(path):
    """300 tensors by torch's own writer, which leaves the values out and the room for them in."""
    with torch.serialization.skip_data():
        torch.save({f"model.layers.{i // 3}.self_attn.{'qkv'[i % 3]}_proj.weight": torch.empty(874, 1024) for i in range(300)}, path)


def legacy_of_a_gibibyte(path):
    class Holes:
        """Writes what is short, and leaves room for what is long: all of it zeros."""

        def write(self, data):
            if len(data) > 1 << 16:
                file.seek(len(data), os.SEEK_CUR)
            else:
                file.write(data)
            return len(data)

        def flush(self):
            file.truncate(file.tell())

    zeros = path.with_suffix(".zeros")
    with open(zeros, "wb") as file:
        file.truncate(874 * 1024 * 4)
    tensors = {f"layer.{i}.weight": torch.from_file(str(zeros), size=874 * 1024).view(874, 1024) for i in range(300)}
    with open(path, "wb") as file:
        torch.save(tensors, Holes(), _use_new_zipfile_serialization=False)


def safetensors_of_a_gibibyte(path):
    count, entries = 874 * 1024 * 4, {}
    for i in range(300):
        entries[f"model.layers.{i}.weight"] = {"dtype": "F32", "shape": [874, 1024], "data_offsets": [i * count, (i + 1) * count]}
    header = json.dumps(entries).encode()
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 300 * count)


def gguf_of_a_gibibyte(path):
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list([f"token {i}" for i in range(2000)])
    for i in range(300):
        writer.add_tensor_info(f"blk.{i}.attn_q.weight", (874, 1024), torch.zeros(1).numpy().dtype, 874 * 1024 * 4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with open(path, "ab") as file:
        file.truncate((file.tell() + 31) // 32 * 32 + 300 * 874 * 1024 * 4)


GIBIBYTES = {
    "torch zip": zip_of_a_gibibyte,
    "legacy torch": legacy_of_a_gibibyte,
    "safetensors": safetensors_of_a_gibibyte,
    "gguf": gguf_of_a_gibibyte,
}


def small(folder, name="model.safetensors"):
    path = folder / name
    save_file(state(), path) if name.endswith("safetensors") else torch.save(state(), path)
    return path.read_bytes()


def sharded(folder):
    """The bytes of a sharded checkpoint by file name, and what it holds."""
    tensors, shards = state(), ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    weight_map = {name: shards[i % 2] for i, name in enumerate(tensors)}
    for shard in shards:
        save_file({n: t for n, t in tensors.items() if weight_map[n] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return {path.name: path.read_bytes() for path in folder.iterdir()}, tensors


def holds(ckpt, tensors):
    return set(ckpt) == set(tensors) and all(same(ckpt[name].load(), tensor) for name, tensor in tensors.items())


# what a listing costs


@pytest.mark.parametrize("what", GIBIBYTES)
def test_listing_a_gibibyte_moves_less_than_200_kb(what, web, tmp_path):
    GIBIBYTES[what](tmp_path / "big")
    web.files["big"] = Sparse(tmp_path / "big")
    assert len(web.files["big"]) > 1_070_000_000
    with web.count() as spent:
        ckpt = wb.open(f"{web.base}/big")
    assert len(ckpt) == 300
    assert spent["bytes"] < 200_000
    assert spent["requests"] <= 8
    print(f"{what}: {spent['requests']} requests, {spent['bytes']} bytes")  # shown by pytest -rP


def test_listing_a_gibibyte_from_s3_moves_less_than_200_kb(s3, tmp_path):
    options, system, app = s3
    torch.save({f"layer.{i}.weight": torch.zeros(10, 1024) for i in range(300)}, tmp_path / "some.pt")
    system.put_file(str(tmp_path / "some.pt"), "models/some.pt")
    moved, asked = app.moved, len(app.asked)
    ckpt = wb.open("s3://models/some.pt", storage_options=options)
    assert len(ckpt) == 300
    assert app.moved - moved < 200_000
    print(f"s3: {len(app.asked) - asked} requests, {app.moved - moved} bytes")


def test_a_long_read_is_few_requests_and_leaves_the_index_kept(web, tmp_path):
    tensor = torch.arange(3 << 20, dtype=torch.float32)
    save_file({"a": tensor, "b": tensor[:100] + 1}, tmp_path / "model.safetensors")
    web.files["m"] = (tmp_path / "model.safetensors").read_bytes()
    ckpt = wb.open(f"{web.base}/m")
    kept = set(remote._blocks)
    with web.count() as spent:
        assert torch.equal(ckpt["a"].load(), tensor)
    assert spent["requests"] <= 3
    assert spent["bytes"] < 12_700_000
    assert kept <= set(remote._blocks)
    with web.count() as spent:
        wb.open(f"{web.base}/m")
    assert spent["requests"] == 1  # which proves the version; the rest is kept


def test_reading_on_asks_for_more_each_time_and_what_is_kept_is_bounded(web):
    web.files["x"] = bytes(range(256)) * (40 << 12)  # 40 MiB
    file = place(f"{web.base}/x")
    with web.count() as spent, file.open() as source:
        for start in range(0, 40 << 20, 1 << 12):
            assert source.pread(start, 16) == web.files["x"][start : start + 16]
    assert spent["requests"] < 100
    assert spent["bytes"] < 42_000_000
    assert sum(map(len, remote._blocks.values())) <= 32 << 20


def test_gaps_between_kept_blocks_are_asked_for_and_nothing_else(web):
    web.files["x"] = os.urandom(10 << 15)
    file = place(f"{web.base}/x")
    with file.open() as source:
        source.pread(4 << 15, 1)
        assert source.pread(1, 8 << 15) == web.files["x"][1 : 1 + (8 << 15)]
        assert source.pread((10 << 15) - 5, 99) == web.files["x"][-5:]
        assert source.pread(10 << 15, 99) == b""
    asked = [tuple(map(int, span.removeprefix("bytes=").split("-"))) for _, span in web.asked]
    blocks = [block for start, stop in asked for block in range(start >> 15, (stop >> 15) + 1)]
    assert len(blocks) == len(set(blocks))


# values, folders, stores


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
def test_values_over_http_are_those_of_the_file(name, web, tmp_path):
    web.files[name] = small(tmp_path, name)
    ckpt = wb.open(f"{web.base}/{name}")
    assert ckpt.name == name
    assert holds(ckpt, state())


def test_a_sharded_checkpoint_over_http(web, tmp_path):
    web.files, tensors = sharded(tmp_path)
    queries = set()
    web.twists = dict.fromkeys(web.files, lambda handler: (queries.add(urlsplit(handler.path).query), handler.part()))
    ckpt = wb.open(f"{web.base}/model.safetensors.index.json?token=hidden")
    assert holds(ckpt, tensors)
    assert queries == {"token=hidden"}  # one that opens a folder opens all of it
    web.twists = {}
    del web.files["model-00002-of-00002.safetensors"]
    with pytest.raises(MissingShardError, match="00002-of-00002"):
        wb.open(f"{web.base}/model.safetensors.index.json")


def test_a_folder_on_s3(s3, tmp_path):
    options, system, _ = s3
    files, tensors = sharded(tmp_path)
    for name, data in files.items():
        system.pipe_file(f"models/org/one/{name}", data)
    system.pipe_file("models/org/empty.pt", b"")
    system.call_s3("put_object", Bucket="models", Key="org/")  # what some programs leave where they made a folder
    for address in ("s3://models/org/one", "s3://models/org/one/", "s3://models/org/one/model.safetensors.index.json"):
        assert holds(wb.open(address, storage_options=options), tensors)
    folder = place("s3://models/org", options)
    assert isinstance(folder, Folder)
    assert folder.names() == ["empty.pt", "one"]
    assert place("s3://models/org/one/model.safetensors.index.json", options).folder.names() == sorted(files)
    with pytest.raises(UnknownFormatError, match="folder"):
        folder.file("one")
    with pytest.raises(MissingFileError):
        folder.file("two")
    with pytest.raises(UnknownFormatError):
        wb.open("s3://models/org/empty.pt", storage_options=options)
    for missing in ("s3://models/none.pt", "s3://nowhere/none.pt"):
        with pytest.raises(MissingFileError, match=r"none\.pt"):
            wb.open(missing, storage_options=options)


def test_a_version_on_s3_can_be_named(s3, tmp_path):
    options, system, _ = s3
    data = small(tmp_path)
    system.call_s3("create_bucket", Bucket="versions")
    system.call_s3("put_bucket_versioning", Bucket="versions", VersioningConfiguration={"Status": "Enabled"})
    system.pipe_file("versions/m.safetensors", data)
    number = system.call_s3("head_object", Bucket="versions", Key="m.safetensors")["VersionId"]
    system.pipe_file("versions/m.safetensors", b"something else")
    ckpt = wb.open(f"s3://versions/m.safetensors?versionId={number}", storage_options=options)
    assert holds(ckpt, state())
    assert ckpt.source.url == "s3://versions/m.safetensors"


def test_a_folder_in_memory(tmp_path):
    files, tensors = sharded(tmp_path)
    system = fsspec.filesystem("memory")
    for name, data in files.items():
        system.pipe_file(f"/org/model/{name}", data)
    try:
        assert holds(wb.open("memory://org/model"), tensors)
        assert holds(wb.open("memory:///org/model/model.safetensors.index.json"), tensors)
        ckpt = wb.open("memory://org/model/model-00001-of-00002.safetensors")
        name = next(iter(ckpt))
        system.pipe_file("/org/model/model-00001-of-00002.safetensors", files["model-00002-of-00002.safetensors"])
        remote._blocks.clear()
        with pytest.raises(FileChangedError):
            ckpt[name].load()
        with pytest.raises(MissingFileError):
            wb.open("memory://org/none")
    finally:
        system.rm("/org", recursive=True)


def test_a_model_on_the_hub(web, tmp_path):
    """The Hub's answers by a stub: repository, tree and resolve."""
    files, tensors = sharded(tmp_path)
    web.files = {f"org/model/resolve/main/{name}": data for name, data in files.items()}
    web.tag = None  # the version is the tree's

    def repository(handler):
        handler.answer(200, json.dumps({"id": "org/model", "sha": "0" * 40, "siblings": []}).encode(), Content_Type="application/json")

    def tree(handler):
        entries = [{"type": "file", "path": name, "size": len(data), "oid": f"{hash(data):x}"} for name, data in files.items()]
        handler.answer(200, json.dumps(entries).encode(), Content_Type="application/json")

    web.twists = {
        "api/models/org/model": repository,
        "api/models/org/model/revision/main": repository,
        "api/models/org/model/tree/main": tree,
    }
    options = {"endpoint": web.base, "token": "tok3n"}
    ckpt = wb.open("hf://org/model", storage_options=options)
    assert holds(ckpt, tensors)
    assert "tok3n" not in repr(ckpt.source)
    files["big.pt"] = web.files["org/model/resolve/main/big.pt"] = b"\x80" + bytes(1 << 20)
    web.asked.clear()
    with place("hf://org/model/big.pt", options).open() as source:
        assert source.pread(0, 2) == b"\x80\0"
    assert ("org/model/resolve/main/big.pt", "bytes=0-32767") in web.asked
    with pytest.raises(MissingFileError):
        wb.open("hf://org/model/none.pt", storage_options=options)
    remote._blocks.clear()
    shard = "model-00001-of-00002.safetensors"
    files[shard] = web.files[f"org/model/resolve/main/{shard}"] = bytes(len(files[shard]))
    with pytest.raises(FileChangedError):
        ckpt[next(iter(ckpt))].load()


# a file that changes


@pytest.mark.parametrize("how", ["tag", "time", "size", "gone", "shorter", "weak tag"])
def test_a_file_that_changes_between_reads_is_refused_over_http(how, web, tmp_path):
    web.files["m"] = small(tmp_path)
    told = {
        "time": {"ETag": None, "Last_Modified": formatdate(1e9)},
        "size": {"ETag": None},
        "weak tag": {"ETag": 'W/"v1"', "Last_Modified": formatdate(1e9)},
    }
    headers = told.get(how, {})
    web.twists["m"] = lambda handler: handler.part(**headers)
    ckpt = wb.open(f"{web.base}/m")
    assert same(ckpt["layer.weight"].load(), state()["layer.weight"])  # kept: no request
    if how == "tag":
        web.tag = '"v2"'
    elif how in ("time", "weak tag"):
        headers["Last_Modified"] = formatdate(1e9 + 1)
    elif how == "size":
        web.files["m"] += b"\0"
    elif how == "shorter":
        web.files["m"] = b"\0"
    else:
        del web.files["m"]
    assert same(ckpt["layer.weight"].load(), state()["layer.weight"])  # what was kept is the file that was opened
    remote._blocks.clear()
    with pytest.raises(MissingFileError if how == "gone" else FileChangedError, match="/m"):
        ckpt["layer.weight"].load()


def test_a_file_that_changes_while_it_is_read_never_gives_mixed_bytes(web, tmp_path):
    web.files["m"] = b"a" * (20 << 20)
    file = place(f"{web.base}/m")

    def changing(handler):
        if len(web.asked) > 2:
            web.files["m"], web.tag = b"b" * (20 << 20), '"v2"'
        handler.part()

    web.twists["m"] = changing
    with pytest.raises(FileChangedError), file.open() as source:
        source.pread(0, 20 << 20)


@pytest.mark.parametrize("how", ["other", "shorter", "gone"])
def test_a_file_that_changes_between_reads_is_refused_on_s3(how, s3, tmp_path):
    options, system, _ = s3
    torch.save({"w": torch.arange(1 << 18)}, tmp_path / "m.pt")
    data = (tmp_path / "m.pt").read_bytes()
    system.pipe_file("models/changing.pt", data)
    ckpt = wb.open("s3://models/changing.pt", storage_options=options)
    changed = MissingFileError if how == "gone" else FileChangedError
    if how == "gone":
        system.rm("models/changing.pt")
    else:
        system.pipe_file("models/changing.pt", data.replace(b"\1", b"\2") if how == "other" else b"short")
    remote._blocks.clear()
    with pytest.raises(changed, match=r"changing\.pt"):
        ckpt["w"].load()
    with pytest.raises(changed), ckpt.source.open() as source:  # beyond the end of the shorter one
        source.pread(1 << 20, 1)


# servers that misbehave


def no_range(handler):
    handler.answer(200, bytes(handler.data[0 : len(handler.data)]), ETag='"v1"')


def endless(handler, length=None):
    handler.send_response(200)
    if length:
        handler.send_header("Content-Length", str(length))
    else:
        handler.send_header("Connection", "close")
        handler.close_connection = True
    handler.end_headers()
    for _ in range(1 << 12):
        handler.wfile.write(bytes(1 << 16))


def hang(handler):
    time.sleep(2.5)


def trickle(handler):
    handler.send_response(206)
    handler.send_header("Content-Range", "bytes 0-32767/99999")
    handler.send_header("Content-Length", "32768")
    handler.end_headers()
    for _ in range(300):
        handler.wfile.write(b"x")
        time.sleep(0.05)


def cut(handler):
    start, stop = handler.span()
    handler.answer(
        206, handler.data[start : stop - 7], Content_Range=f"bytes {start}-{stop - 1}/{len(handler.data)}", Content_Length=stop - start
    )
    handler.close_connection = True


def lying(content_range, body=bytes(32768), **headers):
    return lambda handler: handler.answer(206, body, Content_Range=content_range, ETag='"v1"', **headers)


def redirect(to):
    return lambda handler: handler.answer(302, Location=to)


TWISTS = {
    "404": (lambda h: h.answer(404), MissingFileError, "no such file"),
    "410": (lambda h: h.answer(410), MissingFileError, "no such file"),
    "401": (lambda h: h.answer(401, WWW_Authenticate="Basic"), UnsupportedError, "status 401"),
    "403": (lambda h: h.answer(403), UnsupportedError, "status 403"),
    "500": (lambda h: h.answer(500), UnsupportedError, "status 500"),
    "204": (lambda h: h.answer(204, Content_Length=None), UnsupportedError, "status 204"),
    "999": (lambda h: h.answer(999), UnsupportedError, "status 999"),
    "no range, large": (lambda h: endless(h, 1 << 28), UnsupportedError, "cannot send a part"),
    "no range, no length, large": (endless, UnsupportedError, "cannot send a part"),
    "no content-range": (lambda h: h.answer(206, bytes(9)), UnsupportedError, "which bytes"),
    "unknown size": (lying("bytes 0-32767/*"), UnsupportedError, "which bytes"),
    "odd content-range": (lying("bytes 0-x/9"), UnsupportedError, "which bytes"),
    "huge content-range": (lying("bytes 0-32767/" + "9" * 400), UnsupportedError, "which bytes"),
    "other start": (lying("bytes 1-32768/99999"), CorruptFileError, "asked for"),
    "too much": (lying("bytes 0-65535/99999", bytes(65536)), CorruptFileError, "asked for"),
    "too little": (lying("bytes 0-9/99999", bytes(10)), CorruptFileError, "asked for"),
    "more than it says": (lying("bytes 0-9/10", bytes(99)), CorruptFileError, "promised 10"),
    "less than it says": (lying("bytes 0-32767/99999", bytes(99)), CorruptFileError, "promised 32768"),
    "cut": (cut, CorruptFileError, "promised"),
    "negative": (lying("bytes 0--1/0", b""), UnsupportedError, "which bytes"),
    "nothing there": (lambda h: h.answer(416, Content_Range="bytes */99999"), CorruptFileError, "nothing lies there"),
    "nothing there, unsaid": (lambda h: h.answer(416), UnsupportedError, "status 416"),
    "gzip": (lambda h: h.part(Content_Encoding="gzip"), UnsupportedError, "Content-Encoding"),
    "endless redirects": (lambda h: h.answer(302, Location=h.path), UnsupportedError, "could not be read"),
    "redirect to a file": (redirect("file:///etc/passwd"), UnsupportedError, "could not be read"),
    "redirect nowhere": (redirect("http://127.0.0.1:9/?tok3n"), UnsupportedError, "could not be read"),
    "no HTTP": (lambda h: h.wfile.write(b"hello tok3n\r\n\r\n"), UnsupportedError, "could not be read"),
    "hang-up": (lambda h: setattr(h, "close_connection", True), UnsupportedError, "could not be read"),
    "hangs": (hang, UnsupportedError, "did not answer in time"),
    "trickles": (trickle, UnsupportedError, "did not answer in time"),
}


@contextmanager
def nothing_shown(caplog):
    """No secret in a log, a warning or the whole traceback of what is raised inside, which is passed on."""
    caplog.set_level(logging.DEBUG)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        failure = None
        try:
            yield
        except Exception as error:
            failure = error
    said = caplog.text + "".join(str(w.message) for w in warned)
    if failure is not None:
        said += "".join(traceback.format_exception(failure)) + str(failure) + repr(failure.__dict__)
        said += repr((failure, failure.__cause__, failure.__context__))
    assert not [word for word in SECRETS if word in said], said
    if failure is not None:
        raise failure


@pytest.mark.parametrize("twist", TWISTS)
def test_a_server_that_misbehaves_gives_an_error_of_ours(twist, web, tmp_path, caplog):
    web.files["dir/m.pt"] = small(tmp_path, "m.pt")
    web.twists["dir/m.pt"], kind, words = TWISTS[twist]
    began = time.monotonic()
    address = f"{web.base}/dir/m.pt?sig=hidden".replace("//", "//me:s3cret@")
    slow = twist in ("hangs", "trickles")
    with pytest.raises(kind, match=words) as caught, nothing_shown(caplog):
        wb.open(address, storage_options={**KEY, "timeout": 0.3} if slow else KEY)
    assert time.monotonic() - began < {"hangs": 2, "trickles": 9}.get(twist, 15)
    assert web.moved < (48 << 20 if twist == "no range, no length, large" else 16 << 20)  # what the sockets hold included
    assert f"http://127.0.0.1:{web.server_port}/dir/m.pt" in str(caught.value)
    assert web.headers[0]["X-Key"] == "tok3n"
    assert web.headers[0]["Authorization"].startswith("Basic ")


@pytest.mark.parametrize("twist", sorted(set(TWISTS) - {"404", "410"}))
def test_a_server_that_begins_to_misbehave_gives_an_error_of_ours(twist, web, tmp_path, caplog):
    save_file({"w": torch.ones(1 << 20)}, tmp_path / "m")
    web.files["m"] = (tmp_path / "m").read_bytes()
    ckpt = wb.open(f"{web.base}/m?sig=hidden", storage_options=KEY)
    if twist in ("hangs", "trickles"):
        object.__setattr__(ckpt.source.address, "seconds", 0.3)
    web.twists["m"] = TWISTS[twist][0]
    with pytest.raises((UnsupportedError, CorruptFileError, FileChangedError)), nothing_shown(caplog):
        ckpt["w"].load()


def test_a_small_file_is_read_whole_once_where_the_server_sends_no_parts(web, tmp_path):
    web.files["m"] = small(tmp_path)
    web.twists["m"] = no_range
    assert holds(wb.open(f"{web.base}/m"), state())
    assert len(web.asked) == 1


def test_redirects_are_followed_and_credentials_stay_behind(web, tmp_path):
    other = Web()
    other.files["m"] = small(tmp_path)
    web.twists["a"] = redirect(f"{other.base}/m?sig=hidden")
    ckpt = wb.open(f"{web.base}/a".replace("//", "//me:s3cret@"))
    assert holds(ckpt, state())
    assert ckpt.source.url == f"{web.base}/a"
    assert "Authorization" in web.headers[0]
    assert not any("Authorization" in headers for headers in other.headers)
    other.shutdown()
    other.server_close()


def test_an_empty_file_and_one_without_a_server(web, caplog):
    web.files["m"] = b""
    with pytest.raises(UnknownFormatError):
        wb.open(f"{web.base}/m")
    address = "http://me:s3cret@127.0.0.1:9/m?hidden"
    with pytest.raises(UnsupportedError, match="ClientConnector"), nothing_shown(caplog):
        wb.open(address)


@pytest.mark.parametrize("what", ["hangs", "refuses", "not S3"])
def test_an_s3_server_that_misbehaves_gives_an_error_of_ours(what, web, caplog, monkeypatch):
    web.twists["models/m.pt"] = {"hangs": hang, "refuses": lambda h: h.answer(403), "not S3": lambda h: h.answer(200, b"<x>hello")}[what]
    monkeypatch.setattr(Handler, "do_HEAD", Handler.do_GET, raising=False)
    options = {
        "key": "tok3n",
        "secret": "s3cret",
        "endpoint_url": web.base,
        "config_kwargs": {"read_timeout": 0.2, "retries": {"max_attempts": 0}},
    }
    began = time.monotonic()
    with pytest.raises(UnsupportedError, match=r"s3://models/m\.pt") as caught:
        wb.open("s3://models/m.pt", storage_options={**options, "timeout": 0.3})
    assert time.monotonic() - began < 20
    assert not [word for word in SECRETS if word in "".join(traceback.format_exception(caught.value))]


# addresses


def test_nothing_secret_is_shown(web, tmp_path, caplog):
    web.files["dir/m.pt"] = small(tmp_path, "m.pt")
    address = f"{web.base}/dir/m.pt?sig=hidden#tok3n".replace("//", "//me:s3cret@")
    with nothing_shown(caplog):
        ckpt = wb.open(address, storage_options=KEY)
        ckpt["layer.weight"].load()
        shown = [repr(ckpt), str(ckpt), ckpt._repr_html_(), repr(ckpt.source), str(ckpt.source.folder), repr(ckpt.source.address)]
        shown += [repr(ckpt["layer.weight"]), repr(ckpt["layer.weight"].source), json.dumps(wb.diff(ckpt, ckpt).to_dict(), default=str)]
        shown += [repr(ckpt.source.identity), repr(ckpt.history), str(wb.stats(ckpt)), repr(wb.ops.cast(ckpt, "float16", names="layer.*"))]
    assert not [word for word in SECRETS if word in "".join(shown)]
    assert ckpt.source.url == f"{web.base}/dir/m.pt"
    assert ckpt.name == "m.pt"
    assert b"hidden" in pickle.dumps(ckpt)  # as the module says: who reads elsewhere must have it


def test_the_command_line_shows_nothing_secret(web, tmp_path):
    web.files["m.pt"] = small(tmp_path, "m.pt")
    for name, code, extra in (("m.pt", 0, []), ("none.pt", 2, ["--json"])):
        address = f"{web.base}/{name}?sig=hidden".replace("//", "//me:s3cret@")
        line = [sys.executable, "-m", "workbench", "inspect", address, *extra]
        done = subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == code, done.stderr
        assert not [word for word in SECRETS if word in done.stdout + done.stderr]
        assert code or not done.stderr


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("zip://a::https://h/s3cret", "zip://"), ("simplecache::s3://models/s3cret", "simplecache::s3://"), ("nonsense://h/s3cret", "nonsense://"),
        ("reference://h/s3cret", "reference://"), ("sftp://me:s3cret@h/m", "sftp://"), ("git://h/s3cret", "git://"), ("file://h/s3cret", "file://"),
        ("http://me:s3/cret@h/m", "no host"), ("http://me:s3?cret@h/m", "no host"), ("http:///m", "no host"), ("http://", "no host"), ("://x", "://"),
        ("http://h/dir/", "does not list"), ("http://h/dir/?hidden", "does not list"), ("http://h", "could not be read"), ("http://h:99999999/m", "could not be read"),
    ],
)  # fmt: skip
def test_an_address_that_is_not_read_says_why(address, words, caplog):
    with pytest.raises(UnsupportedError, match=words) as caught, nothing_shown(caplog):
        wb.open(address)
    assert "cret" not in str(caught.value)


def test_file_addresses_are_local_paths(tmp_path):
    small(tmp_path, "a b.pt")
    assert wb.open(f"file://{tmp_path}/a%20b.pt").source.address is None
    assert wb.open((tmp_path / "a b.pt").as_uri()).source.url == str(tmp_path / "a b.pt")
    assert isinstance(place(f"file://localhost{tmp_path}"), Folder)


@pytest.mark.parametrize("seconds", [0, -1, "soon", None])
def test_a_timeout_that_is_none_is_refused(seconds):
    with pytest.raises(SelectionError, match="timeout"):
        wb.open("http://127.0.0.1:9/m", storage_options={"timeout": seconds})


STRANGE = ["/etc/passwd", "../m", "a/../../m", "..", ".", "", "a//b", "a/", "a\\b", "%2e%2e/m", "%252e%252e/m", "..%2fm", "%2Fetc", "a\0b", "a\nb", "http://h/m", "s3://models/m"]  # fmt: skip


@pytest.mark.parametrize("name", STRANGE)
def test_a_name_that_leads_out_of_a_remote_folder_is_refused(name, web):
    for folder in (place("memory://"), Folder(f"{web.base}/dir", remote._Remote("http", f"{web.base[7:]}/dir", {}, 1.0))):
        with pytest.raises(UnsupportedError, match="leads out"):
            folder.file(name)
    assert not web.asked


def test_names_with_odd_characters_are_asked_for_as_they_are(web, tmp_path):
    name = "a b/ü#1?x=2;%&'\"<y>@[z].safetensors"
    web.files[f"dir/{name}"] = small(tmp_path)
    web.files["dir/i.json"] = json.dumps({"weight_map": dict.fromkeys(state(), name)}).encode()
    ckpt = wb.open(f"{web.base}/dir/i.json?token=hidden")
    assert holds(ckpt, state())
    web.files["with space"] = small(tmp_path)
    assert list(wb.open(f"{web.base}/with space")) == list(wb.open(f"{web.base}/with%20space"))
    for char in "?#@":
        with pytest.raises(UnsupportedError, match="leads out"):
            place("memory://").file(f"a{char}b")


def test_the_query_reaches_the_server_as_it_was_written(web, tmp_path):
    seen = []
    web.files["m"] = small(tmp_path)
    web.twists["m"] = lambda handler: (seen.append(handler.path), handler.part())
    wb.open(f"{web.base}/m?sig=a%2Fb%2B%3D+c/d&x=%C3%BC")
    assert seen[0] == "/m?sig=a%2Fb%2B%3D+c/d&x=%C3%BC"
    assert parse_qs(urlsplit(seen[0]).query)["sig"] == ["a/b+= c/d"]


def test_saving_to_an_address_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WorkbenchError):
        wb.save({"w": torch.ones(1)}, "s3://models/x.pt")
    assert not list(tmp_path.iterdir())


def test_a_remote_checkpoint_is_saved_and_compared_like_a_local_one(web, tmp_path):
    web.files["m.pt"] = small(tmp_path, "m.pt")
    ckpt = wb.open(f"{web.base}/m.pt")
    wb.save(ckpt, tmp_path / "copy.pt")
    assert wb.diff(tmp_path / "copy.pt", f"{web.base}/m.pt")


# what is not installed

WITHOUT = """
import sys
sys.modules[sys.argv[1]] = None
import workbench as wb
try:
    wb.open(sys.argv[2])
except wb.errors.MissingDependencyError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("library", "address", "words"),
    [
        ("fsspec", "https://h/m", 'pip install "checkpoint-workbench[remote]"'),
        ("aiohttp", "https://h/m", 'aiohttp\n  pip install "checkpoint-workbench[remote]" aiohttp'),
        ("s3fs", "s3://b/m", 'pip install "checkpoint-workbench[remote]" s3fs'),
        ("gcsfs", "gs://b/m", "gcsfs"),
        ("huggingface_hub", "hf://o/m/x", "huggingface_hub"),
    ],
)
def test_a_library_that_is_not_installed_is_named(library, address, words):
    done = subprocess.run([sys.executable, "-c", WITHOUT, library, address], capture_output=True, text=True, timeout=60, check=False)
    assert words in done.stdout, done.stderr


def test_local_files_need_none_of_it(tmp_path):
    small(tmp_path, "m.pt")
    code = "import sys; sys.modules['fsspec'] = None; import workbench as wb; len(wb.open(sys.argv[1])); print('workbench.remote' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "m.pt")], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip() == "False", done.stderr


# threads and processes


def test_threads_read_one_remote_file(web, tmp_path):
    tensors = {f"t{i}": torch.randn(3000 * (i + 1)) for i in range(40)}
    save_file(tensors, tmp_path / "m")
    web.files["m"] = (tmp_path / "m").read_bytes()
    ckpt = wb.open(f"{web.base}/m")
    with ThreadPoolExecutor(8) as pool:
        found = dict(zip(tensors, pool.map(lambda name: ckpt[name].load(), tensors), strict=True))
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_a_running_event_loop_is_no_obstacle(web, tmp_path):
    """As in a notebook."""
    web.files["m"] = small(tmp_path)

    async def cell():
        return holds(wb.open(f"{web.base}/m"), state())

    assert asyncio.run(cell())


def read_elsewhere(data):
    ckpt = pickle.loads(data)
    return ckpt["layer.weight"].load().tolist()


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_a_pickled_checkpoint_is_read_in_another_process(method, web, s3, tmp_path):
    options, system, _ = s3
    web.files["m"] = small(tmp_path)
    system.pipe_file("models/elsewhere", web.files["m"])
    addresses = ((f"{web.base}/m?sig=hidden", {}), ("s3://models/elsewhere", options))
    pickled = [pickle.dumps(wb.open(address, storage_options=given)) for address, given in addresses]
    remote._blocks.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking beside threads
        with multiprocessing.get_context(method).Pool(1) as pool:
            for data in pickled:
                assert pool.apply_async(read_elsewhere, (data,)).get(60) == state()["layer.weight"].tolist()


def test_a_child_waits_for_no_lock_of_its_parents_threads():
    with remote._lock, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
        if not child:
            os._exit(0 if remote._lock.acquire(timeout=5) else 1)
    assert os.waitpid(child, 0)[1] == 0
