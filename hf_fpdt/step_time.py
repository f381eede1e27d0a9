"""
Seconds of a step's forward and backward, from what its parts compute and move and what the machine does in a second. Arithmetic
only.

    a layer's forward     its operations, chunk by chunk; attention over what queries see
    a layer's backward    its operations again and their gradients, attention's gradient, attention again unless it was saved,
                          fp32 sums of the weights' gradients
    the loss              the head's products forward and backward, logits and their gradient, sums of the head's gradient
    copies                run under the compute of the layer whose tensors they are; what takes longer than it is waited for
    processes             heads for sequence and back, gathered weights and reduced gradients, at the rate of the link, as if
                          none of it ran under the compute: what does is little beside the rest

Not counted: the optimizer, the data. The rates are those of bfloat16.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from .flops import attention_flops
from .memory_model import LayerFootprint, LayerPlacement, MemoryModel
from .rates import Rates

_WIDE = 4  # bytes of a sum in fp32
_LOGIT_PASSES = 2  # over the logits of a chunk, besides those of the head's products: read, and their gradient written


@dataclass(frozen=True)
class StepTime:
    """
    Seconds.

    Args:
        forward, loss, backward: of computing.
        copies: of copies between GPU and host, in both directions.
        waited: of them, what compute is not long enough to hide.
        exchanged: of communication between processes.
    """

    forward: float
    loss: float
    backward: float
    copies: float
    waited: float
    exchanged: float = 0.0

    @property
    def total(self) -> float:
        """Forward and backward of one step."""
        return self.forward + self.loss + self.backward + self.waited + self.exchanged


class TimeModel:
    """
    The step of which `memory` is the model.

    Args:
        memory: its layers have their `work`, and its loss, if it has one.
        rates: of the machine; with a `link`, if anything is sent.
        ranks: processes that share every sequence, of which this one's part is in `memory`.
        sent: bytes that leave this process for weights and their gradients.
    """

    def __init__(self, memory: MemoryModel, rates: Rates, *, ranks: int = 1, sent: float = 0.0):
        self._memory, self._rates, self._ranks, self._sent = memory, rates, ranks, sent
        self._chunks = _chunks(memory.seq_len, memory.chunk)
        distinct = {id(layer): layer for layer in memory.model.layers}
        self._layers = {key: self._computing(layer) for key, layer in distinct.items()}

    def step(self, placements: Sequence[LayerPlacement]) -> StepTime | None:
        """With these placements, one a layer; None if something waits on a disk, or is sent over a link, of unknown rate."""
        alone = self._ranks == 1 and not self._sent
        if any(placement.place == "disk" for placement in placements) or (self._rates.link is None and not alone):
            return None
        forward = backward = copies = waited = 0.0
        sent = self._sent
        for layer, placement in zip(self._memory.model.layers, placements, strict=True):
            there, back = self._passes(self._layers[id(layer)], placement)
            moved, returned = self._copies(layer, placement)
            forward, backward, copies = forward + there, backward + back, copies + sum(moved) + sum(returned)
            waited += max(0.0, max(moved) - there) + max(0.0, max(returned) - back)
            sent += self._exchanged(layer, placement)
        return StepTime(forward, self._loss(), backward, copies, waited, 0.0 if alone else sent / self._rates.link)

    def _computing(self, layer: LayerFootprint) -> "_LayerSeconds":
        work, rates, sums = layer.work, self._rates, 0.0
        forward, backward = (
            sum(one.seconds(tokens, rates) for tokens in self._chunks) for one in (work.forward, work.backward)
        )
        if len(self._chunks) > 1:  # a gradient is read and its sum read and written
            sums = len(self._chunks) * (layer.weight_grads + 2 * layer.weight_sums) / rates.memory
        merged = self._merged_bytes(layer) / rates.memory
        attention = [seconds + merged for seconds in self._attending(layer)]
        return _LayerSeconds(forward, backward + sums, *attention)

    def _attending(self, layer: LayerFootprint) -> tuple[float, float]:
        """Seconds of attention's forward and backward in all chunks."""
        work, rates = layer.work, self._rates.attention_of(layer.work.head_dim)
        ranks, window = self._ranks, layer.window
        diagonal = work.batch * sum(tokens * ranks * (tokens * ranks + 1) // 2 for tokens in self._chunks)
        pairs = work.batch * _pairs(self._memory.seq_len * ranks, None if window is None else window * ranks)
        flops = [
            attention_flops(count, work.heads, work.head_dim, work.value_dim) / 3
            for count in (min(pairs, diagonal), max(0, pairs - diagonal))
        ]
        forward = flops[0] / rates.forward_diagonal + flops[1] / rates.forward
        return forward, 2 * (flops[0] / rates.backward_diagonal + flops[1] / rates.backward)

    def _merged_bytes(self, layer: LayerFootprint) -> float:
        """Of outputs (or gradients of queries) in fp32 that blocks of streamed K and V are added to, read and written."""
        wide = self._ranks * layer.work.heads * layer.work.value_dim * _WIDE
        return self._block_pairs(layer) * layer.work.batch * self._memory.chunk * 3 * wide if self._memory.stream_kv else 0.0

    def _block_pairs(self, layer: LayerFootprint) -> int:
        """How often a chunk meets an earlier one's keys."""
        count = len(self._chunks)
        most = count if layer.window is None else 1 + (layer.window - 2) // self._memory.chunk
        return sum(min(index, most) for index in range(count))

    def _passes(self, own: "_LayerSeconds", placement: LayerPlacement) -> tuple[float, float]:
        """Seconds of a layer's forward and of all that runs for its backward."""
        there, back = own.forward + own.attention, own.backward + own.attention_backward
        if placement.keeps == "all":
            back -= own.forward
        if placement.keeps == "key_value":
            back += own.attention
        if placement.keeps in ("input", "nothing"):
            back += there
        return there, back

    def _copies(self, layer: LayerFootprint, placement: LayerPlacement) -> tuple[tuple[float, float], tuple[float, float]]:
        """Seconds of copies to the host and to the device, in the forward and in the backward."""
        kept = self._memory.kept(layer, placement) if placement.place == "host" else 0.0
        blocks = 0.0
        if self._memory.stream_kv:
            blocks = self._block_pairs(layer) * layer.work.batch * self._memory.chunk
        to_host, to_device = self._rates.to_host, self._rates.to_device
        forward = kept / to_host, blocks * layer.key_value / to_device
        sums = blocks * layer.key_value_sums
        return forward, (sums / to_host, (kept + blocks * layer.key_value + sums) / to_device)

    def _exchanged(self, layer: LayerFootprint, placement: LayerPlacement) -> float:
        """Bytes that leave this process in exchanges of heads (`head_exchange.py`)."""
        work = layer.work
        each = self._ranks * work.heads * work.itemsize
        query, key_value, out = each * work.head_dim, layer.key_value, each * work.value_dim
        there, back = query + key_value + out, 2 * query + key_value + 2 * out
        if placement.keeps == "all":
            back -= query + out
        if placement.keeps in ("input", "nothing"):
            back += there
        tokens = work.batch * self._memory.seq_len
        return (there + back) * tokens * (self._ranks - 1) / self._ranks

    def _loss(self) -> float:
        loss = self._memory.model.loss
        if loss is None:
            return 0.0
        work, tokens = loss.work, self._memory.seq_len * self._memory.model.layers[0].work.batch
        seconds = 2 * (2 + work.trainable) * tokens * work.weights / self._rates.matmul
        moved = _LOGIT_PASSES * tokens * work.vocab_size * work.itemsize
        if work.trainable and work.chunks > 1:
            moved += work.chunks * work.weights * (work.itemsize + 2 * _WIDE)
        return seconds + moved / self._rates.memory


@dataclass(frozen=True)
class _LayerSeconds:
    """Of all chunks; `backward` runs the layer again, but not its attention."""

    forward: float
    backward: float
    attention: float
    attention_backward: float


def _chunks(seq_len: int, chunk: int) -> list[int]:
    """Tokens of every chunk."""
    return [min(chunk, seq_len - start) for start in range(0, seq_len, chunk)]


def _pairs(seq_len: int, window: int | None) -> int:
    """Of a query and a key that it sees, in one sequence."""
    seen = seq_len if window is None else min(window, seq_len)
    return seen * (seen + 1) // 2 + (seq_len - seen) * seen
