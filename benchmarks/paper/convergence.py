"""
The paper's figure 14: the same training with PyTorch's attention, with FPDT on the GPU, and with FPDT offloaded.

    python -m benchmarks.paper.convergence --out convergence

trains a Llama and a GPT-NeoX of some 55 million parameters from scratch on the files of Python's standard library, and writes
`convergence.json` (the loss of every step, and of held-out text at the end) and `convergence.png` (the losses, and what each
run differs from the first). Runs of one family see the same data in the same order. The first two differ in their seed only,
that of the weights: what they differ by is noise. All others start from the weights of the first.

Weights in fp32, bf16 autocast on a GPU, AdamW, gradients clipped to 1, a warm-up of 20 steps and half a cosine down to a tenth.
"""

import argparse
import json
import math
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import hf_fpdt
from benchmarks.result_files import header

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from long_text import DataArguments, load_documents, load_tokenizer, make_pieces

SHAPE = {"hidden_size": 640, "num_hidden_layers": 10, "num_attention_heads": 10}
FAMILIES = {"llama": {"intermediate_size": 1728, "num_key_value_heads": 5}, "gpt_neox": {"intermediate_size": 2560}}
TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
VOCABULARY, HELD_OUT, WARM_UP, PEAK_RATE, AVERAGED = 8192, 4, 20, 6e-4, 20


@dataclass(frozen=True)
class Run:
    """`fpdt`: fields of FPDTConfig; None: PyTorch's attention."""

    name: str
    seed: int = 0
    fpdt: dict | None = field(default=None)


def runs(chunk: int) -> list[Run]:
    return [
        Run("sdpa"),
        Run("sdpa, another seed", seed=1),
        Run("fpdt, no offload", fpdt={"chunk_size": chunk, "offload": "none"}),
        Run("fpdt, offloaded", fpdt={"chunk_size": chunk, "offload": "host", "recompute": True}),
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--seq-len", type=int, default=16384, help="tokens of a sequence; fpdt has four chunks of it")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--max-documents", type=int, help="use only the longest files of the library")
    parser.add_argument("--tiny", action="store_true", help="tries the command on a CPU")
    parser.add_argument("--out", default="convergence", help="path of the results, without ending")
    args = parser.parse_args()
    data, rows = pieces(args.seq_len, args.max_documents), []
    for family in args.families.split(","):
        for run in runs(args.seq_len // 4):
            rows.append(train(run, family, data, args.steps, args.tiny))
            last = rows[-1]
            print(
                f"{family}, {run.name}: {last['final']:.4f}, held out {last['held_out']:.4f}, {last['seconds']:.0f} s",
                flush=True,
            )
            gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none (CPU)"
            content = {"header": header("paper.convergence", args.out, gpu), "rows": rows}
            Path(f"{args.out}.json").write_text(json.dumps(content, indent=1))
    draw(rows, Path(f"{args.out}.png"))


def pieces(seq_len: int, max_documents: int | None) -> torch.Tensor:
    """`[pieces, seq_len]`, in an order of their own."""
    arguments = DataArguments(seq_len=seq_len, group=True, max_documents=max_documents)
    documents = load_documents(arguments)
    found = make_pieces(documents, load_tokenizer(None, VOCABULARY, documents), arguments)
    ids = torch.tensor(found["input_ids"], dtype=torch.int64)
    return ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]


def train(run: Run, family: str, data: torch.Tensor, steps: int, tiny: bool) -> dict:
    """The row of one run. Reading losses waits for the GPU, so they are read at the end."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = _model(run, family, data.shape[1], tiny).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
    data = data.to(device)
    training, held_out = data[:-HELD_OUT], data[-HELD_OUT:]
    losses, started = [], time.perf_counter()
    for step in range(steps):
        losses.append(_loss(model, training[step % len(training)]))
        losses[-1].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses[-1] = losses[-1].detach()
    losses = torch.stack(losses).tolist()
    seconds = time.perf_counter() - started
    model.eval()
    with torch.no_grad():
        after = torch.stack([_loss(model, ids) for ids in held_out]).mean().item()
    row = {"family": family, "run": run.name, "seed": run.seed, "fpdt": run.fpdt, "seq_len": data.shape[1]}
    row |= {"parameters": sum(weight.numel() for weight in model.parameters()), "pieces": len(training), "seconds": seconds}
    last = losses[-AVERAGED:]
    return row | {"final": sum(last) / len(last), "held_out": after, "losses": losses}


def _model(run: Run, family: str, seq_len: int, tiny: bool):
    shape = (
        (TINY if family == "llama" else {k: v for k, v in TINY.items() if "value" not in k})
        if tiny
        else SHAPE | FAMILIES[family]
    )
    config = AutoConfig.for_model(family, **shape, vocab_size=VOCABULARY, max_position_embeddings=seq_len, use_cache=False)
    torch.manual_seed(run.seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    if run.fpdt is not None:
        hf_fpdt.apply_fpdt(model, hf_fpdt.FPDTConfig(**run.fpdt))
    return model.train()


def _rate(step: int, steps: int) -> float:
    warm = min((step + 1) / WARM_UP, 1.0)
    return warm * (0.1 + 0.45 * (1 + math.cos(math.pi * step / steps)))


def _loss(model, ids: torch.Tensor) -> torch.Tensor:
    half = torch.autocast("cuda", torch.bfloat16) if ids.is_cuda else nullcontext()
    with half:
        return model(input_ids=ids[None], labels=ids[None]).loss


def smooth(losses: list[float], width: int = 10) -> list[float]:
    """Means of `width` steps, so many fewer."""
    return [sum(losses[at : at + width]) / width for at in range(len(losses) - width + 1)]


def draw(rows: list[dict], path: Path) -> None:
    """The losses above, below what each differs from the first run of its family, both as means of ten steps."""
    from matplotlib.figure import Figure

    families = list(dict.fromkeys(row["family"] for row in rows))
    figure = Figure(figsize=(6 * len(families), 6), layout="constrained")
    axes = figure.subplots(2, len(families), sharex=True, squeeze=False)
    for column, family in enumerate(families):
        own = [row for row in rows if row["family"] == family]
        first = smooth(own[0]["losses"])
        for row in own:
            found = smooth(row["losses"])
            axes[0, column].plot(found, label=row["run"], linewidth=1)
            axes[1, column].plot([a - b for a, b in zip(found, first, strict=True)], linewidth=1)
        axes[0, column].set(title=f"{family}, {own[0]['parameters'] / 1e6:.0f}M, {own[0]['seq_len']:,} tokens", ylabel="loss")
        axes[0, column].legend()
        axes[1, column].set(xlabel="step", ylabel=f"difference from {own[0]['run']}")
        axes[1, column].grid(alpha=0.3)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
