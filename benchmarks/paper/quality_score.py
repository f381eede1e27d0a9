"""What `quality.py` measures: loss by position, and keys that are found. No logits of a whole sequence are made."""

import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks.paper.passkeys import KEY_LEN, Wording, document


@dataclass
class Clock:
    """`seconds` from its making; None: no end."""

    seconds: float | None = None
    started: float = field(default_factory=time.monotonic)

    def part(self) -> float:
        """Of the time that has gone."""
        return 0.0 if self.seconds is None else (time.monotonic() - self.started) / max(self.seconds, 1e-9)


def half(device: torch.device):
    """Of what computes: bf16 autocast on a GPU."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


@torch.no_grad()
def token_losses(model, ids: Tensor, tile: int = 8192) -> Tensor:
    """The loss of each token of a sequence but its first, `[tokens - 1]`, fp32; the vocabulary of `tile` tokens at a time."""
    with half(ids.device):
        hidden = _hidden(model, ids)[:-1]
        parts = zip(hidden.split(tile), ids[1:].split(tile), strict=True)
        losses = [torch.nn.functional.cross_entropy(model.lm_head(part).float(), aim, reduction="none") for part, aim in parts]
    return torch.cat(losses)


@torch.no_grad()
def finds_key(model, ids: Tensor) -> bool:
    """Whether the most likely token is right at each of the last KEY_LEN: greedy decoding would have written them."""
    with half(ids.device):
        logits = model.lm_head(_hidden(model, ids)[-KEY_LEN - 1 : -1])
    return bool((logits.argmax(-1) == ids[-KEY_LEN:]).all())


def _hidden(model, ids: Tensor) -> Tensor:
    return model.model(input_ids=ids[None], use_cache=False).last_hidden_state[0]


def rotations(window: Tensor, buckets: int) -> Iterator[tuple[int, Tensor]]:
    """The window from each of its `buckets` blocks on, with the number of that block: each block is everywhere once."""
    block = len(window) // buckets
    for first in range(buckets):
        yield first, window.roll(-first * block)


def bucket_means(losses: Tensor, buckets: int) -> Tensor:
    """
    `[buckets]` of the losses of all tokens of a sequence but the first, in equal parts of the sequence by the position of the
    token that is predicted from; the last part has one loss less.
    """
    block = (len(losses) + 1) // buckets
    return torch.stack([losses[start : start + block].mean() for start in range(0, block * buckets, block)])


def position_losses(model, windows: Tensor, buckets: int, late: Callable[[], bool]) -> list[list[float | None]]:
    """
    A row for each block of text (`buckets` of every window) with its mean loss in each bucket of positions. Every block comes
    once into every bucket, so that columns differ by position and by nothing else; None where the time did not suffice.
    """
    table = torch.full((len(windows), buckets, buckets), float("nan"))
    turns = (
        (index, *turn)
        for turns in zip(*(rotations(w, buckets) for w in windows), strict=True)
        for index, turn in enumerate(turns)
    )
    for index, first, ids in turns:
        if late():
            break
        means = bucket_means(token_losses(model, ids), buckets).cpu()
        for bucket in range(buckets):
            table[index, (first + bucket) % buckets, bucket] = means[bucket]
    return [[None if value != value else value for value in row] for row in table.flatten(0, 1).tolist()]


def key_counts(model, text: Tensor, words: Wording, lengths, depths, samples: int, late: Callable[[], bool]) -> list[dict]:
    """For each length and depth, of how many documents the key was found. All have one sample before any has two."""
    device = next(model.parameters()).device
    cells = {(length, depth): [0, 0] for length in lengths for depth in depths}
    for sample in range(samples):
        for cell, counts in cells.items():
            if late():
                break
            generator = torch.Generator().manual_seed(sample)
            ids = document(text, words, *cell, generator).to(device)
            counts[0] += finds_key(model, ids)
            counts[1] += 1
    return [{"length": n, "depth": d, "found": found, "asked": asked} for (n, d), (found, asked) in cells.items()]
