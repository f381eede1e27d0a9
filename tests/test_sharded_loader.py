"""
Batches on their way to a group of ranks. A failure means a batch that is trained on twice or never, ranks that work on
different ones, or a group that waits forever.
"""

import ast
import importlib.util
import inspect
from itertools import islice, zip_longest
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate.data_loader import prepare_data_loader
from accelerate.state import GradientState
from ranks import run_ranks
from torch.utils.data import DataLoader, Dataset, IterableDataset

from hf_fpdt.sharded_loader import ShardedDataLoader, skip_first_batches

CHUNK = 8


class Rows(Dataset):
    """Row i is [100 i, 100 i + 1, ...], of a length of its own."""

    def __init__(self, numbers):
        self.numbers = list(numbers)

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, index):
        return row(self.numbers[index])


class Stream(IterableDataset):
    def __init__(self, numbers):
        self.numbers = numbers

    def __iter__(self):
        return map(row, self.numbers)


class LongerStream(Stream):
    """Than it says."""

    def __len__(self):
        return 1


def row(number):
    ids = torch.arange(9 + 3 * (number % 4)) + 100 * number
    return {"input_ids": ids, "labels": ids, "number": number}


def collate(rows):
    (only,) = rows
    return {name: value[None] if torch.is_tensor(value) else value for name, value in only.items()}


def wrap(loader, group=None, **settings):
    """With the arguments as accelerate and Trainer pass them."""
    group = dist.group.WORLD if group is None else group
    return ShardedDataLoader(
        loader, sp_rank=dist.get_rank(group), sp_group=group, sp_world_size=dist.get_world_size(group),
        device=torch.device("cpu"), **{"chunk_size": CHUNK, **settings},
    )  # fmt: skip


def plain(numbers):
    return DataLoader(Rows(numbers), collate_fn=collate)


def prepared(numbers, rank, world_size):
    """As Trainer's: accelerate deals the batches of one loader out to all ranks."""
    loader = DataLoader(Rows(numbers), collate_fn=collate)
    return prepare_data_loader(loader, num_processes=world_size, process_index=rank, put_on_device=False)


def streamed(numbers):
    return DataLoader(Stream(numbers), collate_fn=collate)


def numbers_of(shards):
    return [shard["number"] for shard in shards]


def join(pieces):
    """Whole rows from the shards of all ranks, by the formula of the layout."""
    sp_size, length = len(pieces), pieces[0].shape[1]
    step = CHUNK // sp_size
    return torch.cat([piece[:, at : at + step] for at in range(0, length, step) for piece in pieces], 1)


def assert_steps_are(results, numbers):
    """Every rank took a step on each of these rows, in this order, and the shards together are the row."""
    for steps in zip_longest(*results, numbers):
        *shards, number = steps
        assert [shard and shard["number"] for shard in shards] == [number] * len(shards)
        ids = row(number)["input_ids"]
        padding = -len(ids) % len(shards)
        assert join([shard["input_ids"] for shard in shards])[0].tolist() == [*ids.tolist(), *[0] * padding]
        assert join([shard["shift_labels"] for shard in shards])[0].tolist() == [*ids.tolist()[1:], *[-100] * (padding + 1)]
        assert join([shard["position_ids"] for shard in shards])[0].tolist() == list(range(len(ids) + padding))


def in_rounds(*drawn):
    """The order in which the group takes what its ranks draw."""
    return [number for a_round in zip_longest(*drawn) for number in a_round if number is not None]


# --- every batch, once, in order


def _uneven(rank, lengths):
    drawn = [range(10 * r, 10 * r + length) for r, length in enumerate(lengths)]
    loader = wrap(plain(drawn[rank]))
    first = list(loader)
    return first, numbers_of(loader), numbers_of(islice(loader, 2)), numbers_of(loader), len(loader)


