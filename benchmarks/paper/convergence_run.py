"""
One run of `convergence.py`, in a process of its own: `python -m benchmarks.paper.convergence_run SPEC` with a `Spec` as JSON,
or with ZeRO-3 in several, started by `accelerate launch`. Rank 0 prints `{"row": ...}`.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field

SHAPE = {"hidden_size": 640, "num_hidden_layers": 10, "num_attention_heads": 10}
FAMILIES = {"llama": {"intermediate_size": 1728, "num_key_value_heads": 5}, "gpt_neox": {"intermediate_size": 2560}}
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
VOCABULARY, HELD_OUT, WARM_UP, PEAK_RATE, AVERAGED, CLIP = 8192, 4, 20, 6e-4, 20, 1.0
CHECKED = 10  # steps after which a run looks at the clock
_CONFIGS = {"cuda": "accelerate_configs/fpdt_zero3_2gpu.yaml", "cpu": "accelerate_configs/fpdt_zero3_2cpu.yaml"}
_OFFLOADED = {"offload": "host", "recompute": True}


@dataclass(frozen=True)
class Run:
    """`fpdt`: fields of FPDTConfig, beside the chunk size; None: PyTorch's attention. `gpus` share every sequence."""

    name: str
    seed: int = 0
    fpdt: dict | None = field(default=None)
    gpus: int = 1


RUNS = {
    "sdpa": Run("sdpa"),
    "seed": Run("sdpa, another seed", seed=1),
    "fpdt": Run("fpdt, no offload", fpdt={"offload": "none"}),
    "offload": Run("fpdt, offloaded", fpdt=_OFFLOADED),
    "zero3": Run("fpdt, offloaded, ZeRO-3 on 2 GPUs", fpdt=_OFFLOADED, gpus=2),
}


@dataclass(frozen=True, kw_only=True)
class Spec:
    """
    `run`: a name in RUNS. `pieces`: a file with the data, `[pieces, tokens]`. `deadline`: seconds since 1970 after which a run
    ends with the steps that it has.
    """

    run: str
    family: str
    pieces: str
    steps: int
    tiny: bool = False
    deadline: float | None = None


@dataclass
class _Training:
    """
    What a step (of the number of a sequence) and an evaluation (of a sequence) are, alone or shared. Both return the loss, for
    which nobody has waited.
    """

    step: Callable
    loss: Callable
    shared: bool
    precision: str


def main():
    spec = Spec(**json.loads(sys.argv[1]))
    row = train(spec)
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps({"row": row}), flush=True)


