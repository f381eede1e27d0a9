"""
The central promise: a streamed model trains exactly like the unstreamed one. A failure means wrong gradients, silently.

The reference is transformers' own model with eager attention (one softmax over an explicit mask), which shares no code with
hf_fpdt below the layer.
"""

import pytest
import torch
from reference import (
    LOSS_TOLERANCE,
    SEQ_LEN,
    TOLERANCE,
    CallLengths,
    assert_gradients_close,
    difference,
    loss_and_gradients,
    make_batch,
    make_model,
    make_streamed,
    tiny_llama,
    tiny_neox,
    total_gradient_error,
)  # fmt: skip

from hf_fpdt import causal_attention

CONFIGS = {
    "llama_mha": lambda: tiny_llama(num_key_value_heads=4),
    "llama_gqa_4_to_1": lambda: tiny_llama(hidden_size=64, num_attention_heads=8, num_key_value_heads=2),
    "llama_mqa": lambda: tiny_llama(num_key_value_heads=1),
    "llama_attention_bias": lambda: tiny_llama(attention_bias=True, mlp_bias=True),
    "llama_tied": lambda: tiny_llama(tie_word_embeddings=True),
    "neox_parallel": lambda: tiny_neox(use_parallel_residual=True),
    "neox_sequential": lambda: tiny_neox(use_parallel_residual=False),
    "neox_full_rotary": lambda: tiny_neox(rotary=1.0),
    "neox_no_attention_bias": lambda: tiny_neox(attention_bias=False, use_parallel_residual=False, rotary=1.0),
}
# Chunk size -> number of chunks of a 48-token sequence.
CHUNKS = {48: 1, 24: 2, 16: 3, 13: 4, 1000: 1}


def compare(config, batch, chunk_size, *, may_be_zero=(), **settings):
    want_loss, want = loss_and_gradients(make_model(config, "eager"), batch)
    loss, got = loss_and_gradients(make_streamed(config, chunk_size, **settings), batch)
    assert difference(loss, want_loss) <= LOSS_TOLERANCE[torch.float32]
    assert_gradients_close(got, want, TOLERANCE[torch.float32], may_be_zero)


@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_equal_eager(name, chunk_size):
    compare(CONFIGS[name](), make_batch(2), chunk_size)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("save_attention", [True, False])
@pytest.mark.parametrize("kernel", ["torch_cpu", "naive"])
@pytest.mark.parametrize("name", ["llama_gqa_4_to_1", "neox_sequential"])
def test_every_kernel_and_setting(name, kernel, save_attention, batch):
    compare(CONFIGS[name](), make_batch(batch), 20, kernel=kernel, save_attention=save_attention)


@pytest.mark.parametrize("chunk_size", CHUNKS)
@pytest.mark.parametrize("save_attention", [True, False])
@pytest.mark.parametrize("kernel", ["torch_cpu", "naive"])
@pytest.mark.parametrize("name", ["llama_gqa_4_to_1", "neox_sequential"])
def test_streamed_keys_and_values(name, kernel, save_attention, chunk_size):
    """Blocks fetched one by one and merged, against attention over all keys at once."""
    compare(
        CONFIGS[name](), make_batch(2), chunk_size, kernel=kernel, save_attention=save_attention, offload="host", kv="streamed"
    )


@pytest.mark.parametrize("name", ["llama_gqa_4_to_1", "neox_parallel"])
def test_fp64_is_exact_to_rounding(name):
    """Only the order of summation differs, so in fp64 nothing may be left of the difference."""
    want_loss, want = loss_and_gradients(make_model(CONFIGS[name](), "sdpa", dtype=torch.float64), make_batch(2))
    streamed = make_streamed(CONFIGS[name](), 13, dtype=torch.float64)
    loss, got = loss_and_gradients(streamed, make_batch(2))
    # transformers computes norms and the loss in fp32 even here.
    assert difference(loss, want_loss) <= 2e-7
    assert_gradients_close(got, want, 2e-6)


@pytest.mark.parametrize("seq_len", [1, 2, 3, 17])
def test_short_and_odd_sequences(seq_len):
    config, batch = tiny_llama(), make_batch(2, seq_len)
    if seq_len == 1:  # no next token: nothing to learn, where transformers' mean over nothing is NaN
        loss, got = loss_and_gradients(make_streamed(config, 4), batch)
        assert loss == 0
        assert all(g is None or not g.any() for g in got.values())
        return
    # Of 2 tokens only the first has a label, and its softmax over one key does not depend on query and key.
    compare(config, batch, 4, may_be_zero=("q_proj", "k_proj") if seq_len == 2 else ())


