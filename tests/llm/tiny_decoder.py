"""A decoder small enough to look at, and its GGUF file."""

from pathlib import Path

import gguf
import numpy as np

from minilora.llm import Decoder, ModelConfig


def tiny_config(**changes) -> ModelConfig:
    sizes = {"vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "n_layers": 3, "n_heads": 6, "n_kv_heads": 2}
    return ModelConfig(**(sizes | changes))


def permuted(w: np.ndarray, n_heads: int) -> np.ndarray:
    """What llama.cpp's convert_hf_to_gguf.py does to q_proj and k_proj."""
    return w.reshape(n_heads, 2, w.shape[0] // n_heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def write_gguf(
    path: Path, model: Decoder, architecture: str = "llama", rope_factors: list[float] | None = None
) -> None:
    """A GGUF file of a tiny model, with llama.cpp's own library for names and bytes."""
    config, writer = model.config, gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.n_layers)
    writer.add_context_length(config.max_seq_len)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["a", "b", "ab", *(f"t{number}" for number in range(3, config.vocab_size))])
    writer.add_token_types([1] * config.vocab_size)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(3)
    kind = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2}[architecture]
    names = gguf.get_tensor_name_map(kind, config.n_layers)
    for name, tensor in model.state_dict().items():
        w = tensor.numpy()
        if architecture == "llama" and "q_proj" in name:
            w = permuted(w, config.n_heads)
        if architecture == "llama" and "k_proj" in name:
            w = permuted(w, config.n_kv_heads)
        if name != "lm_head.weight" or not config.tie_word_embeddings:
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), np.ascontiguousarray(w))
    if rope_factors:
        writer.add_tensor("rope_freqs.weight", np.array(rope_factors, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
