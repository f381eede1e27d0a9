"""
One point of `train_step.py`, in a process of its own: `python -m benchmarks.point SPEC` with a `Spec` as JSON.

It imports first, makes no CUDA context, and waits for a line on standard input; without one it ends. Its last line of output is
`{"row": ...}`.
"""

import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial

from .shapes import LLAMA_SHAPES, QWEN_SHAPES, SHAPES
from .without import NOTHING, parsed, switched_off

CONTENDERS = ("sdpa", "liger", "alst", "fpdt", "fpdt+liger")  # see contenders.py
PEAK_BF16 = {"NVIDIA H200": 989e12, "NVIDIA H100 80GB HBM3": 989e12}  # dense, datasheet
ANY_SHAPE = ("sdpa", "fpdt")  # the others replace parts of Llama
_REFUSALS = ("DeviceMemoryError", "HostMemoryError")  # of hf_fpdt: a step that does not fit is not started


@dataclass(frozen=True, kw_only=True)
class Spec:
    """
    What to measure; the fields are the options of `train_step.py`.

    Raises:
        ValueError: for what cannot be measured, naming the option.
    """

    contender: str
    seq_len: int
    shape: str
    layers: int
    repeats: int = 2
    fpdt: dict = field(default_factory=dict)
    optimizer: str = "none"
    lora: int = 0
    documents: int = 1
    window: int = 0
    ballast_layers: int = 0
    ballast_gpu_gib: float = 0.0
    ballast_host_gib: float = 0.0
    ballast_kept: bool = False
    grad_norms: bool = False
    without: str = NOTHING
    copies: int = 1
    device: str = "cuda"

    def __post_init__(self):
        if self.contender not in CONTENDERS:
            raise ValueError(f"--contenders: got {self.contender!r}; one of {', '.join(CONTENDERS)} is needed.")
        if self.shape not in SHAPES:
            raise ValueError(f"--shape {self.shape}: one of {', '.join(SHAPES)} is needed.")
        known = (*ANY_SHAPE, *(("liger", "fpdt+liger") if self.shape in QWEN_SHAPES else ()))
        if self.shape not in LLAMA_SHAPES and (self.contender not in known or self.lora or self.window):
            raise ValueError(
                f"--shape {self.shape} with --contenders {self.contender}, --lora {self.lora}, --window {self.window}: Liger, "
                f"ALST, adapters and windows know Llama's modules, and Liger Qwen3's; take {' or '.join(known)} without the "
                "last two."
            )
        if self.layers < 1 or self.repeats < 0 or self.seq_len < 2:
            raise ValueError(f"got {self.row()}, repeats {self.repeats}: one layer, no repeat and two tokens are the least.")
        if min(self.lora, self.ballast_layers, self.ballast_gpu_gib, self.ballast_host_gib) < 0:
            raise ValueError("--lora, --ballast-layers, --ballast-gpu-gib and --ballast-host-gib must not be negative.")
        if self.documents < 1 or self.seq_len % self.documents or (self.documents > 1 and self.contender == "alst"):
            raise ValueError(
                f"--documents {self.documents} with {self.contender} and {self.seq_len} tokens: a row is cut into equal "
                "documents, at least one; alst keeps no documents apart."
            )
        if self.window < 0 or (self.window and self.documents > 1):
            raise ValueError(f"--window {self.window} with --documents {self.documents}: one of them, and not negative.")
        if self.ballast_host_gib and not self.contender.startswith("fpdt"):
            raise ValueError(
                f"--ballast-host-gib with {self.contender}: only hf_fpdt locks host memory; name fpdt contenders only."
            )
        ours = self.contender.startswith("fpdt")
        if self.copies < 1 or ((parsed(self.without) or self.copies > 1) and not ours):
            raise ValueError(
                f"--without {self.without}, --copies {self.copies} with {self.contender}: these are of hf_fpdt, and a copy is "
                "made once at least; name fpdt contenders only."
            )
        if self.ballast_kept and (self.lora or self.ballast_gpu_gib or not self.ballast_layers):
            raise ValueError(
                f"--ballast-kept with --lora {self.lora}, --ballast-layers {self.ballast_layers} and --ballast-gpu-gib "
                f"{self.ballast_gpu_gib}: it takes the place of the last, for --ballast-layers that are trained in full."
            )

    def row(self) -> dict:
        """The part of a row that is known before the point runs."""
        row = {name: getattr(self, name) for name in ("contender", "seq_len", "layers", "shape", "optimizer", "lora")}
        row |= {"documents": self.documents} if self.documents > 1 else {}
        row |= {"window": self.window} if self.window else {}
        row |= {"ballast_layers": self.ballast_layers} if self.ballast_layers else {}
        row |= {"without": self.without} if self.without != NOTHING else {}
        row |= {"copies": self.copies} if self.copies > 1 else {}
        return row | ({"fpdt": self.fpdt} if self.contender.startswith("fpdt") else {})


