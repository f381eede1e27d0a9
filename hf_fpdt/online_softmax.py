"""
Merging attention over two disjoint sets of keys (online softmax; FPDT, arXiv 2408.16978, section 3.2), and adding a sink.

With `lse = log sum exp(scores)` of each part, the exact attention over both is

    lse = logaddexp(lse_a, lse_b)
    out = out_a + sigmoid(lse_b - lse_a) * (out_b - out_a)

The sigmoid form has no overflow: the plain `exp(lse_b - lse_a)` is infinite in fp32 from a difference of 88 on.
"""

import torch
from torch import Tensor


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """
    Args:
        out_a, out_b: `[batch, queries, heads, value_dim]`, each normalized over its own keys; any float dtype.
        lse_a, lse_b: `[batch, heads, queries]`, fp32 or fp64, natural logarithm, finite.

    Returns:
        `out` in the dtype of `out_a` and `lse`; the merge itself runs in the dtype of the lse.
    """
    weight_b = torch.sigmoid(lse_b - lse_a).transpose(1, 2).unsqueeze(-1)  # [batch, queries, heads, 1]
    out = torch.lerp(out_a.to(weight_b.dtype), out_b.to(weight_b.dtype), weight_b)
    return out.to(out_a.dtype), torch.logaddexp(lse_a, lse_b)


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """
    Attention with one more key a head, whose score is the head's sink for every query, and whose value is 0.

    Args:
        out, lse: as in `merge_attention`, over all other keys.
        sinks: `[heads]`.
    """
    sinks = sinks.to(lse.dtype)[:, None]
    weight = torch.sigmoid(lse - sinks).transpose(1, 2).unsqueeze(-1)
    return (out * weight).to(out.dtype), torch.logaddexp(lse, sinks)


def sinks_grad(grad_out: Tensor, out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """
    Gradient of the sinks, `[heads]` in the dtype of the lse: over all queries the sum of `p * (0 - delta)` with the sink's
    probability `p = exp(sink - lse)`, its value 0, and `delta = rowsum(grad_out * out)`.

    Args:
        out, lse: those that `with_sinks` returned.
    """
    delta = (grad_out.to(lse.dtype) * out).sum(-1).transpose(1, 2)
    return -(torch.exp(sinks.to(lse.dtype)[:, None] - lse) * delta).sum((0, 2))
