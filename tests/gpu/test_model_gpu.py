"""Whole models on a GPU in bf16 against SDPA and against fp32. A failure means training that differs from plain SDPA."""

import copy

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

import hf_fpdt
from hf_fpdt import layer_chunk
from hf_fpdt.kernel_choice import choose_kernel

pytestmark = pytest.mark.gpu


def models():
    llama = LlamaConfig(
        hidden_size=512, intermediate_size=1024, num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=2,
        vocab_size=2000, max_position_embeddings=1 << 20,
    )  # fmt: skip
    neox = GPTNeoXConfig(
        hidden_size=640, intermediate_size=1024, num_hidden_layers=3, num_attention_heads=8, vocab_size=2000,
        max_position_embeddings=1 << 20,
    )  # fmt: skip
    return [(LlamaForCausalLM, llama), (GPTNeoXForCausalLM, neox)]  # heads of 64 and of 80


def gradients(model, ids):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.item(), [p.grad.float() for p in model.parameters()]


@pytest.mark.parametrize(("model_class", "config"), models(), ids=["llama", "gpt_neox"])
@pytest.mark.parametrize("kernel", ["auto", "torch_flash", "cudnn"])
def test_error_against_fp32_is_that_of_sdpa(model_class, config, kernel):
    torch.manual_seed(0)
    truth = model_class(config).cuda().train()
    ids = torch.randint(0, config.vocab_size, (1, 5000), device="cuda")
    plain, ours = copy.deepcopy(truth).bfloat16(), copy.deepcopy(truth).bfloat16()
    truth.load_state_dict(plain.float().state_dict())
    plain.bfloat16().set_attn_implementation("sdpa")
    hf_fpdt.apply_fpdt(ours, hf_fpdt.FPDTConfig(chunk_size=1024, kernel=kernel))
    _, want = gradients(truth, ids)
    errors = []
    for model in (plain, ours):
        _, grads = gradients(model, ids)
        errors.append(torch.stack([((g - w).norm() / w.norm()) for g, w in zip(grads, want, strict=True)]))
    assert errors[1].norm() <= 1.1 * errors[0].norm()


@pytest.mark.parametrize(("model_class", "config"), models(), ids=["llama", "gpt_neox"])
def test_autocast_with_fp32_weights(model_class, config, monkeypatch):
    """What Trainer(bf16=True) does; attention has to run in 16 bits, where the fast kernels are."""
    torch.manual_seed(0)
    plain = model_class(config).cuda().train()
    ours = hf_fpdt.apply_fpdt(copy.deepcopy(plain), hf_fpdt.FPDTConfig(chunk_size=1024))
    plain.set_attn_implementation("sdpa")
    ids = torch.randint(0, config.vocab_size, (1, 5000), device="cuda")
    results = []
    seen = []
    monkeypatch.setattr(layer_chunk, "choose_kernel", lambda *args: seen.append(args[2]) or choose_kernel(*args))
    for model in (plain, ours):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        results.append((loss.item(), [p.grad for p in model.parameters()]))
    assert abs(results[0][0] - results[1][0]) < 2e-4 * results[0][0]
    for want, got in zip(results[0][1], results[1][1], strict=True):
        assert got.dtype == want.dtype
        assert (got - want).norm() / want.norm() < 2e-2
    assert set(seen) == {torch.bfloat16}


def test_gradient_norms_at_16k_are_those_of_sdpa():
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=4096, num_hidden_layers=2, num_attention_heads=16, num_key_value_heads=4,
        vocab_size=32000, max_position_embeddings=1 << 20,
    )  # fmt: skip
    torch.manual_seed(0)
    plain = LlamaForCausalLM(config).to("cuda", torch.bfloat16).train()
    ours = hf_fpdt.apply_fpdt(copy.deepcopy(plain), hf_fpdt.FPDTConfig(chunk_size=4096))
    plain.set_attn_implementation("sdpa")
    ids = torch.randint(0, config.vocab_size, (1, 16384), device="cuda")
    _, want = gradients(plain, ids)
    _, got = gradients(ours, ids)
    worst = max(abs(g.norm() / w.norm() - 1).item() for g, w in zip(got, want, strict=True))
    assert worst < 1e-3
