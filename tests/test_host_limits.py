"""Available host memory as the system states it. A failure means an OOM kill, or a refusal although there is memory."""

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
