"""
Tensors that wait for the backward: kept where they are, or moved to page-locked host memory under the compute.

Concurrency contract. Every process has one device-to-host and one host-to-device stream per device; "compute" is whatever
stream is current for the caller.

- `save` makes the D2H stream wait for compute as it stands, then copies. The source stays referenced until its copy is done;
  only then can the allocator hand its memory to later compute. At most `max_pending` sources wait at a time: beyond that,
  compute (not the host) waits for the oldest copy. The host is usually far ahead of the device and never sees a copy end, so
  this many do wait; `settle` lets go of all of them where they would be in the way.
- `prefetch` takes device memory on the compute stream, makes the H2D stream wait for compute as it stands (the memory may have
  been freed by work still queued) and for the D2H copy of the same tensor, then copies. `get` makes compute wait for it.
  A tensor that was prefetched is freed by compute after `get`, so its memory is not used again before the copy is over.
- A source that is changed in place while its copy may still be running spoils the copy: `get` raises. Behind the copy, which is
  as long as the source stays referenced, it may change.
- `release` returns the host memory at once. The next user of that memory writes it on the D2H stream after waiting for
  compute, and compute has waited for the last H2D read in `get`; if `get` was never called, `release` makes compute wait.

The host never waits: there is no `synchronize` in this module. While `Transfers.meter` is set, timing events stand around every
copy and every wait of compute; they order nothing.
"""

from collections import deque
from functools import lru_cache

import torch
from torch import Tensor

from .copy_meter import CopyMeter
from .host_arena import HostArena
from .unchanged import changed_error, version_of


class KeptTensor:
    """A tensor that stays where it is. Same interface as `HostCopy`."""

    def __init__(self, tensor: Tensor):
        self._tensor = tensor
        self._version = version_of(tensor)

    def prefetch(self) -> None:
        """Nothing to do: the tensor is there."""

    def get(self) -> Tensor:
        if version_of(self._tensor) != self._version:
            raise changed_error(self._tensor.shape)
        return self._tensor

    def evict(self) -> None:
        """Nothing to do: this is the only copy."""

    def release(self) -> None:
        self._tensor = None


class HostCopy:
    """
    A tensor on its way to, in, or on its way back from host memory.

    Args:
        limit_bytes: most host memory that may be locked in all; None: what the machine can give, less a reserve.
    """

    def __init__(self, transfers: "Transfers", tensor: Tensor, limit_bytes: int | None = None):
        self._piece = self._fetched = None  # set first: __del__ runs even if the arena refuses
        self._transfers = transfers
        self._piece = transfers.arena.take(tensor.numel() * tensor.element_size(), limit_bytes)
        num_bytes = tensor.numel() * tensor.element_size()
        self._host = self._piece.memory()[:num_bytes].view(tensor.dtype).view(tensor.shape)
        self._written = transfers.copy_to_host(tensor, self._host)

    def prefetch(self) -> None:
        """Starts the copy to the device, if it was not started yet."""
        if self._fetched is None:
            self._fetched = self._transfers.copy_to_device(self._host, self._written)

    def get(self) -> Tensor:
        """The tensor on the device, safe to use on the current stream."""
        self.prefetch()
        tensor, arrived = self._fetched
        if self._written is not None and self._written.spoilt():
            raise changed_error(tensor.shape)
        self._transfers.wait(arrived)
        return tensor

    def evict(self) -> None:
        """Drops the device's copy and keeps the host's."""
        if self._fetched is not None:
            self._transfers.wait(self._fetched[1])
            self._fetched = None

    def release(self) -> None:
        """Drops the device's copy and returns the host memory. More than once is harmless."""
        self.evict()
        if self._piece is not None:
            self._piece.give_back()
            self._piece = self._host = None

    def __del__(self):
        # A graph that is dropped without a backward gives its host memory back as well.
        self.release()


class HostWrite:
    """The copy of a tensor to the host, which ends with the event `done`. Refers to the tensor until `drop`."""

    def __init__(self, tensor: Tensor, done: torch.cuda.Event):
        self.done = done
        self._tensor, self._version, self._spoilt = tensor, version_of(tensor), False

    @property
    def device(self) -> torch.device:
        """Of the event."""
        return self.done.device

    def query(self) -> bool:
        """Whether the copy is over."""
        return self.done.query()

    def spoilt(self) -> bool:
        """Whether the tensor was changed in place before it was dropped."""
        return self._spoilt if self._tensor is None else version_of(self._tensor) != self._version

    def drop(self) -> None:
        """What changes the tensor from now on comes after the copy."""
        self._spoilt, self._tensor = self.spoilt(), None


