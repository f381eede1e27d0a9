"""
K and V of one layer, from its forward to the end of its backward: whole on the device, or in blocks that come from the host.

Both kinds are used in the same order: `append` and `attend` for every chunk, `end_forward`; then `begin_backward` and, last
chunk first, `attend_backward` (and `attend` again if attention was not saved), `release`. A layer has one for each group of its
heads (`StorePerGroup`).

    resident   K, V [batch, seq_len, kv_heads, dim] and, in the backward, their gradients in fp32: O(seq_len) on the device.
               One attention call (or two) a chunk; K and V wait on the host between the passes.
    streamed   one block a chunk, on the host from the moment it is complete. Attention of chunk i fetches blocks 0..i, each
               while the one before it is computed, and merges them by their lse. In the backward the fp32 sums of grad_K and
               grad_V make the same round trip. O(chunk) on the device; O(seq_len^2 / chunk) over the link. Under a window, the
               blocks that it reaches together: O(chunk + window), and O(seq_len) over the link.

Queries see the keys of their own document, as far back as the layer's window. Blocks in which no query of a chunk sees one are
neither fetched nor multiplied.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from .attention_kernels import AttentionKernel, ScoreRule
from .causal_attention import attend_segments, attend_segments_backward, join_queries, join_segments, query_parts
from .documents import Segment
from .head_split import HeadGroup
from .online_softmax import merge_attention
from .transfers import HostCopy, KeptTensor

Span = tuple[int, int]
Keep = Callable[[Tensor], "KeptTensor | HostCopy"]
Segments = Callable[[int | None], Sequence[Sequence[Segment]]]  # of every chunk, for a window


class StorePerGroup:
    """
    The stores of one layer: one for each group of key/value heads, which are exchanged and attended to one after the other.

    Args:
        new: makes an empty one.
    """

    def __init__(self, new: "Callable[[], ResidentStore | StreamedStore]"):
        self._new = new
        self._stores: dict = {}

    def of(self, group: HeadGroup) -> "ResidentStore | StreamedStore":
        """That of a group's key/value heads; query heads of several groups may attend to them."""
        first = group.key_value.start
        if first not in self._stores:
            self._stores[first] = self._new()
        return self._stores[first]

    def end_forward(self) -> None:
        for store in self._stores.values():
            store.end_forward()

    def prefetch(self) -> None:
        for store in self._stores.values():
            store.prefetch()

    def begin_backward(self) -> None:
        for store in self._stores.values():
            store.begin_backward()

    def release(self) -> None:
        for store in self._stores.values():
            store.release()


class ResidentStore:
    """
    K and V whole on the device while a pass runs.

    Args:
        segments: of every chunk, by the window of a rule.
    """

    def __init__(self, spans: Sequence[Span], segments: Segments, keep: Keep):
        self._spans, self._segments, self._keep = spans, segments, keep
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

    def attend(self, kernel: AttentionKernel, index: int, query: Tensor, rule: ScoreRule) -> tuple[Tensor, Tensor]:
        """Out and lse of a chunk of queries over everything that they see."""
        where = self._segments(rule.window)[index], self._spans[index]
        return attend_segments(kernel, query, self._key, self._value, *where, rule)

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

    def attend_backward(self, kernel, index: int, grad_out, query, out, lse, rule: ScoreRule, complete: bool = True):
        """
        Gradients of a chunk's query, key and value. Adds to those of the keys before it.

        Args:
            complete: whether these are the last of the chunk's query heads that attend to the store's keys. The gradients of
                key and value are then complete, because chunks after this one have run already; else they are None.
        """
        start, stop = self._spans[index]
        where = self._segments(rule.window)[index], (start, stop)
        grad_query = attend_segments_backward(
            kernel, grad_out, query, self._key, self._value, out, lse, *where, rule, *self._grads
        )
        if not complete:
            return grad_query, None, None
        return grad_query, *(grad[:, start:stop].to(self._key.dtype) for grad in self._grads)

    def release(self) -> None:
        """Gives everything back; harmless if done before."""
        for kept in self._kept:
            kept.release()
        self._key = self._value = self._grads = None


