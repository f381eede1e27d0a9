"""What the backward needs as the forward left it and cannot put back: checked, so that a gradient is right or refused."""

from torch import Tensor


def version_of(tensor: Tensor) -> int | None:
    """
    A number that every in-place change of the tensor raises, be it through a view or a detached alias. None for an inference
    tensor, which does not count them.
    """
    return None if tensor.is_inference() else tensor._version
