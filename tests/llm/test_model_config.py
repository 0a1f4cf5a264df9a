"""What from_hf reads, and what it refuses."""

import pytest

from minilora.llm import ModelConfig

LLAMA = {
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}


def test_the_older_spelling_of_rotary_settings_means_the_same_as_the_newer():
    settings = {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
        "rope_type": "llama3",
    }
    older = LLAMA | {"rope_theta": 500_000.0, "rope_scaling": settings}
    newer = LLAMA | {"rope_parameters": settings | {"rope_theta": 500_000.0}}

    assert ModelConfig.from_hf(older) == ModelConfig.from_hf(newer)
    assert ModelConfig.from_hf(older).rope_theta == 500_000.0


def test_every_head_has_its_own_keys_where_the_config_names_no_groups():
    assert ModelConfig.from_hf(LLAMA).n_kv_heads == 4


def test_the_width_of_a_head_may_differ_from_its_share_of_the_stream():
    assert ModelConfig.from_hf(LLAMA | {"head_dim": 32}).head_dim == 32


def test_only_qwen2_has_biases():
    assert not ModelConfig.from_hf(LLAMA).qkv_bias
    assert ModelConfig.from_hf(LLAMA | {"model_type": "qwen2"}).qkv_bias


def test_a_window_as_long_as_the_context_is_no_window():
    ModelConfig.from_hf(LLAMA | {"model_type": "mistral", "sliding_window": 512})
    ModelConfig.from_hf(LLAMA | {"model_type": "mistral", "sliding_window": None})
    ModelConfig.from_hf(LLAMA | {"model_type": "qwen2", "sliding_window": 16, "use_sliding_window": False})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model_type": "gemma2"}, r"model_type is 'gemma2'; those we know are \['llama', 'mistral', 'qwen2'\]"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; the MLP here is SwiGLU, with silu"),
        ({"attention_bias": True}, "attention_bias is true; only Qwen2's biases"),
        ({"mlp_bias": True}, "mlp_bias is true"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, r"the rope type is 'yarn'; those we know are"),
        ({"rope_parameters": {"rope_type": "linear"}}, "the rope type is 'linear'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is not 1"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is set; load the original weights"),
        ({"model_type": "mistral", "sliding_window": 128}, 'sliding_window is 128.*set "sliding_window": null'),
        ({"model_type": "mistral", "max_position_embeddings": 32768}, "sliding_window is 4096"),
        ({"model_type": "qwen2", "sliding_window": 128, "use_sliding_window": True}, "sliding_window is 128"),
    ],
)
def test_what_we_do_not_compute_is_refused_with_the_reason(change, reason):
    with pytest.raises(ValueError, match=reason):
        ModelConfig.from_hf(LLAMA | change)


def test_all_reasons_come_at_once():
    with pytest.raises(ValueError) as error:
        ModelConfig.from_hf({"model_type": "llama", "mlp_bias": True, "hidden_act": "relu"})

    for part in ("mlp_bias", "hidden_act", "vocab_size is missing", "max_position_embeddings is missing"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"n_heads": 6, "n_kv_heads": 4}, "6 query heads cannot share 4 key heads evenly"),
        ({"head_dim": 7}, "head_dim is 7, rotary positions need an even one"),
        ({"n_layers": 0}, "n_layers is 0, it must be at least 1"),
    ],
)
def test_impossible_sizes_are_refused(change, reason):
    sizes = {"vocab_size": 10, "hidden_size": 48, "intermediate_size": 8, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2}

    with pytest.raises(ValueError, match=reason):
        ModelConfig(**(sizes | change))
