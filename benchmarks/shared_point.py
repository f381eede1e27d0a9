"""
One point of `shared_step.py`, started on every GPU by its launcher: `... -m benchmarks.shared_point SPEC`, with a `SharedSpec`
as JSON. Rank 0, and a rank that fails, prints `{"row": ...}`.

`fpdt`, `fpdt+liger`   hf_fpdt, as a loop of one's own with Accelerator gets it: ZeRO-3, sequences shared.
`ulysses`              accelerate's own sequence parallelism (DeepSpeed's Ulysses), ZeRO-3, cuDNN SDPA, with what ALST adds:
                       tiled MLP, tiled loss, checkpoints offloaded to host memory.
`ulysses+liger`        the same without ALST's part: Liger's kernels and loss, activation checkpointing.
`tensor`               tensor and sequence parallelism as in Megatron, on torch's plans (`tensor_parallel.py`), with cuDNN SDPA
                       and Liger's kernels, activation checkpointing.
`ring`                 torch's context parallelism over FSDP2 with cuDNN SDPA, Liger's kernels and loss, activation
                       checkpointing.
"""

import json
import math
import os
import statistics
import sys
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from .point import PEAK_BF16, _predicted, is_memory_shortage
from .shapes import GPT_SHAPES, LLAMA_SHAPES, SHAPES
from .shared_trace import traced

CONTENDERS = ("fpdt", "fpdt+liger", "ulysses", "ulysses+liger", "ring", "tensor")
_CLASSES = {name: name for name in CONTENDERS[:2]} | {"ulysses": "alst"} | dict.fromkeys(CONTENDERS[3:], "liger")
WITHOUT_ENGINE = ("ring", "tensor")  # started by torchrun, without DeepSpeed


@dataclass(frozen=True, kw_only=True)
class SharedSpec:
    """
    What to measure; the fields are the options of `shared_step.py`.

    Raises:
        ValueError: for what cannot be measured, naming the option.
    """

    contender: str
    gpus: int
    seq_len: int
    shape: str
    layers: int
    repeats: int = 2
    fpdt: dict = field(default_factory=dict)
    zero: dict = field(default_factory=dict)
    trace: bool = False
    device: str = "cuda"

    def __post_init__(self):
        if self.contender not in CONTENDERS:
            raise ValueError(f"--contenders: got {self.contender!r}; one of {', '.join(CONTENDERS)} is needed.")
        if self.shape not in SHAPES:
            raise ValueError(f"--shape {self.shape}: one of {', '.join(SHAPES)} is needed.")
        if self.shape in GPT_SHAPES and self.contender != "fpdt":
            raise ValueError(f"--shape {self.shape} with --contenders {self.contender}: only fpdt knows others than Llama's.")
        if self.shape not in LLAMA_SHAPES and self.contender in ("ulysses", "tensor"):
            raise ValueError(f"--shape {self.shape} with --contenders {self.contender}: it knows Llama's modules only.")
        if min(self.layers, self.gpus) < 1 or self.repeats < 0 or self.seq_len < 2:
            raise ValueError(f"got {asdict(self)}: one layer, one GPU, no repeat and two tokens are the least.")
        if self.gpus == 1 and not self.contender.startswith("fpdt"):
            raise ValueError(f"--contenders {self.contender} on one GPU shares nothing; train_step.py measures one GPU.")
        if self.contender == "tensor":
            self._check_split()

    def _check_split(self):
        shape = SHAPES[self.shape]
        whole = {"tokens": self.seq_len, "heads of K": shape["num_key_value_heads"], "vocabulary": shape["vocab_size"]}
        odd = {name: size for name, size in whole.items() if size % self.gpus}
        if odd or shape["tie_word_embeddings"]:
            raise ValueError(
                f"--contenders tensor with --gpus {self.gpus}, --shape {self.shape} and {odd or 'a tied head'}: tokens, heads "
                "and vocabulary that the number of GPUs divides and a head of its own are needed."
            )

    def row(self) -> dict:
        """The part of a row that is known before the point runs."""
        row = {name: getattr(self, name) for name in ("contender", "gpus", "seq_len", "layers", "shape")}
        row |= {"fpdt": self.fpdt} if self.contender.startswith("fpdt") else {}
        return row | ({"zero": self.zero} if self.zero else {})


