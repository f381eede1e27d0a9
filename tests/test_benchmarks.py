"""The arithmetic of the benchmarks: a wrong number here would be published as a result."""

import argparse
import gzip
import io
import itertools
import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch
from started import run
from torch._subclasses import FakeTensorMode
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import hf_fpdt  # makes "fpdt" known
from benchmarks import (
    ballast,
    chunk_sizes,
    contenders,
    growth,
    overlap,
    point,
    shared_point,
    shared_step,
    shared_trace,
    train_step,
)
from benchmarks.ahead import Outcome, run_ahead
from benchmarks.overlap import marks_of
from benchmarks.point import Spec
from benchmarks.result_files import read_calls, read_rows, table
from benchmarks.shapes import DEPTHS, llama_config, model_config, step_flops
from hf_fpdt.step_trace import StepTrace
from hf_fpdt.timeline import hidden_fraction, read_lanes, union

ROOT = Path(__file__).parent.parent
RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


# Shapes and operations


@pytest.mark.parametrize(
    ("shape", "layers", "parameters"),  # as their authors publish them
    [
        ("llama-3.1-8b", 32, 8_030_261_248),
        ("llama-3.2-3b", 28, 3_212_749_824),
        ("llama-3.2-1b", 16, 1_235_814_400),
        ("qwen3-8b", 36, 8_190_735_360),
    ],
)
def test_shapes_are_those_of_the_models(shape, layers, parameters):
    assert DEPTHS[shape] == layers
    with FakeTensorMode():  # no memory is taken
        model = AutoModelForCausalLM.from_config(model_config(shape, layers))
    assert model.num_parameters() == parameters


def test_step_flops_of_an_8b_llama():
    """Against the terms written out: 218,103,808 weights a layer, 525,336,576 of the head, half of S^2 in attention."""
    config, seq_len = llama_config("llama-3.1-8b", 4), 65536
    layer = 4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 14336
    assert layer == 218_103_808
    dense = 6 * (4 * layer + 4096 * 128256) * seq_len
    attention = 4 * 3 * (4 * seq_len * seq_len * 32 * 128) / 2  # 4 operations a pair and dimension, backward twice the forward
    assert step_flops(config, seq_len) == pytest.approx(dense + attention, rel=1e-12)


def test_step_flops_of_a_1b_llama_trained_in_full_and_frozen():
    """Heads of 64, and a tied head whose product is counted once, the lookup not; frozen weights need two thirds."""
    config, seq_len = llama_config("llama-3.2-1b", 16), 1000
    dense = 16 * 60_817_408 + 2048 * 128256
    attention = 16 * 3 * (4 * seq_len * seq_len * 32 * 64) / 2
    assert step_flops(config, seq_len) == pytest.approx(6 * dense * seq_len + attention, rel=1e-12)
    assert step_flops(config, seq_len, frozen=True) == pytest.approx(4 * dense * seq_len + attention, rel=1e-12)


# Processes


CHILD = """
import json, sys, time
begun = time.time()
time.sleep(0.3)
ready = time.time()
line = sys.stdin.readline()
going = time.time()
time.sleep(0.6)
print(json.dumps({"begun": begun, "ready": ready, "going": going, "end": time.time(), "line": line}))
"""


def test_the_next_process_gets_ready_while_one_works():
    command = [sys.executable, "-c", CHILD]
    times = [json.loads(outcome.stdout) for outcome in run_ahead([command] * 3, lambda: True)]
    assert [one["line"] for one in times] == ["go\n"] * 3
    for before, after in itertools.pairwise(times):
        assert after["ready"] < before["end"] <= after["going"]
    assert times[2]["begun"] >= times[0]["end"]  # one ahead, not more


