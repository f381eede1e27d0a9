"""
The paper's figure 14: the same training with PyTorch's attention, with FPDT on the GPU, with FPDT offloaded, and with FPDT
offloaded on two GPUs that share every sequence and all states (ZeRO-3).

    python -m benchmarks.paper.convergence --gpus 4 --time-limit 400 --out convergence

trains a Llama and a GPT-NeoX of some 55 million parameters from scratch on the files of Python's standard library, and writes
`convergence.json` (the loss of every step, and of held-out text at the end) and `convergence.png` (the losses, and what each
run differs from the first). Runs of one family see the same data in the same order. The first two differ in their seed only,
that of the weights: what they differ by is noise. All others start from the weights of the first. A verdict compares how far
FPDT's runs are from the first, as means of 20 steps, and how far the other seed's is: at the last step, and where a run had no
time for all of them, at its own last.

Weights in fp32, bf16 autocast on a GPU, AdamW, gradients clipped to 1, a warm-up of 20 steps and half a cosine down to a tenth.
Every run is a process of its own, on a GPU of its own (`zero3` has two); with `--gpus N` as many run at once as there are GPUs
for.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.launched import Job, spread
from benchmarks.paper.convergence_run import FAMILIES, RUNS, VOCABULARY, Spec, command, mean_at
from benchmarks.result_files import header, read_calls
from benchmarks.train_step import outcome_row

_FIRST = ("sdpa", "zero3", "offload", "fpdt", "seed")  # what the others are compared with, then the longest
_GRACE = 30  # seconds from the end of the time until a run that goes on is killed


def main():
    args = _arguments()
    rows = in_order(_read(args.read) if args.read else _run_all(args))
    found = verdicts(rows)
    print("\n".join(map(said, found)) or "no verdict: it takes sdpa, another seed and a run of fpdt, of one family")
    if not args.read:
        write(args.out, rows, found)
    draw(rows, Path(f"{args.out}.png"))


def _arguments(words: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--runs", help=f"some of {', '.join(RUNS)}; without: all that --gpus has GPUs for")
    parser.add_argument("--gpus", type=int, default=1, help="run on so many of this machine; on CPUs: so many runs at once")
    parser.add_argument("--seq-len", type=int, default=16384, help="tokens of a sequence; fpdt has four chunks of it")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--max-documents", type=int, help="use only the longest files of the library")
    parser.add_argument("--tiny", action="store_true", help="tries the command on a CPU")
    parser.add_argument(
        "--time-limit", type=float, metavar="S", help="no run starts after it, and one that runs ends with what it has"
    )
    parser.add_argument("--read", nargs="+", metavar="FILE", help="draw these results, of one or more calls, again")
    parser.add_argument("--out", default="convergence", help="path of the results, without ending")
    args = parser.parse_args(words)
    if args.gpus < 1 or args.steps < 1 or args.seq_len < 8:
        raise ValueError(f"--gpus {args.gpus}, --steps {args.steps}, --seq-len {args.seq_len}: 1, 1 and 8 are the least.")
    args.families = _names("--families", args.families, FAMILIES)
    args.runs = _names("--runs", args.runs or ",".join(n for n, run in RUNS.items() if run.gpus <= args.gpus), RUNS)
    if short := [name for name in args.runs if RUNS[name].gpus > args.gpus]:
        raise ValueError(f"--runs {','.join(short)} with --gpus {args.gpus}: {RUNS[short[0]].gpus} are needed; raise --gpus.")
    return args


def _names(option: str, words: str, known) -> list[str]:
    names = [word.strip() for word in words.split(",")]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"{option}: got {', '.join(map(repr, unknown))}; some of {', '.join(known)} are needed.")
    return names


def _read(paths: list[str]) -> list[dict]:
    return [row for path in paths for call in read_calls(path) for row in call["rows"]]


def _run_all(args) -> list[dict]:
    """All runs, those that did not end as they should as well. What is there so far is written after each."""
    import torch

    started, rows = time.monotonic(), []
    device = "cuda" if torch.cuda.is_available() else "cpu"
    end = None if args.time_limit is None else started + args.time_limit
    deadline = None if args.time_limit is None else time.time() + args.time_limit
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "pieces.pt"))
        torch.save(pieces(args.seq_len, args.max_documents), path)
        common = {"pieces": path, "steps": args.steps, "tiny": args.tiny, "deadline": deadline}
        order = sorted(args.runs, key=_FIRST.index)
        specs = [Spec(run=run, family=family, **common) for run in order for family in args.families]
        jobs = [Job(command(spec, device), RUNS[spec.run].gpus) for spec in specs]
        for index, outcome in spread(jobs, args.gpus, end, None if end is None else end + _GRACE):
            known = {"family": specs[index].family, "run": RUNS[specs[index].run].name}
            rows.append(outcome_row(known, outcome, args.time_limit))
            print(_line(rows[-1]), flush=True)
            write(args.out, in_order(rows), verdicts(in_order(rows)))
    return rows


def _line(row: dict) -> str:
    who = f"{row['family']}, {row['run']}"
    if "losses" not in row:
        return f"{who}: {row.get('not_run') or row['error']}"
    steps = f"{len(row['losses'])} steps in {row['seconds']:.0f} s, {row['process_s']:.0f} s in all"
    return f"{who}: {row['final']:.4f}, held out {row['held_out']:.4f}, {steps}"


def pieces(seq_len: int, max_documents: int | None):
    """`[pieces, seq_len]`, in an order of their own."""
    import torch

    sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
    from long_text import DataArguments, load_documents, load_tokenizer, make_pieces

    arguments = DataArguments(seq_len=seq_len, group=True, max_documents=max_documents)
    documents = load_documents(arguments)
    found = make_pieces(documents, load_tokenizer(None, VOCABULARY, documents), arguments)
    ids = torch.tensor(found["input_ids"], dtype=torch.int64)
    return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]


def write(out: str, rows: list[dict], found: list[dict]) -> None:
    gpu = next((row["gpu"] for row in rows if "gpu" in row), "unknown")
    content = {"header": header("paper.convergence", out, gpu), "verdicts": found, "rows": rows}
    Path(f"{out}.json").write_text(json.dumps(content, indent=1))


def in_order(rows: list[dict]) -> list[dict]:
    """By family and run; of one that was begun again, the longest."""
    longest: dict[tuple[str, str], dict] = {}
    for row in sorted(rows, key=lambda row: len(row.get("losses", []))):
        longest[row["family"], row["run"]] = row
    names = [run.name for run in RUNS.values()]
    return sorted(longest.values(), key=lambda row: (list(FAMILIES).index(row["family"]), names.index(row["run"])))


def verdicts(rows: list[dict]) -> list[dict]:
    """For each family with a first run, another seed and runs of fpdt: the means at the last step of each of these."""
    found = []
    for family in dict.fromkeys(row["family"] for row in rows):
        own = {row["run"]: row for row in rows if row["family"] == family and row.get("losses")}
        first, seed = (own.get(RUNS[name].name) for name in ("sdpa", "seed"))
        ours = [row for row in own.values() if row["fpdt"] is not None]
        if not (first and seed and ours):
            continue
        most = min(len(first["losses"]), len(seed["losses"]))
        for step in sorted({min(len(row["losses"]), most) for row in ours}):
            found.append(_verdict(family, step, first, seed, [row for row in ours if len(row["losses"]) >= step]))
    return found


def _verdict(family: str, step: int, first: dict, seed: dict, ours: list[dict]) -> dict:
    base = mean_at(first["losses"], step)
    apart = {row["run"]: mean_at(row["losses"], step) - base for row in ours}
    farthest = max(apart.values(), key=abs)
    noise = mean_at(seed["losses"], step) - base
    one = {"family": family, "step": step, "sdpa": base, "another_seed": noise, "fpdt": apart, "largest": farthest}
    return one | {"within_noise": abs(farthest) <= abs(noise)}


def said(verdict: dict) -> str:
    words = "no more than" if verdict["within_noise"] else "MORE than"
    return (
        f"{verdict['family']}: after {verdict['step']} steps fpdt is {abs(verdict['largest']):.4f} from sdpa "
        f"({verdict['sdpa']:.4f}) at most, {words} another seed ({abs(verdict['another_seed']):.4f})"
    )


def smooth(losses: list[float], width: int = 10) -> list[float]:
    """Means of `width` steps, so many fewer."""
    return [sum(losses[at : at + width]) / width for at in range(len(losses) - width + 1)]


def draw(rows: list[dict], path: Path) -> None:
    """The losses above, below what each differs from the first run of its family, both as means of ten steps."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if row.get("losses")]
    families = list(dict.fromkeys(row["family"] for row in rows))
    if not families:
        return
    figure = Figure(figsize=(6 * len(families), 6), layout="constrained")
    axes = figure.subplots(2, len(families), sharex=True, squeeze=False)
    for column, family in enumerate(families):
        own = [row for row in rows if row["family"] == family]
        first = smooth(own[0]["losses"])
        for row in own:
            found = smooth(row["losses"])
            axes[0, column].plot(found, label=row["run"], linewidth=1)
            axes[1, column].plot([a - b for a, b in zip(found, first, strict=False)], linewidth=1)  # some may have ended early
        axes[0, column].set(title=f"{family}, {own[0]['parameters'] / 1e6:.0f}M, {own[0]['seq_len']:,} tokens", ylabel="loss")
        axes[0, column].legend()
        axes[1, column].set(xlabel="step", ylabel=f"difference from {own[0]['run']}")
        axes[1, column].grid(alpha=0.3)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
