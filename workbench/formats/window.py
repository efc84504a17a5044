"""Reading an index: small pieces at rising positions through one buffer, each proved to lie inside the file first."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

from workbench.errors import CorruptFileError, UnsupportedError

_WINDOW = 4 << 10  # a tensor's head is shorter, and a remote block a few of these
_MOST = 64 << 10  # where one piece adjoins the last, the next may be twice as long, up to here


class Window:
    """A buffer of 4 KiB or more that moves over `size` bytes; `pread(start, count)` fills it."""

    def __init__(self, pread: Callable[[int, int], bytes], size: int) -> None:
        self.size = size
        self._pread, self._start, self._data, self._ahead = pread, 0, b"", _WINDOW // 2

    def take(self, at: int, count: int) -> bytes:
        """`count` bytes at `at`; asked for beyond the end, nothing is read or allocated."""
        data, low = self.view(at, count)
        return data[low : low + count]

    def view(self, at: int, count: int) -> tuple[bytes, int]:
        """The buffer, and where in it those bytes begin."""
        low = at - self._start
        if low < 0 or low + count > len(self._data):
            if count > self.size - at:
                raise CorruptFileError(
                    f"{count} bytes are said to follow and {max(0, self.size - at)} are left: the file is cut", offset=at
                )
            self._ahead = min(2 * self._ahead, _MOST) if 0 <= low <= len(self._data) else _WINDOW
            self._data, self._start, low = self._pread(at, max(count, self._ahead)), at, 0
            if len(self._data) < count:
                raise CorruptFileError("the file ends before its own index says", offset=at)
        return self._data, low


@lru_cache(maxsize=4096)
def require_shape(shape: tuple[int, ...]) -> int:
    """How many elements a stated shape has, where torch can hold such a shape at all."""
    if len(shape) > 64:
        raise UnsupportedError(f"a shape of {len(shape)} dimensions; torch has 64 at most")
    if min(shape, default=0) < 0 or math.prod(max(n, 1) for n in shape) >= 1 << 63:
        raise CorruptFileError(f"{list(shape)} is no shape: a size below zero, or more elements than 63 bits can count")
    return math.prod(shape)
