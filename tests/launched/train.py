"""
A Trainer script like any other; `test_launched.py` starts it under `accelerate launch`. It does not know of hf_fpdt, and writes
down how many tokens its model was given and what its weights were.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, HfArgumentParser, Trainer, TrainingArguments


@dataclass
class Arguments:
    model: str = field(metadata={"help": "A folder with a checkpoint."})
    attn_implementation: str | None = None
    num_samples: int = 8
    seq_len: int = 46
    fsdp_size: int = field(default=0, metadata={"help": "Processes over which transformers itself shards the weights."})
    lora: str = field(default="", metadata={"help": "Arguments of PEFT's LoraConfig, in JSON: only this adapter is trained."})


class Tokens(Dataset):
    """Sample i: random tokens; its first third or its last tokens only have labels, or all."""

    def __init__(self, num_samples: int, seq_len: int, vocab_size: int):
        generator = torch.Generator().manual_seed(7)
        self.ids = torch.randint(3, vocab_size, (num_samples, seq_len), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        ids = self.ids[index]
        labels = ids.clone()
        if index % 3 == 1:
            labels[len(labels) // 3 :] = -100
        if index % 3 == 2:
            labels[:-5] = -100
        return {"input_ids": ids.tolist(), "labels": labels.tolist()}


def hits(predictions) -> dict[str, int]:
    """How many tokens are predicted right."""
    found, labels = predictions.predictions[:, :-1].argmax(-1), predictions.label_ids[:, 1:]
    return {"hits": int(((found == labels) & (labels != -100)).sum())}


def with_lora(model: nn.Module, arguments: str) -> nn.Module:
    """The adapter starts where it changes what the model computes: PEFT's own start is zero."""
    import peft

    torch.manual_seed(0)
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **json.loads(arguments)))
    generator = torch.Generator().manual_seed(3)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data = 0.2 * torch.randn(weight.shape, generator=generator)
    return model


def main():
    training, arguments = HfArgumentParser((TrainingArguments, Arguments)).parse_args_into_dataclasses()
    more = {}
    if arguments.fsdp_size:
        from transformers.distributed import DistributedConfig

        more = {"distributed_config": DistributedConfig(fsdp_size=arguments.fsdp_size)}
    model = AutoModelForCausalLM.from_pretrained(
        arguments.model, dtype=torch.float32, attn_implementation=arguments.attn_implementation, **more
    )
    if arguments.lora:
        model = with_lora(model, arguments.lora)
    dataset = Tokens(arguments.num_samples, arguments.seq_len, AutoConfig.from_pretrained(arguments.model).vocab_size)
    seen = {}

    def look(module, args, kwargs):
        seen["tokens"] = kwargs["input_ids"].shape[1]

    model.register_forward_pre_hook(look, with_kwargs=True)
    trainer = Trainer(model, training, train_dataset=dataset, eval_dataset=dataset, compute_metrics=hits)
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    seen["weights"] = type(next(trainer.model.parameters()).data).__name__
    if training.do_predict:
        trainer.evaluate()
        seen["predicted"] = trainer.predict(dataset).metrics
    trainer.save_model(training.output_dir)
    if trainer.is_world_process_zero():
        Path(training.output_dir, "log.json").write_text(json.dumps([*trainer.state.log_history, seen]))


if __name__ == "__main__":
    main()
