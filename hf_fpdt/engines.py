"""
What depends on the engine that trains: DeepSpeed's ZeRO stages, FSDP2, DDP. The only importer of DeepSpeed.

One function owns the factor that gradients need, one makes the process groups, one keeps ZeRO-3 from gathering per chunk, one
from losing biases.
"""

import os
import sys
from collections.abc import Callable, Iterable
from functools import wraps
from types import ModuleType
from typing import Any

import accelerate
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor, nn

_HOOK, _WHOLE = "_fpdt_gradient_hook", "_fpdt_whole_biases"
_SHARING = (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)


def zero_stage(state: AcceleratorState) -> int | None:
    """DeepSpeed's ZeRO stage, None for another engine."""
    if state.distributed_type != DistributedType.DEEPSPEED:
        return None
    return int(deepspeed_config(state).get("zero_optimization", {}).get("stage", 0))


def check_shares_sequences(state: AcceleratorState, sp_size: int) -> None:
    """
    Raises:
        ValueError: for an engine under which sequences cannot be shared, and for groups that are not all of its processes.
    """
    kind, plugin = state.distributed_type, getattr(state, "fsdp_plugin", None)
    if kind == DistributedType.FSDP and plugin.fsdp_version == 1:
        raise ValueError(f"sp_size={sp_size} with FSDP1: use FSDP2 (fsdp_config: fsdp_version: 2), DDP or DeepSpeed.")
    if kind not in _SHARING:
        raise ValueError(
            f"sp_size={sp_size} with distributed_type {kind.value}: sequences are shared under DeepSpeed, FSDP2 and DDP. "
            "Launch with one of accelerate_configs/, or set parallelism_config_sp_size to 1."
        )
    if kind != DistributedType.DEEPSPEED and getattr(state, "device_mesh", None) is not None:
        raise ValueError(
            f"sp_size={sp_size} with {kind.value} and accelerate {accelerate.__version__}: it would give the processes of a "
            "group the same batches, and each would be trained on several times. Use accelerate 1.13 or later, or DeepSpeed."
        )
    parallelism, processes = state.parallelism_config, state.num_processes
    groups = processes // sp_size
    if kind == DistributedType.DEEPSPEED and processes % sp_size == 0 and parallelism.data_parallel_size != groups:
        raise ValueError(
            f"{processes} processes in groups of sp_size={sp_size} are {groups} groups, and the launch configuration says "
            f"{parallelism.data_parallel_size}: set parallelism_config_dp_replicate_size to {groups}."
        )
    shards = (parallelism.dp_replicate_size, parallelism.dp_shard_size)
    if kind == DistributedType.FSDP and shards != (1, processes):  # accelerate makes no mesh: FSDP2 takes all processes
        raise ValueError(
            f"sp_size={sp_size} with FSDP2, dp_replicate_size={shards[0]} and dp_shard_size={shards[1]}: weights are "
            f"sharded over all processes. Set parallelism_config_dp_shard_size to {processes} and leave "
            "parallelism_config_dp_replicate_size out."
        )


def check_is_shared(group: dist.ProcessGroup | None) -> None:
    """
    Raises:
        ValueError: if a model without a group trains in a run that asks for groups.
    """
    config = AcceleratorState._shared_state.get("parallelism_config")
    if group is None and config is not None and config.sp_size > 1:
        raise ValueError(
            f"sp_size={config.sp_size}, and this model was not prepared for it: every process would train on whole sequences. "
            "In a loop of your own pass it to Accelerator.prepare(model, optimizer, dataloader), with hf_fpdt imported before; "
            "or set parallelism_config_sp_size to 1."
        )


def deepspeed_config(state: AcceleratorState) -> dict[str, Any]:
    """The DeepSpeed configuration of the run; empty for another engine."""
    return state.deepspeed_plugin.deepspeed_config if state.distributed_type == DistributedType.DEEPSPEED else {}


def gradient_factor(state: AcceleratorState, sp_size: int) -> float:
    """
    What the gradient of every process's share of the global mean loss must be multiplied with, so that what the engine makes of
    all of them is the gradient of the mean over the data-parallel groups.

    DDP, FSDP2 and ZeRO-3's default reduce-scatter average over all processes, also over those of one sequence, whose shares
    must be summed: `sp_size`. DeepSpeed's other reductions divide by the data-parallel size alone: 1.
    """
    stage = zero_stage(state)
    zero = deepspeed_config(state).get("zero_optimization", {})
    averages_over_all = stage is None or (stage == 3 and zero.get("reduce_scatter", True) is not False)
    return float(sp_size) if averages_over_all else 1.0


