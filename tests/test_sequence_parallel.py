"""
A sequence spread over processes, against one process with the whole sequence and eager attention, in fp32. A failure means that
several GPUs train another model than one would.
"""

import copy
import re
from functools import partial

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from reference import (
    LOSS_TOLERANCE,
    TOLERANCE,
    assert_gradients_close,
    gradients,
    loss_and_gradients,
    make_batch,
    make_model,
    tiny_gemma2,
    tiny_gpt_oss,
    tiny_llama,
    tiny_mistral,
    tiny_neox,
)  # fmt: skip

from hf_fpdt import FPDTConfig, apply_fpdt
from hf_fpdt.batch_sharding import shard_batch
from hf_fpdt.global_loss import global_mean
from hf_fpdt.sequence_layout import SequenceLayout

FAMILIES = {
    "llama": tiny_llama,
    "llama, 3 key/value heads": lambda: tiny_llama(num_attention_heads=6, num_key_value_heads=3, hidden_size=48, head_dim=8),
    "llama, 1 key/value head": lambda: tiny_llama(num_key_value_heads=1),
    "neox": tiny_neox,
    "mistral": tiny_mistral,
    "gemma2": tiny_gemma2,
    "gpt_oss": tiny_gpt_oss,
}
SETTINGS = [
    {},
    {"recompute": False},
    {"save_attention": False},
    {"offload": "host"},
    {"offload": "host", "kv": "streamed"},
    {"gpu_memory": 1 << 40},
    {"gpu_memory": 1 << 40, "offload": "host"},
]


def batch_of(seq_len: int = 46, kind: str = "all") -> dict:
    """Labels of all tokens, of a few, or of the first only, so that some shards have none; or one row of packed documents."""
    if kind == "packed":
        batch = make_batch(1, seq_len)
        batch["position_ids"] = torch.cat([torch.arange(n) for n in (11, 1, 20, 2, seq_len - 34)])[None]
        batch["labels"][batch["position_ids"] == 0] = -100
        return batch
    batch = make_batch(seq_len=seq_len)
    if kind == "few":
        batch["labels"][:, 5:30] = -100
    if kind == "first":
        batch["labels"][:, 3:] = -100
    return batch


def shard_of(batch: dict, config: FPDTConfig, rank: int, size: int) -> dict:
    layout_of = partial(SequenceLayout.of, setting=config.chunk_size, device_type="cpu", sp_size=size)
    shard = shard_batch(batch, layout_of, rank)
    return {**shard, "labels": shard["shift_labels"]} if "shift_labels" in shard else shard


def step(model, shard: dict, group) -> torch.Tensor:
    loss = model(**shard).loss
    loss = global_mean(loss, (shard["shift_labels"] != -100).sum(), group)
    loss.backward()
    return loss.detach()


def _train(rank: int, jobs: list) -> list:
    """Loss and summed gradients of every job `(family, settings, batch kind, seq_len)`."""
    group, results = dist.group.WORLD, []
    for family, settings, kind, seq_len in jobs:
        config = FPDTConfig(**{"chunk_size": 14, **settings})
        model = apply_fpdt(make_model(FAMILIES[family](), "eager"), config, sp_group=group)
        loss = step(model, shard_of(batch_of(seq_len, kind), config, rank, group.size()), group)
        grads = gradients(model)
        for grad in grads.values():
            dist.all_reduce(grad)
        results.append((loss, grads))
    return results


def check(ranks: int, jobs: list):
    found = run_ranks(_train, ranks, jobs, timeout=240)
    for index, (family, settings, kind, seq_len) in enumerate(jobs):
        plain = make_model(FAMILIES[family](), "eager")
        want_loss, want = loss_and_gradients(plain, batch_of(seq_len, kind), use_cache=False)  # a cache lets documents leak
        for loss, grads in (results[index] for results in found):
            assert (loss - want_loss).abs() <= LOSS_TOLERANCE[torch.float32] * want_loss.abs(), (family, settings, kind)
            assert_gradients_close(grads, want, TOLERANCE[torch.float32], may_be_zero=("router", "experts"))


@pytest.mark.parametrize("ranks", [2, 4])
def test_settings(ranks):
    check(ranks, [("llama", settings, "all", 46) for settings in SETTINGS])


@pytest.mark.parametrize(
    ("ranks", "families"), [(2, list(FAMILIES)), (3, ["llama, 3 key/value heads"]), (4, ["llama", "neox", "gpt_oss"])]
)
def test_families(ranks, families):
    """With key/value heads that several ranks need, and ranks that need parts of their groups."""
    settings = ({}, {"recompute": False}, {"offload": "host", "kv": "streamed"})
    check(ranks, [(family, one, "all", 50) for family in families for one in settings])


@pytest.mark.parametrize("ranks", [2, 4])
def test_labels_and_lengths(ranks):
    """Padded lengths, one chunk, ranks without a label."""
    jobs = [("llama", {}, kind, 46) for kind in ("few", "first")]
    check(ranks, [*jobs, *(("llama", {"chunk_size": size}, "few", 45) for size in (1, 7, 45, 100, "auto"))])


@pytest.mark.parametrize("ranks", [2, 4])
def test_packed_documents(ranks):
    """Borders inside of chunks and shards, a document of one token, one over several chunks, padding to a common length."""
    jobs = [("llama", settings, "packed", 47) for settings in SETTINGS]
    check(ranks, [*jobs, ("neox", {}, "packed", 46), *(("llama", {"chunk_size": size}, "packed", 45) for size in (1, 9, 100))])


