"""
The loss of a sequence whose tokens are spread over a sequence-parallel group: the mean over all its valid tokens.

    loss = sum_r(n_r * loss_r) / sum_r(n_r)         loss_r: mean over the n_r valid labels of rank r
"""

from contextvars import ContextVar
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

IGNORED = -100
_combining: ContextVar[bool] = ContextVar("fpdt_combining_losses", default=False)


def sequence_parallel_loss(
    accelerator: Any,
    model: torch.nn.Module,
    inputs: dict[str, Any],
    return_outputs: bool,
    pc: Any,
    *,
    sp_group: dist.ProcessGroup,
    gradient_factor: float = 1.0,
) -> Tensor | tuple[Tensor, Any]:
    """
    Stands in for `transformers.trainer.deepspeed_sp_compute_loss` once `sp_group` and `gradient_factor` are bound.

    Args:
        accelerator: not needed; Trainer passes it.
        model: called with `inputs`; the loss that it returns is the mean over its own valid labels.
        inputs: this rank's shard, as from `shard_batch`. Without `labels` it gets the `shift_labels` as such, because models
            compute no loss without.
        return_outputs: whether to return the model's outputs as well.
        pc: not needed; Trainer passes it.
        sp_group, gradient_factor: as in `global_mean`.

    Raises:
        ValueError: if there are no `shift_labels`.
    """
    if inputs.get("shift_labels") is None:
        raise ValueError(
            f"Sequence parallelism: a batch with {sorted(inputs)} has no shift_labels to train on. Let the collator return "
            "labels, which the data loader shifts."
        )
    token = _combining.set(True)
    try:
        outputs = model(**{"labels": inputs["shift_labels"], **inputs})
    finally:
        _combining.reset(token)
    num_valid = (inputs["shift_labels"] != IGNORED).sum()
    loss = global_mean(outputs.loss, num_valid, sp_group, gradient_factor=gradient_factor)
    return (loss, outputs) if return_outputs else loss


def combines_losses() -> bool:
    """Whether `sequence_parallel_loss` is calling the model: it makes the group's mean of the losses that models return."""
    return _combining.get()


def global_mean(loss: Tensor, num_valid: Tensor, sp_group: dist.ProcessGroup, *, gradient_factor: float = 1.0) -> Tensor:
    """
    Mean loss over the group, the same number on all its ranks; 0 if none has a valid label. One all-reduce forward, no
    communication backward.

    The gradient of the result `L` on rank r is that of its own share:

        d loss_r = gradient_factor * n_r / sum(n) * dL

    Every rank calls backward on its own copy of `L`, with the same dL. With a factor of 1 the copies count as the one loss that
    they are: the gradients of a weight, summed over the group, are the gradient of the global mean. That is right for an engine
    that sums over the group. One that averages over it as well divides by sp_size too often and needs a factor of sp_size.
    (Differentiating an all-gather adds up the sp_size copies of dL, a factor of sp_size for every engine.) A rank without a
    valid label gets a gradient of 0; its own mean, which may be NaN, is not used.

    Args:
        loss: scalar, the mean over this rank's valid labels.
        num_valid: scalar, how many there are.
        sp_group: the ranks that share the sequence.
        gradient_factor: 1, or sp_size; see above.
    """
    return _GlobalMean.apply(loss, num_valid, sp_group, gradient_factor)


class _GlobalMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss, num_valid, sp_group, gradient_factor):
        num_valid = num_valid.to(loss.device, torch.float64)  # fp32 counts up to 16.8 million only
        share = torch.where(num_valid > 0, loss.double() * num_valid, 0.0)
        sums = torch.stack([share, num_valid])
        dist.all_reduce(sums, group=sp_group)
        total, num_valid_in_group = sums[0], sums[1].clamp(min=1)
        ctx.scale = gradient_factor * num_valid / num_valid_in_group
        return (total / num_valid_in_group).to(loss.dtype)

    @staticmethod
    def backward(ctx, grad_loss):
        return (grad_loss * ctx.scale).to(grad_loss.dtype), None, None, None
