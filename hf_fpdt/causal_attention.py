"""
Causal attention of one chunk of queries over every key up to its own end: the inner step of the pipeline.

The keys are `[earlier chunks | this chunk]`. A kernel that aligns causality with the last key takes them in one call; another
one takes the rectangle of earlier keys (all visible) and the square diagonal block (causal) in two, merged by their lse.
"""

from torch import Tensor

from .attention_kernels import AttentionKernel
from .online_softmax import merge_attention

# Keys of one backward call. A kernel returns grad_key and grad_value of all its keys, and may hold fp32 sums of them as well:
# 12 KiB a key for 8 heads of 128. Longer prefixes are cut, so that this does not grow with the sequence.
MAX_BACKWARD_KEYS = 65536


def attend_prefix(kernel: AttentionKernel, query: Tensor, key: Tensor, value: Tensor, scale: float):
    """
    Args:
        query: `[batch, chunk, heads, head_dim]`, the last `chunk` positions of `key`.
        key, value: `[batch, stop, kv_heads, head_dim | value_dim]`, every position from 0 to the end of the chunk.
        scale: factor on the scores before the softmax.

    Returns:
        `out [batch, chunk, heads, value_dim]` and `lse [batch, heads, chunk]`.
    """
    start = key.shape[1] - query.shape[1]
    if start == 0 or kernel.aligns_last:
        return kernel.forward(query, key, value, causal=True, scale=scale)
    earlier = kernel.forward(query, key[:, :start], value[:, :start], causal=False, scale=scale)
    diagonal = kernel.forward(query, key[:, start:], value[:, start:], causal=True, scale=scale)
    return merge_attention(*earlier, *diagonal)


def attend_prefix_backward(
    kernel: AttentionKernel,
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    grad_key: Tensor,
    grad_value: Tensor,
) -> Tensor:
    """
    Gradient of `attend_prefix`. Adds to `grad_key` and `grad_value`, both fp32 (fp64) and shaped like `key` and `value`.

    Returns:
        `grad_query`, shaped like `query`.
    """
    grad_query = None
    for keys, causal in _backward_pieces(query.shape[1], key.shape[1], kernel.aligns_last):
        piece_query, piece_key, piece_value = kernel.backward(
            grad_out, query, key[:, keys], value[:, keys], out, lse, causal=causal, scale=scale
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
