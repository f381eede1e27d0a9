"""Design choices switched off: what is left trains the same, is really off, and is compared with the right default."""

import json
import shlex
from contextlib import ExitStack

import pytest
import torch
from reference import assert_gradients_close, loss_and_gradients, make_batch, make_model, make_streamed, tiny_llama
from test_transfers import simulated  # noqa: F401  (a fixture)

from benchmarks import point, train_step, without
from benchmarks.paper import ablations, spread
from benchmarks.point import Spec
from hf_fpdt import FPDTConfig, causal_attention, gradient_sum, host_arena, layer_stream, model_loss, transfers

SETTINGS = {"chunk_size": 10, "offload": "host", "recompute": True}


# What is switched off


@pytest.mark.parametrize("name", [without.NOTHING, *without.CHOICES, "overlap+prefetch+chunked-loss"])
@pytest.mark.parametrize("kv", ["resident", "streamed"])
def test_a_model_trains_the_same_without(name, kv):
    batch = make_batch(2, 47)
    want, want_grads = loss_and_gradients(make_model(tiny_llama(), "eager"), batch)
    with without.switched_off(name):
        loss, grads = loss_and_gradients(make_streamed(tiny_llama(), **SETTINGS, kv=kv), batch)
    torch.testing.assert_close(loss, want, rtol=2e-6, atol=0)
    assert_gradients_close(grads, want_grads)


@pytest.mark.parametrize("off", ["overlap", "prefetch", "overlap+prefetch", 3])
@pytest.mark.parametrize("kv", ["resident", "streamed"])
def test_the_copies_of_a_gpu_are_right_without(simulated, off, kv):  # noqa: F811
    """`Transfers` on simulated streams: no copy is missed, whenever it runs."""
    batch = make_batch(1, 47)
    want, want_grads = loss_and_gradients(make_model(tiny_llama(), "eager"), batch)
    with entered(off):
        loss, grads = loss_and_gradients(make_streamed(tiny_llama(), **SETTINGS, kv=kv), batch)
    torch.testing.assert_close(loss, want, rtol=2e-6, atol=0)
    assert_gradients_close(grads, want_grads)


def entered(off):
    stack = ExitStack()
    names = [] if off == 3 else off.split("+")
    for one in [patch for name in names for patch in without.CHOICES[name]()] + without._copies_repeated(3) * (off == 3):
        stack.enter_context(one)
    return stack


def test_copies_are_waited_for_at_once_without_overlap(simulated):  # noqa: F811
    with entered("overlap"):
        kept = transfers.HostCopy(simulated, torch.ones(4))
        assert kept._written.query()
        kept.prefetch()
        assert kept._fetched[1].query()
        assert kept.get().tolist() == [1] * 4


def test_fetches_start_late_without_prefetch(simulated):  # noqa: F811
    with entered("prefetch"):
        kept = transfers.HostCopy(simulated, torch.ones(4))
        kept.prefetch()
        assert kept._fetched is None
        assert kept.get().tolist() == [1] * 4
        assert kept.get() is kept.get()


def test_every_copy_is_made_several_times(simulated):  # noqa: F811
    queues = simulated._d2h_stream.queue, simulated._h2d_stream.queue
    transfers.HostCopy(simulated, torch.ones(4)).get()
    once = [len(queue) for queue in queues]
    with entered(3):
        transfers.HostCopy(simulated, torch.ones(4)).get()
    assert [len(queue) - before - before for queue, before in zip(queues, once, strict=True)] == [2, 2]
    assert simulated.moved_bytes == 4 * 16  # of each tensor once a way


def test_what_is_off_is_off_and_comes_back():
    before = transfers.HostCopy.prefetch, host_arena._cuda_lock, model_loss._why_not, gradient_sum.GradientSum.add
    with without.switched_off("pinned+prefetch+fp32-sums+cut-keys+in-place"):
        assert host_arena._cuda_lock(None) is None
        assert causal_attention.MAX_BACKWARD_KEYS > 1 << 30
        assert not layer_stream.is_sole_owner(None)
        sums = gradient_sum.GradientSum(2)
        for _ in range(2):
            sums.add([torch.ones(2, dtype=torch.bfloat16), None])
        assert sums._sums[0].dtype == torch.bfloat16
        assert sums.result()[0].tolist() == [2, 2]
    assert before == (
        transfers.HostCopy.prefetch, host_arena._cuda_lock, model_loss._why_not, gradient_sum.GradientSum.add
    )  # fmt: skip
    assert causal_attention.MAX_BACKWARD_KEYS == 65536


def test_torchs_own_host_memory_is_counted_in_powers_of_two():
    with without.switched_off("arena"):
        arena = transfers.transfers_for(torch.device("cpu")).arena
        piece = arena.take(5000)
        assert piece.memory().numel() == 5000
        assert (arena.used_bytes, arena.locked_bytes) == (8192, 8192)
        piece.give_back()
        piece.give_back()
        assert (arena.used_bytes, arena.locked_bytes) == (0, 8192)
        with pytest.raises(host_arena.HostMemoryError):
            arena.take(5000, 8191)
    assert isinstance(transfers.transfers_for(torch.device("cpu")).arena, host_arena.HostArena)


def test_the_logits_are_whole_without_chunks_of_the_loss():
    with without.switched_off("chunked-loss"):
        model = make_streamed(tiny_llama(), **SETTINGS)
        batch = make_batch(1, 47)
        logits = model(**batch).logits
    assert type(logits) is torch.Tensor


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"without": "overlaps"}, "got overlaps; nothing, or names of overlap, prefetch"),
        ({"without": "overlap+overlap"}, "a name twice"),
        ({"without": ""}, "--without"),
        ({"contender": "liger", "without": "overlap"}, "--without overlap, --copies 1 with liger"),
        ({"contender": "liger", "copies": 2}, "--copies 2 with liger"),
        ({"copies": 0}, "--copies 0"),
    ],
)
def test_what_cannot_be_switched_off(options, text):
    good = {"contender": "fpdt", "seq_len": 64, "shape": "tiny", "layers": 1}
    assert "without" not in Spec(**good).row()
    with pytest.raises(ValueError, match=text):
        Spec(**(good | options))


