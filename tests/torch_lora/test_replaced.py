"""Biases and whole modules that an adapter replaces: trained, merged, saved, and given back bit for bit."""

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from minilora.qlora import QLoRALinear
from minilora.torch_lora import (
    LoRALinear,
    inject,
    load_adapter,
    merged,
    remove,
    save_adapter,
    train_biases,
    train_modules,
)
from minilora.torch_lora.inject import freeze_all_but_adapters
from minilora.torch_lora.peft_files import write_adapter
from minilora.torch_lora.replaced import replaced_tensors

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(3))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(8, 6), nn.Linear(6, 8)
        self.norm, self.head = nn.BatchNorm1d(8), nn.Linear(8, 8)

    def forward(self, x):
        return self.head(self.norm(self.v_proj(self.q_proj(x))))


def wrap(base: nn.Module) -> LoRALinear:
    return LoRALinear(base, r=2, alpha=4)


def trained(*, biases: str | None = "all", modules: list[str] = ["head"]) -> tuple[Model, Model]:  # noqa: B006
    """A model with an adapter whose every tensor moved, and a copy of what it was before."""
    model = Model().eval()
    before = copy.deepcopy(model)
    inject(model, "q_proj", wrap)
    if biases:
        train_biases(model, biases)
    if modules:
        train_modules(model, modules)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    return model, before


def assert_same_bits(model: nn.Module, other: nn.Module) -> None:
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def edit_config(folder: Path, changes: dict[str, object]) -> None:
    config = json.loads((folder / "adapter_config.json").read_text()) | changes
    write_adapter(folder, config, load_file(folder / "adapter_model.safetensors"), {})


def test_what_begins_to_train_changes_nothing_and_is_named():
    model = Model().eval()
    y = model(X)
    inject(model, "q_proj", wrap)

    assert train_biases(model) == ["q_proj.base.bias"]
    assert train_modules(model, "head") == {"head": ["head"]}
    assert torch.equal(model(X), y)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        "q_proj.A", "q_proj.B", "q_proj.base.bias", "head.weight", "head.bias",
    }  # fmt: skip


def test_all_biases_train_and_stay_in_training_when_more_is_adapted():
    model = Model().eval()
    inject(model, "q_proj", wrap)
    names = train_biases(model, "all")
    inject(model, "v_proj", wrap)
    freeze_all_but_adapters(model)

    assert names == ["q_proj.base.bias", "v_proj.bias", "norm.bias", "head.bias"]
    assert {n for n, p in model.named_parameters() if p.requires_grad and n.endswith("bias")} == {
        "q_proj.base.bias", "v_proj.base.bias", "norm.bias", "head.bias",
    }  # fmt: skip


def test_remove_gives_back_the_same_objects_with_the_same_bits():
    model = Model().eval()
    before, objects = copy.deepcopy(model), dict(model.named_parameters())
    inject(model, ["q_proj", "v_proj"], wrap)
    train_biases(model, "all")
    train_modules(model, ["norm", "head"])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1)
    model.train()(X)  # moves the norm's running mean too, a buffer
    remove(model)

    assert_same_bits(model, before)
    assert all(parameter is objects[name] for name, parameter in model.named_parameters())
    assert replaced_tensors(model) == {}


def test_what_is_kept_is_neither_parameter_nor_state():
    model, before = trained(biases=None)
    plain = {name.replace(".base", "") for name in model.state_dict() if name not in ("q_proj.A", "q_proj.B")}

    assert plain == before.state_dict().keys()
    assert len(list(model.parameters())) == len(list(before.parameters())) + 2


def test_merging_leaves_biases_and_modules_where_they_are():
    model, _ = trained()
    y, bias = model(X), model.q_proj.base.bias
    with merged(model):
        assert model.q_proj.base.bias is bias
        torch.testing.assert_close(model(X), y, rtol=1e-5, atol=1e-5)  # float32; the sum W + ΔW is rounded once more
    assert torch.equal(model(X), y)


def test_a_fused_layer_has_the_new_bias_and_nothing_to_give_back():
    model, _ = trained()
    layer = model.q_proj.fused()

    assert torch.equal(layer.bias, model.q_proj.base.bias)
    assert replaced_tensors(layer) == {}
    assert not any(p.requires_grad for p in layer.parameters())


