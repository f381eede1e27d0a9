"""
Host memory close to a GPU. On a machine with several memory nodes a GPU copies faster to and from that of its own.

Linux takes a page from the node of the processor that touches it first. So while a slab is locked, which touches all of it, the
calling thread runs on the processors of the GPU's node.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch


@contextmanager
def near(device_index: int, root: Path = Path("/")) -> Iterator[None]:
    """What is touched first inside is on the memory node of this CUDA device, if the system tells which that is."""
    cpus = node_cpus(_pci_address(device_index), root)
    before = os.sched_getaffinity(0) if cpus and hasattr(os, "sched_getaffinity") else set()
    if not before & cpus:  # one node, or the process is kept away from that one
        yield
        return
    try:
        with suppress(OSError):
            os.sched_setaffinity(0, before & cpus)
        yield
    finally:
        with suppress(OSError):
            os.sched_setaffinity(0, before)


def node_cpus(pci_address: str | None, root: Path = Path("/")) -> set[int]:
    """The processors of the node that a PCI device is attached to; none if there is one node only or it is not known."""
    if pci_address is None:
        return set()
    try:
        node = int((root / "sys/bus/pci/devices" / pci_address / "numa_node").read_text())
        text = (root / f"sys/devices/system/node/node{node}/cpulist").read_text().strip()
    except (OSError, ValueError):
        return set()
    spans = (span.split("-") for span in text.split(",") if span)
    return {cpu for span in spans for cpu in range(int(span[0]), int(span[-1]) + 1)}


def _pci_address(device_index: int) -> str | None:
    """As in `/sys/bus/pci/devices`: `0000:1b:00.0`; None with a torch that does not say."""
    found = torch.cuda.get_device_properties(device_index)
    numbers = [getattr(found, name, None) for name in ("pci_domain_id", "pci_bus_id", "pci_device_id")]
    return None if None in numbers else "{:04x}:{:02x}:{:02x}.0".format(*numbers)
