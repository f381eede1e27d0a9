"""
What the processes of a sequence-parallel group must have in common: asked before anything is exchanged that would otherwise
wait for ever, or mix tokens of different batches.
"""

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist


def check_same(group: dist.ProcessGroup | None, what: str, value: Any, advice: str) -> None:
    """
    Collective in the group. Nothing for None.

    Raises:
        ValueError: on every rank, if the values differ: the value of each, and the advice.
    """
    if group is None:
        return
    values = _gathered(group, value)
    if any(other != values[0] for other in values):
        found = ", ".join(
            f"rank {rank}: {other}" for rank, other in zip(dist.get_process_group_ranks(group), values, strict=True)
        )
        raise ValueError(f"The processes of one sequence-parallel group differ in {what} ({found}). {advice}")


def least(group: dist.ProcessGroup | None, values: Sequence[int | None]) -> list[int | None]:
    """Collective in the group: for each place the smallest value of all ranks; None counts as no limit."""
    if group is None:
        return list(values)
    columns = zip(*_gathered(group, tuple(values)), strict=True)
    return [min((value for value in column if value is not None), default=None) for column in columns]


def _gathered(group: dist.ProcessGroup, value: Any) -> list[Any]:
    values = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values
