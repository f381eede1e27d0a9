"""
Design choices of FPDT switched off in turn, and what each costs.

    python -m benchmarks.paper.ablations --commands
    python -m benchmarks.paper.ablations results/ablation_*.json --out ablations.png

The first prints the commands (`train_step.py`) for `spread.py`, eight minutes on four GPUs. The second prints their results as
a table and draws the times as bars. Two layers of Llama-3.1-8B's shape at 131,072 tokens, everything on the host, K and V on
the GPU, attention saved, chunks of 16,384: in every call the first point of a length is what the others are compared with, on
the same GPU.

Settings of hf_fpdt are its own; what has none is patched for the time of a step (`without.py`). Not switched off is the order
of the backward, last chunk first: every other order runs the projections twice. The link: every copy is made several times
(`--copies`), which is one that is so much slower, with the same latency. What a copy reaches is in the result of `shares.py`.
"""

import argparse
import json
from dataclasses import dataclass

from benchmarks.paper.expected import job_of
from benchmarks.paper.spread import Job
from benchmarks.result_files import read_calls
from benchmarks.without import CHOICES, NOTHING

TOKENS, LAYERS = 131072, 2
BASE = {"chunk_size": 16384, "offload": "host", "recompute": True, "kv": "resident", "save_attention": True}
STREAMED = BASE | {"kv": "streamed"}
CHUNKS = (4096, 8192, 32768, 65536)
_KEPT = {"chunk_size": 16384, "offload": "none", "recompute": False}
_FUSED = {"fpdt": "Liger's fused norms, rotary embedding and activation", "fpdt+liger": "(Liger's on)"}
_LOSS_TOKENS = 32768  # a length whose logits fit


def commands() -> list[Job]:
    """What measures the table, each for one GPU."""
    sizes = [BASE | {"chunk_size": size} for size in (*CHUNKS, TOKENS)]
    streamed = [STREAMED | {"chunk_size": size} for size in (*CHUNKS[:2], 16384, *CHUNKS[2:])]
    kept = [BASE | {"save_attention": False}, BASE | {"offload": "none"}, _KEPT]
    kernels = [BASE | {"kernel": name} for name in ("cudnn", "torch_flash")]
    copies = ["overlap", "prefetch", "overlap+prefetch", "pinned", "arena"]
    sums = [name for name in CHOICES if name not in (*copies, "chunked-loss")]
    few = f"{NOTHING},overlap,prefetch"
    return [
        _job("chunks", [BASE, *sizes]),
        _job("streamed", [BASE, *streamed]),
        _job("kept", [BASE, *kept, *kernels]),
        _job("copies", [BASE], "--without", ",".join([NOTHING, *copies])),
        _job("memory", [BASE], "--without", ",".join([NOTHING, *sums])),
        _job("copies_streamed", [STREAMED], "--without", few),
        _job("link", [BASE], "--copies", "1,4,16"),
        _job("link_streamed", [STREAMED], "--copies", "1,2,8"),
        _job("loss", [BASE], "--without", f"{NOTHING},chunked-loss", seq_lens=f"{_LOSS_TOKENS},{TOKENS}"),
        _job("fused", [BASE], contenders="fpdt+liger,fpdt"),
    ]


def _job(name: str, fpdt: list[dict], *more: str, seq_lens: str = str(TOKENS), contenders: str = "fpdt+liger") -> Job:
    words = ["--contenders", contenders, "--seq-lens", seq_lens, "--layers", str(LAYERS), "--repeats", "2", *more]
    settings = json.dumps(fpdt, separators=(",", ":"))
    return job_of("train_step", [*words, "--fpdt", settings, "--time-limit", "480", "--out", f"ablation_{name}.json"])


@dataclass(frozen=True)
class Line:
    """A row beside the default of its call; `step_s` and what follows is None for one that is out of memory."""

    off: str
    where: str
    step_s: float | None
    ratio: float | None
    peak_gib: float | None
    host_gib: float | None
    copied_gib_s: float | None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="results of benchmarks/train_step.py")
    parser.add_argument("--commands", action="store_true", help="print the commands that make them, and their seconds")
    parser.add_argument("--out", default="ablations.png", help="path of the picture")
    args = parser.parse_args()
    if args.commands == bool(args.files):
        parser.error("either --commands or files with results are needed.")
    if args.commands:
        print("\n".join(map(str, commands())))
        return
    lines = lines_of([call for path in args.files for call in read_calls(path)])
    print("\n".join(table(lines)))
    draw(lines, args.out)