class StreamedStore:
    """
    K and V in blocks on the host, one a chunk; the device holds the block in use and the next.

    Args:
        segments: of every chunk, by the window of a rule.
        settle: makes compute wait for copies to the host, so that the device's memory is free.
    """

    def __init__(self, spans: Sequence[Span], segments: Segments, keep: Keep, settle: Callable[[], None]):
        self._spans, self._segments, self._keep, self._settle = spans, segments, keep, settle
        self._blocks: list[tuple] = []  # per chunk: kept K and V
        self._grads: dict[int, tuple] = {}  # per chunk: kept sums of grad_K and grad_V, once there are any

    def append(self, index: int, key: Tensor, value: Tensor) -> None:
        self._blocks.append((self._keep(key), self._keep(value)))
        self._value_dim = value.shape[-1]

    def attend(self, kernel: AttentionKernel, index: int, query: Tensor, rule: ScoreRule) -> tuple[Tensor, Tensor]:
        chunk, segments = self._spans[index], self._segments(rule.window)[index]
        first = self._first_block(index, segments)
        if rule.window is not None:
            key, value = self._together(first, index)
            return attend_segments(kernel, query, key, value, segments, chunk, rule, self._spans[first][0])
        pieces: list[tuple | None] = [None] * len(segments)
        for position, (key, value) in _in_order(self._blocks[first : index + 1]):
            block = first + position
            for number, segment in enumerate(segments):
                keys = segment.keys(self._spans[block])
                if keys is None:
                    continue
                part = query[segment.queries(chunk)]
                out, lse = kernel.forward(part, key[keys], value[keys], rule, causal=block == index)
                merged = pieces[number]  # in fp32: one rounding, at the end
                pieces[number] = (out.to(lse.dtype), lse) if merged is None else merge_attention(*merged, out, lse)
        out, lse = join_segments(pieces, segments, chunk, query, self._value_dim)
        return out.to(query.dtype), lse

    def _first_block(self, index: int, segments: Sequence[Segment]) -> int:
        """The first block of which a chunk's queries see something; its own if they see nothing."""
        first = min((segment.first for segment in segments), default=self._spans[index][0])
        return next(block for block, (_, stop) in enumerate(self._spans) if first < stop)

    def _together(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """K and V of several blocks, each in one tensor."""
        blocks = [tensors for _, tensors in _in_order(self._blocks[first : last + 1])]
        return tuple(torch.cat(parts, dim=1) for parts in zip(*blocks, strict=True))

    def end_forward(self) -> None:
        """Nothing to do: every block was put away when it was complete."""

    def prefetch(self) -> None:
        for kept in self._blocks[0]:
            kept.prefetch()

    def begin_backward(self) -> None:
        self._grads = {}

    def attend_backward(self, kernel, index: int, grad_out, query, out, lse, rule: ScoreRule, complete: bool = True):
        chunk, segments = self._spans[index], self._segments(rule.window)[index]
        first, wide = self._first_block(index, segments), torch.promote_types(query.dtype, torch.float32)
        if rule.window is not None:
            tensors = grad_out, query, out, lse
            return self._attend_backward_together(kernel, first, index, *tensors, segments, rule, wide, complete)
        parts = [query_parts(segment, chunk, grad_out, query, out, lse) for segment in segments]
        grad_queries: list[Tensor | None] = [None] * len(segments)
        groups = [(*self._blocks[block], *self._grads.get(block, ())) for block in range(first, index + 1)]
        for position, (key, value, *sums) in _in_order(groups):
            block = first + position
            for number, segment in enumerate(segments):
                keys = segment.keys(self._spans[block])
                if keys is None:
                    continue
                part_grad, part, part_out, part_lse = parts[number]
                piece, *grads = kernel.backward(
                    part_grad, part, key[keys], value[keys], part_out, part_lse, rule, causal=block == index
                )
                grad_queries[number] = piece.to(wide) if grad_queries[number] is None else grad_queries[number].add_(piece)
                sums = _added(sums, grads, keys, (key, value), wide)
            if sums and not (complete and block == index):
                self._replace_sums(block, sums)
        grad_query = join_queries(grad_queries, segments, chunk, query)
        if not complete:
            return grad_query, None, None
        self._release_block(index)
        sums = sums or (key.new_zeros(key.shape), value.new_zeros(value.shape))  # of padding alone
        return grad_query, *(total.to(key.dtype) for total in sums)

    def _attend_backward_together(
        self, kernel, first: int, index: int, grad_out, query, out, lse, segments, rule, wide, complete: bool
    ):
        key, value = self._together(first, index)
        grads = tuple(torch.zeros_like(tensor, dtype=wide) for tensor in (key, value))
        start = self._spans[first][0]
        where = segments, self._spans[index], rule
        grad_query = attend_segments_backward(kernel, grad_out, query, key, value, out, lse, *where, *grads, start)
        blocks = range(first, index + 1)
        parts = [[grad[:, begin - start : stop - start] for grad in grads] for begin, stop in self._spans[first : index + 1]]
        for block, part in zip(blocks, parts, strict=True):
            for kept, grad in zip(self._grads.get(block, ()), part, strict=False):
                grad += kept.get()
        own = len(blocks) - complete
        for block, part in zip(blocks[:own], parts[:own], strict=True):  # no part may change while another is copied
            self._replace_sums(block, part)
        if not complete:
            return grad_query, None, None
        self._release_block(index)
        return grad_query, *(grad.to(key.dtype) for grad in parts[-1])

    def _release_block(self, index: int) -> None:
        """Gives back a block whose chunk is done."""
        for kept in (*self._blocks[index], *self._grads.get(index, ())):
            kept.release()
        self._settle()  # sums that are on their way, but for this, stay until something else is copied

    def _replace_sums(self, block: int, totals: list[Tensor]) -> None:
        for kept in self._grads.get(block, ()):
            kept.release()
        self._grads[block] = tuple(self._keep(total) for total in totals)

    def release(self) -> None:
        for kept in (*(k for pair in self._blocks for k in pair), *(k for pair in self._grads.values() for k in pair)):
            kept.release()


def _added(
    sums: Sequence[Tensor], grads: Sequence[Tensor], keys: tuple, like: Sequence[Tensor], wide: torch.dtype
) -> list[Tensor]:
    """Sums of the gradients of a block's keys and values, if there are any, with those of some of the keys added."""
    if not sums and all(grad.shape == whole.shape for grad, whole in zip(grads, like, strict=True)):
        return [grad.to(wide) for grad in grads]
    sums = sums or [torch.zeros_like(whole, dtype=wide) for whole in like]
    for total, grad in zip(sums, grads, strict=True):
        total[keys] += grad
    return sums


def _in_order(groups: Sequence[tuple]) -> Iterator[tuple[int, list[Tensor]]]:
    """The tensors of every group in turn, each group fetched while the one before it is in use."""
    for position, group in enumerate(groups):
        for kept in (*group, *(groups[position + 1] if position + 1 < len(groups) else ())):
            kept.prefetch()
        yield position, [kept.get() for kept in group]
        for kept in group:
            kept.evict()
