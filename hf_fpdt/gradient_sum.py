"""Sums of parameter gradients over chunks."""

from collections.abc import Sequence

import torch
from torch import Tensor


class GradientSum:
    """
    Adds up one gradient per parameter over `num_chunks` chunks. 16-bit gradients are summed in fp32: in bfloat16 a sum of
    64 chunks loses what is below 1/256 of it at every addition. With one chunk nothing is copied.
    """

    def __init__(self, num_chunks: int):
        self._num_chunks = num_chunks
        self._sums: list[Tensor | None] | None = None
        self._dtypes: list[torch.dtype | None] = []

    def add(self, grads: Sequence[Tensor | None]) -> None:
        """Adds the gradients of one chunk; None for a parameter that the chunk did not use."""
        if self._num_chunks == 1:
            self._sums, self._dtypes = list(grads), [None if g is None else g.dtype for g in grads]
            return
        if self._sums is None:
            self._sums, self._dtypes = [None] * len(grads), [None] * len(grads)
        for index, grad in enumerate(grads):
            if grad is None:
                continue
            if self._sums[index] is None:
                wide = torch.promote_types(grad.dtype, torch.float32)
                self._sums[index], self._dtypes[index] = grad.to(wide, copy=True), grad.dtype
            else:
                self._sums[index] += grad

    def result(self, scale: Tensor | None = None) -> list[Tensor | None]:
        """
        The sums, in the dtype of the gradients that were added. `scale` is a 0-dim fp32 (fp64) factor, applied before the
        sums are rounded to that dtype. Call it once: the sums are scaled in place.
        """
        return [
            None if total is None else _scaled(total, scale).to(dtype)
            for total, dtype in zip(self._sums, self._dtypes, strict=True)
        ]


def _scaled(total: Tensor, scale: Tensor | None) -> Tensor:
    if scale is None:
        return total
    return total.to(torch.promote_types(total.dtype, scale.dtype)).mul_(scale)
