"""Available host memory as the system states it. A failure means an OOM kill, or a refusal although there is memory."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hf_fpdt.host_limits import available_host_bytes

MIB = 1 << 20


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


MEMINFO = {"proc/meminfo": "MemTotal:       16000 kB\nMemFree:  1 kB\nMemAvailable:    8192 kB\nBuffers: 3 kB\n"}
INSIDE = {"proc/self/cgroup": "0::/pod/container\n"}


def group(name, limit, current, inactive=0):
    base = f"sys/fs/cgroup/{name}"
    stat = f"anon 5\ninactive_file {inactive}\nactive_file 7\n"
    return {f"{base}/memory.max": f"{limit}\n", f"{base}/memory.current": f"{current}\n", f"{base}/memory.stat": stat}


@pytest.mark.parametrize(
    ("files", "want"),
    [
        ({}, None),
        (MEMINFO, 8 * MIB),
        ({"proc/meminfo": MEMINFO["proc/meminfo"] + "Balloon:   2048 kB\nHugePages_Total:  0\n"}, 10 * MIB),
        (MEMINFO | INSIDE, 8 * MIB),
        (MEMINFO | INSIDE | group("pod/container", 6 * MIB, 4 * MIB), 2 * MIB),
        (MEMINFO | INSIDE | group("pod/container", 6 * MIB, 4 * MIB, inactive=MIB), 3 * MIB),
        (MEMINFO | INSIDE | group("pod/container", "max", 4 * MIB), 8 * MIB),
        (MEMINFO | INSIDE | group("pod/container", "max", 4 * MIB) | group("pod", 5 * MIB, 4 * MIB), MIB),
        (MEMINFO | INSIDE | group("pod/container", 60 * MIB, 4 * MIB), 8 * MIB),
        (MEMINFO | INSIDE | group("pod/container", 4 * MIB, 5 * MIB), 0),
        (MEMINFO | {"proc/self/cgroup": "0::/\n"} | group("", 3 * MIB, 2 * MIB), MIB),
        (MEMINFO | {"proc/self/cgroup": "4:memory:/old\n"}, 8 * MIB),
        (INSIDE | group("pod/container", 6 * MIB, 4 * MIB), 2 * MIB),
    ],
)
def test_the_least_of_what_is_stated(tmp_path, files, want):
    write(tmp_path, files)
    assert available_host_bytes(tmp_path) == want


def test_this_machine():
    available = available_host_bytes()
    assert available is None or available > 0


ROOT = Path(__file__).parents[1]


class Job:
    """`tests/launched/beside.py` in a process of its own."""

    def __init__(self, folder: Path, name: str, host_memory):
        self.folder, self.name = folder, name
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
        command = [sys.executable, "tests/launched/beside.py", str(folder), name, str(host_memory)]
        self.process = subprocess.Popen(command, env=os.environ | variables, cwd=ROOT)

    def wait_for_step(self) -> None:
        deadline = time.monotonic() + 60
        while not (self.folder / f"{self.name}.0").exists():
            assert self.process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)

    def result(self) -> dict:
        assert self.process.wait(60) == 0
        return json.loads((self.folder / f"{self.name}.json").read_text())


@pytest.fixture
def jobs(tmp_path):
    """Starts jobs on a host of so many bytes; ends those that are left."""
    started = []

    def start(name, host_memory, host_bytes=1 << 40):
        (tmp_path / "host").write_text(str(host_bytes))
        started.append(Job(tmp_path, name, host_memory))
        return started[-1]

    yield start
    for job in started:
        if job.process.poll() is None:
            job.process.kill()
            job.process.wait()


def test_two_jobs_keep_to_their_caps(jobs, tmp_path):
    """One cap is enough for a step, the other is not."""
    (tmp_path / "go").touch()
    large, small = jobs("large", MIB), jobs("small", 40_960)
    found, refused = large.result(), small.result()
    assert len(found["losses"]) == 2
    assert 40_960 < found["locked"] <= MIB
    assert "FPDTConfig(host_memory=40960)" in refused["error"]
    assert refused["losses"] == []
    locked = list(map(int, (tmp_path / "small.locked").read_text().split()))
    assert 0 < sum(locked) <= 40_960


def test_a_second_job_sees_what_the_first_has_taken(jobs, tmp_path):
    """It is refused in its first forward, and the first trains on; alone it would have had enough."""
    first = jobs("first", "auto")
    first.wait_for_step()
    taken = sum(map(int, (tmp_path / "first.locked").read_text().split()))
    second = jobs("second", "auto", host_bytes=taken + taken // 2)
    refused = second.result()
    assert "The machine, or the control group this process runs in, has" in refused["error"]
    assert refused["losses"] == []
    (tmp_path / "go").touch()
    found = first.result()
    assert found["losses"] == [found["losses"][0]] * 2
    assert found["locked"] == taken
