"""Attention kernels for CUDA devices, in torch and in packages that may not be installed; see `attention_kernels`."""

from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor

from .attention_kernels import HALF, AttentionKernel, NaiveKernel, ScoreRule, aten, sum_heads


class _CudaKernel(AttentionKernel):
    """What the CUDA kernels have in common: 16-bit floats, and a limit on the head dimension."""

    aligns_last = True
    device_type = "cuda"
    dtypes = HALF
    head_multiple = 8
    max_head_dim = 256
    min_capability = (8, 0)

    def why_not(self, device, dtype, head_dim, value_dim):
        if device.type != "cuda":
            return f"runs on CUDA devices only, and the tensors are on {device.type}"
        if dtype not in self.dtypes:
            names = [str(x).removeprefix("torch.") for x in (*self.dtypes, dtype)]
            return f"needs {' or '.join(names[:-1])}, and the attention runs in {names[-1]}"
        if max(head_dim, value_dim) > self.max_head_dim:
            return f"needs heads of {self.max_head_dim} at most, and the model has {max(head_dim, value_dim)}"
        if torch.cuda.get_device_capability(device) < self.min_capability:
            return f"needs compute capability {'.'.join(map(str, self.min_capability))} or later"
        return None


class TorchFlashKernel(_CudaKernel):
    """The FlashAttention-2 that is built into torch."""

    name = "torch_flash"
    features = frozenset(("window",))

    def forward(self, query, key, value, rule, *, causal):
        lengths = (None, None, query.shape[1], key.shape[1])
        out, lse, *_ = aten._flash_attention_forward(
            query, key, value, *lengths, 0.0, causal, False, scale=rule.scale, **_window(rule)
        )
        return out, lse

    def backward(self, grad_out, query, key, value, out, lse, rule, *, causal):
        lengths = (None, None, query.shape[1], key.shape[1])
        rng = _philox_placeholder(query.device)
        return aten._flash_attention_backward(
            grad_out, query, key, value, out, lse, *lengths, 0.0, causal, rng, rng, scale=rule.scale, **_window(rule)
        )


class TorchEfficientKernel(_CudaKernel):
    """
    torch's memory-efficient attention: slower, but for fp32 and for GPUs before Ampere. Causal is aligned with the first key,
    heads are not grouped, and its lse is padded to a multiple of 32 queries.
    """

    name = "torch_efficient"
    aligns_last = False
    dtypes = (torch.float32, *HALF)
    min_capability = (7, 0)

    def forward(self, query, key, value, rule, *, causal):
        tensors = (x.transpose(1, 2) for x in (query, *self._widen(query, key, value)))
        out, lse, *_ = aten._scaled_dot_product_efficient_attention(*tensors, None, True, 0.0, causal, scale=rule.scale)
        return out.transpose(1, 2), lse[:, :, : query.shape[1]].contiguous()

    def backward(self, grad_out, query, key, value, out, lse, rule, *, causal):
        lse = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=float("inf"))
        wide = self._widen(query, key, value)
        grad_out, query_t, key_t, value_t, out = (x.transpose(1, 2) for x in (grad_out, query, *wide, out))
        rng = _philox_placeholder(query.device, torch.int64)[:1].view(())
        grads = aten._scaled_dot_product_efficient_attention_backward(
            grad_out,
            query_t,
            key_t,
            value_t,
            None,
            out,
            lse,
            rng,
            rng,
            0.0,
            [True, True, True, False],
            causal,
            scale=rule.scale,
        )
        grad_query, grad_key, grad_value = (x.transpose(1, 2) for x in grads[:3])
        return grad_query, sum_heads(grad_key, key), sum_heads(grad_value, value)

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

    def forward(self, query, key, value, rule, *, causal):
        if query.shape[1] == key.shape[1] == 1:
            return NaiveKernel().forward(query, key, value, rule, causal=causal)
        tensors = (x.transpose(1, 2) for x in (query, key, value))
        result = aten._scaled_dot_product_cudnn_attention(*tensors, None, True, 0.0, causal, False, scale=rule.scale)
        return result[0].transpose(1, 2), result[1].squeeze(-1)

    def backward(self, grad_out, query, key, value, out, lse, rule, *, causal):
        if query.shape[1] == key.shape[1] == 1:
            return NaiveKernel().backward(grad_out, query, key, value, out, lse, rule, causal=causal)
        tensors = (x.transpose(1, 2) for x in (grad_out, query, key, value, out))
        rng = _philox_placeholder(query.device, torch.int64)[:1].view(())
        grads = aten._scaled_dot_product_cudnn_attention_backward(
            *tensors, lse.unsqueeze(-1), rng, rng, None, None, None, query.shape[1], key.shape[1], 0.0, causal, scale=rule.scale
        )
        return tuple(x.transpose(1, 2) for x in grads)


