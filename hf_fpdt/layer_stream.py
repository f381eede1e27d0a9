"""
One decoder layer, streamed: its own forward runs chunk by chunk, in both passes (FPDT, arXiv 2408.16978, section 3).

A decoder layer works on every token alone, except in attention, and causal attention of a chunk needs only the keys and
values up to the chunk's end. So the layer's unmodified forward is called once per chunk; where it calls attention, the
registered function finds the active chunk here and lets it attend to everything stored before.

    forward   for i in 0..n-1:  y_i = layer(x_i);  inside: K_i, V_i stored, out_i = attention(q_i, K_0..i, V_0..i)
              kept for the backward: x_i, out_i, lse_i per chunk, K and V once, the random state of every chunk
    backward  for i in n-1..0:  y_i = layer(x_i) again, with out_i from the forward in place of attention
              grad_x_i, grad_weights += autograd.grad(y_i, (x_i, weights), grad_y_i)
              inside: grad_q_i, and grad_K_0..i, grad_V_0..i += (fp32); those of chunk i are then complete

The last chunk goes first in the backward because grad_K_i and grad_V_i have contributions from the queries of chunks i..n-1.

The layer is one `autograd.Function` whose inputs are `x` and every trainable weight. Each weight gets exactly one gradient, so
whatever counts or reduces gradients (DDP, ZeRO, FSDP2, a loss scale applied later) sees an ordinary layer. It is its own
activation checkpoint. On the device it holds x, y, K, V (backward: grad_y, grad_x, K, V, fp32 grad_K and grad_V) and the
intermediates of one chunk, O(chunk).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .gradient_sum import GradientSum
from .kernel_choice import choose_kernel
from .key_value_store import ResidentStore, StreamedStore
from .run_state import AutocastState, RandomState, no_autocast, preserved_random_state
from .transfers import keep_for_backward
from .unchanged import UnchangedModule

_active_chunk: ContextVar["_Chunk | None"] = ContextVar("fpdt_active_chunk", default=None)


def active_chunk() -> "_Chunk | None":
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
        spans: `(start, stop)` of every chunk, in order.
        kernel: kernel name as in `FPDTConfig`.
        save_attention: keep out and lse for the backward.
        offload: keep what the backward needs in host memory.
        stream_kv: keep K and V in host memory also while the layer runs, and fetch them in blocks.
    """

    name: str
    module: nn.Module
    forward: Callable[..., Any]
    arguments: Callable[[tuple[int, int]], dict[str, Any]]
    spans: Sequence[tuple[int, int]]
    kernel: str
    save_attention: bool
    offload: bool
    stream_kv: bool

    def keep(self, tensor: Tensor):
        """Puts a tensor where this call keeps what is needed later."""
        return keep_for_backward(tensor, on_host=self.offload)

    def new_store(self) -> ResidentStore | StreamedStore:
        return (StreamedStore if self.stream_kv else ResidentStore)(self.spans, self.keep)


def stream_layer(call: LayerCall, x: Tensor, weights: Sequence[Tensor], previous: "SavedLayer | None"):
    """
    Runs the layer on `x [batch, seq_len, hidden]`.

    Args:
        weights: the layer's trainable parameters.
        previous: what the layer before this one saved, if it did: the backward fetches it early.

    Returns:
        The output, and what was saved for the backward (None without gradients).
    """
    if not (torch.is_grad_enabled() and (x.requires_grad or weights)):
        return _forward_chunks(call, x, saved=None), None
    saved = SavedLayer(call, x, previous)
    return _StreamedLayer.apply(saved, x, *weights), saved


class SavedLayer:
    """What one layer keeps between its two passes."""

    def __init__(self, call: LayerCall, x: Tensor, previous: "SavedLayer | None"):
        self.call = call
        self.previous = previous
        self.unchanged = UnchangedModule(call.module, call.name)
        self.autocast = AutocastState(x.device.type)
        self.random: list[RandomState] = []
        self.inputs: list = []
        self.attention: list = []  # per chunk: (out, lse), if saved
        self.store = call.new_store()
        self.spent = False

    def begin_chunk(self, x_chunk: Tensor) -> None:
        self.random.append(RandomState(x_chunk.device))
        self.inputs.append(self.call.keep(x_chunk))

    def keep_attention(self, out: Tensor, lse: Tensor) -> None:
        if self.call.save_attention:
            self.attention.append((self.call.keep(out), self.call.keep(lse)))

    def chunk_tensors(self, index: int) -> tuple:
        return (self.inputs[index], *(self.attention[index] if self.attention else ()))

    def prefetch_first(self) -> None:
        """Starts the copies that this layer's backward needs first, if it is still to run."""
        if self.spent:
            return
        self.store.prefetch()
        self.prefetch_chunk(-1)

    def prefetch_chunk(self, index: int) -> None:
        for kept in self.chunk_tensors(index):
            kept.prefetch()

    def release_chunk(self, index: int) -> None:
        for kept in self.chunk_tensors(index):
            kept.release()


class _StreamedLayer(torch.autograd.Function):
    """`(x, *weights) -> y`; see the module. `saved` is no tensor: nothing of it is packed by checkpoint or offload hooks."""

    @staticmethod
    def forward(ctx, saved, x, *weights):
        ctx.saved, ctx.weights = saved, weights
        with saved.autocast.context():
            return _forward_chunks(saved.call, x, saved)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        saved = ctx.saved
        if saved.spent:
            raise RuntimeError(
                f"{saved.call.name}: backward through a streamed layer a second time. What it saved was released by the "
                "first backward; retain_graph=True is not supported with attn_implementation='fpdt'."
            )
        saved.unchanged.check()
        saved.spent = True
        with preserved_random_state(grad_y.device), no_autocast(grad_y.device.type):
            grad_x, grad_weights = _backward_chunks(saved, ctx.weights, grad_y, ctx.needs_input_grad[1])
        ctx.weights = None
        return None, grad_x, *grad_weights


