"""
Settings of a run that `accelerate launch` starts: from code, from the DeepSpeed configuration, from the environment.

In rising priority: what the model was given by `apply_fpdt`, `FPDTPlugin`, the `"fpdt"` block of the DeepSpeed JSON, variables
`FPDT_<FIELD>`. Each names only the fields that it sets.
"""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from accelerate.utils import DeepSpeedSequenceParallelConfig

from .config import FPDTConfig
from .step_trace import VARIABLE as _TRACE

_FIELDS = tuple(one.name for one in fields(FPDTConfig))
_PREFIX = "FPDT_"
_KERNEL_OF = {None: {}, "sdpa": {}, "flash_attention_2": {"kernel": "flash_attention_2"}}


@dataclass
class FPDTPlugin(DeepSpeedSequenceParallelConfig):
    """
    Settings of hf_fpdt as the `sp_handler` of accelerate's `ParallelismConfig`, for Trainer
    (`TrainingArguments(parallelism_config=...)`) and `Accelerator(parallelism_config=...)`.

    Args:
        config (`FPDTConfig`, *optional*): how sequences are streamed.
        sp_attn_implementation (`str`, *optional*): `"flash_attention_2"` is that kernel; `"sdpa"` leaves it to `config`.
        sp_seq_length, sp_seq_length_is_variable: not needed; lengths are those of the batches.

    Raises:
        ValueError: for a `config` of another type.

    Example:

    ```python
    >>> from accelerate import ParallelismConfig
    >>> from hf_fpdt import FPDTConfig, FPDTPlugin

    >>> parallelism_config = ParallelismConfig(sp_size=4, sp_handler=FPDTPlugin(config=FPDTConfig(chunk_size=65536)))
    ```
    """

    config: FPDTConfig = field(default_factory=FPDTConfig)

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.config, FPDTConfig):
            raise ValueError(f"FPDTPlugin(config=...) got {type(self.config).__name__}; an FPDTConfig is needed.")


def resolve_settings(base: FPDTConfig, handler: Any, block: Any, environment: Mapping[str, str] = os.environ) -> FPDTConfig:
    """
    Args:
        base: the model's own settings.
        handler: the `sp_handler`, if there is one.
        block: the `"fpdt"` entry of the DeepSpeed configuration, if there is one.

    Raises:
        ValueError: for a field that does not exist or a value that is none of its, and for attention implementations that are
            no kernel here; naming where it was set.
    """
    settings = asdict(base)
    if isinstance(handler, FPDTPlugin):
        settings |= {name: value for name, value in asdict(handler.config).items() if value != getattr(FPDTConfig(), name)}
    implementation = getattr(handler, "sp_attn_implementation", None)
    if implementation not in _KERNEL_OF:
        raise ValueError(
            f"sp_attn_implementation={implementation!r}: hf_fpdt needs one of {', '.join(map(repr, _KERNEL_OF))}; its own "
            "kernels are named by FPDTConfig(kernel=...)."
        )
    settings |= _KERNEL_OF[implementation]
    if not isinstance(block if block is not None else {}, Mapping):
        raise ValueError(f'The "fpdt" entry of the DeepSpeed configuration is {block!r}; it must be a JSON object.')
    settings |= _known(block or {}, 'The "fpdt" block of the DeepSpeed configuration', "")
    set_here = {name: value for name, value in environment.items() if name.startswith(_PREFIX) and name != _TRACE}
    named = {name[len(_PREFIX) :].lower(): value for name, value in set_here.items()}
    settings |= {name: _parsed(value) for name, value in _known(named, "The environment", _PREFIX).items()}
    return FPDTConfig(**settings)


def _known(found: Mapping[str, Any], where: str, prefix: str) -> dict[str, Any]:
    for name in found:
        if name not in _FIELDS:
            wanted = ", ".join([*(prefix + one.upper() for one in _FIELDS), _TRACE] if prefix else _FIELDS)
            raise ValueError(
                f"{where} sets {prefix}{name.upper() if prefix else name}, which is no setting; there are {wanted}."
            )
    return dict(found)


def _parsed(text: str) -> Any:
    """Of a variable: a number, true or false, or the text itself."""
    if text.isdecimal():
        return int(text)
    return {"true": True, "false": False}.get(text.lower(), text)
