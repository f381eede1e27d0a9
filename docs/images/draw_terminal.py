"""
Draws what a terminal showed: terminal_cpu.png in docs/watching.md, from terminal_cpu.txt, the bytes that the terminal was sent.

    script -qec "python examples/finetune_long_context.py ..." terminal_cpu.txt
    python docs/images/draw_terminal.py

Carriage returns and the moves of the cursor that progress bars use are followed, as far as the last screen needs them.
"""

import re
from pathlib import Path

from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont

COLUMNS, SIZE, MARGIN = 112, 17, 14  # of the terminal; points; pixels
INK, PAPER = "#e6e6e6", "#1e1f26"
TOKEN = re.compile(r"\x1b\[(\d*)([A-Za-z])|([^\x1b])")


def main():
    here = Path(__file__).parent
    rows = screen((here / "terminal_cpu.txt").read_bytes().decode())
    picture(rows).quantize(16).save(here / "terminal_cpu.png", optimize=True)


def screen(sent: str) -> list[str]:
    """The rows that are there in the end."""
    rows, row, column = [[]], 0, 0
    for match in TOKEN.finditer(sent):
        count, move, character = match.groups()
        if character is None:
            row = max(row - int(count or 1), 0) if move == "A" else row
        elif character == "\r":
            column = 0
        else:
            if character == "\n" or column == COLUMNS:
                row, column = row + 1, 0 if character != "\n" else column
            rows += [[] for _ in range(row + 1 - len(rows))]
            if character != "\n":
                rows[row] += " " * (column + 1 - len(rows[row]))
                rows[row][column] = character
                column += 1
    text = "\n".join("".join(row).rstrip() for row in rows if row[:7] != list("Script "))  # which `script` adds
    return text.strip("\n").split("\n")


def picture(rows: list[str]) -> Image.Image:
    """The rows in one font, light on dark."""
    font = ImageFont.truetype(Path(get_data_path(), "fonts", "ttf", "DejaVuSansMono.ttf"), SIZE)
    width, height = font.getlength("M"), SIZE + 5
    image = Image.new("RGB", (round(COLUMNS * width) + 2 * MARGIN, len(rows) * height + 2 * MARGIN), PAPER)
    draw = ImageDraw.Draw(image)
    for number, row in enumerate(rows):
        draw.text((MARGIN, MARGIN + number * height), row, INK, font)
    return image


if __name__ == "__main__":
    main()
