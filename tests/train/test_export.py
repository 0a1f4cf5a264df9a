"""export: what is in the file is the base with its adapter, rounded once; the base is left alone."""

import json

import gguf
import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers

from minilora.llm import Decoder, ModelConfig, load_model
from minilora.llm.read_gguf import GGUFModel
from minilora.llm.write_gguf import write_model
from minilora.qlora import QLoRALinear
from minilora.torch_lora import LoRALinear, inject, save_adapter, train_modules
from minilora.torch_lora.inject import ALL_LINEAR, adapter_layers
from minilora.torch_lora.wrap import lora_layer
from minilora.train.export import adapter_pairs, export, merged_weight

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
CONFIG = ModelConfig(
    vocab_size=258,
    hidden_size=32,
    intermediate_size=64,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    tie_word_embeddings=True,
)


@pytest.fixture
def base(tmp_path):
    """A tiny model with a tokenizer of bytes, as a GGUF file of float32."""
    model = Decoder(CONFIG)
    vocabulary = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [*BYTES, "ab", "<|end|>"],
        "tokenizer.ggml.token_type": [1] * 257 + [3],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": 257,
    }
    path = tmp_path / "base.gguf"
    about = {"name": "tiny", "organization": "us", "license": "MIT"}
    write_model(path, lambda name: model.state_dict()[name].numpy(), CONFIG, vocabulary, "F32", about)
    return path


def adapted(base, targets=ALL_LINEAR, make=lora_layer, **settings) -> Decoder:
    """The base with an adapter whose matrices are all noise."""
    model, _ = load_model(base)
    inject(model, targets, lambda layer: make(layer, **({"r": 4, "alpha": 8} | settings)))
    with torch.no_grad():
        for layer in adapter_layers(model).values():
            layer.A.normal_(std=0.3)
            layer.B.normal_(std=0.3)
    return model


@torch.no_grad()
def logits(model: Decoder) -> torch.Tensor:
    return model(torch.arange(20)[None])


@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_merged_file_computes_what_the_model_with_its_adapter_does(base, tmp_path, use_rslora):
    model = adapted(base, use_rslora=use_rslora)
    save_adapter(model, tmp_path / "adapter")
    export(base, tmp_path / "adapter", tmp_path / "out.gguf", "F32")
    merged, _ = load_model(tmp_path / "out.gguf")

    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-5)  # float32, summed in another order
    assert not torch.allclose(logits(merged), logits(load_model(base)[0]), atol=0.01)
    assert merged.config == CONFIG


def test_an_adapter_folder_with_settings_by_layer_is_exported_as_it_is(base, tmp_path):
    """rank_pattern and alpha_pattern of PEFT's config reach the merged file, and the adapter's pairs."""
    settings = iter([{"r": 2, "alpha": 4}, {"r": 4, "alpha": 8}, {"r": 4, "alpha": 1}, {"r": 8, "alpha": 3}])
    model, _ = load_model(base)
    inject(model, ["q_proj", "down_proj"], lambda layer: lora_layer(layer, **next(settings)))
    for layer in adapter_layers(model).values():
        torch.nn.init.normal_(layer.B, std=0.3)
    save_adapter(model, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    export(base, tmp_path / "adapter", tmp_path / "out.gguf", "F32")
    export(base, tmp_path / "adapter", tmp_path / "lora.gguf", "adapter")
    merged, _ = load_model(tmp_path / "out.gguf")
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "lora.gguf").tensors}

    assert config["rank_pattern"] and config["alpha_pattern"]
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-5)  # float32, summed in another order
    ranks = sorted(len(A) for name, A in tensors.items() if name.endswith("lora_a"))
    assert ranks == [2, 4, 4, 8]


def test_the_sum_is_rounded_once(base, tmp_path):
    model = adapted(base)
    save_adapter(model, tmp_path / "adapter")
    export(base, tmp_path / "adapter", tmp_path / "out.gguf", "F16")
    name = "model.layers.1.self_attn.k_proj"
    layer = adapter_layers(model)[name]

    expected = (layer.base.weight + layer.delta_weight()).half().float()
    assert torch.equal(torch.from_numpy(GGUFModel(tmp_path / "out.gguf").read(f"{name}.weight")), expected)


