"""
What cannot be streamed exactly is refused, with the name of the thing and the knob to turn.

A failure means that a user trains on wrong attention without knowing, or gets an error that does not say what to do.
"""

import inspect

import pytest
import torch
from reference import (
    SEQ_LEN,
    assert_gradients_close,
    loss_and_gradients,
    make_batch,
    make_model,
    make_streamed,
    tiny_gemma2,
    tiny_llama,
    tiny_mistral,
    tiny_neox,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    BloomConfig,
    FalconConfig,
    LlamaModel,
)  # fmt: skip

import hf_fpdt
from hf_fpdt import FPDTConfig, apply_fpdt
from hf_fpdt.input_checks import check_streamable

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def streamed():
    return make_streamed(tiny_llama(), 16)


def falcon():
    return FalconConfig(**SMALL)


def bloom():
    return BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)


@pytest.mark.parametrize("size", [0, -1, 1.5, True, None, "16", "AUTO"])
def test_chunk_size(size):
    with pytest.raises(ValueError, match=r"chunk_size=.*must be \"auto\" or a whole number of tokens, at least 1"):
        FPDTConfig(chunk_size=size)


def test_unknown_kernel():
    with pytest.raises(ValueError, match=r"kernel='triton'.*must be one of 'auto', 'flash_attention_4'"):
        FPDTConfig(kernel="triton")


@pytest.mark.parametrize("kernel", ["torch_flash", "torch_efficient", "cudnn", "flash_attention_2", "flash_attention_4"])
def test_kernel_that_cannot_run_here(kernel):
    model = make_streamed(tiny_llama(), 16, kernel=kernel)
    reason = (
        "is not installed: pip install" if "attention" in kernel else "runs on CUDA devices only, and the tensors are on cpu"
    )
    with pytest.raises(ValueError, match=rf"kernel='{kernel}'.*{kernel} .*{reason}.*Usable here: torch_cpu, naive"):
        model(**make_batch(1))


def test_prepared_mask(streamed):
    mask = torch.ones(2, 1, SEQ_LEN, SEQ_LEN, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match=r"attention_mask of shape \[2, 1, 48, 48\].*\[batch, seq_len\] = \[2, 48\]"):
        streamed(**make_batch(2), attention_mask=mask)


def test_mask_of_a_mapping(streamed):
    with pytest.raises(ValueError, match="attention_mask of shape dict was given"):
        streamed(**make_batch(2), attention_mask={"full_attention": None})


def test_several_positions_a_token(streamed):
    positions = torch.arange(SEQ_LEN).expand(3, 2, -1)
    with pytest.raises(ValueError, match=r"position_ids of shape \[3, 2, 48\] were given.*takes \[batch, seq_len\]"):
        streamed(**make_batch(2), position_ids=positions)


def test_no_tokens(streamed):
    with pytest.raises(ValueError, match=r"input of shape \[2, 0\] has no tokens"):
        streamed(input_ids=torch.zeros(2, 0, dtype=torch.long))
    ids = torch.zeros(0, 5, dtype=torch.long)
    for batch in ({"input_ids": ids}, {"input_ids": ids, "labels": ids}, {"inputs_embeds": torch.zeros(0, 5, 32)}):
        with pytest.raises(ValueError, match=r"LlamaModel: input of shape \[0, 5.*\] has no tokens; it needs at least one row"):
            streamed(**batch)


def test_weights_of_two_dtypes():
    """As after preparing a model for k-bit training without autocast."""
    model = make_streamed(tiny_llama(), 16)
    for layer in model.model.layers:
        layer.self_attn.v_proj.register_forward_hook(lambda module, args, output: output.bfloat16())
    with pytest.raises(
        ValueError, match=r"query, key and value are torch.float32, torch.float32 and torch.bfloat16.*bf16=True"
    ):
        model(**make_batch(1))


