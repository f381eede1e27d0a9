"""
What streaming is for: nothing inside of a layer, and nothing in the loss, is as long as the sequence.

A failure means that memory grows with the sequence where it need not: the results stay right and long sequences stop fitting.
Every dimension below has a length of its own, so that a shape tells what a tensor is. The same watch over an unstreamed run
must find the long tensors, or it would prove nothing.
"""

import pytest
import torch
from reference import CallLengths, make_batch, make_model, make_streamed, tiny_llama, tiny_neox
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_fpdt import chunked_loss

BATCH, SEQ, CHUNK = 2, 61, 16
TOKENS = BATCH * SEQ
HIDDEN, INTERMEDIATE, VOCAB = 24, 43, 89
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 6
LOSS_CHUNK = 10  # tokens


def llama():
    return tiny_llama(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, head_dim=HEAD_DIM,
    )  # fmt: skip


def neox():
    return tiny_neox(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_attention_heads=HEADS, rotary=1.0
    )


class ShapeWatch(TorchDispatchMode):
    """Shape and dtype of everything that any operation returns, forward and backward."""

    def __init__(self):
        super().__init__()
        self.seen: dict[tuple, str] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.seen.setdefault((tuple(leaf.shape), leaf.dtype), str(func))
        return result

    def long(self) -> dict[tuple, str]:
        """Floating-point tensors with a dimension of the sequence's length, or of all tokens flattened."""
        marks = {SEQ, SEQ - 1, TOKENS, TOKENS - BATCH}
        return {key: op for key, op in self.seen.items() if key[1].is_floating_point and marks & set(key[0])}


@pytest.fixture(autouse=True)
def _short_loss_chunks(monkeypatch):
    monkeypatch.setattr(chunked_loss, "AUTO_CHUNK_LOGITS", {"cpu": LOSS_CHUNK * VOCAB})


def watch_step(model) -> ShapeWatch:
    batch = make_batch(BATCH, SEQ, VOCAB)
    with ShapeWatch() as watch:
        model(**batch).loss.backward()
    return watch


def allowed_long_shapes(kv_heads: int, rotary_dim: int) -> set[tuple]:
    """Everything that may be as long as the sequence, by shape and dtype."""
    floats = torch.float32
    return {
        # the layer's input and output, the final norm's, their gradients, the embeddings; flattened for the loss
        ((BATCH, SEQ, HIDDEN), floats),
        ((TOKENS, HIDDEN), floats),
        # K and V of one layer, and the fp32 sums of their gradients
        ((BATCH, SEQ, kv_heads, HEAD_DIM), floats),
        # the same as views, seen by the last chunk's attention
        ((BATCH, kv_heads, SEQ, HEAD_DIM), floats),
        # rotary tables: positions, angles, cos and sin, once for the whole model
        ((1, SEQ), floats),
        ((1, 1, SEQ), floats),
        ((1, SEQ, 1), floats),
        ((1, rotary_dim // 2, SEQ), floats),
        ((1, SEQ, rotary_dim // 2), floats),
        ((1, SEQ, rotary_dim), floats),
        ((1, SEQ, 2 * -(-rotary_dim // 8)), floats),  # GPT-NeoX rotates a quarter of the head, an even number
    }


@pytest.mark.parametrize(("config", "kv_heads"), [(llama, KV_HEADS), (neox, HEADS)], ids=["llama", "neox"])
def test_streamed_keys_and_values_are_never_whole(config, kv_heads):
    whole = {((BATCH, SEQ, kv_heads, HEAD_DIM), torch.float32), ((BATCH, kv_heads, SEQ, HEAD_DIM), torch.float32)}
    resident = watch_step(make_streamed(config(), CHUNK, kernel="torch_cpu", offload="host"))
    assert whole & set(resident.long())
    streamed = watch_step(make_streamed(config(), CHUNK, kernel="torch_cpu", offload="host", kv="streamed"))
    assert not whole & set(streamed.long())


@pytest.mark.parametrize("save_attention", [True, False])
@pytest.mark.parametrize(("config", "kv_heads"), [(llama, KV_HEADS), (neox, HEADS)], ids=["llama", "neox"])
def test_only_listed_tensors_are_as_long_as_the_sequence(config, kv_heads, save_attention):
    watch = watch_step(make_streamed(config(), CHUNK, save_attention=save_attention, kernel="torch_cpu"))
    allowed = allowed_long_shapes(kv_heads, HEAD_DIM)
    unexpected = {key: op for key, op in watch.long().items() if key not in allowed}
    assert not unexpected, f"as long as the sequence, made by: {unexpected}"
    # and the watch did look into the layers
    assert ((BATCH, CHUNK, INTERMEDIATE), torch.float32) in watch.seen


def test_no_tensor_of_tokens_by_vocabulary():
    watch = watch_step(make_streamed(llama(), CHUNK))
    wide = {key[0] for key in watch.seen if VOCAB in key[0] and key[0] not in {(VOCAB, HIDDEN), (HIDDEN, VOCAB)}}
    assert (LOSS_CHUNK, VOCAB) in wide
    too_long = [shape for shape in wide if torch.Size(shape).numel() > LOSS_CHUNK * VOCAB]
    assert not too_long


def test_nothing_is_as_large_as_a_long_activation():
    """Whatever its shape: no floating-point result has the elements of an intermediate activation of the whole sequence."""
    watch = watch_step(make_streamed(llama(), CHUNK, kernel="torch_cpu"))
    limit = TOKENS * INTERMEDIATE
    large = {key: op for key, op in watch.seen.items() if torch.Size(key[0]).numel() >= limit}
    assert not large
    assert TOKENS * HIDDEN < limit <= VOCAB * TOKENS


def test_the_watch_finds_long_tensors_without_streaming():
    watch = watch_step(make_model(llama(), "sdpa"))
    assert ((BATCH, SEQ, INTERMEDIATE), torch.float32) in watch.long()
    assert any(shape[-1] == VOCAB and torch.Size(shape).numel() == TOKENS * VOCAB for shape, _ in watch.seen)
    assert any(key not in allowed_long_shapes(KV_HEADS, HEAD_DIM) for key in watch.long())


@pytest.mark.parametrize("train", [True, False])
def test_submodules_see_chunks_only(train):
    model = make_streamed(llama(), CHUNK, train=train)
    seen = {suffix: CallLengths(model, suffix) for suffix in ("q_proj", "o_proj", "mlp", "input_layernorm", "mlp.down_proj")}
    loss = model(**make_batch(BATCH, SEQ, VOCAB)).loss
    forward = [16, 16, 16, 13] * 2
    for suffix, calls in seen.items():
        assert calls.take() == forward, suffix
    loss.backward()
    for suffix, calls in seen.items():
        assert calls.take() == [13, 16, 16, 16] * 2, suffix