def lines_of(calls: list[dict]) -> list[Line]:
    """
    The rows of all calls against their defaults; rows that failed or did not run are left out.

    Raises:
        ValueError: for a call whose default has no time, for rows of others than hf_fpdt, for a row that is there twice, and
            without rows.
    """
    found: dict[tuple[str, str], Line] = {}
    for call in calls:
        defaults: dict[int, dict] = {}
        for row in call["rows"]:
            first = defaults.setdefault(row["seq_len"], row)
            if not row["contender"].startswith("fpdt"):
                raise ValueError(f"a row of {row['contender']}: hf_fpdt's choices are compared; give results of --commands.")
            if "step_s" not in first or "error" in first:
                raise ValueError(f"{call['header']['command']}: its default at {row['seq_len']:,} tokens has no time.")
            if "error" in row or "not_run" in row:
                continue
            line = _line(row, first)
            if (line.off, line.where) in found and row is not first:
                raise ValueError(f"{line.off} at {line.where} was measured twice; give files that have it once.")
            found.setdefault((line.off, line.where), line)
    if not found:
        raise ValueError("no row ran to its end or out of memory; see --commands for what makes them.")
    return list(found.values())


def _line(row: dict, first: dict) -> Line:
    where = f"{first['seq_len']:,} tokens, {first['layers']} layers"
    where += ", K and V streamed" if first["fpdt"].get("kv") == "streamed" else ""
    if row.get("out_of_memory"):
        return Line(what(row, first), where, None, None, None, None, None)
    step_s = row["step_s"]
    copied = row["moved_gib"] / step_s if "moved_gib" in row else None
    return Line(what(row, first), where, step_s, step_s / first["step_s"], row.get("peak_gib"), row.get("host_gib"), copied)


def what(row: dict, first: dict) -> str:
    """How a row differs from the default, in words."""
    there, default = row.get("fpdt") or {}, first.get("fpdt") or {}
    words = [f"{name} {_word(there[name])}" for name in there if there[name] != default.get(name)]
    words += [_FUSED.get(row["contender"], row["contender"])] if row["contender"] != first["contender"] else []
    words += [row["without"].replace("+", ", ")] if "without" in row else []
    words += [f"a link {row['copies']} times slower"] if "copies" in row else []
    return "; ".join(words) or "nothing: the default"


def _word(value) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value).lower()


def table(lines: list[Line]) -> list[str]:
    """In Markdown."""
    heads = ("what is switched off", "of", "step s", "against default", "peak GiB", "host GiB", "copied GiB/s")
    rows = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for line in lines:
        cells = "out of memory | | | |"
        if line.step_s is not None:
            cells = f"{line.step_s:.2f} | {line.ratio - 1:+.1%} | {_number(line.peak_gib)} | {_number(line.host_gib)} |"
            cells += f" {_number(line.copied_gib_s)}"
        rows.append(f"| {line.off} | {line.where} | {cells} |")
    return rows


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def draw(lines: list[Line], path: str):
    """Bars of time against the default, with the peak of GPU memory beside them; a panel for each kind. Returns the figure."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {where: [line for line in lines if line.where == where] for where in dict.fromkeys(line.where for line in lines)}
    heights = [len(several) for several in panels.values()]
    figure, axes = pyplot.subplots(
        len(panels), 1, figsize=(9, 0.9 * len(panels) + 0.26 * sum(heights)), layout="constrained", squeeze=False, sharex=True,
        height_ratios=[height + 1 for height in heights],
    )  # fmt: skip
    for axis, (where, several) in zip(axes[:, 0], panels.items(), strict=True):
        ratios = [100 * (line.ratio or 0) for line in several]
        places = [-index for index in range(len(several))]
        axis.barh(places, ratios, color=["0.6" if line.ratio == 1 else "C0" for line in several])
        for place, line, ratio in zip(places, several, ratios, strict=True):
            peak = "" if line.peak_gib is None else f"{line.peak_gib:.1f} GiB"
            axis.text(ratio + 1, place, peak if line.ratio else "out of memory", va="center", fontsize="x-small")
        axis.set_yticks(places, [line.off for line in several], fontsize="small")
        axis.axvline(100, color="black", linewidth=0.8)
        axis.set_title(where, loc="left", fontsize="medium")
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1][0].set_xlabel("time of a step, % of the default's (beside it: peak GPU memory)")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return figure


if __name__ == "__main__":
    main()