def test_remove_while_merged_gives_the_base_back():
    model, before = trained()
    model.q_proj.merge()
    remove(model)

    assert_same_bits(model, before)


def test_a_model_that_was_cast_gets_its_own_tensors_back_in_the_new_dtype():
    model, before = trained(modules=["head", "norm"])
    remove(model.bfloat16())

    assert_same_bits(model, before.bfloat16())
    assert model.head.weight.dtype == model.norm.running_mean.dtype == torch.bfloat16
    assert isinstance(model.head.weight, nn.Parameter)
    assert not isinstance(model.norm.running_mean, nn.Parameter)


def test_a_copied_model_gives_back_its_own():
    model, before = trained()
    twin = copy.deepcopy(model)
    remove(model)
    remove(twin)

    assert_same_bits(twin, before)
    assert twin.head.weight is not model.head.weight


@pytest.mark.parametrize("biases", ["all", "lora_only", None])
@pytest.mark.parametrize("modules", [["head"], ["head", "norm"], []])
def test_a_round_trip_through_files_and_back(tmp_path, biases, modules):
    model, before = trained(biases=biases, modules=modules)
    save_adapter(model, tmp_path)
    fresh = copy.deepcopy(before)
    load_adapter(fresh, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())

    assert torch.equal(fresh(X), model(X))
    assert config["bias"] == (biases or "none")
    assert config["modules_to_save"] == (sorted(modules) or None)
    assert {name for name, p in fresh.named_parameters() if p.requires_grad} == {"q_proj.A", "q_proj.B"}
    load_adapter(fresh, tmp_path)  # once more, into what is there
    remove(fresh)
    assert_same_bits(fresh, before)


def test_loaded_biases_and_modules_train_when_asked(tmp_path):
    save_adapter(trained()[0], tmp_path)
    model = Model().eval()
    load_adapter(model, tmp_path, train_replaced=True)
    model(X).square().sum().backward()

    assert all(model.get_parameter(name).grad.abs().sum() > 0 for name in ("q_proj.base.bias", "head.weight"))
    assert model.q_proj.base.weight.grad is None


def test_what_an_optimizer_holds_is_loaded_in_place_and_trains_on(tmp_path):
    saved, _ = trained(modules=["head", "norm"])
    save_adapter(saved, tmp_path)
    model, _ = trained(modules=["head", "norm"])
    held = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    load_adapter(model, tmp_path)

    assert_same_bits(model.head, saved.head)
    assert_same_bits(model.norm, saved.norm)
    assert {name: p for name, p in model.named_parameters() if p.requires_grad} == held  # by identity
    load_adapter(model, tmp_path, train_replaced=True)
    model(X).sum().backward()


def test_a_module_with_children_and_buffers_is_saved_whole(tmp_path):
    model, _ = trained(biases=None, modules=[])
    model.block = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    train_modules(model, "block")
    model.block(X)  # in training mode: the buffers move
    save_adapter(model, tmp_path)
    fresh = copy.deepcopy(model)
    remove(fresh)
    load_adapter(fresh, tmp_path)

    assert_same_bits(fresh, model)
    assert fresh.block[1].num_batches_tracked == 1


def test_a_bfloat16_model_keeps_its_dtype_and_gets_rounded_values(tmp_path):
    model, _ = trained(modules=[])
    save_adapter(model, tmp_path)
    fresh = Model().bfloat16()
    load_adapter(fresh, tmp_path)

    assert fresh.head.bias.dtype == torch.bfloat16
    assert torch.equal(fresh.head.bias, model.head.bias.bfloat16())


def test_over_4_bits_a_bias_loads_and_does_not_train(tmp_path):
    save_adapter(trained(biases="lora_only", modules=[])[0], tmp_path)
    model = Model()
    weight, flags = model.q_proj.weight, [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match=r"q_proj.bias cannot train: NF4Linear gives it no gradient"):
        load_adapter(model, tmp_path, QLoRALinear, train_replaced=True)
    assert model.q_proj.weight is weight
    assert [p.requires_grad for p in model.parameters()] == flags

    load_adapter(model, tmp_path, QLoRALinear)
    assert torch.equal(model.q_proj.base.bias, trained_bias(tmp_path))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"q_proj.base.bias cannot train: NF4Linear stores no floats"):
            train_biases(model)


def trained_bias(folder) -> torch.Tensor:
    return load_file(folder / "adapter_model.safetensors")["base_model.model.q_proj.base_layer.bias"]