def test_mask_with_a_function_of_its_own(streamed):
    """A model that asks transformers for more than the causal mask: prefix attention, blocks of images."""
    from transformers.masking_utils import create_causal_mask

    arguments = {
        "config": streamed.config, "attention_mask": None, "past_key_values": None, "position_ids": None,
        "or_mask_function": lambda batch, head, query, key: key < 4,
    }  # fmt: skip
    names = inspect.signature(create_causal_mask).parameters  # transformers 5.0 has other names for two of them
    arguments["inputs_embeds" if "inputs_embeds" in names else "input_embeds"] = torch.zeros(2, SEQ_LEN, 32)
    if "cache_position" in names:
        arguments["cache_position"] = torch.arange(SEQ_LEN)

    def ask(module, args, kwargs):
        create_causal_mask(**arguments)

    handle = streamed.model.layers[0].register_forward_pre_hook(ask, with_kwargs=True)
    try:
        with pytest.raises(ValueError, match=r"A mask other than a causal one or a sliding window was asked for \(chunked"):
            streamed(**make_batch(2))
    finally:
        handle.remove()


def test_consecutive_positions_are_fine(streamed):
    plain = make_model(tiny_llama(), "sdpa")
    positions = (torch.arange(SEQ_LEN) + 7)[None]
    got = streamed(**make_batch(2), position_ids=positions).loss
    want = plain(**make_batch(2), position_ids=positions).loss
    assert abs(got - want) <= 2e-6 * want


def test_attention_outputs(streamed):
    with pytest.raises(
        ValueError, match=r"output_attentions=True needs the full attention matrix.*attn_implementation=\"eager\""
    ):
        streamed(**make_batch(2), output_attentions=True)


def test_attention_outputs_in_the_config():
    model = make_streamed(tiny_llama(), 16)
    model.config._output_attentions = True
    with pytest.raises(ValueError, match="output_attentions=True needs the full attention matrix"):
        model(**make_batch(2))


def test_attention_dropout():
    for config in (tiny_llama(attention_dropout=0.1), tiny_neox(attention_dropout=0.1)):
        model = make_streamed(config, 16)
        with pytest.raises(ValueError, match=r"attention_dropout=0.1 in training is not supported.*attention_dropout = 0.0"):
            model(**make_batch(2))
        model.eval()
        want = make_model(config, "sdpa", train=False)(**make_batch(2)).loss
        assert abs(model(**make_batch(2)).loss - want) <= 2e-6 * want


@pytest.mark.parametrize(("config", "name"), [(falcon, "FalconForCausalLM"), (bloom, "BloomForCausalLM")])
def test_models_with_attention_code_of_their_own(config, name):
    pattern = rf"{name} has attention code of its own.*cannot stream it.*\"eager\""
    with pytest.raises(ValueError, match=pattern):
        AutoModelForCausalLM.from_config(config(), attn_implementation="fpdt")
    model = AutoModelForCausalLM.from_config(config())
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=pattern):
        apply_fpdt(model)
    assert model.config._attn_implementation == before
    ids = torch.randint(3, 64, (1, 8))
    assert torch.isfinite(model(input_ids=ids, labels=ids).loss)


def test_module_that_is_no_transformers_model():
    with pytest.raises(ValueError, match="Linear is no transformers PreTrainedModel"):
        apply_fpdt(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="Linear is no transformers PreTrainedModel"):
        hf_fpdt.restore(nn.Linear(2, 2))


def test_bidirectional_model():
    config = BertConfig(**SMALL, intermediate_size=40)
    pattern = "BertModel has no causal decoder layers that could be streamed"
    with pytest.raises(ValueError, match=pattern):
        apply_fpdt(BertModel(config))
    with pytest.raises(ValueError, match=pattern):
        BertModel._from_config(config, attn_implementation="fpdt").train()(torch.ones(1, 8, dtype=torch.long))


