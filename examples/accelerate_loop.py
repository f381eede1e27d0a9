"""
A training loop of one's own with Accelerator, on one GPU or, unchanged, with every sequence shared by several:

    python examples/accelerate_loop.py --model path/to/model --train_file book.txt --seq_len 131072
    accelerate launch --config_file accelerate_configs/fpdt_zero3_2gpu.yaml examples/accelerate_loop.py --model ...

The loss of `model(**batch)` is that of the whole sequence, wherever its tokens are.
"""

import argparse
import os
from pathlib import Path

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, default_data_collator, get_cosine_schedule_with_warmup

import hf_fpdt  # noqa: F401  (makes "fpdt" an attention implementation, and Accelerator share sequences)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or name of a model and its tokenizer")
    parser.add_argument("--train_file", required=True, help="a file of text, cut into sequences")
    parser.add_argument("--seq_len", type=int, default=131072)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--gradient_accumulation_steps", type=int, default=1)
    parser.add_argument("--learning_rate", type=float, default=1e-5)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--output_dir", default="outputs/loop")
    return parser.parse_args()


def sequences(arguments: argparse.Namespace) -> list[dict[str, list[int]]]:
    """The file in pieces of exactly `seq_len` tokens; every token is a label."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    ids = tokenizer(Path(arguments.train_file).read_text(encoding="utf-8"))["input_ids"]
    length = arguments.seq_len
    pieces = [ids[at : at + length] for at in range(0, len(ids) - length + 1, length)]
    if not pieces:
        raise SystemExit(f"--seq_len {length}: the file has {len(ids)} tokens. Lower it, or give more text.")
    return [{"input_ids": piece, "labels": piece} for piece in pieces]


def handlers() -> list[InitProcessGroupKwargs]:
    """Only for trying it on CPUs: DeepSpeed has to be told how their processes talk."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    return [InitProcessGroupKwargs(backend="gloo")] if several and not torch.cuda.is_available() else []


def main() -> None:
    arguments = parse_arguments()
    set_seed(0)
    accelerator = Accelerator(gradient_accumulation_steps=arguments.gradient_accumulation_steps, kwargs_handlers=handlers())
    model = AutoModelForCausalLM.from_pretrained(arguments.model, attn_implementation="fpdt", dtype=arguments.dtype).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate)
    scheduler = get_cosine_schedule_with_warmup(optimizer, arguments.steps // 10, arguments.steps)
    order = torch.Generator().manual_seed(0)
    loader = DataLoader(sequences(arguments), batch_size=1, shuffle=True, generator=order, collate_fn=default_data_collator)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

    step, losses = 0, []
    while step < arguments.steps:
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            losses.append(loss.item())
            if accelerator.sync_gradients:
                step += 1
                accelerator.print(f"step {step}: loss {sum(losses) / len(losses):.6f}")
                losses.clear()
            if step == arguments.steps:
                break

    state = accelerator.get_state_dict(model)  # gathered, where the weights are spread
    accelerator.unwrap_model(model).save_pretrained(
        arguments.output_dir, state_dict=state, is_main_process=accelerator.is_main_process
    )


if __name__ == "__main__":
    main()
