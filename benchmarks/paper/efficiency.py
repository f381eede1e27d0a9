"""
MFU and memory against the sequence length, by shape and strategy: figure 11 of the FPDT paper (arXiv 2408.16978).

    python -m benchmarks.paper.efficiency --commands
    python -m benchmarks.paper.efficiency results/*.json --out efficiency.png

The first prints the commands that measure it (`train_step.py`, `shared_step.py`), for `spread.py`; with `--short` a selection
for nine minutes on four GPUs. The second draws their results and prints them as a table. Method: one or two layers run, and
the GPU memory of the other layers of the real depth is held (`--ballast-layers`, `--ballast-kept`; host memory is not). Time is
of the layers that ran, embedding and loss included; the step of the whole model takes at most `step * depth / layers`, which
counts embedding and loss `depth / layers` times. MFU is of the layers that ran, with their own operations and those of the
loss. Of several GPUs nothing is held for other layers.

Two ways to count operations stand side by side: causal attention and no recomputation (`shapes.step_flops`), and Megatron's,
which the paper's code has: the full square and a second forward (`shapes.paper_flops`). Only the first compares methods.
"""

import argparse
import json
from dataclasses import dataclass

from benchmarks.paper.expected import job_of
from benchmarks.paper.spread import Job
from benchmarks.result_files import read_calls
from benchmarks.shapes import DEPTHS, model_config, paper_flops, step_flops

CHUNKS = {"offload": "none", "recompute": True, "save_attention": True}
OFFLOADED = {"offload": "host", "recompute": True}
STREAMED = OFFLOADED | {"kv": "streamed"}
_PEERS = {"gpt-2.7b": "sdpa", "gpt-6.7b": "sdpa", "llama-3.1-8b": "sdpa,liger,alst"}
_LONGEST = ("gpt-2.7b", "llama-3.1-8b")  # gpt-6.7b has four times the K and V: its sums at 2M tokens exceed 128 GiB of host
_SHORT, _LONG = "32768,65536,131072,262144", "524288,1048576"
_LATEST_S = 420  # a point that starts by then ends before ten minutes are over
_SHARED = ("tensor", "fpdt", "ulysses+liger")


def commands(short: bool = False) -> list[Job]:
    """
    What measures the figure, for one H100 or H200 a command, or two where it says so. A point that does not fit is a row that
    is soon there.

    Args:
        short: a selection, for about nine minutes on four GPUs of a host (`spread.py`).
    """
    found = []
    for shape, peers in _PEERS.items():
        found += [
            _one_gpu(shape, peers, _SHORT, 2, 1, f"{shape}_peers.json"),
            _one_gpu(shape, "fpdt", _SHORT, 2, 1, f"{shape}_fpdt.json", CHUNKS, OFFLOADED),
        ]
        if not short:
            found += [
                _one_gpu(shape, peers, _LONG, 1, 1, f"{shape}_peers_long.json"),
                _one_gpu(shape, "fpdt", _LONG, 1, 1, f"{shape}_fpdt_long.json", CHUNKS, OFFLOADED),
            ]
            if shape in _LONGEST:
                found.append(_one_gpu(shape, "fpdt", "2097152", 1, 0, f"{shape}_longest.json", STREAMED))
    if short:
        saved = STREAMED | {"save_attention": True}
        found.append(_one_gpu("llama-3.1-8b", "fpdt", "1048576", 1, 1, "streamed_long.json", saved))
        return found + [_two_gpus(name, "65536,262144", 2, f"shared_{name}.json") for name in _SHARED]
    found += [_two_gpus(name, "65536,131072,262144", 4, f"shared_{name}.json") for name in _SHARED]
    return found + [_two_gpus(name, "524288", 2, f"shared_{name}_long.json") for name in _SHARED]


