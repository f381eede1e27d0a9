"""
Documents in which keys are told and asked for later, in token ids, for `quality.py`. A key is told as

    # The pass key of <name><digit><digit><digit><digit><digit>

on a line of its own, with a name of one token and a token for each digit, and asked for by the same line up to the name. A
model that has learnt to look for the same words further up, as models do early, finds the digits.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

KEY_LEN = 5  # digits
_WORDS = "\n# The pass key of"


@dataclass(frozen=True)
class Wording:
    """Token ids: what comes before a name, `names` to choose from, the ten digits, what ends the line."""

    before: Tensor
    names: Tensor
    digits: Tensor
    after: Tensor

    @property
    def length(self) -> int:
        """Tokens of a line."""
        return len(self.before) + 1 + KEY_LEN + len(self.after)

    def lines(self, count: int, generator: torch.Generator) -> Tensor:
        """`[count, length]`, each with a name and a key of its own; names are different as long as there are enough."""
        order = torch.randperm(len(self.names), generator=generator)
        names = self.names[order.repeat(-(-count // len(order)))[:count]][:, None]
        keys = self.digits[torch.randint(len(self.digits), (count, KEY_LEN), generator=generator)]
        before, after = (part.expand(count, -1) for part in (self.before, self.after))
        return torch.cat([before, names, keys, after], dim=1)

    @property
    def key(self) -> slice:
        """Where a line has its digits."""
        return slice(len(self.before) + 1, len(self.before) + 1 + KEY_LEN)


def wording(tokenizer) -> Wording:
    """Of a byte-level tokenizer. Names are whole lower-case words that are one token."""

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    space = ids(" ")[0] if len(ids(" ")) == 1 else None
    words = [(word, index) for word, index in tokenizer.get_vocab().items() if word[1:].isalpha() and word[1:].islower()]
    mark = tokenizer.convert_ids_to_tokens(space)
    names = sorted(index for word, index in words if word.startswith(mark) and len(word) > 3)
    digits = [tokenizer.convert_tokens_to_ids(str(digit)) for digit in range(10)]
    if not names or len(set(digits)) < 10:
        raise ValueError(
            f"this tokenizer has {len(names)} words of one token and {len(set(digits))} digits; take a larger one."
        )
    return Wording(*(torch.tensor(one) for one in (ids(_WORDS), names, digits, ids("\n"))))


def document(text: Tensor, words: Wording, length: int, depth: float, generator: torch.Generator) -> Tensor:
    """
    `length` tokens that end with a question and its answer of KEY_LEN tokens. The key is told once, before it, after the
    fraction `depth` of the text: at 0 it is the first line, at 1 the line before the question.
    """
    line = words.lines(1, generator)[0]
    question = line[: words.key.stop]
    filler = text_of(text, length - len(line) - len(question), generator)
    return insert(filler, [(round(depth * len(filler)), line)], question)


def keyed_row(text: Tensor, words: Wording, length: int, keys: int, generator: torch.Generator) -> Tensor:
    """
    `length` tokens of text with so many keys, each told once and asked for, with the answer, once. Between the two are from no
    tokens of text to all of it, half of them uniformly spread and half in their logarithm.
    """
    lines = words.lines(keys, generator)
    filler = text_of(text, length - 2 * lines.numel(), generator)
    part = torch.rand(keys, generator=generator)
    apart = torch.where(torch.arange(keys) % 2 == 0, part, torch.exp((part - 1) * math.log(len(filler) + 1))) * len(filler)
    told = torch.rand(keys, generator=generator) * (len(filler) - apart)
    pieces = [(int(at), line) for at, line in zip(told, lines, strict=True)]  # a sort keeps the told ones before
    return insert(filler, pieces + [(int(at), line) for at, line in zip(told + apart, lines, strict=True)])


def repeated_row(text: Tensor, words: Wording, length: int, generator: torch.Generator) -> Tensor:
    """
    `length` tokens: spans of random tokens of the text, and of names and digits, by turns, each told twice in a row. No two
    need be of one length, so that the second cannot be told from how far back the first is.
    """
    found, tokens, lines = [], 0, torch.cat([words.names, words.digits.repeat(len(words.names) // 10 + 1)])
    while tokens < length:
        span = int(torch.randint(4, max(min(length // 4, 128), 5), (1,), generator=generator))
        source = text if len(found) % 4 == 0 else lines
        found += [source[torch.randint(len(source), (span,), generator=generator)]] * 2
        tokens += 2 * span
    return torch.cat(found)[:length]


def text_of(text: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """So many tokens of the text from anywhere on; it goes on at its start after its end."""
    if length < 0:
        raise ValueError(f"{-length} tokens too many are asked for: give a longer row, or fewer keys.")
    start = int(torch.randint(len(text), (1,), generator=generator))
    found = text[start : start + length]
    while len(found) < length:
        found = torch.cat([found, text[: length - len(found)]])
    return found


def insert(text: Tensor, pieces: list[tuple[int, Tensor]], end: Tensor | None = None) -> Tensor:
    """The text with each piece put in before the token of that number, those of one place in the given order, and the end."""
    found, last = [], 0
    for at, piece in sorted(pieces, key=lambda one: one[0]):
        found += [text[last:at], piece]
        last = at
    return torch.cat([*found, text[last:], *([] if end is None else [end])])
