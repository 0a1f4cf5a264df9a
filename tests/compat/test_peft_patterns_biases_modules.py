"""PEFT's patterns, biases and saved modules, both ways: the same logits, the same files."""

import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from beside_peft import QUIET
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from minilora.llm import Decoder, ModelConfig
from minilora.torch_lora import inject, load_adapter, lora_layer, remove, save_adapter, train_biases, train_modules
from minilora.torch_lora.import_layouts import convert
from minilora.torch_lora.inject import adapter_layers
from minilora.torch_lora.peft_patterns import describe, parse_pattern, resolve

pytestmark = [*QUIET, pytest.mark.filterwarnings("ignore::RuntimeWarning:peft")]
TOKENS = torch.arange(24).reshape(2, 12)
CLOSE = {"rtol": 1e-6, "atol": 1e-6}  # float32 after two decoder layers: a few roundings of 6e-8, in another order
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}


def llama(*, tied: bool = False, kind: type = LlamaForCausalLM) -> nn.Module:
    torch.manual_seed(1)
    config = LlamaConfig(
        **SIZES, num_hidden_layers=2, vocab_size=99, max_position_embeddings=64, attention_bias=True, mlp_bias=True,
        tie_word_embeddings=tied, pad_token_id=0, num_labels=3,
    )  # fmt: skip
    model = kind(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)  # or a bias that is forgotten would not be seen
    return model