def test_crashes_do_not_stop_the_rest_and_nothing_runs_late():
    crash = [sys.executable, "-c", "raise SystemExit('ended early')"]
    works = [sys.executable, "-c", "print('worked', input())"]
    killed = [sys.executable, "-c", "import os; input(); os.kill(os.getpid(), 9)"]
    answers = iter([True, True, True, True, False, True])
    outcomes = list(run_ahead([crash, works, killed, works, works, works], lambda: next(answers)))
    assert [one and one.returncode for one in outcomes] == [1, 0, -9, 0, None, None]
    assert outcomes[0].stderr == "ended early\n"
    assert outcomes[3].stdout == "worked go\n"


def test_a_waiting_process_ends_with_the_generator(tmp_path):
    mark = tmp_path / "pid"
    waits = [sys.executable, "-c", f"import os, time; open({str(mark)!r}, 'w').write(str(os.getpid())); time.sleep(60)"]
    outcomes = run_ahead([[sys.executable, "-c", "import time; time.sleep(1)"], waits], lambda: True)
    next(outcomes)
    while not mark.exists() or not mark.read_text():
        time.sleep(0.01)
    outcomes.close()
    with pytest.raises(ProcessLookupError):
        os.kill(int(mark.read_text()), 0)


SPEC = Spec(contender="fpdt", seq_len=256, shape="tiny", layers=2, fpdt={"chunk_size": 64}, device="cpu")


def test_every_end_of_a_point_is_a_row():
    def row_of(outcome):
        row = train_step.row_of(SPEC, outcome, 9)
        assert (row["contender"], row["seq_len"], row["fpdt"]) == ("fpdt", 256, {"chunk_size": 64})
        assert len(table([row])) == 1
        return row

    good = row_of(Outcome(0, 'noise\n{"row": {"out_of_memory": true}}\nmore noise\n', "warning", 1.23))
    assert good["out_of_memory"]
    assert good["process_s"] == 1.2
    assert "error" not in good
    crash = row_of(Outcome(1, "", "Traceback\nValueError: bad", 1.0))
    assert crash["error"].splitlines()[-1] == "ValueError: bad"
    assert row_of(Outcome(-9, "", "a warning", 1.0))["error"] == "a warning\nexit status -9"
    assert row_of(Outcome(-11, '{"row": {"out_of_memory": true}}', "", 1.0))["exit_status"] == -11
    assert row_of(None) | {"fpdt": None} == SPEC.row() | {"fpdt": None, "not_run": "not started within 9 s"}


def test_a_point_waits_without_cuda(monkeypatch):
    def refuse():
        raise AssertionError("CUDA was used before go")

    monkeypatch.setattr(torch.cuda, "_lazy_init", refuse)
    monkeypatch.setattr(point, "measure", lambda spec: refuse())
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))  # the parent is gone
    monkeypatch.setattr(sys, "argv", point.command(SPEC)[2:])
    point.main()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--contenders", "fpdt,flash"], "'flash'"),
        (["--shape", "70b"], "--shape 70b"),
        (["--repeats", "-1"], "repeats -1"),
        (["--ballast-gpu-gib", "-1"], "--ballast-gpu-gib"),
        (["--contenders", "liger", "--ballast-host-gib", "1"], "--ballast-host-gib with liger"),
        (["--contenders", "alst", "--shape", "qwen3-8b"], "take sdpa or fpdt or liger or fpdt[+]liger"),
    ],
)
def test_bad_options_end_the_command_before_it_starts(options, text):
    with pytest.raises(ValueError, match=text):
        train_step.specs_of(train_step._arguments(options))


def test_the_points_of_a_command():
    words = ["--contenders", "liger,fpdt", "--seq-lens", "8,16", "--fpdt", '[{"chunk_size": 4}, {}]', "--lora", "16"]
    specs = train_step.specs_of(train_step._arguments(words))
    assert [(spec.seq_len, spec.contender, spec.fpdt) for spec in specs] == [
        (n, *rest) for n in (8, 16) for rest in (("liger", {}), ("fpdt", {"chunk_size": 4}), ("fpdt", {}))
    ]
    assert {spec.lora for spec in specs} == {16}


