"""Memory by source: the arithmetic on a trace made by hand, and the marks of real steps on a CPU."""

import json
from pathlib import Path

import pytest
import torch

import hf_fpdt  # makes "fpdt" known
from benchmarks import contenders
from benchmarks.paper import anatomy, anatomy_point
from benchmarks.paper.memory_trace import (
    BEFORE,
    FRAMES,
    MARK_BYTES,
    MARKS,
    SOURCES,
    mark_of,
    replay,
    source_of_frames,
    thinned,
)
from benchmarks.shapes import model_config

GIB = 1 << 30


def frame(path, name="forward"):
    return {"filename": path, "name": name, "line": 1}


def alloc(addr, size, *frames):
    return {"action": "alloc", "addr": addr, "size": size, "frames": list(frames), "time_us": addr}


def freed(addr, size):
    return {"action": "free_requested", "addr": addr, "size": size, "frames": [], "time_us": addr}


def mark(name):
    """As `mark_source` leaves it: allocated and released."""
    size = MARK_BYTES * (MARKS.index(name) + 1)
    return [alloc(7, size, frame("benchmarks/paper/anatomy_point.py", "mark_source")), freed(7, size)]


ATTENTION = frame("/x/transformers/integrations/sdpa_attention.py", "sdpa_attention_forward")
# Weights of 8 GiB; in the forward 2 GiB of Q, K, V, 1 GiB of attention that overlaps them, 3 GiB of the loss after both are
# gone; in the backward 5 GiB without a frame in the MLP, of which 4 GiB are a gradient, and 1 GiB of the weights is released.
TRACE = [
    {"action": "segment_alloc", "addr": 1, "size": 9 * GIB, "frames": []},
    alloc(10, GIB // 2),
    *mark("QKV"),
    alloc(11, 2 * GIB, frame("modeling_llama.py")),
    alloc(12, GIB, frame("torch/nn/functional.py", "sdpa"), ATTENTION, frame("modeling_llama.py")),
    freed(11, 2 * GIB),
    {"action": "free_completed", "addr": 11, "size": 2 * GIB, "frames": []},
    freed(12, GIB),
    *mark("loss"),
    alloc(11, 3 * GIB),
    *mark("backward"),
    *mark("MLP"),
    alloc(13, 4 * GIB),
    freed(11, 3 * GIB),
    alloc(14, GIB),
    freed(99, GIB),
    freed(14, GIB),
]


def test_the_replay_of_a_trace():
    found = replay(TRACE, 8 * GIB, gradients={13})
    assert [moment.phase for moment in found.moments] == ["forward"] * 6 + ["backward"] * 5
    forward, backward = found.peaks["forward"], found.peaks["backward"]
    assert forward.total == 11.5 * GIB
    assert {name: size / GIB for name, size in forward.held.items() if size} == {
        BEFORE: 8,
        "rest": 0.5,
        "QKV": 2,
        "attention": 1,
    }
    assert backward.total == 15.5 * GIB
    assert {name: size / GIB for name, size in backward.held.items() if size} == {
        BEFORE: 8,
        "rest": 0.5,
        "loss": 3,
        "gradients": 4,
    }
    assert found.tops["forward"]["loss"] == 3 * GIB
    assert found.tops["backward"]["MLP"] == GIB
    assert found.moments[-1].held[BEFORE] == 7 * GIB
    assert found.moments[-1].total == 11.5 * GIB
    assert replay(TRACE, 8 * GIB).tops["backward"]["gradients"] == 0  # unless it is known to be one
    assert set(found.peaks["forward"].held) == {BEFORE, *SOURCES}


@pytest.mark.parametrize(
    ("frames", "source"),
    [
        ([frame("/y/hf_fpdt/head_exchange.py"), frame("/y/hf_fpdt/layer_chunk.py")], "exchange"),
        ([frame("/y/hf_fpdt/cuda_kernels.py"), frame("/y/hf_fpdt/key_value_store.py")], "attention"),
        ([frame("/y/hf_fpdt/key_value_store.py"), frame("/y/hf_fpdt/causal_attention.py")], "QKV"),
        ([frame("/y/torch/nn/functional.py", "cross_entropy")], "loss"),
        ([frame("/y/torch/nn/functional.py", "silu"), frame("/y/modeling_llama.py")], None),
        ([frame("C:\\y\\hf_fpdt\\gradient_sum.py")], "gradients"),
        ([], None),
    ],
)
def test_the_source_of_a_stack(frames, source):
    assert source_of_frames(frames) == source


def test_frames_name_files_that_are_there():
    """A file of ours that was renamed would silently be somebody else's memory."""
    ours = [part for part, _, _ in FRAMES if part.startswith("hf_fpdt/")]
    assert len(ours) > 7
    for part in ours:
        assert (Path(hf_fpdt.__file__).parents[1] / f"{part}.py").is_file()
    import transformers

    for part in ("integrations/sdpa_attention", "loss/loss_utils"):
        assert (Path(transformers.__file__).parent / f"{part}.py").is_file()


def test_marks():
    for name in MARKS:
        assert mark_of(mark(name)[0]) == name
    assert mark_of(alloc(1, 512, frame("x.py", "forward"))) is None
    assert mark_of(alloc(1, 1 << 20, frame("x.py", "mark_source"))) is None


def test_thinning_keeps_the_peak():
    moments = replay([alloc(1000 + i, 1 + (i == 777) * GIB) for i in range(1000)], 0).moments
    kept = thinned(moments, 100)
    assert len(kept) == 100
    assert max(one.total for one in kept) == max(one.total for one in moments)
    assert [one.time_us for one in kept] == sorted(one.time_us for one in kept)
    assert thinned(moments, 5000) == moments


def test_the_row_the_table_and_the_picture(tmp_path):
    row = {"contender": "fpdt", "seq_len": 64, "layers": 2, "fpdt": {"offload": "host"}, "peak_gib": 15.5}
    row |= anatomy_point.row_of(TRACE, 8 * GIB, {13})
    row = json.loads(json.dumps(row))
    assert row["replayed_peak_gib"] == 15.5
    assert row["timeline"]["backward_from"] == 6
    assert row["timeline"]["gib"]["gradients"][-1] == 4
    lines = anatomy.table(row)
    assert "| gradients | 0.00 | 0.00 | 4.00 | 4.00 |" in lines
    assert lines[-1] == "| all | 11.50 | | 15.50 | |"
    bad = {"contender": "sdpa", "seq_len": 64, "layers": 2, "out_of_memory": True}
    assert anatomy.table(bad) == ["sdpa, 64 tokens, 2 layers: out of memory"]
    figure = anatomy.draw([bad, row], tmp_path / "anatomy.png")
    assert len(figure.axes) == 1
    assert (tmp_path / "anatomy.png").stat().st_size > 1000
    assert anatomy.draw([bad], tmp_path / "none.png") is None


@pytest.fixture
def default_dtype():
    yield
    torch.set_default_dtype(torch.float32)


def changes(names):
    """Without repetitions."""
    return [name for index, name in enumerate(names) if index == 0 or names[index - 1] != name]


@pytest.mark.parametrize("shape", ["tiny", "gpt-tiny"])
@pytest.mark.parametrize("name", ["sdpa", "fpdt"])
def test_the_marks_of_a_step(name, shape, default_dtype, monkeypatch):
    """Each layer's modules in order, once more in the backward, and then in reverse, where gradients arrive."""
    marks = []
    monkeypatch.setattr(anatomy_point, "mark_source", lambda source, device: marks.append(source))
    model, step = contenders.build(name, model_config(shape, 1), {"chunk_size": 64} if name == "fpdt" else {}, device="cpu")
    ids = torch.randint(0, 512, (1, 64))
    want = step(ids)
    anatomy_point.mark_modules(model, lambda source: anatomy_point.mark_source(source, "cpu"))
    with anatomy_point._backward_marked("cpu"):
        assert step(ids) == want
    forward, backward = (changes(part) for part in (marks[: marks.index("backward")], marks[marks.index("backward") :]))
    layer = ["residual and norms", "QKV", "attention", "residual and norms", "MLP", "residual and norms"]
    assert forward == [*layer, "loss"]
    assert backward[:2] == ["backward", "loss"]
    assert ", ".join(layer[1:5]) in ", ".join(backward), "the forward again"
    assert backward[-5:] == ["MLP", "residual and norms", "attention", "QKV", "residual and norms"]
    step(ids)
    assert marks.count("backward") == 1, "the mark ends with its block"


def test_points_of_several_gpus():
    words = ["--gpus", "2", "--contenders", "ulysses+liger,fpdt+liger", "--seq-lens", "4096,8192"]
    specs = anatomy.specs_of(anatomy._arguments(words))
    assert [(spec.contender, spec.gpus, spec.seq_len, spec.fpdt) for spec in specs] == [
        (name, 2, length, fpdt)
        for length in (4096, 8192)
        for name, fpdt in (("ulysses+liger", {}), ("fpdt+liger", json.loads(anatomy.OFFLOADED)))
    ]
    with pytest.raises(ValueError, match="got 'sdpa'"):
        anatomy.specs_of(anatomy._arguments(["--gpus", "2", "--contenders", "sdpa"]))
    frames = [frame("/z/deepspeed/runtime/zero/partition_parameters.py", "_all_gather_sequential")]
    assert source_of_frames(frames) == "engine"
    assert source_of_frames([frame("/z/deepspeed/sequence/layer.py"), *frames]) == "exchange"