def _one_gpu(shape: str, contenders: str, seq_lens: str, layers: int, repeats: int, out: str, *fpdt: dict) -> Job:
    words = (
        f"--shape {shape} --contenders {contenders} --seq-lens {seq_lens} --layers {layers} --repeats {repeats} --time-limit"
    )
    words = [*words.split(), str(_LATEST_S), "--ballast-layers", str(DEPTHS[shape] - layers), "--ballast-kept", "--out", out]
    return job_of("train_step", [*words, *(["--fpdt", json.dumps(fpdt, separators=(",", ":"))] if fpdt else [])])


def _two_gpus(contender: str, seq_lens: str, layers: int, out: str) -> Job:
    words = f"--contenders {contender} --gpus 2 --seq-lens {seq_lens} --layers {layers} --repeats 1 --time-limit {_LATEST_S}"
    fpdt = ["--fpdt", json.dumps(OFFLOADED, separators=(",", ":"))] if contender == "fpdt" else []
    return job_of("shared_step", [*words.split(), "--out", out, *fpdt])


@dataclass(frozen=True)
class Point:
    """One measured step; without `mfu` it was out of memory."""

    seq_len: int
    layers: int
    depth: int
    mfu: float | None = None
    paper_mfu: float | None = None
    peak_gib: float | None = None
    step_s: float | None = None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="results of benchmarks/train_step.py and shared_step.py")
    parser.add_argument("--commands", action="store_true", help="print the commands that make them, and their seconds")
    parser.add_argument("--short", action="store_true", help="with --commands: a selection")
    parser.add_argument("--out", default="efficiency.png", help="path of the picture")
    args = parser.parse_args()
    if args.commands == bool(args.files) or (args.short and not args.commands):
        parser.error("either --commands, with or without --short, or files with results are needed.")
    if args.commands:
        print("\n".join(map(str, commands(args.short))))
        return
    series = series_of([row for path in args.files for call in read_calls(path) for row in call["rows"]])
    print("\n".join(table(series)))
    draw(series, args.out)


def series_of(rows: list[dict]) -> dict[str, dict[str, list[Point]]]:
    """
    Points in the order of lengths, by shape and strategy. Rows that failed or did not run are no points.

    Raises:
        ValueError: for rows that are no plain step of one sequence, for a GPU whose peak is unknown, for a point measured
            twice, and without points.
    """
    found: dict[str, dict[str, dict[int, Point]]] = {}
    for row in rows:
        if "error" in row or "not_run" in row:
            continue
        if odd := [name for name in ("documents", "window", "lora", "without", "copies") if row.get(name)]:
            raise ValueError(f"a row with {', '.join(odd)} in its settings: rows of plain steps are needed, see --commands.")
        points = found.setdefault(row["shape"], {}).setdefault(strategy(row), {})
        if row["seq_len"] in points:
            where = f"{row['shape']}, {strategy(row)}, {row['seq_len']:,} tokens"
            raise ValueError(f"{where} was measured twice; give files that have it once.")
        points[row["seq_len"]] = _point(row)
    if not found:
        raise ValueError("no row ran to its end or out of memory; see --commands for what makes them.")
    return {
        shape: {name: [points[n] for n in sorted(points)] for name, points in several.items()}
        for shape, several in found.items()
    }


def strategy(row: dict) -> str:
    """How the step was made, in the paper's words where it has some."""
    names = {"sdpa": "checkpointing", "liger": "checkpointing, Liger", "alst": "ALST", "tensor": "Megatron-SP"}
    names |= {"ulysses": "Ulysses, ALST", "ulysses+liger": "Ulysses, Liger"}
    name = names.get(row["contender"], row["contender"])
    if row["contender"].startswith("fpdt"):
        settings = dict(row.get("fpdt", {}))
        name = name.replace("fpdt", "FPDT") + {"none": ", chunks only", "host": ", offloaded"}.get(settings.get("offload"), "")
        rest = {key: value for key, value in settings.items() if key not in (*CHUNKS, "kv")}
        name += f" {json.dumps(rest)}" if rest else ""
    return name + (f" on {row['gpus']}" if "gpus" in row else "")