def test_a_command_on_a_cpu(tmp_path):
    """The whole way, with a point that fails and the results written."""
    out = tmp_path / "out.json"
    words = "--shape tiny --device cpu --contenders sdpa,fpdt --seq-lens 256 --layers 2 --repeats 1 --optimizer adamw --fpdt"
    words = [*words.split(), '[{"chunk_size": 64}, {"chunk_size": 0}]', "--out", str(out)]
    done = run([sys.executable, "-m", "benchmarks.train_step", *words], timeout=200)
    assert done.returncode == 0, done.stderr
    sdpa, fpdt, failed = read_calls(out)[0]["rows"]
    assert "chunk_size=0" in failed["error"]
    assert fpdt["losses"] == pytest.approx(sdpa["losses"], rel=1e-3)
    assert len(fpdt["losses"]) == 2
    assert fpdt["kernel"] == "torch_cpu"
    assert [row["contender"] for row in read_rows([out])] == ["sdpa", "fpdt"]
    assert read_calls(out)[0]["header"]["command"].endswith("--out out.json")
    lines = done.stdout.splitlines()
    assert lines[:3] == lines[4:]
    assert "failed: ValueError" in lines[-1]


def test_a_shared_command_on_cpus(tmp_path):
    """Two launches under ZeRO-3, one process and two that share the sequence: the same loss and gradient norm."""
    out = tmp_path / "out.json"
    words = "--shape tiny --device cpu --contenders fpdt --gpus 1,2 --seq-lens 256 --layers 2 --repeats 1"
    words = [*words.split(), "--fpdt", '{"chunk_size": 64}', "--out", str(out)]
    command = [sys.executable, "-m", "benchmarks.shared_step", *words]
    done = run(command, timeout=280)
    assert done.returncode == 0, done.stderr
    alone, both = read_calls(out)[0]["rows"]
    assert (alone["gpus"], both["gpus"]) == (1, 2)
    assert alone["losses"] == pytest.approx(both["losses"], rel=1e-3)
    assert len(both["losses"]) == 2
    assert alone["engine"]["zero_stage"] == both["engine"]["zero_stage"] == 3
    assert alone["engine"]["grad_norm"] == pytest.approx(both["engine"]["grad_norm"], rel=1e-2)
    assert "fpdt on 2" in done.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"contender": "alst"}, "'alst'; one of fpdt, fpdt[+]liger, ulysses, ulysses[+]liger, ring, tensor"),
        ({"contender": "ring", "gpus": 1}, "ring on one GPU shares nothing"),
        ({"shape": "gpt"}, "--shape gpt"),
        ({"shape": "qwen3-8b", "contender": "ulysses"}, "qwen3-8b with --contenders ulysses: it knows Llama's modules only"),
        ({"gpus": 0}, "one layer, one GPU"),
    ],
)
def test_shared_points_that_cannot(options, message):
    good = {"contender": "fpdt", "gpus": 2, "seq_len": 64, "shape": "tiny", "layers": 1}
    shared_point.SharedSpec(**good)
    with pytest.raises(ValueError, match=message):
        shared_point.SharedSpec(**(good | options))


def test_one_gpu_is_measured_for_hf_fpdt_alone():
    words = ["--contenders", "ring,fpdt", "--gpus", "1,2", "--fpdt", '[{"chunk_size": 4}, {}]']
    specs = shared_step.specs_of(shared_step._arguments(words))
    assert [(spec.contender, spec.gpus, spec.fpdt) for spec in specs] == [
        ("ring", 2, {}),
        *(("fpdt", gpus, fpdt) for gpus in (1, 2) for fpdt in ({"chunk_size": 4}, {})),
    ]
    words = ["--contenders", "ring,fpdt", "--zero", '[{"reduce_bucket_size": 9}, {}]']
    specs = shared_step.specs_of(shared_step._arguments(words))
    assert [(spec.contender, spec.row().get("zero")) for spec in specs] == [
        ("ring", None),
        ("fpdt", {"reduce_bucket_size": 9}),
        ("fpdt", None),
    ]


