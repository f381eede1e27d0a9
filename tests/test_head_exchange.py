"""
Heads for sequence between processes. A failure means that a query attends to another head's keys, that tokens change places, or
that a gradient of a shared key/value head is lost.
"""

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from hf_fpdt.head_exchange import HeadExchange, HeadSplit, MeasuredExchange

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


@pytest.mark.parametrize(("heads", "size", "valid"), [(6, 4, "1, 2, 3, 6"), (32, 12, "1, 2, 4, 8, 16, 32")])
def test_heads_that_the_group_does_not_divide(heads, size, valid):
    with pytest.raises(ValueError, match=rf"{heads} attention heads .* group of {size} processes. Use an sp_size of {valid}\."):
        HeadSplit(heads, 2, size)


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
        own = [t[:, 3 * rank : 3 * rank + 3] for t in _whole(heads, kv_heads, ranks, dtype)]
        own = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in own]  # as from a model
        query, key, value = exchange.scatter(*own)
        assert torch.equal(exchange.scatter_heads(own[0]), query)
        back = exchange.gather_heads(query)
        measured = MeasuredExchange(ranks, rank).scatter(*own)
        assert [t.shape for t in measured] == [t.shape for t in (query, key, value)]
        results.append((query, key, value, back, exchange.gather_grads(query, key, value, kv_heads)))
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
            got_query, got_key, got_value, back, grads = found[rank][index]
            own, shard = slice(rank * per_rank, (rank + 1) * per_rank), slice(3 * rank, 3 * rank + 3)
            assert torch.equal(got_query, query[:, :, own])
            assert torch.equal(back, query[:, shard])
            groups = per_rank // got_key.shape[2]
            kv = [head * kv_heads // heads for head in range(heads)][own]
            assert torch.equal(got_key.repeat_interleave(groups, 2), key[:, :, kv])
            assert torch.equal(got_value.repeat_interleave(groups, 2), value[:, :, kv])
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
