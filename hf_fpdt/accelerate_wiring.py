"""
Trainer and Accelerator with sequence parallelism, from unmodified scripts.

accelerate knows sequence parallelism as `ParallelismConfig(sp_size=..., sp_backend="deepspeed")` and takes two objects from
DeepSpeed for it: one that changes the model's attention, one that wraps the data loader. `enable` puts its own in their place,
and adds a callback to Trainer that reads the settings once the Accelerator exists and before anything is prepared. Loops of
one's own have no callback: for them `Accelerator.prepare` is wrapped, and shares under FSDP2 and DDP as well.
"""

import atexit
import os
import sys
import time
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import accelerate.accelerator
import torch.distributed as dist
import transformers
import transformers.trainer
from accelerate import Accelerator
from accelerate.scheduler import AcceleratedScheduler
from accelerate.state import AcceleratorState
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainingArguments

from .config import FPDTConfig
from .engines import (
    check_shares_sequences,
    deepspeed_config,
    gradient_factor,
    replace_sequence_parallelism,
    sequence_parallel_groups,
    zero_stage,
)
from .global_loss import sequence_parallel_loss
from .group_loss import give_group_loss, gives_group_loss
from .modeling import apply_fpdt, config_of, is_streamed, sp_group_of, transformers_model
from .plugin import resolve_settings
from .sharded_loader import ShardedDataLoader, skip_first_batches
from .step_trace import VARIABLE as TRACE
from .step_trace import say_if_unused
from .trainer_import import watch_trainers

_SHARES = "_fpdt_shares_sequences"
_GLOO_ENDS = 0.2  # seconds


def enable() -> None:
    """Makes Trainer and Accelerator of this process use hf_fpdt where a model or a launch configuration asks for it."""
    if FPDTCallback not in transformers.trainer.DEFAULT_CALLBACKS:
        transformers.trainer.DEFAULT_CALLBACKS.append(FPDTCallback)
        transformers.trainer.skip_first_batches = skip_first_batches
    watch_trainers()  # a model of another attention may be streamed when Trainer is made already
    atexit.unregister(_let_gloo_end)
    atexit.register(_let_gloo_end)
    if TRACE in os.environ:
        atexit.unregister(say_if_unused)
        atexit.register(say_if_unused)
    if not hasattr(Accelerator.prepare, _SHARES):
        Accelerator.prepare = _sharing(Accelerator.prepare)
        accelerate.accelerator.skip_first_batches = skip_first_batches  # behind the method of this name


def _let_gloo_end() -> None:
    """
    A thread of gloo lets go of a collective's tensors just after the collective has returned, and needs Python's lock for it.
    One that gets there when the interpreter is ending aborts the process, trained and saved as its model is: PyTorch 2.13 has
    this, where a collective is about the last act. A moment without the lock is all that it takes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        time.sleep(_GLOO_ENDS)


class FPDTCallback(TrainerCallback):
    """Prepares a model for its engine and its sequence-parallel group. Trainer adds it by itself."""

    def on_init_end(self, args, state, control, model=None, **kwargs):
        accelerator = AcceleratorState()
        _check_launch(accelerator)
        sp_size = _sp_size(accelerator)
        if sp_size > 1:
            replace_sequence_parallelism(_Attention, _Loader)
            _check_engine(accelerator, sp_size)
            _check_loss(args, sp_size)
            if zero_stage(accelerator) is None:  # DeepSpeed's models are shared where accelerate prepares them
                share_sequences(model, sp_size)
        elif model is not None and is_streamed(model):
            _set_up(model, accelerator, sp_group_of(model))


def _sharing(original: Callable) -> Callable:
    """
    `Accelerator.prepare` that shares the sequences of the models it is given, if Trainer's callback has not, and of the loaders
    in the same call, as accelerate does under DeepSpeed. A loader that is prepared alone gives whole sequences, for evaluation.
    Learning rate schedulers go on with every batch of a group.
    """

    @wraps(original)
    def prepare(self, *args, **kwargs):
        sp_size = _sp_size(self.state)
        if sp_size == 1:
            return original(self, *args, **kwargs)
        models = [arg for arg in args if isinstance(arg, nn.Module) and not getattr(arg, "_is_accelerate_prepared", False)]
        if models:
            replace_sequence_parallelism(_Attention, _Loader)
        if zero_stage(self.state) is None:  # before they are wrapped or sharded; DeepSpeed's are shared by accelerate
            for model in models:
                if not gives_group_loss(transformers_model(model)):
                    share_sequences(model, sp_size)
        prepared = original(self, *args, **kwargs)
        items = prepared if len(args) > 1 else (prepared,)
        items = tuple(_shared(item, self, with_loader=bool(models)) for item in items)
        return items if len(args) > 1 else items[0]

    setattr(prepare, _SHARES, True)
    return prepare


def _shared(item: Any, accelerator: Accelerator, *, with_loader: bool) -> Any:
    if type(item) is AcceleratedScheduler:
        return _Scheduler(item.scheduler, item.optimizers, item.step_with_optimizer, item.split_batches)
    if not (with_loader and isinstance(item, DataLoader)):
        return item
    groups = sequence_parallel_groups(_sp_size(accelerator.state))
    rank, size = groups.get_sequence_parallel_rank(), groups.get_sequence_parallel_world_size()
    return _Loader(item, rank, groups.get_sequence_parallel_group(), size, accelerator.device)


def share_sequences(model: nn.Module, sp_size: int):
    """
    Streams the model with the settings of the run, its sequences shared by `sp_size` processes.

    Returns:
        DeepSpeed's module with the groups.

    Raises:
        ValueError: for what `apply_fpdt` or the settings refuse, and a group size that does not divide the processes.
    """
    accelerator = AcceleratorState()
    _check_launch(accelerator)
    _check_engine(accelerator, sp_size)
    _check_adapters(model, sp_size)
    groups = sequence_parallel_groups(sp_size)
    group = groups.get_sequence_parallel_group()
    config = _set_up(model, accelerator, group)
    _Loader.chunk_size, factor = config.chunk_size, gradient_factor(accelerator, sp_size)
    give_group_loss(transformers_model(model), factor)
    loss = partial(sequence_parallel_loss, sp_group=group, gradient_factor=factor)
    transformers.trainer.deepspeed_sp_compute_loss = partial(_loss_of_trainer, loss)
    return groups


def _loss_of_trainer(loss, *args: Any, **kwargs: Any):
    """Trainer calls this in place of the loss function that it was given, and tells nobody: so look at the caller."""
    caller = sys._getframe(1).f_locals.get("self")
    if getattr(caller, "compute_loss_func", None) is not None:
        raise ValueError(
            "Trainer(compute_loss_func=...) with shared sequences: Trainer leaves it out, and computes the model's own loss. "
            "Leave compute_loss_func out, or set parallelism_config_sp_size to 1."
        )
    return loss(*args, **kwargs)


def _set_up(model: nn.Module, accelerator: AcceleratorState, group: dist.ProcessGroup | None) -> FPDTConfig:
    base = transformers_model(model)
    handler = getattr(accelerator.parallelism_config, "sp_handler", None)
    config = resolve_settings(config_of(base), handler, deepspeed_config(accelerator).get("fpdt"))
    apply_fpdt(model, config, sp_group=group)
    return config


class _Attention:
    """In place of `UlyssesSPAttentionHF`."""

    @classmethod
    def register_with_transformers(
        cls, model_name_or_path: nn.Module, core_attn_implementation=None, sequence_parallel_size=1, **lengths: Any
    ):
        return share_sequences(model_name_or_path, sequence_parallel_size)


class _Loader(ShardedDataLoader):
    """In place of `UlyssesSPDataLoaderAdapter`: the loader with the model's settings."""

    chunk_size: int | str = "auto"

    def __init__(self, dl, sp_rank, sp_group, sp_world_size, device):
        if isinstance(dl, ShardedDataLoader):
            raise ValueError(
                "Sequence parallelism: this data loader shares its batches already, since it was prepared in one call with the "
                "model. Leave deepspeed_ulysses_dl_adapter out."
            )
        super().__init__(dl, sp_rank, sp_group, sp_world_size, device, chunk_size=type(self).chunk_size)


