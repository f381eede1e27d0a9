"""
One point, started on every GPU by `run.py`: `... -m benchmarks.scale.step SPEC`, with a settled `ScaleSpec` as JSON. Rank 0,
and a rank that fails, prints `{"row": ...}`; rank 0 once more when a step was profiled.

Full finetuning as a loop of one's own with Accelerator has it: a model built under ZeRO-3 (each weight is on a GPU whole only
until it is cut), bfloat16 with fp32 weights and AdamW states (torch's, fused), gradients clipped at 1. Every step has random
tokens of its own.
"""

import json
import math
import os
import statistics
import sys
import time
import traceback
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from benchmarks.point import PEAK_BF16, is_memory_shortage
from benchmarks.shared_point import _memory, _Step, _timed, _whole
from benchmarks.shared_trace import traced

from .estimates import host_bytes_of_rank, whole_model
from .points import ScaleSpec

LEARNING_RATE = 1e-4
_SLAB_BYTES = 4 << 30  # K of 8M tokens on 4 GPUs
_PATIENCE_MINUTES = 30  # of collectives: one may be sent minutes before the GPU comes to it


def main():
    started = time.perf_counter()
    spec = ScaleSpec(**json.loads(sys.argv[1]))
    import torch

    from benchmarks.contenders import prepare

    locking = None
    if spec.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        locking = _start_locking(host_bytes_of_rank(spec))
        prepare(spec.contender)  # Liger runs on GPUs only
    try:
        row = measure(spec, started, locking)
    except Exception as error:
        row = {"error": "".join(traceback.format_exception(error))[-1500:]}
        if is_memory_shortage(error):
            row = {"out_of_memory": True, "why": str(error)[:800]}
    if "step_s" not in row:
        print(json.dumps({"row": row}), flush=True)
    os._exit(0 if "step_s" in row else 1)  # at once: the other ranks may wait for this one, and then for their launcher


def measure(spec: ScaleSpec, started: float, locking: Future | None = None) -> dict:
    """The row of a point, printed by rank 0, after `locking` is done."""
    import torch
    import torch.distributed as dist

    from benchmarks.shapes import model_config

    config = model_config(spec.shape, spec.layers)
    step = start(spec, config)
    started_s = time.perf_counter() - started
    if locking is not None:
        locking.result()
    ready_s = time.perf_counter() - started
    warm_s, warm_loss = _timed(step, spec.device)
    if spec.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    found = [_timed(step, spec.device) for _ in range(spec.steps)]
    seconds, losses = [one for one, _ in found], [warm_loss, *(loss for _, loss in found)]
    row = {"ready_s": ready_s, "waited_for_locking_s": ready_s - started_s, "warm_step_s": warm_s}
    row |= _speed(spec, config, seconds)
    row |= {"losses": losses, "loss": losses[-1]} | step.engine() | _memory(spec.device) | _host_of_all(spec.device)
    if not all(map(math.isfinite, [*losses, row["grad_norm"]])):
        row["error"] = f"losses {losses} and gradient norm {row['grad_norm']} are not all finite"
    say = partial(_say, dist.get_rank())
    say(row)
    if spec.trace:
        row["trace"] = {"seq_len": spec.trace} | traced(step)
        say(row)
    dist.barrier()
    return row


def _start_locking(num_bytes: int) -> Future:
    """Host memory for this GPU, in a thread while the model is made: a gigabyte takes the better part of a second."""
    import torch

    from hf_fpdt.transfers import transfers_for  # not in the thread: others import it too

    device = torch.device("cuda", torch.cuda.current_device())
    arena = transfers_for(device).arena

    def lock() -> None:
        torch.cuda.set_device(device)  # of this thread
        lock_ahead(arena, num_bytes)

    return ThreadPoolExecutor(1).submit(lock)


def lock_ahead(arena, num_bytes: int) -> None:
    """Makes the arena lock so much, in slabs that hold the largest tensors, and leaves all of it free."""
    pieces = [arena.take(min(_SLAB_BYTES, num_bytes - begin)) for begin in range(0, num_bytes, _SLAB_BYTES)]
    for piece in pieces:
        piece.give_back()


