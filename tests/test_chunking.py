"""Which tokens form a chunk. A failure means tokens that are dropped or computed twice, or chunks too long for the memory."""

import pytest

from hf_fpdt import chunking
from hf_fpdt.chunking import auto_chunk_tokens, chunk_spans, resolve_chunk_size


@pytest.mark.parametrize("seq_len", [1, 2, 7, 128, 1000])
@pytest.mark.parametrize("size", [1, 2, 3, 128, 999, 1000, 5000])
def test_spans_cover_every_token_once_in_order(seq_len, size):
    spans = chunk_spans(seq_len, size)
    assert [token for start, stop in spans for token in range(start, stop)] == list(range(seq_len))
    assert all(stop - start == size for start, stop in spans[:-1])
    assert 1 <= spans[-1][1] - spans[-1][0] <= size


def test_ragged_end():
    assert chunk_spans(10, 4) == [(0, 4), (4, 8), (8, 10)]
    assert chunk_spans(3, 10) == [(0, 3)]


@pytest.mark.parametrize(("setting", "want"), [(1, 1), (100, 100), (300, 300), (301, 300), (10**9, 300)])
def test_a_given_size_is_kept_up_to_the_sequence(setting, want):
    for device in ("cpu", "cuda"):
        assert resolve_chunk_size(setting, batch_size=8, seq_len=300, tokens=auto_chunk_tokens(device, 300)) == want


@pytest.mark.parametrize(
    ("device", "batch", "seq_len", "want"),
    [
        ("cuda", 1, 131072, 16384),
        ("cuda", 2, 131072, 8192),
        ("cuda", 1, 524287, 16384),
        ("cuda", 1, 524288, 32768),
        ("cuda", 2, 1 << 20, 16384),
        ("cuda", 1, 16384, 16384),
        ("cuda", 1, 16385, 8320),  # two chunks: 8193 rounded up to a multiple of 128
        ("cuda", 1, 100, 100),
        ("cuda", 1000, 1000, 128),
        ("cpu", 1, 8192, 2048),
        ("cpu", 1, 2049, 1152),
        ("cpu", 4, 2048, 512),
        ("xpu", 1, 8192, 2048),  # an unknown device: the smaller one
    ],
)
def test_auto(device, batch, seq_len, want):
    assert resolve_chunk_size("auto", batch_size=batch, seq_len=seq_len, tokens=auto_chunk_tokens(device, seq_len)) == want


@pytest.mark.parametrize("batch", [1, 2, 3, 8])
@pytest.mark.parametrize("seq_len", [1, 127, 2048, 2049, 5000, 12345, 99999])
def test_auto_is_balanced_aligned_and_bounded(batch, seq_len):
    size = resolve_chunk_size("auto", batch_size=batch, seq_len=seq_len, tokens=auto_chunk_tokens("cpu", seq_len))
    spans = chunk_spans(seq_len, size)
    assert size == seq_len or size % 128 == 0
    target = chunking.AUTO_CHUNK_TOKENS["cpu"] * (2 if seq_len >= 65536 else 1)
    assert size * batch <= max(target, 128 * batch) + 127 * batch
    # equal but for rounding to 128: no short chunk at the end that could have been shared out
    assert len(spans) * size - seq_len < 128 * len(spans)
