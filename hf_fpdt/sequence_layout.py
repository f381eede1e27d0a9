"""
Which tokens a rank of a sequence-parallel group holds: slice r of every global chunk for rank r.

The all-to-all of everyone's local chunk j, heads for sequence, then gives the contiguous global chunk j:

    local[r][j * C/P + t] = global[j * C + r * c/P + t]        C = chunk_size, P = sp_size, c = C, or less in the last chunk
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .chunking import auto_chunk_tokens, chunk_spans, resolve_chunk_size


@dataclass(frozen=True)
class SequenceLayout:
    """
    Made by `of`, which keeps every chunk divisible by the group.

    Args:
        seq_len: tokens of the padded global sequence, a multiple of `sp_size`.
        chunk_size: global tokens of every chunk but the last, a multiple of `sp_size`.
        sp_size: ranks of the group.
    """

    seq_len: int
    chunk_size: int
    sp_size: int

    @classmethod
    def of(cls, seq_len: int, *, setting: int | str, batch_size: int, device_type: str, sp_size: int) -> "SequenceLayout":
        """
        The layout of sequences of `seq_len` tokens, padded as little as possible.

        Args:
            setting: `FPDTConfig.chunk_size`, in tokens of the whole sequence; with `"auto"` every rank has as much of a chunk
                as a process without a group has.
            batch_size, device_type: as in `chunking`.

        The padded length gives the same layout again: a model finds it from the length of its shard times `sp_size`.
        """
        padded = _round_up(seq_len, sp_size)
        tokens = sp_size * auto_chunk_tokens(device_type, padded // sp_size)
        chunk = resolve_chunk_size(setting, batch_size=batch_size, seq_len=padded, tokens=tokens)
        return cls(padded, _round_up(chunk, sp_size), sp_size)

    @property
    def local_len(self) -> int:
        """Tokens of one rank."""
        return self.seq_len // self.sp_size

    @property
    def spans(self) -> list[tuple[int, int]]:
        """`(start, stop)` of every chunk in the global sequence."""
        return chunk_spans(self.seq_len, self.chunk_size)

    @property
    def local_spans(self) -> list[tuple[int, int]]:
        """`(start, stop)` of every chunk in a rank's shard; as many as `spans`, the same for all ranks."""
        return chunk_spans(self.local_len, self.chunk_size // self.sp_size)

    def positions(self, rank: int) -> Tensor:
        """Global positions of the tokens that a rank holds, in the order in which it holds them: int64 `[local_len]`."""
        return torch.cat([torch.arange(start, stop) for start, stop in self.spans_of(rank)])

    def spans_of(self, rank: int) -> list[tuple[int, int]]:
        """`(start, stop)` in the global sequence of what a rank holds of every chunk."""
        found = []
        for start, stop in self.spans:
            width = (stop - start) // self.sp_size
            found.append((start + rank * width, start + (rank + 1) * width))
        return found


def _round_up(tokens: int, multiple: int) -> int:
    return -(-tokens // multiple) * multiple
