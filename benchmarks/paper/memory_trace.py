"""
Who held GPU memory, and when: a trace of torch's allocator (`torch.cuda.memory._record_memory_history`) taken apart by source.

An allocation's source is that of its innermost Python frame that `FRAMES` knows, and else what was marked last before it: a
mark is a small allocation made by `mark_source`, whose size says which (`anatomy_point.py` marks where modules begin, in the
forward and, by hooks of gradients, in the backward, where C++ leaves no Python frames). What is still there at the end as a
weight's gradient has been that from its beginning. All of this is arithmetic on lists, without a GPU.
"""

import itertools
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

BEFORE = "there before"
SOURCES = ("gradients", "residual and norms", "QKV", "exchange", "attention", "MLP", "loss", "fetched", "engine", "rest")
PHASES = ("forward", "backward")
MARKS = (*SOURCES, *PHASES)  # what a mark can say
MARK_BYTES = 512  # the allocator's unit: rounding leaves multiples as they are

# A part of the file's path, the function or None for all, and the source. Innermost frame first, first row first.
FRAMES = (
    ("hf_fpdt/head_exchange", None, "exchange"),
    ("hf_fpdt/transfers", None, "fetched"),
    ("hf_fpdt/gradient_sum", None, "gradients"),
    ("hf_fpdt/key_value_store", None, "QKV"),
    ("hf_fpdt/causal_attention", None, "attention"),
    ("hf_fpdt/cuda_kernels", None, "attention"),
    ("hf_fpdt/attention_kernels", None, "attention"),
    ("hf_fpdt/online_softmax", None, "attention"),
    ("flash_attn/", None, "attention"),
    ("integrations/sdpa_attention", None, "attention"),
    ("hf_fpdt/chunked_loss", None, "loss"),
    ("hf_fpdt/cross_entropy", None, "loss"),
    ("fused_linear_cross_entropy", None, "loss"),
    ("loss/loss_utils", None, "loss"),
    ("torch/nn/functional", "cross_entropy", "loss"),
    ("ulysses_sp", "TiledFusedLogitsLoss", "loss"),
    ("deepspeed/sequence/layer", None, "exchange"),
    ("deepspeed/runtime/zero/", None, "engine"),
    ("deepspeed/runtime/comm/", None, "engine"),
)


@dataclass
class Moment:
    """Bytes by source after an event; `time_us` as in the trace."""

    time_us: int
    phase: str
    held: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.held.values())


@dataclass
class Anatomy:
    """
    Attributes:
        moments: one after each allocation or release.
        peaks: by phase, the moment with most bytes.
        tops: by phase and source, its own most bytes, whenever that was.
    """

    moments: list[Moment]
    peaks: dict[str, Moment] = field(default_factory=dict)
    tops: dict[str, dict[str, int]] = field(default_factory=dict)


def source_of_frames(frames: Sequence[dict]) -> str | None:
    """The source that a stack names, innermost frame first, or None."""
    for frame in frames:
        path = frame.get("filename", "").replace("\\", "/")
        for part, function, source in FRAMES:
            if part in path and function in (None, frame.get("name")):
                return source
    return None


def mark_of(entry: dict) -> str | None:
    """What an allocation says as a mark, or None."""
    if not any(frame.get("name") == "mark_source" for frame in entry.get("frames", ())):
        return None
    index = entry["size"] // MARK_BYTES - 1
    return MARKS[index] if 0 <= index < len(MARKS) else None


def replay(trace: Iterable[dict], before: int, gradients: Collection[int] = ()) -> Anatomy:
    """
    The events of one device in their order, as memory by source.

    Args:
        trace: of one device, from `torch.cuda.memory._snapshot()["device_traces"]`.
        before: bytes that were allocated when the recording began.
        gradients: addresses of the weights' gradients at the end.
    """
    # A tensor that another stream used is free when that stream is done; the allocator counts it until it is released.
    trace = [entry for entry in trace if entry["action"] in ("alloc", "free_requested")]
    last = {entry["addr"]: index for index, entry in enumerate(trace) if entry["action"] == "alloc"}
    kept = {last[address] for address in gradients if address in last}
    held = {BEFORE: before} | dict.fromkeys(SOURCES, 0)
    alive: dict[int, tuple[str | None, int]] = {}
    source, phase = "rest", PHASES[0]
    moments = []
    for index, entry in enumerate(trace):
        if entry["action"] == "alloc":
            said = mark_of(entry)
            if said in PHASES:
                phase = said
            elif said:
                source = said
            owner = None if said else "gradients" if index in kept else source_of_frames(entry.get("frames", ())) or source
            alive[entry["addr"]] = (owner, entry["size"])
            step = entry["size"]
        else:
            owner, size = alive.pop(entry["addr"], (BEFORE, entry["size"]))
            step = -size
        if owner is not None:
            held[owner] += step
            moments.append(Moment(entry.get("time_us", index), phase, dict(held)))
    return _with_peaks(moments)


def _with_peaks(moments: list[Moment]) -> Anatomy:
    found = Anatomy(moments)
    for phase in PHASES:
        those = [moment for moment in moments if moment.phase == phase]
        if those:
            found.peaks[phase] = max(those, key=lambda moment: moment.total)
            found.tops[phase] = {name: max(moment.held[name] for moment in those) for name in (BEFORE, *SOURCES)}
    return found


def thinned(moments: Sequence[Moment], most: int) -> list[Moment]:
    """At most `most` of the moments in their order: of each stretch the one with most bytes, so that no peak is lost."""
    if len(moments) <= most:
        return list(moments)
    bounds = [round(index * len(moments) / most) for index in range(most + 1)]
    return [max(moments[start:stop], key=lambda moment: moment.total) for start, stop in itertools.pairwise(bounds)]
