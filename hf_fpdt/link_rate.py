"""How many bytes a second leave a process in an all-to-all: asked once of a group, or of all GPUs of a machine."""

import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

PROBE_BYTES = 1 << 25
_TIMES = 4


def link_rate(group: dist.ProcessGroup | None, device: torch.device, num_bytes: int = PROBE_BYTES) -> float:
    """
    Of the slowest process, the best of three after one to connect. Collective in the group.

    Args:
        group: None for all processes.
        device: of this process.
        num_bytes: that every process has, a multiple of their number.
    """
    sent = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    got = torch.empty_like(sent)
    seconds = [_seconds(got, sent, group) for _ in range(_TIMES)]
    slowest = torch.tensor(min(seconds[1:]), device=device, dtype=torch.float32)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=group)
    size = dist.get_world_size(group)
    return num_bytes * (size - 1) / size / slowest.item()


def _seconds(got: torch.Tensor, sent: torch.Tensor, group: dist.ProcessGroup | None) -> float:
    if sent.device.type != "cuda":
        started = time.perf_counter()
        dist.all_to_all_single(got, sent, group=group)
        return time.perf_counter() - started
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    dist.all_to_all_single(got, sent, group=group)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def rate_between(device_type: str, processes: int, num_bytes: int) -> float | None:
    """
    Of as many processes as named, started for it, on a GPU each or on CPUs; None for one.

    Args:
        num_bytes: that every process has; what does not divide by their number is left away.
    """
    if processes < 2:
        return None
    with tempfile.TemporaryDirectory() as folder:
        arguments = (processes, device_type, num_bytes - num_bytes % processes, folder)
        torch.multiprocessing.spawn(_process, arguments, nprocs=processes)
        return float((Path(folder) / "rate").read_text())


def _process(rank: int, processes: int, device_type: str, num_bytes: int, folder: str) -> None:
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device(device_type)
    if device_type == "cuda":
        torch.cuda.set_device(device)
    store = dist.FileStore(str(Path(folder) / "store"), processes)
    dist.init_process_group("nccl" if device_type == "cuda" else "gloo", store=store, rank=rank, world_size=processes)
    rate = link_rate(None, device, num_bytes)
    if rank == 0:
        (Path(folder) / "rate").write_text(str(rate))
    dist.destroy_process_group()
