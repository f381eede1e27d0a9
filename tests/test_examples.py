"""The example scripts, run as a user runs them: each in a process of its own, on a CPU, with tiny models."""

import json
import math
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from documented import as_tried, command
from started import run

pytest.importorskip("datasets")
pytest.importorskip("matplotlib")

EXAMPLE = Path(__file__).parents[1] / "examples" / "finetune_long_context.py"
SEQ_LEN, STEPS, CHUNK = 256, 3, 100  # the last of three chunks is shorter


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Two documents of real text; what the tests write lands next to them."""
    directory = tmp_path_factory.mktemp("examples")
    for name in ("argparse.py", "typing.py"):
        shutil.copy(Path(sysconfig.get_paths()["stdlib"]) / name, directory / name)
    return directory


def finetune(directory: Path, output: str, *arguments: str) -> subprocess.CompletedProcess:
    # One thread: several on a busy machine wait for each other far longer than such small models compute.
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": "",
        "HF_DATASETS_CACHE": str(directory / "datasets"),
        "OMP_NUM_THREADS": "1",
    }
    files = [str(directory / name) for name in ("argparse.py", "typing.py")]
    settings = {"output_dir": directory / output, "seq_len": SEQ_LEN, "max_steps": STEPS, "vocab_size": 512}
    settings = [item for name, value in settings.items() for item in (f"--{name}", str(value))]
    command = [sys.executable, str(EXAMPLE), "--train_file", *files, *settings, *arguments]
    return run(command, env=environment, cwd=directory, timeout=300)


def recorded(directory: Path, output: str) -> dict:
    return json.loads((directory / output / "losses.json").read_text())["runs"]


@pytest.fixture(scope="module")
def llama(directory):
    return finetune(directory, "llama", "--compare_with", "sdpa", "--chunk_size", str(CHUNK))


def assert_same_losses(directory: Path, output: str) -> None:
    runs = recorded(directory, output)
    fpdt, sdpa = runs["fpdt"], runs["sdpa"]
    assert fpdt["steps"] == sdpa["steps"] == list(range(1, STEPS + 1))
    assert all(math.isfinite(loss) for loss in fpdt["losses"])
    assert fpdt["losses"] == pytest.approx(sdpa["losses"], rel=0, abs=1e-5)
    assert fpdt["eval_loss"] == pytest.approx(sdpa["eval_loss"], rel=0, abs=1e-5)
    assert (directory / output / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_llama_learns_like_sdpa(directory, llama):
    assert llama.returncode == 0, llama.stderr
    assert_same_losses(directory, "llama")
    assert "largest difference" in llama.stdout


@pytest.fixture(scope="module")
def neox(directory):
    options = ("--model_type", "gpt_neox", "--gradient_checkpointing", "true", "--gradient_accumulation_steps", "2")
    return finetune(directory, "neox", "--compare_with", "sdpa", "--chunk_size", str(CHUNK), *options)


def test_gpt_neox_learns_like_sdpa_with_checkpointing_and_accumulation(directory, neox):
    assert neox.returncode == 0, neox.stderr
    assert_same_losses(directory, "neox")


def test_saved_model_is_a_checkpoint_to_start_from(directory, llama):
    assert llama.returncode == 0, llama.stderr
    options = ("--model_name_or_path", str(directory / "llama"), "--learning_rate", "3e-3", "--group")
    result = finetune(directory, "again", "--kernel", "naive", *options)
    assert result.returncode == 0, result.stderr
    before, after = recorded(directory, "llama")["fpdt"], recorded(directory, "again")["fpdt"]
    assert max(after["losses"]) < before["losses"][0]


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ([5.0, 6.0], None),  # two batches, one harder than the other
        ([5.0, 4.9, 5.1, 4.8, 4.7, 4.9, 4.6, 4.5], None),
        ([4.0, 4.2, 4.1, 4.0, 4.1, 4.1, 4.2, 4.3], "did not fall: 4.1000 at the start, 4.2500 at the end"),
        ([4.0, math.nan], "not finite at step 2"),
    ],
)
def test_the_check_of_the_losses(monkeypatch, losses, message):
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    from training_record import Run, check_learned

    run = Run("fpdt")
    run.steps, run.losses = list(range(1, len(losses) + 1)), losses
    if message is None:
        check_learned(run)
    else:
        with pytest.raises(SystemExit, match=message):
            check_learned(run)


@pytest.mark.parametrize("name", ["llama", "neox"])
def test_a_checkpoint_is_continued_at_four_times_its_length(name, directory, request, reader):
    """With YaRN, by the command line of the examples: learns like sdpa, and keeps what it was trained with."""
    assert request.getfixturevalue(name).returncode == 0
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": SEQ_LEN}
    output = f"longer {name}"
    words = command("examples/README.md", "bash examples/extend_context_yarn.sh")
    names = {"path/to/checkpoint": directory / name, "books.jsonl": directory / "typing.py", "32768": SEQ_LEN}
    more = ["--bf16", "false", "--max_steps", STEPS, "--learning_rate", "3e-3", "--compare_with", "sdpa"]
    names["outputs/longer"] = directory / output
    printed = reader.run([*as_tried(words, names), *more], HF_DATASETS_CACHE=str(directory / "datasets"))
    assert "the model was made for" not in printed
    assert_same_losses(directory, output)
    before, after = (json.loads((directory / folder / "config.json").read_text()) for folder in (name, output))
    assert after["max_position_embeddings"] == 4 * SEQ_LEN
    assert after["rope_parameters"] == before["rope_parameters"] | rope
    assert ("partial_rotary_factor" in after["rope_parameters"]) == (name == "neox")


def test_sequences_longer_than_every_document_are_refused(directory):
    result = finetune(directory, "refused", "--seq_len", "1000000")
    assert result.returncode != 0
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("ValueError: --seq_len 1000000: no document is that long. The longest of 2 has ")
    assert "Lower --seq_len" in message
    assert not (directory / "refused" / "losses.json").exists()