# --- what is refused


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: train_modules(m, "q_proj"), "q_proj cannot train whole: it has an adapter, q_proj"),
        (lambda m: train_modules(m, "act"), "act cannot train whole: it holds no tensors"),
        (lambda m: train_modules(m, "heads"), "no module is named .*did you mean 'head'"),
    ],
)
def test_modules_that_cannot_train_whole_are_refused(call, message):
    model = Model()
    model.act = nn.ReLU()
    inject(model, "q_proj", wrap)
    with pytest.raises(ValueError, match=message):
        call(model)
    assert replaced_tensors(model) == {}


def test_a_model_without_biases_has_none_to_train():
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    with pytest.raises(ValueError, match="nothing in this model has a bias"):
        train_biases(model, "all")
    inject(model, "0", wrap)
    with pytest.raises(ValueError, match="no adapted layer of this model has a bias"):
        train_biases(model)


def test_a_part_of_the_biases_is_nothing_that_peft_could_say(tmp_path):
    model, _ = trained(biases="lora_only", modules=[])
    inject(model, "v_proj", wrap)
    with pytest.raises(ValueError, match="1 biases were replaced, neither all 4 nor the 2 of adapted layers"):
        save_adapter(model, tmp_path)


def test_a_module_whose_name_is_the_end_of_anothers_is_nothing_that_peft_could_say(tmp_path):
    model, _ = trained(biases=None, modules=["head"])
    model.forehead = nn.Linear(8, 8)
    with pytest.raises(ValueError, match=r"PEFT would take forehead.bias for a part of modules_to_save = \['head'\]"):
        save_adapter(model, tmp_path)


def test_a_shared_tensor_is_untied_with_a_warning():
    model = Model()
    model.head.weight = model.v_proj.weight = nn.Parameter(torch.randn(8, 8))
    inject(model, "q_proj", wrap)
    with pytest.warns(UserWarning, match=r"head.weight was one tensor with v_proj.weight; .* they are untied now"):
        train_modules(model, "head")
    assert model.head.weight is not model.v_proj.weight
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_modules(model, "head")  # once more: nothing is untied
    remove(model)
    assert model.head.weight is model.v_proj.weight


@pytest.mark.parametrize("name", ["q_proj.base_layer.bias", "head.weight"])
def test_a_tensor_that_the_config_promises_must_be_there_in_its_shape_and_finite(tmp_path, name):
    save_adapter(trained()[0], tmp_path)
    path, key = tmp_path / "adapter_model.safetensors", f"base_model.model.{name}"
    tensors = load_file(path)
    for bad, message in (
        (None, "missing from the file"),
        (torch.zeros(3), r"shape \(3,\), the model has"),
        (torch.full_like(tensors[key], float("nan")), "not finite floats"),
        (tensors[key].int(), "not finite floats"),
    ):
        broken = {k: v for k, v in tensors.items() if k != key} | ({} if bad is None else {key: bad})
        save_file(broken, path)
        model = Model()
        before = copy.deepcopy(model)
        with pytest.raises(ValueError, match=f"{key}: {message}"):
            load_adapter(model, tmp_path)
        assert_same_bits(model, before)


def test_a_module_that_was_replaced_must_be_in_the_file_that_is_loaded_over_it(tmp_path):
    save_adapter(trained(biases=None, modules=[])[0], tmp_path)
    with pytest.raises(ValueError, match=r"head.weight: replaced in the model, not in the file"):
        load_adapter(trained(biases=None)[0], tmp_path)


def test_a_file_that_adapts_a_module_and_replaces_it_is_refused(tmp_path):
    save_adapter(trained(biases=None, modules=[])[0], tmp_path)
    edit_config(tmp_path, {"modules_to_save": ["q_proj"]})
    with pytest.raises(ValueError, match="q_proj: the file both adapts it and replaces it whole"):
        load_adapter(Model(), tmp_path)


def test_a_pattern_that_hits_nothing_is_warned_of(tmp_path):
    save_adapter(trained(biases=None, modules=[])[0], tmp_path)
    edit_config(tmp_path, {"alpha_pattern": {"k_proj": 2}})
    with pytest.warns(UserWarning, match=r"the config's patterns \['k_proj'\] hit no layer of this adapter"):
        load_adapter(Model(), tmp_path)
