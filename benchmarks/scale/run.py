"""
Full finetuning of 8B models on many GPUs of one host, 256K to 4M tokens a sequence: seconds, memory, causal MFU of a step.

    python -m benchmarks.scale.run --set main --gpus 4 --host-gib 500 --dry-run
    python -m benchmarks.scale.run --set main --gpus 4 --time-limit 540 --out scale.json
    python -m benchmarks.scale.run --gpus 4 --shape llama-3.1-8b --seq-len 262144 --layers 32 --steps 1 --out scale.json

A launch is under ZeRO-3 (`step.py`): weights, gradients, fp32 weights and AdamW's states are spread over all GPUs, a sequence
over `--sp` of them. A short warm-up step of two chunks compiles the kernels; then `--steps` long ones, optimizer included, from
all ranks ready to all ranks done. Points that follow each other with the same model and settings and longer sequences share a
launch. Host memory is page-locked before a point's steps, that of the first while the model is made.
Memory: torch's peak of allocated bytes and what hf_fpdt locked, of the rank that has most. Where fewer layers run than the
model has, `whole_model` says what a step of all would take: `step_s * operations of all / operations that ran`, and at most
`step_s * depth / layers`. Points that do not fit the memory are refused before any starts (`estimates.py`).
"""

import argparse
import json
import os
import signal
import sys
import time
from dataclasses import asdict, replace

from benchmarks.ahead import Outcome
from benchmarks.launched import launched
from benchmarks.result_files import table, write_rows
from benchmarks.shared_step import accelerate_launch
from benchmarks.train_step import row_of

from .estimates import Estimate, estimate, settled
from .points import SETS, ScaleSpec, launches_of, points_of

_SHAPE = "llama-3.1-8b"
_QUICKEST = 0.75  # of its estimate; with less time left a point is not started
_WITHOUT_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}


def main():
    args = _arguments()
    started = time.monotonic()
    launches = launches_of(specs_of(args))
    specs = [spec for launch in launches for spec in launch]
    print("\n".join(as_lines(specs, [estimate(spec) for spec in specs])), flush=True)
    if args.dry_run:
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # with the ranks, see `launched`
    for name, value in _WITHOUT_MULTICAST.items():
        os.environ.setdefault(name, value)
    rows: list[dict] = []
    for launch in launches:
        left = None if args.time_limit is None else args.time_limit - (time.monotonic() - started)
        needed = _QUICKEST * estimate(launch[0]).seconds if launch[0].device == "cuda" else 0
        outcome = launched(command(launch), left) if left is None or left >= needed else None
        rows += rows_of(launch, outcome, args.time_limit)
        print("\n".join(f"{launch[0].shape}, {line}" for line in table(rows[-len(launch) :])), flush=True)
        if args.out:
            write_rows("scale.run", args.out, rows)


def rows_of(launch: list[ScaleSpec], outcome: Outcome | None, time_limit: float | None) -> list[dict]:
    """What is written of the points of a launch; `process_s` is of all of them."""
    said = {} if outcome is None else _said(outcome.stdout)
    rows = []
    for index, spec in enumerate(launch):
        own = outcome
        if outcome is not None:
            ended = outcome.returncode if index >= max(said, default=0) else 0  # another point was begun: this one had ended
            own = replace(outcome, returncode=ended, stdout="\n".join(said.get(index, [])))
        row = row_of(spec, own, time_limit) | estimate(spec).row()
        if index not in said and outcome is not None and outcome.returncode == -signal.SIGKILL and time_limit is not None:
            row = spec.row() | {"not_run": f"not ended within {time_limit:.0f} s"} | estimate(spec).row()
        before = [one.seq_len for one in launch[:index]]
        rows.append(row | ({"ran_before": before} if before else {}))
    return rows


def _said(stdout: str) -> dict[int, list[str]]:
    """The lines of each point, by its number in the launch."""
    found: dict[int, list[str]] = {}
    for line in stdout.splitlines():
        if line.startswith('{"row": '):
            found.setdefault(json.loads(line)["row"].get("point", 0), []).append(line)
    return found


def _arguments(words: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, required=True, help="of this host")
    parser.add_argument("--set", choices=SETS, help="points by name, see benchmarks/scale/points.py; or --seq-len and --layers")
    parser.add_argument("--only", help="of the set: numbers of points as --dry-run has them, separated by commas")
    parser.add_argument("--shape", help=f"a name in benchmarks/shapes.py (default: {_SHAPE})")
    parser.add_argument("--seq-len", help="tokens of a sequence; several are several points")
    parser.add_argument("--layers", help="that run, one number for all points or one for each")
    parser.add_argument("--sp", type=int, default=0, help="GPUs that share a sequence (default: all)")
    parser.add_argument("--steps", help="long steps, of which the first is timed only if it is alone; as --layers (default: 1)")
    parser.add_argument("--trace", type=int, metavar="TOKENS", help="profile one more step, of so many tokens")
    parser.add_argument("--contender", help="fpdt+liger, or fpdt: without Liger's kernels (default: with them, on GPUs)")
    parser.add_argument("--fpdt", default="{}", help="FPDTConfig fields as JSON")
    parser.add_argument("--zero", default="{}", help="DeepSpeed's zero_optimization as JSON")
    parser.add_argument("--host-gib", type=float, help="memory of the host (default: what it has available)")
    parser.add_argument("--gpu-gib", type=float, default=74.0, help="of a GPU that may be taken (default: 74, of 80 GB)")
    parser.add_argument(
        "--time-limit", type=float, metavar="S", help="points that cannot end by then are not run, one running ends"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the points with what they are expected to take")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try a command; with --shape tiny")
    parser.add_argument("--out", help="JSON file, written after every point")
    return parser.parse_args(words)