def _point(row: dict) -> Point:
    known = {"seq_len": row["seq_len"], "layers": row["layers"]}
    known["depth"] = known["layers"] + row.get("ballast_layers", 0)
    if row.get("out_of_memory"):
        return Point(**known)
    if not row.get("causal_mfu"):
        raise ValueError(
            f"a row of {row.get('gpu')!r} has no causal_mfu; add the GPU's peak to PEAK_BF16 in benchmarks/point.py."
        )
    config = model_config(row["shape"], row["layers"])
    more = paper_flops(config, row["seq_len"]) / step_flops(config, row["seq_len"])
    measured = {"mfu": row["causal_mfu"], "paper_mfu": row["causal_mfu"] * more}
    return Point(**known, **measured, peak_gib=row.get("peak_gib"), step_s=row["step_s"])


def table(series: dict[str, dict[str, list[Point]]]) -> list[str]:
    """In Markdown; the seconds of the whole model are the bound that the module states."""
    lines = [
        "| shape | strategy | tokens | layers run, held | causal MFU | as Megatron counts | peak GiB | step | whole model |"
    ]
    lines.append("|---" * 9 + "|")
    for shape, several in series.items():
        for name, points in several.items():
            for point in points:
                start = f"| {shape} | {name} | {point.seq_len:,} | {point.layers}, {point.depth - point.layers} |"
                lines.append(f"{start} {_cells(shape, point)} |")
    return lines


def _cells(shape: str, point: Point) -> str:
    if point.mfu is None:
        return "out of memory | | | |"
    peak = "" if point.peak_gib is None else f"{point.peak_gib:.1f}"
    whole = f"<= {point.step_s * DEPTHS[shape] / point.layers:,.0f} s" if shape in DEPTHS else ""
    return f"{point.mfu:.1%} | {point.paper_mfu:.1%} | {peak} | {point.step_s:.2f} s | {whole}"


def draw(series: dict[str, dict[str, list[Point]]], path: str):
    """Causal MFU above, GiB below, a column for each shape; a cross at the foot: out of memory. Returns the figure."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(series), figsize=(4.2 * len(series), 6), layout="constrained", squeeze=False)
    names = list(dict.fromkeys(name for several in series.values() for name in several))
    for column, (shape, several) in enumerate(series.items()):
        for name, points in several.items():
            color = f"C{names.index(name)}"
            ran = [point for point in points if point.mfu is not None]
            crosses = [point.seq_len for point in points if point.mfu is None]
            for axis, values in ((axes[0][column], "mfu"), (axes[1][column], "peak_gib")):
                seen = [(p.seq_len, getattr(p, values)) for p in ran if getattr(p, values) is not None]
                scale = 100 if values == "mfu" else 1
                axis.plot([x for x, _ in seen], [scale * y for _, y in seen], "o-", color=color, label=name)
                height = 0.03 + 0.05 * names.index(name)
                axis.plot(crosses, [height] * len(crosses), "x", color=color, transform=axis.get_xaxis_transform())
        lengths = sorted({point.seq_len for points in several.values() for point in points})
        for axis in axes[:, column]:
            axis.set_xscale("log", base=2)
            axis.set_xticks(lengths, [f"{n // 1024}K" if n % 2**20 else f"{n // 2**20}M" for n in lengths])
            axis.minorticks_off()
            axis.set_ylim(bottom=0)
            axis.spines[["top", "right"]].set_visible(False)
        axes[0][column].set_title(shape)
        axes[1][column].set_xlabel("tokens (x: out of memory)")
        axes[0][column].legend(frameon=False, fontsize="small")
    axes[0][0].set_ylabel("causal MFU (%)")
    axes[1][0].set_ylabel("peak GPU memory (GiB)")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return figure


if __name__ == "__main__":
    main()
