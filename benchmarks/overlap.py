"""
How much of the copying runs under the compute: a profiler trace of one training step, as a picture and as a number.

    python -m benchmarks.overlap --seq-len 131072 --layers 3 --out overlap

writes `overlap.png` (three lanes: compute, device to host, host to device; a panel each for the forward and the backward of one
layer, or one for the step if the trace has no marks of layers) and `overlap.json` (seconds of each lane and the fraction of
each direction's copies during which a kernel was running, for the step and for the panels). `--trace FILE` takes a Chrome trace
that was written before, for example by `--keep-trace FILE`.

Only copies of more than 1 MiB count: reading the loss or a count of labels is no offload.
"""

import argparse
import json
import tempfile
from pathlib import Path

from .result_files import header

COPIES = {"Memcpy DtoH": "to host", "Memcpy HtoD": "to device"}
LANES = ("compute", *COPIES.values())
MARK = "layer mark: "  # see marks_of and _mark_layers
# By default few layers would all stay on the GPU, and nothing would be copied.
SETTINGS = '{"offload": "host", "recompute": true}'
_LEAST_COPY = 1 << 20  # bytes
Interval = tuple[float, float]
Lanes = dict[str, list[Interval]]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-len", type=int, default=131072)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--layer", type=int, help="which layer to draw, from 1; the middle one if not given")
    parser.add_argument("--shape", default="llama-3.1-8b", help="a name in benchmarks/shapes.py")
    parser.add_argument("--contender", default="fpdt+liger", help="a name in benchmarks/contenders.py")
    parser.add_argument("--fpdt", default=SETTINGS, help="FPDTConfig fields as JSON")
    parser.add_argument("--trace", help="a Chrome trace to read instead of running a step")
    parser.add_argument("--keep-trace", help="where to keep the Chrome trace of the step")
    parser.add_argument("--out", default="overlap", help="path of the results, without ending")
    args = parser.parse_args()
    layer = args.layers // 2 if args.layer is None else args.layer
    if args.layer is not None and not 1 <= layer < args.layers:
        parser.error(f"--layer {layer}: the marks of the layer below are needed, so 1 to {args.layers - 1} (--layers - 1).")
    with tempfile.TemporaryDirectory() as folder:
        path = args.trace or profile_step(args, Path(args.keep_trace or Path(folder) / "trace.json"))
        trace = json.loads(Path(path).read_text())
    lanes = read_lanes(trace)
    panels = windows(marks_of(trace), layer) or {"step": _span(lanes)}
    settings = {name: value for name, value in vars(args).items() if name not in ("trace", "keep_trace", "out")}
    row = {"settings": settings, "step": summary(lanes)}
    row["panels"] = {name: summary(clip(lanes, window)) for name, window in panels.items()}
    gpu = next((device.get("name") for device in trace.get("deviceProperties", [])), None) or "unknown"
    result = {"header": header("overlap", args.out, gpu), "rows": [row]}
    Path(f"{args.out}.json").write_text(json.dumps(result, indent=1))
    draw(lanes, panels, Path(f"{args.out}.png"))
    for name, found in ({"step": row["step"]} | row["panels"]).items():
        print(f"{name}: {json.dumps(found)}")


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


def marks_of(trace: dict) -> dict[str, float]:
    """
    When the GPU passed each mark, in microseconds, by name. A mark is a profiler range around one small kernel; the range is on
    the GPU's side of the trace as well, and if it is not, the launch inside of the CPU's range leads to the kernel.
    """
    events = trace["traceEvents"]
    found = {}
    for event in events:
        if event.get("cat") == "gpu_user_annotation" and event["name"].startswith(MARK):
            found.setdefault(event["name"].removeprefix(MARK), event["ts"])
    kernels = {_correlation(event): event["ts"] for event in events if event.get("cat") == "kernel"}
    launches = [event for event in events if event.get("cat") in ("cuda_runtime", "cuda_driver")]
    for event in events:
        name = event.get("name", "").removeprefix(MARK)
        if event.get("cat") in ("user_annotation", "cpu_op") and event["name"].startswith(MARK) and name not in found:
            stop = event["ts"] + event["dur"]
            inside = [one for one in launches if event["ts"] <= one["ts"] <= stop and one.get("tid") == event.get("tid")]
            times = [kernels[_correlation(one)] for one in inside if _correlation(one) in kernels]
            if times:
                found[name] = min(times)
    return found


def _correlation(event: dict) -> int | None:
    return event.get("args", {}).get("correlation")


def windows(marks: dict[str, float], layer: int) -> dict[str, Interval]:
    """
    From when to when a layer ran in each direction; without the directions whose marks, of this layer and of the one below,
    are not all there.
    """
    bounds = {
        "forward": (f"output of layer {layer - 1}", f"output of layer {layer}"),
        "backward": (f"gradient of layer {layer}", f"gradient of layer {layer - 1}"),
    }
    there = {name: pair for name, pair in bounds.items() if all(mark in marks for mark in pair)}
    return {f"{name} of layer {layer}": (marks[start], marks[stop]) for name, (start, stop) in there.items()}


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


def _span(lanes: Lanes) -> Interval:
    everything = [interval for intervals in lanes.values() for interval in intervals]
    return min(start for start, _ in everything), max(stop for _, stop in everything)


def draw(lanes: Lanes, panels: dict[str, Interval], path: Path):
    """One panel below the other, each with its own time axis. Returns the figure."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(panels), 1, figsize=(12, 0.6 + 2.2 * len(panels)), layout="constrained", squeeze=False)
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
    pyplot.close(figure)
    return figure


def profile_step(args, path: Path, device: str = "cuda") -> Path:
    """Writes the Chrome trace of the second of two steps."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from .contenders import build, prepare
    from .shapes import llama_config

    config = llama_config(args.shape, args.layers)
    prepare(args.contender)
    model, step = build(args.contender, config, json.loads(args.fpdt), device=device)
    ids = torch.randint(0, config.vocab_size, (1, args.seq_len), device=device)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    step(ids)  # compiles kernels, locks host memory
    for parameter in model.parameters():
        parameter.grad = None
    if args.contender.startswith("fpdt"):  # others run their layers twice, inside of their checkpoints
        _mark_layers(model.model.layers, device)
    wait()
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")) as profiler:
        step(ids)
        wait()
    profiler.export_chrome_trace(str(path))
    return path


def _mark_layers(layers, device: str) -> None:
    """Marks where every layer's output, and later the gradient of that output, is complete on the compute stream."""
    import torch

    flag = torch.zeros(1, device=device)

    def mark(name: str) -> None:
        with torch.no_grad(), torch.profiler.record_function(MARK + name):
            flag.add_(1)  # a kernel: what the profiler can find on the GPU

    def hook(index: int):
        def after(module, args, output):
            mark(f"output of layer {index}")
            output.register_hook(lambda grad: mark(f"gradient of layer {index}"))

        return after

    for index, layer in enumerate(layers):
        layer.register_forward_hook(hook(index))


if __name__ == "__main__":
    main()
