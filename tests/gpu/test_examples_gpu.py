"""The examples' command lines on GPUs, in bfloat16 at 32,768 tokens and more; tests on CPUs compare losses more closely."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("datasets")
pytest.importorskip("trl")

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]
CHAT = """{% for m in messages %}{% if m['role'] == 'assistant' %}
{% generation %}{{ m['content'] }}{{ eos_token }}{% endgeneration %}
{% else %}{{ m['role'] }}: {{ m['content'] }}{% endif %}{% endfor %}"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A small Llama and a tokenizer for the longest files of the standard library, and those in a file and as conversations."""
    sys.path.insert(0, str(ROOT / "examples"))
    from datasets import Dataset
    from long_text import load_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("checkpoint")
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"), key=lambda file: -file.stat().st_size)[:40]
    texts = [file.read_text(encoding="utf-8") for file in files]
    tokenizer = load_tokenizer(None, 4096, Dataset.from_dict({"text": texts}))
    tokenizer.pad_token, tokenizer.chat_template = tokenizer.eos_token, CHAT
    tokenizer.save_pretrained(folder)
    shape = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 8}
    config = LlamaConfig(**shape, num_key_value_heads=2, vocab_size=len(tokenizer), max_position_embeddings=32768)
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    (folder / "book.txt").write_text("\n".join(texts), encoding="utf-8")
    rows = [
        {"messages": [{"role": "user", "content": text[:2000]}, {"role": "assistant", "content": text[2000:]}]}
        for text in texts
    ]
    (folder / "data").mkdir()
    (folder / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return folder


def environment(gpus: list[str], **variables: str) -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    fixed = {"NCCL_NVLS_ENABLE": "0", "CUDA_VISIBLE_DEVICES": ",".join(gpus), "PYTHONPATH": os.pathsep.join(paths)}
    return os.environ | fixed | variables


def all_gpus() -> list[str]:
    return os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(torch.cuda.device_count())))).split(",")


def falling(printed: str) -> list[float]:
    losses = [float(loss) for loss in re.findall(r"(?:'loss': '?|step \d+: loss )([\d.]+)", printed)]
    assert len(losses) > 4
    assert losses[-1] < losses[0]
    return losses


