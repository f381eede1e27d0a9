"""
One rank's shard of a batch of whole sequences: what needs a neighbour is done on the whole sequence first, then it is padded,
permuted and cut.

    labels -> shift_labels      position_ids, if there are none      right padding of attention_mask -> labels of -100
    documents -> cu_seq_lens of the whole sequence
    pad on the right to the layout's length                          keep the layout's positions of the rank

Under causal attention no token sees what is to its right, so padding there changes no token before it, and needs no mask.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .documents import documents_of
from .input_checks import PACKING
from .sequence_layout import SequenceLayout

_IGNORED = -100
_LENGTHS = ("max_length_q", "max_length_k")


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
        Packed documents (a row of them) are told by `cu_seq_lens_q` and `cu_seq_lens_k` of the whole sequence.

    Raises:
        ValueError: for a batch that is no mapping or has no tokens, labels that are not one a token, padding other than on the
            right, packed documents in several rows, several positions a token.
    """
    tokens = _tokens(batch)
    batch_size, seq_len = tokens.shape[:2]
    layout = layout_of(seq_len, batch_size=batch_size)
    index = layout.positions(rank).to(tokens.device)
    values = dict(batch)
    valid = _valid_tokens(values.pop("attention_mask", None), tokens)
    targets = _targets(values.pop("labels", None), values.pop("shift_labels", None), valid, tokens)
    packing = {name: values.pop(name, None) for name in (*PACKING, *_LENGTHS)}
    positions = _positions(values.pop("position_ids", None), tokens)
    borders = _borders(packing | {"position_ids": positions}, valid, tokens)
    if targets is not None:
        values["shift_labels"] = targets
    fills = {"input_ids": pad_token_id, "shift_labels": _IGNORED}
    shard = {}
    for name, value in values.items():
        axis = _sequence_axis(value, batch_size, seq_len)
        if axis is not None:
            value = _padded(value, axis, layout.seq_len, fills.get(name, 0)).index_select(axis, index)
        shard[name] = value
    shard["position_ids"] = _continued(positions, valid, layout.seq_len)[..., index]
    if borders is not None:
        shard["cu_seq_lens_q"] = shard["cu_seq_lens_k"] = torch.tensor(borders, dtype=torch.int32, device=tokens.device)
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
            f"Sequence parallelism: attention_mask has values up to {mask.max().item()}; 1 is a token and 0 is padding. Tell "
            "packed documents by position_ids that start anew, seq_idx or cu_seq_lens_q."
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


def _positions(positions: Tensor | None, tokens: Tensor) -> Tensor:
    """`[batch or 1, seq_len]`; 0 to the end if none were given."""
    batch_size, seq_len = tokens.shape[:2]
    if positions is None:
        return torch.arange(seq_len, device=tokens.device)[None]
    if tuple(positions.shape) not in {(seq_len,), (1, seq_len), (batch_size, seq_len)}:
        raise ValueError(
            f"Sequence parallelism: position_ids of shape {list(positions.shape)} were given; hf_fpdt takes one position a "
            f"token, [batch, seq_len] = {[batch_size, seq_len]}. A model that needs several (as for images) runs with "
            'attn_implementation="sdpa" and sp_size 1.'
        )
    return positions if positions.ndim == 2 else positions[None]


def _continued(positions: Tensor, valid: Tensor | None, seq_len: int) -> Tensor:
    """`[batch or 1, seq_len]`: behind the tokens they go on by one, whatever a collator wrote there."""
    given, place = positions.shape[1], torch.arange(seq_len, device=positions.device)
    if valid is None:
        ends = torch.full((positions.shape[0], 1), given - 1, device=positions.device)
    else:
        ends = (valid.sum(-1, keepdim=True) - 1).clamp(min=0)
        positions = positions.expand(len(valid), -1)
    last = positions.gather(1, ends)
    return torch.where(place > ends, last + place - ends, _padded(positions, 1, seq_len, 0))


def _borders(described: dict[str, Any], valid: Tensor | None, tokens: Tensor) -> list[int] | None:
    """`cu_seq_lens` of the documents; None if every row is one, but for padding on its right."""
    batch_size, seq_len = tokens.shape[:2]
    mask = None if valid is None else valid.long()
    documents = documents_of("Sequence parallelism", described | {"attention_mask": mask}, batch_size, seq_len)
    if documents is None or documents.most() <= 1:
        return None
    borders = documents.borders()
    if batch_size != 1 or borders is None:
        raise ValueError(
            f"Sequence parallelism: {batch_size} rows with packed documents were given (position_ids restart or jump, or "
            "seq_idx, cu_seq_lens_q); documents are kept apart in one row a batch. Flatten it (DataCollatorWithFlattening, "
            "padding_free=True), use per_device_train_batch_size=1, or one document a row (packing=False)."
        )
    return borders


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
