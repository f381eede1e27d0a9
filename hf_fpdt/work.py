"""What a model has done in training calls since it streams: integers, counted where the work is started."""

from dataclasses import dataclass, field

from torch import nn

_WORK = "_fpdt_work"


@dataclass
class Work:
    """
    Of one process; only ever grows.

    Args:
        tokens: that went through the layers, without padding that the model was told of.
        attention_flops: of attention over what its queries see, forward and backward, each once.
        kernels: names of the attention kernels, in order of their first use.
    """

    tokens: int = 0
    attention_flops: int = 0
    kernels: dict[str, None] = field(default_factory=dict)


def work_of(model: nn.Module) -> Work:
    """The work of the layers that belong to this model, counted from now on if it was not yet."""
    return model.__dict__.setdefault(_WORK, Work())


def works_in(module: nn.Module) -> list[tuple[nn.Module, Work]]:
    """The models inside, itself included, whose work is counted, with it; outer ones first."""
    return [(model, model.__dict__[_WORK]) for model in module.modules() if _WORK in model.__dict__]


def forget_work(model: nn.Module) -> None:
    """Nothing of this model is counted any more."""
    model.__dict__.pop(_WORK, None)
