"""
The user's way in: transformers' Trainer with a model that only differs in attn_implementation.

A failure means that a training run with hf_fpdt logs another loss curve than the same run without it, or computes layers twice.
"""

import copy

import pytest
import torch
from datasets import Dataset
from reference import SEQ_LEN, VOCAB, assert_gradients_close, difference, make_model, make_streamed, tiny_llama
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_fpdt import FPDTConfig, apply_fpdt

STEPS, CHUNK = 10, 20
CHUNKS = 3


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    # Tokens that depend on the ones before, so that the loss falls.
    start = torch.randint(3, VOCAB, (64, 1), generator=generator)
    ids = 3 + (start + torch.arange(SEQ_LEN) * torch.randint(1, 4, (64, 1), generator=generator)) % (VOCAB - 3)
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()}).with_format("torch")


class RecordingTrainer(Trainer):
    """Keeps the loss of every training step."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.step_losses = []

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.step_losses.append(loss.detach().clone())
        return loss


def make_trainer(model, data, tmp_path, **arguments) -> RecordingTrainer:
    settings = {
        "output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", "save_strategy": "no", "max_steps": STEPS,
        "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "learning_rate": 3e-3, "logging_steps": 1,
        "disable_tqdm": True, "seed": 0, "optim": "sgd", "max_grad_norm": 1.0, "lr_scheduler_type": "constant",
    }  # fmt: skip
    trainer = RecordingTrainer(
        model=model, args=TrainingArguments(**{**settings, **arguments}), train_dataset=data, eval_dataset=data.select(range(6))
    )
    return trainer


def train(model, data, tmp_path, **arguments):
    """Losses of all steps as logged, and the weights afterwards."""
    trainer = make_trainer(model, data, tmp_path, **arguments)
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == STEPS
    return trainer, torch.tensor(logged, dtype=torch.float64), {n: w.detach().clone() for n, w in model.named_parameters()}


@pytest.fixture(scope="module")
def plain_runs(data, tmp_path_factory):
    """The sdpa run for a number of accumulation steps; made once."""
    cache = {}

    def run(accumulation: int):
        if accumulation not in cache:
            model = make_model(tiny_llama(), "sdpa")
            cache[accumulation] = train(
                model, data, tmp_path_factory.mktemp("plain"), gradient_accumulation_steps=accumulation, learning_rate=0.1
            )
        return cache[accumulation]

    return run


CHECKPOINTING = {
    "off": {},
    "on": {"gradient_checkpointing": True},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "not_reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_losses_and_weights_equal_sdpa(data, tmp_path, plain_runs, checkpointing, accumulation):
    _, want, want_weights = plain_runs(accumulation)
    model = make_streamed(tiny_llama(), CHUNK)
    calls = []
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda module, args, out: calls.append(out.shape[1]))
    _, losses, weights = train(
        model, data, tmp_path, gradient_accumulation_steps=accumulation, learning_rate=0.1, **CHECKPOINTING[checkpointing]
    )
    assert (losses - want).abs().max() <= 1e-5
    assert want[-1] < want[0] - 0.05, "the reference run did not learn, so equal losses prove little"
    assert_gradients_close(weights, want_weights, 1e-4)
    # Once in the forward and once in the backward, with and without checkpointing.
    assert len(calls) == STEPS * accumulation * CHUNKS * 2
    assert max(calls) == CHUNK


def test_from_config_alone(data, tmp_path, plain_runs):
    """No call to hf_fpdt but its import: one chunk on this short sequence, and the same curve."""
    _, want, _ = plain_runs(1)
    _, losses, _ = train(make_model(tiny_llama(), "fpdt"), data, tmp_path, learning_rate=0.1)
    assert (losses - want).abs().max() <= 1e-5


def test_evaluation_loss_equals(data, tmp_path):
    results = []
    for model in (make_model(tiny_llama(), "sdpa"), make_streamed(tiny_llama(), CHUNK)):
        lengths = []
        model.model.layers[0].self_attn.q_proj.register_forward_hook(
            lambda m, args, out, seen=lengths: seen.append(out.shape[1])
        )
        results.append((make_trainer(model, data, tmp_path, prediction_loss_only=True).evaluate()["eval_loss"], max(lengths)))
    (want, plain_length), (got, streamed_length) = results
    assert abs(got - want) <= 1e-5
    assert (plain_length, streamed_length) == (SEQ_LEN, CHUNK)


def test_predictions_equal(data, tmp_path):
    """Without prediction_loss_only Trainer gathers the logits: they are computed after all, and are right."""
    outputs = [
        make_trainer(model, data, tmp_path).predict(data.select(range(4)))
        for model in (make_model(tiny_llama(), "sdpa"), make_streamed(tiny_llama(), CHUNK))
    ]
    want, got = (torch.tensor(output.predictions) for output in outputs)
    assert got.shape == (4, SEQ_LEN, VOCAB)
    assert difference(got, want) <= 1e-5
    assert abs(outputs[0].metrics["test_loss"] - outputs[1].metrics["test_loss"]) <= 1e-5


def test_label_smoothing_uses_plain_logits(data, tmp_path):
    runs = [
        train(model, data, tmp_path, label_smoothing_factor=0.1, learning_rate=0.1)
        for model in (make_model(tiny_llama(), "sdpa"), make_streamed(tiny_llama(), CHUNK))
    ]
    assert (runs[1][1] - runs[0][1]).abs().max() <= 1e-5
    unsmoothed = train(make_model(tiny_llama(), "sdpa"), data, tmp_path, learning_rate=0.1)[1]
    assert (runs[1][1] - unsmoothed).abs().max() > 1e-2


@pytest.mark.parametrize("checkpointing", ["off", "on"])
def test_bf16_autocast_stays_close(data, tmp_path, plain_runs, checkpointing):
    """Autocast also holds in the backward's second run of every chunk."""
    _, exact, _ = plain_runs(1)
    _, want, _ = train(make_model(tiny_llama(), "sdpa"), data, tmp_path, bf16=True, learning_rate=0.1)
    dtypes = []
    model = make_streamed(tiny_llama(), CHUNK)
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda module, args, out: dtypes.append(out.dtype))
    _, losses, weights = train(model, data, tmp_path, bf16=True, learning_rate=0.1, **CHECKPOINTING[checkpointing])
    assert set(dtypes) == {torch.bfloat16}
    assert len(dtypes) == STEPS * CHUNKS * 2
    assert all(weight.dtype == torch.float32 for weight in weights.values())
    # No further from the fp32 run than sdpa's autocast is, with room for luck in 10 numbers.
    assert (want - exact).abs().mean() > 0
    assert (losses - exact).abs().mean() <= max(1.5 * (want - exact).abs().mean(), 1e-3)
    assert (losses - want).abs().max() <= 2e-2


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
def test_lora_with_frozen_base(data, tmp_path, checkpointing):
    """The first layer's input needs no gradient; nobody calls enable_input_require_grads."""
    peft = pytest.importorskip("peft")

    def lora(model):
        torch.manual_seed(1)
        return peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "up_proj"]))

    _, want, want_weights = train(lora(make_model(tiny_llama(), "sdpa")), data, tmp_path, learning_rate=0.3)
    model = apply_fpdt(lora(make_model(tiny_llama(), "fpdt")), FPDTConfig(chunk_size=CHUNK))
    _, losses, weights = train(model, data, tmp_path, learning_rate=0.3, **CHECKPOINTING[checkpointing])
    assert (losses - want).abs().max() <= 1e-5
    assert want[-1] < want[0]
    assert_gradients_close(weights, want_weights, 1e-4, may_be_zero=("bias",))
    moved = [name for name, w in weights.items() if "lora_B" in name and w.any()]
    assert len(moved) == 2 * 3


