"""
The plan: what it predicts against what a step takes, what it chooses at a limit, and that whatever it chooses is exact.

A failure of a prediction means that a training run is refused that would fit, or runs out of memory after it was accepted.
"""

import gc
import inspect
from dataclasses import replace

import pytest
import torch
from reference import (
    assert_gradients_close,
    loss_and_gradients,
    make_batch,
    make_model,
    make_streamed,
    peak_bytes,
    tiny_llama,
    tiny_neox,
)  # fmt: skip
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.utils.generic import maybe_autocast

import hf_fpdt
from hf_fpdt import chunked_loss, footprint, model_plan, step_plan
from hf_fpdt.disk_file import disk_file_for
from hf_fpdt.footprint import FREE, MARK, MemoryRecorder, footprint_of
from hf_fpdt.head_exchange import NoExchange
from hf_fpdt.memory_model import LayerPlacement
from hf_fpdt.sequence_layout import SequenceLayout
from hf_fpdt.transfers import transfers_for

PLENTY = 1 << 40
MIB = 1 << 20


def llama(dtype=torch.float32, trainable="", layers=4, **overrides):
    torch.manual_seed(0)
    config = LlamaConfig(
        **{
            "hidden_size": 128, "intermediate_size": 448, "num_hidden_layers": layers, "num_attention_heads": 4,
            "num_key_value_heads": 1, "vocab_size": 500, "max_position_embeddings": 1 << 20, "use_cache": False, **overrides,
        }
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(dtype).train()
    for name, weight in model.named_parameters():
        weight.requires_grad_(trainable in name)
    return model


def step(model, ids):
    model(input_ids=ids, labels=ids).loss.backward()


def weights_and_gradients(model):
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    return sum(t.numel() * t.element_size() for t in tensors)


# ---- footprints ----


def test_a_footprint_is_right_at_lengths_that_were_not_run():
    """Weights dominate the short runs and activations the long ones: a line through two peaks would be far off."""
    linear = torch.nn.Linear(64, 4096)

    def run(tokens, recorder=None):
        hidden = linear(torch.randn(tokens, 64)).relu()
        torch.autograd.grad((hidden * 2).sum(), list(linear.parameters()))

    footprint = footprint_of(run, (16, 32))
    for tokens in (1, 16, 100, 5000):
        assert footprint.peak(tokens) == peak_bytes(lambda tokens=tokens: run(tokens))


def test_a_recorder_counts_every_storage_once_and_knows_when_it_goes():
    outside = torch.zeros(100)
    with MemoryRecorder() as recorder:
        view = outside[10:20]
        own = outside + 1
        recorder.mark("here")
        alias = own.view(10, 10)
        del own
        alias.add_(1)
        del alias, view
    kinds = [(kind, size) for kind, _, size in recorder.log]
    assert kinds == [("allocate", 400), (MARK, 0), (FREE, 400)]


def test_what_has_the_size_of_a_weight_by_chance_still_grows():
    """Other allocations with 256 tokens than with 512, and 512 tokens that take as much as the weight's gradient."""

    def run(tokens, recorder):
        if tokens == 512:
            torch.zeros(1)
        hidden = torch.zeros(tokens, 64)
        hidden + 1

    assert footprint_of(run, (256, 512), {512 * 64 * 4}).peak(4096) == 2 * 4096 * 64 * 4


def test_several_sequences_are_measured_as_they_run(monkeypatch):
    """Chunks of several sequences have gaps between the rows, in both of the measured lengths."""
    monkeypatch.setattr(footprint, "_proportional", lambda *args: pytest.fail("the two lengths ran differently"))
    for batch in (1, 2, 3):
        hf_fpdt.plan(llama(dtype=torch.bfloat16), seq_len=2000, batch_size=batch, config=hf_fpdt.FPDTConfig(gpu_memory=PLENTY))


def test_a_footprint_of_what_depends_on_the_tokens_is_not_too_small():
    def run(tokens, recorder):
        for _ in range(tokens // 8):
            torch.zeros(tokens, 8)

    footprint = footprint_of(run, (16, 32))
    assert footprint.peak(64) >= peak_bytes(lambda: run(64, None))


# ---- predictions ----

CASES = [
    ({"offload": "host"}, {}, 1, 2048, 256),
    ({"offload": "host"}, {}, 1, 1024, 1024),
    ({"offload": "host"}, {}, 1, 1900, 300),
    ({"offload": "host"}, {}, 2, 1024, 256),
    ({"offload": "host"}, {"dtype": torch.bfloat16, "vocab_size": 60}, 1, 2048, 512),
    ({"offload": "host"}, {"trainable": "q_proj"}, 1, 2048, 256),
    ({"offload": "host"}, {"vocab_size": 60}, 1, 2048, 1024),
    ({"offload": "host", "save_attention": False}, {"vocab_size": 60}, 1, 2048, 512),
    ({"offload": "host", "kv": "streamed"}, {"vocab_size": 60, "num_key_value_heads": 4}, 1, 2048, 256),
    ({"offload": "host", "kv": "streamed"}, {"vocab_size": 60, "num_key_value_heads": 4}, 1, 2048, 1024),
    ({"recompute": "auto", "kv": "streamed"}, {"vocab_size": 60, "num_key_value_heads": 4}, 1, 2048, 512),
    ({"offload": "none"}, {}, 1, 2048, 256),
    ({"recompute": False}, {}, 1, 1024, 256),
    ({"recompute": False}, {"vocab_size": 60}, 1, 1500, 1024),
]


@pytest.mark.parametrize(("settings", "shape", "batch", "seq_len", "chunk"), CASES, ids=lambda value: str(value)[:40])
def test_predicted_peak_is_what_a_step_takes(settings, shape, batch, seq_len, chunk):
    config = hf_fpdt.FPDTConfig(**{"chunk_size": chunk, "gpu_memory": PLENTY, "recompute": True, **settings})
    model = hf_fpdt.apply_fpdt(llama(**shape), config)
    predicted = hf_fpdt.plan(model, seq_len=seq_len, batch_size=batch).peaks
    ids = torch.randint(0, model.config.vocab_size, (batch, seq_len))
    step(model, ids)
    model.zero_grad()
    gc.collect()
    arena = transfers_for(torch.device("cpu")).arena
    taken = peak_bytes(lambda: step(model, ids))
    above = predicted.device - weights_and_gradients(model)
    assert 0.95 * taken <= above <= 1.05 * taken, predicted.phase
    assert arena.used_bytes == 0


@pytest.mark.parametrize("kv", ["resident", "streamed"])
@pytest.mark.parametrize("window", [100, 300, 1500, 2048])
def test_predicted_peak_of_windows(window, kv):
    """Of all blocks that a chunk reaches together; a window as long as the sequence is none."""
    shape = llama(vocab_size=60, num_key_value_heads=4).config.to_dict()
    names = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
    )
    config = MistralConfig(**{name: shape[name] for name in names}, sliding_window=window, use_cache=False)
    model = MistralForCausalLM(config).requires_grad_(False).train()
    model.get_input_embeddings().requires_grad_(True)
    settings = {"chunk_size": 256, "gpu_memory": PLENTY, "recompute": True, "offload": "host", "kv": kv, "kernel": "naive"}
    hf_fpdt.apply_fpdt(model, hf_fpdt.FPDTConfig(**settings))
    predicted = hf_fpdt.plan(model, seq_len=2048).peaks.device - weights_and_gradients(model)
    ids = torch.randint(0, 60, (1, 2048))
    step(model, ids)
    model.zero_grad()
    gc.collect()
    taken = peak_bytes(lambda: step(model, ids))
    assert 0.94 * taken <= predicted <= 1.15 * taken


def test_an_input_that_is_asked_for_its_gradient_stays():
    """As TRL and PEFT's preparation for k-bit training ask, for the sake of checkpointing."""
    model = llama(trainable="q_proj", vocab_size=60)
    model.enable_input_require_grads()
    config = hf_fpdt.FPDTConfig(chunk_size=256, gpu_memory=PLENTY, recompute=True, offload="host")
    predicted = hf_fpdt.plan(hf_fpdt.apply_fpdt(model, config), seq_len=2048).peaks
    ids = torch.randint(0, 60, (1, 2048))
    step(model, ids)
    model.zero_grad()
    gc.collect()
    taken = peak_bytes(lambda: step(model, ids))
    assert 0.95 * taken <= predicted.device - weights_and_gradients(model) <= 1.05 * taken


def test_the_final_norm_may_take_the_most(monkeypatch):
    """With short chunks of layer and loss, the three hidden states around the last norm are what is left."""
    monkeypatch.setitem(chunked_loss.AUTO_CHUNK_LOGITS, "cpu", 64 * 60)
    config = hf_fpdt.FPDTConfig(chunk_size=64, gpu_memory=PLENTY, recompute=True, offload="host", kv="streamed")
    model = hf_fpdt.apply_fpdt(llama(vocab_size=60, layers=1), config)
    predicted = hf_fpdt.plan(model, seq_len=8192).peaks
    ids = torch.randint(0, 60, (1, 8192))
    taken = peak_bytes(lambda: step(model, ids))
    assert predicted.phase == "final norm"
    assert 0.95 * taken <= predicted.device - weights_and_gradients(model) <= 1.05 * taken


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("settings", [{}, {"save_attention": False}, {"kv": "streamed"}], ids=str)
def test_predicted_host_memory_is_what_is_used(settings, layers, monkeypatch):
    transfers_for.cache_clear()
    arena = transfers_for(torch.device("cpu")).arena
    config = hf_fpdt.FPDTConfig(chunk_size=512, gpu_memory=PLENTY, recompute=True, offload="host", **settings)
    model = hf_fpdt.apply_fpdt(llama(layers=layers), config)
    used = []
    take = arena.take
    monkeypatch.setattr(arena, "take", lambda *args: (take(*args), used.append(arena.used_bytes))[0])
    step(model, torch.randint(0, 500, (1, 4096)))
    predicted = hf_fpdt.plan(model, seq_len=4096).peaks.host
    assert 0.95 * max(used) <= predicted <= 1.05 * max(used)
    transfers_for.cache_clear()


def test_experts_are_predicted_high_but_not_by_much():
    """Which experts run depends on the tokens: other allocations with 256 tokens than with 512. Weights must not be scaled."""
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=128, intermediate_size=448, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1,
        num_local_experts=8, num_experts_per_tok=2, vocab_size=60, max_position_embeddings=1 << 20, use_cache=False,
    )  # fmt: skip
    model = MixtralForCausalLM(config).train()
    settings = {"chunk_size": 512, "gpu_memory": PLENTY, "recompute": True, "offload": "host"}
    hf_fpdt.apply_fpdt(model, hf_fpdt.FPDTConfig(**settings))
    predicted = hf_fpdt.plan(model, seq_len=4096).peaks.device - weights_and_gradients(model)
    ids = torch.randint(0, 60, (1, 4096))
    step(model, ids)
    model.zero_grad()
    taken = peak_bytes(lambda: step(model, ids))
    assert 0.95 * taken <= predicted <= 1.5 * taken


