"""
The seam to attention kernels: one class each, same signatures, nothing else in the package calls a kernel.

Shapes: `query [batch, queries, heads, head_dim]`, `key [batch, keys, kv_heads, head_dim]`,
`value [batch, keys, kv_heads, value_dim]`, `out [batch, queries, heads, value_dim]`, `lse [batch, heads, queries]` in fp32,
natural logarithm. `heads` is a multiple of `kv_heads` (GQA); query head `h` reads kv head `h // (heads // kv_heads)`.

`backward` takes the `out` and `lse` over **all** keys of the query, also when `key` holds only some of them: a flash backward
uses them only through `p = exp(score - lse)` and `delta = rowsum(grad_out * out)`, so the sum over blocks of keys is exact.

`causal=True` means the last query is aligned with the last key. A kernel that aligns the first ones instead says so
(`aligns_last = False`) and is only ever called with as many queries as keys. No kernel is called with a row that sees no key.
"""

from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

aten = torch.ops.aten
_HALF = (torch.float16, torch.bfloat16)


class AttentionKernel:
    """Base of the kernels below: what one supports, and its two calls."""

    name: str
    aligns_last: bool
    device_type: str | None = None  # the only one it runs on

    def why_not(self, device: torch.device, dtype: torch.dtype, head_dim: int, value_dim: int) -> str | None:
        """Why this kernel cannot run such tensors, in words that fit after "kernel ... ", or None if it can."""
        raise NotImplementedError

    def forward(self, query, key, value, *, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        """Returns `(out, lse)`."""
        raise NotImplementedError

    def backward(self, grad_out, query, key, value, out, lse, *, causal: bool, scale: float):
        """Returns `(grad_query, grad_key, grad_value)` over the given keys, in the dtype of the inputs."""
        raise NotImplementedError


class NaiveKernel(AttentionKernel):
    """The definition of attention in fp32 (fp64 for fp64 inputs), a block of query rows at a time. Truth in the tests."""

    name = "naive"
    aligns_last = True
    max_scores = 1 << 26  # elements of the score block held at a time

    def why_not(self, device, dtype, head_dim, value_dim):
        return None

    def forward(self, query, key, value, *, causal, scale):
        out = query.new_empty(*query.shape[:3], value.shape[-1])
        lse = query.new_empty(query.shape[0], query.shape[2], query.shape[1], dtype=_accumulation_dtype(query))
        for rows in self._row_blocks(query, key):
            scores = self._scores(query, key, rows, causal, scale)
            lse[:, :, rows] = torch.logsumexp(scores, dim=-1)
            probs = torch.exp(scores - lse[:, :, rows].unsqueeze(-1))
            out[:, rows] = torch.einsum("bhqk,bkhd->bqhd", probs, _expand_heads(value, query)).to(out.dtype)
        return out, lse

    def backward(self, grad_out, query, key, value, out, lse, *, causal, scale):
        key_wide, value_wide = _expand_heads(key, query), _expand_heads(value, query)
        grad_query = torch.empty_like(query)
        grad_key, grad_value = torch.zeros_like(key_wide), torch.zeros_like(value_wide)
        for rows in self._row_blocks(query, key):
            upcast = grad_out[:, rows].to(lse.dtype)
            probs = torch.exp(self._scores(query, key, rows, causal, scale) - lse[:, :, rows].unsqueeze(-1))
            delta = (upcast * out[:, rows].to(lse.dtype)).sum(-1).transpose(1, 2).unsqueeze(-1)
            grad_probs = torch.einsum("bqhd,bkhd->bhqk", upcast, value_wide)
            grad_scores = probs * (grad_probs - delta) * scale
            grad_query[:, rows] = torch.einsum("bhqk,bkhd->bqhd", grad_scores, key_wide).to(query.dtype)
            grad_key += torch.einsum("bhqk,bqhd->bkhd", grad_scores, query[:, rows].to(lse.dtype))
            grad_value += torch.einsum("bhqk,bqhd->bkhd", probs, upcast)
        return grad_query, _sum_heads(grad_key, key), _sum_heads(grad_value, value)

    def _row_blocks(self, query, key):
        batch, rows, heads, _ = query.shape
        step = max(1, self.max_scores // (batch * heads * key.shape[1]))
        return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]

    def _scores(self, query, key, rows, causal, scale):
        scores = torch.einsum("bqhd,bkhd->bhqk", query[:, rows].to(_accumulation_dtype(query)), _expand_heads(key, query)).mul_(
            scale
        )
        if causal:
            offset = key.shape[1] - query.shape[1]
            row = torch.arange(rows.start, rows.stop, device=query.device).unsqueeze(-1)
            column = torch.arange(key.shape[1], device=query.device)
            scores.masked_fill_(column > row + offset, float("-inf"))
        return scores


class TorchCpuKernel(AttentionKernel):
    """torch's flash attention for CPUs. Causal is aligned with the first key."""

    name = "torch_cpu"
    aligns_last = False
    device_type = "cpu"

    def why_not(self, device, dtype, head_dim, value_dim):
        if device.type != "cpu":
            return f"runs on the CPU only, and the tensors are on {device.type}"
        if value_dim != head_dim:
            return f"needs value_dim == head_dim, and the model has value_dim {value_dim} and head_dim {head_dim}"
        return None

    def forward(self, query, key, value, *, causal, scale):
        key, value = self._widen(query, key, value)
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            *(x.transpose(1, 2) for x in (query, key, value)), 0.0, causal, scale=scale
        )
        return out.transpose(1, 2), lse

    def backward(self, grad_out, query, key, value, out, lse, *, causal, scale):
        wide_key, wide_value = self._widen(query, key, value)
        tensors = (x.transpose(1, 2) for x in (grad_out, query, wide_key, wide_value, out))
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(*tensors, lse, 0.0, causal, scale=scale)
        grad_query, grad_key, grad_value = (x.transpose(1, 2) for x in grads)
        return grad_query, _sum_heads(grad_key, key), _sum_heads(grad_value, value)

    def _widen(self, query, key, value):
        # For 16-bit inputs the op sums the heads of a group in 16 bits, at twice the error in grad_key and grad_value.
        if query.dtype in _HALF and query.shape[2] != key.shape[2]:
            groups = query.shape[2] // key.shape[2]
            return key.repeat_interleave(groups, dim=2), value.repeat_interleave(groups, dim=2)
        return key, value


