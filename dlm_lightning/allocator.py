"""What malloc holds of a CPU's memory: the blocks that are alive, and what it keeps of those that were freed."""

from __future__ import annotations

import ctypes
from typing import Any

ALIGNMENT = 64  # bytes, torch's on a CPU


class Mallinfo(ctypes.Structure):
    """glibc's `struct mallinfo2`, see mallinfo(3)."""

    _fields_ = (
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd")),
        *((name, ctypes.c_size_t) for name in ("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")),
    )


class Allocator:
    """Asks this process's own malloc for blocks as torch does, and never writes to them: they take addresses alone.

    What malloc cannot fit again into the gaps of its heap it takes on top. `most` is what it held at most, in bytes
    above what it held at first; 0 where the C library is not glibc, which alone tells.
    """

    def __init__(self) -> None:
        libc = ctypes.PyDLL(None)  # holds the interpreter's lock, so that blocks come from the main thread's heap
        self._libc: Any = libc if hasattr(libc, "mallinfo2") else None
        self._blocks: dict[int, ctypes.c_void_p] = {}
        self._first = self._held() if self._libc else 0
        self.most = 0

    def take(self, key: int, size: int) -> None:
        """Ask for a block; one that is refused is not counted."""
        if self._libc:
            block = ctypes.c_void_p()
            self._libc.posix_memalign(ctypes.byref(block), ctypes.c_size_t(ALIGNMENT), ctypes.c_size_t(size))
            self._blocks[key] = block
            self.most = max(self.most, self._held() - self._first)

    def give_back(self, key: int) -> None:
        """Free a block, unless it was freed already."""
        if self._libc:
            self._libc.free(self._blocks.pop(key, None))

    def close(self) -> None:
        """Free all blocks."""
        for key in list(self._blocks):
            self.give_back(key)

    def _held(self) -> int:
        self._libc.mallinfo2.restype = Mallinfo
        info = self._libc.mallinfo2()
        return info.arena + info.hblkhd
