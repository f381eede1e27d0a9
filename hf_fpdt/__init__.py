"""
hf_fpdt: finetune Hugging Face models on very long sequences, streamed chunk by chunk (FPDT, arXiv 2408.16978).

Importing it makes "fpdt" a valid `attn_implementation`; a model made that way streams when it trains or evaluates.
"""

from .attention_interface import register
from .config import FPDTConfig
from .disk_file import DiskSpaceError
from .host_arena import HostMemoryError
from .modeling import apply_fpdt, restore, watch_models
from .planning import plan
from .step_plan import DeviceMemoryError
from .version import __version__

__all__ = [
    "DeviceMemoryError",
    "DiskSpaceError",
    "FPDTConfig",
    "HostMemoryError",
    "__version__",
    "apply_fpdt",
    "plan",
    "restore",
]

register()
watch_models()
