"""IA³ against its equation, formed whole, and against PEFT in test_ia3_against_peft."""

import json
import warnings

import pytest
import torch
import torch.nn.functional as F
from edit_config import edit_config
from safetensors.torch import load_file, save_file
from test_dora import BASES, Conv1D
from torch import nn

from minilora.llm import Decoder, ModelConfig
from minilora.llm.architectures import ARCHITECTURES
from minilora.llm.sizes import ia3_params
from minilora.methods import HoulsbyLinear, IA3Linear, inject_ia3, load_ia3, save_ia3
from minilora.qlora import NF4Linear
from minilora.qlora.merging import merge_into_4_bits
from minilora.torch_lora import LoRALinear, inject, load_adapter, merged, remove, save_adapter
from minilora.torch_lora.adapter_layer import dense_weight
from minilora.torch_lora.inject import adapter_layers, count_parameters
from minilora.torch_lora.merging import MergeReport, merge_model, merged_state
from minilora.torch_lora.train_whole import train_biases, train_modules


@pytest.fixture(params=BASES)
def base(request):
    return BASES[request.param]()


@pytest.fixture(params=["output", "input"])
def scales(request):
    return request.param


def trained(base: nn.Module, scales: str = "output") -> IA3Linear:
    """A layer in which l is noise around one."""
    layer = IA3Linear(base, scales=scales)
    nn.init.uniform_(layer.l, 0.5, 1.5)
    return layer


def as_the_paper_has_it(layer: IA3Linear, x: torch.Tensor, l: torch.Tensor) -> torch.Tensor:
    """[IA3] section 3.3 in one layer, with the weight as floats."""
    W = dense_weight(layer.base, torch.float32)
    W = W.T if layer.stores_in_by_out else W
    return F.linear(l * x, W, layer.base.bias) if layer.scales == "input" else l * F.linear(x, W, layer.base.bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_layer_changes_no_bit(base, scales, dtype):
    x = torch.randn(2, 5, 12, dtype=dtype)
    base = base.to(dtype)
    assert torch.equal(IA3Linear(base, scales=scales)(x), base(x))
    assert base(x).dtype == dtype


def test_a_layer_freezes_its_base_and_nothing_where_it_is_refused(scales):
    base = nn.Linear(12, 8)
    with pytest.raises(ValueError, match="scales"):
        IA3Linear(base, scales="rows")
    assert all(p.requires_grad for p in base.parameters())
    layer = IA3Linear(base, scales=scales)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["l"]


def test_outputs_and_gradients_are_the_papers(base, scales):
    layer, x = trained(base, scales), torch.randn(2, 5, 12, requires_grad=True)
    ours, theirs = layer(x), as_the_paper_has_it(layer, x, layer.l)
    dy = torch.randn_like(ours)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)  # sums of 12 products in float32
    grads = [torch.autograd.grad(y, [x, layer.l], dy) for y in (ours, theirs)]
    for mine, its in zip(*grads, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [make for kind, make in BASES.items() if kind != "4 bits"])  # that is float32
def test_gradients_are_those_of_finite_differences(make, scales):
    layer = trained(make(), scales).double()
    x = torch.randn(4, 12, dtype=torch.float64, requires_grad=True)

    def run(x, l):
        return torch.func.functional_call(layer, {"l": l}, x)

    assert torch.autograd.gradcheck(run, (x, layer.l))


def test_a_factor_too_near_to_one_for_bfloat16_still_acts(scales):
    base = nn.Linear(12, 8).bfloat16()
    layer, x = IA3Linear(base, scales=scales), torch.randn(500, 12, dtype=torch.bfloat16)
    nn.init.constant_(layer.l, 1.003)  # in bfloat16 1.003 is 1
    wanted = base((1.003 * x.float()).bfloat16()) if scales == "input" else (1.003 * base(x).float()).bfloat16()
    assert torch.equal(layer(x), wanted)
    assert not torch.equal(layer(x), base(x))


# --- merging


