"""
What a streamed model does, in Trainer's logs: `Watch` adds a few numbers to every entry that has the training loss.

Nothing is asked of the GPU that makes the host wait. Trainer reads the loss just before it logs, so the GPU is idle then, and
the host's clock says how long the work took. Of one step between two entries the copies and the waits for them are timed, by
events that the GPU has met by then. Evaluations and checkpoints are no training: each is taken out, from an event that
the GPU meets behind the last training step to one that it meets after them, because the host may be there long before the GPU.
"""

import logging
import math
import os
import time

import torch
from transformers import TrainerCallback

from .copy_meter import CopyMeter
from .flops import peak_flops, training_flops
from .step_trace import STEP, StepTrace
from .transfers import transfers_for
from .work import Work, works_in

logger = logging.getLogger(__name__)

TOKENS_PER_S, CAUSAL_MFU = "fpdt/tokens_per_s_per_gpu", "fpdt/causal_mfu"
GPU_PEAK_GIB, HOST_GIB, TRANSFER_GIB_PER_S = "fpdt/gpu_peak_gib", "fpdt/host_gib", "fpdt/transfer_gib_per_s"
COPIES_HIDDEN = "fpdt/copies_hidden"


class Watch(TrainerCallback):
    """
    Adds `fpdt/...` to Trainer's logs while a model with `attn_implementation="fpdt"` trains; docs/watching.md has what each is.
    Trainer adds it by itself; `trainer.remove_callback(Watch)` takes it out.

    Args:
        trace (`str` or `os.PathLike`, *optional*):
            Where to write the timeline of the third optimizer step, on the first process; `FPDT_TRACE` if not given.

    Raises:
        ValueError: for a path in no folder; in training, for a model that does not stream, and fewer steps.
    """

    def __init__(self, trace: str | os.PathLike | None = None):
        self._trace = StepTrace.asked_for(trace, os.environ)
        self._interval: Interval | None = None
        self._forget()

    def _forget(self) -> None:
        self._works: list | None = None  # None: not looked for yet
        if self._interval is not None:
            self._interval.end_sample()
        self._interval = None
        self._before: list[Work] = []
        self._named, self._steps = False, 0

    def on_train_begin(self, args, state, control, **kwargs):
        self._forget()  # an earlier training may have broken off
        if self._trace is not None:
            self._trace.drop()

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if self._works is None:
            self._works = works_in(model) if model is not None else []
            if self._trace is not None:
                self._trace.check(bool(self._works), state.max_steps - state.global_step)
            if self._works:
                self._start(args.device)
        self._steps += 1
        if self._interval is not None and self._steps > 1:  # the first compiles and locks memory
            self._interval.begin_sample()
        if self._trace is not None and self._steps == STEP and state.is_world_process_zero:
            self._trace.begin(args.device)

    def on_substep_end(self, args, state, control, **kwargs):
        if self._interval is not None:
            self._interval.trained()

    def on_step_end(self, args, state, control, **kwargs):
        if self._interval is None:
            return
        self._interval.trained()
        self._interval.end_sample()
        kernels = {name: None for _, work in self._works for name in work.kernels}
        if kernels and not self._named:
            logger.info("hf_fpdt: attention runs in %s", ", ".join(kernels))
            self._named = True
        if self._trace is not None and self._trace.end(args.device):
            self._interval.interrupted()
            logger.info("hf_fpdt: the timeline of step %d is in %s", state.global_step, self._trace.path)

    def on_epoch_end(self, args, state, control, **kwargs):
        if self._interval is not None:
            self._interval.trained()

    def on_evaluate(self, args, state, control, **kwargs):
        if self._interval is not None:
            self._interval.interrupted()

    on_save = on_predict = on_evaluate

    def on_log(self, args, state, control, logs=None, **kwargs):
        # What only Trainer itself logs together, right after it has waited for the loss; once, if there are two of these.
        if self._interval is None or logs is None or not {"loss", "learning_rate"} <= set(logs) or TOKENS_PER_S in logs:
            return
        fields = self._fields(reset_peak=args.skip_memory_metrics)  # else Trainer's own tracker reads that peak
        logs.update(fields)
        if state.log_history and state.log_history[-1].get("step") == state.global_step and "loss" in state.log_history[-1]:
            state.log_history[-1].update(fields)
        self._start(args.device)

    def on_train_end(self, args, state, control, **kwargs):
        self._forget()

    def _start(self, device: torch.device) -> None:
        self._interval = Interval(device)
        self._before = [Work(work.tokens, work.attention_flops) for _, work in self._works]

    def _fields(self, reset_peak: bool) -> dict[str, float]:
        interval, device = self._interval, self._interval.device
        done = [
            (model, work.tokens - before.tokens, work.attention_flops - before.attention_flops)
            for (model, work), before in zip(self._works, self._before, strict=True)
        ]
        tokens, seconds = sum(tokens for _, tokens, _ in done), interval.seconds()
        if not tokens or seconds <= 0:  # it was switched to another attention
            return {}
        fields = {TOKENS_PER_S: tokens / seconds}
        if device.type != "cuda":
            return fields
        peak = peak_flops(device)
        flops = math.nan if peak is None else training_flops(done)
        if not math.isnan(flops):
            fields[CAUSAL_MFU] = flops / seconds / peak
        fields[GPU_PEAK_GIB] = torch.cuda.max_memory_allocated(device) / 2**30
        if reset_peak:
            torch.cuda.reset_peak_memory_stats(device)
        fields[HOST_GIB] = transfers_for(device).arena.locked_bytes / 2**30
        fields[TRANSFER_GIB_PER_S] = interval.moved_bytes() / 2**30 / seconds
        hidden = interval.copies_hidden()
        if hidden is not None:
            fields[COPIES_HIDDEN] = hidden
        return fields


