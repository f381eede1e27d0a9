"""
Causal attention of one chunk of queries over every key up to its own end, document by document: the inner step of the pipeline.

The keys are `[earlier chunks | this chunk]`. A kernel that aligns causality with the last key takes them in one call; another
one takes the rectangle of earlier keys (all visible) and the square diagonal block (causal) in two, merged by their lse.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .attention_kernels import AttentionKernel, ScoreRule
from .documents import Document, Segment
from .online_softmax import merge_attention

# Keys of one backward call. A kernel returns grad_key and grad_value of all its keys, and may hold fp32 sums of them as well:
# 12 KiB a key for 8 heads of 128. Longer prefixes are cut, so that this does not grow with the sequence.
MAX_BACKWARD_KEYS = 65536


def attend_segments(
    kernel: AttentionKernel,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Sequence[Segment],
    chunk: Document,
    rule: ScoreRule,
    first: int = 0,
) -> tuple[Tensor, Tensor]:
    """
    Args:
        query: `[batch, chunk, heads, head_dim]`.
        key, value: `[batch, keys, kv_heads, head_dim | value_dim]`, every position from `first`, at least to the chunk's end.
        segments: of the chunk. Queries in none see nothing: their out is 0.
        chunk: the positions of the queries.
        rule: how scores are made.
        first: position of the first key; no segment sees one before it.

    Returns:
        `out [batch, chunk, heads, value_dim]` and `lse [batch, heads, chunk]`.
    """
    pieces, whole = [], (first, first + key.shape[1])
    for segment in segments:
        keys = segment.keys(whole)
        pieces.append(attend_prefix(kernel, query[segment.queries(chunk)], key[keys], value[keys], rule))
    return join_segments(pieces, segments, chunk, query, value.shape[-1])


def attend_segments_backward(
    kernel: AttentionKernel,
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    segments: Sequence[Segment],
    chunk: Document,
    rule: ScoreRule,
    grad_key: Tensor,
    grad_value: Tensor,
    first: int = 0,
) -> Tensor:
    """
    Gradient of `attend_segments`. Adds to `grad_key` and `grad_value`, both fp32 (fp64) and shaped like `key` and `value`.

    Returns:
        `grad_query`, shaped like `query`.
    """
    pieces, whole = [], (first, first + key.shape[1])
    for segment in segments:
        keys = segment.keys(whole)
        part_grad, part, part_out, part_lse = query_parts(segment, chunk, grad_out, query, out, lse)
        some = (key[keys], value[keys], part_out, part_lse, rule, grad_key[keys], grad_value[keys])
        pieces.append(attend_prefix_backward(kernel, part_grad, part, *some))
    return join_queries(pieces, segments, chunk, query)


def query_parts(
    segment: Segment, chunk: Document, grad_out: Tensor, query: Tensor, out: Tensor, lse: Tensor
) -> tuple[Tensor, ...]:
    """`grad_out, query, out, lse` of a segment's queries."""
    rows, queries = at = segment.queries(chunk)
    return grad_out[at], query[at], out[at], lse[rows, :, queries].contiguous()


def join_segments(
    pieces: Sequence[tuple[Tensor, Tensor]], segments: Sequence[Segment], chunk: Document, query: Tensor, value_dim: int
) -> tuple[Tensor, Tensor]:
    """Out and lse of a chunk, from those of its segments; where there is none out is 0, and so is lse, which nobody reads."""
    if len(pieces) == 1 and pieces[0][0].shape[:2] == query.shape[:2]:
        return pieces[0]
    batch, queries, heads, _ = query.shape
    out = query.new_zeros(batch, queries, heads, value_dim)
    lse = query.new_zeros(batch, heads, queries, dtype=torch.promote_types(query.dtype, torch.float32))
    for segment, (piece_out, piece_lse) in zip(segments, pieces, strict=True):
        rows, at = segment.queries(chunk)
        out[rows, at], lse[rows, :, at] = piece_out, piece_lse
    return out, lse


def join_queries(pieces: Sequence[Tensor], segments: Sequence[Segment], chunk: Document, query: Tensor) -> Tensor:
    """The gradient of a chunk's queries in their dtype, from those of its segments; 0 where there is none."""
    if len(pieces) == 1 and pieces[0].shape == query.shape:
        return pieces[0].to(query.dtype)
    grad_query = torch.zeros_like(query)
    for segment, piece in zip(segments, pieces, strict=True):
        grad_query[segment.queries(chunk)] = piece
    return grad_query


def attend_prefix(kernel: AttentionKernel, query: Tensor, key: Tensor, value: Tensor, rule: ScoreRule):
    """
    Args:
        query: `[batch, chunk, heads, head_dim]`, the last `chunk` positions of `key`.
        key, value: `[batch, keys, kv_heads, head_dim | value_dim]`, next to each other, to the end of the chunk.
        rule: how scores are made. A kernel that has windows aligns causality with the last key.

    Returns:
        `out [batch, chunk, heads, value_dim]` and `lse [batch, heads, chunk]`.
    """
    start, rule = key.shape[1] - query.shape[1], rule.over(key.shape[1])
    if start == 0 or kernel.aligns_last:
        return kernel.forward(query, key, value, rule, causal=True)
    earlier = kernel.forward(query, key[:, :start], value[:, :start], rule, causal=False)
    diagonal = kernel.forward(query, key[:, start:], value[:, start:], rule, causal=True)
    return merge_attention(*earlier, *diagonal)


def attend_prefix_backward(
    kernel: AttentionKernel,
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    rule: ScoreRule,
    grad_key: Tensor,
    grad_value: Tensor,
) -> Tensor:
    """
    Gradient of `attend_prefix`. Adds to `grad_key` and `grad_value`, both fp32 (fp64) and shaped like `key` and `value`.

    Returns:
        `grad_query`, shaped like `query`.
    """
    grad_query, rule = None, rule.over(key.shape[1])
    pieces = [(slice(None), True)]  # inside of a window the keys are few
    if rule.window is None:
        pieces = _backward_pieces(query.shape[1], key.shape[1], kernel.aligns_last)
    for keys, causal in pieces:
        piece_query, piece_key, piece_value = kernel.backward(
            grad_out, query, key[:, keys], value[:, keys], out, lse, rule, causal=causal
        )
        grad_key[:, keys] += piece_key
        grad_value[:, keys] += piece_value
        # Summed in the accumulators' precision, so that cutting costs one rounding and not several.
        grad_query = piece_query if grad_query is None else grad_query.to(grad_key.dtype).add_(piece_query)
    return grad_query.to(query.dtype)


def _backward_pieces(queries: int, keys: int, aligns_last: bool) -> list[tuple[slice, bool]]:
    """`(keys of a call, causal)`, the last of which is causal: the diagonal block, with keys before it if the kernel can."""
    last = keys - queries
    if aligns_last:
        last = min(last, max(0, keys - MAX_BACKWARD_KEYS))
    starts = range(0, last, MAX_BACKWARD_KEYS)
    return [*((slice(at, min(at + MAX_BACKWARD_KEYS, last)), False) for at in starts), (slice(last, keys), True)]
