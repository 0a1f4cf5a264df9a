"""Houlsby's adapters against their equation, and in models of transformers."""

import pytest
import torch
import torch.nn.functional as F
from edit_config import edit_config
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_dora import BASES
from test_ia3 import llama
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from minilora.llm.architectures import ARCHITECTURES
from minilora.llm.sizes import houlsby_params
from minilora.methods import HoulsbyLinear, IA3Linear, load_houlsby, load_ia3, save_houlsby
from minilora.qlora import NF4Linear
from minilora.torch_lora import LoRALinear, inject, load_adapter, merged, remove
from minilora.torch_lora.inject import adapter_layers
from minilora.torch_lora.merging import merge_model
from minilora.torch_lora.train_whole import train_biases, train_modules

NAMES = ["W_down", "b_down", "W_up", "b_up"]
SQRT_2_OVER_PI = (2 / torch.pi) ** 0.5
FORMULAS = {
    "gelu": lambda u: u * 0.5 * (1 + torch.tanh(SQRT_2_OVER_PI * (u + 0.044715 * u**3))),  # the authors' code
    "relu": lambda u: u * (u > 0),
    "silu": lambda u: u / (1 + torch.exp(-u)),
}


@pytest.fixture(params=BASES)
def base(request):
    return BASES[request.param]()


def trained(base: nn.Module, **settings) -> HoulsbyLinear:
    """A layer in which all is noise."""
    layer = HoulsbyLinear(base, **({"bottleneck": 3} | settings))
    for tensor in layer.adapter_tensors().values():
        nn.init.normal_(tensor)
    return layer


def as_the_paper_has_it(layer: HoulsbyLinear, h: torch.Tensor, W_down, b_down, W_up, b_up) -> torch.Tensor:
    return h + FORMULAS[layer.nonlinearity](h @ W_down.T + b_down) @ W_up.T + b_up


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_layer_changes_no_bit(base, dtype):
    base, x = base.to(dtype), torch.randn(2, 5, 12, dtype=dtype)
    assert torch.equal(HoulsbyLinear(base, bottleneck=3)(x), base(x))


def test_a_layer_freezes_its_base_and_nothing_where_it_is_refused():
    base = nn.Linear(12, 8)
    with pytest.raises(ValueError, match="bottleneck"):
        HoulsbyLinear(base, bottleneck=0)
    assert all(p.requires_grad for p in base.parameters())
    layer = HoulsbyLinear(base, bottleneck=3)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == NAMES


def test_it_begins_with_the_papers_numbers_and_a_zero():
    layer = HoulsbyLinear(nn.Linear(12, 500), bottleneck=400, generator=torch.Generator().manual_seed(3))
    again = HoulsbyLinear(nn.Linear(12, 500), bottleneck=400, generator=torch.Generator().manual_seed(3))
    W_down = layer.W_down.detach()
    assert torch.equal(W_down, again.W_down)
    assert not any(layer.adapter_tensors()[name].any() for name in ("b_down", "W_up", "b_up"))
    assert W_down.abs().max() <= 0.02  # two standard deviations
    # A normal distribution cut there has 0.8796 of the standard deviation; 200,000 draws are within 1 % of it.
    assert W_down.std().item() == pytest.approx(0.8796e-2, rel=0.01)
    assert abs(W_down.mean().item()) < 1e-4  # 5 standard errors


@pytest.mark.parametrize("nonlinearity", FORMULAS)
def test_outputs_and_gradients_are_the_papers(base, nonlinearity):
    layer, x = trained(base, nonlinearity=nonlinearity), torch.randn(2, 5, 12, requires_grad=True)
    wanted = [x, *layer.adapter_tensors().values()]
    ours, theirs = layer(x), as_the_paper_has_it(layer, base(x), *wanted[1:])
    dy = torch.randn_like(ours)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)  # sums of 12 products in float32
    grads = [torch.autograd.grad(y, wanted, dy) for y in (ours, theirs)]
    for mine, its in zip(*grads, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [make for kind, make in BASES.items() if kind != "4 bits"])  # that is float32
def test_gradients_are_those_of_finite_differences(make):
    layer = trained(make()).double()
    x = torch.randn(4, 12, dtype=torch.float64, requires_grad=True)

    def run(x, *tensors):
        return torch.func.functional_call(layer, dict(zip(NAMES, tensors, strict=True)), x)

    assert torch.autograd.gradcheck(run, (x, *layer.adapter_tensors().values()))


