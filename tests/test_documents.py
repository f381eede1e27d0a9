"""
Packed documents and padding: every document has the loss and the gradients of a run of its own, wherever its borders lie. A
failure means texts that see each other, or padding that is learnt from.
"""

import math

import pytest
import torch
from reference import (
    SEQ_LEN,
    assert_close,
    assert_gradients_close,
    gradients,
    loss_and_gradients,
    make_batch,
    make_model,
    make_streamed,
    tiny_llama,
    tiny_neox,
)
from torch.nn.functional import cross_entropy
from transformers import DataCollatorWithFlattening

from hf_fpdt import kernel_choice, key_value_store
from hf_fpdt.documents import Documents, documents_of

CONFIGS = {"llama": tiny_llama, "neox": tiny_neox}
LOSS = 2e-6


def one_by_one(model, ids, rows):
    """Loss and gradients of the documents of every row, each run alone; and the labels: its own tokens but for the first."""
    labels = torch.full_like(ids, -100)
    model.zero_grad(set_to_none=True)
    for row, documents in enumerate(rows):
        for start, stop in documents:
            labels[row, start + 1 : stop] = ids[row, start + 1 : stop]
    count = int((labels != -100).sum())
    total = 0.0
    for row, documents in enumerate(rows):
        for start, stop in documents:
            if stop - start > 1:
                text = ids[row : row + 1, start:stop]
                loss = cross_entropy(model(text).logits[0, :-1], text[0, 1:], reduction="sum") / count
                loss.backward()
                total += loss.item()
    return total, gradients(model), labels


def positions_of(rows, seq_len):
    positions = torch.zeros(len(rows), seq_len, dtype=torch.long)
    for row, documents in enumerate(rows):
        for start, stop in documents:
            positions[row, start:stop] = torch.arange(stop - start)
    return positions


def mask_of(rows, seq_len):
    mask = torch.zeros(len(rows), seq_len, dtype=torch.long)
    for row, documents in enumerate(rows):
        for start, stop in documents:
            mask[row, start:stop] = 1
    return mask


def assert_alone(config, rows, seq_len, chunk, **settings):
    ids = make_batch(len(rows), seq_len)["input_ids"]
    loss, grads, labels = one_by_one(make_model(config, "eager"), ids, rows)
    full = all(sum(stop - start for start, stop in row) == seq_len for row in rows)
    given = {} if full else {"attention_mask": mask_of(rows, seq_len)}
    batch = {"input_ids": ids, "labels": labels, "position_ids": positions_of(rows, seq_len), **given}
    got, got_grads = loss_and_gradients(make_streamed(config, chunk, **settings), batch)
    assert abs(got.item() - loss) <= LOSS * loss
    # With one token everywhere attention has nothing to choose from.
    assert_gradients_close(got_grads, grads, may_be_zero=("q_proj", "k_proj", "query_key_value"))


STORES = [{}, {"kv": "streamed", "offload": "host"}, {"save_attention": False, "offload": "host"}, {"recompute": False}]
CASES = {
    "borders inside of chunks": [[(0, 20), (20, 23), (23, 48)]],
    "borders on chunks": [[(0, 16), (16, 32), (32, 48)]],
    "one over many chunks": [[(0, 3), (3, 45), (45, 48)]],
    "documents of one token": [[(0, 1), (1, 2), (2, 20), (20, 21), (21, 48)]],
    "rows that differ": [[(0, 20), (20, 48)], [(0, 48)], [(0, 31), (31, 48)]],
    "padding on the right": [[(0, 48)], [(0, 29)], [(0, 7)]],
    "padding on the left": [[(0, 48)], [(19, 48)], [(41, 48)]],
    "packed and padded": [[(0, 9), (9, 30)], [(4, 11), (11, 47)]],
    "chunks of padding alone": [[(0, 10)], [(0, 5)]],
}


@pytest.mark.parametrize("settings", STORES, ids=str)
@pytest.mark.parametrize("rows", CASES.values(), ids=CASES)
def test_documents_are_as_if_alone(rows, settings):
    assert_alone(tiny_llama(), rows, SEQ_LEN, 16, **settings)


