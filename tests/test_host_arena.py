"""
The list of free page-locked memory, without CUDA.

A failure means two tensors in the same memory, or memory that leaks until the host is full.
"""

import gc
import mmap
import os
import random
import re
import threading
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from reference import make_batch, make_streamed, tiny_llama

import hf_fpdt
from hf_fpdt import host_arena, transfers
from hf_fpdt.host_arena import HostArena, HostMemoryError

PAGE = 4096
SLAB = 64 * PAGE


@pytest.fixture
def registered():
    """The slabs that were locked."""
    return []


@pytest.fixture
def unlocked():
    return []


@pytest.fixture
def arena(registered, unlocked):
    return HostArena(slab_bytes=SLAB, lock=registered.append, unlock=unlocked.append)


def pages(num_bytes: int) -> int:
    return max(1, -(-num_bytes // PAGE))


@pytest.mark.parametrize("seed", range(6))
def test_random_use_against_a_model_of_intervals(arena, registered, seed):
    """Every page has at most one owner, sizes are exact, data survives, and all free memory joins to whole slabs."""
    rng = random.Random(seed)
    owner: dict[tuple[int, int], int] = {}  # (slab, page) -> number of the piece
    live: dict[int, tuple] = {}
    for number in range(1, 600):
        if live and rng.random() < (0.45 if number < 400 else 0.6):
            key = rng.choice(list(live))
            piece, wanted, owned = live.pop(key)
            memory = piece.memory()
            assert (memory == key % 251).all(), "somebody else wrote into a piece"
            for page in owned:
                assert owner.pop(page) == key
            piece.give_back()
        else:
            wanted = rng.choice([1, PAGE - 1, PAGE, PAGE + 1, rng.randrange(1, 20 * PAGE), rng.randrange(1, 80 * PAGE)])
            piece = arena.take(wanted)
            assert piece.size == pages(wanted) * PAGE
            assert piece.offset % PAGE == 0
            memory = piece.memory()
            assert memory.dtype == torch.uint8
            assert memory.numel() == piece.size
            owned = [(piece.slab, piece.offset // PAGE + i) for i in range(pages(wanted))]
            assert not owner.keys() & set(owned), "handed out twice"
            owner.update(dict.fromkeys(owned, number))
            memory.fill_(number % 251)
            live[number] = (piece, wanted, owned)
        assert arena.used_bytes == len(owner) * PAGE
    for piece, _, _ in live.values():
        piece.give_back()
    assert arena.used_bytes == 0
    assert arena._free == [[(0, slab.numel())] for slab in registered]
    assert arena.locked_bytes == sum(slab.numel() for slab in registered)
    # and so the largest slab can be had in one piece again, without locking more
    before = len(registered)
    arena.take(max(slab.numel() for slab in registered))
    assert len(registered) == before


def test_pieces_are_distinct_memory(arena):
    first, second = arena.take(10), arena.take(10)
    first.memory().fill_(1)
    second.memory().fill_(2)
    assert (first.memory() == 1).all()
    assert first.memory().data_ptr() % PAGE == second.memory().data_ptr() % PAGE == 0


def test_the_tightest_hole_is_used(arena, registered):
    sizes = [8, 1, 3, 1, 5, 1]
    pieces = [arena.take(size * PAGE) for size in sizes]
    rest = arena.take(SLAB - sum(sizes) * PAGE)
    for index in (0, 2, 4):
        pieces[index].give_back()
    assert arena.take(3 * PAGE).offset == pieces[2].offset
    assert arena.take(4 * PAGE).offset == pieces[4].offset
    assert arena.take(8 * PAGE).offset == pieces[0].offset
    assert len(registered) == 1
    rest.give_back()


def test_slabs_grow_when_needed_and_are_locked_once(arena, registered):
    assert arena.locked_bytes == 0
    arena.take(PAGE)
    assert [slab.numel() for slab in registered] == [SLAB]
    big = arena.take(3 * SLAB + 1)
    assert [slab.numel() for slab in registered] == [SLAB, 3 * SLAB + PAGE]
    big.give_back()
    arena.take(3 * SLAB)
    assert len(registered) == 2
    assert arena.locked_bytes == 4 * SLAB + PAGE


def test_a_piece_goes_back_once(arena):
    piece, other = arena.take(PAGE), arena.take(PAGE)
    piece.give_back()
    again = arena.take(PAGE)
    piece.give_back()  # harmless: it is not this piece's memory any more
    assert arena.used_bytes == 2 * PAGE
    assert arena.take(PAGE).offset not in (again.offset, other.offset)


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: out of memory"), OSError("Cannot allocate memory")])
def test_error_when_the_system_refuses(registered, error):
    def lock(slab):
        if registered:
            raise error
        registered.append(slab)

    arena = HostArena(slab_bytes=1 << 20, lock=lock, unlock=lambda slab: None)
    piece = arena.take(1 << 20)
    with pytest.raises(HostMemoryError, match=r"needs 0\.00 GiB more of page-locked host memory; 0\.00 GiB are") as info:
        arena.take(1)
    assert str(error) in str(info.value)
    assert 'FPDTConfig(offload="none")' in str(info.value)
    assert info.value.__cause__ is error
    # nothing is half done: what was handed out is still accounted for, and can be used again
    assert (arena.locked_bytes, arena.used_bytes) == (1 << 20, 1 << 20)
    piece.give_back()
    assert arena.take(1 << 20).size == 1 << 20


def test_a_failed_lock_leaves_no_error_behind(monkeypatch):
    """CUDA's runtime keeps the last error of a thread until it is asked for it, which torch does after every launch."""
    state = SimpleNamespace(last=0, returns=2)

    def register(pointer, size, flags):
        state.last = state.returns or state.last
        return state.returns

    def launch(*args, device):
        assert device == "cuda"
        error, state.last = state.last, 0
        if error:
            raise RuntimeError(f"CUDA error {error}, reported by an unrelated launch")

    def check_error(result):
        if result != 0:
            raise RuntimeError(f"out of memory ({result})")

    monkeypatch.setattr(torch.cuda, "cudart", lambda: SimpleNamespace(cudaHostRegister=register))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(host_arena, "near", lambda index: nullcontext())
    monkeypatch.setattr(torch.cuda, "check_error", check_error)
    monkeypatch.setattr(torch, "ones", launch)
    arena = HostArena(slab_bytes=SLAB, unlock=lambda slab: None)
    with pytest.raises(HostMemoryError, match=r"The system refused: out of memory \(2\)"):
        arena.take(1)
    launch(device="cuda")
    state.returns = 0
    assert arena.take(1).size == PAGE


def test_error_names_the_bytes():
    def refuse(slab):
        raise RuntimeError("no")

    with pytest.raises(HostMemoryError, match=r"needs 0\.25 GiB more of page-locked host memory; 0\.00 GiB are locked already"):
        HostArena(slab_bytes=1 << 28, lock=refuse).take(5)


def test_a_dropped_arena_unlocks_its_slabs_once(registered, unlocked):
    arena = HostArena(slab_bytes=SLAB, lock=registered.append, unlock=unlocked.append)
    piece = arena.take(SLAB), arena.take(SLAB)
    assert unlocked == []
    del arena
    gc.collect()
    assert unlocked == [], "pieces are still out"
    del piece
    gc.collect()
    assert {slab.data_ptr() for slab in unlocked} == {slab.data_ptr() for slab in registered}
    assert len(unlocked) == len(registered) == 2


def test_pieces_come_back_from_other_threads(arena):
    """Graphs are dropped in autograd's threads, and by the garbage collector at any time."""
    pieces = [arena.take(PAGE) for _ in range(200)]
    threads = [threading.Thread(target=lambda part=pieces[i::4]: [piece.give_back() for piece in part]) for i in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        arena.take(PAGE).give_back()
    for thread in threads:
        thread.join()
    assert arena.used_bytes == 0
    assert all(len(spans) == 1 for spans in arena._free)


@pytest.fixture
def machine(monkeypatch):
    """A machine that reports so many available bytes, and time that passes only in `sleep`."""
    state = SimpleNamespace(available=None, now=0.0, on_sleep=lambda: None)

    def sleep(seconds):
        state.now += seconds
        state.on_sleep()

    monkeypatch.setattr(host_arena, "available_host_bytes", lambda: state.available)
    monkeypatch.setattr(host_arena.time, "monotonic", lambda: state.now)
    monkeypatch.setattr(host_arena.time, "sleep", sleep)
    monkeypatch.setattr(host_arena, "RESERVE_BYTES", 100 * PAGE)
    return state


def make_arena(**kwargs):
    return HostArena(lock=lambda slab: None, unlock=lambda slab: None, **kwargs)


def test_limit(machine):
    arena = make_arena(slab_bytes=4 * PAGE)
    limit = 10 * PAGE
    pieces = [arena.take(3 * PAGE, limit), arena.take(5 * PAGE, limit)]
    assert arena.locked_bytes == 9 * PAGE, "the slab of 4 and one of 5"
    pieces.append(arena.take(PAGE, limit))  # what is left of the first slab
    pieces.append(arena.take(PAGE, limit))  # the last slab is as short as the limit asks
    assert arena.locked_bytes == 10 * PAGE
    with pytest.raises(HostMemoryError, match=r"The limit is 0\.00 GiB \(FPDTConfig\(host_memory=40960\)\)\. Use FPDTConfig"):
        arena.take(1, limit)
    assert make_arena(slab_bytes=4 * PAGE).take(11 * PAGE).size == 11 * PAGE, "the limit belongs to the request"
    pieces.pop().give_back()
    assert arena.take(1, limit).size == PAGE


def test_a_machine_without_memory_refuses_before_anything_is_mapped(machine):
    machine.available = 100 * PAGE + 3 * PAGE
    locked = []
    arena = HostArena(slab_bytes=64 * PAGE, lock=locked.append, unlock=lambda slab: None)
    with pytest.raises(HostMemoryError, match=r"has 0\.00 GiB available, of which .* are left alone"):
        arena.take(4 * PAGE)
    assert locked == []
    assert 9.9 < machine.now < 10.5, "it waited for memory that a virtual machine may be given"
    assert arena.take(3 * PAGE).size == 3 * PAGE
    assert arena.locked_bytes == 3 * PAGE, "not a whole slab: there was no room for one"


def test_memory_that_arrives_is_used(machine):
    machine.available = 0

    def arrive():
        machine.available += 30 * PAGE

    machine.on_sleep = arrive
    assert make_arena(slab_bytes=PAGE).take(50 * PAGE).size == 50 * PAGE
    assert machine.available == 150 * PAGE
    assert machine.now < 2


def test_a_system_that_does_not_say_is_trusted(machine):
    assert make_arena(slab_bytes=PAGE).take(50 * PAGE).size == 50 * PAGE
    assert machine.now == 0


def test_a_shortage_in_training_is_a_named_error_and_leaves_the_model_usable(monkeypatch):
    transfers.transfers_for.cache_clear()
    model, batch = make_streamed(tiny_llama(), 10, offload="host", host_memory=8 * PAGE), make_batch(1, 47)
    with pytest.raises(hf_fpdt.HostMemoryError, match=r"FPDTConfig\(host_memory=32768\)"):
        model(**batch)
    gc.collect()
    assert transfers.transfers_for(torch.device("cpu")).arena.used_bytes == 0
    hf_fpdt.apply_fpdt(model, hf_fpdt.FPDTConfig(chunk_size=10, offload="host"))
    assert model(**batch).loss.isfinite()
    transfers.transfers_for.cache_clear()


def test_two_models_have_limits_of_their_own(monkeypatch):
    """The arena belongs to the device and the limit to the model, also in a backward that locks more after the other ran."""
    monkeypatch.setattr(transfers, "HostArena", partial(HostArena, slab_bytes=PAGE))
    transfers.transfers_for.cache_clear()
    settings = {"offload": "host", "kv": "streamed"}
    small, large = (make_streamed(tiny_llama(), 10, host_memory=pages * PAGE, **settings) for pages in (8, 4000))
    batch = make_batch(1, 47)
    loss = large(**batch).loss
    arena = transfers.transfers_for(torch.device("cpu")).arena
    locked = arena.locked_bytes
    with pytest.raises(hf_fpdt.HostMemoryError, match=r"FPDTConfig\(host_memory=32768\)"):
        small(**batch)
    gc.collect()
    assert arena.locked_bytes == locked > 8 * PAGE
    loss.backward()
    assert arena.locked_bytes > locked, "the backward needed more than the forward"
    transfers.transfers_for.cache_clear()


# The memory itself


def flags_of(address: int) -> set[str]:
    """What the kernel says of the mapping at this address; empty if there is none."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(span[1], 16) <= address < int(span[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return set(line.split()[1:])
    return set()


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux says how memory is mapped")
def test_slabs_are_in_large_pages_and_not_in_forked_processes(arena, registered):
    """A worker that a loader forks has no part of them, and nothing is copied when this process writes afterwards."""
    piece = arena.take(4 << 20)
    memory = piece.memory()
    memory.fill_(7)
    address = memory.data_ptr()
    flags = flags_of(address)
    assert "sh" not in flags, "shared memory has small pages"
    assert "dc" in flags, "a forked process would have it"
    if Path("/sys/kernel/mm/transparent_hugepage/enabled").exists():
        assert "hg" in flags, "large pages were not asked for"
    child = os.fork()
    if child == 0:
        os._exit(0 if not flags_of(address) else 1)
    memory.fill_(8)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (memory == 8).all()


def test_a_system_without_large_pages_or_such_advice(monkeypatch):
    """Memory is mapped all the same."""

    class Mapped(mmap.mmap):
        def madvise(self, *_):
            raise OSError("invalid argument")

    monkeypatch.setattr(host_arena.mmap, "mmap", Mapped)
    monkeypatch.delattr(host_arena.mmap, "MADV_DONTFORK", raising=False)
    memory = host_arena._mapped(PAGE)
    memory.fill_(3)
    assert (memory == 3).all()