def sequence_parallel_groups(sp_size: int) -> ModuleType:
    """
    DeepSpeed's module with the groups of `sp_size` consecutive ranks, made at the first call, and known to accelerate.

    Raises:
        ValueError: if the processes do not divide into such groups.
    """
    world = dist.get_world_size()
    if world % sp_size:
        valid = [size for size in range(1, world + 1) if world % size == 0]
        raise ValueError(
            f"sp_size={sp_size} does not divide the {world} processes. Use one of {', '.join(map(str, valid))}, or start "
            "another number of processes (num_processes, --num_processes)."
        )
    import deepspeed
    import deepspeed.runtime.sequence_parallel.parallel_state_sp as mpu
    from deepspeed.utils import groups

    if not deepspeed.comm.is_initialized():  # another engine's processes: DeepSpeed takes them over
        deepspeed.init_distributed(dist_backend=dist.get_backend())
    if mpu._SEQUENCE_PARALLEL_GROUP is None:
        mpu.initialize_sequence_parallel(sequence_parallel_size=sp_size)
    groups.mpu = mpu
    return mpu


def gather_whole_layers(model: nn.Module, layers: Iterable[nn.Module]) -> None:
    """
    Makes ZeRO-3 gather the weights of each of these layers once a pass, however often the layer runs in it, if this process may
    get it: it was started for DeepSpeed, or has imported it. To be called before `deepspeed.initialize`. DeepSpeed's linear
    layer then adds biases before it rounds, in the whole process.
    """
    if sys.modules.get("deepspeed") is None and os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return
    from deepspeed.utils import set_z3_leaf_modules

    layers = list(layers)
    for layer in layers:
        if _HOOK not in layer.__dict__:
            layer.__dict__[_HOOK] = layer.register_forward_pre_hook(_with_gradient)
    set_z3_leaf_modules(model, sorted({type(layer) for layer in layers}, key=lambda one: one.__name__))
    _keep_biases_whole()


def _keep_biases_whole() -> None:
    """
    Under ZeRO-3 DeepSpeed puts a linear layer in the place of torch's that keeps no gathered weights. It adds a bias to a
    product that was rounded already, to bfloat16 for example, and what is small beside that is lost; but not for inputs of two
    dimensions, which it gives to `torch.addmm`. So it gets all of them like that.
    """
    from deepspeed.runtime.zero import partition_parameters as zero

    linear = getattr(zero, "zero3_linear_wrap", None)
    if linear is None or hasattr(linear, _WHOLE):
        return
    zero.zero3_linear_wrap = _of_two_dimensions(linear)
    if nn.functional.linear is linear:  # weights were sharded before, as by `from_pretrained`
        nn.functional.linear = zero.zero3_linear_wrap


def _of_two_dimensions(linear: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(linear)
    def whole(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if bias is None or input.dim() == 2:
            return linear(input, weight, bias)
        out = linear(input.reshape(-1, input.shape[-1]), weight, bias)
        return out.reshape(*input.shape[:-1], out.shape[-1])

    setattr(whole, _WHOLE, True)
    return whole


def gather_parts_of_layers(layers: Iterable[nn.Module]) -> None:
    """Undoes `gather_whole_layers`."""
    for layer in layers:
        layer.__dict__.pop("_z3_leaf", None)
        if _HOOK in layer.__dict__:
            layer.__dict__.pop(_HOOK).remove()


def check_gathered_whole(layer: nn.Module) -> None:
    """
    Raises:
        ValueError: for a layer whose weights ZeRO-3 sharded without `gather_whole_layers`: it would gather them chunk by chunk,
            and its backward finds them gone.
    """
    sharded = any(hasattr(weight, "ds_id") for weight in layer.parameters())
    if sharded and not getattr(layer, "_z3_leaf", False):
        raise ValueError(
            f"{type(layer).__name__} was sharded by ZeRO-3 before hf_fpdt knew of it, and its weights would be gathered for "
            "every module of every chunk. In a loop of your own call hf_fpdt.apply_fpdt(model) before Accelerator.prepare or "
            "deepspeed.initialize; Trainer needs nothing."
        )


def _with_gradient(layer: nn.Module, args: tuple) -> tuple | None:
    """
    ZeRO-3 reduces a whole layer's gradients when that of its input is there; if the input needs none (adapters over a frozen
    embedding), before the layer's backward, when there are only zeros.
    """
    if not (torch.is_grad_enabled() and args and not args[0].requires_grad):
        return None
    trains = any(weight.requires_grad and hasattr(weight, "ds_id") for weight in layer.parameters())
    return (_Anchored.apply(args[0], torch.zeros((), requires_grad=True)), *args[1:]) if trains else None


class _Anchored(torch.autograd.Function):
    """`(x, anchor) -> x` with a gradient that is dropped. A leaf would be kept by the graph until the end of the step."""

    @staticmethod
    def forward(ctx, x, anchor):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return None, None


def replace_sequence_parallelism(attention: type, loader: Any) -> None:
    """Puts these in the place of the two objects that accelerate takes from DeepSpeed when it finds an sp_size above 1."""
    from deepspeed.runtime.sequence_parallel import ulysses_sp

    ulysses_sp.UlyssesSPAttentionHF, ulysses_sp.UlyssesSPDataLoaderAdapter = attention, loader
