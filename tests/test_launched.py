"""
An unmodified Trainer script under `accelerate launch`, its sequences spread over processes, against a plain loop in one: logged
loss and gradient norm of every step, and the weights after three steps of SGD with clipping. A failure means that
launching on several GPUs trains something else.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from reference import make_model, tiny_llama, tiny_neox
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

pytest.importorskip("deepspeed")  # in the extra "test"; not on every machine with a GPU
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "launched"))
from train import Tokens  # noqa: E402

SAMPLES, STEPS, RATE, CLIP = 16, 3, 0.05, 0.5
FAMILIES = {"llama": tiny_llama, "neox": tiny_neox}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, config in FAMILIES.items():
        make_model(config()).save_pretrained(folder / name)
    return folder


def launch(config: Path, words: list[str], folder: Path, **environment) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(config),
        "--main_process_port",
        "0",
        *words,
    ]
    command += [
        "--output_dir",
        str(folder),
        "--ddp_backend",
        "gloo",
        "--per_device_train_batch_size",
        "1",
        "--report_to",
        "none",
    ]
    command += ["--logging_steps", "1", "--disable_tqdm", "true", "--optim", "sgd"]
    command += ["--learning_rate", str(RATE), "--lr_scheduler_type", "constant", "--max_grad_norm", str(CLIP)]
    command += ["--max_steps", str(STEPS), "--num_samples", str(SAMPLES)]
    variables = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "FPDT_CHUNK_SIZE": "14", "PYTHONPATH": str(ROOT)}
    variables |= environment
    return subprocess.run(command, capture_output=True, text=True, timeout=280, env=os.environ | variables, cwd=ROOT)


def stage_of(stage: int, folder: Path) -> Path:
    """The configuration for two CPUs with another ZeRO stage."""
    config = yaml.safe_load((ROOT / "accelerate_configs" / "fpdt_zero2_2cpu.yaml").read_text())
    config["deepspeed_config"]["zero_stage"] = stage
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder / "config.yaml"


def reference(checkpoint: Path, *, groups: int = 1, accumulation: int = 1):
    """Losses, gradient norms and weights of a plain loop over the samples, in the order in which groups of two see them."""
    settings = TrainingArguments("unused", per_device_train_batch_size=1, report_to="none", use_cpu=True)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager").train()
    batches = list(Trainer(model, settings, train_dataset=Tokens(SAMPLES, 46, model.config.vocab_size)).get_train_dataloader())
    optimizer, log = torch.optim.SGD(model.parameters(), lr=RATE), []
    for step in range(STEPS):
        optimizer.zero_grad()
        total = 0.0
        for micro in range(step * accumulation, (step + 1) * accumulation):
            # Every rank draws one batch a round, and a group of two works on its two one after the other.
            for group in range(groups):
                batch = batches[2 * groups * (micro // 2) + 2 * group + micro % 2]
                loss = model(**batch).loss / (groups * accumulation)
                loss.backward()
                total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        log.append((total, norm.item()))
    return log, model.state_dict()


def check(folder: Path, result: subprocess.CompletedProcess, want_log, want_weights, norms: bool = True):
    assert result.returncode == 0, "\n".join(line for line in result.stderr.splitlines() if line.startswith("[rank"))[-4000:]
    log = [entry for entry in json.loads((folder / "log.json").read_text()) if "loss" in entry]
    assert [entry["loss"] for entry in log] == pytest.approx([loss for loss, _ in want_log], rel=1e-5)
    if norms:
        assert [entry["grad_norm"] for entry in log] == pytest.approx([norm for _, norm in want_log], rel=1e-5)
    got = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    assert set(got) == set(want_weights)
    for name, want in want_weights.items():
        assert (got[name] - want).abs().max() <= 1e-5 * want.abs().max(), name


RUN = ["-m", "hf_fpdt.run", "tests/launched/train.py"]


@pytest.mark.parametrize(
    ("stage", "family", "accumulation"),
    [(0, "llama", 1), (1, "llama", 1), (2, "neox", 2), (3, "llama", 2), (3, "neox", 1)],
)
def test_two_processes_share_every_sequence(stage, family, accumulation, checkpoints, tmp_path):
    config = ROOT / "accelerate_configs" / "fpdt_zero3_2cpu.yaml" if stage == 3 else stage_of(stage, tmp_path)
    words = [*RUN, "--model", str(checkpoints / family), "--gradient_accumulation_steps", str(accumulation)]
    result = launch(config, words, tmp_path / "out")
    # Without ZeRO DeepSpeed does not tell the norm; what it clips by shows in the weights.
    check(tmp_path / "out", result, *reference(checkpoints / family, accumulation=accumulation), norms=stage > 0)


def test_two_groups_of_two(checkpoints, tmp_path):
    config = ROOT / "accelerate_configs" / "fpdt_zero3_sp2_dp2_4cpu.yaml"
    result = launch(config, [*RUN, "--model", str(checkpoints / "llama")], tmp_path / "out")
    check(tmp_path / "out", result, *reference(checkpoints / "llama", groups=2))


def test_a_group_that_does_not_divide_the_processes(checkpoints, tmp_path):
    text = (ROOT / "accelerate_configs" / "fpdt_zero3_2cpu.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text.replace("num_processes: 2", "num_processes: 3"))
    result = launch(tmp_path / "config.yaml", [*RUN, "--model", str(checkpoints / "llama")], tmp_path / "out")
    assert result.returncode != 0
    assert "sp_size=2 does not divide the 3 processes. Use one of 1, 3" in result.stderr


def test_settings_that_are_none(checkpoints, tmp_path):
    config = ROOT / "accelerate_configs" / "fpdt_zero3_2cpu.yaml"
    result = launch(config, [*RUN, "--model", str(checkpoints / "llama")], tmp_path / "out", FPDT_CHUNKSIZE="14")
    assert result.returncode != 0
    assert "The environment sets FPDT_CHUNKSIZE, which is no setting" in result.stderr


def test_resume_in_the_middle_of_an_epoch(checkpoints, tmp_path):
    """Three steps at once, and two of them in another run from the checkpoint after the first."""
    config = ROOT / "accelerate_configs" / "fpdt_zero3_2cpu.yaml"
    words = [*RUN, "--model", str(checkpoints / "llama"), "--save_strategy", "steps", "--save_steps", "1"]
    check(tmp_path / "out", launch(config, words, tmp_path / "out"), *reference(checkpoints / "llama"))
    words += ["--resume_from_checkpoint", str(tmp_path / "out" / "checkpoint-1")]
    check(tmp_path / "again", launch(config, words, tmp_path / "again"), *reference(checkpoints / "llama"))


def test_a_script_that_imports_hf_fpdt(checkpoints, tmp_path):
    """Without `hf_fpdt.run`; the settings from a DeepSpeed configuration."""
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys\nimport hf_fpdt\nsys.path.insert(0, {str(ROOT / 'tests/launched')!r})\nimport train\ntrain.main()\n"
    )
    settings = {
        "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True},
        "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True, "fpdt": {"chunk_size": 10, "save_attention": False},
    }  # fmt: skip
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    config = yaml.safe_load((ROOT / "accelerate_configs" / "fpdt_zero3_2cpu.yaml").read_text())
    del config["mixed_precision"]  # accelerate wants it in the other file then
    config["deepspeed_config"] = {"deepspeed_config_file": str(tmp_path / "ds.json"), "zero3_init_flag": True}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    result = launch(tmp_path / "config.yaml", [str(script), "--model", str(checkpoints / "llama")], tmp_path / "out")
    check(tmp_path / "out", result, *reference(checkpoints / "llama"))
