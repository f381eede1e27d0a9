"""
Making a transformers model stream, and undoing it.

Every model instance that gets `attn_implementation="fpdt"` has its `forward` wrapped. At a call without a cache the wrapper
checks the inputs, opens a `StreamedPass`, and the decoder layers of the model (wrapped at the first call) stream themselves.
The wrapper reads the attention implementation at every call, so switching a model to "sdpa" and back just works.
"""

from collections.abc import Callable, Iterator
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from .attention_interface import NAME, uses_attention_interface
from .config import FPDTConfig
from .engines import check_gathered_whole, check_is_shared, gather_parts_of_layers, gather_whole_layers
from .group_loss import check_targets, give_own_loss, with_group_loss
from .head_exchange import HeadExchange, NoExchange
from .input_checks import check_streamable
from .instance_forward import inner_forward, is_replaced, named_arguments, replace_forward, restore_forward
from .layer_wiring import causal_attention, wire, without_checkpointing
from .model_loss import chunked_loss, deferring_head, remove_chunked_loss
from .model_plan import forget_plans, layout_of, plan_of_call
from .places import Places
from .shard_checks import check_shard, check_shard_labels, check_shardable
from .streamed_pass import MeasuringPass, StreamedPass, running
from .trainer_import import watch_trainers
from .work import forget_work, work_of

logger = logging.get_logger(__name__)

_CONFIG, _PREVIOUS, _SP_GROUP = "_fpdt_config", "_fpdt_previous_implementation", "_fpdt_sp_group"
_CACHES = ("past_key_values", "cache")  # what forwards call theirs, the latter since transformers 5.24


def apply_fpdt(model: nn.Module, config: FPDTConfig | None = None, *, sp_group=None) -> nn.Module:
    """
    Streams a model with the given settings; a model of another `attn_implementation` is switched over.

    Args:
        model (`PreTrainedModel` or a PEFT model around one):
            A causal LM whose attention goes through transformers' attention interface. Changed in place.
        config (`FPDTConfig`, *optional*): the settings; the defaults if not given.
        sp_group (`torch.distributed.ProcessGroup`, *optional*):
            The processes that share every sequence in training. Each calls the model with its shard, as `shard_batch` and
            `ShardedDataLoader` make it, gets the mean loss over its own labels (`global_mean` has that over all), and the
            gradients of its shard. In evaluation mode a model takes whole sequences, each process its own.

    Returns:
        The same model.

    Raises:
        ValueError: for a model that cannot be streamed, by class; for one whose attention heads the group does not divide.
    """
    base = transformers_model(model)
    config = FPDTConfig() if config is None else config
    if not isinstance(config, FPDTConfig):
        raise ValueError(f"apply_fpdt(config=...) got {type(config).__name__}; an FPDTConfig is needed.")
    _check_class(type(base))
    streamed = streamed_models(base)
    if not streamed:
        raise ValueError(_no_layers(base))
    sp_group = sp_group if sp_group is not None and sp_group.size() > 1 else None
    if sp_group is not None:
        check_shardable(base.config.get_text_config(), sp_group.size())
    previous = base.config._attn_implementation
    if previous != NAME:
        base.set_attn_implementation(NAME)
        base.__dict__[_PREVIOUS] = previous
    for owner in _models_in(base):
        attach(owner)
        owner.__dict__[_CONFIG], owner.__dict__[_SP_GROUP] = config, sp_group
        forget_plans(owner)
    gather_whole_layers(model, [layer for _, layers in streamed for layer in layers])
    return model


def restore(model: nn.Module) -> nn.Module:
    """
    Undoes `apply_fpdt` or `attn_implementation="fpdt"`: forwards, loss function and attention implementation are as before
    (for a model that was made with "fpdt": what transformers would have chosen). Returns the same model.
    """
    base = transformers_model(model)
    if base.config._attn_implementation == NAME:
        previous = base.__dict__.get(_PREVIOUS) or base.get_correct_attn_implementation(None)
        base.set_attn_implementation(previous)
    give_own_loss(base)
    for owner in _models_in(base):
        remove_chunked_loss(owner)
        forget_plans(owner)
        forget_work(owner)
        for attribute in (_CONFIG, _PREVIOUS, _SP_GROUP):
            owner.__dict__.pop(attribute, None)
    gather_parts_of_layers(module for module in base.modules() if isinstance(module, GradientCheckpointingLayer))
    for module in base.modules():
        restore_forward(module)
    return model


def watch_models() -> None:
    """
    Attaches to every model that gets `attn_implementation="fpdt"`, at construction or later. transformers resolves the name in
    one method of the model, which has no hook: it is the only one of its methods that is wrapped, once per process.
    """
    original = PreTrainedModel.get_correct_attn_implementation

    @wraps(original)
    def get_correct_attn_implementation(self, *args, **kwargs):
        implementation = original(self, *args, **kwargs)
        if implementation == NAME:
            _check_class(type(self))
            for owner in _models_in(self):
                attach(owner)
        return implementation

    PreTrainedModel.get_correct_attn_implementation = get_correct_attn_implementation