@pytest.mark.parametrize("lengths", [(2, 2), (3, 1), (0, 2), (1, 3, 2, 0)])
def test_each_batch_is_one_step_of_the_group(lengths):
    """However many a rank draws; in every epoch, after one that was left early too."""
    want = in_rounds(*[range(10 * r, 10 * r + length) for r, length in enumerate(lengths)])
    results = run_ranks(_uneven, len(lengths), lengths)
    assert_steps_are([first for first, *_ in results], want)
    for (_, again, early, after, length), own in zip(results, lengths, strict=True):
        assert again == want
        assert early == want[:2]
        assert after == want
        assert length == own * len(lengths)


def _nobody_draws(rank):
    return list(wrap(plain([])))


def test_no_batches():
    assert run_ranks(_nobody_draws, 2) == [[], []]


def _prepared(rank):
    return list(wrap(prepared(range(5), rank, 2)))


def test_loader_of_accelerate():
    """It deals 5 rows to 2 ranks and begins again with row 0 to have as many for both."""
    assert_steps_are(run_ranks(_prepared, 2), [0, 1, 2, 3, 4, 0])


def _streamed(rank):
    loader = wrap(streamed([[1, 2, 3], [11]][rank]))
    with pytest.raises(TypeError, match="has no len"):
        len(loader)
    return list(loader)


def test_iterable_dataset():
    assert_steps_are(run_ranks(_streamed, 2), [1, 11, 2, 3])


def _two_groups(rank):
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    group = groups[rank // 2]
    # Different numbers of steps: a group that needed the other would wait.
    return list(wrap(plain([[1, 2], [11], [21, 22, 23], [31, 32]][rank]), group))


def test_groups_are_apart():
    """Sequence times data parallelism; ranks of a group are not ranks of the world."""
    results = run_ranks(_two_groups, 4)
    assert_steps_are(results[:2], [1, 11, 2])
    assert_steps_are(results[2:], [21, 31, 22, 32, 23])


# --- what a batch may hold

TENSORS = {
    "bool": torch.tensor([[True, False, True, True]]),
    "bfloat16": torch.tensor([[1.5, -2.0, 3.0, 4.0]], dtype=torch.bfloat16),
    "int16": torch.tensor([[1, 2, 3, 4]], dtype=torch.int16),
    "float8": torch.tensor([[1.5, -2.0, 3.0, 4.0]]).to(torch.float8_e4m3fn),
    "complex": torch.tensor([[1j, 2, 3, 4]]),
    "transposed": torch.arange(12.0).view(3, 4).T[None],
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 3),
    "other": torch.arange(6).view(2, 3),
    "trained": torch.ones(5, requires_grad=True),
}
VALUES = {"text": "words", "none": None, "nested": {"list": [torch.arange(3), "x"], "tuple": (1, torch.tensor(True))}}


def _mixed(rank):
    ids = torch.tensor([[1, 2, 3, 4]])
    rich, poor = {"input_ids": ids, **TENSORS, **VALUES}, {"input_ids": ids[:, :2], "only_here": 1}
    return list(wrap([[rich, poor], [poor, rich]][rank]))


def test_any_tensors_and_values():
    """Other keys on other ranks, and a list for a loader."""
    results = run_ranks(_mixed, 2)
    cut = {name for name, tensor in TENSORS.items() if tensor.shape[:2] == (1, 4)}
    assert len(cut) == 6
    for rank, steps in enumerate(results):
        assert [step.get("text", step.get("only_here")) for step in steps] == ["words", 1, 1, "words"]
        for step in (step for step in steps if "text" in step):
            for name, tensor in TENSORS.items():
                want = tensor[:, 2 * rank : 2 * rank + 2] if name in cut else tensor
                assert step[name].dtype == tensor.dtype
                assert not step[name].requires_grad
                assert torch.equal(step[name].to(torch.complex64), want.detach().to(torch.complex64))
            assert step["text"] == "words"
            assert step["none"] is None
            (numbers, text), (one, true) = step["nested"]["list"], step["nested"]["tuple"]
            assert (numbers.tolist(), text, one, true.item()) == ([0, 1, 2], "x", 1, True)


