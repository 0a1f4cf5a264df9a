"""Rows of numbers, config.json files, and the names that targets may have."""

import ast
import json
import sys
from pathlib import Path

import pytest

from minilora.llm import architectures
from minilora.llm.architectures import (
    ARCHITECTURES,
    Linear,
    find_architecture,
    layer_linears,
    linears,
    match_targets,
    parameter_shapes,
    read_config,
)

COUNTING = (
    "architectures",
    "sizes",
    "setup",
    "method_options",
    "activations",
    "training_memory",
    "memory_report",
    "size_report",
    "size_command",
)
LLAMA_CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 28,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}
GPT2_CONFIG = {
    "model_type": "gpt2",
    "n_layer": 12,
    "n_embd": 768,
    "n_head": 12,
    "n_positions": 1024,
    "vocab_size": 50257,
}


def written(folder: Path, config: object) -> Path:
    path = folder / "config.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return path


@pytest.mark.parametrize("name", COUNTING)
def test_nothing_but_the_standard_library_is_imported(name):
    source = Path(architectures.__file__).with_name(f"{name}.py").read_text()
    imported = {
        module
        for node in ast.walk(ast.parse(source))
        for module in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    foreign = {module for module in imported if module.split(".")[0] not in sys.stdlib_module_names}
    assert foreign <= {f"minilora.llm.{name}" for name in COUNTING}


# --- names --------------------------------------------------------------------------------------------------------


def test_a_name_may_be_written_in_capitals():
    assert find_architecture("Llama-2-7B") is ARCHITECTURES["llama-2-7b"]


@pytest.mark.parametrize(
    ("name", "near"),
    [("lama-2-7b", "llama-2-7b"), ("gpt3-175b", "gpt-3-175b"), ("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m")],
)
def test_an_unknown_name_is_answered_with_near_ones(name, near):
    with pytest.raises(ValueError, match=rf"no architecture is named '{name}'.*did you mean .*{near}"):
        find_architecture(name)


def test_a_name_like_no_other_is_answered_with_all():
    with pytest.raises(ValueError, match=r"the names are llama-2-7b, llama-2-13b, .*gpt-3-175b"):
        find_architecture("xyzzy")


# --- config.json --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (LLAMA_CONFIG, "llama-3.2-3b"),
        (GPT2_CONFIG, "gpt2"),
        (GPT2_CONFIG | {"n_inner": None}, "gpt2"),
        (
            {
                "model_type": "qwen2",
                "num_hidden_layers": 28,
                "hidden_size": 3584,
                "intermediate_size": 18944,
                "num_attention_heads": 28,
                "num_key_value_heads": 4,
                "vocab_size": 152064,
            },
            "qwen2.5-7b",
        ),
        (
            {
                "model_type": "mistral",
                "num_hidden_layers": 32,
                "hidden_size": 4096,
                "intermediate_size": 14336,
                "num_attention_heads": 32,
                "vocab_size": 32000,
            },
            "mistral-7b",
        ),
    ],
    ids=["llama", "gpt2", "gpt2 with n_inner null", "qwen2", "mistral without num_key_value_heads"],
)
def test_a_config_gives_the_architecture_of_its_name(tmp_path, config, name):
    assert read_config(written(tmp_path, config)) == ARCHITECTURES[name]


def test_the_folder_of_a_config_is_enough(tmp_path):
    written(tmp_path, GPT2_CONFIG)
    assert find_architecture(str(tmp_path)) == ARCHITECTURES["gpt2"]


