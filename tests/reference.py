"""What the tests compare with: tiny models, attention and gradients written without hf_fpdt, and the tolerances."""

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma2Config, GPTNeoXConfig, GptOssConfig, LlamaConfig, MistralConfig

from hf_fpdt import FPDTConfig, apply_fpdt
from hf_fpdt.attention_kernels import ScoreRule
from hf_fpdt.footprint import ALLOCATE, FREE, MemoryRecorder

# Largest difference of a tensor from the reference, relative to the largest entry of the reference. fp32 and fp64 allow for
# another order of summation and nothing else; bfloat16 has 8 bits.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
LOSS_TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1e-2}

SEQ_LEN = 48
VOCAB = 97


def _shape() -> dict[str, int]:
    """2 layers, 4 heads of 8 over 2 kv heads."""
    return {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip


def tiny_llama(**overrides) -> LlamaConfig:
    """Llama: 2 layers, 4 heads of 8 over 2 kv heads."""
    return LlamaConfig(**{**_shape(), **overrides})


def tiny_neox(*, rotary: float = 0.25, **overrides) -> GPTNeoXConfig:
    """GPT-NeoX: 2 layers, 4 heads of 16, no dropout unless asked for."""
    settings = {
        "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 512, "hidden_dropout": 0.0, "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": rotary},
    }  # fmt: skip
    return GPTNeoXConfig(**{**settings, **overrides})


def tiny_mistral(**overrides) -> MistralConfig:
    """The Llama, with a window of 11 tokens in every layer."""
    return MistralConfig(**(_shape() | {"sliding_window": 11} | overrides))


def tiny_gemma2(**overrides) -> Gemma2Config:
    """A layer with a window of 11 tokens and one without, both with capped scores."""
    settings = {"head_dim": 8, "sliding_window": 11, "attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 8}
    return Gemma2Config(**(_shape() | settings | overrides))


def tiny_gpt_oss(**overrides) -> GptOssConfig:
    """A layer with a window of 11 tokens and one without, both with sinks, and experts."""
    return GptOssConfig(**(_shape() | {"head_dim": 8, "sliding_window": 11, "num_local_experts": 4} | overrides))


@torch.no_grad()
def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights, norms and biases large enough that attention is far from uniform and nothing is 0 or 1 by initialization."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if weight.ndim > 1:
            weight.copy_(noise * (1.0 if "embed" in name else weight.shape[-1] ** -0.5))
        else:
            weight.copy_((1.0 if "norm" in name and name.endswith("weight") else 0.0) + 0.2 * noise)
    return model


def make_model(config, implementation: str = "sdpa", *, dtype=torch.float32, seed: int = 0, train: bool = True) -> nn.Module:
    """A causal LM with the same weights for every `implementation`, in training mode unless told otherwise."""
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation=implementation)
    return randomize(model, seed).to(dtype).train(train)


def make_streamed(config, chunk_size: int | str = 16, *, dtype=torch.float32, seed: int = 0, train: bool = True, **settings):
    """The model of `make_model`, streamed in chunks."""
    model = make_model(config, "fpdt", dtype=dtype, seed=seed, train=train)
    return apply_fpdt(model, FPDTConfig(chunk_size=chunk_size, **settings))


def make_batch(batch: int = 2, seq_len: int = SEQ_LEN, vocab: int = VOCAB, seed: int = 0) -> dict[str, Tensor]:
    """Random tokens as input and label."""
    generator = torch.Generator().manual_seed(1000 + seed)
    ids = torch.randint(3, vocab, (batch, seq_len), generator=generator)
    return {"input_ids": ids, "labels": ids.clone()}


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    """Copies of the gradients by parameter name."""
    return {name: None if w.grad is None else w.grad.detach().clone() for name, w in model.named_parameters()}


def loss_and_gradients(model: nn.Module, batch: dict[str, Tensor], **kwargs) -> tuple[Tensor, dict[str, Tensor | None]]:
    """One forward and backward from zeroed gradients."""
    model.zero_grad(set_to_none=True)
    loss = model(**batch, **kwargs).loss
    loss.backward()
    return loss.detach(), gradients(model)


def difference(got: Tensor, want: Tensor) -> float:
    """Largest difference relative to the largest entry wanted; infinite for NaN or another shape."""
    if got.shape != want.shape:
        return math.inf
    got, want = got.detach().double(), want.detach().double()
    if want.numel() == 0:
        return 0.0
    error = (got - want).abs().max().item()
    scale = want.abs().max().item()
    if math.isnan(error) or math.isnan(scale):
        return math.inf
    return error if scale == 0 else error / scale


def assert_close(got: Tensor, want: Tensor, tolerance: float | None = None, what: str = "tensor") -> None:
    tolerance = TOLERANCE[got.dtype] if tolerance is None else tolerance
    error = difference(got, want)
    assert error <= tolerance, f"{what} of shape {list(got.shape)} is off by {error:.2e} of its largest entry > {tolerance:.0e}"


def assert_gradients_close(
    got: dict, want: dict, tolerance: float = TOLERANCE[torch.float32], may_be_zero: tuple[str, ...] = ()
) -> None:
    """
    The same parameters have gradients, each within `tolerance` of its largest entry; names the worst. A reference that is all
    zeros proves nothing and is refused, unless its name contains one of `may_be_zero`.
    """
    assert set(got) == set(want)
    missing = [name for name in want if (got[name] is None) != (want[name] is None)]
    assert not missing, f"with a gradient in one run only: {missing}"
    errors = {name: difference(got[name], want[name]) for name in want if want[name] is not None}
    assert errors, "no gradients to compare"
    worst = max(errors, key=errors.get)
    assert errors[worst] <= tolerance, (
        f"gradient of {worst} is off by {errors[worst]:.2e} of its largest entry > {tolerance:.0e}"
    )
    zeros = [name for name in errors if not want[name].any() and not any(part in name for part in may_be_zero)]
    assert not zeros, f"reference gradients that are all zeros and prove nothing: {zeros}"


def total_gradient_error(got: dict, truth: dict) -> float:
    """2-norm over all parameters of the difference, relative to that of the truth."""
    error = sum((got[name].double() - truth[name].double()).square().sum() for name in truth)
    return (error / sum(g.double().square().sum() for g in truth.values())).sqrt().item()


def softmax_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, *, causal: bool, softcap: float | None = None,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """
    Attention in fp64 with one softmax over all keys, in the shapes of `hf_fpdt.attention_kernels`; autograd works through it.
    Written with an explicit loop over heads and a mask of allowed pairs, so that it shares no code or idea with the kernels.
    """
    queries, heads = query.shape[1:3]
    keys, kv_heads = key.shape[1:3]
    query, key, value = query.double(), key.double(), value.double()
    outs, lses = [], []
    for head in range(heads):
        kv = head * kv_heads // heads
        scores = query[:, :, head] @ key[:, :, kv].transpose(-1, -2) * scale
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        if causal:
            allowed = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
            allowed = allowed if window is None else allowed.triu(keys - queries - window + 1)
            scores = torch.where(allowed, scores, torch.tensor(float("-inf"), dtype=scores.dtype))
        outs.append(torch.softmax(scores, dim=-1) @ value[:, :, kv])
        lses.append(scores.exp().sum(-1).log())
    return torch.stack(outs, dim=2), torch.stack(lses, dim=1)


@dataclass
class Qkv:
    """Random attention inputs and an incoming gradient."""

    query: Tensor
    key: Tensor
    value: Tensor
    grad_out: Tensor
    scale: float

    @property
    def rule(self) -> ScoreRule:
        return ScoreRule(self.scale)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value


def draw_qkv(
    queries: int, keys: int, *, heads: int = 4, kv_heads: int = 2, head_dim: int = 16, value_dim: int | None = None,
    batch: int = 2, dtype=torch.float32, seed: int = 0,
) -> Qkv:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    value_dim = head_dim if value_dim is None else value_dim

    def draw(length, count, dim):
        return torch.randn(batch, length, count, dim, generator=generator, dtype=torch.float64).to(dtype)

    query, key, value = draw(queries, heads, head_dim), draw(keys, kv_heads, head_dim), draw(keys, kv_heads, value_dim)
    return Qkv(query, key, value, draw(queries, heads, value_dim), 0.9 * head_dim**-0.5)


class CallLengths:
    """Records the sequence length of every input of the modules whose name ends with `suffix`."""

    def __init__(self, model: nn.Module, suffix: str):
        self.lengths: list[int] = []
        named = [module for name, module in model.named_modules() if name.endswith(suffix)]
        assert named, f"no module ends with {suffix}"
        self._handles = [module.register_forward_pre_hook(self._record, with_kwargs=True) for module in named]

    def _record(self, module, args, kwargs):
        self.lengths.append((args[0] if args else kwargs["hidden_states"]).shape[1])

    def take(self) -> list[int]:
        lengths, self.lengths = self.lengths, []
        return lengths

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def peak_bytes(run):
    """Most bytes alive at a time while `run` runs, beyond what existed before."""
    with MemoryRecorder() as recorder:
        run()
    live = highest = 0
    for kind, _, size in recorder.log:
        live += {ALLOCATE: size, FREE: -size}.get(kind, 0)
        highest = max(highest, live)
    return highest
