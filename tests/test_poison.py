"""The suite's own instrument: were uninitialized memory not NaN for hf_fpdt, forgotten writes could pass every other test."""

import torch

CODE = """
made = [
    torch.empty(3), torch.empty((2, 2), dtype=torch.bfloat16), torch.empty_like(torch.ones(3)), torch.ones(3).new_empty(2, 2),
    torch.nn.Parameter(torch.ones(2)).new_empty(4), torch.empty(3, dtype=torch.float64),
]
integers = [
    torch.empty(3, dtype=torch.long), torch.ones(3, dtype=torch.int).new_empty(2), torch.empty_like(torch.ones(2).bool()),
]
"""


def test_only_hf_fpdt_sees_poison():
    poisoned, plain = {"__name__": "hf_fpdt.anything", "torch": torch}, {"__name__": "hf_fpdtx", "torch": torch}
    for namespace in (poisoned, plain):
        exec(CODE, namespace)
    assert all(tensor.isnan().all() for tensor in poisoned["made"])
    assert [tensor.shape for tensor in poisoned["made"]] == [tensor.shape for tensor in plain["made"]]
    assert [tensor.dtype for tensor in poisoned["integers"]] == [torch.long, torch.int, torch.bool]
    assert not all(tensor.isnan().all() for tensor in plain["made"])
