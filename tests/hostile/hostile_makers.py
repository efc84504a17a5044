"""Makers of bad files, from the formats' specifications: zip records by hand, pickles by opcode, safetensors by byte."""

import json
import struct
import zipfile
import zlib

PROTO = b"\x80\x02"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"
HOOKS = b"ccollections\nOrderedDict\n)R"


def text(value):
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def number(value):
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def numbers(values):
    return b"(" + b"".join(map(number, values)) + b"t"


def storage(key="0", numel=3, cls="FloatStorage", place="cpu"):
    return b"(" + text("storage") + f"ctorch\n{cls}\n".encode() + text(key) + text(place) + number(numel) + b"tQ"


def tensor(key="0", numel=3, shape=(3,), strides=(1,), offset=0, cls="FloatStorage"):
    """The opcodes of one tensor, as torch spells them but for the memo."""
    return REBUILD + b"(" + storage(key, numel, cls) + number(offset) + numbers(shape) + numbers(strides) + b"\x89" + HOOKS + b"tR"


def pickled(pairs):
    """A dict of (name, opcodes of its value)."""
    return PROTO + b"}(" + b"".join(text(name) + value for name, value in pairs) + b"u."


REAL = [("weight", tensor("0")), ("bias", tensor("1"))]
REAL_DATA = {"0": struct.pack("<3f", 1, 2, 3), "1": struct.pack("<3f", 4, 5, 6)}


def torch_zip(path, pickle, storages=None, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("archive/data.pkl", pickle)
        archive.writestr("archive/byteorder", "little")
        for key, data in (REAL_DATA if storages is None else storages).items():
            archive.writestr(f"archive/data/{key}", data)
        archive.writestr("archive/version", "3\n")
    return path


class Record:
    """One zip record whose local and central headers may tell different stories."""

    def __init__(self, name, data=b"", **lies):
        self.name, self.data, self.lies = name.encode(), data, lies

    def header(self, side, at):
        told = {
            "name": self.name,
            "flags": 0,
            "method": 0,
            "crc": zlib.crc32(self.data),
            "packed": len(self.data),
            "size": len(self.data),
            "extra": b"",
            "header": at,
        }
        told |= {key.removeprefix(side + "_"): value for key, value in self.lies.items() if key.startswith(side + "_")}
        told |= {key: value for key, value in self.lies.items() if key in told}
        t = told
        common = struct.pack(
            "<HHHHHIIIHH",
            20,
            t["flags"],
            t["method"],
            0,
            33,
            t["crc"] & 0xFFFFFFFF,
            t["packed"],
            t["size"],
            len(t["name"]),
            len(t["extra"]),
        )
        if side == "local":
            return b"PK\x03\x04" + common + t["name"] + t["extra"]
        return b"PK\x01\x02" + struct.pack("<H", 20) + common + struct.pack("<HHHII", 0, 0, 0, 0, t["header"]) + t["name"] + t["extra"]


def raw_zip(path, records, *, prefix=b"", suffix=b"", comment=b"", count=None, end=b""):
    """An archive written by hand. `end` stands in front of the end record."""
    out, directory = bytearray(prefix), b""
    for record in records:
        directory += record.header("central", len(out))
        out += record.header("local", len(out)) + record.data
    start = len(out)
    out += directory + end
    n = len(records) if count is None else count
    out += b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, n, n, len(directory), start, len(comment)) + comment + suffix
    path.write_bytes(bytes(out))
    return path


def good_records(pickle=None, **lies):
    """The records of a small good archive; `lies` go to the storage of `weight`."""
    return [
        Record("archive/data.pkl", pickled(REAL) if pickle is None else pickle),
        Record("archive/byteorder", b"little"),
        Record("archive/data/0", REAL_DATA["0"], **lies),
        Record("archive/data/1", REAL_DATA["1"]),
        Record("archive/version", b"3\n"),
    ]


def safetensors(path, header, data=b"", length=None):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def entry(begin=0, end=4, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def laugh(levels, container=b"]"):
    """A tree of 4 ** levels nodes in a few bytes: each level holds the one below four times. Left in memo 0."""
    if container == b"]":
        return b"]q\x00" + b"0](h\x00h\x00h\x00h\x00eq\x00" * levels
    return b"}q\x00" + b"0}(K\x01h\x00K\x02h\x00K\x03h\x00uq\x00" * levels
