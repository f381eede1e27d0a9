"""
A data loader for a sequence-parallel group: every batch that a rank draws becomes one step of the whole group.

Upstream deals batches out to all ranks, so each rank of a group draws its own. In a round every rank draws one; then the group
works on them one after the other, in the order of ranks, each rank on its shard. Only the batch at work is sent around.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import accelerate
import torch
import torch.distributed as dist
from accelerate.data_loader import DataLoaderStateMixin
from accelerate.state import GradientState
from torch import Tensor
from torch.utils.data import IterableDataset

from .batch_sharding import shard_batch
from .sequence_layout import SequenceLayout


@dataclass(frozen=True)
class _TensorSlot:
    """Stands for a tensor in the header of a batch."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class _Turn:
    """
    A step to come: the batch that rank `member` has drawn. `tensors` are its tensors on that rank, None on the others. `state`
    is the wrapped loader's before this round, and `position` counts the batches of the round.
    """

    member: int
    header: Any
    tensors: list[Tensor] | None
    state: dict[str, Any] | None
    position: int


class ShardedDataLoader(DataLoaderStateMixin):
    """
    Stands in for DeepSpeed's `UlyssesSPDataLoaderAdapter`, with the same first five arguments. Gives shards as from
    `shard_batch`.

    Ranks may draw different batches, of any keys, shapes and dtypes, and different numbers of them: one that has none left
    takes part in the steps on the others' batches. All ranks of the group have to iterate together; no other rank takes part.
    Attributes that it does not have (`dataset`, `sampler`, `batch_sampler`, `set_epoch`, ...) are those of the wrapped loader.

    A rank draws the next batch before the last step of a round, so that accelerate's `end_of_dataloader` is true in the last
    step of an epoch and not before.

    Args:
        dl (`Iterable`): the loader to wrap, as prepared by accelerate or not. It gives dicts with `input_ids`.
        sp_rank (`int`): of this process in the group.
        sp_group (`ProcessGroup`): the ranks that share a sequence.
        sp_world_size (`int`): their number.
        device (`torch.device`, `str` or `int`): where the shards are put; the model's.
        chunk_size (`int` or `"auto"`, *optional*, defaults to `"auto"`): `FPDTConfig.chunk_size`, the same as the model's.
        pad_token_id (`int`, *optional*, defaults to 0): fills `input_ids` up to a length that the group divides.

    Iterating raises `ValueError`, on all ranks of the group, for a batch that `shard_batch` refuses.
    """

    def __init__(
        self,
        dl: Iterable[Any],
        sp_rank: int,
        sp_group: dist.ProcessGroup,
        sp_world_size: int,
        device: torch.device | str | int,
        *,
        chunk_size: int | str = "auto",
        pad_token_id: int = 0,
    ):
        self.dl, self.device = dl, torch.device(device)
        self.sp_rank, self.sp_group, self.sp_world_size = sp_rank, sp_group, sp_world_size
        self.chunk_size, self.pad_token_id = chunk_size, pad_token_id
        self.gradient_state = GradientState()
        self._num_skipped = 0  # steps left out at the start of every epoch
        self._resume_at = None  # steps of the first round left out in the next epoch, after load_state_dict
        self._state = None  # after the latest step of an epoch; between epochs it is the wrapped loader's

    def __len__(self) -> int:
        """Steps of an epoch, taking the loaders of the group's other ranks to be as long as this one."""
        return max(len(self.dl) * self.sp_world_size - self._num_skipped, 0)

    def __getattr__(self, name: str) -> Any:
        # `dl` is not there yet in a copy that is being made; the other two are here as properties, which refused.
        if name in ("dl", "state_dict", "load_state_dict"):
            raise AttributeError(f"{type(self).__name__} has no {name}")
        return getattr(self.dl, name)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        num_skipped = self._num_skipped if self._resume_at is None else self._resume_at
        self._resume_at = None
        turns = islice(self._turns(), num_skipped, None)
        turn = next(turns, None)
        # After the wrapped loader has announced itself, because accelerate asks the last one that did.
        self.begin()
        self.remainder = 0  # no sample of the last batch is a repeated one that a metric must leave out: shards are no samples
        try:
            while turn is not None:
                shard = self._shard(turn)
                next_turn = next(turns, None)
                self.end_of_dataloader = next_turn is None
                self._state = {"dl": turn.state, "position": turn.position + 1}
                yield shard
                turn = next_turn
            self._state = None
        finally:
            self.end()

    @property
    def state_dict(self) -> Callable[[], dict[str, Any]]:
        """If the wrapped loader has a state: a method for the point after the latest step, within a round as well."""
        self._require_state()
        return self._save

    @property
    def load_state_dict(self) -> Callable[[dict[str, Any]], None]:
        """If the wrapped loader has a state: a method that makes the next epoch go on from one."""
        self._require_state()
        return self._load

    def _require_state(self) -> None:
        if not _has_state(self.dl):
            raise AttributeError(f"{type(self.dl).__name__} has no state")

    def _save(self) -> dict[str, Any]:
        return {"dl": self.dl.state_dict(), "position": 0} if self._state is None else self._state

    def _load(self, state: dict[str, Any]) -> None:
        self.dl.load_state_dict(state["dl"])
        self._resume_at = state["position"]
        self._state = state

    def _turns(self) -> Iterator[_Turn]:
        """All steps of an epoch. Collective: the group's ranks tell each other what they have drawn, once a round."""
        batches = iter(self.dl)
        ended = False
        while True:
            state = self.dl.state_dict() if _has_state(self.dl) else None
            header, tensors = None, []
            if not ended:
                try:
                    header = _replace(next(batches), Tensor, partial(_take, tensors))
                except StopIteration:
                    ended = True
            headers = self._gather((ended, header))
            members = [member for member, (has_ended, _) in enumerate(headers) if not has_ended]
            if not members:
                return
            for position, member in enumerate(members):
                own = tensors if member == self.sp_rank else None
                yield _Turn(member, headers[member][1], own, state, position)

    def _shard(self, turn: _Turn) -> dict[str, Any]:
        """This rank's shard of a batch. Collective: the rank that has it sends it."""
        device = self._exchange_device()
        own = None if turn.tensors is None else iter(turn.tensors)

        def fill(slot: _TensorSlot) -> Tensor:
            if own is None:
                tensor = torch.empty(slot.shape, dtype=slot.dtype, device=device)
            else:
                tensor = next(own).detach().to(device).contiguous()
            if tensor.numel():  # as bytes: backends know few dtypes
                dist.broadcast(tensor.view(-1).view(torch.uint8), group=self.sp_group, group_src=turn.member)
            return tensor

        layout_of = partial(
            SequenceLayout.of, setting=self.chunk_size, device_type=self.device.type, sp_size=self.sp_world_size
        )
        shard = shard_batch(_replace(turn.header, _TensorSlot, fill), layout_of, self.sp_rank, pad_token_id=self.pad_token_id)
        return _replace(shard, Tensor, lambda tensor: tensor.to(self.device))

    def _exchange_device(self) -> torch.device:
        """The loader's device if the group has a backend for it other than gloo, else the CPU."""
        backends = dict(entry.split(":") for entry in dist.get_backend_config(self.sp_group).split(","))
        return self.device if backends.get(self.device.type, "gloo") != "gloo" else torch.device("cpu")

    def _gather(self, value: Any) -> list[Any]:
        """The group's values, in the order of ranks. Collective."""
        values = [None] * self.sp_world_size
        dist.all_gather_object(values, value, group=self.sp_group)
        return values

    def _without_first(self, num_steps: int) -> "ShardedDataLoader":
        """For `skip_first_batches`. Collective. Whole rounds are skipped in the wrapped loaders if all can do it."""
        num_steps += self._num_skipped
        lengths = self._gather(_length(self.dl))
        rest = copy(self)
        if None not in lengths:
            skipped = [min(num_steps // self.sp_world_size, length) for length in lengths]
            num_steps -= sum(skipped)
            rest.dl = accelerate.skip_first_batches(self.dl, skipped[self.sp_rank])
        rest._num_skipped = num_steps
        return rest


def skip_first_batches(dataloader: Iterable[Any], num_batches: int = 0) -> Iterable[Any]:
    """
    accelerate's function of this name, for any loader: one that begins `num_batches` later.

    Of a `ShardedDataLoader` these are steps, any number of them, and all ranks of the group have to call it. Batches of a
    loader without a dataset that has an index and a length, or with a state, are drawn and dropped.
    """
    if isinstance(dataloader, ShardedDataLoader):
        return dataloader._without_first(num_batches)
    return accelerate.skip_first_batches(dataloader, num_batches)


def _has_state(loader: Any) -> bool:
    # accelerate's loaders have a method in any case, which fails if the one that they wrap has none.
    return hasattr(getattr(loader, "base_dataloader", loader), "state_dict")


def _length(loader: Any) -> int | None:
    """None if there is none, if it is only what an iterable dataset claims, or if accelerate cannot skip batches of it."""
    dataset = getattr(loader, "dataset", None)
    if dataset is None or isinstance(dataset, IterableDataset) or _has_state(loader):
        return None
    try:
        return len(loader)
    except TypeError:
        return None


def _replace(value: Any, kind: type, function: Callable[[Any], Any]) -> Any:
    """The value with `function(x)` for every `x` of that kind, in order, in dicts, lists and tuples."""
    if isinstance(value, kind):
        return function(value)
    if isinstance(value, Mapping):
        return {key: _replace(item, kind, function) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_replace(item, kind, function) for item in value)
    return value


def _take(tensors: list[Tensor], tensor: Tensor) -> _TensorSlot:
    tensors.append(tensor)
    return _TensorSlot(tuple(tensor.shape), tensor.dtype)
