"""
What one training step will do and take: chunk size, where K and V of the running layer are, and where every layer waits.

`make_plan` is the only place that decides. The runtime follows the plan it returns, and `hf_fpdt.plan` shows it without a step.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .chunking import auto_chunk_tokens, resolve_chunk_size
from .config import FPDTConfig
from .host_arena import HostMemoryError
from .memory_model import LayerPlacement, MemoryModel, ModelFootprint, Peaks
from .placement import Limits, PlacementSearch
from .rates import Rates
from .sequence_layout import SequenceLayout
from .step_time import StepTime, TimeModel

_GIB = 2**30
_NAMES = {
    "all": "all activations", "attention": "x, K, V, out, lse", "key_value": "x, K, V", "input": "x", "nothing": "nothing",
}  # fmt: skip
_SMALLER_CHUNKS = (1, 2, 4, 8)  # divisors of the preferred chunk, tried in this order
_HOST_ADVICE = 'Use shorter sequences, save_attention="auto" or False, offload="disk" with a disk_folder'
_DEVICE_ADVICE = (
    'Use shorter sequences, a smaller chunk_size, kv="auto", offload="auto", recompute="auto", optimizer_memory=bytes for an '
    "optimizer smaller than AdamW"
)
_SHARDED_HOST = 'Use more GPUs, shorter sequences, save_attention=False, offload="disk" with a disk_folder'
_SHARDED_DEVICE = 'Use more GPUs, shorter sequences, a smaller chunk_size, kv="streamed"'


class DeviceMemoryError(RuntimeError):
    """A step needs more memory of the device than there is."""


@dataclass(frozen=True)
class Timing:
    """
    What a plan's time is told by.

    Args:
        rates: of the machine.
        fused: whether fused kernels run norms, rotary embedding and activations (Liger).
        sent: bytes that leave this process in a step for weights and their gradients.
    """

    rates: Rates
    fused: bool = False
    sent: float = 0.0


@dataclass(frozen=True)
class Plan:
    """
    Args:
        batch_size, seq_len: of the step; all tokens of a sequence, whatever part of it this process has.
        chunk_size: tokens of one sequence in a chunk, likewise.
        stream_kv: K and V of the running layer in blocks from the host, instead of whole on the device.
        placements: one a layer.
        peaks: predicted for the step; None if nothing was measured (evaluation, sharded weights, a CPU without `gpu_memory`).
        rows: `(tensor, place, bytes)` of what waits for the backward.
        limits: what the prediction was held against.
        sp_size: processes that share a sequence.
        time: predicted for forward and backward, if rates were given.
    """

    batch_size: int
    seq_len: int
    chunk_size: int
    stream_kv: bool
    placements: tuple[LayerPlacement, ...]
    peaks: Peaks | None = None
    rows: tuple[tuple[str, str, float], ...] = ()
    limits: Limits | None = None
    sp_size: int = 1
    time: StepTime | None = None

    @property
    def layout(self) -> SequenceLayout:
        """The chunks, in the sequence and in what this process has of it."""
        return SequenceLayout(self.seq_len, self.chunk_size, self.sp_size)

    def __str__(self) -> str:
        return "\n".join([self._headline(), *self._table()])

    def _headline(self) -> str:
        chunks = len(self.layout.spans)
        text = (
            f"hf_fpdt: {self.batch_size} x {self.seq_len} tokens in {chunks} chunk{'s' * (chunks > 1)} of {self.chunk_size}, "
            f"K and V {'streamed' if self.stream_kv else 'resident'}"
            + (f", spread over {self.sp_size} processes" if self.sp_size > 1 else "")
        )
        if self.peaks is None:
            text += "".join(f"; {name} of {_span(layers)}: {place}" for name, place, layers in waiting(self.placements))
        return text

    def _table(self) -> list[str]:
        if self.peaks is None:
            return []
        lines = [f"  {name:<44}{place:<8}{size / _GIB:>9.2f} GiB" for name, place, size in self.rows]
        if self.limits.reserve:
            lines.append(f"  {'kept free: gradients, optimizer states':<44}{'device':<8}{self.limits.reserve / _GIB:>9.2f} GiB")
        for place, size, limit in (
            ("device", self.peaks.device, self.limits.device),
            ("host", self.peaks.host, self.limits.host),
            ("disk", self.peaks.disk, None),
        ):
            if size or place == "device":
                of = "" if limit is None else f" of {limit / _GIB:.2f}"
                phase = f", {self.peaks.phase}" if place == "device" else ""
                lines.append(f"  {'predicted peak' + phase:<44}{place:<8}{size / _GIB:>9.2f} GiB{of}")
        return lines + ([] if self.time is None else [self._seconds()])

    def _seconds(self) -> str:
        time, tokens = self.time, self.batch_size * self.seq_len
        line = f"  {'predicted time, forward and backward':<44}{'':<8}{time.total:>9.2f} s, {tokens / time.total:,.0f} tokens/s"
        return line + (f", {time.waited:.2f} s of it waiting for copies" if time.waited > 0.005 * time.total else "")


def simple_plan(config: FPDTConfig, batch_size: int, layout: SequenceLayout, device_type: str, num_layers: int) -> Plan:
    """The plan without a footprint: the settings as they are, and for `"auto"` the host on a GPU and the device on a CPU."""
    place = {"none": "device", "auto": "host" if device_type == "cuda" else "device"}.get(config.offload, config.offload)
    stream_kv = config.kv == "streamed"
    if stream_kv and place == "device":
        place = "host"  # where blocks stream from
    if config.recompute is False:
        placement = LayerPlacement("all", "device")
    else:
        placement = LayerPlacement("attention" if config.save_attention is not False else "key_value", place)
    placements = (placement,) * num_layers
    return Plan(batch_size, layout.seq_len, layout.chunk_size, stream_kv, placements, sp_size=layout.sp_size)


def make_plan(
    footprint: ModelFootprint,
    config: FPDTConfig,
    limits: Limits,
    *,
    batch_size: int,
    layout: SequenceLayout,
    device_type: str,
    timing: Timing | None = None,
    sharded: bool = False,
) -> Plan:
    """
    The fastest plan that fits. In a sequence-parallel group the chunks are those of `layout`, by which the tokens were spread;
    without one, they are smaller if that is needed.

    Args:
        sharded: the weights are in pieces on several processes, where a step follows `simple_plan`: nothing is chosen.

    Raises:
        DeviceMemoryError, HostMemoryError: if none does, with the bytes needed, the bytes there, and the settings that help.
    """
    if sharded:
        plan = simple_plan(config, batch_size, layout, device_type, len(footprint.layers))
        return _predicted(footprint, config, limits, plan, timing)
    least = None
    ranks = layout.sp_size
    for chunk, stream_kv in _candidates(config, batch_size, layout, device_type):
        memory = MemoryModel(footprint, batch_size, layout.local_len, chunk // ranks, stream_kv)
        search = PlacementSearch(
            memory, limits, offload=config.offload, save_attention=config.save_attention, recompute=config.recompute
        )
        placements = search.best()
        if placements is not None:
            rows = tuple(_rows(memory, placements))
            peaks = memory.peaks(placements)
            time = _time(memory, placements, timing, ranks)
            return Plan(batch_size, layout.seq_len, chunk, stream_kv, placements, peaks, rows, limits, ranks, time)
        cheapest = memory.peaks(search.nearest(), reserve=limits.reserve, grads_held=True)
        least = cheapest if least is None or cheapest.device < least.device else least
    raise _shortage(least, limits, config)


def _predicted(footprint: ModelFootprint, config: FPDTConfig, limits: Limits, plan: Plan, timing: Timing | None) -> Plan:
    """A plan that was not chosen, with what it takes."""
    layout = plan.layout
    memory = MemoryModel(footprint, plan.batch_size, layout.local_len, plan.chunk_size // plan.sp_size, plan.stream_kv)
    peaks = memory.peaks(plan.placements)
    for taken, limit in ((peaks.device, limits.device), (peaks.host, limits.host)):
        if limit is not None and taken > limit:
            raise _shortage(peaks, limits, config, _SHARDED_HOST, _SHARDED_DEVICE)
    rows, time = tuple(_rows(memory, plan.placements)), _time(memory, plan.placements, timing, plan.sp_size)
    return replace(plan, peaks=peaks, rows=rows, limits=limits, time=time)


def _time(memory: MemoryModel, placements: Sequence[LayerPlacement], timing: Timing | None, ranks: int) -> StepTime | None:
    if timing is None:
        return None
    return TimeModel(memory, timing.rates, ranks=ranks, sent=timing.sent).step(placements)


def _candidates(config: FPDTConfig, batch_size: int, layout: SequenceLayout, device_type: str):
    """`(chunk size, whether K and V stream)`, from the preferred to the one that needs least."""
    chunks = [layout.chunk_size]
    if config.chunk_size == "auto" and layout.sp_size == 1:
        target = auto_chunk_tokens(device_type, layout.seq_len)
        sizes = [target // divisor for divisor in _SMALLER_CHUNKS]
        chunks = [resolve_chunk_size("auto", batch_size=batch_size, seq_len=layout.seq_len, tokens=size) for size in sizes]
    streams = {"auto": (False, True), "resident": (False,), "streamed": (True,)}[config.kv]
    if config.offload == "none" or config.recompute is False:
        streams = (False,)
    return [(chunk, stream_kv) for stream_kv in streams for chunk in dict.fromkeys(chunks)]


def _rows(memory: MemoryModel, placements: Sequence[LayerPlacement]):
    """What waits for the backward with its bytes, see `Plan.rows`."""
    for name, place, layers in waiting(placements):
        size = sum(memory.kept(memory.model.layers[index], placements[index]) for index in layers)
        yield f"{name} of {_span(layers)}", place, size


def waiting(placements: Sequence[LayerPlacement]) -> list[tuple[str, str, list[int]]]:
    """`(tensors, place, layers)` of what waits for the backward."""
    groups: dict[LayerPlacement, list[int]] = {}
    for index, placement in enumerate(placements):
        groups.setdefault(placement, []).append(index)
    return [(_NAMES[placement.keeps], placement.place, layers) for placement, layers in groups.items()]


def _span(layers: list[int]) -> str:
    return f"layer {layers[0]}" if len(layers) == 1 else f"{len(layers)} layers, {layers[0]} to {layers[-1]}"


def _shortage(
    least: Peaks, limits: Limits, config: FPDTConfig, host_advice: str = _HOST_ADVICE, device_advice: str = _DEVICE_ADVICE
) -> RuntimeError:
    if limits.host is not None and least.host > limits.host:
        return HostMemoryError(
            f"A step needs {least.host / _GIB:.2f} GiB of page-locked host memory, and there are {limits.host / _GIB:.2f} GiB. "
            f"{host_advice}, or raise host_memory (got {config})."
        )
    return DeviceMemoryError(
        f"A step needs {least.device / _GIB:.2f} GiB of device memory ({least.phase}; with gradients and optimizer states, of "
        f"which {limits.reserve / _GIB:.2f} GiB are still to come), and {limits.device / _GIB:.2f} GiB can be taken. "
        f"{device_advice}, or raise gpu_memory (got {config})."
    )
