"""
The command `hf-fpdt`: what it says is what `hf_fpdt.plan` says of the same model, what cannot be done is told in a line, and
the longest sequence fits while one 1,024 tokens longer does not.
"""

import json
import re
import sys
from pathlib import Path

import pytest
import started
import torch
from reference import tiny_llama
from transformers import AutoConfig, AutoModelForCausalLM

import hf_fpdt
from hf_fpdt import cli, environment, plan_report

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
GIB = 2**30


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(hidden_size=256, num_hidden_layers=4, intermediate_size=1024, max_position_embeddings=4096).save_pretrained(
        folder
    )
    return folder


def run(capsys, *words) -> tuple[int, str, str]:
    status = cli.main([str(word) for word in words])
    return status, *capsys.readouterr()


def meta_model(folder):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(folder), attn_implementation="fpdt", dtype=torch.bfloat16
        ).train()


def test_a_gpu_is_known_by_its_rates(folder, capsys):
    words = ["plan", folder, "--seq-len", 8192, "--host-memory", "2GiB", "--rates", "h200"]
    status, text, _ = run(capsys, *words)
    assert status == 0
    assert f"GiB of {0.94 * 150109880320 / GIB:.2f}" in text
    assert "accelerate_configs/fpdt_single_gpu.yaml -m hf_fpdt.run train.py" in text
    assert "of 1.00" in run(capsys, *words, "--gpu-memory", "1GiB")[1]


def test_plan_is_that_of_the_library(folder, capsys):
    words = ["plan", folder, "--seq-len", 65536, "--gpu-memory", "1GiB", "--host-memory", "2GiB", "--chunk-size", 4096]
    config = hf_fpdt.FPDTConfig(gpu_memory=GIB, host_memory=2 * GIB, chunk_size=4096)
    want = hf_fpdt.plan(meta_model(folder), seq_len=65536, config=config)
    status, text, _ = run(capsys, *words)
    assert status == 0
    assert text.startswith(str(want))
    assert "made for 4096 tokens (max_position_embeddings)" in text
    status, text, _ = run(capsys, *words, "--json")
    found = json.loads(text)
    assert (found["seq_len"], found["chunk_size"], found["kv"]) == (65536, 4096, "resident")
    assert found["peaks"]["device"] == want.peaks.device
    assert found["peaks"]["host"] == want.peaks.host
    assert [(layer["keeps"], layer["place"]) for layer in found["layers"]] == [(p.keeps, p.place) for p in want.placements]


def test_every_option_arrives(folder, capsys):
    words = "--seq-len 8192 --batch-size 2 --gpu-memory 1GiB --host-memory 1GiB --recompute yes --save-attention no"
    words = [*words.split(), "--offload", "host", "--kv", "streamed", "--json"]
    with_adamw = json.loads(run(capsys, "plan", folder, *words, "--dtype", "float32")[1])
    words += ["--optimizer-memory", "0GiB"]
    status, text, _ = run(capsys, "plan", folder, *words, "--dtype", "float32")
    found = json.loads(text)
    assert status == 0
    assert (found["batch_size"], found["kv"]) == (2, "streamed")
    assert 3 * found["limits"]["reserve"] == with_adamw["limits"]["reserve"]
    assert {(layer["keeps"], layer["place"]) for layer in found["layers"]} == {("key_value", "host")}
    half = json.loads(run(capsys, "plan", folder, *words)[1])
    assert found["peaks"]["host"] == pytest.approx(2 * half["peaks"]["host"], rel=0.05)


def test_adapters_freeze_the_rest(folder, capsys):
    pytest.importorskip("peft")
    words = ["plan", folder, "--seq-len", 8192, "--gpu-memory", "1GiB", "--json"]
    whole, adapters = (json.loads(run(capsys, *words, *more)[1]) for more in ([], ["--lora", 4]))
    narrow = json.loads(run(capsys, *words, "--lora", 4, "--lora-targets", "q_proj,v_proj")[1])
    assert 0 < narrow["limits"]["reserve"] < adapters["limits"]["reserve"] < whole["limits"]["reserve"] / 10


def test_the_longest_that_fits(folder, capsys):
    words = ["plan", folder, "--gpu-memory", "0.3GiB", "--host-memory", "0.5GiB"]
    found = json.loads(run(capsys, *words, "--longest", "--json")[1])
    assert found["seq_len"] % 1024 == 0
    assert found["seq_len"] > 4096
    assert run(capsys, *words, "--seq-len", found["seq_len"])[0] == 0
    status, _, error = run(capsys, *words, "--seq-len", found["seq_len"] + 1024)
    assert status == 1
    assert "it does not fit. A step needs" in error


