"""
Every family whose attention goes through transformers' interface, against its own eager attention in fp32; and those that are
refused. A failure means a model that trains wrongly under "fpdt", or one that is no longer refused.

`python tests/test_families.py` writes docs/models.md.
"""

import os
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from ranks import run_ranks
from reference import (
    assert_gradients_close,
    gradients,
    loss_and_gradients,
    make_batch,
    make_model,
    make_streamed,
    tiny_llama,
)  # fmt: skip
from test_documents import one_by_one, positions_of
from test_sequence_parallel import shard_of, step
from transformers import CONFIG_MAPPING, AutoConfig

from hf_fpdt import FPDTConfig, apply_fpdt

COMMON = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT2 = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 512, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
ROUTED = {
    "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1,
}  # fmt: skip
LATENT = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 12,
}  # fmt: skip
LINEAR = {
    "num_hidden_layers": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "head_dim": 8,
}  # fmt: skip
HEADS = {"head_dim": 8}
WINDOW = {"sliding_window": 11}  # much shorter than the sequence
MODEL_CODE, MIXED = "has attention code of its own", "mixes .* causal attention layers with .* others"

# By model_type: what its configuration needs besides the common part.
EXACT = {
    "apertus": {}, "arcee": {}, "bitnet": {}, "cohere": {}, "cohere2": WINDOW, "cwm": HEADS | WINDOW,
    "deepseek_v2": LATENT | ROUTED, "deepseek_v3": LATENT | ROUTED, "dots1": ROUTED, "ernie4_5": HEADS, "exaone4": WINDOW,
    "flex_olmo": {"num_experts": 4, "num_experts_per_tok": 2}, "gemma": HEADS,
    "gemma2": HEADS | WINDOW | {"attn_logit_softcapping": 0.5}, "gemma3_text": HEADS | WINDOW, "glm": HEADS, "glm4": HEADS,
    "glm4_moe": HEADS | ROUTED, "gpt2": GPT2, "gpt_bigcode": GPT2, "gptj": GPT2 | {"rotary_dim": 8},
    "gpt_oss": HEADS | WINDOW | {"num_local_experts": 4},
    "gpt_neox": {"hidden_dropout": 0.0, "attention_dropout": 0.0}, "granite": {},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2}, "helium": HEADS, "hunyuan_v1_dense": HEADS,
    "hunyuan_v1_moe": HEADS | {"num_experts": 4, "moe_topk": 2}, "llama": {},
    "minimax_m2": HEADS | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "ministral": HEADS | WINDOW, "mistral": WINDOW, "mixtral": {"num_local_experts": 4}, "nemotron": {},
    "olmo": {}, "olmo2": {}, "olmo3": WINDOW, "olmoe": {"num_experts": 4, "num_experts_per_tok": 2}, "persimmon": {}, "phi": {},
    "phi3": {}, "phimoe": {"num_local_experts": 4, "router_jitter_noise": 0.0, "input_jitter_noise": 0.0}, "qwen2": {},
    "qwen2_moe": EXPERTS | WINDOW | {
        "shared_expert_intermediate_size": 24, "use_sliding_window": True, "max_window_layers": 1},
    "qwen3": HEADS,
    "qwen3_moe": EXPERTS | HEADS, "seed_oss": HEADS | {"attention_dropout": 0.0, "residual_dropout": 0.0}, "smollm3": {},
    "stablelm": {}, "starcoder2": {"residual_dropout": 0.0, "embedding_dropout": 0.0, "attention_dropout": 0.0} | WINDOW,
    "ministral3": HEADS | {"sliding_window": None}, "nanochat": HEADS, "modernbert-decoder": {"local_attention": 11},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24, "moe_num_shared_experts": 1},
    "llama4_text": HEADS | {"num_local_experts": 4, "intermediate_size_mlp": 56, "attn_temperature_tuning": True},
    "granitemoeshared": {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 24},
    "vaultgemma": HEADS | WINDOW | {"attn_logit_softcapping": 0.5},
}  # fmt: skip
REFUSED = {
    "bloom": ({}, MODEL_CODE), "falcon": ({}, MODEL_CODE), "gpt_neo": (
        {"num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]}, MODEL_CODE),
    "mamba": ({}, MODEL_CODE), "mpt": ({}, MODEL_CODE),
    "diffllama": ({}, "calls attention more than once"),
    "deepseek_v4": (HEADS, "DeepseekV4HCACompressor, through which tokens see others besides attention"),
    "falcon_h1": (
        {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1},
        "through which tokens see others besides attention"),
    "jamba": ({"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "use_mamba_kernels": False}, MIXED),
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, MIXED),
    "minimax": (HEADS | {"num_local_experts": 4, "layer_types": ["linear_attention", "full_attention"]}, MIXED),
    "mixtral": ({"num_local_experts": 4, "output_router_logits": True}, "auxiliary loss would have no gradient"),
    "qwen3_moe": (EXPERTS | HEADS | {"output_router_logits": True}, "auxiliary loss would have no gradient"),
    "qwen3_next": (EXPERTS | LINEAR | {"shared_expert_intermediate_size": 24}, MIXED),
}  # fmt: skip
NEWER = {"diffllama": 17, "gptj": 24, "nemotron": 17}  # the minor version of transformers 5
# Gradients that are zero by symmetry, and all rounding, or of experts that no token chose.
MAY_BE_ZERO = ("k_proj.bias", "router", "gate", "experts")


def _why_not(family) -> str | None:
    if family not in CONFIG_MAPPING:
        return f"this version of transformers has no {family}"
    if int(transformers.__version__.split(".")[1]) < NEWER.get(family, 0):
        return f"{family} has attention code of its own in this version of transformers"
    return None


def config_of(family, overrides):
    if _why_not(family) is not None:
        pytest.skip(_why_not(family))
    return AutoConfig.for_model(family, **{**COMMON, **overrides})


@pytest.mark.parametrize("family", EXACT)
def test_exact(family):
    """Dense, packed and padded on either side; in ragged chunks and in one."""
    config = config_of(family, EXACT[family])
    plain, streamed = make_model(config, "eager"), {chunk: make_streamed(config, chunk) for chunk in (17, 64)}
    batch = make_batch(2, 47)
    mask = torch.ones(2, 47, dtype=torch.long)
    mask[1, :9] = 0
    padded = batch | {"attention_mask": mask, "labels": batch["labels"].masked_fill(mask == 0, -100)}
    padded["labels"][1, 9] = -100  # predicted by padding
    if EXACT[family].get("sliding_window"):
        wide = make_model(config_of(family, EXACT[family] | {"sliding_window": 400}), "eager")
        assert abs(wide(**batch).loss - plain(**batch).loss) > 1e-4, "the window makes no difference"
    after = mask.flip(1)
    padded_after = batch | {"attention_mask": after, "labels": batch["labels"].masked_fill(after == 0, -100)}
    rows = [TEXTS, [(0, 47)]]
    *alone, labels = one_by_one(plain, batch["input_ids"], rows)  # eager lets documents see each other in some families
    packed = batch | {"position_ids": positions_of(rows, 47), "labels": labels}
    for case, given in {"dense": batch, "padded": padded, "padded after": padded_after, "packed": packed}.items():
        want, want_grads = alone if case == "packed" else loss_and_gradients(plain, given)
        for chunk, model in streamed.items():
            got, grads = loss_and_gradients(model, given)
            assert abs(got - want) <= 2e-6 * want, (case, chunk)
            assert_gradients_close(grads, want_grads, may_be_zero=MAY_BE_ZERO)


TEXTS = [(0, 20), (20, 21), (21, 47)]


def _shared_batches() -> dict[str, dict]:
    """Two rows, two rows of which one is padded on the right, one row of three texts."""
    dense, mask = make_batch(2, 47), torch.ones(2, 47, dtype=torch.long)
    mask[1, 38:] = 0
    padded = dense | {"attention_mask": mask, "labels": dense["labels"].masked_fill(mask == 0, -100)}
    packed = make_batch(1, 47) | {"position_ids": positions_of([TEXTS], 47)}
    packed["labels"][packed["position_ids"] == 0] = -100
    return {"dense": dense, "padded": padded, "packed": packed}


def _train_shared(rank: int, families: list[str]) -> dict:
    """Loss and summed gradients of a family's shard, by kind of batch, or the error."""
    group, settings, found = dist.group.WORLD, FPDTConfig(chunk_size=14), {}
    for family in families:
        try:
            model = apply_fpdt(make_model(config_of(family, EXACT[family]), "eager"), settings, sp_group=group)
            found[family] = {}
            for kind, batch in _shared_batches().items():
                model.zero_grad()
                loss = step(model, shard_of(batch, settings, rank, group.size()), group)
                grads = {name: grad for name, grad in gradients(model).items() if grad is not None}
                for grad in grads.values():
                    dist.all_reduce(grad)
                found[family][kind] = loss, grads
        except ValueError as error:
            found[family] = str(error)
    return found


@pytest.fixture(scope="module")
def shared():
    there = [family for family in EXACT if _why_not(family) is None]
    return run_ranks(_train_shared, 2, there, timeout=400)


@pytest.mark.parametrize("family", EXACT)
def test_shared_by_two_processes(family, shared):
    """Every rank's loss, and the sum of their gradients: dense, padded on the right, packed."""
    plain = make_model(config_of(family, EXACT[family]), "eager")
    for kind, batch in _shared_batches().items():
        if kind == "packed":
            want, want_grads, _ = one_by_one(plain, batch["input_ids"], [TEXTS])
        else:
            want, want_grads = loss_and_gradients(plain, batch)
        for results in shared:
            assert not isinstance(results[family], str), results[family]
            loss, grads = results[family][kind]
            assert abs(loss - want) <= 2e-6 * want, kind
            there = {name: grad for name, grad in want_grads.items() if grad is not None}
            assert_gradients_close(grads, there, may_be_zero=MAY_BE_ZERO)


@pytest.mark.parametrize("family", EXACT)
def test_lora(family):
    """On every linear module but the head; packed."""
    peft = pytest.importorskip("peft")
    config, models = config_of(family, EXACT[family]), []
    for implementation in ("eager", "fpdt"):
        model = make_model(config, implementation)
        # PEFT takes the router of Phi's experts, which returns several values, for a linear module.
        kinds = peft.LoraConfig(r=3, target_modules="all-linear", exclude_modules=["router"], init_lora_weights=False)
        torch.manual_seed(5)
        models.append(peft.get_peft_model(model, kinds).train())
    apply_fpdt(models[1], FPDTConfig(chunk_size=17))
    batch = make_batch(2, 47) | {"use_cache": False}
    try:
        want, want_grads = loss_and_gradients(models[0], batch)
    except AttributeError as error:  # with transformers 5.0
        if "ParamWrapper" not in str(error):
            raise
        pytest.skip(f"PEFT's wrapper of experts does not fit this version of transformers: {error}")
    got, grads = loss_and_gradients(models[1], batch)
    assert abs(got - want) <= 2e-6 * want
    trained = {name for name, grad in want_grads.items() if grad is not None}
    assert trained
    assert all("lora" in name for name in trained)
    assert_gradients_close(grads, want_grads, may_be_zero=MAY_BE_ZERO)


SHORT = 16  # tokens that the model was trained on; the test has 47
ROPE = {
    "linear": {"factor": 2.0}, "dynamic": {"factor": 2.0}, "yarn": {"factor": 4.0},
    "longrope": {"factor": 4.0, "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 2.5, 3.0, 4.0]},
    "llama3": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
}  # fmt: skip


@pytest.mark.parametrize("kind", ROPE)
def test_rotary_tables_are_those_of_the_whole_sequence(kind):
    """Not those of a chunk, which is short."""
    rope, length = {"rope_type": kind, "rope_theta": 10000.0, **ROPE[kind]}, SHORT
    if kind in ("yarn", "longrope", "llama3"):
        rope, length = rope | {"original_max_position_embeddings": SHORT}, 4 * SHORT
    config, batch = tiny_llama(max_position_embeddings=length, rope_parameters=rope), make_batch(2, 47)
    eager = make_model(config, "eager")
    want, want_grads = loss_and_gradients(eager, batch)
    plain, _ = loss_and_gradients(make_model(tiny_llama(), "eager"), batch)
    assert abs(plain - want) > 1e-4 * want  # it makes a difference
    with torch.no_grad():
        logits = eager(batch["input_ids"]).logits
    for chunk in (10, 64):
        with torch.no_grad():
            seen = make_streamed(config, chunk)(batch["input_ids"]).logits
        assert (seen - logits).abs().max() <= 1e-5 * logits.abs().max()
        got, grads = loss_and_gradients(make_streamed(config, chunk), batch)
        assert abs(got - want) <= 2e-6 * want
        assert_gradients_close(grads, want_grads)


@pytest.mark.parametrize("family", REFUSED)
def test_refused(family):
    overrides, message = REFUSED[family]
    config = config_of(family, overrides)
    with pytest.raises(ValueError, match=message):
        make_streamed(config, 17)(**make_batch(2, 47))


INTRODUCTION = """# Models

Written by `python tests/test_families.py`. The test suite trains a tiny model of each family with its own eager attention and
with fpdt, in ragged chunks and in one, in fp32, and compares the loss (2e-6) and every gradient (1e-5):

* one text a row, padding on either side, and packed documents (against a run of each document alone);
* windows, capped scores and sinks, where a family has them, in these cases;
* every sequence shared by two processes, dense, padded on the right and packed (their losses, and the sum of their gradients);
* LoRA on all linear modules.

Families that are not here and take attention from transformers' interface run the same code, untested."""


def table() -> str:
    lines = [
        *INTRODUCTION.splitlines(), "",
        "| `model_type` | dense, padded, packed | attention besides | shared by two | LoRA |", "|---|---|---|---|---|",
        *(f"| `{family}` | exact | {_has(family)} | exact | exact |" for family in sorted(EXACT)), "",
        "Refused with a `ValueError`, before or in the first forward:", "", "| `model_type` | because |", "|---|---|",
        *(f"| `{family}` | {_reason(family)} |" for family in sorted(REFUSED)), "",
    ]  # fmt: skip
    return "\n".join(lines)


def _has(family: str) -> str:
    has = {"sliding_window": "windows", "attn_logit_softcapping": "capped scores"}
    words = [word for name, word in has.items() if EXACT[family].get(name)] + ["sinks"] * (family == "gpt_oss")
    return ", ".join(words)


def _reason(family: str) -> str:
    overrides, message = REFUSED[family]
    asked = [f"`{name}={value}`" for name, value in overrides.items() if name == "output_router_logits"]
    told = re.sub(r" \.\*", " ...", message)
    return f"{told}" + (f" ({asked[0]})" if asked and family in ("mixtral", "qwen3_moe") else "")


def test_the_documented_table_is_this_one():
    assert DOCUMENT.read_text() == table()


DOCUMENT = Path(__file__).parents[1] / "docs" / "models.md"

if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    DOCUMENT.write_text(table())
