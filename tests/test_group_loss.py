"""
The loss that a model in a group returns by itself, against one process with the whole sequence. A failure means that a loop
which reads `model(**batch).loss` trains something else.
"""

import re

import pytest
import torch
import torch.distributed as dist
import transformers.integrations.deepspeed
from ranks import run_ranks
from reference import (
    LOSS_TOLERANCE,
    TOLERANCE,
    assert_gradients_close,
    gradients,
    loss_and_gradients,
    make_batch,
    make_model,
    tiny_llama,
)  # fmt: skip
from test_sequence_parallel import batch_of, shard_of

from hf_fpdt import FPDTConfig, apply_fpdt, restore
from hf_fpdt.global_loss import sequence_parallel_loss
from hf_fpdt.group_loss import give_group_loss, gives_group_loss

SETTINGS = FPDTConfig(chunk_size=14)


def prepared(factor: float = 1.0):
    model = apply_fpdt(make_model(tiny_llama(), "eager"), SETTINGS, sp_group=dist.group.WORLD)
    give_group_loss(model, factor)
    return model


def shard(rank: int, kind: str = "few") -> dict:
    """As the loader gives it: without labels."""
    given = shard_of(batch_of(46, kind), SETTINGS, rank, dist.get_world_size())
    del given["labels"]
    return given


def _train(rank: int, how: str):
    factor = 2.0 if how == "factor" else 1.0
    model, batch = prepared(factor), shard(rank, "first" if how == "no label on a rank" else "few")
    if how == "tuple":
        loss = model(**batch, return_dict=False)[0]
    elif how == "transformers":
        loss = sequence_parallel_loss(None, model, batch, False, None, sp_group=dist.group.WORLD)
    else:
        output = model(**batch)
        loss = output["loss"]
        assert loss is output.loss
        assert output.logits.shape == (*batch["input_ids"].shape, model.config.vocab_size)
    loss.backward()
    grads = gradients(model)
    for grad in grads.values():
        dist.all_reduce(grad)
        grad /= factor
    return loss.detach(), grads


@pytest.mark.parametrize("how", ["output", "tuple", "factor", "transformers", "no label on a rank"])
def test_is_the_loss_of_one_process(how):
    batch = batch_of(46, "first" if how == "no label on a rank" else "few")
    want_loss, want = loss_and_gradients(make_model(tiny_llama(), "eager"), batch)
    for loss, grads in run_ranks(_train, 2, how):
        assert (loss - want_loss).abs() <= LOSS_TOLERANCE[torch.float32] * want_loss.abs()
        assert_gradients_close(grads, want, TOLERANCE[torch.float32])


def _refused(rank: int, change: str) -> str:
    model, batch = prepared(), shard(rank)
    try:
        if change == "labels":
            model(**batch, labels=batch["shift_labels"])
        elif change == "imported by name":
            transformers.integrations.deepspeed.deepspeed_sp_compute_loss(None, model, batch, False, None)
        elif change == "items":
            model(**batch, num_items_in_batch=10)
        elif change == "evaluation":
            model.eval()(**batch)
        elif change == "evaluation of shared sequences":
            sequence_parallel_loss(None, model.eval(), batch, False, None, sp_group=dist.group.WORLD)
        else:
            model(**batch_of(46))
    except ValueError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("labels", r"labels were given with shift_labels .* Leave labels out"),
        ("imported by name", r"imported by name .* take transformers\.trainer\.deepspeed_sp_compute_loss after"),
        ("items", "num_items_in_batch was given with shift_labels .* Leave num_items_in_batch out"),
        ("evaluation", r"shift_labels were given in evaluation, .* Accelerator\.prepare\(dataloader\), and give labels"),
        ("evaluation of shared sequences", "shift_labels were given in evaluation"),
        ("whole sequences", r"labels were given without shift_labels .* Accelerator\.prepare\(model, optimizer, dataloader\)"),
    ],
)
def test_what_would_be_the_loss_of_something_else_is_refused(change, message):
    for found in run_ranks(_refused, 2, change, timeout=60):
        assert re.search(message, found), found


def test_evaluation_takes_whole_sequences_and_it_can_be_undone():
    model = make_model(tiny_llama())
    with torch.no_grad():
        want = make_model(tiny_llama(), "eager").eval()(**make_batch(1, 20)).loss
    apply_fpdt(model, SETTINGS)
    give_group_loss(model, 1.0)
    with torch.no_grad():
        assert (model.eval()(**make_batch(1, 20)).loss - want).abs() <= LOSS_TOLERANCE[torch.float32] * want
    assert not gives_group_loss(restore(model))
