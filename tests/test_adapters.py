"""
Every kind of PEFT adapter on a streamed model, against the same adapter on eager attention in fp32, gradient by gradient. A
failure means finetuning that learns something else than the adapter's method says.
"""

import copy

import pytest
import torch
from reference import assert_gradients_close, loss_and_gradients, make_batch, make_model, make_streamed, tiny_llama
from transformers import MixtralConfig

from hf_fpdt import FPDTConfig, apply_fpdt

peft = pytest.importorskip("peft")

TARGETS = ["q_proj", "v_proj", "up_proj"]
ADAPTERS = {
    "LoRA": peft.LoraConfig(r=4, target_modules=TARGETS),
    "DoRA": peft.LoraConfig(r=4, target_modules=TARGETS, use_dora=True),
    "rsLoRA": peft.LoraConfig(r=4, target_modules=TARGETS, use_rslora=True),
    "LoRA on all linear layers": peft.LoraConfig(r=4, target_modules="all-linear"),
    "LoRA on the head": peft.LoraConfig(r=4, target_modules=[*TARGETS, "lm_head"]),
    "LoRA on the embedding": peft.LoraConfig(r=4, target_modules=[*TARGETS, "embed_tokens"]),
    "LoRA and biases": peft.LoraConfig(r=4, target_modules=TARGETS, bias="all"),
    "a trained head": peft.LoraConfig(r=4, target_modules=TARGETS, modules_to_save=["lm_head"]),
    "a trained embedding": peft.LoraConfig(r=4, target_modules=TARGETS, modules_to_save=["embed_tokens"]),
    "trained tokens": peft.LoraConfig(r=4, target_modules=TARGETS, trainable_token_indices=[3, 4, 5]),
    "IA3": peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "LoHa": peft.LoHaConfig(r=4, target_modules=TARGETS),
    "OFT": peft.OFTConfig(r=0, oft_block_size=4, target_modules=TARGETS),
    "VeRA": peft.VeraConfig(r=4, target_modules=["q_proj"]),
    "norms": peft.LNTuningConfig(target_modules=["input_layernorm", "norm"]),
    "prompt tuning": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "p-tuning": peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
}


def with_adapter(model, config):
    """Adapters far from where they start, so that they change what the model computes."""
    torch.manual_seed(0)
    model, generator = peft.get_peft_model(model, copy.deepcopy(config)), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
    return model.train()


def assert_same(streamed, plain, batch):
    want, want_grads = loss_and_gradients(plain, batch)
    got, grads = loss_and_gradients(streamed, batch)
    assert abs(got - want) <= 2e-6 * want
    assert_gradients_close(grads, want_grads)


@pytest.mark.parametrize("before", [True, False], ids=["fpdt_first", "adapter_first"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters(name, before):
    """Also if fpdt is set on a model that has its adapter."""
    config, batch = tiny_llama(), make_batch(2, 47)
    if before:
        streamed = with_adapter(make_streamed(config, 17), ADAPTERS[name])
    else:
        streamed = apply_fpdt(with_adapter(make_model(config, "eager"), ADAPTERS[name]), FPDTConfig(chunk_size=17))
    assert_same(streamed, with_adapter(make_model(config, "eager"), ADAPTERS[name]), batch)
    plain = make_model(config, "eager")(**batch).loss
    assert (streamed(**batch).loss - plain).abs() > 1e-4 * plain  # the adapter does something


def test_lora_on_the_parameters_of_experts():
    """PEFT sets these parameters anew at every call of the layer, which must not look like a change of the user's."""
    config = MixtralConfig(
        vocab_size=97, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4, sliding_window=None,
    )  # fmt: skip
    adapter = peft.LoraConfig(r=4, target_modules=[], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    models = [make_streamed(config, 17), make_model(config, "eager")]
    assert_same(*(with_adapter(model, adapter) for model in models), make_batch(2, 47))


@pytest.mark.parametrize("kv", ["resident", "streamed"])
def test_packed_and_padded(kv):
    """An adapter, documents and everything on the host together."""
    positions = torch.cat([torch.arange(n) for n in (20, 1, 26)])[None]
    batch = make_batch(1, 47) | {"position_ids": positions}
    plain = with_adapter(make_model(tiny_llama(), "eager"), ADAPTERS["LoRA"])
    want, want_grads = loss_and_gradients(plain, batch, use_cache=False)
    streamed = with_adapter(make_streamed(tiny_llama(), 17, offload="host", kv=kv), ADAPTERS["LoRA"])
    got, grads = loss_and_gradients(streamed, batch)
    assert abs(got - want) <= 2e-6 * want
    assert_gradients_close(grads, want_grads)
