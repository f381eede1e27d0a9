"""
The commands of the documentation, word for word: each names scripts, configurations and options that are there. The first ones
that a newcomer gives are run, by a reader who has installed the package in an environment of their own: the demo, the plan,
which prints what the README shows, and the README's script as the README launches it. `test_more_examples.py` runs those of the
examples. A failure: the first thing that somebody copies does not work.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from documented import PAGES, ROOT, as_tried, command, commands
from reference import make_batch, make_model, tiny_llama
from started import run
from transformers import HfArgumentParser

from hf_fpdt.cli import _parser as plan_parser

LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072, "tie_word_embeddings": False,
}  # fmt: skip


def check_options(parser: argparse.ArgumentParser, words: list[str]) -> None:
    """Every option is one of the parser's, not an abbreviation, and every value is one that it takes."""
    for word in words:
        assert not word.startswith("--") or word in parser._option_string_actions, word
    parser.parse_args(words)


def check_script(words: list[str], monkeypatch) -> None:
    """`script.py --its --options`, or a module."""
    if words[0] == "-m":
        check_module(words[1], words[2:], monkeypatch)
    elif words[0].startswith("examples/"):
        assert (ROOT / words[0]).is_file()
        check_options(parser_of_example(Path(words[0]).stem, monkeypatch), words[1:])
    else:
        assert words[0] == "train.py"  # the reader's


def check_shell(words: list[str], monkeypatch) -> None:
    """`file.sh first second ... --options`: the options are those of the script that the file starts."""
    text = (ROOT / words[0]).read_text()
    subprocess.run(["bash", "-n", ROOT / words[0]], check=True)
    (config,) = re.findall(r"accelerate_configs/\w+\.yaml", text)
    assert (ROOT / config).is_file()
    taken = int(re.search(r"\$\{@:(\d)\}", text)[1])
    assert not any(word.startswith("--") for word in words[:taken])
    if script := re.search(r"^ *(examples/\w+\.py) ", text, flags=re.M):
        check_script([script[1], *words[taken:]], monkeypatch)
    else:
        assert "-m hf_fpdt.run" in text
        check_script(words[taken:], monkeypatch)


def check_module(name: str, words: list[str], monkeypatch) -> None:
    if name == "hf_fpdt.run":
        check_script(words, monkeypatch)
    elif name == "trl.scripts.sft":
        if words != ["..."]:
            check_options(pytest.importorskip(name).make_parser(), words)
    else:
        assert name == "package.module"


def parser_of_example(name: str, monkeypatch) -> argparse.ArgumentParser:
    """Without the dataclasses, which look for a GPU."""
    pytest.importorskip("datasets")
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    if name == "sft_lora_trl":
        trl = pytest.importorskip("trl")
        from sft_lora_trl import Arguments

        return HfArgumentParser((Arguments, trl.SFTConfig))
    if name == "accelerate_loop":
        import accelerate_loop

        found = []
        with monkeypatch.context() as patch:
            patch.setattr(argparse.ArgumentParser, "parse_args", lambda parser: found.append(parser))
            accelerate_loop.parse_arguments()
        return found[0]
    from finetune_long_context import DataArguments, LongContextTrainingArguments, ModelArguments

    return HfArgumentParser((ModelArguments, DataArguments, LongContextTrainingArguments))


def test_there_are_some():
    assert len(commands()) > 15
    assert {text.split(":")[0] for text in commands()} == set(PAGES)


@pytest.mark.parametrize("text", commands())
def test_a_command_is_one_that_can_be_given(text, monkeypatch):
    program, *words = commands()[text]
    if program == "hf-fpdt":
        plan_parser().parse_args(words)
    elif program == "bash":
        check_shell(words, monkeypatch)
    elif program == "python":
        check_script(words, monkeypatch)
    elif words != ["launch", "..."]:
        assert words[0] == "launch"
        launch = launch_command_parser().parse_args(words[1:])
        assert launch.config_file is None or (ROOT / launch.config_file).is_file()
        script = [launch.training_script, *launch.training_script_args]
        check_script(["-m", *script] if launch.module else script, monkeypatch)


def test_what_is_wrong_is_found(monkeypatch):
    for words in (["--seq_length", "5"], ["--model", "m"], ["--model", "m", "--train_file", "f", "--steps", "many"]):
        with pytest.raises((AssertionError, SystemExit)):
            check_script(["examples/accelerate_loop.py", *words], monkeypatch)
    with pytest.raises(AssertionError):
        check_script(["examples/not_there.py"], monkeypatch)


def test_the_plan_that_the_readme_shows(reader, tmp_path):
    pytest.importorskip("peft")
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    words = command("README.md", "hf-fpdt plan path/to/Llama-3.1-8B --seq-len 131072")
    printed = reader.run(as_tried(words, {"path/to/Llama-3.1-8B": tmp_path}))
    shown = re.search(r"^\$ hf-fpdt plan .*?\n(hf_fpdt:.*?)^```", (ROOT / "README.md").read_text(), flags=re.S | re.M)[1]
    assert printed == shown


def test_the_demo(reader):
    """What `make demo` runs behind its set-up, on less text."""
    given = commands()[
        "examples/README.md: python examples/finetune_long_context.py --output_dir outputs/demo --compare_with sdpa"
    ]
    assert f"\t$(BIN)/{' '.join(given)}\n" in (ROOT / "Makefile").read_text()
    words = [*given, "--max_steps", "2", "--max_documents", "3", "--seq_len", "256", "--vocab_size", "400"]
    reader.run(words, fresh=True)
    runs = json.loads((reader.folder / "outputs/demo/losses.json").read_text())["runs"]
    assert runs["fpdt"]["losses"] == pytest.approx(runs["sdpa"]["losses"], abs=1e-5)
    assert (reader.folder / "outputs/demo/loss.png").is_file()


# Before the README's script: what it takes for granted, and what only CPUs need.
GIVEN = """
import functools, json, sys, transformers
with open(sys.argv[1]) as file:
    path, output_dir, dataset = json.load(file)
less = {"max_steps": 2, "logging_steps": 1, "report_to": "none", "per_device_train_batch_size": 1}
transformers.TrainingArguments = functools.partial(transformers.TrainingArguments, use_cpu=True, ddp_backend="gloo", **less)
"""


def test_the_script_of_the_readme_as_it_is_launched(reader, tmp_path):
    """On two processes that share every sequence."""
    pytest.importorskip("deepspeed")
    make_model(tiny_llama()).save_pretrained(tmp_path / "model")
    rows = [{name: ids[0].tolist() for name, ids in make_batch(1, 40, seed=seed).items()} for seed in range(4)]
    (tmp_path / "given.json").write_text(json.dumps([str(tmp_path / "model"), str(tmp_path / "out"), rows]))
    diff = re.search(r"^```diff\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.S | re.M)[1]
    script = [line[1:] for line in diff.splitlines() if not line.startswith("-")]
    (tmp_path / "train.py").write_text(GIVEN + "\n".join(script))
    words = command("README.md", "accelerate launch --config_file accelerate_configs/fpdt_zero3_2gpu.yaml")
    names = {"train.py": tmp_path / "train.py", "...": tmp_path / "given.json"}
    printed = reader.run(as_tried(words, names), fresh=True, FPDT_CHUNK_SIZE="14")
    assert printed.count("'loss'") == 2
    assert "fpdt/tokens_per_s_per_gpu" in printed


def test_this_machine_can_be_described():
    done = run([sys.executable, "-m", "hf_fpdt.cli", "env"], timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("hf-fpdt ")
