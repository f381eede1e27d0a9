"""
Page-locked host memory: locked once, in exactly sized pieces, and used again across layers and steps.

torch's own pinned allocator rounds every request up to a power of two (up to twice the memory) and locks inside the step. Here
anonymous memory is mapped in slabs and locked with `cudaHostRegister`; a best-fit list hands out pieces and joins them again
when they come back. An arena that is dropped unlocks its slabs. The forward and the backward of the models on one device take
turns with `take`; a piece may come back at any time and from any thread, also from the garbage collector.
"""

import mmap
import weakref
from bisect import bisect_left, insort
from collections import deque

import torch
from torch import Tensor

_PIECE_ALIGNMENT = 4096  # bytes
_SLAB_BYTES = 512 << 20


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
        self._free: list[list[tuple[int, int]]] = []  # per slab: sorted (offset, bytes), no two adjacent
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

    def take(self, num_bytes: int) -> "HostPiece":
        """
        A piece of at least `num_bytes` bytes, aligned to a page.

        Raises:
            RuntimeError: if the system cannot map or lock more host memory, with the bytes asked for and locked so far.
        """
        size = max(-(-num_bytes // _PIECE_ALIGNMENT), 1) * _PIECE_ALIGNMENT
        self._join_returned()
        fits = [(span[1], index, span) for index, spans in enumerate(self._free) for span in spans if span[1] >= size]
        if not fits:
            self._grow(size)
            return self.take(num_bytes)
        _, index, (offset, available) = min(fits)
        self._free[index].remove((offset, available))
        if available > size:
            insort(self._free[index], (offset + size, available - size))
        return HostPiece(self, index, offset, size)

    def memory(self, piece: "HostPiece") -> Tensor:
        """The piece as a `uint8` tensor."""
        return self._slabs[piece.slab][piece.offset : piece.offset + piece.size]

    def give_back(self, piece: "HostPiece") -> None:
        """Returns a piece. The caller has made sure that what uses the memory next comes after the last copy to or from it."""
        self._returned.append(piece)

    def _join_returned(self) -> None:
        while self._returned:
            self._join(self._returned.popleft())

    def _join(self, piece: "HostPiece") -> None:
        spans = self._free[piece.slab]
        start, stop = piece.offset, piece.offset + piece.size
        at = bisect_left(spans, (start, 0))
        if at < len(spans) and spans[at][0] == stop:
            stop += spans.pop(at)[1]
        if at > 0 and sum(spans[at - 1]) == start:
            start = spans.pop(at - 1)[0]
        insort(spans, (start, stop - start))

    def _grow(self, size: int) -> None:
        size = max(size, self._slab_bytes)
        try:
            slab = torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8)
            self._lock(slab)
        except (OSError, RuntimeError) as error:
            raise RuntimeError(
                f"hf_fpdt could not lock {size / 2**30:.2f} GiB more of host memory ({self.locked_bytes / 2**30:.2f} GiB "
                f'are locked already): {error}. Use FPDTConfig(offload="none"), FPDTConfig(save_attention=False), or a '
                "shorter sequence."
            ) from error
        weakref.finalize(self, self._unlock, slab).atexit = False  # at exit the driver goes first
        self._slabs.append(slab)
        self._free.append([(0, size)])


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


def _cuda_lock(slab: Tensor) -> None:
    result = torch.cuda.cudart().cudaHostRegister(slab.data_ptr(), slab.numel(), 0)
    torch.cuda.check_error(int(result))


def _cuda_unlock(slab: Tensor) -> None:
    torch.cuda.synchronize()  # a copy may still be in flight; nothing in a step gets here
    torch.cuda.check_error(int(torch.cuda.cudart().cudaHostUnregister(slab.data_ptr())))
