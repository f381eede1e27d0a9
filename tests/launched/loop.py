"""A training loop of one's own with Accelerator; counts the collectives of its steps. `test_launched.py` starts it."""

import json
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
import transformers.trainer
from accelerate import Accelerator, InitProcessGroupKwargs, ParallelismConfig
from train import Tokens
from transformers import AutoModelForCausalLM, default_data_collator

import hf_fpdt

COLLECTIVES = ("all_gather_into_tensor", "all_gather", "reduce_scatter_tensor", "all_reduce", "all_to_all_single", "barrier")


def counted(counts: Counter) -> None:
    """Counts the calls of torch.distributed's functions, those that DeepSpeed makes as well."""
    for name in COLLECTIVES:
        original = getattr(dist, name)

        def call(*args, _name=name, _original=original, **kwargs):
            counts[_name] += 1
            return _original(*args, **kwargs)

        setattr(dist, name, call)


def main(checkpoint: str, out: str, chunk_size: str = "") -> None:
    counts: Counter = Counter()
    counted(counts)
    parallelism = None
    if chunk_size:
        plugin = hf_fpdt.FPDTPlugin(config=hf_fpdt.FPDTConfig(chunk_size=int(chunk_size)))
        parallelism = ParallelismConfig(sp_size=2, sp_backend="deepspeed", sp_handler=plugin)
    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")], parallelism_config=parallelism)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    loader = torch.utils.data.DataLoader(Tokens(4, 46, model.config.vocab_size), collate_fn=default_data_collator)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses, steps = [], []
    for batch in loader:
        counts.clear()
        compute_loss = transformers.trainer.deepspeed_sp_compute_loss  # after prepare: the one for this engine
        loss = compute_loss(accelerator, model, batch, False, accelerator.parallelism_config)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        steps.append(dict(counts))
    if accelerator.is_main_process:
        Path(out).write_text(json.dumps({"losses": losses, "collectives": steps[-1]}))


if __name__ == "__main__":
    main(*sys.argv[1:])
