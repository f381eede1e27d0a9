"""
GPU memory of one step by source: table 2 and figure 13 of the FPDT paper (arXiv 2408.16978).

    python -m benchmarks.paper.anatomy --contenders sdpa,liger,fpdt --seq-lens 65536 --layers 2 --out anatomy
    python -m benchmarks.paper.anatomy --gpus 2 --contenders ulysses+liger,fpdt+liger --seq-lens 65536 --layers 2 --out shared

writes `anatomy.json` and `anatomy.png`, a stacked timeline for each point, and prints who held how much at the peak of the
forward and of the backward. Method: the second step of a fresh process, with every allocation and release recorded by torch's
allocator and told apart by its stack and by marks (`memory_trace.py`). Recording takes time, and nothing waits for the GPU: the
seconds are the host's and no measurement of speed. The row has the allocator's own peak beside the replayed one; they agree
where the trace is whole. What a checkpointed layer keeps counts as residual and norms. With `--gpus` a sequence is shared by so
many (contenders of `shared_step.py`), and the memory is that of the first; what DeepSpeed gathers and reduces counts as engine.
"""

import argparse
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks.ahead import Outcome, run_ahead
from benchmarks.launched import launched
from benchmarks.paper.memory_trace import BEFORE, SOURCES
from benchmarks.point import Spec, command
from benchmarks.result_files import write_rows
from benchmarks.shared_point import SharedSpec
from benchmarks.shared_step import command as shared_command
from benchmarks.train_step import row_of

_POINT = "benchmarks.paper.anatomy_point"
OFFLOADED = '{"offload": "host", "recompute": true}'
_COLORS = {BEFORE: "0.8", **{name: f"C{index}" for index, name in enumerate(SOURCES)}}


def main():
    args = _arguments()
    specs = specs_of(args)
    rows: list[dict] = []
    for spec, outcome in zip(specs, _outcomes(specs), strict=True):
        rows.append(row_of(spec, outcome, None))
        print("\n".join([*table(rows[-1]), ""]), flush=True)
        write_rows("paper.anatomy", f"{args.out}.json", rows)
    draw(rows, f"{args.out}.png")


def _outcomes(specs: list[Spec | SharedSpec]) -> Iterator[Outcome]:
    if isinstance(specs[0], SharedSpec):
        return (launched(shared_command(spec, _POINT), None) for spec in specs)
    return run_ahead([command(spec, _POINT) for spec in specs], lambda: True)


def _arguments(words: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--contenders", default="sdpa,liger,fpdt", help="names in contenders.py, or with --gpus in shared_point.py"
    )
    parser.add_argument("--gpus", type=int, default=0, help="that share every sequence; 0: one GPU, without DeepSpeed")
    parser.add_argument("--seq-lens", default="65536", help="tokens, separated by commas")
    parser.add_argument("--shape", default="llama-3.1-8b", help="a name in benchmarks/shapes.py")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--fpdt", default=OFFLOADED, help="FPDTConfig fields as JSON, or a list of such: a point for each")
    parser.add_argument("--read", help="draw this result (JSON) again instead of running steps")
    parser.add_argument("--out", default="anatomy", help="path of the results, without ending")
    args = parser.parse_args(words)
    if args.read:
        content = json.loads(Path(args.read).read_text())
        draw(content["rows"], f"{args.out}.png")
        parser.exit()
    return args


def specs_of(args) -> list[Spec] | list[SharedSpec]:
    """The points of a command, in order."""
    settings = json.loads(args.fpdt)
    several = settings if isinstance(settings, list) else [settings]
    kind = partial(SharedSpec, gpus=args.gpus) if args.gpus else Spec
    return [
        kind(contender=contender, seq_len=int(seq_len), shape=args.shape, layers=args.layers, fpdt=fpdt)
        for seq_len in args.seq_lens.split(",")
        for contender in args.contenders.split(",")
        for fpdt in (several if contender.startswith("fpdt") else [{}])
    ]


def table(row: dict) -> list[str]:
    """In Markdown: GiB by source, at the peak of each phase, and each source's own top in it."""
    title = f"{_title(row)}: "
    if "at_peak_gib" not in row:
        return [title + ("out of memory" if row.get("out_of_memory") else f"failed: {row['error'].strip().splitlines()[-1]}")]
    peaks, tops = row["at_peak_gib"], row["tops_gib"]
    phases = list(peaks)
    title += f"peak {row['replayed_peak_gib']:.2f} GiB as replayed, {row['peak_gib']:.2f} GiB as the allocator counts"
    lines = [title, "", "| GiB |" + "".join(f" {phase}, at its peak | {phase}, own top |" for phase in phases)]
    lines.append("|---" * (1 + 2 * len(phases)) + "|")
    for name in peaks[phases[0]]:
        cells = "".join(f" {peaks[phase][name]:.2f} | {tops[phase][name]:.2f} |" for phase in phases)
        lines.append(f"| {name} |{cells}")
    sums = "".join(f" {sum(peaks[phase].values()):.2f} | |" for phase in phases)
    return [*lines, f"| all |{sums}"]


def draw(rows: list[dict], path: str):
    """A panel for each point that ran: GiB by source over time, a line where the backward begins. Returns the figure."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in rows if "timeline" in row]
    if not rows:
        return None
    figure, axes = pyplot.subplots(1, len(rows), figsize=(4.6 * len(rows), 4), layout="constrained", squeeze=False, sharey=True)
    names = [name for name in _COLORS if any(max(row["timeline"]["gib"].get(name, [0])) > 0.01 for row in rows)]
    for axis, row in zip(axes[0], rows, strict=True):
        line = row["timeline"]
        values = [line["gib"].get(name, [0] * len(line["seconds"])) for name in names]
        axis.stackplot(line["seconds"], *values, labels=names, colors=[_COLORS[name] for name in names], step="post")
        if line["backward_from"] < len(line["seconds"]):
            axis.axvline(line["seconds"][line["backward_from"]], color="black", linewidth=0.8, linestyle="--")
        axis.set_title(_title(row, "\n"), fontsize="medium")
        axis.set(xlabel="seconds (recorded; backward from the line on)")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("GPU memory (GiB)")
    handles, labels = axes[0][-1].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside right upper", frameon=False, fontsize="small")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return figure


def _title(row: dict, between: str = " ") -> str:
    settings = f"{between}{json.dumps(row['fpdt'])}" if row.get("fpdt") else ""
    return f"{row['contender']}, {row['seq_len']:,} tokens, {row['layers']} layers{settings}"


if __name__ == "__main__":
    main()
