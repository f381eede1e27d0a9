"""
Long text for the examples: documents from a dataset, from files or from Python's standard library, a tokenizer, and documents
cut into pieces of one length. Every piece has exactly `seq_len` tokens, so that nothing is padded.
"""

import logging
import sysconfig
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from datasets import Dataset, Features, List, Value, load_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

logger = logging.getLogger(__name__)

SEQ_LEN = {"cpu": 8192, "cuda": 131072}
ENOUGH_PIECES = 16  # fewer of the default text, and its documents are joined
TOKENIZER_DOCUMENTS, TOKENIZER_CHARACTERS = 256, 16384  # text that a new tokenizer is trained on: so much of so many documents
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
LOADERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}  # any other file is one document of text


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


def load_tokenizer(name: str | None, vocab_size: int, documents: Dataset) -> PreTrainedTokenizerBase:
    """The tokenizer of that name, or a byte-level BPE of `vocab_size` tokens trained on the documents."""
    if name:
        return AutoTokenizer.from_pretrained(name)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + 2:
        raise ValueError(f"--vocab_size {vocab_size}: at least {len(alphabet) + 2} are needed, one for every byte.")
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    stride = -(-len(documents) // TOKENIZER_DOCUMENTS)
    samples = (documents[i]["text"][:TOKENIZER_CHARACTERS] for i in range(0, len(documents), stride))
    tokenizer.train_from_iterator(samples, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS)


def make_pieces(documents: Dataset, tokenizer: PreTrainedTokenizerBase, data_args: DataArguments) -> Dataset:
    """`input_ids` of exactly `seq_len` tokens a row. What is shorter is dropped."""

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
