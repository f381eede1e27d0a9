"""
Heads for sequence, inside a sequence-parallel group (DeepSpeed-Ulysses, arXiv 2309.14509; FPDT, arXiv 2408.16978, section 3.1).

A rank holds a slice of every chunk's tokens with all heads. Attention needs all tokens of a chunk, for some of the heads:

    before attention    [batch, chunk / P, heads, dim] -> [batch, chunk, heads / P, dim]    query, key, value in one all-to-all
    after attention     [batch, chunk, heads / P, dim] -> [batch, chunk / P, heads, dim]    out

and the gradients take the same ways back. A key/value head goes to the ranks whose query heads attend to it: with fewer of them
than ranks, to several, whose gradients are summed. Nothing is repeated on the wire.

Nothing waits where it is sent. Over a slow link a rank's heads go in groups (`HeadSplit.groups`): while one group attends, the
next ones are on their way there, and those before it on their way back. What remains is the first group's way there and the
last one's back.

    compute       pack |         | attend 0 | attend 1 | attend 2 | attend 3 |        | join
    exchange           | 0 there | 1, 2, 3 there, 0, 1, 2 back    ...        | 3 back |

Over a fast link they go in one: an exchange takes multiprocessors from the attention that it runs beside, which costs as much.

This is the only module that communicates inside a layer, and only within the group. Every rank of a group must call the same
methods in the same order with the same shapes.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .head_split import ALL_HEADS, HeadGroup, HeadSplit
from .link_rate import link_rate

_logger = logging.getLogger(__name__)
# Measured on two H200s with NVLink (250e9): groups hid more of the exchange, and the step took 0.5% to 1.6% longer. Links
# between machines and PCIe have at most 60e9.
FAST_LINK = 100e9  # bytes a second and process
_MAX_GROUPS = 4
_most_groups: dict[tuple[int, ...], int] = {}  # by the ranks of a process group


class Arriving:
    """
    An all-to-all under way. `get`, to be called once, makes compute wait for it, on a GPU not the host, and returns what
    `unpack` makes of what it brought.

    Args:
        sent: what must not change until then.
        work: what to wait for; None if it is over.
    """

    def __init__(self, got: Tensor, sent: Tensor, work: "dist.Work | None", unpack: Callable[[Tensor], Any]):
        self._got, self._sent, self._work, self._unpack = got, sent, work, unpack

    def get(self) -> Any:
        if self._work is not None:
            self._work.wait()
        got, self._got, self._sent, self._work = self._got, None, None, None
        return self._unpack(got)


class Arrived:
    """What nobody had to send. Same interface as `Arriving`."""

    def __init__(self, got: Any):
        self._got = got

    def get(self) -> Any:
        got, self._got = self._got, None
        return got


class NoExchange:
    """The exchange of a rank that has the whole sequence: nothing changes hands. Same interface as `HeadExchange`."""

    group, size, rank = None, 1, 0

    def own_heads(self, heads: int) -> slice:
        return slice(None)

    def groups(self, heads: int, kv_heads: int) -> tuple[HeadGroup, ...]:
        return (ALL_HEADS,)

    def scatter(self, group: HeadGroup, query: Tensor, key: Tensor, value: Tensor) -> Arrived:
        return Arrived((query, key, value))

    def scatter_heads(self, group: HeadGroup, x: Tensor) -> Arrived:
        return Arrived(x)

    def gather_heads(self, x: Tensor) -> Arrived:
        return Arrived(x)

    def join_heads(self, groups: Sequence[HeadGroup], returning: Sequence[Arrived]) -> Tensor:
        return returning[0].get()

    def gather_grads(self, group: HeadGroup, query: Tensor, key: Tensor, value: Tensor, kv_heads: int) -> Arrived:
        return Arrived((query, key, value))

    def join_grads(self, groups: Sequence[HeadGroup], returning: Sequence[Arrived], kv_heads: int) -> tuple[Tensor, ...]:
        return returning[0].get()


class HeadExchange:
    """
    `scatter*` and `gather*` send, for one group of heads, and return what is on its way; `join*` wait for all groups.

    Args:
        group: the ranks that share a sequence, at least two.
    """

    def __init__(self, group: dist.ProcessGroup):
        self.group, self.size, self.rank = group, dist.get_world_size(group), dist.get_rank(group)
        self._on_gpus = "nccl" in str(dist.get_backend_config(group))  # between CPUs nothing is won by not waiting

    @cached_property
    def most_groups(self) -> int:
        """In how many groups the heads of a rank go at most. Collective at the first call for a process group."""
        if not self._on_gpus:
            return _MAX_GROUPS
        ranks = tuple(dist.get_process_group_ranks(self.group))
        if ranks not in _most_groups:  # nothing here refers to the group, which must go when its owner ends it
            _most_groups[ranks] = _groups_over(link_rate(self.group, torch.device("cuda", torch.cuda.current_device())))
        return _most_groups[ranks]

    def own_heads(self, heads: int) -> slice:
        """Which of the query heads this rank attends with."""
        return slice(self.rank * heads // self.size, (self.rank + 1) * heads // self.size)

    def groups(self, heads: int, kv_heads: int) -> tuple[HeadGroup, ...]:
        """How the heads of each rank are divided, of a model with so many."""
        return _groups(heads, kv_heads, self.size, self.most_groups)

    def scatter(self, group: HeadGroup, query: Tensor, key: Tensor, value: Tensor) -> Arriving:
        """
        Before attention, in one all-to-all: `query`, `key`, `value` of this rank's tokens and all heads, brings those of all
        tokens and the group's heads: the key/value heads that the query heads attend to, in groups of equal size. Only the
        first group of some key/value heads brings them; for another they are None.
        """
        ways = _ways(query.shape[2], key.shape[2], self.size, self.rank)
        sent, used = ways.sent, ways.used
        tensors = [self._by_rank(query, group.query)]
        if group.first:
            key, value = (t if sent is None else t.index_select(2, _index(sent, t.device)) for t in (key, value))
            tensors += [self._by_rank(t, group.key_value) for t in (key, value)]

        def unpack(query: Tensor, key: Tensor | None = None, value: Tensor | None = None):
            if used is not None:
                key, value = (t.index_select(2, _index(used, t.device)) for t in (key, value))
            return query, key, value

        return self._scatter(tensors, unpack)

    def scatter_heads(self, group: HeadGroup, x: Tensor) -> Arriving:
        """Of the query, or of the gradient of out, alone."""
        return self._scatter([self._by_rank(x, group.query)], lambda x: x)

    def gather_heads(self, x: Tensor) -> Arriving:
        """After attention: out of all tokens and a group's heads."""
        return self._gather(x)

    def join_heads(self, groups: Sequence[HeadGroup], returning: Sequence[Arriving]) -> Tensor:
        """Out of this rank's tokens and all heads, from what every group's `gather_heads` brings."""
        parts = [coming.get()[0] for coming in returning]
        return _joined(parts, [group.query for group in groups])

    def gather_grads(self, group: HeadGroup, query: Tensor, key: Tensor, value: Tensor, kv_heads: int) -> Arriving:
        """
        Gradients of what a group's `scatter` brought, in one all-to-all. Only the last group of some key/value heads sends
        theirs.

        Args:
            kv_heads: of the model.
        """
        if not group.last:
            return self._gather(query)
        if group is ALL_HEADS:
            ways = _ways(query.shape[2] * self.size, kv_heads, self.size, self.rank)
            if ways.used is not None:
                key, value = (_summed_heads(t, ways.used, ways.split.kv_per_rank) for t in (key, value))
        return self._gather(query, key, value)

    def join_grads(self, groups: Sequence[HeadGroup], returning: Sequence[Arriving], kv_heads: int) -> tuple[Tensor, ...]:
        """Gradients of what all groups' `scatter` were given, from what their `gather_grads` bring."""
        found = [coming.get() for coming in returning]
        query = _joined([parts[0] for parts in found], [group.query for group in groups])
        places = [group.key_value for group in groups if group.last]
        key, value = (_joined([parts[index] for parts in found if len(parts) > 1], places) for index in (1, 2))
        sent = _ways(query.shape[2], kv_heads, self.size, self.rank).sent
        if sent is not None:
            key, value = (_summed_heads(t, sent, kv_heads) for t in (key, value))
        return query, key, value

    def _by_rank(self, x: Tensor, heads: slice) -> Tensor:
        """`[batch, tokens, size * heads, dim]` as `[size, batch, tokens, some of the heads, dim]`."""
        return x.unflatten(2, (self.size, -1))[:, :, :, heads].permute(2, 0, 1, 3, 4)

    def _scatter(self, tensors: Sequence[Tensor], unpack: Callable) -> Arriving:
        """`[size, batch, tokens, heads, dim]` each; `unpack` gets them as `[batch, size * tokens, heads, dim]`."""
        size, batch, tokens = tensors[0].shape[:3]
        widths, dims = [t.shape[3] * t.shape[4] for t in tensors], [t.shape[4] for t in tensors]

        def parts(got: Tensor):
            got = got.transpose(0, 1).reshape(batch, size * tokens, -1).split(widths, -1)
            return unpack(*(part.unflatten(-1, (-1, dim)) for part, dim in zip(got, dims, strict=True)))

        return self._all_to_all(_packed(tensors), parts)

    def _gather(self, *tensors: Tensor) -> Arriving:
        """The way back, of `[batch, size * tokens, heads, dim]` each; brings them as `[batch, tokens, size, heads, dim]`."""
        widths, dims = [t.shape[2] * t.shape[3] for t in tensors], [t.shape[3] for t in tensors]

        def parts(got: Tensor) -> list[Tensor]:
            got = got.permute(1, 2, 0, 3).split(widths, -1)
            return [part.unflatten(-1, (-1, dim)) for part, dim in zip(got, dims, strict=True)]

        return self._all_to_all(_packed([t.unflatten(1, (self.size, -1)).transpose(0, 1) for t in tensors]), parts)

    def _all_to_all(self, sent: Tensor, unpack: Callable[[Tensor], Any]) -> Arriving:
        got = torch.empty_like(sent)
        work = dist.all_to_all_single(got, sent, group=self.group, async_op=self._on_gpus)
        return Arriving(got, sent, work, unpack)


