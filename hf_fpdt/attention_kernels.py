"""
The seam to attention kernels: one class each, same signatures, nothing else in the package calls a kernel. Here: the
definition, and torch's kernel for CPUs.

Shapes: `query [batch, queries, heads, head_dim]`, `key [batch, keys, kv_heads, head_dim]`,
`value [batch, keys, kv_heads, value_dim]`, `out [batch, queries, heads, value_dim]`, `lse [batch, heads, queries]` in fp32,
natural logarithm. `heads` is a multiple of `kv_heads` (GQA); query head `h` reads kv head `h // (heads // kv_heads)`.

`backward` takes the `out` and `lse` over **all** keys of the query, also when `key` holds only some of them: a flash backward
uses them only through `p = exp(score - lse)` and `delta = rowsum(grad_out * out)`, so the sum over blocks of keys is exact.

`causal=True` means the last query is aligned with the last key. A kernel that aligns the first ones instead says so
(`aligns_last = False`) and is only ever called with as many queries as keys. No kernel is called with a row that sees no key,
and none with head sizes other than those that its `padded` gives: `filled` puts zeros in, which change no score and no output.
What else a rule asks for, a kernel has (`features`) or is not called with. A window goes with `causal=True`.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

aten = torch.ops.aten
HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class ScoreRule:
    """
    How a score is made of a query and a key, and how far back a query sees.

        score = scale * query . key,  or with a cap  softcap * tanh(scale * query . key / softcap)

    Args:
        window: most keys that a query sees, its own included: they are at `p - window + 1` to `p` for a query at `p`. None: all
            of its document up to itself.
    """

    scale: float
    softcap: float | None = None
    window: int | None = None

    @property
    def features(self) -> frozenset[str]:
        """What a kernel needs besides causal attention."""
        return frozenset(name for name in ("softcap", "window") if getattr(self, name) is not None)

    def over(self, keys: int) -> "ScoreRule":
        """The same for so many keys next to each other that end with the last query's: without a window that sees them all."""
        return replace(self, window=None) if self.window is not None and self.window >= keys else self