class _Late:
    """An exchange that takes place when it is waited for, of what was to be sent at the time it was asked for."""

    def __init__(self, got, sent, group):
        self.got, self.sent, self.then, self.group = got.fill_(float("nan")), sent, sent.clone(), group

    def wait(self):
        assert torch.equal(self.sent, self.then)
        _all_to_all(self.got, self.sent, group=self.group)


_all_to_all = dist.all_to_all_single


def _train_late(rank: int, jobs: list) -> list:
    dist.all_to_all_single = lambda got, sent, group, async_op: _Late(got, sent, group)
    found = _train(rank, jobs)
    dist.all_to_all_single = _all_to_all
    return found


def test_nothing_is_read_before_it_arrives():
    """However late it does. What was not waited for is NaN."""
    jobs = [(family, settings, "all", 46) for family in ("llama", "neox", "gpt_oss") for settings in SETTINGS[:5]]
    for late, usual in zip(run_ranks(_train_late, 2, jobs), run_ranks(_train, 2, jobs), strict=True):
        for (loss, grads), (want_loss, want) in zip(late, usual, strict=True):
            assert torch.equal(loss, want_loss)
            assert all(torch.equal(grads[name], want[name]) for name in want)


# What cannot be right, refused on every rank


def _refused(rank: int, change: str) -> str:
    group = dist.group.WORLD
    config = FPDTConfig(chunk_size=16)
    model = apply_fpdt(make_model(tiny_llama()), config, sp_group=group)
    batch = batch_of(48)
    if change == "length on rank 1" and rank == 1:
        batch = batch_of(40)
    if "document" in change or change == "seq_idx":
        batch = batch_of(48, "packed")
    shard = shard_of(batch, FPDTConfig(chunk_size=8) if change == "chunk_size" else config, rank, group.size())
    if change == "no positions on rank 0" and rank == 0:
        del shard["position_ids"]
    if change == "documents of rank 1" and rank == 1:
        shard["cu_seq_lens_q"] = shard["cu_seq_lens_k"] = torch.tensor([0, 48])
    if change == "positions of a document" and rank == 1:
        shard["position_ids"][0, 5] += 1
    if change == "seq_idx":
        shard["seq_idx"] = torch.arange(24)[None]
    if change == "labels":
        del shard["shift_labels"]
    try:
        with torch.set_grad_enabled(not (change == "gradients" and rank == 0)):
            model(**shard)
    except ValueError as error:
        return str(error)
    return "nothing"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("length on rank 1", "differ in their batch .*rank 0: SequenceLayout.*rank 1: SequenceLayout"),
        ("gradients", "The processes of one sequence-parallel group differ in their batch .*without gradients"),
        ("no positions on rank 0", "differ in the fit of their position_ids .rank 0: no position_ids, rank 1: None"),
        ("chunk_size", "position_ids of which .* are not where chunks of 16 tokens have them"),
        ("labels", "labels were given without shift_labels"),
        ("documents of rank 1", "differ in .*their documents .rank 0: 5 with checksum .*, rank 1: None"),
        ("positions of a document", "rank 1: position_ids of which 2 are not where chunks of 16 tokens have them"),
        ("seq_idx", "seq_idx asks for padding or documents in a shard of a sequence"),
    ],
)
def test_refused_on_every_rank(change, message):
    for found in run_ranks(_refused, 2, change, timeout=60):
        assert re.search(message, found), found


def _evaluate(rank: int):
    """Whole sequences, a different one on each rank and of different lengths."""
    model = apply_fpdt(make_model(tiny_llama()), FPDTConfig(chunk_size=16), sp_group=dist.group.WORLD).eval()
    with torch.no_grad():
        return model(**batch_of(40 + 7 * rank)).loss


def test_evaluation_takes_whole_sequences():
    for rank, loss in enumerate(run_ranks(_evaluate, 2)):
        with torch.no_grad():
            want = make_model(tiny_llama(), "eager", train=False)(**batch_of(40 + 7 * rank)).loss
        assert (loss - want).abs() <= LOSS_TOLERANCE[torch.float32] * want


class Group:
    """All that `apply_fpdt` asks of a group."""

    def __init__(self, size):
        self._size = size

    def size(self):
        return self._size


def test_heads_and_rotary_embeddings_that_cannot_be_shared():
    with pytest.raises(
        ValueError, match=r"4 attention heads cannot be split .* group of 3 processes. Use an sp_size of 1, 2, 4\."
    ):
        apply_fpdt(make_model(tiny_llama()), sp_group=Group(3))
    config = tiny_llama(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(
        ValueError, match=r"rope_type='dynamic' takes its frequencies from the longest .* 2 processes .* sp_size 1"
    ):
        apply_fpdt(make_model(config), sp_group=Group(2))
    apply_fpdt(make_model(copy.deepcopy(config)), sp_group=Group(1))


def _count(rank: int):
    """Exchanges of a step, by what they carry, and collectives of other kinds inside of the layers."""
    calls = []
    all_to_all = dist.all_to_all_single

    def counted(*args, **kwargs):
        calls.append(args[1].shape)
        return all_to_all(*args, **kwargs)

    dist.all_to_all_single = counted
    config = FPDTConfig(chunk_size=16)
    model = apply_fpdt(make_model(tiny_llama()), config, sp_group=dist.group.WORLD)
    shard = shard_of(batch_of(48), config, rank, 2)
    loss = model(**shard).loss
    forward = len(calls)
    loss.backward()
    return forward, len(calls) - forward


def test_exchanges_of_a_step():
    """3 chunks, 2 layers, 2 groups of heads: q, k, v in one and out in another; backward q and out again, both gradients."""
    assert run_ranks(_count, 2) == [(3 * 2 * 2 * 2, 3 * 2 * 2 * 4)] * 2
