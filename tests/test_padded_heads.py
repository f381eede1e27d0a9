"""
Heads of sizes that a kernel does not take are filled up with zeros. A failure means wrong gradients for models with heads of 80
or 100, or with keys and values of different width, on every kernel that cannot take them as they are.
"""

import logging

import pytest
import torch
from reference import (
    LOSS_TOLERANCE,
    TOLERANCE,
    assert_gradients_close,
    difference,
    loss_and_gradients,
    make_batch,
    make_model,
    make_streamed,
    tiny_llama,
    tiny_neox,
)
from transformers import DeepseekV3Config

import hf_fpdt
from hf_fpdt import FPDTConfig
from hf_fpdt.attention_kernels import NaiveKernel, filled
from hf_fpdt.kernel_choice import KERNELS, choose_kernel

MULTIPLE = 32


class _Whole(NaiveKernel):
    """Takes heads of multiples of 32 only, keys and values of one width, and sums nothing but what it is given."""

    name = "torch_flash"
    head_multiple, distinct_value_dim = MULTIPLE, False

    def __init__(self):
        self.sizes = set()

    def forward(self, query, key, value, rule, *, causal):
        self._see(query, key, value)
        return super().forward(query, key, value, rule, causal=causal)

    def backward(self, grad_out, query, key, value, out, lse, rule, *, causal):
        self._see(grad_out, query, key, value, out)
        return super().backward(grad_out, query, key, value, out, lse, rule, causal=causal)

    def _see(self, *tensors):
        self.sizes |= {tensor.shape[-1] for tensor in tensors}


@pytest.fixture
def whole(monkeypatch):
    kernel = _Whole()
    monkeypatch.setitem(KERNELS, "torch_flash", kernel)
    choose_kernel.cache_clear()
    yield kernel
    choose_kernel.cache_clear()


def deepseek():
    """Keys of 16, values of 12."""
    return DeepseekV3Config(
        vocab_size=97, hidden_size=32, intermediate_size=56, moe_intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8,
        v_head_dim=12, first_k_dense_replace=2, max_position_embeddings=512,
    )  # fmt: skip


CONFIGS = {"llama": lambda: tiny_llama(num_key_value_heads=2), "neox": tiny_neox, "deepseek": deepseek}
SETTINGS = [
    {}, {"save_attention": False}, {"recompute": False}, {"offload": "host", "kv": "streamed"},
    {"offload": "host", "kv": "streamed", "save_attention": False},
]  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_equal_eager(whole, name, settings):
    batch = make_batch(2)
    want_loss, want = loss_and_gradients(make_model(CONFIGS[name](), "eager"), batch)
    loss, got = loss_and_gradients(make_streamed(CONFIGS[name](), 13, kernel="torch_flash", **settings), batch)
    assert difference(loss, want_loss) <= LOSS_TOLERANCE[torch.float32]
    assert_gradients_close(got, want, TOLERANCE[torch.float32])
    assert whole.sizes == {MULTIPLE}


def test_values_of_another_width_on_the_cpus_kernel():
    batch = make_batch(2)
    want_loss, want = loss_and_gradients(make_model(deepseek(), "eager"), batch)
    loss, got = loss_and_gradients(make_streamed(deepseek(), 13, kernel="torch_cpu"), batch)
    assert difference(loss, want_loss) <= LOSS_TOLERANCE[torch.float32]
    assert_gradients_close(got, want, TOLERANCE[torch.float32])


@pytest.mark.parametrize(
    ("name", "sizes", "want"),
    [
        ("flash_attention_4", (80, 80), (96, 96)), ("flash_attention_4", (128, 128), (128, 128)),
        ("flash_attention_4", (192, 128), (192, 128)), ("flash_attention_4", (100, 20), (128, 32)),
        ("cudnn", (80, 80), (80, 80)), ("cudnn", (100, 100), (104, 104)), ("torch_flash", (192, 128), (192, 192)),
        ("torch_efficient", (36, 36), (40, 40)), ("torch_cpu", (20, 20), (20, 20)), ("torch_cpu", (16, 24), (24, 24)),
        ("naive", (7, 3), (7, 3)),
    ],
)  # fmt: skip
def test_sizes(name, sizes, want):
    assert KERNELS[name].padded(*sizes) == want


def test_filled():
    x = torch.randn(2, 3, 5)
    assert filled(x, 5) is x
    wide = filled(x, 8)
    assert wide.shape == (2, 3, 8)
    assert torch.equal(wide[..., :5], x)
    assert not wide[..., 5:].any()


def test_the_log_says_so(whole, caplog):
    with caplog.at_level(logging.INFO, logger="hf_fpdt"):
        choose_kernel("auto", torch.device("cpu"), torch.float32, 80, 80)
        choose_kernel("auto", torch.device("cpu"), torch.float32, 64, 64)
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith("hf_fpdt: attention kernel torch_flash for cpu, float32, head_dim 80 run as 96")
    assert second.startswith("hf_fpdt: attention kernel torch_flash for cpu, float32, head_dim 64")
    assert "run as" not in second


def test_a_plan_counts_what_is_stored(whole):
    """K and V of heads that are four times as wide take four times as much."""
    config, seq_len = tiny_neox(), 4096
    settings = {"offload": "host", "chunk_size": 256, "gpu_memory": 1 << 40}
    narrow, wide = (
        hf_fpdt.plan(make_model(config), seq_len=seq_len, config=FPDTConfig(kernel=name, **settings))
        for name in ("naive", "torch_flash")
    )
    head_dim = config.hidden_size // config.num_attention_heads
    key_value = 2 * config.hidden_size * 4 * seq_len  # bytes of K and V in fp32, and as much again is attention's output
    more = 1.5 * key_value * (MULTIPLE / head_dim - 1) * config.num_hidden_layers
    assert wide.peaks.host - narrow.peaks.host == pytest.approx(more, rel=0.02)