def test_a_trace_tells_the_communication_apart():
    """Hidden is what ran under compute; another collective is not compute."""

    def kernel(name: str, start: float, stop: float) -> dict:
        return {"cat": "kernel", "name": name, "ts": start * 1e6, "dur": (stop - start) * 1e6}

    copy = {"cat": "gpu_memcpy", "name": "Memcpy DtoH (Device -> Pinned)", "ts": 0.0, "dur": 4e6, "args": {"bytes": 2 << 20}}
    events = [
        kernel("gemm", 0, 2),
        kernel("ncclDevKernel_SendRecv(x)", 1, 3),
        kernel("ncclDevKernel_AllGather_RING_LL(x)", 2, 6),
        kernel("gemm", 5, 6),
        copy,
    ]
    found = shared_trace.trace_summary({"traceEvents": events})
    assert found["compute"]["seconds"] == pytest.approx(3)
    assert found["all-to-all"] == {"seconds": pytest.approx(2), "hidden": pytest.approx(0.5)}
    assert found["engine"] == {"seconds": pytest.approx(4), "hidden": pytest.approx(0.25)}
    assert found["to host"] == {"seconds": pytest.approx(4), "hidden": pytest.approx(0.5)}
    assert found["to device"]["hidden"] is None


# One point


@pytest.fixture
def default_dtype():
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(("lora", "optimizer"), [(0, "none"), (0, "adamw"), (4, "adamw")])
def test_a_point_counts_weights_gradients_and_states(default_dtype, lora, optimizer):
    contenders.prepare("fpdt", lora)
    row = point.measure(Spec(**(vars(SPEC) | {"lora": lora, "optimizer": optimizer})))
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128 + 2 * 64
    weights = 2 * layer + 2 * 64 * 512 + 64
    adapters = 2 * lora * ((64 + 64) * 2 + (64 + 32) * 2)
    trained = adapters or weights
    assert row["weights_and_grads_gib"] * 2**30 == 2 * (weights + adapters + trained)
    steps = 4 * (2 * 4 * 2 if lora else 2 * 9 + 3)  # AdamW counts steps in an fp32 a tensor
    assert row["optimizer_gib"] * 2**30 == (0 if optimizer == "none" else 2 * 2 * trained + steps)
    assert (len(set(row["losses"])) > 1) == (optimizer == "adamw")  # the same tokens in every step
    assert "error" not in row


def test_losses_that_are_not_finite_fail(monkeypatch, default_dtype):
    model = LlamaForCausalLM(llama_config("tiny", 1))
    losses = iter([1.0, float("nan"), 1.0])

    def step(ids):
        assert model.lm_head.weight.grad is None  # every step starts without gradients
        model.lm_head.weight.grad = torch.zeros_like(model.lm_head.weight)
        return torch.tensor(next(losses))

    monkeypatch.setattr(contenders, "build", lambda *args, **kwargs: (model, step))
    assert "not all finite" in point.measure(SPEC)["error"]


def test_memory_on_a_gpu(monkeypatch):
    """Peak above what is there in every step: 8 GiB less weights, gradients, states and ballast."""
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 8 << 30)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 9 << 30)
    monkeypatch.setattr(point, "_host_gib", lambda device: 3.0)
    model = torch.nn.Linear(1 << 10, 1 << 10, bias=False)
    model.weight.grad = torch.zeros_like(model.weight)
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    held = ballast.Ballast(1, 1 << 28, 1 << 29, 1 << 30, [])
    row = point._memory(Spec(**(vars(SPEC) | {"device": "cuda"})), model, optimizer, held)
    assert row["weights_and_grads_gib"] == 2 * 2**22 / 2**30
    assert row["optimizer_gib"] == (2 * 2**22 + 4) / 2**30
    assert row["peak_above_gib"] == pytest.approx(8 - (4 * 2**22 + 4) / 2**30 - 0.75)
    assert (row["peak_gib"], row["reserved_gib"], row["host_gib"]) == (8, 9, 3)


