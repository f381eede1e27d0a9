"""
Sliding windows, capped scores and sinks: what eager attention makes of them, in every store, over documents and padding. A
failure means a model that trains with another attention than its own, or a window layer that costs what a full one does.
"""

import pytest
import torch
from reference import (
    SEQ_LEN,
    assert_close,
    assert_gradients_close,
    difference,
    draw_qkv,
    loss_and_gradients,
    make_batch,
    make_model,
    make_streamed,
    softmax_attention,
    tiny_gemma2,
    tiny_gpt_oss,
    tiny_llama,
    tiny_mistral,
)
from test_documents import CASES, LOSS, STORES, assert_alone

from hf_fpdt import kernel_choice, key_value_store
from hf_fpdt.attention_kernels import NaiveKernel, ScoreRule
from hf_fpdt.causal_attention import attend_prefix, attend_prefix_backward
from hf_fpdt.kernel_choice import KERNELS, choose_kernel
from hf_fpdt.online_softmax import sinks_grad, with_sinks

FAMILIES = {"mistral": tiny_mistral, "gemma2": tiny_gemma2, "gpt_oss": tiny_gpt_oss}
EXPERTS = ("router", "experts")


def compare(config, chunk, batch, may_be_zero=EXPERTS, **settings):
    want, want_grads = loss_and_gradients(make_model(config, "eager"), batch)
    got, grads = loss_and_gradients(make_streamed(config, chunk, **settings), batch)
    assert abs(got - want) <= LOSS * want
    assert_gradients_close(grads, want_grads, may_be_zero=may_be_zero)


# Models


@pytest.mark.parametrize("settings", STORES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_stores(family, settings):
    for chunk in (10, 17):
        compare(FAMILIES[family](), chunk, make_batch(), **settings)


@pytest.mark.parametrize("settings", STORES, ids=str)
@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 33, 47, 48, 100])
def test_windows_and_chunks_of_16(window, settings):
    """Shorter than a chunk, as long, longer than two, and longer than the sequence."""
    alone = ("q_proj", "k_proj") if window == 1 else ()  # with one token to attend to
    compare(tiny_mistral(sliding_window=window), 16, make_batch(), alone, **settings)


def test_the_comparison_sees_the_window():
    want = make_model(tiny_llama(), "eager")(**make_batch()).loss
    got = make_model(tiny_mistral(sliding_window=40), "eager")(**make_batch()).loss
    assert abs(got - want) > 100 * LOSS * want


@pytest.mark.parametrize("settings", STORES, ids=str)
@pytest.mark.parametrize("rows", CASES.values(), ids=CASES)
def test_documents_inside_of_windows(rows, settings):
    assert_alone(tiny_mistral(), rows, SEQ_LEN, 16, **settings)


@pytest.mark.parametrize("rows", CASES.values(), ids=CASES)
def test_documents_and_sinks(rows):
    """A query of padding sees nothing, the sink apart."""
    for settings in STORES[:2]:
        assert_alone(tiny_gpt_oss(), rows, SEQ_LEN, 16, **settings)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "mistral"])
def test_generation_and_forwards_with_a_cache(family):
    """They are not streamed, and have what SDPA has not."""
    plain, streamed = (make_model(FAMILIES[family](), name, train=False) for name in ("eager", "fpdt"))
    ids, mask = make_batch()["input_ids"][:, :30], torch.ones(2, 30, dtype=torch.long)
    mask[0, :7] = 0
    with torch.no_grad():
        got, want = (model(ids, attention_mask=mask, use_cache=True).logits[mask.bool()] for model in (streamed, plain))
    assert_close(got, want)
    made = [
        model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, output_logits=True,
                       return_dict_in_generate=True)
        for model in (streamed, plain)
    ]  # fmt: skip
    assert torch.equal(*(one.sequences for one in made))
    assert_close(*(torch.stack(one.logits) for one in made))


def test_not_a_number_stays_one_with_a_cache():
    """Padding sees nothing and gets 0; broken weights must not look like padding."""
    model, ids = make_model(tiny_gemma2(), "fpdt", train=False), make_batch()["input_ids"]
    with torch.no_grad():
        assert model(ids, use_cache=True).logits.isfinite().all()
        model.model.layers[0].self_attn.q_proj.weight[0, 0] = float("nan")
        assert model(ids, use_cache=True).logits.isnan().any()