def test_save_and_reload(data, tmp_path):
    model = make_streamed(tiny_llama(), CHUNK)
    trainer, _, weights = train(model, data, tmp_path, learning_rate=0.1)
    trainer.save_model(str(tmp_path / "saved"))
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", attn_implementation="sdpa")
    assert_gradients_close({n: w.detach() for n, w in reloaded.named_parameters()}, weights, 0.0)


def test_checkpoint_and_resume(data, tmp_path):
    """A run cut in two continues with the losses of the run in one piece."""
    _, whole, _ = train(make_streamed(tiny_llama(), CHUNK), data, tmp_path / "whole", learning_rate=0.1)
    first = make_trainer(
        make_streamed(tiny_llama(), CHUNK), data, tmp_path / "cut", learning_rate=0.1, save_strategy="steps", save_steps=5
    )
    first.train()
    second = make_trainer(make_streamed(tiny_llama(), CHUNK, seed=9), data, tmp_path / "cut", learning_rate=0.1)
    second.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-5"))
    losses = [entry["loss"] for entry in second.state.log_history if "loss" in entry]
    assert (torch.tensor(losses, dtype=torch.float64) - whole).abs().max() <= 1e-5


def test_models_are_not_shared_between_runs():
    """Guards the helpers above: two models of one config have the same weights and are two models."""
    config = tiny_llama()
    one, two = make_model(config), make_model(config)
    assert_gradients_close(dict(one.state_dict()), copy.deepcopy(dict(two.state_dict())), 0.0)
    assert one.lm_head.weight is not two.lm_head.weight
