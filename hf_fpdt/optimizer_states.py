"""What an optimizer that has not stepped yet will keep on its weights' device: seen in a step of its own on small weights."""

from collections import OrderedDict, defaultdict

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .run_state import preserved_random_state

ADAMW = 2.0  # states of the size of the weight, as of torch's AdamW
_SIDE = 128  # of a small weight: 8-bit optimizers have states in 32 bits for less than 4,096 numbers
_EXPECTED = "_fpdt_optimizer_states"


def states_per_byte(optimizer: Optimizer) -> float | None:
    """
    Bytes of states that come on the weights' devices for a byte of its weights, on average over them.

    The rule is run, as the class has it, on 128 x 128 or 16,384 zeros for every dtype, device and kind of weight (a matrix or
    not) in each group. The optimizer's own weights, states and random numbers stay as they are. Factored states are taken from
    above, as they are smaller for larger matrices. None: it has no weights, or it cannot be run like this.
    """
    weights = states = 0.0
    for group in optimizer.param_groups:
        kinds: dict[tuple, int] = {}
        for weight in group["params"]:
            kind = (weight.dtype, weight.device, weight.ndim > 1)
            kinds[kind] = kinds.get(kind, 0) + weight.nbytes
        for (dtype, device, is_matrix), num_bytes in kinds.items():
            small = nn.Parameter(torch.zeros((_SIDE, _SIDE) if is_matrix else _SIDE**2, dtype=dtype, device=device))
            small.grad = torch.ones_like(small)
            try:
                with preserved_random_state(device):
                    found = _states_of(optimizer, group, small)
            except Exception:  # it needs a closure, weights of a model, or a process group
                return None
            weights += num_bytes
            states += num_bytes * found / small.nbytes
    return states / weights if weights else None


def _states_of(optimizer: Optimizer, group: dict, weight: nn.Parameter) -> int:
    """Bytes on the weight's device after a step of the optimizer's class with this weight only."""
    twin = object.__new__(type(optimizer))
    twin.__dict__.update(optimizer.__dict__)
    hooks = {name: OrderedDict() for name in vars(optimizer) if name.endswith("_hooks")}
    twin.__dict__.update(hooks, state=defaultdict(dict), param_groups=[{**group, "params": [weight]}])
    type(optimizer).step(twin)  # not that of the instance, which schedulers replace
    tensors = [value for value in twin.state[weight].values() if isinstance(value, Tensor)]
    return sum(tensor.nbytes for tensor in tensors if tensor.device == weight.device)


def expect(model: nn.Module, ratio: float | None) -> None:
    """The model's weights will be stepped by an optimizer with so many bytes of states a byte; None: nobody knows."""
    model.__dict__.pop(_EXPECTED, None)
    if ratio is not None:
        model.__dict__[_EXPECTED] = ratio


def expected(model: nn.Module) -> float:
    """What was said last, or AdamW's."""
    return model.__dict__.get(_EXPECTED, ADAMW)