def test_only_what_the_window_reaches_is_multiplied_and_fetched(monkeypatch):
    """Twice the tokens cost twice as much."""
    products, fetched = [], []
    for call in ("forward", "backward"):
        run = getattr(NaiveKernel, call)

        def counted(self, *args, run=run, at=0 if call == "forward" else 1, causal):
            products.append(args[at].shape[1] * args[at + 1].shape[1])
            return run(self, *args, causal=causal)

        monkeypatch.setattr(NaiveKernel, call, counted)
    in_order = key_value_store._in_order
    monkeypatch.setattr(key_value_store, "_in_order", lambda groups: fetched.append(len(groups)) or in_order(groups))
    config, layers, passes = tiny_mistral(sliding_window=20), 2, 2
    for tokens in (128, 256):
        for kv in ("resident", "streamed"):
            products.clear()
            fetched.clear()
            loss_and_gradients(make_streamed(config, 16, kv=kv, offload="host"), make_batch(1, tokens))
            chunks = tokens // 16
            keys = 16 + 32 + (chunks - 2) * (16 + 19)
            assert sum(products) == layers * passes * 16 * keys
            blocks = 1 + 2 + (chunks - 2) * 3
            assert sum(fetched) == (layers * passes * blocks if kv == "streamed" else 0)


def test_a_frozen_sink_gets_no_gradient():
    model = make_streamed(tiny_gpt_oss())
    for layer in model.model.layers:
        layer.self_attn.sinks.requires_grad_(False)
    _, grads = loss_and_gradients(model, make_batch())
    assert {name for name, grad in grads.items() if grad is None} == {f"model.layers.{i}.self_attn.sinks" for i in (0, 1)}


# Kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rule", [{"softcap": 0.7}, {"window": 6}, {"softcap": 0.7, "window": 1}, {"window": 30}], ids=str)
@pytest.mark.parametrize("queries", [5, 21])
def test_the_definition(queries, rule, dtype):
    qkv = draw_qkv(queries, 21, dtype=dtype)
    leaves = [x.detach().clone().requires_grad_() for x in qkv.tensors]
    want, want_lse = softmax_attention(*leaves, qkv.scale, causal=True, **rule)
    want_grads = torch.autograd.grad(want, leaves, qkv.grad_out.double())
    rule, kernel = ScoreRule(qkv.scale, **rule), KERNELS["naive"]
    out, lse = attend_prefix(kernel, *qkv.tensors, rule)
    sums = [torch.zeros_like(x, dtype=torch.promote_types(dtype, torch.float32)) for x in (qkv.key, qkv.value)]
    grad_query = attend_prefix_backward(kernel, qkv.grad_out, *qkv.tensors, out, lse, rule, *sums)
    for got, right in zip((out, lse, grad_query, *sums), (want, want_lse, *want_grads), strict=True):
        assert difference(got, right) <= (1e-5 if dtype == torch.float32 else 1e-12)


def test_sinks():
    """Against one softmax with a column more."""
    qkv = draw_qkv(9, 9, dtype=torch.float64)
    sinks = torch.tensor([0.3, -2.0, 40.0, 1.0], dtype=torch.float64, requires_grad=True)
    key = torch.nn.functional.pad(qkv.key, (0, 1)).repeat_interleave(2, dim=2)  # a dimension that tells the sink apart
    scores = torch.einsum("bqhd,bkhd->bhqk", qkv.query, key[..., :-1]) * qkv.scale
    scores = scores.masked_fill(torch.ones(9, 9, dtype=torch.bool).triu(1), float("-inf"))
    wide = torch.cat([scores, sinks[None, :, None, None].expand(2, -1, 9, 1)], -1)
    want = torch.einsum("bhqk,bkhd->bqhd", wide.softmax(-1)[..., :9], qkv.value.repeat_interleave(2, dim=2))
    out, lse = with_sinks(*attend_prefix(KERNELS["naive"], *qkv.tensors, qkv.rule), sinks.detach())
    assert difference(out, want) <= 1e-12
    assert difference(lse, wide.logsumexp(-1)) <= 1e-12
    (want_grad,) = torch.autograd.grad(want, sinks, qkv.grad_out)
    assert difference(sinks_grad(qkv.grad_out, out, lse, sinks.detach()), want_grad) <= 1e-12


@pytest.mark.parametrize("features", [{"window"}, {"softcap"}, {"window", "softcap"}])
def test_auto_takes_a_kernel_that_has_it(features):
    device = torch.device("cpu")
    assert choose_kernel("auto", device, torch.float32, 16, 16, frozenset(features)).name == "naive"
    assert choose_kernel("auto", device, torch.float32, 16, 16).name == "torch_cpu"


@pytest.mark.parametrize("feature", ["window", "softcap"])
def test_a_kernel_that_leaves_it_out_is_found(monkeypatch, feature):
    class Forgets(NaiveKernel):
        name = "torch_flash"

        def forward(self, query, key, value, rule, *, causal):
            return super().forward(query, key, value, ScoreRule(rule.scale), causal=causal)

    monkeypatch.setitem(KERNELS, "torch_flash", Forgets())
    kernel_choice.choose_kernel.cache_clear()
    try:
        with pytest.raises(ValueError, match="torch_flash is wrong here: out differs"):
            choose_kernel("torch_flash", torch.device("cpu"), torch.float32, 16, 16, frozenset([feature]))
    finally:
        kernel_choice.choose_kernel.cache_clear()