def decoder() -> Decoder:
    torch.manual_seed(1)
    config = ModelConfig(
        vocab_size=99, hidden_size=32, intermediate_size=48, n_layers=2, n_heads=4, n_kv_heads=2, max_seq_len=64,
        qkv_bias=True,
    )  # fmt: skip
    model = Decoder(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        out = model(TOKENS)
    return out if isinstance(out, torch.Tensor) else out.logits


def randomize(model: nn.Module) -> None:
    """Move all that trains away from where it began."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)


def in_peft(base: nn.Module, **config: object) -> PeftModel:
    model = get_peft_model(base, LoraConfig(**({"r": 4, "lora_alpha": 6} | config)))
    randomize(model)
    return model.eval()


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_bits(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert [name for name in after if not torch.equal(after[name], before[name])] == []


ATTENTION = ["q_proj", "v_proj", "o_proj"]
CONFIGS = {
    "ranks by last part": {"target_modules": ATTENTION, "rank_pattern": {"v_proj": 2, "o_proj": 7}},
    "ranks and alphas by whole name": {
        "target_modules": ATTENTION,
        "rank_pattern": {"model.layers.0.self_attn.q_proj": 3, "^model.layers.1.self_attn.o_proj": 5},
        "alpha_pattern": {"layers.1.self_attn.q_proj": 11, "v_proj": 2.5},
    },
    "the first pattern that hits": {
        "target_modules": ATTENTION,
        "rank_pattern": {r".*\.1\.self_attn\.q_proj": 3, "^model.layers.1.self_attn.q_proj": 6, "q_proj": 2},
    },
    "rsLoRA": {"target_modules": ATTENTION, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"o_proj": 3},
               "use_rslora": True},
    "all biases": {"target_modules": ATTENTION, "bias": "all"},
    "biases of adapted layers": {"target_modules": ATTENTION, "bias": "lora_only"},
    "head": {"target_modules": ATTENTION, "modules_to_save": ["lm_head"]},
    "embedding": {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens"]},
    "both, and norms": {"target_modules": ATTENTION, "modules_to_save": ["embed_tokens", "lm_head", "norm"]},
    "a module with a bias, and all biases": {
        "target_modules": ["q_proj"], "modules_to_save": ["self_attn.o_proj"], "bias": "all",
    },
    "all at once": {
        "target_modules": ATTENTION, "modules_to_save": ["lm_head"], "bias": "lora_only", "use_rslora": True,
        "rank_pattern": {"layers.0.self_attn.v_proj": 1}, "alpha_pattern": {"q_proj": 9},
    },
}  # fmt: skip


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
def config(request: pytest.FixtureRequest) -> dict[str, object]:
    return request.param


def test_what_peft_wrote_opens_in_ours_with_the_same_logits_and_leaves_as_it_came(tmp_path, config):
    theirs = in_peft(llama(), **config)
    theirs.save_pretrained(tmp_path)
    ours = llama()
    before, plain = bits(ours), logits(ours)
    load_adapter(ours, tmp_path)

    assert (logits(ours) - plain).abs().max() > 0.01
    torch.testing.assert_close(logits(ours), logits(theirs), **CLOSE)
    remove(ours)
    assert_same_bits(ours, before)
    assert torch.equal(logits(ours), plain)


def test_what_ours_writes_back_has_pefts_tensors_and_gives_the_same_logits_in_peft(tmp_path, config):
    theirs = in_peft(llama(), **config)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = llama()
    load_adapter(ours, tmp_path / "theirs")
    save_adapter(ours, tmp_path / "ours")
    again = PeftModel.from_pretrained(llama(), tmp_path / "ours").eval()
    first, second = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("theirs", "ours"))
    unused = {name for name in first if ".original_module." in name or ".modules_to_save." in name}

    assert second.keys() == first.keys() - unused
    assert all(torch.equal(second[name], first[name]) for name in second)
    torch.testing.assert_close(logits(again), logits(theirs), **CLOSE)


def test_the_tensor_file_is_pefts_byte_for_byte_but_for_the_hash_of_the_config(tmp_path):
    in_peft(llama(), **CONFIGS["all at once"]).save_pretrained(tmp_path / "theirs")
    ours = llama()
    load_adapter(ours, tmp_path / "theirs")
    save_adapter(ours, tmp_path / "ours")
    first, second = ((tmp_path / side / "adapter_model.safetensors").read_bytes() for side in ("theirs", "ours"))
    added = re.compile(rb'"config_sha256":"[0-9a-f]{64}",')
    without, count = added.subn(b"", second[8:])

    assert count == 1
    assert without.split(b"}}", 1)[0] == first[8:].split(b"}}", 1)[0]
    assert second[8 + int.from_bytes(second[:8], "little") :] == first[8 + int.from_bytes(first[:8], "little") :]


@pytest.mark.parametrize("which", ["all", "lora_only"])
def test_biases_and_modules_that_ours_trained_open_in_peft(tmp_path, which):
    ours = llama()
    inject(ours, "q_proj", lambda base: lora_layer(base, r=4, alpha=6))
    inject(ours, re.compile(r"model\.layers\.0\.self_attn\.v_proj"), lambda base: lora_layer(base, r=2, alpha=1))
    inject(ours, re.compile(r"model\.layers\.1\.self_attn\.v_proj"), lambda base: lora_layer(base, r=3, alpha=1))
    train_biases(ours, which)
    train_modules(ours, ["lm_head"])
    randomize(ours)
    save_adapter(ours, tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    theirs = PeftModel.from_pretrained(llama(), tmp_path).eval()
    trained = {name for name, p in ours.named_parameters() if p.requires_grad and name.endswith("bias")}

    assert (written["bias"], written["modules_to_save"]) == (which, ["lm_head"])
    assert len(trained) == {"all": 14, "lora_only": 4}[which]
    torch.testing.assert_close(logits(theirs), logits(ours), **CLOSE)


def test_our_decoder_computes_with_biases_and_a_head_of_its_own_what_peft_computes(tmp_path):
    config = {
        "target_modules": ["q_proj", "o_proj", "down_proj"], "bias": "all", "modules_to_save": ["lm_head"],
        "rank_pattern": {"layers.1.mlp.down_proj": 2},
    }  # fmt: skip
    theirs = in_peft(decoder(), **config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT does not know this model's embeddings
        theirs.save_pretrained(tmp_path)
    ours = decoder()
    before = bits(ours)
    load_adapter(ours, tmp_path, train_replaced=True)

    torch.testing.assert_close(logits(ours), logits(theirs), **CLOSE)
    ours(TOKENS).square().mean().backward()
    theirs(TOKENS).square().mean().backward()
    wanted = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    q = "model.layers.0.self_attn.q_proj"
    pairs = {
        f"{q}.base.bias": f"{q}.base_layer.bias",
        "model.layers.1.self_attn.k_proj.bias": "model.layers.1.self_attn.k_proj.bias",
        "lm_head.weight": "lm_head.modules_to_save.default.weight",
    }
    for mine, other in pairs.items():
        grad = wanted[f"base_model.model.{other}"]
        torch.testing.assert_close(ours.get_parameter(mine).grad, grad, rtol=1e-4, atol=1e-6)
    remove(ours)
    assert_same_bits(ours, before)


def test_a_classifiers_score_is_read_though_peft_names_modules_that_are_not_there(tmp_path):
    theirs = in_peft(llama(kind=LlamaForSequenceClassification), target_modules=ATTENTION, task_type="SEQ_CLS")
    theirs.save_pretrained(tmp_path)
    ours = llama(kind=LlamaForSequenceClassification)
    load_adapter(ours, tmp_path)

    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["classifier", "score"]
    torch.testing.assert_close(logits(ours), logits(theirs), **CLOSE)


def bert() -> BertForMaskedLM:
    torch.manual_seed(2)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    model = BertForMaskedLM(BertConfig(vocab_size=99, **sizes)).eval()
    nn.init.normal_(model.cls.predictions.bias)
    return model


def test_a_bias_that_is_tied_to_another_stays_so_as_in_peft(tmp_path):
    theirs = in_peft(bert(), target_modules=["query"], bias="all")
    theirs.save_pretrained(tmp_path / "theirs")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is untied
        loaded, trained = bert(), bert()
        load_adapter(loaded, tmp_path / "theirs", train_replaced=True)
        inject(trained, ["query"], lambda base: lora_layer(base, r=2, alpha=2))
        train_biases(trained, "all")
    heads = [theirs.base_model.model.cls.predictions, loaded.cls.predictions, trained.cls.predictions]

    assert [head.bias is head.decoder.bias and head.bias.requires_grad for head in heads] == [True] * 3
    torch.testing.assert_close(logits(loaded), logits(theirs), **CLOSE)
    save_adapter(loaded, tmp_path / "ours", task_type=None)
    first, second = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("theirs", "ours"))
    assert second.keys() == first.keys()
    assert all(torch.equal(second[name], first[name]) for name in second)
    remove(loaded)
    assert loaded.cls.predictions.bias is loaded.cls.predictions.decoder.bias


def test_a_tied_bias_that_has_two_values_in_a_file_is_untied_with_a_warning(tmp_path):
    in_peft(bert(), target_modules=["query"], bias="all").save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.cls.predictions.bias"] += 1
    save_file(tensors, path)
    model = bert()
    with pytest.warns(UserWarning, match=r"cls.predictions.* was one tensor with .*untied now"):
        load_adapter(model, tmp_path)
    assert torch.equal(model.cls.predictions.decoder.bias, tensors["base_model.model.cls.predictions.decoder.bias"])


@pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]])
def test_tied_embeddings_are_untied_as_in_peft_with_a_warning_and_tied_again_by_remove(tmp_path, saved):
    theirs = in_peft(llama(tied=True), target_modules=ATTENTION, modules_to_save=saved)
    theirs.save_pretrained(tmp_path)
    ours = llama(tied=True)
    before = bits(ours)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    with pytest.warns(UserWarning, match="was one tensor with .* they are untied now"):
        load_adapter(ours, tmp_path)

    assert ours.lm_head.weight is not ours.model.embed_tokens.weight
    torch.testing.assert_close(logits(ours), logits(theirs), **CLOSE)
    remove(ours)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    assert_same_bits(ours, before)


def test_an_mlx_lm_adapter_gives_its_own_values_in_peft(tmp_path):
    names = [f"model.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qv"]
    base, scale = llama(), 3.7
    widths = {name: base.get_submodule(name).weight.shape for name in names}
    tensors = {f"{name}.lora_a": torch.randn(widths[name][1], 3) for name in names}
    tensors |= {f"{name}.lora_b": torch.randn(3, widths[name][0]) for name in names}
    save_file(tensors, tmp_path / "adapters.safetensors")
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 3, "scale": scale, "dropout": 0.0}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    convert(tmp_path, tmp_path / "out")
    theirs, ours = PeftModel.from_pretrained(llama(), tmp_path / "out").eval(), llama()
    load_adapter(ours, tmp_path / "out")
    x = torch.randn(2, 32)

    torch.testing.assert_close(logits(theirs), logits(ours), **CLOSE)
    for name in names:
        y = base.get_submodule(name)(x) + scale * ((x @ tensors[f"{name}.lora_a"]) @ tensors[f"{name}.lora_b"])
        # sums of 32 products in another order: a few roundings of the largest term, about 30
        torch.testing.assert_close(theirs.base_model.model.get_submodule(name)(x), y, rtol=1e-5, atol=1e-5)


# --- patterns, against PEFT's own function

NAMES = ["q_proj", "model.q_proj", "model.layers.0.q_proj", "model.layers.10.q_proj", "xq_proj",
         "model.layers.0.xq_proj", "layers.0.q_proj", "modelXlayers.0.q_proj", "layers.0.self-attn.v_proj"]  # fmt: skip
PIECES = [
    "q_proj",
    "model",
    "layers",
    "0",
    "10",
    ".",
    r"\.",
    ".*",
    r".*\.",
    "^",
    "$",
    "x",
    r"\-",
    "v_proj",
    "self-attn",
]


@settings(max_examples=600, deadline=None)
@given(st.lists(st.lists(st.sampled_from(PIECES), min_size=1, max_size=7).map("".join), max_size=3, unique=True))
def test_a_pattern_that_is_read_hits_what_it_hits_in_peft(texts):
    try:
        patterns = {parse_pattern(text): text for text in texts}
    except ValueError:
        return  # refused: never read in another way
    for name in NAMES:
        theirs = get_pattern_key(texts, name)
        assert resolve(patterns, name, name) == theirs


names = st.lists(st.sampled_from(["a", "b", "q", "q_proj", "0", "x+y", "1"]), min_size=1, max_size=4).map(".".join)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(names, st.integers(1, 3), min_size=1))
def test_patterns_that_ours_writes_give_every_layer_its_own_value_in_peft(values):
    default, patterns = describe(values)

    for name, value in values.items():
        for ordered in (list(patterns), sorted(patterns)):
            assert patterns.get(get_pattern_key(ordered, name), default) == value


def test_a_file_whose_patterns_peft_put_in_another_order_is_refused_by_both(tmp_path):
    # the first pattern that hits decides, but PEFT sorts a config's keys when it writes them
    patterns = {"q_proj": 2, r"layers\.0\.self_attn\.q_proj": 6}
    in_peft(llama(), target_modules=ATTENTION, rank_pattern=patterns).save_pretrained(tmp_path)

    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(llama(), tmp_path)
    with pytest.raises(ValueError, match=r"q_proj.lora_A.weight: its r is 2, the config gives this layer 6"):
        load_adapter(llama(), tmp_path)


def test_a_pattern_beyond_the_forms_that_are_read_is_refused(tmp_path: Path):
    in_peft(llama(), target_modules=ATTENTION, rank_pattern={r"layers\.\d+\.self_attn\.(q|v)_proj": 2}).save_pretrained(
        tmp_path
    )
    with pytest.raises(ValueError, match=r"rank_pattern\[.*\]: a \\ before 'd' means more than the character"):
        load_adapter(llama(), tmp_path)


def test_layers_that_differ_in_rank_are_layers_of_the_rank_that_their_tensors_have(tmp_path):
    config = CONFIGS["ranks and alphas by whole name"]
    theirs = in_peft(llama(), **config)
    theirs.save_pretrained(tmp_path)
    ours = llama()
    load_adapter(ours, tmp_path)
    found = {name: (layer.r, layer.alpha, layer.scaling) for name, layer in adapter_layers(ours).items()}
    modules = {n: m for n, m in theirs.base_model.model.named_modules() if hasattr(m, "lora_A")}

    assert found == {n: (m.r["default"], m.lora_alpha["default"], m.scaling["default"]) for n, m in modules.items()}
