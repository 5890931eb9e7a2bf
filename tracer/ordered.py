"""The file below HDF5, written so that it is whole after every single write, wherever the process is killed.

HDF5 updates its metadata in place, a block at a time and in the order of addresses.  A kill between two of those writes
leaves, say, a chunk index that points behind the end of the file, and no committed step can be read.  So HDF5 is given
this object for a file (h5py's driver for Python file objects).  What it writes is held back, and `settle` brings it to
disk in an order in which nothing ever refers to what is not there yet:

1. the file is made as long as HDF5 says that it is;
2. blocks in space that was never used, to which nothing on disk refers;
3. the superblock, which holds the length;
4. headers of heaps of names, without their list of free places (only a writer needs it): a heap that has moved is read
   from its new place from here on;
5. blocks in space that was given back by a heap and is used again for something else;
6. blocks that are replaced: names and headers of objects, then indices from the root down (a node that was split keeps
   its entries until its parent knows both halves), then the lists of members of groups;
7. headers of heaps as they are.

Rows of tensors do not pass through here twice: `direct` writes them at once, into space that no committed step uses.
Invariant: every prefix of the writes is a file that opens, with every committed step in it (tests/tracer/test_ordered.py
cuts it at each write).  Source of the structures: HDF5 File Format Specification, version 3.0, III.A (B-trees, symbol
table nodes, local heaps).
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

# Free space that must be left beside an allocation: HDF5's own metadata, and the end document.
RESERVE_BYTES: Final = 2 * 2**20

SUPERBLOCK: Final = 0
# A B-tree node: signature 4, type 1, level 1 …
_TREE: Final = b"TREE"
_LEVEL_AT: Final = 5
# A symbol table node, the members of a group.
_SYMBOLS: Final = b"SNOD"
# The header of a local heap, if the heap itself is elsewhere: signature 4, version 4, size 8, first free place 8, address 8.
_HEAP: Final = b"HEAP"
_HEAP_HEADER: Final = 32
_FREE_AT: Final = slice(16, 24)
_NO_FREE_PLACE: Final = (1).to_bytes(8, "little")


class OrderedFile:
    """A file object for `h5py.File(…, "w")`, and the space below it.

    `fd`: open for reading and writing; `close` closes it.  `durable`: every stage of `settle` waits for the disk, so that the
    order holds for a lost power cable too.  Raises OSError where the operating system does, never inside HDF5.
    """

    def __init__(self, path: Path, fd: int, *, durable: bool = False) -> None:
        self._path = path
        self._fd = fd
        self._durable = durable
        self._at = 0
        self._end = 0  # the length of the file as HDF5 has it
        self._held: dict[int, bytes] = {}  # what is not on disk yet, by address
        self._written: dict[int, int] = {}  # the blocks that are on disk: address -> length; they do not overlap
        self._places: list[int] = []  # their addresses, ascending
        self._direct = False
        self._failed: OSError | None = None

    # What h5py calls.

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move; SEEK_END is relative to the length that HDF5 knows."""
        self._at = offset + (max(self._end, self.size) if whence == os.SEEK_END else 0)
        return self._at

    def tell(self) -> int:
        """The position."""
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` with what HDF5 wrote here, on disk or not."""
        view = memoryview(buffer).cast("B")
        start, end = self._at, self._at + len(view)
        found = os.pread(self._fd, len(view), start)
        view[: len(found)] = found
        for at, block in self._held.items():
            first, last = max(at, start), min(at + len(block), end)
            if first < last:
                view[first - start : last - start] = block[first - at : last - at]
        return len(view)

    def read(self, size: int) -> bytes:
        """`size` bytes; h5py knows a file object by this method, and calls `readinto`."""
        block = bytearray(size)
        self.readinto(block)
        return bytes(block)

    def write(self, buffer: Any) -> int:
        """Hold a block of metadata back; inside `direct`, write it."""
        if self._direct:
            try:
                self.put(self._at, buffer)
            except OSError as error:
                # Kept: an exception must not cross HDF5.
                self._failed = error
        else:
            self._hold(self._at, bytes(buffer))
        return len(buffer)

    def truncate(self, size: int) -> int:
        """HDF5 says how long the file is."""
        self._end = size
        return size

    def flush(self) -> None:
        """Nothing: `settle` decides when."""

    # What the writer calls.

    @contextlib.contextmanager
    def direct(self) -> Iterator[None]:
        """Inside, writes go to disk at once: rows of tensors, into space that is there and that no committed step uses."""
        self._direct, self._failed = True, None
        try:
            yield
        finally:
            self._direct = False
        if self._failed is not None:
            raise self._failed

    def put(self, offset: int, data: Any) -> None:
        """Write bytes at an offset, whole."""
        view = memoryview(data).cast("B")
        while view:
            done = os.pwrite(self._fd, view, offset)
            view, offset = view[done:], offset + done

    def settle(self) -> None:
        """Bring to disk what HDF5 has written since the last time.  Call it after HDF5's own flush."""
        if not self._held and self._end == self.size:
            return
        self._lengthen()
        for stage in self._stages():
            for at, block in sorted(stage.items()):
                self.put(at, block)
            self.sync()
        for at, block in self._held.items():
            self._remember(at, len(block))
        self._held.clear()
        if self._end < self.size:
            os.ftruncate(self._fd, self._end)

    def require(self, more: int) -> None:
        """Raise OSError unless `more` bytes and the reserve can be added to the file.

        Asked before HDF5 changes anything, so that a full disk is met while the file is whole.
        """
        wanted = more + RESERVE_BYTES
        if hasattr(os, "posix_fallocate"):
            size = self.size
            try:
                os.posix_fallocate(self._fd, size, wanted)
            finally:
                os.ftruncate(self._fd, size)
        elif shutil.disk_usage(self._path.parent).free < wanted:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    @property
    def size(self) -> int:
        """Length of the file on disk in bytes."""
        return os.fstat(self._fd).st_size

    def sync(self) -> None:
        """With `durable`, wait until what was written is on the disk."""
        if self._durable:
            os.fsync(self._fd)

    def close(self) -> None:
        """Give the descriptor back."""
        os.close(self._fd)

    def _hold(self, at: int, block: bytes) -> None:
        """Remember a block, in place of whatever of older ones it covers (space that was freed and given out again)."""
        end = at + len(block)
        same = self._held.get(at)
        if same is None or len(same) != len(block):
            for start, old in list(self._held.items()):
                if start < end and at < start + len(old):
                    del self._held[start]
                    if start < at:
                        self._held[start] = old[: at - start]
                    if end < start + len(old):
                        self._held[end] = old[end - start :]
        self._held[at] = block

    def _lengthen(self) -> None:
        """Make the file as long as HDF5 has it, with real blocks behind it where the system can."""
        size = self.size
        if self._end <= size:
            return
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(self._fd, size, self._end - size)
        else:
            os.ftruncate(self._fd, self._end)

    def _stages(self) -> list[dict[int, bytes]]:
        """What is held, in the stages in which it may be written."""
        new: dict[int, bytes] = {}
        superblock: dict[int, bytes] = {}
        moved: dict[int, bytes] = {}
        reused: dict[int, bytes] = {}
        heaps: dict[int, bytes] = {}
        replaced: dict[int, dict[int, bytes]] = {}
        for at, block in self._held.items():
            if at == SUPERBLOCK:
                superblock[at] = block
            elif self._written.get(at) != len(block):
                (reused if self._covered(at, len(block)) else new)[at] = block
            elif block[:4] == _HEAP and len(block) == _HEAP_HEADER:
                moved[at] = block[: _FREE_AT.start] + _NO_FREE_PLACE + block[_FREE_AT.stop :]
                heaps[at] = block
            else:
                replaced.setdefault(_rank(block), {})[at] = block
        stages = [new, superblock, moved, reused, *(replaced[rank] for rank in sorted(replaced)), heaps]
        return [stage for stage in stages if stage]

    def _covered(self, at: int, length: int) -> list[int]:
        """Addresses of the blocks on disk that a block of this length at `at` lies over."""
        last = bisect.bisect_left(self._places, at + length)
        first = last
        while first and self._places[first - 1] + self._written[self._places[first - 1]] > at:
            first -= 1
        return self._places[first:last]

    def _remember(self, at: int, length: int) -> None:
        """A block is on disk now."""
        if self._written.get(at) != length:
            for other in self._covered(at, length):
                del self._written[other]
                self._places.remove(other)
            bisect.insort(self._places, at)
            self._written[at] = length


def _rank(block: bytes) -> int:
    """When a block that replaces another may be written: smaller is earlier."""
    signature = block[:4]
    if signature == _TREE:
        return 256 - block[_LEVEL_AT]
    return 257 if signature == _SYMBOLS else 0
