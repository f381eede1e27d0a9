"""Tells the models that stream what Trainer's optimizer will keep, before its first step."""

from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback

from .optimizer_states import expect, states_per_byte
from .work import works_in


class ExpectsOptimizer(TrainerCallback):
    """
    Has the plan keep free what the optimizer of this training takes, where `FPDTConfig(optimizer_memory="auto")`. Trainer
    adds it by itself. Optimizers that an engine has in its place (DeepSpeed's are none of torch) are left alone.
    """

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper has it inside
        found = [] if model is None else works_in(model)
        ratio = states_per_byte(inner) if found and _steps_all(inner, model) else None
        for streamed, _ in found:
            expect(streamed, ratio)


def _steps_all(optimizer: Any, model: nn.Module) -> bool:
    """Whether it has every trained weight: some stand for others, one a layer, that step in the backward."""
    if not isinstance(optimizer, Optimizer):
        return False
    its = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    return its >= {id(weight) for weight in model.parameters() if weight.requires_grad}