def test_the_plan_of_a_run_is_in_its_row(default_dtype):
    settings = {"chunk_size": 64, "gpu_memory": 1 << 30, "offload": "host", "recompute": True, "kernel": "naive"}
    row = point.measure(Spec(**(vars(SPEC) | {"fpdt": settings})))
    kept = 2 * 256 * (2 * (64 + 2 * 32 + 64) + 4 * 4)  # layers * tokens * bytes of x, K, V, out and lse
    kept += 256 * 2 * 64  # the input of the final norm
    assert row["predicted_host_gib"] * 2**30 == pytest.approx(kept, rel=1e-3)
    assert 0 < row["predicted_peak_gib"] < 1
    assert "chunks of 64" in row["plan"][0]
    assert "predicted_peak_gib" not in point.measure(SPEC)  # nothing is measured on a CPU without a limit


def test_running_out_of_memory_is_told_from_a_crash():
    from hf_fpdt import HostMemoryError

    for error in (torch.OutOfMemoryError("x"), RuntimeError("CUDA error: out of memory"), HostMemoryError("x")):
        assert point.is_memory_shortage(error)
    assert not point.is_memory_shortage(RuntimeError("CUDA error: an illegal memory access was encountered"))


@pytest.mark.parametrize(("frozen", "optimizer", "copies"), [(False, False, 2), (False, True, 4), (True, True, 1)])
def test_ballast_is_what_the_absent_layers_would_hold(frozen, optimizer, copies):
    from hf_fpdt.transfers import transfers_for

    model = LlamaForCausalLM(llama_config("tiny", 1)).to(torch.bfloat16).requires_grad_(not frozen)
    arena = transfers_for(torch.device("cpu")).arena
    used = arena.used_bytes
    held = ballast.hold(model, 3, optimizer, gpu_gib=2**-10, host_gib=2**-9)
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128 + 2 * 64
    assert held.state_bytes == 3 * copies * 2 * layer
    tensors = [one for one in held.held if torch.is_tensor(one)]
    assert sum(t.numel() for t in tensors) == held.device_bytes == held.state_bytes + 2**20
    assert arena.used_bytes - used == 2**21
    assert held.row()["host_gib"] == 2**-9
    for piece in held.held[2:]:
        piece.give_back()


# Drawings and fits of results


def _row(contender, seq_len, peak, **more):
    row = {"contender": contender, "seq_len": seq_len, "layers": 4, "shape": "llama-3.1-8b", "gpu": "G", "step_s": 1.0}
    return row | {"peak_gib": peak, "weights_and_grads_gib": 7.0} | more


def test_growth_is_a_fitted_slope(tmp_path):
    """Lines of 30 and 200 KiB a token; the fit against numpy's where the points are off the line."""
    import numpy

    noise = {1 << 16: 0.5, 1 << 17: -0.25, 1 << 18: 0.125}
    rows = [_row("liger", n, 7.5 + n * 200 / 2**20) for n in noise]
    rows += [_row("fpdt", n, 9 + n * 30 / 2**20 + noise[n], fpdt={"kv": "resident"}) for n in noise]
    rows += [_row("alst", 1 << 16, 20.0), _row("liger", 1 << 18, 99.0, layers=1)]  # one length, another depth: no line
    rows += [{"contender": "liger", "seq_len": 1 << 19, "out_of_memory": True}, _row("liger", 1 << 19, 99.0, error="NaN")]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"header": {}, "rows": rows}))
    liger, fpdt = growth.growths(read_rows([path]))
    assert liger.kib_per_token == pytest.approx(200)
    assert liger.fixed_gib == pytest.approx(0.5)
    want = numpy.polyfit(list(noise), [row["peak_gib"] - 7 for row in rows if row["contender"] == "fpdt"], 1)
    assert fpdt.kib_per_token == pytest.approx(want[0] * 2**20)
    assert growth.ratio(fpdt, liger) == pytest.approx(want[0] * 2**20 / 200)
    text = growth.report([liger, fpdt])
    assert len(text) == 3
    assert text[2].strip().startswith(f"{want[0] * 2**20 / 200:.3f} of liger's 200.00 KiB")