def test_a_llama_without_key_value_heads_has_as_many_as_heads(tmp_path):
    config = {key: value for key, value in LLAMA_CONFIG.items() if key not in ("num_key_value_heads", "head_dim")}
    assert read_config(written(tmp_path, config)).n_kv_heads == 24


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("mixtral", "its feed-forward part is a set of experts"),
        ("bert", "it is an encoder"),
        ("mamba", "its tensors are not described here"),
        (None, "its tensors are not described here"),
    ],
)
def test_another_model_type_is_refused_by_name_with_the_reason(tmp_path, model_type, reason):
    path = written(tmp_path, {"model_type": model_type})
    with pytest.raises(
        ValueError, match=rf"model type {model_type!r}.*{reason}; the types that can are llama, mistral"
    ):
        read_config(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "model type None"),
        ({"model_type": "llama"}, "num_hidden_layers is missing, hidden_size is missing, .* above 0"),
        (LLAMA_CONFIG | {"hidden_size": 0}, "hidden_size is 0; each must be a whole number above 0"),
        (LLAMA_CONFIG | {"hidden_size": "3072"}, "hidden_size is '3072'"),
        (LLAMA_CONFIG | {"vocab_size": True}, "vocab_size is True"),
        (LLAMA_CONFIG | {"num_key_value_heads": -1}, "num_key_value_heads is -1"),
        (LLAMA_CONFIG | {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        (LLAMA_CONFIG | {"mlp_bias": True}, "mlp_bias is true"),
        (GPT2_CONFIG | {"add_cross_attention": True}, "add_cross_attention is True"),
        (GPT2_CONFIG | {"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        (GPT2_CONFIG | {"n_inner": 0.5}, "n_inner is 0.5"),
    ],
)
def test_a_config_that_describes_no_model_is_refused(tmp_path, text, message):
    path = written(tmp_path, text)
    with pytest.raises(ValueError, match=message) as refusal:
        read_config(path)
    assert str(path) in str(refusal.value)


# --- targets ------------------------------------------------------------------------------------------------------


def test_all_linear_leaves_the_output_head_and_the_embeddings_out():
    arch = ARCHITECTURES["llama-2-7b"]
    assert match_targets(arch, "all-linear") == linears(arch)
    assert len(linears(arch)) == 7 * 32
    assert "lm_head" not in linears(arch)


def test_a_target_hits_whole_last_parts_only():
    gpt2 = ARCHITECTURES["gpt2"]
    assert {name.split(".", 3)[3] for name in match_targets(gpt2, "c_proj")} == {"attn.c_proj", "mlp.c_proj"}
    assert {name.split(".", 3)[3] for name in match_targets(gpt2, "attn.c_proj")} == {"attn.c_proj"}
    with pytest.raises(ValueError, match="no module is named"):
        match_targets(gpt2, "proj")


def test_a_target_may_name_one_layer_and_the_ends():
    hit = match_targets(ARCHITECTURES["llama-2-7b"], ["layers.3.mlp.up_proj", "embed_tokens", "lm_head"])
    assert list(hit) == ["model.layers.3.mlp.up_proj", "model.embed_tokens", "lm_head"]


def test_a_matrix_that_two_targets_hit_counts_once():
    gpt2 = ARCHITECTURES["gpt2"]
    assert match_targets(gpt2, ["c_proj", "mlp.c_proj"]) == match_targets(gpt2, "c_proj")


def test_targets_that_hit_nothing_are_all_named_with_near_names():
    with pytest.raises(
        ValueError, match=r"named \['q_prj', 'wv'\]; this architecture's targets are \['all-linear', "
    ) as e:
        match_targets(ARCHITECTURES["llama-2-7b"], ["q_prj", "v_proj", "wv"])
    assert "did you mean 'q_proj'" in str(e.value)


def test_no_targets_are_refused():
    with pytest.raises(ValueError, match="no targets were given; this architecture's targets are"):
        match_targets(ARCHITECTURES["gpt2"], [])


def test_a_bias_belongs_to_the_parameters_and_not_to_the_weights():
    linear = Linear("c_fc", 768, 3072, bias=True)
    assert (linear.n_weights, linear.params) == (768 * 3072, 768 * 3072 + 3072)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_linear_layer_is_a_parameter(name):
    arch = ARCHITECTURES[name]
    shapes = parameter_shapes(arch)
    assert all(
        set(shapes[f"{full}.weight"]) == {linear.in_features, linear.out_features}
        for full, linear in linears(arch).items()
    )
    assert len(linears(arch)) == arch.n_layers * len(layer_linears(arch))