def _forward_chunks(call: LayerCall, x: Tensor, saved: SavedLayer | None) -> Tensor:
    store, y = (call.new_store() if saved is None else saved.store), None
    for index, span in enumerate(call.spans):
        x_chunk = x[:, slice(*span)]
        if saved is not None:
            saved.begin_chunk(x_chunk)
        y_chunk = _run_chunk(call, x_chunk, _ForwardChunk(call, index, store, saved))
        if y is None:
            y = y_chunk.new_empty(x.shape[0], x.shape[1], *y_chunk.shape[2:])
        y[:, slice(*span)] = y_chunk
    if saved is None:
        store.release()
    else:
        store.end_forward()
    return y


def _backward_chunks(saved: SavedLayer, weights: Sequence[Tensor], grad_y: Tensor, needs_grad_x: bool):
    call, store = saved.call, saved.store
    store.begin_backward()
    sums, grad_x = GradientSum(len(call.spans)), None
    for index in reversed(range(len(call.spans))):
        if index > 0:
            saved.prefetch_chunk(index - 1)
        elif saved.previous is not None:
            saved.previous.prefetch_first()
        span = call.spans[index]
        x_chunk = saved.inputs[index].get().detach().requires_grad_(needs_grad_x)
        saved.random[index].set()
        chunk = _BackwardChunk(call, index, store, saved.attention[index] if saved.attention else None)
        with torch.enable_grad(), saved.autocast.context():
            y_chunk = _run_chunk(call, x_chunk, chunk)
        inputs = (x_chunk, *weights) if needs_grad_x else weights
        grads = torch.autograd.grad(y_chunk, inputs, grad_y[:, slice(*span)], allow_unused=True)
        if needs_grad_x:
            grad_x = torch.empty_like(grad_y, dtype=x_chunk.dtype) if grad_x is None else grad_x
            grad_x[:, slice(*span)] = grads[0]
        sums.add(grads[needs_grad_x:])
        del x_chunk, y_chunk, grads, chunk
        saved.release_chunk(index)
    store.release()
    return grad_x, sums.result()


def _run_chunk(call: LayerCall, x_chunk: Tensor, chunk: "_Chunk") -> Tensor:
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


class _Chunk:
    """The chunk running through a layer, as the attention function sees it."""

    def __init__(self, call: LayerCall, index: int, store: ResidentStore | StreamedStore):
        self.call, self.index, self.span, self.store = call, index, call.spans[index], store
        self.attended = False

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """`[batch, chunk, heads | kv_heads, dim]` each, after rotary embedding; returns `out`, shaped like `query`."""
        if self.attended:
            raise ValueError(
                f"{self.call.name} calls attention more than once, so it cannot be streamed. "
                'Use attn_implementation="sdpa" for this model.'
            )
        self.attended = True
        if torch.is_autocast_enabled(query.device.type):  # rotary embedding may have left 16 bits, as for torch's SDPA
            query, key, value = (t.to(torch.get_autocast_dtype(t.device.type)) for t in (query, key, value))
        if not query.dtype == key.dtype == value.dtype:
            raise ValueError(
                f"{self.call.name}: query, key and value are {query.dtype}, {key.dtype} and {value.dtype}; they must have one "
                "dtype. Load the model in one dtype, or run it under autocast (bf16=True)."
            )
        kernel = choose_kernel(self.call.kernel, query.device, query.dtype, query.shape[-1], value.shape[-1])
        with no_autocast(query.device.type):
            return self._attend(kernel, query.contiguous(), key, value, scale)

    def _attend(self, kernel, query, key, value, scale):
        raise NotImplementedError


class _ForwardChunk(_Chunk):
    def __init__(self, call, index, store, saved: SavedLayer | None):
        super().__init__(call, index, store)
        self._saved = saved

    def _attend(self, kernel, query, key, value, scale):
        self.store.append(self.index, key, value)
        out, lse = self.store.attend(kernel, self.index, query, scale)
        if self._saved is not None:
            self._saved.keep_attention(out, lse)
        return out


class _BackwardChunk(_Chunk):
    def __init__(self, call, index, store, kept: tuple | None):
        super().__init__(call, index, store)
        self._kept = kept

    def _attend(self, kernel, query, key, value, scale):
        if self._kept is not None:
            out, lse = (kept.get() for kept in self._kept)
        else:
            with torch.no_grad():
                out, lse = self.store.attend(kernel, self.index, query, scale)
        return _SavedAttention.apply(query, key, value, out, lse, (self.store, kernel, self.index, scale))


class _SavedAttention(torch.autograd.Function):
    """Attention whose result is known: returns it, and has the gradient of having computed it."""

    @staticmethod
    def forward(ctx, query, key, value, out, lse, how):
        ctx.save_for_backward(query, out, lse)
        ctx.how = how
        return out.view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        query, out, lse = ctx.saved_tensors
        store, kernel, index, scale = ctx.how
        grads = store.attend_backward(kernel, index, grad_out.contiguous(), query, out, lse, scale)
        return *grads, None, None, None
