"""
Finetunes a causal language model on long text with the ordinary `Trainer`, streamed by hf_fpdt.

A small Llama on the longest files of Python's standard library, the same again with PyTorch's attention, and a plot of both:

    python examples/finetune_long_context.py --output_dir outputs/demo --compare_with sdpa

A checkpoint on your own text, documents of 131,072 tokens, on every GPU of this machine:

    accelerate launch examples/finetune_long_context.py --output_dir outputs/mine \
        --model_name_or_path path/to/checkpoint --train_file books.jsonl --seq_len 131072

Without a GPU the defaults are a smaller model and sequences of 8,192 tokens. `--help` lists every argument, among them all
of `TrainingArguments`; more command lines are in examples/README.md.
"""

import copy
import gc
import json
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from long_text import SEQ_LEN, DataArguments, load_documents, load_tokenizer, make_pieces, split_pieces
from training_record import Run, check_learned, report
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    HfArgumentParser,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

import hf_fpdt

logger = logging.getLogger(__name__)

# Defaults by device. Sizes that a model type does not have (GPT-NeoX: num_key_value_heads) are left out for it.
MAX_DOCUMENTS = {"cpu": 64, "cuda": None}
SIZES = {
    "cpu": {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "cuda": {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
}
LEARNING_RATE = {"cpu": 4e-3, "cuda": 1e-3}  # of a new model
LEARNING_RATE_CHECKPOINT = 2e-5
MAX_STEPS = 24
ROPE_KEPT = ("rope_theta", "partial_rotary_factor")


@dataclass
class ModelArguments:
    """Which model, and how its attention runs."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Checkpoint to finetune. Not given: a new model of --model_type."}
    )
    model_type: str = field(
        default="llama", metadata={"help": "Type of a new model: llama, gpt_neox, qwen3 or any other that AutoConfig knows."}
    )
    config_overrides: str | None = field(
        default=None,
        metadata={"help": 'Settings of the model\'s config: "hidden_size=256,num_hidden_layers=4", or a JSON object.'},
    )
    tokenizer_name: str | None = field(
        default=None,
        metadata={"help": "Tokenizer. Not given: the checkpoint's, or for a new model one that is trained on the text."},
    )
    vocab_size: int = field(default=4096, metadata={"help": "Vocabulary of a tokenizer that is trained on the text."})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto",
        metadata={
            "help": "Dtype of the weights. auto: the checkpoint's, float32 for a new model (see --bf16 for the compute)."
        },
    )
    attn_implementation: str = field(
        default="fpdt", metadata={"help": "fpdt, or one of transformers' own: sdpa, eager, flash_attention_2, ..."}
    )
    chunk_size: str | None = field(
        default=None, metadata={"help": "Only for fpdt: tokens of one chunk, or auto (FPDTConfig.chunk_size)."}
    )
    kernel: str | None = field(default=None, metadata={"help": "Only for fpdt: attention kernel, or auto (FPDTConfig.kernel)."})


@dataclass
class LongContextTrainingArguments(TrainingArguments):
    """`TrainingArguments` with other defaults and a few arguments for the end of the run."""

    output_dir: str = field(default="outputs/finetune", metadata={"help": "Directory for everything that is written."})
    per_device_train_batch_size: int = field(default=1, metadata={"help": "Sequences a device and step."})
    per_device_eval_batch_size: int = field(default=1, metadata={"help": "Sequences a device and evaluation step."})
    max_steps: int | None = field(
        default=None,
        metadata={"help": f"Optimizer steps. Not given: --num_train_epochs if that is given, else {MAX_STEPS}."},
    )
    num_train_epochs: float | None = field(default=None, metadata={"help": "Passes over the text, if not --max_steps."})
    learning_rate: float | None = field(
        default=None,
        metadata={
            "help": f"Peak learning rate. Not given: {LEARNING_RATE_CHECKPOINT} for a checkpoint, for a new model "
            f"{LEARNING_RATE['cuda']} on a GPU and {LEARNING_RATE['cpu']} on a CPU."
        },
    )
    warmup_steps: float = field(default=3, metadata={"help": "Steps in which the learning rate rises, or a part below 1."})
    bf16: bool | None = field(
        default=None,
        metadata={"help": "Compute in bfloat16. Not given: on a GPU that can, without --fp16.", "nargs": "?", "const": True},
    )
    dataloader_pin_memory: bool = field(
        default=torch.cuda.is_available(),
        metadata={"help": "Load batches into page-locked memory. Default: if there is a GPU."},
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Search for weights without a gradient on every step; needed if there can be some."}
    )
    logging_steps: float = field(default=1, metadata={"help": "Steps between two logged losses."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide losses that are not finite."})
    save_strategy: str = field(default="no", metadata={"help": "When to save checkpoints: no, steps, epoch or best."})
    prediction_loss_only: bool = field(default=True, metadata={"help": "Evaluate the loss alone, without the logits."})
    save_final: bool = field(default=True, metadata={"help": "Save the model and the tokenizer at the end."})
    compare_with: str | None = field(
        default=None,
        metadata={"help": "Train once more with this attn_implementation, and plot both losses to output_dir/loss.png."},
    )

    def __post_init__(self):
        if self.max_steps is None:
            self.max_steps = MAX_STEPS if self.num_train_epochs is None else -1
        if self.num_train_epochs is None:
            self.num_train_epochs = 3.0
        if self.bf16 is None:
            on_gpu = torch.cuda.is_available() and not self.use_cpu
            self.bf16 = on_gpu and torch.cuda.is_bf16_supported() and not self.fp16
        super().__post_init__()


def main() -> None:
    parser = HfArgumentParser((ModelArguments, DataArguments, LongContextTrainingArguments))
    model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    logging.basicConfig(format="%(message)s")
    for name in (__name__, "long_text", "hf_fpdt"):
        logging.getLogger(name).setLevel(logging.INFO if training_args.should_log else logging.ERROR)
    resolve_defaults(model_args, data_args, training_args)
    with training_args.main_process_first(desc="preparing the data"):
        documents = load_documents(data_args)
        tokenizer = load_tokenizer(model_args.tokenizer_name or model_args.model_name_or_path, model_args.vocab_size, documents)
        data = split_pieces(make_pieces(documents, tokenizer, data_args), data_args)

    run = Run(model_args.attn_implementation)
    train(run, model_args, data_args, training_args, tokenizer, data)
    runs = [run]
    if training_args.compare_with:
        runs.append(train_comparison(model_args, data_args, training_args, tokenizer, data))
    if training_args.process_index == 0:
        report(runs, data_args.seq_len, Path(training_args.output_dir))
    check_learned(run)


def resolve_defaults(model_args: ModelArguments, data_args: DataArguments, training_args: LongContextTrainingArguments) -> None:
    """Fills in what depends on the device or on other arguments, and refuses what cannot be."""
    device = "cuda" if training_args.device.type == "cuda" else "cpu"
    if training_args.compare_with == model_args.attn_implementation:
        raise ValueError(
            f"--compare_with {training_args.compare_with}: the training run itself uses that attn_implementation. Give "
            "another one, such as sdpa."
        )
    if training_args.compare_with and training_args.resume_from_checkpoint:
        raise ValueError("--compare_with trains from the start; it cannot be used with --resume_from_checkpoint. Drop one.")
    if data_args.dataset_name and data_args.train_file:
        raise ValueError("--dataset_name and --train_file were both given; one of them is needed.")
    fpdt_config(model_args)  # refuses wrong settings before the text is read
    if data_args.seq_len is None:
        data_args.seq_len = SEQ_LEN[device]
    if data_args.seq_len < 2 or data_args.eval_pieces < 0:
        raise ValueError(f"--seq_len {data_args.seq_len} --eval_pieces {data_args.eval_pieces}: at least 2 and 0 are needed.")
    if data_args.max_documents is None and not (data_args.dataset_name or data_args.train_file):
        data_args.max_documents = MAX_DOCUMENTS[device]
    if training_args.learning_rate is None:
        new = model_args.model_name_or_path is None
        training_args.learning_rate = LEARNING_RATE[device] if new else LEARNING_RATE_CHECKPOINT


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Rows of one length to a batch; every token is a label, and without padding there is no attention mask."""
    input_ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": input_ids, "labels": input_ids.clone()}


def load_model(
    implementation: str, model_args: ModelArguments, tokenizer: PreTrainedTokenizerBase, seq_len: int, device: str
) -> PreTrainedModel:
    dtype = {} if model_args.dtype == "auto" else {"dtype": model_args.dtype}
    if model_args.model_name_or_path is None:
        config = new_config(model_args, tokenizer, seq_len, device)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation, **dtype)
    else:
        config = AutoConfig.from_pretrained(model_args.model_name_or_path)
        for name, value in parse_overrides(model_args.config_overrides, config).items():
            if name == "rope_parameters":  # what the checkpoint was trained with stays, where it is not named
                value = {key: config.rope_parameters[key] for key in ROPE_KEPT if key in config.rope_parameters} | value
            setattr(config, name, value)
        model = AutoModelForCausalLM.from_pretrained(
            model_args.model_name_or_path, config=config, attn_implementation=implementation, **{"dtype": "auto"} | dtype
        )
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(tokenizer))
    positions = getattr(config, "max_position_embeddings", None) or seq_len
    if positions < seq_len:
        logger.warning(f"--seq_len {seq_len}: the model was made for {positions} positions (max_position_embeddings).")
    if implementation == "fpdt" and (model_args.chunk_size or model_args.kernel):
        hf_fpdt.apply_fpdt(model, fpdt_config(model_args))
    return model


