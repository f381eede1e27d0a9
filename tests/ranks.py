"""Runs a function in several processes that share a gloo group on this machine."""

import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any

import torch
import torch.distributed as dist

# The server imports these once; every process is then a fork of it that starts at once.
_CONTEXT = get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "torch", "torch.distributed", "accelerate", "hf_fpdt", "pytest", "transformers.trainer",
        *(f"transformers.models.{name}.modeling_{name}" for name in ("llama", "mistral", "gpt_neox")),
    ]
)  # fmt: skip


def run_ranks(function: Callable, world_size: int, *args: Any, timeout: int = 90) -> list[Any]:
    """
    What `function(rank, *args)` returned on each rank, in order. `function` is one of a test module; what it returns is saved
    with `torch.save`.

    Raises:
        AssertionError: with the traceback, if a rank raised, and if they have not all ended after `timeout` seconds.
    """
    with TemporaryDirectory() as folder:
        processes = [
            _CONTEXT.Process(target=_run, args=(function, rank, world_size, folder, os.getpid(), args), daemon=True)
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        deadline = monotonic() + timeout
        for process in processes:
            process.join(max(deadline - monotonic(), 0))
        stuck = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
            process.join()
        errors = [path.read_text() for path in sorted(Path(folder).glob("error*"))]
        assert not errors, "\n".join(errors)
        assert not stuck, f"ranks {stuck} of {world_size} still wait after {timeout} s"
        return [torch.load(Path(folder, f"result{rank}"), weights_only=False) for rank in range(world_size)]


def _run(function: Callable, rank: int, world_size: int, folder: str, parent: int, args: tuple) -> None:
    torch.set_num_threads(1)
    # DeepSpeed names the memory that ranks on CPUs share by these: two groups of one name wait for each other's.
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(parent)}
    try:
        store = dist.FileStore(f"{folder}/store", world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=60))
        torch.save(function(rank, *args), f"{folder}/result{rank}")
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        Path(folder, f"error{rank}").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        raise SystemExit(1) from None
