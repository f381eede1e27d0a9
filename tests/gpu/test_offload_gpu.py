"""
Offload and streams on a GPU. A failure means a race (a tensor read before its copy arrived, or memory used again too early),
a host synchronization inside a layer's loop, or memory that grows.

The bitwise tests use the naive kernel: it is deterministic, so offload on and off must agree in every bit.
"""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hf_fpdt
from hf_fpdt import host_arena, transfers
from hf_fpdt.copy_meter import CopyMeter

pytestmark = pytest.mark.gpu
SEQ_LEN = 1000


def llama(**overrides):
    torch.manual_seed(0)
    config = LlamaConfig(
        **{
            "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8,
            "num_key_value_heads": 2, "vocab_size": 1000, "max_position_embeddings": 1 << 20, **overrides,
        }
    )  # fmt: skip
    return LlamaForCausalLM(config).to("cuda", torch.bfloat16).train()


def step(model, ids):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    return [loss.detach(), *grads]


def tokens(batch=2, seq_len=SEQ_LEN):
    return torch.randint(0, 1000, (batch, seq_len), device="cuda", generator=torch.Generator("cuda").manual_seed(0))


@pytest.fixture
def poison(monkeypatch, fresh_transfers):
    """Host slabs start as NaN and every piece handed out, on either side, is NaN until it is written."""
    empty = torch.empty

    def poisoned_empty(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(transfers.torch, "empty", poisoned_empty)
    lock = host_arena._cuda_lock

    def poisoned_lock(slab):
        lock(slab)
        slab.fill_(255)

    monkeypatch.setattr(host_arena, "_cuda_lock", poisoned_lock)


def both(save_attention, batch, chunk_size):
    model, ids = llama(), tokens(batch)
    results = {}
    for offload in ("none", "host"):
        config = hf_fpdt.FPDTConfig(chunk_size=chunk_size, kernel="naive", offload=offload, save_attention=save_attention)
        clone = hf_fpdt.apply_fpdt(copy.deepcopy(model), config)
        results[offload] = [step(clone, ids) for _ in range(3)]
    return results


def assert_bitwise(results):
    for step_index in range(3):
        for got, want in zip(results["host"][step_index], results["none"][0], strict=True):
            assert torch.isfinite(got).all()
            assert torch.equal(got, want)


@pytest.mark.parametrize(("save_attention", "batch", "chunk_size"), [(True, 1, 128), (True, 2, 300), (False, 2, 96)])
def test_offload_is_bitwise_the_same(save_attention, batch, chunk_size, poison):
    assert_bitwise(both(save_attention, batch, chunk_size))


@pytest.mark.parametrize("save_attention", [True, False])
def test_slow_copies_change_nothing(save_attention, slow_copies):
    assert_bitwise(both(save_attention, 2, 128))


@pytest.mark.parametrize("save_attention", [True, False])
def test_streamed_keys_and_values_with_slow_copies(save_attention, slow_copies):
    """Every step gives the same bits, whatever the copies do; and the gradients of K and V kept whole, up to rounding."""
    model, ids = llama().float(), tokens()
    settings = {"chunk_size": 128, "kernel": "naive", "offload": "host", "save_attention": save_attention}
    streamed = hf_fpdt.apply_fpdt(copy.deepcopy(model), hf_fpdt.FPDTConfig(kv="streamed", **settings))
    whole = step(hf_fpdt.apply_fpdt(model, hf_fpdt.FPDTConfig(**settings)), ids)
    first, *later = (step(streamed, ids) for _ in range(3))
    for results in later:
        assert all(torch.equal(got, want) for got, want in zip(results, first, strict=True))
    for got, want in zip(first, whole, strict=True):
        assert (got - want).norm() <= 1e-5 * want.norm()


@pytest.mark.parametrize("slow", [False, True], ids=["", "slow"])
def test_disk_is_bitwise_the_same(slow, tmp_path, request):
    """Of 4 layers, what 6 MiB of host memory cannot hold goes through the file."""
    if slow:
        request.getfixturevalue("slow_copies")
    model, ids = llama(), tokens()
    settings = {"chunk_size": 128, "kernel": "naive", "recompute": True}
    want = step(hf_fpdt.apply_fpdt(copy.deepcopy(model), hf_fpdt.FPDTConfig(offload="none", **settings)), ids)
    config = hf_fpdt.FPDTConfig(offload="disk", disk_folder=str(tmp_path), host_memory=6 << 20, **settings)
    hf_fpdt.apply_fpdt(model, config)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(step(model, ids), want, strict=True))
    plan = next(iter(model.model.__dict__["_fpdt_plans"].values()))
    assert plan.peaks.disk > 0, str(plan)


