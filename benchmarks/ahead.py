"""
Commands that run one after the other, each in its own process, started ahead: while one works, the next one gets ready (it
imports) and then waits for a line on its standard input.
"""

import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Outcome:
    """What a command left behind, and the seconds from its go to its end."""

    returncode: int
    stdout: str
    stderr: str
    seconds: float


def run_ahead(commands: Sequence[list[str]], may_go: Callable[[], bool]) -> Iterator[Outcome | None]:
    """
    The outcome of each command, in order.

    Args:
        may_go: asked before each command. From the first False on nothing runs any more, and the outcomes are None.
    """
    ready: subprocess.Popen | None = None
    stopped = False
    try:
        for index, command in enumerate(commands):
            stopped = stopped or not may_go()
            if stopped:
                yield None
                continue
            current = ready or _start(command)
            ready = _start(commands[index + 1]) if index + 1 < len(commands) else None
            yield _finish(current)
    finally:
        if ready is not None:
            _end(ready)


def _start(command: list[str]) -> subprocess.Popen:
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, errors="replace")


def _finish(process: subprocess.Popen) -> Outcome:
    started = time.time()
    try:
        stdout, stderr = process.communicate("go\n")
    except BaseException:
        _end(process)
        raise
    return Outcome(process.returncode, stdout, stderr, time.time() - started)


def _end(process: subprocess.Popen) -> None:
    process.kill()
    process.wait()
