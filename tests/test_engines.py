"""What engines need of a run that shares sequences. A failure: wrong gradients, or an engine that trains something else."""

from types import SimpleNamespace

import accelerate.accelerator
import pytest
import torch
import transformers.trainer
from accelerate import Accelerator, ParallelismConfig
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from reference import difference, make_model, tiny_llama
from torch.utils.data import DataLoader

import hf_fpdt
from hf_fpdt import accelerate_wiring
from hf_fpdt.accelerate_wiring import _check_adapters, _Loader, _loss_of_trainer, _sharing
from hf_fpdt.engines import check_shares_sequences, gradient_factor
from hf_fpdt.group_loss import give_group_loss
from hf_fpdt.sharded_loader import ShardedDataLoader, skip_first_batches


def state(kind: DistributedType, fsdp_version: int = 2, groups: int = 2, shards: int = 1, **zero):
    """Of 8 processes."""
    return SimpleNamespace(
        distributed_type=kind,
        num_processes=8,
        parallelism_config=ParallelismConfig(sp_size=4, dp_replicate_size=groups, dp_shard_size=shards),
        deepspeed_plugin=SimpleNamespace(deepspeed_config={"zero_optimization": zero} if zero else {}),
        fsdp_plugin=SimpleNamespace(fsdp_version=fsdp_version),
    )


@pytest.mark.parametrize(
    ("engine", "want"),
    [
        (state(DistributedType.DEEPSPEED), 1),
        (state(DistributedType.DEEPSPEED, stage=1), 1),
        (state(DistributedType.DEEPSPEED, stage=2), 1),
        (state(DistributedType.DEEPSPEED, stage=3), 4),
        (state(DistributedType.DEEPSPEED, stage=3, reduce_scatter=False), 1),
        (state(DistributedType.FSDP, groups=1, shards=8), 4),
        (state(DistributedType.MULTI_GPU), 4),
    ],
)
def test_gradient_factor(engine, want):
    """As `test_launched.py` measures it."""
    check_shares_sequences(engine, 4)
    assert gradient_factor(engine, 4) == want


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (state(DistributedType.FSDP, fsdp_version=1), r"sp_size=4 with FSDP1: use FSDP2 \(fsdp_config: fsdp_version: 2\)"),
        (state(DistributedType.MEGATRON_LM), "sp_size=4 with distributed_type MEGATRON_LM: .* DeepSpeed, FSDP2 and DDP"),
        (state(DistributedType.NO), "sp_size=4 with distributed_type NO"),
        (
            state(DistributedType.FSDP, groups=2, shards=4),
            "dp_replicate_size=2 and dp_shard_size=4: .* Set parallelism_config_dp_shard_size to 8",
        ),
        (
            state(DistributedType.DEEPSPEED, groups=1),
            "8 processes in groups of sp_size=4 are 2 groups, .* says 1: set parallelism_config_dp_replicate_size to 2",
        ),
    ],
)
def test_engines_that_cannot(engine, message):
    with pytest.raises(ValueError, match=message):
        check_shares_sequences(engine, 4)


def test_an_accelerate_that_repeats_batches():
    engine = state(DistributedType.MULTI_GPU)
    engine.device_mesh = object()  # accelerate 1.12 makes one
    message = (
        r"with MULTI_GPU and accelerate .*: it would give the processes of a group the same batches.* Use accelerate 1\.13"
    )
    with pytest.raises(ValueError, match=message):
        check_shares_sequences(engine, 4)


def test_a_loop_that_was_not_prepared(monkeypatch):
    model = hf_fpdt.apply_fpdt(make_model(tiny_llama()))
    ids = torch.arange(20)[None]
    monkeypatch.setitem(AcceleratorState._shared_state, "parallelism_config", SimpleNamespace(sp_size=1))
    model.train()(input_ids=ids, labels=ids)
    monkeypatch.setitem(AcceleratorState._shared_state, "parallelism_config", ParallelismConfig(sp_size=2))
    with pytest.raises(ValueError, match="sp_size=2, and this model was not prepared for it"):
        model(input_ids=ids, labels=ids)
    model.eval()(input_ids=ids, labels=ids)  # evaluation takes whole sequences


