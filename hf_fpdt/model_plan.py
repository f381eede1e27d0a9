"""The plan of one call of a model: measured on a few of its tokens, made once a shape, logged."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .chunked_loss import loss_chunk_bytes
from .config import FPDTConfig
from .engine_memory import Engine
from .group_agreement import check_same, least
from .head_exchange import HeadExchange, MeasuredExchange, NoExchange
from .host_limits import RESERVE_BYTES, available_host_bytes, processes_on_host
from .memory_model import LossFootprint, ModelFootprint
from .operations import LossWork
from .optimizer_states import expected
from .placement import Limits
from .run_state import autocast_dtype, preserved_random_state
from .sequence_layout import SequenceLayout
from .step_plan import Plan, Timing, make_plan, simple_plan
from .streamed_pass import MeasuringPass, running
from .transfers import transfers_for

logger = logging.getLogger(__name__)

MEASURED_TOKENS = 512  # of every sequence; weights dominate at this length, see footprint.py
_RESERVED_SHARE = 0.06  # of the GPU's memory, for what the allocator cannot use
_HOST_SHARE = (
    0.95  # of what the host has available; the process itself grows in a step, and slabs are not filled to the last byte
)
_MOST_PLANS = 64  # of a model
_PLANS, _UNTRAINED = "_fpdt_plans", "_fpdt_untrained"


def plan_of_call(
    model: PreTrainedModel,
    layers: Sequence[nn.Module],
    head: nn.Module | None,
    tokens: Tensor,
    config: FPDTConfig,
    measure: Callable[[MeasuringPass], None],
    layout: SequenceLayout,
    exchange: NoExchange | HeadExchange,
) -> Plan:
    """
    The plan for a call of `model` on `tokens [batch, local_len(, hidden)]`; the same one for the same kind of call. Collective
    in the group of `exchange`: its ranks must run alike.

    Args:
        layers: the model's decoder layers.
        head: the output layer whose loss is computed in chunks, if it is.
        measure: runs the model on its first `MEASURED_TOKENS` tokens under the pass it is given.
        layout: of the sequence of which these are this process's tokens.
    """
    plans = model.__dict__.setdefault(_PLANS, {})
    trainable = sum(weight.requires_grad for weight in model.parameters())
    key = (config, tuple(tokens.shape[:2]), tokens.device, torch.is_grad_enabled(), model.training, trainable)
    key += (head is None, autocast_dtype(tokens.device.type), tokens.requires_grad, layout.sp_size, expected(model))
    if key not in plans:
        plan = new_plan(model, layers, head, tokens, config, measure, layout, exchange)
        settled = (plan.chunk_size, plan.stream_kv, tuple(placement.keeps for placement in plan.placements))
        check_same(exchange.group, {"their plan": settled}, "Give all of them the same model, FPDTConfig and kernels.")
        if len(plans) == _MOST_PLANS:  # of batches of all lengths there is no end
            del plans[next(iter(plans))]
        plans[key] = plan
        logger.info("%s", plans[key])
    return plans[key]


def forget_plans(model: nn.Module) -> None:
    """Plans are made anew at the next call."""
    for name in (_PLANS, _UNTRAINED):
        model.__dict__.pop(name, None)


def new_plan(
    model,
    layers,
    head,
    tokens: Tensor,
    config: FPDTConfig,
    measure,
    layout,
    exchange,
    *,
    timing: Timing | None = None,
    engine: Engine | None = None,
) -> Plan:
    """
    A plan made now; the other arguments are those of `plan_of_call`.

    Args:
        timing: of its time, if that is asked for.
        engine: what the model, which nobody has sharded, would be trained by.
    """
    trainable = [weight for weight in model.parameters() if weight.requires_grad]
    batch_size, local_len = tokens.shape[:2]
    device = tokens.device
    no_backward = not (torch.is_grad_enabled() and (trainable or tokens.requires_grad))
    kind = device_type_of(device)
    sharded = _is_sharded(model)
    for field in ("gpu_memory", "optimizer_memory"):
        if sharded and (given := getattr(config, field)) != "auto":
            raise ValueError(
                f"FPDTConfig({field}={given}) with weights that are sharded over processes (ZeRO-3, FSDP2): their step is not "
                f'planned in this version. Leave {field}="auto"; everything then waits on the host.'
            )
    if no_backward or local_len < 2 or sharded or (kind != "cuda" and config.gpu_memory == "auto"):
        return simple_plan(config, batch_size, layout, kind, len(layers))
    measured = _measuring_pass(layout, config, exchange, timing)
    try:
        with preserved_random_state(device), _without_hooks(model), running(measured):
            measure(measured)
    except Exception as error:
        if config.gpu_memory != "auto":
            raise
        # The step itself says what is wrong, or works: then only its memory is not known.
        plan = simple_plan(config, batch_size, layout, kind, len(layers))
        logger.warning(
            "hf_fpdt: %s could not be measured (%s); it runs by a plan without one:\n%s", type(model).__name__, error, plan
        )
        return plan
    footprint, reserve = _footprint(model, head, tokens, measured, trainable, config.optimizer_memory)
    if engine is not None:
        footprint, timing = _by_engine(engine, model, layers, head, footprint, timing)
    sharded = engine is not None and engine.shards_weights
    limits = _agreed(exchange.group, config, device, footprint.resident, 0 if sharded else reserve)
    if engine is not None and config.host_memory == "auto" and limits.host is not None:
        limits = replace(limits, host=limits.host // engine.gpus_on_host)
    kinds = {"batch_size": batch_size, "layout": layout, "device_type": kind}
    return make_plan(footprint, config, limits, **kinds, timing=timing, sharded=sharded)


def _footprint(
    model, head, tokens: Tensor, measured: MeasuringPass, trainable: list[Tensor], optimizer: int | str
) -> tuple[ModelFootprint, int]:
    """And the bytes of gradients and optimizer states (`FPDTConfig.optimizer_memory`) that are still to come."""
    grads = sum(weight.nbytes for weight in trainable)
    in_layers = sum(layer.weight_grads for layer in measured.layers)
    held = bool(trainable) and all(weight.grad is not None for weight in trainable)
    count, kind = tokens.shape[0] * tokens.shape[1], device_type_of(tokens.device)
    footprint = ModelFootprint(
        layers=measured.layers,
        loss=None if head is None else _loss(head, count, measured.layers[-1].hidden, kind),
        arguments=measured.argument_bytes + (measured.layers[0].hidden if _keeps_embedded(model) else 0),
        resident=_resident(model, head, tokens.device),
        other_grads=grads - in_layers,
        grads_held=held,
    )
    grads += 0 if footprint.loss is None else footprint.loss.head_grads
    states = int(expected(model) * grads) if optimizer == "auto" else optimizer
    return footprint, (0 if held else grads) + (0 if _has_stepped(model, trainable) else states)


def _by_engine(engine: Engine, model, layers, head, footprint: ModelFootprint, timing: Timing | None):
    """Footprint and timing of a process of several, by what DeepSpeed holds, gathers and sends."""
    heads = [] if head is None else [head]
    weights = {id(weight): weight for module in (model, *heads) for weight in module.parameters()}.values()
    trained, frozen = (sum(weight.numel() for weight in weights if weight.requires_grad == wanted) for wanted in (True, False))
    layer = max(sum(weight.numel() for weight in one.parameters() if weight.requires_grad) for one in layers)
    footprint = replace(
        footprint,
        resident=engine.held(trained, frozen),
        passing=engine.passing(trained, frozen, layer),
        stepping=engine.stepping(trained),
        grads_held=footprint.grads_held or engine.shards_weights,
        grad_y_held=engine.shards_weights,
    )
    return footprint, None if timing is None else replace(timing, sent=engine.sent(trained, frozen))


def layout_of(tokens: Tensor, config: FPDTConfig, sp_size: int) -> SequenceLayout:
    """Of the sequence of which `tokens [batch, local_len(, hidden)]` are one process's."""
    batch_size, local_len = tokens.shape[:2]
    kind = device_type_of(tokens.device)
    return SequenceLayout.of(
        local_len * sp_size, setting=config.chunk_size, batch_size=batch_size, device_type=kind, sp_size=sp_size
    )


