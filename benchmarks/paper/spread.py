"""
Commands of benchmarks over the GPUs of a host, one command a GPU at a time.

    python -m benchmarks.paper.efficiency --commands --short > short.txt
    python -m benchmarks.paper.spread short.txt --time-limit 540 --folder found

Input: a file, or standard input with `-`, of commands, each below a line that says what it takes, as `--commands` of the
scripts here prints it:

    # about 240 s, 2 GPUs
    python -m benchmarks.shared_step ... --out shared.json

Those that need most GPUs start first, then the longest. With `--time-limit` a command does not start if the seconds it is
expected to take are not left, and what still runs at the limit is ended; the benchmarks write their `--out` after every point.
A relative `--out` and a log of each command are put in `--folder`. The exit status is 1 unless all ran to their end.

Every command sees its own GPUs (`CUDA_VISIBLE_DEVICES`), runs on cores of its own, next to them where the system tells which
those are, and has an even share of the host's memory for what hf_fpdt locks (`FPDT_HOST_MEMORY`, of each process). A command
that takes more says so, `# about 400 s, 1 GPU, 410 GiB`; the others share the rest.
"""

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hf_fpdt.host_limits import RESERVE_BYTES, available_host_bytes
from hf_fpdt.numa import node_cpus

_TAKES = re.compile(r"# about (\d+) s(?:, (\d+) GPUs?)?(?:, (\d+) GiB)?")
_GIVEN_OUT = 0.9  # of the host's memory: the processes take some themselves
_MARK = "BENCHMARK_SPREAD"  # in the environment of everything that a command starts
_GRACE_S = 15.0  # from the interrupt to the kill
_POLL_S = 0.2


@dataclass(frozen=True)
class Job:
    """
    A command and what it takes.

    Args:
        seconds: how long it is expected to run.
        gpus: how many it needs at once.
        host_gib: host memory that it locks, for each process; None: an even share is enough.
    """

    command: str
    seconds: float
    gpus: int = 1
    host_gib: int | None = None

    def __str__(self) -> str:
        words = [f"# about {self.seconds:.0f} s"]
        if self.gpus > 1 or self.host_gib:
            words.append(f"{self.gpus} GPU{'s' * (self.gpus > 1)}")
        words += [f"{self.host_gib} GiB"] if self.host_gib else []
        return f"{', '.join(words)}\n{self.command}"


@dataclass(frozen=True)
class Host:
    """
    What there is to share.

    Args:
        gpus: their names in `CUDA_VISIBLE_DEVICES`.
        cores: of each GPU, disjoint.
        memory: bytes that may be locked in all; None: not known, and no command is told.
    """

    gpus: Sequence[str]
    cores: Sequence[set[int]]
    memory: int | None


@dataclass
class Running:
    """A command that was started, on the GPUs at these places of `Host.gpus`."""

    job: Job
    places: list[int]
    process: subprocess.Popen
    log: Path
    mark: str
    started: float = field(default_factory=time.monotonic)
    ended_early: bool = False


def main():
    args = _arguments()
    text = sys.stdin.read() if args.file == "-" else Path(args.file).read_text()
    jobs = read_jobs(text.splitlines())
    host = host_of(args.gpus.split(",") if args.gpus else found_gpus())
    print(f"{len(jobs)} commands, about {makespan(jobs, len(host.gpus)):.0f} s on {len(host.gpus)} GPUs", flush=True)
    raise SystemExit(0 if spread(jobs, host, Path(args.folder), args.time_limit) else 1)


def _arguments(words: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="the commands; -: standard input")
    parser.add_argument("--gpus", help="which, separated by commas; all if not given")
    parser.add_argument("--folder", default="spread", help="where logs and relative --out files are put")
    parser.add_argument("--time-limit", type=float, metavar="S", help="nothing runs longer, from the start of this script")
    return parser.parse_args(words)


