"""Which heads each rank of a sequence-parallel group attends with, and in which groups they are exchanged. Integers only."""

from dataclasses import dataclass


@dataclass(frozen=True)
class HeadSplit:
    """
    Which heads each of `size` ranks attends with.

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

    def groups(self, most: int) -> "tuple[HeadGroup, ...]":
        """
        Every rank's heads in at most so many groups of equal size, in the order in which they are exchanged; in one if the
        ranks' key/value heads do not serve equally many query heads.
        """
        own, kv = self.heads_per_rank, self.kv_per_rank
        if any(self.head_map(rank) is not None for rank in range(self.size)):
            return (ALL_HEADS,)
        a_kv_head = own // kv  # query heads
        count = next(n for n in range(min(most, own), 0, -1) if own % n == 0 and _fits(own // n, a_kv_head))
        size = own // count
        return tuple(_group(slice(at, at + size), a_kv_head) for at in range(0, own, size))

    def _kv_of(self, head: int) -> int:
        return head // (self.heads // self.kv_heads)

    def _needed(self, rank: int) -> tuple[int, int]:
        first = rank * self.heads_per_rank
        return self._kv_of(first), self._kv_of(first + self.heads_per_rank - 1) + 1


@dataclass(frozen=True)
class HeadGroup:
    """
    Heads that are exchanged together, and attend while others are exchanged.

    Args:
        query: which of a rank's own query heads.
        key_value: the key/value heads that they attend to, counted in `HeadSplit.received`.
        first, last: whether no other group before, or after, attends to these key/value heads: they come with the first, and
            their gradients leave with the last.
    """

    query: slice
    key_value: slice
    first: bool = True
    last: bool = True


ALL_HEADS = HeadGroup(slice(None), slice(None))


def _fits(size: int, a_kv_head: int) -> bool:
    return size % a_kv_head == 0 or a_kv_head % size == 0


def _group(query: slice, a_kv_head: int) -> HeadGroup:
    """That of these query heads, where so many in order attend to one key/value head."""
    key_value = slice(query.start // a_kv_head, -(-query.stop // a_kv_head))
    return HeadGroup(query, key_value, query.start % a_kv_head == 0, query.stop % a_kv_head == 0)