def main(how: Callable[["Spec"], dict] | None = None):
    """Runs the point that the command line names, with `how` instead of `measure` if given."""
    spec = Spec(**json.loads(sys.argv[1]))
    import torch

    from . import ballast, contenders  # noqa: F401

    contenders.prepare(spec.contender, spec.lora)
    early = _has_context(torch)
    if not sys.stdin.readline():
        return
    try:
        row = (how or measure)(spec)
    except Exception as error:
        if not is_memory_shortage(error):
            raise
        row = {"out_of_memory": True, "why": str(error)[:800]}
    if early:
        row["context_before_go"] = True  # its memory was missing to the point before
    print(json.dumps({"row": row}), flush=True)


def measure(spec: Spec) -> dict:
    """The row of a point: one warm-up step, then `spec.repeats` timed ones; with none, the first is the one measured."""
    if not spec.contender.startswith("fpdt"):
        return _measured(spec)
    with switched_off(spec.without, spec.copies):
        return _measured(spec)


def _measured(spec: Spec) -> dict:
    import torch

    from .ballast import hold, kept_bytes
    from .contenders import build
    from .shapes import head_dim, model_config, step_flops

    config = model_config(spec.shape, spec.layers, spec.window)
    kind = {"device": spec.device, "lora": spec.lora, "documents": spec.documents}
    model, forward_backward = build(spec.contender, config, spec.fpdt, **kind)
    fills = (spec.ballast_gpu_gib, spec.ballast_host_gib)
    if spec.ballast_kept:
        layer = kept_bytes(config, spec.contender, spec.fpdt) * spec.seq_len
        fills = (spec.ballast_layers * layer / 2**30, spec.ballast_host_gib)
    held = hold(model, spec.ballast_layers, spec.optimizer == "adamw", *fills)
    generator = torch.Generator(device=spec.device).manual_seed(1)
    ids = torch.randint(0, config.vocab_size, (1, spec.seq_len), device=spec.device, generator=generator)
    optimizer = _optimizer(spec.optimizer, model)
    step = partial(_step, model, forward_backward, optimizer, ids, spec.device)
    first_step_s, first_loss = step()
    if spec.device == "cuda" and spec.repeats:
        torch.cuda.reset_peak_memory_stats()
    moved = _moved_bytes(spec.device)
    later = [step() for _ in range(spec.repeats)]
    moved = (_moved_bytes(spec.device) - moved) / spec.repeats if spec.repeats else moved
    seconds = [seconds for seconds, _ in later] or [first_step_s]
    median = statistics.median(seconds)
    losses = [first_loss, *(loss for _, loss in later)]
    row = {"first_step_s": first_step_s, "step_s": median, "all_steps_s": seconds}
    row |= {"loss": losses[-1], "losses": losses, "tokens_per_s": spec.seq_len / median}
    row |= _memory(spec, model, optimizer, held) | _predicted(model)
    kind = {"frozen": spec.lora > 0, "documents": spec.documents, "window": spec.window}
    row |= _speed(spec, step_flops(config, spec.seq_len, **kind) / median)
    if spec.contender.startswith("fpdt"):
        row |= {"kernel": _kernel(spec, head_dim(config)), "moved_gib": moved / 2**30}
    if spec.ballast_layers or any(fills):
        row["ballast"] = held.row()
    if spec.grad_norms:
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        row["grad_norms"] = {name: grad.float().norm().item() for name, grad in grads.items()}
    if not all(map(math.isfinite, losses)):
        row["error"] = f"losses {losses} are not all finite"
    return row


def is_memory_shortage(error: Exception) -> bool:
    """Out of memory in any library, or hf_fpdt's refusal of a step that does not fit."""
    return (
        type(error).__name__ in (*_REFUSALS, "OutOfMemoryError")
        or "out of memory" in str(error).lower()
        or "CUBLAS_STATUS_ALLOC_FAILED" in str(error)
    )


