"""
LoRA under `accelerate launch`, its sequences spread over processes, against a plain loop in one: as in `test_launched.py`, with
the weights read from the adapter that was saved. A failure means that several GPUs train or save another adapter than one.
"""

import json

import pytest
import torch
from test_launched import CLIP, ON_CPU, RATE, RUN, SAMPLES, STEPS, launch, make_model, of_gpus, tiny_llama, zero
from train import Tokens, with_lora
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

peft = pytest.importorskip("peft")

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj", "up_proj"]}
CASES = [
    ("zero3", LORA | {"modules_to_save": ["lm_head"]}),
    ("zero2", LORA | {"modules_to_save": ["embed_tokens"]}),
    ("fsdp2", LORA),
    ("ddp", LORA),
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    make_model(tiny_llama()).save_pretrained(folder)
    return folder


def plain(checkpoint):
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")


def reference(checkpoint, lora: dict):
    """Losses, gradient norms and the trained weights of a plain loop; a sample is a step of the two processes."""
    settings = TrainingArguments("unused", per_device_train_batch_size=1, report_to="none", use_cpu=True)
    model = with_lora(plain(checkpoint), json.dumps(lora)).train()
    batches = list(Trainer(model, settings, train_dataset=Tokens(SAMPLES, 46, model.config.vocab_size)).get_train_dataloader())
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer, log = torch.optim.SGD(trained, lr=RATE), []
    for batch in batches[:STEPS]:
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        log.append((loss.item(), norm.item()))
    return log, peft.get_peft_model_state_dict(model)


@pytest.mark.parametrize(("engine", "lora"), CASES)
def test_lora_trains_and_is_saved_as_in_one_process(engine, lora, checkpoint, tmp_path):
    words, out = ["--model", str(checkpoint), "--lora", json.dumps(lora)], tmp_path / "out"
    if engine.startswith("zero"):
        result = launch(zero(int(engine[-1]), tmp_path, groups=1, size=2), [*RUN, *words], out)
    else:
        result = launch(of_gpus(engine, tmp_path, groups=1, size=2), [*ON_CPU, *words], out, backend=None)
    assert result.returncode == 0, result.stderr[-6000:]
    log = json.loads((out / "log.json").read_text())
    want_log, want = reference(checkpoint, lora)
    assert log[-1]["tokens"] == 46 // 2
    log = [entry for entry in log if "loss" in entry]
    assert [entry["loss"] for entry in log] == pytest.approx([loss for loss, _ in want_log], rel=1e-5)
    assert [entry["grad_norm"] for entry in log] == pytest.approx([norm for _, norm in want_log], rel=1e-5)
    got = peft.get_peft_model_state_dict(peft.PeftModel.from_pretrained(plain(checkpoint), out))
    assert set(got) == set(want)
    for name, weight in want.items():
        assert (got[name] - weight).abs().max() <= 1e-5 * weight.abs().max(), name
