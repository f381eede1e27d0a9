"""Every CUDA kernel against the definition in fp32: a failure means wrong attention, or a wrong claim of what it supports."""

import logging

import pytest
import torch

from hf_fpdt import kernel_choice
from hf_fpdt.attention_kernels import ScoreRule, filled
from hf_fpdt.causal_attention import attend_prefix, attend_prefix_backward
from hf_fpdt.cross_entropy import cross_entropy_and_grad
from hf_fpdt.kernel_choice import KERNELS

pytestmark = pytest.mark.gpu
CUDA = ["flash_attention_4", "flash_attention_2", "cudnn", "torch_flash", "torch_efficient", "naive"]


def relative_error(got, want):
    return (torch.linalg.vector_norm(got.double() - want.double()) / torch.linalg.vector_norm(want.double())).item()


def run(kernel, grad_out, query, key, value):
    """With heads as the kernel takes them; what it makes of the zeros behind them is left out."""
    rule, sizes = ScoreRule(query.shape[-1] ** -0.5), (query.shape[-1], value.shape[-1])
    wide, value_wide = kernel.padded(*sizes)
    query, key = (filled(x, wide) for x in (query, key))
    grad_out, value = (filled(x, value_wide) for x in (grad_out, value))
    grad_key, grad_value = (torch.zeros_like(x, dtype=torch.float32) for x in (key, value))
    out, lse = attend_prefix(kernel, query, key, value, rule)
    grad_query = attend_prefix_backward(kernel, grad_out, query, key, value, out, lse, rule, grad_key, grad_value)
    found = {"out": out, "grad_query": grad_query, "grad_key": grad_key, "grad_value": grad_value}
    dims = {"out": sizes[1], "grad_query": sizes[0], "grad_key": sizes[0], "grad_value": sizes[1]}
    return {"lse": lse} | {label: tensor[..., : dims[label]] for label, tensor in found.items()}


def refusal(name, device, dtype, head_dim):
    """Why the named kernel is refused by name, or None. Nothing but its absence may refuse the common head sizes."""
    try:
        kernel_choice.choose_kernel(name, device, dtype, head_dim, head_dim)
    except ValueError as error:
        if head_dim in (64, 128) and "is not installed" not in str(error):
            raise
        return str(error)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("batch", "chunk", "keys", "heads", "kv_heads", "head_dim"),
    [
        (1, 512, 512, 8, 8, 128),
        (1, 512, 2048, 8, 2, 128),
        (2, 300, 1111, 4, 1, 64),
        (1, 77, 1000, 6, 3, 80),
        (1, 1, 129, 4, 2, 96),
        (1, 200, 900, 4, 4, 72),
        (1, 333, 333, 4, 2, 100),
        (2, 128, 640, 2, 2, 40),
        (1, 300, 1100, 2, 1, 112),
    ],
)
@pytest.mark.parametrize("name", CUDA)
def test_prefix_against_definition(name, batch, chunk, keys, heads, kv_heads, head_dim, dtype):
    kernel, device = KERNELS[name], torch.device("cuda", 0)
    refused = refusal(name, device, dtype, head_dim)
    if refused is not None:
        pytest.skip(refused)
    torch.manual_seed(0)
    query, grad_out = (torch.randn(batch, chunk, heads, head_dim, device=device) for _ in range(2))
    key, value = (torch.randn(batch, keys, kv_heads, head_dim, device=device) for _ in range(2))
    tensors = [x.to(dtype) for x in (grad_out, query, key, value)]
    got = run(kernel, *tensors)
    want = run(KERNELS["naive"], *(x.float() for x in tensors))
    for label, tensor in want.items():
        limit = 1e-4 if label == "lse" else (8e-3 if dtype == torch.bfloat16 else 1.5e-3)
        assert relative_error(got[label], tensor) < limit, label


def test_auto_takes_the_first_that_is_right(caplog):
    kernel_choice.choose_kernel.cache_clear()
    with caplog.at_level(logging.INFO, "hf_fpdt"):
        kernel = kernel_choice.choose_kernel("auto", torch.device("cuda", 0), torch.bfloat16, 128, 128)
    usable = [k for k in KERNELS.values() if k.why_not(torch.device("cuda", 0), torch.bfloat16, 128, 128) is None]
    assert kernel is usable[0], caplog.text
    assert f"attention kernel {kernel.name}" in caplog.text


NARROWER = [("torch_flash", 192, 128), ("cudnn", 96, 64), ("torch_efficient", 96, 64)]


@pytest.mark.parametrize(("name", "head_dim", "value_dim"), NARROWER)
def test_values_narrower_than_keys(name, head_dim, value_dim):
    device = torch.device("cuda", 0)
    kernel = kernel_choice.choose_kernel(name, device, torch.bfloat16, head_dim, value_dim)
    torch.manual_seed(0)
    shapes = ((256, 4, value_dim), (256, 4, head_dim), (1000, 2, head_dim), (1000, 2, value_dim))
    tensors = [torch.randn(1, *shape, device=device).bfloat16() for shape in shapes]
    got, want = run(kernel, *tensors), run(KERNELS["naive"], *(x.float() for x in tensors))
    for label, tensor in want.items():
        assert relative_error(got[label], tensor) < (1e-4 if label == "lse" else 8e-3), label


@pytest.mark.parametrize("head_dim", [40, 72, 80, 100, 104, 112])
def test_auto_takes_as_fast_a_kernel_for_heads_between(head_dim):
    device, dtype = torch.device("cuda", 0), torch.bfloat16
    wanted = kernel_choice.choose_kernel("auto", device, dtype, 128, 128)
    assert kernel_choice.choose_kernel("auto", device, dtype, head_dim, head_dim) is wanted


def test_fp32_falls_to_a_kernel_that_has_it():
    assert kernel_choice.choose_kernel("auto", torch.device("cuda", 0), torch.float32, 64, 64).name == "torch_efficient"
    with pytest.raises(ValueError, match="needs float16 or bfloat16"):
        kernel_choice.choose_kernel("torch_flash", torch.device("cuda", 0), torch.float32, 64, 64)
    with pytest.raises(ValueError, match="heads of 128 at most, and the model has 136"):
        kernel_choice.choose_kernel("cudnn", torch.device("cuda", 0), torch.bfloat16, 132, 132)


@pytest.mark.parametrize(("num_tokens", "vocab_size"), [(1, 7), (33, 1000), (300, 50257), (64, 128256), (20000, 128256)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_fused_cross_entropy(num_tokens, vocab_size, dtype):
    """The largest case has more than 2^31 elements: a 32-bit offset would read and write the wrong rows."""
    if num_tokens * vocab_size > 2**31 and dtype == torch.float32:
        pytest.skip("the 16-bit cases cover the offsets with half the memory")
    torch.manual_seed(0)
    logits = torch.randn(num_tokens, vocab_size, device="cuda", dtype=dtype) * 4
    labels = torch.randint(0, vocab_size, (num_tokens,), device="cuda")
    labels[0], labels[-1] = 0, vocab_size - 1
    loss, grad = cross_entropy_and_grad(logits, labels)
    rows = torch.tensor(sorted({0, num_tokens // 2, num_tokens - 1}), device="cuda")
    want = torch.softmax(logits[rows].double(), dim=-1)
    want[torch.arange(len(rows)), labels[rows]] -= 1
    assert relative_error(grad[rows], want) < {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-5}[dtype]
    expected = sum(
        torch.nn.functional.cross_entropy(part.double(), label, reduction="sum")
        for part, label in zip(logits.split(1000), labels.split(1000), strict=True)
    )
    assert abs(loss / expected - 1) < 2e-6
