"""
Tensor parallelism with sequence parallelism on torch's own plans: what Megatron-LM calls tensor and sequence parallelism
(Korthikanti et al., arXiv 2205.05198), the paper's first baseline.

Q, K, V, gate and up are split by their outputs, o and down by their inputs, embedding and output layer by the vocabulary. Norms
and residuals hold a part of the sequence; in front of attention and MLP it is gathered, behind them summed and scattered. So
attention and MLP see the whole sequence with a part of the heads and of the width. The norms' weights are whole on every rank
and see a part of the tokens: their gradients are summed after the backward, as Megatron does. torch leaves the embedding's
gradient whole on every rank (1 GiB of Llama 3 8B's); it is cut after the backward.

Layers are checkpointed, each with its part of the sequence kept. The loss is torch's loss_parallel in checkpointed tiles, so no
rank ever has more logits than those of a tile and its part of the vocabulary.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    loss_parallel,
    parallelize_module,
)
from torch.utils.checkpoint import checkpoint

_TILE_TOKENS = 8192  # of the whole sequence; with half of Llama 3's vocabulary 2 GiB of logits in fp32


def start(model: nn.Module, ranks: int, seq_len: int, device: str) -> tuple[Callable[[], Tensor], Callable[[], dict]]:
    """Splits the model over a new process group. Returns a step with learning rate 0, and what the engine says after it."""
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    mesh = dist.device_mesh.init_device_mesh(device, (ranks,))
    split_model(model, mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, foreach=False)  # weights of two kinds
    ids = torch.randint(0, model.config.vocab_size, (1, seq_len), generator=torch.Generator().manual_seed(1)).to(device)

    def run() -> Tensor:
        optimizer.zero_grad()
        loss = forward_backward(model, mesh, ids)
        optimizer.step()
        return loss

    return run, lambda: {"grad_norm": grad_norm(model)}


def split_model(model: nn.Module, mesh) -> None:
    """Shards a Llama for causal language modeling over the mesh's one dimension, in place, and checkpoints its layers."""
    whole, part = Replicate(), Shard(1)
    layer_plan = {
        "self_attn": PrepareModuleInput(
            input_kwarg_layouts={"hidden_states": part}, desired_input_kwarg_layouts={"hidden_states": whole}
        ),
        **{f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"},
        "self_attn.o_proj": RowwiseParallel(output_layouts=part),
        "mlp": PrepareModuleInput(input_layouts=part, desired_input_layouts=whole),
        "mlp.gate_proj": ColwiseParallel(),
        "mlp.up_proj": ColwiseParallel(),
        "mlp.down_proj": RowwiseParallel(output_layouts=part),
    }
    for layer in model.model.layers:
        # No mask is made for a part of a sequence: attention has the whole of it.
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, "attention_mask": None, "is_causal": True}), with_kwargs=True
        )
        parallelize_module(layer, mesh, layer_plan)
    embedding = RowwiseParallel(input_layouts=whole, output_layouts=part)
    head = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    parallelize_module(model, mesh, {"model.embed_tokens": embedding, "lm_head": head})
    # What arrives from the scatter is a subclass that Liger's kernels cannot take; behind the layers the residual unwraps it.
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: output.clone())
    model.gradient_checkpointing_enable({"use_reentrant": False})


def forward_backward(model: nn.Module, mesh, ids: Tensor) -> Tensor:
    """The loss of the whole sequence `ids` [1, seq_len], on every rank; gradients are added to `.grad`."""
    seq_len = ids.shape[1]
    positions = torch.arange(seq_len, device=ids.device)[None]
    hidden = model.model(input_ids=ids, position_ids=positions).last_hidden_state  # [1, seq_len / ranks, hidden]
    labels = torch.nn.functional.pad(ids[0, 1:], (0, 1), value=-100).view(mesh.size(), -1)
    with loss_parallel():
        loss = sum(
            checkpoint(_tile_loss, model.lm_head, mesh, tile, targets.flatten(), use_reentrant=False)
            for tile, targets in zip(_tiles(hidden, mesh), _tiles(labels, mesh), strict=True)
        ) / (seq_len - 1)
        loss.backward()
    for weight in model.parameters():
        if isinstance(weight, DTensor):
            weight.grad = weight.grad.redistribute(placements=weight.placements)  # nothing but for the embedding
        else:
            dist.all_reduce(weight.grad, group=mesh.get_group())
    return loss.detach()


def _tiles(tensor: Tensor, mesh) -> tuple[Tensor, ...]:
    """Along the tokens of a rank: a tile takes the same slice of every rank."""
    return tensor.split(max(_TILE_TOKENS // mesh.size(), 1), dim=1)


def _tile_loss(head: nn.Module, mesh, hidden: Tensor, labels: Tensor) -> Tensor:
    whole = DTensor.from_local(hidden, mesh, [Shard(1)], run_check=False).redistribute(placements=[Replicate()])
    logits = head(whole).flatten(0, 1).float()
    loss = nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    return loss.to_local() if isinstance(loss, DTensor) else loss


def grad_norm(model: nn.Module) -> float:
    """Of the whole model: gradients that every rank has count once."""
    squares = torch.zeros((), dtype=torch.float32, device=next(model.parameters()).device)
    for parameter in model.parameters():
        grad = parameter.grad
        split = isinstance(grad, DTensor)
        local = grad.to_local() if split else grad
        squares += local.float().square().sum() / (1 if split else dist.get_world_size())
    dist.all_reduce(squares)
    return squares.sqrt().item()
