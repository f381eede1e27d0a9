"""
Time and memory against the chunk size, as a picture of a result of `train_step.py`:

    python -m benchmarks.train_step --contenders fpdt+liger --seq-lens 131072 --out chunks.json --fpdt \\
        '[{"chunk_size": 16384, "kv": "resident"}, {"chunk_size": 16384, "kv": "streamed"}, {"chunk_size": 32768, ...}]'
    python -m benchmarks.chunk_sizes chunks.json --out chunks.png

Rows count if their settings name a `chunk_size`; there is a line for each value of `kv`.
"""

import argparse

from .result_files import read_rows

_LABELS = {"resident": "K and V on the GPU", "streamed": "K and V streamed", "auto": "K and V as planned"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="results of benchmarks/train_step.py")
    parser.add_argument("--seq-len", type=int, help="which rows, if they are of several lengths")
    parser.add_argument("--contender", help="which rows, if they are of several contenders")
    parser.add_argument("--out", default="chunk_sizes.png", help="path of the picture")
    args = parser.parse_args()
    draw(*lines(read_rows(args.files), seq_len=args.seq_len, contender=args.contender), args.out)


def lines(rows: list[dict], **wanted) -> tuple[dict[str, list[tuple[int, float, float]]], str]:
    """
    `(chunk size, seconds, peak GiB)` in the order of chunk sizes for each value of `kv`, and what was measured, in words.

    Raises:
        ValueError: without such rows, for rows that differ in more than these two settings, and for a point measured twice.
    """
    rows = [row for row in rows if "chunk_size" in row.get("fpdt", {})]
    rows = [row for row in rows if all(value is None or row[name] == value for name, value in wanted.items())]
    if not rows:
        raise ValueError(f"no row of an fpdt contender with a chunk_size in its settings matches {wanted}.")
    for name in ("contender", "seq_len", "shape", "layers", "gpu"):
        if len(values := {row[name] for row in rows}) > 1:
            raise ValueError(f"the rows differ in {name} ({', '.join(map(str, sorted(values)))}); one is needed, see --help.")
    found: dict[str, dict[int, tuple]] = {}
    for row in rows:
        kv, size = row["fpdt"].get("kv", "auto"), row["fpdt"]["chunk_size"]
        points = found.setdefault(kv, {})
        if size in points:
            raise ValueError(f"chunk_size {size} with kv {kv!r} was measured twice; give files that have it once.")
        points[size] = (size, row["step_s"], row["peak_gib"])
    row = rows[0]
    title = f"{row['shape']} shapes, {row['layers']} layers, {row['seq_len']:,} tokens, {row['contender']}, {row['gpu']}"
    return {kv: [points[size] for size in sorted(points)] for kv, points in sorted(found.items())}, title


def draw(series: dict[str, list[tuple[int, float, float]]], title: str, path: str):
    """Two panels, seconds and GiB, over the chunk size on a logarithmic axis. Returns the figure."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    sizes = sorted({size for points in series.values() for size, *_ in points})
    for axis, column, label in zip(axes, (1, 2), ("seconds per step", "peak GPU memory (GiB)"), strict=True):
        for kv, points in series.items():
            axis.plot([point[0] for point in points], [point[column] for point in points], "o-", label=_LABELS[kv])
        axis.set_xscale("log", base=2)
        axis.set_xticks(sizes, [f"{size // 1024}K" if size % 1024 == 0 else str(size) for size in sizes])
        axis.minorticks_off()
        axis.set(xlabel="chunk size (tokens)", ylabel=label)
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.suptitle(title, fontsize="medium")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return figure


if __name__ == "__main__":
    main()
