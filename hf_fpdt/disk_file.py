"""
Tensors that wait for the backward in a file on a fast local disk: `FPDTConfig(offload="disk", disk_folder=...)`.

    save       device -> host piece (D2H stream) -> file      the last step by the file's one worker thread
    prefetch   file -> host piece                             by the worker, behind every write and read asked for before
    get        host piece -> device (H2D stream)              compute waits for the copy; the host waits for the disk, if late

Pieces of page-locked host memory are only passed through: one for each of at most `DiskFile.max_writes` tensors on their way to
the file, and one for each tensor from its `prefetch` to its `get`. When more is to be written the caller waits: a disk that is
slower than the compute makes the step slower, never larger.

Concurrency contract, on top of that of `transfers`.

- The worker does one thing at a time, in the order asked for. So a read sees the write before it, and an extent can be given
  back and handed out again while the worker still has to write or read it.
- It writes a piece after the event of the copy to it, and gives it back. Before it reads into a piece it waits for an event of
  the D2H stream: whoever had the memory before may have given it back with copies in the queues, and what is behind them is the
  next write on that stream.
- `get` makes compute wait for the copy from the piece and then gives the piece back, as `HostCopy` does.
- What goes wrong in the worker is raised by the next save, or by the `get` of the tensor it happened to.
"""

import errno
import os
import threading
import time
import weakref
from collections import deque
from functools import lru_cache
from queue import SimpleQueue

import torch
from torch import Tensor

from .free_list import Span, cut, join, tightest
from .host_arena import HostArena, HostMemoryError, HostPiece
from .nameless_file import PAGE_BYTES, NamelessFile
from .unchanged import changed_error

_POLL_S = 0.0005
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DiskFileError(RuntimeError):
    """The file in `FPDTConfig(disk_folder=...)` could not be written or read."""


class DiskSpaceError(DiskFileError):
    """There is not enough disk space for what the backward needs."""