@pytest.mark.parametrize("metered", [False, True], ids=["", "metered"])
def test_layers_never_synchronize_the_host(monkeypatch, fresh_transfers, metered):
    model = hf_fpdt.apply_fpdt(llama(), hf_fpdt.FPDTConfig(chunk_size=128, offload="host"))
    ids = tokens()
    step(model, ids)  # warm-up: compiles kernels, locks host memory
    transfers.transfers_for(torch.device("cuda", 0)).meter = CopyMeter() if metered else None
    calls = []
    for owner in (torch.cuda.Stream, torch.cuda.Event):
        monkeypatch.setattr(owner, "synchronize", lambda self: calls.append(type(self).__name__))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *args: calls.append("device"))
    layers = model.model.layers  # around them, transformers and the input checks look at values on the device
    layers[0].register_forward_pre_hook(lambda *_: torch.cuda.set_sync_debug_mode("error"))
    layers[-1].register_forward_hook(lambda *_: torch.cuda.set_sync_debug_mode("default"))
    try:
        hidden = model.model(inputs_embeds=model.get_input_embeddings()(ids).detach()).last_hidden_state
        torch.cuda.set_sync_debug_mode("error")
        hidden.backward(torch.ones_like(hidden))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert calls == []


def test_a_failed_lock_leaves_no_error_behind(fresh_transfers):
    slab = torch.zeros(1 << 20, dtype=torch.uint8)
    host_arena._cuda_lock(slab)
    with pytest.raises(RuntimeError, match="already"):  # locked twice
        host_arena._cuda_lock(slab)
    assert torch.ones(3, device="cuda").sum() == 3
    host_arena._cuda_unlock(slab)


def test_host_memory_is_used_again_and_given_back(fresh_transfers):
    model = hf_fpdt.apply_fpdt(llama(), hf_fpdt.FPDTConfig(chunk_size=128, offload="host"))
    arena = transfers.transfers_for(torch.device("cuda", 0)).arena
    sizes = []
    for seq_len in (1000, 700, 1000, 431, 1000):
        step(model, tokens(seq_len=seq_len))
        sizes.append((arena.locked_bytes, arena.used_bytes))
    assert sizes == [(sizes[0][0], 0)] * 5
    loss = model(input_ids=tokens(), labels=tokens()).loss
    assert arena.used_bytes > 0
    del loss  # dropped without a backward
    assert arena.used_bytes == 0


def test_peak_memory_grows_by_hidden_states_only():
    """Twice the tokens may cost twice the hidden states, K, V and their gradients; nothing of MLP or vocabulary size."""
    model = hf_fpdt.apply_fpdt(
        llama(hidden_size=512, intermediate_size=16384, num_attention_heads=4, num_key_value_heads=1, vocab_size=64000),
        hf_fpdt.FPDTConfig(chunk_size=2048, offload="host"),
    )
    peaks = []
    for seq_len in (32768, 65536):
        ids = tokens(1, seq_len)
        step(model, ids)
        torch.cuda.reset_peak_memory_stats()
        step(model, ids)
        peaks.append(torch.cuda.max_memory_allocated())
    hidden, kv = 512 * 2, 128
    # x, y, grad_y, grad_x, final norm and its gradient; K, V bf16 of two layers; fp32 grad K, V; rotary tables in fp32.
    per_token = 6 * hidden + 4 * 2 * kv + 2 * 4 * kv + 4 * 4 * kv
    assert (peaks[1] - peaks[0]) / 32768 <= per_token
