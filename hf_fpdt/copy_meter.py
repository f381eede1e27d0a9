"""
How much of the copies between host and GPU ran under the compute, from events on the streams themselves.

Around every copy there is an event before and after it on its stream, and around every wait of compute for a copy one before
and after it on the compute stream. What lies between the latter is time in which compute stood still for a copy: a stall. A
copy's time that is in no stall was hidden. Nothing here waits: of events that the GPU has not met nothing is asked.
"""

import torch

from .timeline import hidden_fraction, union

_MOST_SPANS = 4096  # whose events are held; a step with K and V streamed can have a million


class CopyMeter:
    """The copies of one device, and the waits for them, while `Transfers.meter` is this."""

    def __init__(self):
        self._copied_ms = self._stalled_ms = 0.0  # of those that were read
        self._spans: list[tuple[bool, torch.cuda.Event, torch.cuda.Event]] = []  # whether it is a stall, begin, end

    def now(self, stream) -> torch.cuda.Event:
        """An event behind what is queued on a stream."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(stream)
        return event

    def copied(self, begun: torch.cuda.Event, stream) -> torch.cuda.Event:
        """Up to here a stream copied; returns the event of the end."""
        return self._add(False, begun, self.now(stream))

    def stalled(self, begun: torch.cuda.Event, stream) -> None:
        """Up to here the compute stream waited for a copy."""
        self._add(True, begun, self.now(stream))

    def hidden_share(self) -> float | None:
        """The part of the copies' time, both directions together, in which compute did not wait; None without copies."""
        self._read()
        return 1 - self._stalled_ms / self._copied_ms if self._copied_ms else None

    def _add(self, stall: bool, begun: torch.cuda.Event, end: torch.cuda.Event) -> torch.cuda.Event:
        self._spans.append((stall, begun, end))
        if len(self._spans) % _MOST_SPANS == 0:
            self._read()
        return end

    def _read(self) -> None:
        """Adds up what the GPU has done, and forgets its events."""
        spans, self._spans = self._spans, []
        lanes: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
        origin = None
        for stall, begun, end in spans:
            if not end.query():
                self._spans.append((stall, begun, end))
                continue
            origin = origin or begun
            lanes[stall].append((origin.elapsed_time(begun), origin.elapsed_time(end)))
        copied_ms = sum(stop - start for start, stop in union(lanes[False]))
        self._copied_ms += copied_ms
        self._stalled_ms += copied_ms * (hidden_fraction(lanes[False], lanes[True]) or 0.0)
