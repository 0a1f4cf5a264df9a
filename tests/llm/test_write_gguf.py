"""What write_gguf writes: bits, names, order of rows, metadata; read back by read_gguf and by gguf's own reader."""

from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from tiny_decoder import permuted, tiny_config
from tiny_decoder import write_gguf as write_as_llama_cpp

from minilora.llm import Decoder, ModelConfig
from minilora.llm.config import Llama3Scaling
from minilora.llm.read_gguf import GGUFModel
from minilora.llm.write_gguf import KINDS, permute, write_adapter, write_model

BIT_EXACT = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
QUANTIZED = [kind for kind in KINDS if kind not in BIT_EXACT]
Q_PROJ, UP_PROJ = "model.layers.1.self_attn.q_proj", "model.layers.2.mlp.up_proj"


def wide_config(**changes) -> ModelConfig:
    """Rows of 64 and 96 numbers: both divide into blocks of 32."""
    return tiny_config(**({"hidden_size": 64, "intermediate_size": 96, "n_heads": 4} | changes))


def make(config: ModelConfig) -> Decoder:
    torch.manual_seed(0)
    return Decoder(config)


def reader(model: Decoder):
    weights = model.state_dict()
    return lambda name: weights[name].numpy()


def words(config: ModelConfig) -> dict:
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": ["a", "b", "ab", *(f"t{number}" for number in range(3, config.vocab_size))],
        "tokenizer.ggml.token_type": [1] * config.vocab_size,
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.eos_token_id": 3,
    }


def written(path, config: ModelConfig, kind: str = "F32") -> Decoder:
    model = make(config)
    write_model(path, reader(model), config, words(config), kind)
    return model


@pytest.mark.parametrize("kind", BIT_EXACT)
@pytest.mark.parametrize("changes", [{"tie_word_embeddings": True}, {"qkv_bias": True}, {"head_dim": 8}, {}])
def test_what_is_read_back_is_what_was_written_rounded_once(tmp_path, kind, changes):
    model = written(tmp_path / "a.gguf", tiny_config(**changes), kind)
    file = GGUFModel(tmp_path / "a.gguf")

    weights = dict(model.named_parameters())  # a tied head once
    assert file.shapes == {name: tuple(w.shape) for name, w in weights.items()}
    for name, w in weights.items():
        expected = w.detach() if w.dim() == 1 else w.detach().to(BIT_EXACT[kind]).float()
        assert torch.equal(torch.from_numpy(file.read(name)), expected), name


@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantized_weights_are_those_that_the_gguf_library_makes(tmp_path, kind):
    model = written(tmp_path / "a.gguf", wide_config(), kind)
    file, numbers = GGUFModel(tmp_path / "a.gguf"), gguf.GGMLQuantizationType[kind]

    for name, w in model.named_parameters():
        expected = w.detach().numpy()
        if w.dim() == 2:
            number = gguf.GGMLQuantizationType.Q8_0 if name == "lm_head.weight" else numbers
            expected = gguf.dequantize(gguf.quantize(expected, number), number)
        assert np.array_equal(file.read(name), expected), name


def test_the_same_bytes_come_from_llama_cpps_own_names_and_order(tmp_path):
    """tiny_decoder's writer takes every name from the gguf library and reorders rows as the converter does."""
    config = tiny_config()
    model = written(tmp_path / "ours.gguf", config)
    write_as_llama_cpp(tmp_path / "theirs.gguf", model)

    ours, theirs = (gguf.GGUFReader(tmp_path / name) for name in ("ours.gguf", "theirs.gguf"))
    assert {t.name: t.data.tobytes() for t in ours.tensors} == {t.name: t.data.tobytes() for t in theirs.tensors}
    same = {name for name in theirs.fields if name.startswith(("llama.", "tokenizer."))}
    assert {n: ours.fields[n].contents() for n in same} == {n: theirs.fields[n].contents() for n in same}
    assert {n: ours.fields[n].types for n in same} == {n: theirs.fields[n].types for n in same}


