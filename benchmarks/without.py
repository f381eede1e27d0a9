"""
Design choices of hf_fpdt switched off, one by one, inside of a benchmark's process: what each is worth. Nothing of hf_fpdt is
changed; its seams are patched for as long as `switched_off` is entered. Results stay the same up to rounding. On a CPU nothing
overlaps and nothing is locked: there `overlap`, `pinned` and repeated copies change nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

NOTHING = "nothing"


@contextmanager
def switched_off(names: str, copies: int = 1) -> Iterator[None]:
    """
    Inside, hf_fpdt runs without these choices. Enter it before a model is built.

    Args:
        names: of `CHOICES`, joined by `+`, or `nothing`.
        copies: how many times every copy between host and GPU is made: a link so many times slower.
    """
    from hf_fpdt.transfers import transfers_for

    patches = [one for name in parsed(names) for one in CHOICES[name]()] + (_copies_repeated(copies) if copies > 1 else [])
    if not patches:
        yield
        return
    transfers_for.cache_clear()  # an arena is made anew, as the choices have it
    with ExitStack() as stack:
        for one in patches:
            stack.enter_context(one)
        try:
            yield
        finally:
            transfers_for.cache_clear()


def parsed(names: str) -> list[str]:
    """
    The choices that a text names.

    Raises:
        ValueError: for one that there is not, or that is named twice.
    """
    found = [] if names == NOTHING else names.split("+")
    if (unknown := [name for name in found if name not in CHOICES]) or len(set(found)) < len(found):
        raise ValueError(
            f"--without {names}: got {', '.join(unknown) or 'a name twice'}; {NOTHING}, or names of {', '.join(CHOICES)} "
            "joined by + are needed."
        )
    return found


def _overlap():
    """Copies run beside the compute. Off: compute waits for each copy, both ways, where it starts."""
    from hf_fpdt.transfers import Transfers

    to_host, to_device = Transfers.copy_to_host, Transfers.copy_to_device

    def copy_to_host(self, tensor, host):
        write = to_host(self, tensor, host)
        self.wait(write.done)
        return write

    def copy_to_device(self, host, written):
        tensor, arrived = to_device(self, host, written)
        self.wait(arrived)
        return tensor, arrived

    return [patch.object(Transfers, one.__name__, one) for one in (copy_to_host, copy_to_device)]


def _prefetch():
    """What the next chunk, block or layer needs is fetched under the compute. Off: each fetch starts where it is used."""
    from hf_fpdt.transfers import HostCopy

    get, prefetch = HostCopy.get, HostCopy.prefetch

    def fetch_and_get(self):
        prefetch(self)
        return get(self)

    return [patch.object(HostCopy, "prefetch", lambda self: None), patch.object(HostCopy, "get", fetch_and_get)]


def _pinned():
    """Host memory is page-locked. Off: the same arena, pageable; the driver copies through a buffer of its own."""
    from hf_fpdt import host_arena

    return [patch.object(host_arena, name, lambda slab: None) for name in ("_cuda_lock", "_cuda_unlock")]


def _arena():
    """Host memory comes from hf_fpdt's packed slabs. Off: from torch's allocator of page-locked memory, tensor by tensor."""
    from hf_fpdt import transfers

    return [patch.object(transfers, "HostArena", _TorchArena)]


class _TorchArena:
    """What `HostArena` offers, on tensors of torch's own. It locks powers of two, and so is counted."""

    def __init__(self, **how):
        self.used_bytes = self.locked_bytes = 0

    def take(self, num_bytes: int, limit_bytes: int | None = None) -> "_TorchPiece":
        import torch

        from hf_fpdt import HostMemoryError

        locked = 1 << max(num_bytes - 1, 0).bit_length()
        if limit_bytes is not None and self.used_bytes + locked > limit_bytes:
            raise HostMemoryError(f"{locked / 2**30:.2f} GiB more than {self.used_bytes / 2**30:.2f} are over the limit.")
        piece = _TorchPiece(self, torch.empty(num_bytes, dtype=torch.uint8, pin_memory=torch.cuda.is_available()), locked)
        self.used_bytes += locked
        self.locked_bytes = max(self.locked_bytes, self.used_bytes)
        return piece