def read_jobs(lines: Iterable[str]) -> list[Job]:
    """
    The commands in their order; lines that are empty or other comments say nothing.

    Raises:
        ValueError: for a command without a line of what it takes.
    """
    jobs, takes = [], None
    for line in map(str.strip, lines):
        if found := _TAKES.fullmatch(line):
            takes = found.groups()
        elif line and not line.startswith("#"):
            if takes is None:
                raise ValueError(f"{line!r}: a line like '# about 240 s, 2 GPUs' is needed above each command, see --help.")
            seconds, gpus, host_gib = takes
            jobs.append(Job(line, float(seconds), int(gpus or 1), int(host_gib) if host_gib else None))
            takes = None
    return jobs


def in_order(jobs: Iterable[Job]) -> list[Job]:
    """Those that need most GPUs first, so that none waits for several to be free at once; then the longest."""
    return sorted(jobs, key=lambda job: (-job.gpus, -job.seconds))


def makespan(jobs: Iterable[Job], gpus: int) -> float:
    """Seconds that they are expected to take in all."""
    waiting, running, now = in_order(jobs), [], 0.0
    while waiting or running:
        free = gpus - sum(job.gpus for _, job in running)
        job = next((job for job in waiting if job.gpus <= free), None)
        if job is None:
            now = min(end for end, _ in running)
            running = [(end, job) for end, job in running if end > now]
        else:
            waiting.remove(job)
            running.append((now + job.seconds, job))
    return now


def host_of(gpus: Sequence[str], root: Path = Path("/")) -> Host:
    """What this host has for these GPUs."""
    available = available_host_bytes(root)
    memory = None if available is None else int(_GIVEN_OUT * max(available - RESERVE_BYTES, 0))
    nodes = [node_cpus(address, root) for address in _pci_addresses(gpus)]
    return Host(gpus, shared_cores(os.sched_getaffinity(0), nodes), memory)


def found_gpus() -> list[str]:
    """Those of `CUDA_VISIBLE_DEVICES`, else all."""
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return visible.split(",")
    names = _nvidia_smi("index")
    if not names:
        raise ValueError("no GPU was found (nvidia-smi); name them with --gpus 0,1,...")
    return names


def _pci_addresses(gpus: Sequence[str]) -> list[str | None]:
    known = dict(zip(_nvidia_smi("index"), _nvidia_smi("pci.bus_id"), strict=False))
    found = [known.get(gpu) for gpu in gpus]
    return [None if address is None else address[-12:].lower() for address in found]  # its domain has eight digits there


def _nvidia_smi(what: str) -> list[str]:
    words = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return []


def shared_cores(cores: set[int], nodes: Sequence[set[int]]) -> list[set[int]]:
    """
    Disjoint shares of the cores, one for each GPU: of those of its node, evenly among the GPUs there; of all where a node is
    not known or has no core of ours.
    """
    groups = [frozenset(node & cores) for node in nodes]
    if not all(groups) or any(a != b and a & b for a in groups for b in groups):
        groups = [frozenset(cores)] * len(nodes)
    shares, seen = [], dict.fromkeys(groups, 0)
    for group in groups:
        size, have = len(group) // groups.count(group), sorted(group)
        start = seen[group] * size
        shares.append(set(have[start : start + size]) or set(have))  # more GPUs than cores: together
        seen[group] += 1
    return shares


def shares_of(jobs: Sequence[Job], host: Host) -> dict[Job, int | None]:
    """
    Bytes of host memory that each process of a command may lock.

    Raises:
        ValueError: if the commands that name their memory name more than there is, or a command needs more GPUs.
    """
    wide = [job for job in jobs if job.gpus > len(host.gpus)]
    if wide:
        raise ValueError(f"{wide[0].command}: {wide[0].gpus} GPUs are needed, and there are {len(host.gpus)}.")
    named = sum(job.host_gib * job.gpus for job in jobs if job.host_gib) << 30
    if host.memory is None:
        return {job: job.host_gib and job.host_gib << 30 for job in jobs}
    if named > host.memory:
        raise ValueError(
            f"{named / 2**30:.0f} GiB of host memory are named, and {host.memory / 2**30:.0f} GiB can be taken; leave out "
            "commands that name theirs, or run them one after the other."
        )
    even = (host.memory - named) // len(host.gpus)
    return {job: job.host_gib << 30 if job.host_gib else even for job in jobs}


