"""
The command `hf-fpdt`.

    hf-fpdt plan MODEL --seq-len 131072 [--lora 16] [--gpu-memory 80GiB] [--json] [--plot memory.png]
    hf-fpdt plan MODEL --longest ...
    hf-fpdt plan MODEL --seq-len 1048576 --gpus 8 [--zero 3] [--sp-size 8]
    hf-fpdt bench [--out rates.json]
    hf-fpdt env
"""

import argparse
import json
import re
import sys
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from .attention_interface import NAME
from .bench import measure_rates
from .config import FPDTConfig
from .engine_memory import GPUS_A_HOST, STAGES
from .environment import report
from .host_arena import HostMemoryError
from .model_plan import device_limit, usable_bytes
from .plan_report import GIB, as_json, by_length, draw, fitting, launch_line, longest
from .planning import engine_of, plan
from .rates import as_lines, cached_path, load, of_this_machine
from .step_plan import DeviceMemoryError

_UNITS = {"": GIB, "mb": 10**6, "mib": 2**20, "gb": 10**9, "gib": GIB, "tb": 10**12, "tib": 2**40}
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_YES_NO = {"auto": "auto", "yes": True, "no": False}


def main(words: list[str] | None = None) -> int:
    """Runs a command line; returns its exit status: 1 where nothing fits, 2 for a command that cannot be carried out."""
    args = _parser().parse_args(words)
    try:
        return args.run(args)
    except (DeviceMemoryError, HostMemoryError) as error:
        print(f"hf-fpdt: it does not fit. {error}", file=sys.stderr)
        return 1
    except ImportError as error:
        print(f"hf-fpdt: {error}. --lora needs peft, and --plot matplotlib: pip install them.", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"hf-fpdt: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-fpdt", description="Finetuning on very long sequences.")
    commands = parser.add_subparsers(required=True)
    env = commands.add_parser("env", help="what a bug report has to say about this machine")
    env.set_defaults(run=_env)
    bench = commands.add_parser(
        "bench",
        help="measure what this machine's GPU does in a second, by which plan tells the time of a step",
        description="Takes a minute or two. The result is kept for this user, and `hf-fpdt plan` finds it.",
    )
    bench.set_defaults(run=_bench)
    bench.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try the command")
    bench.add_argument("--seconds", type=float, default=1.0, help="of every kind of work (default: 1)")
    bench.add_argument("--out", type=Path, metavar="FILE", help="write it here instead, to plan on another machine")
    one = commands.add_parser(
        "plan",
        help="what a training step would take, without a GPU and without weights",
        description="Predicts GPU and host memory of one training step, and of each GPU if there are several. Nothing is "
        "trained or downloaded but the configuration. On one GPU gradients and optimizer states are kept free; "
        "with several DeepSpeed has fp32 weights and an AdamW state in pieces on them.",
    )
    one.set_defaults(run=_plan)
    one.add_argument("model", help="a folder or file with a config.json, or a name on the Hub")
    length = one.add_mutually_exclusive_group(required=True)
    length.add_argument("--seq-len", type=int, help="tokens of a sequence")
    length.add_argument("--longest", action="store_true", help="find the longest sequences that fit")
    one.add_argument("--batch-size", type=int, default=1, help="sequences of a step (default: 1)")
    one.add_argument("--dtype", choices=_DTYPES, default="bfloat16", help="of the weights (default: bfloat16)")
    one.add_argument("--lora", type=int, metavar="RANK", help="adapters of this rank, everything else frozen; needs peft")
    one.add_argument("--lora-targets", help="modules with adapters, by commas (default: all-linear)")
    one.add_argument("--gpus", type=int, default=1, help="that train together under DeepSpeed, over all machines (default: 1)")
    one.add_argument("--sp-size", type=int, metavar="N", help="GPUs that share every sequence (default: all)")
    one.add_argument("--zero", type=int, choices=STAGES, help="ZeRO stage (default: 3 with several GPUs)")
    one.add_argument(
        "--gpu-memory", type=_size, metavar="SIZE", help="80GiB, 141GB, ... (default: of --rates, or of this machine)"
    )
    one.add_argument(
        "--optimizer-memory",
        type=_size,
        metavar="SIZE",
        help="of its states on the GPU (default: as AdamW in the weights' dtype)",
    )
    one.add_argument("--host-memory", type=_size, metavar="SIZE", help="of a machine (default: what this one can give)")
    one.add_argument("--gpus-per-host", type=int, metavar="N", help=f"(default: all, up to {GPUS_A_HOST})")
    one.add_argument("--chunk-size", type=int, help="tokens of a chunk (default: chosen)")
    one.add_argument("--kv", choices=("auto", "resident", "streamed"), default="auto", help="K and V of the running layer")
    one.add_argument("--offload", choices=("auto", "none", "host", "disk"), default="auto", help="where layers wait")
    one.add_argument("--disk-folder", help="with --offload disk: where the run would have its file")
    one.add_argument("--recompute", choices=_YES_NO, default="auto", help="run layers again in the backward")
    one.add_argument("--save-attention", choices=_YES_NO, default="auto", help="not to compute attention twice")
    one.add_argument("--kernel", default="auto", help="attention kernel (default: the fastest)")
    one.add_argument("--rates", metavar="GPU|FILE", help="tell the time by these: h200, or what `hf-fpdt bench --out` wrote")
    one.add_argument("--liger", action="store_true", help="tell the time as with Liger's kernels")
    one.add_argument("--json", action="store_true", help="print JSON, memory in bytes, times in seconds")
    one.add_argument("--plot", type=Path, metavar="FILE", help="draw memory against length; needs matplotlib")
    return parser


