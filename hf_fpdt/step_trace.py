"""The timeline of one optimizer step, as a Chrome trace (chrome://tracing, ui.perfetto.dev), and of a GPU as a picture."""

import logging
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from .timeline import draw, read_lanes, read_trace, span, summary

logger = logging.getLogger(__name__)

VARIABLE = "FPDT_TRACE"
STEP = 3  # the first compiles and locks memory, the second still meets a cold allocator


class StepTrace:
    """
    Args:
        path: the file to write; the picture, `picture`, is beside it.
        name: what errors call the setting.

    Raises:
        ValueError: for a path that cannot be that of a new file.
    """

    made = False  # any, in this process

    def __init__(self, path: str | PathLike, name: str):
        StepTrace.made = True
        self.path, self._what, self._profiler = Path(path), f"{name}={str(path)!r}", None
        if not self.path.name or self.path.suffix == ".png" or self.path.is_dir() or not self.path.absolute().parent.is_dir():
            raise ValueError(f"{self._what}: the path of a file in an existing folder is needed, such as trace.json.")
        self.picture = self.path.with_name(self.path.name.removesuffix(".gz")).with_suffix(".png")

    @classmethod
    def asked_for(cls, path: str | PathLike | None, environment: Mapping[str, str]) -> "StepTrace | None":
        """By the argument of `Watch`, or else by the environment."""
        if path is not None:
            return cls(path, "Watch(trace=...)")
        return cls(environment[VARIABLE], VARIABLE) if VARIABLE in environment else None

    def check(self, streams: bool, steps: int) -> None:
        """
        Raises:
            ValueError: if the model that is trained does not stream, or not for `STEP` steps.
        """
        if not streams:
            raise ValueError(
                f'{self._what}: the model that is trained does not stream. Use attn_implementation="fpdt", or unset it.'
            )
        if steps < STEP:
            raise ValueError(
                f"{self._what} is the timeline of optimizer step {STEP}, and this training has {steps}. Train for that many."
            )

    def begin(self, device: torch.device) -> None:
        """
        Raises:
            ValueError: if somebody else is profiling.
        """
        if torch.autograd.profiler._is_profiler_enabled:
            raise ValueError(f"{self._what}: another torch profiler is running, and there can be one. Turn one of them off.")
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        self._profiler = profile(activities=activities)
        self._profiler.start()

    def drop(self) -> None:
        """Stops without a file: the training broke off in that step."""
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None

    def end(self, device: torch.device) -> bool:
        """Writes the file, if a step was begun. The host waits for the GPU: the step is to be in it to its end."""
        if self._profiler is None:
            return False
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self._profiler.stop()
        self._profiler.export_chrome_trace(str(self.path))
        self._profiler = None
        if device.type == "cuda":
            self.draw()
        return True

    def draw(self) -> None:
        """Draws the file's timeline of a GPU, and logs how much of the copies ran under the compute."""
        try:
            lanes = read_lanes(read_trace(self.path))
            hidden = summary(lanes)["hidden"]["either"]
            copied = "nothing was copied" if hidden is None else f"{hidden:.1%} of the copies ran under the compute"
            logger.info("hf_fpdt: in step %d %s", STEP, copied)
            draw(lanes, {f"step {STEP}": span(lanes)}, self.picture)
        except (ImportError, ValueError) as error:  # the training is worth more than its picture
            logger.warning("hf_fpdt: the timeline in %s is without a picture (%s)", self.path, error)


def say_if_unused() -> None:
    """For the end of a process that has `FPDT_TRACE` in its environment."""
    if not StepTrace.made:
        logger.warning("hf_fpdt: %s is set and nothing was written: no Trainer was made. Loops have torch.profiler.", VARIABLE)