class _TorchPiece:
    def __init__(self, arena: _TorchArena, memory, locked: int):
        self._arena, self._memory, self._locked = arena, memory, locked

    def memory(self):
        return self._memory

    def give_back(self) -> None:
        """torch gives the memory to nobody else before the copies that were started with it are over."""
        self._arena.used_bytes -= self._locked
        self._memory, self._locked = None, 0


def _chunked_loss():
    """The loss is computed in chunks of logits. Off: the model's own, over the logits of all tokens."""
    from hf_fpdt import model_loss

    return [patch.object(model_loss, "_why_not", lambda *call: "the benchmark switched chunks of it off")]


def _streamed_norm():
    """The final norm runs chunk by chunk. Off: over all tokens at once."""
    from hf_fpdt import layer_wiring
    from hf_fpdt.instance_forward import inner_forward

    return [patch.object(layer_wiring, "_run_norm", lambda norm, args, kwargs: inner_forward(norm)(*args, **kwargs))]


def _in_place():
    """A layer's grad_x takes the memory of its grad_y where nobody else has that. Off: it is a tensor of its own."""
    from hf_fpdt import layer_stream, token_stream

    return [patch.object(module, "is_sole_owner", lambda grad: False) for module in (layer_stream, token_stream)]


def _fp32_sums():
    """Gradients of weights are summed over chunks in fp32. Off: in the dtype of the gradients, which is less exact."""
    from hf_fpdt.gradient_sum import GradientSum

    def add(self, grads):
        if self._sums is None:
            self._sums, self._dtypes = list(grads), [None if grad is None else grad.dtype for grad in grads]
            return
        for index, grad in enumerate(grads):
            if grad is not None:
                known = self._sums[index]
                self._sums[index] = grad if known is None else known.add_(grad)
                self._dtypes[index] = grad.dtype

    return [patch.object(GradientSum, "add", add)]


def _cut_keys():
    """The backward of attention runs over 65,536 keys a call. Off: over all that a chunk sees."""
    from hf_fpdt import causal_attention

    return [patch.object(causal_attention, "MAX_BACKWARD_KEYS", 1 << 40)]


def _copies_repeated(times: int):
    """Every copy is made so many times, one after the other, on its stream; whoever waits for it waits for the last."""
    import torch

    from hf_fpdt.transfers import Transfers

    to_host, to_device = Transfers.copy_to_host, Transfers.copy_to_device

    def copy_to_host(self, tensor, host):
        return to_host(self, tensor, _WrittenAgain(host, times))

    def copy_to_device(self, host, written):
        tensor, _ = to_device(self, host, written)
        with torch.cuda.stream(self._h2d_stream):
            for _ in range(times - 1):
                tensor.copy_(host, non_blocking=True)
            return tensor, self._h2d_stream.record_event()

    return [patch.object(Transfers, one.__name__, one) for one in (copy_to_host, copy_to_device)]


class _WrittenAgain:
    """Host memory as `copy_to_host` uses it; it is written so many times."""

    def __init__(self, host, times: int):
        self._host, self._times, self.nbytes = host, times, host.nbytes

    def copy_(self, source, non_blocking: bool) -> None:
        for _ in range(self._times):
            self._host.copy_(source, non_blocking=non_blocking)


CHOICES: dict[str, Callable] = {
    "overlap": _overlap,
    "prefetch": _prefetch,
    "pinned": _pinned,
    "arena": _arena,
    "chunked-loss": _chunked_loss,
    "streamed-norm": _streamed_norm,
    "in-place": _in_place,
    "fp32-sums": _fp32_sums,
    "cut-keys": _cut_keys,
}