class Groups:
    """What there is to know of the groups of 4."""

    get_sequence_parallel_group = staticmethod(lambda: None)
    get_sequence_parallel_rank = staticmethod(lambda: 1)
    get_sequence_parallel_world_size = staticmethod(lambda: 4)


@pytest.fixture
def preparing(monkeypatch):
    """An Accelerator whose `prepare` changes nothing, that under DDP, and a list of the models that get shared."""
    shared = []

    def share(model, sp_size):
        shared.append(model)
        give_group_loss(model, float(sp_size))

    monkeypatch.setattr(accelerate_wiring, "share_sequences", share)
    monkeypatch.setattr(accelerate_wiring, "replace_sequence_parallelism", lambda attention, loader: None)
    monkeypatch.setattr(accelerate_wiring, "sequence_parallel_groups", lambda sp_size: Groups)
    prepare = _sharing(lambda self, *args, **kwargs: args if len(args) > 1 else args[0])
    accelerator = SimpleNamespace(state=state(DistributedType.MULTI_GPU), device="cpu")
    return lambda *args: prepare(accelerator, *args), accelerator, shared


def test_nothing_is_shared_twice(preparing):
    prepare, _, shared = preparing
    model, loader, alone = make_model(tiny_llama()), DataLoader([1, 2]), DataLoader([3])
    got_model, got_loader = prepare(model, loader)
    assert got_model is model
    assert isinstance(got_loader, ShardedDataLoader)
    assert (got_loader.dl, got_loader.sp_rank, got_loader.sp_world_size) == (loader, 1, 4)
    assert prepare(model, got_loader) == (model, got_loader)
    assert prepare(model) is model
    assert prepare(alone) is alone
    assert shared == [model]
    with pytest.raises(ValueError, match=r"shares its batches already, .* Leave deepspeed_ulysses_dl_adapter out"):
        _Loader(got_loader, 1, None, 4, "cpu")


def test_what_accelerate_has_wrapped_or_shares_is_left_to_it(preparing):
    prepare, accelerator, shared = preparing
    wrapped = torch.nn.Linear(2, 2)  # DDP around a shared model, for example
    wrapped._is_accelerate_prepared = True
    assert prepare(wrapped) is wrapped
    accelerator.state = state(DistributedType.DEEPSPEED)
    model = make_model(tiny_llama())
    assert prepare(model) is model
    accelerator.state = SimpleNamespace(parallelism_config=None)
    loader = DataLoader([1, 2])
    assert prepare(model, loader) == (model, loader)
    assert not shared


def test_what_cannot_be_shared_is_refused(preparing):
    prepare, _, _ = preparing
    with pytest.raises(ValueError, match="Linear is no transformers PreTrainedModel"):
        prepare(torch.nn.Linear(2, 2))


def test_accelerator_is_taken_once(monkeypatch):
    original = getattr(Accelerator.prepare, "__wrapped__", Accelerator.prepare)
    monkeypatch.setattr(Accelerator, "prepare", original)
    monkeypatch.setattr(accelerate.accelerator, "skip_first_batches", accelerate.skip_first_batches)
    monkeypatch.setattr(transformers.trainer, "skip_first_batches", transformers.trainer.skip_first_batches)
    monkeypatch.setattr(transformers.trainer, "DEFAULT_CALLBACKS", list(transformers.trainer.DEFAULT_CALLBACKS))
    accelerate_wiring.enable()
    accelerate_wiring.enable()
    assert Accelerator.prepare.__wrapped__ is original
    assert accelerate.accelerator.skip_first_batches is skip_first_batches


def test_weights_that_would_be_gathered_for_every_chunk():
    """A loop of one's own under ZeRO-3 on one process: DeepSpeed sharded the model before hf_fpdt saw it."""
    model = make_model(tiny_llama()).train()
    model.set_attn_implementation("fpdt")
    ids = torch.arange(20)[None]
    for weight in model.parameters():
        weight.ds_id = 0
    with pytest.raises(ValueError, match=r"LlamaDecoderLayer was sharded by ZeRO-3 .* call hf_fpdt.apply_fpdt.model. before"):
        model(input_ids=ids, labels=ids)
    for layer in model.model.layers:
        layer._z3_leaf = True
    model(input_ids=ids, labels=ids)


