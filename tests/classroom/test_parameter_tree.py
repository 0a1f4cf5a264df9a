"""The tree of parameters agrees with a real model, a real optimizer, and the size calculator."""

import pytest
import torch

from minilora.classroom.parameter_tree import EVERYTHING, parameter_tree
from minilora.llm.architectures import ARCHITECTURES
from minilora.llm.config import ModelConfig
from minilora.llm.model import Decoder
from minilora.llm.setup import Setup
from minilora.llm.sizes import OPTIMIZERS, adapter_shapes
from minilora.llm.training_memory import training_bytes
from minilora.torch_lora import LoRALinear, count_parameters, inject

SMOL = ARCHITECTURES["smollm2-135m"]
each_target = pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "down_proj"], "all-linear"])


def a_model_without_storage() -> Decoder:
    config = ModelConfig(
        vocab_size=SMOL.vocab,
        hidden_size=SMOL.hidden,
        intermediate_size=SMOL.intermediate,
        n_layers=SMOL.n_layers,
        n_heads=SMOL.n_heads,
        n_kv_heads=SMOL.n_kv_heads,
        tie_word_embeddings=SMOL.tied,
    )
    with torch.device("meta"):
        return Decoder(config)


@each_target
def test_counts_are_those_of_the_real_model_with_adapters(targets):
    model = a_model_without_storage()
    report = inject(model, targets, lambda base: LoRALinear(base, r=4, alpha=8))
    tree = parameter_tree(SMOL, r=4, targets=targets, optimizer="adamw")

    assert (tree.trained, tree.total) == (report.count.trainable, report.count.total)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@each_target
def test_state_is_what_the_size_calculator_says(targets, optimizer):
    tree = parameter_tree(SMOL, r=4, targets=targets, optimizer=optimizer)
    named = targets if isinstance(targets, str) else tuple(targets)
    told = training_bytes(SMOL, Setup(method="lora", r=4, targets=named, optimizer=optimizer))

    assert (tree.state_bytes, tree.gradient_bytes) == (told.optimizer, told.gradients)


def test_adapters_have_the_shapes_that_a_file_of_them_has():
    tree = parameter_tree(SMOL, r=4, targets="all-linear", optimizer="sgd")
    shown = {part.name.replace("*", "0"): part.adapter for part in tree.parts if part.adapter}
    told = adapter_shapes(SMOL, r=4)

    assert len(shown) == 7
    for name, (A, B) in shown.items():
        assert A == told[f"base_model.model.{name}.lora_A.weight"]
        assert B == told[f"base_model.model.{name}.lora_B.weight"]


def test_everything_is_full_fine_tuning():
    tree = parameter_tree(SMOL, r=4, targets=EVERYTHING, optimizer="adamw")

    assert tree.trained == tree.total == count_parameters(a_model_without_storage()).total
    assert tree.state_bytes == 8 * tree.total


def test_where_the_rest_is_not_frozen_only_the_wrapped_weights_are():
    right = parameter_tree(SMOL, r=4, targets=["q_proj", "v_proj"], optimizer="adamw")
    wrong = parameter_tree(SMOL, r=4, targets=["q_proj", "v_proj"], optimizer="adamw", freezes_rest=False)
    frozen = [part.name.rpartition(".")[2] for part in wrong.parts if not part.trains]

    assert frozen == ["q_proj", "v_proj"]
    assert wrong.total == right.total
    assert wrong.trained == wrong.total - sum(part.params for part in right.parts if part.adapter)


def test_a_biased_architecture_counts_its_biases_apart():
    gpt2 = ARCHITECTURES["gpt2"]
    tree = parameter_tree(gpt2, r=8, targets=["c_attn"], optimizer="sgd")

    assert {part.name: part.shape for part in tree.parts}["transformer.h.*.attn.c_attn.bias"] == (2304,)
    assert tree.trained == 294_912  # as PEFT's own test prints
    assert tree.state_bytes == 0


def test_a_target_outside_the_decoder_layers_is_refused():
    with pytest.raises(ValueError, match=r"\['lm_head'\] stand outside the decoder layers: choose targets inside"):
        parameter_tree(SMOL, r=4, targets=["q_proj", "lm_head"], optimizer="adamw")