def test_a_model_that_cannot_be_measured_is_not_planned(caplog):
    model = hf_fpdt.apply_fpdt(llama(), hf_fpdt.FPDTConfig(chunk_size=10))
    hidden = torch.zeros(1, 47, 128, device="cpu")
    plan = model_plan.new_plan(
        model.model, model.model.layers, None, hidden.to("meta"), hf_fpdt.FPDTConfig(), lambda measured: 1 / 0,
        SequenceLayout(47, 47, 1), NoExchange(),
    )  # fmt: skip
    assert places(plan) == [("attention", "host")] * 4
    assert "LlamaModel could not be measured (division by zero); it runs by a plan without" in caplog.text


def test_the_plan_does_not_count_on_the_last_of_host_memory(monkeypatch):
    """The process itself takes some in a step: of 124 GiB available, 119 could be locked where this was seen."""
    monkeypatch.setattr(model_plan, "available_host_bytes", lambda: 124 << 30)
    planned = hf_fpdt.plan(llama(), seq_len=64, config=hf_fpdt.FPDTConfig(gpu_memory=PLENTY)).limits.host
    assert 110 << 30 < planned < 118 << 30
    given = hf_fpdt.FPDTConfig(gpu_memory=PLENTY, host_memory=123 << 30)
    assert hf_fpdt.plan(llama(), seq_len=64, config=given).limits.host == 123 << 30


