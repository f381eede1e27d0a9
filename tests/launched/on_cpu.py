"""
`train.py` on CPUs under what accelerate takes on GPUs only: FSDP2, of which it makes DDP on CPUs without a word, and DDP whose
processes share sequences. Prints how often the weights were gathered.
"""

import runpy
import sys
from pathlib import Path

import torch.distributed as dist
from accelerate import ParallelismConfig
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

_make = AcceleratorState.__init__
_validate = ParallelismConfig._validate_accelerator


def _with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
    _make(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = self.distributed_type = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin


def _unless_ddp(self, accelerator):
    if accelerator.distributed_type != DistributedType.MULTI_CPU:
        _validate(self, accelerator)


gathered = []
_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"  # torch's newer name
_gather = getattr(dist, _GATHER)


def _counted(*args, **kwargs):
    gathered.append(_GATHER)
    return _gather(*args, **kwargs)


def as_on_gpus() -> None:
    """From now on accelerate takes both."""
    AcceleratorState.__init__ = _with_fsdp
    ParallelismConfig._validate_accelerator = _unless_ddp


if __name__ == "__main__":
    setattr(dist, _GATHER, _counted)
    as_on_gpus()
    folder = Path(__file__).parent
    sys.path.insert(0, str(folder))
    sys.argv[0] = str(folder / "train.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
    print("gathered", len(gathered))
