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
activation checkpoint. On the device it holds x, y, K, V (backward: grad_y, K, V, fp32 grad_K and grad_V) and the intermediates
of one chunk, O(chunk).

How much a layer keeps is its placement's choice: from every activation (then nothing runs again) down to nothing at all (then
the layers from the nearest kept input below run forward again first).
"""

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .gradient_sum import GradientSum
from .layer_chunk import BackwardChunk, ForwardChunk, GraphChunk, LayerCall, run_chunk
from .run_state import AutocastState, RandomState, no_autocast, preserved_random_state
from .sole_owner import counts_of_unshared, grad_x_like, is_sole_owner
from .unchanged import UnchangedModule, spent_error


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
        stores = call.new_stores()
        y = _forward_chunks(call, x, lambda index, x_chunk: run_chunk(call, x_chunk, ForwardChunk(call, index, stores)))
        stores.release()
        return y, None
    counts_of_unshared()
    saved = SavedLayer(call, x, previous)
    y = _StreamedLayer.apply(saved, x, *weights)
    saved.output = weakref.ref(y)
    return y, saved


class SavedLayer:
    """What one layer keeps between its two passes."""

    def __init__(self, call: LayerCall, x: Tensor, previous: "SavedLayer | None"):
        self.call = call
        self.previous = previous
        self.unchanged: UnchangedModule | None = None
        self.keeps = call.placement.keeps
        if self.keeps == "nothing" and (previous is None or previous.output() is not x):
            self.keeps = "input"  # something between the layers made x: it cannot be had again from the layer below
        self.output: weakref.ref | None = None
        self.autocast = AutocastState(x.device.type)
        self.random: list[RandomState] = []
        self.inputs: list = []
        self.attention: list[list] = []  # per chunk: (out, lse) of every group of heads, if saved
        self.graphs: list[tuple[Tensor, Tensor]] = []  # per chunk: (x, y) with the graph between them, if kept
        self.stores = call.new_stores()
        self.spent = False

    def forward_chunk(self, index: int, x_chunk: Tensor) -> Tensor:
        """The first run of a chunk."""
        if self.keeps == "all":
            return self._chunk_with_graph(index, x_chunk)
        self.random.append(RandomState(x_chunk.device))
        if self.keeps != "nothing":
            self.inputs.append(self.call.keep_here(x_chunk))
        keep = None
        if self.keeps == "attention":
            self.attention.append([])
            keep = self._keep_attention
        return run_chunk(self.call, x_chunk, ForwardChunk(self.call, index, self.stores, keep))

    def _chunk_with_graph(self, index: int, x_chunk: Tensor) -> Tensor:
        x_chunk = x_chunk.detach().requires_grad_()
        with torch.enable_grad():
            y_chunk = run_chunk(self.call, x_chunk, GraphChunk(self.call, index, self.stores))
        self.graphs.append((x_chunk, y_chunk))
        return y_chunk.detach()

    def _keep_attention(self, out: Tensor, lse: Tensor) -> None:
        self.attention[-1].append((self.call.keep_here(out), self.call.keep_here(lse)))

    def end_forward(self) -> None:
        # As the layer leaves them: adapters on the parameters of experts set these anew at every call.
        self.unchanged = UnchangedModule(self.call.module, self.call.name)
        if self.keeps in ("input", "nothing"):
            self.stores.release()
        else:
            self.stores.end_forward()

    def rebuild(self) -> None:
        """Runs the layers from the nearest kept input up to this one forward again; all of them then keep their attention."""
        layers = [self]
        while layers[-1].keeps == "nothing":
            layers.append(layers[-1].previous)
            layers[-1].unchanged.check()
        x = layers[-1]._whole_input()
        for layer in reversed(layers):
            x = layer._run_again(x)

    def _whole_input(self) -> Tensor:
        """The input in one piece, from the kept chunks, which are given back."""
        x = None
        for index, span in enumerate(self.call.spans):
            x_chunk = self.inputs[index].get()
            x = x_chunk.new_empty(x_chunk.shape[0], self.call.spans[-1][1], *x_chunk.shape[2:]) if x is None else x
            x[:, slice(*span)] = x_chunk
            self.inputs[index].release()
        return x

    def _run_again(self, x: Tensor) -> Tensor:
        states, self.random = self.random, []
        self.keeps, self.inputs, self.stores = "attention", [], self.call.new_stores()

        def chunk(index: int, x_chunk: Tensor) -> Tensor:
            states[index].set()
            return self.forward_chunk(index, x_chunk)

        with torch.no_grad(), self.autocast.context():
            y = _forward_chunks(self.call, x, chunk)
        self.end_forward()
        return y

    def chunk_tensors(self, index: int) -> tuple:
        inputs = self.inputs[index : index + 1 or None]
        return (*inputs, *(kept for pair in (self.attention[index] if self.attention else ()) for kept in pair))

    def prefetch_first(self) -> None:
        """Starts the copies that this layer's backward needs first, if it is still to run."""
        if not self.spent and self.keeps not in ("input", "nothing"):
            self.stores.prefetch()
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
            y = _forward_chunks(saved.call, x, saved.forward_chunk)
        saved.end_forward()
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y):
        overwrite = is_sole_owner(grad_y)
        saved = ctx.saved
        if saved.spent:
            raise spent_error(saved.call.name)
        saved.unchanged.check()
        saved.spent = True
        with preserved_random_state(grad_y.device), no_autocast(grad_y.device.type):
            if saved.keeps in ("input", "nothing"):
                saved.rebuild()
            grad_x, grad_weights = _backward_chunks(saved, ctx.weights, grad_y, ctx.needs_input_grad[1], overwrite)
        ctx.weights = None
        return None, grad_x, *grad_weights