def _refused(rank):
    good, bad = plain([0]), [{"input_ids": torch.ones(1, 4), "attention_mask": torch.tensor([[0, 1, 1, 1]])}]
    with pytest.raises(ValueError, match="left of a token") as error:
        list(wrap(bad if rank else good))
    return str(error.value)


def test_a_bad_batch_of_one_rank_is_refused_by_all():
    assert len(set(run_ranks(_refused, 2))) == 1


def _settings(rank):
    loader = wrap([{"input_ids": torch.tensor([[1, 2, 3]])}], chunk_size=2, pad_token_id=9)
    return next(iter(loader))["input_ids"].tolist()


def test_settings():
    assert run_ranks(_settings, 2) == [[[1, 3]], [[2, 9]]]


# --- resume


def _skipped(rank, kind, drawn):
    def make():
        loaders = {
            "plain": plain, "streamed": streamed, "mistaken": lambda own: DataLoader(LongerStream(own), collate_fn=collate),
            "prepared": lambda own: prepared(own, rank, 2), "stateful": Stateful,
            "list": lambda own: [collate([row(number)]) for number in own],
        }  # fmt: skip
        return wrap(loaders[kind](drawn[0] if kind == "prepared" else drawn[rank]))

    everything = numbers_of(make())
    rest, again, lengths = [], [], []
    for count in range(len(everything) + 2):
        loader = skip_first_batches(make(), count)
        rest.append(numbers_of(loader))
        twice = skip_first_batches(skip_first_batches(make(), count // 2), count - count // 2)
        again.append((numbers_of(loader), numbers_of(twice)))
        lengths.append(len(loader) if kind in ("plain", "prepared", "list") else None)
    return everything, rest, again, lengths


@pytest.mark.parametrize("kind", ["plain", "streamed", "mistaken", "prepared", "stateful", "list"])
@pytest.mark.parametrize("drawn", [(range(4), range(10, 14)), (range(3), range(10, 11)), (range(1), range(10, 14))])
def test_resume_after_every_number_of_steps(kind, drawn):
    for everything, rest, again, lengths in run_ranks(_skipped, 2, kind, drawn):
        assert len(everything) >= 2
        for count, left in enumerate(rest):
            assert left == everything[count:]
            assert again[count] == (left, left)
            if len(drawn[0]) == len(drawn[1]) and lengths[count] is not None and count <= len(everything):
                assert lengths[count] == len(left)


def _whole_rounds(rank):
    drawn = []

    class Recording(Rows):
        def __getitem__(self, index):
            drawn.append(index)
            return super().__getitem__(index)

    loader = DataLoader(Recording(range(6)), collate_fn=collate)
    left = numbers_of(skip_first_batches(wrap(loader), 7))
    return left, drawn


def test_what_is_skipped_is_not_read():
    """Of a dataset with an index: three of the six rounds, and the fourth is read for its second batch."""
    assert run_ranks(_whole_rounds, 2) == [([3, 4, 4, 5, 5], [3, 4, 5])] * 2


def test_other_loaders_are_skipped_by_accelerate():
    assert numbers_of(skip_first_batches(plain(range(5)), 2)) == [2, 3, 4]


class Stateful:
    """A loader with a state, like torchdata's: it goes on from it once, then from the start."""

    def __init__(self, numbers):
        self.numbers, self.at, self.loaded = list(numbers), 0, False

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at, self.loaded = state["at"], True

    def __iter__(self):
        if not self.loaded:
            self.at = 0
        self.loaded = False
        while self.at < len(self.numbers):
            self.at += 1
            yield collate([row(self.numbers[self.at - 1])])


def _states(rank, drawn):
    loader, before, states = wrap(Stateful(drawn[rank])), [], []
    states.append(loader.state_dict())
    for shard in loader:
        before.append(shard["number"])
        states.append(loader.state_dict())
    rest = []
    for state in states:
        other = wrap(Stateful(drawn[rank]))
        other.load_state_dict(state)
        kept = other.state_dict() == state
        rest.append((numbers_of(other), numbers_of(other), kept))
    return before, rest


@pytest.mark.parametrize("drawn", [(range(3), range(10, 13)), (range(3), range(10, 11))])
def test_state_within_a_round(drawn):
    for before, rest in run_ranks(_states, 2, drawn):
        assert before == in_rounds(*drawn)
        for count, (left, next_epoch, kept) in enumerate(rest):
            assert left == before[count:]
            assert next_epoch == before
            assert kept


def _between_epochs(rank):
    loader = wrap(Stateful([1, 2]))
    list(loader)
    return loader.state_dict()


def test_state_between_epochs_is_that_of_the_loader():
    assert run_ranks(_between_epochs, 2) == [{"dl": {"at": 2}, "position": 0}] * 2


# --- a loader like others


def alone(loader):
    """Nothing that these tests ask for needs a group."""
    return ShardedDataLoader(loader, sp_rank=1, sp_group=None, sp_world_size=4, device="cpu")


def test_length_and_attributes():
    inner = plain(range(6))
    loader = alone(inner)
    assert len(loader) == 24
    for name in ("dataset", "sampler", "batch_sampler", "batch_size", "num_workers", "collate_fn"):
        assert getattr(loader, name) is getattr(inner, name)
    for name in ("set_epoch", "state_dict", "load_state_dict", "nonsense"):
        assert not hasattr(loader, name)
    assert hasattr(alone(Stateful([1])), "state_dict")
    assert hasattr(alone(Stateful([1])), "load_state_dict")


def test_loader_of_accelerate_without_a_state_has_none():
    assert not hasattr(alone(prepared(range(4), 0, 2)), "state_dict")


def test_set_epoch_reaches_the_loader():
    inner = prepared(range(4), 0, 2)
    alone(inner).set_epoch(3)
    assert inner.iteration == 3


@pytest.mark.parametrize(
    ("backend", "device", "want"),
    [
        ("nccl", "cuda:1", "cuda:1"),
        ("cpu:gloo,cuda:nccl", "cuda:1", "cuda:1"),
        ("cpu:gloo,cuda:nccl", "cpu", "cpu"),
        ("gloo", "cuda:1", "cpu"),
        ("gloo", "cpu", "cpu"),
    ],
)
def test_batches_travel_where_the_group_is_fast(monkeypatch, backend, device, want):
    config = str(dist.distributed_c10d.BackendConfig(dist.Backend(backend)))
    monkeypatch.setattr(dist, "get_backend_config", lambda group: config)
    assert ShardedDataLoader([], 0, None, 2, device)._exchange_device() == torch.device(want)


def _ends(rank, lengths):
    state, seen = GradientState(), []
    loader = wrap(prepare_data_loader(plain(range(lengths[rank])), num_processes=1, process_index=0, put_on_device=False))
    for _ in loader:
        seen.append((state.end_of_dataloader, state.active_dataloader is loader, state.remainder))
    after_a_break = next(iter(loader)) and state.in_dataloader
    return seen, after_a_break


@pytest.mark.parametrize("lengths", [(2, 2), (3, 1)])
def test_accelerate_sees_the_last_step(lengths):
    """On which it steps the optimizer early: once an epoch, not once a rank, and on all ranks alike."""
    for seen, _ in run_ranks(_ends, 2, lengths):
        assert seen == [(False, True, 0)] * 3 + [(True, True, 0)]


def test_arguments_are_those_of_deepspeed():
    spec = importlib.util.find_spec("deepspeed")
    if spec is None:
        pytest.skip("deepspeed is not installed")
    path = Path(spec.origin).parent / "runtime" / "sequence_parallel" / "ulysses_sp.py"
    tree = ast.parse(path.read_text(encoding="utf-8"))
    (adapter,) = [node for node in tree.body if getattr(node, "name", None) == "UlyssesSPDataLoaderAdapter"]
    (init,) = [node for node in adapter.body if getattr(node, "name", None) == "__init__"]
    theirs = [argument.arg for argument in init.args.args]
    ours = inspect.signature(ShardedDataLoader.__init__).parameters.values()
    assert [argument.name for argument in ours if argument.kind is argument.POSITIONAL_OR_KEYWORD] == theirs
