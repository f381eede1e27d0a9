"""The user's settings: one frozen, validated dataclass. Nothing here touches a device or a model."""

from dataclasses import dataclass

KERNEL_NAMES = ("flash_attention_4", "flash_attention_2", "cudnn", "torch_flash", "torch_efficient", "torch_cpu", "naive")


@dataclass(frozen=True, kw_only=True)
class FPDTConfig:
    """
    How a model's sequence is streamed. Every field has a good default.

    Args:
        chunk_size (`int` or `"auto"`, *optional*, defaults to `"auto"`):
            Global tokens of one sequence that one pipeline step handles, at least 1. Any length works: the last chunk may
            be shorter, and a chunk longer than the sequence means one chunk. `"auto"` cuts the sequence into equal chunks
            of about 16,384 tokens (batch included) on a GPU and 2,048 on a CPU; of twice as many from 32 such chunks on.
        kernel (`str`, *optional*, defaults to `"auto"`):
            Attention kernel: one of `"flash_attention_4"`, `"flash_attention_2"`, `"cudnn"`, `"torch_flash"`,
            `"torch_efficient"`, `"torch_cpu"`, `"naive"`. `"auto"` checks the installed ones numerically, once, and takes
            the fastest that is right; the choice is logged at INFO. A named kernel that cannot run the model is an error,
            never a fallback.
        recompute (`bool` or `"auto"`, *optional*, defaults to `"auto"`):
            Run each layer again in the backward instead of keeping its activations. `"auto"` keeps, with `offload` `"auto"` or
            `"none"`, all activations of as many layers as the GPU has memory to spare for; `True` those of none, `False` those
            of all. On a CPU `"auto"` is `True` unless `gpu_memory` is given.
        save_attention (`bool` or `"auto"`, *optional*, defaults to `"auto"`):
            Keep the attention output and log-sum-exp of a layer that runs again, so that attention is not computed twice.
            `False` saves `2 * num_heads * head_dim + 4 * num_heads` bytes a token and layer (16-bit) and computes the attention
            forward once more. `"auto"` is `True` for as many layers as there is memory for. If not even the rest fits, some
            layers keep nothing and are computed from a layer below.
        offload (`str`, *optional*, defaults to `"auto"`):
            Where what the backward needs waits for it: `"none"` on the device, `"host"` in page-locked host memory, moved under
            the compute, `"disk"` in host memory and, beyond `host_memory`, in a file in `disk_folder` (all of it, where no plan
            is made: on a CPU without `gpu_memory`). `"auto"` is host memory and the device memory that is to spare; on a CPU
            it is `"none"`, and `"host"` only copies.
        kv (`str`, *optional*, defaults to `"auto"`):
            K and V of the layer that runs: `"resident"`, whole on the device, or `"streamed"`, in blocks of a chunk from host
            memory, which holds only two blocks on the device. `"auto"` is `"resident"` if that fits.
        gpu_memory (`int` or `"auto"`, *optional*, defaults to `"auto"`):
            Most bytes of the GPU that this process takes in a step, model and optimizer included, at least 1. `"auto"` is what
            the GPU has free, less a reserve for the allocator. A step that needs more is an error before it starts.
        optimizer_memory (`int` or `"auto"`, *optional*, defaults to `"auto"`):
            Bytes of states that an optimizer which has not stepped yet will put on this process's GPU, at least 0; they are
            kept free until then. `"auto"` is what Trainer's optimizer has after a step on small weights, and without Trainer
            two states of every trained weight in its dtype, as AdamW has them: there say fewer for Adafactor, SGD and
            optimizers in 8 bits or on the host, and more for fp32 states of 16-bit weights.
        host_memory (`int` or `"auto"`, *optional*, defaults to `"auto"`):
            Most bytes of host memory that this process locks for offload, on each device, at least 1. `"auto"` takes what
            the machine and the control group of the process can give, less 2 GiB. More is an error before it is touched.
        disk_folder (`str`, *optional*):
            Folder for `offload="disk"`, on a fast local disk. The file in it has no name and goes away with the process.

    Raises:
        ValueError: for a value outside of the above, naming the value, what is needed, and the field.

    Example:

    ```python
    >>> from hf_fpdt import FPDTConfig, apply_fpdt

    >>> model = apply_fpdt(model, FPDTConfig(chunk_size=32768))
    ```
    """

    chunk_size: int | str = "auto"
    kernel: str = "auto"
    recompute: bool | str = "auto"
    save_attention: bool | str = "auto"
    offload: str = "auto"
    kv: str = "auto"
    gpu_memory: int | str = "auto"
    optimizer_memory: int | str = "auto"
    host_memory: int | str = "auto"
    disk_folder: str | None = None

    def __post_init__(self):
        _check_count("chunk_size", self.chunk_size, "tokens")
        _check_count("gpu_memory", self.gpu_memory, "bytes")
        _check_count("optimizer_memory", self.optimizer_memory, "bytes", least=0)
        _check_count("host_memory", self.host_memory, "bytes")
        _check_choice("kernel", self.kernel, ("auto", *KERNEL_NAMES))
        _check_choice("recompute", self.recompute, ("auto", True, False))
        _check_choice("save_attention", self.save_attention, ("auto", True, False))
        _check_choice("offload", self.offload, ("auto", "none", "host", "disk"))
        _check_choice("kv", self.kv, ("auto", "resident", "streamed"))
        self._check_together()

    def _check_together(self):
        if self.kv == "streamed" and self.offload == "none":
            self._refuse("kv", "offload", 'K and V stream from host memory: set offload="host" or kv="resident"')
        if self.recompute is False and self.offload in ("host", "disk"):
            self._refuse("recompute", "offload", 'kept activations stay on the device: set offload="none" or recompute="auto"')
        if self.recompute is False and self.kv == "streamed":
            self._refuse("recompute", "kv", 'kept activations stay on the device: set kv="resident" or recompute="auto"')
        if self.recompute is False and self.save_attention is False:
            self._refuse("recompute", "save_attention", "without recomputation everything is kept: set save_attention=True")
        if (self.offload == "disk") != (self.disk_folder is not None):
            self._refuse("offload", "disk_folder", 'name a folder on a fast local disk, with offload="disk" and only then')

    def _refuse(self, first: str, second: str, text: str):
        raise ValueError(f"FPDTConfig({first}={getattr(self, first)!r}, {second}={getattr(self, second)!r}): {text}.")


def _check_count(field: str, value, unit: str, least: int = 1) -> None:
    if value != "auto" and (isinstance(value, bool) or not isinstance(value, int) or value < least):
        raise ValueError(
            f'FPDTConfig({field}={value!r}): {field} must be "auto" or a whole number of {unit}, at least {least}.'
        )


def _check_choice(field: str, value, choices: tuple) -> None:
    # `is` for booleans: 1 and 0 would pass an `in` test.
    if not any(value is choice or (isinstance(value, str) and value == choice) for choice in choices):
        raise ValueError(f"FPDTConfig({field}={value!r}): {field} must be one of {', '.join(map(repr, choices))}.")
