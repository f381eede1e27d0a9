"""
Points on many GPUs: what they are expected to take, what is refused, and one launch on CPUs against a plain loop.

A failure means GPU time spent on a point that cannot end or does not fit, or a published step that was no training step.
"""

import json
import os
import re
import shlex
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from transformers import LlamaForCausalLM

from benchmarks.ahead import Outcome
from benchmarks.launched import launched
from benchmarks.result_files import read_calls, read_rows
from benchmarks.scale import estimates, run
from benchmarks.scale import step as scale_step
from benchmarks.scale.points import SETS, ScaleSpec, launches_of, points_of
from benchmarks.scale.step import LEARNING_RATE, HostAhead, Rows
from benchmarks.shapes import llama_config
from hf_fpdt.host_arena import HostArena

ROOT = Path(__file__).parent.parent
LAYER, HEAD = 218_103_808, 4096 * 128256  # weights of Llama-3.1-8B
GIB = 2**30


def llama(tokens: int, layers: int, gpus: int = 4, **more) -> ScaleSpec:
    return ScaleSpec(gpus=gpus, seq_len=tokens, layers=layers, **more)


# Arithmetic


def test_seconds_of_a_point():
    """Weights and tokens, and half the square of attention, at 45% of 989 TFLOP/s; a forward of attention once more."""
    spec = estimates.settled(llama(1 << 20, 8, steps=2, trace=1 << 18), 1000, 74)
    assert spec.lengths == [2 * 65536, 1 << 20, 1 << 20, 1 << 18]

    def seconds(tokens, attention):
        flops = 6 * (8 * LAYER + HEAD) * tokens + 8 * attention * tokens**2 * 4096
        return flops / (4 * 0.45 * 989e12)

    again = estimates.settled(llama(1 << 20, 8, fpdt={"save_attention": False}), 1000, 74)
    assert estimates.estimate(again).seconds == pytest.approx(45 + seconds(131072, 8) + seconds(1 << 20, 8))
    locking = 0.7 * ((1 << 20) * (8 * 20608 + 8192) / GIB / 4 - 30)
    assert locking > 0
    assert estimates.estimate(spec).seconds == pytest.approx(45 + locking + sum(seconds(n, 6) for n in spec.lengths))


def test_two_groups_do_twice_the_work_on_all_gpus():
    one, two = (estimates.settled(llama(1 << 18, 8, sp=sp, fpdt={"chunk_size": 32768}), 500, 74) for sp in (4, 2))
    seconds = [estimates.estimate(spec).seconds - 45 for spec in (one, two)]
    assert seconds[1] == pytest.approx(2 * seconds[0])
    assert estimates.estimate(two).host_gib == pytest.approx(2 * estimates.estimate(one).host_gib)


@pytest.mark.parametrize(("saved", "per_token"), [(False, 12288), (True, 20608)])
def test_host_memory_of_a_million_tokens(saved, per_token):
    """Input, K and V of 4,096 and twice 1,024 in 16 bits; out, and 32 lse in 32; the final norm's input once."""
    want = (1 << 20) * (32 * per_token + 8192)
    assert estimates.host_bytes(llama(1 << 20, 32), saved) == want
    assert estimates.host_bytes(llama(1 << 20, 1), saved, 32) == want


def test_memory_of_steps_that_were_measured():
    """With learning rate 0 of SGD, 8 bytes a weight. Host: to the slab of 0.5 GiB a GPU, and up to 0.5 more for odd pieces."""
    rows = read_rows([ROOT / "benchmarks" / "results" / "shared_2xh200_2026-11-23.json"])
    rows = [row for row in rows if row["contender"] == "fpdt+liger"]
    assert len(rows) == 6
    for row in rows:
        spec = llama(row["seq_len"], row["layers"], row["gpus"], fpdt=row["fpdt"])
        spec = estimates.settled(spec, 1000, 141)
        assert 0 < row["host_gib"] * row["gpus"] - estimates.host_bytes(spec, True) / GIB < row["gpus"], row["seq_len"]
        assert 1 < estimates.gpu_bytes(spec, bytes_a_weight=8) / GIB / row["peak_gib"] < 1.3, row["seq_len"]


