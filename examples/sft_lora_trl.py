"""
Supervised finetuning with TRL and LoRA on long conversations or documents: an ordinary SFTTrainer script in which
`attn_implementation="fpdt"` is the only unusual line.

    python examples/sft_lora_trl.py --model_name_or_path path/to/model --train_file chats.jsonl --output_dir outputs/sft \
        --max_length 131072 --packing --bf16 true --assistant_only_loss

`--train_file` has a column `messages` (conversations), `prompt` and `completion`, or `text`. All of SFTConfig can be given.
"""

from dataclasses import dataclass, field

from datasets import load_dataset
from peft import LoraConfig
from transformers import HfArgumentParser
from trl import SFTConfig, SFTTrainer

import hf_fpdt  # noqa: F401  (makes "fpdt" an attention implementation)


@dataclass
class Arguments:
    model_name_or_path: str = field(metadata={"help": "Folder or name of the model."})
    train_file: str = field(metadata={"help": ".json, .jsonl or .parquet."})
    lora_rank: int = field(default=16, metadata={"help": "Rank of the adapters on all linear modules."})


def main() -> None:
    arguments, config = HfArgumentParser((Arguments, SFTConfig)).parse_args_into_dataclasses()
    config.model_init_kwargs = {"attn_implementation": "fpdt", "dtype": "bfloat16" if config.bf16 else "float32"}
    loader = "parquet" if arguments.train_file.endswith(".parquet") else "json"
    trainer = SFTTrainer(
        arguments.model_name_or_path,
        args=config,
        train_dataset=load_dataset(loader, data_files=arguments.train_file, split="train"),
        peft_config=LoraConfig(r=arguments.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    trainer.save_model()  # the adapter


if __name__ == "__main__":
    main()
