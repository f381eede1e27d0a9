"""
What a machine does in a second, as `hf-fpdt bench` measured it (`bench.py`), and where that is kept.

`load` finds the rates of this machine's GPU in the user's cache, or those that come with the package for some GPUs
(`rates/*.json`, each with the command and versions that measured it).
"""

import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

_SHIPPED = Path(__file__).parent / "rates"


@dataclass(frozen=True)
class AttentionRates:
    """
    Floating-point operations a second of attention as `flops.py` counts them, in the forward (a third of them) and in the
    backward (two thirds), over earlier keys, all of which a query sees, and over the diagonal block, of which it sees half.
    """

    forward: float
    backward: float
    forward_diagonal: float
    backward_diagonal: float


@dataclass(frozen=True)
class Rates:
    """
    Args:
        gpu: its name, as `torch.cuda.get_device_name()` has it.
        gpu_bytes: of its memory.
        matmul: floating-point operations a second of a large matrix product in bfloat16.
        memory: bytes a second that an elementwise operation reads and writes on the GPU.
        launch: seconds of an operation that has nothing to do.
        to_host, to_device: bytes a second from and to page-locked memory.
        attention: by head size.
        made: versions, kernel and date of the measurement.
        link: bytes a second that leave a GPU in an all-to-all of the host's GPUs; None: not measured, as with one GPU.
    """

    gpu: str
    gpu_bytes: int
    matmul: float
    memory: float
    launch: float
    to_host: float
    to_device: float
    attention: dict[int, AttentionRates]
    made: dict[str, Any]
    link: float | None = None

    def attention_of(self, head_dim: int) -> AttentionRates:
        """Those of the next larger head size that was measured, in the time that a kernel takes for it; else of the largest."""
        sizes = sorted(self.attention)
        size = next((size for size in sizes if size >= head_dim), sizes[-1])
        share = min(head_dim / size, 1.0)
        return AttentionRates(**{name: share * rate for name, rate in vars(self.attention[size]).items()})

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        os.replace(part, path)


def cached_path(gpu: str) -> Path:
    """Where the rates of a GPU of this name are kept for this user."""
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "hf_fpdt" / _file_name(gpu)


def load(name: str) -> Rates:
    """
    Args:
        name: a file that `hf-fpdt bench --out` wrote, or a GPU: this machine's after `hf-fpdt bench`, or one of those that come
            with the package. A part of its name is enough: `"h200"`.

    Raises:
        ValueError: if there is none.
    """
    if Path(name).suffix == ".json":
        return _read(Path(name))
    found = _find(name)
    if found is None:
        raise ValueError(
            f"no rates of a GPU called {name!r}: there are {', '.join(shipped())}. Measure them on a machine that has one with "
            "`hf-fpdt bench --out rates.json`, and name that file."
        )
    return found


def of_this_machine() -> Rates | None:
    """Those of the GPU of this process, if it has one whose rates are known."""
    return _find(torch.cuda.get_device_name()) if torch.cuda.is_available() else None


def as_lines(rates: Rates) -> list[str]:
    """A table for people."""
    rows = [
        ("matrix product, bfloat16", f"{rates.matmul / 1e12:.0f} TFLOP/s"),
        ("elementwise operation", f"{rates.memory / 1e12:.2f} TB/s"),
        ("an operation at least", f"{rates.launch * 1e6:.1f} us"),
        ("copies to the host, to the GPU", f"{rates.to_host / 1e9:.1f}, {rates.to_device / 1e9:.1f} GB/s"),
    ]
    if rates.link is not None:
        rows.append(("all-to-all, out of a GPU", f"{rates.link / 1e9:.0f} GB/s"))
    for size, one in rates.attention.items():
        speeds = (one.forward, one.backward, one.forward_diagonal, one.backward_diagonal)
        text = ", ".join(f"{speed / 1e12:.0f}" for speed in speeds)
        rows.append((f"attention, head size {size}", f"{text} TFLOP/s (forward, backward; the same on the diagonal)"))
    return [rates.gpu, *(f"  {what:<34}{value}" for what, value in rows)]


def shipped() -> list[str]:
    """Names of the GPUs whose rates come with the package."""
    return [json.loads(path.read_text(encoding="utf-8"))["gpu"] for path in sorted(_SHIPPED.glob("*.json"))]


def _find(gpu: str) -> Rates | None:
    paths = [cached_path(gpu), *sorted(cached_path(gpu).parent.glob("*.json")), *sorted(_SHIPPED.glob("*.json"))]
    wanted = _file_name(gpu).removesuffix(".json")
    return next((_read(path) for path in paths if wanted in path.stem and path.is_file()), None)


def _file_name(gpu: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", gpu.lower()).strip("_") + ".json"


def _read(path: Path) -> Rates:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        attention = {int(size): AttentionRates(**one) for size, one in content["attention"].items()}
        return Rates(**content | {"attention": attention})
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path.name} has no rates: write it with `hf-fpdt bench --out {path.name}` ({error!r}).") from error
