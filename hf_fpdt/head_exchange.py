"""
Heads for sequence, inside a sequence-parallel group (DeepSpeed-Ulysses, arXiv 2309.14509; FPDT, arXiv 2408.16978, section 3.1).

A rank holds a slice of every chunk's tokens with all heads. Attention needs all tokens of a chunk, for some of the heads:

    before attention    [batch, chunk / P, heads, dim] -> [batch, chunk, heads / P, dim]    query, key, value in one all-to-all
    after attention     [batch, chunk, heads / P, dim] -> [batch, chunk / P, heads, dim]    out

and the gradients take the same ways back. A key/value head goes to the ranks whose query heads attend to it: with fewer of them
than ranks, to several, whose gradients are summed. Nothing is repeated on the wire.

This is the only module that communicates inside a layer, and only within the group. Every rank of a group must call the same
methods in the same order with the same shapes.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class HeadSplit:
    """
    Which heads each of `size` ranks attends with. Integers only.

    Args:
        heads, kv_heads: of the model; `kv_heads` divides `heads`.

    Raises:
        ValueError: if the ranks cannot have equally many query heads.
    """

    heads: int
    kv_heads: int
    size: int

    def __post_init__(self):
        if self.heads % self.size:
            valid = [size for size in range(1, self.heads + 1) if self.heads % size == 0]
            raise ValueError(
                f"{self.heads} attention heads cannot be split over a sequence-parallel group of {self.size} processes. Use an "
                f"sp_size of {', '.join(map(str, valid))}."
            )

    @property
    def heads_per_rank(self) -> int:
        return self.heads // self.size

    @property
    def kv_per_rank(self) -> int:
        """Key/value heads that every rank receives: as many as the rank that needs most."""
        return max(stop - start for start, stop in map(self._needed, range(self.size)))

    def received(self, rank: int) -> range:
        """The key/value heads that a rank receives."""
        start = min(self._needed(rank)[0], self.kv_heads - self.kv_per_rank)
        return range(start, start + self.kv_per_rank)

    def sent(self) -> tuple[int, ...] | None:
        """The key/value heads that leave a rank, in the order of the ranks they go to; None if that is each once, in order."""
        found = tuple(head for rank in range(self.size) for head in self.received(rank))
        return None if found == tuple(range(self.kv_heads)) else found

    def head_map(self, rank: int) -> tuple[int, ...] | None:
        """
        For each query head of a rank the key/value head it attends to, counted in `received`. None if those are groups of equal
        size in order, which is how attention kernels take them.
        """
        first, received = rank * self.heads_per_rank, self.received(rank)
        found = tuple(self._kv_of(first + head) - received.start for head in range(self.heads_per_rank))
        group, rest = divmod(self.heads_per_rank, len(received))
        in_groups = rest == 0 and found == tuple(head // group for head in range(self.heads_per_rank))
        return None if in_groups else found

    def _kv_of(self, head: int) -> int:
        return head // (self.heads // self.kv_heads)

    def _needed(self, rank: int) -> tuple[int, int]:
        first = rank * self.heads_per_rank
        return self._kv_of(first), self._kv_of(first + self.heads_per_rank - 1) + 1


class NoExchange:
    """The exchange of a rank that has the whole sequence: nothing changes hands. Same interface as `HeadExchange`."""

    group, size, rank = None, 1, 0

    def own_heads(self, heads: int) -> slice:
        return slice(None)

    def scatter(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return query, key, value

    def scatter_heads(self, x: Tensor) -> Tensor:
        return x

    def gather_heads(self, x: Tensor) -> Tensor:
        return x

    def gather_grads(self, query: Tensor, key: Tensor, value: Tensor, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
        return query, key, value


class HeadExchange:
    """
    Args:
        group: the ranks that share a sequence, at least two.
    """

    def __init__(self, group: dist.ProcessGroup):
        self.group, self.size, self.rank = group, dist.get_world_size(group), dist.get_rank(group)

    def own_heads(self, heads: int) -> slice:
        """Which of the query heads this rank attends with."""
        return slice(self.rank * heads // self.size, (self.rank + 1) * heads // self.size)

    def scatter(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Before attention, in one all-to-all. The key and value heads are those that the query heads attend to, in groups."""
        sent, used, _ = _ways(query.shape[2], key.shape[2], self.size, self.rank)
        if sent is not None:
            key, value = (t.index_select(2, _index(sent, t.device)) for t in (key, value))
        query, key, value = self._scatter(query, key, value)
        if used is not None:
            key, value = (t.index_select(2, _index(used, t.device)) for t in (key, value))
        return query, key, value

    def scatter_heads(self, x: Tensor) -> Tensor:
        """Of the query, or of the gradient of out, alone."""
        return self._scatter(x)[0]

    def gather_heads(self, x: Tensor) -> Tensor:
        """After attention."""
        return self._gather(x)[0]

    def gather_grads(self, query: Tensor, key: Tensor, value: Tensor, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """
        Gradients of what `scatter` was given, from those of what it returned, in one all-to-all.

        Args:
            kv_heads: of the model.
        """
        sent, used, kv_per_rank = _ways(query.shape[2] * self.size, kv_heads, self.size, self.rank)
        if used is not None:
            key, value = (_summed_heads(t, used, kv_per_rank) for t in (key, value))
        query, key, value = self._gather(query, key, value)
        if sent is not None:
            key, value = (_summed_heads(t, sent, kv_heads) for t in (key, value))
        return query, key, value

    def _scatter(self, *tensors: Tensor) -> list[Tensor]:
        """`[batch, tokens, size * heads, dim]` each to `[batch, size * tokens, heads, dim]`."""
        batch, tokens = tensors[0].shape[:2]
        widths = [t.shape[2] // self.size * t.shape[3] for t in tensors]
        sent = tensors[0].new_empty(self.size, batch, tokens, sum(widths))
        for part, t in zip(sent.split(widths, -1), tensors, strict=True):
            part.unflatten(-1, (-1, t.shape[3])).copy_(t.unflatten(2, (self.size, -1)).permute(2, 0, 1, 3, 4))
        got = self._all_to_all(sent).transpose(0, 1).reshape(batch, self.size * tokens, -1)
        parts = zip(got.split(widths, -1), tensors, strict=True)
        return [part.unflatten(-1, (-1, t.shape[3])) for part, t in parts]

    def _gather(self, *tensors: Tensor) -> list[Tensor]:
        """The way back: `[batch, size * tokens, heads, dim]` each to `[batch, tokens, size * heads, dim]`."""
        batch, tokens = tensors[0].shape[0], tensors[0].shape[1] // self.size
        widths = [t.shape[2] * t.shape[3] for t in tensors]
        sent = tensors[0].new_empty(self.size, batch, tokens, sum(widths))
        for part, t in zip(sent.split(widths, -1), tensors, strict=True):
            part.unflatten(-1, (-1, t.shape[3])).copy_(t.unflatten(1, (self.size, -1)).transpose(0, 1))
        parts = zip(self._all_to_all(sent).split(widths, -1), tensors, strict=True)
        return [part.permute(1, 2, 0, 3).reshape(batch, tokens, -1, t.shape[3]) for part, t in parts]

    def _all_to_all(self, sent: Tensor) -> Tensor:
        got = torch.empty_like(sent)
        dist.all_to_all_single(got, sent, group=self.group)
        return got


class MeasuredExchange(HeadExchange):
    """The same shapes and allocations without communication, for one rank of a group that is measured by itself."""

    def __init__(self, size: int, rank: int):
        self.group, self.size, self.rank = None, size, rank

    def _all_to_all(self, sent: Tensor) -> Tensor:
        return torch.zeros_like(sent)


@lru_cache
def _ways(heads: int, kv_heads: int, size: int, rank: int) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None, int]:
    """`sent`, `head_map` and `kv_per_rank` of a split: the same in every chunk of every layer."""
    split = HeadSplit(heads, kv_heads, size)
    return split.sent(), split.head_map(rank), split.kv_per_rank


@lru_cache
def _index(heads: tuple[int, ...], device: torch.device) -> Tensor:
    """Made once: the host waits when a tensor is made on a GPU from numbers."""
    return torch.tensor(heads, device=device)


def _summed_heads(x: Tensor, heads: tuple[int, ...], num_heads: int) -> Tensor:
    """`y[:, :, heads[i]] += x[:, :, i]`, in fp32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    total = x.new_zeros(*x.shape[:2], num_heads, x.shape[3], dtype=wide)
    return total.index_add_(2, _index(heads, x.device), x.to(wide)).to(x.dtype)