def test_what_a_step_of_all_layers_takes():
    spec = estimates.settled(llama(1 << 20, 8), 1000, 74)
    found = estimates.whole_model(spec, 100.0)
    assert found["step_s_at_most"] == 400
    attention = 6 * (1 << 20) * 4096
    rest, layer = 6 * HEAD, 6 * LAYER + attention
    assert found["step_s_by_operations"] == pytest.approx(100 * (32 * layer + rest) / (8 * layer + rest))
    assert found["host_gib"] * GIB == (1 << 20) * (32 * 20608 + 8192)


# Choices and refusals


@pytest.mark.parametrize(("host_gib", "saved"), [(751, True), (749, False), (452, False)])
def test_attention_is_saved_where_the_host_has_the_memory(host_gib, saved):
    """652 and 392 GiB, and 15% to spare."""
    assert estimates.settled(llama(1 << 20, 32), host_gib, 74).fpdt == {"chunk_size": 65536, "save_attention": saved}


@pytest.mark.parametrize(
    ("spec", "host_gib", "message"),
    [
        (llama(1 << 20, 32), 450, r"--layers 32 --seq-len 1048576 on 1 x 4 GPUs: 451 GiB .* there are 450 \(--host-gib\)"),
        (
            llama(1 << 20, 32, fpdt={"save_attention": True}),
            749,
            "750 GiB of host memory .* leave save_attention out of --fpdt",
        ),
        (llama(1 << 17, 32, 1), 500, r"on 1 x 1 GPUs: up to \d+ GiB a GPU are needed, and there are 74 \(--gpu-gib\)"),
    ],
)
def test_points_that_do_not_fit(spec, host_gib, message):
    with pytest.raises(ValueError, match=message):
        estimates.settled(spec, host_gib, 74)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seq-len", "64"], "--layers None"),
        (["--seq-len", "64,128,256", "--layers", "1,2"], "--layers 1,2 with 3 points: one number, or as many as points"),
        (["--seq-len", "64,128", "--layers", "1", "--steps", "1,2,3"], "--steps 1,2,3 with 2 points"),
        (["--set", "main", "--layers", "2"], "--layers 2, .* a set has its own"),
        (["--set", "main", "--shape", "tiny"], "--shape tiny, .* a set has its own"),
        (["--set", "main", "--only", "8"], "--only 8: --set main has points 1 to 7"),
        (["--set", "main", "--gpus", "2"], "--set main --gpus 2: there are trial on 2, "),
        (["--seq-len", "64", "--layers", "2", "--sp", "3"], "--sp 3 with --gpus 4 and 32 heads"),
        (["--seq-len", "64", "--layers", "2", "--sp", "1"], "on several GPUs at least 2"),
        (["--seq-len", "66", "--layers", "2"], "--seq-len 66, --trace 0: --sp 4 has to divide them"),
        (["--seq-len", "64", "--layers", "2", "--shape", "70b"], "--shape 70b"),
        (["--seq-len", "64", "--layers", "2", "--shape", "gpt-2.7b"], "for GPTs the contender fpdt"),
        (["--seq-len", "64", "--layers", "2", "--contender", "ring"], "--contender ring"),
        (["--seq-len", "64", "--layers", "2", "--contender", "fpdt+liger", "--device", "cpu"], "on GPUs"),
        (["--seq-len", "64", "--layers", "0"], "one layer, one GPU"),
    ],
)
def test_bad_options_end_the_command_before_it_starts(words, message):
    words = ["--host-gib", "500", *([] if "--gpus" in words else ["--gpus", "4"]), *words]
    with pytest.raises(ValueError, match=message):
        run.specs_of(run._arguments(words))