def test_it_cannot_merge_and_says_so_over_any_base(base):
    layer = trained(base)
    model = nn.Sequential(layer)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def reads_weight():
        return F.linear(torch.randn(1, 12), layer.weight)

    def in_a_with():
        with merged(model):
            pass

    for merge in (layer.merge, layer.fused, layer.delta_weight, reads_weight, in_a_with, lambda: merge_model(model)):
        with pytest.raises(TypeError, match=r"cannot merge a HoulsbyLinear: gelu .* or train LoRA or IA³, which merge"):
            merge()
    assert not layer.is_merged
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_what_cannot_be_is_refused():
    base = nn.Linear(4, 4)
    for bottleneck in (0, -1, True):
        with pytest.raises(ValueError, match="bottleneck is"):
            HoulsbyLinear(base, bottleneck=bottleneck)
    with pytest.raises(ValueError, match="no nonlinearity 'tanh' here: choose one of"):
        HoulsbyLinear(base, nonlinearity="tanh")
    with pytest.raises(TypeError, match="HoulsbyLinear wraps a linear layer or GPT-2's Conv1D; this is a LayerNorm"):
        HoulsbyLinear(nn.LayerNorm(4))
    with pytest.raises(ValueError, match="wrapped already"):
        HoulsbyLinear(LoRALinear(base, r=2, alpha=4))


# --- in a model

SMALL = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
OF_T5 = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
MODELS = {
    "llama": (lambda: LlamaForCausalLM(LlamaConfig(**SMALL)), ["o_proj", "down_proj"]),
    "gpt2": (lambda: GPT2LMHeadModel(GPT2Config(vocab_size=99, n_layer=2, n_head=4, n_embd=32)), ["c_proj"]),
    "t5": (lambda: T5ForConditionalGeneration(T5Config(**OF_T5)), ["o", "wo"]),  # reads wo.weight.dtype
}
TOKENS = torch.arange(2, 26).reshape(2, 12)


def logits(model: nn.Module) -> torch.Tensor:
    given = {"decoder_input_ids": TOKENS} if isinstance(model, T5ForConditionalGeneration) else {}
    return model(input_ids=TOKENS, **given).logits


@pytest.fixture(params=MODELS)
def model_and_targets(request):
    make, targets = MODELS[request.param]
    return make().eval(), targets


def adapted() -> LlamaForCausalLM:
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**SMALL)).eval()
    inject(model, ["o_proj", "down_proj"], lambda base: trained(base, nonlinearity="silu"))
    return model


def plain() -> LlamaForCausalLM:
    model = adapted()
    remove(model)
    return model


def test_it_stands_where_the_paper_has_it_before_the_residual_is_added():
    model, x = adapted(), torch.randn(1, 6, 32)
    block = model.model.layers[0]
    mlp, seen = block.mlp, {}
    block.post_attention_layernorm.register_forward_pre_hook(lambda module, args: seen.update(residual=args[0]))
    mlp.register_forward_pre_hook(lambda module, args: seen.update(x=args[0]))
    positions = model.model.rotary_emb(x, torch.arange(6)[None])
    out = block(x, position_embeddings=positions)
    out = out[0] if isinstance(out, tuple) else out
    layer = mlp.down_proj
    h = layer.base(mlp.act_fn(mlp.gate_proj(seen["x"])) * mlp.up_proj(seen["x"]))
    wanted = seen["residual"] + as_the_paper_has_it(layer, h, *layer.adapter_tensors().values())
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-4)


def test_only_its_own_train_and_removing_gives_the_base_back(model_and_targets):
    model, targets = model_and_targets
    model.requires_grad_(False)  # first: torch multiplies by other kernels where parameters train
    before, modules = logits(model), dict(model.named_modules())
    inject(model, targets, lambda base: HoulsbyLinear(base, bottleneck=4))
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[2] for name in trains} == set(NAMES)
    assert len(trains) == 4 * len(adapter_layers(model))
    assert torch.equal(logits(model), before)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # W_down has no gradient while W_up is zero
        optimizer.zero_grad()
        logits(model).square().sum().backward()
        optimizer.step()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
    assert not torch.equal(logits(model), before)
    remove(model)
    assert torch.equal(logits(model), before)
    assert dict(model.named_modules()) == modules


@pytest.mark.parametrize(("name", "m"), [("llama-2-7b", 64), ("llama-3-8b", 16)])
def test_a_block_trains_two_times_what_the_paper_counts(name, m):
    arch, model = ARCHITECTURES[name], llama(name)
    report = inject(model, ["o_proj", "down_proj"], lambda base: HoulsbyLinear(base, bottleneck=m))
    d = arch.hidden
    assert report.count.trainable == arch.n_layers * 2 * (2 * m * d + d + m)  # [Houlsby] section 2.1
    assert report.count.trainable == houlsby_params(arch, m)


# --- files


def test_files_come_back_with_the_layer_norms_that_train(tmp_path):
    model = adapted()
    there = plain()
    train_modules(model, ["input_layernorm", "post_attention_layernorm"])
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm" and module.weight.requires_grad:
            nn.init.uniform_(module.weight, 0.5, 1.5)
    save_houlsby(model, tmp_path, base_name="some/base", base_sha256="a" * 64)
    before = logits(there)
    with pytest.warns(UserWarning, match="another model"):
        load_houlsby(there, tmp_path, base_sha256="b" * 64)
    assert torch.equal(logits(there), logits(model))
    nn.init.zeros_(there.model.layers[0].mlp.down_proj.W_up)
    load_houlsby(there, tmp_path)  # into the layers that are there
    assert torch.equal(logits(there), logits(model))
    remove(there)
    assert torch.equal(logits(there), before)


