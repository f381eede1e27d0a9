"""
What a step's time goes to, and what holds its MFU: kernels by kind, idle while a copy runs, idle otherwise.

    python -m benchmarks.paper.shares --seq-len 524288 --layers 1 --out shares
    python -m benchmarks.paper.shares --trace trace.json --seq-len 524288 --layers 1 --out shares

profiles the third step (the first compiles, the second is timed without the profiler) and writes `shares.json`: of each kind
its seconds and share of the step, for attention and matrix products the rate that is reached, of the operations that are run,
recomputed ones included, and the MFU that the step would have were this kind alone ideal: at the peak of the GPU, or, for all
others, gone. `recomputation` is what running layers again costs at the rates reached. A moment counts once: where kernels
overlap, to the first of the kinds in their order here.

Operations of attention's backward are counted as twice those of its forward, as everywhere here; its kernels run a fifth more
(2.5 times), so a rate of 80% of the peak is all that they could reach. The MFU is of the timed step; with `--trace` it is of
the profiled one, which is longer by what the profiler takes.
"""

import argparse
import json
import re
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.overlap import profiled, warmed_up
from benchmarks.point import PEAK_BF16
from benchmarks.result_files import header
from benchmarks.shapes import model_config, query_dim, step_flops
from hf_fpdt.timeline import COPIES, Interval, read_lanes, read_trace, span, summary

FORWARD, BACKWARD, MATRICES, OTHER = "attention forward", "attention backward", "matrix products", "other kernels"
KERNELS = (BACKWARD, FORWARD, MATRICES, OTHER)
LINK, LAUNCH = "idle while a copy runs", "idle otherwise"
KINDS = (*KERNELS, LINK, LAUNCH)
TARGET = 0.55
SETTINGS = '{"offload": "host", "recompute": true, "save_attention": true}'

_ATTENTION = r"flash|sdpa|fmha|attention"
_PATTERNS = (  # searched without regard to case; the first that is found
    (BACKWARD, rf"({_ATTENTION}).*(bwd|backward|bprop)|fmha_cutlassB|compute_dot_do_o|convert_dq|dot_do_o"),
    (FORWARD, rf"({_ATTENTION}).*(fwd|forward|fprop)|fmha_cutlassF"),
    (MATRICES, r"nvjet|gemm|gemv|cublas|splitk|xmma|cutlass::kernel"),
)


def kind_of(kernel: str) -> str:
    """The kind of a kernel by its name; what no pattern knows is `other kernels`."""
    return next((kind for kind, pattern in _PATTERNS if re.search(pattern, kernel, re.IGNORECASE)), OTHER)


@dataclass(frozen=True)
class Again:
    """How often layers ran once more than the model's operations have it: as a whole, and their attention; in layers."""

    layers: int
    attention: int


def main():
    args = _arguments()
    with tempfile.TemporaryDirectory() as folder:
        step_s, again, path = None, Again(args.layers_again, args.attention_again), args.trace
        if path is None:
            path = Path(args.keep_trace or Path(folder) / "trace.json")
            step_s, again = _run(args, path)
        trace = read_trace(path)
    gpu = next((device.get("name") for device in trace.get("deviceProperties", [])), None) or "unknown"
    if gpu not in PEAK_BF16:
        raise ValueError(f"the trace is of {gpu!r}; add the GPU's peak to PEAK_BF16 in benchmarks/point.py.")
    row = {"settings": {name: getattr(args, name) for name in ("shape", "layers", "seq_len", "contender", "fpdt")}, "gpu": gpu}
    row |= row_of(trace, args.shape, args.layers, args.seq_len, again, PEAK_BF16[gpu], step_s)
    Path(f"{args.out}.json").write_text(json.dumps({"header": header("paper.shares", args.out, gpu), "rows": [row]}, indent=1))
    print("\n".join(table(row)))


