"""
A job beside another one on a host that both write down in a folder: what it has, and what each job has locked. Trains a step,
says so, and trains another when it is told to.

    python beside.py folder name bytes|auto
"""

import json
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from reference import make_batch, make_streamed, tiny_llama

from hf_fpdt import HostMemoryError, host_arena, transfers

PAGE = 4096


def share(folder: Path, name: str) -> None:
    """Page-locked memory is gone for everybody else."""

    def lock(slab: torch.Tensor) -> None:
        with open(folder / f"{name}.locked", "a") as file:
            file.write(f"{slab.numel()}\n")

    def available() -> int:
        locked = sum(int(line) for path in folder.glob("*.locked") for line in path.read_text().split())
        return int((folder / "host").read_text()) - locked

    arena = partial(host_arena.HostArena, slab_bytes=PAGE)
    transfers.HostArena = lambda **_: arena(lock=lock, unlock=lambda slab: None)
    host_arena.available_host_bytes, host_arena.RESERVE_BYTES, host_arena._PATIENCE_S = available, 0, 0.5


def main(folder: Path, name: str, host_memory: str) -> None:
    share(folder, name)
    settings = {"offload": "host", "host_memory": host_memory if host_memory == "auto" else int(host_memory)}
    model, batch, found = make_streamed(tiny_llama(), 10, **settings), make_batch(1, 47), {"losses": []}
    for step in range(2):
        try:
            loss = model(**batch).loss
        except HostMemoryError as error:
            found["error"] = str(error)
            break
        loss.backward()
        found["losses"].append(loss.item())
        found["locked"] = transfers.transfers_for(torch.device("cpu")).arena.locked_bytes
        (folder / f"{name}.{step}").touch()
        while not (folder / "go").exists():
            time.sleep(0.05)
    (folder / f"{name}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
