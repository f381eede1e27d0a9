"""What a training run of the examples recorded, and what is made of it: a table, losses.json and a plot of two runs."""

import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

_FEWEST_LOSSES = 8  # from here on a quarter of them is more than one, and warmup is over


class Run(TrainerCallback):
    """What one training run recorded: the logged losses, and the seconds of every optimizer step."""

    def __init__(self, name: str):
        self.name = name
        self.steps: list[int] = []
        self.losses: list[float] = []
        self.eval_loss: float | None = None
        self.seconds: list[float] = []
        self.peak_gpu_gib: float | None = None
        self.error: str | None = None

    def on_step_begin(self, args, state, control, **kwargs):
        self._started = _now()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(_now() - self._started)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.steps.append(state.global_step)
            self.losses.append(logs["loss"])
        self.eval_loss = logs.get("eval_loss", self.eval_loss)

    @property
    def seconds_per_step(self) -> float | None:
        """Median, so that neither the first step, which chooses kernels, nor a saved checkpoint counts."""
        return statistics.median(self.seconds) if self.seconds else None

    def as_dict(self) -> dict[str, Any]:
        names = ("steps", "losses", "eval_loss", "seconds_per_step", "peak_gpu_gib", "error")
        return {name: getattr(self, name) for name in names}


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def report(runs: list[Run], seq_len: int, directory: Path) -> None:
    """Writes losses.json, prints the closing table, and plots two runs."""
    directory.mkdir(parents=True, exist_ok=True)
    differences = loss_differences(*runs) if len(runs) == 2 else {}
    largest = max(differences.values(), default=None)
    result = {"seq_len": seq_len, "runs": {run.name: run.as_dict() for run in runs}, "largest_difference": largest}
    (directory / "losses.json").write_text(json.dumps(result, indent=2) + "\n")
    print_table(runs, largest)
    if len(runs) == 2:
        plot(runs, differences, seq_len, directory / "loss.png")
        print(f"plot: {directory / 'loss.png'}")


def loss_differences(run: Run, other: Run) -> dict[int, float]:
    """Absolute difference of the losses by step, for the steps that both runs reached."""
    losses = dict(zip(other.steps, other.losses, strict=True))
    return {step: abs(loss - losses[step]) for step, loss in zip(run.steps, run.losses, strict=True) if step in losses}


def print_table(runs: list[Run], largest: float | None) -> None:
    rows = {
        "first loss": [_format(run.losses[:1], ".4f") for run in runs],
        "last loss": [_format(run.losses[-1:], ".4f") for run in runs],
        "evaluation loss": [_format([run.eval_loss], ".4f") for run in runs],
        "seconds per step": [_format([run.seconds_per_step], ".2f") for run in runs],
        "peak GPU memory (GiB)": [_format([run.peak_gpu_gib], ".2f") for run in runs],
        "stopped by": [run.error or "-" for run in runs],
    }
    print("\n" + f"{'':<24}" + "".join(f"{run.name:>20}" for run in runs))
    for label, values in rows.items():
        if any(value != "-" for value in values):
            print(f"{label:<24}" + "".join(f"{value:>20}" for value in values))
    if largest is not None:
        print(f"{'largest difference':<24}{largest:>20.1e}")


def _format(values: list[float | None], spec: str) -> str:
    return format(values[0], spec) if values and values[0] is not None else "-"


def plot(runs: list[Run], differences: dict[int, float], seq_len: int, path: Path) -> None:
    """Both loss curves and, below, their absolute difference."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (top, bottom) = pyplot.subplots(2, 1, sharex=True, figsize=(8, 6), height_ratios=(3, 2), layout="constrained")
    for run, style in zip(runs, ("-", "--"), strict=True):
        label = f"{run.name} ({run.error})" if run.error else run.name
        top.plot(run.steps, run.losses, style, marker="." if len(run.steps) < 50 else None, label=label)
    top.set(ylabel="training loss", title=f"Finetuning on sequences of {seq_len:,} tokens")
    bottom.set(xlabel="optimizer step", ylabel="absolute difference")
    bottom.xaxis.get_major_locator().set_params(integer=True)
    if differences:
        bottom.plot(list(differences), list(differences.values()), color="tab:red", marker=".", linewidth=1)
        bottom.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        bottom.set_ylim(bottom=0)
    else:
        bottom.set_yticks([])
        bottom.text(0.5, 0.5, "no step that both runs reached", transform=bottom.transAxes, ha="center")
    top.legend()
    for axis in (top, bottom):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def check_learned(run: Run) -> None:
    """
    Ends the program with an error if a loss is not finite, or if the last quarter is not below the first. Fewer than
    `_FEWEST_LOSSES` say nothing about learning: the losses of two batches differ by more than a step changes them.
    """
    if not all(math.isfinite(loss) for loss in run.losses):
        step = next(step for step, loss in zip(run.steps, run.losses, strict=True) if not math.isfinite(loss))
        sys.exit(f"The loss of {run.name} is not finite at step {step}. Lower --learning_rate.")
    if len(run.losses) >= _FEWEST_LOSSES:
        quarter = len(run.losses) // 4
        first, last = statistics.mean(run.losses[:quarter]), statistics.mean(run.losses[-quarter:])
        if last >= first:
            sys.exit(f"The loss of {run.name} did not fall: {first:.4f} at the start, {last:.4f} at the end.")
