"""
The loss in chunks of tokens against torch's cross-entropy over all logits at once.

A failure means a wrong loss or wrong gradients for every streamed model, whatever its layers do.
"""

import pytest
import torch
from reference import TOLERANCE, assert_close
from torch import nn
from torch.nn import functional as F
from transformers.loss.loss_utils import ForCausalLMLoss

from hf_fpdt import chunked_loss
from hf_fpdt.chunked_loss import chunked_cross_entropy
from hf_fpdt.cross_entropy import cross_entropy_and_grad, cross_entropy_sum
from hf_fpdt.deferred_logits import DeferredLogits
from hf_fpdt.model_loss import causal_lm_loss

BATCH, SEQ, HIDDEN, VOCAB = 2, 15, 8, 23
CHUNK = 7  # tokens of one chunk


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(chunked_loss, "AUTO_CHUNK_LOGITS", {"cpu": CHUNK * VOCAB + 1})


def make(dtype=torch.float32, *, bias=False, seed=0):
    torch.manual_seed(seed)
    head = nn.Linear(HIDDEN, VOCAB, bias=bias).to(dtype)
    nn.init.normal_(head.weight)
    hidden = torch.randn(BATCH, SEQ, HIDDEN, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(0, VOCAB, (BATCH, SEQ))
    return head, hidden, labels


def reference(head, hidden, labels, factor=1.0, post=lambda logits: logits):
    """Sum of the losses in fp64, its count, and the gradients of `factor * sum`."""
    leaves = [t.detach().double().requires_grad_(t.requires_grad) for t in (hidden, *head.parameters())]
    logits = post(F.linear(leaves[0], *leaves[1:]))
    total = F.cross_entropy(logits.reshape(-1, VOCAB), labels.reshape(-1), reduction="sum", ignore_index=-100)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    grads = torch.autograd.grad(total * factor, wanted) if wanted else []
    return total.detach(), int((labels != -100).sum()), grads


def check(head, hidden, labels, factor=1.0, tolerance=None, post=lambda logits: logits):
    weights = [w for w in head.parameters() if w.requires_grad]
    total, count = chunked_cross_entropy(hidden, labels, lambda h: post(head(h)), weights, vocab_size=VOCAB)
    want_total, want_count, want = reference(head, hidden, labels, factor, post)
    tolerance = TOLERANCE[hidden.dtype] if tolerance is None else tolerance
    assert total.dtype == torch.promote_types(hidden.dtype, torch.float32)
    assert (count.dtype, int(count)) == (torch.int64, want_count)
    assert_close(total, want_total, tolerance, "loss")
    leaves = [t for t in (hidden, *head.parameters()) if t.requires_grad]
    got = torch.autograd.grad(total * factor, leaves)
    for leaf, a, b in zip(leaves, got, want, strict=True):
        assert a.dtype == leaf.dtype
        assert_close(a, b, tolerance, "gradient")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_cross_entropy(dtype, bias):
    check(*make(dtype, bias=bias))


def test_bf16():
    check(*make(torch.bfloat16, bias=True), factor=1 / 30)


@pytest.mark.parametrize("limit", [1, VOCAB, 2 * VOCAB, 29 * VOCAB, 30 * VOCAB, 1 << 30])
def test_any_chunk_size(monkeypatch, limit):
    monkeypatch.setattr(chunked_loss, "AUTO_CHUNK_LOGITS", {"cpu": limit})
    head, hidden, labels = make()
    rows, forward = [], head.forward
    head.forward = lambda h: rows.append(h.shape[0]) or forward(h)
    check(head, hidden, labels)
    assert max(rows) == min(max(1, limit // VOCAB), BATCH * SEQ)
    assert sum(rows) == BATCH * SEQ


@pytest.mark.parametrize("factor", [0.37, -2.0, 1e-6, 65536.0])
def test_a_factor_on_the_loss_reaches_every_gradient(factor):
    check(*make(bias=True), factor=factor)


def test_fp16_gradients_do_not_underflow():
    """1/tokens arrives with the incoming gradient; applied to half-precision sums early it would be zero."""
    head, hidden, labels = make(torch.float16)
    total, _ = chunked_cross_entropy(hidden, labels, head, [head.weight], vocab_size=VOCAB)
    scale = 2.0**-14
    (total * scale).backward()
    _, _, want = reference(head, hidden, labels, scale)
    assert_close(head.weight.grad, want[1].half(), 2e-2)


@pytest.mark.parametrize("ignored", [slice(0, 5), slice(0, 14), slice(8, 15), slice(0, 15)], ids=str)
def test_ignored_positions(ignored):
    head, hidden, labels = make()
    labels[0, ignored] = -100
    labels[1, 3] = -100
    check(head, hidden, labels)
    total, _ = chunked_cross_entropy(hidden, labels, head, [head.weight], vocab_size=VOCAB)
    grad = torch.autograd.grad(total, hidden)[0]
    assert not grad[labels == -100].any()
    assert grad[labels != -100].any(-1).all()


def test_ignored_positions_are_not_computed():
    head, hidden, labels = make()
    labels[:, :10] = -100
    rows = []
    chunked_cross_entropy(hidden, labels, lambda h: rows.append(h.shape[0]) or head(h), [head.weight], vocab_size=VOCAB)
    assert rows == [7, 3]


def test_everything_ignored():
    head, hidden, labels = make(bias=True)
    labels[:] = -100
    total, count = chunked_cross_entropy(hidden, labels, head, list(head.parameters()), vocab_size=VOCAB)
    assert (total.item(), count.item()) == (0.0, 0)
    total.backward()
    for leaf in (hidden, *head.parameters()):
        assert leaf.grad.shape == leaf.shape
        assert not leaf.grad.any()


def test_another_ignore_index():
    head, hidden, labels = make()
    labels[0, :4] = 5
    total, count = chunked_cross_entropy(hidden, labels, head, [], vocab_size=VOCAB, ignore_index=5)
    want = F.cross_entropy(head(hidden).reshape(-1, VOCAB), labels.reshape(-1), reduction="sum", ignore_index=5)
    assert_close(total, want)
    assert count == (labels != 5).sum() < BATCH * SEQ


@pytest.mark.parametrize("frozen", ["head", "hidden", "head weight only"])
def test_frozen(frozen):
    head, hidden, labels = make(bias=True)
    if frozen == "hidden":
        hidden.requires_grad_(False)
    elif frozen == "head":
        head.requires_grad_(False)
    else:
        head.weight.requires_grad_(False)
    check(head, hidden, labels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_cross_entropy_and_grad(dtype):
    """The inner step: one block of logits to its loss and gradient, the logits left alone."""
    logits, labels = (3 * torch.randn(9, VOCAB)).to(dtype).requires_grad_(), torch.randint(0, VOCAB, (9,))
    before = logits.detach().clone()
    want = F.cross_entropy(logits.double(), labels, reduction="sum")
    (want_grad,) = torch.autograd.grad(want, logits)
    loss, grad = cross_entropy_and_grad(logits.detach(), labels)
    assert_close(loss, want, TOLERANCE[loss.dtype])
    assert grad.dtype == dtype
    assert_close(grad, want_grad, TOLERANCE[dtype])
    assert_close(cross_entropy_sum(logits, labels), want, TOLERANCE[loss.dtype])
    assert torch.equal(logits, before)


def test_labels_out_of_range():
    head, hidden, labels = make()
    for bad in (VOCAB, -1):
        labels[0, 0] = bad
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            chunked_cross_entropy(hidden, labels, head, [head.weight], vocab_size=VOCAB)


def test_nothing_to_train():
    head, hidden, labels = make()
    want, _, _ = reference(head, hidden, labels)
    results = []
    with torch.no_grad():
        results.append(chunked_cross_entropy(hidden, labels, head, [head.weight], vocab_size=VOCAB)[0])
    head.requires_grad_(False)
    results.append(chunked_cross_entropy(hidden.detach(), labels, head, [], vocab_size=VOCAB)[0])
    for total in results:
        assert not total.requires_grad
        assert_close(total, want)


def test_second_backward():
    head, hidden, labels = make()
    total, _ = chunked_cross_entropy(hidden, labels, head, [head.weight], vocab_size=VOCAB)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward through the chunked loss a second time"):
        total.backward()


def test_number_of_labels():
    head, hidden, labels = make()
    with pytest.raises(ValueError, match="labels have 28 positions and the hidden states 30; they must agree"):
        chunked_cross_entropy(hidden, labels[:, 1:], head, [], vocab_size=VOCAB)


def test_large_logits():
    """log-softmax over logits of some thousands; exp of them would be infinite."""
    head, hidden, labels = make()
    with torch.no_grad():
        head.weight *= 1000
    check(head, hidden, labels)


# -- the loss function that a model calls ------------------------------------------------------------------------------


def deferred(head, hidden, post=lambda logits: logits):
    return post(DeferredLogits(hidden, head, head.forward, vocab_size=VOCAB, dtype=hidden.dtype))


def compare_with_transformers(post=lambda logits: logits, **kwargs):
    head, hidden, labels = make(bias=True)
    labels[1, 4:9] = -100
    kwargs = {name: value(labels) if callable(value) else value for name, value in kwargs.items()}
    leaves = [hidden, *head.parameters()]
    want = ForCausalLMLoss(post(head(hidden)), labels, VOCAB, **kwargs)
    got = causal_lm_loss(deferred(head, hidden, post), labels, VOCAB, **kwargs)
    assert got.ndim == 0
    assert_close(got, want, 2e-6)
    for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True):
        assert_close(a, b, 1e-5)
    return got


def test_loss_is_transformers_loss():
    compare_with_transformers()


@pytest.mark.parametrize("items", [64, torch.tensor(64), torch.tensor(64.0), 1])
def test_num_items_in_batch(items):
    got = compare_with_transformers(num_items_in_batch=items)
    mean = compare_with_transformers()
    assert abs(got * float(items) - mean * 23) <= 1e-4 * mean * 23  # 2 x 14 labels after the shift, 5 ignored


def test_shift_labels():
    compare_with_transformers(shift_labels=lambda labels: labels.roll(3, dims=1))


def test_ignore_index():
    head, hidden, labels = make()
    labels[:, ::3] = 4
    want = ForCausalLMLoss(head(hidden), labels, VOCAB, ignore_index=4)
    assert_close(causal_lm_loss(deferred(head, hidden), labels, VOCAB, ignore_index=4), want, 2e-6)
    assert abs(want - ForCausalLMLoss(head(hidden), labels, VOCAB)) > 1e-2


def test_softcapped_logits():
    compare_with_transformers(post=lambda logits: torch.tanh(logits / 2.0) * 2.0)


def test_scaled_logits():
    compare_with_transformers(post=lambda logits: logits.float() * 0.0625)


def test_plain_logits_go_to_transformers():
    head, hidden, labels = make()
    logits = head(hidden)
    assert torch.equal(causal_lm_loss(logits, labels, VOCAB), ForCausalLMLoss(logits, labels, VOCAB))


def test_a_batch_without_labels_is_zero():
    head, hidden, labels = make()
    loss = causal_lm_loss(deferred(head, hidden), torch.full_like(labels, -100), VOCAB)
    loss.backward()
    assert loss == 0
    assert not hidden.grad.any()
    assert not head.weight.grad.any()


def test_the_reference_itself():
    """The fp64 reference of these tests against a sum written out."""
    head, hidden, labels = make()
    labels[0, 0] = -100
    logits = head(hidden).double()
    want = sum(
        logits[b, s].exp().sum().log() - logits[b, s, labels[b, s]]
        for b in range(BATCH)
        for s in range(SEQ)
        if labels[b, s] >= 0
    )
    assert_close(reference(head, hidden, labels)[0], want.detach(), 1e-6)
