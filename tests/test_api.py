"""
What a user does with a model: make it, load it, switch it, copy it, save it, generate with it, look into its outputs.

A failure means that a model with attn_implementation="fpdt" is not the model it was, somewhere outside of its gradients, or
that it silently does not stream.
"""

import copy
import inspect
import io
import json
import logging
import weakref

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from reference import (
    SEQ_LEN,
    TOLERANCE,
    VOCAB,
    CallLengths,
    assert_close,
    assert_gradients_close,
    difference,
    gradients,
    loss_and_gradients,
    make_batch,
    make_model,
    make_streamed,
    randomize,
    tiny_llama,
    tiny_neox,
    total_gradient_error,
)  # fmt: skip
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, GenerationConfig, LlamaForCausalLM
from transformers.loss.loss_utils import ForCausalLMLoss

import hf_fpdt
from hf_fpdt import FPDTConfig, apply_fpdt, chunking, model_loss, restore

CHUNK = 20
LENGTHS = [20, 20, 8]
Q_PROJ = "layers.0.self_attn.q_proj"


@pytest.fixture
def batch():
    return make_batch(2)


@pytest.fixture
def plain():
    return make_model(tiny_llama(), "sdpa")


@pytest.fixture
def streamed():
    return make_streamed(tiny_llama(), CHUNK)


def lengths_of(model, batch, suffix=Q_PROJ) -> list[int]:
    """The lengths that a submodule sees in one forward."""
    calls = CallLengths(model, suffix)
    with torch.no_grad():
        model(**batch)
    calls.remove()
    return calls.take()


def residue(model) -> dict[str, set[str]]:
    """Names of the instance attributes of every module."""
    return {name: set(vars(module)) for name, module in model.named_modules()}


# -- ways to get a streamed model --------------------------------------------------------------------------------------


@pytest.fixture
def auto_chunks(monkeypatch):
    """Makes "auto" cut a sequence of 300 into 128, 128 and 44."""
    monkeypatch.setattr(chunking, "AUTO_CHUNK_TOKENS", {"cpu": 128, "cuda": 128})
    return make_batch(1, 300)


def test_public_names():
    names = {
        "DeviceMemoryError",
        "DiskSpaceError",
        "FPDTConfig",
        "FPDTPlugin",
        "HostMemoryError",
        "__version__",
        "apply_fpdt",
        "plan",
        "restore",
    }
    assert set(hf_fpdt.__all__) == names
    assert all(hasattr(hf_fpdt, name) for name in hf_fpdt.__all__)


def test_from_config_streams(auto_chunks):
    assert lengths_of(make_model(tiny_llama(), "fpdt"), auto_chunks) == [128, 128, 44]
    assert lengths_of(make_model(tiny_llama(), "sdpa"), auto_chunks) == [300]


def test_from_config_of_the_class(auto_chunks):
    config = tiny_llama(attn_implementation="fpdt")
    assert lengths_of(LlamaForCausalLM(config).train(), auto_chunks) == [128, 128, 44]


@pytest.mark.parametrize("how", ["from_pretrained", "set_attn_implementation", "apply_fpdt"])
def test_other_ways_to_stream(tmp_path, auto_chunks, how):
    model = make_model(tiny_llama(), "sdpa")
    want, want_grads = loss_and_gradients(model, auto_chunks)
    if how == "from_pretrained":
        model.save_pretrained(tmp_path)
        model = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="fpdt").train()
    elif how == "set_attn_implementation":
        model.set_attn_implementation("fpdt")
    else:
        assert apply_fpdt(model) is model
    assert model.config._attn_implementation == "fpdt"
    assert lengths_of(model, auto_chunks) == [128, 128, 44]
    loss, grads = loss_and_gradients(model, auto_chunks)
    assert difference(loss, want) <= 2e-6
    assert_gradients_close(grads, want_grads)


def test_base_model_without_head(plain, batch):
    """AutoModel: no head, no loss; its hidden states stream."""
    model = randomize(AutoModel.from_config(tiny_llama(), attn_implementation="fpdt"))
    model = apply_fpdt(model.train(), FPDTConfig(chunk_size=CHUNK))
    model.load_state_dict(plain.model.state_dict())
    ids = {"input_ids": batch["input_ids"]}
    assert lengths_of(model, ids) == LENGTHS
    assert_close(model(**ids).last_hidden_state, plain.model(**ids).last_hidden_state)


def test_apply_twice_changes_the_settings(streamed, batch):
    assert lengths_of(streamed, batch) == LENGTHS
    apply_fpdt(streamed, FPDTConfig(chunk_size=30))
    assert lengths_of(streamed, batch) == [30, 18]
    apply_fpdt(streamed)
    assert lengths_of(streamed, batch) == [SEQ_LEN]


def test_group_of_one_process(plain, batch):
    class Group:
        def size(self):
            return 1

    apply_fpdt(plain, FPDTConfig(chunk_size=CHUNK), sp_group=Group())
    assert lengths_of(plain, batch) == LENGTHS


