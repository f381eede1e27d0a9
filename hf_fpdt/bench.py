"""
`hf-fpdt bench`: measures what a machine does in a second (`rates.py`), from which `hf-fpdt plan` tells how long a step takes.

Every rate is that of long work: the same is done again and again for some time, of which the second half counts, so that a GPU
has the clock that its power limit leaves it in training.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from .attention_kernels import AttentionKernel, ScoreRule
from .causal_attention import attend_prefix, attend_prefix_backward
from .flops import attention_flops
from .kernel_choice import choose_kernel
from .link_rate import rate_between
from .rates import AttentionRates, Rates

HEAD_DIMS = (64, 96, 128, 256)
_HEADS, _KV_HEADS = 32, 8
_PACKAGES = ("torch", "flash-attn", "flash-attn-4")
_OPERATIONS = 500  # of the chain that tells what an operation takes at least


@dataclass(frozen=True)
class _Sizes:
    """Tokens of a chunk, and earlier ones that it sees; a matrix; elements of a large tensor; bytes of an all-to-all."""

    chunk: int
    earlier: int
    matrix: tuple[int, int]
    elements: int
    link_bytes: int


_SIZES = {
    "cuda": _Sizes(16384, 65536, (4096, 14336), 1 << 29, 1 << 28),
    "cpu": _Sizes(64, 128, (128, 256), 1 << 16, 1 << 16),
}


def measure_rates(device: torch.device, seconds: float = 1.0) -> Rates:
    """
    The rates of this device, in bfloat16.

    Args:
        device: a GPU with 8 GiB free, or the CPU, where the sizes are small and the copies are those of memory.
        seconds: of every kind of work; there are 21 kinds.
    """
    sizes, timer = _SIZES[device.type], _Timer(device, seconds)
    attention, kernels = {}, {}
    for head_dim in HEAD_DIMS:
        kernel = choose_kernel("auto", device, torch.bfloat16, head_dim, head_dim)
        attention[head_dim], kernels[str(head_dim)] = _attention(timer, kernel, head_dim, sizes), kernel.name
    to_host, to_device = _copies(timer, sizes.elements // 2)
    # The processes that measure the link need a GPU each, this one's as well, whose tensors are gone by now.
    link = rate_between(device.type, torch.cuda.device_count() if device.type == "cuda" else 2, sizes.link_bytes)
    name, size = "CPU", 0
    if device.type == "cuda":
        name, size = torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device).total_memory
    return Rates(
        gpu=name,
        gpu_bytes=size,
        matmul=_matmul(timer, sizes),
        memory=_memory(timer, sizes.elements),
        launch=_launch(timer),
        to_host=to_host,
        to_device=to_device,
        attention=attention,
        link=link,
        made={"date": date.today().isoformat(), "kernels": kernels} | {one: _version(one) for one in _PACKAGES},
    )


class _Timer:
    def __init__(self, device: torch.device, seconds: float):
        self.device, self._seconds = device, seconds

    def of(self, work: Callable[[], object]) -> float:
        """Seconds of one call of `work`, in the second half of a time full of them."""
        work()
        once = self._measured(work, 1)
        count = max(1, round(self._seconds / 2 / max(once, 1e-6)))
        self._measured(work, count)
        return self._measured(work, count) / count

    def _measured(self, work: Callable[[], object], count: int) -> float:
        self._wait()
        started = time.perf_counter()
        for _ in range(count):
            work()
        self._wait()
        return time.perf_counter() - started

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _matmul(timer: _Timer, sizes: _Sizes) -> float:
    rows, columns = sizes.matrix
    x, weight = (_random(timer, *shape) for shape in ((sizes.chunk, rows), sizes.matrix))
    return 2 * sizes.chunk * rows * columns / timer.of(lambda: x @ weight)


def _memory(timer: _Timer, elements: int) -> float:
    first, second, total = (torch.zeros(elements, device=timer.device, dtype=torch.bfloat16) for _ in range(3))
    return 3 * first.nbytes / timer.of(lambda: torch.add(first, second, out=total))


def _launch(timer: _Timer) -> float:
    """Of an operation in a model's forward or backward: a chain of such, on one number."""
    start = torch.ones((), device=timer.device, requires_grad=True)

    def chain():
        x = start
        for _ in range(_OPERATIONS):
            x = x * 1.0
        torch.autograd.grad(x, start)

    return timer.of(chain) / (2 * _OPERATIONS)


def _copies(timer: _Timer, elements: int) -> tuple[float, float]:
    on_host = torch.zeros(elements, dtype=torch.bfloat16, pin_memory=timer.device.type == "cuda")
    on_device = on_host.to(timer.device, copy=True)
    to_host = timer.of(lambda: on_host.copy_(on_device, non_blocking=True))
    to_device = timer.of(lambda: on_device.copy_(on_host, non_blocking=True))
    return on_host.nbytes / to_host, on_host.nbytes / to_device


def _attention(timer: _Timer, kernel: AttentionKernel, head_dim: int, sizes: _Sizes) -> AttentionRates:
    """As layers do it, sums of gradients in fp32 included: once over the diagonal block alone, once with earlier keys."""
    chunk, whole = sizes.chunk, sizes.chunk + sizes.earlier
    lengths = ((chunk, _HEADS), (whole, _KV_HEADS), (whole, _KV_HEADS))
    query, key, value = (_random(timer, 1, length, heads, head_dim) for length, heads in lengths)
    sums = [torch.zeros_like(key, dtype=torch.float32) for _ in range(2)]
    rule = ScoreRule(head_dim**-0.5)

    def both(start: int) -> tuple[float, float]:
        k, v, sum_k, sum_v = (t[:, start:] for t in (key, value, *sums))
        out, lse = attend_prefix(kernel, query, k, v, rule)
        forward = timer.of(lambda: attend_prefix(kernel, query, k, v, rule))
        return forward, timer.of(lambda: attend_prefix_backward(kernel, out, query, k, v, out, lse, rule, sum_k, sum_v))

    with torch.no_grad():
        diagonal, full = both(sizes.earlier), both(0)
    square = attention_flops(chunk * (chunk + 1) // 2, _HEADS, head_dim, head_dim)
    rest = attention_flops(chunk * sizes.earlier, _HEADS, head_dim, head_dim)
    return AttentionRates(
        forward=rest / 3 / max(full[0] - diagonal[0], 1e-9),
        backward=rest * 2 / 3 / max(full[1] - diagonal[1], 1e-9),
        forward_diagonal=square / 3 / diagonal[0],
        backward_diagonal=square * 2 / 3 / diagonal[1],
    )


def _random(timer: _Timer, *shape: int) -> Tensor:
    return torch.randn(shape, device=timer.device, dtype=torch.bfloat16)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
