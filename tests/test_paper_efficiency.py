"""The paper's efficiency figures: shapes and their operations, tensor parallelism, and what draws the results."""

import json
import math
import shlex
import sys
from pathlib import Path

import pytest
from started import run
from torch._subclasses import FakeTensorMode
from transformers import GPTNeoXForCausalLM

import hf_fpdt  # noqa: F401  (makes "fpdt" known)
from benchmarks import ballast, point, shared_point, shared_step, train_step
from benchmarks.paper import efficiency, expected, spread
from benchmarks.point import Spec
from benchmarks.result_files import read_calls
from benchmarks.shapes import gpt_config, llama_config, model_config, paper_flops, step_flops

ROOT = Path(__file__).parent.parent


# Shapes


@pytest.mark.parametrize(("shape", "hidden", "billions"), [("gpt-2.7b", 2560, 2.646), ("gpt-6.7b", 4096, 6.650)])
def test_the_papers_gpts(shape, hidden, billions):
    """12 * hidden^2 weights a layer and a tied head; 6 operations for each and token, and half of the square in attention."""
    config = model_config(shape, 32)
    with FakeTensorMode():  # no memory is taken
        model = GPTNeoXForCausalLM(config)
    assert model.num_parameters() == pytest.approx(billions * 1e9, rel=1e-3)
    weights, seq_len = 32 * 12 * hidden**2 + hidden * 50304, 65536
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    assert matrices == weights  # tied: the lookup's are the head's
    attention = 32 * 3 * 4 * seq_len**2 * hidden / 2
    assert step_flops(config, seq_len) == pytest.approx(6 * weights * seq_len + attention, rel=1e-12)
    assert paper_flops(config, seq_len) == pytest.approx(8 * weights * seq_len + attention * 8 / 3, rel=1e-12)


def test_the_papers_counting_of_a_llama():
    """Megatron-DeepSpeed's terms in multiply-adds, written out: forward, twice that, and the forward once more."""
    config, seq_len = llama_config("llama-3.1-8b", 3), 10_000
    projections = 3 * (2 + 2 / 4) * 4096**2 * seq_len
    attention = 3 * 2 * 128 * 32 * seq_len**2
    feed_forward = 3 * 3 * 14336 * 4096 * seq_len
    forward = projections + attention + feed_forward + 128256 * 4096 * seq_len
    assert paper_flops(config, seq_len) == pytest.approx(4 * forward * 2, rel=1e-12)


def test_a_gpt_on_a_cpu(tmp_path):
    """The whole command: chunks alone, and chunks that are offloaded, have the loss of the plain model."""
    out = tmp_path / "out.json"
    settings = json.dumps([one | {"chunk_size": 64} for one in (efficiency.CHUNKS, efficiency.OFFLOADED)])
    words = "--shape gpt-tiny --device cpu --contenders sdpa,fpdt --seq-lens 256 --layers 2 --repeats 1"
    words = [*words.split(), "--ballast-layers", "3", "--ballast-kept", "--fpdt", settings, "--out", str(out)]
    done = run([sys.executable, "-m", "benchmarks.train_step", *words], timeout=200)
    assert done.returncode == 0, done.stderr
    sdpa, chunks, offloaded = read_calls(out)[0]["rows"]
    for row in (chunks, offloaded):
        assert row["losses"] == pytest.approx(sdpa["losses"], rel=1e-3)
    kept = [row["ballast"]["gpu_gib"] * 2**30 / 3 / 256 for row in (sdpa, chunks, offloaded)]
    assert kept == [2 * 64, 2 * 4 * 64 + 4 * 4, 0]
    assert {row["ballast_layers"] for row in (sdpa, chunks, offloaded)} == {3}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"contender": "liger"}, "--shape gpt-tiny with --contenders liger"),
        ({"contender": "fpdt+liger"}, "sdpa or fpdt"),
        ({"lora": 4}, "--lora 4"),
        ({"window": 4}, "--window 4"),
        ({"ballast_kept": True}, "--ballast-kept with --lora 0, --ballast-layers 0"),
        ({"ballast_kept": True, "ballast_layers": 2, "ballast_gpu_gib": 1.0}, "--ballast-gpu-gib 1.0"),
    ],
)
def test_gpts_and_ballast_that_cannot(options, text):
    good = {"contender": "fpdt", "seq_len": 64, "shape": "gpt-tiny", "layers": 1}
    Spec(**good)
    with pytest.raises(ValueError, match=text):
        Spec(**(good | options))


