"""
hf_fpdt: finetune Hugging Face models on very long sequences, streamed chunk by chunk (FPDT, arXiv 2408.16978).

Importing it makes "fpdt" a valid `attn_implementation`; a model made that way streams when it trains or evaluates. In a process
that is one of several, or has `FPDT_*` variables, it also prepares Trainer and Accelerator, see `accelerate_wiring`.
"""

import os

from .attention_interface import register
from .config import FPDTConfig
from .disk_file import DiskSpaceError
from .host_arena import HostMemoryError
from .modeling import apply_fpdt, restore, watch_models
from .planning import plan
from .plugin import FPDTPlugin
from .step_plan import DeviceMemoryError
from .version import __version__

__all__ = [
    "DeviceMemoryError",
    "DiskSpaceError",
    "FPDTConfig",
    "FPDTPlugin",
    "HostMemoryError",
    "__version__",
    "apply_fpdt",
    "plan",
    "restore",
]


def _enable_in_launched_runs() -> None:
    """In a process that is one of several, or has settings of hf_fpdt in its environment, which Trainer's callback reads."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 or any(name.startswith("FPDT_") for name in os.environ):
        from .accelerate_wiring import enable

        enable()


register()
watch_models()
_enable_in_launched_runs()
