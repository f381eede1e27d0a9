"""
QLoRA on a GPU: adapters on bitsandbytes' 4-bit weights against eager attention in fp32. A failure means finetuning that learns
something else than without streaming.
"""

import pytest
from reference import assert_gradients_close, loss_and_gradients, make_batch, make_model, tiny_llama
from test_quantized import qlora

from hf_fpdt import FPDTConfig, apply_fpdt

pytestmark = pytest.mark.gpu
bnb = pytest.importorskip("bitsandbytes")

# With the 0.2 of the smaller models on CPUs, adapters everywhere make scores so large that 2e-7 of rounding in the embeddings
# moves eager attention's own gradients by 3e-5.
NOISE = 0.02
CASES = {
    "nf4": {},
    "fp4": {"bnb_4bit_quant_type": "fp4"},
    "double quantization": {"bnb_4bit_use_double_quant": True},
    "all linear modules": {"lora": {"r": 4, "target_modules": "all-linear"}},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    make_model(tiny_llama(**shape)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("settings", [{}, {"offload": "host"}, {"offload": "host", "kv": "streamed"}], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients_equal_eager(name, settings, checkpoint):
    batch = {key: value.cuda() for key, value in make_batch(2, 999).items()}
    eager, model = (qlora(checkpoint, one, **CASES[name], device="cuda", noise=NOISE) for one in ("eager", "fpdt"))
    want, want_grads = loss_and_gradients(eager, batch)
    apply_fpdt(model, FPDTConfig(chunk_size=256, **settings))
    got, grads = loss_and_gradients(model, batch)
    assert sum(isinstance(module, bnb.nn.Linear4bit) for module in model.modules()) >= 2 * 7
    assert abs(got - want) <= 2e-6 * want
    assert_gradients_close(grads, want_grads, 2e-5)