class _CudaKernel(AttentionKernel):
    """What the CUDA kernels have in common: 16-bit floats, and a limit on the head dimension."""

    aligns_last = True
    device_type = "cuda"
    dtypes = _HALF
    max_head_dim = 256
    min_capability = (8, 0)
    distinct_value_dim = False

    def why_not(self, device, dtype, head_dim, value_dim):
        if device.type != "cuda":
            return f"runs on CUDA devices only, and the tensors are on {device.type}"
        if dtype not in self.dtypes:
            names = [str(x).removeprefix("torch.") for x in (*self.dtypes, dtype)]
            return f"needs {' or '.join(names[:-1])}, and the attention runs in {names[-1]}"
        if head_dim % 8 or value_dim % 8 or max(head_dim, value_dim) > self.max_head_dim:
            return f"needs a head_dim that 8 divides, at most {self.max_head_dim}, and the model has {head_dim}"
        if value_dim != head_dim and not self.distinct_value_dim:
            return f"needs value_dim == head_dim, and the model has value_dim {value_dim} and head_dim {head_dim}"
        if torch.cuda.get_device_capability(device) < self.min_capability:
            return f"needs compute capability {'.'.join(map(str, self.min_capability))} or later"
        return None


class TorchFlashKernel(_CudaKernel):
    """The FlashAttention-2 that is built into torch."""

    name = "torch_flash"

    def forward(self, query, key, value, *, causal, scale):
        lengths = (None, None, query.shape[1], key.shape[1])
        out, lse, *_ = aten._flash_attention_forward(query, key, value, *lengths, 0.0, causal, False, scale=scale)
        return out, lse

    def backward(self, grad_out, query, key, value, out, lse, *, causal, scale):
        lengths = (None, None, query.shape[1], key.shape[1])
        rng = _philox_placeholder(query.device)
        return aten._flash_attention_backward(
            grad_out, query, key, value, out, lse, *lengths, 0.0, causal, rng, rng, scale=scale
        )


class TorchEfficientKernel(_CudaKernel):
    """
    torch's memory-efficient attention: slower, but for fp32 and for GPUs before Ampere. Causal is aligned with the first key,
    heads are not grouped, and its lse is padded to a multiple of 32 queries.
    """

    name = "torch_efficient"
    aligns_last = False
    dtypes = (torch.float32, *_HALF)
    min_capability = (7, 0)

    def forward(self, query, key, value, *, causal, scale):
        tensors = (x.transpose(1, 2) for x in (query, *self._widen(query, key, value)))
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(*tensors, None, True, 0.0, causal, scale=scale)
        return out.transpose(1, 2), lse[:, :, : query.shape[1]].contiguous()

    def backward(self, grad_out, query, key, value, out, lse, *, causal, scale):
        lse = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=float("inf"))
        wide = self._widen(query, key, value)
        grad_out, query_t, key_t, value_t, out = (x.transpose(1, 2) for x in (grad_out, query, *wide, out))
        rng = _philox_placeholder(query.device, torch.int64)[:1].view(())
        grads = aten._scaled_dot_product_efficient_attention_backward(
            grad_out, query_t, key_t, value_t, None, out, lse, rng, rng, 0.0, [True, True, True, False], causal, scale=scale
        )
        grad_query, grad_key, grad_value = (x.transpose(1, 2) for x in grads[:3])
        return grad_query, _sum_heads(grad_key, key), _sum_heads(grad_value, value)

    def _widen(self, query, key, value):
        groups = query.shape[2] // key.shape[2]
        return key.repeat_interleave(groups, dim=2), value.repeat_interleave(groups, dim=2)


