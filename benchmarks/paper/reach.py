"""
The longest sequence that a strategy trains, by bisection: what limits it in the FPDT paper's figure 11 (arXiv 2408.16978).

    python -m benchmarks.paper.reach --strategies sdpa,liger,chunks --time-limit 480 --out reach.json
    python -m benchmarks.paper.reach --strategies fpdt --start 1048576 --most 2097152 --out reach_fpdt.json
    python -m benchmarks.paper.reach --commands

Method: tries as `train_step.py` makes them, each in a fresh process: one layer runs one whole step, and the GPU memory of the
other layers of the real model is held (`ballast.py`): weights, gradients and what each keeps for the backward. Lengths are
doubled or halved from `--start` until one fits and one does not, then the gap is halved to 5%. Running out of memory, on the
GPU or the host, ends a length; a try that fails otherwise, or comes too late, ends the strategy. Every try is a row, and a last
row of each strategy says what it reached: the longest that ran, and the shortest that did not (none: all up to `--most` ran).

With `--confirm 3` the length that was reached runs once more, three steps in one process, all with a finite loss; where it runs
out of memory in them, lengths shorter by the tolerance follow until one trains. `--commands` prints what measures the reach of
an H100 of 80 GB, and of two; with `--host` one try that takes most of 512 GiB of host memory.

What absent layers keep in host memory is held with `--host`, on machines that have it. Without, the reach is that of the GPU,
and `host_gib_for_all` says what the whole model keeps there. `--go-on reach.json` does not repeat the tries of that file.

With `--gpus 2` every try is a launch as `shared_step.py` makes it, under ZeRO-3, and nothing is held for absent layers.
"""

import argparse
import shlex
import time
from collections.abc import Callable

from benchmarks import shared_step
from benchmarks.ahead import run_ahead
from benchmarks.ballast import kept_bytes
from benchmarks.launched import launched
from benchmarks.paper.expected import TRY_S, seconds_of
from benchmarks.paper.spread import Job
from benchmarks.point import Spec, command
from benchmarks.result_files import read_calls, write_rows
from benchmarks.result_files import table as lines_of
from benchmarks.shapes import DEPTHS, kv_dim, model_config, query_dim
from benchmarks.shared_point import SharedSpec
from benchmarks.train_step import row_of

_OURS = {
    "recompute": True,
    "save_attention": False,
    "optimizer_memory": 0,  # nothing is kept free for one, as elsewhere
}
STRATEGIES = {  # a contender, and settings of hf_fpdt
    "sdpa": ("sdpa", {}),
    "liger": ("liger", {}),
    "alst": ("alst", {}),
    "chunks": ("fpdt", _OURS | {"offload": "none"}),
    "fpdt": ("fpdt", _OURS | {"offload": "host", "kv": "streamed"}),
}
SHARED = {name: (name, {}) for name in ("ulysses", "ulysses+liger", "tensor")} | {  # of several GPUs
    "fpdt": ("fpdt", {"recompute": True, "save_attention": True, "offload": "host", "kv": "streamed"})
}
_STEP = 1024  # tokens; every length is a multiple
_REFUSED_S = 27  # of a try that is out of memory
_HOST_GIB_BESIDE = 24  # of 1,048,576 tokens: the norm's input, and sums of grad K and grad V while they stream


