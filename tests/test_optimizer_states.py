"""
What an optimizer will keep, before it has stepped, against what it keeps after a step; and that Trainer's is planned for.

A failure means that sequences which fit are refused before the first step, or that the second step runs out of memory.
"""

import copy
import math

import pytest
import torch
from reference import make_batch, make_streamed, tiny_llama
from torch import nn
from transformers import Adafactor, Trainer, TrainingArguments

import hf_fpdt
from hf_fpdt.optimizer_states import ADAMW, expect, expected, states_per_byte

PLENTY = 1 << 40


def weights(dtype=torch.float32) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((300, 200), (200,), (256, 256), (5000, 8))]


def bytes_of(optimizer) -> int:
    return sum(value.nbytes for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value))


class WithSchedulerState(torch.optim.SGD):
    """States of its own kind: one in fp64, and a mask."""

    def step(self, closure=None):
        for group in self.param_groups:
            for weight in group["params"]:
                self.state[weight] = {"sum": torch.zeros_like(weight, dtype=torch.float64), "seen": weight > 0, "count": 3}


MAKES = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "adamw, amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-3, amsgrad=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-3),
    "own": lambda p: WithSchedulerState(p, lr=0.1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MAKES)
def test_the_ratio_is_what_a_step_leaves(name, dtype):
    """Within the steps' counters, of four bytes a weight."""
    params = weights(dtype)
    optimizer = MAKES[name](params)
    ratio = states_per_byte(optimizer)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert ratio == pytest.approx(bytes_of(optimizer) / sum(param.nbytes for param in params), abs=2e-3)


@pytest.mark.parametrize("first_moment", [None, 0.9])
def test_factored_states_are_taken_from_above(first_moment):
    """Of a large matrix they are next to nothing, of a small one a little more; the first moment is there or not."""
    params = [nn.Parameter(torch.zeros(1024, 512))]
    optimizer = Adafactor(params, lr=1e-3, relative_step=False, scale_parameter=False, beta1=first_moment)
    ratio = states_per_byte(optimizer)
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    assert 0 <= ratio - bytes_of(optimizer) / params[0].nbytes < 0.02
    assert (ratio > 1) == (first_moment is not None)


def test_groups_count_by_their_weights():
    large, small = nn.Parameter(torch.zeros(300, 100)), nn.Parameter(torch.zeros(100, 100))
    groups = [{"params": [large], "momentum": 0.9}, {"params": [small], "momentum": 0.0}]
    assert states_per_byte(torch.optim.SGD(groups, lr=0.1)) == pytest.approx(0.75)


def test_eight_bit_states():
    """As bitsandbytes has them, a byte a number each and a scale for 256, where it runs on this machine's CPU."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    params = [nn.Parameter(torch.randn(512, 256))]
    optimizer = bitsandbytes.optim.AdamW8bit(params, lr=1e-3)
    ratio = states_per_byte(optimizer)
    params[0].grad = torch.ones_like(params[0])
    try:
        optimizer.step()
    except Exception:
        assert ratio is None
        return
    assert ratio == pytest.approx(bytes_of(optimizer) / params[0].nbytes, rel=0.1)
    assert ratio < 0.6


def test_nothing_is_changed():
    """Weights, gradients, states, a scheduler's counts, hooks and random numbers; a step later it is as without the trial."""
    params = weights()
    optimizer = torch.optim.AdamW(params, lr=1e-3)
    called = []
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    before = copy.deepcopy([param.data for param in params]), torch.get_rng_state()
    states_per_byte(optimizer)
    assert all(torch.equal(param, was) and param.grad is None for param, was in zip(params, before[0], strict=True))
    assert torch.equal(torch.get_rng_state(), before[1])
    assert (len(optimizer.state), called) == (0, [])
    assert [len(group["params"]) for group in optimizer.param_groups] == [len(params)]
    twins = weights()
    other = torch.optim.AdamW(twins, lr=1e-3)
    for param in (*params, *twins):
        param.grad = torch.ones_like(param)
    optimizer.step()
    other.step()
    scheduler.step()
    assert called == ["before", "after"]
    assert all(torch.equal(one, two) for one, two in zip(params, twins, strict=True))


