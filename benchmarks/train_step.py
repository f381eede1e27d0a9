"""
One training step by contender and length: seconds, peak memory, causal MFU.

    python -m benchmarks.train_step --contenders liger,alst,fpdt+liger --seq-lens 65536,131072 --layers 4 --out results.json

Every point runs in a fresh process, which imports while the point before it computes (`ahead.py`, `point.py`). Time: CUDA
events around a whole step, after one warm-up step, median of `--repeats` (0: the first step itself, where a step takes
minutes). Memory: torch's peak of allocated bytes over the timed steps, and host bytes locked by hf_fpdt. Running out of memory,
a crash, and a point that the time limit kept from starting are rows.
"""

import argparse
import itertools
import json
import time

from .ahead import Outcome, run_ahead
from .point import Spec, command
from .result_files import table, write_rows
from .without import NOTHING


def main():
    args = _arguments()
    started = time.monotonic()
    specs = specs_of(args)

    def may_go() -> bool:
        return args.time_limit is None or time.monotonic() - started < args.time_limit

    rows: list[dict] = []
    for spec, outcome in zip(specs, run_ahead([command(spec) for spec in specs], may_go), strict=True):
        rows.append(row_of(spec, outcome, args.time_limit))
        print(table(rows[-1:])[0], flush=True)
        if args.out:
            write_rows("train_step", args.out, rows)
    print("\n".join(["", *table(rows)]))


def _arguments(words: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contenders", default="liger,alst,fpdt+liger", help="names in benchmarks/contenders.py")
    parser.add_argument("--seq-lens", default="65536", help="tokens, separated by commas")
    parser.add_argument("--shape", default="llama-3.1-8b", help="a name in benchmarks/shapes.py")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=2, help="timed steps after a first one; 0: only that one")
    parser.add_argument("--fpdt", default="{}", help="FPDTConfig fields as JSON, or a list of such: a row for each")
    parser.add_argument("--optimizer", choices=("none", "adamw"), default="none", help="adamw: fused, its step is timed too")
    parser.add_argument("--documents", type=int, default=1, metavar="N", help="so many of equal length packed in every row")
    parser.add_argument("--window", type=int, default=0, metavar="TOKENS", help="a sliding window in every layer; 0: none")
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="adapters on q, k, v and o; the rest is frozen")
    parser.add_argument("--ballast-layers", type=int, default=0, help="hold weights, gradients and states of so many more")
    parser.add_argument("--ballast-gpu-gib", type=float, default=0.0, help="hold more on the GPU: what those layers keep there")
    parser.add_argument("--ballast-host-gib", type=float, default=0.0, help="the same in page-locked memory; fpdt only")
    parser.add_argument("--ballast-kept", action="store_true", help="what those layers keep on the GPU, worked out from shapes")
    parser.add_argument("--grad-norms", action="store_true", help="add the gradient norm of every parameter to the rows")
    parser.add_argument("--without", default=NOTHING, help="choices of hf_fpdt to switch off, of without.py: a,b+c: two rows")
    parser.add_argument("--copies", default="1", metavar="N", help="make every copy of hf_fpdt N times; 1,2,4: a row for each")
    parser.add_argument("--time-limit", type=float, metavar="S", help="points not started by then are not run")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try a command; with --shape tiny")
    parser.add_argument("--out", help="JSON file, written after every point")
    return parser.parse_args(words)


def specs_of(args) -> list[Spec]:
    """The points of a command, in order."""
    settings = json.loads(args.fpdt)
    several = settings if isinstance(settings, list) else [settings]
    names = (
        "shape",
        "layers",
        "repeats",
        "optimizer",
        "lora",
        "documents",
        "window",
        "ballast_layers",
        "ballast_gpu_gib",
        "ballast_host_gib",
        "ballast_kept",
    )
    common = {name: getattr(args, name) for name in (*names, "grad_norms", "device")}
    return [
        Spec(contender=contender, seq_len=int(seq_len), fpdt=fpdt, without=without, copies=int(copies), **common)
        for seq_len, contender in itertools.product(args.seq_lens.split(","), args.contenders.split(","))
        for fpdt in (several if contender.startswith("fpdt") else [{}])
        for without, copies in itertools.product(args.without.split(","), args.copies.split(","))
    ]


def row_of(spec: Spec, outcome: Outcome | None, time_limit: float | None) -> dict:
    """What is written of a point, however it ended."""
    return outcome_row(spec.row(), outcome, time_limit)


def outcome_row(row: dict, outcome: Outcome | None, time_limit: float | None) -> dict:
    """What was known before, with what the process said or how it ended."""
    if outcome is None:
        return row | {"not_run": f"not started within {time_limit:.0f} s"}
    found = [line for line in outcome.stdout.splitlines() if line.startswith('{"row": ')]
    if found:
        row = row | json.loads(found[-1])["row"]
    else:
        row = row | {"error": outcome.stderr.strip()[-800:]}
        if outcome.returncode <= 0 or not row["error"]:  # no exception of Python's: killed, for example
            row["error"] += f"\nexit status {outcome.returncode}"
    if outcome.returncode:
        row = row | {"exit_status": outcome.returncode}
    return row | {"process_s": round(outcome.seconds, 1)}


if __name__ == "__main__":
    main()
