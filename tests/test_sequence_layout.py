"""Which tokens a rank holds. A failure means that chunks, put together by the all-to-all, are not the sequence in order."""

import random

import pytest
import torch

from hf_fpdt.sequence_layout import SequenceLayout


def layout_of(seq_len, setting, sp_size, batch_size=1, device_type="cpu"):
    return SequenceLayout.of(seq_len, setting=setting, batch_size=batch_size, device_type=device_type, sp_size=sp_size)


def fuzzed(count=300):
    generator = random.Random(0)
    for _ in range(count):
        seq_len = generator.choice([generator.randint(1, 40), generator.randint(1, 9000)])
        setting = generator.choice(["auto", generator.randint(1, 50), generator.randint(1, 10000)])
        yield layout_of(seq_len, setting, generator.choice([1, 2, 3, 4, 5, 8, 16]), generator.randint(1, 5)), seq_len, setting


def test_the_design():
    """Written out: 2 ranks, chunks of 4 and a last one of 2."""
    layout = layout_of(9, 4, 2)
    assert (layout.seq_len, layout.chunk_size, layout.local_len) == (10, 4, 5)
    assert layout.spans == [(0, 4), (4, 8), (8, 10)]
    assert layout.local_spans == [(0, 2), (2, 4), (4, 5)]
    assert layout.positions(0).tolist() == [0, 1, 4, 5, 8]
    assert layout.positions(1).tolist() == [2, 3, 6, 7, 9]


@pytest.mark.parametrize(
    ("seq_len", "setting", "sp_size", "want"),
    [
        (16, 3, 4, (16, 4)),  # a chunk is rounded up to the group
        (16, 1, 4, (16, 4)),
        (10, 7, 4, (12, 8)),
        (5, 7, 4, (8, 8)),  # one chunk, no longer than the sequence
        (1, 1, 8, (8, 8)),
        (12, 100, 4, (12, 12)),
        (7, 3, 1, (7, 3)),  # one rank: nothing is padded or rounded
        (4096, "auto", 3, (4098, 4098)),  # 3 * 2048 tokens are one chunk
        (16384, "auto", 4, (16384, 8192)),
    ],
)
def test_lengths(seq_len, setting, sp_size, want):
    layout = layout_of(seq_len, setting, sp_size)
    assert (layout.seq_len, layout.chunk_size) == want


def test_auto_depends_on_batch_and_device():
    """Each of the 4 ranks has as much of a chunk as one process by itself."""
    assert layout_of(262144, "auto", 4, device_type="cuda").chunk_size == 65536
    assert layout_of(262144, "auto", 4, batch_size=2, device_type="cuda").chunk_size == 32768
    assert layout_of(65536, "auto", 4).chunk_size == 8192
    assert layout_of(262144, "auto", 4).chunk_size == 16384  # of every rank's 65,536 tokens, twice as much


def test_lengths_divide_and_are_as_short_as_can_be():
    for layout, seq_len, setting in fuzzed():
        size = layout.sp_size
        assert layout.seq_len % size == 0
        assert 0 <= layout.seq_len - seq_len < size
        assert layout.chunk_size % size == 0
        assert layout.chunk_size <= layout.seq_len
        assert all((stop - start) % size == 0 for start, stop in layout.spans)
        if setting != "auto":
            assert layout.chunk_size == layout.seq_len or 0 <= layout.chunk_size - setting < size


def test_a_model_finds_the_layout_of_the_data():
    """From the length of its shard; and the data, padded, keep theirs."""
    generator = random.Random(1)
    for _ in range(300):
        settings = {
            "setting": generator.choice(["auto", generator.randint(1, 3000)]), "batch_size": generator.randint(1, 4),
            "device_type": generator.choice(["cpu", "cuda"]), "sp_size": generator.randint(1, 9),
        }  # fmt: skip
        layout = SequenceLayout.of(generator.randint(1, 200000), **settings)
        assert SequenceLayout.of(layout.seq_len, **settings) == layout
        assert SequenceLayout.of(layout.local_len * settings["sp_size"], **settings) == layout


def test_every_rank_together_gives_the_contiguous_chunk():
    for layout, _, _ in fuzzed(150):
        ranks = [layout.positions(rank) for rank in range(layout.sp_size)]
        assert all(positions.dtype == torch.int64 and positions.shape == (layout.local_len,) for positions in ranks)
        assert len(layout.spans) == len(layout.local_spans)
        for (start, stop), (local_start, local_stop) in zip(layout.spans, layout.local_spans, strict=True):
            chunk = torch.cat([positions[local_start:local_stop] for positions in ranks])
            assert torch.equal(chunk, torch.arange(start, stop))
        assert layout.local_spans[-1][1] == layout.local_len


def test_every_chunk_is_shared_evenly():
    """What plain slicing of the sequence would not do: each rank has its part of the first chunk, causal work is balanced."""
    layout = layout_of(64, 16, 4)
    for rank in range(4):
        assert layout.positions(rank)[:4].tolist() == list(range(rank * 4, rank * 4 + 4))
