"""Commands over the GPUs of a host, with commands that only say where and when they ran."""

import io
import json
import os
import shlex
import time
from pathlib import Path

import pytest

from benchmarks.paper import spread
from benchmarks.paper.spread import Host, Job

GIB = 1 << 30
SAYS = """
import json, os, sys, time
found = {"start": time.monotonic(), "gpus": os.environ["CUDA_VISIBLE_DEVICES"], "cores": sorted(os.sched_getaffinity(0))}
found |= {"memory": os.environ.get("FPDT_HOST_MEMORY"), "pid": os.getpid()}
json.dump(found, open(sys.argv[3], "w"))
time.sleep(float(sys.argv[1]))
json.dump(found | {"stop": time.monotonic()}, open(sys.argv[3], "w"))
"""


def job(name, sleeps, seconds=1, gpus=1, text=SAYS, **more):
    return Job(shlex.join(["python", "-c", text, str(sleeps), "--out", f"{name}.json"]), seconds, gpus, **more)


def host(count, memory=None):
    cores = sorted(os.sched_getaffinity(0))
    return Host([str(10 + i) for i in range(count)], [{cores[i % len(cores)]} for i in range(count)], memory)


def run(jobs, count, tmp_path, time_limit=None, memory=None):
    lines = []
    good = spread.spread(jobs, host(count, memory), tmp_path / "found", time_limit, lambda line, flush: lines.append(line))
    found = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "found").glob("*.json")}
    return good, lines, found


def test_commands_run_beside_each_other_on_gpus_of_their_own(tmp_path):
    """Five on three GPUs, one of which takes two: no GPU has two commands at a time, and all say where they ran."""
    jobs = [job("a", 0.3, 1), job("b", 0.9, 5), job("wide", 0.3, 2, gpus=2), job("c", 0.3, 3), job("d", 0.1, 4)]
    good, lines, found = run(jobs, 3, tmp_path, memory=30 * GIB)
    assert good
    assert len(found) == len(lines) == 5
    assert found["wide"]["gpus"] == "10,11"  # first, whatever its seconds
    assert found["b"]["gpus"] == "12"  # the longest of the rest
    busy = [(gpu, one["start"], one["stop"]) for one in found.values() for gpu in one["gpus"].split(",")]
    for index, (gpu, start, stop) in enumerate(busy):
        assert not any(other == gpu and begin < stop and start < end for other, begin, end in busy[index + 1 :])
    assert {one["memory"] for one in found.values()} == {str(10 * GIB)}
    cores = host(3).cores
    assert found["wide"]["cores"] == sorted(cores[0] | cores[1])
    assert found["b"]["cores"] == sorted(cores[2])
    logs = sorted(path.name for path in (tmp_path / "found").glob("*.log"))  # in the order of their starts
    assert logs == ["01_wide.log", "02_b.log", "03_d.log", "04_c.log", "05_a.log"]
    assert any(line.startswith("done after") and "GPU 10,11" in line for line in lines)


MEETS = """
import os, pathlib, sys, time
own, deadline = pathlib.Path(sys.argv[3]), time.monotonic() + 30
own.write_text("{}")
while len(list(own.parent.glob("*.json"))) < 2:
    assert time.monotonic() < deadline
    time.sleep(0.02)
"""


def test_commands_run_at_the_same_time(tmp_path):
    """Each ends when the other has begun."""
    assert run([job("a", 0, text=MEETS), job("b", 0, text=MEETS)], 2, tmp_path)[0]


def test_a_command_that_fails_is_told_and_the_rest_runs(tmp_path):
    bad = job("bad", 0, text="raise SystemExit('no such shape')")
    killed = job("killed", 0, text="import os; os.kill(os.getpid(), 9)")
    good, lines, found = run([bad, killed, job("fine", 0)], 1, tmp_path)
    assert not good
    assert list(found) == ["fine"]
    assert any(line.startswith("FAILED (exit status 1)") and "bad.json" in line for line in lines)
    assert "    no such shape" in lines
    assert any(line.startswith("FAILED (exit status -9)") for line in lines)
    assert sum(line.startswith("done") for line in lines) == 1