@pytest.mark.parametrize("config", [tiny_config(), tiny_config(qkv_bias=True), tiny_config(rope_theta=5e5)])
def test_the_config_is_read_back(tmp_path, config):
    written(tmp_path / "a.gguf", config)

    assert ModelConfig.from_hf(GGUFModel(tmp_path / "a.gguf").config) == config


def test_llama_3s_rotary_settings_are_read_back(tmp_path):
    scaling = Llama3Scaling(factor=32, low_freq_factor=1, high_freq_factor=4, original_max_position_embeddings=8192)
    config = tiny_config(hidden_size=64, n_heads=2, rope_scaling=scaling, rope_theta=5e5)
    written(tmp_path / "a.gguf", config)

    assert ModelConfig.from_hf(GGUFModel(tmp_path / "a.gguf").config) == config


def test_permute_is_the_converters_reordering():
    w = np.random.default_rng(0).normal(size=(24, 5))

    assert np.array_equal(permute(w, 3), permuted(w, 3))
    assert not np.array_equal(permute(w, 3), w)


def test_the_file_says_what_it_is(tmp_path):
    config = tiny_config()
    about = {"name": "tiny", "license": "MIT"}
    write_model(tmp_path / "a.gguf", reader(make(config)), config, words(config), "Q8_0", about)

    metadata = GGUFModel(tmp_path / "a.gguf").metadata
    assert metadata["general.type"] == "model"
    assert metadata["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q8_0
    assert (metadata["general.name"], metadata["general.license"]) == ("tiny", "MIT")


@pytest.mark.parametrize("is_tied", [True, False])
def test_the_matrix_of_the_logits_is_in_eight_bits_and_that_is_reported(tmp_path, is_tied):
    config = wide_config(tie_word_embeddings=is_tied)
    report = write_model(tmp_path / "a.gguf", reader(make(config)), config, words(config), "Q4_0")

    head = "token_embd.weight" if is_tied else "output.weight"
    assert [name for name, kind in report.kinds.items() if kind == "Q8_0"] == [head]
    assert {report.kinds[n] for n in ("blk.0.attn_q.weight", "blk.1.ffn_down.weight")} == {"Q4_0"}
    assert {kind for name, kind in report.kinds.items() if "norm" in name} == {"F32"}
    assert report.notes == (f"{head} is Q8_0: it makes the logits, which suffer most from coarse numbers",)
    assert "tensors: 2" in str(report)
    assert {t.name: t.tensor_type.name for t in gguf.GGUFReader(report.path).tensors} == report.kinds


def test_rows_that_do_not_divide_into_blocks_are_f16_and_that_is_reported(tmp_path):
    config = wide_config(intermediate_size=40)
    report = write_model(tmp_path / "a.gguf", reader(make(config)), config, words(config), "Q5_1")

    assert {name for name, kind in report.kinds.items() if kind == "F16"} == {
        f"blk.{n}.ffn_down.weight" for n in range(3)
    }
    assert report.notes[1] == "3 matrices are F16: rows of [40] numbers do not divide into blocks of Q5_1"


@pytest.mark.parametrize("kind, number", [("F16", 65536.0), ("Q4_0", -7e4), ("F32", np.nan), ("BF16", np.inf)])
def test_a_number_that_the_kind_cannot_hold_is_refused_and_the_old_file_stays(tmp_path, kind, number):
    config = wide_config()
    model = make(config)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[1, 2] = number
    (tmp_path / "a.gguf").write_bytes(b"old")

    with pytest.raises(ValueError, match=rf"{UP_PROJ}\.weight holds a NaN, or a number beyond .* of {kind}"):
        write_model(tmp_path / "a.gguf", reader(model), config, words(config), kind)

    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]
    assert (tmp_path / "a.gguf").read_bytes() == b"old"


