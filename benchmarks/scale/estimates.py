"""
Seconds, host memory and GPU memory of a point before it runs, and the settings by which it fits. Arithmetic on shapes.

    seconds   operations (`shapes.step_flops`, attention's forward once more if it is not saved) at 45% of the peak, and with a
              point's warm-up 45 s for the launch: imports, weights, compilation of kernels, the end of the processes. More
              where page-locking the host's memory takes longer than the model does
    host      what every layer keeps for its backward, by token: input, K, V, and with `save_attention` out and lse; and the
              final norm's input. Under ZeRO-3 all of it waits on the host
    GPU       weights, gradients, fp32 weights and two states of AdamW over all GPUs, and the larger of two moments: the forward
              of a layer, and the backward of one with what ZeRO-3 gathers and reduces. From above: see tests/test_scale.py
"""

from dataclasses import dataclass, replace

from benchmarks.point import PEAK_BF16
from benchmarks.shapes import kv_dim, matrix_weights, model_config, query_dim, step_flops

from .points import ScaleSpec

START_S = 45.0
_SHARE_OF_PEAK = 0.45
_PEAK = PEAK_BF16["NVIDIA H100 80GB HBM3"]
LOCK_S = 0.7  # of a GiB and rank; from first and later steps in benchmarks/results/shared_2xh200_2026-11-23.json
LOCKED_MEANWHILE = 30  # GiB a rank
TO_SPARE = 1.15  # of the host's memory
_GIB = 2**30
_ROTARY_AND_INDEX = 40  # bytes a token, beside the rotary tables: ids, labels and positions
_BUCKET = 5e8  # elements: DeepSpeed's reduce_bucket_size, twice
_LIVE = 1e9  # elements: its stage3_max_live_parameters


@dataclass(frozen=True)
class Estimate:
    """Seconds, with the launch's where the point begins one; GiB of memory on the host, and on every GPU."""

    seconds: float
    host_gib: float
    gpu_gib: float

    def row(self) -> dict:
        return {f"estimated_{name}": round(value, 1) for name, value in vars(self).items()}


def settled(spec: ScaleSpec, host_gib: float, gpu_gib: float) -> ScaleSpec:
    """
    The point with its chunk size, with attention saved if the host has the memory, and with two chunks for its warm-up.

    Raises:
        ValueError: if it does not fit the host with 15% to spare, or the GPU.
    """
    chosen = {"chunk_size": spec.fpdt.get("chunk_size") or _auto_chunk(spec)} | spec.fpdt
    options = [chosen["save_attention"]] if "save_attention" in chosen else [True, False]
    fits = [saved for saved in options if host_bytes(spec, saved) * TO_SPARE <= host_gib * _GIB]
    if not fits:
        needed = host_bytes(spec, options[-1]) * TO_SPARE / _GIB
        raise ValueError(
            f"{_named(spec)}: {needed:.0f} GiB of host memory are needed, 15% to spare included, and there are {host_gib:.0f} "
            "(--host-gib). Use fewer --layers, shorter sequences, or leave save_attention out of --fpdt."
        )
    chunk = min(chosen["chunk_size"], spec.seq_len)
    spec = replace(spec, fpdt=chosen | {"save_attention": fits[0]}, warm_tokens=min(2 * chunk, spec.seq_len))
    needed = gpu_bytes(spec) / _GIB
    if needed > gpu_gib:
        raise ValueError(
            f"{_named(spec)}: up to {needed:.0f} GiB a GPU are needed, and there are {gpu_gib:.0f} (--gpu-gib). Use fewer "
            "--layers, more GPUs, or shorter sequences."
        )
    return spec


def estimate(spec: ScaleSpec) -> Estimate:
    """Of a settled point."""
    host = host_bytes(spec, spec.fpdt["save_attention"]) / _GIB
    locking = LOCK_S * max(host / spec.gpus - LOCKED_MEANWHILE, 0)
    steps = sum(_seconds(spec, tokens) for tokens in spec.lengths)
    start = START_S if spec.warm_tokens else 0.0  # else in the launch of another
    return Estimate(start + locking + steps, host, gpu_bytes(spec) / _GIB)


