"""A gradient that somebody else holds must not be written to: a hook or `torch.autograd.grad` would return other values."""

import pytest
import torch
from reference import make_batch, make_model, make_streamed, tiny_llama

from hf_fpdt.sole_owner import counts_of_unshared, is_sole_owner


class Probe(torch.autograd.Function):
    """Records whether its gradient is its own."""

    seen: list = []

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        Probe.seen.append(is_sole_owner(grad))
        return grad.clone()


def owned(use):
    counts_of_unshared()
    Probe.seen = []
    use(torch.randn(3, 4, requires_grad=True))
    return Probe.seen[-1]


def test_a_gradient_in_a_chain_is_owned():
    assert owned(lambda x: Probe.apply(Probe.apply(x)).sum().backward())


def test_a_hook_that_keeps_it_is_seen():
    kept = []

    def use(x):
        hidden = Probe.apply(x)
        hidden.register_hook(kept.append)
        Probe.apply(hidden).sum().backward()

    assert not owned(use)


def test_a_gradient_asked_for_is_seen():
    def use(x):
        hidden = Probe.apply(x)
        torch.autograd.grad(Probe.apply(hidden).sum(), (hidden, x))

    assert not owned(use)


def test_a_broadcast_gradient_is_seen():
    assert not owned(lambda x: Probe.apply(x).sum().backward())


def test_a_caller_that_keeps_it_is_seen():
    grad = torch.ones(3, 4)
    assert not owned(lambda x: Probe.apply(x).backward(grad))


@pytest.mark.parametrize("settings", [{}, {"gpu_memory": 1 << 40}], ids=["runs again", "keeps all"])
def test_gradients_of_hidden_states_are_those_of_eager(settings):
    """Every hidden state's gradient is kept by somebody: by a hook, by retain_grad, by a second use in the loss."""
    batch = make_batch(2, 47)

    def gradients(model):
        hooked, retained = [], []

        def watch(module, args, output):
            hidden = output[0] if isinstance(output, tuple) else output
            hidden.register_hook(hooked.append)
            hidden.retain_grad()
            retained.append(hidden)

        handles = [layer.register_forward_hook(watch) for layer in model.model.layers]
        output = model(**batch, output_hidden_states=True)
        (output.loss + sum(h.pow(2).mean() for h in output.hidden_states)).backward()
        for handle in handles:
            handle.remove()
        return [*hooked, *(h.grad for h in retained), *(p.grad for p in model.parameters())]

    got, want = gradients(make_streamed(tiny_llama(), 10, **settings)), gradients(make_model(tiny_llama(), "eager"))
    for a, b in zip(got, want, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()
