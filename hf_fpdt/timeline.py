"""
What a GPU did in a step, from its Chrome trace: when kernels ran and when memory was copied between host and GPU, as intervals,
as the fraction of the copies that ran under the compute, and as a picture.

Only copies of more than 1 MiB count: reading the loss or a count of labels is no offload.
"""

import gzip
import json
from os import PathLike
from pathlib import Path

COPIES = {"Memcpy DtoH": "to host", "Memcpy HtoD": "to device"}
LANES = ("compute", *COPIES.values())
_LEAST_COPY = 1 << 20  # bytes
Interval = tuple[float, float]
Lanes = dict[str, list[Interval]]


def read_trace(path: str | PathLike) -> dict:
    """A Chrome trace; gzip if its name ends so."""
    data = Path(path).read_bytes()
    return json.loads(gzip.decompress(data) if Path(path).suffix == ".gz" else data)


def read_lanes(trace: dict) -> Lanes:
    """`(start, stop)` in microseconds of the kernels and large copies on the GPU, by lane."""
    lanes: Lanes = {lane: [] for lane in LANES}
    for event in trace["traceEvents"]:
        category, lane = event.get("cat"), None
        if category == "kernel":
            lane = "compute"
        elif category == "gpu_memcpy" and _is_large(event):
            lane = next((lane for name, lane in COPIES.items() if event["name"].startswith(name)), None)
        if lane is not None:
            lanes[lane].append((event["ts"], event["ts"] + event["dur"]))
    if not lanes["compute"]:
        raise ValueError("the trace has no GPU kernels; it must be of a step on a CUDA device")
    return lanes


def _is_large(event: dict) -> bool:
    """By its bytes; a trace without them is taken at the word of its name, for what hf_fpdt copies is page-locked."""
    size = event.get("args", {}).get("bytes")
    return "Pageable" not in event["name"] if size is None else int(size) > _LEAST_COPY


def clip(lanes: Lanes, window: Interval) -> Lanes:
    """What of the lanes is inside of the window."""
    start, stop = window
    inside: Lanes = {}
    for lane, intervals in lanes.items():
        inside[lane] = [(max(a, start), min(b, stop)) for a, b in intervals if a < stop and b > start]
    return inside


def summary(lanes: Lanes) -> dict:
    """Seconds of each lane, and the fraction of the copies that ran under compute."""
    seconds = {lane: sum(stop - start for start, stop in union(intervals)) / 1e6 for lane, intervals in lanes.items()}
    hidden = {lane: hidden_fraction(lanes[lane], lanes["compute"]) for lane in COPIES.values()}
    both = [interval for lane in COPIES.values() for interval in lanes[lane]]
    return {"seconds": seconds, "hidden": hidden | {"either": hidden_fraction(both, lanes["compute"])}}


def union(intervals: list[Interval]) -> list[Interval]:
    """The same time as disjoint intervals, in order."""
    merged: list[list[float]] = []
    for start, stop in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], stop)
        else:
            merged.append([start, stop])
    return [(start, stop) for start, stop in merged]


def hidden_fraction(copies: list[Interval], compute: list[Interval]) -> float | None:
    """The part of the copies' time in which compute ran as well; None without copies."""
    copies, compute = union(copies), union(compute)
    total = sum(stop - start for start, stop in copies)
    if not total:
        return None
    hidden, at = 0.0, 0
    for start, stop in copies:
        while at < len(compute) and compute[at][1] <= start:
            at += 1
        for index in range(at, len(compute)):
            other_start, other_stop = compute[index]
            if other_start >= stop:
                break
            hidden += min(stop, other_stop) - max(start, other_start)
    return hidden / total


def span(lanes: Lanes) -> Interval:
    """From the first to the last of all lanes."""
    everything = [interval for intervals in lanes.values() for interval in intervals]
    return min(start for start, _ in everything), max(stop for _, stop in everything)


def draw(lanes: Lanes, panels: dict[str, Interval], path: Path) -> None:
    """One panel below the other, each with its own time axis. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 0.6 + 2.2 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False)
    for axis, (name, window) in zip(axes[:, 0], panels.items(), strict=True):
        inside = clip(lanes, window)
        hidden = summary(inside)["hidden"]
        for row, (lane, color) in enumerate(zip(LANES, ("tab:blue", "tab:orange", "tab:purple"), strict=True)):
            bars = [((start - window[0]) / 1e3, (stop - start) / 1e3) for start, stop in union(inside[lane])]
            axis.broken_barh(bars, (-row - 0.4, 0.8), color=color)
        labels = [lane if hidden.get(lane) is None else f"{lane}\n{hidden[lane]:.1%} hidden" for lane in LANES]
        axis.set_yticks([-row for row in range(len(LANES))], labels)
        axis.set_ylim(-len(LANES) + 0.4, 0.6)
        axis.set_xlim(0, (window[1] - window[0]) / 1e3)
        axis.set(xlabel="milliseconds")
        axis.set_title(name, loc="left", fontsize="medium")
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
