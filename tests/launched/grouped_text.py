"""
Continued pretraining with Trainer as most scripts do it: text is tokenized and joined, cut into blocks, evaluated by accuracy
and saved with its metrics. It does not know of hf_fpdt; `test_more_examples.py` starts it through `hf_fpdt.run`.
"""

import json
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from datasets import load_dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    default_data_collator,
)


@dataclass
class Arguments:
    model_name_or_path: str = field(metadata={"help": "Folder of the model and its tokenizer."})
    train_file: str = field(metadata={"help": "Text."})
    block_size: int = field(default=1024, metadata={"help": "Tokens of a sequence."})


def blocks(arguments: Arguments, tokenizer):
    """All lines, tokenized and joined, in rows of `block_size` tokens; the last fifth is for evaluation."""
    size, lines = arguments.block_size, load_dataset("text", data_files=arguments.train_file, split="train")
    tokens = lines.map(lambda rows: tokenizer(rows["text"]), batched=True, remove_columns=["text"])

    def grouped(rows):
        joined = {name: list(chain(*values)) for name, values in rows.items()}
        ends = range(size, len(joined["input_ids"]) + 1, size)
        cut = {name: [values[end - size : end] for end in ends] for name, values in joined.items()}
        return cut | {"labels": [list(ids) for ids in cut["input_ids"]]}

    return tokens.map(grouped, batched=True).train_test_split(0.2, shuffle=False)


def guesses(logits, labels):
    """The likeliest tokens are all that an evaluation keeps of the logits."""
    return logits.argmax(-1)


def accuracy(found) -> dict[str, float]:
    return {"accuracy": float((found.predictions[:, :-1] == found.label_ids[:, 1:]).mean())}


def main():
    arguments, training = HfArgumentParser((Arguments, TrainingArguments)).parse_args_into_dataclasses()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model_name_or_path)
    config = AutoConfig.from_pretrained(arguments.model_name_or_path)
    model = AutoModelForCausalLM.from_pretrained(arguments.model_name_or_path, config=config)
    data = blocks(arguments, tokenizer)
    trainer = Trainer(
        model,
        training,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=tokenizer,
        data_collator=default_data_collator,
        compute_metrics=accuracy,
        preprocess_logits_for_metrics=guesses,
    )
    done = trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()
    trainer.save_metrics("train", done.metrics)
    trainer.save_metrics("eval", trainer.evaluate())
    if trainer.is_world_process_zero():
        Path(training.output_dir, "log.json").write_text(json.dumps(trainer.state.log_history))


if __name__ == "__main__":
    main()