# ---- choices ----


def choose(model, seq_len=4096, **settings):
    settings = {"chunk_size": 512, "host_memory": PLENTY, **settings}
    return hf_fpdt.plan(model, seq_len=seq_len, config=hf_fpdt.FPDTConfig(**settings))


def places(plan):
    return [(placement.keeps, placement.place) for placement in plan.placements]


def test_with_plenty_of_memory_nothing_runs_again():
    assert places(choose(llama(), gpu_memory=PLENTY)) == [("all", "device")] * 4


def test_layers_whose_k_and_v_stream_wait_on_the_host():
    """However much device memory there is: their store keeps its blocks and their gradients where the layer's tensors are."""
    assert places(choose(llama(), gpu_memory=PLENTY, kv="streamed")) == [("attention", "host")] * 4


def test_less_device_memory_is_given_up_in_order():
    """From all activations to everything on the host, the last layers keeping most; and every plan fits its limit."""
    model = llama(layers=6)
    most = choose(model, gpu_memory=PLENTY, recompute=False)
    least = choose(model, gpu_memory=PLENTY, recompute=True, offload="host")
    rank = {("all", "device"): 2, ("attention", "device"): 1, ("attention", "host"): 0}
    reserve = most.limits.reserve
    seen, last = set(), (6, 0)
    for percent in range(100, 0, -5):
        limit = least.peaks.device + reserve + (most.peaks.device - least.peaks.device) * percent // 100
        plan = choose(model, gpu_memory=limit)
        assert plan.peaks.device <= limit
        ranks = [rank[place] for place in places(plan)]
        assert ranks == sorted(ranks)
        seen |= set(ranks)
        assert (ranks.count(2), ranks.count(1)) <= last
        last = (ranks.count(2), ranks.count(1))
    assert seen == {0, 1, 2}


