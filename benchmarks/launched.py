"""Commands that run at the same time, each on GPUs of its own, and one command that is ended with all its processes."""

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from .ahead import Outcome


def launched(command: list[str], seconds: float | None, environment: dict[str, str] | None = None) -> Outcome:
    """What a command left behind. After `seconds` it is killed, with the processes that it started."""
    started = time.monotonic()
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        command, stdout=pipe, stderr=pipe, text=True, errors="replace", start_new_session=True, env=environment
    )
    try:
        stdout, stderr = process.communicate(timeout=seconds)
    except BaseException as error:
        _end(process)
        stdout, stderr = process.communicate()
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
    return Outcome(process.returncode, stdout, stderr, time.monotonic() - started)


def _end(process: subprocess.Popen) -> None:
    """At once, with all that it started: torch's launcher gives every rank a session of its own."""
    import psutil

    for one in [*psutil.Process(process.pid).children(recursive=True), process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()


@dataclass(frozen=True)
class Job:
    command: list[str]
    gpus: int = 1


def spread(
    jobs: Sequence[Job], gpus: int, start_by: float | None, end_by: float | None
) -> Iterator[tuple[int, Outcome | None]]:
    """
    Runs the jobs on the first `gpus` GPUs that this process may use, as many at once as there are GPUs for. A job starts as
    soon as enough are free, before others that need more and come earlier.

    Args:
        start_by, end_by: seconds of `time.monotonic()`. No job starts after the first, and none is left after the second.

    Yields:
        The number of each job and what it left behind, as they end; None for one that was not started.
    """
    free, waiting = _devices(gpus), dict(enumerate(jobs))
    running: dict[Future, tuple[int, list[str]]] = {}
    with ThreadPoolExecutor(max(gpus, 1)) as pool:
        while waiting or running:
            late = start_by is not None and time.monotonic() >= start_by
            for index, job in [] if late else list(waiting.items()):
                if job.gpus <= len(free):
                    del waiting[index]
                    taken, free = free[: job.gpus], free[job.gpus :]
                    left = None if end_by is None else end_by - time.monotonic()
                    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(taken)}
                    running[pool.submit(launched, job.command, left, environment)] = (index, taken)
            if not running:
                yield from ((index, None) for index in waiting)
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                index, taken = running.pop(future)
                free = sorted(free + taken)
                yield index, future.result()


def _devices(gpus: int) -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(index) for index in range(gpus)] if visible is None else visible.split(",")
    if len(names) < gpus:
        raise ValueError(f"--gpus {gpus}: CUDA_VISIBLE_DEVICES={visible} names {len(names)}. Lower --gpus, or name more.")
    return names[:gpus]
