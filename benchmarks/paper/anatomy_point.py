"""
One point of `anatomy.py`, in a process of its own: the second step of a contender with the allocator's history recorded, and
marks (`memory_trace.py`) wherever a module begins. Started on every GPU by a launcher it is a point of a sequence that they
share. Needs a GPU; `mark_modules` does not.
"""

import os
import re
import time
from collections.abc import Callable

from benchmarks import point, shared_point
from benchmarks.paper.memory_trace import BEFORE, MARK_BYTES, MARKS, Moment, replay, thinned

_MOMENTS = 1500  # in a result, of each point
_MODULES = (  # the last part of a module's name, the source that it begins, and what follows it in the forward, None: the same
    (r"(self_attn|attention)", "QKV", None),
    (r"(q_proj|k_proj|v_proj|query_key_value)", "QKV", None),
    (r"(o_proj|dense)", "attention", "residual and norms"),
    (r"mlp", "MLP", "residual and norms"),
    (r"(.*layernorm|norm|final_layer_norm|layers\.\d+)", "residual and norms", "residual and norms"),
    (r"(lm_head|embed_out)", "loss", None),
)


def mark_source(name: str, device: str) -> None:
    """Leaves a mark in the allocator's history."""
    import torch

    torch.empty(MARK_BYTES * (MARKS.index(name) + 1), dtype=torch.uint8, device=device)


def mark_modules(model, mark: Callable[[str], None]) -> None:
    """
    Calls `mark` with the source that begins, in the forward where a module begins and ends, in the backward where the gradient
    of its output arrives.
    """
    for name, module in model.named_modules():
        for pattern, source, follows in _MODULES:
            if re.fullmatch(rf"(.*\.)?{pattern}", name):
                module.register_forward_pre_hook(_before(mark, source))
                module.register_forward_hook(_after(mark, source, follows))
                break


def _before(mark, source):
    def hook(module, args):
        mark(source)

    return hook


def _after(mark, source, follows):
    def hook(module, args, output):
        if getattr(output, "requires_grad", False):
            output.register_hook(lambda grad: mark(source))
        if follows is not None:
            mark(follows)

    return hook


def anatomy(spec: point.Spec) -> dict:
    """The row of a point, see `row_of`."""
    import torch

    from benchmarks.contenders import build
    from benchmarks.shapes import model_config

    config = model_config(spec.shape, spec.layers)
    model, forward_backward = build(spec.contender, config, spec.fpdt, device=spec.device)
    ids = torch.randint(0, config.vocab_size, (1, spec.seq_len), device=spec.device)
    forward_backward(ids)  # plans, compiles, locks host memory
    for parameter in model.parameters():
        parameter.grad = None
    return recorded(model, lambda: forward_backward(ids), spec.device)


def recorded(model, step: Callable, device: str) -> dict:
    """The row of a step that ran before, see `row_of`; `step` returns its loss."""
    import torch

    mark_modules(model, lambda source: mark_source(source, device))
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.memory._record_memory_history(enabled="all", context="alloc", stacks="python", max_entries=4_000_000)
    started = time.perf_counter()
    with _backward_marked(device):
        loss = step()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    trace = torch.cuda.memory._snapshot()["device_traces"][torch.cuda.current_device()]
    torch.cuda.memory._record_memory_history(enabled=None)
    gradients = {p.grad.untyped_storage().data_ptr() for p in model.parameters() if p.grad is not None}
    row = row_of(trace, before, gradients) | {"gpu": torch.cuda.get_device_name(), "loss": loss.item()}
    return row | {"recorded_step_s": seconds, "peak_gib": torch.cuda.max_memory_allocated() / 2**30}


def shared_anatomy(spec: shared_point.SharedSpec) -> dict:
    """The same of the second step of a sequence that several GPUs share, of this rank."""
    from benchmarks.shapes import model_config

    step = shared_point.build(spec, model_config(spec.shape, spec.layers))
    step()
    return recorded(step.model, step, spec.device)


def row_of(trace: list[dict], before: int, gradients: set[int]) -> dict:
    """In GiB: the peak of each phase by source, the sources' own tops, and the timeline, with seconds from its begin."""
    found = replay(trace, before, gradients)
    kept = thinned(found.moments, _MOMENTS)
    start = kept[0].time_us
    return {
        "events": len(found.moments),
        "replayed_peak_gib": max(moment.total for moment in found.moments) / 2**30,
        "at_peak_gib": {phase: _gib(moment) for phase, moment in found.peaks.items()},
        "tops_gib": {phase: {name: size / 2**30 for name, size in tops.items()} for phase, tops in found.tops.items()},
        "timeline": {
            "seconds": [round((moment.time_us - start) / 1e6, 6) for moment in kept],
            "backward_from": next((i for i, moment in enumerate(kept) if moment.phase == "backward"), len(kept)),
            "gib": {
                name: [round(moment.held[name] / 2**30, 4) for moment in kept] for name in (BEFORE, *found.tops["forward"])
            },
        },
    }


def _gib(moment: Moment) -> dict:
    return {name: size / 2**30 for name, size in moment.held.items()}


class _backward_marked:
    """Within, a tensor's `backward` marks the phase, and that the loss is what it begins with."""

    def __init__(self, device: str):
        self._device = device

    def __enter__(self):
        import torch

        self._plain, device = torch.Tensor.backward, self._device
        plain = self._plain

        def backward(tensor, *args, **kwargs):
            mark_source("backward", device)
            mark_source("loss", device)
            return plain(tensor, *args, **kwargs)

        torch.Tensor.backward = backward

    def __exit__(self, *error):
        import torch

        torch.Tensor.backward = self._plain


if __name__ == "__main__":
    if "RANK" in os.environ:  # a launcher's
        shared_point.main(shared_anatomy)
    else:
        point.main(anatomy)
