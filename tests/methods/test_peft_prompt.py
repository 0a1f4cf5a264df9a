"""Files of virtual tokens: what does not fit is refused with its reason, before the model is touched."""

import json

import pytest
import torch
from edit_config import edit_config
from safetensors.torch import load_file, save_file

from minilora.llm import Decoder, ModelConfig
from minilora.methods import PrefixTuning, PromptTuning
from minilora.methods.peft_prompt import load_prompt, save_prompt
from minilora.qlora import NF4Linear
from minilora.torch_lora import LoRALinear, inject, remove
from minilora.torch_lora.inject import adapter_layers

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
WRAPS = {
    "prefix": lambda base: PrefixTuning(base, n_virtual=4),
    "prefix, MLP": lambda base: PrefixTuning(base, n_virtual=4, mlp_features=10),
    "prompt": lambda base: PromptTuning(base, n_virtual=4),
}


def tiny(**changes) -> Decoder:
    sizes = {"vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "n_layers": 3, "n_heads": 6, "n_kv_heads": 2}
    return Decoder(ModelConfig(**(sizes | changes))).eval()


@pytest.fixture(params=["prefix", "prompt"])
def kind(request):
    return request.param


@pytest.fixture
def folder(kind, tmp_path):
    model = tiny()
    inject(model, ["model"], WRAPS[kind])
    save_prompt(model, tmp_path, base_name="tiny", base_sha256="ab" * 32)
    return tmp_path


def refused(folder, message, model=None):
    model = tiny() if model is None else model
    before = {name: (id(p), p.requires_grad, p.clone()) for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        load_prompt(model, folder)
    now = {name: (id(p), p.requires_grad, p) for name, p in model.named_parameters()}
    assert before.keys() == now.keys()
    assert all(before[k][:2] == now[k][:2] and torch.equal(before[k][2], now[k][2]) for k in before)


@pytest.mark.parametrize("kind", WRAPS)
def test_the_two_files_are_pefts(folder, kind):
    config, tensors = json.loads((folder / CONFIG).read_text()), load_file(folder / TENSORS)
    is_prefix = kind != "prompt"
    assert {key: tuple(t.shape) for key, t in tensors.items()} == {
        "prompt_embeddings": (4, 3 * 2 * 8) if is_prefix else (4, 24)
    }
    assert config["peft_type"] == ("PREFIX_TUNING" if is_prefix else "PROMPT_TUNING")
    assert (config["num_virtual_tokens"], config["num_layers"]) == (4, 3)
    assert (config["token_dim"], config["num_attention_heads"]) == ((8, 2) if is_prefix else (24, 6))
    assert config["base_model_name_or_path"] == "tiny"


def test_saving_an_mlp_leaves_the_model_as_it_was(tmp_path):
    model = tiny()
    inject(model, ["model"], WRAPS["prefix, MLP"])
    save_prompt(model, tmp_path)
    assert model.model.mlp is not None
    assert torch.equal(load_file(tmp_path / TENSORS)["prompt_embeddings"], model.model.prefix())
    refused(tmp_path, "with an MLP already: remove", model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LORA"}, "this reader knows"),
        ({"num_layers": 2}, "num_layers = 2: the model has 3"),
        ({"num_attention_heads": 1}, "num_attention_heads = 1: the model has"),
        ({"token_dim": 16}, "token_dim = 16: the model has"),
        ({"num_transformer_submodules": 2}, "num_transformer_submodules = 2: the model has 1"),
        ({"num_virtual_tokens": 5}, r"shape \(4, .*\(5,"),
        ({"num_virtual_tokens": None}, r"shape \(4,"),
        ({"modules_to_save": ["lm_head"]}, "replaces whole modules"),
        ({"brand_new": True}, "brand_new = True: not a key this reader knows"),
        ({"num_layers": 2, "brand_new": 1}, r"(?s)num_layers.*brand_new"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(folder, changes, message):
    edit_config(folder, **changes)
    refused(folder, message)


def test_keys_that_peft_leaves_open_are_read(folder):
    edit_config(folder, num_layers=None, modules_to_save=None, peft_version="1", tokenizer_kwargs=None, brand_new=False)
    load_prompt(tiny(), folder)


def test_tensors_that_do_not_fit_are_refused(folder):
    P = load_file(folder / TENSORS)["prompt_embeddings"]
    for tensors, message in [
        ({"prompt_embeddings": P[:, :-1].contiguous()}, r"shape \(4, .*the config and the model have"),
        ({"prompt_embeddings": P, "more": P.clone()}, "'more': not a tensor of virtual tokens"),
        ({"base_model.model.prompt_embeddings": P}, r"(?s)not a tensor.*missing from the file"),
        ({"prompt_embeddings": torch.full_like(P, torch.nan)}, "NaN"),
        ({"prompt_embeddings": P.long()}, "not floats"),
    ]:
        save_file(tensors, folder / TENSORS)
        refused(folder, message)


def test_a_model_that_does_not_fit_is_refused(folder, kind):
    refused(folder, "num_layers = 3: the model has 2", tiny(n_layers=2))
    refused(folder, "4 virtual tokens, the model reads 4", tiny(max_seq_len=4))
    other = tiny()
    inject(other, ["model"], WRAPS["prompt" if kind == "prefix" else "prefix"])
    refused(folder, "already: remove", other)
    remove(other)
    inject(other, ["q_proj"], lambda base: LoRALinear(base, r=2, alpha=2))
    refused(folder, "of another method", other)
    with pytest.raises(TypeError, match="own Decoder"):
        load_prompt(torch.nn.Linear(2, 2), folder)


def test_a_model_without_virtual_tokens_has_none_to_save(tmp_path):
    with pytest.raises(ValueError, match="no virtual tokens to save"):
        save_prompt(tiny(), tmp_path)


def test_nothing_is_written_of_a_broken_one(tmp_path, kind):
    model = tiny()
    inject(model, ["model"], WRAPS[kind])
    with torch.no_grad():
        model.model.P[1, 2] = torch.inf
    with pytest.raises(ValueError, match="NaN or infinite"):
        save_prompt(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_another_base_is_warned_of(folder):
    with pytest.warns(UserWarning, match="SHA-256 abababababab"):
        load_prompt(tiny(), folder, base_sha256="cd" * 32)
    load_prompt(tiny(), folder, base_sha256="ab" * 32)


def test_what_a_file_says_of_its_base_reaches_no_terminal_raw(folder):
    tensors = load_file(folder / TENSORS)
    save_file(tensors, folder / TENSORS, {"base_sha256": "\x1b[2J" + "ab" * 32, "base_stored_as": "nf4\x1b]0;owned\a"})
    with pytest.warns(UserWarning) as warned:
        load_prompt(tiny(), folder, base_sha256="cd" * 32)
    assert len(warned) == 2
    assert all(str(one.message).isprintable() for one in warned)


def test_a_base_stored_in_another_form_is_warned_of(tmp_path, kind):
    model = tiny()
    model.model.layers[0].mlp.up_proj = NF4Linear(model.model.layers[0].mlp.up_proj)
    inject(model, ["model"], WRAPS[kind])
    save_prompt(model, tmp_path)
    with pytest.warns(UserWarning, match="stored as nf4.*here over floats"):
        load_prompt(tiny(), tmp_path)
    remove(model)
    load_prompt(model, tmp_path)
    assert list(adapter_layers(model)) == ["model"]
