"""
What is noticed between the passes. A failure means a gradient of another function than the one that was computed, or a refusal
without reason.
"""

import pytest
import torch
from torch import nn

from hf_fpdt.unchanged import UnchangedModule, version_of


@pytest.mark.parametrize("through", [lambda t: t, lambda t: t[1:], lambda t: t.detach()], ids=["itself", "view", "detached"])
def test_every_way_to_write_into_a_tensor_counts(through):
    tensor = torch.zeros(3, 2)
    before = version_of(tensor)
    tensor.add(1.0)
    assert version_of(tensor) == before
    through(tensor).add_(1.0)
    assert version_of(tensor) > before


def test_inference_tensors_count_nothing():
    with torch.inference_mode():
        module = nn.Linear(2, 2)
    assert version_of(module.weight) is None
    unchanged = UnchangedModule(module, "it")
    with torch.inference_mode():
        module.weight.zero_()
    unchanged.check()


def test_every_changed_weight_is_named():
    module = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False)))
    module[1][0].requires_grad_(False)
    unchanged = UnchangedModule(module, "Block 3")
    unchanged.check()
    with torch.no_grad():
        module[1][0].bias.add_(1.0)
        module[1][1].weight[0] = 3.0
    with pytest.raises(RuntimeError, match=r"Block 3: a weight was changed in place \(1.0.bias, 1.1.weight\) between"):
        unchanged.check()


def test_modules_that_come_and_go():
    for change in (lambda module: module.append(nn.Linear(2, 2)), lambda module: module.pop(0)):
        module = nn.Sequential(nn.Dropout(), nn.Linear(2, 2), nn.Dropout())
        unchanged = UnchangedModule(module, "Block 3")
        change(module)
        with pytest.raises(RuntimeError, match="Block 3: modules were added or removed between the forward and the backward"):
            unchanged.check()
