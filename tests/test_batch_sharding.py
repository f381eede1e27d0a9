"""
Batches of whole sequences become shards. A failure means a token that learns from the wrong target, at the wrong position, or
not at all.
"""

import random
from functools import partial

import pytest
import torch
from transformers import BatchEncoding

from hf_fpdt.batch_sharding import shard_batch
from hf_fpdt.sequence_layout import SequenceLayout


def layouts(chunk_size, sp_size):
    return partial(SequenceLayout.of, setting=chunk_size, device_type="cpu", sp_size=sp_size)


def shards(batch, chunk_size, sp_size, **settings):
    return [shard_batch(batch, layouts(chunk_size, sp_size), rank, **settings) for rank in range(sp_size)]


def put_together(pieces, chunk_size, axis=1):
    """Local chunk j of all ranks, in order, is global chunk j: by slicing alone."""
    sp_size, length = len(pieces), pieces[0].shape[axis]
    step = -(-chunk_size // sp_size)
    chunks = [piece.narrow(axis, start, min(step, length - start)) for start in range(0, length, step) for piece in pieces]
    return torch.cat(chunks, axis)


def whole(batch, chunk_size, sp_size, **settings):
    pieces = shards(batch, chunk_size, sp_size, **settings)
    assert all(piece.keys() == pieces[0].keys() for piece in pieces)
    cut = {name for name, value in pieces[0].items() if value.ndim > 1}
    assert all(torch.equal(piece[name], value) for piece in pieces for name, value in pieces[0].items() if name not in cut)
    return {
        name: put_together([piece[name] for piece in pieces], chunk_size) if name in cut else value
        for name, value in pieces[0].items()
    }


def make_batch(batch_size=2, seq_len=16, **more):
    ids = torch.arange(1, batch_size * seq_len + 1).view(batch_size, seq_len)
    return {"input_ids": ids, "labels": ids + 1000, **more}


def test_written_out():
    """Two ranks, chunks of 4: every target is the label after the token, whichever rank or chunk that is on."""
    first, second = shards({"input_ids": torch.arange(8)[None], "labels": torch.arange(8)[None] + 10}, 4, 2)
    assert first["input_ids"].tolist() == [[0, 1, 4, 5]]
    assert second["input_ids"].tolist() == [[2, 3, 6, 7]]
    assert first["position_ids"].tolist() == [[0, 1, 4, 5]]
    assert second["position_ids"].tolist() == [[2, 3, 6, 7]]
    assert first["shift_labels"].tolist() == [[11, 12, 15, 16]]
    assert second["shift_labels"].tolist() == [[13, 14, 17, -100]]
    assert first.keys() == {"input_ids", "shift_labels", "position_ids"}


def test_fuzzed_lengths():
    generator = random.Random(0)
    for _ in range(200):
        batch_size, seq_len, sp_size = generator.randint(1, 3), generator.randint(1, 70), generator.choice([1, 2, 3, 4, 8])
        chunk_size = generator.randint(1, 80)
        batch = make_batch(batch_size, seq_len)
        got = whole(batch, chunk_size, sp_size, pad_token_id=7)
        padding = -seq_len % sp_size
        for row in range(batch_size):
            assert got["input_ids"][row].tolist() == [*batch["input_ids"][row].tolist(), *[7] * padding]
            assert got["shift_labels"][row].tolist() == [*batch["labels"][row, 1:].tolist(), -100, *[-100] * padding]
        assert got["position_ids"].tolist() == [list(range(seq_len + padding))]


def test_the_batch_is_not_changed():
    mask = torch.tensor([[1] * 5 + [0] * 2])
    batch = make_batch(1, 7, attention_mask=mask, position_ids=torch.arange(7)[None])
    before = {name: value.clone() for name, value in batch.items()}
    shards(batch, 2, 2)
    assert batch.keys() == before.keys()
    assert all(torch.equal(batch[name], before[name]) for name in before)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_every_tensor_over_tokens_is_cut_and_nothing_else(batch_size):
    shapes = {"embeds": (batch_size, 9, 3, 2), "shared": (1, 9), "flat": (9,)}
    cut = {name: torch.randn(shape) for name, shape in shapes.items()}
    passed = {
        "scalar": torch.tensor(3.0), "a_row": torch.ones(batch_size), "short": torch.ones(batch_size, 8), "name": "x",
        "none": None, "pixels": torch.ones(5, 3, 3), "empty": torch.ones(0),
    }  # fmt: skip
    batch = make_batch(batch_size, 9, **cut, **passed)
    pieces = shards(batch, 4, 2)
    for name, value in passed.items():
        assert all(piece[name] is value for piece in pieces)
    for name, value in cut.items():
        axis = 0 if name == "flat" else 1
        got = put_together([piece[name] for piece in pieces], 4, axis)
        assert torch.equal(got.narrow(axis, 0, 9), value)
        assert got.shape[axis] == 10
        assert not got.narrow(axis, 9, 1).any()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.bfloat16, torch.float64])
