"""A folder of 4-bit weights: all of it is used, every place is filled, and what is wrong comes in one error.

That the bytes are those of transformers and bitsandbytes is shown in tests/compat/test_bnb_checkpoints.py.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from minilora.llm import load_model
from minilora.qlora import NF4Linear, QLoRALinear
from minilora.torch_lora import LoRALinear, inject
from minilora.train.bnb_folder import load_4_bit, save_4_bit

CONFIG = {
    "model_type": "llama",
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
TOKENIZER = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}}
TOKENS = torch.arange(12).reshape(2, 6)
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def plain(tmp_path) -> Path:
    """A folder in floats."""
    from minilora.llm import Decoder, ModelConfig

    folder = tmp_path / "plain"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | {"torch_dtype": "float32", "eos_token_id": 2}))
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (folder / "weights.bin").write_bytes(b"not to be copied")
    save_file(Decoder(ModelConfig.from_hf(CONFIG)).state_dict(), folder / "model.safetensors")
    return folder


def in_4_bits(plain: Path) -> nn.Module:
    model, _ = load_model(plain)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and name != "lm_head":
            model.set_submodule(name, NF4Linear(layer))
    return model


@pytest.fixture
def folder(plain, tmp_path) -> Path:
    """The same in 4 bits."""
    save_4_bit(in_4_bits(plain), tmp_path / "four", like=plain)
    return tmp_path / "four"


def change_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def change_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))


def test_what_was_written_computes_the_same(folder, plain):
    model, tokenizer = load_4_bit(folder)

    assert torch.equal(model(TOKENS), in_4_bits(plain)(TOKENS))
    assert tokenizer.encode("ab") == [0, 1]
    assert model.origin.name == "four"
    assert not model.training


def test_the_config_and_the_tokenizer_go_along_and_nothing_else(folder):
    config = json.loads((folder / "config.json").read_text())

    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}
    assert CONFIG.items() <= config.items()
    assert config["eos_token_id"] == 2
    assert config["dtype"] == "float32"
    assert "torch_dtype" not in config


def test_floats_come_in_the_dtype_asked_for_and_the_bytes_stay(folder):
    model, _ = load_4_bit(folder)
    half, _ = load_4_bit(folder, dtype=torch.bfloat16)
    first, second = (m.model.layers[0].self_attn.q_proj for m in (model, half))

    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(first.dense_weight(torch.float32), second.dense_weight(torch.float32))


def test_an_adapter_trains_over_it(folder):
    model, _ = load_4_bit(folder)
    report = inject(model, ["q_proj", "down_proj"], lambda base: QLoRALinear(base, r=2, alpha=4))
    model(TOKENS).square().mean().backward()

    assert report.count.trainable == 2 * (2 * (24 + 24) + 2 * (40 + 24))
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_the_same_folder_can_be_written_over(folder):
    model, _ = load_4_bit(folder)
    before = (folder / "model.safetensors").read_bytes()
    save_4_bit(model, folder, like=folder)

    assert (folder / "model.safetensors").read_bytes() == before
    assert torch.equal(model(TOKENS), load_4_bit(folder)[0](TOKENS))


def test_all_that_cannot_be_read_comes_in_one_error(folder):
    def damage(tensors):
        del tensors[Q_PROJ + ".absmax"]
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 1, dtype=torch.uint8)
        tensors["model.norm.SCB"] = torch.zeros(3, dtype=torch.int8)

    change_tensors(folder, damage)
    with pytest.raises(ValueError) as error:
        load_4_bit(folder)

    lines = str(error.value).splitlines()
    assert lines[0] == "these 4-bit weights cannot be read:"
    assert lines[1] == f"  {Q_PROJ}.absmax: missing from the file"
    assert lines[2].startswith(
        "  model.layers.1.mlp.up_proj.weight: a weight of shape (40, 24) needs {'bytes of codes': 480"
    )
    assert lines[3] == "  model.norm.SCB: torch.int8, without the quant_state of a weight in 4 bits"
    assert len(lines) == 4


def test_4_bits_without_their_state_are_not_taken_for_floats(folder):
    change_tensors(folder, lambda tensors: tensors.pop(Q_PROJ + ".quant_state.bitsandbytes__nf4"))

    with pytest.raises(ValueError, match=rf"{Q_PROJ}: torch.uint8, without the quant_state"):
        load_4_bit(folder)


def test_weights_of_another_shape_or_place_than_the_config_says_come_in_one_error(folder):
    def move(tensors):
        for name in [name for name in tensors if name.startswith(Q_PROJ)]:
            tensors[name.replace("layers.0.self_attn.q_proj", "embed_tokens")] = tensors.pop(name)

    change_tensors(folder, move)
    change_config(folder, intermediate_size=48)
    with pytest.raises(ValueError) as error:
        load_4_bit(folder)

    lines = str(error.value).splitlines()
    assert lines[0] == "these weights do not fit the model of their config:"
    assert lines[1] == "  model.embed_tokens.weight: in 4 bits, but the model has no linear layer there"
    assert lines[2] == "  model.layers.0.mlp.down_proj.weight: shape (24, 40), the model has (24, 48)"
    assert len(lines) == 2 + 6


def test_a_place_that_nothing_fills_and_a_tensor_without_one_are_named(folder):
    def rename(tensors):
        tensors["model.norm.other"] = tensors.pop("model.norm.weight")

    change_tensors(folder, rename)
    with pytest.raises(
        ValueError, match=r"model\.norm\.other: not in the model\n  model\.norm\.weight: missing from the file"
    ):
        load_4_bit(folder)


def test_a_float_that_is_no_number_is_refused(folder):
    change_tensors(folder, lambda tensors: tensors["model.norm.weight"].fill_(torch.nan))

    with pytest.raises(ValueError, match=r"model\.norm\.weight holds a NaN"):
        load_4_bit(folder)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999999])
def test_a_file_that_is_cut_off_is_refused(folder, share):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: int(share * len(content))])

    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file .*: fetch it again"):
        load_4_bit(folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (None, r"is not quantized, says its config\.json: load_model reads it"),
        ({"quant_method": "gptq", "bits": 4}, r"quantized by 'gptq', .*: bitsandbytes' 4 bits alone are read here"),
        ({"load_in_8bit": True}, r"quantized by 'bitsandbytes', with 8 bits: bitsandbytes' 4 bits alone"),
    ],
)
def test_another_kind_of_folder_is_refused(folder, settings, message):
    change_config(folder, quantization_config=settings)

    with pytest.raises(ValueError, match=message):
        load_4_bit(folder)


def test_load_model_says_who_reads_it(folder):
    with pytest.raises(ValueError, match=r"or bitsandbytes' 4 bits as they are, with minilora\.train\.bnb_folder"):
        load_model(folder)


def test_a_head_in_4_bits_cannot_be_tied(plain, tmp_path):
    model = in_4_bits(plain)
    model.lm_head = NF4Linear(model.lm_head)
    save_4_bit(model, tmp_path / "four", like=plain)
    assert isinstance(load_4_bit(tmp_path / "four")[0].lm_head, NF4Linear)
    change_config(tmp_path / "four", tie_word_embeddings=True)

    with pytest.raises(ValueError, match=r"lm_head\.weight: in 4 bits, but the config ties it to the embedding"):
        load_4_bit(tmp_path / "four")


def test_nothing_is_written_where_something_is_wrong(plain, tmp_path):
    model, out = in_4_bits(plain), tmp_path / "out"
    with pytest.raises(ValueError, match="no layer of this model is in 4 bits"):
        save_4_bit(load_model(plain)[0], out, like=plain)
    with pytest.raises(ValueError, match=r"bytes cannot be viewed as torch\.float64"):
        model.model.layers[1].mlp.up_proj = NF4Linear(nn.Linear(1, 3))
        save_4_bit(model, out, like=plain, storage=torch.float64)
    inject(model, ["q_proj"], lambda base: LoRALinear(base, r=1, alpha=1))
    with pytest.raises(ValueError, match="this model has adapters"):
        save_4_bit(model, out, like=plain)
    change_config(plain, hidden_size=48)
    with pytest.raises(ValueError, match="has the config of another model"):
        save_4_bit(in_4_bits_of_other(), out, like=plain)

    assert not out.exists()


def in_4_bits_of_other() -> nn.Module:
    from minilora.llm import Decoder, ModelConfig

    model = Decoder(ModelConfig.from_hf(CONFIG))
    model.lm_head = NF4Linear(model.lm_head)
    return model


def test_an_index_of_other_weights_is_not_left_beside_the_file(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model.safetensors"}}')
    model, _ = load_4_bit(folder)

    with pytest.raises(ValueError, match=r"index\.json of other weights: choose an empty folder"):
        save_4_bit(model, folder, like=folder)
