"""
Operations that training needs, recomputation not counted, and what a GPU can do.

A matrix weight takes 6 operations a token (2 for the output, 2 for the gradient of the input, 2 for its own), a frozen one 4. A
query that sees a key takes 3 * 2 * (head_dim + value_dim) a head. Lookups, norms and the loss are not counted.
"""

import math
from collections.abc import Sequence

import torch
from torch import nn

# Operations a second in bf16, dense (without sparsity), from the makers' data sheets, by torch.cuda.get_device_name().
PEAK_BF16 = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA L40S": 362e12,
}
# What configurations of transformers call the number of experts that a token goes through.
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k")


def attention_flops(pairs: int, heads: int, head_dim: int, value_dim: int) -> int:
    """Of the forward and the backward over `pairs` of a query and a key that it sees."""
    return 6 * pairs * heads * (head_dim + value_dim)


def matrix_flops(module: nn.Module, experts_per_token: int | None = None) -> float:
    """
    Of the matrix products of a module for one token, forward and backward.

    Args:
        experts_per_token: of its experts, how many a token goes through.

    Returns:
        NaN if the module has experts and nobody said how many a token goes through.
    """
    if isinstance(module, nn.Embedding):
        return 0.0
    total = sum(_flops_of(module, name, experts_per_token) for name in module._parameters)
    for name, child in module._modules.items():
        # A copy of the output layer that is trained in place of the original, and a lookup: PEFT's.
        if child is None or (name == "original_module" and "modules_to_save" in module._modules) or name == "lora_embedding_A":
            continue
        flops = matrix_flops(child, experts_per_token)
        if name == "experts" and isinstance(child, nn.ModuleList) and len(child):
            flops *= _share(experts_per_token, len(child))
        total += flops
    return total


def _flops_of(module: nn.Module, name: str, experts_per_token: int | None) -> float:
    weight = module._parameters[name]
    if weight is None or "bias" in name:
        return 0.0
    shape = tuple(getattr(weight, "ds_shape", weight.shape))  # DeepSpeed's: of the whole
    wide, high = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if name == "weight" and isinstance(wide, int) and isinstance(high, int):
        shape = (wide, high)  # a quantized one is packed
    if len(shape) not in (2, 3) or 1 in shape:  # vectors
        return 0.0
    share = _share(experts_per_token, shape[0]) if len(shape) == 3 else 1.0
    return (6 if weight.requires_grad else 4) * math.prod(shape) * share


def _share(experts_per_token: int | None, experts: int) -> float:
    return math.nan if experts_per_token is None else min(experts_per_token / experts, 1.0)


def training_flops(done: Sequence[tuple[nn.Module, int, int]]) -> float:
    """
    Operations of training, recomputation not counted; NaN if not known.

    Args:
        done: models, outer ones first, with the tokens that went through their layers and the operations of their attention.
            The output layer of the outermost that has one counts for all tokens.
    """
    total, tokens = 0.0, sum(tokens for _, tokens, _ in done)
    heads = (model.get_output_embeddings() for model, _, _ in done if hasattr(model, "get_output_embeddings"))
    head = next((head for head in heads if head is not None), None)
    if head is not None:
        total += matrix_flops(head) * tokens
    for model, own_tokens, attention in done:
        if own_tokens:
            total += matrix_flops(model, _experts_per_token(model)) * own_tokens + attention
    return total


def _experts_per_token(model) -> int | None:
    config = model.config.get_text_config()
    found = (getattr(config, name, None) for name in _EXPERTS_PER_TOKEN)
    return next((number for number in found if isinstance(number, int)), None)


def peak_flops(device: torch.device) -> float | None:
    """Operations a second of this GPU in bf16; None where `PEAK_BF16` does not have it."""
    return PEAK_BF16.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
