"""
Logits that are computed only if somebody looks: they pass for a tensor, replay what was done to them, and are right when used.

A failure means a loss over other logits than the model's, or an output whose logits cannot be read.
"""

import copy
import pickle

import pytest
import torch
from reference import assert_close
from torch import nn

from hf_fpdt.deferred_logits import DeferredLogits

HIDDEN, VOCAB = 8, 11


@pytest.fixture
def head():
    return nn.Linear(HIDDEN, VOCAB)


@pytest.fixture
def hidden():
    return torch.randn(2, 5, HIDDEN, requires_grad=True)


@pytest.fixture
def logits(head, hidden):
    return DeferredLogits(hidden, head, head.forward, vocab_size=VOCAB, dtype=torch.float32)


@pytest.fixture
def calls(head, monkeypatch):
    """Input shapes of every call of the head."""
    seen, forward = [], head.forward
    monkeypatch.setattr(head, "forward", lambda x: seen.append(tuple(x.shape)) or forward(x))
    return seen


def test_metadata_without_computing(head, hidden, calls):
    logits = DeferredLogits(hidden, head, head.forward, vocab_size=VOCAB, dtype=torch.bfloat16)
    assert isinstance(logits, torch.Tensor)
    assert logits.shape == logits.size() == torch.Size([2, 5, VOCAB])
    assert (logits.size(-1), logits.ndim, logits.dim(), logits.numel(), len(logits)) == (VOCAB, 3, 3, 110, 2)
    assert logits.dtype == torch.bfloat16
    assert logits.device == hidden.device
    assert logits.is_floating_point()
    assert torch.is_floating_point(logits)
    assert torch.is_tensor(logits)
    assert "DeferredLogits(shape=(2, 5, 11)" in repr(logits)
    assert calls == []


STEPS = {
    "detach": lambda x: x.detach(),
    "clone": lambda x: x.clone(),
    "contiguous": lambda x: x.contiguous(),
    "mul": lambda x: x * 0.5,
    "rmul": lambda x: 0.5 * x,
    "torch_mul": lambda x: torch.mul(x, 0.5),
    "div": lambda x: x / 3.0,
    "torch_div": lambda x: torch.div(x, 3.0),
    "add": lambda x: x + 1.0,
    "radd": lambda x: 1.0 + x,
    "sub": lambda x: x - 1.0,
    "alpha": lambda x: torch.add(x, 2.0, alpha=3.0),
    "tanh": lambda x: x.tanh(),
    "torch_tanh": lambda x: torch.tanh(x),
    "neg": lambda x: -x,
    "float": lambda x: x.float(),
    "to": lambda x: x.to(torch.float64),
    "to_keyword": lambda x: x.to(dtype=torch.float64),
    "half": lambda x: x.half(),
    "bfloat16": lambda x: x.bfloat16(),
    "scalar_tensor": lambda x: x * torch.tensor(0.25),
    "softcap": lambda x: torch.tanh(x / 30.0) * 30.0,
    "cohere_and_back": lambda x: (x * 0.0625).bfloat16().float(),
}


@pytest.mark.parametrize("name", STEPS)
def test_elementwise_steps_are_replayed(logits, head, hidden, calls, name):
    step = STEPS[name]
    deferred = step(logits)
    assert type(deferred) is DeferredLogits
    assert calls == [], "recorded, not computed"
    want = step(head(hidden))
    assert (deferred.dtype, deferred.shape) == (want.dtype, want.shape)
    assert torch.equal(deferred.logits_of(hidden), want)
    # on any positions, as the chunked loss asks for them
    rows = hidden.reshape(-1, HIDDEN)[3:7]
    assert torch.equal(deferred.logits_of(rows), want.reshape(-1, VOCAB)[3:7])


def test_a_step_does_not_change_the_logits_before_it(logits, head, hidden):
    scaled = logits * 2.0
    assert torch.equal(logits.logits_of(hidden), head(hidden))
    assert torch.equal(scaled.logits_of(hidden), head(hidden) * 2.0)