@pytest.mark.parametrize("gpus", [4, 8])
@pytest.mark.parametrize("name", SETS)
def test_every_set_fits_a_call(name, gpus):
    """Nine minutes by estimate, of 512 and 560 GiB what is left beside the system, and an H100 of 80 GB."""
    specs = [estimates.settled(spec, {4: 490, 8: 540}[gpus], 74) for spec in points_of(name, gpus)]
    seconds = [estimates.estimate(spec).seconds for launch in launches_of(specs) for spec in launch]
    assert sum(seconds) <= (120 if name == "trial" else 540)
    assert max(spec.gpus for spec in specs) == gpus


def test_points_of_lengths_and_of_a_set():
    def specs_of(words: str) -> list[ScaleSpec]:
        return run.specs_of(run._arguments(["--gpus", "4", "--host-gib", "500", *words.split()]))

    specs = specs_of("--seq-len 262144,524288 --layers 32,16 --steps 2,1 --trace 65536 --shape qwen3-8b")
    assert [(spec.seq_len, spec.layers, spec.depth, spec.steps, spec.trace) for spec in specs] == [
        (262144, 32, 36, 2, 65536),
        (524288, 16, 36, 1, 65536),
    ]
    (spec,) = specs_of("--set reach --only 2 --contender fpdt")
    assert (spec.seq_len, spec.contender) == (4 << 20, "fpdt")
    assert "--parallelism_config_dp_replicate_size=2" in run.command([llama(1 << 18, 8, sp=2)])
    assert not any("dp_replicate" in word for word in run.command([spec]))


def test_the_commands_in_the_readme():
    text = (ROOT / "benchmarks" / "README.md").read_text()
    commands = re.findall(r"^python -m benchmarks\.scale\.run (.*?)(?: +#.*)?$", text, flags=re.M)
    assert len(commands) >= 6
    for words in commands:
        assert run.specs_of(run._arguments([*shlex.split(words), "--host-gib", "500"]))


def settled(*specs: ScaleSpec) -> list[ScaleSpec]:
    return [estimates.settled(spec, 500, 74) for spec in specs]


def test_points_that_share_a_launch():
    """Longer sequences of the same model and settings, in order; the first has the warm-up, and the start in its seconds."""
    short, long = llama(1 << 18, 4, steps=2, trace=1 << 17), llama(1 << 19, 4)
    ((one, two),) = launches_of(settled(short, long))
    assert one.lengths == [1 << 17, 1 << 18, 1 << 18, 1 << 17]
    assert two.lengths == [1 << 19]
    alone = launches_of(settled(long, short))
    assert [[spec.seq_len for spec in launch] for launch in alone] == [[1 << 19], [1 << 18]]
    assert estimates.estimate(alone[0][0]).seconds - estimates.estimate(two).seconds > 45
    others = [replace(long, layers=5), replace(long, shape="qwen3-8b"), replace(long, fpdt={"kv": "streamed"})]
    others += [replace(long, gpus=2, sp=2), replace(long, sp=2), llama(1 << 22, 4)]  # the last has larger chunks
    for other in others:
        assert len(launches_of(settled(short, other))) == 2, other


FOUND = {"step_s": 1.0, "first_step_s": 1.0, "host_gib": 0.0, "model_tflops": 1.0, "gpu": "G"}


def run_with(monkeypatch, out: Path, words: str, launch) -> list[dict]:
    monkeypatch.setattr(run, "launched", launch)
    monkeypatch.setattr("sys.argv", f"run --gpus 4 --host-gib 500 --out {out} {words}".split())
    run.main()
    (call,) = read_calls(out)
    assert call["header"]["command"].startswith("python -m benchmarks.scale.run --gpus 4")
    return call["rows"]


def said(point: int, **row) -> str:
    return json.dumps({"row": FOUND | {"point": point} | row})