def _env(args: argparse.Namespace) -> int:
    lines = report()
    width = max(len(what) for what, _ in lines)
    for what, value in lines:
        print(f"{what:<{width}}  {value}")
    return 0


def _bench(args: argparse.Namespace) -> int:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("bench on a machine without a GPU: run it where the GPU is, or try it with --device cpu.")
    if not 0 < args.seconds < 3600 or (args.out is not None and args.out.suffix != ".json"):
        raise ValueError(f"--seconds {args.seconds} --out {args.out}: seconds from 0 to 3600 and a file.json are needed.")
    rates = measure_rates(torch.device(args.device), args.seconds)
    path = args.out or cached_path(rates.gpu)
    rates.save(path)
    for line in as_lines(rates):
        print(line)
    print(f"Written to {path}.")
    return 0


def _plan(args: argparse.Namespace) -> int:
    config, model = _settings(args), _model(args)
    if args.rates is None and of_this_machine() is None and args.liger:
        raise ValueError("--liger changes the time, and no rates are known: name them with --rates, or run `hf-fpdt bench`.")
    asked = {"batch_size": args.batch_size, "gpus": args.gpus, "sp_size": args.sp_size, "zero": args.zero}
    if args.longest:
        config, length = longest(model, config, **asked)
    else:
        config, length = fitting(model, args.seq_len, config, **asked)[0], args.seq_len
    found = plan(model, seq_len=length, config=config, rates=args.rates, fused=args.liger, **asked)
    if args.rates is not None and found.time is None:
        raise ValueError(
            f"--rates {args.rates} --dtype {args.dtype}: there are rates of 16-bit weights, none of disks, and between GPUs "
            "only where `hf-fpdt bench` had several."
        )
    launch = launch_line(engine_of(model, args.gpus, args.sp_size, args.zero), config)
    if args.json:
        print(json.dumps(as_json(found) | {"launch": launch}, indent=2))
    else:
        print(found)
        print(f"  start it with  {launch}")
        print(_about_positions(model, found.seq_len), end="")
    if args.plot is not None:
        title = f"{Path(args.model).name}{f', LoRA {args.lora}' if args.lora else ''}: one training step"
        draw(list(by_length(model, found.seq_len, config, **asked)), title, args.plot)
    return 0


def _settings(args: argparse.Namespace) -> FPDTConfig:
    given = {"gpu_memory": _gpu_memory(args), "host_memory": _share(args), "chunk_size": args.chunk_size}
    given["optimizer_memory"] = args.optimizer_memory
    return FPDTConfig(
        **{name: value for name, value in given.items() if value is not None},
        kv=args.kv,
        offload=args.offload,
        disk_folder=args.disk_folder,
        recompute=_YES_NO[args.recompute],
        save_attention=_YES_NO[args.save_attention],
        kernel=args.kernel,
    )


def _gpu_memory(args: argparse.Namespace) -> int:
    if args.gpu_memory is not None:
        return args.gpu_memory
    if args.rates is not None and (size := load(args.rates).gpu_bytes):  # of another machine's GPU, if it has one
        return usable_bytes(size)
    if not torch.cuda.is_available():
        raise ValueError(
            "plan on a machine without a GPU: pass --gpu-memory, for example --gpu-memory 80GiB, or name a GPU with --rates."
        )
    # What a process that starts now could take.
    return device_limit(FPDTConfig(), torch.device("cuda", torch.cuda.current_device()))


def _share(args: argparse.Namespace) -> int | None:
    """A process's part of the machine's memory."""
    on_host = min(args.gpus, GPUS_A_HOST) if args.gpus_per_host is None else args.gpus_per_host
    if on_host < 1 or args.gpus % on_host:
        raise ValueError(f"--gpus {args.gpus} --gpus-per-host {args.gpus_per_host}: every machine needs as many, at least one.")
    if args.host_memory is None and args.gpus_per_host is not None:
        raise ValueError(f"--gpus-per-host {args.gpus_per_host} without --host-memory: name the memory that they share.")
    return None if args.host_memory is None else args.host_memory // on_host


def _model(args: argparse.Namespace) -> nn.Module:
    """Without weights: on the meta device."""
    if args.lora is None and args.lora_targets is not None:
        raise ValueError(f"--lora-targets {args.lora_targets} without --lora: name the rank of the adapters, as in --lora 16.")
    config = AutoConfig.from_pretrained(args.model)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=NAME, dtype=_DTYPES[args.dtype])
        if args.lora is not None:
            model = _with_adapters(model, args.lora, args.lora_targets or "all-linear")
    return model.train()


def _with_adapters(model: nn.Module, rank: int, targets: str) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    names = targets if targets == "all-linear" else targets.split(",")
    return get_peft_model(model, LoraConfig(r=rank, target_modules=names, task_type="CAUSAL_LM"), autocast_adapter_dtype=False)


def _about_positions(model: nn.Module, seq_len: int) -> str:
    most = getattr(model.config, "max_position_embeddings", None)
    if most is None or seq_len <= most:
        return ""
    return f"  The model was made for {most} tokens (max_position_embeddings): extend its rotary embeddings, as with YaRN.\n"


def _size(text: str) -> int:
    """Bytes of `"80GiB"`, `"141GB"`, `"80"` (GiB)."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if found is None or found[2] not in _UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; 80GiB, 141GB or 80 (GiB) are.")
    return int(float(found[1]) * _UNITS[found[2]])


if __name__ == "__main__":
    sys.exit(main())