def _say(rank: int, row: dict) -> None:
    if rank == 0:
        print(json.dumps({"row": row}), flush=True)


def _speed(spec: ScaleSpec, config, seconds: list[float]) -> dict:
    import torch

    from benchmarks.shapes import step_flops

    timed = seconds[1:] or seconds
    step_s, gpu = statistics.median(timed), torch.cuda.get_device_name() if spec.device == "cuda" else "none (CPU)"
    row = {"first_step_s": seconds[0], "step_s": step_s, "all_steps_s": seconds, "long_steps": spec.steps}
    row["timed"] = "the only long step" if spec.steps == 1 else f"median of the last {len(timed)}"
    row["tokens_per_s"] = spec.dp * spec.seq_len / step_s
    row["tokens_per_s_per_gpu"] = row["tokens_per_s"] / spec.gpus
    flops = spec.dp * step_flops(config, spec.seq_len) / step_s / spec.gpus
    row |= {"gpu": gpu, "model_tflops": flops / 1e12, "causal_mfu": flops / PEAK_BF16.get(gpu, math.inf)}
    return row | {"whole_model": whole_model(spec, step_s)}


def _host_of_all(device: str) -> dict:
    """GiB that hf_fpdt locked, of all ranks."""
    import torch

    from benchmarks.point import _host_gib

    return {"host_gib_of_all": _whole(torch.tensor(_host_gib(device), device=device)).item()}


def start(spec: ScaleSpec, config) -> _Step:
    """Model, optimizer and loader, prepared under the launcher's configuration."""
    from datetime import timedelta

    import torch
    from accelerate import Accelerator, InitProcessGroupKwargs

    import hf_fpdt
    from benchmarks.contenders import _model

    backend = "nccl" if spec.device == "cuda" else "gloo"
    accelerator = Accelerator(
        kwargs_handlers=[InitProcessGroupKwargs(backend=backend, timeout=timedelta(minutes=_PATIENCE_MINUTES))]
    )
    accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"] |= spec.zero
    os.environ |= {f"FPDT_{name.upper()}": str(value) for name, value in spec.fpdt.items()}  # for groups
    dtype = torch.bfloat16 if spec.device == "cuda" else torch.float32
    model = _model(config, "fpdt", spec.device, dtype)
    if spec.gpus == 1:
        hf_fpdt.apply_fpdt(model, hf_fpdt.FPDTConfig(**spec.fpdt))
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    loader = torch.utils.data.DataLoader(Rows(spec, config.vocab_size), batch_size=1)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    batches = iter(loader)

    def run():
        batch = {name: value.to(accelerator.device) for name, value in next(batches).items()}
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        return _whole(loss.detach().float() / spec.gpus)

    return _Step(
        run,
        model=model,
        engine=lambda: {"zero_stage": model.zero_optimization_stage(), "grad_norm": float(model.get_global_grad_norm())},
    )


class Rows:
    """
    The sequences of all steps and groups, as accelerate deals them out: a round gives every rank one, and in each of its `sp`
    steps a group works on that of another of its ranks. Beyond the last step there are short ones, which nobody comes to.
    """

    def __init__(self, spec: ScaleSpec, vocab_size: int):
        self.spec, self.vocab_size = spec, vocab_size

    def __len__(self) -> int:
        return -(-len(self.spec.lengths) // self.spec.sp) * self.spec.gpus

    def __getitem__(self, index: int) -> dict:
        import torch

        spec = self.spec
        turn, rank = divmod(index, spec.gpus)
        step, group = turn * spec.sp + rank % spec.sp, rank // spec.sp
        length = spec.lengths[step] if step < len(spec.lengths) else spec.sp
        ids = tokens_of(step, group, length, self.vocab_size)
        return {"input_ids": ids, "labels": ids, "position_ids": torch.arange(length)}


def tokens_of(step: int, group: int, length: int, vocab_size: int):
    """Random ids of one sequence, the same however many GPUs share it."""
    import torch

    return torch.randint(0, vocab_size, (length,), generator=torch.Generator().manual_seed(1000 * group + step))


if __name__ == "__main__":
    main()
