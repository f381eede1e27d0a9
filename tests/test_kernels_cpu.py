"""
The kernels that run on a CPU, and causal attention of a chunk built from them, against one softmax in fp64.

`naive` is the definition that the probe holds every GPU kernel to: a failure of it means that a wrong kernel could be chosen.
"""

import pytest
import torch
from reference import TOLERANCE, assert_close, difference, draw_qkv, softmax_attention
from torch.nn import functional as F

from hf_fpdt.attention_kernels import NaiveKernel, ScoreRule
from hf_fpdt.causal_attention import attend_prefix, attend_prefix_backward
from hf_fpdt.chunking import chunk_spans
from hf_fpdt.kernel_choice import KERNELS

NAIVE, TORCH_CPU = KERNELS["naive"], KERNELS["torch_cpu"]
HEADS = [(4, 4), (4, 2), (6, 2), (4, 1), (1, 1)]
LABELS = ("grad_query", "grad_key", "grad_value")


def true_gradients(qkv, *, causal):
    """By autograd through the fp64 softmax."""
    leaves = [x.detach().double().requires_grad_() for x in qkv.tensors]
    out, _ = softmax_attention(*leaves, qkv.scale, causal=causal)
    return torch.autograd.grad(out, leaves, qkv.grad_out.double())


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_naive_is_the_definition(dtype, heads, kv_heads, causal):
    qkv = draw_qkv(19, 31, heads=heads, kv_heads=kv_heads, value_dim=24, dtype=dtype)
    want, want_lse = softmax_attention(*qkv.tensors, qkv.scale, causal=causal)
    out, lse = NAIVE.forward(*qkv.tensors, qkv.rule, causal=causal)
    assert (out.dtype, lse.dtype) == (dtype, dtype)
    assert_close(out, want)
    assert_close(lse, want_lse)
    grads = NAIVE.backward(qkv.grad_out, *qkv.tensors, out, lse, qkv.rule, causal=causal)
    for label, grad, want in zip(LABELS, grads, true_gradients(qkv, causal=causal), strict=True):
        assert_close(grad, want, what=label)


@pytest.mark.parametrize("max_scores", [1, 2 * 4 * 31, 5 * 2 * 4 * 31])
def test_naive_by_blocks_of_rows(monkeypatch, max_scores):
    """Long inputs are worked on a block of rows at a time: one row, another row a block, a ragged last block."""
    qkv = draw_qkv(19, 31)
    want = NAIVE.forward(*qkv.tensors, qkv.rule, causal=True)
    want += tuple(NAIVE.backward(qkv.grad_out, *qkv.tensors, *want, qkv.rule, causal=True))
    monkeypatch.setattr(NaiveKernel, "max_scores", max_scores)
    assert len(NAIVE._row_blocks(qkv.query, qkv.key)) > 1
    got = NAIVE.forward(*qkv.tensors, qkv.rule, causal=True)
    got += tuple(NAIVE.backward(qkv.grad_out, *qkv.tensors, *got, qkv.rule, causal=True))
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, 1e-6)


def test_naive_handles_scores_beyond_exp():
    """Scores of +-1000: exp would overflow, the log-sum-exp must not."""
    qkv = draw_qkv(5, 7, heads=1, kv_heads=1)
    out, lse = NAIVE.forward(qkv.query * 1e3, qkv.key, qkv.value, ScoreRule(1.0), causal=False)
    scores = torch.einsum("bqhd,bkhd->bhqk", qkv.query.double() * 1e3, qkv.key.double())
    assert scores.abs().max() > 1000
    assert_close(lse, torch.logsumexp(scores, -1).float(), 1e-5)
    assert_close(out, torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), qkv.value.double()).float(), 1e-3)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_torch_cpu_agrees_with_naive(dtype, heads, kv_heads, causal):
    keys = 19 if causal else 31  # it aligns causality with the first key, so causal only on squares
    qkv = draw_qkv(19, keys, heads=heads, kv_heads=kv_heads, dtype=dtype)
    results = []
    for kernel in (TORCH_CPU, NAIVE):
        out, lse = kernel.forward(*qkv.tensors, qkv.rule, causal=causal)
        results.append((out, lse, *kernel.backward(qkv.grad_out, *qkv.tensors, out, lse, qkv.rule, causal=causal)))
    for label, got, want in zip(("out", "lse", *LABELS), *results, strict=True):
        assert got.dtype == want.dtype
        assert_close(got, want, TOLERANCE[dtype], label)