def test_windows_and_others_than_llama():
    with pytest.raises(ValueError, match="--window 8 with --shape gpt-tiny"):
        model_config("gpt-tiny", 1, 8)
    good = {"contender": "fpdt", "gpus": 2, "seq_len": 64, "shape": "gpt-tiny", "layers": 1}
    shared_point.SharedSpec(**good)
    with pytest.raises(ValueError, match="only fpdt"):
        shared_point.SharedSpec(**(good | {"contender": "ring"}))


def test_what_absent_layers_keep():
    config = llama_config("llama-3.1-8b", 1)
    saved = {"offload": "none", "recompute": True, "save_attention": True}
    assert ballast.kept_bytes(config, "liger", {}) == 8192
    assert ballast.kept_bytes(config, "alst", {}) == 0
    assert ballast.kept_bytes(config, "fpdt+liger", {"offload": "host"}) == 0
    assert ballast.kept_bytes(config, "fpdt", saved) == 2 * (4096 + 2 * 1024 + 4096) + 4 * 32
    assert ballast.kept_bytes(config, "fpdt", saved | {"save_attention": False}) == 2 * (4096 + 2 * 1024)
    for unknown in ({}, {"offload": "none", "recompute": True}, {"offload": "none", "save_attention": True}):
        with pytest.raises(ValueError, match="--ballast-kept with --fpdt"):
            ballast.kept_bytes(config, "fpdt", unknown)


# Tensor and sequence parallelism