@pytest.fixture
def default_dtype():
    yield
    torch.set_default_dtype(torch.float32)


def test_a_point_without(default_dtype, monkeypatch):
    """The row says what was off, and how much was copied a step; a share of the host's memory is a limit."""
    spec = {"contender": "fpdt", "seq_len": 256, "shape": "tiny", "layers": 2, "device": "cpu", "repeats": 2}
    spec |= {"fpdt": {"chunk_size": 64, "offload": "host", "recompute": True, "kernel": "naive"}}
    row = point.measure(Spec(**spec, without="prefetch"))
    kept = 2 * 256 * (2 * (64 + 2 * 32 + 64) + 4 * 4) + 256 * 2 * 64  # x, K, V, out, lse of two layers; the norm's input
    assert row["moved_gib"] * 2**30 == 2 * kept
    assert Spec(**spec, without="prefetch").row()["without"] == "prefetch"
    monkeypatch.setenv("FPDT_HOST_MEMORY", "1000")
    with pytest.raises(host_arena.HostMemoryError, match="host_memory=1000"):
        point.measure(Spec(**spec))


# The comparison


def _row(step_s, seq_len=131072, **more):
    row = {"contender": "fpdt+liger", "seq_len": seq_len, "layers": 2, "fpdt": ablations.BASE, "gpu": "G"}
    found = {"step_s": step_s, "peak_gib": 12.0, "host_gib": 6.5, "moved_gib": 10.0} if step_s else {"out_of_memory": True}
    return row | found | more


def _call(*rows):
    return {"header": {"command": "python -m x"}, "rows": list(rows)}


def test_every_row_is_compared_with_the_default_of_its_call(tmp_path):
    streamed = ablations.STREAMED
    calls = [
        _call(_row(2.0), _row(2.2, without="overlap"), _row(3.0, copies=4), _row(2.5, fpdt=streamed | {"chunk_size": 4096})),
        _call(_row(4.0), _row(5.0, fpdt=ablations.BASE | {"save_attention": False}), _row(2.0, error="NaN")),
        _call(_row(1.0, 32768), _row(1.5, 32768, without="chunked-loss"), _row(4.0), _row(None, without="chunked-loss")),
        _call(_row(8.0, fpdt=streamed), _row(10.0, fpdt=streamed, without="overlap+prefetch")),
        _call(_row(2.0), _row(2.2, contender="fpdt")),
    ]
    lines = ablations.lines_of(calls)
    ratios = {(line.off, line.where): line.ratio and round(line.ratio, 6) for line in lines}
    here = "131,072 tokens, 2 layers"
    assert ratios == {
        ("nothing: the default", here): 1.0,
        ("overlap", here): 1.1,
        ("a link 4 times slower", here): 1.5,
        ("chunk_size 4,096; kv streamed", here): 1.25,
        ("save_attention false", here): 1.25,
        ("nothing: the default", "32,768 tokens, 2 layers"): 1.0,
        ("chunked-loss", "32,768 tokens, 2 layers"): 1.5,
        ("chunked-loss", here): None,
        ("nothing: the default", here + ", K and V streamed"): 1.0,
        ("overlap, prefetch", here + ", K and V streamed"): 1.25,
        (ablations._FUSED["fpdt"], here): 1.1,
    }
    text = ablations.table(lines)
    assert f"| overlap | {here} | 2.20 | +10.0% | 12.0 | 6.5 | 4.5 |" in text
    assert f"| chunked-loss | {here} | out of memory | | | | |" in text
    assert {line.count("|") for line in text} == {8}
    figure = ablations.draw(lines, tmp_path / "ablations.png")
    assert [len(axis.patches) for axis in figure.axes] == [7, 2, 2]
    assert (tmp_path / "ablations.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([], "no row ran"),
        ([_row(None), _row(2.0, without="overlap")], "its default at 131,072 tokens has no time"),
        ([_row(2.0), _row(2.0, contender="liger")], "a row of liger"),
        ([_row(2.0), _row(2.0, copies=2), _row(2.0, copies=2)], "measured twice"),
    ],
)
def test_rows_that_cannot_be_compared(rows, text):
    with pytest.raises(ValueError, match=text):
        ablations.lines_of([_call(*rows)])


def test_the_commands_of_the_ablations():
    """They can be given, fit eight minutes on four GPUs, and every choice and every setting is switched off in one of them."""
    jobs = ablations.commands()
    assert spread.makespan(jobs, 4) <= 480
    calls = []
    for job in jobs:
        words = shlex.split(job.command)
        assert words[:3] == ["python", "-m", "benchmarks.train_step"]
        specs = train_step.specs_of(train_step._arguments(words[3:]))
        for spec in specs:
            FPDTConfig(**spec.fpdt)
        calls.append(_call(*(spec.row() | {"step_s": 1.0} for spec in specs)))
    lines = {line.off for line in ablations.lines_of(calls)}
    assert {*without.CHOICES, "save_attention false", "kernel cudnn", "kernel torch_flash", "offload none"} <= lines
    assert {f"chunk_size {size:,}" for size in (4096, 65536, 131072)} <= lines
    assert json.dumps(ablations.BASE) in {json.dumps(row["fpdt"]) for call in calls for row in call["rows"]}
