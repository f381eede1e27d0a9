"""Host memory on the GPU's memory node. A failure means slower copies, or a process that is left on too few processors."""

import os
from types import SimpleNamespace

import pytest
import torch

from hf_fpdt import numa

ADDRESS = "0000:1b:00.0"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine whose GPU is on node 1 with processors 0, 4 to 6 and 9."""
    device, node = tmp_path / "sys/bus/pci/devices" / ADDRESS, tmp_path / "sys/devices/system/node/node1"
    device.mkdir(parents=True)
    node.mkdir(parents=True)
    (device / "numa_node").write_text("1\n")
    (node / "cpulist").write_text("0,4-6,9\n")
    found = SimpleNamespace(pci_domain_id=0, pci_bus_id=0x1B, pci_device_id=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: found)
    return tmp_path


@pytest.fixture
def affinity(monkeypatch):
    """The processors of this thread, and what they were set to."""
    state = SimpleNamespace(now={0, 1, 2, 5}, history=[])

    def set_affinity(pid, cpus):
        assert pid == 0
        state.now = set(cpus)
        state.history.append(state.now)

    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(state.now), raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", set_affinity, raising=False)
    return state


def test_processors_of_a_device(machine):
    assert numa.node_cpus(ADDRESS, machine) == {0, 4, 5, 6, 9}
    assert numa.node_cpus("0000:99:00.0", machine) == set()
    assert numa.node_cpus(None, machine) == set()


def test_a_machine_with_one_node(machine):
    (machine / "sys/bus/pci/devices" / ADDRESS / "numa_node").write_text("-1\n")
    assert numa.node_cpus(ADDRESS, machine) == set()


def test_the_thread_moves_there_and_back(machine, affinity):
    with numa.near(0, machine):
        assert affinity.now == {0, 5}
    assert affinity.now == {0, 1, 2, 5}


def test_the_thread_comes_back_after_an_error(machine, affinity):
    with pytest.raises(RuntimeError, match="no lock"), numa.near(0, machine):
        raise RuntimeError("no lock")
    assert affinity.now == {0, 1, 2, 5}


def test_a_process_bound_elsewhere_stays(machine, affinity):
    affinity.now = {1, 2}
    with numa.near(0, machine):
        assert affinity.now == {1, 2}
    assert affinity.history == []


def test_a_system_that_refuses_is_no_error(machine, affinity, monkeypatch):
    def refuse(pid, cpus):
        raise PermissionError

    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    with numa.near(0, machine):
        pass


def test_a_torch_that_does_not_say(machine, affinity, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace())
    with numa.near(0, machine):
        assert affinity.history == []
