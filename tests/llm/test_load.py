"""Weights from files: all of them, nothing else, once."""

import json
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import save_file
from tiny_decoder import tiny_config, write_gguf

from minilora.llm import Decoder, ModelConfig, load_model, smollm2

HF_CONFIG = {
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
TOKENIZER = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}}


def write_folder(folder: Path, weights: dict[str, torch.Tensor], **changes) -> Path:
    (folder / "config.json").write_text(json.dumps(HF_CONFIG | changes))
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in Decoder(tiny_config()).state_dict().items()}


def test_a_folder_gives_its_weights_exactly(tmp_path, weights):
    model, tokenizer = load_model(write_folder(tmp_path, weights))

    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert tokenizer.encode("ab") == [0, 1]
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_weights_come_in_the_dtype_asked_for(tmp_path, weights):
    model, _ = load_model(write_folder(tmp_path, weights), dtype=torch.bfloat16)

    assert all(torch.equal(tensor, weights[name].bfloat16()) for name, tensor in model.state_dict().items())


def test_several_files_are_the_same_as_one(tmp_path, weights):
    write_folder(tmp_path, {})
    (tmp_path / "model.safetensors").unlink()
    names = sorted(weights)
    save_file({name: weights[name] for name in names[:10]}, tmp_path / "one.safetensors")
    save_file({name: weights[name] for name in names[10:]}, tmp_path / "two.safetensors")
    index = {name: "one.safetensors" if name in names[:10] else "two.safetensors" for name in names}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))

    model, _ = load_model(tmp_path)

    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_a_tied_head_need_not_be_in_the_file_and_may_be(tmp_path, weights):
    embedding = weights["model.embed_tokens.weight"]
    for head in ({}, {"lm_head.weight": embedding.clone()}):
        body = {name: tensor for name, tensor in weights.items() if name != "lm_head.weight"}

        model, _ = load_model(write_folder(tmp_path, body | head, tie_word_embeddings=True))

        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert torch.equal(model.lm_head.weight, embedding)


def test_two_different_tensors_for_a_tied_head_are_refused(tmp_path, weights):
    with pytest.raises(
        ValueError, match=r"the config ties lm_head\.weight to model.embed_tokens.weight, but the file has two"
    ):
        load_model(write_folder(tmp_path, weights, tie_word_embeddings=True))


def test_tables_that_the_config_implies_are_not_missed_and_not_extra(tmp_path, weights):
    load_model(write_folder(tmp_path, weights | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}))


def test_all_that_does_not_fit_comes_in_one_error(tmp_path, weights):
    del weights["model.norm.weight"]
    weights["model.layers.7.mlp.up_proj.weight"] = torch.ones(40, 24)
    weights["model.layers.1.self_attn.k_proj.weight"] = torch.ones(24, 24)

    with pytest.raises(ValueError) as error:
        load_model(write_folder(tmp_path, weights))

    assert str(error.value).splitlines() == [
        "these weights do not fit the model of their config:",
        "  model.layers.1.self_attn.k_proj.weight: shape (24, 24), the model has (8, 24)",
        "  model.layers.7.mlp.up_proj.weight: not in the model",
        "  model.norm.weight: missing from the file",
    ]


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_no_number_is_refused_by_name(tmp_path, weights, wrong):
    weights["model.layers.1.mlp.up_proj.weight"][3, 4] = wrong

    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds a NaN or an infinity"):
        load_model(write_folder(tmp_path, weights))


def test_a_weight_too_large_for_the_dtype_is_refused_by_name(tmp_path, weights):
    weights["model.norm.weight"][0] = 1e6
    load_model(write_folder(tmp_path, weights))

    with pytest.raises(ValueError, match=r"model\.norm\.weight holds .* as torch.float16: .* dtype is too narrow"):
        load_model(tmp_path, dtype=torch.float16)


def test_weights_stored_as_integers_are_refused(tmp_path, weights):
    weights["model.norm.weight"] = torch.ones(24, dtype=torch.uint8)

    with pytest.raises(ValueError, match=r"model\.norm\.weight in .* is stored as U8: quantized models are not read"):
        load_model(write_folder(tmp_path, weights))


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.01, 0.5, 0.999999])
def test_a_file_that_is_cut_off_is_refused_wherever_it_ends(tmp_path, weights, share):
    path = write_folder(tmp_path, weights) / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])

    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file .*: fetch it again"):
        load_model(tmp_path)


def test_a_config_that_is_cut_off_is_refused(tmp_path, weights):
    write_folder(tmp_path, weights)
    (tmp_path / "config.json").write_text('{"model_type": "lla')

    with pytest.raises(ValueError, match=r"config\.json is not whole JSON .*: fetch it again"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/etc/passwd", "missing.safetensors"])
def test_an_index_cannot_name_files_that_are_not_in_its_folder(tmp_path, weights, name):
    write_folder(tmp_path, weights)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))

    with pytest.raises(ValueError, match="names files that are not in its folder"):
        load_model(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path, weights):
    (write_folder(tmp_path, weights) / "model.safetensors").unlink()

    with pytest.raises(ValueError, match=r"has neither model\.safetensors nor model\.safetensors\.index\.json"):
        load_model(tmp_path)


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json: it is not a Hugging Face model folder"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["smollm3", "nowhere.gguf", "/nowhere/at all"])
def test_an_unknown_name_is_refused_with_what_there_is(name):
    with pytest.raises(ValueError, match=f"there is no model '{name}': give 'smollm2-135m', a folder with safetensors"):
        load_model(name)


def test_a_hub_name_without_the_hubs_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)

    with pytest.raises(RuntimeError, match=r"'owner/name' is no folder here, .* `pip install huggingface_hub`"):
        load_model("owner/name")


