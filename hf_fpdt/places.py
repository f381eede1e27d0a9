"""Where a tensor waits for the backward: on the device, in page-locked host memory, or in a file."""

import torch
from torch import Tensor

from .config import FPDTConfig
from .disk_file import DiskCopy, disk_file_for
from .transfers import HostCopy, KeptTensor, transfers_for


class Places:
    """
    The places that the settings allow, for the tensors of one device.

    Args:
        config: for the limit on host memory and the folder of the file.

    Raises:
        ValueError: if no file can be made in that folder.
    """

    def __init__(self, config: FPDTConfig, device: torch.device):
        self._device = device
        self._host_limit = None if config.host_memory == "auto" else config.host_memory
        self._file = disk_file_for(config.disk_folder, device) if config.offload == "disk" else None

    def keep(self, tensor: Tensor, place: str) -> KeptTensor | HostCopy | DiskCopy:
        """Keeps a tensor at `place`: `"device"`, where it is, `"host"` or `"disk"`."""
        if place == "device":
            return KeptTensor(tensor)
        transfers = transfers_for(self._device)
        if place == "disk":
            return DiskCopy(transfers, self._file, tensor, self._host_limit)
        return HostCopy(transfers, tensor, self._host_limit)

    def settle(self) -> None:
        """Lets go of device memory that is still being copied away: compute waits for the copies."""
        transfers_for(self._device).settle()
