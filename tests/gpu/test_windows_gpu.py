"""
Windows, capped scores and sinks on a GPU: every kernel that says it has them against the definition, and models against
their own eager attention in fp32. A failure means wrong attention, or a claim that is wrong.
"""

import copy

import pytest
import torch
from test_kernels_gpu import relative_error
from transformers import AutoModelForCausalLM, Gemma2Config, GptOssConfig, MistralConfig

import hf_fpdt
from hf_fpdt.attention_kernels import ScoreRule
from hf_fpdt.causal_attention import attend_prefix, attend_prefix_backward
from hf_fpdt.kernel_choice import KERNELS, choose_kernel
from hf_fpdt.transfers import transfers_for

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda", 0)
RULES = [{"window": 1}, {"window": 128}, {"window": 700}, {"softcap": 2.0}, {"softcap": 2.0, "window": 300}]
SHAPE = {
    "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2,
    "head_dim": 64, "vocab_size": 1000, "initializer_range": 0.05, "use_cache": False,
}  # fmt: skip
CONFIGS = {
    "mistral": lambda: MistralConfig(**SHAPE, sliding_window=500),
    "gemma2": lambda: Gemma2Config(**SHAPE, sliding_window=500, attn_logit_softcapping=5.0, query_pre_attn_scalar=64),
    "gpt_oss": lambda: GptOssConfig(**SHAPE, sliding_window=500, num_local_experts=4, num_experts_per_tok=2),
}


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(("chunk", "keys", "heads", "kv_heads", "head_dim"), [
    (512, 512, 8, 8, 128), (512, 2048, 8, 2, 128), (300, 1111, 4, 1, 64), (200, 1500, 4, 2, 256),
])  # fmt: skip
@pytest.mark.parametrize("name", [name for name, kernel in KERNELS.items() if kernel.features and name != "naive"])
def test_prefix_against_definition(name, chunk, keys, heads, kv_heads, head_dim, rule):
    try:
        features = ScoreRule(1.0, **rule).features
        kernel = choose_kernel(name, DEVICE, torch.bfloat16, head_dim, head_dim, features)
    except ValueError as error:
        if "is not installed" in str(error) or "has no softcap" in str(error) or head_dim == 256:
            pytest.skip(str(error))
        raise
    torch.manual_seed(0)
    query, grad_out = (torch.randn(2, chunk, heads, head_dim, device=DEVICE) for _ in range(2))
    key, value = (torch.randn(2, keys, kv_heads, head_dim, device=DEVICE) for _ in range(2))
    tensors = [x.to(torch.bfloat16) for x in (grad_out, query, key, value)]
    rule = ScoreRule(head_dim**-0.5, **rule)
    got, want = run(kernel, rule, *tensors), run(KERNELS["naive"], rule, *(x.float() for x in tensors))
    alone = rule.window == 1  # one key: no gradient of the query but rounding
    for label in want:
        if not (alone and label in ("grad_query", "grad_key")):
            assert relative_error(got[label], want[label]) < (1e-3 if label == "lse" else 1e-2), label


def run(kernel, rule, grad_out, query, key, value):
    grad_key, grad_value = (torch.zeros_like(x, dtype=torch.float32) for x in (key, value))
    out, lse = attend_prefix(kernel, query, key, value, rule)
    grad_query = attend_prefix_backward(kernel, grad_out, query, key, value, out, lse, rule, grad_key, grad_value)
    return {"out": out, "lse": lse, "grad_query": grad_query, "grad_key": grad_key, "grad_value": grad_value}


def test_auto_finds_fast_ones():
    for features in (
        {"window"},
        {"softcap"} if KERNELS["flash_attention_4"].why_not(DEVICE, torch.bfloat16, 64, 64) is None else (),
    ):
        for head_dim in (64, 128):
            kernel = choose_kernel("auto", DEVICE, torch.bfloat16, head_dim, head_dim, frozenset(features))
            assert kernel.name != "naive"


def model_of(name, implementation):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation=implementation).train()
    for parameter in model.parameters():
        if parameter.ndim == 1 and not parameter.any():  # sinks and biases that begin as 0
            torch.nn.init.normal_(parameter, std=0.5)
    return model.to("cuda")


@pytest.mark.parametrize(
    "settings", [{}, {"offload": "host"}, {"kv": "streamed", "offload": "host"}, {"save_attention": False}], ids=str
)
@pytest.mark.parametrize("name", CONFIGS)
def test_models(name, settings):
    ids = torch.randint(0, 1000, (1, 2500), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    plain = model_of(name, "eager")
    plain(input_ids=ids, labels=ids).loss.backward()
    model = hf_fpdt.apply_fpdt(model_of(name, "fpdt").to(torch.bfloat16), hf_fpdt.FPDTConfig(chunk_size=600, **settings))
    rounded = copy.deepcopy(plain).to(torch.bfloat16)  # what bf16 alone costs
    rounded.zero_grad()
    rounded(input_ids=ids, labels=ids).loss.backward()
    model(input_ids=ids, labels=ids).loss.backward()
    wants, theirs = (dict(one.named_parameters()) for one in (plain, rounded))
    for parameter_name, parameter in model.named_parameters():
        want, other = wants[parameter_name].grad, theirs[parameter_name].grad
        if want is None or not want.any():
            continue
        error, rounding = relative_error(parameter.grad, want), relative_error(other, want)
        assert error <= 1.5 * rounding + 1e-2, (parameter_name, error, rounding)


def test_a_window_layer_takes_what_was_predicted():
    """K and V streamed too: the blocks of a window are fetched together."""
    config = MistralConfig(**(SHAPE | {"hidden_size": 1024, "intermediate_size": 3584}), sliding_window=4096)
    ids = torch.randint(0, 1000, (1, 65536), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    for settings in ({"offload": "host"}, {"kv": "streamed", "offload": "host"}, {}):
        transfers_for.cache_clear()
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="fpdt").to("cuda", torch.bfloat16).train()
        for _ in range(2):
            model.zero_grad()
            hf_fpdt.apply_fpdt(model, hf_fpdt.FPDTConfig(chunk_size=8192, **settings))
            torch.cuda.reset_peak_memory_stats()
            model(input_ids=ids, labels=ids).loss.backward()
        (plan,) = model.model.__dict__["_fpdt_plans"].values()
        taken = torch.cuda.max_memory_allocated()
        assert 0.95 * taken <= plan.peaks.device <= 1.1 * taken, (settings, plan.peaks.device / 2**20, taken / 2**20)
        del model
