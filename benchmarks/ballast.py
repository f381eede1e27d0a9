"""
Memory of layers that are not there: a step of the full depth may take hours, and what it takes of memory can be held without.

The rows of such a run say so (`ballast`): their times are of the layers that ran, their memory is that of the full model.
"""

from dataclasses import dataclass, field

import torch

from .contenders import host_share
from .shapes import kv_dim, query_dim

_PIECE_BYTES = 4 << 30  # of host memory; one slab each


@dataclass(frozen=True)
class Ballast:
    """What is held; the objects are kept alive by `held`."""

    layers: int
    state_bytes: int
    gpu_bytes: int
    host_bytes: int
    held: list = field(repr=False)

    @property
    def device_bytes(self) -> int:
        return self.state_bytes + self.gpu_bytes

    def row(self) -> dict:
        """For the results, in GiB: weights, gradients and optimizer states; and what waits for the backward, by place."""
        sizes = {"state_gib": self.state_bytes, "gpu_gib": self.gpu_bytes, "host_gib": self.host_bytes}
        return {"layers": self.layers} | {name: size / 2**30 for name, size in sizes.items()}


def hold(model, layers: int, optimizer: bool, gpu_gib: float, host_gib: float) -> Ballast:
    """
    Allocates what `layers` more layers like the model's first would hold at the worst moment of a step.

    Args:
        optimizer: with AdamW's two states of every trained weight.
        gpu_gib, host_gib: what waits for the backward of these layers, in GiB; see `_hold_for_absent_layers`.
    """
    device = next(model.parameters()).device
    state_bytes = layers * _state_bytes(model.base_model.layers[0], optimizer)
    gpu_bytes, host_bytes = int(gpu_gib * 2**30), int(host_gib * 2**30)
    held = [torch.empty(state_bytes, dtype=torch.uint8, device=device)]
    held += _hold_for_absent_layers(device, gpu_bytes, host_bytes)
    return Ballast(layers, state_bytes, gpu_bytes, host_bytes, held)


def kept_bytes(config, contender: str, fpdt: dict) -> int:
    """
    Bytes of GPU memory a token that an absent layer keeps from its forward to its backward, in bfloat16. A checkpointed layer
    keeps its input, `alst` and hf_fpdt with `offload="host"` move everything to the host, which is nothing here, and hf_fpdt
    with `offload="none"` keeps input, K, V and, with `save_attention`, what attention gave.

    Raises:
        ValueError: for settings of hf_fpdt that leave it to the plan, which sees no absent layers.
    """
    if not contender.startswith("fpdt"):
        return 0 if contender == "alst" else 2 * config.hidden_size
    offload, saved = fpdt.get("offload", "auto"), fpdt.get("save_attention", "auto")
    if offload == "host":
        return 0
    if offload != "none" or fpdt.get("recompute") is not True or not isinstance(saved, bool):
        raise ValueError(
            f"--ballast-kept with --fpdt {fpdt}: what absent layers keep is known with offload host, or none with recompute "
            "true and save_attention true or false; name these, or hold bytes of your own with --ballast-gpu-gib."
        )
    attention = 2 * query_dim(config) + 4 * config.num_attention_heads
    return 2 * config.hidden_size + 4 * kv_dim(config) + (attention if saved else 0)


def _state_bytes(layer, optimizer: bool) -> int:
    """Weights of a layer, the gradients of the trained ones, and two optimizer states of these in their dtype."""
    copies = 4 if optimizer else 2
    return sum(p.numel() * p.element_size() * (copies if p.requires_grad else 1) for p in layer.parameters())


def _hold_for_absent_layers(device: torch.device, gpu_bytes: int, host_bytes: int) -> list:
    """What the absent layers keep for their backward: a tensor on the device, and pieces of the arena the model uses too."""
    held: list = [torch.empty(gpu_bytes, dtype=torch.uint8, device=device)]
    if host_bytes:
        from hf_fpdt.transfers import transfers_for

        arena = transfers_for(device).arena
        while host_bytes > 0:
            held.append(arena.take(min(host_bytes, _PIECE_BYTES), host_share()))
            host_bytes -= _PIECE_BYTES
    return held
