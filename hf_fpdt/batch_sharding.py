"""
One rank's shard of a batch of whole sequences: what needs a neighbour is done on the whole sequence first, then it is padded,
permuted and cut.

    labels -> shift_labels      position_ids, if there are none      right padding of attention_mask -> labels of -100
    pad on the right to the layout's length                          keep the layout's positions of the rank

Under causal attention no token sees what is to its right, so padding there changes no token before it, and needs no mask.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .input_checks import PACKING
from .sequence_layout import SequenceLayout

_IGNORED = -100
_PACKING = (*PACKING, "max_length_q", "max_length_k")


def shard_batch(
    batch: Mapping[str, Any], layout_of: Callable[..., SequenceLayout], rank: int, *, pad_token_id: int = 0
) -> dict[str, Any]:
    """
    The batch is not changed. All ranks give the same batch and get shards of the same shapes.

    Args:
        batch: with `input_ids` `[batch, seq_len]` or `inputs_embeds` `[batch, seq_len, hidden]`. Tensors of shape
            `[batch, seq_len, ...]`, `[1, seq_len, ...]` or `[seq_len]` are cut; everything else is passed on as it is.
        layout_of: called as `layout_of(seq_len, batch_size=batch)`.
        rank: of this process in the sequence-parallel group.
        pad_token_id: what `input_ids` are padded with. Padding of other tensors is 0.

    Returns:
        The batch without `attention_mask` and `labels`, with `position_ids` (`[1, local_len]` if there were none) and, if there
        were `labels` or `shift_labels`, `shift_labels` `[batch, local_len]`: the token after each, -100 where there is none.

    Raises:
        ValueError: for a batch that is no mapping or has no tokens, labels that are not one a token, padding other than on the
            right, packed documents, several positions a token.
    """
    tokens = _tokens(batch)
    batch_size, seq_len = tokens.shape[:2]
    layout = layout_of(seq_len, batch_size=batch_size)
    index = layout.positions(rank).to(tokens.device)
    values = dict(batch)
    valid = _valid_tokens(values.pop("attention_mask", None), tokens)
    targets = _targets(values.pop("labels", None), values.pop("shift_labels", None), valid, tokens)
    first_position = _first_position(values.pop("position_ids", None), valid, tokens)
    if targets is not None:
        values["shift_labels"] = targets
    fills = {"input_ids": pad_token_id, "shift_labels": _IGNORED}
    shard = {}
    for name, value in values.items():
        axis = _sequence_axis(value, batch_size, seq_len)
        if axis is not None:
            value = _padded(value, axis, layout.seq_len, fills.get(name, 0)).index_select(axis, index)
        shard[name] = value
    shard["position_ids"] = first_position + index
    return shard


def _tokens(batch: Mapping[str, Any]) -> Tensor:
    """`[batch, seq_len, ...]`"""
    if not isinstance(batch, Mapping):
        raise ValueError(
            f"Sequence parallelism: the data loader gave a {type(batch).__name__}; it needs a dict with input_ids or "
            "inputs_embeds. Let the collator return one."
        )
    tokens = batch.get("input_ids")
    tokens = batch.get("inputs_embeds") if tokens is None else tokens
    if tokens is None:
        raise ValueError(
            f"Sequence parallelism: a batch with {sorted(map(str, batch))} has neither input_ids nor inputs_embeds. Let the "
            "collator return one of them (remove_unused_columns may have dropped it)."
        )
    if tokens.ndim < 2 or 0 in tokens.shape[:2]:
        raise ValueError(
            f"Sequence parallelism: input of shape {list(tokens.shape)}; it needs [batch, seq_len] with at least one row, and "
            "one token a row. Leave empty batches out."
        )
    for packing in _PACKING:
        if batch.get(packing) is not None:
            raise ValueError(
                f"Sequence parallelism: {packing} was given, which asks for packed documents; hf_fpdt does not keep documents "
                "apart yet. Use one document a row (packing=False, padding_free=False)."
            )
    return tokens


def _valid_tokens(mask: Tensor | None, tokens: Tensor) -> Tensor | None:
    """True for tokens, False for the padding to their right: bool `[batch, seq_len]`. None if nothing is padded."""
    if mask is None:
        return None
    if not torch.is_tensor(mask) or mask.shape != tokens.shape[:2]:
        shape = list(mask.shape) if torch.is_tensor(mask) else type(mask).__name__
        raise ValueError(
            f"Sequence parallelism: attention_mask of shape {shape} was given; hf_fpdt takes no prepared mask, only "
            f"[batch, seq_len] = {list(tokens.shape[:2])}. Leave attention_mask out."
        )
    valid = mask != 0
    if (valid & (mask != 1)).any():
        raise ValueError(
            f"Sequence parallelism: attention_mask has values up to {mask.max().item()}, which asks for packed documents; "
            "hf_fpdt does not keep documents apart yet. Use one document a row (packing=False), with 1 for tokens and 0 for "
            "padding."
        )
    if (valid[:, 1:] & ~valid[:, :-1]).any():
        raise ValueError(
            f"Sequence parallelism: attention_mask marks {int((~valid).sum())} of {mask.numel()} positions as padding, some of "
            "them left of a token; hf_fpdt supports padding on the right only. Set the tokenizer's padding_side to "
            '"right", or use sequences of one length.'
        )
    return None if valid.all() else valid


def _targets(labels: Tensor | None, shift_labels: Tensor | None, valid: Tensor | None, tokens: Tensor) -> Tensor | None:
    """For every token the one to predict, -100 at the end and where either is padding: `[batch, seq_len]`."""
    name, given = ("labels", labels) if shift_labels is None else ("shift_labels", shift_labels)
    if given is None:
        return None
    if given.shape != tokens.shape[:2]:
        raise ValueError(
            f"Sequence parallelism: {name} of shape {list(given.shape)} were given; it needs one label a token, "
            f"[batch, seq_len] = {list(tokens.shape[:2])}. Only causal language models train with sp_size above 1."
        )
    targets = nn.functional.pad(labels[:, 1:], (0, 1), value=_IGNORED) if shift_labels is None else shift_labels
    if valid is None:
        return targets
    return targets.masked_fill(~(valid & nn.functional.pad(valid[:, 1:], (0, 1), value=True)), _IGNORED)


def _first_position(positions: Tensor | None, valid: Tensor | None, tokens: Tensor) -> Tensor:
    """What has to be added to a token's place in its row to get its position: `[batch or 1, 1]`, `[1]` for `[seq_len]`."""
    batch_size, seq_len = tokens.shape[:2]
    if positions is None:
        return torch.zeros(1, 1, dtype=torch.int64, device=tokens.device)
    if tuple(positions.shape) not in {(seq_len,), (1, seq_len), (batch_size, seq_len)}:
        raise ValueError(
            f"Sequence parallelism: position_ids of shape {list(positions.shape)} were given; hf_fpdt takes one position a "
            f"token, [batch, seq_len] = {[batch_size, seq_len]}. A model that needs several (as for images) runs with "
            'attn_implementation="sdpa" and sp_size 1.'
        )
    broken = positions.diff(dim=-1) != 1
    if valid is not None:
        broken = broken & valid[:, 1:]  # what a collator writes at padding is of no use
    breaks = int(broken.sum())
    if breaks:
        raise ValueError(
            f"Sequence parallelism: position_ids restart or jump {breaks} times, which asks for packed documents; hf_fpdt does "
            "not keep documents apart yet. Use one document a row (packing=False), or leave position_ids out."
        )
    return positions[..., :1]


def _sequence_axis(value: Any, batch_size: int, seq_len: int) -> int | None:
    """The dimension of a tensor that runs over the tokens of the batch, None if it has none."""
    if not torch.is_tensor(value):
        return None
    if value.ndim >= 2 and value.shape[1] == seq_len and value.shape[0] in (1, batch_size):
        return 1
    return 0 if tuple(value.shape) == (seq_len,) else None


def _padded(value: Tensor, axis: int, length: int, fill: int) -> Tensor:
    missing = length - value.shape[axis]
    if missing == 0:
        return value
    return torch.cat([value, value.new_full((*value.shape[:axis], missing, *value.shape[axis + 1 :]), fill)], axis)