def train(spec: Spec) -> dict:
    """The row of one run. Reading losses waits for the GPU, so they are read at the end."""
    import torch

    run, data = RUNS[spec.run], torch.load(spec.pieces, weights_only=True)
    training, held_out = data[:-HELD_OUT], data[-HELD_OUT:]
    model = build(run, spec.family, data.shape[1], spec.tiny)
    parameters = sum(weight.numel() for weight in model.parameters())
    sequences = [training[step % len(training)] for step in range(spec.steps)]
    work = (_shared if run.gpus > 1 else _alone)(model, sequences)
    losses, started = [], time.perf_counter()
    for step in range(spec.steps):
        losses.append(work.step(step))
        if step % CHECKED == CHECKED - 1 and _late(spec.deadline, losses[-1], work.shared):
            break
    losses = torch.stack(losses).tolist()
    seconds = time.perf_counter() - started
    model.eval()
    with torch.no_grad():
        after = torch.stack([work.loss(ids) for ids in held_out]).mean().item()
    row = {"seed": run.seed, "fpdt": _settings(run, data.shape[1]), "gpus": run.gpus, "seq_len": data.shape[1]}
    row |= {"precision": work.precision, "parameters": parameters, "pieces": len(training), "seconds": seconds}
    row["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none (CPU)"
    if not all(map(math.isfinite, [*losses, after])):
        row["error"] = f"losses are not all finite: held out {after}, training {losses}"
    return row | {"final": mean_at(losses, len(losses)), "held_out": after, "losses": losses}


def build(run: Run, family: str, seq_len: int, tiny: bool):
    """On the CPU, in training."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    import hf_fpdt

    shape = SHAPE | FAMILIES[family]
    if tiny:
        shape = {name: size for name, size in TINY.items() if family == "llama" or "value" not in name}
    config = AutoConfig.for_model(family, **shape, vocab_size=VOCABULARY, max_position_embeddings=seq_len, use_cache=False)
    torch.manual_seed(run.seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    if run.fpdt is not None:
        hf_fpdt.apply_fpdt(model, hf_fpdt.FPDTConfig(**_settings(run, seq_len)))
    return model.train()


def _settings(run: Run, seq_len: int) -> dict | None:
    """Four chunks."""
    return None if run.fpdt is None else {"chunk_size": seq_len // 4, **run.fpdt}


def _alone(model, sequences) -> _Training:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    optimizer, schedule = _optimizer(model.to(device), len(sequences))

    def loss(ids):
        ids = ids[None].to(device)
        with torch.autocast("cuda", torch.bfloat16) if ids.is_cuda else nullcontext():
            return model(input_ids=ids, labels=ids).loss

    def step(index: int):
        found = loss(sequences[index])
        found.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        return found.detach()

    return _Training(step, loss, False, "fp32 weights, bf16 autocast" if device == "cuda" else "fp32")


def _shared(model, sequences) -> _Training:
    """
    A loop of one's own with Accelerator, under the launcher's configuration. Weights, their gathering and the sums of gradients
    are fp32 as on one GPU, and so is what runs in bf16: torch's autocast, through DeepSpeed, which turns off any that it does
    not know of.
    """
    import torch
    from accelerate import Accelerator, InitProcessGroupKwargs
    from torch.utils.data import DataLoader
    from transformers import default_data_collator

    on_gpu = torch.cuda.is_available()
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(backend="nccl" if on_gpu else "gloo")])
    engine = accelerator.state.deepspeed_plugin.deepspeed_config
    engine["gradient_clipping"] = CLIP
    if on_gpu:
        engine["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    optimizer, schedule = _optimizer(model, len(sequences))
    rows = [{"input_ids": ids, "labels": ids} for ids in sequences]
    loader = DataLoader(rows, batch_size=1, collate_fn=default_data_collator)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    batches = iter(loader)

    def step(index: int):
        found = model(**next(batches)).loss
        accelerator.backward(found)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        return found.detach()

    def loss(ids):
        ids = ids[None].to(accelerator.device)
        return model(input_ids=ids, labels=ids).loss

    return _Training(step, loss, True, "fp32 weights, bf16 autocast of DeepSpeed" if on_gpu else "fp32")


def _optimizer(model, steps: int):
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step, steps))


def rate(step: float, steps: int, warm_up: int = WARM_UP) -> float:
    warm = min((step + 1) / warm_up, 1.0)
    return warm * (0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))


def mean_at(losses: list[float], step: int) -> float:
    """Of the last 20 losses before a step."""
    last = losses[max(step - AVERAGED, 0) : step]
    return sum(last) / len(last)


def _late(deadline: float | None, loss, shared: bool) -> bool:
    """Whether it is, for any of the processes that share the run."""
    import torch
    import torch.distributed as dist

    if deadline is None:
        return False
    loss.item()  # the host may be steps ahead
    late = torch.tensor(float(time.time() >= deadline), device=loss.device)
    if shared:
        dist.all_reduce(late, op=dist.ReduceOp.MAX)
    return bool(late)


def command(spec: Spec, device: str) -> list[str]:
    """The command line of a run."""
    words = ["-m", "benchmarks.paper.convergence_run", json.dumps(asdict(spec))]
    if RUNS[spec.run].gpus == 1:
        return [sys.executable, *words]
    launch = ["-m", "accelerate.commands.launch", "--config_file", _CONFIGS[device], "--main_process_port", "0"]
    return [sys.executable, *launch, "--mixed_precision", "no", *words]  # autocast is the run's own


if __name__ == "__main__":
    main()