def _forward_chunks(call: LayerCall, x: Tensor, run) -> Tensor:
    """`run(index, x_chunk)` for every chunk, and the outputs in one tensor."""
    y = None
    for index, span in enumerate(call.spans):
        y_chunk = run(index, x[:, slice(*span)])
        if y is None:
            y = y_chunk.new_empty(x.shape[0], x.shape[1], *y_chunk.shape[2:])
        y[:, slice(*span)] = y_chunk
    return y


def _backward_chunks(saved: SavedLayer, weights: Sequence[Tensor], grad_y: Tensor, needs_grad_x: bool, overwrite: bool):
    call, stores = saved.call, saved.stores
    stores.begin_backward()
    sums, grad_x = GradientSum(len(call.spans)), None
    for index in reversed(range(len(call.spans))):
        if index > 0:
            saved.prefetch_chunk(index - 1)
        elif saved.previous is not None:
            saved.previous.prefetch_first()
        span = call.spans[index]
        x_chunk, y_chunk = _chunk_again(saved, index, needs_grad_x)
        inputs = (x_chunk, *weights) if needs_grad_x else weights
        grads = torch.autograd.grad(y_chunk, inputs, grad_y[:, slice(*span)], allow_unused=True)
        if needs_grad_x:
            if grad_x is None:
                grad_x = grad_x_like(grad_y, x_chunk, overwrite)
            grad_x[:, slice(*span)] = grads[0]
        sums.add(grads[needs_grad_x:])
        del x_chunk, y_chunk, inputs, grads
        saved.release_chunk(index)
    stores.release()
    return grad_x, sums.result()


def _chunk_again(saved: SavedLayer, index: int, needs_grad_x: bool) -> tuple[Tensor, Tensor]:
    """x and y of a chunk with the graph between them: the one that was kept, or from a second run."""
    if saved.graphs:
        return saved.graphs.pop()
    call = saved.call
    x_chunk = saved.inputs[index].get().detach().requires_grad_(needs_grad_x)
    saved.random[index].set()
    chunk = BackwardChunk(call, index, saved.stores, saved.attention[index] if saved.attention else None)
    with torch.enable_grad(), saved.autocast.context():
        return x_chunk, run_chunk(call, x_chunk, chunk)
