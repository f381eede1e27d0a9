"""
The copy streams, on a CPU: the code for CUDA runs on simulated streams whose copies happen as late as the recorded waits
allow, or at once. A failure means a missing wait: a tensor read before its copy arrived, freed or changed before it was copied,
or host memory used again too early.
"""

import weakref
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from reference import (
    assert_gradients_close,
    loss_and_gradients,
    make_batch,
    make_model,
    make_streamed,
    tiny_llama,
    tiny_mistral,
    tiny_neox,
)

from hf_fpdt import FPDTConfig, apply_fpdt, host_arena, key_value_store, places, transfers

CHUNK = 10


class Compute:
    """The stream of the caller: what runs on it has run when the call returns."""

    def wait_event(self, event):
        event.stream.run_until(event.position)


class SideStream:
    """A queue of operations. `late`: one runs when somebody waits for it. Otherwise it runs when it is queued."""

    late = True

    def __init__(self, device=None):
        self.queue, self.done = [], 0

    def push(self, operation):
        self.queue.append(operation)
        if not self.late:
            self.run_until(len(self.queue))

    def run_until(self, position):
        while self.done < position:
            self.done += 1
            self.queue[self.done - 1]()

    def wait_stream(self, stream):
        assert isinstance(stream, Compute)

    def wait_event(self, event):
        self.push(lambda: event.stream.run_until(event.position))

    def record_event(self):
        return Event(self)


class Lasting:
    def __init__(self, tensor):
        self.tensor = tensor

    def __call__(self):
        return self.tensor


class Event:
    def __init__(self, stream):
        self.stream, self.position = stream, len(stream.queue)

    def query(self):
        return self.stream.done >= self.position


@pytest.fixture(params=[True, False], ids=["late", "at_once"])
def simulated(request, monkeypatch):
    """`Transfers`, the class for CUDA devices, on simulated streams and memory that is NaN until it is written."""
    active = []
    copy_ = torch.Tensor.copy_

    def queued_copy(self, source, non_blocking=False):
        if not active:
            return copy_(self, source)
        assert non_blocking
        assert self.is_contiguous()
        assert source.is_contiguous()
        # Host memory stays mapped; what is on the device can be given to somebody else once nobody refers to it.
        target, source = (Lasting(t) if on_host(t) else weakref.ref(t) for t in (self, source))

        def run():
            assert target() is not None, "the target was freed before the copy"
            assert source() is not None, "the source was freed before the copy"
            copy_(target(), source())

        active[-1].push(run)
        return self

    def on_host(tensor):
        slabs = [slab.untyped_storage().data_ptr() for slab in made.arena._slabs]
        return tensor.untyped_storage().data_ptr() in slabs

    @contextmanager
    def stream(side):
        active.append(side)
        yield
        active.pop()

    monkeypatch.setattr(SideStream, "late", request.param)
    monkeypatch.setattr(torch.Tensor, "copy_", queued_copy)
    monkeypatch.setattr(torch.cuda, "Stream", SideStream)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Compute())
    monkeypatch.setattr(host_arena, "_cuda_lock", lambda slab: slab.fill_(255))
    monkeypatch.setattr(host_arena, "_cuda_unlock", lambda slab: None)
    monkeypatch.setattr(transfers, "HostArena", partial(host_arena.HostArena, slab_bytes=1 << 20))
    made = transfers.Transfers(torch.device("cpu"))
    monkeypatch.setattr(transfers, "transfers_for", lambda device: made)
    monkeypatch.setattr(places, "transfers_for", lambda device: made)
    return made


