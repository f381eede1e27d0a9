"""
One training step (forward and backward, no optimizer) by contender and length: seconds, peak memory, causal MFU.

    python -m benchmarks.train_step --contenders liger,alst,fpdt+liger --seq-lens 65536,131072 --layers 4 --out results.json

Every point runs in a fresh process. Time: CUDA events around a whole step, after one warm-up step, median of `--repeats`.
Memory: torch's peak of allocated bytes over the timed steps, and host bytes locked by hf_fpdt. Running out of memory is a row.
"""

import argparse
import itertools
import json
import os
import shlex
import statistics
import subprocess
import sys
import time

PEAK_BF16 = {"NVIDIA H200": 989e12, "NVIDIA H100 80GB HBM3": 989e12}  # dense, datasheet


def main():
    args = _arguments()
    if args.point:
        print(json.dumps(_point(args)), flush=True)
        return
    rows = []
    settings = json.loads(args.fpdt)
    for seq_len, contender in itertools.product(args.seq_lens.split(","), args.contenders.split(",")):
        several = isinstance(settings, list) and contender.startswith("fpdt")
        for fpdt in settings if several else [settings if isinstance(settings, dict) else {}]:
            rows.append(_in_fresh_process(args, contender, int(seq_len), fpdt))
            print(_line(rows[-1]), flush=True)
            if args.out:
                _write(args, rows)
    print("\n".join(["", *map(_line, rows)]))


def _arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contenders", default="liger,alst,fpdt+liger", help="names in benchmarks/contenders.py")
    parser.add_argument("--seq-lens", default="65536", help="tokens, separated by commas")
    parser.add_argument("--shape", default="llama-3.1-8b", help="a name in benchmarks/shapes.py")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=2, help="timed steps")
    parser.add_argument("--fpdt", default="{}", help="FPDTConfig fields as JSON, or a list of such: a row for each")
    parser.add_argument("--grad-norms", action="store_true", help="add the gradient norm of every parameter to the rows")
    parser.add_argument("--out", help="JSON file, written after every point")
    parser.add_argument("--point", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def _in_fresh_process(args, contender: str, seq_len: int, fpdt: dict) -> dict:
    command = [sys.executable, "-m", "benchmarks.train_step", "--point", "--contenders", contender]
    command += ["--seq-lens", str(seq_len), "--shape", args.shape, "--layers", str(args.layers)]
    command += ["--repeats", str(args.repeats), "--fpdt", json.dumps(fpdt)] + ["--grad-norms"] * args.grad_norms
    started = time.time()
    done = subprocess.run(command, capture_output=True, text=True)
    row = {"contender": contender, "seq_len": seq_len, "layers": args.layers, "shape": args.shape}
    try:
        row |= json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, json.JSONDecodeError):
        row["error"] = done.stderr.strip()[-800:] or f"exit status {done.returncode}"
    return row | {"process_s": round(time.time() - started, 1)}


def _point(args) -> dict:
    import torch

    from .contenders import build
    from .shapes import llama_config, step_flops

    config, seq_len = llama_config(args.shape, args.layers), int(args.seq_lens)
    try:
        model, step = build(args.contenders, config, json.loads(args.fpdt))
        ids = torch.randint(0, config.vocab_size, (1, seq_len), device="cuda", generator=_generator())
        started = time.time()
        step(ids)
        torch.cuda.synchronize()
        row = {"first_step_s": round(time.time() - started, 2)}
        weights = torch.cuda.memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()
        seconds, losses = zip(*(_timed(step, ids, model) for _ in range(args.repeats)), strict=True)
    except torch.OutOfMemoryError:
        return {"out_of_memory": True}
    median = statistics.median(seconds)
    row |= {"step_s": median, "all_steps_s": list(seconds), "loss": losses[-1]}
    row |= {"peak_gib": torch.cuda.max_memory_allocated() / 2**30, "weights_and_grads_gib": weights}
    row |= {"tokens_per_s": seq_len / median, "host_gib": _host_gib()}
    if args.contenders.startswith("fpdt"):
        row |= {"kernel": _kernel(json.loads(args.fpdt)), "fpdt": json.loads(args.fpdt)}
    row |= {"model_tflops": step_flops(config, seq_len) / median / 1e12, "gpu": torch.cuda.get_device_name()}
    if row["gpu"] in PEAK_BF16:
        row["causal_mfu"] = row["model_tflops"] * 1e12 / PEAK_BF16[row["gpu"]]
    if args.grad_norms:
        row["grad_norms"] = {name: p.grad.float().norm().item() for name, p in model.named_parameters()}
    return row


def _timed(step, ids, model) -> tuple[float, float]:
    import torch

    for parameter in model.parameters():
        parameter.grad = None
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    loss = step(ids)
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / 1e3, loss.item()


def _kernel(settings: dict) -> str:
    import torch

    from hf_fpdt.kernel_choice import choose_kernel

    return choose_kernel(settings.get("kernel", "auto"), torch.device("cuda", 0), torch.bfloat16, 128, 128).name


def _host_gib() -> float:
    if "hf_fpdt.transfers" not in sys.modules:
        return 0.0
    import torch

    return sys.modules["hf_fpdt.transfers"].transfers_for(torch.device("cuda", 0)).arena.locked_bytes / 2**30


def _generator():
    import torch

    return torch.Generator(device="cuda").manual_seed(1)


def _write(args, rows: list[dict]) -> None:
    import torch
    import transformers

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    words = [os.path.basename(word) if word == args.out else word for word in sys.argv[1:]]
    header = {"command": shlex.join(["python", "-m", "benchmarks.train_step", *words])}
    header["commit"] = commit or os.environ.get("COMMIT", "unknown")  # for a copy of the tree without its history
    header |= {"torch": torch.__version__, "transformers": transformers.__version__, "date": time.strftime("%Y-%m-%d")}
    header |= {name: _version(name) for name in ("flash-attn-4", "liger-kernel", "deepspeed")}
    header["gpu"] = next((row["gpu"] for row in rows if "gpu" in row), "unknown")
    with open(args.out, "w") as file:
        json.dump({"header": header, "rows": rows}, file, indent=1)


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _line(row: dict) -> str:
    text = f"{row['contender']:>12} {row['seq_len']:>8} tokens, {row['layers']} layers: "
    if "error" in row:
        return text + "failed: " + row["error"].splitlines()[-1]
    if row.get("out_of_memory"):
        return text + "out of memory"
    mfu = f", causal MFU {row['causal_mfu']:.1%}" if "causal_mfu" in row else ""
    how = f" {row.get('kernel', '')} {row.get('fpdt') or ''}".rstrip()
    return text + f"{row['step_s']:.2f} s, peak {row['peak_gib']:.1f} GiB, host {row['host_gib']:.1f} GiB{mfu}{how}"


if __name__ == "__main__":
    main()
