"""
The examples with TRL and with a loop of one's own, run as a user runs them: the command lines of examples/README.md, with tiny
models and files in the places of their placeholders, in processes of their own, on a CPU.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from documented import ROOT, as_tried, command
from reference import make_model, tiny_llama

pytest.importorskip("datasets")
pytest.importorskip("trl")
pytest.importorskip("deepspeed")

PAGE = "examples/README.md"
CHAT = """{% for m in messages %}{{ m['role'] }}: {% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}\
{{ eos_token }}{% endgeneration %}{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}
{% endfor %}"""
BRIEF = ["--max_steps", "3", "--logging_steps", "1", "--learning_rate", "0.01", "--per_device_train_batch_size", "1"]
BRIEF += ["--use_cpu", "--report_to", "none", "--save_strategy", "no"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny Llama with a tokenizer of its own for the text of a file of the standard library."""
    sys.path.insert(0, str(ROOT / "examples"))
    from datasets import Dataset
    from long_text import load_tokenizer

    folder = tmp_path_factory.mktemp("checkpoint")
    text = (Path(sysconfig.get_paths()["stdlib"]) / "argparse.py").read_text()
    tokenizer = load_tokenizer(None, 300, Dataset.from_dict({"text": [text]}))
    tokenizer.pad_token, tokenizer.chat_template = tokenizer.eos_token, CHAT
    tokenizer.save_pretrained(folder)
    make_model(tiny_llama(vocab_size=len(tokenizer), initializer_range=0.02)).save_pretrained(folder)
    (folder / "book.txt").write_text(text)
    said = [("user", text[at : at + 400], "assistant", text[at + 400 : at + 900]) for at in range(0, 9000, 900)]
    rows = [{"messages": [{"role": a, "content": b}, {"role": c, "content": d}]} for a, b, c, d in said]
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)))
    yield folder
    shutil.rmtree(folder)


def run(start: str, names: dict, *more) -> str:
    """The command of the examples' page that starts so, with these words for its placeholders and more behind them."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "FPDT_CHUNK_SIZE": "48"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    line = [*as_tried(command(PAGE, start), names), *map(str, more)]
    done = subprocess.run(line, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("how", [[], ["--packing", "false", "--bf16", "false", "--per_device_train_batch_size", "2"]], ids=str)
def test_sft_with_adapters(how, checkpoint, tmp_path):
    """Packed in bfloat16, and padded; the adapter that is saved loads, and was trained."""
    from peft import PeftModel

    names = {"path/to/model": checkpoint, "chats.jsonl": checkpoint / "chats.jsonl", "outputs/sft": tmp_path, "131072": 512}
    out = run("python examples/sft_lora_trl.py", names, *BRIEF, *how)
    losses = [float(loss) for loss in re.findall(r"'loss': '?([\d.]+)", out)]
    assert len(losses) == 3
    assert losses[2] < losses[0]
    assert "fpdt/tokens_per_s_per_gpu" in out
    model = PeftModel.from_pretrained(make_model(tiny_llama(vocab_size=300)), tmp_path)
    assert any(weight.abs().max() > 0 for name, weight in model.named_parameters() if "lora_B" in name)


def test_a_loop_on_one_and_on_two_processes(checkpoint, tmp_path):
    """The same losses and weights, with the sequences shared under ZeRO-3."""
    names = {"path/to/model": checkpoint, "book.txt": checkpoint / "book.txt"}
    more = [
        "--steps",
        "3",
        "--gradient_accumulation_steps",
        "2",
        "--dtype",
        "float32",
        "--learning_rate",
        "0.001",
        "--output_dir",
    ]
    alone = run("python examples/accelerate_loop.py", names | {"131072": 200}, *more, tmp_path / "one")
    launched = "accelerate launch --config_file accelerate_configs/fpdt_zero3_2gpu.yaml examples/accelerate_loop.py"
    both = run(launched, names | {"262144": 200}, *more, tmp_path / "two")
    losses = [[float(loss) for loss in re.findall(r"step \d: loss ([\d.]+)", out)] for out in (alone, both)]
    assert len(losses[0]) == len(losses[1]) == 3
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    from transformers import AutoModelForCausalLM

    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("one", "two"))
    assert all(torch.allclose(two[name], weight, atol=2e-4) for name, weight in one.items())


def test_the_sft_script_of_trl(checkpoint, tmp_path):
    """Which does not import hf_fpdt, started through it."""
    data = tmp_path / "data"
    data.mkdir()
    shutil.copy(checkpoint / "chats.jsonl", data / "train.jsonl")
    names = {"path/to/model": checkpoint, "path/to/data": data, "outputs/sft": tmp_path / "out", "131072": 512}
    more = ["--dtype", "float32", "--bf16", "false", "--eval_strategy", "no", "--max_steps", "2"]
    out = run("python -m hf_fpdt.run -m trl.scripts.sft", names, *BRIEF, *more)
    assert out.count("'loss'") == 2
    assert "fpdt/tokens_per_s_per_gpu" in out
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
