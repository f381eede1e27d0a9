"""
Where every layer waits for its backward: the fastest choice that fits. Arithmetic only.

The last layers run backward first and give their memory back first, so what stays on the device belongs to them:

    layers of the model     0 ........................................................ last
                            | groups, or key_value, or attention: host (disk) | device | all activations: device |

Time is lost, in rising order, by: fetching from the host (nothing, while compute hides it); running a layer again; running its
attention again; running it twice more from its input or from a layer below. The search gives way in this order until everything
fits, then spends what is left of the device's memory: first on layers that need not run again, then on keeping others there.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from .memory_model import LayerPlacement, MemoryModel, Peaks

_GROUPS = (1, 2, 4, 8, 16, 32)  # layers that run again from one input


@dataclass(frozen=True)
class Limits:
    """
    Most bytes that may be taken on each place; None: no limit.

    Args:
        reserve: bytes on the device that will be needed but are not there yet: gradients, the optimizer's state.
    """

    device: int | None
    host: int | None
    reserve: int = 0


@dataclass(frozen=True)
class _Split:
    """How many layers are treated how, see the module; `group` is 0 without groups."""

    whole: int = 0
    on_device: int = 0
    without_attention: int = 0
    group: int = 0
    on_disk: int = 0


class PlacementSearch:
    """
    Args:
        offload, save_attention, recompute: as in `FPDTConfig`.
    """

    def __init__(self, memory: MemoryModel, limits: Limits, *, offload: str, save_attention, recompute):
        self._memory, self._limits = memory, limits
        # Blocks of K and V come from the host, and the rest of a layer waits with them.
        self._offload = "host" if memory.stream_kv and offload == "auto" else offload
        self._save_attention, self._recompute = save_attention, recompute
        self._count = len(memory.model.layers)

    def best(self) -> tuple[LayerPlacement, ...] | None:
        """One placement a layer, or None if nothing fits."""
        if self._recompute is False:
            split = _Split(whole=self._count)
            return self.placements(split) if self._fits(split) else None
        split = self._least()
        return None if split is None else self.placements(self._spend(split))

    def nearest(self) -> tuple[LayerPlacement, ...]:
        """The placements that come closest to fitting: for messages."""
        splits = [_Split(whole=self._count)] if self._recompute is False else map(self._settled, self._choices())
        return self.placements(min(splits, key=self._excess))

    def _excess(self, split: _Split) -> float:
        """How many times more than its limit the worse of device and host takes."""
        peaks, limits = self._peaks(split), self._limits
        taken = ((peaks.device, limits.device), (peaks.host, limits.host))
        return max((size / max(limit, 1) for size, limit in taken if limit is not None), default=0.0)

    def placements(self, split: _Split) -> tuple[LayerPlacement, ...]:
        return tuple(self._placement(split, index) for index in range(self._count))

    def _placement(self, split: _Split, index: int) -> LayerPlacement:
        from_top = self._count - 1 - index
        if from_top < split.whole:
            return LayerPlacement("all", "device")
        keeps = "key_value" if index < split.without_attention else "attention"
        if from_top < split.whole + split.on_device:
            return LayerPlacement(keeps, "device")
        place = "disk" if index < split.on_disk else "host"
        if split.group:
            return LayerPlacement("nothing" if index % split.group else "input", place)
        return LayerPlacement(keeps, place)

    def _choices(self):
        """From the fastest to the one that needs least."""
        if self._save_attention is False:
            yield _Split(without_attention=self._count)
        else:
            yield _Split()
        if self._save_attention == "auto":
            yield _Split(without_attention=self._count)
        if self._save_attention is not True and self._offload != "none":
            for group in _GROUPS:
                if group < 2 * self._count:
                    yield _Split(without_attention=self._count, group=group)

    def _least(self) -> _Split | None:
        """The fastest choice that fits with nothing kept on the device beyond what the host cannot hold."""
        for split in self._choices():
            if self._fits(self._settled(split)):
                if self._save_attention == "auto" and not split.group:
                    fewest = _smallest(
                        lambda n: self._fits(self._settled(_Split(without_attention=n))), split.without_attention
                    )
                    split = _Split(without_attention=fewest)
                return self._settled(split)
        return None

    def _spend(self, split: _Split) -> _Split:
        """Uses the device memory that is left."""
        if self._recompute == "auto" and self._offload in ("auto", "none"):
            whole = _largest(lambda n: self._fits(self._settled(replace(split, whole=n))), self._count)
            split = self._settled(replace(split, whole=whole))
        if self._offload == "auto":
            room = self._count - split.whole
            more = _largest(lambda n: self._fits(replace(split, on_device=split.on_device + n)), room - split.on_device)
            split = replace(split, on_device=split.on_device + more)
        return split

    def _settled(self, split: _Split) -> _Split:
        """Moves as many layers to the device, or to disk, as the host cannot hold."""
        room = self._count - split.whole
        if self._offload == "none":
            return replace(split, on_device=room)
        field = {"auto": "on_device", "disk": "on_disk"}.get(self._offload)
        if field is None:
            return replace(split, on_device=0)
        return replace(split, **{field: _smallest(lambda n: self._host_fits(replace(split, **{field: n})), room)})

    def _peaks(self, split: _Split) -> Peaks:
        return self._memory.peaks(self.placements(split), reserve=self._limits.reserve, grads_held=True)

    def _host_fits(self, split: _Split) -> bool:
        return _within(self._peaks(split).host, self._limits.host)

    def _fits(self, split: _Split) -> bool:
        peaks = self._peaks(split)
        return _within(peaks.host, self._limits.host) and _within(peaks.device, self._limits.device)


def _within(size: int, limit: int | None) -> bool:
    return limit is None or size <= limit


def _smallest(fits: Callable[[int], bool], high: int) -> int:
    """The smallest n from 0 to `high` that fits, if fitting is monotone; `high` if none does."""
    low = 0
    while low < high:
        middle = (low + high) // 2
        if fits(middle):
            high = middle
        else:
            low = middle + 1
    return high


def _largest(fits: Callable[[int], bool], high: int) -> int:
    """The largest n from 0 to `high` that fits; 0 is known to."""
    return high - _smallest(lambda n: fits(high - n), high)
