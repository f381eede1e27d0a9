"""What the backward needs as the forward left it and cannot put back: checked, so that a gradient is right or refused."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


def version_of(tensor: Tensor) -> int | None:
    """
    A number that every in-place change of the tensor raises, be it through a view or a detached alias. None for an inference
    tensor, which does not count them.
    """
    return None if tensor.is_inference() else tensor._version


def changed_error(shape: Sequence[int]) -> RuntimeError:
    """For a tensor of this shape that is not what the forward left."""
    return RuntimeError(
        f"A tensor of shape {list(shape)} that a streamed layer needs in its backward was changed in place after the layer "
        "ran. Replace the in-place operation on the layer's input or output."
    )


def spent_error(name: str) -> RuntimeError:
    """For a backward that finds what it needs given back."""
    return RuntimeError(
        f"{name}: backward through a streamed layer a second time. What it saved was released by the first backward; "
        "retain_graph=True is not supported with attn_implementation='fpdt'."
    )


class UnchangedModule:
    """
    A module that runs again in the backward, as it is now.

    Args:
        module: with the parameters it was called with, trainable or frozen.
        name: what error messages call it.
    """

    def __init__(self, module: nn.Module, name: str):
        self.module, self.name = module, name
        self._weights = tuple(module.parameters())
        self._versions = tuple(map(version_of, self._weights))
        self._switches = _switches(module)

    def check(self) -> None:
        """
        Raises:
            RuntimeError: if it was changed since.
        """
        versions = tuple(map(version_of, self._weights))
        if versions != self._versions:
            changed = [w for w, now, then in zip(self._weights, versions, self._versions, strict=True) if now != then]
            names = [name for name, weight in self.module.named_parameters() if any(weight is other for other in changed)]
            raise RuntimeError(
                f"{self.name}: a weight was changed in place ({', '.join(names)}) between the forward and the backward, which "
                "runs the layer again. Call backward() before optimizer.step() or any other update."
            )
        switches = _switches(self.module)
        if switches != self._switches:
            what = _first_switched(self.module, self._switches, switches)
            raise RuntimeError(
                f"{self.name}: {what} between the forward and the backward, which runs the layer again. "
                "Call backward() before train(), eval(), set_attn_implementation() or a change of adapters."
            )


def _switches(module: nn.Module) -> tuple[tuple, ...]:
    """Of every module inside: `training`, and what transformers' modules and PEFT's adapters read at every call."""
    return tuple(
        (m.training, getattr(m.__dict__.get("config"), "_attn_implementation", None), _adapters_on(m.__dict__))
        for m in module.modules()
    )


def _adapters_on(attributes: dict[str, Any]) -> tuple[str, ...]:
    """The names of the adapters that a module of PEFT uses. They are merged into weights unseen by these' versions."""
    names, merged = attributes.get("_active_adapter", ()), attributes.get("merged_adapters", ())
    names = (names,) if isinstance(names, str) else tuple(names)
    return (*(() if attributes.get("_disable_adapters", False) else names), *(f"{name} (merged)" for name in merged))


def _first_switched(module: nn.Module, before: tuple, after: tuple) -> str:
    if len(before) != len(after):
        return "modules were added or removed"
    names = [name or "the module" for name, _ in module.named_modules()]
    name, then, now = next(change for change in zip(names, before, after, strict=True) if change[1] != change[2])
    if then[0] != now[0]:
        return f"{name} was switched from training={then[0]} to training={now[0]}"
    if then[2] != now[2]:
        return f"{name} was switched from adapters={list(then[2])} to {list(now[2])}"
    return f"{name} was switched from attn_implementation={then[1]!r} to {now[1]!r}"
