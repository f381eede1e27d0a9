"""How much host memory this process may still take: what the machine has free, and what its control groups allow."""

import os
from pathlib import Path

RESERVE_BYTES = 2 << 30  # left to the rest of the machine


def available_host_bytes(root: Path = Path("/")) -> int | None:
    """
    Bytes that can be taken now without swapping or being killed: the least of the kernel's `MemAvailable`, in a virtual
    machine with what its balloon holds and gives back on demand, and, for every control group (v2) that this process is in,
    of its limit less what is in use and cannot be reclaimed. None where neither can be read (not Linux).
    """
    found = [_meminfo(root), *(_group(group) for group in _groups(root))]
    known = [value for value in found if value is not None]
    return max(min(known), 0) if known else None


def processes_on_host() -> int:
    """Processes of this run that share the host's memory, as torchrun and `accelerate launch` tell them; 1 without."""
    count = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(int(count), 1) if count.isdecimal() else 1


def _meminfo(root: Path) -> int | None:
    fields = dict(line.split(":", 1) for line in _read(root / "proc/meminfo").splitlines() if ":" in line)
    if "MemAvailable" not in fields:
        return None
    kib = (int(fields[name].split()[0]) for name in ("MemAvailable", "Balloon") if name in fields)
    return sum(kib) * 1024


def _groups(root: Path) -> list[Path]:
    """The directory of this process's group and of every one around it."""
    base = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        if line.startswith("0::"):
            own = base / line[3:].strip().lstrip("/")
            return [own, *(parent for parent in own.parents if base in (parent, *parent.parents))]
    return []


def _group(group: Path) -> int | None:
    limit, current = _read(group / "memory.max").strip(), _read(group / "memory.current").strip()
    if not limit.isdecimal() or not current.isdecimal():  # "max": no limit
        return None
    cached = [line.split()[1] for line in _read(group / "memory.stat").splitlines() if line.startswith("inactive_file ")]
    return int(limit) - int(current) + sum(map(int, cached))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
