"""
How much of the copying runs under the compute: a profiler trace of one training step, as a picture and as a number.

    python -m benchmarks.overlap --seq-len 131072 --layers 2 --out overlap

writes `overlap.png` (three lanes: compute, device to host, host to device) and `overlap.json` (seconds of each kind of copy and
the fraction of it during which a compute kernel was running). `--trace FILE` takes a Chrome trace that was written before.
"""

import argparse
import json
import tempfile
from pathlib import Path

LANES = {"compute": "compute", "Memcpy DtoH": "to host", "Memcpy HtoD": "to device"}
Interval = tuple[float, float]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-len", type=int, default=131072)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--shape", default="llama-3.1-8b", help="a name in benchmarks/shapes.py")
    parser.add_argument("--contender", default="fpdt+liger", help="a name in benchmarks/contenders.py")
    parser.add_argument("--fpdt", default="{}", help="FPDTConfig fields as JSON")
    parser.add_argument("--trace", help="a Chrome trace to read instead of running a step")
    parser.add_argument("--out", default="overlap", help="path of the results, without ending")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        trace = args.trace or _profile(args, Path(folder) / "trace.json")
        lanes = read_lanes(json.loads(Path(trace).read_text()))
    result = {"settings": vars(args), "seconds": {}, "hidden": {}}
    for lane, intervals in lanes.items():
        result["seconds"][lane] = sum(stop - start for start, stop in union(intervals)) / 1e6
        if lane != "compute":
            result["hidden"][lane] = hidden_fraction(intervals, lanes["compute"])
    Path(f"{args.out}.json").write_text(json.dumps(result, indent=1))
    draw(lanes, result["hidden"], Path(f"{args.out}.png"))
    print(json.dumps({"seconds": result["seconds"], "hidden": result["hidden"]}))


def read_lanes(trace: dict) -> dict[str, list[Interval]]:
    """`(start, stop)` in microseconds of everything that ran on the GPU, by lane."""
    lanes: dict[str, list[Interval]] = {lane: [] for lane in LANES.values()}
    for event in trace["traceEvents"]:
        if event.get("cat") == "kernel":
            lane = "compute"
        elif event.get("cat") == "gpu_memcpy":
            lane = next((lane for name, lane in LANES.items() if event["name"].startswith(name)), None)
        else:
            continue
        if lane is not None:
            lanes[lane].append((event["ts"], event["ts"] + event["dur"]))
    if not lanes["compute"]:
        raise ValueError("the trace has no GPU kernels; it must be of a step on a CUDA device")
    return lanes


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
        for other_start, other_stop in compute[at:]:
            if other_start >= stop:
                break
            hidden += min(stop, other_stop) - max(start, other_start)
    return hidden / total


def draw(lanes: dict[str, list[Interval]], hidden: dict[str, float | None], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    origin = min(start for intervals in lanes.values() for start, _ in intervals)
    figure, axis = pyplot.subplots(figsize=(12, 2.6), layout="constrained")
    for row, (lane, color) in enumerate(zip(lanes, ("tab:blue", "tab:orange", "tab:purple"), strict=True)):
        bars = [((start - origin) / 1e3, (stop - start) / 1e3) for start, stop in union(lanes[lane])]
        axis.broken_barh(bars, (-row - 0.4, 0.8), color=color)
    labels = [lane if hidden.get(lane) is None else f"{lane}\n{hidden[lane]:.1%} hidden" for lane in lanes]
    axis.set_yticks([-row for row in range(len(lanes))], labels)
    axis.set(xlabel="milliseconds")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _profile(args, path: Path) -> Path:
    import torch
    from torch.profiler import ProfilerActivity, profile

    from .contenders import build
    from .shapes import llama_config

    config = llama_config(args.shape, args.layers)
    _, step = build(args.contender, config, json.loads(args.fpdt))
    ids = torch.randint(0, config.vocab_size, (1, args.seq_len), device="cuda")
    step(ids)  # compiles kernels, locks host memory
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step(ids)
        torch.cuda.synchronize()
    profiler.export_chrome_trace(str(path))
    return path


if __name__ == "__main__":
    main()