def losses_of(*words, config: str = "") -> list[float]:
    """The losses that a command prints, which have to fall."""
    launcher = [sys.executable]
    if config:
        path = str(ROOT / "accelerate_configs" / f"{config}.yaml")
        launcher += ["-m", "accelerate.commands.launch", "--config_file", path, "--main_process_port", "0"]
    variables = environment(all_gpus() if config else all_gpus()[:1])
    done = subprocess.run([*launcher, *map(str, words)], env=variables, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return falling(done.stdout)


@pytest.fixture
def shell(tmp_path):
    """Starts a file of the examples on these GPUs, with the `accelerate` of this interpreter; `config` is changed as told."""

    def start(name: str, *words, gpus: list[str], config: str, **changes) -> subprocess.Popen:
        (tmp_path / "bin").mkdir(exist_ok=True)
        program = tmp_path / "bin" / "accelerate"
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m accelerate.commands.accelerate_cli "$@"\n')
        program.chmod(0o755)
        settings = yaml.safe_load((ROOT / "accelerate_configs" / f"{config}.yaml").read_text()) | changes
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
        paths = {"PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}", "CONFIG": str(tmp_path / "config.yaml")}
        line = ["bash", str(ROOT / "examples" / f"{name}.sh"), *map(str, words)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(line, env=environment(gpus, **paths), cwd=ROOT, **pipes))
        return started[-1]

    started: list[subprocess.Popen] = []
    yield start
    for process in started:
        process.kill()


def ended(process: subprocess.Popen) -> str:
    printed, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors[-3000:]
    return printed


def on_gpus(count: int) -> str:
    if torch.cuda.device_count() < count:
        pytest.skip(f"needs {count} GPUs")
    return f"fpdt_zero3_{count}gpu" if count > 1 else ""


TRAINING = ["--max_steps", "6", "--logging_steps", "1", "--report_to", "none", "--save_strategy", "no", "--bf16", "true"]
TRAINING += ["--per_device_train_batch_size", "1", "--lr_scheduler_type", "constant"]


@pytest.mark.parametrize("how", [["--packing"], ["--assistant_only_loss"]], ids=str)
def test_sft_with_adapters(how, checkpoint, tmp_path):
    words = ["--model_name_or_path", checkpoint, "--train_file", checkpoint / "data" / "train.jsonl", "--output_dir", tmp_path]
    words += ["--max_length", "32768", "--learning_rate", "0.003", *TRAINING, *how]
    losses_of(ROOT / "examples" / "sft_lora_trl.py", *words)
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_the_sft_script_of_trl_on_two(checkpoint, tmp_path):
    words = [
        "-m",
        "hf_fpdt.run",
        "-m",
        "trl.scripts.sft",
        "--model_name_or_path",
        checkpoint,
        "--dataset_name",
        checkpoint / "data",
    ]
    words += ["--attn_implementation", "fpdt", "--use_peft", "--lora_target_modules", "all-linear", "--eval_strategy", "no"]
    words += ["--output_dir", tmp_path, "--max_length", "32768", "--packing", "--learning_rate", "0.003"]
    losses_of(*words, *TRAINING, config=on_gpus(2))


def test_a_loop_on_one_and_on_two(checkpoint, tmp_path):
    words = [ROOT / "examples" / "accelerate_loop.py", "--model", checkpoint, "--train_file", checkpoint / "book.txt"]
    words += ["--seq_len", "65536", "--steps", "6", "--learning_rate", "0.001", "--output_dir"]
    alone = losses_of(*words, tmp_path / "one")
    assert losses_of(*words, tmp_path / "two", config=on_gpus(2)) == pytest.approx(alone, abs=0.02)


def test_continued_at_four_times_the_length(shell, checkpoint, tmp_path):
    """With YaRN, against PyTorch's attention."""
    words = [
        checkpoint,
        checkpoint / "book.txt",
        "4",
        "32768",
        "--output_dir",
        tmp_path,
        "--learning_rate",
        "0.0003",
        *TRAINING,
    ]
    words += ["--compare_with", "sdpa", "--eval_pieces", "1"]
    falling(ended(shell("extend_context_yarn", *words, gpus=all_gpus()[:1], config="fpdt_single_gpu")))
    runs = json.loads((tmp_path / "losses.json").read_text())["runs"]
    assert runs["fpdt"]["losses"] == pytest.approx(runs["sdpa"]["losses"], abs=0.02)


def test_a_gpt_neox_continued_on_two(shell, checkpoint, tmp_path):
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = on_gpus(2)
    start, shape = tmp_path / "start", {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4}
    shutil.copytree(checkpoint, start, ignore=shutil.ignore_patterns("*.safetensors", "data", "book.txt"))
    settings = GPTNeoXConfig(**shape, num_attention_heads=8, vocab_size=4096, max_position_embeddings=65536)
    GPTNeoXForCausalLM(settings).to(torch.bfloat16).save_pretrained(start)
    words = [start, checkpoint / "book.txt", "--seq_len", "65536", "--output_dir", tmp_path / "out", "--learning_rate", "0.001"]
    falling(ended(shell("continue_gpt_neox", *words, *TRAINING, gpus=all_gpus()[:2], config=config, main_process_port=0)))


def test_two_machines(shell, checkpoint, tmp_path):
    """Two GPUs of this one, each as if it were alone in its machine."""
    on_gpus(2)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    parallelism = {"parallelism_config_sp_size": 2, "parallelism_config_sp_backend": "deepspeed"}
    parallelism["parallelism_config_sp_attn_implementation"] = "sdpa"
    changes = {"num_processes": 2, "main_process_port": port, "parallelism_config": parallelism}
    words = [
        "examples/accelerate_loop.py",
        "--model",
        checkpoint,
        "--train_file",
        checkpoint / "book.txt",
        "--seq_len",
        "65536",
    ]
    words += ["--steps", "6", "--learning_rate", "0.001", "--output_dir", tmp_path / "out"]
    machines = [
        shell("two_machines", rank, "127.0.0.1", *words, gpus=[gpu], config="fpdt_zero3_16gpu_2nodes", **changes)
        for rank, gpu in enumerate(all_gpus()[:2])
    ]
    falling(ended(machines[0]))
    ended(machines[1])


def test_a_new_gpt_neox(tmp_path):
    words = ["--model_type", "gpt_neox", "--config_overrides", "hidden_size=512,num_hidden_layers=4,num_attention_heads=8"]
    words += ["--seq_len", "65536", "--group", "--output_dir", tmp_path, "--learning_rate", "0.0003", *TRAINING]
    losses_of(ROOT / "examples" / "finetune_long_context.py", *words, "--compare_with", "sdpa")
    runs = json.loads((tmp_path / "losses.json").read_text())["runs"]
    assert runs["fpdt"]["losses"] == pytest.approx(runs["sdpa"]["losses"], abs=0.02)
