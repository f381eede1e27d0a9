"""
K and V of one layer, from its forward to the end of its backward: whole on the device, or in blocks that come from the host.

Both stores are used in the same order: `append` and `attend` for every chunk, `end_forward`; then `begin_backward` and, last
chunk first, `attend_backward` (and `attend` again if attention was not saved), `release`.

    resident   K, V [batch, seq_len, kv_heads, dim] and, in the backward, their gradients in fp32: O(seq_len) on the device.
               One attention call (or two) a chunk; K and V wait on the host between the passes.
    streamed   one block a chunk, on the host from the moment it is complete. Attention of chunk i fetches blocks 0..i, each
               while the one before it is computed, and merges them by their lse. In the backward the fp32 sums of grad_K and
               grad_V make the same round trip. O(chunk) on the device; O(seq_len^2 / chunk) over the link.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .attention_kernels import AttentionKernel
from .causal_attention import attend_prefix, attend_prefix_backward
from .online_softmax import merge_attention
from .transfers import HostCopy, KeptTensor

Span = tuple[int, int]
Keep = Callable[[Tensor], "KeptTensor | HostCopy"]


class ResidentStore:
    """K and V whole on the device while a pass runs."""

    def __init__(self, spans: Sequence[Span], keep: Keep):
        self._spans, self._keep = spans, keep
        self._key: Tensor | None = None
        self._value: Tensor | None = None
        self._kept: tuple = ()

    def append(self, index: int, key: Tensor, value: Tensor) -> None:
        """Takes K and V of a chunk, `[batch, chunk, kv_heads, dim]`."""
        if self._key is None:
            seq_len = self._spans[-1][1]
            self._key, self._value = (t.new_empty(t.shape[0], seq_len, *t.shape[2:]) for t in (key, value))
        start, stop = self._spans[index]
        self._key[:, start:stop], self._value[:, start:stop] = key, value

    def attend(self, kernel: AttentionKernel, index: int, query: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Out and lse of a chunk of queries over everything up to its end."""
        stop = self._spans[index][1]
        return attend_prefix(kernel, query, self._key[:, :stop], self._value[:, :stop], scale)

    def end_forward(self) -> None:
        """Puts away what the backward needs."""
        self._kept = (self._keep(self._key), self._keep(self._value))
        self._key = self._value = None

    def prefetch(self) -> None:
        """Starts the copies that the backward needs first."""
        for kept in self._kept:
            kept.prefetch()

    def begin_backward(self) -> None:
        self._key, self._value = (kept.get() for kept in self._kept)
        wide = torch.promote_types(self._key.dtype, torch.float32)
        self._grads = tuple(torch.zeros_like(t, dtype=wide) for t in (self._key, self._value))

    def attend_backward(self, kernel, index: int, grad_out, query, out, lse, scale: float):
        """
        Gradients of a chunk's query, key and value, the latter complete: chunks after it have run already. Adds to those of
        the keys before it.
        """
        start, stop = self._spans[index]
        keys, values, grad_keys, grad_values = (t[:, :stop] for t in (self._key, self._value, *self._grads))
        grad_query = attend_prefix_backward(kernel, grad_out, query, keys, values, out, lse, scale, grad_keys, grad_values)
        return grad_query, *(g[:, start:].to(self._key.dtype) for g in (grad_keys, grad_values))

    def release(self) -> None:
        """Gives everything back; harmless if done before."""
        for kept in self._kept:
            kept.release()
        self._key = self._value = self._grads = None


class StreamedStore:
    """K and V in blocks on the host, one a chunk; the device holds the block in use and the next."""

    def __init__(self, spans: Sequence[Span], keep: Keep, settle: Callable[[], None]):
        self._spans, self._keep, self._settle = spans, keep, settle
        self._blocks: list[tuple] = []  # per chunk: kept K and V
        self._grads: dict[int, tuple] = {}  # per chunk: kept sums of grad_K and grad_V, once there are any

    def append(self, index: int, key: Tensor, value: Tensor) -> None:
        self._blocks.append((self._keep(key), self._keep(value)))

    def attend(self, kernel: AttentionKernel, index: int, query: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        out = lse = None
        for block, (key, value) in _in_order(self._blocks[: index + 1]):
            piece = kernel.forward(query, key, value, causal=block == index, scale=scale)
            if out is None:
                out, lse = piece[0].to(piece[1].dtype), piece[1]  # merged in fp32: one rounding, at the end
            else:
                out, lse = merge_attention(out, lse, *piece)
        return out.to(query.dtype), lse

    def end_forward(self) -> None:
        """Nothing to do: every block was put away when it was complete."""

    def prefetch(self) -> None:
        for kept in self._blocks[0]:
            kept.prefetch()

    def begin_backward(self) -> None:
        self._grads = {}

    def attend_backward(self, kernel, index: int, grad_out, query, out, lse, scale: float):
        grad_query = None
        groups = [(*self._blocks[block], *self._grads.get(block, ())) for block in range(index + 1)]
        for block, (key, value, *sums) in _in_order(groups):
            piece_query, *pieces = kernel.backward(grad_out, query, key, value, out, lse, causal=block == index, scale=scale)
            wide = torch.promote_types(query.dtype, torch.float32)
            grad_query = piece_query.to(wide) if grad_query is None else grad_query.add_(piece_query)
            totals = [a.add_(b) for a, b in zip(sums, pieces, strict=True)] if sums else [p.to(wide) for p in pieces]
            if block == index:
                for kept in groups[block]:
                    kept.release()
                self._settle()  # sums that are on their way, but for this, stay until something else is copied
                return grad_query.to(query.dtype), *(total.to(key.dtype) for total in totals)
            self._replace_sums(block, totals)

    def _replace_sums(self, block: int, totals: list[Tensor]) -> None:
        for kept in self._grads.get(block, ()):
            kept.release()
        self._grads[block] = tuple(self._keep(total) for total in totals)

    def release(self) -> None:
        for kept in (*(k for pair in self._blocks for k in pair), *(k for pair in self._grads.values() for k in pair)):
            kept.release()


def _in_order(groups: Sequence[tuple]) -> Iterator[tuple[int, list[Tensor]]]:
    """The tensors of every group in turn, each group fetched while the one before it is in use."""
    for position, group in enumerate(groups):
        for kept in (*group, *(groups[position + 1] if position + 1 < len(groups) else ())):
            kept.prefetch()
        yield position, [kept.get() for kept in group]
        for kept in group:
            kept.evict()
