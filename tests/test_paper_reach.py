"""The search for the longest sequence."""

import json
import shlex

import pytest

from benchmarks import ballast
from benchmarks.ahead import Outcome
from benchmarks.paper import ablations, reach, spread
from benchmarks.result_files import read_calls
from benchmarks.shapes import model_config
from benchmarks.shared_point import SharedSpec

K = 1024


@pytest.mark.parametrize("limit", [3 * K, 40_000, 131072, 131073, 300_000, 524288, 2_000_000])
@pytest.mark.parametrize("start", [K, 131072, 1 << 20])
def test_the_search_ends_within_five_percent(limit, start):
    asked = []

    def fits(length):
        asked.append(length)
        return length <= limit

    good, bad = reach.search(fits, start, 1 << 22, 0.05)
    assert good <= limit < bad
    assert bad - good <= max(0.05 * good, K)
    assert len(asked) == len(set(asked)) <= 16
    assert all(length % K == 0 for length in asked)


def test_the_ends_of_the_search():
    assert reach.search(lambda n: True, 131072, 1 << 20, 0.05) == (1 << 20, None)
    assert reach.search(lambda n: True, 131072, 131072, 0.05) == (131072, None)
    assert reach.search(lambda n: False, 131072, 1 << 20, 0.05) == (0, K)
    assert reach.search(lambda n: None, 131072, 1 << 20, 0.05) == (0, None)
    answers = {131072: True, 262144: False, 196608: None}
    assert reach.search(answers.get, 131072, 1 << 20, 0.05) == (131072, 262144)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--strategies", "fpdt,ring"], "got ring"),
        (["--shape", "tiny"], "--shape tiny"),
        (["--start", "8"], "--start 8"),
        (["--start", "8192", "--most", "4096"], "--most 4096"),
        (["--tolerance", "0"], "--tolerance 0"),
        (["--strategies", "sdpa,fpdt", "--host"], "--host with sdpa"),
        (["--confirm", "0"], "--confirm 0"),
        (["--strategies", "liger", "--gpus", "2"], "got liger; with --gpus 2 some of ulysses"),
        (["--strategies", "fpdt", "--gpus", "2", "--host"], "--host with --gpus 2"),
    ],
)
def test_bad_options(words, text):
    with pytest.raises(ValueError, match=text):
        reach._arguments(words)


def test_a_try_is_a_model_of_the_real_depth():
    for name in reach.STRATEGIES:
        spec = reach.spec_of(name, reach._arguments(["--strategies", name]), 131072)
        assert (spec.layers, spec.ballast_layers, spec.repeats) == (1, 31, 0)
        ballast.kept_bytes(model_config(spec.shape, 1), spec.contender, spec.fpdt)
        assert spec.ballast_host_gib == 0
    spec = reach.spec_of("fpdt", reach._arguments(["--strategies", "fpdt", "--host"]), 131072)
    assert spec.ballast_host_gib == 31 * 2 * (4096 + 2 * 1024) * 131072 / 2**30


def test_every_try_is_a_row_and_is_not_repeated(tmp_path, monkeypatch, capsys):
    """A model that holds 300,000 tokens; then a second run that has nothing left to try."""
    tries = []

    def run(commands, may_go):
        assert may_go()
        seq_len = json.loads(commands[0][-1])["seq_len"]
        tries.append(seq_len)
        found = {"step_s": 1.0, "first_step_s": 1.0, "host_gib": 0.0, "model_tflops": 1.0, "gpu": "G"}
        row = found if seq_len <= 300_000 else {"out_of_memory": True}
        return [Outcome(0, json.dumps({"row": row}), "", 1.0)]

    monkeypatch.setattr(reach, "run_ahead", run)
    out = tmp_path / "reach.json"
    words = ["reach", "--strategies", "liger", "--out", str(out)]
    monkeypatch.setattr("sys.argv", words)
    reach.main()
    *rows, last = read_calls(out)[0]["rows"]
    assert [row["seq_len"] for row in rows] == tries
    assert last["reached"] <= 300_000 < last["out_of_memory_at"]
    assert last["kept_bytes_a_token_and_layer"] == 8192
    assert "liger: reached" in capsys.readouterr().out
    count = len(tries)
    monkeypatch.setattr("sys.argv", [*words, "--go-on", str(out)])
    reach.main()
    assert len(tries) == count
    assert read_calls(out)[0]["rows"] == [*rows, last]


