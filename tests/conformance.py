"""FormatTests: what every format must do. A format's test class subclasses it with a builder and the official loader.

class TestSafetensors(FormatTests):
    def build(self, folder): ...      # write files; return (path to open, files that make up the checkpoint)
    def official(self, path): ...     # name -> torch.Tensor by somebody else's code, in order
    magic = 9                         # bytes a file needs before its format can be told
"""

import os
import pickle
import shutil
import subprocess
import sys
import time

import pytest
import torch
from strategies import bits, same

import workbench as wb
from workbench.errors import CorruptFileError, FileChangedError, SpecMismatchError, UnknownFormatError, WorkbenchError

FULL = os.environ.get("WORKBENCH_TEST_PROFILE") == "full"
SECONDS = 2.0  # no broken small file may hold a reader up for longer


def state() -> dict[str, torch.Tensor]:
    """A small state dict that every format can store: 0-d, empty, bfloat16, bool, an odd name."""
    generator = torch.Generator().manual_seed(3)
    return {
        "layer.weight": torch.randn(3, 4, generator=generator),
        "layer.bias": torch.tensor([float("nan"), -0.0, float("inf")]),
        "half": torch.randn(5, generator=generator).to(torch.bfloat16),
        "step": torch.tensor(7),
        "none": torch.empty(0, 2),
        "mask of \u00fc": torch.tensor([True, False]),
    }


def listing(ckpt):
    return [(name, tensor.shape, tensor.dtype.name) for name, tensor in ckpt.items()]


def values(ckpt):
    return {name: bits(tensor.load()) for name, tensor in ckpt.items()}


def positions(data, most):
    """Byte positions to try: all of them in the full profile, else `most`, as far apart as needed and with the two ends whole."""
    if FULL or len(data) <= most:
        return range(len(data))
    step = 3 * len(data) // (2 * most) + 1
    return sorted({*range(most // 6), *range(0, len(data), step), *range(len(data) - most // 6, len(data))})


class FormatTests:
    magic = 0

    def build(self, folder):
        raise NotImplementedError

    def official(self, path):
        raise NotImplementedError

    @pytest.fixture
    def built(self, tmp_path):
        return self.build(tmp_path)

    def test_lists_what_the_official_loader_lists(self, built):
        expected = self.official(built[0])
        found = wb.open(built[0])
        assert [(n, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in expected.items()] == listing(found)

    def test_loads_the_official_values_bit_for_bit(self, built):
        found = wb.open(built[0])
        for name, tensor in self.official(built[0]).items():
            assert same(found[name].load(), tensor), name

    def test_strides_are_the_official_ones(self, built):
        found = wb.open(built[0])
        for name, tensor in self.official(built[0]).items():
            if tensor.numel():
                assert found[name].load().stride() == tensor.stride(), name

    def test_peek_gives_the_first_values(self, built):
        found = wb.open(built[0])
        for name, tensor in self.official(built[0]).items():
            expected = tensor.reshape(-1)[:5].tolist()
            assert repr(found[name].peek(5)) == repr(expected), name

    def test_raw_gives_the_bytes_as_they_lie(self, built):
        for name, tensor in self.official(built[0]).items():
            lazy = wb.open(built[0])[name]
            if lazy.is_contiguous:
                assert lazy.raw() == bits(tensor), name
                assert lazy.raw(1, 3) == bits(tensor)[1:3], name
            else:
                with pytest.raises(SpecMismatchError):
                    lazy.raw()

    @pytest.mark.parametrize("max_nbytes", [1, 3, 7, 16, 1 << 20])
    def test_chunks_put_together_are_the_tensor(self, built, max_nbytes):
        found = wb.open(built[0])
        for name, tensor in self.official(built[0]).items():
            pieces, at = [], 0
            for start, chunk in found[name].chunks(max_nbytes):
                assert start == at
                assert chunk.numel() * chunk.element_size() <= max(max_nbytes, chunk.element_size())
                at += chunk.numel()
                pieces.append(bits(chunk))
            assert b"".join(pieces) == bits(tensor), name

    def test_offset_is_where_the_bytes_lie(self, built):
        for name, tensor in self.official(built[0]).items():
            lazy = wb.open(built[0])[name]
            if lazy.is_contiguous and lazy.numel:
                with open(lazy.source.storage.file.url, "rb") as file:
                    file.seek(lazy.offset)
                    assert file.read(lazy.nbytes) == bits(tensor), name

    def test_a_pickled_checkpoint_reads_in_another_process_without_torch(self, built):
        code = "import pickle, sys; c = pickle.load(sys.stdin.buffer); print({n: t.raw().hex() for n, t in c.items() if t.is_contiguous}); assert 'torch' not in sys.modules"
        ckpt = wb.open(built[0])
        done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(ckpt), capture_output=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr.decode()
        assert done.stdout.decode().strip() == str({n: t.raw().hex() for n, t in ckpt.items() if t.is_contiguous})

    @pytest.mark.parametrize("change", ["rewritten", "truncated", "replaced"])
    def test_a_changed_file_is_refused_and_never_gives_other_bytes(self, built, change):
        path, files = built
        ckpt = wb.open(path)
        tensors = [tensor for tensor in ckpt.values() if tensor.numel]
        for file in files:
            data = file.read_bytes()
            if change == "rewritten":
                file.write_bytes(data)
                os.utime(file, ns=(1, 1))
            elif change == "truncated":
                os.truncate(file, len(data) - 1)
            else:
                shutil.copy2(file, f"{file}.new")
                os.replace(f"{file}.new", file)
        for tensor in tensors:
            for read in (tensor.load, tensor.peek, lambda t=tensor: list(t.chunks())):
                with pytest.raises(FileChangedError):
                    read()

    def test_a_file_cut_at_any_byte_is_refused_or_whole(self, built):
        """The cut law: CorruptFileError, UnknownFormatError inside the magic, or exactly the whole listing and values."""
        path, files = built
        whole = wb.open(path)
        expected = listing(whole), values(whole)
        for file in files:
            data = file.read_bytes()
            for cut in positions(data, 500):
                file.write_bytes(data[:cut])
                try:
                    ckpt = wb.open(path)
                    found = listing(ckpt), values(ckpt)
                except CorruptFileError:
                    continue
                except UnknownFormatError:
                    assert cut < self.magic, f"{file.name} cut at {cut} of {len(data)} is called unknown"
                    continue
                assert found == expected, f"{file.name} cut at {cut} of {len(data)} gives another checkpoint"
            file.write_bytes(data)

    def test_a_flipped_byte_never_gives_a_foreign_exception_or_a_hang(self, built):
        path, files = built
        for file in files:
            data = file.read_bytes()
            for at in positions(data, 250):
                new_values = (data[at] ^ 0x01, 0x00, data[at] ^ 0x80, 0xFF)
                for new in new_values if FULL else new_values[at % 4 : at % 4 + 1]:
                    file.write_bytes(data[:at] + bytes([new]) + data[at + 1 :])
                    start = time.process_time()
                    try:
                        ckpt = wb.open(path)
                        str(ckpt)
                        for tensor in ckpt.values():
                            if tensor.nbytes < 1 << 20:
                                tensor.load()
                                tensor.peek()
                    except WorkbenchError:
                        pass
                    except Exception as error:  # name the byte
                        raise AssertionError(f"{file.name}: byte {at} set to {new:#x} gives {type(error).__name__}: {error}") from error
                    assert time.process_time() - start < SECONDS, f"{file.name}: byte {at} set to {new:#x} is slow"
            file.write_bytes(data)
