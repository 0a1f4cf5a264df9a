"""What every method that wraps a layer, or a model, keeps: the same tests for all, on one small decoder.

LoRA+ and GaLore wrap nothing: they are optimizers, and their own tests hold them to their papers.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from minilora.llm import Decoder, ModelConfig
from minilora.methods import (
    HoulsbyLinear,
    IA3Linear,
    PrefixTuning,
    PromptTuning,
    adalora_layer,
    dora_layer,
    inject_ia3,
    load_houlsby,
    load_ia3,
    olora_layer,
    pissa_layer,
    save_houlsby,
    save_ia3,
)
from minilora.methods.peft_adalora import load_adalora, save_adalora
from minilora.methods.peft_prompt import load_prompt, save_prompt
from minilora.qlora import NF4Linear, PagedAdamW
from minilora.torch_lora import inject, load_adapter, lora_layer, merged, remove, save_adapter
from minilora.torch_lora.inject import adapter_layers
from minilora.train.data import collate, mask_prompt
from minilora.train.trainer import train

CONFIG = ModelConfig(vocab_size=50, hidden_size=24, intermediate_size=40, n_layers=2, n_heads=6, n_kv_heads=2)
R, BOTTLENECK, N = 3, 5, 4
LINEAR = ["q_proj", "v_proj", "down_proj"]
SHAPES = {"q_proj": (24, 24), "v_proj": (8, 24), "down_proj": (24, 40), "o_proj": (24, 24)}  # (out, in) of a layer
TOKENS = torch.arange(2 * 12).reshape(2, 12) * 7 % 50


def of_layers(names: list[str], count: Callable[[int, int], int]) -> int:
    """A sum over the layers of this name in both blocks."""
    return CONFIG.n_layers * sum(count(*SHAPES[name]) for name in names)


def over(wrap: Callable[..., nn.Module], names: list[str] = LINEAR, **settings: Any) -> Callable[[Decoder], Any]:
    return lambda model: inject(model, names, lambda base: wrap(base, **settings))


@dataclass(frozen=True)
class Method:
    """How a method is put on a model, and what it promises."""

    put: Callable[[Decoder], Any]
    count: int  # numbers that train
    save: Callable[..., None] = save_adapter
    load: Callable[..., Any] = load_adapter
    changes_nothing: bool = True  # when it is new
    merges: bool = True


LORA = of_layers(LINEAR, lambda out, into: R * (out + into))
METHODS = {
    "LoRA": Method(over(lora_layer, r=R, alpha=6), LORA),
    "rsLoRA": Method(over(lora_layer, r=R, alpha=6, use_rslora=True), LORA),
    "DoRA": Method(
        over(dora_layer, r=R, alpha=6),
        LORA + of_layers(LINEAR, lambda out, into: out),
        load=lambda model, folder: load_adapter(model, folder, dora_layer),
    ),
    "AdaLoRA": Method(
        over(adalora_layer, r=R, alpha=6), LORA + of_layers(LINEAR, lambda out, into: R), save_adalora, load_adalora
    ),
    "PiSSA": Method(over(pissa_layer, r=R, alpha=6), LORA),
    "OLoRA": Method(over(olora_layer, r=R, alpha=6), LORA),
    "IA³": Method(
        lambda model: inject_ia3(model, outputs=["q_proj", "v_proj"], inputs=["down_proj"]),
        of_layers(["q_proj", "v_proj"], lambda out, into: out) + of_layers(["down_proj"], lambda out, into: into),
        save_ia3,
        load_ia3,
    ),
    "Houlsby": Method(
        over(HoulsbyLinear, ["o_proj", "down_proj"], bottleneck=BOTTLENECK),
        of_layers(["o_proj", "down_proj"], lambda out, into: 2 * BOTTLENECK * out + BOTTLENECK + out),
        save_houlsby,
        load_houlsby,
        merges=False,
    ),
    "prefix tuning": Method(
        over(PrefixTuning, ["model"], n_virtual=N),
        N * CONFIG.n_layers * 2 * 8,  # 8: numbers in one layer's key of a token
        save_prompt,
        load_prompt,
        changes_nothing=False,
        merges=False,
    ),
    "prompt tuning": Method(
        over(PromptTuning, ["model"], n_virtual=N), N * 24, save_prompt, load_prompt, False, merges=False
    ),
}


@pytest.fixture(params=METHODS)
def method(request) -> Method:
    return METHODS[request.param]


@pytest.fixture
def model() -> Decoder:
    torch.manual_seed(0)
    model = Decoder(CONFIG).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.2)
    return model


@torch.no_grad()
def trained(model: Decoder) -> Decoder:
    """As after a training: no number of the adapter is where it began."""
    for layer in adapter_layers(model).values():
        for tensor in layer.adapter_tensors().values():
            tensor.add_(0.2 * torch.rand_like(tensor) + 0.05)
    return model


@torch.no_grad()
def logits(model: Decoder) -> torch.Tensor:
    return model(TOKENS)


def test_a_new_one_changes_nothing(method, model):
    before = logits(model)
    method.put(model)
    # virtual tokens are there from the start; begun with words they are the base that reads these: test_prompt
    assert torch.equal(logits(model), before) == method.changes_nothing


def test_its_own_numbers_train_and_no_others(method, model):
    method.put(model)
    own = {id(t) for layer in adapter_layers(model).values() for t in layer.adapter_tensors().values()}
    trains = {id(p): p.numel() for p in model.parameters() if p.requires_grad}
    assert trains.keys() == own
    assert sum(trains.values()) == method.count
    model(TOKENS).square().sum().backward()
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_gradients_are_those_of_small_differences(method, model):
    """Along one random direction of each tensor, in float64. DoRA's leaves the lengths out: test_dora has them."""
    method.put(model)
    trained(model).double()
    for layer in adapter_layers(model).values():
        if hasattr(layer, "lengths"):
            still = layer.lengths(torch.float64)
            layer.lengths = lambda dtype, still=still: still
    tensors = [t for layer in adapter_layers(model).values() for t in layer.adapter_tensors().values()]
    weights = torch.randn(*TOKENS.shape, CONFIG.vocab_size, dtype=torch.float64)
    (model(TOKENS) * weights).sum().backward()
    for tensor in tensors:
        direction, step = torch.randn_like(tensor), 1e-5
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                tensor.add_(sign * step * direction)
                values.append((model(TOKENS) * weights).sum().item())
                tensor.sub_(sign * step * direction)
        slope = (values[0] - values[1]) / (2 * step)
        # differences: step² in theory, 1e-16 · |sum| / step in float64; of sums of a few hundred
        assert slope == pytest.approx((tensor.grad * direction).sum().item(), rel=1e-5, abs=1e-4)