@pytest.mark.parametrize(
    ("config", "kernel", "message"),
    [
        (tiny_mistral(), "torch_cpu", r"torch_cpu has no window\. Usable here: naive; kernel=\"auto\" takes the fastest"),
        (tiny_gemma2(), "torch_cpu", "torch_cpu has no softcap and no window|torch_cpu has no softcap"),
    ],
)
def test_a_kernel_without_what_the_model_needs(config, kernel, message):
    """Never a kernel that leaves it out, nor another one than was named."""
    with pytest.raises(ValueError, match=message):
        make_streamed(config, kernel=kernel)(**make_batch())
    assert torch.isfinite(make_streamed(config)(**make_batch()).loss)


def test_a_mask_that_a_layer_makes():
    """As with sparse attention, where a layer chooses the keys that its queries see."""
    streamed = make_streamed(tiny_llama())

    def choose(module, args, kwargs):
        return args, kwargs | {"attention_mask": torch.ones(2, 1, 16, 16, dtype=torch.bool)}

    streamed.model.layers[1].self_attn.register_forward_pre_hook(choose, with_kwargs=True)
    with pytest.raises(ValueError, match=r"LlamaAttention: a mask that the layer makes .* is not supported"):
        streamed(**make_batch())


def test_a_layer_that_chooses_keys():
    streamed = make_streamed(tiny_llama())

    class KeyIndexer(torch.nn.Linear):
        pass

    streamed.model.layers[1].self_attn.chooser = KeyIndexer(2, 2)
    with pytest.raises(ValueError, match="LlamaDecoderLayer has KeyIndexer, through which tokens see others besides attention"):
        streamed(**make_batch())


@pytest.mark.parametrize("form", ["dict", "four dimensions"])
def test_arguments_with_an_entry_a_token(form):
    """Cut with the chunk, wherever the tokens are."""
    scale = torch.linspace(0.5, 2.0, SEQ_LEN)

    whole = {"all": scale[None]} if form == "dict" else scale.reshape(1, 1, -1, 1)
    losses = []
    for model in (make_model(tiny_llama(), "eager"), make_streamed(tiny_llama())):
        for layer in model.model.layers:
            forward = layer.forward

            def with_scaling(hidden_states, scaling=None, forward=forward, **kwargs):
                given = scaling["all"] if isinstance(scaling, dict) else scaling[0, 0, :, 0]
                return forward(hidden_states * given.reshape(1, -1, 1), **kwargs)

            layer.forward = with_scaling
            layer.register_forward_pre_hook(lambda layer, args, kwargs: (args, kwargs | {"scaling": whole}), with_kwargs=True)
        losses.append(model(**make_batch()).loss)
    assert abs(losses[1] - losses[0]) <= 2e-6 * losses[0]


def test_chunked_attention():
    """Llama 4's: a window whose border is the same for many tokens."""
    import transformers.masking_utils as masks

    streamed = make_streamed(tiny_mistral())
    window = masks.sliding_window_causal_mask_function

    def chunked(size):
        return masks.chunked_causal_mask_function(size, torch.zeros(2, dtype=torch.long))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masks, "sliding_window_causal_mask_function", chunked)
        with pytest.raises(ValueError, match=r"asked for \(chunked attention, .* for a sequence of 48 tokens"):
            streamed(**make_batch())
    assert window is masks.sliding_window_causal_mask_function
    streamed(**make_batch())