# -- and ways out of it ------------------------------------------------------------------------------------------------


def test_switching_to_sdpa_and_back(streamed, plain, batch):
    want, want_grads = loss_and_gradients(plain, batch)
    for implementation, lengths in (("sdpa", [SEQ_LEN]), ("fpdt", LENGTHS), ("eager", [SEQ_LEN]), ("fpdt", LENGTHS)):
        streamed.set_attn_implementation(implementation)
        assert lengths_of(streamed, batch) == lengths
        loss, grads = loss_and_gradients(streamed, batch)
        assert difference(loss, want) <= 2e-6
        assert_gradients_close(grads, want_grads)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("used", [False, True])
def test_restore_undoes_apply(batch, implementation, used):
    model, untouched = (make_model(tiny_llama(), implementation) for _ in range(2))
    want = loss_and_gradients(untouched, batch)
    loss_and_gradients(model, batch)
    before, outputs = residue(model), model(**batch)
    apply_fpdt(model, FPDTConfig(chunk_size=CHUNK))
    if used:
        loss_and_gradients(model, batch)
    assert restore(model) is model
    assert residue(model) == before
    assert model.config._attn_implementation == implementation
    assert model.loss_function is ForCausalLMLoss
    assert lengths_of(model, batch) == [SEQ_LEN]
    after = model(**batch)
    assert torch.equal(after.loss, outputs.loss)
    assert torch.equal(after.logits, outputs.logits)
    loss, grads = loss_and_gradients(model, batch)
    assert torch.equal(loss, want[0])
    assert_gradients_close(grads, want[1], 0.0)


def test_restore_of_a_model_made_with_fpdt(streamed, plain, batch):
    loss_and_gradients(streamed, batch)
    restore(streamed)
    assert streamed.config._attn_implementation == "sdpa"
    assert streamed.loss_function is ForCausalLMLoss
    assert not [name for module in streamed.modules() for name in vars(module) if "fpdt" in name or name == "forward"]
    assert torch.equal(streamed(**batch).loss, plain(**batch).loss)


def test_restore_of_a_plain_model_is_harmless(plain, batch):
    before = residue(plain)
    restore(plain)
    assert residue(plain) == before
    assert plain.config._attn_implementation == "sdpa"


def test_a_restored_model_can_be_streamed_again(plain, batch):
    want, want_grads = loss_and_gradients(plain, batch)
    for _ in range(2):
        apply_fpdt(plain, FPDTConfig(chunk_size=CHUNK))
        assert lengths_of(plain, batch) == LENGTHS
        loss, grads = loss_and_gradients(plain, batch)
        assert difference(loss, want) <= 2e-6
        assert_gradients_close(grads, want_grads)
        restore(plain)