def main(how: Callable[["SharedSpec"], dict] | None = None):
    """Runs the point that the command line names, with `how` instead of `measure` if given."""
    spec = SharedSpec(**json.loads(sys.argv[1]))
    import torch

    from .contenders import prepare

    if spec.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        prepare(_CLASSES[spec.contender])  # Liger and what ALST changes run on GPUs only
    try:
        row = (how or measure)(spec)
    except Exception as error:
        row = {"error": "".join(traceback.format_exception(error))[-1500:]}
        if is_memory_shortage(error):
            row = {"out_of_memory": True, "why": str(error)[:800]}
    failed = "error" in row or "out_of_memory" in row
    if int(os.environ["RANK"]) == 0 or failed:
        print(json.dumps({"row": row}), flush=True)
    # At once: the other ranks may wait for this one, and then for their launcher.
    os._exit(1 if failed and "step_s" not in row else 0)


def measure(spec: SharedSpec) -> dict:
    """The row of a point: one warm-up step, then `spec.repeats` timed ones; with none, the first is the one measured."""
    import torch
    import torch.distributed as dist

    from .shapes import model_config, step_flops

    config = model_config(spec.shape, spec.layers)
    step = build(spec, config)
    timed = partial(_timed, step, spec.device)
    first_step_s, first_loss = timed()
    if spec.device == "cuda" and spec.repeats:
        torch.cuda.reset_peak_memory_stats()
    later = [timed() for _ in range(spec.repeats)]
    seconds = [seconds for seconds, _ in later] or [first_step_s]
    losses = [first_loss, *(loss for _, loss in later)]
    median = statistics.median(seconds)
    row = {"first_step_s": first_step_s, "step_s": median, "all_steps_s": seconds, "losses": losses}
    row |= {"loss": losses[-1], "tokens_per_s": spec.seq_len / median, "engine": step.engine()}
    row |= _memory(spec.device)
    flops = step_flops(config, spec.seq_len) / median / spec.gpus
    row["gpu"] = torch.cuda.get_device_name() if spec.device == "cuda" else "none (CPU)"
    row |= {"model_tflops": flops / 1e12, "causal_mfu": flops / PEAK_BF16.get(row["gpu"], math.inf)}
    row |= step.predicted()
    if spec.trace:
        row["trace"] = traced(step)
    if not all(map(math.isfinite, losses)):
        row["error"] = f"losses {losses} are not all finite"
    dist.barrier()
    return row


@dataclass
class _Step:
    """Calling it runs a whole step, optimizer included, and returns the loss of the whole sequence."""

    run: Callable
    engine: Callable[[], dict]
    model: Any
    predicted: Callable[[], dict] = dict

    def __call__(self):
        return self.run()


def build(spec: SharedSpec, config) -> _Step:
    """The step of a contender, after `prepare`."""
    return {"ring": _ring, "tensor": _tensor}.get(spec.contender, _accelerated)(spec, config)


def _accelerated(spec: SharedSpec, config) -> _Step:
    """A loop of one's own: `Accelerator.prepare` under the launcher's configuration. Learning rate 0."""
    import torch
    from accelerate import Accelerator, InitProcessGroupKwargs

    from .contenders import _model

    backend = InitProcessGroupKwargs(backend="nccl" if spec.device == "cuda" else "gloo")
    accelerator = Accelerator(kwargs_handlers=[backend])
    accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"] |= spec.zero
    ours = spec.contender.startswith("fpdt")
    if ours:
        import hf_fpdt

        os.environ |= {f"FPDT_{name.upper()}": str(value) for name, value in spec.fpdt.items()}
    model = _model(config, "fpdt" if ours else "sdpa", spec.device)
    if ours and spec.gpus == 1:
        hf_fpdt.apply_fpdt(model, hf_fpdt.FPDTConfig(**spec.fpdt))
    elif not ours:
        model.gradient_checkpointing_enable({"use_reentrant": spec.contender == "ulysses"})
    if spec.contender == "ulysses":
        model.enable_input_require_grads()
    ids = torch.randint(0, config.vocab_size, (spec.seq_len,), generator=torch.Generator().manual_seed(1))
    row = {"input_ids": ids, "labels": ids, "position_ids": torch.arange(spec.seq_len)}
    loader = torch.utils.data.DataLoader([row] * 64 * spec.gpus, batch_size=1)
    model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0), loader)
    batches = iter(loader)

    def run():
        with _kernel(spec):
            batch = {name: value.to(accelerator.device) for name, value in next(batches).items()}
            loss = _loss(spec, accelerator, model, batch)
            accelerator.backward(loss)
            optimizer.step()
        return _whole(loss.detach()) if spec.contender == "ulysses" else loss.detach()

    def engine() -> dict:
        norm = model.get_global_grad_norm()
        return {"zero_stage": model.zero_optimization_stage(), "grad_norm": None if norm is None else float(norm)}

    return _Step(run, engine, model, lambda: _predicted(model))


