"""
Seconds to map and page-lock a gigabyte of host memory, by the kind of pages, and what a copy reaches.

    python -m benchmarks.page_locking --gib 2 --out page_locking.json
    python -m benchmarks.page_locking --gib 4 --gpus 4 --out page_locking.json    # on every GPU at the same time

`shared` is anonymous memory as Python's `mmap` maps it by default, in small pages; `private` the same in a mapping that only
this process has; `large` asks for large pages there, as `hf_fpdt/host_arena.py` does; `large, touched` has threads write it
before it is locked. Every kind is mapped, locked, copied to, unlocked and unmapped. On a virtual machine the first kind also
pays for memory that its host has not given yet: it runs twice, and its second row is the one to compare.
"""

import argparse
import mmap
import multiprocessing
import time

from benchmarks.result_files import write_rows

KINDS = ("shared", "private", "large", "large, touched")
_GIB, _THREADS = 2**30, 4


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=2.0, help="of every kind")
    parser.add_argument("--gpus", type=int, default=1, help="processes at once, each with a GPU of its own")
    parser.add_argument("--out", default="page_locking.json", help="JSON file")
    args = parser.parse_args()
    rows: list[dict] = []
    with multiprocessing.get_context("spawn").Pool(args.gpus) as pool:
        pool.map(_start, range(args.gpus), chunksize=1)
        for kind in (KINDS[0], *KINDS):
            found = pool.starmap(measure, [(kind, args.gib)] * args.gpus, chunksize=1)
            rows.append({"kind": kind, "gib": args.gib, "gpus": args.gpus} | _slowest(found))
            words = (f"{name} {value:.3f}" if isinstance(value, float) else str(value) for name, value in rows[-1].items())
            print(" ".join(words), flush=True)
            write_rows("page_locking", args.out, rows)


def _start(index: int) -> None:
    import torch

    torch.cuda.set_device(index)
    torch.zeros(1, device="cuda")
    time.sleep(1)  # so that every process of the pool takes one


def _slowest(found: list[dict]) -> dict:
    return {name: max(one[name] for one in found) for name in found[0] if name != "to_host_gib_s"} | {
        "to_host_gib_s": min(one["to_host_gib_s"] for one in found)
    }


def measure(kind: str, gib: float) -> dict:
    """Seconds a GiB: until it is locked (`lock_s`), to unlock it and to unmap it; GiB a second of a copy to it."""
    import torch

    size = int(gib * _GIB)
    started = time.perf_counter()
    memory = mmap.mmap(-1, size, flags=mmap.MAP_ANONYMOUS | (mmap.MAP_SHARED if kind == "shared" else mmap.MAP_PRIVATE))
    if "large" in kind:
        memory.madvise(mmap.MADV_HUGEPAGE)
    slab = torch.frombuffer(memory, dtype=torch.uint8)
    if "touched" in kind:
        torch.set_num_threads(_THREADS)
        slab.zero_()
    runtime = torch.cuda.cudart()
    torch.cuda.check_error(int(runtime.cudaHostRegister(slab.data_ptr(), size, 0)))
    locked = time.perf_counter()
    source = torch.zeros(size // 4, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    copying = time.perf_counter()
    slab[: size // 4].copy_(source, non_blocking=True)
    torch.cuda.synchronize()
    copied = time.perf_counter()
    torch.cuda.check_error(int(runtime.cudaHostUnregister(slab.data_ptr())))
    unlocked = time.perf_counter()
    del slab
    memory.close()
    seconds = {"lock_s": locked - started, "unlock_s": unlocked - copied, "unmap_s": time.perf_counter() - unlocked}
    row = {name: value / gib for name, value in seconds.items()} | {"to_host_gib_s": gib / 4 / (copied - copying)}
    return row | {"gpu": torch.cuda.get_device_name()}


if __name__ == "__main__":
    main()
