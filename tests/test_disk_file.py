"""
Tensors that wait in a file: what comes back is what was kept, bit for bit, whatever the disk does meanwhile.

A failure means data of another tensor, space or host memory that leaks, a disk error that is lost or hangs, or a file that
others can read or that stays behind. Host memory is NaN when it is handed out, so what was not read shows.
"""

import errno
import fcntl
import gc
import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import weakref
from collections import namedtuple
from functools import partial
from itertools import pairwise

import pytest
import test_transfers
import torch
from started import run

from hf_fpdt import disk_file as disk_file_module
from hf_fpdt import nameless_file
from hf_fpdt.attention_kernels import NaiveKernel, ScoreRule
from hf_fpdt.disk_file import DiskCopy, DiskFile, DiskFileError, DiskSpaceError, disk_file_for
from hf_fpdt.documents import Documents
from hf_fpdt.free_list import cut, join, tightest
from hf_fpdt.host_arena import HostArena, HostMemoryError
from hf_fpdt.key_value_store import ResidentStore, StreamedStore
from hf_fpdt.transfers import CpuTransfers, HostCopy, HostWrite, KeptTensor

PAGE = 4096
Usage = namedtuple("Usage", "total used free")


def poisoned(arena: HostArena) -> HostArena:
    """Pieces are NaN when they are handed out."""
    take = arena.take

    def take_nan(*args):
        piece = take(*args)
        piece.memory().fill_(255)
        return piece

    arena.take = take_nan
    return arena


@pytest.fixture
def cpu():
    """Transfers without a GPU, on an arena of their own."""
    made = CpuTransfers()
    made.arena = poisoned(HostArena(slab_bytes=64 * PAGE, lock=lambda slab: None, unlock=lambda slab: None))
    return made


@pytest.fixture
def file(tmp_path):
    return DiskFile(str(tmp_path))


simulated_cuda = test_transfers.simulated


class WorkerEvent(test_transfers.Event):
    """An event of the simulated streams that a thread may wait for: the worker, by asking again and again."""

    device = -1

    def query(self):
        if threading.current_thread() is not threading.main_thread():
            self.stream.run_until(self.position)
        return super().query()


@pytest.fixture
def cuda(simulated_cuda, monkeypatch):
    """The class for CUDA devices on the simulated streams of `test_transfers`, with the worker as a second thread."""
    lock, run_until = threading.RLock(), test_transfers.SideStream.run_until

    def locked_run_until(self, position):
        with lock:
            run_until(self, position)

    monkeypatch.setattr(test_transfers.SideStream, "run_until", locked_run_until)
    monkeypatch.setattr(test_transfers, "Event", WorkerEvent)
    poisoned(simulated_cuda.arena)
    return simulated_cuda


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def same(tensor: torch.Tensor, want: torch.Tensor) -> bool:
    return tensor.shape == want.shape and tensor.dtype == want.dtype and torch.equal(bits(tensor), bits(want))


def random_bits(shape, dtype=torch.float32) -> torch.Tensor:
    """Every pattern of bits, NaNs with all their payloads among them."""
    size = torch.Size(shape).numel() * dtype.itemsize
    high = 2 if dtype == torch.bool else 256
    return torch.randint(0, high, (size,), dtype=torch.uint8).view(dtype).view(shape)


def eventually(condition) -> bool:
    """What the worker still holds comes back a moment after it is done."""
    deadline = time.monotonic() + 5
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)
    return condition()


def nothing_is_left(transfers, file) -> bool:
    return eventually(lambda: transfers.arena.used_bytes == 0 == file.used_bytes) and file._free == [(0, file.file_bytes)]


# --- What comes back ---

FLOATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.complex64]
STRIDED = {
    "transposed": lambda: random_bits((5, 7)).t(),
    "sliced": lambda: random_bits((2, 60, 3, 16))[:, 10:31],
    "every_other": lambda: random_bits((4000,))[::2],
    "expanded": lambda: random_bits((1, 33)).expand(4, 33),
}