def test_a_forward_that_somebody_else_replaced_is_kept(plain, batch):
    """TRL and Liger replace `model.forward` on the instance."""
    original, calls = plain.forward, []

    def forward(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    plain.forward = forward
    apply_fpdt(plain, FPDTConfig(chunk_size=CHUNK))
    assert lengths_of(plain, batch) == LENGTHS
    assert len(calls) == 1
    restore(plain)
    assert plain.forward is forward


def test_a_loss_function_of_the_users(streamed, plain, batch, caplog):
    """It gets plain logits of the whole sequence, as ever, and stays after restore."""
    seen = []

    def loss_function(logits, labels, vocab_size, **kwargs):
        seen.append(type(logits))
        return logits.float().square().mean()

    for model in (plain, streamed):
        model.loss_function = loss_function
    want, want_grads = loss_and_gradients(plain, batch)
    logging.getLogger("transformers").propagate = True
    model_loss.logger.warning_once.cache_clear()
    loss, grads = loss_and_gradients(streamed, batch)
    assert "LlamaForCausalLM computes its logits in full: its loss function is loss_function." in caplog.text
    assert seen == [torch.Tensor, torch.Tensor]
    assert difference(loss, want) <= 2e-6
    assert_gradients_close(grads, want_grads)
    restore(streamed)
    assert streamed.loss_function is loss_function


# -- copies and files --------------------------------------------------------------------------------------------------


def test_deepcopy_is_independent(streamed, batch):
    want, want_grads = loss_and_gradients(streamed, batch)
    streamed.zero_grad(set_to_none=True)
    duplicate = copy.deepcopy(streamed)
    assert lengths_of(duplicate, batch) == LENGTHS
    loss, grads = loss_and_gradients(duplicate, batch)
    assert torch.equal(loss, want)
    assert_gradients_close(grads, want_grads, 0.0)
    assert all(weight.grad is None for weight in streamed.parameters())
    with torch.no_grad():
        for weight in duplicate.parameters():
            weight.zero_()
    assert torch.equal(streamed(**batch).loss, want)
    restore(duplicate)
    assert lengths_of(streamed, batch) == LENGTHS


def test_deepcopy_before_the_first_call(batch):
    duplicate = copy.deepcopy(make_streamed(tiny_llama(), CHUNK))
    assert lengths_of(duplicate, batch) == LENGTHS


def test_a_pickled_model_streams(streamed, batch):
    """`torch.save(model)`, and processes that are started with a model as their argument."""
    buffer = io.BytesIO()
    torch.save(streamed, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert lengths_of(loaded, batch) == LENGTHS
    assert torch.equal(loaded(**batch).loss, streamed(**batch).loss)


def test_save_pretrained_leaves_no_residue(tmp_path, streamed, plain, batch):
    loss_and_gradients(streamed, batch)
    streamed.save_pretrained(tmp_path)
    for path in tmp_path.glob("*.json"):
        assert "fpdt" not in path.read_text(), path.name
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "llama"
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path).train()
    assert reloaded.config._attn_implementation == "sdpa"
    assert set(reloaded.state_dict()) == set(streamed.state_dict()) == set(plain.state_dict())
    assert torch.equal(reloaded(**batch).loss, plain(**batch).loss)


def test_a_dropped_model_is_freed(batch):
    """No cycle or registry keeps a model, or what a forward without backward saved."""
    import gc

    model = make_streamed(tiny_llama(), CHUNK)
    weight = weakref.ref(model.lm_head.weight)
    output = model(**batch)
    hidden = weakref.ref(output.logits.hidden)
    del output
    gc.collect()
    assert hidden() is None
    del model
    gc.collect()
    assert weight() is None


# -- generation --------------------------------------------------------------------------------------------------------


def generate(model, **kwargs):
    config = GenerationConfig(max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=2)
    return model.generate(**kwargs, generation_config=config)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("config", [tiny_llama, tiny_neox], ids=["llama", "neox"])
def test_generate(config, train):
    ids = make_batch(1, 15)["input_ids"]
    want = generate(make_model(config(), "sdpa", train=train), input_ids=ids)
    got = generate(make_streamed(config(), 4, train=train), input_ids=ids)
    assert want.shape == (1, 27)
    assert torch.equal(got, want)


@pytest.mark.parametrize("train", [False, True])
def test_generate_with_left_padding(train):
    ids, mask = make_batch(2, 15)["input_ids"], torch.ones(2, 15, dtype=torch.long)
    ids[0, :6], mask[0, :6] = 0, 0
    want = generate(make_model(tiny_llama(), "sdpa", train=train), input_ids=ids, attention_mask=mask)
    got = generate(make_streamed(tiny_llama(), 4, train=train), input_ids=ids, attention_mask=mask)
    assert torch.equal(got, want)
    alone = generate(make_model(tiny_llama(), "sdpa"), input_ids=ids[:1, 6:])
    assert torch.equal(want[:1, 15:], alone[:, 9:]), "the reference ignored its padding"


def test_generate_between_training_steps(streamed, plain, batch):
    want, want_grads = loss_and_gradients(plain, batch)
    generate(streamed, input_ids=batch["input_ids"])
    loss, grads = loss_and_gradients(streamed, batch)
    assert difference(loss, want) <= 2e-6
    assert_gradients_close(grads, want_grads)


def test_generate_without_cache(plain, batch):
    want = plain.generate(batch["input_ids"], max_new_tokens=5, do_sample=False, use_cache=False)
    model = make_streamed(tiny_llama(), CHUNK, train=False)
    assert torch.equal(model.generate(batch["input_ids"], max_new_tokens=5, do_sample=False, use_cache=False), want)


def test_a_cache_in_eval(plain, batch):
    """A forward that returns a cache runs unstreamed and fills it."""
    model = make_streamed(tiny_llama(), CHUNK, train=False)
    ids = batch["input_ids"]
    with torch.no_grad():
        first = model(ids[:, :30], use_cache=True)
        name = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
        cache = first[name]
        second = model(ids[:, 30:], **{name: cache})
        want = plain.eval()(ids).logits
    assert cache.get_seq_length() == SEQ_LEN
    assert_close(torch.cat([first.logits, second.logits], 1), want)
    with pytest.raises(ValueError, match="past_key_values were given in training"):
        model.train()(ids, **{name: cache})


# -- evaluation and outputs --------------------------------------------------------------------------------------------


def test_eval_loss_streams(streamed, plain, batch):
    streamed.eval()
    plain.eval()
    calls = CallLengths(streamed, Q_PROJ)
    for context in (torch.no_grad(), torch.inference_mode(), torch.enable_grad()):
        with context:
            assert difference(streamed(**batch).loss, plain(**batch).loss) <= 2e-6
        assert calls.take() == LENGTHS


def test_logits_without_labels(streamed, plain, batch):
    for train in (True, False):
        streamed.train(train)
        logits = streamed(batch["input_ids"]).logits
        assert type(logits) is torch.Tensor
        assert_close(logits, plain(batch["input_ids"]).logits)


@pytest.mark.parametrize("keep", [1, 7, torch.tensor([0, 5, 47])], ids=str)
def test_logits_to_keep(streamed, plain, batch, keep):
    got = streamed(batch["input_ids"], logits_to_keep=keep).logits
    want = plain(batch["input_ids"], logits_to_keep=keep).logits
    assert got.shape[1] == (keep if isinstance(keep, int) else len(keep))
    assert_close(got, want)


def test_logits_to_keep_with_labels(streamed, plain, batch):
    """Unusual, and not deferred: labels of the kept positions."""
    arguments = {"input_ids": batch["input_ids"], "labels": batch["labels"][:, -9:], "logits_to_keep": 9}
    want, got = plain(**arguments), streamed(**arguments)
    assert type(got.logits) is torch.Tensor
    assert difference(got.loss, want.loss) <= 2e-6
    assert_close(got.logits, want.logits)


def test_logits_after_labels(streamed, plain, batch):
    got, want = streamed(**batch), plain(**batch)
    assert got.logits.shape == want.logits.shape == (2, SEQ_LEN, VOCAB)
    assert got.logits.dtype == want.logits.dtype
    assert_close(got.logits.detach(), want.logits)
    assert torch.equal(got.logits.argmax(-1), want.logits.argmax(-1))
    assert_close(got.logits[:, 3:5], want.logits[:, 3:5])
    assert_close(got.logits.float().softmax(-1), want.logits.softmax(-1))


def test_loss_of_the_users_own_from_the_logits(streamed, plain, batch):
    """Both the model's loss and one from its logits, in one backward."""
    for model in (plain, streamed):
        output = model(**batch)
        (output.loss + 0.1 * output.logits[:, ::2].square().mean()).backward()
    assert_gradients_close(gradients(streamed), gradients(plain))


def test_the_logits_are_announced(streamed, batch, monkeypatch):
    from hf_fpdt import deferred_logits

    messages = []
    monkeypatch.setattr(deferred_logits.logger, "warning_once", lambda text, *args: messages.append(text % args))
    output = streamed(**batch)
    _ = output.loss.item(), output.logits.shape
    assert messages == []
    output.logits.argmax(-1)
    assert len(messages) == 1
    assert f"all 2x{SEQ_LEN}x{VOCAB} of them are computed (0.00 GiB)" in messages[0]


def test_tuple_output(streamed, plain, batch):
    got, want = streamed(**batch, return_dict=False), plain(**batch, return_dict=False, use_cache=False)
    assert isinstance(got, tuple)
    assert len(got) == len(want)
    assert difference(got[0], want[0]) <= 2e-6


def test_positional_arguments(streamed, batch):
    assert_close(streamed(batch["input_ids"]).logits, streamed(input_ids=batch["input_ids"]).logits, 0.0)


@pytest.mark.parametrize("config", [tiny_llama, tiny_neox], ids=["llama", "neox"])
@pytest.mark.parametrize("train", [True, False])
def test_hidden_states(config, train):
    batch = make_batch(2)
    got = make_streamed(config(), CHUNK, train=train)(**batch, output_hidden_states=True)
    want = make_model(config(), "eager", train=train)(**batch, output_hidden_states=True)
    assert len(got.hidden_states) == len(want.hidden_states) == 3
    for index, (a, b) in enumerate(zip(got.hidden_states, want.hidden_states, strict=True)):
        assert_close(a, b, what=f"hidden state {index}")


def test_gradient_of_hidden_states(streamed, plain, batch):
    """A loss on the middle of the model (distillation, a value head)."""
    for model in (plain, streamed):
        output = model(input_ids=batch["input_ids"], output_hidden_states=True, use_cache=False)
        sum((i + 1) * state.square().mean() for i, state in enumerate(output.hidden_states)).backward()
    streamed_grads, plain_grads = gradients(streamed), gradients(plain)
    assert streamed_grads.pop("lm_head.weight") is plain_grads.pop("lm_head.weight") is None
    assert_gradients_close(streamed_grads, plain_grads)


def test_inputs_embeds(streamed, plain, batch):
    embeds = {}
    for model in (plain, streamed):
        embeds[model] = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
        model(inputs_embeds=embeds[model], labels=batch["labels"]).loss.backward()
    assert_close(embeds[streamed].grad, embeds[plain].grad)
    streamed_grads, plain_grads = gradients(streamed), gradients(plain)
    assert streamed_grads["model.embed_tokens.weight"] is None
    assert_gradients_close(streamed_grads, plain_grads)


def test_num_items_in_batch(streamed, plain, batch):
    got, got_grads = loss_and_gradients(streamed, batch, num_items_in_batch=torch.tensor(200))
    want, want_grads = loss_and_gradients(plain, batch, num_items_in_batch=torch.tensor(200))
    assert difference(got, want) <= 2e-6
    assert_gradients_close(got_grads, want_grads)


def test_all_ones_mask(streamed, plain, batch):
    for dtype in (torch.long, torch.bool):
        mask = torch.ones(2, SEQ_LEN, dtype=dtype)
        assert difference(streamed(**batch, attention_mask=mask).loss, plain(**batch, attention_mask=mask).loss) <= 2e-6


# -- autograd ----------------------------------------------------------------------------------------------------------

FROZEN = {
    "embeddings": lambda name: "embed" in name,
    "first layer": lambda name: "embed" in name or "layers.0" in name,
    "first layer, trained embeddings": lambda name: "layers.0" in name,
    "last layer": lambda name: "layers.1" in name,
    "every layer": lambda name: "layers" in name,
    "all but norms": lambda name: "norm" not in name,
    "all but the head": lambda name: "lm_head" not in name,
    "head": lambda name: "lm_head" in name,
    "all but one bias": lambda name: name != "model.layers.0.self_attn.k_proj.bias",
}


@pytest.mark.parametrize("name", FROZEN)
def test_frozen_parts(name, batch):
    config = tiny_llama(attention_bias=True)
    results = []
    for model in (make_model(config, "sdpa"), make_streamed(config, CHUNK)):
        for parameter, weight in model.named_parameters():
            weight.requires_grad_(not FROZEN[name](parameter))
        results.append(loss_and_gradients(model, batch))
    (want, want_grads), (loss, grads) = results
    assert difference(loss, want) <= 2e-6
    assert any(grad is None for grad in want_grads.values())
    assert_gradients_close(grads, want_grads)


def test_backward_twice(streamed, batch):
    loss = streamed(**batch, return_dict=True).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()
    logits = streamed(batch["input_ids"]).logits.sum()
    logits.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"Llama(DecoderLayer 1|RMSNorm): backward through .* a second time.*retain_graph"):
        logits.backward()