def attach(model: PreTrainedModel) -> None:
    """Wraps the forward of one model instance, and has Trainer watch it; harmless if done before."""
    watch_trainers()
    work_of(model)
    if not is_replaced(model):
        replace_forward(model, _run_model)


def _run_model(model: PreTrainedModel, args: tuple, kwargs: dict[str, Any]):
    forward = inner_forward(model)
    switched_off = model.config._attn_implementation != NAME
    if torch.compiler.is_compiling():
        if not switched_off:
            _refuse_compilation(type(model).__name__)
        return forward(*args, **kwargs)
    arguments = {} if switched_off else named_arguments(model, args, kwargs)
    check_targets(model, arguments)
    if switched_off or not _streams(model, arguments):
        with running(None):
            return forward(*args, **kwargs)
    arguments["use_cache"] = False
    return with_group_loss(model, arguments, sp_group_of(model), partial(_stream, model, forward))


def _stream(model: PreTrainedModel, forward: Callable, arguments: dict[str, Any]):
    layers = _decoder_layers(model)
    if not layers:  # a model around the one that has the layers
        if len(_models_in(model)) == 1:
            raise ValueError(_no_layers(model))
        if exchange_of(model).size > 1:
            check_shard_labels(model, arguments)
        with chunked_loss(model, arguments):
            return forward(**arguments)
    check_gathered_whole(layers[0])
    tokens, config, exchange = _input_tokens(model, arguments), config_of(model), exchange_of(model)
    documents = check_streamable(model, arguments, tokens, exchange.size)
    layout = layout_of(tokens, config, exchange.size)
    if exchange.size > 1:
        check_shard(model, arguments, layout, exchange, documents)
    if arguments.get("attention_mask") is None and (documents is not None or exchange.size > 1):
        # Without a mask transformers looks for documents itself, by gaps in the positions, and asks for a mask of them.
        arguments["attention_mask"] = torch.ones(tokens.shape[:2], dtype=torch.int64, device=tokens.device)
    wire(model, layers)
    with without_checkpointing(layers):
        run = partial(measure, forward, arguments, tokens.shape[1])
        plan = plan_of_call(model, layers, deferring_head(), tokens, config, run, layout, exchange)
        places = Places(config, tokens.device)
        work = work_of(model) if model.training and torch.is_grad_enabled() else None
        streamed = StreamedPass(plan, config.kernel, places, exchange, documents, work)
        with running(streamed):
            output = forward(**arguments)
        streamed.count_tokens()
    if streamed.last_saved is not None:
        places.settle()  # before the loss, which takes a lot
        streamed.last_saved.prefetch_first()  # the backward starts with the last layer: its copies run under the loss
    return output


def measure(forward: Callable, arguments: dict[str, Any], seq_len: int, measured: MeasuringPass) -> None:
    """Runs the model on its first tokens, its layers measured and not run."""

    def first(value: Any) -> Any:
        if not torch.is_tensor(value) or seq_len not in value.shape[:2]:
            return value
        cut = value[:, : measured.local_len] if value.ndim > 1 and value.shape[1] == seq_len else value[: measured.local_len]
        return cut.detach()

    collected = {name: False for name in ("output_hidden_states", "output_attentions") if arguments.get(name)}
    with torch.no_grad():
        forward(**{name: first(value) for name, value in arguments.items()} | collected)


@torch.compiler.disable  # the compiler leaves it alone, so that it is this error that arrives
def _refuse_compilation(name: str) -> None:
    raise ValueError(
        f'torch.compile of {name} with attn_implementation="fpdt" is not supported: its layers run chunk by chunk in Python. '
        "Set torch_compile=False, or compile a model of another attn_implementation."
    )


def _streams(model: PreTrainedModel, arguments: dict[str, Any]) -> bool:
    """
    Whether this call runs without a cache. With labels, or in training, nobody reads one: it is turned off, unless a training
    model is asked for it without gradients, as `generate` does.
    """
    if any(arguments.get(name) is not None for name in _CACHES):
        if model.training and torch.is_grad_enabled():
            raise ValueError(
                f"{type(model).__name__}: past_key_values were given in training, as PEFT's prefix tuning does; "
                'attn_implementation="fpdt" has no gradient for them. Use another adapter (LoRA, prompt tuning, p-tuning), or '
                'attn_implementation="sdpa".'
            )
        return False
    use_cache = arguments.get("use_cache")
    if arguments.get("labels") is not None or (model.training and (use_cache is None or torch.is_grad_enabled())):
        if use_cache:
            logger.warning_once('hf_fpdt: use_cache=True has no use in training; it is off with attn_implementation="fpdt".')
        return True
    return not (getattr(model.config, "use_cache", False) if use_cache is None else use_cache)