def test_points_that_cannot_end_in_time_are_not_started(tmp_path, monkeypatch):
    """Of the estimates of `mesh`, 85 and 67 s: with 70 s left the second is left out, and the row says so."""
    started = []

    def launch(words, seconds):
        started.append(([one["seq_len"] for one in json.loads(words[-1])], seconds))
        later = time.monotonic() + 30
        monkeypatch.setattr(run.time, "monotonic", lambda: later)
        return Outcome(0, said(0), "", 1.0)

    monkeypatch.setenv("NCCL_NVLS_ENABLE", "as it was")
    monkeypatch.setenv("TORCH_SYMM_MEM_DISABLE_MULTICAST", "to be put back")
    monkeypatch.delenv("TORCH_SYMM_MEM_DISABLE_MULTICAST")
    first, second = run_with(monkeypatch, tmp_path / "out.json", "--set mesh --time-limit 70", launch)
    ((lengths, seconds),) = started
    assert lengths == [1 << 18]
    assert 60 < seconds <= 70
    assert (first["step_s"], first["estimated_host_gib"]) == (1.0, 84.5)
    assert second["not_run"] == "not started within 70 s"
    assert run.os.environ["NCCL_NVLS_ENABLE"] == "as it was"
    assert run.os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] == "1"


WORDS = "--seq-len 65536,131072,262144 --layers 4"


@pytest.mark.parametrize(
    ("words", "outcome", "ends"),
    [
        ("", Outcome(0, f"{said(0)}\n{said(1)}\n{said(1, trace=7)}\n{said(2)}", "", 9.0), ["", "trace", ""]),
        ("", Outcome(1, f"{said(0)}\n{said(1, out_of_memory=True)}", "ChildFailedError", 9.0), ["", "out_of_memory", "error"]),
        ("", Outcome(1, said(0), "ChildFailedError", 9.0), ["exit_status", "error", "error"]),
        ("--time-limit 99", Outcome(-9, said(0), "", 99.0), ["exit_status", "not_run", "not_run"]),
        ("--time-limit 99", Outcome(-9, "", "", 99.0), ["not_run"] * 3),
    ],
)
def test_every_point_of_a_launch_has_a_row(tmp_path, monkeypatch, words, outcome, ends):
    """Also those of one that ended early; a point that ended before the next was begun has no exit status."""
    rows = run_with(monkeypatch, tmp_path / "out.json", f"{WORDS} {words}", lambda *_: outcome)
    assert [row["seq_len"] for row in rows] == [65536, 131072, 262144]
    assert [row.get("ran_before") for row in rows] == [None, [65536], [65536, 131072]]
    kinds = ("error", "out_of_memory", "not_run", "exit_status", "trace")
    assert [next((kind for kind in kinds if kind in row), "") for row in rows] == ends
    if "not_run" in ends:
        assert rows[2]["not_run"] == "not ended within 99 s"


def test_ranks_end_with_a_point_that_takes_too_long(tmp_path):
    """As torch's launcher starts them: in sessions of their own, with the launcher's output."""
    child = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], start_new_session=True)"
    started = time.monotonic()
    outcome = launched([sys.executable, "-c", parent], 2.0)
    assert (outcome.returncode, outcome.stdout) == (-signal.SIGKILL, "")
    assert time.monotonic() - started < 30
    pid, killed = int((tmp_path / "pid").read_text()), time.monotonic()
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() - killed < 10, "of the 60 s that it sleeps"
        time.sleep(0.01)


def test_host_memory_is_locked_ahead_and_left_free(monkeypatch):
    """What a point needs at the most, in slabs that the next point's tensors fit as well."""
    monkeypatch.setattr(scale_step, "_SLAB_BYTES", 2 << 20)
    locked = []
    arena = HostArena(slab_bytes=1 << 12, lock=lambda slab: locked.append(slab.numel()), unlock=lambda slab: None)
    host = HostAhead(arena)
    host.begin(3 << 20)
    host.lock(3 << 20)
    assert (locked, arena.used_bytes) == ([2 << 20, 1 << 20], 0)
    host.lock(7 << 20)
    assert (locked, arena.used_bytes) == ([2 << 20, 1 << 20, 2 << 20, 2 << 20], 0)
    host.lock(6 << 20)
    arena.take(2 << 20)
    assert sum(locked) == 7 << 20


# A launch