def test_the_picture_of_chunk_sizes(tmp_path):
    def point_of(kv, size, step_s, peak):
        return _row("fpdt", 1 << 17, peak, fpdt={"chunk_size": size, "kv": kv}) | {"step_s": step_s}

    rows = [point_of("streamed", 8192, 3.0, 9.0), point_of("streamed", 4096, 4.0, 8.0), point_of("resident", 4096, 2.0, 10.0)]
    series, title = chunk_sizes.lines([*rows, _row("liger", 1 << 17, 50.0), _row("fpdt", 1 << 17, 50.0, fpdt={})])
    assert series == {"resident": [(4096, 2.0, 10.0)], "streamed": [(4096, 4.0, 8.0), (8192, 3.0, 9.0)]}
    assert "131,072 tokens" in title
    figure = chunk_sizes.draw(series, title, tmp_path / "chunks.png")
    seconds, memory = figure.axes
    assert [list(line.get_ydata()) for line in seconds.lines] == [[2.0], [4.0, 3.0]]
    assert [list(line.get_ydata()) for line in memory.lines] == [[10.0], [8.0, 9.0]]
    assert [label.get_text() for label in seconds.get_xticklabels()] == ["4K", "8K"]
    assert "seconds" in seconds.get_ylabel()
    assert "GiB" in memory.get_ylabel()
    assert (tmp_path / "chunks.png").stat().st_size > 1000
    for bad, text in (([*rows, rows[0]], "twice"), ([*rows, rows[0] | {"seq_len": 1}], "differ in seq_len"), ([], "no row")):
        with pytest.raises(ValueError, match=text):
            chunk_sizes.lines(bad)
    assert len(chunk_sizes.lines([*rows, rows[0] | {"seq_len": 1}], seq_len=1)[0]["streamed"]) == 1


# Overlap


@pytest.mark.parametrize(
    ("copies", "compute", "want"),
    [
        ([(0, 10)], [(0, 10)], 1.0),
        ([(0, 10)], [(10, 20)], 0.0),
        ([(0, 10)], [(5, 20)], 0.5),
        ([(0, 10), (5, 15)], [(0, 3), (2, 6), (12, 30)], 9 / 15),
        ([(0, 2), (8, 10)], [(1, 9)], 0.5),
        ([(0, 4), (6, 10)], [(1, 2), (3, 7), (9, 9.5)], 3.5 / 8),
        ([], [(0, 1)], None),
    ],
)
def test_hidden_fraction(copies, compute, want):
    got = hidden_fraction(copies, compute)
    assert got == (want if want is None else pytest.approx(want))


def test_union_of_intervals():
    assert union([(5, 6), (0, 2), (1, 3), (3, 4)]) == [(0, 4), (5, 6)]


def _event(cat, name, ts, dur, tid=7, **args):
    return {"ph": "X", "cat": cat, "name": name, "pid": 0, "tid": tid, "ts": ts, "dur": dur, "args": args}


MIB = 1 << 20
MARKS = {"output of layer 0": 100, "output of layer 1": 200, "gradient of layer 1": 300, "gradient of layer 0": 500}


