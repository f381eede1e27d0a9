"""
Quality at length: a small Llama, trained on short sequences and continued with YaRN at 8 and 16 times the length by hf_fpdt.

    python -m benchmarks.paper.quality all --folder outputs/quality --time-limit 460 --out quality

It is a small model (56M parameters, minutes of training on Python's standard library), and says what hf_fpdt trains, not what
models of use can do. Stages, each a process of its own if wanted, with checkpoints between them in `--folder`:

    prepare                  text of the standard library, by its longest files, every eighth of them held out; its tokenizer
    pretrain                 from scratch with PyTorch's attention, at 256, 1,024 and then 8,192 tokens. In the text are keys,
                             told once and asked for once further down (`passkeys.py`), and at first half of the rows are
                             spans told twice, which teaches copying; it is learnt sooner where there is less to look at
    extend --tokens 65536    YaRN by the factor of the lengths, all weights trained on such rows of this length by hf_fpdt;
    extend --tokens 131072   each goes on from the longest checkpoint before
    evaluate --model NAME    `base`, `65536` or `131072`: loss by position, and keys that are found, by length and depth
    draw                     writes OUT.json and OUT.png

Loss by position: held-out text of 131,072 tokens is read from each sixteenth of it on, going on at its start after its end. So
each piece of text stands once in each sixteenth of the positions, and what differs between positions is not the text. It also
means that a piece has seen what comes later in its file, where its file began before the start.

Keys: one is told in a document of held-out text and asked for at its end. It counts as found if all of its five digits are the
most likely ones, as greedy decoding would write them.

With `--time-limit` a stage ends in time with what it has; the learning rate falls by whichever is further, time or steps.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import hf_fpdt  # noqa: F401  (makes "fpdt" known)
from benchmarks.paper.convergence_run import FAMILIES, SHAPE, TINY, rate
from benchmarks.paper.passkeys import Wording, document, keyed_row, repeated_row, wording
from benchmarks.paper.quality_score import Clock, finds_key, half, key_counts, position_losses
from benchmarks.result_files import header

BUCKETS, HELD_OUT_EVERY, DEPTHS = 16, 8, (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
SHORTER = ((0.25, 32), (0.4, 8))  # until this part of pre-training rows are so many times shorter, and as many more
LOOKED = 250  # steps after which pre-training looks for keys
TOKENS_A_KEY = 64  # at least, in training
_SHARES = {"pretrain": 0.46, "extend": 0.14, "evaluate": 0.09}  # of the time of `all`


@dataclass(frozen=True)
class Sizes:
    """
    `rows` sequences of `short` tokens are a step of pre-training in the end, and one of `long` a step of what follows.
    `characters` of each of the longest `documents` are read (None: all).
    """

    shape: dict
    vocabulary: int = 8192
    documents: int | None = None
    characters: int | None = None
    short: int = 8192
    long: tuple[int, ...] = (65536, 131072)
    rows: int = 2
    steps: tuple[int, ...] = (5000, 60, 30)
    rates: tuple[float, float] = (1e-3, 3e-4)
    rope_theta: float = 500000.0
    windows: int = 2
    samples: int = 6


FULL = Sizes(SHAPE | FAMILIES["llama"])
SMALL = Sizes(TINY, 640, 16, 2000, 64, (128, 256), rows=4, steps=(4, 2, 2), windows=1, samples=1)


def main():
    args = _arguments()
    sizes = SMALL if args.tiny else FULL
    Path(args.folder).mkdir(parents=True, exist_ok=True)
    if args.stage == "all":
        _all(args, sizes)
    else:
        _stage(args.stage, args, sizes, args.time_limit)


def _arguments(words: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("all", "prepare", "pretrain", "extend", "evaluate", "draw"))
    parser.add_argument("--folder", default="outputs/quality", help="where checkpoints and measurements are")
    parser.add_argument("--tokens", type=int, help="of extend: the length of a sequence")
    parser.add_argument("--model", help="of evaluate: base, or a length")
    parser.add_argument("--steps", type=int, help="of pretrain and extend, instead of their own number")
    parser.add_argument("--time-limit", type=float, metavar="S", help="of this stage, or of all; it ends in time")
    parser.add_argument("--tiny", action="store_true", help="tries the command on a CPU")
    parser.add_argument("--out", default="quality", help="path of the results, without ending")
    args = parser.parse_args(words)
    sizes = SMALL if args.tiny else FULL
    if (args.stage == "extend") != (args.tokens in sizes.long):
        raise ValueError(f"{args.stage} --tokens {args.tokens}: extend takes one of {_listed(sizes.long)}, others take none.")
    if (args.stage == "evaluate") != (args.model in _models(sizes)):
        raise ValueError(
            f"{args.stage} --model {args.model}: evaluate takes one of {_listed(_models(sizes))}, others take none."
        )
    if args.steps is not None and (args.steps < 1 or args.stage not in ("pretrain", "extend")):
        raise ValueError(f"{args.stage} --steps {args.steps}: pretrain and extend take one step at least, others take none.")
    return args


def _listed(values) -> str:
    return ", ".join(map(str, values))


def _models(sizes: Sizes) -> list[str]:
    return ["base", *map(str, sizes.long)]


def _all(args, sizes: Sizes) -> None:
    """Every stage has its share of the time that is left."""
    started = time.monotonic()
    _stage("prepare", args, sizes, None)
    work = [("pretrain", None), *(("extend", tokens) for tokens in sizes.long)]
    work += [("evaluate", name) for name in _models(sizes)]
    for index, (stage, value) in enumerate(work):
        shares = [_SHARES[name] for name, _ in work[index:]]
        left = None if args.time_limit is None else args.time_limit - (time.monotonic() - started)
        chosen = argparse.Namespace(**vars(args) | {"tokens": value, "model": value})
        _stage(stage, chosen, sizes, None if left is None else left * shares[0] / sum(shares))
    _stage("draw", args, sizes, None)


def _stage(stage: str, args, sizes: Sizes, seconds: float | None) -> None:
    clock, folder, started = Clock(seconds), Path(args.folder), time.monotonic()
    if stage == "prepare" or not (folder / "data.pt").exists():
        torch.save(prepared(sizes), folder / "data.pt")
    if stage == "pretrain":
        _pretrain(folder, sizes, args.steps or sizes.steps[0], clock)
    elif stage == "extend":
        _extend(folder, sizes, args.tokens, args.steps or sizes.steps[1 + sizes.long.index(args.tokens)], clock)
    elif stage == "evaluate":
        _evaluate(folder, sizes, args.model, clock)
    elif stage == "draw":
        _draw(folder, sizes, args.out)
    print(f"{stage} {args.tokens or args.model or ''}: {time.monotonic() - started:.0f} s", flush=True)


def prepared(sizes: Sizes) -> dict:
    """`text` and `held_out` as token ids, and the fields of the `Wording`."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
    from long_text import DataArguments, load_documents, load_tokenizer

    documents = load_documents(DataArguments(max_documents=sizes.documents))
    tokenizer = load_tokenizer(None, sizes.vocabulary, documents)
    parts, wanted = {"text": [], "held_out": []}, sizes.windows * sizes.long[-1]
    texts = [text[: sizes.characters] for text in documents["text"]]
    for index, ids in enumerate(tokenizer(texts)["input_ids"]):
        short = sum(map(len, parts["held_out"])) < wanted
        held_out = short and index % HELD_OUT_EVERY == HELD_OUT_EVERY - 1
        parts["held_out" if held_out else "text"].append(torch.tensor([*ids, tokenizer.eos_token_id], dtype=torch.int32))
    found = {name: torch.cat(ids).to(torch.int64) for name, ids in parts.items()}
    if len(found["held_out"]) < wanted:
        raise ValueError(f"the standard library has {len(found['held_out'])} tokens to hold out, and {wanted} are needed.")
    found["held_out"] = found["held_out"][:wanted]
    return found | {"wording": vars(wording(tokenizer))}