def test_input_changed_in_place(streamed, batch):
    """What a layer saved may not change under it: autograd's own check, kept."""
    streamed.model.layers[0].register_forward_hook(lambda module, args, output: (args[0].add_(1.0), None)[1])
    loss = streamed(**batch).loss
    with pytest.raises(RuntimeError, match="changed in place"):
        loss.backward()


def test_weight_changed_before_the_backward(streamed, batch):
    """The backward runs the layer again: with other weights it would be of another function."""
    loss = streamed(**batch).loss
    with torch.no_grad():
        streamed.model.layers[1].mlp.up_proj.weight += 1.0
    with pytest.raises(
        RuntimeError, match=r"LlamaDecoderLayer 1: a weight .* in place \(mlp.up_proj.weight\).*before optimizer.step"
    ):
        loss.backward()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    ("name", "where"),
    [("layers.1.mlp.up_proj", r"LlamaDecoderLayer 1: .*\(mlp.up_proj.weight\)"), ("norm", r"LlamaRMSNorm: .*\(weight\)")],
)
def test_any_weight_changed_before_the_backward(streamed, batch, name, where, frozen):
    """A frozen weight is as much of the second run as a trainable one; so is the final norm's."""
    weight = streamed.model.get_submodule(name).weight.requires_grad_(not frozen)
    loss = streamed(**batch).loss
    with torch.no_grad():
        weight.view(-1)[:3] *= 2.0
    with pytest.raises(RuntimeError, match=where):
        loss.backward()