def test_tries_of_several_gpus_are_launches(tmp_path, monkeypatch):
    """Beside those of one GPU in the same file, of which none is taken for one of two."""
    tries, ours_alone = [], reach.STRATEGIES["fpdt"][1]

    def run(command, seconds):
        spec = json.loads(command[-1])
        tries.append((spec["contender"], spec["gpus"], spec["seq_len"], spec["repeats"]))
        found = {"step_s": 2.0, "first_step_s": 2.0, "peak_gib": 7.0, "host_gib": 0.0, "model_tflops": 1.0, "gpu": "G"}
        row = found if spec["seq_len"] <= 300_000 else {"out_of_memory": True}
        return Outcome(0, json.dumps({"row": row}), "", 1.0)

    one = {
        "strategy": "fpdt",
        "shape": "llama-3.1-8b",
        "seq_len": 262144,
        "host_held": False,
        "fpdt": ours_alone,
        "out_of_memory": True,
    }
    (tmp_path / "one.json").write_text(json.dumps([{"header": {}, "rows": [one]}]))
    monkeypatch.setattr(reach, "launched", run)
    words = "reach --gpus 2 --strategies ulysses+liger,fpdt --start 262144 --most 327680 --confirm 2"
    files = ["--out", str(tmp_path / "two.json"), "--go-on", str(tmp_path / "one.json")]
    monkeypatch.setattr("sys.argv", [*shlex.split(words), *files])
    reach.main()
    lengths = [(262144, 0), (327680, 0), (294912, 0), (311296, 0), (303104, 0), (294912, 1)]
    assert tries == [(name, 2, *one) for name in ("ulysses+liger", "fpdt") for one in lengths]
    rows = read_calls(tmp_path / "two.json")[0]["rows"]
    *_, peers, ours = reach.table([row for row in rows if row is not rows[0]])
    assert peers == "| ulysses+liger | 2 | 294,912 | 303,104 | 2 | 7.0 | 2.00 s | 0 |"
    assert ours.startswith("| fpdt | 2 | 294,912 | 303,104 | 2 |")


@pytest.mark.parametrize("ending", ["trains", "memory", "late"])
def test_the_reach_is_confirmed_by_several_steps(tmp_path, monkeypatch, ending):
    """
    Of a model that holds 300,000 tokens for a step, and without memory 270,000 for several: shorter lengths follow. A
    confirmation is no try of the search, also when a file goes on.
    """
    seen = []

    def run(commands, may_go):
        spec = json.loads(commands[0][-1])
        seen.append((spec["seq_len"], spec["repeats"]))
        row = {"step_s": 1.0, "first_step_s": 1.0, "host_gib": 0.0, "model_tflops": 1.0, "gpu": "G"}
        if spec["seq_len"] > (270_000 if spec["repeats"] and ending == "memory" else 300_000):
            row = {"out_of_memory": True}
        return [None if spec["repeats"] and ending == "late" else Outcome(0, json.dumps({"row": row}), "", 1.0)]

    monkeypatch.setattr(reach, "run_ahead", run)
    out = tmp_path / "reach.json"
    words = ["reach", "--strategies", "liger", "--confirm", "3", "--time-limit", "9", "--out", str(out)]
    monkeypatch.setattr("sys.argv", words)
    reach.main()
    *_, tried, last = read_calls(out)[0]["rows"]
    lengths = [seq_len for seq_len, repeats in seen if repeats]
    assert seen[-len(lengths) :] == [(length, 2) for length in lengths], "after the search"
    assert lengths[-1] == last["reached"]
    assert tried["steps"] == 3
    assert last.get("confirmed_steps") == (None if ending == "late" else 3)
    if ending == "memory":
        assert len(lengths) > 1
        assert 270_000 / 1.06 < last["reached"] <= 270_000 < last["out_of_memory_at"] == lengths[-2]
    else:
        assert (len(lengths), last["out_of_memory_at"] > 300_000) == (1, True)
    if ending == "trains":
        count = len(seen)
        monkeypatch.setattr("sys.argv", [*words, "--go-on", str(out)])
        reach.main()
        assert len(seen) == count
        assert read_calls(out)[0]["rows"][-1] == last


def test_the_commands_of_the_reach():
    jobs = reach.commands()
    assert all(spread.makespan([job for job in jobs if job.gpus == gpus], 4) < 540 for gpus in (1, 2))
    (whole,) = reach.commands(host=True)
    host = spread.Host(["0"] * 4, [set()] * 4, 450 << 30)
    share = spread.shares_of([whole, *ablations.commands()], host)
    assert share[whole] == whole.host_gib << 30
    for job in [*jobs, whole]:
        args = reach._arguments(shlex.split(job.command)[3:])
        spec = reach.spec_of(args.strategies, args, args.start)
        assert job.gpus == args.gpus
        if args.gpus > 1:
            assert isinstance(spec, SharedSpec)
            continue
        assert (spec.ballast_host_gib > 0) == (job is whole)
        assert spec.ballast_host_gib < (job.host_gib or 1)


def test_what_a_try_says():
    assert reach.verdict({"out_of_memory": True}) is False
    assert reach.verdict({"step_s": 1.0}) is True
    assert reach.verdict({"step_s": 1.0, "error": "NaN"}) is None
    assert reach.verdict({"not_run": "late"}) is None
