"""The state of the caller that a later re-run of a module must see again: random streams and autocast."""

from contextlib import contextmanager

import torch


class RandomState:
    """The CPU's and one device's random streams at the moment of construction. No host synchronization."""

    def __init__(self, device: torch.device):
        self._device = device
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def set(self) -> None:
        """Makes this the current state."""
        torch.set_rng_state(self._cpu)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda, self._device)


@contextmanager
def preserved_random_state(device: torch.device):
    """What runs inside draws as it likes; afterwards the streams are where they were before."""
    before = RandomState(device)
    try:
        yield
    finally:
        before.set()


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype that autocast casts to at present, or None without autocast."""
    kind = _autocast_type(device_type)
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _autocast_type(device_type: str) -> str:
    return "cpu" if device_type == "meta" else device_type  # autocast does not know the meta device


class AutocastState:
    """The autocast setting at the moment of construction."""

    def __init__(self, device_type: str):
        self._device_type = _autocast_type(device_type)
        self._enabled = torch.is_autocast_enabled(self._device_type)
        self._dtype = torch.get_autocast_dtype(self._device_type)

    def context(self):
        """
        Autocast as it was, without its cache of cast weights: a copy cast inside of a Function's forward has no gradient,
        and the cache would hand it to code outside that needs one.
        """
        return torch.autocast(self._device_type, dtype=self._dtype, enabled=self._enabled, cache_enabled=False)


def no_autocast(device_type: str):
    """A context without autocast, for code that has chosen its dtypes."""
    return torch.autocast(_autocast_type(device_type), enabled=False)