def _arguments(words: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-len", type=int, default=524288)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--shape", default="llama-3.1-8b", help="a name in benchmarks/shapes.py")
    parser.add_argument("--contender", default="fpdt+liger", help="a name in benchmarks/contenders.py")
    parser.add_argument("--fpdt", default=SETTINGS, help="FPDTConfig fields as JSON")
    parser.add_argument("--trace", help="a Chrome trace to read instead of running steps")
    parser.add_argument("--layers-again", type=int, help="with --trace: layers that ran again in it; all if not given")
    parser.add_argument("--attention-again", type=int, default=0, help="with --trace: layers whose attention ran again")
    parser.add_argument("--keep-trace", help="where to keep the Chrome trace of the step")
    parser.add_argument("--out", default="shares", help="path of the result, without ending")
    args = parser.parse_args(words)
    if args.trace is None and (args.layers_again is not None or args.attention_again):
        parser.error("--layers-again and --attention-again say what a --trace has; without one it is known.")
    args.layers_again = args.layers if args.layers_again is None else args.layers_again
    return args


def _run(args, path: Path) -> tuple[float, Again]:
    """Seconds of a step without the profiler, and how often layers ran again; leaves the trace of another step."""
    import torch

    model, step = warmed_up(args, "cuda")
    torch.cuda.synchronize()
    started = time.perf_counter()
    step()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    profiled(model, step, path, "cuda")
    return seconds, again_of(model, args.contender, args.layers)


def again_of(model, contender: str, layers: int) -> Again:
    """By the plan that hf_fpdt followed; checkpointed layers of others run again with their attention."""
    if not contender.startswith("fpdt"):
        return Again(layers, layers)
    (*_, plan) = (plan for module in model.modules() for plan in module.__dict__.get("_fpdt_plans", {}).values())
    keeps = [placement.keeps for placement in plan.placements]
    twice = sum(one in ("input", "nothing") for one in keeps)
    return Again(sum(one != "all" for one in keeps) + twice, sum(one == "key_value" for one in keeps) + twice)


def row_of(trace: dict, shape: str, layers: int, seq_len: int, again: Again, peak: float, step_s: float | None = None) -> dict:
    """
    The result of a trace, see the module.

    Args:
        peak: operations a second.
        step_s: of a step without the profiler.
    """
    lanes = read_lanes(trace)
    kernels = [event for event in trace["traceEvents"] if event.get("cat") == "kernel"]
    intervals: dict[str, list[Interval]] = {kind: [] for kind in KERNELS}
    for event in kernels:
        intervals[kind_of(event["name"])].append((event["ts"], event["ts"] + event["dur"]))
    intervals[LINK] = [interval for lane in COPIES.values() for interval in lanes[lane]]
    start, stop = span(lanes)
    seconds = {kind: value / 1e6 for kind, value in split(intervals, KINDS[:-1]).items()}
    seconds[LAUNCH] = (stop - start) / 1e6 - sum(seconds.values())
    operations = operations_of(shape, layers, seq_len, again)
    useful = step_flops(model_config(shape, layers), seq_len)
    total = step_s or (stop - start) / 1e6
    copies = {lane: _gib_per_s(trace, name) for name, lane in COPIES.items()}
    return {
        "step_s": step_s,
        "profiled_s": (stop - start) / 1e6,
        "causal_mfu": useful / total / peak,
        "again": {"layers": again.layers, "attention": again.attention},
        "shares": _shares(seconds, operations, useful, total, peak),
        "recomputation": _recomputation(seconds, operations, shape, layers, seq_len, useful, total, peak),
        "to_gain_for_target_s": total - useful / TARGET / peak,
        "copies": {"gib_per_s": copies, "hidden": summary(lanes)["hidden"]},
        "top": top(kernels, (stop - start) / 1e6),
    }


def split(intervals: dict[str, Sequence[Interval]], order: Sequence[str]) -> dict[str, float]:
    """The time of each kind; where several are active it belongs to the first in the order."""
    events = [(at, kind, step) for kind in order for pair in intervals[kind] for at, step in zip(pair, (1, -1), strict=True)]
    active, found, before = Counter(), dict.fromkeys(order, 0.0), None
    for at, kind, step in sorted(events):
        owner = next((one for one in order if active[one]), None)
        if owner is not None:
            found[owner] += at - before
        active[kind] += step
        before = at
    return found


def operations_of(shape: str, layers: int, seq_len: int, again: Again) -> dict[str, float]:
    """What the kernels of each kind run, with what runs again."""
    config = model_config(shape, layers)
    attention = 4 * seq_len**2 / 2 * query_dim(config)  # of one layer's forward
    matrices = step_flops(config, seq_len) - 3 * layers * attention
    one = _matrices_of_a_layer(shape, seq_len) / 3  # its forward
    return {
        FORWARD: (layers + again.attention) * attention,
        BACKWARD: 2 * layers * attention,
        MATRICES: matrices + again.layers * one,
    }


