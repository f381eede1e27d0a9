"""
Packed documents on a GPU, with every kernel: each as if it ran alone. A failure means a kernel that is wrong for slices of a
chunk, or documents that see each other.
"""

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

import hf_fpdt
from hf_fpdt.kernel_choice import KERNELS

pytestmark = pytest.mark.gpu
LENGTHS = [700, 1, 1, 129, 1500, 64, 1, 676, 1024]
TOLERANCE = 4e-2  # of the largest entry, against fp32; documents that see each other are off by more than 1


def llama(implementation):
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2, head_dim=64,
        vocab_size=1000, initializer_range=0.05, attn_implementation=implementation,
    )  # fmt: skip
    return LlamaForCausalLM(config).to("cuda", torch.bfloat16).train()


def gradients(model):
    return {name: weight.grad.float() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("settings", [{}, {"kv": "streamed", "offload": "host"}], ids=str)
@pytest.mark.parametrize("padding", [0, 33])
@pytest.mark.parametrize("kernel", [name for name, kernel in KERNELS.items() if kernel.device_type != "cpu"])
def test_documents_are_as_if_alone(kernel, padding, settings):
    why = KERNELS[kernel].why_not(torch.device("cuda"), torch.bfloat16, 64, 64)
    if why:
        pytest.skip(why)
    seq_len, plain = sum(LENGTHS) + padding, llama("sdpa").float()
    ids = torch.randint(0, 1000, (1, seq_len), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    labels, positions = ids.clone(), torch.zeros_like(ids)
    labels[:, sum(LENGTHS) :] = -100
    count, start = sum(LENGTHS) - len(LENGTHS), 0
    for length in LENGTHS:
        text = ids[:, start : start + length]
        labels[0, start], positions[0, start : start + length] = -100, torch.arange(length)
        if length > 1:
            (cross_entropy(plain(text).logits[0, :-1], text[0, 1:], reduction="sum") / count).backward()
        start += length
    model = hf_fpdt.apply_fpdt(llama("fpdt"), hf_fpdt.FPDTConfig(chunk_size=1024, kernel=kernel, **settings))
    mask = (torch.arange(seq_len, device="cuda") < sum(LENGTHS)).long()[None]
    model(input_ids=ids, labels=labels, position_ids=positions, attention_mask=mask).loss.backward()
    want, got = gradients(plain), gradients(model)
    for name in want:
        error = (got[name] - want[name]).abs().max() / want[name].abs().max()
        assert error <= TOLERANCE, (name, error)
