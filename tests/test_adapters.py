"""
Every kind of PEFT adapter on a streamed model, against the same adapter on eager attention in fp32, gradient by gradient. A
failure means finetuning that learns something else than the adapter's method says.
"""

import copy
from functools import partial

import pytest
import torch
from reference import (
    CallLengths,
    assert_gradients_close,
    gradients,
    loss_and_gradients,
    make_batch,
    make_model,
    make_streamed,
    tiny_llama,
)
from transformers import MixtralConfig

from hf_fpdt import FPDTConfig, apply_fpdt

peft = pytest.importorskip("peft")

TARGETS = ["q_proj", "v_proj", "up_proj"]
ADAPTERS = {
    "LoRA": peft.LoraConfig(r=4, target_modules=TARGETS),
    "DoRA": peft.LoraConfig(r=4, target_modules=TARGETS, use_dora=True),
    "rsLoRA": peft.LoraConfig(r=4, target_modules=TARGETS, use_rslora=True),
    "LoRA on all linear layers": peft.LoraConfig(r=4, target_modules="all-linear"),
    "LoRA on the head": peft.LoraConfig(r=4, target_modules=[*TARGETS, "lm_head"]),
    "LoRA on the embedding": peft.LoraConfig(r=4, target_modules=[*TARGETS, "embed_tokens"]),
    "LoRA and biases": peft.LoraConfig(r=4, target_modules=TARGETS, bias="all"),
    "a trained head": peft.LoraConfig(r=4, target_modules=TARGETS, modules_to_save=["lm_head"]),
    "a trained embedding": peft.LoraConfig(r=4, target_modules=TARGETS, modules_to_save=["embed_tokens"]),
    "trained tokens": peft.LoraConfig(r=4, target_modules=TARGETS, trainable_token_indices=[3, 4, 5]),
    "IA3": peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "LoHa": peft.LoHaConfig(r=4, target_modules=TARGETS),
    "OFT": peft.OFTConfig(r=0, oft_block_size=4, target_modules=TARGETS),
    "VeRA": peft.VeraConfig(r=4, target_modules=["q_proj"]),
    "norms": peft.LNTuningConfig(target_modules=["input_layernorm", "norm"]),
    "prompt tuning": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "p-tuning": peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
}


def with_adapter(model, config, seed=3):
    """Adapters far from where they start, so that they change what the model computes."""
    torch.manual_seed(0)
    model, generator = peft.get_peft_model(model, copy.deepcopy(config)), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.2 * torch.randn(weight.shape, generator=generator))
    return model.train()


def assert_same(streamed, plain, batch):
    want, want_grads = loss_and_gradients(plain, batch)
    got, grads = loss_and_gradients(streamed, batch)
    assert abs(got - want) <= 2e-6 * want
    assert_gradients_close(grads, want_grads)


