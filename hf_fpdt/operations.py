"""
How long a piece of code computes, as a function of how many tokens it is given, learnt from two short runs.

As in `footprint.py`, the same code run with two lengths does the same operations, and the floating-point operations and bytes
of each are `fixed + slope * tokens`. An operation takes the longest of its arithmetic, its memory traffic and its start (the
roofline model, Williams et al. 2009, and a floor); the rates come from the machine (`rates.py`). Nothing is assumed about the
code, but attention is left out of it: `step_time.py` counts that by what queries see.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from .rates import Rates

_MOVES_NOTHING = frozenset({"_unsafe_view", "detach", "lift_fresh", "empty", "empty_like", "empty_strided", "new_empty"})
_NUMBERS = 2  # of an operation: what it computes and what it moves


@dataclass(frozen=True)
class Operations:
    """
    Args:
        fixed, slope: of every operation, floating-point operations and bytes read and written: `fixed + slope * tokens`.
    """

    fixed: Sequence[tuple[float, float]]
    slope: Sequence[tuple[float, float]]

    def seconds(self, tokens: int, rates: Rates) -> float:
        """One after the other."""
        return sum(max(flops / rates.matmul, moved / rates.memory, rates.launch) for flops, moved in self._of(tokens))

    def _of(self, tokens: int) -> Iterator[tuple[float, float]]:
        for fixed, slope in zip(self.fixed, self.slope, strict=True):
            yield tuple(max(fixed[number] + slope[number] * tokens, 0.0) for number in range(_NUMBERS))


@dataclass(frozen=True)
class LayerWork:
    """
    Args:
        forward: one chunk of every sequence of the batch, as in `LayerFootprint`, attention left out.
        backward: the same with gradients, then its backward.
        heads, head_dim, value_dim: of attention, of this process.
        itemsize: bytes of an element of a query.
        batch: sequences.
    """

    forward: Operations
    backward: Operations
    heads: int
    head_dim: int
    value_dim: int
    itemsize: int
    batch: int


@dataclass(frozen=True)
class LossWork:
    """
    Args:
        weights: elements of the head.
        vocab_size: logits of a token.
        itemsize: bytes of one.
        trainable: whether the head is.
        chunks: of the loss.
    """

    weights: int
    vocab_size: int
    itemsize: int
    trainable: bool
    chunks: int


def operations_of(run: Callable[[int], None], lengths: tuple[int, int], *, fused: bool = False) -> Operations:
    """
    Args:
        run: called with a number of tokens.
        lengths: two different numbers of tokens.
        fused: as in `OperationRecorder`.
    """
    short, long = (_record(run, length, fused) for length in lengths)
    if len(short) != len(long):  # what runs depends on the tokens, as with experts
        return Operations([(0.0, 0.0)] * len(long), [tuple(number / lengths[1] for number in one) for one in long])
    grown = lengths[1] - lengths[0]
    slope = [tuple((b - a) / grown for a, b in zip(*pair, strict=True)) for pair in zip(short, long, strict=True)]
    fixed = [tuple(a - s * lengths[0] for a, s in zip(*pair, strict=True)) for pair in zip(short, slope, strict=True)]
    return Operations(fixed, slope)


def _record(run: Callable[[int], None], length: int, fused: bool) -> list[tuple[float, float]]:
    recorder = OperationRecorder(fused)
    with recorder:
        run(length)
    return recorder.operations


class OperationRecorder(TorchDispatchMode):
    """
    Records what torch computes while it is active, in `operations`: `(floating-point operations, bytes read and written)`.

    Args:
        fused: count what is between two matrix products as one kernel, that reads and writes memory once: as Liger's kernels
            do, nearly.
    """

    def __init__(self, fused: bool = False):
        super().__init__()
        self.operations: list[tuple[float, float]] = []
        self._fused = fused
        # By address, for which they are kept: what came of no matrix product and went into none; what was read since the last.
        self._between: dict[int, Tensor] = {}
        self._read: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        inputs, outputs = ([t for t in tree_leaves(one) if isinstance(t, Tensor)] for one in ((args, kwargs), result))
        if _only_names(func):
            self._rename(inputs, outputs)
            return result
        count = flop_registry.get(func.overloadpacket)
        flops = float(count(*args, **(kwargs or {}), out_val=result)) if count is not None else 0.0
        moved = self._moved_fused(inputs, outputs, count is not None) if self._fused else sum(map(_bytes, inputs + outputs))
        self.operations.append((flops, float(moved)))
        return result

    def _rename(self, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        """A view belongs to what it views; memory that nobody has filled yet to what fills it."""
        if self._fused and not inputs:
            self._between.update((_address(t), t) for t in outputs)

    def _moved_fused(self, inputs: list[Tensor], outputs: list[Tensor], product: bool) -> int:
        if product:  # reads what was computed before it, that had to be written
            self._read.clear()
            written = [t for t in inputs if self._between.pop(_address(t), None) is not None]
            return sum(map(_bytes, inputs + outputs + written))
        new = [t for t in inputs if _address(t) not in self._between and _address(t) not in self._read]
        self._read.update((_address(t), t) for t in new)
        self._between.update((_address(t), t) for t in outputs)
        return sum(map(_bytes, new))


def _only_names(func) -> bool:
    """Whether nothing is computed: a view, or memory without content."""
    if func.overloadpacket.__name__ in _MOVES_NOTHING:
        return True
    returns = func._schema.returns
    return bool(returns) and all(one.alias_info is not None and not one.alias_info.is_write for one in returns)


def _bytes(tensor: Tensor) -> int:
    """What is there once of an expanded tensor moves once."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
