"""Folders of 4-bit weights travel both ways between transformers with bitsandbytes and us, byte for byte.

Weights are compared as numbers: where bitsandbytes' CPU kernel meets FP4's code 8 in a weight with an even number of
columns, it gives −0, although its own table says +0.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers as tf
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from safetensors.torch import load_file
from torch import nn

from minilora.llm.load import load_model
from minilora.qlora import FP4, NF4Linear, QLoRALinear
from minilora.torch_lora import LoRALinear, inject, remove
from minilora.train.bnb_folder import load_4_bit, save_4_bit

TOKENS = torch.arange(24).reshape(2, 12)
TOKENIZER = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Case:
    """What a published folder may differ in."""

    kind: str = "nf4"
    double: bool = True
    dtype: torch.dtype = BF16
    family: str = "Llama"
    storage: torch.dtype = torch.uint8
    skip: tuple[str, ...] | None = None  # None: the head
    tied: bool = False
    shards: bool = False
    intermediate: int = 75  # 66 · 75 weights: a short last block; and an odd number of columns


CASES = {
    "nf4 double bf16": Case(),
    "nf4 double fp16": Case(dtype=FP16),
    "nf4 double fp32": Case(dtype=FP32),
    "nf4 bf16": Case(double=False),
    "nf4 fp32": Case(double=False, dtype=FP32),
    "fp4 double bf16": Case(kind="fp4"),
    "fp4 fp16": Case(kind="fp4", double=False, dtype=FP16),
    "fp4 fp32": Case(kind="fp4", double=False, dtype=FP32),
    "tied": Case(tied=True),
    "biases": Case(family="Qwen2"),
    "mistral": Case(family="Mistral"),
    "some layers in floats": Case(skip=("lm_head", "model.layers.1.mlp")),
    "the head in 4 bits": Case(skip=()),
    "bytes as bf16": Case(storage=BF16, intermediate=76),
    "bytes as fp16": Case(storage=FP16, dtype=FP16, intermediate=76, double=False),
    "in several files": Case(shards=True),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def write_plain(case: Case, folder: Path) -> Path:
    """A folder of floats."""
    torch.manual_seed(1)
    more = {"sliding_window": None} if case.family == "Mistral" else {}
    config = getattr(tf, f"{case.family}Config")(
        vocab_size=99, hidden_size=66, intermediate_size=case.intermediate, num_hidden_layers=2, num_attention_heads=3,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=case.tied, **more,
    )  # fmt: skip
    model = getattr(tf, f"{case.family}ForCausalLM")(config).to(case.dtype)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    return folder


def write_theirs(case: Case, folder: Path) -> Path:
    """A folder as people publish it."""
    settings = tf.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=case.kind, bnb_4bit_use_double_quant=case.double,
        bnb_4bit_compute_dtype=case.dtype, bnb_4bit_quant_storage=case.storage,
        llm_int8_skip_modules=None if case.skip is None else list(case.skip),
    )  # fmt: skip
    plain = write_plain(case, folder / "plain")
    model = tf.AutoModelForCausalLM.from_pretrained(plain, quantization_config=settings, dtype=case.dtype)
    model.save_pretrained(folder / "theirs", max_shard_size="20KB" if case.shards else "1GB")
    (folder / "theirs/tokenizer.json").write_text(json.dumps(TOKENIZER))
    assert (folder / "theirs/model.safetensors.index.json").exists() == case.shards
    return folder / "theirs"


def their_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every weight of a folder as transformers and bitsandbytes load it: 4 bits dequantized, floats as they are."""
    model = tf.AutoModelForCausalLM.from_pretrained(folder)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    in_4_bits = {f"{n}.weight": m.weight for n, m in model.named_modules() if isinstance(m, Linear4bit)}
    return weights | {name: dequantize_4bit(w.data, w.quant_state) for name, w in in_4_bits.items()}


def our_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    dtype = model.model.embed_tokens.weight.dtype
    layers = {f"{n}.weight": m for n, m in model.named_modules() if isinstance(m, NF4Linear)}
    return dict(model.named_parameters()) | {name: layer.dense_weight(dtype) for name, layer in layers.items()}


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def assert_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [n for n, t in first.items() if t.dtype != second[n].dtype or not torch.equal(t, second[n])] == []


