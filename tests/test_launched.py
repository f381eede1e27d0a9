"""
An unmodified Trainer script under `accelerate launch`, its sequences spread over processes, against a plain loop in one: logged
loss and gradient norm of every step, and the weights after three steps of SGD with clipping. A failure means that
launching on several GPUs trains something else.
"""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from reference import make_model, tiny_llama, tiny_neox
from started import run
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

pytest.importorskip("deepspeed")  # in the extra "test"; not on every machine with a GPU
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "launched"))
from train import Tokens  # noqa: E402

PATH = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
SAMPLES, STEPS, RATE, CLIP = 16, 3, 0.05, 0.5
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("FPDT_")}
# Engine, model, accumulated batches, groups, processes of a group; without groups every process has sequences of its own.
CASES = [
    ("zero0", "llama", 1, 1, 2), ("zero1", "llama", 1, 1, 2), ("zero2", "neox", 2, 1, 2), ("zero3", "llama", 2, 1, 2),
    ("zero3", "neox", 1, 1, 2), ("zero3", "llama", 1, 2, 2), ("zero3", "llama", 1, 1, 4), ("zero3", "llama", 1, 2, 1),
    ("fsdp2", "llama", 2, 1, 2), ("fsdp2", "neox", 1, 1, 2), ("fsdp2", "llama", 1, 2, 1),
    ("native", "llama", 1, 1, 2), ("native", "neox", 1, 2, 1),
    ("ddp", "llama", 2, 1, 2), ("ddp", "neox", 1, 1, 2), ("ddp", "llama", 1, 2, 2), ("ddp", "neox", 2, 2, 1),
]  # fmt: skip
FRESH = {("fsdp2", "neox", 1, 1, 2), ("ddp", "neox", 1, 1, 2)}  # ZeRO-3: in test_newcomer.py and below
FAMILIES = {"llama": tiny_llama, "neox": tiny_neox}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    for name, config in FAMILIES.items():
        make_model(config()).save_pretrained(folder / name)
    return folder


def launch(
    config: Path, words: list[str], folder: Path, backend: str | None = "gloo", clip=CLIP, optimizer="sgd", chunk_size=14,
    fresh: bool = False,
):  # fmt: skip
    """`accelerate launch` of a script with these words; `fresh` as in `started.py`."""
    start = f"-m accelerate.commands.launch --config_file {config} --main_process_port 0"
    common = (
        f"--output_dir {folder} --max_steps {STEPS} --num_samples {SAMPLES} --per_device_train_batch_size 1 --optim {optimizer}"
    )
    common += f" --learning_rate {RATE} --lr_scheduler_type constant --max_grad_norm {clip} --logging_steps 1 --report_to none"
    common += " --disable_tqdm true" + ("" if "--save_strategy" in words else " --save_strategy no")
    common += f" --ddp_backend {backend}" if backend else ""
    command = [sys.executable, *start.split(), *words, *common.split()]
    variables = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "FPDT_CHUNK_SIZE": str(chunk_size), "PYTHONPATH": PATH}
    variables["KILLED_IN"] = "1"
    return run(command, timeout=280, env=ENVIRONMENT | variables, cwd=ROOT, fresh=fresh)


