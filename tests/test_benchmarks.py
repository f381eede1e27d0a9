"""The arithmetic of the benchmarks: a wrong number here would be published as a result."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.overlap import hidden_fraction, read_lanes, union
from benchmarks.shapes import llama_config, step_flops

ROOT = Path(__file__).parent.parent


def test_step_flops_of_an_8b_llama():
    """Against the terms written out: 218,103,808 weights a layer, 525,336,576 of the head, half of S^2 in attention."""
    config, seq_len = llama_config("llama-3.1-8b", 4), 65536
    layer = 4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 14336
    assert layer == 218_103_808
    dense = 6 * (4 * layer + 4096 * 128256) * seq_len
    attention = 4 * 3 * (4 * seq_len * seq_len * 32 * 128) / 2  # 4 operations a pair and dimension, backward twice the forward
    assert step_flops(config, seq_len) == pytest.approx(dense + attention, rel=1e-12)


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


def test_lanes_of_a_trace(tmp_path):
    def event(cat, name, ts, dur):
        return {"cat": cat, "name": name, "ts": ts, "dur": dur}

    events = [
        event("kernel", "gemm", 0, 10), event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 5, 10),
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 2, 4), event("gpu_memcpy", "Memcpy DtoD (Device)", 0, 9),
        event("cpu_op", "aten::mm", 0, 1), {"ph": "M"},
    ]  # fmt: skip
    trace = tmp_path / "trace.json"
    trace.write_text(json.dumps({"traceEvents": events}))
    assert read_lanes(json.loads(trace.read_text())) == {"compute": [(0, 10)], "to host": [(5, 15)], "to device": [(2, 6)]}
    with pytest.raises(ValueError, match="no GPU kernels"):
        read_lanes({"traceEvents": events[1:]})
    command = [sys.executable, "-m", "benchmarks.overlap", "--trace", str(trace), "--out", str(tmp_path / "overlap")]
    subprocess.run(command, check=True, cwd=ROOT)
    assert json.loads((tmp_path / "overlap.json").read_text())["hidden"] == {"to host": 0.5, "to device": 1.0}
    assert (tmp_path / "overlap.png").stat().st_size > 1000


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("*.json")), ids=lambda path: path.name)
def test_results_say_how_they_were_made(path):
    for call in json.loads(path.read_text()):
        header = call["header"]
        assert header["command"].startswith("python -m benchmarks.")
        assert all(header[name] for name in ("commit", "gpu", "torch", "transformers", "date"))
        assert call["rows"]


def test_the_readme_table_is_in_the_results():
    """Every time and memory in the README's table is a rounded number of a committed result."""
    rows = [
        row
        for call in json.loads((ROOT / "benchmarks/results/train_step_h200_2026-11-23.json").read_text())
        for row in call["rows"]
    ]
    texts = {f"{row['step_s']:.2f} s, {row['peak_gib']:.1f} GiB" for row in rows}
    table = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("|") and " GiB" in line]
    cells = [cell.strip().strip("*") for line in table for cell in line.split("|") if " s, " in cell]
    assert len(cells) == 11
    assert set(cells) <= texts