@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (7, 5), (PAGE,), (3, 1, PAGE + 1)], ids=str)
@pytest.mark.parametrize("dtype", [*FLOATS, torch.int64, torch.uint8, torch.bool], ids=str)
def test_round_trip(cpu, file, dtype, shape):
    tensor = random_bits(shape, dtype)
    kept = DiskCopy(cpu, file, tensor)
    for _ in range(2):
        kept.prefetch()
        kept.prefetch()
        assert same(kept.get(), tensor)
        assert kept.get() is kept.get()
        on_device = weakref.ref(kept.get())
        kept.evict()
        assert on_device() is None
    assert same(kept.get(), tensor), "without a prefetch"
    kept.release()
    kept.release()
    assert nothing_is_left(cpu, file)


@pytest.mark.parametrize("make", STRIDED.values(), ids=STRIDED)
def test_strided_tensors(cpu, file, make):
    tensor = make()
    assert not tensor.is_contiguous()
    assert same(DiskCopy(cpu, file, tensor).get(), tensor)


def test_the_host_piece_is_back_after_get(cpu, file):
    kept = DiskCopy(cpu, file, torch.ones(5))
    kept.prefetch()
    read = kept._read  # as the worker may for a moment
    kept.get()
    assert read.done.is_set()
    assert cpu.arena.used_bytes == 0


def test_what_is_kept_is_the_value_of_then(cpu, file):
    tensor = torch.ones(3, requires_grad=True) * 2
    kept = DiskCopy(cpu, file, tensor)
    tensor.detach().zero_()
    assert kept.get().tolist() == [2, 2, 2]
    assert not kept.get().requires_grad


def use_at_random(transfers, file, rng):
    """In any order: what comes back is right, and no byte of the file has two owners."""
    live: dict[DiskCopy, torch.Tensor] = {}
    for number in range(300):
        if not live or rng.random() < (0.45 if number < 200 else 0.2):
            tensor = random_bits((rng.choice([1, 1000, 1024, 1025, rng.randrange(9000)]),))
            live[DiskCopy(transfers, file, tensor)] = tensor
        else:
            kept = rng.choice(list(live))
            if rng.random() < 0.4:
                kept.prefetch()
            if rng.random() < 0.6:
                assert same(kept.get(), live[kept])
            if rng.random() < 0.3:
                kept.evict()
            if rng.random() < 0.4:
                del live[kept]
                kept.release()
        extents = sorted(kept._extent for kept in live)
        assert all(sum(a) <= b[0] for a, b in pairwise(extents))
        assert file.used_bytes == sum(size for _, size in extents)
    for kept, tensor in live.items():
        assert same(kept.get(), tensor)
        kept.release()
    assert nothing_is_left(transfers, file)


@pytest.mark.parametrize("seed", range(4))
def test_random_use(cpu, file, seed):
    use_at_random(cpu, file, random.Random(seed))


@pytest.mark.parametrize("seed", range(4))
def test_random_use_on_streams(cuda, file, seed):
    use_at_random(cuda, file, random.Random(seed))


def run_store(store_class, keep, *settle):
    """K and V of a layer through both passes; every result."""
    torch.manual_seed(3)
    spans, kernel, rule, results = [(0, 10), (10, 20), (20, 27)], NaiveKernel(), ScoreRule(0.3), []
    store = store_class(spans, partial(Documents.whole(2, 27).segments, spans), keep, *settle)
    queries, outs = [], []
    for index, (start, stop) in enumerate(spans):
        query, key, value = (torch.randn(2, stop - start, heads, 8) for heads in (4, 2, 2))
        store.append(index, key, value)
        queries.append(query)
        outs.append(store.attend(kernel, index, query, rule))
    store.end_forward()
    store.prefetch()
    store.begin_backward()
    for index in reversed(range(len(spans))):
        grad_out = torch.randn_like(queries[index])
        results += store.attend_backward(kernel, index, grad_out, queries[index], *outs[index], rule)
    store.release()
    return [*results, *(t for pair in outs for t in pair)]


@pytest.mark.parametrize("store_class", [ResidentStore, StreamedStore])
def test_keys_and_values_of_a_layer(cuda, file, store_class):
    for _ in range(2):  # the second time in used space
        settle = [cuda.settle] if store_class is StreamedStore else []
        results = run_store(store_class, partial(DiskCopy, cuda, file), *settle)
        assert all(same(a, b) for a, b in zip(results, run_store(store_class, KeptTensor, *settle), strict=True))
    assert nothing_is_left(cuda, file)


