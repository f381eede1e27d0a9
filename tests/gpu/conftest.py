"""Shared by the tests on a GPU: copy streams of a test's own, and slow ones."""

import pytest
import torch

from hf_fpdt import transfers


@pytest.fixture
def fresh_transfers():
    transfers.transfers_for.cache_clear()
    yield
    torch.cuda.synchronize()
    transfers.transfers_for.cache_clear()


@pytest.fixture
def slow_copies(monkeypatch, fresh_transfers):
    """Copies start 5 ms late, far longer than the compute of these small layers: a missing wait shows."""
    copy_ = torch.Tensor.copy_

    def delayed(self, source, non_blocking=False):
        if non_blocking:
            torch.cuda._sleep(10_000_000)
        return copy_(self, source, non_blocking=non_blocking)

    monkeypatch.setattr(torch.Tensor, "copy_", delayed)
