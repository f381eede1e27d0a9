"""
The examples with TRL, with a loop of one's own and with GPT-NeoX, run as a user runs them: the command lines of
examples/README.md, with tiny models and files in the places of their placeholders, by a reader who has installed the package,
on a CPU. And a script that knows nothing of hf_fpdt.
"""

import json
import re
import shutil
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml
from documented import ROOT, as_tried, command
from reference import make_model, tiny_llama, tiny_neox

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


@pytest.fixture
def run(reader):
    """Runs the command of the examples' page that starts so, with other words for its placeholders and more behind them."""

    def run_command(start: str, names: dict, *more, **variables: str) -> str:
        line = [*as_tried(command(PAGE, start), names), *more]
        return reader.run(line, FPDT_CHUNK_SIZE="48", **variables)

    return run_command


@pytest.mark.parametrize("how", [[], ["--packing", "false", "--bf16", "false", "--per_device_train_batch_size", "2"]], ids=str)
def test_sft_with_adapters(how, run, checkpoint, tmp_path):
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


def test_a_loop_on_one_and_on_two_processes(run, checkpoint, tmp_path):
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


def test_the_sft_script_of_trl(run, checkpoint, tmp_path):
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


def test_a_gpt_neox_on_two_processes(run, checkpoint, tmp_path):
    """Continued on shared sequences under ZeRO-3; what is saved is its model, trained."""
    from transformers import AutoModelForCausalLM

    start = tmp_path / "start"
    shutil.copytree(checkpoint, start)
    (start / "model.safetensors").unlink()
    make_model(tiny_neox(vocab_size=300)).save_pretrained(start)
    names = {"path/to/pythia": start, "books.jsonl": checkpoint / "book.txt", "65536": 200, "outputs/neox": tmp_path / "out"}
    more = ["--max_steps", "3", "--learning_rate", "0.01", "--eval_pieces", "1", "--bf16", "false", "--ddp_backend", "gloo"]
    config = yaml.safe_load((ROOT / "accelerate_configs" / "fpdt_zero3_2cpu.yaml").read_text()) | {"main_process_port": 0}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    more += ["--report_to", "none"]
    out = run("bash examples/continue_gpt_neox.sh", names, *more, CONFIG=str(tmp_path / "config.yaml"))
    losses = json.loads((tmp_path / "out" / "losses.json").read_text())["runs"]["fpdt"]["losses"]
    assert len(losses) == 3
    assert losses[2] < losses[0]
    assert "fpdt/tokens_per_s_per_gpu" in out
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (start, tmp_path / "out"))
    assert type(after).__name__ == "GPTNeoXForCausalLM"
    assert not torch.equal(after.get_output_embeddings().weight, before.get_output_embeddings().weight)


def test_a_script_that_knows_nothing_of_it(reader, checkpoint, tmp_path):
    """The checkpoint names the attention. Losses, accuracy and a resumed run are those of the script by itself."""
    named = tmp_path / "named"
    shutil.copytree(checkpoint, named)
    config = json.loads((named / "config.json").read_text())
    (named / "config.json").write_text(json.dumps(config | {"attn_implementation": "fpdt"}))
    script = [ROOT / "tests" / "launched" / "grouped_text.py", "--train_file", checkpoint / "book.txt", "--block_size", "200"]
    script += ["--max_steps", "4", "--logging_steps", "1", "--learning_rate", "0.01", "--per_device_train_batch_size", "2"]
    script += ["--use_cpu", "--report_to", "none", "--save_steps", "2", "--model_name_or_path"]
    through = ["accelerate", "launch", "--config_file", "accelerate_configs/fpdt_single_gpu.yaml", "-m", "hf_fpdt.run"]
    resumed = ["--resume_from_checkpoint", tmp_path / "streamed" / "checkpoint-2"]

    def log_of(name: str, *words) -> list[dict]:
        reader.run([*words, "--output_dir", tmp_path / name], FPDT_CHUNK_SIZE="48")
        return json.loads((tmp_path / name / "log.json").read_text())

    with ThreadPoolExecutor() as both:
        plain = both.submit(log_of, "plain", "python", *script, checkpoint)
        streamed = both.submit(log_of, "streamed", *through, *script, named)
        logs = {"plain": plain.result(), "streamed": streamed.result()}
    logs["resumed"] = log_of("resumed", "python", "-m", "hf_fpdt.run", *script, named, *resumed)
    assert "fpdt/tokens_per_s_per_gpu" in logs["streamed"][0]
    assert not any("fpdt" in key for key in logs["plain"][0])
    for what, count in (("loss", 4), ("eval_loss", 1), ("eval_accuracy", 1)):
        plain, streamed, resumed = ([entry[what] for entry in log if what in entry] for log in logs.values())
        assert len(plain) == count
        assert streamed == pytest.approx(plain, rel=1e-5), what
        assert resumed == pytest.approx(plain, rel=1e-5), what
    assert "attn_implementation" not in json.loads((tmp_path / "streamed" / "config.json").read_text())
