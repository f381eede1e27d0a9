"""One forward of a model whose layers stream: what its layers, masks and norms need to know of it, and of no other."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from .chunking import chunk_spans, resolve_chunk_size
from .config import FPDTConfig
from .layer_stream import SavedLayer, outside_of_chunks
from .transfers import transfers_for

logger = logging.getLogger(__name__)

_announced: set[FPDTConfig] = set()  # settings whose choices have been logged
_active_pass: ContextVar["StreamedPass | None"] = ContextVar("fpdt_active_pass", default=None)


@dataclass
class StreamedPass:
    """
    Args:
        config: the settings.
        seq_len: tokens of one sequence.
        spans: `(start, stop)` of every chunk.
        offload: whether what the backward needs goes to host memory.
        last_saved: what the layer that ran last saved.
    """

    config: FPDTConfig
    seq_len: int
    spans: Sequence[tuple[int, int]]
    offload: bool
    last_saved: SavedLayer | None = None

    @property
    def save_attention(self) -> bool:
        return self.config.save_attention is not False


def active_pass() -> StreamedPass | None:
    """The pass that is running, or None if the model runs unstreamed."""
    return _active_pass.get()


@contextmanager
def streamed_pass(config: FPDTConfig, batch_size: int, seq_len: int, device: torch.device) -> Iterator[StreamedPass]:
    """Makes the layers called inside stream a `[batch_size, seq_len]` input on `device`."""
    size = resolve_chunk_size(config.chunk_size, batch_size=batch_size, seq_len=seq_len, device_type=device.type)
    # On a CPU the tensors are in host memory as they are.
    offload = config.offload == "host" or (config.offload == "auto" and device.type == "cuda")
    if offload:
        transfers_for(device).arena.limit_bytes = None if config.host_memory == "auto" else config.host_memory
    running = StreamedPass(config, seq_len, chunk_spans(seq_len, size), offload)
    if config not in _announced:
        _announced.add(config)
        where = "host memory" if offload else "device memory"
        shape = (batch_size, seq_len, len(running.spans), size, where)
        logger.info("hf_fpdt: %d x %d tokens in %d chunks of %d, kept for the backward in %s", *shape)
    with running_pass(running):
        yield running


@contextmanager
def running_pass(one: StreamedPass | None) -> Iterator[None]:
    """
    What is called inside follows this pass, or none, whatever pass or chunk it is called from: a hook on a layer may run
    another model, or the same one unstreamed.
    """
    token = _active_pass.set(one)
    try:
        with outside_of_chunks():
            yield
    finally:
        _active_pass.reset(token)
