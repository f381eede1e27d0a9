"""How many seconds a point is expected to take: from its operations, and from what was measured on H200s, which H100s equal."""

import shlex

from benchmarks import shared_step, train_step
from benchmarks.ballast import kept_bytes
from benchmarks.paper.spread import Job
from benchmarks.point import Spec
from benchmarks.shapes import GPT_SHAPES, kv_dim, model_config, query_dim, step_flops
from benchmarks.shared_point import SharedSpec

H100_GIB, H200_GIB = 79.0, 139.0  # what CUDA has of them
COMMAND_S = 20  # the first process of a command imports while nothing runs
TRY_S = 12  # the same of a point that depends on the one before, so that no process is started ahead
_PEAK = 989e12
_REFUSED_S = 15  # a point that is out of memory before its step
_RATE = {"sdpa": 0.33, "liger": 0.36, "alst": 0.24, "ulysses": 0.22, "ulysses+liger": 0.34, "tensor": 0.34, "ring": 0.3}
_OURS = 0.46
_GPT = 0.8  # of that: heads of 80, and norms and activations that are not fused
_START_S = {"sdpa": 6, "liger": 9, "alst": 8}
_OUR_START_S = 22  # compiles kernels, measures, locks memory; with others beside it on the host
_UNCOMPILED_START_S = 10  # the same with a kernel that is there
_LAUNCH_S = 28  # of several processes, with the engine


def seconds_of(spec: Spec | SharedSpec, gpu_gib: float = H100_GIB) -> float:
    """Of a whole point, for a GPU of that size: its step takes `1 + repeats` times what its operations take."""
    shared = isinstance(spec, SharedSpec)
    if not shared and least_gib(spec) > gpu_gib:
        return _REFUSED_S
    ours = spec.contender.startswith("fpdt")
    rate = (_OURS if ours else _RATE[spec.contender]) * (_GPT if spec.shape in GPT_SHAPES else 1)
    step = step_flops(model_config(spec.shape, spec.layers), spec.seq_len) / (_PEAK * rate) / (spec.gpus if shared else 1)
    if ours and spec.fpdt.get("save_attention") is False:
        step *= 1.3
    start = _LAUNCH_S if shared else 0
    if ours:
        compiled = spec.fpdt.get("kernel", "auto") in ("auto", "flash_attention_4")
        start += _OUR_START_S if compiled else _UNCOMPILED_START_S
    else:
        start += _START_S.get(spec.contender, 8)
    locked = getattr(spec, "ballast_host_gib", 0.0) / 2  # seconds: 2 GiB of host memory are locked in one
    return start + locked + (1 + spec.repeats) * step


def least_gib(spec: Spec) -> float:
    """GPU memory that a point needs in any case: weights and gradients of all its layers, and what is held for absent ones."""
    config = model_config(spec.shape, spec.layers)
    matrices = 2 if spec.shape in GPT_SHAPES else 3
    layer = config.hidden_size * (2 * query_dim(config) + 2 * kv_dim(config) + matrices * config.intermediate_size)
    ends = config.hidden_size * config.vocab_size * (1 if config.tie_word_embeddings else 2)
    held = spec.ballast_layers * kept_bytes(config, spec.contender, spec.fpdt) * spec.seq_len if spec.ballast_kept else 0
    return (4 * ((spec.layers + spec.ballast_layers) * layer + ends) + held) / 2**30 + spec.ballast_gpu_gib


def job_of(module: str, words: list[str], gpu_gib: float = H100_GIB) -> Job:
    """
    The command of `train_step` or `shared_step` with these options, and the seconds of all its points, one after the other.

    Raises:
        ValueError: for a command that would be refused.
    """
    how = {"train_step": train_step, "shared_step": shared_step}[module]
    specs = how.specs_of(how._arguments(words))
    seconds = COMMAND_S + sum(seconds_of(spec, gpu_gib) for spec in specs)
    gpus = max((getattr(spec, "gpus", 1) for spec in specs), default=1)
    return Job(shlex.join(["python", "-m", f"benchmarks.{module}", *words]), round(seconds), gpus)