def test_merging_gives_the_live_output_and_unmerging_the_same_parameters_and_bits(base, scales):
    layer, x = trained(base, scales), torch.randn(5, 12)
    live, state = layer(x), {name: tensor.clone() for name, tensor in base.state_dict().items()}
    if isinstance(base, NF4Linear):
        with pytest.raises(TypeError, match="does not store floats"):
            layer.merge()
    else:
        parameters = dict(base.named_parameters())
        layer.merge()
        torch.testing.assert_close(layer(x), live, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer.fused()(x), live, rtol=1e-5, atol=1e-5)
        layer.unmerge()
        assert all(parameter is parameters[name] for name, parameter in base.named_parameters())
    torch.testing.assert_close(layer.fused()(x), live, rtol=1e-5, atol=1e-5)
    assert {p.requires_grad for p in layer.fused().parameters()} == {False}
    assert all(torch.equal(tensor, state[name]) for name, tensor in base.state_dict().items())
    assert torch.equal(layer(x), live)


def test_merging_scales_the_bias_where_the_output_is_scaled_and_only_there(scales):
    base = nn.Linear(12, 8)
    layer, bias = trained(base, scales), base.bias
    with merged(layer):
        assert torch.equal(base.bias, layer.l * bias if scales == "output" else bias)
        assert (base.bias is bias) == (scales == "input")
    assert base.bias is bias
    assert layer.fused(torch.float64).bias.dtype == torch.float64


def test_a_merged_layer_that_is_moved_gives_back_copies_there():
    layer = trained(nn.Linear(12, 8))
    before = {name: p.detach().double() for name, p in layer.base.named_parameters()}
    layer.merge()
    layer.double()
    layer.unmerge()
    assert all(torch.equal(p, before[name]) for name, p in layer.base.named_parameters())


def test_the_update_is_what_merging_adds(base, scales):
    layer = trained(base, scales)
    W = dense_weight(base, torch.float32)
    torch.testing.assert_close(W + layer.delta_weight(), layer.merged_weight(torch.float32), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64])
def test_a_model_is_merged_for_good_with_its_biases(base, scales, dtype):
    model, x = nn.Sequential(nn.Linear(12, 12), base), torch.randn(5, 12)
    inject(model, ["1"], lambda base: trained(base, scales))
    live = model(x).detach()
    state = dict(merged_state(model, torch.float32, MergeReport("float32", {})))
    merge_model(model, dtype)
    x = x if dtype is None else x.to(dtype)
    torch.testing.assert_close(model(x), live.to(x.dtype), rtol=1e-5, atol=1e-5)
    assert not adapter_layers(model)
    assert {name: tensor.float() for name, tensor in model.state_dict().items()}.keys() == state.keys()
    assert all(torch.equal(tensor.float(), state[name]) for name, tensor in model.state_dict().items())


def test_merging_into_4_bits_scales_the_bias():
    model = nn.Sequential(nn.Linear(12, 8))
    inject(model, ["0"], trained)
    bias = (model[0].l * model[0].base.bias).detach()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what rounding takes
        merge_into_4_bits(model, allow_requantize=True)
    assert type(model[0]) is NF4Linear
    assert torch.equal(model[0].bias, bias)


def test_a_bias_that_trains_is_scaled_as_well():
    model, x = nn.Sequential(nn.Linear(12, 8)), torch.randn(5, 12)
    inject(model, ["0"], trained)
    train_biases(model)
    nn.init.normal_(model[0].base.bias)
    live = model(x)
    with merged(model):
        torch.testing.assert_close(model(x), live, rtol=1e-5, atol=1e-5)
    assert model[0].base.bias.requires_grad
    torch.testing.assert_close(model[0].fused()(x), live, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("where", ["weight", "bias"])
def test_what_is_not_finite_is_not_merged(where):
    base = nn.Linear(12, 8).half()
    layer = IA3Linear(base)
    nn.init.constant_(layer.l, torch.inf if where == "weight" else 1000.0)
    nn.init.constant_(base.bias, 1000.0)  # 1,000,000 is none in float16
    before = {name: p.clone() for name, p in base.named_parameters()}
    with pytest.raises(ValueError, match="NaN or infinite"):
        layer.merge()
    with pytest.raises(ValueError, match="finite"):
        merge_model(nn.Sequential(layer))
    assert not layer.is_merged
    assert all(torch.equal(p, before[name]) for name, p in base.named_parameters())


def test_who_reads_weight_and_bias_instead_of_calling_gets_the_scaled_ones(base, scales):
    layer, x = trained(base, scales), torch.randn(5, 12)
    W = layer.weight.T if layer.stores_in_by_out else layer.weight
    y = F.linear(x, W, layer.bias)
    torch.testing.assert_close(y, layer(x), rtol=1e-5, atol=1e-5)
    mine, its = (torch.autograd.grad(out.square().sum(), layer.l)[0] for out in (y, layer(x)))
    torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-4)  # sums of 5 · 12 · 8 products
    assert layer.weight.dtype == torch.float32
    if not isinstance(base, NF4Linear):
        layer.merge()
        assert layer.weight is base.weight
        assert layer.bias is base.bias


