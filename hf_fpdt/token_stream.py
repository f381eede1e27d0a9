"""
A module that works on every token alone, streamed: for the final norm, whose fp32 intermediates would otherwise be several
times as long as the sequence. `y_i = module(x_i)` chunk by chunk; the backward runs each chunk again and holds only its
intermediates. Exact by construction.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .gradient_sum import GradientSum
from .run_state import AutocastState
from .sole_owner import counts_of_unshared, grad_x_like, is_sole_owner
from .unchanged import UnchangedModule, spent_error


def stream_tokens(
    module: nn.Module,
    forward: Callable[[Tensor], Tensor],
    x: Tensor,
    spans: Sequence[tuple[int, int]],
    keep: Callable[[Tensor], Any],
) -> Tensor:
    """
    `forward(x)` for a token-wise, deterministic `forward` on `x [batch, seq_len, hidden]`.

    Args:
        module: what has the parameters that `forward` uses.
        spans: `(start, stop)` of every chunk of the sequence, in order.
        keep: puts a chunk of `x` where it waits for the backward, see `transfers.py`.
    """
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    if not (torch.is_grad_enabled() and (x.requires_grad or weights)):
        return _forward(forward, x, spans)
    unchanged = UnchangedModule(module, type(module).__name__)
    counts_of_unshared()
    return _StreamedTokens.apply((forward, spans, AutocastState(x.device.type), unchanged, keep), x, *weights)


def _forward(forward, x: Tensor, spans) -> Tensor:
    y = None
    for start, stop in spans:
        y_chunk = forward(x[:, start:stop])
        y = y_chunk.new_empty(*x.shape[:2], *y_chunk.shape[2:]) if y is None else y
        y[:, start:stop] = y_chunk
    return y


class _StreamedTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call, x, *weights):
        ctx.call, ctx.weights = call, weights
        forward, spans, autocast, _, keep = call
        ctx.kept = [keep(x[:, start:stop]) for start, stop in spans]
        with autocast.context():
            return _forward(forward, x, spans)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        overwrite = is_sole_owner(grad_y)
        forward, spans, autocast, unchanged, _ = ctx.call
        kept, ctx.kept = ctx.kept, None
        if kept is None:
            raise spent_error(unchanged.name)
        unchanged.check()
        needs_grad_x, grad_x = ctx.needs_input_grad[1], None
        sums = GradientSum(len(spans))
        for index, (start, stop) in enumerate(spans):
            for one in kept[index : index + 2]:
                one.prefetch()
            x_chunk = kept[index].get().detach().requires_grad_(needs_grad_x)
            with torch.enable_grad(), autocast.context():
                y_chunk = forward(x_chunk)
            inputs = (x_chunk, *ctx.weights) if needs_grad_x else ctx.weights
            grads = torch.autograd.grad(y_chunk, inputs, grad_y[:, start:stop])
            if needs_grad_x:
                if grad_x is None:
                    grad_x = grad_x_like(grad_y, x_chunk, overwrite)
                grad_x[:, start:stop] = grads[0]
            sums.add(grads[needs_grad_x:])
            del x_chunk, y_chunk, inputs, grads
            kept[index].release()
        return None, grad_x, *sums.result()