def test_dtypes_are_kept(dtype):
    value = torch.ones(1, 5, dtype=dtype)
    assert all(piece["value"].dtype == dtype for piece in shards(make_batch(1, 5, value=value), 2, 2))


def test_embeddings_instead_of_tokens():
    batch = {"inputs_embeds": torch.randn(2, 6, 4), "labels": torch.arange(12).view(2, 6)}
    got = whole(batch, 4, 2)
    assert torch.equal(got["inputs_embeds"], batch["inputs_embeds"])
    assert got["position_ids"].tolist() == [list(range(6))]


def test_no_labels():
    for missing in ({}, {"labels": None}):
        assert shards({"input_ids": torch.ones(1, 4), **missing}, 2, 2)[0].keys() == {"input_ids", "position_ids"}


def test_given_shift_labels_are_used():
    """As they are: the last target may be the first token of what was cut off."""
    shift_labels = torch.arange(100, 107)[None]
    got = whole(make_batch(1, 7, shift_labels=shift_labels), 4, 2)
    assert got["shift_labels"].tolist() == [[*range(100, 107), -100]]
    assert "labels" not in got


def test_a_mask_of_ones_is_dropped():
    for dtype in (torch.int64, torch.bool, torch.float32):
        batch = make_batch(attention_mask=torch.ones(2, 16, dtype=dtype))
        got, want = whole(batch, 4, 2), whole(make_batch(), 4, 2)
        assert got.keys() == want.keys()
        assert all(torch.equal(got[name], want[name]) for name in want)


@pytest.mark.parametrize("given", ["labels", "shift_labels"])
@pytest.mark.parametrize("lengths", [[16, 11], [1, 16], [5, 0]])
def test_right_padding_is_never_a_target(lengths, given):
    """Nor is what a padding token predicts."""
    mask = torch.arange(16)[None] < torch.tensor(lengths)[:, None]
    labels = torch.arange(1, 33).view(2, 16)  # no -100 at the padding
    batch = {"input_ids": labels, given: labels, "attention_mask": mask.long()}
    got = whole(batch, 4, 2)
    assert "attention_mask" not in got
    for row, length in enumerate(lengths):
        targets = [*labels[row, 1:].tolist(), -100] if given == "labels" else labels[row].tolist()
        keep = [t < length and (t + 1 < length or t == 15) for t in range(16)]
        assert got["shift_labels"][row].tolist() == [
            target if kept else -100 for target, kept in zip(targets, keep, strict=True)
        ]


def test_positions_continue_from_the_given_ones():
    for positions in (torch.arange(5, 12)[None], torch.arange(7).expand(2, 7) + torch.tensor([[3], [40]])):
        got = whole(make_batch(2, 7, position_ids=positions), 4, 2)["position_ids"]
        assert torch.equal(got[:, :7], positions)
        assert torch.equal(got[:, 7], positions[:, -1] + 1)


@pytest.mark.parametrize("filler", [0, 1])
def test_positions_of_padding_may_be_anything(filler):
    """TRL's collator writes zeros there, others ones."""
    mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
    positions = torch.where(mask.bool(), torch.arange(8), filler)
    got = whole(make_batch(2, 8, position_ids=positions, attention_mask=mask), 4, 2)["position_ids"]
    assert got.tolist() == [list(range(8))] * 2


PACKED = {
    "positions": {"position_ids": torch.tensor([[0, 1, 2, 0, 0, 1, 2]])},
    "seq_idx": {"seq_idx": torch.tensor([[0, 0, 0, 1, 2, 2, 2]]), "position_ids": torch.tensor([[0, 1, 2, 0, 0, 1, 2]])},
    "lengths": {"cu_seq_lens_q": torch.tensor([0, 3, 4, 7]), "cu_seq_lens_k": torch.tensor([0, 3, 4, 7]), "max_length_q": 3},
}


