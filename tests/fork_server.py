"""`started.py` starts it: imports what commands import, and forks one for everybody who asks at the socket that it is given."""

import gc
import importlib.util
import json
import os
import runpy
import selectors
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path

from started import FILES

IMPORTS = (
    "torch._dynamo", "torch.distributed.run", "torch.distributed.tensor", "accelerate.commands.launch", "transformers.trainer",
    "transformers.models.llama.modeling_llama", "transformers.models.gpt_neox.modeling_gpt_neox", "transformers.models.auto",
    "transformers.models.auto.modeling_auto", "torch.utils.cpp_extension", "transformers.hf_argparser", "deepspeed", "datasets",
    "matplotlib.pyplot", "peft", "pandas",
)  # fmt: skip


def serve(listener: socket.socket) -> tuple[dict, list[int]] | None:
    """Returns in every fork with what it is to run and its files, and here with None when there are no more tests."""
    selector, running = selectors.DefaultSelector(), {}
    selector.register(listener, selectors.EVENT_READ)
    selector.register(sys.stdin, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj is sys.stdin:
                return None
            if key.fileobj is listener:
                connection, _ = listener.accept()
                _, files, _, _ = socket.recv_fds(connection, len(FILES), 3)
                with connection.makefile() as asked:
                    words = json.loads(asked.readline())
                if (pid := os.fork()) == 0:
                    os.setsid()
                    for file in (listener, connection, selector, *running.values()):
                        file.close()
                    return words, files
                for file in files:
                    os.close(file)
                ended = os.pidfd_open(pid)
                running[ended] = connection
                selector.register(ended, selectors.EVENT_READ, pid)
                selector.register(connection, selectors.EVENT_READ, pid)
            elif key.fileobj in running:
                code = os.waitstatus_to_exitcode(os.waitpid(key.data, 0)[1])
                with running.pop(key.fileobj) as connection, suppress(BrokenPipeError):
                    with suppress(KeyError):
                        selector.unregister(connection)
                    connection.sendall(f"{code}".encode())
                selector.unregister(key.fileobj)
                os.close(key.fileobj)
            elif key.fileobj.fileno() >= 0:  # who asked has ended
                selector.unregister(key.fileobj)
                with suppress(ProcessLookupError):
                    os.killpg(key.data, signal.SIGKILL)


def become(command: list[str], env: dict[str, str], cwd: str, program: str, files: list[int]) -> None:
    """Runs a command of Python as if this was an interpreter of its own, that of a virtual environment if it names one."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for target, file in enumerate(files):
        os.dup2(file, target)
        os.close(file)
    sys.stdout.reconfigure(write_through=True)
    words = command[2:] if command[1] == "-u" else command[1:]
    as_module = words[0] == "-m"
    sys.argv = words = words[as_module:]
    paths = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]
    if command[0] != sys.executable:
        paths += map(str, Path(command[0]).parents[1].glob("lib/python*/site-packages"))
    sys.executable = program
    sys.path[:] = [os.getcwd() if as_module else os.path.dirname(os.path.abspath(words[0])), *paths, *sys.path[1:]]
    if as_module:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    for module in IMPORTS:
        if importlib.util.find_spec(module.split(".")[0]):  # some tests are skipped without it
            importlib.import_module(module)
    gc.freeze()
    if (asked := serve(socket.socket(fileno=int(sys.argv[1])))) is not None:
        become(**asked[0], files=asked[1])