def test_a_source_changed_while_it_is_copied_is_refused(cuda, file):
    tensor = torch.ones(3, 5)
    kept = DiskCopy(cuda, file, tensor)
    if not test_transfers.SideStream.late:  # the copy was over: what was kept is what was handed over
        tensor.add_(1.0)
        assert same(kept.get(), torch.ones(3, 5))
        return
    tensor.add_(1.0)
    with pytest.raises(RuntimeError, match=r"A tensor of shape \[3, 5\] that a streamed layer needs.*changed in place"):
        kept.get()


# --- Space in the file ---


def run_step(transfers, file, sizes) -> None:
    """A forward that keeps tensors of so many floats, and the backward."""
    tensors = [random_bits((size,)) for size in sizes]
    copies = [DiskCopy(transfers, file, tensor) for tensor in tensors]
    for index in reversed(range(len(copies))):
        copies[max(index - 1, 0)].prefetch()
        assert same(copies[index].get(), tensors[index])
        copies[index].release()


def test_space_is_used_again(cpu, file):
    sizes, seen = [5000, 5000, 700, 1, 5000, 5000, 700, 40000], set()
    for step in range(50):
        run_step(cpu, file, sizes)
        assert nothing_is_left(cpu, file)
        if step:  # how much host memory the first step takes depends on the disk's pace
            seen.add(file.file_bytes)
    assert seen == {sum(-(-4 * size // PAGE) * PAGE for size in sizes)}
    assert os.fstat(file._file._fd).st_size == file.file_bytes


def test_the_end_of_the_file_grows_by_what_is_missing(file):
    first, second = file.take(2 * PAGE), file.take(3 * PAGE - 1)
    assert (first, second) == ((0, 2 * PAGE), (2 * PAGE, 3 * PAGE))
    file.give_back(second)
    assert file.take(7 * PAGE) == (2 * PAGE, 7 * PAGE)
    assert file.file_bytes == 9 * PAGE
    file.give_back(first)
    assert file.take(3 * PAGE) == (9 * PAGE, 3 * PAGE)
    assert file.take(PAGE) == (0, PAGE)
    assert os.fstat(file._file._fd).st_size == 12 * PAGE


@pytest.mark.parametrize("seed", range(4))
def test_free_list_against_a_set_of_bytes(seed):
    rng, spans, free, taken = random.Random(seed), [], set(), []
    join(spans, (0, 100))
    free |= set(range(100))
    for _ in range(500):
        size = rng.randrange(1, 12)
        holes = [(stop - start, start) for start, stop in runs(free)]
        want = min((hole for hole in holes if hole[0] >= size), default=None)
        found = tightest(spans, size)
        assert (found is None) == (want is None)
        if found is not None and rng.random() < 0.6:
            assert found == (want[1], want[0])
            taken.append(cut(spans, found, size))
            assert taken[-1] == (want[1], size)
            free -= set(range(want[1], want[1] + size))
        elif taken:
            offset, size = taken.pop(rng.randrange(len(taken)))
            join(spans, (offset, size))
            free |= set(range(offset, offset + size))
        assert spans == [(start, stop - start) for start, stop in runs(free)]


def runs(numbers: set[int]) -> list[tuple[int, int]]:
    starts = sorted(n for n in numbers if n - 1 not in numbers)
    stops = sorted(n + 1 for n in numbers if n + 1 not in numbers)
    return list(zip(starts, stops, strict=True))


def test_dropped_without_a_backward(cpu, file):
    copies = [DiskCopy(cpu, file, torch.randn(3000)) for _ in range(9)]
    copies[3].prefetch()
    copies[4].get()
    copies[5].prefetch()
    assert file.used_bytes > 0
    del copies
    assert nothing_is_left(cpu, file)


# --- The file itself ---


def test_the_file_is_private_and_has_no_name(tmp_path):
    before = os.umask(0)
    try:
        file = DiskFile(str(tmp_path))
    finally:
        os.umask(before)
    file.take(10 * PAGE)
    found = os.fstat(file._file._fd)
    assert stat.S_IMODE(found.st_mode) == 0o600
    assert found.st_nlink == 0
    assert os.listdir(tmp_path) == []
    assert fcntl.fcntl(file._file._fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC


def test_a_file_that_nobody_uses_goes_away(cpu, tmp_path):
    file = DiskFile(str(tmp_path))
    kept = DiskCopy(cpu, file, torch.ones(5))
    kept.get()
    gone, worker, fd = weakref.ref(file), file._worker, file._file._fd
    assert worker.is_alive()
    del file
    assert gone() is not None, "a copy still needs it"
    del kept
    assert gone() is None
    worker.join(5)
    assert not worker.is_alive()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


@pytest.mark.parametrize("name", ["missing", "a_file", "/proc/self"])
def test_a_folder_that_cannot_be_used(tmp_path, name):
    (tmp_path / "a_file").touch()
    folder = str(tmp_path / name)
    with pytest.raises(ValueError, match=r"FPDTConfig\(disk_folder='.*'\): no file can be made there: .* Name an") as info:
        DiskFile(folder)
    assert repr(folder) in str(info.value)
    assert isinstance(info.value.__cause__, OSError)


def test_one_file_a_folder_and_device(tmp_path):
    device = torch.device("cpu")
    made = disk_file_for(str(tmp_path), device)
    assert made is disk_file_for(str(tmp_path), device)
    assert made is not disk_file_for(str(tmp_path), torch.device("cuda:1"))
    disk_file_module._disk_file.cache_clear()


def refuse_direct_io(monkeypatch, at_open):
    """A file system without direct I/O; it says so when asked, or not before the first write."""
    direct, fcntl_, pwrite = set(), fcntl.fcntl, os.pwrite

    def my_fcntl(fd, command, argument=0):
        if command == fcntl.F_SETFL:
            if at_open and argument & os.O_DIRECT:
                raise OSError(errno.EINVAL, "Invalid argument")
            (direct.add if argument & os.O_DIRECT else direct.discard)(fd)
            argument &= ~os.O_DIRECT
        return fcntl_(fd, command, argument)

    def my_pwrite(fd, *args):
        if fd in direct:
            raise OSError(errno.EINVAL, "Invalid argument")
        return pwrite(fd, *args)

    monkeypatch.setattr(nameless_file.fcntl, "fcntl", my_fcntl)
    monkeypatch.setattr(os, "pwrite", my_pwrite)


def refuse_reserving(monkeypatch):
    def posix_fallocate(*args):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", posix_fallocate)


@pytest.mark.parametrize("at_open", [True, False])
def test_file_systems_that_can_do_less(cpu, tmp_path, monkeypatch, at_open):
    refuse_direct_io(monkeypatch, at_open)
    refuse_reserving(monkeypatch)
    file = DiskFile(str(tmp_path))
    for _ in range(3):
        run_step(cpu, file, [5000, 1, 700])
    assert os.fstat(file._file._fd).st_size == file.file_bytes == 7 * PAGE


def test_the_page_cache_is_not_used_where_that_can_be(tmp_path, file):
    """It would fill the memory that there is too little of."""
    with open(tmp_path / "x", "wb") as other:
        try:
            fcntl.fcntl(other, fcntl.F_SETFL, os.O_DIRECT)
        except OSError:
            pytest.skip("this file system has no direct I/O")
    assert fcntl.fcntl(file._file._fd, fcntl.F_GETFL) & os.O_DIRECT


def test_calls_that_move_less_than_asked_for(cpu, file, monkeypatch):
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:PAGE], at))
    monkeypatch.setattr(os, "preadv", lambda fd, data, at: preadv(fd, [data[0][: 2 * PAGE]], at))
    run_step(cpu, file, [5000, 1, 7000])


# --- Disks that are full, broken or slow ---


def test_a_full_disk_is_noticed_before_it_is_written(cpu, file, monkeypatch):
    kept = DiskCopy(cpu, file, torch.arange(2000.0))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(100 * PAGE, 98 * PAGE, 2 * PAGE))
    match = r"needs 12288 bytes \(0\.00 GiB\) more in FPDTConfig\(disk_folder='.*'\); 8192 bytes \(0\.00 GiB\) are free there"
    with pytest.raises(DiskSpaceError, match=match) as info:
        DiskCopy(cpu, file, torch.randn(3000))
    assert "FPDTConfig(save_attention=False)" in str(info.value)
    assert "disk_folder on a larger disk" in str(info.value)
    assert "shorter sequences" in str(info.value)
    assert issubclass(DiskSpaceError, RuntimeError)
    assert file.used_bytes == file.file_bytes == 2 * PAGE
    assert same(DiskCopy(cpu, file, torch.ones(2048)).get(), torch.ones(2048)), "this much is there"
    assert same(kept.get(), torch.arange(2000.0))
    del kept, info
    monkeypatch.undo()
    run_step(cpu, file, [5000, 1, 700])
    assert nothing_is_left(cpu, file)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_disk_that_fills_up_while_the_file_grows(cpu, file, monkeypatch, number):
    kept = DiskCopy(cpu, file, torch.arange(2000.0))

    def posix_fallocate(fd, offset, size):
        os.ftruncate(fd, offset + size // 2)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", posix_fallocate)
    with pytest.raises(DiskSpaceError, match=rf"needs 12288 bytes .*The system refused: .*{os.strerror(number)}"):
        DiskCopy(cpu, file, torch.randn(3000))
    assert os.fstat(file._file._fd).st_size == file.file_bytes == 2 * PAGE
    assert same(kept.get(), torch.arange(2000.0))


def fail(monkeypatch, call, number, after=0):
    """Makes a system call fail from its `after`-th time on."""
    real, times = getattr(os, call), []

    def failing(*args):
        times.append(args)
        if len(times) > after:
            raise OSError(number, os.strerror(number))
        return real(*args)

    monkeypatch.setattr(os, call, failing)


@pytest.mark.parametrize(("number", "error"), [(errno.ENOSPC, DiskSpaceError), (errno.EIO, DiskFileError)])
def test_a_write_that_fails_is_raised_by_a_later_save(cpu, file, monkeypatch, number, error):
    first = DiskCopy(cpu, file, torch.arange(9.0))
    fail(monkeypatch, "pwrite", number, after=1)
    assert same(first.get(), torch.arange(9.0))
    monkeypatch.undo()
    fail(monkeypatch, "pwrite", number)
    copies = [DiskCopy(cpu, file, torch.randn(3000))]
    with pytest.raises(error, match=os.strerror(number)) as info:
        copies.extend(DiskCopy(cpu, file, torch.randn(3000)) for _ in range(DiskFile.max_writes))
    assert type(info.value) is error
    assert isinstance(info.value.__cause__, OSError)
    assert repr(file._folder) in str(info.value)
    monkeypatch.undo()
    # the next step works even while the failed one is still referred to
    run_step(cpu, file, [5000, 1, 700])
    assert same(first.get(), torch.arange(9.0))
    with pytest.raises(error):
        copies[0].get()
    del copies, first, info
    assert nothing_is_left(cpu, file)


def test_a_write_that_failed_is_raised_by_the_very_next_save(cpu, file, monkeypatch):
    fail(monkeypatch, "pwrite", errno.ENOSPC)
    kept = DiskCopy(cpu, file, torch.randn(3000))
    assert eventually(kept._write.done.is_set)
    monkeypatch.undo()
    with pytest.raises(DiskSpaceError, match="No space left on device"):
        DiskCopy(cpu, file, torch.ones(5))
    assert same(DiskCopy(cpu, file, torch.ones(5)).get(), torch.ones(5)), "once is enough"


@pytest.mark.parametrize("call", ["pwrite", "preadv"])
def test_what_fails_is_raised_by_the_get(cpu, file, monkeypatch, call):
    good = DiskCopy(cpu, file, torch.arange(2000.0))
    good.get()
    good.evict()
    fail(monkeypatch, call, errno.EIO)
    kept = DiskCopy(cpu, file, torch.randn(3000))
    kept.prefetch()
    verb = {"pwrite": "Writing 12288", "preadv": "Reading 12288"}[call]
    with pytest.raises(DiskFileError, match=rf"{verb} bytes in FPDTConfig\(disk_folder='.*'\) failed: OSError: .*Input/output"):
        kept.get()
    monkeypatch.undo()
    kept.release()
    assert same(good.get(), torch.arange(2000.0))
    good.release()
    run_step(cpu, file, [5000, 1, 700])
    assert nothing_is_left(cpu, file)


def test_a_write_that_fails_and_is_not_needed_is_no_error(cpu, file, monkeypatch):
    fail(monkeypatch, "pwrite", errno.ENOSPC)
    kept = DiskCopy(cpu, file, torch.randn(3000))
    assert eventually(kept._write.done.is_set)
    del kept
    monkeypatch.undo()
    run_step(cpu, file, [5000, 1, 700])


def test_a_file_that_became_shorter_is_an_error(cpu, file):
    kept = DiskCopy(cpu, file, torch.randn(3000))
    assert eventually(kept._write.done.is_set)
    os.ftruncate(file._file._fd, 0)
    with pytest.raises(DiskFileError, match="the file ended early"):
        kept.get()


def slow_down(monkeypatch, call, seconds):
    real = getattr(os, call)

    def slow(*args):
        time.sleep(seconds)
        return real(*args)

    monkeypatch.setattr(os, call, slow)


def test_a_slow_disk_slows_the_step_and_takes_no_more_memory(cpu, file, monkeypatch):
    slow_down(monkeypatch, "pwrite", 0.01)
    size = 4 * PAGE
    tensors = [random_bits((size,), torch.uint8) for _ in range(25)]
    copies, begin = [], time.monotonic()
    for tensor in tensors:
        copies.append(DiskCopy(cpu, file, tensor))
        assert cpu.arena.used_bytes <= 4 * size
    assert time.monotonic() - begin >= 0.01 * (len(tensors) - 4)
    assert all(same(kept.get(), tensor) for kept, tensor in zip(copies, tensors, strict=True))


def test_save_and_prefetch_do_not_wait_for_the_disk(cpu, file, monkeypatch):
    go, pwrite = threading.Event(), os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda *args: pwrite(*args) if go.wait(20) else 1 / 0)
    copies = [DiskCopy(cpu, file, torch.ones(5)) for _ in range(DiskFile.max_writes)]
    for kept in copies:
        kept.prefetch()
    assert not any(kept._write.done.is_set() for kept in copies)
    go.set()
    assert all(same(kept.get(), torch.ones(5)) for kept in copies)


