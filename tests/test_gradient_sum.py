"""Sums of parameter gradients over chunks: a failure means weights that get only a part of their gradient, or a rounded one."""

import pytest
import torch
from reference import assert_close

from hf_fpdt.gradient_sum import GradientSum


def add_all(chunks, scale=None):
    sums = GradientSum(len(chunks))
    for grads in chunks:
        sums.add(grads)
    return sums.result() if scale is None else sums.result(scale=scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_sum_and_dtype(dtype, count):
    chunks = [[torch.randn(3, 4).to(dtype), torch.randn(7).to(dtype)] for _ in range(count)]
    for index, total in enumerate(add_all(chunks)):
        assert total.dtype == dtype
        assert_close(total, sum(chunk[index].double() for chunk in chunks).to(dtype), 1e-6 if dtype.itemsize > 2 else 1e-2)


def test_bf16_is_summed_in_fp32():
    """1 + 255 x 2^-9: every term is lost in bfloat16, together they are not."""
    chunks = [[torch.ones(1, dtype=torch.bfloat16)]] + [[torch.full((1,), 2.0**-9, dtype=torch.bfloat16)]] * 256
    in_bf16 = torch.zeros(1, dtype=torch.bfloat16)
    for (grad,) in chunks:
        in_bf16 += grad
    assert in_bf16 == 1.0
    assert add_all(chunks)[0] == 1.5


def test_fp64_stays_fp64():
    assert add_all([[torch.ones(1, dtype=torch.float64)], [torch.full((1,), 1e-15, dtype=torch.float64)]])[0] > 1


def test_unused_parameters():
    grad = torch.ones(2)
    assert add_all([[None, grad], [None, grad]])[0] is None
    assert torch.equal(add_all([[None], [grad], [None], [grad]])[0], 2 * grad)
    assert torch.equal(add_all([[grad], [None]])[0], grad)
    assert add_all([[None, grad]])[0] is None


@pytest.mark.parametrize("count", [2, 3])
def test_the_chunks_own_gradients_are_not_written(count):
    """autograd may hand out a gradient that something else still holds."""
    chunks = [[torch.ones(3)] for _ in range(count)]
    total = add_all(chunks, torch.tensor(3.0))[0]
    assert torch.equal(total, torch.full((3,), 3.0 * count))
    assert all(torch.equal(grads[0], torch.ones(3)) for grads in chunks)


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_scale(dtype, count):
    chunks = [[torch.full((3,), 1.25, dtype=dtype)] for _ in range(count)]
    total = add_all(chunks, torch.tensor(0.125))[0]
    assert total.dtype == dtype
    assert torch.equal(total, torch.full((3,), 1.25 * count * 0.125, dtype=dtype))


def test_scale_is_applied_before_rounding():
    """A sum beyond float16's largest number is fine if the scale brings it back."""
    chunks = [[torch.full((1,), 60000.0, dtype=torch.float16)]] * 4
    assert add_all(chunks)[0].isinf()
    assert add_all(chunks, torch.tensor(2.0**-10))[0] == 240000 * 2.0**-10


def test_one_chunk_is_not_copied():
    grad = torch.ones(3)
    assert add_all([[grad]])[0] is grad