def spread(jobs: Sequence[Job], host: Host, folder: Path, time_limit: float | None, report: Callable = print) -> bool:
    """Runs the commands, with a line for each that ends. Returns whether all ran to their end and succeeded."""
    shares, waiting, running = shares_of(jobs, host), in_order(jobs), []
    folder.mkdir(parents=True, exist_ok=True)
    free, good, started = list(range(len(host.gpus))), True, time.monotonic()
    try:
        while True:
            left = float("inf") if time_limit is None else time_limit - (time.monotonic() - started)
            for one in [one for one in running if one.process.poll() is not None or left <= 0]:
                good &= _finished(one, host, report)
                running.remove(one)
                free = sorted([*free, *one.places])
            while job := next((job for job in waiting if job.gpus <= len(free) and job.seconds <= left), None):
                waiting.remove(job)
                places, free = free[: job.gpus], free[job.gpus :]
                running.append(_start(job, places, host, folder, shares[job], len(jobs) - len(waiting)))
            if not running:
                break
            time.sleep(_POLL_S)
    finally:
        for one in running:
            _end(one)
    for job in waiting:
        report(f"not started, {job.seconds:.0f} s were not left: {job.command}", flush=True)
    return good and not waiting


def _start(job: Job, places: list[int], host: Host, folder: Path, memory: int | None, number: int) -> Running:
    words, name = _words(job.command, folder)
    mark, log = f"{os.getpid()}.{number}", folder / f"{number:02d}_{name}.log"
    cores = set().union(*(host.cores[place] for place in places))
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(host.gpus[place] for place in places), _MARK: mark}
    if memory is not None:
        environment["FPDT_HOST_MEMORY"] = str(memory)

    def in_child():
        os.sched_setaffinity(0, cores)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have left it ignored

    with log.open("w") as file:
        file.write(f"{job}\n")
        file.flush()
        streams = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(words, env=environment, start_new_session=True, preexec_fn=in_child, **streams)
    return Running(job, places, process, log, mark)


def _words(command: str, folder: Path) -> tuple[list[str], str]:
    """The command's words, with this Python and its `--out` in the folder, and what to call it."""
    words = shlex.split(command)
    words[0] = sys.executable if words[0] == "python" else words[0]
    if "--out" not in words[:-1]:
        return words, "command"
    at = words.index("--out") + 1
    name = Path(words[at]).stem
    words[at] = str(folder / words[at])  # an absolute one stays as it is
    return words, name


def _finished(one: Running, host: Host, report: Callable) -> bool:
    """Reports an end, which is made here if it has not come; whether it was a good one."""
    late = one.process.poll() is None
    _end(one)
    seconds, status = time.monotonic() - one.started, one.process.returncode
    how = "ended at the time limit" if late else "done" if status == 0 else f"FAILED (exit status {status})"
    gpus = ",".join(host.gpus[place] for place in one.places)
    report(f"{how} after {seconds:.0f} s (about {one.job.seconds:.0f}), GPU {gpus}, {one.log}: {one.job.command}", flush=True)
    if how.startswith("FAILED"):
        report(f"    {_last_line(one.log)}", flush=True)
    return how == "done"


def _last_line(log: Path) -> str:
    return next((line for line in reversed(log.read_text(errors="replace").splitlines()) if line.strip()), "")


def _end(one: Running) -> None:
    """Ends a command and all that it has started, also in sessions of their own; afterwards nothing of it holds a GPU."""
    if one.process.poll() is None:
        os.kill(one.process.pid, signal.SIGINT)  # shared_step ends its ranks then
        try:
            one.process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            one.process.kill()
            one.process.wait()
    deadline = time.monotonic() + _GRACE_S
    while (left := _of_mark(one.mark)) and time.monotonic() < deadline:
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.05)


def _of_mark(mark: str) -> list[int]:
    """Processes that were started under this mark and live, where the system shows them (Linux)."""
    wanted, found = f"{_MARK}={mark}".encode(), []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if wanted in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
        except OSError:  # gone, or somebody else's
            continue
    return found


if __name__ == "__main__":
    main()