def test_it_comes_back_from_its_file(method, model, tmp_path):
    method.put(model)
    method.save(trained(model), tmp_path)
    wanted = logits(model)
    remove(model)
    assert not torch.allclose(logits(model), wanted, atol=1e-2)
    method.load(model, tmp_path)
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-5)  # PiSSA's comes back as r products more


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("LoRA", "lora_alpha", 7),
        ("DoRA", "lora_alpha", 7),
        ("AdaLoRA", "lora_alpha", 7),
        ("IA³", "feedforward_modules", []),
        ("Houlsby", "nonlinearity", "relu"),
        ("prefix tuning", "num_virtual_tokens", 5),
    ],
)
def test_the_config_of_another_saving_is_refused(name, key, value, model, tmp_path):
    """As where the process was killed between the two files, over an adapter with another setting."""
    METHODS[name].put(model)
    METHODS[name].save(model, tmp_path)
    remove(model)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {key: value}))
    with pytest.raises(ValueError, match=r"is not the config that adapter_model\.safetensors was written with"):
        METHODS[name].load(model, tmp_path)
    assert not adapter_layers(model)


def test_it_merges_to_the_same_output_or_refuses(method, model):
    method.put(model)
    wanted = logits(trained(model))
    if not method.merges:
        with pytest.raises(TypeError, match=r"cannot be merged|cannot merge"), merged(model):
            pass
        assert torch.equal(logits(model), wanted)
        return
    with merged(model):
        torch.testing.assert_close(logits(model), wanted, rtol=1e-3, atol=1e-4)  # float32, through two layers
    assert torch.equal(logits(model), wanted)


def test_it_works_over_4_bits(method, model):
    for name in [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"]:
        model.set_submodule(name, NF4Linear(model.get_submodule(name)))
    before = logits(model)
    method.put(model)
    assert torch.equal(logits(model), before) == method.changes_nothing
    trained(model)(TOKENS).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters() if p.requires_grad)


def test_it_learns_in_the_trainer(method, model):
    method.put(model)
    samples = [mask_prompt([1 + n, 2, 3], [4 + n, 5], eos=0) for n in range(4)]
    optimizer = PagedAdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    training = train(model, [collate(samples, pad=0)] * 15, optimizer)
    assert training.steps[-1].loss < 0.9 * training.steps[0].loss


def test_taken_off_it_leaves_the_base_as_it_was(method, model):
    before = logits(model)
    weights = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    method.put(model)
    trained(model)
    remove(model)
    after = dict(model.named_parameters())
    assert after.keys() == weights.keys()
    assert all(id(after[n]) == i and torch.equal(after[n], w) for n, (i, w) in weights.items())
    assert torch.equal(logits(model), before)


def test_no_method_is_left_out():
    made = {type(layer) for name in METHODS for layer in put_on_new(METHODS[name])}
    assert {IA3Linear, HoulsbyLinear, PrefixTuning, PromptTuning} <= made and len(made) >= 9


def put_on_new(method: Method) -> list[nn.Module]:
    model = Decoder(CONFIG)
    method.put(model)
    return list(adapter_layers(model).values())