class DiskFile:
    """
    A file that hands out extents by the page. It grows when needed and keeps its size as long as it lives.

    Like a host arena it belongs to the models on one device, whose forward and backward take turns with it; copies may be
    released at any time and from any thread. A process that was forked from this one needs a file of its own.

    Args:
        folder: on a fast local disk, where the file is made.

    Raises:
        ValueError: if no file can be made there.
    """

    max_writes = 4

    def __init__(self, folder: str):
        self._folder, self._pid = folder, os.getpid()
        try:
            self._file = NamelessFile(folder)
        except OSError as error:
            raise ValueError(
                f"FPDTConfig(disk_folder={folder!r}): no file can be made there: {error}. Name an existing folder on a fast "
                "local disk that this process may write to."
            ) from error
        self._free: list[Span] = []
        self._returned: deque[Span] = deque()  # not yet in the list
        self._writes: deque[_Job] = deque()  # in order; those that are over are dropped by the next save
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._worker: threading.Thread | None = None
        weakref.finalize(self, self._jobs.put, None).atexit = False

    @property
    def file_bytes(self) -> int:
        """Size of the file: the most that was handed out, and the gaps."""
        return self._file.num_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes handed out at present."""
        self._join_returned()
        return self.file_bytes - sum(size for _, size in self._free)

    def take(self, num_bytes: int) -> Span:
        """
        An extent of at least `num_bytes` bytes, aligned to a page: `(offset, bytes)`.

        Raises:
            DiskSpaceError: if the disk has no room for it; with the bytes needed, the bytes free, and the settings that help.
        """
        size = max(-(-num_bytes // PAGE_BYTES), 1) * PAGE_BYTES
        self._join_returned()
        if tightest(self._free, size) is None:
            self._grow(size)
        return cut(self._free, tightest(self._free, size), size)

    def give_back(self, extent: Span) -> None:
        """Returns an extent. What was asked of the worker with it is over before what its next user asks for begins."""
        self._returned.append(extent)

    def take_host(self, arena: HostArena, num_bytes: int, limit_bytes: int | None) -> HostPiece:
        """A piece of host memory to pass a tensor through. If there is none, waits for those on their way to the file."""
        while True:
            try:
                return arena.take(num_bytes, limit_bytes)
            except HostMemoryError:
                if not self._writes:
                    raise
            self._finish_oldest_write()

    def make_room(self) -> None:
        """Waits until one more tensor may be on its way to the file. Raises what went wrong with those before it."""
        self._check_process()
        while self._writes and (len(self._writes) >= self.max_writes or self._writes[0].done.is_set()):
            self._finish_oldest_write()

    def start(self, job: "_Job") -> "_Job":
        """Has the worker do a job, after everything asked for before."""
        self._check_process()
        if self._worker is None or not self._worker.is_alive():
            self._worker = threading.Thread(target=_work, args=(self._jobs,), name="hf_fpdt disk", daemon=True)
            self._worker.start()
        job.file = self._file
        self._jobs.put(job)
        if job.writes:
            self._writes.append(job)
        return job

    def wait_for(self, job: "_Job") -> None:
        """Makes the host wait for a job, and raises what went wrong with it."""
        self._check_process()
        job.done.wait()
        if job.error is not None:
            self._raise_error(job)

    def _finish_oldest_write(self) -> None:
        write = self._writes[0]
        write.done.wait()
        self._writes.popleft()
        if write.error is not None and write.wanted:
            self._raise_error(write)

    def _raise_error(self, job: "_Job") -> None:
        # A full disk fails every write under way. They are one error, and the next step starts without.
        for write in self._writes:
            write.done.wait()
        self._writes.clear()
        error, size = job.error, job.extent[1]
        if isinstance(error, OSError) and error.errno in _NO_SPACE:
            raise DiskSpaceError(self._shortage(size, error)) from error
        raise DiskFileError(
            f"{'Writing' if job.writes else 'Reading'} {size} bytes in FPDTConfig(disk_folder={self._folder!r}) failed: "
            f"{type(error).__name__}: {error}. Check that disk, or name a folder on another one."
        ) from error

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise RuntimeError(
                f"The file in FPDTConfig(disk_folder={self._folder!r}) belongs to process {self._pid}, from which this one, "
                f"{os.getpid()}, was forked. Run the forward and the backward of a step in the same process."
            )

    def _join_returned(self) -> None:
        while self._returned:
            join(self._free, self._returned.popleft())

    def _grow(self, size: int) -> None:
        offset = self._file.num_bytes
        more = size - (self._free[-1][1] if self._free and sum(self._free[-1]) == offset else 0)
        if self._file.free_bytes() < more:
            raise DiskSpaceError(self._shortage(more))
        try:
            self._file.grow(more)
        except OSError as error:
            if error.errno in _NO_SPACE:
                raise DiskSpaceError(self._shortage(more, error)) from error
            raise
        join(self._free, (offset, more))

    def _shortage(self, size: int, error: OSError | None = None) -> str:
        free, own = self._file.free_bytes(), self.file_bytes
        return (
            f"hf_fpdt needs {size} bytes ({size / 2**30:.2f} GiB) more in FPDTConfig(disk_folder={self._folder!r}); {free} "
            f"bytes ({free / 2**30:.2f} GiB) are free there, and {own / 2**30:.2f} GiB are in use for it already."
            f"{f' The system refused: {error}.' if error else ''} Name a disk_folder on a larger disk, use "
            "FPDTConfig(save_attention=False), which keeps less, or shorter sequences."
        )


class DiskCopy:
    """
    A tensor on its way to, in, or on its way back from the file. Same interface as `HostCopy`.

    Args:
        transfers: those of the tensor's device.
        limit_bytes: most host memory that may be locked in all; None: what the machine can give, less a reserve.

    Raises:
        DiskSpaceError, DiskFileError: if the disk has no room, or if what was kept before could not be written.
        HostMemoryError: if there is no host memory to pass the tensor through.
    """

    def __init__(self, transfers, disk_file: DiskFile, tensor: Tensor, limit_bytes: int | None = None):
        self._extent = self._write = self._read = self._fetched = None  # set first: __del__ runs even if there is no room
        self._transfers, self._file, self._host_limit = transfers, disk_file, limit_bytes
        self._shape, self._dtype, self._device = tensor.shape, tensor.dtype, tensor.device
        self._num_bytes = tensor.numel() * tensor.element_size()
        disk_file.make_room()
        self._extent = disk_file.take(self._num_bytes)
        write = self._new_job(writes=True)
        write.ready = transfers.copy_to_host(tensor, self._host(write))
        self._write = disk_file.start(write)

    def prefetch(self) -> None:
        """Starts to read the tensor into host memory, if that was not started yet."""
        if self._fetched is None and self._read is None:
            read = self._new_job(writes=False)
            # For the event, see the module: the D2H stream writes one byte, behind every earlier copy to or from the piece.
            byte = torch.empty(1, dtype=torch.uint8, device=self._device)
            read.ready = self._transfers.copy_to_host(byte, read.piece.memory()[:1])
            self._read = self._file.start(read)

    def get(self) -> Tensor:
        """The tensor on the device, safe to use on the current stream. The host waits for the disk if that is late."""
        if self._fetched is None:
            self.prefetch()
            self._file.wait_for(self._write)
            if self._write.ready is not None and self._write.ready.spoilt():
                raise changed_error(self._shape)
            self._file.wait_for(self._read)
            self._fetched = self._transfers.copy_to_device(self._host(self._read), self._read.ready)
        tensor, arrived = self._fetched
        self._transfers.wait(arrived)
        self._drop_read()
        return tensor

    def evict(self) -> None:
        """Drops the device's copy and keeps the file's."""
        if self._fetched is not None:
            self._transfers.wait(self._fetched[1])
            self._fetched = None
        self._drop_read()

    def release(self) -> None:
        """Drops the device's copy and returns the extent of the file. More than once is harmless."""
        self.evict()
        if self._write is not None:
            self._write.wanted = False
        extent, self._extent = self._extent, None
        if extent is not None:
            self._file.give_back(extent)

    def __del__(self):
        # A graph that is dropped without a backward gives its space back as well.
        self.release()

    def _new_job(self, *, writes: bool) -> "_Job":
        piece = self._file.take_host(self._transfers.arena, self._num_bytes, self._host_limit)
        return _Job(self._extent, piece, writes)

    def _host(self, job: "_Job") -> Tensor:
        return job.piece.memory()[: self._num_bytes].view(self._dtype).view(self._shape)

    def _drop_read(self) -> None:
        read, self._read = self._read, None
        if read is not None:
            read.wanted = False
            if read.done.is_set():  # otherwise the worker is the last to use it
                read.piece.give_back()