# --- in a model


def llama(name: str) -> Decoder:
    """The decoder of an architecture, without numbers."""
    arch = ARCHITECTURES[name]
    with torch.device("meta"):
        return Decoder(
            ModelConfig(
                vocab_size=arch.vocab,
                hidden_size=arch.hidden,
                intermediate_size=arch.intermediate,
                n_layers=arch.n_layers,
                n_heads=arch.n_heads,
                n_kv_heads=arch.n_kv_heads,
                head_dim=arch.head_dim,
            )
        )


@pytest.mark.parametrize(("name", "count"), [("llama-2-7b", 32 * (4096 + 4096 + 11008)), ("llama-3-8b", 524_288)])
def test_it_trains_a_number_for_each_output_of_k_and_v_and_each_input_of_down(name, count):
    report = inject_ia3(llama(name), outputs=["k_proj", "v_proj"], inputs=["down_proj"])
    assert report.count.trainable == count == ia3_params(ARCHITECTURES[name])
    assert name != "llama-2-7b" or count == 614_400  # [IA3]'s vectors, by hand


class Block(nn.Module):
    """Two layers whose outputs are scaled, and one whose input is."""

    def __init__(self):
        super().__init__()
        self.k_proj, self.v_proj = nn.Linear(12, 8), nn.Linear(12, 8, bias=False)
        self.norm, self.down_proj = nn.LayerNorm(8), nn.Linear(8, 12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.norm(torch.tanh(self.k_proj(x)) * self.v_proj(x)))


def adapted(**changes) -> Block:
    model = Block()
    inject_ia3(model, **({"outputs": ["k_proj", "v_proj"], "inputs": ["down_proj"]} | changes))
    for layer in adapter_layers(model).values():
        nn.init.uniform_(layer.l, 0.5, 1.5)
    return model


def twin(model: Block) -> Block:
    """A model with the same base and no adapter."""
    new = Block()
    new.load_state_dict({name.replace(".base", ""): t for name, t in model.state_dict().items() if name[-2:] != ".l"})
    return new


def test_only_l_trains_and_removing_gives_the_base_back():
    model, x = Block(), torch.randn(5, 12)
    before, modules = model(x), dict(model.named_modules())
    report = inject_ia3(model, outputs=["k_proj", "v_proj"], inputs=["down_proj"])
    assert {name: layer.scales for name, layer in adapter_layers(model).items()} == {
        "k_proj": "output", "v_proj": "output", "down_proj": "input"
    }  # fmt: skip
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {"k_proj.l", "v_proj.l", "down_proj.l"}
    assert report.count == count_parameters(model)
    assert report.count.trainable == 8 + 8 + 8
    assert torch.equal(model(x), before)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(x).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model(x), before)
    model.k_proj.merge()
    remove(model)
    assert torch.equal(model(x), before)
    assert dict(model.named_modules()) == modules


def test_what_cannot_be_is_refused_before_anything_changes():
    model = Block()
    with pytest.raises(ValueError, match="outputs and inputs both hit v_proj"):
        inject_ia3(model, outputs=["k_proj", "v_proj"], inputs=["v_proj"])
    with pytest.raises(ValueError, match="no module is named"):
        inject_ia3(model, outputs=["k_proj"], inputs=["w2"])
    with pytest.raises(ValueError, match="no targets were given"):
        inject_ia3(model, outputs=[])
    with pytest.raises(TypeError, match="IA3Linear wraps a linear layer or GPT-2's Conv1D; this is a LayerNorm"):
        inject_ia3(model, outputs=["k_proj"], inputs=["norm"])
    assert not adapter_layers(model)
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="scales is 'rows'"):
        IA3Linear(nn.Linear(4, 4), scales="rows")
    with pytest.raises(ValueError, match="wrapped already"):
        IA3Linear(LoRALinear(nn.Linear(4, 4), r=2, alpha=4))


# --- files