def reference(
    checkpoint: Path, *, groups: int = 1, accumulation: int = 1, size: int = 2, clip: float = CLIP, shuffled: bool = True
):
    """
    Losses, gradient norms and weights of a plain loop over the samples, in the order in which groups of `size` see them, after
    Trainer's shuffling or without. Groups of several count each sample's mean once, as Trainer does with sequence parallelism;
    else every label of a step counts once.
    """
    settings = TrainingArguments("unused", per_device_train_batch_size=1, report_to="none", use_cpu=True)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager").train()
    samples = Tokens(SAMPLES, 46, model.config.vocab_size)
    batches = (
        list(Trainer(model, settings, train_dataset=samples).get_train_dataloader())
        if shuffled
        else [{name: torch.tensor([ids]) for name, ids in sample.items()} for sample in samples]
    )
    optimizer, log = torch.optim.SGD(model.parameters(), lr=RATE), []
    for step in range(STEPS):
        optimizer.zero_grad()
        # Every rank draws one batch a round, and a group works on its batches one after the other.
        seen = [
            batches[size * groups * (micro // size) + size * group + micro % size]
            for micro in range(step * accumulation, (step + 1) * accumulation)
            for group in range(groups)
        ]
        counts = [1 if size > 1 else int((batch["labels"][:, 1:] != -100).sum()) for batch in seen]
        losses = [model(**batch).loss * count / sum(counts) for batch, count in zip(seen, counts, strict=True)]
        sum(losses).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        log.append((sum(losses).item(), norm.item()))
    return log, model.state_dict()


def check(
    folder: Path, result: subprocess.CompletedProcess, want_log, want_weights, norms: bool = True, size: int = 2, watched=True
):
    """Of groups of `size` processes; `watched` by Trainer's callback."""
    assert result.returncode == 0, result.stderr[-6000:]
    log = json.loads((folder / "log.json").read_text())
    assert log[-1]["tokens"] == -(-46 // size)
    log = [entry for entry in log if "loss" in entry]
    assert not watched or all(entry["fpdt/tokens_per_s_per_gpu"] > 0 for entry in log)
    assert [entry["loss"] for entry in log] == pytest.approx([loss for loss, _ in want_log], rel=1e-5)
    if norms:
        assert [entry["grad_norm"] for entry in log] == pytest.approx([norm for _, norm in want_log], rel=1e-5)
    got = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    assert set(got) == set(want_weights)
    for name, want in want_weights.items():
        assert (got[name] - want).abs().max() <= 1e-5 * want.abs().max(), name


RUN = ["-m", "hf_fpdt.run", "tests/launched/train.py"]


ON_CPU = ["-m", "hf_fpdt.run", "tests/launched/on_cpu.py", "--use_cpu", "true"]


def zero(stage: int, folder: Path, groups: int, size: int) -> Path:
    """A configuration of DeepSpeed for CPUs."""
    name = "zero3_sp2_dp2_4cpu" if groups * size == 4 else "zero3_2cpu" if stage == 3 else "zero2_2cpu"
    config = yaml.safe_load((ROOT / "accelerate_configs" / f"fpdt_{name}.yaml").read_text())
    assert config["num_processes"] == groups * size
    config["deepspeed_config"]["zero_stage"] = stage
    return _written(config, folder, {"sp_size": size, "dp_replicate_size": groups} if size > 1 else None)


def of_gpus(engine: str, folder: Path, groups: int, size: int) -> Path:
    """The configuration of FSDP2 or DDP for two GPUs, on CPUs. transformers' own FSDP2 needs none but that of DDP."""
    name = "ddp" if engine == "native" else engine
    config = yaml.safe_load((ROOT / "accelerate_configs" / f"fpdt_{name}_2gpu.yaml").read_text())
    config |= {"mixed_precision": "no", "num_processes": groups * size}
    shards = {"dp_shard_size": groups * size} if engine == "fsdp2" else {}
    return _written(config, folder, {"sp_size": size, **shards} if size > 1 else None)


def _written(config: dict, folder: Path, parallelism: dict | None) -> Path:
    section = config.pop("parallelism_config")
    if parallelism is not None:
        named = {f"parallelism_config_{name}": value for name, value in parallelism.items()}
        config["parallelism_config"] = section | named
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder / "config.yaml"


@pytest.mark.parametrize(("engine", "family", "accumulation", "groups", "size"), CASES)
def test_trains_as_one_process(engine, family, accumulation, groups, size, checkpoints, tmp_path):
    words = ["--model", str(checkpoints / family), "--gradient_accumulation_steps", str(accumulation)]
    words += ["--attn_implementation", "fpdt"] if size == 1 else []
    words += ["--fsdp_size", str(groups * size)] if engine == "native" else []
    # Without ZeRO DeepSpeed does not tell the norm. What is clipped has one size whatever it had before: this must not be.
    clip = 1e3 if engine == "zero0" else CLIP
    if engine.startswith("zero"):
        result = launch(zero(int(engine[-1]), tmp_path, groups, size), [*RUN, *words], tmp_path / "out", clip=clip)
    else:
        fresh = (engine, family, accumulation, groups, size) in FRESH
        config = of_gpus(engine, tmp_path, groups, size)
        result = launch(config, [*ON_CPU, *words], tmp_path / "out", backend=None, fresh=fresh)
    want = reference(checkpoints / family, groups=groups, accumulation=accumulation, size=size, clip=clip)
    check(tmp_path / "out", result, *want, norms=engine != "zero0", size=size)
    weights = json.loads((tmp_path / "out" / "log.json").read_text())[-1]["weights"]
    assert (weights == "DTensor") == (engine in ("fsdp2", "native"))


def test_the_documentation_has_these_cases():
    text, models = (ROOT / "docs" / "launching.md").read_text(), {"llama": "Llama", "neox": "GPT-NeoX"}
    names = {f"zero{stage}": f"ZeRO-{stage}" for stage in range(4)}
    names |= {"fsdp2": "FSDP2", "native": "FSDP2 of transformers", "ddp": "DDP"}
    rows = [f"| {names[case[0]]} | {models[case[1]]} | {case[4]} | {case[3]} | {case[2]} |" for case in CASES]
    assert "\n".join(rows) in text, "\n".join(rows)


def test_fsdp2_gathers_a_layer_once_a_pass(checkpoints, tmp_path):
    """Two layers and the rest, each in both passes of three steps and in the end, in one chunk or in five."""
    config, words = of_gpus("fsdp2", tmp_path, groups=1, size=2), [*ON_CPU, "--model", str(checkpoints / "llama")]
    counts = []
    for chunk_size in (46, 10):
        result = launch(config, words, tmp_path / "out", backend=None, chunk_size=chunk_size)
        assert result.returncode == 0, result.stderr[-6000:]
        counts.append(re.findall(r"gathered (\d+)", result.stdout))
    assert counts[0] == counts[1]
    assert int(counts[0][0]) >= STEPS * (2 * 2 + 1)


def trained(folder: Path, result: subprocess.CompletedProcess):
    """Losses, gradient norms and weights of a run."""
    assert result.returncode == 0, result.stderr[-6000:]
    log = [entry for entry in json.loads((folder / "log.json").read_text()) if "loss" in entry]
    weights = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    return [(entry["loss"], entry["grad_norm"]) for entry in log], weights


def test_fsdp2_resumes_in_the_middle_of_an_epoch(checkpoints, tmp_path):
    config = of_gpus("fsdp2", tmp_path, groups=1, size=2)
    words = [*ON_CPU, "--model", str(checkpoints / "llama"), "--save_strategy", "steps", "--save_steps", "1"]
    runs = []
    for name, more in (("out", []), ("again", ["--resume_from_checkpoint", str(tmp_path / "out" / "checkpoint-1")])):
        result = launch(config, words + more, tmp_path / name, backend=None, optimizer="adamw_torch")
        runs.append(trained(tmp_path / name, result))
    (log, weights), (log_again, weights_again) = runs
    assert log == log_again
    assert len(log) == STEPS
    for name, want in weights.items():
        assert torch.equal(weights_again[name], want), name


@pytest.mark.slow
def test_fsdp2_killed_in_a_step_resumes_as_if_it_was_not(checkpoints, tmp_path):
    """In the middle of an epoch, with the states of AdamW: to the last bit."""
    config = of_gpus("fsdp2", tmp_path, groups=1, size=2)
    words = ["--model", str(checkpoints / "llama"), "--save_strategy", "steps", "--save_steps", "1"]
    more = {"backend": None, "optimizer": "adamw_torch"}
    want_log, want = trained(tmp_path / "whole", launch(config, [*ON_CPU, *words], tmp_path / "whole", **more))
    assert len(want_log) == STEPS
    killed = ["-m", "hf_fpdt.run", "tests/launched/killed.py", "--use_cpu", "true"]
    result = launch(config, killed + words, tmp_path / "out", **more)
    assert result.returncode != 0
    assert "Signal 9 (SIGKILL)" in result.stderr
    assert not (tmp_path / "out" / "checkpoint-2").exists()
    words += ["--resume_from_checkpoint", str(tmp_path / "out" / "checkpoint-1")]
    log, weights = trained(tmp_path / "out", launch(config, [*ON_CPU, *words], tmp_path / "out", **more))
    assert log == want_log
    for name, value in want.items():
        assert torch.equal(weights[name], value), name


def alone(script: str, words: list[str], folder: Path) -> subprocess.CompletedProcess:
    """A script in one process, five steps of AdamW with checkpoints after the second and the fourth."""
    common = (
        f"--output_dir {folder} --attn_implementation fpdt --max_steps 5 --save_strategy steps --save_steps 2 --num_samples 8"
    )
    common += " --per_device_train_batch_size 2 --optim adamw_torch --learning_rate 0.05 --lr_scheduler_type linear"
    common += " --logging_steps 1 --report_to none --disable_tqdm true --use_cpu true"
    variables = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "FPDT_CHUNK_SIZE": "14", "PYTHONPATH": PATH, "KILLED_IN": "3"}
    command = [sys.executable, "-m", "hf_fpdt.run", f"tests/launched/{script}.py", *words, *common.split()]
    return run(command, timeout=120, env=ENVIRONMENT | variables, cwd=ROOT)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run in one piece with dropout: the folder of its model, its log and its weights."""
    folder = tmp_path_factory.mktemp("whole")
    # Tied: Trainer resumes no output layer of GPT-NeoX (docs/troubleshooting.md).
    make_model(tiny_neox(hidden_dropout=0.1, tie_word_embeddings=True)).save_pretrained(folder / "model")
    log, weights = trained(folder, alone("train", ["--model", str(folder / "model")], folder))
    assert len(log) == 5
    assert log[-1][0] < log[0][0]
    return folder / "model", log, weights


@pytest.mark.parametrize("end", ["killed", "full_disk"])
def test_one_process_that_ended_early_resumes_as_if_it_had_not(end, whole, tmp_path):
    """
    In the middle of an epoch: the random numbers and the order of the samples go on as well. Killed between two checkpoints, or
    ended by a disk that is full while the second is written, which leaves the first one alone.
    """
    model, want_log, want = whole
    words = ["--model", str(model), "--save_total_limit", "1"]
    ended = alone(end, words, tmp_path / "out")
    if end == "killed":
        assert ended.returncode == -signal.SIGKILL
        assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]
    else:
        assert ended.returncode == 1
        assert "File too large" in ended.stderr
        assert not (tmp_path / "out" / "checkpoint-4" / "trainer_state.json").exists()
    words += ["--resume_from_checkpoint", str(tmp_path / "out" / "checkpoint-2")]
    log, weights = trained(tmp_path / "out", alone("train", words, tmp_path / "out"))
    for step, values in enumerate(want_log):
        assert log[step] == pytest.approx(values, rel=1e-6), step
    for name, value in want.items():
        assert (weights[name] - value).abs().max() <= 1e-6 * value.abs().max(), name


def test_processes_that_do_not_know_of_each_other(checkpoints, tmp_path):
    """DeepSpeed on CPUs without gloo."""
    config = ROOT / "accelerate_configs" / "fpdt_zero3_2cpu.yaml"
    result = launch(config, [*RUN, "--model", str(checkpoints / "llama")], tmp_path / "out", backend=None)
    assert result.returncode != 0
    assert "2 processes were started, and accelerate knows of 1: each would train a copy of its own" in result.stderr


def test_a_group_that_does_not_divide_the_processes(checkpoints, tmp_path):
    text = (ROOT / "accelerate_configs" / "fpdt_zero3_2cpu.yaml").read_text()
    (tmp_path / "config.yaml").write_text(text.replace("num_processes: 2", "num_processes: 3"))
    result = launch(tmp_path / "config.yaml", [*RUN, "--model", str(checkpoints / "llama")], tmp_path / "out")
    assert result.returncode != 0
    assert "sp_size=2 does not divide the 3 processes. Use one of 1, 3" in result.stderr


def with_deepspeed_file(folder: Path, block: dict, batch_size: int | str = "auto", **zero) -> Path:
    """ZeRO-3 on two CPUs, with a DeepSpeed configuration of one's own and hf_fpdt's settings in it."""
    settings = {
        "zero_optimization": {
            "stage": 3, "stage3_gather_16bit_weights_on_model_save": True, "stage3_param_persistence_threshold": 0,
            "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0, **zero,
        },
        "train_micro_batch_size_per_gpu": batch_size, "gradient_accumulation_steps": "auto", "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True, "fpdt": block,
    }  # fmt: skip
    (folder / "ds.json").write_text(json.dumps(settings))
    config = yaml.safe_load((ROOT / "accelerate_configs" / "fpdt_zero3_2cpu.yaml").read_text())
    config["deepspeed_config"] = {"deepspeed_config_file": str(folder / "ds.json"), "zero3_init_flag": True}
    del config["mixed_precision"]  # accelerate wants it in the other file then
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder / "config.yaml"


def test_settings_in_the_deepspeed_file_are_read(checkpoints, tmp_path):
    config = with_deepspeed_file(tmp_path, {"chunksize": 14})
    result = launch(config, [*RUN, "--model", str(checkpoints / "llama")], tmp_path / "out")
    assert result.returncode != 0
    assert 'The "fpdt" block of the DeepSpeed configuration sets chunksize, which is no setting' in result.stderr


def test_resume_in_the_middle_of_an_epoch(checkpoints, tmp_path):
    """Three steps at once, and two of them in another run from the checkpoint after the first."""
    config = ROOT / "accelerate_configs" / "fpdt_zero3_2cpu.yaml"
    words = [*RUN, "--model", str(checkpoints / "llama"), "--save_strategy", "steps", "--save_steps", "1"]
    check(tmp_path / "out", launch(config, words, tmp_path / "out"), *reference(checkpoints / "llama"))
    words += ["--resume_from_checkpoint", str(tmp_path / "out" / "checkpoint-1")]
    check(tmp_path / "again", launch(config, words, tmp_path / "again"), *reference(checkpoints / "llama"))


@pytest.mark.parametrize("engine", ["zero3", "fsdp2"])
def test_evaluation_and_prediction(engine, checkpoints, tmp_path):
    """On whole sequences, each on one process, after training on shared ones."""
    words = ["--model", str(checkpoints / "llama"), "--do_predict", "true", "--per_device_eval_batch_size", "2"]
    if engine == "zero3":
        result = launch(ROOT / "accelerate_configs" / "fpdt_zero3_2cpu.yaml", [*RUN, *words], tmp_path / "out")
    else:
        result = launch(of_gpus("fsdp2", tmp_path, groups=1, size=2), [*ON_CPU, *words], tmp_path / "out", backend=None)
    assert result.returncode == 0, result.stderr[-6000:]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, attn_implementation="eager").eval()
    samples = [
        {name: torch.tensor([ids]) for name, ids in sample.items()} for sample in Tokens(SAMPLES, 46, model.config.vocab_size)
    ]
    with torch.no_grad():
        outputs = [model(**sample) for sample in samples]
    right = [
        (output.logits[:, :-1].argmax(-1) == sample["labels"][:, 1:])[sample["labels"][:, 1:] != -100].sum().item()
        for output, sample in zip(outputs, samples, strict=True)
    ]
    log = json.loads((tmp_path / "out" / "log.json").read_text())
    evaluated = next(entry for entry in log if "eval_loss" in entry)
    predicted = log[-1]["predicted"]
    assert evaluated["eval_hits"] == predicted["test_hits"] == sum(right) > 0
    # Trainer averages over batches of two, each the mean over its labels.
    counts = [(sample["labels"][:, 1:] != -100).sum().item() for sample in samples]
    sums = [output.loss.item() * count for output, count in zip(outputs, counts, strict=True)]
    batches = [(sums[i] + sums[i + 1]) / (counts[i] + counts[i + 1]) for i in range(0, SAMPLES, 2)]
    assert evaluated["eval_loss"] == pytest.approx(sum(batches) / len(batches), rel=1e-5)
    assert predicted["test_loss"] == pytest.approx(sum(batches) / len(batches), rel=1e-5)


def test_a_killed_process_ends_the_run_and_it_resumes(checkpoints, tmp_path):
    """From the checkpoint of the step before, to the same losses and weights."""
    config = ROOT / "accelerate_configs" / "fpdt_zero3_2cpu.yaml"
    words = ["--model", str(checkpoints / "llama"), "--save_strategy", "steps", "--save_steps", "1"]
    result = launch(config, ["-m", "hf_fpdt.run", "tests/launched/killed.py", *words], tmp_path / "out")
    assert result.returncode != 0
    assert "Signal 9 (SIGKILL)" in result.stderr
    assert not (tmp_path / "out" / "log.json").exists()
    words += ["--resume_from_checkpoint", str(tmp_path / "out" / "checkpoint-1")]
    result = launch(config, [*RUN, *words], tmp_path / "out")
    check(tmp_path / "out", result, *reference(checkpoints / "llama"))


def test_a_script_that_imports_hf_fpdt(checkpoints, tmp_path):
    """Without `hf_fpdt.run`. ZeRO-3 without reduce-scatter averages over other processes than with it."""
    script, folder = tmp_path / "script.py", str(ROOT / "tests" / "launched")
    script.write_text(f"import sys\nimport hf_fpdt\nsys.path.insert(0, {folder!r})\nimport train\ntrain.main()\n")
    config = with_deepspeed_file(tmp_path, {"save_attention": False}, reduce_scatter=False)
    result = launch(config, [str(script), "--model", str(checkpoints / "llama")], tmp_path / "out", fresh=True)
    check(tmp_path / "out", result, *reference(checkpoints / "llama"))


def test_a_loop_of_ones_own_and_its_collectives(checkpoints, tmp_path):
    """A layer's weights are gathered once a pass, whether it runs in one chunk or in five; exchanges grow with the chunks."""
    found = []
    for chunk_size in (46, 10):
        folder = tmp_path / str(chunk_size)
        folder.mkdir()
        config = with_deepspeed_file(folder, {}, batch_size=1)
        if chunk_size == 10:  # from code, and not from the launch configuration
            text = yaml.safe_load(config.read_text())
            del text["parallelism_config"]
            config.write_text(yaml.safe_dump(text))
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), "--main_process_port", "0"]
        command += ["tests/launched/loop.py", str(checkpoints / "llama"), str(folder / "found.json")]
        command += ["10"] if chunk_size == 10 else []
        variables = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": PATH}
        result = run(command, timeout=200, env=ENVIRONMENT | variables, cwd=ROOT)
        assert result.returncode == 0, result.stderr[-3000:]
        found.append(json.loads((folder / "found.json").read_text()))
    one, five = (run["collectives"] for run in found)
    assert found[0]["losses"] == pytest.approx(found[1]["losses"], rel=1e-6)
    layers, exchanges = 2, 2 * (2 + 4)  # for each of two groups of heads
    assert one.pop("all_to_all_single") == layers * exchanges
    assert five.pop("all_to_all_single") == layers * exchanges * 5
    assert one == five, (one, five)
    assert one["all_gather_into_tensor"] >= 2 * layers


def test_label_smoothing_is_refused(checkpoints, tmp_path):
    """Trainer would leave it out without a word."""
    config = ROOT / "accelerate_configs" / "fpdt_zero3_2cpu.yaml"
    words = [*RUN, "--model", str(checkpoints / "llama"), "--label_smoothing_factor", "0.1"]
    result = launch(config, words, tmp_path / "out")
    assert result.returncode != 0
    assert "label_smoothing_factor=0.1 with sp_size=2: Trainer smooths no labels of shared sequences" in result.stderr