class _Job:
    """
    The worker's task of moving a piece of host memory to an extent of the file, or back. Owns the piece: whoever refers to the
    job last gives it back, if that was not done before.
    """

    def __init__(self, extent: Span, piece: HostPiece, writes: bool):
        self.extent, self.piece, self.writes = extent, piece, writes
        self.file: NamelessFile | None = None
        self.ready = None  # the device's write to the piece that comes first; None: it is over
        self.wanted = True  # False: nobody needs the result any more
        self.error: BaseException | None = None
        self.done = threading.Event()

    def run(self) -> None:
        try:
            if self.wanted:
                _wait_until_over(self.ready)
                offset, size = self.extent
                move = self.file.write if self.writes else self.file.read
                move(memoryview(self.piece.memory()[:size].numpy()), offset)
        except BaseException as error:
            self.error = error.with_traceback(None)  # which would keep the piece and the file
        finally:
            if self.writes:
                self.piece.give_back()
            self.done.set()

    def __del__(self):
        self.piece.give_back()


def _wait_until_over(write) -> None:
    """Makes the worker wait for a copy to the host, asleep: a wait inside of CUDA would keep a core busy."""
    if write is None:
        return
    with torch.cuda.device(write.done.device):  # from a new thread the query would set up the first device
        while not write.done.query():
            time.sleep(_POLL_S)


def _work(jobs: "SimpleQueue[_Job | None]") -> None:
    """The worker. Between jobs it refers to nothing, so that a file that nobody uses is closed."""
    while (job := jobs.get()) is not None:
        job.run()
        del job


@lru_cache
def _disk_file(folder: str, device: torch.device, pid: int) -> DiskFile:
    return DiskFile(folder)


def disk_file_for(folder: str, device: torch.device) -> DiskFile:
    """The file in a folder for the tensors of one device, made at first use in this process."""
    return _disk_file(folder, device, os.getpid())
