"""
One training step of a sequence that several GPUs share: seconds, peak memory, causal MFU, hidden communication.

    python -m benchmarks.shared_step --contenders fpdt+liger,ulysses,ring --gpus 1,2 --seq-lens 65536,262144 --out results.json

Every point is a launch of its own (`shared_point.py`), with weights, gradients and optimizer sharded over its GPUs. Time: from
all ranks ready to all ranks done, optimizer included, after one warm-up step, median of `--repeats` (0: the first step
itself). Memory: torch's peak of allocated bytes over the timed steps, of the rank that has most. `--trace` adds a profiled
step: how much of the all-to-alls, of the engine's collectives and of the copies ran under compute.
"""

import argparse
import itertools
import json
import sys
import time
from dataclasses import asdict

from .launched import launched
from .result_files import table, write_rows
from .shared_point import WITHOUT_ENGINE, SharedSpec
from .train_step import row_of

_CONFIG = {"cuda": "accelerate_configs/fpdt_zero3_2gpu.yaml", "cpu": "accelerate_configs/fpdt_zero3_2cpu.yaml"}


def main():
    args = _arguments()
    started = time.monotonic()
    rows: list[dict] = []
    for spec in specs_of(args):
        left = None if args.time_limit is None else args.time_limit - (time.monotonic() - started)
        outcome = None if left is not None and left <= 0 else launched(command(spec), left)
        rows.append(row_of(spec, outcome, args.time_limit))
        print(table(rows[-1:])[0], flush=True)
        if args.out:
            write_rows("shared_step", args.out, rows)
    print("\n".join(["", *table(rows)]))


def _arguments(words: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contenders", default="fpdt+liger,ulysses,ring", help="names in benchmarks/shared_point.py")
    parser.add_argument("--gpus", default="2", help="numbers of GPUs, separated by commas; others than hf_fpdt need two")
    parser.add_argument("--seq-lens", default="65536", help="tokens of the whole sequence, separated by commas")
    parser.add_argument("--shape", default="llama-3.1-8b", help="a name in benchmarks/shapes.py")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=2, help="timed steps after a first one; 0: only that one")
    parser.add_argument("--fpdt", default="{}", help="FPDTConfig fields as JSON, or a list of such: a row for each")
    parser.add_argument(
        "--zero", default="{}", help="DeepSpeed's zero_optimization as JSON, or a list, as above; ring and tensor have none"
    )
    parser.add_argument("--trace", action="store_true", help="profile one more step")
    parser.add_argument(
        "--time-limit", type=float, metavar="S", help="points not started by then are not run, one running ends"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try a command; with --shape tiny")
    parser.add_argument("--out", help="JSON file, written after every point")
    return parser.parse_args(words)


def specs_of(args) -> list[SharedSpec]:
    """The points of a command, in order. One GPU is hf_fpdt's alone."""
    fpdts, zeros = (one if isinstance(one, list) else [one] for one in map(json.loads, (args.fpdt, args.zero)))
    common = {name: getattr(args, name) for name in ("shape", "layers", "repeats", "trace", "device")}
    return [
        SharedSpec(contender=contender, gpus=int(gpus), seq_len=int(seq_len), fpdt=fpdt, zero=zero, **common)
        for seq_len, contender, gpus in itertools.product(
            args.seq_lens.split(","), args.contenders.split(","), args.gpus.split(",")
        )
        if contender.startswith("fpdt") or int(gpus) > 1
        for fpdt in (fpdts if contender.startswith("fpdt") else [{}])
        for zero in (zeros if contender not in WITHOUT_ENGINE else [{}])
    ]


def command(spec: SharedSpec, module: str = "benchmarks.shared_point") -> list[str]:
    """The command line of a point."""
    words = ["-m", module, json.dumps(asdict(spec))]
    if spec.contender in WITHOUT_ENGINE:
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={spec.gpus}", *words]
    return [*accelerate_launch(spec.device, spec.gpus, spec.gpus), *words]


def accelerate_launch(device: str, gpus: int, sp_size: int) -> list[str]:
    """The start of a command under ZeRO-3 on so many GPUs, of which `sp_size` share a sequence."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", _CONFIG[device], f"--num_processes={gpus}"]
    launch += ["--main_process_port=0"]  # any that is free: another command may run on other GPUs
    groups = [] if gpus == sp_size else [f"--parallelism_config_dp_replicate_size={gpus // sp_size}"]
    return [*launch, f"--parallelism_config_sp_size={sp_size}", *groups]


if __name__ == "__main__":
    main()