@pytest.mark.parametrize("part", ["", "model.layers.1", "model.layers.1.mlp", "model.norm"])
def test_training_flag_changed_before_the_backward(streamed, batch, part):
    """With dropout, the second run would be of another function."""
    loss = streamed(**batch).loss
    streamed.get_submodule(part).eval()
    with pytest.raises(RuntimeError, match=r"switched from training=True to training=False.*Call backward\(\) before train"):
        loss.backward()


def test_training_flag_changed_and_changed_back(streamed, plain, batch):
    want, want_grads = loss_and_gradients(plain, batch)
    loss = streamed(**batch).loss
    streamed.eval()
    streamed.generate(batch["input_ids"][:, :5], max_new_tokens=2, do_sample=False, pad_token_id=0)
    streamed.train()
    loss.backward()
    assert difference(loss, want) <= 2e-6
    assert_gradients_close(gradients(streamed), want_grads)


@pytest.mark.parametrize("switch", [lambda model: model.set_attn_implementation("sdpa"), restore], ids=["set", "restore"])
def test_attention_switched_before_the_backward(streamed, batch, switch):
    loss = streamed(**batch).loss
    switch(streamed)
    with pytest.raises(
        RuntimeError, match=r"LlamaDecoderLayer 1: self_attn was switched from attn_implementation='fpdt' to 'sdpa'"
    ):
        loss.backward()


def test_no_grad(streamed, plain, batch):
    with torch.no_grad():
        loss = streamed(**batch).loss
    assert not loss.requires_grad
    assert difference(loss, plain(**batch).loss) <= 2e-6


def test_scaled_loss(streamed, plain, batch):
    """Accumulation, loss scaling and DDP's mean multiply the loss: every gradient follows."""
    (plain(**batch).loss * 0.5).backward()
    (streamed(**batch).loss * 0.5).backward()
    assert_gradients_close(gradients(streamed), gradients(plain))