def fpdt_config(model_args: ModelArguments) -> hf_fpdt.FPDTConfig:
    size = model_args.chunk_size or "auto"
    size = int(size) if size.lstrip("-").isdecimal() else size
    return hf_fpdt.FPDTConfig(chunk_size=size, kernel=model_args.kernel or "auto")


def new_config(model_args: ModelArguments, tokenizer: PreTrainedTokenizerBase, seq_len: int, device: str) -> PreTrainedConfig:
    known = AutoConfig.for_model(model_args.model_type)
    settings = {
        **SIZES[device],
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "max_position_embeddings": seq_len,
    }
    settings = {name: value for name, value in settings.items() if hasattr(known, name)}
    return AutoConfig.for_model(model_args.model_type, **settings | parse_overrides(model_args.config_overrides, known))


def parse_overrides(text: str | None, config: PreTrainedConfig) -> dict[str, Any]:
    """Settings from `"name=value,..."` or a JSON object. Values are JSON; what is no JSON is a string."""
    if not text:
        return {}
    if text.lstrip().startswith("{"):
        overrides = json.loads(text)
    else:
        pairs = [pair.partition("=") for pair in text.split(",")]
        overrides = {name.strip(): _json_or_text(value.strip()) for name, _, value in pairs}
    for name in overrides:
        if not hasattr(config, name):
            raise ValueError(
                f"--config_overrides {text}: {type(config).__name__} has no setting {name!r}. Needed is "
                '"name=value,name=value" with names of its settings.'
            )
    return overrides


