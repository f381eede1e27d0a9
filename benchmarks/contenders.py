"""
What is compared. `prepare` does what needs no GPU; `build` makes a model, random weights, and the function that does one
forward and backward on token ids `[1, seq_len]` and returns the loss.

`sdpa`      transformers' SDPA attention and activation checkpointing.
`liger`     Liger's fused rotary, norm, MLP activation and linear cross-entropy, cuDNN SDPA, activation checkpointing.
`alst`      DeepSpeed's tiled MLP and tiled logits loss, Arctic's checkpoint offload to host memory, cuDNN SDPA.
`fpdt`      this package on the unmodified transformers modules.
`fpdt+liger` this package with Liger's fused rotary, norm and MLP activation (`use_liger_kernel` without its loss).
"""

import contextlib
import importlib
import importlib.util
import math
import os
from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM


def prepare(name: str, lora: int = 0) -> None:
    """Imports what the contender needs and changes transformers' classes as it wants them. No CUDA context is made."""
    if name in ("liger", "fpdt+liger"):
        from liger_kernel.transformers import (
            apply_liger_kernel_to_llama,
            apply_liger_kernel_to_mistral,
            apply_liger_kernel_to_qwen3,
        )

        for apply in (apply_liger_kernel_to_llama, apply_liger_kernel_to_mistral, apply_liger_kernel_to_qwen3):
            apply(fused_linear_cross_entropy=name == "liger", cross_entropy=False)
    if name == "alst":
        _tile_llama_mlp()
        _offload_checkpoints()
    if name.startswith("fpdt"):
        import hf_fpdt  # noqa: F401  (makes the name known)

        with contextlib.suppress(Exception):  # optional, and hf_fpdt says why it cannot be used
            importlib.import_module("flash_attn.cute.interface")
    if lora:
        import peft  # noqa: F401


def build(name: str, config, fpdt_settings: dict, *, device: str = "cuda", lora: int = 0, documents: int = 1):
    """
    The model and its step for a contender's name, after `prepare`.

    Args:
        lora: rank of adapters on the four projections of attention, everything else frozen; 0 trains all weights.
        documents: of equal length in a row, told by positions that start anew.
    """
    model = _model(config, "fpdt" if name.startswith("fpdt") else "sdpa", device)
    if lora:
        _add_adapters(model, lora)
    if name.startswith("fpdt"):
        import hf_fpdt

        share = host_share()
        limit = {} if share is None else {"host_memory": share}
        hf_fpdt.apply_fpdt(model, hf_fpdt.FPDTConfig(**(limit | fpdt_settings)))
        return model, partial(_step, model, contextlib.nullcontext, documents)
    model.gradient_checkpointing_enable({"use_reentrant": name == "alst"})
    if name == "sdpa":
        return model, partial(_step, model, contextlib.nullcontext, documents)
    if name == "alst" and lora:
        model.enable_input_require_grads()  # reentrant checkpoints have no gradients otherwise
    cudnn = partial(sdpa_kernel, [SDPBackend.CUDNN_ATTENTION])
    if name == "alst":
        return model, partial(_tiled_step, model, cudnn)
    return model, partial(_step, model, cudnn, documents)


def host_share() -> int | None:
    """Bytes of host memory that this process may lock, where it shares a host (`paper/spread.py`)."""
    share = os.environ.get("FPDT_HOST_MEMORY")
    return int(share) if share else None


def _model(config, attn_implementation: str, device: str, dtype: torch.dtype = torch.bfloat16):
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    config._attn_implementation = attn_implementation
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config).train()


def _add_adapters(model, rank: int) -> None:
    from peft import LoraConfig, get_peft_model

    projections = ["q_proj", "k_proj", "v_proj", "o_proj"]
    # In place, so the model itself is trained and not the wrapper. In bfloat16 like the rest: fp32 adapters widen their input.
    get_peft_model(model, LoraConfig(r=rank, lora_alpha=rank, target_modules=projections), autocast_adapter_dtype=False)


def _step(model, context, documents, ids):
    packed = {}
    if documents > 1:
        positions = torch.arange(ids.shape[1] // documents, device=ids.device).repeat(documents)
        packed = {
            "position_ids": positions[None],
            "use_cache": False,
        }  # with a cache transformers lets documents see each other
    with context():
        loss = model(input_ids=ids, labels=ids, **packed).loss
        loss.backward()
    return loss.detach()


def _tiled_step(model, context, ids):
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledFusedLogitsLoss

    seq_len = ids.shape[1]
    labels = torch.roll(ids, -1, 1)

    def loss_of_tile(module, hidden, targets):
        return torch.nn.functional.cross_entropy(module.lm_head(hidden).float(), targets, reduction="sum")

    with context():
        hidden = model.model(ids).last_hidden_state
        tiles = math.ceil(seq_len / 16384) * 2
        loss = TiledFusedLogitsLoss.apply(loss_of_tile, model, hidden, labels, None, tiles, [model.lm_head.weight], "sum")
        loss = loss / seq_len
        loss.backward()
    return loss.detach()


def _tile_llama_mlp():
    from deepspeed.runtime.sequence_parallel.ulysses_sp import TiledMLP
    from transformers.models.llama import modeling_llama

    def mlp(module, x):
        return module.down_proj(module.act_fn(module.gate_proj(x)) * module.up_proj(x))

    def forward(self, x):
        weights = [self.down_proj.weight, self.gate_proj.weight, self.up_proj.weight]
        return TiledMLP.apply(mlp, self, x, math.ceil(x.shape[1] / x.shape[2]), weights)

    modeling_llama.LlamaMLP.forward = forward


def _offload_checkpoints():
    # The file by its path: importing the package would need everything it depends on.
    root = importlib.util.find_spec("arctic_training").submodule_search_locations[0]
    spec = importlib.util.spec_from_file_location("monkey_patches", os.path.join(root, "monkey_patches.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.monkey_patch_checkpoint_function_with_cpu_offload()
