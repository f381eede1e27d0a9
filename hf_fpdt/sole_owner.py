"""
Whether a gradient belongs to the backward that receives it, so that its memory may be used again.

Autograd hands a gradient on by reference. Besides the node that receives it a hook, `retain_grad`, an output of
`torch.autograd.grad` or a second node may hold the same tensor, and must not see it change. Reference counts tell: those of a
gradient that nobody else holds are learnt from a small graph, so that they are right for this version of torch and Python.
"""

import sys
from functools import lru_cache

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def is_sole_owner(grad: Tensor) -> bool:
    """
    True if nobody but the calling `backward(ctx, grad)` holds the gradient. Call it there, directly and before anything else
    refers to the gradient, in a Function whose backward is `once_differentiable`.
    """
    unshared, counts = counts_of_unshared(), _counts(grad)
    return grad.is_contiguous() and grad._base is None and all(a <= b for a, b in zip(counts, unshared, strict=True))


def grad_x_like(grad_y: Tensor, x_chunk: Tensor, overwrite: bool) -> Tensor:
    """Memory for the gradient of the input that `x_chunk` is of: that of `grad_y`, if it may be overwritten and fits."""
    if overwrite and grad_y.dtype == x_chunk.dtype and grad_y.shape[2:] == x_chunk.shape[2:]:
        return grad_y
    return torch.empty_like(grad_y, dtype=x_chunk.dtype)


def _counts(grad: Tensor) -> tuple[int, int, int]:
    storage = grad.untyped_storage()
    return sys.getrefcount(grad), grad._use_count(), torch._C._storage_Use_Count(storage._cdata)


@lru_cache
def counts_of_unshared() -> tuple[int, int, int]:
    """Reference counts of a gradient nobody else holds. Runs a small graph: call it before a backward, not first inside one."""
    found = []

    class Passing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        @once_differentiable
        def backward(ctx, grad):
            found.append(_called_alike(grad))
            return grad.clone()

    with torch.enable_grad():
        x = torch.zeros(2, requires_grad=True)
        Passing.apply(Passing.apply(x)).backward(torch.ones(2))
    return found[1]  # the first is also held by the caller of backward


def _called_alike(grad: Tensor) -> tuple[int, int, int]:
    return _counts(grad)
