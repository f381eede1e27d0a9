"""
What transformers' own test suite asks of an attention implementation, asked of "fpdt": its checks, written anew for Llama,
GPT-NeoX, Qwen3 and a model with windows. A failure is something that works with "sdpa" or "flash_attention_2" and not here.

Left out, of the checks that take an attention implementation:

* attentions in the outputs (`output_attentions`, retained gradients of attentions), and prepared 4D masks: refused by name;
* `torch.compile` with a full graph, and export: refused by name;
* which torch backend SDPA takes, and kernels from the hub: there are none here;
* composite and encoder-decoder models: no family of these is supported.
"""

import copy

import pytest
import torch
from reference import (
    LOSS_TOLERANCE,
    TOLERANCE,
    assert_close,
    assert_gradients_close,
    difference,
    gradients,
    make_batch,
    make_model,
    tiny_llama,
    tiny_mistral,
    tiny_neox,
)
from transformers import AutoModelForCausalLM, DataCollatorWithFlattening, Qwen3Config


def tiny_qwen3() -> Qwen3Config:
    shape = {name: getattr(tiny_llama(), name) for name in ("vocab_size", "hidden_size", "intermediate_size")}
    return Qwen3Config(
        **shape, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=512,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


CONFIGS = {"llama": tiny_llama, "neox": tiny_neox, "qwen3": tiny_qwen3, "mistral": tiny_mistral}
pytestmark = pytest.mark.parametrize("family", CONFIGS)


def pair(family, *, dtype=torch.float32, train=False):
    return [make_model(CONFIGS[family](), name, dtype=dtype, train=train) for name in ("eager", "fpdt")]


def padded(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = make_batch(3, 21)["input_ids"], torch.ones(3, 21, dtype=torch.long)
    mask[1, slice(0, 6) if side == "left" else slice(15, None)] = 0
    return ids.masked_fill(mask == 0, 0), mask


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("use_mask", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_eager_matches_inference(family, dtype, side, use_mask, use_cache):
    ids, mask = padded(side)
    given = {"attention_mask": mask} if use_mask else {}
    with torch.no_grad():
        want, got = (model(ids, **given, use_cache=use_cache, output_hidden_states=True) for model in pair(family, dtype=dtype))
    seen = mask.bool() if use_mask else torch.ones_like(mask).bool()
    for a, b in zip((got.logits, *got.hidden_states), (want.logits, *want.hidden_states), strict=True):
        assert difference(a[seen].float(), b[seen].float()) <= 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}], ids=str)
def test_eager_matches_generate(family, how):
    ids, mask = padded("left")
    asked = {"attention_mask": mask, "max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, **how}
    want, got = (model.generate(ids, **asked) for model in pair(family))
    assert torch.equal(got, want)


def test_padding_matches_padding_free_with_position_ids(family):
    """Texts side by side with padding, and one behind the other without: logits and the loss."""
    ids, mask = padded("right")
    plain, model = pair(family, train=True)
    rows = [{"input_ids": row[valid.bool()].tolist()} for row, valid in zip(ids, mask, strict=True)]
    for options in ({}, {"return_flash_attn_kwargs": True}, {"return_flash_attn_kwargs": True, "return_seq_idx": True}):
        flat = DataCollatorWithFlattening(**options)(copy.deepcopy(rows))
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, 0] = -100  # as the collator has it
        want = model(ids, attention_mask=mask, labels=labels)
        got = model(**flat)
        assert_close(got.logits[0], want.logits[mask.bool()])
        assert_close(got.loss, want.loss, LOSS_TOLERANCE[torch.float32])
        assert_close(want.loss, plain(ids, attention_mask=mask, labels=labels).loss, LOSS_TOLERANCE[torch.float32])


def test_attention_can_be_set_dynamically(family):
    """On a model that was made with another one, and back."""
    plain, model = pair(family, train=True)
    batch = make_batch(2, 21)
    want = plain(**batch).loss
    for name in ("sdpa", "fpdt", "eager", "fpdt"):
        model.set_attn_implementation(name)
        assert {module.config._attn_implementation for module in model.modules() if hasattr(module, "config")} == {name}
        assert_close(model(**batch).loss, want, LOSS_TOLERANCE[torch.float32])


def test_the_implementation_is_not_saved(family, tmp_path):
    plain, model = pair(family)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.config._attn_implementation != "fpdt"
    streamed = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="fpdt").train()
    batch = make_batch(2, 21)
    for one in (again, streamed):
        assert_close(one(**batch).loss, plain(**batch).loss, LOSS_TOLERANCE[torch.float32])


@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": True}, {"use_reentrant": False}], ids=str)
def test_training(family, checkpointing):
    """Ten steps of Adam on one batch: the losses of eager attention, which fall."""
    losses = []
    for model in pair(family, train=True):
        if checkpointing is not None:
            model.gradient_checkpointing_enable(checkpointing)
        optimizer, batch = torch.optim.Adam(model.parameters(), lr=1e-3), make_batch(2, 21)
        losses.append([])
        for _ in range(10):
            optimizer.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[0][-1] < 0.9 * losses[0][0]


def test_retained_gradients_of_hidden_states(family):
    found = []
    for model in pair(family, train=True):
        output = model(**make_batch(2, 21), output_hidden_states=True)
        for hidden in output.hidden_states:
            hidden.retain_grad()
        output.loss.backward()
        found.append([hidden.grad for hidden in output.hidden_states])
    for got, want in zip(*reversed(found), strict=True):
        assert want.any()
        assert_close(got, want)


def test_embeddings_as_inputs_and_resized(family):
    plain, model = pair(family, train=True)
    for one in (plain, model):
        torch.manual_seed(3)
        one.resize_token_embeddings(105, mean_resizing=False)
    ids = make_batch(2, 21, vocab=105)["input_ids"]
    for inputs in ("input_ids", "inputs_embeds"):
        for one in (plain, model):
            one.zero_grad()
            given = ids if inputs == "input_ids" else one.get_input_embeddings()(ids)
            one(**{inputs: given}, labels=ids).loss.backward()
        assert_gradients_close(gradients(model), gradients(plain))