def test_a_bfloat16_base_is_not_rounded_to_bfloat16_again(base):
    model = adapted(base)
    for layer in adapter_layers(model).values():
        layer.base.bfloat16()
    name = "model.layers.0.mlp.up_proj"
    layer = adapter_layers(model)[name]

    expected = layer.base.weight.float() + layer.delta_weight()
    assert np.array_equal(merged_weight(model, f"{name}.weight"), expected.detach().numpy())


def test_a_merged_layer_is_not_merged_twice_and_a_4_bit_base_is_made_floats(base):
    name = "model.layers.0.mlp.up_proj"
    model = adapted(base)
    once = merged_weight(model, f"{name}.weight")
    adapter_layers(model)[name].merge()
    assert np.array_equal(merged_weight(model, f"{name}.weight"), once)

    model = adapted(base, make=QLoRALinear)
    layer = adapter_layers(model)[name]
    expected = layer.base.dense_weight(torch.float32) + layer.delta_weight()
    assert np.array_equal(merged_weight(model, f"{name}.weight"), expected.detach().numpy())


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_on_one_end_of_a_tied_model_unties_the_file(base, tmp_path, target):
    model = adapted(base, [target])
    save_adapter(model, tmp_path / "adapter")
    export(base, tmp_path / "adapter", tmp_path / "out.gguf", "F32")
    merged, _ = load_model(tmp_path / "out.gguf")

    assert not merged.config.tie_word_embeddings
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-5)


def test_the_base_alone_comes_out_as_it_is(base, tmp_path):
    report = export(base, None, tmp_path / "out.gguf", "F32")

    one, other = GGUFModel(base), GGUFModel(tmp_path / "out.gguf")
    assert report is not None
    assert other.config == one.config
    assert other.name == one.name == "us/tiny"
    assert all(np.array_equal(other.read(name), one.read(name)) for name in one.shapes)


def test_the_adapter_alone_has_every_pair_and_the_bases_name(base, tmp_path):
    model = adapted(base)
    save_adapter(model, tmp_path / "adapter")
    assert export(base, tmp_path / "adapter", tmp_path / "lora.gguf", "adapter") is None

    file = gguf.GGUFReader(tmp_path / "lora.gguf")
    assert len(file.tensors) == 2 * len(adapter_pairs(model)) == 28
    assert file.fields["adapter.lora.alpha"].contents() == 8.0
    assert file.fields["general.license"].contents() == "MIT"
    assert file.fields["general.name"].contents() == "tiny"


def test_pairs_carry_each_layers_own_scaling(base):
    model, _ = load_model(base)
    inject(model, ["q_proj"], lambda layer: LoRALinear(layer, r=4, alpha=8, use_rslora=True))

    pairs = adapter_pairs(model)

    assert pairs.keys() == adapter_layers(model).keys()
    assert {scaling for _, _, scaling in pairs.values()} == {4.0}


def test_what_cannot_be_is_refused_before_anything_is_loaded(tmp_path):
    with pytest.raises(ValueError, match=r"there is no kind 'Q2_K'; choose 'adapter', or for a model one of \['F32'"):
        export("nowhere", None, tmp_path / "out.gguf", "Q2_K")
    with pytest.raises(ValueError, match="no adapter was given"):
        export("nowhere", None, tmp_path / "out.gguf", "adapter")
    with pytest.raises(ValueError, match=r"out\.bin does not end in \.gguf"):
        export("nowhere", None, tmp_path / "out.bin")


def test_the_template_that_an_adapter_was_trained_with_goes_into_the_file(base, tmp_path):
    save_adapter(adapted(base), tmp_path / "adapter")
    (tmp_path / "adapter/chat_template.jinja").write_text("{{ messages[0].content }}?")
    export(base, tmp_path / "adapter", tmp_path / "out.gguf", "F32")
    _, tokenizer = load_model(tmp_path / "out.gguf")
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}]) == "ab?"


@pytest.mark.parametrize(
    "train_more", [lambda m: train_modules(m, "norm"), lambda m: train_modules(m, "input_layernorm")]
)
def test_an_adapter_that_replaces_tensors_is_not_written_without_them(base, tmp_path, train_more):
    model = adapted(base, ["q_proj"])
    train_more(model)
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"replaces [12] tensors of the base, .*write the merged model"):
        export(base, tmp_path / "adapter", tmp_path / "out.gguf", "adapter")
    assert not (tmp_path / "out.gguf").exists()