class _Scheduler(AcceleratedScheduler):
    """
    accelerate's takes a step for every process, since each works on a batch of its own, and a schedule made for the loader's
    length has to end with its epoch. Processes that share sequences are as many times slower: a step for every group.
    """

    def step(self, *args: Any, **kwargs: Any) -> None:
        if self.split_batches or not (self.step_with_optimizer and self.gradient_state.sync_gradients):
            super().step(*args, **kwargs)
            return
        if any(optimizer.step_was_skipped for optimizer in self.optimizers):
            return
        state, total = AcceleratorState(), getattr(self.scheduler, "total_steps", None)
        for _ in range(state.num_processes // _sp_size(state)):
            if total is None or self.scheduler._step_count <= total:  # as accelerate does for OneCycleLR
                self.scheduler.step(*args, **kwargs)


def _sp_size(accelerator: AcceleratorState) -> int:
    config = accelerator.parallelism_config
    return 1 if config is None else config.sp_size


def _check_engine(accelerator: AcceleratorState, sp_size: int) -> None:
    if not hasattr(transformers.trainer, "deepspeed_sp_compute_loss"):
        raise ValueError(
            f"sp_size={sp_size} with transformers {transformers.__version__}: its Trainer has a loss of its own for this, "
            "which cannot be replaced. Use a newer transformers (5.12 and later have been seen to work)."
        )
    check_shares_sequences(accelerator, sp_size)


def _check_adapters(model: nn.Module, sp_size: int) -> None:
    for config in getattr(model, "peft_config", {}).values():
        if getattr(config, "is_prompt_learning", False):
            raise ValueError(
                f"sp_size={sp_size} with {type(config).__name__}: PEFT would put its virtual tokens before every process's "
                "part of a sequence. Use another adapter (LoRA), or set parallelism_config_sp_size to 1."
            )


def _check_loss(args: TrainingArguments, sp_size: int) -> None:
    """Trainer computes the loss of a shared sequence before it comes to its own label smoothing."""
    if args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor={args.label_smoothing_factor} with sp_size={sp_size}: Trainer smooths no labels of shared "
            "sequences. Set label_smoothing_factor=0, or parallelism_config_sp_size to 1."
        )


def _check_launch(accelerator: AcceleratorState) -> None:
    """DeepSpeed on a CPU without gloo trains copies that never meet: each process believes to be alone."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise RuntimeError(
            f"{launched} processes were started, and accelerate knows of {accelerator.num_processes}: each would train a copy "
            "of its own. On CPUs pass --ddp_backend gloo to the script (with DeepSpeed), or --use_cpu (with DDP)."
        )