def test_steps_alone_do_not_touch_gradients(logits, head, hidden):
    (logits.float() * 2.0).logits_of(hidden).sum().backward()
    assert_close(hidden.grad, 2.0 * head.weight.sum(0).expand_as(hidden), 1e-6)


USES = {
    "index": lambda x: x[:, :-1],
    "argmax": lambda x: x.argmax(-1),
    "softmax": lambda x: torch.log_softmax(x, -1),
    "matmul": lambda x: x @ torch.ones(VOCAB, 2),
    "add_tensor": lambda x: x + torch.arange(VOCAB, dtype=torch.float32),
    "add_itself": lambda x: x + x,
    "tensor_first": lambda x: torch.arange(VOCAB, dtype=torch.float32) * x,
    "rsub": lambda x: 1.0 - x,
    "rdiv": lambda x: 1.0 / (x + 100.0),
    "cat": lambda x: torch.cat([x, x]),
    "view": lambda x: x.view(-1, VOCAB),
    "compare": lambda x: x > 0,
    "to_device": lambda x: x.to("cpu"),
    "to_tensor": lambda x: x.to(torch.zeros(1, dtype=torch.float64)),
    "keyword_only": lambda x: torch.tanh(input=x),
    "after_step": lambda x: (x * 2.0).amax(-1),
    "cross_entropy": lambda x: nn.functional.cross_entropy(x.view(-1, VOCAB), torch.arange(10)),
    "out": lambda x: torch.mul(x, 2.0, out=torch.zeros(2, 5, VOCAB)),
}


@pytest.mark.parametrize("name", USES)
def test_any_other_use_computes_them(logits, head, hidden, name):
    use = USES[name]
    with torch.set_grad_enabled(name != "out"):
        got, want = use(logits), use(head(hidden))
    assert type(got) is torch.Tensor or name == "keyword_only"
    assert torch.equal(got if name != "keyword_only" else got + torch.zeros(VOCAB), want)


def test_reading_values(logits, head, hidden):
    want = head(hidden)
    assert logits.tolist() == want.tolist()
    assert (logits.detach().numpy() == want.detach().numpy()).all()
    assert logits[0, 0, 0].item() == want[0, 0, 0].item()
    assert torch.equal(torch.as_tensor(logits.cpu()), want)
    assert torch.allclose(logits, want)


def test_a_parameter_as_a_factor_keeps_its_gradient(logits, head, hidden):
    """A learned scale of the logits: it may not become a constant of a replayed step."""
    scale = torch.tensor(2.0, requires_grad=True)
    (logits * scale).sum().backward()
    assert_close(scale.grad, head(hidden).sum().detach(), 1e-5)


def test_gradients_of_computed_logits(head, hidden):
    logits = DeferredLogits(hidden, head, head.forward, vocab_size=VOCAB, dtype=torch.float32)
    factor = torch.randn(2, 5, VOCAB)
    got = torch.autograd.grad((torch.tanh(logits / 3.0) * factor).sum(), [hidden, *head.parameters()])
    want = torch.autograd.grad((torch.tanh(head(hidden) / 3.0) * factor).sum(), [hidden, *head.parameters()])
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, 1e-6)


def test_in_place_scaling(logits):
    """It would change a copy and be lost for whoever holds the same object."""
    with pytest.raises(ValueError, match="changes the logits of a call with labels in place"):
        logits /= 2.0


def test_copies_are_plain_tensors(logits, head, hidden):
    want = head(hidden).detach()
    for duplicate in (copy.deepcopy(logits), pickle.loads(pickle.dumps(logits.detach()))):
        assert type(duplicate) is torch.Tensor
        assert torch.equal(duplicate, want)


def test_no_grad(head, hidden):
    with torch.no_grad():
        logits = DeferredLogits(hidden, head, head.forward, vocab_size=VOCAB, dtype=torch.float32)
        got = logits.softmax(-1)
    assert not got.requires_grad
    assert torch.equal(got, head(hidden).softmax(-1))
