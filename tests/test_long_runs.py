"""
Runs that go on: nothing grows from step to step, what breaks gives back what it held, and a step whose loss is no number ends
as it does without streaming. A failure means a run that dies in its second night.
"""

import errno
import gc
import itertools
import math
import os
import resource
from pathlib import Path

import pytest
import torch
from reference import assert_gradients_close, loss_and_gradients, make_batch, make_model, make_streamed, tiny_llama
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_fpdt import DiskSpaceError, FPDTConfig, apply_fpdt
from hf_fpdt.disk_file import disk_file_for
from hf_fpdt.transfers import transfers_for

SETTINGS = [{"offload": "host"}, {"offload": "host", "kv": "streamed"}, {"recompute": False}]


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.parametrize("count", [400, pytest.param(1000, marks=pytest.mark.slow)])
def test_hundreds_of_steps_take_no_more_memory(count):
    """Of ever other lengths, each planned, with everything in host memory: at most 4.5 KB a step after the first third."""
    arena = transfers_for(torch.device("cpu")).arena
    model = make_streamed(tiny_llama(), 32, offload="host", kv="streamed", gpu_memory=1 << 40)
    optimizer = torch.optim.AdamW(model.parameters())
    lengths = torch.randint(33, 120, (count,), generator=torch.Generator().manual_seed(0)).tolist()
    seen = []
    for index, length in enumerate(lengths):
        model(**make_batch(1, length, seed=index)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if index + 1 in (3 * count // 10, count):
            gc.collect()
            seen.append((resident_bytes(), arena.locked_bytes, arena.used_bytes))
    (early, locked, _), (late, later_locked, used) = seen
    assert late - early < (3 << 20) * count // 1000
    assert (later_locked, used) == (locked, 0)
    assert len(set(lengths)) > 64 >= len(model.model.__dict__["_fpdt_plans"])


class _Stop:
    """Ctrl-C in the n-th call of a module."""

    def __init__(self, module, call: int):
        self.left, self.hook = call, module.register_forward_pre_hook(self)

    def __call__(self, module, args):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize(("settings", "call"), [*itertools.product(SETTINGS, (1, 2)), (SETTINGS[0], 5), (SETTINGS[1], 4)])
def test_an_interrupted_step_gives_everything_back(settings, call):
    """In the forward of three chunks, and in the backward, which calls the layer's modules again; the next step is right."""
    arena = transfers_for(torch.device("cpu")).arena
    batch = make_batch(2, 47)
    want, want_grads = loss_and_gradients(make_model(tiny_llama(), "eager"), batch)
    model = make_streamed(tiny_llama(), 16, **settings)
    stop = _Stop(model.model.layers[1].mlp, call)
    with pytest.raises(KeyboardInterrupt):
        model(**batch).loss.backward()
    stop.hook.remove()
    gc.collect()
    assert arena.used_bytes == 0
    got, grads = loss_and_gradients(model, batch)
    assert abs(got - want) <= 2e-6 * want
    assert_gradients_close(grads, want_grads)


def test_a_disk_that_fills_up_ends_the_step_and_the_next_is_right(monkeypatch, tmp_path):
    model = make_streamed(tiny_llama(), 16, offload="disk", disk_folder=str(tmp_path))
    batch, file, full = make_batch(2, 47), disk_file_for(str(tmp_path), torch.device("cpu")), []
    want, want_grads = loss_and_gradients(make_model(tiny_llama(), "eager"), batch)

    def pwrite(fd, data, at):
        full.append(at)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", pwrite)
        with pytest.raises(DiskSpaceError, match="No space left on device"):
            model(**batch).loss.backward()
    assert full
    model.zero_grad()
    got, grads = loss_and_gradients(model, batch)
    assert abs(got - want) <= 2e-6 * want
    assert_gradients_close(grads, want_grads)
    assert file.used_bytes == 0 < file.file_bytes


class _Norms(TrainerCallback):
    def __init__(self):
        self.norms = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "grad_norm" in (logs or {}):
            self.norms.append(float(logs["grad_norm"]))


def _trained(implementation: str, folder: Path):
    """Four steps; in the second one a token's embedding is infinite, so its loss and gradients are no numbers."""
    model = make_model(tiny_llama(vocab_size=61), implementation)
    with torch.no_grad():
        model.get_input_embeddings().weight[60] = math.inf
    if implementation == "fpdt":
        apply_fpdt(model, FPDTConfig(chunk_size=16))
    rows = [{name: rows[0] for name, rows in make_batch(1, 40, vocab=60, seed=seed).items()} for seed in range(4)]
    rows[1]["input_ids"][7] = 60
    arguments = TrainingArguments(
        str(folder), max_steps=4, per_device_train_batch_size=1, logging_steps=1, learning_rate=0.0, report_to=[],
        save_strategy="no", use_cpu=True, disable_tqdm=True, train_sampling_strategy="sequential", logging_nan_inf_filter=False,
    )  # fmt: skip
    norms = _Norms()
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[norms])
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], norms.norms


def test_a_loss_that_is_no_number_is_logged_as_without_streaming(tmp_path):
    losses, norms = _trained("fpdt", tmp_path / "fpdt")
    want_losses, want_norms = _trained("sdpa", tmp_path / "sdpa")
    assert math.isnan(want_losses[1])
    assert math.isnan(want_norms[1])
    assert losses == pytest.approx(want_losses, rel=1e-5, nan_ok=True)
    assert norms == pytest.approx(want_norms, rel=1e-4, nan_ok=True)
