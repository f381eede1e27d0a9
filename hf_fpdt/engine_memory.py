"""
What DeepSpeed's ZeRO takes of every GPU, and what its processes send each other, by the sizes of a model. Arithmetic only.

Weights are in 16 bits, the optimizer is AdamW with fp32 weights and states, as `mixed_precision: bf16` makes them:

    bytes a trained weight      weights     gradients     fp32 weights and states
    ZeRO-2                      2           2             12 / gpus
    ZeRO-3                      2 / gpus    2 / gpus      12 / gpus

and a frozen weight has the first column alone. Gradients are reduced from a bucket, that ZeRO-3 has from the first step on.
"""

from dataclasses import dataclass

STAGES = (2, 3)
GPUS_A_HOST = 8  # at most
_WEIGHT_BYTES, _STATE_BYTES = 2, 12
_BUCKET_ELEMENTS = 500_000_000  # DeepSpeed's reduce_bucket_size
_LIVE_ELEMENTS = 1_000_000_000  # its stage3_max_live_parameters
_STEP_ELEMENTS = 1_000_000_000  # its sub_group_size


@dataclass(frozen=True)
class Engine:
    """
    Args:
        gpus: processes, over all machines.
        sp_size: of them share a sequence.
        zero: stage.

    Raises:
        ValueError: for what cannot be, or is not planned.
    """

    gpus: int
    sp_size: int
    zero: int = 3

    def __post_init__(self):
        if self.zero not in STAGES:
            raise ValueError(f"zero={self.zero}: plans for several GPUs are made for ZeRO {' and '.join(map(str, STAGES))}.")
        if min(self.gpus, self.sp_size) < 1 or self.gpus % self.sp_size:
            raise ValueError(
                f"gpus={self.gpus}, sp_size={self.sp_size}: sp_size must divide the number of GPUs, and both be at least 1."
            )

    @property
    def gpus_on_host(self) -> int:
        """Processes that share a machine's memory."""
        return min(self.gpus, GPUS_A_HOST)

    @property
    def shards_weights(self) -> bool:
        """Whether layers gather their weights when they run."""
        return self.zero == 3

    def held(self, trained: int, frozen: int) -> int:
        """Bytes of a GPU from the first step on, of a model of so many elements."""
        whole = _WEIGHT_BYTES * (trained + frozen)
        if self.shards_weights:
            whole = (whole + _WEIGHT_BYTES * trained) // self.gpus + _WEIGHT_BYTES * _BUCKET_ELEMENTS
        return whole + _STATE_BYTES * trained // self.gpus

    def passing(self, trained: int, frozen: int, layer: int) -> int:
        """
        Bytes that pass through a GPU in forward and backward: weights that are gathered, those that are used again soon among
        them, and gradients on their way from a layer into the bucket, and, copied once more, from the bucket to the shards.

        Args:
            layer: trained elements of a decoder layer.
        """
        bucket = min(_BUCKET_ELEMENTS, trained)
        if not self.shards_weights:
            return 2 * _WEIGHT_BYTES * bucket
        return _WEIGHT_BYTES * (min(_LIVE_ELEMENTS, trained + frozen) + bucket + layer)

    def stepping(self, trained: int) -> int:
        """Bytes of the fp32 gradients that the optimizer works on at a time."""
        return 4 * min(_STEP_ELEMENTS, trained // self.gpus)

    def sent(self, trained: int, frozen: int) -> float:
        """Bytes that leave a GPU in forward and backward for weights and their gradients."""
        gathers = 2 * (trained + frozen) if self.shards_weights else 0
        return _WEIGHT_BYTES * (gathers + trained) * (self.gpus - 1) / self.gpus