def test_files_come_back_over_4_bits(base, tmp_path):
    model, x = nn.Sequential(nn.Identity(), base), torch.randn(5, 12)
    inject(model, ["1"], trained)
    live = model(x)
    save_houlsby(model, tmp_path)
    remove(model)
    load_houlsby(model, tmp_path)
    assert torch.equal(model(x), live)
    if isinstance(base, NF4Linear):
        with pytest.warns(UserWarning, match="stored as nf4"):
            load_houlsby(nn.Sequential(nn.Identity(), nn.Linear(12, 8)), tmp_path)


def test_other_readers_stop_at_its_file(tmp_path):
    save_houlsby(adapted(), tmp_path)
    with pytest.raises(KeyError, match="HOULSBY"):
        PeftModel.from_pretrained(plain(), tmp_path)
    with pytest.raises(ValueError, match="peft_type = 'HOULSBY': this reader knows 'LORA'"):
        load_adapter(plain(), tmp_path)
    with pytest.raises(ValueError, match="has the peft_type 'HOULSBY', not 'IA3'"):
        load_ia3(plain(), tmp_path)


def test_what_the_file_has_no_words_for_is_not_saved(tmp_path):
    mixed = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    inject(mixed, ["0"], lambda base: HoulsbyLinear(base, bottleneck=2))
    inject(mixed, ["1"], lambda base: HoulsbyLinear(base, bottleneck=2, nonlinearity="relu"))
    with pytest.raises(ValueError, match="differ in their nonlinearity"):
        save_houlsby(mixed, tmp_path)
    mixed[1] = IA3Linear(mixed[1].base)
    with pytest.raises(ValueError, match="1 is a IA3Linear"):
        save_houlsby(mixed, tmp_path)
    biased = nn.Sequential(nn.Linear(4, 4))
    inject(biased, ["0"], lambda base: HoulsbyLinear(base, bottleneck=2))
    train_biases(biased)
    with pytest.raises(ValueError, match="biases train beside this adapter"):
        save_houlsby(biased, tmp_path)
    assert not list(tmp_path.iterdir())


KEY = "base_model.model.model.layers.1.mlp.down_proj."
BROKEN = {
    "one missing": (lambda t: t.pop(f"{KEY}b_up"), r"down_proj: has \['W_down', 'W_up', 'b_down'\], .* are needed"),
    "no such layer": (lambda t: t.update({"base_model.model.wo.W_up": torch.ones(3)}), "no linear layer of that name"),
    "bottleneck": (lambda t: t.update({f"{KEY}b_down": torch.ones(5)}), r"W_up has the shape \(32, 3\), \(32, 5\) is"),
    "no bottleneck": (lambda t: t.update({f"{KEY}b_down": torch.ones(0)}), r"b_down has the shape \(0,\)"),
    "transposed": (lambda t: t.update({f"{KEY}W_up": torch.ones(3, 32)}), r"W_up has the shape \(3, 32\), \(32, 3\)"),
    "infinite": (lambda t: t[f"{KEY}W_up"].fill_(torch.inf), "W_up: not finite floats"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_file_that_does_not_fit_changes_nothing(what, tmp_path):
    change, says = BROKEN[what]
    save_houlsby(adapted(), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    for model in (adapted(), plain()):
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(ValueError, match=says):
            load_houlsby(model, tmp_path)
        assert model.state_dict().keys() == before.keys()
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"nonlinearity": "tanh"}, "nonlinearity = 'tanh': one of"),
        ({"nonlinearity": ["gelu"]}, "nonlinearity = .*: one of"),
        ({"nonlinearity": None}, "nonlinearity = 'None': one of"),
        ({"scaling": 4.0}, "'scaling': not a key this reader knows"),
        ({"peft_type": None}, "has the peft_type None, not 'HOULSBY'"),
    ],
)
def test_a_config_that_asks_for_something_else_is_refused(change, says, tmp_path):
    save_houlsby(adapted(), tmp_path)
    edit_config(tmp_path, **change)
    model = plain()
    with pytest.raises(ValueError, match=says):
        load_houlsby(model, tmp_path)
    assert not adapter_layers(model)


def test_other_layers_in_the_model_are_refused(tmp_path):
    save_houlsby(adapted(), tmp_path)
    model = plain()
    inject(model, ["o_proj", "down_proj"], lambda base: HoulsbyLinear(base, bottleneck=3))
    with pytest.raises(ValueError, match=r"with \(3, 'gelu'\) is here, the file has .* = \(3, 'silu'\)"):
        load_houlsby(model, tmp_path)