def _json_or_text(value: str) -> Any:
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def train(
    run: Run,
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: LongContextTrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    data: tuple[Dataset, Dataset | None],
) -> None:
    """Makes the model, trains and evaluates it, and saves it if asked to. What happens is recorded in `run`."""
    logger.info(f"Training with attn_implementation={run.name!r}")
    gc.collect()
    if training_args.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    set_seed(training_args.seed)  # the same weights in both runs of a comparison
    model = load_model(run.name, model_args, tokenizer, data_args.seq_len, training_args.device.type)
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=data[0],
        eval_dataset=data[1],
        data_collator=collate,
        processing_class=tokenizer,
        callbacks=[run],
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    if training_args.device.type == "cuda":
        logged = [entry.get("fpdt/gpu_peak_gib", 0.0) for entry in trainer.state.log_history]  # each since the one before
        run.peak_gpu_gib = max(torch.cuda.max_memory_allocated() / 2**30, *logged)
    if data[1] is not None:
        trainer.evaluate()
    if training_args.save_final:
        trainer.save_model()


def train_comparison(
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: LongContextTrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    data: tuple[Dataset, Dataset | None],
) -> Run:
    """The same training with the other implementation. Running out of GPU memory is a result here."""
    training_args = copy.copy(training_args)
    training_args.output_dir = os.path.join(training_args.output_dir, training_args.compare_with)
    training_args.save_final = False
    run = Run(training_args.compare_with)
    try:
        train(run, model_args, data_args, training_args, tokenizer, data)
    except torch.OutOfMemoryError:
        run.error = "out of GPU memory"
        logger.warning(f"attn_implementation={run.name!r} ran out of GPU memory.")
    return run


if __name__ == "__main__":
    main()