class CudnnKernel(_CudaKernel):
    """
    cuDNN's fused attention through torch. Causal is aligned with the first key; its lse is `[batch, heads, queries, 1]`. It
    has no problem of one query and one key, so the definition takes that one.
    """

    name = "cudnn"
    aligns_last = False
    max_head_dim = 128
    min_capability = (9, 0)

    def forward(self, query, key, value, *, causal, scale):
        if query.shape[1] == key.shape[1] == 1:
            return NaiveKernel().forward(query, key, value, causal=causal, scale=scale)
        tensors = (x.transpose(1, 2) for x in (query, key, value))
        result = aten._scaled_dot_product_cudnn_attention(*tensors, None, True, 0.0, causal, False, scale=scale)
        return result[0].transpose(1, 2), result[1].squeeze(-1)

    def backward(self, grad_out, query, key, value, out, lse, *, causal, scale):
        if query.shape[1] == key.shape[1] == 1:
            return NaiveKernel().backward(grad_out, query, key, value, out, lse, causal=causal, scale=scale)
        tensors = (x.transpose(1, 2) for x in (grad_out, query, key, value, out))
        rng = _philox_placeholder(query.device, torch.int64)[:1].view(())
        grads = aten._scaled_dot_product_cudnn_attention_backward(
            *tensors, lse.unsqueeze(-1), rng, rng, None, None, None, query.shape[1], key.shape[1], 0.0, causal, scale=scale
        )
        return tuple(x.transpose(1, 2) for x in grads)


class FlashAttention2Kernel(_CudaKernel):
    """The flash-attn package, version 2.7 or later."""

    name = "flash_attention_2"

    def why_not(self, device, dtype, head_dim, value_dim):
        if find_spec("flash_attn") is None or find_spec("flash_attn_2_cuda") is None:
            return "is not installed: pip install flash-attn"
        return super().why_not(device, dtype, head_dim, value_dim)

    _options = {"window_size_left": -1, "window_size_right": -1, "softcap": 0.0, "alibi_slopes": None}

    def forward(self, query, key, value, *, causal, scale):
        from flash_attn.flash_attn_interface import _flash_attn_forward

        out, lse, *_ = _flash_attn_forward(
            query, key, value, dropout_p=0.0, softmax_scale=scale, causal=causal, return_softmax=False, **self._options
        )
        return out, lse

    def backward(self, grad_out, query, key, value, out, lse, *, causal, scale):
        from flash_attn.flash_attn_interface import _flash_attn_backward

        grads = tuple(torch.empty_like(x) for x in (query, key, value))
        _flash_attn_backward(
            grad_out, query, key, value, out, lse, *grads,
            dropout_p=0.0, softmax_scale=scale, causal=causal, deterministic=False, **self._options,
        )  # fmt: skip
        return grads


class FlashAttention4Kernel(_CudaKernel):
    """The flash-attn-4 package (`flash_attn.cute`), compiled at its first call."""

    name = "flash_attention_4"
    min_capability = (9, 0)
    distinct_value_dim = True

    def why_not(self, device, dtype, head_dim, value_dim):
        if find_spec("flash_attn") is None or find_spec("flash_attn.cute") is None:
            return "is not installed: pip install flash-attn-4"
        return super().why_not(device, dtype, head_dim, value_dim)

    def forward(self, query, key, value, *, causal, scale):
        from flash_attn.cute.interface import _flash_attn_fwd

        out, lse, *_ = _flash_attn_fwd(query, key, value, softmax_scale=scale, causal=causal, return_lse=True)
        return out, lse

    def backward(self, grad_out, query, key, value, out, lse, *, causal, scale):
        from flash_attn.cute.interface import _flash_attn_bwd

        return _flash_attn_bwd(query, key, value, out, grad_out, lse, softmax_scale=scale, causal=causal)[:3]


# Fastest first, as measured on Hopper (benchmarks/results); the definition last.
KERNELS: dict[str, AttentionKernel] = {
    kernel.name: kernel
    for kernel in (
        FlashAttention4Kernel(),
        CudnnKernel(),
        FlashAttention2Kernel(),
        TorchFlashKernel(),
        TorchEfficientKernel(),
        TorchCpuKernel(),
        NaiveKernel(),
    )
}


def _accumulation_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _expand_heads(kv: Tensor, query: Tensor) -> Tensor:
    """`[batch, keys, kv_heads, dim] -> [batch, keys, heads, dim]` in the accumulation dtype."""
    return kv.to(_accumulation_dtype(query)).repeat_interleave(query.shape[2] // kv.shape[2], dim=2)


def _sum_heads(grad_wide: Tensor, like: Tensor) -> Tensor:
    """`[batch, keys, heads, dim] -> [batch, keys, kv_heads, dim]`, summed over each group in fp32 (fp64), dtype of `like`."""
    if grad_wide.shape == like.shape:
        return grad_wide.to(like.dtype)
    batch, keys, kv_heads, dim = like.shape
    grouped = grad_wide.to(_accumulation_dtype(grad_wide)).reshape(batch, keys, kv_heads, -1, dim)
    return grouped.sum(3).to(like.dtype)


@lru_cache
def _philox_placeholder(device: torch.device, dtype: torch.dtype = torch.uint64) -> Tensor:
    """The random state that backward ops ask for and, without dropout, never read."""
    return torch.zeros(2, dtype=dtype, device=device)