def main():
    args = _arguments()
    if args.commands:
        print("\n".join(map(str, commands(args.host))))
        return
    started = time.monotonic()
    before = [row for path in args.go_on for call in read_calls(path) for row in call["rows"]]
    rows = [row for row in before if "reached" not in row and "not_run" not in row]
    for name in args.strategies.split(","):

        def fits(seq_len: int, steps: int = 1, name: str = name) -> bool | None:
            this = {"strategy": name, "shape": args.shape, "seq_len": seq_len, "host_held": args.host}
            this |= ({"steps": steps} if steps > 1 else {}) | ({"gpus": args.gpus} if args.gpus > 1 else {})
            known = next((row for row in rows if _same_try(row, this, _strategies(args)[name][1])), None)
            if known is None:
                in_time = args.time_limit is None or time.monotonic() - started < args.time_limit
                known = this | _tried(spec_of(name, args, seq_len, steps), in_time, args.time_limit)
                rows.append(known)
                print(lines_of([known])[0], flush=True)
                write_rows("paper.reach", args.out, rows)
            return verdict(known)

        longest, shortest = search(fits, args.start, args.most, args.tolerance)
        confirmed = None
        while args.confirm > 1 and longest and (confirmed := fits(longest, args.confirm)) is False:
            longest, shortest = int(longest / (1 + args.tolerance)) // _STEP * _STEP, longest
        rows.append(reached(name, args, longest, shortest) | ({"confirmed_steps": args.confirm} if confirmed else {}))
        print(f"{name}: reached {longest:,} tokens, not {shortest if shortest is None else format(shortest, ',')}", flush=True)
        write_rows("paper.reach", args.out, rows)


