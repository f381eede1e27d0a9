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
import math
import os
import statistics
import sys
import sysconfig
import time
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset, Features, List, Value, load_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

import hf_fpdt

logger = logging.getLogger(__name__)

# Defaults by device. Sizes that a model type does not have (GPT-NeoX: num_key_value_heads) are left out for it.
SEQ_LEN = {"cpu": 8192, "cuda": 131072}
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
ENOUGH_PIECES = 16  # fewer of the default text, and its documents are joined

TOKENIZER_DOCUMENTS, TOKENIZER_CHARACTERS = 256, 16384  # text that a new tokenizer is trained on: so much of so many documents
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
LOADERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}  # any other file is one document of text


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
class DataArguments:
    """Which text, and how it is cut."""

    dataset_name: str | None = field(default=None, metadata={"help": "Dataset for datasets.load_dataset."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of --dataset_name."})
    dataset_split: str = field(default="train", metadata={"help": "Split of --dataset_name."})
    train_file: list[str] | None = field(
        default=None,
        metadata={
            "help": "Files with the text instead: .json, .jsonl, .parquet or .csv with one document a row; any other file is "
            "one document. Without --dataset_name and --train_file: the longest files of Python's standard library."
        },
    )
    text_column: str = field(default="text", metadata={"help": "Column that holds the text."})
    max_documents: int | None = field(default=None, metadata={"help": "Use only the first so many documents."})
    seq_len: int | None = field(
        default=None,
        metadata={"help": f"Tokens of a sequence. Not given: {SEQ_LEN['cuda']} on a GPU, {SEQ_LEN['cpu']} on a CPU."},
    )
    group: bool | None = field(
        default=None,
        metadata={
            "help": "Join the documents, with an end token after each, before cutting. Not given: only for the standard "
            "library, if too few of its files are as long as a sequence.",
            "nargs": "?",
            "const": True,
        },
    )
    eval_pieces: int = field(default=2, metadata={"help": "Sequences held out for the evaluation at the end; 0 for none."})


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


class Run(TrainerCallback):
    """What one training run recorded: the logged losses, and the seconds of every optimizer step."""

    def __init__(self, name: str):
        self.name = name
        self.steps: list[int] = []
        self.losses: list[float] = []
        self.eval_loss: float | None = None
        self.seconds: list[float] = []
        self.peak_gpu_gib: float | None = None
        self.error: str | None = None

    def on_step_begin(self, args, state, control, **kwargs):
        self._started = _now()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(_now() - self._started)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.steps.append(state.global_step)
            self.losses.append(logs["loss"])
        self.eval_loss = logs.get("eval_loss", self.eval_loss)

    @property
    def seconds_per_step(self) -> float | None:
        """Median, so that neither the first step, which chooses kernels, nor a saved checkpoint counts."""
        return statistics.median(self.seconds) if self.seconds else None

    def as_dict(self) -> dict[str, Any]:
        names = ("steps", "losses", "eval_loss", "seconds_per_step", "peak_gpu_gib", "error")
        return {name: getattr(self, name) for name in names}


def main() -> None:
    parser = HfArgumentParser((ModelArguments, DataArguments, LongContextTrainingArguments))
    model_args, data_args, training_args = parser.parse_args_into_dataclasses()
    logging.basicConfig(format="%(message)s")
    for name in (__name__, "hf_fpdt"):
        logging.getLogger(name).setLevel(logging.INFO if training_args.should_log else logging.ERROR)
    resolve_defaults(model_args, data_args, training_args)
    with training_args.main_process_first(desc="preparing the data"):
        documents = load_documents(data_args)
        tokenizer = load_tokenizer(model_args, documents)
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


# ---- text ----------------------------------------------------------------------------------------------------------------


def load_documents(data_args: DataArguments) -> Dataset:
    """The documents, one a row, in a single column `"text"`."""
    if data_args.dataset_name:
        documents = load_dataset(data_args.dataset_name, data_args.dataset_config_name, split=data_args.dataset_split)
    elif data_args.train_file:
        documents = load_files(data_args.train_file)
    else:
        documents = Dataset.from_dict({data_args.text_column: standard_library(data_args.max_documents)})
    if data_args.text_column not in documents.column_names:
        raise ValueError(
            f"--text_column {data_args.text_column}: the data has no such column, only {', '.join(documents.column_names)}. "
            "Give the one that holds the text."
        )
    if data_args.max_documents is not None:
        documents = documents.select(range(min(data_args.max_documents, len(documents))))
    documents = documents.select_columns(data_args.text_column)
    return documents if data_args.text_column == "text" else documents.rename_column(data_args.text_column, "text")


def load_files(files: list[str]) -> Dataset:
    """The rows of tables, or whole files of text."""
    loaders = {LOADERS.get(Path(file).suffix, "text") for file in files}
    if len(loaders) > 1:
        raise ValueError(f"--train_file got files of several formats ({', '.join(sorted(loaders))}); give files of one format.")
    (loader,) = loaders
    options = {"sample_by": "document"} if loader == "text" else {}
    return load_dataset(loader, data_files=files, split="train", **options)


def standard_library(limit: int | None) -> list[str]:
    """The Python files of the standard library, code and documentation, longest first."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "__pycache__"}
    files = [path for path in root.rglob("*.py") if not skipped & set(path.relative_to(root).parts)]
    files.sort(key=lambda path: (-path.stat().st_size, path.relative_to(root).as_posix()))
    return [path.read_text(encoding="utf-8", errors="replace") for path in files[:limit]]


def load_tokenizer(model_args: ModelArguments, documents: Dataset) -> PreTrainedTokenizerBase:
    name = model_args.tokenizer_name or model_args.model_name_or_path
    if name:
        return AutoTokenizer.from_pretrained(name)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if model_args.vocab_size < len(alphabet) + 2:
        raise ValueError(f"--vocab_size {model_args.vocab_size}: at least {len(alphabet) + 2} are needed, one for every byte.")
    trainer = trainers.BpeTrainer(
        vocab_size=model_args.vocab_size, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    stride = -(-len(documents) // TOKENIZER_DOCUMENTS)
    samples = (documents[i]["text"][:TOKENIZER_CHARACTERS] for i in range(0, len(documents), stride))
    tokenizer.train_from_iterator(samples, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS)


def make_pieces(documents: Dataset, tokenizer: PreTrainedTokenizerBase, data_args: DataArguments) -> Dataset:
    """`input_ids` of exactly `seq_len` tokens a row. fpdt takes neither padding nor packing: what is shorter is dropped."""

    def tokenize(batch):
        ids = tokenizer(batch["text"], return_attention_mask=False)["input_ids"]
        return {"input_ids": ids, "num_tokens": [len(x) for x in ids]}

    tokenized = documents.map(tokenize, batched=True, remove_columns="text", desc="Tokenizing")
    lengths, group = tokenized["num_tokens"], data_args.group
    if group is None:
        default_text = not (data_args.dataset_name or data_args.train_file)
        group = default_text and sum(n // data_args.seq_len for n in lengths) < ENOUGH_PIECES + data_args.eval_pieces
    longest = sum(lengths) if group else max(lengths, default=0)
    if longest < data_args.seq_len:
        raise ValueError(
            f"--seq_len {data_args.seq_len}: no document is that long. The longest of {len(lengths)} has "
            f"{max(lengths, default=0)} tokens, all together {sum(lengths)}. Lower --seq_len, or join documents with --group."
        )
    pieces = cut(tokenized, tokenizer, data_args.seq_len, group)
    left = sum(lengths) + len(lengths) * group - len(pieces) * data_args.seq_len
    short = sum(n < data_args.seq_len for n in lengths)
    what = "the ends that fill no piece" if group else f"{short} documents shorter than a piece and the ends of the others"
    logger.info(
        f"{len(lengths)} documents{' joined' * group}, {sum(lengths):,} tokens: {len(pieces)} pieces of {data_args.seq_len:,} "
        f"tokens. Dropped: {what}, {left:,} tokens."
    )
    return pieces


def cut(tokenized: Dataset, tokenizer: PreTrainedTokenizerBase, seq_len: int, group: bool) -> Dataset:
    end = tokenizer.eos_token_id
    if group and end is None:
        raise ValueError("--group needs a tokenizer with an end token (eos_token); this one has none. Give --group false.")

    def pieces_of(batch):
        rows = [list(chain.from_iterable([*ids, end] for ids in batch["input_ids"]))] if group else batch["input_ids"]
        return {"input_ids": [ids[i : i + seq_len] for ids in rows for i in range(0, len(ids) - seq_len + 1, seq_len)]}

    features = Features({"input_ids": List(Value("int32"))})
    return tokenized.map(pieces_of, batched=True, remove_columns=tokenized.column_names, features=features, desc="Cutting")


def split_pieces(pieces: Dataset, data_args: DataArguments) -> tuple[Dataset, Dataset | None]:
    """Pieces to train on, and the last ones, held out."""
    held_out = data_args.eval_pieces
    if len(pieces) <= held_out:
        raise ValueError(
            f"The text makes {len(pieces)} pieces of {data_args.seq_len} tokens and --eval_pieces holds out {held_out}; at "
            "least one must be left to train on. Lower --eval_pieces or --seq_len, or give more text."
        )
    count = len(pieces) - held_out
    return pieces.select(range(count)), pieces.select(range(count, len(pieces))) if held_out else None


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Rows of one length to a batch; every token is a label, and without padding there is no attention mask."""
    input_ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": input_ids, "labels": input_ids.clone()}


# ---- model ---------------------------------------------------------------------------------------------------------------


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


# ---- training ------------------------------------------------------------------------------------------------------------


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
        run.peak_gpu_gib = torch.cuda.max_memory_allocated() / 2**30
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


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


# ---- results -------------------------------------------------------------------------------------------------------------


def report(runs: list[Run], seq_len: int, directory: Path) -> None:
    """Writes losses.json, prints the closing table, and plots two runs."""
    directory.mkdir(parents=True, exist_ok=True)
    differences = loss_differences(*runs) if len(runs) == 2 else {}
    largest = max(differences.values(), default=None)
    result = {"seq_len": seq_len, "runs": {run.name: run.as_dict() for run in runs}, "largest_difference": largest}
    (directory / "losses.json").write_text(json.dumps(result, indent=2) + "\n")
    print_table(runs, largest)
    if len(runs) == 2:
        plot(runs, differences, seq_len, directory / "loss.png")
        print(f"plot: {directory / 'loss.png'}")


def loss_differences(run: Run, other: Run) -> dict[int, float]:
    """Absolute difference of the losses by step, for the steps that both runs reached."""
    losses = dict(zip(other.steps, other.losses, strict=True))
    return {step: abs(loss - losses[step]) for step, loss in zip(run.steps, run.losses, strict=True) if step in losses}


def print_table(runs: list[Run], largest: float | None) -> None:
    rows = {
        "first loss": [_format(run.losses[:1], ".4f") for run in runs],
        "last loss": [_format(run.losses[-1:], ".4f") for run in runs],
        "evaluation loss": [_format([run.eval_loss], ".4f") for run in runs],
        "seconds per step": [_format([run.seconds_per_step], ".2f") for run in runs],
        "peak GPU memory (GiB)": [_format([run.peak_gpu_gib], ".2f") for run in runs],
        "stopped by": [run.error or "-" for run in runs],
    }
    print("\n" + f"{'':<24}" + "".join(f"{run.name:>20}" for run in runs))
    for label, values in rows.items():
        if any(value != "-" for value in values):
            print(f"{label:<24}" + "".join(f"{value:>20}" for value in values))
    if largest is not None:
        print(f"{'largest difference':<24}{largest:>20.1e}")


def _format(values: list[float | None], spec: str) -> str:
    return format(values[0], spec) if values and values[0] is not None else "-"


def plot(runs: list[Run], differences: dict[int, float], seq_len: int, path: Path) -> None:
    """Both loss curves and, below, their absolute difference."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (top, bottom) = pyplot.subplots(2, 1, sharex=True, figsize=(8, 6), height_ratios=(3, 2), layout="constrained")
    for run, style in zip(runs, ("-", "--"), strict=True):
        label = f"{run.name} ({run.error})" if run.error else run.name
        top.plot(run.steps, run.losses, style, marker="." if len(run.steps) < 50 else None, label=label)
    top.set(ylabel="training loss", title=f"Finetuning on sequences of {seq_len:,} tokens")
    bottom.set(xlabel="optimizer step", ylabel="absolute difference")
    bottom.xaxis.get_major_locator().set_params(integer=True)
    if differences:
        bottom.plot(list(differences), list(differences.values()), color="tab:red", marker=".", linewidth=1)
        bottom.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        bottom.set_ylim(bottom=0)
    else:
        bottom.set_yticks([])
        bottom.text(0.5, 0.5, "no step that both runs reached", transform=bottom.transAxes, ha="center")
    top.legend()
    for axis in (top, bottom):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def check_learned(run: Run) -> None:
    """Ends the program with an error if the losses are not finite, or the last quarter is not below the first."""
    if not all(math.isfinite(loss) for loss in run.losses):
        step = next(step for step, loss in zip(run.steps, run.losses, strict=True) if not math.isfinite(loss))
        sys.exit(f"The loss of {run.name} is not finite at step {step}. Lower --learning_rate.")
    quarter = max(1, len(run.losses) // 4)
    if len(run.losses) > 1:
        first, last = statistics.mean(run.losses[:quarter]), statistics.mean(run.losses[-quarter:])
        if last >= first:
            sys.exit(f"The loss of {run.name} did not fall: {first:.4f} at the start, {last:.4f} at the end.")


if __name__ == "__main__":
    main()
