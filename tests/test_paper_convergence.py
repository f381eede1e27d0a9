"""The paper's figure 14: every run trains the same, in one process or in two, and the verdict is about the losses it says."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import launched as launching
from benchmarks.ahead import Outcome
from benchmarks.launched import Job, launched, spread
from benchmarks.paper import convergence
from benchmarks.paper.convergence_run import RUNS, Spec, command, mean_at, rate, train
from benchmarks.result_files import read_calls

ROOT = Path(__file__).parent.parent
STEPS = 24


# Runs


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """Two pieces to train on, of few different tokens: the loss falls from 9.0 to 8.9 in 24 steps."""
    path = tmp_path_factory.mktemp("data") / "pieces.pt"
    torch.save(torch.randint(0, 60, (6, 64), generator=torch.Generator().manual_seed(0)), path)
    return str(path)


@pytest.fixture(scope="module")
def plain(pieces):
    return train(Spec(run="sdpa", family="llama", pieces=pieces, steps=STEPS, tiny=True))


@pytest.mark.parametrize("run", ["fpdt", "offload"])
def test_fpdt_trains_as_sdpa_does(run, pieces, plain):
    row = train(Spec(run=run, family="llama", pieces=pieces, steps=STEPS, tiny=True))
    assert row["fpdt"]["chunk_size"] == 16
    assert row["losses"] == pytest.approx(plain["losses"], abs=1e-4)
    assert row["held_out"] == pytest.approx(plain["held_out"], abs=1e-4)


def test_another_seed_does_not(pieces, plain):
    row = train(Spec(run="seed", family="llama", pieces=pieces, steps=STEPS, tiny=True))
    assert plain["losses"][0] - plain["losses"][-2] > 0.1
    assert max(abs(a - b) for a, b in zip(row["losses"], plain["losses"], strict=True)) > 1e-3


@pytest.mark.slow
def test_two_processes_with_zero3_train_as_one(pieces, plain):
    """Same data in the same order, weights, schedule and clipping: a wrong one of these changes losses by more than 1e-4."""
    pytest.importorskip("deepspeed")
    spec = Spec(run="zero3", family="llama", pieces=pieces, steps=STEPS, tiny=True)
    outcome = launched(command(spec, "cpu"), 240)
    found = [line for line in outcome.stdout.splitlines() if line.startswith('{"row": ')]
    assert len(found) == 1, outcome.stderr[-4000:]
    row = json.loads(found[0])["row"]
    assert row["gpus"] == 2
    assert row["losses"] == pytest.approx(plain["losses"], abs=1e-4)
    assert row["held_out"] == pytest.approx(plain["held_out"], abs=1e-4)


def test_a_run_that_is_late_has_the_steps_until_then(pieces):
    row = train(Spec(run="sdpa", family="gpt_neox", pieces=pieces, steps=STEPS, tiny=True, deadline=time.time()))
    assert len(row["losses"]) == 10


def test_the_rate():
    assert rate(0, 300) == pytest.approx(1 / 20)
    assert rate(19, 300) == pytest.approx(1, abs=0.01)
    assert rate(300, 300) == pytest.approx(0.1)


def test_the_whole_command(tmp_path, monkeypatch, capsys):
    """Two at once, and their rows in the order of the figure."""
    out = tmp_path / "found"
    words = "--families llama --runs fpdt,sdpa --gpus 2 --tiny --seq-len 64 --steps 12 --max-documents 2"
    monkeypatch.setattr("sys.argv", ["convergence", *words.split(), "--out", str(out)])
    monkeypatch.chdir(ROOT)
    convergence.main()
    assert "no verdict" in capsys.readouterr().out
    (call,) = read_calls(f"{out}.json")
    assert [row["run"] for row in call["rows"]] == ["sdpa", "fpdt, no offload"]
    assert call["rows"][1]["losses"] == pytest.approx(call["rows"][0]["losses"], abs=1e-4)
    assert call["header"]["command"].startswith("python -m benchmarks.paper.convergence --families llama")
    assert (tmp_path / "found.png").stat().st_size > 10_000


# Verdicts


def row(family: str, run: str, losses: list[float]) -> dict:
    return {"family": family, "run": RUNS[run].name, "fpdt": RUNS[run].fpdt, "losses": losses}


def test_verdicts_are_about_the_end_and_about_the_last_step_of_what_ended_early():
    base = [9.0] * 10 + [5.0] * 30
    rows = [row("llama", "sdpa", base), row("llama", "seed", [loss + 0.1 for loss in base])]
    rows += [row("llama", "fpdt", [loss - 0.05 for loss in base]), row("llama", "offload", [loss + 0.02 for loss in base[:30]])]
    found, at_the_end = convergence.verdicts(rows)
    assert at_the_end["step"] == 40
    assert list(at_the_end["fpdt"]) == [RUNS["fpdt"].name]
    assert found["step"] == 30
    assert len(found["fpdt"]) == 2
    assert found["sdpa"] == mean_at(base, 30) == 5.0
    assert found["another_seed"] == pytest.approx(0.1)
    assert found["largest"] == pytest.approx(-0.05)
    assert found["within_noise"]
    assert "0.0500 from sdpa (5.0000) at most, no more than another seed (0.1000)" in convergence.said(found)
    rows.append(row("llama", "zero3", [loss - 0.2 for loss in base]))
    found, _ = convergence.verdicts(rows)
    assert found["largest"] == pytest.approx(-0.2)
    assert "MORE than another seed" in convergence.said(found)


def test_no_verdict_without_both_seeds():
    rows = [row("llama", "sdpa", [1.0] * 20), row("llama", "fpdt", [1.0] * 20), row("gpt_neox", "seed", [1.0] * 20)]
    assert convergence.verdicts(rows) == []
    assert convergence.verdicts([{"family": "llama", "run": "sdpa", "not_run": "late"}]) == []


def test_results_of_several_calls_are_drawn_together(tmp_path, monkeypatch, capsys):
    for name, runs in (("one", ["fpdt", "seed"]), ("two", ["sdpa"])):
        rows = [row("llama", run, [5.0] * 30) | {"parameters": 1, "seq_len": 64} for run in runs]
        (tmp_path / f"{name}.json").write_text(json.dumps({"header": {}, "rows": rows}))
    files = [str(tmp_path / f"{name}.json") for name in ("one", "two")]
    words = ["convergence", "--read", *files, "--out", str(tmp_path / "o")]
    monkeypatch.setattr("sys.argv", words)
    convergence.main()
    assert "llama: after 30 steps" in capsys.readouterr().out
    assert (tmp_path / "o.png").exists()
    assert not (tmp_path / "o.json").exists()


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--runs", "sdpa,ring"], "--runs: got 'ring'"),
        (["--families", "gpt2"], "--families: got 'gpt2'"),
        (["--runs", "sdpa,zero3"], "--runs zero3 with --gpus 1"),
        (["--gpus", "0"], "--gpus 0"),
    ],
)
def test_bad_options(words, text):
    with pytest.raises(ValueError, match=text):
        convergence._arguments(words)


def test_which_runs_there_are_without_being_asked():
    assert convergence._arguments([]).runs == ["sdpa", "seed", "fpdt", "offload"]
    assert convergence._arguments(["--gpus", "2"]).runs == list(RUNS)
    assert convergence._arguments(["--runs", "fpdt, offload"]).runs == ["fpdt", "offload"]


# GPUs


def test_jobs_have_gpus_of_their_own(monkeypatch):
    """A job of two GPUs waits until two are free, and those behind it do not wait for it."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,7")
    seconds, seen = {"a": 0.3, "b": 0.6, "pair": 0.1, "c": 0.1}, []

    def run(command, left, environment):
        seen.append((command[0], environment["CUDA_VISIBLE_DEVICES"], time.monotonic()))
        time.sleep(seconds[command[0]])
        return Outcome(0, command[0], "", seconds[command[0]])

    monkeypatch.setattr(launching, "launched", run)
    jobs = [Job(["a"]), Job(["b"]), Job(["pair"], gpus=2), Job(["c"])]
    found = list(spread(jobs, 3, None, None))
    assert sorted(index for index, _ in found) == [0, 1, 2, 3]
    assert all(jobs[index].command == [outcome.stdout] for index, outcome in found)
    assert [(name, gpus) for name, gpus, _ in seen] == [("a", "4"), ("b", "5"), ("c", "7"), ("pair", "4,7")]


def test_no_job_starts_late():
    now = time.monotonic()
    jobs = [Job([sys.executable, "-c", "print(1)"])] * 2
    assert list(spread(jobs, 1, now, None)) == [(0, None), (1, None)]
    (first, outcome), second = spread([Job([sys.executable, "-c", "import time; time.sleep(9)"])] * 2, 1, now + 0.2, now + 1)
    assert (first, outcome.returncode, second) == (0, -9, (1, None))
    assert outcome.seconds < 5


def test_more_gpus_than_there_are(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(ValueError, match="--gpus 2: CUDA_VISIBLE_DEVICES=0 names 1"):
        list(spread([], 2, None, None))
