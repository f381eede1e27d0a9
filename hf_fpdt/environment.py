"""What a bug report has to say about a machine: versions, GPUs, host memory, attention kernels, settings. No paths."""

import importlib.metadata
import os
import platform
import resource
from collections.abc import Iterator

import torch

from .host_limits import available_host_bytes
from .kernel_choice import KERNELS, choose_kernel
from .version import __version__

_GIB = 2**30
_PACKAGES = (
    "torch", "transformers", "accelerate", "deepspeed", "peft", "trl", "datasets", "flash-attn", "flash-attn-4", "liger-kernel",
    "bitsandbytes", "triton", "numpy",
)  # fmt: skip
_HEAD_DIM = 128


def report() -> list[tuple[str, str]]:
    """`(what, value)`, in order."""
    return [
        ("hf-fpdt", __version__),
        *((name, _version(name)) for name in _PACKAGES),
        ("Python", platform.python_version()),
        ("system", f"{platform.system()} {platform.machine()}, {platform.libc_ver()[0]} {platform.libc_ver()[1]}"),
        ("processors", str(os.cpu_count())),
        *_host_memory(),
        *_gpus(),
        *((name, _without_path(os.environ[name])) for name in sorted(os.environ) if name.startswith("FPDT_")),
    ]


def _without_path(value: str) -> str:
    return "(a path)" if os.sep in value else value


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _host_memory() -> Iterator[tuple[str, str]]:
    available = available_host_bytes()
    yield "host memory that can be taken", "unknown" if available is None else f"{available / _GIB:.1f} GiB"
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    yield "memory that may be locked", "unlimited" if limit == resource.RLIM_INFINITY else f"{limit / _GIB:.3f} GiB"


def _gpus() -> Iterator[tuple[str, str]]:
    yield "CUDA of torch", str(torch.version.cuda)
    if not torch.cuda.is_available():
        yield "GPUs", "none that torch can use"
        return
    yield "NCCL", ".".join(map(str, torch.cuda.nccl.version()))
    for index in range(torch.cuda.device_count()):
        one = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        peers = [other for other in range(torch.cuda.device_count()) if other != index]
        linked = all(torch.cuda.can_device_access_peer(index, other) for other in peers)
        peer = f", {'can' if linked else 'cannot'} access the others" if peers else ""
        sizes = f"{free / _GIB:.1f} of {total / _GIB:.1f} GiB free"
        yield f"GPU {index}", f"{one.name}, compute capability {one.major}.{one.minor}, {sizes}{peer}"
    for name, kernel in KERNELS.items():
        if kernel.device_type in (None, "cuda"):
            yield f"attention kernel {name}", _kernel(name)


def _kernel(name: str) -> str:
    """Whether it can run bfloat16 heads of 128, or why not."""
    try:
        choose_kernel(name, torch.device("cuda", torch.cuda.current_device()), torch.bfloat16, _HEAD_DIM, _HEAD_DIM)
    except ValueError as error:
        return str(error).split(": ", 1)[1].split(". Usable here")[0]
    return "right"
