"""What transformers calls: the attention function and the mask function registered under the name "fpdt"."""

import sys
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from .layer_chunk import active_chunk
from .streamed_pass import active_pass

NAME = "fpdt"

# Arguments by which models ask for more than scaled causal attention, and what asks for them.
_UNSUPPORTED_FEATURES = {
    "softcap": "attention score softcapping",
    "s_aux": "attention sinks",
    "position_bias": "an additive attention bias",
}


def register() -> None:
    """Makes "fpdt" a valid `attn_implementation`."""
    AttentionInterface.register(NAME, fpdt_attention)
    AttentionMaskInterface.register(NAME, fpdt_mask)


def fpdt_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """
    The attention of every layer of a model with `attn_implementation="fpdt"`.

    Inside of a streamed layer it attends the active chunk to everything before it. Anywhere else (generation with a cache,
    a forward that returns one) it is transformers' SDPA attention.

    Args:
        query: `[batch, heads, queries, head_dim]`, after rotary embedding.
        key, value: `[batch, kv_heads, keys, dim]`, not repeated over the heads of a group.

    Returns:
        `out [batch, queries, heads, value_dim]`, and None for the attention weights.

    Raises:
        ValueError: for attention that is not plain scaled causal attention, naming the feature.
    """
    for name, feature in _UNSUPPORTED_FEATURES.items():
        if kwargs.get(name) is not None:
            raise ValueError(_unsupported(module, f"{feature} ({name})"))
    chunk = active_chunk()
    if chunk is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    if dropout:
        raise ValueError(
            f"{type(module).__name__}: attention_dropout={dropout} in training is not supported with "
            'attn_implementation="fpdt". Set config.attention_dropout = 0.0; dropout outside of attention works.'
        )
    if not getattr(module, "is_causal", True):
        raise ValueError(_unsupported(module, "bidirectional attention (is_causal=False)"))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    return chunk.attend(query, key, value, scale), None


def fpdt_mask(*args: Any, local_size: int | None = None, **kwargs: Any) -> Tensor | None:
    """
    Mask of a model with `attn_implementation="fpdt"`: none while the model streams (causality is built in, and inputs that
    would need more were refused), else that of SDPA.
    """
    streamed = active_pass()
    if streamed is None:
        return sdpa_mask(*args, local_size=local_size, **kwargs)
    if local_size is None and kwargs.get("mask_function", causal_mask_function) is not causal_mask_function:
        raise ValueError(
            "A mask other than the causal one was asked for (or_mask_function, and_mask_function or block_sequence_ids), which "
            'attn_implementation="fpdt" does not support. Use attn_implementation="sdpa" for this model.'
        )
    if local_size is not None and local_size < streamed.seq_len:
        raise ValueError(
            f"Sliding-window or chunked attention over {local_size} tokens is not supported with "
            f'attn_implementation="fpdt" for a sequence of {streamed.seq_len} tokens. Use sequences of at most '
            f'{local_size} tokens, set config.sliding_window = None, or use attn_implementation="sdpa".'
        )
    return None


def _unsupported(module: nn.Module, feature: str) -> str:
    return (
        f'{type(module).__name__}: {feature} is not supported with attn_implementation="fpdt". '
        'Use attn_implementation="eager" or "flex_attention" for this model.'
    )


def uses_attention_interface(model_class: type) -> bool:
    """Whether the code of this model class, or of one it derives from, takes attention from transformers' interface."""
    own = [base for base in model_class.__mro__ if issubclass(base, PreTrainedModel) and base is not PreTrainedModel]
    modules = (sys.modules.get(base.__module__) for base in own)
    return any("ALL_ATTENTION_FUNCTIONS" in vars(module) for module in modules if module is not None)