@pytest.mark.parametrize("seen", [lambda query, key: key < 4, lambda query, key: query // 20 == key // 20])
def test_a_window_with_more(seen):
    """A prefix for all, or blocks of images that see each other."""
    import transformers.masking_utils as masks

    streamed = make_streamed(tiny_mistral())
    window = masks.sliding_window_causal_mask_function

    def more(size):
        return masks.or_masks(window(size), lambda batch, head, query, key: seen(query, key))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masks, "sliding_window_causal_mask_function", more)
        with pytest.raises(ValueError, match="A mask other than a causal one or a sliding window"):
            streamed(**make_batch())


@pytest.mark.parametrize("config", ["x", 16, {"chunk_size": 16}])
def test_config_of_another_type(config):
    with pytest.raises(ValueError, match=rf"apply_fpdt\(config=...\) got {type(config).__name__}; an FPDTConfig is needed"):
        apply_fpdt(make_model(tiny_llama(), "sdpa"), config)


def test_no_input(streamed):
    with pytest.raises(ValueError, match="LlamaModel was called without input_ids or inputs_embeds"):
        streamed(input_ids=None, labels=None)


def test_a_layer_that_returns_more():
    """As those of experts with the logits of their routers."""
    streamed = make_streamed(tiny_llama())
    layer = streamed.model.layers[1]
    forward = layer.forward
    layer.forward = lambda *args, **kwargs: (forward(*args, **kwargs), torch.ones(1))
    with pytest.raises(ValueError, match="LlamaDecoderLayer 1 returns 2 values; only hidden states can be streamed"):
        streamed(**make_batch())


def test_a_gradient_beside_the_hidden_states():
    streamed = make_streamed(tiny_llama())
    bias = torch.zeros(1, SEQ_LEN, 1, requires_grad=True)
    layer = streamed.model.layers[0]
    layer.register_forward_pre_hook(lambda layer, args, kwargs: (args, kwargs | {"bias": bias}), with_kwargs=True)
    with pytest.raises(ValueError, match="A decoder layer was called with bias, a tensor that requires grad"):
        streamed(**make_batch())


def test_inputs_on_another_gpu():
    """As in the replicas of nn.DataParallel. No GPU is needed to ask where a tensor is."""
    model = LlamaModel(tiny_llama())
    with FakeTensorMode():
        model.embed_tokens.weight = nn.Parameter(torch.empty(2, 2, device="cuda:0"))
        tokens = torch.ones(1, 8, dtype=torch.long, device="cuda:1")
        with pytest.raises(ValueError, match="has weights on cuda:0 and got inputs on cuda:1; they must be on one GPU"):
            check_streamable(model, {}, tokens)


def test_labels_of_another_length(streamed):
    batch = make_batch(2)
    with pytest.raises(ValueError, match="labels have 94 positions and the hidden states 96"):
        streamed(input_ids=batch["input_ids"], labels=batch["labels"][:, :-1])


def test_a_model_is_usable_after_an_error(streamed):
    """An exception leaves no pass, chunk or deferred head behind."""
    want = streamed(**make_batch(2)).loss.item()
    with pytest.raises(ValueError, match="output_attentions"):
        streamed(**make_batch(2), output_attentions=True)
    ids = make_batch(2)["input_ids"]
    assert type(streamed(ids).logits) is torch.Tensor
    assert streamed(**make_batch(2)).loss.item() == want


def test_torch_compile_of_layers(streamed):
    """What is inside of a layer may be compiled: it runs as it is."""
    want, want_grads = loss_and_gradients(make_model(tiny_llama(), "eager"), make_batch())
    for layer in streamed.model.layers:
        layer.mlp.compile(backend="eager")
    got, grads = loss_and_gradients(streamed, make_batch())
    assert abs(got - want) <= 2e-6 * want
    assert_gradients_close(grads, want_grads)
    compiled = make_streamed(tiny_llama())
    compiled.model.layers[0].compile(backend="eager")
    with pytest.raises(ValueError, match=r"torch.compile of LlamaDecoderLayer .* Compile the modules inside of it"):
        compiled(**make_batch())
    compiled = make_streamed(tiny_llama())
    compiled.model.layers[0] = torch.compile(compiled.model.layers[0], backend="eager")
    with pytest.raises(ValueError, match=r"torch.compile of LlamaDecoderLayer .* Compile the modules inside of it"):
        compiled(**make_batch())


def test_torch_compile(streamed):
    with pytest.raises(ValueError, match=r"torch\.compile of LlamaForCausalLM .* Set torch_compile=False"):
        torch.compile(streamed, backend="eager")(**make_batch(1))
    assert streamed(**make_batch(1)).loss.isfinite()