class FlashAttention2Kernel(_CudaKernel):
    """The flash-attn package, version 2.7 or later."""

    name = "flash_attention_2"
    features = frozenset(("softcap", "window"))

    def why_not(self, device, dtype, head_dim, value_dim):
        if find_spec("flash_attn") is None or find_spec("flash_attn_2_cuda") is None:
            return "is not installed: pip install flash-attn"
        return super().why_not(device, dtype, head_dim, value_dim)

    def forward(self, query, key, value, rule, *, causal):
        from flash_attn.flash_attn_interface import _flash_attn_forward

        options = self._options(rule, causal)
        out, lse, *_ = _flash_attn_forward(query, key, value, dropout_p=0.0, return_softmax=False, **options)
        return out, lse

    def backward(self, grad_out, query, key, value, out, lse, rule, *, causal):
        from flash_attn.flash_attn_interface import _flash_attn_backward

        grads = tuple(torch.empty_like(x) for x in (query, key, value))
        options = self._options(rule, causal)
        _flash_attn_backward(grad_out, query, key, value, out, lse, *grads, dropout_p=0.0, deterministic=False, **options)
        return grads

    def _options(self, rule: ScoreRule, causal: bool) -> dict:
        window = {"window_size_left": -1, "window_size_right": -1} | _window(rule)
        return window | {
            "softmax_scale": rule.scale, "causal": causal, "softcap": rule.softcap or 0.0, "alibi_slopes": None
        }  # fmt: skip


class FlashAttention4Kernel(_CudaKernel):
    """
    The flash-attn-4 package (`flash_attn.cute`), compiled at its first call. It takes heads of other multiples of 8 as well,
    but version 4.0.0b36 has wrong gradients on Hopper for those of 40, 72, 80, 104 and 112.
    """

    name = "flash_attention_4"
    features = frozenset(("softcap", "window"))
    head_multiple = 32
    min_capability = (9, 0)
    distinct_value_dim = True

    def why_not(self, device, dtype, head_dim, value_dim):
        if find_spec("flash_attn") is None or find_spec("flash_attn.cute") is None:
            return "is not installed: pip install flash-attn-4"
        return super().why_not(device, dtype, head_dim, value_dim)

    def forward(self, query, key, value, rule, *, causal):
        from flash_attn.cute.interface import _flash_attn_fwd

        out, lse, *_ = _flash_attn_fwd(query, key, value, return_lse=True, **self._options(rule, causal))
        return out, lse

    def backward(self, grad_out, query, key, value, out, lse, rule, *, causal):
        from flash_attn.cute.interface import _flash_attn_bwd

        return _flash_attn_bwd(query, key, value, out, grad_out, lse, **self._options(rule, causal))[:3]

    def _options(self, rule: ScoreRule, causal: bool) -> dict:
        # A window says itself that it ends with the query.
        limits = {"causal": causal} if rule.window is None else _window(rule)
        return limits | {"softmax_scale": rule.scale, "softcap": rule.softcap or 0.0}


def _window(rule: ScoreRule) -> dict[str, int]:
    """As FlashAttention takes it: keys before and after the query's own."""
    return {} if rule.window is None else {"window_size_left": rule.window - 1, "window_size_right": 0}


@lru_cache
def _philox_placeholder(device: torch.device, dtype: torch.dtype = torch.uint64) -> Tensor:
    """The random state that backward ops ask for and, without dropout, never read."""
    return torch.zeros(2, dtype=dtype, device=device)