def test_their_folder_gives_the_weights_that_they_load(tmp_path, case):
    folder = write_theirs(case, tmp_path)
    model, tokenizer = load_4_bit(folder)
    layers = [name for name, layer in model.named_modules() if isinstance(layer, NF4Linear)]

    assert len(layers) == {None: 14, (): 15}.get(case.skip, 11)
    assert_equal(our_weights(model), their_weights(folder))
    assert tokenizer.encode("ab") == [0, 1]
    assert not model.training


def test_their_folder_written_again_is_byte_for_byte_theirs(tmp_path, case):
    folder = write_theirs(case, tmp_path)
    model, _ = load_4_bit(folder)
    save_4_bit(model, tmp_path / "ours", like=folder, storage=case.storage)
    theirs, ours = all_tensors(folder), all_tensors(tmp_path / "ours")

    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        assert ours[name].view(torch.uint8).equal(tensor.view(torch.uint8)), name


def test_our_folder_gives_them_the_weights_that_we_have(tmp_path, case):
    plain = write_plain(case, tmp_path / "plain")
    model, _ = load_model(plain, dtype=case.dtype)
    for name, layer in list(model.named_modules()):
        skipped = name == "lm_head" if case.skip is None else name.startswith(case.skip)
        if isinstance(layer, nn.Linear) and not (case.skip != () and skipped):
            codebook = {"codebook": FP4} if case.kind == "fp4" else {}
            model.set_submodule(name, NF4Linear(layer, double=case.double, **codebook))
    save_4_bit(model, tmp_path / "ours", like=plain, storage=case.storage)

    assert_equal(our_weights(model), their_weights(tmp_path / "ours"))
    assert_equal(our_weights(model), our_weights(load_4_bit(tmp_path / "ours")[0]))
    written = json.loads((tmp_path / "ours/config.json").read_text())["quantization_config"]
    assert (written["bnb_4bit_quant_type"], written["bnb_4bit_use_double_quant"]) == (case.kind, case.double)
    assert getattr(torch, written["bnb_4bit_quant_storage"]) == case.storage


def test_logits_are_theirs(tmp_path):
    """In float32: the same weights, the same sums in another order. (Of their weights, not of their layers: the CPU
    kernel of bitsandbytes 0.50 multiplies by sizes that 32 divides.)"""
    folder = write_theirs(Case(dtype=FP32), tmp_path)
    model, _ = load_4_bit(folder)
    peer = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=FP32).eval()
    peer.load_state_dict(their_weights(folder))
    with torch.no_grad():
        expected, logits = peer(TOKENS).logits, model(TOKENS)

    assert logits.abs().max() > 0.1
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def test_a_base_that_was_trained_over_goes_back_as_it_came(tmp_path):
    folder = write_theirs(Case(), tmp_path)
    model, _ = load_4_bit(folder)
    inject(model, "all-linear", lambda base: QLoRALinear(base, r=2, alpha=4))
    model(TOKENS).float().square().mean().backward()
    with pytest.raises(ValueError, match=r"this model has adapters: save them with save_adapter, and take them off"):
        save_4_bit(model, tmp_path / "ours", like=folder)
    assert not (tmp_path / "ours").exists()
    remove(model)
    save_4_bit(model, tmp_path / "ours", like=folder)

    assert_equal(all_tensors(tmp_path / "ours"), all_tensors(folder))


@pytest.mark.parametrize("kind", [Linear8bitLt, Linear4bit])
def test_layers_of_bitsandbytes_itself_are_refused_with_the_way_to_read_them(kind):
    """They are nn.Linear: an adapter was merged into the codes of 8 bits, and the report said that all had arrived."""
    options = {"has_fp16_weights": False} if kind is Linear8bitLt else {}
    model = nn.Sequential(kind(64, 64, **options).to("cpu"))
    before = model[0].weight
    with pytest.raises(TypeError, match=r"codes in its weight .*load_4_bit") as caught:
        inject(model, "all-linear", lambda base: LoRALinear(base, r=2, alpha=2))

    assert caught.value.__notes__ == ["while 0 was wrapped"]
    assert model[0].weight is before