def _loaded(folder: Path) -> tuple[torch.Tensor, torch.Tensor, Wording]:
    data = torch.load(folder / "data.pt", weights_only=True)
    return data["text"], data["held_out"], Wording(**data["wording"])


def _pretrain(folder: Path, sizes: Sizes, steps: int, clock: Clock) -> None:
    text, _, words = _loaded(folder)
    rope = {"rope_type": "default", "rope_theta": sizes.rope_theta}
    config = AutoConfig.for_model(
        "llama", **sizes.shape, vocab_size=sizes.vocabulary, max_position_embeddings=sizes.short, use_cache=False,
        rope_parameters=rope,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(_device())
    generator, least = torch.Generator().manual_seed(0), 2 * words.length

    def batch(done: float) -> torch.Tensor:
        times = next((times for until, times in SHORTER if done < until), 1)
        repeated, tokens = (times * sizes.rows // 2 if times > 1 else 0), max(sizes.short // times, least)
        rows = [repeated_row(text, words, tokens, generator) for _ in range(repeated)]
        rows += [_row(text, words, tokens, generator) for _ in range(times * sizes.rows - repeated)]
        return torch.stack(rows)

    found = train(model, batch, sizes.rates[0], steps, clock, partial(_found_share, text, words, sizes.short))
    _save(model, folder / "base", found | {"rows": sizes.rows, "tokens": sizes.short})


def _extend(folder: Path, sizes: Sizes, tokens: int, steps: int, clock: Clock) -> None:
    """From the longest checkpoint below this length."""
    text, _, words = _loaded(folder)
    before = next(
        n for n in reversed(_models(sizes)) if (n == "base" or int(n) < tokens) and (folder / n / "run.json").exists()
    )
    config = lengthened(AutoConfig.from_pretrained(folder / before), tokens, sizes.short)
    model = AutoModelForCausalLM.from_pretrained(folder / before, config=config, attn_implementation="fpdt").to(_device())
    generator = torch.Generator().manual_seed(tokens)

    def batch(done: float) -> torch.Tensor:
        return _row(text, words, tokens, generator)[None]

    found = train(model, batch, sizes.rates[1], steps, clock)
    _save(model, folder / str(tokens), found | {"rows": 1, "tokens": tokens, "from": before})


def lengthened(config, tokens: int, short: int):
    """The configuration of a model that was trained on `short` tokens, for more with YaRN."""
    config.max_position_embeddings = tokens
    theta = config.rope_parameters["rope_theta"]
    yarn = {"rope_type": "yarn", "factor": tokens / short, "original_max_position_embeddings": short}
    config.rope_parameters = yarn | {"rope_theta": theta}
    return config


def _row(text, words: Wording, tokens: int, generator: torch.Generator) -> torch.Tensor:
    most = min(max(tokens // TOKENS_A_KEY, 1), len(words.names))
    keys = int(torch.randint(1, most + 1, (1,), generator=generator))
    return keyed_row(text, words, tokens, keys, generator)


def train(model, batch: Callable, peak: float, steps: int, clock: Clock, look: Callable | None = None) -> dict:
    """
    AdamW over all weights, in fp32 with bf16 autocast on a GPU. `batch` gives the rows of a step by how far training is, `look`
    what to write down of the model now and then.
    """
    device, losses, looks, started = _device(), [], [], time.monotonic()
    model.train()
    weights = list(model.parameters())
    optimizer = torch.optim.AdamW(weights, lr=peak, betas=(0.9, 0.95), weight_decay=0.1, fused=device.type == "cuda")
    for step in range(steps):
        done = max(step / steps, clock.part())
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = peak * rate(done * steps, steps, warm_up=max(steps // 15, 1))
        ids = batch(done).to(device)
        with half(device):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if look is not None and (step % LOOKED == LOOKED - 1 or step == 0):
            looks.append([step + 1, look(model)])
            print(f"step {step + 1}: loss {losses[-1].item():.3f}, keys found {looks[-1][1]:.2f}", flush=True)
    losses = torch.stack(losses).tolist() if losses else []
    if not all(map(math.isfinite, losses)):
        raise ValueError(f"losses are not all finite: {losses}")
    return {"losses": losses, "steps_wanted": steps, "looks": looks, "seconds": time.monotonic() - started}


def _found_share(text, words: Wording, tokens: int, model) -> float:
    """Of 16 documents, keys at any depth."""
    model.eval()
    generator = torch.Generator().manual_seed(1)
    asked = [document(text, words, tokens, depth / 15, generator).to(_device()) for depth in range(16)]
    found = sum(finds_key(model, ids) for ids in asked) / len(asked)
    model.train()
    return found


def _save(model, folder: Path, run: dict) -> None:
    model.save_pretrained(folder)
    run["parameters"] = sum(weight.numel() for weight in model.parameters())
    (folder / "run.json").write_text(json.dumps(run))
    last = run["losses"][-20:]
    mean = sum(last) / len(last) if last else math.nan
    print(f"{folder.name}: {len(run['losses'])} of {run['steps_wanted']} steps, loss {mean:.3f}", flush=True)


def _evaluate(folder: Path, sizes: Sizes, name: str, clock: Clock) -> None:
    _, held_out, words = _loaded(folder)
    model = AutoModelForCausalLM.from_pretrained(folder / name, attn_implementation="fpdt").to(_device()).eval()
    windows = held_out.view(sizes.windows, -1).to(_device())
    losses = position_losses(model, windows, BUCKETS, lambda: clock.part() >= 0.5)
    lengths = [sizes.short // 2 * 2**power for power in range(int(math.log2(2 * sizes.long[-1] // sizes.short)) + 1)]
    keys = key_counts(model, held_out, words, lengths, DEPTHS, sizes.samples, lambda: clock.part() >= 1)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none (CPU)"
    content = {"model": name, "gpu": gpu, "window": sizes.long[-1], "losses": losses, "keys": keys}
    (folder / f"evaluated_{name}.json").write_text(json.dumps(content))


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _draw(folder: Path, sizes: Sizes, out: str) -> None:
    from benchmarks.paper.quality_figure import draw, said

    rows = [json.loads(path.read_text()) for name in _models(sizes) if (path := folder / f"evaluated_{name}.json").exists()]
    runs = {name: json.loads(path.read_text()) for name in _models(sizes) if (path := folder / name / "run.json").exists()}
    head = header("paper.quality", out, rows[0]["gpu"] if rows else "unknown")
    content = {"header": head, "sizes": asdict(sizes), "runs": runs, "rows": rows, "said": said(rows, sizes.short)}
    Path(f"{out}.json").write_text(json.dumps(content, indent=1))
    print("\n".join(content["said"]))
    draw(rows, runs, sizes.short, Path(f"{out}.png"))


if __name__ == "__main__":
    main()
