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

from .attention_kernels import AttentionKernel, ScoreRule, filled
from .head_exchange import HeadExchange, NoExchange
from .head_split import HeadGroup
from .kernel_choice import choose_kernel
from .key_value_store import ResidentStore, Segments, StorePerGroup, StreamedStore
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

    def new_stores(self) -> StorePerGroup:
        if self.stream_kv:
            return StorePerGroup(lambda: StreamedStore(self.store_spans, self.segments, self.keep_here, self.places.settle))
        return StorePerGroup(lambda: ResidentStore(self.store_spans, self.segments, self.keep_here))


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

    def __init__(self, call: LayerCall, index: int, stores: StorePerGroup):
        self.call, self.index, self.span, self.stores = call, index, call.spans[index], stores
        self.attended, self.kernel_name = False, ""

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
        sizes = (query.shape[-1], value_dim := value.shape[-1])
        kernel = choose_kernel(self.call.kernel, query.device, query.dtype, *sizes, rule.features)
        self.kernel_name = kernel.name
        wide, value_wide = kernel.padded(*sizes)
        query, key, value = (filled(t, size) for t, size in ((query, wide), (key, wide), (value, value_wide)))
        with no_autocast(query.device.type):
            out = self._attend(Attention(kernel, rule, sinks), query, key, value)
        return out if value_wide == value_dim else out[..., :value_dim]

    def _attend(self, how: "Attention", query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        raise NotImplementedError

    def _attend_first(self, how: "Attention", query, key, value) -> tuple[list[tuple], Tensor]:
        """
        Stores K and V and attends.

        Returns:
            What `_SavedAttention` takes as `attended`, and out of this process's tokens.
        """
        exchange, groups = self.call.exchange, self.groups_of(query, key)
        coming = [exchange.scatter(group, query, key, value) for group in groups]
        attended, returning = [], []
        for group, arriving in zip(groups, coming, strict=True):
            own_query, own_key, own_value = arriving.get()
            if group.first:
                self.stores.of(group).append(self.index, own_key, own_value)
            own_query = own_query.contiguous()
            out, lse = self._attend_to_stored(how, group, own_query)
            attended.append((own_query, out, lse))
            returning.append(exchange.gather_heads(out))
        return attended, exchange.join_heads(groups, returning)

    def groups_of(self, query: Tensor, key: Tensor) -> Sequence[HeadGroup]:
        return self.call.exchange.groups(query.shape[2], key.shape[2])

    def _attend_to_stored(self, how: "Attention", group: HeadGroup, query: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = self.stores.of(group).attend(how.kernel, self.index, query, how.rule)
        return (out, lse) if how.sinks is None else with_sinks(out, lse, self.own_sinks(how.sinks.detach(), group))

    def own_sinks(self, sinks: Tensor, group: HeadGroup) -> Tensor:
        """Those of a group of this process's heads, a view of `[heads]`."""
        return sinks[self.call.exchange.own_heads(sinks.shape[0])][group.query]


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
        keep: called with out and lse of every group of heads.
    """

    def __init__(self, call, index, stores, keep: Callable[[Tensor, Tensor], None] | None = None):
        super().__init__(call, index, stores)
        self._keep = keep

    def _attend(self, how, query, key, value):
        return self._attend_first(how, query, key, value)[1]

    def _attend_to_stored(self, how, group, query):
        found = super()._attend_to_stored(how, group, query)
        if self._keep is not None:
            self._keep(*found)
        return found


class GraphChunk(Chunk):
    """The same with gradients: its graph is kept and no second run follows."""

    def _attend(self, how, query, key, value):
        with torch.no_grad():
            attended, out = self._attend_first(how, query, key, value)
        return _SavedAttention.apply(query, key, value, how.sinks, out, attended, self, how)


class BackwardChunk(Chunk):
    """
    The second run, with gradients.

    Args:
        kept: out and lse of every group of heads in the first run, or None to compute them again.
    """

    def __init__(self, call, index, stores, kept: Sequence[tuple] | None):
        super().__init__(call, index, stores)
        self._kept = kept
        self._found: list[tuple[Tensor, Tensor]] = []
        self._returning: list = []
        if kept is not None and call.exchange.size > 1:
            self._fetch()  # out is on its way while the layer computes up to attention

    def _attend(self, how, query, key, value):
        exchange, groups = self.call.exchange, self.groups_of(query, key)
        with torch.no_grad():
            queries = [exchange.scatter_heads(group, query) for group in groups]
            if self._kept is None:
                queries = [self._attend_again(how, group, coming.get()) for group, coming in zip(groups, queries, strict=True)]
            elif exchange.size == 1:
                self._fetch()
                queries = [coming.get().contiguous() for coming in queries]
            out = exchange.join_heads(groups, self._returning)
        attended = [(own_query, *found) for own_query, found in zip(queries, self._found, strict=True)]
        self._found = self._returning = []  # the graph has them, as long as it needs them
        return _SavedAttention.apply(query, key, value, how.sinks, out, attended, self, how)

    def _fetch(self) -> None:
        with torch.no_grad():
            self._found = [(out.get(), lse.get()) for out, lse in self._kept]
            self._returning = [self.call.exchange.gather_heads(out) for out, _ in self._found]

    def _attend_again(self, how, group, query: Tensor) -> Tensor:
        query = query.contiguous()
        self._found.append(self._attend_to_stored(how, group, query))
        self._returning.append(self.call.exchange.gather_heads(self._found[-1][0]))
        return query


class _SavedAttention(torch.autograd.Function):
    """
    Attention whose result is known: returns it, and has the gradient of having computed it.

    Args:
        query, key, value, out: of this process's tokens.
        sinks: of all heads, or None.
        attended: for each group of heads, of all tokens of the chunk: query, which may be on its way, out and lse.
    """

    @staticmethod
    def forward(ctx, query, key, value, sinks, out, attended, chunk, how):
        queries, outs, lses = zip(*attended, strict=True)
        ctx.coming = [own_query for own_query in queries if not torch.is_tensor(own_query)]
        ctx.save_for_backward(*outs, *lses, *(own_query for own_query in queries if torch.is_tensor(own_query)))
        ctx.chunk, ctx.how, ctx.groups, ctx.kv_heads = chunk, how, chunk.groups_of(query, key), key.shape[2]
        return out.view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        chunk, how, groups = ctx.chunk, ctx.how, ctx.groups
        exchange, count = chunk.call.exchange, len(ctx.groups)
        outs, lses, queries = (ctx.saved_tensors[at : at + count] for at in (0, count, 2 * count))
        grad_sinks = torch.zeros_like(how.sinks) if ctx.needs_input_grad[3] else None  # other processes have other heads'
        coming = [exchange.scatter_heads(group, grad_out) for group in groups]
        returning = []
        for index, (group, out, lse) in enumerate(zip(groups, outs, lses, strict=True)):
            own_query = queries[index] if queries else ctx.coming[index].get().contiguous()
            own_grad = coming[index].get().contiguous()
            where = how.kernel, chunk.index, own_grad, own_query, out, lse, how.rule
            grads = chunk.stores.of(group).attend_backward(*where, complete=group.last)
            returning.append(exchange.gather_grads(group, *grads, ctx.kv_heads))
            if grad_sinks is not None:
                part = sinks_grad(own_grad, out, lse, chunk.own_sinks(how.sinks, group))
                chunk.own_sinks(grad_sinks, group).copy_(part)
        return *exchange.join_grads(groups, returning, ctx.kv_heads), grad_sinks, None, None, None, None
