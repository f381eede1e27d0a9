"""The loss of a sequence over a group. A failure means a loss or gradients that depend on how the tokens are spread."""

import inspect
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import transformers.integrations.deepspeed
from ranks import run_ranks
from torch import nn

from hf_fpdt.global_loss import global_mean, sequence_parallel_loss

HIDDEN, VOCAB, TOKENS = 6, 11, 8  # tokens of one rank


def problem(seed, world_size, valid):
    """Weight, hidden states and labels of all ranks, of which the first `valid[r]` count on rank r."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64)
    hidden = torch.randn(world_size, TOKENS, HIDDEN, generator=generator, dtype=torch.float64)
    labels = torch.randint(VOCAB, (world_size, TOKENS), generator=generator)
    for rank, count in enumerate(valid):
        labels[rank, count:] = -100
    return weight, hidden, labels


def reference(weight, hidden, labels, scale=1.0):
    """Loss and gradients where all tokens are on one rank."""
    weight, hidden = weight.clone().requires_grad_(), hidden.clone().requires_grad_()
    loss = nn.functional.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten())
    (loss * scale).backward()
    return loss.detach(), weight.grad, hidden.grad


class Head(nn.Module):
    """A model that returns the mean over its own tokens, as transformers' do: NaN if there are none."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, hidden, labels, shift_labels):
        assert labels is shift_labels
        return SimpleNamespace(loss=nn.functional.cross_entropy(hidden @ self.weight.T, shift_labels))


def _step(rank, valid, factor, scale, groups):
    made = [dist.new_group(ranks) for ranks in groups]
    (index,) = [index for index, ranks in enumerate(groups) if rank in ranks]
    weight, hidden, labels = problem(index, len(groups[index]), valid[index])
    place = groups[index].index(rank)
    model, hidden = Head(weight), hidden[place].requires_grad_()
    calls, all_reduce = [], dist.all_reduce
    dist.all_reduce = lambda *args, **kwargs: (calls.append(args), all_reduce(*args, **kwargs))[1]
    inputs = {"hidden": hidden, "shift_labels": labels[place]}
    loss, outputs = sequence_parallel_loss(None, model, inputs, True, None, sp_group=made[index], gradient_factor=factor)
    (loss * scale).backward()
    assert inputs.keys() == {"hidden", "shift_labels"}
    assert outputs.loss is not None
    return loss.detach(), model.weight.grad, hidden.grad, len(calls)


@pytest.mark.parametrize("factor", [1.0, 2.0])
@pytest.mark.parametrize(
    "valid", [[[8, 8]], [[8, 3]], [[0, 5]], [[1, 0]], [[0, 7, 8, 2]]], ids=lambda valid: "-".join(map(str, valid[0]))
)
def test_is_the_loss_on_one_rank(valid, factor):
    """Value and all gradients; weighted by tokens, ranks without any included, and scaled afterwards as by accumulation."""
    world_size, scale = len(valid[0]), 0.25
    loss, weight_grad, hidden_grad = reference(*problem(0, world_size, valid[0]), scale)
    results = run_ranks(_step, world_size, valid, factor, scale, [list(range(world_size))])
    for rank, (got, _, got_hidden_grad, num_calls) in enumerate(results):
        torch.testing.assert_close(got, loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(got_hidden_grad, factor * hidden_grad[rank], rtol=1e-11, atol=1e-14)
        assert num_calls == 1
    total = sum(got for _, got, _, _ in results)
    torch.testing.assert_close(total, factor * weight_grad, rtol=1e-11, atol=1e-13)


def test_groups_are_apart():
    """Sequence times data parallelism on gloo, where a differentiated all-gather fails."""
    groups, valid = [[0, 1], [2, 3]], [[8, 2], [0, 6]]
    results = run_ranks(_step, 4, valid, 1.0, 1.0, groups)
    for index, ranks in enumerate(groups):
        loss, weight_grad, hidden_grad = reference(*problem(index, 2, valid[index]))
        for place, rank in enumerate(ranks):
            torch.testing.assert_close(results[rank][0], loss, rtol=1e-12, atol=0)
            torch.testing.assert_close(results[rank][2], hidden_grad[place], rtol=1e-11, atol=1e-14)
        torch.testing.assert_close(results[ranks[0]][1] + results[ranks[1]][1], weight_grad, rtol=1e-11, atol=1e-13)


def test_no_label_at_all():
    """0 and no gradient, where one rank would have NaN."""
    for loss, weight_grad, hidden_grad, _ in run_ranks(_step, 2, [[0, 0]], 1.0, 1.0, [[0, 1]]):
        assert loss == 0
        assert not weight_grad.any()
        assert not hidden_grad.any()


def _mean(rank, dtype, count):
    loss = torch.tensor([2.0, 4.0][rank], dtype=dtype, requires_grad=True)
    mean = global_mean(loss, torch.tensor(count[rank]), dist.group.WORLD)
    mean.backward()
    with torch.no_grad():
        assert torch.equal(global_mean(loss, torch.tensor(count[rank]), dist.group.WORLD), mean)
    return mean.detach(), loss.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype(dtype):
    for rank, (mean, grad) in enumerate(run_ranks(_mean, 2, dtype, [3, 1])):
        assert (mean.dtype, mean.item()) == (dtype, 2.5)
        assert (grad.dtype, grad.item()) == (dtype, [0.75, 0.25][rank])


def test_counts_beyond_fp32():
    """2**24 + 1 is no fp32 number; of two such counts the shares are still a half each."""
    for mean, grad in run_ranks(_mean, 2, torch.float64, [2**24 + 1, 2**24 + 1]):
        assert mean.item() == 3.0
        assert grad.item() == 0.5
    for rank, (_, grad) in enumerate(run_ranks(_mean, 2, torch.float64, [2**24 + 1, 2**24])):
        assert grad.item() == [2**24 + 1, 2**24][rank] / (2**25 + 1)


def test_a_batch_without_targets_is_refused():
    for inputs in ({"input_ids": 1}, {"input_ids": 1, "shift_labels": None}):
        with pytest.raises(ValueError, match=r"^Sequence parallelism: .*'input_ids'.*no shift_labels.*labels"):
            sequence_parallel_loss(None, None, inputs, False, None, sp_group=None)


def test_arguments_are_those_of_transformers():
    theirs = getattr(transformers.integrations.deepspeed, "deepspeed_sp_compute_loss", None)
    if theirs is None:
        pytest.skip("this transformers has a Trainer method instead")
    ours = inspect.signature(sequence_parallel_loss).parameters.values()
    names = [argument.name for argument in ours if argument.kind is argument.POSITIONAL_OR_KEYWORD]
    assert names == list(inspect.signature(theirs).parameters)