def test_a_hub_that_does_not_answer_says_so():
    with pytest.raises(RuntimeError, match="'owner/name' is no folder here, and the hub did not give it"):
        load_model("owner/name")  # tests run with HF_HUB_OFFLINE=1


def test_an_integer_dtype_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"cannot load weights as torch\.int8: use a floating-point dtype"):
        load_model(tmp_path, dtype=torch.int8)


def test_writing_into_a_weight_leaves_its_file_as_it_is(tmp_path, weights):
    path = write_folder(tmp_path, weights) / "model.safetensors"
    before = path.read_bytes()

    model, _ = load_model(tmp_path)
    with torch.no_grad():
        model.model.norm.weight.mul_(3)

    assert torch.equal(model.model.norm.weight, 3 * weights["model.norm.weight"])
    assert path.read_bytes() == before


def test_a_folder_is_known_by_its_name_and_the_hash_of_its_weights(tmp_path, weights):
    one, _ = load_model(write_folder(tmp_path, weights))
    same, _ = load_model(tmp_path, dtype=torch.bfloat16)
    assert one.base_sha256 == same.base_sha256
    assert len(one.base_sha256) == 64

    weights["model.norm.weight"][0] += 1
    other, _ = load_model(write_folder(tmp_path, weights))

    assert other.base_sha256 != one.base_sha256
    assert other.name == tmp_path.name


def test_the_base_model_knows_its_maker_its_licence_and_its_published_hash(smollm2_135m):
    model, _ = smollm2_135m

    assert model.name == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert model.base_sha256 == smollm2.GGUF_SHA256
    assert model.origin.license == "Apache-2.0"
    assert "HuggingFaceTB" in model.origin.attribution


def test_the_base_model_has_its_134515008_parameters(smollm2_135m):
    model, _ = smollm2_135m

    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008


# ---------------------------------------------------------------------------------------------------- GGUF


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("is_tied", [True, False])
def test_a_gguf_file_gives_the_weights_it_was_made_from(tmp_path, architecture, is_tied):
    original = Decoder(tiny_config(tie_word_embeddings=is_tied, qkv_bias=architecture == "qwen2", rope_theta=5e5))
    write_gguf(tmp_path / "tiny.gguf", original, architecture)

    model, tokenizer = load_model(tmp_path / "tiny.gguf")

    assert model.config == original.config
    assert all(torch.equal(tensor, original.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert tokenizer.eos == 3
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == is_tied


LLAMA3 = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def llama3_model() -> tuple[Decoder, list[float]]:
    """A tiny model with Llama 3.2's rotations, and the table of factors that llama.cpp's converter writes for them."""
    hf = HF_CONFIG | {"head_dim": 64, "rope_theta": 500_000.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}
    config = ModelConfig.from_hf(hf)
    plain = ModelConfig.from_hf(hf | {"rope_scaling": None}).rope_frequencies()
    return Decoder(config), [a / b for a, b in zip(plain, config.rope_frequencies(), strict=True)]


def test_the_table_of_rotary_factors_in_a_gguf_file_is_read_as_llama_3s_settings(tmp_path):
    original, factors = llama3_model()
    write_gguf(tmp_path / "tiny.gguf", original, rope_factors=factors)

    model, _ = load_model(tmp_path / "tiny.gguf")

    assert model.config == original.config


def test_another_table_of_rotary_factors_is_refused(tmp_path):
    original, factors = llama3_model()
    write_gguf(tmp_path / "tiny.gguf", original, rope_factors=[2 * factor for factor in factors])

    with pytest.raises(ValueError, match=r"stretches its rotary positions in a way that is not Llama 3\.1's"):
        load_model(tmp_path / "tiny.gguf")


def test_a_gguf_file_of_another_architecture_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    with pytest.raises(ValueError, match=r"holds a 'mamba' model; those read here are \['llama', 'qwen2'\]"):
        load_model(tmp_path / "other.gguf")


@pytest.mark.parametrize("share", [0.0, 0.0005, 0.001, 0.01, 0.05, 0.1, 0.3, 0.6, 0.99])
def test_a_gguf_file_that_is_cut_off_is_refused_wherever_it_ends(tmp_path, share):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, Decoder(tiny_config()))
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])

    with pytest.raises(ValueError, match=r"is not a whole GGUF file .*: fetch it again"):
        load_model(path)


# ---------------------------------------------------------------------------------------------------- memory

MEASURE = """
import sys, torch
from minilora.llm import load_model
def status():
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return {name: int(lines[name].split()[0]) / 1024 for name in ("VmHWM", "VmRSS", "RssAnon", "RssFile")}
import minilora.llm.load, tqdm
before = status()
model, _ = load_model("smollm2-135m", dtype=getattr(torch, sys.argv[1]))
after = status()
print(after["VmHWM"] - before["VmRSS"], after["RssAnon"] - before["RssAnon"])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_holds_the_weights_once(smollm2_135m, dtype):
    """MiB, in a process of its own.

    The room besides one copy is for the largest tensor on its way to another dtype (the embedding: 108 MiB) or for the
    vocabulary and torch's own; a second copy of the weights would not fit into it.
    """
    copy, room = 134_515_008 * {"float32": 4, "bfloat16": 2}[dtype] / 2**20, 128

    run = subprocess.run([sys.executable, "-c", MEASURE, dtype], capture_output=True, text=True, check=True)
    peak, private = map(float, run.stdout.split())

    assert peak < copy + room
    if dtype == "float32":
        assert private < room  # the weights themselves stay in the file


def test_loading_does_not_wait_for_torchs_compiler(smollm2_135m):
    program = "import sys\nfrom minilora.llm import load_model\nload_model('smollm2-135m')\n"
    program += "print('torch._dynamo' in sys.modules)"

    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)

    assert run.stdout == "False\n"
