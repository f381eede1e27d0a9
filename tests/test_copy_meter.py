"""
The share of hidden copies, on streams that know the time: each operation takes as long as a test says, begins when its stream
is free and its waits are over, and leaves its interval behind. The reference is `timeline.hidden_fraction` over those: what a
profiler would have seen. A failure means that a run's logs say something else about its copies than its timeline does.
"""

from contextlib import contextmanager
from functools import partial

import pytest
import torch
from reference import make_batch, make_streamed, tiny_llama

from hf_fpdt import copy_meter, host_arena, places, transfers
from hf_fpdt.copy_meter import CopyMeter
from hf_fpdt.timeline import hidden_fraction

COPY_MS, FAR = 2.0, float("inf")


class Machine:
    """A GPU of three streams. `lag_ms`: how long after compute's end as queued the host knows of something."""

    def __init__(self):
        self.compute, self.active, self.copies, self.events = TimedStream(), [], [], 0
        self.kernels: list[tuple[float, float]] = []
        self.lag_ms = FAR

    def run(self, ms: float) -> None:
        """Kernels on the compute stream."""
        self.kernels.append(self.compute.work(ms))

    def hidden(self) -> float:
        return hidden_fraction(self.copies, self.kernels)


class TimedStream:
    def __init__(self, device=None):
        self.free_ms = 0.0

    def work(self, ms: float) -> tuple[float, float]:
        start, self.free_ms = self.free_ms, self.free_ms + ms
        return start, self.free_ms

    def wait_event(self, event) -> None:
        self.free_ms = max(self.free_ms, event.ms)

    def wait_stream(self, stream) -> None:
        self.free_ms = max(self.free_ms, stream.free_ms)

    def record_event(self):
        event = TimedEvent(enable_timing=False)
        event.record(self)
        return event


class TimedEvent:
    machine: Machine

    def __init__(self, enable_timing=False):
        self.timed = enable_timing
        self.machine.events += enable_timing

    def record(self, stream) -> None:
        self.ms = stream.free_ms

    def query(self) -> bool:
        return self.ms <= self.machine.compute.free_ms - self.machine.lag_ms

    def elapsed_time(self, later) -> float:
        assert self.timed
        assert later.timed
        assert self.query(), "asked before the GPU has met it"
        assert later.query(), "asked before the GPU has met it"
        return later.ms - self.ms


@pytest.fixture
def machine(monkeypatch):
    """`Transfers`, the class for CUDA devices, on the streams of a `Machine`."""
    machine, copy_ = Machine(), torch.Tensor.copy_

    def timed_copy(self, source, non_blocking=False):
        if machine.active:
            assert non_blocking
            machine.copies.append(machine.active[-1].work(COPY_MS))
        return copy_(self, source)

    @contextmanager
    def stream(side):
        machine.active.append(side)
        yield
        machine.active.pop()

    monkeypatch.setattr(TimedEvent, "machine", machine, raising=False)
    monkeypatch.setattr(torch.Tensor, "copy_", timed_copy)
    monkeypatch.setattr(torch.cuda, "Stream", TimedStream)
    monkeypatch.setattr(torch.cuda, "Event", TimedEvent)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: machine.compute)
    monkeypatch.setattr(host_arena, "_cuda_lock", lambda slab: None)
    monkeypatch.setattr(host_arena, "_cuda_unlock", lambda slab: None)
    monkeypatch.setattr(transfers, "HostArena", partial(host_arena.HostArena, slab_bytes=1 << 20))
    machine.transfers = transfers.Transfers(torch.device("cpu"))
    monkeypatch.setattr(places, "transfers_for", lambda device: machine.transfers)
    return machine


def keep(machine, count=1) -> list[transfers.HostCopy]:
    return [transfers.HostCopy(machine.transfers, torch.randn(3, 5)) for _ in range(count)]


def share(machine, meter) -> float | None:
    machine.lag_ms = -FAR
    return meter.hidden_share()


