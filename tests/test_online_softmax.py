"""
Merging attention over disjoint sets of keys must be one softmax over all of them, however far apart the scores are.

A failure means wrong attention wherever a kernel needs a chunk's keys in two calls, or NaN once scores grow in training.
"""

from itertools import pairwise

import pytest
import torch
from reference import TOLERANCE, assert_close, difference, draw_qkv, softmax_attention

from hf_fpdt.online_softmax import merge_attention


def parts(qkv, cuts, dtype):
    """`(out, lse)` over each slice of the keys, from fp64."""
    results = []
    for start, stop in pairwise(cuts):
        out, lse = softmax_attention(qkv.query, qkv.key[:, start:stop], qkv.value[:, start:stop], qkv.scale, causal=False)
        results.append((out.to(dtype), lse.to(torch.float64 if dtype == torch.float64 else torch.float32)))
    return results


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cut", [1, 13, 39])
def test_two_parts_are_one_softmax(cut, dtype):
    qkv = draw_qkv(9, 40, dtype=torch.float64, value_dim=24)
    want_out, want_lse = softmax_attention(*qkv.tensors, qkv.scale, causal=False)
    (out_a, lse_a), (out_b, lse_b) = parts(qkv, [0, cut, 40], dtype)
    out, lse = merge_attention(out_a, lse_a, out_b, lse_b)
    assert out.dtype == dtype
    assert lse.dtype == lse_a.dtype
    assert_close(out, want_out.to(dtype), TOLERANCE[dtype])
    assert_close(lse, want_lse, TOLERANCE[lse.dtype])


def test_order_does_not_matter_and_parts_associate():
    qkv = draw_qkv(9, 40, dtype=torch.float64)
    a, b, c = parts(qkv, [0, 7, 30, 40], torch.float64)
    want, want_lse = softmax_attention(*qkv.tensors, qkv.scale, causal=False)
    for first, second, third in ((a, b, c), (c, a, b), (b, c, a)):
        out, lse = merge_attention(*merge_attention(*first, *second), *third)
        assert_close(out, want)
        assert_close(lse, want_lse)


@pytest.mark.parametrize("gap", [-1000.0, -100.0, -20.0, 20.0, 100.0, 1000.0])
def test_far_apart_scores(gap):
    """In fp32 exp overflows from 88 on; the plain form of the merge gives NaN here."""
    generator = torch.Generator().manual_seed(0)
    out_a, out_b = (torch.randn(2, 5, 3, 8, generator=generator) for _ in range(2))
    lse_a = torch.randn(2, 3, 5, generator=generator)
    lse_b = lse_a + gap
    out, lse = merge_attention(out_a, lse_a, out_b, lse_b)
    weight = torch.softmax(torch.stack([lse_a, lse_b]).double(), dim=0).transpose(-1, -2).unsqueeze(-1)
    want = weight[0] * out_a.double() + weight[1] * out_b.double()
    assert_close(out, want.float(), 1e-6)
    assert_close(lse, torch.logsumexp(torch.stack([lse_a, lse_b]).double(), dim=0), 1e-6)
    if gap == 1000.0:
        factor = torch.exp(lse_b - lse_a).transpose(1, 2).unsqueeze(-1)
        naive = (out_a + factor * out_b) / (1 + factor)
        assert not torch.isfinite(naive).any(), "this case no longer tells the two forms apart"


def test_large_scores_of_both_sides():
    out_a, out_b = torch.ones(1, 1, 1, 4), torch.full((1, 1, 1, 4), 3.0)
    out, lse = merge_attention(out_a, torch.full((1, 1, 1), 5000.0), out_b, torch.full((1, 1, 1), 5000.0))
    assert difference(out, torch.full((1, 1, 1, 4), 2.0)) == 0
    assert abs(lse.item() - (5000 + 0.6931472)) < 1e-3


def test_inputs_are_left_alone():
    qkv = draw_qkv(9, 40)
    pieces = [t for part in parts(qkv, [0, 13, 40], torch.float32) for t in part]
    before = [t.clone() for t in pieces]
    merge_attention(*pieces)
    assert all(torch.equal(a, b) for a, b in zip(pieces, before, strict=True))
