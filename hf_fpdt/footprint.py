"""
How much memory a piece of code needs, as a function of how many tokens it is given, learnt from two short runs.

A run of `n` tokens is recorded as the list of its allocations and frees, in order. Run twice, with few tokens, the same code
makes the same list with other sizes, and every size is `fixed + slope * n`: weights and their gradients are fixed, activations
grow. The list can then be played for any number of tokens, and its highest point is the peak, whichever allocation dominates at
that length. Nothing is assumed about the code: adapters, experts, fused kernels are in the list because they ran.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ALLOCATE, FREE, MARK = "allocate", "free", "mark"


@dataclass(frozen=True)
class Footprint:
    """
    Args:
        events: `(ALLOCATE | FREE, index of the allocation)` or `(MARK, name)`, in the order they happened.
        fixed, slope: bytes of every allocation: `fixed + slope * tokens`.
    """

    events: Sequence[tuple[str, int | str]]
    fixed: Sequence[float]
    slope: Sequence[float]

    def peak(self, tokens: int, extra: Mapping[str, int] | None = None, *, after: str | None = None) -> int:
        """
        Most bytes alive at a time; at the mark `name`, `extra[name]` more, for what the recorded run left out.

        Args:
            after: a mark: only from there on.
        """
        highest, counts = 0.0, after is None
        for live, mark in self._timeline(tokens):
            counts = counts or mark == after
            if counts:
                highest = max(highest, live + (extra or {}).get(mark, 0))
        return round(highest)

    def live(self, tokens: int, mark: str) -> int:
        """Bytes alive at the first mark of this name."""
        return round(next(live for live, name in self._timeline(tokens) if name == mark))

    def _timeline(self, tokens: int) -> Iterator[tuple[float, str | None]]:
        """Bytes alive after every event, and its name if it is a mark."""
        live = 0.0
        for kind, value in self.events:
            if kind != MARK:
                size = self.fixed[value] + self.slope[value] * tokens
                live += size if kind == ALLOCATE else -size
            yield live, (value if kind == MARK else None)


def footprint_of(
    run: Callable[[int, "MemoryRecorder"], None], lengths: tuple[int, int], constant: Set[int] = frozenset()
) -> Footprint:
    """
    Args:
        run: called with a number of tokens and the recorder, whose `mark` it may call; keeps nothing.
        lengths: two different numbers of tokens.
        constant: sizes in bytes that are those of weights, for code that makes other allocations with other tokens. They count
            as such if both lengths have them: what grows and has the size of a weight by chance has it in one.
    """
    short, long = (_record(run, length) for length in lengths)
    if [event[:2] for event in short] != [event[:2] for event in long]:
        return _proportional(long, lengths[1], constant & _sizes(short))  # what runs depends on the tokens, as with experts
    few, many = ([size for kind, _, size in log if kind == ALLOCATE] for log in (short, long))
    slope = [(b - a) / (lengths[1] - lengths[0]) for a, b in zip(few, many, strict=True)]
    fixed = [a - s * lengths[0] for a, s in zip(few, slope, strict=True)]
    return Footprint([event[:2] for event in long], fixed, slope)


def _record(run, length: int) -> list[tuple]:
    recorder = MemoryRecorder()
    with recorder:
        run(length, recorder)
    return recorder.log


def _sizes(log: list[tuple]) -> set[int]:
    return {size for kind, _, size in log if kind == ALLOCATE}


def _proportional(log: list[tuple], length: int, constant: Set[int]) -> Footprint:
    """From one run: everything grows but what has the size of a weight. Rather too much than too little."""
    sizes = [size for kind, _, size in log if kind == ALLOCATE]
    fixed = [float(size) if size in constant else 0.0 for size in sizes]
    slope = [0.0 if size in constant else size / length for size in sizes]
    return Footprint([event[:2] for event in log], fixed, slope)


class MemoryRecorder(TorchDispatchMode):
    """
    Records what is allocated and freed by torch's operations while it is active, in `log`: `(ALLOCATE | FREE, index, bytes)`
    and `(MARK, name, 0)`. Memory that existed before is not counted, nor what operations hold only while they run.
    """

    def __init__(self):
        super().__init__()
        self.log: list[tuple] = []
        self._seen: dict[int, weakref.ref] = {}  # by address: storages that are alive
        self._count = 0

    def mark(self, name: str) -> None:
        self.log.append((MARK, name, 0))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self._see(tensor, counts=False)
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor, counts=True)
        return result

    def _see(self, tensor: Tensor, counts: bool) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._seen:
            return
        index, size = self._count, storage.nbytes()
        if counts:
            self._count += 1
            self.log.append((ALLOCATE, index, size))

        recorder = weakref.ref(self)

        def freed(_) -> None:
            owner = recorder()
            if owner is not None and owner._seen.pop(address, None) is not None and counts:
                owner.log.append((FREE, index, size))

        self._seen[address] = weakref.ref(storage, freed)