def test_gradients_accumulate(streamed, plain):
    for seed in range(3):
        for model in (plain, streamed):
            model(**make_batch(2, seed=seed)).loss.backward()
    assert_gradients_close(gradients(streamed), gradients(plain))


def test_two_forwards_before_the_backward(streamed, plain):
    batches = [make_batch(2, seed=1), make_batch(1, 31, seed=2)]
    for model in (plain, streamed):
        first, second = (model(**batch).loss for batch in batches)
        (first + 2.0 * second).backward()
    assert_gradients_close(gradients(streamed), gradients(plain))
    streamed.zero_grad()
    first, second = (streamed(**batch).loss for batch in batches)
    first.backward()
    (2.0 * second).backward()
    assert_gradients_close(gradients(streamed), gradients(plain))


def test_interleaved_models(batch):
    """A policy and a reference, or two in a pipeline: each with its own chunks and kernel."""
    settings = ((tiny_llama, 20, "naive"), (tiny_neox, 13, "torch_cpu"))
    streamed = [make_streamed(config(), chunk, kernel=kernel) for config, chunk, kernel in settings]
    plain = [make_model(config(), "sdpa") for config, _, _ in settings]
    for models in (streamed, plain):
        losses = [model(**batch).loss for model in models]
        (losses[0] * losses[1]).backward()
    for got, want in zip(streamed, plain, strict=True):
        assert_gradients_close(gradients(got), gradients(want))


def test_a_model_called_inside_of_another(streamed, plain, batch):
    """A hook on a layer of the one runs the other: no state of a pass leaks into it."""
    inner, seen = make_model(tiny_neox(), "sdpa", train=False), []

    def hook(module, args, output):
        with torch.no_grad():
            seen.append(inner(**batch).loss)

    streamed.model.layers[0].register_forward_hook(hook)
    assert difference(streamed(**batch).loss, plain(**batch).loss) <= 2e-6
    assert torch.equal(seen[0], inner(**batch).loss)


@pytest.mark.parametrize("how", ["with a cache", "generate", "switched to sdpa", "streamed"])
@pytest.mark.parametrize("hooked", ["layers.0", "layers.0.mlp", "norm"])
def test_an_unstreamed_call_inside_of_a_streamed_one(streamed, plain, batch, how, hooked):
    """The pass of the one is not that of the other, be it between its layers or inside of a chunk."""
    inner, inner_plain, seen = make_streamed(tiny_neox(), CHUNK, train=False), make_model(tiny_neox(), train=False), []
    inner(**batch)  # its layers are wired
    ids = batch["input_ids"]

    @torch.no_grad()
    def run(model):
        if how == "generate":
            return model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
        return model(ids, use_cache=how != "streamed").logits

    want = run(inner_plain)
    if how == "switched to sdpa":
        inner.set_attn_implementation("sdpa")
    streamed.model.get_submodule(hooked).register_forward_hook(lambda module, args, output: seen.append(run(inner)))
    loss, grads = loss_and_gradients(streamed, batch)
    want_loss, want_grads = loss_and_gradients(plain, batch)
    assert difference(loss, want_loss) <= 2e-6
    assert_gradients_close(grads, want_grads)
    assert seen
    for got in seen:
        assert got.shape == want.shape
        assert difference(got, want) <= TOLERANCE[torch.float32]


def test_autograd_grad_and_selected_inputs(streamed, plain, batch):
    results = []
    for model in (plain, streamed):
        weights = [model.model.layers[0].self_attn.k_proj.weight, model.model.norm.weight]
        results.append(torch.autograd.grad(model(**batch).loss, weights))
    for want, got in zip(*results, strict=True):
        assert_close(got, want)


def test_hooks_on_parameters_fire_once(streamed, batch):
    """Whatever counts or reduces gradients sees one per weight and backward, however many chunks."""
    counts = {}
    for name, weight in streamed.named_parameters():
        weight.register_post_accumulate_grad_hook(lambda w, name=name: counts.update({name: counts.get(name, 0) + 1}))
    streamed(**batch).loss.backward()
    assert set(counts) == {name for name, _ in streamed.named_parameters()}
    assert set(counts.values()) == {1}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_have_the_dtype_of_the_weights(dtype, batch):
    model = make_streamed(tiny_llama(), CHUNK, dtype=dtype)
    loss, grads = loss_and_gradients(model, batch)
    assert loss.dtype == torch.float32
    assert {grad.dtype for grad in grads.values()} == {dtype}
    _, truth = loss_and_gradients(make_model(tiny_llama(), "eager", dtype=dtype).float(), batch)
    for name, grad in grads.items():
        assert_close(grad, truth[name], 4 * TOLERANCE[dtype], name)


