"""What a decoder of the Llama family is made of, in numbers, as a `config.json` gives them.

A config that asks for something `model.py` does not compute is refused with the reason: a model that runs and computes
something slightly different is worse than none.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MODEL_TYPES = ("llama", "mistral", "qwen2")


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """How Llama 3.1 and later stretch the slow rotations to texts longer than they were first trained on."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def scale(self, frequency: float) -> float:
        """Slow a frequency down by `factor` where it turns rarely in the old context, keep it where it turns often.

        turns = original context · frequency / 2π; from `low_freq_factor` to `high_freq_factor` turns the two are mixed.
        """
        turns = self.original_max_position_embeddings * frequency / (2 * math.pi)
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = min(max(kept, 0.0), 1.0)  # share of the unchanged frequency
        return kept * frequency + (1 - kept) * frequency / self.factor


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and switches of one decoder.

    >>> ModelConfig(vocab_size=10, hidden_size=8, intermediate_size=16, n_layers=1, n_heads=2, n_kv_heads=1).head_dim
    4
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int = 0  # 0: hidden_size / n_heads
    max_seq_len: int = 2048  # tokens
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: Llama3Scaling | None = None
    tie_word_embeddings: bool = False
    qkv_bias: bool = False  # Qwen2 adds a bias to q, k and v

    def __post_init__(self) -> None:
        if self.head_dim == 0:
            object.__setattr__(self, "head_dim", self.hidden_size // self.n_heads)
        problems = []
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "n_layers",
            "n_heads",
            "n_kv_heads",
            "max_seq_len",
        ):
            if getattr(self, name) < 1:
                problems.append(f"{name} is {getattr(self, name)}, it must be at least 1")
        if self.n_kv_heads > 0 and self.n_heads % self.n_kv_heads:
            problems.append(f"{self.n_heads} query heads cannot share {self.n_kv_heads} key heads evenly")
        if self.head_dim % 2:
            problems.append(f"head_dim is {self.head_dim}, rotary positions need an even one")
        if problems:
            raise ValueError("not a possible model: " + "; ".join(problems))

    def rope_frequencies(self) -> list[float]:
        """Radians per position for each pair of features of a head, fastest first.

        frequency[i] = theta^(−2i / head_dim)                    [RoPE] section 3.2.2
        """
        frequencies = [self.rope_theta ** (-i / self.head_dim) for i in range(0, self.head_dim, 2)]
        if self.rope_scaling is None:
            return frequencies
        return [self.rope_scaling.scale(frequency) for frequency in frequencies]

    @staticmethod
    def from_hf(config: Mapping[str, Any]) -> "ModelConfig":
        """Read the dictionary of a Hugging Face `config.json`.

        Raises:
            ValueError: if keys are missing, or ask for what `model.py` does not compute (all of them at once).
        """
        problems = _unsupported(config)
        sizes = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "max_position_embeddings",
        )
        problems += [f"{name} is missing" for name in sizes if name not in config]
        if problems:
            raise ValueError("cannot build this model:\n  " + "\n  ".join(problems))
        rope = _rope(config)
        scaling = None
        if _rope_type(rope) == "llama3":
            names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
            scaling = Llama3Scaling(**{name: rope[name] for name in names})
        return ModelConfig(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            n_layers=config["num_hidden_layers"],
            n_heads=config["num_attention_heads"],
            n_kv_heads=config.get("num_key_value_heads") or config["num_attention_heads"],
            head_dim=config.get("head_dim") or 0,
            max_seq_len=config["max_position_embeddings"],
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            rope_theta=rope.get("rope_theta", 10_000.0),
            rope_scaling=scaling,
            tie_word_embeddings=config.get("tie_word_embeddings", False),
            qkv_bias=config.get("model_type") == "qwen2",
        )


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary settings: one dictionary since transformers 5, spread over two keys before."""
    rope = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
    if "rope_theta" in config:
        rope.setdefault("rope_theta", config["rope_theta"])
    return rope


def _rope_type(rope: Mapping[str, Any]) -> str:
    return rope.get("rope_type") or rope.get("type") or "default"


def _unsupported(config: Mapping[str, Any]) -> list[str]:
    """One line for each thing the config asks for and `model.py` does not compute."""
    problems = []
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        problems.append(f"model_type is {model_type!r}; those we know are {list(MODEL_TYPES)}")
    if config.get("hidden_act", "silu") != "silu":
        problems.append(f"hidden_act is {config['hidden_act']!r}; the MLP here is SwiGLU, with silu")
    if model_type != "qwen2" and config.get("attention_bias"):
        problems.append("attention_bias is true; only Qwen2's biases on q, k and v are implemented")
    if config.get("mlp_bias"):
        problems.append("mlp_bias is true; the MLP here has no biases")
    if config.get("quantization_config"):
        problems.append(
            "quantization_config is set; load the original weights and quantize them here, "
            "or bitsandbytes' 4 bits as they are, with minilora.train.bnb_folder"
        )
    if config.get("partial_rotary_factor", 1.0) != 1.0:
        problems.append("partial_rotary_factor is not 1; here every feature of a head is rotated")
    rope_type = _rope_type(_rope(config))
    if rope_type not in ("default", "llama3"):
        problems.append(f"the rope type is {rope_type!r}; those we know are ['default', 'llama3']")
    window = _active_window(config)
    if window is not None:
        problems.append(
            f"sliding_window is {window}; attention here is always full. Up to {window} tokens the two are the same: "
            f'set "sliding_window": null and "max_position_embeddings": {window} to use the model that far'
        )
    return problems


def _active_window(config: Mapping[str, Any]) -> int | None:
    """Length of the sliding window in tokens, where one is used and shorter than the context."""
    model_type = config.get("model_type")
    window = config.get("sliding_window", 4096 if model_type == "mistral" else None)  # Mistral's default when left out
    if model_type == "qwen2" and not config.get("use_sliding_window", False):
        return None
    if window is None or window >= config["max_position_embeddings"]:
        return None
    return window
