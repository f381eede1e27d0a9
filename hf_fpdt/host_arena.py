"""
Page-locked host memory: locked once, in exactly sized pieces, and used again across layers and steps.

torch's own pinned allocator rounds every request up to a power of two (up to twice the memory) and locks inside the step. Here
anonymous memory is mapped in slabs and locked with `cudaHostRegister`; a best-fit list hands out pieces and joins them again
when they come back. An arena that is dropped unlocks its slabs. The forward and the backward of the models on one device take
turns with `take`; a piece may come back at any time and from any thread, also from the garbage collector.
"""

import mmap
import time
import weakref
from collections import deque
from contextlib import suppress

import torch
from torch import Tensor

from .free_list import Span, cut, join, tightest
from .host_limits import RESERVE_BYTES, available_host_bytes
from .numa import near

_PIECE_ALIGNMENT = 4096  # bytes
_SLAB_BYTES = 512 << 20
_PATIENCE_S = 10.0  # a virtual machine may be given more memory while it is waited for
_KNOBS = (
    'Use FPDTConfig(save_attention=False), which keeps less, FPDTConfig(offload="none"), shorter sequences, or raise '
    "FPDTConfig(host_memory=...)."
)


class HostMemoryError(RuntimeError):
    """There is not enough host memory for what the backward needs."""


class HostArena:
    """
    Hands out page-locked host memory by the byte. Slabs are mapped when needed and stay as long as the arena.

    Args:
        slab_bytes: least size of a slab.
        lock, unlock: called with each slab, a `uint8` tensor, when it is mapped and when the arena is gone. `lock` raises
            RuntimeError if it cannot.
    """

    def __init__(self, slab_bytes: int = _SLAB_BYTES, lock=None, unlock=None):
        self._slab_bytes = slab_bytes
        self._lock, self._unlock = lock or _cuda_lock, unlock or _cuda_unlock
        self._slabs: list[Tensor] = []
        self._free: list[list[Span]] = []  # per slab
        self._returned: deque[HostPiece] = deque()  # not yet in the lists

    @property
    def locked_bytes(self) -> int:
        """Bytes of host memory locked so far."""
        return sum(slab.numel() for slab in self._slabs)

    @property
    def used_bytes(self) -> int:
        """Bytes handed out at present."""
        self._join_returned()
        return self.locked_bytes - sum(size for spans in self._free for _, size in spans)

    def take(self, num_bytes: int, limit_bytes: int | None = None) -> "HostPiece":
        """
        A piece of at least `num_bytes` bytes, aligned to a page.

        Args:
            limit_bytes: most that may be locked in all; None: what the machine can give, less a reserve.

        Raises:
            HostMemoryError: if that is more than the limit or than the machine can give, or if it cannot be locked; with the
                bytes needed, the bytes there, and the settings that help.
        """
        size = max(-(-num_bytes // _PIECE_ALIGNMENT), 1) * _PIECE_ALIGNMENT
        self._join_returned()
        fits = [(span, index) for index, spans in enumerate(self._free) if (span := tightest(spans, size)) is not None]
        if not fits:
            self._grow(size, limit_bytes)
            return self.take(num_bytes, limit_bytes)
        span, index = min(fits, key=lambda fit: (fit[0][1], fit[1]))
        return HostPiece(self, index, *cut(self._free[index], span, size))

    def memory(self, piece: "HostPiece") -> Tensor:
        """The piece as a `uint8` tensor."""
        return self._slabs[piece.slab][piece.offset : piece.offset + piece.size]

    def give_back(self, piece: "HostPiece") -> None:
        """Returns a piece. The caller has made sure that what uses the memory next comes after the last copy to or from it."""
        self._returned.append(piece)

    def _join_returned(self) -> None:
        while self._returned:
            piece = self._returned.popleft()
            join(self._free[piece.slab], (piece.offset, piece.size))

    def _grow(self, size: int, limit_bytes: int | None) -> None:
        size = self._size_of_next_slab(size, limit_bytes)
        try:
            slab = _mapped(size)
            self._lock(slab)
        except (OSError, RuntimeError) as error:
            raise HostMemoryError(f"{self._shortage(size)} The system refused: {error}. {_KNOBS}") from error
        weakref.finalize(self, self._unlock, slab).atexit = False  # at exit the driver goes first
        self._slabs.append(slab)
        self._free.append([(0, size)])

    def _size_of_next_slab(self, needed: int, limit_bytes: int | None) -> int:
        """A whole slab if there is room for it, else just what is needed; refused before anything is touched."""
        wanted = max(needed, self._slab_bytes)
        if limit_bytes is not None:
            left = limit_bytes - self.locked_bytes
            if left < needed:
                raise HostMemoryError(
                    f"{self._shortage(needed)} The limit is {limit_bytes / 2**30:.2f} GiB "
                    f"(FPDTConfig(host_memory={limit_bytes})). {_KNOBS}"
                )
            return min(wanted, left)
        deadline = time.monotonic() + _PATIENCE_S
        while (available := available_host_bytes()) is not None and available - RESERVE_BYTES < needed:
            if time.monotonic() > deadline:
                raise HostMemoryError(
                    f"{self._shortage(needed)} The machine, or the control group this process runs in, has "
                    f"{available / 2**30:.2f} GiB available, of which {RESERVE_BYTES / 2**30:.0f} GiB are left alone. {_KNOBS}"
                )
            time.sleep(0.2)
        return wanted if available is None or available - RESERVE_BYTES >= wanted else needed

    def _shortage(self, size: int) -> str:
        return (
            f"hf_fpdt needs {size / 2**30:.2f} GiB more of page-locked host memory; {self.locked_bytes / 2**30:.2f} GiB are "
            "locked already."
        )


class HostPiece:
    """A piece of an arena's slab; goes back to the arena once."""

    __slots__ = ("_arena", "offset", "size", "slab")

    def __init__(self, arena: HostArena, slab: int, offset: int, size: int):
        self._arena, self.slab, self.offset, self.size = arena, slab, offset, size

    def memory(self) -> Tensor:
        return self._arena.memory(self)

    def give_back(self) -> None:
        arena, self._arena = self._arena, None
        if arena is not None:
            arena.give_back(self)


def _mapped(size: int) -> Tensor:
    """
    Anonymous memory, in large pages where the system has them: these are locked in a third of the time of small ones. Private,
    as shared memory gets small ones; a forked process does not have it, so that none is copied when either of them writes.
    """
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
        with suppress(OSError, AttributeError):  # not on every system
            memory.madvise(getattr(mmap, advice))
    return torch.frombuffer(memory, dtype=torch.uint8)


def _cuda_lock(slab: Tensor) -> None:
    with near(torch.cuda.current_device()):
        result = int(torch.cuda.cudart().cudaHostRegister(slab.data_ptr(), slab.numel(), 0))
    if result != 0:
        _clear_last_cuda_error()
    torch.cuda.check_error(result)


def _clear_last_cuda_error() -> None:
    """
    The runtime keeps the error of a failed call for whoever asks next: torch, after its next launch, whatever that is of. So
    this launches something and takes the error.
    """
    with suppress(RuntimeError):
        torch.ones((), device="cuda")


def _cuda_unlock(slab: Tensor) -> None:
    torch.cuda.synchronize()  # a copy may still be in flight; nothing in a step gets here
    torch.cuda.check_error(int(torch.cuda.cudart().cudaHostUnregister(slab.data_ptr())))
