"""
TRL's SFTTrainer and DPOTrainer, unmodified: the losses of twenty and of five steps are those of "sdpa". A failure means a
finetuning run that learns something else under "fpdt", in one of the ways in which TRL makes batches and losses.
"""

import os
from pathlib import Path

import pytest
import torch
import transformers
from reference import make_model, tiny_llama
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hf_fpdt import FPDTConfig, apply_fpdt, streamed_pass

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
peft = pytest.importorskip("peft")
TEMPLATE = (
    "{% for m in messages %}{{ '<s>' + m['role'] + ':' }}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] + '</s>' }}{% endgeneration %}{% else %}{{ m['content'] + '</s>' }}{% endif %}{% endfor %}"
)
STEPS = 20
CASES = {
    "texts": ("text", {}),
    "packed": ("text", {"packing": True}),
    "packed and cut": ("text", {"packing": True, "packing_strategy": "wrapped"}),
    "without padding": ("text", {"padding_free": True, "max_length": None}),
    "assistant only": ("messages", {"assistant_only_loss": True}),
    "LoRA, packed": ("text", {"packing": True, "lora": True}),
    "LoRA, assistant only, packed": ("messages", {"assistant_only_loss": True, "packing": True, "lora": True}),
    "loss in chunks": ("text", {"loss_type": "chunked_nll"}),
    "plain loss": ("text", {"loss_type": "nll"}),
    "another loss": ("text", {"loss_type": "dft"}),
    "accumulated and checkpointed": ("text", {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}),
}


@pytest.fixture(scope="module")
def texts():
    """The beginnings of modules of Python's library."""
    files = sorted(Path(os.__file__).parent.glob("*.py"))[:60]
    return [path.read_text(errors="ignore")[:650] for path in files]


@pytest.fixture(scope="module")
def tokenizer(texts):
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=alphabet)
    made.train_from_iterator(texts, trainer)
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=TEMPLATE, **names)


def rows(kind: str, texts: list[str]):
    if kind == "text":
        return datasets.Dataset.from_dict({"text": texts})
    parts = (("user", 0, 150), ("assistant", 150, 400), ("user", 400, 450), ("assistant", 450, 600))
    return datasets.Dataset.from_list(
        [{"messages": [{"role": role, "content": text[start:stop]} for role, start, stop in parts]} for text in texts]
    )


def losses(implementation: str, data, tokenizer, folder: Path, lora: bool = False, **options) -> list[float]:
    transformers.set_seed(0)
    model = make_model(tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=1024), implementation)
    common = {
        "max_steps": STEPS, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "report_to": "none", "logging_steps": 1,
        "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "max_length": 200, "bf16": False,
        "gradient_checkpointing": False,
    }  # fmt: skip
    settings = trl.SFTConfig(str(folder), **(common | options))
    adapter = peft.LoraConfig(r=4, target_modules="all-linear") if lora else None
    trainer = trl.SFTTrainer(model, settings, train_dataset=data, processing_class=tokenizer, peft_config=adapter)
    if implementation == "fpdt":
        apply_fpdt(trainer.model, FPDTConfig(chunk_size=70))
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("case", CASES)
def test_losses_are_those_of_sdpa(case, texts, tokenizer, tmp_path, monkeypatch):
    kind, options = CASES[case]
    data, chunks, stream = rows(kind, texts), [], streamed_pass.stream_layer

    def counted(call, *args):
        chunks.append(len(call.spans))
        return stream(call, *args)

    want = losses("sdpa", data, tokenizer, tmp_path, **options)
    monkeypatch.setattr(streamed_pass, "stream_layer", counted)
    got = losses("fpdt", data, tokenizer, tmp_path, **options)
    assert len(got) == len(want) == STEPS
    assert got == pytest.approx(want, rel=1e-5)
    assert abs(want[-1] - want[0]) > 0.01 * want[0]  # something was learnt
    layers, batches = 2, STEPS * options.get("gradient_accumulation_steps", 1)
    assert len(chunks) == layers * batches
    assert max(chunks) >= 2
    assert all(torch.isfinite(torch.tensor(got)))


def _no_logits(head, args):
    raise AssertionError("the logits of a whole sequence")


def preferences(implementation: str, texts, tokenizer, folder: Path, lora: bool, **options):
    """Loss and gradient norm of five steps of DPO; rejected answers are shorter than chosen ones, by ever other lengths."""
    transformers.set_seed(0)
    answers = [(text[:120], text[120:250], text[250 : 280 + 5 * (index % 20)]) for index, text in enumerate(texts)]
    data = datasets.Dataset.from_list([dict(zip(("prompt", "chosen", "rejected"), parts, strict=True)) for parts in answers])
    config = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=1024)
    model, start = (make_model(config, implementation) for _ in range(2))
    for each in (model, start) if implementation == "fpdt" else ():
        apply_fpdt(each, FPDTConfig(chunk_size=25))
        each.get_output_embeddings().register_forward_pre_hook(_no_logits)
    settings = trl.DPOConfig(
        str(folder), max_steps=5, per_device_train_batch_size=2, learning_rate=2e-3, report_to="none", logging_steps=1,
        use_cpu=True, save_strategy="no", disable_tqdm=True, max_length=256, bf16=False, gradient_checkpointing=False,
        **options,
    )  # fmt: skip
    adapter = peft.LoraConfig(r=4, target_modules="all-linear") if lora else None
    trainer = trl.DPOTrainer(
        model, None if lora else start, args=settings, train_dataset=data, processing_class=tokenizer, peft_config=adapter
    )
    trainer.train()
    return [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("precomputed", [False, True])
@pytest.mark.parametrize("lora", [False, True])
def test_preferences_are_learnt_as_with_sdpa(lora, precomputed, texts, tokenizer, tmp_path, monkeypatch):
    """The reference is a model of its own, or the model without its adapter; computed in every step, or before them."""
    chunks, stream = [], streamed_pass.stream_layer

    def counted(call, *args):
        chunks.append(len(call.spans))
        return stream(call, *args)

    options = {"lora": lora, "precompute_ref_log_probs": precomputed}
    want = preferences("sdpa", texts, tokenizer, tmp_path, **options)
    monkeypatch.setattr(streamed_pass, "stream_layer", counted)
    got = preferences("fpdt", texts, tokenizer, tmp_path, **options)
    assert len(got) == len(want) == 5
    for step, values in enumerate(want):
        assert got[step] == pytest.approx(values, rel=1e-5), step
    assert want[0][0] != pytest.approx(want[-1][0], rel=0.01)
    assert len(chunks) >= 2 * 2 * 5
    assert max(chunks) >= 3
