"""
A private file without a name: nobody else can open it, and it is gone with the process, however that ends.

Data bypasses the page cache where the file system can do that. There it would fill the memory of which there is too little.
"""

import errno
import fcntl
import mmap
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable

PAGE_BYTES = 4096
_CANNOT = (errno.EINVAL, errno.EOPNOTSUPP)


class NamelessFile:
    """
    Readable by its owner only (mode 0600), closed in programs that are started. Offsets, lengths and the memory read into or
    written from are whole pages.

    Raises:
        OSError: here and below, as the system says.
    """

    def __init__(self, folder: str):
        self._fd, path = tempfile.mkstemp(prefix="hf_fpdt-", dir=folder)
        weakref.finalize(self, os.close, self._fd).atexit = False  # at exit a thread may be using it
        os.unlink(path)
        self._use_direct_io()
        self.num_bytes = 0

    def free_bytes(self) -> int:
        """What the disk has left for this user."""
        return shutil.disk_usage(self._fd).free

    def grow(self, num_bytes: int) -> None:
        """Adds bytes at the end, their blocks reserved if the file system can: writing to them then needs no more space."""
        try:
            os.posix_fallocate(self._fd, self.num_bytes, num_bytes)
        except OSError as error:
            if error.errno not in _CANNOT:
                os.ftruncate(self._fd, self.num_bytes)  # it may have got some of them
                raise
            os.ftruncate(self._fd, self.num_bytes + num_bytes)
        self.num_bytes += num_bytes

    def write(self, memory: memoryview, offset: int) -> None:
        _in_full(lambda rest, at: os.pwrite(self._fd, rest, at), memory, offset)

    def read(self, memory: memoryview, offset: int) -> None:
        _in_full(lambda rest, at: os.preadv(self._fd, [rest], at), memory, offset)

    def _use_direct_io(self) -> None:
        flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
        try:
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flags | os.O_DIRECT)
            self.write(memoryview(mmap.mmap(-1, PAGE_BYTES)), 0)
        except OSError as error:
            if error.errno not in _CANNOT:
                raise
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flags)
        os.ftruncate(self._fd, 0)


def _in_full(call: Callable[[memoryview, int], int], memory: memoryview, offset: int) -> None:
    """The system moves at most 2 GiB in a call, and only a part if the disk becomes full on the way."""
    while memory:
        moved = call(memory, offset)
        if moved == 0:
            raise OSError(errno.EIO, "the file ended early")
        memory, offset = memory[moved:], offset + moved