def test_autocast(plain, batch):
    """fp32 weights under bf16 autocast: attention and the loss run in bf16, gradients are fp32 and close to sdpa's."""
    _, truth = loss_and_gradients(plain, batch)
    runs = []
    for model in (plain, make_streamed(tiny_llama(), CHUNK), make_streamed(tiny_llama(), CHUNK, kernel="naive")):
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()  # outside, as everybody does
        runs.append((loss.detach().float(), gradients(model)))
    reference_error = total_gradient_error(runs[0][1], truth)
    assert 1e-4 < reference_error < 0.1
    for loss, grads in runs[1:]:
        assert difference(loss, runs[0][0]) <= 1e-2
        assert {grad.dtype for grad in grads.values()} == {torch.float32}
        assert total_gradient_error(grads, truth) <= 1.3 * reference_error


def test_float16_with_a_gradient_scaler(plain, batch):
    """Scaled losses, gradients as close to the truth as sdpa's, and a step left out when they overflow."""
    _, truth = loss_and_gradients(plain, batch)
    errors = []
    for model in (plain, make_streamed(tiny_llama(), CHUNK), make_streamed(tiny_llama(), CHUNK, kv="streamed", offload="host")):
        model.zero_grad()
        optimizer, scaler = torch.optim.SGD(model.parameters(), lr=1.0), torch.amp.GradScaler("cpu", init_scale=2.0**10)
        with torch.autocast("cpu", dtype=torch.float16):
            loss = model(**batch).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        errors.append(total_gradient_error(gradients(model), truth))
        before, scaler = model.lm_head.weight.clone(), torch.amp.GradScaler("cpu", init_scale=2.0**40)
        model.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = model(**batch).loss
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 2.0**39
        assert torch.equal(model.lm_head.weight, before)
    assert 1e-4 < errors[0] < 0.01
    assert max(errors[1:]) <= 1.3 * errors[0]


@pytest.mark.parametrize("save_attention", [True, False])
def test_backward_under_another_autocast(batch, save_attention):
    """The backward repeats the forward's precision, whatever is set around the call of backward()."""
    model = make_streamed(tiny_llama(), CHUNK, save_attention=save_attention)
    for forward_enabled in (True, False):
        results = []
        for backward_enabled in (True, False):
            model.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=forward_enabled):
                loss = model(**batch).loss
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=backward_enabled):
                loss.backward()
            results.append(gradients(model))
        assert_gradients_close(*results, 0.0)


def test_attention_under_autocast_runs_in_its_dtype(batch, monkeypatch):
    """As SDPA does: otherwise no 16-bit kernel could take a mixed-precision run."""
    from hf_fpdt import layer_chunk

    dtypes, choose = set(), layer_chunk.choose_kernel

    def recording(name, device, dtype, *dims):
        dtypes.add(dtype)
        return choose(name, device, dtype, *dims)

    monkeypatch.setattr(layer_chunk, "choose_kernel", recording)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        make_streamed(tiny_llama(), CHUNK, kernel="naive")(**batch).loss.backward()
    assert dtypes == {torch.bfloat16}


# -- what others see of the model --------------------------------------------------------------------------------------


def test_signatures_are_unchanged(streamed, batch):
    streamed(**batch)
    for module in streamed.modules():
        assert inspect.signature(module.forward) == inspect.signature(type(module).forward.__get__(module))
    names = list(inspect.signature(streamed.forward).parameters)
    assert names[:2] == ["input_ids", "attention_mask"]
    assert "labels" in names


def test_classes_are_unchanged(streamed, batch):
    """Another instance of the same class is not affected."""
    streamed(**batch)
    other = make_model(tiny_llama(), "sdpa")
    assert "forward" not in vars(other)
    assert lengths_of(other, batch) == [SEQ_LEN]


def test_state_dict_and_parameters_are_unchanged(streamed, plain, batch):
    streamed(**batch)
    assert list(streamed.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in streamed.named_modules()] == [name for name, _ in plain.named_modules()]


def test_checkpointing_flags_survive(streamed, batch):
    streamed.gradient_checkpointing_enable()
    flags = [layer.gradient_checkpointing for layer in streamed.model.layers]
    assert flags == [True, True]
    at_call = []
    for layer in streamed.model.layers:
        layer.register_forward_pre_hook(lambda module, args: at_call.append(module.gradient_checkpointing))
    streamed(**batch).loss.backward()
    # Releases of transformers differ in where a layer reads its flag: in `__call__`, outside of hf_fpdt, or in `forward`.
    assert at_call == [False, False]
    assert [layer.gradient_checkpointing for layer in streamed.model.layers] == flags