def test_less_host_memory_is_given_up_in_order():
    """The device takes what the host cannot; where it may not, attention runs again, and then layers from their inputs."""
    model = llama(layers=8)
    full = choose(model, gpu_memory=PLENTY, recompute=True, offload="host")
    assert places(choose(model, gpu_memory=PLENTY, recompute=True, host_memory=full.peaks.host // 2))[-1][1] == "device"
    kept = []
    for share in (1.0, 0.9, 0.75, 0.55):
        limit = int(full.peaks.host * share)
        plan = choose(model, gpu_memory=PLENTY, recompute=True, offload="host", host_memory=limit)
        assert plan.peaks.host <= limit
        kept.append({placement.keeps for placement in plan.placements})
    assert kept[0] == {"attention"}
    assert kept[1] == kept[2] == {"attention", "key_value"}
    assert {"input", "nothing"} & kept[-1]
    with pytest.raises(hf_fpdt.HostMemoryError, match=r"needs .* GiB of page-locked host memory, and there are 0.00 GiB"):
        choose(model, gpu_memory=PLENTY, offload="host", host_memory=1)


def test_k_and_v_stream_and_chunks_shrink_where_they_do_not_fit():
    model = llama(num_key_value_heads=4, vocab_size=60)
    settings = {"chunk_size": "auto", "recompute": True, "offload": "host"}
    roomy = choose(model, seq_len=8192, gpu_memory=PLENTY, **settings)
    taken = roomy.peaks.device + roomy.limits.reserve
    chosen = []
    for percent in range(100, 10, -2):
        try:
            plan = choose(model, seq_len=8192, gpu_memory=taken * percent // 100, **settings)
        except hf_fpdt.DeviceMemoryError:
            break
        chosen.append((plan.stream_kv, plan.chunk_size))
    order = list(dict.fromkeys(chosen))
    assert order == sorted(order, key=lambda choice: (choice[0], -choice[1]))
    assert {(False, 2048), (False, 1024), (False, 256)} <= set(order)
    assert order[-1][0], "K and V stream at last"
    with pytest.raises(hf_fpdt.DeviceMemoryError, match=r"needs .* GiB of device memory .* raise gpu_memory"):
        choose(model, seq_len=8192, gpu_memory=MIB, **settings)


def test_gradients_and_optimizer_are_waited_for_until_they_are_there():
    model = llama()
    hf_fpdt.apply_fpdt(model, hf_fpdt.FPDTConfig(gpu_memory=PLENTY, host_memory=PLENTY, chunk_size=512))
    size = sum(p.numel() * 4 for p in model.parameters())
    assert hf_fpdt.plan(model, seq_len=1024).limits.reserve == 3 * size
    other = hf_fpdt.FPDTConfig(gpu_memory=PLENTY, optimizer_memory=MIB)
    assert hf_fpdt.plan(model, seq_len=1024, config=other).limits.reserve == size + MIB
    step(model, torch.randint(0, 500, (1, 64)))
    torch.optim.AdamW(model.parameters()).step()
    assert hf_fpdt.plan(model, seq_len=1024).limits.reserve == 0
    assert hf_fpdt.plan(model, seq_len=1024, config=other).limits.reserve == 0


def test_a_smaller_optimizer_trains_what_adamw_has_no_room_for():
    """Two states of the weights are missing: refused, with the knob in the message, and planned as it is turned."""
    model = llama()
    size = sum(p.numel() * 4 for p in model.parameters())
    settings = {"host_memory": PLENTY, "chunk_size": 512, "offload": "host", "recompute": True}
    config = hf_fpdt.FPDTConfig(gpu_memory=PLENTY, **settings)
    needed = hf_fpdt.plan(model, seq_len=4096, config=config).peaks.device + size
    config = replace(config, gpu_memory=needed + size)
    with pytest.raises(hf_fpdt.DeviceMemoryError, match="optimizer_memory=bytes for an optimizer smaller than AdamW"):
        hf_fpdt.plan(model, seq_len=4096, config=config)
    found = hf_fpdt.plan(model, seq_len=4096, config=replace(config, optimizer_memory=0))
    assert found.peaks.device + found.limits.reserve <= needed + size


def test_an_optimizer_under_deepspeed_is_not_said_by_hand():
    config = hf_fpdt.FPDTConfig(gpu_memory=PLENTY, host_memory=PLENTY, optimizer_memory=0)
    with pytest.raises(ValueError, match=r"plan\(gpus=2, zero=3\) with FPDTConfig\(optimizer_memory=0\)"):
        hf_fpdt.plan(llama().bfloat16(), seq_len=4096, config=config, gpus=2)


# ---- exactness of every choice ----

FAMILIES = pytest.mark.parametrize("config", [tiny_llama(), tiny_neox()], ids=["llama", "neox"])


def placed(monkeypatch, placements):
    """Makes every plan use these placements, repeated over the layers."""
    make = step_plan.simple_plan

    def planned(config, batch_size, seq_len, device_type, num_layers):
        plan = make(config, batch_size, seq_len, device_type, num_layers)
        cycle = tuple(placements[index % len(placements)] for index in range(num_layers))
        return step_plan.Plan(plan.batch_size, plan.seq_len, plan.chunk_size, plan.stream_kv, cycle)

    monkeypatch.setattr(model_plan, "simple_plan", planned)


def assert_exact(model, plain):
    """Two steps in a row, so that what the first gave back is used again."""
    batch = make_batch(2, 47)
    want, want_grads = loss_and_gradients(plain, batch)
    for _ in range(2):
        model.zero_grad()
        loss, grads = loss_and_gradients(model, batch)
        assert abs(loss - want) <= 2e-6 * want
        assert_gradients_close(grads, want_grads)


MIXES = {
    "all": [("all", "device")],
    "input": [("input", "host")],
    "groups of 2": [("input", "host"), ("nothing", "host")],
    "groups of 3": [("input", "host"), ("nothing", "host"), ("nothing", "host")],
    "nothing first": [("nothing", "device")],
    "mixed": [("key_value", "host"), ("attention", "device"), ("all", "device"), ("attention", "host")],
    "after a group": [("input", "host"), ("nothing", "host"), ("attention", "host"), ("all", "device")],
}


DISK = {
    "disk": [("attention", "disk")],
    "disk and host": [("key_value", "disk"), ("attention", "disk"), ("attention", "host"), ("all", "device")],
    "groups on disk": [("input", "disk"), ("nothing", "disk"), ("nothing", "disk")],
}


@FAMILIES
@pytest.mark.parametrize("mix", DISK.values(), ids=DISK)
def test_a_file_is_exact(config, mix, monkeypatch, tmp_path):
    config.num_hidden_layers = 5
    placed(monkeypatch, [LayerPlacement(*entry) for entry in mix])
    model, plain = make_streamed(config, 10, offload="disk", disk_folder=str(tmp_path)), make_model(config, "eager")
    assert_exact(model, plain)
    file = disk_file_for(str(tmp_path), torch.device("cpu"))
    assert file.file_bytes > 0 == file.used_bytes
    assert list(tmp_path.iterdir()) == []


def test_a_file_takes_what_the_host_cannot(tmp_path):
    model, settings = llama(layers=8), {"gpu_memory": PLENTY, "recompute": True}
    full = choose(model, offload="host", **settings)
    plan = choose(model, offload="disk", disk_folder=str(tmp_path), host_memory=int(full.peaks.host * 0.7), **settings)
    chosen = places(plan)
    assert chosen == sorted(chosen, key=lambda place: place[1] == "host"), "the lowest layers wait longest"
    assert {place for _, place in chosen} == {"disk", "host"}
    assert {keeps for keeps, _ in chosen} == {"attention"}
    assert plan.peaks.host <= full.peaks.host * 0.7
    assert plan.peaks.disk + plan.peaks.host >= full.peaks.host


def test_a_folder_that_is_not_there_is_refused():
    model = make_streamed(tiny_llama(), 10, offload="disk", disk_folder="/nowhere/at/all")
    with pytest.raises(ValueError, match=r"FPDTConfig\(disk_folder='/nowhere/at/all'\)"):
        model(**make_batch(1, 47))


@FAMILIES
@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
@pytest.mark.parametrize("kv", ["resident", "streamed"])
def test_every_placement_is_exact(config, mix, kv, monkeypatch):
    if kv == "streamed" and any(place == "device" for _, place in mix):
        pytest.skip("K and V stream from the host")
    config.num_hidden_layers = 5
    placed(monkeypatch, [LayerPlacement(*entry) for entry in mix])
    assert_exact(make_streamed(config, 10, kv=kv), make_model(config, "eager"))
    assert transfers_for(torch.device("cpu")).arena.used_bytes == 0


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_dropout_is_the_same_in_every_placement(mix, monkeypatch):
    """A layer that runs two or three times draws the same masks each time."""
    config = tiny_neox()
    config.num_hidden_layers, config.hidden_dropout = 5, 0.3
    results = []
    for entries in ([("attention", "device")], mix):
        placed(monkeypatch, [LayerPlacement(*entry) for entry in entries])
        model = make_streamed(config, 10).train()
        torch.manual_seed(3)
        results.append(loss_and_gradients(model, make_batch(2, 47)))
    assert torch.equal(torch.as_tensor(results[0][0]), torch.as_tensor(results[1][0]))
    assert_gradients_close(results[1][1], results[0][1])


def test_a_layer_whose_input_was_made_in_between_keeps_it(monkeypatch):
    """`nothing` is only for a layer whose input the layer below returned; here a hook replaces it."""
    config = tiny_llama()
    config.num_hidden_layers = 4
    placed(monkeypatch, [LayerPlacement("input", "host"), *[LayerPlacement("nothing", "host")] * 3])
    model, plain, batch = make_streamed(config, 10), make_model(config, "eager"), make_batch(1, 47)
    for one in (model, plain):
        one.model.layers[1].register_forward_hook(lambda module, args, output: output * 1.5)
    want, want_grads = loss_and_gradients(plain, batch)
    loss, grads = loss_and_gradients(model, batch)
    assert abs(loss - want) <= 2e-6 * want
    assert_gradients_close(grads, want_grads)


# ---- the interface ----


def test_plan_of_a_model_without_memory():
    model = llama(torch.bfloat16).to("meta")
    if '"meta"' not in inspect.getsource(maybe_autocast):  # transformers 5.0
        with pytest.raises(ValueError, match="cannot run on the meta device with transformers 5"):
            choose(model, gpu_memory=PLENTY)
        return
    plan = hf_fpdt.plan(model, seq_len=1 << 20, config=hf_fpdt.FPDTConfig(gpu_memory=80 << 30, host_memory=64 << 30))
    assert plan.peaks.device <= 80 << 30
    assert model.config._attn_implementation == "sdpa"
    table = str(plan)
    assert table.startswith("hf_fpdt: 1 x 1048576 tokens in 32 chunks of 32768, K and V resident")
    assert "predicted peak" in table
    with pytest.raises(ValueError, match="there is no GPU to ask"):
        hf_fpdt.plan(model, seq_len=1024)


def test_plan_of_a_model_on_a_cpu_says_what_would_run():
    model = make_streamed(tiny_llama(), 10)
    assert places(hf_fpdt.plan(model, seq_len=100)) == [("attention", "device")] * 2


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"seq_len": 1}, r"plan\(seq_len=1\): seq_len must be a whole number, at least 2\."),
        ({"seq_len": 2.0}, r"plan\(seq_len=2\.0\): seq_len must be"),
        ({"seq_len": True}, r"plan\(seq_len=True\): seq_len must be"),
        ({"seq_len": 10, "batch_size": 0}, r"plan\(batch_size=0\): batch_size must be a whole number, at least 1\."),
    ],
    ids=str,
)
def test_bad_sizes(sizes, message):
    with pytest.raises(ValueError, match=message):
        hf_fpdt.plan(make_streamed(tiny_llama(), 10), **sizes)


