"""
What the processes of a sequence-parallel group must have in common: asked before anything is exchanged that would otherwise
wait for ever, or mix tokens of different batches.
"""

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist


def check_same(group: dist.ProcessGroup | None, values: dict[str, Any], advice: str) -> None:
    """
    Collective in the group, once for all the values, by what they are. Nothing for None.

    Raises:
        ValueError: on every rank, for the first that differs: the value of each, and the advice.
    """
    if group is None:
        return
    of_ranks = _gathered(group, values)
    for what, own in values.items():
        if any(other[what] != own for other in of_ranks):
            ranks = zip(dist.get_process_group_ranks(group), of_ranks, strict=True)
            found = ", ".join(f"rank {rank}: {other[what]}" for rank, other in ranks)
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
