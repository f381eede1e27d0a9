"""What `quality.py` found, in words and as a picture."""

import math
from pathlib import Path


def columns(table: list[list[float | None]]) -> list[float]:
    """The mean of each bucket of positions, over the blocks of text that were read there."""
    found = []
    for column in zip(*table, strict=True):
        values = [value for value in column if value is not None]
        found.append(sum(values) / len(values) if values else math.nan)
    return found


def difference(table: list[list[float | None]], first: int, second: int) -> tuple[float, float]:
    """What bucket `second` has more than `first`, over blocks of text that were read in both, and its standard error."""
    pairs = [(row[first], row[second]) for row in table if row[first] is not None and row[second] is not None]
    apart = [b - a for a, b in pairs]
    if len(apart) < 2:
        return math.nan, math.nan
    mean = sum(apart) / len(apart)
    spread = sum((one - mean) ** 2 for one in apart) / (len(apart) - 1)
    return mean, math.sqrt(spread / len(apart))


def said(rows: list[dict], short: int) -> list[str]:
    """A line for each model on loss by position, and one on keys within and beyond the length of the first training."""
    lines = []
    for row in rows:
        means, buckets = columns(row["losses"]), len(row["losses"][0])
        lowest = min(range(buckets), key=lambda bucket: means[bucket] if math.isfinite(means[bucket]) else math.inf)
        block = row["window"] // buckets
        words = f"{row['model']}: loss {means[0]:.3f} in the first {block:,} tokens, {means[-1]:.3f} in the last"
        words += f" of {row['window']:,}; lowest {means[lowest]:.3f} at {lowest * block:,} to {(lowest + 1) * block:,}"
        middle = buckets // 2 - 1
        apart, error = difference(row["losses"], middle, buckets - 1)
        words += (
            f"; last against tokens {middle * block:,} to {(middle + 1) * block:,}: {apart:+.4f} (standard error {error:.4f})"
        )
        for name, cells in (("up to", _cells(row, 0, short)), ("beyond", _cells(row, short + 1, math.inf))):
            found, asked = (sum(cell[key] for cell in cells) for key in ("found", "asked"))
            words += f"; keys {name} {short:,} tokens: {found} of {asked}"
        lines.append(words)
    return lines


def _cells(row: dict, least: float, most: float) -> list[dict]:
    return [cell for cell in row["keys"] if least <= cell["length"] <= most]


def draw(rows: list[dict], runs: dict, short: int, path: Path) -> None:
    """Loss by position of each model, and maps of the share of keys that the first and the last of them find."""
    from matplotlib.figure import Figure

    if not rows:
        return
    maps = rows if len(rows) == 1 else [rows[0], rows[-1]]
    figure = Figure(figsize=(5 + 4.2 * len(maps), 4), layout="constrained")
    axes = figure.subplots(1, 1 + len(maps), squeeze=False)[0]
    for row in rows:
        block = row["window"] / len(row["losses"][0])
        places = [(index + 0.5) * block / 1024 for index in range(len(row["losses"][0]))]
        axes[0].plot(places, columns(row["losses"]), marker=".", linewidth=1, label=label(row["model"], short))
    axes[0].axvline(short / 1024, color="0.6", linewidth=0.8, linestyle="--")
    size = next((run["parameters"] for run in runs.values()), 0)
    axes[0].set(xlabel="position (1,024 tokens)", ylabel="loss of held-out text", title=f"a small Llama of {size / 1e6:.0f}M")
    axes[0].grid(alpha=0.3)
    axes[0].legend()
    for axis, row in zip(axes[1:], maps, strict=True):
        _map(axis, row, short)
    figure.savefig(path, dpi=150)


def label(model: str, short: int) -> str:
    return f"trained at {short:,}" if model == "base" else f"continued to {int(model):,}"


def _map(axis, row: dict, short: int) -> None:
    lengths, depths = (sorted({cell[key] for cell in row["keys"]}) for key in ("length", "depth"))
    share = {(c["length"], c["depth"]): c["found"] / c["asked"] if c["asked"] else math.nan for c in row["keys"]}
    axis.imshow([[share[n, d] for n in lengths] for d in depths], vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
    for x, length in enumerate(lengths):
        for y, depth in enumerate(depths):
            if math.isfinite(share[length, depth]):
                axis.text(x, y, f"{share[length, depth]:.0%}", ha="center", va="center", fontsize="small")
    axis.set_xticks(range(len(lengths)), [f"{n // 1024}K" if n >= 1024 else str(n) for n in lengths])
    axis.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axis.set(xlabel="tokens of the document", ylabel="depth of the key", title=f"keys found, {label(row['model'], short)}")