class MeasuredExchange(HeadExchange):
    """The same shapes and allocations without communication, for one rank of a group that is measured by itself."""

    def __init__(self, size: int, rank: int, most_groups: int = _MAX_GROUPS):
        self.group, self.size, self.rank, self.most_groups = None, size, rank, most_groups

    def _all_to_all(self, sent: Tensor, unpack: Callable[[Tensor], Any]) -> Arriving:
        return Arriving(torch.zeros_like(sent), sent, None, unpack)


@dataclass(frozen=True)
class _Ways:
    """A split, its `sent()` and the `head_map` of a rank: the same in every chunk of every layer."""

    split: HeadSplit
    sent: tuple[int, ...] | None
    used: tuple[int, ...] | None


@lru_cache
def _ways(heads: int, kv_heads: int, size: int, rank: int) -> _Ways:
    split = HeadSplit(heads, kv_heads, size)
    return _Ways(split, split.sent(), split.head_map(rank))


@lru_cache
def _groups(heads: int, kv_heads: int, size: int, most: int) -> tuple[HeadGroup, ...]:
    return HeadSplit(heads, kv_heads, size).groups(most)


def _groups_over(rate: float) -> int:
    """At most, over a link of so many bytes a second; the same on all ranks, which have measured it together."""
    found = 1 if rate >= FAST_LINK else _MAX_GROUPS
    _logger.info(
        "hf_fpdt: %.0f GB/s between the processes of a sequence: heads exchanged in up to %d groups", rate / 1e9, found
    )
    return found