def test_a_loss_function_that_trainer_leaves_out():
    class Trainer:
        def __init__(self, compute_loss_func):
            self.compute_loss_func = compute_loss_func

        def compute_loss(self):
            return _loss_of_trainer(lambda *args: args, 1, 2)

    assert Trainer(None).compute_loss() == (1, 2)
    with pytest.raises(ValueError, match="Trainer leaves it out"):
        Trainer(len).compute_loss()


def test_virtual_tokens_of_shared_sequences_are_refused():
    peft = pytest.importorskip("peft")
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    with pytest.raises(ValueError, match=r"sp_size=2 with PromptTuningConfig: .* Use another adapter"):
        _check_adapters(peft.get_peft_model(make_model(tiny_llama(), "fpdt"), prompt), 2)
    lora = peft.get_peft_model(make_model(tiny_llama(), "fpdt"), peft.LoraConfig(target_modules=["q_proj"]))
    _check_adapters(lora, 2)


@pytest.fixture
def zero(monkeypatch):
    """DeepSpeed's module as it was imported, and torch's linear layer, both put back."""
    module = pytest.importorskip("deepspeed.runtime.zero.partition_parameters")
    linear = module.zero3_linear_wrap
    monkeypatch.setattr(module, "zero3_linear_wrap", getattr(linear, "__wrapped__", linear))
    monkeypatch.setattr(torch.nn.functional, "linear", torch.nn.functional.linear)
    return module


def biased_products(linear, shape=(3, 400, 256)):
    """In bfloat16, with a bias that is small beside them: how much of it is there on average, the products, and gradients."""
    torch.manual_seed(0)
    x = torch.randn(shape).bfloat16().requires_grad_()
    weight, bias = (torch.randn(512, shape[-1]) / 16).bfloat16().requires_grad_(), torch.full((512,), 5e-4).bfloat16()
    out = linear(x, weight, bias.requires_grad_())
    share = (out.double() - x.double() @ weight.double().T).mean().item() / 5e-4
    return share, out, torch.autograd.grad(out, (x, weight, bias), torch.randn(out.shape).bfloat16())


@pytest.mark.parametrize("sharded", ["before", "after"])
def test_biases_under_zero3_are_whole(zero, sharded):
    """What DeepSpeed loses of a bias changes losses of models with biases by 1e-3 (docs/results.md, convergence)."""
    torchs, model = torch.nn.functional.linear, make_model(tiny_llama())
    assert biased_products(zero.zero3_linear_wrap)[0] < 0.7, "DeepSpeed keeps biases itself now"
    if sharded == "before":  # what its memory_efficient_linear does
        torch.nn.functional.linear = zero.zero3_linear_wrap
    hf_fpdt.apply_fpdt(model)
    if sharded == "after":
        torch.nn.functional.linear = zero.zero3_linear_wrap
    hf_fpdt.apply_fpdt(model)
    assert torch.nn.functional.linear is not torchs
    share, out, grads = biased_products(torch.nn.functional.linear)
    _, want, want_grads = biased_products(torchs)
    assert share == pytest.approx(1, abs=0.05)
    assert torch.equal(out, want)
    for grad, wanted in zip(grads, want_grads, strict=True):
        assert grad.shape == wanted.shape
        assert difference(grad, wanted) <= 1e-2


@pytest.mark.parametrize("shape", [(7,), (5, 7), (0, 7), (2, 0, 7), (2, 3, 4, 7)], ids=str)
def test_linear_layers_of_any_input(zero, shape):
    hf_fpdt.apply_fpdt(make_model(tiny_llama()))
    weight, bias, x = torch.randn(3, 7), torch.randn(3), torch.randn(shape)
    for some in (None, bias):
        got, want = zero.zero3_linear_wrap(x, weight, some), torch.nn.functional.linear(x, weight, some)
        assert got.shape == want.shape
        assert torch.allclose(got, want, atol=1e-6)


def test_torchs_linear_layer_stays_where_deepspeed_leaves_it(zero):
    """`"memory_efficient_linear": false`, and engines without sharded weights."""
    torchs = torch.nn.functional.linear
    hf_fpdt.apply_fpdt(make_model(tiny_llama()))
    assert torch.nn.functional.linear is torchs
