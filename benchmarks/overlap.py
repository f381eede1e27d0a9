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

from hf_fpdt.timeline import Interval, clip, draw, read_lanes, read_trace, span, summary

from .result_files import header

MARK = "layer mark: "  # see marks_of and _mark_layers
# By default few layers would all stay on the GPU, and nothing would be copied.
SETTINGS = '{"offload": "host", "recompute": true}'


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
        trace = read_trace(path)
    lanes = read_lanes(trace)
    panels = windows(marks_of(trace), layer) or {"step": span(lanes)}
    settings = {name: value for name, value in vars(args).items() if name not in ("trace", "keep_trace", "out")}
    row = {"settings": settings, "step": summary(lanes)}
    row["panels"] = {name: summary(clip(lanes, window)) for name, window in panels.items()}
    gpu = next((device.get("name") for device in trace.get("deviceProperties", [])), None) or "unknown"
    result = {"header": header("overlap", args.out, gpu), "rows": [row]}
    Path(f"{args.out}.json").write_text(json.dumps(result, indent=1))
    draw(lanes, panels, Path(f"{args.out}.png"))
    for name, found in ({"step": row["step"]} | row["panels"]).items():
        print(f"{name}: {json.dumps(found)}")


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


def profile_step(args, path: Path, device: str = "cuda") -> Path:
    """Writes the Chrome trace of the second of two steps."""
    model, step = warmed_up(args, device)
    if args.contender.startswith("fpdt"):  # others run their layers twice, inside of their checkpoints
        _mark_layers(model.base_model.layers, device)
    return profiled(model, step, path, device)


def warmed_up(args, device: str):
    """The model, after a first step that compiles kernels and locks host memory, and what runs one more; without gradients."""
    import torch

    from .contenders import build, prepare
    from .shapes import model_config

    config = model_config(args.shape, args.layers)
    prepare(args.contender)
    model, step = build(args.contender, config, json.loads(args.fpdt), device=device)
    ids = torch.randint(0, config.vocab_size, (1, args.seq_len), device=device)
    step(ids)
    _forget_gradients(model)
    return model, lambda: step(ids)


def profiled(model, step, path: Path, device: str) -> Path:
    """Writes the Chrome trace of a step."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    _forget_gradients(model)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")) as profiler:
        step()
        wait()
    profiler.export_chrome_trace(str(path))
    return path


def _forget_gradients(model) -> None:
    for parameter in model.parameters():
        parameter.grad = None


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