@pytest.mark.parametrize("kernel", [NAIVE, TORCH_CPU], ids=lambda k: k.name)
def test_backward_adds_up_over_blocks_of_keys(kernel):
    """With the out and lse over all keys, gradients of blocks of keys sum to the gradient over all."""
    qkv = draw_qkv(9, 40, dtype=torch.float64)
    out, lse = softmax_attention(*qkv.tensors, qkv.scale, causal=False)
    want = true_gradients(qkv, causal=False)
    grad_query, pieces = 0, []
    for start, stop in ((0, 11), (11, 30), (30, 40)):
        grads = kernel.backward(
            qkv.grad_out, qkv.query, qkv.key[:, start:stop], qkv.value[:, start:stop], out, lse, qkv.rule, causal=False
        )
        grad_query = grad_query + grads[0]
        pieces.append(grads[1:])
    assert_close(grad_query, want[0])
    assert_close(torch.cat([p[0] for p in pieces], 1), want[1])
    assert_close(torch.cat([p[1] for p in pieces], 1), want[2])


def run_chunks(kernel, qkv, spans):
    """What a layer does: chunks forward in order, backward last first; returns out, lse and the three gradients."""
    wide = torch.promote_types(qkv.key.dtype, torch.float32)
    grad_key, grad_value = (torch.zeros_like(t, dtype=wide) for t in (qkv.key, qkv.value))
    forward = []
    for start, stop in spans:
        forward.append(
            attend_prefix(kernel, qkv.query[:, start:stop].contiguous(), qkv.key[:, :stop], qkv.value[:, :stop], qkv.rule)
        )
    grad_queries = []
    for (start, stop), (out, lse) in reversed(list(zip(spans, forward, strict=True))):
        grad_queries.append(
            attend_prefix_backward(
                kernel,
                qkv.grad_out[:, start:stop].contiguous(),
                qkv.query[:, start:stop].contiguous(),
                qkv.key[:, :stop],
                qkv.value[:, :stop],
                out,
                lse,
                qkv.rule,
                grad_key[:, :stop],
                grad_value[:, :stop],
            )
        )
    outs, lses = zip(*forward, strict=True)
    return torch.cat(outs, 1), torch.cat(lses, 2), torch.cat(grad_queries[::-1], 1), grad_key, grad_value


@pytest.mark.parametrize("chunk", [1, 16, 17, 50, 100])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kernel", [NAIVE, TORCH_CPU], ids=lambda k: k.name)
def test_chunks_are_causal_attention(kernel, dtype, heads, kv_heads, chunk):
    qkv = draw_qkv(50, 50, heads=heads, kv_heads=kv_heads, dtype=dtype)
    want_out, want_lse = softmax_attention(*qkv.tensors, qkv.scale, causal=True)
    want = (want_out, want_lse, *true_gradients(qkv, causal=True))
    got = run_chunks(kernel, qkv, chunk_spans(50, chunk))
    for label, a, b in zip(("out", "lse", *LABELS), got, want, strict=True):
        assert_close(a, b, TOLERANCE[dtype], label)


@pytest.mark.parametrize("max_keys", [1, 7, 16, 33, 49])
@pytest.mark.parametrize("kernel", [NAIVE, TORCH_CPU], ids=lambda k: k.name)
def test_backward_in_several_calls(monkeypatch, kernel, max_keys):
    """A long prefix is cut into calls of at most `max_keys` keys, or the chunk's own if it is longer."""
    qkv = draw_qkv(50, 50, dtype=torch.float64)
    seen = []

    def backward(grad_out, query, key, *args, **kwargs):
        seen.append((query.shape[1], key.shape[1], kwargs["causal"]))
        return type(kernel).backward(kernel, grad_out, query, key, *args, **kwargs)

    monkeypatch.setattr(kernel, "backward", backward, raising=False)
    monkeypatch.setattr("hf_fpdt.causal_attention.MAX_BACKWARD_KEYS", max_keys)
    got = run_chunks(kernel, qkv, chunk_spans(50, 16))
    for label, a, b in zip(LABELS, got[2:], true_gradients(qkv, causal=True), strict=True):
        assert_close(a, b, TOLERANCE[torch.float64], label)
    assert all(keys <= max(max_keys, queries) for queries, keys, _ in seen)
    assert sum(causal for *_, causal in seen) == 4


@pytest.mark.parametrize("kernel", [NAIVE, TORCH_CPU], ids=lambda k: k.name)
def test_backward_adds_to_what_is_there(kernel):
    """Later chunks have put their part into grad_key and grad_value already."""
    qkv = draw_qkv(10, 30, dtype=torch.float64)
    out, lse = attend_prefix(kernel, *qkv.tensors, qkv.rule)
    grad_key, grad_value = torch.full_like(qkv.key, 5.0), torch.full_like(qkv.value, -7.0)
    grad_query = attend_prefix_backward(kernel, qkv.grad_out, *qkv.tensors, out, lse, qkv.rule, grad_key, grad_value)
    want = true_gradients(qkv, causal=True)
    assert_close(grad_query, want[0])
    assert_close(grad_key - 5.0, want[1])
    assert_close(grad_value + 7.0, want[2])