def _packed(tensors: Sequence[Tensor]) -> Tensor:
    """`[size, batch, tokens, heads, dim]` each, next to each other in `[size, batch, tokens, width]`."""
    widths = [t.shape[3] * t.shape[4] for t in tensors]
    packed = tensors[0].new_empty(*tensors[0].shape[:3], sum(widths))
    for part, t in zip(packed.split(widths, -1), tensors, strict=True):
        part.unflatten(-1, (-1, t.shape[4])).copy_(t)
    return packed


def _joined(parts: Sequence[Tensor], places: Sequence[slice]) -> Tensor:
    """`[batch, tokens, size, some heads, dim]` each, of these heads of every rank, as `[batch, tokens, size * heads, dim]`."""
    if len(parts) == 1:
        return parts[0].flatten(2, 3)
    batch, tokens, size, _, dim = parts[0].shape
    whole = parts[0].new_empty(batch, tokens, size, places[-1].stop, dim)
    for part, place in zip(parts, places, strict=True):
        whole[:, :, :, place] = part
    return whole.flatten(2, 3)


@lru_cache
def _index(heads: tuple[int, ...], device: torch.device) -> Tensor:
    """Made once: the host waits when a tensor is made on a GPU from numbers."""
    return torch.tensor(heads, device=device)


def _summed_heads(x: Tensor, heads: tuple[int, ...], num_heads: int) -> Tensor:
    """`y[:, :, heads[i]] += x[:, :, i]`, in fp32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    total = x.new_zeros(*x.shape[:2], num_heads, x.shape[3], dtype=wide)
    return total.index_add_(2, _index(heads, x.device), x.to(wide)).to(x.dtype)
