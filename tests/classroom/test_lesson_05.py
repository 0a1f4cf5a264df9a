"""Lesson 05: its pictures' numbers are real models', other right answers pass, and its tables are transformers' own."""

import itertools
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from minilora.classroom.exercises import examine
from minilora.classroom.lessons import lesson_module
from minilora.classroom.pictures.adapter_map import adapter_map, linear_names
from minilora.classroom.pictures.block_map import LETTERS, block_map
from minilora.classroom.pictures.first_step import by_kind, gradient_of, gradients_of
from minilora.llm.architectures import ARCHITECTURES
from minilora.torch_lora import LoRALinear, inject
from minilora.torch_lora.adapter_layer import AdapterLayer
from minilora.torch_lora.inject import adapter_layers
from minilora.torch_lora.layers import is_linear
from minilora.torch_lora.wrap import lora_layer

lesson = lesson_module("05")
claims = lesson_module("05", "claims")
MATCH, INJECT, COUNT, BUDGET = lesson.EXERCISES


# ------------------------------------------------------------------------------------------------------- the pictures


@pytest.mark.parametrize("letters", [{"q", "v"}, {"k", "down"}, set(LETTERS), set()])
@pytest.mark.parametrize("name", ["llama-2-7b", "llama-3-8b", "smollm2-135m"])
def test_the_picture_counts_as_inject_does_in_a_model_of_full_size(name, letters):
    arch = ARCHITECTURES[name]
    block = block_map(arch, letters, r=4)
    model = lesson.of_shape(arch)
    trained = 0
    if letters:
        targets = [f"{letter}_proj" for letter in letters]
        trained = inject(model, targets, lambda base: LoRALinear(base, r=4, alpha=4)).count.trainable

    assert block.trained == trained
    assert block.total == sum(each.numel() for each in model.parameters())


def test_what_is_no_matrix_of_a_llama_is_refused():
    with pytest.raises(ValueError, match="no matrix is called"):
        block_map(ARCHITECTURES["llama-2-7b"], {"w"}, r=4)
    with pytest.raises(ValueError, match="Llama's seven"):
        block_map(ARCHITECTURES["gpt2"], {"q"}, r=4)


def test_a_map_counts_adapters_at_the_places_of_before():
    model = lesson.tiny_llama(2)
    places = linear_names(model)
    inject(model, ["1.self_attn.q_proj"], lambda base: lora_layer(base, r=1, alpha=1))
    q = model.model.layers[1].self_attn.q_proj
    q.base = lora_layer(q.base, r=1, alpha=1)
    found = {(cell.row, cell.column): cell.depth for cell in adapter_map(model, places) if cell.depth}

    assert found == {("self_attn.q_proj", 1): 2}
    assert len(places) == 2 * 7 + 1


def test_a_gradient_is_taken_apart_into_its_largest_singular_values():
    weight = nn.Parameter(torch.zeros(6, 9))
    U, V = (torch.linalg.qr(torch.randn(size, 3)).Q for size in (6, 9))
    weight.grad = U @ torch.diag(torch.tensor([3.0, 2, 1])) @ V.T
    gradient = gradient_of(weight, k=4)

    assert [gradient.captured(r) for r in (1, 2, 3)] == pytest.approx([9, 13, 14], rel=1e-4)
    assert gradient.energy == pytest.approx(14, rel=1e-5)
    torch.testing.assert_close(gradient.U * gradient.S @ gradient.V.T, weight.grad, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="no gradient"):
        gradient_of(nn.Parameter(torch.zeros(2, 2)), k=1)


def test_adapters_filled_with_a_gradient_lower_the_loss_by_what_they_capture():
    torch.manual_seed(0)
    model, tokens, lr, r = lesson.tiny_llama(2).double(), torch.arange(15).reshape(3, 5), 1e-5, 3

    def loss():
        return model(tokens).square().mean()

    names = [name for name in linear_names(model) if name != "lm_head"]
    before = loss()
    before.backward()
    gradients = gradients_of(model, names, k=12)
    inject(model, "all-linear", lambda base: lora_layer(base, r=r, alpha=7.0))
    model.double()
    lesson.fill_with_gradient(model, gradients, lr)
    fell = (before - loss()).item()

    assert fell == pytest.approx(lr * sum(by_kind(gradients, r).values()), rel=1e-2)  # second order in lr is left over


# ------------------------------------------------------------------------------------------------------ other answers


def test_matchers_of_another_build_pass():
    def by_parts(model, targets):
        found = {target: [] for target in targets}
        for name, module in model.named_modules():
            parts = name.split(".")
            for target in targets:
                wanted = target.split(".")
                if target == "all-linear":
                    if is_linear(module) and parts[-1] != "lm_head":
                        found[target].append(name)
                elif parts[-len(wanted) :] == wanted:
                    found[target].append(name)
        if [] in found.values():
            raise ValueError(f"{[target for target in targets if not found[target]]} of {targets}")
        return found

    assert examine(MATCH, by_parts).passed, examine(MATCH, by_parts).message


