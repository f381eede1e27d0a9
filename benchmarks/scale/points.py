"""What is run on many GPUs of one host: one point, and named sets of points that fit a call of nine minutes."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace

from benchmarks.shapes import DEPTHS, GPT_SHAPES, SHAPES

CONTENDERS = ("fpdt", "fpdt+liger")
SETS = ("trial", "main", "deep", "scaling", "reach", "mesh")
_K, _M = 1 << 10, 1 << 20  # tokens
_LLAMA, _QWEN = "llama-3.1-8b", "qwen3-8b"


@dataclass(frozen=True, kw_only=True)
class ScaleSpec:
    """
    A short warm-up step, then `steps` long ones; after another point in the same launch (`launches_of`) only these.

    Args:
        layers: of the model that runs, which has otherwise the named shape.
        seq_len: tokens of the whole sequence; each group of `sp` GPUs has one of its own.
        sp: GPUs that share a sequence.
        trace: tokens of one more step, profiled; 0: none.
        fpdt, zero: fields of `FPDTConfig` and of DeepSpeed's `zero_optimization`.
        warm_tokens: of the warm-up step; 0: there is none.

    Raises:
        ValueError: for what cannot be run, naming the option.
    """

    gpus: int
    seq_len: int
    layers: int
    shape: str = _LLAMA
    sp: int = 0
    steps: int = 1
    trace: int = 0
    contender: str = "fpdt+liger"
    fpdt: dict = field(default_factory=dict)
    zero: dict = field(default_factory=dict)
    warm_tokens: int = 0
    device: str = "cuda"

    def __post_init__(self):
        object.__setattr__(self, "sp", self.sp or self.gpus)
        if self.contender not in CONTENDERS:
            raise ValueError(f"--contender {self.contender}: one of {', '.join(CONTENDERS)} is needed.")
        if self.contender != "fpdt" and self.device == "cpu":
            raise ValueError(f"--contender {self.contender} --device cpu: Liger's kernels run on GPUs; take fpdt.")
        if self.shape not in SHAPES or (self.shape in GPT_SHAPES and self.contender != "fpdt"):
            raise ValueError(
                f"--shape {self.shape} with --contender {self.contender}: one of {', '.join(SHAPES)} is needed, and for GPTs "
                "the contender fpdt."
            )
        if min(self.layers, self.gpus, self.steps) < 1 or self.seq_len < 2 or self.trace < 0:
            raise ValueError(f"got {asdict(self)}: one layer, one GPU, one step and two tokens are the least.")
        heads = SHAPES[self.shape]["num_attention_heads"]
        if self.sp < 1 or self.gpus % self.sp or heads % self.sp or (self.sp == 1 and self.gpus > 1):
            raise ValueError(
                f"--sp {self.sp} with --gpus {self.gpus} and {heads} heads: a number that divides both is needed, on several "
                "GPUs at least 2."
            )
        if any(tokens % self.sp for tokens in (self.seq_len, self.trace)):
            raise ValueError(f"--seq-len {self.seq_len}, --trace {self.trace}: --sp {self.sp} has to divide them.")

    @property
    def dp(self) -> int:
        """Groups of GPUs, each with a sequence of its own."""
        return self.gpus // self.sp

    @property
    def depth(self) -> int:
        """Layers of the real model; of shapes that have none, those that run."""
        return DEPTHS.get(self.shape, self.layers)

    @property
    def lengths(self) -> list[int]:
        """Tokens of every step, in order."""
        return [one for one in (self.warm_tokens, *[self.seq_len] * self.steps, self.trace) if one]

    def goes_on_after(self, before: "ScaleSpec") -> bool:
        """Whether it can run in the launch of that point: the same model, groups and settings, and a sequence no shorter."""
        own = {name: getattr(before, name) for name in ("seq_len", "steps", "trace", "warm_tokens")}
        return replace(self, **own) == before and self.seq_len >= before.seq_len

    def row(self) -> dict:
        """The part of a row that is known before the point runs."""
        names = ("contender", "shape", "gpus", "sp", "dp", "seq_len", "layers", "depth", "warm_tokens", "fpdt")
        return {name: getattr(self, name) for name in names} | ({"zero": self.zero} if self.zero else {})


def launches_of(specs: Iterable[ScaleSpec]) -> list[list[ScaleSpec]]:
    """Settled points in order, those that go on after each other in one launch; its first alone has a warm-up."""
    found: list[list[ScaleSpec]] = []
    for spec in specs:
        if found and spec.goes_on_after(found[-1][-1]):
            found[-1].append(replace(spec, warm_tokens=0))
        else:
            found.append([spec])
    return found


def points_of(name: str, gpus: int) -> list[ScaleSpec]:
    """
    The points of a set, in the order of their value.

    `trial`    that everything works: both models, a trace, groups with sequences of their own.
    `main`     the whole Llama-3.1-8B at 256K tokens, and fewer layers of both models at 256K to 1M.
    `deep`     on 8 GPUs the whole Qwen3-8B at 1M tokens; on 4 a third of it, and the whole Llama-3.1-8B at 512K.
    `scaling`  four layers on 1, 2, 4 (and 8) GPUs, at 256K tokens and at 128K a GPU.
    `reach`    2M and 4M tokens.
    `mesh`     two groups that have sequences of their own, and one group.

    Raises:
        ValueError: for a set that this number of GPUs has not.
    """
    found = _SETS.get((name, gpus))
    if found is None:
        known = [f"{one} on {count}" for one, count in _SETS]
        raise ValueError(f"--set {name} --gpus {gpus}: there are {', '.join(known)} GPUs.")
    return [ScaleSpec(**({"gpus": gpus} | one)) for one in found]


def _point(shape: str, seq_len: int, layers: int, **more) -> dict:
    return {"shape": shape, "seq_len": seq_len, "layers": layers} | more


def _lengths(shape: str, layers: int) -> list[dict]:
    return [_point(shape, 256 * _K, layers, steps=2, trace=256 * _K), *(_point(shape, n * _K, layers) for n in (512, 1024))]


def _trial(gpus: int) -> list[dict]:
    return [
        _point(_LLAMA, 128 * _K, 2, trace=128 * _K),
        _point(_QWEN, 128 * _K, 2, sp=max(gpus // 2, 2)),
    ]


def _scaling(most: int) -> list[dict]:
    counts = [count for count in (1, 2, 4, 8) if count <= most]
    found = []
    for count in reversed(counts):
        lengths = sorted({256 * _K, 128 * _K * count})
        steps = {length: 2 if length <= 512 * _K else 1 for length in lengths}
        traces = {256 * _K: 256 * _K if count > 1 else 0}
        found += [_point(_LLAMA, one, 4, gpus=count, steps=steps[one], trace=traces.get(one, 0)) for one in lengths]
    return found


_SETS = {
    ("trial", 2): _trial(2),
    ("trial", 4): _trial(4),
    ("trial", 8): _trial(8),
    ("main", 4): [
        _point(_LLAMA, 256 * _K, 32),
        *_lengths(_LLAMA, 4),
        *_lengths(_QWEN, 4),
    ],
    ("main", 8): [
        _point(_LLAMA, 256 * _K, 32),
        _point(_LLAMA, 512 * _K, 32),
        *_lengths(_LLAMA, 8),
        *_lengths(_QWEN, 8),
    ],
    ("deep", 4): [_point(_QWEN, _M, 12), _point(_LLAMA, 512 * _K, 32)],
    ("deep", 8): [_point(_QWEN, _M, 36)],
    ("scaling", 4): _scaling(4),
    ("scaling", 8): _scaling(8),
    ("reach", 4): [_point(_LLAMA, 2 * _M, 1), _point(_LLAMA, 4 * _M, 1)],
    ("reach", 8): [_point(_LLAMA, 2 * _M, 2), _point(_LLAMA, 4 * _M, 2)],
    ("mesh", 4): [_point(_LLAMA, 256 * _K, 8, sp=2, steps=2), _point(_LLAMA, 256 * _K, 8, steps=2)],
    ("mesh", 8): [_point(_LLAMA, 256 * _K, 8, sp=4, steps=2), _point(_LLAMA, 256 * _K, 8, steps=2)],
}
