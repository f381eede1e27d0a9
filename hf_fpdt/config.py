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
            of about 32,768 tokens (batch included) on a GPU and 2,048 on a CPU.
        kernel (`str`, *optional*, defaults to `"auto"`):
            Attention kernel: one of `"flash_attention_4"`, `"flash_attention_2"`, `"cudnn"`, `"torch_flash"`,
            `"torch_efficient"`, `"torch_cpu"`, `"naive"`. `"auto"` checks the installed ones numerically, once, and takes
            the fastest that is right; the choice is logged at INFO. A named kernel that cannot run the model is an error,
            never a fallback.
        save_attention (`bool` or `"auto"`, *optional*, defaults to `"auto"`):
            Keep each layer's attention output and log-sum-exp from the forward for the backward, so that attention is not
            computed twice (`"auto"` does). `False` saves `2 * num_heads * head_dim + 4 * num_heads` bytes a token and
            layer (16-bit) and computes the attention forward once more.
        offload (`str`, *optional*, defaults to `"auto"`):
            Where what the backward needs waits for it: `"host"` in page-locked host memory, moved under the compute,
            `"none"` on the device. `"auto"` is `"host"` for a CUDA device and `"none"` on a CPU, where `"host"` only copies.
        kv (`str`, *optional*, defaults to `"auto"`):
            K and V of the layer that runs: `"resident"`, whole on the device, or `"streamed"`, in blocks of a chunk from host
            memory, which needs `offload="host"` and holds only two blocks on the device. `"auto"` is `"resident"`.
        host_memory (`int` or `"auto"`, *optional*, defaults to `"auto"`):
            Most bytes of host memory that this process locks for offload, on each device, at least 1. `"auto"` takes what
            the machine and the control group of the process can give, less 2 GiB. More is an error before it is touched.

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
    save_attention: bool | str = "auto"
    offload: str = "auto"
    kv: str = "auto"
    host_memory: int | str = "auto"

    def __post_init__(self):
        _check_count("chunk_size", self.chunk_size, "tokens")
        _check_count("host_memory", self.host_memory, "bytes")
        _check_choice("kernel", self.kernel, ("auto", *KERNEL_NAMES))
        _check_choice("save_attention", self.save_attention, ("auto", True, False))
        _check_choice("offload", self.offload, ("auto", "none", "host"))
        _check_choice("kv", self.kv, ("auto", "resident", "streamed"))
        if self.kv == "streamed" and self.offload != "host":
            raise ValueError(
                f'FPDTConfig(kv="streamed", offload={self.offload!r}): K and V stream from host memory. Set offload="host", or '
                'kv="resident".'
            )


def _check_count(field: str, value, unit: str) -> None:
    if value != "auto" and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f'FPDTConfig({field}={value!r}): {field} must be "auto" or a whole number of {unit}, at least 1.')


def _check_choice(field: str, value, choices: tuple) -> None:
    # `is` for booleans: 1 and 0 would pass an `in` test.
    if not any(value is choice or (isinstance(value, str) and value == choice) for choice in choices):
        raise ValueError(f"FPDTConfig({field}={value!r}): {field} must be one of {', '.join(map(repr, choices))}.")
