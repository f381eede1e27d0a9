"""
Heads for sequence between processes. A failure means that a query attends to another head's keys, that tokens change places, or
that a gradient of a shared key/value head is lost.
"""

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from hf_fpdt import head_exchange
from hf_fpdt.head_exchange import HeadExchange, MeasuredExchange
from hf_fpdt.head_split import ALL_HEADS, HeadSplit

# heads, kv_heads, ranks: whole groups, fewer key/value heads than ranks, and ranks that get parts of groups
SPLITS = [(4, 4, 2), (4, 2, 2), (8, 2, 4), (4, 1, 2), (6, 3, 2), (12, 3, 4), (24, 6, 4), (6, 2, 3), (8, 8, 4), (10, 5, 2)]


@pytest.mark.parametrize(("heads", "kv_heads", "size"), SPLITS)
def test_every_query_head_finds_its_keys(heads, kv_heads, size):
    split = HeadSplit(heads, kv_heads, size)
    for rank in range(size):
        received, used = list(split.received(rank)), split.head_map(rank)
        assert 0 <= received[0] <= received[-1] < kv_heads
        for own in range(split.heads_per_rank):
            place = own * len(received) // split.heads_per_rank if used is None else used[own]
            assert received[place] == (rank * split.heads_per_rank + own) * kv_heads // heads


def test_no_more_heads_are_sent_than_are_needed():
    assert HeadSplit(32, 8, 8).kv_per_rank == 1
    assert HeadSplit(32, 8, 16).kv_per_rank == 1
    assert HeadSplit(32, 8, 4).sent() is None
    assert HeadSplit(4, 2, 4).sent() == (0, 0, 1, 1)


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [*SPLITS, (32, 8, 2), (32, 8, 8), (64, 8, 2), (12, 12, 2), (10, 2, 2)])
def test_groups_cover_the_heads_in_order(heads, kv_heads, size):
    """Equal groups, each with the key/value heads of its query heads, which come once and whose gradients leave once."""
    split = HeadSplit(heads, kv_heads, size)
    groups = split.groups(4)
    if groups == (ALL_HEADS,):
        assert any(split.head_map(rank) is not None for rank in range(size))
        return
    own, shared = range(split.heads_per_rank), split.heads_per_rank // split.kv_per_rank
    assert [head for group in groups for head in own[group.query]] == list(own)
    assert len({len(own[group.query]) for group in groups}) == 1
    received = range(split.kv_per_rank)
    for group in groups:
        assert list(received[group.key_value]) == sorted({head // shared for head in own[group.query]})
    for ends in ("first", "last"):
        assert [head for group in groups if getattr(group, ends) for head in received[group.key_value]] == list(received)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "want"),
    [(32, 8, 2, 4), (32, 8, 4, 4), (32, 8, 8, 4), (32, 8, 16, 2), (32, 32, 32, 1), (12, 12, 2, 3), (10, 2, 2, 1), (6, 3, 2, 1)],
)
def test_how_many_groups(heads, kv_heads, size, want):
    split = HeadSplit(heads, kv_heads, size)
    assert len(split.groups(4)) == want
    assert len(split.groups(1)) == 1


@pytest.mark.parametrize(("heads", "size", "valid"), [(6, 4, "1, 2, 3, 6"), (32, 12, "1, 2, 4, 8, 16, 32")])
def test_heads_that_the_group_does_not_divide(heads, size, valid):
    with pytest.raises(ValueError, match=rf"{heads} attention heads .* group of {size} processes. Use an sp_size of {valid}\."):
        HeadSplit(heads, 2, size)


@pytest.mark.parametrize(("rate", "want"), [(250e9, 1), (50e9, 4)])
def test_a_fast_link_takes_all_heads_at_once(rate, want):
    """An exchange beside attention takes multiprocessors from it: on NVLink that costs as much as waiting."""
    assert head_exchange._groups_over(rate) == want


def _whole(heads: int, kv_heads: int, ranks: int, dtype):
    generator = torch.Generator().manual_seed(0)
    tokens = 3 * ranks
    shapes = ((heads, 6), (kv_heads, 6), (kv_heads, 4))
    return [torch.randn(2, tokens, *shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def _exchange(rank: int, cases, dtype):
    """Of every case: what attention gets, what comes back of out, and the gradients, for the whole tensors cut by rank."""
    results = []
    for heads, kv_heads, ranks in cases:
        exchange = HeadExchange(dist.group.WORLD)
        measured = MeasuredExchange(ranks, rank)
        own = [t[:, 3 * rank : 3 * rank + 3] for t in _whole(heads, kv_heads, ranks, dtype)]
        own = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in own]  # as from a model
        groups = exchange.groups(heads, kv_heads)
        there = [exchange.scatter(group, *own) for group in groups]  # all on their way before the first is waited for
        queries = [exchange.scatter_heads(group, own[0]) for group in groups]
        found = [arriving.get() for arriving in there]
        assert all(torch.equal(coming.get(), query) for coming, (query, _, _) in zip(queries, found, strict=True))
        back, grads, key_value = [], [], None
        for group, (query, key, value) in zip(groups, found, strict=True):
            shapes = [None if t is None else t.shape for t in measured.scatter(group, *own).get()]
            assert shapes == [None if t is None else t.shape for t in (query, key, value)]
            key_value = (key, value) if group.first else key_value
            back.append(exchange.gather_heads(query))
            given = key_value if group.last else (None, None)
            grads.append(exchange.gather_grads(group, query, *given, kv_heads))
        whole = [torch.cat([found[at][i] for at, g in enumerate(groups) if i == 0 or g.first], dim=2) for i in range(3)]
        back, grads = exchange.join_heads(groups, back), exchange.join_grads(groups, grads, kv_heads)
        results.append((*whole, back, grads, len(groups)))
    return results


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_exchange(ranks, dtype):
    cases = [case for case in SPLITS if case[2] == ranks]
    found = run_ranks(_exchange, ranks, cases, dtype)
    for index, (heads, kv_heads, _) in enumerate(cases):
        query, key, value = _whole(heads, kv_heads, ranks, dtype)
        per_rank = heads // ranks
        for rank in range(ranks):
            got_query, got_key, got_value, back, grads, groups = found[rank][index]
            assert groups == len(HeadSplit(heads, kv_heads, ranks).groups(4))
            own, shard = slice(rank * per_rank, (rank + 1) * per_rank), slice(3 * rank, 3 * rank + 3)
            assert torch.equal(got_query, query[:, :, own])
            assert torch.equal(back, query[:, shard])
            shared = per_rank // got_key.shape[2]
            kv = [head * kv_heads // heads for head in range(heads)][own]
            assert torch.equal(got_key.repeat_interleave(shared, 2), key[:, :, kv])
            assert torch.equal(got_value.repeat_interleave(shared, 2), value[:, :, kv])
            assert torch.equal(grads[0], query[:, shard])
            # Of K and V comes back as many times the original as ranks had it, or query heads where it was repeated.
            copies = torch.zeros(kv_heads)
            for other in range(ranks):
                split = HeadSplit(heads, kv_heads, ranks)
                used = split.head_map(other) or range(split.kv_per_rank)
                for place in used:
                    copies[split.received(other)[place]] += 1
            tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {}
            for got, whole in ((grads[1], key), (grads[2], value)):
                want = whole[:, shard].double() * copies[:, None]
                torch.testing.assert_close(got.double(), want, **tolerance)
