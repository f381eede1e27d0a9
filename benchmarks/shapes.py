"""Model shapes by name, and the operations a training step needs."""

from transformers import LlamaConfig

SHAPES = {
    "llama-3.1-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "llama-3.2-3b": {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
}


def llama_config(shape: str, num_layers: int) -> LlamaConfig:
    """A Llama with the layer shapes of the named model and `num_layers` layers, untied, without a cache."""
    return LlamaConfig(
        **SHAPES[shape],
        head_dim=128,
        num_hidden_layers=num_layers,
        max_position_embeddings=1 << 23,
        rope_parameters={"rope_theta": 5e5, "rope_type": "default"},
        tie_word_embeddings=False,
        use_cache=False,
    )


def step_flops(config: LlamaConfig, seq_len: int) -> float:
    """
    Operations of one forward and backward over a sequence, all weights trained: 6 for each matrix weight and token, and
    3 * 2 * seq_len^2 * heads * head_dim a layer for causal attention (half of the full square). Recomputation does not count.
    """
    query_dim = config.num_attention_heads * config.head_dim
    kv_dim = config.num_key_value_heads * config.head_dim
    layer = config.hidden_size * (2 * query_dim + 2 * kv_dim + 3 * config.intermediate_size)
    dense = config.num_hidden_layers * layer + config.hidden_size * config.vocab_size
    attention = config.num_hidden_layers * 3 * 2 * seq_len**2 * query_dim
    return 6 * dense * seq_len + attention
