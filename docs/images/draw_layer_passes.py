"""
Draws layer_passes.png, the picture of one streamed layer in docs/architecture.md.

    python docs/images/draw_layer_passes.py

A schematic: widths in the timeline are not measurements. The same matplotlib gives the same bytes on every run.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, FancyBboxPatch, Patch, Polygon, Rectangle

CHUNKS = 4
COMPUTE, KEYS, GRADS, TO_HOST, TO_DEVICE = "#9ec5e8", "#a9d6a2", "#f2a9a2", "#f0a13c", "#b3a3e0"
HIDDEN, HOST, INK, FAINT = "#e8e8e8", "#fbf3dc", "#222222", "#8a8a8a"
ROW, CELL = 1.0, 0.62  # height of a row, side of an attention block


def main():
    plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 9.5, "text.color": INK})
    figure, axes = plt.subplots(figsize=(10.0, 9.3), dpi=180)
    axes.set_xlim(0, 14.6)
    axes.set_ylim(-6.55, 6.8)
    axes.axis("off")
    _host(axes, left=6.1)
    _forward(axes, left=0.55)
    _backward(axes, left=9.25)
    _timeline(axes)
    _legend(axes)
    path = Path(__file__).with_name("layer_passes.png")
    figure.savefig(path, bbox_inches="tight", pad_inches=0.08, metadata={"Software": None})
    plt.close(figure)


def _row(index: int) -> float:
    """Lower edge of the boxes of chunk `index`; chunk 0 is the top row."""
    return 4.9 - ROW * index


def _box(axes, x, y, width, height, color, text="", size=9.5, **style):
    axes.add_patch(Rectangle((x, y), width, height, facecolor=color, edgecolor=INK, linewidth=0.8, **style))
    axes.text(x + width / 2, y + height / 2 - 0.01, text, ha="center", va="center", fontsize=size)


def _arrow(axes, start, end, color=INK):
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": color, "lw": 1.3, "shrinkA": 0, "shrinkB": 0})


def _step(axes, x, y, number):
    axes.add_patch(Circle((x, y), 0.19, facecolor=INK, edgecolor=INK))
    axes.text(x, y - 0.015, str(number), ha="center", va="center", color="white", fontsize=8.5)


def _blocks(axes, left, index):
    """The attention blocks of one query chunk: full ones before the diagonal, a triangle on it, none after it."""
    y = _row(index)
    for column in range(CHUNKS):
        x = left + CELL * column
        if column > index:
            axes.add_patch(Rectangle((x, y), CELL, CELL, facecolor="none", edgecolor="#d0d0d0", linewidth=0.6, zorder=0))
            continue
        full = column < index
        axes.add_patch(Rectangle((x, y), CELL, CELL, facecolor=COMPUTE if full else "white", edgecolor=INK, linewidth=0.8))
        if not full:
            corners = [(x, y + CELL), (x, y), (x + CELL, y)]
            axes.add_patch(Polygon(corners, facecolor=COMPUTE, edgecolor=INK, linewidth=0.8))


def _host(axes, left):
    axes.add_patch(
        FancyBboxPatch((left, 0.5), 2.0, 5.0, boxstyle="round,pad=0.08", facecolor=HOST, edgecolor=FAINT, linewidth=0.9)
    )
    axes.text(left + 1.0, 5.72, "host memory", ha="center", fontsize=10.5, weight="bold")
    for index in range(CHUNKS):
        name = rf"$x_{index},\ out_{index},\ lse_{index}$"
        _box(axes, left + 0.08, _row(index) - 0.44, 1.84, 0.62, "white", name, 10)
    _box(axes, left + 0.08, 0.68, 1.84, 0.62, KEYS, r"$K,\ V$", 10)


def _forward(axes, left):
    grid, right = left + 1.15, left + 1.15 + CELL * CHUNKS
    axes.text(left + 2.45, 6.45, "forward: first chunk first", ha="center", fontsize=12, weight="bold")
    axes.text(grid + CELL * CHUNKS / 2, 5.76, "query chunk i x key chunks 0..i", ha="center", fontsize=9)
    for index in range(CHUNKS):
        y, middle = _row(index), _row(index) + CELL / 2
        _step(axes, left - 0.3, middle, index + 1)
        _box(axes, left, y, 0.75, CELL, HIDDEN, rf"$x_{index}$", 11)
        _arrow(axes, (left + 0.77, middle), (grid - 0.02, middle))
        _blocks(axes, grid, index)
        _arrow(axes, (right + 0.03, middle), (right + 0.4, middle))
        _box(axes, right + 0.4, y, 0.75, CELL, HIDDEN, rf"$y_{index}$", 11)
        lane = y - 0.13  # below the boxes: what leaves for the host
        diagonal = grid + CELL * (index + 0.5)
        for x in (left + 0.37, diagonal):
            axes.add_line(Line2D([x, x], [y, lane], color=TO_HOST, lw=1.6))
        axes.add_line(Line2D([left + 0.37, 5.9], [lane, lane], color=TO_HOST, lw=1.6))
        _arrow(axes, (5.8, lane), (6.18, lane), TO_HOST)
    for index in range(CHUNKS):
        _box(axes, grid + CELL * index, 0.68, CELL, CELL, KEYS, rf"$K_{index}V_{index}$", 9)
        axes.text(grid + CELL * (index + 0.5), 0.44, str(index + 1), ha="center", va="center", fontsize=8.5)
    axes.text(grid - 0.14, 0.99, "K/V store", ha="right", va="center", fontsize=9)
    axes.text(grid - 0.14, 0.44, "filled in step", ha="right", va="center", fontsize=8.5)
    _arrow(axes, (right + 0.05, 0.99), (6.18, 0.99), TO_HOST)
    axes.text(right + 0.75, 1.08, "at end", ha="center", fontsize=8)


def _backward(axes, left):
    grid, right = left + 1.15, left + 1.15 + CELL * CHUNKS
    axes.text(left + 2.1, 6.45, "backward: last chunk first", ha="center", fontsize=12, weight="bold")
    axes.text(grid + CELL * CHUNKS / 2, 5.76, "the layer again; attention uses the saved out, lse", ha="center", fontsize=9)
    for index in range(CHUNKS):
        y, middle = _row(index), _row(index) + CELL / 2
        _box(axes, left, y, 0.75, CELL, GRADS, rf"$\nabla y_{index}$", 10.5)
        _arrow(axes, (left + 0.77, middle), (grid - 0.02, middle))
        _blocks(axes, grid, index)
        _arrow(axes, (right + 0.03, middle), (right + 0.4, middle))
        _box(axes, right + 0.4, y, 0.75, CELL, GRADS, rf"$\nabla x_{index}$", 10.5)
        _step(axes, right + 1.42, middle, CHUNKS - index)
        lane = y - 0.13
        diagonal = grid + CELL * (index + 0.5)
        axes.add_line(Line2D([8.06, diagonal], [lane, lane], color=TO_DEVICE, lw=1.6))
        _arrow(axes, (diagonal, lane - 0.015), (diagonal, y + 0.04), TO_DEVICE)
    _box(axes, left, 0.68, 0.75, CELL, KEYS, r"$K,\ V$", 9.5)
    _arrow(axes, (8.06, 0.99), (left - 0.02, 0.99), TO_DEVICE)
    axes.text(8.7, 1.08, "at start", ha="center", fontsize=8)
    for index in range(CHUNKS):
        _box(axes, grid + CELL * index, 0.68, CELL, CELL, GRADS, rf"$\nabla K_{index}$" + "\n" + rf"$\nabla V_{index}$", 8.5)
        axes.text(grid + CELL * (index + 0.5), 0.44, str(CHUNKS - index), ha="center", va="center", fontsize=8.5)
    axes.text(right + 0.14, 0.99, "fp32 sums", ha="left", va="center", fontsize=9)
    axes.text(right + 0.14, 0.44, "complete in step", ha="left", va="center", fontsize=8.5)


def _timeline(axes):
    axes.add_line(Line2D([0, 14.6], [0.02, 0.02], color="#c8c8c8", lw=0.8))
    forward = [("compute", -1.15), ("to host", -1.77), ("to device", -2.39)]
    backward = [("compute", -3.95), ("to host", -4.57), ("to device", -5.19)]
    for title, lanes in (("forward of layer L", forward), ("backward of layer L", backward)):
        axes.text(0.0, lanes[0][1] + 0.72, title, fontsize=10.5, weight="bold", va="center")
        for name, y in lanes:
            axes.text(1.42, y + 0.24, name, ha="right", va="center", fontsize=9.5)
            axes.add_patch(Rectangle((1.55, y), 13.05, 0.48, facecolor="#f7f7f7", edgecolor="none"))
    widths = [1.9 + 0.45 * index for index in range(CHUNKS)]
    _forward_timeline(axes, forward, widths)
    _backward_timeline(axes, backward, widths)


def _forward_timeline(axes, lanes, widths):
    (_, compute), (_, to_host), _ = lanes
    x = 1.55
    for index, width in enumerate(widths):
        _box(axes, x, compute, width, 0.48, COMPUTE, f"chunk {index}", 9)
        _box(axes, x + 0.06, to_host, 0.6, 0.48, TO_HOST, rf"$x_{index}$", 10)
        attended = x + 0.5 + 0.45 * index
        start = max(attended, x + 0.72)
        _box(axes, start, to_host, 1.14, 0.48, TO_HOST, rf"$out_{index},lse_{index}$", 8)
        x += width
    _box(axes, x, compute, 14.6 - x, 0.48, "#dcebf7", "layer L+1, chunk 0", 9)
    _box(axes, x + 0.06, to_host, 0.8, 0.48, TO_HOST, r"$K,V$", 9)


def _backward_timeline(axes, lanes, widths):
    (_, compute), _, (_, to_device) = lanes
    before, x = 2.1, 1.55
    _box(axes, x, compute, before, 0.48, "#dcebf7", "L+1, chunk 0", 9)
    _box(axes, x + 0.06, to_device, before - 0.12, 0.48, TO_DEVICE, r"$K,V;\ x_3,out_3,lse_3$", 8)
    x += before
    for index in reversed(range(CHUNKS)):
        width = widths[index] * (14.6 - 3.65 - 1.3) / sum(widths)
        _box(axes, x, compute, width, 0.48, COMPUTE, f"chunk {index}", 9)
        if index:
            name, length, color = rf"$x_{index - 1},out_{index - 1},lse_{index - 1}$", 1.5, TO_DEVICE
        else:
            name, length, color = "for layer L-1", width - 0.12, "#cfc6e6"
        _box(axes, x + 0.06, to_device, length, 0.48, color, name, 8)
        x += width
    _box(axes, x, compute, 14.6 - x, 0.48, "#dcebf7", "layer L-1", 9)


def _legend(axes):
    entries = [
        (COMPUTE, "attention, compute"),
        (HIDDEN, "hidden states"),
        (KEYS, "keys and values"),
        (GRADS, "gradients"),
        (TO_HOST, "copy to host (D2H stream)"),
        (TO_DEVICE, "copy to device (H2D stream)"),
    ]
    handles = [Patch(facecolor=color, edgecolor=INK, linewidth=0.6, label=label) for color, label in entries]
    axes.legend(handles=handles, loc="lower center", ncol=3, frameon=False, fontsize=9.5, bbox_to_anchor=(0.5, -0.015))


if __name__ == "__main__":
    main()