def _arguments(words: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    several = f"of {', '.join(STRATEGIES)}; on several GPUs {', '.join(SHARED)}"
    parser.add_argument("--strategies", default="sdpa,liger,chunks,fpdt", help=several)
    parser.add_argument("--gpus", type=int, default=1, help="that share a sequence")
    parser.add_argument("--shape", default="llama-3.1-8b", help=f"of {', '.join(DEPTHS)}")
    parser.add_argument("--start", type=int, default=131072, metavar="TOKENS", help="the first length")
    parser.add_argument("--most", type=int, default=4194304, metavar="TOKENS", help="no longer length is tried")
    parser.add_argument("--tolerance", type=float, default=0.05, help="between what fits and what does not, as a fraction")
    parser.add_argument("--host", action="store_true", help="hold the absent layers' host memory too; hf_fpdt only")
    parser.add_argument("--confirm", type=int, default=1, metavar="N", help="run N steps at the length that was reached")
    parser.add_argument("--commands", action="store_true", help="print commands for an H100 and their seconds, and run nothing")
    parser.add_argument("--go-on", nargs="*", default=[], metavar="FILE", help="results whose tries are not run again")
    parser.add_argument("--time-limit", type=float, metavar="S", help="tries not started by then are not run")
    parser.add_argument("--out", default="reach.json", help="JSON file, written after every try")
    args = parser.parse_args(words)
    if args.commands:
        return args
    known = _strategies(args)
    if unknown := [name for name in args.strategies.split(",") if name not in known]:
        some = f"with --gpus {args.gpus} some of {', '.join(known)} are needed."
        raise ValueError(f"--strategies: got {', '.join(unknown)}; {some}")
    if args.shape not in DEPTHS:
        raise ValueError(f"--shape {args.shape}: a model whose depth is known is needed, one of {', '.join(DEPTHS)}.")
    if not (_STEP <= args.start <= args.most and 0 < args.tolerance < 1):
        raise ValueError(
            f"--start {args.start}, --most {args.most}, --tolerance {args.tolerance}: {_STEP} tokens at least, no more than "
            "--most, and a fraction between 0 and 1 are needed."
        )
    if args.confirm < 1:
        raise ValueError(f"--confirm {args.confirm}: one step, that of the search, is the least.")
    if args.host and args.gpus > 1:
        raise ValueError(f"--host with --gpus {args.gpus}: nothing is held for absent layers where GPUs share a sequence.")
    if args.host and (others := [name for name in args.strategies.split(",") if name != "fpdt"]):
        raise ValueError(f"--host with {', '.join(others)}: only the strategy fpdt moves tensors to host memory of its own.")
    return args


def commands(host: bool = False) -> list[Job]:
    """
    On an H100 of 80 GB, each within ten minutes. Starts are near what is expected, so that few tries are needed; seconds are
    those of the tries that such a search takes.

    Args:
        host: one try of 1,048,576 tokens with all that the whole model keeps on the host, which takes most of 512 GiB; else the
            searches, and on two GPUs of hf_fpdt the length that fits ten minutes.
    """
    if host:
        words = f"--strategies fpdt --host --start {1 << 20} --most {1 << 20} --out reach_fpdt_host.json".split()
        kept = DEPTHS["llama-3.1-8b"] * _host_bytes("llama-3.1-8b", STRATEGIES["fpdt"][1]) / 1024  # GiB of 2**20 tokens
        return [_job(words, "fpdt", (1 << 20,), host_gib=_HOST_GIB_BESIDE + round(kept))]
    found = [
        _job(["--strategies", name, "--start", str(start), "--confirm", "3", "--out", f"reach_{name}.json"], name, (start,) * 4)
        for name, start in (("sdpa", 16384), ("liger", 98304), ("alst", 229376), ("chunks", 98304))
    ]
    for name, start, most, more, lengths in (
        ("fpdt", 1810432, 1900544, [], (1810432,)),
        ("ulysses+liger", 688128, 1048576, ["--gpus", "2"], (688128,) * 4),
        ("fpdt", 3145728, 3145728, ["--gpus", "2"], (3145728,)),
    ):
        words = ["--strategies", name, "--start", str(start), "--most", str(most), *more, "--out"]
        found.append(_job([*words, f"reach_{name}{'_2gpus' if more else ''}.json"], name, lengths))
    return found


def _job(words: list[str], name: str, lengths: tuple[int, ...], host_gib: int | None = None) -> Job:
    command = shlex.join(["python", "-m", "benchmarks.paper.reach", "--time-limit", "420", *words])
    return Job(command, _seconds(words, name, lengths), gpus=_arguments(words).gpus, host_gib=host_gib)


def _seconds(words: list[str], name: str, lengths: tuple[int, ...]) -> int:
    """Of tries of these lengths, and of the confirmation if there is one; two more tries are refused, unless one is all."""
    args = _arguments(words)
    tries = [spec_of(name, args, seq_len) for seq_len in lengths]
    tries += [spec_of(name, args, lengths[-1], args.confirm)] if args.confirm > 1 else []
    refused = 0 if args.start == args.most else 2
    return round(refused * _REFUSED_S + sum(TRY_S + seconds_of(spec, gpu_gib=1e9) for spec in tries))


def _strategies(args) -> dict:
    return STRATEGIES if args.gpus == 1 else SHARED


def _same_try(row: dict, wanted: dict, settings: dict) -> bool:
    """Of as many steps and, of hf_fpdt, with the same settings."""
    same = all(row.get(key, default) == wanted.get(key, default) for key, default in (("steps", 1), ("gpus", 1)))
    return same and row.get("fpdt", settings) == settings and all(row.get(key) == value for key, value in wanted.items())


def spec_of(name: str, args, seq_len: int, steps: int = 1) -> Spec | SharedSpec:
    """One try: one layer runs, and on one GPU the rest of the depth is held."""
    contender, settings = _strategies(args)[name]
    if args.gpus > 1:
        more = {"fpdt": settings, "shape": args.shape, "layers": 1, "repeats": steps - 1}
        return SharedSpec(contender=contender, gpus=args.gpus, seq_len=seq_len, **more)
    absent = DEPTHS[args.shape] - 1
    host = absent * _host_bytes(args.shape, settings) * seq_len / 2**30 if args.host else 0.0
    return Spec(
        contender=contender,
        seq_len=seq_len,
        shape=args.shape,
        layers=1,
        repeats=steps - 1,
        fpdt=settings,
        ballast_layers=absent,
        ballast_kept=True,
        ballast_host_gib=host,
    )


def _host_bytes(shape: str, settings: dict) -> int:
    """A token and layer of hf_fpdt with `offload="host"`: input, K and V, and with `save_attention` what attention gave."""
    if settings.get("offload") != "host":
        return 0
    config = model_config(shape, 1)
    saved = 2 * query_dim(config) + 4 * config.num_attention_heads if settings["save_attention"] else 0
    return 2 * config.hidden_size + 4 * kv_dim(config) + saved


def _tried(spec: Spec | SharedSpec, in_time: bool, time_limit: float | None) -> dict:
    if isinstance(spec, SharedSpec):
        outcome = launched(shared_step.command(spec), None) if in_time else None
    else:
        (outcome,) = run_ahead([command(spec)], lambda: in_time)
    return row_of(spec, outcome, time_limit)


def verdict(row: dict) -> bool | None:
    """Whether the length of a try fits; None: it ended otherwise, or was not run."""
    if row.get("out_of_memory"):
        return False
    return True if "step_s" in row and "error" not in row else None


def search(fits: Callable[[int], bool | None], start: int, most: int, tolerance: float) -> tuple[int, int | None]:
    """
    The longest length that fits and the shortest that does not, in multiples of 1,024 tokens; 0 if none did, and None if all up
    to `most` did. Lengths are asked once each. Where `fits` knows no answer the search ends with what it has.
    """
    good, bad, length = 0, None, start // _STEP * _STEP
    while length > 0:
        answer = fits(length)
        if answer is None:
            break
        good, bad = (length, bad) if answer else (good, length)
        if bad is None:
            length = min(2 * good, most // _STEP * _STEP)
        else:
            length = (bad // 2 if good == 0 else (good + bad) // 2) // _STEP * _STEP
        if length <= good or (bad is not None and bad - good <= max(tolerance * good, _STEP)):
            break
    return good, bad


def table(rows: list[dict]) -> list[str]:
    """
    In Markdown, by the tries: the longest length of each strategy that ran most steps, the shortest with the same settings that
    had no memory, and seconds, of the first step where that was all. "1, not 3" steps: it had no memory for three.
    """
    heads = ("strategy", "GPUs", "longest", "out of memory at", "steps there", "peak GiB", "step", "host GiB, all layers")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, gpus in dict.fromkeys((row["strategy"], row.get("gpus", 1)) for row in rows):
        own = [row for row in rows if (row["strategy"], row.get("gpus", 1)) == (name, gpus) and "reached" not in row]
        best = max(filter(verdict, own), key=lambda row: (row.get("steps", 1), row["seq_len"]))
        length, steps = best["seq_len"], best.get("steps", 1)
        refused = [row for row in own if verdict(row) is False and row.get("fpdt") == best.get("fpdt")]
        longer = min((row["seq_len"] for row in refused if row["seq_len"] > length), default=None)
        more = min((row["steps"] for row in refused if row["seq_len"] == length), default=None)
        host = DEPTHS[best["shape"]] * _host_bytes(best["shape"], best.get("fpdt", {})) * length / 2**30
        cells = f"{length:,} | {'' if longer is None else format(longer, ',')} | {steps}{f', not {more}' if more else ''}"
        time_s = f"{best['step_s']:.2f} s{', the first' if steps == 1 else ''}"
        lines.append(f"| {name} | {gpus} | {cells} | {best['peak_gib']:.1f} | {time_s} | {host:.0f} |")
    return lines


def reached(name: str, args, longest: int, shortest: int | None) -> dict:
    """The last row of a strategy."""
    contender, settings = _strategies(args)[name]
    host = DEPTHS[args.shape] * _host_bytes(args.shape, settings) * longest / 2**30
    row = {"strategy": name, "contender": contender, "shape": args.shape, "reached": longest, "out_of_memory_at": shortest}
    if args.gpus > 1:
        return row | {"gpus": args.gpus, "host_gib_for_all": host, "fpdt": settings}
    kept = kept_bytes(model_config(args.shape, 1), contender, settings)
    return row | {"kept_bytes_a_token_and_layer": kept, "host_gib_for_all": host, "fpdt": settings}


if __name__ == "__main__":
    main()
