"""GGUF files for tests: by the official writer, and put together by hand from the specification; and the official reading of them."""

import struct

import gguf
import numpy as np
import torch

TYPES = gguf.GGMLQuantizationType
DECODED = [t for t in TYPES if t in gguf.quants._type_traits and t is not TYPES.BF16]


def packed(kind, rows, blocks, seed=0):
    """Rows of blocks with arbitrary bits, small enough that no 16-bit scale among them is infinite."""
    return np.random.default_rng(seed).integers(0, 60, (rows, blocks * gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)


def write(path, tensors, *, endian=gguf.GGUFEndian.LITTLE, **metadata):
    """A file by the official writer; tensors are arrays, or (type, packed bytes)."""
    writer = gguf.GGUFWriter(path, "llama", endianess=endian)
    for key, value in metadata.items():
        writer.add_key_value(key.replace("__", "."), value, gguf.GGUFValueType.get_type(value))
    for name, tensor in tensors.items():
        if isinstance(tensor, tuple):
            writer.add_tensor(name, tensor[1], raw_dtype=tensor[0])
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def by_gguf(path):
    """name -> values, by the official reader and dequantizer."""
    out = {}
    for tensor in gguf.GGUFReader(path).tensors:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        if tensor.tensor_type == TYPES.BF16:
            out[tensor.name] = torch.from_numpy(np.array(tensor.data).view(np.int16)).view(torch.bfloat16).reshape(shape)
        elif tensor.tensor_type in DECODED:
            with np.errstate(all="ignore"):
                out[tensor.name] = torch.from_numpy(gguf.quants.dequantize(np.array(tensor.data), tensor.tensor_type)).reshape(shape)
        else:
            data = np.array(tensor.data)
            out[tensor.name] = torch.from_numpy(data.astype(data.dtype.newbyteorder("="))).reshape(shape)
    return out


def write_split(path, tensors, number, count, total):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint16("split.no", number)
    writer.add_uint16("split.count", count)
    writer.add_int32("split.tensors.count", total)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor[1], raw_dtype=tensor[0]) if isinstance(tensor, tuple) else writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Hand:
    """A file as the specification lays it out, field by field."""

    def __init__(self, order="<", version=3):
        self.order, self.version = order, version
        self.pairs, self.infos = [], []

    def text(self, data):
        data = data.encode() if isinstance(data, str) else data
        return struct.pack(self.order + "Q", len(data)) + data

    def pair(self, key, kind, value):
        self.pairs.append(self.text(key) + struct.pack(self.order + "I", kind) + value)
        return self

    def info(self, name, dims, kind=0, offset=0):
        self.infos.append(self.text(name) + struct.pack(f"{self.order}I{len(dims)}QIQ", len(dims), *dims, kind, offset))
        return self

    def bytes(self, data=b"", *, tensors=None, pairs=None, alignment=32):
        counts = (len(self.infos) if tensors is None else tensors, len(self.pairs) if pairs is None else pairs)
        head = b"GGUF" + struct.pack(self.order + "IQQ", self.version, *counts) + b"".join(self.pairs) + b"".join(self.infos)
        return head + bytes(-len(head) % alignment) + data

    def write(self, folder, data=b"", **options):
        path = folder / "hand.gguf"
        path.write_bytes(self.bytes(data, **options))
        return path


def u32(value):
    return struct.pack("<I", value)


def u64(value):
    return struct.pack("<Q", value)


def hand():
    return Hand()
