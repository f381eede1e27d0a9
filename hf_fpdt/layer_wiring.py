"""What decoder layers and the final norm do in place of their own forward: they follow the pass that is running."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from .instance_forward import inner_forward, is_replaced, named_arguments, replace_forward
from .layer_chunk import LayerCall
from .streamed_pass import active_pass
from .token_stream import stream_tokens


def wire(model: PreTrainedModel, layers: list[nn.Module]) -> None:
    """Makes the layers and the final norm of a model follow the pass that is running; harmless if done before."""
    for layer in layers:
        if not is_replaced(layer):
            replace_forward(layer, _run_layer)
    for child in model.children():
        if type(child).__name__.endswith(("RMSNorm", "LayerNorm")) and not is_replaced(child):
            replace_forward(child, _run_norm)


def _run_layer(layer: nn.Module, args: tuple, kwargs: dict[str, Any]):
    running = active_pass()
    if running is None:
        return inner_forward(layer)(*args, **kwargs)
    if torch.compiler.is_compiling():
        _refuse_compilation(type(layer).__name__)
    arguments = named_arguments(layer, args, kwargs)
    hidden = arguments.pop("hidden_states")
    returned: list[int] = []

    def forward(x_chunk, **chunk_arguments):
        with without_checkpointing([layer]):
            result = inner_forward(layer)(x_chunk, **chunk_arguments)
        returned[:] = [len(result)] if isinstance(result, tuple) else []
        return result

    call = LayerCall(
        name=f"{type(layer).__name__} {_layer_index(layer)}",
        module=layer,
        forward=forward,
        arguments=partial(_arguments_of_chunk, arguments, running.local_len),
        spans=running.spans,
        store_spans=running.store_spans,
        segments=running.segments,
        exchange=running.exchange,
        kernel=running.kernel,
        placement=running.next_placement(),
        stream_kv=running.stream_kv,
        places=running.places,
    )
    weights = [weight for weight in layer.parameters() if weight.requires_grad]
    output = running.run(call, hidden, weights, kind=_kind(layer, arguments.get("attention_mask")))
    return (output, *[None] * (returned[0] - 1)) if returned else output


@torch.compiler.disable  # the compiler leaves it alone, so that it is this error that arrives
def _refuse_compilation(name: str) -> None:
    raise ValueError(
        f'torch.compile of {name} with attn_implementation="fpdt" is not supported: it runs chunk by chunk in Python. Compile '
        "the modules inside of it (layer.mlp.compile()), or none."
    )


def _run_norm(norm: nn.Module, args: tuple, kwargs: dict[str, Any]):
    running, forward = active_pass(), inner_forward(norm)
    if running is None or kwargs or len(args) != 1 or args[0].ndim != 3 or args[0].shape[1] != running.local_len:
        return forward(*args, **kwargs)
    return stream_tokens(norm, forward, args[0], running.spans, running.keep_last)


def _arguments_of_chunk(arguments: dict[str, Any], seq_len: int, span: tuple[int, int]) -> dict[str, Any]:
    return {name: _of_chunk(name, value, span, seq_len) for name, value in arguments.items()}


def _of_chunk(name: str, value: Any, span: tuple[int, int], seq_len: int) -> Any:
    """
    The part of an argument of a layer that belongs to a chunk: tensors with one entry a token are cut on that dimension, also
    in tuples, lists and dicts.
    """
    if isinstance(value, dict):
        return {key: _of_chunk(name, item, span, seq_len) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_of_chunk(name, item, span, seq_len) for item in value)
    if not torch.is_tensor(value):
        return value
    if value.requires_grad:
        raise ValueError(
            f'A decoder layer was called with {name}, a tensor that requires grad; with attn_implementation="fpdt" only the '
            "hidden states may. Detach it, or use another attn_implementation."
        )
    if value.ndim >= 2 and value.shape[1] == seq_len:
        return value[:, slice(*span)]
    if value.ndim == 1 and value.shape[0] == seq_len:
        return value[slice(*span)]
    if value.ndim == 4 and value.shape[2] == seq_len:  # as queries are: [batch, heads, tokens, dim]
        return value[:, :, slice(*span)]
    return value


@contextmanager
def without_checkpointing(layers: list[nn.Module]) -> Iterator[None]:
    """A streamed layer is its own activation checkpoint: transformers' would compute it twice."""
    flags = [layer.__dict__.get("gradient_checkpointing") for layer in layers]  # None: the class's own, which is False
    for layer in layers:
        layer.gradient_checkpointing = False
    try:
        yield
    finally:
        for layer, flag in zip(layers, flags, strict=True):
            if flag is None:
                del layer.gradient_checkpointing
            else:
                layer.gradient_checkpointing = flag


def causal_attention(layer: nn.Module) -> list[nn.Module]:
    """The causal attention modules of a layer."""
    return [m for m in layer.modules() if hasattr(m, "layer_idx") and getattr(m, "is_causal", False)]


def _layer_index(layer: nn.Module) -> int:
    return causal_attention(layer)[0].layer_idx


def _kind(layer: nn.Module, mask: Any) -> tuple:
    """Equal for layers of equal memory; `mask` may be a layer's window."""
    mask = None if torch.is_tensor(mask) else mask
    return type(layer), mask, *((weight.shape, weight.dtype, weight.requires_grad) for weight in layer.parameters())
