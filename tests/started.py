"""
Starts Python commands as forks of one process that has imported torch, transformers and their kind (`fork_server.py`): most of
the time of a command that trains a tiny model goes into these imports.

hf_fpdt is not imported beforehand. Arguments, environment, folder and the way a command ends are as in an interpreter of its
own, on CPUs: nothing forked has a GPU. In a fork `sys.executable` is a program that asks for another one: what `accelerate
launch` starts on each rank is forked as well. That an interpreter of its own imports the others behind hf_fpdt, in the
environment of its launch, is what tests with `fresh=True` see.
"""

import atexit
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile

FILES = b"stdin, stdout, stderr\n"
ROOT = Path(__file__).resolve().parents[1]
_SERVER = Path(__file__).with_name("fork_server.py")


class Started:
    """A command that runs until it ends or this object's process does."""

    def __init__(self, command: list[str], env: dict[str, str], cwd: str, files: list[int], program: str, address: str):
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(address)
        socket.send_fds(self._socket, [FILES], files)
        words = {"command": command, "env": env, "cwd": cwd, "program": program}
        self._socket.sendall(json.dumps(words).encode() + b"\n")

    def wait(self, timeout: float | None = None) -> int:
        """
        How it ended, as in `subprocess`.

        Raises:
            TimeoutError: it has not.
        """
        self._socket.settimeout(timeout)
        return int(self._socket.recv(20) or b"the process that forks has ended")

    def end(self) -> None:
        """At once, if it has not."""
        self._socket.close()


def relay(python: str, address: str) -> None:
    """Is the command of this process: ends as it does. Only a script or a module is forked."""
    command = [python, *sys.argv[1:]]
    named = [word for word in command[1:] if word != "-u"]
    if not named or (named[0].startswith("-") and named[0] != "-m"):
        os.execv(python, command)
    code = Started(command, dict(os.environ), os.getcwd(), [0, 1, 2], sys.argv[0], address).wait()
    if code < 0:
        os.kill(os.getpid(), -code)
    sys.exit(code)


def run(command: list, *, timeout: float, env: Mapping[str, str] | None = None, cwd: str | Path = ROOT, fresh: bool = False):
    """
    `subprocess.run` of a Python's command, with its output as text.

    Args:
        env: its environment; None for this one, with the checkout on Python's path.
        fresh: in an interpreter of its own.
    """
    if env is None:
        env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
    command = list(map(str, command))
    if fresh:
        return subprocess.run(command, env=env, cwd=cwd, timeout=timeout, capture_output=True, text=True)
    with open(os.devnull) as nothing, TemporaryFile("w+") as out, TemporaryFile("w+") as errors:
        files = [file.fileno() for file in (nothing, out, errors)]
        address, program = server()
        process = Started(command, dict(env), str(cwd), files, program, address)
        try:
            code = process.wait(timeout)
        finally:
            process.end()
        for file in (out, errors):
            file.seek(0)
        return subprocess.CompletedProcess(command, code, out.read(), errors.read())


@cache
def server() -> tuple[str, str]:
    """
    Starts the process that forks, once for all tests, and does not wait for its imports. Where it listens, and the program that
    `sys.executable` is in its forks.
    """
    folder = TemporaryDirectory()
    address, program = os.path.join(folder.name, "socket"), os.path.join(folder.name, "python")
    write_program(program, sys.executable, address)
    env = {name: value for name, value in os.environ.items() if not name.startswith("FPDT_") and name != "PYTHONPATH"}
    env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        number = listener.fileno()
        command = [sys.executable, _SERVER, str(number)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=env, pass_fds=[number])

    def end() -> None:
        process.kill()
        process.wait()
        folder.cleanup()

    atexit.register(end)
    return address, program


def write_program(path: str | Path, python: str | Path, address: str) -> None:
    """One that is started as `python` is, and asks for a fork."""
    lines = (f"#!{sys.executable} -IS", "import sys", f"sys.path.insert(0, {str(_SERVER.parent)!r})")
    Path(path).write_text("\n".join((*lines, "import started", f"started.relay({str(python)!r}, {address!r})")))
    Path(path).chmod(0o700)