SETTINGS = [
    {"offload": "host"},
    {"offload": "host", "save_attention": False},
    {"offload": "host", "kv": "streamed"},
    {"offload": "host", "kv": "streamed", "save_attention": False},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("config", [tiny_llama, tiny_neox, tiny_mistral], ids=["llama", "neox", "mistral"])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_model_trains_the_same(simulated, config, settings, batch_size):
    batch = make_batch(batch_size, 47)
    want, want_grads = loss_and_gradients(make_model(config(), "eager"), batch)
    model = make_streamed(config(), CHUNK, **settings)
    locked = set()
    for _ in range(3):  # later steps use host memory again
        loss, grads = loss_and_gradients(model, batch)
        assert abs(loss - want) <= 2e-6 * want
        assert_gradients_close(grads, want_grads)
        assert simulated.arena.used_bytes == 0
        locked.add(simulated.arena.locked_bytes)
    assert len(locked) == 1


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_packed_and_padded_documents_train_the_same(simulated, settings):
    """Blocks that are skipped, and sums that begin late or never."""
    positions = torch.cat([torch.arange(n) for n in (9, 2, 30, 6)])[None]
    mask = (torch.arange(47) < 41).long()[None]
    batch = make_batch(1, 47) | {"position_ids": positions}
    batch["labels"][0, 41:] = -100
    # Behind the padding nothing is learnt from, and causality keeps it from the rest: eager needs no mask for it.
    want, want_grads = loss_and_gradients(make_model(tiny_llama(), "eager"), batch, use_cache=False)
    model = make_streamed(tiny_llama(), CHUNK, **settings)
    for _ in range(2):
        loss, grads = loss_and_gradients(model, batch | {"attention_mask": mask})
        assert abs(loss - want) <= 2e-6 * want
        assert_gradients_close(grads, want_grads)
        assert simulated.arena.used_bytes == 0


def test_streamed_gradients_leave_the_device_with_their_chunk(simulated, monkeypatch):
    """Otherwise sums of grad K and grad V add to what the MLP of the next chunk takes."""
    pending, backward = [], key_value_store.StreamedStore.attend_backward

    def counted(*args, **kwargs):
        grads = backward(*args, **kwargs)
        pending.append(len(simulated._pending))
        return grads

    monkeypatch.setattr(key_value_store.StreamedStore, "attend_backward", counted)
    loss_and_gradients(make_streamed(tiny_llama(), CHUNK, offload="host", kv="streamed"), make_batch(1, 47))
    assert len(pending) == 2 * -(-47 // CHUNK)
    assert not any(pending)


@pytest.mark.parametrize("kv", ["resident", "streamed"])
def test_a_dropped_graph_gives_its_host_memory_back(simulated, kv):
    model, batch = make_streamed(tiny_llama(), CHUNK, offload="host", kv=kv), make_batch(1, 47)
    loss = model(**batch).loss
    assert simulated.arena.used_bytes > 0
    del loss
    assert simulated.arena.used_bytes == 0
    assert loss_and_gradients(model, batch)[0].isfinite()


def test_evaluation_keeps_nothing(simulated):
    model, batch = make_streamed(tiny_llama(), CHUNK, offload="host", kv="streamed"), make_batch(1, 47)
    with torch.no_grad():
        streamed = model(**batch).loss
        plain = make_model(tiny_llama(), "eager")(**batch).loss
    assert abs(streamed - plain) <= 2e-6 * plain
    assert simulated.arena.used_bytes == 0


def test_sources_wait_in_bounded_number(simulated):
    for _ in range(50):
        transfers.HostCopy(simulated, torch.randn(3, 5))
        assert len(simulated._pending) <= transfers.Transfers.max_pending


def test_a_copy_can_be_fetched_again(simulated):
    tensor = torch.randn(2, 6, 4)[:, 1:4]  # not contiguous
    kept = transfers.HostCopy(simulated, tensor)
    for _ in range(3):
        kept.prefetch()
        assert torch.equal(kept.get(), tensor)
        kept.evict()
    kept.release()
    kept.release()
    assert simulated.arena.used_bytes == 0


@pytest.mark.parametrize("through", ["itself", "view"])
def test_a_source_changed_while_it_is_copied_is_refused(simulated, through):
    tensor = torch.ones(3, 5)
    kept = transfers.HostCopy(simulated, tensor)
    (tensor if through == "itself" else tensor[1:]).add_(1.0)
    if not SideStream.late:  # the copy was over: what was kept is what was handed over
        assert torch.equal(kept.get(), torch.ones(3, 5))
        return
    for _ in range(2 * transfers.Transfers.max_pending):  # also once the source is let go
        with pytest.raises(RuntimeError, match=r"A tensor of shape \[3, 5\] that a streamed layer needs.*changed in place"):
            kept.get()
        kept.evict()
        transfers.HostCopy(simulated, torch.ones(1))


def test_a_source_may_change_behind_its_copy(simulated):
    tensor, strided = torch.ones(3, 5), torch.ones(5, 3).t()
    kept = [transfers.HostCopy(simulated, t) for t in (tensor, strided)]
    strided.add_(1.0)  # what is copied is a contiguous copy
    for _ in range(transfers.Transfers.max_pending):
        transfers.HostCopy(simulated, torch.ones(1))
    tensor.add_(1.0)  # compute has waited for the copy
    assert all(torch.equal(k.get(), torch.ones(3, 5)) for k in kept)


@pytest.mark.parametrize("on_host", [True, False])
def test_inference_tensors_are_kept(simulated, on_host):
    with torch.inference_mode():
        tensor = torch.ones(3, 5)
    kept = transfers.HostCopy(simulated, tensor) if on_host else transfers.KeptTensor(tensor)
    assert torch.equal(kept.get(), torch.ones(3, 5))


def test_an_input_changed_in_place_while_it_is_copied(simulated):
    if not SideStream.late:
        pytest.skip("every copy is over at once")
    simulated.max_pending = 8  # so many that the input's copies still wait
    model = make_streamed(tiny_llama(), CHUNK, offload="host")
    model.model.layers[1].register_forward_hook(lambda module, args, output: (args[0].add_(1.0), None)[1])
    loss = model(**make_batch(1, 17)).loss
    with pytest.raises(RuntimeError, match="changed in place"):
        loss.backward()


def test_streaming_k_and_v_needs_the_host():
    with pytest.raises(ValueError, match=r"FPDTConfig\(kv='streamed', offload='none'\): .* set offload=\"host\""):
        FPDTConfig(kv="streamed", offload="none")
    with pytest.raises(ValueError, match=r"FPDTConfig\(kv='disk'\): kv must be one of 'auto', 'resident', 'streamed'"):
        FPDTConfig(kv="disk")


def test_host_memory_on_a_cpu_is_not_locked(monkeypatch):
    """Without a GPU the same settings take the same path, without streams and page locks."""
    transfers.transfers_for.cache_clear()
    monkeypatch.setattr(host_arena, "_cuda_lock", None)
    batch = make_batch(2, 47)
    model = apply_fpdt(make_model(tiny_llama(), "sdpa"), FPDTConfig(chunk_size=CHUNK, offload="host", kv="streamed"))
    want, want_grads = loss_and_gradients(make_model(tiny_llama(), "eager"), batch)
    loss, grads = loss_and_gradients(model, batch)
    assert abs(loss - want) <= 2e-6 * want
    assert_gradients_close(grads, want_grads)
    assert isinstance(transfers.transfers_for(torch.device("cpu")), transfers.CpuTransfers)
    assert transfers.transfers_for(torch.device("cpu")).arena.used_bytes == 0
    transfers.transfers_for.cache_clear()
