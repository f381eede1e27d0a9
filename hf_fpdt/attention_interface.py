"""What transformers calls: the attention function and the mask function registered under the name "fpdt"."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from .attention_kernels import ScoreRule
from .layer_chunk import active_chunk
from .streamed_pass import active_pass

NAME = "fpdt"


@dataclass(frozen=True)
class SlidingWindow:
    """Goes through the model in place of a mask, from `fpdt_mask` to `fpdt_attention`. Tokens as `ScoreRule.window`."""

    tokens: int


def register() -> None:
    """Makes "fpdt" a valid `attn_implementation`."""
    AttentionInterface.register(NAME, fpdt_attention)
    AttentionMaskInterface.register(NAME, fpdt_mask)


def fpdt_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | SlidingWindow | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """
    The attention of every layer of a model with `attn_implementation="fpdt"`.

    Inside of a streamed layer it attends the active chunk to everything before it, or as far back as the layer's window.
    Anywhere else (generation with a cache, a forward that returns one) it is transformers' SDPA attention, or where that has
    not what the layer asks for, the definition.

    Args:
        query: `[batch, heads, queries, head_dim]`, after rotary embedding.
        key, value: `[batch, kv_heads, keys, dim]`, not repeated over the heads of a group.
        softcap: as in `ScoreRule`.
        s_aux: sinks, as in `Chunk.attend`.

    Returns:
        `out [batch, queries, heads, value_dim]`, and None for the attention weights.

    Raises:
        ValueError: for attention that is not plain scaled causal attention, naming the feature.
    """
    if kwargs.get("position_bias") is not None:
        raise ValueError(_unsupported(module, "an additive attention bias (position_bias)"))
    chunk = active_chunk()
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if chunk is None and (softcap is not None or s_aux is not None):
        return _masked_attention(query, key, value, attention_mask, ScoreRule(scale, softcap), s_aux, dropout), None
    if chunk is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    if dropout:
        raise ValueError(
            f"{type(module).__name__}: attention_dropout={dropout} in training is not supported with "
            'attn_implementation="fpdt". Set config.attention_dropout = 0.0; dropout outside of attention works.'
        )
    if torch.is_tensor(attention_mask):
        raise ValueError(_unsupported(module, "a mask that the layer makes (of keys that it chooses)"))
    if not getattr(module, "is_causal", True):
        raise ValueError(_unsupported(module, "bidirectional attention (is_causal=False)"))
    window = attention_mask.tokens if isinstance(attention_mask, SlidingWindow) else None
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    out = chunk.attend(query, key, value, ScoreRule(scale, softcap, window), s_aux)
    if (streamed := active_pass()) is not None:  # not where a chunk runs again, in the backward
        streamed.count_attention(chunk, query, value, window)
    return out, None


def _masked_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, rule: ScoreRule, sinks: Tensor | None, dropout: float
) -> Tensor:
    """With a cap on the scores or sinks, and SDPA's mask: None is causal for equally many queries and keys. Not streamed."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = (query @ key.transpose(2, 3)).float() * rule.scale
    if rule.softcap is not None:
        scores = rule.softcap * torch.tanh(scores / rule.softcap)
    if mask is None and query.shape[2] > 1:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        scores = torch.cat([scores, sinks.float().reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)], dim=-1)
    blind = scores.amax(-1, keepdim=True) == float("-inf")  # padding, which sees nothing
    weights = scores.softmax(-1).masked_fill(blind, 0.0)[..., : key.shape[2]]
    weights = nn.functional.dropout(weights, dropout).to(value.dtype)
    return (weights @ value).transpose(1, 2)


def fpdt_mask(*args: Any, local_size: int | None = None, **kwargs: Any) -> Tensor | SlidingWindow | None:
    """
    Mask of a model with `attn_implementation="fpdt"`: while the model streams none, or what tells a layer of its window
    (causality is built in, and inputs that would need more were refused), else that of SDPA.
    """
    streamed = active_pass()
    if streamed is None:
        return sdpa_mask(*args, local_size=local_size, **kwargs)
    mask_function = kwargs.get("mask_function", causal_mask_function)
    if local_size is None:
        known = mask_function is causal_mask_function
    else:
        known = _is_window(mask_function, local_size, streamed.seq_len)
    if not known:
        raise ValueError(
            "A mask other than a causal one or a sliding window was asked for (chunked attention, or_mask_function, "
            'and_mask_function or block_sequence_ids), which attn_implementation="fpdt" does not support for a sequence of '
            f'{streamed.seq_len} tokens. Use attn_implementation="sdpa" for this model.'
        )
    return None if local_size is None or local_size >= streamed.whole_len else SlidingWindow(local_size)


def _is_window(mask_function: Callable, window: int, seq_len: int) -> bool:
    """Whether it lets tokens see the `window` last ones; asked of every 16th, on the CPU: nobody waits."""
    places = {*range(0, seq_len, 16), 1, window - 1, window, window + 1, seq_len - 1}
    query = torch.tensor(sorted(place for place in places if 0 <= place < seq_len))[:, None]
    key = query + torch.tensor([-window - 1, -window, 1 - window, 2 - window, -1, 0, 1])
    key = key.clamp(0, seq_len - 1)
    none = torch.zeros_like(key)
    try:
        seen = mask_function(none, none, query.expand_as(key), key)
    except RuntimeError:  # it depends on more than positions, which is on a GPU
        return False
    return bool((seen == ((key <= query) & (key > query - window))).all())


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