def device_type_of(device: torch.device) -> str:
    """A model without memory (on the meta device) is planned for a GPU."""
    return "cuda" if device.type == "meta" else device.type


def _measuring_pass(layout: SequenceLayout, config: FPDTConfig, exchange, timing: Timing | None) -> MeasuringPass:
    alone = exchange if exchange.size == 1 else MeasuredExchange(exchange.size, exchange.rank, exchange.most_groups)
    fused = timing is not None and timing.fused
    length = min(layout.local_len, MEASURED_TOKENS)
    return MeasuringPass(length, layout.seq_len, config.kernel, alone, timed=timing is not None, fused=fused)


def _agreed(group, config: FPDTConfig, device: torch.device, resident: int, reserve: int) -> Limits:
    """The limits of this process, with no more left of them than on any other of the group."""
    limit = device_limit(config, device)
    left = None if limit is None else limit - resident - reserve
    left, host = least(group, (left, _host_limit(config, device)))
    return Limits(device=None if left is None else left + resident + reserve, host=host, reserve=reserve)


def _is_sharded(model: nn.Module) -> bool:
    """Whether an engine holds the weights in pieces: their sizes are not those of the layers, and ranks must run alike."""
    return any(hasattr(weight, "ds_id") or type(weight.data).__name__ == "DTensor" for weight in model.parameters())


@contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    """
    The hooks on modules see training only. Those that transformers puts there inside, once for all, stay afterwards. (Engines
    that gather weights in hooks are not measured.)
    """
    hooks = [hooks for module in model.modules() for hooks in (module._forward_hooks, module._forward_pre_hooks)]
    before = [list(own.items()) for own in hooks]
    for own in hooks:
        own.clear()
    try:
        yield
    finally:
        for own, items in zip(hooks, before, strict=True):
            new = list(own.items())
            own.clear()
            own.update([*items, *new])


def device_limit(config: FPDTConfig, device: torch.device) -> int | None:
    """Bytes that torch's tensors on this device may take in all."""
    limits = [] if config.gpu_memory == "auto" else [config.gpu_memory]
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        limits.append(free + torch.cuda.memory_reserved(device) + usable_bytes(total) - total)
    return min(limits, default=None)


def usable_bytes(total: int) -> int:
    """Of the memory of a GPU that nobody else uses."""
    return int((1 - _RESERVED_SHARE) * total)


def _host_limit(config: FPDTConfig, device: torch.device) -> int | None:
    arena = None if device.type == "meta" else transfers_for(device).arena
    used = 0 if arena is None else arena.used_bytes
    if config.host_memory != "auto":
        return config.host_memory - used
    available = available_host_bytes()
    locked = 0 if arena is None else arena.locked_bytes
    if available is None:
        return None
    return int(_HOST_SHARE * max(available - RESERVE_BYTES, 0)) // processes_on_host() + locked - used


def _resident(model: nn.Module, head: nn.Module | None, device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    tensors = {id(t): t for module in (model, head) if module is not None for t in (*module.parameters(), *module.buffers())}
    return sum(t.nbytes + (0 if t.grad is None else t.grad.nbytes) for t in tensors.values())


def _keeps_embedded(model: nn.Module) -> bool:
    """Whether the first layer's input stays for a gradient that nobody reads: transformers' `enable_input_require_grads`."""
    asked = (
        module
        for module in model.modules()
        if any("inputs_require_grad" in getattr(hook, "__name__", "") for hook in module._forward_hooks.values())
    )
    return any(not any(weight.requires_grad for weight in module.parameters()) for module in asked)


def _has_stepped(model: nn.Module, trainable: list[Tensor]) -> bool:
    """Whether an optimizer has changed the weights since they were first seen here, and has its states, or will have none."""
    if not trainable:
        return True
    return trainable[0]._version != model.__dict__.setdefault(_UNTRAINED, trainable[0]._version)


def _loss(head: nn.Module, tokens: int, hidden_bytes: float, device_type: str) -> LossFootprint:
    weights = list(head.parameters())
    trainable = [weight for weight in weights if weight.requires_grad]
    itemsize = next((weight.element_size() for weight in weights if weight.is_floating_point()), 4)  # of quantized ones: any
    chunk, chunks = loss_chunk_bytes(head.out_features, tokens, hidden_bytes, itemsize, device_type)
    grads = sum(weight.nbytes for weight in trainable)
    sums = sum(weight.numel() * max(weight.element_size(), 4) for weight in trainable) if chunks > 1 else 0
    work = LossWork(sum(weight.numel() for weight in weights), head.out_features, itemsize, bool(trainable), chunks)
    return LossFootprint(chunk + grads, grads, sums, work)
