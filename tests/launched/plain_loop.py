"""
A training loop of one's own with Accelerator, as one writes it for one GPU: accumulates, clips, evaluates. Every second loss is
that which the model returns, the others are transformers'. `test_launched_loops.py` starts it.
"""

import json
import sys
from pathlib import Path

import on_cpu
import torch
import transformers.trainer
from accelerate import Accelerator, InitProcessGroupKwargs
from torch.utils.data import DataLoader
from train import Tokens
from transformers import AutoModelForCausalLM, default_data_collator

import hf_fpdt  # noqa: F401


def made(with_deepspeed: bool) -> Accelerator:
    """On CPUs."""
    if with_deepspeed:
        return Accelerator(gradient_accumulation_steps=2, kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
    on_cpu.as_on_gpus()
    return Accelerator(gradient_accumulation_steps=2, cpu=True)


def main(engine: str, checkpoint: str, out: str, steps: str, rate: str, clip: str) -> None:
    accelerator = made(engine.startswith("zero"))
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=float(rate))
    data = Tokens(16, 46, model.config.vocab_size)
    loader, evaluation = (DataLoader(data, collate_fn=default_data_collator) for _ in range(2))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    evaluation = accelerator.prepare(evaluation)
    log, losses = [], []
    for index, batch in enumerate(loader):
        with accelerator.accumulate(model):
            if index % 2:
                loss = model(**batch).loss
            else:
                compute_loss = transformers.trainer.deepspeed_sp_compute_loss
                loss = compute_loss(accelerator, model, batch, False, accelerator.parallelism_config)
            losses.append(loss.item())
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(model.parameters(), float(clip))
                log.append({"loss": sum(losses) / len(losses), "grad_norm": float(norm)})
                losses.clear()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if len(log) == int(steps):
            break
    tokens = batch["input_ids"].shape[1]
    weights = type(next(model.parameters()).data).__name__
    model.eval()
    evaluated = []
    with torch.no_grad():
        for batch in evaluation:
            evaluated += accelerator.gather(model(**batch).loss).tolist()
    state = accelerator.get_state_dict(model)
    accelerator.unwrap_model(model).save_pretrained(out, state_dict=state, is_main_process=accelerator.is_main_process)
    if accelerator.is_main_process:
        seen = {"tokens": tokens, "weights": weights, "evaluated": evaluated, "scheduled": scheduler.scheduler.last_epoch}
        Path(out, "log.json").write_text(json.dumps([*log, seen]))


if __name__ == "__main__":
    main(*sys.argv[1:])