def _optimizer(name: str, model):
    import torch

    if name == "none":
        return None
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)


def _step(model, forward_backward, optimizer, ids, device: str) -> tuple[float, float]:
    """Seconds of one step from no gradients, and its loss."""
    for parameter in model.parameters():
        parameter.grad = None

    def work():
        loss = forward_backward(ids)
        if optimizer is not None:
            optimizer.step()
        return loss

    if device == "cuda":
        return _timed_on_gpu(work)
    started = time.perf_counter()
    loss = work()
    return time.perf_counter() - started, loss.item()


def _timed_on_gpu(work) -> tuple[float, float]:
    import torch

    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    loss = work()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / 1e3, loss.item()


def _memory(spec: Spec, model, optimizer, held) -> dict:
    """In GiB. Weights and gradients, optimizer states and ballast are counted by tensor: they are there in every step."""
    import torch

    states = [] if optimizer is None else [t for s in optimizer.state.values() for t in s.values() if torch.is_tensor(t)]
    weights = list(model.parameters())
    weights_and_grads = _gib([*weights, *(p.grad for p in weights if p.grad is not None)])
    row = {"weights_and_grads_gib": weights_and_grads, "optimizer_gib": _gib(states), "host_gib": _host_gib(spec.device)}
    if spec.device == "cuda":  # nothing counts a CPU's peak
        peak = torch.cuda.max_memory_allocated() / 2**30
        above = peak - weights_and_grads - row["optimizer_gib"] - held.device_bytes / 2**30
        row |= {"peak_gib": peak, "peak_above_gib": above, "reserved_gib": torch.cuda.max_memory_reserved() / 2**30}
    return row


def _gib(tensors) -> float:
    return sum(t.numel() * t.element_size() for t in tensors) / 2**30


def _host_gib(device: str) -> float:
    """What hf_fpdt locked, ballast included."""
    if "hf_fpdt.transfers" not in sys.modules:
        return 0.0
    return sys.modules["hf_fpdt.transfers"].transfers_for(_one(device)).arena.locked_bytes / 2**30


def _moved_bytes(device: str) -> int:
    """What hf_fpdt has copied between host and GPU so far, both ways."""
    if "hf_fpdt.transfers" not in sys.modules:
        return 0
    return sys.modules["hf_fpdt.transfers"].transfers_for(_one(device)).moved_bytes


def _predicted(model) -> dict:
    """
    The plan that hf_fpdt's steps followed, and its peaks in GiB: of GPU memory from what was there before the first step, so
    without the states of an optimizer.
    """
    plans = [plan for module in model.modules() for plan in module.__dict__.get("_fpdt_plans", {}).values()]
    if not plans or plans[-1].peaks is None:
        return {}
    peaks = plans[-1].peaks
    row = {f"predicted_{name}_gib": size / 2**30 for name, size in (("peak", peaks.device), ("host", peaks.host))}
    return row | ({"predicted_disk_gib": peaks.disk / 2**30} if peaks.disk else {}) | {"plan": str(plans[-1]).splitlines()}


def _speed(spec: Spec, flops_per_s: float) -> dict:
    import torch

    gpu = torch.cuda.get_device_name() if spec.device == "cuda" else "none (CPU)"
    row = {"model_tflops": flops_per_s / 1e12, "gpu": gpu}
    return row | ({"causal_mfu": flops_per_s / PEAK_BF16[gpu]} if gpu in PEAK_BF16 else {})


def _kernel(spec: Spec, head_dim: int) -> str:
    import torch

    from hf_fpdt.kernel_choice import choose_kernel

    sizes = (torch.bfloat16, head_dim, head_dim, frozenset(["window"] if spec.window else []))
    return choose_kernel(spec.fpdt.get("kernel", "auto"), _one(spec.device), *sizes).name


def _one(device: str):
    import torch

    return torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device(device)


def _has_context(torch) -> bool:
    """Whether this process holds memory of the GPU already."""
    return torch.cuda.is_initialized() and torch._C._cuda_hasPrimaryContext(0)


def command(spec: Spec, module: str = "benchmarks.point") -> list[str]:
    """The command line of a point."""
    return [sys.executable, "-m", module, json.dumps(asdict(spec))]


if __name__ == "__main__":
    main()
