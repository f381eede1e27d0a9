"""
Adapters on a quantized base (QLoRA with bitsandbytes) against eager attention. A failure means finetuning that learns
something else than without streaming, or that holds what 4 bits were to save.
"""

import gc

import pytest
import torch
from reference import assert_gradients_close, loss_and_gradients, make_batch, make_model, peak_bytes, tiny_llama
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import hf_fpdt
from hf_fpdt import FPDTConfig, apply_fpdt

bnb = pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj", "up_proj"]}
HEAD = {"llm_int8_skip_modules": ["nothing"]}  # by itself transformers leaves the head as it is


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    make_model(tiny_llama(hidden_size=64, intermediate_size=128)).save_pretrained(folder)
    return folder


def qlora(
    checkpoint, implementation: str, lora: dict = LORA, dtype=torch.float32, device="cpu", noise: float = 0.2, **quantization
):
    """As people make them: loaded, quantized, prepared, with an adapter that changes what the model computes."""
    settings = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype, **quantization}
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint,
        quantization_config=BitsAndBytesConfig(**settings),
        attn_implementation=implementation,
        dtype=dtype,
        device_map={"": device},
    )
    torch.manual_seed(0)
    model = peft.get_peft_model(peft.prepare_model_for_kbit_training(model), peft.LoraConfig(**lora))
    generator = torch.Generator().manual_seed(3)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data += noise * torch.randn(weight.shape, generator=generator).to(weight.device)
    return model.train()


CASES = {
    "nf4": {},
    "fp4": {"bnb_4bit_quant_type": "fp4"},
    "double quantization": {"bnb_4bit_use_double_quant": True},
    "weights stored as floats": {"bnb_4bit_quant_storage": torch.float32},
    "everything": {"lora": {"r": 4, "target_modules": "all-linear", "modules_to_save": ["embed_tokens"]}},
    "a head of 4 bits": HEAD,
    "int8": {"load_in_4bit": False, "load_in_8bit": True, "llm_int8_threshold": 0.0},
}


@pytest.mark.parametrize("settings", [{}, {"offload": "host", "kv": "streamed"}, {"recompute": False}], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_equal_eager(name, settings, checkpoint):
    want, want_grads = loss_and_gradients(qlora(checkpoint, "eager", **CASES[name]), make_batch(2, 47))
    model = apply_fpdt(qlora(checkpoint, "fpdt", **CASES[name]), FPDTConfig(chunk_size=17, **settings))
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    got, grads = loss_and_gradients(model, make_batch(2, 47))
    assert sum(isinstance(module, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt) for module in model.modules()) >= 2 * 7
    assert abs(got - want) <= 2e-6 * want
    assert_gradients_close(grads, want_grads)
    for name, weight in model.named_parameters():
        assert torch.equal(weight.view(torch.uint8), before[name].view(torch.uint8)), name
        assert weight.requires_grad or weight.grad is None, name


def test_a_chunk_of_one_token(checkpoint):
    """bitsandbytes has a kernel of its own for these when nothing needs a gradient, as in the forward."""
    batch = make_batch(1, 18)
    want, want_grads = loss_and_gradients(qlora(checkpoint, "eager"), batch)
    got, grads = loss_and_gradients(apply_fpdt(qlora(checkpoint, "fpdt"), FPDTConfig(chunk_size=17)), batch)
    assert abs(got - want) <= 2e-6 * want
    assert_gradients_close(grads, want_grads)


@pytest.mark.parametrize("quantization", [{}, HEAD], ids=["plain_head", "head_of_4_bits"])
@pytest.mark.parametrize("recompute", [True, False])
def test_predicted_peak_is_what_a_step_takes(recompute, quantization, checkpoint):
    """Also: nothing of a layer is kept in more than 4 bits."""
    config = FPDTConfig(chunk_size=256, gpu_memory=1 << 40, recompute=recompute, offload="auto" if not recompute else "host")
    model = apply_fpdt(qlora(checkpoint, "fpdt", **quantization), config)
    resident = sum({id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}.values())
    predicted = hf_fpdt.plan(model, seq_len=2048).peaks.device - resident
    batch = make_batch(1, 2048)
    for _ in range(2):
        model.zero_grad()
        gc.collect()
        taken = peak_bytes(lambda: model(**batch).loss.backward())
    assert 0.95 * taken <= predicted <= 1.05 * taken


def test_a_changed_weight_is_noticed(checkpoint):
    model = apply_fpdt(qlora(checkpoint, "fpdt"), FPDTConfig(chunk_size=17))
    loss = model(**make_batch(2, 47)).loss
    model.get_base_model().model.layers[1].mlp.down_proj.weight.zero_()
    with pytest.raises(RuntimeError, match=r"changed in place \(mlp.down_proj.weight\) between"):
        loss.backward()
