"""`hf_fpdt.plan`: what a training step would do and take, without running one."""

from functools import partial

import torch
import transformers
from torch import nn

from .attention_interface import NAME
from .config import FPDTConfig
from .engine_memory import Engine
from .head_exchange import MeasuredExchange, NoExchange
from .host_arena import HostMemoryError
from .instance_forward import inner_forward
from .layer_wiring import wire, without_checkpointing
from .model_plan import device_type_of, new_plan
from .modeling import apply_fpdt, config_of, measure, restore, streamed_models, transformers_model
from .rates import load, of_this_machine
from .sequence_layout import SequenceLayout
from .step_plan import DeviceMemoryError, Plan, Timing


def plan(
    model: nn.Module,
    *,
    seq_len: int,
    batch_size: int = 1,
    config: FPDTConfig | None = None,
    rates: str | None = None,
    fused: bool = False,
    gpus: int = 1,
    sp_size: int | None = None,
    zero: int | None = None,
) -> Plan:
    """
    The plan that a training step on `batch_size` sequences of `seq_len` tokens would follow: where every layer waits for its
    backward, the chunk size, and the predicted peaks of GPU and host memory. `print` it for a table.

    Nothing is trained and nothing of that length exists: a few hundred tokens go through the model to measure its layers. The
    model may be on a GPU, where the plan is the one that training uses, or on the meta device (`torch.device("meta")`), where
    `gpu_memory` says how large the GPU is.

    Args:
        model (`PreTrainedModel` or a PEFT model around one): as for `apply_fpdt`; trainable weights as in the run.
        seq_len (`int`): tokens of one sequence, at least 2.
        batch_size (`int`, *optional*, defaults to 1): sequences of one step, at least 1.
        config (`FPDTConfig`, *optional*): the settings; by default those of the model.
        rates (`str`, *optional*): the GPU whose rates tell the step's time, `"h200"`, or a file that `hf-fpdt bench --out`
            wrote; by default those of this machine's GPU, if they are known. They are of 16-bit weights: a model in float32
            is given no time.
        fused (`bool`, *optional*, defaults to `False`): predict the time as with Liger's kernels, which a model on the meta
            device cannot run. Those in a model on a GPU are seen without.
        gpus (`int`, *optional*, defaults to 1): processes that train together under DeepSpeed, with AdamW; the plan is that of
            one of them. `config.host_memory` is that of one process; by default what this machine has, shared by up to 8.
        sp_size (`int`, *optional*): of them share every sequence; by default all.
        zero (`int`, *optional*): the ZeRO stage, 2 or 3; by default 3 if there are several GPUs.

    Returns:
        `Plan`, with `chunk_size`, `placements`, `peaks` (`peaks.device`, `peaks.host`, `peaks.disk` in bytes) and `time`
        (`time.total`, seconds of forward and backward). With ZeRO-3 nothing is chosen: what the backward needs waits on the
        host, unless `config` says otherwise.

    Raises:
        DeviceMemoryError, HostMemoryError: if no plan fits.
        ValueError: for a model that cannot be streamed, sizes below the least, rates that are not there, a meta model
            without `gpu_memory`, or heads and GPUs that the group's size does not divide.
    """
    _check_counts(seq_len=(seq_len, 2), batch_size=(batch_size, 1), gpus=(gpus, 1))
    base = transformers_model(model)
    engine = engine_of(base, gpus, sp_size, zero)
    config = _checked(config or config_of(base), base.device, engine)
    found = of_this_machine() if rates is None else load(rates)
    timed = found is not None and base.dtype.itemsize == 2
    timing = Timing(found, fused or _has_fused_kernels(base)) if timed else None
    previous = base.config._attn_implementation
    try:
        if previous != NAME:
            apply_fpdt(base, config)
        return _plan(base, config, batch_size, seq_len, timing, engine)
    finally:
        if previous != NAME:
            restore(base)


def _check_counts(**counts: tuple[int, int]) -> None:
    for name, (value, least) in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"plan({name}={value!r}): {name} must be a whole number, at least {least}.")


def _checked(config: FPDTConfig, device: torch.device, engine: Engine | None) -> FPDTConfig:
    if device.type == "meta" and config.gpu_memory == "auto":
        raise ValueError(
            'plan(model on the meta device, gpu_memory="auto"): there is no GPU to ask. Pass '
            "config=FPDTConfig(gpu_memory=bytes)."
        )
    if engine is not None and config.optimizer_memory != "auto":
        raise ValueError(
            f"plan(gpus={engine.gpus}, zero={engine.zero}) with FPDTConfig(optimizer_memory={config.optimizer_memory}): under "
            'DeepSpeed fp32 weights and an AdamW state are counted, in pieces on the GPUs. Leave optimizer_memory="auto".'
        )
    return config


def engine_of(model: nn.Module, gpus: int, sp_size: int | None, zero: int | None) -> Engine | None:
    """What `plan` would be for; None for one process without DeepSpeed. Arguments and errors are those of `plan`."""
    if gpus == 1 and zero is None:
        if sp_size not in (None, 1):
            raise ValueError(f"plan(gpus=1, sp_size={sp_size}): sp_size is how many of the GPUs share a sequence. Give gpus.")
        return None
    if model.dtype.itemsize != 2:
        raise ValueError(
            f"plan(gpus={gpus}, zero={zero}) of a model in {model.dtype}: plans for DeepSpeed are of weights in 16 bits with "
            "fp32 ones in the optimizer, as mixed_precision: bf16 makes them. Load the model in bfloat16."
        )
    return Engine(gpus, gpus if sp_size is None else sp_size, 3 if zero is None else zero)


def _has_fused_kernels(model: nn.Module) -> bool:
    return any(type(module).__module__.startswith("liger_kernel.") for module in model.modules())


def _plan(
    base: nn.Module, config: FPDTConfig, batch_size: int, seq_len: int, timing: Timing | None, engine: Engine | None
) -> Plan:
    ranks = 1 if engine is None else engine.sp_size
    exchange = NoExchange() if ranks == 1 else MeasuredExchange(ranks, 0, most_groups=1)  # over NVLink heads go in one group
    kind = device_type_of(base.device)
    setting = config.chunk_size
    layout = SequenceLayout.of(seq_len, setting=setting, batch_size=batch_size, device_type=kind, sp_size=ranks)
    owner, layers = streamed_models(base)[0]
    wire(owner, layers)
    head = base.get_output_embeddings()
    head = head if isinstance(getattr(head, "out_features", None), int) else None
    ids = torch.zeros((), dtype=torch.int64, device=base.device).expand(batch_size, layout.local_len)
    # With a mask transformers does not look at the positions' values, which a meta model has none of.
    arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    with torch.enable_grad(), without_checkpointing(layers):
        run = partial(measure, inner_forward(owner), arguments, layout.local_len)
        try:
            return new_plan(owner, layers, head, ids, config, run, layout, exchange, timing=timing, engine=engine)
        except (RuntimeError, NotImplementedError) as error:
            if base.device.type != "meta" or isinstance(error, HostMemoryError | DeviceMemoryError):
                raise
            raise ValueError(
                f"{type(base).__name__} cannot run on the meta device with transformers {transformers.__version__}: "
                f"{str(error).splitlines()[0]}. Use a newer transformers, or plan with the model on a GPU, or on the CPU."
            ) from error