@pytest.mark.parametrize("before", [True, False], ids=["fpdt_first", "adapter_first"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters(name, before):
    """Also if fpdt is set on a model that has its adapter."""
    config, batch = tiny_llama(), make_batch(2, 47)
    if before:
        streamed = with_adapter(make_streamed(config, 17), ADAPTERS[name])
    else:
        streamed = apply_fpdt(with_adapter(make_model(config, "eager"), ADAPTERS[name]), FPDTConfig(chunk_size=17))
    assert_same(streamed, with_adapter(make_model(config, "eager"), ADAPTERS[name]), batch)
    plain = make_model(config, "eager")(**batch).loss
    assert (streamed(**batch).loss - plain).abs() > 1e-4 * plain  # the adapter does something


def test_lora_on_the_parameters_of_experts():
    """PEFT sets these parameters anew at every call of the layer, which must not look like a change of the user's."""
    config = MixtralConfig(
        vocab_size=97, hidden_size=32, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4, sliding_window=None,
    )  # fmt: skip
    adapter = peft.LoraConfig(r=4, target_modules=[], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    models = [make_streamed(config, 17), make_model(config, "eager")]
    assert_same(*(with_adapter(model, adapter) for model in models), make_batch(2, 47))


@pytest.mark.parametrize("kv", ["resident", "streamed"])
def test_packed_and_padded(kv):
    """An adapter, documents and everything on the host together."""
    positions = torch.cat([torch.arange(n) for n in (20, 1, 26)])[None]
    batch = make_batch(1, 47) | {"position_ids": positions}
    plain = with_adapter(make_model(tiny_llama(), "eager"), ADAPTERS["LoRA"])
    want, want_grads = loss_and_gradients(plain, batch, use_cache=False)
    streamed = with_adapter(make_streamed(tiny_llama(), 17, offload="host", kv=kv), ADAPTERS["LoRA"])
    got, grads = loss_and_gradients(streamed, batch)
    assert abs(got - want) <= 2e-6 * want
    assert_gradients_close(grads, want_grads)


PREPARATIONS = {
    "input gradients": lambda model: model.enable_input_require_grads(),
    "checkpointing": lambda model: model.gradient_checkpointing_enable(),
    "reentrant": lambda model: model.gradient_checkpointing_enable({"use_reentrant": True}),
    "k-bit training": lambda model: peft.prepare_model_for_kbit_training(model),
    "k-bit training without checkpointing": lambda model: peft.prepare_model_for_kbit_training(
        model, use_gradient_checkpointing=False
    ),
}


@pytest.mark.parametrize("before", [True, False], ids=["before_the_adapter", "after_it"])
@pytest.mark.parametrize("name", PREPARATIONS)
def test_prepared_as_quantized_models_are(name, before):
    """With the base frozen, gradients of the embedding's output change nothing; each layer still runs once in each pass."""
    models = []
    for model in (make_streamed(tiny_llama(), 17), make_model(tiny_llama(), "eager")):
        if before:
            PREPARATIONS[name](model)
        model = with_adapter(model, ADAPTERS["LoRA"])
        if not before and "k-bit" not in name:  # that freezes the adapter too
            PREPARATIONS[name](model)
        models.append(model)
    calls = CallLengths(models[0], "layers.0.self_attn.q_proj")
    assert_same(*models, make_batch(2, 47))
    assert calls.take() == [17, 17, 13, 13, 17, 17]


def test_merged():
    batch, model = make_batch(2, 47), with_adapter(make_streamed(tiny_llama(), 17), ADAPTERS["LoRA on all linear layers"])
    want = model(**batch).loss
    model.merge_adapter()
    assert abs(model(**batch).loss - want) <= 2e-6 * want
    model.unmerge_adapter()
    assert abs(model(**batch).loss - want) <= 2e-6 * want
    merged = model.merge_and_unload()
    lengths = CallLengths(merged, "layers.0.self_attn.q_proj")
    assert abs(merged(**batch).loss - want) <= 2e-6 * want
    assert lengths.take() == [17, 17, 13]


def test_saved_loaded_and_switched(tmp_path):
    """Two adapters on one streamed model, one at a time and none, each against eager attention."""
    batch, models = make_batch(2, 47), []
    for name, seed in (("first", 3), ("second", 4)):
        with_adapter(make_streamed(tiny_llama(), 17), ADAPTERS["LoRA"], seed=seed).save_pretrained(tmp_path / name)
    for base in (make_streamed(tiny_llama(), 17), make_model(tiny_llama(), "eager")):
        model = peft.PeftModel.from_pretrained(base, tmp_path / "first", adapter_name="first", is_trainable=True)
        model.load_adapter(tmp_path / "second", adapter_name="second", is_trainable=True)
        models.append(model.train())
    losses = []
    for name in ("first", "second", "first"):
        for model in models:
            model.set_adapter(name)
        assert_same(*models, batch)
        losses.append(models[0](**batch).loss.item())
    with models[0].disable_adapter():
        losses.append(models[0](**batch).loss.item())
    plain = make_model(tiny_llama(), "eager")(**batch).loss.item()
    assert losses[0] == losses[2]
    assert abs(losses[3] - plain) <= 2e-6 * plain
    assert min(abs(a - b) for a, b in ((losses[0], losses[1]), (losses[0], plain), (losses[1], plain))) > 1e-3


def test_switched_between_forward_and_backward():
    """The backward runs the layers again, with the adapters that are on then. Off and on again, as for a reference, is fine."""
    models, batch = [], make_batch(2, 47)
    for base in (make_streamed(tiny_llama(), 17), make_model(tiny_llama(), "eager")):
        model = with_adapter(base, ADAPTERS["a trained embedding"])
        model.add_adapter("other", ADAPTERS["LoRA"])
        models.append(model)
        loss = model(**batch).loss
        with torch.no_grad(), model.disable_adapter():
            model(**batch)
        model.set_adapter("other")
        model.set_adapter("default")
        loss.backward()
    assert_gradients_close(gradients(models[0]), gradients(models[1]))

    def switch_off():
        models[0].base_model.disable_adapter_layers()

    switches = {
        r"was switched from adapters=\['default'\] to \['other'\]": partial(models[0].set_adapter, "other"),
        r"to \[\]": switch_off,
    }
    for message, switch in (switches | {"merged": models[0].merge_adapter}).items():
        loss = models[0](**batch).loss
        switch()
        with pytest.raises(RuntimeError, match=message):
            loss.backward()
        models[0].base_model.enable_adapter_layers()
        models[0].set_adapter("default")


REFUSED = {
    "prefix tuning": (peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5), "past_key_values were given in"),
    "aLoRA": (peft.LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=[3], target_modules=TARGETS), "aLoRA adapter"),
}
if hasattr(peft, "LilyConfig"):
    REFUSED["Lily"] = (peft.LilyConfig(target_modules=TARGETS), "Lily adapter")


@pytest.mark.filterwarnings("ignore:.*past_key_values:FutureWarning")  # of PEFT, to transformers 5.24
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    """In training; with a cache these models run as they do without hf_fpdt."""
    config, message = REFUSED[name]
    batch, models = make_batch(2, 47), [make_streamed(tiny_llama(), 17), make_model(tiny_llama(), "eager")]
    streamed, plain = (peft.get_peft_model(model, copy.deepcopy(config)).train() for model in models)
    with pytest.raises(ValueError, match=message):
        streamed(**batch)
    ids = batch["input_ids"][:, :7]
    plain.base_model.load_state_dict(streamed.base_model.state_dict())
    if name == "prefix tuning":
        plain.load_state_dict(streamed.state_dict())
    want, got = (m.eval().generate(input_ids=ids, max_new_tokens=3, do_sample=False) for m in (plain, streamed))
    assert torch.equal(got, want)