def test_injections_of_another_build_pass():
    def from_the_parents(model, targets, wrap):
        names = {name for hits in lesson.match_targets(model, targets).values() for name in hits}
        if any(isinstance(model.get_submodule(name), AdapterLayer) for name in names):
            raise ValueError("twice")  # the package's matcher does not look inside adapters
        places = [
            (parent, leaf, child)
            for path, parent in model.named_modules()
            for leaf, child in parent.named_children()
            if f"{path}.{leaf}".lstrip(".") in names
        ]
        wrapped = [wrap(child) for _, _, child in places]
        for (parent, leaf, _), module in zip(places, wrapped, strict=True):
            parent._modules[leaf] = module
        for each in model.parameters():
            each.requires_grad = False
        for layer in adapter_layers(model).values():
            for matrix in layer.adapter_tensors().values():
                matrix.requires_grad = True
        return names

    assert examine(INJECT, from_the_parents).passed, examine(INJECT, from_the_parents).message


def test_counts_and_choices_of_another_build_pass():
    def from_a_model(arch, r, targets):
        model = lesson.of_shape(arch)
        hits = lesson.match_targets(model, targets)
        weights = [model.get_submodule(name).weight for names in hits.values() for name in names]
        return sum(r * sum(weight.shape) for weight in weights)

    def by_bits(gains, costs, budget):
        names, best = sorted(gains), (0.0, ())
        for bits in range(1 << len(names)):
            chosen = tuple(name for place, name in enumerate(names) if bits >> place & 1)
            if sum(costs[name] for name in chosen) <= budget:
                best = max(best, (sum(gains[name] for name in chosen), chosen))
        return list(best[1])

    assert examine(COUNT, from_a_model).passed, examine(COUNT, from_a_model).message
    assert examine(BUDGET, by_bits).passed, examine(BUDGET, by_bits).message


def test_two_mistakes_at_once_are_not_named_as_one():
    def copies_and_freezes_nothing(model, targets, wrap):
        for names in lesson.match_targets(model, targets).values():
            for name in names[:1]:
                lesson.put(model, name, wrap(model.get_submodule(name)))

    def one_layer_without_gqa(arch, r, targets):
        return lesson._counting(features=lesson._without_gqa, layers=lambda arch: 1)(arch, r, targets)

    for exercise, answer in ((INJECT, copies_and_freezes_nothing), (COUNT, one_layer_without_gqa)):
        failure = examine(exercise, answer).failure
        assert failure is not None and failure.bug is None


def test_the_best_set_is_the_best_of_all_sets():
    case = lesson.budget_inputs(np.random.default_rng(3))
    gains, costs, budget = case.values()
    chosen = lesson.best_targets(gains, costs, budget)
    value = math.fsum(gains[name] for name in chosen)

    for size in range(8):
        for names in itertools.combinations(gains, size):
            if sum(costs[name] for name in names) <= budget and set(names) != chosen:
                assert math.fsum(gains[name] for name in names) < value


def test_gains_of_which_two_sets_tie_are_not_asked():
    assert lesson._ties({"q": 0.1, "v": 0.2, "up": 0.3})
    assert not lesson._ties({"q": 0.1, "v": 0.2, "up": 0.4})


def test_the_published_counts_follow_from_the_formula():
    llama_2, llama_3 = ARCHITECTURES["llama-2-7b"], ARCHITECTURES["llama-3-8b"]
    ends = {"llama-2-7b": (8192, 8192, 15104), "llama-3-8b": (8192, 5120, 18432)}

    for name, (q, v, gate) in ends.items():
        assert lesson.PUBLISHED[name, 16, "q_proj v_proj"] == 32 * 16 * (q + v)
        assert lesson.PUBLISHED[name, 16, "all-linear"] == 32 * 16 * (2 * q + 2 * v + 3 * gate)
    assert llama_2.n_kv_heads == 32 and llama_3.n_kv_heads == 8


def test_the_counts_inputs_tell_a_head_dim_from_a_quotient():
    for seed in range(20):
        arch = lesson.architecture_inputs(np.random.default_rng(seed))["arch"]
        assert arch.head_dim != arch.hidden // arch.n_heads and arch.n_heads * arch.head_dim != arch.hidden
        assert replace(arch, n_kv_heads=arch.n_heads) != arch


# ----------------------------------------------------------------------------------------- transformers as the oracle

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 50,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


@pytest.mark.parametrize("model_type", claims.LINEAR_LAYERS)
def test_the_layers_that_the_claims_name_are_those_of_transformers(model_type):
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    settings = SMALL | ({} if model_type in ("gpt2", "bloom") else {"num_key_value_heads": 4})
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**settings))
    found = {name.rpartition(".")[2] for name in linear_names(model)}

    assert found - {"lm_head", "embed_out"} == set(claims.LINEAR_LAYERS[model_type])


def test_mixtrals_experts_are_parameters_and_no_modules():
    from transformers import MixtralConfig, MixtralForCausalLM

    with torch.device("meta"):
        model = MixtralForCausalLM(MixtralConfig(num_local_experts=2, num_key_value_heads=4, **SMALL))

    assert sorted({name.rpartition(".")[2] for name, each in model.named_parameters() if each.dim() == 3}) == [
        "down_proj",
        "gate_up_proj",
    ]


def test_t5s_layer_has_the_names_that_the_claims_say():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(d_model=8, d_kv=4, d_ff=12, num_layers=1, num_decoder_layers=1, num_heads=2, vocab_size=20)
    with torch.device("meta"):
        model = T5ForConditionalGeneration(config)
    names = [name for name in linear_names(model) if name.startswith("decoder.block.0.")]

    assert sorted(names) == sorted(claims.T5_LAYER)
