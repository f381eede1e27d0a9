"""
One chunk going through one decoder layer: the layer's own forward runs, and where it calls attention, the registered function
finds the active chunk here and lets it attend to everything stored before.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .attention_kernels import AttentionKernel, ScoreRule
from .head_exchange import HeadExchange, NoExchange
from .kernel_choice import choose_kernel
from .key_value_store import ResidentStore, Segments, StreamedStore
from .memory_model import LayerPlacement
from .online_softmax import sinks_grad, with_sinks
from .places import Places
from .run_state import autocast_dtype, no_autocast

_active_chunk: ContextVar["Chunk | None"] = ContextVar("fpdt_active_chunk", default=None)


def active_chunk() -> "Chunk | None":
    """The chunk that is running through a layer at present; its `attend` is the attention of that chunk."""
    return _active_chunk.get()


@contextmanager
def outside_of_chunks() -> Iterator[None]:
    """What is called inside sees no chunk, until a layer of its own runs one."""
    token = _active_chunk.set(None)
    try:
        yield
    finally:
        _active_chunk.reset(token)


@dataclass(frozen=True)
class LayerCall:
    """One call of one decoder layer.

    Args:
        name: what error messages call the layer.
        module: the layer.
        forward: the layer's own forward; `forward(x_chunk, **arguments)` returns the output, or a tuple that starts with it.
        arguments: for a span `(start, stop)`, the keyword arguments of that chunk.
        spans: `(start, stop)` of every chunk in what this process has of the sequence, in order.
        store_spans: the same in the whole sequence. They differ in a sequence-parallel group.
        segments: of every chunk of the whole sequence, by window: what its queries see.
        exchange: between the processes of the group.
        kernel: kernel name as in `FPDTConfig`.
        placement: what is kept for the backward, and where.
        stream_kv: keep K and V in host memory also while the layer runs, and fetch them in blocks.
        places: where tensors wait for the backward; None in a call that keeps nothing.
    """

    name: str
    module: nn.Module
    forward: Callable[..., Any]
    arguments: Callable[[tuple[int, int]], dict[str, Any]]
    spans: Sequence[tuple[int, int]]
    store_spans: Sequence[tuple[int, int]]
    segments: Segments
    exchange: NoExchange | HeadExchange
    kernel: str
    placement: LayerPlacement
    stream_kv: bool
    places: Places | None

    def keep_here(self, tensor: Tensor):
        """Puts a tensor where this call keeps what is needed later."""
        return self.places.keep(tensor, self.placement.place)

    def new_store(self) -> ResidentStore | StreamedStore:
        if self.stream_kv:
            return StreamedStore(self.store_spans, self.segments, self.keep_here, self.places.settle)
        return ResidentStore(self.store_spans, self.segments, self.keep_here)


def run_chunk(call: LayerCall, x_chunk: Tensor, chunk: "Chunk") -> Tensor:
    """The layer's output for `x_chunk [batch, chunk, hidden]`, with the attention of `chunk`."""
    token = _active_chunk.set(chunk)
    try:
        result = call.forward(x_chunk, **call.arguments(chunk.span))
    finally:
        _active_chunk.reset(token)
    if not chunk.attended:
        raise ValueError(
            f"{call.name} did not call attention through transformers' AttentionInterface, so it cannot be streamed. "
            'Use attn_implementation="sdpa" for this model.'
        )
    if torch.is_tensor(result):
        return result
    if any(extra is not None for extra in result[1:]):
        raise ValueError(
            f"{call.name} returns {len(result)} values; only hidden states can be streamed. Turn off the extra outputs "
            "(output_attentions, output_router_logits), or use another attn_implementation."
        )
    return result[0]