STARTS_ANOTHER = """
import json, subprocess, sys, time
other = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.signal(2, signal.SIG_IGN); time.sleep(60)"],
                         start_new_session=True)
json.dump({"pid": other.pid}, open(sys.argv[3], "w"))
time.sleep(float(sys.argv[1]))
"""


def alive(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False


def test_the_time_limit_ends_what_runs_and_starts_nothing_that_does_not_fit(tmp_path):
    """Also what a command left in a session of its own, which would hold the GPU."""
    jobs = [job("long", 60, 2, text=STARTS_ANOTHER), job("too_long", 0, 100), job("late", 0, 1)]
    started = time.monotonic()
    good, lines, found = run(jobs, 1, tmp_path, time_limit=3)
    assert time.monotonic() - started < 15
    assert not good
    assert list(found) == ["long"]
    assert not alive(found["long"]["pid"])
    assert lines[0].startswith("ended at the time limit")
    assert [line.split(",")[0] for line in lines[1:]] == ["not started"] * 2


def test_what_a_command_leaves_behind_is_ended_with_it(tmp_path):
    good, _, found = run([job("leaves", 0, text=STARTS_ANOTHER), job("next", 0)], 1, tmp_path)
    assert good
    assert not alive(found["leaves"]["pid"])


def test_jobs_are_read_as_they_are_printed():
    jobs = [Job("python -m a --x 'b c'", 12), Job("python b", 240, 2), Job("python c", 400, 1, 410)]
    lines = "\n".join(map(str, jobs)).splitlines()
    assert lines[2] == "# about 240 s, 2 GPUs"
    assert spread.read_jobs(["# a remark", "", *lines]) == jobs
    with pytest.raises(ValueError, match="python d"):
        spread.read_jobs([*lines, "python d"])


def test_how_long_they_take():
    jobs = [Job("a", 5), Job("b", 4), Job("c", 3), Job("d", 3), Job("e", 3)]
    assert spread.makespan(jobs, 1) == 18
    assert spread.makespan(jobs, 2) == 10  # 5 3 and 4 3 3
    assert spread.makespan([Job("a", 5), Job("w", 2, 2), Job("v", 1, 2)], 2) == 8


def test_shares_of_cores():
    cores = set(range(8))
    assert spread.shared_cores(cores, [set()] * 4) == [{0, 1}, {2, 3}, {4, 5}, {6, 7}]
    low, high = set(range(4)), set(range(4, 8))
    assert spread.shared_cores(cores, [high, low, high, low]) == [{4, 5}, {0, 1}, {6, 7}, {2, 3}]
    assert spread.shared_cores(cores, [low, set()]) == [low, high]  # a node that is not known
    assert spread.shared_cores(low, [low, high]) == [{0, 1}, {2, 3}]  # kept away from one node
    assert spread.shared_cores({0}, [set()] * 2) == [{0}, {0}]


def test_shares_of_memory():
    plain, big = Job("a", 1), Job("b", 1, 1, 60)
    assert spread.shares_of([plain, big], host(4, 100 * GIB)) == {plain: 10 * GIB, big: 60 * GIB}
    assert spread.shares_of([plain, big], host(4)) == {plain: None, big: 60 * GIB}
    with pytest.raises(ValueError, match="60 GiB of host memory are named, and 50 GiB"):
        spread.shares_of([plain, big], host(4, 50 * GIB))
    with pytest.raises(ValueError, match="2 GPUs are needed, and there are 1"):
        spread.shares_of([Job("w", 1, 2)], host(1))


def test_the_whole_command(tmp_path, monkeypatch, capsys):
    """Two commands, one of which fails."""
    text = "# about 2 s\npython -c 'print(1)'\n# about 1 s\npython -c 1/0\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    monkeypatch.setattr("sys.argv", ["spread", "-", "--gpus", "0,1", "--folder", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        spread.main()
    said = capsys.readouterr().out
    assert end.value.code == 1
    assert said.startswith("2 commands, about 2 s on 2 GPUs")
    assert "ZeroDivisionError" in said
    assert (tmp_path / "01_command.log").read_text().splitlines() == ["# about 2 s", "python -c 'print(1)'", "1"]
