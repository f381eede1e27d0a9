"""Where a tensor waits for the backward: on the device, in page-locked host memory."""

import torch
from torch import Tensor

from .config import FPDTConfig
from .transfers import HostCopy, KeptTensor, transfers_for


class Places:
    """
    The places that the settings allow.

    Args:
        config: for the limit on host memory.
    """

    def __init__(self, config: FPDTConfig):
        self._host_limit = None if config.host_memory == "auto" else config.host_memory

    def keep(self, tensor: Tensor, place: str) -> KeptTensor | HostCopy:
        """Keeps a tensor at `place`: `"device"`, where it is, or `"host"`."""
        if place == "device":
            return KeptTensor(tensor)
        return HostCopy(transfers_for(tensor.device), tensor, self._host_limit)

    @staticmethod
    def settle(device: torch.device) -> None:
        """Lets go of device memory that is still being copied away: compute waits for the copies."""
        transfers_for(device).settle()