def test_peft_model(batch):
    peft = pytest.importorskip("peft")

    def lora(model):
        torch.manual_seed(1)
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "lora_B" in name:
                    weight.normal_(std=0.1)
        return model.train()

    plain, streamed = lora(make_model(tiny_llama(), "sdpa")), lora(make_model(tiny_llama(), "sdpa"))
    assert apply_fpdt(streamed, FPDTConfig(chunk_size=CHUNK)) is streamed
    assert lengths_of(streamed, batch) == LENGTHS
    want, want_grads = loss_and_gradients(plain, batch)
    loss, grads = loss_and_gradients(streamed, batch)
    assert difference(loss, want) <= 2e-6
    assert_gradients_close(grads, want_grads)
    merged = streamed.merge_and_unload()
    assert lengths_of(merged, batch) == LENGTHS
    assert difference(merged(**batch).loss, want) <= 2e-5
    restore(merged)
    assert lengths_of(merged, batch) == [SEQ_LEN]


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(batch, precision):
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        model, plain = make_streamed(tiny_llama(), CHUNK), make_model(tiny_llama(), "sdpa")
        accelerator = Accelerator(cpu=True, mixed_precision=precision)
        prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        want, want_grads = loss_and_gradients(plain, batch)
        assert lengths_of(prepared, batch) == LENGTHS
        loss = prepared(**batch).loss
        accelerator.backward(loss)
        if precision == "no":
            assert difference(loss, want) <= 2e-6
            assert_gradients_close(gradients(model), want_grads)
        else:
            assert difference(loss, want) <= 1e-2
        optimizer.step()
        for keep in (True, False):
            unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=keep)
            assert unwrapped is model
            assert lengths_of(unwrapped, batch) == LENGTHS
        with torch.no_grad():
            assert model(**batch).loss < want
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_use_cache_in_training_is_off_and_said(streamed, batch, caplog):
    from transformers.utils import logging as transformers_logging

    transformers_logging.get_logger("transformers").propagate = True
    from hf_fpdt.modeling import logger

    logger.warning_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        output = streamed(**batch, use_cache=True)
    assert output.past_key_values is None
    assert "use_cache=True has no use in training" in caplog.text


def test_layer_that_does_not_attend_is_named(batch, streamed):
    class Silent(nn.Module):
        def forward(self, hidden_states, **kwargs):
            return hidden_states, None

    attention = streamed.model.layers[1].self_attn
    silent = Silent()
    silent.layer_idx, silent.is_causal = attention.layer_idx, True
    streamed.model.layers[1].self_attn = silent
    with pytest.raises(ValueError, match="LlamaDecoderLayer 1 did not call attention through transformers' AttentionInterface"):
        streamed(**batch)


@pytest.fixture
def one_process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("find_unused_parameters", [False, True])
def test_distributed_data_parallel(one_process_group, streamed, plain, batch, find_unused_parameters, caplog):
    """
    With `find_unused_parameters=True`, Trainer's default without gradient checkpointing, DDP clones every output tensor: the
    logits must stay uncomputed. Each weight must be ready for reduction exactly once.
    """
    want, want_grads = loss_and_gradients(plain, batch)
    wrapped = torch.nn.parallel.DistributedDataParallel(streamed, find_unused_parameters=find_unused_parameters)
    out = wrapped(**batch)
    out.loss.backward()
    assert "logits were used" not in caplog.text
    assert type(out.logits).__name__ == "DeferredLogits"
    assert difference(out.loss, want) <= 2e-6
    assert_gradients_close(gradients(streamed), want_grads)
    assert_close(out.logits + 0.0 * torch.ones(1), plain(**batch).logits)


def test_restore_leaves_a_foreign_forward(streamed, plain, batch):
    """Liger, TRL and accelerate set a forward of their own on the instance; undoing ours must not take theirs away."""
    inner = streamed.forward

    def foreign(*args, **kwargs):
        return inner(*args, **kwargs)

    streamed.forward = foreign
    assert lengths_of(streamed, batch) == LENGTHS
    restore(streamed)
    assert streamed.__dict__["forward"] is foreign
    assert lengths_of(streamed, batch) == [SEQ_LEN]
    assert difference(streamed(**batch).loss, plain(**batch).loss) <= 2e-6


def test_the_first_pass_says_what_was_chosen(batch, caplog):
    model = make_streamed(tiny_llama(), 17)
    with caplog.at_level(logging.INFO, logger="hf_fpdt"):
        model(**batch)
        model(**batch)
    lines = [record.getMessage() for record in caplog.records if "chunks of" in record.getMessage()]
    assert lines == [
        "hf_fpdt: 2 x 48 tokens in 3 chunks of 17, K and V resident; x, K, V, out, lse of 2 layers, 0 to 1: device"
    ]


def test_logits_are_those_of_the_call(streamed, plain, batch):
    with torch.no_grad():
        got, want = streamed(**batch).logits, plain(**batch).logits
    assert not (got + 0.0 * torch.ones(1)).requires_grad
    assert_close(torch.from_numpy(got.numpy()), want)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = streamed(**batch).logits
    assert got[..., :1].dtype == torch.bfloat16


def test_logits_of_changed_weights_are_refused(streamed, batch):
    logits = streamed(**batch).logits
    with torch.no_grad():
        streamed.lm_head.weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"Read the logits before optimizer\.step\(\)"):
        logits.argmax(-1)


def test_writing_into_logits_is_refused(streamed, batch):
    logits = streamed(**batch).logits
    with pytest.raises(ValueError, match="__setitem__ changes the logits of a call with labels in place"):
        logits[..., 0] = -1.0
    with pytest.raises(ValueError, match="div_ changes the logits"):
        logits.div_(2)