def test_files_come_back(tmp_path):
    model, x = adapted(), torch.randn(5, 12)
    save_ia3(model, tmp_path, base_name="some/base", base_sha256="a" * 64)
    there = twin(model)
    with pytest.warns(UserWarning, match="another model"):
        load_ia3(there, tmp_path, base_sha256="b" * 64)
    assert torch.equal(there(x), model(x))
    shapes = {key: tuple(tensor.shape) for key, tensor in load_file(tmp_path / "adapter_model.safetensors").items()}
    assert shapes == {
        "base_model.model.k_proj.ia3_l": (8, 1),
        "base_model.model.v_proj.ia3_l": (8, 1),
        "base_model.model.down_proj.ia3_l": (1, 8),
    }
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == {
        "base_model_name_or_path": "some/base",
        "fan_in_fan_out": False,
        "feedforward_modules": ["down_proj"],
        "inference_mode": True,
        "init_ia3_weights": True,
        "modules_to_save": None,
        "peft_type": "IA3",
        "target_modules": ["down_proj", "k_proj", "v_proj"],
        "task_type": "CAUSAL_LM",
    }
    nn.init.ones_(there.k_proj.l)
    load_ia3(there, tmp_path)  # into the layers that are there
    assert torch.equal(there(x), model(x))


def test_files_keep_modules_that_train_whole(tmp_path):
    model, x = adapted(), torch.randn(5, 12)
    plain = twin(model)
    train_modules(model, ["norm"])
    nn.init.normal_(model.norm.weight)
    save_ia3(model, tmp_path)
    before = plain(x)
    load_ia3(plain, tmp_path)
    assert torch.equal(plain(x), model(x))
    remove(plain)
    assert torch.equal(plain(x), before)


def test_a_file_that_was_trained_over_4_bits_says_so(tmp_path):
    model = nn.Sequential(nn.Identity(), NF4Linear(nn.Linear(12, 8)))
    inject_ia3(model, outputs=["1"])
    save_ia3(model, tmp_path)
    there = nn.Sequential(nn.Identity(), NF4Linear(nn.Linear(12, 8)))
    load_ia3(there, tmp_path)
    with pytest.warns(UserWarning, match="stored as nf4"):
        load_ia3(nn.Sequential(nn.Identity(), nn.Linear(12, 8)), tmp_path)


def test_words_that_peft_would_find_at_the_end_of_another_name_are_written_whole(tmp_path):
    model = nn.ModuleDict({"a": nn.ModuleDict({"fc": nn.Linear(4, 4), "xfc": nn.Linear(4, 4)})})
    inject_ia3(model, outputs=["xfc"], inputs=["a.fc"])
    save_ia3(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["feedforward_modules"] == ["a.fc"]
    load_ia3(nn.ModuleDict({"a": nn.ModuleDict({"fc": nn.Linear(4, 4), "xfc": nn.Linear(4, 4)})}), tmp_path)
    model = nn.ModuleDict({"fc": nn.Linear(4, 4), "xfc": nn.Linear(4, 4)})
    inject_ia3(model, outputs=["xfc"], inputs=["fc"])
    with pytest.raises(ValueError, match="PEFT would take xfc for one of feedforward_modules"):
        save_ia3(model, tmp_path)


def test_what_the_file_has_no_words_for_is_not_saved(tmp_path):
    model = adapted()
    train_biases(model)
    with pytest.raises(ValueError, match="biases train beside this adapter"):
        save_ia3(model, tmp_path)
    model = adapted()
    nn.init.constant_(model.v_proj.l, torch.nan)
    with pytest.raises(ValueError, match="NaN or infinite"):
        save_ia3(model, tmp_path)
    with pytest.raises(ValueError, match="it has no adapter"):
        save_ia3(Block(), tmp_path)
    mixed = adapted(inputs=[])
    inject(mixed, ["down_proj"], lambda base: HoulsbyLinear(base, bottleneck=2))
    with pytest.raises(ValueError, match="down_proj is a HoulsbyLinear"):
        save_ia3(mixed, tmp_path)
    with pytest.raises(ValueError, match="is a IA3Linear: an adapter file of LoRA has no words for it"):
        save_adapter(adapted(), tmp_path)
    assert not list(tmp_path.iterdir())


P = "base_model.model."
BROKEN = {
    "missing": (lambda t: t.pop(f"{P}v_proj.ia3_l"), "v_proj: missing from the file"),
    "no such layer": (lambda t: t.update({f"{P}q_proj.ia3_l": torch.ones(8, 1)}), "no linear layer of that name"),
    "no name": (lambda t: t.update({f"{P}.ia3_l": torch.ones(8, 1)}), "no linear layer of that name"),
    "not linear": (lambda t: t.update({f"{P}norm.ia3_l": torch.ones(8, 1)}), "no linear layer of that name"),
    "another": (lambda t: t.update({f"{P}k_proj.x": torch.ones(8)}), "not the name of an adapter's tensor"),
    "shape": (lambda t: t.update({f"{P}k_proj.ia3_l": torch.ones(9, 1)}), r"l has the shape \(9, 1\); \(8, 1\)"),
    "a row": (lambda t: t.update({f"{P}k_proj.ia3_l": torch.ones(1, 12)}), r"\(1, 12\); \(8, 1\) scales .* output"),
    "a vector": (lambda t: t.update({f"{P}k_proj.ia3_l": torch.ones(8)}), r"k_proj: l has the shape \(8,\)"),
    "NaN": (lambda t: t[f"{P}k_proj.ia3_l"].fill_(torch.nan), "k_proj.ia3_l: not finite floats"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_a_file_that_does_not_fit_changes_nothing(what, tmp_path):
    change, says = BROKEN[what]
    save_ia3(adapted(), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    model = adapted()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=says):
        load_ia3(model, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    if what == "missing":  # which a model without adapters has no opinion on
        return
    plain = Block()
    with pytest.raises(ValueError, match=says):
        load_ia3(plain, tmp_path)
    assert not adapter_layers(plain)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"peft_type": "LORA"}, "has the peft_type 'LORA', not 'IA3'"),
        ({"feedforward_modules": ["down_proj", 3]}, "feedforward_modules: a list of names is needed"),
        ({"feedforward_modules": ["k_proj"]}, "k_proj: l has the shape"),
        ({"modules_to_save": "norm"}, "modules_to_save: a list of names is needed"),
        ({"modules_to_save": ["norm"]}, "norm.weight: missing from the file"),
        ({"ia3_power": 2}, "'ia3_power': not a key this reader knows"),
    ],
)
def test_a_config_that_asks_for_something_else_is_refused(change, says, tmp_path):
    save_ia3(adapted(), tmp_path)
    edit_config(tmp_path, **change)
    model = Block()
    with pytest.raises(ValueError, match=says):
        load_ia3(model, tmp_path)
    assert not adapter_layers(model)