def test_short_host_memory_is_waited_for_if_it_comes_back(cpu, file, monkeypatch):
    slow_down(monkeypatch, "pwrite", 0.005)
    limit = 2 * 4 * PAGE
    tensors = [random_bits((4 * PAGE,), torch.uint8) for _ in range(10)]
    copies = [DiskCopy(cpu, file, tensor, limit) for tensor in tensors]
    assert cpu.arena.locked_bytes == limit
    for kept, tensor in zip(copies, tensors, strict=True):
        assert same(kept.get(), tensor)
        kept.release()
    with pytest.raises(HostMemoryError, match=r"FPDTConfig\(host_memory=32768\)"):
        DiskCopy(cpu, file, random_bits((9 * PAGE,), torch.uint8), limit)
    assert nothing_is_left(cpu, file)


class Gate:
    """An event of the device that happens when the test says so."""

    device = -1

    def __init__(self):
        self.open = False

    def query(self):
        return self.open


class GatedTransfers(CpuTransfers):
    def __init__(self, arena):
        self.arena, self.gates, self.moved_bytes = arena, [], 0

    def copy_to_host(self, tensor, host):
        super().copy_to_host(tensor, host)
        self.gates.append(Gate())
        return HostWrite(tensor, self.gates[-1])


def test_the_worker_waits_for_the_device(cpu, file, monkeypatch):
    """The piece is not written before the copy to it is over, and not read into while queued copies may still use it."""
    calls, pwrite, preadv = [], os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda *args: calls.append("write") or pwrite(*args))
    monkeypatch.setattr(os, "preadv", lambda *args: calls.append("read") or preadv(*args))
    gated, tensor = GatedTransfers(cpu.arena), torch.randn(3000)
    kept = DiskCopy(gated, file, tensor)
    kept.prefetch()
    time.sleep(0.05)
    assert calls == []
    gated.gates[0].open = True
    assert eventually(lambda: calls == ["write"])
    time.sleep(0.05)
    assert calls == ["write"]
    gated.gates[1].open = True
    assert same(kept.get(), tensor)
    assert calls == ["write", "read"]


