"""
The two commands of docs/launching.md for two machines, started on one with a process each, train as one process does. A
failure: what the page says starts nothing, or something else.
"""

import socket
import subprocess
import sys

import pytest
import yaml
from documented import ROOT, as_tried, command
from reference import make_model, tiny_llama

pytest.importorskip("deepspeed")
sys.path.insert(0, str(ROOT / "tests" / "launched"))
from test_launched import CLIP, RATE, SAMPLES, STEPS, check, reference

CONFIG = "accelerate_configs/fpdt_zero3_16gpu_2nodes.yaml"


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def on_cpus(folder) -> str:
    """The same configuration with a process on each machine, and no GPUs."""
    settings = yaml.safe_load((ROOT / CONFIG).read_text())
    settings |= {"num_processes": 2, "mixed_precision": "no", "main_process_port": free_port()}
    settings["parallelism_config"]["parallelism_config_sp_size"] = 2
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return str(folder / "config.yaml")


def test_trains_as_one_process(reader, tmp_path):
    make_model(tiny_llama()).save_pretrained(tmp_path / "model")
    options = f"--model {tmp_path / 'model'} --output_dir {tmp_path / 'out'} --max_steps {STEPS} --num_samples {SAMPLES}"
    options += f" --per_device_train_batch_size 1 --optim sgd --learning_rate {RATE} --lr_scheduler_type constant"
    options += f" --max_grad_norm {CLIP} --logging_steps 1 --report_to none --save_strategy no --ddp_backend gloo"
    names = {"ADDRESS": "127.0.0.1", "train.py": ROOT / "tests" / "launched" / "train.py"}
    variables = reader.environment(CONFIG=on_cpus(tmp_path), FPDT_CHUNK_SIZE="14")
    lines = []
    for rank in (0, 1):
        words = command("docs/launching.md", f"bash examples/two_machines.sh {rank}")
        assert words[-1] == "..."
        lines.append([*as_tried(words[:-1], names), *options.split()])
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    machines = [subprocess.Popen(line, cwd=reader.folder, env=variables, **pipes) for line in lines]
    try:
        said = [machine.communicate(timeout=200) for machine in machines]
    finally:
        for machine in machines:
            machine.kill()
    assert machines[1].returncode == 0, said[1][1][-3000:]
    result = subprocess.CompletedProcess(lines[0], machines[0].returncode, *said[0])
    check(tmp_path / "out", result, *reference(tmp_path / "model"))
