"""The footprint of one decoder layer: two short chunks of it are run, forward and backward, with attention left out."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from .attention_kernels import AttentionKernel, ScoreRule
from .causal_attention import MAX_BACKWARD_KEYS
from .footprint import MemoryRecorder, footprint_of
from .head_split import HeadGroup
from .kernel_memory import AttentionProblem, backward_bytes
from .layer_chunk import GraphChunk, LayerCall, run_chunk
from .memory_model import ATTENTION_BACKWARD, FORWARD_DONE, LayerFootprint
from .operations import LayerWork, operations_of
from .run_state import AutocastState, preserved_random_state


def footprint_of_layer(
    call: LayerCall, x: Tensor, weights: Sequence[Tensor], *, timed: bool = False, fused: bool = False
) -> LayerFootprint:
    """
    Args:
        call: as for a streamed layer; its `arguments` are called with spans inside `x`.
        x: `[batch, tokens, hidden]`, at least two tokens.
        weights: the layer's trainable parameters.
        timed: record what the layer computes as well, its `work`.
        fused: as in `OperationRecorder`.
    """
    (batch, tokens), ranks = x.shape[:2], call.exchange.size
    store, autocast, x = _NoAttention(), AutocastState(x.device.type), _part_of_longer(x.detach())

    def run_once(length: int, recorder: MemoryRecorder, needs_grad: bool) -> tuple[Tensor, Tensor]:
        store.begin(recorder)
        x_chunk = x[:, :length].detach().requires_grad_(needs_grad)
        with autocast.context(), torch.set_grad_enabled(needs_grad):
            one = replace(call, spans=[(0, length)], store_spans=[(0, length * ranks)])
            return x_chunk, run_chunk(one, x_chunk, GraphChunk(one, 0, store))

    def forward(length: int, recorder: MemoryRecorder) -> None:
        run_once(length, recorder, needs_grad=False)

    def backward(length: int, recorder: MemoryRecorder) -> None:
        x_chunk, y_chunk = run_once(length, recorder, needs_grad=True)
        recorder.mark(FORWARD_DONE)
        torch.autograd.grad(y_chunk, (x_chunk, *weights), grad_y[:, :length], allow_unused=True)

    with preserved_random_state(x.device):
        y = run_once(tokens, MemoryRecorder(), needs_grad=False)[1]
        grad_y = _part_of_longer(torch.zeros_like(y))
        lengths, unseen = (tokens // 2, tokens), MemoryRecorder()
        traces = [footprint_of(run, lengths, _weight_sizes(weights)) for run in (forward, backward)]
        computed = [operations_of(partial(_swapped, run, unseen), lengths, fused=fused) for run in (forward, backward) if timed]
    problem = store.problem
    # A token of this process is `ranks` tokens of its heads, which attend in groups.
    key_value = ranks * store.kv_heads * (problem.head_dim + problem.value_dim)
    wide = max(problem.itemsize, 4)
    return LayerFootprint(
        hidden=x.nbytes / (batch * tokens),
        key_value=key_value * problem.itemsize,
        key_value_sums=key_value * wide,
        attention=ranks * store.heads * (problem.value_dim * problem.itemsize + wide),
        weight_grads=sum(weight.nbytes for weight in weights),
        weight_sums=sum(weight.numel() * max(weight.element_size(), 4) for weight in weights),
        window=None if store.window is None else -(-store.window // ranks),
        workspace=lambda *tokens: store.workspace(*(ranks * count for count in tokens)),
        forward=traces[0],
        backward=traces[1],
        work=LayerWork(*computed, store.heads, problem.head_dim, problem.value_dim, problem.itemsize, batch) if timed else None,
    )


def _swapped(run, recorder: MemoryRecorder, length: int) -> None:
    run(length, recorder)


def _part_of_longer(x: Tensor) -> Tensor:
    """The same as part of a longer sequence, as chunks are: with several sequences there is a gap after each."""
    return torch.cat([x, x[:, :1]], dim=1)[:, :-1]


class _NoAttention:
    """
    In place of a layer's stores: attention of the right shape that computes nothing, and its sizes: `problem` of one group of
    heads, `heads` and `kv_heads` of all of them.
    """

    recorder: MemoryRecorder
    kernel: AttentionKernel
    problem: AttentionProblem
    heads: int
    kv_heads: int
    window: int | None

    def begin(self, recorder: MemoryRecorder) -> None:
        self.recorder, self.heads, self.kv_heads = recorder, 0, 0

    def of(self, group: HeadGroup) -> "_NoAttention":
        return self

    def append(self, index: int, key: Tensor, value: Tensor) -> None:
        self._key, self._value = key.shape, value.shape
        self.kv_heads += key.shape[2]

    def attend(self, kernel: AttentionKernel, index: int, query: Tensor, rule: ScoreRule) -> tuple[Tensor, Tensor]:
        batch, queries, heads, head_dim = query.shape
        kv_heads, value_dim = self._value[2:]
        self.kernel, self.heads, self.window = kernel, self.heads + heads, rule.window
        self.problem = AttentionProblem(
            batch, queries, queries, heads, kv_heads, head_dim, value_dim, itemsize=query.element_size()
        )
        wide = torch.promote_types(query.dtype, torch.float32)
        return query.new_zeros(batch, queries, heads, value_dim), query.new_zeros(batch, heads, queries, dtype=wide)

    def attend_backward(self, kernel, index: int, grad_out, query, out, lse, rule: ScoreRule, complete: bool = True):
        self.recorder.mark(ATTENTION_BACKWARD)
        grads = [query.new_zeros(shape) for shape in (self._key, self._value)] if complete else (None, None)
        return torch.zeros_like(query), *grads

    def workspace(self, queries: int, keys: int, block: int) -> int:
        together = min(block, max(queries, MAX_BACKWARD_KEYS))
        if self.window is not None:  # what a chunk reaches, in one call
            together = min(keys, queries + self.window - 1)
        problem = replace(self.problem, queries=queries, keys=together)
        several = keys > problem.keys or not self.kernel.aligns_last
        summed = 4 * problem.query_elements if several else 0  # grad_query over several calls
        return backward_bytes(self.kernel.name, problem) + summed


def _weight_sizes(weights: Sequence[Tensor]) -> set[int]:
    """Bytes of the gradient of a weight and of one expert's part of it, in its dtype and in fp32."""
    elements = {count for weight in weights for count in (weight.numel(), weight[:1].numel() if weight.ndim else 1)}
    return {count * itemsize for count in elements if count > 1 << 12 for itemsize in (2, 4)}
