"""
Cross-entropy of a block of logits together with its gradient.

    loss = sum_i  logsumexp(logits_i) - logits_i[label_i]
    grad = softmax(logits) - onehot(labels)

On a GPU one Triton kernel reads the logits twice, the second time from the L2 cache, and writes the gradient in their dtype;
elsewhere torch does it with an fp32 copy. Arithmetic and loss are fp32 (fp64 for fp64 logits) either way.
"""

from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F

if find_spec("triton") is not None:
    import triton
    import triton.language as tl
else:  # builds of torch for CPUs come without it
    triton = None


def cross_entropy_and_grad(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """
    Args:
        logits: `[tokens, vocab_size]`, not changed.
        labels: `[tokens]`, int64, every one in `[0, vocab_size)`; one outside makes the loss NaN, or is an error on a CPU.

    Returns:
        The summed loss (0-dim) and its gradient, shaped like the logits and in their dtype.
    """
    if triton is not None and logits.is_cuda and logits.dtype != torch.float64:
        return _fused(logits.contiguous(), labels)
    log_probs = _log_probs(logits)
    loss = F.nll_loss(log_probs, labels, reduction="sum")
    grad = log_probs.exp_()
    grad[torch.arange(labels.numel(), device=labels.device), labels] -= 1
    return loss, grad.to(logits.dtype)


def cross_entropy_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """The summed loss alone, with a gradient if the logits have one."""
    return F.nll_loss(_log_probs(logits), labels, reduction="sum")


def _log_probs(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _fused(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    num_tokens, vocab_size = logits.shape
    grad = torch.empty_like(logits)
    losses = torch.empty(num_tokens, dtype=torch.float32, device=logits.device)
    if num_tokens:
        block = min(8192, triton.next_power_of_2(vocab_size))
        with torch.cuda.device(logits.device):
            _cross_entropy_kernel[(num_tokens,)](logits, labels, grad, losses, vocab_size, BLOCK=block, num_warps=16)
    return losses.sum(), grad


if triton is not None:

    @triton.jit
    def _cross_entropy_kernel(logits_ptr, labels_ptr, grad_ptr, losses_ptr, vocab_size, BLOCK: tl.constexpr):
        """One row a program. Running maximum and sum per lane, joined at the end of the first pass."""
        row = tl.program_id(0).to(tl.int64)  # row * vocab_size passes 2^31 elements
        logits_ptr += row * vocab_size
        grad_ptr += row * vocab_size
        label = tl.load(labels_ptr + row)
        lane = tl.arange(0, BLOCK)
        maximum = tl.full([BLOCK], -1e30, tl.float32)
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, vocab_size, BLOCK):
            logits = tl.load(logits_ptr + start + lane, mask=start + lane < vocab_size, other=-float("inf")).to(tl.float32)
            larger = tl.maximum(maximum, logits)
            total = total * tl.exp(maximum - larger) + tl.exp(logits - larger)
            maximum = larger
        row_maximum = tl.max(maximum, axis=0)
        lse = row_maximum + tl.log(tl.sum(total * tl.exp(maximum - row_maximum), axis=0))
        in_range = (label >= 0) & (label < vocab_size)
        tl.store(losses_ptr + row, lse - tl.load(logits_ptr + label, mask=in_range, other=float("nan")).to(tl.float32))
        for start in range(0, vocab_size, BLOCK):
            column = start + lane
            logits = tl.load(logits_ptr + column, mask=column < vocab_size, other=-float("inf")).to(tl.float32)
            grad = tl.exp(logits - lse) - tl.where(column == label, 1.0, 0.0)
            tl.store(grad_ptr + column, grad.to(grad_ptr.dtype.element_ty), mask=column < vocab_size)