def test_a_weight_of_another_shape_is_refused(tmp_path):
    config = tiny_config()
    with pytest.raises(ValueError, match=r"embed_tokens\.weight has shape \(50, 24\), the model of this config has"):
        write_model(
            tmp_path / "a.gguf", reader(make(config)), tiny_config(vocab_size=51), words(tiny_config(vocab_size=51))
        )


def test_an_unknown_kind_and_another_vocabulary_are_refused(tmp_path):
    config = tiny_config()
    with pytest.raises(ValueError, match=r"there is no kind 'Q4_K' .*'Q5_1'"):
        write_model(tmp_path / "a.gguf", reader(make(config)), config, words(config), "Q4_K")
    with pytest.raises(ValueError, match="the vocabulary has 40 tokens, the model 50"):
        write_model(tmp_path / "a.gguf", reader(make(config)), config, words(tiny_config(vocab_size=40)))


# ------------------------------------------------------------------------------------------------- adapters


def pair(config: ModelConfig, name: str, r: int, scaling: float, seed: int = 0):
    out_features, in_features = Decoder(config).get_submodule(name).weight.shape
    rng = np.random.default_rng(seed)
    A, B = rng.normal(size=(r, in_features)), rng.normal(size=(out_features, r))
    return A.astype(np.float32), B.astype(np.float32), scaling


def read_adapter(path):
    """(alpha, tensors by name) as gguf's own reader gives them."""
    file = gguf.GGUFReader(path)
    tensors = {t.name: t.data.reshape([int(n) for n in reversed(t.shape)]) for t in file.tensors}
    return file.fields["adapter.lora.alpha"].contents(), tensors


def test_an_adapter_file_says_what_it_is(tmp_path):
    config = tiny_config()
    write_adapter(tmp_path / "a.gguf", {UP_PROJ: pair(config, UP_PROJ, 2, 4.0)}, config, {"license": "MIT"})

    fields = gguf.GGUFReader(tmp_path / "a.gguf").fields
    told = {name: field.contents() for name, field in fields.items() if not name.startswith("GGUF.")}
    assert told == {
        "general.architecture": "llama",
        "general.type": "adapter",
        "general.license": "MIT",
        "adapter.type": "lora",
        "adapter.lora.alpha": 8.0,
    }


def test_equal_strengths_leave_every_bit_of_a_and_b(tmp_path):
    config = tiny_config()
    pairs = {UP_PROJ: pair(config, UP_PROJ, 2, 4.0), Q_PROJ: pair(config, Q_PROJ, 4, 2.0)}
    write_adapter(tmp_path / "a.gguf", pairs, config)

    alpha, tensors = read_adapter(tmp_path / "a.gguf")
    assert alpha == 8.0
    assert np.array_equal(tensors["blk.2.ffn_up.weight.lora_a"], pairs[UP_PROJ][0])
    assert np.array_equal(tensors["blk.2.ffn_up.weight.lora_b"], pairs[UP_PROJ][1])
    assert np.array_equal(tensors["blk.1.attn_q.weight.lora_a"], pairs[Q_PROJ][0])
    assert np.array_equal(tensors["blk.1.attn_q.weight.lora_b"], permuted(pairs[Q_PROJ][1], config.n_heads))


