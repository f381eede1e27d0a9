"""What a streamed forward cannot honour, refused before anything runs: each with what was got, what is needed, and the knob."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")


def check_streamable(model: PreTrainedModel, arguments: dict[str, Any], tokens: Tensor, *, sharded: bool = False) -> None:
    """
    Args:
        model: the model that owns the decoder layers.
        arguments: arguments of its forward by name.
        tokens: its `input_ids` or `inputs_embeds`, `[batch, seq_len, ...]`.
        sharded: whether these are part of a sequence, whose positions have gaps.

    Raises:
        ValueError: for inputs without tokens, padding, packed documents, attention outputs, `nn.DataParallel`.
    """
    name = type(model).__name__
    weight = next(model.parameters(), None)
    if weight is not None and weight.is_cuda and tokens.is_cuda and weight.device != tokens.device:
        raise ValueError(
            f"{name} has weights on {weight.device} and got inputs on {tokens.device}; they must be on one GPU. "
            "nn.DataParallel, which Trainer uses for several visible GPUs in one process, cannot stream: start the script with "
            "`accelerate launch`, or set CUDA_VISIBLE_DEVICES to one GPU."
        )
    if arguments.get("output_attentions") or getattr(model.config, "output_attentions", False):
        raise ValueError(
            f'{name}: output_attentions=True needs the full attention matrix; attn_implementation="fpdt" never has it. '
            'Set output_attentions=False, or use attn_implementation="eager".'
        )
    if 0 in tokens.shape[:2]:
        raise ValueError(
            f"{name}: input of shape {list(tokens.shape)} has no tokens; it needs at least one row, and one token a row. Leave "
            "empty batches out."
        )
    _check_mask(name, arguments.get("attention_mask"), tokens)
    if not sharded:
        _check_positions(name, arguments.get("position_ids"))
    for packing in PACKING:
        if arguments.get(packing) is not None:
            raise ValueError(
                f'{name}: {packing} was given, which asks for packed documents; attn_implementation="fpdt" does not keep '
                "documents apart yet. Use one document a row (packing=False)."
            )


def _check_mask(name: str, mask: Tensor | None, tokens: Tensor) -> None:
    if mask is None:
        return
    if not torch.is_tensor(mask) or mask.ndim != 2:
        shape = list(mask.shape) if hasattr(mask, "shape") else type(mask).__name__
        raise ValueError(
            f'{name}: attention_mask of shape {shape} was given; attn_implementation="fpdt" takes no prepared mask, only '
            f"causal attention over [batch, seq_len] = {list(tokens.shape[:2])}. Leave attention_mask out."
        )
    padded = int((mask == 0).sum())
    if padded:
        raise ValueError(
            f'{name}: attention_mask marks {padded} of {mask.numel()} positions as padding; attn_implementation="fpdt" does '
            "not support padding yet. Use sequences of one length (group or cut them; per_device_train_batch_size=1 needs no "
            "padding), or right-pad, give the padding labels of -100 and leave attention_mask out, which under causal "
            "attention is the same."
        )


def _check_positions(name: str, positions: Tensor | None) -> None:
    if positions is None:
        return
    if positions.ndim > 2:
        raise ValueError(
            f"{name}: position_ids of shape {list(positions.shape)} were given (several positions a token, as for images); "
            'attn_implementation="fpdt" takes [batch, seq_len]. Use attn_implementation="sdpa" for this model.'
        )
    steps = positions.diff(dim=-1)
    breaks = int((steps != 1).sum())
    if breaks:
        raise ValueError(
            f"{name}: position_ids restart or jump {breaks} times, which asks for packed documents; "
            'attn_implementation="fpdt" does not keep documents apart yet. Use one document a row (packing=False), or leave '
            "position_ids out."
        )