class Transfers:
    """The two copy streams of one CUDA device and the host memory they use."""

    max_pending = 4

    def __init__(self, device: torch.device):
        self.arena = HostArena()
        self.moved_bytes = 0  # of all copies started so far, both ways
        self.meter: CopyMeter | None = None
        self._device = device
        self._d2h_stream = torch.cuda.Stream(device)
        self._h2d_stream = torch.cuda.Stream(device)
        self._pending: deque[HostWrite] = deque()

    def copy_to_host(self, tensor: Tensor, host: Tensor) -> HostWrite:
        """Starts the copy."""
        # A strided source would be staged inside copy_, and the host would wait for it. Detached: what waits here must not
        # keep the graph alive that the tensor came from. A detached view counts its changes with the tensor; a contiguous
        # copy is nobody else's.
        tensor = tensor.detach().contiguous()
        self._d2h_stream.wait_stream(torch.cuda.current_stream(self._device))
        write = HostWrite(tensor, self._copy(self._d2h_stream, tensor, host))
        self._pending.append(write)
        self._drop_finished(self.max_pending)
        return write

    def copy_to_device(self, host: Tensor, written: HostWrite) -> tuple[Tensor, torch.cuda.Event]:
        """Starts the copy of what was `written`; returns the tensor and the event of its arrival."""
        self._drop_finished(self.max_pending)
        tensor = torch.empty(host.shape, dtype=host.dtype, device=self._device)
        self._h2d_stream.wait_stream(torch.cuda.current_stream(self._device))
        self._h2d_stream.wait_event(written.done)
        return tensor, self._copy(self._h2d_stream, host, tensor)

    def wait(self, event: torch.cuda.Event) -> None:
        """Makes compute wait for a copy."""
        compute, meter = torch.cuda.current_stream(self._device), self.meter
        if meter is None or event.query():
            compute.wait_event(event)
            return
        begun = meter.now(compute)
        compute.wait_event(event)
        meter.stalled(begun, compute)

    def settle(self) -> None:
        """Makes compute wait for every copy to the host, and forgets the sources."""
        self._drop_finished(0)

    def _copy(self, stream: torch.cuda.Stream, source: Tensor, target: Tensor) -> torch.cuda.Event:
        """Queues a copy; returns the event of its end."""
        self.moved_bytes += source.nbytes
        meter = self.meter
        with torch.cuda.stream(stream):
            begun = None if meter is None else meter.now(stream)
            target.copy_(source, non_blocking=True)
            return stream.record_event() if meter is None else meter.copied(begun, stream)

    def _drop_finished(self, most: int) -> None:
        """Forgets sources whose copy is done; makes compute wait for the oldest while more than `most` are left."""
        while self._pending:
            write = self._pending[0]
            if not write.query():
                if len(self._pending) <= most:
                    return
                self.wait(write.done)
            write.drop()
            self._pending.popleft()


class CpuTransfers:
    """The same on a CPU: pieces of an arena that is not page-locked, and copies that are over when they return."""

    def __init__(self):
        self.arena = HostArena(lock=lambda slab: None, unlock=lambda slab: None)
        self.moved_bytes = 0
        self.meter = None  # nothing runs under anything: nobody asks it

    def copy_to_host(self, tensor: Tensor, host: Tensor) -> None:
        self.moved_bytes += host.nbytes
        host.copy_(tensor.detach())

    def copy_to_device(self, host: Tensor, written: None) -> tuple[Tensor, None]:
        self.moved_bytes += host.nbytes
        return torch.empty(host.shape, dtype=host.dtype).copy_(host), None

    def wait(self, event: None) -> None:
        """Nothing is in flight."""

    def settle(self) -> None:
        """Nothing is in flight."""


@lru_cache
def transfers_for(device: torch.device) -> Transfers | CpuTransfers:
    """The transfers of a device, made at first use."""
    return CpuTransfers() if device.type == "cpu" else Transfers(device)