def test_one_token_chunks():
    compare(tiny_llama(), make_batch(1, 9), 1)


def test_logits_without_labels_equal_eager():
    config, ids = tiny_llama(), make_batch(2)["input_ids"]
    with torch.no_grad():
        want = make_model(config, "eager")(ids).logits
        got = make_streamed(config, 13)(ids).logits
    assert difference(got, want) <= 1e-5


def test_gradient_of_logits_equals_eager():
    """A loss of the user's own on plain logits."""
    config, ids = tiny_llama(), make_batch(2)["input_ids"]
    grads = []
    for model in (make_model(config, "eager"), make_streamed(config, 13)):
        model(ids, use_cache=False).logits.square().mean().backward()
        grads.append({name: w.grad for name, w in model.named_parameters()})
    assert_gradients_close(grads[1], grads[0])


@pytest.mark.parametrize("save_attention", [True, False])
@pytest.mark.parametrize("name", ["llama_gqa_4_to_1", "llama_mha", "neox_parallel"])
def test_bf16_error_is_that_of_sdpa(name, save_attention):
    """In bf16 both runs round; streaming in 5 chunks may not add to it (sums over chunks are in fp32)."""
    config = CONFIGS[name]()
    ours, theirs = [], []
    for seed in range(3):
        batch = make_batch(2, 80, seed=seed)
        # The truth has the weights that the bf16 models have after rounding.
        truth_model = make_model(config, "eager", dtype=torch.bfloat16, seed=seed).float()
        _, truth = loss_and_gradients(truth_model, batch)
        _, plain = loss_and_gradients(make_model(config, "sdpa", dtype=torch.bfloat16, seed=seed), batch)
        streamed = make_streamed(config, 16, dtype=torch.bfloat16, seed=seed, save_attention=save_attention)
        _, got = loss_and_gradients(streamed, batch)
        ours.append(total_gradient_error(got, truth))
        theirs.append(total_gradient_error(plain, truth))
    assert max(theirs) < 0.1, f"the reference run is broken: {theirs}"
    assert sum(ours) <= 1.1 * sum(theirs), f"errors {ours}, sdpa's {theirs}"


def test_bf16_gradients_of_keys_survive_many_chunks():
    """The gradients of early keys are sums over 64 chunks: in bfloat16 they would lose the small terms."""
    config, names = tiny_llama(num_hidden_layers=1), ("k_proj", "v_proj")
    ours, theirs = [], []
    for seed in range(3):
        batch = make_batch(1, 256, seed=seed)
        _, truth = loss_and_gradients(make_model(config, "eager", dtype=torch.bfloat16, seed=seed).float(), batch)
        truth = {name: grad for name, grad in truth.items() if any(part in name for part in names)}
        _, plain = loss_and_gradients(make_model(config, "sdpa", dtype=torch.bfloat16, seed=seed), batch)
        _, got = loss_and_gradients(make_streamed(config, 4, dtype=torch.bfloat16, seed=seed), batch)
        ours.append(total_gradient_error(got, truth))
        theirs.append(total_gradient_error(plain, truth))
    assert len(truth) == 2
    assert sum(ours) <= 1.1 * sum(theirs), f"errors {ours}, sdpa's {theirs}"


@pytest.mark.parametrize(("save_attention", "passes"), [(True, 1), ("auto", 1), (False, 2)])
def test_attention_is_computed_once_if_saved(monkeypatch, save_attention, passes):
    """What save_attention=True is for, and that False does not keep it."""
    calls, attend = [], causal_attention.attend_prefix
    monkeypatch.setattr(causal_attention, "attend_prefix", lambda *args: calls.append(1) or attend(*args))
    model = make_streamed(tiny_llama(), 16, save_attention=save_attention)
    loss = model(**make_batch(2)).loss
    assert len(calls) == 2 * 3
    loss.backward()
    assert len(calls) == 2 * 3 * passes


def test_chunk_counts_are_what_this_file_says():
    """Guards the table above: were the model to stream in one chunk always, every comparison would be of nothing."""
    for chunk_size, count in CHUNKS.items():
        model = make_streamed(tiny_llama(), chunk_size, train=False)
        calls = CallLengths(model, "layers.0.self_attn.q_proj")
        with torch.no_grad():
            model(**make_batch(1))
        lengths = calls.take()
        assert len(lengths) == count
        assert sum(lengths) == SEQ_LEN
