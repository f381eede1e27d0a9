"""
Dropout under recomputation: the backward runs every chunk again and must draw the masks that the forward drew.

A failure means gradients of another function than the loss, silently. The proof feeds the masks that the streamed forward
drew, joined over chunks, to an unstreamed run and compares every gradient.
"""

import pytest
import torch
from reference import assert_gradients_close, difference, loss_and_gradients, make_batch, make_model, make_streamed, tiny_llama
from reference import tiny_neox as neox_without_dropout

from hf_fpdt import FPDTConfig, apply_fpdt

SEQ_LEN, CHUNK = 48, 20
CHUNKS = 3


class DropoutRecorder:
    """Stands in for `torch.nn.functional.dropout`: draws real masks and keeps them, or applies given ones."""

    def __init__(self):
        self.masks: list[torch.Tensor] = []
        self.given: list[torch.Tensor] | None = None
        self._dropout = torch.nn.functional.dropout

    def __call__(self, x, p=0.5, training=True, inplace=False):
        if not training or p == 0.0:
            return x
        if self.given is None:
            mask = self._dropout(torch.ones_like(x), p, True)
            self.masks.append(mask)
        else:
            mask = self.given.pop(0)
        return x * mask

    def take(self) -> list[torch.Tensor]:
        masks, self.masks = self.masks, []
        return masks


@pytest.fixture
def dropout(monkeypatch):
    recorder = DropoutRecorder()
    monkeypatch.setattr(torch.nn.functional, "dropout", recorder)
    return recorder


def joined(masks: list[torch.Tensor], before: int, layers: int, chunks: int) -> list[torch.Tensor]:
    """Masks in the order of an unstreamed run: `before` full-length ones, then per layer each call's chunks joined."""
    result, masks = masks[:before], masks[before:]
    calls = len(masks) // (layers * chunks)
    assert calls * layers * chunks == len(masks)
    for layer in range(layers):
        of_layer = masks[layer * chunks * calls : (layer + 1) * chunks * calls]
        result += [torch.cat(of_layer[call::calls], dim=1) for call in range(calls)]
    return result


def reversed_chunks(masks: list[torch.Tensor], before: int, layers: int, chunks: int) -> list[torch.Tensor]:
    """The order in which the backward must draw the same masks: last layer and last chunk first."""
    masks = masks[before:]
    calls = len(masks) // (layers * chunks)
    groups = [masks[start : start + calls] for start in range(0, len(masks), calls)]
    return [mask for group in reversed(groups) for mask in group]


def check_dropout(streamed, plain, dropout, *, before: int):
    batch = make_batch(2, SEQ_LEN)
    torch.manual_seed(7)
    loss = streamed(**batch).loss
    forward_masks = dropout.take()
    after_forward = torch.get_rng_state()
    loss.backward()
    assert torch.equal(torch.get_rng_state(), after_forward), "the backward moved the global random stream"
    backward_masks = dropout.take()
    expected = reversed_chunks(forward_masks, before, 2, CHUNKS)
    assert len(backward_masks) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(backward_masks, expected, strict=True))
    assert any((mask == 0).any() for mask in forward_masks)

    got = {name: w.grad for name, w in streamed.named_parameters()}
    dropout.given = joined(forward_masks, before, 2, CHUNKS)
    assert [mask.shape[1] for mask in dropout.given] == [SEQ_LEN] * len(dropout.given)
    want_loss, want = loss_and_gradients(plain, batch)
    assert dropout.given == []
    assert difference(loss.detach(), want_loss) <= 2e-6
    assert_gradients_close(got, want)


def tiny_neox():
    return neox_without_dropout(hidden_dropout=0.1)


@pytest.mark.parametrize("save_attention", [True, False])
def test_hidden_dropout_replays(dropout, save_attention):
    streamed = make_streamed(tiny_neox(), CHUNK, save_attention=save_attention)
    check_dropout(streamed, make_model(tiny_neox(), "sdpa"), dropout, before=1)


def test_lora_dropout_replays(dropout):
    peft = pytest.importorskip("peft")
    models = []
    for implementation in ("fpdt", "sdpa"):
        config = peft.LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj", "v_proj", "down_proj"])
        torch.manual_seed(3)
        model = peft.get_peft_model(make_model(tiny_llama(), implementation), config).train()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_B" in name:  # zero at the start, which would hide the gradient of lora_A
                    weight.normal_(std=0.1)
        models.append(model)
    apply_fpdt(models[0], FPDTConfig(chunk_size=CHUNK))
    check_dropout(*models, dropout, before=0)


def test_random_stream_after_a_step_continues_after_the_forward():
    """The user's stream goes on from where the forward left it, for one backward and for several graphs alive at once."""
    batch = make_batch(2, SEQ_LEN)
    model = make_streamed(tiny_neox(), CHUNK)
    torch.manual_seed(11)
    first, second = model(**batch).loss, model(**batch).loss
    after = torch.get_rng_state()
    assert first != second, "dropout draws anew in every forward"
    first.backward()
    second.backward()
    assert torch.equal(torch.get_rng_state(), after)


def test_same_seed_same_gradients():
    batch, runs = make_batch(2, SEQ_LEN), []
    model = make_streamed(tiny_neox(), CHUNK)
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        runs.append(loss_and_gradients(model, batch))
    assert torch.equal(runs[0][0], runs[1][0])
    assert_gradients_close(runs[0][1], runs[1][1], 0.0)
    assert not torch.equal(runs[0][0], runs[2][0])


def test_no_dropout_in_eval():
    batch = make_batch(2, SEQ_LEN)
    with torch.no_grad():
        got = make_streamed(tiny_neox(), CHUNK, train=False)(**batch).loss
        want = make_model(tiny_neox(), "eager", train=False)(**batch).loss
    assert difference(got, want) <= 2e-6
