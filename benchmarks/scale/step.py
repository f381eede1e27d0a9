"""
One launch, started on every GPU by `run.py`: `... -m benchmarks.scale.step SPECS`, with settled `ScaleSpec`s as a JSON list,
which differ in their lengths only. Rank 0, and a rank that fails, prints `{"row": ...}` of every point, with its number; rank 0
once more when a step was profiled.

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
from benchmarks.shapes import model_config, step_flops
from benchmarks.shared_point import _memory, _Step, _timed, _whole
from benchmarks.shared_trace import traced

from .estimates import host_bytes_of_rank, whole_model
from .points import ScaleSpec

LEARNING_RATE = 1e-4
_SLAB_BYTES = 4 << 30  # K of 8M tokens on 4 GPUs
_PATIENCE_MINUTES = 30  # of collectives: one may be sent minutes before the GPU comes to it


def main():
    started = time.perf_counter()
    specs = [ScaleSpec(**one) for one in json.loads(sys.argv[1])]
    import torch

    from benchmarks.contenders import prepare

    first, host = specs[0], None
    if first.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        host = HostAhead()
        host.begin(host_bytes_of_rank(first))
        prepare(first.contender)  # Liger runs on GPUs only
    point = 0
    try:
        step = start(specs, model_config(first.shape, first.layers))
        started_s = time.perf_counter() - started
        for point, spec in enumerate(specs):
            if host is not None:
                host.lock(host_bytes_of_rank(spec))
            ready_s = time.perf_counter() - started
            measure(spec, step, {"point": point, "ready_s": ready_s, "waited_for_locking_s": ready_s - started_s})
            started, started_s = time.perf_counter(), 0.0  # of the next point
    except Exception as error:
        row = {"error": "".join(traceback.format_exception(error))[-1500:]}
        if is_memory_shortage(error):
            row = {"out_of_memory": True, "why": str(error)[:800]}
        print(json.dumps({"row": row | {"point": point}}), flush=True)
        os._exit(1)
    os._exit(0)  # at once: the other ranks may wait for this one, and then for their launcher


def measure(spec: ScaleSpec, step: _Step, row: dict) -> None:
    """Prints the row of a point, by rank 0, which begins with `row`."""
    import torch
    import torch.distributed as dist

    losses = []
    if spec.warm_tokens:
        seconds, loss = _timed(step, spec.device)
        row, losses = row | {"warm_step_s": seconds}, [loss]
    if spec.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    found = [_timed(step, spec.device) for _ in range(spec.steps)]
    losses += [loss for _, loss in found]
    row |= _speed(spec, model_config(spec.shape, spec.layers), [one for one, _ in found])
    row |= {"losses": losses, "loss": losses[-1]} | step.engine() | _memory(spec.device) | _host_of_all(spec.device)
    if not all(map(math.isfinite, [*losses, row["grad_norm"]])):
        row["error"] = f"losses {losses} and gradient norm {row['grad_norm']} are not all finite"
    say = partial(_say, dist.get_rank())
    say(row)
    if spec.trace:
        row["trace"] = {"seq_len": spec.trace} | traced(step)
        say(row)
    dist.barrier()


class HostAhead:
    """
    Locks host memory for this GPU before the steps that need it: a gigabyte takes the better part of a second.

    Args:
        arena: None: that of this GPU.
    """

    def __init__(self, arena=None):
        from hf_fpdt.transfers import transfers_for  # not in the thread: others import it too

        self._device = None
        if arena is None:
            import torch

            self._device = torch.device("cuda", torch.cuda.current_device())
            arena = transfers_for(self._device).arena
        self._arena = arena
        self._slabs: list[int] = []  # bytes
        self._first: Future | None = None

    def begin(self, num_bytes: int) -> None:
        """Starts in a thread, until `lock`."""
        self._first = ThreadPoolExecutor(1).submit(self._grow, num_bytes)

    def lock(self, num_bytes: int) -> None:
        """So much is locked in all when this returns, in slabs that hold the largest tensors, and all of it is free."""
        if self._first is not None:
            self._first.result()
        self._grow(num_bytes)

    def _grow(self, num_bytes: int) -> None:
        import torch

        if self._device is not None:
            torch.cuda.set_device(self._device)  # of this thread
        missing = num_bytes - sum(self._slabs)
        self._slabs += [min(_SLAB_BYTES, missing - begin) for begin in range(0, missing, _SLAB_BYTES)]
        pieces = [self._arena.take(size) for size in self._slabs]
        for piece in pieces:
            piece.give_back()


def _say(rank: int, row: dict) -> None:
    if rank == 0:
        print(json.dumps({"row": row}), flush=True)


def _speed(spec: ScaleSpec, config, seconds: list[float]) -> dict:
    import torch

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


def start(specs: list[ScaleSpec], config) -> _Step:
    """Model, optimizer and loader, prepared under the launcher's configuration."""
    spec = specs[0]
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
    loader = torch.utils.data.DataLoader(Rows(specs, config.vocab_size), batch_size=1)
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

    def __init__(self, specs: list[ScaleSpec], vocab_size: int):
        self.gpus, self.sp, self.vocab_size = specs[0].gpus, specs[0].sp, vocab_size
        self.lengths = [length for spec in specs for length in spec.lengths]

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.sp) * self.gpus

    def __getitem__(self, index: int) -> dict:
        import torch

        turn, rank = divmod(index, self.gpus)
        step, group = turn * self.sp + rank % self.sp, rank // self.sp
        length = self.lengths[step] if step < len(self.lengths) else self.sp
        ids = tokens_of(step, group, length, self.vocab_size)
        return {"input_ids": ids, "labels": ids, "position_ids": torch.arange(length)}


def tokens_of(step: int, group: int, length: int, vocab_size: int):
    """Random ids of one sequence, the same however many GPUs share it."""
    import torch

    return torch.randint(0, vocab_size, (length,), generator=torch.Generator().manual_seed(1000 * group + step))


if __name__ == "__main__":
    main()