def _matrices_of_a_layer(shape: str, seq_len: int) -> float:
    """Forward and backward."""
    two, one = (step_flops(model_config(shape, layers), seq_len) for layers in (2, 1))
    return two - one - 3 * 4 * seq_len**2 / 2 * query_dim(model_config(shape, 1))


def _shares(seconds: dict, operations: dict, useful: float, total: float, peak: float) -> dict:
    whole, found = sum(seconds.values()), {}
    for kind in KINDS:
        share = seconds[kind] / whole
        found[kind] = {"seconds": seconds[kind], "share": share}
        ideal = 0.0
        if kind in operations:
            ideal = operations[kind] / peak
            rate = operations[kind] / seconds[kind] if seconds[kind] else 0.0
            found[kind] |= {"tflops": rate / 1e12, "of_peak": rate / peak}
        gain = max(share * total - ideal, 0.0)
        found[kind] |= {"to_gain_s": gain, "mfu_if_ideal": useful / (total - gain) / peak if gain < total else None}
    return found


def _recomputation(seconds, operations, shape, layers, seq_len, useful, total, peak) -> dict:
    """What the operations beyond the useful ones take, at the rates that their kinds reach in the step."""
    plain = operations_of(shape, layers, seq_len, Again(0, 0))
    whole = sum(seconds.values())
    spent = sum(seconds[kind] * (1 - plain[kind] / operations[kind]) for kind in operations) / whole * total
    return {"seconds": spent, "share": spent / total, "mfu_without": useful / (total - spent) / peak}


def _gib_per_s(trace: dict, name: str) -> float | None:
    """Of the large copies of one direction, while they run."""
    sizes = [
        (int(event["args"]["bytes"]), event["dur"])
        for event in trace["traceEvents"]
        if event.get("cat") == "gpu_memcpy" and event["name"].startswith(name) and "bytes" in event.get("args", {})
    ]
    large = [(size, dur) for size, dur in sizes if size > 1 << 20]
    return sum(size for size, _ in large) / 2**30 / (sum(dur for _, dur in large) / 1e6) if large else None


def top(kernels: Iterable[dict], seconds: float, most: int = 10) -> list[dict]:
    """The kernels that take most of the time, with the kind that their names were taken for."""
    taken, count = Counter(), Counter()
    for event in kernels:
        taken[event["name"]] += event["dur"]
        count[event["name"]] += 1
    return [
        {"kind": kind_of(name), "seconds": dur / 1e6, "share": dur / 1e6 / seconds, "count": count[name], "name": name[:200]}
        for name, dur in taken.most_common(most)
    ]


def table(row: dict) -> list[str]:
    """In Markdown, and what holds the step from the target."""
    settings = row["settings"]
    step = row["step_s"] or row["profiled_s"]
    lines = [
        f"{settings['contender']}, {settings['seq_len']:,} tokens, {settings['layers']} layers, {row['gpu']}: {step:.2f} s "
        f"({row['profiled_s']:.2f} with the profiler), causal MFU {row['causal_mfu']:.1%}",
        "",
        "| time goes to | seconds | share | TFLOP/s | of the peak | MFU if this were ideal |",
        "|---|---|---|---|---|---|",
    ]
    for kind, found in row["shares"].items():
        rate = f"{found['tflops']:.0f} | {found['of_peak']:.1%}" if "tflops" in found else "|"
        ideal = "" if found["mfu_if_ideal"] is None else f"{found['mfu_if_ideal']:.1%}"
        lines.append(f"| {kind} | {found['seconds']:.3f} | {found['share']:.1%} | {rate} | {ideal} |")
    again, gain = row["recomputation"], row["to_gain_for_target_s"]
    lines += ["", f"Running layers again takes {again['share']:.1%}; without, {again['mfu_without']:.1%} MFU."]
    lines.append(
        f"{TARGET:.0%} is reached."
        if gain <= 0
        else f"For {TARGET:.0%} the step has to be {gain:.2f} s ({gain / step:.1%}) shorter."
    )
    lines += [f"  {one['share']:6.1%} {one['count']:>6} x {one['kind']}: {one['name'][:90]}" for one in row["top"]]
    return lines


if __name__ == "__main__":
    main()
