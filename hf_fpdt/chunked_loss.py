"""
Next-token cross-entropy from hidden states, a chunk of tokens at a time: no tensor of size tokens x vocabulary exists.

For hidden states `h`, a head `f` (linear layer, then scaling or softcap) and labels `t`:

    loss = sum_i  logsumexp(f(h_i)) - f(h_i)[t_i]      over positions i whose label is not ignored

1. drop the ignored positions (one host synchronization a call, to learn how many are left);
2. per chunk: logits, loss and grad_logits; from them grad_h of the chunk and the head's weight gradients, summed in fp32;
3. the backward multiplies both by the incoming gradient, so that a loss scaled later scales every gradient.

Gradients are kept without the normalization (1/tokens): it arrives with the incoming gradient, in fp32, where it cannot
underflow. Memory: O(chunk * vocabulary) + grad_h (size of h) + fp32 weight gradients.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .cross_entropy import cross_entropy_and_grad, cross_entropy_sum
from .gradient_sum import GradientSum
from .run_state import AutocastState

# Elements of the logits of one chunk: 4,096 tokens of a 128K vocabulary on a GPU, where a shorter chunk would make the
# head's matrix products inefficient.
AUTO_CHUNK_LOGITS = {"cuda": 1 << 29, "cpu": 1 << 24}
_SCALED_ROWS = 8192  # tokens of grad_hidden scaled at a time


def chunked_cross_entropy(
    hidden: Tensor,
    labels: Tensor,
    head: Callable[[Tensor], Tensor],
    weights: Sequence[Tensor],
    *,
    vocab_size: int,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor]:
    """
    Args:
        hidden: `[..., hidden]`, any number of leading dimensions.
        labels: the labels of these positions, already shifted; as many as positions.
        head: `[tokens, hidden] -> [tokens, vocab_size]` logits.
        weights: the trainable parameters that `head` uses.

    Returns:
        The sum of the losses, fp32 and 0-dim, and the number of positions that counted, int64 and 0-dim. With none, the sum
        is 0 and so are the gradients.
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    labels = labels.reshape(-1).to(flat.device)
    if labels.numel() != flat.shape[0]:
        raise ValueError(f"labels have {labels.numel()} positions and the hidden states {flat.shape[0]}; they must agree.")
    kept = torch.nonzero(labels != ignore_index).squeeze(-1)
    chunks = torch.split(kept, _chunk_tokens(vocab_size, flat.device.type)) if kept.numel() else ()
    count = torch.tensor(kept.numel(), device=flat.device)
    if not torch.is_grad_enabled() or not (flat.requires_grad or weights):
        total = flat.new_zeros((), dtype=torch.promote_types(flat.dtype, torch.float32))
        for rows in chunks:
            total += cross_entropy_sum(head(flat[rows]), labels[rows])
        return total, count
    call = (head, labels, chunks, AutocastState(flat.device.type))
    return _ChunkedCrossEntropy.apply(call, flat, *weights), count


def loss_chunk_bytes(vocab_size: int, tokens: int, hidden_bytes: float, itemsize: int, device_type: str) -> tuple[int, int]:
    """
    Args:
        tokens: positions whose loss counts.
        hidden_bytes: of the hidden state of one position.
        itemsize: bytes of one logit.

    Returns:
        Bytes that one chunk takes beyond the weight gradients, and how many chunks there are.
    """
    size = min(_chunk_tokens(vocab_size, device_type), tokens)
    # Logits and their gradient; without the fused kernel an fp32 copy and the gradient in fp32 first.
    logits = 2 * itemsize if device_type == "cuda" or itemsize >= 4 else itemsize + 8
    return round(size * (vocab_size * logits + 2 * hidden_bytes)), -(-tokens // size)


def _chunk_tokens(vocab_size: int, device_type: str) -> int:
    return max(1, AUTO_CHUNK_LOGITS.get(device_type, AUTO_CHUNK_LOGITS["cpu"]) // vocab_size)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """`(hidden, *weights) -> loss sum`; the gradients are computed in the forward and scaled in the backward."""

    @staticmethod
    def forward(ctx, call, hidden, *weights):
        head, labels, chunks, autocast = call
        needs_grad_hidden = ctx.needs_input_grad[1]
        total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        grad_hidden = torch.zeros_like(hidden) if needs_grad_hidden else None
        sums = GradientSum(len(chunks))
        for rows in chunks:
            hidden_chunk = hidden[rows].detach().requires_grad_(needs_grad_hidden)
            with torch.enable_grad(), autocast.context():
                logits = head(hidden_chunk)
            loss, grad_logits = cross_entropy_and_grad(logits.detach(), labels[rows])
            inputs = (hidden_chunk, *weights) if needs_grad_hidden else weights
            grads = torch.autograd.grad(logits, inputs, grad_logits)
            del logits, grad_logits
            total += loss
            if needs_grad_hidden:
                grad_hidden[rows] = grads[0]
            sums.add(grads[needs_grad_hidden:])
            del hidden_chunk, grads  # not beside those of the next chunk
        ctx.grad_hidden, ctx.sums, ctx.like = grad_hidden, (sums if chunks else None), weights
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total):
        grad_hidden, sums, weights = ctx.grad_hidden, ctx.sums, ctx.like
        if weights is None:
            raise RuntimeError("backward through the chunked loss a second time: its gradients were released by the first.")
        ctx.grad_hidden = ctx.sums = ctx.like = None
        if grad_hidden is not None:
            for rows in torch.split(grad_hidden, _SCALED_ROWS):
                # In fp32: rounding the scale itself to 16 bits would shift every gradient by the same error.
                rows.copy_(rows.to(grad_total.dtype) * grad_total)
        grad_weights = [torch.zeros_like(w) for w in weights] if sums is None else sums.result(scale=grad_total)
        return None, grad_hidden, *grad_weights