class AttentionKernel:
    """Base of the kernels below: what one supports, and its two calls."""

    name: str
    aligns_last: bool
    device_type: str | None = None  # the only one it runs on
    features: frozenset[str] = frozenset()  # of `ScoreRule.features`
    head_multiple: int = 1  # of head sizes
    distinct_value_dim: bool = False

    def padded(self, head_dim: int, value_dim: int) -> tuple[int, int]:
        """The head sizes as which this kernel runs such heads: no smaller."""
        sizes = [-(-size // self.head_multiple) * self.head_multiple for size in (head_dim, value_dim)]
        return (sizes[0], sizes[1]) if self.distinct_value_dim else (max(sizes), max(sizes))

    def why_not(self, device: torch.device, dtype: torch.dtype, head_dim: int, value_dim: int) -> str | None:
        """Why this kernel cannot run such tensors, in words that fit after "kernel ... ", or None if it can."""
        raise NotImplementedError

    def forward(self, query, key, value, rule: ScoreRule, *, causal: bool) -> tuple[Tensor, Tensor]:
        """Returns `(out, lse)`."""
        raise NotImplementedError

    def backward(self, grad_out, query, key, value, out, lse, rule: ScoreRule, *, causal: bool):
        """Returns `(grad_query, grad_key, grad_value)` over the given keys, in the dtype of the inputs."""
        raise NotImplementedError


class NaiveKernel(AttentionKernel):
    """The definition of attention in fp32 (fp64 for fp64 inputs), a block of query rows at a time. Truth in the tests."""

    name = "naive"
    aligns_last = True
    distinct_value_dim = True
    features = frozenset(("softcap", "window"))
    max_scores = 1 << 26  # elements of the score block held at a time

    def why_not(self, device, dtype, head_dim, value_dim):
        return None

    def forward(self, query, key, value, rule, *, causal):
        out = query.new_empty(*query.shape[:3], value.shape[-1])
        lse = query.new_empty(query.shape[0], query.shape[2], query.shape[1], dtype=accumulation_dtype(query))
        for rows in self._row_blocks(query, key):
            scores = self._scores(query, key, rows, rule, causal)
            lse[:, :, rows] = torch.logsumexp(scores, dim=-1)
            probs = torch.exp(scores - lse[:, :, rows].unsqueeze(-1))
            out[:, rows] = torch.einsum("bhqk,bkhd->bqhd", probs, expand_heads(value, query)).to(out.dtype)
        return out, lse

    def backward(self, grad_out, query, key, value, out, lse, rule, *, causal):
        key_wide, value_wide = expand_heads(key, query), expand_heads(value, query)
        grad_query = torch.empty_like(query)
        grad_key, grad_value = torch.zeros_like(key_wide), torch.zeros_like(value_wide)
        for rows in self._row_blocks(query, key):
            upcast = grad_out[:, rows].to(lse.dtype)
            scores = self._scores(query, key, rows, rule, causal)
            probs = torch.exp(scores - lse[:, :, rows].unsqueeze(-1))
            delta = (upcast * out[:, rows].to(lse.dtype)).sum(-1).transpose(1, 2).unsqueeze(-1)
            grad_probs = torch.einsum("bqhd,bkhd->bhqk", upcast, value_wide)
            grad_scores = probs * (grad_probs - delta) * rule.scale
            if rule.softcap is not None:  # the derivative of the cap; a masked score has no probability
                grad_scores *= 1 - (scores.masked_fill(probs == 0, 0) / rule.softcap) ** 2
            grad_query[:, rows] = torch.einsum("bhqk,bkhd->bqhd", grad_scores, key_wide).to(query.dtype)
            grad_key += torch.einsum("bhqk,bqhd->bkhd", grad_scores, query[:, rows].to(lse.dtype))
            grad_value += torch.einsum("bhqk,bqhd->bkhd", probs, upcast)
        return grad_query, sum_heads(grad_key, key), sum_heads(grad_value, value)

    def _row_blocks(self, query, key):
        batch, rows, heads, _ = query.shape
        step = max(1, self.max_scores // (batch * heads * key.shape[1]))
        return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]

    def _scores(self, query, key, rows, rule, causal):
        upcast = query[:, rows].to(accumulation_dtype(query))
        scores = torch.einsum("bqhd,bkhd->bhqk", upcast, expand_heads(key, query)).mul_(rule.scale)
        if rule.softcap is not None:
            scores = scores.div_(rule.softcap).tanh_().mul_(rule.softcap)
        if causal:
            offset = key.shape[1] - query.shape[1]
            row = torch.arange(rows.start, rows.stop, device=query.device).unsqueeze(-1) + offset
            column = torch.arange(key.shape[1], device=query.device)
            seen = column <= row
            if rule.window is not None:
                seen &= column > row - rule.window
            scores.masked_fill_(~seen, float("-inf"))
        return scores


class TorchCpuKernel(AttentionKernel):
    """torch's flash attention for CPUs. Causal is aligned with the first key."""

    name = "torch_cpu"
    aligns_last = False
    device_type = "cpu"

    def why_not(self, device, dtype, head_dim, value_dim):
        if device.type != "cpu":
            return f"runs on the CPU only, and the tensors are on {device.type}"
        return None

    def forward(self, query, key, value, rule, *, causal):
        key, value = self._widen(query, key, value)
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            *(x.transpose(1, 2) for x in (query, key, value)), 0.0, causal, scale=rule.scale
        )
        return out.transpose(1, 2), lse

    def backward(self, grad_out, query, key, value, out, lse, rule, *, causal):
        wide_key, wide_value = self._widen(query, key, value)
        tensors = (x.transpose(1, 2) for x in (grad_out, query, wide_key, wide_value, out))
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(*tensors, lse, 0.0, causal, scale=rule.scale)
        grad_query, grad_key, grad_value = (x.transpose(1, 2) for x in grads)
        return grad_query, sum_heads(grad_key, key), sum_heads(grad_value, value)

    def _widen(self, query, key, value):
        # For 16-bit inputs the op sums the heads of a group in 16 bits, at twice the error in grad_key and grad_value.
        if query.dtype in HALF and query.shape[2] != key.shape[2]:
            groups = query.shape[2] // key.shape[2]
            return key.repeat_interleave(groups, dim=2), value.repeat_interleave(groups, dim=2)
        return key, value


def filled(tensor: Tensor, size: int) -> Tensor:
    """`[..., dim] -> [..., size]`, with zeros behind; the same tensor if it has that size."""
    missing = size - tensor.shape[-1]
    return torch.nn.functional.pad(tensor, (0, missing)) if missing else tensor


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def expand_heads(kv: Tensor, query: Tensor) -> Tensor:
    """`[batch, keys, kv_heads, dim] -> [batch, keys, heads, dim]` in the accumulation dtype."""
    return kv.to(accumulation_dtype(query)).repeat_interleave(query.shape[2] // kv.shape[2], dim=2)


def sum_heads(grad_wide: Tensor, like: Tensor) -> Tensor:
    """`[batch, keys, heads, dim] -> [batch, keys, kv_heads, dim]`, summed over each group in fp32 (fp64), dtype of `like`."""
    if grad_wide.shape == like.shape:
        return grad_wide.to(like.dtype)
    batch, keys, kv_heads, dim = like.shape
    grouped = grad_wide.to(accumulation_dtype(grad_wide)).reshape(batch, keys, kv_heads, -1, dim)
    return grouped.sum(3).to(like.dtype)