@pytest.mark.parametrize("chunk", [5, 17, 64])
@pytest.mark.parametrize("name", CONFIGS)
def test_ragged_chunks(name, chunk):
    for rows in (CASES["borders inside of chunks"], CASES["rows that differ"], CASES["packed and padded"]):
        assert_alone(CONFIGS[name](), rows, SEQ_LEN, chunk)


def test_the_comparison_sees_documents_that_leak():
    """One document where the reference has two."""
    ids = make_batch(1)["input_ids"]
    loss, _, labels = one_by_one(make_model(tiny_llama(), "eager"), ids, [[(0, 20), (20, 48)]])
    got = make_streamed(tiny_llama())(input_ids=ids, labels=labels).loss
    assert abs(got.item() - loss) > 1000 * LOSS * loss


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_that_of_eager(side):
    """With transformers' own positions: padding counts in them."""
    mask = torch.ones(2, SEQ_LEN, dtype=torch.long)
    mask[0, slice(0, 11) if side == "left" else slice(37, 48)] = 0
    batch = make_batch(2)
    batch["labels"] = batch["labels"].masked_fill(mask == 0, -100)
    if side == "left":
        batch["labels"][0, 11] = -100  # predicted by padding
    want = loss_and_gradients(make_model(tiny_llama(), "eager"), batch, attention_mask=mask)
    got = loss_and_gradients(make_streamed(tiny_llama()), batch, attention_mask=mask)
    assert abs(got[0] - want[0]) <= LOSS * want[0]
    assert_gradients_close(got[1], want[1])


def test_packed_positions_are_those_of_eager():
    batch = make_batch(2) | {"position_ids": positions_of([[(0, 30), (30, 48)], [(0, 11), (11, 48)]], SEQ_LEN)}
    want = loss_and_gradients(make_model(tiny_llama(), "eager"), batch, use_cache=False)  # with a cache eager lets them leak
    got = loss_and_gradients(make_streamed(tiny_llama()), batch)
    assert abs(got[0] - want[0]) <= LOSS * want[0]
    assert_gradients_close(got[1], want[1])


@pytest.mark.parametrize("lengths", [True, False])
def test_what_the_flattening_collator_makes(lengths):
    texts = make_batch(1, SEQ_LEN)["input_ids"][0].split([20, 1, 27])
    features = [{"input_ids": text.tolist()} for text in texts]
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=lengths, return_seq_idx=lengths)(features)
    assert ("cu_seq_lens_q" in batch) == lengths
    loss, grads, _ = one_by_one(make_model(tiny_llama(), "eager"), batch["input_ids"], [[(0, 20), (20, 21), (21, 48)]])
    got, got_grads = loss_and_gradients(make_streamed(tiny_llama()), batch)
    assert abs(got.item() - loss) <= LOSS * loss
    assert_gradients_close(got_grads, grads)


def test_evaluation_and_logits():
    rows = [[(0, 20), (20, 48)], [(5, 48)]]
    ids, model = make_batch(2)["input_ids"], make_streamed(tiny_llama(), train=False)
    with torch.no_grad():
        got = model(ids, position_ids=positions_of(rows, 48), attention_mask=mask_of(rows, 48), use_cache=False).logits
        for row, documents in enumerate(rows):
            for start, stop in documents:
                assert_close(got[row, start:stop], make_model(tiny_llama(), "eager")(ids[row : row + 1, start:stop]).logits[0])


