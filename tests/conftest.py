"""Shared by all tests: offline, deterministic, and uninitialized memory that shows."""

import os
import re
import sys

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

with torch.device("meta"):  # learns what `torch.empty` is now, before it is replaced below
    torch.empty(1)

# The tensors are tiny: a second thread only waits, and for long if another process runs beside the tests.
torch.set_num_threads(1)


# What starts processes, here or in the benchmarks: a test file that imports some of it waits for other such files.
_STARTING = re.compile(
    r"^(?:from|import) (?:ranks|started|documented|test_launched|subprocess|multiprocessing|benchmarks)\b", re.MULTILINE
)


@pytest.hookimpl(optionalhook=True)  # pytest-xdist's
def pytest_xdist_make_scheduler(config, log):
    """
    With `-n 2` one worker has all files that start processes, and the other the rest, a file at a time: ranks that wait for
    each other spin, and two sets of them on two cores take three times as long.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByProcesses(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return "processes" if _STARTING.search((config.rootpath / file).read_text()) else file

    return ByProcesses(config, log)


def pytest_collection_finish(session):
    """The process that commands are forked from imports what they need beside the first tests."""
    here = any(not item.get_closest_marker("gpu") for item in session.items)
    if here and "started" in sys.modules and not session.config.option.collectonly:
        sys.modules["started"].server()


def _called_from_hf_fpdt() -> bool:
    name = sys._getframe(2).f_globals.get("__name__", "")
    return name == "hf_fpdt" or name.startswith("hf_fpdt.")


def _poisoned(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_floating_point():
        with torch.no_grad():
            tensor.fill_(float("nan"))
    return tensor


@pytest.fixture(autouse=True)
def _uninitialized_memory_is_nan(monkeypatch):
    """Floats that hf_fpdt allocates without a value are NaN: whatever it forgets to write shows in the results."""
    empty, empty_like, new_empty = torch.empty, torch.empty_like, torch.Tensor.new_empty

    def poisoned_empty(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return _poisoned(tensor) if _called_from_hf_fpdt() else tensor

    def poisoned_empty_like(*args, **kwargs):
        tensor = empty_like(*args, **kwargs)
        return _poisoned(tensor) if _called_from_hf_fpdt() else tensor

    def poisoned_new_empty(self, *args, **kwargs):
        tensor = new_empty(self, *args, **kwargs)
        return _poisoned(tensor) if _called_from_hf_fpdt() else tensor

    monkeypatch.setattr(torch, "empty", poisoned_empty)
    monkeypatch.setattr(torch, "empty_like", poisoned_empty_like)
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned_new_empty)


@pytest.fixture(scope="session")
def reader(tmp_path_factory):
    """Somebody who has installed the package from a copy of the checkout, in a folder of their own."""
    from documented import Reader

    return Reader(tmp_path_factory.mktemp("reader"))


@pytest.fixture(autouse=True)
def _seeded():
    """Every test starts from the same random stream and leaves no global switch behind."""
    torch.manual_seed(0)
    yield
    torch.set_grad_enabled(True)