class Instant:
    """A moment of training: on the GPU's compute stream if that has got there when it is asked, else on the host."""

    def __init__(self, device: torch.device):
        self.host_s, self._event = time.perf_counter(), None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record(torch.cuda.current_stream(device))
        self.moved_bytes = transfers_for(device).moved_bytes

    def seconds_until(self, later: "Instant") -> float:
        if self._event is None or not (self._event.query() and later._event.query()):
            return later.host_s - self.host_s
        return self._event.elapsed_time(later._event) / 1e3


class Interval:
    """Time since it was made in which a model trained; not in which it was evaluated or saved."""

    def __init__(self, device: torch.device):
        self.device = torch.device("cuda", torch.cuda.current_device()) if str(device) == "cuda" else device
        self._begun = self._last = Instant(self.device)
        self._interruptions: list[tuple[Instant, Instant]] = []
        self._meter: CopyMeter | None = None

    def trained(self) -> None:
        """Up to here it was training."""
        self._last = Instant(self.device)

    def interrupted(self) -> None:
        """Since `trained` it was none."""
        now = Instant(self.device)
        self._interruptions.append((self._last, now))
        self._last = now

    def seconds(self) -> float:
        """Up to now, where the GPU has nothing to do."""
        return time.perf_counter() - self._begun.host_s - sum(start.seconds_until(end) for start, end in self._interruptions)

    def moved_bytes(self) -> int:
        """Between host and device by hf_fpdt."""
        others = sum(end.moved_bytes - start.moved_bytes for start, end in self._interruptions)
        return transfers_for(self.device).moved_bytes - self._begun.moved_bytes - others

    def begin_sample(self) -> None:
        """Times the copies from here on, if none of this interval were timed yet and nobody else does."""
        transfers = transfers_for(self.device)
        if self._meter is None and transfers.meter is None:
            self._meter = transfers.meter = CopyMeter()

    def end_sample(self) -> None:
        """Times no more."""
        transfers_for(self.device).meter = None

    def copies_hidden(self) -> float | None:
        """Share of the timed copies' time in which compute did not wait for one; None if there were none."""
        return None if self._meter is None else self._meter.hidden_share()