def _input_tokens(model: PreTrainedModel, arguments: dict[str, Any]) -> Tensor:
    for name in ("input_ids", "inputs_embeds"):
        if arguments.get(name) is not None:
            return arguments[name]
    raise ValueError(f"{type(model).__name__} was called without input_ids or inputs_embeds; it needs one of them.")


def config_of(model: PreTrainedModel) -> FPDTConfig:
    """The settings that a model streams with."""
    return model.__dict__.get(_CONFIG) or FPDTConfig()


def exchange_of(model: PreTrainedModel) -> NoExchange | HeadExchange:
    """Between the processes that share the sequences which this model is called with now."""
    group = sp_group_of(model)
    if not model.training:
        return NoExchange()
    check_is_shared(group)
    return NoExchange() if group is None else HeadExchange(group)


def streamed_models(base: PreTrainedModel) -> list[tuple[PreTrainedModel, list[nn.Module]]]:
    """The models inside `base`, itself included, that have decoder layers of their own, with these layers."""
    found = [(owner, _decoder_layers(owner)) for owner in _models_in(base)]
    return [(owner, layers) for owner, layers in found if layers]


def transformers_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model itself; ValueError if there is none."""
    base = _inner_model(model)
    if not isinstance(base, PreTrainedModel):
        raise ValueError(f"{type(model).__name__} is no transformers PreTrainedModel, nor a PEFT model around one.")
    return base


def is_streamed(model: nn.Module) -> bool:
    """Whether it is a transformers model, or a PEFT model around one, with `attn_implementation="fpdt"`."""
    base = _inner_model(model)
    return isinstance(base, PreTrainedModel) and base.config._attn_implementation == NAME


def sp_group_of(model: nn.Module):
    """The group that `apply_fpdt` was given, None without."""
    return transformers_model(model).__dict__.get(_SP_GROUP)


def _inner_model(model: nn.Module) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _check_class(model_class: type) -> None:
    if not uses_attention_interface(model_class):
        raise ValueError(
            f"{model_class.__name__} has attention code of its own that does not go through transformers' AttentionInterface, "
            'so attn_implementation="fpdt" cannot stream it. Use one of the implementations it supports ("eager", "sdpa").'
        )


def _no_layers(model: PreTrainedModel) -> str:
    return (
        f"{type(model).__name__} has no causal decoder layers that could be streamed (modules of transformers' "
        "GradientCheckpointingLayer with one causal attention each). Use another attn_implementation."
    )


def _models_in(model: PreTrainedModel) -> list[PreTrainedModel]:
    return [module for module in model.modules() if isinstance(module, PreTrainedModel)]


_TOKEN_MIXERS = ("Mamba", "DeltaNet", "LinearAttention", "Recurrent", "LightningAttention", "Indexer", "Compressor")


def _decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The streamable layers that belong to this model and to no model inside it, in order."""
    layers = [module for module in _own_modules(model) if isinstance(module, GradientCheckpointingLayer)]
    causal = [layer for layer in layers if len(causal_attention(layer)) == 1]
    if causal and len(causal) < len(layers):
        others = sorted({type(layer).__name__ for layer in layers if layer not in causal})
        raise ValueError(
            f"{type(model).__name__} mixes {len(causal)} causal attention layers with {len(layers) - len(causal)} others "
            f'({", ".join(others)}); attn_implementation="fpdt" needs every layer to have one causal attention.'
        )
    for layer in causal:
        mixer = next(filter(None, map(_token_mixer, layer.modules())), None)
        if mixer is not None:
            raise ValueError(
                f"{type(model).__name__}: {type(layer).__name__} has {mixer}, through which tokens see others "
                'besides attention; attn_implementation="fpdt" runs a layer chunk by chunk and would cut it. Use another one.'
            )
    return causal


def _token_mixer(module: nn.Module) -> str | None:
    """The name of a state-space model, linear attention, a convolution along the sequence, or an adapter that needs it all."""
    if isinstance(module, nn.Conv1d | nn.RNNBase) or any(word in type(module).__name__ for word in _TOKEN_MIXERS):
        return type(module).__name__
    if "lily_router" in module._modules:
        return "PEFT's Lily adapter (it chooses experts by the mean over all tokens)"
    variants = module.__dict__.get("lora_variant", {}).values()
    if any(type(variant).__name__.startswith("ALora") for variant in variants):
        return "PEFT's aLoRA adapter (alora_invocation_tokens)"
    return None


def _own_modules(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if not isinstance(child, PreTrainedModel):
            yield child
            yield from _own_modules(child)
