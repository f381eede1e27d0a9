"""
The loss that a model returns for its shard of a sequence: the mean over the group's labels, ready for backward.

This is for code that calls the model by itself. `sequence_parallel_loss`, which Trainer calls, asks it for the mean over its
own labels, because other packages put forwards of their own over the model's, with losses of their own.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

from .global_loss import IGNORED, combines_losses, global_mean
from .instance_forward import parameter_names

_FACTOR = "_fpdt_gradient_factor"


def give_group_loss(model: nn.Module, gradient_factor: float) -> None:
    """From now on. To be called of a model with a group, in a run whose engine needs this factor, as in `global_mean`."""
    model.__dict__[_FACTOR] = gradient_factor


def gives_group_loss(model: nn.Module) -> bool:
    return _FACTOR in model.__dict__


def give_own_loss(model: nn.Module) -> None:
    """Undoes `give_group_loss`."""
    model.__dict__.pop(_FACTOR, None)


def check_targets(model: nn.Module, arguments: dict[str, Any]) -> None:
    """
    Raises:
        ValueError: for a call with a shard that could only return the loss of something else.
    """
    if not gives_group_loss(model) or arguments.get("shift_labels") is None:
        return
    name = type(model).__name__
    if not model.training:
        raise ValueError(
            f"{name}: shift_labels were given in evaluation, which takes whole sequences, each process its own, and its loader "
            "gives parts of them. Prepare the loader for evaluation in a call without the model, "
            "Accelerator.prepare(dataloader), and give labels."
        )
    if arguments.get("num_items_in_batch") is not None:
        raise ValueError(
            f"{name}: num_items_in_batch was given with shift_labels in a sequence-parallel group, whose loss is the mean over "
            "the labels of all its processes. Leave num_items_in_batch out."
        )
    if arguments.get("labels") is not None and not combines_losses():
        raise ValueError(
            f"{name}: labels were given with shift_labels in a sequence-parallel group: the loss would be that of this "
            "process's part. Leave labels out, then model(**batch).loss is the group's. A deepspeed_sp_compute_loss that was "
            "imported by name is transformers' own: take transformers.trainer.deepspeed_sp_compute_loss after "
            "Accelerator.prepare."
        )


def with_group_loss(model: nn.Module, arguments: dict[str, Any], sp_group: Any, call: Callable[[dict[str, Any]], Any]) -> Any:
    """`call(arguments)`, its loss that of the group if the model gives that. Collective in the group."""
    targets = arguments.get("shift_labels")
    if not gives_group_loss(model) or targets is None or combines_losses() or "labels" not in parameter_names(type(model)):
        return call(arguments)
    output = call({**arguments, "labels": targets})  # models compute no loss without
    as_tuple = isinstance(output, tuple)
    loss = output[0] if as_tuple else output.loss
    loss = global_mean(loss, (targets != IGNORED).sum(), sp_group, gradient_factor=model.__dict__[_FACTOR])
    if as_tuple:
        return (loss, *output[1:])
    output.loss = loss
    return output
