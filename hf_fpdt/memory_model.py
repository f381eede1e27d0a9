"""
Peak memory of one training step, from the footprints of its parts. Arithmetic only.

The step is played phase by phase: the forward of every layer, the final norm, the loss, the norm's backward, the backward of
every layer from the last to the first, the embedding's backward. In each the model counts what is alive: what the layers below
keep on the device, what the phase needs for the whole sequence, and the intermediates of one chunk.

    forward of a layer    whole sequence: x, y, K, V, and the first layer's input, which transformers' model holds
    final norm            whole sequence: the first layer's input, the last one's output, its own output; K and V on their way
    loss                  whole sequence: the last norm's output and its gradient, and its input unless that is kept elsewhere;
                          fp32 sums of the head's gradient
    backward of a layer   whole sequence: grad_y (grad_x takes its place where it can), K, V and their fp32 gradients; fp32 sums
                          of the weights' gradients; x, out and lse of this chunk and the next; near the end, what the layer
                          below needs first
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .footprint import Footprint
from .operations import LayerWork, LossWork

ATTENTION_BACKWARD, FORWARD_DONE = "attention_backward", "forward_done"
_INDEX_BYTES = 40  # a token: ids, labels, positions, in int64
_PENDING_SUMS = 2  # blocks of gradient sums on their way to the host when K and V are streamed, see `Transfers.max_pending`


@dataclass(frozen=True)
class LayerPlacement:
    """
    How one layer waits for its backward.

    Args:
        keeps: `"all"`: every activation, on the device; nothing runs again. `"attention"`: x, K, V, out, lse; the layer runs
            again, but not its attention. `"key_value"`: x, K, V; attention runs again as well. `"input"`: x; the layer runs
            twice more. `"nothing"`: it runs again from the nearest layer below that keeps its input.
        place: `"device"`, `"host"` or `"disk"`.
    """

    keeps: str
    place: str


@dataclass(frozen=True)
class LayerFootprint:
    """
    Bytes of one layer; a token unless said otherwise.

    Args:
        hidden: x, and as much for y, grad_y and grad_x.
        key_value, key_value_sums: K and V; their gradients in fp32.
        attention: out and lse.
        weight_grads, weight_sums: all gradients of the trainable weights, and their fp32 sums; bytes in all.
        window: tokens that attention reaches back; None: all.
        workspace: `(queries, keys, block) -> bytes` that the backward of a chunk's attention over so many keys, so many at a
            time, takes at its peak.
        forward: one chunk of every sequence of the batch, without gradients; its tokens are those of one sequence.
        backward: the same with gradients, to the mark `FORWARD_DONE`, then its backward, with the mark `ATTENTION_BACKWARD`.
        work: what it computes, if that was asked for.
    """

    hidden: float
    key_value: float
    key_value_sums: float
    attention: float
    weight_grads: int
    weight_sums: int
    window: int | None
    workspace: Callable[[int, int, int], int]
    forward: Footprint
    backward: Footprint
    work: LayerWork | None = None


@dataclass(frozen=True)
class LossFootprint:
    """
    Bytes of the chunked loss.

    Args:
        chunk: one chunk: logits, their gradient, and the gradient of the head's weights.
        head_grads, head_sums: the gradient of the head's weights, and its fp32 sums; 0 for a frozen head.
        work: what it computes.
    """

    chunk: int
    head_grads: int
    head_sums: int
    work: LossWork


@dataclass(frozen=True)
class ModelFootprint:
    """
    Args:
        layers: from the first to the last; equal ones may be one object.
        loss: None if the caller computes the loss.
        arguments: bytes a token of what the layers are called with (rotary tables).
        resident: bytes on the device before the step: weights, optimizer, gradients that are there.
        other_grads: bytes of the gradients of weights that belong to neither layers nor head.
        grads_held: whether `resident` has the gradients of all weights already.
        passing: bytes of what an engine has under way in any phase: weights that it gathers, gradients that it reduces.
        stepping: bytes that the optimizer's step takes beside `resident`, if that is known.
        grad_y_held: whether an engine holds on to the gradient of a layer's output, whose place that of the input takes else.
    """

    layers: Sequence[LayerFootprint]
    loss: LossFootprint | None
    arguments: float
    resident: int
    other_grads: int
    grads_held: bool
    passing: int = 0
    stepping: int = 0
    grad_y_held: bool = False


@dataclass(frozen=True)
class Peaks:
    """Bytes: most on the device at a time, and the phase it is in; most that waits on the host and on disk."""

    device: int
    phase: str
    host: int
    disk: int


class _ChunkBytes:
    """The intermediates of one chunk of one layer; independent of where things are placed."""

    def __init__(self, layer: LayerFootprint, chunk: int, workspace: float):
        extra = {ATTENTION_BACKWARD: round(workspace)}
        self.forward = layer.forward.peak(chunk)
        self.backward = layer.backward.peak(chunk, extra)
        self.graph = layer.backward.live(chunk, FORWARD_DONE)
        self.graph_backward = layer.backward.peak(chunk, extra, after=FORWARD_DONE) - self.graph


class MemoryModel:
    """
    A step of `model` with `batch` sequences of `seq_len` tokens in chunks of `chunk`.

    Args:
        stream_kv: K and V of the running layer are in blocks on the host instead of whole on the device.
    """

    def __init__(self, model: ModelFootprint, batch: int, seq_len: int, chunk: int, stream_kv: bool):
        self.model, self.seq_len, self.chunk, self.stream_kv = model, seq_len, chunk, stream_kv
        self._tokens, self._chunk_tokens = batch * seq_len, batch * chunk
        self.num_chunks = -(-seq_len // chunk)
        block = chunk if stream_kv else seq_len
        distinct = {id(layer): layer for layer in model.layers}
        self._bytes = {
            key: _ChunkBytes(layer, chunk, layer.workspace(chunk, seq_len, block) + self._blocks(layer))
            for key, layer in distinct.items()
        }

    def peaks(self, placements: Sequence[LayerPlacement], *, reserve: int = 0, grads_held: bool = False) -> Peaks:
        """
        What a step takes with these placements, one a layer.

        Args:
            reserve: bytes on the device to count as taken.
            grads_held: count all gradients as in `reserve`.
        """
        model = self.model
        held = grads_held or model.grads_held
        kept = [self.kept(layer, placement) for layer, placement in zip(model.layers, placements, strict=True)]
        base = model.resident + model.passing + reserve + (model.arguments + _INDEX_BYTES) * self._tokens
        below = 0.0
        phases = []
        for index, layer in enumerate(model.layers):
            phases.append((base + below + self._forward(layer, index), f"forward of layer {index}"))
            below += kept[index] if placements[index].place == "device" else 0
        phases.append((base + below + self._norm(placements[-1]), "final norm"))
        grads = 0 if held or model.loss is None else model.loss.head_grads
        start = base + below + self._prefetched(len(placements) - 1, placements)
        phases.append((start + self._loss(placements[-1]), "loss"))
        for index in reversed(range(len(placements))):
            if placements[index].keeps in ("input", "nothing"):
                again = model.layers[index].hidden * self._tokens + self._forward(model.layers[index], index)
                phases.append((base + below + grads + again, f"forward of layer {index} again"))
            phases.append((base + below + grads + self._backward(index, placements), f"backward of layer {index}"))
            below -= kept[index] if placements[index].place == "device" else 0
            grads += 0 if held else model.layers[index].weight_grads
        end = model.layers[0].hidden * self._tokens + (0 if held else model.other_grads)
        phases.append((base + grads + end, "backward of the embedding"))
        phases.append((model.resident + reserve + model.stepping, "optimizer's step"))
        device, phase = max(phases)
        host, disk = (self._waiting(kept, placements, place) for place in ("host", "disk"))
        return Peaks(round(device), phase, round(host), round(disk))

    def kept(self, layer: LayerFootprint, placement: LayerPlacement) -> float:
        """Bytes that a layer keeps between its passes."""
        per_token = {
            "all": layer.hidden + layer.key_value,
            "attention": layer.hidden + layer.key_value + layer.attention,
            "key_value": layer.hidden + layer.key_value,
            "input": layer.hidden,
            "nothing": 0,
        }[placement.keeps]
        graphs = self._bytes[id(layer)].graph * self.seq_len / self.chunk if placement.keeps == "all" else 0
        return per_token * self._tokens + graphs

    def _forward(self, layer: LayerFootprint, index: int) -> float:
        # K and V of the layer below may still be on their way to the host.
        whole = (2 + (index > 0)) * layer.hidden + (0 if self.stream_kv else (1 + (index > 0)) * layer.key_value)
        chunk = 2 * layer.attention + (2 * self._reach(layer) * layer.key_value if self.stream_kv else 0)
        return whole * self._tokens + chunk * self._chunk_tokens + self._bytes[id(layer)].forward

    def _blocks(self, layer: LayerFootprint) -> float:
        """Of K, V and their gradients, while attention's backward runs over streamed blocks."""
        if not self.stream_kv:
            return 0
        if layer.window is not None:  # all that a chunk reaches together, and their sums as they come back
            return self._reach(layer) * (layer.key_value + 2 * layer.key_value_sums) * self._chunk_tokens
        others = self.num_chunks - 1
        sums = min(others, 2 + _PENDING_SUMS) * layer.key_value_sums
        return (min(others + 1, 2) * layer.key_value + sums) * self._chunk_tokens

    def _reach(self, layer: LayerFootprint) -> int:
        """Blocks of streamed K and V that are on the device together in the forward."""
        return 1 if layer.window is None else min(self.num_chunks, 1 - (1 - layer.window) // self.chunk)

    def _norm(self, last_placement: LayerPlacement) -> float:
        last, away = self.model.layers[-1], last_placement.place != "device"
        whole = 3 * last.hidden + (away and not self.stream_kv) * last.key_value
        # Its output of two chunks; what the last layer kept of the last one, on its way to the host.
        chunk = 2 * last.hidden + away * (last.key_value + last.attention)
        return whole * self._tokens + chunk * self._chunk_tokens

    def _loss(self, last_placement: LayerPlacement) -> float:
        last, loss = self.model.layers[-1], self.model.loss
        kept = last.hidden * self._tokens * (1 + (last_placement.place == "device"))
        return kept if loss is None else kept + last.hidden * self._tokens + loss.chunk + loss.head_sums

    def _backward(self, index: int, placements: Sequence[LayerPlacement]) -> float:
        layer, placement = self.model.layers[index], placements[index]
        chunk, on_device, several = self._bytes[id(layer)], placement.place == "device", self.num_chunks > 1
        whole = layer.hidden * (1 + self.model.grad_y_held)
        if not self.stream_kv:
            whole += layer.key_value_sums + (0 if on_device else layer.key_value)
        # `chunk.backward` has out and lse of the chunk, as if they were its own.
        fetched = 0 if on_device else layer.hidden
        ahead = 0 if on_device else layer.hidden + layer.attention * (placement.keeps != "key_value")
        run = chunk.graph_backward if placement.keeps == "all" else chunk.backward
        total = whole * self._tokens + fetched * self._chunk_tokens + run + (layer.weight_sums if several else 0)
        last = self._prefetched(index - 1, placements) if index else 0
        return total + max(ahead * self._chunk_tokens if several else 0, last)

    def _prefetched(self, index: int, placements: Sequence[LayerPlacement]) -> float:
        """What is fetched of a layer before its backward starts."""
        layer, placement = self.model.layers[index], placements[index]
        if placement.place == "device" or placement.keeps in ("input", "nothing"):
            return 0
        attention = layer.attention if placement.keeps == "attention" else 0
        whole = layer.key_value * (self._chunk_tokens if self.stream_kv else self._tokens)
        return whole + (layer.hidden + attention) * self._chunk_tokens

    def _waiting(self, kept: Sequence[float], placements: Sequence[LayerPlacement], place: str) -> float:
        total, most = 0.0, 0.0
        for layer, size, placement in zip(self.model.layers, kept, placements, strict=True):
            total += size if placement.place == place else 0
            if place == "host" and self.stream_kv:  # in its backward, with all below it still waiting
                most = max(most, total + layer.key_value_sums * (self._tokens - self._chunk_tokens))
        if placements[-1].place == place:
            total += self.model.layers[-1].hidden * self._tokens  # the input of the final norm, gone before that backward
        most = max(most, total)
        if place == "host" and any(placement.place == "disk" for placement in placements):
            most += self._through_host()
        return most + self._rebuilt(placements, place)

    def _through_host(self) -> float:
        """Host memory that tensors pass through on their way to the disk and back: those of two layers and a few chunks."""
        layer = max(self.model.layers, key=lambda layer: layer.hidden + layer.attention + layer.key_value)
        whole = layer.key_value * (self._chunk_tokens if self.stream_kv else self._tokens)
        return 2 * whole + 4 * (layer.hidden + layer.attention) * self._chunk_tokens

    def _rebuilt(self, placements: Sequence[LayerPlacement], place: str) -> float:
        """The most that one group of layers takes when it runs again."""
        most = group = 0.0
        for layer, placement in zip(self.model.layers, placements, strict=True):
            if placement.place == place and placement.keeps in ("input", "nothing"):
                full = (layer.hidden + layer.key_value + layer.attention) * self._tokens
                group = (0.0 if placement.keeps == "input" else group) + full
                most = max(most, group)
        return most