def test_a_copy_that_cannot_be_started_leaves_nothing(cpu, file, monkeypatch):
    kept = DiskCopy(cpu, file, torch.ones(5))
    monkeypatch.setattr(cpu, "copy_to_host", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        DiskCopy(cpu, file, torch.ones(5))
    with pytest.raises(ZeroDivisionError):
        kept.prefetch()
    monkeypatch.undo()
    assert same(kept.get(), torch.ones(5))
    kept.release()
    assert nothing_is_left(cpu, file)


def test_host_memory_that_queued_copies_still_write(cuda, file):
    tensor = torch.randn(1000)
    kept = DiskCopy(cuda, file, tensor)
    assert eventually(kept._write.done.is_set)
    other = HostCopy(cuda, torch.randn(1000))
    offset = other._piece.offset
    del other  # given back, its copy maybe not begun
    kept.prefetch()
    assert kept._read.piece.offset == offset
    assert eventually(kept._read.done.is_set)
    cuda._d2h_stream.run_until(len(cuda._d2h_stream.queue))
    assert same(kept.get(), tensor)


# --- Interrupts, processes ---


def test_an_interrupted_get_leaves_everything_usable(cpu, file, monkeypatch):
    tensor, go, interrupted = torch.randn(3000), threading.Event(), threading.Event()
    kept, preadv = DiskCopy(cpu, file, tensor), os.preadv
    monkeypatch.setattr(os, "preadv", lambda *args: go.wait(60) and preadv(*args))

    def interrupt():
        while not interrupted.wait(0.5):  # again, if the first came while Python ran a finalizer, which ignores it
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it
    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        kept.get()
    interrupted.set()
    signal.signal(signal.SIGINT, handler)
    other = DiskCopy(cpu, file, torch.ones(7))
    dropped = DiskCopy(cpu, file, torch.ones(7))
    dropped.prefetch()
    del dropped
    go.set()
    assert same(kept.get(), tensor)
    assert same(other.get(), torch.ones(7))
    del kept, other
    gc.collect()
    assert nothing_is_left(cpu, file)


def run_script(body: str, folder) -> subprocess.CompletedProcess:
    head = """
import os, signal, sys, time, warnings
warnings.simplefilter("error")
import torch
from hf_fpdt.disk_file import DiskCopy, DiskFile, disk_file_for
from hf_fpdt.transfers import CpuTransfers
folder, cpu = sys.argv[1], torch.device("cpu")
"""
    script = folder.with_suffix(".py")  # the folder is to stay empty
    script.write_text(head + body)
    return run([sys.executable, script, folder], timeout=120)


def test_the_end_of_the_process_does_not_wait_for_the_disk(tmp_path):
    result = run_script(
        """
disk_file = disk_file_for(folder, cpu)
os.pwrite = lambda *args: time.sleep(1000)
copies = [DiskCopy(CpuTransfers(), disk_file, torch.ones(5)) for _ in range(3)]
copies[1].prefetch()
print("end")
""",
        tmp_path,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "end\n", "")


def test_a_killed_process_leaves_nothing(tmp_path):
    result = run_script("kept = DiskCopy(CpuTransfers(), DiskFile(folder), torch.ones(5))\nos.kill(os.getpid(), 9)", tmp_path)
    assert result.returncode == -signal.SIGKILL
    assert os.listdir(tmp_path) == []


def test_a_forked_process_has_a_file_of_its_own(tmp_path):
    result = run_script(
        """
import warnings
warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads, which is what is tested
mine = disk_file_for(folder, cpu)
kept = DiskCopy(CpuTransfers(), mine, torch.arange(5))
kept.prefetch()
child = os.fork()
if child == 0:
    for attempt in (kept.get, lambda: DiskCopy(CpuTransfers(), mine, torch.ones(5))):
        try:
            attempt()
        except RuntimeError as error:
            assert "was forked" in str(error), error
        else:
            raise AssertionError("the parent's file was used")
    other = disk_file_for(folder, cpu)
    assert other is not mine
    assert DiskCopy(CpuTransfers(), other, torch.zeros(5)).get().tolist() == [0] * 5
    del kept
    sys.exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
print(kept.get().tolist())
""",
        tmp_path,
    )
    assert (result.returncode, result.stdout) == (0, "[0, 1, 2, 3, 4]\n"), result.stderr