def specs_of(args) -> list[ScaleSpec]:
    """
    The points of a command, in order, with settings by which they fit.

    Raises:
        ValueError: for options that do not go together, and for a point that does not fit.
    """
    contender = args.contender or ("fpdt+liger" if args.device == "cuda" else "fpdt")
    more = {"contender": contender, "fpdt": json.loads(args.fpdt), "zero": json.loads(args.zero), "device": args.device}
    more |= {"trace": args.trace} if args.trace is not None else {}
    specs = [replace(spec, **more) for spec in _named(args)] if args.set else _listed(args, more)
    if args.steps:
        steps = _each("--steps", args.steps, len(specs))
        specs = [replace(spec, steps=count) for spec, count in zip(specs, steps, strict=True)]
    return [settled(spec, _host_gib(args), args.gpu_gib) for spec in specs]


def _named(args) -> list[ScaleSpec]:
    if args.seq_len or args.layers or args.sp or args.shape:
        raise ValueError(
            f"--set {args.set} with --shape {args.shape}, --seq-len {args.seq_len}, --layers {args.layers}, --sp {args.sp}: a "
            "set has its own; leave these out, or --set."
        )
    points = points_of(args.set, args.gpus)
    numbers = list(range(1, len(points) + 1)) if args.only is None else [int(one) for one in args.only.split(",")]
    if not set(numbers) <= set(range(1, len(points) + 1)):
        raise ValueError(f"--only {args.only}: --set {args.set} has points 1 to {len(points)}.")
    return [points[number - 1] for number in numbers]


def _listed(args, more: dict) -> list[ScaleSpec]:
    if not args.seq_len or not args.layers or args.only:
        raise ValueError(
            f"--seq-len {args.seq_len}, --layers {args.layers}, --only {args.only}: both of the first are needed, or --set, of "
            "which --only takes some points."
        )
    lengths = [int(one) for one in args.seq_len.split(",")]
    common = {"gpus": args.gpus, "shape": args.shape or _SHAPE, "sp": args.sp} | more
    each = _each("--layers", args.layers, len(lengths))
    return [ScaleSpec(seq_len=length, layers=count, **common) for length, count in zip(lengths, each, strict=True)]


def _each(option: str, text: str, points: int) -> list[int]:
    """A number for every point, of one for all or of as many as there are points."""
    numbers = [int(one) for one in text.split(",")]
    if len(numbers) not in (1, points):
        raise ValueError(f"{option} {text} with {points} points: one number, or as many as points, are needed.")
    return numbers * points if len(numbers) == 1 else numbers


def _host_gib(args) -> float:
    if args.host_gib is not None:
        return args.host_gib
    from hf_fpdt.host_limits import available_host_bytes  # takes seconds

    available = available_host_bytes()
    if available is None:
        raise ValueError("--host-gib: this system does not say how much memory it has available; give the number.")
    return available / 2**30


def as_lines(specs: list[ScaleSpec], estimates: list[Estimate]) -> list[str]:
    """A line for each point, numbered, and the sum of their seconds."""
    lines = []
    for number, (spec, expected) in enumerate(zip(specs, estimates, strict=True), 1):
        saved = "saved" if spec.fpdt["save_attention"] else "again"
        steps = f"{spec.steps} step{'s' * (spec.steps > 1)}" + (" and a trace" if spec.trace else "")
        lines.append(
            f"{number}: {spec.shape:<12} {spec.seq_len:>9,} tokens, {spec.layers:>2} of {spec.depth} layers, {spec.dp} x "
            f"{spec.sp} GPUs, chunk {spec.fpdt['chunk_size']:,}, attention {saved}, {steps}: {expected.seconds:.0f} s, "
            f"GPU {expected.gpu_gib:.0f} GiB, host {expected.host_gib:.0f} GiB"
        )
    return [*lines, f"{sum(one.seconds for one in estimates):.0f} s by estimate, on H100s"]


def command(launch: list[ScaleSpec]) -> list[str]:
    """The command line of a launch."""
    first, points = launch[0], json.dumps([asdict(spec) for spec in launch])
    return [*accelerate_launch(first.device, first.gpus, first.sp), "-m", "benchmarks.scale.step", points]


if __name__ == "__main__":
    main()