def test_only_what_is_seen_is_multiplied(monkeypatch):
    """16 documents cost what 16 runs cost, and their K and V are not fetched by others."""
    products, fetched = [], []
    naive = kernel_choice.KERNELS["naive"]
    for call in ("forward", "backward"):
        run = getattr(type(naive), call)

        def counted(self, *args, run=run, at=0 if call == "forward" else 1, causal):
            queries, keys = args[at].shape[1], args[at + 1].shape[1]
            products.append(queries * keys - causal * queries * (queries - 1) // 2)
            return run(self, *args, causal=causal)

        monkeypatch.setattr(type(naive), call, counted)
    in_order = key_value_store._in_order
    monkeypatch.setattr(key_value_store, "_in_order", lambda groups: fetched.append(len(groups)) or in_order(groups))
    rows = [[(at, at + 16) for at in range(0, 256, 16)]]
    batch = make_batch(1, 256)
    for kv in ("resident", "streamed"):
        model = make_streamed(tiny_llama(), 16, kernel="naive", kv=kv, offload="host")
        products.clear()
        fetched.clear()
        loss_and_gradients(model, batch, position_ids=positions_of(rows, 256))
        layers, passes = 2, 2
        assert sum(products) == layers * passes * 16 * (16 * 17 // 2)
        assert fetched == ([] if kv == "resident" else [1] * layers * passes * 16)
        products.clear()
        loss_and_gradients(model, batch)
        assert sum(products) >= layers * passes * 256 * 257 // 2


# What describes documents


def segments(rows, *spans):
    return [[(s.rows, s.start, s.stop, s.first) for s in chunk] for chunk in Documents(rows).segments(spans)]


def test_segments():
    both = slice(0, 2)
    assert segments([[(0, 10)]] * 2, (0, 6), (6, 10)) == [[(both, 0, 6, 0)], [(both, 6, 10, 0)]]
    first, second = slice(0, 1), slice(1, 2)
    assert segments([[(0, 4), (4, 10)], [(7, 10)]], (0, 6), (6, 10)) == [
        [(first, 0, 4, 0), (first, 4, 6, 4)],
        [(first, 6, 10, 4), (second, 7, 10, 7)],
    ]


def found(batch, seq_len, **arguments):
    documents = documents_of("Model", arguments, batch, seq_len)
    return None if documents is None else documents._rows


def test_where_documents_start():
    assert found(2, 6) is None
    assert found(1, 6, attention_mask=torch.ones(1, 6), position_ids=torch.arange(3, 9)[None]) is None
    row = slice(0, 1)
    assert found(1, 6, seq_idx=torch.tensor([[0, 0, 1, 1, 1, 1]])) == [(row, [(0, 2), (2, 6)])]
    assert found(1, 6, cu_seq_lens_q=torch.tensor([0, 2, 2, 5])) == [(row, [(0, 2), (2, 5)])]
    assert found(1, 6, cu_seq_lens_k=torch.tensor([0, 6])) is None
    assert found(1, 6, position_ids=torch.tensor([0, 1, 4, 5, 0, 1])) == [(row, [(0, 2), (2, 4), (4, 6)])]
    both = {"position_ids": torch.tensor([[0, 1, 0, 1, 2, 1]]), "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0]])}
    assert found(2, 6, **both | {"attention_mask": both["attention_mask"].expand(2, -1)}) == [(slice(0, 2), [(0, 2), (2, 5)])]
    assert found(1, 6, attention_mask=torch.zeros(1, 6)) == [(row, [])]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"attention_mask": torch.tensor([[1, 1, 0, 1]])}, "inside of a document at 1 places.*Pad on one side"),
        ({"attention_mask": torch.tensor([[1, 1, 2, 2]])}, "values from 1 to 2; 1 is a token and 0 is padding"),
        ({"attention_mask": torch.ones(1, 3)}, r"attention_mask of shape \[1, 3\].*1 rows of 4 tokens"),
        ({"seq_idx": torch.ones(4)}, r"seq_idx of shape \[4\].*1 rows of 4 tokens; it needs one entry a token"),
        ({"cu_seq_lens_q": torch.tensor([0, 2, 5])}, r"cu_seq_lens_q \[0, 2, 5\].*1 x 4 tokens"),
        ({"cu_seq_lens_q": torch.tensor([0, 2, 4]), "cu_seq_lens_k": torch.tensor([0, 3, 4])}, "must be equal"),
        ({"cu_seq_lens_q": torch.tensor([0, 3, 2])}, "from 0 up to its length"),
    ],
)
def test_what_describes_no_documents_is_refused(arguments, text):
    with pytest.raises(ValueError, match=text):
        found(1, 4, **arguments)


def test_a_row_of_padding_alone():
    """Finite, and the other row as if alone."""
    mask, batch = torch.ones(2, SEQ_LEN, dtype=torch.long), make_batch(2)
    mask[1] = 0
    batch["labels"][1] = -100
    got = loss_and_gradients(make_streamed(tiny_llama()), batch, attention_mask=mask)
    alone = {name: tensor[:1] for name, tensor in batch.items()}
    want = loss_and_gradients(make_model(tiny_llama(), "eager"), alone)
    assert math.isclose(got[0].item(), want[0].item(), rel_tol=LOSS)
    assert_gradients_close(got[1], want[1])
