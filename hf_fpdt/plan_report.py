"""What `hf-fpdt plan` says besides a plan's own table: as JSON, the longest sequence that fits, memory against length."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from .config import FPDTConfig
from .host_arena import HostMemoryError
from .planning import plan
from .step_plan import DeviceMemoryError, Plan

GIB = 2**30
_STEP = 1024  # tokens; how exactly the longest sequence is told
_SHORTEST, _LONGEST = 2048, 1 << 26


def as_json(plan: Plan) -> dict[str, Any]:
    """Memory in bytes, times in seconds; one entry of `layers` for each layer, one of `rows` for what waits together."""
    peaks, limits = plan.peaks, plan.limits
    return {
        "batch_size": plan.batch_size,
        "seq_len": plan.seq_len,
        "chunk_size": plan.chunk_size,
        "kv": "streamed" if plan.stream_kv else "resident",
        "peaks": {"device": peaks.device, "phase": peaks.phase, "host": peaks.host, "disk": peaks.disk},
        "limits": {"device": limits.device, "host": limits.host, "reserve": limits.reserve},
        "rows": [{"tensors": name, "place": place, "bytes": round(size)} for name, place, size in plan.rows],
        "time": None if plan.time is None else {"total": plan.time.total, **asdict(plan.time)},
        "layers": [{"keeps": placement.keeps, "place": placement.place} for placement in plan.placements],
    }


def fitting(model: nn.Module, seq_len: int, batch_size: int, config: FPDTConfig) -> Plan | None:
    """The plan for such sequences, None if none fits."""
    try:
        return plan(model, seq_len=seq_len, batch_size=batch_size, config=config)
    except (DeviceMemoryError, HostMemoryError):
        return None


def longest(model: nn.Module, batch_size: int, config: FPDTConfig) -> Plan:
    """
    The plan for the longest sequences that fit, to 1,024 tokens.

    Raises:
        DeviceMemoryError, HostMemoryError: if not even 2,048 tokens do.
    """
    best, too_long = plan(model, seq_len=_SHORTEST, batch_size=batch_size, config=config), _LONGEST
    while 2 * best.seq_len <= _LONGEST:
        found = fitting(model, 2 * best.seq_len, batch_size, config)
        if found is None:
            too_long = 2 * best.seq_len
            break
        best = found
    while too_long - best.seq_len > _STEP:
        middle = (best.seq_len + too_long) // 2 // _STEP * _STEP
        found = fitting(model, middle, batch_size, config)
        best, too_long = (best, middle) if found is None else (found, too_long)
    return best


def by_length(model: nn.Module, most: int, batch_size: int, config: FPDTConfig) -> Iterator[Plan]:
    """Plans of 2,048 tokens, twice as many, and so on to `most`, as far as they fit."""
    length = _SHORTEST
    while True:
        found = fitting(model, min(length, most), batch_size, config)
        if found is None:
            return
        yield found
        if length >= most:
            return
        length *= 2


def draw(plans: list[Plan], title: str, path: Path) -> None:
    """A picture of GPU and host memory against length, with the limits."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    lengths = [plan.seq_len for plan in plans]
    for name, place, color in (("GPU", "device", "tab:blue"), ("host", "host", "tab:orange")):
        limit = getattr(plans[-1].limits, place)
        axes.plot(lengths, [getattr(plan.peaks, place) / GIB for plan in plans], marker="o", color=color, label=f"{name}, peak")
        if limit is not None:
            axes.axhline(limit / GIB, color=color, linestyle="--", label=f"{name}, limit")
    axes.set_xscale("log", base=2)
    ticks = [length for length in lengths if not lengths[-1] / 1.5 < length < lengths[-1]]
    axes.set_xticks(ticks, [f"{length / 1024:.0f}K" if length < 1 << 20 else f"{length / (1 << 20):.3g}M" for length in ticks])
    axes.set(title=title, xlabel="tokens of a sequence", ylabel="GiB")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)
