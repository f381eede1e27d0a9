"""What a streamed forward cannot honour, refused before anything runs: each with what was got, what is needed, and the knob."""

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from .documents import Documents, documents_of

PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")


def check_streamable(model: PreTrainedModel, arguments: dict[str, Any], tokens: Tensor, sp_size: int = 1) -> Documents | None:
    """
    Args:
        model: the model that owns the decoder layers.
        arguments: arguments of its forward by name.
        tokens: its `input_ids` or `inputs_embeds`, `[batch, seq_len, ...]`.
        sp_size: processes that share the sequences. These tokens are then a shard, and `cu_seq_lens_*` those of the whole.

    Returns:
        The documents that padding and packing make of the rows, None if every row is one.

    Raises:
        ValueError: for inputs without tokens, prepared masks, outputs of attention or routers, `nn.DataParallel`, and in a
            sequence-parallel group for a mask or `seq_idx` of a shard.
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
    if arguments.get("output_router_logits", getattr(model.config, "output_router_logits", False)):
        raise ValueError(
            f"{name}: output_router_logits=True asks for the routers' logits of whole layers, which "
            'attn_implementation="fpdt" does not have: the auxiliary loss would have no gradient. Set '
            'output_router_logits=False (no auxiliary loss), or use attn_implementation="sdpa".'
        )
    if 0 in tokens.shape[:2]:
        raise ValueError(
            f"{name}: input of shape {list(tokens.shape)} has no tokens; it needs at least one row, and one token a row. Leave "
            "empty batches out."
        )
    batch_size, seq_len = tokens.shape[:2]
    positions = arguments.get("position_ids")
    if positions is not None and positions.ndim > 2:
        raise ValueError(
            f"{name}: position_ids of shape {list(positions.shape)} were given (several positions a token, as for images); "
            'attn_implementation="fpdt" takes [batch, seq_len]. Use attn_implementation="sdpa" for this model.'
        )
    if sp_size == 1:
        return documents_of(name, arguments, batch_size, seq_len)
    given = {key: value for key, value in arguments.items() if key.startswith("cu_seq_lens_")}
    documents = documents_of(name, given, batch_size, seq_len * sp_size)
    rest = {key: value for key, value in arguments.items() if key in ("attention_mask", "seq_idx")}
    if documents_of(name, rest, batch_size, seq_len) is not None:
        asking = " and ".join(key for key, value in rest.items() if value is not None)
        raise ValueError(
            f"{name}: {asking} asks for padding or documents in a shard of a sequence, where only cu_seq_lens_q and "
            "cu_seq_lens_k of the whole sequence can. Let ShardedDataLoader or shard_batch make the shards: padding on the "
            "right becomes labels of -100."
        )
    return documents