def host_bytes(spec: ScaleSpec, save_attention: bool, layers: int | None = None) -> float:
    """
    On the host, of all its GPUs: what waits for the backward of `layers` layers (None: those that run).

    With K and V streamed their fp32 gradients wait there too, when the final norm's input has gone.
    """
    config = model_config(spec.shape, 1)
    layer = 2 * config.hidden_size + 4 * kv_dim(config)
    layer += 2 * query_dim(config) + 4 * config.num_attention_heads if save_attention else 0
    last = max(2 * config.hidden_size, 8 * kv_dim(config) if spec.fpdt.get("kv") == "streamed" else 0)
    return spec.dp * spec.seq_len * ((spec.layers if layers is None else layers) * layer + last)


def host_bytes_of_rank(spec: ScaleSpec) -> int:
    """Of a settled point, on each of its GPUs."""
    return int(host_bytes(spec, spec.fpdt["save_attention"]) / spec.gpus)


def gpu_bytes(spec: ScaleSpec, bytes_a_weight: int = 16) -> float:
    """On one GPU, at the most."""
    config = model_config(spec.shape, spec.layers)
    hidden, key_value, tokens = 2 * config.hidden_size, 4 * kv_dim(config), spec.seq_len / spec.sp
    head = config.vocab_size * config.hidden_size
    layer = (matrix_weights(config) - head) / spec.layers
    weights = matrix_weights(config) + (0 if config.tie_word_embeddings else head)
    beside = 2 * 2 * (query_dim(config) // config.num_attention_heads) + _ROTARY_AND_INDEX
    gathered = 2 * min(weights, _LIVE)
    chunk, wide = min(spec.fpdt["chunk_size"], spec.seq_len) / spec.sp, 2 * config.intermediate_size
    streamed = spec.fpdt.get("kv") == "streamed"
    forward = tokens * (3 * hidden + (0 if streamed else 2 * key_value)) + chunk * (6 * hidden + 4 * wide) + gathered
    backward = tokens * (hidden + (0 if streamed else 4 * key_value)) + chunk * (16 * hidden + 8 * wide) + gathered
    backward += 6 * max(head, layer) + 2 * 2 * _BUCKET  # a weight's gradient and its fp32 sum; buckets
    return bytes_a_weight * weights / spec.gpus + tokens * beside + max(forward, backward)


def whole_model(spec: ScaleSpec, step_s: float) -> dict:
    """
    What a step of the real depth takes, by the step that ran: with operations as fast, and at most, with embedding, loss and
    all else counted `depth / layers` times. Host memory is that of this setting.
    """
    flops = [step_flops(model_config(spec.shape, layers), spec.seq_len) for layers in (spec.depth, spec.layers)]
    host = host_bytes(spec, spec.fpdt["save_attention"], spec.depth) / _GIB
    row = {"step_s_by_operations": step_s * flops[0] / flops[1], "step_s_at_most": step_s * spec.depth / spec.layers}
    return {"layers": spec.depth} | row | {"host_gib": host}


def _named(spec: ScaleSpec) -> str:
    return f"--shape {spec.shape} --layers {spec.layers} --seq-len {spec.seq_len} on {spec.dp} x {spec.sp} GPUs"


def _auto_chunk(spec: ScaleSpec) -> int:
    from hf_fpdt.sequence_layout import SequenceLayout  # takes seconds

    kind = {"setting": "auto", "batch_size": 1, "device_type": spec.device, "sp_size": spec.sp}
    return SequenceLayout.of(spec.seq_len, **kind).chunk_size


def _seconds(spec: ScaleSpec, tokens: int) -> float:
    config = model_config(spec.shape, spec.layers)
    again = 0 if spec.fpdt["save_attention"] else 2 * spec.layers * tokens**2 * query_dim(config)
    return spec.dp * (step_flops(config, tokens) + again) / (spec.gpus * _PEAK * _SHARE_OF_PEAK)
