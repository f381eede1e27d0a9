"""Device memory that the backward of each attention kernel takes at its peak."""

from dataclasses import dataclass

from .attention_kernels import NaiveKernel


@dataclass(frozen=True)
class AttentionProblem:
    """The sizes of one call of a kernel; `itemsize` is that of the inputs, in bytes."""

    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    itemsize: int

    @property
    def query_elements(self) -> int:
        return self.batch * self.queries * self.heads * self.head_dim

    def key_value_elements(self, heads: int) -> int:
        """Of keys and values together, with that many heads."""
        return self.batch * self.keys * heads * (self.head_dim + self.value_dim)


def backward_bytes(kernel: str, problem: AttentionProblem) -> int:
    """Bytes that the kernel of this name takes in its backward: the three gradients and what it works in."""
    gradients = problem.itemsize * (problem.query_elements + problem.key_value_elements(problem.kv_heads))
    grouped = problem.heads > problem.kv_heads
    repeated = problem.key_value_elements(problem.heads) if grouped else 0
    if kernel == "torch_cpu":
        return gradients + 2 * problem.itemsize * repeated * (problem.itemsize == 2)
    if kernel == "naive":
        scores = min(NaiveKernel.max_scores, problem.batch * problem.heads * problem.queries * problem.keys)
        return gradients + 4 * (4 * scores + 3 * problem.key_value_elements(problem.heads))
    if kernel == "flash_attention_4":  # sums grad_query in fp32, and with grouped heads the others too; two statistics a row
        sums = problem.query_elements + 2 * problem.batch * problem.queries * problem.heads
        return gradients + 4 * (sums + (problem.key_value_elements(problem.kv_heads) if grouped else 0))
    # The others sum grad_query in fp32, write grad_key and grad_value of every query head, and add up the groups.
    keys = 2 * repeated if kernel == "torch_efficient" else repeated
    return gradients + 4 * problem.query_elements + problem.itemsize * keys
