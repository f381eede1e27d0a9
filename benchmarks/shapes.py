"""Model shapes by name, and the operations a training step needs."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import LlamaConfig, MistralConfig

SHAPES = {
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


def llama_config(shape: str, num_layers: int, window: int = 0) -> "LlamaConfig | MistralConfig":
    """
    A Llama with the layer shapes of the named model and `num_layers` layers, without a cache; with a sliding window in all of
    them a Mistral, which is the same otherwise.
    """
    from transformers import LlamaConfig, MistralConfig  # takes seconds, and the names are needed without

    settings = SHAPES[shape] | {
        "num_hidden_layers": num_layers,
        "max_position_embeddings": 1 << 23,
        "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"},
        "use_cache": False,
    }
    return MistralConfig(**settings, sliding_window=window) if window else LlamaConfig(**settings)


def step_flops(
    config: "LlamaConfig | MistralConfig", seq_len: int, frozen: bool = False, documents: int = 1, window: int = 0
) -> float:
    """
    Operations of one forward and backward over a sequence: 6 for each matrix weight and token (2 for the output, 2 for the
    gradient of the input, 2 for that of the weight), and 3 * 2 * seq_len^2 * heads * head_dim a layer for causal attention
    (half of the full square). Recomputation does not count, and the lookup of an embedding, tied or not, is no operation.

    Args:
        frozen: the weights of the model get no gradient, which leaves 4; the adapters that are trained instead are not counted.
        documents: so many of equal length, that do not see each other.
        window: tokens that a query sees at most; 0: all before it. Not with several documents.
    """
    query_dim = config.num_attention_heads * config.head_dim
    kv_dim = config.num_key_value_heads * config.head_dim
    layer = config.hidden_size * (2 * query_dim + 2 * kv_dim + 3 * config.intermediate_size)
    dense = config.num_hidden_layers * layer + config.hidden_size * config.vocab_size
    pairs = seq_len**2 / documents / 2 if not window else window * (seq_len - min(window, seq_len) / 2)
    attention = config.num_hidden_layers * 3 * 4 * pairs * query_dim
    return (4 if frozen else 6) * dense * seq_len + attention
