"""What the backward needs as the forward left it and cannot put back: checked, so that a gradient is right or refused."""

from torch import Tensor, nn


def version_of(tensor: Tensor) -> int | None:
    """
    A number that every in-place change of the tensor raises, be it through a view or a detached alias. None for an inference
    tensor, which does not count them.
    """
    return None if tensor.is_inference() else tensor._version


class UnchangedModule:
    """
    A module that runs again in the backward, as it is now.

    Args:
        module: with the parameters it was called with, trainable or frozen.
        name: what error messages call it.
    """

    def __init__(self, module: nn.Module, name: str):
        self._module, self._name = module, name
        self._weights = tuple(module.parameters())
        self._versions = tuple(map(version_of, self._weights))

    def check(self) -> None:
        """
        Raises:
            RuntimeError: if it was changed since.
        """
        versions = tuple(map(version_of, self._weights))
        if versions != self._versions:
            changed = [w for w, now, then in zip(self._weights, versions, self._versions, strict=True) if now != then]
            names = [name for name, weight in self._module.named_parameters() if any(weight is other for other in changed)]
            raise RuntimeError(
                f"{self._name}: a weight was changed in place ({', '.join(names)}) between the forward and the backward, which "
                "runs the layer again. Call backward() before optimizer.step() or any other update."
            )