def _trace(marks_on_gpu: bool) -> dict:
    """As the profiler writes it: layers of 100 microseconds forward and 200 backward, with copies of 40 and 100."""
    to_host, to_device = "Memcpy DtoH (Device -> Pinned)", "Memcpy HtoD (Pinned -> Device)"
    events = [
        _event("kernel", "gemm", 0, 450, stream=7, correlation=1),
        _event("gpu_memcpy", to_host, 120, 40, 20, bytes=64 * MIB, stream=20),
        _event("gpu_memcpy", to_device, 400, 100, 24, bytes=64 * MIB, stream=24),
        _event("gpu_memcpy", "Memcpy DtoH (Device -> Pageable)", 470, 30, bytes=4),
        _event("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 0, 9, bytes=64 * MIB),
        _event("gpu_memset", "Memset (Device)", 460, 40, bytes=64 * MIB),
        _event("cpu_op", "aten::mm", 0, 1),
        {"ph": "M", "name": "process_name"},
    ]
    for index, (name, ts) in enumerate(MARKS.items()):
        launched = ts / 10  # the CPU is ahead
        events.append(_event("user_annotation", overlap.MARK + name, launched, 3, 99))
        events.append(_event("cuda_runtime", "cudaLaunchKernel", launched + 1, 1, 99, correlation=50 + index))
        events.append(_event("cuda_runtime", "cudaLaunchKernel", launched + 1, 1, 98, correlation=1))  # of another thread
        events.append(_event("kernel", "add", ts, 1, correlation=50 + index))
        if marks_on_gpu:
            events.append(_event("gpu_user_annotation", overlap.MARK + name, ts, 1))
    return {"traceEvents": events, "deviceProperties": [{"id": 0, "name": "NVIDIA H200"}]}


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_the_picture_of_a_step(name, tmp_path, caplog, monkeypatch):
    """Beside the trace; and where there can be none the training goes on."""
    data = json.dumps(_trace(True)).encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    trace = StepTrace(tmp_path / name, "FPDT_TRACE")
    with caplog.at_level("INFO", logger="hf_fpdt"):
        trace.draw()
    assert "64.3% of the copies ran under the compute" in caplog.text  # 40 of 40 and 50 of 100
    assert (tmp_path / "trace.png").read_bytes()[:4] == b"\x89PNG"
    (tmp_path / "trace.png").unlink()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    trace.draw()
    assert "without a picture (import of matplotlib.figure halted" in caplog.text
    (tmp_path / name).write_bytes(gzip.compress(b'{"traceEvents": []}') if name.endswith(".gz") else b'{"traceEvents": []}')
    trace.draw()
    assert "without a picture (the trace has no GPU kernels" in caplog.text
    assert not (tmp_path / "trace.png").exists()


@pytest.mark.parametrize("marks_on_gpu", [True, False])
def test_marks_of_a_trace(marks_on_gpu):
    assert marks_of(_trace(marks_on_gpu)) == MARKS
    assert marks_of({"traceEvents": []}) == {}


def test_only_large_copies_of_the_two_directions_count():
    lanes = read_lanes(_trace(True))
    assert (lanes["to host"], lanes["to device"]) == ([(120, 160)], [(400, 500)])
    assert union(lanes["compute"]) == [(0, 450), (500, 501)]
    names = ("Memcpy DtoH (Device -> Pinned)", "Memcpy DtoH (Device -> Pageable)")
    unsized = [_event("kernel", "gemm", 0, 1), *(_event("gpu_memcpy", name, 1, 2) for name in names)]
    assert read_lanes({"traceEvents": unsized})["to host"] == [(1, 3)]
    with pytest.raises(ValueError, match="no GPU kernels"):
        read_lanes({"traceEvents": unsized[1:]})


def _overlap(tmp_path, trace, *options) -> dict:
    (tmp_path / "trace.json").write_text(json.dumps(trace))
    words = ["--trace", str(tmp_path / "trace.json"), "--out", str(tmp_path / "overlap"), *options]
    done = run([sys.executable, "-m", "benchmarks.overlap", *words], timeout=200)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "overlap.png").stat().st_size > 1000
    (call,) = read_calls(tmp_path / "overlap.json")
    assert call["header"]["gpu"] == "NVIDIA H200"
    assert str(tmp_path) not in json.dumps(call)
    return call["rows"][0]