@pytest.mark.parametrize("how", PACKED)
def test_packed_documents(how):
    """Their borders are those of the whole sequence on every rank; what is padded behind is of none."""
    batch = make_batch(1, 7, **PACKED[how])
    for rank in range(2):
        shard = shard_batch(batch, layouts(4, 2), rank)
        assert shard["cu_seq_lens_q"].tolist() == shard["cu_seq_lens_k"].tolist() == [0, 3, 4, 7]
        assert not {"seq_idx", "max_length_q", "attention_mask"} & set(shard)
    positions = [0, 1, 2, 3, 4, 5, 6, 7] if how == "lengths" else [0, 1, 2, 0, 0, 1, 2, 3]
    assert whole(batch, 4, 2)["position_ids"].tolist() == [positions]


def test_packed_and_padded():
    batch = make_batch(1, 6, position_ids=torch.tensor([[0, 1, 0, 1, 0, 0]]), attention_mask=torch.tensor([[1, 1, 1, 1, 0, 0]]))
    got = whole(batch, 4, 2)
    assert got["cu_seq_lens_q"].tolist() == [0, 2, 4]
    assert got["position_ids"].tolist() == [[0, 1, 0, 1, 2, 3]]


def test_mappings():
    batch = BatchEncoding(make_batch(1, 4))
    assert shard_batch(batch, layouts(2, 2), 1)["input_ids"].tolist() == [[2, 4]]


REFUSED = {
    "left padding": (
        {"attention_mask": torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])}, "1 of 8 positions .* left of a token.*padding_side"),
    "holes": ({"attention_mask": torch.tensor([[1, 0, 1, 1], [1, 1, 0, 0]])}, "3 of 8 positions .* left of a token"),
    "documents in the mask": (
        {"attention_mask": torch.tensor([[1, 1, 2, 2], [1, 1, 1, 0]])}, "values up to 2.*position_ids that start anew"),
    "mask of four dimensions": ({"attention_mask": torch.ones(2, 1, 4, 4)}, r"shape \[2, 1, 4, 4\].*Leave attention_mask out"),
    "mask that is no tensor": ({"attention_mask": {"full": torch.ones(2, 4)}}, "shape dict"),
    "documents in position_ids": (
        {"position_ids": torch.tensor([[0, 1, 0, 1]])}, "2 rows with packed documents.*packing=False"),
    "restart before the padding": (
        {"position_ids": torch.tensor([[0, 1, 0, 0]] * 2), "attention_mask": torch.tensor([[1, 1, 1, 0]] * 2)}, "2 rows with"),
    "three positions a token": (
        {"position_ids": torch.zeros(3, 2, 4)}, r"position_ids of shape \[3, 2, 4\].*one position a token"),
    "position_ids of another length": ({"position_ids": torch.arange(5)[None]}, r"position_ids of shape \[1, 5\]"),
    "one label a row": ({"labels": torch.ones(2)}, r"labels of shape \[2\].*one label a token"),
    "shifted already": ({"shift_labels": torch.ones(2, 3)}, r"shift_labels of shape \[2, 3\]"),
    "cu_seq_lens_q": (
        {"cu_seq_lens_q": torch.tensor([0, 2, 4])}, r"cu_seq_lens_q \[0, 2, 4\] .* 2 x 4 tokens; they need one row"),
    "seq_idx": ({"seq_idx": torch.tensor([[0, 0, 1, 1]] * 2)}, "2 rows with packed documents"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    more, message = REFUSED[case]
    for rank in range(2):
        with pytest.raises(ValueError, match=f"^Sequence parallelism: .*{message}"):
            shard_batch({**make_batch(2, 4), **more}, layouts(2, 2), rank)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((torch.ones(1, 4), torch.ones(1, 4)), "gave a tuple"),
        ({"pixel_values": torch.ones(1, 3)}, r"\['pixel_values'\] has neither"),
        ({"input_ids": torch.ones(4)}, r"shape \[4\]"),
        ({"input_ids": torch.ones(1, 0)}, r"shape \[1, 0\]"),
        ({"input_ids": torch.ones(0, 4)}, r"shape \[0, 4\]"),
    ],
)
def test_no_tokens(batch, message):
    with pytest.raises(ValueError, match=f"^Sequence parallelism: .*{message}"):
        shard_batch(batch, layouts(2, 2), 0)


def test_nothing_given_is_nothing_refused():
    """Keys that are there but None."""
    absent = dict.fromkeys(("attention_mask", "position_ids", "seq_idx", "cu_seq_lens_q", "shift_labels"))
    piece = shard_batch({**make_batch(1, 4), **absent}, layouts(2, 2), 0)
    assert piece["shift_labels"].tolist() == [[1002, 1004]]
    assert piece["position_ids"].tolist() == [[0, 2]]
    assert "attention_mask" not in piece
