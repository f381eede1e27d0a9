"""
Logits that are computed only if somebody looks at them.

When a causal LM is called with labels, the loss needs no logits of the whole sequence, but the model's forward still passes
"logits" from its head through scaling or softcapping into the loss function and the output. `DeferredLogits` is what it
passes: a tensor with shape, dtype and device but without data, which remembers the head's input and the elementwise operations
done to it. The loss replays them chunk by chunk; any other use computes the logits in full, with their gradient.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers.utils import logging

from .run_state import AutocastState

logger = logging.get_logger(__name__)

_ELEMENTWISE = {
    torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__, torch.mul,
    torch.Tensor.div, torch.Tensor.__truediv__, torch.div, torch.true_divide,
    torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__, torch.add,
    torch.Tensor.sub, torch.Tensor.__sub__, torch.sub,
    torch.Tensor.tanh, torch.tanh, torch.Tensor.neg, torch.neg,
    torch.Tensor.clone, torch.clone, torch.Tensor.detach, torch.Tensor.contiguous,
    torch.Tensor.float, torch.Tensor.to, torch.Tensor.half, torch.Tensor.bfloat16,
}  # fmt: skip
_METADATA = {
    torch.Tensor.shape.__get__, torch.Tensor.dtype.__get__, torch.Tensor.device.__get__, torch.Tensor.layout.__get__,
    torch.Tensor.requires_grad.__get__, torch.Tensor.is_leaf.__get__, torch.Tensor.grad_fn.__get__,
    torch.Tensor.is_cuda.__get__, torch.Tensor.ndim.__get__, torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel,
    torch.Tensor.element_size,
    torch.Tensor.is_floating_point, torch.is_floating_point, torch.Tensor.__len__,
}  # fmt: skip


class DeferredLogits(torch.Tensor):
    """
    `steps(head(hidden))`, not computed yet.

    Args:
        hidden: `[batch, seq_len, hidden]`, the head's input.
        head_module: the output layer, which owns the parameters.
        head: its forward, `[..., hidden] -> [..., vocab_size]`.
        steps: elementwise functions applied to the head's output, in order.
        vocab_size: columns of the head's output.
        dtype: dtype of the result.
    """

    hidden: Tensor
    head_module: nn.Module
    head: Callable[[Tensor], Tensor]
    steps: tuple[Callable[[Tensor], Tensor], ...]

    @staticmethod
    def __new__(cls, hidden, head_module, head, *, vocab_size: int, dtype: torch.dtype, steps=()):
        shape = (*hidden.shape[:-1], vocab_size)
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=hidden.device)
        self.hidden, self.head_module, self.head, self.steps = hidden, head_module, head, steps
        self.called_with = (torch.is_grad_enabled(), AutocastState(hidden.device.type), _versions(head_module))
        return self

    def logits_of(self, hidden: Tensor) -> Tensor:
        """Logits of some positions: `[..., hidden] -> [..., vocab_size]`."""
        logits = self.head(hidden)
        for step in self.steps:
            logits = step(logits)
        return logits

    def materialize(self) -> Tensor:
        """The logits of every position, as a plain tensor with its gradient, as the call would have computed them."""
        grad_enabled, autocast, versions = self.called_with
        if versions != _versions(self.head_module):
            raise RuntimeError(
                "The output's logits are computed when they are read, and the output layer's weights were changed since the "
                "call. Read the logits before optimizer.step(), or call the model without labels."
            )
        logger.warning_once(
            "hf_fpdt: the output's logits were used after a call with labels, so all %s of them are computed (%.2f GiB). "
            "Read only the loss to avoid this; in Trainer, do without compute_metrics or set prediction_loss_only=True.",
            "x".join(str(size) for size in self.shape),
            self.numel() * self.element_size() / 2**30,
        )
        with torch.set_grad_enabled(grad_enabled), autocast.context():
            return self.logits_of(self.hidden)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _ELEMENTWISE:
            deferred = _record(func, args, kwargs)
            if deferred is not None:
                return deferred
        if args and isinstance(args[0], DeferredLogits) and _writes(func):
            raise ValueError(
                f"{func.__name__} changes the logits of a call with labels in place; with attn_implementation='fpdt' they are "
                "not computed yet. Use a form that returns a new tensor (logits = logits * 2, torch.where), or call the model "
                "without labels."
            )
        args, kwargs = tree_map_only(DeferredLogits, DeferredLogits.materialize, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(DeferredLogits, DeferredLogits.materialize, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self, **_):
        return f"DeferredLogits(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __deepcopy__(self, memo):
        return self.materialize().detach().clone()

    def __reduce_ex__(self, protocol):
        return self.materialize().__reduce_ex__(protocol)


def _record(func, args, kwargs) -> DeferredLogits | None:
    """The logits with one more step, or None if the step is not elementwise with scalars or could not be replayed."""
    position = next((i for i, value in enumerate(args) if isinstance(value, DeferredLogits)), None)
    if position is None:  # given by keyword
        return None
    logits, rest = args[position], args[:position] + args[position + 1 :]
    scalars = (*rest, *kwargs.values())
    if any(_is_array(value) for value in scalars):
        return None
    if func is torch.Tensor.to and not all(isinstance(value, torch.dtype | bool) for value in scalars):
        return None

    def step(tensor: Tensor) -> Tensor:
        return func(*rest[:position], tensor, *rest[position:], **kwargs)

    dtype = step(torch.empty(0, dtype=logits.dtype, device=logits.device)).dtype
    # What is detached without gradients has none to lose: in the hooks by which ZeRO-3 passes every module's output on.
    steps = logits.steps if func is torch.Tensor.detach and not torch.is_grad_enabled() else (*logits.steps, step)
    size = logits.shape[-1]
    deferred = DeferredLogits(logits.hidden, logits.head_module, logits.head, vocab_size=size, dtype=dtype, steps=steps)
    deferred.called_with = logits.called_with
    return deferred


def _writes(func) -> bool:
    name = getattr(func, "__name__", "")
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def _versions(module: nn.Module) -> list[int]:
    return [] if torch.is_inference_mode_enabled() else [w._version for w in module.parameters() if not w.is_inference()]


def _is_array(value) -> bool:
    return isinstance(value, torch.Tensor) and (value.ndim > 0 or value.requires_grad)
