"""Model shapes by name, and the operations a training step needs."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import GPTNeoXConfig, LlamaConfig, MistralConfig, Qwen3Config

LLAMA_SHAPES = {
    "llama-3.1-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
    "llama-3.2-3b": {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "llama-3.2-1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "tiny": {  # for trying the benchmarks on a CPU
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 512,
        "tie_word_embeddings": False,
    },
}
# The GPTs of the FPDT paper (arXiv 2408.16978, trained with Megatron-DeepSpeed): as many heads of K and V as of Q, a
# feed-forward of 4 * hidden without a gate, GPT-2's vocabulary padded to a multiple of 128, tied. In transformers: GPT-NeoX.
GPT_SHAPES = {
    "gpt-2.7b": {"hidden_size": 2560, "num_attention_heads": 32, "vocab_size": 50304},
    "gpt-6.7b": {"hidden_size": 4096, "num_attention_heads": 32, "vocab_size": 50304},
    "gpt-tiny": {"hidden_size": 64, "num_attention_heads": 4, "vocab_size": 512},
}
QWEN_SHAPES = {  # norms of Q and K in every head
    "qwen3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": False,
    },
    "qwen-tiny": LLAMA_SHAPES["tiny"],
}
SHAPES = LLAMA_SHAPES | GPT_SHAPES | QWEN_SHAPES
DEPTHS = {  # of the real models
    "llama-3.1-8b": 32,
    "llama-3.2-3b": 28,
    "llama-3.2-1b": 16,
    "gpt-2.7b": 32,
    "gpt-6.7b": 32,
    "qwen3-8b": 36,
}


def model_config(shape: str, num_layers: int, window: int = 0) -> "LlamaConfig | MistralConfig | GPTNeoXConfig | Qwen3Config":
    """
    The configuration for any name in `SHAPES`, with `num_layers` layers.

    Raises:
        ValueError: for a window in GPT and Qwen shapes, which have none.
    """
    if shape in LLAMA_SHAPES:
        return llama_config(shape, num_layers, window)
    if window:
        raise ValueError(f"--window {window} with --shape {shape}: it has no sliding window; --window 0 is needed.")
    return gpt_config(shape, num_layers) if shape in GPT_SHAPES else qwen_config(shape, num_layers)


def gpt_config(shape: str, num_layers: int) -> "GPTNeoXConfig":
    """
    A GPT-NeoX with the layer shapes of the named GPT, without a cache: feed-forward after attention (not beside it), rotary
    positions over whole heads.
    """
    from transformers import GPTNeoXConfig  # takes seconds, and the names are needed without

    settings = GPT_SHAPES[shape]
    return GPTNeoXConfig(
        **settings,
        intermediate_size=4 * settings["hidden_size"],
        num_hidden_layers=num_layers,
        use_parallel_residual=False,
        tie_word_embeddings=True,
        max_position_embeddings=1 << 23,
        rope_parameters={"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 1.0},
        use_cache=False,
    )


def llama_config(shape: str, num_layers: int, window: int = 0) -> "LlamaConfig | MistralConfig":
    """
    A Llama with the layer shapes of the named model and `num_layers` layers, without a cache; with a sliding window in all of
    them a Mistral, which is the same otherwise.
    """
    from transformers import LlamaConfig, MistralConfig  # takes seconds, and the names are needed without

    settings = LLAMA_SHAPES[shape] | _common(num_layers, rope_theta=5e5)
    return MistralConfig(**settings, sliding_window=window) if window else LlamaConfig(**settings)


def qwen_config(shape: str, num_layers: int) -> "Qwen3Config":
    """A Qwen3 with the layer shapes of the named model and `num_layers` layers, without a cache."""
    from transformers import Qwen3Config  # takes seconds, and the names are needed without

    return Qwen3Config(**QWEN_SHAPES[shape], **_common(num_layers, rope_theta=1e6))


def _common(num_layers: int, rope_theta: float) -> dict:
    return {
        "num_hidden_layers": num_layers,
        "max_position_embeddings": 1 << 23,
        "rope_parameters": {"rope_theta": rope_theta, "rope_type": "default"},
        "use_cache": False,
    }


def step_flops(
    config: "LlamaConfig | MistralConfig | GPTNeoXConfig | Qwen3Config",
    seq_len: int,
    frozen: bool = False,
    documents: int = 1,
    window: int = 0,
) -> float:
    """
    Operations of one forward and backward over a sequence: 6 for each matrix weight and token (2 for the output, 2 for the
    gradient of the input, 2 for that of the weight), and 3 * 2 * seq_len^2 * heads * head_dim a layer for causal attention
    (half of the full square). Recomputation does not count, biases and norms do not, and the lookup of an embedding, tied or
    not, is no operation.

    Args:
        frozen: the weights of the model get no gradient, which leaves 4; the adapters that are trained instead are not counted.
        documents: so many of equal length, that do not see each other.
        window: tokens that a query sees at most; 0: all before it. Not with several documents.
    """
    pairs = seq_len**2 / documents / 2 if not window else window * (seq_len - min(window, seq_len) / 2)
    attention = config.num_hidden_layers * 3 * 4 * pairs * query_dim(config)
    return (4 if frozen else 6) * matrix_weights(config) * seq_len + attention


def paper_flops(config: "LlamaConfig | MistralConfig | GPTNeoXConfig", seq_len: int) -> float:
    """
    The same step as Megatron-DeepSpeed counts it, which the FPDT paper's code is part of (`throughput_calculator` in
    megatron/utils.py): attention over the full square, masked half included, and with activation checkpointing a second
    forward, so 8 for a weight and token and 4 * 4 * seq_len^2 * heads * head_dim a layer. From 1.33 to 2.67 times `step_flops`,
    the longer the sequence the more. That it loses K and V's products where they have fewer heads (an integer division) is not
    repeated. That the paper's own figures are counted so is inferred from its code.
    """
    attention = config.num_hidden_layers * 4 * 4 * seq_len**2 * query_dim(config)
    return 8 * matrix_weights(config) * seq_len + attention


def head_dim(config) -> int:
    """Of attention, for configurations with and without a field for it."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def query_dim(config) -> int:
    """All heads of Q together."""
    return config.num_attention_heads * head_dim(config)


def kv_dim(config) -> int:
    """All heads of K together, or of V."""
    return getattr(config, "num_key_value_heads", config.num_attention_heads) * head_dim(config)


def matrix_weights(config) -> int:
    """Of the layers and the output layer."""
    matrices = 2 if config.model_type == "gpt_neox" else 3  # with a gate
    layer = config.hidden_size * (2 * query_dim(config) + 2 * kv_dim(config) + matrices * config.intermediate_size)
    return config.num_hidden_layers * layer + config.hidden_size * config.vocab_size
