"""What `hf-fpdt plan` says besides a plan's own table: as JSON, the longest sequence that fits, memory against length."""

from collections.abc import Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from torch import nn

from .config import FPDTConfig
from .engine_memory import Engine
from .host_arena import HostMemoryError
from .planning import engine_of, plan
from .step_plan import DeviceMemoryError, Plan

GIB = 2**30
_STEP = 1024  # tokens; how exactly the longest sequence is told
_SHORTEST, _LONGEST = 2048, 1 << 26
_CONFIGS: dict[Engine | None, str] = {  # of accelerate_configs/
    None: "fpdt_single_gpu",
    Engine(2, 2, 3): "fpdt_zero3_2gpu", Engine(4, 4, 3): "fpdt_zero3_4gpu", Engine(8, 8, 3): "fpdt_zero3_8gpu",
    Engine(16, 16, 3): "fpdt_zero3_16gpu_2nodes", Engine(8, 4, 3): "fpdt_zero3_sp4_dp2_8gpu",
    Engine(8, 8, 2): "fpdt_zero2_8gpu",
}  # fmt: skip
_CONFIG_OF_STAGE = {3: "fpdt_zero3_2gpu", 2: "fpdt_zero2_8gpu"}  # with other numbers


def as_json(plan: Plan) -> dict[str, Any]:
    """Memory in bytes, times in seconds; one entry of `layers` for each layer, one of `rows` for what waits together."""
    peaks, limits = plan.peaks, plan.limits
    return {
        "batch_size": plan.batch_size,
        "seq_len": plan.seq_len,
        "sp_size": plan.sp_size,
        "chunk_size": plan.chunk_size,
        "kv": "streamed" if plan.stream_kv else "resident",
        "peaks": {"device": peaks.device, "phase": peaks.phase, "host": peaks.host, "disk": peaks.disk},
        "limits": {"device": limits.device, "host": limits.host, "reserve": limits.reserve},
        "rows": [{"tensors": name, "place": place, "bytes": round(size)} for name, place, size in plan.rows],
        "time": None if plan.time is None else {"total": plan.time.total, **asdict(plan.time)},
        "layers": [{"keeps": placement.keeps, "place": placement.place} for placement in plan.placements],
    }


def fitting(model: nn.Module, seq_len: int, config: FPDTConfig, **asked: Any) -> tuple[FPDTConfig, Plan]:
    """
    The first of the settings with which such sequences fit, and their plan. ZeRO-3 runs as it is told and chooses nothing, so
    what `config` leaves open is chosen here: attention saved or computed again, K and V whole or streamed.

    Args:
        asked: as in `plan`.

    Raises:
        DeviceMemoryError, HostMemoryError: if none do.
    """
    engine = engine_of(model, asked.get("gpus", 1), asked.get("sp_size"), asked.get("zero"))
    last = None
    for settings in _variants(config) if engine is not None and engine.shards_weights else [config]:
        try:
            return settings, plan(model, seq_len=seq_len, config=settings, **asked)
        except (DeviceMemoryError, HostMemoryError) as error:
            last = error
    raise last


def _variants(config: FPDTConfig) -> Iterator[FPDTConfig]:
    """From the fastest to the one that needs least."""
    for kv in ("auto", "streamed") if config.kv == "auto" else (config.kv,):
        for save_attention in ("auto", False) if config.save_attention == "auto" else (config.save_attention,):
            yield replace(config, kv=kv, save_attention=save_attention)


def longest(model: nn.Module, config: FPDTConfig, **asked: Any) -> tuple[FPDTConfig, int]:
    """
    The longest sequences that fit, to 1,024 tokens, and the settings with which they do, as in `fitting`.

    Raises:
        DeviceMemoryError, HostMemoryError: if not even 2,048 tokens do.
    """
    best, length, too_long = fitting(model, _SHORTEST, config, **asked)[0], _SHORTEST, _LONGEST
    while 2 * length <= _LONGEST:
        found = _fitting_or_none(model, 2 * length, config, asked)
        if found is None:
            too_long = 2 * length
            break
        best, length = found[0], 2 * length
    while too_long - length > _STEP:
        middle = (length + too_long) // 2 // _STEP * _STEP
        found = _fitting_or_none(model, middle, config, asked)
        if found is None:
            too_long = middle
        else:
            best, length = found[0], middle
    return best, length


def _fitting_or_none(model: nn.Module, seq_len: int, config: FPDTConfig, asked: dict) -> tuple[FPDTConfig, Plan] | None:
    try:
        return fitting(model, seq_len, config, **asked)
    except (DeviceMemoryError, HostMemoryError):
        return None


def by_length(model: nn.Module, most: int, config: FPDTConfig, **asked: Any) -> Iterator[Plan]:
    """Plans of 2,048 tokens, twice as many, and so on to `most`, as far as they fit."""
    length = _SHORTEST
    while True:
        found = _fitting_or_none(model, min(length, most), config, asked)
        if found is None:
            return
        yield found[1]
        if length >= most:
            return
        length *= 2


def launch_line(engine: Engine | None, config: FPDTConfig) -> str:
    """The command that trains by the plan; `train.py` stands for a script. What differs from the defaults is in variables."""
    plain = FPDTConfig()
    chosen = {one.name: getattr(config, one.name) for one in fields(config) if one.name not in ("gpu_memory", "host_memory")}
    variables = [f"FPDT_{name.upper()}={value}" for name, value in chosen.items() if value != getattr(plain, name)]
    name, more = _CONFIGS.get(engine), []
    if name is None:
        name = _CONFIG_OF_STAGE[engine.zero]
        sizes = {"num_processes": engine.gpus, "parallelism_config_sp_size": engine.sp_size}
        sizes |= {"parallelism_config_dp_replicate_size": engine.gpus // engine.sp_size} if engine.sp_size < engine.gpus else {}
        more = [f"--{option} {size}" for option, size in sizes.items()]
    start = f"accelerate launch --config_file accelerate_configs/{name}.yaml"
    return " ".join([*variables, start, *more, "-m hf_fpdt.run train.py"])


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
