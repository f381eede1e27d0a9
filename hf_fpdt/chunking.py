"""
Which tokens form a chunk. Integers only: no tensors, no devices.

A chunk is the slice of the sequence that one pipeline step handles. Chunks are in order, do not overlap and cover the
sequence; only the last may be shorter than the rest.
"""

AUTO_CHUNK_TOKENS = {"cuda": 16384, "cpu": 2048}
_MANY = 32  # chunks; a sequence of so many takes chunks twice as long: 1.6% faster at 524,288 tokens, see benchmarks/results
_ALIGNMENT = 128  # tokens; the largest tile height of the attention kernels


def auto_chunk_tokens(device_type: str, seq_len: int) -> int:
    """Tokens of a chunk, batch included, that `"auto"` aims at on one device of this type, with so much of every sequence."""
    tokens = AUTO_CHUNK_TOKENS.get(device_type, AUTO_CHUNK_TOKENS["cpu"])
    return 2 * tokens if seq_len >= _MANY * tokens else tokens


def resolve_chunk_size(setting: int | str, *, batch_size: int, seq_len: int, tokens: int) -> int:
    """
    Tokens of one sequence in one chunk. `"auto"` divides the sequence into equal chunks, a multiple of 128 tokens each,
    such that a chunk of the whole batch has at most about `tokens` tokens.
    """
    if setting != "auto":
        return min(setting, seq_len)
    target = max(tokens // batch_size, _ALIGNMENT)
    num_chunks = -(-seq_len // target)
    size = -(-seq_len // num_chunks)
    return min(-(-size // _ALIGNMENT) * _ALIGNMENT, seq_len)


def chunk_spans(seq_len: int, chunk_size: int) -> list[tuple[int, int]]:
    """`(start, stop)` of every chunk, in order; at least one chunk for a sequence of at least one token."""
    return [(start, min(start + chunk_size, seq_len)) for start in range(0, seq_len, chunk_size)]