def relative_errors(got, truth):
    return [
        (torch.linalg.vector_norm(a.double() - b) / torch.linalg.vector_norm(b)).item() for a, b in zip(got, truth, strict=True)
    ]


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (8, 2), (4, 1)])
@pytest.mark.parametrize("kernel", [NAIVE, TORCH_CPU], ids=lambda k: k.name)
def test_bf16_error_is_that_of_sdpa(kernel, heads, kv_heads):
    """
    Five chunks are no further from the truth than one SDPA call over the whole sequence. Where a kernel needs two calls a
    chunk, each rounds out and grad_query to bfloat16 before their sum is rounded again: 1.12 times SDPA's error in those two,
    measured. The whole model stays within 1.1 (test_model_exact.py).
    """
    limits = dict.fromkeys(("out", *LABELS), 1.1)
    if not kernel.aligns_last:
        limits["out"] = limits["grad_query"] = 1.15
    ours, theirs = [], []
    for seed in range(4):
        qkv = draw_qkv(160, 160, heads=heads, kv_heads=kv_heads, head_dim=32, dtype=torch.bfloat16, seed=seed)
        truth = (softmax_attention(*qkv.tensors, qkv.scale, causal=True)[0], *true_gradients(qkv, causal=True))
        out, _, *grads = run_chunks(kernel, qkv, chunk_spans(160, 32))
        ours.append(relative_errors((out, *(g.to(torch.bfloat16) for g in grads)), truth))
        leaves = [x.detach().clone().requires_grad_() for x in qkv.tensors]
        wide = [x.repeat_interleave(heads // x.shape[2], dim=2).transpose(1, 2) for x in leaves]
        plain = F.scaled_dot_product_attention(*wide, is_causal=True, scale=qkv.scale).transpose(1, 2)
        theirs.append(relative_errors((plain, *torch.autograd.grad(plain, leaves, qkv.grad_out)), truth))
    for label, a, b in zip(("out", *LABELS), torch.tensor(ours).mean(0), torch.tensor(theirs).mean(0), strict=True):
        assert a <= limits[label] * b, f"{label}: error {a:.2e}, SDPA's {b:.2e}"
        assert 1e-4 < b < 1e-1


def test_reasons_to_refuse():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for name in ("naive", "torch_cpu"):
        assert KERNELS[name].why_not(cpu, torch.float32, 16, 16) is None
    assert "runs on the CPU only, and the tensors are on cuda" in TORCH_CPU.why_not(cuda, torch.float32, 16, 16)
    flash, cudnn = KERNELS["torch_flash"], KERNELS["cudnn"]
    assert "runs on CUDA devices only" in flash.why_not(cpu, torch.bfloat16, 64, 64)
    assert "needs float16 or bfloat16, and the attention runs in float32" in flash.why_not(cuda, torch.float32, 64, 64)
    assert "heads of 256 at most, and the model has 264" in flash.why_not(cuda, torch.bfloat16, 264, 264)
    assert "heads of 128 at most, and the model has 192" in cudnn.why_not(cuda, torch.bfloat16, 192, 192)


def test_the_reference_itself():
    """The fp64 softmax of these tests against torch's own attention, with grouped heads and a causal mask."""
    qkv = draw_qkv(20, 20, dtype=torch.float64)
    wide = [x.repeat_interleave(4 // x.shape[2], dim=2).transpose(1, 2) for x in qkv.tensors]
    want = F.scaled_dot_product_attention(*wide, is_causal=True, scale=qkv.scale).transpose(1, 2)
    got, _ = softmax_attention(*qkv.tensors, qkv.scale, causal=True)
    assert difference(got, want) <= 1e-12


def test_one_query_and_one_key_in_cudnn():
    """It has no such problem; the definition stands in."""
    qkv, kernel = draw_qkv(1, 1), KERNELS["cudnn"]
    out, lse = kernel.forward(*qkv.tensors, qkv.rule, causal=True)
    want, want_lse = softmax_attention(*qkv.tensors, qkv.scale, causal=True)
    assert difference(out, want) <= 1e-5
    assert difference(lse, want_lse) <= 1e-5
    *_, grad_value = kernel.backward(qkv.grad_out, *qkv.tensors, out, lse, qkv.rule, causal=True)
    assert difference(grad_value, qkv.grad_out.unflatten(2, (2, 2)).sum(3)) <= 1e-5
