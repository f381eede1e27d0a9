"""
How much memory a token costs: the slope of peak GPU memory over the sequence length, by contender, and its ratio to the peers'.

    python -m benchmarks.growth benchmarks/results/train_step_h200_2026-11-23.json

A straight line is fitted by least squares to (peak - weights and gradients) of the rows that differ in `seq_len` only. At least
two lengths are needed. hf_fpdt spends memory that is there (`offload="auto"`), so its slope means something only if its
settings keep it from that, for example `{"offload": "host", "recompute": true}`.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass

from .result_files import read_rows


@dataclass(frozen=True)
class Growth:
    """A fitted line, see the module; `error_gib` is its largest distance from a point."""

    contender: str
    settings: str
    group: tuple
    lengths: tuple[int, ...]
    kib_per_token: float
    fixed_gib: float
    error_gib: float


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="results of benchmarks/train_step.py")
    print("\n".join(report(growths(read_rows(parser.parse_args().files)))))


def growths(rows: list[dict]) -> list[Growth]:
    """One line for each contender, settings, and kind of step; of several rows of one length all count."""
    series: dict[tuple, list[dict]] = {}
    for row in rows:
        kind = (row["shape"], row["layers"], row.get("optimizer", "none"), row.get("lora", 0))
        kind += (str(row.get("ballast")), row.get("gpu"))
        series.setdefault((kind, row["contender"], json.dumps(row.get("fpdt") or {})), []).append(row)
    found = []
    for (kind, contender, settings), same in series.items():
        lengths = [row["seq_len"] for row in same]
        if len(set(lengths)) > 1:
            above = [row["peak_gib"] - row["weights_and_grads_gib"] for row in same]
            slope, fixed = fit(lengths, above)
            error = max(abs(fixed + slope * x - y) for x, y in zip(lengths, above, strict=True))
            points = tuple(sorted(set(lengths)))
            found.append(Growth(contender, settings, kind, points, slope * 2**20, fixed, error))
    return found


def fit(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Slope and value at 0 of the straight line with the least squares."""
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)
    return slope, mean_y - slope * mean_x


def report(found: list[Growth]) -> list[str]:
    """A line for each growth; for those of hf_fpdt the ratio to each peer of the same kind."""
    if not found:
        return ["no contender was measured at two lengths"]
    lines = []
    for one in found:
        shape, layers, optimizer, lora, *_ = one.group
        kind = f"{shape}, {layers} layers"
        kind += ("" if optimizer == "none" else f", {optimizer}") + (f", LoRA {lora}" if lora else "")
        name = one.contender + ("" if one.settings == "{}" else f" {one.settings}")
        lines.append(
            f"{kind}: {name}: {one.kib_per_token:.2f} KiB a token + {one.fixed_gib:.2f} GiB, from {len(one.lengths)} lengths "
            f"({one.lengths[0]:,} to {one.lengths[-1]:,} tokens), at most {one.error_gib:.3f} GiB off the line"
        )
        if one.contender.startswith("fpdt"):
            peers = [peer for peer in found if peer.group == one.group and not peer.contender.startswith("fpdt")]
            lines += [f"    {ratio(one, peer):.3f} of {peer.contender}'s {peer.kib_per_token:.2f} KiB" for peer in peers]
    return lines


def ratio(one: Growth, peer: Growth) -> float:
    """Bytes of an added token against the peer's."""
    return one.kib_per_token / peer.kib_per_token


if __name__ == "__main__":
    main()
