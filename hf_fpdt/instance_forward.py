"""
Replacing the `forward` of one module instance: no class is changed, the replacement survives `copy.deepcopy` and pickling (the
copy's forward is bound to the copy) and can be undone.
"""

import inspect
from collections.abc import Callable
from functools import lru_cache
from types import MethodType
from typing import Any

from torch import nn

_INNER = "_fpdt_inner_forward"


def replace_forward(module: nn.Module, run: Callable[..., Any]) -> None:
    """
    From now on `module(*args, **kwargs)` is `run(module, args, kwargs)`. The old forward is `inner_forward(module)`, and
    `inspect.signature(module.forward)` still shows its parameters.
    """
    module.__dict__.setdefault(_INNER, module.__dict__.get("forward"))
    module.forward = _Forward(module, run)


def inner_forward(module: nn.Module) -> Callable[..., Any]:
    """The forward that was replaced."""
    inner = module.__dict__.get(_INNER)
    return inner if inner is not None else MethodType(type(module).forward, module)


def is_replaced(module: nn.Module) -> bool:
    return _INNER in module.__dict__


def restore_forward(module: nn.Module) -> None:
    """
    Undoes `replace_forward`, if it was done. A forward that somebody set over ours stays: theirs either does not call ours, or
    has it inside, where it passes every call on once the attention implementation is another one.
    """
    if not is_replaced(module):
        return
    inner = module.__dict__.pop(_INNER)
    if not isinstance(module.__dict__.get("forward"), _Forward):
        return
    if inner is None:
        module.__dict__.pop("forward", None)
    else:
        module.forward = inner


def named_arguments(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by parameter name, as the class's forward would see them; defaults are not filled in."""
    names = parameter_names(type(module))
    return {**dict(zip(names, args, strict=False)), **kwargs}


@lru_cache
def parameter_names(module_class: type) -> tuple[str, ...]:
    """Of its forward, without what `**kwargs` takes."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = list(inspect.signature(module_class.forward).parameters.values())[1:]  # without self
    return tuple(parameter.name for parameter in parameters if parameter.kind in kinds)


class _Forward:
    """
    `run` bound to a module. An object with attributes, for pickle would look a bound method up by name in the class; and
    without `__wrapped__`, along which accelerate unwraps a model's forward past this one.
    """

    def __init__(self, module: nn.Module, run: Callable[..., Any]):
        self._module, self._run = module, run

    def __call__(self, *args, **kwargs):
        return self._run(self._module, args, kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(MethodType(type(self._module).forward, self._module))