@pytest.mark.parametrize(("compute_ms", "want"), [(0.0, 0.0), (0.5, 0.25), (1.5, 0.75), (2.0, 1.0), (9.0, 1.0)])
def test_one_copy_under_compute(machine, compute_ms, want):
    """A tensor that has long been on the host, fetched while compute runs for some of the time that takes."""
    (kept,) = keep(machine)
    machine.run(100.0)
    meter = machine.transfers.meter = CopyMeter()
    kept.prefetch()
    machine.run(compute_ms)
    kept.get()
    machine.run(1.0)
    assert share(machine, meter) == pytest.approx(want)


def test_compute_waits_for_the_oldest_of_too_many(machine):
    """Five copies to the host without compute: the fifth makes compute wait for the first, and for nothing more."""
    meter = machine.transfers.meter = CopyMeter()
    keep(machine, transfers.Transfers.max_pending + 1)
    machine.run(100.0)
    assert share(machine, meter) == pytest.approx(1 - 1 / 5)


def test_both_directions_at_once_are_one_time(machine):
    """As in a timeline: compute waits 2 ms for a copy to the device, while one to the host runs for as long."""
    (kept,) = keep(machine)
    machine.run(100.0)
    meter = machine.transfers.meter = CopyMeter()
    keep(machine)
    kept.get()
    machine.run(1.0)
    assert machine.copies[-1] == machine.copies[-2]
    assert share(machine, meter) == 0.0


def test_what_the_gpu_has_not_met_is_left_out(machine):
    meter = machine.transfers.meter = CopyMeter()
    (kept,) = keep(machine)
    machine.run(3.0)
    kept.get()  # from 3 to 5 ms
    assert meter.hidden_share() is None
    machine.lag_ms = 2.0
    assert meter.hidden_share() == 1.0
    machine.lag_ms = 0.0
    assert meter.hidden_share() == pytest.approx(0.5)


def test_nothing_is_recorded_without_a_meter(machine):
    (kept,) = keep(machine)
    kept.get()
    meter = machine.transfers.meter = CopyMeter()
    machine.transfers.meter = None
    keep(machine, 9)[-1].get()
    assert machine.events == 0
    assert share(machine, meter) is None


def train(machine, monkeypatch, chunk_ms, **settings) -> CopyMeter:
    """Two steps of a small model, of which the second is metered and recorded; every linear layer takes its time."""
    forward = torch.nn.Linear.forward

    def timed(self, x):
        machine.run(chunk_ms)
        return forward(self, x)

    monkeypatch.setattr(torch.nn.Linear, "forward", timed)
    model, batch = make_streamed(tiny_llama(), 10, **settings), make_batch(1, 47)
    for meter in (None, CopyMeter()):
        machine.transfers.meter = meter
        model(**batch).loss.backward()
        if meter is None:
            machine.run(1000.0)  # nothing of the first step is under way in the second
            machine.copies.clear()
            machine.kernels.clear()
    return meter


@pytest.mark.parametrize("settings", [{}, {"kv": "streamed"}], ids=str)
@pytest.mark.parametrize("chunk_ms", [0.01, 0.6, 20.0])
def test_a_step_as_its_timeline_has_it(machine, monkeypatch, chunk_ms, settings):
    meter = train(machine, monkeypatch, chunk_ms, offload="host", **settings)
    machine.run(1000.0)  # the optimizer
    got = share(machine, meter)
    assert got == pytest.approx(machine.hidden(), abs=1e-6)
    if chunk_ms == 0.01:
        assert got < 0.2
    elif chunk_ms == 20.0 and not settings:  # attention takes no time here
        assert got > 0.8
    assert machine.transfers.arena.used_bytes == 0


def test_a_long_step_is_read_as_it_goes(machine, monkeypatch):
    """Few events are held, and the share is nearly that of all at once."""
    monkeypatch.setattr(copy_meter, "_MOST_SPANS", 32)
    held, add = [], CopyMeter._add

    def counted(self, *args):
        result = add(self, *args)
        held.append(len(self._spans))
        return result

    monkeypatch.setattr(CopyMeter, "_add", counted)
    machine.lag_ms = 10.0
    meter = train(machine, monkeypatch, 0.6, offload="host", kv="streamed")
    assert len(held) > 4 * 32
    assert max(held) < 64
    machine.run(1000.0)
    assert share(machine, meter) == pytest.approx(machine.hidden(), abs=0.05)