def test_sequences_go_round_as_accelerate_deals_them_out():
    """Two groups of two: in a round ranks 0 and 1 have two steps of the first group, 2 and 3 those of the second."""
    rows = Rows([llama(64, 1, 4, sp=2, warm_tokens=32), llama(64, 1, 4, sp=2)], 100)
    assert len(rows) == 8
    lengths = [len(rows[index]["input_ids"]) for index in range(8)]
    assert lengths == [32, 64, 32, 64, 64, 2, 64, 2]
    for index, (step, group) in {0: (0, 0), 1: (1, 0), 3: (1, 1), 4: (2, 0), 6: (2, 1)}.items():
        want = torch.randint(0, 100, (lengths[index],), generator=torch.Generator().manual_seed(1000 * group + step))
        assert torch.equal(rows[index]["input_ids"], want)
        assert torch.equal(rows[index]["labels"], want)


def plain_loop(lengths: list[int], groups: int, rate: float) -> list[tuple[float, float]]:
    """Loss and gradient norm of every step of the same training in one process, with eager attention and torch's AdamW."""
    from transformers.initialization import no_init_weights

    torch.manual_seed(0)
    config = llama_config("tiny", 2)
    config._attn_implementation = "eager"
    with no_init_weights():  # as under ZeRO-3, where weights are drawn once the model is there
        model = LlamaForCausalLM(config).train()
    model.apply(model._init_weights)
    optimizer, found = torch.optim.AdamW(model.parameters(), lr=rate), []
    for step, length in enumerate(lengths):
        losses = []
        for group in range(groups):
            ids = torch.randint(0, 512, (1, length), generator=torch.Generator().manual_seed(1000 * group + step))
            losses.append(model(input_ids=ids, labels=ids).loss)
        loss = sum(losses) / groups
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        found.append((loss.item(), norm.item()))
    return found


def launch(monkeypatch, out: Path, *words: str) -> list[dict]:
    command = ["run", "--shape", "tiny", "--device", "cpu", "--seq-len", "512,640", "--layers", "2", "--steps", "2,1"]
    monkeypatch.setattr("sys.argv", [*command, "--fpdt", '{"chunk_size": 128}', "--out", str(out), *words])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]))
    monkeypatch.chdir(ROOT)
    run.main()
    (rows,) = (call["rows"] for call in read_calls(out))
    for row in rows:
        assert "error" not in row, row["error"]
    return rows


@pytest.mark.parametrize(("gpus", "groups"), [(2, 1), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_a_launch_on_cpus_is_a_training_run(tmp_path, monkeypatch, gpus, groups):
    """Every loss of both points, and their last gradient norms; the steps of AdamW are in the losses after them."""
    pytest.importorskip("deepspeed")
    row, longer = launch(monkeypatch, tmp_path / "out.json", "--gpus", str(gpus), "--sp", "2")
    want = plain_loop([256, 512, 512, 640], groups, LEARNING_RATE)
    assert row["losses"] + longer["losses"] == pytest.approx([loss for loss, _ in want], abs=2e-6)
    assert [row["grad_norm"], longer["grad_norm"]] == pytest.approx([want[2][1], want[3][1]], rel=1e-5)
    untrained = plain_loop([256, 512, 512, 640], groups, 0.0)
    assert max(abs(one - two) for (one, _), (two, _) in zip(want, untrained, strict=True)) > 1e-5
    assert (row["gpus"], row["sp"], row["dp"], row["depth"], row["warm_tokens"]) == (gpus, 2, groups, 2, 256)
    assert (row["long_steps"], row["timed"], row["zero_stage"]) == (2, "median of the last 1", 3)
    assert (longer["seq_len"], longer["timed"], longer["ran_before"]) == (640, "the only long step", [512])
    assert row["fpdt"] == {"chunk_size": 128, "save_attention": True}
    assert row["step_s"] == row["all_steps_s"][1]
    assert row["tokens_per_s_per_gpu"] == pytest.approx(groups * 512 / row["step_s"] / gpus)
    assert row["whole_model"]["step_s_at_most"] == row["step_s"]
    assert {
        "ready_s",
        "waited_for_locking_s",
        "warm_step_s",
        "host_gib",
        "host_gib_of_all",
        "estimated_seconds",
        "estimated_gpu_gib",
    } <= set(row)