@pytest.mark.parametrize("qkv_bias", [False, True])
def test_llama_cpps_update_is_every_layers_own(tmp_path, qkv_bias):
    """alpha / r · B A with each layer's r: several ranks and scalings, one of rsLoRA; rows in llama.cpp's order."""
    config = tiny_config(qkv_bias=qkv_bias)
    k_proj, v_proj = (Q_PROJ.replace("q_proj", name) for name in ("k_proj", "v_proj"))
    settings = {UP_PROJ: (2, 4.0), Q_PROJ: (4, 0.3), k_proj: (8, 5 / 8**0.5), v_proj: (3, 0.0)}
    pairs = {name: pair(config, name, r, scaling) for name, (r, scaling) in settings.items()}
    write_adapter(tmp_path / "a.gguf", pairs, config)

    alpha, tensors = read_adapter(tmp_path / "a.gguf")
    heads = {} if qkv_bias else {Q_PROJ: config.n_heads, k_proj: config.n_kv_heads}
    names = {UP_PROJ: "blk.2.ffn_up", Q_PROJ: "blk.1.attn_q", k_proj: "blk.1.attn_k", v_proj: "blk.1.attn_v"}
    for name, (A, B, scaling) in pairs.items():
        lora_a, lora_b = (tensors[f"{names[name]}.weight.{part}"] for part in ("lora_a", "lora_b"))
        delta = permuted(scaling * B @ A, heads[name]) if name in heads else scaling * B @ A
        assert lora_b.shape[1] == len(A)
        np.testing.assert_allclose(alpha / lora_b.shape[1] * lora_b @ lora_a, delta, rtol=0, atol=1e-5)


def test_an_adapter_that_does_nothing_is_not_taken_for_one_without_alpha(tmp_path):
    config = tiny_config()
    write_adapter(tmp_path / "a.gguf", {UP_PROJ: pair(config, UP_PROJ, 2, 0.0)}, config)

    alpha, tensors = read_adapter(tmp_path / "a.gguf")
    assert alpha == 1.0
    assert not tensors["blk.2.ffn_up.weight.lora_b"].any()


def test_an_embeddings_a_is_transposed(tmp_path):
    config, name = tiny_config(), "model.embed_tokens"
    rng = np.random.default_rng(0)
    A, B = rng.normal(size=(2, 50)).astype(np.float32), rng.normal(size=(24, 2)).astype(np.float32)
    write_adapter(tmp_path / "a.gguf", {name: (A, B, 1.0)}, config)

    _, tensors = read_adapter(tmp_path / "a.gguf")
    assert np.array_equal(tensors["token_embd.weight.lora_a"], A.T)
    assert np.array_equal(tensors["token_embd.weight.lora_b"], B)


def test_all_that_cannot_be_told_to_llama_cpp_comes_in_one_error(tmp_path):
    config = tiny_config(tie_word_embeddings=True)
    A, B, _ = pair(config, UP_PROJ, 2, 1.0)
    broken = B.copy()
    broken[0, 0] = np.nan
    pairs = {
        UP_PROJ: (A, B.T, 1.0),
        UP_PROJ.replace("2", "1"): (A, broken, 1.0),
        "model.embed_tokens": (np.ones((2, 50), np.float32), np.ones((24, 2), np.float32), 1.0),
        "model.norm": (A, B, 1.0),
    }
    with pytest.raises(ValueError) as error:
        write_adapter(tmp_path / "a.gguf", pairs, config)

    assert str(error.value).splitlines() == [
        "this adapter cannot be written for llama.cpp:",
        f"  {UP_PROJ}: A (2, 24) and B (2, 40), needed (24 in, 40 out)",
        f"  {UP_PROJ.replace('2', '1')}: A, B or the scaling is NaN or infinite",
        "  model.embed_tokens: embedding and head share one weight, and llama.cpp cannot adapt one of the two: "
        "write the merged model instead",
        "  model.norm: the model has no linear layer of that name",
    ]
    assert list(tmp_path.iterdir()) == []


def test_an_empty_adapter_is_refused(tmp_path):
    with pytest.raises(ValueError, match="it has no layers"):
        write_adapter(tmp_path / "a.gguf", {}, tiny_config())


def test_a_gguf_file_can_be_written_anew_in_another_kind(tmp_path):
    config = wide_config()
    written(tmp_path / "a.gguf", config)
    first = GGUFModel(tmp_path / "a.gguf")
    write_model(tmp_path / "b.gguf", first.read, replace(config), words(config), "F16")

    second = GGUFModel(tmp_path / "b.gguf")
    assert second.config == first.config
    assert np.array_equal(second.read(f"{Q_PROJ}.weight"), first.read(f"{Q_PROJ}.weight").astype(np.float16))
