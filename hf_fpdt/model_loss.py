"""The loss of a causal LM that streams: the model's own forward runs, with deferred logits and a chunked loss function."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.utils import logging

from .chunked_loss import chunked_cross_entropy
from .deferred_logits import DeferredLogits
from .instance_forward import inner_forward, is_replaced, replace_forward, restore_forward
from .run_state import autocast_dtype

logger = logging.get_logger(__name__)

_deferring_head: ContextVar["nn.Module | None"] = ContextVar("fpdt_deferring_head", default=None)


@contextmanager
def chunked_loss(model: PreTrainedModel, arguments: dict[str, Any]) -> Iterator[None]:
    """
    Inside, the model's forward computes its loss in chunks, if it is called with labels and its loss is the ordinary one of a
    causal LM over all positions. Otherwise nothing changes and the reason is logged.
    """
    head = model.get_output_embeddings()
    reason = _why_not(model, head, arguments)
    if arguments.get("labels") is None or reason is not None:
        if reason is not None and arguments.get("labels") is not None:
            logger.warning_once(f"hf_fpdt: {type(model).__name__} computes its logits in full: {reason}.")
        yield
        return
    model.loss_function = causal_lm_loss
    if not is_replaced(head):
        replace_forward(head, _run_head)
    token = _deferring_head.set(head)
    try:
        yield
    finally:
        _deferring_head.reset(token)


def deferring_head() -> nn.Module | None:
    """The output layer whose loss is being computed in chunks, inside `chunked_loss`."""
    return _deferring_head.get()


def remove_chunked_loss(model: PreTrainedModel) -> None:
    """Gives the model its own loss function and head back."""
    if model.__dict__.get("_loss_function") is causal_lm_loss:
        del model._loss_function
    head = model.get_output_embeddings()
    if head is not None:
        restore_forward(head)


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """
    transformers' `ForCausalLMLoss` with the same arguments and value, without logits of the whole sequence.

    One difference: if every label is ignored the loss is 0 with zero gradients, where the mean over nothing is NaN.
    """
    if not isinstance(logits, DeferredLogits):
        return ForCausalLMLoss(
            logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels=shift_labels, **kwargs
        )
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    # One by one from each module's own: this is how ZeRO-3 notices that they are used here, and gathers them.
    weights = [module._parameters[name] for module in logits.head_module.modules() for name in module._parameters]
    weights = [weight for weight in weights if weight is not None and weight.requires_grad]
    total, count = chunked_cross_entropy(
        logits.hidden, shift_labels, logits.logits_of, weights, vocab_size=vocab_size, ignore_index=ignore_index
    )
    items = count if num_items_in_batch is None else torch.as_tensor(num_items_in_batch, device=total.device)
    return total / items.clamp(min=1)


def _run_head(head: nn.Module, args: tuple, kwargs: dict[str, Any]):
    if _deferring_head.get() is not head:
        return inner_forward(head)(*args, **kwargs)
    hidden = args[0] if args else next(iter(kwargs.values()))
    dtype = autocast_dtype(hidden.device.type) or hidden.dtype
    return DeferredLogits(hidden, head, inner_forward(head), vocab_size=head.out_features, dtype=dtype)


def _why_not(model: PreTrainedModel, head: nn.Module | None, arguments: dict[str, Any]) -> str | None:
    keep = arguments.get("logits_to_keep")
    if head is None:
        return "it has no output layer"
    if not isinstance(getattr(head, "out_features", None), int):
        return f"its output layer is {type(head).__name__}, not a linear layer"
    if torch.is_tensor(keep) or keep:
        return f"logits_to_keep={keep!r} was given with labels"
    if model.loss_function not in (ForCausalLMLoss, causal_lm_loss):
        return f"its loss function is {getattr(model.loss_function, '__name__', model.loss_function)}"
    return None
