"""Which attention kernel runs: chosen once per device, dtype and head size, by trying it against the definition."""

import logging
from functools import lru_cache

import torch

from .attention_kernels import AttentionKernel, NaiveKernel, ScoreRule, TorchCpuKernel
from .causal_attention import attend_prefix, attend_prefix_backward
from .cuda_kernels import (
    CudnnKernel,
    FlashAttention2Kernel,
    FlashAttention4Kernel,
    TorchEfficientKernel,
    TorchFlashKernel,
)
from .run_state import no_autocast

logger = logging.getLogger(__name__)

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

# Largest relative error of out and gradients, in the 2-norm, that still counts as right. Rounding alone gives about 3e-3 in
# bfloat16, 4e-4 in float16 and 1e-6 in float32; a wrong mask, scale or head mapping gives more than 0.1.
_MAX_ERROR = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-4, torch.float64: 1e-8}


@lru_cache
def choose_kernel(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int,
    features: frozenset[str] = frozenset(),
) -> AttentionKernel:
    """
    The kernel called `name`, or for `"auto"` the fastest that supports such tensors and agrees with the definition. It is to be
    called with heads of the sizes that its `padded` makes of these.

    Args:
        features: those of a `ScoreRule`.

    Raises:
        ValueError: if the named kernel cannot run such tensors here, or computes them wrongly.
        torch.OutOfMemoryError: if there was no memory to try one; the next call tries again.
    """
    if device.type == "meta":  # to plan for another machine: nothing runs
        return KERNELS[next(iter(KERNELS)) if name == "auto" else name]
    candidates = KERNELS.values() if name == "auto" else (KERNELS[name],)
    tensors, reasons = (device, dtype, head_dim, value_dim, features), []
    for kernel in candidates:
        reason = _why_not(kernel, *tensors) or _probe(kernel, *tensors)
        if reason is None:
            passed_over = "".join(f"; {text}" for other, text in reasons if other.device_type in (None, device.type))
            sizes = kernel.padded(head_dim, value_dim)
            dim = f"head_dim {head_dim}{'' if sizes == (head_dim, value_dim) else f' run as {sizes[0]}'}"
            kind = ", ".join([str(dtype).removeprefix("torch."), dim, *sorted(features)])
            slow = name == "auto" and kernel.name == "naive" and device.type != "cpu"
            log, more = (logger.warning, ", which is slow") if slow else (logger.info, "")
            log("hf_fpdt: attention kernel %s for %s, %s%s%s", kernel.name, device.type, kind, more, passed_over)
            return kernel
        reasons.append((kernel, f"{kernel.name} {reason}"))
    usable = [k.name for k in KERNELS.values() if _why_not(k, *tensors) is None]
    raise ValueError(
        f"FPDTConfig(kernel={name!r}): {'; '.join(text for _, text in reasons)}. Usable here: {', '.join(usable)}; "
        'kernel="auto" takes the fastest of them.'
    )


def _why_not(kernel: AttentionKernel, device, dtype, head_dim, value_dim, features: frozenset[str]) -> str | None:
    missing, sizes = sorted(features - kernel.features), kernel.padded(head_dim, value_dim)
    return kernel.why_not(device, dtype, *sizes) or (f"has no {' and no '.join(missing)}" if missing else None)


def _probe(kernel: AttentionKernel, device, dtype, head_dim, value_dim, features: frozenset[str]) -> str | None:
    """Runs a small causal prefix with grouped heads; None if it agrees with the definition, else what went wrong."""
    if kernel.name == "naive":
        return None
    head_dim, value_dim = kernel.padded(head_dim, value_dim)
    generator = torch.Generator(device=device).manual_seed(0)  # its own: the user's random stream is not touched

    def draw(length, heads, dim):
        return torch.randn(2, length, heads, dim, device=device, dtype=torch.float32, generator=generator).to(dtype)

    query, key, value = draw(96, 4, head_dim), draw(224, 2, head_dim), draw(224, 2, value_dim)
    grad_out = draw(96, 4, value_dim)
    try:
        with no_autocast(device.type), torch.no_grad():
            results = [_run(k, grad_out, query, key, value, features) for k in (kernel, KERNELS["naive"])]
    except torch.OutOfMemoryError:  # says nothing about the kernel, and what is said here is remembered
        raise
    except Exception as error:  # a kernel may fail in any way on a machine it was not built for
        return f"failed its probe with {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    for label, got, want in zip(("out", "grad_query", "grad_key", "grad_value"), *results, strict=True):
        error = (torch.linalg.vector_norm(got.double() - want.double()) / torch.linalg.vector_norm(want.double())).item()
        if not error <= _MAX_ERROR[dtype]:  # also true for NaN
            return f"is wrong here: {label} differs from the definition by {error:.1e} (relative, 2-norm)"
    return None


def _run(kernel, grad_out, query, key, value, features):
    odd = {"softcap": 1.5, "window": 45}  # small enough to matter
    rule = ScoreRule(query.shape[-1] ** -0.5, **{name: odd[name] for name in features})
    grad_key, grad_value = (torch.zeros_like(x, dtype=torch.float32) for x in (key, value))
    if query.dtype == torch.float64:
        grad_key, grad_value = grad_key.double(), grad_value.double()
    out, lse = attend_prefix(kernel, query, key, value, rule)
    grad_query = attend_prefix_backward(kernel, grad_out, query, key, value, out, lse, rule, grad_key, grad_value)
    return out, grad_query, grad_key, grad_value