def test_the_picture(folder, capsys, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    drawn = []
    draw = plan_report.draw
    monkeypatch.setattr(cli, "draw", lambda plans, *args: drawn.extend(plans) or draw(plans, *args))
    path = tmp_path / "memory.png"
    assert run(capsys, "plan", folder, "--seq-len", 10000, "--gpu-memory", "1GiB", "--plot", path)[0] == 0
    assert [plan.seq_len for plan in drawn] == [2048, 4096, 8192, 10000]
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["--seq-len", "8192", "--gpu-memory", "10MiB"], 1, "it does not fit. A step needs .* GiB of device memory"),
        (["--longest", "--gpu-memory", "10MiB"], 1, "it does not fit"),
        (["--seq-len", "0", "--gpu-memory", "1"], 2, "seq_len must be a whole number, at least 2"),
        (["--seq-len", "8192", "--gpu-memory", "1", "--lora-targets", "q_proj"], 2, "--lora-targets q_proj without --lora"),
        (["--seq-len", "1", "--gpu-memory", "1"], 2, "seq_len must be a whole number, at least 2"),
        (["--seq-len", "8192", "--gpu-memory", "1", "--kernel", "fast"], 2, "kernel"),
        (["--seq-len", "8192", "--gpu-memory", "1", "--offload", "disk"], 2, "disk_folder"),
        (["--seq-len", "8192"], 2, "without a GPU: pass --gpu-memory"),
    ],
)
def test_what_cannot_be_done(words, status, message, folder, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found, _, error = run(capsys, "plan", folder, *words)
    assert found == status
    assert re.search(message, error), error


@pytest.mark.parametrize("words", [["--gpu-memory", "much"], ["--seq-len", "5", "--longest"], []])
def test_words_that_are_no_command(words, folder, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["plan", str(folder), *words])
    assert stop.value.code == 2


@pytest.mark.parametrize(
    ("text", "size"), [("80", 80 * GIB), ("80GiB", 80 * GIB), ("141 GB", 141 * 10**9), ("1.5TiB", 3 << 39)]
)
def test_sizes(text, size):
    assert cli._size(text) == size


@pytest.mark.parametrize(("package", "words"), [("peft", ["--lora", "4"]), ("matplotlib.figure", ["--plot", "memory.png"])])
def test_a_package_that_is_not_there(package, words, folder, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    status, _, error = run(capsys, "plan", folder, "--seq-len", 8192, "--gpu-memory", 1, *words)
    assert status == 2
    assert "--lora needs peft, and --plot matplotlib" in error


def test_no_such_model(capsys, tmp_path):
    status, _, error = run(capsys, "plan", tmp_path / "none", "--seq-len", 8192, "--gpu-memory", 1)
    assert status == 2
    assert error.startswith("hf-fpdt: ")


def test_the_report_of_a_machine(capsys, monkeypatch):
    monkeypatch.setenv("FPDT_CHUNK_SIZE", "4096")
    monkeypatch.setenv("FPDT_DISK_FOLDER", "/somebody/fast")
    status, text, _ = run(capsys, "env")
    lines = dict(line.split("  ", 1) for line in text.splitlines())
    lines = {what.strip(): value.strip() for what, value in lines.items()}
    assert status == 0
    assert lines["hf-fpdt"] == hf_fpdt.__version__
    assert lines["torch"] == torch.__version__
    assert lines["FPDT_CHUNK_SIZE"] == "4096"
    assert lines["FPDT_DISK_FOLDER"] == "(a path)"
    assert str(Path.home()) not in text


def test_the_report_of_gpus(monkeypatch):
    """Of two that cannot reach each other, with a kernel that is wrong."""
    properties = type("Properties", (), {"name": "A GPU", "major": 9, "minor": 0})
    for name, value in {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "current_device": lambda: 0,
        "get_device_properties": lambda index: properties,
        "mem_get_info": lambda index: (70 * GIB, 80 * GIB),
        "can_device_access_peer": lambda one, other: False,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 1))

    def choose(name, *sizes):
        if name == "cudnn":
            raise ValueError("FPDTConfig(kernel='cudnn'): cudnn is wrong here: out differs. Usable here: naive; more")
        return environment.KERNELS[name]

    monkeypatch.setattr(environment, "choose_kernel", choose)
    lines = dict(environment.report())
    assert lines["GPU 1"] == "A GPU, compute capability 9.0, 70.0 of 80.0 GiB free, cannot access the others"
    assert lines["attention kernel cudnn"] == "cudnn is wrong here: out differs"
    assert lines["attention kernel flash_attention_4"] == "right"
    assert "attention kernel torch_cpu" not in lines


def test_the_installed_command():
    command = [sys.executable, "-m", "hf_fpdt.cli", "plan", "--help"]
    done = started.run(command, timeout=120)
    assert done.returncode == 0
    assert "--longest" in done.stdout
