"""What ran under what in a profiled step: compute, all-to-alls, the engine's collectives and copies."""

import json
import tempfile
from pathlib import Path

_ALL_TO_ALL, _COLLECTIVES = "SendRecv", ("AllGather", "ReduceScatter", "AllReduce")


def traced(step) -> dict:
    """Of one more step, on this rank: seconds of every kind of communication and copy, and the fraction under compute."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return trace_summary(json.loads(path.read_text()))


def trace_summary(trace: dict) -> dict:
    """
    `{lane: {"seconds": ..., "hidden": ...}}` for the all-to-alls, the engine's collectives and both directions of large copies.
    Hidden: the fraction in which a kernel that communicates nothing ran as well.
    """
    from hf_fpdt.timeline import hidden_fraction, read_lanes, union

    lanes = read_lanes(trace)
    communication = {"all-to-all": [], "engine": []}
    compute = []
    for event in trace["traceEvents"]:
        if event.get("cat") != "kernel":
            continue
        interval = (event["ts"], event["ts"] + event["dur"])
        if not event["name"].startswith("nccl"):
            compute.append(interval)
        elif _ALL_TO_ALL in event["name"]:
            communication["all-to-all"].append(interval)
        elif any(name in event["name"] for name in _COLLECTIVES):
            communication["engine"].append(interval)
    found = communication | {name: lanes[name] for name in ("to host", "to device")}

    def seconds(intervals) -> float:
        return sum(stop - start for start, stop in union(intervals)) / 1e6

    rows = {name: {"seconds": seconds(one), "hidden": hidden_fraction(one, compute)} for name, one in found.items()}
    return {"compute": {"seconds": seconds(compute)}} | rows
