"""Result files: what is at their head, reading them, and their rows as text."""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def header(module: str, out: str, gpu: str) -> dict:
    """How this process made the results that it writes to `out`: command, commit, versions, date, and the GPU's name."""
    words = [word.replace(out, os.path.basename(out)) for word in sys.argv[1:]]
    words = [os.path.basename(word) if os.path.isabs(word) else word for word in words]
    found = {"command": shlex.join(["python", "-m", f"benchmarks.{module}", *words]), "commit": _commit()}
    found |= {name: _version(name) for name in ("torch", "transformers", "flash-attn-4", "liger-kernel", "deepspeed", "peft")}
    return found | {"date": time.strftime("%Y-%m-%d"), "gpu": gpu}


def write_rows(module: str, path: str, rows: list[dict]) -> None:
    """What one call found so far; whole at any moment."""
    gpu = next((row["gpu"] for row in rows if "gpu" in row), "unknown")
    with open(path + ".part", "w") as file:
        json.dump({"header": header(module, path, gpu), "rows": rows}, file, indent=1)
    os.replace(path + ".part", path)


def _commit() -> str:
    words = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        described = subprocess.run(words, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        described = ""
    return os.environ.get("COMMIT") or described or "unknown"  # COMMIT is for a copy of the tree without its history


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def read_calls(path: str | Path) -> list[dict]:
    """The calls in a file, each `{"header": ..., "rows": [...]}`: what one call wrote, or a list of such."""
    content = json.loads(Path(path).read_text())
    return content if isinstance(content, list) else [content]


def read_rows(paths: Iterable[str | Path]) -> list[dict]:
    """Rows of `train_step.py` from all files, of points that ran to their end."""
    rows = [row for path in paths for call in read_calls(path) for row in call["rows"]]
    return [row for row in rows if "step_s" in row and "error" not in row]


def table(rows: list[dict]) -> list[str]:
    """A line for each row."""
    return [f"{_who(row):>12} {row['seq_len']:>9,} tokens, {row['layers']:>2} layers: {_found(row)}" for row in rows]


def _who(row: dict) -> str:
    return row["contender"] + (f" on {row['gpus']}" if "gpus" in row else "")


def _found(row: dict) -> str:
    if "error" in row:
        return f"failed: {row['error'].strip().splitlines()[-1]}"
    if row.get("out_of_memory"):
        return f"out of memory {_settings(row)}".rstrip()
    if "not_run" in row:
        return f"not run: {row['not_run']}"
    words = [f"{row['step_s']:.2f} s (first {row['first_step_s']:.1f})"]
    if "peak_gib" in row:
        above = f" ({row['peak_above_gib']:.1f} above weights and gradients)" if "peak_above_gib" in row else ""
        words.append(f"peak {row['peak_gib']:.1f} GiB{above}")
    words.append(f"host {row['host_gib']:.1f} GiB")
    if "predicted_peak_gib" in row:
        words.append(f"predicted {row['predicted_peak_gib']:.1f} GiB")
    words.append(f"{row['model_tflops']:.0f} TFLOP/s" if "causal_mfu" not in row else f"causal MFU {row['causal_mfu']:.1%}")
    return ", ".join(words) + f" {_settings(row)}".rstrip()


def _settings(row: dict) -> str:
    """How the row differs from a plain one of its contender."""
    words = [row.get("kernel", ""), "" if row.get("optimizer", "none") == "none" else row["optimizer"]]
    words += [f"LoRA {row['lora']}" if row.get("lora") else "", json.dumps(row["fpdt"]) if row.get("fpdt") else ""]
    words += [json.dumps(row["zero"]) if row.get("zero") else ""]
    words += [f"{row['documents']} documents" if "documents" in row else ""]
    words += [f"window {row['window']}" if "window" in row else ""]
    words += [f"without {row['without']}" if "without" in row else ""]
    words += [f"every copy {row['copies']} times" if "copies" in row else ""]
    words += [f"ballast of {row['ballast']['layers']} layers" if "ballast" in row else ""]
    return " ".join(filter(None, words))
