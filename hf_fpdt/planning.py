"""`hf_fpdt.plan`: what a training step would do and take, without running one."""

from functools import partial

import torch
import transformers
from torch import nn

from .attention_interface import NAME
from .config import FPDTConfig
from .head_exchange import NoExchange
from .host_arena import HostMemoryError
from .instance_forward import inner_forward
from .layer_wiring import wire, without_checkpointing
from .model_plan import layout_of, new_plan
from .modeling import apply_fpdt, config_of, measure, restore, streamed_models, transformers_model
from .rates import load, of_this_machine
from .step_plan import DeviceMemoryError, Plan, Timing


def plan(
    model: nn.Module,
    *,
    seq_len: int,
    batch_size: int = 1,
    config: FPDTConfig | None = None,
    rates: str | None = None,
    fused: bool = False,
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

    Returns:
        `Plan`, with `chunk_size`, `placements`, `peaks` (`peaks.device`, `peaks.host`, `peaks.disk` in bytes) and `time`
        (`time.total`, seconds of forward and backward).

    Raises:
        DeviceMemoryError, HostMemoryError: if no plan fits.
        ValueError: for a model that cannot be streamed, sizes below the least, rates that are not there, or a meta model
            without `gpu_memory`.
    """
    for name, value, least in (("seq_len", seq_len, 2), ("batch_size", batch_size, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"plan({name}={value!r}): {name} must be a whole number, at least {least}.")
    base = transformers_model(model)
    config = config or config_of(base)
    if base.device.type == "meta" and config.gpu_memory == "auto":
        raise ValueError(
            'plan(model on the meta device, gpu_memory="auto"): there is no GPU to ask. Pass '
            "config=FPDTConfig(gpu_memory=bytes)."
        )
    found = of_this_machine() if rates is None else load(rates)
    timing = None
    if found is not None and base.dtype.itemsize == 2:
        timing = Timing(found, fused or _has_fused_kernels(base))
    previous = base.config._attn_implementation
    try:
        if previous != NAME:
            apply_fpdt(base, config)
        return _plan(base, config, batch_size, seq_len, timing)
    finally:
        if previous != NAME:
            restore(base)


def _has_fused_kernels(model: nn.Module) -> bool:
    return any(type(module).__module__.startswith("liger_kernel.") for module in model.modules())


def _plan(base: nn.Module, config: FPDTConfig, batch_size: int, seq_len: int, timing: Timing | None) -> Plan:
    owner, layers = streamed_models(base)[0]
    wire(owner, layers)
    head = base.get_output_embeddings()
    head = head if isinstance(getattr(head, "out_features", None), int) else None
    ids = torch.zeros((), dtype=torch.int64, device=base.device).expand(batch_size, seq_len)
    # With a mask transformers does not look at the positions' values, which a meta model has none of.
    arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    with torch.enable_grad(), without_checkpointing(layers):
        run = partial(measure, inner_forward(owner), arguments, seq_len)
        try:
            return new_plan(owner, layers, head, ids, config, run, layout_of(ids, config, 1), NoExchange(), timing)
        except (RuntimeError, NotImplementedError) as error:
            if base.device.type != "meta" or isinstance(error, HostMemoryError | DeviceMemoryError):
                raise
            raise ValueError(
                f"{type(base).__name__} cannot run on the meta device with transformers {transformers.__version__}: "
                f"{str(error).splitlines()[0]}. Use a newer transformers, or plan with the model on a GPU, or on the CPU."
            ) from error
