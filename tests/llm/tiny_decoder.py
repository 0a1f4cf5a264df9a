"""A decoder small enough to look at."""

from minilora.llm import ModelConfig


def tiny_config(**changes) -> ModelConfig:
    sizes = {"vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "n_layers": 3, "n_heads": 6, "n_kv_heads": 2}
    return ModelConfig(**(sizes | changes))
