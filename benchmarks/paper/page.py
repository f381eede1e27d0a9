"""
The tables of docs/results.md, from the result files: `python -m benchmarks.paper.page` writes them between their marks, and
draws the pictures. A test holds the page to the results.
"""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path

from benchmarks.paper import ablations, anatomy, convergence, efficiency, quality_figure, reach, shares
from benchmarks.result_files import read_calls

ROOT = Path(__file__).parents[2]
PAGE, RESULTS, IMAGES = ROOT / "docs" / "results.md", ROOT / "benchmarks" / "results", ROOT / "docs" / "images"
_DATE = "2026-11-27"


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    PAGE.write_text(filled(PAGE.read_text()))
    convergence.draw(convergence.in_order(_rows("convergence_llama_h100", "convergence_gpt_neox_h100")), _image("convergence"))
    efficiency.draw(_efficiency(), str(_image("efficiency")))
    anatomy.draw(_rows("anatomy_h100", "anatomy_2xh100"), str(_image("anatomy")))
    ablations.draw(ablations.lines_of(_calls("ablations_h100")), str(_image("ablations")))
    found = _quality()
    quality_figure.draw(found["rows"], found["runs"], found["sizes"]["short"], _image("quality"))


def filled(text: str) -> str:
    """The page with every table made anew."""
    for name, lines in TABLES.items():
        block = "\n".join([f"<!-- {name} -->", *lines(), f"<!-- end of {name} -->"])
        text, count = re.subn(rf"<!-- {name} -->.*?<!-- end of {name} -->", lambda _, b=block: b, text, flags=re.DOTALL)
        if count != 1:
            raise ValueError(
                f"docs/results.md has {count} places for {name}; one is needed, between <!-- {name} --> and its end."
            )
    return text


def _calls(*names: str, folder: str = "paper") -> list[dict]:
    return [call for name in names for call in read_calls(RESULTS / folder / f"{name}_{_DATE}.json")]


def _rows(*names: str) -> list[dict]:
    return [row for call in _calls(*names) for row in call["rows"]]


def _image(name: str) -> Path:
    return IMAGES / f"paper_{name}_h100.png"


def _quality() -> dict:
    return json.loads((RESULTS / "paper" / f"quality_h100_{_DATE}.json").read_text())


def _efficiency():
    return efficiency.series_of(_rows("efficiency_llama_h100", "efficiency_2xh100", "efficiency_gpt_h100"))


def _convergence() -> list[str]:
    rows = convergence.in_order(_rows("convergence_llama_h100", "convergence_gpt_neox_h100"))
    lines = ["| model | run | steps | loss, last 20 steps | held out | seconds |", "|---" * 6 + "|"]
    for row in rows:
        what = f"| {row['family']}, {row['parameters'] / 1e6:.0f}M | {row['run']} | {len(row['losses'])} |"
        lines.append(f"{what} {row['final']:.4f} | {row['held_out']:.4f} | {row['seconds']:.0f} |")
    return [*lines, "", *(f"* {convergence.said(one)}" for one in convergence.verdicts(rows))]


def _keys() -> list[str]:
    found = _quality()
    return [f"* {line}" for line in quality_figure.said(found["rows"], found["sizes"]["short"])]


def _anatomy() -> list[str]:
    return [line for row in _rows("anatomy_h100", "anatomy_2xh100") for line in (*anatomy.table(row), "")]


def _shares() -> list[str]:
    (call,) = _calls("shares_512k_h100")
    row = call["rows"][0] if "rows" in call else call["row"]
    return [line for line in shares.table(row) if " x " not in line]


def _scale_rows() -> list[dict]:
    names = [f"scale_{gpus}xh100" for gpus in (4, 2, 1)]
    rows = [row for call in _calls(*names, folder=".") for row in call["rows"] if "step_s" in row]
    return sorted(rows, key=lambda row: (row["shape"], -row["layers"], -row["gpus"], row["dp"], row["seq_len"]))


def _scale() -> list[str]:
    heads = ("shape", "layers", "tokens", "GPUs", "step", "tokens/s a GPU", "causal MFU", "GPU", "host a GPU", "all layers")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in _scale_rows():
        gpus = row["gpus"] if row["dp"] == 1 else f"{row['dp']} x {row['sp']}"
        start = f"| {row['shape']} | {row['layers']} of {row['depth']} | {row['seq_len']:,} | {gpus} |"
        memory = f"{row['peak_gib']:.1f} GiB | {row['host_gib']:.1f} GiB"
        speed = f"{row['step_s']:.2f} s | {row['tokens_per_s_per_gpu']:,.0f} | {row['causal_mfu']:.1%}"
        whole = row["whole_model"]
        lines.append(f"{start} {speed} | {memory} | {whole['step_s_by_operations']:.0f} s, {whole['host_gib']:.0f} GiB |")
    return lines


def _hidden() -> list[str]:
    kinds = ("all-to-all", "engine", "to host", "to device")
    lines = [f"| shape, GPUs | step | {' | '.join(f'{kind}, hidden' for kind in kinds)} |", "|---" * (2 + len(kinds)) + "|"]
    for row in _scale_rows():
        if "trace" in row:
            found = [f"{row['trace'][kind]['seconds']:.2f} s, {row['trace'][kind]['hidden']:.0%}" for kind in kinds]
            lines.append(f"| {row['shape']}, {row['gpus']} | {row['step_s']:.2f} s | {' | '.join(found)} |")
    return lines


TABLES: dict[str, Callable[[], list[str]]] = {
    "convergence": _convergence,
    "keys": _keys,
    "efficiency": lambda: efficiency.table(_efficiency()),
    "ablations": lambda: ablations.table(ablations.lines_of(_calls("ablations_h100"))),
    "anatomy": _anatomy,
    "shares": _shares,
    "reach": lambda: reach.table(_rows("reach_h100", "reach_2xh100")),
    "scale": _scale,
    "hidden": _hidden,
}


if __name__ == "__main__":
    main()