class Chunk:
    """The chunk running through a layer, as the attention function sees it."""

    def __init__(self, call: LayerCall, index: int, store: ResidentStore | StreamedStore):
        self.call, self.index, self.span, self.store = call, index, call.spans[index], store
        self.attended = False

    def attend(self, query: Tensor, key: Tensor, value: Tensor, rule: ScoreRule, sinks: Tensor | None = None) -> Tensor:
        """
        Args:
            query, key, value: `[batch, chunk, heads | kv_heads, dim]`, after rotary embedding.
            sinks: `[heads]`: the score of one more key a head, that has no value.

        Returns:
            `out [batch, chunk, heads, value_dim]`.
        """
        if self.attended:
            raise ValueError(
                f"{self.call.name} calls attention more than once, so it cannot be streamed. "
                'Use attn_implementation="sdpa" for this model.'
            )
        self.attended = True
        dtype = autocast_dtype(query.device.type)
        if dtype is not None:  # rotary embedding may have left 16 bits, as for torch's SDPA
            query, key, value = (t.to(dtype) for t in (query, key, value))
        if not query.dtype == key.dtype == value.dtype:
            raise ValueError(
                f"{self.call.name}: query, key and value are {query.dtype}, {key.dtype} and {value.dtype}; they must have one "
                "dtype. Load the model in one dtype, or run it under autocast (bf16=True)."
            )
        sizes = (query.device, query.dtype, query.shape[-1], value.shape[-1])
        how = Attention(choose_kernel(self.call.kernel, *sizes, rule.features), rule, sinks)
        with no_autocast(query.device.type):
            return self._attend(how, query, key, value)

    def _attend(self, how: "Attention", query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        raise NotImplementedError

    def _attend_first(self, how: "Attention", query, key, value) -> tuple[Tensor, Tensor, Tensor]:
        """Stores K and V and attends: the query, out and lse of all tokens of the chunk and this process's heads."""
        query, key, value = self.call.exchange.scatter(query, key, value)
        query = query.contiguous()
        self.store.append(self.index, key, value)
        return query, *self._attend_to_stored(how, query)

    def _attend_to_stored(self, how: "Attention", query: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = self.store.attend(how.kernel, self.index, query, how.rule)
        return (out, lse) if how.sinks is None else with_sinks(out, lse, self.own_sinks(how))

    def own_sinks(self, how: "Attention") -> Tensor:
        """Of this process's heads."""
        return how.sinks.detach()[self.call.exchange.own_heads(how.sinks.shape[0])]


@dataclass(frozen=True)
class Attention:
    """How the heads of a layer attend; `sinks` as in `Chunk.attend`."""

    kernel: AttentionKernel
    rule: ScoreRule
    sinks: Tensor | None


class ForwardChunk(Chunk):
    """
    Stores its K and V and attends.

    Args:
        keep: called with out and lse.
    """

    def __init__(self, call, index, store, keep: Callable[[Tensor, Tensor], None] | None = None):
        super().__init__(call, index, store)
        self._keep = keep

    def _attend(self, how, query, key, value):
        _, out, lse = self._attend_first(how, query, key, value)
        if self._keep is not None:
            self._keep(out, lse)
        return self.call.exchange.gather_heads(out)


class GraphChunk(Chunk):
    """The same with gradients: its graph is kept and no second run follows."""

    def _attend(self, how, query, key, value):
        with torch.no_grad():
            found = self._attend_first(how, query, key, value)
        return _SavedAttention.apply(query, key, value, how.sinks, *found, (self, how))


class BackwardChunk(Chunk):
    """
    The second run, with gradients.

    Args:
        kept: out and lse of the first run, or None to compute them again.
    """

    def __init__(self, call, index, store, kept: tuple | None):
        super().__init__(call, index, store)
        self._kept = kept

    def _attend(self, how, query, key, value):
        with torch.no_grad():
            own_query = self.call.exchange.scatter_heads(query).contiguous()
            if self._kept is not None:
                out, lse = (kept.get() for kept in self._kept)
            else:
                out, lse = self._attend_to_stored(how, own_query)
        return _SavedAttention.apply(query, key, value, how.sinks, own_query, out, lse, (self, how))


class _SavedAttention(torch.autograd.Function):
    """
    Attention whose result is known: returns it, and has the gradient of having computed it.

    Args:
        query, key, value: of this process's tokens.
        sinks: of all heads, or None.
        own_query, out, lse: of all tokens of the chunk and this process's heads.
    """

    @staticmethod
    def forward(ctx, query, key, value, sinks, own_query, out, lse, chunk_and_how):
        ctx.save_for_backward(own_query, out, lse)
        ctx.chunk_and_how, ctx.kv_heads = chunk_and_how, key.shape[2]
        out = chunk_and_how[0].call.exchange.gather_heads(out)
        return out.view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        own_query, out, lse = ctx.saved_tensors
        chunk, how = ctx.chunk_and_how
        exchange = chunk.call.exchange
        grad_out = exchange.scatter_heads(grad_out).contiguous()
        grads = chunk.store.attend_backward(how.kernel, chunk.index, grad_out, own_query, out, lse, how.rule)
        grad_sinks = None
        if ctx.needs_input_grad[3]:
            grad_sinks = torch.zeros_like(how.sinks)  # of the other heads: other processes have them
            own = exchange.own_heads(how.sinks.shape[0])
            grad_sinks[own] = sinks_grad(grad_out, out, lse, how.sinks[own]).to(how.sinks.dtype)
        return *exchange.gather_grads(*grads, ctx.kv_heads), grad_sinks, None, None, None, None