@pytest.mark.parametrize("words", [None, "(.*\\.)?down_proj", []])
def test_without_a_list_of_words_the_shapes_say_what_is_scaled(words, tmp_path):
    model, x = adapted(), torch.randn(5, 12)
    save_ia3(model, tmp_path)
    edit_config(tmp_path, feedforward_modules=words)
    if words == []:
        with pytest.raises(ValueError, match=r"down_proj: l has the shape \(1, 8\); \(12, 1\) scales .* output"):
            load_ia3(twin(model), tmp_path)
        return
    there = twin(model)
    load_ia3(there, tmp_path)
    assert torch.equal(there(x), model(x))


def test_other_layers_in_the_model_and_merged_ones_are_refused(tmp_path):
    save_ia3(adapted(), tmp_path)
    with pytest.raises(ValueError, match="down_proj: has no adapter in the model"):
        load_ia3(adapted(inputs=[]), tmp_path)
    swapped = Block()
    inject_ia3(swapped, outputs=["down_proj"], inputs=["k_proj", "v_proj"])
    with pytest.raises(ValueError, match="k_proj: the model has a IA3Linear over its input here"):
        load_ia3(swapped, tmp_path)
    lora = Block()
    inject(lora, ["k_proj", "v_proj", "down_proj"], lambda base: LoRALinear(base, r=2, alpha=4))
    with pytest.raises(ValueError, match="k_proj: the model has a LoRALinear with r=2 here"):
        load_ia3(lora, tmp_path)
    merged_model = adapted()
    merged_model.k_proj.merge()
    with pytest.raises(ValueError, match="1 layers of the model are merged, the first is k_proj"):
        load_ia3(merged_model, tmp_path)
    with pytest.raises(ValueError, match="this reader knows 'LORA'"):
        load_adapter(Block(), tmp_path)


def test_a_conv1ds_file_has_the_shapes_of_a_linear_layers(tmp_path):
    model = nn.ModuleDict({"c_attn": Conv1D(8, 12), "c_proj": Conv1D(8, 12)})
    inject_ia3(model, outputs=["c_attn"], inputs=["c_proj"])
    save_ia3(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert tensors[f"{P}c_attn.ia3_l"].shape == (8, 1)
    assert tensors[f"{P}c_proj.ia3_l"].shape == (1, 12)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"] is True