def _loss(spec: SharedSpec, accelerator, model, batch):
    import transformers.trainer

    if spec.contender == "ulysses":
        return _tiled_loss(model, batch, spec.seq_len)
    if spec.gpus == 1:
        return model(**batch).loss
    loss_of = transformers.trainer.deepspeed_sp_compute_loss  # looked up after prepare: hf_fpdt's, or transformers' own
    return loss_of(accelerator, model, dict(batch), False, accelerator.parallelism_config)


def _tiled_loss(model, batch, seq_len: int):
    """This rank's part of the mean over the sequence."""
    import torch
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss

    def loss_of_tile(module, hidden, targets):
        return torch.nn.functional.cross_entropy(module.lm_head(hidden).float(), targets, reduction="sum")

    module, labels = model.module, batch["shift_labels"]
    hidden = module.model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).last_hidden_state
    tiles = math.ceil(labels.shape[1] / 8192)
    weights = [module.lm_head.weight]
    return TiledFusedLogitsLoss.apply(loss_of_tile, module, hidden, labels, None, tiles, weights, "sum") / (seq_len - 1)


def _ring(spec: SharedSpec, config) -> _Step:
    """FSDP2 over all GPUs, and every sequence split over them. Learning rate 0."""
    import torch
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.experimental import context_parallel

    from .contenders import _model

    dist.init_process_group("nccl" if spec.device == "cuda" else "gloo")
    mesh = dist.device_mesh.init_device_mesh(spec.device, (spec.gpus,), mesh_dim_names=("cp",))
    model = _model(config, "sdpa", spec.device)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in model.model.layers:  # no mask is made for a sequence that is split: what each rank has is not causal by itself
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, "attention_mask": None, "is_causal": True}), with_kwargs=True
        )
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    ids = torch.randint(0, config.vocab_size, (1, spec.seq_len), generator=torch.Generator().manual_seed(1)).to(spec.device)
    targets = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    places = torch.arange(spec.seq_len, device=spec.device)[None]

    def run():
        optimizer.zero_grad()
        tokens, labels, positions = ids.clone(), targets.clone(), places.clone()
        with context_parallel(mesh, buffers=[tokens, labels, positions], buffer_seq_dims=[1, 1, 1]), _kernel(spec):
            loss = model(input_ids=tokens, position_ids=positions, labels=labels, shift_labels=labels).loss
            loss.backward()
        optimizer.step()
        return _whole(loss.detach()) / spec.gpus

    return _Step(run, dict, model)


def _tensor(spec: SharedSpec, config) -> _Step:
    """Every layer split over all GPUs. Learning rate 0."""
    from .contenders import _model
    from .tensor_parallel import start

    model = _model(config, "sdpa", spec.device)
    run, engine = start(model, spec.gpus, spec.seq_len, spec.device)

    def run_with_kernel():
        with _kernel(spec):
            return run()

    return _Step(run_with_kernel, engine, model)


def _kernel(spec: SharedSpec):
    """cuDNN's attention for the others; hf_fpdt chooses by itself."""
    import contextlib

    from torch.nn.attention import SDPBackend, sdpa_kernel

    if spec.contender.startswith("fpdt") or spec.device != "cuda":
        return contextlib.nullcontext()
    return sdpa_kernel([SDPBackend.CUDNN_ATTENTION])


def _whole(loss):
    import torch.distributed as dist

    dist.all_reduce(loss)
    return loss


def _timed(step, device: str) -> tuple[float, float]:
    """Seconds of a step that all ranks begin together, until the last of them has ended, and its loss."""
    import time

    import torch
    import torch.distributed as dist

    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    dist.barrier()
    started = time.perf_counter()
    loss = step()
    wait()
    dist.barrier()
    wait()
    return time.perf_counter() - started, loss.item()


def _memory(device: str) -> dict:
    """In GiB, of the rank that has most."""
    import torch
    import torch.distributed as dist

    from .point import _host_gib

    found = [_host_gib(device)]
    if device == "cuda":
        found += [torch.cuda.max_memory_allocated() / 2**30, torch.cuda.max_memory_reserved() / 2**30]
    most = torch.tensor(found, device=device, dtype=torch.float64)  # the default dtype is that of the weights
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return dict(zip(("host_gib", "peak_gib", "reserved_gib"), most.tolist(), strict=False))


if __name__ == "__main__":
    main()