def test_overlap_of_a_layers_two_passes(tmp_path):
    row = _overlap(tmp_path, _trace(True))
    assert row["step"]["hidden"] == {"to host": 1.0, "to device": 0.5, "either": pytest.approx(90 / 140)}
    forward, backward = row["panels"]["forward of layer 1"], row["panels"]["backward of layer 1"]
    assert forward["hidden"]["to host"] == 1.0
    assert forward["hidden"]["to device"] is None
    assert forward["seconds"]["to host"] == pytest.approx(40e-6)
    assert backward["hidden"]["to device"] == 0.5
    assert backward["seconds"] == pytest.approx({"compute": 150e-6, "to host": 0.0, "to device": 100e-6})


def test_a_trace_without_marks_is_one_panel(tmp_path):
    trace = _trace(True)
    trace["traceEvents"] = [event for event in trace["traceEvents"] if not event["name"].startswith(overlap.MARK)]
    assert list(_overlap(tmp_path, trace)["panels"]) == ["step"]


def test_the_marks_of_a_real_step(tmp_path, default_dtype):
    """Each layer's output, in order, then each gradient of an output, in reverse: once each, though layers run in chunks."""
    settings = '{"chunk_size": 64, "offload": "host"}'
    args = argparse.Namespace(shape="tiny", layers=3, contender="fpdt", fpdt=settings, seq_len=256)
    trace = json.loads(overlap.profile_step(args, tmp_path / "trace.json", device="cpu").read_text())
    marks = [event for event in trace["traceEvents"] if event.get("name", "").startswith(overlap.MARK)]
    names = [event["name"].removeprefix(overlap.MARK) for event in sorted(marks, key=lambda event: event["ts"])]
    assert names == [f"output of layer {i}" for i in range(3)] + [f"gradient of layer {i}" for i in (2, 1, 0)]
    assert {event["cat"] for event in marks} == {"user_annotation"}


def test_the_settings_that_overlap_profiles_are_valid():
    config = hf_fpdt.FPDTConfig(**json.loads(overlap.SETTINGS))
    assert config.offload == "host"


# Published results


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_results_say_how_they_were_made(path):
    for call in read_calls(path):
        header = call["header"]
        assert header["command"].startswith("python -m benchmarks.")
        assert all(header[name] for name in ("commit", "gpu", "torch", "transformers", "date"))
        assert call["rows"]


def test_the_readme_table_is_in_the_results():
    """Every time and memory in the README's table is a rounded number of a committed result."""
    texts = {f"{row['step_s']:.2f} s, {row['peak_gib']:.1f} GiB" for row in read_rows(RESULTS)}
    table = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("|") and " GiB" in line]
    cells = [cell.strip().strip("*").split(" (")[0] for line in table for cell in line.split("|") if " s, " in cell]
    assert len(cells) == 34
    assert set(cells) <= texts


def test_predictions_were_right():
    """Within 5% of what was measured, but where a part was not known yet; and the table in the documentation is that."""
    rows = [row for row in read_rows(RESULTS) if "predicted_peak_gib" in row]
    wrong = [row for row in rows if abs(row["predicted_peak_gib"] / row["peak_gib"] - 1) > 0.05]
    chunks_of_64k = {"kv": "streamed", "chunk_size": 65536}
    assert [(row["seq_len"], row["fpdt"]) for row in wrong] == [(262144, chunks_of_64k), (1 << 20, {"kv": "streamed"})]
    assert len(rows) - len(wrong) >= 8
    text = (ROOT / "benchmarks" / "README.md").read_text()
    for row in rows:
        cells = f"| {row['predicted_peak_gib']:.1f} | {row['peak_gib']:.1f} |"
        assert any(
            line.startswith(f"| {row['seq_len']:,} | {row['layers']} |") and line.endswith(cells) for line in text.splitlines()
        )
    assert sum(line.endswith(" |") and line.count("|") == 7 for line in text.splitlines()) == len(rows) + 1  # and its head
