"""
Which keys a query sees: those of its own document, up to itself.

A row of a batch is cut into documents, `(start, stop)` each: one if it is one text, several if texts are packed. What lies in
none is padding: nobody sees it and it sees nothing. Documents are numbers and not a mask: attention is one call a document and
chunk, over slices of tensors that are there anyway, and keys of other documents are neither fetched nor multiplied.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

Document = tuple[int, int]


@dataclass(frozen=True)
class Segment:
    """
    Part of a chunk that lies in one document.

    Args:
        rows: of the batch.
        start, stop: positions of its queries.
        first: position of the first key that any of them sees: where their document starts, or inside of it the window of the
            first of them. Before `start` only if `start` is also that of the chunk.
    """

    rows: slice
    start: int
    stop: int
    first: int

    def queries(self, chunk: Document) -> tuple[slice, slice]:
        """Index of its queries in a tensor `[batch, chunk, ...]`."""
        return self.rows, slice(self.start - chunk[0], self.stop - chunk[0])

    def keys(self, block: Document) -> tuple[slice, slice] | None:
        """Index of the keys that it sees in a tensor `[batch, block, ...]` of the keys of a span; None if it sees none."""
        start, stop = max(self.first, block[0]), min(self.stop, block[1])
        return (self.rows, slice(start - block[0], stop - block[0])) if start < stop else None

    @property
    def tokens(self) -> int:
        """Of all its rows."""
        return (self.rows.stop - self.rows.start) * (self.stop - self.start)

    def pairs(self, window: int | None = None) -> int:
        """Pairs of a query and a key that it sees, of all its rows; `window` is that which the segment was made with."""
        seen = _pairs(self.stop - self.first, window) - _pairs(self.start - self.first, window)
        return (self.rows.stop - self.rows.start) * seen


class Documents:
    """
    Args:
        rows: documents of every row of the batch, in order, not overlapping.
    """

    def __init__(self, rows: Sequence[Sequence[Document]]):
        alike = all(row == rows[0] for row in rows)
        self._rows = [(slice(0, len(rows)), rows[0])] if alike else [(slice(i, i + 1), row) for i, row in enumerate(rows)]

    def most(self) -> int:
        """The most documents in a row."""
        return max(len(row) for _, row in self._rows)

    def borders(self) -> list[int] | None:
        """`[0, end of the first document, ..., end of the last]`, if all rows are alike and nothing lies between documents."""
        (_, row), *others = self._rows
        meeting = all(before[1] == after[0] for before, after in pairwise([(0, 0), *row]))
        return [0, *(stop for _, stop in row)] if meeting and not others else None

    def numbers(self, seq_len: int) -> Tensor:
        """Of every token of a row, if all rows are alike: the number of its document, -1 for padding; int64 `[seq_len]`."""
        ((_, row),) = self._rows
        numbers = torch.full((seq_len,), -1)
        for number, (start, stop) in enumerate(row):
            numbers[start:stop] = number
        return numbers

    @classmethod
    def whole(cls, batch_size: int, seq_len: int) -> "Documents":
        """One document a row."""
        return cls([[(0, seq_len)]] * batch_size)

    def segments(self, spans: Sequence[Document], window: int | None = None) -> list[list[Segment]]:
        """Of every chunk; `window` as in `ScoreRule`."""
        found: list[list[Segment]] = [[] for _ in spans]
        for rows, row in self._rows:
            starts, ends = [start for start, _ in row], [stop for _, stop in row]
            for chunk, segments in zip(spans, found, strict=True):
                for start, stop in row[bisect_right(ends, chunk[0]) : bisect_left(starts, chunk[1])]:
                    begin = max(start, chunk[0])
                    first = start if window is None else max(start, begin - window + 1)
                    segments.append(Segment(rows, begin, min(stop, chunk[1]), first))
        return found


def documents_of(name: str, arguments: dict[str, Any], batch_size: int, seq_len: int) -> Documents | None:
    """
    The documents that a model's arguments describe, None if every row is one.

    Padding is where `attention_mask [batch, seq_len]` is 0. A document starts where `position_ids` do not go on by one, where
    `seq_idx` changes, and at every entry of `cu_seq_lens_q`, behind whose last entry is padding.

    Args:
        name: what errors call the model.

    Raises:
        ValueError: for a mask, `seq_idx` or `cu_seq_lens_*` of another form, or padding inside of a document.
    """
    valid = _valid(name, arguments.get("attention_mask"), batch_size, seq_len)
    starts = torch.zeros(batch_size, seq_len, dtype=torch.bool)
    positions = arguments.get("position_ids")
    if positions is not None:
        starts[:, 1:] |= _jumps(positions, 1).cpu()
    if arguments.get("seq_idx") is not None:
        starts[:, 1:] |= _jumps(_of_shape(name, "seq_idx", arguments["seq_idx"], batch_size, seq_len), 0).cpu()
    if any(arguments.get(key) is not None for key in ("cu_seq_lens_q", "cu_seq_lens_k")):
        borders = _borders(name, arguments, batch_size, seq_len)
        starts[0, [at for at in borders if 0 < at < seq_len]] = True
        if borders[-1] < seq_len:
            valid = torch.ones(1, seq_len, dtype=torch.bool) if valid is None else valid
            valid[0, borders[-1] :] = False
    if valid is None and not starts.any():
        return None
    if valid is None:
        valid = torch.ones(batch_size, seq_len, dtype=torch.bool)
    gaps = _resumed(valid, positions)
    if gaps:
        raise ValueError(
            f"{name}: attention_mask marks padding inside of a document at {gaps} places (0 between two 1, and position_ids do "
            'not start anew behind it); attn_implementation="fpdt" needs the tokens of a document next to each other. Pad on '
            "one side."
        )
    return Documents([_documents(*row) for row in zip(valid.expand(batch_size, -1), starts, strict=True)])


def _valid(name: str, mask: Tensor | None, batch_size: int, seq_len: int) -> Tensor | None:
    if mask is None:
        return None
    if not torch.is_tensor(mask) or mask.ndim != 2:
        shape = list(mask.shape) if hasattr(mask, "shape") else type(mask).__name__
        raise ValueError(
            f'{name}: attention_mask of shape {shape} was given; attn_implementation="fpdt" takes no prepared mask, only '
            f"1 for tokens and 0 for padding, [batch, seq_len] = {[batch_size, seq_len]}. Leave attention_mask out, or give "
            "packed documents position_ids that start anew."
        )
    mask = _of_shape(name, "attention_mask", mask, batch_size, seq_len).cpu()
    if mask.dtype != torch.bool and bool(((mask != 0) & (mask != 1)).any()):
        raise ValueError(
            f"{name}: attention_mask has values from {mask.min().item()} to {mask.max().item()}; 1 is a token and 0 is padding."
            " Give packed documents position_ids that start anew, or seq_idx."
        )
    return None if mask.all() else mask.bool()


def _of_shape(name: str, what: str, tensor: Tensor, batch_size: int, seq_len: int) -> Tensor:
    if tuple(tensor.shape) != (batch_size, seq_len):
        raise ValueError(
            f"{name}: {what} of shape {list(tensor.shape)} was given for inputs of {batch_size} rows of {seq_len} tokens; it "
            "needs one entry a token."
        )
    return tensor


def _jumps(tensor: Tensor, step: int) -> Tensor:
    """Where a tensor `[batch, seq_len]` or `[seq_len]` does not grow by `step`."""
    return tensor.diff(dim=-1) != step


def _borders(name: str, arguments: dict[str, Any], batch_size: int, seq_len: int) -> list[int]:
    query, key = (arguments.get(f"cu_seq_lens_{what}") for what in "qk")
    query, key = (key if query is None else query).tolist(), (query if key is None else key).tolist()
    rising = all(a <= b for a, b in pairwise(query))
    if batch_size != 1 or query != key or len(query) < 2 or query[0] != 0 or query[-1] > seq_len or not rising:
        raise ValueError(
            f"{name}: cu_seq_lens_q {_short(query)} and cu_seq_lens_k {_short(key)} were given with inputs of "
            f"{batch_size} x {seq_len} tokens; they need one row and must be equal, from 0 up to its length. Flatten the batch "
            "(DataCollatorWithFlattening), or give position_ids instead."
        )
    return query


def _short(numbers: list[int]) -> str:
    return str(numbers) if len(numbers) <= 6 else f"[{', '.join(map(str, [*numbers[:3], '...', *numbers[-2:]]))}]"


def _resumed(valid: Tensor, positions: Tensor | None) -> int:
    """How often tokens go on behind padding, which is not a new document unless their positions say so."""
    begins = valid.clone()
    begins[:, 1:] &= ~valid[:, :-1]
    again = begins & (valid.cumsum(-1) > 1)
    if positions is not None:
        again &= positions.cpu().expand(valid.shape) != 0
    return int(again.sum())


def _pairs(tokens: int, window: int | None) -> int:
    """Of the first tokens of a text."""
    growing = tokens if window is None else min(tokens, window)
    return growing * (growing + 1) // 2 + (tokens - growing) * growing


def _documents(valid: Tensor, starts: Tensor) -> list[Document]:
    """Of one row."""
    begins, ends = valid.clone(), valid.clone()
    begins[1:] &= starts[1:] | ~valid[:-1]
    ends[:-1] &= starts[1:] | ~valid[1:]
    return list(zip(begins.nonzero()[:, 0].tolist(), (ends.nonzero()[:, 0] + 1).tolist(), strict=True))