def test_sharded_weights_are_not_measured():
    model = make_streamed(tiny_llama(), 10, gpu_memory=PLENTY)
    for weight in model.parameters():
        weight.ds_id = 0
    for layer in model.model.layers:
        layer._z3_leaf = True  # as where DeepSpeed is imported before the model is wired
    with pytest.raises(ValueError, match=r"gpu_memory=1099511627776\) with weights that are sharded"):
        model(**make_batch(1, 47))
    hf_fpdt.apply_fpdt(model, hf_fpdt.FPDTConfig(chunk_size=10))
    assert model(**make_batch(1, 47)).loss.isfinite()


def drawing(forward):
    def draw(*args, **kwargs):
        torch.rand(1)
        return forward(*args, **kwargs)

    return draw


def test_training_follows_the_plan_and_changes_nothing(caplog):
    """The model that was measured gives the same loss and gradients as one that was not."""
    config, batch = tiny_neox(), make_batch(2, 47)
    want, want_grads = loss_and_gradients(make_model(config, "eager"), batch)
    model = hf_fpdt.apply_fpdt(make_model(config, "sdpa"), hf_fpdt.FPDTConfig(chunk_size=10, gpu_memory=PLENTY)).train()
    model.gpt_neox.rotary_emb.forward = drawing(model.gpt_neox.rotary_emb.forward)
    seen = []
    model.gpt_neox.layers[0].register_forward_hook(lambda module, args, output: seen.append(args[0].shape))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    with caplog.at_level("INFO", "hf_fpdt"):
        loss, grads = loss_and_gradients(model, batch)
    drawn = torch.get_rng_state()
    torch.set_rng_state(state)
    torch.rand(1)
    assert torch.equal(torch.get_rng_state(), drawn), "measuring draws nothing"
    assert seen == [(2, 47, config.hidden_size)], "nor do hooks see it"
    assert abs(loss - want) <= 2e-6 * want
    assert_gradients_close(grads, want_grads)
    assert "all activations of 2 layers, 0 to 1" in caplog.text
    assert "predicted peak" in caplog.text
