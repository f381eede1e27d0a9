"""What a model that shares its sequences with other processes cannot honour, refused before anything is exchanged."""

import zlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from .documents import Documents
from .group_agreement import check_same
from .head_exchange import HeadExchange
from .head_split import HeadSplit
from .sequence_layout import SequenceLayout

_BY_LENGTH = ("dynamic", "longrope")


def check_shardable(config: PretrainedConfig, sp_size: int) -> None:
    """
    Raises:
        ValueError: for attention heads that the group does not divide, and rotary embeddings that depend on the length.
    """
    heads = getattr(config, "num_attention_heads", None)
    if heads is not None:
        HeadSplit(heads, getattr(config, "num_key_value_heads", None) or heads, sp_size)
    kinds = set(_rope_types(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)))
    for kind in _BY_LENGTH:
        if kind in kinds:
            raise ValueError(
                f"rope_type={kind!r} takes its frequencies from the longest position that a process sees, and the {sp_size} "
                'processes of a sequence-parallel group see different ones. Use rope_type "yarn", "llama3" or "linear", or '
                "sp_size 1."
            )


def check_shard(
    model: PreTrainedModel,
    arguments: dict[str, Any],
    layout: SequenceLayout,
    exchange: HeadExchange,
    documents: Documents | None = None,
) -> None:
    """
    Whether a call with one process's shard of a sequence can be computed. Collective in the group.

    Args:
        documents: of the whole sequence, if it is packed.

    Raises:
        ValueError: on every process that sees it, for position_ids that are missing or are not those of its shard; on all, for
            shapes, settings or modes in which they differ.
    """
    positions = arguments.get("position_ids")
    problem = "no position_ids" if positions is None else _misplaced(positions, layout, exchange.rank, documents)
    advice = (
        "Every process of a sequence-parallel group calls the model with its shard of the same batch, as ShardedDataLoader or "
        "shard_batch makes it with the model's chunk_size."
    )
    mode = "with" if torch.is_grad_enabled() else "without"
    borders = None if documents is None else documents.borders()
    borders = borders and f"{len(borders) - 1} with checksum {zlib.crc32(str(borders).encode()):x}"
    asked = {"their batch": f"{layout}, {mode} gradients", "their documents": borders, "the fit of their position_ids": problem}
    check_same(exchange.group, asked, advice)
    if problem is not None:
        raise ValueError(f"{type(model).__name__}: got {problem} in a sequence-parallel group of {exchange.size}. {advice}")


def check_shard_labels(model: PreTrainedModel, arguments: dict[str, Any]) -> None:
    """
    Raises:
        ValueError: for labels that would be shifted within a shard.
    """
    if arguments.get("labels") is not None and arguments.get("shift_labels") is None:
        raise ValueError(
            f"{type(model).__name__}: labels were given without shift_labels in a sequence-parallel group: the label after the "
            "last token of a shard is on another process. ShardedDataLoader shifts them: Accelerator.prepare(model, optimizer, "
            "dataloader), in one call, makes it of the loader. shard_batch shifts the labels of one batch."
        )


def _misplaced(positions: torch.Tensor, layout: SequenceLayout, rank: int, documents: Documents | None) -> str | None:
    want = layout.positions(rank).to(positions.device)
    if positions.ndim > 2 or positions.shape[-1] != len(want):
        return f"position_ids of shape {list(positions.shape)} for a shard of {len(want)} tokens"
    wrong = positions.diff(dim=-1) != want.diff()
    if documents is not None:  # from one to the next positions may go anywhere
        wrong &= documents.numbers(layout.seq_len).to(want.device)[want].diff() == 0
    wrong = int(wrong.sum())
    return f"position_ids of which {wrong} are not where chunks of {layout.chunk_size} tokens have them" if wrong else None


def _rope_types(parameters: Any) -> Iterator[Any]:
    """Of one set of parameters, or of one for each kind of layer."""
    if isinstance(parameters, dict):
        yield parameters.get("rope_type", parameters.get("type"))
        for value in parameters.values():
            yield from _rope_types(value)