def test_what_cannot_be_tried_is_not_known():
    assert states_per_byte(torch.optim.LBFGS([nn.Parameter(torch.zeros(20, 20))])) is None, "it needs a closure"
    empty = torch.optim.SGD([nn.Parameter(torch.zeros(4, 4))], lr=0.1)
    empty.param_groups[0]["params"] = []
    assert states_per_byte(empty) is None


# In Trainer


class _Reserve:
    """The reserve of the plan that the first step runs by."""

    def __init__(self, model):
        self.model, self.found = model, None

    def __call__(self, *_):
        plans = [plan for plan in self.model.model.__dict__["_fpdt_plans"].values() if plan.peaks is not None]
        self.found = self.found or plans[0].limits.reserve


def trained(tmp_path, optim: str, optimizers=(None, None), **settings):
    """The model after two steps of Trainer, and the reserve of its first one in bytes of the trained weights."""
    model = make_streamed(tiny_llama(), 16, gpu_memory=PLENTY, host_memory=PLENTY, **settings)
    reserve = _Reserve(model)
    model.register_forward_hook(reserve)
    rows = [{name: value[0] for name, value in make_batch(1, 40, seed=index).items()} for index in range(4)]
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=1, optim=optim, use_cpu=True, report_to=[],
        save_strategy="no", disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    if callable(optimizers):
        optimizers = optimizers(model)
    Trainer(model, args, train_dataset=rows, optimizers=optimizers).train()
    return model, reserve.found / sum(weight.nbytes for weight in model.parameters())


@pytest.mark.parametrize(("optim", "states"), [("adamw_torch", 2.0), ("sgd", 0.0), ("adagrad", 1.0), ("adafactor", 0.02)])
def test_trainers_optimizer_is_kept_free(tmp_path, optim, states):
    """Gradients, and its states: before its first step, and nothing once it has stepped. Adafactor: of 128 x 128 weights."""
    model, reserve = trained(tmp_path, optim)
    assert reserve == pytest.approx(1 + states, abs=0.02)
    assert hf_fpdt.plan(model, seq_len=64).limits.reserve < 1.01 * sum(weight.nbytes for weight in model.parameters())


def test_a_step_before_trainer_leaves_no_plan_to_it():
    """The same shape is planned anew when an optimizer is expected."""
    model = make_streamed(tiny_llama(), 16, gpu_memory=PLENTY)
    size = sum(weight.nbytes for weight in model.parameters())
    for ratio, states in ((None, ADAMW), (0.0, 0.0)):
        expect(model.model, ratio)
        model(**make_batch(1, 40)).loss.backward()
        model.zero_grad()
        assert list(model.model.__dict__["_fpdt_plans"].values())[-1].limits.reserve == (1 + states) * size


def test_settings_go_before(tmp_path):
    _, reserve = trained(tmp_path, "adamw_torch", optimizer_memory=0)
    assert reserve == pytest.approx(1)


def test_an_optimizer_of_other_weights_is_not_believed(tmp_path):
    """One that stands for others, which step in the backward: AdamW's states are kept free."""

    class Stand(torch.optim.SGD):
        def step(self, closure=None):
            pass

    def make(model):
        optimizer = Stand([nn.Parameter(torch.zeros(1, 1))], lr=0.1)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)

    model, reserve = trained(tmp_path, "sgd", optimizers=make)
    assert reserve == pytest.approx(1 + ADAMW)
    assert math.isclose(expected(model.model), ADAMW)


def test_adapters(tmp_path):
    """Only what is trained counts, and the model inside is told."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        make_streamed(tiny_llama(), 16, gpu_memory=PLENTY), peft.LoraConfig(target_modules="all-linear")
    )
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, optim="sgd", use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True
    )
    rows = [{name: value[0] for name, value in make_batch(1, 40).items()}]
    Trainer(model, args, train_dataset=rows).train()
    assert expected(model.get_base_model().model) == 0
