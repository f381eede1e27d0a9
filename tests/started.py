"""
Starts Python commands as forks of one process that has imported torch, transformers and their kind (`fork_server.py`): most of
the time of a command that trains a tiny model goes into these imports.

hf_fpdt is not imported beforehand. Arguments, environment, folder and the way a command ends are as in an interpreter of its
own, for `accelerate launch` and for what it starts on each rank alike. That an interpreter of its own imports the others behind
hf_fpdt, in the environment of its launch, is what tests with `fresh=True` see.
"""

import atexit
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile

FILES = b"stdin, stdout, stderr"
_SERVER = Path(__file__).with_name("fork_server.py")


class Started:
    """A command that runs: what the tests and torch's launcher use of `subprocess.Popen`."""

    def __init__(self, address: str, command: list[str], env: dict[str, str], cwd: str, files: list[int]):
        self.args, self.returncode, self._socket = command, None, socket.socket(socket.AF_UNIX)
        self._socket.connect(address)
        socket.send_fds(self._socket, [FILES], files)
        self._socket.sendall(json.dumps({"command": command, "env": env, "cwd": cwd}).encode())
        self._socket.shutdown(socket.SHUT_WR)
        self.pid = int(self._answer())

    def poll(self) -> int | None:
        return self._ended(0)

    def wait(self, timeout: float | None = None) -> int:
        if self._ended(timeout) is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def _ended(self, timeout: float | None) -> int | None:
        if self.returncode is None:
            with selectors.DefaultSelector() as selector:
                selector.register(self._socket, selectors.EVENT_READ)
                if selector.select(timeout):
                    self.returncode = int(self._answer())
                    self._socket.close()
        return self.returncode

    def _answer(self) -> str:
        line = b""
        while not line.endswith(b"\n"):
            line += self._socket.recv(1) or b"the process that starts commands has ended\n"
        return line.decode()


def run(command: list, *, env: Mapping[str, str], cwd: str | Path, timeout: float, fresh: bool = False):
    """`subprocess.run` of a Python's command, with its output as text; `fresh`: in an interpreter of its own."""
    command = list(map(str, command))
    if fresh:
        return subprocess.run(command, env=env, cwd=cwd, timeout=timeout, capture_output=True, text=True)
    with open(os.devnull) as nothing, TemporaryFile("w+") as out, TemporaryFile("w+") as errors:
        files = [file.fileno() for file in (nothing, out, errors)]
        process = Started(server(), command, dict(env), str(cwd), files)
        try:
            process.wait(timeout)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        for file in (out, errors):
            file.seek(0)
        return subprocess.CompletedProcess(command, process.returncode, out.read(), errors.read())


@cache
def server() -> str:
    """Starts the process that forks, once for all tests, and does not wait for its imports; where it listens."""
    folder = TemporaryDirectory()
    address = os.path.join(folder.name, "socket")
    env = {name: value for name, value in os.environ.items() if not name.startswith("FPDT_") and name != "PYTHONPATH"}
    env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        number = listener.fileno()
        command = [sys.executable, _SERVER, address, str(number)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=env, pass_fds=[number])

    def end() -> None:
        process.kill()
        process.wait()
        folder.cleanup()

    atexit.register(end)
    return address
