"""One forward of a model whose layers stream: what its layers, masks and norms need to know of it, and of no other."""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial

import torch
from torch import Tensor

from .documents import Documents
from .flops import attention_flops
from .head_exchange import HeadExchange, MeasuredExchange, NoExchange
from .layer_chunk import Chunk, LayerCall, outside_of_chunks
from .layer_footprint import footprint_of_layer
from .layer_stream import SavedLayer, stream_layer
from .memory_model import LayerFootprint, LayerPlacement
from .places import Places
from .step_plan import Plan
from .work import Work

_active_pass: ContextVar["StreamedPass | MeasuringPass | None"] = ContextVar("fpdt_active_pass", default=None)


class StreamedPass:
    """
    A forward that follows a plan.

    Args:
        kernel: as in `FPDTConfig`.
        places: where tensors wait for the backward.
        exchange: between the processes that share the sequence.
        documents: what attention keeps apart; None: every row is one.
        work: where what it does is counted; None: nowhere.

    `seq_len` counts all tokens of a sequence, `local_len` those that this process has; `spans` and `store_spans` are chunks of
    the latter and the former; `segments` those of every chunk, by the window of a layer.
    """

    def __init__(
        self,
        plan: Plan,
        kernel: str,
        places: Places,
        exchange: NoExchange | HeadExchange,
        documents: Documents | None = None,
        work: Work | None = None,
    ):
        self.work = work
        self.plan, self.kernel, self.places, self.exchange = plan, kernel, places, exchange
        self.stream_kv, self.seq_len, self.local_len = plan.stream_kv, plan.seq_len, plan.layout.local_len
        self.whole_len = plan.seq_len
        self.spans, self.store_spans = plan.layout.local_spans, plan.layout.spans
        documents = Documents.whole(plan.batch_size, plan.seq_len) if documents is None else documents
        self.segments = cache(partial(documents.segments, self.store_spans))  # no method: layers must not refer to the pass
        segments = self.segments
        self._pairs = cache(lambda window: [sum(one.pairs(window) for one in chunk) for chunk in segments(window)])
        self.last_saved: SavedLayer | None = None
        self._documents, self._layers_run = documents, 0

    def next_placement(self) -> LayerPlacement:
        """That of the layer that runs now; a model that calls more layers than it has gives the others that of the last."""
        placements = self.plan.placements
        self._layers_run += 1
        return placements[min(self._layers_run, len(placements)) - 1]

    def keep_last(self, tensor: Tensor):
        """Keeps what comes after the last layer, where that layer keeps its own."""
        return self.places.keep(tensor, self.plan.placements[-1].place)

    def run(self, call: LayerCall, x: Tensor, weights: Sequence[Tensor], kind: Hashable) -> Tensor:
        y, self.last_saved = stream_layer(call, x, weights, self.last_saved)
        return y

    def count_tokens(self) -> None:
        """Those of this process have gone through all layers."""
        if self.work is not None:
            own = self._documents.segments(self.plan.layout.spans_of(self.exchange.rank))
            self.work.tokens += sum(segment.tokens for segments in own for segment in segments)

    def count_attention(self, chunk: Chunk, query: Tensor, value: Tensor, window: int | None) -> None:
        """A chunk `[batch, chunk, heads, dim]` has attended; every process of a group does its part of the heads."""
        if self.work is not None:
            flops = attention_flops(self._pairs(window)[chunk.index], query.shape[2], query.shape[3], value.shape[3])
            self.work.attention_flops += flops // self.exchange.size
            self.work.kernels[chunk.kernel_name] = None


class MeasuringPass:
    """
    A forward of a few tokens that runs no layer, but takes the footprint of each kind of layer; in order in `layers`.

    Args:
        whole_len: tokens of the sequence that is planned: a window that is as long is none.
        timed, fused: as in `footprint_of_layer`.
    """

    stream_kv, places, segments = False, None, None  # nothing is kept and nobody attends

    def __init__(
        self,
        local_len: int,
        whole_len: int,
        kernel: str,
        exchange: NoExchange | MeasuredExchange,
        *,
        timed: bool = False,
        fused: bool = False,
    ):
        self._measured = {"timed": timed, "fused": fused}
        self.local_len, self.seq_len, self.whole_len = local_len, local_len * exchange.size, whole_len
        self.kernel, self.exchange = kernel, exchange
        self.spans, self.store_spans = [(0, local_len)], [(0, self.seq_len)]
        self.layers: list[LayerFootprint] = []
        self.argument_bytes = 0.0
        self._known: dict[Hashable, LayerFootprint] = {}

    def count_attention(self, chunk: Chunk, query: Tensor, value: Tensor, window: int | None) -> None:
        """Nobody attends."""

    def keep_last(self, tensor: Tensor):
        raise AssertionError("nothing is kept while a model is measured")

    def next_placement(self) -> LayerPlacement:
        return LayerPlacement("attention", "device")

    def run(self, call: LayerCall, x: Tensor, weights: Sequence[Tensor], kind: Hashable) -> Tensor:
        if kind not in self._known:
            self._known[kind] = footprint_of_layer(call, x, weights, **self._measured)
            self.argument_bytes = max(self.argument_bytes, _bytes_a_token(call.arguments((0, self.local_len)), x))
        self.layers.append(self._known[kind])
        return x


def active_pass() -> StreamedPass | MeasuringPass | None:
    """The pass that is running, or None if the model runs unstreamed."""
    return _active_pass.get()


@contextmanager
def running(one: StreamedPass | MeasuringPass | None) -> Iterator[None]:
    """
    What is called inside follows this pass, or none, whatever pass or chunk it is called from: a hook on a layer may run
    another model, or the same one unstreamed.
    """
    token = _active_pass.set(one)
    try:
        with outside_of_chunks():
            yield
    finally:
        _active_pass.reset(token)


def _bytes_a_token(arguments: dict, x: Tensor) -> float:
    """Of the tensors that a layer is called with, each counted once."""
    flat = [v for value in arguments.values() for v in (value if isinstance(value, tuple | list) else (value,))]
    tensors = {id(v): v for v in flat if torch.is_tensor(v) and x.shape[1] in v.shape[:2]}
    return sum(v.nbytes for v in tensors.values()) / (x.shape[0] * x.shape[1])