def test_a_split_model_is_the_model(tmp_path):
    """On two processes: loss and gradient norm of the plain model on one."""
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    common = ["--shape", "tiny", "--device", "cpu", "--seq-lens", "510", "--layers", "2", "--repeats", "1"]
    for module, words, out in (
        ("train_step", ["--contenders", "sdpa", "--grad-norms"], one),
        ("shared_step", ["--contenders", "tensor", "--gpus", "2"], two),
    ):
        command = [sys.executable, "-m", f"benchmarks.{module}", *common, *words, "--out", str(out)]
        done = run(command, timeout=280)
        assert done.returncode == 0, done.stderr
    (alone,), (both,) = (read_calls(out)[0]["rows"] for out in (one, two))
    assert both.get("error") is None
    assert both["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    norm = math.sqrt(sum(value**2 for value in alone["grad_norms"].values()))
    assert both["engine"]["grad_norm"] == pytest.approx(norm, rel=1e-2)  # in bfloat16


def test_every_gradient_of_a_split_model(tmp_path):
    """In fp32, element by element, also with tiles that the sequence does not divide into."""
    script = tmp_path / "script.py"
    script.write_text(SPLIT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = run(command, timeout=280)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the same") == 2


SPLIT = """
import os
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from benchmarks import tensor_parallel
from benchmarks.contenders import _model
from benchmarks.shapes import llama_config



def require_plain(tensor):
    assert type(tensor) is torch.Tensor, type(tensor)


dist.init_process_group("gloo")
mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
tensor_parallel._TILE_TOKENS = 200
ids = torch.randint(0, 512, (1, 510), generator=torch.Generator().manual_seed(1))
plain, split = (_model(llama_config("tiny", 2), "sdpa", "cpu").float() for _ in range(2))
loss = plain(input_ids=ids, labels=ids).loss
loss.backward()
tensor_parallel.split_model(split, mesh)
for layer in split.model.layers:  # no subclass: Liger's kernels take addresses
    layer.input_layernorm.register_forward_pre_hook(lambda norm, args: require_plain(args[0]))
    layer.post_attention_layernorm.register_forward_pre_hook(lambda norm, args: require_plain(args[0]))
torch.testing.assert_close(tensor_parallel.forward_backward(split, mesh, ids), loss.detach(), rtol=1e-5, atol=0)
for want, got in zip(plain.parameters(), split.parameters(), strict=True):
    grad = got.grad.full_tensor() if isinstance(got, DTensor) else got.grad
    torch.testing.assert_close(grad, want.grad, rtol=1e-4, atol=1e-5 * want.grad.abs().max().item())
    assert not isinstance(got, DTensor) or got.grad.to_local().shape == got.to_local().shape
print("the same", flush=True)
os._exit(0)
"""


@pytest.mark.parametrize(("options", "text"), [({"seq_len": 65}, "'tokens': 65"), ({"gpus": 4}, "'heads of K': 2")])
def test_models_that_cannot_be_split(options, text):
    good = {"contender": "tensor", "gpus": 2, "seq_len": 64, "shape": "tiny", "layers": 1}
    shared_point.SharedSpec(**good)
    with pytest.raises(ValueError, match=text):
        shared_point.SharedSpec(**(good | options))
    with pytest.raises(ValueError, match="a tied head"):
        shared_point.SharedSpec(**(good | {"shape": "llama-3.2-1b"}))


# The picture of efficiency


def _row(contender, seq_len, mfu=None, **more):
    row = {"contender": contender, "seq_len": seq_len, "layers": 2, "shape": "gpt-2.7b", "ballast_layers": 30}
    if mfu is None:
        return row | {"out_of_memory": True} | more
    return row | {"step_s": 2.0, "causal_mfu": mfu, "peak_gib": 50.0, "gpu": "NVIDIA H200"} | more


def test_the_picture_of_efficiency(tmp_path):
    rows = [_row("sdpa", 65536, 0.3), _row("sdpa", 131072), _row("sdpa", 1 << 20, error="killed")]
    rows += [_row("fpdt", n, mfu, fpdt=efficiency.OFFLOADED) for n, mfu in ((131072, 0.5), (65536, 0.4))]
    rows += [_row("tensor", 65536, 0.35, shape="llama-3.1-8b", gpus=2)]
    series = efficiency.series_of(rows)
    assert list(series) == ["gpt-2.7b", "llama-3.1-8b"]
    assert list(series["gpt-2.7b"]) == ["checkpointing", "FPDT, offloaded"]
    assert [(p.seq_len, p.mfu, p.depth) for p in series["gpt-2.7b"]["checkpointing"]] == [(65536, 0.3, 32), (131072, None, 32)]
    ours = series["gpt-2.7b"]["FPDT, offloaded"]
    config = gpt_config("gpt-2.7b", 2)
    assert [p.mfu for p in ours] == [0.4, 0.5]
    assert ours[0].paper_mfu == pytest.approx(0.4 * paper_flops(config, 65536) / step_flops(config, 65536))
    lines = efficiency.table(series)
    assert "| gpt-2.7b | checkpointing | 131,072 | 2, 30 | out of memory | | | | |" in lines
    assert any("| 50.0 | 2.00 s | <= 32 s |" in line for line in lines)
    assert {line.count("|") for line in lines} == {10}
    figure = efficiency.draw(series, tmp_path / "efficiency.png")
    assert len(figure.axes) == 4
    lengths = [list(line.get_xdata()) for line in figure.axes[0].lines]
    assert lengths == [[65536], [131072], [65536, 131072], []]  # what ran and what did not, for each strategy
    assert list(figure.axes[0].lines[2].get_ydata()) == [40, 50]
    assert (tmp_path / "efficiency.png").stat().st_size > 1000
    for bad, text in (
        ([rows[0]] * 2, "twice"),
        ([rows[2]], "no row ran"),
        ([_row("sdpa", 8, 0.1, documents=4)], "documents"),
        ([_row("sdpa", 8, 0.0, gpu="none")], "no causal_mfu"),
    ):
        with pytest.raises(ValueError, match=text):
            efficiency.series_of(bad)


def test_results_of_the_papers_figures_say_how_they_were_made():
    for path in (ROOT / "benchmarks" / "results" / "paper").glob("*.json"):
        for call in read_calls(path):
            assert call["header"]["command"].startswith("python -m benchmarks."), path
            assert all(call["header"][name] for name in ("commit", "gpu", "torch", "transformers", "date")), path
            assert call["rows"], path


@pytest.mark.parametrize("short", [False, True])
def test_the_commands_for_efficiency_can_be_given(short):
    found = efficiency.commands(short)
    assert max(job.seconds for job in found) < 540
    assert len({job.command.split(" --out ")[1].split()[0] for job in found}) == len(found)
    specs = []
    for job in found:
        python, flag, module, *words = shlex.split(job.command)
        assert (python, flag) == ("python", "-m")
        if module == "benchmarks.shared_step":
            assert job.gpus == 2
            shared_step.specs_of(shared_step._arguments(words))
            continue
        assert module == "benchmarks.train_step"
        assert job.gpus == 1
        specs += train_step.specs_of(train_step._arguments(words))
    for spec in specs:
        ballast.kept_bytes(model_config(spec.shape, spec.layers), spec.contender, spec.fpdt)
        assert spec.layers + spec.ballast_layers == 32
    assert {spec.shape for spec in specs} == {"gpt-2.7b", "gpt-6.7b", "llama-3.1-8b"}
    assert point.command(specs[0])[1:3] == ["-m", "benchmarks.point"]
    efficiency.series_of(  # nothing is measured twice
        [spec.row() | {"out_of_memory": True} for spec in specs]
    )


def test_the_short_commands_take_nine_minutes_on_four_gpus():
    assert spread.makespan(efficiency.commands(short=True), 4) < 540


def test_points_take_about_as_long_as_they_are_expected_to():
    """All calls in the results whose points are steps of full training; some ran beside others on their host."""
    compared = 0
    for path in (ROOT / "benchmarks" / "results").glob("**/*.json"):
        for call in read_calls(path):
            rows = [row for row in call["rows"] if row.get("process_s") and "step_s" in row]
            if not rows or any(row.get(name) for row in rows for name in ("lora", "window", "documents")):
                continue
            if "benchmarks.scale" in call["header"]["command"]:  # has estimates of its own
                continue
            shares = [expected.seconds_of(_spec_of(row), gpu_gib=1e9) for row in rows]
            compared += 1
            took = sum(row["process_s"] for row in rows)
            imports = expected.COMMAND_S if "paper.reach" not in call["header"]["command"] else len(rows) * expected.TRY_S
            assert 0.6 < took / (imports + sum(shares)) < 1.3, (path.name, took, shares)
    assert compared > 20


def _spec_of(row):
    repeats = 0 if row["step_s"] == row["first_step_s"] else len(row["all_steps_s"])
    same = {name: row[name] for name in ("contender", "seq_len", "shape", "layers")}
    same |= {"repeats": repeats, "fpdt": row.get("fpdt") or {}}
    return shared_point.SharedSpec(gpus=row["gpus"], **same) if "gpus" in row else Spec(**same)


def test_a_point_that_cannot_fit_is_expected_to_be_refused():
    """An 8B model has 30 GiB of weights and gradients; checkpoints of 30 layers at 262,144 tokens take 60 more."""
    spec = Spec(contender="sdpa", seq_len=262144, shape="llama-3.1-8b", layers=2, ballast_layers=30, ballast_kept=True)
    assert expected.least_gib(spec) == pytest.approx(4 * 8.03e9 / 2**30 + 60, rel=1e-3)
    assert expected.seconds_of(spec) < 20 < expected.seconds_of(spec, gpu_gib=expected.H200_GIB)
